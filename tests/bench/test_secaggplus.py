"""A round beside Flower's SecAgg+: both reach the mean, and what is measured is what is said."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from secagg.parameters import NormCheck
from secagg.planner import plan_tensors
from secagg_bench.secaggplus import _error, _Ours, _Theirs, _update, app, lost_rounds, shares_for

PARAMETERS, CLIENTS = 1000, 10


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    output = tmp_path_factory.mktemp("secaggplus") / "results.json"
    arguments = ["--parameters", str(PARAMETERS), "--clients", str(CLIENTS), "--rounds", "1"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(output)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout, json.loads(output.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def systems(finished: tuple[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    (setting,) = finished[1]["settings"]
    return {each["name"]: each for each in setting["systems"]}


@pytest.mark.slow
def test_the_results_have_the_documented_shape(
    finished: tuple[str, dict[str, Any]], systems: dict[str, dict[str, Any]]
) -> None:
    results = finished[1]
    assert set(results) == {"rounds", "machine", "secaggplus", "settings"}
    assert results["rounds"] == 1
    assert {"python", "numpy", "flwr", "processor"} <= set(results["machine"])
    assert results["secaggplus"]["modulus_range"] == 2**32
    (setting,) = results["settings"]
    assert (setting["parameters"], setting["clients"], setting["dropped"]) == (1000, 10, 1)
    assert list(systems) == [
        *("8 bits", "16 bits", "8 bits, norm check"),
        *("SecAgg+, 3 shares", "SecAgg+, 9 shares"),
    ]
    for each in systems.values():
        measured = [value for value in each.values() if isinstance(value, float)]
        assert all(math.isfinite(value) and value >= 0 for value in measured)
        assert min(each["client_ms"], each["server_ms"], each["server_dropped_ms"]) > 0


@pytest.mark.slow
def test_bytes_are_those_of_the_plans_and_of_int64(systems: dict[str, dict[str, Any]]) -> None:
    for name, bits, check in (
        ("8 bits", 8, None),
        ("16 bits", 16, None),
        ("8 bits, norm check", 8, NormCheck()),
    ):
        plan = plan_tensors(PARAMETERS, max_clients=CLIENTS, clip=1.0, bits=bits, norm_check=check)
        assert systems[name]["plan_digest"] == plan.digest.hex()
        # Beyond the ciphertexts: a sealed seed, a receipt, and the record that carries them.
        assert 0 < systems[name]["upload_bytes"] - plan.payload_bytes < 2100
    # Beyond the masked vector: two public keys, and for each neighbour two encrypted shares.
    few, many = (systems[f"SecAgg+, {shares} shares"]["upload_bytes"] for shares in (3, 9))
    assert 8 * PARAMETERS < few < many < 8 * PARAMETERS + 10_000


@pytest.mark.slow
def test_who_is_asked_how_often_and_by_whom(systems: dict[str, dict[str, Any]]) -> None:
    ours = [each for each in systems.values() if not each["shares"]]
    theirs = [each for each in systems.values() if each["shares"]]
    assert {each["round_trips"] for each in ours} == {1}
    assert {each["round_trips"] for each in theirs} == {4}
    assert all(each["key_holder_ms"] > 0 for each in ours)
    assert all(each["key_holder_ms"] == 0 for each in theirs)
    assert [(each["shares"], each["threshold"]) for each in theirs] == [(3, 2), (9, 5)]


@pytest.mark.slow
def test_ratios_are_those_of_the_figures(systems: dict[str, dict[str, Any]]) -> None:
    first = systems["8 bits"]
    for each in systems.values():
        assert each["client_ratio"] == pytest.approx(each["client_ms"] / first["client_ms"])
        assert each["upload_ratio"] == pytest.approx(each["upload_bytes"] / first["upload_bytes"])
        for when in ("", "dropped_"):
            mine, ours = (
                system[f"server_{when}ms"] + system[f"key_holder_{when}ms"]
                for system in (each, first)
            )
            assert each[f"server_{when}ratio"] == pytest.approx(mine / ours)


@pytest.mark.slow
def test_both_round_as_finely_as_their_bits_say(systems: dict[str, dict[str, Any]]) -> None:
    errors = [systems[name]["error"] for name in ("8 bits", "16 bits", "SecAgg+, 3 shares")]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 100 * errors[1] > 0


@pytest.mark.slow
def test_the_table_says_what_was_measured(finished: tuple[str, dict[str, Any]]) -> None:
    for word in ("1,000 parameters, 10 clients", "SecAgg+, 9 shares", "key holder", "a tenth gone"):
        assert word in finished[0]


def test_a_wrong_mean_stops_the_benchmark() -> None:
    update = np.full(100, 0.1, dtype=np.float32)
    assert _error(update * 1.01, update) == pytest.approx(0.01, rel=1e-4)
    for wrong in (update * 1.03, np.zeros(100), np.full(100, np.nan)):
        with pytest.raises(RuntimeError, match="expected the mean"):
            _error(wrong, update)


@pytest.mark.slow
def test_clients_that_are_gone_do_not_halt_a_measured_round_of_theirs() -> None:
    system = _Theirs(_update(100), 6, 3)
    whole, fewer = system.round(0), system.round(1)
    assert (len(whole.clients), len(fewer.clients)) == (6, 5)
    assert max(whole.error, fewer.error) < 0.001
    with pytest.raises(RuntimeError, match="can be missed"):
        system.round(3)


def test_clients_that_are_gone_are_not_in_a_sum_of_ours() -> None:
    for check in (None, NormCheck()):
        system = _Ours(_update(100), 6, 16, check)
        fewer = system.round(2)
        assert len(fewer.clients) == len(fewer.uploads) == 4
        assert fewer.error < 0.001
        assert [system.lost(dropped) for dropped in (0, 3, 4)] == [0, 0, 1]


def test_shares_grow_with_the_logarithm() -> None:
    assert [shares_for(clients) for clients in (10, 20, 100, 1000)] == [9, 11, 15, 21]


def test_lost_rounds_are_those_that_can_be_counted() -> None:
    """With three shares of which two are needed, no two clients in a row of three may be gone."""
    for clients, gone in ((20, 2), (100, 10), (30, 1)):
        apart = clients - 2 * gone
        kept = clients / apart * math.comb(apart, gone) / math.comb(clients, gone)
        assert lost_rounds(clients, gone, 3, 2) == pytest.approx(1 - kept, abs=0.015)
    assert lost_rounds(20, 0, 3, 2) == 0
    assert lost_rounds(20, 20, 3, 2) == 1
