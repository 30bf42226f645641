"""EASE through the real programs: a server, a key holder and a client process for each silo."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Final

from secagg.context import rotation_string
from secagg.errors import UnavailableError
from secagg.parameters import IntegerSegment
from secagg.quantize import dequantize_integers
from secagg.release import sums_sha256
from secagg.wire.codec import sums_from_bytes
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg_bench.processes import Program, Services, running_services
from secagg_bench.recommender.one_round_runs import SEED, Progressed, ease_plan
from secagg_recommender.datasets import load_dataset
from secagg_recommender.ease import gram_triangle
from secagg_recommender.histories import histories_of
from secagg_recommender.interactions import split_leave_one_out
from secagg_recommender.partition import partition_users
from secagg_server.operator import Operator
from secagg_server.tasks import TaskSpec

__all__ = ["service_run"]

_TASK: Final = "ease"
_DEADLINE_MS: Final = 300_000
_POLL_S: Final = 0.2
_LEAVE_S: Final = 60.0


def service_run(dataset: str, data_dir: Path | None, silos: int, progress: Progressed) -> Any:  # noqa: ANN401
    """One round of EASE over gRPC and mutual TLS; how it compares, and what it took.

    Args:
        data_dir: where the data set is; None for one that needs no files.
        progress: told of uploads that have come.

    Raises:
        UnavailableError: a program did not start, or the round did not end.
    """
    split = split_leave_one_out(load_dataset(dataset, data_dir))
    plan = ease_plan(split, partition_users(split.n_users, silos, SEED), checked=True)
    with (
        tempfile.TemporaryDirectory() as name,
        running_services(folder := Path(name), silos) as services,
        contextlib.ExitStack() as stack,
    ):
        operator = services.operator()
        stack.callback(operator.close)
        started = time.monotonic()
        operator.create_task(TaskSpec(_TASK, plan, 1, _DEADLINE_MS, 1, silos))
        clients = [
            _client(services, folder, dataset, data_dir, silo, silos) for silo in range(silos)
        ]
        for client in clients:
            stack.callback(client.stop)
        ended = _ended(operator, silos, progress)
        data, contributors = operator.sums(_TASK, 1)
        for client in clients:
            client.process.wait(_LEAVE_S)  # they ask for their verdicts first
        costs = [_costs(folder / f"state-{silo}") for silo in range(silos)]
        wall_s = time.monotonic() - started
    (segment,) = plan.segments
    (packed,) = sums_from_bytes(data, plan)
    if not isinstance(segment, IntegerSegment):
        raise TypeError("the plan of EASE has one segment of integers")
    total = dequantize_integers(segment, packed, rotation=rotation_string(_TASK, 1, plan))
    central = gram_triangle(histories_of(split, range(split.n_users)), split.n_items)
    return {
        "contributors": contributors,
        "identical": sums_sha256((total,)) == sums_sha256((central,)),
        "sha256": sums_sha256((total,)),
        "wall_s": wall_s,
        "costs": {
            "clients": silos,
            "upload_bytes": plan.payload_bytes,
            "compute_s": median(row["train_s"] for row in costs),
            "encrypt_s": median(row["quantize_s"] + row["encrypt_s"] for row in costs),
            "upload_s": median(row["upload_s"] for row in costs),
            "aggregate_s": ended.rounds[-1].aggregate_ms / 1000,
            "open_s": ended.rounds[-1].release_ms / 1000,
        },
    }


def _client(
    services: Services, folder: Path, dataset: str, data_dir: Path | None, silo: int, silos: int
) -> Program:
    arguments = ["join", "--model", "ease", "--task", _TASK, "--server", services.server]
    arguments += ["--kit", str(services.client_kit(silo)), "--dataset", dataset]
    arguments += ["--silo", str(silo), "--silos", str(silos), "--seed", str(SEED)]
    arguments += ["--state-dir", str(folder / f"state-{silo}")]
    if data_dir is not None:
        arguments += ["--data-dir", str(data_dir)]
    return Program("secagg_client.cli", arguments, folder / f"client-{silo}.log")


def _ended(operator: Operator, silos: int, progress: Progressed) -> pb.GetTaskResponse:
    """The record of the task, once it has ended."""
    give_up_at = time.monotonic() + _DEADLINE_MS / 1000
    while time.monotonic() < give_up_at:
        answer = operator.task(_TASK)
        uploads = answer.rounds[-1].uploads if answer.rounds else 0
        progress(f"EASE, {silos} client processes", uploads, silos)
        if answer.task.state == pb.TASK_STATE_FINISHED:
            return answer
        if answer.task.state != pb.TASK_STATE_RUNNING:
            break
        time.sleep(_POLL_S)
    raise UnavailableError(f"expected the round to end; got {answer.task.reason or 'no answer'}")


def _costs(state_dir: Path) -> dict[str, float]:
    lines = (state_dir / "costs.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, float] = json.loads(lines[-1])
    return found
