"""Privacy, withheld rows and adaptive clip norms in task files, and what is refused of them."""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import cohort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg.accounting import Budget, noise_multiplier_for, releases_within
from secagg.errors import ConfigurationError, PlanError
from secagg.parameters import (
    FloatSegment,
    IntegerSegment,
    NormCheck,
    Plan,
    Privacy,
    RowThreshold,
    TensorSpec,
)
from secagg.planner import PRIVATE_MARGIN, make_plan
from secagg.privacy import release_rho, sensitivity
from secagg_server import task_files
from secagg_server.task_files import read_task
from secagg_server.tasks import AdaptiveClip, TaskSpec

SAMPLE = Path(__file__).parents[2] / "docs" / "samples" / "task.toml"
TASK = """
task_id = "task"
max_clients = 50
min_clients = 5
rounds = 10
[update]
clip = 1.5
bits = {bits}
{update}
[[update.tensors]]
name = "table"
shape = [40, 6]
[[update.tensors]]
name = "bias"
shape = [40]
{text}
"""
BUDGET = 'mode = "release"\nepsilon = 8.0\ndelta = 1e-5\n'
PRIVATE = f"[privacy]\n{BUDGET}"
ROWS = "rows = 40"


def read(folder: Path, text: str = "", update: str = "", bits: int = 13) -> TaskSpec:
    file = folder / "task.toml"
    file.write_text(TASK.format(text=text, update=update, bits=bits), encoding="utf-8")
    return read_task(file)


# --- budgets ------------------------------------------------------------------------------------


def test_without_a_word_of_privacy_there_is_none(tmp_path: Path) -> None:
    spec = read(tmp_path)
    assert (spec.plan.privacy, spec.plan.threshold, spec.adaptive_clip) == (None, None, None)
    assert spec.check_budget() is None


@pytest.mark.parametrize(
    ("lines", "privacy"),
    [
        ("noise_multiplier = 4.5", Privacy("release", 4.5, 8.0, 1e-5)),
        ("", Privacy("release", noise_multiplier_for(8.0, 1e-5, 10), 8.0, 1e-5)),
        ("integer_share = 0.3", Privacy("release", 2.017, 8.0, 1e-5, integer_share=0.3)),
    ],
)
def test_a_budget_is_that_of_the_plan(lines: str, privacy: Privacy, tmp_path: Path) -> None:
    spec = read(tmp_path, PRIVATE + lines)
    assert spec.plan.privacy == privacy
    assert spec.plan.norm_check == NormCheck(PRIVATE_MARGIN)
    assert TaskSpec.from_wire(spec.to_wire()) == spec


@pytest.mark.parametrize(
    ("mode", "line", "honest"),
    [
        ("distributed", "", 4),  # min_clients, less the one that the norm check tolerates
        ("distributed", "honest_clients = 3", 3),
        ("distributed", "honest_clients = 5", 5),
        ("local", "", 1),
        ("release", "", 0),
    ],
)
def test_whose_noise_counts_is_planned(mode: str, line: str, honest: int, tmp_path: Path) -> None:
    spec = read(tmp_path, PRIVATE.replace("release", mode) + line)
    assert spec.plan.privacy is not None
    assert (spec.plan.privacy.mode, spec.plan.privacy.honest_clients) == (mode, honest)
    assert spec.check_budget() in (10, 11)
    assert TaskSpec.from_wire(spec.to_wire()) == spec


@pytest.mark.parametrize("mode", ["release", "distributed", "local"])
@pytest.mark.parametrize("epsilon", [0.5, 8.0, 100.0])
def test_the_noise_of_a_budget_lets_all_rounds_fit_and_little_more(
    epsilon: float, mode: str, tmp_path: Path
) -> None:
    text = PRIVATE.replace("release", mode).replace("8.0", str(epsilon))
    spec = read(tmp_path, text)
    rho = release_rho(spec.plan)
    assert 10 <= releases_within(rho, epsilon, 1e-5) <= 11
    assert spec.check_budget() == releases_within(rho, epsilon, 1e-5)


def test_a_budget_that_hardly_asks_for_noise_has_the_least_that_there_is(tmp_path: Path) -> None:
    spec = read(tmp_path, PRIVATE.replace("8.0", "1e6"))
    assert spec.plan.privacy is not None
    assert spec.plan.privacy.noise_multiplier == 0.01
    assert spec.check_budget() in range(10, 10**6)


