"""From an opened sum to what may leave the key holder: noise first, then whole rows withheld.

Both are the key holder's, because nobody else can be shown the sum without them. Whatever follows,
averages, models, other thresholds, is done with what is released, and costs no privacy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from secagg.discrete_gaussian import discrete_gaussian
from secagg.parameters import FloatSegment, IntegerSegment, Plan, RowThreshold
from secagg.quantize import dequantize_integers, row_places
from secagg.sampling import Stream

__all__ = ["published"]

_Sums = tuple[NDArray[np.int64], ...]


def published(plan: Plan, rotation: bytes, sums: _Sums, randomness: Stream) -> _Sums:
    """What is released of a sum.

    Args:
        plan: what was summed.
        rotation: the round's public string.
        sums: int64 of shape (segment.values,) for each segment: exact, with the clients' noise.
        randomness: secret, of the key holder's noise.

    Returns:
        The same shapes: with the key holder's noise, if it is the key holder that adds it, and
        without what the plan's threshold withholds.
    """
    if plan.privacy is not None and not plan.privacy.by_clients:
        sums = tuple(
            part + discrete_gaussian(randomness, std, part.size)
            for part, std in zip(sums, plan.noise_stds, strict=True)
        )
    return sums if plan.threshold is None else _thinned(plan, rotation, sums, plan.threshold)


def _thinned(plan: Plan, rotation: bytes, sums: _Sums, threshold: RowThreshold) -> _Sums:
    """Without rows that too few have contributed to, and without the counts that tell which."""
    released = {s.name: part for s, part in zip(plan.segments, sums, strict=True)}
    for segment in plan.segments:
        if isinstance(segment, IntegerSegment) and segment.name == threshold.counts:
            counts = dequantize_integers(segment, released[segment.name], rotation=rotation)
            released[segment.name] = np.zeros_like(counts)
    for segment in plan.segments:
        if isinstance(segment, FloatSegment) and segment.rows:
            kept = released[segment.name].copy()
            kept[row_places(segment)[counts < threshold.least]] = 0
            released[segment.name] = kept
    return tuple(released.values())
