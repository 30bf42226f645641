"""What a program measures of itself: a list of instruments, and the meter that keeps their values.

The list is data, from which the reference page, the dashboards and the alerts are made. Names,
units and kinds are OpenTelemetry's (https://opentelemetry.io/docs/specs/semconv/general/metrics/);
`Instrument.prometheus` says what a scrape shows. Whatever a label can be is known beforehand: who
a client is, tasks and rounds are never among it. A leaf (extra ``service``).
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "OTHER", "SILENT", "Instrument", "Kind", "Meter", "Reading"]

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
OTHER = "other"
"""What a label becomes whose value is not one of those declared."""

Reading = Callable[[], float | Mapping[Any, float]]
"""What a watched gauge shows: a number, or one for each value of its label."""

PATIENCE_S = 1.0
"""Seconds that a look waits for all watched gauges together; a scrape must not hang with them."""

_SUFFIXES = {"": "", "s": "_seconds", "By": "_bytes", "1": "_ratio"}
_NAME = re.compile(r"[a-z][a-z0-9]*([._][a-z0-9]+)*")
_COUNTED = re.compile(r"\{[a-z]+\}")


class Kind(StrEnum):
    """How values of an instrument are kept."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Instrument:
    """One thing that is measured.

    Attributes:
        name: OpenTelemetry's form, ``secagg.round.duration``.
        unit: in UCUM: ``s``, ``By``, ``1`` for a ratio; ``{upload}`` for what is counted.
        about: what it says, in one sentence.
        labels: every value that each label can have, by the label's name; a gauge has one at most.
        buckets: upper bounds of a histogram's buckets, in its unit.

    A program may declare one that it shares with others under its own label values (`narrowed`);
    whoever records names either.

    Raises:
        ValueError: a name, unit, label or bucket that no scrape could show.
    """

    name: str
    kind: Kind
    unit: str
    about: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in (self.name, *self.labels):
            if not _NAME.fullmatch(name):
                raise ValueError(f"expected a name such as secagg.round.duration; got {name!r}")
        if self.unit not in _SUFFIXES and not _COUNTED.fullmatch(self.unit):
            raise ValueError(
                f"expected one of the units {', '.join(filter(None, _SUFFIXES))}, or what is "
                f"counted, such as {{upload}}; got {self.unit!r}"
            )
        if list(self.buckets) != sorted(set(self.buckets)) or (
            bool(self.buckets) != (self.kind is Kind.HISTOGRAM)
        ):
            raise ValueError(
                f"expected growing buckets of a histogram, and of nothing else; {self.name} is a "
                f"{self.kind} with {self.buckets}"
            )
        if self.kind is Kind.GAUGE and len(self.labels) > 1:
            raise ValueError(f"expected one label of a gauge at most; got {list(self.labels)}")

    @property
    def prometheus(self) -> str:
        """The name that a scrape shows: with its unit, and ``_total`` where it counts.

        A histogram's series have ``_bucket``, ``_count`` and ``_sum`` after it.
        """
        plain = self.name.replace(".", "_") + _SUFFIXES.get(self.unit, "")
        return f"{plain}_total" if self.kind is Kind.COUNTER else plain

    def narrowed(self, *values: str) -> Instrument:
        """This instrument, with these values of its one label alone."""
        (label,) = self.labels
        return replace(self, labels={label: values})

    @property
    def label_names(self) -> tuple[str, ...]:
        """Its labels as a scrape shows them."""
        return tuple(name.replace(".", "_") for name in self.labels)