def test_a_budget_for_fewer_rounds_is_for_the_server_to_say(tmp_path: Path) -> None:
    spec = read(tmp_path, PRIVATE + "noise_multiplier = 1.0")
    fit = spec.check_budget()
    assert fit is not None
    assert 1 <= fit < spec.rounds


def test_a_budget_without_room_for_one_release_is_refused_with_numbers_that_work(
    tmp_path: Path,
) -> None:
    noise = "noise_multiplier = 0.2"
    with pytest.raises(ConfigurationError, match=r"room for 1 release.*got room for 0") as caught:
        read(tmp_path, PRIVATE + noise)
    least = re.search(r"noise_multiplier of at least ([\d.e+-]+)", str(caught.value))
    epsilon = re.search(r"epsilon of at least ([\d.e+-]+)", str(caught.value))
    assert least is not None
    assert epsilon is not None
    more = read(tmp_path, PRIVATE + f"noise_multiplier = {least[1]}")
    assert more.check_budget() == 1
    richer = read(tmp_path, PRIVATE.replace("8.0", str(float(epsilon[1]))) + noise)
    assert richer.check_budget() == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[privacy]\nmode = "release"', "epsilon and delta; got epsilon=None, delta=None"),
        ('[privacy]\nmode = "release"\nepsilon = 8', r"got epsilon=8.0, delta=None; give both"),
        ('[privacy]\nmode = "release"\ndelta = 1e-5', r"got epsilon=None, delta=1e-05"),
        ("[privacy]\nepsilon = 8\ndelta = 1e-5", "privacy.mode: Field required"),
        (PRIVATE.replace("release", "central"), "privacy.mode"),
        (PRIVATE.replace("8.0", "0.0"), "positive, finite epsilon"),
        (PRIVATE.replace("8.0", "-1.0"), "positive, finite epsilon"),
        (PRIVATE.replace("8.0", "nan"), "positive, finite epsilon"),
        (PRIVATE.replace("8.0", "inf"), "positive, finite epsilon"),
        (PRIVATE.replace("8.0", "1e7"), "epsilon above 0, up to 1e6"),
        (PRIVATE.replace("1e-5", "0.0"), r"delta in \(0, 1\)"),
        (PRIVATE.replace("1e-5", "1.0"), r"delta in \(0, 1\)"),
        (PRIVATE.replace("1e-5", "0.2"), "delta from 1e-30 to 0.1"),
        (PRIVATE.replace("1e-5", "nan"), r"delta in \(0, 1\)"),
        (PRIVATE + "noise_multiplier = 0.0", "noise_multiplier from 0.01"),
        (PRIVATE + "noise_multiplier = -1.0", "noise_multiplier from 0.01"),
        (PRIVATE + "noise_multiplier = inf", "noise_multiplier from 0.01"),
        (PRIVATE + "integer_share = 1.0", "integer_share between 0 and 1"),
        (PRIVATE + "honest_clients = 2", "honest_clients from 0 to 0 in mode 'release'"),
        (PRIVATE.replace("release", "local") + "honest_clients = 2", "from 0 to 1 in mode 'local'"),
        (
            PRIVATE.replace("release", "distributed") + "honest_clients = 6",
            "honest_clients=5, with more noise",
        ),
        (PRIVATE + "honest_client = 2", "unknown key 'privacy.honest_client'"),
        (PRIVATE + "epsilons = 2", "unknown key 'privacy.epsilons'"),
        ("privacy = 3", "privacy"),
    ],
)
def test_a_privacy_that_cannot_be_is_refused_by_its_name(
    text: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        read(tmp_path, text if text.startswith("[") else "", "" if text.startswith("[") else text)


def test_an_update_that_is_weighed_by_samples_has_no_privacy(tmp_path: Path) -> None:
    by_samples = 'weighting = "samples"\nweight_cap = 100'
    with pytest.raises(PlanError, match="use equal weights"):
        read(tmp_path, PRIVATE, by_samples)
    assert read(tmp_path, PRIVATE, 'weighting = "equal"').plan.privacy is not None


@pytest.mark.parametrize(
    ("line", "margin"),
    [("", PRIVATE_MARGIN), ("sketches = 9", PRIVATE_MARGIN), ("margin = 0.5", 0.5)],
)
def test_the_margin_is_wide_enough_for_privacy_where_the_file_says_none(
    line: str, margin: float, tmp_path: Path
) -> None:
    check = read(tmp_path, f"{PRIVATE}[norm_check]\n{line}").plan.norm_check
    assert check is not None
    assert check.margin == margin


@pytest.mark.parametrize(
    ("line", "said"),
    [("margin = 0.2", f"margin={PRIVATE_MARGIN} would work"), ("min_cosine = 0.1", "leave min_")],
)
def test_a_check_that_tells_too_much_for_privacy_is_refused(
    line: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=said):
        read(tmp_path, f"{PRIVATE}[norm_check]\n{line}")


def test_too_many_rounds_for_any_noise_are_refused(tmp_path: Path) -> None:
    text = PRIVATE.replace("8.0", "1e-9").replace("1e-5", "1e-29")
    with pytest.raises(ConfigurationError):
        read(tmp_path, text)


# --- rows that are withheld ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "norm"),
    [("most_items = 9", 3.0), ("most_items = 1", 1.0), ("", math.sqrt(40)), ("most_items = 40", 0)],
)
def test_the_counts_of_a_threshold_are_added(line: str, norm: float, tmp_path: Path) -> None:
    spec = read(tmp_path, f"[threshold]\nleast = 5\n{line}", ROWS)
    assert spec.plan.threshold == RowThreshold("contributors", 5)
    counts = spec.plan.segments[1]
    assert counts == IntegerSegment("contributors", 40, 1, norm or math.sqrt(40))
    assert spec.model is not None
    assert spec.model.rows == 40
    assert TaskSpec.from_wire(spec.to_wire()) == spec


