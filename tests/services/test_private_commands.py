"""The command lines where there is privacy: what they plan, show and write."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import cohort
import grpc.aio
import numpy as np
import pytest
import structlog
import typer
from click.testing import Result
from key_holders import LocalKeyHolder
from numpy.typing import NDArray
from servers import DEADLINE_S, running, task
from serving import loop_thread, serving
from typer.testing import CliRunner

from secagg.accounting import Budget, noise_multiplier_for, spent
from secagg.cli import app as secagg_app
from secagg.enrolment import OpenEnrolment
from secagg.parameters import FloatSegment, IntegerSegment, NormCheck, Plan, Privacy, RowThreshold
from secagg.planner import PRIVATE_MARGIN, explain, make_plan, mean_noise, plan_tensors
from secagg.privacy import release_rho
from secagg.release import Release
from secagg.wire.v1 import operator_service_pb2_grpc
from secagg_client.cli import app as client_app
from secagg_server.blobs import BlobStore
from secagg_server.cli import app as server_app
from secagg_server.clock import SystemClock
from secagg_server.coordinator import Coordinator
from secagg_server.rounds import OpenRounds
from secagg_server.services import OperatorService
from secagg_server.store import Store
from secagg_server.task_files import read_task
from secagg_server.tasks import AdaptiveClip, TaskSpec

DELTA = 1e-5


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test may leave files in the working directory, or read settings from outside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    for name in os.environ:
        if name.startswith("SECAGG_"):
            monkeypatch.delenv(name)
    yield
    structlog.reset_defaults()  # commands send logs to a stream that the runner has closed


def run(app: typer.Typer, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, code: int, text: str) -> None:
    """One line on standard error, nothing on standard output, and the exit code."""
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert text in result.stderr


# --- secagg plan --------------------------------------------------------------------------------

PLAN = ("plan", "--clients", 50, "--min-clients", 5, "--parameters", 3000, "--clip", 2.5)
BUDGET = ("--epsilon", 8, "--delta", DELTA)


@pytest.mark.parametrize("mode", ["release", "distributed", "local"])
def test_a_private_plan_as_json_has_its_noise_and_its_cost(mode: str) -> None:
    arguments = (*PLAN, "--privacy", mode, *BUDGET, "--rounds", 20, "--format", "json")
    facts = json.loads(run(secagg_app, *arguments).stdout)
    noise = noise_multiplier_for(8.0, DELTA, 20)
    plan = plan_tensors(
        3000,
        max_clients=50,
        min_clients=5,
        clip=2.5,
        norm_check=NormCheck(PRIVATE_MARGIN),
        privacy=Privacy(mode, noise, 8.0, DELTA),
    )
    assert facts["plan_digest"] == plan.digest.hex()
    assert facts["upload_bytes"] == plan.payload_bytes
    found = facts["privacy"]
    rho = release_rho(plan)
    assert (found["mode"], found["noise_multiplier"]) == (mode, noise)
    assert (found["rho_per_release"], found["rounds"]) == (rho, 20)
    assert found["epsilon_spent"] == spent(20 * rho, DELTA) <= 8.0
    assert found["releases_within_budget"] == Budget(8.0, DELTA).left(0.0, rho) >= 20
    assert found["noise_std_steps"] == plan.noise_stds[0]
    assert found["mean_noise_std"] == mean_noise(plan, 0, 50)
    assert found["mean_noise_relative"] == mean_noise(plan, 0, 50) / 2.5


def test_a_plan_without_privacy_has_none_of_it() -> None:
    facts = json.loads(run(secagg_app, *PLAN, "--format", "json").stdout)
    assert facts["privacy"] is None
    assert facts["norm_check"]["margin"] == NormCheck().margin
    topics = {fact["topic"] for fact in facts["explanation"]}
    assert not topics & {"privacy", "budget", "releases", "threshold", "update: privacy"}


def test_a_private_plan_for_people_says_who_adds_what_and_what_it_costs() -> None:
    result = run(secagg_app, *PLAN, "--privacy", "distributed", *BUDGET, "--rounds", 20)
    assert result.exit_code == 0, result.output
    for words in (
        "distributed, noise multiplier 2.852",
        "the noise of any 4 clients suffices",
        "epsilon 8 at delta 1e-05",
        "from each client",
        "in model units",
        "after 20",
        "the budget has room for 20",
    ):
        assert words in result.stdout, words


@pytest.mark.parametrize(("mode", "clients"), [("release", 1), ("distributed", 7), ("local", 7)])
def test_the_noise_of_a_mean_is_that_of_the_sum_by_the_clients(mode: str, clients: int) -> None:
    plan = make_plan(
        [FloatSegment("update", cohort.TENSORS, 3.0), IntegerSegment("counts", 20, 5)],
        max_clients=9,
        privacy=Privacy(mode, 2.0, 8.0, DELTA),
    )
    segment = plan.segments[0]
    assert isinstance(segment, FloatSegment)
    per_step = plan.noise_stds[0] * (clients if mode != "release" else 1) ** 0.5
    assert mean_noise(plan, 0, clients) == pytest.approx(per_step * segment.step / clients)
    assert mean_noise(plan, 1, 4) * 4 == plan.noise_stds[1] * (2.0 if mode != "release" else 1.0)
    assert mean_noise(plan_tensors(9, max_clients=3, clip=1.0), 0, 3) == 0.0
    topics = [fact.topic for fact in explain(plan)]
    assert topics.count("update: privacy") == topics.count("counts: privacy") == 1


def test_a_threshold_is_explained() -> None:
    plan = make_plan(
        [
            FloatSegment("update", (cohort.TENSORS[2],), 1.0, 12, rows=4),
            IntegerSegment("contributors", 4, 1, 2.0),
        ],
        max_clients=9,
        threshold=RowThreshold("contributors", 7),
    )
    (fact,) = [fact for fact in explain(plan) if fact.topic == "threshold"]
    assert "7 contributors" in fact.value


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--privacy", "release"), "--epsilon and --delta"),
        (("--privacy", "release", "--epsilon", 8), "delta=None"),
        (("--privacy", "release", "--delta", 1e-5), "epsilon=None"),
        (("--epsilon", 8, "--delta", 1e-5), "add --privacy release"),
        (("--noise-multiplier", 8), "add --privacy release"),
        (("--privacy", "release", *BUDGET, "--rounds", 0), "at least 1 release"),
        (("--privacy", "release", *BUDGET, "--weight-cap", 9), "use equal weights"),
        (("--privacy", "release", "--epsilon", -1, "--delta", 1e-5), "positive, finite epsilon"),
        (("--privacy", "release", "--epsilon", 1, "--delta", 1), "delta in (0, 1)"),
        (("--privacy", "release", *BUDGET, "--noise-multiplier", 0), "noise_multiplier from 0.01"),
        (("--privacy", "release", *BUDGET, "--honest-clients", 3), "in mode 'release'"),
        (("--privacy", "distributed", *BUDGET, "--honest-clients", 6), "honest_clients=5"),
    ],
)
def test_a_privacy_that_cannot_be_planned_ends_with_78(
    arguments: tuple[object, ...], text: str
) -> None:
    refused(run(secagg_app, *PLAN, *arguments), 78, text)


def test_an_unknown_mode_is_a_usage_error() -> None:
    assert run(secagg_app, *PLAN, "--privacy", "central", *BUDGET).exit_code == 2


@pytest.mark.parametrize("mode", ["release", "distributed", "local"])
def test_rounds_that_do_not_fit_are_refused_with_numbers_that_work(mode: str) -> None:
    asked = (*PLAN, "--privacy", mode, "--rounds", 40, "--delta", DELTA)
    result = run(secagg_app, *asked, "--epsilon", 2, "--noise-multiplier", 1.5)
    refused(result, 78, "room for 40 release(s)")
    noise = re.search(r"noise_multiplier of at least ([\d.e+]+)", result.stderr)
    epsilon = re.search(r"epsilon of at least ([\d.e+]+)", result.stderr)
    assert noise is not None
    assert epsilon is not None
    for works in (
        ("--epsilon", 2, "--noise-multiplier", noise[1]),
        ("--epsilon", epsilon[1], "--noise-multiplier", 1.5),
    ):
        assert run(secagg_app, *asked, *works).exit_code == 0, works


def test_noise_that_the_modulus_has_no_room_for_is_refused_with_a_number_that_works() -> None:
    asked = ("plan", "--clients", 1_000_000, "--parameters", 3000, "--bits", 16)
    asked += ("--privacy", "local", *BUDGET)
    result = run(secagg_app, *asked, "--noise-multiplier", 30_000)
    refused(result, 78, "would work")
    number = re.search(r"noise_multiplier=([\d.]+) would work", result.stderr)
    assert number is not None
    works = float(number[1])
    assert run(secagg_app, *asked, "--noise-multiplier", works).exit_code == 0
    assert run(secagg_app, *asked, "--noise-multiplier", works * 1.1).exit_code == 78


# --- secagg-server task -------------------------------------------------------------------------


def adaptive_spec(**changes: Any) -> TaskSpec:  # noqa: ANN401
    plan = make_plan(
        [
            FloatSegment("update", cohort.TENSORS, 2.0, 10, clip_bit=True),
            IntegerSegment("counts", cohort.COUNTS, 64, 200.0),
        ],
        max_clients=6,
        privacy=Privacy("distributed", 1.0, 10.0, DELTA),
    )
    return task(plan, adaptive_clip=AdaptiveClip(), **changes)


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[tuple[str, list[NDArray[np.int64]]]]:
    """The admin address of a server that has run the task to the end of its budget, and the counts
    that each round released, as its own plan reads them."""
    plans: list[Plan] = []
    counts = []

    async def work() -> None:
        async with running(tmp_path) as server:
            server.create(adaptive_spec(rounds=7))
            for number in (1, 2, 3):
                current = await server.collecting(number)
                plans.append(current.context.plan)
                server.send_all(current.context, range(3))
                server.clock.advance(DEADLINE_S)
                row = await server.ended(number)
                context = current.context
                release = Release(
                    context.plan,
                    context.rotation,
                    row.contributors,
                    server.sums(context.plan, number),
                )
                counts.append(release.total("counts"))
            await server.task_ended()

    asyncio.run(work())
    assert len({plan.digest for plan in plans}) == 3
    blobs = BlobStore(tmp_path / "blobs")
    roster = OpenEnrolment()
    with closing(Store(f"sqlite:///{tmp_path}/store.sqlite3")) as store:
        clock = SystemClock()
        holder = LocalKeyHolder()
        coordinator = Coordinator(store, blobs, OpenRounds(clock), holder, clock, roster)

        def add(server: grpc.aio.Server) -> None:
            service = OperatorService(store, blobs, coordinator, roster)
            operator_service_pb2_grpc.add_OperatorServiceServicer_to_server(service, server)

        with loop_thread() as thread, serving(thread, add) as address:
            yield address, counts


def test_a_finished_task_is_shown_with_its_budget_and_its_clip_norm(
    admin: tuple[str, list[NDArray[np.int64]]],
) -> None:
    at = ("--admin", admin[0], "--insecure")
    rho = release_rho(adaptive_spec().plan)
    result = run(server_app, "task", "show", "task", *at)
    assert result.exit_code == 0, result.output
    epsilon = spent(rho + rho + rho, DELTA)
    line = f"privacy: distributed noise, multiplier 1; epsilon {epsilon:.4g} of 10 spent"
    assert line in result.stdout
    assert "0 releases left" in result.stdout
    assert f"BUDGET_SPENT: 3 of 7 rounds released, epsilon {epsilon:.4g} of 10" in result.stdout
    assert "following the quantile 0.5 at rate 0.2" in result.stdout

    shown = json.loads(run(server_app, "task", "show", "task", *at, "--format", "json").stdout)
    assert shown["task"]["privacy"] == {
        "mode": "PRIVACY_MODE_DISTRIBUTED",
        "noise_multiplier": 1.0,
        "epsilon_spent": epsilon,
        "epsilon": 10.0,
        "delta": DELTA,
        "releases_left": "0",
    }
    clips = [row["clip"] for row in shown["rounds"]] + [shown["task"]["clip"]]
    assert clips[0] == 2.0
    assert len(set(clips)) == 4
    listed = json.loads(run(server_app, "task", "list", *at, "--format", "json").stdout)
    assert listed[0]["privacy"] == shown["task"]["privacy"]

    # Each round's sums are read with the signs of its own plan.
    for number in (1, 2, 3):
        output = Path(f"sums-{number}.npz")
        arguments = ("task", "sums", "task", number, "--output", output, *at)
        assert run(server_app, *arguments).exit_code == 0
        with np.load(output) as arrays:
            np.testing.assert_array_equal(arrays["counts"], admin[1][number - 1])
            assert arrays["counts"].any()


def test_a_note_of_the_server_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Noting:
        def __init__(self, address: str, kit: object) -> None:
            pass

        def create_task(self, spec: TaskSpec, model: bytes = b"") -> str:
            return "the budget is short"

    monkeypatch.setattr("secagg_server.config.Operator", Noting)
    sample = Path(__file__).parents[2] / "docs" / "samples" / "task.toml"
    result = run(server_app, "task", "create", sample, "--insecure")
    assert result.exit_code == 0, result.output
    assert "note: the budget is short" in result.stdout


# --- secagg-client prepare ----------------------------------------------------------------------

PREPARE = ("prepare", "work", "--dataset", "marketplace", "--silos", 4, "--rounds", 6)


@pytest.mark.parametrize("mode", ["release", "distributed", "local"])
def test_a_recommenders_task_is_made_private_in_one_command(mode: str) -> None:
    result = run(client_app, *PREPARE, "--privacy", mode, *BUDGET)
    assert result.exit_code == 0, result.output
    spec = read_task(Path("work/task.toml"))
    assert spec.plan.privacy is not None
    assert spec.plan.privacy.mode == mode
    assert (spec.plan.privacy.epsilon, spec.plan.privacy.delta) == (8.0, DELTA)
    assert spec.model is not None
    assert spec.model.weighting == "equal"
    assert spec.plan.norm_check is not None
    assert spec.check_budget() in (6, 7)


def test_a_recommenders_task_is_exact_unless_privacy_is_asked_for() -> None:
    assert run(client_app, *PREPARE).exit_code == 0
    spec = read_task(Path("work/task.toml"))
    assert spec.plan.privacy is None
    assert spec.model is not None
    assert spec.model.weighting == "samples"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--privacy", "release"), "epsilon=None"),
        (("--privacy", "release", "--epsilon", 8), "delta=None"),
        (("--epsilon", 8, "--delta", 1e-5), "privacy=None"),
        (
            ("--privacy", "central", *BUDGET),
            "'local'); got mode='central'",
        ),
        (("--privacy", "release", "--epsilon", 0, "--delta", 1e-5), "epsilon above 0"),
        (("--privacy", "release", "--epsilon", "nan", "--delta", 1e-5), "epsilon above 0"),
        (("--privacy", "release", "--epsilon", 8, "--delta", 0.5), "delta from 1e-30 to 0.1"),
    ],
)
def test_a_privacy_that_cannot_be_is_refused_before_anything_is_written(
    arguments: tuple[object, ...], text: str
) -> None:
    refused(run(client_app, *PREPARE, *arguments), 78, text)
    assert not Path("work").exists()
