"""The `secagg demo` command."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from secagg.commands import exits_cleanly, out, print_table
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg.wire.v1 import round_pb2
from secagg_bench.demo.report import LABELS
from secagg_bench.demo.results import METRIC_SYSTEMS, passed
from secagg_bench.demo.run import Observer, run_demo
from secagg_bench.demo.settings import DemoSettings, find_data

__all__ = ["demo"]

_DEFAULTS = DemoSettings()
_PLAIN_EVERY_S = 5.0


class _Display(Observer):
    """Bars for people; a line every few seconds where nobody watches."""

    def __init__(self, settings: DemoSettings) -> None:
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} rounds"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}"),
        )
        self.progress = Progress(*columns, console=out, disable=not out.is_terminal)
        self._settings = settings
        self._bars: dict[str, Any] = {}
        self._said_at = 0.0

    def training(self, answer: pb.GetTaskResponse) -> None:
        open_now = [row for row in answer.rounds if row.state < round_pb2.ROUND_STATE_DONE]
        arrived = open_now[-1].uploads if open_now else 0
        megabytes = sum(row.upload_bytes for row in answer.rounds) / 1e6
        detail = (
            f"{arrived}/{self._settings.clients} uploads in this round, {megabytes:.1f} MB in all"
        )
        self._show(
            LABELS["federated_encrypted"], answer.task.rounds_done, answer.task.spec.rounds, detail
        )

    def comparing(self, system: str, round_number: int, rounds: int, hr10: float | None) -> None:
        label = LABELS["local" if system == "local_only" else system]
        detail = f"HR@10 {hr10:.3f}" if hr10 is not None else ""
        self._show(label, round_number, rounds, detail)

    def _show(self, label: str, done: int, total: int, detail: str) -> None:
        if label not in self._bars:
            self._bars[label] = self.progress.add_task(label, total=total, detail="")
        self.progress.update(self._bars[label], completed=done)
        if detail:
            self.progress.update(self._bars[label], detail=detail)
        now = time.monotonic()
        if self.progress.disable and (now - self._said_at > _PLAIN_EVERY_S or done == total):
            self._said_at = now
            out.print(f"{label}: {done}/{total} rounds; {detail}".rstrip("; "), highlight=False)


@exits_cleanly
def demo(
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="SECAGG_DATA_DIR", help="folder that holds ml-100k/; else downloaded"),
    ] = None,
    output: Annotated[Path, typer.Option(help="folder of the results")] = Path("runs/latest"),
    silos: Annotated[int, typer.Option(help="client processes")] = _DEFAULTS.silos,
    poisoners: Annotated[
        int, typer.Option(help="further clients that multiply their updates by -10")
    ] = _DEFAULTS.poisoners,
    rounds: Annotated[int, typer.Option(help="rounds of training")] = _DEFAULTS.rounds,
    bits: Annotated[int, typer.Option(help="bits of a quantised value")] = _DEFAULTS.bits,
    seed: Annotated[int, typer.Option(help="of everything that protects nothing")] = _DEFAULTS.seed,
) -> None:
    """Encrypted federated training on real data, beside everything it competes with."""
    settings = DemoSettings(silos=silos, poisoners=poisoners, rounds=rounds, bits=bits, seed=seed)
    source = find_data(data_dir, Path("runs/data"))
    out.print(f"[bold]{source.note}[/]", highlight=False, soft_wrap=True)
    display = _Display(settings)
    with display.progress:
        results = run_demo(settings, source, output, display)
    _print_results(results)
    out.print(f"report: {output / 'report.html'}", highlight=False)
    if not passed(results):
        raise typer.Exit(1)


def _print_results(results: dict[str, Any]) -> None:
    rows = []
    for name in METRIC_SYSTEMS:
        metrics = results["metrics"][name]
        keys = ("hr10", "ndcg10", "full_hr10", "full_ndcg10")
        rows.append((LABELS[name], *(f"{metrics[key]:.3f}" if metrics else "-" for key in keys)))
    print_table(("system", "HR@10", "NDCG@10", "full HR@10", "full NDCG@10"), rows)
    seconds, uploads = results["seconds"], results["clients"] * results["rounds"]
    out.print(
        f"Encryption cost each client {seconds['encrypt'] / uploads * 1000:.0f} ms and "
        f"{results['upload_bytes'] / 1000:.0f} kB a round "
        f"({results['upload_bytes_per_parameter']:.2f} bytes a parameter; float32 takes 4), the "
        f"server {seconds['aggregate'] / results['rounds'] * 1000:.1f} ms, the key holder "
        f"{seconds['decrypt'] / results['rounds'] * 1000:.1f} ms.",
        highlight=False,
    )
    if results["poisoners"]:
        out.print(
            f"The norm check refused {results['poison_refused']} of "
            f"{results['poisoners'] * results['rounds']} updates that were multiplied by -10, "
            "without reading them.",
            highlight=False,
        )
    if results["bit_identical"]:
        out.print(
            f"[green]All {results['rounds']} decrypted sums equal the sums in the clear, bit "
            "for bit.[/]"
        )
    else:
        out.print(
            "[bold red]The decrypted sums do not equal the sums in the clear.[/] "
            f"{results['failure']}",
            highlight=False,
        )
