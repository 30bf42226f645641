"""compose.yaml as it is, each party on a host of its own, and what goes wrong on real networks.

    make scenario

Needs root, the images (`make images`), and Docker with Compose. Where no Docker answers and the
program dockerd is there, one is started for the time being, in a network of its own. Prometheus is
Debian's where its image is not to be had. Takes some minutes; leaves nothing behind.

What happens, and must come out as said here, or the program ends with 1:

1. `up`, with nothing else: the federation is provisioned, a task created and trained to its end.
   Another `up` provisions nothing again; what Prometheus has scraped is what has happened.
2. Another task, of exact counts, over slow links, in one round: a client is cut off in the middle
   of its upload, another is killed in the middle of its own, the server is killed, and the key
   holder is stopped and started. Both uploads go on where they were, each counts once, and the sum
   is the recount of all ratings, integer for integer.
3. `down` and `up` again: the same federation, and both tasks are as they were.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RESULT = ROOT / "bench" / "results" / "scenario.json"
PROJECT = "secagg-scenario"
CLIENTS = ("client-1", "client-2", "client-3")
STARTED = ("keyholder", "server", *CLIENTS, "prometheus")
ROUNDS = 10
USERS, ITEMS, LIKED = 600, 1600, 60
RATE = "1mbit"
_PRIVATE = "SECAGG_SCENARIO_ENGINE"
_T = TypeVar("_T")

# Runs in the server's container: what its store knows of rounds and uploads, and which chunks
# are there.
PROBE = """
import json, pathlib, sqlite3
root = pathlib.Path("/var/lib/secagg")
store = sqlite3.connect(f"file:{root}/server.sqlite3?mode=ro", uri=True)
def rows(query):
    return [list(row) for row in store.execute(query)]
uploads = []
for task, number, attempt, client, state, digest in rows(
    "select task_id, round_number, attempt, client, state, upload_digest from uploads"
):
    folder = root / "uploads" / task / f"{number}-{attempt}" / digest.hex()
    chunks = {}
    for chunk in folder.glob("[0-9]*"):
        try:
            found = chunk.stat()
        except FileNotFoundError:
            continue
        chunks[chunk.name] = [found.st_ino, found.st_mtime_ns]
    uploads.append([task, number, attempt, client, state, digest.hex(), chunks])
print(json.dumps({
    "tasks": rows("select task_id, state, rounds_done from tasks"),
    "rounds": rows("select task_id, round_number, attempt, state, contributors from rounds"),
    "uploads": uploads,
    "events": rows("select event, details from audit order by sequence"),
}))
"""

# Runs in a client's container: whom it can reach.
REACH = """
import json, socket, sys
def reach(host, port):
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except OSError as error:
        return type(error).__name__
    return "reached"
print(json.dumps([reach(*address.rsplit(":", 1)) for address in sys.argv[1:]]))
"""

PLAN = """
import sqlite3, sys
from secagg.wire.codec import parse
from secagg.wire.v1 import operator_service_pb2
from secagg_server.tasks import TaskSpec
store = sqlite3.connect("file:/var/lib/secagg/server.sqlite3?mode=ro", uri=True)
(spec,) = store.execute("select spec from tasks where task_id = ?", sys.argv[1:2]).fetchone()
plan = TaskSpec.from_wire(parse(operator_service_pb2.TaskSpec, spec)).plan
print(plan.payload_bytes, plan.chunks)
"""


class ScenarioError(Exception):
    """Something did not come out as it must; says what was expected and what came."""


def expect(holds: bool, what: str) -> None:
    """Say what has been found; end the scenario where it is not so.

    Raises:
        ScenarioError: it does not hold.
    """
    if not holds:
        raise ScenarioError(f"expected: {what}")
    say(f"    ok: {what}")


_STARTED = time.monotonic()


def say(line: str) -> None:
    """Progress, on standard error, with the seconds since the start."""
    print(f"{time.monotonic() - _STARTED:5.0f} s {line}", file=sys.stderr, flush=True)


def wait_for(what: str, found: Callable[[], _T | None], seconds: float = 120.0) -> _T:
    """Ask until there is an answer.

    Raises:
        ScenarioError: there is none in so many seconds.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.CalledProcessError, OSError):
            if (answer := found()) is not None:
                return answer
        time.sleep(0.2)
    raise ScenarioError(f"expected within {seconds:g} s: {what}")


