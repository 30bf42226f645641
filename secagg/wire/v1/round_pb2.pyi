from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RoundState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROUND_STATE_UNSPECIFIED: _ClassVar[RoundState]
    ROUND_STATE_CREATED: _ClassVar[RoundState]
    ROUND_STATE_COLLECTING: _ClassVar[RoundState]
    ROUND_STATE_CHECKING: _ClassVar[RoundState]
    ROUND_STATE_SUMMING: _ClassVar[RoundState]
    ROUND_STATE_RELEASING: _ClassVar[RoundState]
    ROUND_STATE_DONE: _ClassVar[RoundState]
    ROUND_STATE_ABORTED: _ClassVar[RoundState]
    ROUND_STATE_AUDITING: _ClassVar[RoundState]

class UploadState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPLOAD_STATE_UNSPECIFIED: _ClassVar[UploadState]
    UPLOAD_STATE_RECEIVING: _ClassVar[UploadState]
    UPLOAD_STATE_ACCEPTED: _ClassVar[UploadState]
    UPLOAD_STATE_REJECTED: _ClassVar[UploadState]

class VerdictState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERDICT_STATE_UNSPECIFIED: _ClassVar[VerdictState]
    VERDICT_STATE_ACCEPTED: _ClassVar[VerdictState]
    VERDICT_STATE_REJECTED: _ClassVar[VerdictState]
ROUND_STATE_UNSPECIFIED: RoundState
ROUND_STATE_CREATED: RoundState
ROUND_STATE_COLLECTING: RoundState
ROUND_STATE_CHECKING: RoundState
ROUND_STATE_SUMMING: RoundState
ROUND_STATE_RELEASING: RoundState
ROUND_STATE_DONE: RoundState
ROUND_STATE_ABORTED: RoundState
ROUND_STATE_AUDITING: RoundState
UPLOAD_STATE_UNSPECIFIED: UploadState
UPLOAD_STATE_RECEIVING: UploadState
UPLOAD_STATE_ACCEPTED: UploadState
UPLOAD_STATE_REJECTED: UploadState
VERDICT_STATE_UNSPECIFIED: VerdictState
VERDICT_STATE_ACCEPTED: VerdictState
VERDICT_STATE_REJECTED: VerdictState

class ContextId(_message.Message):
    __slots__ = ("task_id", "round_number", "attempt", "plan_digest", "model_digest", "round_key_id")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_NUMBER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUND_KEY_ID_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    round_number: int
    attempt: int
    plan_digest: bytes
    model_digest: bytes
    round_key_id: bytes
    def __init__(self, task_id: _Optional[str] = ..., round_number: _Optional[int] = ..., attempt: _Optional[int] = ..., plan_digest: _Optional[bytes] = ..., model_digest: _Optional[bytes] = ..., round_key_id: _Optional[bytes] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("context", "client_key", "upload_digest", "sealed_seed_sha256", "signature", "challenge_commitment")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_KEY_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEALED_SEED_SHA256_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    context: ContextId
    client_key: bytes
    upload_digest: bytes
    sealed_seed_sha256: bytes
    signature: bytes
    challenge_commitment: bytes
    def __init__(self, context: _Optional[_Union[ContextId, _Mapping]] = ..., client_key: _Optional[bytes] = ..., upload_digest: _Optional[bytes] = ..., sealed_seed_sha256: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., challenge_commitment: _Optional[bytes] = ...) -> None: ...

class Admission(_message.Message):
    __slots__ = ("receipt", "sealed_seed")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    SEALED_SEED_FIELD_NUMBER: _ClassVar[int]
    receipt: Receipt
    sealed_seed: bytes
    def __init__(self, receipt: _Optional[_Union[Receipt, _Mapping]] = ..., sealed_seed: _Optional[bytes] = ...) -> None: ...

class WholeUpload(_message.Message):
    __slots__ = ("admission", "payload")
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    admission: Admission
    payload: bytes
    def __init__(self, admission: _Optional[_Union[Admission, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("upload_digest", "state", "reason")
    UPLOAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    upload_digest: bytes
    state: VerdictState
    reason: str
    def __init__(self, upload_digest: _Optional[bytes] = ..., state: _Optional[_Union[VerdictState, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class NormVerdict(_message.Message):
    __slots__ = ("receipt", "sketch_digest", "state", "identity", "signature")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    SKETCH_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    receipt: Receipt
    sketch_digest: bytes
    state: VerdictState
    identity: bytes
    signature: bytes
    def __init__(self, receipt: _Optional[_Union[Receipt, _Mapping]] = ..., sketch_digest: _Optional[bytes] = ..., state: _Optional[_Union[VerdictState, str]] = ..., identity: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...
