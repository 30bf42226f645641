"""One seed, one message: even when the system's randomness repeats."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg import onetime
from secagg.onetime import errors, fresh_seed, message_salt, secret

CONTEXT = b"c" * 32
MESSAGE = [np.arange(10, dtype=np.int64), np.zeros(3, dtype=np.int64)]


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cloned virtual machine: the generator repeats its output."""
    monkeypatch.setattr(onetime.os, "urandom", lambda count: b"\x42" * count)


@pytest.mark.usefixtures("frozen")
def test_different_messages_get_different_seeds_from_the_same_randomness() -> None:
    seeds = {fresh_seed(message_salt(CONTEXT, MESSAGE))}
    for part in range(2):
        for index in range(MESSAGE[part].size):
            changed = [array.copy() for array in MESSAGE]
            changed[part][index] += 1
            seeds.add(fresh_seed(message_salt(CONTEXT, changed)))
    assert len(seeds) == 1 + 10 + 3
    assert fresh_seed(message_salt(CONTEXT, MESSAGE)) in seeds


@pytest.mark.usefixtures("frozen")
def test_different_contexts_get_different_seeds_from_the_same_randomness() -> None:
    assert fresh_seed(message_salt(CONTEXT, MESSAGE)) != fresh_seed(
        message_salt(b"d" * 32, MESSAGE)
    )


@pytest.mark.usefixtures("frozen")
def test_a_message_key_and_errors_get_different_seeds_from_the_same_randomness() -> None:
    # The key holder has the first and must not know the second: see the noise audit.
    key, noise = (
        fresh_seed(message_salt(CONTEXT, MESSAGE)),
        fresh_seed(message_salt(CONTEXT, MESSAGE), "errors"),
    )
    assert key == fresh_seed(message_salt(CONTEXT, MESSAGE), "key")
    assert key != noise
    assert not np.array_equal(errors(key, 1), errors(noise, 1))


@pytest.mark.usefixtures("frozen")
def test_the_division_into_segments_matters() -> None:
    joined = [np.concatenate(MESSAGE)]
    shifted = [joined[0][:9], joined[0][9:]]
    assert (
        len({fresh_seed(message_salt(CONTEXT, parts)) for parts in (MESSAGE, joined, shifted)}) == 3
    )


def test_the_same_message_gets_a_new_seed_every_time() -> None:
    seeds = {fresh_seed(message_salt(CONTEXT, MESSAGE)) for _ in range(50)}
    assert len(seeds) == 50
    assert {len(seed) for seed in seeds} == {32}


def test_the_seed_uses_every_byte_of_the_randomness(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = set()
    for position in range(32):
        drawn = bytes(position) + b"\1" + bytes(31 - position)
        monkeypatch.setattr(onetime.os, "urandom", lambda count, drawn=drawn: drawn[:count])
        seeds.add(fresh_seed(message_salt(CONTEXT, MESSAGE)))
    assert len(seeds) == 32


def test_a_message_may_be_a_generator() -> None:
    assert len(fresh_seed(message_salt(CONTEXT, (part for part in MESSAGE)))) == 32


def test_keys_and_errors_come_from_separate_streams() -> None:
    seed = bytes(32)
    key, noise = secret(seed), errors(seed, 2)
    assert key.shape == (4096,)
    assert noise.shape == (2, 4096)
    assert set(np.unique(key)) == {-1, 0, 1}
    # Correlation of independent values: standard deviation 1 / 64; 7 of them, false alarm 3e-12.
    for polynomial in noise:
        assert abs(np.corrcoef(key, polynomial)[0, 1]) < 7 / 64
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 7 / 64


def test_the_expansion_is_deterministic_and_seed_dependent() -> None:
    one, other = bytes(32), b"\1" + bytes(31)
    assert np.array_equal(secret(one), secret(one))
    assert not np.array_equal(secret(one), secret(other))
    assert np.array_equal(errors(one, 3)[:2], errors(one, 2))
    assert not np.array_equal(errors(one, 1), errors(other, 1))


def test_the_expansion_is_stable() -> None:
    # A change of these values is a change of protocol: key holder and client would disagree.
    assert secret(bytes(32))[:12].tolist() == [-1, 1, 1, 0, -1, -1, 1, 0, 1, 1, 0, 1]
    assert errors(bytes(32), 1)[0, :8].tolist() == [1, -6, -1, -2, -4, 1, -5, -4]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4), st.integers(0, 3))
def test_messages_that_differ_have_salts_that_differ(numbers: list[int], place: int) -> None:
    message = np.array(numbers, dtype=np.int64)
    changed = message.copy()
    changed[place % message.size] ^= 1
    assert message_salt(CONTEXT, [message]) == message_salt(CONTEXT, [message.copy()])
    assert message_salt(CONTEXT, [message]) != message_salt(CONTEXT, [changed])


@pytest.mark.parametrize("value", [127, 128, 255, 256, 32767, 32768, 2**31, 2**32, 2**62])
def test_a_salt_tells_a_number_from_itself_modulo_a_width(value: int) -> None:
    message = np.array([value, 0], dtype=np.int64)
    for width in (8, 16, 32):
        wrapped = (message + (1 << (width - 1))) % (1 << width) - (1 << (width - 1))
        same = np.array_equal(wrapped, message)
        assert (message_salt(CONTEXT, [wrapped]) == message_salt(CONTEXT, [message])) == same
