"""Releases with privacy over gRPC: what leaves the key holder, what never does, and how often."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cohort
import numpy as np
import pytest
import structlog
from holding import Holder, digests_of, flipped, holding, manifest, numbers, summed
from key_holders import durable_rounds
from numpy.typing import NDArray
from serving import LoopThread, loop_thread

from secagg import audit
from secagg.accounting import affordable, releases_within
from secagg.context import RoundContext
from secagg.encryptor import encrypt_quantized
from secagg.errors import (
    BudgetError,
    ClosedError,
    ConfigurationError,
    MalformedError,
    QuorumError,
    ReleaseError,
    SchemaError,
    UnavailableError,
)
from secagg.keyholder import KeyHolder
from secagg.noise_audit import dithered, low_to_bytes
from secagg.parameters import (
    BLOCK_BYTES,
    RING_DEGREE,
    FloatSegment,
    IntegerSegment,
    Plan,
    Privacy,
    RowThreshold,
    TensorSpec,
)
from secagg.planner import make_plan
from secagg.privacy import release_rho
from secagg.publication import published
from secagg.quantize import Quantized, quantize, row_places
from secagg.receipts import NO_COMMITMENT
from secagg.release import Release
from secagg.residues import ResidueSum, narrow, widen
from secagg.sampling import Stream
from secagg.upload import Upload
from secagg.wire import codec
from secagg.wire.v1 import key_holder_service_pb2 as pb
from secagg.wire.v1 import round_pb2
from secagg_keyholder import rounds as rounds_module
from secagg_keyholder.backup import backup_ledger, restore_ledger
from secagg_keyholder.ledger import Ledger
from secagg_keyholder.rounds import Rounds

MODES = ["release", "distributed", "local"]
NOISE_KEY = b"key of the tests' release noise."
GOOD = (round_pb2.VERDICT_STATE_ACCEPTED, "")
CLIENTS, WIDTH, SHARED = 5, 3, 6
ROWS = SHARED + CLIENTS + 1  # client i touches the shared rows and row 6 + i; nobody the last one
LEAST = 2
Start = Callable[..., AbstractContextManager[Holder]]


def planned(privacy: Privacy | None, *, threshold: bool = True) -> Plan:
    tensors = (TensorSpec("bias", (ROWS,)), TensorSpec("factors", (ROWS, WIDTH)))
    segments = [
        FloatSegment("items", tensors, 1.0, 12, rows=ROWS, clip_bit=True),
        IntegerSegment("contributors", ROWS, 1, max_norm=3.0),
    ]
    withheld = RowThreshold("contributors", LEAST) if threshold else None
    return make_plan(segments, max_clients=8, privacy=privacy, threshold=withheld)


def private(mode: str, noise: float = 1.0, epsilon: float = 8.0) -> Plan:
    return planned(Privacy(mode, noise, epsilon, 1e-5))


EXACT = planned(None)


def contribution(index: int) -> dict[str, Any]:
    factors, counts = np.zeros((ROWS, WIDTH)), np.zeros(ROWS, dtype=np.int64)
    touched = [*range(SHARED), SHARED + index]
    factors[touched], counts[touched] = 0.05 * (index + 1), 1
    return {"items": {"bias": factors[:, 0], "factors": factors}, "contributors": counts}


def quantized(context: RoundContext, index: int) -> list[Quantized]:
    stream = Stream.derive("test noise", context.id.round_number, index)
    return quantize(
        context.plan,
        contribution(index),
        samples=1,
        rotation=context.rotation,
        randomness=stream,
    )


def encrypted(context: RoundContext, index: int) -> Upload:
    parts, key = quantized(context, index), cohort.identity(index)
    return encrypt_quantized(context, parts, key, NO_COMMITMENT)


def in_the_clear(context: RoundContext, indexes: range) -> tuple[NDArray[np.int64], ...]:
    """What the sum is before anything is done to it for release: with the clients' noise."""
    parts = [[part.summand for part in quantized(context, index)] for index in indexes]
    return tuple(np.sum(np.stack(column), axis=0) for column in zip(*parts, strict=True))


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def start(thread: LoopThread, state: Path) -> Start:
    """Starts the key holder over the same folder, as often as it is called."""

    @contextmanager
    def started(folder: Path = state) -> Iterator[Holder]:
        with holding(thread, durable_rounds(folder)) as holder:
            yield holder

    return started


@pytest.fixture
def holder(start: Start) -> Iterator[Holder]:
    with start() as running:
        yield running


