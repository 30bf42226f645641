"""A server that puts a public key of its own in another's place: every client notices in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cohort
import pytest
from federations import Site, client_kit, key_holder_identity, kit, shared, shared_other, site
from serving import LoopThread, loop_thread, quick_retry

from secagg.context import ContextId
from secagg.endorsement import Endorsement
from secagg.errors import CertificateError, SecaggError, UntrustedKeyError
from secagg.receipts import SigningKey
from secagg.wire import codec
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg_client.session import ClientKit, ClientSession
from secagg_server.key_holder import KeyHolderClient
from secagg_server.services import AggregationService
from secagg_server.tasks import TaskSpec

PLAN = cohort.counts_plan()
NOT_PINNED = "endorsed by a key holder that is pinned here"
NOT_SIGNED = "the pinned key holder's signature on this round key"


class Bent(AggregationService):
    """The real service, with answers that a test changes on their way out."""

    bend: Callable[[pb.GetRoundResponse], None] = staticmethod(lambda _answer: None)

    async def GetRound(self, request: Any, context: Any) -> Any:  # noqa: ANN401
        """See the contract."""
        answer = await super().GetRound(request, context)
        self.bend(answer)
        return answer


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


@pytest.fixture(scope="module")
def running(thread: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(thread, tmp_path_factory.mktemp("site"), shared(), service=Bent) as made:
        made.create(TaskSpec("task", PLAN, 1, 600_000, 2, 3))
        yield made


@pytest.fixture
def bent(running: Site) -> Iterator[Bent]:
    assert isinstance(running.faces, Bent)
    yield running.faces
    running.faces.bend = lambda _answer: None  # type: ignore[method-assign]
    assert running.left_behind().keys() <= {"tasks", "rounds", "opened"}


def session(where: Site, **changes: Any) -> ClientSession:  # noqa: ANN401
    alice = client_kit(shared(), "alice")
    return ClientSession(where.server, "task", alice, retry=quick_retry(), **changes)


def sign_as(identity: SigningKey) -> Callable[[pb.GetRoundResponse, ContextId], None]:
    def sign(answer: pb.GetRoundResponse, context: ContextId) -> None:
        made = Endorsement.sign(identity, context)
        answer.key_holder_identity, answer.round_key_signature = made.identity, made.signature

    return sign


def own_round_key(answer: pb.GetRoundResponse) -> ContextId:
    """A round key of the server's own, with a context that names it; everything else is kept."""
    name = codec.context_id_from_wire(answer.context)
    foreign = cohort.round_context(
        PLAN,
        task_id=name.task_id,
        round_number=name.round_number,
        attempt=name.attempt,
        model_digest=name.model_digest,
    )
    answer.round_key = foreign.round_key
    answer.context.round_key_id = foreign.id.round_key_id
    return foreign.id


def kept_signature(answer: pb.GetRoundResponse) -> None:
    own_round_key(answer)


def signed_by_the_server(answer: pb.GetRoundResponse) -> None:
    sign_as(SigningKey.generate())(answer, own_round_key(answer))


def signed_by_the_server_under_the_key_holders_name(answer: pb.GetRoundResponse) -> None:
    name = answer.key_holder_identity
    signed_by_the_server(answer)
    answer.key_holder_identity = name


def signed_by_another_federations_key_holder(answer: pb.GetRoundResponse) -> None:
    sign_as(key_holder_identity(shared_other()))(answer, own_round_key(answer))


def signed_by_an_enrolled_client(answer: pb.GetRoundResponse) -> None:
    sign_as(client_kit(shared(), "bob").identity)(answer, own_round_key(answer))


def true_round_but_nobody_signed(answer: pb.GetRoundResponse) -> None:
    answer.ClearField("key_holder_identity")
    answer.ClearField("round_key_signature")


def true_round_but_an_empty_signature(answer: pb.GetRoundResponse) -> None:
    answer.round_key_signature = b""


def true_round_but_a_longer_signature(answer: pb.GetRoundResponse) -> None:
    answer.round_key_signature += b"\0"


LIES: list[tuple[Callable[[pb.GetRoundResponse], None], str]] = [
    (kept_signature, NOT_SIGNED),
    (signed_by_the_server, NOT_PINNED),
    (signed_by_the_server_under_the_key_holders_name, NOT_SIGNED),
    (signed_by_another_federations_key_holder, NOT_PINNED),
    (signed_by_an_enrolled_client, NOT_PINNED),
    (true_round_but_nobody_signed, NOT_PINNED),
    (true_round_but_an_empty_signature, NOT_PINNED),
    (true_round_but_a_longer_signature, NOT_PINNED),
]


@pytest.mark.parametrize(("lie", "text"), LIES, ids=lambda lie: getattr(lie, "__name__", ""))
def test_a_round_key_of_the_servers_own_gets_no_contribution(
    lie: Callable[[pb.GetRoundResponse], None], text: str, running: Site, bent: Bent
) -> None:
    bent.bend = lie  # type: ignore[method-assign]
    with session(running) as asking, pytest.raises(UntrustedKeyError, match=text):
        next(asking.rounds())


# What the true key holder endorsed, by how it differs from the round that is offered.
OTHERS: dict[str, Callable[[ContextId], ContextId]] = {
    "task": lambda name: replace(name, task_id="another"),
    "round": lambda name: replace(name, round_number=name.round_number + 1),
    "attempt": lambda name: replace(name, attempt=name.attempt + 1),
    "plan": lambda name: replace(name, plan_digest=cohort.counts_plan(max_clients=7).digest),
    "model": lambda name: replace(name, model_digest=bytes([7]) * 32),
    "round key": lambda name: replace(name, round_key_id=bytes([7]) * 32),
}


@pytest.mark.parametrize("part", OTHERS)
def test_an_endorsement_of_another_round_does_not_carry_over(
    part: str, running: Site, bent: Bent
) -> None:
    def bend(answer: pb.GetRoundResponse) -> None:
        other = OTHERS[part](codec.context_id_from_wire(answer.context))
        sign_as(key_holder_identity(shared()))(answer, other)

    bent.bend = bend  # type: ignore[method-assign]
    with session(running) as asking, pytest.raises(UntrustedKeyError, match=NOT_SIGNED):
        next(asking.rounds())


def test_the_true_round_is_taken(running: Site, bent: Bent) -> None:
    with session(running) as asking:
        assert next(asking.rounds()).context.plan == PLAN


# --- pins and identities that are not the federation's -------------------------------------------


@pytest.mark.parametrize("content", [None, "", "zz", "00" * 31])
def test_a_kit_without_usable_pins_is_refused_before_it_dials(
    content: str | None, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "kit"
    shutil.copytree(shared().kit("alice"), folder)
    (folder / "key_holder.pub").unlink()
    if content is not None:
        (folder / "key_holder.pub").write_text(content)
    with pytest.raises(CertificateError, match=r"key_holder\.pub"):
        ClientKit.load(folder)


def test_the_server_takes_no_round_from_a_key_holder_that_it_does_not_pin(
    thread: LoopThread, tmp_path: Path
) -> None:
    impostor = key_holder_identity(shared_other())

    async def ask(address: str) -> None:
        client = KeyHolderClient(address, kit(shared(), "server"))
        try:
            await client.open_round(
                PLAN, task_id="task", round_number=1, attempt=1, model_digest=bytes(32)
            )
        finally:
            await client.close()

    with site(thread, tmp_path, shared(), identity=impostor) as made:
        with pytest.raises(UntrustedKeyError, match=NOT_PINNED) as caught:
            thread.run(ask(made.key_holder))
        assert isinstance(caught.value, SecaggError)
