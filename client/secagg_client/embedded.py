"""The client's role inside another framework: an offer comes in as bytes, an upload goes out.

::

    client = EmbeddedClient(ClientKit.load("kits/clients/client-1"), "mine")
    current = client.join(offer, model)  # believes nothing that the key holder has not endorsed
    send(current.encrypt({"update": train(model)}, samples=120))

The counterpart is `secagg_server.embedded`; in between is anybody's transport, which need not be
trusted: what matters is endorsed, signed or encrypted. Needs neither torch nor pandas.

With a folder, an upload is kept until the next round, so that a crash never makes this client
encrypt twice for one round; and ledger and switch are those of `secagg-client privacy`,
``pause`` and ``resume``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from secagg.context import RoundContext
from secagg.encryptor import encrypt_quantized
from secagg.errors import (
    ConfigurationError,
    ContextError,
    ForgedSketchError,
    MalformedError,
)
from secagg.parameters import FloatSegment
from secagg.quantize import Contribution, Update, quantize
from secagg.sampling import Stream
from secagg.wire.codec import MAX_MESSAGE_BYTES, model_digest_of, parse, upload_to_bytes
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg_client.judgement import Judgement, judged
from secagg_client.kits import ClientKit
from secagg_client.ledger import Fate, Ledger, Limits
from secagg_client.offers import commitment_of, offered_round
from secagg_client.outbox import Kept, Outbox
from secagg_client.switch import Switch

__all__ = ["EmbeddedClient", "JoinedRound"]


@dataclass(frozen=True)
class JoinedRound:
    """A round that this client can contribute to, once.

    Attributes:
        context: the round; its plan says what to contribute.
    """

    context: RoundContext
    _commitment: bytes = field(repr=False)
    _key_holder: bytes = field(repr=False)
    _client: EmbeddedClient = field(repr=False)

    def encrypt(self, contributions: Mapping[str, Contribution], *, samples: int = 1) -> bytes:
        """Quantise and encrypt one contribution for each segment of the plan.

        Args:
            contributions: by segment name, see `quantize`.
            samples: examples behind it; ignored unless the plan weighs by samples.

        Returns:
            For `EmbeddedRound.add`; ``plan.payload_bytes`` and up to 2 kB more. With a folder, the
            same bytes again, whatever the contribution, if this round has been encrypted for.

        Raises:
            SchemaError, NonFiniteError, InputError: the contribution cannot be used.
            PrivacyError: it would cost more than allowed.
            PausedError: this client has been paused.
            ConfigurationError: the folder cannot be read or written.
            ClosedError: what was encrypted for this round before is damaged; sit it out.
        """
        return self._client._encrypt(
            self.context, contributions, samples, self._commitment, self._key_holder
        )


class EmbeddedClient:
    """Takes part in one task by bytes.

    Args:
        kit: what the authority gave this client.
        task_id: the task; an offer of another one is refused.
        folder: private to this client; see the module. None keeps nothing beyond this object.
        limits: what this client may spend, beyond what the plan allows.
        rounding: makes the stream of the stochastic rounding for a round; the operating system when
            omitted. Anything else is repeatable, is for tests and demos on one machine, and is
            refused where clients add noise.

    Raises:
        ConfigurationError: a limit without a folder to count in.
    """

    def __init__(
        self,
        kit: ClientKit,
        task_id: str,
        *,
        folder: Path | None = None,
        limits: Limits | None = None,
        rounding: Callable[[RoundContext], Stream] | None = None,
    ) -> None:
        self._limits = limits or Limits()
        if self._limits.max_epsilon is not None and folder is None:
            raise ConfigurationError(
                "expected a folder with max_epsilon; got none; what was spent before would not be "
                "known"
            )
        self._kit = kit
        self._task_id = task_id
        self._rounding = rounding
        self._outbox = Outbox(folder, task_id) if folder else None
        self._ledger, self._switch = Ledger(folder), Switch(folder)
        self._sent: Kept | None = None

    @property
    def public_key(self) -> bytes:
        """32 bytes that the server makes offers for, where a plan has a norm check."""
        return self._kit.identity.public

    def join(self, offer: bytes, model: Update | None = None) -> JoinedRound:
        """Check an offer, before any work is done for it.

        Args:
            offer: from `EmbeddedRound.offer`.
            model: what this client was given to start from, float32 tensors by name; None where
                the round has none.

        Raises:
            MalformedError, PlanError: no offer.
            UntrustedKeyError: not endorsed by a key holder that the kit pins.
            ContextError: another task, an earlier round than before, another model than the one
                that the key holder endorsed, or no commitment where there must be one.
            SchemaError: a model that the plan is not for.
            PrivacyError: a contribution would cost more than allowed.
            PausedError: this client has been paused.
            ForgedSketchError: this server has been caught forging before; says by which evidence.
        """
        self._switch.require_on()
        if self._outbox:
            self._outbox.require_no_evidence()
        _require_message("offer", offer)
        answer = parse(pb.GetRoundResponse, offer)
        newest = self._newest()
        context = offered_round(
            answer, self._task_id, after=(0, 0), newest=newest, pins=self._kit.pins()
        )
        if model_digest_of(context.plan, model) != context.id.model_digest:
            raise ContextError(
                "expected the model that the key holder has endorsed with this round; its SHA-256 "
                "differs; contribute nothing: this server may show different models to different "
                "clients"
            )
        commitment = commitment_of(context, answer)
        self._ledger.require(context, self._limits)
        return JoinedRound(context, commitment, answer.key_holder_identity, self)

    def judge(self, notice: bytes) -> Judgement:
        """What the norm check found of the newest upload, checked.

        Args:
            notice: from `EmbeddedRound.notice`.

        Raises:
            ConfigurationError: no upload was kept to judge.
            MalformedError, ContextError, UntrustedKeyError: not a verdict of the pinned key holder
                on this upload.
            ForgedSketchError: on something that the server had not committed to; with a folder, the
                evidence is kept there, and this client joins no other round.
        """
        kept = self._kept()
        if kept is None:
            raise ConfigurationError(
                "expected an upload that was kept; none is; contribute first, or keep a folder"
            )
        _require_message("notice", notice)
        answer = parse(pb.GetVerdictResponse, notice)
        try:
            judgement = judged(answer, kept, self._kit.pins(), _no_models)
        except ForgedSketchError as error:
            if self._outbox is None:
                raise
            evidence = self._outbox.keep_evidence(kept.number, notice)
            raise ForgedSketchError(f"{error}; {evidence}") from None
        if not judgement.accepted:
            self._ledger.ended(judgement.context, Fate.REFUSED, certain=True)
        return judgement

    def _encrypt(
        self,
        context: RoundContext,
        contributions: Mapping[str, Contribution],
        samples: int,
        commitment: bytes,
        key_holder: bytes,
    ) -> bytes:
        self._switch.require_on()
        self._ledger.require(context, self._limits)
        kept = self._kept()
        if kept is None or kept.context.id != context.id:
            quantized = quantize(
                context.plan,
                contributions,
                samples=samples,
                rotation=context.rotation,
                randomness=self._randomness(context),
            )
            upload = encrypt_quantized(context, quantized, self._kit.identity, commitment)
            kept = Kept(context, key_holder, upload)
            if self._outbox:
                self._outbox.save(kept)
        elif kept.upload.admission.receipt.challenge_commitment != commitment:
            raise ContextError(
                "expected the challenge commitment that this round's upload was signed with; the "
                "server now gives another one; nothing was sent"
            )
        self._sent = kept
        self._ledger.sent(context, kept.upload.admission.receipt.upload_digest)
        return upload_to_bytes(kept.upload)

    def _randomness(self, context: RoundContext) -> Stream:
        if self._rounding is None:
            return Stream.from_os()
        privacy = context.plan.privacy
        if privacy is not None and privacy.by_clients:
            raise ConfigurationError(
                "expected no repeatable rounding in a task to which clients add noise: whoever "
                "knows the stream takes the noise off again; leave it out"
            )
        return self._rounding(context)

    def _kept(self) -> Kept | None:
        return self._sent or (self._outbox.latest() if self._outbox else None)

    def _newest(self) -> tuple[int, int]:
        """Round and attempt of the newest upload; zeros before the first."""
        if self._sent:
            return self._sent.number
        return self._outbox.newest() if self._outbox else (0, 0)


def _require_message(what: str, data: bytes) -> None:
    """Refuse bytes beyond the largest message before they are parsed."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise MalformedError(
            f"expected {what} of at most {MAX_MESSAGE_BYTES} bytes; got bytes={len(data)}"
        )


def _no_models(_segment: FloatSegment, _version: int) -> bytes:
    raise ContextError(
        "expected a verdict without a comparison of directions, which an embedded server has not; "
        "got one; report it"
    )
