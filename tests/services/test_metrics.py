"""What the services measure: as often as it happened, once each, and of nobody."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cohort
import grpc
import grpc.aio
import numpy as np
import pytest
import worker_tasks
from clocks import EPOCH, FakeTime
from desks import Desk, desk_for
from federations import ALLOWED, kit, shared
from key_holders import LocalKeyHolder, durable_rounds
from scrapes import by_label, samples, total, value
from servers import DEADLINE_S, DOWN, Killed, Server, dies_at, running, scenario, task
from serving import loop_thread, serving
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from secagg import instruments
from secagg.accounting import spent
from secagg.context import RoundContext
from secagg.encryptor import encrypt_quantized
from secagg.enrolment import OpenEnrolment
from secagg.errors import (
    ClosedError,
    DuplicateError,
    MalformedError,
    OverloadedError,
    ReleaseError,
    SecaggError,
    StorageError,
    UnavailableError,
)
from secagg.instruments import OTHER, Instrument, Kind, Meter
from secagg.parameters import (
    FloatSegment,
    IntegerSegment,
    NormCheck,
    Plan,
    Privacy,
)
from secagg.planner import make_plan, noise_headroom
from secagg.privacy import release_rho
from secagg.quantize import Quantized
from secagg.residues import ResidueSum, folded, widen
from secagg.rpc import channels
from secagg.rpc import metrics as shared_metrics
from secagg.rpc.gatekeeper import Gatekeeper, metadata
from secagg.rpc.status import from_rpc_error, translated
from secagg.rpc.workers import Workers
from secagg.upload import Upload
from secagg.wire import codec
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import aggregation_service_pb2_grpc, key_holder_service_pb2_grpc
from secagg.wire.v1 import key_holder_service_pb2 as kh
from secagg_keyholder import gauges as holder_gauges
from secagg_keyholder import ledger as holder_ledger
from secagg_keyholder import metrics as holder_metrics
from secagg_keyholder.policy import Policy
from secagg_keyholder.service import KeyHolderService
from secagg_server import gauges as server_gauges
from secagg_server import metrics as server_metrics
from secagg_server import tally, transactions
from secagg_server.key_holder import KEY_HOLDER_ATTEMPTS
from secagg_server.services import AggregationService
from secagg_server.states import TaskState
from secagg_server.store import Store
from secagg_server.tally import Refusals, Tally

LISTS = {"server": server_metrics.METRICS, "key holder": holder_metrics.METRICS}
DELTA = 1e-5
KEY = {"task": "a-task", "round": 1, "attempt": 1}


@pytest.fixture
def meter() -> Meter:
    return Meter(server_metrics.METRICS)


@pytest.fixture
def holder_meter() -> Meter:
    return Meter(holder_metrics.METRICS)


# --- the lists ------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", LISTS)
def test_everything_is_declared_once_and_explained_in_a_sentence(service: str) -> None:
    declared = LISTS[service]
    for names in ([each.name for each in declared], [each.prometheus for each in declared]):
        assert len(names) == len(set(names))
    for each in declared:
        assert re.fullmatch(r"[A-Z1-9].*\.", each.about), each.name
        assert all(values for values in each.labels.values()), each.name
    ours = [each for each in declared if not each.name.startswith("rpc.")]
    assert all(each.name.startswith("secagg.") for each in ours)


def test_reasons_are_those_that_travel_on_the_wire_and_one_for_the_rest() -> None:
    assert "ROUND_CLOSED" in shared_metrics.REASONS
    assert shared_metrics.REASONS[-1] == OTHER
    assert set(server_metrics.REJECTED.labels["reason"]) > set(shared_metrics.REASONS)


@pytest.mark.parametrize("service", LISTS)
def test_a_scrape_begins_with_every_label_at_zero(service: str) -> None:
    declared = LISTS[service]
    found = samples(Meter(declared))
    assert set(found.values()) == {0.0}
    shown = {name for name, _ in found}
    for each in declared:
        suffix = "_count" if each.kind is Kind.HISTOGRAM else ""
        assert (each.prometheus + suffix in shown) == (each.kind is not Kind.GAUGE), each.name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("service", LISTS)
def test_prometheus_own_linter_finds_nothing(service: str) -> None:
    meter = Meter(LISTS[service], process=True)
    for each in LISTS[service]:
        if each.kind is Kind.GAUGE:
            meter.set(each, 1.0, **dict.fromkeys(each.label_names, OTHER))
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=meter.exposition(), capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


# --- a day of both services -----------------------------------------------------------------------

NORM = cohort.mixed_plan(norm_check=NormCheck(sketches=8))


@dataclass
class Day:
    """Both meters after everything has happened that is measured, and who took part."""

    server: Meter
    key_holder: Meter
    secrets: set[str] = field(default_factory=set)
    seen: dict[str, Any] = field(default_factory=dict)

    def sent(self, upload: Upload) -> Upload:
        receipt = upload.admission.receipt
        named = (receipt.upload_digest, receipt.client_key, receipt.context.digest)
        self.secrets |= {each.hex() for each in named}
        return upload


def private_plan(releases: int) -> Plan:
    """Counts with noise, and a budget with room for so many releases."""

    def plan(epsilon: float) -> Plan:
        return make_plan(
            [
                FloatSegment("update", cohort.TENSORS, 2.0, 10),
                IntegerSegment("counts", cohort.COUNTS, 64, 200.0),
            ],
            max_clients=6,
            privacy=Privacy("release", 1.0, epsilon, DELTA),
        )

    return plan(spent(releases * release_rho(plan(1.0)), DELTA) * 1.0001)


def beyond(context: RoundContext, index: int, commitment: bytes) -> Upload:
    """Client i's upload with counts of ten times the norm that is allowed."""
    layout = context.plan.layouts[-1]
    largest = round(10 * layout.norm / layout.values**0.5)
    counts = Quantized(np.where(np.arange(layout.values) % 2, largest, -largest))
    parts = [*cohort.quantized(context, index)[:-1], counts]
    return encrypt_quantized(context, parts, cohort.identity(index), commitment)


