"""What the key holder shows whenever somebody looks: read from its ledger, and kept nowhere."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from secagg.certificates import Kit
from secagg.enrolment import Roster
from secagg.instruments import Meter
from secagg.rpc import gauges
from secagg_keyholder.ledger import Ledger
from secagg_keyholder.metrics import ATTEMPTS_LEFT, OPEN_ROUNDS, PRIVACY_LEFT
from secagg_keyholder.policy import Policy

__all__ = ["RECENT", "watch"]

RECENT = timedelta(days=1)
"""How long a task counts after its newest round was opened."""


def watch(meter: Meter, ledger: Ledger, policy: Policy, roster: Roster, kit: Kit | None) -> None:
    """Show the key holder's open rounds and means; what the ledger does not tell is left out."""
    gauges.watch(meter, roster, kit)
    limit = policy.attempts_per_model
    meter.watch(OPEN_ROUNDS, lambda: len(ledger.open_rounds()))
    meter.watch(ATTEMPTS_LEFT, lambda: max(0, limit - ledger.most_attempts()))
    meter.watch(PRIVACY_LEFT, lambda: _least_left(ledger))


def _least_left(ledger: Ledger) -> float:
    # A task has no open round between two of them, and is over without a word.
    tasks = ledger.recent_tasks(datetime.now(UTC) - RECENT)
    return min((ledger.account(task).part_left for task in tasks), default=1.0)
