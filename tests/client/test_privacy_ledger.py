"""What a client has spent is on its disk before it is spent, and is held against what it may."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cohort
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sessions import Site, site_at, task
from typer.testing import CliRunner

from secagg.accounting import spent
from secagg.context import RoundContext
from secagg.errors import (
    ClosedError,
    ConfigurationError,
    DuplicateError,
    MalformedError,
    PrivacyError,
    SecaggError,
    UnavailableError,
)
from secagg.parameters import FloatSegment, IntegerSegment, Plan, Privacy
from secagg.planner import make_plan
from secagg.privacy import release_rho
from secagg_client import ledger as ledger_module
from secagg_client.cli import app
from secagg_client.ledger import Entry, Fate, Ledger, Limits
from secagg_client.session import ClientSession

DELTA = 1e-6
PRIVACY = Privacy("release", 5.0, 3.0, DELTA)
FREE = Limits()


def private_plan(privacy: Privacy | None = PRIVACY) -> Plan:
    """Counts of a few things, noised."""
    return make_plan([IntegerSegment("counts", 24, 1)], max_clients=6, privacy=privacy)


PLAN = private_plan()
RHO = release_rho(PLAN)


def context(number: int = 1, attempt: int = 1, plan: Plan = PLAN, task: str = "t") -> RoundContext:
    return cohort.round_context(plan, task_id=task, round_number=number, attempt=attempt)


def noted(ledger: Ledger, current: RoundContext, fate: Fate | None = None, **how: bool) -> None:
    """A contribution, and what became of it."""
    ledger.sent(current)
    if fate is not None:
        ledger.ended(current.id, fate, **how)


def account(ledger: Ledger) -> ledger_module.Account:
    (only,) = ledger.accounts()
    return only


# --- on the disk --------------------------------------------------------------------------------


def test_what_was_noted_is_there_for_whoever_reads_it_next(tmp_path: Path) -> None:
    update = FloatSegment("update", cohort.TENSORS, 2.0, 10)
    plan = make_plan([update], max_clients=6, privacy=Privacy("local", 5.0, 3.0, DELTA))
    Ledger(tmp_path).sent(context(3, 2, plan))
    Ledger(tmp_path).ended(context(3, 2, plan).id, Fate.ACCEPTED)
    (entry,) = Ledger(tmp_path).entries()
    assert (entry.key, entry.clip, entry.bits) == (("t", 3, 2), 2.0, 10)
    assert entry.privacy == {
        "mode": "local", "noise_multiplier": 5.0, "epsilon": 3.0, "delta": DELTA,
        "honest_clients": 1, "integer_share": 0.1,
    }  # fmt: skip
    assert entry.rho == release_rho(plan)
    assert (entry.fate, entry.certain) == (Fate.ACCEPTED, False)
    assert entry.at.endswith("+00:00")


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    Ledger(tmp_path / "private").sent(context())
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "private" / "ledger.jsonl").stat().st_mode) == 0o600


def test_looking_makes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "absent")
    assert ledger.entries() == []
    assert ledger.accounts() == []
    ledger.require(context(), FREE)
    assert ledger.fate(context().id) is not Fate.WITHDRAWN
    assert not (tmp_path / "absent").exists()


def three_lines(folder: Path) -> bytes:
    ledger = Ledger(folder)
    noted(ledger, context(1), Fate.ACCEPTED)
    ledger.sent(context(2))
    return (folder / "ledger.jsonl").read_bytes()


@settings(max_examples=30)
@given(data=st.data())
def test_a_last_line_that_was_cut_off_takes_no_other_with_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    whole = three_lines(folder)
    last = whole.rindex(b"\n", 0, -1) + 1
    (folder / "ledger.jsonl").write_bytes(whole[: data.draw(st.integers(last, len(whole) - 1))])
    ledger = Ledger(folder)
    assert [(e.round_number, e.fate) for e in ledger.entries()] == [(1, Fate.ACCEPTED)]
    ledger.require(context(3), FREE)
    ledger.sent(context(3))
    assert [(e.round_number, e.fate) for e in ledger.entries()] == [
        (1, Fate.ACCEPTED),
        (3, Fate.SENT),
    ]
    lines = (folder / "ledger.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 1, 3]


@pytest.mark.parametrize(
    "line",
    [b"", b"nothing", b"{}", b"[]", b"null", b'{"task":"t","round":1,"attempt":1,"fate":"lost"}',
     b'{"task":"t","round":1,"attempt":1,"fate":"sent"}', b"\0\0\0"],
)  # fmt: skip
def test_a_damaged_line_stops_the_client_rather_than_forget_a_loss(
    line: bytes, tmp_path: Path
) -> None:
    whole = three_lines(tmp_path)
    start = whole.index(b"\n") + 1
    (tmp_path / "ledger.jsonl").write_bytes(whole[:start] + line + b"\n" + whole[start:])
    ledger = Ledger(tmp_path)
    for look in (ledger.entries, ledger.accounts, lambda: ledger.require(context(3), FREE)):
        with pytest.raises(ConfigurationError, match=r"line 2 of .*ledger.jsonl is damaged"):
            look()


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    """A command beside a client that is running, or two threads of one program."""
    ready = threading.Barrier(4)

    def write(first: int) -> None:
        ready.wait()
        for number in range(first, first + 10):
            Ledger(tmp_path).ended(context().id, Fate.MISSED)
            Ledger(tmp_path).sent(context(number))

    threads = [threading.Thread(target=write, args=(first,)) for first in (10, 20, 30, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {entry.round_number for entry in Ledger(tmp_path).entries()} == set(range(10, 50))
    assert len((tmp_path / "ledger.jsonl").read_bytes().splitlines()) == 80


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import cohort
from secagg.parameters import IntegerSegment
from secagg.planner import make_plan
from secagg_client.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
plan = make_plan([IntegerSegment("counts", 24, 1)], max_clients=6)
for number in range(1, 1_000_000):
    context = cohort.round_context(plan, task_id="t", round_number=number)
    ledger.sent(context)
    print(number, flush=True)
"""


