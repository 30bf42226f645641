"""Every error this project raises on purpose, in one tree.

::

    SecaggError
    ├── ConfigurationError        a setting that can never work             CONFIGURATION
    │   └── PlanError             no exact plan exists for the request      IMPOSSIBLE_PLAN
    ├── InputError                the caller's own data cannot be used      INVALID_INPUT
    │   ├── NonFiniteError        NaN or infinity in an update              NON_FINITE
    │   └── SchemaError           tensor names or shapes differ             SCHEMA_MISMATCH
    ├── IdentityError             who somebody is cannot be shown           UNAUTHENTICATED
    │   ├── CertificateError      a certificate, or a kit, that is not one  INVALID_CERTIFICATE
    │   ├── NoCertificateError    no certificate where one is required      NO_CERTIFICATE
    │   ├── UntrustedCertificateError   issued by another authority         UNTRUSTED_CERTIFICATE
    │   ├── ExpiredCertificateError     its time is over                    CERTIFICATE_EXPIRED
    │   ├── EarlyCertificateError       its time has not come           CERTIFICATE_NOT_YET_VALID
    │   ├── WrongNameError        a certificate for another host            WRONG_NAME
    │   ├── WrongRoleError        a certificate for another role            WRONG_ROLE
    │   ├── PlaintextError        one side speaks TLS, the other does not   PLAINTEXT
    │   ├── NotEnrolledError      nobody of that name or key is enrolled    NOT_ENROLLED
    │   ├── RevokedError          was enrolled, and has been revoked        REVOKED
    │   ├── MismatchError         certificate and message name different clients  IDENTITY_MISMATCH
    │   └── UntrustedKeyError     not signed by the key that is pinned      UNTRUSTED_KEY
    ├── VersionError              the two sides speak different versions    WIRE_VERSION
    ├── AuditError                an audit log that was changed             AUDIT_BROKEN
    ├── ForgedSketchError         an update was judged by something else    FORGED_SKETCH
    ├── PrivacyError              would cost more privacy than allowed      PRIVACY_REFUSED
    ├── UploadError (soft: one upload is refused, the round goes on)
    │   ├── MalformedError        bytes of the wrong size or range          MALFORMED
    │   ├── ContextError          made for another task, round, plan, model CONTEXT_MISMATCH
    │   ├── ReceiptError          the signature does not cover the upload   INVALID_RECEIPT
    │   ├── SealError             the sealed seed cannot be opened          INVALID_SEAL
    │   ├── DuplicateError        a second, different upload of one client  DUPLICATE_UPLOAD
    │   ├── NormError             beyond the norm or direction allowed      NORM_REFUSED
    │   └── OffGridError          the noise audit named it                  OFF_GRID
    └── RoundError (hard: this round ends without a result)
        ├── NotReadyError         not yet: ask again later                  NOT_READY
        ├── OverloadedError       too much at once: ask again later         OVERLOADED
        ├── ClosedError           never again: the round has moved on       ROUND_CLOSED
        ├── PausedError           the client has been told to stay out      PAUSED
        ├── BudgetError           the task's privacy budget is spent        BUDGET_SPENT
        ├── QuorumError           fewer clients than the plan's minimum     QUORUM_NOT_REACHED
        ├── ReleaseError          the sum does not open under the manifest  RELEASE_REFUSED
        └── UnavailableError      the other party cannot be reached         UNAVAILABLE
            └── StorageError      its disk or database does not do its work STORAGE_UNAVAILABLE

The last column is the ``reason`` that travels on the wire. Each message says what was expected,
what came, and what to do; none carries a secret, a plaintext value or a client's identity.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AuditError",
    "BudgetError",
    "CertificateError",
    "ClosedError",
    "ConfigurationError",
    "ContextError",
    "DuplicateError",
    "EarlyCertificateError",
    "ExpiredCertificateError",
    "ForgedSketchError",
    "IdentityError",
    "InputError",
    "MalformedError",
    "MismatchError",
    "NoCertificateError",
    "NonFiniteError",
    "NormError",
    "NotEnrolledError",
    "NotReadyError",
    "OffGridError",
    "OverloadedError",
    "PausedError",
    "PlaintextError",
    "PlanError",
    "PrivacyError",
    "QuorumError",
    "ReceiptError",
    "ReleaseError",
    "RevokedError",
    "RoundError",
    "SchemaError",
    "SealError",
    "SecaggError",
    "StorageError",
    "UnavailableError",
    "UntrustedCertificateError",
    "UntrustedKeyError",
    "UploadError",
    "VersionError",
    "WrongNameError",
    "WrongRoleError",
    "by_reason",
    "reasons",
]

RETRY_S = 0.2
"""Seconds after which somebody is to ask again who is told nothing else."""


class SecaggError(Exception):
    """Base of the tree.

    Attributes:
        reason: stable UPPER_SNAKE code; the wire's ``ErrorInfo.reason``.
        status: name of the gRPC status code that carries it.
        exit_code: what a command line ends with (sysexits.h numbers).
    """

    reason: ClassVar[str] = "INTERNAL"
    status: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 70


class ConfigurationError(SecaggError):
    """A setting, or a combination of settings, that can never work."""

    reason = "CONFIGURATION"
    status = "INVALID_ARGUMENT"
    exit_code = 78


class PlanError(ConfigurationError):
    """No exact plan exists for what was asked; the message names what would work."""

    reason = "IMPOSSIBLE_PLAN"


class InputError(SecaggError):
    """The caller's own data cannot be encrypted as it is; nothing has left the process."""

    reason = "INVALID_INPUT"
    status = "INVALID_ARGUMENT"
    exit_code = 65


