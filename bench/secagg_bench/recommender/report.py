"""The page of results and its figure, from the result files alone.

Every measurement of the recommender may leave a file of tables beside the main one: ``{"title",
"columns", "rows", "note"}``, or several under ``"tables"``. They are printed as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

from secagg.parameters import NormCheck
from secagg.planner import make_plan
from secagg_bench.axes import tidy
from secagg_bench.privacy.ranking import METRICS
from secagg_bench.recommender.sections import SEEDS, Section, candidates, sections, tuned
from secagg_bench.recommender.trials import Trial
from secagg_recommender.factorisation import TrainConfig

__all__ = ["markdown", "save_figure", "table_from", "tables", "write_page"]

Table = dict[str, Any]
"""``title``, ``columns``, ``rows`` of strings and numbers, and perhaps a ``note``."""

_BESIDE: Final = ("one_round", "sessions", "latency", "cold_start")
_HEADS: Final = ("HR@10", "NDCG@10", "HR@10, all items", "NDCG@10, all items")
_GOAL: Final = 0.64
# Items and clients of uploads with a norm check: those that were run, and as many as Beauty has.
_UPLOADS: Final = {"checked": (1_682, 8), "large": (12_101, 100)}
_EXTRA: Final = {
    "best": "best HR@10 (round)",
    "bytes": "bytes",
    "checked": "with norm check",
    "large": "12,101 items, 100 clients",
    "reach": f"rounds to {_GOAL}",
    "settings": "settings",
    "skew": "skew",
    "weak": "HR@10, weak",
    "strong": "HR@10, strong",
}
_SETTINGS: Final = {"server_rate": "rate", "tau": "τ", "proximal": "μ", "clip": "clip"}
_SIGNS: Final = str.maketrans({"|": "\\|", "\n": " "})
_INTRO: Final = """\
# What the recommender reaches: all tables

Leave-one-out: each user's last item among 99 sampled negatives (mean of three draws), and among all
items. Means ± standard deviations over {seeds} seeds, each of which deals the users out anew; the
sampling error of 943 test items comes on top (about 1.5 points of HR@10) and is common to all rows.
Federated rows are sums of the very integers that clients would encrypt; the table on encryption
shows that it opens the same ones. Where there was something to choose, candidates ran once
with a validation item held out, each user's last but one, and another seed; test items played no
part in it.

![HR@10 by round, bytes and device](recommender.svg)
"""


def write_page(found: Mapping[str, Any], folder: Path, page: Path) -> None:
    """Write all tables of the results, and of the result files beside them, as Markdown."""
    parts = [_INTRO.format(seeds=len(SEEDS)), *(markdown(table) for table in tables(found))]
    if (demo := folder / "demo.json").is_file():
        parts.append(markdown(_services(json.loads(demo.read_text(encoding="utf-8")))))
    for name in _BESIDE:
        if (file := folder / f"{name}.json").is_file():
            parts += [markdown(table) for table in table_from(file)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(parts), encoding="utf-8")


def table_from(file: Path) -> list[Table]:
    """The tables of a result file.

    Raises:
        ValueError: not a file of tables; says what is missing.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    found: list[Table] = content.get("tables", [content])
    for table in found:
        if missing := {"title", "columns", "rows"} - set(table):
            raise ValueError(f"{file.name}: expected a table with {sorted(missing)}; got none")
        if any(len(row) != len(table["columns"]) for row in table["rows"]):
            raise ValueError(f"{file.name}: expected rows of {len(table['columns'])} cells")
    return found


def markdown(table: Table) -> str:
    """A heading, the table, and its note."""
    lines = [table["columns"], ["---", *["--:"] * (len(table["columns"]) - 1)], *table["rows"]]
    text = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
    note = f"\n{table['note']}\n" if table.get("note") else ""
    return f"## {table['title']}\n\n{text}\n{note}"


def _cell(value: str | float | None) -> str:
    if isinstance(value, str):
        return value.translate(_SIGNS)
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


# --- tables of the main results -------------------------------------------------------------------


def tables(found: Mapping[str, Any]) -> list[Table]:
    """A table for each section that has results, and what was tried and compared."""
    trials = found["trials"]
    made = [_section(section, trials) for section in sections(trials, toy=found.get("toy", False))]
    made += [_encrypted(found["encrypted"]), _tried(trials)]
    return [table for table in made if table["rows"]]


