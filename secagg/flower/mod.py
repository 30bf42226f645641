"""The node's side: a Flower mod that lets nothing but a ciphertext out of a training reply.

It takes the offer out of the message, checks it before any work is done for it, lets the app train,
and encrypts the difference to the model that came. What the app replies beside it (metrics,
numbers of examples) is encrypted with it, or stays. An exception's text, which may quote data,
stays in the node's log; the server is told a code.

A training message without an offer is refused: a server without the wrapper gets no update in
plaintext. Evaluation is another matter: without an offer the app's metrics leave as they are, as in
any Flower app.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import ErrorCode

from secagg.context import RoundContext
from secagg.errors import (
    ConfigurationError,
    ContextError,
    InputError,
    MalformedError,
    SchemaError,
    SecaggError,
)
from secagg.flower.arrays import difference, tensors_of
from secagg.flower.envelopes import RECORD, Instruction, failure, greeting, sealed
from secagg.flower.metrics import SEGMENT, Metrics
from secagg.flower.plans import UPDATE
from secagg.flower.settings import NodeSettings, node_settings
from secagg.parameters import IntegerSegment
from secagg.quantize import Contribution
from secagg.rpc.channels import is_loopback
from secagg.sampling import Stream
from secagg_client.embedded import EmbeddedClient, JoinedRound
from secagg_client.kits import ClientKit

__all__ = ["Rounding", "SecaggMod", "secagg_mod", "task_of"]

Rounding = Callable[[Context, RoundContext], Stream]
"""Makes a node's stream of the stochastic rounding for a round."""

_LOG = logging.getLogger("flwr")


def task_of(run_id: int, *, training: bool) -> str:
    """The task at the key holder that a run's training, or its evaluation, is."""
    return f"flower-{run_id}" + ("" if training else "-evaluate")


@dataclass(frozen=True)
class SecaggMod:
    """The mod; `secagg_mod` is one that is ready.

    Put it first in ``ClientApp(mods=[...])``: the first mod sees the reply last. See `settings` for
    where it finds the node's kit.

    Attributes:
        rounding: repeatable rounding, for tests and demos on one machine: refused unless the key
            holder is on loopback, and where clients add noise. The operating system's randomness
            when omitted.
    """

    rounding: Rounding | None = field(default=None, repr=False)

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Answer one message; see `flwr.clientapp.typing.Mod`."""
        record = message.content.get(RECORD)
        training = message.metadata.message_type.split(".")[0] == MessageType.TRAIN
        if record is None and not training:
            return call_next(message, context)
        try:
            if not isinstance(record, ConfigRecord):
                raise ContextError(
                    "expected the offer of an encrypted round with a training message; got none: "
                    "nothing is sent in plaintext; wrap the server's strategy in SecureAggregation"
                )
            instruction = Instruction.from_record(record)
            message.content = RecordDict(
                {key: value for key, value in message.content.items() if key != RECORD}
            )
            return self._answer(message, context, call_next, instruction, training)
        except SecaggError as error:
            _LOG.error("secagg: nothing was sent: %s: %s", error.reason, error)
            return Message(
                Error(ErrorCode.MOD_FAILED_PRECONDITION, failure(error)), reply_to=message
            )

    def _answer(
        self,
        message: Message,
        context: Context,
        call_next: ClientAppCallable,
        instruction: Instruction,
        training: bool,
    ) -> Message:
        settings = node_settings(context)
        kit = ClientKit.load(settings.kit)
        if instruction.notice and settings.state:
            self._judge(self._client(kit, settings, context, training=True), instruction.notice)
        if instruction.hello:
            reply = greeting(kit.identity.public, judges=settings.state is not None)
            return Message(reply, reply_to=message)
        if not instruction.offer:
            if training:
                raise MalformedError("expected an offer or a hello with a training message")
            return call_next(message, context)
        client = self._client(kit, settings, context, training=training)
        received = _model(message, instruction) if training else None
        joined = client.join(instruction.offer, tensors_of(received) if received else None)
        if settings.state is None:
            _require_later(context, joined)
        answer = _called(message, context, call_next)
        if answer.has_error():
            return answer
        contributions, samples = _contributions(joined, instruction, received, answer.content)
        return Message(sealed(joined.encrypt(contributions, samples=samples)), reply_to=message)

    def _client(
        self, kit: ClientKit, settings: NodeSettings, context: Context, *, training: bool
    ) -> EmbeddedClient:
        task = task_of(context.run_id, training=training)
        rounding = self.rounding
        if rounding is None:
            return EmbeddedClient(kit, task, folder=settings.state, limits=settings.limits)
        if not is_loopback(settings.key_holder):
            raise ConfigurationError(
                "expected rounding by the operating system's randomness off loopback; a repeatable "
                "stream is for tests and demos on one machine; use secagg_mod"
            )
        return EmbeddedClient(
            kit,
            task,
            folder=settings.state,
            limits=settings.limits,
            rounding=lambda joined: rounding(context, joined),
        )

    @staticmethod
    def _judge(client: EmbeddedClient, notice: bytes) -> None:
        """Check the verdict on the last upload.

        Raises:
            ForgedSketchError: the server had something else judged; this node takes part no more.
        """
        try:
            judgement = client.judge(notice)
        except (ConfigurationError, ContextError, MalformedError) as error:
            _LOG.warning("secagg: a verdict that cannot be checked: %s: %s", error.reason, error)
            return
        if not judgement.accepted:
            _LOG.warning(
                "secagg: the update of round %d was refused by the norm check",
                judgement.context.round_number,
            )


def _require_later(context: Context, joined: JoinedRound) -> None:
    """Refuse a round that this node has answered, by what Flower keeps of the run on the node.

    A second ciphertext of one round would be another sum over the same data. With a state folder,
    the first one is sent again instead.
    """
    task = joined.context.id.task_id
    number = [joined.context.id.round_number, joined.context.id.attempt]
    known = context.state.get(RECORD)
    before = known.get(task) if isinstance(known, ConfigRecord) else None
    if isinstance(before, list) and number <= [int(part) for part in before]:
        raise ContextError(
            "expected a later round than the one answered; got one of before; without a state "
            "folder a node answers a round once; set secagg-state"
        )
    kept = dict(known) if isinstance(known, ConfigRecord) else {}
    context.state[RECORD] = ConfigRecord(kept | {task: number})


def _model(message: Message, instruction: Instruction) -> ArrayRecord:
    record = message.content.get(instruction.model)
    if not isinstance(record, ArrayRecord):
        raise MalformedError(
            "expected the model in the record that the server named; there is none; a mod before "
            "secagg_mod may have taken it away"
        )
    return record


def _called(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """The app's reply; of an error, a code."""
    try:
        answer = call_next(message, context)
    except Exception as error:
        _LOG.exception("secagg: the app has raised an exception; nothing was sent")
        reason = f"{type(error).__name__}; see the node's log"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
    if answer.has_error():
        _LOG.error("secagg: the app has replied with an error: %s", answer.error.reason)
        reason = "an error of the app or of a mod in it; see the node's log"
        return Message(Error(answer.error.code, reason), reply_to=message)
    return answer