def call(command: Sequence[str], *, check: bool = True, **options: Any) -> str:  # noqa: ANN401
    """What a program prints.

    Raises:
        ScenarioError: it failed, and ``check``.
    """
    done: subprocess.CompletedProcess[str] = subprocess.run(  # noqa: S603
        list(command), capture_output=True, text=True, check=False, **options
    )
    if check and done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise ScenarioError(f"expected `{' '.join(command)[:300]}` to work; it said:\n{said}")
    return done.stdout


class Engine:
    """Docker and its Compose, for one project.

    Args:
        compose: command of Compose.
        variables: for the Compose files.
    """

    def __init__(self, compose: Sequence[str], variables: Mapping[str, str]) -> None:
        self._compose = [*compose, "--project-name", PROJECT]
        self._environment = {**os.environ, **variables}
        self.files: list[Path] = [DEPLOY / "compose.yaml", DEPLOY / "compose.monitoring.yaml"]

    def compose(self, *words: str, check: bool = True) -> str:
        """Run a command of Compose on the files."""
        files = [word for file in self.files for word in ("--file", str(file))]
        return call([*self._compose, *files, *words], check=check, env=self._environment)

    def docker(self, *words: str, **options: Any) -> str:  # noqa: ANN401
        """Run a command of Docker."""
        return call(["docker", *words], env=self._environment, **options)

    def container(self, service: str) -> str:
        """The id of a service's container, whether it runs or not."""
        labels = {"project": PROJECT, "service": service, "oneoff": "False"}
        filters = [f"--filter=label=com.docker.compose.{k}={v}" for k, v in labels.items()]
        (found,) = self.docker("ps", "--all", "--quiet", "--no-trunc", *filters).split()
        return found

    def inspect(self, service: str) -> dict[str, Any]:
        """What Docker knows of a service's container."""
        (found,) = json.loads(self.docker("inspect", self.container(service)))
        return dict(found)

    def process(self, service: str) -> int:
        """A service's process on this machine; 0 if it does not run."""
        return int(self.inspect(service)["State"]["Pid"])

    def python(self, service: str, program: str, *words: str) -> str:
        """What a Python program prints inside a service's container."""
        container = self.container(service)
        return self.docker("exec", "--interactive", container, "python", "-", *words, input=program)

    def in_network_of(self, service: str, *words: str) -> str:
        """Run a program of this machine on a service's network interfaces."""
        return call(["nsenter", "--net", f"--target={self.process(service)}", *words])

    def slow_down(self, service: str) -> None:
        """Limit what a service's container sends."""
        links = json.loads(self.in_network_of(service, "ip", "-json", "link"))
        for link in links:
            if link["ifname"] != "lo":
                shape = f"dev {link['ifname']} root tbf rate {RATE} burst 32kb latency 400ms"
                self.in_network_of(service, "tc", "qdisc", "replace", *shape.split())

    def sent_bytes(self, service: str) -> int:
        """What a service's container has sent on its present interfaces."""
        links = json.loads(self.in_network_of(service, "ip", "-json", "-statistics", "link"))
        return sum(each["stats64"]["tx"]["bytes"] for each in links if each["ifname"] != "lo")

    def address(self, service: str, network: str) -> str:
        """A container's IP address on one of the project's networks."""
        networks = self.inspect(service)["NetworkSettings"]["Networks"]
        return str(networks[f"{PROJECT}_{network}"]["IPAddress"])


