"""What dashboards ask, and a Prometheus that answers, by its HTTP interface."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit
from urllib.request import urlopen

__all__ = ["Panel", "Prometheus", "PrometheusError", "Series", "filled", "panels", "read", "values"]

_LABEL_VALUES = re.compile(r"label_values\((.+), *(\w+)\)")
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")


class PrometheusError(Exception):
    """Prometheus cannot be reached, or does not understand."""


@dataclass(frozen=True)
class Series:
    """One line of an answer: its labels, and values by time in seconds since 1970."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One panel, as it stands in a dashboard.

    Attributes:
        row: the title of the row that it is in.
        queries: expression and legend of each of its queries.
        instant: whether it shows one value alone.
        model: all of it.
    """

    row: str
    title: str
    kind: str
    queries: list[tuple[str, str]]
    instant: bool
    model: dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """A dashboard."""
    board: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return board


def panels(board: Mapping[str, Any]) -> Iterator[Panel]:
    """The panels of a dashboard, from its top to its bottom."""
    row = ""
    for each in board["panels"]:
        if each["type"] == "row":
            row = each["title"]
            continue
        targets = each["targets"]
        yield Panel(
            row,
            each["title"],
            each["type"],
            [(target["expr"], target.get("legendFormat", "")) for target in targets],
            all(target.get("instant", False) for target in targets),
            each,
        )


class Prometheus:
    """A Prometheus.

    Args:
        address: such as ``http://127.0.0.1:9090``.

    Raises:
        PrometheusError: not an HTTP address; or, by every method, no answer or one that is none.
    """

    def __init__(self, address: str) -> None:
        if urlsplit(address).scheme not in ("http", "https"):
            raise PrometheusError(f"expected an address such as http://host:9090; got {address!r}")
        self._address = address.rstrip("/")

    def ask(self, path: str, **parameters: str) -> Any:  # noqa: ANN401 - JSON
        """What is in the data of an answer."""
        url = f"{self._address}/api/v1/{path}?{urlencode(parameters)}"
        try:
            with urlopen(url, timeout=30) as answer:  # noqa: S310 - the scheme is looked at above
                return json.load(answer)["data"]
        except OSError as error:
            said = error.read().decode() if hasattr(error, "read") else str(error)
            raise PrometheusError(f"{path} {parameters}: {said}") from None

    def now(self, expr: str, at: float) -> list[Series]:
        """A query at one time."""
        found = self.ask("query", query=expr, time=f"{at:.3f}")
        if found["resultType"] == "scalar":
            return [Series({}, [_point(found["result"])])]
        return [Series(each["metric"], [_point(each["value"])]) for each in found["result"]]

    def over(self, expr: str, start: float, end: float, step: float) -> list[Series]:
        """A query over time."""
        found = self.ask(
            "query_range", query=expr, start=f"{start:.3f}", end=f"{end:.3f}", step=f"{step:.3f}"
        )
        return [
            Series(each["metric"], [_point(point) for point in each["values"]])
            for each in found["result"]
        ]

    def label_values(self, selector: str, label: str, start: float, end: float) -> list[str]:
        """What a label is in the series that a selector finds."""
        period = {"start": f"{start:.3f}", "end": f"{end:.3f}"}
        return list(self.ask(f"label/{label}/values", **{"match[]": selector}, **period))


def _point(point: tuple[float, str]) -> tuple[float, float]:
    return float(point[0]), float(point[1])


def values(
    board: Mapping[str, Any], prometheus: Prometheus, start: float, end: float
) -> dict[str, str]:
    """What the variables of a dashboard stand for when all is chosen, as Grafana fills them in."""
    found: dict[str, str] = {}
    for each in board["templating"]["list"]:
        if each["type"] != "query":
            continue
        match = _LABEL_VALUES.fullmatch(each["query"])
        if match is None:
            raise PrometheusError(f"expected label_values(...) of a variable; got {each['query']}")
        there = prometheus.label_values(filled(match.group(1), found), match.group(2), start, end)
        found[each["name"]] = "|".join(re.escape(value) for value in there).replace("\\", "\\\\")
    return found


def filled(expr: str, variables: Mapping[str, str]) -> str:
    """A query with what its variables stand for.

    Raises:
        PrometheusError: there is a variable without a value.
    """
    missing = set(_VARIABLE.findall(expr)) - variables.keys()
    if missing:
        raise PrometheusError(
            f"expected variables of the dashboard; got {', '.join(sorted(missing))} in {expr}"
        )
    return _VARIABLE.sub(lambda match: variables[match.group(1)], expr)