def _contributions(
    joined: JoinedRound,
    instruction: Instruction,
    received: ArrayRecord | None,
    reply: RecordDict,
) -> tuple[dict[str, Contribution], int]:
    """What the plan asks for, and the examples behind it.

    Raises:
        SchemaError, InputError, NonFiniteError: the reply is not what can be contributed.
    """
    found: dict[str, Contribution] = {}
    if received is not None:
        found[UPDATE] = difference(received, _trained(reply))
    metrics = Metrics(instruction.bounds, bool(instruction.examples))
    values = _values(reply) if metrics.size or metrics.weighted else {}
    samples = _samples(values, instruction.examples) if instruction.examples else 1
    for segment in joined.context.plan.segments:
        if isinstance(segment, IntegerSegment) and segment.name == SEGMENT:
            share = min(samples, instruction.weight_cap) / instruction.weight_cap
            found[SEGMENT] = metrics.encode(values, share if metrics.weighted else 1.0, segment)
    return found, samples


def _trained(reply: RecordDict) -> ArrayRecord:
    if len(reply.array_records) != 1:
        raise SchemaError(
            "expected exactly one ArrayRecord in the reply to a training message; got "
            f"{len(reply.array_records)}; reply with the trained model alone"
        )
    return next(iter(reply.array_records.values()))


def _values(reply: RecordDict) -> MetricRecord:
    if len(reply.metric_records) != 1:
        raise SchemaError(
            f"expected exactly one MetricRecord in the reply; got {len(reply.metric_records)}; put "
            "all metrics into one"
        )
    return next(iter(reply.metric_records.values()))


def _samples(values: Mapping[str, object], name: str) -> int:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SchemaError(
            f"expected the number of examples as {name!r} in the MetricRecord; there is none; add "
            'it, or weigh all clients the same: SecureAggregation(..., weighting="equal")'
        )
    if not isfinite(value) or value < 1:
        raise InputError(
            f"expected {name!r} of 1 or more; got less; a node without examples sits the round out"
        )
    return int(value)


secagg_mod = SecaggMod()
"""The mod for ``ClientApp(mods=[secagg_mod])``."""
