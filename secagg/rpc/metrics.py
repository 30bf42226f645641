"""What both services measure alike: their calls, their workers, and that they are there at all."""

from __future__ import annotations

from importlib.metadata import version

from secagg.errors import reasons
from secagg.instruments import OTHER, Instrument, Kind

__all__ = [
    "BUILD",
    "CALLS",
    "CALLS_IN_FLIGHT",
    "CALL_LIMIT",
    "CERTIFICATE_EXPIRY",
    "DEADLINE_OR_CANCELLED",
    "ENROLLED",
    "OPERATIONS",
    "QUEUE_DEPTH",
    "QUEUE_WAIT",
    "READY",
    "REASONS",
    "REFUSED_CALLS",
    "SECONDS",
]

SECONDS = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Bounds of buckets, from an upload's header to the sum of a large model."""

REASONS = (*reasons(), OTHER)
"""Why a call, an upload or a round may fail: what travels on the wire."""

DEADLINE_OR_CANCELLED = "DEADLINE_OR_CANCELLED"
"""Why a call ended that took too long, or whose caller has gone."""

BUILD = Instrument(
    "secagg.build.info",
    Kind.GAUGE,
    "",
    "Always 1; its label is the version that runs.",
    {"version": (version("secagg"),)},
)
READY = Instrument(
    "secagg.ready",
    Kind.GAUGE,
    "",
    "1 while the service is ready, 0 while it is not.",
)
CERTIFICATE_EXPIRY = Instrument(
    "secagg.certificate.expiry.timestamp",
    Kind.GAUGE,
    "s",
    "When the service's own certificate expires, in seconds since 1970.",
)
ENROLLED = Instrument(
    "secagg.enrolled.clients",
    Kind.GAUGE,
    "{client}",
    "Clients that may take part.",
)
CALLS = Instrument(
    "rpc.server.call.duration",
    Kind.HISTOGRAM,
    "s",
    "How long calls took, refused ones included.",
    {"rpc.method": ()},
    SECONDS,
)
REFUSED_CALLS = Instrument(
    "secagg.calls.refused",
    Kind.COUNTER,
    "{call}",
    "Calls that ended with an error, by reason.",
    {"reason": (*REASONS, DEADLINE_OR_CANCELLED)},
)
CALLS_IN_FLIGHT = Instrument(
    "secagg.calls.in_flight",
    Kind.GAUGE,
    "{call}",
    "Calls that are worked on now.",
)
CALL_LIMIT = Instrument(
    "secagg.calls.limit",
    Kind.GAUGE,
    "{call}",
    "Calls that may be worked on at once; those beyond are told to come back.",
)
OPERATIONS = Instrument(
    "secagg.crypto.operation.duration",
    Kind.HISTOGRAM,
    "s",
    "How long calculations on ciphertexts and keys took, by operation, without waiting; in worker "
    "processes, those that came to a result.",
    {"operation": ()},
    SECONDS,
)
QUEUE_DEPTH = Instrument(
    "secagg.workers.queue.depth",
    Kind.GAUGE,
    "{calculation}",
    "Calculations that wait for a worker process or are with one.",
)
QUEUE_WAIT = Instrument(
    "secagg.workers.queue.wait",
    Kind.HISTOGRAM,
    "s",
    "How long calculations waited for a worker process.",
    {},
    SECONDS,
)
