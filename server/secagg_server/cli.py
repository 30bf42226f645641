"""The `secagg-server` command.

What only serving needs is loaded by `run` alone: containers ask for health every few seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from google.protobuf.json_format import MessageToDict, ParseDict

from secagg import logs
from secagg.archive import read_npz
from secagg.audit import export
from secagg.commands import OutputFormat, exits_cleanly, out, print_json, print_table, version
from secagg.context import rotation_string
from secagg.errors import InputError
from secagg.options import with_settings
from secagg.parameters import FloatSegment, IntegerSegment
from secagg.quantize import dequantize_integers, flatten
from secagg.rpc.lifecycle import check_health
from secagg.wire.codec import model_to_bytes, sums_from_bytes
from secagg.wire.v1 import operator_service_pb2
from secagg_server.config import OperatorSettings, ServerSettings
from secagg_server.task_files import read_task
from secagg_server.tasks import TaskSpec

__all__ = ["app"]

app = typer.Typer(help="The aggregation server.", no_args_is_help=True)
task_app = typer.Typer(help="Create and watch tasks on a running server.", no_args_is_help=True)
app.add_typer(task_app, name="task")

config_app = typer.Typer(help="Look at the configuration without starting.", no_args_is_help=True)
app.add_typer(config_app, name="config")

_FORMAT = Annotated[OutputFormat, typer.Option("--format", help="table or json")]


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
@exits_cleanly
@with_settings(ServerSettings)
def run(settings: ServerSettings) -> None:
    """Serve until stopped. Flags win over SECAGG_SERVER_* variables, which win over the file."""
    from secagg_server.app import run as serve

    logs.configure(settings.log_level)
    asyncio.run(serve(settings))


@config_app.command()
@exits_cleanly
@with_settings(ServerSettings)
def check(settings: ServerSettings) -> None:
    """Say what `run` would refuse, with the same message and exit code, without starting."""
    settings.check()
    out.print("the configuration is fine")


@app.command()
@exits_cleanly
@with_settings(ServerSettings, ["listen", "kit", "insecure"])
def health(settings: ServerSettings) -> None:
    """Ask the running server whether it is ready; 0 if it is, 69 if not."""
    check_health(*settings.dialled())
    out.print("ready")


@app.command("audit")
@exits_cleanly
@with_settings(OperatorSettings)
def audit_command(
    settings: OperatorSettings,
    output: Annotated[Path, typer.Argument(help="file to write, for `secagg audit verify`")],
) -> None:
    """Download the audit log of a running server, one JSON object a line."""
    export(settings.operator().audit(), output)
    out.print(f"wrote {output}")


@task_app.command()
@exits_cleanly
@with_settings(OperatorSettings)
def create(
    settings: OperatorSettings,
    file: Annotated[Path, typer.Argument(help="the task as TOML; see docs/samples/task.toml")],
    model: Annotated[
        Path | None, typer.Option(help="initial model: .npz with the task's tensors; else zeros")
    ] = None,
) -> None:
    """Create a task and start its first round."""
    spec = read_task(file)
    note = settings.operator().create_task(spec, _read_model(spec, model) if model else b"")
    out.print(
        f"task {spec.task_id!r} runs: {spec.rounds} rounds, plan {spec.plan.digest.hex()[:16]}"
    )
    if note:
        out.print(f"note: {note}", highlight=False, soft_wrap=True)


def _read_model(spec: TaskSpec, file: Path) -> bytes:
    if spec.model is None:
        raise InputError("expected no model for a task without a segment of floats")
    tensors = read_npz(file)
    wanted = {tensor.name for tensor in spec.model.tensors}
    return model_to_bytes(
        flatten(spec.model, {name: value for name, value in tensors.items() if name in wanted})
    )


@task_app.command("list")
@exits_cleanly
@with_settings(OperatorSettings)
def list_tasks(settings: OperatorSettings, format_: _FORMAT = OutputFormat.table) -> None:
    """All tasks, oldest first."""
    tasks = settings.operator().tasks()
    if format_ is OutputFormat.json:
        print_json([_plain(task) for task in tasks])
        return
    rows = [
        (task.spec.task_id, _name(_plain(task)["state"]), f"{task.rounds_done}/{task.spec.rounds}")
        for task in tasks
    ]
    print_table(("task", "state", "rounds"), rows)


@task_app.command()
@exits_cleanly
@with_settings(OperatorSettings)
def show(settings: OperatorSettings, task_id: str, format_: _FORMAT = OutputFormat.table) -> None:
    """One task with every attempt at its rounds."""
    answer = _plain(settings.operator().task(task_id))
    if format_ is OutputFormat.json:
        print_json(answer)
        return
    rows = [
        (
            f"{row['round_number']}.{row['attempt']}",
            _name(row["state"]),
            row["uploads"],
            row["rejected"],
            row["contributors"],
            f"{row['aggregate_ms']:.1f}",
            f"{row['release_ms']:.1f}",
            row["reason"],
        )
        for row in answer["rounds"]
    ]
    columns = ("round", "state", "uploads", "refused", "summed", "add ms", "open ms", "reason")
    task = answer["task"]
    title = f"{task_id}: {_name(task['state'])} {task['reason']}".strip()
    print_table(columns, rows, title)
    for line in (*_guarantees(task), *_learning(answer)):
        out.print(line, highlight=False, soft_wrap=True)


def _guarantees(task: dict[str, Any]) -> Iterator[str]:
    """What a task promises its clients, in lines for people."""
    if privacy := task.get("privacy"):
        yield (
            f"privacy: {privacy['mode'].rpartition('MODE_')[2].lower()} noise, multiplier "
            f"{privacy['noise_multiplier']:g}; epsilon {privacy['epsilon_spent']:.4g} of "
            f"{privacy['epsilon']:g} spent at delta {privacy['delta']:g}; "
            f"{privacy['releases_left']} releases left"
        )
    if adaptive := task["spec"].get("adaptive_clip"):
        yield (
            f"clip norm: {task['clip']:.4g}, following the quantile {adaptive['quantile']:g} at "
            f"rate {adaptive['rate']:g}"
        )


def _learning(answer: dict[str, Any]) -> Iterator[str]:
    """How a task's model learns, and how far it has come, in lines for people."""
    spec = TaskSpec.from_wire(ParseDict(answer["task"]["spec"], operator_service_pb2.TaskSpec()))
    if spec.model is None:
        return
    yield f"optimiser: {spec.optimiser.described}"
    if spec.model.compression is not None:
        yield f"compression: {spec.model.carried} of {spec.model.parameters} floats travel"
    if spec.stop is None:
        return
    yield f"stops {spec.stop.described}"
    told = [row for row in answer["rounds"] if "change" in row or "figure" in row]
    for last in told[-1:]:
        parts = []
        if spec.stop.figure and "figure" in last:
            parts.append(f"{spec.stop.figure} {last['figure']:.4f}")
        if "change" in last:
            parts.append(f"model changed by {last['change']:.4g}")
        yield f"round {last['round_number']}: {', '.join(parts)}"


