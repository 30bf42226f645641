"""Clients: the real blocking session with an outbox, in a simulated thread; some of them lie."""

# ruff: noqa: ANN401 - stands in for functions of any kind

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attacker
import cohort
import numpy as np

from secagg.context import RoundContext
from secagg.encryptor import encrypt_quantized
from secagg.errors import (
    ClosedError,
    DuplicateError,
    ForgedSketchError,
    IdentityError,
    PausedError,
    RoundError,
    SecaggError,
)
from secagg.onetime import errors
from secagg.parameters import IntegerSegment, Plan
from secagg.quantize import Quantized, quantize
from secagg.receipts import NO_COMMITMENT, Receipt, SigningKey
from secagg.residues import narrow
from secagg.rpc.retry import RetryPolicy
from secagg.sampling import Stream, uniform_polynomials
from secagg.sealing import seal, seal_info
from secagg.upload import Admission, Upload
from secagg_client.kits import ClientKit
from secagg_client.outbox import Kept
from secagg_client.session import ClientSession, Cost, CurrentRound
from simulation.loop import Owner, begin, threaded, waits

if TYPE_CHECKING:
    from simulation.world import World

__all__ = ["SAYS_ROUND", "Client", "contribution", "quantized"]

SAYS_ROUND = 16
"""Where in the counts a client says which round it is in; before, each has a place of its own."""

_RESTART_S = 3.0


def contribution(plan: Plan, index: int, round_number: int) -> dict[str, Any]:
    """Client i's values: a one at its own place, the round's number, and a small update."""
    values = cohort.contribution(plan, index)
    for segment in plan.segments:
        if isinstance(segment, IntegerSegment):
            counts = np.zeros(segment.size, np.int64)
            counts[index], counts[SAYS_ROUND] = 1, round_number
            values[segment.name] = counts
    return values


def rounding(context: RoundContext, index: int) -> Stream:
    """The same in every attempt at a round."""
    return Stream.derive("simulated rounding", context.id.round_number, index)


def quantized(context: RoundContext, index: int) -> list[Quantized]:
    """Client i's integers, in the clear."""
    return quantize(
        context.plan,
        contribution(context.plan, index, context.id.round_number),
        samples=cohort.samples(index),
        rotation=context.rotation,
        randomness=rounding(context, index),
    )


