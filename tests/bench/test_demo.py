"""The demo, run as a user runs it: real processes, at a small scale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secagg_bench.demo import results as results_
from secagg_bench.demo.report import render
from secagg_bench.demo.run import Observer, run_demo
from secagg_bench.demo.settings import DemoSettings, Source, find_data
from secagg_recommender.datasets import load_dataset
from secagg_recommender.evaluation import evaluate, factor_scores
from secagg_recommender.interactions import split_leave_one_out

SUPPORT = Path(__file__).parents[1] / "support"
TOY = DemoSettings(silos=3, rounds=2, dimensions=4, clip=10.0, weight_cap=5000, seed=3)
MARKETPLACE = Source("marketplace", None, "generated marketplace, for a test")
METRIC_KEYS = {"hr10", "ndcg10", "full_hr10", "full_ndcg10"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One small run, shared by the tests that only read it."""
    output = tmp_path_factory.mktemp("demo")
    return output, run_demo(TOY, MARKETPLACE, output, Observer())


@pytest.mark.slow
def test_results_hold_everything_that_the_documentation_promises(
    toy: tuple[Path, dict[str, Any]],
) -> None:
    output, _ = toy
    results = json.loads((output / "results.json").read_text())
    assert {
        "dataset", "clients", "rounds", "seed", "tie_rule", "rounds_detail", "bit_identical",
        "upload_bytes_per_parameter", "seconds", "metrics",
    } <= results.keys()  # fmt: skip
    assert set(results["seconds"]) == {
        "train", "quantise", "encrypt", "upload", "aggregate", "decrypt",
    }  # fmt: skip
    assert all(value > 0 for value in results["seconds"].values())
    assert set(results["metrics"]) == set(results_.METRIC_SYSTEMS)
    assert all(set(metrics) == METRIC_KEYS for metrics in results["metrics"].values())


@pytest.mark.slow
def test_every_decrypted_sum_equals_the_sum_in_the_clear(
    toy: tuple[Path, dict[str, Any]],
) -> None:
    _, results = toy
    assert results["bit_identical"] is True
    rows = results["rounds_detail"]
    assert [row["round"] for row in rows] == [1, 2]
    assert all(row["sha256_decrypted"] == row["sha256_clear"] for row in rows)
    assert len({row["sha256_clear"] for row in rows}) == 2, "rounds must differ from one another"
    assert results["metrics"]["federated_encrypted"] == results["metrics"]["federated_plaintext"]


@pytest.mark.slow
def test_poison_is_refused_in_every_round_and_is_in_no_sum(
    toy: tuple[Path, dict[str, Any]],
) -> None:
    output, results = toy
    assert (results["poisoners"], results["poison_refused"]) == (1, 2)
    rows = results["rounds_detail"]
    assert [(row["contributors"], row["refused"]) for row in rows] == [(3, 1), (3, 1)]
    assert "<b>2 of 2</b>" in (output / "report.html").read_text()


@pytest.mark.slow
def test_metrics_follow_from_the_model_file(toy: tuple[Path, dict[str, Any]]) -> None:
    output, results = toy
    with np.load(output / "model.npz", allow_pickle=False) as model:
        shared = {name: model[name] for name in ("item_factors", "item_bias")}
        scores = factor_scores(model["user_factors"], shared)
    split = split_leave_one_out(load_dataset("marketplace"))
    again = evaluate(scores, split, TOY.run_config().evaluation_seed)
    for key, value in results["metrics"]["federated_encrypted"].items():
        assert getattr(again, key) == value


@pytest.mark.slow
def test_report_is_one_file_that_needs_no_network(toy: tuple[Path, dict[str, Any]]) -> None:
    output, results = toy
    page = (output / "report.html").read_text()
    assert page.count("<svg") == 3
    for forbidden in ("<script", "src=", "@import", "url(http", "<link"):
        assert forbidden not in page
    assert f"{results['metrics']['federated_encrypted']['hr10']:.3f}" in page


