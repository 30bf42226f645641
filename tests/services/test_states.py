"""The states of a round: the drawing, the table and the check agree."""

from __future__ import annotations

import itertools
import re

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
    """The arrows of the drawing in the module's docstring, followed one by one."""
    text = (states.__doc__ or "").partition("::\n")[2].splitlines()
    rows = [line for line in text if line.strip()]
    width = max(map(len, rows))
    rows = [line.ljust(width) for line in rows]
    assert rows[-1].strip() == "ABORTED(reason)"
    along = set(itertools.pairwise(name.strip() for name in rows[0].split("─▶")))
    down = {
        (name, end_of(rows, line + 1, column))
        for line, row in enumerate(rows[:-3])
        for column in range(width)
        if (name := name_at(row, column)) and rows[line + 1][column] == "│"
    }
    up = {
        (name_at(rows[line + 1], column), name_at(rows[line - 1], column))
        for line, row in enumerate(rows)
        for column in range(width)
        if row[column] == "▲"
    }
    return along | down | up


def name_at(row: str, column: int) -> str:
    """The state that is written over a column of a row; empty where there is none."""
    found = [m[0] for m in re.finditer("[A-Z]+", row) if m.start() <= column < m.end()]
    return found[0] if found else ""


def end_of(rows: list[str], line: int, column: int) -> str:
    """Where a line that goes down from here leads."""
    while rows[line][column] == "│":
        line += 1
    if line == len(rows) - 3:
        assert rows[line][column] in "└┴┘"
        assert rows[-1][rows[-2].index("▼")] != " "
        return "ABORTED"
    turn = re.search("([A-Z]+) ◀─+$", rows[line][:column])
    assert turn is not None
    assert rows[line][column] == "┘"
    return turn[1]


def test_the_table_is_the_drawing() -> None:
    table = {(str(old), str(new)) for old, followers in TRANSITIONS.items() for new in followers}
    assert table == drawn()
    assert len(table) == 13


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
