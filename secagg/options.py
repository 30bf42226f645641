"""Command-line options made from a program's settings, so that both say the same. A leaf.

Every setting is a flag, but secrets: a command line can be read by everybody on the machine.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from secagg.settings import Settings, load

__all__ = ["with_settings"]

_R = TypeVar("_R")


def with_settings(
    kind: type[Settings], fields: Sequence[str] = ()
) -> Callable[[Callable[..., _R]], Callable[..., _R]]:
    """Give a command ``--config`` and one option for each setting.

    The command's first parameter receives the settings: from flags, then the environment, then the
    file, then the defaults.

    Args:
        kind: the settings.
        fields: which of them; all when empty.
    """
    names = [
        name
        for name, field in kind.model_fields.items()
        if name in (fields or kind.model_fields) and not _is_secret(field)
    ]

    def decorate(command: Callable[..., _R]) -> Callable[..., _R]:
        @functools.wraps(command)
        def wrapped(*, config: Path | None, **given: Any) -> _R:  # noqa: ANN401 - any option
            flags = {name: given.pop(name) for name in names}
            return command(load(kind, config, flags), **given)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        file = Annotated[Path | None, typer.Option(help="TOML file with the settings")]
        parameters = [
            *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own),
            _parameter("config", file),
            *(_parameter(name, _option(name, kind.model_fields[name])) for name in names),
        ]
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
        del wrapped.__wrapped__
        return wrapped

    return decorate


def _parameter(name: str, annotation: object) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _option(name: str, field: FieldInfo) -> object:
    flag = f"--{name.replace('_', '-')}"
    help_ = (field.description or name.replace("_", " ")) + _default(field)
    return Annotated[_kind(field.annotation) | None, typer.Option(flag, help=help_)]


def _default(field: FieldInfo) -> str:
    if field.is_required() or field.default in (None, False) or field.default_factory:
        return ""
    return f"; default {field.default}"


def _kind(annotation: Any) -> Any:  # noqa: ANN401 - types are values here
    """What typer shall read: the setting's type without None, and text for a choice."""
    if get_origin(annotation) is Literal:
        return str
    if get_origin(annotation) is list:
        return annotation
    kinds = [each for each in get_args(annotation) if each is not type(None)]
    return kinds[0] if kinds else annotation


def _is_secret(field: FieldInfo) -> bool:
    return SecretStr in (field.annotation, *get_args(field.annotation))
