"""Rounds inside another framework: the bytes of `EmbeddedServer` and `EmbeddedClient`, over a list.

The key holder is the service itself, behind mutual TLS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cohort
import numpy as np
import pytest
from federations import CLIENTS, Site, client_kit, kit, shared, shared_other, site
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from key_holders import LocalKeyHolder
from serving import LoopThread, loop_thread

from secagg.challenges import challenge_key
from secagg.context import RoundContext
from secagg.encryptor import encrypt_integers, upload_integers
from secagg.errors import (
    BudgetError,
    ClosedError,
    ConfigurationError,
    ContextError,
    DuplicateError,
    ForgedSketchError,
    MalformedError,
    NotEnrolledError,
    OverloadedError,
    PausedError,
    PrivacyError,
    QuorumError,
    ReceiptError,
    ReleaseError,
    SchemaError,
    SecaggError,
    UnavailableError,
    UntrustedKeyError,
)
from secagg.parameters import NormCheck, Plan, Privacy
from secagg.planner import plan_integers, plan_tensors
from secagg.quantize import Quantized
from secagg.receipts import NO_COMMITMENT
from secagg.release import sums_sha256
from secagg.sampling import Stream
from secagg.wire.codec import upload_to_bytes
from secagg_client.embedded import EmbeddedClient
from secagg_client.ledger import Fate, Ledger, Limits
from secagg_client.switch import Switch
from secagg_server.embedded import EmbeddedRound, EmbeddedServer

MIXED = cohort.mixed_plan()
CHECKED = cohort.mixed_plan(norm_check=NormCheck())
MODEL = {tensor.name: np.zeros(tensor.shape, dtype=np.float32) for tensor in cohort.TENSORS}
_TASKS = iter(f"task-{number}" for number in range(1_000_000))

Joined = Callable[[int], bytes]


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


@pytest.fixture(scope="module")
def running(thread: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(thread, tmp_path_factory.mktemp("site"), shared()) as made:
        yield made


@pytest.fixture(scope="module")
def server(running: Site) -> Iterator[EmbeddedServer]:
    with EmbeddedServer.load(shared().kit("server"), running.key_holder) as made:
        yield made


@pytest.fixture
def task() -> str:
    """A task of a test's own: the key holder remembers tasks."""
    return next(_TASKS)


def client(index: int, task_id: str, **options: object) -> EmbeddedClient:
    kit = client_kit(shared(), CLIENTS[index])
    rounding = {"rounding": lambda context: cohort.rounding(context, index)}
    return EmbeddedClient(kit, task_id, **(rounding | options))  # type: ignore[arg-type]


def upload(current: EmbeddedRound, index: int, **options: object) -> bytes:
    """What client i sends of its contribution."""
    who = client(index, current.context.id.task_id, **options)
    with_model = any(s.name == "update" for s in current.context.plan.segments)
    joined = who.join(current.offer(who.public_key), MODEL if with_model else None)
    made = cohort.contribution(joined.context.plan, index)
    return joined.encrypt(made, samples=cohort.samples(index))


def opened(
    server: EmbeddedServer, task_id: str, plan: Plan = MIXED, number: int = 1, **options: int
) -> EmbeddedRound:
    model = MODEL if any(s.name == "update" for s in plan.segments) else None
    return server.open(plan, task_id=task_id, round_number=number, model=model, **options)


@pytest.mark.parametrize("plan", [MIXED, CHECKED], ids=["unchecked", "checked"])
def test_the_sum_is_that_of_the_integers_in_the_clear(
    server: EmbeddedServer, task: str, plan: Plan
) -> None:
    with opened(server, task, plan) as current:
        names = [current.add(upload(current, index)) for index in (0, 1, 3)]
        found = current.conclude()
    assert names == [CLIENTS[0], CLIENTS[1], CLIENTS[3]]
    assert (found.contributors, found.refused) == (tuple(names), {})
    assert not list(Path(server._folder.name).rglob(f"uploads/{task}/*/*"))
    wanted = cohort.clear_sums(current.context, (0, 1, 3))
    assert found.release.sha256 == sums_sha256(tuple(wanted))
    assert found.release.weight() == pytest.approx(
        sum(map(cohort.samples, (0, 1, 3))) / 100, abs=0.02
    )


