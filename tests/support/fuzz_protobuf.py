"""Messages that are nearly right: one field at a time is changed, and all the others stay."""

from __future__ import annotations

from random import Random
from typing import Any, TypeVar

from fuzz_inputs import altered
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

__all__ = ["mutated"]

_M = TypeVar("_M", bound=Message)

_INTEGERS = (0, 1, 2, 3, 16, 31, 32, 63, 64, 127, 128, 255, 4095, 4096, 65535, 1 << 20, 1 << 28)
_EDGES = (31, 32, 53, 56, 63, 64)
_DOUBLES = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, 0.15, 1e-9, 1e-30, 5e-324, 1e15, 1e300, 1.7976931348623157e308),
    *(float("nan"), float("inf"), float("-inf")),
)
_TEXTS = ("", "a", "update", "task", "a" * 64, "a" * 129, "../x", "a b", "a\0", "é", "\U0001f600")
_DEEPEST = 4


def mutated(message: _M, random: Random) -> _M:
    """A copy with one to three fields changed."""
    copy = type(message)()
    copy.CopyFrom(message)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        _change(copy, random, _DEEPEST)
    return copy


def _change(message: Message, random: Random, depth: int) -> None:
    field = random.choice(message.DESCRIPTOR.fields)
    if field.is_repeated:
        _change_repeated(getattr(message, field.name), field, random, depth)
    elif field.message_type is not None:
        _change_part(message, field, random, depth)
    elif random.random() < 0.1:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _value(field, getattr(message, field.name), random))


def _change_part(message: Message, field: FieldDescriptor, random: Random, depth: int) -> None:
    part: Message = getattr(message, field.name)
    if message.HasField(field.name) and random.random() < 0.1:
        message.ClearField(field.name)
        return
    part.SetInParent()
    if depth and field.message_type.fields:
        _change(part, random, depth - 1)


def _change_repeated(items: Any, field: FieldDescriptor, random: Random, depth: int) -> None:  # noqa: ANN401
    kind = random.randrange(6)
    if not items or kind == 0:
        if field.message_type is not None:
            items.add()
        else:
            items.append(_value(field, _default(field), random))
    at = random.randrange(len(items))
    if kind == 1:
        del items[at]
    elif kind == 2 and len(items) < 64:
        items.extend([items[at]] * random.choice((1, 1, 7)))
    elif kind == 3 and len(items) > 1:
        _swap(items, at, random.randrange(len(items)), field)
    elif field.message_type is None:
        items[at] = _value(field, items[at], random)
    elif depth and field.message_type.fields:
        _change(items[at], random, depth - 1)


def _swap(items: Any, one: int, other: int, field: FieldDescriptor) -> None:  # noqa: ANN401
    if field.message_type is None:
        items[one], items[other] = items[other], items[one]
    else:
        kept = type(items[one])()
        kept.CopyFrom(items[one])
        items[one].CopyFrom(items[other])
        items[other].CopyFrom(kept)


def _default(field: FieldDescriptor) -> Any:  # noqa: ANN401
    return b"" if field.type == field.TYPE_BYTES else "" if field.type == field.TYPE_STRING else 0


def _value(field: FieldDescriptor, now: Any, random: Random) -> Any:  # noqa: ANN401
    kind = field.cpp_type
    if kind == field.CPPTYPE_BOOL:
        return random.random() < 0.5
    if kind in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        return _double(now, random)
    if kind == field.CPPTYPE_ENUM:
        return random.choice((0, 1, 2, 3, 4, 5, 99, -1))
    if field.type == field.TYPE_BYTES:
        return altered(now or bytes(32), random)
    if kind == field.CPPTYPE_STRING:
        return random.choice(_TEXTS) if random.random() < 0.7 else now + random.choice("a.-_/ \t7")
    return _integer(field, now, random)


def _double(now: float, random: Random) -> float:
    kind = random.randrange(3)
    if kind == 0:
        return random.choice(_DOUBLES)
    return now * random.choice((0.5, 0.999, 1.001, 2.0, 1e6)) if kind == 1 else random.uniform(0, 2)


def _integer(field: FieldDescriptor, now: int, random: Random) -> int:
    bits = 32 if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32) else 64
    signed = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
    kind = random.randrange(3)
    if kind == 0:
        value = random.choice(_INTEGERS)
    elif kind == 1:
        value = now + random.choice((-1, 1, now, -2, 7))
    else:
        value = (1 << random.choice(_EDGES)) - random.choice((0, 1, 2))
    return value % (1 << (bits - 1 if signed else bits))
