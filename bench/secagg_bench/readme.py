"""Writes tables of README and docs from result files, so that no number there was typed by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from secagg_bench.demo.report import LABELS
from secagg_bench.demo.results import METRIC_SYSTEMS
from secagg_bench.load.report import hostile_table, soak_table, uploads_table
from secagg_bench.network.report import table as network_table
from secagg_bench.robustness import fuzzing, simulation
from secagg_bench.suite.report import growth_table, table
from secagg_bench.suite.rows import Row, read

__all__ = ["PAGES", "rendered"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "recommender.md",
    ROOT / "docs" / "how-to" / "flower.md",
    ROOT / "docs" / "robustness.md",
    ROOT / "docs" / "benchmarks.md",
)
"""What has such tables."""
_SUITE: dict[str, tuple[Callable[[list[Row]], str], str]] = {
    "sizes": (table, "sizes"),
    "growth": (growth_table, "sizes"),
    "bits": (partial(table, to="secagg, 8 bits"), "bits"),
    "layers": (table, "layers"),
    "paillier": (table, "paillier"),
    "masks": (table, "masks"),
    "checks": (table, "checks"),
}
_KEYS = ("hr10", "ndcg10", "full_hr10", "full_ndcg10")


def rendered(page: str) -> str:
    """The text of a page with its tables made anew from ``bench/results``."""
    blocks = {
        "costs": (_costs, "crypto"),
        "checks": (_checks, "check_cost"),
        "quality": (_quality, "demo"),
        "private": (_private, "privacy"),
        "next": (_next, "sessions"),
        "next item": (_next_item, "sessions"),
        "secaggplus": (_secaggplus, "secaggplus"),
        "network": (network_table, "network"),
        "fuzzing": (fuzzing, "fuzz"),
        "simulation": (simulation, "simulation"),
        "load": (uploads_table, "load"),
        "hostile": (hostile_table, "load"),
        "soak": (soak_table, "soak"),
    }
    for name, (render, file) in blocks.items():
        page = _filled(page, name, partial(_from_json, render, file))
    for name, (show, scenario) in _SUITE.items():
        page = _filled(page, f"suite {name}", partial(_from_rows, show, scenario))
    return page


def _filled(page: str, name: str, text: Callable[[], str]) -> str:
    """A page with a block of this name made anew, where it has one."""
    before, opening, rest = page.partition(f"<!-- {name} -->\n")
    if not opening:
        return page
    _, closing, after = rest.partition(f"<!-- /{name} -->")
    return before + opening + text() + closing + after


def _from_json(render: Callable[[dict[str, Any]], str], file: str) -> str:
    return render(json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8")))


def _from_rows(show: Callable[[list[Row]], str], scenario: str) -> str:
    return show(read(RESULTS / "suite" / f"{scenario}.csv"))


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


def _secaggplus(results: dict[str, Any]) -> str:
    largest, theirs = results["settings"][-1], results["secaggplus"]
    machine = results["machine"]
    note = (
        f"Medians of {results['rounds']} interleaved rounds, processor time; trust the ratios more "
        "than the milliseconds. SecAgg+ is Flower's own code, `secaggplus_mod` and "
        "`SecAggPlusWorkflow`, with the time of sending and waiting left out and a strategy that "
        "does nothing; of its shares, more than half open a secret. Both clip at 1 and round at "
        f"random, SecAgg+ to {theirs['quantization_range'].bit_length() - 1} bits in "
        f"{theirs['modulus_range'].bit_length() - 1}, which it sends as int64: how many bits do "
        "not change its bytes or times. Ours adds what the server and the key holder compute. "
        "A round is lost where a client has too few neighbours left; of ours, where fewer clients "
        "are left than the plan's minimum. The clients that are gone leave after sharing their "
        "keys, and so that the measured rounds are not lost. "
        f"flwr {machine['flwr']}, numpy {machine['numpy']}, {machine['processor']}. From "
        "`bench/results/secaggplus.json`, written by `make secaggplus`."
    )
    return "\n".join([*_one_cohort(largest), "", *_all_cohorts(results["settings"]), "", note, ""])


def _one_cohort(setting: dict[str, Any]) -> list[str]:
    """All figures of one model and cohort: a column a system."""
    systems, parameters, gone = setting["systems"], setting["parameters"], setting["dropped"]

    def judges(each: dict[str, Any], when: str = "") -> str:
        return _time(each[f"server_{when}ms"] + each[f"key_holder_{when}ms"])

    cells = {
        "client, all stages": [_time(each["client_ms"]) for each in systems],
        "upload, bytes a parameter": [
            f"{each['upload_bytes'] / parameters:.2f}" for each in systems
        ],
        "messages a client answers": [str(each["round_trips"]) for each in systems],
        "server and key holder": [judges(each) for each in systems],
        f"the same, {gone} clients gone": [judges(each, "dropped_") for each in systems],
        f"rounds lost when any {gone} are gone": [f"{each['lost']:.0%}" for each in systems],
        "error of the mean, of its length": [f"{each['error']:.1g}" for each in systems],
    }
    head = f"{parameters:,} parameters, {setting['clients']} clients, one core"
    names = [each["name"] if each["shares"] else f"secagg, {each['name']}" for each in systems]
    return [
        f"| {head} | {' | '.join(names)} |",
        "|---|" + "--:|" * len(names),
        *(f"| {name} | {' | '.join(row)} |" for name, row in cells.items()),
    ]


def _all_cohorts(settings: list[dict[str, Any]]) -> list[str]:
    """How many times SecAgg+ takes what we take with the first of our systems."""
    rows = [
        f"| {setting['parameters']:,} | {setting['clients']} | {each['shares']} "
        f"| {each['client_ratio']:.2g} | {each['upload_ratio']:.2g} | {each['server_ratio']:.2g} "
        f"| {each['server_dropped_ratio']:.2g} |"
        for setting in settings
        for each in setting["systems"]
        if each["shares"]
    ]
    return [
        "| SecAgg+ over secagg, 8 bits: parameters | clients | shares | client | upload "
        "| server and key holder | a tenth gone |",
        "|--:|--:|--:|--:|--:|--:|--:|",
        *rows,
    ]


def _time(ms: float) -> str:
    return f"{ms / 1000:.3g} s" if ms >= 1000 else f"{ms:.3g} ms"


def main() -> None:
    """Rewrite the tables; with ``--check``, only say whether they are current."""
    pages = {path: path.read_text(encoding="utf-8") for path in PAGES}
    if "--check" in sys.argv:
        sys.exit(any(rendered(text) != text for text in pages.values()))
    for path, text in pages.items():
        path.write_text(rendered(text), encoding="utf-8")


if __name__ == "__main__":
    main()
