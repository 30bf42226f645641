"""The dashboards: what somebody on call looks at first, and then each service in full.

The overview is ordered by what is asked when something is wrong: is it ready, do rounds finish and
if not why, does somebody cheat, what is running out, is there room, what does cryptography cost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from grafana_foundation_sdk.builders import dashboard, stat, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from deploy.monitoring.panels import (
    BAD,
    DATASOURCE,
    FINE,
    QUIET,
    SO_SO,
    Query,
    Scope,
    bars,
    clouds,
    lines,
    number,
)
from secagg.instruments import Instrument
from secagg.rpc import metrics as shared
from secagg_keyholder import metrics as keyholder
from secagg_server import metrics as server

__all__ = ["dashboards"]

_DAY = 24 * 3600.0
_READY = {"1": ("ready", FINE), "0": ("NOT READY", BAD)}
_LEFT = [(0.1, SO_SO), (0.3, FINE)]
_OUTCOMES = {"DONE": FINE, "ABORTED": SO_SO, "VOID": BAD}
_JUDGED = {"accepted": FINE, "refused": BAD, "fine": FINE, "off_grid": BAD, "released": FINE}
_HALF, _MOST = 0.5, 0.95
# What every Python process shows, whatever it is.
_MEMORY, _CPU = "process_resident_memory_bytes", "process_cpu_seconds_total"
_FILES, _FILES_MOST = "process_open_fds", "process_max_fds"
_COLLECTIONS, _STARTED = "python_gc_collections_total", "process_start_time_seconds"

Panel = Builder[models.Panel]
Rows = Sequence[tuple[str, Sequence[Panel]]]

_SERVER = Scope('job=~"$server"')
_HOLDER = Scope('job=~"$keyholder"')
_BOTH = Scope('job=~"$server|$keyholder"')
_ONE = Scope('job=~"$job", instance=~"$instance"')


def _quantiles(scope: Scope, histogram: Instrument) -> list[Query]:
    return [
        Query(scope.quantile(_HALF, histogram), "p50"),
        Query(scope.quantile(_MOST, histogram), "p95"),
    ]


def _ready(title: str, scope: Scope, **looks: Any) -> stat.Panel:  # noqa: ANN401
    return number(
        title,
        Query(f"min({scope.gauge(shared.READY)})", "ready"),
        shared.READY,
        words=_READY,
        steps=[(1, FINE)],
        first=BAD,
        nothing="no answer",
        **looks,
    )


def _certificate(scope: Scope) -> stat.Panel:
    return number(
        "Certificate is valid for",
        Query(f"min({scope.gauge(shared.CERTIFICATE_EXPIRY)}) - time()", "valid for"),
        shared.CERTIFICATE_EXPIRY,
        steps=[(3 * _DAY, SO_SO), (21 * _DAY, FINE)],
        first=BAD,
        nothing="no TLS",
        decimals=0,
    )


def _privacy(scope: Scope, instrument: Instrument, legend: str) -> Query:
    return Query(f"min({scope.gauge(instrument)})", legend)


def _budget(scope: Scope, instrument: Instrument) -> timeseries.Panel:
    return lines(
        "Privacy budget left",
        [_privacy(scope, instrument, "left")],
        instrument,
        most=1.0,
        steps=[(0.1, BAD)],
        width=6,
        more="Below the line, SecaggPrivacyBudgetLow is raised.",
    )


def _failures(scope: Scope) -> timeseries.Panel:
    return bars(
        "Why attempts failed",
        [Query(f"{scope.grown(server.ROUND_FAILURES, 'reason')} > 0", "{{reason}}")],
        server.ROUND_FAILURES,
        more="What each reason means, and what to do: docs/errors.md.",
    )


def _outcomes(scope: Scope) -> timeseries.Panel:
    return bars(
        "Attempts at rounds that ended",
        [Query(scope.grown(server.ROUNDS, "outcome"), "{{outcome}}")],
        server.ROUNDS,
        colours=_OUTCOMES,
    )


def _open(scope: Scope) -> timeseries.Panel:
    return lines(
        "Rounds that are going on",
        [Query(f"sum by (state) ({scope.gauge(server.OPEN_ROUNDS)})", "{{state}}")],
        server.OPEN_ROUNDS,
        stacked=True,
    )


def _tasks(scope: Scope) -> timeseries.Panel:
    return lines(
        "Tasks",
        [Query(f"sum by (state) ({scope.gauge(server.TASKS)})", "{{state}}")],
        server.TASKS,
        colours={"RUNNING": QUIET, "FINISHED": FINE, "FAILED": BAD},
    )


def _phases(scope: Scope) -> timeseries.Panel:
    return lines(
        "Time in each state, on average",
        [Query(scope.mean(server.PHASES, "state"), "{{state}}")],
        server.PHASES,
    )


def _rejected(scope: Scope) -> timeseries.Panel:
    return bars(
        "Uploads that are in no sum",
        [Query(f"{scope.grown(server.REJECTED, 'reason')} > 0", "{{reason}}")],
        server.REJECTED,
        more="NORM_REFUSED and OFF_GRID are what poison looks like.",
    )


def _norms(scope: Scope) -> timeseries.Panel:
    return bars(
        "Norms that were judged",
        [Query(scope.grown(keyholder.VERDICTS, "verdict"), "{{verdict}}")],
        keyholder.VERDICTS,
        colours=_JUDGED,
    )


def _sums(scope: Scope) -> timeseries.Panel:
    return bars(
        "Sums that were asked for",
        [Query(scope.grown(keyholder.RELEASES, "outcome"), "{{outcome}}")],
        keyholder.RELEASES,
        colours={"released": FINE, "refused": BAD},
    )


def _attempts(scope: Scope) -> timeseries.Panel:
    return lines(
        "Attempts that are left",
        [Query(f"min({scope.gauge(keyholder.ATTEMPTS_LEFT)})", "attempts")],
        keyholder.ATTEMPTS_LEFT,
        steps=[(2, BAD)],
        more="Below the line, SecaggAttemptsLow is raised.",
    )


def _operations(scope: Scope) -> tuple[str, str]:
    """By what calculations are told apart, and what they are called."""
    if scope is _BOTH:
        return "job, operation", "{{job}} {{operation}}"
    return "operation", "{{operation}}"


def _calculations(scope: Scope) -> timeseries.Panel:
    by, legend = _operations(scope)
    return lines(
        "Cores that calculate",
        [Query(f"{scope.total(shared.OPERATIONS, by)} > 0", legend)],
        shared.OPERATIONS,
        unit="short",
        stacked=True,
        width=12,
        more="Seconds of calculation in each second, which is how many cores are busy with it.",
    )


def _calculation(scope: Scope) -> timeseries.Panel:
    by, legend = _operations(scope)
    return lines(
        "A calculation takes, on average",
        [Query(scope.mean(shared.OPERATIONS, by), legend)],
        shared.OPERATIONS,
        width=12,
    )


def _disk(scope: Scope) -> timeseries.Panel:
    return lines(
        "Room on the disk",
        [Query(f"min by (instance) ({scope.gauge(server.DISK_FREE)})", "{{instance}}")],
        server.DISK_FREE,
        steps=[(float(1 << 30), BAD)],
        more="Below the line, SecaggDiskLow is raised.",
    )


def _fill(scope: Scope) -> Panel:
    ratio = f"{scope.gauge(shared.CALLS_IN_FLIGHT)}\n  / {scope.gauge(shared.CALL_LIMIT)}"
    return lines(
        "Calls, of those that may be",
        [Query(ratio, "{{job}} {{instance}}")],
        shared.CALLS_IN_FLIGHT,
        shared.CALL_LIMIT,
        unit="percentunit",
        most=1.0,
        steps=[(0.9, BAD)],
    )


def _waiting(scope: Scope) -> timeseries.Panel:
    return lines(
        "Calculations that wait",
        [Query(f"sum by (job) ({scope.gauge(shared.QUEUE_DEPTH)})", "{{job}}")],
        shared.QUEUE_DEPTH,
    )


def _wait(scope: Scope) -> timeseries.Panel:
    return lines(
        "Wait for a worker, p95",
        [Query(scope.quantile(_MOST, shared.QUEUE_WAIT, "job"), "{{job}}")],
        shared.QUEUE_WAIT,
        steps=[(5, BAD)],
    )


def _overview() -> Rows:
    privacy = [
        _privacy(_SERVER, server.PRIVACY_LEFT, "by the server's account"),
        _privacy(_HOLDER, keyholder.PRIVACY_LEFT, "by the key holder's account"),
    ]
    return [
        (
            "Now",
            [
                _ready("Server", _SERVER),
                _ready("Key holder", _HOLDER),
                number(
                    "Alerts",
                    Query(
                        'count(ALERTS{alertname=~"Secagg.*", alertstate="firing"}) or vector(0)',
                        "alerts",
                    ),
                    steps=[(1, BAD)],
                    more="Alerts that are firing. What each means: docs/monitoring.md.",
                ),
                number(
                    "Rounds done",
                    Query(
                        _SERVER.grown(server.ROUNDS, where='outcome="DONE"', over="$__range"),
                        "done",
                    ),
                    server.ROUNDS,
                    first=QUIET,
                    decimals=0,
                    more="Those that are DONE, in the time that is shown.",
                ),
                number(
                    "Attempts failed",
                    Query(
                        _SERVER.grown(server.ROUNDS, where='outcome!="DONE"', over="$__range"),
                        "failed",
                    ),
                    server.ROUNDS,
                    steps=[(0.5, SO_SO)],
                    decimals=0,
                    more="Those that are not DONE, in the time that is shown.",
                ),
                number(
                    "Poison kept out",
                    Query(
                        _HOLDER.grown(
                            keyholder.VERDICTS, where='verdict="refused"', over="$__range"
                        ),
                        "refused",
                    ),
                    keyholder.VERDICTS,
                    steps=[(0.5, SO_SO)],
                    decimals=0,
                    more="Those that were refused, in the time that is shown.",
                ),
                number(
                    "Privacy budget left",
                    Query(
                        f"min({_SERVER.gauge(server.PRIVACY_LEFT)}\n"
                        f"  or {_HOLDER.gauge(keyholder.PRIVACY_LEFT)})",
                        "left",
                    ),
                    server.PRIVACY_LEFT,
                    steps=_LEFT,
                    first=BAD,
                    more="The smaller of what server and key holder count.",
                ),
                _certificate(_BOTH),
            ],
        ),
        (
            "Do rounds finish, and if not, why?",
            [
                _outcomes(_SERVER),
                _failures(_SERVER),
                _open(_SERVER),
                lines(
                    "How long rounds take",
                    _quantiles(_SERVER, server.ROUND_DURATION),
                    server.ROUND_DURATION,
                ),
                _phases(_SERVER),
                _tasks(_SERVER),
            ],
        ),
        (
            "Does somebody cheat?",
            [
                bars(
                    "Uploads that came in",
                    [Query(_SERVER.grown(server.ACCEPTED), "accepted")],
                    server.ACCEPTED,
                ),
                _rejected(_SERVER),
                _norms(_HOLDER),
            ],
        ),
        (
            "What is running out?",
            [
                lines(
                    "Privacy budget left",
                    privacy,
                    server.PRIVACY_LEFT,
                    most=1.0,
                    steps=[(0.1, BAD)],
                    more="Below the line, SecaggPrivacyBudgetLow is raised.",
                ),
                _attempts(_HOLDER),
                _sums(_HOLDER),
            ],
        ),
        ("Is there room?", [_fill(_BOTH), _wait(_BOTH), _disk(_SERVER)]),
        ("What does cryptography cost?", [_calculations(_BOTH), _calculation(_BOTH)]),
    ]


def _service() -> list[Panel]:
    """What is said of either service alone."""
    return [
        _ready("State", _ONE, width=4),
        number(
            "Version",
            Query(_ONE.gauge(shared.BUILD), "{{version}}"),
            shared.BUILD,
            first=QUIET,
            named=True,
            width=4,
        ),
        number(
            "Runs since",
            Query(f"time() - max({_ONE.of(_STARTED)})", "runs for"),
            unit="s",
            first=QUIET,
            more="How long the process runs.",
            width=3,
        ),
        _certificate(_ONE),
        number(
            "Clients enrolled",
            Query(f"max({_ONE.gauge(shared.ENROLLED)})", "clients"),
            shared.ENROLLED,
            first=QUIET,
        ),
        number(
            "Calls in a second",
            Query(_ONE.seen(shared.CALLS), "calls"),
            shared.CALLS,
            unit="reqps",
            first=QUIET,
        ),
        number(
            "Calls refused",
            Query(
                _ONE.grown(
                    shared.REFUSED_CALLS, where='reason!~"NOT_READY|ROUND_CLOSED"', over="$__range"
                ),
                "refused",
            ),
            shared.REFUSED_CALLS,
            steps=[(0.5, SO_SO)],
            decimals=0,
            more="In the time that is shown, without those that came too early or too late, which "
            "is how clients wait.",
            width=4,
        ),
    ]


def _work() -> Iterator[tuple[str, Sequence[Panel]]]:
    """Calls, calculations and the process of either service."""
    yield (
        "Calls",
        [
            lines(
                "Calls in a second",
                [Query(f"{_ONE.seen(shared.CALLS, 'rpc_method')} > 0", "{{rpc_method}}")],
                shared.CALLS,
                unit="reqps",
                stacked=True,
                width=6,
            ),
            lines(
                "How long calls take, p95",
                [
                    Query(
                        _ONE.quantile(_MOST, shared.CALLS, "rpc_method"),
                        "{{rpc_method}}",
                    )
                ],
                shared.CALLS,
                more="A call that asks what there is to do may wait for it.",
                width=6,
            ),
            lines(
                "Calls refused in a second",
                [Query(f"{_ONE.rate(shared.REFUSED_CALLS, 'reason')} > 0", "{{reason}}")],
                shared.REFUSED_CALLS,
                unit="reqps",
                stacked=True,
                width=6,
                more="NOT_READY and ROUND_CLOSED are how clients wait.",
            ),
            lines(
                "Calls that are worked on",
                [
                    Query(_ONE.gauge(shared.CALLS_IN_FLIGHT), "{{instance}}"),
                    Query(_ONE.gauge(shared.CALL_LIMIT), "limit of {{instance}}"),
                ],
                shared.CALLS_IN_FLIGHT,
                shared.CALL_LIMIT,
                width=6,
            ),
        ],
    )
    yield (
        "Calculations",
        [
            _calculations(_ONE),
            _calculation(_ONE),
            lines(
                "A calculation takes, p95",
                [
                    Query(
                        _ONE.quantile(_MOST, shared.OPERATIONS, "operation"),
                        "{{operation}}",
                    )
                ],
                shared.OPERATIONS,
            ),
            _waiting(_ONE),
            _wait(_ONE),
        ],
    )
    yield (
        "Process",
        [
            lines(
                "Memory",
                [Query(_ONE.of(_MEMORY), "{{instance}}")],
                unit="bytes",
                more="Memory of the process, without its workers.",
                width=6,
            ),
            lines(
                "Cores in use",
                [Query(f"rate({_ONE.of(_CPU)}[$__rate_interval])", "{{instance}}")],
                unit="short",
                more="CPU seconds in a second, without those of its workers.",
                width=6,
            ),
            lines(
                "Open files",
                [
                    Query(_ONE.of(_FILES), "{{instance}}"),
                    Query(_ONE.of(_FILES_MOST), "limit of {{instance}}"),
                ],
                unit="short",
                more="Files and connections that the process holds open, and its limit.",
                width=6,
            ),
            lines(
                "Garbage collections in a second",
                [
                    Query(
                        f"rate({_ONE.of(_COLLECTIONS)}[$__rate_interval])",
                        "generation {{generation}}",
                    )
                ],
                unit="ops",
                more="Python's, by generation.",
                width=6,
            ),
        ],
    )


def _server() -> Rows:
    rounds: list[Panel] = [
        _outcomes(_ONE),
        _failures(_ONE),
        _open(_ONE),
        clouds("How long rounds take", _ONE, server.ROUND_DURATION),
        lines(
            "Time in each state, p95",
            [Query(_ONE.quantile(_MOST, server.PHASES, "state"), "{{state}}")],
            server.PHASES,
        ),
        _phases(_ONE),
        lines(
            "How long judging takes",
            _quantiles(_ONE, server.VERDICTS),
            server.VERDICTS,
            width=6,
        ),
        clouds(
            "Noise headroom of sums",
            _ONE,
            server.HEADROOM,
            more="Zero is a round as full as its plan allows.",
            width=6,
        ),
        _budget(_ONE, server.PRIVACY_LEFT),
        _tasks(_ONE).span(6),
    ]
    uploads: list[Panel] = [
        bars(
            "Uploads that came in",
            [Query(_ONE.grown(server.ACCEPTED), "accepted")],
            server.ACCEPTED,
        ),
        _rejected(_ONE),
        lines(
            "Bytes in a second",
            [
                Query(_ONE.rate(server.BYTES_IN), "ciphertext received"),
                Query(_ONE.rate(server.BYTES_OUT), "models sent"),
            ],
            server.BYTES_IN,
            server.BYTES_OUT,
            unit="Bps",
        ),
    ]
    store: list[Panel] = [
        lines(
            "Transactions in a second",
            [Query(_ONE.seen(server.TRANSACTIONS, "access"), "{{access}}")],
            server.TRANSACTIONS,
            unit="ops",
            width=6,
        ),
        lines(
            "How long transactions take, p95",
            [
                Query(
                    _ONE.quantile(_MOST, server.TRANSACTIONS, "access"),
                    "{{access}}",
                )
            ],
            server.TRANSACTIONS,
            steps=[(1, BAD)],
            width=6,
        ),
        bars(
            "Transactions that failed",
            [Query(_ONE.grown(server.STORE_FAILURES), "failed")],
            server.STORE_FAILURES,
            colours={"failed": BAD},
            width=6,
        ),
        _disk(_ONE).span(6),
    ]
    return [
        ("Service", [*_service()]),
        ("Rounds", rounds),
        ("Uploads", uploads),
        ("Store", store),
        *_work(),
    ]


def _key_holder() -> Rows:
    judged: list[Panel] = [
        bars(
            "Receipts and seals that were judged",
            [Query(f"{_ONE.grown(keyholder.JUDGED, 'verdict')} > 0", "{{verdict}}")],
            keyholder.JUDGED,
            colours={"ACCEPTED": FINE},
        ),
        _norms(_ONE),
        bars(
            "Uploads that were audited",
            [Query(_ONE.grown(keyholder.AUDITS, "finding"), "{{finding}}")],
            keyholder.AUDITS,
            colours=_JUDGED,
        ),
    ]
    budgets: list[Panel] = [
        _sums(_ONE),
        lines(
            "Rounds whose key is here",
            [Query(_ONE.gauge(keyholder.OPEN_ROUNDS), "{{instance}}")],
            keyholder.OPEN_ROUNDS,
            width=4,
        ),
        _attempts(_ONE).span(6),
        _budget(_ONE, keyholder.PRIVACY_LEFT),
    ]
    return [
        ("Service", [*_service()]),
        ("Does somebody cheat?", judged),
        ("Sums and budgets", budgets),
        *_work(),
    ]


def _jobs(name: str, label: str, metric: Instrument, said: str) -> dashboard.QueryVariable:
    """The jobs that scrape a service, known by a metric that only it has."""
    return _found(name, label, f"label_values({metric.prometheus}, job)", said)


def _found(name: str, label: str, query: str, said: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .description(said)
        .datasource(DATASOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(models.VariableOption(text="All", value="$__all"))
    )


def _of_one(metric: Instrument) -> list[Builder[models.VariableModel]]:
    return [
        _jobs("job", "Job", metric, "The job that scrapes the service."),
        _found(
            "instance",
            "Instance",
            f'label_values({metric.prometheus}{{job=~"$job"}}, instance)',
            "The service's address, as it is scraped.",
        ),
    ]


_ANY_SERVER, _ANY_HOLDER = server.ROUNDS, keyholder.RELEASES


def _dashboard(
    uid: str,
    title: str,
    said: str,
    variables: Sequence[Builder[models.VariableModel]],
    rows: Rows,
) -> dashboard.Dashboard:
    source = (
        dashboard.DatasourceVariable("datasource")
        .label("Prometheus")
        .type("prometheus")
        .current(models.VariableOption(text="default", value="default"))
    )
    board = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(said)
        .tags(["secagg"])
        .readonly()
        .time("now-3h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .variables([source, *variables])
        .link(
            dashboard.DashboardLink("secagg")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["secagg"])
            .keep_time(True)
        )
    )
    identifier = 0
    for name, panels in rows:
        identifier += 1
        board.with_row(dashboard.Row(name).id(identifier))
        for panel in panels:
            identifier += 1
            panel.build().id_val = identifier
            board.with_panel(panel)
    return board


def dashboards() -> dict[str, dict[str, Any]]:
    """Each dashboard as Grafana reads it, by the name of its file."""
    boards = {
        "overview.json": _dashboard(
            "secagg-overview",
            "secagg: overview",
            "Is it ready, do rounds finish, does somebody cheat, what is running out.",
            [
                _jobs("server", "Server", _ANY_SERVER, "The job that scrapes the server."),
                _jobs(
                    "keyholder", "Key holder", _ANY_HOLDER, "The job that scrapes the key holder."
                ),
            ],
            _overview(),
        ),
        "server.json": _dashboard(
            "secagg-server",
            "secagg: server",
            "Rounds, uploads, calls, calculations and the store of a server.",
            _of_one(_ANY_SERVER),
            _server(),
        ),
        "keyholder.json": _dashboard(
            "secagg-keyholder",
            "secagg: key holder",
            "What a key holder has judged and opened, and what it allows yet.",
            _of_one(_ANY_HOLDER),
            _key_holder(),
        ),
    }
    return {
        name: json.loads(json.dumps(board.build(), cls=JSONEncoder))
        for name, board in boards.items()
    }
