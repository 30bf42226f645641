"""How a panel looks: one function for each kind, on Grafana's own builders.

What it says in its corner is what its instruments say of themselves, and so is its unit. No panel
has a query of a metric by a name that is written out; each is that of an instrument.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    timeseries,
)
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmaps
from grafana_foundation_sdk.models import prometheus as queries

from secagg.instruments import Instrument, Kind

__all__ = [
    "BAD",
    "DATASOURCE",
    "FINE",
    "QUIET",
    "SO_SO",
    "Query",
    "Scope",
    "bars",
    "clouds",
    "lines",
    "number",
]

DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
FINE, SO_SO, BAD, QUIET = "green", "orange", "red", "blue"
# Ratios are shown as parts of a hundred; what is counted has no unit.
_UNITS = {"s": "s", "By": "bytes", "1": "percentunit", "{bit}": "suffix: bit"}
Steps = Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Query:
    """A query, and what its lines are called; ``{{label}}`` stands for a label's value."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Scope:
    """Which series a dashboard looks at.

    Attributes:
        where: matchers that every series has, of the variables of the dashboard.
    """

    where: str

    def of(self, name: str, where: str = "") -> str:
        """A series by its name."""
        return f"{name}{{{', '.join(filter(None, (self.where, where)))}}}"

    def gauge(self, instrument: Instrument, where: str = "") -> str:
        """A gauge as it stands."""
        if instrument.kind is not Kind.GAUGE:
            raise TypeError(f"expected a gauge; {instrument.name} is a {instrument.kind}")
        return self.of(instrument.prometheus, where)

    def grown(
        self, counter: Instrument, by: str = "", where: str = "", over: str = "$__rate_interval"
    ) -> str:
        """How much a counter has grown."""
        return f"{_sum(by)} (increase({self._count(counter, where)}[{over}]))"

    def rate(self, counter: Instrument, by: str = "", where: str = "") -> str:
        """How much a counter grows in a second."""
        return f"{_sum(by)} (rate({self._count(counter, where)}[$__rate_interval]))"

    def quantile(self, part: float, histogram: Instrument, by: str = "") -> str:
        """What so many of the observations are below; no line where there is none."""
        labels = f"{by}, le" if by else "le"
        return f"histogram_quantile({part:g}, {self.buckets(histogram, labels, 'rate')}) >= 0"

    def mean(self, histogram: Instrument, by: str = "") -> str:
        """The mean of the observations; no line where there is none."""
        return f"{self.total(histogram, by)}\n  / ({self.seen(histogram, by)} > 0)"

    def total(self, histogram: Instrument, by: str = "") -> str:
        """What observations add up to, in a second."""
        return self._part(histogram, "sum", by)

    def seen(self, histogram: Instrument, by: str = "") -> str:
        """Observations in a second."""
        return self._part(histogram, "count", by)

    def buckets(self, histogram: Instrument, by: str = "le", function: str = "increase") -> str:
        """Observations by bucket."""
        return self._part(histogram, "bucket", by, function)

    def _part(self, histogram: Instrument, part: str, by: str, function: str = "rate") -> str:
        if histogram.kind is not Kind.HISTOGRAM:
            raise TypeError(f"expected a histogram; {histogram.name} is a {histogram.kind}")
        series = self.of(f"{histogram.prometheus}_{part}")
        return f"{_sum(by)} ({function}({series}[$__rate_interval]))"

    def _count(self, counter: Instrument, where: str) -> str:
        if counter.kind is not Kind.COUNTER:
            raise TypeError(f"expected a counter; {counter.name} is a {counter.kind}")
        return self.of(counter.prometheus, where)


def _sum(by: str) -> str:
    return f"sum by ({by})" if by else "sum"


def _said(about: Iterable[Instrument], more: str) -> str:
    return " ".join(filter(None, [*(each.about for each in about), more]))


def _unit(about: Sequence[Instrument], unit: str) -> str:
    return unit or _UNITS.get(about[0].unit if about else "", "short")


def _targets(shown: Sequence[Query], *, instant: bool = False) -> list[prometheus.Dataquery]:
    found = []
    for number, each in enumerate(shown):
        query = (
            prometheus.Dataquery()
            .expr(each.expr)
            .legend_format(each.legend)
            .ref_id(chr(ord("A") + number))
            .editor_mode(queries.QueryEditorMode.CODE)
        )
        found.append(query.instant() if instant else query.range())
    return found


def _thresholds(steps: Steps, first: str) -> dashboard.ThresholdsConfig:
    return (
        dashboard.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(None, first), *(models.Threshold(*step) for step in steps)])
    )


