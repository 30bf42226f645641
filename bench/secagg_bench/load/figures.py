"""Figures of what was measured: memory and health under load, and an hour of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from secagg_bench.axes import INK, tidy

__all__ = ["load_figure", "save", "soak_figure"]

_SERVER, _KEY_HOLDER, _WORKERS, _OTHER = "#2f7d5b", "#4e79a7", "#c8b26a", "#b5543c"
_TARGET_MS = 250


def load_figure(results: dict[str, Any]) -> Figure:
    """Peak memory by the number of clients, and how long health answers took."""
    rows = results["uploads"]["rows"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.4), layout="constrained")
    clients = [row["clients"] for row in rows]
    tidy(left, "Peak memory of the server", "clients that upload at once", "MB")
    for name, title, colour in (
        ("server_rss", "server", _SERVER),
        ("workers_rss", "its workers", _WORKERS),
        ("key_holder_rss", "key holder", _KEY_HOLDER),
    ):
        peaks = [row["peaks"][name] / 1e6 for row in rows]
        left.plot(clients, peaks, color=colour, marker="o", markersize=4, label=title)
    left.set_ylim(bottom=0)
    left.set_xticks(clients)
    left.legend(frameon=False, fontsize=8)
    tidy(right, "Health answers by gRPC", "clients that upload at once", "ms")
    places = range(len(rows))
    for shift, (key, title, colour) in enumerate(
        (
            ("p50_ms", "median", _KEY_HOLDER),
            ("p99_ms", "p99", _SERVER),
            ("max_ms", "most", _WORKERS),
        )
    ):
        values = [row["health"]["uploading"]["grpc"][key] for row in rows]
        right.bar([p + 0.26 * (shift - 1) for p in places], values, 0.24, color=colour, label=title)
    right.axhline(_TARGET_MS, color=_OTHER, linestyle=":", linewidth=1.2, label="target for p99")
    right.set_ylim(top=1.1 * max(_TARGET_MS, *right.get_ylim()))
    right.set_xticks(list(places), [str(each) for each in clients])
    right.legend(frameon=False, fontsize=8, loc="center left")
    return figure


def soak_figure(results: dict[str, Any]) -> Figure:
    """Memory, files and bytes on disk by the minute."""
    seen = results["minutes_seen"]
    minutes = seen["minute"]
    figure, axes = plt.subplots(1, 3, figsize=(11.4, 3.2), layout="constrained")
    tidy(axes[0], "Memory", "minutes", "MB")
    for name, title, colour in (
        ("server.rss", "server", _SERVER),
        ("server.workers", "its workers", _WORKERS),
        ("key_holder.rss", "key holder", _KEY_HOLDER),
    ):
        axes[0].plot(minutes, _in_mb(seen[name]), color=colour, label=title)
    tidy(axes[1], "Open files and threads", "minutes", "")
    axes[1].plot(minutes, seen["server.fds"], color=_SERVER, label="server, files")
    axes[1].plot(minutes, seen["server.threads"], color=_SERVER, linestyle=":", label="threads")
    axes[1].plot(minutes, seen["key_holder.fds"], color=_KEY_HOLDER, label="key holder, files")
    axes[1].plot(minutes, seen["key_holder.threads"], color=_KEY_HOLDER, linestyle=":")
    tidy(axes[2], "On disk", "minutes", "MB")
    for name, title, colour in (
        ("bytes.sums", "sums", _SERVER),
        ("bytes.models", "models", _KEY_HOLDER),
        ("bytes.uploads", "uploads", _WORKERS),
        ("bytes.store", "store", INK),
        ("bytes.ledger", "ledger", _OTHER),
    ):
        axes[2].plot(minutes, _in_mb(seen[name]), color=colour, label=title, linewidth=1.1)
    for each in axes:
        each.set_ylim(bottom=0)
        each.legend(frameon=False, fontsize=8)
    return figure


def _in_mb(sizes: list[float]) -> list[float]:
    return [size / 1e6 for size in sizes]


def save(figure: Figure, path: Path) -> None:
    """As SVG, the same bytes for the same results."""
    with mpl.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)
