"""What the demo runs: one description that the encrypted run and the runs in the clear share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from secagg.parameters import FloatSegment, NormCheck, Plan, TensorSpec
from secagg.planner import make_plan
from secagg_bench.baselines import RunConfig
from secagg_recommender.factorisation import ITEM_BIAS, ITEM_FACTORS, TrainConfig
from secagg_recommender.interactions import DataError
from secagg_recommender.movielens_wheel import fetch_movielens

__all__ = ["DemoSettings", "Source", "find_data"]

TASK_ID = "demo"


@dataclass(frozen=True, slots=True)
class Source:
    """Where the interactions come from, and a sentence about it for people."""

    dataset: Literal["ml-100k", "marketplace"]
    data_dir: Path | None
    note: str


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """The demo's scale; the defaults are the documented run.

    Attributes:
        silos: client processes, each with its share of the users.
        poisoners: further client processes that send poison (see `demo.poisoner`); what they send
            must not be in any sum.
        rounds: rounds of training.
        dimensions: length of user and item vectors.
        bits: of a quantised value.
        clip: L2 norm to which a silo's update is cut, in model units.
        weight_cap: training interactions beyond which a silo gains no more weight.
        seed: of everything that is random but protects nothing.
        round_deadline_s: time a round collects for, in seconds.
        max_attempts: attempts at one round before the run fails.
    """

    silos: int = 8
    poisoners: int = 1
    rounds: int = 25
    dimensions: int = 16
    bits: int = 8
    clip: float = 40.0
    weight_cap: int = 20_000
    seed: int = 0
    round_deadline_s: float = 120.0
    max_attempts: int = 2

    def plan(self, n_items: int) -> Plan:
        """The plan of every round.

        Raises:
            PlanError: no exact plan exists.
        """
        tensors = (
            TensorSpec(ITEM_FACTORS, (n_items, self.dimensions)),
            TensorSpec(ITEM_BIAS, (n_items,)),
        )
        update = FloatSegment("update", tensors, self.clip, self.bits, "samples", self.weight_cap)
        return make_plan([update], max_clients=self.clients, norm_check=NormCheck())

    @property
    def clients(self) -> int:
        """All client processes, the poisoners last."""
        return self.silos + self.poisoners

    def run_config(self) -> RunConfig:
        """The same run for the baselines."""
        return RunConfig(
            train=TrainConfig(dimensions=self.dimensions, seed=self.seed),
            n_silos=self.silos,
            rounds=self.rounds,
            sample_cap=self.weight_cap,
        )


def find_data(data_dir: Path | None, cache: Path) -> Source:
    """ML-100K from a folder or the package index; the generated marketplace where that fails."""
    if data_dir is not None:
        return Source("ml-100k", data_dir, f"MovieLens 100K from {data_dir}")
    try:
        folder = fetch_movielens(cache)
    except DataError as error:
        return Source("marketplace", None, f"generated marketplace, because: {error}")
    return Source("ml-100k", folder, "MovieLens 100K from the recbole wheel on the package index")
