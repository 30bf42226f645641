"""The gallery's results for people: Markdown tables and a figure, from the JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from secagg_bench.gallery.malformed import LAYERS

__all__ = ["markdown", "save_figure"]

_Row = dict[str, Any]

_INK: Final = "#1f2933"
_SOFT: Final = "#5a6672"
_WIDTH: Final = 1.12  # leaves room for words beside the bars
_COLOURS: Final = {"none": "#c2452d", "norm": "#2b6cb0", "norm and direction": "#2f7d5b"}
_LABELS: Final = {
    "none": "undefended",
    "norm": "norm check",
    "norm and direction": "norm and direction check",
}
_HEIGHTS: Final = {"none": 0.24, "norm": 0.0, "norm and direction": -0.24}


# --- tables ---------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    """All tables, with what they were measured on."""
    setting = results["sizes"]["setting"]
    note = (
        f"Measured on {results['dataset']}: {setting['silos']} clients, {setting['rounds']} "
        f"rounds, {setting['dimensions']} factors, clip {setting['clip']:g}, seed "
        f"{setting['seed']}; HR@10 of honest clients' users. Written by `{results['command']}` in "
        f"{results['seconds'] / 60:.0f} minutes, {results['machine']['processes']} processes."
    )
    parts = [
        note,
        _taste(results["taste"]),
        _attacks("attack", results["attacks"]),
        _attacks("forged weight", results["weights"]),
        _clips(results["clips"], results["attacks"], setting["clip"]),
        _direction(results["direction"]),
        _malformed(results["malformed"]),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _taste(taste: _Row) -> str:
    runs = taste["runs"]
    rows = [
        [name, f"{run['hr10']:.3f}", f"{run['ndcg10']:.3f}", _refused(run)]
        for name, run in runs.items()
    ]
    same = "bit-identical" if taste["bit_identical"] else "NOT identical"
    return (
        _table([f"{taste['attack']}, silos by taste", "HR@10", "NDCG@10", "refused"], rows)
        + f"\n\nThe models of all {taste['rounds']} rounds with the check are {same} to those of "
        "the honest clients alone."
    )


def _refused(run: _Row) -> str:
    attackers, honest = run["attacker_refusals"], run["honest_refusals"]
    text = f"{attackers} of {run['attacker_uploads']}" if run["attacker_uploads"] else "-"
    return text + (f", and {honest} of {run['honest_uploads']} honest" if honest else "")


def _attacks(what: str, rows: list[_Row]) -> str:
    head = [
        what,
        "attackers",
        "without them",
        "undefended",
        "norm check",
        "refused",
        "+ direction",
        "refused",
        "promoted item in top ten: undefended, checked",
        "its median rank: without them, undefended, checked",
    ]
    return _table(head, [_attack_row(row) for row in rows])


def _attack_row(row: _Row) -> list[str]:
    runs = row["runs"]
    direction = runs.get("norm and direction")
    return [
        row["name"],
        str(row["attackers"]),
        *(_quality(runs[name]) for name in ("alone", "none", "norm")),
        _refused(runs["norm"]),
        _quality(direction) if direction else "",
        _refused(direction) if direction else "",
        *_promoted(runs),
    ]


def _promoted(runs: dict[str, _Row]) -> list[str]:
    shares = [f"{runs[name]['target_share']:.0%}" for name in ("none", "norm")]
    ranks = [f"{runs[name]['target_rank']:.0f}" for name in ("alone", "none", "norm")]
    return [", ".join(shares), ", ".join(ranks)]


def _clips(clips: _Row, attacks: list[_Row], clip: float) -> str:
    """The same attack under tighter clips, after what it does under the usual one."""
    usual = [{**row, "clip": clip} for row in attacks if row["name"] == clips["attack"]]
    rows = [
        [
            f"{row['clip']:g}",
            str(row["attackers"]),
            *(_quality(row["runs"][name]) for name in ("alone", "none", "norm")),
            _refused(row["runs"]["norm"]),
            *_promoted(row["runs"]),
        ]
        for row in (*usual, *clips["rows"])
    ]
    head = [
        f"{clips['attack']}: clip",
        "attackers",
        "without them",
        "undefended",
        "norm check",
        "refused",
        "promoted item in top ten: undefended, checked",
        "its median rank: without them, undefended, checked",
    ]
    norms = ", ".join(
        f"{each['least']:.0f} to {each['most']:.0f}" for each in clips["honest_norms"]
    )
    return _table(head, rows) + f"\n\nNorms of honest updates, round by round: {norms}."


def _quality(run: _Row) -> str:
    lost = f" ({run['lost_rounds']} rounds lost)" if run["lost_rounds"] else ""
    return f"{run['hr10']:.3f}{lost}"


def _direction(direction: _Row) -> str:
    rows = []
    for each in direction["honest"]:
        run = each["run"]
        share = run["honest_refusals"] / run["honest_uploads"]
        rows.append([f"{each['clients']} silos, {each['split']}", *_below(each), f"{share:.1%}"])
    rows.append(["single users", *_below(direction["single_users"]), ""])
    thresholds = list(direction["single_users"]["below"])
    head = [
        "honest updates",
        *(f"cosine below {threshold}" for threshold in thresholds),
        f"refused at {direction['min_cosine']:g}",
    ]
    flips = [
        f"{run['attacker_refusals']} of {run['attacker_uploads']} ({kind})"
        for kind, run in direction["flip"].items()
    ]
    return _table(head, rows) + f"\n\nA sign flip at the bound is refused {', '.join(flips)} times."


def _below(spread: _Row) -> list[str]:
    return [f"{share:.1%}" for share in spread["below"].values()]


def _malformed(rows: list[_Row]) -> str:
    return _table(
        ["upload", "stopped by", "times"],
        [
            [row["name"], LAYERS[row["layer"]], f"{row['stopped_there']} of {row['trials']}"]
            for row in rows
        ],
    )


# --- figure ---------------------------------------------------------------------------------------


def save_figure(results: dict[str, Any], path: Path) -> None:
    """HR@10 under each attack: undefended, with the norm check, with the direction check."""
    rows = results["attacks"]
    counts = sorted({row["attackers"] for row in rows})
    with mpl.rc_context({"svg.hashsalt": "gallery", "font.size": 9.5}):
        figure = Figure(figsize=(10.4, 6.4), layout="constrained")
        panels = figure.subplots(1, len(counts), sharey=True, sharex=True, squeeze=False)[0]
        for axes, count in zip(panels, counts, strict=True):
            _panel(axes, [row for row in rows if row["attackers"] == count], results)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncol=4, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, metadata=metadata, dpi=110)


def _panel(axes: Any, rows: list[_Row], results: dict[str, Any]) -> None:  # noqa: ANN401
    """One row an attack, from top to bottom."""
    count = rows[0]["attackers"]
    alone = rows[0]["runs"]["alone"]["hr10"]
    axes.axvline(alone, color="#9aa5b1", linestyle=":", label="without attackers", zorder=1)
    for name, colour in _COLOURS.items():
        places = [i for i, row in enumerate(rows) if name in row["runs"]]
        axes.barh(
            [i - _HEIGHTS[name] for i in places],
            [rows[i]["runs"][name]["hr10"] for i in places],
            height=0.22,
            color=colour,
            label=_LABELS[name],
            zorder=2,
        )
    for i, row in enumerate(rows):
        _annotate(axes, i, row)
    within = [i for i, row in enumerate(rows) if row["within_bound"]]
    if within and within[0] > 0:
        axes.axhline(within[0] - 0.5, color=_INK, linewidth=0.8)
        for place, text in ((-0.5, "beyond the bound"), (within[0] - 0.47, "within the bound")):
            axes.text(
                _WIDTH, place, text, ha="right", va="top", fontsize=8, style="italic", color=_SOFT
            )
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, _WIDTH)
    axes.set_xticks([0, 0.2, 0.4, 0.6])
    who = "attacker" if count == 1 else "attackers"
    clients = results["sizes"]["setting"]["silos"]
    axes.set_title(f"{count} {who} of {clients}", loc="left", color=_INK, fontweight="bold")
    axes.set_xlabel("HR@10 of honest clients' users")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _annotate(axes: Any, place: int, row: _Row) -> None:  # noqa: ANN401
    """How often attackers were refused, and who was shown what they promote."""
    for name, run in row["runs"].items():
        if name not in _HEIGHTS:
            continue
        texts = []
        if name != "none":
            texts.append(f"refused {run['attacker_refusals']}/{run['attacker_uploads']}")
        if run["honest_refusals"]:
            texts.append(f"honest {run['honest_refusals']}/{run['honest_uploads']}")
        if "promotion" in row["label"]:
            texts.append(f"rank {run['target_rank']:.0f}, shown to {run['target_share']:.0%}")
        if not texts:
            continue
        axes.text(
            run["hr10"] + 0.01,
            place - _HEIGHTS[name],
            ", ".join(texts),
            va="center",
            fontsize=7,
            color=_INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            zorder=3,
        )
