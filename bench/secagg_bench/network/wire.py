"""A wire between hosts that does what networks do: be late, lose, repeat, reorder, damage, refuse.

Every host's packets come here, each direction of each pair of hosts has its line, and what happens
on a line can be changed at any time. A program rather than the kernel's `netem`, which is not
everywhere; it can also damage what TCP's checksum does not notice, and count what it carried.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import random
import select
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from enum import Enum, auto

from secagg_bench.network.packets import addresses, damaged, payload_bytes, refusals, too_big

__all__ = ["CLEAR", "Cut", "Line", "Wire"]

ROUTER = "10.77.0.254"
_PACKET_BYTES = 65_536
_BACKLOG_S = 1.0  # what a slow line queues before it drops
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Line:
    """What one direction between two hosts does to packets.

    Attributes:
        delay_s, jitter_s: seconds until a packet arrives; the jitter is uniform, plus or minus.
        loss, duplicate, reorder: shares of packets that are lost, come twice, or overtake others.
        damage: share of packets with a bit flipped that TCP's checksum notices.
        tamper: the same, but the checksum is made to fit.
        bytes_per_s: how much passes; None for all of it.
        mtu: longest packet; the sender of a longer one is told so.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    damage: float = 0.0
    tamper: float = 0.0
    bytes_per_s: float | None = None
    mtu: int | None = None


CLEAR = Line()


class Cut(Enum):
    """How a line is cut."""

    SILENT = auto()
    """Packets vanish."""
    REFUSED = auto()
    """Both ends of a connection are told that it is over, and so is whoever opens one."""
    HUNG_UP = auto()
    """Connections open, and end at the first word, as at a proxy whose server is away."""


class Wire:
    """Carries packets between the devices of hosts, in a thread, until it is closed.

    Args:
        seed: of what happens to packets; which packets there are is not repeatable.
    """

    def __init__(self, seed: int = 0) -> None:
        self._chance = random.Random(seed)  # noqa: S311 - a simulated network
        self._devices: dict[str, int] = {}
        self._hosts: dict[int, str] = {}
        self._owners: dict[str, str] = {}
        self._lines: dict[tuple[str, str], Line] = {}
        self._cuts: dict[tuple[str, str], Cut] = {}
        self._free_at: dict[tuple[str, str], float] = defaultdict(float)
        self._last_at: dict[tuple[str, str], float] = defaultdict(float)
        self._carried: dict[tuple[str, str], int] = defaultdict(int)
        self._flying: list[tuple[float, int, str, str, bytes]] = []
        self._order = itertools.count()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def attach(self, host: str, device: int, address: str) -> None:
        """Connect a host by the descriptor of its TUN device; before `start`."""
        os.set_blocking(device, False)
        self._devices[host], self._hosts[device] = device, host
        self._owners[address] = host

    def start(self) -> None:
        """Carry from now on."""
        self._thread.start()

    def close(self) -> None:
        """Carry no longer."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def move(self, old: str, new: str) -> None:
        """Let an address be another's in the place of one that is nobody's from now on."""
        self._owners[new] = self._owners.pop(old)

    def set_line(self, source: str, destination: str, line: Line) -> None:
        """What happens in one direction from now on."""
        self._lines[source, destination] = line

    def cut(self, source: str, destination: str, how: Cut | None) -> None:
        """Cut one direction, or let it pass again."""
        if how is None:
            self._cuts.pop((source, destination), None)
        else:
            self._cuts[source, destination] = how

    def carried(self, source: str, destination: str) -> int:
        """Bytes of TCP payload that arrived, those that were sent again among them."""
        return self._carried[source, destination]

    def _run(self) -> None:
        poll = select.poll()
        for device in self._hosts:
            poll.register(device, select.POLLIN)
        while not self._ended.is_set():
            for device, _ in poll.poll(1000 * self._rest()):
                with contextlib.suppress(BlockingIOError):
                    # Not for ever: what is due must leave too.
                    for _ in range(64):
                        self._take(self._hosts[device], os.read(device, _PACKET_BYTES))
            self._deliver()

    def _rest(self) -> float:
        """Seconds until something is due."""
        if not self._flying:
            return _POLL_S
        return min(max(self._flying[0][0] - time.monotonic(), 0.0), _POLL_S)

    def _ends(self, packet: bytes) -> tuple[str, str] | None:
        """Whose the packet's addresses are now; None if one of them is nobody's."""
        found = addresses(packet)
        if found is None or not all(each in self._owners for each in found):
            return None
        return self._owners[found[0]], self._owners[found[1]]

    def _take(self, source: str, packet: bytes) -> None:
        ends = self._ends(packet)
        # A host that has moved may still send from where it was; nobody carries that.
        if ends is None or ends[0] != source:
            return
        destination = ends[1]
        cut = self._cuts.get((source, destination))
        if cut is None or (cut is Cut.HUNG_UP and not payload_bytes(packet)):
            self._send(source, destination, packet)
        elif cut is not Cut.SILENT and (told := refusals(packet)):
            self._write(source, told[0])
            self._write(destination, told[1])

    def _send(self, source: str, destination: str, packet: bytes) -> None:
        key = source, destination
        line = self._lines.get(key, CLEAR)
        if line.mtu is not None and len(packet) > line.mtu:
            self._write(source, too_big(packet, line.mtu, ROUTER))
            return
        now = at = time.monotonic()
        if line.bytes_per_s is not None:
            at = max(now, self._free_at[key])
            if at - now > _BACKLOG_S:
                return
            at = self._free_at[key] = at + len(packet) / line.bytes_per_s
        if self._happens(line.loss):
            return
        if self._happens(line.damage):
            packet = damaged(packet, self._chance.getrandbits(30), noticed=True)
        if self._happens(line.tamper):
            packet = damaged(packet, self._chance.getrandbits(30), noticed=False)
        if not self._happens(line.reorder):
            at += line.delay_s + line.jitter_s * self._chance.uniform(-1, 1)
            at = self._last_at[key] = max(at, self._last_at[key])
        for _ in range(1 + self._happens(line.duplicate)):
            heapq.heappush(self._flying, (at, next(self._order), source, destination, packet))

    def _happens(self, share: float) -> bool:
        return share > 0 and self._chance.random() < share

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._flying and self._flying[0][0] <= now:
            _, _, source, destination, packet = heapq.heappop(self._flying)
            # What was on its way when the line was cut, or a host moved, is lost.
            carried, cut = payload_bytes(packet), self._cuts.get((source, destination))
            if self._ends(packet) and (cut is None or (cut is Cut.HUNG_UP and not carried)):
                self._carried[source, destination] += carried
                self._write(destination, packet)

    def _write(self, host: str, packet: bytes) -> None:
        # A host that takes no more drops packets, as hosts do.
        with contextlib.suppress(OSError):
            os.write(self._devices[host], packet)
