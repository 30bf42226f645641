"""The encrypted run: a key holder, a server and one client process a silo, over gRPC."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secagg.errors import SecaggError
from secagg.quantize import flatten
from secagg.wire.codec import model_to_bytes
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg.wire.v1 import round_pb2
from secagg_bench.demo.settings import TASK_ID, DemoSettings, Source
from secagg_bench.processes import Program, Services, running_services
from secagg_client.session import ClientKit, ClientSession
from secagg_client.state_dir import StateDir
from secagg_recommender.factorisation import SharedTensors, init_shared
from secagg_server.operator import Operator
from secagg_server.tasks import TaskSpec

__all__ = ["ClientCosts", "EncryptedRun", "run_encrypted"]

_POLL_S = 0.2

OnProgress = Callable[[pb.GetTaskResponse], None]


@dataclass(frozen=True, slots=True)
class ClientCosts:
    """Seconds and bytes, summed over all clients and rounds."""

    train_s: float
    quantize_s: float
    encrypt_s: float
    upload_s: float
    upload_bytes: int


@dataclass(frozen=True, slots=True)
class EncryptedRun:
    """What the real programs did.

    Attributes:
        rounds: the record of each finished round, in order.
        reason: why the task failed; empty when it finished.
        shared: the final model's tensors; empty when it failed.
        user_vectors: float32 (n_users, d), gathered from the clients' own folders for measuring;
            no protocol message carries them.
        costs: what it cost the clients.
        wall_s: seconds from the task's creation to its end.
    """

    rounds: list[pb.RoundRecord]
    reason: str
    shared: SharedTensors = field(repr=False)
    user_vectors: NDArray[np.float32] = field(repr=False)
    costs: ClientCosts
    wall_s: float


def run_encrypted(
    settings: DemoSettings,
    source: Source,
    n_users: int,
    n_items: int,
    folder: Path,
    on_progress: OnProgress,
    client_module: str = "secagg_client.cli",
) -> EncryptedRun:
    """Train through the real programs until the task ends.

    Args:
        folder: scratch space for data and logs.
        client_module: what each client process runs.

    Raises:
        UnavailableError: a program did not start.
    """
    with running_services(folder, settings.clients) as services, contextlib.ExitStack() as stack:
        operator = services.operator()
        stack.callback(operator.close)
        started = time.monotonic()
        _create_task(operator, settings, n_items)
        clients = [
            _start_client(settings, source, services, folder, silo, client_module)
            for silo in range(settings.silos)
        ]
        clients += [
            _start_poisoner(settings, source, services, folder, number)
            for number in range(settings.silos, settings.clients)
        ]
        for client in clients:
            stack.callback(client.stop)
        ended = _watch(operator, clients, on_progress)
        wall_s = time.monotonic() - started
        shared = _final_model(services) if not ended.task.reason else {}
        for client in clients:
            with contextlib.suppress(Exception):
                client.process.wait(10)
    done = [row for row in ended.rounds if row.state == round_pb2.ROUND_STATE_DONE]
    states = [_client_folder(folder, silo) for silo in range(settings.silos)]
    return EncryptedRun(
        done,
        ended.task.reason,
        shared,
        _gather_vectors(states, n_users, settings.dimensions),
        _gather_costs(states),
        wall_s,
    )


def _create_task(operator: Operator, settings: DemoSettings, n_items: int) -> None:
    plan = settings.plan(n_items)
    spec = TaskSpec(
        TASK_ID,
        plan,
        settings.rounds,
        round(settings.round_deadline_s * 1000),
        settings.max_attempts,
        settings.clients,
    )
    if spec.model is None:
        raise TypeError("the demo's plan has one segment of floats")
    initial = init_shared(n_items, settings.dimensions, settings.seed)
    operator.create_task(spec, model_to_bytes(flatten(spec.model, initial)))


def _client_folder(folder: Path, silo: int) -> Path:
    return folder / f"client-{silo}"


def _start_client(
    settings: DemoSettings,
    source: Source,
    services: Services,
    folder: Path,
    silo: int,
    module: str,
) -> Program:
    arguments = ["join", "--silo", str(silo), "--repeatable-seed", str(settings.seed)]
    arguments += _arguments(settings, source, services, folder, silo)
    return Program(module, arguments, folder / f"client-{silo}.log")


def _start_poisoner(
    settings: DemoSettings, source: Source, services: Services, folder: Path, number: int
) -> Program:
    arguments = _arguments(settings, source, services, folder, number)
    return Program("secagg_bench.demo.poisoner", arguments, folder / f"client-{number}.log")


def _arguments(
    settings: DemoSettings, source: Source, services: Services, folder: Path, number: int
) -> list[str]:
    """What every client is told."""
    arguments = ["--server", services.server, "--task", TASK_ID]
    arguments += ["--kit", str(services.client_kit(number))]
    arguments += ["--state-dir", str(_client_folder(folder, number))]
    arguments += ["--dataset", source.dataset, "--silos", str(settings.silos)]
    arguments += ["--seed", str(settings.seed), "--dimensions", str(settings.dimensions)]
    if source.data_dir is not None:
        arguments += ["--data-dir", str(source.data_dir)]
    return arguments


def _watch(
    operator: Operator, clients: list[Program], on_progress: OnProgress
) -> pb.GetTaskResponse:
    """Report until the task ends; end it when no client is left to finish it."""
    while True:
        answer = operator.task(TASK_ID)
        on_progress(answer)
        if answer.task.state != pb.TASK_STATE_RUNNING:
            return answer
        if all(client.process.poll() is not None for client in clients):
            with contextlib.suppress(SecaggError):
                operator.abort_task(TASK_ID)
        time.sleep(_POLL_S)


def _final_model(services: Services) -> SharedTensors:
    kit = ClientKit.load(services.client_kit(0))
    with ClientSession(services.server, TASK_ID, kit) as session:
        return session.latest_model().tensors


def _gather_vectors(folders: list[Path], n_users: int, dimensions: int) -> NDArray[np.float32]:
    vectors = np.zeros((n_users, dimensions), dtype=np.float32)
    for folder in folders:
        newest = StateDir(folder, TASK_ID).latest_vectors()
        if newest is not None:
            with np.load(io.BytesIO(newest), allow_pickle=False) as saved:
                vectors[saved["users"]] = saved["vectors"]
    return vectors


def _gather_costs(folders: list[Path]) -> ClientCosts:
    rows = [
        json.loads(line)
        for folder in folders
        if (folder / "costs.jsonl").exists()
        for line in (folder / "costs.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return ClientCosts(
        sum(row["train_s"] for row in rows),
        sum(row["quantize_s"] for row in rows),
        sum(row["encrypt_s"] for row in rows),
        sum(row["upload_s"] for row in rows),
        sum(row["upload_bytes"] for row in rows),
    )