@pytest.fixture
def known_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key holder draws from a key that the test has."""
    monkeypatch.setattr(rounds_module, "KeyHolder", partial(KeyHolder, noise_key=NOISE_KEY))


@dataclass
class Desk:
    """One open round whose uploads are all admitted."""

    context: RoundContext
    uploads: list[Upload]

    @property
    def names(self) -> list[bytes]:
        return digests_of(self.uploads)

    @property
    def data(self) -> bytes:
        return summed(self.context, self.uploads)


def admitted(holder: Holder, plan: Plan, number: int = 1, **name: Any) -> Desk:  # noqa: ANN401
    context = holder.open(plan, number=number, **name)
    uploads = [encrypted(context, index) for index in range(CLIENTS)]
    assert holder.judge(context, uploads) == [GOOD] * CLIENTS
    return Desk(context, uploads)


def released(holder: Holder, desk: Desk) -> Release:
    data, contributors = holder.release(desk.context, desk.names, desk.data)
    plan, rotation = desk.context.plan, desk.context.rotation
    return Release(plan, rotation, contributors, numbers(data, plan))


def check(holder: Holder, desk: Desk, low: bytes) -> None:
    first = pb.CheckSumRequest(manifest=manifest(desk.context, desk.names).manifest)
    count = codec.piece_count(len(low))
    rest = [pb.CheckSumRequest(low_bits=codec.piece(low, index)) for index in range(count)]
    holder._call(lambda: holder.stub.CheckSum(iter([first, *rest]), timeout=20))


def low_of_sum(desk: Desk) -> bytes:
    residues = widen(desk.data, desk.context.plan.sum_blocks)
    return low_to_bytes(dithered(desk.context.plan, residues))


def audit_details(state: Path, event: str) -> list[dict[str, Any]]:
    entries = list(audit.read_entries(state / "ledger.sqlite3"))
    audit.verify(entries)
    return [json.loads(entry.details) for entry in entries if entry.event == event]


# --- what leaves --------------------------------------------------------------------------------


@pytest.mark.usefixtures("known_noise")
@pytest.mark.parametrize("mode", MODES)
def test_what_leaves_is_the_noised_sum_of_the_plaintext_to_the_bit(
    holder: Holder, mode: str
) -> None:
    for number, plan in enumerate((private(mode), planned(private(mode).privacy)), start=1):
        desk = admitted(holder, plan, number)
        check(holder, desk, low_of_sum(desk))
        found = released(holder, desk)
        clear = in_the_clear(desk.context, range(CLIENTS))
        wanted = published(plan, desk.context.rotation, clear, Stream(NOISE_KEY))
        assert found.contributors == CLIENTS
        for ours, theirs in zip(found.sums, wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
def test_the_sum_without_noise_does_not_leave(holder: Holder, mode: str) -> None:
    desk = admitted(holder, planned(private(mode).privacy, threshold=False))
    values = [[part.values for part in quantized(desk.context, i)] for i in range(CLIENTS)]
    found = released(holder, desk)
    exact = [np.sum(np.stack(column), axis=0) for column in zip(*values, strict=True)]
    off = found.sums[0] - exact[0]
    std = desk.context.plan.noise_stds[0] * (1 if mode == "release" else CLIENTS**0.5)
    # A chi-square of 49 degrees: outside of these factors with probability below 1e-8.
    assert 0.2 < np.mean(off.astype(np.float64) ** 2) / std**2 < 2.7


@pytest.mark.parametrize("mode", ["exact", "release", "local"])
def test_counts_of_contributors_never_leave(holder: Holder, mode: str) -> None:
    plan = EXACT if mode == "exact" else private(mode)
    found = released(holder, admitted(holder, plan))
    assert not found.sums[1].any()
    with pytest.raises(SchemaError, match="never leaves the key holder"):
        found.total("contributors")


def test_a_row_that_one_client_alone_has_touched_never_leaves(holder: Holder) -> None:
    desk = admitted(holder, EXACT)
    found = released(holder, desk)
    places, (exact, _) = row_places(EXACT.segments[0]), in_the_clear(desk.context, range(CLIENTS))
    for row in range(ROWS):
        here = found.sums[0][places[row]]
        if row < SHARED:
            np.testing.assert_array_equal(here, exact[places[row]])
        else:
            assert not here.any()
    # It was there to be withheld.
    assert all(exact[places[row]].any() for row in range(SHARED, SHARED + CLIENTS))
    # What was withheld is not the clip bits: three of the five were within the clip norm.
    assert found.clip_fraction() == pytest.approx(0.6, abs=0.01)


def test_the_key_holder_draws_other_noise_each_time(holder: Holder) -> None:
    """Noise that repeats comes off in a difference."""
    plan = private("release", 4.0)
    first, second = (released(holder, admitted(holder, plan, number)) for number in (1, 2))
    exact = [in_the_clear(admitted(holder, plan, n).context, range(CLIENTS)) for n in (3, 4)]
    assert not np.array_equal(first.sums[0] - exact[0][0], second.sums[0] - exact[1][0])


# --- sizes --------------------------------------------------------------------------------------


def test_a_sum_has_the_size_of_a_sum(holder: Holder) -> None:
    """Noise has ciphertexts of its own in an upload, and none in a sum."""
    desk = admitted(holder, private("distributed"))
    plan = desk.context.plan
    assert plan.blocks == 2 * plan.sum_blocks
    unfolded = ResidueSum(plan.blocks)
    for upload in desk.uploads:
        unfolded.add(widen(upload.payload, plan.blocks))
    for more in (narrow(unfolded.value()), desk.uploads[0].payload, desk.data + bytes(1)):
        with pytest.raises(MalformedError, match=f"{len(desk.data)} bytes in all; got more"):
            holder.release(desk.context, desk.names, more)
    for less in (desk.data[:-BLOCK_BYTES], desk.data[:-1]):
        with pytest.raises(MalformedError, match=f"exactly {len(desk.data)} bytes"):
            holder.release(desk.context, desk.names, less)
    assert released(holder, desk).contributors == CLIENTS


def test_the_low_bits_of_a_sum_have_its_size_and_those_of_an_upload_theirs(
    holder: Holder,
) -> None:
    desk = admitted(holder, private("distributed"))
    low = low_of_sum(desk)
    assert len(low) == 4 * RING_DEGREE * desk.context.plan.sum_blocks
    for more in (low + low, low + bytes(1)):
        with pytest.raises(MalformedError, match=f"{len(low)} bytes in all; got more"):
            check(holder, desk, more)
    for less in (low[:-4], low[:-1]):
        with pytest.raises(MalformedError, match=f"of {len(low)} bytes"):
            check(holder, desk, less)
    check(holder, desk, low)
    with pytest.raises(ReleaseError):
        holder.release(desk.context, desk.names, flipped(desk.data))
    of_upload = low_to_bytes(
        dithered(desk.context.plan, widen(desk.uploads[0].payload, desk.context.plan.blocks))
    )
    assert len(of_upload) == 2 * len(low)
    name = codec.context_id_to_wire(desk.context.id)
    first = pb.AuditNoiseRequest(upload=pb.NamedUpload(context=name, upload_digest=desk.names[0]))
    for wrong in (low, of_upload[:-4], of_upload + bytes(4)):
        with pytest.raises(MalformedError):
            holder.audit([first, pb.AuditNoiseRequest(low_bits=wrong)])
    assert holder.audit([first, pb.AuditNoiseRequest(low_bits=of_upload)]) == GOOD


def test_a_sum_that_lacks_somebodys_noise_is_not_opened(holder: Holder) -> None:
    desk = admitted(holder, private("distributed"))
    plan = desk.context.plan
    total = ResidueSum(plan.sum_blocks)
    for index, upload in enumerate(desk.uploads):
        residues = widen(upload.payload, plan.blocks)
        total.add(residues[: plan.sum_blocks])
        if index:
            total.add(residues[plan.sum_blocks :])
    with pytest.raises(ReleaseError):
        holder.release(desk.context, desk.names, narrow(total.value()))


# --- once ---------------------------------------------------------------------------------------


def test_a_release_reads_the_same_ever_after_and_is_paid_once(start: Start, state: Path) -> None:
    with start() as holder:
        desk = admitted(holder, private("release"))
        first = holder.release(desk.context, desk.names, desk.data)
        assert holder.release(desk.context, desk.names[::-1], desk.data) == first
    with start() as holder:
        assert holder.release(desk.context, desk.names, desk.data) == first
    (entry,) = audit_details(state, "round-released")
    assert entry["rho_spent"] == release_rho(desk.context.plan).hex()


def test_noise_that_was_drawn_and_not_recorded_was_seen_by_nobody(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies in between draws other noise the next time; what it has drawn before it
    was recorded is nowhere."""
    plan, drawn = private("release", 4.0), []

    def fails(*arguments: Any) -> None:  # noqa: ANN401
        drawn.append(arguments[-1])
        raise UnavailableError("expected a disk; got none")

    rounds = durable_rounds(state)
    context, _ = rounds.open(plan, "task", 1, 1, bytes(32))
    desk = Desk(context, [encrypted(context, index) for index in range(CLIENTS)])
    rounds.judge(context.id, [upload.admission for upload in desk.uploads])
    residues = widen(desk.data, plan.sum_blocks)

    def ask(of: Rounds) -> bytes:
        return of.release(context.id, desk.names, residues).sums

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "record_release", fails)
        for _ in range(2):  # the same process has no second draw
            with pytest.raises(UnavailableError):
                ask(rounds)
    assert drawn[0] == drawn[1]
    again = durable_rounds(state)
    kept = ask(again)
    assert kept != drawn[0]
    assert ask(again) == ask(durable_rounds(state)) == kept
    assert drawn[0] not in (state / "ledger.sqlite3").read_bytes()


