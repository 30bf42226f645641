"""The results for people: Markdown tables and a figure, from the JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from secagg_bench.axes import tidy
from secagg_bench.privacy.methods import LABELS
from secagg_bench.privacy.ranking import METRICS

__all__ = ["markdown", "save_figure"]

_Row = dict[str, Any]

_SOFT: Final = "#5a6672"
_PALE: Final = "#9aa5b1"
# Okabe and Ito's colours, which the colour-blind tell apart; markers differ as well.
_STYLES: Final = {
    "dp_federated": ("#0072B2", "o"),
    "dp_cooccurrence": ("#009E73", "s"),
    "dp_popularity": ("#D55E00", "^"),
    "dp_fedavg": ("#CC79A7", "D"),
}
_SHORT: Final = {
    "dp_federated": "matrix factorisation",
    "dp_cooccurrence": "co-occurrence",
    "dp_popularity": "DP popularity",
    "dp_fedavg": "plain DP-FedAvg",
    "popular": "most popular, not private",
    "local": "local only",
}
_DATASETS: Final = {
    "ml-100k": "MovieLens 100K",
    "amazon-beauty": "Amazon Beauty",
    "toy": "generated data",
}
_SWEEPS: Final = {
    "clients": "clients",
    "bits": "bits of a value",
    "participation": "part of the clients in a round",
}
_METRIC_LABELS: Final = {
    "hr10": "HR@10",
    "ndcg10": "NDCG@10",
    "full_hr10": "HR@10, whole catalogue",
    "full_ndcg10": "NDCG@10, whole catalogue",
}


def _rows(results: _Row, section: str, **wanted: Any) -> list[_Row]:  # noqa: ANN401
    """Rows of a section in which these fields have these values."""
    rows = results["sections"].get(section, {"rows": []})["rows"]
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _epsilon(value: float | None) -> str:
    return "∞" if value is None else f"{value:g}"


def _distinct(rows: Sequence[_Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


# --- tables ---------------------------------------------------------------------------------------


def markdown(results: _Row) -> str:
    """All tables, with what they were measured on."""
    parts = []
    for section in ("utility", "larger"):
        groups = [(row["dataset"], row["factor"]) for row in _rows(results, section)]
        for dataset, factor in dict.fromkeys(groups):
            rows = _rows(results, section, dataset=dataset, factor=factor)
            users = max(row["users"] for row in rows)
            parts += [f"**{_DATASETS[dataset]}, {users:,} clients**", _utility(rows)]
    for sweep in _distinct(_rows(results, "sweeps"), "sweep"):
        parts.append(_sweep(_rows(results, "sweeps", sweep=sweep), _SWEEPS[sweep]))
    if "membership" in results["sections"]:
        parts.append(_membership(_rows(results, "membership")))
    commands = [
        f"`{section['command']}` ({section['seconds'] / 60:.0f} minutes)"
        for section in results["sections"].values()
    ]
    return "\n\n".join([*parts, "Written by " + ", ".join(commands) + "."]) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: _Row, prefix: str = "", digits: int = 3) -> str:
    mean, low, high = (row[f"{prefix}{key}"] for key in ("mean", "ci_low", "ci_high"))
    sign = "+" if prefix else ""
    return f"{mean:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _utility(rows: list[_Row]) -> str:
    """One line a method and epsilon."""
    head = ["method", "ε", "z", *(_METRIC_LABELS[metric] for metric in METRICS)]
    head += ["HR@10 over most popular", "over DP popularity"]
    lines = []
    for method in _distinct(rows, "method"):
        for epsilon in _distinct([row for row in rows if row["method"] == method], "epsilon"):
            cells = {
                row["metric"]: row
                for row in rows
                if (row["method"], row["epsilon"]) == (method, epsilon)
            }
            first, private = cells["hr10"], "noise_multiplier" in cells["hr10"]
            gains = [
                _cell(first, prefix) if f"{prefix}mean" in first and method != other else ""
                for prefix, other in (
                    ("over_popular_", "popular"),
                    ("over_dp_popularity_", "dp_popularity"),
                )
            ]
            lines.append(
                [
                    LABELS[method],
                    _epsilon(epsilon) if private else "-",
                    f"{first['noise_multiplier']:.2f}" if private else "-",
                    *(_cell(cells[metric]) for metric in METRICS),
                    *gains,
                ]
            )
    return _table(head, lines)


def _sweep(rows: list[_Row], label: str) -> str:
    chosen = [row for row in rows if row["metric"] == "hr10"]
    columns = list(dict.fromkeys((row["method"], row["epsilon"]) for row in chosen))
    head = [label, *(f"{_SHORT[method]}, ε = {_epsilon(epsilon)}" for method, epsilon in columns)]
    lines = []
    for value in _distinct(chosen, "value"):
        cells = {(row["method"], row["epsilon"]): row for row in chosen if row["value"] == value}
        first = next(iter(cells.values()))
        name = f"{first['users']:,}" if first["sweep"] == "clients" else f"{value:g}"
        lines.append(
            [name, *(_cell(cells[column]) if column in cells else "" for column in columns)]
        )
    return _table(head, lines)


def _membership(rows: list[_Row]) -> str:
    head = ["target", "cohort", "attack", "ε", "AUC", "TPR at 1 % FPR"]
    head += ["at most, by (ε, δ)", "at most, by this noise"]
    return _table(
        head,
        [
            [
                row["target"],
                str(row["users"]),
                row["attack"],
                _epsilon(row["epsilon"]),
                *(
                    f"{row[name]:.3f} [{row[f'{name}_ci_low']:.3f}, {row[f'{name}_ci_high']:.3f}]"
                    for name in ("auc", "tpr")
                ),
                f"{row['tpr_bound']:.3f}",
                f"{row['tpr_bound_gaussian']:.3f}",
            ]
            for row in rows
        ],
    )


# --- figure ---------------------------------------------------------------------------------------


def save_figure(results: _Row, path: Path) -> None:
    """Utility against epsilon on every population, the sweeps, and what attacks achieve."""
    with mpl.rc_context({"svg.hashsalt": "privacy", "font.size": 9.0}):
        figure = Figure(figsize=(12.4, 7.6), layout="constrained")
        halves = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.08, 1.0), hspace=0.04)
        above, below = halves[:, 0]
        datasets = _distinct(_rows(results, "utility"), "dataset")
        panels = above.subplots(1, len(datasets) + 1, squeeze=False)[0]
        for axes, dataset in zip(panels, datasets, strict=False):
            _curves(axes, _rows(results, "utility", dataset=dataset, metric="hr10"))
        if larger := _rows(results, "larger", method="dp_federated", metric="hr10"):
            _larger(panels[-1], larger, results)
        else:
            panels[-1].set_axis_off()
        swept = _rows(results, "sweeps", metric="hr10")
        kinds = _distinct(swept, "sweep")
        panels = below.subplots(
            1, len(kinds) + 1, squeeze=False, width_ratios=(*([1.0] * len(kinds)), 1.35)
        )[0]
        low, high = min(_ends(swept)), max(_ends(swept))
        for axes, kind in zip(panels, kinds, strict=False):
            _swept(axes, [row for row in swept if row["sweep"] == kind], kind)
            axes.set_ylim(low - 0.1 * (high - low), high + 0.02)
        if attacks := _rows(results, "membership"):
            _attacks(panels[-1], attacks)
        else:
            panels[-1].set_axis_off()
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, metadata=metadata, dpi=110)


def _ends(rows: list[_Row]) -> list[float]:
    """Ends of all intervals; of the whole range where there is none."""
    return [row[key] for row in rows for key in ("ci_low", "ci_high")] or [0.0, 1.0]


def _line(
    axes: Any,  # noqa: ANN401
    rows: list[_Row],
    place: Callable[[_Row], float],
    colour: str,
    marker: str,
    style: str | tuple[int, tuple[int, int]] = "-",
) -> None:
    x = [place(row) for row in rows]
    axes.fill_between(
        x,
        [row["ci_low"] for row in rows],
        [row["ci_high"] for row in rows],
        color=colour,
        alpha=0.14,
        linewidth=0,
    )
    axes.plot(
        x,
        [row["mean"] for row in rows],
        color=colour,
        marker=marker,
        markersize=4.5,
        linestyle=style,
        linewidth=1.6,
    )


def _spread(values: list[float], gap: float) -> list[float]:
    """Heights for labels, in the order of their values and no closer than the gap."""
    order = np.argsort(values)
    heights = np.asarray(values, dtype=float)
    for _ in range(100):
        for low, high in pairwise(order):
            lacking = gap - (heights[high] - heights[low])
            if lacking > 1e-9:
                heights[low] -= lacking / 2
                heights[high] += lacking / 2
    return [float(height) for height in heights]


def _label(axes: Any, labels: list[tuple[float, str, str]]) -> None:  # noqa: ANN401
    """Names of lines, right of the panel: height, text, colour."""
    low, high = axes.get_ylim()
    heights = _spread([value for value, _, _ in labels], 0.068 * (high - low))
    for height, (_, text, colour) in zip(heights, labels, strict=True):
        axes.text(
            1.02,
            height,
            text,
            color=colour,
            va="center",
            fontsize=8,
            transform=axes.get_yaxis_transform(),
        )


def _epsilon_axis(axes: Any, epsilons: list[float | None]) -> None:  # noqa: ANN401
    axes.set_xticks(range(len(epsilons)), [_epsilon(value) for value in epsilons])
    axes.set_xlim(-0.25, len(epsilons) - 0.85)


def _curves(axes: Any, rows: list[_Row]) -> None:  # noqa: ANN401
    """One dataset: a line a method, over epsilon."""
    private = [row for row in rows if "noise_multiplier" in row]
    epsilons = _distinct(private, "epsilon")
    labels = []
    for row in rows:
        if row not in private:
            axes.axhline(row["mean"], color=_PALE, linestyle=":", linewidth=1.3)
            labels.append((row["mean"], _SHORT[row["method"]], _SOFT))
    for method, (colour, marker) in _STYLES.items():
        if mine := [row for row in private if row["method"] == method]:
            _line(axes, mine, lambda row: epsilons.index(row["epsilon"]), colour, marker)
            labels.append((mine[-1]["mean"], _SHORT[method], colour))
    users = f"{private[0]['users']:,} clients of one user"
    tidy(axes, f"{_DATASETS[rows[0]['dataset']]}, {users}", "ε of one user (∞: no noise)")
    _epsilon_axis(axes, epsilons)
    axes.set_ylim(bottom=0.0)
    _label(axes, labels)


def _larger(axes: Any, larger: list[_Row], results: _Row) -> None:  # noqa: ANN401
    """One method and dataset: a line a size of the population, over epsilon."""
    dataset = larger[0]["dataset"]
    real = _rows(results, "utility", dataset=dataset, method="dp_federated", metric="hr10")
    rows = [*real, *larger]
    epsilons = _distinct(real or larger, "epsilon")
    shades = dict(zip(sorted({row["users"] for row in rows}), _SHADES, strict=False))
    labels = []
    for users, colour in shades.items():
        mine = [row for row in rows if row["users"] == users]
        _line(axes, mine, lambda row: epsilons.index(row["epsilon"]), colour, "o")
        labels.append((mine[-1]["mean"], f"{users:,} clients", colour))
    for row in _rows(results, "utility", dataset=dataset, method="popular", metric="hr10"):
        axes.axhline(row["mean"], color=_PALE, linestyle=":", linewidth=1.3)
        labels.append((row["mean"], "most popular", _SOFT))
    tidy(axes, "Larger populations, matrix factorisation", "ε of one user (∞: no noise)")
    _epsilon_axis(axes, epsilons)
    _label(axes, labels)


_SHADES: Final = ("#0072B2", "#56B4E9", "#1b3a57")


def _swept(axes: Any, rows: list[_Row], sweep: str) -> None:  # noqa: ANN401
    """One factor: full lines with noise, dashed ones without."""
    key = "users" if sweep == "clients" else "value"
    values = sorted({row[key] for row in rows})
    for method, (colour, marker) in _STYLES.items():
        for epsilon in _distinct(rows, "epsilon"):
            mine = [row for row in rows if (row["method"], row["epsilon"]) == (method, epsilon)]
            style = (0, (4, 2)) if epsilon is None else "-"
            if mine:
                _line(axes, mine, lambda row: values.index(row[key]), colour, marker, style)
    tidy(axes, f"By {sweep}", _SWEEPS[sweep])
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    if sweep == "bits":  # where there is room
        lines = [(_SHORT[method], _STYLES[method][0]) for method in _distinct(rows, "method")]
        lines += [("full: ε = 8", _SOFT), ("dashed: no noise", _SOFT)]
        for place, (text, colour) in enumerate(reversed(lines)):
            axes.text(
                0.97,
                0.02 + 0.07 * place,
                text,
                color=colour,
                ha="right",
                fontsize=8,
                transform=axes.transAxes,
            )


def _attacks(axes: Any, rows: list[_Row]) -> None:  # noqa: ANN401
    """True positives of each attack, by epsilon, beside what the noise allows at most."""
    kinds = list(dict.fromkeys((row["target"], row["users"], row["attack"]) for row in rows))
    epsilons = _distinct(rows, "epsilon")
    colours = dict(zip(epsilons, ("#009E73", "#0072B2", "#D55E00"), strict=False))
    for row in rows:
        shift = 0.24 * (epsilons.index(row["epsilon"]) - (len(epsilons) - 1) / 2)
        place = kinds.index((row["target"], row["users"], row["attack"])) + shift
        colour = colours[row["epsilon"]]
        axes.plot([row["tpr_ci_low"], row["tpr_ci_high"]], [place] * 2, color=colour, linewidth=1.4)
        axes.plot(row["tpr"], place, "o", color=colour, markersize=4)
        if row["epsilon"] is not None:
            axes.plot(row["tpr_bound_gaussian"], place, "|", color=colour, markersize=8, mew=1.8)
    names = [
        f"{attack}" if target == "users" else f"canary of {users}: {attack}"
        for target, users, attack in kinds
    ]
    axes.set_yticks(range(len(kinds)), names, fontsize=7.5)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    tidy(axes, "Membership attacks", "true positives at 1 % false ones;  | at most", "")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    for place, (epsilon, colour) in enumerate(colours.items()):
        axes.text(
            0.99,
            0.96 - 0.07 * place,
            f"ε = {_epsilon(epsilon)}",
            color=colour,
            ha="right",
            fontsize=8,
            transform=axes.transAxes,
        )
