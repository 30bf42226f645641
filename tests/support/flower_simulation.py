"""A program: the toy app in Flower's simulation engine, encrypted.

Its arguments are two JSON files: what is wanted, and where to write what came of it. In a process
of its own, because Ray and its workers outlive what a test can clean up, and warn of things that
are errors in tests.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray
from flower_grids import poisoner, rounding_of
from flower_toy import initial_arrays, toy_app
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from secagg.flower import SecaggMod, SecureAggregation


def _configured(config: dict[str, Any]) -> Mod:
    """A run has a configuration where an app is a project; here it is a function call."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        before, context.run_config = context.run_config, dict(config)
        try:
            return call_next(message, context)
        finally:
            context.run_config = before  # Flower refuses a run that changes it

    return mod


def main(wanted: dict[str, Any]) -> dict[str, Any]:
    """Run it; the sums of every round, and the model at the end."""
    server = ServerApp()
    found: dict[str, Any] = {}

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        context.run_config = dict(wanted["config"])
        strategy = SecureAggregation(
            FedAvg(fraction_evaluate=0.0, min_available_nodes=wanted["nodes"]),
            context,
            clip=wanted["clip"],
            metrics=wanted["bounds"],
        )
        result = strategy.start(grid, initial_arrays(), wanted["rounds"], timeout=300)
        found["sums"], found["contributors"] = strategy.sums, strategy.contributors
        found["refused"], found["run"] = strategy.refused, context.run_id
        found["losses"] = [
            metrics["train_loss"] for metrics in result.train_metrics_clientapp.values()
        ]
        found["model"] = {key: array.numpy().tolist() for key, array in result.arrays.items()}

    mods = [
        _configured(wanted["config"]),
        poisoner(wanted["poisoning"]),
        SecaggMod(rounding_of),
    ]
    run_simulation(
        server,
        toy_app(mods, dropping=wanted["dropping"]),
        wanted["nodes"],
        backend_config={
            "init_args": {"num_cpus": 2, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    ray.shutdown()
    return found


if __name__ == "__main__":
    given, answer = map(Path, sys.argv[1:])
    answer.write_text(json.dumps(main(json.loads(given.read_text()))))