class Store:
    """What the server's store says, at one moment."""

    def __init__(self, engine: Engine) -> None:
        self._said: dict[str, Any] = json.loads(engine.python("server", PROBE))

    def task(self, task: str) -> tuple[str, int] | None:
        """State, and rounds that are done."""
        found = [(state, done) for name, state, done in self._said["tasks"] if name == task]
        return found[0] if found else None

    def rounds(self, task: str) -> list[tuple[int, int, str, int]]:
        """Round, attempt, state and contributors of each attempt."""
        return [(n, a, state, c) for name, n, a, state, c in self._said["rounds"] if name == task]

    def uploads(self, task: str) -> dict[str, tuple[str, str, dict[str, tuple[int, int]]]]:
        """State, digest, and inode and time of each stored chunk, by client."""
        return {
            client: (state, digest, {name: tuple(file) for name, file in chunks.items()})
            for name, _, _, client, state, digest, chunks in self._said["uploads"]
            if name == task
        }

    def events(self, task: str, event: str) -> list[dict[str, Any]]:
        """The entries of the audit log of one kind."""
        found = [json.loads(details) for kind, details in self._said["events"] if kind == event]
        return [details for details in found if details.get("task") == task]


class Prometheus:
    """What a Prometheus has scraped; it listens on this machine's loopback."""

    def ask(self, query: str) -> dict[str, float]:
        """The values of an instant query, by job."""
        url = "http://127.0.0.1:9090/api/v1/query?" + urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(url, timeout=10) as answer:
            found = json.load(answer)["data"]["result"]
        return {each["metric"].get("job", ""): float(each["value"][1]) for each in found}

    def wait(self, query: str, expected: Mapping[str, float]) -> None:
        """Until the next scrapes have come.

        Raises:
            ScenarioError: they tell something else.
        """
        last: dict[str, float] = {}

        def told() -> bool | None:
            nonlocal last
            last = self.ask(query)
            return last == expected or None

        try:
            wait_for("", told, 60)
        except ScenarioError:
            raise ScenarioError(f"expected {query} to be {expected}; it is {last}") from None
        say(f"    ok: Prometheus: {query} = {list(expected.values())}")