def test_what_was_noted_outlives_kill_9(tmp_path: Path) -> None:
    support = str(Path(cohort.__file__).parent)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), support],
        stdout=subprocess.PIPE, text=True, env=os.environ,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 5:
                process.send_signal(signal.SIGKILL)
                break
        rest = [int(line) for line in process.stdout]
    promised = max([5, *rest])
    ledger = Ledger(tmp_path)
    found = [entry.round_number for entry in ledger.entries()]
    assert found[:promised] == list(range(1, promised + 1))
    ledger.ended(context(1).id, Fate.ACCEPTED)
    assert ledger.entries()[0].fate is Fate.ACCEPTED


def test_a_ledger_that_cannot_be_written_lets_nothing_be_sent(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="nothing was sent"):
        Ledger(tmp_path / "file").sent(context())
    Ledger(tmp_path / "file").ended(context().id, Fate.ACCEPTED)  # goes on counting, no error
    (tmp_path / "ledger.jsonl").mkdir()
    with pytest.raises(ConfigurationError, match="nothing is sent"):
        Ledger(tmp_path).require(context(), FREE)


# --- what counts --------------------------------------------------------------------------------

COUNTED = [
    (None, False, 1, 1),
    (Fate.ACCEPTED, False, 1, 1),
    (Fate.REFUSED, False, 0, 1),
    (Fate.MISSED, False, 0, 1),
    (Fate.WITHDRAWN, False, 0, 1),
    (Fate.REFUSED, True, 0, 0),
    (Fate.MISSED, True, 0, 0),
]


@pytest.mark.parametrize(("fate", "certain", "by_word", "at_most"), COUNTED)
def test_the_servers_word_and_what_it_could_have_done_are_counted_apart(
    fate: Fate | None, certain: bool, by_word: int, at_most: int
) -> None:
    ledger = Ledger(None)
    noted(ledger, context(), fate, **({"certain": certain} if fate else {}))
    found = account(ledger)
    assert found.rounds == by_word
    assert found.spent == (spent(RHO, DELTA) if by_word else 0)
    assert found.at_most == (spent(RHO, DELTA) if at_most else 0)
    assert found.left == PRIVACY.epsilon - found.at_most


