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
from scipy.special import gammainc, gammaincc

__all__ = [
    "Transform",
    "blocks_in_phase",
    "dense_passes",
    "many_blocks",
    "one_block",
    "pass_probability",
    "refused",
]

Complexes = NDArray[np.complex128]
Transform = Callable[[Complexes], Complexes]
"""t -> E[exp(-t Q E)] = E[1 / (1 + t Q)] of one row."""

_POINTS = 6001
_CHUNK = 500


def refused(margin: float, degrees: int) -> float:
    """Probability that a dense honest update exactly at its bound is refused."""
    return float(gammaincc(degrees / 2, degrees / 2 * (1 + margin) ** 2))


def dense_passes(norm: float, margin: float, degrees: int) -> float:
    """Probability that a dense update passes; its norm as a multiple of the bound."""
    return float(gammainc(degrees / 2, degrees / 2 * ((1 + margin) / norm) ** 2))


def one_block(t: Complexes) -> Complexes:
    """A single block: two places of four, always, so Q = 1."""
    return 1 / (1 + t)


def many_blocks(t: Complexes) -> Complexes:
    """Equal amplitudes in phase in many blocks: Q is chi-square of 4 degrees, over 4."""
    q = (np.arange(40_000) + 0.5) * (25 / 40_000)
    density = 4 * q * np.exp(-2 * q) * (25 / 40_000)
    parts = [
        (density / (1 + part[:, None] * q)).sum(axis=1)
        for part in np.array_split(t, max(1, t.size // _CHUNK))
    ]
    return np.concatenate(parts)


def blocks_in_phase(amplitudes: Complexes, seed: int, draws: int = 40_000) -> Transform:
    """The transform for amplitudes of any size and phase, one a block, by drawing mixes.

    Args:
        amplitudes: complex (blocks,): the update's values at the root.
    """
    drawn = np.random.default_rng(seed)
    scale = amplitudes / np.linalg.norm(amplitudes)
    energies = np.zeros(draws)
    mixed = np.zeros((draws, 2), dtype=np.complex128)
    for amplitude in scale:
        mixed += amplitude * drawn_mixes(drawn, draws)
    energies = (np.abs(mixed) ** 2).sum(axis=1) / 2
    values, counts = np.unique(np.round(energies, 9), return_counts=True)
    if values.size > 2000:  # a continuum: quantiles will do
        values = np.quantile(energies, (np.arange(2000) + 0.5) / 2000)
        counts = np.ones(2000, dtype=np.int64)
    shares = counts / counts.sum()

    def transform(t: Complexes) -> Complexes:
        parts = [
            (shares / (1 + part[:, None] * values)).sum(axis=1)
            for part in np.array_split(t, max(1, t.size // _CHUNK))
        ]
        return np.concatenate(parts)

    return transform


def drawn_mixes(drawn: np.random.Generator, count: int) -> Complexes:
    """u + i v of both blinds, complex (count, 2), by the law of `sketches`."""
    signs = drawn.choice([-1.0, 1.0], (count, 4))
    kind = drawn.integers(0, 4, count)
    units = np.where(drawn.integers(0, 2, (count, 2)) == 1, 1j, 1.0)
    out = units * signs[:, :2]
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
    t = saddle + 1j * steps
    values = np.exp(sketches * np.log(transform(t)) + t * limit) / t
    return float(np.trapezoid(values.real, steps) / math.pi)


def _saddle(transform: Transform, limit: float, sketches: int) -> float:
    grid = np.geomspace(1e-3, 1e7, 400)
    exponent = sketches * np.log(transform(grid.astype(np.complex128)).real) + grid * limit
    return float(grid[np.argmin(exponent - np.log(grid))])
