"""What the server measures; see `secagg.instruments` for what may be in this list, and what not."""

from __future__ import annotations

from secagg.instruments import Instrument, Kind
from secagg.rpc import metrics as shared
from secagg.rpc.metrics import REASONS, SECONDS
from secagg.wire.v1 import aggregation_service_pb2, operator_service_pb2
from secagg_server.states import FINAL, RoundState, TaskState

__all__ = [
    "ACCEPTED",
    "BYTES_IN",
    "BYTES_OUT",
    "DISK_FREE",
    "HEADROOM",
    "METRICS",
    "OPEN_ROUNDS",
    "PHASES",
    "PRIVACY_LEFT",
    "REJECTED",
    "ROUNDS",
    "ROUND_DURATION",
    "ROUND_FAILURES",
    "STORE_FAILURES",
    "TASKS",
    "TRANSACTIONS",
    "VERDICTS",
]

_METHODS = [
    method.name
    for file, service in (
        (aggregation_service_pb2, "AggregationService"),
        (operator_service_pb2, "OperatorService"),
    )
    for method in file.DESCRIPTOR.services_by_name[service].methods
]

TASKS = Instrument(
    "secagg.tasks",
    Kind.GAUGE,
    "{task}",
    "Tasks on record, by state.",
    {"state": tuple(TaskState)},
)
OPEN_ROUNDS = Instrument(
    "secagg.rounds.open",
    Kind.GAUGE,
    "{round}",
    "Attempts at rounds of running tasks that are going on, by state.",
    {"state": tuple(state for state in RoundState if state not in FINAL)},
)
ROUNDS = Instrument(
    "secagg.rounds",
    Kind.COUNTER,
    "{attempt}",
    "Attempts at rounds that have ended: DONE, or ABORTED and perhaps tried again, or VOID: its "
    "sum was handed over and is lost.",
    {"outcome": ("DONE", "ABORTED", "VOID")},
)
ROUND_FAILURES = Instrument(
    "secagg.rounds.failed",
    Kind.COUNTER,
    "{attempt}",
    "Attempts at rounds that ended without a release, by reason; ABORTED by the operator.",
    {"reason": ("ABORTED", *REASONS)},
)
ROUND_DURATION = Instrument(
    "secagg.round.duration",
    Kind.HISTOGRAM,
    "s",
    "From opening to release, of rounds that are done and were not interrupted by a restart.",
    {},
    (1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0, 86400.0),
)
PHASES = Instrument(
    "secagg.round.phase.duration",
    Kind.HISTOGRAM,
    "s",
    "How long rounds were in a state, whatever came after it; collecting is mostly waiting for "
    "clients.",
    {"state": ("COLLECTING", "CHECKING", "SUMMING", "RELEASING", "AUDITING")},
    SECONDS,
)
ACCEPTED = Instrument(
    "secagg.uploads.accepted",
    Kind.COUNTER,
    "{upload}",
    "Uploads that came in whole, before the key holder judged them.",
)
REJECTED = Instrument(
    "secagg.uploads.rejected",
    Kind.COUNTER,
    "{upload}",
    "Refusals of uploads, by reason, each once an upload: as it came, when it was judged or "
    "audited, or withdrawn by the client itself.",
    {"reason": (*REASONS, "WITHDRAWN")},
)
BYTES_IN = Instrument(
    "secagg.uploads.received",
    Kind.COUNTER,
    "By",
    "Ciphertext that was received and stored; a chunk that comes again counts once.",
)
BYTES_OUT = Instrument(
    "secagg.models.sent",
    Kind.COUNTER,
    "By",
    "Model parameters that were sent to clients, as often as they asked.",
)
VERDICTS = Instrument(
    "secagg.verdict.duration",
    Kind.HISTOGRAM,
    "s",
    "From the end of collecting until every upload of the round is judged.",
    {},
    SECONDS,
)
HEADROOM = Instrument(
    "secagg.noise.headroom",
    Kind.HISTOGRAM,
    "{bit}",
    "Bits by which the noise that released sums can have is below what plans guard against, "
    "computed from the number of contributors: measured noise would say something about the key.",
    {},
    (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0),
)
PRIVACY_LEFT = Instrument(
    "secagg.privacy.budget.remaining",
    Kind.GAUGE,
    "1",
    "The part of its epsilon that is left to the running task with the least; 1 if none has a "
    "budget.",
)
DISK_FREE = Instrument(
    "secagg.disk.free",
    Kind.GAUGE,
    "By",
    "Room on the disk that takes uploads.",
)
TRANSACTIONS = Instrument(
    "secagg.store.transaction.duration",
    Kind.HISTOGRAM,
    "s",
    "How long transactions took, with what they waited for one another, whether done or not.",
    {"access": ("read", "write")},
    SECONDS,
)
STORE_FAILURES = Instrument(
    "secagg.store.failures",
    Kind.COUNTER,
    "{transaction}",
    "Transactions that the database did not do.",
)

METRICS = (
    shared.BUILD,
    shared.READY,
    shared.CERTIFICATE_EXPIRY,
    shared.ENROLLED,
    TASKS,
    ROUNDS,
    ROUND_FAILURES,
    OPEN_ROUNDS,
    ROUND_DURATION,
    PHASES,
    ACCEPTED,
    REJECTED,
    BYTES_IN,
    BYTES_OUT,
    VERDICTS,
    HEADROOM,
    PRIVACY_LEFT,
    shared.OPERATIONS.narrowed("validate", "add", "sketch", "low_bits"),
    shared.QUEUE_DEPTH,
    shared.QUEUE_WAIT,
    shared.CALLS.narrowed(*_METHODS),
    shared.REFUSED_CALLS,
    shared.CALLS_IN_FLIGHT,
    shared.CALL_LIMIT,
    TRANSACTIONS,
    STORE_FAILURES,
    DISK_FREE,
)
"""All of it, in the order of the reference page."""
