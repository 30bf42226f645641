"""Two messages under one seed: the difference of the ciphertexts is the difference of the messages.

A one-time key used twice is no key: c - c' = m - m' + e - e', and e - e' is far below the grid.
Broken: a client that encrypts a retry anew under the seed it has, over data that changed meanwhile;
and one that draws its seed from a generator alone, which a cloned virtual machine repeats.

Ours derives each seed from fresh bytes and the message, so that two messages never share one, and
an outbox sends the same bytes again instead of encrypting twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from attacker import (
    Integers,
    PuppetSession,
    coefficients,
    key_of,
    named,
    read,
    residues,
    signer,
    upload_under,
)
from round_support import raw_upload

from secagg import onetime, ring
from secagg.context import RoundContext
from secagg.errors import ReleaseError, UnavailableError
from secagg.keyholder import KeyHolder
from secagg.packing import unpack
from secagg.parameters import MODULUS
from secagg.planner import plan_integers
from secagg.upload import Upload

SIZE = 50
PLAN = plan_integers(SIZE, max_clients=6, max_abs=100)
(LAYOUT,) = PLAN.layouts
CONTEXT = KeyHolder(PLAN).context
FIRST, SECOND = (
    np.random.default_rng(i).integers(-100, 100, SIZE, endpoint=True) for i in range(2)
)


def difference(first: Upload, second: Upload) -> Integers:
    """What a server gets out of two ciphertexts without any key.

    Raises:
        ReleaseError: nothing: they do not lie on the grid together.
    """
    between = (residues(first) + np.uint64(MODULUS) - residues(second)) % np.uint64(MODULUS)
    return unpack(LAYOUT, ring.from_ntt(between), 2)


# --- broken ---------------------------------------------------------------------------------------


class SeedKept:
    """Broken: one seed a round; what is encrypted under it is whatever the data is by then."""

    def __init__(self) -> None:
        self._seed = named("the round's seed")

    def encrypt(self, message: Integers) -> Upload:
        fresh = onetime.errors(os.urandom(32), PLAN.blocks)
        return upload_under(CONTEXT, [message], signer("victim"), self._seed, fresh)


def test_one_seed_for_a_retry_gives_the_difference_of_the_messages() -> None:
    client = SeedKept()
    gained = difference(client.encrypt(FIRST), client.encrypt(SECOND))
    assert np.array_equal(gained, FIRST - SECOND)


def test_a_retry_of_zeros_gives_the_whole_message() -> None:
    # As when the second process starts before its data is there.
    client = SeedKept()
    empty = client.encrypt(np.zeros(SIZE, np.int64))
    assert np.array_equal(difference(client.encrypt(FIRST), empty), FIRST)


class DrawnSeed:
    """Broken: the seed is whatever the generator yields."""

    def __init__(self, generator: Callable[[int], bytes]) -> None:
        self._generator = generator

    def encrypt(self, message: Integers) -> Upload:
        seed, noise = self._generator(32), self._generator(32)
        errors = onetime.errors(noise, PLAN.blocks)
        return upload_under(CONTEXT, [message], signer("victim"), seed, errors)


def cloned() -> Callable[[int], bytes]:
    """A generator in the state that its snapshot had."""
    drawn = (named("generator", number) for number in range(1000))
    return lambda count: next(drawn)[:count]


def test_a_cloned_generator_repeats_the_key_of_a_drawn_seed() -> None:
    first, second = DrawnSeed(cloned()).encrypt(FIRST), DrawnSeed(cloned()).encrypt(SECOND)
    assert np.array_equal(difference(first, second), FIRST - SECOND)


# --- ours -----------------------------------------------------------------------------------------


def stuck(count: int) -> bytes:
    """The worst of generators."""
    return bytes(count)


def alternating() -> Callable[[int], bytes]:
    """Repeats itself after two draws: what one upload of ours takes."""
    drawn: Iterator[bytes] = cycle([named("odd"), named("even")])
    return lambda count: next(drawn)[:count]


GENERATORS: dict[str, Callable[[], Callable[[int], bytes]]] = {
    "cloned": cloned,
    "stuck": lambda: stuck,
    "alternating": alternating,
}


def ours(
    monkeypatch: pytest.MonkeyPatch, generator: str, context: RoundContext, message: Integers
) -> Upload:
    with monkeypatch.context() as patch:
        patch.setattr("secagg.onetime.os.urandom", GENERATORS[generator]())
        return raw_upload(context, [message], signer("victim"))


@pytest.mark.parametrize("generator", GENERATORS)
def test_ours_puts_no_two_messages_under_one_key_whatever_the_generator(
    generator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = FIRST.copy()
    changed[7] += 1 if changed[7] < 100 else -1
    for other in (SECOND, changed, np.zeros(SIZE, np.int64)):
        first, second = (ours(monkeypatch, generator, CONTEXT, m) for m in (FIRST, other))
        with pytest.raises(ReleaseError):
            difference(first, second)


@pytest.mark.parametrize("generator", GENERATORS)
def test_ours_says_nothing_new_when_it_encrypts_one_message_twice(
    generator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a clone that has the same message a server gets the very same ciphertexts.
    first, second = (ours(monkeypatch, generator, CONTEXT, FIRST) for _ in range(2))
    assert first.payload == second.payload


@pytest.mark.parametrize("generator", GENERATORS)
def test_ours_has_another_key_in_another_attempt(
    generator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = [KeyHolder(PLAN, attempt=attempt).context for attempt in (1, 2)]
    seeds: list[bytes] = []
    genuine = onetime.fresh_seed

    def spy(*arguments: object) -> bytes:
        seeds.append(genuine(*arguments))  # type: ignore[arg-type]
        return seeds[-1]

    monkeypatch.setattr("secagg.encryptor.fresh_seed", spy)
    uploads = [ours(monkeypatch, generator, context, FIRST) for context in contexts]
    keys = {tuple(onetime.secret(seed)) for seed in seeds[::2]}
    assert len(keys) == 2
    # The key of one attempt, should it ever leak, does not read the other.
    for seed, context, upload in zip(seeds[::2], contexts, uploads, strict=True):
        assert np.array_equal(read(context, key_of([seed]), residues(upload))[0], FIRST)
    with pytest.raises(ReleaseError):
        read(contexts[1], key_of([seeds[0]]), residues(uploads[1]))


def test_the_difference_would_be_found_if_it_were_there(monkeypatch: pytest.MonkeyPatch) -> None:
    # The same uploads of ours, with the message taken out of the seed.
    monkeypatch.setattr("secagg.encryptor.fresh_seed", lambda *_: named("seed without the message"))
    first, second = (raw_upload(CONTEXT, [m], signer("victim")) for m in (FIRST, SECOND))
    assert np.array_equal(difference(first, second), FIRST - SECOND)


def test_ours_sends_the_same_bytes_after_a_crash(tmp_path: Path) -> None:
    # The answer is lost, the process ends, its data changes: what is sent was encrypted before.
    context = KeyHolder(PLAN).context
    sent = []
    for message, error in ((FIRST, UnavailableError("lost")), (SECOND, None)):
        with PuppetSession(signer("victim"), {"Upload": error}, outbox=tmp_path) as session:
            try:
                session.contribute(context, {"counts": message}, samples=1)
            except UnavailableError:
                assert error is not None
            sent += session.sent
    first, second = sent
    assert (first.payload, first.admission) == (second.payload, second.admission)


def test_a_client_of_ours_without_an_outbox_takes_another_key(tmp_path: Path) -> None:
    context = KeyHolder(PLAN).context
    with PuppetSession(signer("victim")) as session:
        for message in (FIRST, SECOND):
            session.contribute(context, {"counts": message}, samples=1)
    with pytest.raises(ReleaseError):
        difference(*session.sent)


def test_small_noise_is_all_that_hides_a_repeated_key() -> None:
    # Why the attack is exact: the largest difference of two errors lies below half a step.
    client = SeedKept()
    between = residues(client.encrypt(FIRST)).astype(np.int64) - residues(
        client.encrypt(SECOND)
    ).astype(np.int64)
    opened = ring.from_ntt((between % MODULUS).astype(np.uint64))
    noise = opened - coefficients(PLAN, [FIRST - SECOND])
    assert np.abs(noise).max() <= 2 * 21 < 1 << (LAYOUT.shift - 1)
