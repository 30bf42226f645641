"""When somebody is told, and of what: Prometheus' rules, as data.

Names of metrics are those of the instruments, so that a new name needs no change here. What an
alert means in full, and what to do, is in docs/monitoring.md under the alert's own name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from deploy.monitoring import KEY_HOLDER, SERVER
from secagg.errors import IdentityError, SecaggError
from secagg.instruments import Instrument
from secagg.rpc import metrics as shared
from secagg_keyholder import metrics as keyholder
from secagg_server import metrics as server

__all__ = ["ALERTS", "Alert", "rules"]

_DAY = 24 * 3600
_GIB = 1 << 30


def _reasons(root: type[SecaggError]) -> Iterator[str]:
    yield root.reason
    for each in root.__subclasses__():
        yield from _reasons(each)


# Whoever calls with what is not theirs.
_STRANGERS = "|".join(_reasons(IdentityError))
_READY = shared.READY.prometheus
_EXPIRY = shared.CERTIFICATE_EXPIRY.prometheus
_REFUSED_CALLS = shared.REFUSED_CALLS.prometheus
_OPEN = server.OPEN_ROUNDS.prometheus
_TASKS = server.TASKS.prometheus
_DISK = server.DISK_FREE.prometheus


def _grown(counter: Instrument, where: str, window: str, by: str = "") -> str:
    """How much a counter has grown, for each service."""
    labels = ", ".join(filter(None, ("job", "instance", by)))
    series = f"{counter.prometheus}{{{where}}}" if where else counter.prometheus
    return f"sum by ({labels}) (increase({series}[{window}]))"


def _slowest(histogram: Instrument, window: str, by: str = "") -> str:
    """What 95 of 100 observations are below, for each service."""
    labels = ", ".join(filter(None, ("job", "instance", by, "le")))
    series = f"{histogram.prometheus}_bucket"
    return f"histogram_quantile(0.95, sum by ({labels}) (rate({series}[{window}])))"


_FAILED = _grown(server.ROUNDS, 'outcome!="DONE"', "1h")
_REFUSED = _grown(keyholder.VERDICTS, 'verdict="refused"', "1h")


@dataclass(frozen=True)
class Alert:
    """One alert.

    Attributes:
        severity: ``critical`` is worth waking somebody for, ``warning`` a look on the same day,
            ``info`` one when there is time.
        holds: how long ``expr`` has to hold before anybody is told; empty for at once.
        summary: what has happened, in one line; ``$labels`` and ``$value`` as Prometheus has them.
        action: the first thing to do.
    """

    group: str
    name: str
    severity: str
    holds: str
    expr: str
    summary: str
    action: str

    @property
    def runbook(self) -> str:
        """Where all of it is said."""
        return f"docs/monitoring.md#{self.name.lower()}"

    def rule(self) -> dict[str, Any]:
        """As Prometheus reads it."""
        held = {"for": self.holds} if self.holds else {}
        return {
            "alert": self.name,
            "expr": self.expr,
            **held,
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.action,
                "runbook": self.runbook,
            },
        }


_WHO = "{{ $labels.job }} at {{ $labels.instance }}"
# Growth is extrapolated, and seldom whole.
_MANY = '{{ $value | printf "%.0f" }}'

ALERTS = (
    # Is it there?
    Alert(
        "secagg-availability",
        "SecaggDown",
        "critical",
        "2m",
        f'up{{job=~"{SERVER}|{KEY_HOLDER}"}} == 0',
        f"{_WHO} does not answer a scrape.",
        "See whether the process runs and its monitor listener can be reached. Rounds stand still "
        "without either service; nothing is lost.",
    ),
    Alert(
        "secagg-availability",
        "SecaggNotReady",
        "critical",
        "5m",
        f"{_READY} == 0",
        f"{_WHO} runs and is not ready.",
        "Its log says what it waits for: the server for its store, its disk and the key holder, "
        "the key holder for its ledger and its keys.",
    ),
    Alert(
        "secagg-availability",
        "SecaggRestarts",
        "warning",
        "",
        f'changes(process_start_time_seconds{{job=~"{SERVER}|{KEY_HOLDER}"}}[30m]) > 2',
        f"{_WHO} has started {{{{ $value }}}} times in 30 minutes.",
        "Read the last lines of its log before each start: an exit code, or killed for memory.",
    ),
    Alert(
        "secagg-availability",
        "SecaggCertificateExpiresSoon",
        "warning",
        "1h",
        f"{_EXPIRY} - time() < {21 * _DAY} >= {3 * _DAY}",
        f"The certificate of {_WHO} expires in {{{{ $value | humanizeDuration }}}}.",
        "Rotate it with `secagg provision`; the listener takes the new one up without a restart.",
    ),
    Alert(
        "secagg-availability",
        "SecaggCertificateExpires",
        "critical",
        "",
        f"{_EXPIRY} - time() < {3 * _DAY}",
        f"The certificate of {_WHO} expires in {{{{ $value | humanizeDuration }}}}.",
        "Rotate it with `secagg provision` today: nobody talks to a service whose time is over.",
    ),
    Alert(
        "secagg-availability",
        "SecaggVersionsDiffer",
        "info",
        "1h",
        f"count(count by (version) ({shared.BUILD.prometheus})) > 1",
        "Server and key holder have been of different versions for an hour.",
        "Finish the upgrade, or take it back.",
    ),
    # Are rounds finishing, and if not, why?
    Alert(
        "secagg-rounds",
        "SecaggTaskFailed",
        "warning",
        "",
        f'delta({_TASKS}{{state="FAILED"}}[15m]) > 0',
        f"A task has failed on {_WHO}.",
        "`secagg-server task show` has the reason; the model of the last finished round stays.",
    ),
    Alert(
        "secagg-rounds",
        "SecaggRoundsFail",
        "warning",
        "",
        f"{_FAILED} >= 3\n  and {_FAILED} > 0.5 * {_grown(server.ROUNDS, '', '1h')}",
        f"{_MANY} attempts at rounds have failed on {_WHO} within an hour, more than have not.",
        "Look at failed attempts by reason: QUORUM_NOT_REACHED is about clients, "
        "RELEASE_REFUSED and BUDGET_SPENT about the key holder, STORAGE_UNAVAILABLE about a disk.",
    ),
    Alert(
        "secagg-rounds",
        "SecaggRoundStuck",
        "critical",
        "30m",
        f'sum by (job, instance) ({_OPEN}{{state!="COLLECTING"}}) > 0\n'
        f"  and {_grown(server.ROUNDS, '', '10m')} == 0",
        f"A round on {_WHO} has been past collecting for 30 minutes, and none has ended.",
        "See in which state it is: it waits for the key holder, for a worker, or for the disk.",
    ),
    Alert(
        "secagg-rounds",
        "SecaggNoRounds",
        "warning",
        "1d",
        f'sum by (job, instance) ({_TASKS}{{state="RUNNING"}}) > 0\n'
        "  and " + _grown(server.ROUNDS, 'outcome="DONE"', "1h") + " == 0",
        f"Tasks run on {_WHO}, and no round has finished for a day.",
        "See whether clients call at all, and how long the task lets a round collect.",
    ),
    Alert(
        "secagg-rounds",
        "SecaggSumLost",
        "warning",
        "",
        _grown(server.ROUNDS, 'outcome="VOID"', "15m") + " > 0",
        f"A sum was handed over on {_WHO} and is lost: its round is void.",
        "Look into the server's log for the reason. What the release has cost is spent.",
    ),
    Alert(
        "secagg-rounds",
        "SecaggInternalErrors",
        "warning",
        "",
        _grown(shared.REFUSED_CALLS, 'reason="INTERNAL"', "15m")
        + " > 0\n  or "
        + _grown(server.ROUND_FAILURES, 'reason="INTERNAL"', "15m")
        + " > 0",
        f"Something failed on {_WHO} for which there is no reason of its own.",
        "This is a bug, here or on the other side: keep the logs of both, and report it.",
    ),
    # Does somebody cheat?
    Alert(
        "secagg-trust",
        "SecaggUpdatesRefused",
        "warning",
        "",
        f"{_REFUSED} >= 3\n  and {_REFUSED} > 0.05 * {_grown(keyholder.VERDICTS, '', '1h')}",
        f"{_MANY} updates were refused for their norm on {_WHO} within an "
        "hour, more than one in twenty.",
        "One client over and over: it sends poison, or trains wrongly. Many clients: the clip norm "
        "is too small for the data. The audit log tells which, as keyed hashes.",
    ),
    Alert(
        "secagg-trust",
        "SecaggOffGrid",
        "warning",
        "",
        _grown(keyholder.AUDITS, 'finding="off_grid"', "15m") + " > 0",
        f"The noise audit on {_WHO} has found an upload that is no honest ciphertext.",
        "It is in no sum. Find its client in the audit log and revoke it, unless it runs another "
        "version.",
    ),
    Alert(
        "secagg-trust",
        "SecaggUploadsForged",
        "warning",
        "",
        _grown(keyholder.JUDGED, 'verdict!~"ACCEPTED|REVOKED"', "15m", "verdict") + " > 0",
        f"{_WHO} has refused uploads that the server had taken: {{{{ $labels.verdict }}}}.",
        "A client forges, or the server passes on what it should have refused. Compare the audit "
        "logs of both.",
    ),
    Alert(
        "secagg-trust",
        "SecaggReleaseRefused",
        "warning",
        "",
        _grown(keyholder.RELEASES, 'outcome="refused"', "15m") + " > 0",
        f"{_WHO} has refused to open a sum.",
        "Either an upload spoils the sum, which an audit then names, or the server asked for what "
        "it must not have. The key holder's log has the reason.",
    ),
    Alert(
        "secagg-trust",
        "SecaggStrangers",
        "warning",
        "",
        _grown(shared.REFUSED_CALLS, f'reason=~"{_STRANGERS}"', "15m", "reason") + " >= 20",
        f"{_MANY} calls to {_WHO} were refused in 15 minutes: {{{{ $labels.reason }}}}.",
        "A client with an old or a wrong kit that tries again and again, or somebody who tries "
        "whatever there is.",
    ),
    # What is running out?
    Alert(
        "secagg-budgets",
        "SecaggPrivacyBudgetLow",
        "warning",
        "",
        f"{server.PRIVACY_LEFT.prometheus} < 0.1\n  or {keyholder.PRIVACY_LEFT.prometheus} < 0.1",
        f"By the account of {_WHO}, {{{{ $value | humanizePercentage }}}} of a task's epsilon is "
        "left.",
        "Plan for its end: the task stops when no further release fits. `secagg-keyholder budget` "
        "says how many do.",
    ),
    Alert(
        "secagg-budgets",
        "SecaggAttemptsLow",
        "warning",
        "5m",
        f"{keyholder.ATTEMPTS_LEFT.prometheus} <= 2 and {keyholder.OPEN_ROUNDS.prometheus} > 0",
        f"{_WHO} allows {{{{ $value }}}} more attempts on the model of an open round.",
        "Find out why attempts are aborted before they are used up: the task fails with "
        "ROUND_CLOSED then.",
    ),
    # Is there room?
    Alert(
        "secagg-saturation",
        "SecaggOverloaded",
        "warning",
        "10m",
        f'sum by (job, instance) (rate({_REFUSED_CALLS}{{reason="OVERLOADED"}}[5m])) > 0',
        f"{_WHO} has been sending callers away for 10 minutes.",
        "They come back by themselves. If calls in flight stand at their limit, raise "
        "`max_in_flight` or find what holds calls up; if they do not, the disk is full.",
    ),
    Alert(
        "secagg-saturation",
        "SecaggWorkersBehind",
        "warning",
        "15m",
        f"{_slowest(shared.QUEUE_WAIT, '10m')} > 5",
        f"Calculations on {_WHO} wait {{{{ $value | humanizeDuration }}}} for a worker.",
        "Give it more cores and workers, or fewer and smaller rounds at a time.",
    ),
    Alert(
        "secagg-saturation",
        "SecaggDiskFills",
        "warning",
        "1h",
        f"predict_linear({_DISK}[6h], {_DAY}) < 0",
        f"The disk that takes uploads of {_WHO} will be full within a day.",
        "Make room, lower `retain_days`, or give it a larger disk.",
    ),
    Alert(
        "secagg-saturation",
        "SecaggDiskLow",
        "critical",
        "5m",
        f"{_DISK} < {_GIB}",
        f"{{{{ $value | humanize1024 }}}}B are left on the disk that takes uploads of {_WHO}.",
        "Make room now: uploads are refused when two more do not fit.",
    ),
    Alert(
        "secagg-saturation",
        "SecaggStoreFailing",
        "critical",
        "",
        _grown(server.STORE_FAILURES, "", "10m") + " > 0",
        f"The database of {_WHO} does not do its work.",
        "Its tasks pause and go on by themselves: mend the database or its disk.",
    ),
    Alert(
        "secagg-saturation",
        "SecaggStoreSlow",
        "warning",
        "15m",
        f"{_slowest(server.TRANSACTIONS, '10m', 'access')} > 1",
        f"A {{{{ $labels.access }}}} on {_WHO} takes {{{{ $value | humanizeDuration }}}}.",
        "Look at the disk below SQLite, or at PostgreSQL's own figures.",
    ),
)


class _Dumper(yaml.SafeDumper):
    """Text of several lines is written as such."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
_HEADER = """\
# Written by `python -m deploy.monitoring.generate` from deploy/monitoring/alerts.py; do not edit.
# What each alert means and what to do: docs/monitoring.md.
"""


def rules() -> str:
    """The file of rules."""
    groups = dict.fromkeys(alert.group for alert in ALERTS)
    found = [
        {"name": name, "rules": [alert.rule() for alert in ALERTS if alert.group == name]}
        for name in groups
    ]
    text = yaml.dump({"groups": found}, Dumper=_Dumper, sort_keys=False, width=10_000)
    return _HEADER + str(text)
