"""Writes tables of README and docs from result files, so that no number there was typed by hand."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from secagg_bench.demo.report import LABELS
from secagg_bench.demo.results import METRIC_SYSTEMS
from secagg_bench.load.report import hostile_table, soak_table, uploads_table
from secagg_bench.network.report import table as network_table
from secagg_bench.robustness import fuzzing, simulation
from secagg_bench.suite.figures import FIGURES
from secagg_bench.suite.profile import table as profile_table
from secagg_bench.suite.report import (
    OURS,
    growth_table,
    limit_table,
    summary_table,
    table,
    targets_table,
)
from secagg_bench.suite.rounds_report import lines_table, rounds_table
from secagg_bench.suite.rows import Row, read
from secagg_bench.suite.scale_report import costs_table, demand_table, room_table, sums_table
from secagg_bench.suite.scenarios import scenarios

__all__ = ["PAGES", "SUITE_BLOCKS", "blocks", "rendered"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "recommender.md",
    ROOT / "docs" / "robustness.md",
    ROOT / "docs" / "benchmarks.md",
    ROOT / "docs" / "scale.md",
)
"""What has such tables."""
_Rows = Mapping[str, Sequence[Row]]
_TARGETS = ("sizes", "bits", "layers")
_SCALE = ("sizes", "checks", "clients", "rounds")
SUITE_BLOCKS: dict[str, tuple[Callable[[_Rows], str], tuple[str, ...]]] = {
    "targets": (targets_table, _TARGETS),
    "summary": (lambda rows: summary_table(rows["sizes"], rows["masks"]), ("sizes", "masks")),
    "limit": (lambda rows: limit_table([*rows["sizes"], *rows["large"]]), ("sizes", "large")),
    "growth": (lambda rows: growth_table([*rows["sizes"], *rows["large"]]), ("sizes", "large")),
    "growth by clients": (lambda rows: growth_table(rows["clients"], "clients"), ("clients",)),
    "rounds": (lambda rows: rounds_table(rows["rounds"]), ("rounds",)),
    "lines": (lambda rows: lines_table(rows["lines"]), ("lines",)),
    "scale costs": (costs_table, _SCALE),
    "scale": (demand_table, _SCALE),
    "scale sums": (sums_table, _SCALE),
    "scale room": (room_table, ()),
}
"""By block: what renders it, and the scenarios of whose rows. The first of these must be there."""
_TABLES = (
    "sizes",
    "large",
    "clients",
    "layers",
    "checks",
    "privacy",
    "masks",
    "dropouts",
    "paillier",
)
_COMPARED = {**dict.fromkeys(_TABLES, OURS), "bits": "secagg, 8 bits"}
"""Scenarios with a table each, and the system that the others are compared with there."""
_KEYS = ("hr10", "ndcg10", "full_hr10", "full_ndcg10")


def rendered(page: str) -> str:
    """The text of a page with its tables made anew from ``bench/results``."""
    tables = {
        "checks": (_checks, "check_cost"),
        "quality": (_quality, "demo"),
        "private": (_private, "privacy"),
        "next": (_next, "sessions"),
        "next item": (_next_item, "sessions"),
        "network": (network_table, "network"),
        "fuzzing": (fuzzing, "fuzz"),
        "simulation": (simulation, "simulation"),
        "load": (uploads_table, "load"),
        "hostile": (hostile_table, "load"),
        "soak": (soak_table, "soak"),
        "profile": (profile_table, "profile"),
    }
    for name, (render, file) in tables.items():
        page = _filled(page, name, partial(_from_json, render, file))
    for name, (show, files) in SUITE_BLOCKS.items():
        page = _filled(page, f"suite {name}", partial(_from_rows, show, files))
    for name, to in _COMPARED.items():
        page = _filled(page, f"suite {name}", partial(_scenario, name, to))
    for name in FIGURES:
        page = _filled(page, f"figure {name}", partial(_figure, name))
    return page


def blocks(page: str) -> list[str]:
    """Names of the blocks that a page has, in order."""
    return re.findall(r"^<!-- ([^/\n]*?) -->$", page, re.MULTILINE)


def _filled(page: str, name: str, text: Callable[[], str]) -> str:
    """A page with a block of this name made anew, where it has one."""
    before, opening, rest = page.partition(f"<!-- {name} -->\n")
    if not opening:
        return page
    _, closing, after = rest.partition(f"<!-- /{name} -->")
    return before + opening + text() + closing + after


def _from_json(render: Callable[[dict[str, Any]], str], file: str) -> str:
    return render(json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8")))


def _rows(scenario: str) -> list[Row]:
    """None where nothing was measured."""
    file = RESULTS / "suite" / f"{scenario}.csv"
    return read(file) if file.is_file() else []


def _from_rows(show: Callable[[_Rows], str], files: Sequence[str]) -> str:
    rows = {each: _rows(each) for each in files}
    return _missing(files[0]) if files and not rows[files[0]] else show(rows)


def _scenario(name: str, to: str) -> str:
    rows = _rows(name)
    wanted = [each.name for each in scenarios()[name].systems]
    return table(rows, to, wanted) if rows else _missing(name)


def _missing(scenario: str) -> str:
    return f"Not measured yet: `secagg-bench run {scenario}` does.\n"


def _figure(name: str) -> str:
    """An image, by a path from docs/."""
    _, files, says = FIGURES[name]
    drawn = (ROOT / "docs" / f"{name}.svg").is_file()
    return f"![{says}]({name}.svg)\n" if drawn else _missing(files[0])


def _checks(results: dict[str, Any]) -> str:
    *smaller, large = results["sizes"]
    rows = [
        f"| {size['parameters']:,}: {row['name']} | {row['ours']:.3g} {row['unit']} "
        f"| {row['tenseal']:.3g} {row['unit']} | {row['ratio']:.2g} |"
        for size in (large, *smaller)
        for row in size["rows"]
        if row["target"] or size is large
    ]
    theirs, machine = large["textbook"], results["machine"]
    keys = (theirs["relinearisation_key_bytes"] + theirs["galois_key_bytes"]) / 1e6
    missed = [
        f"{row['name']} ({row['target']}) at {size['parameters']:,}"
        for size in (large, *smaller)
        for row in size["rows"]
        if row["met"] is False
    ]
    others = "; ".join(
        f"{each['name']}: {each['server_ms']:.0f} + {each['key_holder_ms']:.1f} ms, "
        f"{each['share']:.1%}"
        for each in large["variants"][1:]
    )
    note = (
        f"Medians of {results['pairs']} interleaved pairs, from the stored upload to the verdict. "
        "The textbook check squares and sums the ciphertexts under one key (SEAL, N = "
        f"{theirs['ring_degree']}, {theirs['modulus_bits']}, scale 2^40) and needs {keys:.1f} MB "
        "of evaluation keys, ours none; it finds the norm exactly, ours estimates it. At its "
        "leanest, uploads are made for it: one prime fewer, and uncompressed. Of a small upload "
        "our check shows more bytes than the upload has: its price hardly depends on the model. "
        f"Targets not met: {', '.join(missed) or 'none'}. At {large['parameters']:,}, parsing and "
        f"adding the upload takes {large['sum_ms']:.3g} ms and its SHA-256 {large['hash_ms']:.3g} "
        f"ms: the check takes {large['variants'][0]['hashed_sums']:.0f} times both. Others there "
        f"(server + key holder, bytes of the upload's): {others}. TenSEAL {machine['tenseal']}, "
        f"numpy {machine['numpy']}, {machine['processor']}. From "
        "[bench/results/check_cost.json](bench/results/check_cost.json), written by `make bench`."
    )
    head = "| norm check of one upload, one core | secagg | textbook | ratio |"
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
        f"kB a round, beside {train_ms:.0f} ms of training, all clients on one machine. "
        f"{results['poisoners']} further client sent its update times -10 in every round; the norm "
        f"check refused {results['poison_refused']} of "
        f"{results['poisoners'] * results['rounds']}, and no sum holds any of it. From "
        "[bench/results/demo.json](bench/results/demo.json), written by `secagg demo`."
    )
    head = "| MovieLens 100K | HR@10 | NDCG@10 | HR@10, all items | NDCG@10, all items |"
    return "\n".join([head, "|---|--:|--:|--:|--:|", *rows, "", note, ""])


def _private(results: dict[str, Any]) -> str:
    rows = [
        row for section in ("utility", "larger") for row in results["sections"][section]["rows"]
    ]

    def hr10(method: str, factor: int, epsilon: float | None) -> str:
        (found,) = (
            row["mean"]
            for row in rows
            if (row["dataset"], row["metric"]) == ("ml-100k", "hr10")
            and (row["method"], row["factor"], row["epsilon"]) == (method, factor, epsilon)
        )
        return f"{found:.3f}"

    ours = "dp_federated"
    return (
        "With 943 clients of a single user each and a budget of ε = 8 for every user, the best "
        f"private method we have reaches HR@10 {hr10(ours, 1, 8.0)} ({hr10(ours, 1, None)} "
        f"without noise; most popular {hr10('popular', 1, None)}), and with ten times the users "
        f"{hr10(ours, 10, 8.0)} ({hr10(ours, 10, None)} without noise): "
        "[what privacy costs](docs/privacy.md#what-it-costs). From "
        "[bench/results/privacy.json](bench/results/privacy.json), written by `make privacy`.\n"
    )


_SESSION = "session model, federated, encrypted"
_STACKED = "session model on neighbours that two or more users have"


def _held_back(results: dict[str, Any]) -> dict[str, list[str]]:
    """Rows of the session model's table that were trained as published ones were, by model."""
    rows = (row for row in results["tables"][0]["rows"] if row[1] == "held back")
    return {row[0].strip("*"): row for row in rows}


