"""The example app on a SuperLink and SuperNodes, with the key holder, each a process, over TLS."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from superlinks import EXAMPLE, Flower, copied, example_task, flower

from secagg import NormCheck
from secagg.context import rotation_string
from secagg.parameters import FloatSegment, Plan, TensorSpec
from secagg.planner import make_plan
from secagg.quantize import quantize
from secagg.release import Release
from secagg_client.repeatable import repeatable_rounding

NODES, ROUNDS, SEED = 3, 2, 7

REPEATABLE_MOD = f'''
"""The mod of the example, with rounding that a test can repeat."""

from secagg.flower import SecaggMod
from secagg_client.repeatable import repeatable_rounding


def _rounding(context, joined):
    partition = context.node_config["partition-id"]
    return repeatable_rounding({SEED}, partition, joined.id.round_number)


secagg_mod = SecaggMod(rounding=_rounding)
'''


@pytest.fixture
def one_thread() -> None:
    """As the nodes have it: sums of floats depend on how many threads add them."""
    torch.set_num_threads(1)


def _repeatable(app: Path) -> Path:
    """Have an app's nodes round by a seed; nothing else of it changes."""
    file = app / "quickstart" / "client_app.py"
    text = file.read_text(encoding="utf-8")
    assert text.count("from secagg.flower import secagg_mod\n") == 1
    text = text.replace(
        "from secagg.flower import secagg_mod", "from quickstart.mod import secagg_mod"
    )
    file.write_text(text, encoding="utf-8")
    (app / "quickstart" / "mod.py").write_text(REPEATABLE_MOD, encoding="utf-8")
    return app


def _state(model: torch.nn.Module) -> dict[str, NDArray[np.float64]]:
    return {name: value.numpy().astype(np.float64) for name, value in model.state_dict().items()}


def _plan(model: torch.nn.Module) -> Plan:
    """What `SecureAggregation(FedAvg(), context, clip=1.0)` says for three clients."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tensors = tuple(TensorSpec(name, shape) for name, shape in sorted(shapes.items()))
    segment = FloatSegment("update", tensors, 1.0, 8, "samples", 1000)
    return make_plan([segment], max_clients=NODES, norm_check=NormCheck())


def _aggregated_in_the_clear(task_id: str) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The same app with the same rounding, and plain additions: every sum's SHA-256, the model."""
    task = example_task()
    torch.manual_seed(0)
    model = task.Net()
    plan, digests = _plan(model), []
    for number in range(1, ROUNDS + 1):
        before, rotation = _state(model), rotation_string(task_id, number, plan)
        summands = []
        for partition in range(NODES):
            trained = task.Net()
            trained.load_state_dict(model.state_dict())
            batches, _ = task.load_data(partition, 64)
            task.train(trained, batches, 1, 0.1)
            (quantized,) = quantize(
                plan,
                {"update": {k: after - before[k] for k, after in _state(trained).items()}},
                samples=len(batches.dataset),
                rotation=rotation,
                randomness=repeatable_rounding(SEED, partition, number),
            )
            assert not quantized.clipped
            summands.append(quantized.values)
        release = Release(plan, rotation, NODES, (sum(summands[1:], start=summands[0]),))
        digests.append(release.sha256)
        mean = release.mean()
        after = {k: (before[k] + mean[k]).astype(np.float32) for k in before}
        model.load_state_dict({k: torch.from_numpy(value) for k, value in after.items()})
    return digests, model.state_dict()


def _node(machine: Flower, index: int) -> str:
    kit = machine.kits / "clients" / f"client-{index + 1}"
    config = f'partition-id={index} num-partitions={NODES} secagg-kit="{kit}"'
    # One of them keeps a state, and so checks what it is told of its updates.
    return config if index else f'{config} secagg-state="{machine.folder / "state"}"'


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_sums_of_a_deployment_are_those_of_the_same_app_in_the_clear(tmp_path: Path) -> None:
    app = _repeatable(copied(EXAMPLE / "secure", tmp_path / "app"))
    with flower(tmp_path, NODES) as machine:
        key_holder = machine.key_holder()
        machine.deployment([_node(machine, index) for index in range(NODES)])
        config = {
            "num-server-rounds": ROUNDS,
            "fraction-evaluate": 0.0,
            "secagg-key-holder": key_holder,
            "secagg-kits": "",
            "save-to": str(tmp_path / "model.pt"),
        }
        log = machine.run(app, config)
        number, status = machine.last_run()
        assert status == "finished:completed", machine.logs()

    said = re.findall(r"secagg: round (\d+): (\d+) contributors, (\d+) refused, sha256=(\w+)", log)
    digests, model = _aggregated_in_the_clear(f"flower-{number}")
    assert said == [(str(n), "3", "0", digest) for n, digest in enumerate(digests, 1)]
    opened = torch.load(tmp_path / "model.pt")
    assert opened.keys() == model.keys()
    assert all(torch.equal(opened[name], model[name]) for name in model)
