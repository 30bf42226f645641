"""Fuzz target: what the server sends to the key holder, over a real ledger and real round keys.

An input is a program: calls in any order, each made of real uploads, sums, low bits or sketches,
and then changed. Whatever is released must be the exact sum over its manifest, and only one sum a
round.
"""

from __future__ import annotations

import atexit
import itertools
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import cohort
import numpy as np
from fuzz_inputs import Choices, Target, refusable
from fuzz_server import Loop, changed
from key_holders import durable_rounds
from numpy.typing import NDArray

from secagg.challenges import commitment
from secagg.context import RoundContext
from secagg.errors import ConfigurationError, IdentityError, RoundError, UploadError
from secagg.noise_audit import dithered, low_to_bytes
from secagg.parameters import NormCheck, Plan
from secagg.receipts import NO_COMMITMENT
from secagg.residues import ResidueSum, folded, narrow, widen
from secagg.sampling import Stream
from secagg.sketches import sketch
from secagg.upload import Upload
from secagg.wire import codec
from secagg.wire.v1 import key_holder_service_pb2 as pb
from secagg_keyholder.service import KeyHolderService

__all__ = ["KEY_HOLDER"]

_MOST_CALLS = 8
_CHALLENGE = bytes(32)
_CLIENTS = 4
_PIECES = (1 << 20, 1 << 16, 4096)
_REFUSALS = (UploadError, IdentityError, RoundError, ConfigurationError)


@dataclass(frozen=True)
class _Scene:
    """A round in a key holder's folder, up to a moment, and everything a server has of it."""

    folder: Path
    context: RoundContext
    uploads: list[Upload]
    off_grid: Upload
    sketches: dict[bytes, bytes]

    @property
    def plan(self) -> Plan:
        return self.context.plan

    def summed(self, members: Sequence[Upload]) -> NDArray[np.uint64]:
        """The sum of some uploads' ciphertexts."""
        running = ResidueSum(self.plan.blocks)
        for upload in members:
            running.add(widen(upload.payload, self.plan.blocks))
        return folded(running.value(), self.plan.sum_blocks)


@dataclass
class _World:
    """A key holder that has just started with a scene's folder."""

    scene: _Scene
    service: KeyHolderService
    released: set[tuple[bytes, int]] = field(default_factory=set)


def _scene(name: str, plan: Plan, until: int) -> _Scene:
    folder = _scratch() / name
    rounds = durable_rounds(folder, identity=cohort.identity(90))
    context, _ = rounds.open(plan, "task", 1, 1, bytes(32))
    asked = b"" if plan.norm_check is None else commitment(_CHALLENGE)
    uploads = [cohort.encrypted(context, n, asked or NO_COMMITMENT) for n in range(_CLIENTS)]
    off_grid = uploads[0] if asked else cohort.off_grid(context, _CLIENTS)
    if until > 0:
        judged = [*(upload.admission for upload in uploads), off_grid.admission]
        assert not any(rounds.judge(context.id, judged))
    sketches = {}
    if plan.norm_check is not None:
        for upload in (*uploads, off_grid):
            digest = upload.admission.receipt.upload_digest
            made = sketch(context, digest, [widen(upload.payload, plan.blocks)], _CHALLENGE)
            sketches[digest] = made.to_bytes()
            if until > 1:
                rounds.submit_sketch(context.id, made)
        if until > 1:
            rounds.verdicts(context.id)
    rounds._ledger.close()
    return _Scene(folder, context, uploads, off_grid, sketches)


@cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="secagg-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _scenes() -> tuple[Loop, tuple[_Scene, ...]]:
    checked = cohort.mixed_plan(norm_check=NormCheck())
    plain = cohort.counts_plan()
    made = (
        *(_scene("opened", plain, 0), _scene("judged", plain, 1)),
        *(_scene("to sketch", checked, 1), _scene("sketched", checked, 2)),
    )
    return Loop(), made


def _one(data: bytes) -> None:
    loop, scenes = _scenes()
    choices = Choices(data)
    scene = choices.pick(scenes)
    folder = _scratch() / "now"
    shutil.copytree(scene.folder, folder)
    try:
        rounds = durable_rounds(folder, identity=cohort.identity(90))
        with closing(rounds._ledger):
            world = _World(scene, KeyHolderService(rounds))
            for _ in range(_MOST_CALLS):
                if not choices.left:
                    break
                call = choices.pick(_CALLS)
                with refusable(*_REFUSALS):
                    loop.run(call(world, choices))
    finally:
        shutil.rmtree(folder)


