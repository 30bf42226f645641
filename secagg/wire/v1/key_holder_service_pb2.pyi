from secagg.wire.v1 import plan_pb2 as _plan_pb2
from secagg.wire.v1 import round_pb2 as _round_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OpenRoundRequest(_message.Message):
    __slots__ = ("task_id", "round_number", "attempt", "plan", "model_digest")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_NUMBER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    round_number: int
    attempt: int
    plan: _plan_pb2.Plan
    model_digest: bytes
    def __init__(self, task_id: _Optional[str] = ..., round_number: _Optional[int] = ..., attempt: _Optional[int] = ..., plan: _Optional[_Union[_plan_pb2.Plan, _Mapping]] = ..., model_digest: _Optional[bytes] = ...) -> None: ...

class OpenRoundResponse(_message.Message):
    __slots__ = ("context", "round_key", "identity", "signature")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    ROUND_KEY_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    context: _round_pb2.ContextId
    round_key: bytes
    identity: bytes
    signature: bytes
    def __init__(self, context: _Optional[_Union[_round_pb2.ContextId, _Mapping]] = ..., round_key: _Optional[bytes] = ..., identity: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class JudgeUploadsRequest(_message.Message):
    __slots__ = ("context", "admissions")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    ADMISSIONS_FIELD_NUMBER: _ClassVar[int]
    context: _round_pb2.ContextId
    admissions: _containers.RepeatedCompositeFieldContainer[_round_pb2.Admission]
    def __init__(self, context: _Optional[_Union[_round_pb2.ContextId, _Mapping]] = ..., admissions: _Optional[_Iterable[_Union[_round_pb2.Admission, _Mapping]]] = ...) -> None: ...

class JudgeUploadsResponse(_message.Message):
    __slots__ = ("verdicts",)
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    verdicts: _containers.RepeatedCompositeFieldContainer[_round_pb2.Verdict]
    def __init__(self, verdicts: _Optional[_Iterable[_Union[_round_pb2.Verdict, _Mapping]]] = ...) -> None: ...

class SubmitSketchRequest(_message.Message):
    __slots__ = ("upload", "sketch")
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    SKETCH_FIELD_NUMBER: _ClassVar[int]
    upload: NamedUpload
    sketch: bytes
    def __init__(self, upload: _Optional[_Union[NamedUpload, _Mapping]] = ..., sketch: _Optional[bytes] = ...) -> None: ...

class SubmitSketchResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetVerdictsRequest(_message.Message):
    __slots__ = ("context",)
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    context: _round_pb2.ContextId
    def __init__(self, context: _Optional[_Union[_round_pb2.ContextId, _Mapping]] = ...) -> None: ...

class GetVerdictsResponse(_message.Message):
    __slots__ = ("verdicts",)
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    verdicts: _containers.RepeatedCompositeFieldContainer[_round_pb2.NormVerdict]
    def __init__(self, verdicts: _Optional[_Iterable[_Union[_round_pb2.NormVerdict, _Mapping]]] = ...) -> None: ...

class CheckSumRequest(_message.Message):
    __slots__ = ("manifest", "low_bits")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    LOW_BITS_FIELD_NUMBER: _ClassVar[int]
    manifest: Manifest
    low_bits: bytes
    def __init__(self, manifest: _Optional[_Union[Manifest, _Mapping]] = ..., low_bits: _Optional[bytes] = ...) -> None: ...

class CheckSumResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("manifest", "residues")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    RESIDUES_FIELD_NUMBER: _ClassVar[int]
    manifest: Manifest
    residues: bytes
    def __init__(self, manifest: _Optional[_Union[Manifest, _Mapping]] = ..., residues: _Optional[bytes] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("context", "upload_digests")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    context: _round_pb2.ContextId
    upload_digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, context: _Optional[_Union[_round_pb2.ContextId, _Mapping]] = ..., upload_digests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("data", "contributors")
    DATA_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    contributors: int
    def __init__(self, data: _Optional[bytes] = ..., contributors: _Optional[int] = ...) -> None: ...

class AuditNoiseRequest(_message.Message):
    __slots__ = ("upload", "low_bits")
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    LOW_BITS_FIELD_NUMBER: _ClassVar[int]
    upload: NamedUpload
    low_bits: bytes
    def __init__(self, upload: _Optional[_Union[NamedUpload, _Mapping]] = ..., low_bits: _Optional[bytes] = ...) -> None: ...

class NamedUpload(_message.Message):
    __slots__ = ("context", "upload_digest")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    context: _round_pb2.ContextId
    upload_digest: bytes
    def __init__(self, context: _Optional[_Union[_round_pb2.ContextId, _Mapping]] = ..., upload_digest: _Optional[bytes] = ...) -> None: ...

class AuditNoiseResponse(_message.Message):
    __slots__ = ("verdict",)
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    verdict: _round_pb2.Verdict
    def __init__(self, verdict: _Optional[_Union[_round_pb2.Verdict, _Mapping]] = ...) -> None: ...

class CloseRoundRequest(_message.Message):
    __slots__ = ("context",)
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    context: _round_pb2.ContextId
    def __init__(self, context: _Optional[_Union[_round_pb2.ContextId, _Mapping]] = ...) -> None: ...

class CloseRoundResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
