"""``python -m secagg_bench.load``: many clients at once, hostile ones, hours without a break."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from secagg.commands import exits_cleanly, out
from secagg.errors import InputError

# Before numpy is imported: clients and measuring share the machine with what is measured.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

app = typer.Typer(help=__doc__)


def _say(line: str) -> None:
    out.print(line, highlight=False, soft_wrap=True)


def _write(output: Path, found: dict[str, Any]) -> None:
    """Beside what the other commands have found there before."""
    from secagg_bench.load.place import machine

    output.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(output.read_text("utf-8")) if output.is_file() else {}
    text = json.dumps({**kept, **found, "machine": machine()}, indent=1, sort_keys=True)
    output.write_text(f"{text}\n", "utf-8")
    _say(f"wrote {output}")


@app.command()
@exits_cleanly
def soak(
    output: Annotated[Path, typer.Option(help="where the results go")] = Path(
        "bench/results/soak.json"
    ),
    minutes: Annotated[float, typer.Option(help="how long")] = 60.0,
    folder: Annotated[
        Path | None, typer.Option(help="kits, data and logs; a temporary folder when omitted")
    ] = None,
) -> None:
    """Rounds without a break, one task after another; what the programs hold after it."""
    from secagg_bench.load.soak import Soak, Wanted

    with tempfile.TemporaryDirectory(prefix="secagg-soak-") as scratch:
        run = Soak(Wanted(minutes=minutes), folder or Path(scratch), _say)
        run.run(lambda found: _write(output, found))


@app.command()
@exits_cleanly
def uploads(
    output: Annotated[Path, typer.Option(help="where the results go")] = Path(
        "bench/results/load.json"
    ),
    clients: Annotated[
        list[int] | None, typer.Option(help="clients at once; 25, 50, 100, 200 when omitted")
    ] = None,
    enrolled: Annotated[int, typer.Option(help="clients that the server knows")] = 1000,
    parameters: Annotated[int, typer.Option(help="of the model")] = 1_000_000,
    folder: Annotated[
        Path | None, typer.Option(help="kits, data and logs; a temporary folder when omitted")
    ] = None,
) -> None:
    """Clients that upload at once; memory, health and speed of their server."""
    from secagg_bench.load.uploads import Wanted, measure

    wanted = Wanted(enrolled=enrolled, parameters=parameters)
    if clients:
        wanted = replace(wanted, clients=tuple(clients))
    with tempfile.TemporaryDirectory(prefix="secagg-load-") as scratch:
        found = measure(wanted, folder or Path(scratch), _say)
    _write(output, {"uploads": found})


@app.command()
@exits_cleanly
def hostile(
    output: Annotated[Path, typer.Option(help="where the results go")] = Path(
        "bench/results/load.json"
    ),
    attack: Annotated[list[str] | None, typer.Option(help="one by name; all when omitted")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="kits, data and logs; a temporary folder when omitted")
    ] = None,
) -> None:
    """Attacks, while honest clients upload; what the server holds meanwhile."""
    from secagg_bench.load.attackers import ATTACKS
    from secagg_bench.load.hostile import CALM, Wanted, measure

    if unknown := set(attack or ()) - {CALM, *ATTACKS}:
        raise InputError(
            f"expected attacks among {', '.join([CALM, *ATTACKS])}; got {sorted(unknown)}"
        )
    wanted = Wanted(attacks=tuple(attack)) if attack else Wanted()
    with tempfile.TemporaryDirectory(prefix="secagg-hostile-") as scratch:
        found = measure(wanted, folder or Path(scratch), _say)
    _write(output, {"hostile": found})


@app.command()
@exits_cleanly
def draw(
    results: Annotated[Path, typer.Option(help="folder of load.json and soak.json")] = Path(
        "bench/results"
    ),
    folder: Annotated[Path, typer.Option(help="where the figures go")] = Path("docs"),
) -> None:
    """Draw what was measured before: load.svg and soak.svg."""
    from secagg_bench.load.figures import load_figure, save, soak_figure

    for name, make in (("load", load_figure), ("soak", soak_figure)):
        file = results / f"{name}.json"
        if file.is_file():
            save(make(json.loads(file.read_text("utf-8"))), folder / f"{name}.svg")
            _say(f"wrote {folder / name}.svg")


if __name__ == "__main__":
    sys.exit(app())
