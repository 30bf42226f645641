"""A silo's part in a task: private state on disk, repeatable rounds, recommendations afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from click.testing import Result
from federations import (
    CLIENTS,
    Site,
    key_holder_identity,
    new_federation,
    shared,
    site,
    swap_in,
)
from serving import loop_thread, quick_retry
from typer.testing import CliRunner

from secagg.compression import left_over
from secagg.errors import (
    ClosedError,
    ConfigurationError,
    DuplicateError,
    InputError,
    NoCertificateError,
    PausedError,
    SecaggError,
    UntrustedKeyError,
    WrongRoleError,
)
from secagg.keyholder import KeyHolder
from secagg.optimisers import Optimiser
from secagg.parameters import (
    FloatSegment,
    IntegerSegment,
    LowRank,
    Privacy,
    RandomSubset,
    RowThreshold,
    TensorSpec,
)
from secagg.planner import make_plan, plan_tensors
from secagg.quantize import quantize_integers
from secagg.receipts import SigningKey
from secagg.verdicts import Verdict
from secagg.wire import codec
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg_client.cli import app
from secagg_client.config import ClientSettings
from secagg_client.learners import Part, load_learner, load_silo
from secagg_client.ledger import Fate, Ledger
from secagg_client.participate import (
    Device,
    Participation,
    RoundReport,
    _counts,
    _rounding,
    participate,
)
from secagg_client.prepare import Wishes, prepare
from secagg_client.repeatable import repeatable_rounding
from secagg_client.serve import recommend_for
from secagg_client.session import ClientSession, Cost
from secagg_client.state_dir import StateDir
from secagg_recommender.example_privacy import PrivateSilo
from secagg_recommender.factorisation import init_shared
from secagg_recommender.interactions import DataError
from secagg_recommender.learner import Assignment, Work
from secagg_server.services import AggregationService
from secagg_server.states import TaskState
from secagg_server.stopping import Stop
from secagg_server.task_files import read_task

TASK = "recommender"
ITEMS = 300  # of the generated marketplace


def _settings(tmp_path: Path, **changes: Any) -> ClientSettings:  # noqa: ANN401
    values = {"dataset": "marketplace", "silos": 3, "dimensions": 4, "state_dir": tmp_path / "s"}
    return ClientSettings(**(values | changes))


def _costs(settings: ClientSettings) -> list[dict[str, Any]]:
    lines = (settings.state_dir / "costs.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _device(settings: ClientSettings) -> Device:
    """A client as it comes out of a start."""
    learner = load_learner(Part.of(settings), ["update"])
    return Device(learner, StateDir(settings.state_dir, settings.task))


class _Round:
    """A round that records what is contributed to it, or refuses it."""

    def __init__(self, number: int, refusal: Exception | None = None) -> None:
        self.number, self.rounds_total = number, 9
        self.context = KeyHolder(plan_tensors(10, max_clients=5, clip=1.0)).context
        self.model = type("Model", (), {"tensors": init_shared(ITEMS, 4, 0)})()
        self.refusal = refusal
        self.update: dict[str, Any] = {}
        self.samples = 0

    def contribute(self, contributions: dict[str, Any], *, samples: int) -> Cost:
        if self.refusal:
            raise self.refusal
        self.update, self.samples = contributions["update"], samples
        return Cost(0.1, 0.2, 0.3, 28672)


def _compressed(number: int, refusal: Exception | None = None) -> Any:  # noqa: ANN401
    """A round in whose plan an update travels as a fourth of its coordinates."""
    tensors = (TensorSpec("item_bias", (ITEMS,)), TensorSpec("item_factors", (ITEMS, 4)))
    update = FloatSegment("update", tensors, 40.0, compression=RandomSubset(0.25))
    current = _Round(number, refusal)
    plan = make_plan([update], max_clients=5)
    current.context = KeyHolder(plan, round_number=number).context
    return current


def _projected(current: Any) -> dict[str, Any]:  # noqa: ANN401
    """What a round has let through of its update."""
    (segment,) = current.context.plan.segments
    left = left_over(segment, current.update, current.context.rotation)
    return {name: value - left[name] for name, value in current.update.items()}


def test_private_files_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "private", TASK)
    state.identity()
    state.save(1, b"vectors", {"tensor": np.ones(2, np.float32)})
    state.note_cost("{}")
    for path in (tmp_path / "private").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o700


def test_identity_stays_the_same_over_restarts_and_differs_between_clients(tmp_path: Path) -> None:
    first = StateDir(tmp_path / "a", TASK).identity().public
    assert StateDir(tmp_path / "a", TASK).identity().public == first
    assert StateDir(tmp_path / "b", TASK).identity().public != first


def test_looking_for_state_creates_nothing(tmp_path: Path) -> None:
    assert StateDir(tmp_path / "absent", TASK).latest_vectors() is None
    assert StateDir(tmp_path / "absent", TASK).before(3) == (None, {})
    assert not (tmp_path / "absent").exists()


def test_state_before_a_round_is_that_of_the_last_earlier_one(tmp_path: Path) -> None:
    state = StateDir(tmp_path, TASK)
    for number in (1, 2, 9, 10):
        state.save(number, b"%d" % number)
    assert state.before(10) == (b"9", {})
    assert state.before(11) == (b"10", {})
    assert state.latest_vectors() == b"10"
    assert state.before(9) == (None, {}), "only the two newest are kept"


def test_another_attempt_at_a_round_contributes_the_same_update(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    device = _device(settings)
    device.take_part(_Round(1))  # type: ignore[arg-type]
    first, again = _Round(2), _Round(2)
    device.take_part(first)  # type: ignore[arg-type]
    _device(settings).take_part(again)  # type: ignore[arg-type]
    for name, value in first.update.items():
        assert np.array_equal(value, again.update[name])
    assert first.samples == again.samples > 0


@pytest.mark.parametrize(
    "refusal", [ClosedError("late"), DuplicateError("second"), PausedError("by its user")]
)
def test_a_missed_round_leaves_the_private_state_as_it_was(
    tmp_path: Path, refusal: Exception
) -> None:
    settings = _settings(tmp_path)
    assert _device(settings).take_part(_Round(1, refusal)) is None  # type: ignore[arg-type]
    assert StateDir(settings.state_dir, settings.task).latest_vectors() is None
    assert not (settings.state_dir / "costs.jsonl").exists()


def test_what_compression_leaves_out_goes_into_the_next_update(tmp_path: Path) -> None:
    """And whatever has been let through by then, nothing else is lost."""
    settings, whole = _settings(tmp_path), _settings(tmp_path, state_dir=tmp_path / "whole")
    device, other = _device(settings), _device(whole)
    owed: dict[str, Any] = {}
    for number in (1, 2, 3):
        current, plain = _compressed(number), _Round(number)
        device.take_part(current)
        other.take_part(plain)  # type: ignore[arg-type]
        for name, value in plain.update.items():
            expected = value + owed.get(name, 0.0)
            np.testing.assert_allclose(current.update[name], expected, atol=1e-6)
            owed[name] = expected - _projected(current)[name]
        assert any(np.abs(value).max() > 0 for value in owed.values())


def test_without_feedback_what_is_left_out_is_gone(tmp_path: Path) -> None:
    learner = load_learner(Part.of(_settings(tmp_path)), ["update"])
    device = Device(learner, StateDir(tmp_path / "s", TASK), feedback=False)
    other = _device(_settings(tmp_path, state_dir=tmp_path / "whole"))
    for number in (1, 2):
        current, plain = _compressed(number), _Round(number)
        device.take_part(current)
        other.take_part(plain)  # type: ignore[arg-type]
        for name, value in plain.update.items():
            np.testing.assert_array_equal(current.update[name], value)
    assert not list((tmp_path / "s").glob("left-over-*"))


def test_another_attempt_starts_from_the_same_left_overs(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    device = _device(settings)
    device.take_part(_compressed(1))
    rounds = [_compressed(2) for _ in range(3)]
    device.take_part(rounds[0])
    device.take_part(rounds[1])
    _device(settings).take_part(rounds[2])
    for name, value in rounds[0].update.items():
        np.testing.assert_array_equal(value, rounds[1].update[name])
        np.testing.assert_array_equal(value, rounds[2].update[name])


def test_another_attempt_at_the_first_round_starts_from_the_beginning(tmp_path: Path) -> None:
    device, rounds = _device(_settings(tmp_path)), [_Round(1), _Round(1)]
    for current in rounds:
        device.take_part(current)  # type: ignore[arg-type]
    for name, value in rounds[0].update.items():
        np.testing.assert_array_equal(value, rounds[1].update[name])


def test_what_a_missed_round_left_out_is_forgotten_with_it(tmp_path: Path) -> None:
    device = _device(_settings(tmp_path))
    device.take_part(_compressed(1))
    before = sorted((tmp_path / "s").iterdir())
    assert [path.name for path in before] == [f"left-over-{TASK}.1.npz", f"vectors-{TASK}.1.npz"]
    assert device.take_part(_compressed(2, ClosedError("late"))) is None
    assert sorted((tmp_path / "s").iterdir()) == before


@pytest.mark.parametrize("other", ["b", "a.1", "a.", "1", "10", "*", "a.1.npz"])
def test_what_is_remembered_for_one_task_is_nothing_to_another(tmp_path: Path, other: str) -> None:
    """Rounds of every task begin at 1, and one that is over may have come further."""
    first, second = StateDir(tmp_path, "a"), StateDir(tmp_path, other)
    for number in (9, 10):
        first.save(number, b"a%d" % number)
    assert second.before(11) == (None, {})
    for number in (1, 2, 3):
        assert second.before(number)[0] == (b"b%d" % (number - 1) if number > 1 else None)
        second.save(number, b"b%d" % number, {"tensor": np.ones(1, np.float32)})
    assert second.latest_vectors() == b"b3"
    assert first.before(11) == (b"a10", {})
    assert first.before(10) == (b"a9", {})


def test_what_an_older_version_remembered_is_gone_on_from(tmp_path: Path) -> None:
    """It had no task's name; the first task that goes on from it replaces it."""
    for number in (9, 10):
        (tmp_path / f"vectors-{number}.npz").write_bytes(b"old%d" % number)
        np.savez(tmp_path / f"left-over-{number}.npz", tensor=np.full(1, number, np.float32))
    state = StateDir(tmp_path, TASK)
    assert state.latest_vectors() == b"old10"
    found, rest = state.before(11)
    assert (found, rest["tensor"]) == (b"old10", [10.0])
    state.save(11, b"new11")
    assert state.before(11)[0] == b"old10"  # another attempt at it
    state.save(12, b"new12")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"vectors-{TASK}.11.npz", f"vectors-{TASK}.12.npz",
    ]  # fmt: skip
    # A task that begins at 1, where what is there has come further.
    (tmp_path / "vectors-30.npz").write_bytes(b"old30")
    other = StateDir(tmp_path, "other")
    assert other.before(1) == (None, {})
    other.save(1, b"new1")
    assert other.latest_vectors() == b"new1"
    assert other.before(2)[0] == b"new1"


