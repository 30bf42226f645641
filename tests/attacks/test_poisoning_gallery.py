"""Every malformed upload of the gallery, and the layer that stops it.

Broken: sums without a norm check, where one client adds as much as the whole range leaves and stops
a round whenever it likes. Ours runs each upload against the core library as server and key holder
do: nothing that passes may bend the sum by more than a bound, and what cannot be stopped is listed
here as well, with the layer where the attempt is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from secagg.aggregator import Aggregator
from secagg.challenger import Challenger
from secagg.errors import ReleaseError
from secagg.keyholder import KeyHolder
from secagg.packing import pack
from secagg.parameters import FloatSegment, NormCheck
from secagg.planner import plan_tensors
from secagg.quantize import quantize_update
from secagg.receipts import SigningKey
from secagg.release import Release
from secagg.sampling import Stream
from secagg_bench.gallery.malformed import CASES, LAYERS, Case, Scene, gallery_plan, outcome
from secagg_bench.gallery.uploads import upload

SEED = 20

# --- broken ---------------------------------------------------------------------------------------


def unchecked(amount: int, coordinates: int, honest: int = 3) -> Release:
    """A sum without a norm check over honest clients that send nothing and one that sends this.

    Raises:
        ReleaseError: the sum does not open.
    """
    plan = plan_tensors(28_594, max_clients=8, clip=40.0)
    holder, layout = KeyHolder(plan), plan.layouts[0]
    sent = np.zeros((honest + 1, layout.values), dtype=np.int64)
    sent[-1, :coordinates] = amount
    aggregator = Aggregator(holder.context)
    for values in sent:
        aggregator.add(upload(holder.context, pack(layout, values), SigningKey.generate()))
    return holder.release(aggregator.aggregate())


def test_without_a_check_one_client_takes_the_range_of_all() -> None:
    most = 4 * 127
    released = unchecked(most, 28_672)
    assert (released.sums[0] == most).all()
    # Four honest clients have a norm of 4 bounds together, this one alone has more.
    (layout,) = gallery_plan().layouts
    assert np.linalg.norm(released.sums[0].astype(float)) > 4 * layout.norm


def test_without_a_check_one_coordinate_beyond_it_stops_the_round() -> None:
    with pytest.raises(ReleaseError, match="planned range"):
        unchecked(4 * 127 + 1, 1)


# --- ours -----------------------------------------------------------------------------------------


def by_name(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_ours_stops_it_where_it_should(case: Case) -> None:
    scene = Scene(gallery_plan(case.tolerated), SEED)
    ended = outcome(scene, case.build(scene))
    assert ended.layers[-1] == case.layer
    assert ended.released is (case.layer != "range")
    # Whoever passes adds no more than its bound to any coordinate.
    assert ended.excess <= len(ended.layers)


def test_the_gallery_has_no_two_of_a_name_and_uses_every_layer() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.layer for case in CASES} == set(LAYERS)


def test_a_scene_without_attackers_opens_its_own_sum() -> None:
    ended = outcome(Scene(gallery_plan(), SEED), [])
    assert ended.released
    assert (ended.layers, ended.excess) == ((), 0.0)


def test_an_honest_upload_of_the_galleries_making_passes_and_is_counted() -> None:
    # So that no case above is stopped for how it was made instead of for what it holds.
    scene = Scene(gallery_plan(), SEED)
    values = scene.honest_values()
    ended = outcome(scene, [scene.upload(pack(scene.layout, values))])
    assert (ended.layers, ended.released) == (("nothing",), True)
    assert ended.excess == pytest.approx(np.abs(values).max() / scene.layout.norm)


# --- forged weights -------------------------------------------------------------------------------

WEIGHTED = plan_tensors(
    28_594, max_clients=10, clip=40.0, weighting="samples", weight_cap=100, norm_check=NormCheck()
)


def weighed(honest: Sequence[int], forged: Sequence[float]) -> tuple[Release, int]:
    """A round of clients with these samples and of forgers with these weights, all without updates.

    Returns:
        The release, and how many were refused.
    """
    holder = KeyHolder(WEIGHTED)
    (segment,), (layout,) = WEIGHTED.segments, WEIGHTED.layouts
    assert isinstance(segment, FloatSegment)
    challenger = Challenger(holder.context)
    weights = [*(samples / segment.weight_cap for samples in honest), *forged]
    sent = []
    for weight in weights:
        identity = SigningKey.generate()
        values = quantize_update(
            segment,
            {"vector": np.zeros(segment.parameters, dtype=np.float32)},
            samples=segment.weight_cap,
            rotation=holder.context.rotation,
            rounding=Stream.derive("rounding", len(sent)),
        ).values
        plaintext = pack(layout, np.rint(weight * values).astype(np.int64))
        commitment = challenger.commitment(identity.public)
        sent.append(upload(holder.context, plaintext, identity, commitment))
        holder.admit(sent[-1].admission)
        holder.submit_sketch(challenger.sketch(sent[-1]))
    verdicts = {each.receipt.upload_digest: each.accepted for each in holder.verdicts()}
    aggregator = Aggregator(holder.context)
    for each in sent:
        if verdicts[each.admission.receipt.upload_digest]:
            aggregator.add(each)
    return holder.release(aggregator.aggregate()), list(verdicts.values()).count(False)


def test_ours_refuses_weights_beyond_the_bound() -> None:
    # Minus the sum of the others', above the cap, and below nothing.
    for forged in (-3.2, 2.5, -2.5):
        release, refused = weighed([50] * 7, [forged])
        assert refused == 1
        assert release.weight() == pytest.approx(3.5, abs=0.15)


def test_a_weight_of_zero_gains_nothing_and_is_divided_by_nothing() -> None:
    release, refused = weighed([50] * 7, [0.0])
    assert refused == 0
    assert release.weight() == pytest.approx(3.5, abs=0.15)


def test_what_ours_does_not_stop_conspirators_whose_weights_are_negative_within_the_bound() -> None:
    # Three of ten pass, and divide everybody's updates by a tenth of what they weigh together.
    release, refused = weighed([50] * 7, [-1.05] * 3)
    assert refused == 0
    assert 0.1 < release.weight() < 0.6
    # Equal weights, which the key holder counts itself, leave nothing to forge.


def test_what_ours_does_not_stop_one_weight_too_many_where_all_others_are_full() -> None:
    release, refused = weighed([100] * 9, [1.5])
    assert refused == 0
    with pytest.raises(ReleaseError, match="forged its weight"):
        release.mean()