def _runs(trial: Trial, trials: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The results that there are for a row: one a seed."""
    keys = (replace(trial, seed=seed).key for seed in SEEDS)
    return [trials[key] for key in keys if key in trials]


def _section(section: Section, trials: Mapping[str, Any]) -> Table:
    rows = []
    for label, trial in section.rows.items():
        if runs := _runs(trial, trials):
            rows.append([label, *_quality(runs), *(_extra(e, trial, runs) for e in section.extra)])
    columns = ["", *_HEADS, *(_EXTRA[name] for name in section.extra)]
    note = section.note
    if section.name == "systems":
        note += _difference(section, trials)
    return {"title": section.title, "columns": columns, "rows": rows, "note": note}


def _quality(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    ended = [run["metrics"] for run in runs if "metrics" in run]
    if len(ended) < len(runs):
        failed = next(run["failed"] for run in runs if "failed" in run)
        return [f"failed: {failed}", "", "", ""]
    return [_spread([metrics[name] for metrics in ended]) for name in METRICS]


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def _extra(name: str, trial: Trial, runs: Sequence[Mapping[str, Any]]) -> str | int:
    """A further column of a row; empty where it has no meaning."""
    if name == "settings":
        plain = Trial()
        own = {key: getattr(trial, key) for key in _SETTINGS}
        return ", ".join(
            f"{_SETTINGS[key]} {value:g}"
            for key, value in own.items()
            if value != getattr(plain, key)
        )
    if name in _UPLOADS:
        return _payload(name, trial)
    if name == "reach":
        return _reached([run["curve"] for run in runs if "curve" in run])
    if name == "best":
        best = [(run["best"]["hr10"], run["best_round"]) for run in runs if "best" in run]
        value, place = np.mean(best, axis=0) if best else (0.0, 0.0)
        return f"{value:.3f} ({place:.0f})" if trial.system != "popular" else ""
    values = [run[name] for run in runs if name in run]
    if not values:
        return ""
    return round(values[0]) if name == "bytes" else _spread(values)


def _payload(name: str, trial: Trial) -> int:
    """Bytes of an upload with a norm check, by the name of a column."""
    items, clients = _UPLOADS[name]
    segments = trial.plan(items, TrainConfig().dimensions).segments
    return make_plan(segments, max_clients=clients, norm_check=NormCheck()).payload_bytes


def _reached(curves: Sequence[Sequence[float]]) -> str:
    """Mean round of the seeds, if all of them got there."""
    first = [next((n for n, hr in enumerate(c, 1) if hr >= _GOAL), None) for c in curves]
    got = [number for number in first if number is not None]
    if not got:
        return "–"
    return f"{np.mean(got):.0f}" + ("" if len(got) == len(first) else f" ({len(got)}/{len(first)})")


def _difference(section: Section, trials: Mapping[str, Any]) -> str:
    """What encryption takes away, seed by seed."""
    *_, trial = section.rows.values()
    floats, encrypted = (_runs(replace(trial, bits=bits), trials) for bits in (0, trial.bits))
    if len(floats) != len(encrypted) or len(floats) < 2:
        return ""
    told = []
    for name, head in zip(METRICS, _HEADS, strict=True):
        gaps = [
            e["metrics"][name] - f["metrics"][name] for e, f in zip(encrypted, floats, strict=True)
        ]
        half = student.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / np.sqrt(len(gaps))
        told.append(f"{head} {np.mean(gaps):+.4f} ± {half:.4f}")
    return f" Encrypted less floats, same seeds, with 95 % intervals: {'; '.join(told)}."


def _encrypted(found: Mapping[str, Any]) -> Table:
    rows = [
        [
            label,
            run["rounds"],
            "all",
            run["bytes"],
            *(f"{1000 * run['took'][step]:.1f}" for step in ("encrypt", "add", "open")),
            f"{1000 * run['train_s']:.0f}",
        ]
        for label, run in found.items()
        if "train_s" in run
    ]
    heads = ["rounds", "sums as in the clear", "bytes", "encrypt, ms", "add, ms", "open, ms"]
    return {
        "title": "Encrypted, and what a round takes",
        "columns": ["", *heads, "train, ms"],
        "rows": rows,
        "note": "Medians on one core that was shared with other work: of one client's training and "
        "its quantising and encrypting, of adding one upload, and of opening a round's sum.",
    }


def _services(demo: Mapping[str, Any]) -> Table:
    """Seconds of the demo's real programs, for one client or one round."""
    rounds, uploads = demo["rounds"], demo["rounds"] * demo["clients"]
    shares = {"train": uploads, "quantise": uploads, "encrypt": uploads, "upload": uploads}
    shares |= {"aggregate": rounds, "decrypt": rounds}
    return {
        "title": "Response time of the services",
        "columns": [*(f"{step}, ms" for step in shares), "a round in all, s"],
        "rows": [
            [
                *(f"{1000 * demo['seconds'][step] / share:.1f}" for step, share in shares.items()),
                f"{demo['wall_seconds'] / rounds:.2f}",
            ]
        ],
        "note": f"The demo: {demo['clients']} clients, server and key holder as processes of one "
        "machine, over gRPC. Of one client, but adding up and opening, which are of one round.",
    }


def _tried(trials: Mapping[str, Any]) -> Table:
    rows = []
    for name, tried in candidates().items():
        for trial in tried:
            run = trials.get(tuned(trial).key, {})
            if "metrics" in run:
                rows.append([name, _extra("settings", trial, []), run["metrics"]["hr10"]])
            elif run:
                rows.append([name, _extra("settings", trial, []), f"failed: {run['failed']}"])
    note = "One run each; the best of each choice is used above."
    columns = ["choice", "settings", "HR@10 of the validation item"]
    return {"title": "What was tried beforehand", "columns": columns, "rows": rows, "note": note}


# --- figure ---------------------------------------------------------------------------------------

# Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def save_figure(found: Mapping[str, Any], path: Path) -> None:
    """HR@10 by round for optimisers and partitions, and against bytes; and weak devices."""
    by_name = {
        section.name: section for section in sections(found["trials"], toy=found.get("toy", False))
    }
    with mpl.rc_context({"svg.hashsalt": "recommender", "font.size": 9.0}):
        figure = Figure(figsize=(12.4, 7.4), layout="constrained")
        panels = figure.subplots(2, 2)
        for axes, name in zip(panels[0], ("optimisers", "partitions"), strict=True):
            _curves(axes, by_name[name], found["trials"])
        _bytes(panels[1, 0], by_name["compression"], found["trials"])
        _devices(panels[1, 1], by_name["devices"], found["trials"])
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, metadata=metadata, dpi=110)


