"""A client whose uploads lie off the grid, to stop every round or to bend every sum.

Broken: no guard at all, where whatever comes is rounded and the sum bends; and a guard that refuses
the sum but names nobody, so that one client ends every round for everybody (a denial of service
that costs it one upload a round). Willow (eprint 2024/936) has the clients prove their noise.

Ours looks at each upload's noise beside its values (`noise_audit`), once a refusal has shown that
somebody is off: the client is named, whatever it chose, and the sum over the others is exact.
Within the audit's window a client is honest by definition; the tests show what conspirators can do
there, which is to stop a round, and never to bend it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from attacker import (
    Integers,
    Residues,
    key_of,
    name_of,
    named,
    residues,
    signer,
    summed,
    upload_under,
)
from key_holders import durable_rounds

from secagg import ckks, onetime
from secagg.aggregator import Aggregate
from secagg.context import NO_MODEL, RoundContext
from secagg.errors import ClosedError, OffGridError, ReleaseError, SealError
from secagg.keyholder import KeyHolder
from secagg.noise_audit import HIGHEST, LOWEST, dithered
from secagg.parameters import MODULUS
from secagg.planner import plan_integers
from secagg.sampling import CBD_BITS, Stream
from secagg.upload import Upload
from secagg.wire.codec import sums_from_bytes
from secagg_keyholder.rounds import Rounds

SIZE, HONEST = 50, 5
PLAN = plan_integers(SIZE, max_clients=8, max_abs=100)
(LAYOUT,) = PLAN.layouts
HALF = 1 << (LAYOUT.shift - 1)


def values(client: int) -> Integers:
    return np.random.default_rng(client).integers(-100, 100, SIZE, endpoint=True)


def upload(context: RoundContext, client: int, noise: Integers | None = None) -> Upload:
    seed = named("seed", client, context.id.round_number)
    return upload_under(context, [values(client)], signer(f"{client}"), seed, noise)


def honest(context: RoundContext) -> list[Upload]:
    return [upload(context, client) for client in range(HONEST)]


TOTAL = np.sum([values(client) for client in range(HONEST)], axis=0)


def one_coefficient(round_number: int) -> Integers:
    noise = onetime.errors(named("noise", round_number), PLAN.blocks)
    noise[0, round_number] = HALF
    return noise


def almost_half(round_number: int) -> Integers:
    return np.full((PLAN.blocks, 4096), HALF - 1 if round_number % 2 else 1 - HALF)


def random_noise(round_number: int) -> Integers:
    drawn = np.random.default_rng(round_number)
    return drawn.integers(-MODULUS // 2 + 2**50, MODULUS // 2 - 2**50, (PLAN.blocks, 4096))


def padding_only(round_number: int) -> Integers:
    noise = np.zeros((PLAN.blocks, 4096), np.int64)
    noise[0, SIZE:] = (-1) ** round_number * HALF
    return noise


STRATEGIES: dict[str, Callable[[int], Integers]] = {
    "half a step, once": one_coefficient,
    "almost half a step, everywhere": almost_half,
    "anything": random_noise,
    "where no values are": padding_only,
}
ATTACKER = HONEST


# --- broken ---------------------------------------------------------------------------------------


def unguarded(context: RoundContext, seeds: list[bytes], sum_: Residues) -> Integers:
    """Broken: rounds whatever comes to the grid, and believes every digit."""
    opened = ckks.decrypt(sum_, context.public_polynomials(), key_of(seeds))
    grid = (opened + HALF) >> LAYOUT.shift
    first_digit: Integers = (grid + LAYOUT.base // 2) % LAYOUT.base - LAYOUT.base // 2
    return first_digit.reshape(-1)[:SIZE]


def test_without_a_guard_one_client_bends_the_sum_as_it_likes() -> None:
    context = KeyHolder(PLAN).context
    wish = np.zeros((PLAN.blocks, 4096), np.int64)
    # Far out of range, and between two multiples of the grid.
    wish[0, :SIZE] = (900 << LAYOUT.shift) + HALF // 2
    sent = [*honest(context), upload(context, ATTACKER, wish)]
    seeds = [named("seed", client, 1) for client in range(HONEST + 1)]
    bent = unguarded(context, seeds, summed(sent))
    assert np.array_equal(bent, TOTAL + values(ATTACKER) + 900)
    # 900 is more than all eight clients could honestly add.
    assert PLAN.max_clients * LAYOUT.max_abs < 900


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_guard_without_an_audit_lets_one_client_end_every_round_unnamed(strategy: str) -> None:
    for number in range(1, 4):
        holder = KeyHolder(PLAN, round_number=number)
        sent = honest(holder.context)
        sent.append(upload(holder.context, ATTACKER, STRATEGIES[strategy](number)))
        # Leaving others out at random does not help, and after two tries it is over.
        for left_out, error in enumerate([ReleaseError, ReleaseError, ClosedError]):
            rest = sent[left_out:]
            aggregate = Aggregate(tuple(u.admission for u in rest), summed(rest))
            with pytest.raises(error):
                holder.release(aggregate)


# --- ours -----------------------------------------------------------------------------------------


@pytest.fixture
def rounds(tmp_path: Path) -> Rounds:
    return durable_rounds(tmp_path, identity=signer("key holder"))


def opened(rounds: Rounds, number: int) -> RoundContext:
    return rounds.open(PLAN, "task", number, 1, NO_MODEL)[0]


def released(rounds: Rounds, context: RoundContext, sent: list[Upload]) -> Integers:
    answer = rounds.release(context.id, [name_of(u) for u in sent], summed(sent))
    return sums_from_bytes(answer.sums, PLAN)[0]


def audited(rounds: Rounds, context: RoundContext, sent: list[Upload]) -> list[str]:
    """What the server does after a refusal: show the dithered low bits of each upload."""
    return [
        rounds.audit(
            context.id,
            name_of(each),
            dithered(PLAN, residues(each), Stream.derive("dither", context.id.round_number, index)),
        )
        for index, each in enumerate(sent)
    ]


def judged(rounds: Rounds, context: RoundContext, sent: list[Upload]) -> None:
    assert rounds.judge(context.id, [u.admission for u in sent]) == [""] * len(sent)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ours_names_it_every_round_and_finishes_exactly_without_it(
    rounds: Rounds, strategy: str
) -> None:
    for number in range(1, 6):
        context = opened(rounds, number)
        others = honest(context)
        sent = [upload(context, ATTACKER, STRATEGIES[strategy](number)), *others]
        judged(rounds, context, sent)
        with pytest.raises(ReleaseError):
            released(rounds, context, sent)
        assert audited(rounds, context, sent) == [OffGridError.reason, *[""] * HONEST]
        with pytest.raises(SealError):
            released(rounds, context, sent)
        assert np.array_equal(released(rounds, context, others), TOTAL)


def test_ours_names_several_at_once(rounds: Rounds) -> None:
    context = opened(rounds, 1)
    others = honest(context)
    bad = [
        upload(context, HONEST + i, strategy(1))
        for i, strategy in enumerate(list(STRATEGIES.values())[:3])
    ]
    judged(rounds, context, [*others, *bad])
    with pytest.raises(ReleaseError):
        released(rounds, context, [*others, *bad])
    assert audited(rounds, context, [*bad, *others]) == [OffGridError.reason] * 3 + [""] * HONEST
    assert np.array_equal(released(rounds, context, others), TOTAL)


def test_ours_is_not_misled_by_noise_that_cancels_in_the_sum(rounds: Rounds) -> None:
    # Two conspirators whose noise adds up to nothing: the sum opens, and is what they all sent.
    context = opened(rounds, 1)
    push = np.full((PLAN.blocks, 4096), HALF - 1)
    sent = [*honest(context), upload(context, 6, push), upload(context, 7, -push)]
    judged(rounds, context, sent)
    assert np.array_equal(released(rounds, context, sent), TOTAL + values(6) + values(7))


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_few_conspirators_within_the_limit_neither_stop_nor_bend_a_round(
    rounds: Rounds, sign: int
) -> None:
    # The largest error an honest client can have, in every coefficient, from two of seven.
    context = opened(rounds, 1)
    push = np.full((PLAN.blocks, 4096), sign * CBD_BITS)
    sent = [*honest(context), upload(context, 6, push), upload(context, 7, push)]
    judged(rounds, context, sent)
    # Five honest errors leave the guard's remainder with probability below 10**-7 a coefficient.
    assert LAYOUT.guard - 2 * CBD_BITS > 4 * np.sqrt(HONEST * CBD_BITS / 2)
    assert np.array_equal(released(rounds, context, sent), TOTAL + values(6) + values(7))


def test_many_conspirators_within_the_limit_can_stop_a_round_and_never_bend_it(
    rounds: Rounds,
) -> None:
    context = opened(rounds, 1)
    count = LAYOUT.guard // CBD_BITS + 1
    assert 3 < count <= PLAN.max_clients  # a conspiracy of half the cohort
    push = np.full((PLAN.blocks, 4096), CBD_BITS)
    others = [upload(context, client) for client in range(PLAN.max_clients - count)]
    sent = [*others, *(upload(context, 10 + i, push) for i in range(count))]
    judged(rounds, context, sent)
    with pytest.raises(ReleaseError):
        released(rounds, context, sent)
    assert audited(rounds, context, sent) == [""] * len(sent)
    # The same sum again, which tells nothing new, and then another one.
    for tried, error in ((sent, ReleaseError), (sent[1:], ReleaseError), (sent[1:], ClosedError)):
        with pytest.raises(error):
            released(rounds, context, tried)


def test_the_guard_lies_between_what_passes_and_what_bends() -> None:
    # A sum moves to another value only from half a step on; it is refused from the guard on.
    assert max(-LOWEST, HIGHEST) < LAYOUT.guard < HALF