# --- the budget ---------------------------------------------------------------------------------


def two_fit(mode: str) -> Plan:
    """A plan of which two releases fit into the budget, and half of a third."""
    return private(mode, (2.5 / (2 * affordable(8.0, 1e-5))) ** 0.5)


@pytest.mark.parametrize("mode", MODES)
def test_releases_end_where_the_budget_does(start: Start, mode: str) -> None:
    plan = two_fit(mode)
    assert releases_within(release_rho(plan), 8.0, 1e-5) == 2
    for number in (1, 2):
        with start() as holder:
            released(holder, admitted(holder, plan, number))
    for _ in range(2):
        with start() as holder:
            for attempt in (1, 2):
                with pytest.raises(BudgetError, match="spent by 2 releases"):
                    holder.open(plan, number=3, attempt=attempt)
            released(holder, admitted(holder, plan, 1, task_id=f"other-{_}"))


def test_what_was_refused_or_abandoned_was_not_released(holder: Holder) -> None:
    plan = two_fit("distributed")
    for attempt in (1, 2, 3):
        desk = admitted(holder, plan, attempt=attempt)
        check(holder, desk, low_of_sum(desk))
        for place in range(2):
            with pytest.raises(ReleaseError):
                holder.release(desk.context, desk.names, flipped(desk.data, place))
        with pytest.raises(ClosedError):
            released(holder, desk)
    desk = admitted(holder, plan, attempt=4)
    few = desk.uploads[:2]
    with pytest.raises(QuorumError):
        holder.release(desk.context, digests_of(few), summed(desk.context, few))
    for number in (1, 2):
        released(holder, admitted(holder, plan, number, attempt=5))
    with pytest.raises(BudgetError):
        holder.open(plan, number=3)


