"""Every malformed upload of the gallery, and the layer that stops it.

Broken: sums without a norm check, where one client adds as much as the whole range leaves and stops
a round whenever it likes, and where forged weights bring the sum of all weights next to zero. Ours
runs each upload against the core library as server and key holder do: nothing that passes may bend
the sum by more than a bound, and what cannot be stopped is listed here as well, with the layer
where the attempt is lost.
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
from secagg.parameters import FloatSegment, NormCheck, Plan
from secagg.planner import plan_tensors
from secagg.receipts import NO_COMMITMENT, SigningKey
from secagg.release import Release
from secagg_bench.gallery.malformed import CASES, LAYERS, Case, Scene, gallery_plan, outcome
from secagg_bench.gallery.uploads import integers, upload

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
    scene = Scene(case.plan, SEED)
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


def weighted_plan(check: NormCheck | None) -> Plan:
    return plan_tensors(
        28_594, max_clients=10, clip=40.0, weighting="samples", weight_cap=100, norm_check=check
    )


CHECKED = weighted_plan(NormCheck())
Forged = Sequence[tuple[float, float]]


def weighed(honest: Sequence[int], forged: Forged, plan: Plan = CHECKED) -> tuple[Release, int]:
    """A round of clients with these samples, and of forgers with these updates and weights.

    Honest updates are half as long as their weight allows, forged ones so many clips.

    Returns:
        The release, and how many were refused, all of them forgers.
    """
    holder, rng = KeyHolder(plan), np.random.default_rng(SEED)
    context, challenger = holder.context, Challenger(holder.context)
    (segment,), (layout,) = plan.segments, plan.layouts
    assert isinstance(segment, FloatSegment)
    weights = [samples / segment.weight_cap for samples in honest]
    sent, forgers = [], set()
    for number, (length, weight) in enumerate([*((w / 2, w) for w in weights), *forged]):
        identity, drawn = SigningKey.generate(), rng.normal(size=segment.parameters)
        vector = (drawn * length * segment.clip / np.linalg.norm(drawn)).astype(np.float32)
        values = integers(segment, context.rotation, vector, weight, rng)
        commitment = challenger.commitment(identity.public) if plan.norm_check else NO_COMMITMENT
        sent.append(upload(context, pack(layout, values), identity, commitment))
        holder.admit(sent[-1].admission)
        if number >= len(honest):
            forgers.add(sent[-1].admission.receipt.upload_digest)
    refused = set()
    if plan.norm_check:
        for each in sent:
            holder.submit_sketch(challenger.sketch(each))
        verdicts = holder.verdicts()
        refused = {each.receipt.upload_digest for each in verdicts if not each.accepted}
    assert refused <= forgers
    aggregator = Aggregator(context)
    for each in sent:
        if each.admission.receipt.upload_digest not in refused:
            aggregator.add(each)
    return holder.release(aggregator.aggregate()), len(refused)


def test_without_a_check_conspirators_divide_everybodys_updates_by_next_to_nothing() -> None:
    honest, _ = weighed([50] * 7, [], weighted_plan(None))
    forged, _ = weighed([50] * 7, [(0.0, -1.05)] * 3, weighted_plan(None))
    assert honest.weight() == pytest.approx(3.5, abs=0.15)
    assert 0.1 < forged.weight() < 0.6
    lengths = [np.linalg.norm(each.mean()["vector"]) for each in (honest, forged)]
    assert lengths[1] > 5 * lengths[0]


@pytest.mark.parametrize(
    ("length", "weight"),
    [
        *((0.0, -3.2), (0.0, -2.5), (0.0, 2.5)),  # beyond the norm bound
        *((0.0, -1.05), (0.0, -0.3), (0.0, -0.1), (0.3, -0.3)),  # within it, below nothing
        *((0.5, 0.0), (1.0, 0.0), (0.5, 0.1)),  # a vote beyond its weight
    ],
)
def test_ours_refuses_a_weight_that_is_none_and_an_update_beyond_its_weight(
    length: float, weight: float
) -> None:
    release, refused = weighed([50] * 7, [(length, weight)])
    assert refused == 1
    assert release.weight() == pytest.approx(3.5, abs=0.15)


def test_ours_refuses_conspirators_who_share_minus_the_others_weights() -> None:
    release, refused = weighed([50] * 7, [(0.0, -1.05)] * 3)
    assert refused == 3
    assert release.contributors == 7
    assert release.weight() == pytest.approx(3.5, abs=0.15)


def test_a_weight_of_zero_under_nothing_gains_nothing_and_is_divided_by_nothing() -> None:
    release, refused = weighed([50] * 7, [(0.0, 0.0)])
    assert refused == 0
    assert release.weight() == pytest.approx(3.5, abs=0.15)


def test_ours_puts_up_with_one_weight_too_many_where_all_others_are_full() -> None:
    release, refused = weighed([100] * 9, [(0.0, 1.5)])
    assert refused == 0
    assert release.weight() == pytest.approx(10.5, abs=0.15)
    assert np.isfinite(release.mean()["vector"]).all()


def test_what_ours_does_not_stop_more_weights_too_many_than_are_tolerated() -> None:
    # All others are full, or nobody would notice; the mean is refused, and nobody is named.
    release, refused = weighed([100] * 7, [(0.0, 1.5)] * 3)
    assert refused == 0
    with pytest.raises(ReleaseError, match="forged its weight"):
        release.mean()
