"""Runs one system, step by step, as it is told on standard input: ``python worker.py SYSTEM``.

It needs the standard library and numpy, and whatever the system is made of, but not this project:
it runs in environments of the systems' own. It stays on one core with one thread.

A command is a line of JSON with ``do``; its answer is another. Steps of a round:

* ``set up`` with ``shapes`` (by name), ``clients``, ``seed`` and ``options`` of the system: keys
  that last, and whatever is loaded. Answers ``versions``, the system's own under ``system``.
* ``round``: forget the last one; keys of this one, where the system has any. With a ``seed``, of
  the updates from now on.
* ``client`` with ``number``: quantise, encrypt, serialise. What it made is kept until it is added.
  Answers ``bytes``.
* ``add`` with ``number``: the server parses it, checks it and adds it to the sum.
* ``open``: the server makes what it hands over, and whoever has the key opens it and decodes the
  mean. Answers ``bytes`` of what was handed over, and the server's part of it as ``hand_over``.

All of these answer ``cpu_s`` and ``wall_s``; ``parts``, processor seconds that are among ``cpu_s``;
and ``beside``, others that were measured with it and are not. After a round:

* ``error``: the largest absolute difference between the mean that was opened and that of the
  updates of those who were added.
* ``memory``: ``peak_bytes``, the most that this process held in any step since the round began.
  All parties are in it, and so are Python, libraries and keys, and uploads that were made and not
  yet added; what lies between steps, such as drawing updates, is not. Where the system does not
  let a process begin to count anew, it is the most that it ever held.

Client i's update is drawn from ``default_rng((seed, i))``, and has norm 0.9 over everything.

What fails is answered with ``error_kind`` and ``message``, and ends the worker with status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TextIO, TypeVar

if TYPE_CHECKING:
    # numpy reads the number of threads when it is loaded, which `main` has to set before.
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["NORM", "Clock", "System", "Times", "Worker", "main", "update_of"]

NORM = 0.9
"""L2 norm of every update, over all its tensors."""

_SYSTEMS = Path(__file__).with_name("systems")
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_T = TypeVar("_T")


@dataclass
class Times:
    """Seconds of this process's processor time, all threads, and of the clock on the wall."""

    cpu_s: float = 0.0
    wall_s: float = 0.0

    @classmethod
    def now(cls) -> Times:
        """Both clocks; only differences mean anything."""
        return cls(time.process_time(), time.perf_counter())

    def __add__(self, other: Times) -> Times:
        return Times(self.cpu_s + other.cpu_s, self.wall_s + other.wall_s)

    def __sub__(self, other: Times) -> Times:
        return Times(self.cpu_s - other.cpu_s, self.wall_s - other.wall_s)


class Clock:
    """Times a step; the system may name parts of it, and leave some out."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._parts: dict[str, Times] = {}
        self._beside: dict[str, Times] = {}
        self._earlier = Times()

    def step(self, work: Callable[[], _T]) -> tuple[_T, dict[str, Any]]:
        """What a step returns, and the times to answer."""
        self._begin()
        started = Times.now()
        done = work()
        spent = Times.now() - started + self._earlier
        for left_out in self._beside.values():
            spent -= left_out
        return done, {
            "cpu_s": spent.cpu_s,
            "wall_s": spent.wall_s,
            "parts": {name: each.cpu_s for name, each in self._parts.items()},
            "beside": {name: each.cpu_s for name, each in self._beside.items()},
        }

    def part(self, name: str) -> contextlib.AbstractContextManager[Times]:
        """Measure a part of the step; of several with one name, all together."""
        return self._measured(self._parts, name)

    def beside(self, name: str) -> contextlib.AbstractContextManager[Times]:
        """Measure what is not to count for the step."""
        return self._measured(self._beside, name)

    def earlier(self, name: str, times: Times) -> None:
        """Count what was done in another step for this one."""
        self._earlier += times
        self._parts[name] = times

    @staticmethod
    @contextlib.contextmanager
    def _measured(kept: dict[str, Times], name: str) -> Iterator[Times]:
        started, spent = Times.now(), Times()
        yield spent
        found = Times.now() - started
        spent.cpu_s, spent.wall_s = found.cpu_s, found.wall_s
        kept[name] = kept.get(name, Times()) + found


class System(Protocol):
    """A way to sum updates; made with shapes, the number of clients, a clock, and its options.

    Messages are what travels; a mean has an array for each name, of the shapes given.
    """

    DISTRIBUTIONS: ClassVar[tuple[str, ...]]
    """What is installed for it; the first is the system itself."""

    def round(self) -> None:
        """Begin another round."""

    def client(self, number: int, update: Mapping[str, NDArray[np.float32]]) -> list[bytes]:
        """Protect one client's update."""

    def add(self, number: int, messages: list[bytes]) -> None:
        """Take it into the sum."""

    def hand_over(self) -> list[bytes]:
        """What whoever opens needs from the server."""

    def open(self, messages: list[bytes]) -> Mapping[str, NDArray[Any]]:
        """The mean of what was added."""


def update_of(
    seed: int, number: int, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[np.float32]]:
    """One client's update: float32 arrays of these shapes, the same in every system.

    Args:
        seed: of the cohort.
        number: the client, from 0.
        shapes: by name; values are drawn in this order.
    """
    import numpy as np

    sizes = [math.prod(shape) for shape in shapes.values()]
    drawn = np.random.default_rng((seed, number)).standard_normal(sum(sizes), dtype=np.float32)
    drawn *= np.float32(NORM / np.linalg.norm(drawn.astype(np.float64)))
    parts = np.split(drawn, np.cumsum(sizes)[:-1])
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


