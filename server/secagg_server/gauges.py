"""What the server shows whenever somebody looks: read from where it is true, and kept nowhere."""

from __future__ import annotations

from secagg.certificates import Kit
from secagg.enrolment import Roster
from secagg.instruments import Meter
from secagg.rpc import gauges
from secagg_server.blobs import BlobStore
from secagg_server.metrics import DISK_FREE, OPEN_ROUNDS, PRIVACY_LEFT, TASKS
from secagg_server.spending import part_left
from secagg_server.store import Store

__all__ = ["watch"]


def watch(meter: Meter, store: Store, blobs: BlobStore, roster: Roster, kit: Kit | None) -> None:
    """Show the server's tasks, rounds and means; what a database does not tell is left out."""
    gauges.watch(meter, roster, kit)
    meter.watch(TASKS, store.tasks_by_state)
    meter.watch(OPEN_ROUNDS, store.open_rounds_by_state)
    meter.watch(PRIVACY_LEFT, lambda: _least_left(store))
    meter.watch(DISK_FREE, blobs.free_bytes)


def _least_left(store: Store) -> float:
    return min((part_left(row.task_spec(), row) for row in store.running_tasks()), default=1.0)
