"""The privacy budget in the key holder's ledger: pinned by the first round, and never exceeded."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from typer.testing import CliRunner

from secagg import audit
from secagg.accounting import affordable, releases_within, spent
from secagg.context import ContextId, RoundContext
from secagg.errors import BudgetError, ClosedError, ConfigurationError
from secagg.parameters import IntegerSegment, Plan, Privacy
from secagg.planner import make_plan
from secagg.privacy import release_rho
from secagg.sealing import ROUND_KEY_BYTES
from secagg_keyholder import database
from secagg_keyholder.accounts import Account, accounts
from secagg_keyholder.backup import backup_ledger, restore_ledger
from secagg_keyholder.cli import app
from secagg_keyholder.database import Database
from secagg_keyholder.ledger import Ledger

AUDIT_KEY = bytes(range(32))
EPSILON, DELTA = 4.0, 1e-5
# Three releases fit, and a good part of a fourth.
FITS = 3
NOISE = math.sqrt(3.7 / (2 * affordable(EPSILON, DELTA)))
PRIVACY = Privacy("release", NOISE, EPSILON, DELTA)


def planned(privacy: Privacy | None = PRIVACY, *, max_abs: int = 100) -> Plan:
    return make_plan([IntegerSegment("counts", 8, max_abs)], max_clients=6, privacy=privacy)


PLAN, EXACT = planned(), planned(None)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def ledger(state: Path) -> Iterator[Ledger]:
    with closing(on_disk(state)) as opened_:
        yield opened_


def on_disk(state: Path) -> Ledger:
    return Ledger(state / "ledger.sqlite3", AUDIT_KEY)


def opened(
    ledger: Ledger, number: int = 1, attempt: int = 1, *, plan: Plan = PLAN, task_id: str = "task"
) -> ContextId:
    context = RoundContext.create(
        plan,
        os.urandom(ROUND_KEY_BYTES),
        task_id=task_id,
        round_number=number,
        attempt=attempt,
        model_digest=os.urandom(32),
    )
    ledger.open_round(context, b"the plan's wire bytes", attempts_limit=100)
    return context.id


def released(ledger: Ledger, name: ContextId, content: bytes = b"sums") -> None:
    ledger.record_release(name, content.ljust(32), 3, content)


def rounds(ledger: Ledger, *numbers: int, plan: Plan = PLAN, task_id: str = "task") -> None:
    for number in numbers:
        released(ledger, opened(ledger, number, plan=plan, task_id=task_id))


def dump(ledger: Ledger) -> list[str]:
    return list(ledger._database._connection.iterdump())


def entries(ledger: Ledger, event: str) -> list[dict[str, Any]]:
    found = ledger._database.rows("SELECT details FROM audit WHERE event = ?", event)
    return [json.loads(details) for (details,) in found]


def left(ledger: Ledger) -> int | None:
    return ledger.account("task").left


# --- what a task began with ---------------------------------------------------------------------

OTHERS: dict[str, Privacy | None] = {
    "none": None,
    "less noise": replace(PRIVACY, noise_multiplier=0.9 * NOISE),
    "barely less noise": replace(PRIVACY, noise_multiplier=math.nextafter(NOISE, 0.0)),
    "more noise": replace(PRIVACY, noise_multiplier=2 * NOISE),
    "a larger epsilon": replace(PRIVACY, epsilon=8.0),
    "a larger delta": replace(PRIVACY, delta=1e-4),
    "another mode": replace(PRIVACY, mode="distributed"),
    "by each client": replace(PRIVACY, mode="local"),
    "another share": replace(PRIVACY, integer_share=0.5),
}


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("case", OTHERS)
def test_a_task_keeps_the_privacy_that_it_began_with(
    state: Path, ledger: Ledger, case: str, restarts: bool
) -> None:
    """A server could open one round without noise otherwise."""
    rounds(ledger, 1)
    if restarts:
        ledger.close()
        ledger = on_disk(state)
    before, other = dump(ledger), planned(OTHERS[case])
    for number, attempt in ((2, 1), (3, 2)):
        with pytest.raises(ConfigurationError, match="the privacy that the task began with"):
            opened(ledger, number, attempt, plan=other)
    assert dump(ledger) == before
    opened(ledger, 2)
    opened(ledger, plan=other, task_id="other")
    ledger.close()


def test_the_clients_whose_noise_counts_are_pinned_too(ledger: Ledger) -> None:
    privacy = replace(PRIVACY, mode="distributed")
    opened(ledger, plan=planned(replace(privacy, honest_clients=3)))
    with pytest.raises(ConfigurationError, match="honest_clients=3"):
        opened(ledger, 2, plan=planned(replace(privacy, honest_clients=2)))


def test_exact_sums_stay_exact_sums(ledger: Ledger) -> None:
    """What a task has released without noise, no noise makes private."""
    rounds(ledger, 1, plan=EXACT)
    with pytest.raises(ConfigurationError, match="began with, none; got Privacy"):
        opened(ledger, 2, plan=PLAN)
    rounds(ledger, *range(2, 9), plan=EXACT)
    found = ledger.account("task")
    assert (found.privacy, found.releases, found.left) == (None, 8, None)
    assert found.rho == found.epsilon == math.inf


def test_a_refused_round_pins_nothing(ledger: Ledger) -> None:
    poor = planned(replace(PRIVACY, epsilon=0.1))
    with pytest.raises(
        BudgetError, match=r"got 0 spent by 0 releases, and .* give the task more noise"
    ):
        opened(ledger, plan=poor)
    with pytest.raises(ClosedError, match="opened no round"):
        ledger.account("task")
    opened(ledger)


def test_the_plan_may_change_where_the_privacy_does_not(ledger: Ledger) -> None:
    """Such as its clip norm; each release costs what its own plan says."""
    finer = planned(max_abs=7)
    assert release_rho(finer) != release_rho(PLAN)
    rounds(ledger, 1)
    rounds(ledger, 2, plan=finer)
    assert ledger.account("task").rho == release_rho(PLAN) + release_rho(finer)


# --- what is spent ------------------------------------------------------------------------------


def test_as_many_releases_as_the_accounting_says_and_not_one_more(
    state: Path, ledger: Ledger
) -> None:
    assert releases_within(release_rho(PLAN), EPSILON, DELTA) == FITS
    rounds(ledger, *range(1, FITS + 1))
    before = dump(ledger)
    with pytest.raises(BudgetError, match=rf"epsilon=4 at delta=1e-05; got .* by {FITS} releases"):
        opened(ledger, FITS + 1)
    assert dump(ledger) == before
    with closing(on_disk(state)) as again, pytest.raises(BudgetError):
        opened(again, FITS + 1)
    rounds(ledger, 1, task_id="other")


def test_what_a_release_cost_is_in_the_audit_log(ledger: Ledger) -> None:
    rounds(ledger, 1, 2)
    rho, shown = release_rho(PLAN), entries(ledger, "round-released")
    assert [entry["rho"] for entry in shown] == [rho.hex()] * 2
    assert [entry["rho_spent"] for entry in shown] == [rho.hex(), (rho + rho).hex()]
    assert [entry["releases_left"] for entry in shown] == [2, 1]
    assert [entry["epsilon_spent"] for entry in shown] == [
        f"{spent(count * rho, DELTA):.6g}" for count in (1, 2)
    ]
    rounds(ledger, 1, plan=EXACT, task_id="exact")
    assert "rho" not in entries(ledger, "round-released")[-1]


def test_reading_a_release_again_costs_nothing(ledger: Ledger) -> None:
    name = opened(ledger)
    for _ in range(5):
        released(ledger, name)
    assert ledger.account("task").rho == release_rho(PLAN)
    with pytest.raises(ClosedError):
        released(ledger, name, b"others")
    assert ledger.account("task").releases == 1


def test_what_was_not_released_costs_nothing(ledger: Ledger) -> None:
    for attempt in range(1, 8):
        name = opened(ledger, 1, attempt)
        ledger.count_refusal(name)
        ledger.close_round(name, "REFUSED_TWICE")
    assert left(ledger) == FITS
    rounds(ledger, 2)


def test_rounds_passed_over_count_as_released(ledger: Ledger) -> None:
    """A ledger that was lost, or restored, does not know what was released."""
    opened(ledger, 3)
    assert ledger.account("task").passed_over == 2
    assert entries(ledger, "round-opened")[0]["passed_over"] == 2
    with pytest.raises(BudgetError, match="spent by 3 releases"):
        opened(ledger, 4)
    rounds(ledger, 1, task_id="other")


def test_rounds_passed_over_cost_as_much_as_the_dearest_that_is_known(ledger: Ledger) -> None:
    cheaper = planned(max_abs=7)
    dear, cheap = release_rho(PLAN), release_rho(cheaper)
    assert cheap < dear
    rounds(ledger, 1)
    opened(ledger, 3, plan=cheaper)
    assert ledger.account("task").rho == dear + dear
    opened(ledger, 1, plan=cheaper, task_id="other")
    opened(ledger, 2, plan=PLAN, task_id="other")
    assert ledger.account("other").rho == dear


@pytest.mark.parametrize("number", [FITS + 2, 2**31 - 1])
def test_a_round_far_ahead_finds_no_room_and_moves_nothing(ledger: Ledger, number: int) -> None:
    rounds(ledger, 1)
    with pytest.raises(BudgetError):
        opened(ledger, number)
    rounds(ledger, 2)
    opened(ledger, 10**6, plan=EXACT, task_id="exact")


def test_a_release_beyond_the_budget_is_refused_however_its_round_was_opened(
    ledger: Ledger,
) -> None:
    name = opened(ledger)
    with ledger._database.transaction():
        ledger._database.change("UPDATE tasks SET epsilon = 0.1")
    before = dump(ledger)
    with pytest.raises(BudgetError):
        released(ledger, name)
    assert dump(ledger) == before
    assert ledger.release(name) is None


@pytest.mark.parametrize("since", [0, 1, 2])
def test_a_restored_ledger_counts_what_it_cannot_know_of(
    state: Path, tmp_path: Path, since: int
) -> None:
    with closing(on_disk(state)) as ledger:
        rounds(ledger, 1)
        opened(ledger, 2)
        backup_ledger(state, tmp_path / "copy")
        for number in range(2, 2 + since):
            released(ledger, opened(ledger, number, 2))
    restore_ledger(tmp_path / "copy", tmp_path / "other")
    with closing(on_disk(tmp_path / "other")) as ledger:
        ledger.close_all_open("RESTORED")
        ledger.clear_restored()
        with pytest.raises(ConfigurationError):
            opened(ledger, 2 + since, 3, plan=EXACT)
        # What the clients, and the server, go on with.
        for number in range(2 + since, FITS + 1):
            released(ledger, opened(ledger, number, 3))
            assert ledger.account("task").passed_over == since
            assert left(ledger) == FITS - number
        with pytest.raises(BudgetError):
            opened(ledger, FITS + 1)


# --- an older ledger ----------------------------------------------------------------------------


@pytest.mark.parametrize("state_", ["RELEASED", "OPEN", "CLOSED"])
def test_a_ledger_from_before_privacy_keeps_what_it_knew(
    state: Path, monkeypatch: pytest.MonkeyPatch, state_: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(database, "MIGRATIONS", database.MIGRATIONS[:2])
        with closing(Database(state / "ledger.sqlite3")) as older, older.transaction():
            for index, task_id in enumerate(["zulu", "alpha"]):
                older.change(
                    """INSERT INTO rounds (task_id, round_number, attempt, plan_digest,
                        model_digest, round_key_id, plan, public_key, state, opened_at)
                        VALUES (?, 4, 1, ?, ?, ?, ?, ?, ?, 'then')""",
                    *(task_id, bytes(32), bytes(32), bytes([index]) * 32, b"plan", b"key"),
                    state_,
                )
    count = int(state_ == "RELEASED")
    with closing(on_disk(state)) as ledger:
        rho = math.inf if count else 0.0
        for task_id in ("zulu", "alpha"):
            assert ledger.account(task_id) == Account(task_id, None, count, 0, rho, math.inf)
            with pytest.raises(ConfigurationError, match="began with, none"):
                opened(ledger, 5, plan=PLAN, task_id=task_id)
            rounds(ledger, 5, plan=EXACT, task_id=task_id)
        rounds(ledger, 1)
        audit.verify(audit.read_entries(state / "ledger.sqlite3"))
    assert [found.task_id for found in accounts(state)] == ["zulu", "alpha", "task"]


@pytest.mark.parametrize(
    "values", [("release", None, 1, 1, 0, 1), ("release", 1, 1, None, 0, 1), ("", 1, 1, 1, None, 1)]
)
def test_no_half_of_a_privacy_is_ever_stored(ledger: Ledger, values: tuple[object, ...]) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        ledger._database._connection.execute(
            "INSERT INTO tasks VALUES ('task', ?, ?, ?, ?, ?, ?)", values
        )


# --- any sequence of calls ----------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(room=st.floats(0.05, 12.0), mode=st.sampled_from(["release", "distributed", "local"]))
def test_releases_made_one_after_the_other_are_those_within_the_budget(
    room: float, mode: str
) -> None:
    noise = math.sqrt(room / (2 * affordable(EPSILON, DELTA)))
    plan = planned(Privacy(mode, noise, EPSILON, DELTA))
    fits = releases_within(release_rho(plan), EPSILON, DELTA)
    with tempfile.TemporaryDirectory() as folder, closing(on_disk(Path(folder))) as ledger:
        for number in range(1, fits + 1):
            rounds(ledger, number, plan=plan)
            assert left(ledger) == fits - number
        with pytest.raises(BudgetError):
            opened(ledger, fits + 1, plan=plan)


class Machine(RuleBasedStateMachine):
    """A server that opens, releases and closes as it likes; the process restarts at any time."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._state = Path(self._folder.name)
        self._ledger = on_disk(self._state)
        self._newest = (0, 0)
        self._open: ContextId | None = None
        self._released: dict[int, Plan] = {}

    def teardown(self) -> None:
        self._ledger.close()
        self._folder.cleanup()

    def _cost(self, plan: Plan, number: int) -> float:
        """Of the rounds before a number and this one, by a count of our own."""
        known = {n: release_rho(p) for n, p in self._released.items() if n < number}
        most = max([release_rho(plan), *known.values()])
        return sum(known.values()) + (number - 1 - len(known)) * most + release_rho(plan)

    @rule(ahead=st.integers(0, 2), plan=st.sampled_from([PLAN, planned(max_abs=7)]))
    def open(self, ahead: int, plan: Plan) -> None:
        number = self._newest[0] + ahead
        wanted = (number, self._newest[1] + 1 if ahead == 0 else 1)
        if number == 0 or number in self._released:
            return
        if spent(self._cost(plan, number), DELTA) > EPSILON:
            with pytest.raises(BudgetError):
                opened(self._ledger, *wanted, plan=plan)
        else:
            self._open = opened(self._ledger, *wanted, plan=plan)
            self._newest, self._plan = wanted, plan

    @precondition(lambda self: self._open)
    @rule()
    def release(self) -> None:
        released(self._ledger, self._open)
        self._released[self._newest[0]] = self._plan
        found = self._ledger.account("task")
        assert found.releases == len(self._released)
        assert found.epsilon <= EPSILON
        assert found.left == max(0, found.left or 0)
        assert found.releases + found.passed_over <= FITS + 1  # the coarser plan costs a bit less
        self._open = None

    @precondition(lambda self: self._open)
    @rule()
    def close(self) -> None:
        self._ledger.close_round(self._open, "ABANDONED")
        self._open = None

    @rule()
    def restart(self) -> None:
        before = accounts(self._state)
        self._ledger.close()
        self._ledger = on_disk(self._state)
        assert accounts(self._state) == before