class _Session(ClientSession):
    """Tells the oracle what it encrypts, and sends something else where it is told to."""

    def __init__(self, client: Client, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._client = client

    def contribute(
        self,
        context: RoundContext,
        contributions: Mapping[str, Any],
        *,
        samples: int,
        commitment: bytes = NO_COMMITMENT,
        key_holder: bytes = b"",
    ) -> Cost:
        client = self._client
        what = client.lies.get(context.id.round_number)
        if what is None or (self._outbox and self._outbox.load(context.id)):
            client.world.oracle.contributes(client.name, context)
            return super().contribute(
                context,
                contributions,
                samples=samples,
                commitment=commitment,
                key_holder=key_holder,
            )
        if what == "two uploads":
            client.world.oracle.contributes(client.name, context)
            client.world.count(what)
            for _ in range(2):
                upload = encrypt_quantized(
                    context, quantized(context, client.index), self._identity, commitment
                )
                self._deliver(Kept(context, key_holder, upload))
            raise AssertionError("the second one is refused")
        client.world.oracle.lies(client.name, context, what)
        upload = _lie(what, context, client, self._identity, commitment)
        kept = Kept(context, key_holder, upload)
        if self._outbox:
            self._outbox.save(kept)
        self._deliver(kept)
        return Cost(0.0, 0.0, 0.0, 0)


def _lie(
    what: str, context: RoundContext, client: Client, identity: SigningKey, commitment: bytes
) -> Upload:
    parts = [part.values for part in quantized(context, client.index)]
    plan = context.plan
    seed = attacker.named("lie", context.id.digest.hex(), client.index)
    if what == "beyond the norm":
        layout = plan.layouts[-1]
        largest = min(layout.max_abs, round(10 * layout.norm / layout.values**0.5))
        parts[-1] = np.where(np.arange(layout.values) % 2, largest, -largest)
        return attacker.upload_under(context, parts, identity, seed, commitment=commitment)
    if what == "off the grid":
        noise = errors(attacker.named("errors", seed.hex()), plan.blocks)
        noise[0, client.index] += 1 << (plan.layouts[0].shift - 1)
        return attacker.upload_under(context, parts, identity, seed, noise, commitment)
    if what == "noise":
        stream = Stream.derive("lie", context.id.digest, client.index)
        payload = narrow(uniform_polynomials(stream, plan.blocks))
        info = seal_info(context.id.digest, identity.public, hashlib.sha256(payload).digest())
        sealed = seal(seed, context.round_key, info)
        return _signed(identity, context, payload, sealed, commitment)
    honest = encrypt_quantized(context, quantized(context, client.index), identity, commitment)
    damaged = bytearray(honest.admission.sealed_seed)
    if what == "another's signature":
        other = client.world.clients[(client.index + 1) % client.world.run.clients]
        return _signed(other.kit.identity, context, honest.payload, bytes(damaged), commitment)
    damaged[-1] ^= 1
    return _signed(identity, context, honest.payload, bytes(damaged), commitment)


def _signed(
    identity: SigningKey, context: RoundContext, payload: bytes, sealed: bytes, commitment: bytes
) -> Upload:
    digest = hashlib.sha256(payload).digest()
    receipt = Receipt.sign(identity, context.id, digest, sealed, commitment)
    return Upload(Admission(receipt, sealed), payload)


class Client:
    """A client's program, started again after each error, as a supervisor does.

    Attributes:
        lies: what it sends instead, by round.
        gone: whether it is over for it: it has left, is revoked, or the task has ended.
    """

    def __init__(self, world: World, index: int) -> None:
        self.world, self.index = world, index
        self.name = f"client-{index + 1}"
        self.outbox = world.folder / self.name
        self.kit = ClientKit.load(world.kits / "clients" / self.name)
        self.lies: dict[int, str] = {}
        self.gone = False
        self.started = False
        self._naps = 0
        self._owner = Owner()

    def start(self) -> None:
        """Run the program."""
        if self.gone or self.world.ended:
            return
        self.started = True
        begin(self._supervised(), self._owner)

    async def _supervised(self) -> None:
        try:
            await threaded(self._program)
        except Exception as error:  # any error but ours is a bug
            self.world.oracle.violated(f"a client's program failed: {error!r}")
            raise

    def _program(self) -> None:
        while not self.gone:
            try:
                with self.session() as session:
                    for current in session.rounds():
                        self._take_part(current)
                self.gone = True
            except SecaggError as error:
                self._goes_on(error)

    def _goes_on(self, error: SecaggError) -> None:
        revoked = isinstance(error, IdentityError) and self.world.is_revoked(self.name)
        failed = type(error) is RoundError and self.world.has_ended()
        if revoked or failed:
            self.gone = True
        elif isinstance(error, ForgedSketchError):
            self.world.oracle.accuses(self.name)
            for file in self.outbox.glob("evidence-*"):
                file.unlink()
        waits(asyncio.sleep(_RESTART_S))

    def session(self) -> ClientSession:
        """A session as the program has it."""
        return _Session(
            self,
            self.world.addresses["server"],
            "task",
            self.kit,
            rounding=lambda context: rounding(context, self.index),
            retry=RetryPolicy(sleep=self._nap, clock=self.world.loop.time),
            outbox=self.outbox,
        )

    def _nap(self, seconds: float) -> None:
        # Longer than usual, and longer each time: asking too early tells nothing.
        self._naps += 1
        waits(asyncio.sleep(seconds * min(8 + 2 * self._naps, 40)))

    def _take_part(self, current: CurrentRound) -> None:
        plan, number = current.context.plan, current.number
        self._naps = 0
        values = contribution(plan, self.index, number)
        # Otherwise the round goes on without it.
        with contextlib.suppress(ClosedError, DuplicateError, PausedError):
            current.contribute(values, samples=cohort.samples(self.index))

    async def crash(self) -> None:
        """End on the spot."""
        while ended := list(self._owner.cancel()):
            await asyncio.wait(ended)

    def forget(self) -> None:
        """Lose what is on its disk."""
        shutil.rmtree(self.outbox, ignore_errors=True)

    async def withdraw(self) -> None:
        """Take back the newest upload, as the command does, beside the program."""

        def command() -> None:
            # It may be too late.
            with contextlib.suppress(SecaggError), self.session() as session:
                session.withdraw()

        await asyncio.wait([begin(threaded(command), self._owner)])