class NonFiniteError(InputError):
    """NaN or infinity in an update; the message names the tensor and the index."""

    reason = "NON_FINITE"


class SchemaError(InputError):
    """Tensor names, shapes or lengths differ from the plan's."""

    reason = "SCHEMA_MISMATCH"


class IdentityError(SecaggError):
    """Who somebody is could not be shown; trying again changes nothing."""

    reason = "UNAUTHENTICATED"
    status = "UNAUTHENTICATED"
    exit_code = 77


class CertificateError(IdentityError):
    """A certificate or start kit that cannot be read, or whose parts do not belong together."""

    reason = "INVALID_CERTIFICATE"


class NoCertificateError(IdentityError):
    """No certificate where one is required."""

    reason = "NO_CERTIFICATE"


class UntrustedCertificateError(IdentityError):
    """A certificate that another authority has issued."""

    reason = "UNTRUSTED_CERTIFICATE"


class ExpiredCertificateError(IdentityError):
    """A certificate whose time is over."""

    reason = "CERTIFICATE_EXPIRED"


class EarlyCertificateError(IdentityError):
    """A certificate whose time has not come; often a wrong clock."""

    reason = "CERTIFICATE_NOT_YET_VALID"


class WrongNameError(IdentityError):
    """A server whose certificate is for another host."""

    reason = "WRONG_NAME"


class WrongRoleError(IdentityError):
    """A certificate for another role, such as a client's in a server's place."""

    reason = "WRONG_ROLE"
    status = "PERMISSION_DENIED"


class PlaintextError(IdentityError):
    """One side speaks TLS and the other does not."""

    reason = "PLAINTEXT"


class NotEnrolledError(IdentityError):
    """Nobody of that name, or with that key, is enrolled."""

    reason = "NOT_ENROLLED"
    status = "PERMISSION_DENIED"


class RevokedError(IdentityError):
    """Was enrolled, and has been revoked."""

    reason = "REVOKED"
    status = "PERMISSION_DENIED"


class MismatchError(IdentityError):
    """The certificate names one client, the message another."""

    reason = "IDENTITY_MISMATCH"
    status = "PERMISSION_DENIED"


class UntrustedKeyError(IdentityError):
    """A key, or a list of keys, without the signature of whoever is pinned for it."""

    reason = "UNTRUSTED_KEY"


class VersionError(SecaggError):
    """The two sides speak different versions of the wire contract."""

    reason = "WIRE_VERSION"
    status = "FAILED_PRECONDITION"
    exit_code = 76


class AuditError(SecaggError):
    """An audit log that was changed, cut or reordered after it was written."""

    reason = "AUDIT_BROKEN"
    status = "DATA_LOSS"
    exit_code = 65


