"""Contexts name everything that a round is about, and every difference changes everything."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from secagg.context import NO_MODEL, ContextId, RoundContext, rotation_string, round_key_id
from secagg.errors import ConfigurationError, ContextError
from secagg.planner import plan_integers

PLAN = plan_integers(5000, max_clients=10, max_abs=3)
ROUND_KEY = bytes(range(256)) * 5


def make(**changes: object) -> RoundContext:
    fields: dict[str, object] = {
        "plan": PLAN,
        "round_key": ROUND_KEY,
        "task_id": "task-1",
        "round_number": 7,
        "attempt": 1,
        "model_digest": NO_MODEL,
    }
    fields |= changes
    plan, key = fields.pop("plan"), fields.pop("round_key")
    return RoundContext.create(plan, key, **fields)  # type: ignore[arg-type]


CHANGES: list[tuple[str, dict[str, object]]] = [
    ("task_id", {"task_id": "task-2"}),
    ("round_number", {"round_number": 8}),
    ("attempt", {"attempt": 2}),
    ("plan_digest", {"plan": plan_integers(5000, max_clients=11, max_abs=3)}),
    ("model_digest", {"model_digest": b"m" * 32}),
    ("round_key_id", {"round_key": ROUND_KEY[1:] + b"\0"}),
]


@pytest.mark.parametrize(("field", "change"), CHANGES)
def test_the_differing_field_is_named_without_its_value(
    field: str, change: dict[str, object]
) -> None:
    mine, other = make().id, make(**change).id
    with pytest.raises(ContextError) as error:
        mine.require(other)
    assert f"{field} differ" in str(error.value)
    assert sum(name in str(error.value) for name, _ in CHANGES) == 1
    for context in (mine, other):
        value = getattr(context, field)
        text = value.hex() if isinstance(value, bytes) else str(value)
        assert text not in str(error.value)


def test_all_differing_fields_are_named() -> None:
    merged: dict[str, object] = {}
    for _, change in CHANGES:
        merged |= change
    with pytest.raises(ContextError) as error:
        make().id.require(make(**merged).id)
    assert all(field in str(error.value) for field, _ in CHANGES)


def test_the_same_context_is_accepted() -> None:
    make().id.require(make().id)


@pytest.mark.parametrize(("_field", "change"), CHANGES)
def test_every_field_changes_the_digest_and_the_public_polynomials(
    _field: str, change: dict[str, object]
) -> None:
    mine, other = make(), make(**change)
    assert mine.id.digest != other.id.digest
    equal = mine.public_polynomials()[0] == other.public_polynomials()[0]
    # Uniform modulo q: even one coincidence has probability 2**-44.
    assert not equal.any()


def test_the_digest_is_stable() -> None:
    # A change of this value is a change of protocol.
    assert (
        make().id.digest.hex() == "41326d73ffb1a254aa996d574f0820158380686981922f779a37e992659f55b4"
    )
    first = make().public_polynomials()[0, :2].tolist()
    assert first == [45577111844526382, 64761768237350717]


def test_polynomials_differ_from_block_to_block() -> None:
    context = make(plan=plan_integers(4096 * 12 * 2, max_clients=3, max_abs=1))
    polynomials = context.public_polynomials()
    assert polynomials.shape == (context.plan.blocks, 4096)
    assert not (polynomials[0] == polynomials[1]).any()


def test_the_rotation_is_that_of_the_round_in_every_attempt() -> None:
    # A second attempt must not give a second, differently rounded look at the same update.
    rotation = make().rotation
    assert len(rotation) == 32
    assert rotation == rotation_string("task-1", 7, PLAN)
    same = [make(attempt=2), make(round_key=b"x"), make(model_digest=b"m" * 32)]
    assert {context.rotation for context in same} == {rotation}
    other = [
        make(task_id="t"),
        make(round_number=8),
        make(plan=plan_integers(5001, max_clients=10, max_abs=3)),
    ]
    assert rotation not in {context.rotation for context in other}


@pytest.mark.parametrize("task", ["", "a b", "a/b", "ä", "x" * 65, "task\n", "a\0"])
def test_task_ids_that_could_be_misread_are_refused(task: str) -> None:
    with pytest.raises(ConfigurationError, match="task id"):
        make(task_id=task)


@pytest.mark.parametrize("field", ["round_number", "attempt"])
@pytest.mark.parametrize("value", [0, -1, 1 << 32])
def test_numbers_out_of_range_are_refused(field: str, value: int) -> None:
    with pytest.raises(ConfigurationError, match=field):
        make(**{field: value})
    make(**{field: (1 << 32) - 1})


@pytest.mark.parametrize("field", ["plan_digest", "model_digest", "round_key_id"])
@pytest.mark.parametrize("size", [0, 31, 33])
def test_digests_of_another_size_are_refused(field: str, size: int) -> None:
    with pytest.raises(ConfigurationError, match=field):
        replace(make().id, **{field: bytes(size)})


def test_a_plan_or_round_key_that_the_context_does_not_name_is_refused() -> None:
    context = make()
    with pytest.raises(ContextError, match="plan"):
        RoundContext(context.id, plan_integers(5001, max_clients=10, max_abs=3), ROUND_KEY)
    with pytest.raises(ContextError, match="round key"):
        RoundContext(context.id, PLAN, ROUND_KEY + b"\0")


def test_round_keys_are_named_by_a_hash() -> None:
    assert len(round_key_id(b"")) == 32
    assert round_key_id(b"a") != round_key_id(b"b")


def test_concatenations_of_neighbouring_fields_do_not_collide() -> None:
    first = ContextId("task1", 1, 1, *[bytes(32)] * 3)
    second = ContextId("task", 11, 1, *[bytes(32)] * 3)
    third = ContextId("task", 1, 11, *[bytes(32)] * 3)
    assert len({first.digest, second.digest, third.digest}) == 3
    assert np.frombuffer(first.digest, np.uint8).size == 32
