"""The states of a round: the drawing, the table and the check agree."""

from __future__ import annotations

import itertools

import pytest

from secagg.errors import ClosedError
from secagg.wire.v1 import operator_service_pb2, round_pb2
from secagg_server import states
from secagg_server.states import (
    FINAL,
    TRANSITIONS,
    RoundState,
    TaskState,
    UploadState,
    check_transition,
)


def drawn() -> set[tuple[str, str]]:
    """The arrows of the drawing in the module's docstring."""
    lines = (states.__doc__ or "").partition("::\n")[2].splitlines()
    rows = [line for line in lines if line.strip()]
    chain = [name.strip() for name in rows[0].split("─▶")]
    along = set(itertools.pairwise(chain))
    (abort,) = [row for row in rows if "ABORTED" in row]
    assert abort.strip() == "ABORTED(reason)"
    # Down from every state above which a bar begins.
    stems = {at for at, sign in enumerate(rows[1]) if sign == "│"}
    below = {name for name in chain if any(at in stems for at in places(rows[0], name))}
    assert len(stems) == len(below)
    return along | {(name, "ABORTED") for name in below}


def places(row: str, name: str) -> range:
    start = row.index(name)
    return range(start, start + len(name))


def test_the_table_is_the_drawing() -> None:
    table = {(str(old), str(new)) for old, followers in TRANSITIONS.items() for new in followers}
    assert table == drawn()
    assert len(table) == 10


@pytest.mark.parametrize(("old", "new"), list(itertools.product(RoundState, repeat=2)))
def test_a_step_is_allowed_exactly_when_it_is_drawn(old: RoundState, new: RoundState) -> None:
    if (str(old), str(new)) in drawn():
        check_transition(old, new)
    else:
        with pytest.raises(ClosedError, match=f"can become {new}; it is {old}"):
            check_transition(old, new)


def test_every_state_has_a_row_and_only_final_ones_have_no_way_out() -> None:
    assert TRANSITIONS.keys() == set(RoundState)
    assert {state for state, followers in TRANSITIONS.items() if not followers} == FINAL


@pytest.mark.parametrize(
    ("own", "wire", "prefix"),
    [
        (RoundState, round_pb2.RoundState, "ROUND_STATE_"),
        (UploadState, round_pb2.UploadState, "UPLOAD_STATE_"),
        (TaskState, operator_service_pb2.TaskState, "TASK_STATE_"),
    ],
)
def test_the_wire_knows_the_same_states(own: type, wire: object, prefix: str) -> None:
    spelled = wire.keys()  # type: ignore[attr-defined]
    names = {name.removeprefix(prefix) for name in spelled}
    assert names - {"UNSPECIFIED"} == {str(state) for state in own}
