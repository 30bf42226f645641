"""Fuzz target: what comes in through another framework: Flower's records, and uploads as bytes."""

from __future__ import annotations

import atexit
import io
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import cohort
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from fuzz_inputs import Choices, Target, refusable
from fuzz_protobuf import mutated
from fuzz_wire import round_of
from numpy.lib import format as npy

from secagg.challenger import Challenger
from secagg.endorsement import Endorsement
from secagg.enrolment import OpenEnrolment
from secagg.errors import (
    ClosedError,
    ConfigurationError,
    InputError,
    MalformedError,
    UploadError,
    VersionError,
)
from secagg.flower.arrays import as_received, difference, moved, tensors_of
from secagg.flower.envelopes import (
    RECORD,
    Instruction,
    ciphertext_of,
    greeting,
    public_key_of,
    reason_of,
    sealed,
)
from secagg.flower.metrics import Metrics
from secagg.wire import codec
from secagg.wire.v1 import round_pb2
from secagg_server.blobs import BlobStore
from secagg_server.embedded import EmbeddedRound

__all__ = ["FRAMEWORKS"]

_KEYS = (
    *("version", "offer", "notice", "hello", "model", "examples", "weight-cap", "metrics"),
    *("bounds", "client-key", "judges", "x"),
)


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="secagg-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _uploads() -> tuple[Any, list[bytes]]:
    context = round_of(cohort.counts_plan(max_clients=3))
    uploads = [cohort.noise_upload(context, index) for index in range(4)]
    uploads.append(cohort.noise_upload(context, 0, nonce=1))
    return context, [codec.upload_to_bytes(upload) for upload in uploads]


def _added(choices: Choices) -> None:
    """Uploads to an embedded round; whatever it takes is signed, and once a client's."""
    context, uploads = _uploads()
    blobs = BlobStore(_folder() / "blobs")
    server = SimpleNamespace(roster=OpenEnrolment(), _blobs=blobs)
    challenger: Challenger | None = None
    endorsed = Endorsement(bytes(32), bytes(64))
    current = EmbeddedRound(server, context, endorsed, challenger, None)  # type: ignore[arg-type]
    taken = set()
    try:
        for _ in range(4):
            if not choices.left:
                break
            data = choices.pick(uploads)
            kind = choices.number(3)
            if kind == 1:
                data = choices.altered(data)
            elif kind == 2:
                data = _other_fields(data, choices.number(1 << 16))
            with refusable(UploadError, ClosedError):
                taken.add(current.add(data))
                codec.upload_from_bytes(data, context.plan).validate(context)
        assert current.uploads == len(taken) <= context.plan.max_clients
    finally:
        blobs.drop_uploads("task")


def _other_fields(data: bytes, seed: int) -> bytes:
    message = codec.parse(round_pb2.WholeUpload, data)
    return mutated(message, Random(seed)).SerializeToString(deterministic=True)


def _value(choices: Choices) -> Any:  # noqa: ANN401 - whatever a record takes
    kind = choices.number(8)
    if kind == 0:
        return choices.number(1 << 62) - (1 << 61)
    if kind == 1:
        return float(np.frombuffer(choices.taken(8).ljust(8, b"\0"), "<f8")[0])
    if kind == 2:
        return choices.taken(choices.number(40)).decode("latin-1")
    if kind == 3:
        return choices.taken(choices.number(80))
    if kind == 4:
        return choices.flip()
    items = [1, 2.5, "a", b"b", True][choices.number(5)]
    return [items] * choices.number(4)


def _record(choices: Choices) -> ConfigRecord:
    """A record as it should be, with some values that should not."""
    known = Instruction(b"offer", b"notice", True, "model", "n", 5, {"loss": 2.0, "hits": 1.0})
    record = known.to_record() if choices.flip() else greeting(bytes(32), judges=True)[RECORD]
    values = dict(record)  # type: ignore[arg-type]  # a config record both times
    for _ in range(choices.number(4)):
        key = choices.pick(_KEYS)
        if choices.flip():
            values.pop(key, None)
        else:
            values[key] = _value(choices)
    return ConfigRecord(values)


def _instructed(choices: Choices) -> None:
    with refusable(MalformedError, VersionError, ConfigurationError):
        instruction = Instruction.from_record(_record(choices))
        metrics = Metrics(instruction.bounds, bool(instruction.examples))
        assert instruction.weight_cap >= 1
        assert metrics.size <= len(instruction.bounds) + 1
        segment = metrics.segment(9) if metrics.size else None
        if segment is not None:
            with refusable(InputError):
                values = {name: _value(choices) for name in instruction.bounds}
                encoded = metrics.encode(values, 0.5, segment)
                assert np.abs(encoded).max() <= segment.max_abs


