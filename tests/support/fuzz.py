"""Fuzz for a while, and add what was reached to a file of results: ``python -m fuzz wire``.

Each target has a process of its own and a folder of work, in which its corpus grows from run to
run. Nothing here needs atheris but the process that `fuzz_one` is.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fuzz_inputs import FOLDER, corpus_of, found_of
from fuzz_targets import NAMES, target

__all__ = ["Run", "add_run", "fuzz", "installed", "minimised", "work_folder"]

MOST_BYTES = 16 << 10
"""Of one input."""
TIMEOUT_S = 120
"""After which nobody waits for an input; `fuzz_one` looks at processor time long before."""
RSS_MB = 2048

_SUPPORT = Path(__file__).parent
_ROOT = _SUPPORT.parents[1]
_RESULTS = _ROOT / "bench" / "results" / "fuzz.json"
_STATUS = re.compile(rb"^#\d+\s+(\w+)\s+cov: (\d+) ft: (\d+) corp: (\d+)/.*?rss: (\d+)Mb", re.M)
_STATISTIC = re.compile(rb"^stat::(\w+):\s+(\d+)", re.M)
_STOPPED = ("crash-*", "timeout-*", "oom-*", "leak-*")


@dataclass(frozen=True, slots=True)
class Run:
    """What one process of a target did.

    Attributes:
        wall_s, cpu_s: seconds, those of loading and instrumenting among them.
        executions: inputs that were decoded.
        features: of coverage, after the corpus was read and at the end.
        corpus: inputs at the end.
        rss_mb: resident memory, after the corpus was read and at the end.
        peak_rss_mb: and the most there was.
        slowest_s: the slowest input's whole seconds.
        findings: names of the files of those new in this run.
    """

    wall_s: float
    cpu_s: float
    executions: int
    features: tuple[int, int]
    corpus: int
    rss_mb: tuple[int, int]
    peak_rss_mb: int
    slowest_s: int
    findings: tuple[str, ...]

    @property
    def per_second(self) -> float:
        """Executions a second of wall time."""
        return self.executions / self.wall_s


def installed() -> bool:
    """Whether atheris is there."""
    return importlib.util.find_spec("atheris") is not None


def work_folder(name: str, work: Path) -> Path:
    """A target's folder of work, with its committed corpus, seeds and failures of old in it."""
    folder = work / name
    for each in ("corpus", "findings", "stopped"):
        (folder / each).mkdir(parents=True, exist_ok=True)
    known = [*target(name).seeds().values(), *corpus_of(name), *found_of(name).values()]
    for data in known:
        (folder / "corpus" / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(
            data
        )
    return folder


def fuzz(name: str, seconds: int, work: Path) -> Run:
    """Fuzz one target in a process of its own, for so many seconds after it has loaded."""
    folder = work_folder(name, work)
    before = set(_findings(folder))
    started, spent = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    log = folder / "log"
    with log.open("wb") as output:
        subprocess.run(
            _command(
                name, folder, f"-max_total_time={seconds}", "-print_final_stats=1", "-reload=0"
            ),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(folder),
            check=False,
        )
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return read_log(
        log.read_bytes(),
        time.monotonic() - started,
        now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime,
        sorted(set(_findings(folder)) - before),
    )


def _command(name: str, folder: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "fuzz_one", name, str(folder / "findings")),
        *(f"-max_len={MOST_BYTES}", f"-timeout={TIMEOUT_S}", f"-rss_limit_mb={RSS_MB}"),
        f"-artifact_prefix={folder / 'stopped'}{os.sep}",
        *options,
        str(folder / "corpus"),
    ]


def _environment(folder: Path) -> dict[str, str]:
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join(filter(None, (str(_SUPPORT), os.environ.get("PYTHONPATH"))))
    return os.environ | threads | {"PYTHONPATH": path, "TMPDIR": str(scratch)}


def _findings(folder: Path) -> Iterator[str]:
    for path in (folder / "findings").iterdir():
        if path.suffix != ".txt":
            yield path.name
    for pattern in _STOPPED:
        yield from (path.name for path in (folder / "stopped").glob(pattern))


