"""The page of metrics, made from the lists of what both services measure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families
from reference_text import anchored, code, plain, table

from secagg.instruments import OTHER, Instrument, Kind, Meter
from secagg.rpc.metrics import REASONS
from secagg_keyholder.metrics import METRICS as KEY_HOLDER
from secagg_server.metrics import METRICS as SERVER

__all__ = ["SERVICES", "metrics_page"]


class Service(NamedTuple):
    """What a service measures, and where a scrape finds it by default."""

    title: str
    address: str
    metrics: tuple[Instrument, ...]


SERVICES = (
    Service("Server", "http://127.0.0.1:7403/metrics", SERVER),
    Service("Key holder", "http://127.0.0.1:7404/metrics", KEY_HOLDER),
)
_UNITS = {"s": "seconds", "By": "bytes", "1": "part of 1"}


def metrics_page() -> str:
    """Every metric of both services, and what every Python process adds."""
    parts = []
    for service in SERVICES:
        prefix = service.title.lower().replace(" ", "-")
        rows = [
            (
                anchored(f"{prefix}-{each.prometheus}", code(each.prometheus)),
                _kind(each),
                "<br>".join((plain(each.about), *_labels(each))),
            )
            for each in service.metrics
        ]
        parts += [
            f"## {service.title}\n",
            f"By default at {code(service.address)}.\n",
            table(("metric", "kind, unit", "meaning, labels"), rows),
        ]
    parts += ["## Process\n", "Of both, without their worker processes.\n", _process()]
    return "\n".join(parts)


def _kind(instrument: Instrument) -> str:
    unit = _UNITS.get(instrument.unit, instrument.unit.strip("{}"))
    said = ", ".join(filter(None, (str(instrument.kind), unit)))
    if instrument.kind is not Kind.HISTOGRAM:
        return said
    bounds = f"{instrument.buckets[0]:g} to {instrument.buckets[-1]:g}"
    return f"{said}; {len(instrument.buckets)} buckets, {bounds}"


def _labels(instrument: Instrument) -> Iterator[str]:
    """Each label with all of its values; the reasons of errors have a page of their own."""
    for name, values in zip(instrument.label_names, instrument.labels.values(), strict=True):
        every_reason = set(REASONS) <= {*values}
        own = [each for each in values if not every_reason or each not in REASONS or each == OTHER]
        said = [code(each) for each in own] + ["the [reasons](../errors.md)"] * every_reason
        yield f"{code(name)}: {', '.join(said)}"


def _process() -> str:
    families = text_string_to_metric_families(Meter((), process=True).exposition().decode())
    rows = [
        (
            code(f"{family.name}_total" if family.type == "counter" else family.name),
            family.type,
            plain(family.documentation),
        )
        for family in families
    ]
    return table(("metric", "kind", "meaning"), rows)