def test_one_task_has_one_privacy(start: Start) -> None:
    plan = private("distributed", 2.0)
    others = [EXACT, two_fit("release"), private("distributed"), private("distributed", 2.0, 9.0)]
    with start() as holder:
        released(holder, admitted(holder, plan))
    with start() as holder:
        for other in others:
            for name in ({"number": 2}, {"number": 9, "attempt": 3}):
                with pytest.raises(ConfigurationError, match="privacy that the task began with"):
                    holder.open(other, **name)
        released(holder, admitted(holder, plan, 2))


def test_a_restored_key_holder_never_spends_more_than_there_was(
    start: Start, state: Path, tmp_path: Path
) -> None:
    plan = two_fit("release")
    with start() as holder:
        released(holder, admitted(holder, plan))
        backup_ledger(state, tmp_path / "copy")
        released(holder, admitted(holder, plan, 2))
    restore_ledger(tmp_path / "copy", tmp_path / "other")
    with start(tmp_path / "other") as holder, pytest.raises(BudgetError):
        holder.open(plan, number=3)


def test_a_budget_in_which_nothing_fits_is_refused_with_one_that_would_do(
    holder: Holder, state: Path
) -> None:
    with pytest.raises(BudgetError, match=r"a budget of more than epsilon=(\S+)") as caught:
        holder.open(private("release", 1.0, epsilon=0.5))
    assert not list((state / "round-keys").glob("*.key"))
    works = float(str(caught.value).rpartition("epsilon=")[2])
    holder.open(private("release", 1.0, epsilon=works * 1.00001))


# --- what is never said -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "release", "local"])
def test_neither_logs_nor_errors_tell_of_counts_rows_or_noise(
    holder: Holder, state: Path, mode: str
) -> None:
    with structlog.testing.capture_logs() as log:
        desk = admitted(holder, EXACT if mode == "exact" else private(mode))
        with pytest.raises(ReleaseError):
            holder.release(desk.context, desk.names, flipped(desk.data))
        released(holder, desk)
    public = {"task_id", "round_number", "attempt", "manifest", "contributors", "sums_sha256"}
    budget = {"rho", "rho_spent", "epsilon_spent", "delta", "passed_over", "releases_left"}
    (entry,) = audit_details(state, "round-released")
    assert entry.keys() == public | (set() if mode == "exact" else budget)
    said = {entry["event"]: entry.keys() - {"event", "log_level"} for entry in log}
    assert said["round_released"] == {"round", "contributors"}
    assert said.keys() <= {"round_opened", "round_released", "call", "refused"}, said
    for text in holder.said:
        assert not any(word in text for word in ("row", "count", "std", "noise_key"))


def test_pinned_privacy_is_no_secret_and_the_rest_of_a_plan_is_not_repeated(
    holder: Holder,
) -> None:
    holder.open(private("release", 2.0))
    other = replace(EXACT.segments[0], name="hunter2")
    plan = make_plan([other], max_clients=8)
    with pytest.raises(ConfigurationError) as caught:
        holder.open(plan, number=2)
    assert "hunter2" not in str(caught.value)