def test_left_overs_go_with_the_vectors_of_their_round(tmp_path: Path) -> None:
    state = StateDir(tmp_path, TASK)
    for number in (1, 2, 3):
        state.save(number, b"state", {"tensor": np.full(2, number, np.float32)})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"left-over-{TASK}.2.npz", f"left-over-{TASK}.3.npz",
        f"vectors-{TASK}.2.npz", f"vectors-{TASK}.3.npz",
    ]  # fmt: skip
    found, rest = state.before(3)
    assert found == b"state"
    np.testing.assert_array_equal(rest["tensor"], [2, 2])
    # A crash between the two files: the round is none that is remembered.
    (tmp_path / f"vectors-{TASK}.3.npz").unlink()
    np.testing.assert_array_equal(state.before(4)[1]["tensor"], [2, 2])


def test_left_overs_of_another_task_are_refused(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    device, state = _device(settings), StateDir(settings.state_dir, settings.task)
    device.take_part(_compressed(1))
    vectors = state.latest_vectors()
    assert vectors is not None
    state.save(1, vectors, {"item_bias": np.zeros(7, np.float32)})
    with pytest.raises(DataError, match="directory of its own for each"):
        device.take_part(_compressed(2))
    (settings.state_dir / f"left-over-{TASK}.1.npz").write_bytes(b"damaged")
    with pytest.raises(InputError, match=rf"left-over-{TASK}\.1"):
        device.take_part(_compressed(2))


class _SitsOut:
    """A learner without anything to say."""

    items = np.zeros(0, dtype=np.int64)

    def work(self, assignment: Assignment) -> Work | None:
        self.assignment = assignment
        return None

    def state(self) -> bytes:
        return b"state"

    def restore(self, state: bytes) -> None:
        assert state == b"state"


def test_a_device_that_sits_a_round_out_contributes_and_keeps_nothing(tmp_path: Path) -> None:
    learner = _SitsOut()
    current = _Round(4, AssertionError("nothing may be sent"))
    assert Device(learner, StateDir(tmp_path, TASK)).take_part(current) is None  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    asked = learner.assignment
    assert (asked.number, asked.rounds) == (4, 9)
    assert asked.upload_bytes == current.context.plan.payload_bytes
    assert list(asked.segments) == ["update"]


def test_a_model_that_is_counted_takes_part_like_one_that_is_trained(tmp_path: Path) -> None:
    settings = _settings(tmp_path, model="ease")
    triangle = ITEMS * (ITEMS + 1) // 2
    current = _Round(1)
    plan = make_plan([IntegerSegment("gram", triangle, 1000)], max_clients=5)
    current.context = KeyHolder(plan).context
    sent: dict[str, Any] = {}
    current.contribute = lambda made, samples: sent.update(made) or Cost(0.0, 0.0, 0.0, 1)  # type: ignore[method-assign,func-returns-value]
    learner = load_learner(Part.of(settings), ["gram"])
    assert (
        Device(learner, StateDir(settings.state_dir, settings.task)).take_part(current) is not None
    )  # type: ignore[arg-type]
    assert sent.keys() == {"gram"}
    assert sent["gram"].shape == (triangle,)


def test_a_figure_is_told_where_the_plan_asks_for_it(tmp_path: Path) -> None:
    learner = load_learner(Part.of(_settings(tmp_path)), ["update", "validation"])
    plain = load_learner(Part.of(_settings(tmp_path)), ["update"])
    assert learner.items.size <= plain.items.size
    tensors = (TensorSpec("item_bias", (ITEMS,)), TensorSpec("item_factors", (ITEMS, 4)))
    segments = {
        "update": FloatSegment("update", tensors, 1.0),
        "validation": IntegerSegment("validation", 2, 600),
    }
    work = learner.work(Assignment(1, init_shared(ITEMS, 4, 0), segments))
    assert work is not None
    hits, users = np.asarray(work.arrays["validation"]).tolist()
    assert 0 <= hits <= users == 200


def test_the_record_of_costs_says_nothing_about_the_data(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    report = _device(settings).take_part(_Round(1))  # type: ignore[arg-type]
    assert report is not None
    assert asdict(report).keys() == {
        "round_number", "train_s", "quantize_s", "encrypt_s", "upload_s", "upload_bytes",
        "accepted",
    }  # fmt: skip


def test_a_silo_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="silo"):
        Part.of(_settings(tmp_path, silo=3))


def test_a_silo_with_an_example_budget_trains_by_noisy_steps(tmp_path: Path) -> None:
    """And remembers them over a restart; opacus is an extra, and loads here."""
    wanted = {
        "example_epsilon": 4.0,
        "example_rounds": 2,
        "example_steps": 2,
        "example_samples": 1000,
    }
    silo = load_silo(Part.of(_settings(tmp_path, **wanted)))
    assert isinstance(silo, PrivateSilo)
    table = init_shared(ITEMS, 4, 0)
    first = silo.train(table, 1)
    assert first.samples == 1000
    again = load_silo(Part.of(_settings(tmp_path, **wanted)))
    assert isinstance(again, PrivateSilo)
    assert (again.steps, again.epsilon) == (silo.steps, silo.epsilon)
    assert again.epsilon > 0
    again.train({name: part + first.update[name] for name, part in table.items()}, 2)
    with pytest.raises(ConfigurationError, match="epsilon"):
        again.train(table, 3)


@pytest.mark.parametrize("most", [None, 7])
def test_a_silo_counts_the_items_it_has_where_rows_are_withheld(
    tmp_path: Path, most: int | None
) -> None:
    """Of no more items than the plan lets it, and of others in another round."""
    table = FloatSegment(
        "update",
        (TensorSpec("item_bias", (ITEMS,)), TensorSpec("item_factors", (ITEMS, 4))),
        1.0,
        13,
        rows=ITEMS,
    )
    norm = None if most is None else most**0.5
    counts = IntegerSegment("contributors", ITEMS, 1, norm)
    plan = make_plan([table, counts], max_clients=5, threshold=RowThreshold("contributors", 3))
    silo = load_learner(Part.of(_settings(tmp_path)), [])
    drawn = [_counts(plan, silo)["contributors"] for _ in range(2)]
    for counted in drawn:
        assert counted.shape == (ITEMS,)
        assert set(np.flatnonzero(counted)) <= set(silo.items.tolist())
        assert counted.sum() == (silo.items.size if most is None else most)
        quantize_integers(counts, counted, rotation=bytes(32))  # within what the plan allows
    assert np.array_equal(*drawn) == (most is None)
    assert _counts(plan_tensors(10, max_clients=5, clip=1.0), silo) == {}


def test_noise_from_a_seed_that_others_know_is_refused(tmp_path: Path) -> None:
    for mode, refused in (("release", False), ("distributed", True), ("local", True)):
        plan = plan_tensors(
            10, max_clients=5, clip=1.0, privacy=Privacy(mode, 1.0, epsilon=8.0, delta=1e-5)
        )
        rounding = _rounding(_settings(tmp_path, repeatable_seed=7))
        assert rounding is not None
        context = KeyHolder(plan).context
        if refused:
            with pytest.raises(ConfigurationError, match="takes the noise off"):
                rounding(context)
        else:
            rounding(context)


def test_repeatable_rounding_differs_between_silos_and_rounds() -> None:
    drawn = {
        repeatable_rounding(seed, silo, number).read(8)
        for seed in (0, 1)
        for silo in (0, 1)
        for number in (1, 2)
    }
    assert len(drawn) == 8
    assert repeatable_rounding(0, 1, 2).read(8) == repeatable_rounding(0, 1, 2).read(8)


def test_repeatable_rounding_is_refused_off_loopback(tmp_path: Path) -> None:
    identity = StateDir(tmp_path, TASK).identity()
    with pytest.raises(ConfigurationError, match="loopback"):
        ClientSession(
            "192.0.2.1:7400",
            "task",
            identity,
            insecure=True,
            rounding=lambda _context: repeatable_rounding(0, 0, 1),
        )


# --- with a kit ----------------------------------------------------------------------------------


class _Bent(AggregationService):
    """The real service, with verdicts that a test changes on their way out."""

    bend: Callable[[pb.GetVerdictResponse], None] = staticmethod(lambda _answer: None)

    async def GetVerdict(self, request: Any, context: Any) -> Any:  # noqa: ANN401
        """See the contract."""
        answer = await super().GetVerdict(request, context)
        self.bend(answer)
        return answer


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Site]:
    """All services of a federation, with a recommender's task of one round and a norm check."""
    prepare(_settings(tmp_path), tmp_path / "work", Wishes(rounds=1))
    federation = new_federation(tmp_path / "federation")
    with (
        loop_thread() as thread,
        site(thread, tmp_path / "site", federation, service=_Bent) as running,
    ):
        running.create(
            replace(read_task(tmp_path / "work" / "task.toml"), round_deadline_ms=600_000)
        )
        yield running


