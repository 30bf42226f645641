"""The `secagg` command: plans, and whatever other packages add to it.

Further commands come from the entry-point group ``secagg.commands``, so that the library does not
import the packages that build on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup
from typer.main import get_command

from secagg import audit_commands, privacy_commands, provisioning_commands
from secagg.accounting import Budget, noise_multiplier_for
from secagg.commands import OutputFormat, exits_cleanly, print_json, print_table, version
from secagg.errors import ConfigurationError, SecaggError
from secagg.parameters import (
    MIN_COHORT,
    MODULUS,
    RING_DEGREE,
    SECURITY_BITS,
    FloatSegment,
    NormCheck,
    Plan,
    Privacy,
)
from secagg.planner import FAILURE_BITS, PRIVATE_MARGIN, Fact, explain, mean_noise, plan_tensors
from secagg.privacy import release_rho
from secagg.sketch_shape import sketch_bytes

if TYPE_CHECKING:
    import click  # whose classes typer has copies of, depending on its version

__all__ = ["app"]

_ANYTHING = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


class _Commands(TyperGroup):
    """Ours, and those of other packages, which load when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *entry_points(group="secagg.commands").names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name) or _of_another_package(cmd_name)


def _of_another_package(name: str) -> click.Command | None:
    alone = typer.Typer(add_completion=False)
    for entry in entry_points(group="secagg.commands", name=name):
        try:
            alone.command(name)(entry.load())
        except (ImportError, SecaggError) as error:
            # An extra is not installed; `secagg` works without it, and says so when asked.
            alone.command(name, hidden=True, context_settings=_ANYTHING)(_missing(str(error)))
        return get_command(alone)
    return None


def _missing(why: str) -> Callable[[], None]:
    @exits_cleanly
    def command() -> None:
        raise ConfigurationError(why)

    return command


app = typer.Typer(
    help="Secure aggregation for federated recommenders.", no_args_is_help=True, cls=_Commands
)
app.add_typer(audit_commands.app, name="audit")
app.add_typer(provisioning_commands.app, name="provision")
app.command("privacy")(privacy_commands.privacy)


class _Mode(StrEnum):
    release = "release"
    distributed = "distributed"
    local = "local"


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command("plan")
@exits_cleanly
def plan_command(
    clients: Annotated[int, typer.Option(help="largest cohort")],
    parameters: Annotated[int, typer.Option(help="model parameters")],
    bits: Annotated[int, typer.Option(help="bits of a quantised value, 2 to 16")] = 8,
    clip: Annotated[float, typer.Option(help="L2 clip norm of an update, in model units")] = 1.0,
    min_clients: Annotated[int, typer.Option(help="smallest cohort that is opened")] = MIN_COHORT,
    weight_cap: Annotated[
        int | None, typer.Option(help="weigh by samples, up to this many; else equally")
    ] = None,
    norm_check: Annotated[
        bool, typer.Option(help="leave room for the encrypted norm check")
    ] = True,
    privacy: Annotated[
        _Mode | None, typer.Option(help="who adds noise: key holder, clients in shares, or each")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="privacy budget of the task")] = None,
    delta: Annotated[
        float | None, typer.Option(help="of the budget; well below 1 over the clients")
    ] = None,
    rounds: Annotated[int, typer.Option(help="releases that the budget must have room for")] = 1,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="std over sensitivity; else as small as rounds allow")
    ] = None,
    honest_clients: Annotated[
        int, typer.Option(help="clients trusted to add their share of distributed noise; 0: usual")
    ] = 0,
    format_: Annotated[OutputFormat, typer.Option("--format")] = OutputFormat.table,
) -> None:
    """Plan a sum and explain it line by line, or say why there is none."""
    wanted = None
    if privacy is not None:
        wanted = _privacy(privacy, epsilon, delta, rounds, noise_multiplier, honest_clients)
    elif epsilon is not None or delta is not None or noise_multiplier is not None:
        raise ConfigurationError(
            "expected --privacy with a budget; got a budget alone; add --privacy release, "
            "distributed or local"
        )
    check = NormCheck() if wanted is None else NormCheck(PRIVATE_MARGIN)
    plan = plan_tensors(
        parameters,
        max_clients=clients,
        min_clients=min_clients,
        clip=clip,
        bits=bits,
        weighting="equal" if weight_cap is None else "samples",
        weight_cap=1 if weight_cap is None else weight_cap,
        norm_check=check if norm_check else None,
        privacy=wanted,
    )
    cost = None if plan.privacy is None else _Cost.of(plan, plan.privacy, rounds)
    if format_ is OutputFormat.json:
        print_json(_facts(plan, parameters, cost))
        return
    found = explain(plan) + (cost.facts() if cost else [])
    print_table(("what", "value", "why"), [(fact.topic, fact.value, fact.reason) for fact in found])


