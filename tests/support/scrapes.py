"""What a scrape shows of a meter, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from secagg.instruments import Instrument, Kind, Meter

__all__ = ["Samples", "by_label", "samples", "total", "value"]

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values by name and labels."""


def samples(meter: Meter) -> Samples:
    """Everything that a scrape shows."""
    families = text_string_to_metric_families(meter.exposition().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(meter: Meter, instrument: Instrument | str, **labels: str) -> float:
    """One value; of a histogram, how many there are.

    Args:
        instrument: or the name of one of its series.
    """
    name = instrument if isinstance(instrument, str) else _counted(instrument)
    return samples(meter)[name, tuple(sorted(labels.items()))]


def by_label(meter: Meter, instrument: Instrument) -> dict[str, float]:
    """The values other than 0 of an instrument with one label, by that."""
    name = _counted(instrument)
    found = {labels: number for (each, labels), number in samples(meter).items() if each == name}
    return {pairs[0][1]: number for pairs, number in found.items() if number}


def total(meter: Meter, instrument: Instrument) -> float:
    """The sum over all labels; of a histogram, how many values there are."""
    name = _counted(instrument)
    return sum(number for (each, _), number in samples(meter).items() if each == name)


def _counted(instrument: Instrument) -> str:
    suffix = "_count" if instrument.kind is Kind.HISTOGRAM else ""
    return instrument.prometheus + suffix
