"""How soundness is measured: laws by other derivations, the shortcut against the library."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import beta, chi2, gamma

from secagg_bench import soundness
from secagg_bench.pass_law import (
    blocks_in_phase,
    confidence,
    dense_passes,
    drawn_mixes,
    many_blocks,
    one_block,
    pass_probability,
    refused,
)
from secagg_bench.soundness import Outcome

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "soundness.json"


@pytest.mark.parametrize("degrees", [256, 512, 768])
def test_dense_updates_follow_chi_square(degrees: int) -> None:
    for margin in (0.15, 0.2, 0.3):
        exact = chi2.sf(degrees * (1 + margin) ** 2, degrees)
        assert refused(margin, degrees) == pytest.approx(exact, rel=1e-6)
        for norm in (1.1, 1.5, 2.0):
            exact = chi2.cdf(degrees * ((1 + margin) / norm) ** 2, degrees)
            assert dense_passes(norm, margin, degrees) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("sketches", [8, 16, 32])
@pytest.mark.parametrize("norm", [1.2, 1.5, 2.0, 3.0, 5.0])
def test_one_root_of_one_block_follows_a_gamma_law(sketches: int, norm: float) -> None:
    exact = gamma.cdf(sketches * (1.2 / norm) ** 2, sketches)
    found = pass_probability(one_block, norm, 0.2, sketches)
    assert found == pytest.approx(exact, rel=1e-3)


def test_many_blocks_follow_their_limit() -> None:
    drawn = np.random.default_rng(1)
    shown = (drawn.gamma(2.0, 0.5, (200_000, 16)) * drawn.exponential(size=(200_000, 16))).mean(1)
    for norm in (1.5, 2.0):
        share = float((shown <= (1.2 / norm) ** 2).mean())
        exact = pass_probability(many_blocks, norm, 0.2, 16)
        assert abs(share - exact) < 6 * math.sqrt(exact / shown.size)
    law = blocks_in_phase(np.ones(200, dtype=np.complex128), 1)
    near = pass_probability(law, 2.0, 0.2, 16)
    assert near == pytest.approx(pass_probability(many_blocks, 2.0, 0.2, 16), rel=0.05)


def test_drawn_mixes_are_those_of_the_library() -> None:
    from secagg.sketches import _MIXES

    table = _MIXES[:, :, 0] + 1j * _MIXES[:, :, 1]
    drawn = drawn_mixes(np.random.default_rng(1), 200_000)
    named, counts = np.unique(drawn, axis=0, return_counts=True)
    wanted, ways = np.unique(table, axis=0, return_counts=True)
    assert np.array_equal(named, wanted)
    assert np.abs(counts / 200_000 - ways / 256).max() < 0.005


@pytest.mark.parametrize(("passed", "trials"), [(0, 10), (3, 50), (500, 1000), (1000, 1000)])
def test_intervals_are_clopper_and_pearsons(passed: int, trials: int) -> None:
    low, high = confidence(passed, trials)
    assert low == pytest.approx(beta.ppf(0.025, passed, trials - passed + 1) if passed else 0.0)
    exact = beta.ppf(0.975, passed + 1, trials - passed) if passed < trials else 1.0
    assert high == pytest.approx(exact)


def test_exact_integers_judge_as_the_library_does() -> None:
    assert soundness._integers_agree(3) == 0


def test_exact_integers_are_the_librarys_own_to_the_last_digit() -> None:
    from secagg import ring
    from secagg.norm_check import _digits
    from secagg.sketches import sketch

    for name, make in (
        ("one block", soundness._dense),
        ("three blocks", soundness._sinusoid(3.0, digits=0)),
        ("three blocks", soundness._shift(2, 4)),
    ):
        plan, drawn = soundness._plan(name), np.random.default_rng(1)
        coefficients = make(plan, drawn)
        upload, key = drawn.bytes(32), drawn.bytes(32)
        made = sketch(soundness._context(name), upload, [ring.to_ntt(coefficients)], key)
        theirs = _digits(plan.layouts[0], made.norms[0], np.zeros(4096, dtype=np.int64))
        assert np.array_equal(soundness._opened(name, coefficients, upload, key), theirs)


def outcome(**changes: Any) -> Outcome:  # noqa: ANN401 - any field
    return replace(
        Outcome("one root", "one block", "integers", 5.0, 100, 0, 0.0, 0.04, 1.0), **changes
    )


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (outcome(form="honest: dense", norm=1.0, passed=99, low=0.9, high=1.0), "1 refused"),
        (outcome(passed=2, low=0.01, high=0.1), "2 of 100 passed"),
        (outcome(form="random direction", norm=1.5, passed=1, low=0.0, high=0.1), "1 of 100"),
        (outcome(low=0.5), "no probabilities"),
    ],
)
def test_results_that_cannot_be_are_refused(line: Outcome, text: str) -> None:
    good: dict[str, object] = {"judged_differently": 0}
    soundness._check(good, [outcome()])
    with pytest.raises(RuntimeError, match=text):
        soundness._check(good, [line])
    with pytest.raises(RuntimeError, match="differently"):
        soundness._check({"judged_differently": 1}, [outcome()])


def test_every_form_makes_plaintexts_of_its_plan() -> None:
    for trial in soundness._trials():
        if trial.make is None or trial.plan == "a million":
            continue
        plan = soundness._plan(trial.plan)
        made = trial.make(plan, np.random.default_rng(1))
        assert made.shape == (plan.blocks, 4096)
        assert made.dtype == np.int64


def test_the_committed_results_are_what_the_documentation_may_rely_on() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert results["scale"] >= 1
    outcomes = [Outcome(**line) for line in results["outcomes"]]
    soundness._check(results, outcomes)
    honest = [line for line in outcomes if line.form.startswith("honest")]
    assert sum(line.trials for line in honest) >= 30_000
    assert any(line.norm == 5.0 and line.trials >= 10_000 for line in outcomes)
    seen = results["half_a_base"]
    assert abs(seen["seen"] / seen["rows"] - 0.5) < 6 * math.sqrt(0.25 / seen["rows"])
    forms = {(trial.form, trial.plan, trial.judged, trial.norm) for trial in soundness._trials()}
    assert {(o.form, o.plan, o.judged, o.norm) for o in outcomes} == forms


def test_the_figure_is_the_same_again(tmp_path: Path) -> None:
    lines = [outcome(norm=2.0, passed=5, low=0.01, high=0.1), outcome(norm=3.0)]
    for name in ("one.svg", "other.svg"):
        soundness._draw(lines, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()
