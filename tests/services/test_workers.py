"""Calculations in other processes: what comes back, who dies with whom, and nothing left behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import worker_tasks

from secagg.errors import ReleaseError, UnavailableError
from secagg.rpc.workers import Workers


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    made = Workers(1)
    made.warm()
    yield made
    made.close()


def gone(pid: int, wait_s: float = 0.0) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], wait_s)[0])
    finally:
        os.close(process)


def becomes_gone(pid: int) -> bool:
    """Wait for it."""
    return gone(pid, 20.0)


def test_the_result_comes_back_from_another_process(workers: Workers) -> None:
    array = np.arange(5, dtype=np.uint64)
    np.testing.assert_array_equal(workers.run(worker_tasks.doubled, array), array * 2)
    assert workers.run(os.getpid) not in (os.getpid(), 0)
    assert workers.run(os.getpid) == workers.run(os.getpid)


def test_errors_of_the_work_come_back_as_what_they_are(workers: Workers) -> None:
    with pytest.raises(ReleaseError, match="does not open") as caught:
        workers.run(worker_tasks.refuse)
    assert type(caught.value) is ReleaseError
    with pytest.raises(ZeroDivisionError):
        workers.run(worker_tasks.divide, 1, 0)
    assert workers.run(worker_tasks.divide, 6, 3) == 2


def test_work_that_cannot_be_sent_is_an_error_and_breaks_nothing(workers: Workers) -> None:
    with pytest.raises((AttributeError, TypeError, ValueError)):
        workers.run(lambda: 1)
    assert workers.run(worker_tasks.divide, 6, 3) == 2


def test_a_killed_process_is_replaced_and_the_work_done_again(tmp_path: Path) -> None:
    workers = Workers(1)
    try:
        victim = workers.run(os.getpid)
        assert workers.run(worker_tasks.die_at_first, str(tmp_path)) == "done"
        assert len(list(tmp_path.iterdir())) == 2
        assert becomes_gone(victim)
        assert workers.run(os.getpid) != victim
    finally:
        workers.close()


def test_a_process_killed_between_two_calculations_is_not_noticed_by_the_next() -> None:
    workers = Workers(1)
    try:
        victim = workers.run(os.getpid)
        os.kill(victim, signal.SIGKILL)
        assert becomes_gone(victim)
        assert workers.run(worker_tasks.divide, 6, 3) == 2
    finally:
        workers.close()


def test_work_that_kills_its_process_every_time_is_given_up(tmp_path: Path) -> None:
    workers = Workers(1)
    try:
        with pytest.raises(UnavailableError, match="its process was killed; give the service more"):
            workers.run(worker_tasks.die_always, str(tmp_path))
        assert len(list(tmp_path.iterdir())) == 2, "tried twice, and no more"
        assert workers.run(worker_tasks.divide, 6, 3) == 2
    finally:
        workers.close()


def test_one_death_does_not_hurt_the_work_of_other_threads(tmp_path: Path) -> None:
    workers = Workers(2)
    try:
        with ThreadPoolExecutor(4) as threads:
            dying = threads.submit(workers.run, worker_tasks.die_at_first, str(tmp_path))
            others = [threads.submit(workers.run, worker_tasks.divide, 6, n) for n in (1, 2, 3)]
            assert dying.result(60) == "done"
            assert [other.result(60) for other in others] == [6, 3, 2]
    finally:
        workers.close()


def test_closing_leaves_no_process() -> None:
    workers = Workers(2)
    pids = {workers.run(os.getpid) for _ in range(4)}
    assert not any(map(gone, pids))
    workers.close()
    assert all(map(becomes_gone, pids))


def test_signals_for_the_service_do_not_end_its_calculations(workers: Workers) -> None:
    pid = workers.run(os.getpid)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, number)
    assert workers.run(os.getpid) == pid


def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib\n"
        "from secagg.rpc.workers import Workers\n"
        "if __name__ == '__main__':\n"
        "    workers = Workers(2)\n"
        "    workers.warm()\n"
        "    print(*{workers.run(os.getpid) for _ in range(4)}, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        children = [int(word) for word in parent.stdout.readline().split()]
        assert children
        assert not any(map(gone, children))
        parent.kill()
        parent.wait(20)
        assert all(map(becomes_gone, children))
