"""A program that dies anywhere in a round costs time and nothing else."""

from __future__ import annotations

import contextlib
import signal
import socket
import ssl
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from programs import CLIENTS, KEY_HOLDER, SERVER, Clients, Machine, exact, session, task

from secagg.certificates import Kit, Role
from secagg.errors import SecaggError
from secagg.failpoints import NAMES
from secagg.rpc.diagnosis import why_unreachable
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg.wire.v1 import round_pb2
from secagg_bench.processes import provisioned
from secagg_client.session import CurrentRound
from secagg_server.tasks import TaskSpec

# The standard library forgets to close a connection that was reset before its handshake began.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. <ssl\.SSLSocket:pytest.PytestUnraisableExceptionWarning"
)

ROUNDS = 2
SHORT_MS = 3_000

OF_THE_SERVER = (
    "round-created",
    "round-opened",
    "upload-announced",
    "chunk-stored",
    "upload-accepted",
    "sketch-submitted",
    "verdicts-recorded",
    "uploads-judged",
    "sum-ready",
    "release-received",
    "optimiser-stored",
    "model-stored",
    "round-finished",
)
OF_THE_KEY_HOLDER = (
    "key-stored",
    "round-recorded",
    "upload-admitted",
    "sketch-judged",
    "verdicts-given",
    "release-recorded",
    "release-key-erased",
)
# A round that goes well is released, not closed.
OF_AN_ABORTED_ATTEMPT = "round-closed"
# Programs take their time: half of them today, the others tomorrow. In the simulation, each one
# every day.
TODAY = [*OF_THE_SERVER, *OF_THE_KEY_HOLDER][datetime.now(UTC).toordinal() % 2 :: 2]


def test_every_failpoint_is_tried() -> None:
    assert {*OF_THE_SERVER, *OF_THE_KEY_HOLDER, OF_AN_ABORTED_ATTEMPT} == NAMES


def start(machine: Machine, victim: str, failpoint: str) -> None:
    for name in (KEY_HOLDER, SERVER):
        machine.start(name, failpoint if name == victim else "")


def create(machine: Machine, spec: TaskSpec) -> None:
    with machine.operator() as operator:
        operator.create_task(spec)


def dies(machine: Machine, victim: str) -> None:
    """The program ends by the signal that it sent itself at the failpoint, and no other way."""
    assert machine.program(victim).process.wait(30) == -signal.SIGKILL


def attempts(answer: pb.GetTaskResponse) -> list[tuple[int, int, int]]:
    for row in answer.rounds:
        print(row.round_number, row.attempt, row.reason or "no reason")  # seen if the test fails
    return [(row.round_number, row.attempt, row.state) for row in answer.rounds]


def counted_once(machine: Machine, answer: pb.GetTaskResponse) -> None:
    """Each client's upload was accepted, admitted, judged and released once a round, by the logs
    too."""
    done = [row for row in answer.rounds if row.state == round_pb2.ROUND_STATE_DONE]
    assert [(row.uploads, row.rejected) for row in done] == [(len(CLIENTS), 0)] * ROUNDS
    served, held = machine.entries(SERVER), machine.entries(KEY_HOLDER)
    for row in done:
        there = f'"attempt":{row.attempt},'
        for entries, event, round_, times in (
            (served, "upload-accepted", f'"round":{row.round_number},', len(CLIENTS)),
            (served, "norms-judged", f'"round":{row.round_number},', 1),
            (served, "round-finished", f'"round":{row.round_number},', 1),
            (held, "round-opened", f'"round_number":{row.round_number},', 1),
            (held, "upload-admitted", f'"round_number":{row.round_number},', len(CLIENTS)),
            (held, "norm-judged", f'"round_number":{row.round_number},', len(CLIENTS)),
            (held, "round-released", f'"round_number":{row.round_number},', 1),
        ):
            found = [e for e in entries if e.event == event]
            assert sum(there in e.details and round_ in e.details for e in found) == times, event


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", TODAY)
def test_a_program_that_dies_goes_on_with_the_same_attempt(failpoint: str, tmp_path: Path) -> None:
    victim = SERVER if failpoint in OF_THE_SERVER else KEY_HOLDER
    with Machine(tmp_path) as machine:
        start(machine, victim, failpoint)
        with contextlib.suppress(SecaggError):  # the server may die before it has answered
            create(machine, task(ROUNDS))
        clients = Clients(machine)
        dies(machine, victim)
        machine.start(victim)
        clients.finish()
        answer = exact(machine, ROUNDS)
        assert machine.stop() == [0, 0]
        counted_once(machine, answer)
    done = round_pb2.ROUND_STATE_DONE
    assert attempts(answer) == [(1, 1, done), (2, 1, done)]
    for seen in clients.seen:
        versions = {context.id.round_number: version for context, version in seen}
        assert versions == {1: 0, 2: 1}


