"""How axes look in all figures."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["INK", "tidy"]

INK: Final = "#1f2933"


def tidy(axes: Any, title: str, x: str, y: str = "HR@10") -> None:  # noqa: ANN401
    """Title on the left, labels, and no more lines than are needed."""
    axes.set_title(title, loc="left", color=INK, fontweight="bold", fontsize=10)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