def read_log(log: bytes, wall_s: float, cpu_s: float, findings: Sequence[str]) -> Run:
    lines = _STATUS.findall(log)
    if not lines:
        raise RuntimeError(f"expected a fuzzer that starts; it said: {log[-3000:].decode()}")
    first = next((line for line in lines if line[0] == b"INITED"), lines[0])
    last = lines[-1]
    counts = {key: int(value) for key, value in _STATISTIC.findall(log)}
    return Run(
        round(wall_s, 1),
        round(cpu_s, 1),
        counts.get(b"number_of_executed_units", 0),
        (int(first[2]), int(last[2])),
        int(last[3]),
        (int(first[4]), int(last[4])),
        counts.get(b"peak_rss_mb", int(last[4])),
        counts.get(b"slowest_unit_time_sec", 0),
        tuple(findings),
    )


def add_run(results: dict[str, Any], name: str, run: Run) -> None:
    """Add a run to the figures of its target."""
    targets = results.setdefault("targets", {})
    known: dict[str, Any] = targets.setdefault(name, {})
    for key in ("wall_s", "cpu_s", "executions"):
        known[key] = round(known.get(key, 0) + getattr(run, key), 1)
    known["runs"] = known.get("runs", 0) + 1
    known["per_second"] = round(known["executions"] / known["wall_s"], 1)
    known["features"] = [known.get("features", run.features)[0], run.features[1]]
    known["corpus"] = run.corpus
    for key in ("peak_rss_mb", "slowest_s"):
        known[key] = max(known.get(key, 0), getattr(run, key))
    known["last_run"] = {"wall_s": run.wall_s, "rss_mb": list(run.rss_mb)}
    known["findings"] = sorted({*known.get("findings", ()), *run.findings})


def _describe(targets: dict[str, Any]) -> None:
    """Put targets into their order, each with what a table says of it."""
    for name in [name for name in NAMES if name in targets]:
        known, chosen = targets.pop(name), target(name)
        kept = {"kept": len(found_of(name))}
        targets[name] = {"decodes": chosen.decodes, "entries": chosen.entries} | known | kept


@contextmanager
def _results(file: Path) -> Iterator[dict[str, Any]]:
    """The results in a file, written back at the end; other processes wait."""
    file.touch()
    with file.open("r+", encoding="utf-8") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        text = opened.read()
        results: dict[str, Any] = json.loads(text) if text else {}
        yield results
        opened.seek(0)
        opened.truncate()
        opened.write(json.dumps(results, indent=2) + "\n")


def minimised(name: str, work: Path, most_bytes: int) -> list[bytes]:
    """The smallest inputs of a target's work that reach all it has reached, up to a size in all.

    Seeds are left out: they are made anew each time.
    """
    folder = work_folder(name, work)
    merged = folder / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir()
    command = [*_command(name, folder, "-merge=1")[:-1], str(merged), str(folder / "corpus")]
    subprocess.run(command, check=True, capture_output=True, env=_environment(folder))
    seeds = set(target(name).seeds().values())
    kept: list[bytes] = []
    for data in sorted((path.read_bytes() for path in merged.iterdir()), key=lambda d: (len(d), d)):
        most_bytes -= len(base64.b64encode(data)) + 1
        if most_bytes < 0:
            break
        if data not in seeds:
            kept.append(data)
    return kept


def _write_corpus(name: str, inputs: Sequence[bytes]) -> None:
    lines = sorted(base64.b64encode(data).decode() for data in inputs)
    text = "".join(f"{line}\n" for line in lines)
    (FOLDER / "corpus" / f"{name}.txt").write_text(text, "ascii")


def _machine() -> dict[str, str]:
    from importlib.metadata import version

    from secagg_bench.one_core import machine

    return machine() | {"atheris": version("atheris")}


def _main() -> None:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(NAMES)}; all of them if none")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--work", type=Path, default=_ROOT / "build" / "fuzz")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="added to")
    parser.add_argument(
        "--minimise", type=int, metavar="BYTES", help="write the corpus anew; no fuzzing"
    )
    given = parser.parse_args()
    if not installed():
        parser.exit(1, "atheris is not installed: pip install 'secagg[fuzz]'\n")
    for name in given.targets or NAMES:
        if given.minimise is not None:
            kept = minimised(name, given.work, given.minimise)
            _write_corpus(name, kept)
            print(f"{name}: {len(kept)} inputs beside the seeds")
            continue
        run = fuzz(name, given.seconds, given.work)
        with _results(given.results) as results:
            results["machine"] = _machine()
            add_run(results, name, run)
            _describe(results["targets"])
        print(json.dumps({"target": name, "per_second": round(run.per_second, 1)} | asdict(run)))


if __name__ == "__main__":
    _main()
