"""What travels between wrapper and mod, inside Flower's own messages.

A message to a node carries one more record, ``secagg``: the offer of a round, the verdict on the
last one, or a request for the node's public key. A node answers an offer with a ciphertext and
nothing else. It is an array of bytes in an `ArrayRecord`, because Flower cuts those into pieces
on their way; the bytes of a `ConfigRecord` would have to fit into one gRPC message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    ConfigRecordValues,
    ConfigScalar,
    Message,
    RecordDict,
)
from flwr.common.constant import ErrorCode

from secagg.errors import MalformedError, SecaggError, VersionError, by_reason

__all__ = [
    "RECORD",
    "Instruction",
    "ciphertext_of",
    "failure",
    "greeting",
    "public_key_of",
    "reason_of",
    "sealed",
]

RECORD = "secagg"
"""Name of our record in a message, and of the ciphertext's in a reply."""

_VERSION = 1
_UPLOAD = "upload"
_STYPE = "secagg.upload"  # the bytes as they are: nobody takes them for a numpy array
_PREFIX = "secagg: "
_FLOWER_CODES = {code: name for name, code in vars(ErrorCode).items() if name.isupper()}


@dataclass(frozen=True, slots=True)
class Instruction:
    """What the wrapper tells a node's mod.

    Attributes:
        offer: of a round, see `EmbeddedRound.offer`; empty for none.
        notice: the verdict on the node's last upload, see `EmbeddedRound.notice`; empty for none.
        hello: asks for the node's public key; its app is not called.
        model: name of the record that holds the model.
        examples: name of the metric that says how many examples a reply is based on; empty where
            all clients count the same.
        weight_cap: examples beyond which a client gains no more weight.
        bounds: of the metrics that are asked for, by name.
    """

    offer: bytes = field(default=b"", repr=False)
    notice: bytes = field(default=b"", repr=False)
    hello: bool = False
    model: str = ""
    examples: str = ""
    weight_cap: int = 1
    bounds: Mapping[str, float] = field(default_factory=dict)

    def to_record(self) -> ConfigRecord:
        """For a message. Holds nothing empty, which Flower's own mods cannot count the bytes of."""
        names = sorted(self.bounds)
        values: dict[str, ConfigRecordValues] = {
            "offer": self.offer,
            "notice": self.notice,
            "hello": self.hello,
            "model": self.model,
            "examples": self.examples,
            "weight-cap": self.weight_cap,
            "metrics": names,
            "bounds": [float(self.bounds[name]) for name in names],
        }
        return ConfigRecord({"version": _VERSION} | {k: v for k, v in values.items() if v})

    @classmethod
    def from_record(cls, record: ConfigRecord) -> Instruction:
        """From a message.

        Raises:
            VersionError: another version's.
            MalformedError: a value is not of its kind.
        """
        if record.get("version") != _VERSION:
            raise VersionError(
                f"expected version {_VERSION} of the secagg record; got "
                f"{record.get('version')!r}; install the same secagg on both sides"
            )
        try:
            return cls(
                _bytes(record.get("offer", b"")),
                _bytes(record.get("notice", b"")),
                record.get("hello", False) is True,
                _text(record.get("model", "")),
                _text(record.get("examples", "")),
                _count(record.get("weight-cap", 1)),
                _bounds(record.get("metrics", []), record.get("bounds", [])),
            )
        except (TypeError, ValueError):
            raise MalformedError(
                "expected a secagg record as SecureAggregation writes it; got another one"
            ) from None


def _bytes(value: ConfigRecordValues) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError
    return value


def _text(value: ConfigRecordValues) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _count(value: ConfigRecordValues) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError
    return value


def _bounds(given: ConfigRecordValues, values: ConfigRecordValues) -> dict[str, float]:
    if not isinstance(given, list) or not isinstance(values, list):
        raise TypeError
    names: list[ConfigScalar] = [*given]
    bounds: list[ConfigScalar] = [*values]
    return {_text(name): float(bound) for name, bound in zip(names, bounds, strict=True)}


def sealed(upload: bytes) -> RecordDict:
    """A reply that is a ciphertext.

    Args:
        upload: from `JoinedRound.encrypt`.
    """
    array = Array("uint8", (len(upload),), _STYPE, upload)
    return RecordDict({RECORD: ArrayRecord({_UPLOAD: array})})


def ciphertext_of(reply: Message) -> bytes:
    """The ciphertext of a reply.

    Raises:
        MalformedError: it holds none, or anything beside it.
    """
    record = reply.content.get(RECORD)
    if (
        len(reply.content) != 1
        or not isinstance(record, ArrayRecord)
        or list(record) != [_UPLOAD]
        or record[_UPLOAD].stype != _STYPE
    ):
        raise MalformedError(
            "expected a reply that is a ciphertext and nothing else; got another one; put "
            "secagg_mod first in ClientApp(mods=[secagg_mod])"
        )
    return record[_UPLOAD].data


def greeting(public_key: bytes, *, judges: bool) -> RecordDict:
    """A node's answer to hello.

    Args:
        public_key: its signing key, 32 bytes.
        judges: whether it keeps what it takes to check verdicts.
    """
    return RecordDict({RECORD: ConfigRecord({"client-key": public_key, "judges": judges})})


def public_key_of(reply: Message) -> tuple[bytes, bool]:
    """The public key in a node's answer to hello, and whether it checks verdicts.

    Raises:
        MalformedError: it holds none.
    """
    record = reply.content.get(RECORD)
    key = record.get("client-key") if isinstance(record, ConfigRecord) else None
    if not isinstance(record, ConfigRecord) or not isinstance(key, bytes):
        raise MalformedError(
            "expected a node's public key; got another reply; put secagg_mod first in "
            "ClientApp(mods=[secagg_mod])"
        )
    return key, record.get("judges") is True


def failure(error: SecaggError) -> str:
    """What a server is told of an error on a node: its code. The message stays on the node."""
    return _PREFIX + error.reason


def reason_of(reply: Message) -> str:
    """A code for an error reply, to count it by: ours or Flower's, never a text of the node's."""
    said = (reply.error.reason or "").removeprefix(_PREFIX)
    known = by_reason(said).reason
    return known if known == said else _FLOWER_CODES.get(reply.error.code, "UNKNOWN")
