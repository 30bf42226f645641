"""The weight that an update carries bounds how long the update may be, and is read encrypted."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from secagg import norm_check, quantize, ring
from secagg.context import NO_MODEL, RoundContext
from secagg.packing import pack
from secagg.parameters import FloatSegment, NormCheck, Plan
from secagg.planner import plan_tensors
from secagg.sealing import RoundKeyPair
from secagg.sketch_shape import weight_shapes
from secagg.sketches import Sketch, sketch

NO_KEY = np.zeros(4096, dtype=np.int64)  # what a sketch shows does not depend on the key
ROUND_KEY = RoundKeyPair().public
CAP = 10_000


def weighted(parameters: int, clients: int = 8, bits: int = 8) -> Plan:
    return plan_tensors(
        parameters,
        max_clients=clients,
        clip=1.0,
        bits=bits,
        weighting="samples",
        weight_cap=CAP,
        norm_check=NormCheck(),
    )


PLANS = [weighted(1500), weighted(12_000), weighted(12_000, clients=1000), weighted(9000, bits=3)]


def forged(
    plan: Plan, rotation: bytes, update: float, weight: float, random: np.random.Generator
) -> NDArray[np.int64]:
    """Integers of an update of this norm, in clip norms, beside this weight, both of any sign."""
    (segment,) = plan.segments
    assert isinstance(segment, FloatSegment)
    vector = random.standard_normal(segment.parameters)
    vector *= update * segment.clip / np.linalg.norm(vector)
    steps = quantize._spread(segment, vector.astype(np.float32), 1 / segment.step)
    quantize._accompany(segment, steps, weight)
    quantize._mix(steps, rotation, segment)
    return np.floor(steps + random.random(steps.size)).astype(np.int64)


def sketched(plan: Plan, update: float, weight: float, number: int) -> Sketch:
    random = np.random.default_rng(number)
    context = RoundContext.create(
        plan, ROUND_KEY, task_id="t", round_number=1, attempt=1, model_digest=NO_MODEL
    )
    values = forged(plan, context.rotation, update, weight, random)
    residues = ring.to_ntt(pack(plan.layouts[0], values))
    return sketch(context, random.bytes(32), [residues], random.bytes(32))


def accepted(plan: Plan, update: float, weight: float, trials: int = 5) -> int:
    return sum(
        norm_check.passes(plan, NO_KEY, sketched(plan, update, weight, number))
        for number in range(trials)
    )


@pytest.mark.parametrize("plan", PLANS, ids=["one block", "blocks", "1000 clients", "3 bits"])
@pytest.mark.parametrize("weight", [1.0, 0.3, 0.03, 1 / CAP])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_honest_weights_pass_with_all_of_the_update_that_they_allow(
    plan: Plan, weight: float, share: float
) -> None:
    assert accepted(plan, share * weight, weight) == 5


@pytest.mark.parametrize("plan", PLANS[:3], ids=["one block", "blocks", "1000 clients"])
@pytest.mark.parametrize(
    ("update", "weight"),
    [
        (0.0, -1.0),
        (1.0, -1.0),
        (0.3, -0.3),
        (1.0, 0.0),
        (0.2, 0.0),
        (1.0, 0.4),
        (0.4, 0.1),
        (0.1, 0.02),
        (0.0, 2.5),
        (5.0, 1.0),
    ],
)
def test_weights_that_do_not_cover_the_update_are_refused(
    plan: Plan, update: float, weight: float
) -> None:
    """Each of the first nine is within the bound that update and weight have together."""
    assert accepted(plan, update, weight) == 0


@pytest.mark.parametrize("plan", PLANS, ids=["one block", "blocks", "1000 clients", "3 bits"])
@pytest.mark.parametrize("weight", [1.0, 0.2, -0.5])
def test_the_weight_is_estimated_without_bias_and_as_well_as_stated(
    plan: Plan, weight: float
) -> None:
    (shape,), (layout,), (segment,) = weight_shapes(plan), plan.layouts, plan.segments
    assert isinstance(segment, FloatSegment)
    found = []
    for number in range(24):
        made = sketched(plan, weight, weight, number)
        energy = norm_check._energy(layout, made.norms[0], NO_KEY)
        measured = norm_check._component(layout, shape, made.weights[0], NO_KEY, energy)
        found.append(np.array(measured) * segment.step / segment.clip)
    values, spreads = np.array(found).T
    assert values.mean() == pytest.approx(weight, abs=5 * spreads.mean() / np.sqrt(24))
    assert 0.45 * spreads.mean() < values.std() < 1.7 * spreads.mean()


def test_equal_weights_have_no_rows_that_would_show_them() -> None:
    plan = plan_tensors(12_000, max_clients=8, clip=1.0, norm_check=NormCheck())
    assert weight_shapes(plan) == []
    context = RoundContext.create(
        plan, ROUND_KEY, task_id="t", round_number=1, attempt=1, model_digest=NO_MODEL
    )
    zeros = np.zeros((plan.blocks, 4096), dtype=np.uint64)
    assert sketch(context, bytes(32), [zeros], bytes(32)).weights == ()


def test_a_sketch_without_the_weight_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PLANS[0]
    made = sketched(plan, 0.5, 0.5, 1)
    without = Sketch(made.upload_digest, made.norms)
    with pytest.raises(ValueError, match="shorter"):
        norm_check.passes(plan, NO_KEY, without)
