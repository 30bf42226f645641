"""Runs the images as who trusts nobody would: nothing to write to, no privilege, no network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from deploy.rehearsal import IMAGES, RehearsalError, image, say
from deploy.rehearsal.engine import inspect, podman

__all__ = ["Federation", "federation", "helps", "startup"]

ACCOUNT = 10001
LOCKED = (
    *("--read-only", "--read-only-tmpfs=false", "--cap-drop", "all"),
    *("--security-opt", "no-new-privileges"),
)
SCRATCH = ("--tmpfs", "/tmp:rw,noexec,nosuid,nodev,size=16m")  # noqa: S108 - in the container
STOP_S = 30.0
_READY_S = 240.0
_POLL_S = 0.2
_TASK = "rehearsal"

# What a program takes, seen from beside it: seconds by the clock, and of the processor.
_STOPWATCH = """
import json, resource, subprocess, sys, time
taken = []
for _ in range(int(sys.argv[1])):
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(sys.argv[2:], capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    taken.append((time.monotonic() - started, cpu, done.returncode))
taken.sort()
wall, cpu, code = taken[len(taken) // 2]
print(json.dumps({"wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "exit_code": code}))
"""
_WITHOUT_BYTECODE = "find /opt/secagg -name '*.pyc' -delete; exec \"$@\""


def helps(target: str) -> None:
    """``--help`` of the image's program and of ``secagg``, on nothing that can be written to.

    Raises:
        RehearsalError: one does not work so.
    """
    for program in (f"secagg-{target}", "secagg"):
        words = ("--network", "none", *LOCKED, "--entrypoint", program, image(target), "--help")
        said = podman("run", "--rm", *words).stdout
        if "Usage:" not in said:
            raise RehearsalError(f"expected `{program} --help` to explain itself; it said {said!r}")
    alone = podman("run", "--rm", "--network", "none", *LOCKED, image(target), "--version").stdout
    if not alone.startswith("secagg "):
        raise RehearsalError(f"expected ENTRYPOINT to be secagg-{target}; it said {alone!r}")


def startup(target: str) -> dict[str, Any]:
    """What ``--help`` takes, with the bytecode that is in the image and without."""
    command = ("python", "-c", _STOPWATCH, "5", f"secagg-{target}", "--help")
    warm = podman(
        *("run", "--rm", "--network", "none", *LOCKED, "--entrypoint", command[0]),
        *(image(target), *command[1:]),
    )
    bare = podman(
        *("run", "--rm", "--network", "none", "--user", "0", "--entrypoint", "sh", image(target)),
        *("-c", _WITHOUT_BYTECODE, "sh", *command[:3], "3", *command[4:]),
    )
    return {"help": json.loads(warm.stdout), "help_without_bytecode": json.loads(bare.stdout)}


@dataclass
class Federation:
    """Running containers that share one network namespace with nothing in it but its loopback.

    Attributes:
        folder: kits and state, below.
        prefix: of the containers' names.
        figures: what was measured on the way.
    """

    folder: Path
    prefix: str
    figures: dict[str, Any] = field(default_factory=dict)

    def run(self, target: str, *words: str | Path, program: str | None = None) -> str:
        """Run a command in an image to its end, with the whole folder at hand; what it printed."""
        network = self._network()
        return podman(
            *("run", "--rm", "--network", network, *LOCKED, *SCRATCH),
            *("--volume", f"{self.folder}:/work", "--workdir", "/work"),
            *(["--entrypoint", program] if program else []),
            *("--env", "SECAGG_CLIENT_DATASET=marketplace", "--env", "SECAGG_CLIENT_SILOS=3"),
            *("--env", "SECAGG_OPERATOR_KIT=/work/federation/operators/admin"),
            *(image(target), *words),
        ).stdout

    def start(
        self, name: str, target: str, kit: str, *options: str, words: tuple[str, ...] = ()
    ) -> None:
        """Start a container with its kit, its state, and nothing else."""
        state = self.folder / "state" / name
        if not state.exists():
            state.mkdir(parents=True, mode=0o700)
            os.chown(state, ACCOUNT, ACCOUNT)
        podman(
            *("run", "--detach", "--name", f"{self.prefix}-{name}", "--network", self._network()),
            *(*LOCKED, *SCRATCH, "--volume", f"{state}:/var/lib/secagg"),
            *("--volume", f"{self.folder}/federation/{kit}:/run/secagg/kit:ro"),
            *(*options, image(target), *words),
        )

    def _network(self) -> str:
        """The first container's; alone until there is one."""
        first = f"{self.prefix}-keyholder"
        there = podman("container", "exists", first, check=False).returncode == 0
        return f"container:{first}" if there else "none"

    def healthy(self, name: str) -> float:
        """Wait until the image's own HEALTHCHECK says so; seconds it took."""
        started = time.monotonic()
        until(
            lambda: (
                podman("healthcheck", "run", f"{self.prefix}-{name}", check=False).returncode == 0
            ),
            _READY_S,
            f"{name} to become healthy",
            lambda: self.log(name),
        )
        return time.monotonic() - started

    def log(self, name: str) -> str:
        """The end of what a container has said."""
        done = podman("logs", "--tail", "15", f"{self.prefix}-{name}", check=False)
        return done.stdout + done.stderr

    def processes(self, name: str) -> list[dict[str, str]]:
        """``/proc/PID/status`` of every process in a container's process namespace."""
        first = inspect("container", f"{self.prefix}-{name}")["State"]["Pid"]
        return _in_namespace((Path("/proc") / str(first) / "ns" / "pid").readlink())

    def stop(self, name: str, expected: tuple[int, ...] = (0,)) -> float:
        """Send SIGTERM to PID 1 and wait; seconds it took.

        Raises:
            RehearsalError: it had to be killed, ended with another code, or left processes behind.
        """
        full = f"{self.prefix}-{name}"
        first = inspect("container", full)["State"]["Pid"]
        namespace = (Path("/proc") / str(first) / "ns" / "pid").readlink()
        started = time.monotonic()
        podman("stop", "--time", str(int(STOP_S)), full)
        taken = time.monotonic() - started
        code = inspect("container", full)["State"]["ExitCode"]
        if code not in expected:
            raise RehearsalError(
                f"expected {name} to end with {' or '.join(map(str, expected))} on SIGTERM; got "
                f"{code} after {taken:.1f} s:\n{self.log(name)}"
            )
        if left := _in_namespace(namespace):
            raise RehearsalError(f"expected no process of {name} to be left; {left[0]['Name']} is")
        return taken

    def written(self, name: str) -> list[str]:
        """What a container has changed in its image; mounts do not count."""
        mounts = ("/tmp", "/run", "/etc", "/proc", "/sys", "/dev", "/var/lib/secagg")  # noqa: S108
        lines = podman("diff", f"{self.prefix}-{name}").stdout.splitlines()
        paths = [line.split(maxsplit=1)[1] for line in lines]
        return [
            path
            for path in paths
            if not path.startswith(mounts) and path not in ("/var", "/var/lib")
        ]

    def remove(self) -> None:
        """Remove every container, the one whose network the others share at last."""
        listed = podman("ps", "--all", "--format", "{{.Names}}").stdout.split()
        ours = [name for name in listed if name.startswith(self.prefix)]
        for name in sorted(ours, key=lambda name: name.endswith("-keyholder")):
            podman("rm", "--force", "--time", "0", "--volumes", name, check=False)


def until(
    done: Callable[[], bool], limit_s: float, what: str, log: Callable[[], str] = lambda: ""
) -> None:
    """Poll until something is so.

    Raises:
        RehearsalError: it is not so in time.
    """
    end = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > end:
            raise RehearsalError(f"expected {what} within {limit_s:g} s; it did not\n{log()}")
        time.sleep(_POLL_S)


def _in_namespace(namespace: Path) -> list[dict[str, str]]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "ns" / "pid").readlink() == namespace:
                lines = (folder / "status").read_text(encoding="utf-8").splitlines()
                found.append(
                    {key: value.strip() for key, _, value in (x.partition(":") for x in lines)}
                )
        except OSError:
            continue  # it has ended meanwhile
    return found


def locked_down(status: dict[str, str]) -> list[str]:
    """What a process of a container has and should not have, of its ``/proc/PID/status``."""
    found = []
    if set(status["Uid"].split()) | set(status["Gid"].split()) != {str(ACCOUNT)}:
        found.append(f"runs as {status['Uid'].split()} in {status['Gid'].split()}")
    if status.get("Groups", ""):
        found += [
            f"is in group {group}" for group in status["Groups"].split() if group != str(ACCOUNT)
        ]
    for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        if int(status[key], 16):
            found.append(f"has capabilities, {key} {status[key]}")
    if status["NoNewPrivs"] != "1":
        found.append("may gain privileges")
    if status["State"].startswith("Z"):
        found.append("is dead, and nobody takes notice")
    return found


@contextmanager
def federation() -> Iterator[Federation]:
    """A folder with kits, and containers to come; all are removed in the end."""
    folder = Path(tempfile.mkdtemp(prefix="secagg-rehearsal-"))
    found = Federation(folder, folder.name)
    os.chown(folder, ACCOUNT, ACCOUNT)
    try:
        yield found
    finally:
        found.remove()
        shutil.rmtree(folder, ignore_errors=True)


def rehearse(found: Federation) -> dict[str, Any]:
    """Provision, start, work, look at every process, and stop each in the middle of it.

    Returns:
        Figures: seconds and megabytes.

    Raises:
        RehearsalError: something is not as it should be.
    """
    figures: dict[str, Any] = {}
    say("federation: provision, with the server's image")
    found.run("server", "provision", "init", "federation", "--clients", "3", program="secagg")
    passphrase = found.folder / "federation/custodians/passphrase"
    say("federation: start the key holder and the server")
    found.start(
        *("keyholder", "keyholder", "keyholder"),
        *("--volume", f"{passphrase}:/run/secagg/passphrase:ro"),
        *("--env", "SECAGG_KEYHOLDER_PASSPHRASE_FILE=/run/secagg/passphrase"),
    )
    figures["keyholder_healthy_s"] = round(found.healthy("keyholder"), 1)
    found.start("server", "server", "server")
    figures["server_healthy_s"] = round(found.healthy("server"), 1)
    for name in ("server", "keyholder"):
        figures[f"{name}_health"] = _health(found, name)
        figures[f"{name}_idle_mb"] = _megabytes(found.processes(name))
    say("federation: a task, and three clients that train")
    found.run("client", "prepare", "prepared", "--task", _TASK, "--rounds", "500")
    found.run(
        *("server", "task", "create", "prepared/task.toml", "--model", "prepared/initial.npz")
    )
    for number in (1, 2, 3):
        found.start(
            *(f"client-{number}", "client", f"clients/client-{number}"),
            *("--env", "SECAGG_CLIENT_DATASET=marketplace", "--env", "SECAGG_CLIENT_SILOS=3"),
            *("--env", f"SECAGG_CLIENT_SILO={number - 1}", "--env", f"SECAGG_CLIENT_TASK={_TASK}"),
        )
    until(
        lambda: _rounds(found) >= 2, 180, "two rounds to be summed", lambda: found.log("client-1")
    )
    names = ("client-1", "client-2", "client-3", "server", "keyholder")
    for name in names:
        for status in found.processes(name):
            if wrong := locked_down(status):
                raise RehearsalError(
                    f"expected {name} to be locked down; its process {status['Name']} {wrong[0]}"
                )
    figures["processes"] = {name: len(found.processes(name)) for name in names}
    figures["client_mb"] = _megabytes(found.processes("client-1"))
    say("federation: SIGTERM to each, in the middle of a round")
    # A client that was told to stop has not done its part, and says so by its code.
    figures["client_stops_s"] = round(found.stop("client-1", (0, 143)), 1)
    figures["server_stops_s"] = round(found.stop("server"), 1)
    say("federation: the server again, on the state it left")
    podman("start", f"{found.prefix}-server")
    found.healthy("server")
    if _rounds(found) < 2:
        raise RehearsalError("expected the server to know its rounds after a restart; it does not")
    for name in names[1:]:
        figures[f"{name}_stops_again_s"] = round(
            found.stop(name, (0, 143) if name.startswith("client") else (0,)), 1
        )
    for name in names:
        if changed := found.written(name):
            raise RehearsalError(
                f"expected {name} to write to its mounts alone; {changed[0]} changed"
            )
    return figures


def stops_at_once(found: Federation) -> dict[str, float]:
    """SIGTERM before a program has loaded. The kernel does nothing by itself for a PID 1.

    Raises:
        RehearsalError: one had to be killed.
    """
    taken = {}
    for target in IMAGES:
        name = f"{found.prefix}-early-{target}"
        # It has no kit and would end by itself; whoever heeds the signal ends with another code.
        words = ("run", "--detach", "--name", name, "--network", "none", *LOCKED, *SCRATCH)
        podman(*words, image(target))
        first = inspect("container", name)["State"]["Pid"]
        until(
            partial(heeds, first, signal.SIGTERM), 30, f"{target} to heed SIGTERM before it loads"
        )
        started = time.monotonic()
        podman("stop", "--time", str(int(STOP_S)), name)
        taken[target] = round(time.monotonic() - started, 1)
        code = inspect("container", name)["State"]["ExitCode"]
        if code != 128 + signal.SIGTERM:
            raise RehearsalError(
                f"expected {target} to end with 143 on a SIGTERM that comes while it loads; got "
                f"{code} after {taken[target]} s"
            )
    return taken


def heeds(process: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    try:
        lines = (Path("/proc") / str(process) / "status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False  # it has ended
    caught = next(line for line in lines if line.startswith("SigCgt:")).split()[1]
    return bool(int(caught, 16) >> (number - 1) & 1)


def _health(found: Federation, name: str) -> dict[str, Any]:
    command = ("python", "-c", _STOPWATCH, "5", f"secagg-{name}", "health")
    taken: dict[str, Any] = json.loads(podman("exec", f"{found.prefix}-{name}", *command).stdout)
    return taken


def _megabytes(processes: list[dict[str, str]]) -> int:
    return round(sum(int(each.get("VmRSS", "0 kB").split()[0]) for each in processes) / 1024)


def _rounds(found: Federation) -> int:
    shown = json.loads(found.run("server", "task", "show", _TASK, "--format", "json"))
    return int(shown["task"]["rounds_done"])
