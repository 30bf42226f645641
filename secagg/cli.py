"""The `secagg` command: plans, and whatever other packages add to it.

Further commands come from the entry-point group ``secagg.commands``, so that the library does not
import the packages that build on it.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import entry_points
from typing import Annotated

import typer

from secagg import audit_commands, provisioning_commands
from secagg.commands import OutputFormat, exits_cleanly, print_json, print_table, version
from secagg.errors import SecaggError
from secagg.parameters import MIN_COHORT, MODULUS, RING_DEGREE, SECURITY_BITS, NormCheck, Plan
from secagg.planner import FAILURE_BITS, explain, plan_tensors
from secagg.sketch_shape import sketch_bytes

__all__ = ["app"]

app = typer.Typer(help="Secure aggregation for federated recommenders.", no_args_is_help=True)
app.add_typer(audit_commands.app, name="audit")
app.add_typer(provisioning_commands.app, name="provision")


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
    format_: Annotated[OutputFormat, typer.Option("--format")] = OutputFormat.table,
) -> None:
    """Plan an exact sum and explain it line by line, or say why there is none."""
    plan = plan_tensors(
        parameters,
        max_clients=clients,
        min_clients=min_clients,
        clip=clip,
        bits=bits,
        weighting="equal" if weight_cap is None else "samples",
        weight_cap=1 if weight_cap is None else weight_cap,
        norm_check=NormCheck() if norm_check else None,
    )
    if format_ is OutputFormat.json:
        print_json(_facts(plan, parameters))
        return
    rows = [(fact.topic, fact.value, fact.reason) for fact in explain(plan)]
    print_table(("what", "value", "why"), rows)


def _facts(plan: Plan, parameters: int) -> dict[str, object]:
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
        "explanation": [asdict(fact) for fact in explain(plan)],
    }


def _add_plugins() -> None:
    for entry in entry_points(group="secagg.commands"):
        try:
            command = entry.load()
        except (ImportError, SecaggError):
            # An extra is not installed; `secagg` works without it.
            continue
        app.command(entry.name)(command)


_add_plugins()


if __name__ == "__main__":
    app()
