"""Nothing that was promised is lost, whatever goes wrong: the real services in a simulated world.

A run that fails is printed as hypothesis prints it, shrunk, with a line that reproduces it; it
becomes a test of its own further down.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from simulation.faults import EVENTS, LIES, MESSAGES, At, Die, Fault, Lie, Run
from simulation.mutants import MUTANTS
from simulation.strategy import runs
from simulation.world import Report, simulate

from secagg.failpoints import NAMES

ABANDONED = {"round-closed"}  # no round that goes well is
LEAST_OPERATIONS = 2_000
EXAMPLES = 25


def check(run: Run) -> Report:
    """A run in which everything holds."""
    report = simulate(run)
    assert not report.violations, "\n".join(report.violations)
    return report


@pytest.mark.timeout(600)
def test_nothing_is_lost_whatever_goes_wrong() -> None:
    """Other runs each time; none is kept, since what fails is printed whole."""
    operations = Counter[str]()

    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(runs())
    def each(run: Run) -> None:
        operations.update(check(run).operations)

    each()
    assert operations.total() >= LEAST_OPERATIONS, operations


@pytest.mark.parametrize("plan", ["counts", "unchecked", "checked"])
def test_where_nothing_goes_wrong_every_round_is_done(plan: str) -> None:
    report = check(Run(seed=3, clients=4, rounds=2, target=4, plan=plan))  # type: ignore[arg-type]
    assert (report.rounds, report.ended) == (Counter(DONE=2), "FINISHED")


def test_a_run_is_the_same_each_time() -> None:
    happenings = (
        Die("chunk-stored", 2),
        Fault("CommitUpload", 1, "lose answer"),
        At(2, "withdraw"),
    )
    run = Run(seed=11, plan="unchecked", happenings=happenings)
    assert check(run) == check(run)


SMALL = {"clients": 4, "rounds": 1, "target": 4, "plan": "counts"}


def small(*happenings: At | Die | Fault | Lie, **changes: object) -> Run:
    """One round of four clients, with this going wrong."""
    return Run(**(SMALL | changes), happenings=happenings)  # type: ignore[arg-type]


# --- every kind of fault, alone -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["OpenUpload", "PutChunk", "CommitUpload", "CheckSum", "Release"]
)
@pytest.mark.parametrize("what", MESSAGES)
def test_whatever_happens_to_one_message_costs_nobody_the_round(what: str, method: str) -> None:
    report = check(small(Fault(method, 1, what, 3)))
    assert report.injected == {what: 1}
    assert report.ended == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize("what", EVENTS)
def test_whatever_happens_once_is_survived(what: str) -> None:
    # Somebody is late, so that the round is open for long enough.
    report = check(small(At(1, what, 0, 10), At(3, "a client comes late", 3)))
    assert report.injected[what] >= 1
    assert report.ended == ("FAILED ABORTED" if what == "abort the task" else "FINISHED")


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", sorted(NAMES - ABANDONED))
def test_wherever_a_program_dies_the_round_is_done(failpoint: str) -> None:
    report = check(small(Die(failpoint), plan="checked"))
    assert report.injected == {f"die at {failpoint}": 1}
    assert (report.rounds, report.ended) == ({"DONE": 1}, "FINISHED")


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["unchecked", "checked"])
@pytest.mark.parametrize("what", LIES)
def test_whoever_lies_costs_nobody_else_the_round(what: str, plan: str) -> None:
    report = check(small(Lie(0, 1, what), plan=plan))
    assert report.injected[what] == (plan == "checked" or what != "beyond the norm")
    assert (report.rounds, report.ended) == ({"DONE": 1}, "FINISHED")


# --- what it can find -----------------------------------------------------------------------------

FOUND_BY = {
    "withdrawal_ignored": small(At(5, "a client comes late", 3), At(3, "withdraw", 0)),
    "withdrawal_too_late": small(At(1.0, "withdraw", 0)),
    "refusal_forgotten": small(Lie(0, 1, "broken seal")),
    "second_upload_accepted": small(Lie(0, 1, "two uploads"), At(5, "a client comes late", 3)),
    # Who pauses for how long is enough.
    "late_upload_accepted": small(seed=5, clients=6, target=3),
    "bytes_not_compared": small(Fault("PutChunk", 1, "change request", 12)),
    "no_quorum": small(At(0, "a client leaves", 0), At(0, "a client leaves", 1)),
    "log_rewritten": small(Die("chunk-stored")),
    "sums_stored_last": small(Die("round-finished")),
    "key_erased_first": small(Die("release-key-erased")),
    "admissions_forgotten": small(Die("upload-admitted")),
    "keys_kept": small(),
    "outbox_ignored": small(At(0.5, "crash a client", 0)),
}


def test_every_mutant_has_a_run() -> None:
    assert FOUND_BY.keys() == MUTANTS.keys()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_program_is_found(name: str) -> None:
    """The run fails where the program is broken, and only there."""
    check(FOUND_BY[name])
    with MUTANTS[name]():
        assert simulate(FOUND_BY[name]).violations