def number(
    title: str,
    shown: Query,
    *about: Instrument,
    steps: Steps = (),
    first: str = FINE,
    unit: str = "",
    more: str = "",
    words: Mapping[str, tuple[str, str]] | None = None,
    nothing: str = "no data",
    width: int = 3,
    named: bool = False,
    decimals: int | None = None,
) -> stat.Panel:
    """One number, as it is now.

    Args:
        steps: from which value on it has which colour; below all of them it has ``first``.
        words: what stands for a value, and in which colour.
        nothing: what stands where there is none.
        named: show what the query is called, and not its value.
    """
    panel = (
        stat.Panel()
        .title(title)
        .description(_said(about, more))
        .datasource(DATASOURCE)
        .targets([*_targets([shown], instant=True)])
        .unit(_unit(about, unit))
        .thresholds(_thresholds(steps, first))
        .color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .color_mode(looks.BigValueColorMode.BACKGROUND_SOLID)
        .graph_mode(looks.BigValueGraphMode.NONE)
        .text_mode(looks.BigValueTextMode.NAME if named else looks.BigValueTextMode.VALUE)
        .no_value(nothing)
        .span(width)
        .height(4)
    )
    if decimals is not None:
        panel.decimals(decimals)
    if words:
        options = {
            value: models.ValueMappingResult(text=text, color=colour)
            for value, (text, colour) in words.items()
        }
        panel.mappings([models.ValueMap(options)])
    return panel


def lines(
    title: str,
    shown: Sequence[Query],
    *about: Instrument,
    steps: Steps = (),
    unit: str = "",
    more: str = "",
    width: int = 8,
    stacked: bool = False,
    colours: Mapping[str, str] | None = None,
    least: float | None = 0.0,
    most: float | None = None,
) -> timeseries.Panel:
    """Values over time.

    Args:
        steps: from which value on there is a line of which colour.
        colours: of lines, by what they are called.
        least: where the axis begins; None for wherever the values do.
        most: where it ends.
    """
    panel = (
        timeseries.Panel()
        .title(title)
        .description(_said(about, more))
        .datasource(DATASOURCE)
        .targets([*_targets(shown)])
        .unit(_unit(about, unit))
        .legend(
            common.VizLegendOptions()
            .display_mode(looks.LegendDisplayMode.TABLE)
            .placement(looks.LegendPlacement.BOTTOM)
            .calcs(["lastNotNull", "max"])
            .sort_by("Max")
            .sort_desc(True)
            .show_legend(True)
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(looks.TooltipDisplayMode.MULTI)
            .sort(looks.SortOrder.DESCENDING)
        )
        .line_width(1)
        .fill_opacity(30 if stacked else 8)
        # Something that happens now and then is a point, with nothing on either side of it.
        .show_points(looks.VisibilityMode.AUTO)
        .span_nulls(False)
        .span(width)
        .height(8)
    )
    if least is not None:
        panel.min(least)
    if most is not None:
        panel.max(most)
    if stacked:
        panel.stacking(common.StackingConfig().mode(looks.StackingMode.NORMAL))
    if steps:
        panel.thresholds(_thresholds(steps, "transparent")).thresholds_style(
            common.GraphThresholdsStyleConfig().mode(looks.GraphThresholdsStyleMode.DASHED)
        )
    for name, colour in (colours or {}).items():
        fixed = {"mode": "fixed", "fixedColor": colour}
        panel.override_by_name(name, [models.DynamicConfigValue("color", fixed)])
    return panel


def bars(
    title: str,
    shown: Sequence[Query],
    *about: Instrument,
    unit: str = "",
    more: str = "",
    width: int = 8,
    colours: Mapping[str, str] | None = None,
) -> timeseries.Panel:
    """What has happened in each minute or longer, in bars on one another."""
    return (
        lines(
            title,
            shown,
            *about,
            unit=unit,
            more=more,
            width=width,
            stacked=True,
            colours=colours,
        )
        .draw_style(looks.GraphDrawStyle.BARS)
        .fill_opacity(80)
        .line_width(0)
        .interval("1m")
        .legend(
            common.VizLegendOptions()
            .display_mode(looks.LegendDisplayMode.TABLE)
            .placement(looks.LegendPlacement.BOTTOM)
            .calcs(["sum"])
            .sort_by("Total")
            .sort_desc(True)
            .show_legend(True)
        )
    )


def clouds(
    title: str,
    scope: Scope,
    histogram: Instrument,
    *,
    more: str = "",
    width: int = 8,
) -> heatmap.Panel:
    """A histogram over time: darker where more of it is."""
    return (
        heatmap.Panel()
        .title(title)
        .description(_said([histogram], more))
        .datasource(DATASOURCE)
        .with_target(
            prometheus.Dataquery()
            .expr(scope.buckets(histogram))
            .legend_format("{{le}}")
            .ref_id("A")
            .editor_mode(queries.QueryEditorMode.CODE)
            .format(queries.PromQueryFormat.HEATMAP)
            .range()
        )
        .interval("1m")
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(heatmaps.HeatmapColorMode.SCHEME)
            .scheme("Blues")
            .scale(heatmaps.HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(32)
            .fill(QUIET)
        )
        .rows_frame(heatmap.RowsHeatmapOptions().layout(looks.HeatmapCellLayout.AUTO))
        .y_axis(heatmap.YAxisConfig().unit(_unit([histogram], "")))
        # Cells in which nothing is are left blank.
        .filter_values(heatmap.FilterValueRange().le(1e-9))
        .show_legend()
        .span(width)
        .height(8)
    )
