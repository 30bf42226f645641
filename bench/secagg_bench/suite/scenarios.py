"""Scenarios: one question each, with the systems and sizes that answer it, from a TOML file."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from secagg.errors import ConfigurationError

__all__ = ["Contender", "Scenario", "Shapes", "scenarios", "size_of"]

Shapes = Mapping[str, tuple[int, ...]]
"""Tensors of a model, by name."""

_FILE = Path(__file__).with_name("scenarios.toml")
_Count = Annotated[int, Field(ge=1)]
_Counts = Annotated[tuple[_Count, ...], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Contender(_Strict):
    """A system that takes part.

    Attributes:
        system: a module of ``secagg_bench.peers.systems``.
        named: what it is called in results; the system when omitted.
        options: of that module.
    """

    system: str
    named: str = ""
    options: Mapping[str, bool | int | str] = {}

    @property
    def name(self) -> str:
        """What it is called in results."""
        return self.named or self.system


class Scenario(_Strict):
    """One question, and what is measured for it.

    Attributes:
        parameters: sizes of a model of one tensor, one after another; none with ``shapes``.
        shapes: tensors of the only model, by name.
        clients: cohorts, one after another.
        repetitions: of each size and cohort; every one gives each system the same updates.
        smoke: what a quick run has in the place of these.
    """

    name: str
    question: str
    systems: Annotated[tuple[Contender, ...], Field(min_length=1)]
    parameters: tuple[_Count, ...] = ()
    shapes: Mapping[str, tuple[_Count, ...]] = {}
    clients: _Counts
    repetitions: _Count
    smoke: Mapping[str, Any] = {}

    @model_validator(mode="after")
    def _is_one_model_or_sizes(self) -> Self:
        if bool(self.parameters) == bool(self.shapes):
            raise ValueError("expected parameters or shapes, and not both")
        names = [each.name for each in self.systems]
        if len(set(names)) < len(names):
            raise ValueError("expected every system to have a name of its own; use `named`")
        return self

    @property
    def models(self) -> Sequence[Shapes]:
        """Its models, in order."""
        return [self.shapes] if self.shapes else [{"w": (size,)} for size in self.parameters]

    def quick(self) -> Scenario:
        """The same question on a toy."""
        return Scenario.model_validate(self.model_dump() | dict(self.smoke))


def size_of(shapes: Shapes) -> int:
    """Parameters of a model."""
    return sum(math.prod(shape) for shape in shapes.values())


def scenarios(file: Path = _FILE) -> dict[str, Scenario]:
    """All scenarios of a file, by name, in its order.

    Raises:
        ConfigurationError: one is not as it must be; the message names it and the field.
    """
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"expected scenarios in TOML in {file.name}; got {type(error).__name__}: {error}"
        ) from None
    made: dict[str, Scenario] = {}
    for name, table in found.items():
        try:
            made[name] = Scenario.model_validate({"name": name} | table)
            made[name].quick()
        except (ValidationError, TypeError) as error:
            text = str(error)
            if isinstance(error, ValidationError):
                first = error.errors(include_url=False, include_input=False)[0]
                text = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
            raise ConfigurationError(
                f"expected a scenario at [{name}] of {file.name}; {text}"
            ) from None
    return made
