"""A key holder that says a sum does not open, and blames the client that it wants to read.

Broken: a server that takes its word for it and sends the sum of the others next. The two sums
differ by the victim's upload, and the key holder has the key to that. In ours the key holder sees
the noise of a sum first, in its low bits, and is given one sum of an attempt, after that has
passed: whatever it says, there is no second one to subtract.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cohort
import numpy as np
from attacker import Integers, enrolment, key_of, named, read, signer, summed, upload_under
from key_holders import LocalKeyHolder
from numpy.typing import NDArray
from servers import DEADLINE_S, Server, running, scenario, task

from secagg.context import RoundContext
from secagg.errors import OffGridError, ReleaseError
from secagg.keyholder import KeyHolder
from secagg.parameters import MODULUS
from secagg.planner import plan_integers
from secagg.upload import Admission
from secagg_server.key_holder import Opened, ReleasedSums
from secagg_server.states import RoundState

SIZE = 50
NAMES = ["victim", "alice", "bob", "carol"]
PLAN = plan_integers(SIZE, max_clients=6, max_abs=100)
ROSTER = enrolment({name: [signer(name)] for name in NAMES})


def values(name: str) -> Integers:
    drawn = np.random.default_rng(list(name.encode()))
    return drawn.integers(-100, 100, SIZE, endpoint=True)


def test_two_sums_of_one_round_give_the_client_between_them_away() -> None:
    context = KeyHolder(PLAN, roster=ROSTER).context
    sent = [
        upload_under(context, [values(name)], signer(name), named("seed", name)) for name in NAMES
    ]
    difference = (summed(sent) + np.uint64(MODULUS) - summed(sent[1:])) % np.uint64(MODULUS)
    (read_off,) = read(context, key_of([named("seed", "victim")]), difference)
    assert np.array_equal(read_off, values("victim"))


class Liar(LocalKeyHolder):
    """Refuses the first sum, blames one client for it, and keeps all that it is given."""

    def __init__(self, *, when: str) -> None:
        super().__init__()
        self.when = when
        self.sums: list[NDArray[np.uint64]] = []
        self.refused = False

    def _refuse(self, at: str) -> None:
        if at == self.when and not self.refused:
            self.refused = True
            raise ReleaseError("expected a sum that opens; it does not")

    async def check_sum(
        self, context: RoundContext, upload_digests: Sequence[bytes], low: NDArray[np.uint32]
    ) -> None:
        self._refuse("check")
        await super().check_sum(context, upload_digests, low)

    async def audit(
        self, context: RoundContext, upload_digest: bytes, low: NDArray[np.uint32]
    ) -> str:
        victim = cohort.identity(1).public
        blamed = {a.receipt.upload_digest for a in self.judged if a.receipt.client_key == victim}
        return OffGridError.reason if upload_digest in blamed else ""

    async def judge(self, context: RoundContext, admissions: Sequence[Admission]) -> Opened:
        self.judged = list(admissions)
        return await super().judge(context, admissions)

    async def release(
        self, context: RoundContext, upload_digests: Sequence[bytes], residues: NDArray[np.uint64]
    ) -> ReleasedSums:
        self.sums.append(residues)
        self._refuse("release")
        return await super().release(context, upload_digests, residues)


async def contributed(server: Server) -> RoundContext:
    server.create(task(rounds=1))
    context = (await server.collecting()).context
    server.send_all(context, range(5))
    server.clock.advance(DEADLINE_S)
    return context


@scenario
async def test_ours_gives_one_sum_to_a_key_holder_that_blames_a_client(folder: Path) -> None:
    liar = Liar(when="check")
    async with running(folder, liar) as server:
        context = await contributed(server)
        row = await server.ended()
        assert (row.state, row.contributors, row.audited) == (RoundState.DONE, 4, True)
        assert len(liar.sums) == 1
        # The victim is left out, and that is all that the lie has brought.
        others = [index for index in range(5) if index != 1]
        for found, clear in zip(
            server.sums(context.plan, 1), cohort.clear_sums(context, others), strict=True
        ):
            assert np.array_equal(found, clear)


@scenario
async def test_ours_sends_nothing_more_after_a_sum_that_is_said_not_to_open(folder: Path) -> None:
    liar = Liar(when="release")
    async with running(folder, liar) as server:
        await contributed(server)
        row = await server.ended(1, 1)
        assert (row.state, row.audited) == (RoundState.ABORTED, False)
        assert len(liar.sums) == 1
        assert "audit" not in liar.calls