def test_losses_of_rounds_add_up_and_attempts_at_one_round_do_not() -> None:
    """The key holder opens one sum of a round."""
    ledger = Ledger(None)
    for number, attempt in [(1, 1), (1, 2), (2, 1), (5, 1), (5, 2), (5, 3)]:
        noted(ledger, context(number, attempt), Fate.ACCEPTED)
    assert len(ledger.entries()) == 6
    assert account(ledger).rounds == 3
    assert account(ledger).spent == spent(3 * RHO, DELTA)


def test_one_attempt_that_counts_makes_its_round_count() -> None:
    ledger = Ledger(None)
    for attempt, fate in enumerate((Fate.MISSED, Fate.ACCEPTED, Fate.WITHDRAWN), 1):
        noted(ledger, context(1, attempt), fate)
    assert account(ledger).spent == spent(RHO, DELTA)


def test_tasks_are_counted_apart() -> None:
    ledger = Ledger(None)
    for name in ("a", "b", "a"):
        noted(ledger, context(len(ledger.entries()) + 1, task=name), Fate.ACCEPTED)
    assert [(each.task, each.rounds) for each in ledger.accounts()] == [("a", 2), ("b", 1)]
    assert [each.rounds for each in ledger.accounts("b")] == [1]
    assert ledger.accounts("c") == []


def test_without_privacy_there_is_no_bound() -> None:
    ledger = Ledger(None)
    noted(ledger, context(plan=private_plan(None)), Fate.ACCEPTED)
    found = account(ledger)
    assert (found.spent, found.at_most, found.left) == (math.inf, math.inf, 0.0)
    assert ledger.entries()[0].rho is None


def test_without_privacy_nothing_is_spent_where_nothing_left() -> None:
    ledger = Ledger(None)
    noted(ledger, context(plan=private_plan(None)), Fate.MISSED, certain=True)
    assert (account(ledger).spent, account(ledger).at_most) == (0.0, 0.0)


@pytest.mark.parametrize("later", [Fate.ACCEPTED, Fate.MISSED, Fate.REFUSED])
def test_what_is_withdrawn_stays_so(later: Fate) -> None:
    """A client that is running may hear of its commit after the command has withdrawn it."""
    ledger = Ledger(None)
    noted(ledger, context(), Fate.WITHDRAWN)
    ledger.ended(context().id, later)
    assert ledger.fate(context().id) is Fate.WITHDRAWN
    assert ledger.fate(context(attempt=2).id) is None
    with pytest.raises(ClosedError, match="nothing was sent"):
        ledger.sent(context())


def test_an_end_without_a_beginning_is_nothing(tmp_path: Path) -> None:
    """As of an upload from before there was a ledger."""
    Ledger(tmp_path).ended(context().id, Fate.ACCEPTED)
    assert Ledger(tmp_path).entries() == []


def test_sending_again_counts_again() -> None:
    ledger = Ledger(None)
    assert ledger.sent(context())
    assert not ledger.sent(context())
    ledger.ended(context().id, Fate.MISSED, certain=True)
    assert account(ledger).at_most == 0
    assert ledger.sent(context()), "none of it had left"
    assert account(ledger).at_most == spent(RHO, DELTA)
    assert len(ledger.entries()) == 1


# --- what is allowed ----------------------------------------------------------------------------


def with_budget(rounds: float) -> Plan:
    """A plan whose budget is that of so many rounds."""
    return private_plan(replace(PRIVACY, epsilon=spent(rounds * RHO, DELTA)))


@pytest.mark.parametrize("rounds", [1, 2, 7, 30])
def test_a_budget_of_so_many_rounds_allows_exactly_as_many(rounds: int) -> None:
    plan, ledger = with_budget(rounds), Ledger(None)
    for number in range(1, rounds + 1):
        ledger.require(context(number, plan=plan), FREE)
        noted(ledger, context(number, plan=plan), Fate.ACCEPTED)
    for number in (1, rounds):
        ledger.require(context(number, 2, plan), FREE)  # counted already
    with pytest.raises(PrivacyError, match=r"the task's budget.*nothing was sent"):
        ledger.require(context(rounds + 1, plan=plan), FREE)


def test_a_budget_below_one_round_allows_none() -> None:
    with pytest.raises(PrivacyError, match="budget"):
        Ledger(None).require(context(plan=with_budget(0.99)), FREE)


