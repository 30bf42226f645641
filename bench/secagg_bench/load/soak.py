"""Rounds without a break, one task after another, and what they leave behind in the programs.

All clients are in one process with whoever measures; server and key holder are processes of their
own. Every sum is held against what the clients were told, and computed again in the clear.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from secagg.wire.codec import sums_from_bytes
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg.wire.v1 import round_pb2
from secagg_bench.load.members import WHO, Book, Member, Pace, plan_of, quantized
from secagg_bench.load.vitals import family, folder_bytes, vitals
from secagg_bench.processes import Services, running_services
from secagg_server.operator import Operator
from secagg_server.tasks import TaskSpec

__all__ = ["Soak", "Wanted", "by_minute", "settled"]

SETTLED_S = 300.0
"""Seconds after which a program has all the memory that it needs."""

_WINDOW_S = 60.0
_GAUGES = ("secagg_calls_in_flight", "secagg_workers_queue_depth", "secagg_rounds_open")
_POLL_S = 0.25

OnProgress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """How long, with how many, and how large.

    Attributes:
        sample_s: seconds between two samples.
        retain_minutes: minutes for which the server keeps sums and models.
    """

    minutes: float = 60.0
    clients: int = 10
    target: int = 7
    rounds: int = 10
    parameters: int = 300_000
    sample_s: float = 10.0
    retain_minutes: float = 15.0
    pace: Pace = field(default_factory=Pace)


@dataclass
class Soak:
    """A run, and what was seen of it.

    Attributes:
        samples: what was measured, in order.
        tasks, rounds: how many ended how; of a task that had too few clients too often, the others
            of its rounds are missing. ``refused`` are uploads.
        wrong: what no sum may be; nothing, in a run that went well.
    """

    wanted: Wanted
    folder: Path
    say: OnProgress
    samples: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    tasks: dict[str, int] = field(default_factory=lambda: {"finished": 0, "failed": 0})
    rounds: dict[str, int] = field(default_factory=lambda: {"done": 0, "aborted": 0, "refused": 0})

    def run(self, keep: Callable[[dict[str, Any]], None] = lambda _found: None) -> dict[str, Any]:
        """Run it to its end; what was found, for a results file.

        Args:
            keep: told what was found so far, after each task.

        Raises:
            UnavailableError: a program did not start.
            SecaggError: a client failed.
        """
        minutes = self.wanted.retain_minutes
        settings = {"SECAGG_SERVER_RETAIN_DAYS": str(minutes / (24 * 60))}
        with (
            running_services(self.folder, self.wanted.clients, environment=settings) as services,
            contextlib.closing(services.operator()) as operator,
        ):
            self._began, self._due = time.monotonic(), 0.0
            book = Book()
            members = [
                Member(services, number, self.folder / "clients", book, self.wanted.pace)
                for number in range(self.wanted.clients)
            ]
            while self._seconds() < 60 * self.wanted.minutes:
                self._task(services, operator, members, f"soak-{sum(self.tasks.values()) + 1}")
                keep(self._found(book))
        return self._found(book)

    def _found(self, book: Book) -> dict[str, Any]:
        return {
            "wanted": asdict(self.wanted),
            "minutes": round(self._seconds() / 60, 1),
            "tasks": self.tasks,
            "rounds": self.rounds,
            "acts": dict(sorted(book.acts.items())),
            "wrong": self.wrong,
            # No round is open between two tasks.
            "upload_bytes_left": folder_bytes(self.folder / "server" / "uploads"),
            "settled": settled(self.samples),
            "minutes_seen": by_minute(self.samples),
        }

    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _task(
        self, services: Services, operator: Operator, members: Sequence[Member], task_id: str
    ) -> None:
        plan = plan_of(self.wanted.parameters, self.wanted.clients)
        deadline_ms = round(1000 * self.wanted.pace.round_s)
        operator.create_task(
            TaskSpec(task_id, plan, self.wanted.rounds, deadline_ms, 100, self.wanted.target)
        )
        threads = [member.begin(task_id) for member in members]
        while any(thread.is_alive() for thread in threads):
            threads[0].join(_POLL_S) if threads[0].is_alive() else time.sleep(_POLL_S)
            self._sample(services)
            for member in members:
                if member.failed:
                    raise member.failed
        answer = operator.task(task_id)
        done = answer.task.state == pb.TASK_STATE_FINISHED
        self.tasks["finished" if done else "failed"] += 1
        if not done:
            self.say(f"{task_id}: {answer.task.reason}")
        self._check(operator, members[0].book, task_id, answer)
        self.say(
            f"{self._seconds() / 60:.1f} minutes: {task_id}, {self.rounds['done']} rounds, "
            f"{len(self.wrong)} wrong"
        )

    def _check(
        self, operator: Operator, book: Book, task_id: str, answer: pb.GetTaskResponse
    ) -> None:
        for row in answer.rounds:
            self.rounds["refused"] += row.rejected
            if row.state != round_pb2.ROUND_STATE_DONE:
                self.rounds["aborted"] += 1
                continue
            self.rounds["done"] += 1
            key = (task_id, row.round_number, row.attempt)
            if found := self._compared(operator, book, key):
                self.wrong.append(f"{key}: {found}")
                self.say(self.wrong[-1])
        book.forget(task_id)

    def _compared(self, operator: Operator, book: Book, key: tuple[str, int, int]) -> str:
        data, contributors = operator.sums(key[0], key[1])
        context = book.contexts[key]
        names = [segment.name for segment in context.plan.segments]
        sums = dict(zip(names, sums_from_bytes(data, context.plan), strict=True))
        found = np.abs(sums[WHO])  # each at a public random sign
        present = np.flatnonzero(found)
        if contributors != len(present):
            return "the number of contributors is not that of the sum"
        clear = sum(quantized(context, int(client))[0].summand for client in present)
        if not np.array_equal(clear, sums["update"]):
            return "the sum is not what its contributors encrypted"
        return book.wrong(key, found)

    def _sample(self, services: Services) -> None:
        now = self._seconds()
        if now < self._due:
            return
        self._due = now + self.wanted.sample_s
        key_holder, server = (program.process.pid for program in services.programs)
        sample: dict[str, Any] = {"at_s": round(now, 1)}
        for name, pid in {
            "server": server,
            "key_holder": key_holder,
            "clients": os.getpid(),
        }.items():
            seen = vitals(pid)
            sample[name] = {
                "rss": seen.rss,
                "fds": seen.fds,
                "threads": seen.threads,
                "cpu_s": seen.cpu_s,
            }
            if name != "clients":
                sample[name]["workers"] = [vitals(each).rss for each in family(pid)]
        sample["bytes"] = dict(self._bytes())
        sample["gauges"] = _gauges(services.monitor)
        self.samples.append(sample)

    def _bytes(self) -> Iterator[tuple[str, int]]:
        server, key_holder = self.folder / "server", self.folder / "keyholder"
        for name in ("uploads", "models", "sums"):
            yield name, folder_bytes(server / name)
        yield "store", _sizes(server, "server.sqlite3*")
        yield "ledger", _sizes(key_holder, "ledger.sqlite3*")
        yield "round_keys", folder_bytes(key_holder) - _sizes(key_holder, "ledger.sqlite3*")


def _sizes(folder: Path, pattern: str) -> int:
    total = 0
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def _gauges(monitor: str) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{monitor}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for name, value in re.findall(r"^([a-z_]+)(?:\{[^}]*\})? ([0-9.e+-]+)", text, re.MULTILINE):
        if name in _GAUGES:
            found[name] = found.get(name, 0.0) + float(value)
    return found


def by_minute(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Medians over each minute, by what was measured: ``server.rss`` and the like."""
    minutes: dict[int, list[dict[str, float]]] = {}
    for sample in samples:
        minutes.setdefault(int(sample["at_s"] // 60), []).append(dict(_flat(sample)))
    columns: dict[str, list[float]] = {"minute": [float(minute) for minute in minutes]}
    for seen in minutes.values():
        for name in seen[0]:
            if name != "at_s":
                middle = float(np.median([each[name] for each in seen]))
                columns.setdefault(name, []).append(round(middle, 1))
    return columns


def _flat(sample: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in sample.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", float(sum(value) if isinstance(value, list) else value)


def settled(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Memory and files of each program: after the first minutes, and in the end.

    Medians over a minute: what a round takes while it lasts comes and goes.
    """
    last = samples[-1]["at_s"]
    early = min(SETTLED_S, last / 2)
    windows = {
        "early": [s for s in samples if early <= s["at_s"] < early + _WINDOW_S] or [samples[0]],
        "late": [s for s in samples if s["at_s"] > last - _WINDOW_S],
    }
    found: dict[str, Any] = {}
    for name in ("server", "key_holder", "clients"):
        for when, window in windows.items():
            for key in ("rss", "fds", "threads"):
                middle = float(np.median([s[name][key] for s in window]))
                found.setdefault(name, {})[f"{key}_{when}"] = middle
            if name != "clients":
                workers = float(np.median([sum(s[name]["workers"]) for s in window]))
                found[name][f"workers_{when}"] = workers
    return found
