from secagg.wire.v1 import plan_pb2 as _plan_pb2
from secagg.wire.v1 import round_pb2 as _round_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetRoundRequest(_message.Message):
    __slots__ = ("task_id", "after_round", "after_attempt", "client_key")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_ROUND_FIELD_NUMBER: _ClassVar[int]
    AFTER_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_KEY_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    after_round: int
    after_attempt: int
    client_key: bytes
    def __init__(self, task_id: _Optional[str] = ..., after_round: _Optional[int] = ..., after_attempt: _Optional[int] = ..., client_key: _Optional[bytes] = ...) -> None: ...

class GetRoundResponse(_message.Message):
    __slots__ = ("context", "plan", "round_key", "model_version", "remaining_ms", "rounds_total", "key_holder_identity", "round_key_signature", "challenge_commitment")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ROUND_KEY_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KEY_HOLDER_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    ROUND_KEY_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    context: _round_pb2.ContextId
    plan: _plan_pb2.Plan
    round_key: bytes
    model_version: int
    remaining_ms: int
    rounds_total: int
    key_holder_identity: bytes
    round_key_signature: bytes
    challenge_commitment: bytes
    def __init__(self, context: _Optional[_Union[_round_pb2.ContextId, _Mapping]] = ..., plan: _Optional[_Union[_plan_pb2.Plan, _Mapping]] = ..., round_key: _Optional[bytes] = ..., model_version: _Optional[int] = ..., remaining_ms: _Optional[int] = ..., rounds_total: _Optional[int] = ..., key_holder_identity: _Optional[bytes] = ..., round_key_signature: _Optional[bytes] = ..., challenge_commitment: _Optional[bytes] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("task_id", "version", "latest", "chunk_index")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LATEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_INDEX_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    version: int
    latest: bool
    chunk_index: int
    def __init__(self, task_id: _Optional[str] = ..., version: _Optional[int] = ..., latest: bool = ..., chunk_index: _Optional[int] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("version", "model_digest", "total_bytes", "chunk_count", "data", "tensors")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    version: int
    model_digest: bytes
    total_bytes: int
    chunk_count: int
    data: bytes
    tensors: _containers.RepeatedCompositeFieldContainer[_plan_pb2.TensorSpec]
    def __init__(self, version: _Optional[int] = ..., model_digest: _Optional[bytes] = ..., total_bytes: _Optional[int] = ..., chunk_count: _Optional[int] = ..., data: _Optional[bytes] = ..., tensors: _Optional[_Iterable[_Union[_plan_pb2.TensorSpec, _Mapping]]] = ...) -> None: ...

class OpenUploadRequest(_message.Message):
    __slots__ = ("admission",)
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    admission: _round_pb2.Admission
    def __init__(self, admission: _Optional[_Union[_round_pb2.Admission, _Mapping]] = ...) -> None: ...

class OpenUploadResponse(_message.Message):
    __slots__ = ("state", "missing_chunks")
    STATE_FIELD_NUMBER: _ClassVar[int]
    MISSING_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    state: _round_pb2.UploadState
    missing_chunks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, state: _Optional[_Union[_round_pb2.UploadState, str]] = ..., missing_chunks: _Optional[_Iterable[int]] = ...) -> None: ...

class PutChunkRequest(_message.Message):
    __slots__ = ("context", "client_key", "upload_digest", "chunk_index", "data")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_KEY_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_INDEX_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    context: _round_pb2.ContextId
    client_key: bytes
    upload_digest: bytes
    chunk_index: int
    data: bytes
    def __init__(self, context: _Optional[_Union[_round_pb2.ContextId, _Mapping]] = ..., client_key: _Optional[bytes] = ..., upload_digest: _Optional[bytes] = ..., chunk_index: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class PutChunkResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CommitUploadRequest(_message.Message):
    __slots__ = ("context", "client_key", "upload_digest")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_KEY_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    context: _round_pb2.ContextId
    client_key: bytes
    upload_digest: bytes
    def __init__(self, context: _Optional[_Union[_round_pb2.ContextId, _Mapping]] = ..., client_key: _Optional[bytes] = ..., upload_digest: _Optional[bytes] = ...) -> None: ...

class CommitUploadResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: _round_pb2.UploadState
    def __init__(self, state: _Optional[_Union[_round_pb2.UploadState, str]] = ...) -> None: ...

class GetVerdictRequest(_message.Message):
    __slots__ = ("context", "client_key")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_KEY_FIELD_NUMBER: _ClassVar[int]
    context: _round_pb2.ContextId
    client_key: bytes
    def __init__(self, context: _Optional[_Union[_round_pb2.ContextId, _Mapping]] = ..., client_key: _Optional[bytes] = ...) -> None: ...

class GetVerdictResponse(_message.Message):
    __slots__ = ("verdict", "challenge_key", "direction", "model_version")
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_KEY_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    verdict: _round_pb2.NormVerdict
    challenge_key: bytes
    direction: bool
    model_version: int
    def __init__(self, verdict: _Optional[_Union[_round_pb2.NormVerdict, _Mapping]] = ..., challenge_key: _Optional[bytes] = ..., direction: bool = ..., model_version: _Optional[int] = ...) -> None: ...

class WithdrawUploadRequest(_message.Message):
    __slots__ = ("context", "client_key", "upload_digest")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_KEY_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    context: _round_pb2.ContextId
    client_key: bytes
    upload_digest: bytes
    def __init__(self, context: _Optional[_Union[_round_pb2.ContextId, _Mapping]] = ..., client_key: _Optional[bytes] = ..., upload_digest: _Optional[bytes] = ...) -> None: ...

class WithdrawUploadResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: _round_pb2.UploadState
    def __init__(self, state: _Optional[_Union[_round_pb2.UploadState, str]] = ...) -> None: ...