class Meter:
    """The values of some instruments; counters and histograms begin at zero for every label.

    Safe to use from several threads. Recording never raises for a value of a label that was not
    declared, which becomes `OTHER`: measuring must not be what fails.

    Args:
        instruments: all that may be recorded.
        process: whether to add what every Python process has: memory, CPU time, open files.

    Raises:
        ValueError: two instruments of one name.
    """

    def __init__(self, instruments: Iterable[Instrument], *, process: bool = False) -> None:
        self._registry = CollectorRegistry()
        self._declared: dict[str, Instrument] = {}
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        self._gauges: dict[str, dict[str, float] | _Watched] = {}
        for each in instruments:
            self._begin(each)
        self._registry.register(self)
        if process:
            prometheus_client.ProcessCollector(registry=self._registry)
            prometheus_client.GCCollector(registry=self._registry)

    def _begin(self, instrument: Instrument) -> None:
        if instrument.prometheus in {each.prometheus for each in self._declared.values()}:
            raise ValueError(f"expected each name once; {instrument.prometheus} comes twice")
        self._declared[instrument.name] = instrument
        name, labels = instrument.prometheus, instrument.label_names
        made: Counter | Histogram
        if instrument.kind is Kind.GAUGE:
            self._gauges[instrument.name] = {}
            return
        if instrument.kind is Kind.COUNTER:
            made = Counter(name, instrument.about, labels, registry=self._registry)
            self._counters[instrument.name] = made
        else:
            made = Histogram(
                name, instrument.about, labels, registry=self._registry, buckets=instrument.buckets
            )
            self._histograms[instrument.name] = made
        if labels:
            for values in itertools.product(*instrument.labels.values()):
                made.labels(*values)

    def add(self, instrument: Instrument, amount: float = 1.0, /, **labels: str) -> None:
        """Count."""
        counter, known = self._counters[instrument.name], self._known(instrument, labels)
        (counter.labels(**known) if known else counter).inc(amount)

    def record(self, instrument: Instrument, value: float, /, **labels: str) -> None:
        """Put a value into a histogram."""
        histogram, known = self._histograms[instrument.name], self._known(instrument, labels)
        (histogram.labels(**known) if known else histogram).observe(value)

    def set(self, instrument: Instrument, value: float, /, **labels: str) -> None:
        """Set a gauge; one that was never set is not shown."""
        kept = self._gauges[instrument.name]
        if not isinstance(kept, dict):
            raise TypeError(f"expected a gauge to set; {instrument.name} is watched")
        kept[next(iter(self._known(instrument, labels).values()), "")] = value

    def watch(self, instrument: Instrument, read: Reading, /) -> None:
        """Read a gauge whenever somebody looks; one whose reading fails is left out of that look.

        So is one that takes longer than `PATIENCE_S`; it is not read again before it is back.

        Args:
            read: callable from any thread.
        """
        if instrument.name not in self._gauges:
            raise KeyError(f"expected a gauge of this meter; got {instrument.name}")
        self._gauges[instrument.name] = _Watched(read)

    def _known(self, instrument: Instrument, labels: Mapping[str, str]) -> dict[str, str]:
        """Labels with values that were declared."""
        declared = self._declared[instrument.name]
        return {
            name: labels[name] if labels[name] in values else OTHER
            for name, values in zip(declared.label_names, declared.labels.values(), strict=True)
        }

    @contextmanager
    def timed(self, instrument: Instrument, /, **labels: str) -> Iterator[None]:
        """Put the seconds that a block takes into a histogram, whether it raises or not."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.record(instrument, time.perf_counter() - started, **labels)

    def collect(self) -> Iterator[Metric]:
        """All gauges as they are now, for the registry."""
        kept = dict(self._gauges)
        begun = {name: each.begun() for name, each in kept.items() if isinstance(each, _Watched)}
        until = time.monotonic() + PATIENCE_S
        for name, each in kept.items():
            instrument = self._declared[name]
            if isinstance(each, _Watched):
                try:
                    found = begun[name].result(max(0.0, until - time.monotonic()))
                    values = self._labelled(instrument, found)
                except Exception:  # noqa: S112 - of whatever kind: the others can still be read
                    continue
            else:
                values = dict(each)
            family = GaugeMetricFamily(
                instrument.prometheus, instrument.about, labels=instrument.label_names
            )
            for label, value in values.items():
                family.add_metric([label] if instrument.labels else [], value)
            if values:
                yield family

    def _labelled(
        self, instrument: Instrument, found: float | Mapping[Any, float]
    ) -> dict[str, float]:
        """What a reading gave, by label; those that were not declared are one."""
        if not isinstance(found, Mapping):
            return {"": float(found)}
        (label,) = instrument.label_names
        values: dict[str, float] = {}
        for key, value in found.items():
            (known,) = self._known(instrument, {label: key}).values()
            values[known] = values.get(known, 0.0) + float(value)
        return values

    def exposition(self) -> bytes:
        """All values, in Prometheus' text format; see `CONTENT_TYPE`."""
        return generate_latest(_WithoutBeginnings(self._registry))


class _WithoutBeginnings(Collector):
    """A registry without when each series began, which no other reader of ours wants to know.

    The library would leave that out by a switch for the whole process, which is not ours alone.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """See the base."""
        for family in self._registry.collect():
            kept = [each for each in family.samples if not each.name.endswith("_created")]
            family.samples = kept
            yield family


class _Watched:
    """A reading that is made in a thread of its own; all who look meanwhile wait for the same."""

    def __init__(self, read: Reading) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._last: Future[float | Mapping[Any, float]] | None = None

    def begun(self) -> Future[float | Mapping[Any, float]]:
        """What is going to be read."""
        with self._lock:
            if self._last is None or self._last.done():
                self._last = Future()
                # A daemon: one that hangs must not keep the process from ending.
                threading.Thread(target=self._answer, args=(self._last,), daemon=True).start()
            return self._last

    def _answer(self, answer: Future[float | Mapping[Any, float]]) -> None:
        try:
            answer.set_result(self._read())
        except Exception as error:  # it is whoever looks that shall have it
            answer.set_exception(error)


class _Silent(Meter):
    """Keeps nothing."""

    def __init__(self) -> None:
        super().__init__(())

    def add(self, instrument: Instrument, amount: float = 1.0, /, **labels: str) -> None:
        """See the base."""

    def record(self, instrument: Instrument, value: float, /, **labels: str) -> None:
        """See the base."""

    def set(self, instrument: Instrument, value: float, /, **labels: str) -> None:
        """See the base."""

    def watch(self, instrument: Instrument, read: Reading, /) -> None:
        """See the base."""


SILENT: Meter = _Silent()
"""For whoever is not measured: embedded, or in a test."""
