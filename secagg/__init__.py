"""secagg: secure aggregation for federated recommenders.

Clients encrypt, a server adds what it cannot read, a key holder opens only the sum. The roles are
`Encryptor`, `Aggregator` and `KeyHolder`; start from a plan (`plan_tensors`, `plan_integers`,
`make_plan`). Names load when first used, so that importing a part never loads the cipher.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secagg.aggregator import Aggregate, Aggregator
    from secagg.challenger import Challenger
    from secagg.context import RoundContext
    from secagg.encryptor import Encryptor
    from secagg.errors import SecaggError
    from secagg.keyholder import KeyHolder
    from secagg.optimisers import Optimiser
    from secagg.parameters import (
        FloatSegment,
        IntegerSegment,
        LowRank,
        NormCheck,
        Plan,
        Privacy,
        RandomSubset,
        RowThreshold,
        TensorSpec,
    )
    from secagg.planner import explain, make_plan, plan_integers, plan_tensors
    from secagg.privacy import release_rho
    from secagg.receipts import SigningKey
    from secagg.release import Release
    from secagg.sampling import Stream
    from secagg.sketches import Sketch
    from secagg.upload import Upload
    from secagg.verdicts import Verdict

_HOME = {
    "Sketch": "sketches",
    "Verdict": "verdicts",
    "NormCheck": "parameters",
    "Challenger": "challenger",
    "Aggregate": "aggregator",
    "Aggregator": "aggregator",
    "Encryptor": "encryptor",
    "FloatSegment": "parameters",
    "IntegerSegment": "parameters",
    "KeyHolder": "keyholder",
    "LowRank": "parameters",
    "Optimiser": "optimisers",
    "RandomSubset": "parameters",
    "Plan": "parameters",
    "Privacy": "parameters",
    "RowThreshold": "parameters",
    "Release": "release",
    "RoundContext": "context",
    "SecaggError": "errors",
    "SigningKey": "receipts",
    "Stream": "sampling",
    "TensorSpec": "parameters",
    "Upload": "upload",
    "release_rho": "privacy",
    "explain": "planner",
    "make_plan": "planner",
    "plan_integers": "planner",
    "plan_tensors": "planner",
}

__all__ = [
    "Aggregate",
    "Aggregator",
    "Challenger",
    "Encryptor",
    "FloatSegment",
    "IntegerSegment",
    "KeyHolder",
    "LowRank",
    "NormCheck",
    "Optimiser",
    "Plan",
    "Privacy",
    "RandomSubset",
    "Release",
    "RoundContext",
    "RowThreshold",
    "SecaggError",
    "SigningKey",
    "Sketch",
    "Stream",
    "TensorSpec",
    "Upload",
    "Verdict",
    "explain",
    "make_plan",
    "plan_integers",
    "plan_tensors",
    "release_rho",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'secagg' has no attribute {name!r}")
    return getattr(importlib.import_module(f"secagg.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