@pytest.mark.parametrize(("fate", "certain", "_", "counts"), COUNTED)
def test_what_the_server_says_it_left_out_is_held_against_the_budget(
    fate: Fate | None, certain: bool, _: int, counts: int
) -> None:
    """Or a server could say so of every round, and use them all."""
    plan, ledger = with_budget(1), Ledger(None)
    noted(ledger, context(plan=plan), fate, **({"certain": certain} if fate else {}))
    refused: Any = pytest.raises(PrivacyError) if counts else contextlib.nullcontext()
    with refused:
        ledger.require(context(2, plan=plan), FREE)


def test_a_users_limit_holds_within_a_larger_budget() -> None:
    ledger, limits = Ledger(None), Limits(max_epsilon=spent(2 * RHO, DELTA))
    for number in (1, 2):
        ledger.require(context(number), limits)
        noted(ledger, context(number), Fate.ACCEPTED)
    with pytest.raises(PrivacyError, match="your max_epsilon"):
        ledger.require(context(3), limits)
    ledger.require(context(3), FREE)
    ledger.require(context(1, task="another"), limits)


@pytest.mark.parametrize("limits", [Limits(require_privacy=True), Limits(max_epsilon=1e6)])
def test_a_user_who_wants_a_bound_joins_no_task_without_one(limits: Limits) -> None:
    current = context(plan=private_plan(None))
    Ledger(None).require(current, FREE)
    with pytest.raises(PrivacyError, match="adds no noise"):
        Ledger(None).require(current, limits)


