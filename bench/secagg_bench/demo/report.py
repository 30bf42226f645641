"""One self-contained HTML page about a run, drawn from its results alone."""

from __future__ import annotations

import html
import io
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from secagg_bench.demo.results import METRIC_SYSTEMS

__all__ = ["LABELS", "render"]

LABELS = {
    "popular": "most popular",
    "local": "local only",
    "centralised": "centralised (same model, all data)",
    "federated_float": "federated, float",
    "federated_plaintext": "federated, quantised in the clear",
    "federated_encrypted": "federated, encrypted",
}

_COLOURS = {
    "local": "#b07aa1",
    "centralised": "#4e79a7",
    "federated_float": "#f28e2b",
    "federated_plaintext": "#2f7d5b",
}
_STEPS = ("train", "quantise", "encrypt", "upload", "aggregate", "decrypt")
_STEP_COLOURS = ("#9aa5b1", "#c8b26a", "#2f7d5b", "#7ba7c7", "#4e79a7", "#b5543c")
_INK = "#1f2933"

_STYLE = """
:root { --ink: #1f2933; --soft: #5a6672; --line: #d9dee3; --paper: #fff; --good: #2f7d5b;
        --bad: #b5543c; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 54rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.lead { color: var(--soft); margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tr.ours td { font-weight: 600; }
.wide { overflow-x: auto; }
.verdict { font-weight: 600; color: var(--good); } .verdict.bad { color: var(--bad); }
code { font-size: .85em; } figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption, .note { color: var(--soft); font-size: .9rem; }
"""


def render(results: dict[str, Any]) -> str:
    """The page, as HTML with inline SVG; needs nothing from the network."""
    body = [
        _summary(results),
        "<h2>Recommendation quality</h2>",
        _metrics_table(results),
        _figure(
            _learning_curve(results),
            "HR@10 among 99 sampled negatives, by round. The "
            "encrypted run is the green curve: its sums equal those in the clear bit for bit.",
        ),
        "<h2>What encryption costs</h2>",
        _cost_table(results),
        _figure(
            _cost_breakdown(results),
            "Seconds of work over all clients and rounds, one core "
            "each. Upload time includes waiting for the server.",
        ),
        _figure(_bytes_per_round(results), "One client's upload in one round."),
        "<h2>Every round, bit for bit</h2>",
        _rounds_table(results),
        _provenance(results),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>secagg demo</title><style>{_STYLE}</style></head><body>"
        + "\n".join(body)
        + "</body></html>\n"
    )


def _summary(results: dict[str, Any]) -> str:
    same = results["bit_identical"]
    verdict = (
        f"All {results['rounds']} decrypted sums equal the sums in the clear, bit for bit."
        if same
        else "The decrypted sums do not all equal the sums in the clear. "
        + html.escape(results["failure"])
    )
    return (
        "<h1>Encrypted federated training</h1>"
        f"<p class='lead'>{html.escape(results['source'])}; {results['clients']} client processes, "
        f"{results['rounds']} rounds, {results['parameters']:,} shared parameters, "
        f"{results['wall_seconds']:.0f} s.</p>"
        f"<p class='verdict{'' if same else ' bad'}'>{verdict}</p>"
        f"<p>{_poison(results)}</p>"
    )


def _poison(results: dict[str, Any]) -> str:
    """What became of the clients that multiplied their updates by minus ten."""
    sent = results["poisoners"] * results["rounds"]
    if not sent:
        return "No client sent poison in this run."
    return (
        f"{results['poisoners']} further client sent its update times &minus;10 in every round, "
        "encrypted and signed like all others. The encrypted norm check refused "
        f"<b>{results['poison_refused']} of {sent}</b> of them, unread; the sums in the clear are "
        "without it."
    )


def _head(*names: str) -> str:
    return "<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"


def _metrics_table(results: dict[str, Any]) -> str:
    head = _head("system", "HR@10", "NDCG@10", "HR@10, full", "NDCG@10, full")
    rows = []
    for name in METRIC_SYSTEMS:
        metrics = results["metrics"][name]
        cells = "".join(
            f"<td>{metrics[key]:.3f}</td>" if metrics else "<td>none</td>"
            for key in ("hr10", "ndcg10", "full_hr10", "full_ndcg10")
        )
        kind = " class='ours'" if name == "federated_encrypted" else ""
        rows.append(f"<tr{kind}><td>{LABELS[name]}</td>{cells}</tr>")
    return (
        f"<div class='wide'><table>{head}{''.join(rows)}</table></div>"
        "<p class='note'>Leave-one-out; 99 sampled negatives (mean of three draws), "
        "and all items. A split of this size has a standard error of about 1.5 points. "
        f"{_local_peak(results)}</p>"
    )