class ForgedSketchError(SecaggError):
    """The key holder's verdict is on something that the server's committed challenge does not give.

    The server asked something else about this update. The signed verdict proves it.
    """

    reason = "FORGED_SKETCH"
    status = "DATA_LOSS"
    exit_code = 77


class PrivacyError(SecaggError):
    """A contribution that would cost more privacy than was agreed to; nothing was sent.

    The plan's budget, the user's own limit, or what the task began with does not allow it.
    """

    reason = "PRIVACY_REFUSED"
    status = "FAILED_PRECONDITION"
    exit_code = 77


class UploadError(SecaggError):
    """One upload is refused; the round goes on without it."""

    reason = "UPLOAD_REFUSED"
    status = "INVALID_ARGUMENT"
    exit_code = 65


class MalformedError(UploadError):
    """Bytes whose size or range is not the one the plan prescribes."""

    reason = "MALFORMED"


class ContextError(UploadError):
    """Made for another task, round, attempt, plan, model or round key."""

    reason = "CONTEXT_MISMATCH"
    status = "FAILED_PRECONDITION"


class ReceiptError(UploadError):
    """The receipt's signature does not cover what it came with."""

    reason = "INVALID_RECEIPT"
    status = "PERMISSION_DENIED"
    exit_code = 77


class SealError(UploadError):
    """The sealed seed does not open under the round key and this receipt's context."""

    reason = "INVALID_SEAL"


class DuplicateError(UploadError):
    """A second, different upload from a client that has already contributed to the round."""

    reason = "DUPLICATE_UPLOAD"
    status = "ALREADY_EXISTS"


class NormError(UploadError):
    """The encrypted check found an update beyond the norm, or against the direction, allowed."""

    reason = "NORM_REFUSED"


class OffGridError(UploadError):
    """The noise audit found this upload off the grid."""

    reason = "OFF_GRID"


class RoundError(SecaggError):
    """The round, or the request within it, ends without a result."""

    reason = "ROUND_FAILED"
    status = "FAILED_PRECONDITION"
    exit_code = 69


class NotReadyError(RoundError):
    """Not yet: the same call may succeed later.

    Attributes:
        retry_s: seconds after which whoever asked is to ask again.
    """

    reason = "NOT_READY"
    status = "UNAVAILABLE"
    exit_code = 75

    def __init__(self, message: str, retry_s: float = RETRY_S) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class OverloadedError(RoundError):
    """More at once than this service takes on; the same call may succeed later.

    Attributes:
        retry_s: as above.
    """

    reason = "OVERLOADED"
    status = "RESOURCE_EXHAUSTED"
    exit_code = 75
    retry_s = RETRY_S


class ClosedError(RoundError):
    """Never again: the round, task or call has moved on."""

    reason = "ROUND_CLOSED"


class PausedError(RoundError):
    """This client has been told to contribute nothing for now."""

    reason = "PAUSED"


class BudgetError(RoundError):
    """The task's privacy budget has no room for this release."""

    reason = "BUDGET_SPENT"


class QuorumError(RoundError):
    """Fewer distinct accepted clients than the plan's minimum."""

    reason = "QUORUM_NOT_REACHED"


class ReleaseError(RoundError):
    """The sum does not open under the keys of its manifest, or leaves the planned range."""

    reason = "RELEASE_REFUSED"
    status = "DATA_LOSS"


class UnavailableError(RoundError):
    """The other party cannot be reached, within the time allowed for trying."""

    reason = "UNAVAILABLE"
    status = "UNAVAILABLE"


class StorageError(UnavailableError):
    """A disk or database does not do its work; nothing that was promised is lost by that."""

    reason = "STORAGE_UNAVAILABLE"


def _tree(root: type[SecaggError]) -> dict[str, type[SecaggError]]:
    found = {root.reason: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def by_reason(reason: str) -> type[SecaggError]:
    """The class whose ``reason`` this is; `SecaggError` for a reason this version does not know."""
    return _tree(SecaggError).get(reason, SecaggError)


def reasons() -> list[str]:
    """Every ``reason`` that this version knows, in alphabetical order."""
    return sorted(_tree(SecaggError))