async def a_norm_is_refused(day: Day, server: Server) -> None:
    server.create(task(NORM, rounds=1))
    context = (await server.collecting()).context
    server.send(context, day.sent(beyond(context, 1, server.commitment(1))), cohort.name_of(1))
    server.send_all(context, [0, 2, 5])
    server.clock.advance(DEADLINE_S)
    assert await server.task_ended() == (TaskState.FINISHED, "")


async def uploads_are_refused_in_every_way(day: Day, server: Server) -> None:
    server.create(task(cohort.mixed_plan(max_clients=8), rounds=1))
    context = (await server.collecting()).context
    gone = day.sent(cohort.encrypted(context, 6))
    key = cohort.identity(6).public
    server.send(context, gone, cohort.name_of(6))
    for _ in range(2):
        server.intake.withdraw(context.id, key, gone.admission.receipt.upload_digest)
    server.send(context, day.sent(cohort.off_grid(context, 1)))
    server.send(context, day.sent(cohort.broken_seal(context, 4)))
    server.send_all(context, [0, 2, 3, 5])
    another = day.sent(cohort.encrypted(context, 0))
    half = day.sent(cohort.encrypted(context, 7))
    server.intake.open(half.admission, cohort.name_of(7))
    named = (context.id, cohort.identity(7).public, half.admission.receipt.upload_digest)
    for _ in range(3):  # a client that has not heard the answer
        with pytest.raises(DuplicateError):
            server.intake.open(another.admission)
        with pytest.raises(MalformedError):
            server.intake.put_chunk(*named, 0, b"short")
    server.clock.advance(DEADLINE_S)
    assert await server.task_ended() == (TaskState.FINISHED, "")
    for _ in range(3):
        with pytest.raises(ClosedError):
            server.intake.put_chunk(*named, 0, half.payload)


async def rounds_fail(day: Day, server: Server, key_holder: LocalKeyHolder) -> None:
    key_holder.fail("release", DOWN, times=KEY_HOLDER_ATTEMPTS)
    server.create(task(rounds=1))
    for attempt, clients in ((1, 2), (2, 3)):
        server.send_all((await server.collecting(1, attempt)).context, range(clients))
        server.clock.advance(DEADLINE_S)
        await server.ended(1, attempt)
    assert await server.task_ended() == (TaskState.FINISHED, "")


async def a_budget_is_spent(day: Day, server: Server, key_holder: LocalKeyHolder) -> None:
    server.create(task(private_plan(3), rounds=3))
    server.send_all((await server.collecting(1)).context, range(3))
    server.clock.advance(DEADLINE_S)
    await server.ended(1)
    await server.collecting(2)
    own = kit(shared(), "server")
    server_gauges.watch(day.server, server.store, server.blobs, server.roster, own)
    ledger = key_holder.rounds._ledger
    holder_gauges.watch(
        day.key_holder, ledger, Policy(), server.roster, kit(shared(), "key-holder")
    )
    day.seen["server"], day.seen["key holder"] = samples(day.server), samples(day.key_holder)
    await server.coordinator.abort("task")
    # Nobody looks into a store that is going away.
    for each in (server_metrics.TASKS, server_metrics.OPEN_ROUNDS, server_metrics.PRIVACY_LEFT):
        day.server.watch(each, dict)


def calls_come_in(day: Day, server: Server, key_holder: LocalKeyHolder) -> None:
    """Over the network: a model is fetched; some are refused, one for want of room."""
    faces = AggregationService(
        *(server.store, server.blobs, server.rounds, server.intake, server.verdicts),
        meter=day.server,
    )

    def add(server: grpc.aio.Server) -> None:
        aggregation_service_pb2_grpc.add_AggregationServiceServicer_to_server(faces, server)
        key_holder_service_pb2_grpc.add_KeyHolderServiceServicer_to_server(
            KeyHolderService(key_holder.rounds), server
        )

    options: dict[str, Any] = {"timeout": 20, "metadata": metadata()}
    for meter, room in ((day.server, 0), (day.server, 5), (day.key_holder, 3)):
        keeper = Gatekeeper(ALLOWED, OpenEnrolment(), encrypted=False, in_flight=room, meter=meter)
        with (
            loop_thread() as thread,
            serving(thread, add, None, [keeper]) as address,
            channels.channel(address, None) as channel,
        ):
            client = aggregation_service_pb2_grpc.AggregationServiceStub(channel)
            holder = key_holder_service_pb2_grpc.KeyHolderServiceStub(channel)
            model = pb.GetModelRequest(task_id="task", version=0)
            if room == 0:
                assert refused(client.GetModel, model, **options) is OverloadedError
            elif room == 3:
                context = cohort.round_context(cohort.counts_plan(), task_id="unknown")
                ask = kh.JudgeUploadsRequest(context=codec.context_id_to_wire(context.id))
                assert refused(holder.JudgeUploads, ask, **options) is ClosedError
            else:
                day.seen["model"] = sum(len(client.GetModel(model, **options).data) for _ in "ab")
                unknown = pb.GetModelRequest(task_id="unknown")
                refused(client.GetModel, unknown, **options)
                refused(client.GetModel, model, timeout=20)


def refused(call: Any, request: object, **options: Any) -> type[SecaggError]:  # noqa: ANN401
    with pytest.raises(grpc.RpcError) as caught:
        call(request, **options)
    return type(from_rpc_error(caught.value))