def _next(results: dict[str, Any]) -> str:
    rows = _held_back(results)
    floor = rows["transition counts, the floor to beat"]
    sasrec = rows["SASRec, as published by S3-Rec"]
    ours, stacked = rows[_SESSION], rows[_STACKED]
    rounds, clients, *_ = results["tables"][1]["rows"][0]
    return (
        f"On Amazon Beauty, a session model of {ours[2]} shared floats, trained by {clients} "
        f"clients in each of {rounds} encrypted rounds, finds the next item with HR@10 {ours[3]} "
        f"(SASRec, as published by S3-Rec: {sasrec[3]}; transition counts: {floor[3]}), and "
        f"{ours[5]} among all items ({sasrec[5]}; {floor[5]}: the counts are better there). With "
        f"the counts of neighbours that two or more users have on top, {stacked[2]} numbers, it is "
        f"{stacked[3]} and {stacked[5]}, ahead of both. From "
        "[bench/results/sessions.json](bench/results/sessions.json), written by "
        "`make recommender`.\n"
    )


def _next_item(results: dict[str, Any]) -> str:
    rows = [
        [name, *row[2:]]
        for name, row in _held_back(results).items()
        if not name.startswith(("counts alone", "GRU4Rec"))
    ]
    head = ["Amazon Beauty, next item", *results["tables"][0]["columns"][2:]]
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    """Rewrite the tables; with ``--check``, only say whether they are current."""
    pages = {path: path.read_text(encoding="utf-8") for path in PAGES}
    if "--check" in sys.argv:
        sys.exit(any(rendered(text) != text for text in pages.values()))
    for path, text in pages.items():
        path.write_text(rendered(text), encoding="utf-8")


if __name__ == "__main__":
    main()
