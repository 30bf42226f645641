"""The real programs as processes: rounds, restarts, signals, health and logs."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import cohort
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from programs import CLIENTS, KEY_HOLDER, SERVER, Machine, exact, free_port, session, task

from secagg.certificates import Kit
from secagg.rpc.channels import channel
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg.wire.v1 import round_pb2
from secagg_bench.processes import Program
from secagg_client.session import ClientSession, CurrentRound
from secagg_server.operator import Operator

DONE = round_pb2.ROUND_STATE_DONE
BOOKKEEPER = re.compile(
    r"multiprocessing/resource_tracker\.py|^  warnings\.warn\('resource_tracker"
)


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


@contextlib.contextmanager
def clients_of(machine: Machine) -> Iterator[Clients]:
    with contextlib.ExitStack() as stack:
        yield Clients([stack.enter_context(session(machine, index)) for index in CLIENTS])


def contribute(joined: list[CurrentRound], indexes: Iterable[int] = CLIENTS) -> None:
    for index in indexes:
        current = joined[index]
        values = cohort.contribution(current.context.plan, index)
        current.contribute(values, samples=cohort.samples(index))


def running(machine: Machine) -> None:
    for name in (KEY_HOLDER, SERVER):
        machine.start(name)


def healthy(address: str, kit: Kit | None, service: str = "") -> bool:
    """Whether a service says that it is ready, once it has had the time to look."""
    request = health_pb2.HealthCheckRequest(service=service)
    with channel(address, kit) as connection:
        stub = health_pb2_grpc.HealthStub(connection)
        for answer in stub.Watch(request, timeout=20, wait_for_ready=True):
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return True
    return False


def discreet(machine: Machine) -> None:
    """Logs are lines of JSON that name no client and show no stack."""
    texts = [file.read_text(encoding="utf-8") for file in sorted(machine.folder.glob("*.log"))]
    assert len(texts) == 2
    # Where a program was killed, Python's own bookkeeper has the last word.
    own = [line for line in "".join(texts).splitlines() if not BOOKKEEPER.search(line)]
    text = "\n".join(own)
    assert all(isinstance(json.loads(line), dict) for line in own)
    assert "Traceback" not in text
    assert "client-" not in text
    for index in CLIENTS:
        key = machine.client_kit(index).identity.public
        for form in (key.hex(), base64.b64encode(key).decode(), repr(key)[2:-1]):
            assert form not in text


def test_rounds_run_and_go_on_after_both_programs_were_stopped_and_started(tmp_path: Path) -> None:
    with Machine(tmp_path) as machine:
        running(machine)
        kit = machine.client_kit(0).tls
        assert all(healthy(a, kit) for a in (machine.server, machine.admin, machine.key_holder))
        with machine.operator() as operator, clients_of(machine) as clients:
            operator.create_task(task(rounds=2))
            joined = clients.join()
            assert joined[0].number == 1
            contribute(joined)
            second = clients.join()
            assert (second[0].number, second[0].model.version) == (2, 1)
            contribute(second, [0])
        assert machine.stop() == [0, 0]

        running(machine)
        with clients_of(machine) as clients:
            again = clients.join()
            # The attempt that was open goes on, and what client 0 sent then counts.
            assert [c.context for c in again] == [c.context for c in second]
            contribute(again, [1, 2])
            assert clients.ended()
        answer = exact(machine, rounds=2)
        assert machine.stop() == [0, 0]
        states = [(r.round_number, r.attempt, r.state, r.reason) for r in answer.rounds]
        assert states == [(1, 1, DONE, ""), (2, 1, DONE, "")]
        discreet(machine)


def test_a_key_holder_that_is_killed_and_started_again_costs_nothing(tmp_path: Path) -> None:
    with Machine(tmp_path) as machine:
        running(machine)
        with machine.operator() as operator, clients_of(machine) as clients:
            operator.create_task(task(rounds=1))
            joined = clients.join()
            contribute(joined, [0, 1])
            machine.kill(KEY_HOLDER)
            machine.start(KEY_HOLDER)
            contribute(joined, [2])
            assert clients.ended()
        answer = exact(machine, rounds=1)
        assert machine.stop() == [0, 0]
        assert [(r.round_number, r.attempt, r.state) for r in answer.rounds] == [(1, 1, DONE)]
        discreet(machine)


def test_what_a_killed_key_holder_was_calculating_with_ends_too(tmp_path: Path) -> None:
    with Machine(tmp_path) as machine:
        program = machine.start(KEY_HOLDER)
        helpers = descendants(program.process.pid)
        assert helpers, "the key holder calculates in processes of its own"
        machine.kill(KEY_HOLDER)
        all_end(helpers)


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        children += map(int, (thread / "children").read_text().split())
    return [*children, *(below for child in children for below in descendants(child))]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_end(pids: list[int]) -> None:
    """They end by themselves, soon after the program that started them."""
    give_up_at = time.monotonic() + 10
    while any(map(is_alive, pids)):
        assert time.monotonic() < give_up_at, "processes were left behind"


# --- stopping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", [KEY_HOLDER, SERVER])
def test_a_program_ends_with_0_when_told_to_and_leaves_nobody_behind(
    tmp_path: Path, name: str, number: signal.Signals
) -> None:
    with Machine(tmp_path) as machine:
        program = machine.start(name)
        address = machine.key_holder if name == KEY_HOLDER else machine.server
        kit = machine.client_kit(0).tls
        assert healthy(address, kit, "liveness")
        helpers = descendants(program.process.pid)
        program.process.send_signal(number)
        assert program.process.wait(10) == 0
        all_end(helpers)
        with pytest.raises(grpc.RpcError), channel(address, kit) as connection:
            health_pb2_grpc.HealthStub(connection).Check(
                health_pb2.HealthCheckRequest(), timeout=20
            )
        events = [json.loads(line)["event"] for line in program.log.read_text("utf-8").splitlines()]
    assert (events[0], events[-1]) == ("listening", "stopping")


def in_a_namespace_of_their_own() -> list[str]:
    """A command line in front of one that makes it process 1, as in a container."""
    prefix = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    with contextlib.suppress(OSError):
        if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            return prefix
    pytest.skip("this machine does not permit process namespaces (unshare --pid)")


@pytest.mark.slow
@pytest.mark.parametrize("name", [KEY_HOLDER, SERVER])
def test_process_1_of_a_container_ends_with_0_when_told_to(tmp_path: Path, name: str) -> None:
    """The kernel delivers to process 1 only the signals that it handles."""
    prefix = in_a_namespace_of_their_own()
    with Machine(tmp_path) as machine:
        command = [*prefix, sys.executable, "-m", *machine.command(name)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as outer:
            ready = tmp_path / f"{name}.ready"
            while not ready.exists():
                assert outer.poll() is None
            (first,) = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
            helpers = descendants(int(first))
            # The namespaces' numbers, outermost first: it really is number 1 in there.
            status = Path(f"/proc/{first}/status").read_text()
            assert status[status.index("NSpid:") :].splitlines()[0].split()[-1] == "1"
            signal_to(int(first), signal.SIGTERM)
            _, errors = outer.communicate(timeout=10)
    assert outer.returncode == 0
    all_end(helpers)
    assert b"Traceback" not in errors


def signal_to(pid: int, number: signal.Signals) -> None:
    subprocess.run(["kill", f"-{number.value}", str(pid)], check=True)


def test_a_server_without_a_key_holder_listens_and_stops_while_it_waits(tmp_path: Path) -> None:
    with Machine(tmp_path) as machine:
        program = machine.start(SERVER)
        with machine.operator() as operator:
            operator.create_task(task(rounds=1))
            assert operator.task("task").task.state == pb.TASK_STATE_RUNNING
        kit = machine.client_kit(0).tls
        assert healthy(machine.server, kit, "liveness")
        program.wait_for(lambda: "not_ready" in program.tail())
        with channel(machine.server, kit) as connection:
            answer = health_pb2_grpc.HealthStub(connection).Check(
                health_pb2.HealthCheckRequest(), timeout=20
            )
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert program.stop() == 0
    assert "Traceback" not in program.log.read_text("utf-8")


# --- plaintext ----------------------------------------------------------------------------------


def test_plaintext_works_on_one_machine_and_says_what_it_is(tmp_path: Path) -> None:
    """What --insecure is for: trying things out, without any kit."""
    addresses = {name: f"127.0.0.1:{free_port()}" for name in ("listen", "admin", "key-holder")}
    ready = tmp_path / "keyholder.ready"
    arguments = ["run", "--insecure", "--listen", addresses["key-holder"]]
    arguments += ["--monitor-listen", "off"]
    arguments += ["--state-dir", str(tmp_path / "keyholder"), "--ready-file", str(ready)]
    key_holder = Program("secagg_keyholder.cli", arguments, tmp_path / "keyholder.log")
    arguments = ["run", "--insecure", "--listen", addresses["listen"], "--monitor-listen", "off"]
    arguments += ["--admin-listen", addresses["admin"], "--key-holder", addresses["key-holder"]]
    arguments += ["--data-dir", str(tmp_path / "server"), "--ready-file", str(tmp_path / "ready")]
    server = Program("secagg_server.cli", arguments, tmp_path / "server.log")
    with contextlib.ExitStack() as stack:
        stack.callback(key_holder.stop)
        stack.callback(server.stop)
        key_holder.wait_for(ready.exists)
        server.wait_for((tmp_path / "ready").exists)
        operator = stack.enter_context(contextlib.closing(Operator(addresses["admin"], None)))
        operator.create_task(task(rounds=1))
        sessions = [
            stack.enter_context(
                ClientSession(addresses["listen"], "task", cohort.identity(i), insecure=True)
            )
            for i in CLIENTS
        ]
        clients = Clients(sessions)
        contribute(clients.join())
        assert clients.ended()
        assert operator.task("task").rounds[0].contributors == len(CLIENTS)
        assert (key_holder.stop(), server.stop()) == (0, 0)
    for program in (key_holder, server):
        assert '"event": "insecure"' in program.log.read_text("utf-8")
