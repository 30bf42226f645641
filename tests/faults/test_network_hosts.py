"""Hosts and the wire between them do what they say, and nothing of them stays behind."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from secagg_bench.network.hosts import Hosts, unable
from secagg_bench.network.packets import damaged, payload_bytes, refusals, too_big
from secagg_bench.network.wire import Cut, Line, Wire

PORT = 7000
PATIENCE_S = 20.0
WORDS = bytes(range(256)) * 8

needs_hosts = pytest.mark.skipif(bool(why := unable()), reason=why)


def folded(data: bytes) -> int:
    """The Internet checksum's own check: 0xFFFF over data that holds the right one."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data + bytes(len(data) % 2)))
    return total % 0xFFFF or 0xFFFF


def segment(payload: bytes, flags: int = 0x18, sequence: int = 1000) -> bytes:
    """A TCP packet from 10.77.0.1:1 to 10.77.0.2:2, with an answer's header as a template."""
    ends = socket.inet_aton("10.77.0.1") + socket.inet_aton("10.77.0.2")
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 40 + len(payload), 0, 0, 64, 6, 0) + ends
    return ip + struct.pack("!HHIIBBHHH", 1, 2, sequence, 77, 5 << 4, flags, 0, 0, 0) + payload


def sound(packet: bytes) -> bool:
    """Whether a TCP packet's checksum is right."""
    pseudo = packet[12:20] + struct.pack("!BBH", 0, 6, len(packet) - 20)
    body = pseudo + packet[20:]
    return folded(body + bytes(len(body) % 2)) == 0xFFFF


@pytest.mark.parametrize("payload", [b"even", b"odd"])
def test_damage_is_one_bit_and_is_noticed_or_not_as_asked(payload: bytes) -> None:
    right = damaged(damaged(segment(payload), 5, noticed=False), 5, noticed=False)
    assert sound(right)
    assert right[40:] == payload
    for noticed in (True, False):
        wrong = damaged(right, 11, noticed=noticed)
        assert sound(wrong) is not noticed
        differing = [a ^ b for a, b in zip(wrong[40:], payload, strict=True)]
        assert sorted(differing)[-1] == 1 << 3
        assert sum(map(bool, differing)) == 1
    assert damaged(segment(b""), 3, noticed=True) == segment(b"")


def test_a_refusal_ends_the_connection_for_both_sides() -> None:
    told = refusals(segment(b"12345"))
    assert told is not None
    back, on = told
    assert (back[12:20], on[12:20]) == (
        segment(b"")[16:20] + segment(b"")[12:16],
        back[16:20] + back[12:16],
    )
    assert sound(back)
    assert sound(on)
    assert struct.unpack_from("!HHII", back, 20) == (2, 1, 77, 0)  # what the sender waits for
    assert struct.unpack_from("!HHI", on, 20) == (1, 2, 1000)  # what the receiver waits for
    first = refusals(segment(b"", flags=2))
    assert first is not None
    assert struct.unpack_from("!II", first[0], 24) == (0, 1001)
    assert refusals(on) is None, "a reset must not be answered by another, for ever"


def test_a_router_says_how_long_a_packet_may_be() -> None:
    answer = too_big(segment(bytes(1000)), 576, "10.77.0.254")
    assert answer[20:22] == b"\x03\x04"
    assert struct.unpack_from("!H", answer, 26) == (576,)
    assert folded(answer[20:]) == 0xFFFF
    assert answer[28:] == segment(bytes(1000))[:28]
    assert payload_bytes(answer) == 0


