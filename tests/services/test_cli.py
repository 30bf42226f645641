"""The command lines: what they print, and the code they end with."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import structlog
import typer
from click.testing import Result
from typer.testing import CliRunner

import secagg_keyholder.cli
from secagg.cli import app as secagg_app
from secagg.errors import MalformedError, SecaggError
from secagg.parameters import NormCheck
from secagg.planner import plan_tensors
from secagg.sketch_shape import sketch_bytes
from secagg_server.cli import app as server_app
from secagg_server.task_files import read_task
from secagg_server.tasks import TaskSpec

UNREACHABLE = "127.0.0.1:1"


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test may leave files in the working directory, or read settings from outside."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("SECAGG_"):
            monkeypatch.delenv(name)
    yield
    structlog.reset_defaults()  # commands send logs to a stream that the runner has closed


def run(app: typer.Typer, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, code: int, *texts: str) -> None:
    """One line on standard error, nothing on standard output, and the exit code."""
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for text in texts:
        assert text in result.stderr


# --- secagg -----------------------------------------------------------------------------------


@pytest.mark.parametrize("app", [secagg_app, server_app, secagg_keyholder.cli.app])
def test_every_program_says_its_version(app: typer.Typer) -> None:
    result = run(app, "--version")
    assert (result.exit_code, result.stdout) == (0, f"secagg {version('secagg')}\n")


@pytest.mark.parametrize("app", [secagg_app, server_app, secagg_keyholder.cli.app])
def test_an_unknown_command_is_a_usage_error(app: typer.Typer) -> None:
    assert run(app, "plam").exit_code == 2


def test_a_plan_as_json_is_complete_and_typed() -> None:
    result = run(
        secagg_app, "plan", "--clients", 100, "--parameters", 5000, "--format", "json", "--bits", 9
    )
    assert (result.exit_code, result.stderr) == (0, "")
    facts = json.loads(result.stdout)
    plan = plan_tensors(5000, max_clients=100, clip=1.0, bits=9, norm_check=NormCheck())
    kinds = {
        "plan_digest": str,
        "ring_degree": int,
        "modulus": int,
        "modulus_bits": int,
        "security_bits": int,
        "failure_bits": int,
        "min_clients": int,
        "max_clients": int,
        "layouts": list,
        "ciphertexts": int,
        "upload_bytes": int,
        "bytes_per_parameter": float,
        "norm_check": dict,
        "privacy": type(None),
        "sketch_bytes": int,
        "explanation": list,
    }
    assert {key: type(value) for key, value in facts.items()} == kinds
    assert facts["plan_digest"] == plan.digest.hex()
    assert facts["upload_bytes"] == plan.payload_bytes == facts["ciphertexts"] * 28672
    assert facts["bytes_per_parameter"] == plan.payload_bytes / 5000
    (layout,) = facts["layouts"]
    assert layout["blocks"] == plan.blocks
    assert layout["sum_abs"] == 100 * 255 + layout["tolerance"] > 100 * 255
    assert facts["sketch_bytes"] == sketch_bytes(plan, direction=False)
    assert all(fact.keys() == {"topic", "value", "reason"} for fact in facts["explanation"])


def test_a_plan_for_people_explains_every_fact() -> None:
    result = run(secagg_app, "plan", "--clients", 100, "--parameters", 5000)
    assert result.exit_code == 0
    for word in ("cohort", "security", "256", "headroom", "upload"):
        assert word in result.stdout


def test_weights_change_the_plan() -> None:
    arguments = ["plan", "--clients", 100, "--parameters", 500, "--format", "json"]
    equal = json.loads(run(secagg_app, *arguments).stdout)
    weighted = json.loads(run(secagg_app, *arguments, "--weight-cap", 50).stdout)
    expected = plan_tensors(
        500,
        max_clients=100,
        clip=1.0,
        weighting="samples",
        weight_cap=50,
        norm_check=NormCheck(),
    ).digest.hex()
    assert weighted["plan_digest"] == expected != equal["plan_digest"]


def test_a_plan_without_a_norm_check_needs_less_room() -> None:
    arguments = ["plan", "--clients", 8, "--parameters", 27_000, "--format", "json"]
    checked = json.loads(run(secagg_app, *arguments).stdout)
    unchecked = json.loads(run(secagg_app, *arguments, "--no-norm-check").stdout)
    assert unchecked["norm_check"] is None
    assert unchecked["sketch_bytes"] == 0
    assert unchecked["upload_bytes"] < checked["upload_bytes"]


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--clients", 2, "--parameters", 10], ["max_clients", "min_clients=3"]),
        (["--clients", 5, "--parameters", 10, "--min-clients", 2], ["min_clients of 3 or more"]),
        (["--clients", 5, "--parameters", 0], ["positive sides"]),
        (["--clients", 5, "--parameters", 10, "--bits", 17], ["2 to 16 bits"]),
        (["--clients", 5, "--parameters", 10, "--clip", "nan"], ["clip norm"]),
        (["--clients", 5, "--parameters", 1 << 40], ["split the vector"]),
        (["--clients", 2_000_000, "--parameters", 10], ["1000000"]),
        (["--clients", 5, "--parameters", 10, "--weight-cap", -1], ["weight_cap"]),
        (["--clients", 5, "--parameters", 10, "--weight-cap", 0], ["weight_cap"]),
    ],
)
def test_an_impossible_plan_ends_with_78_and_says_what_would_work(
    arguments: list[object], texts: list[str]
) -> None:
    refused(run(secagg_app, "plan", *arguments), 78, "IMPOSSIBLE_PLAN", *texts)


@pytest.mark.parametrize("option", ["--clients", "--parameters"])
def test_a_plan_without_what_it_needs_is_a_usage_error(option: str) -> None:
    assert run(secagg_app, "plan", option, 5).exit_code == 2


# --- errors ---------------------------------------------------------------------------------


def test_brackets_in_an_error_are_printed_as_they_are(tmp_path: Path) -> None:
    """Rich takes [words] for markup; names of files and tasks may hold any."""
    refused(run(server_app, "run", "--config", "[link]/x.toml"), 78, "[link]/x.toml")
    refused(run(server_app, "run", "--config", "a[/b]/x.toml"), 78, "a[/b]/x.toml")


# --- tasks ------------------------------------------------------------------------------------

SAMPLE = """
task_id = "movies"
max_clients = 20
rounds = 5
round_deadline_s = 1.5

