"""What a round of very many clients would need, from what one client was measured to cost.

Arithmetic alone: nothing here runs. Every figure that follows is a measured one times a number of
clients, and the bytes of an upload are the planner's for that number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from secagg.parameters import MAX_COHORT, MIN_COHORT, NormCheck, Plan
from secagg.planner import plan_tensors
from secagg.sketch_shape import sketch_bytes

__all__ = ["MODEL_VALUE_BYTES", "Costs", "Demand", "demand", "line", "planned", "room"]

MODEL_VALUE_BYTES = 4
"""Of one parameter of the model that every client downloads: float32."""


@dataclass(frozen=True)
class Costs:
    """What was measured; seconds are of one core, and NaN where nothing was measured.

    Attributes:
        upload_bytes: of one client's ciphertext in these measurements.
        take_s: the server, for one upload of so many bytes.
        sketch_s: what the server does for its norm check beside.
        admit_s: the key holder, for one client.
        judge_s: what the key holder does for its norm check beside.
        open_s: the key holder, once a sum.
    """

    upload_bytes: float
    take_s: float
    sketch_s: float
    admit_s: float
    judge_s: float
    open_s: float


@dataclass(frozen=True)
class Demand:
    """What a round needs.

    Attributes:
        upload_bytes: of one client.
        sums: of at most as many clients as were planned for.
        up_bytes: from all clients to the server; what lies there until the verdicts, too.
        down_bytes: from the server to all clients: the model.
        sketch_bytes: from the server to the key holder; 0 without norm check.
        up_bits_s: of the server's line, if uploads are spread evenly over the round.
        down_bits_s: the same of downloads.
        server_s: of the server's cores.
        key_holder_s: of the key holder's cores.
        server_cores: that are busy through the whole round.
        key_holder_cores: the same of the key holder.
    """

    upload_bytes: int
    sums: int
    up_bytes: int
    down_bytes: int
    sketch_bytes: int
    up_bits_s: float
    down_bits_s: float
    server_s: float
    key_holder_s: float
    server_cores: float
    key_holder_cores: float

    def machines(self, cores: int) -> int:
        """Server machines of so many cores, all of them busy; 0 where that is not known."""
        return 0 if math.isnan(self.server_cores) else math.ceil(self.server_cores / cores)


def planned(parameters: int, clients: int, *, bits: int = 8, checked: bool = True) -> Plan:
    """The plan of one vector for so many clients.

    Args:
        checked: whether with the norm check.

    Raises:
        PlanError: there is none.
    """
    check = NormCheck() if checked else None
    return plan_tensors(parameters, max_clients=clients, clip=1.0, bits=bits, norm_check=check)


def demand(
    costs: Costs,
    parameters: int,
    clients: int,
    round_s: float,
    *,
    cohort: int | None = None,
    bits: int = 8,
    checked: bool = True,
) -> Demand:
    """What one round of so many clients needs.

    The server's work and opening go by the bytes of an upload; admissions, sketches and verdicts by
    the number of clients.

    Args:
        parameters: of the model.
        round_s: how long the round may take, in seconds.
        cohort: clients of one sum at most; all of them when omitted.
        checked: whether with the norm check.

    Raises:
        PlanError: no sum holds so many clients.
    """
    plan = planned(parameters, cohort or clients, bits=bits, checked=checked)
    sums = math.ceil(clients / (cohort or clients))
    larger = plan.payload_bytes / costs.upload_bytes
    server_s = clients * (costs.take_s * larger + (costs.sketch_s if checked else 0.0))
    each_s = costs.admit_s + (costs.judge_s if checked else 0.0)
    key_holder_s = clients * each_s + sums * costs.open_s * larger
    up, down = clients * plan.payload_bytes, clients * parameters * MODEL_VALUE_BYTES
    return Demand(
        upload_bytes=plan.payload_bytes,
        sums=sums,
        up_bytes=up,
        down_bytes=down,
        sketch_bytes=clients * sketch_bytes(plan, direction=False) if checked else 0,
        up_bits_s=8 * up / round_s,
        down_bits_s=8 * down / round_s,
        server_s=server_s,
        key_holder_s=key_holder_s,
        server_cores=server_s / round_s,
        key_holder_cores=key_holder_s / round_s,
    )


def room(parameters: int, *, bits: int = 8, checked: bool = True) -> Iterator[tuple[int, int]]:
    """Every length of an upload, in bytes, with the most clients whose sum it holds; ascending."""
    least = MIN_COHORT
    while least <= MAX_COHORT:
        size = planned(parameters, least, bits=bits, checked=checked).payload_bytes
        fits, over = least, MAX_COHORT + 1
        while over - fits > 1:
            middle = (fits + over) // 2
            same = planned(parameters, middle, bits=bits, checked=checked).payload_bytes == size
            fits, over = (middle, over) if same else (fits, middle)
        yield size, fits
        least = fits + 1


def line(points: Mapping[int, float]) -> tuple[float, float]:
    """Seconds a client and seconds once, of the straight line through seconds by clients.

    NaN both with fewer than two cohorts. Each is weighted by its share, since a large cohort's
    figure varies by more: what counts is the relative error.
    """
    if len(points) < 2:
        return math.nan, math.nan
    clients, seconds = np.array(list(points)), np.array(list(points.values()))
    slope, once = np.polyfit(clients, seconds, 1, w=1 / seconds)
    return float(slope), float(once)
