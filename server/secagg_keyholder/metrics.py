"""What the key holder measures; see `secagg.instruments` for what may be in this list.

Nothing here says how far off a sum or an upload was: whoever can ask for noise can learn keys.
"""

from __future__ import annotations

from secagg.instruments import Instrument, Kind
from secagg.rpc import metrics as shared
from secagg.rpc.metrics import REASONS
from secagg.wire.v1 import key_holder_service_pb2

__all__ = [
    "ATTEMPTS_LEFT",
    "AUDITS",
    "JUDGED",
    "METRICS",
    "OPEN_ROUNDS",
    "PRIVACY_LEFT",
    "RELEASES",
    "VERDICTS",
]

_METHODS = [
    method.name
    for method in key_holder_service_pb2.DESCRIPTOR.services_by_name["KeyHolderService"].methods
]

OPEN_ROUNDS = Instrument(
    "secagg.keyholder.rounds.open",
    Kind.GAUGE,
    "{round}",
    "Rounds whose key is on this disk.",
)
JUDGED = Instrument(
    "secagg.keyholder.uploads.judged",
    Kind.COUNTER,
    "{upload}",
    "Uploads whose receipt and seal were judged: ACCEPTED, or the reason of refusal.",
    {"verdict": ("ACCEPTED", *REASONS)},
)
VERDICTS = Instrument(
    "secagg.keyholder.norms.judged",
    Kind.COUNTER,
    "{upload}",
    "Uploads whose norm was judged by an encrypted sketch.",
    {"verdict": ("accepted", "refused")},
)
AUDITS = Instrument(
    "secagg.keyholder.noise.audited",
    Kind.COUNTER,
    "{upload}",
    "Uploads that were audited after their sum did not open.",
    {"finding": ("fine", "off_grid")},
)
RELEASES = Instrument(
    "secagg.keyholder.releases",
    Kind.COUNTER,
    "{sum}",
    "Sums that were asked for: released once, or refused.",
    {"outcome": ("released", "refused")},
)
ATTEMPTS_LEFT = Instrument(
    "secagg.keyholder.attempts.remaining",
    Kind.GAUGE,
    "{attempt}",
    "Attempts that are left to the open round whose model has the fewest; the policy's number if "
    "none is open.",
)
PRIVACY_LEFT = Instrument(
    "secagg.keyholder.privacy.budget.remaining",
    Kind.GAUGE,
    "1",
    "By its own account, the part of its epsilon that is left to the task with the least, among "
    "those with a round in the last 24 hours; 1 if none has a budget.",
)

METRICS = (
    shared.BUILD,
    shared.READY,
    shared.CERTIFICATE_EXPIRY,
    shared.ENROLLED,
    OPEN_ROUNDS,
    JUDGED,
    VERDICTS,
    AUDITS,
    RELEASES,
    ATTEMPTS_LEFT,
    PRIVACY_LEFT,
    shared.OPERATIONS.narrowed(
        "make_key", "open_seals", "judge_sketch", "check_sum", "open_sum", "audit_upload"
    ),
    shared.QUEUE_DEPTH,
    shared.QUEUE_WAIT,
    shared.CALLS.narrowed(*_METHODS),
    shared.REFUSED_CALLS,
    shared.CALLS_IN_FLIGHT,
    shared.CALL_LIMIT,
)
"""All of it, in the order of the reference page."""
