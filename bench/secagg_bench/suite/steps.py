"""Runs a scenario: every system in a worker of its own, on one core, all of them in turn.

A repetition is a round of each system with the same updates. Which of them comes first changes from
one repetition to the next, so that no system always runs on a machine that another one has warmed
or tired. A first round of each is left out: it loads what is loaded late. So is each round's first
addition, which pays for fresh memory.

Within a round, clients and server take turns: an upload is added before the next one is made. So
memory is that of one upload at a time, and of what the system keeps of those before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from secagg.errors import UnavailableError
from secagg_bench.peers.driving import Opened, Peer, Step, Upload
from secagg_bench.peers.environments import FOLDER
from secagg_bench.suite.rows import UNITS, Metric, Row
from secagg_bench.suite.scenarios import Contender, Scenario, Shapes, size_of

__all__ = ["measured"]

OnProgress = Callable[[str], None]


def measured(
    scenario: Scenario,
    machine: str,
    say: OnProgress,
    *,
    first_seed: int = 1,
    folder: Path = FOLDER,
) -> Iterator[Row]:
    """The rows of a scenario, as they are measured.

    A system that cannot be had, or fails, is told of and left out; the others go on.

    Args:
        machine: what it runs on, for the rows.
        say: told how far it has come, and what is left out.
        first_seed: of the first repetition; those that follow count on.
        folder: of the systems' environments.
    """
    for shapes in scenario.models:
        for clients in scenario.clients:
            say(f"{scenario.name}: {size_of(shapes):,} parameters, {clients} clients")
            yield from _size(scenario, shapes, clients, machine, say, first_seed, folder)


def _size(
    scenario: Scenario,
    shapes: Shapes,
    clients: int,
    machine: str,
    say: OnProgress,
    first_seed: int,
    folder: Path,
) -> Iterator[Row]:
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    entries = [_Entry(each, core, folder) for each in scenario.systems]
    with contextlib.ExitStack() as stack:
        for entry in entries:
            stack.callback(entry.leave)
        for repetition in range(scenario.repetitions):
            seed = first_seed + repetition
            for entry in (
                entries[repetition % len(entries) :] + entries[: repetition % len(entries)]
            ):
                if entry.gone:
                    continue
                try:
                    figures = entry.round(shapes, clients, seed)
                except UnavailableError as error:
                    say(f"{scenario.name}: {entry.contender.name} is not measured: {error}")
                    continue
                for metric, value in figures.items():
                    yield Row(
                        scenario=scenario.name,
                        system=entry.contender.name,
                        version=entry.version,
                        parameters=size_of(shapes),
                        clients=clients,
                        metric=metric,
                        value=value,
                        unit=UNITS[metric],
                        seed=seed,
                        machine=machine,
                    )


class _Entry:
    """A system's worker, from its first round to its last.

    Attributes:
        gone: whether it has failed.
        version: of the system and its libraries, once it has begun.
    """

    def __init__(self, contender: Contender, core: int | None, folder: Path) -> None:
        self.contender = contender
        self.gone, self.version = False, ""
        self._core, self._folder = core, folder
        self._stack = contextlib.ExitStack()
        self._peer: Peer | None = None

    def round(self, shapes: Shapes, clients: int, seed: int) -> dict[Metric, float]:
        """One round of all clients.

        Raises:
            UnavailableError: it cannot be had, or has failed; it is gone then.
        """
        try:
            if self._peer is None:
                self._peer = self._begun(shapes, clients, seed)
            return _round(self._peer, clients - self.contender.dropped, seed)
        except UnavailableError:
            self.gone = True
            self.leave()
            raise

    def _begun(self, shapes: Shapes, clients: int, seed: int) -> Peer:
        peer = self._stack.enter_context(
            Peer(self.contender.system, core=self._core, folder=self._folder)
        )
        found = peer.set_up(
            shapes, clients=clients, seed=seed, options=dict(self.contender.options)
        )
        self.version = _version(found.versions)
        _round(peer, clients - self.contender.dropped, seed)
        return peer

    def leave(self) -> None:
        """End its worker."""
        self._stack.close()
        self._peer = None


def _round(peer: Peer, clients: int, seed: int) -> dict[Metric, float]:
    peer.round(seed)
    uploads, added = [], []
    for number in range(clients):
        uploads.append(peer.client(number))
        added.append(peer.add(number))
    figures = _figures(uploads, added[1:] or [Step(0.0, 0.0, {}, {})], peer.open())
    return figures | {Metric.ERROR: peer.error(), Metric.MEMORY: float(peer.peak_bytes())}


def _figures(
    uploads: Sequence[Upload], added: Sequence[Step], opened: Opened
) -> dict[Metric, float]:
    found = {
        Metric.CLIENT: median(each.cpu_s for each in uploads),
        Metric.ADD: median(each.cpu_s for each in added),
        Metric.HAND_OVER: opened.hand_over.cpu_s,
        Metric.OPEN: opened.cpu_s,
        Metric.UPLOAD: float(max(each.bytes for each in uploads)),
        Metric.HANDED_OVER: float(opened.bytes),
    }
    alone = [each.beside["unauthenticated"] for each in added if "unauthenticated" in each.beside]
    if alone:
        found[Metric.ADD_UNAUTHENTICATED] = median(alone)
    return found


def _version(versions: Mapping[str, str]) -> str:
    others = dict(versions)
    system = others.pop("system")
    python = others.pop("python")
    listed = [f"{name} {number}" for name, number in sorted(others.items()) if name not in system]
    return ", ".join([system, *listed, f"Python {python}"])
