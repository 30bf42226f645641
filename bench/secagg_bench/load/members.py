"""Clients for the soak: each in a thread, over mutual TLS, and most of them have some bad day.

Every client writes down what it was told of each upload, so that sums can be held against it.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray

from secagg.context import ContextId, RoundContext
from secagg.encryptor import encrypt_integers, upload_integers
from secagg.errors import (
    ClosedError,
    OverloadedError,
    RoundError,
    SecaggError,
    UnavailableError,
)
from secagg.parameters import FloatSegment, IntegerSegment, NormCheck, Plan, TensorSpec
from secagg.planner import make_plan
from secagg.quantize import Contribution, Quantized, quantize
from secagg.residues import narrow
from secagg.rpc.retry import RetryPolicy
from secagg.sampling import Stream, uniform_polynomials
from secagg.upload import Upload
from secagg_bench.gallery.uploads import signed
from secagg_bench.processes import Services
from secagg_client.session import ClientKit, ClientSession, CurrentRound

__all__ = ["Book", "Member", "Pace", "contribution", "plan_of", "quantized", "update_of"]

WHO = "who"
"""The segment in which each client adds one at its own place: a sum names who is in it."""

ACTS = {
    "honest": 66,
    "skips": 6,
    "late": 4,
    "cut off and resumes": 8,
    "cut off for good": 6,
    "withdraws": 4,
    "poisons": 3,
    "sends noise": 3,
}
"""What a client does in a round, with its weight."""

_POISON = -10


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a soak goes, in seconds.

    Attributes:
        round_s: deadline of a round.
        think_s: longest time a client trains.
        late_s: more that one takes that is late.
    """

    round_s: float = 60.0
    think_s: float = 3.0
    late_s: float = 6.0


def plan_of(parameters: int, clients: int) -> Plan:
    """A checked model update, and a place for each client."""
    tensors = (TensorSpec("w", (parameters,)),)
    return make_plan(
        [FloatSegment("update", tensors, 1.0, 10), IntegerSegment(WHO, clients, 1, 1.5)],
        min_clients=3,
        max_clients=clients,
        norm_check=NormCheck(),
    )


def contribution(plan: Plan, client: int, round_number: int) -> dict[str, Contribution]:
    """What a client adds in a round: half a clip norm in a direction of its own, and its one."""
    values: dict[str, Contribution] = {}
    for segment in plan.segments:
        if isinstance(segment, IntegerSegment):
            values[segment.name] = np.eye(1, segment.size, client, dtype=np.int64)[0]
        else:
            update = update_of(segment.parameters, client, round_number)
            values[segment.name] = {segment.tensors[0].name: update}
    return values


def update_of(parameters: int, client: int, round_number: int) -> NDArray[np.float32]:
    """A client's update in a round, float32 (parameters,), of norm one half."""
    rng = np.random.default_rng((client, round_number))
    update = rng.standard_normal(parameters, dtype=np.float32)
    update *= 0.5 / np.linalg.norm(update)
    return update


def rounding(context: RoundContext, client: int) -> Stream:
    """Repeatable, so that a sum can be computed again in the clear; on loopback only."""
    return Stream.derive("soak rounding", context.id.task_id, context.id.round_number, client)


def quantized(context: RoundContext, client: int) -> list[Quantized]:
    """The integers that a client encrypts in a round."""
    return quantize(
        context.plan,
        contribution(context.plan, client, context.id.round_number),
        samples=1,
        rotation=context.rotation,
        randomness=rounding(context, client),
    )


class Book:
    """What every client knows of its uploads, by attempt.

    Attributes:
        acts: how often each was done.
    """

    def __init__(self) -> None:
        self.acts: Counter[str] = Counter()
        self.contexts: dict[tuple[str, int, int], RoundContext] = {}
        self._fates: dict[tuple[str, int, int], dict[int, bool | None]] = {}
        self._lock = threading.Lock()

    def note(self, context: RoundContext, client: int, fate: bool | None) -> None:
        """Whether a client's upload must be in the sum; None where it was not told."""
        key = _key(context.id)
        with self._lock:
            self.contexts[key] = context
            self._fates.setdefault(key, {})[client] = fate

    def count(self, act: str) -> None:
        """A client has done something."""
        with self._lock:
            self.acts[act] += 1

    def wrong(self, key: tuple[str, int, int], found: NDArray[np.int64]) -> str:
        """What is wrong with who is in an attempt's sum; empty if nothing is.

        Args:
            found: how often each client is in it, int64 (clients,).
        """
        fates = self._fates.get(key, {})
        if set(found.tolist()) - {0, 1}:
            return "somebody is in the sum more than once"
        present = set(np.flatnonzero(found).tolist())
        if lost := {client for client, fate in fates.items() if fate} - present:
            return f"lost {len(lost)} accepted uploads"
        if strange := present - {client for client, fate in fates.items() if fate is not False}:
            return f"summed {len(strange)} uploads that must not be in"
        return ""

    def forget(self, task_id: str) -> None:
        """A task has been looked at."""
        for each in [key for key in self.contexts if key[0] == task_id]:
            del self.contexts[each], self._fates[each]


