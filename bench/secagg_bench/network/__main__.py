"""Runs every scenario: ``python -m secagg_bench.network`` (root; a quarter of an hour)."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from secagg_bench.network.federation import federation
from secagg_bench.network.hosts import unable
from secagg_bench.network.participant import CLIENTS, plan
from secagg_bench.network.scenarios import SCENARIOS, Scenario, play
from secagg_bench.one_core import machine

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Argument(help="names; all if none")] = None,
    output: Annotated[
        Path | None, typer.Option(help="write the figures here as JSON, beside those of others")
    ] = None,
    seed: Annotated[int, typer.Option(help="of what happens on the wire")] = 1,
    logs: Annotated[Path | None, typer.Option(help="keep data and logs in this folder")] = None,
) -> None:
    """Run scenarios, each as a task of one federation; ends with 1 if one is not as it must be."""
    if why := unable():
        sys.exit(why)
    found: dict[str, Any] = {}
    if output is not None and output.exists():
        found = {each["name"]: each for each in json.loads(output.read_text())["scenarios"]}
    chosen = [each for each in SCENARIOS if not only or each.name in only]
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="secagg-network-"))
        running = stack.enter_context(federation(logs or Path(scratch), seed=seed))
        play(running, Scenario("first", "nothing"))  # loads what is loaded late
        for scenario in chosen:
            outcome = asdict(play(running, scenario))
            # How busy the machine was says how far to believe the seconds.
            outcome["load"] = round(os.getloadavg()[1], 1)
            found[scenario.name] = {"name": scenario.name, "fault": scenario.fault} | outcome
            Console().print(scenario.fault, outcome)
            if output is not None:
                _write(output, seed, found)
    sys.exit(any(found[each.name]["violations"] for each in chosen))


def _write(output: Path, seed: int, found: dict[str, Any]) -> None:
    """The figures, those of earlier runs among them, in the order of the table."""
    figures = {
        "machine": machine() | {"cores": os.cpu_count()},
        "seed": seed,
        "clients": CLIENTS,
        "upload_bytes": plan().payload_bytes,
        "scenarios": [found[each.name] for each in SCENARIOS if each.name in found],
    }
    output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
