"""`secagg privacy`: what releases cost in epsilon, and what noise a budget asks for."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from secagg.accounting import (
    Budget,
    example_level,
    example_level_noise,
    gaussian_rho,
    noise_multiplier_for,
)
from secagg.commands import OutputFormat, exits_cleanly, print_json, print_table
from secagg.errors import ConfigurationError

__all__ = ["privacy"]

_CLIENT_ADJACENCY = "zero-out: all that one client contributes, in all rounds, becomes zeros"
_EXAMPLE_ADJACENCY = "add or remove one example of one silo"
_CLIENT_THEOREMS = (
    "noise: Canonne, Kamath, Steinke 2020, Theorems 4 and 14 (discrete Gaussian is zCDP)",
    "shares of noise: Kairouz, Liu, Steinke 2021, Theorem 1 (sums of discrete Gaussians)",
    "rounds: Bun, Steinke 2016, Lemma 2.3 (zCDP adds up)",
    "epsilon: Canonne, Kamath, Steinke 2020, Proposition 12 (from zCDP, by dp-accounting)",
)
_EXAMPLE_THEOREMS = (
    "one step: Mironov, Talwar, Zhang 2019 (the sampled Gaussian mechanism)",
    "many steps: Koskela, Jälkö, Honkela 2020 (privacy loss distribution, by dp-accounting)",
)
_NO_AMPLIFICATION = "no amplification by sampling is claimed"
_AMPLIFICATION = "amplification by Poisson sampling"

_Facts = list[tuple[str, object, str]]


@exits_cleanly
def privacy(
    delta: Annotated[float, typer.Option(help="chance that epsilon fails; well below 1/clients")],
    epsilon: Annotated[
        float | None, typer.Option(help="budget of the whole task; smaller is more private")
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="std of the noise over the sensitivity of one release")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="releases that one client can be in")] = None,
    clients: Annotated[
        int | None, typer.Option(help="clients in a round: says what the noise does to a mean")
    ] = None,
    clip: Annotated[float, typer.Option(help="L2 clip norm of an update, in model units")] = 1.0,
    sampling_rate: Annotated[
        float | None, typer.Option(help="DP-SGD inside a silo: chance of an example in a step")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="DP-SGD inside a silo: noisy steps")] = None,
    format_: Annotated[OutputFormat, typer.Option("--format")] = OutputFormat.table,
) -> None:
    """Turn a privacy budget into noise, or noise into epsilon.

    For releases to the server, give two of --epsilon, --noise-multiplier and --rounds; with all
    three, it is checked that the rounds fit. For the examples of one silo, give --sampling-rate and
    --steps with one of --epsilon and --noise-multiplier.
    """
    if sampling_rate is not None or steps is not None:
        if rounds is not None or clients is not None:
            raise ConfigurationError(
                "expected --sampling-rate and --steps without --rounds and --clients; got both; "
                "ask about the examples of a silo and about releases of the server one at a time"
            )
        _examples(delta, epsilon, noise_multiplier, sampling_rate, steps, format_)
    else:
        _releases(delta, epsilon, noise_multiplier, rounds, clients, clip, format_)


def _releases(
    delta: float,
    epsilon: float | None,
    noise_multiplier: float | None,
    rounds: int | None,
    clients: int | None,
    clip: float,
    format_: OutputFormat,
) -> None:
    budget = None if epsilon is None else Budget(epsilon, delta)
    noise, count = noise_multiplier, rounds
    if noise is None and budget and count is not None:
        noise = noise_multiplier_for(budget.epsilon, delta, count)
    elif count is None and budget and noise is not None:
        budget.check(gaussian_rho(noise))
        count = budget.left(0.0, gaussian_rho(noise))
    if noise is None or count is None:
        raise ConfigurationError(
            "expected two of --epsilon, --noise-multiplier and --rounds; got fewer; "
            "give the two that are fixed, and the third is computed"
        )
    each = gaussian_rho(noise)
    # The same refusals as in a budget's own check, when there is none.
    (budget or Budget(1.0, delta)).left(0.0, each)
    if count < 1:
        raise ConfigurationError(f"expected at least 1 round; got rounds={count}; use 1 or more")
    if budget:
        budget.check(each, count)
    levels = [(done, Budget(1.0, delta).spent(done * each)) for done in _milestones(count)]
    facts: _Facts = [
        ("noise multiplier", f"{noise:g}", "std of the noise over the sensitivity of a release"),
        ("rounds", count, "in each of which one client may take part"),
        ("epsilon", f"{levels[-1][1]:.4g}", f"after all rounds, at delta = {delta:g}"),
        ("zCDP", f"{count * each:.4g}", f"rho over all rounds, {each:.4g} each"),
    ]
    values: dict[str, object] = {
        "level": "client",
        "epsilon": levels[-1][1],
        "delta": delta,
        "noise_multiplier": noise,
        "rounds": count,
        "rho_per_round": each,
        "rho": count * each,
        "budget_epsilon": epsilon,
        "by_rounds": [{"rounds": done, "epsilon": level} for done, level in levels],
    }
    warnings: list[str] = []
    if clients is not None:
        found, error = _error_of_mean(noise, clients, clip)
        facts += found
        values |= error
        if delta * clients >= 1:
            warnings.append(
                f"delta = {delta:g} allows the data of one client in {1 / delta:.3g} to be "
                f"published outright, and there are {clients}: use one well below {1 / clients:.2g}"
            )
    _show(facts, values, _CLIENT_ADJACENCY, _CLIENT_THEOREMS, _NO_AMPLIFICATION, warnings, format_)
    if format_ is OutputFormat.table:
        print_table(("after round", "epsilon"), [(n, f"{level:.4g}") for n, level in levels])


def _error_of_mean(noise: float, clients: int, clip: float) -> tuple[_Facts, dict[str, object]]:
    if clients < 1 or not 0 < clip < math.inf:
        raise ConfigurationError(
            f"expected at least 1 client and a positive clip norm; got {clients=}, {clip=}; "
            "use the smallest round you expect and the plan's clip norm"
        )
    std = noise * clip / clients
    facts: _Facts = [
        (
            "noise on a mean",
            f"{std:.4g}",
            f"std of one coordinate, of {clients} equal clients, if the noise is added once; "
            f"{std * math.sqrt(clients):.4g} where every client adds all of it (local)",
        ),
        ("relative", f"{std / clip:.4g}", "the same over the clip norm, the longest mean there is"),
    ]
    return facts, {
        "clients": clients,
        "clip": clip,
        "mean_noise_std": std,
        "mean_noise_relative": std / clip,
    }


def _examples(
    delta: float,
    epsilon: float | None,
    noise_multiplier: float | None,
    sampling_rate: float | None,
    steps: int | None,
    format_: OutputFormat,
) -> None:
    if sampling_rate is None or steps is None or (epsilon is None) == (noise_multiplier is None):
        raise ConfigurationError(
            "expected --sampling-rate, --steps and one of --epsilon and --noise-multiplier; got "
            "fewer or more; give the one that is fixed, and the other is computed"
        )
    if noise_multiplier is None:
        noise = example_level_noise(epsilon or 0.0, delta, sampling_rate, steps)
    else:
        noise = noise_multiplier
    level = example_level(noise, sampling_rate, steps, delta)
    facts: _Facts = [
        ("noise multiplier", f"{noise:g}", "std of the noise over the clip norm of one example"),
        ("sampling rate", f"{sampling_rate:g}", "chance of each example in each step"),
        ("steps", steps, "noisy gradients, in all rounds together"),
        ("epsilon", f"{level:.4g}", f"after all steps, at delta = {delta:g}"),
    ]
    values: dict[str, object] = {
        "level": "example",
        "epsilon": level,
        "delta": delta,
        "noise_multiplier": noise,
        "sampling_rate": sampling_rate,
        "steps": steps,
        "budget_epsilon": epsilon,
    }
    claim = _AMPLIFICATION if sampling_rate < 1 else _NO_AMPLIFICATION
    _show(facts, values, _EXAMPLE_ADJACENCY, _EXAMPLE_THEOREMS, claim, [], format_)


def _show(
    facts: _Facts,
    values: dict[str, object],
    adjacency: str,
    theorems: tuple[str, ...],
    amplification: str,
    warnings: list[str],
    format_: OutputFormat,
) -> None:
    if format_ is OutputFormat.json:
        print_json(
            values
            | {
                "adjacency": adjacency,
                "theorems": theorems,
                "amplification": amplification,
                "warnings": warnings,
            }
        )
        return
    why = (
        "the server chooses and sees who takes part"
        if values["level"] == "client"
        else "every step draws each example independently, and nobody outside sees which"
        if amplification is _AMPLIFICATION
        else "every step sees all examples"
    )
    rows: _Facts = [
        *facts,
        ("neighbours", adjacency, "what an observer can hardly tell apart"),
        ("sampling", amplification, why),
    ]
    for theorem in theorems:
        topic, source = theorem.split(": ", 1)
        rows.append(("theorem", topic, source))
    rows += [("warning", "delta", warning) for warning in warnings]
    print_table(("what", "value", "why"), rows)


def _milestones(rounds: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... and the last round."""
    scale = 10 ** len(str(rounds))
    marks = {step * 10**power for power in range(len(str(scale))) for step in (1, 2, 5)}
    return sorted({mark for mark in marks if mark < rounds} | {rounds})
