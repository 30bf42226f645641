"""The server's role inside another framework: rounds whose bytes travel by anybody's transport.

::

    with EmbeddedServer.load("kits/server", "127.0.0.1:7500") as server:
        with server.open(plan, task_id="mine", round_number=1, model=model) as current:
            for client in clients:
                send(client, current.offer(public_key_of(client)))
            for answer in answers():
                current.add(answer)
            release = current.conclude().release

The counterpart is `secagg_client.embedded`. What is asked of the key holder, in which order, is
what our own server asks (see `coordinator`): receipts and seals, sketches and verdicts, the noise
of the sum, and only then the sum, once. The framework has the rest: who is asked, when a round is
closed, what becomes of the mean. Nothing outlives the process; a round that it leaves behind is
forgotten by the key holder when a later one of its task is opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from secagg.certificates import Kit, Role
from secagg.challenger import Challenger
from secagg.context import RoundContext
from secagg.endorsement import Endorsement
from secagg.enrolment import EnrolmentFile, Roster
from secagg.errors import (
    ClosedError,
    ConfigurationError,
    DuplicateError,
    NormError,
    OverloadedError,
    ReleaseError,
    SecaggError,
)
from secagg.parameters import CHUNK_BYTES, Plan
from secagg.quantize import Update
from secagg.release import Release
from secagg.upload import Admission, Upload
from secagg.verdicts import Verdict
from secagg.wire.codec import (
    context_id_to_wire,
    model_digest_of,
    plan_to_wire,
    upload_from_bytes,
    verdict_to_wire,
)
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg_server.blobs import BlobStore
from secagg_server.ciphertexts import Ciphertexts, here
from secagg_server.judging import check_quorum, judge_norms
from secagg_server.key_holder import KeyHolderClient, KeyHolderStub, patiently

__all__ = ["Conclusion", "EmbeddedRound", "EmbeddedServer"]

_SKETCHED_AT_ONCE = 2  # while one travels, the next is computed
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What came of a round.

    Attributes:
        release: the opened sum.
        contributors: names of the clients in it.
        refused: reason code by name of those whose upload was taken and then left out, such as
            ``NORM_REFUSED``.
    """

    release: Release
    contributors: tuple[str, ...] = field(repr=False)
    refused: dict[str, str] = field(repr=False)