def tampered(silos: int, output: Path) -> dict[str, Any]:
    """Results of a run of one round in which silo 1 flips a residue of its upload."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from secagg_bench.demo.run import Observer, run_demo\n"
        "from secagg_bench.demo.results import passed\n"
        "from secagg_bench.demo.settings import DemoSettings, Source\n"
        "settings = DemoSettings(\n"
        "    silos=int(sys.argv[2]), rounds=1, dimensions=4, clip=10.0, max_attempts=1\n"
        ")\n"
        "source = Source('marketplace', None, 'generated')\n"
        "results = run_demo(settings, source, Path(sys.argv[1]), Observer(), 'tampering_client')\n"
        "sys.exit(0 if passed(results) else 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(output), str(silos)],
        env=os.environ | {"PYTHONPATH": str(SUPPORT)},
        timeout=300,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    results: dict[str, Any] = json.loads((output / "results.json").read_text())
    assert results["bit_identical"] is False
    return results


@pytest.mark.slow
def test_one_flipped_residue_costs_its_client_the_round_and_nobody_else(tmp_path: Path) -> None:
    results = tampered(4, tmp_path)
    (row,) = results["rounds_detail"]
    assert (row["attempt"], row["contributors"], row["equal"]) == (1, 3, False)
    assert row["refused"] == 2, "the flipped residue and the poison"
    assert row["sha256_decrypted"] is not None
    assert results["failure"] == ""
    assert results["metrics"]["federated_encrypted"] is not None


@pytest.mark.slow
def test_one_flipped_residue_that_breaks_the_quorum_ends_the_run_with_an_error(
    tmp_path: Path,
) -> None:
    results = tampered(3, tmp_path)
    assert results["rounds_detail"][0]["sha256_decrypted"] is None
    assert "QUORUM_NOT_REACHED" in results["failure"]
    assert "got 2" in results["failure"]
    assert results["metrics"]["federated_encrypted"] is None
    assert not (tmp_path / "model.npz").exists()
    assert "QUORUM_NOT_REACHED" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_the_run_in_the_clear_never_imports_the_cipher() -> None:
    code = (
        "import sys, secagg_bench.demo.clear as clear\n"
        "assert not [name for name in clear.CIPHER_MODULES if name in sys.modules]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_data_comes_from_the_folder_that_is_given(tmp_path: Path) -> None:
    assert find_data(tmp_path, tmp_path).data_dir == tmp_path


def test_marketplace_stands_in_where_nothing_can_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secagg_bench.demo import settings
    from secagg_recommender.interactions import DataError

    def unreachable(_folder: Path) -> Path:
        raise DataError("expected an index; it is unreachable")

    monkeypatch.setattr(settings, "fetch_movielens", unreachable)
    source = find_data(None, tmp_path)
    assert source.dataset == "marketplace"
    assert "unreachable" in source.note


@pytest.mark.slow
@pytest.mark.realdata
def test_encrypted_training_reaches_the_quality_that_is_claimed(
    data_dir: Path, tmp_path: Path
) -> None:
    settings = DemoSettings()
    results = run_demo(settings, Source("ml-100k", data_dir, "real"), tmp_path, Observer())
    ours, metrics = results["metrics"]["federated_encrypted"], results["metrics"]
    assert results["dataset"] == "ml-100k"
    assert results["bit_identical"] is True
    assert ours["hr10"] >= 0.63
    assert ours["ndcg10"] >= 0.355
    assert ours["full_hr10"] >= 0.11
    assert ours["hr10"] >= metrics["local"]["hr10"] + 0.05
    assert ours["hr10"] >= metrics["centralised"]["hr10"] - 0.02
    clear = metrics["federated_float"]
    assert clear["hr10"] >= 0.63
    assert clear["ndcg10"] >= 0.355
    assert clear["full_hr10"] >= 0.11


def test_report_escapes_what_it_quotes() -> None:
    results = {
        "source": "<b>data</b>", "clients": 3, "rounds": 1, "parameters": 10, "wall_seconds": 1.0,
        "bit_identical": False, "failure": "<script>alert(1)</script>", "upload_bytes": 28672,
        "upload_bytes_per_parameter": 2867.2, "float32_bytes": 40, "seed": 0, "tie_rule": "none",
        "seconds": dict.fromkeys(
            ("train", "quantise", "encrypt", "upload", "aggregate", "decrypt"), 1.0),
        "metrics": dict.fromkeys(results_.METRIC_SYSTEMS) | {
            "popular": dict.fromkeys(METRIC_KEYS, 0.1)},
        "curves": {name: [{"round": 1, "hr10": 0.5}] for name in (
            "local", "centralised", "federated_float", "federated_plaintext")},
        "poisoners": 1, "poison_refused": 0,
        "rounds_detail": [{"round": 1, "contributors": 0, "refused": 0, "sha256_decrypted": None,
                           "equal": False}],
        "machine": {"platform": "here", "python": "3.11", "versions": {"secagg": "0"}},
    }  # fmt: skip
    page = render(results)
    assert "<script" not in page
    assert "<b>data</b>" not in page
