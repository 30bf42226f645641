"""Why rows with few contributors are withheld, and why their rotation stays inside them.

An item that one client alone has touched has that client's row for its sum: "only aggregates leave"
protects nobody there. With a threshold the row is zeroed, and nothing else depends on it.

That takes a rotation of each row by itself. Were the whole update rotated at once, as it is without
a threshold, and the row zeroed after turning the sum back, the row would still be there: the sum
was a vector of integers, and what is missing from the release is exactly what makes it whole again.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from secagg import quantize as quantizer
from secagg.aggregator import Aggregator
from secagg.encryptor import Encryptor
from secagg.errors import SchemaError
from secagg.keyholder import KeyHolder
from secagg.parameters import FloatSegment, IntegerSegment, Plan, RowThreshold, TensorSpec
from secagg.planner import make_plan
from secagg.publication import published
from secagg.release import Release
from secagg.sampling import Stream

ROWS, WIDTH, CLIENTS = 1000, 4, 6
VICTIM, RARE = 2, 321  # who alone has something of which item
CLIP = 1.0

Floats = NDArray[np.float64]


def planned(least: int | None, *, rows: bool = True) -> Plan:
    table = FloatSegment(
        "update", (TensorSpec("w", (ROWS, WIDTH)),), CLIP, 12 if rows else 8, rows=ROWS * rows
    )
    counts = IntegerSegment("contributors", ROWS, 1)
    threshold = RowThreshold("contributors", least) if least else None
    return make_plan([table, counts], max_clients=20, threshold=threshold)


def table_of(client: int) -> Floats:
    """The update of one client: 30 items that others have as well, and the victim's rare one."""
    drawn = np.random.default_rng(client)
    table = np.zeros((ROWS, WIDTH))
    table[drawn.choice(60, 30, replace=False)] = drawn.normal(size=(30, WIDTH))
    if client == VICTIM:
        table[RARE] = [0.9, -0.6, 0.3, -1.1]
    return np.asarray(0.9 * CLIP * table / np.linalg.norm(table))


def released(plan: Plan, clients: int = CLIENTS) -> Release:
    holder = KeyHolder(plan)
    server = Aggregator(holder.context)
    for client in range(clients):
        table = table_of(client)
        touched = table.any(axis=1).astype(np.int64)
        made = {"update": {"w": table}, "contributors": touched}
        server.add(Encryptor(holder.context).encrypt_segments(made))
    return holder.release(server.aggregate())


def test_without_a_threshold_the_aggregate_holds_the_clients_row() -> None:
    """Whoever sees the released mean has the row, to within a quantisation step."""
    release = released(planned(None))
    (update, _) = release.plan.segments
    assert isinstance(update, FloatSegment)
    stolen = CLIENTS * release.mean()["w"][RARE]
    assert np.abs(stolen - table_of(VICTIM)[RARE]).max() < 3 * update.step
    # And the counts say that it is one client's.
    assert release.total("contributors")[RARE] == 1


def test_with_a_threshold_it_does_not() -> None:
    release = released(planned(2))
    assert not release.mean()["w"][RARE].any()
    with pytest.raises(SchemaError, match="never leaves"):
        release.total("contributors")
    for sums in release.sums[1:]:
        assert not sums.any()
    # What enough clients have touched is there, bit for bit.
    contributors = sum(table_of(client).any(axis=1).astype(int) for client in range(CLIENTS))
    everything = released(planned(None)).mean()["w"]
    kept = release.mean()["w"]
    assert (kept[contributors >= 2] != 0).any(axis=1).all()
    assert not kept[contributors < 2].any()
    assert np.abs(everything[contributors >= 2] - kept[contributors >= 2]).max() < 1e-3


@pytest.mark.parametrize("least", [2, 3, 6, 7])
def test_exactly_the_rows_below_the_threshold_are_withheld(least: int) -> None:
    contributors = sum(table_of(client).any(axis=1).astype(int) for client in range(CLIENTS))
    kept = released(planned(least)).mean()["w"].any(axis=1)
    assert np.array_equal(kept, contributors >= least)


def test_the_released_integers_are_the_same_whatever_the_withheld_row_was() -> None:
    """Not only is the row gone: nothing that leaves depends on it, given the same rounding."""
    plan, found = planned(2), []
    for factor in (1.0, -0.5):
        clients = []
        for client in range(CLIENTS):
            table = table_of(client)
            table[RARE] *= factor  # within the clip norm either way: no other row is scaled
            made = {"update": {"w": table}, "contributors": table.any(axis=1).astype(np.int64)}
            randomness = Stream.derive("test", client)
            parts = quantizer.quantize(
                plan, made, samples=1, rotation=bytes(32), randomness=randomness
            )
            clients.append([part.values for part in parts])
        sums = tuple(np.sum(np.stack(column), axis=0) for column in zip(*clients, strict=True))
        found.append(published(plan, bytes(32), sums, Stream.from_os()))
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


# --- the broken scheme: rows zeroed in a sum that was rotated as a whole --------------------------


def turned_back(segment: FloatSegment, total: Floats, rotation: bytes) -> Floats:
    """From rotated steps to steps of the model's coordinates."""
    steps = total.astype(np.float64).copy()
    quantizer._flip_signs(steps, rotation, segment, "rotated")
    for blocks in quantizer._blocks(segment, steps):
        quantizer._rotate(blocks)
    quantizer._flip_signs(steps, rotation, segment, "rotation")
    return steps


def turned(segment: FloatSegment, steps: Floats, rotation: bytes) -> Floats:
    """And there again; public, as all of it is."""
    out = steps.copy()
    quantizer._mix(out, rotation, segment)  # type: ignore[arg-type]
    return out


def test_zeroing_a_row_of_a_sum_rotated_as_a_whole_hides_nothing() -> None:
    release = released(planned(None, rows=False))
    (segment, _) = release.plan.segments
    assert isinstance(segment, FloatSegment)
    places = quantizer.value_places(segment).reshape(ROWS, WIDTH)[RARE]
    steps = turned_back(segment, release.sums[0].astype(float), release.rotation)
    truth = steps[places].copy()

    # What a key holder would release that zeroes the row, and keeps the rest to full precision.
    steps[places] = 0.0
    published = turned(segment, steps, release.rotation)

    # The attacker knows how each coordinate of the row spreads over the integers that were summed.
    units = np.eye(segment.values)[places]
    spread = np.stack([turned(segment, unit, release.rotation) for unit in units])
    size = np.abs(spread[0, 0])
    stolen = []
    for column in range(WIDTH):
        # Two integers that the row's other coordinates reach alike differ by this one alone, and
        # by a whole number.
        alike = np.sign(np.delete(spread, column, axis=0))
        keys = alike[0] + 3 * alike[1] + 9 * alike[2]
        up, down = (np.sign(spread[column]) == sign for sign in (1, -1))
        phases = [
            published[up & (keys == key)][0] - published[down & (keys == key)][0]
            for key in np.unique(keys)
        ]
        angle = np.angle(np.exp(-2j * np.pi * np.array(phases)).mean()) / (2 * np.pi)
        stolen.append(angle / (2 * size))
    # Up to multiples of 32 steps, to which a priori knowledge is the answer.
    missing = (np.array(stolen) - truth) * 2 * size
    assert np.abs(missing - np.rint(missing)).max() < 1e-6