def ratings(folder: Path) -> None:
    """Made-up ratings in MovieLens's format: every item has been liked by somebody."""
    rng = np.random.default_rng(20)
    lines = []
    for user in range(USERS):
        liked = rng.choice(ITEMS, LIKED, replace=False)
        liked[:3] = (3 * user + np.arange(3)) % ITEMS
        for place, item in enumerate(dict.fromkeys(liked.tolist())):
            lines.append(f"{user + 1},{item + 1},5,{1_000_000 + place}")
    (folder / "ratings.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def recount(folder: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How many users have both of two items, by a product of matrices, for all users together."""
    from secagg_recommender.interactions import split_leave_one_out
    from secagg_recommender.movielens import load_movielens

    split = split_leave_one_out(load_movielens(folder))
    likes = np.zeros((split.n_users, split.n_items), dtype=np.int64)
    likes[split.train_users, split.train_items] = 1
    counts = (likes.astype(np.float64).T @ likes.astype(np.float64)).astype(np.int64)
    return counts[np.triu_indices(split.n_items)]


# The parts of the scenario


def first_up(engine: Engine, prometheus: Prometheus) -> dict[str, Any]:
    """`up` with nothing else, to the end of its task; and once more."""
    say("1. up, with nothing else")
    started = time.monotonic()
    engine.compose("up", "--detach", *STARTED)
    up_s = time.monotonic() - started
    wait_for("the task finished", lambda: _finished(engine, "recommender"), 300)
    done_s = time.monotonic() - started
    for client in CLIENTS:
        wait_for(f"{client} ended with 0", lambda c=client: _ended(engine, c))  # type: ignore[misc]
    store = Store(engine)
    expected = [(n, 1, "DONE", 3) for n in range(1, ROUNDS + 1)]
    expect(store.rounds("recommender") == expected, f"{ROUNDS} rounds of 3 clients, all at once")
    _isolated(engine)
    say("   what Prometheus, another host, has scraped from both")
    prometheus.wait("secagg_ready", {"secagg-server": 1, "secagg-keyholder": 1})
    prometheus.wait("secagg_uploads_accepted_total", {"secagg-server": 3.0 * ROUNDS})
    prometheus.wait('secagg_rounds_total{outcome="DONE"}', {"secagg-server": ROUNDS})
    prometheus.wait('secagg_tasks{state="FINISHED"}', {"secagg-server": 1})
    prometheus.wait("sum by (job) (secagg_uploads_rejected_total)", {"secagg-server": 0})
    released = 'secagg_keyholder_releases_total{outcome="released"}'
    prometheus.wait(released, {"secagg-keyholder": ROUNDS})
    judged = 'secagg_keyholder_norms_judged_total{verdict="accepted"}'
    prometheus.wait(judged, {"secagg-keyholder": 3.0 * ROUNDS})
    payload, _ = _plan(engine, "recommender")
    received = {"secagg-server": 3.0 * ROUNDS * payload}
    prometheus.wait("secagg_uploads_received_bytes_total", received)
    prometheus.wait("secagg_enrolled_clients", {"secagg-server": 3, "secagg-keyholder": 3})
    page = _page()
    expect("recommender" in page, "the operator's page is on this machine's loopback")
    expect(not any(client in page for client in CLIENTS), "and names no client")
    say("   up once more")
    before = _authority(engine)
    engine.compose("up", "--detach", *STARTED)
    expect(_authority(engine) == before, "the authority and its list are those of before")
    expect(_finished(engine, "recommender") is True, "the task is the same, and finished")
    for client in CLIENTS:
        wait_for(f"{client} ended with 0", lambda c=client: _ended(engine, c))  # type: ignore[misc]
    return {"up_s": round(up_s, 1), "finished_s": round(done_s, 1), "rounds": ROUNDS}


def _finished(engine: Engine, task: str) -> bool | None:
    found = Store(engine).task(task)
    if found and found[0] == "FAILED":
        raise ScenarioError(f"expected the task {task} to finish; it failed")
    return True if found and found[0] == "FINISHED" else None


def _ended(engine: Engine, client: str) -> bool | None:
    state = engine.inspect(client)["State"]
    return True if state["Status"] == "exited" and state["ExitCode"] == 0 else None


def _page() -> str:
    pages = []
    for path in ("/", "/overview.json"):
        with urllib.request.urlopen(f"http://127.0.0.1:7403{path}", timeout=10) as answer:
            pages.append(answer.read().decode())
    return "".join(pages)


def _authority(engine: Engine) -> str:
    """Digests of what the authority has made, as a container of the authority sees them."""
    command = "cd /federation && sha256sum authority/* */*.pem clients/*/* | sort"
    shell = ["--entrypoint", "/bin/sh", "authority", "-c", command]
    return engine.compose("run", "--rm", "--no-deps", *shell)


def _plan(engine: Engine, task: str) -> tuple[int, int]:
    payload, chunks = engine.python("server", PLAN, task).split()
    return int(payload), int(chunks)


def _isolated(engine: Engine) -> None:
    say("   who reaches whom")
    holder, server = engine.address("keyholder", "keyholder"), engine.address("server", "keyholder")
    container = engine.compose(
        *("run", "--rm", "--no-deps", "--entrypoint", "python", "client-1", "-c", REACH),
        *("keyholder:7402", f"{holder}:7402", f"{server}:7400", "server:7403", "server:7400"),
    )
    name, address, around, plain, front = json.loads(container.splitlines()[-1])
    expect(name == "gaierror", "a client finds no key holder by its name")
    expect(address != "reached", f"nor by its address ({address})")
    expect(around != "reached", f"nor the server on the key holder's network ({around})")
    expect(plain != "reached", f"nor the server's plain HTTP ({plain})")
    expect(front == "reached", "a client reaches the server")
    (reached,) = json.loads(engine.python("server", REACH, "keyholder:7402"))
    expect(reached == "reached", "the server reaches the key holder")


COUNTS = {
    "SECAGG_CLIENT_TASK": "counts",
    "SECAGG_CLIENT_MODEL": "ease",
    "SECAGG_CLIENT_DATASET": "ml-100k",
}


def _counts_file(folder: Path) -> Path:
    """What to change for another task: another task file, and clients of it."""
    state = {"SECAGG_CLIENT_STATE_DIR": "/var/lib/secagg/counts"}
    services: dict[str, Any] = {
        "prepare": {"command": ["prepare", "/var/lib/secagg/counts"], "environment": COUNTS},
        "task": {"command": ["task", "create", "/var/lib/secagg/counts/task.toml"]},
    }
    services |= {client: {"environment": COUNTS | state} for client in CLIENTS}
    file = folder / "counts.json"
    file.write_text(json.dumps({"services": services}), encoding="utf-8")
    return file


def faults(engine: Engine, prometheus: Prometheus, data: Path, folder: Path) -> dict[str, Any]:
    """One round of exact counts, in which everything breaks that may."""
    say("2. a round of exact counts over slow links")
    engine.files.append(_counts_file(folder))
    engine.compose("up", "--detach", *STARTED)
    for client in CLIENTS:
        engine.slow_down(client)
    payload, chunks = _plan(engine, "counts")
    say(f"   {ITEMS} items: {payload / 1e6:.1f} MB and {chunks} chunks an upload, at {RATE}/s")
    figures: dict[str, Any] = {"upload_bytes": payload, "chunks": chunks, "rate": RATE}

    say("   client-2 is cut off")
    _receiving(engine, "client-2", 1, chunks - 2)
    network = f"{PROJECT}_clients"
    engine.docker("network", "disconnect", network, engine.container("client-2"))
    cut_at = time.monotonic()
    state, digest, kept = _settled(engine, "client-2")
    expect(state == "RECEIVING", f"its upload is announced and has {len(kept)} of {chunks} chunks")
    figures["cut_off"] = {"chunks_before": len(kept)}

    say("   the key holder is stopped")
    engine.compose("stop", "keyholder")
    left = engine.inspect("keyholder")["State"]["ExitCode"]
    expect(left == 0, "it ends with 0 at SIGTERM, in the middle of a round")

    say("   client-3 is killed")
    _receiving(engine, "client-3", 1, chunks - 2)
    os.kill(engine.process("client-3"), signal.SIGKILL)
    killed = Store(engine).uploads("counts")["client-3"]
    expect(0 < len(killed[2]) < chunks, f"its upload has {len(killed[2])} of {chunks} chunks")
    wait_for("client-3 started again", lambda: engine.process("client-3") or None)
    engine.slow_down("client-3")
    figures["killed"] = {"chunks_before": len(killed[2])}

    say("   the server is killed")
    accepted = sum(each[0] == "ACCEPTED" for each in Store(engine).uploads("counts").values())
    server = engine.process("server")
    os.kill(server, signal.SIGKILL)
    wait_for("the server runs again", lambda: _other(engine.process("server"), server))
    wait_for("and listens", lambda: _listens(engine))

    now = Store(engine).uploads("counts")["client-2"]
    expect(now == (state, digest, kept), "nothing has come from client-2 meanwhile")
    rounds = Store(engine).rounds("counts")
    expect(rounds == [(1, 1, "COLLECTING", 0)], "the round waits for it")
    engine.docker("network", "connect", "--alias=client-2", network, engine.container("client-2"))
    cut_s = time.monotonic() - cut_at
    engine.slow_down("client-2")
    sent = engine.sent_bytes("client-2")
    engine.compose("start", "keyholder")
    say(f"   client-2 is back, after {cut_s:.0f} s; so is the key holder")
    seen = _watch_to_the_end(engine)
    sent = max(seen["sent"]) - sent if seen["sent"] else 0
    expect(engine.inspect("client-2")["RestartCount"] == 0, "client-2 was never started again")
    figures["cut_off"]["seconds"] = round(cut_s, 1)
    _went_on("client-2", (digest, kept), seen["client-2"])
    _went_on("client-3", (killed[1], killed[2]), seen["client-3"])
    missing = payload * (chunks - len(kept)) / chunks
    if sent:
        figures["cut_off"]["sent_after_bytes"] = sent
        expect(sent < payload, f"client-2 sent {sent / 1e6:.1f} MB more, not {payload / 1e6:.1f}")
    figures["cut_off"]["missing_bytes"] = round(missing)
    expect(engine.inspect("client-3")["RestartCount"] == 1, "client-3 was, by its restart policy")

    store = Store(engine)
    expect(store.rounds("counts") == [(1, 1, "DONE", 3)], "one attempt, three contributors")
    for event in ("upload-announced", "upload-accepted"):
        told = [each["client"] for each in store.events("counts", event)]
        expect(len(told) == len(set(told)) == 3, f"audit log: {event} once for each client")
    figures["equal"] = _equals_recount(engine, data, folder)
    figures["contributors"] = 3
    say("   what Prometheus has scraped since the restarts")
    prometheus.wait("secagg_ready", {"secagg-server": 1, "secagg-keyholder": 1})
    prometheus.wait("secagg_uploads_accepted_total", {"secagg-server": 3.0 - accepted})
    prometheus.wait('secagg_rounds_total{outcome="DONE"}', {"secagg-server": 1})
    released = 'secagg_keyholder_releases_total{outcome="released"}'
    prometheus.wait(released, {"secagg-keyholder": 1})
    return figures


def _receiving(engine: Engine, client: str, least: int, most: int) -> None:
    """Wait until an upload is on its way: so many chunks are there, and more to come.

    Raises:
        ScenarioError: it was there whole before that was seen.
    """

    def found() -> bool | None:
        state, _, chunks = Store(engine).uploads("counts").get(client, ("", "", {}))
        if len(chunks) > most or state == "ACCEPTED":
            raise ScenarioError(f"expected to see {client} in the middle of its upload; too late")
        return (state == "RECEIVING" and len(chunks) >= least) or None

    wait_for(f"{client} uploads", found)


def _settled(engine: Engine, client: str) -> tuple[str, str, dict[str, tuple[int, int]]]:
    """What there is of an upload once two looks, two seconds apart, see the same."""
    last: list[Any] = [None]

    def found() -> Any:  # noqa: ANN401
        now = Store(engine).uploads("counts")[client]
        if now == last[0]:
            return now
        last[0] = now
        time.sleep(2)
        return None

    settled: tuple[str, str, dict[str, tuple[int, int]]] = wait_for(f"{client} is silent", found)
    return settled


def _other(process: int, before: int) -> int | None:
    return process if process not in (0, before) else None


def _listens(engine: Engine) -> bool | None:
    return json.loads(engine.python("server", REACH, "server:7400")) == ["reached"] or None


def _watch_to_the_end(engine: Engine) -> dict[str, list[Any]]:
    """What is seen of the uploads of client-2 and client-3 until the round is done."""
    seen: dict[str, list[Any]] = {"client-2": [], "client-3": [], "sent": []}

    def done() -> bool | None:
        store = Store(engine)
        for client, (_, digest, chunks) in store.uploads("counts").items():
            if client in seen and chunks:
                seen[client].append((digest, chunks))
        with contextlib.suppress(ScenarioError, KeyError):
            seen["sent"].append(engine.sent_bytes("client-2"))
        return _finished(engine, "counts")

    wait_for("the round is done", done, 300)
    return seen


def _went_on(client: str, before: tuple[str, dict[str, tuple[int, int]]], seen: list[Any]) -> None:
    digest, kept = before
    expect({each for each, _ in seen} == {digest}, f"{client} goes on with the same ciphertext")
    most = max(len(chunks) for _, chunks in seen)
    expect(most > len(kept), f"its missing chunks come: {most} were seen at once")
    # A file that is written again is another file.
    again = any(chunks[name] != kept[name] for _, chunks in seen for name in kept if name in chunks)
    expect(not again, f"the {len(kept)} that were there are not sent again")


def _equals_recount(engine: Engine, data: Path, folder: Path) -> bool:
    words = "secagg-server task sums counts 1 --output /tmp/sums.npz"
    shell = ("run", "--rm", "--no-deps", "--no-TTY", "--entrypoint", "/bin/sh", "operator", "-c")
    file = folder / "sums.npz"
    printed = engine.compose(*shell, f"{words} >/dev/null && base64 /tmp/sums.npz")
    file.write_bytes(base64.b64decode(printed))
    with np.load(file, allow_pickle=False) as sums:
        contributors, counts = int(sums["contributors"]), sums["gram"]
    expect(contributors == 3, "the sum is over three contributors")
    expected = recount(data)
    expect(
        np.array_equal(counts, expected),
        f"all {expected.size} sums are the recount in the clear ({int(expected.sum())} in all)",
    )
    return True


def again(engine: Engine) -> dict[str, Any]:
    """`down` and `up`."""
    say("3. down, and up again")
    before = _authority(engine)
    started = time.monotonic()
    engine.compose("down")
    down_s = time.monotonic() - started
    engine.files.pop()
    engine.compose("up", "--detach", *STARTED)
    expect(_authority(engine) == before, "the federation is the same")
    for task in ("recommender", "counts"):
        expect(_finished(engine, task) is True, f"the task {task} is as it was")
    return {"down_s": round(down_s, 1)}


# What it runs on


def _compose_command(given: str | None) -> list[str]:
    if given:
        return given.split()
    found = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)  # noqa: S607
    if found.returncode == 0:
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    raise ScenarioError(
        "expected Docker's Compose; neither `docker compose` nor docker-compose runs"
    )


