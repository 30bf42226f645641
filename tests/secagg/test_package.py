"""The package itself: what importing it costs, what it exports, and its tree of errors."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from importlib.resources import files

import pytest

import secagg
from secagg import errors
from secagg.errors import SecaggError, by_reason

HEAVY = ("tenseal", "grpc", "torch", "pandas", "typer", "rich", "pydantic", "sqlalchemy")


def loaded_by(statement: str) -> set[str]:
    code = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize(
    "module",
    [
        "secagg",
        "secagg.errors",
        "secagg.parameters",
        "secagg.planner",
        "secagg.quantize",
        "secagg.packing",
        "secagg.residues",
        "secagg.release",
        "secagg.receipts",
        "secagg.upload",
        "secagg.aggregator",
        "secagg.challenges",
        "secagg.verdicts",
        "secagg.direction",
        "secagg.sketch_shape",
    ],
)
def test_importing_a_part_without_a_key_never_loads_the_cipher(module: str) -> None:
    assert not loaded_by(f"import {module}") & set(HEAVY)


@pytest.mark.parametrize("module", ["secagg.ckks", "secagg.encryptor", "secagg.keyholder"])
def test_the_cipher_loads_no_transport_and_no_framework(module: str) -> None:
    loaded = loaded_by(f"import {module}")
    assert "tenseal" in loaded
    assert not loaded & (set(HEAVY) - {"tenseal"})


def test_the_package_itself_loads_nothing_else() -> None:
    assert "numpy" not in loaded_by("import secagg; dir(secagg)")


@pytest.mark.parametrize("module", ["secagg.sketches", "secagg.challenger", "secagg.recheck"])
def test_sketching_knows_no_key(module: str) -> None:
    # Sketches multiply in the ring; nothing that makes or opens a seed is loaded for it.
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    keys = {f"secagg.{name}" for name in ("onetime", "ckks", "sealing", "keyholder", "norm_check")}
    assert not keys & set(done.stdout.split())


def test_the_aggregator_is_usable_without_the_cipher() -> None:
    # The server's part of a round, from the plan to the sum, in a process without a cipher.
    code = (
        "from secagg import plan_integers, Aggregator, RoundContext;"
        "plan = plan_integers(10, max_clients=3, max_abs=1);"
        "context = RoundContext.create(plan, bytes(1216), task_id='t', round_number=1, attempt=1,"
        " model_digest=bytes(32));"
        "Aggregator(context)"
    )
    assert "tenseal" not in loaded_by(code)


def test_every_exported_name_resolves_to_its_home() -> None:
    assert sorted(secagg.__all__) == secagg.__all__ == sorted(secagg._HOME)
    for name, home in secagg._HOME.items():
        module = importlib.import_module(f"secagg.{home}")
        assert getattr(secagg, name) is getattr(module, name)
        assert name in module.__all__
    assert dir(secagg) == secagg.__all__


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = secagg.no_such_name
    with pytest.raises(ImportError):
        importlib.import_module("secagg.no_such_module")


@pytest.mark.parametrize(
    "module",
    [
        *("errors", "transcript", "parameters", "planner", "sampling", "residues", "quantize"),
        *("packing", "ckks", "onetime", "sealing", "context", "receipts", "upload", "encryptor"),
        *("aggregator", "keyholder", "release", "challenges", "challenger", "verdicts", "recheck"),
        *("sketch_shape", "sketches", "direction", "norm_check"),
    ],
)
def test_every_module_exports_what_it_says(module: str) -> None:
    loaded = importlib.import_module(f"secagg.{module}")
    assert len(set(loaded.__all__)) == len(loaded.__all__)
    for name in loaded.__all__:
        assert hasattr(loaded, name)


def test_the_package_is_typed() -> None:
    assert files("secagg").joinpath("py.typed").is_file()


# --- errors --------------------------------------------------------------------------------


def tree(root: type[SecaggError]) -> list[type[SecaggError]]:
    return [root, *(found for child in root.__subclasses__() for found in tree(child))]


CLASSES = [cls for cls in tree(SecaggError) if cls.__module__ == "secagg.errors"]


def test_every_error_is_exported() -> None:
    assert {cls.__name__ for cls in CLASSES} == set(errors.__all__) - {"by_reason", "reasons"}


def test_reasons_are_unique_and_lead_back() -> None:
    reasons = [cls.reason for cls in CLASSES]
    assert len(set(reasons)) == len(reasons)
    for cls in CLASSES:
        assert re.fullmatch(r"[A-Z][A-Z_]+[A-Z]", cls.reason)
        assert "reason" in vars(cls)
        assert by_reason(cls.reason) is cls
    assert by_reason("FROM_THE_FUTURE") is SecaggError


def test_status_and_exit_codes_are_known_ones() -> None:
    statuses = {"INTERNAL", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "PERMISSION_DENIED"}
    statuses |= {"ALREADY_EXISTS", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"}
    statuses |= {"RESOURCE_EXHAUSTED"}
    for cls in CLASSES:
        assert cls.status in statuses
        assert 64 <= cls.exit_code <= 78


def test_the_drawing_of_the_tree_is_the_tree() -> None:
    drawn: dict[str, str] = {}
    reasons: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^([\s│├└─]*)(\w+Error)\b(.*)$", line)
        if not found:
            continue
        indent, name, rest = len(found[1]), found[2], found[3]
        while above and above[-1][0] >= indent:
            above.pop()
        drawn[name] = above[-1][1] if above else "Exception"
        above.append((indent, name))
        if code := re.search(r"\b([A-Z]+(_[A-Z]+)*)\s*$", rest):
            reasons[name] = code[1]
    assert drawn == {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES}
    assert reasons == {cls.__name__: cls.reason for cls in CLASSES if cls.__name__ in reasons}
    leaves = {cls.__name__ for cls in CLASSES if not cls.__subclasses__()}
    assert leaves <= reasons.keys()


def test_soft_and_hard_errors_are_separate_branches() -> None:
    soft = set(tree(errors.UploadError))
    hard = set(tree(errors.RoundError))
    assert not soft & hard
    assert not (soft | hard) & set(tree(errors.InputError))
