"""Draws runs, for Hypothesis to try and to shrink: fewer happenings first, then simpler ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from secagg.failpoints import NAMES
from simulation.faults import (
    EVENTS,
    KEY_HOLDER_METHODS,
    LIES,
    MESSAGES,
    METHODS,
    At,
    Die,
    Fault,
    Lie,
    Run,
)

__all__ = ["runs"]

MOST_CLIENTS = 6
MOST_ROUNDS = 3

_SECONDS = st.one_of(st.integers(0, 40), st.integers(0, 500)).map(lambda tenths: tenths / 10)
_NUMBERS = st.one_of(st.sampled_from([1, 3, 10, 45, 100]), st.integers(0, 1 << 16))
_WAITS = st.sampled_from([1, 3, 10, 45, 100])


def _nth(method: str) -> st.SearchStrategy[int]:
    """How often a method is called in a run, or a little more."""
    return st.integers(1, 5 if method in KEY_HOLDER_METHODS and method != "SubmitSketch" else 15)


_FAULTS = st.sampled_from(METHODS).flatmap(
    lambda method: st.builds(
        Fault, st.just(method), _nth(method), st.sampled_from(MESSAGES), _NUMBERS
    )
)
_DEATHS = st.builds(Die, st.sampled_from(sorted(NAMES)), st.integers(1, 6), _WAITS)
_EVENTS = st.builds(At, _SECONDS, st.sampled_from(EVENTS), st.integers(0, MOST_CLIENTS - 1), _WAITS)
_LIES = st.builds(
    Lie, st.integers(0, MOST_CLIENTS - 1), st.integers(1, MOST_ROUNDS), st.sampled_from(LIES)
)


def _some(each: st.SearchStrategy[Any], most: int) -> st.SearchStrategy[list[Any]]:
    """As often many as few; lists of Hypothesis's own are mostly short."""
    return st.integers(0, most).flatmap(lambda n: st.lists(each, min_size=n, max_size=n))


_HAPPENINGS = st.tuples(
    _some(_FAULTS, 16), _some(_DEATHS, 4), _some(_EVENTS, 6), _some(_LIES, 3)
).map(lambda parts: tuple(each for part in parts for each in part))

_PLANS = ("counts", "unchecked", "checked", "checked")


def runs(plans: Sequence[str] = _PLANS) -> st.SearchStrategy[Run]:
    """Any run, of these plans; the first ones are simpler."""
    return st.builds(
        Run,
        seed=st.integers(0, 1 << 16),
        clients=st.integers(4, MOST_CLIENTS),
        rounds=st.integers(1, MOST_ROUNDS),
        target=st.integers(3, MOST_CLIENTS),
        plan=st.sampled_from(plans),
        happenings=_HAPPENINGS,
    )