def _answers() -> bool:
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0  # noqa: S607


@contextlib.contextmanager
def private_engine() -> Iterator[None]:
    """Docker's daemon for the time being, with a network and a data folder of its own.

    Raises:
        ScenarioError: it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="secagg-scenario-engine-") as folder:
        home = Path(folder)
        socket = f"unix://{home}/docker.sock"
        call(["ip", "link", "set", "lo", "up"])
        with (home / "log").open("w") as log:
            daemon = subprocess.Popen(  # noqa: S603
                [
                    *("dockerd", "--host", socket, "--pidfile", f"{home}/pid"),
                    *("--data-root", f"{home}/data", "--exec-root", f"{home}/exec"),
                ],
                stdout=log,
                stderr=log,
            )
        os.environ["DOCKER_HOST"] = socket
        try:
            wait_for("Docker's daemon answers", lambda: _answers() or None, 60)
            yield
        finally:
            daemon.terminate()
            daemon.wait(60)


def _enter_namespaces() -> None:
    """Start again in network and mount namespaces of our own; nothing outside of them changes."""
    script = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'
    os.environ[_PRIVATE] = "1"
    words = ["unshare", "--mount", "--net", "sh", "-c", script, "sh", sys.executable, *sys.argv]
    os.execvp("unshare", words)  # noqa: S606, S607


def _images(engine: Engine, version: str) -> None:
    """The images, from podman's store if Docker has none."""
    for name in ("server", "keyholder", "client"):
        image = f"localhost/secagg-{name}:{version}"
        if engine.docker("images", "--quiet", image).strip():
            continue
        say(f"   {image}: from podman's store")
        built = f"localhost/secagg-{name}:rehearsal"
        with tempfile.TemporaryDirectory(prefix="secagg-scenario-") as folder:
            archive = f"{folder}/image.tar"
            call(["podman", "save", "--quiet", "--output", archive, built])
            engine.docker("load", "--quiet", "--input", archive)
        engine.docker("tag", built, image)


