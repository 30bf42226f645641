"""Many clients upload a large update at once, to one server: its memory, its health, its speed.

Server and key holder are the real programs over mutual TLS, and so is every client's code. For each
number of clients everything starts anew, so that a peak is that number's.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from secagg.errors import RoundError
from secagg.wire.codec import sums_from_bytes
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg_bench.load.members import plan_of
from secagg_bench.load.probing import Answer, probing, summary
from secagg_bench.load.uploaders import Sent, Uploaders
from secagg_bench.load.vitals import Vitals, family, vitals
from secagg_bench.processes import Services, provisioned, running_services
from secagg_server.operator import Operator
from secagg_server.tasks import TaskSpec

__all__ = ["Wanted", "Watch", "counted", "ended", "measure"]

TASK_ID = "load"
_DEADLINE_MS = 30 * 60_000
_SAMPLE_S = 0.1
_POLL_S = 0.02

OnProgress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is measured.

    Attributes:
        clients: how many upload at once, one run each.
        enrolled: how many the server knows.
        processes: in which the clients live.
        idle_s: seconds of health answers without any load, before.
    """

    clients: tuple[int, ...] = (25, 50, 100, 200)
    enrolled: int = 1000
    parameters: int = 1_000_000
    processes: int = 2
    idle_s: float = 10.0


