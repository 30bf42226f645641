"""Runs that follow from a number, and what came of them."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, Phase, given, seed, settings

from simulation.faults import Run
from simulation.strategy import runs
from simulation.world import simulate

__all__ = ["RUNS", "Tally", "batch", "reduced"]

RUNS = 10
"""In each batch."""


@dataclass
class Tally:
    """What came of some runs.

    Attributes:
        operations, injected, rounds, tasks: counts, by kind.
        violations: what did not hold, each with the smallest run that was found.
    """

    runs: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    rounds: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    violations: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count another's as well."""
        for name in ("operations", "injected", "rounds", "tasks"):
            getattr(self, name).update(getattr(other, name))
        for name in ("runs", "virtual_s", "cpu_s", "violations"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def batch(number: int) -> Tally:
    """Some runs that follow from a number; what fails, as it is and `reduced`."""
    tally, started = Tally(), time.process_time()
    failed: list[Run] = []

    @seed(number)
    @settings(
        max_examples=RUNS,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(runs())
    def each(run: Run) -> None:
        report = simulate(run)
        tally.runs += 1
        tally.operations += report.operations
        tally.injected += report.injected
        tally.rounds += report.rounds
        tally.tasks[report.ended] += 1
        tally.virtual_s += report.seconds
        if report.violations:
            failed.append(run)
        tally.violations += [f"{what}: {run!r}" for what in report.violations]

    each()
    tally.violations += [f"reduced: {reduced(run)!r}" for run in failed]
    tally.cpu_s = time.process_time() - started
    return tally


def reduced(run: Run) -> Run:
    """A run that fails, without what it does not need to fail."""
    for each in run.happenings:
        without = replace(run, happenings=tuple(h for h in run.happenings if h is not each))
        if simulate(without).violations:
            run = without
    return run