class Worker:
    """One system, what its clients have made, and who is in the sum.

    Args:
        name: a module of ``systems``.

    Raises:
        ValueError: there is no such system.
    """

    def __init__(self, name: str) -> None:
        known = sorted(each.stem for each in _SYSTEMS.glob("[!_]*.py"))
        if name not in known:
            raise ValueError(f"expected one of the systems {', '.join(known)}; got {name!r}")
        self._name, self._clock = name, Clock()
        self._system: System | None = None
        self._made: dict[int, list[bytes]] = {}
        self._added: list[int] = []
        self._mean: Mapping[str, NDArray[Any]] | None = None
        self._peak = 0

    def answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Do as told.

        Raises:
            ValueError: no such command, or not now.
            Exception: whatever the system raises.
        """
        known: dict[object, Callable[..., dict[str, Any]]] = {
            "set up": self._set_up,
            "round": self._round,
            "client": self._client,
            "add": self._add,
            "open": self._open,
            "error": self._error,
            "memory": self._memory,
        }
        arguments = dict(command)
        do = arguments.pop("do", None)
        if do not in known:
            raise ValueError(f"expected a command of {', '.join(map(str, known))}; got {do!r}")
        return known[do](**arguments)

    def _set_up(
        self,
        shapes: Mapping[str, list[int]],
        clients: int,
        seed: int,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._clients, self._seed = clients, seed

        def made() -> System:
            # Beside this file, by a name that needs no package around it.
            module = importlib.import_module(f"{_SYSTEMS.name}.{self._name}")
            system: System = module.System(self._shapes, clients, self._clock, **options)
            return system

        system, times = self._step(made)
        self._system = system
        first, *others = system.DISTRIBUTIONS
        versions = {name: version(name) for name in ["numpy", *others]}
        versions |= {"python": platform.python_version(), "system": f"{first} {version(first)}"}
        return times | {"versions": versions}

    def _step(self, work: Callable[[], _T]) -> tuple[_T, dict[str, Any]]:
        """What a step returns, and the times to answer; its peak of memory is remembered."""
        _begin_peak()
        done = self._clock.step(work)
        self._peak = max(self._peak, _peak_bytes())
        return done

    def _ready(self) -> System:
        if self._system is None:
            raise ValueError("expected to be set up first")
        return self._system

    def _round(self, seed: int | None = None) -> dict[str, Any]:
        system = self._ready()
        self._seed = self._seed if seed is None else seed
        self._made, self._added, self._mean, self._peak = {}, [], None, 0
        return self._step(system.round)[1]

    def _client(self, number: int) -> dict[str, Any]:
        system = self._ready()
        if not 0 <= number < self._clients:
            raise ValueError(f"expected a client below {self._clients}; got {number}")
        update = update_of(self._seed, number, self._shapes)
        made, times = self._step(lambda: system.client(number, update))
        self._made[number] = made
        return times | {"bytes": sum(map(len, made))}

    def _add(self, number: int) -> dict[str, Any]:
        system, made = self._ready(), self._made.pop(number, None)
        if made is None or number in self._added:
            raise ValueError(f"expected what client {number} made, once a round")
        _, times = self._step(lambda: system.add(number, made))
        self._added.append(number)
        return times

    def _open(self) -> dict[str, Any]:
        system = self._ready()
        if not self._added:
            raise ValueError("expected to open a sum of something; nothing was added")
        handed, before = self._step(system.hand_over)
        self._mean, times = self._step(lambda: system.open(handed))
        return times | {"bytes": sum(map(len, handed)), "hand_over": before}

    def _error(self) -> dict[str, Any]:
        import numpy as np

        if self._mean is None:
            raise ValueError("expected a round that was opened")
        total = {name: np.zeros(shape) for name, shape in self._shapes.items()}
        for number in self._added:
            for name, values in update_of(self._seed, number, self._shapes).items():
                total[name] += values
        off = [np.abs(self._mean[name] - each / len(self._added)) for name, each in total.items()]
        return {"error": max(float(each.max()) for each in off)}

    def _memory(self) -> dict[str, Any]:
        return {"peak_bytes": self._peak}


def _begin_peak() -> None:
    """Have the kernel forget how much this process has held before, where it can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_bytes(b"5")


def _peak_bytes() -> int:
    """The most resident memory since then, or since ever."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_bytes().splitlines():
            # Not `ru_maxrss`: it is never forgotten, and begins with that of whoever started this.
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> int:
    """Answer commands until there are no more; the exit status."""
    parser = argparse.ArgumentParser(description="Run one system as told on standard input.")
    parser.add_argument("system")
    parser.add_argument("--core", type=int, help="stay on this core, where that can be had")
    arguments = parser.parse_args()
    os.environ.update(_ONE_THREAD)
    if arguments.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {arguments.core})
    # Some libraries print: whatever is not an answer goes to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        worker = Worker(arguments.system)
        for line in sys.stdin:
            _say(answers, worker.answer(json.loads(line)))
    except Exception as error:  # whatever it is, whoever asked is to know
        _say(answers, {"error_kind": type(error).__name__, "message": str(error)})
        return 1
    return 0


def _say(answers: TextIO, answer: Mapping[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
