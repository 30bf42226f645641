"""Rounding that can be repeated, for demos and tests on one machine only.

A run whose rounding follows from a seed can be computed again in the clear and compared bit for
bit. Real clients round with the operating system's randomness; sessions refuse this one off
loopback. Must never import the cipher, so that the run in the clear can use it too.
"""

from __future__ import annotations

from secagg.sampling import Stream

__all__ = ["repeatable_rounding"]


def repeatable_rounding(seed: int, silo: int, round_number: int) -> Stream:
    """The stream that silo ``silo`` rounds with in a round."""
    return Stream.derive("repeatable rounding", seed, silo, round_number)
