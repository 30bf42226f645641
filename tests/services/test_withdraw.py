"""A client takes its upload back: before the round has closed it is in no sum, after that it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cohort
import grpc
import pytest
import structlog
from desks import Desk, desk_for
from federations import client_kit, shared
from federations import site as secured_site
from key_holders import LocalKeyHolder
from servers import DEADLINE_S, Killed, Server, exactly, running, scenario
from servers import task as timed_task
from serving import loop_thread, quick_retry
from sessions import (
    Site,
    contribute,
    exact,
    others_take_part,
    site_at,
    task,
    wait_for_end,
)

from secagg import audit
from secagg.context import RoundContext
from secagg.errors import (
    ClosedError,
    ConfigurationError,
    ContextError,
    DuplicateError,
    MismatchError,
    NotEnrolledError,
    RevokedError,
    SecaggError,
    UnavailableError,
)
from secagg.parameters import NormCheck
from secagg.rpc.gatekeeper import metadata
from secagg.rpc.status import from_rpc_error
from secagg.upload import Admission, Upload
from secagg.wire import codec
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import round_pb2
from secagg_client.ledger import Fate, Ledger
from secagg_client.session import ClientSession, CurrentRound
from secagg_server.states import RoundState, UploadState

TOO_LATE = "part of its sum, which is published"


# --- at the server ------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A round that waits for three uploads of one chunk."""
    made = desk_for(cohort.mixed_plan(max_clients=3), tmp_path)
    yield made
    made.store.close()


def upload_of(desk: Desk, client: int, nonce: int = 0) -> Upload:
    return cohort.noise_upload(desk.context, client, nonce)


def withdraw(desk: Desk, upload: Upload, client: int = 0) -> None:
    """As the caller of the desk, with client i's key."""
    receipt = upload.admission.receipt
    desk.intake.withdraw(
        receipt.context, cohort.identity(client).public, receipt.upload_digest, desk.caller
    )


def state_of(desk: Desk, client: int) -> UploadState | None:
    known = desk.store.upload(desk.context.id, cohort.identity(client).public.hex())
    return known and known[1]


def announce(desk: Desk, upload: Upload) -> None:
    desk.announce(upload)


def send_chunk(desk: Desk, upload: Upload) -> None:
    desk.announce(upload)
    desk.put(upload, 0)


def send_all(desk: Desk, upload: Upload) -> None:
    desk.send(upload)


def nothing(_desk: Desk, _upload: Upload) -> None:
    pass


STAGES = [nothing, announce, send_chunk, send_all]


@pytest.mark.parametrize("stage", STAGES)
def test_whatever_has_come_is_erased_and_does_not_count(
    desk: Desk, stage: Callable[[Desk, Upload], None]
) -> None:
    upload, other = upload_of(desk, 0), upload_of(desk, 1)
    desk.send(other)
    stage(desk, upload)
    withdraw(desk, upload)
    assert state_of(desk, 0) is UploadState.REJECTED
    assert desk.accepted() == 1
    assert desk.store.accepted(desk.context) == [other.admission]
    assert {path.parent.name for path in desk.files()} == {
        other.admission.receipt.upload_digest.hex()
    }
    (entry,) = [e for e in desk.store.audit() if e.event == "upload-rejected"]
    assert '"reason":"WITHDRAWN"' in entry.details.replace(" ", "")
    audit.verify(desk.store.audit())


@pytest.mark.parametrize("stage", STAGES)
def test_the_sealed_seed_is_forgotten_with_it(
    desk: Desk, stage: Callable[[Desk, Upload], None]
) -> None:
    """From it and the ciphertext, the key holder could open the upload alone."""
    upload = upload_of(desk, 0)
    stage(desk, upload)
    withdraw(desk, upload)
    with desk.store.database.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT admission FROM uploads").all() == [(None,)]


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_comes_in_again_in_that_attempt(
    desk: Desk, stage: Callable[[Desk, Upload], None]
) -> None:
    upload, second = upload_of(desk, 0), upload_of(desk, 0, 1)
    stage(desk, upload)
    withdraw(desk, upload)
    assert desk.announce(upload) == (UploadState.REJECTED, [])
    for step in (desk.commit, lambda each: desk.put(each, 0)):
        with pytest.raises(ClosedError):
            step(upload)
    with pytest.raises(DuplicateError):
        desk.announce(second)
    assert (desk.accepted(), desk.files()) == (0, [])


