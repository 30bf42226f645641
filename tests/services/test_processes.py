"""The real programs as processes: rounds, restarts, signals, health and logs."""

from __future__ import annotations

import base64
import json
import signal
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import cohort
import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from secagg.rpc.channels import channel
from secagg.wire.codec import sums_from_bytes
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg.wire.v1 import round_pb2
from secagg_bench.processes import Program, Services, running_services
from secagg_client.session import ClientSession, CurrentRound
from secagg_server.operator import Operator
from secagg_server.tasks import TaskSpec

CLIENTS = range(3)
DEADLINE_MS = 60_000


def task(rounds: int) -> TaskSpec:
    """Rounds close as soon as all clients have contributed."""
    return TaskSpec("task", cohort.mixed_plan(), rounds, DEADLINE_MS, 5, len(CLIENTS))


class Clients:
    """Three clients that know nothing but numpy; they move in step, in one thread."""

    def __init__(self, sessions: list[ClientSession]) -> None:
        self._rounds = [session.rounds() for session in sessions]

    def join(self) -> list[CurrentRound]:
        """The next round, as each client sees it."""
        found = [next(rounds) for rounds in self._rounds]
        assert len({current.context.id.digest for current in found}) == 1
        return found

    def ended(self) -> bool:
        """Whether the task is over for everybody."""
        return [list(rounds) for rounds in self._rounds] == [[]] * len(self._rounds)


@contextmanager
def clients_of(services: Services) -> Iterator[Clients]:
    with ExitStack() as stack:
        sessions = [
            ClientSession(
                services.server,
                "task",
                cohort.identity(index),
                rounding=lambda context, index=index: cohort.rounding(context, index),
            )
            for index in CLIENTS
        ]
        yield Clients([stack.enter_context(session) for session in sessions])


def contribute(joined: list[CurrentRound], indexes: Iterable[int] = CLIENTS) -> None:
    for index in indexes:
        current = joined[index]
        values = cohort.contribution(current.context.plan, index)
        current.contribute(values, samples=cohort.samples(index))


@contextmanager
def operator_of(services: Services) -> Iterator[Operator]:
    with closing(Operator(services.admin)) as operator:
        yield operator


def exact(operator: Operator, joined: list[CurrentRound]) -> None:
    """The round's sums are those in the clear, floats and integers alike."""
    context = joined[0].context
    data, contributors = operator.sums("task", context.id.round_number)
    assert contributors == len(CLIENTS)
    found = sums_from_bytes(data, context.plan)
    for one, other in zip(found, cohort.clear_sums(context, CLIENTS), strict=True):
        np.testing.assert_array_equal(one, other)


def healthy(address: str) -> bool:
    with channel(address) as connection:
        answer = health_pb2_grpc.HealthStub(connection).Check(
            health_pb2.HealthCheckRequest(), timeout=20
        )
    serving: bool = answer.status == health_pb2.HealthCheckResponse.SERVING
    return serving


def logs(folder: Path) -> str:
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.log"))]
    assert len(texts) == 2
    return "".join(texts)


def discreet(text: str) -> None:
    """Logs are lines of JSON that name no client and show no stack."""
    assert all(isinstance(json.loads(line), dict) for line in text.splitlines())
    assert "Traceback" not in text
    for index in CLIENTS:
        key = cohort.identity(index).public
        for form in (key.hex(), base64.b64encode(key).decode(), repr(key)[2:-1]):
            assert form not in text


def test_rounds_run_and_go_on_after_both_programs_were_stopped_and_started(tmp_path: Path) -> None:
    with running_services(tmp_path) as services:
        assert all(map(healthy, (services.server, services.admin, services.key_holder)))
        with operator_of(services) as operator, clients_of(services) as clients:
            operator.create_task(task(rounds=2))
            joined = clients.join()
            assert joined[0].number == 1
            contribute(joined)
            second = clients.join()
            assert (second[0].number, second[0].model.version) == (2, 1)
            exact(operator, joined)
            contribute(second, [0])
        assert [program.stop() for program in services.programs] == [0, 0]
        assert all(program.process.returncode == 0 for program in services.programs)

    with (
        running_services(tmp_path) as services,
        operator_of(services) as operator,
        clients_of(services) as clients,
    ):
        joined = clients.join()
        name = joined[0].context.id
        assert (name.round_number, name.attempt) == (2, 2)
        for before, after in zip(second, joined, strict=True):
            assert before.context.id.model_digest == after.context.id.model_digest
        contribute(joined)
        assert clients.ended()
        exact(operator, joined)
        answer = operator.task("task")
    assert answer.task.state == pb.TASK_STATE_FINISHED
    assert (answer.task.rounds_done, answer.task.model_version) == (2, 2)
    states = [(r.round_number, r.attempt, r.state, r.reason[:9]) for r in answer.rounds]
    assert states == [
        (1, 1, round_pb2.ROUND_STATE_DONE, ""),
        (2, 1, round_pb2.ROUND_STATE_ABORTED, "RESTARTED"),
        (2, 2, round_pb2.ROUND_STATE_DONE, ""),
    ]
    assert [r.contributors for r in answer.rounds] == [3, 0, 3]
    discreet(logs(tmp_path))


