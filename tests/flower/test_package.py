"""Importing: what loads what, and what is said where Flower is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

_WITHOUT = "import sys; sys.modules['flwr'] = None; import secagg; "


def _python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_flower_the_error_names_the_extra() -> None:
    done = _python(_WITHOUT + "import secagg.flower")
    assert done.returncode == 1
    said = "ModuleNotFoundError: expected the package flwr; it is not installed; run pip install "
    assert done.stderr.splitlines()[-1] == f"{said}'secagg[flower]'"


def test_the_package_itself_loads_neither_flower_nor_a_framework() -> None:
    loaded = "print([m for m in ('flwr', 'torch', 'ray', 'tenseal') if m in sys.modules])"
    done = _python(f"import sys, secagg.flower; {loaded}")
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_neither_side_needs_torch_or_ray() -> None:
    loaded = "print([m for m in ('torch', 'ray', 'pandas') if m in sys.modules])"
    done = _python(f"import sys, secagg.flower.mod, secagg.flower.strategy; {loaded}")
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_there_is_nothing_else() -> None:
    import secagg.flower

    assert dir(secagg.flower) == ["SecaggMod", "SecureAggregation", "secagg_mod"]
    with pytest.raises(AttributeError, match="has no attribute 'mods'"):
        secagg.flower.mods  # noqa: B018
