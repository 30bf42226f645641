"""The discrete Gaussian N_Z(0, std**2), sampled exactly: the noise of differential privacy.

The mass at an integer x is proportional to exp(-x**2 / (2 std**2)), as in Canonne, Kamath and
Steinke 2020 (arXiv 2004.00010, Definition 1). ``std`` is the parameter that privacy proofs use; the
standard deviation itself is a little smaller where ``std`` is around 1, and equal to it for any
practical purpose from 2 on.

**Algorithm** (Karney 2016, "Sampling exactly from the normal distribution", ACM TOMS 42:3, arXiv
1303.6257, the discrete normal with an integer std and mean 0): draw k >= 0 with mass proportional
to exp(-k**2 / 2), a fair sign and j uniform in 0..std-1; with x = j / std, accept with probability
exp(-x (2k + x) / 2), refuse a negative zero, and return the sign times k std + j. That has mass
exp(-(k std + j)**2 / (2 std**2)) up to a constant. 71 % of the candidates are accepted for a large
std.

**Exactness.** Every choice compares a uniform real U, whose bits are drawn when they are needed,
with a real number c. Its first 16 or 31 bits are compared in bulk with what float64 gives for c;
where those leave any doubt (5 candidates in 2**16, and 5 in 2**32), further bits are compared with
c in decimal arithmetic of as many digits as it takes. Floating point therefore decides how fast a
sample comes, never which. j is uniform by rejection. What is left:

* k is at most 9, so the law is N_Z(0, std**2) *conditioned on* a magnitude below 10 std. By
  Poisson's summation the masses exp(-x**2 / (2 std**2)) add up to Z >= std sqrt(2 pi), so what is
  cut off is 2 sum_{i >= 0} exp(-(10 std + i)**2 / (2 std**2)) / Z
  <= 2 exp(-50) sum_{i >= 0} exp(-10 i / std) / Z
  <= 2 exp(-50) (1 + std / 10) / (std sqrt(2 pi)) < 2**-72 (`CUT_MASS`).
* The stream is ChaCha20's, uniform for anyone who cannot break ChaCha20.

**What that adds to a privacy guarantee.** All of N integers that are ever noised, over all releases
(and all clients, where clients add shares), are within total variation distance N 2**-72 of the
ideal noise. If the ideal is (epsilon, delta)-DP, this is (epsilon, delta')-DP with ::

    delta' <= delta + (1 + exp(epsilon)) N 2**-72

It adds nothing to epsilon. For 2**30 integers and epsilon = 8 it adds less than 2**-30 to delta.

**The same everywhere.** A stream's key, ``std`` and ``count`` fix the samples, on every machine
whose ``exp`` is within 2**-33 of the true value between 0 and 1: a worse one (none is known) could
change them, and their law by as little. A shorter call gives a prefix of a longer one.

**Not constant-time.** How many batches a call takes tells how many candidates were refused; table
look-ups, and the rare long comparison, depend on what was drawn. Whoever times batches on the same
machine, or shares its cache, may learn something about the noise (Jin et al. 2022, "Are we there
yet? Timing and floating-point attacks on differential privacy systems", arXiv 2112.05307). Batches
of 16384 candidates blur that, and do not remove it.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Context, Decimal
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from secagg.errors import InputError
from secagg.parameters import NOISE_TAIL
from secagg.sampling import Stream

__all__ = ["CUT_MASS", "LARGEST_STD", "TAIL", "discrete_gaussian"]

TAIL: int = NOISE_TAIL
"""Every sample is below ``TAIL * std`` in magnitude."""

CUT_MASS: float = 2.0**-72
"""More than the probability that the ideal distribution gives to ``TAIL * std`` and beyond."""

LARGEST_STD: int = 1 << 53
"""Up to here j and std are float64 numbers, and no sample leaves int64."""

# Candidates are drawn in batches of one size, so that nothing depends on how many are wanted; at
# this one the arrays stay in a core's second-level cache.
_BATCH = 1 << 14

# Of each candidate: 16 bits of the U that gives k, a word for j, and 32 bits of which the lowest
# is the sign and the others are the U of the acceptance.
_K_BITS = 16
_COIN_BITS = 31
_UNDECIDED = 255

# In units of 2**-32, the acceptance compares its probability p, as float64 gives it, with a word c
# whose lowest bit says nothing about U: c - 1 <= U < c + 2. The rest is room for the error of p:
# 4 roundings of an exponent t make it at most 4 t exp(-t) 2**-53 < 2**-52, and exp's own is at
# most 4 units in the last place wherever it has been measured, far below the one unit of 2**-32.
_SURELY = 3.0
_PERHAPS = -2.0

Cuts = Callable[[int], tuple[tuple[int, int], ...]]


def discrete_gaussian(stream: Stream, std: int, count: int) -> NDArray[np.int64]:
    """Independent samples of N_Z(0, std**2); see the module for what is exact.

    Args:
        stream: the only source of randomness. It is read in whole batches, so what a second call
            on the same stream gives does not continue the first one.
        std: the parameter of the distribution, an integer from 1 to 2**53.
        count: how many samples, 0 or more.

    Returns:
        int64 (count,), each below ``TAIL * std`` in magnitude.

    Raises:
        InputError: std or count is not an integer in its range.
    """
    _check("standard deviation", std, 1, LARGEST_STD, "round it up, and scale the values to fit")
    _check("number of samples", count, 0, (1 << 63) - 1, "ask for as many as there are values")
    samples = np.empty(count, dtype=np.int64)
    spare, done, first = stream.read(32), 0, 0
    while done < count:
        drawn = _batch(stream, int(std), spare, first)[: count - done]
        samples[done : done + drawn.size] = drawn
        done, first = done + drawn.size, first + _BATCH
    return samples


def _check(name: str, value: object, least: int, largest: int, remedy: str) -> None:
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if least <= value <= largest:
            return
        came = str(value)
    else:
        came = type(value).__name__
    raise InputError(
        f"expected a {name} that is an integer from {least} to {largest}; got {came}; {remedy}"
    )


def _batch(stream: Stream, std: int, spare: bytes, first: int) -> NDArray[np.int64]:
    """What is accepted of the next 16384 candidates, the first of which has number ``first``.

    Bits beyond the first ones come from a stream of the candidate's own, under the key ``spare``:
    whether a machine needed them must not change what the others get.
    """
    cells = np.frombuffer(stream.read(2 * _BATCH), dtype="<u2")
    words, coins = stream.uint64(_BATCH), stream.uint32(_BATCH)
    k = _K_TABLE[cells]
    for i in np.flatnonzero(k == _UNDECIDED).tolist():
        own = Stream.derive("discrete_gaussian/k", spare, first + i)
        k[i] = _place(int(cells[i]), _K_BITS, _k_cuts, own)

    j = words // np.uint64(std)
    j *= np.uint64(std)
    np.subtract(words, j, out=j)
    offsets = j.view(np.int64)

    # 2**32 exp(-x (2k + x) / 2) - coin
    x = offsets / float(std)
    lead = k.astype(np.float64)
    lead += lead
    lead += x
    lead *= x
    lead *= -0.5
    np.exp(lead, out=lead)
    lead *= 2.0**32
    lead -= coins

    accepted = lead >= _SURELY
    perhaps = lead > _PERHAPS
    if np.count_nonzero(perhaps) != np.count_nonzero(accepted):
        for i in np.flatnonzero(perhaps & ~accepted).tolist():
            own = Stream.derive("discrete_gaussian/accept", spare, first + i)
            cuts = _accept_cuts(std, int(k[i]), int(offsets[i]))
            accepted[i] = _place(int(coins[i]) >> 1, _COIN_BITS, cuts, own) == 0
    accepted &= words <= np.uint64((1 << 64) // std * std - 1)

    kept = np.flatnonzero(accepted)
    samples: NDArray[np.int64] = k[kept].astype(np.int64)
    samples *= std
    samples += offsets[kept]
    negative = (coins[kept] & np.uint32(1)).astype(np.int64)
    twice = (samples | (negative ^ 1)) == 0
    # Two's complement: all bits flipped, and one added.
    samples ^= -negative
    samples += negative
    return samples[~twice] if twice.any() else samples


def _place(value: int, bits: int, cuts: Cuts, spare: Stream) -> int:
    """How many cuts are at or below a uniform U in [0, 1) that starts with ``bits`` bits ``value``.

    More bits of U are drawn until no cut is left within doubt of it.
    """
    while True:
        found = cuts(bits)
        if all(value < low or value > high for low, high in found):
            return sum(value > high for _, high in found)
        value = value << 64 | int.from_bytes(spare.read(8), "little")
        bits += 64


def _context(bits: int) -> Context:
    """Decimal arithmetic with some 20 digits more than a number of ``bits`` bits has."""
    return Context(prec=bits // 3 + 20)


def _cell(cut: Decimal, bits: int, context: Context) -> tuple[int, int]:
    """The first ``bits`` bits of a cut in (0, 1], as an interval that allows for its error.

    `Context.exp` rounds correctly and all quantities here are below 10: the error of a cut, and of
    the product below, is under 10**3 units of the last digit.
    """
    error, scale = Decimal(10) ** (5 - context.prec), Decimal(1 << bits)
    low, high = context.subtract(cut, error), context.add(cut, error)
    return int(context.multiply(low, scale)), int(context.multiply(high, scale))


@lru_cache(maxsize=4)
def _k_cuts(bits: int) -> tuple[tuple[int, int], ...]:
    """Where k goes up by one: the cumulative masses of 0, ..., 8 among 0, ..., 9."""
    context = _context(bits)
    sums = [Decimal(0)]
    for k in range(TAIL):
        sums.append(context.add(sums[-1], context.exp(Decimal(-k * k) / 2)))
    return tuple(_cell(context.divide(part, sums[-1]), bits, context) for part in sums[1:-1])


def _accept_cuts(std: int, k: int, j: int) -> Cuts:
    """The one cut exp(-x (2k + x) / 2), x = j / std: U below it accepts."""
    over, under = Decimal(-j * (2 * k * std + j)), Decimal(2 * std * std)

    def cuts(bits: int) -> tuple[tuple[int, int], ...]:
        context = _context(bits)
        return (_cell(context.exp(context.divide(over, under)), bits, context),)

    return cuts


def _k_table() -> NDArray[np.uint8]:
    """k for each 16-bit cell of U, and a mark where the cell does not decide it."""
    cells = _k_cuts(_K_BITS)
    highs = [high for _, high in cells]
    table = np.searchsorted(highs, np.arange(1 << _K_BITS), side="left").astype(np.uint8)
    for low, high in cells:
        table[low : high + 1] = _UNDECIDED
    return table


_K_TABLE = _k_table()
