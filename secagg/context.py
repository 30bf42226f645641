"""What an upload is for: one task, round, attempt, plan, model and round key.

The context's digest enters everything that is derived, sealed or signed. Two parties that disagree
on any part of it (a server that shows different clients different models, say) hold different
public polynomials, and their ciphertexts do not add up to anything that opens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from secagg.errors import ConfigurationError, ContextError
from secagg.parameters import Plan
from secagg.residues import folded
from secagg.sampling import Stream, uniform_polynomials
from secagg.transcript import DIGEST_BYTES, digest

__all__ = ["NO_MODEL", "ContextId", "RoundContext", "check_task_id", "rotation_string"]

NO_MODEL = bytes(DIGEST_BYTES)
"""Model digest of a round that has no model, such as plain analytics."""

# Starts with a letter or digit: "." and ".." are folders of every file system.
_TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MAX_NUMBER = 1 << 32


def check_task_id(task_id: str) -> None:
    """Refuse a task id that could not name a folder safely.

    Raises:
        ConfigurationError: not 1 to 64 of the allowed characters.
    """
    if not _TASK_ID.fullmatch(task_id):
        raise ConfigurationError(
            "expected a task id of 1 to 64 letters, digits, '_', '.' or '-', the first one a "
            f"letter or digit; got {task_id[:80]!r}"
        )


@dataclass(frozen=True)
class ContextId:
    """The digests that name a round's context; what travels in headers and receipts.

    Attributes:
        task_id: 1 to 64 letters, digits, '_', '.' or '-'; the first one a letter or digit.
        round_number: from 1.
        attempt: from 1; another attempt has another round key.
        plan_digest, model_digest, round_key_id: 32 bytes each.
    """

    task_id: str
    round_number: int
    attempt: int
    plan_digest: bytes
    model_digest: bytes
    round_key_id: bytes

    def __post_init__(self) -> None:
        check_task_id(self.task_id)
        for name in ("round_number", "attempt"):
            if not 1 <= getattr(self, name) < _MAX_NUMBER:
                raise ConfigurationError(f"expected {name} from 1; got {getattr(self, name)}")
        for name in ("plan_digest", "model_digest", "round_key_id"):
            if len(getattr(self, name)) != DIGEST_BYTES:
                raise ConfigurationError(
                    f"expected {name} of {DIGEST_BYTES} bytes; got {len(getattr(self, name))}"
                )

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that stand for the whole context."""
        return digest(
            "context",
            self.task_id,
            self.round_number,
            self.attempt,
            self.plan_digest,
            self.model_digest,
            self.round_key_id,
        )

    def require(self, other: ContextId) -> None:
        """Refuse something made for another context.

        Raises:
            ContextError: names the parts that differ, without their values.
        """
        differing = [
            part.name
            for part in fields(self)
            if getattr(self, part.name) != getattr(other, part.name)
        ]
        if differing:
            raise ContextError(
                f"expected the context of this round; {', '.join(differing)} differ; fetch the "
                "current round and encrypt again"
            )


@dataclass(frozen=True)
class RoundContext:
    """A context with its plan and round key: all that a client needs to encrypt.

    Attributes:
        id: the digests by which it is named.
        plan: the plan whose digest the id carries.
        round_key: the key holder's public sealing key, 1216 bytes (see `sealing`).
    """

    id: ContextId
    plan: Plan
    round_key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if self.id.plan_digest != self.plan.digest:
            raise ContextError(
                "expected the plan that the round was opened with; its digest differs; the two "
                "sides run different versions or configurations"
            )
        if self.id.round_key_id != round_key_id(self.round_key):
            raise ContextError("expected the round key that the context names; its digest differs")

    @classmethod
    def create(
        cls,
        plan: Plan,
        round_key: bytes,
        *,
        task_id: str,
        round_number: int,
        attempt: int,
        model_digest: bytes,
    ) -> RoundContext:
        """Bind a plan and a fresh round key to a round."""
        key_id = round_key_id(round_key)
        name = ContextId(task_id, round_number, attempt, plan.digest, model_digest, key_id)
        return cls(name, plan, round_key)

    @property
    def rotation(self) -> bytes:
        """Public string of the quantiser's signs: equal in all attempts of a round."""
        return rotation_string(self.id.task_id, self.id.round_number, self.plan)

    def public_polynomials(self) -> NDArray[np.uint64]:
        """a_j for every block: uint64 (plan.blocks, 4096); nobody can give them structure."""
        return uniform_polynomials(self.public_stream(), self.plan.blocks)

    def summed_polynomials(self) -> NDArray[np.uint64]:
        """What a sum is masked with: uint64 (plan.sum_blocks, 4096), a segment's and its noise's.

        A key holder that opens with these cannot be had to open an update without its noise.
        """
        return folded(self.public_polynomials(), self.plan.sum_blocks)

    def public_stream(self) -> Stream:
        """Where the a_j come from, one after the other, for whoever wants a few at a time."""
        return Stream.derive("public polynomials", self.id.digest)


def rotation_string(task_id: str, round_number: int, plan: Plan) -> bytes:
    """The public string that fixes the signs of a round's rotation; 32 bytes."""
    return digest("rotation", task_id, round_number, plan.digest)


def round_key_id(round_key: bytes) -> bytes:
    """SHA-256 name of a public round key."""
    return digest("round key", round_key)