def test_rounds_follow_one_another_and_an_attempt_may_follow_one_that_failed(
    server: EmbeddedServer, task: str
) -> None:
    first = opened(server, task)
    first.add(upload(first, 0))
    with pytest.raises(QuorumError, match="got 1"):
        first.conclude()
    for number, attempt in ((1, 2), (2, 1)):
        current = opened(server, task, number=number, attempt=attempt)
        for index in range(3):
            current.add(upload(current, index))
        assert current.conclude().release.contributors == 3


def test_a_round_that_is_over_stays_over(server: EmbeddedServer, task: str) -> None:
    current = opened(server, task)
    late = upload(current, 3)
    for index in range(3):
        current.add(upload(current, index))
    current.conclude()
    current.abandon()
    with pytest.raises(ClosedError):
        current.conclude()
    with pytest.raises(ClosedError):
        current.add(late)
    with pytest.raises(SecaggError):
        opened(server, task)  # released: never again


def test_an_abandoned_round_keeps_nothing(server: EmbeddedServer, task: str) -> None:
    with opened(server, task) as current:
        current.add(upload(current, 0))
        folder = Path(server._folder.name)
        assert list(folder.rglob(f"uploads/{task}/*/*"))
    assert not list(folder.rglob(f"uploads/{task}/*/*"))
    with pytest.raises(ClosedError):
        current.conclude()


def test_an_upload_counts_once_and_another_one_of_its_client_never(
    server: EmbeddedServer, task: str
) -> None:
    current = opened(server, task)
    data = upload(current, 0)
    assert current.add(data) == current.add(data) == CLIENTS[0]
    with pytest.raises(DuplicateError):
        current.add(upload(current, 0))
    assert current.uploads == 1


def test_a_full_cohort_takes_nobody_else(server: EmbeddedServer, task: str) -> None:
    current = opened(server, task, plan_integers(24, max_clients=3, max_abs=1 << 20))
    for index in range(3):
        current.add(upload(current, index))
    with pytest.raises(ClosedError, match="max_clients=3"):
        current.add(upload(current, 3))


def test_a_stranger_is_not_taken(server: EmbeddedServer, task: str) -> None:
    current = opened(server, task)
    data = upload_to_bytes(cohort.encrypted(current.context, 0))
    with pytest.raises(NotEnrolledError):
        current.add(data)


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.data())
def test_damaged_uploads_are_refused_and_leave_no_trace(
    server: EmbeddedServer, data: st.DataObject
) -> None:
    current, good = _damageable(server)
    cut = data.draw(st.integers(0, len(good)), label="cut")
    flipped = bytearray(good)
    flipped[data.draw(st.integers(0, len(good) - 1), label="at")] ^= 1 << data.draw(
        st.integers(0, 7)
    )
    for bad in (good[:cut] if cut < len(good) else b"", bytes(flipped), good + b"\x00"):
        with pytest.raises(SecaggError):
            current.add(bad)
    assert current.uploads == 0


_made: list[tuple[EmbeddedRound, bytes]] = []


def _damageable(server: EmbeddedServer) -> tuple[EmbeddedRound, bytes]:
    if not _made:
        current = opened(server, next(_TASKS), cohort.counts_plan())
        _made.append((current, upload(current, 0)))
    return _made[0]


@pytest.mark.parametrize("data", [b"", b"\x00" * 100, b"\xff" * 60_000])
def test_any_bytes_are_no_offer(task: str, data: bytes) -> None:
    with pytest.raises(SecaggError):
        client(0, task).join(data)


def test_an_offer_beyond_the_largest_message_is_not_even_parsed(task: str) -> None:
    with pytest.raises(MalformedError, match="at most"):
        client(0, task).join(bytes(3 << 20))


def test_offers_of_others_are_refused(server: EmbeddedServer, task: str) -> None:
    current = opened(server, task)
    with pytest.raises(ContextError, match="later round of the task"):
        client(0, "another").join(current.offer(), MODEL)
    foreign = EmbeddedClient(client_kit(shared_other(), CLIENTS[0]), task)
    with pytest.raises(UntrustedKeyError):
        foreign.join(current.offer(), MODEL)


