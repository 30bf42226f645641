"""Scenarios: one question each, with the systems and sizes that answer it, from a TOML file."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from secagg.errors import ConfigurationError

__all__ = [
    "Access",
    "Contender",
    "Rounds",
    "Scenario",
    "Setup",
    "Shapes",
    "scenarios",
    "size_of",
]

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
        dropped: how many clients leave when a round has begun, before they encrypt anything.
    """

    system: str
    named: str = ""
    options: Mapping[str, bool | int | str] = {}
    dropped: Annotated[int, Field(ge=0)] = 0

    @property
    def name(self) -> str:
        """What it is called in results."""
        return self.named or self.system


class Access(_Strict):
    """The line that clients have to the server, the same in both directions.

    Attributes:
        megabits_s: how much passes; all of it when omitted.
        round_trip_ms: how long a packet and its answer are on their way.
    """

    megabits_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    round_trip_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    def least_s(self, size: int, round_trips: int) -> float:
        """Seconds in which nobody could carry so many bytes, and wait so often, any faster."""
        sending = 8 * size / (self.megabits_s * 1e6) if self.megabits_s else 0.0
        return sending + round_trips * self.round_trip_ms / 1000


class Setup(_Strict):
    """How this library goes through whole rounds.

    Attributes:
        name: what it is called in results.
        bits: of a quantised value.
        max_clients: that the plan is for.
        norm_check: whether each upload is judged before the sum is opened.
        up_to: clients of the largest cohort that takes part so; of any when omitted.
        access: the line of all clients, who share it; loopback when omitted.
    """

    name: str
    bits: _Count = 8
    max_clients: _Count = 1000
    norm_check: bool = False
    up_to: _Count | None = None
    access: Access | None = None


class _Asked(_Strict):
    """What every kind of scenario has."""

    name: str
    question: str
    clients: _Counts
    repetitions: _Count
    smoke: Mapping[str, Any] = {}

    def quick(self) -> Self:
        """The same question on a toy."""
        return self.model_validate(self.model_dump() | dict(self.smoke))


class Scenario(_Asked):
    """One question, and what is measured for it, step by step.

    Attributes:
        parameters: sizes of a model of one tensor, one after another; none with ``shapes``.
        shapes: tensors of the only model, by name.
        clients: cohorts, one after another.
        repetitions: of each size and cohort; every one gives each system the same updates.
        smoke: what a quick run has in the place of these.
    """

    kind: Literal["steps"] = "steps"
    systems: Annotated[tuple[Contender, ...], Field(min_length=1)]
    parameters: tuple[_Count, ...] = ()
    shapes: Mapping[str, tuple[_Count, ...]] = {}

    @model_validator(mode="after")
    def _is_one_model_or_sizes(self) -> Self:
        if bool(self.parameters) == bool(self.shapes):
            raise ValueError("expected parameters or shapes, and not both")
        _check_names([each.name for each in self.systems])
        return self

    @property
    def models(self) -> Sequence[Shapes]:
        """Its models, in order."""
        return [self.shapes] if self.shapes else [{"w": (size,)} for size in self.parameters]


class Rounds(_Asked):
    """One question of whole rounds, by gRPC and mutual TLS, with every program's own processes.

    Attributes:
        systems: ways to set up a round. With a line in one of them, all have hosts of their own.
        parameters: of the model, one tensor.
        clients: cohorts, one after another; the largest is enrolled in all.
        processes: in which clients live, one after another in each; one on a line.
        repetitions, smoke: as of a `Scenario`.
    """

    kind: Literal["rounds"]
    systems: Annotated[tuple[Setup, ...], Field(min_length=1)]
    parameters: _Count
    processes: _Count = 2

    @model_validator(mode="after")
    def _can_be_played(self) -> Self:
        _check_names([each.name for each in self.systems])
        if len({each.access is None for each in self.systems}) > 1:
            raise ValueError("expected every system to have a line (`access`), or none of them")
        if self.has_lines and self.processes != 1:
            raise ValueError("expected one process of clients, who share a line; got more")
        for each in self.systems:
            if max(self.clients) > each.max_clients:
                raise ValueError(f"expected up to {each.max_clients} clients for {each.name}")
            if each.up_to is not None and each.up_to < min(self.clients):
                raise ValueError(f"expected a cohort for {each.name}; all are above its up_to")
        return self

    @property
    def has_lines(self) -> bool:
        """Whether clients have lines, for which they need hosts of their own."""
        return self.systems[0].access is not None

    def takers(self, clients: int) -> list[Setup]:
        """Who takes part with so many clients."""
        return [each for each in self.systems if each.up_to is None or clients <= each.up_to]


def _check_names(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError("expected every system to have a name of its own; use `named`")


_ANY: TypeAdapter[Scenario | Rounds] = TypeAdapter(
    Annotated[Scenario | Rounds, Field(discriminator="kind")]
)


def size_of(shapes: Shapes) -> int:
    """Parameters of a model."""
    return sum(math.prod(shape) for shape in shapes.values())


def scenarios(file: Path = _FILE) -> dict[str, Scenario | Rounds]:
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
    made: dict[str, Scenario | Rounds] = {}
    for name, table in found.items():
        try:
            made[name] = _ANY.validate_python({"name": name, "kind": "steps"} | table)
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
