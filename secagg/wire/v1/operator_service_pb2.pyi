import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from secagg.wire.v1 import plan_pb2 as _plan_pb2
from secagg.wire.v1 import round_pb2 as _round_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OptimiserName(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPTIMISER_NAME_UNSPECIFIED: _ClassVar[OptimiserName]
    OPTIMISER_NAME_AVERAGE: _ClassVar[OptimiserName]
    OPTIMISER_NAME_MOMENTUM: _ClassVar[OptimiserName]
    OPTIMISER_NAME_ADAGRAD: _ClassVar[OptimiserName]
    OPTIMISER_NAME_ADAM: _ClassVar[OptimiserName]
    OPTIMISER_NAME_YOGI: _ClassVar[OptimiserName]

class TaskState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_STATE_UNSPECIFIED: _ClassVar[TaskState]
    TASK_STATE_RUNNING: _ClassVar[TaskState]
    TASK_STATE_FINISHED: _ClassVar[TaskState]
    TASK_STATE_FAILED: _ClassVar[TaskState]
OPTIMISER_NAME_UNSPECIFIED: OptimiserName
OPTIMISER_NAME_AVERAGE: OptimiserName
OPTIMISER_NAME_MOMENTUM: OptimiserName
OPTIMISER_NAME_ADAGRAD: OptimiserName
OPTIMISER_NAME_ADAM: OptimiserName
OPTIMISER_NAME_YOGI: OptimiserName
TASK_STATE_UNSPECIFIED: TaskState
TASK_STATE_RUNNING: TaskState
TASK_STATE_FINISHED: TaskState
TASK_STATE_FAILED: TaskState

class TaskSpec(_message.Message):
    __slots__ = ("task_id", "plan", "rounds", "round_deadline_ms", "max_attempts", "target_clients", "selected_clients", "adaptive_clip", "optimiser", "stop")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    ROUND_DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    TARGET_CLIENTS_FIELD_NUMBER: _ClassVar[int]
    SELECTED_CLIENTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTIVE_CLIP_FIELD_NUMBER: _ClassVar[int]
    OPTIMISER_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    plan: _plan_pb2.Plan
    rounds: int
    round_deadline_ms: int
    max_attempts: int
    target_clients: int
    selected_clients: int
    adaptive_clip: AdaptiveClip
    optimiser: Optimiser
    stop: Stop
    def __init__(self, task_id: _Optional[str] = ..., plan: _Optional[_Union[_plan_pb2.Plan, _Mapping]] = ..., rounds: _Optional[int] = ..., round_deadline_ms: _Optional[int] = ..., max_attempts: _Optional[int] = ..., target_clients: _Optional[int] = ..., selected_clients: _Optional[int] = ..., adaptive_clip: _Optional[_Union[AdaptiveClip, _Mapping]] = ..., optimiser: _Optional[_Union[Optimiser, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ...) -> None: ...

class Optimiser(_message.Message):
    __slots__ = ("name", "learning_rate", "beta1", "beta2", "tau")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    TAU_FIELD_NUMBER: _ClassVar[int]
    name: OptimiserName
    learning_rate: float
    beta1: float
    beta2: float
    tau: float
    def __init__(self, name: _Optional[_Union[OptimiserName, str]] = ..., learning_rate: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., tau: _Optional[float] = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ("patience", "least_change", "figure", "least_gain")
    PATIENCE_FIELD_NUMBER: _ClassVar[int]
    LEAST_CHANGE_FIELD_NUMBER: _ClassVar[int]
    FIGURE_FIELD_NUMBER: _ClassVar[int]
    LEAST_GAIN_FIELD_NUMBER: _ClassVar[int]
    patience: int
    least_change: float
    figure: str
    least_gain: float
    def __init__(self, patience: _Optional[int] = ..., least_change: _Optional[float] = ..., figure: _Optional[str] = ..., least_gain: _Optional[float] = ...) -> None: ...

class AdaptiveClip(_message.Message):
    __slots__ = ("quantile", "rate")
    QUANTILE_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    quantile: float
    rate: float
    def __init__(self, quantile: _Optional[float] = ..., rate: _Optional[float] = ...) -> None: ...

class CreateTaskRequest(_message.Message):
    __slots__ = ("spec", "model_data")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    MODEL_DATA_FIELD_NUMBER: _ClassVar[int]
    spec: TaskSpec
    model_data: bytes
    def __init__(self, spec: _Optional[_Union[TaskSpec, _Mapping]] = ..., model_data: _Optional[bytes] = ...) -> None: ...

class CreateTaskResponse(_message.Message):
    __slots__ = ("state", "note")
    STATE_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    state: TaskState
    note: str
    def __init__(self, state: _Optional[_Union[TaskState, str]] = ..., note: _Optional[str] = ...) -> None: ...

class ListTasksRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListTasksResponse(_message.Message):
    __slots__ = ("tasks", "next_page_token")
    TASKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    tasks: _containers.RepeatedCompositeFieldContainer[TaskStatus]
    next_page_token: str
    def __init__(self, tasks: _Optional[_Iterable[_Union[TaskStatus, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class TaskStatus(_message.Message):
    __slots__ = ("spec", "state", "rounds_done", "model_version", "reason", "created_at", "privacy", "clip")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_DONE_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    spec: TaskSpec
    state: TaskState
    rounds_done: int
    model_version: int
    reason: str
    created_at: _timestamp_pb2.Timestamp
    privacy: TaskPrivacy
    clip: float
    def __init__(self, spec: _Optional[_Union[TaskSpec, _Mapping]] = ..., state: _Optional[_Union[TaskState, str]] = ..., rounds_done: _Optional[int] = ..., model_version: _Optional[int] = ..., reason: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., privacy: _Optional[_Union[TaskPrivacy, _Mapping]] = ..., clip: _Optional[float] = ...) -> None: ...

class TaskPrivacy(_message.Message):
    __slots__ = ("mode", "noise_multiplier", "epsilon_spent", "epsilon", "delta", "releases_left")
    MODE_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    EPSILON_SPENT_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    RELEASES_LEFT_FIELD_NUMBER: _ClassVar[int]
    mode: _plan_pb2.PrivacyMode
    noise_multiplier: float
    epsilon_spent: float
    epsilon: float
    delta: float
    releases_left: int
    def __init__(self, mode: _Optional[_Union[_plan_pb2.PrivacyMode, str]] = ..., noise_multiplier: _Optional[float] = ..., epsilon_spent: _Optional[float] = ..., epsilon: _Optional[float] = ..., delta: _Optional[float] = ..., releases_left: _Optional[int] = ...) -> None: ...

class GetTaskRequest(_message.Message):
    __slots__ = ("task_id", "page_size", "page_token")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    page_size: int
    page_token: str
    def __init__(self, task_id: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class GetTaskResponse(_message.Message):
    __slots__ = ("task", "rounds", "next_page_token")
    TASK_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    task: TaskStatus
    rounds: _containers.RepeatedCompositeFieldContainer[RoundRecord]
    next_page_token: str
    def __init__(self, task: _Optional[_Union[TaskStatus, _Mapping]] = ..., rounds: _Optional[_Iterable[_Union[RoundRecord, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class RoundRecord(_message.Message):
    __slots__ = ("round_number", "attempt", "state", "reason", "uploads", "rejected", "contributors", "sums_sha256", "model_version", "upload_bytes", "aggregate_ms", "release_ms", "created_at", "ended_at", "clip", "figure", "change")
    ROUND_NUMBER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    UPLOADS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    SUMS_SHA256_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_MS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_MS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    FIGURE_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    round_number: int
    attempt: int
    state: _round_pb2.RoundState
    reason: str
    uploads: int
    rejected: int
    contributors: int
    sums_sha256: bytes
    model_version: int
    upload_bytes: int
    aggregate_ms: float
    release_ms: float
    created_at: _timestamp_pb2.Timestamp
    ended_at: _timestamp_pb2.Timestamp
    clip: float
    figure: float
    change: float
    def __init__(self, round_number: _Optional[int] = ..., attempt: _Optional[int] = ..., state: _Optional[_Union[_round_pb2.RoundState, str]] = ..., reason: _Optional[str] = ..., uploads: _Optional[int] = ..., rejected: _Optional[int] = ..., contributors: _Optional[int] = ..., sums_sha256: _Optional[bytes] = ..., model_version: _Optional[int] = ..., upload_bytes: _Optional[int] = ..., aggregate_ms: _Optional[float] = ..., release_ms: _Optional[float] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ended_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., clip: _Optional[float] = ..., figure: _Optional[float] = ..., change: _Optional[float] = ...) -> None: ...

class AbortTaskRequest(_message.Message):
    __slots__ = ("task_id",)
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    def __init__(self, task_id: _Optional[str] = ...) -> None: ...

class AbortTaskResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: TaskState
    def __init__(self, state: _Optional[_Union[TaskState, str]] = ...) -> None: ...

class GetSumsRequest(_message.Message):
    __slots__ = ("task_id", "round_number")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_NUMBER_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    round_number: int
    def __init__(self, task_id: _Optional[str] = ..., round_number: _Optional[int] = ...) -> None: ...

class GetSumsResponse(_message.Message):
    __slots__ = ("data", "contributors")
    DATA_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    contributors: int
    def __init__(self, data: _Optional[bytes] = ..., contributors: _Optional[int] = ...) -> None: ...

class ExportAuditRequest(_message.Message):
    __slots__ = ("after_sequence",)
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    after_sequence: int
    def __init__(self, after_sequence: _Optional[int] = ...) -> None: ...

class ExportAuditResponse(_message.Message):
    __slots__ = ("sequence", "time", "event", "details", "previous", "hash")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    time: str
    event: str
    details: str
    previous: bytes
    hash: bytes
    def __init__(self, sequence: _Optional[int] = ..., time: _Optional[str] = ..., event: _Optional[str] = ..., details: _Optional[str] = ..., previous: _Optional[bytes] = ..., hash: _Optional[bytes] = ...) -> None: ...
