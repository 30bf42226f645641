"""The fuzz targets, the most exposed first. Each is imported when it is asked for."""

from __future__ import annotations

import importlib

from fuzz_inputs import Target

__all__ = ["NAMES", "target"]

_WHERE = {
    "wire": "fuzz_wire.WIRE",
    "server": "fuzz_server.SERVER",
    "keyholder": "fuzz_keyholder.KEY_HOLDER",
    "answers": "fuzz_answers.ANSWERS",
    "frameworks": "fuzz_frameworks.FRAMEWORKS",
    "identities": "fuzz_identities.IDENTITIES",
    "monitor": "fuzz_monitor.MONITOR",
    "settings": "fuzz_settings.SETTINGS",
    "datasets": "fuzz_datasets.DATASETS",
    "states": "fuzz_states.STATES",
}

NAMES = tuple(_WHERE)


def target(name: str) -> Target:
    """The target of a name; KeyError for another."""
    module, _, attribute = _WHERE[name].partition(".")
    found: Target = getattr(importlib.import_module(module), attribute)
    return found
