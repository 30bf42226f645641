"""Whole jobs in NVFlare's simulator; the key holder is a process of its own, over mutual TLS."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip(
    "nvflare", reason="needs the extra nvflare, which has an environment of its own"
)

import nvflare_sites as sites

import secagg
from secagg.context import rotation_string
from secagg.provision import Federation
from secagg.quantize import quantize
from secagg_bench.processes import Program
from secagg_client.repeatable import repeatable_rounding

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "nvflare"
SITES = ("site-1", "site-2", "site-3", "site-4")
ROUNDS = 2
TASK = "simulated"
CLIP, CAP = 1.0, 60

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@contextlib.contextmanager
def key_holder(folder: Path, kits: Path) -> Iterator[str]:
    """A running `secagg-keyholder`; its address."""
    ready = folder / "keyholder.ready"
    arguments = ["run", "--listen", "127.0.0.1:0", "--monitor-listen", "off"]
    arguments += ["--kit", str(kits / "keyholder")]
    arguments += ["--passphrase-file", str(kits / "custodians" / "passphrase")]
    arguments += ["--state-dir", str(folder / "keyholder"), "--ready-file", str(ready)]
    program = Program("secagg_keyholder.cli", arguments, folder / "keyholder.log")
    try:
        program.wait_for(ready.exists)
        yield json.loads(ready.read_text(encoding="utf-8"))["listen"]
    finally:
        program.stop()


def provisioned(folder: Path) -> Path:
    hosts = ("localhost", "127.0.0.1")
    kits = folder / "kits"
    Federation.create(kits, server_hosts=hosts, key_holder_hosts=hosts, clients=SITES)
    return kits


def write_job(folder: Path, kits: Path, address: str) -> Path:
    """The example's job, with this test's model, trainer and rounding in it."""
    job = folder / "job"
    shutil.copytree(EXAMPLE / "job", job)
    (job / "app" / "custom").mkdir()
    shutil.copy(sites.__file__, job / "app" / "custom" / "nvflare_sites.py")
    config = job / "app" / "config"
    with edited(config / "config_fed_server.json") as server:
        server["server"] = {"task_request_interval": 0.2}
        server["workflows"][0]["args"] |= {"min_clients": len(SITES), "num_rounds": ROUNDS}
        aggregator, _, persistor = server["components"]
        given = {"key_holder": address, "kit": str(kits / "server"), "task": TASK}
        aggregator["args"] = given | {"clip": CLIP, "weight_cap": CAP}
        persistor["path"] = "nvflare_sites.Persistor"
        arguments = {"file": str(folder / "rounds")}
        recorder = {"id": "log", "path": "nvflare_sites.Recorder", "args": arguments}
        server["components"].append(recorder)
    with edited(config / "config_fed_client.json") as client:
        client["executors"][0]["executor"] = {"path": "nvflare_sites.Trainer"}
        (join,) = client["task_data_filters"][0]["filters"]
        join["path"] = "nvflare_sites.RepeatableJoin"
        join["args"] = {"kit": f"{kits}/clients/{{site}}", "task": TASK}
        (encryptor,) = client["task_result_filters"][0]["filters"]
        encryptor["path"] = "nvflare_sites.PoisonousEncryptor"
    return job


@contextlib.contextmanager
def edited(file: Path) -> Iterator[dict[str, Any]]:
    """A JSON file's content, to be changed."""
    content = json.loads(file.read_text(encoding="utf-8"))
    yield content
    file.write_text(json.dumps(content), encoding="utf-8")


def start(arguments: list[str], folder: Path, log: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    with (folder / log).open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def simulated(job: Path, folder: Path) -> subprocess.Popen[bytes]:
    runner = (
        "import sys; from nvflare import SimulatorRunner; "
        f"sys.exit(SimulatorRunner({str(job)!r}, {str(folder / 'workspace')!r}, "
        f"clients={','.join(SITES)!r}, threads={len(SITES)}).run())"
    )
    return start(["-c", runner], folder, "simulator.log")


def in_the_clear(model: dict[str, Any], number: int) -> secagg.Release:
    """A round of the honest sites: the same integers, added without any cipher."""
    plan = secagg.plan_tensors(
        sites.SHAPES,
        max_clients=len(SITES),
        clip=CLIP,
        weighting="samples",
        weight_cap=CAP,
        norm_check=secagg.NormCheck(),
    )
    rotation, parts = rotation_string(TASK, number + 1, plan), []
    for site in SITES:
        if site == sites.POISONER:
            continue
        after = sites.trained(model, site, number)
        (part,) = quantize(
            plan,
            {"update": {name: after[name] - model[name] for name in sites.SHAPES}},
            samples=sites.steps_of(site),
            rotation=rotation,
            randomness=repeatable_rounding(sites.SEED, sites.number_of(site), number + 1),
        )
        assert not part.clipped  # so that what poisons is forty times too long
        parts.append(part.values)
    return secagg.Release(plan, rotation, len(parts), (np.sum(parts, axis=0),))


def test_jobs_in_the_simulator(tmp_path: Path) -> None:
    """A job with a poisoned site, bit for bit that of the honest ones in the clear; the example."""
    kits = provisioned(tmp_path)
    with key_holder(tmp_path, kits) as address, contextlib.ExitStack() as stack:
        shutil.copytree(EXAMPLE, tmp_path / "example")
        jobs = [
            simulated(write_job(tmp_path, kits, address), tmp_path),
            start(["job.py", address, str(kits)], tmp_path / "example", "simulator.log"),
        ]
        for job in jobs:
            stack.callback(job.wait)
            stack.callback(job.kill)
        codes = [job.wait(timeout=240) for job in jobs]
    log = (tmp_path / "simulator.log").read_text(encoding="utf-8")
    example = (tmp_path / "example" / "simulator.log").read_text(encoding="utf-8")
    assert codes == [0, 0], log + example

    lines = (tmp_path / "rounds").read_text(encoding="utf-8").splitlines()
    model = sites.initial()
    for number, line in enumerate(lines):
        clear = in_the_clear(model, number)
        assert json.loads(line) == {"round": number, "meta": {"secagg_sha256": clear.sha256}}
        model |= {n: model[n] + m.astype(np.float32) for n, m in clear.mean().items()}
        (file,) = tmp_path.rglob(f"model-{number}.npz")
        with np.load(file) as saved:
            for name, value in model.items():
                np.testing.assert_array_equal(saved[name], value)
    assert len(lines) == ROUNDS
    assert log.count("3 contributors, 1 refused (NORM_REFUSED)") == ROUNDS
    assert log.count("refused this client's last update") == ROUNDS

    assert len(re.findall(r"secagg: round \d: 3 contributors, 0 refused, sha256=", example)) == 2
    (file,) = (tmp_path / "example").rglob("server.npy")
    # Each of its sites labels rows by this direction.
    learned, truth = np.load(file), np.linspace(-1, 1, 8)
    assert learned @ truth > 0.95 * np.linalg.norm(learned) * np.linalg.norm(truth)