@pytest.mark.parametrize("stage", STAGES)
def test_withdrawing_again_changes_nothing_even_after_the_round(
    desk: Desk, stage: Callable[[Desk, Upload], None]
) -> None:
    upload = upload_of(desk, 0)
    stage(desk, upload)
    withdraw(desk, upload)
    before = len(desk.store.audit())
    withdraw(desk, upload)
    desk.close_round()
    withdraw(desk, upload)
    assert len(desk.store.audit()) == before + 1, "only that the round has closed"
    assert desk.store.counts(("task", 1, 1)).rejected == 1


def test_a_place_that_was_given_back_can_be_taken(desk: Desk) -> None:
    """Of three places in the cohort, two are filled; the one withdrawn is free again."""
    for client in (0, 1):
        desk.send(upload_of(desk, client))
    withdraw(desk, upload_of(desk, 0))
    for client in (2, 3):
        desk.send(upload_of(desk, client))
    assert desk.accepted() == 3


def test_nothing_is_withdrawn_from_a_cohort_that_is_complete(desk: Desk) -> None:
    """The coordinator closes the round for the sake of these very three."""
    uploads = [upload_of(desk, client) for client in range(3)]
    for upload in uploads:
        desk.send(upload)
    with pytest.raises(ClosedError, match=TOO_LATE):
        withdraw(desk, uploads[0])
    assert desk.accepted() == 3
    assert desk.stored(uploads[0], 0) == uploads[0].payload


CLOSED = [RoundState.CHECKING, RoundState.SUMMING, RoundState.RELEASING]


@pytest.mark.parametrize("steps", range(1, len(CLOSED) + 1))
def test_nothing_is_withdrawn_from_a_round_that_has_closed(desk: Desk, steps: int) -> None:
    upload = upload_of(desk, 0)
    desk.send(upload)
    desk.rounds.close("task")
    for state in CLOSED[:steps]:
        desk.store.advance(("task", 1, 1), state)
    with pytest.raises(ClosedError, match=TOO_LATE):
        withdraw(desk, upload)
    assert desk.store.accepted(desk.context) == [upload.admission]
    assert desk.stored(upload, 0) == upload.payload


@pytest.mark.parametrize("stage", [nothing, announce, send_chunk])
def test_what_was_never_complete_is_in_no_sum_and_may_be_withdrawn_late(
    desk: Desk, stage: Callable[[Desk, Upload], None]
) -> None:
    upload = upload_of(desk, 0)
    stage(desk, upload)
    known = state_of(desk, 0) is not None
    desk.close_round()
    withdraw(desk, upload)
    assert (desk.accepted(), desk.files()) == (0, [])
    assert (state_of(desk, 0) is not None) == known, "nothing new is kept of a round that is over"


def test_what_a_crash_left_of_the_chunks_goes_when_it_is_withdrawn_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = upload_of(desk, 0)
    desk.send(upload)

    def dies(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(desk.blobs, "drop_upload", dies)
        with pytest.raises(Killed):
            withdraw(desk, upload)
    assert (desk.accepted(), len(desk.files())) == (0, 1)
    withdraw(desk, upload)
    assert desk.files() == []


def test_a_withdrawal_does_not_need_the_round_to_be_open_just_now(desk: Desk) -> None:
    """While its disk fails, a server lets nobody in; the round still collects."""
    upload = upload_of(desk, 0)
    desk.send(upload)
    desk.rounds.close("task")
    withdraw(desk, upload)
    assert desk.accepted() == 0


def test_of_an_attempt_without_a_result_there_is_nothing_to_take(desk: Desk) -> None:
    upload = upload_of(desk, 0)
    desk.send(upload)
    desk.store.abort_round(("task", 1, 1), "QUORUM_NOT_REACHED: too few")
    with pytest.raises(ClosedError, match="without a result"):
        withdraw(desk, upload)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"round_key_id": bytes(32)}, ContextError),
        ({"attempt": 2}, ConfigurationError),
        ({"round_number": 2}, ConfigurationError),
        ({"task_id": "another"}, ConfigurationError),
    ],
)
def test_another_rounds_context_withdraws_nothing(
    desk: Desk, change: dict[str, object], kind: type[SecaggError]
) -> None:
    upload = upload_of(desk, 0)
    desk.send(upload)
    receipt = upload.admission.receipt
    context = replace(receipt.context, **change)  # type: ignore[arg-type]
    with pytest.raises(kind):
        desk.intake.withdraw(context, receipt.client_key, receipt.upload_digest)
    assert desk.accepted() == 1


