"""The table on the page is of the results file, and that of the very scenarios there are."""

from __future__ import annotations

import json
from pathlib import Path

from secagg_bench.network.report import table
from secagg_bench.network.scenarios import SCENARIOS

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "network.json"


def test_what_was_run_is_what_there_is_and_nothing_went_wrong() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    found = {each["name"]: each for each in results["scenarios"]}
    there = [each for each in SCENARIOS if each.name in found]
    assert list(found) == [each.name for each in there]
    assert [each["fault"] for each in found.values()] == [each.fault for each in there]
    assert {name for name, each in found.items() if each["violations"]} == set()
    rows = table(results).splitlines()[2 : 2 + len(there)]
    assert all(each.fault in row for each, row in zip(there, rows, strict=True))


def test_a_row_says_what_went_wrong_and_what_it_took() -> None:
    figures = {"rounds": 1, "attempts": 2, "gave_up": 1}
    sent = figures | {"sent_after_bytes": 110, "missing_bytes": 100}
    seconds = {"round_s": 12.34, "on_again_s": None, "recovered_s": 5.0}
    scenarios = [
        {"fault": "a", "violations": [], "figures": sent, "load": 1.0} | seconds,
        {"fault": "b", "violations": ["lost"], "figures": figures, "load": 2.0} | seconds,
    ]
    machine = {"processor": "p", "cores": 2}
    results = {"scenarios": scenarios, "clients": 4, "upload_bytes": 1_500_000, "machine": machine}
    rows = table(results).splitlines()[2:4]
    assert rows == [
        "| a | exact, in 2 attempts, one client was started again; 110% of what was missing was "
        "sent | 12.3 |  | 5.0 |",
        "| b | lost | 12.3 |  | 5.0 |",
    ]
