"""How far poison must be scaled before the norm check refuses it, under each mode of privacy.

A client can scale its update, or, where noise has ciphertexts of its own, put an update in the
noise's place, whose bound is as much wider as the noise is. For both, the smallest scaling that is
refused 999 times of 1000, by the law of `pass_law`; then tried.

Run as ``python -m secagg_bench.private_checks --output results.json``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from secagg import ring
from secagg.context import RoundContext
from secagg.encryptor import upload_integers
from secagg.keyholder import KeyHolder
from secagg.norm_check import passes
from secagg.packing import pack
from secagg.parameters import RING_DEGREE, FloatSegment, NormCheck, Plan, Privacy, TensorSpec
from secagg.planner import make_plan
from secagg.quantize import quantize
from secagg.sampling import Stream
from secagg.sketch_shape import norm_shapes
from secagg.sketches import Sketch, sketch
from secagg_bench.pass_law import confidence, dense_passes

__all__ = ["main"]

PARAMETERS = 28_594  # of the demo's item table
CLIENTS = (30, 100)
_PASSING = 1e-3
_NO_KEY = np.zeros(RING_DEGREE, dtype=np.int64)  # what is judged does not depend on the key

Integers = NDArray[np.int64]


def plan_of(mode: str, multiplier: float) -> Plan:
    """The demo's model for 30 to 100 clients, as private as that."""
    segment = FloatSegment("update", (TensorSpec("w", (PARAMETERS,)),), 1.0)
    privacy = Privacy(mode, multiplier, epsilon=8.0, delta=1e-5) if mode != "none" else None
    return make_plan(
        [segment],
        min_clients=CLIENTS[0],
        max_clients=CLIENTS[1],
        norm_check=NormCheck(0.3),
        privacy=privacy,
    )


def _sketched(context: RoundContext, parts: list[Integers], drawn: np.random.Generator) -> Sketch:
    layouts = context.plan.upload_layouts
    packed = [pack(layout, part) for layout, part in zip(layouts, parts, strict=True)]
    residues = ring.to_ntt(np.concatenate(packed))
    return sketch(context, drawn.bytes(32), [residues], drawn.bytes(32))


def _parts(context: RoundContext, drawn: np.random.Generator) -> tuple[list[Integers], Integers]:
    """An honest upload at the clip bound, in a random direction, and its update by itself."""
    vector = drawn.standard_normal(PARAMETERS)
    (part,) = quantize(
        context.plan,
        {"update": {"w": vector / np.linalg.norm(vector)}},
        samples=1,
        rotation=context.rotation,
        randomness=Stream(drawn.bytes(32)),
    )
    return upload_integers(context.plan, [part]), part.values


def measure(
    mode: str, multiplier: float, place: str, trials: int, seed: int, progress: Progress
) -> dict[str, Any]:
    """The smallest scaling that the law refuses 999 times of 1000, and how often it was refused."""
    plan = plan_of(mode, multiplier)
    context, drawn = KeyHolder(plan).context, np.random.default_rng(seed)
    index = 0 if place == "update" else 1
    layout, margin = plan.upload_layouts[index], (plan.norm_check or NormCheck()).margin
    unit = float(np.linalg.norm(_parts(context, drawn)[1]))
    (degrees,) = (
        shape.rows * shape.values * layout.digits
        for shape in norm_shapes(plan)
        if shape.segment == index
    )
    scaling = math.ceil(100 * _refused_norm(margin, degrees) * layout.norm / unit) / 100
    task, refused = progress.add_task(f"{mode}, in the {place}", total=trials), 0
    for _ in range(trials):
        parts, update = _parts(context, drawn)
        parts[index] = np.rint(scaling * update).astype(np.int64)
        refused += not passes(plan, _NO_KEY, _sketched(context, parts, drawn))
        progress.advance(task)
    return {
        "mode": mode,
        "noise_multiplier": multiplier,
        "place": place,
        "scaling": scaling,
        "refused": refused,
        "trials": trials,
        "interval": confidence(refused, trials),
        "noise_std_of_a_client": plan.layouts[0].noise,
        "update_norm": unit,
        "bound": layout.norm,
    }


def _refused_norm(margin: float, degrees: int) -> float:
    """The norm of dense updates, as a multiple of the bound, of which one in 1000 passes."""
    norms = np.arange(1.0, 4.0, 0.001)
    passing = [dense_passes(float(norm), margin, degrees) for norm in norms]
    return float(norms[np.argmax(np.array(passing) <= _PASSING)])


def main() -> None:
    """Measure all modes and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    cases = [("release", "update")]
    cases += [("distributed", "update"), ("distributed", "noise"), ("local", "update")]
    with Progress() as progress:
        rows = [
            measure(mode, 1.0, place, arguments.trials, arguments.seed, progress)
            for mode, place in cases
        ]
    result = {"parameters": PARAMETERS, "clients": CLIENTS, "rows": rows}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(
            f"{row['mode']:12} z={row['noise_multiplier']:g} {row['place']:7} "
            f"{row['scaling']:7.2f}: refused {row['refused']} of {row['trials']}"
        )


if __name__ == "__main__":
    main()
