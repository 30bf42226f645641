"""``python -m secagg_bench.privacy``: measure, and write results, figure and tables."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from secagg.commands import exits_cleanly, out
from secagg.errors import InputError

# Before numpy is imported: one thread is enough for small matrices, and leaves room for others.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

app = typer.Typer(help=__doc__)


class _Display:
    """Bars for people; a line where nobody watches, whenever there is something new to say."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[found]}"),
        )
        self.progress = Progress(*columns, console=out, disable=not out.is_terminal)
        self._bars: dict[str, TaskID] = {}
        self._said = ""

    def __call__(self, section: str, done: int, total: int, found: str) -> None:
        if section not in self._bars:
            self._bars[section] = self.progress.add_task(section, total=total, found="")
        self.progress.update(self._bars[section], completed=done, found=found)
        if self.progress.disable and found != self._said:
            out.print(f"{section} {done}/{total}: {found}", highlight=False, soft_wrap=True)
            self._said = found


@app.command()
@exits_cleanly
def main(
    output: Annotated[Path, typer.Option(help="where the results go")] = Path(
        "bench/results/privacy.json"
    ),
    figure: Annotated[Path, typer.Option(help="where the figure goes")] = Path("docs/privacy.svg"),
    table: Annotated[Path | None, typer.Option(help="where the Markdown tables go")] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="SECAGG_DATA_DIR", help="folder of ml-100k/ and amazon-beauty/"),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="a section to measure anew; all by default")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a toy run on generated data")] = False,
    draw: Annotated[
        bool, typer.Option("--draw", help="measure nothing: draw what was measured before")
    ] = False,
) -> None:
    """Utility against epsilon, sweeps over one factor, and membership attacks."""
    from secagg_bench.privacy.report import markdown, save_figure
    from secagg_bench.privacy.run import SECTIONS, measure, validate
    from secagg_bench.privacy.settings import Sizes
    from secagg_bench.privacy.settings import quick as quick_sizes

    sections = () if draw else tuple(only or SECTIONS)
    if unknown := set(sections) - set(SECTIONS):
        raise InputError(
            f"expected sections among {', '.join(SECTIONS)}; got {sorted(unknown)}; correct --only"
        )
    if data_dir is None and not quick and not draw:
        raise InputError(
            "expected the folder of ml-100k/ and amazon-beauty/; got none; set SECAGG_DATA_DIR, or "
            "try --quick, which needs no data"
        )
    earlier: dict[str, Any] | None = None
    if (only or draw) and output.is_file():
        earlier = json.loads(output.read_text(encoding="utf-8"))
        validate(earlier)
    command = ["python", "-m", "secagg_bench.privacy", *(["--quick"] if quick else [])]
    display = _Display()
    with display.progress:
        for name in sections:
            earlier = measure(
                quick_sizes() if quick else Sizes(),
                data_dir,
                display,
                name,
                earlier=earlier,
                command=shlex.join([*command, f"--only={name}"]),
            )
            # After each section, because the whole takes long.
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(earlier, indent=1) + "\n", encoding="utf-8")
    if earlier is None:
        raise InputError(f"expected results in {output} to draw; got none; measure first")
    save_figure(earlier, figure)
    if table is not None:
        title = "# What privacy costs: all tables\n\nSee [differential privacy](privacy.md).\n\n"
        table.write_text(title + markdown(earlier), encoding="utf-8")
    out.print(f"wrote {output} and {figure}", highlight=False)


if __name__ == "__main__":
    sys.exit(app())