def _curves(axes: Any, section: Section, trials: Mapping[str, Any]) -> None:  # noqa: ANN401
    for colour, (label, trial) in zip(_COLOURS, section.rows.items(), strict=False):
        curves = [run["curve"] for run in _runs(trial, trials) if "curve" in run]
        if curves:
            mean = np.mean(curves, axis=0)
            axes.plot(np.arange(1, mean.size + 1), mean, color=colour, label=label, linewidth=1.6)
    tidy(axes, section.title, "round")
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, loc="lower right")


def _bytes(axes: Any, section: Section, trials: Mapping[str, Any]) -> None:  # noqa: ANN401
    """A point a compression: its kind by colour, from weak to strong."""
    points: dict[str, list[tuple[float, float]]] = {}
    for trial in section.rows.values():
        runs = [run["metrics"]["hr10"] for run in _runs(trial, trials) if "metrics" in run]
        if runs:
            size = _payload("large", trial) / (
                _UPLOADS["large"][0] * (TrainConfig().dimensions + 1)
            )
            points.setdefault(_kind(trial), []).append((size, np.mean(runs)))
    for colour, (kind, places) in zip(_COLOURS, points.items(), strict=False):
        axes.plot(*zip(*places, strict=True), "o-", color=colour, label=kind, ms=4.5)
    tidy(axes, section.title, "bytes a parameter, with norm check; 12,101 items, 100 clients")
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, loc="lower right")


def _kind(trial: Trial) -> str:
    if trial.rank:
        return "low rank"
    if trial.subset == 1:
        return "fewer bits"
    return "random subset" + (", error feedback" if trial.feedback else "")


def _devices(axes: Any, section: Section, trials: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Users of weak and of strong silos, by what was done about it."""
    names = list(section.rows)
    for shift, key, colour in ((-0.15, "strong", _COLOURS[0]), (0.15, "weak", _COLOURS[1])):
        for place, trial in enumerate(section.rows.values()):
            values = [run[key] for run in _runs(trial, trials) if key in run]
            label = f"users of {key} silos" if place == 0 else None
            axes.plot(values, [place + shift] * len(values), "o", color=colour, ms=4.5, label=label)
    axes.set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    tidy(axes, section.title, "HR@10, a point a seed", "")
    axes.legend(frameon=False, fontsize=8, loc="best")
