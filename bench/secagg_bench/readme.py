"""Writes the README's tables from result files, so that no number there was typed by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from secagg_bench.demo.report import LABELS
from secagg_bench.demo.results import METRIC_SYSTEMS

__all__ = ["rendered"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
_KEYS = ("hr10", "ndcg10", "full_hr10", "full_ndcg10")


def rendered(readme: str) -> str:
    """The README with its tables made anew from ``bench/results``."""
    blocks = {
        "costs": _costs(json.loads((RESULTS / "crypto.json").read_text(encoding="utf-8"))),
        "quality": _quality(json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))),
    }
    for name, text in blocks.items():
        before, opening, rest = readme.partition(f"<!-- {name} -->\n")
        _, closing, after = rest.partition(f"<!-- /{name} -->")
        readme = before + opening + text + closing + after
    return readme


def _costs(results: dict[str, Any]) -> str:
    rows = [
        f"| {row['name']} | {row['ours']:.3g} {row['unit']} | {row['tenseal']:.3g} {row['unit']} "
        f"| {row['ratio']:.1f} |"
        for row in results["rows"]
    ]
    memory = ", ".join(
        f"{line['peak_bytes'] / 1e6:.0f} MB after {line['clients']}"
        for line in results["server_memory"]
    )
    machine = results["machine"]
    plain = results["float32_bytes_per_parameter"]
    note = (
        f"Medians of {results['pairs']} interleaved pairs in one run; trust the ratios more than "
        "the milliseconds. The peer is `CKKSVector` as commonly used (public key, N = 8192, "
        f"[60, 40, 40], scale 2^40); plain float32 takes {plain:.0f} bytes a parameter. It "
        "authenticates nothing, so the line to compare leaves our hash and signature out; the "
        "next one has them. The peak memory of a process that sums does not grow "
        f"with the clients: {memory} uploads. "
        f"TenSEAL {machine['tenseal']}, numpy {machine['numpy']}, "
        f"{machine['processor']}. From [bench/results/crypto.json](bench/results/crypto.json), "
        "written by `make bench`."
    )
    head = f"| {results['parameters']:,} parameters, one core | secagg | `CKKSVector` | ratio |"
    return "\n".join([head, "|---|--:|--:|--:|", *rows, "", note, ""])


def _quality(results: dict[str, Any]) -> str:
    rows = []
    for name in METRIC_SYSTEMS:
        cells = " | ".join(f"{results['metrics'][name][key]:.3f}" for key in _KEYS)
        bold = "**" if name == "federated_encrypted" else ""
        rows.append(f"| {bold}{LABELS[name]}{bold} | {cells} |")
    best = max(results["curves"]["local"], key=lambda point: float(point["hr10"]))
    uploads = results["clients"] * results["rounds"]
    encrypt_ms = results["seconds"]["encrypt"] / uploads * 1000
    train_ms = results["seconds"]["train"] / uploads * 1000
    note = (
        f"Leave-one-out, {results['clients']} client processes, {results['rounds']} rounds, "
        f"{results['parameters']:,} shared parameters; 99 sampled negatives (mean of three "
        "draws) and all items. One such split has a standard error of about 1.5 points. "
        f"Training alone was best in round {best['round']}, with HR@10 {best['hr10']:.3f}. "
        f"Encrypting took a client {encrypt_ms:.0f} ms and {results['upload_bytes'] / 1000:.0f} "
        f"kB a round, beside {train_ms:.0f} ms of training, all clients on one machine. From "
        "[bench/results/demo.json](bench/results/demo.json), written by `secagg demo`."
    )
    head = "| MovieLens 100K | HR@10 | NDCG@10 | HR@10, all items | NDCG@10, all items |"
    return "\n".join([head, "|---|--:|--:|--:|--:|", *rows, "", note, ""])


def main() -> None:
    """Rewrite the README's tables; with ``--check``, only say whether they are current."""
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = rendered(before)
    if "--check" in sys.argv:
        sys.exit(before != after)
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