@pytest.mark.parametrize("victim", STAGES[1:])
def test_nobody_withdraws_what_somebody_else_has_announced(
    desk: Desk, victim: Callable[[Desk, Upload], None]
) -> None:
    upload = upload_of(desk, 0)
    victim(desk, upload)
    files, state = desk.files(), state_of(desk, 0)
    with pytest.raises(DuplicateError, match="another client"):
        withdraw(desk, upload, client=1)
    desk.send(upload_of(desk, 1))
    with pytest.raises(DuplicateError, match="another one"):
        withdraw(desk, upload, client=1)
    assert state_of(desk, 0) is state
    assert set(files) <= set(desk.files())


@pytest.mark.parametrize("key", [0, 1, 2, 3])
def test_a_certificate_withdraws_for_its_own_client_alone(desk: Desk, key: int) -> None:
    upload = upload_of(desk, 0)
    desk.send(upload)
    desk.roster.enrolment = cohort.enrolment([0, 1, 2], revoked=[2])
    desk.caller = cohort.name_of(1)
    kinds = {0: MismatchError, 1: DuplicateError, 2: RevokedError, 3: NotEnrolledError}
    with pytest.raises(kinds[key]):
        withdraw(desk, upload, client=key)
    assert desk.accepted() == 1


def test_a_client_whose_key_was_rotated_can_still_withdraw(tmp_path: Path) -> None:
    desk = desk_for(cohort.mixed_plan(max_clients=3), tmp_path)
    desk.roster.enrolment = cohort.enrolment([0], second_keys={0: 7})
    desk.caller = cohort.name_of(0)
    upload = upload_of(desk, 0)
    desk.send(upload)
    withdraw(desk, upload, client=7)
    assert desk.accepted() == 0
    desk.store.close()