def test_a_client_starts_from_the_model_that_everybody_has(
    server: EmbeddedServer, task: str
) -> None:
    offer = opened(server, task).offer()
    other = MODEL | {cohort.TENSORS[0].name: np.ones(cohort.TENSORS[0].shape, dtype=np.float32)}
    with pytest.raises(ContextError, match="different models"):
        client(0, task).join(offer, other)
    with pytest.raises(ContextError, match="different models"):
        client(0, task).join(offer)
    with pytest.raises(SchemaError):
        client(0, task).join(offer, {"other": np.zeros(3, dtype=np.float32)})


def test_a_client_never_goes_back(server: EmbeddedServer, task: str, tmp_path: Path) -> None:
    first, second = opened(server, task), opened(server, task, number=2)
    for folder in (None, tmp_path):
        who = client(0, task, folder=folder)
        who.join(second.offer(), MODEL).encrypt(cohort.contribution(MIXED, 0))
        again = who if folder is None else client(0, task, folder=folder)
        with pytest.raises(ContextError, match="goes back"):
            again.join(first.offer(), MODEL)


def test_after_a_crash_the_same_bytes_go_out(
    server: EmbeddedServer, task: str, tmp_path: Path
) -> None:
    current = opened(server, task)
    assert upload(current, 0, folder=tmp_path) == upload(current, 0, folder=tmp_path)
    assert upload(current, 1) != upload(current, 1)


def test_with_a_norm_check_an_offer_is_one_clients_own(server: EmbeddedServer, task: str) -> None:
    current = opened(server, task, CHECKED)
    with pytest.raises(ConfigurationError, match="got bytes=0"):
        current.offer()
    alice, bob = client(0, task), client(1, task)
    joined = alice.join(current.offer(bob.public_key), MODEL)
    with pytest.raises(ReceiptError, match="another"):
        current.add(joined.encrypt(cohort.contribution(CHECKED, 0)))


def test_a_poisoned_update_is_refused_and_its_client_can_check_why(
    server: EmbeddedServer, task: str, tmp_path: Path
) -> None:
    plan = plan_tensors({"w": (40, 30)}, max_clients=4, clip=1.0, norm_check=NormCheck())
    model = {"w": np.zeros((40, 30), dtype=np.float32)}
    with server.open(plan, task_id=task, round_number=1, model=model) as current:
        clients = [client(index, task, folder=tmp_path / str(index)) for index in range(4)]
        for index, who in enumerate(clients):
            joined = who.join(current.offer(who.public_key), model)
            update = np.random.default_rng(index).normal(size=(40, 30)) / 40
            data = joined.encrypt({"update": {"w": update}})
            if index == 2:
                data = _poisoned(current, index, update * 10)
                who._outbox = None  # what it keeps is not what it sends
            current.add(data)
        found = current.conclude()
    assert found.refused == {CLIENTS[2]: "NORM_REFUSED"}
    assert found.release.contributors == 3
    judgements = {i: clients[i].judge(current.notice(clients[i].public_key)) for i in (0, 1, 3)}
    assert all(judgement.accepted for judgement in judgements.values())
    with pytest.raises(ContextError):  # somebody else's
        clients[0].judge(current.notice(clients[1].public_key))


def _poisoned(current: EmbeddedRound, index: int, update: np.ndarray) -> bytes:
    """An upload beyond the clip norm: quantised by hand, because `quantize` would clip."""
    plan = current.context.plan
    (honest,) = _quantized(current.context, update / 10)
    parts = upload_integers(plan, [replace(honest, values=honest.values * 10)])
    kit = client_kit(shared(), CLIENTS[index])
    assert current._challenger is not None
    commitment = current._challenger.commitment(kit.identity.public)
    return upload_to_bytes(encrypt_integers(current.context, parts, kit.identity, commitment))


def _quantized(context: RoundContext, update: np.ndarray) -> list[Quantized]:
    from secagg.quantize import quantize

    stream = Stream.derive("poison")
    return quantize(
        context.plan,
        {"update": {"w": update}},
        samples=1,
        rotation=context.rotation,
        randomness=stream,
    )


