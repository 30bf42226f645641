"""The check's benchmark measures what it says and judges it; how fast it is, is no test's job."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secagg.parameters import NormCheck
from secagg.planner import plan_tensors
from secagg.sketch_shape import sketch_bytes
from secagg_bench import check_cost

PLAN = plan_tensors(27_000, max_clients=8, clip=1.0, norm_check=NormCheck())
TARGETS = {
    "server: parse, compute, serialise": ("ms", ""),
    "key holder: parse, open, judge": ("ms", ""),
    "server and key holder": ("ms", ">= 3x"),
    "the same, textbook at its leanest": ("ms", ""),
    "bytes to the key holder, of the upload's": ("%", "<= 15 %"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    output = tmp_path_factory.mktemp("check") / "results.json"
    arguments = ["--largest", "27000", "--pairs", "1", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "secagg_bench.check_cost", *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.stdout, json.loads(output.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def size(finished: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    (only,) = finished[1]["sizes"]
    return dict(only)


def test_the_results_have_the_documented_shape(
    finished: tuple[str, dict[str, Any]], size: dict[str, Any]
) -> None:
    results = finished[1]
    assert set(results) == {"pairs", "machine", "sizes"}
    assert results["pairs"] == 1
    assert {"python", "numpy", "tenseal", "processor"} <= set(results["machine"])
    assert (size["parameters"], size["max_clients"]) == (27_000, 8)
    assert size["plan_digest"] == PLAN.digest.hex()
    assert size["sum_ms"] > 0
    assert size["hash_ms"] > 0


def test_every_row_is_complete_and_judged_by_its_target(size: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in size["rows"]}
    assert rows.keys() == TARGETS.keys()
    for name, row in rows.items():
        assert (row["unit"], row["target"]) == TARGETS[name]
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("ours", "tenseal", "ratio"))
    assert rows["server and key holder"]["met"] is (rows["server and key holder"]["ratio"] >= 3)
    # A plan for a few clients and a small model: the sketch is larger than the upload.
    assert rows["bytes to the key holder, of the upload's"]["met"] is False
    assert [rows[name]["met"] for name, (_, target) in TARGETS.items() if not target] == [None] * 3


def test_the_whole_check_is_the_server_and_the_key_holder(size: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in size["rows"]}
    server = rows["server: parse, compute, serialise"]
    holder = rows["key holder: parse, open, judge"]
    for side in ("ours", "tenseal"):
        assert rows["server and key holder"][side] == pytest.approx(server[side] + holder[side])


def test_bytes_are_those_of_the_plans(size: dict[str, Any]) -> None:
    variants = {variant["name"]: variant for variant in size["variants"]}
    usual = variants["16 sketches"]
    unchecked = plan_tensors(27_000, max_clients=8, clip=1.0)
    assert usual["sketch_bytes"] == sketch_bytes(PLAN, direction=False)
    assert usual["upload_bytes"] == PLAN.payload_bytes
    assert usual["unchecked_upload_bytes"] == unchecked.payload_bytes
    assert usual["share"] == usual["sketch_bytes"] / usual["upload_bytes"]


def test_variants_do_what_their_names_say(size: dict[str, Any]) -> None:
    usual, more, directed, beside = size["variants"]
    assert [each["sketches"] for each in size["variants"]] == [16, 32, 16, 16]
    # Twice the rows, of which each shows half as many values, under a mask that stays as large.
    assert 1.9 < more["sketch_bytes"] / usual["sketch_bytes"] <= 2
    assert directed["sketch_bytes"] > usual["sketch_bytes"]
    assert directed["upload_bytes"] == usual["upload_bytes"] < beside["upload_bytes"]
    assert all(each["hashed_sums"] < each["sums"] for each in size["variants"])


def test_the_textbook_finds_the_norm_with_the_keys_it_needs(size: dict[str, Any]) -> None:
    facts = size["textbook"]
    assert 0 < facts["relative_error"] < 0.01
    assert (facts["ring_degree"], facts["modulus_bits"]) == (8192, [60, 40, 40, 60])
    assert facts["ciphertexts"] == math.ceil(27_000 / 4096)
    # A key switch takes a pair of polynomials over all primes for each of three; twelve rotations.
    pair = 2 * 8192 * (60 + 40 + 40 + 60) // 8
    assert 3 * pair < facts["relinearisation_key_bytes"] < 1.3 * 3 * pair
    assert facts["galois_key_bytes"] == pytest.approx(12 * facts["relinearisation_key_bytes"], 0.01)
    # Two primes of three, in eight bytes a residue.
    assert facts["lean_upload_bytes"] == pytest.approx(7 * 2 * 2 * 8192 * 8, 0.01)


def test_a_wrong_norm_stops_the_benchmark(tmp_path: Path) -> None:
    theirs = check_cost._Textbook(np.full(5000, 0.01, dtype=np.float32), tmp_path)
    theirs.pair()
    theirs._expected *= 1.05
    with pytest.raises(RuntimeError, match="squared norm"):
        theirs.pair()


def test_the_table_says_what_was_met(finished: tuple[str, dict[str, Any]]) -> None:
    for word in ("secagg", "textbook", "met", "evaluation keys", "27,000 parameters"):
        assert word in finished[0]