def _prometheus(engine: Engine, folder: Path, version: str) -> dict[str, Any]:
    """What runs in the place of Prometheus's image, if that is not here; says so."""
    text = (DEPLOY / "compose.monitoring.yaml").read_text(encoding="utf-8")
    (image,) = re.findall(r"image: (\S+/prometheus:\S+)", text)
    if engine.docker("images", "--quiet", image).strip():
        return {"image": image, "stand_in": False}
    program = shutil.which("prometheus")
    if program is None:
        raise ScenarioError(f"expected {image}, or the program prometheus (Debian has it)")
    home = folder / "prometheus"
    home.mkdir()
    shutil.copy(program, home / "prometheus")
    (home / "Dockerfile").write_text(
        f"FROM localhost/secagg-server:{version}\n"
        "USER 0\nRUN install -d -o 65534 -g 65534 /prometheus\n"
        "COPY prometheus /bin/prometheus\nHEALTHCHECK NONE\n"
        'ENTRYPOINT ["/bin/prometheus"]\n'
        'CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]\n',
        encoding="utf-8",
    )
    stand_in = "localhost/secagg-scenario-prometheus:debian"
    engine.docker("build", "--quiet", "--tag", stand_in, str(home))
    file = folder / "prometheus.json"
    service = {"image": stand_in, "tmpfs": ["/var/lib/secagg"]}
    file.write_text(json.dumps({"services": {"prometheus": service}}), encoding="utf-8")
    engine.files.append(file)
    first = call([program, "--version"]).splitlines()[0]
    return {"image": image, "stand_in": " ".join(first.split()[:3])}


