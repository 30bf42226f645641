"""Puts the encrypted run beside the runs in the clear, in one JSON document."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from secagg.parameters import FloatSegment
from secagg_bench.demo.federation import EncryptedRun
from secagg_bench.demo.settings import DemoSettings, Source
from secagg_recommender.evaluation import evaluate, factor_scores
from secagg_recommender.interactions import Interactions, Split

__all__ = ["METRIC_SYSTEMS", "assemble", "passed"]

METRIC_SYSTEMS = (
    "popular",
    "local",
    "centralised",
    "federated_float",
    "federated_plaintext",
    "federated_encrypted",
)
"""Systems in the order of the table."""

_FLOAT32_BYTES = 4


def assemble(
    settings: DemoSettings,
    source: Source,
    interactions: Interactions,
    split: Split,
    encrypted: EncryptedRun,
    clear: dict[str, Any],
) -> dict[str, Any]:
    """The content of ``results.json``.

    Args:
        clear: what `demo.clear` answered.
    """
    plan = settings.plan(split.n_items)
    segment = plan.segments[0]
    parameters = segment.parameters if isinstance(segment, FloatSegment) else segment.size
    rounds = _rounds(settings, encrypted, clear["sums_sha256"])
    metrics = {name: system["metrics"] for name, system in clear["systems"].items()}
    metrics["federated_encrypted"] = _encrypted_metrics(settings, split, encrypted)
    return {
        "dataset": interactions.name,
        "source": source.note,
        "tie_rule": interactions.tie_rule,
        "clients": settings.silos,
        "poisoners": settings.poisoners,
        "poison_refused": sum(row["refused"] for row in rounds),
        "rounds": settings.rounds,
        "seed": settings.seed,
        "settings": asdict(settings),
        "plan_digest": plan.digest.hex(),
        "parameters": parameters,
        "rounds_detail": rounds,
        "bit_identical": len(encrypted.rounds) == settings.rounds
        and all(row["equal"] for row in rounds),
        "failure": encrypted.reason,
        "upload_bytes": plan.payload_bytes,
        "upload_bytes_per_parameter": plan.payload_bytes / parameters,
        "float32_bytes": parameters * _FLOAT32_BYTES,
        "seconds": _seconds(encrypted),
        "wall_seconds": encrypted.wall_s,
        "metrics": metrics,
        "curves": {name: system["curve"] for name, system in clear["systems"].items()},
        "machine": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "python": platform.python_version(),
            "versions": {
                name: version(name)
                for name in ("secagg", "tenseal", "torch", "numpy", "grpcio", "cryptography")
            },
        },
    }


def _rounds(
    settings: DemoSettings, encrypted: EncryptedRun, clear: list[str]
) -> list[dict[str, Any]]:
    """Every round's two digests side by side; a round that was never opened differs."""
    opened = {row.round_number: row for row in encrypted.rounds}
    rows = []
    for number in range(1, settings.rounds + 1):
        record = opened.get(number)
        digest = record.sums_sha256.hex() if record else None
        rows.append(
            {
                "round": number,
                "attempt": record.attempt if record else None,
                "sha256_decrypted": digest,
                "sha256_clear": clear[number - 1],
                "equal": digest == clear[number - 1],
                "contributors": record.contributors if record else 0,
                "refused": record.rejected if record else 0,
                "upload_bytes": record.upload_bytes if record else 0,
                "aggregate_ms": record.aggregate_ms if record else 0.0,
                "release_ms": record.release_ms if record else 0.0,
            }
        )
    return rows


def _encrypted_metrics(
    settings: DemoSettings, split: Split, encrypted: EncryptedRun
) -> dict[str, float] | None:
    if not encrypted.shared:
        return None
    scores = factor_scores(encrypted.user_vectors, encrypted.shared)
    return asdict(evaluate(scores, split, settings.run_config().evaluation_seed))


def _seconds(encrypted: EncryptedRun) -> dict[str, float]:
    """Seconds of work by step, over all clients and rounds."""
    costs = encrypted.costs
    return {
        "train": costs.train_s,
        "quantise": costs.quantize_s,
        "encrypt": costs.encrypt_s,
        "upload": costs.upload_s,
        "aggregate": sum(row.aggregate_ms for row in encrypted.rounds) / 1000,
        "decrypt": sum(row.release_ms for row in encrypted.rounds) / 1000,
    }


def passed(results: dict[str, Any]) -> bool:
    """Whether every round's sum came out of the ciphertexts bit for bit."""
    return bool(results["bit_identical"])
