"""Encrypted aggregation for a Flower app: one mod on the nodes, one wrapper around the strategy.

::

    app = ClientApp(mods=[secagg_mod])                                   # client_app.py
    strategy = SecureAggregation(FedAvg(), context, clip=1.0)            # server_app.py

A node's update leaves it encrypted; the ServerApp and its strategy see the sum alone, once the key
holder has opened it. Needs Flower's Message API (flwr 1.41 or later); see docs/how-to/flower.md.
Read `envelopes` first (what travels), then `mod` and `strategy`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from secagg.extras import require

if TYPE_CHECKING:
    from secagg.flower.mod import SecaggMod, secagg_mod
    from secagg.flower.strategy import SecureAggregation

require("flower", "flwr")

_HOME = {"SecaggMod": "mod", "SecureAggregation": "strategy", "secagg_mod": "mod"}

__all__ = ["SecaggMod", "SecureAggregation", "secagg_mod"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'secagg.flower' has no attribute {name!r}")
    return getattr(importlib.import_module(f"secagg.flower.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