def the_store_breaks(day: Day, folder: Path) -> None:
    server = Server(folder, meter=day.server)
    broken(server.store)
    with pytest.raises(StorageError):
        server.store.task("task")
    server.store.close()


def broken(store: Store) -> None:
    """No table is there any more."""
    with store.database.engine.begin() as connection:
        for table in ("audit", "uploads", "rounds", "tasks"):
            connection.execute(text(f"DROP TABLE {table}"))


@pytest.fixture(scope="module")
def day() -> Iterator[Day]:
    made = Day(Meter(server_metrics.METRICS), Meter(holder_metrics.METRICS))
    made.secrets |= {cohort.name_of(index) for index in range(8)} | {"alice", "admin"}
    roster = cohort.enrolment(range(8))
    workers = Workers(1, meter=made.server), Workers(1, meter=made.key_holder)

    async def work(folder: Path) -> None:
        for number, happens in enumerate(
            (a_norm_is_refused, uploads_are_refused_in_every_way, rounds_fail, a_budget_is_spent)
        ):
            key_holder = LocalKeyHolder(roster, meter=made.key_holder, compute=workers[1].run)
            measured: dict[str, Any] = {"meter": made.server, "compute": workers[0].run}
            path = folder / str(number)
            path.mkdir()
            async with running(path, key_holder, roster=roster, **measured) as server:
                others = [key_holder] if "key_holder" in happens.__annotations__ else []
                await happens(made, server, *others)
                made.secrets |= {context.id.round_key_id.hex() for context in key_holder.contexts}
                if happens is rounds_fail:
                    await asyncio.to_thread(calls_come_in, made, server, key_holder)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(work(Path(folder)))
        (Path(folder) / "broken").mkdir()
        the_store_breaks(made, Path(folder) / "broken")
    yield made
    for each in workers:
        each.close()


@pytest.mark.slow
@pytest.mark.parametrize("service", LISTS)
def test_every_instrument_of_the_list_moves(day: Day, service: str) -> None:
    meter = day.server if service == "server" else day.key_holder
    gauges = {name for name, _ in day.seen[service]}
    still = {
        each.name
        for each in LISTS[service]
        if not (each.prometheus in gauges if each.kind is Kind.GAUGE else total(meter, each))
    }
    # Whether it is ready, the monitor says; see its own tests.
    assert still == {shared_metrics.READY.name}
    operations = next(
        each for each in LISTS[service] if each.name == "secagg.crypto.operation.duration"
    )
    assert by_label(meter, operations).keys() == set(operations.labels["operation"])


@pytest.mark.slow
def test_the_server_counts_what_happened(day: Day) -> None:
    found = {
        each.name: by_label(day.server, each) if each.labels else total(day.server, each)
        for each in server_metrics.METRICS
        if each.kind is not Kind.GAUGE
    }
    payloads = 4 * NORM.payload_bytes + 7 * cohort.mixed_plan(max_clients=8).payload_bytes
    payloads += 5 * cohort.mixed_plan().payload_bytes + 3 * private_plan(3).payload_bytes
    wanted: dict[str, float | Mapping[str, float]] = {
        "secagg.rounds": {"DONE": 3, "ABORTED": 2, "VOID": 1},
        "secagg.rounds.failed": {"QUORUM_NOT_REACHED": 1, "UNAVAILABLE": 1, "ABORTED": 1},
        "secagg.round.duration": 3,
        "secagg.round.phase.duration": {
            "COLLECTING": 6,
            "CHECKING": 5,
            "SUMMING": 5,
            "RELEASING": 5,
            "AUDITING": 1,
        },
        "secagg.uploads.accepted": 4 + 7 + 5 + 3,
        "secagg.uploads.rejected": {
            "NORM_REFUSED": 1,
            "WITHDRAWN": 1,
            "OFF_GRID": 1,
            "INVALID_SEAL": 1,
            "DUPLICATE_UPLOAD": 1,
            "MALFORMED": 1,
            "ROUND_CLOSED": 1,
        },
        "secagg.uploads.received": payloads,
        "secagg.models.sent": day.seen["model"],
        "secagg.verdict.duration": 4,
        "secagg.noise.headroom": 3,
        "secagg.crypto.operation.duration": {
            # A chunk that is malformed is looked at each time.
            "validate": 4 + 7 + 5 + 3 + 3,
            "add": 1 + 2 + 1 + 1,
            "sketch": 4,
            # Of each sum, and of each upload that is audited.
            "low_bits": 1 + 2 + 1 + 1 + 5,
        },
        "rpc.server.call.duration": {"GetModel": 5},
        "secagg.calls.refused": {"OVERLOADED": 1, "CONFIGURATION": 1, "WIRE_VERSION": 1},
    }
    assert {name: found[name] for name in wanted} == wanted
    assert found["secagg.store.failures"] == 1
    assert found["secagg.workers.queue.wait"] == 4 + 10
    done = [(NORM, 3), (cohort.mixed_plan(max_clients=8), 4), (private_plan(3), 3)]
    headroom = value(day.server, f"{server_metrics.HEADROOM.prometheus}_sum")
    assert headroom == pytest.approx(sum(noise_headroom(*each) for each in done))


