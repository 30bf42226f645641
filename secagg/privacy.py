"""What a release costs in privacy, and the noise that takes: numbers all parties derive alike.

Client-level differential privacy under zero-out adjacency: neighbouring runs differ in one client's
contribution being replaced by zeros (Kairouz et al. 2021, "Practical and Private (Deep) Learning
without Sampling or Shuffling"). How many clients contribute is public. Losses are in rho-zCDP (Bun
and Steinke 2016): they add up over segments and releases, and `accounting` turns the total into
epsilon and delta. Nothing here is random or secret. See docs/privacy.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from secagg.parameters import FloatSegment, Plan, Privacy, Segment
from secagg.sketch_shape import honest_norm

__all__ = [
    "multipliers",
    "noise_norm",
    "noisy_norm",
    "release_rho",
    "sensitivity",
    "share_std",
]

SMALLEST_SHARE = 2
"""Standard deviation of a client's share, at the least: then a sum of shares is a discrete Gaussian
but for 10**-16 (Kairouz, Liu and Steinke 2021, theorem 1)."""

# A noise's norm stays within its bound but with probability exp(-28) < 2**-40.
_NORM_EXPONENT = 28.0


def sensitivity(segment: Segment) -> float:
    """L2 norm of one client's integers, which no honest client's exceed."""
    if isinstance(segment, FloatSegment) or segment.norm_bound:
        return float(honest_norm(segment))
    return segment.max_abs * math.sqrt(segment.size)


def multipliers(privacy: Privacy, segments: Sequence[Segment]) -> list[float]:
    """Noise multiplier of each segment, such that all together cost 1/(2 z**2).

    A segment with a part p of the cost has z / sqrt(p). Segments of integers have `integer_share`
    of it together, or all of it where there is none of floats.
    """
    floats = [isinstance(segment, FloatSegment) for segment in segments]
    integers = len(floats) - sum(floats)
    share = 1.0 if not any(floats) else privacy.integer_share if integers else 0.0
    parts = [(1 - share) / sum(floats) if each else share / integers for each in floats]
    return [privacy.noise_multiplier / math.sqrt(part) for part in parts]


def share_std(privacy: Privacy, segment: Segment, multiplier: float) -> int:
    """Standard deviation of what is drawn at a time, in quantisation steps, rounded up.

    That is all of the noise for whoever adds it alone, or a client's share of it.
    """
    full = multiplier * sensitivity(segment)
    if not privacy.by_clients:
        return math.ceil(full)
    return max(SMALLEST_SHARE, math.ceil(full / math.sqrt(privacy.honest_clients)))


def noise_norm(std: int, count: int) -> int:
    """L2 norm that a client's noise does not exceed, but with probability below 2**-40.

    Of a Gaussian: Laurent and Massart 2000, lemma 1. A discrete one has no more energy.
    """
    x = _NORM_EXPONENT
    return math.ceil(std * math.sqrt(count + 2 * math.sqrt(count * x) + 2 * x))


def noisy_norm(norm: int, std: int, noise: int) -> int:
    """L2 norm that an honest client's integers and their noise do not exceed together.

    Their inner product is sub-Gaussian with a standard deviation of ``norm * std``.

    Args:
        norm: of the integers, at the most.
        noise: of the noise, at the most; see `noise_norm`.
    """
    if not std:
        return norm
    across = math.sqrt(2 * _NORM_EXPONENT) * norm * std
    return math.ceil(math.sqrt(norm**2 + noise**2 + 2 * across))


def release_rho(plan: Plan) -> float:
    """zCDP of one release of a plan; infinity without privacy.

    The discrete Gaussian is as private as the continuous one: (T / sigma)**2 / 2 for sensitivity T
    (Canonne, Kamath and Steinke 2020, theorem 14, coordinate by coordinate). A sum of n of them is
    as private but for tau (Kairouz, Liu and Steinke 2021, theorem 1). Exact in the standard
    deviations that were rounded up, so never above 1/(2 z**2) by more than tau.
    """
    privacy = plan.privacy
    if privacy is None:
        return math.inf
    return sum(
        _loss(privacy, sensitivity(segment), std, segment.values)
        for segment, std in zip(plan.segments, plan.noise_stds, strict=True)
    )


def _loss(privacy: Privacy, bound: float, std: int, values: int) -> float:
    clients = privacy.honest_clients if privacy.by_clients else 1
    tau = 10 * sum(
        math.exp(-2 * (math.pi * std) ** 2 * k / (k + 1)) for k in range(1, min(clients, 10_000))
    )
    return (bound / (std * math.sqrt(clients)) + tau * math.sqrt(values)) ** 2 / 2
