"""What is wrong with a PromQL query, given the metrics that there are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

from secagg.instruments import Instrument, Kind, Meter

__all__ = ["Known", "catalogue", "faults", "names"]

# Every series has these by being scraped, or by being an alert; their values are not ours.
SCRAPED = frozenset({"job", "instance"})
_GROWTH = {"rate", "increase"}
_CHANGE = {"delta", "deriv", "predict_linear", "changes"}
_OVER_TIME = _GROWTH | _CHANGE
_PARTS = ("_bucket", "_sum", "_count")


@dataclass(frozen=True)
class Known:
    """One series that may be asked for: how it is kept, and what its labels can be."""

    kind: Kind
    labels: Mapping[str, tuple[str, ...]]


def catalogue(*lists: tuple[Instrument, ...]) -> dict[str, Known]:
    """All series that these instruments and a Python process show, and Prometheus' own."""
    known = {
        "up": Known(Kind.GAUGE, {}),
        "ALERTS": Known(Kind.GAUGE, {"alertname": (), "alertstate": (), "severity": ()}),
    }
    for instrument in (each for instruments in lists for each in instruments):
        labels = dict(zip(instrument.label_names, instrument.labels.values(), strict=True))
        name = instrument.prometheus
        if name in known:  # of the other service, with other values
            before = known[name].labels
            labels = {label: (*before[label], *values) for label, values in labels.items()}
        if instrument.kind is Kind.HISTOGRAM:
            known |= {f"{name}{part}": Known(Kind.HISTOGRAM, labels) for part in _PARTS[1:]}
            known[f"{name}_bucket"] = Known(Kind.HISTOGRAM, {**labels, "le": ()})
        known[name] = Known(instrument.kind, labels)
    text = Meter((), process=True).exposition().decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            kind = Kind.COUNTER if family.type == "counter" else Kind.GAUGE
            known[sample.name] = Known(kind, dict.fromkeys(sample.labels, ()))
    return known


def _selectors(
    expr: Any,  # noqa: ANN401 - a tree of the parser's own
    functions: tuple[str, ...] = (),
) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Every selector of a query, with the functions around it from the outermost on."""
    match expr:
        case promql.VectorSelector():
            yield expr, functions
        case promql.MatrixSelector():
            yield expr.vector_selector, functions
        case promql.Call():
            for argument in expr.args:
                yield from _selectors(argument, (*functions, expr.func.name))
        case promql.BinaryExpr():
            yield from _selectors(expr.lhs, functions)
            yield from _selectors(expr.rhs, functions)
        case promql.NumberLiteral() | promql.StringLiteral():
            pass
        case promql.AggregateExpr() | promql.ParenExpr() | promql.UnaryExpr():
            yield from _selectors(expr.expr, functions)
        case _:
            raise TypeError(f"expected a kind of expression that is known here; got {type(expr)}")


def _labels(expr: Any, known: Mapping[str, Known]) -> frozenset[str]:  # noqa: ANN401
    """The labels that an answer to a query has."""
    match expr:
        case promql.AggregateExpr():
            return frozenset(expr.modifier.labels) if expr.modifier else frozenset()
        case promql.VectorSelector():
            there = known.get(expr.name or "")
            return SCRAPED | frozenset(there.labels) if there else frozenset()
        case promql.MatrixSelector():
            return _labels(expr.vector_selector, known)
        case promql.Call():
            found = frozenset[str]().union(*(_labels(each, known) for each in expr.args))
            return found - {"le"} if expr.func.name == "histogram_quantile" else found
        case promql.BinaryExpr():
            if isinstance(expr.lhs, promql.NumberLiteral):
                return _labels(expr.rhs, known)
            return _labels(expr.lhs, known)
        case promql.ParenExpr() | promql.UnaryExpr():
            return _labels(expr.expr, known)
        case _:
            return frozenset()


def _grouped(expr: Any) -> Iterator[Any]:  # noqa: ANN401
    """Every aggregation of a query."""
    match expr:
        case promql.AggregateExpr():
            yield expr
            yield from _grouped(expr.expr)
        case promql.Call():
            for argument in expr.args:
                yield from _grouped(argument)
        case promql.BinaryExpr():
            yield from _grouped(expr.lhs)
            yield from _grouped(expr.rhs)
        case promql.ParenExpr() | promql.UnaryExpr():
            yield from _grouped(expr.expr)


def names(query: str) -> set[str]:
    """The series that a query asks for."""
    return {selector.name for selector, _ in _selectors(promql.parse(query))}


def faults(query: str, known: Mapping[str, Known], legend: str = "") -> list[str]:
    """What is wrong with a query whose variables are filled in; nothing if all is well.

    Args:
        legend: what its lines are called; its ``{{labels}}`` must be labels of the answer.
    """
    tree = promql.parse(query)
    found: list[str] = []
    for selector, functions in _selectors(tree):
        there = known.get(selector.name)
        if there is None:
            found.append(f"no metric {selector.name}")
            continue
        found += _misused(selector.name, there, functions)
        for matcher in selector.matchers.matchers:
            found += _mismatched(selector.name, there, matcher)
    for each in _grouped(tree):
        if each.modifier:
            may = _labels(each.expr, known)
            found += [
                f"no label {label} to group by"
                for label in each.modifier.labels
                if label not in may
            ]
    missing = set(re.findall(r"\{\{ *(\w+) *\}\}", legend)) - _labels(tree, known)
    return found + [f"no label {label} for the legend" for label in sorted(missing)]


def _misused(name: str, there: Known, functions: tuple[str, ...]) -> Iterator[str]:
    inner = functions[-1] if functions else ""
    if there.kind is Kind.HISTOGRAM and not name.endswith(_PARTS):
        yield f"{name} is a histogram: ask for _bucket, _sum or _count"
    elif there.kind is Kind.GAUGE and inner in _GROWTH:
        yield f"{name} is a gauge and has no {inner}"
    elif there.kind is not Kind.GAUGE and inner not in _GROWTH:
        yield f"{name} counts: ask for its rate or increase"


def _mismatched(name: str, there: Known, matcher: Any) -> Iterator[str]:  # noqa: ANN401
    if matcher.name in SCRAPED:
        return
    if matcher.name not in there.labels:
        yield f"{name} has no label {matcher.name}"
        return
    values = there.labels[matcher.name]
    regex = matcher.op in (promql.MatchOp.Re, promql.MatchOp.NotRe)
    for value in matcher.value.split("|") if regex else [matcher.value]:
        if values and value not in values:
            yield f"{matcher.name} of {name} is never {value}"
