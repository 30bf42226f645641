"""The fuzzer itself: some seconds of every target, and what the runner makes of a run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fuzz
import pytest
from fuzz_inputs import corpus_of
from fuzz_targets import NAMES, target

SECONDS_IN_ALL = 300
MOST_GROWTH_MB = 50
"""What a corpus and the caches take that fill while it grows."""

needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed: it has wheels for Linux on x86-64",
)

RUN = fuzz.Run(
    wall_s=10.0,
    cpu_s=8.0,
    executions=1000,
    features=(100, 120),
    corpus=40,
    rss_mb=(80, 90),
    peak_rss_mb=91,
    slowest_s=0,
    findings=(),
)


@needs_atheris
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_some_seconds_of_fuzzing_find_nothing(name: str, tmp_path: Path) -> None:
    run = fuzz.fuzz(name, SECONDS_IN_ALL // len(NAMES), tmp_path)
    print(f"{name}: {run.executions} executions, {run.per_second:.0f} a second")
    assert run.findings == ()
    assert run.rss_mb[1] - run.rss_mb[0] <= MOST_GROWTH_MB
    assert run.executions > len(target(name).seeds()) + len(corpus_of(name))


BAD_TARGET = """
from fuzz_inputs import Target

def one(data):
    if data.startswith(b"bad"):
        raise KeyError("wrong")
    if data.startswith(b"die"):
        raise SystemExit(1)

def target(name):
    return Target(name, "", (), one, lambda: {"good": b"go"})
"""


@needs_atheris
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_input_that_raises_is_kept_and_the_fuzzing_goes_on(tmp_path: Path) -> None:
    """Twice the same place is one finding; the corpus brings both inputs."""
    (tmp_path / "fuzz_targets.py").write_text(BAD_TARGET, "utf-8")
    corpus, findings = tmp_path / "corpus", tmp_path / "findings"
    for folder in (corpus, findings):
        folder.mkdir()
    for data in (b"bad 1", b"bad 2", b"go"):
        (corpus / data.hex()).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-m", "fuzz_one", "any", str(findings), "-runs=2000", str(corpus)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(fuzz.__file__).parent)},
        capture_output=True,
        check=False,
    )
    assert b"DONE" in done.stderr, done.stderr[-2000:]
    (found,) = (path for path in findings.iterdir() if path.suffix != ".txt")
    assert found.name.startswith("KeyError-fuzz_targets-")
    assert found.read_bytes().startswith(b"bad")
    assert "wrong" in found.with_suffix(".txt").read_text("utf-8")


LOG = b"""
#2\tINITED cov: 10 ft: 100 corp: 2/9b exec/s: 0 rss: 80Mb
#512\tNEW    cov: 12 ft: 118 corp: 39/9b lim: 4 exec/s: 99 rss: 85Mb L: 3/8 MS: 1 Custom-
#1000\tDONE   cov: 12 ft: 120 corp: 40/9b lim: 4 exec/s: 100 rss: 90Mb
stat::number_of_executed_units: 1000
stat::slowest_unit_time_sec:    0
stat::peak_rss_mb:              91
"""


def test_a_log_is_read() -> None:
    assert fuzz.read_log(LOG, 10.0, 8.0, []) == RUN


def test_a_fuzzer_that_did_not_start_says_why() -> None:
    with pytest.raises(RuntimeError, match="no such target"):
        fuzz.read_log(b"no such target", 1.0, 1.0, [])


def test_runs_add_up() -> None:
    """Times and executions are sums; coverage goes from the first start to the last end."""
    results: dict[str, Any] = {}
    fuzz.add_run(results, "wire", RUN)
    longer = replace(
        RUN, wall_s=30.0, features=(119, 130), corpus=44, rss_mb=(85, 86), findings=("X",)
    )
    fuzz.add_run(results, "wire", longer)
    assert results["targets"]["wire"] == {
        "wall_s": 40.0,
        "cpu_s": 16.0,
        "executions": 2000,
        "runs": 2,
        "per_second": 50.0,
        "features": [100, 130],
        "corpus": 44,
        "peak_rss_mb": 91,
        "slowest_s": 0,
        "last_run": {"wall_s": 30.0, "rss_mb": [85, 86]},
        "findings": ["X"],
    }


def test_a_work_folder_starts_from_all_that_is_known(tmp_path: Path) -> None:
    folder = fuzz.work_folder("wire", tmp_path)
    kept = {path.read_bytes() for path in (folder / "corpus").iterdir()}
    assert kept >= {*target("wire").seeds().values(), *corpus_of("wire")}