@pytest.mark.slow
def test_the_key_holder_counts_what_happened(day: Day) -> None:
    found = {
        each.name: by_label(day.key_holder, each) if each.labels else total(day.key_holder, each)
        for each in holder_metrics.METRICS
        if each.kind is not Kind.GAUGE
    }
    assert found == {
        "secagg.keyholder.uploads.judged": {"ACCEPTED": 4 + 5 + 3 + 3, "INVALID_SEAL": 1},
        "secagg.keyholder.norms.judged": {"accepted": 3, "refused": 1},
        "secagg.keyholder.noise.audited": {"fine": 4, "off_grid": 1},
        "secagg.keyholder.releases": {"released": 3, "refused": 1},
        "secagg.crypto.operation.duration": {
            "make_key": 6,
            "open_seals": 4,
            "judge_sketch": 4,
            # One that was refused came to no result.
            "check_sum": 4,
            "open_sum": 3,
            "audit_upload": 5,
        },
        "secagg.workers.queue.wait": 4 + 4 + 3 + 5,
        "rpc.server.call.duration": {"JudgeUploads": 1},
        "secagg.calls.refused": {"ROUND_CLOSED": 1},
    }


@pytest.mark.slow
def test_gauges_show_what_is_there(day: Day) -> None:
    left = 1 - spent(release_rho(private_plan(3)), DELTA) / private_plan(3).privacy.epsilon  # type: ignore[union-attr]
    server, holder = day.seen["server"], day.seen["key holder"]
    for state in TaskState:
        assert server["secagg_tasks", (("state", state),)] == (state is TaskState.RUNNING)
    for state in ("CREATED", "COLLECTING", "CHECKING", "SUMMING", "RELEASING", "AUDITING"):
        open_ = server["secagg_rounds_open", (("state", state),)]
        assert open_ == (state == "COLLECTING")
    assert server["secagg_privacy_budget_remaining_ratio", ()] == pytest.approx(left)
    assert holder["secagg_keyholder_privacy_budget_remaining_ratio", ()] == pytest.approx(left)
    assert holder["secagg_keyholder_rounds_open", ()] == 1
    assert holder["secagg_keyholder_attempts_remaining", ()] == Policy().attempts_per_model - 1
    assert server["secagg_disk_free_bytes", ()] > 0
    for found in (server, holder):
        assert found["secagg_enrolled_clients", ()] == 8
        assert found["secagg_certificate_expiry_timestamp_seconds", ()] > 1.7e9
        assert {v for (name, _), v in found.items() if name == "secagg_build_info"} == {1.0}
    shown = samples(day.server)
    assert shown["secagg_calls_limit", ()] == 5
    assert shown["secagg_calls_in_flight", ()] == 0
    assert shown["secagg_workers_queue_depth", ()] == 0


@pytest.mark.slow
def test_no_scrape_names_anybody_or_anything(day: Day) -> None:
    for meter, declared in ((day.server, LISTS["server"]), (day.key_holder, LISTS["key holder"])):
        shown = meter.exposition().decode()
        assert not [secret for secret in day.secrets if secret in shown]
        allowed = {str(v) for each in declared for values in each.labels.values() for v in values}
        for _, labels in samples(meter):
            assert {text for name, text in labels if name != "le"} <= allowed


@pytest.mark.slow
def test_nothing_takes_more_values_than_were_declared(day: Day) -> None:
    for meter, declared in ((day.server, LISTS["server"]), (day.key_holder, LISTS["key holder"])):
        before, after = samples(Meter(declared)), samples(meter)
        gauges = {each.prometheus for each in declared if each.kind is Kind.GAUGE}
        assert {name for name in after if name[0] not in gauges} == set(before)


# --- counting the audit log -----------------------------------------------------------------------


@pytest.fixture
def clock() -> FakeTime:
    return FakeTime()


@pytest.fixture
def counting(meter: Meter, clock: FakeTime) -> Tally:
    return Tally(meter, clock.clock)


def happens(counting: Tally, clock: FakeTime, *events: tuple[str, float]) -> None:
    """Events of one attempt, each so many seconds after the one before it."""
    for name, seconds in events:
        clock.now += seconds
        event, _, state = name.partition(" ")
        details = {"state": state} if event == "round-advanced" else {"reason": state}
        counting.changed(event, KEY | details)


def seconds_of(meter: Meter, instrument: Instrument, **labels: str) -> tuple[float, float]:
    """How many values, and their sum."""
    counted = value(meter, instrument, **labels)
    return counted, value(meter, f"{instrument.prometheus}_sum", **labels)


def test_phases_and_rounds_are_timed_from_entry_to_entry(
    meter: Meter, counting: Tally, clock: FakeTime
) -> None:
    happens(
        *(counting, clock, ("round-created", 5), ("round-opened", 1)),
        *(("round-advanced CHECKING", 10), ("norms-judged", 2), ("manifest-fixed", 1)),
        *(("round-advanced SUMMING", 0.5), ("round-advanced RELEASING", 4)),
        *(("round-advanced AUDITING", 3), ("round-audited", 6), ("manifest-fixed", 1)),
        *(("round-advanced SUMMING", 0), ("round-advanced RELEASING", 5), ("round-finished", 7)),
    )
    phases = {
        state: seconds_of(meter, server_metrics.PHASES, state=state)
        for state in ("COLLECTING", "CHECKING", "SUMMING", "RELEASING", "AUDITING")
    }
    assert phases == {
        "COLLECTING": (1, 10),
        "CHECKING": (1, 3.5),
        "SUMMING": (2, 9),
        "RELEASING": (2, 10),
        "AUDITING": (1, 7),
    }
    assert seconds_of(meter, server_metrics.VERDICTS) == (1, 2)
    assert seconds_of(meter, server_metrics.ROUND_DURATION) == (1, 39.5)
    assert by_label(meter, server_metrics.ROUNDS) == {"DONE": 1}


