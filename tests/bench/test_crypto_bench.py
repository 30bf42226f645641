"""The benchmark runs and writes what it promises; how fast it is, is no test's business."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from secagg.planner import plan_tensors

TARGETS = {
    "wire": ("bytes/parameter", "<= 3.6 bytes"),
    "client: encode, encrypt, serialise": ("ms", ">= 10x"),
    "client: the same with quantising": ("ms", ">= 7x"),
    "server: parse, validate, add": ("ms", ">= 80x"),
    "server: the same, with SHA-256 and receipt": ("ms", ""),
    "key holder: decrypt, decode": ("ms", ">= 2x"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    output = tmp_path_factory.mktemp("crypto") / "results.json"
    arguments = ["--parameters", "5000", "--pairs", "1", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "secagg_bench.crypto", *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.stdout, output


def test_the_results_have_the_documented_shape(finished: tuple[str, Path]) -> None:
    results = json.loads(finished[1].read_text())
    assert set(results) == {
        *("parameters", "pairs", "plan_digest", "digits", "float32_bytes_per_parameter"),
        *("machine", "rows", "server_memory"),
    }
    assert results["parameters"] == 5000
    assert results["pairs"] == 1
    assert results["float32_bytes_per_parameter"] == 4
    plan = plan_tensors(5000, max_clients=1000, clip=1.0)
    assert results["plan_digest"] == plan.digest.hex()
    assert results["digits"] == plan.layouts[0].digits
    assert {"python", "numpy", "tenseal"} <= set(results["machine"])


def test_every_row_is_complete_and_judged_by_its_target(finished: tuple[str, Path]) -> None:
    rows = {row["name"]: row for row in json.loads(finished[1].read_text())["rows"]}
    assert rows.keys() == TARGETS.keys()
    for name, row in rows.items():
        assert (row["unit"], row["target"]) == TARGETS[name]
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("ours", "tenseal", "ratio"))
        if not row["target"]:
            assert row["met"] is None
            continue
        limit = float(row["target"].split()[1].rstrip("x"))
        assert row["met"] is (row["ours"] <= limit if name == "wire" else row["ratio"] >= limit)


def test_the_bytes_are_those_of_the_plan(finished: tuple[str, Path]) -> None:
    rows = {row["name"]: row for row in json.loads(finished[1].read_text())["rows"]}
    payload = plan_tensors(5000, max_clients=1000, clip=1.0).payload_bytes
    # Beyond the ciphertexts, an upload is a sealed seed and a receipt: less than 2 kB.
    assert 0 < rows["wire"]["ours"] * 5000 - payload < 2000


def test_memory_is_measured_for_growing_cohorts(finished: tuple[str, Path]) -> None:
    memory = json.loads(finished[1].read_text())["server_memory"]
    assert [line["clients"] for line in memory] == [3, 30, 300]
    assert all(line["peak_bytes"] > 1 << 20 for line in memory)


def test_the_table_says_what_was_met(finished: tuple[str, Path]) -> None:
    table = finished[0]
    for word in ("secagg", "CKKSVector", "met", "float32", "peak memory"):
        assert word in table
