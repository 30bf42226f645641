"""Flower's simulation engine and a key holder process: the same sums as in the clear."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flower_grids import rounding
from flower_twin import clear_run
from flwr.serverapp.strategy import FedAvg
from superlinks import flower

from secagg.flower.metrics import Metrics
from secagg.parameters import FloatSegment, NormCheck, TensorSpec
from secagg.planner import make_plan

PROGRAM = Path(__file__).parents[1] / "support" / "flower_simulation.py"
NODES, ROUNDS = 20, 2
DROPPING, POISONING = 4, 9
BOUNDS = {"train_loss": 5.0}
CLIP = 1.0


def _simulated(folder: Path) -> dict[str, Any]:
    """What the program says of a run that began with nothing but kits and a key holder."""
    given, answer = folder / "wanted.json", folder / "found.json"
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    support = {"PYTHONPATH": str(PROGRAM.parent)}
    with flower(folder, clients=NODES) as machine:
        wanted = {
            "nodes": NODES,
            "rounds": ROUNDS,
            "clip": CLIP,
            "bounds": BOUNDS,
            "dropping": [DROPPING],
            "poisoning": [POISONING],
            "config": {
                "secagg-key-holder": machine.key_holder(),
                "secagg-kits": str(machine.kits),
            },
        }
        given.write_text(json.dumps(wanted))
        with (folder / "simulation.log").open("w+") as log:
            done = subprocess.run(
                [sys.executable, str(PROGRAM), str(given), str(answer)],
                env=os.environ | quiet | support,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
            log.seek(0)
            said = log.read()
    assert done.returncode == 0, said[-6000:]
    found: dict[str, Any] = json.loads(answer.read_text())
    return found | {"log": said}


@pytest.mark.slow
def test_twenty_nodes_sum_to_what_they_do_in_the_clear(tmp_path: Path) -> None:
    from flower_toy import initial_arrays, toy_app  # loads torch

    found = _simulated(tmp_path)
    rounds = [str(number) for number in range(1, ROUNDS + 1)]
    left_out = {"CLIENT_APP_RAISED_EXCEPTION": 1, "NORM_REFUSED": 1}
    assert found["contributors"] == dict.fromkeys(rounds, NODES - 2)
    assert found["refused"] == dict.fromkeys(rounds, left_out)
    floats = {
        key: array.shape for key, array in initial_arrays().items() if array.dtype == "float32"
    }
    specs = tuple(TensorSpec(key, shape) for key, shape in floats.items())
    segments = [
        FloatSegment("update", specs, CLIP, 8, "samples", 1000),
        Metrics(BOUNDS, weighted=True).segment(NODES),
    ]
    sums, arrays = clear_run(
        lambda mod: toy_app([mod]),
        FedAvg(fraction_evaluate=0.0),
        initial_arrays(),
        rounds=ROUNDS,
        nodes=NODES,
        plan=make_plan(segments, max_clients=NODES, norm_check=NormCheck()),
        task_id=f"flower-{found['run']}",
        rounding=rounding,
        left_out={DROPPING, POISONING},
        bounds=BOUNDS,
    )
    assert {str(number): sha256 for number, sha256 in sums.items()} == found["sums"]
    assert all(f"sha256={sha256}" in found["log"] for sha256 in sums.values())
    assert found["losses"] == sorted(found["losses"], reverse=True)
    for key, array in arrays.items():
        if key in floats:
            wanted = np.array(found["model"][key], dtype=np.float32)
            np.testing.assert_array_equal(array.numpy(), wanted)
    assert found["model"]["1.num_batches_tracked"] == 0
