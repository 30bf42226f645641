"""Hosts on one machine: a network namespace each, with one device, whose packets a `Wire` carries.

Nothing has a name outside of this process: a namespace lives as long as somebody has it open, a
device as long as its namespace, and a program is killed when the process that started it ends.
However that ends, nothing is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from secagg_bench.network.wire import CLEAR, Cut, Line, Wire
from secagg_bench.processes import Program

__all__ = ["Host", "Hosts", "unable"]

_NEWNET = 0x40000000
_TUNSETIFF, _TUN, _NO_PI = 0x400454CA, 0x0001, 0x1000
_TUN_DEVICE = Path("/dev/net/tun")
_NETWORK = "10.77"
_PROGRAMS = ("ip", "nsenter", "setpriv", "sh")
_CHUNK_BYTES = 65_536
_JOIN_S = 5.0
# Nothing kills a program whose owner ended before the kernel was asked to: it sees so itself.
_OF_ITS_OWNER = '[ "$PPID" = "$0" ] && exec "$@"'
_T = TypeVar("_T")
_libc = ctypes.CDLL(None, use_errno=True)


def unable() -> str:
    """Why there can be no hosts here; empty if there can be."""
    if not hasattr(os, "geteuid") or os.geteuid():
        return "hosts of their own need root"
    for program in _PROGRAMS:
        if shutil.which(program) is None:
            return f"hosts of their own need the program {program}"
    try:
        with Hosts("one"):
            return ""
    except OSError as error:
        return f"hosts of their own need network namespaces and TUN devices: {error.strerror}"


def _in_thread(work: Callable[[], _T]) -> _T:
    """Do something that changes the namespace of the thread it runs in."""
    result: list[_T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def _checked(status: int) -> None:
    if status:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)  # noqa: S603, S607
    if done.returncode:
        raise OSError(0, f"`ip` failed: {done.stderr.strip()}")


class Host:
    """One host.

    Attributes:
        name: what it is called here.
        address: its IPv4 address; another one after it has moved.
    """

    def __init__(self, name: str, number: int, wire: Wire) -> None:
        self.name = name
        self.address = f"{_NETWORK}.0.{number}"
        self._number = number
        self._wire = wire
        self._moves = 0
        self._namespace, self._device = _in_thread(self._made)
        wire.attach(name, self._device, self.address)

    def _made(self) -> tuple[int, int]:
        """A namespace of its own with a device, by their descriptors."""
        _checked(_libc.unshare(_NEWNET))
        namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        device = os.open(_TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"wire", _TUN | _NO_PI))
        _ip("link", "set", "lo", "up")
        _ip("address", "add", f"{self.address}/16", "dev", "wire")
        _ip("link", "set", "wire", "up")
        return namespace, device

    def close(self) -> None:
        """Let the namespace go; it is gone once its programs are."""
        os.close(self._device)
        os.close(self._namespace)

    def inside(self, work: Callable[[], _T]) -> _T:
        """Do something on this host; a socket that is made there remains there."""

        def entered() -> _T:
            _checked(_libc.setns(self._namespace, _NEWNET))
            return work()

        return _in_thread(entered)

    @property
    def within(self) -> tuple[str, ...]:
        """In front of a command, what runs it on this host, as a child of this process.

        For a thread that outlives it: the command is killed when its parent ends.
        """
        owner = os.getpid()
        enter = ("nsenter", f"--net=/proc/{owner}/fd/{self._namespace}")
        return (*enter, "setpriv", "--pdeathsig", "KILL", "sh", "-c", _OF_ITS_OWNER, f"{owner}")

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> Program:
        """Start a program on this host; to be called in a thread that outlives it."""
        return Program(module, arguments, log, environment, within=self.within)

    def move(self) -> None:
        """Change the address, as a device does that changes its network."""
        old, self._moves = self.address, self._moves + 1
        self.address = f"{_NETWORK}.{self._moves}.{self._number}"

        def change() -> None:
            _ip("address", "del", f"{old}/16", "dev", "wire")
            _ip("address", "add", f"{self.address}/16", "dev", "wire")

        self.inside(change)
        self._wire.move(old, self.address)

    def connected(self, address: str) -> socket.socket:
        """A connection from this host to an address that it can reach."""
        host, _, port = address.rpartition(":")
        return self.inside(lambda: socket.create_connection((host, int(port))))


class Hosts:
    """All hosts, and the wire between them.

    Args:
        names: of the hosts.
        seed: of what happens on the wire.

    Raises:
        OSError: this machine, or this user, can have none.
    """

    def __init__(self, *names: str, seed: int = 0) -> None:
        self.wire = Wire(seed)
        self._hosts: dict[str, Host] = {}
        try:
            for number, name in enumerate(names, 1):
                self._hosts[name] = Host(name, number, self.wire)
        except BaseException:
            self._close()
            raise
        self.wire.start()

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        self.wire.close()
        for host in self._hosts.values():
            host.close()

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def degrade(self, one: str, other: str, line: Line, back: Line | None = None) -> None:
        """What the lines between two hosts do from now on: the same in both directions, or not."""
        self.wire.set_line(one, other, line)
        self.wire.set_line(other, one, line if back is None else back)

    def cut(
        self, one: str, other: str, how: Cut = Cut.SILENT, *, answers_only: bool = False
    ) -> None:
        """Cut two hosts off from one another.

        Args:
            answers_only: what ``one`` sends still arrives.
        """
        if not answers_only:
            self.wire.cut(one, other, how)
        self.wire.cut(other, one, how)

    def heal(self, one: str, other: str) -> None:
        """Let everything pass between two hosts; lines that are bad remain so."""
        self.wire.cut(one, other, None)
        self.wire.cut(other, one, None)

    def clear(self) -> None:
        """Lines without any fault, everywhere."""
        for one in self._hosts:
            for other in self._hosts:
                self.wire.cut(one, other, None)
                self.wire.set_line(one, other, CLEAR)

    @contextlib.contextmanager
    def entrance(self, name: str, port: int) -> Iterator[str]:
        """An address on this machine's loopback that leads to a port of a host."""
        threads: list[threading.Thread] = []

        def begin(work: Callable[..., None], *arguments: object) -> None:
            threads.append(threading.Thread(target=work, args=arguments, daemon=True))
            threads[-1].start()

        def accept(listener: socket.socket) -> None:
            address = f"{self[name].address}:{port}"
            with contextlib.suppress(OSError):  # closed
                while True:
                    outer, _ = listener.accept()
                    begin(_join, outer, self[name].connected(address))

        with socket.create_server(("127.0.0.1", 0)) as listener:
            begin(accept, listener)
            try:
                yield f"127.0.0.1:{listener.getsockname()[1]}"
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                for thread in threads:
                    thread.join(_JOIN_S)


def _join(one: socket.socket, other: socket.socket) -> None:
    """Pass on what comes on either side until one ends."""
    with one, other:
        back = threading.Thread(target=_pump, args=(other, one), daemon=True)
        back.start()
        _pump(one, other)
        back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK_BYTES):
            sink.sendall(data)
    for each in (source, sink):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