def test_a_server_that_asks_something_else_is_caught_for_good(
    server: EmbeddedServer, task: str, tmp_path: Path
) -> None:
    current = opened(server, task, CHECKED)
    data = [upload(current, index, folder=tmp_path / str(index)) for index in range(3)]
    assert current._challenger is not None
    honest = current._challenger._secret
    for each in data:
        current.add(each)
    key = client_kit(shared(), CLIENTS[0]).identity.public
    asked = current._challenger.key

    def other(client_key: bytes) -> bytes:
        return challenge_key(bytes(32), current.context.id.digest, client_key)

    current._challenger.key = other  # type: ignore[method-assign]
    current._challenger.require_committed = lambda _receipt: None  # type: ignore[method-assign]
    current.conclude()
    assert current._challenger._secret == honest
    assert asked(key) != other(key)
    victim = client(0, task, folder=tmp_path / "0")
    with pytest.raises(ForgedSketchError, match="the evidence is"):
        victim.judge(current.notice(key))
    later = opened(server, task, CHECKED, number=2)
    with pytest.raises(ForgedSketchError, match="has not been caught"):
        victim.join(later.offer(key), MODEL)


def test_a_notice_beyond_the_largest_message_is_not_even_parsed(
    server: EmbeddedServer, task: str
) -> None:
    who = client(0, task)
    joined = who.join(opened(server, task, CHECKED).offer(who.public_key), MODEL)
    joined.encrypt(cohort.contribution(CHECKED, 0))
    with pytest.raises(MalformedError, match="notice of at most"):
        who.judge(bytes(3 << 20))


def test_there_is_no_verdict_on_nothing(server: EmbeddedServer, task: str) -> None:
    current = opened(server, task)
    with pytest.raises(ClosedError):
        current.notice(client(0, task).public_key)
    with pytest.raises(ConfigurationError, match="kept"):
        client(0, task).judge(b"")


def test_a_direction_check_is_refused_at_once(server: EmbeddedServer, task: str) -> None:
    plan = plan_tensors(
        {"w": (300, 300)}, max_clients=4, clip=1.0, norm_check=NormCheck(min_cosine=-0.5)
    )
    with pytest.raises(ConfigurationError, match="min_cosine"):
        server.open(plan, task_id=task, round_number=1)


def private(releases: int) -> Plan:
    """A plan whose budget has room for so many releases."""
    from secagg.accounting import noise_multiplier_for

    noise = noise_multiplier_for(8.0, 1e-6, releases)
    privacy = Privacy("distributed", noise, 8.0, 1e-6)
    return plan_integers(24, max_clients=4, max_abs=8, max_norm=8.0, privacy=privacy)


def test_a_budget_ends_at_the_key_holder_and_at_each_client(
    server: EmbeddedServer, task: str, tmp_path: Path
) -> None:
    plan = private(1)
    counts = {"counts": np.arange(24) % 2}

    def taking_part(current: EmbeddedRound, index: int) -> bytes:
        folder = tmp_path / str(index)
        who = client(index, task, folder=folder, rounding=None)
        return who.join(current.offer()).encrypt(counts)

    with server.open(plan, task_id=task, round_number=1) as current:
        for index in range(3):
            current.add(taking_part(current, index))
        current.conclude()
    with pytest.raises(BudgetError):
        server.open(plan, task_id=task, round_number=2)
    entries = Ledger(tmp_path / "0").entries(task)
    assert [(entry.round_number, entry.fate) for entry in entries] == [(1, Fate.SENT)]


def test_a_client_has_limits_of_its_own(server: EmbeddedServer, task: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="folder"):
        client(0, task, limits=Limits(max_epsilon=1.0))
    with server.open(private(1), task_id=task, round_number=1) as current:
        who = client(0, task, folder=tmp_path, limits=Limits(max_epsilon=1.0))
        with pytest.raises(PrivacyError, match="max_epsilon"):
            who.join(current.offer())
        with pytest.raises(ConfigurationError, match="repeatable"):
            client(0, task).join(current.offer()).encrypt({"counts": np.zeros(24, dtype=int)})


