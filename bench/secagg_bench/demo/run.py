"""Runs the whole demo: encrypted training, the same in the clear, the page about both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from secagg.errors import SecaggError
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg_bench.demo import results as results_
from secagg_bench.demo.federation import EncryptedRun, run_encrypted
from secagg_bench.demo.report import render
from secagg_bench.demo.settings import DemoSettings, Source
from secagg_recommender.datasets import load_dataset
from secagg_recommender.interactions import split_leave_one_out

__all__ = ["Observer", "run_demo"]


class Observer:
    """Told about progress; does nothing by itself."""

    def training(self, answer: pb.GetTaskResponse) -> None:
        """The encrypted run has moved."""

    def comparing(self, system: str, round_number: int, rounds: int, hr10: float | None) -> None:
        """A run in the clear has moved."""


def run_demo(
    settings: DemoSettings,
    source: Source,
    output: Path,
    observer: Observer,
    client_module: str = "secagg_client.cli",
) -> dict[str, Any]:
    """Run everything and write ``results.json``, ``model.npz`` and ``report.html``.

    Returns:
        The content of ``results.json``.

    Raises:
        SecaggError: a program did not start, or the data cannot be used.
    """
    interactions = load_dataset(source.dataset, source.data_dir)
    split = split_leave_one_out(interactions)
    with tempfile.TemporaryDirectory(prefix="secagg-demo-") as scratch:
        folder = Path(scratch)
        encrypted = run_encrypted(
            settings,
            source,
            split.n_users,
            split.n_items,
            folder,
            observer.training,
            client_module,
        )
        clear = _run_clear(settings, source, folder, observer.comparing)
    results = results_.assemble(settings, source, interactions, split, encrypted, clear)
    _write(output, results, encrypted)
    return results


def _run_clear(
    settings: DemoSettings,
    source: Source,
    folder: Path,
    on_line: Callable[[str, int, int, float | None], None],
) -> dict[str, Any]:
    """Every other system, in a process that never imports the cipher."""
    request = folder / "clear.json"
    request.write_text(
        json.dumps(
            {
                "settings": asdict(settings),
                "dataset": source.dataset,
                "data_dir": str(source.data_dir) if source.data_dir else None,
            }
        ),
        encoding="utf-8",
    )
    for line in _lines(["-m", "secagg_bench.demo.clear", str(request)]):
        said = json.loads(line)
        on_line(said["system"], said["round"], said["rounds"], said["hr10"])
    answer: dict[str, Any] = json.loads(
        request.with_suffix(".answer.json").read_text(encoding="utf-8")
    )
    return answer


def _lines(arguments: list[str]) -> Iterator[str]:
    """What a Python process prints, line by line, until it ends well."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with subprocess.Popen(  # noqa: S603 - our own program, no shell
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield from process.stdout or ()
    if process.returncode != 0:
        raise SecaggError(f"expected the run in the clear to finish; exit={process.returncode}")


def _write(output: Path, results: dict[str, Any], encrypted: EncryptedRun) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    (output / "report.html").write_text(render(results), encoding="utf-8")
    model = output / "model.npz"
    model.unlink(missing_ok=True)
    if encrypted.shared:
        # The user vectors are gathered from the clients' folders, on this machine, so that the
        # metrics can be computed again; in real use no one holds them all.
        np.savez(
            model,
            item_factors=encrypted.shared["item_factors"],
            item_bias=encrypted.shared["item_bias"],
            user_factors=encrypted.user_vectors,
        )