def _joining(made: Site, tmp_path: Path, number: int) -> ClientSettings:
    return _settings(
        tmp_path,
        server=made.server,
        kit=made.federation.kit(CLIENTS[number]),
        silo=number,
        state_dir=tmp_path / f"state-{number}",
    )


def _join(settings: ClientSettings) -> tuple[Participation, list[RoundReport]]:
    reports: list[RoundReport] = []
    return participate(settings, lambda report, _: reports.append(report)), reports


def test_silos_with_kits_take_part_until_the_task_ends(made: Site, tmp_path: Path) -> None:
    joining = [_joining(made, tmp_path, number) for number in range(3)]
    with ThreadPoolExecutor(3) as threads:
        for taken, reports in threads.map(_join, joining):
            assert taken == Participation(contributed=1, judged=1, refused=0)
            assert [(report.round_number, report.accepted) for report in reports] == [(1, True)]
    row = made.store.task("recommender")
    assert (row.state, row.model_version) == (TaskState.FINISHED, 1)
    (only,) = made.store.rounds("recommender")
    assert only.contributors == 3
    for settings in joining:
        names = {path.name for path in settings.state_dir.iterdir()}
        # The signing key is the kit's; none is made here.
        assert names == {
            "costs.jsonl",
            "ledger.jsonl",
            "upload-recommender.1.1",
            "vectors-recommender.1.npz",
        }
        assert [line["accepted"] for line in _costs(settings)] == [True]
        for path in settings.state_dir.iterdir():
            assert path.name == "costs.jsonl" or stat.S_IMODE(path.stat().st_mode) == 0o600


