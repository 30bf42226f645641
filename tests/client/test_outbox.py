"""One round, one upload, ever: what was encrypted is sent again, or nothing is."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cohort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sessions import Site, contribute, others_take_part, site_at, take_part, task, wait_for_end

from secagg.context import RoundContext
from secagg.errors import (
    ClosedError,
    ConfigurationError,
    ContextError,
    DuplicateError,
    ForgedSketchError,
    InputError,
    UnavailableError,
)
from secagg.upload import Upload
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg_client import session as session_module
from secagg_client.outbox import Kept, Outbox
from secagg_client.session import ClientSession

PLAN = cohort.counts_plan()


def context(number: int = 1, attempt: int = 1, task_id: str = "task") -> RoundContext:
    return cohort.round_context(PLAN, task_id=task_id, round_number=number, attempt=attempt)


def kept_of(context: RoundContext, upload: Upload | None = None) -> Kept:
    """An upload as it is kept; a cheap one of client 0 when omitted."""
    return Kept(context, bytes(range(32)), upload or cohort.noise_upload(context, 0))


def only_file(folder: Path) -> Path:
    """The one upload; a session has its ledger beside it."""
    (file,) = (path for path in folder.iterdir() if path.name != "ledger.jsonl")
    return file


# --- on the disk ---------------------------------------------------------------------------------


def test_what_was_saved_comes_back_byte_for_byte(tmp_path: Path) -> None:
    current = context()
    kept = kept_of(current, cohort.encrypted(current, 0))
    Outbox(tmp_path, "task").save(kept)
    assert Outbox(tmp_path, "task").load(current.id) == kept
    assert Outbox(tmp_path, "task").latest() == kept
    assert Outbox(tmp_path, "task").newest() == (1, 1)


def test_an_empty_outbox_has_nothing_and_makes_nothing(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "absent", "task")
    assert outbox.load(context().id) is None
    assert outbox.latest() is None
    assert not outbox.evidence()
    assert outbox.newest() == (0, 0)
    assert not (tmp_path / "absent").exists()


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    Outbox(tmp_path / "private", "task").save(kept_of(context()))
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o700
    assert stat.S_IMODE(only_file(tmp_path / "private").stat().st_mode) == 0o600


def test_only_the_newest_round_is_kept(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "task")
    rounds = [context(1, 1), context(1, 2), context(2, 1), context(10, 1)]
    for current in rounds:
        outbox.save(kept_of(current))
        assert outbox.newest() == (current.id.round_number, current.id.attempt)
        assert outbox.load(current.id) is not None
    assert [outbox.load(current.id) for current in rounds[:-1]] == [None] * 3
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("one", "other"), [("a", "a-b"), ("a", "a.1"), ("a.1", "a"), ("a", "aa")])
def test_tasks_of_similar_names_do_not_touch_one_another(
    one: str, other: str, tmp_path: Path
) -> None:
    first, second = Outbox(tmp_path, one), Outbox(tmp_path, other)
    early, late = context(1, 1, one), context(2, 1, other)
    first.save(kept_of(early))
    second.save(kept_of(late))
    assert (first.newest(), second.newest()) == ((1, 1), (2, 1))
    assert first.load(early.id) is not None
    assert second.load(late.id) is not None


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    names = ["upload-task", "upload-task.1", "upload-task.1.x", ".upload-task.9.1.draft", "vectors"]
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    outbox = Outbox(tmp_path, "task")
    assert outbox.newest() == (0, 0)
    outbox.save(kept_of(context()))
    assert {path.name for path in tmp_path.iterdir()} == {*names, "upload-task.1.1"}


def test_evidence_stays_with_its_upload_whatever_comes_later(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "task")
    first, second, third = (context(number) for number in (1, 2, 10))
    outbox.save(kept_of(first))
    file = tmp_path / "evidence-task.1.1.pb"
    assert str(file) in outbox.keep_evidence((1, 1), b"what the server answered")
    for current in (second, third):
        outbox.save(kept_of(current))
    assert file.read_bytes() == b"what the server answered"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert outbox.load(first.id) is not None
    assert outbox.load(second.id) is None
    assert outbox.newest() == (10, 1)
    assert outbox.evidence() == [file]
    with pytest.raises(ForgedSketchError, match="move it away"):
        outbox.require_no_evidence()
    Outbox(tmp_path, "task.1").require_no_evidence()
    assert not Outbox(tmp_path, "task.1").evidence()


def test_evidence_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "a file").write_bytes(b"")
    outbox = Outbox(tmp_path / "a file", "task")
    assert "could not be kept" in outbox.keep_evidence((1, 1), b"what the server answered")


SITS_OUT = "sits the round out rather than encrypt a second time"


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"\0\0\0\0", b"\xff" * 4, b"garbage" * 1000, b"\x05\0\0\0hello"],
    ids=["empty", "short", "zeros", "long", "garbage", "no message"],
)
def test_a_file_that_is_none_makes_the_client_sit_out(data: bytes, tmp_path: Path) -> None:
    outbox, current = Outbox(tmp_path, "task"), context()
    outbox.save(kept_of(current))
    only_file(tmp_path).write_bytes(data)
    with pytest.raises(ClosedError, match=SITS_OUT):
        outbox.load(current.id)


def test_a_folder_in_the_files_place_does_too(tmp_path: Path) -> None:
    (tmp_path / "upload-task.1.1").mkdir()
    with pytest.raises(ClosedError, match=SITS_OUT):
        Outbox(tmp_path, "task").load(context().id)


CURRENT = context()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("kept")
    Outbox(folder, "task").save(kept_of(CURRENT))
    return folder, only_file(folder).read_bytes()


@given(data=st.data())
def test_any_flipped_bit_makes_the_client_sit_out(
    kept: tuple[Path, bytes], data: st.DataObject
) -> None:
    folder, good = kept
    # As many in the header, of some kilobytes, as in all of the ciphertext.
    header = len(good) - PLAN.payload_bytes
    place = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(good) - 1)))
    bad = bytearray(good)
    bad[place] ^= 1 << data.draw(st.integers(0, 7))
    only_file(folder).write_bytes(bytes(bad))
    with pytest.raises(ClosedError, match=SITS_OUT):
        Outbox(folder, "task").load(CURRENT.id)


@given(data=st.data())
def test_a_file_cut_anywhere_makes_the_client_sit_out(
    kept: tuple[Path, bytes], data: st.DataObject
) -> None:
    folder, good = kept
    only_file(folder).write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    with pytest.raises(ClosedError, match=SITS_OUT):
        Outbox(folder, "task").load(CURRENT.id)


def test_an_upload_for_another_context_is_not_sent(tmp_path: Path) -> None:
    """The same round and attempt, under another round key."""
    outbox = Outbox(tmp_path, "task")
    outbox.save(kept_of(context()))
    with pytest.raises(ClosedError, match="damaged or for another context"):
        outbox.load(context().id)


# --- crashes -------------------------------------------------------------------------------------


class Crashed(BaseException):
    """The process ends here; nothing catches this."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_at(tmp_path) as made:
        yield made


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