CHANGES: list[dict[str, Any]] = [
    {"noise_multiplier": 4.0},
    {"epsilon": 2.9},
    {"epsilon": 3.1},
    {"delta": 1e-5},
    {"mode": "local"},
    {"integer_share": 0.2},
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_task_keeps_the_terms_that_it_began_with(change: dict[str, Any]) -> None:
    ledger, other = Ledger(None), private_plan(replace(PRIVACY, **change))
    noted(ledger, context(), Fate.MISSED, certain=True)
    ledger.require(context(2), FREE)
    with pytest.raises(PrivacyError, match=f"got another .*{next(iter(change))}"):
        ledger.require(context(2, plan=other), FREE)
    ledger.require(context(2, plan=other, task="another"), FREE)


@pytest.mark.parametrize(
    ("began", "now", "text"),
    [(None, PRIVACY, "one, where there was none"), (PRIVACY, None, "got none")],
)
def test_a_task_neither_drops_its_privacy_nor_gains_one(
    began: Privacy | None, now: Privacy | None, text: str
) -> None:
    ledger = Ledger(None)
    noted(ledger, context(plan=private_plan(began)), Fate.ACCEPTED)
    with pytest.raises(PrivacyError, match=text):
        ledger.require(context(2, plan=private_plan(now)), FREE)


def test_a_limit_needs_a_place_to_count_in() -> None:
    with pytest.raises(ConfigurationError, match="outbox with max_epsilon"):
        ClientSession(
            "127.0.0.1:1", "task", cohort.identity(0), insecure=True, limits=Limits(max_epsilon=1.0)
        )


# --- in a session -------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_at(tmp_path) as made:
        yield made


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


def noised(epsilon: float = PRIVACY.epsilon, **changes: int) -> Any:  # noqa: ANN401
    return task(private_plan(replace(PRIVACY, epsilon=epsilon)), **changes)


def give(current: Any) -> None:  # noqa: ANN401
    current.contribute({"counts": np.ones(24, dtype=np.int64)})


def the_entry(outbox: Path) -> Entry:
    (entry,) = Ledger(outbox).entries()
    return entry


def test_it_is_on_the_disk_before_the_first_message_leaves(
    site: Site, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.create(noised())
    with site.session(0, outbox=outbox) as session:
        current = next(iter(session.rounds()))
        seen: list[tuple[str, list[Fate]]] = []
        real = session._call

        def call(method: Any, request: Any) -> Any:  # noqa: ANN401
            seen.append((type(request).__name__, [e.fate for e in Ledger(outbox).entries()]))
            return real(method, request)

        monkeypatch.setattr(session, "_call", call)
        give(current)
    assert seen == [
        ("OpenUploadRequest", [Fate.SENT]),
        ("PutChunkRequest", [Fate.SENT]),
        ("CommitUploadRequest", [Fate.SENT]),
    ]
    entry = the_entry(outbox)
    assert (entry.fate, entry.rho, entry.key) == (Fate.ACCEPTED, RHO, ("task", 1, 1))


def test_whoever_sends_an_upload_of_their_own_enters_it_too(site: Site, outbox: Path) -> None:
    site.create(task())
    with site.session(0, outbox=outbox) as session:
        current = next(iter(session.rounds()))
        upload = cohort.encrypted(current.context, 0)
        session.send(current.context, upload)
    assert the_entry(outbox).fate is Fate.ACCEPTED
    assert the_entry(outbox).upload == upload.admission.receipt.upload_digest.hex()


class Crashed(BaseException):
    """The process ends here."""


# Where it ends, how, and what the ledger then says: a fate, and whether that is certain.
ENDS: list[tuple[str, BaseException, Fate, bool]] = [
    ("OpenUpload", Crashed(), Fate.SENT, False),
    ("PutChunk", Crashed(), Fate.SENT, False),
    ("CommitUpload", Crashed(), Fate.SENT, False),
    ("OpenUpload", ClosedError("late"), Fate.MISSED, True),
    ("PutChunk", ClosedError("late"), Fate.MISSED, False),
    ("CommitUpload", ClosedError("late"), Fate.MISSED, False),
    ("OpenUpload", MalformedError("bad"), Fate.REFUSED, True),
    ("CommitUpload", MalformedError("bad"), Fate.REFUSED, False),
    ("OpenUpload", UnavailableError("gone"), Fate.MISSED, True),
    ("PutChunk", UnavailableError("gone"), Fate.SENT, False),
    ("CommitUpload", UnavailableError("gone"), Fate.SENT, False),
    ("OpenUpload", SecaggError("a bug"), Fate.MISSED, True),
    ("CommitUpload", SecaggError("a bug"), Fate.SENT, False),
    ("OpenUpload", DuplicateError("second"), Fate.SENT, False),
]


def ends_at(session: ClientSession, point: str, error: BaseException) -> Callable[..., Any]:
    real = session._call

    def call(method: Any, request: Any) -> Any:  # noqa: ANN401
        if type(request).__name__ == f"{point}Request":
            raise error
        return real(method, request)

    return call


def test_however_it_ends_no_loss_is_forgotten(site: Site, tmp_path: Path) -> None:
    site.create(noised())
    for index, (point, error, fate, certain) in enumerate(ENDS):
        outbox = tmp_path / f"outbox-{index}"
        with site.session(index, outbox=outbox) as session:
            current = next(iter(session.rounds()))
            session._call = ends_at(session, point, error)  # type: ignore[method-assign]
            with pytest.raises(type(error)):
                give(current)
        entry = the_entry(outbox)
        assert (entry.fate, entry.certain) == (fate, certain), (point, error)


def test_a_second_try_that_is_refused_does_not_unsay_the_first(
    site: Site, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks had left before the crash; that the announcement is refused now proves nothing."""
    site.create(noised())
    for point, error in (("CommitUpload", Crashed()), ("OpenUpload", ClosedError("late"))):
        with site.session(0, outbox=outbox) as session:
            current = next(iter(session.rounds()))
            monkeypatch.setattr(session, "_call", ends_at(session, point, error))
            with pytest.raises(type(error)):
                give(current)
    assert (the_entry(outbox).fate, the_entry(outbox).certain) == (Fate.MISSED, False)


def test_data_that_cannot_be_used_costs_nothing(site: Site, outbox: Path) -> None:
    site.create(noised())
    with site.session(0, outbox=outbox) as session:
        current = next(iter(session.rounds()))
        with pytest.raises(SecaggError):
            current.contribute({"counts": np.full(24, 99)})
    assert Ledger(outbox).entries() == []


def sent_to(site: Site) -> int:
    return site.gate.calls["OpenUpload"]


def test_a_round_beyond_the_budget_is_not_offered_let_alone_sent(site: Site, outbox: Path) -> None:
    epsilon = spent(RHO, DELTA)
    plan = private_plan(replace(PRIVACY, epsilon=epsilon))
    ledger = Ledger(outbox)
    ledger.sent(context(7, plan=plan, task="task"))
    site.create(noised(epsilon))
    with site.session(0, outbox=outbox) as session:
        with pytest.raises(PrivacyError, match="budget"):
            next(iter(session.rounds()))
        current = cohort.round_context(plan, task_id="task")
        upload = cohort.noise_upload(current, 0)
        with pytest.raises(PrivacyError, match="nothing was sent"):
            session.send(current, upload)
    assert sent_to(site) == 0
    assert len(ledger.entries()) == 1


def test_a_limit_of_ones_own_is_kept_by_the_session(site: Site, outbox: Path) -> None:
    site.create(noised())
    limits = Limits(max_epsilon=spent(RHO, DELTA) * 0.9)
    with (
        site.session(0, outbox=outbox, limits=limits) as session,
        pytest.raises(PrivacyError, match="max_epsilon"),
    ):
        next(iter(session.rounds()))
    with (
        site.session(0, limits=Limits(require_privacy=True)) as session,
    ):
        next(iter(session.rounds()))
    assert sent_to(site) == 0


def test_a_session_without_an_outbox_counts_while_it_lasts(site: Site) -> None:
    site.create(noised(spent(RHO, DELTA)))
    with site.session(0) as session:
        current = next(iter(session.rounds()))
        give(current)
        with pytest.raises(PrivacyError):
            session._ledger.require(replace_round(current.context, 2), FREE)


def replace_round(current: RoundContext, number: int) -> RoundContext:
    return RoundContext(replace(current.id, round_number=number), current.plan, current.round_key)


# --- as a user sees it --------------------------------------------------------------------------


def shown(folder: Path, *arguments: str) -> str:
    result = CliRunner().invoke(
        app, ["privacy", "--state-dir", str(folder), *arguments], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    return result.output


def test_a_client_that_has_contributed_nothing_is_told_so(tmp_path: Path) -> None:
    assert "nothing has been contributed" in shown(tmp_path / "absent")
    assert json.loads(shown(tmp_path / "absent", "--format", "json"))["tasks"] == []
    assert not (tmp_path / "absent").exists()


def test_the_command_says_what_was_spent_and_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secagg.commands.out.width", 200, raising=False)
    ledger = Ledger(tmp_path)
    noted(ledger, context(1), Fate.ACCEPTED)
    noted(ledger, context(2), Fate.WITHDRAWN)
    noted(ledger, context(3), Fate.MISSED, certain=True)
    noted(ledger, context(1, plan=private_plan(None), task="open"), Fate.ACCEPTED)
    text = shown(tmp_path)
    assert "5 x norm, by the key holder" in text
    assert "3 (delta 1e-06)" in text
    assert "no bound" in text
    document = json.loads(shown(tmp_path, "--format", "json", "--max-epsilon", "2"))
    private, bare = document["tasks"]
    assert (private["task"], bare["task"]) == ("t", "open")
    one, two = spent(RHO, DELTA), spent(2 * RHO, DELTA)
    assert (private["spent"], private["at_most"]) == (one, two)
    assert private["left"] == 2 - two
    assert (bare["spent"], bare["at_most"], bare["left"]) == (None, None, 0.0)
    assert [each["fate"] for each in private["contributions"]] == [
        "accepted",
        "withdrawn",
        "missed",
    ]
    rounds = shown(tmp_path, "--task", "t")
    for words in ("accepted", "withdrawn", "too late, in no sum"):
        assert words in rounds
    assert "open" not in rounds
    assert "to x" in shown(tmp_path, "--task", "x")


def test_a_damaged_ledger_is_one_line_of_text(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_bytes(b"garbage\n")
    result = CliRunner().invoke(app, ["privacy", "--state-dir", str(tmp_path)])
    assert result.exit_code == 78
    assert "line 1" in result.output


def test_the_account_agrees_with_what_a_whole_task_released(site: Site, outbox: Path) -> None:
    site.create(noised(rounds=2))
    others = [site.session(index) for index in (1, 2)]
    with site.session(0, outbox=outbox) as session, contextlib.ExitStack() as stack:
        loops = [stack.enter_context(each).rounds() for each in others]
        for current in session.rounds():
            give(current)
            for loop in loops:
                give(next(loop))
    found = account(Ledger(outbox))
    assert (found.rounds, found.spent, found.at_most) == (2, found.at_most, spent(2 * RHO, DELTA))
