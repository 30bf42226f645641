"""Where the time goes: every part is found in what really runs, and nothing is counted twice."""

from __future__ import annotations

import os
import platform

import pytest

from secagg_bench.one_core import hardware
from secagg_bench.suite.profile import PARTS, measured, split, table

CALLS = [
    ("codec.py", "parse", 0.5, 1.0),
    ("codec.py", "other", 0.25, 0.25),
    ("~", "<built-in method _hashlib.openssl_sha256>", 2.0, 2.0),
    ("main.py", "main", 0.25, 3.5),
    ("~", "<method 'update' of 'x.openssl' objects>", 0.5, 0.5),
]


def test_parts_take_what_their_functions_take_and_the_rest_is_left() -> None:
    parts = {"parse": (("codec.py", "parse"),), "digest": (("~", "openssl_sha256"),)}
    assert split(CALLS, parts) == {"parse": 1.0, "digest": 2.0, "rest": 0.5}


@pytest.mark.parametrize(
    "function", [("codec.py", "parsed"), ("other.py", "parse"), ("~", "sha256"), ("~", "openssl")]
)
def test_a_part_whose_function_is_gone_is_told(function: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="none"):
        split(CALLS, {"gone": (function,)})


def test_every_part_is_found_in_a_round_and_none_overlaps_another() -> None:
    found = measured(parameters=3000, repetitions=1)
    for party, parts in found["seconds"].items():
        assert set(parts) == {*PARTS[party], "rest"}
        assert all(seconds >= 0 for seconds in parts.values()), (party, parts)
    text = table(found)
    assert all(part in text for parts in PARTS.values() for part in parts)
    assert "3,000 parameters" in text


def test_the_hardware_is_named_and_no_host() -> None:
    text = hardware()
    assert f"{os.cpu_count()} cores" in text
    assert platform.node() not in text
    assert 1 <= len(text) <= 200
    assert "\n" not in text