async def _open(world: _World, choices: Choices) -> None:
    request = pb.OpenRoundRequest(
        task_id="task",
        round_number=1 + choices.number(2),
        attempt=1 + choices.number(2),
        plan=codec.plan_to_wire(world.scene.plan),
        model_digest=bytes(32),
    )
    if found := changed(choices, request):
        answer = await _plain(world, "OpenRound")(found)
        codec.round_context_from_wire(answer.context, found.plan, answer.round_key)


async def _judge(world: _World, choices: Choices) -> None:
    members = _members(world, choices)
    request = pb.JudgeUploadsRequest(
        context=codec.context_id_to_wire(world.scene.context.id),
        admissions=[codec.admission_to_wire(upload.admission) for upload in members],
    )
    if found := changed(choices, request):
        answer = await _plain(world, "JudgeUploads")(found)
        assert len(answer.verdicts) == len(found.admissions)


async def _submit(world: _World, choices: Choices) -> None:
    upload = choices.pick([*world.scene.uploads, world.scene.off_grid])
    data = world.scene.sketches.get(upload.admission.receipt.upload_digest, bytes(64))
    requests = [pb.SubmitSketchRequest(upload=_name(world, upload))]
    await _stream(world, choices, "SubmitSketch", requests, "sketch", data)


async def _verdicts(world: _World, choices: Choices) -> None:
    request = pb.GetVerdictsRequest(context=codec.context_id_to_wire(world.scene.context.id))
    if found := changed(choices, request):
        async for answer in _plain(world, "GetVerdicts")(found):
            assert answer.verdicts


async def _check(world: _World, choices: Choices) -> None:
    members = _members(world, choices)
    low = dithered(world.scene.plan, world.scene.summed(members), Stream.derive("fuzz"))
    requests = [pb.CheckSumRequest(manifest=_manifest(world, members))]
    await _stream(world, choices, "CheckSum", requests, "low_bits", low_to_bytes(low))


async def _audit(world: _World, choices: Choices) -> None:
    upload = choices.pick([world.scene.off_grid, *world.scene.uploads])
    residues = widen(upload.payload, world.scene.plan.blocks)
    low = dithered(world.scene.plan, residues, Stream.derive("fuzz"))
    requests = [pb.AuditNoiseRequest(upload=_name(world, upload))]
    await _stream(world, choices, "AuditNoise", requests, "low_bits", low_to_bytes(low))


async def _release(world: _World, choices: Choices) -> None:
    members = _members(world, choices)
    data = narrow(world.scene.summed(members))
    requests = [pb.ReleaseRequest(manifest=_manifest(world, members))]
    sent = _sent(choices, requests, "residues", data)
    answers = [answer async for answer in _plain(world, "Release")(_each(sent))]
    sums = b"".join(answer.data for answer in answers)
    named = {name for each in sent for name in each.manifest.upload_digests}
    _check_release(world, sums, answers[0].contributors, named)


def _check_release(world: _World, sums: bytes, contributors: int, named: set[bytes]) -> None:
    """What leaves is one exact sum over a large enough manifest."""
    context = world.scene.context
    world.released.add((sums, contributors))
    assert len(world.released) == 1, "two sums of one round were released"
    assert context.plan.min_clients <= contributors == len(named)
    digests = [upload.admission.receipt.upload_digest for upload in world.scene.uploads]
    assert named <= set(digests)
    expected = cohort.clear_sums(context, [i for i, name in enumerate(digests) if name in named])
    assert sums == codec.sums_to_bytes(expected)


async def _close(world: _World, choices: Choices) -> None:
    request = pb.CloseRoundRequest(context=codec.context_id_to_wire(world.scene.context.id))
    if found := changed(choices, request):
        await _plain(world, "CloseRound")(found)


def _members(world: _World, choices: Choices) -> list[Upload]:
    """Some of the uploads, the one off the grid among them perhaps; 0 is all that are good."""
    chosen = choices.number(64)
    if chosen == 0:
        return list(world.scene.uploads)
    everybody = [*world.scene.uploads, world.scene.off_grid]
    members = [upload for place, upload in enumerate(everybody) if chosen >> place & 1]
    return members + members[:1] * (chosen >> 5 & 1)