class EmbeddedServer:
    """Opens rounds at a key holder. May be used from any thread.

    Args:
        key_holder: its address, ``host:port``.
        kit: the server's, for TLS; None speaks plaintext, on loopback only.
        roster: who may take part.

    Raises:
        ConfigurationError: the address cannot be used.
    """

    def __init__(self, key_holder: str, kit: Kit | None, roster: Roster) -> None:
        self.roster = roster
        self._folder = tempfile.TemporaryDirectory(prefix="secagg-")
        self._blobs = BlobStore(Path(self._folder.name))
        self._secret = os.urandom(32)
        # The key holder's stub belongs to one event loop; whoever embeds this may have none.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._closed = False
        try:
            self._stub = self._run(_connected(key_holder, kit))
        except BaseException:
            self.close()
            raise

    @classmethod
    def load(cls, folder: Path | str, key_holder: str) -> EmbeddedServer:
        """A server with the kit that `secagg provision` made for it.

        Raises:
            IdentityError: see `Kit.load`.
            ConfigurationError: there is no list of who may take part, or no such address.
        """
        kit = Kit.load(Path(folder), Role.SERVER)
        return cls(key_holder, kit, EnrolmentFile(kit.file("enrolment.json"), kit.ca))

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, and erase what was uploaded. Again: nothing happens."""
        if self._closed:
            return
        self._closed = True
        if (stub := getattr(self, "_stub", None)) is not None:
            self._run(stub.close())
        self._run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._folder.cleanup()

    def open(
        self,
        plan: Plan,
        *,
        task_id: str,
        round_number: int,
        attempt: int = 1,
        model: Update | None = None,
    ) -> EmbeddedRound:
        """A fresh round key for an attempt at a round.

        Args:
            plan: what is summed; of another round it may be another one.
            task_id: one for each training run. A task's privacy budget, and the numbers of its
                rounds, are the key holder's to remember.
            round_number: from 1, growing.
            attempt: from 1; another one may follow where one has failed before its sum was sent.
            model: what clients start from, float32 tensors by name; None without a model.

        Raises:
            ConfigurationError: a plan with a direction check, for which a server has to remember
                models.
            SchemaError, NonFiniteError: a model that the plan is not for.
            BudgetError: the task's privacy budget has no room for another release.
            UntrustedKeyError: not endorsed by a key holder that the kit pins.
            SecaggError: what else the key holder answered, or `UnavailableError`.
        """
        if plan.norm_check is not None and plan.norm_check.min_cosine is not None:
            raise ConfigurationError(
                "expected a norm check without min_cosine, for which a server has to remember the "
                "models of earlier rounds; leave min_cosine out, or run secagg-server"
            )
        digest = model_digest_of(plan, model)
        context, endorsement = self._run(
            patiently(
                lambda: self._stub.open_round(
                    plan,
                    task_id=task_id,
                    round_number=round_number,
                    attempt=attempt,
                    model_digest=digest,
                )
            )
        )
        challenger = Challenger(context, self._secret) if plan.norm_check else None
        ciphertexts = Ciphertexts(self._blobs, here, self._secret)
        return EmbeddedRound(self, context, endorsement, challenger, ciphertexts)

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _connected(address: str, kit: Kit | None) -> KeyHolderClient:
    return KeyHolderClient(address, kit)


class EmbeddedRound:
    """One attempt at one round, from its offers to its sum. As a context manager, it is abandoned
    at the end unless it was concluded.

    Attributes:
        context: what uploads must be made for.
        refused: reason code by name of those whose upload was taken and then left out, also where
            the round has failed for it.
    """

    def __init__(
        self,
        server: EmbeddedServer,
        context: RoundContext,
        endorsement: Endorsement,
        challenger: Challenger | None,
        ciphertexts: Ciphertexts,
    ) -> None:
        self.context = context
        self.refused: dict[str, str] = {}
        self._server = server
        self._endorsement = endorsement
        self._challenger = challenger
        self._ciphertexts = ciphertexts
        self._uploads: dict[str, Admission] = {}  # by the client's name
        self._verdicts: dict[bytes, Verdict] = {}  # by client key
        self._lock = threading.Lock()
        self._open = True

    def __enter__(self) -> EmbeddedRound:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abandon()

    @property
    def uploads(self) -> int:
        """Clients whose upload has been taken."""
        return len(self._uploads)

    def offer(self, client_key: bytes = b"") -> bytes:
        """What a client needs to take part, for `EmbeddedClient.join`; secret to nobody.

        Args:
            client_key: the client's public signing key, 32 bytes, where the plan has a norm check:
                it commits the server to what that client's upload will be asked. Without a norm
                check, all clients have the same offer.

        Raises:
            ConfigurationError: the plan has a norm check, and there is no such key.
        """
        commitment = b""
        if self._challenger is not None:
            if len(client_key) != len(self._endorsement.identity):
                raise ConfigurationError(
                    "expected a client's public signing key of 32 bytes, because the plan has a "
                    f"norm check; got bytes={len(client_key)}; ask the client for "
                    "EmbeddedClient.public_key, or look it up in the roster"
                )
            commitment = self._challenger.commitment(client_key)
        return pb.GetRoundResponse(
            context=context_id_to_wire(self.context.id),
            plan=plan_to_wire(self.context.plan),
            round_key=self.context.round_key,
            key_holder_identity=self._endorsement.identity,
            round_key_signature=self._endorsement.signature,
            challenge_commitment=commitment,
        ).SerializeToString()

    def add(self, data: bytes) -> str:
        """Take an upload, as `JoinedRound.encrypt` made it. Again: nothing changes.

        Returns:
            The client's name.

        Raises:
            MalformedError, ContextError, ReceiptError: see `Upload.validate`; or the receipt holds
                another commitment than the client was offered.
            NotEnrolledError, RevokedError: signed by nobody who may take part.
            DuplicateError: the client has contributed something else.
            ClosedError: the round is over, or its cohort is full.
            OverloadedError: the disk is full.
        """
        context, plan = self.context, self.context.plan
        upload = upload_from_bytes(data, plan)
        receipt = upload.admission.receipt
        client = self._server.roster.client_of(receipt.client_key)
        upload.validate(context)
        if self._challenger is not None:
            self._challenger.require_committed(receipt)
        with self._lock:
            if not self._open:
                raise ClosedError("expected an open round; this one is over; join the next round")
            if (known := self._uploads.get(client)) is not None:
                if known.receipt.upload_digest == receipt.upload_digest:
                    return client
                raise DuplicateError(
                    "expected one upload a client and round; this client sent a different one "
                    "before; the first one stands"
                )
            if len(self._uploads) >= plan.max_clients:
                raise ClosedError(
                    f"expected at most max_clients={plan.max_clients} uploads; the cohort is full; "
                    "join the next round"
                )
            self._keep(upload)
            self._uploads[client] = upload.admission
        return client

    def _keep(self, upload: Upload) -> None:
        name, payload = upload.admission.receipt.upload_digest, upload.payload
        try:
            for index in range(self.context.plan.chunks):
                part = payload[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
                self._server._blobs.put_chunk(self.context.id, name, index, part)
        except OSError as error:
            raise OverloadedError(
                f"expected room for an upload in the folder for temporary files: {error.strerror}; "
                "set TMPDIR to a larger one"
            ) from None

    def conclude(self) -> Conclusion:
        """Close the round, leave out what the key holder refuses, and have the rest opened.

        Raises:
            ClosedError: it was concluded, or abandoned, before.
            QuorumError: fewer uploads are left than the plan's minimum; another attempt may follow.
            ReleaseError: the sum does not open, and nobody is to be named for it; or it was handed
                over and the answer cannot be used: then the round is void and must not be tried
                again, the next one may.
            BudgetError: the task's privacy budget has no room for this release.
            SecaggError: what else the key holder answered, or `UnavailableError`; another attempt
                may follow.
        """
        with self._lock:
            if not self._open:
                raise ClosedError("expected an open round; this one is over; open the next one")
            self._open = False
        try:
            release = self._server._run(self._concluded())
        except SecaggError:
            self._forget()
            raise
        self._server._blobs.drop_round(self.context.id)
        contributors = tuple(name for name in self._uploads if name not in self.refused)
        return Conclusion(release, contributors, dict(self.refused))

    def notice(self, client_key: bytes) -> bytes:
        """The verdict on a client's upload, for `EmbeddedClient.judge`. For that client alone.

        Raises:
            ClosedError: no verdict was given on an upload with this key.
        """
        verdict = self._verdicts.get(client_key)
        if verdict is None or self._challenger is None:
            raise ClosedError("expected a verdict on an upload of this client; there is none")
        return pb.GetVerdictResponse(
            verdict=verdict_to_wire(verdict), challenge_key=self._challenger.key(client_key)
        ).SerializeToString()

    def abandon(self) -> None:
        """Have the key holder erase its secrets, and erase the uploads. Nothing once it is over."""
        with self._lock:
            if not self._open:
                return
            self._open = False
        self._forget()

    def _forget(self) -> None:
        # A key holder that cannot be reached erases them when the next round is opened.
        with contextlib.suppress(SecaggError):
            self._server._run(self._key_holder.close_round(self.context))
        self._server._blobs.drop_round(self.context.id)

    @property
    def _key_holder(self) -> KeyHolderStub:
        return self._server._stub

    async def _concluded(self) -> Release:
        await self._judged()
        await self._checked()
        try:
            names, residues = await self._checked_sum()
        except ReleaseError:
            await self._audited()
            names, residues = await self._checked_sum()
        try:
            answer = await patiently(
                lambda: self._key_holder.release(self.context, names, residues)
            )
        except SecaggError as error:
            # From two sums over almost the same updates, one could be read: never a second one.
            raise ReleaseError(
                f"expected the sum of the round to be opened; {error.reason}: {error}; the key "
                "holder has had it: this round is void; go on with the next one"
            ) from None
        rotation = self.context.rotation
        return Release(self.context.plan, rotation, answer.contributors, answer.sums)

    def _left(self) -> list[Admission]:
        """What is not refused, if it is enough."""
        left = [each for client, each in self._uploads.items() if client not in self.refused]
        check_quorum(self.context, len(left))
        return left

    async def _judged(self) -> None:
        admissions = self._left()
        found = await patiently(lambda: self._key_holder.judge(self.context, admissions))
        self._refuse(found)

    async def _checked(self) -> None:
        challenger, plan = self._challenger, self.context.plan
        if challenger is None:
            return
        verdicts = await judge_norms(
            self._key_holder,
            self.context,
            self._endorsement.identity,
            self._left(),
            lambda receipt: self._ciphertexts.sketch(challenger, plan, receipt),
            _SKETCHED_AT_ONCE,
        )
        self._verdicts = {verdict.receipt.client_key: verdict for verdict in verdicts}
        beyond = [v.receipt.upload_digest for v in verdicts if not v.accepted]
        self._refuse(dict.fromkeys(beyond, NormError.reason))

    async def _audited(self) -> None:
        found = {}
        for admission in self._left():
            name = admission.receipt.upload_digest
            if reason := await self._audit_one(name):
                found[name] = reason
        if not found:
            raise ReleaseError(
                "expected the sum to open under its manifest; it does not, and the noise audit "
                "names nobody; collect the round again"
            )
        self._refuse(found)

    async def _audit_one(self, name: bytes) -> str:
        low = await asyncio.to_thread(self._ciphertexts.low_bits_of, self.context, name)
        return await patiently(lambda: self._key_holder.audit(self.context, name, low))

    def _refuse(self, found: dict[bytes, str]) -> None:
        for client, admission in self._uploads.items():
            if reason := found.get(admission.receipt.upload_digest):
                self.refused[client] = reason

    async def _checked_sum(
        self,
    ) -> tuple[Sequence[bytes], NDArray[np.uint64]]:
        """A manifest and its sum, once the key holder has seen that its noise is in the guard."""
        names = [admission.receipt.upload_digest for admission in self._left()]
        residues = await asyncio.to_thread(self._ciphertexts.total, self.context, names)
        low = await asyncio.to_thread(self._ciphertexts.low_bits, self.context, residues, *names)
        await patiently(lambda: self._key_holder.check_sum(self.context, names, low))
        return names, residues