@pytest.mark.parametrize(
    ("event", "outcome"), [("round-aborted", "ABORTED"), ("round-voided", "VOID")]
)
def test_a_round_without_a_release_has_a_reason_and_no_duration(
    event: str, outcome: str, meter: Meter, counting: Tally, clock: FakeTime
) -> None:
    happens(counting, clock, ("round-opened", 0), (f"{event} QUORUM_NOT_REACHED", 9))
    happens(counting, clock, (f"{event} INVENTED", 9))
    assert by_label(meter, server_metrics.ROUNDS) == {outcome: 2}
    failures = by_label(meter, server_metrics.ROUND_FAILURES)
    assert failures == {"QUORUM_NOT_REACHED": 1, OTHER: 1}
    assert seconds_of(meter, server_metrics.PHASES, state="COLLECTING") == (1, 9)
    assert total(meter, server_metrics.ROUND_DURATION) == 0
    assert total(meter, server_metrics.VERDICTS) == 0


@pytest.mark.parametrize("left", ["CHECKING", "SUMMING", "RELEASING", "AUDITING"])
def test_what_began_before_a_restart_is_counted_and_not_timed(
    left: str, meter: Meter, counting: Tally, clock: FakeTime
) -> None:
    after = {"CHECKING": "SUMMING", "SUMMING": "", "RELEASING": "AUDITING", "AUDITING": "SUMMING"}
    if state := after[left]:
        happens(counting, clock, ("manifest-fixed", 3), (f"round-advanced {state}", 1))
        happens(counting, clock, ("manifest-fixed", 3))
    happens(counting, clock, ("round-finished", 2))
    assert by_label(meter, server_metrics.ROUNDS) == {"DONE": 1}
    assert total(meter, server_metrics.ROUND_DURATION) == 0
    assert total(meter, server_metrics.VERDICTS) == 0
    assert total(meter, server_metrics.PHASES) == bool(state)


def test_nothing_is_remembered_of_rounds_that_have_ended(counting: Tally, clock: FakeTime) -> None:
    for event in ("round-finished", "round-aborted", "round-voided"):
        happens(counting, clock, ("round-opened", 1), ("round-advanced CHECKING", 1), (event, 1))
    assert counting._open == {}


def test_entries_that_nobody_counts_are_none_of_its_business(meter: Meter, counting: Tally) -> None:
    for event in ("task-created", "upload-announced", "retained-dropped", "invented", ""):
        counting.changed(event, {"task": "a", "anything": None})
    assert set(samples(meter).values()) == {0.0}


def test_a_refusal_counts_once_for_each_upload_and_reason(meter: Meter) -> None:
    refusals = Refusals(meter)
    context = cohort.round_context(cohort.counts_plan()).id
    for _ in range(3):
        for digest in (b"a", b"b"):
            for reason in ("MALFORMED", "ROUND_CLOSED", "invented"):
                refusals.add(context, digest, reason)
    assert by_label(meter, server_metrics.REJECTED) == {"MALFORMED": 2, "ROUND_CLOSED": 2, OTHER: 2}


def test_refusals_are_not_remembered_without_end(
    meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tally, "_REMEMBERED", 10)
    refusals = Refusals(meter)
    context = cohort.round_context(cohort.counts_plan()).id
    for number in range(100):
        refusals.add(context, number.to_bytes(4, "big"), "MALFORMED")
        refusals.add(context, b"the same", "MALFORMED")
    assert len(refusals._seen) == 10
    assert total(meter, server_metrics.REJECTED) == 101


# --- what is done again counts once ---------------------------------------------------------------


@pytest.fixture
def desk(tmp_path: Path, meter: Meter) -> Iterator[Desk]:
    made = desk_for(cohort.mixed_plan(max_clients=3), tmp_path, meter=meter)
    yield made
    made.store.close()


def test_every_step_of_an_upload_may_be_repeated(desk: Desk, meter: Meter) -> None:
    upload = cohort.noise_upload(desk.context, 0)
    for _ in range(3):
        desk.announce(upload)
        desk.put(upload, 0)
    for _ in range(3):
        desk.commit(upload)
    # A chunk that was on its way when the upload was complete is refused, and the upload is not.
    with pytest.raises(ClosedError):
        desk.put(upload, 0)
    assert total(meter, server_metrics.ACCEPTED) == 1
    assert total(meter, server_metrics.REJECTED) == 0
    assert total(meter, server_metrics.BYTES_IN) == len(upload.payload)


def test_a_withdrawal_may_be_repeated_and_is_the_only_reason(desk: Desk, meter: Meter) -> None:
    upload = cohort.noise_upload(desk.context, 0)
    receipt = upload.admission.receipt
    desk.send(upload)
    for _ in range(3):
        desk.intake.withdraw(receipt.context, receipt.client_key, receipt.upload_digest)
        with pytest.raises(ClosedError):
            desk.put(upload, 0)
    assert by_label(meter, server_metrics.REJECTED) == {"WITHDRAWN": 1}


def test_an_upload_that_is_mended_is_refused_once_and_accepted_once(
    desk: Desk, meter: Meter
) -> None:
    upload = cohort.noise_upload(desk.context, 0)
    desk.announce(upload)
    for _ in range(2):
        with pytest.raises(MalformedError):
            desk.put(upload, 0, cohort.ABOVE_MODULUS + upload.payload[7:])
    desk.send(upload)
    assert by_label(meter, server_metrics.REJECTED) == {"MALFORMED": 1}
    assert total(meter, server_metrics.ACCEPTED) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), None])
