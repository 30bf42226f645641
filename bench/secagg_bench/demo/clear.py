"""The same training without encryption, and every other system the demo compares with.

Runs as a process of its own and never imports the cipher: the sums that it computes from the same
quantised updates are the reference for what the key holder opens. It says so at the end, and
refuses to answer otherwise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secagg.context import rotation_string
from secagg.parameters import FloatSegment, Plan
from secagg.quantize import flatten, quantize
from secagg.release import Release
from secagg_bench import baselines
from secagg_bench.baselines import BaselineResult, CurvePoint, Factors, Progress, build_silos
from secagg_bench.demo.settings import TASK_ID, DemoSettings
from secagg_client.repeatable import repeatable_rounding
from secagg_recommender.datasets import load_dataset
from secagg_recommender.evaluation import Evaluator
from secagg_recommender.factorisation import Silo, init_shared
from secagg_recommender.interactions import Split, split_leave_one_out

__all__ = ["federated_plaintext", "main"]

CIPHER_MODULES = ("tenseal", "secagg.ckks", "secagg.sealing", "secagg.encryptor")

ProgressFn = Callable[[Progress], None]


def federated_plaintext(
    split: Split, settings: DemoSettings, progress: ProgressFn
) -> tuple[BaselineResult, list[str]]:
    """Federated averaging of the quantised updates, added in the clear.

    Returns:
        What it reached, and the SHA-256 of each round's exact sums.
    """
    config = settings.run_config()
    plan = settings.plan(split.n_items)
    segment = _model_segment(plan)
    silos = build_silos(split, config)
    model = flatten(segment, init_shared(split.n_items, settings.dimensions, settings.seed))
    evaluator = Evaluator(split, config.evaluation_seed)
    digests, curve = [], []
    for number in range(1, settings.rounds + 1):
        release = _clear_round(silos, plan, model, number, settings.seed)
        digests.append(release.sha256)
        model = release.applied_to(model)
        metrics = None
        if number % config.evaluate_every == 0 or number == settings.rounds:
            metrics = evaluator.evaluate(_factors(silos, segment, model).scores)
            curve.append(CurvePoint(number, metrics))
        progress(Progress("federated_plaintext", number, settings.rounds, metrics))
    factors = _factors(silos, segment, model)
    result = BaselineResult("federated_plaintext", curve[-1].metrics, tuple(curve), factors, 0.0)
    return result, digests


def _clear_round(
    silos: list[Silo], plan: Plan, model: NDArray[np.float32], number: int, seed: int
) -> Release:
    """One round: every silo trains and quantises as it would before encrypting."""
    segment = _model_segment(plan)
    rotation = rotation_string(TASK_ID, number, plan)
    tensors = _tensors(segment, model)
    total = np.zeros(segment.values, dtype=np.int64)
    for index, silo in enumerate(silos):
        trained = silo.train(tensors, number)
        total += quantize(
            plan,
            {segment.name: trained.update},
            samples=trained.samples,
            rotation=rotation,
            randomness=repeatable_rounding(seed, index, number),
        )[0].values
    return Release(plan, rotation, len(silos), (total,))


def _model_segment(plan: Plan) -> FloatSegment:
    (segment,) = plan.segments
    if not isinstance(segment, FloatSegment):
        raise TypeError("the demo's plan has one segment of floats")
    return segment


def _tensors(segment: FloatSegment, model: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    parts = np.split(model, np.cumsum([tensor.size for tensor in segment.tensors])[:-1])
    return {
        tensor.name: part.reshape(tensor.shape)
        for tensor, part in zip(segment.tensors, parts, strict=True)
    }


def _factors(silos: list[Silo], segment: FloatSegment, model: NDArray[np.float32]) -> Factors:
    vectors = baselines.collect_user_vectors(silos)
    return Factors(vectors, (_tensors(segment, model),), np.zeros(len(vectors), dtype=np.int64))


def _say(progress: Progress) -> None:
    """One line of JSON for the process that shows the progress."""
    hr10 = progress.metrics.hr10 if progress.metrics else None
    line = {
        "system": progress.system,
        "round": progress.round_number,
        "rounds": progress.rounds,
        "hr10": hr10,
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _plain(result: BaselineResult) -> dict[str, Any]:
    return {
        "metrics": asdict(result.metrics),
        "curve": [{"round": p.round_number, **asdict(p.metrics)} for p in result.curve],
    }


def main(request: Path) -> None:
    """Read what to run from a JSON file, run it, and write the answer beside it.

    Raises:
        RuntimeError: the cipher was imported on the way.
    """
    asked = json.loads(request.read_text(encoding="utf-8"))
    settings = DemoSettings(**asked["settings"])
    data_dir = Path(asked["data_dir"]) if asked["data_dir"] else None
    split = split_leave_one_out(load_dataset(asked["dataset"], data_dir))
    config = settings.run_config()
    plaintext, digests = federated_plaintext(split, settings, _say)
    systems = {
        "popular": baselines.popular(split, config),
        "local": baselines.local_only(split, config, _say),
        "centralised": baselines.centralised(split, config, _say),
        "federated_float": baselines.federated_float(split, config, _say),
        "federated_plaintext": plaintext,
    }
    if imported := [name for name in CIPHER_MODULES if name in sys.modules]:
        raise RuntimeError(f"the run in the clear imported the cipher: {imported}")
    answer = {
        "sums_sha256": digests,
        "systems": {name: _plain(result) for name, result in systems.items()},
    }
    request.with_suffix(".answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