@contextlib.contextmanager
def wired(**lines: Line) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two hosts by their devices, without any kernel's network between them; root is not needed.

    Args:
        lines: ``out`` from the first to the second, ``back`` from the second to the first.
    """
    with contextlib.ExitStack() as stack:
        wire = Wire(seed=1)
        ends = []
        for number, name in enumerate(("one", "two"), 1):
            device, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(device)
            ends.append(stack.enter_context(end))
            end.settimeout(PATIENCE_S)
            wire.attach(name, device.fileno(), f"10.77.0.{number}")
        wire.set_line("one", "two", lines.get("out", Line()))
        wire.set_line("two", "one", lines.get("back", Line()))
        wire.start()
        stack.callback(wire.close)
        yield ends[0], ends[1]


def test_a_line_carries_no_more_than_its_rate() -> None:
    packet, count, rate = segment(bytes(460)), 40, 50_000.0
    assert len(packet) == 500
    with wired(out=Line(bytes_per_s=rate, delay_s=0.05)) as (one, two):
        started = time.monotonic()
        for _ in range(count):
            one.send(packet)
        for number in range(1, count + 1):
            assert two.recv(1000) == packet
            took = time.monotonic() - started
            assert took >= number * len(packet) / rate + 0.05 - 1e-3, number


def test_each_direction_of_a_line_has_its_own_rate() -> None:
    packet = segment(bytes(460))
    answer = packet[:12] + packet[16:20] + packet[12:16] + packet[20:]
    with wired(out=Line(bytes_per_s=50.0), back=Line(bytes_per_s=5e6)) as (one, two):
        one.send(packet)
        two.send(answer)
        assert one.recv(1000) == answer
        assert not select.select([two], [], [], 0)[0], "ten seconds are not over"


def test_a_line_drops_what_would_wait_for_more_than_a_second() -> None:
    with wired(out=Line(bytes_per_s=50_000.0)) as (one, two):
        for _ in range(300):
            one.send(segment(bytes(460)))
        came = [two.recv(1000)]
        two.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            while True:
                came.append(two.recv(1000))
    # A packet takes a hundredth of a second; some leave while others still come.
    assert 100 <= len(came) <= 150


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts("here", "there", seed=7) as two:
        yield two


@contextlib.contextmanager
def listening(hosts: Hosts) -> Iterator[None]:
    """A listener on one host that says what it heard once the other has said everything."""
    address = (hosts["there"].address, PORT)
    listener = hosts["there"].inside(lambda: socket.create_server(address))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=echo, args=(connection,), daemon=True).start()

    def echo(connection: socket.socket) -> None:
        heard = b""
        with contextlib.suppress(OSError), connection:
            while data := connection.recv(65_536):
                heard += data
            connection.sendall(heard)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def call(hosts: Hosts) -> socket.socket:
    connection = hosts["here"].connected(f"{hosts['there'].address}:{PORT}")
    connection.settimeout(PATIENCE_S)
    return connection


def heard(connection: socket.socket, said: bytes) -> bytes:
    """What comes back."""
    connection.sendall(said)
    connection.shutdown(socket.SHUT_WR)
    answer = b""
    while data := connection.recv(65_536):
        answer += data
    return answer


@needs_hosts
@pytest.mark.parametrize(
    "line",
    [
        Line(),
        Line(loss=0.1, delay_s=0.002),
        Line(duplicate=0.3, reorder=0.3, delay_s=0.002, jitter_s=0.001),
        Line(damage=0.1, delay_s=0.002),
        Line(mtu=600),
    ],
)
def test_what_tcp_is_made_for_changes_no_byte(hosts: Hosts, line: Line) -> None:
    hosts.clear()
    hosts.degrade("here", "there", line)
    with listening(hosts), call(hosts) as connection:
        assert heard(connection, WORDS * 50) == WORDS * 50
    hosts.clear()


@needs_hosts
def test_damage_that_tcp_does_not_notice_arrives(hosts: Hosts) -> None:
    hosts.degrade("here", "there", Line(tamper=1.0), Line())
    with listening(hosts), call(hosts) as connection:
        answer = heard(connection, WORDS)
    hosts.clear()
    differing = [a ^ b for a, b in zip(answer, WORDS, strict=True) if a != b]
    assert differing
    assert all(bits.bit_count() == 1 for bits in differing)


@needs_hosts
def test_a_slow_line_is_slow(hosts: Hosts) -> None:
    hosts.degrade("here", "there", Line(bytes_per_s=200_000), Line())
    started = time.monotonic()
    with listening(hosts), call(hosts) as connection:
        assert heard(connection, bytes(100_000)) == bytes(100_000)
    hosts.clear()
    assert time.monotonic() - started > 0.5, "it is never faster than its rate"


@needs_hosts
def test_a_silent_cut_delays_and_a_refusing_one_ends(hosts: Hosts) -> None:
    with listening(hosts), call(hosts) as connection:
        hosts.cut("here", "there")
        before = hosts.wire.carried("here", "there")
        healed = threading.Timer(0.3, hosts.heal, ("here", "there"))
        healed.start()
        assert heard(connection, WORDS) == WORDS
        assert hosts.wire.carried("here", "there") - before >= len(WORDS)
        healed.join()
    with listening(hosts), call(hosts) as connection:
        hosts.cut("here", "there", Cut.REFUSED)
        connection.sendall(WORDS)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        with pytest.raises(ConnectionRefusedError):
            call(hosts)
        hosts.heal("here", "there")


@needs_hosts
def test_requests_may_arrive_although_no_answer_does(hosts: Hosts) -> None:
    with listening(hosts), call(hosts) as connection:
        hosts.cut("here", "there", answers_only=True)
        before = hosts.wire.carried("here", "there"), hosts.wire.carried("there", "here")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            heard(connection, b"hello")
        after = hosts.wire.carried("here", "there"), hosts.wire.carried("there", "here")
        assert after[0] - before[0] >= 5
        assert after[1] == before[1]
        hosts.heal("here", "there")


@needs_hosts
def test_a_host_that_moves_is_found_at_its_new_address_only(hosts: Hosts) -> None:
    with listening(hosts), call(hosts) as connection:
        old = connection.getsockname()[0]
        hosts["here"].move()
        before = hosts.wire.carried("here", "there")
        connection.settimeout(0.3)
        with contextlib.suppress(OSError):
            heard(connection, WORDS)
        assert hosts.wire.carried("here", "there") == before, "the old address still works"
        with call(hosts) as again:
            assert again.getsockname()[0] == hosts["here"].address != old
            assert heard(again, WORDS) == WORDS


# Starts a program on a host, says which, and stays.
OWNER = """
import sys, time
from pathlib import Path
from secagg_bench.network.hosts import Hosts
with Hosts("one") as hosts:
    program = hosts["one"].run("http.server", ["--bind", "127.0.0.1", "0"], Path(sys.argv[1]))
    print(program.process.pid, flush=True)
    time.sleep(600)
