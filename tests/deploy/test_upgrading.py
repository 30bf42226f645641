"""State that an older release left behind, made by that release itself, and what becomes of it.

``data/server-0.1.0`` is the data directory of a server of 0.1.0, which was killed in the third
round of four: two rounds were summed over three clients, and nobody had uploaded anything for the
third. The database is written out as SQL.
"""

from __future__ import annotations

import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import KEY_HOLDER, SERVER, Machine, session

from secagg.context import rotation_string
from secagg.errors import ClosedError
from secagg.parameters import IntegerSegment
from secagg.quantize import dequantize_integers
from secagg.wire.codec import sums_from_bytes
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg.wire.v1 import round_pb2
from secagg_server.states import RoundState
from secagg_server.store import Store
from secagg_server.tasks import TaskSpec

OLD = Path(__file__).parent / "data" / "server-0.1.0"
ROUNDS, PARAMETERS = 4, 20
# What each of the three clients contributes, then and now.
UPDATES = [0.01, 0.02, 0.03]
COUNTS = [[1, 2, index] for index in range(3)]


def of_0_1_0(folder: Path) -> Path:
    """A copy of the data directory, to upgrade."""
    shutil.copytree(OLD, folder, ignore=shutil.ignore_patterns("*.sql"))
    with closing(sqlite3.connect(folder / "server.sqlite3")) as database:
        database.executescript((OLD / "server.sql").read_text(encoding="utf-8"))
    return folder


def test_a_store_of_0_1_0_is_read_as_it_was_written(tmp_path: Path) -> None:
    url = f"sqlite:///{of_0_1_0(tmp_path / 'data') / 'server.sqlite3'}"
    for _ in range(2):  # migrated once, then used
        with closing(Store(url)) as store:
            spec = store.task("task").task_spec()
            assert (spec.rounds, spec.plan.max_clients, spec.plan.min_clients) == (ROUNDS, 3, 3)
            assert spec.plan.norm_check is None
            assert spec.plan.privacy is None
            assert [segment.name for segment in spec.plan.segments] == ["update", "counts"]
            rounds = store.rounds("task")
            assert [(row.key, row.state) for row in rounds] == [
                (("task", 1, 1), RoundState.DONE),
                (("task", 2, 1), RoundState.DONE),
                (("task", 3, 1), RoundState.COLLECTING),
            ]
            assert [store.counts(row.key).accepted for row in rounds] == [3, 3, 0]
            assert store.task("task").model_version == 2


@pytest.mark.slow
def test_a_server_of_0_1_0_goes_on_with_its_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The sums are as old as that release.
    monkeypatch.setenv("SECAGG_SERVER_RETAIN_DAYS", "36500")
    with Machine(tmp_path) as machine:
        of_0_1_0(tmp_path / SERVER)
        machine.start(KEY_HOLDER)
        machine.start(SERVER)
        with machine.operator() as operator:
            assert operator.task("task").task.state == pb.TASK_STATE_RUNNING
        with session(machine, 0) as connected:
            before = connected.latest_model()
        expected = np.fromfile(OLD / "models" / "task" / "2.f32", dtype="<f4")
        assert before.version == 2
        np.testing.assert_array_equal(before.tensors["vector"], expected)

        clients = [
            threading.Thread(target=take_part, args=(machine, index), daemon=True)
            for index in range(3)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join(60)
        with machine.operator() as operator:
            answer = operator.task("task")
            assert answer.task.state == pb.TASK_STATE_FINISHED, answer.task.reason
            done = [row for row in answer.rounds if row.state == round_pb2.ROUND_STATE_DONE]
            # The round that was open is attempted again.
            assert [(row.round_number, row.attempt) for row in done] == [
                (1, 1),
                (2, 1),
                (3, 2),
                (4, 1),
            ]
            for number in (1, 2):  # with 0.2's signs they would be read wrongly
                with pytest.raises(ClosedError, match="read them with 0"):
                    operator.sums("task", number)
            for number in (3, 4):
                data, contributors = operator.sums("task", number)
                assert contributors == 3
                np.testing.assert_array_equal(counts(data, number, answer), np.sum(COUNTS, axis=0))
        with session(machine, 0) as connected:
            after = connected.latest_model()
        assert after.version == ROUNDS
        # Two more steps like the two before.
        np.testing.assert_allclose(after.tensors["vector"], 2 * expected, atol=2 * 0.01)


def counts(data: bytes, number: int, answer: pb.GetTaskResponse) -> np.ndarray[Any, Any]:
    """The counts of a round's sums, with the signs that they were given taken off."""
    plan = TaskSpec.from_wire(answer.task.spec).plan
    _, total = sums_from_bytes(data, plan)
    segment = plan.segments[1]
    assert isinstance(segment, IntegerSegment)
    return dequantize_integers(segment, total, rotation=rotation_string("task", number, plan))


def take_part(machine: Machine, index: int) -> None:
    """Contribute to every round until the task ends."""
    with session(machine, index) as connected:
        for current in connected.rounds():
            update = {"vector": np.full(PARAMETERS, UPDATES[index], dtype=np.float32)}
            current.contribute({"update": update, "counts": np.array(COUNTS[index])})
