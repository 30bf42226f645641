"""Plans on small, large and several grids."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from secagg.parameters import FloatSegment, IntegerSegment, Plan, Segment, TensorSpec
from secagg.planner import make_plan, plan_integers

__all__ = ["PLANS", "mixed", "shifts"]


def mixed(shifts: tuple[int, ...] = ()) -> Plan:
    """Three segments; with shifts, on grids of their own, which no planner makes today."""
    segments: list[Segment] = [
        FloatSegment("update", (TensorSpec("w", (9000,)),), 1.0, 8),
        IntegerSegment("counts", 10, 1 << 20),
        IntegerSegment("wide", 5000, 10**9),
    ]
    plan = make_plan(segments, max_clients=6)
    layouts = zip(plan.layouts, shifts or [lay.shift for lay in plan.layouts], strict=True)
    return replace(plan, layouts=tuple(replace(lay, shift=shift) for lay, shift in layouts))


PLANS = {
    "smallest grid": plan_integers(100, max_clients=3, max_abs=1),
    "a hundred clients": plan_integers(20_000, max_clients=100, max_abs=127),
    "a million clients": plan_integers(4096, max_clients=1_000_000, max_abs=100),
    "segments": mixed(),
    "a grid a segment": mixed((7, 16, 24)),
}


def shifts(plan: Plan) -> NDArray[np.int64]:
    """The shift of each coefficient's grid, int64 (blocks, 1)."""
    counts = [layout.blocks for layout in plan.layouts]
    return np.repeat([layout.shift for layout in plan.layouts], counts)[:, None]
