"""The pages of settings and task files, made from the models that read them."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from reference_text import anchored, code, plain, table

from secagg.settings import Settings
from secagg_client.config import ClientSettings
from secagg_keyholder.config import KeyHolderSettings
from secagg_server.config import OperatorSettings, ServerSettings
from secagg_server.task_files import _TaskFile

__all__ = ["PROGRAMS", "configuration_page", "task_fields", "task_file_page"]

SAMPLES = Path(__file__).parents[1] / "samples"


class Program(NamedTuple):
    """A program's settings, and the sample of its file."""

    title: str
    kind: type[Settings]
    sample: str
    text: str


PROGRAMS = (
    Program("Server", ServerSettings, "server.toml", "`secagg-server run`"),
    Program("Key holder", KeyHolderSettings, "keyholder.toml", "`secagg-keyholder run`"),
    Program("Client", ClientSettings, "client.toml", "`secagg-client join` and the others"),
    Program("Operator", OperatorSettings, "", "`secagg-server task` and `secagg-server audit`"),
)

_UNITS = {"days": "days", "seconds": "seconds", "s": "seconds", "bytes": "bytes"}
_KINDS = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}
_COLUMNS = ("setting", "value", "default", "meaning")


def configuration_page() -> str:
    """Every setting of every program."""
    parts = []
    for program in PROGRAMS:
        prefix = program.title.lower().replace(" ", "-")
        link = f"[A file with all of them](../samples/{program.sample})."
        rows = [
            (
                anchored(f"{prefix}-{name.replace('_', '-')}", "".join(_names(program, name))),
                _value(name, field),
                code(_default(field)),
                plain(field.description or name.replace("_", " ")),
            )
            for name, field in program.kind.model_fields.items()
        ]
        parts += [
            f"## {program.title}\n",
            f"Read by {program.text}. {link if program.sample else ''}\n",
            table(_COLUMNS, rows),
        ]
    return "\n".join(parts)


def _names(program: Program, name: str) -> Iterator[str]:
    field = program.kind.model_fields[name]
    table_name, _, key = name.partition("_")
    yield code(f"[{table_name}] {key}" if table_name == "release" else name)
    yield code(f"{program.kind.env_prefix}{name.upper()}")
    if SecretStr not in (field.annotation, *get_args(field.annotation)):
        yield code(f"--{name.replace('_', '-')}")


def _value(name: str, field: FieldInfo) -> str:
    kind = _bare(field.annotation)
    if get_origin(kind) is Literal:
        return ", ".join(code(choice) for choice in get_args(kind))
    if get_origin(kind) is list:
        return f"{_KINDS.get(get_args(kind)[0], 'table')}s, in a list"
    unit = _UNITS.get(name.rpartition("_")[2], "")
    return plain(
        f"{_KINDS.get(kind, 'text')}{f' of {unit}' if unit else ''}{_limits(field.metadata)}"
    )


def _limits(metadata: list[Any]) -> str:
    found = {
        bound: f"{getattr(each, bound):.12g}"
        for each in metadata
        for bound in ("ge", "gt", "le", "lt")
        if getattr(each, bound, None) is not None
    }
    least = found["ge"] if "ge" in found else f"above {found['gt']}" if "gt" in found else ""
    most = f"to {found['le']}" if "le" in found else f"below {found['lt']}" if "lt" in found else ""
    if least and not most:
        return f", {least}" if "gt" in found else f", {least} or more"
    both = ", " if "lt" in found and least else " "
    return f", {least}{both}{most}".rstrip() if least or most else ""


def _bare(annotation: Any) -> Any:  # noqa: ANN401 - types are values here
    """A setting's type without None."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    return next(each for each in get_args(annotation) if each is not type(None))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default in (None, []) or isinstance(default, BaseModel):
        return ""
    if isinstance(default, float):
        return f"{default:.12g}"
    return str(default).lower() if isinstance(default, bool) else str(default)


class TaskField(NamedTuple):
    """One key of a task file.

    Attributes:
        section: its table, such as ``update.tensors``; empty at the top.
        repeated: whether there may be many such tables.
    """

    section: str
    repeated: bool
    name: str
    field: FieldInfo


def task_fields(
    kind: type[BaseModel] = _TaskFile, section: str = "", repeated: bool = False
) -> Iterator[TaskField]:
    """Every key of a task file, tables after what is above them."""
    tables = []
    for name, field in kind.model_fields.items():
        bare = _bare(field.annotation)
        many = get_origin(bare) is list
        inner = get_args(bare)[0] if many else bare
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            tables.append((inner, f"{section}.{name}".lstrip("."), many))
        else:
            yield TaskField(section, repeated, name, field)
    for each in tables:
        yield from task_fields(*each)


class Comment(NamedTuple):
    """What the sample says of a table or key; the default as it is written there, if it is."""

    default: str
    meaning: str


def sample_comments() -> Mapping[tuple[str, str], Comment]:
    """By table and key; a table itself has an empty key."""
    found: dict[tuple[str, str], Comment] = {}
    section = ""
    for line in (SAMPLES / "task.toml").read_text(encoding="utf-8").splitlines():
        if head := re.match(r"(?:# )?\[+([\w.]+)\]+(?: +# (.*))?$", line):
            section = head.group(1)
            found.setdefault((section, ""), _comment(head.group(2) or ""))
        elif key := re.match(r"(?:# )?(\w+) = .*? # (.*)$", line):
            found.setdefault((section, key.group(1)), _comment(key.group(2)))
    return found


def _comment(text: str) -> Comment:
    """Without whether it is required, which the model knows."""
    match = re.match(r"(?:required|optional)(?:, default ([^:]+))?[^:]*: (.*)", text)
    return Comment(match.group(1) or "", match.group(2)) if match else Comment("", text)


def task_file_page() -> str:
    """Every key of a task file."""
    comments = sample_comments()
    parts = []
    fields = list(task_fields())
    for section in dict.fromkeys(each.section for each in fields):
        here = [each for each in fields if each.section == section]
        if section:
            brackets = "[[{}]]" if here[0].repeated else "[{}]"
            parts.append(f"## `{brackets.format(section)}` {{ #{section.replace('.', '-')} }}\n")
            about = plain(comments[section, ""].meaning)
            parts.append(f"{about[0].upper()}{about[1:]}.\n")
        else:
            parts.append("## The task { #task }\n")
        rows = [
            (
                anchored(f"{section or 'task'}-{each.name}".replace(".", "-"), code(each.name)),
                _value(each.name, each.field),
                code(comments[section, each.name].default.strip('"') or _default(each.field)),
                plain(comments[section, each.name].meaning),
            )
            for each in here
        ]
        parts.append(table(_COLUMNS, rows))
    return "\n".join(parts)
