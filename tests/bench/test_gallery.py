"""The attack gallery: its attacks are what they are called, its runs add up, its results too."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secagg.challenger import Challenger
from secagg.context import rotation_string
from secagg.keyholder import KeyHolder
from secagg.packing import pack
from secagg.parameters import FloatSegment
from secagg.receipts import SigningKey
from secagg_bench.gallery.attacks import (
    ATTACKS,
    WEIGHT_ATTACKS,
    Attack,
    Situation,
    with_flipped_labels,
)
from secagg_bench.gallery.federation import (
    Federation,
    Setting,
    partition,
    target_item,
    taste_silos,
)
from secagg_bench.gallery.malformed import CASES
from secagg_bench.gallery.report import markdown, save_figure
from secagg_bench.gallery.run import Sizes, run_gallery, validate
from secagg_bench.gallery.single_users import single_user_cosines
from secagg_bench.gallery.uploads import upload
from secagg_recommender.datasets import load_dataset
from secagg_recommender.interactions import NO_TEST_ITEM, Split, split_leave_one_out

pytestmark = pytest.mark.timeout(300)  # dozens of short trainings, on a machine that may be busy

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "gallery.json"

# A clip so tight that ten times an honest update is beyond it.
TOY = Setting(silos=6, rounds=2, clip=5.0)
ONLY = ("update times 10", "a weight of 0", "a residue of q")


@cache
def marketplace() -> Split:
    return split_leave_one_out(load_dataset("marketplace"))


def attack_called(name: str) -> Attack:
    return next(each for each in (*ATTACKS, *WEIGHT_ATTACKS) if each.name == name)


def situation(setting: Setting, length: float) -> Situation:
    """What an attacker sees whose honest update has this norm."""
    plan = setting.plan(marketplace().n_items, "norm")
    (segment,) = plan.segments
    assert isinstance(segment, FloatSegment)
    rng = np.random.default_rng(1)
    honest = rng.normal(size=segment.parameters)
    honest *= length / np.linalg.norm(honest)
    return Situation(
        segment,
        rotation_string("task", 1, plan),
        honest.astype(np.float32),
        np.zeros(segment.parameters, dtype=np.float32),
        clients=10,
        attackers=3,
        target=5,
        rng=rng,
    )


def bounds(setting: Setting, integers: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """Their norm, in units of what an honest client does not exceed."""
    (layout,) = setting.plan(marketplace().n_items, "norm").layouts
    return float(np.linalg.norm(integers.astype(float))) / layout.norm


# --- attacks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: str(attack.name))
def test_an_attack_is_within_the_bound_where_it_says_so(attack: Attack) -> None:
    setting = Setting()
    length = bounds(setting, attack.integers(situation(setting, length=24.0)))
    if attack.within:
        assert length <= 1.01
    else:
        assert length > 1.5


@pytest.mark.parametrize("attack", WEIGHT_ATTACKS, ids=lambda attack: str(attack.name))
def test_a_forged_weight_is_within_the_bound_where_it_says_so(attack: Attack) -> None:
    plan = Setting(weight_cap=20_000).plan(marketplace().n_items, "norm")
    holder = KeyHolder(plan, task_id="task", round_number=1)
    challenger, identity = Challenger(holder.context), SigningKey.generate()
    seen = situation(Setting(weight_cap=20_000), length=24.0)
    assert seen.rotation == holder.context.rotation
    plaintext = pack(plan.layouts[0], attack.integers(seen))
    sent = upload(holder.context, plaintext, identity, challenger.commitment(identity.public))
    holder.admit(sent.admission)
    assert holder.submit_sketch(challenger.sketch(sent)).passed is attack.within


def test_a_scaled_update_is_the_honest_one_times_its_factor() -> None:
    seen = situation(Setting(), length=24.0)
    honest = seen.integers(seen.honest).astype(float)
    scaled = attack_called("update times -10").integers(seen).astype(float)
    cosine = honest @ scaled / np.linalg.norm(honest) / np.linalg.norm(scaled)
    assert cosine == pytest.approx(-1.0, abs=0.01)
    assert np.linalg.norm(scaled) == pytest.approx(10 * np.linalg.norm(honest), rel=0.01)


def test_flipped_labels_keep_the_number_of_items_and_none_of_them() -> None:
    split, users = marketplace(), np.array([3, 77])
    flipped = with_flipped_labels(split, users, seed=0)
    for user in users:
        before, after = set(split.items_of(user)), set(flipped.items_of(user))
        assert len(before) == len(after)
        assert not before & after
    others = ~np.isin(split.train_users, users)
    assert np.array_equal(split.train_items[others], flipped.train_items[others])


def test_the_promoted_item_is_one_that_hardly_anybody_has() -> None:
    counts = np.bincount(marketplace().train_items, minlength=marketplace().n_items)
    assert counts[target_item(marketplace())] == counts[counts > 0].min()


# --- clients --------------------------------------------------------------------------------------


def test_silos_by_taste_keep_two_tastes_apart() -> None:
    # Twenty users of either taste, taking turns, and nothing in common but two items.
    rng = np.random.default_rng(0)
    rows = []
    for user in range(40):
        own = 10 * (user % 2) + rng.choice(10, 7, replace=False)
        rows += [(user, item) for item in sorted({*own.tolist(), 20, 21})]
    users, items = (np.array(column, dtype=np.int32) for column in zip(*rows, strict=True))
    split = Split(users, items, np.full(40, NO_TEST_ITEM, dtype=np.int32), 40, 22)
    parts = taste_silos(split, 4)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(40))
    assert [len(set((part % 2).tolist())) for part in parts] == [1] * 4


def test_the_models_with_refused_attackers_are_those_of_the_honest_alone() -> None:
    split, attackers = marketplace(), (0, 1, 2)
    users = partition(split, TOY.silos, "taste", TOY.seed)
    attack = attack_called("update times -10")
    checked = Federation(split, users, TOY, attack, attackers).run("norm")
    alone = Federation(split, users, TOY, absent=attackers).run("norm", clear=True)
    undefended = Federation(split, users, TOY, attack, attackers).run("none")
    assert (checked.attacker_uploads, checked.attacker_refusals) == (6, 6)
    assert (checked.honest_uploads, checked.honest_refusals) == (6, 0)
    assert checked.models == alone.models
    assert checked.hr10 == alone.hr10
    assert len(set(checked.models)) == 2
    assert not set(checked.models) & set(undefended.models)


def test_single_users_are_compared_from_the_second_round_on() -> None:
    rows = np.array(single_user_cosines(marketplace(), TOY, clients=5))
    assert rows.shape == (1, 5)
    assert (np.abs(rows) <= 1).all()


# --- results --------------------------------------------------------------------------------------


@pytest.fixture
def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def test_what_a_run_finds_is_complete_survives_json_and_can_be_shown(tmp_path: Path) -> None:
    said: list[str] = []
    sizes = Sizes(TOY, trials=2, attempts=1, single_users=4, tighter=(0.1,), only=ONLY)
    found = run_gallery(sizes, "marketplace", None, said.append, processes=1)
    assert said[-1].startswith(f"[{len(said)}/{len(said)}, ")
    again = json.loads(json.dumps(found))
    validate(again)
    assert [row["name"] for row in again["malformed"]] == ["a residue of q"]
    assert again["taste"]["bit_identical"]
    norms, clips = again["clips"]["honest_norms"], [row["clip"] for row in again["clips"]["rows"]]
    assert len(norms) == TOY.rounds
    assert all(0 < each["least"] <= each["median"] <= each["most"] for each in norms)
    assert clips == [0.5, 0.5]
    scaled = next(row for row in again["attacks"] if row["attackers"] == 3)
    assert scaled["runs"]["norm"]["attacker_refusals"] == 3 * TOY.rounds
    text = markdown(again)
    assert all(f"| {name} |" in text for name in ONLY)
    save_figure(again, tmp_path / "figure.svg")


def test_results_that_do_not_add_up_are_refused(committed: dict[str, Any]) -> None:
    spoils: list[Callable[[dict[str, Any]], object]] = [
        lambda it: it.pop("taste"),
        lambda it: it["attacks"].pop(),
        lambda it: it["clips"]["rows"].pop(),
        lambda it: it["clips"]["rows"][0]["runs"]["none"].update(hr10=1.5),
        lambda it: it["attacks"][0]["runs"]["norm"].update(hr10=1.5),
        lambda it: it["attacks"][0]["runs"]["norm"].update(attacker_refusals=99),
        lambda it: it["malformed"][0].update(trials=99),
        lambda it: it["malformed"].pop(),
    ]
    for spoil in spoils:
        spoiled = copy.deepcopy(committed)
        spoil(spoiled)
        with pytest.raises(ValueError, match="expected"):
            validate(spoiled)


def test_tables_and_figure_name_every_attack(committed: dict[str, Any], tmp_path: Path) -> None:
    text = markdown(committed)
    for each in (*ATTACKS, *WEIGHT_ATTACKS, *CASES):
        assert f"| {each.name} |" in text
    for name in ("first.svg", "second.svg"):
        save_figure(committed, tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("first.svg", "second.svg"))
    assert first == second
    assert b"<svg" in first


def test_the_committed_results_are_complete(committed: dict[str, Any]) -> None:
    validate(committed)
    assert committed["sizes"]["only"] == []
    assert committed["taste"]["bit_identical"]
    checked = committed["taste"]["runs"]["checked"]
    assert checked["attacker_refusals"] == checked["attacker_uploads"] > 0
    # Each way of making an upload that the norm check must stop: all but one of a thousand.
    in_bulk = {case.name for case in CASES if case.layer == "norm" and not case.same}
    rows = [row for row in committed["malformed"] if row["name"] in in_bulk]
    assert len(rows) == len(in_bulk) > 20
    for row in rows:
        assert row["trials"] >= 1000
        assert row["stopped_there"] >= 0.999 * row["trials"]


# --- real data ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.realdata
def test_three_inverted_silos_of_movielens_ruin_it_or_are_refused(data_dir: Path) -> None:
    setting, attackers = Setting(), (0, 1, 2)
    split = split_leave_one_out(load_dataset("ml-100k", data_dir))
    users = partition(split, setting.silos, "taste", setting.seed)
    attack = attack_called("update times -10")
    undefended = Federation(split, users, setting, attack, attackers).run("none")
    checked = Federation(split, users, setting, attack, attackers).run("norm")
    alone = Federation(split, users, setting, absent=attackers).run("norm", clear=True)
    assert undefended.hr10 < 0.25
    assert checked.hr10 > 0.5
    assert checked.attacker_refusals == checked.attacker_uploads == 3 * setting.rounds
    assert checked.honest_refusals == 0
    assert checked.models == alone.models