def test_a_paused_client_contributes_nothing(
    server: EmbeddedServer, task: str, tmp_path: Path
) -> None:
    current = opened(server, task)
    who = client(0, task, folder=tmp_path)
    joined = who.join(current.offer(), MODEL)
    Switch(tmp_path).pause()
    with pytest.raises(PausedError):
        joined.encrypt(cohort.contribution(MIXED, 0))
    with pytest.raises(PausedError):
        who.join(current.offer(), MODEL)


def with_stub(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> LocalKeyHolder:
    """A key holder whose answers can be lost; it endorses as the federation's own does not."""
    stub = LocalKeyHolder(server.roster)
    monkeypatch.setattr(server, "_stub", stub)
    return stub


def add_all(current: EmbeddedRound, *, off_grid: int | None = None) -> None:
    """Uploads of the first four, unchecked by them."""
    for index in range(4):
        kit = client_kit(shared(), CLIENTS[index])
        parts = upload_integers(current.context.plan, cohort.quantized(current.context, index))
        made = encrypt_integers(current.context, parts, kit.identity, NO_COMMITMENT)
        if index == off_grid:
            made = _resigned(current, index)
        current.add(upload_to_bytes(made))


def _resigned(current: EmbeddedRound, index: int) -> object:
    """An upload off the grid, signed by an enrolled client."""
    identity = client_kit(shared(), CLIENTS[index]).identity
    original = cohort.identity
    cohort.identity = lambda _index: identity  # type: ignore[assignment]
    try:
        return cohort.off_grid(current.context, index)
    finally:
        cohort.identity = original


def test_a_client_off_the_grid_is_named_and_the_others_are_summed(
    server: EmbeddedServer, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_stub(server, monkeypatch)
    current = opened(server, task, cohort.counts_plan())
    add_all(current, off_grid=1)
    found = current.conclude()
    assert found.refused == {CLIENTS[1]: "OFF_GRID"}
    wanted = cohort.clear_sums(current.context, (0, 2, 3))
    assert found.release.sha256 == sums_sha256(tuple(wanted))


def test_a_lost_answer_is_asked_for_again(
    server: EmbeddedServer, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = with_stub(server, monkeypatch)
    current = opened(server, task, cohort.counts_plan())
    add_all(current)
    for call in ("judge", "check_sum", "release"):
        stub.lose_answer(call, UnavailableError("lost"))
    assert current.conclude().release.contributors == 4


def test_a_sum_that_was_handed_over_in_vain_makes_the_round_void(
    server: EmbeddedServer, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = with_stub(server, monkeypatch)
    current = opened(server, task, cohort.counts_plan())
    add_all(current)
    stub.fail("release", UnavailableError("gone"), times=3)
    with pytest.raises(ReleaseError, match="void"):
        current.conclude()
    assert stub.closed == [current.context]


def test_a_key_holder_that_is_away_leaves_no_uploads_behind(
    server: EmbeddedServer, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = with_stub(server, monkeypatch)
    current = opened(server, task, cohort.counts_plan())
    add_all(current)
    stub.fail("judge", UnavailableError("gone"), times=3)
    with pytest.raises(UnavailableError):
        current.conclude()
    assert not list(Path(server._folder.name).rglob(f"uploads/{task}/*/*"))


def test_a_full_disk_refuses_an_upload_and_says_what_to_do(
    server: EmbeddedServer, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = opened(server, task)

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server._blobs, "put_chunk", full)
    with pytest.raises(OverloadedError, match="TMPDIR"):
        current.add(upload(current, 0))
    assert current.uploads == 0


def test_addresses_and_kits_are_checked_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="host:port"):
        EmbeddedServer.load(shared().kit("server"), "nowhere")
    with pytest.raises(ConfigurationError, match="loopback"):
        EmbeddedServer("keyholder.example:7500", None, LocalKeyHolder()._roster)  # type: ignore[arg-type]
    with pytest.raises(SecaggError):
        EmbeddedServer.load(tmp_path, "127.0.0.1:1")


def test_a_closed_server_is_closed_once(running: Site) -> None:
    made = EmbeddedServer.load(shared().kit("server"), running.key_holder)
    made.close()
    made.close()
    assert not Path(made._folder.name).exists()
    assert kit(shared(), "server")
