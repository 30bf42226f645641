"""Servers that lie to a client's session, or mix things up: nothing counts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cohort
import numpy as np
import pytest
from sessions import Site, site_at, take_part, task

from secagg.errors import (
    ConfigurationError,
    ContextError,
    MalformedError,
    SecaggError,
)
from secagg.wire import codec
from secagg.wire.v1 import aggregation_service_pb2 as pb


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_at(tmp_path) as made:
        yield made


# --- servers that lie ---------------------------------------------------------------------------


def lying(site: Site, kind: type, change: Callable[[Any], None]) -> None:
    site.gate.change = lambda answer: change(answer) if isinstance(answer, kind) else None


def another_round_key(answer: pb.GetRoundResponse) -> None:
    answer.round_key = cohort.round_context(cohort.mixed_plan()).round_key


def another_key_by_its_name(answer: pb.GetRoundResponse) -> None:
    """A key of the server's own, with a context that names it: the key holder finds out."""
    foreign = cohort.round_context(cohort.mixed_plan(), task_id="task")
    answer.round_key = foreign.round_key
    answer.context.round_key_id = foreign.id.round_key_id


def another_plan(answer: pb.GetRoundResponse) -> None:
    answer.plan.max_clients += 1


def a_smaller_quorum(answer: pb.GetRoundResponse) -> None:
    answer.plan.min_clients = 2


def a_finer_quantiser(answer: pb.GetRoundResponse) -> None:
    answer.plan.segments[0].floats.bits = 16


def another_task(answer: pb.GetRoundResponse) -> None:
    answer.context.task_id = "other"


def no_context(answer: pb.GetRoundResponse) -> None:
    answer.ClearField("context")


def no_plan(answer: pb.GetRoundResponse) -> None:
    answer.ClearField("plan")


def no_key(answer: pb.GetRoundResponse) -> None:
    answer.ClearField("round_key")


ROUND_LIES = [another_round_key, another_plan, a_smaller_quorum, a_finer_quantiser, another_task]
ROUND_LIES += [no_context, no_plan, no_key]


@pytest.mark.parametrize("lie", ROUND_LIES, ids=lambda lie: lie.__name__)
def test_a_round_that_does_not_fit_together_is_refused(
    site: Site, lie: Callable[[Any], None]
) -> None:
    site.create(task())
    lying(site, pb.GetRoundResponse, lie)
    with site.session(0) as session, pytest.raises(SecaggError) as caught:
        next(session.rounds())
    assert isinstance(caught.value, (ContextError, MalformedError, ConfigurationError))
    assert site.gate.calls["OpenUpload"] == 0


def test_a_key_of_the_servers_own_opens_nothing_that_counts(site: Site) -> None:
    """The client cannot tell, but its receipt names the false key and is refused."""
    site.create(task())
    lying(site, pb.GetRoundResponse, another_key_by_its_name)
    with site.session(0) as session, pytest.raises(ContextError, match="round_key_id"):
        take_part(session, 0)
    assert site.store.counts(("task", 1, 1)).accepted == 0


def another_model(answer: pb.GetModelResponse) -> None:
    """Consistent in itself, but not what the round names."""
    answer.data = np.ones(len(answer.data) // 4, dtype="<f4").tobytes()
    answer.model_digest = hashlib.sha256(answer.data).digest()


def another_byte(answer: pb.GetModelResponse) -> None:
    answer.data = b"\1" + answer.data[1:]


def another_digest(answer: pb.GetModelResponse) -> None:
    answer.model_digest = bytes(32)


def a_shorter_model(answer: pb.GetModelResponse) -> None:
    answer.data = answer.data[:-4]


def another_total(answer: pb.GetModelResponse) -> None:
    answer.total_bytes += 4


def other_names(answer: pb.GetModelResponse) -> None:
    answer.tensors[0].name = "other"


def other_shapes(answer: pb.GetModelResponse) -> None:
    answer.tensors[0].shape[:] = [2, 3]


def no_tensors(answer: pb.GetModelResponse) -> None:
    answer.ClearField("tensors")


def huge_tensors(answer: pb.GetModelResponse) -> None:
    answer.tensors[0].shape[:] = [1 << 40, 1 << 40]


MODEL_LIES = [another_model, another_byte, another_digest, a_shorter_model, another_total]
MODEL_LIES += [other_names, other_shapes, no_tensors, huge_tensors]


@pytest.mark.parametrize("lie", MODEL_LIES, ids=lambda lie: lie.__name__)
def test_a_model_that_the_round_does_not_name_is_refused(
    site: Site, lie: Callable[[Any], None]
) -> None:
    site.create(task())
    lying(site, pb.GetModelResponse, lie)
    with site.session(0) as session, pytest.raises((ContextError, MalformedError)):
        next(session.rounds())


def test_a_model_that_is_not_finite_is_refused_even_if_the_round_names_it(site: Site) -> None:
    values = np.zeros(11, dtype=np.float32)
    values[3] = np.nan
    site.create(task(), codec.model_to_bytes(values))
    with site.session(0) as session, pytest.raises(MalformedError, match="finite"):
        next(session.rounds())


def test_a_server_cannot_feed_a_client_for_ever(site: Site) -> None:
    """The plan says how large the model is, before the first piece is asked for."""
    site.create(task())

    def endless(answer: pb.GetModelResponse) -> None:
        answer.chunk_count = 200
        answer.total_bytes = 200 * codec.PIECE_BYTES
        answer.data = bytes(codec.PIECE_BYTES)

    original = site.gate._model
    site.gate._model = lambda request: original(  # type: ignore[method-assign]
        pb.GetModelRequest(task_id=request.task_id, version=request.version)
    )
    lying(site, pb.GetModelResponse, endless)
    with site.session(0) as session, pytest.raises((ContextError, MalformedError)):
        next(session.rounds())
    assert site.gate.calls["GetModel"] <= 2


def test_a_round_that_the_client_is_done_with_is_not_taken_again(site: Site) -> None:
    """A server that repeats a round, with a context of its own, asks for the same update twice."""
    site.create(task())
    with site.session(0) as session:
        rounds = session.rounds()
        first = next(rounds)
        repeated = pb.GetRoundResponse(
            context=codec.context_id_to_wire(first.context.id),
            plan=codec.plan_to_wire(first.context.plan),
            round_key=first.context.round_key,
        )
        ask = session._next_round
        session._next_round = lambda _done: repeated  # type: ignore[method-assign]
        with pytest.raises(SecaggError):
            next(rounds)
        session._next_round = ask  # type: ignore[method-assign]


def test_missing_chunks_that_the_upload_does_not_have_are_not_sent(site: Site) -> None:
    site.create(task())

    def greedy(answer: pb.OpenUploadResponse) -> None:
        answer.missing_chunks.extend([1, 2, (1 << 32) - 1])

    lying(site, pb.OpenUploadResponse, greedy)
    with site.session(0) as session, pytest.raises(SecaggError):
        take_part(session, 0)
    assert site.store.counts(("task", 1, 1)).accepted == 0
