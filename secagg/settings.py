"""Configuration of every program: a TOML file, overlaid by the environment, overlaid by flags.

Unknown keys are refused with a suggestion. A leaf that needs the extra ``service``.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from secagg.errors import ConfigurationError

__all__ = ["Settings", "load", "read_toml", "validated"]

_M = TypeVar("_M", bound=BaseModel)
_S = TypeVar("_S", bound="Settings")


class Settings(BaseModel):
    """Base of a program's settings; subclasses set the prefix of their environment variables."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    env_prefix: ClassVar[str] = "SECAGG_"


def load(kind: type[_S], file: Path | None, flags: Mapping[str, object]) -> _S:
    """Settings from file, environment and flags; flags that are None count as not given.

    Raises:
        ConfigurationError: unreadable file, unknown key, or a value of the wrong kind.
    """
    values: dict[str, Any] = read_toml(file) if file else {}
    values |= _from_environment(kind)
    values |= {key: value for key, value in flags.items() if value is not None}
    return validated(kind, values)


def _from_environment(kind: type[Settings]) -> dict[str, str]:
    prefix = kind.env_prefix
    return {
        name.removeprefix(prefix).lower(): value
        for name, value in os.environ.items()
        if name.startswith(prefix)
    }


def read_toml(file: Path) -> dict[str, Any]:
    """A TOML file's table.

    Raises:
        ConfigurationError: not there, or not TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"expected a readable file; {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"expected TOML in {file}: {error}") from None


def validated(kind: type[_M], values: Mapping[str, object]) -> _M:
    """A checked model of these values.

    Raises:
        ConfigurationError: names every key that is unknown, missing or of the wrong kind.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [
            _problem(kind, item["loc"], item["type"], item["msg"]) for item in error.errors()
        ]
        raise ConfigurationError("; ".join(problems)) from None


def _problem(kind: type[BaseModel], loc: tuple[int | str, ...], what: str, text: str) -> str:
    key = ".".join(str(part) for part in loc)
    if what != "extra_forbidden":
        return f"{key}: {text}"
    close = difflib.get_close_matches(str(loc[-1]), kind.model_fields, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known: {sorted(kind.model_fields)}"
    return f"unknown key {key!r}{hint}"