def test_the_fewer_items_one_client_counts_the_less_noise_they_need(tmp_path: Path) -> None:
    few, many = (
        read(tmp_path, f"{PRIVATE}[threshold]\nleast = 5\nmost_items = {most}", ROWS).plan
        for most in (4, 36)
    )
    assert sensitivity(few.segments[1]) == 2.0
    assert few.noise_stds[1] == pytest.approx(many.noise_stds[1] / 3, rel=0.1)


COUNTS = '[[integers]]\nname = "contributors"\nsize = 40\nmax_abs = 1\n'


def test_counts_of_ones_own_are_used_as_they_are(tmp_path: Path) -> None:
    text = f"{COUNTS}max_norm = 2.5\n[threshold]\nleast = 3"
    assert read(tmp_path, text, ROWS).plan.segments[1:] == (
        IntegerSegment("contributors", 40, 1, 2.5),
    )
    named = text.replace("contributors", "mine") + '\ncounts = "mine"'
    assert read(tmp_path, named, ROWS).plan.threshold == RowThreshold("mine", 3)


@pytest.mark.parametrize(
    ("text", "update", "said"),
    [
        ("[threshold]\nleast = 5", "", r"expected rows in \[update\]"),
        ("[threshold]", ROWS, "threshold.least: Field required"),
        ("[threshold]\nleast = 1", ROWS, "least from 2 contributors"),
        ("[threshold]\nleast = 5\nmost_items = 0", ROWS, "from 1 to the table's rows=40"),
        ("[threshold]\nleast = 5\nmost_items = 41", ROWS, "got most_items=41"),
        ("[threshold]\nleast = 5\nmost_item = 4", ROWS, "unknown key 'threshold.most_item'"),
        (f"{COUNTS}[threshold]\nleast = 5\nmost_items = 4", ROWS, "got both; drop one"),
        (COUNTS.replace("40", "39") + "[threshold]\nleast = 5", ROWS, "size=40 integers"),
        (COUNTS.replace("abs = 1", "abs = 2") + "[threshold]\nleast = 5", ROWS, "max_abs=1"),
        ('[threshold]\nleast = 5\ncounts = "update"', ROWS, "segment 'update' of size=40"),
        ('[threshold]\nleast = 5\ncounts = "a b"', ROWS, "segment name"),
        ("", "rows = 39", "first side of rows=39"),
        ("", "rows = -1", "rows"),
        ("", f'{ROWS}\nweighting = "samples"\nweight_cap = 9', "use equal weights"),
    ],
)
def test_a_threshold_that_cannot_be_is_refused_by_its_name(
    text: str, update: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        read(tmp_path, text, update)


def test_a_threshold_of_a_task_without_an_update_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "task.toml"
    text = f'task_id = "t"\nmax_clients = 9\n{COUNTS}[threshold]\nleast = 5'
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"expected rows in \[update\]"):
        read_task(file)


