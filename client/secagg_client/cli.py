"""The `secagg-client` command: join a task with a silo of users, and recommend from its model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from secagg import logs
from secagg.commands import (
    OutputFormat,
    err,
    exits_cleanly,
    out,
    print_json,
    print_table,
    version,
)
from secagg.errors import ConfigurationError
from secagg.options import with_settings
from secagg.parameters import Privacy
from secagg_client.config import ClientSettings, identity_in
from secagg_client.switch import Switch

__all__ = ["app"]

app = typer.Typer(help="A client: trains on its own data.", no_args_is_help=True)


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
@exits_cleanly
@with_settings(ClientSettings)
def join(settings: ClientSettings) -> None:
    """Take part in a task: train, encrypt and upload, round after round, until it ends."""
    logs.configure(settings.log_level)
    # Torch loads in seconds; a wrong setting should not have to wait for it.
    from secagg_client.participate import RoundReport, participate

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        bar = progress.add_task("rounds", total=None)

        def on_round(report: RoundReport, total: int) -> None:
            progress.update(
                bar,
                total=total,
                completed=report.round_number,
                description=f"{report.upload_bytes / 1000:.0f} kB, "
                f"encrypted in {report.encrypt_s * 1000:.0f} ms",
            )

        taken = participate(settings, on_round)
    out.print(f"contributed to {taken.contributed} rounds")
    if taken.refused:
        out.print(
            f"refused in {taken.refused} of {taken.judged} rounds: the norm of the update, or its "
            "direction, is beyond what the plan allows; check the clip norm, the data and the "
            "learning rate",
            soft_wrap=True,
        )


@app.command()
@exits_cleanly
@with_settings(ClientSettings, ["state_dir", "max_epsilon"])
def privacy(
    settings: ClientSettings,
    task: Annotated[
        str | None, typer.Option(help="this task alone, round by round; else all tasks")
    ] = None,
    format_: Annotated[OutputFormat, typer.Option("--format")] = OutputFormat.table,
) -> None:
    """What this client has contributed, and how much of its privacy that has cost.

    Read from the state directory; nobody is asked.
    """
    from secagg_client.account import accounts_table, as_json, entries_table
    from secagg_client.ledger import Ledger

    ledger, since = Ledger(settings.state_dir), Switch(settings.state_dir).since()
    accounts, entries = ledger.accounts(task), ledger.entries(task)
    if format_ is OutputFormat.json:
        print_json(as_json(accounts, entries, since, settings.max_epsilon))
        return
    if accounts:
        accounts_table(accounts, settings.max_epsilon)
        if task:
            entries_table(entries)
    else:
        out.print(f"nothing has been contributed{f' to {task}' if task else ''}", highlight=False)
    if since is not None:
        out.print(f"paused since {since}; nothing is sent", highlight=False)


@app.command()
@exits_cleanly
@with_settings(ClientSettings, ["state_dir"])
def pause(settings: ClientSettings) -> None:
    """Contribute nothing from now on, to any task; a client that is running waits."""
    Switch(settings.state_dir).pause()
    out.print("paused: nothing more is sent; `secagg-client resume` goes on")


@app.command()
@exits_cleanly
@with_settings(ClientSettings, ["state_dir"])
def resume(settings: ClientSettings) -> None:
    """Contribute again, from the next round on."""
    Switch(settings.state_dir).resume()
    out.print("resumed: this client takes part again")


@app.command()
@exits_cleanly
@with_settings(ClientSettings, ["server", "kit", "insecure", "task", "state_dir"])
def withdraw(settings: ClientSettings) -> None:
    """Pause, and take this client's contribution out of the round that is collecting.

    Too late once the round has closed: a sum cannot be undone.
    """
    from secagg_client.session import ClientSession

    Switch(settings.state_dir).pause()
    out.print("paused: nothing more is sent; `secagg-client resume` goes on")
    credentials = settings.credentials(lambda: identity_in(settings.state_dir))
    with ClientSession(
        settings.server,
        settings.task,
        credentials,
        insecure=settings.insecure,
        outbox=settings.state_dir,
    ) as session:
        taken = session.withdraw()
    if taken is None:
        out.print("nothing to withdraw: this client has sent nothing")
    else:
        where = f"round {taken.round_number}, attempt {taken.attempt}"
        out.print(f"withdrawn from {where}: the server says it is erased", highlight=False)


@app.command("prepare")
@exits_cleanly
@with_settings(ClientSettings, ["task", "dataset", "data_dir", "silos", "dimensions", "seed"])
def prepare_command(
    settings: ClientSettings,
    folder: Annotated[Path, typer.Argument(help="folder for task.toml and initial.npz")],
    rounds: Annotated[int, typer.Option(help="rounds of training")] = 25,
    privacy: Annotated[
        str | None,
        typer.Option(help="who adds noise: release (key holder), distributed or local (clients)"),
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="privacy budget of all rounds")] = None,
    delta: Annotated[
        float | None, typer.Option(help="of the budget; well below 1 over the clients")
    ] = None,
    row_threshold: Annotated[
        int | None,
        typer.Option(min=2, help="clients that must have an item for its row to be released"),
    ] = None,
) -> None:
    """Write the recommender's task and initial model, for `secagg-server task create`.

    With --privacy, --epsilon and --delta, each client's contributions are protected by noise.
    With --row-threshold, items that too few clients have leave the key holder as zeros. With
    either, all clients weigh equally.
    """
    from secagg_client.prepare import prepare

    wish = None
    if privacy is not None and epsilon is not None and delta is not None:
        wish = Privacy(privacy, 1.0, epsilon, delta)
    elif (privacy, epsilon, delta) != (None, None, None):
        raise ConfigurationError(
            f"expected --privacy, --epsilon and --delta together; got {privacy=}, {epsilon=}, "
            f"{delta=}; give all three, such as --privacy release --epsilon 8 --delta 1e-5"
        )
    prepare(settings, folder, rounds=rounds, privacy=wish, least=row_threshold)
    out.print(f"wrote {folder / 'task.toml'} and {folder / 'initial.npz'}", highlight=False)


@app.command()
@exits_cleanly
@with_settings(ClientSettings, ["dataset", "data_dir"])
def data(
    settings: ClientSettings,
    format_: Annotated[OutputFormat, typer.Option("--format")] = OutputFormat.table,
) -> None:
    """Read the data set and say what became of its rows: read, kept, dropped, and why.

    Nothing is sent; files that hold no shoppers get generated ones, and this says so.
    """
    from secagg_client.data_commands import as_json, show
    from secagg_recommender.datasets import read_dataset

    dataset = read_dataset(settings.dataset, settings.data_dir)
    if format_ is OutputFormat.json:
        print_json(as_json(dataset))
    else:
        show(dataset)


@app.command()
@exits_cleanly
@with_settings(
    ClientSettings, ["server", "kit", "insecure", "task", "dataset", "data_dir", "state_dir"]
)
def recommend(
    settings: ClientSettings,
    user: Annotated[str | None, typer.Option(help="a user of the data set, by its label")] = None,
    items: Annotated[
        str | None, typer.Option(help="an unseen user instead: labels of liked items, with commas")
    ] = None,
    top: Annotated[int, typer.Option(help="length of the list")] = 10,
    model: Annotated[
        Path | None,
        typer.Option(help="model .npz, such as runs/latest/model.npz; else the server's"),
    ] = None,
    format_: Annotated[OutputFormat, typer.Option("--format")] = OutputFormat.table,
) -> None:
    """The best items for one user, computed on this device.

    A user trained here has a vector in the state directory; for anybody else one is fitted from
    their own items, with the shared table frozen. Nothing is sent to the server.
    """
    from secagg_client.serve import recommend_for

    rows = recommend_for(settings, user=user, items=items, top=top, model=model)
    if format_ is OutputFormat.json:
        print_json([asdict(row) for row in rows])
        return
    table = [(row.rank, row.item, row.title, f"{row.score:.3f}") for row in rows]
    print_table(("#", "item", "title", "score"), table)


@app.command("model")
@exits_cleanly
@with_settings(ClientSettings, ["server", "kit", "insecure", "task"])
def download(
    settings: ClientSettings,
    output: Annotated[Path, typer.Argument(help=".npz file to write")],
) -> None:
    """Download the task's newest model: the shared tensors, by name."""
    from secagg_client.session import ClientSession

    with ClientSession(
        settings.server, settings.task, settings.credentials(), insecure=settings.insecure
    ) as session:
        latest = session.latest_model()
    np.savez(output, **latest.tensors)  # type: ignore[arg-type]  # names come from the plan
    out.print(f"wrote version {latest.version} to {output}")


if __name__ == "__main__":
    app()