def _local_peak(results: dict[str, Any]) -> str:
    """Training alone overfits; its best moment is the fairer opponent."""
    best = max(results["curves"]["local"], key=lambda point: float(point["hr10"]))
    return f"Local only was best in round {best['round']}, with HR@10 {best['hr10']:.3f}."


def _cost_table(results: dict[str, Any]) -> str:
    seconds = results["seconds"]
    uploads = results["clients"] * results["rounds"]
    rows = [
        (
            "upload, encrypted",
            f"{results['upload_bytes']:,} bytes "
            f"({results['upload_bytes_per_parameter']:.2f} a parameter)",
        ),
        ("the same update as plain float32", f"{results['float32_bytes']:,} bytes (4 a parameter)"),
        ("a client's time to train, each round", f"{seconds['train'] / uploads * 1000:.0f} ms"),
        ("… to quantise", f"{seconds['quantise'] / uploads * 1000:.1f} ms"),
        ("… to encrypt", f"{seconds['encrypt'] / uploads * 1000:.1f} ms"),
        (
            "server's time to add, each round",
            f"{seconds['aggregate'] / results['rounds'] * 1000:.1f} ms",
        ),
        (
            "to have the key holder open the sum, transfer included",
            f"{seconds['decrypt'] / results['rounds'] * 1000:.1f} ms",
        ),
    ]
    cells = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    return f"<div class='wide'><table>{cells}</table></div>"


def _rounds_table(results: dict[str, Any]) -> str:
    head = _head("round", "clients", "refused", "SHA-256 of the decrypted sum", "in the clear")
    rows = "".join(
        f"<tr><td>{row['round']}</td><td>{row['contributors']}</td><td>{row['refused']}</td>"
        f"<td><code>{(row['sha256_decrypted'] or 'none')[:24]}</code></td>"
        f"<td>{'equal' if row['equal'] else 'DIFFERENT'}</td></tr>"
        for row in results["rounds_detail"]
    )
    return f"<div class='wide'><table>{head}{rows}</table></div>"


def _provenance(results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"<p class='note'>Ties: {html.escape(results['tie_rule'])}. Seed {results['seed']}. "
        f"{html.escape(machine['platform'])}, Python {machine['python']}; {versions}. All numbers "
        "are in <code>results.json</code> beside this page.</p>"
    )


def _figure(figure: Figure, caption: str) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight")
    plt.close(figure)
    svg = text.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}<figcaption>{caption}</figcaption></figure>"


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    return figure, axes


def _learning_curve(results: dict[str, Any]) -> Figure:
    figure, axes = _axes(7.6, 3.6)
    for name, colour in _COLOURS.items():
        curve = results["curves"][name]
        encrypted = name == "federated_plaintext"
        label = "federated, encrypted" if encrypted else LABELS[name]
        axes.plot(
            [point["round"] for point in curve],
            [point["hr10"] for point in curve],
            color=colour,
            label=label,
            linewidth=3.2 if encrypted else 1.4,
            zorder=1 if encrypted else 2,
            marker="o",
            markersize=3,
        )
    axes.axhline(
        results["metrics"]["popular"]["hr10"],
        color="#9aa5b1",
        linestyle=":",
        label=LABELS["popular"],
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("round")
    axes.set_ylabel("HR@10")
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 0.1))
    return figure


def _cost_breakdown(results: dict[str, Any]) -> Figure:
    figure, axes = _axes(7.6, 2.8)
    values = [results["seconds"][step] for step in _STEPS]
    axes.barh(_STEPS, values, color=_STEP_COLOURS)
    axes.invert_yaxis()
    for index, value in enumerate(values):
        axes.text(value, index, f"  {value:.2f} s", va="center", fontsize=9, color=_INK)
    axes.set_xlabel("seconds")
    axes.margins(x=0.12)
    return figure


def _bytes_per_round(results: dict[str, Any]) -> Figure:
    figure, axes = _axes(7.6, 1.9)
    labels = ("encrypted", "plain float32")
    values = [results["upload_bytes"] / 1000, results["float32_bytes"] / 1000]
    axes.barh(labels, values, color=("#2f7d5b", "#9aa5b1"))
    axes.invert_yaxis()
    for index, value in enumerate(values):
        axes.text(value, index, f"  {value:.0f} kB", va="center", fontsize=9, color=_INK)
    axes.set_xlabel("kilobytes")
    axes.margins(x=0.12)
    return figure