# --- clip norms that follow ---------------------------------------------------------------------

FOLLOWS = "[update.adaptive_clip]"


@pytest.mark.parametrize(
    ("lines", "adaptive"),
    [
        ("", AdaptiveClip(0.5, 0.2)),
        ("quantile = 0.8", AdaptiveClip(0.8, 0.2)),
        ("quantile = 0.1\nrate = 1.0", AdaptiveClip(0.1, 1.0)),
    ],
)
def test_an_adaptive_clip_norm_brings_its_bit(
    lines: str, adaptive: AdaptiveClip, tmp_path: Path
) -> None:
    spec = read(tmp_path, f"{FOLLOWS}\n{lines}")
    assert spec.adaptive_clip == adaptive
    assert spec.model is not None
    assert spec.model.clip_bit
    assert TaskSpec.from_wire(spec.to_wire()) == spec


@pytest.mark.parametrize(
    ("text", "update", "said"),
    [
        (f"{FOLLOWS}\nquantile = 0.0", "", "quantile from 0.01 to 0.99"),
        (f"{FOLLOWS}\nquantile = 1.0", "", "quantile from 0.01 to 0.99"),
        (f"{FOLLOWS}\nquantile = nan", "", "quantile from 0.01 to 0.99"),
        (f"{FOLLOWS}\nrate = 0.0", "", "rate above 0, up to 1"),
        (f"{FOLLOWS}\nrate = -0.1", "", "rate above 0, up to 1"),
        (f"{FOLLOWS}\nrate = 1.1", "", "rate above 0, up to 1"),
        (f"{FOLLOWS}\nrate = nan", "", "rate above 0, up to 1"),
        (f"{FOLLOWS}\nspeed = 1", "", "unknown key 'update.adaptive_clip.speed'"),
        (FOLLOWS, 'weighting = "samples"\nweight_cap = 9', "use equal weights"),
        ("", "adaptive_clip = true", "adaptive_clip"),
    ],
)
def test_an_adaptive_clip_norm_that_cannot_be_is_refused_by_its_name(
    text: str, update: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        read(tmp_path, text, update)


@pytest.mark.parametrize("plan", [cohort.mixed_plan(), cohort.counts_plan()])
def test_a_clip_norm_follows_nothing_where_there_is_no_bit(plan: Plan) -> None:
    spec = TaskSpec("task", plan, 1, 1000, 1, 3)
    with pytest.raises(ConfigurationError, match="a model with a clip bit"):
        replace(spec, adaptive_clip=AdaptiveClip())


@pytest.mark.parametrize("clip", [1e-17, 1e17])
def test_a_clip_norm_that_could_leave_what_a_plan_can_have_is_refused(clip: float) -> None:
    plan = adaptive_plan(clip)
    with pytest.raises(ConfigurationError, match=r"begins from 1e-16 to 1e\+16"):
        TaskSpec("task", plan, 1, 1000, 1, 3, adaptive_clip=AdaptiveClip())


def adaptive_plan(clip: float, **options: Privacy) -> Plan:
    segment = FloatSegment("update", (TensorSpec("v", (500,)),), clip, 9, clip_bit=True)
    counts = IntegerSegment("counts", 20, 5, 9.5)
    return make_plan([counts, segment], max_clients=20, norm_check=NormCheck(0.4), **options)


CLIPS = st.floats(1e-16, 1e16)


@given(
    quantile=st.floats(0.01, 0.99),
    rate=st.floats(1e-6, 1.0),
    within=st.floats(0.0, 1.0),
    first=CLIPS,
    moved=st.floats(1e-3, 1e3),
)
def test_a_clip_norm_moves_by_the_formula_within_bounds(
    quantile: float, rate: float, within: float, first: float, moved: float
) -> None:
    adaptive, clip = (
        AdaptiveClip(quantile, rate),
        min(max(first * moved, first / 1000), first * 1000),
    )
    found = adaptive.following(clip, within, first)
    assert first / 1000 <= found <= first * 1000
    assert clip * math.exp(-1) * 0.999 <= found <= clip * math.exp(1) * 1.001
    formula = clip * math.exp(-rate * (within - quantile))
    if first / 1000 < formula < first * 1000:
        assert found == formula
    if within > quantile:
        assert found <= clip
    if within < quantile:
        assert found >= clip


def test_a_clip_norm_that_is_always_or_never_reached_stops_at_a_thousandth_and_a_thousand() -> None:
    adaptive = AdaptiveClip(0.5, 1.0)
    low = high = 2.0
    for _ in range(40):
        low, high = adaptive.following(low, 1.0, 2.0), adaptive.following(high, 0.0, 2.0)
    assert (low, high) == (0.002, 2000.0)


@given(first=CLIPS, moved=st.floats(1e-3, 1e3), mode=st.sampled_from(["release", "distributed"]))
def test_a_rounds_plan_differs_in_the_clip_norm_alone(
    first: float, moved: float, mode: str
) -> None:
    spec = TaskSpec(
        "task",
        adaptive_plan(first, privacy=Privacy(mode, 1.3, 5.0, 1e-6)),
        *(1, 1000, 1, 3),
        adaptive_clip=AdaptiveClip(),
    )
    clip = min(max(first * moved, first / 1000), first * 1000)
    plan = spec.plan_at(clip)
    assert spec.model is not None
    assert plan.segments == (spec.plan.segments[0], replace(spec.model, clip=clip))
    assert (plan.layouts, plan.noise_layouts) == (spec.plan.layouts, spec.plan.noise_layouts)
    assert plan.noise_stds == spec.plan.noise_stds
    assert plan.privacy == spec.plan.privacy
    assert release_rho(plan) == pytest.approx(release_rho(spec.plan), rel=1e-12)
    assert (plan.digest == spec.plan.digest) == (clip == first)
    assert plan.digest == spec.plan_at(clip).digest


def test_a_plan_without_another_clip_norm_is_the_tasks_own() -> None:
    spec = TaskSpec("task", adaptive_plan(2.0), 1, 1000, 1, 3)
    assert spec.plan_at(None) is spec.plan
    assert spec.plan_at(2.0) is spec.plan
    counts = TaskSpec("task", cohort.counts_plan(), 1, 1000, 1, 3)
    assert counts.plan_at(3.0) is counts.plan


# --- the sample ---------------------------------------------------------------------------------

SECTIONS = [
    task_files._Privacy,
    task_files._Threshold,
    task_files._AdaptiveClip,
    task_files._Optimiser,
    task_files._Stop,
]


def uncommented() -> str:
    """The sample with everything in it that it only mentions."""
    text = SAMPLE.read_text(encoding="utf-8")
    text = re.sub(r"^# (?=\[?[a-z_.]+(\]| = ))", "", text, flags=re.MULTILINE)
    # What does not go together with privacy.
    text = re.sub(r"^(weight_cap|min_cosine|fraction) = .*$", "", text, flags=re.MULTILINE)
    text = text.replace("margin = 0.2", "margin = 0.3")
    text = text.replace('weighting = "samples"', 'weighting = "equal"')
    return text.replace("honest_clients = 2", "honest_clients = 0").replace("bits = 8", "bits = 12")


def test_the_sample_mentions_every_key_and_all_of_it_works(tmp_path: Path) -> None:
    text = uncommented()
    shown = tomllib.loads(text)
    given_keys = [shown[name] for name in ("privacy", "threshold", "optimiser", "stop")]
    given_keys.insert(2, shown["update"]["adaptive_clip"])
    for section, keys in zip(SECTIONS, given_keys, strict=True):
        assert set(section.model_fields) == set(keys)
    file = tmp_path / "task.toml"
    file.write_text(text, encoding="utf-8")
    spec = read_task(file)
    assert spec.plan.threshold is not None
    assert spec.plan.privacy is not None
    assert spec.adaptive_clip == AdaptiveClip()
    assert spec.stop is not None
    assert spec.check_budget() is not None


def test_defaults_that_files_and_library_share_are_the_same() -> None:
    fields = Privacy.__dataclass_fields__
    for name in ("integer_share", "honest_clients"):
        assert task_files._Privacy.model_fields[name].default == fields[name].default
    text = SAMPLE.read_text(encoding="utf-8")
    for name, default in [("integer_share", "0.1"), ("quantile", "0.5"), ("rate", "0.2")]:
        assert re.search(rf"^# {name} = {default} .*# optional, default {default}\b", text, re.M)


def test_the_budget_check_is_that_of_the_accounting(tmp_path: Path) -> None:
    spec = read(tmp_path, PRIVATE + "noise_multiplier = 1.0")
    assert spec.check_budget() == Budget(8.0, 1e-5).left(0.0, release_rho(spec.plan))
