"""``secagg-bench``: what encryption costs here, beside what others offer, all in one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secagg.commands import exits_cleanly, out
from secagg.errors import ConfigurationError

if TYPE_CHECKING:
    from secagg_bench.suite.rows import Row
    from secagg_bench.suite.scenarios import Rounds, Scenario

__all__ = ["app"]

app = typer.Typer(help=__doc__, no_args_is_help=True)


def _say(line: str) -> None:
    out.print(line, highlight=False, soft_wrap=True)


@app.command("list")
@exits_cleanly
def list_scenarios() -> None:
    """Say which scenarios there are, and what each of them asks."""
    from secagg_bench.suite.scenarios import scenarios

    for name, scenario in scenarios().items():
        _say(f"{name}: {scenario.question}")
        _say(f"  {', '.join(each.name for each in scenario.systems)}")


@app.command()
@exits_cleanly
def run(
    only: Annotated[list[str] | None, typer.Argument(help="scenarios; all if none")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="toys of all of them, in minutes")] = False,
    output: Annotated[Path, typer.Option(help="folder of the results, a file a scenario")] = Path(
        "bench/results/suite"
    ),
    environments: Annotated[
        Path, typer.Option(help="where systems with environments of their own have these")
    ] = Path("build/peers"),
) -> None:
    """Measure scenarios; a system that cannot be had is named and left out."""
    from secagg_bench.suite.rows import write
    from secagg_bench.suite.scenarios import scenarios

    for scenario in _chosen(scenarios(), only or ()):
        rows = list(_measured(scenario.quick() if smoke else scenario, environments))
        if not rows:
            continue  # it has said why
        write(output / f"{scenario.name}.csv", rows)
        _say(f"{scenario.name}: {len(rows)} rows in {output / scenario.name}.csv")


def _measured(scenario: Scenario | Rounds, environments: Path) -> Iterator[Row]:
    from secagg_bench.one_core import hardware
    from secagg_bench.suite import rounds, steps

    if scenario.kind == "rounds":
        return rounds.measured(scenario, hardware(), _say)
    return steps.measured(scenario, hardware(), _say, folder=environments)


def _chosen(known: Mapping[str, Scenario | Rounds], only: Sequence[str]) -> list[Scenario | Rounds]:
    if unknown := set(only) - known.keys():
        raise ConfigurationError(
            f"expected scenarios among {', '.join(known)}; got {', '.join(sorted(unknown))}"
        )
    return [each for name, each in known.items() if not only or name in only]