@dataclass
class Watch:
    """Looks at programs several times a second while they run.

    Attributes:
        most: the largest figures of each, by name; ``workers`` are those of the server, and
            ``all`` is a program with its workers at one moment.
    """

    server: int
    key_holder: int
    most: dict[str, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look meanwhile."""
        ended = threading.Event()
        thread = threading.Thread(target=self._look, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _look(self, ended: threading.Event) -> None:
        while not ended.wait(_SAMPLE_S):
            self.look()

    def look(self) -> Vitals:
        """Look once; the server's."""
        server, key_holder = vitals(self.server), vitals(self.key_holder)
        workers, helpers = _held(self.server), _held(self.key_holder)
        found = {
            "server_rss": server.peak,
            "server_fds": server.fds,
            "server_threads": server.threads,
            "workers_rss": workers,
            "server_all_rss": server.rss + workers,
            "key_holder_rss": key_holder.peak,
            "key_holder_workers_rss": helpers,
            "key_holder_all_rss": key_holder.rss + helpers,
        }
        for name, value in found.items():
            self.most[name] = max(value, self.most.get(name, 0))
        return server


def _held(pid: int) -> int:
    """Bytes of memory of what a process has started; what ends meanwhile does not count."""
    total = 0
    for each in family(pid):
        with contextlib.suppress(OSError):
            total += vitals(each).rss
    return total


def measure(wanted: Wanted, folder: Path, say: OnProgress) -> dict[str, Any]:
    """One run for each number of clients.

    Args:
        folder: for kits, data and logs; on a real disk, for every chunk is flushed to it.

    Raises:
        RoundError: an upload was lost, or a sum is not exact.
    """
    say(f"enrolling {wanted.enrolled} clients")
    provisioned(folder, wanted.enrolled)
    rows = []
    for clients in wanted.clients:
        for name in ("server", "keyholder", "clients"):
            shutil.rmtree(folder / name, ignore_errors=True)
        with running_services(folder, wanted.enrolled) as services:
            rows.append(_run(wanted, clients, services, folder, say))
    return {"parameters": wanted.parameters, "enrolled": wanted.enrolled, "rows": rows}


def _run(
    wanted: Wanted, clients: int, services: Services, folder: Path, say: OnProgress
) -> dict[str, Any]:
    plan = plan_of(wanted.parameters, clients)
    key_holder, server = (program.process.pid for program in services.programs)
    watch = Watch(server, key_holder)
    answers: list[Answer] = []
    with contextlib.ExitStack() as stack:
        operator = stack.enter_context(contextlib.closing(services.operator()))
        operator.create_task(TaskSpec(TASK_ID, plan, 1, _DEADLINE_MS, 1, clients))
        shares = np.array_split(np.arange(clients), wanted.processes)
        uploaders = []
        for share in shares:
            one = Uploaders(
                *(services, TASK_ID, share.tolist(), folder / "clients", folder / "clients.log")
            )
            stack.callback(one.stop)
            uploaders.append(one)
        say(f"{clients} clients: encrypting")
        sums = [one.encrypted() for one in uploaders]
        say(f"{clients} clients: uploading")
        before = watch.look()
        stack.enter_context(watch.watching())
        at, sent, after = _sent(wanted, services, watch, uploaders, answers, operator)
    lost = [one for one in sent if one.refused]
    if lost or len(sent) != clients:
        raise RoundError(f"expected {clients} uploads that are taken; lost {len(lost)}: {lost[:3]}")
    seconds = max(one.seconds for one in sent)
    row = {
        "clients": clients,
        "upload_bytes": plan.payload_bytes,
        "accepted": len(sent),
        "told_to_wait": sum(one.waits for one in sent),
        "clients_told_to_wait": sum(one.waits > 0 for one in sent),
        "refused_calls": counted(after["metrics"], "secagg_calls_refused_total"),
        "upload_s": round(seconds, 2),
        "megabytes_s": round(clients * plan.payload_bytes / seconds / 1e6, 1),
        "server_cpu_s": round(after["uploaded"].cpu_s - before.cpu_s, 2),
        "conclude_s": round(at["done"] - at["sent"], 2),
        "rss_idle": before.rss,
        "peaks": watch.most,
        "health": {
            "idle": summary(answers, at["began"], at["word"]),
            "uploading": summary(answers, at["word"], at["sent"]),
            "concluding": summary(answers, at["sent"], at["done"]),
        },
        "exact": after["exact"](sums),
    }
    if not row["exact"]:
        raise RoundError("expected the sum of all uploads; it is another one")
    say(
        f"{clients} clients: {row['upload_s']} s, {row['megabytes_s']} MB/s, "
        f"{row['told_to_wait']} times told to wait, server {watch.most['server_rss'] / 1e6:.0f} MB"
    )
    return row


def _sent(
    wanted: Wanted,
    services: Services,
    watch: Watch,
    uploaders: Sequence[Uploaders],
    answers: list[Answer],
    operator: Operator,
) -> tuple[dict[str, float], list[Sent], dict[str, Any]]:
    """The moments of a run, what became of its uploads, and how the server was after them."""
    at: dict[str, float] = {}
    after: dict[str, Any] = {}
    with probing(services, answers):
        at["began"] = time.monotonic()
        time.sleep(wanted.idle_s)
        at["word"] = time.monotonic()
        for one in uploaders:
            one.send()
        sent = [each for one in uploaders for each in one.sent()]
        at["sent"] = time.monotonic()
        after["uploaded"] = watch.look()
        answer = ended(operator, TASK_ID)
        at["done"] = time.monotonic()
    after["metrics"] = _metrics(services.monitor)
    if answer.task.state != pb.TASK_STATE_FINISHED:
        raise RoundError(f"expected a task that finishes; it failed: {answer.task.reason}")
    (row,) = answer.rounds
    if row.contributors != len(sent):
        raise RoundError(f"expected {len(sent)} contributors; got {row.contributors}")
    data, _ = operator.sums(TASK_ID, 1)

    def exact(sums: Sequence[Sequence[Any]]) -> bool:
        found = sums_from_bytes(data, plan_of(wanted.parameters, len(sent)))
        clear = [sum(parts) for parts in zip(*sums, strict=True)]
        return all(np.array_equal(one, other) for one, other in zip(found, clear, strict=True))

    after["exact"] = exact
    return at, sent, after


def ended(operator: Operator, task_id: str) -> pb.GetTaskResponse:
    """How a task ended, once it has."""
    while True:
        answer = operator.task(task_id)
        if answer.task.state != pb.TASK_STATE_RUNNING:
            return answer
        time.sleep(_POLL_S)


def _metrics(monitor: str) -> str:
    with urllib.request.urlopen(f"http://{monitor}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def counted(metrics: str, name: str) -> dict[str, int]:
    """A counter's values above zero, by its one label."""
    found = re.findall(rf'^{name}{{[a-z_]+="([^"]*)"}} ([0-9.e+]+)', metrics, re.MULTILINE)
    return {label: int(float(value)) for label, value in found if float(value)}
