"""A user's word that nothing is contributed for now, and how a client that is running heeds it."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cohort
import pytest
import structlog
from click.testing import Result
from serving import quick_retry
from sessions import Site, contribute, exact, others_take_part, site_at, task, wait_for_end
from typer.testing import CliRunner

from secagg.errors import ConfigurationError, PausedError
from secagg.receipts import SigningKey
from secagg.rpc.retry import RetryPolicy
from secagg.upload import Upload
from secagg_client import session as session_module
from secagg_client.cli import app
from secagg_client.config import identity_in
from secagg_client.ledger import Fate, Ledger
from secagg_client.outbox import Outbox
from secagg_client.session import PAUSE_POLL_S, ClientSession
from secagg_client.switch import Switch

# --- on the disk --------------------------------------------------------------------------------


def test_a_client_is_on_until_it_is_paused_and_again_once_it_is_resumed(tmp_path: Path) -> None:
    switch, running = Switch(tmp_path / "state"), Switch(tmp_path / "state")
    assert (running.paused, running.since()) == (False, None)
    assert not (tmp_path / "state").exists()
    running.require_on()
    switch.pause()
    assert running.paused
    with pytest.raises(PausedError, match="nothing more is sent; run `secagg-client resume`"):
        running.require_on()
    switch.resume()
    assert (running.paused, running.since()) == (False, None)
    running.require_on()


def test_doing_either_twice_is_doing_it_once(tmp_path: Path) -> None:
    switch = Switch(tmp_path)
    switch.resume()
    switch.pause()
    first = (tmp_path / "paused").stat()
    switch.pause()
    assert (tmp_path / "paused").stat() == first, "the first pause stands"
    switch.resume()
    switch.resume()
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    Switch(tmp_path / "state").pause()
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "state" / "paused").stat().st_mode) == 0o600
    since = Switch(tmp_path / "state").since()
    assert since is not None
    assert since.endswith("+00:00")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"yes"])
def test_whatever_the_file_holds_it_pauses(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "paused").write_bytes(content)
    assert Switch(tmp_path).paused
    assert Switch(tmp_path).since() is not None


def test_a_folder_that_cannot_be_written_says_what_else_helps(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="stop the client's process instead"):
        Switch(tmp_path / "file").pause()
    (tmp_path / "paused").mkdir()
    with pytest.raises(ConfigurationError, match="nothing has changed"):
        Switch(tmp_path).resume()
    assert Switch(tmp_path).paused


def test_without_a_folder_nobody_can_pause_it() -> None:
    switch = Switch(None)
    switch.pause()
    switch.require_on()
    switch.resume()
    assert (switch.paused, switch.since()) == (False, None)


# --- in a session -------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_at(tmp_path) as made:
        yield made


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


def waiting(naps: list[float], then: Callable[[], None]) -> RetryPolicy:
    """A policy that notes how long a pause is waited out, and does something at the third time.

    Waiting for a round that is not open yet is not counted: it may happen, or not.
    """
    policy = quick_retry()

    def nap(seconds: float) -> None:
        if seconds == PAUSE_POLL_S:
            naps.append(seconds)
            if len(naps) == 3:
                then()
        policy.sleep(seconds)

    return replace(policy, sleep=nap)


def test_while_paused_the_server_hears_nothing_and_then_the_round_comes(
    site: Site, outbox: Path
) -> None:
    site.create(task())
    Switch(outbox).pause()
    naps: list[float] = []
    calls_then: list[dict[str, int]] = []

    def resume() -> None:
        calls_then.append(dict(site.gate.calls))
        Switch(outbox).resume()

    retry = waiting(naps, resume)
    with site.session(0, outbox=outbox, retry=retry) as session:
        with structlog.testing.capture_logs() as log:
            current = next(iter(session.rounds()))
        contribute(current, 0)
        others_take_part(site, 1, 2)
        wait_for_end(site, 1)
    assert calls_then == [{}]
    assert len(naps) == 3
    assert [line["event"] for line in log if line["event"] == "paused"] == ["paused"]
    exact(site, current, [0, 1, 2])


def test_a_pause_while_the_next_round_is_waited_for_holds_it_back(site: Site, outbox: Path) -> None:
    site.create(task())
    naps: list[float] = []
    retry = waiting(naps, Switch(outbox).resume)
    with site.session(0, outbox=outbox, retry=retry) as session:
        real = session._next_round

        def next_round(done: tuple[int, int]) -> Any:  # noqa: ANN401
            answer = real(done)
            if not naps:
                Switch(outbox).pause()
            return answer

        session._next_round = next_round  # type: ignore[method-assign]
        current = next(iter(session.rounds()))
    assert (current.number, len(naps)) == (1, 3)
    assert site.gate.calls["GetRound"] == 2
    assert site.gate.calls["GetModel"] == 1, "nothing was fetched for the round held back"


def test_a_client_paused_while_it_trained_encrypts_and_sends_nothing(
    site: Site, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.create(task())

    def never(*_: object) -> Upload:
        raise AssertionError("encrypted")

    monkeypatch.setattr(session_module, "encrypt_quantized", never)
    with site.session(0, outbox=outbox) as session:
        current = next(iter(session.rounds()))
        Switch(outbox).pause()
        with pytest.raises(PausedError):
            contribute(current, 0)
    assert site.gate.calls["OpenUpload"] == 0
    assert Ledger(outbox).entries() == []


def pauses_at(session: ClientSession, point: str, outbox: Path) -> None:
    """Pause as soon as a message of this kind has been answered."""
    real = session._call

    def call(method: Any, request: Any) -> Any:  # noqa: ANN401
        answer = real(method, request)
        if type(request).__name__ == f"{point}Request":
            Switch(outbox).pause()
        return answer

    session._call = call  # type: ignore[method-assign]


@pytest.mark.parametrize(("point", "chunks"), [("OpenUpload", 0), ("PutChunk", 1)])
def test_a_client_paused_amid_an_upload_stops_there(
    point: str, chunks: int, site: Site, outbox: Path
) -> None:
    site.create(task(cohort.long_plan()))
    with site.session(0, outbox=outbox) as session:
        current = next(iter(session.rounds()))
        pauses_at(session, point, outbox)
        with pytest.raises(PausedError):
            contribute(current, 0)
    assert (site.gate.calls["PutChunk"], site.gate.calls["CommitUpload"]) == (chunks, 0)
    assert site.store.counts(("task", 1, 1)).accepted == 0
    (entry,) = Ledger(outbox).entries()
    assert (entry.fate, entry.certain) == (Fate.MISSED, False)


def test_after_a_pause_amid_an_upload_the_same_bytes_go_on(site: Site, outbox: Path) -> None:
    site.create(task())
    with site.session(0, outbox=outbox) as session:
        current = next(iter(session.rounds()))
        pauses_at(session, "PutChunk", outbox)
        with pytest.raises(PausedError):
            contribute(current, 0)
        kept = Outbox(outbox, "task").load(current.context.id)
        Switch(outbox).resume()
        contribute(current, 0)
    assert Outbox(outbox, "task").load(current.context.id) == kept
    assert site.store.counts(("task", 1, 1)).accepted == 1
    assert site.gate.calls["PutChunk"] == 1


# --- the commands -------------------------------------------------------------------------------


def command(name: str, folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, [name, "--state-dir", str(folder), *arguments])


def test_the_commands_pause_and_resume(tmp_path: Path) -> None:
    assert command("pause", tmp_path).exit_code == 0
    assert Switch(tmp_path).paused
    assert "paused since 2" in command("privacy", tmp_path).output
    assert command("resume", tmp_path).exit_code == 0
    assert not Switch(tmp_path).paused
    assert "paused" not in command("privacy", tmp_path).output


def enrolled_at(outbox: Path) -> SigningKey:
    return identity_in(outbox)


def withdrawing(site: Site, outbox: Path) -> Result:
    return command("withdraw", outbox, "--server", site.address, "--task", "task", "--insecure")


def test_the_command_pauses_and_takes_the_contribution_out(site: Site, outbox: Path) -> None:
    site.create(task())
    with ClientSession(
        site.address, "task", identity_in(outbox), insecure=True, outbox=outbox,
        rounding=lambda context: cohort.rounding(context, 0), retry=quick_retry(),
    ) as session:  # fmt: skip
        current = next(iter(session.rounds()))
        contribute(current, 0)
        result = withdrawing(site, outbox)
        assert result.exit_code == 0, result.output
        assert "withdrawn from round 1, attempt 1" in result.output
        assert Switch(outbox).paused
        again = withdrawing(site, outbox)
        assert again.exit_code == 0, again.output
        others_take_part(site, 1, 2, 3)
        wait_for_end(site, 1)
        late = withdrawing(site, outbox)
        assert late.exit_code == 0, "it is out, whenever one asks"
    assert [entry.fate for entry in Ledger(outbox).entries()] == [Fate.WITHDRAWN]
    exact(site, current, [1, 2, 3])


def test_the_command_says_when_it_is_too_late_and_leaves_the_client_paused(
    site: Site, outbox: Path
) -> None:
    site.create(task())
    with ClientSession(
        site.address, "task", identity_in(outbox), insecure=True, outbox=outbox,
        rounding=lambda context: cohort.rounding(context, 0), retry=quick_retry(),
    ) as session:  # fmt: skip
        contribute(next(iter(session.rounds())), 0)
        others_take_part(site, 1, 2)
        wait_for_end(site, 1)
    result = withdrawing(site, outbox)
    assert result.exit_code == 69
    assert "ROUND_CLOSED" in result.output
    assert "cannot be taken out" in result.output
    assert Switch(outbox).paused
    assert [entry.fate for entry in Ledger(outbox).entries()] == [Fate.ACCEPTED]


def test_a_client_that_has_sent_nothing_withdraws_nothing(site: Site, outbox: Path) -> None:
    result = withdrawing(site, outbox)
    assert result.exit_code == 0, result.output
    assert "nothing to withdraw" in result.output
    assert Switch(outbox).paused


def test_a_command_without_a_kit_pauses_all_the_same(outbox: Path) -> None:
    """To stop comes first; who this client is to the server can be put right later."""
    result = command("withdraw", outbox, "--task", "task")
    assert result.exit_code == 78
    assert "expected a kit" in result.output
    assert Switch(outbox).paused
