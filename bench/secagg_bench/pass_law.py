"""The law by which updates pass the norm check, computed and not drawn.

Of an update whose energy sits at one root of X**4096 + 1, a row shows Q E times the squared norm:
E exponential, from the multiplier's value at the root, and Q what the row's mixes make of the
blocks, with a mean of 1. A dense update's estimate is chi-square instead. Both are approximations
(p(root) is a sum of 4096 coins; shown places sample a wave), which `soundness` checks by trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Transform",
    "blocks_in_phase",
    "confidence",
    "dense_passes",
    "drawn_mixes",
    "many_blocks",
    "one_block",
    "pass_probability",
    "refused",
]

Complexes = NDArray[np.complex128]
Transform = Callable[[Complexes], Complexes]
"""t -> E[exp(-t Q E)] = E[1 / (1 + t Q)] of one row."""

_POINTS = 1501
_CHUNK = 500


def refused(margin: float, degrees: int) -> float:
    """Probability that a dense honest update exactly at its bound is refused; even degrees."""
    # Chi-square beyond x is a Poisson variable of mean x / 2 below half the degrees.
    return _poisson(range(degrees // 2), degrees / 2 * (1 + margin) ** 2)


def dense_passes(norm: float, margin: float, degrees: int) -> float:
    """Probability that a dense update passes; its norm as a multiple of the bound."""
    half = degrees // 2
    return _poisson(range(half, 12 * half), half * ((1 + margin) / norm) ** 2)


def _poisson(counts: range, mean: float) -> float:
    terms = (count * math.log(mean) - mean - math.lgamma(count + 1) for count in counts)
    return math.fsum(map(math.exp, terms))


def confidence(passed: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval for a probability."""
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    counts = np.arange(trials + 1)
    ways = factorials[-1] - factorials - factorials[::-1]

    def at_most(count: int, chance: float) -> float:
        logs = ways + counts * math.log(chance) + (trials - counts) * math.log1p(-chance)
        return float(np.exp(logs[: count + 1]).sum())

    def solved(count: int, wanted: float) -> float:
        low, high = 1e-12, 1 - 1e-12
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(count, middle) > wanted else (low, middle)
        return low

    tail = (1 - level) / 2
    return (
        solved(passed - 1, 1 - tail) if passed else 0.0,
        solved(passed, tail) if passed < trials else 1.0,
    )


def one_block(t: Complexes) -> Complexes:
    """A single block: two places of four, always, so Q = 1."""
    return 1 / (1 + t)


def many_blocks(t: Complexes) -> Complexes:
    """Equal amplitudes in phase in many blocks: Q is chi-square of 4 degrees, over 4."""
    # Smooth in log q, where equal steps are as good as exact.
    step = 0.05
    q = np.exp(np.arange(-20, 4, step))
    return _averaged(t, q, 4 * q**2 * np.exp(-2 * q) * step)


def _averaged(t: Complexes, values: NDArray[np.float64], shares: NDArray[np.float64]) -> Complexes:
    """E[1 / (1 + t Q)] for these values of Q."""
    parts = np.array_split(t, max(1, t.size // _CHUNK))
    return np.concatenate([(shares / (1 + part[:, None] * values)).sum(axis=1) for part in parts])


def blocks_in_phase(
    amplitudes: NDArray[np.complexfloating], seed: int, draws: int = 40_000
) -> Transform:
    """The transform for amplitudes of any size and phase, one a block, by drawing mixes.

    Args:
        amplitudes: complex (blocks,): the update's values at the root.
    """
    drawn = np.random.default_rng(seed)
    scale = amplitudes / float(np.linalg.norm(amplitudes))
    mixed = np.zeros((draws, 2), dtype=np.complex128)
    for amplitude in scale.tolist():
        mixed += amplitude * drawn_mixes(drawn, draws)
    energies = (np.abs(mixed) ** 2).sum(axis=1) / 2
    values, counts = np.unique(np.round(energies, 9), return_counts=True)
    if values.size > 500:  # a continuum: quantiles will do
        values = np.quantile(energies, (np.arange(500) + 0.5) / 500)
        counts = np.ones(500, dtype=np.int64)
    shares = counts / counts.sum()

    return lambda t: _averaged(t, values, shares)


def drawn_mixes(drawn: np.random.Generator, count: int) -> Complexes:
    """u + i v of both blinds, complex (count, 2), by the law of `sketches`."""
    signs = drawn.choice([-1.0, 1.0], (count, 4))
    kind = drawn.integers(0, 4, count)
    units = np.where(drawn.integers(0, 2, (count, 2)) == 1, 1j, 1.0)
    out: Complexes = units * signs[:, :2]
    for blind in (0, 1):
        both = kind == 2 + blind
        out[both] = 0
        out[both, blind] = signs[both, 2] + 1j * signs[both, 3]
    return out


def pass_probability(transform: Transform, norm: float, margin: float, sketches: int) -> float:
    """P(mean over the rows of Q E <= ((1 + margin) / norm)**2).

    Inverts the Laplace transform along a line through its saddle point, which keeps the relative
    precision of probabilities however small.
    """
    limit = sketches * ((1 + margin) / norm) ** 2
    saddle = _saddle(transform, limit, sketches)
    spread = saddle * 400 / math.sqrt(sketches)
    # Points close together where the integrand lives, and far apart in its tail.
    steps = np.sinh(np.linspace(0, math.asinh(1e4), _POINTS)) / 1e4 * spread
    t = np.asarray(saddle + 1j * steps, dtype=np.complex128)
    values = np.exp(sketches * np.log(transform(t)) + t * limit) / t
    return float(np.trapezoid(values.real, steps) / math.pi)


def _saddle(transform: Transform, limit: float, sketches: int) -> float:
    grid = np.geomspace(1e-3, 1e7, 400)
    exponent = sketches * np.log(transform(grid.astype(np.complex128)).real) + grid * limit
    return float(grid[np.argmin(exponent - np.log(grid))])