[update]
clip = 1.5
weighting = "samples"
weight_cap = 100

[[update.tensors]]
name = "items"
shape = [4, 2]

[[update.tensors]]
name = "bias"

[[integers]]
name = "clipped"
size = 1
max_abs = 1
"""


@pytest.fixture
def task_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        file = tmp_path / "task.toml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TaskSpec, bytes]]:
    """Tasks that the command would have created on a server."""
    calls: list[tuple[TaskSpec, bytes]] = []

    class Recording:
        def __init__(self, address: str, kit: object) -> None:
            pass

        def create_task(self, spec: TaskSpec, model: bytes = b"") -> None:
            calls.append((spec, model))

    monkeypatch.setattr("secagg_server.config.Operator", Recording)
    return calls


def create(file: Path, *arguments: object) -> Result:
    return run(server_app, "task", "create", file, "--insecure", *arguments)


def test_a_task_from_a_file_is_the_task_it_describes(task_file: Callable[[str], Path]) -> None:
    spec = read_task(task_file(SAMPLE))
    assert (spec.task_id, spec.rounds, spec.round_deadline_ms) == ("movies", 5, 1500)
    assert (spec.plan.min_clients, spec.plan.max_clients, spec.target_clients) == (3, 20, 20)
    assert spec.model is not None
    assert [(t.name, t.shape) for t in spec.model.tensors] == [("bias", ()), ("items", (4, 2))]
    assert [segment.name for segment in spec.plan.segments] == ["update", "clipped"]
    assert spec.model_bytes == 36


def test_a_task_is_created_from_its_file(
    task_file: Callable[[str], Path], created: list[tuple[TaskSpec, bytes]]
) -> None:
    file = task_file(SAMPLE)
    result = create(file)
    assert result.exit_code == 0, result.output
    assert "movies" in result.stdout
    assert created == [(read_task(file), b"")]


def test_a_model_goes_along_in_the_canonical_order(
    task_file: Callable[[str], Path], created: list[tuple[TaskSpec, bytes]], tmp_path: Path
) -> None:
    items = np.arange(8, dtype=np.float64).reshape(4, 2)
    np.savez(tmp_path / "model.npz", items=items, bias=-1.0, epoch=7)
    assert create(task_file(SAMPLE), "--model", tmp_path / "model.npz").exit_code == 0
    ((_, model),) = created
    assert np.frombuffer(model, "<f4").tolist() == [-1.0, *range(8)]


def bad_archive(file: Path, data: bytes) -> None:
    file.write_bytes(data)


def object_archive(file: Path) -> None:
    np.savez(file, items=np.array([pickle.dumps], dtype=object), bias=1.0)


def foreign_archive(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("items.npy", b"no array")
        archive.writestr("bias.npy", b"no array")


def cut_archive(file: Path) -> None:
    np.savez(file, items=np.zeros((4, 2)), bias=0.0)
    file.write_bytes(file.read_bytes()[:-30])


MODELS: dict[str, Callable[[Path], object]] = {
    "empty file": lambda file: bad_archive(file, b""),
    "garbage": lambda file: bad_archive(file, b"garbage" * 50),
    "zip magic only": lambda file: bad_archive(file, b"PK\x03\x04" + bytes(50)),
    "cut off": cut_archive,
    "objects": object_archive,
    "no arrays": foreign_archive,
    "a single array": lambda file: np.save(file.open("wb"), np.zeros(9)),
    "missing tensor": lambda file: np.savez(file, items=np.zeros((4, 2))),
    "wrong shape": lambda file: np.savez(file, items=np.zeros((2, 4)), bias=0.0),
    "text": lambda file: np.savez(file, items=np.full((4, 2), "x"), bias=0.0),
    "NaN": lambda file: np.savez(file, items=np.full((4, 2), np.nan), bias=0.0),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("case", MODELS)
def test_a_model_is_refused_with_65_and_one_line(
    case: str,
    task_file: Callable[[str], Path],
    created: list[tuple[TaskSpec, bytes]],
    tmp_path: Path,
) -> None:
    MODELS[case](tmp_path / "model.npz")
    refused(create(task_file(SAMPLE), "--model", tmp_path / "model.npz"), 65)
    assert created == []


def test_a_model_that_is_not_there_is_refused(
    task_file: Callable[[str], Path], created: list[tuple[TaskSpec, bytes]]
) -> None:
    refused(create(task_file(SAMPLE), "--model", "nowhere.npz"), 65, "nowhere.npz")
    assert created == []


def test_a_model_for_a_task_without_one_is_refused(
    task_file: Callable[[str], Path], created: list[tuple[TaskSpec, bytes]], tmp_path: Path
) -> None:
    np.savez(tmp_path / "model.npz", items=np.zeros(3))
    counts = SAMPLE[: SAMPLE.index("[update]")] + SAMPLE[SAMPLE.index("[[integers]]") :]
    refused(create(task_file(counts), "--model", tmp_path / "model.npz"), 65, "no model")
    assert created == []


FILES = {
    "an unknown key": ("rounds = 5", "round = 5", "did you mean 'rounds'"),
    "an unknown key of the update": ("clip = 1.5", "clipp = 1.5", "clipp"),
    "no cohort": ("max_clients = 20", "", "max_clients"),
    "a cohort of two": ("max_clients = 20", "max_clients = 2", "max_clients"),
    "no id": ('task_id = "movies"', "", "task_id"),
    "no rounds": ("rounds = 5", "rounds = 0", "rounds"),
    "no time": ("round_deadline_s = 1.5", "round_deadline_s = 0.01", "round_deadline_ms=10"),
    "time below zero": ("round_deadline_s = 1.5", "round_deadline_s = -5.0", "round_deadline"),
    "time without end": ("round_deadline_s = 1.5", "round_deadline_s = inf", "round_deadline"),
    "time that is none": ("round_deadline_s = 1.5", "round_deadline_s = nan", "round_deadline"),
    "too many rounds": ("rounds = 5", "rounds = 4294967296", "rounds"),
    "too many attempts": ("rounds = 5", "max_attempts = 101", "1 to 100 attempts"),
    "a target below the quorum": ("rounds = 5", "target_clients = 2", "target_clients"),
    "a target beyond the cohort": ("rounds = 5", "target_clients = 21", "target_clients"),
    "a target of nobody": ("rounds = 5", "target_clients = 0", "target_clients"),
    "a clip of zero": ("clip = 1.5", "clip = 0.0", "clip"),
    "an unknown weighting": ('weighting = "samples"', 'weighting = "votes"', "weighting"),
    "a side of zero": ("shape = [4, 2]", "shape = [4, 0]", "positive sides"),
    "a side of text": ("shape = [4, 2]", 'shape = ["x"]', "shape"),
    "sums beyond the modulus": ("max_abs = 1", "max_abs = 9000000000000000", "would work"),
    "a segment twice": ('name = "clipped"', 'name = "update"', "distinctly named"),
    "an id with a path": ('task_id = "movies"', 'task_id = "../movies"', "task id"),
    "an id that is a folder": ('task_id = "movies"', 'task_id = ".."', "task id"),
    "an empty id": ('task_id = "movies"', 'task_id = ""', "task id"),
    "no TOML": ("rounds = 5", "rounds 5", "TOML"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_task_file_is_refused_with_78_and_one_line(
    case: str, task_file: Callable[[str], Path], created: list[tuple[TaskSpec, bytes]]
) -> None:
    old, new, text = FILES[case]
    assert old in SAMPLE
    refused(create(task_file(SAMPLE.replace(old, new))), 78, text)
    assert created == []


def test_a_task_file_without_anything_to_sum_is_refused(
    task_file: Callable[[str], Path], created: list[tuple[TaskSpec, bytes]]
) -> None:
    refused(create(task_file('task_id = "x"\nmax_clients = 5')), 78, "1 to 16")


def test_a_task_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(create(tmp_path / "nowhere.toml"), 78, "nowhere.toml")


@pytest.mark.parametrize(
    "command", [["list"], ["show", "x"], ["abort", "x"], ["sums", "x", 1, "--output", "y.npz"]]
)
def test_a_server_that_is_not_there_ends_with_69_and_one_line(
    command: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secagg_server.operator._CONNECT_S", 0.2)
    refused(
        run(server_app, "task", *command, "--insecure", "--admin", UNREACHABLE), 69, "UNAVAILABLE"
    )


def test_an_admin_address_beyond_this_machine_is_refused() -> None:
    refused(run(server_app, "task", "list", "--insecure", "--admin", "10.0.0.1:5"), 78, "plaintext")


def test_the_exit_code_is_that_of_the_servers_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, address: str, kit: object) -> None:
            pass

        def tasks(self) -> None:
            raise MalformedError("expected this")

    monkeypatch.setattr("secagg_server.config.Operator", Refusing)
    refused(
        run(server_app, "task", "list", "--insecure", "--admin", UNREACHABLE),
        65,
        "MALFORMED: expected this",
    )


def test_every_error_has_an_exit_code_of_its_kind() -> None:
    def tree(root: type[SecaggError]) -> list[type[SecaggError]]:
        return [root, *(found for child in root.__subclasses__() for found in tree(child))]

    assert {kind.exit_code for kind in tree(SecaggError)} == {65, 69, 70, 75, 76, 77, 78}
