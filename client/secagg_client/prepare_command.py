"""`secagg-client prepare`: the recommender's task and initial model, from options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secagg.commands import exits_cleanly, out
from secagg.errors import ConfigurationError
from secagg.optimisers import LEARNING_RATES, Optimiser
from secagg.options import with_settings
from secagg.parameters import Compression, LowRank, Privacy, RandomSubset
from secagg_client.config import ClientSettings

__all__ = ["prepare_command"]

_FEWER_ROUNDS = "Ending early"
_PRIVACY = "Privacy"
_TRAVEL = "How updates travel"


@exits_cleanly
@with_settings(
    ClientSettings,
    [
        *("task", "model", "dataset", "data_dir", "silos", "partition", "partition_alpha"),
        *("dimensions", "seed"),
    ],
)
def prepare_command(
    settings: ClientSettings,
    folder: Annotated[Path, typer.Argument(help="folder for task.toml and initial.npz")],
    rounds: Annotated[int, typer.Option(help="rounds of training")] = 25,
    optimiser: Annotated[
        str, typer.Option(help=f"of the server: {', '.join(LEARNING_RATES)}")
    ] = "average",
    server_rate: Annotated[
        float | None, typer.Option(help="learning rate of the optimiser; else the usual one")
    ] = None,
    pretrained: Annotated[
        Path | None, typer.Option(help="model .npz to start from; else a random one")
    ] = None,
    weight_cap: Annotated[
        int, typer.Option(min=1, help="samples beyond which a silo weighs no more")
    ] = 20_000,
    low_rank: Annotated[
        int | None,
        typer.Option(min=1, help="send tables as so many columns", rich_help_panel=_TRAVEL),
    ] = None,
    subset: Annotated[
        float | None,
        typer.Option(help="send this part of the coordinates", rich_help_panel=_TRAVEL),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(min=2, max=16, help="of a quantised value", rich_help_panel=_TRAVEL),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="end after so many rounds in which held-out items were found no better",
            rich_help_panel=_FEWER_ROUNDS,
        ),
    ] = None,
    least_gain: Annotated[
        float, typer.Option(help="what counts as better", rich_help_panel=_FEWER_ROUNDS)
    ] = 0.0,
    least_change: Annotated[
        float,
        typer.Option(
            help="or in which the model changed by less than this part of its length",
            rich_help_panel=_FEWER_ROUNDS,
        ),
    ] = 0.0,
    privacy: Annotated[
        str | None,
        typer.Option(
            help="who adds noise: release (key holder), distributed or local (clients)",
            rich_help_panel=_PRIVACY,
        ),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="privacy budget of all rounds", rich_help_panel=_PRIVACY)
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(help="of the budget; well below 1 over the clients", rich_help_panel=_PRIVACY),
    ] = None,
    row_threshold: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="clients that must have an item for its row to be released",
            rich_help_panel=_PRIVACY,
        ),
    ] = None,
) -> None:
    """Write the recommender's task and initial model, for `secagg-server task create`.

    Of --model ease or transitions, which are counted in one round, there is a task alone; the other
    options are for models that are trained. Of --model session, rounds and optimiser can be chosen;
    its optimiser is Adam unless another one is given. Of --model cohorts, the row threshold can.
    With --privacy, --epsilon and --delta, each client's contributions are protected by noise.
    With --row-threshold, items that too few clients have leave the key holder as zeros. With
    either, all clients weigh equally.
    """
    from secagg_client.one_round import COUNTED, prepare_counts

    noise, server = _privacy(privacy, epsilon, delta), Optimiser(optimiser, server_rate)
    if settings.model in COUNTED:
        of_training = (noise, row_threshold, low_rank, subset, bits, patience, pretrained)
        if server != Optimiser() or any(option is not None for option in of_training):
            raise ConfigurationError(
                "expected no options of training or privacy for a model that is counted exactly; "
                "leave them out, or prepare --model factorisation"
            )
        out.print(f"wrote {prepare_counts(settings, folder)}", highlight=False)
        return
    if settings.model == "session":
        # Its plan is one of its own: equal weights, 8 bits, whole updates.
        if any(option is not None for option in (noise, row_threshold, low_rank, subset)) or (
            any(option is not None for option in (bits, patience, pretrained))
        ):
            raise ConfigurationError(
                "expected of a session model no options but rounds, optimiser and server rate; "
                "leave the others out, or prepare --model factorisation"
            )
        from secagg_client.session_task import OPTIMISER, prepare_session

        chosen = OPTIMISER if server == Optimiser() else server
        task, model = prepare_session(settings, folder, rounds=rounds, optimiser=chosen)
        out.print(f"wrote {task} and {model}", highlight=False)
        return
    if settings.model == "cohorts":
        # One round of exact counts, whose threshold alone can be chosen.
        from secagg_client.cohort_task import LEAST, prepare_cohorts

        others = (noise, low_rank, subset, bits, patience, pretrained)
        if server != Optimiser() or any(option is not None for option in others):
            raise ConfigurationError(
                "expected of a count of cohorts no options but the row threshold; leave the others "
                "out, or prepare --model factorisation"
            )
        task_file = prepare_cohorts(settings, folder, least=row_threshold or LEAST)
        out.print(f"wrote {task_file} and {folder / 'initial.npz'}", highlight=False)
        return
    if patience is None and (least_gain or least_change):
        raise ConfigurationError(
            "expected --patience with --least-gain or --least-change, the rounds in which the "
            "model has to have learned nothing; got none; give it too"
        )
    # Torch loads in seconds; a wrong option should not have to wait for it.
    from secagg_client.prepare import Wishes, prepare

    wishes = Wishes(
        rounds=rounds,
        privacy=noise,
        least=row_threshold,
        optimiser=server,
        compression=_compression(low_rank, subset),
        bits=bits,
        weight_cap=weight_cap,
        patience=patience,
        least_gain=least_gain,
        least_change=least_change,
        pretrained=pretrained,
    )
    made = prepare(settings, folder, wishes)
    out.print(f"wrote {made.task} and {made.model}", highlight=False)
    if pretrained is not None:
        out.print(f"{pretrained} knows {made.known} of {made.items} items", highlight=False)


def _privacy(mode: str | None, epsilon: float | None, delta: float | None) -> Privacy | None:
    if mode is not None and epsilon is not None and delta is not None:
        return Privacy(mode, 1.0, epsilon, delta)
    if (mode, epsilon, delta) == (None, None, None):
        return None
    raise ConfigurationError(
        f"expected --privacy, --epsilon and --delta together; got privacy={mode!r}, {epsilon=}, "
        f"{delta=}; give all three, such as --privacy release --epsilon 8 --delta 1e-5"
    )


def _compression(low_rank: int | None, subset: float | None) -> Compression | None:
    if low_rank is not None and subset is not None:
        raise ConfigurationError(
            f"expected either --low-rank or --subset; got {low_rank=}, {subset=}; drop one of them"
        )
    if low_rank is not None:
        return LowRank(low_rank)
    return None if subset is None else RandomSubset(subset)
