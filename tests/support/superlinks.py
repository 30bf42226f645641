"""Flower's own programs as processes, the key holder beside them, and an end to all of them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from ports import free_addresses

from secagg_bench.processes import Program, provisioned

__all__ = ["EXAMPLE", "Flower", "copied", "example_task", "flower"]

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "flower-quickstart"

_BINARIES = Path(sys.executable).parent
_CONNECTION = "test"
_KEY_HOLDER = "127.0.0.1:7402"  # of the example
_RUN_S = 400.0
_STOP_S = 15.0
_POLL_S = 0.05


class _Command(Program):
    """A program that has a command of its own, in place of a module."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], cwd: Path
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [str(_BINARIES / command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=cwd,
            )

    def says(self, words: str) -> bool:
        """Whether the log has these words."""
        return words in self.log.read_text(encoding="utf-8", errors="replace")


@dataclass
class Flower:
    """One machine's Flower, with a home of its own, and a federation's kits.

    Attributes:
        folder: for everything; the server's app runs in it.
        kits: see `Federation`.
        environment: of all programs.
    """

    folder: Path
    kits: Path
    environment: dict[str, str]
    _programs: list[Program] = field(default_factory=list)

    def key_holder(self) -> str:
        """Start the key holder with its kit; its address."""
        ready = self.folder / "keyholder.ready"
        arguments = ["run", "--ready-file", str(ready), "--listen", "127.0.0.1:0"]
        arguments += ["--kit", str(self.kits / "keyholder")]
        arguments += ["--passphrase-file", str(self.kits / "custodians" / "passphrase")]
        arguments += ["--state-dir", str(self.folder / "keyholder"), "--monitor-listen", "off"]
        program = Program("secagg_keyholder.cli", arguments, self.folder / "keyholder.log")
        self._programs.append(program)
        program.wait_for(ready.exists)
        listen: str = json.loads(ready.read_text(encoding="utf-8"))["listen"]
        return listen

    def simulation(self) -> None:
        """Start a SuperLink that simulates its nodes, as `flwr run` does by itself."""
        self._superlink("--insecure", "--simulation", connection="insecure = true")

    def deployment(self, nodes: Sequence[str]) -> None:
        """Start a SuperLink and SuperNodes that speak TLS to it; wait until all have joined.

        The SuperLink's certificate is the server's, whose kit its environment names.

        Args:
            nodes: the configuration of each, as on its command line.
        """
        kit = self.kits / "server"
        address = self._superlink(
            *("--ssl-ca-certfile", str(kit / "ca.pem")),
            *("--ssl-certfile", str(kit / "certificate.pem")),
            *("--ssl-keyfile", str(kit / "private.key")),
            connection=f'root-certificates = "{kit / "ca.pem"}"',
        )
        started = []
        for index, (config, runtime) in enumerate(
            zip(nodes, free_addresses(len(nodes)), strict=True)
        ):
            command = ["flower-supernode", "--superlink", address]
            command += ["--root-certificates", str(kit / "ca.pem")]
            command += ["--port", runtime.rpartition(":")[2], "--node-config", config]
            started.append(self._start(f"supernode-{index}", command))
        for node in started:
            node.wait_for(lambda node=node: node.says("SuperNode ID:"))

    def run(self, app: Path, config: Mapping[str, object], federation: str = "") -> str:
        """Run an app to its end; what the server's app logged."""
        pairs = " ".join(f"{key}={_toml(value)}" for key, value in config.items())
        command = ["run", str(app), _CONNECTION, "--stream", "--run-config", pairs]
        if federation:
            command += ["--federation-config", federation]
        return self._flwr(*command)

    def shell(self, commands: str, example: Path) -> str:
        """Run commands in a copy of an example; what they said.

        The SuperLink that `flwr run` starts by itself, and the key holder, get ports of their own.
        """
        here = copied(example, self.folder / "here")
        key_holder, superlink, control = free_addresses(3)
        for file in here.rglob("pyproject.toml"):
            text = file.read_text(encoding="utf-8")
            file.write_text(text.replace(_KEY_HOLDER, key_holder), encoding="utf-8")
        ports = {
            "SECAGG_KEYHOLDER_LISTEN": key_holder,
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": superlink.rpartition(":")[2],
            "FLWR_LOCAL_CONTROL_API_PORT": control.rpartition(":")[2],
        }
        script = f"set -e\ntrap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT\n{commands}"
        return _output(["bash", "-c", script], here, self.environment | ports)

    def last_run(self) -> tuple[int, str]:
        """Number and status of the only run."""
        (run,) = json.loads(self._flwr("list", _CONNECTION, "--format", "json"))["runs"]
        return int(run["run-id"]), run["status"]

    def logs(self) -> str:
        """What all programs have said, for a test that fails."""
        parts = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-6000:]}" for p in parts)

    def _superlink(self, *arguments: str, connection: str) -> str:
        (address,) = free_addresses(1)
        host, _, port = address.rpartition(":")
        home = Path(self.environment["FLWR_HOME"])
        home.mkdir()
        home.joinpath("config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n'
            f'[superlink.{_CONNECTION}]\naddress = "{address}"\n{connection}\n',
            encoding="utf-8",
        )
        command = ["flower-superlink", "--host", host, "--port", port, *arguments]
        program = self._start("superlink", command, SECAGG_FLOWER_KIT=str(self.kits / "server"))
        program.wait_for(lambda: program.says("Uvicorn running on"))
        return address

    def _start(self, name: str, command: Sequence[str], **variables: str) -> _Command:
        log = self.folder / f"{name}.log"
        program = _Command(command, log, self.environment | variables, self.folder)
        self._programs.append(program)
        return program

    def _flwr(self, *arguments: str) -> str:
        return _output([str(_BINARIES / "flwr"), *arguments], self.folder, self.environment)

    def stop(self) -> None:
        """End every program, and whatever it has started."""
        for program in reversed(self._programs):
            program.process.terminate()
        for program in self._programs:
            program.stop()
        # What they have started in sessions of their own does not outlive the test either.
        self._kill_left(signal.SIGTERM)
        give_up_at = time.monotonic() + _STOP_S
        while self._left() and time.monotonic() < give_up_at:
            time.sleep(_POLL_S)
        self._kill_left(signal.SIGKILL)

    def _kill_left(self, how: signal.Signals) -> None:
        for process in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, how)

    def _left(self) -> list[int]:
        """Processes that were given our Flower home, found where the system shows them."""
        wanted = f"FLWR_HOME={self.environment['FLWR_HOME']}".encode()
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if wanted in environ.read_bytes().split(b"\0"):
                    found.append(int(environ.parent.name))
        return found


@contextlib.contextmanager
def flower(folder: Path, clients: int) -> Iterator[Flower]:
    """A Flower home, and kits for so many clients; everything that was started stops at the end."""
    kits = provisioned(folder, clients)
    environment = os.environ | {
        "PATH": f"{_BINARIES}:{os.environ['PATH']}",
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        # Sums of floats must not depend on how many threads computed them.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    started = Flower(folder, kits, environment)
    try:
        yield started
    finally:
        started.stop()


def _output(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=_RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copied(source: Path, folder: Path) -> Path:
    """A copy of an app, to change."""
    return Path(shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__")))


def example_task() -> ModuleType:
    """The example without Flower: its model, its data, its training."""
    file = EXAMPLE / "plain" / "quickstart" / "task.py"
    spec = importlib.util.spec_from_file_location("quickstart_task", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _toml(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else str(value)