def announced(session: ClientSession) -> list[bytes]:
    """Digests of the uploads that a session announces from now on."""
    digests: list[bytes] = []
    real = session._call

    def call(method: Any, request: Any) -> Any:  # noqa: ANN401
        if isinstance(request, pb.OpenUploadRequest):
            digests.append(request.admission.receipt.upload_digest)
        return real(method, request)

    session._call = call  # type: ignore[method-assign]
    return digests


def crash_at(site: Site, outbox: Path, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a contribution, and die before the first request of this kind."""
    with site.session(0, outbox=outbox) as session:
        real = session._call

        def call(method: Any, request: Any) -> Any:  # noqa: ANN401
            if type(request).__name__ == f"{point}Request":
                raise Crashed
            return real(method, request)

        current = next(iter(session.rounds()))
        with monkeypatch.context() as patch:
            patch.setattr(session, "_call", call)
            with pytest.raises(Crashed):
                contribute(current, 0)


@pytest.mark.parametrize("point", ["OpenUpload", "PutChunk", "CommitUpload"])
def test_after_a_crash_the_same_bytes_are_sent(
    point: str, site: Site, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.create(task())
    crash_at(site, outbox, point, monkeypatch)
    first = only_file(outbox).read_bytes()

    def never(*_: object) -> Upload:
        raise AssertionError("encrypted a second time")

    monkeypatch.setattr(session_module, "encrypt_quantized", never)
    with site.session(0, outbox=outbox) as session:
        digests = announced(session)
        current = take_part(session, 0)
    assert only_file(outbox).read_bytes() == first
    kept = Outbox(outbox, "task").load(current.context.id)
    assert kept is not None
    assert digests == [kept.upload.admission.receipt.upload_digest]
    assert site.store.counts(("task", 1, 1)).accepted == 1


def test_after_a_crash_other_data_changes_nothing(
    site: Site, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two uploads of one round would give two sums over different data."""
    site.create(task())
    crash_at(site, outbox, "OpenUpload", monkeypatch)
    with site.session(0, outbox=outbox) as session:
        current = next(iter(session.rounds()))
        cost = current.contribute(cohort.contribution(current.context.plan, 5), samples=99)
    others_take_part(site, 1, 2)
    wait_for_end(site, 1)
    clear = cohort.clear_sums(current.context, [0, 1, 2])
    for one, other in zip(site.sums(current.context.plan), clear, strict=True):
        assert (one == other).all()
    assert (cost.quantize_s, cost.encrypt_s) == (0.0, 0.0)
    assert cost.upload_bytes == current.context.plan.payload_bytes


def test_a_crash_before_anything_was_saved_leaves_nothing_to_send(
    site: Site, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.create(task())

    def crash(*_: object) -> Upload:
        raise Crashed

    with monkeypatch.context() as patch, site.session(0, outbox=outbox) as session:
        patch.setattr(session_module, "encrypt_quantized", crash)
        with pytest.raises(Crashed):
            take_part(session, 0)
    assert not outbox.exists()
    with site.session(0, outbox=outbox) as session:
        take_part(session, 0)
    assert site.store.counts(("task", 1, 1)).accepted == 1


def test_data_that_cannot_be_used_leaves_no_upload_behind(site: Site, outbox: Path) -> None:
    site.create(task())
    with site.session(0, outbox=outbox) as session:
        current = next(iter(session.rounds()))
        with pytest.raises(InputError):
            current.contribute({"update": {"b": 1.0}}, samples=1)
        contribute(current, 0)
    assert site.store.counts(("task", 1, 1)).accepted == 1


def test_an_upload_that_cannot_be_kept_is_not_sent(site: Site, outbox: Path) -> None:
    outbox.write_bytes(b"a file in the folder's place")
    site.create(task())
    with site.session(0, outbox=outbox) as session:
        current = next(iter(session.rounds()))
        with pytest.raises(ConfigurationError, match=r"nothing was sent"):
            contribute(current, 0)
    assert site.gate.calls["OpenUpload"] == 0


def test_a_damaged_upload_is_neither_sent_nor_replaced(
    site: Site, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.create(task())
    crash_at(site, outbox, "PutChunk", monkeypatch)
    damaged = bytearray(only_file(outbox).read_bytes())
    damaged[-1] ^= 1
    only_file(outbox).write_bytes(bytes(damaged))
    site.gate.calls.clear()
    with site.session(0, outbox=outbox) as session:
        current = next(iter(session.rounds()))
        with pytest.raises(ClosedError, match=SITS_OUT):
            contribute(current, 0)
    assert site.gate.calls["OpenUpload"] == 0
    assert only_file(outbox).read_bytes() == bytes(damaged)


def test_a_lost_outbox_is_found_out_by_the_server(
    site: Site, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.create(task())
    crash_at(site, outbox, "CommitUpload", monkeypatch)
    only_file(outbox).unlink()
    with site.session(0, outbox=outbox) as session:
        current = next(iter(session.rounds()))
        with pytest.raises(DuplicateError):
            contribute(current, 0)
    assert site.store.counts(("task", 1, 1)).accepted == 0


@pytest.mark.parametrize("newest", [(1, 2), (2, 1), (7, 3)])
def test_a_server_that_goes_back_behind_the_newest_upload_is_refused(
    newest: tuple[int, int], site: Site, outbox: Path
) -> None:
    """As one that was restored from a backup: what it asks for again may have been released."""
    site.create(task())
    Outbox(outbox, "task").save(kept_of(context(*newest)))
    before = only_file(outbox).read_bytes()
    with (
        site.session(0, outbox=outbox) as session,
        pytest.raises(ContextError, match="repeats itself, goes back"),
    ):
        next(session.rounds())
    assert site.gate.calls["OpenUpload"] == 0
    assert only_file(outbox).read_bytes() == before


def test_sending_what_is_accepted_already_is_harmless(site: Site, outbox: Path) -> None:
    site.create(task())
    for _ in range(3):
        with site.session(0, outbox=outbox) as session:
            take_part(session, 0)
    assert site.store.counts(("task", 1, 1)).accepted == 1
    others_take_part(site, 1, 2)
    wait_for_end(site, 0)


def test_a_server_that_is_away_for_long_loses_nothing(site: Site, outbox: Path) -> None:
    site.create(task())
    site.gate.lost |= {("CommitUpload", number) for number in range(1, 1000)}
    with site.session(0, outbox=outbox) as session, pytest.raises(UnavailableError):
        take_part(session, 0)
    site.gate.lost.clear()
    with site.session(0, outbox=outbox) as session:
        digests = announced(session)
        current = take_part(session, 0)
    kept = Outbox(outbox, "task").load(current.context.id)
    assert kept is not None
    assert digests == [kept.upload.admission.receipt.upload_digest]