def _key(name: ContextId) -> tuple[str, int, int]:
    return name.task_id, name.round_number, name.attempt


@dataclass
class Member:
    """One client, for as many tasks as it is told to take part in.

    Attributes:
        failed: what ended it that should not have.
    """

    services: Services
    number: int
    folder: Path
    book: Book
    pace: Pace
    failed: BaseException | None = None
    _cut: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def begin(self, task_id: str) -> threading.Thread:
        """Take part in a task until it ends; the thread that does."""
        thread = threading.Thread(target=self._take_part, args=(task_id,), daemon=True)
        thread.start()
        return thread

    def _take_part(self, task_id: str) -> None:
        try:
            while not self._until_cut_off(task_id):
                pass
        except RoundError as error:
            # A task that fails has ended; whoever cannot reach the server has failed.
            self.book.count(f"left a task: {error.reason}")
            if isinstance(error, UnavailableError | OverloadedError):
                self.failed = error
        except BaseException as error:
            self.failed = error

    def _session(self, task_id: str) -> ClientSession:
        return ClientSession(
            self.services.server,
            task_id,
            self._kit(),
            rounding=lambda context: rounding(context, self.number),
            retry=RetryPolicy(initial_s=0.1, longest_s=0.5),
            outbox=self.folder / f"client-{self.number}",
        )

    def _kit(self) -> ClientKit:
        return ClientKit.load(self.services.client_kit(self.number))

    def _until_cut_off(self, task_id: str) -> bool:
        """Rounds over one connection; whether the task has ended."""
        with self._session(task_id) as session:
            for current in session.rounds():
                act = self._drawn(_key(current.context.id))
                self.book.count(act)
                if not self._act(act, session, current):
                    return False
        return True

    def _drawn(self, attempt: tuple[str, int, int]) -> str:
        """What to do in an attempt; what was cut off in it before is gone on with, or left."""
        if attempt in self._cut:
            return self._cut[attempt]
        (act,) = random.choices(list(ACTS), list(ACTS.values()))  # noqa: S311
        if act.startswith("cut off"):
            self._cut = {attempt: "stays away" if act.endswith("for good") else "resumes"}
        return act

    def _act(self, act: str, session: ClientSession, current: CurrentRound) -> bool:
        """One round; false if the connection is gone."""
        if act in ("skips", "stays away"):
            return True
        late = self.pace.late_s if act == "late" else 0.0
        time.sleep(random.uniform(0, self.pace.think_s) + late)  # noqa: S311
        if act.startswith("cut off"):
            return self._cut_off(session, current)
        if act in ("poisons", "sends noise"):
            self.book.note(current.context, self.number, False)
            with contextlib.suppress(ClosedError):
                session.send(current.context, self._bad(act, current))
            return True
        fate = False
        with contextlib.suppress(ClosedError):
            self._contribute(current)
            fate = True
        if fate and act == "withdraws":
            with contextlib.suppress(ClosedError):
                session.withdraw()
                fate = False
        self.book.note(current.context, self.number, fate)
        return True

    def _contribute(self, current: CurrentRound) -> None:
        # Until it is known: a sum may be looked at before the last of its clients has its answer.
        self.book.note(current.context, self.number, None)
        current.contribute(contribution(current.context.plan, self.number, current.number))

    def _cut_off(self, session: ClientSession, current: CurrentRound) -> bool:
        """Lose the connection somewhere amid an upload."""
        timer = threading.Timer(random.uniform(0.1, 0.3), session.close)  # noqa: S311
        timer.start()
        try:
            self._contribute(current)
            self.book.note(current.context, self.number, True)
        except ClosedError:
            self.book.note(current.context, self.number, False)
        except (SecaggError, ValueError, grpc.RpcError):
            pass  # its fate is known to nobody here, until it is sent again
        timer.join()
        return False

    def _bad(self, act: str, current: CurrentRound) -> Upload:
        context, identity = current.context, self._kit().identity
        if act == "poisons":
            parts = [
                replace(part, values=part.values * _POISON) for part in self._quantized(context)
            ]
            integers = upload_integers(context.plan, parts)
            return encrypt_integers(context, integers, identity, current.commitment)
        payload = narrow(uniform_polynomials(Stream.from_os(), context.plan.blocks))
        return signed(context, payload, os.urandom(32), identity, current.commitment)

    def _quantized(self, context: RoundContext) -> Iterator[Quantized]:
        return iter(quantized(context, self.number))
