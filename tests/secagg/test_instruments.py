"""Instruments as data, and the meter that keeps their values: nothing that is measured may fail."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, generate_latest
from scrapes import samples, value

from secagg import instruments
from secagg.instruments import OTHER, SILENT, Instrument, Kind, Meter

CALLS = Instrument("test.calls", Kind.COUNTER, "{call}", "Calls.", {"who": ("one", "two")})
BYTES = Instrument("test.read", Kind.COUNTER, "By", "Bytes that were read.")
SECONDS = Instrument(
    "test.duration", Kind.HISTOGRAM, "s", "Time.", {"rpc.method": ("Get",)}, (0.1, 1.0)
)
ROOM = Instrument("test.room", Kind.GAUGE, "By", "Room.")
STATES = Instrument("test.states", Kind.GAUGE, "{task}", "Tasks.", {"state": ("UP", "DOWN")})
ALL = (CALLS, BYTES, SECONDS, ROOM, STATES)


@pytest.fixture
def meter() -> Meter:
    return Meter(ALL)


def shown(meter: Meter) -> set[str]:
    return {name for name, _ in samples(meter)}


# --- what an instrument may be --------------------------------------------------------------------

words = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)
names = st.lists(words, min_size=1, max_size=4).map(".".join)
kinds = st.sampled_from(Kind)
units = st.sampled_from(["", "s", "By", "1", "{upload}"])


@given(name=names, kind=kinds, unit=units, labels=st.lists(names, unique=True, max_size=1))
@settings(deadline=None)
def test_whatever_may_be_declared_can_be_scraped(
    name: str, kind: Kind, unit: str, labels: list[str]
) -> None:
    buckets = (1.0, 2.0) if kind is Kind.HISTOGRAM else ()
    made = Instrument(name, kind, unit, "Text.", dict.fromkeys(labels, ("a",)), buckets)
    assert re.fullmatch(r"[a-z][a-z0-9_]*", made.prometheus)
    assert made.prometheus.endswith("_total") == (kind is Kind.COUNTER) or name.endswith("total")
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", each) for each in made.label_names)
    samples(Meter([made]))


@pytest.mark.parametrize(
    ("name", "unit", "shown"),
    [
        ("secagg.round.duration", "s", "secagg_round_duration_seconds"),
        ("secagg.uploads.received", "By", "secagg_uploads_received_bytes_total"),
        ("secagg.noise.headroom", "{bit}", "secagg_noise_headroom"),
        ("secagg.budget.remaining", "1", "secagg_budget_remaining_ratio"),
        ("secagg.uploads.accepted", "{upload}", "secagg_uploads_accepted_total"),
    ],
)
def test_units_are_in_the_names_that_a_scrape_shows(name: str, unit: str, shown: str) -> None:
    kind = Kind.COUNTER if shown.endswith("_total") else Kind.GAUGE
    assert Instrument(name, kind, unit, "Text.").prometheus == shown


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "Upper.case"},
        {"name": "a..b"},
        {"name": "a.b."},
        {"name": "1a"},
        {"name": "a-b"},
        {"name": "a b"},
        {"name": "a\n"},
        {"unit": "ms"},
        {"unit": "bit"},
        {"unit": "{Upload}"},
        {"unit": "{}"},
        {"unit": "seconds"},
        {"labels": {"": ("a",)}},
        {"labels": {"a-b": ("a",)}},
        {"buckets": (1.0,)},
        {"kind": Kind.HISTOGRAM},
        {"kind": Kind.HISTOGRAM, "buckets": (2.0, 1.0)},
        {"kind": Kind.HISTOGRAM, "buckets": (1.0, 1.0)},
        {"kind": Kind.GAUGE, "labels": {"a": ("a",), "b": ("b",)}},
    ],
)
def test_what_no_scrape_could_show_is_refused(changes: dict[str, Any]) -> None:
    fitting: dict[str, Any] = {
        "name": "a.b",
        "kind": Kind.COUNTER,
        "unit": "{call}",
        "about": "Text.",
    }
    Instrument(**fitting)
    with pytest.raises(ValueError, match="expected"):
        Instrument(**fitting | changes)


def test_one_name_is_declared_once() -> None:
    for twice in ALL:
        with pytest.raises(ValueError, match="comes twice"):
            Meter([*ALL, twice])


def test_a_shared_instrument_is_recorded_by_either_name() -> None:
    narrow = SECONDS.narrowed("Put", "Drop")
    meter = Meter([narrow])
    meter.record(SECONDS, 0.5, rpc_method="Put")
    meter.record(narrow, 0.5, rpc_method="Put")
    assert value(meter, SECONDS, rpc_method="Put") == 2
    assert value(meter, SECONDS, rpc_method="Drop") == 0
    with pytest.raises(ValueError, match="unpack"):
        ROOM.narrowed("Put")


# --- counting -------------------------------------------------------------------------------------


def test_everything_begins_at_zero_but_gauges_that_nobody_set(meter: Meter) -> None:
    found = samples(meter)
    assert set(found.values()) == {0.0}
    for who in ("one", "two"):
        assert found["test_calls_total", (("who", who),)] == 0
    assert found["test_read_bytes_total", ()] == 0
    assert found["test_duration_seconds_sum", (("rpc_method", "Get"),)] == 0
    assert not {"test_room_bytes", "test_states"} & shown(meter)


def test_counters_add_up_by_label(meter: Meter) -> None:
    meter.add(CALLS, who="one")
    meter.add(CALLS, 2, who="one")
    meter.add(BYTES, 1 << 40)
    assert value(meter, "test_calls_total", who="one") == 3
    assert value(meter, "test_calls_total", who="two") == 0
    assert value(meter, "test_read_bytes_total") == 1 << 40


def test_a_histogram_has_its_buckets_and_one_for_all(meter: Meter) -> None:
    for seconds in (0.0, 0.1, 0.11, 1.0, 99.0):
        meter.record(SECONDS, seconds, rpc_method="Get")
    name = "test_duration_seconds"
    buckets = {
        bound: value(meter, f"{name}_bucket", rpc_method="Get", le=bound)
        for bound in ("0.1", "1.0", "+Inf")
    }
    assert buckets == {"0.1": 2, "1.0": 4, "+Inf": 5}
    assert value(meter, f"{name}_sum", rpc_method="Get") == pytest.approx(100.21)


@given(label=st.text())
@settings(deadline=None)
def test_a_label_that_was_not_declared_is_other_and_nothing_else_is_shown(label: str) -> None:
    meter = Meter(ALL)
    meter.add(CALLS, who=label)
    meter.record(SECONDS, 1.0, rpc_method=label)
    meter.set(STATES, 1.0, state=label)
    labels = {text for _, pairs in samples(meter) for key, text in pairs if key != "le"}
    assert labels <= {"one", "two", "Get", "UP", "DOWN", OTHER}
    assert value(meter, "test_calls_total", who=label if label in ("one", "two") else OTHER) == 1


@pytest.mark.parametrize("wrong", [{}, {"whom": "one"}])
def test_a_label_that_is_missing_is_a_mistake_of_the_program(
    wrong: dict[str, str], meter: Meter
) -> None:
    with pytest.raises(KeyError):
        meter.add(CALLS, **wrong)


def test_an_instrument_that_was_not_declared_is_a_mistake_of_the_program(meter: Meter) -> None:
    unknown = Instrument("test.unknown", Kind.COUNTER, "", "Text.")
    with pytest.raises(KeyError):
        meter.add(unknown)
    with pytest.raises(KeyError):
        meter.record(unknown, 1.0)
    with pytest.raises(KeyError):
        meter.watch(unknown, lambda: 1.0)
    with pytest.raises(KeyError):
        meter.set(CALLS, 1.0)


def test_a_block_is_timed_whether_it_raises_or_not(meter: Meter) -> None:
    with meter.timed(SECONDS, rpc_method="Get"):
        pass
    with pytest.raises(ZeroDivisionError), meter.timed(SECONDS, rpc_method="Get"):
        raise ZeroDivisionError
    assert value(meter, SECONDS, rpc_method="Get") == 2


def test_threads_lose_no_count(meter: Meter) -> None:
    def work(index: int) -> None:
        for _ in range(500):
            meter.add(CALLS, who="one" if index % 2 else "two")
            meter.record(SECONDS, 0.5, rpc_method="Get")
            meter.set(ROOM, index)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert value(meter, "test_calls_total", who="one") == 2000
    assert value(meter, "test_calls_total", who="two") == 2000
    assert value(meter, SECONDS, rpc_method="Get") == 4000


# --- gauges ---------------------------------------------------------------------------------------


def test_a_gauge_is_what_it_was_set_to_last(meter: Meter) -> None:
    meter.set(ROOM, 3.0)
    meter.set(ROOM, 4.0)
    meter.set(STATES, 1.0, state="UP")
    assert value(meter, "test_room_bytes") == 4
    assert samples(meter)["test_states", (("state", "UP"),)] == 1
    assert ("test_states", (("state", "DOWN"),)) not in samples(meter)


def test_a_watched_gauge_is_read_at_every_look(meter: Meter) -> None:
    numbers = iter([1, 2, 3])
    meter.watch(ROOM, lambda: next(numbers))
    assert [value(meter, "test_room_bytes") for _ in range(3)] == [1, 2, 3]
    with pytest.raises(TypeError, match="is watched"):
        meter.set(ROOM, 1.0)


def test_a_watched_gauge_may_have_a_value_for_each_label(meter: Meter) -> None:
    meter.watch(STATES, lambda: {"UP": 2, "SIDEWAYS": 3, "DOUBTFUL": 4})
    found = {labels: each for (name, labels), each in samples(meter).items() if "states" in name}
    assert found == {(("state", "UP"),): 2, (("state", OTHER),): 7}


def _raise() -> float:
    raise RuntimeError("hunter2")


@pytest.mark.parametrize(
    "broken",
    [_raise, lambda: None, lambda: "many", lambda: {"UP": None}, lambda: {1: [2]}, dict],
)
def test_a_gauge_that_cannot_be_read_is_left_out_and_the_others_are_not(
    broken: Any,  # noqa: ANN401
    meter: Meter,
) -> None:
    meter.watch(STATES, broken)
    meter.watch(ROOM, lambda: 5)
    meter.add(BYTES)
    assert value(meter, "test_room_bytes") == 5
    assert value(meter, "test_read_bytes_total") == 1
    assert "test_states" not in shown(meter)
    assert b"hunter2" not in meter.exposition()


@pytest.fixture
def held(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[threading.Event]]:
    """A gauge that waits: for each of its readings, what lets it go on."""
    monkeypatch.setattr(instruments, "PATIENCE_S", 0.25)
    begun: list[threading.Event] = []

    def wait() -> float:
        go_on = threading.Event()
        begun.append(go_on)
        go_on.wait(30)
        return len(begun)

    meter.watch(ROOM, wait)
    yield begun
    for each in begun:
        each.set()


def test_a_gauge_that_hangs_is_left_out_and_not_read_again_before_it_is_back(
    meter: Meter, held: list[threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    meter.watch(STATES, lambda: {"UP": 1})
    for _ in range(3):
        assert value(meter, "test_states", state="UP") == 1
        assert "test_room_bytes" not in shown(meter)
    assert len(held) == 1
    monkeypatch.setattr(instruments, "PATIENCE_S", 30.0)
    held[0].set()
    with ThreadPoolExecutor(1) as threads:
        look = threads.submit(value, meter, "test_room_bytes")
        while not look.done() and len(held) < 2:
            threading.Event().wait(0.001)
        for each in held:
            each.set()
        # The reading that hung, if it was not back yet, or the next one.
        assert look.result(30) in (1, 2)


def test_all_who_look_meanwhile_wait_for_the_same_reading(
    meter: Meter, held: list[threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "test_room_bytes" not in shown(meter)
    monkeypatch.setattr(instruments, "PATIENCE_S", 30.0)
    with ThreadPoolExecutor(4) as threads:
        looks = [threads.submit(meter.exposition) for _ in range(4)]
        held[0].set()
        while not all(look.done() for look in looks):
            for each in list(held):
                each.set()
            threading.Event().wait(0.001)
    assert all(b"\ntest_room_bytes " in look.result() for look in looks)


# --- nobody looks ---------------------------------------------------------------------------------


def test_whoever_is_not_measured_keeps_nothing() -> None:
    SILENT.add(CALLS, who="one")
    SILENT.record(SECONDS, 1.0, rpc_method="Get")
    SILENT.set(ROOM, 1.0)
    SILENT.watch(STATES, _raise)
    with SILENT.timed(SECONDS, rpc_method="Get"):
        pass
    assert SILENT.exposition() == b""


def test_meters_of_others_in_the_process_stay_as_they_are(meter: Meter) -> None:
    registry = CollectorRegistry()
    Counter("theirs", "Text.", registry=registry)
    assert b"theirs_created" in generate_latest(registry)
    assert b"_created" not in meter.exposition()
    assert b"test_calls" not in generate_latest()


def test_a_process_shows_its_own_means_when_asked() -> None:
    assert "process_resident_memory_bytes" in shown(Meter(ALL, process=True))
    assert not any(name.startswith(("process_", "python_")) for name in shown(Meter(ALL)))