@pytest.mark.slow
def test_a_key_holder_that_dies_while_it_closes_a_round_leaves_no_key_behind(
    tmp_path: Path,
) -> None:
    def present(index: int, current: CurrentRound) -> bool:
        name = current.context.id
        return index != 2 or (name.round_number, name.attempt) != (1, 1)

    with Machine(tmp_path) as machine:
        start(machine, KEY_HOLDER, OF_AN_ABORTED_ATTEMPT)
        create(machine, task(ROUNDS, deadline_ms=SHORT_MS, max_attempts=10))
        clients = Clients(machine, present)
        dies(machine, KEY_HOLDER)
        keys = tmp_path / KEY_HOLDER / "round-keys"
        (left,) = keys.glob("*.key")
        machine.start(KEY_HOLDER)
        assert not left.exists()
        clients.finish()
        answer = exact(machine, ROUNDS)
        assert machine.stop() == [0, 0]
        counted_once(machine, answer)
        assert not list(keys.glob("*.key"))
    assert attempts(answer)[0] == (1, 1, round_pb2.ROUND_STATE_ABORTED)
    assert answer.rounds[0].reason.startswith("QUORUM_NOT_REACHED")


@pytest.mark.slow
def test_both_programs_killed_at_once_cost_nothing(tmp_path: Path) -> None:
    back = threading.Event()

    def present(index: int, current: CurrentRound) -> bool:
        return index != 2 or back.wait(60)

    with Machine(tmp_path) as machine:
        start(machine, SERVER, "")
        create(machine, task(ROUNDS))
        clients = Clients(machine, present)
        with machine.operator() as operator:
            machine.program(SERVER).wait_for(
                lambda: [row.uploads for row in operator.task("task").rounds] == [2]
            )
        machine.kill(KEY_HOLDER, SERVER)
        for name in (KEY_HOLDER, SERVER):
            machine.start(name)
        back.set()
        clients.finish()
        answer = exact(machine, ROUNDS)
        assert machine.stop() == [0, 0]
        counted_once(machine, answer)
    done = round_pb2.ROUND_STATE_DONE
    assert attempts(answer) == [(1, 1, done), (2, 1, done)]


# Client 2, which dies once its upload is on the disk and before any of it has left.
DYING_CLIENT = """
import os, signal, sys
from pathlib import Path
import cohort, programs
from secagg_client.session import ClientSession
machine = programs.Machine(Path(sys.argv[1]))
machine.server = sys.argv[2]
ClientSession.send = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with programs.session(machine, 2) as session:
    current = next(session.rounds())
    values = cohort.contribution(current.context.plan, 2)
    current.contribute(values, samples=cohort.samples(2))
"""


@pytest.mark.slow
def test_a_client_that_dies_between_save_and_send_sends_what_it_has_saved(tmp_path: Path) -> None:
    with Machine(tmp_path) as machine:
        start(machine, SERVER, "")
        create(machine, task(ROUNDS))
        died = subprocess.run(
            [sys.executable, "-c", DYING_CLIENT, str(tmp_path), machine.server],
            timeout=60,
            env=machine.environment(),
        )
        assert died.returncode == -signal.SIGKILL
        (kept,) = machine.outbox(2).glob("upload-*")
        saved = kept.read_bytes()
        with session(machine, 2) as connected:
            current = next(connected.rounds())
            cost = current.contribute({}, samples=1)
        assert cost.encrypt_s == 0.0, "encrypted a second time"
        assert kept.read_bytes() == saved
        Clients(machine).finish()
        answer = exact(machine, ROUNDS)
        assert machine.stop() == [0, 0]
        counted_once(machine, answer)


@pytest.mark.parametrize("after_handshake", [False, True])
def test_a_service_that_dies_in_the_handshake_is_not_blamed_for_it(
    after_handshake: bool, tmp_path: Path
) -> None:
    """A crash must not look like a refusal: a client that is refused gives up for good."""
    kits = provisioned(tmp_path, 1)
    listener = socket.create_server(("127.0.0.1", 0))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(kits / "server" / "certificate.pem", kits / "server" / "private.key")
    context.load_verify_locations(kits / "server" / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED

    def die() -> None:
        connection, _ = listener.accept()
        if after_handshake:
            connection = context.wrap_socket(connection, server_side=True)
        listener.close()
        connection.close()

    dying = threading.Thread(target=die)
    dying.start()
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    own = Kit.load(kits / "clients" / "client-1")
    assert why_unreachable(address, own, (Role.SERVER,)) is None
    dying.join(10)
