from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrivacyMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIVACY_MODE_UNSPECIFIED: _ClassVar[PrivacyMode]
    PRIVACY_MODE_RELEASE: _ClassVar[PrivacyMode]
    PRIVACY_MODE_DISTRIBUTED: _ClassVar[PrivacyMode]
    PRIVACY_MODE_LOCAL: _ClassVar[PrivacyMode]

class Weighting(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WEIGHTING_UNSPECIFIED: _ClassVar[Weighting]
    WEIGHTING_EQUAL: _ClassVar[Weighting]
    WEIGHTING_SAMPLES: _ClassVar[Weighting]
PRIVACY_MODE_UNSPECIFIED: PrivacyMode
PRIVACY_MODE_RELEASE: PrivacyMode
PRIVACY_MODE_DISTRIBUTED: PrivacyMode
PRIVACY_MODE_LOCAL: PrivacyMode
WEIGHTING_UNSPECIFIED: Weighting
WEIGHTING_EQUAL: Weighting
WEIGHTING_SAMPLES: Weighting

class Plan(_message.Message):
    __slots__ = ("min_clients", "max_clients", "segments", "norm_check", "privacy", "threshold")
    MIN_CLIENTS_FIELD_NUMBER: _ClassVar[int]
    MAX_CLIENTS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    NORM_CHECK_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    min_clients: int
    max_clients: int
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    norm_check: NormCheck
    privacy: Privacy
    threshold: RowThreshold
    def __init__(self, min_clients: _Optional[int] = ..., max_clients: _Optional[int] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., norm_check: _Optional[_Union[NormCheck, _Mapping]] = ..., privacy: _Optional[_Union[Privacy, _Mapping]] = ..., threshold: _Optional[_Union[RowThreshold, _Mapping]] = ...) -> None: ...

class Privacy(_message.Message):
    __slots__ = ("mode", "noise_multiplier", "epsilon", "delta", "honest_clients", "integer_share")
    MODE_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    HONEST_CLIENTS_FIELD_NUMBER: _ClassVar[int]
    INTEGER_SHARE_FIELD_NUMBER: _ClassVar[int]
    mode: PrivacyMode
    noise_multiplier: float
    epsilon: float
    delta: float
    honest_clients: int
    integer_share: float
    def __init__(self, mode: _Optional[_Union[PrivacyMode, str]] = ..., noise_multiplier: _Optional[float] = ..., epsilon: _Optional[float] = ..., delta: _Optional[float] = ..., honest_clients: _Optional[int] = ..., integer_share: _Optional[float] = ...) -> None: ...

class RowThreshold(_message.Message):
    __slots__ = ("counts", "least")
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    LEAST_FIELD_NUMBER: _ClassVar[int]
    counts: str
    least: int
    def __init__(self, counts: _Optional[str] = ..., least: _Optional[int] = ...) -> None: ...

class NormCheck(_message.Message):
    __slots__ = ("margin", "sketches", "tolerated", "min_cosine")
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    SKETCHES_FIELD_NUMBER: _ClassVar[int]
    TOLERATED_FIELD_NUMBER: _ClassVar[int]
    MIN_COSINE_FIELD_NUMBER: _ClassVar[int]
    margin: float
    sketches: int
    tolerated: int
    min_cosine: float
    def __init__(self, margin: _Optional[float] = ..., sketches: _Optional[int] = ..., tolerated: _Optional[int] = ..., min_cosine: _Optional[float] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("name", "floats", "integers")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FLOATS_FIELD_NUMBER: _ClassVar[int]
    INTEGERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    floats: FloatSegment
    integers: IntegerSegment
    def __init__(self, name: _Optional[str] = ..., floats: _Optional[_Union[FloatSegment, _Mapping]] = ..., integers: _Optional[_Union[IntegerSegment, _Mapping]] = ...) -> None: ...

class FloatSegment(_message.Message):
    __slots__ = ("tensors", "clip", "bits", "weighting", "weight_cap", "rows", "clip_bit", "low_rank", "random_subset")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTING_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_CAP_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CLIP_BIT_FIELD_NUMBER: _ClassVar[int]
    LOW_RANK_FIELD_NUMBER: _ClassVar[int]
    RANDOM_SUBSET_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    clip: float
    bits: int
    weighting: Weighting
    weight_cap: int
    rows: int
    clip_bit: bool
    low_rank: LowRank
    random_subset: RandomSubset
    def __init__(self, tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., clip: _Optional[float] = ..., bits: _Optional[int] = ..., weighting: _Optional[_Union[Weighting, str]] = ..., weight_cap: _Optional[int] = ..., rows: _Optional[int] = ..., clip_bit: bool = ..., low_rank: _Optional[_Union[LowRank, _Mapping]] = ..., random_subset: _Optional[_Union[RandomSubset, _Mapping]] = ...) -> None: ...

class LowRank(_message.Message):
    __slots__ = ("rank",)
    RANK_FIELD_NUMBER: _ClassVar[int]
    rank: int
    def __init__(self, rank: _Optional[int] = ...) -> None: ...

class RandomSubset(_message.Message):
    __slots__ = ("fraction",)
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    fraction: float
    def __init__(self, fraction: _Optional[float] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class IntegerSegment(_message.Message):
    __slots__ = ("size", "max_abs", "max_norm")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_ABS_FIELD_NUMBER: _ClassVar[int]
    MAX_NORM_FIELD_NUMBER: _ClassVar[int]
    size: int
    max_abs: int
    max_norm: float
    def __init__(self, size: _Optional[int] = ..., max_abs: _Optional[int] = ..., max_norm: _Optional[float] = ...) -> None: ...
