"""Tables of what was simulated and fuzzed, from result files."""

from __future__ import annotations

from typing import Any

__all__ = ["fuzzing", "simulation"]


def fuzzing(results: dict[str, Any]) -> str:
    """A line for each target."""
    rows = []
    for name, target in results["targets"].items():
        entries = ", ".join(f"`{entry}`" for entry in target["entries"])
        features, last = target["features"], target["last_run"]
        memory = last["rss_mb"]
        rows.append(
            f"| `{name}` | {target['decodes']} | {entries} | {target['executions']:,} "
            f"| {target['wall_s'] / 60:.0f} ({target['cpu_s'] / 60:.0f}) "
            f"| {features[0]:,} to {features[1]:,} "
            f"| {memory[0]} to {memory[1]} in {last['wall_s'] / 60:.0f} min "
            f"| {target['slowest_s']} s | {target['kept']} |"
        )
    machine, targets = results["machine"], results["targets"].values()
    executions, wall_s, cpu_s = (
        sum(target[key] for target in targets) for key in ("executions", "wall_s", "cpu_s")
    )
    note = (
        f"{executions:,} executions in {wall_s / 3600:.1f} hours, of which the processor gave "
        f"{cpu_s / 3600:.1f}; sums over all runs. Features are libFuzzer's, from the first run's "
        "seeds to the last run's end; memory is resident, after the corpus was read and at the end "
        "of the last run; kept are inputs that once failed, all mended. "
        f"atheris {machine['atheris']}, Python {machine['python']}, {machine['processor']}. From "
        "[bench/results/fuzz.json](../bench/results/fuzz.json), to which `make fuzz` adds."
    )
    head = (
        "| target | decodes | enters at | executions | minutes (of processor) | features "
        "| memory, MB | slowest | kept |"
    )
    return "\n".join([head, "|---|---|---|--:|--:|--:|--:|--:|--:|", *rows, "", note, ""])


def simulation(results: dict[str, Any]) -> str:
    """What a long run came to, in one paragraph."""
    found = len(results["violations"]) or "no"
    rounds = ", ".join(f"{count:,} {name}" for name, count in results["rounds"].items())
    tasks = ", ".join(f"{count:,} {name}" for name, count in results["tasks"].items())
    machine = results["machine"]
    return (
        f"{results['operations']:,} operations in {results['runs']:,} runs with "
        f"{results['faults']:,} faults and events: **{found} violation"
        f"{'' if found == 1 else 's'}**. Attempts: {rounds}. Tasks: {tasks}. "
        f"{results['virtual_hours']:,} hours passed in these worlds and "
        f"{results['seconds'] / 60:.0f} minutes outside, on {results['workers']} workers, which "
        f"took {results['cpu_seconds'] / 60:.0f} minutes of processor. "
        f"Seeds {results['seeds'][0]} to {results['seeds'][1]}, {machine['processor']}. From "
        "[bench/results/simulation.json](../bench/results/simulation.json), written by "
        "`make simulate`, where every kind of operation and fault has its count.\n"
    )