def _bend(made: Site, bend: Callable[[pb.GetVerdictResponse], None]) -> None:
    made.faces.bend = bend  # type: ignore[attr-defined]


def _run_join(
    made: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Result, ClientSettings]:
    """The command line of silo 0, beside the two others, and its settings."""
    # It would send the log of all tests that follow to a stream that is closed.
    monkeypatch.setattr("secagg_client.cli.logs.configure", lambda _level: None)
    joining = [_joining(made, tmp_path, number) for number in range(3)]
    given = joining[0].model_dump(exclude_unset=True)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    with ThreadPoolExecutor(2) as threads:
        others = [threads.submit(_join, settings) for settings in joining[1:]]
        result = CliRunner().invoke(app, ["join", *flags])
        for other in others:
            with contextlib.suppress(SecaggError):
                other.result()
    return result, joining[0]


def test_a_silo_whose_updates_are_refused_is_told_at_the_end(
    made: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = key_holder_identity(made.federation)

    def refuse(answer: pb.GetVerdictResponse) -> None:
        """As the key holder would, had it found the update too large."""
        verdict = codec.verdict_from_wire(answer.verdict)
        refused = Verdict.sign(holder, verdict.receipt, verdict.sketch_digest, accepted=False)
        answer.verdict.CopyFrom(codec.verdict_to_wire(refused))

    _bend(made, refuse)
    result, settings = _run_join(made, tmp_path, monkeypatch)
    assert result.exit_code == 0, result.output
    assert "contributed to 1 rounds" in result.output
    assert "refused in 1 of 1 rounds: the norm of the update" in result.output
    assert "check the clip norm, the data and the learning rate" in result.output
    assert [line["accepted"] for line in _costs(settings)] == [False]
    (entry,) = Ledger(settings.state_dir).entries()
    assert (entry.fate, entry.certain) == (Fate.REFUSED, True), "a pinned key holder signed it"


def test_a_silo_that_catches_the_server_stops_and_says_where_the_evidence_is(
    made: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forge(answer: pb.GetVerdictResponse) -> None:
        answer.challenge_key = bytes(range(32))

    _bend(made, forge)
    result, settings = _run_join(made, tmp_path, monkeypatch)
    assert result.exit_code == 77, result.output
    assert "FORGED_SKETCH" in result.output
    evidence = settings.state_dir / "evidence-recommender.1.1.pb"
    assert str(evidence) in result.output
    assert (settings.state_dir / "upload-recommender.1.1").exists()
    assert [line["accepted"] for line in _costs(settings)] == [None]


def test_a_verdict_counts_only_from_a_key_holder_in_the_kit(made: Site, tmp_path: Path) -> None:
    """The one that signed this endorsed the round, and is pinned no more."""
    settings = _joining(made, tmp_path, 0)
    pinned = made.federation.kit(CLIENTS[0]) / "key_holder.pub"
    another = SigningKey.generate().public.hex()

    def rotate(_answer: pb.GetVerdictResponse) -> None:
        swap_in(pinned, f"{another}\n".encode())

    _bend(made, rotate)
    with ThreadPoolExecutor(2) as threads:
        others = [threads.submit(_join, _joining(made, tmp_path, number)) for number in (1, 2)]
        with pytest.raises(UntrustedKeyError, match="verdict signed by the key holder"):
            _join(settings)
        assert [other.result()[0].judged for other in others] == [1, 1]


def _crashing(self: ClientSession, method: Any, request: Any) -> Any:  # noqa: ANN401
    if type(request).__name__ == "PutChunkRequest":
        raise KeyboardInterrupt
    return _CALL(self, method, request)


_CALL = ClientSession._call


def _crash(settings: ClientSettings) -> None:
    """Take part, and die once the upload is announced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClientSession, "_call", _crashing)
        with pytest.raises(KeyboardInterrupt):
            _join(settings)


def test_a_silo_that_crashed_sends_what_it_had_encrypted(made: Site, tmp_path: Path) -> None:
    joining = [_joining(made, tmp_path, number) for number in range(3)]
    _crash(joining[0])
    kept = (joining[0].state_dir / "upload-recommender.1.1").read_bytes()
    with ThreadPoolExecutor(3) as threads:
        assert [taken.contributed for taken, _ in threads.map(_join, joining)] == [1, 1, 1]
    assert (joining[0].state_dir / "upload-recommender.1.1").read_bytes() == kept


def test_a_silo_that_lost_what_it_had_encrypted_sits_the_round_out(
    made: Site, tmp_path: Path
) -> None:
    """Its upload is announced but not complete; another one would be a second."""
    settings = _joining(made, tmp_path, 0)
    _crash(settings)
    (settings.state_dir / "upload-recommender.1.1").unlink()
    device = _device(settings)
    with ClientSession(
        made.server,
        "recommender",
        settings.credentials(),
        outbox=settings.state_dir,
        retry=quick_retry(),
    ) as session:
        current = next(iter(session.rounds()))
        with structlog.testing.capture_logs() as log:
            assert device.take_part(current) is None
    assert [(line["event"], line["why"]) for line in log if line["log_level"] == "warning"] == [
        ("round_missed", "DUPLICATE_UPLOAD")
    ]
    assert made.store.counts(("recommender", 1, 1)).accepted == 0


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({}, ConfigurationError, "expected a kit for TLS; got none"),
        ({"kit": "alice", "insecure": True}, ConfigurationError, "got both"),
        ({"kit": "server"}, WrongRoleError, "kit of a client; got one of a server"),
        ({"kit": "admin"}, WrongRoleError, "kit of a client; got one of a operator"),
        ({"kit": "nowhere"}, NoCertificateError, "it is not there"),
    ],
)
def test_a_kit_that_cannot_be_used_is_told_before_anything_is_made(
    changes: dict[str, Any], kind: type[Exception], text: str, tmp_path: Path
) -> None:
    if "kit" in changes:
        name = changes["kit"]
        folder = tmp_path / "nowhere" if name == "nowhere" else shared().kit(name)
        changes = changes | {"kit": folder}
    settings = _settings(tmp_path, **changes)
    with pytest.raises(kind, match=text):
        participate(settings, lambda _report, _total: None)
    assert not (tmp_path / "s" / "costs.jsonl").exists()


def test_prepared_task_is_one_that_the_server_accepts(tmp_path: Path) -> None:
    prepare(_settings(tmp_path), tmp_path / "work", Wishes(rounds=7))
    spec = read_task(tmp_path / "work" / "task.toml")
    assert (spec.rounds, spec.plan.max_clients) == (7, 3)
    assert spec.model is not None
    assert spec.model.parameters == ITEMS * 5
    with np.load(tmp_path / "work" / "initial.npz") as initial:
        assert {name: initial[name].shape for name in initial.files} == {
            t.name: t.shape for t in spec.model.tensors
        } | {"item_labels": (ITEMS,)}


def _prepared(folder: Path, *options: str) -> Result:
    arguments = ["prepare", str(folder), "--dataset", "marketplace", "--silos", "3"]
    return CliRunner().invoke(app, [*arguments, "--dimensions", "4", *options])


def test_every_option_of_prepare_reaches_the_task(tmp_path: Path) -> None:
    options = "--rounds 9 --optimiser adam --server-rate 0.05 --low-rank 2 --bits 6 --patience 3"
    options += " --least-gain 0.01 --least-change 0.001 --weight-cap 99"
    result = _prepared(tmp_path, *options.split())
    assert result.exit_code == 0, result.output
    spec = read_task(tmp_path / "task.toml")
    assert spec.rounds == 9
    assert spec.optimiser == Optimiser("adam", 0.05)
    assert spec.stop == Stop(3, 0.001, "validation", 0.01)
    assert spec.model is not None
    assert (spec.model.bits, spec.model.weight_cap) == (6, 99)
    assert spec.model.compression == LowRank(2)
    assert _prepared(tmp_path, "--subset", "0.1").exit_code == 0
    again = read_task(tmp_path / "task.toml")
    assert again.model is not None
    assert again.model.compression == RandomSubset(0.1)
    assert (again.optimiser, again.stop) == (Optimiser(), None)


def test_a_task_can_start_from_a_trained_model(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert _prepared(first, "--seed", "1").exit_code == 0
    result = _prepared(second, "--pretrained", str(first / "initial.npz"))
    assert result.exit_code == 0, result.output
    assert "knows 300 of 300 items" in result.stdout
    with np.load(first / "initial.npz") as one, np.load(second / "initial.npz") as other:
        for name in one.files:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ("--low-rank 2 --subset 0.5", 78, "either --low-rank or --subset"),
        ("--subset 1.5", 78, "between 0 and 1"),
        ("--optimiser sgd", 78, "expected an optimiser in"),
        ("--optimiser adam --server-rate 0", 78, "learning_rate above 0"),
        ("--least-gain 0.1", 78, "expected --patience"),
        ("--model ease --low-rank 2", 78, "counted exactly"),
        ("--model ease --optimiser adam", 78, "counted exactly"),
        ("--pretrained nowhere.npz", 65, "nowhere.npz"),
        ("--pretrained narrow.npz", 65, "prepare with the model's dimensions"),
    ],
)
def test_wishes_that_cannot_be_met_are_told_by_their_name(
    options: str, code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("narrow.npz", **init_shared(ITEMS, 3, 0))  # type: ignore[arg-type]
    result = _prepared(tmp_path / "work", *options.split())
    assert result.exit_code == code, result.output
    assert said in " ".join(result.output.split())
    assert not (tmp_path / "work" / "initial.npz").exists()


def test_a_downloaded_model_can_name_its_items(made: Site, tmp_path: Path) -> None:
    kit, file = str(made.federation.kit(CLIENTS[0])), tmp_path / "out.npz"
    command = ["model", str(file), "--server", made.server, "--kit", kit]
    initial = tmp_path / "work" / "initial.npz"
    result = CliRunner().invoke(app, [*command, "--labels", str(initial)])
    assert result.exit_code == 0, result.output
    with np.load(file) as found, np.load(initial) as prepared:
        assert sorted(found.files) == sorted(prepared.files)
        assert {n: found[n].shape for n in found.files} == {
            n: prepared[n].shape for n in prepared.files
        }
        np.testing.assert_array_equal(found["item_labels"], prepared["item_labels"])
    file.unlink()
    np.savez(tmp_path / "none.npz", item_bias=np.zeros(3))
    result = CliRunner().invoke(app, [*command, "--labels", str(tmp_path / "none.npz")])
    assert result.exit_code == 65
    assert "item_labels" in result.output
    assert not file.exists()


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    file = tmp_path / "model.npz"
    np.savez(file, **init_shared(ITEMS, 4, 0))  # type: ignore[arg-type]
    return file


def test_a_user_is_never_recommended_what_they_own(tmp_path: Path, model_file: Path) -> None:
    settings = _settings(tmp_path)
    owned = {"3", "50", "120"}
    rows = recommend_for(settings, user=None, items="3, 50,120", top=ITEMS, model=model_file)
    assert len(rows) == ITEMS - len(owned)
    assert not owned & {row.item for row in rows}
    scores = [row.score for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(row.title for row in rows)


def test_a_trained_user_is_served_from_the_private_vector(tmp_path: Path, model_file: Path) -> None:
    settings = _settings(tmp_path)
    user = int(Part.of(settings).users[0])
    fitted = recommend_for(settings, user=str(user), items=None, top=5, model=model_file)
    _device(settings).take_part(_Round(1))  # type: ignore[arg-type]
    served = recommend_for(settings, user=str(user), items=None, top=5, model=model_file)
    assert [row.score for row in fitted] != [row.score for row in served]


@pytest.mark.parametrize(
    ("user", "items", "what"),
    [
        (None, None, "exactly one"),
        ("1", "2", "exactly one"),
        ("nobody", None, "user labels"),
        (None, "1,nothing", "item labels"),
        (None, " , ", "item labels"),
    ],
)
def test_unusable_requests_for_recommendations_say_why(
    tmp_path: Path, model_file: Path, user: str | None, items: str | None, what: str
) -> None:
    with pytest.raises(DataError, match=what):
        recommend_for(_settings(tmp_path), user=user, items=items, top=3, model=model_file)


def test_a_model_of_another_catalogue_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.npz"
    np.savez(file, **init_shared(10, 4, 0))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="expected a model of 300 items; got 10"):
        recommend_for(_settings(tmp_path), user="1", items=None, top=3, model=file)


@pytest.mark.parametrize("content", [b"", b"not a model", b"PK\x03\x04 broken"])
def test_a_broken_model_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.npz"
    file.write_bytes(content)
    with pytest.raises(InputError, match="npz"):
        recommend_for(_settings(tmp_path), user="1", items=None, top=3, model=file)


def test_wrong_settings_are_told_without_waiting_for_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from secagg_client.cli import app\n"
        "result = CliRunner().invoke(app, ['join', '--dataset', 'unknown'])\n"
        "assert result.exit_code == 78, result.output\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=tmp_path,
                   env=os.environ)  # fmt: skip