def _privacy(
    mode: _Mode,
    epsilon: float | None,
    delta: float | None,
    rounds: int,
    noise_multiplier: float | None,
    honest_clients: int,
) -> Privacy:
    if epsilon is None or delta is None:
        raise ConfigurationError(
            f"expected a budget with --privacy: --epsilon and --delta; got {epsilon=}, {delta=}; "
            "give both, such as --epsilon 8 --delta 1e-5"
        )
    least = max(noise_multiplier_for(epsilon, delta, rounds), 0.01)  # that a plan can have
    noise = least if noise_multiplier is None else noise_multiplier
    return Privacy(mode.value, noise, epsilon, delta, honest_clients)


@dataclass(frozen=True, slots=True)
class _Cost:
    """What a plan's releases cost in privacy.

    Attributes:
        spent: epsilon of all rounds.
        fit: releases that the budget has room for.
    """

    privacy: Privacy
    rounds: int
    rho: float
    spent: float
    fit: int

    @classmethod
    def of(cls, plan: Plan, privacy: Privacy, rounds: int) -> _Cost:
        """Of so many rounds.

        Raises:
            ConfigurationError: they do not fit into the budget; says what would.
        """
        budget, rho = Budget(privacy.epsilon, privacy.delta), release_rho(plan)
        budget.check(rho, rounds)
        fit = budget.left(0.0, rho)
        return cls(privacy, rounds, rho, budget.spent(rounds * rho), fit)

    def facts(self) -> list[Fact]:
        """For people."""
        return [
            Fact(
                "releases",
                f"epsilon {self.spent:.4g} after {self.rounds}",
                f"the budget has room for {self.fit}",
            )
        ]


def _facts(plan: Plan, parameters: int, cost: _Cost | None) -> dict[str, object]:
    found = explain(plan) + (cost.facts() if cost else [])
    return {
        "plan_digest": plan.digest.hex(),
        "ring_degree": RING_DEGREE,
        "modulus": MODULUS,
        "modulus_bits": MODULUS.bit_length(),
        "security_bits": SECURITY_BITS,
        "failure_bits": FAILURE_BITS,
        "min_clients": plan.min_clients,
        "max_clients": plan.max_clients,
        "layouts": [asdict(layout) | {"blocks": layout.blocks} for layout in plan.layouts],
        "ciphertexts": plan.blocks,
        "upload_bytes": plan.payload_bytes,
        "bytes_per_parameter": plan.payload_bytes / parameters,
        "norm_check": None if plan.norm_check is None else asdict(plan.norm_check),
        "sketch_bytes": sketch_bytes(plan, direction=True),
        "privacy": _privacy_facts(plan, cost) if cost else None,
        "explanation": [asdict(fact) for fact in found],
    }


def _privacy_facts(plan: Plan, cost: _Cost) -> dict[str, object]:
    clip = next(s.clip for s in plan.segments if isinstance(s, FloatSegment))
    noise = mean_noise(plan, 0, plan.max_clients)
    return asdict(cost.privacy) | {
        "rounds": cost.rounds,
        "noise_std_steps": plan.noise_stds[0],
        "mean_noise_std": noise,
        "mean_noise_relative": noise / clip,
        "rho_per_release": cost.rho,
        "epsilon_spent": cost.spent,
        "releases_within_budget": cost.fit,
    }


if __name__ == "__main__":
    app()
