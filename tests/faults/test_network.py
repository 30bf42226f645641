"""The real programs on hosts of their own: what the network does costs time and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from secagg_bench.network.federation import Federation, federation
from secagg_bench.network.hosts import unable
from secagg_bench.network.scenarios import SCENARIOS, play

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why := unable()), reason=why),
]

TOLD = ("tampering", "judging and answer")
"""The others take minutes; ``python -m secagg_bench.network`` runs all."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder: Path = tmp_path_factory.mktemp("network")
    with federation(folder, seed=1) as started:
        yield started
        codes = {name: program.stop() for name, program in started.services.items()}
    assert codes == dict.fromkeys(started.services, 0)


@pytest.mark.parametrize("name", TOLD)
def test_the_sum_is_exact_and_counts_each_client_once(running: Federation, name: str) -> None:
    (scenario,) = [each for each in SCENARIOS if each.name == name]
    outcome = play(running, scenario)
    assert outcome.violations == []
    assert outcome.figures["gave_up"] == 0, "a client had to be started again"