def _replied(choices: Choices) -> None:
    """A node's answer: a ciphertext, a greeting, or neither."""
    array = Array(
        choices.pick(("uint8", "float32", "", "x")),
        (choices.number(9),) * choices.number(3),
        choices.pick(("secagg.upload", "numpy.ndarray", "")),
        choices.taken(choices.number(64)),
    )
    content = choices.pick(
        (
            sealed(b"upload"),
            RecordDict({RECORD: ArrayRecord({choices.pick(("upload", "x")): array})}),
            RecordDict({choices.pick((RECORD, "y")): _record(choices)}),
        )
    )
    text = choices.taken(choices.number(40)).decode("latin-1")
    error = SimpleNamespace(code=choices.number(300), reason=text)
    # Outside a run of Flower's nobody can make a message of its own kind.
    reply: Any = SimpleNamespace(content=content, error=error)
    with refusable(MalformedError):
        assert isinstance(ciphertext_of(reply), bytes)
    with refusable(MalformedError):
        assert isinstance(public_key_of(reply)[0], bytes)
    assert reason_of(reply).isupper()


def _modelled(choices: Choices) -> None:
    """A model from a server, with arrays that are not what they seem; and what training made."""
    received, trained = _arrays(choices), _arrays(choices)
    with refusable(InputError, ConfigurationError):
        tensors = tensors_of(received)
        mean = {name: np.zeros(array.shape) for name, array in tensors.items()}
        assert moved(received, mean).keys() == received.keys()
    with refusable(InputError, ConfigurationError):
        difference(received, trained)
    with refusable(InputError, ConfigurationError):
        assert as_received(received, trained).keys() == trained.keys()


def _arrays(choices: Choices) -> ArrayRecord:
    made = {"a": np.ones((2, 2), np.float32), "b": np.arange(3), "c": np.ones(4, np.float16)}
    found = {}
    for name, array in made.items():
        file = io.BytesIO()
        npy.write_array(file, array)
        data = choices.altered(file.getvalue())
        kind = choices.pick(("numpy.ndarray", "numpy.ndarray", "other"))
        key = name if choices.number(8) else choices.taken(4).decode("latin-1")
        found[key] = Array(str(array.dtype), array.shape, kind, data)
    return ArrayRecord(found)


# Inputs that are kept count on these places: new ones go to the end.
_KINDS: tuple[Callable[[Choices], None], ...] = (_added, _instructed, _replied, _modelled)
_PLACE = {kind: index for index, kind in enumerate(_KINDS)}


def _one(data: bytes) -> None:
    choices = Choices(data)
    choices.pick(_KINDS)(choices)


def _seeds() -> dict[str, bytes]:
    def seed(kind: Callable[..., None], *decisions: int) -> bytes:
        return bytes([_PLACE[kind], *decisions])

    whole = (0, 0, 1) * 3  # each array as it is, numpy's, under its own name
    return {
        "a cohort": seed(_added, 0, 0, 1, 0, 2, 0, 3, 0),
        "another upload of a client": seed(_added, 0, 0, 4, 0),
        "an upload changed": seed(_added, 0, 1, 1, 50, 0, 3, 0, 7),
        "fields changed": seed(_added, 0, 2, 9, 9, 1, 2, 1, 1),
        "an instruction": seed(_instructed, 1, 0),
        "an instruction changed": seed(_instructed, 1, 2, 6, 0, 0, 5, 0, 0, 0, 0, 0, 0, 8, 0, 5),
        "an answer": seed(_replied, 0, 1, 1, 0, 2, 9, 9, 0),
        "a greeting": seed(_replied, 0, 1, 1, 0, 2, 9, 9, 2, 0, 0, 0),
        "a model": seed(_modelled, *whole, *whole),
        "a model changed": seed(_modelled, 1, 9, 3, 0, 7, *whole[1:], *whole),
    }


FRAMEWORKS = Target(
    "frameworks",
    "uploads as bytes; Flower's records: instructions, greetings, ciphertexts, models",
    ("EmbeddedRound.add", "Instruction.from_record", "ciphertext_of", "tensors_of", "Metrics"),
    _one,
    _seeds,
    prepare=_uploads,
)