@task_app.command()
@exits_cleanly
@with_settings(OperatorSettings)
def abort(settings: OperatorSettings, task_id: str) -> None:
    """End a task."""
    settings.operator().abort_task(task_id)
    out.print(f"task {task_id!r} ended")


@task_app.command()
@exits_cleanly
@with_settings(OperatorSettings)
def sums(
    settings: OperatorSettings,
    task_id: str,
    round_number: Annotated[int, typer.Argument(help="from 1")],
    output: Annotated[Path, typer.Option(help=".npz file to write")],
) -> None:
    """Write a round's integer sums, one array for each segment.

    Integer segments are the plain sums; segments of floats are the rotated, quantised sums. Exact,
    or with noise where the task has privacy; the counts of a threshold are never released.
    """
    operator = settings.operator()
    task = operator.task(task_id)
    data, contributors = operator.sums(task_id, round_number)
    # All attempts at a round have one clip norm.
    clips = [row.clip for row in task.rounds if row.round_number == round_number]
    plan = TaskSpec.from_wire(task.task.spec).plan_at(clips[-1] or None)
    rotation = rotation_string(task_id, round_number, plan)
    arrays: dict[str, Any] = {"contributors": contributors}
    for segment, total in zip(plan.segments, sums_from_bytes(data, plan), strict=True):
        if plan.threshold is not None and segment.name == plan.threshold.counts:
            continue  # withheld: what is stored are zeros
        if isinstance(segment, IntegerSegment):
            arrays[segment.name] = dequantize_integers(segment, total, rotation=rotation)
        elif isinstance(segment, FloatSegment):
            arrays[segment.name] = total
    np.savez(output, **arrays)
    out.print(f"wrote {output}")


def _plain(message: Any) -> dict[str, Any]:  # noqa: ANN401 - any protobuf message
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _name(enum: str) -> str:
    return enum.rpartition("STATE_")[2].lower()


if __name__ == "__main__":
    app()
