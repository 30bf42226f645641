"""Many runs, in several processes, and a file of what came of them.

::

    PYTHONPATH=tests/support python -m simulation --operations 100000 --output results.json

Each batch of runs follows from its seed. A file that is there is gone on with, from the seed that
follows its last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from secagg_bench.one_core import machine
from simulation.batches import Tally, batch

_MOST_BATCHES = 100_000


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1, help="of the first batch")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    first, following, total, before_s = _so_far(chosen.output, chosen.seed)
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    # Schedulers that share by session give each worker as much as any other program.
    with context.Pool(chosen.workers, os.setsid, maxtasksperchild=20) as pool:
        for done in pool.imap(batch, range(following, following + _MOST_BATCHES)):
            total.add(done)
            following += 1
            operations = total.operations.total()
            seconds = before_s + time.monotonic() - started
            print(
                f"{operations} operations, {total.runs} runs, {total.injected.total()} faults, "
                f"{len(total.violations)} violations, {seconds:.0f} s",
                *done.violations,
                sep="\n",
                flush=True,
            )
            if chosen.output:
                results = _results(total, (first, following - 1), chosen.workers, seconds)
                chosen.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            if operations >= chosen.operations:
                break
        pool.terminate()
    return 1 if total.violations else 0


def _so_far(file: Path | None, seed: int) -> tuple[int, int, Tally, float]:
    """The first seed and the following one, what came of those before, and how long that took."""
    if file is None or not file.exists():
        return seed, seed, Tally(), 0.0
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    total = Tally(
        found["runs"],
        Counter(found["operations_by_kind"]),
        Counter(found["faults_by_kind"]),
        Counter(found["rounds"]),
        Counter(found["tasks"]),
        found["virtual_hours"] * 3600.0,
        found["cpu_seconds"],
        found["violations"],
    )
    return found["seeds"][0], found["seeds"][1] + 1, total, found["seconds"]


def _results(total: Tally, seeds: tuple[int, int], workers: int, seconds: float) -> dict[str, Any]:
    return {
        "seeds": seeds,
        "workers": workers,
        "runs": total.runs,
        "operations": total.operations.total(),
        "faults": total.injected.total(),
        "rounds": dict(sorted(total.rounds.items())),
        "tasks": dict(sorted(total.tasks.items())),
        "violations": total.violations,
        "seconds": round(seconds),
        "cpu_seconds": round(total.cpu_s),
        "virtual_hours": round(total.virtual_s / 3600, 1),
        "operations_by_kind": dict(sorted(total.operations.items())),
        "faults_by_kind": dict(sorted(total.injected.items())),
        "machine": machine(),
    }


if __name__ == "__main__":
    sys.exit(main())
