"""Health tells the truth: ready while everything works, alive as long as the program runs."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import structlog
from federations import kit, shared, shared_other
from grpc_health.v1 import health_pb2
from serving import LoopThread, loop_thread, serving, soon

from secagg.errors import (
    ConfigurationError,
    ExpiredCertificateError,
    PlaintextError,
    SecaggError,
    UnavailableError,
    UntrustedCertificateError,
)
from secagg.rpc import channels, lifecycle
from secagg.rpc.lifecycle import (
    LIVENESS,
    add_health,
    check_health,
    check_ready_file,
    serve_until_stopped,
    write_ready_file,
)
from secagg_server import transactions
from secagg_server.store import Store

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Recorded:
    """A health service that remembers what it was told to say."""

    def __init__(self) -> None:
        self.said: dict[str, int] = {}
        self.history: list[tuple[str, int]] = []
        self.draining = False

    async def set(self, service: str, status: int) -> None:
        self.said[service] = status
        self.history.append((service, status))

    async def enter_graceful_shutdown(self) -> None:
        self.draining = True


class Checked:
    """Something a program depends on; works until the test breaks it."""

    def __init__(self) -> None:
        self.problem: SecaggError | None = None
        self.asked = 0

    async def __call__(self) -> None:
        self.asked += 1
        if self.problem:
            raise self.problem


@pytest.fixture(autouse=True)
def watched_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_WATCH_S", 0.0)


async def nothing() -> None:
    """Nothing to clean up."""


def while_serving(
    test: Callable[[Recorded], Awaitable[None]],
    *checks: Callable[[], Coroutine[Any, Any, None]],
    on_stop: Callable[[], Awaitable[None]] = nothing,
) -> Recorded:
    """Run a test beside a program that serves nothing; then stop it as an init system does."""
    health = Recorded()

    async def both() -> None:
        serve = asyncio.create_task(serve_until_stopped([], [health], on_stop, checks))
        await soon(lambda: LIVENESS in health.said)
        try:
            await test(health)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            await serve

    asyncio.run(both())
    return health


def ready(health: Recorded) -> Callable[[], bool]:
    return lambda: health.said.get("") == SERVING


def not_ready(health: Recorded) -> Callable[[], bool]:
    return lambda: health.said.get("") == NOT_SERVING


@pytest.mark.parametrize("broken", range(3))
def test_readiness_follows_each_check(broken: int) -> None:
    checks = [Checked() for _ in range(3)]

    async def test(health: Recorded) -> None:
        for _ in range(3):
            await soon(ready(health))
            checks[broken].problem = UnavailableError("expected a disk; it is gone")
            await soon(not_ready(health))
            checks[broken].problem = None
        await soon(ready(health))
        assert health.said[LIVENESS] == SERVING

    health = while_serving(test, *checks)
    assert [said for said in health.history if said[0] == LIVENESS] == [(LIVENESS, SERVING)]


@pytest.mark.parametrize("error", [OSError(5, "hunter2"), ValueError("hunter2")])
def test_an_error_that_nobody_expected_is_a_problem_too_and_the_watch_goes_on(
    error: Exception,
) -> None:
    check = Checked()

    async def test(health: Recorded) -> None:
        await soon(ready(health))
        check.problem = error  # type: ignore[assignment]
        await soon(not_ready(health))
        check.problem = None
        await soon(ready(health))

    with structlog.testing.capture_logs() as log:
        while_serving(test, check)
    assert f"failed with {type(error).__name__}" in str(log)
    assert "hunter2" not in str(log)


def test_a_program_that_starts_broken_is_alive_and_not_ready() -> None:
    check = Checked()
    check.problem = ConfigurationError("expected an enrolment; it is gone")

    async def test(health: Recorded) -> None:
        await soon(not_ready(health))
        assert health.said == {LIVENESS: SERVING, "": NOT_SERVING}

    assert ("", SERVING) not in while_serving(test, check).history


def test_without_anything_to_check_a_program_is_ready() -> None:
    async def test(health: Recorded) -> None:
        await soon(ready(health))

    while_serving(test)


def test_the_log_has_a_line_for_each_change_and_for_nothing_else() -> None:
    first, second = Checked(), Checked()

    async def test(health: Recorded) -> None:
        await soon(ready(health))
        first.problem = UnavailableError("expected the store; it is gone")
        await soon(not_ready(health))
        second.problem = UnavailableError("expected room; there is none")
        asked = first.asked
        await soon(lambda: first.asked > asked + 3)
        first.problem = None
        asked = second.asked
        await soon(lambda: second.asked > asked + 3)
        second.problem = None
        await soon(ready(health))

    with structlog.testing.capture_logs() as log:
        while_serving(test, first, second)
    assert [(line["event"], line.get("why")) for line in log] == [
        ("ready", None),
        ("not_ready", "expected the store; it is gone"),
        ("not_ready", "expected room; there is none"),
        ("ready", None),
        ("stopping", None),
    ]


def test_several_listeners_say_the_same() -> None:
    first, second, check = Recorded(), Recorded(), Checked()

    async def both() -> None:
        serve = asyncio.create_task(serve_until_stopped([], [first, second], nothing, [check]))
        await soon(lambda: first.said == second.said == {LIVENESS: SERVING, "": SERVING})
        check.problem = UnavailableError("text")
        await soon(lambda: first.said[""] == second.said[""] == NOT_SERVING)
        os.kill(os.getpid(), signal.SIGTERM)
        await serve

    asyncio.run(both())
    assert first.draining
    assert second.draining


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_before_it_cleans_up(number: signal.Signals) -> None:
    health, order = Recorded(), []

    async def on_stop() -> None:
        order.append(health.draining)

    async def both() -> None:
        serve = asyncio.create_task(serve_until_stopped([], [health], on_stop))
        await soon(ready(health))
        os.kill(os.getpid(), number)
        await serve

    asyncio.run(both())
    assert order == [True]


def test_a_check_that_hangs_does_not_stop_the_program_from_ending() -> None:
    entered = asyncio.Event()

    async def hangs() -> None:
        entered.set()
        await asyncio.Event().wait()

    async def test(_health: Recorded) -> None:
        await entered.wait()

    while_serving(test, hangs)


# --- a store that breaks --------------------------------------------------------------------------


def pinging(store: Store) -> Callable[[], Coroutine[Any, Any, None]]:
    async def check() -> None:
        await asyncio.to_thread(store.ping)

    return check


BREAKAGES = {
    "the row is gone": "DELETE FROM heartbeat",
    "the table is gone": "ALTER TABLE heartbeat RENAME TO elsewhere",
    "somebody else holds the lock": "BEGIN EXCLUSIVE",
}
REPAIRS = {
    "the row is gone": "INSERT INTO heartbeat (id, beat) VALUES (1, 0)",
    "the table is gone": "ALTER TABLE elsewhere RENAME TO heartbeat",
    "somebody else holds the lock": "ROLLBACK",
}


@pytest.mark.parametrize("case", BREAKAGES)
def test_a_store_that_breaks_makes_the_program_not_ready_until_it_works_again(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "LOCK_WAIT_MS", 1)
    monkeypatch.setattr(transactions, "ATTEMPTS", 1)
    file = tmp_path / "store.sqlite3"
    store = Store(f"sqlite:///{file}", bytes(32))
    other = sqlite3.connect(file, isolation_level=None, timeout=20, check_same_thread=False)

    async def test(health: Recorded) -> None:
        for _ in range(2):
            await soon(ready(health))
            await asyncio.to_thread(other.execute, BREAKAGES[case])
            await soon(not_ready(health))
            with pytest.raises(UnavailableError):
                await asyncio.to_thread(store.ping)
            await asyncio.to_thread(other.execute, REPAIRS[case])
        await soon(ready(health))
        assert health.said[LIVENESS] == SERVING

    try:
        while_serving(test, pinging(store))
    finally:
        other.close()
        store.close()


def test_a_disk_that_takes_nothing_more_is_noticed(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow."""
    code = (
        "import resource, sys\n"
        "from secagg.errors import UnavailableError\n"
        "from secagg_server.store import Store\n"
        "store = Store(f'sqlite:///{sys.argv[1]}/store.sqlite3', bytes(32))\n"
        "store.ping()\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))\n"
        "for _ in range(3):\n"
        "    try:\n"
        "        store.ping()\n"
        "    except UnavailableError as error:\n"
        "        print('unavailable')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))\n"
        "store.ping()\n"
        "print('works again')\n"
        "store.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["unavailable"] * 3 + ["works again"]


def test_pinging_a_store_does_not_make_it_grow(tmp_path: Path) -> None:
    file = tmp_path / "store.sqlite3"
    store = Store(f"sqlite:///{file}", bytes(32))
    store.ping()
    size = file.stat().st_size
    for _ in range(50):
        store.ping()
    store.close()
    assert file.stat().st_size == size


# --- asking ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


def healthy(status: int) -> Callable[[grpc.aio.Server], None]:
    def add(server: grpc.aio.Server) -> None:
        health = add_health(server)
        task = asyncio.ensure_future(health.set("", status))
        assert task is not None

    return add


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_service_that_is_ready_is_found_so(encrypted: bool, thread: LoopThread) -> None:
    own = kit(shared(), "server") if encrypted else None
    asking = kit(shared(), "alice") if encrypted else None
    with serving(thread, healthy(SERVING), own) as address:
        check_health(address, asking)


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_service_that_is_not_ready_says_where_to_look(
    encrypted: bool, thread: LoopThread
) -> None:
    own = kit(shared(), "server") if encrypted else None
    with (
        serving(thread, healthy(NOT_SERVING), own) as address,
        pytest.raises(UnavailableError, match="its log says why"),
    ):
        check_health(address, own)


def test_where_nobody_listens_the_advice_is_to_start_one(thread: LoopThread) -> None:
    with serving(thread, healthy(SERVING)) as address:
        pass
    for own in (None, kit(shared(), "server")):
        with pytest.raises(UnavailableError, match=f"{address}; nothing answers there; start"):
            check_health(address, own)


@pytest.mark.parametrize(
    ("own", "asking", "kind"),
    [
        ("server", None, PlaintextError),
        (None, "server", PlaintextError),
        ("server", "other", UntrustedCertificateError),
    ],
)
def test_whatever_tls_refuses_is_named(
    own: str | None, asking: str | None, kind: type, thread: LoopThread
) -> None:
    kits = {
        None: None,
        "server": kit(shared(), "server"),
        "other": kit(shared_other(), "server"),
    }
    with serving(thread, healthy(SERVING), kits[own]) as address, pytest.raises(kind) as caught:
        check_health(address, kits[asking])
    assert not isinstance(caught.value, ExpiredCertificateError)


def test_a_remote_service_is_not_asked_in_plaintext() -> None:
    with pytest.raises(ConfigurationError, match="plaintext"):
        check_health("192.0.2.1:7400", None)


# --- ready files ----------------------------------------------------------------------------------


def test_a_ready_file_appears_whole_and_says_where_to_dial(tmp_path: Path) -> None:
    file = tmp_path / "ready"
    check_ready_file(file)
    check_ready_file(None)
    write_ready_file(file, {"listen": "127.0.0.1:1"})
    assert file.read_text() == '{"listen": "127.0.0.1:1"}'
    assert [path.name for path in tmp_path.iterdir()] == ["ready"]


def test_a_ready_file_in_no_folder_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ready_file in an existing folder"):
        check_ready_file(tmp_path / "absent" / "ready")
    assert channels.is_loopback("127.0.0.1:1")
