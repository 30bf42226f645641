"""A client's session against in-process services: honest ones, broken ones, and liars."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cohort
import numpy as np
import pytest
from sessions import (
    METHODS,
    Site,
    contribute,
    exact,
    others_take_part,
    session_at,
    site_at,
    take_part,
    task,
    wait_for_end,
)

from secagg.errors import (
    ClosedError,
    ConfigurationError,
    DuplicateError,
    InputError,
    QuorumError,
    RoundError,
    UnavailableError,
)
from secagg.parameters import FloatSegment, Plan, TensorSpec
from secagg.planner import make_plan
from secagg.wire import codec
from secagg_server.states import TaskState


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_at(tmp_path) as made:
        yield made


# --- the good way -----------------------------------------------------------------------------


def test_clients_contribute_until_the_task_ends_and_the_sum_is_exact(site: Site) -> None:
    site.create(task())
    others_take_part(site, 0, 1)
    with site.session(2) as session:
        seen = []
        for current in session.rounds():
            contribute(current, 2)
            seen.append(current)
    assert [current.number for current in seen] == [1]
    exact(site, seen[0], [0, 1, 2])
    assert seen[0].rounds_total == 1


def test_the_cost_is_that_of_the_payload(site: Site) -> None:
    site.create(task())
    with site.session(0) as session:
        current = next(iter(session.rounds()))
        cost = current.contribute(cohort.contribution(current.context.plan, 0), samples=5)
    assert cost.upload_bytes == current.context.plan.payload_bytes
    assert min(cost.quantize_s, cost.encrypt_s, cost.upload_s) > 0


def large_plan(tensors: int) -> Plan:
    shapes = [
        TensorSpec(f"layer.{i:03}.attention.weight", (300_000 // tensors,)) for i in range(tensors)
    ]
    return make_plan([FloatSegment("update", tuple(shapes), 1.0)], max_clients=5)


@pytest.mark.parametrize("tensors", [1, 300])
def test_a_model_of_several_pieces_arrives_whole(site: Site, tensors: int) -> None:
    spec = task(large_plan(tensors))
    assert spec.model is not None
    assert spec.model_bytes > codec.PIECE_BYTES
    values = np.arange(spec.model.parameters, dtype=np.float32)
    site.create(spec, codec.model_to_bytes(values))
    with site.session(0) as session:
        current = next(iter(session.rounds()))
        arrays = [current.model.tensors[tensor.name] for tensor in spec.model.tensors]
        latest = session.latest_model()
    np.testing.assert_array_equal(np.concatenate(arrays), values)
    assert (current.model.version, latest.version) == (0, 0)
    assert latest.tensors.keys() == current.model.tensors.keys()


def test_the_latest_model_is_the_one_the_last_round_made(site: Site) -> None:
    site.create(task())
    others_take_part(site, 0, 1, 2)
    wait_for_end(site, 0)
    with site.session(0) as session:
        latest = session.latest_model()
    flat = np.concatenate([latest.tensors[t.name].reshape(-1) for t in cohort.TENSORS])
    assert latest.version == 1
    np.testing.assert_array_equal(flat, np.frombuffer(site.blobs.model("task", 1), "<f4"))


def test_a_task_without_a_model_hands_out_none(site: Site) -> None:
    site.create(task(cohort.counts_plan()))
    with site.session(0) as session:
        current = next(iter(session.rounds()))
        assert (current.model.version, current.model.tensors) == (0, {})
        with pytest.raises(ConfigurationError):
            session.latest_model()


def test_an_aborted_attempt_is_followed_by_another_for_the_same_client(site: Site) -> None:
    site.key_holder.fail("judge", QuorumError("expected more"))
    site.create(task())
    others_take_part(site, 0, 1)
    with site.session(2) as session:
        attempts = []
        for current in session.rounds():
            attempts.append((current.number, current.context.id.attempt))
            contribute(current, 2)
            if len(attempts) == 1:
                continue
            for index in (0, 1):
                with site.session(index) as other:
                    contribute(next(iter(other.rounds())), index)
    assert attempts == [(1, 1), (1, 2)]
    exact(site, current, [0, 1, 2])


# --- refusals ---------------------------------------------------------------------------------


def test_an_unknown_task_is_refused(site: Site) -> None:
    with site.session(0) as session, pytest.raises(ConfigurationError, match="'task'"):
        next(session.rounds())


def test_a_failed_task_says_why(site: Site) -> None:
    site.create(task())
    site.store.end_task("task", TaskState.FAILED, "QUORUM_NOT_REACHED: too few")
    with site.session(0) as session, pytest.raises(RoundError, match="too few") as caught:
        next(session.rounds())
    assert type(caught.value) is RoundError


def test_bad_data_is_refused_before_anything_is_sent(site: Site) -> None:
    site.create(task())
    with site.session(0) as session:
        current = next(iter(session.rounds()))
        values = cohort.contribution(current.context.plan, 0)
        for damage in (
            {"counts": values["counts"][:-1]},
            {"counts": values["counts"] * 2**40},
            {"update": {"b": 1.0}},
        ):
            with pytest.raises(InputError):
                current.contribute(values | damage, samples=1)
        with pytest.raises(InputError):
            current.contribute(values, samples=0)
    assert site.gate.calls["OpenUpload"] == 0


def test_a_second_different_contribution_is_refused(site: Site) -> None:
    site.create(task())
    with site.session(0) as session:
        current = next(iter(session.rounds()))
        contribute(current, 0)
        with pytest.raises(DuplicateError):
            contribute(current, 0)


def test_contributing_too_late_is_refused(site: Site) -> None:
    site.create(task())
    with site.session(5) as late:
        current = next(iter(late.rounds()))
        others_take_part(site, 0, 1, 2)
        wait_for_end(site, 0)
        with pytest.raises(ClosedError):
            contribute(current, 5)
    exact(site, current, [0, 1, 2])


def test_repeatable_rounding_is_refused_off_loopback() -> None:
    with pytest.raises(ConfigurationError, match="repeatable"):
        session_at("192.168.1.2:7400", 0)


def test_a_remote_server_is_refused_whatever_the_rounding() -> None:
    with pytest.raises(ConfigurationError, match="plaintext"):
        session_at("192.168.1.2:7400", 0, rounding=None)


def test_a_server_that_is_not_there_is_given_up(site: Site) -> None:
    with session_at("127.0.0.1:1", 0) as session, pytest.raises(UnavailableError):
        next(session.rounds())


def test_the_session_needs_neither_torch_nor_pandas() -> None:
    code = (
        "import sys, secagg_client.session as s; "
        "assert not {'torch', 'pandas', 'sqlalchemy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- answers that are lost ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "lost", [(method, 1) for method in METHODS] + [("PutChunk", 2), ("PutChunk", 3)], ids=str
)
def test_a_lost_answer_leaves_exactly_one_contribution(site: Site, lost: tuple[str, int]) -> None:
    spec = task(cohort.long_plan() if lost[0] == "PutChunk" else None)
    site.create(spec)
    site.gate.lost.add(lost)
    with site.session(0) as session:
        current = take_part(session, 0)
    assert site.gate.calls[lost[0]] > lost[1]
    assert site.store.counts(("task", 1, 1)).accepted == 1
    others_take_part(site, 1, 2)
    wait_for_end(site, 1)
    exact(site, current, [0, 1, 2])


def test_every_answer_lost_once_leaves_exactly_one_contribution(site: Site) -> None:
    site.create(task())
    site.gate.lost |= {(method, 1) for method in METHODS}
    with site.session(0) as session:
        current = take_part(session, 0)
    others_take_part(site, 1, 2)
    wait_for_end(site, 1)
    exact(site, current, [0, 1, 2])


def test_losing_the_answer_to_the_commit_that_closes_the_round_is_no_refusal(site: Site) -> None:
    """The round closes the moment it is full; a client whose contribution is in the sum must not
    be told that nothing of it is."""
    site.create(task())
    others_take_part(site, 0, 1)
    site.gate.lost.add(("CommitUpload", 3))
    with site.session(2) as session:
        current = take_part(session, 2)
    wait_for_end(site, 0)
    exact(site, current, [0, 1, 2])


def test_an_answer_that_is_lost_for_ever_is_given_up(site: Site) -> None:
    site.create(task())
    site.gate.lost |= {("CommitUpload", n) for n in range(1, 1000)}
    with site.session(0) as session, pytest.raises(UnavailableError):
        take_part(session, 0)


def test_after_half_of_the_chunks_only_the_rest_is_sent(site: Site) -> None:
    site.create(task(cohort.long_plan()))
    with site.session(0) as first:
        current = next(iter(first.rounds()))
        upload = cohort.encrypted(current.context, 0)
        site.gate.lost |= {("PutChunk", n) for n in range(2, 1000)}
        with pytest.raises(UnavailableError):
            first.send(current.context, upload)
    site.gate.lost.clear()
    site.gate.calls.clear()
    with site.session(0) as again:
        again.send(current.context, upload)
        again.send(current.context, upload)
    # The second chunk was stored although its answers were lost.
    assert site.gate.calls["PutChunk"] == 1
    assert site.store.counts(("task", 1, 1)).accepted == 1
