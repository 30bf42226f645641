"""A failpoint kills where it was told to, at once, and nowhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from secagg.failpoints import NAMES, failpoint

THREE_POINTS = """
import atexit
from secagg.failpoints import failpoint

atexit.register(print, "handlers ran")
try:
    for name in ("round-created", "sum-ready", "round-finished"):
        print("before", name, flush=True)
        print("never flushed", end="")
        failpoint(name)
        print(" but passed", flush=True)
finally:
    print("finally ran")
"""


def run(code: str, failpoint: str | None) -> subprocess.CompletedProcess[str]:
    # Unbuffered output would be flushed before the end could show that nothing flushes it.
    left_out = ("SECAGG_FAILPOINT", "PYTHONUNBUFFERED")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    if failpoint is not None:
        environment["SECAGG_FAILPOINT"] = failpoint
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )


def test_the_named_point_kills_at_once() -> None:
    done = run(THREE_POINTS, "sum-ready")
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.splitlines() == [
        "before round-created",
        "never flushed but passed",
        "before sum-ready",
    ]
    assert done.stderr == ""


@pytest.mark.parametrize("name", [None, "", "chunk-stored"])
def test_no_other_point_kills(name: str | None) -> None:
    done = run(THREE_POINTS, name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("finally ran\nhandlers ran\n")


def test_every_point_kills() -> None:
    """One process, forked for every name: twenty interpreters take long to start."""
    code = """
import os, signal
from secagg import failpoints

for name in sorted(failpoints.NAMES):
    child = os.fork()
    if child == 0:
        failpoints._armed = name
        for other in failpoints.NAMES - {name}:
            failpoints.failpoint(other)
        print("reached", name, flush=True)
        failpoints.failpoint(name)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, name
"""
    done = run(code, None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for name in sorted(NAMES) for word in ("reached", name)]


@pytest.mark.parametrize("name", ["", "sum_ready", "Sum-ready", "sum-ready "])
def test_a_name_that_is_none_raises_where_it_is_used(name: str) -> None:
    with pytest.raises(ValueError, match="one of the failpoints"):
        failpoint(name)


def test_a_name_that_is_none_raises_in_an_armed_process_too() -> None:
    done = run("from secagg.failpoints import failpoint; failpoint('sum-redy')", "sum-ready")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ValueError: expected one of the failpoints")


@pytest.mark.parametrize("name", ["sum_ready", "SUM-READY", "sum-ready,model-stored", " "])
def test_a_name_that_is_none_in_the_environment_is_refused_on_import(name: str) -> None:
    done = run("import secagg.failpoints; print('imported')", name)
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: expected one of the failpoints")
    assert repr(name) in last
    assert "sum-ready" in last


def test_the_variable_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECAGG_FAILPOINT", "sum-ready")
    failpoint("sum-ready")


def test_every_point_that_the_services_name_exists() -> None:
    """A misspelt point raises only when it is reached, which may be never in a test."""
    root = Path(__file__).parents[2]
    used = [
        name
        for folder in ("secagg", "server")
        for file in (root / folder).rglob("*.py")
        for name in _used(file.read_text(encoding="utf-8"))
    ]
    assert set(used) <= NAMES


def _used(source: str) -> list[str]:
    return [part.partition('"')[0] for part in source.split('failpoint("')[1:]]