def test_a_withdrawal_amid_the_commit_wins(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = upload_of(desk, 0)
    send_chunk(desk, upload)
    real = desk.intake._missing

    def then_withdrawn(*arguments: object) -> list[int]:
        missing = real(*arguments)  # type: ignore[arg-type]
        withdraw(desk, upload)
        return missing

    monkeypatch.setattr(desk.intake, "_missing", then_withdrawn)
    with pytest.raises(ClosedError, match="withdrawn"):
        desk.commit(upload)
    assert (desk.accepted(), state_of(desk, 0)) == (0, UploadState.REJECTED)


def test_a_withdrawal_before_the_commit_looks_for_chunks_asks_for_none(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = upload_of(desk, 0)
    send_chunk(desk, upload)
    real = desk.intake._missing

    def withdrawn_first(*arguments: object) -> list[int]:
        withdraw(desk, upload)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(desk.intake, "_missing", withdrawn_first)
    with pytest.raises(ClosedError):
        desk.commit(upload)
    assert (desk.accepted(), state_of(desk, 0)) == (0, UploadState.REJECTED)


def test_commits_and_withdrawals_at_once_leave_each_upload_in_one_state(tmp_path: Path) -> None:
    """An upload is either withdrawn or accepted; a cohort that was complete once stays so."""
    desk = desk_for(cohort.mixed_plan(max_clients=5, min_clients=3), tmp_path)
    uploads = [upload_of(desk, client) for client in range(5)]
    for upload in uploads:
        send_chunk(desk, upload)

    def attempt(work: Callable[[], None]) -> bool:
        try:
            work()
        except ClosedError:
            return False
        return True

    jobs: list[Callable[[], None]] = []
    for client, upload in enumerate(uploads):
        jobs.append(lambda upload=upload: desk.commit(upload))  # type: ignore[misc]
        jobs.append(lambda upload=upload, client=client: withdraw(desk, upload, client))  # type: ignore[misc]
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(attempt, jobs))
    accepted = {a.receipt.upload_digest for a in desk.store.accepted(desk.context)}
    for (committed, withdrawn), upload in zip(
        zip(done[::2], done[1::2], strict=True), uploads, strict=True
    ):
        assert (upload.admission.receipt.upload_digest in accepted) == (committed and not withdrawn)
    desk.store.close()


# --- from round to sum --------------------------------------------------------------------------

HONEST = [1, 2, 3]


def take_back(server: Server, upload: Upload) -> None:
    receipt = upload.admission.receipt
    server.intake.withdraw(receipt.context, receipt.client_key, receipt.upload_digest)


@scenario
async def test_the_sum_at_the_deadline_is_that_of_the_others(folder: Path) -> None:
    async with running(folder) as server:
        server.create(timed_task(rounds=1))
        context = (await server.collecting()).context
        withdrawn = cohort.encrypted(context, 0)
        server.send(context, withdrawn)
        server.send_all(context, HONEST)
        take_back(server, withdrawn)
        seen: list[Admission] = []
        judge = server.key_holder.judge

        async def watched(context: RoundContext, admissions: Sequence[Admission]) -> Any:  # noqa: ANN401
            seen.extend(admissions)
            return await judge(context, admissions)

        server.key_holder.judge = watched  # type: ignore[method-assign]
        server.clock.advance(DEADLINE_S)
        row = await server.ended()
        assert (row.state, row.contributors) == (RoundState.DONE, len(HONEST))
        exactly(server.sums(context.plan, 1), cohort.clear_sums(context, HONEST))
        assert len(seen) == len(HONEST), "the key holder never gets its sealed seed"
        assert withdrawn.admission not in seen


@scenario
async def test_a_round_that_withdrawals_left_too_small_is_attempted_again(folder: Path) -> None:
    async with running(folder) as server:
        server.create(timed_task(rounds=1))
        context = (await server.collecting()).context
        uploads = [cohort.encrypted(context, index) for index in range(3)]
        for upload in uploads:
            server.send(context, upload)
        take_back(server, uploads[0])
        server.clock.advance(DEADLINE_S)
        row = await server.ended()
        assert row.state is RoundState.ABORTED
        assert row.reason.startswith("QUORUM_NOT_REACHED")
        context = (await server.collecting(attempt=2)).context
        server.send_all(context, [0, *HONEST])  # whoever withdrew may take part again
        server.clock.advance(DEADLINE_S)
        assert (await server.ended(attempt=2)).contributors == 4
        exactly(server.sums(context.plan, 1), cohort.clear_sums(context, [0, *HONEST]))


@scenario
async def test_a_round_does_not_close_one_short_because_of_a_withdrawal(folder: Path) -> None:
    async with running(folder) as server:
        server.create(timed_task(rounds=1, target_clients=4))
        current = await server.collecting()
        context = current.context
        withdrawn = cohort.encrypted(context, 0)
        server.send(context, withdrawn)
        server.send_all(context, [1, 2])
        take_back(server, withdrawn)
        server.send_all(context, [3])
        assert not current.filled.is_set()
        server.send_all(context, [4])
        assert (await server.ended()).contributors == 4
        exactly(server.sums(context.plan, 1), cohort.clear_sums(context, [1, 2, 3, 4]))


@pytest.mark.parametrize("with_key_holder", [False, True], ids=["the server", "both"])
def test_a_withdrawal_outlives_a_restart(with_key_holder: bool, tmp_path: Path) -> None:
    @scenario
    async def run(folder: Path) -> None:
        key_holder = LocalKeyHolder()
        async with running(folder, key_holder) as server:
            server.create(timed_task(rounds=1))
            context = (await server.collecting()).context
            withdrawn = cohort.encrypted(context, 0)
            server.send(context, withdrawn)
            server.send_all(context, HONEST)
            take_back(server, withdrawn)
        if with_key_holder:
            key_holder.restart()
        async with running(folder, key_holder) as server:
            server.coordinator.resume()
            await server.collecting()
            assert server.intake.open(withdrawn.admission) == (UploadState.REJECTED, [])
            take_back(server, withdrawn)
            server.clock.advance(DEADLINE_S)
            assert (await server.ended()).contributors == len(HONEST)
            exactly(server.sums(context.plan, 1), cohort.clear_sums(context, HONEST))
            audit.verify(server.store.audit())

    run(tmp_path)


# --- a client's session, over the wire ----------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_at(tmp_path) as made:
        yield made


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


def fates(outbox: Path) -> list[Fate]:
    return [entry.fate for entry in Ledger(outbox).entries()]


def after_a_contribution(session: ClientSession) -> CurrentRound:
    current = next(iter(session.rounds()))
    contribute(current, 0)
    return current


def test_the_round_goes_on_without_the_contribution_and_the_sum_is_exact(
    site: Site, outbox: Path
) -> None:
    site.create(task())
    with site.session(0, outbox=outbox) as session:
        current = after_a_contribution(session)
        others_take_part(site, 1)
        assert session.withdraw() == current.context.id
        assert fates(outbox) == [Fate.WITHDRAWN]
        others_take_part(site, 2, 3)
        wait_for_end(site, 1)
    exact(site, current, [1, 2, 3])
    (row,) = site.store.rounds("task")
    assert row.contributors == 3


def test_another_process_withdraws_what_this_one_has_sent(site: Site, outbox: Path) -> None:
    """As the command does, beside a client that is running."""
    site.create(task())
    with site.session(0, outbox=outbox) as session:
        current = after_a_contribution(session)
        with site.session(0, outbox=outbox) as command:
            assert command.withdraw() == current.context.id
        with pytest.raises(ClosedError, match="was not withdrawn"):
            contribute(current, 0)
        others_take_part(site, 1, 2, 3)
        assert list(session.rounds()) == []
    assert fates(outbox) == [Fate.WITHDRAWN]
    exact(site, current, [1, 2, 3])


def test_a_session_that_keeps_nothing_withdraws_its_own(site: Site) -> None:
    site.create(task())
    with site.session(0) as session:
        assert session.withdraw() is None
        after_a_contribution(session)
        assert session.withdraw() is not None
    assert site.store.counts(("task", 1, 1)).accepted == 0


def test_nothing_is_announced_again_once_it_is_withdrawn(site: Site, outbox: Path) -> None:
    site.create(task())
    with site.session(0, outbox=outbox) as session:
        current = after_a_contribution(session)
        session.withdraw()
        calls = dict(site.gate.calls)
        with pytest.raises(ClosedError, match="nothing was sent"):
            contribute(current, 0)
    assert dict(site.gate.calls) == calls


def test_an_upload_that_overtakes_its_withdrawal_is_turned_away(
    site: Site, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command finds it kept, before the client has announced it."""
    site.create(task())
    with site.session(0, outbox=outbox) as session:
        current = next(iter(session.rounds()))
        real = session._announce

        def late(upload: Upload) -> object:
            with site.session(0, outbox=outbox) as command:
                command.withdraw()
            return real(upload)

        monkeypatch.setattr(session, "_announce", late)
        with pytest.raises(ClosedError, match="withdrawn or refused"):
            contribute(current, 0)
    (entry,) = Ledger(outbox).entries()
    assert (entry.fate, entry.certain) == (Fate.WITHDRAWN, True)
    assert site.gate.calls["PutChunk"] == 0
    assert site.store.counts(("task", 1, 1)).accepted == 0


def test_a_lost_answer_to_a_withdrawal_is_asked_for_again(site: Site, outbox: Path) -> None:
    site.create(task())
    site.gate.lost = {("WithdrawUpload", 1), ("WithdrawUpload", 2)}
    with site.session(0, outbox=outbox) as session:
        after_a_contribution(session)
        session.withdraw()
    assert fates(outbox) == [Fate.WITHDRAWN]
    assert site.store.counts(("task", 1, 1)).rejected == 1


def test_the_ledger_has_a_withdrawal_only_once_the_server_has_said_so(
    site: Site, outbox: Path
) -> None:
    site.create(task())
    site.gate.lost = {("WithdrawUpload", each) for each in range(1, 1000)}
    with site.session(0, outbox=outbox, retry=quick_retry(1.0)) as session:
        after_a_contribution(session)
        with pytest.raises(UnavailableError):
            session.withdraw()
        assert fates(outbox) == [Fate.ACCEPTED]
        site.gate.lost = set()
        session.withdraw()
    assert fates(outbox) == [Fate.WITHDRAWN]


def test_a_closed_round_says_what_that_means_and_the_ledger_goes_on_counting(
    site: Site, outbox: Path
) -> None:
    site.create(task())
    with site.session(0, outbox=outbox) as session:
        current = after_a_contribution(session)
        others_take_part(site, 1, 2)
        wait_for_end(site, 1)
        with pytest.raises(ClosedError, match=TOO_LATE):
            session.withdraw()
    assert fates(outbox) == [Fate.ACCEPTED]
    exact(site, current, [0, 1, 2])


def test_no_verdict_is_asked_for_on_what_was_withdrawn(site: Site, outbox: Path) -> None:
    site.create(task(cohort.mixed_plan(norm_check=NormCheck())))
    with site.session(0, outbox=outbox) as session:
        current = after_a_contribution(session)
        with site.session(0, outbox=outbox) as command:
            command.withdraw()
        others_take_part(site, 1, 2, 3)
        with structlog.testing.capture_logs() as log:
            assert list(session.rounds(pytest.fail)) == []
    assert [line["event"] for line in log if line["log_level"] == "warning"] == []
    assert site.gate.calls["GetVerdict"] == 0
    exact(site, current, [1, 2, 3])


def test_a_client_may_come_back_in_the_next_round(site: Site, outbox: Path) -> None:
    site.create(task(rounds=2))
    with site.session(0, outbox=outbox) as session:
        after_a_contribution(session)
        session.withdraw()
        others_take_part(site, 1, 2, 3)
        rounds = session.rounds()
        # The same round is offered once more to a new loop; it has closed by now, or is skipped.
        current = next(current for current in rounds if current.number == 2)
        contribute(current, 0)
    assert fates(outbox) == [Fate.WITHDRAWN, Fate.ACCEPTED]


def test_over_tls_nobody_withdraws_for_somebody_else(tmp_path: Path) -> None:
    with loop_thread() as thread, secured_site(thread, tmp_path, shared()) as made:
        made.create(task())
        alice, bob = (client_kit(shared(), name) for name in ("alice", "bob"))
        with (
            ClientSession(made.server, "task", alice, retry=quick_retry()) as hers,
            ClientSession(made.server, "task", bob, retry=quick_retry()) as his,
        ):
            current = after_a_contribution(hers)
            assert hers._sent is not None
            receipt = hers._sent.upload.admission.receipt
            request = pb.WithdrawUploadRequest(
                context=codec.context_id_to_wire(current.context.id),
                client_key=receipt.client_key,
                upload_digest=receipt.upload_digest,
            )
            with pytest.raises(grpc.RpcError) as caught:
                his._stub.WithdrawUpload(request, timeout=20, metadata=metadata())
            assert type(from_rpc_error(caught.value)) is MismatchError
            request.client_key = bob.identity.public
            with pytest.raises(grpc.RpcError) as caught:
                his._stub.WithdrawUpload(request, timeout=20, metadata=metadata())
            assert type(from_rpc_error(caught.value)) is DuplicateError
            assert made.store.counts(("task", 1, 1)).accepted == 1
            answer = hers._stub.WithdrawUpload(
                pb.WithdrawUploadRequest(
                    context=request.context,
                    client_key=receipt.client_key,
                    upload_digest=receipt.upload_digest,
                ),
                timeout=20,
                metadata=metadata(),
            )
            assert answer.state == round_pb2.UPLOAD_STATE_REJECTED
            assert made.store.counts(("task", 1, 1)).accepted == 0


@pytest.mark.parametrize("size", [0, 31, 33])
@pytest.mark.parametrize("field", ["client_key", "upload_digest"])
def test_names_of_the_wrong_size_are_refused(site: Site, field: str, size: int) -> None:
    site.create(task())
    with site.session(0) as session:
        current = after_a_contribution(session)
        assert session._sent is not None
        receipt = session._sent.upload.admission.receipt
        request = pb.WithdrawUploadRequest(
            context=codec.context_id_to_wire(current.context.id),
            client_key=receipt.client_key,
            upload_digest=receipt.upload_digest,
        )
        setattr(request, field, bytes(size))
        with pytest.raises(grpc.RpcError) as caught:
            session._stub.WithdrawUpload(request, timeout=20)
        assert field in str(from_rpc_error(caught.value))
    assert site.store.counts(("task", 1, 1)).accepted == 1