Machine.TestCase.settings = settings(deadline=None, max_examples=15, stateful_step_count=15)
TestAnySequence = Machine.TestCase


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("SECAGG_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "160")


def budget(state: Path, *arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["budget", "--state-dir", str(state), *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_shows_what_is_left_while_the_key_holder_runs(
    state: Path, ledger: Ledger
) -> None:
    rounds(ledger, 1, 2)
    rounds(ledger, 1, 2, 3, 4, plan=EXACT, task_id="analytics")
    opened(ledger, 2, plan=planned(replace(PRIVACY, mode="local")), task_id="skipped")
    before = dump(ledger)
    code, shown, said = budget(state)
    assert (code, said) == (0, "")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines()]
    epsilon = f"{spent(2 * release_rho(PLAN), DELTA):.4g}"
    assert ["task", "release", f"{NOISE:g}", "2", epsilon, "4", "1e-05", "1"] in cells
    assert ["analytics", "exact sums", "-", "4", "no bound", "-", "-", "no bound"] in cells
    assert dump(ledger) == before


def test_the_command_speaks_to_programs_too(state: Path, ledger: Ledger) -> None:
    rounds(ledger, 1)
    rounds(ledger, 3)
    rounds(ledger, 1, plan=EXACT, task_id="exact")
    code, shown, said = budget(state, "--format", "json")
    assert (code, said) == (0, "")
    rho = 3 * release_rho(PLAN)
    private, exact = json.loads(shown)
    assert private == {
        "task": "task",
        "privacy": {
            "mode": "release",
            "noise_multiplier": NOISE,
            "epsilon": EPSILON,
            "delta": DELTA,
            "honest_clients": 0,
            "integer_share": 0.1,
        },
        "releases": 2,
        "passed_over": 1,
        "rho_spent": pytest.approx(rho, rel=1e-12),
        "epsilon_spent": pytest.approx(spent(rho, DELTA)),
        "releases_left": 0,
    }
    assert exact == {
        "task": "exact",
        "privacy": None,
        "releases": 1,
        "passed_over": 0,
        "rho_spent": None,
        "epsilon_spent": None,
        "releases_left": None,
    }


def test_the_command_needs_a_ledger_and_makes_none(tmp_path: Path) -> None:
    code, shown, said = budget(tmp_path / "nowhere")
    assert (code, shown) == (78, "")
    assert "has no ledger; pass the one" in said
    (tmp_path / "ledger.sqlite3").write_bytes(b"garbage" * 1000)
    assert budget(tmp_path)[0] == 78
    assert not (tmp_path / "nowhere").exists()


def test_a_ledger_without_tasks_has_nothing_to_show(state: Path, ledger: Ledger) -> None:
    ledger.ping()
    assert budget(state, "--format", "json") == (0, "[]\n", "")