def test_an_upload_that_may_come_again_as_it_is_was_not_refused(
    error: OSError | None, desk: Desk, meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = cohort.noise_upload(desk.context, 0)
    desk.announce(upload)

    def full(*_: object) -> bool:
        raise error or DOWN

    monkeypatch.setattr(desk.blobs, "put_chunk", full)
    with pytest.raises(UnavailableError if error is None else OverloadedError):
        desk.put(upload, 0)
    assert total(meter, server_metrics.REJECTED) == 0
    assert total(meter, server_metrics.BYTES_IN) == 0


def test_a_transaction_that_is_tried_again_is_counted_once(desk: Desk, meter: Meter) -> None:
    before = total(meter, server_metrics.TRANSACTIONS)
    tries: list[int] = []

    def work(session: Session) -> None:
        transactions.noted(session, "upload-accepted", {})
        tries.append(1)
        if len(tries) < 3:
            raise OperationalError("", None, locked())

    desk.store.database.write(work)
    assert len(tries) == 3
    assert total(meter, server_metrics.ACCEPTED) == 1
    assert total(meter, server_metrics.TRANSACTIONS) == before + 1
    assert total(meter, server_metrics.STORE_FAILURES) == 0


def locked() -> Exception:
    error = transactions.sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = transactions.sqlite3.SQLITE_BUSY
    return error


@pytest.mark.parametrize("error", [ClosedError("text"), OperationalError("", None, Exception())])
def test_what_is_rolled_back_did_not_happen(error: Exception, desk: Desk, meter: Meter) -> None:
    def work(session: Session) -> None:
        transactions.noted(session, "upload-accepted", {})
        raise error

    with pytest.raises((ClosedError, StorageError)):
        desk.store.database.write(work)
    assert total(meter, server_metrics.ACCEPTED) == 0
    assert total(meter, server_metrics.STORE_FAILURES) == isinstance(error, OperationalError)


CRASHES = ["reject_upload", "record_manifest", "finish_round"]


@pytest.mark.parametrize("method", CRASHES)
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_restart_counts_nothing_twice(method: str, done: bool, tmp_path: Path) -> None:
    """One meter over both lives: whatever is in the store by then is not counted again."""
    meter, holder_meter = Meter(server_metrics.METRICS), Meter(holder_metrics.METRICS)

    async def work() -> None:
        key_holder = LocalKeyHolder(meter=holder_meter)
        server = Server(tmp_path, key_holder, meter=meter)
        dies_at(server.store, method, done=done)
        server.create(task(rounds=1))
        context = (await server.collecting()).context
        server.send(context, cohort.broken_seal(context, 4))
        server.send_all(context, range(3))
        server.clock.advance(DEADLINE_S)
        with pytest.raises(Killed):
            await server.coordinator._running["task"]
        server.store.close()
        key_holder.restart()
        async with running(tmp_path, key_holder, meter=meter, clock=server.clock) as again:
            again.coordinator.resume()
            await again.task_ended()

    asyncio.run(work())
    assert by_label(meter, server_metrics.ROUNDS) == {"DONE": 1}
    assert by_label(meter, server_metrics.REJECTED) == {"INVALID_SEAL": 1}
    assert total(meter, server_metrics.ACCEPTED) == 4
    assert by_label(holder_meter, holder_metrics.RELEASES) == {"released": 1}
    judged = by_label(holder_meter, holder_metrics.JUDGED)
    assert judged == {"ACCEPTED": 3, "INVALID_SEAL": 1}


def test_the_key_holder_counts_no_answer_twice(tmp_path: Path, holder_meter: Meter) -> None:
    rounds = durable_rounds(tmp_path, meter=holder_meter)
    context, _ = rounds.open(NORM, "task", 1, 1, bytes(32))
    assert rounds.open(NORM, "task", 1, 1, bytes(32))[0].id == context.id
    assert by_label(holder_meter, shared_metrics.OPERATIONS) == {"make_key": 1}
    plain = cohort.counts_plan()
    context, _ = rounds.open(plain, "other", 1, 1, bytes(32))
    uploads = [cohort.encrypted(context, index) for index in range(3)]
    uploads.append(cohort.broken_seal(context, 3))
    names = [each.admission.receipt.upload_digest for each in uploads[:3]]
    running = ResidueSum(plain.blocks)
    for each in uploads[:3]:
        running.add(widen(each.payload, plain.blocks))
    for _ in range(3):
        rounds.judge(context.id, [each.admission for each in uploads])
        rounds = durable_rounds(tmp_path, meter=holder_meter, identity=rounds._identity)
    wrong = running.value()
    wrong[0, 0] ^= 1
    for _ in range(3):
        with pytest.raises(ReleaseError):
            rounds.release(context.id, names, wrong)
    assert by_label(holder_meter, holder_metrics.RELEASES) == {"refused": 1}
    for _ in range(3):
        rounds.release(context.id, names, folded(running.value(), plain.sum_blocks))
    judged = by_label(holder_meter, holder_metrics.JUDGED)
    assert judged == {"ACCEPTED": 3, "INVALID_SEAL": 1}
    releases = by_label(holder_meter, holder_metrics.RELEASES)
    assert releases == {"refused": 1, "released": 1}
    operations = by_label(holder_meter, shared_metrics.OPERATIONS)
    assert operations == {"make_key": 2, "open_seals": 1}


@scenario
async def test_norms_count_when_their_verdicts_are_given_and_not_before(folder: Path) -> None:
    meter = Meter(holder_metrics.METRICS)
    key_holder = LocalKeyHolder(meter=meter)
    key_holder.fail("verdicts", DOWN, times=KEY_HOLDER_ATTEMPTS)
    async with running(folder, key_holder) as server:
        server.create(task(NORM, rounds=1))
        for attempt in (1, 2):
            context = (await server.collecting(1, attempt)).context
            server.send(context, beyond(context, 1, server.commitment(1)))
            server.send_all(context, [0, 2, 5])
            server.clock.advance(DEADLINE_S)
            await server.ended(1, attempt)
            given = by_label(meter, holder_metrics.VERDICTS)
            assert given == ({} if attempt == 1 else {"accepted": 3, "refused": 1})
        await server.task_ended()


# --- a database that does not answer --------------------------------------------------------------


def test_a_broken_database_leaves_its_gauges_out_and_no_others(desk: Desk, meter: Meter) -> None:
    server_gauges.watch(meter, desk.store, desk.blobs, desk.roster, None)
    assert value(meter, server_metrics.TASKS, state="RUNNING") == 1
    assert value(meter, server_metrics.OPEN_ROUNDS, state="COLLECTING") == 1
    assert value(meter, server_metrics.PRIVACY_LEFT) == 1
    broken(desk.store)
    shown = {name for name, _ in samples(meter)}
    assert not shown & {
        each.prometheus
        for each in (server_metrics.TASKS, server_metrics.OPEN_ROUNDS, server_metrics.PRIVACY_LEFT)
    }
    assert value(meter, server_metrics.DISK_FREE) > 0
    assert value(meter, server_metrics.STORE_FAILURES) > 0


def test_a_database_that_hangs_holds_up_no_scrape(
    desk: Desk, meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instruments, "PATIENCE_S", 0.05)
    server_gauges.watch(meter, desk.store, desk.blobs, desk.roster, None)
    answers = threading.Event()
    read = desk.store.database.read

    def hanging(work: Any) -> Any:  # noqa: ANN401 - of a database
        answers.wait(30)
        return read(work)

    monkeypatch.setattr(desk.store.database, "read", hanging)
    try:
        for _ in range(3):
            shown = {name for name, _ in samples(meter)}
            assert server_metrics.TASKS.prometheus not in shown
            assert server_metrics.BYTES_IN.prometheus in shown
    finally:
        answers.set()


def test_without_kit_and_list_neither_certificate_nor_clients_are_shown(
    tmp_path: Path, holder_meter: Meter
) -> None:
    rounds = durable_rounds(tmp_path)
    holder_gauges.watch(holder_meter, rounds._ledger, Policy(), OpenEnrolment(), None)
    shown = samples(holder_meter)
    assert ("secagg_enrolled_clients", ()) not in shown
    assert ("secagg_certificate_expiry_timestamp_seconds", ()) not in shown
    assert shown["secagg_keyholder_rounds_open", ()] == 0
    limit = Policy().attempts_per_model
    assert shown["secagg_keyholder_attempts_remaining", ()] == limit
    assert shown["secagg_keyholder_privacy_budget_remaining_ratio", ()] == 1
    assert [name for name, _ in shown if name == "secagg_build_info"]


def test_attempts_that_are_left_are_those_of_the_open_model(
    tmp_path: Path, holder_meter: Meter
) -> None:
    rounds = durable_rounds(tmp_path, policy=Policy(attempts_per_model=4))
    holder_gauges.watch(
        holder_meter, rounds._ledger, Policy(attempts_per_model=4), OpenEnrolment(), None
    )
    left = []
    for number, attempt, model in ((1, 1, b"a"), (1, 2, b"a"), (1, 3, b"a"), (2, 1, b"b")):
        context, _ = rounds.open(NORM, "task", number, attempt, model * 32)
        left.append(value(holder_meter, holder_metrics.ATTEMPTS_LEFT))
    assert left == [3, 2, 1, 3]
    rounds.close(context.id)
    assert value(holder_meter, holder_metrics.ATTEMPTS_LEFT) == 4


def test_a_budget_is_that_of_tasks_with_a_round_in_the_last_day(
    tmp_path: Path, holder_meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = durable_rounds(tmp_path)
    holder_gauges.watch(holder_meter, rounds._ledger, Policy(), OpenEnrolment(), None)
    plan = private_plan(3)
    for number in (1, 2):  # the first is passed over, and counts
        context, _ = rounds.open(plan, "private", number, 1, bytes(32))
        rounds.close(context.id)
    rounds.open(NORM, "exact", 1, 1, bytes(32))
    privacy = plan.privacy
    assert privacy is not None
    left = 1 - spent(release_rho(plan), DELTA) / privacy.epsilon
    assert value(holder_meter, holder_metrics.PRIVACY_LEFT) == pytest.approx(left)
    monkeypatch.setattr(holder_gauges, "RECENT", timedelta(0))
    assert value(holder_meter, holder_metrics.PRIVACY_LEFT) == 1


def test_of_many_rounds_the_newest_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder_ledger, "_RECENT_ROUNDS", 2)
    rounds = durable_rounds(tmp_path)
    assert rounds._ledger.recent_tasks(EPOCH) == []
    for task_id in ("old", "older", "new", "newer"):
        rounds.open(NORM, task_id, 1, 1, bytes(32))
    long_ago = datetime.now(UTC) - timedelta(days=1)
    assert sorted(rounds._ledger.recent_tasks(long_ago)) == ["new", "newer"]


# --- calls ----------------------------------------------------------------------------------------


class Faces(aggregation_service_pb2_grpc.AggregationServiceServicer):
    """Fails as its caller asks; waits for ``GetRound``."""

    def __init__(self) -> None:
        self.inside = threading.Event()
        self.out = threading.Event()

    @translated
    async def GetModel(self, request: pb.GetModelRequest, context: object) -> pb.GetModelResponse:
        errors = {"closed": ClosedError("text"), "bug": RuntimeError("hunter2")}
        if error := errors.get(request.task_id):
            raise error
        return pb.GetModelResponse()

    @translated
    async def GetRound(self, request: pb.GetRoundRequest, context: object) -> pb.GetRoundResponse:
        self.inside.set()
        await asyncio.to_thread(self.out.wait, 30)
        return pb.GetRoundResponse()


@contextlib.contextmanager
def guarded(meter: Meter, faces: Faces, room: int) -> Iterator[Any]:
    keeper = Gatekeeper(ALLOWED, OpenEnrolment(), encrypted=False, in_flight=room, meter=meter)

    def add(server: grpc.aio.Server) -> None:
        aggregation_service_pb2_grpc.add_AggregationServiceServicer_to_server(faces, server)

    with (
        loop_thread() as thread,
        serving(thread, add, None, [keeper]) as address,
        channels.channel(address, None) as channel,
    ):
        yield aggregation_service_pb2_grpc.AggregationServiceStub(channel)


def test_calls_are_counted_by_method_and_their_refusals_by_reason(meter: Meter) -> None:
    options: dict[str, Any] = {"timeout": 20, "metadata": metadata()}
    with guarded(meter, Faces(), 5) as stub:
        for task_id in ("", "closed", "closed", "bug"):
            with contextlib.suppress(grpc.RpcError):
                stub.GetModel(pb.GetModelRequest(task_id=task_id), **options)
        refused(stub.GetModel, pb.GetModelRequest(), timeout=20)
    assert by_label(meter, shared_metrics.CALLS) == {"GetModel": 5}
    reasons = by_label(meter, shared_metrics.REFUSED_CALLS)
    assert reasons == {"ROUND_CLOSED": 2, "INTERNAL": 1, "WIRE_VERSION": 1}
    assert b"hunter2" not in meter.exposition()


def test_calls_in_flight_and_the_room_for_them_are_shown(meter: Meter) -> None:
    faces = Faces()
    options: dict[str, Any] = {"timeout": 20, "metadata": metadata()}
    with guarded(meter, faces, 1) as stub:
        assert value(meter, shared_metrics.CALL_LIMIT) == 1
        waiting = stub.GetRound.future(pb.GetRoundRequest(), **options)
        assert faces.inside.wait(20)
        assert value(meter, shared_metrics.CALLS_IN_FLIGHT) == 1
        assert refused(stub.GetModel, pb.GetModelRequest(), **options) is OverloadedError
        assert total(meter, shared_metrics.CALLS) == 1, "the one that was refused"
        faces.out.set()
        waiting.result(20)
    assert value(meter, shared_metrics.CALLS_IN_FLIGHT) == 0
    assert by_label(meter, shared_metrics.CALLS) == {"GetModel": 1, "GetRound": 1}
    assert by_label(meter, shared_metrics.REFUSED_CALLS) == {"OVERLOADED": 1}


def test_a_call_that_takes_too_long_has_that_for_a_reason(meter: Meter) -> None:
    faces = Faces()
    with guarded(meter, faces, 1) as stub:
        with pytest.raises(grpc.RpcError):
            stub.GetRound(pb.GetRoundRequest(), timeout=1.0, metadata=metadata())
        faces.out.set()
    reasons = by_label(meter, shared_metrics.REFUSED_CALLS)
    assert reasons == {shared_metrics.DEADLINE_OR_CANCELLED: 1}


# --- workers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work_meter() -> Meter:
    names = ("divide", "refuse", "waits_for", "die_at_first")
    return Meter(
        [
            shared_metrics.OPERATIONS.narrowed(*names),
            shared_metrics.QUEUE_DEPTH,
            shared_metrics.QUEUE_WAIT,
        ]
    )


@pytest.fixture(scope="module")
def workers(work_meter: Meter) -> Iterator[Workers]:
    made = Workers(1, meter=work_meter)
    made.warm()
    assert set(samples(work_meter).values()) == {0.0}, "to start is no calculation"
    yield made
    made.close()


def test_calculations_are_timed_by_their_names_and_failures_are_not(
    workers: Workers, work_meter: Meter
) -> None:
    before = by_label(work_meter, shared_metrics.OPERATIONS)
    workers.run(worker_tasks.divide, 6, 3)
    for work in (worker_tasks.refuse, worker_tasks.divide):
        with pytest.raises((ReleaseError, ZeroDivisionError)):
            workers.run(work, *((1, 0) if work is worker_tasks.divide else ()))
    after = by_label(work_meter, shared_metrics.OPERATIONS)
    assert after == before | {"divide": before.get("divide", 0) + 1}
    assert total(work_meter, shared_metrics.QUEUE_WAIT) == sum(after.values())
    assert value(work_meter, shared_metrics.QUEUE_DEPTH) == 0


def test_what_waits_for_a_process_is_seen_and_how_long(
    workers: Workers, work_meter: Meter, tmp_path: Path
) -> None:
    go_on = tmp_path / "go on"
    calls = [
        threading.Thread(target=workers.run, args=(worker_tasks.waits_for, str(go_on)))
        for _ in range(3)
    ]
    for call in calls:
        call.start()
    deadline = threading.Event()
    while value(work_meter, shared_metrics.QUEUE_DEPTH) < 3:
        deadline.wait(0.01)
    go_on.touch()
    for call in calls:
        call.join(30)
    assert value(work_meter, shared_metrics.QUEUE_DEPTH) == 0
    name = shared_metrics.OPERATIONS.prometheus
    assert value(work_meter, f"{name}_count", operation="waits_for") == 3
    waited = value(work_meter, f"{shared_metrics.QUEUE_WAIT.prometheus}_sum")
    worked = value(work_meter, f"{name}_sum", operation="waits_for")
    # Two of them waited for the first, which worked all that time.
    assert worked > 0
    assert waited > worked


def test_work_whose_process_died_counts_once(
    workers: Workers, work_meter: Meter, tmp_path: Path
) -> None:
    assert workers.run(worker_tasks.die_at_first, str(tmp_path)) == "done"
    assert value(work_meter, shared_metrics.OPERATIONS, operation="die_at_first") == 1
    assert value(work_meter, shared_metrics.QUEUE_DEPTH) == 0
