"""The `secagg-client` command: join a task with a silo of users, and recommend from its model."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from secagg import logs
from secagg.archive import read_npz
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
from secagg_client.config import ClientSettings, identity_in
from secagg_client.prepare_command import prepare_command
from secagg_client.switch import Switch

__all__ = ["app"]


class IndexKind(StrEnum):
    """How `recommend` finds the best items."""

    exact = "exact"
    usearch = "usearch"


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


app.command("prepare")(prepare_command)


@app.command("count-model")
@exits_cleanly
def count_model(
    sums: Annotated[Path, typer.Argument(help="what `secagg-server task sums` has written")],
    output: Annotated[Path, typer.Argument(help=".npz file to write")],
    ridge: Annotated[float, typer.Option(help="of EASE: how many users outweigh nothing")] = 300.0,
) -> None:
    """Make the model of a round of --model ease or transitions, for `recommend --model`."""
    from secagg_client.one_round import model_from_sums

    model = model_from_sums(sums, output, ridge=ridge)
    out.print(f"wrote {output}, a model of {model.n_items} items", highlight=False)


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
    ClientSettings,
    [
        *("server", "kit", "insecure", "task", "dataset", "data_dir", "state_dir"),
        "allow_server_scores",
    ],
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
    pairs: Annotated[
        Path | None,
        typer.Option(help="what count-model made of transitions, on top of a session model"),
    ] = None,
    explain: Annotated[bool, typer.Option(help="say which own items each is due to")] = False,
    index: Annotated[
        IndexKind, typer.Option(help="usearch: a graph for large catalogues (secagg[index])")
    ] = IndexKind.exact,
    memory_mb: Annotated[int, typer.Option(min=1, help="most memory for the exact index")] = 1024,
    cohort: Annotated[
        str | None,
        typer.Option(help="start from what a cohort has, such as 'F 25-34'; needs no items"),
    ] = None,
    cohort_table: Annotated[
        Path | None, typer.Option(help=".npz with the cohorts' released counts")
    ] = None,
    cohort_clients: Annotated[
        int, typer.Option(min=1, help="who took part, if that file is the task's model: a mean")
    ] = 1,
    cohort_least: Annotated[
        int, typer.Option(min=2, help="that task's threshold: fewer were withheld")
    ] = 5,
    server_scores: Annotated[
        str | None,
        typer.Option(help="refine by the model of this task, or .npz; if allow_server_scores"),
    ] = None,
    server_weight: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="what the server's scores weigh")
    ] = 0.3,
    format_: Annotated[OutputFormat, typer.Option("--format")] = OutputFormat.table,
) -> None:
    """The best items for one user, computed on this device.

    A user trained here has a vector in the state directory; for anybody else one is fitted from
    their own items, with the shared table frozen. Nothing about the user is sent to the server.
    """
    from secagg_client.serve import CohortStart, ServerHelp, recommend_for

    if (cohort is None) != (cohort_table is None):
        raise ConfigurationError(
            "expected --cohort and --cohort-table together; got one of them; give both or neither"
        )
    start = None
    if cohort is not None and cohort_table is not None:
        start = CohortStart(cohort, cohort_table, cohort_clients, cohort_least)
    rows = recommend_for(
        settings,
        user=user,
        items=items,
        top=top,
        model=model,
        pairs=pairs,
        explain=explain,
        index=index.value,
        memory_mb=memory_mb,
        cohort=start,
        server=None if server_scores is None else ServerHelp(server_scores, server_weight),
    )
    if format_ is OutputFormat.json:
        print_json([asdict(row) for row in rows])
        return
    headings = ("#", "item", "title", "score", "because you liked")
    table = [
        (row.rank, row.item, row.title, f"{row.score:.3f}", "; ".join(row.because)) for row in rows
    ]
    shown = len(headings) if explain else len(headings) - 1
    print_table(headings[:shown], [line[:shown] for line in table])


@app.command("model")
@exits_cleanly
@with_settings(ClientSettings, ["server", "kit", "insecure", "task"])
def download(
    settings: ClientSettings,
    output: Annotated[Path, typer.Argument(help=".npz file to write")],
    labels: Annotated[
        Path | None,
        typer.Option(help="initial.npz that `prepare` wrote: names the items in the file too"),
    ] = None,
) -> None:
    """Download the task's newest model: the shared tensors, by name.

    With --labels, another task can start from the file even if its catalogue has changed.
    """
    from secagg_client.session import ClientSession

    named = {}
    if labels is not None:
        from secagg_recommender.warm_start import LABELS, labels_of

        named = {LABELS: labels_of(read_npz(labels))}
    with ClientSession(
        settings.server, settings.task, settings.credentials(), insecure=settings.insecure
    ) as session:
        latest = session.latest_model()
    np.savez(output, **latest.tensors, **named)  # type: ignore[arg-type]  # names: the plan's
    out.print(f"wrote version {latest.version} to {output}")


if __name__ == "__main__":
    app()
