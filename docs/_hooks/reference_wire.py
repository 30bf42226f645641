"""The page of the wire contract, made from the comments in proto/."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc_tools
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc
from reference_text import code, plain, table

from secagg.errors import SecaggError, by_reason

__all__ = ["contract", "wire_page"]

PROTO = Path(__file__).parents[2] / "proto"
_PACKAGE = ".secagg.wire.v1."

Comments = dict[tuple[int, ...], str]


def contract() -> list[FileDescriptorProto]:
    """The contract's files, with their comments."""
    sources = sorted(PROTO.glob("secagg/wire/v1/*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "contract"
        failed = protoc.main(
            [
                "protoc",
                f"--proto_path={PROTO}",
                f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}",
                "--include_source_info",
                f"--descriptor_set_out={output}",
                *map(str, sources),
            ]
        )
        if failed:
            raise RuntimeError("expected proto/ to compile; protoc refused it; run `make proto`")
        files = list(FileDescriptorSet.FromString(output.read_bytes()).file)
    # Services first: they are what a reader looks for.
    return sorted(files, key=lambda file: (not file.service, file.name))


def wire_page() -> str:
    """Services with their methods, messages with their fields, enums with their values."""
    parts: list[str] = []
    for file in contract():
        comments = {
            tuple(each.path): each.leading_comments.strip()
            for each in file.source_code_info.location
        }
        parts += _file(file, comments)
    return "\n".join(parts)


def _file(file: FileDescriptorProto, comments: Comments) -> Iterator[str]:
    yield f"## `{file.name.rpartition('/')[2]}`\n"
    about = comments.get((12,), "")  # what stands above `syntax`
    yield "\n\n".join(_text(paragraph) for paragraph in about.split("\n\n")) + "\n"
    for number, service in enumerate(file.service):
        yield f"### {service.name}\n"
        yield f"{_text(comments.get((6, number), ''))}\n"
        for index, method in enumerate(service.method):
            yield f"#### {method.name} {{ #{service.name}.{method.name} }}\n"
            takes, gives = _link(method.input_type), _link(method.output_type)
            several = ("stream of ", "")
            yield (
                f"{several[not method.client_streaming]}{takes} → "
                f"{several[not method.server_streaming]}{gives}\n"
            )
            yield f"{_text(comments.get((6, number, 2, index), ''))}\n"
    for number, message in enumerate(file.message_type):
        yield from _message(message, comments, (4, number))
    for number, enum in enumerate(file.enum_type):
        yield f"### {enum.name} {{ #{enum.name} }}\n"
        yield f"{_text(comments.get((5, number), ''))}\n"
        yield table(
            ("value", "number", "meaning"),
            [
                (code(each.name), str(each.number), _text(comments.get((5, number, 2, i), "")))
                for i, each in enumerate(enum.value)
            ],
        )


def _message(message: DescriptorProto, comments: Comments, path: tuple[int, ...]) -> Iterator[str]:
    yield f"### {message.name} {{ #{message.name} }}\n"
    yield f"{_text(comments.get(path, ''))}\n"
    yield table(
        ("field", "type", "meaning"),
        [
            (code(f"{field.name} = {field.number}"), _type(field), _meaning(comments, path, i))
            for i, field in enumerate(message.field)
        ],
    )


def _meaning(comments: Comments, path: tuple[int, ...], index: int) -> str:
    return _text(comments.get((*path, 2, index), ""))


def _text(comment: str) -> str:
    """A comment, in which reasons are links to what they mean."""
    return re.sub(r"\b[A-Z]+(?:\\_[A-Z]+)+|\b[A-Z]{6,}\b", _reason, plain(comment))


def _reason(match: re.Match[str]) -> str:
    reason = match.group().replace("\\", "")
    known = by_reason(reason) is not SecaggError
    return f"[{code(reason)}](../errors.md#{reason})" if known else code(reason)


def _type(field: FieldDescriptorProto) -> str:
    repeated = field.label == FieldDescriptorProto.LABEL_REPEATED
    kind = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    return ("repeated " if repeated else "") + (_link(field.type_name) or code(kind))


def _link(name: str) -> str:
    short = name.removeprefix(_PACKAGE)
    return f"[{code(short)}](#{short})" if short != name else code(name.lstrip("."))