def test_a_key_holder_that_is_killed_and_started_again_costs_one_attempt(tmp_path: Path) -> None:
    with running_services(tmp_path) as services, ExitStack() as stack:
        operator = stack.enter_context(operator_of(services))
        clients = stack.enter_context(clients_of(services))
        operator.create_task(task(rounds=1))
        joined = clients.join()
        contribute(joined, [0, 1])

        first = services.programs[0]
        first.process.send_signal(signal.SIGKILL)
        assert first.process.wait(10) == -signal.SIGKILL
        ready = tmp_path / "again.ready"
        arguments = ["run", "--listen", services.key_holder, "--ready-file", str(ready)]
        second = Program("secagg_keyholder.cli", arguments, first.log)
        stack.callback(second.stop)
        second.wait_for(ready.exists)

        contribute(joined, [2])
        again = clients.join()
        assert (again[0].number, again[0].context.id.attempt) == (1, 2)
        contribute(again)
        assert clients.ended()
        exact(operator, again)
        answer = operator.task("task")
        assert second.stop() == 0
    assert answer.task.state == pb.TASK_STATE_FINISHED
    first_attempt, last = answer.rounds
    assert first_attempt.state == round_pb2.ROUND_STATE_ABORTED
    assert first_attempt.reason.partition(":")[0] in ("ROUND_CLOSED", "UNAVAILABLE")
    assert (last.state, last.contributors) == (round_pb2.ROUND_STATE_DONE, 3)
    discreet(logs(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_program_without_work_ends_with_0_when_told_to(
    tmp_path: Path, number: signal.Signals
) -> None:
    ready, log = tmp_path / "ready", tmp_path / "log"
    arguments = ["run", "--listen", "127.0.0.1:0", "--ready-file", str(ready)]
    program = Program("secagg_keyholder.cli", arguments, log)
    try:
        program.wait_for(ready.exists)
        address = json.loads(ready.read_text(encoding="utf-8"))["listen"]
        assert healthy(address)
        program.process.send_signal(number)
        assert program.process.wait(10) == 0
    finally:
        program.stop()
    with pytest.raises(grpc.RpcError):
        healthy(address)
    events = [json.loads(line)["event"] for line in log.read_text("utf-8").splitlines()]
    assert events == ["listening", "stopping"]


def test_a_server_without_a_key_holder_listens_and_stops_while_it_waits(tmp_path: Path) -> None:
    ready, log = tmp_path / "ready", tmp_path / "log"
    arguments = ["run", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]
    arguments += ["--key-holder", "127.0.0.1:1", "--data-dir", str(tmp_path / "data")]
    program = Program("secagg_server.cli", [*arguments, "--ready-file", str(ready)], log)
    try:
        program.wait_for(ready.exists)
        addresses = json.loads(ready.read_text(encoding="utf-8"))
        with closing(Operator(addresses["admin_listen"])) as operator:
            operator.create_task(task(rounds=1))
            assert operator.task("task").task.state == pb.TASK_STATE_RUNNING
        assert program.stop() == 0
    finally:
        program.stop()
    assert "Traceback" not in log.read_text("utf-8")


def test_a_port_that_is_taken_ends_a_program_with_78_and_one_line_of_ours(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    first = Program(
        "secagg_keyholder.cli",
        ["run", "--listen", "127.0.0.1:0", "--ready-file", str(ready)],
        tmp_path / "first.log",
    )
    try:
        first.wait_for(ready.exists)
        taken = json.loads(ready.read_text(encoding="utf-8"))["listen"]
        arguments = ["run", "--listen", "127.0.0.1:0", "--admin-listen", taken]
        arguments += ["--data-dir", str(tmp_path / "data")]
        log = tmp_path / "second.log"
        assert Program("secagg_server.cli", arguments, log).process.wait(30) == 78
    finally:
        first.stop()
    lines = log.read_text("utf-8").splitlines()
    # gRPC's core writes a line of its own first.
    own = [line for line in lines if "add_port.cc" not in line]
    assert len(own) == 1
    assert own[0].startswith("CONFIGURATION: ")
    assert taken in own[0]
