"""Load, attacks and soak on a toy: the real programs, every sum exact, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from secagg.context import RoundContext
from secagg.keyholder import KeyHolder
from secagg_bench.load import hostile, uploads
from secagg_bench.load.__main__ import app
from secagg_bench.load.attackers import ATTACKS
from secagg_bench.load.members import ACTS, Book, Pace, plan_of, quantized
from secagg_bench.load.probing import summary
from secagg_bench.load.report import hostile_table, soak_table, uploads_table
from secagg_bench.load.soak import Soak, Wanted, by_minute, settled
from secagg_bench.load.vitals import family, folder_bytes, used, vitals

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def context(number: int = 1) -> RoundContext:
    return KeyHolder(plan_of(100, 4), round_number=number).context


def silent(_line: str) -> None:
    """For whoever wants progress told."""


# --- what a sum is held against --------------------------------------------------------------


@pytest.mark.parametrize(
    ("fates", "found", "wrong"),
    [
        ({0: True, 1: True, 2: True}, [1, 1, 1, 0], ""),
        ({0: True, 1: True, 2: True}, [1, 1, 0, 0], "lost 1 accepted uploads"),
        ({0: True, 1: True, 2: True}, [1, 2, 1, 0], "somebody is in the sum more than once"),
        ({0: True, 1: True, 2: False}, [1, 1, 1, 0], "summed 1 uploads that must not be in"),
        ({0: True, 1: True}, [1, 1, 0, 1], "summed 1 uploads that must not be in"),
        ({0: True, 1: None}, [1, 1, 0, 0], ""),
        ({0: True, 1: None}, [1, 0, 0, 0], ""),
    ],
)
def test_the_book_names_what_is_lost_doubled_or_strange(
    fates: dict[int, bool | None], found: list[int], wrong: str
) -> None:
    book, made = Book(), context()
    for client, fate in fates.items():
        book.note(made, client, fate)
    key = (made.id.task_id, made.id.round_number, made.id.attempt)
    assert book.wrong(key, np.array(found)) == wrong
    book.forget(made.id.task_id)
    assert not book.contexts


def test_every_client_is_at_a_place_of_its_own_in_the_clear() -> None:
    made = context()
    places = [np.flatnonzero(quantized(made, client)[1].summand).tolist() for client in range(4)]
    assert places == [[0], [1], [2], [3]]


# --- what is measured ------------------------------------------------------------------------


def test_vitals_are_those_of_a_process_and_its_children() -> None:
    seen = vitals(os.getpid())
    assert 0 < seen.rss <= seen.peak
    assert seen.fds > 2
    assert seen.threads >= 1
    with pytest.raises(OSError, match="No such"):
        vitals(2**22 + 1)
    assert os.getpid() not in family(os.getpid())


def test_a_process_has_used_what_its_ended_children_have() -> None:
    before = used(os.getpid())
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", busy], check=True)
    assert used(os.getpid()) - before >= 0.25
    assert used(os.getpid()) >= vitals(os.getpid()).cpu_s


def test_a_folder_has_the_bytes_of_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(5))
    (tmp_path / "c").write_bytes(bytes(3))
    assert folder_bytes(tmp_path) == 8
    assert folder_bytes(tmp_path / "nothing") == 0


def test_health_is_summed_up_by_when_it_was_asked_for() -> None:
    answers = [(float(at), "grpc", float(at), at != 3) for at in range(10)]
    found = summary(answers, 2.0, 6.0)
    assert found["grpc"]["answers"] == 4
    assert (found["grpc"]["p50_ms"], found["grpc"]["max_ms"]) == (3.5, 5.0)
    assert found["grpc"]["not_ready"] == 1
    assert "http" not in found


def sample(at_s: float, rss: int) -> dict[str, Any]:
    one = {"rss": rss, "fds": 9, "threads": 3, "cpu_s": 1.0}
    return {
        "at_s": at_s,
        "server": one | {"workers": [rss, 1]},
        "key_holder": one | {"workers": [2]},
        "clients": one,
        "bytes": {"uploads": 7},
        "gauges": {},
    }


def test_memory_is_compared_after_five_minutes_and_in_the_end() -> None:
    samples = [sample(at, 100 + at) for at in range(0, 1200, 10)]
    found = settled(samples)
    assert found["server"]["rss_early"] == pytest.approx(425)
    assert found["server"]["rss_late"] == pytest.approx(1260, abs=10)
    columns = by_minute(samples)
    assert columns["minute"] == list(range(20))
    assert columns["server.workers"][0] == pytest.approx(126)
    assert columns["bytes.uploads"] == [7.0] * 20


def test_counters_are_read_by_their_label() -> None:
    text = 'secagg_calls_refused_total{reason="OVERLOADED"} 12\nother_total{reason="A"} 3\n'
    assert uploads.counted(text, "secagg_calls_refused_total") == {"OVERLOADED": 12}


def test_an_attack_that_there_is_not_is_named() -> None:
    done = CliRunner().invoke(app, ["hostile", "--attack", "kindness"])
    assert done.exit_code != 0


@pytest.mark.parametrize("name", ["load", "soak"])
def test_results_have_their_tables_and_figures(name: str, tmp_path: Path) -> None:
    if not (RESULTS / f"{name}.json").is_file():
        pytest.skip(f"bench/results/{name}.json has not been measured yet")
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    if name == "soak":
        assert soak_table(found).count("\n| ") == 3
        assert found["wrong"] == []
        assert found["upload_bytes_left"] == 0
        assert found["acts"].keys() >= ACTS.keys()
    else:
        assert "| 200 |" in uploads_table(found)
        assert all(row["exact"] for row in found["uploads"]["rows"])
        assert all(f"| {attack} |" in hostile_table(found) for attack in ATTACKS)
    done = CliRunner().invoke(app, ["draw", "--results", str(RESULTS), "--folder", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / f"{name}.svg").stat().st_size > 1000


# --- toys of the real thing --------------------------------------------------------------------


@pytest.mark.slow
def test_clients_that_upload_at_once_are_all_in_the_sum(tmp_path: Path) -> None:
    wanted = uploads.Wanted(clients=(6,), enrolled=8, parameters=300_000, processes=2, idle_s=0.5)
    (row,) = uploads.measure(wanted, tmp_path, silent)["rows"]
    assert row["exact"]
    assert (row["accepted"], row["clients"]) == (6, 6)
    assert row["health"]["uploading"].keys() <= {"grpc", "http"}
    assert folder_bytes(tmp_path / "server" / "uploads") == 0


@pytest.mark.slow
def test_honest_clients_finish_while_others_attack(tmp_path: Path) -> None:
    wanted = hostile.Wanted(honest=3, hostile=3, parameters=5000, warm_s=0.5)
    rows = hostile.measure(wanted, tmp_path, silent)["rows"]
    assert [row["attack"] for row in rows] == [hostile.CALM, *ATTACKS]
    for row in rows:
        assert row["disk_bytes"] <= row["disk_bound"]
        assert row["disk_after"] == 0
        assert row["fds_after"] <= rows[0]["fds_after"] + 10, row["attack"]


@pytest.mark.slow
def test_a_short_soak_loses_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    pace = Pace(round_s=4.0, think_s=0.3, late_s=1.0)
    wanted = Wanted(
        minutes=0.1, clients=6, target=5, rounds=3, parameters=5000, sample_s=0.5, pace=pace
    )
    kept: list[dict[str, Any]] = []
    found = Soak(wanted, tmp_path, silent).run(kept.append)
    assert found["wrong"] == []
    assert found["rounds"]["done"] >= 1
    assert found["upload_bytes_left"] == 0
    assert kept
    assert found["minutes_seen"]["server.fds"]