"""


def devices() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def namespace(process: int | str) -> str:
    return str(Path(f"/proc/{process}/ns/net").readlink())


@needs_hosts
def test_nothing_stays_of_an_owner_that_is_killed(tmp_path: Path) -> None:
    before = devices(), namespace(os.getpid())
    command = [sys.executable, "-c", OWNER, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        program = int(owner.stdout.readline())
        gone = os.pidfd_open(program)
        give_up_at = time.monotonic() + PATIENCE_S
        while (own := namespace(program)) == before[1] and time.monotonic() < give_up_at:
            os.sched_yield()
        changed = devices(), namespace(os.getpid())
        owner.send_signal(signal.SIGKILL)
    assert own != before[1]
    assert changed == before, "hosts change nothing outside"
    assert select.select([gone], [], [], PATIENCE_S)[0], "the program outlives its owner"
    os.close(gone)
    assert own not in set(every_namespace())


def every_namespace() -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield namespace(process.name)


@needs_hosts
def test_a_program_whose_owner_ended_before_it_began_does_not_begin(hosts: Hosts) -> None:
    # An orphan has another parent, and nothing to kill it. A shell stands in for that parent here.
    command = [*hosts["here"].within, "echo", "begun"]
    child = subprocess.run(command, capture_output=True, text=True)
    orphan = subprocess.run(
        ["sh", "-c", '"$@"; exit $?', "", *command], capture_output=True, text=True
    )
    assert (child.stdout, orphan.stdout) == ("begun\n", "")
    assert orphan.returncode