def _name(world: _World, upload: Upload) -> pb.NamedUpload:
    return pb.NamedUpload(
        context=codec.context_id_to_wire(world.scene.context.id),
        upload_digest=upload.admission.receipt.upload_digest,
    )


def _manifest(world: _World, members: Sequence[Upload]) -> pb.Manifest:
    return pb.Manifest(
        context=codec.context_id_to_wire(world.scene.context.id),
        upload_digests=[upload.admission.receipt.upload_digest for upload in members],
    )


def _sent(choices: Choices, requests: list[Any], kind: str, data: bytes) -> list[Any]:
    """A stream: its first message, then pieces of data; all of it changed perhaps."""
    order = choices.number(8)
    data = choices.altered(data)
    size = choices.pick(_PIECES)
    first = [found for request in requests if (found := changed(choices, request))]
    cut = [data[at : at + size] for at in range(0, len(data), size)]
    parts = [type(requests[0])(**{kind: part}) for part in cut]
    if order == 1:
        return [*parts, *first]
    if order == 2:
        return [*first, *first, *parts]
    if order == 3:
        return [*first, *itertools.islice(parts, 1), *first, *parts[1:]]
    if order == 4:
        return [*first, *parts, type(requests[0])(**{kind: b""})]
    return [*first, *parts]


async def _stream(
    world: _World, choices: Choices, method: str, requests: list[Any], kind: str, data: bytes
) -> None:
    await _plain(world, method)(_each(_sent(choices, requests, kind, data)))


async def _each(messages: Iterable[Any]) -> AsyncIterator[Any]:
    for message in messages:
        yield message


def _plain(world: _World, method: str) -> Callable[[Any], Any]:
    """A method of the service without the translation of its errors."""
    found = getattr(KeyHolderService, method).__wrapped__
    return lambda request: found(world.service, request, None)


# Inputs that are kept count on these places: new ones go to the end.
_CALLS: tuple[Callable[[_World, Choices], Coroutine[Any, Any, None]], ...] = (
    *(_open, _judge, _submit, _verdicts, _check, _audit, _release, _close),
)
_PLACE = {call: index for index, call in enumerate(_CALLS)}
_OPENED, _JUDGED, _TO_SKETCH, _SKETCHED = range(4)


def _program(scene: int, *calls: tuple[Callable[..., object], bytes]) -> bytes:
    return bytes([scene]) + b"".join(bytes([_PLACE[call]]) + rest for call, rest in calls)


def _seeds() -> dict[str, bytes]:
    streamed = bytes(5)  # everybody, in order, nothing altered, large pieces, nothing changed
    audits = [(_audit, bytes([upload, 0, 0, 0, 0])) for upload in range(5)]
    spoiled = b"\x1f" + streamed[1:]  # with the one off the grid
    sketches = [(_submit, bytes([upload, 0, 0, 0, 0])) for upload in range(5)]
    return {
        "a round": _program(_OPENED, (_judge, b"\0\0"), (_check, streamed), (_release, streamed)),
        "released": _program(_JUDGED, (_check, streamed), (_release, streamed)),
        "released twice": _program(_JUDGED, (_release, streamed), (_release, streamed)),
        "two cohorts": _program(_JUDGED, (_release, streamed), (_release, b"\7\0\0\0\0")),
        "too few": _program(_JUDGED, (_release, b"\3\0\0\0\0")),
        "audited": _program(
            _JUDGED, (_check, spoiled), *audits, (_check, streamed), (_release, streamed)
        ),
        "sketched": _program(_TO_SKETCH, *sketches, (_verdicts, b"\0"), (_release, streamed)),
        "released after its check": _program(_SKETCHED, (_check, streamed), (_release, streamed)),
        "the next attempt": _program(_JUDGED, (_open, b"\0\1\0"), (_release, streamed)),
        "in small pieces": _program(_JUDGED, (_release, b"\0\0\0\2\0")),
        "out of order": _program(_JUDGED, (_release, b"\0\1\0\0\0")),
        "closed": _program(_JUDGED, (_close, b"\0"), (_release, streamed)),
    }


KEY_HOLDER = Target(
    "keyholder",
    "calls of the server in any order: manifests, sums, low bits, sketches and seals in streams",
    ("KeyHolderService", "Rounds", "Sketch.from_bytes", "low_from_bytes", "RoundKeyPair.open"),
    _one,
    _seeds,
    prepare=_scenes,
)
