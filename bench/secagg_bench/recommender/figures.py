"""``python -m secagg_bench.recommender.figures``: two pictures of the product catalogue.

A heat map of how the figures of a product go together, and a pair plot that shows how. Both by
rank (Spearman), because prices and counts span five decades and are far from normal.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
import typer
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from secagg.commands import exits_cleanly, out
from secagg_recommender.catalogue import Catalogue, load_catalogue
from secagg_recommender.datasets import catalogue_files, dataset_folder
from secagg_recommender.interactions import DataError

__all__ = ["save_figures"]

_INK: Final = "#1f2933"
_SOFT: Final = "#5a6672"
_BAR: Final = "#0072B2"
_FEATURES: Final = {
    "price": "price",
    "list_price": "list price",
    "discount": "discount",
    "rating": "rating",
    "rating_count": "number of ratings",
}
_LOGARITHMIC: Final = frozenset({"price", "list_price", "rating_count"})
_STYLE: Final[dict[Any, Any]] = {
    "svg.hashsalt": "catalogue",
    "font.size": 9.0,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _SOFT,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
}

app = typer.Typer(help=__doc__)


class Format(StrEnum):
    """Of the pictures."""

    svg = "svg"
    png = "png"


def save_figures(catalogue: Catalogue, folder: Path, suffix: str = ".svg") -> tuple[Path, Path]:
    """Write ``catalogue-correlation`` and ``catalogue-pairs`` into ``folder``.

    Each pair of figures is measured on the products that have both; the heat map says how many.

    Raises:
        DataError: prices in several currencies, or fewer than three products with all figures.
    """
    frame = catalogue.frame
    currencies = set(frame["currency"]) - {""}
    complete = len(frame.dropna(subset=list(_FEATURES)))
    if len(currencies) > 1 or complete < 3:
        raise DataError(
            "expected prices in one currency and three products or more with all figures, got "
            f"currencies={', '.join(sorted(currencies))} products={complete}; draw other files"
        )
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / f"catalogue-correlation{suffix}", folder / f"catalogue-pairs{suffix}")
    with mpl.rc_context(_STYLE):
        for path, draw in zip(paths, (_heat_map, _pair_plot), strict=True):
            metadata = {"Date": None} if suffix == ".svg" else {}
            draw(frame[list(_FEATURES)], "".join(currencies)).savefig(
                path, metadata=metadata, dpi=110, bbox_inches="tight"
            )
    return paths


def _heat_map(frame: pd.DataFrame, _: str) -> Figure:
    """Rank correlations, with the number of products behind each."""
    ranks = frame.corr(method="spearman").to_numpy()
    known = frame.notna().to_numpy().astype(np.int64)
    shared = known.T @ known
    figure = Figure(figsize=(6.6, 5.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(ranks, cmap="RdBu_r", vmin=-1, vmax=1)
    for (row, column), rank in np.ndenumerate(ranks):
        ink = "white" if abs(rank) > 0.6 else _INK
        axes.text(
            column, row - 0.08, _signed(rank), ha="center", va="center", color=ink,
            fontsize=12,
        )  # fmt: skip
        axes.text(
            column, row + 0.27, f"{shared[row, column]:,}", ha="center", va="center", color=ink,
            fontsize=7,
        )  # fmt: skip
    names = list(_FEATURES.values())
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"What goes together among {len(frame):,} products", loc="left", color=_INK)
    bar = figure.colorbar(image, ax=axes, shrink=0.85, ticks=(-1, -0.5, 0, 0.5, 1))
    bar.set_label("Spearman's rank correlation (below: products that have both)", color=_SOFT)
    bar.outline.set_visible(False)
    return figure


def _pair_plot(frame: pd.DataFrame, currency: str) -> Figure:
    """Densities below the diagonal, histograms on it, correlations above it."""
    names = list(_FEATURES)
    units = {"price": currency, "list_price": currency, "rating": "stars"}
    labels = [", ".join(filter(None, (_FEATURES[name], units.get(name)))) for name in names]
    figure = Figure(figsize=(10.4, 9.6))
    gaps = {"wspace": 0.1, "hspace": 0.1, "left": 0.08, "right": 0.99, "bottom": 0.06, "top": 0.95}
    grid = figure.subplots(len(names), len(names), squeeze=False, gridspec_kw=gaps)
    values = {name: _scaled(frame, name) for name in names}
    ranks = frame.corr(method="spearman").to_numpy()
    for (row, column), axes in np.ndenumerate(grid):
        if row < column:
            _correlation(axes, float(ranks[row, column]))
            continue
        down, across = names[row], names[column]
        if row == column:
            _histogram(axes, values[down], down)
        else:
            _density(axes, values[across], values[down])
            _scale(axes.yaxis, down, values[down])
        _scale(axes.xaxis, across, values[across])
        axes.tick_params(labelbottom=row == len(names) - 1, labelleft=column == 0)
        axes.set_xlabel(labels[column] if row == len(names) - 1 else "")
        axes.set_ylabel(labels[row] if column == 0 else "")
    figure.suptitle(
        f"{len(frame):,} products: each figure, each pair, and their rank correlation",
        x=0.02, ha="left",
    )  # fmt: skip
    return figure


def _scaled(frame: pd.DataFrame, name: str) -> npt.NDArray[np.float64]:
    """A column as it is drawn: decimal logarithms of prices and counts; NaN where missing."""
    values = frame[name].to_numpy(dtype=np.float64)
    # A product with no rating yet counts as half a one, so that it has a place on the axis.
    return np.log10(np.maximum(values, 0.5)) if name in _LOGARITHMIC else values


def _correlation(axes: Axes, rank: float) -> None:
    """A number on a tile of its colour."""
    axes.set_facecolor(mpl.colormaps["RdBu_r"]((rank + 1) / 2))
    ink = "white" if abs(rank) > 0.6 else _INK
    axes.text(
        0.5, 0.5, _signed(rank), transform=axes.transAxes, ha="center", va="center",
        fontsize=16, color=ink,
    )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _histogram(axes: Axes, values: npt.NDArray[np.float64], name: str) -> None:
    """How often; the height has no scale of its own."""
    known = values[np.isfinite(values)]
    # The shop rounds ratings to tenths of a star: other bins would beat against them.
    edges = np.arange(0.95, 5.1, 0.1).tolist() if name == "rating" else None
    axes.hist(known, bins=edges or 40, color=_BAR)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)


def _density(axes: Axes, across: npt.NDArray[np.float64], down: npt.NDArray[np.float64]) -> None:
    """Products in each hexagon, on a logarithmic scale of colour."""
    both = np.isfinite(across) & np.isfinite(down)
    axes.hexbin(
        across[both], down[both], gridsize=32, bins="log", mincnt=1, cmap="Blues", linewidths=0.1,
        rasterized=True,
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)


def _scale(axis: XAxis | YAxis, name: str, values: npt.NDArray[np.float64]) -> None:
    """Readable ticks: 100, 10k, 1M; percent; stars. One range wherever the figure is drawn."""
    formats: dict[str, tuple[float, Callable[[float, int], str]]] = {
        "discount": (0.25, lambda value, _: f"{value:.0%}"),
        "rating": (1.0, lambda value, _: f"{value:g}"),
    }
    decades = 2.0 if name == "rating_count" else 1.0
    step, text = formats.get(name, (decades, lambda value, _: _short(10.0**value)))
    axis.set_major_locator(MultipleLocator(step))
    axis.set_major_formatter(FuncFormatter(text))
    low, high = np.nanmin(values), np.nanmax(values)
    margin = 0.05 * (high - low) or 0.5
    axis.set_view_interval(low - margin, high + margin, ignore=True)


def _short(value: float) -> str:
    """1000 as 1k, a million as 1M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _signed(rank: float) -> str:
    """Two digits with a real minus sign."""
    return f"{rank:.2f}".replace("-", "−")


@app.command()
@exits_cleanly
def main(
    folder: Annotated[Path, typer.Argument(help="where the pictures go")] = Path("docs"),
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="SECAGG_DATA_DIR", help="holds amazon-products-2023/"),
    ] = None,
    format_: Annotated[Format, typer.Option("--format")] = Format.svg,
) -> None:
    """Draw the product catalogue."""
    files = catalogue_files(dataset_folder("amazon-products-2023", data_dir))
    for path in save_figures(load_catalogue(*files), folder, f".{format_}"):
        out.print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    app()