def _run(engine: Engine, data: Path, folder: Path) -> dict[str, Any]:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    _images(engine, version)
    watcher = _prometheus(engine, folder, version)
    prometheus = Prometheus()
    figures: dict[str, Any] = {
        "version": version,
        "engine": "Docker " + engine.docker("version", "--format", "{{.Server.Version}}").strip(),
        "compose": engine.compose("version", "--short").strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "prometheus": watcher,
        "first_up": first_up(engine, prometheus),
        "faults": faults(engine, prometheus, data, folder),
        "again": again(engine),
    }
    return figures


def main() -> int:
    """Run all of it; 0 if everything came out as it must."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compose", help="command of Docker's Compose; else docker compose")
    parser.add_argument("--output", type=Path, default=RESULT, help="file for the figures")
    parser.add_argument("--keep", action="store_true", help="leave all of it for a look")
    options = parser.parse_args()
    private = bool(os.environ.get(_PRIVATE))
    if not private and not _answers():
        if os.geteuid() or shutil.which("dockerd") is None:
            say("expected Docker to answer, or root and the program dockerd; neither is so")
            return 1
        _enter_namespaces()
    with contextlib.ExitStack() as stack:
        if private:
            stack.enter_context(private_engine())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="secagg-scenario-")))
        data = folder / "data"
        data.mkdir()
        folder.chmod(0o755)
        ratings(data)
        variables = {"SECAGG_DATA": str(data)}
        engine = Engine(_compose_command(options.compose), variables)
        started = time.monotonic()
        try:
            figures = _run(engine, data, folder)
        except ScenarioError as error:
            say(str(error))
            say(engine.compose("logs", "--no-color", "--tail=15", check=False)[-6000:])
            return 1
        finally:
            if not options.keep:
                say("   cleaning up")
                engine.compose("down", "--volumes", "--timeout=20", check=False)
    figures["seconds"] = round(time.monotonic() - started)
    options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    say(f"all as it must be, in {figures['seconds']} s; {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
