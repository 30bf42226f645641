"""What is measured: tables of labelled runs, and the hyperparameters that are tried beforehand.

Where a method has something to choose, all candidates run once with a validation item held out, and
the best by HR@10 is used; test items play no part in it. Read `report` next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final

from secagg_bench.recommender.trials import Trial

__all__ = ["SEEDS", "Section", "candidates", "compared", "quick", "sections", "tuned"]

SEEDS: Final = (0, 1, 2)
_TUNING_SEED: Final = 100

Results = Mapping[str, Mapping[str, Any]]
"""What `trials.run` returned, by the key of the trial."""

_RATES: Final = ((0.03, 1e-3), (0.1, 1e-3), (0.1, 1e-1))
_NAMES: Final = {
    "average": "FedAvg",
    "momentum": "FedAvgM",
    "prox": "FedProx",
    "adam": "FedAdam",
}
# Uneven silos need room for large weights.
_UNEVEN: Final = Trial(weight_cap=60_000)
_PARTITIONS: Final = {
    "uniform": Trial(),
    "Dirichlet(1) over favourite genres": replace(_UNEVEN, partition="dirichlet", alpha=1.0),
    "Dirichlet(0.1) over favourite genres": replace(_UNEVEN, partition="dirichlet", alpha=0.1),
    "by favourite genre": replace(_UNEVEN, partition="preference"),
    "by clusters of taste": replace(_UNEVEN, partition="taste"),
    "power law of sizes": replace(_UNEVEN, partition="quantity"),
}
_KEPT: Final = (0.5, 0.1)
_RANKS: Final = {8: (1.0, 2.0), 4: (1.0, 2.0)}
# Corrected weights are four times as large, and finer steps make up for the larger cap.
_SCARCE: Final = Trial(partition="taste", weak=0.5, weight_cap=250_000, bits=12)
# The mean progress, 0.625, over what the weights make of it, 0.4.
_LONGER: Final = 0.625 / 0.4


@dataclass(frozen=True, slots=True)
class Section:
    """One table.

    Attributes:
        rows: what each line is called, and its run, to be repeated with every seed.
        extra: further columns: names known to `report`.
    """

    name: str
    title: str
    note: str
    rows: Mapping[str, Trial]
    extra: tuple[str, ...] = ()


def candidates() -> dict[str, list[Trial]]:
    """What is tried, by the name of the choice."""
    tried = {
        "momentum": [Trial(optimiser="momentum", server_rate=rate) for rate in (0.1, 0.2, 0.4)],
        "prox": [Trial(proximal=mu) for mu in (1e-4, 1e-3, 1e-2)],
    }
    tried["adam"] = [Trial(optimiser="adam", server_rate=rate, tau=tau) for rate, tau in _RATES]
    tried |= {f"bits {bits}": [Trial(bits=bits, clip=c) for c in (20, 40)] for bits in (4, 3)}
    for rank, rates in _RANKS.items():
        tried[f"rank {rank}"] = [Trial(rank=rank, server_rate=rate) for rate in rates]
    return {name: [_compressed(trial) for trial in found] for name, found in tried.items()}


def _compressed(trial: Trial) -> Trial:
    """With a clip norm for the part of an update that travels."""
    kept = trial.subset if not trial.rank else (trial.rank + 1) / 17
    return trial if trial.feedback else replace(trial, clip=round(trial.clip * kept**0.5, 1))


def tuned(trial: Trial) -> Trial:
    """The run that decides about a candidate."""
    return replace(trial, validation=True, seed=_TUNING_SEED)


def compared() -> dict[str, Trial]:
    """What is run under encryption too, to compare every sum with the one in the clear."""
    few = Trial(rounds=3)
    return {
        "FedAvg, 8 bits": Trial(),
        "FedAdam, 3 bits": replace(few, optimiser="adam", server_rate=0.1, bits=3),
        "rank 4": replace(few, rank=4),
        "subset of 10%, error feedback": replace(few, subset=0.1, feedback=True),
        "weak devices, corrected": replace(_SCARCE, rounds=3, progress=0.25),
    }


def quick(trial: Trial) -> Trial:
    """The same in seconds, on generated data."""
    rounds = min(trial.rounds, 2)
    return replace(trial, dataset="toy", rounds=rounds, silos=4, weight_cap=2_000)


def _best(results: Results) -> Callable[[str], Trial]:
    tried = candidates()

    def score(trial: Trial) -> float:
        found = results.get(tuned(trial).key, {})
        return float(found["metrics"]["hr10"]) if "metrics" in found else -1.0

    return lambda name: max(tried[name], key=score) if name in tried else Trial()


def sections(results: Results, *, toy: bool = False) -> list[Section]:
    """All tables, with the best candidates of those in the results.

    Args:
        toy: two rows each, of runs of seconds.
    """
    found = _sections(_best(results))
    if not toy:
        return found
    return [
        replace(each, rows={label: quick(each.rows[label]) for label in [*each.rows][:2]})
        for each in found
    ]


def _sections(best: Callable[[str], Trial]) -> list[Section]:
    optimisers = {label: best(name) for name, label in _NAMES.items()}
    optimisers["FedYogi"] = replace(optimisers["FedAdam"], optimiser="yogi")
    return [
        Section(
            "systems",
            "Federated against centralised and local",
            "Every silo alone, and all data in one place, train the same model for as many epochs.",
            {
                "most popular": Trial("popular"),
                "local only": Trial("local"),
                "centralised": Trial("centralised"),
                "federated, floats": Trial(bits=0),
                "**federated, encrypted**": Trial(),
            },
            ("best",),
        ),
        Section(
            "optimisers",
            "Server optimisers and FedProx",
            "The server's step on the opened mean update, and FedProx's term on the silos. FedYogi "
            "takes FedAdam's settings.",
            optimisers,
            ("settings", "reach"),
        ),
        Section(
            "partitions",
            "Uneven data",
            "FedAvg. Skew is how far silos' shares of items are from everybody's: mean "
            "total-variation distance, in which 0 is equal.",
            dict(_PARTITIONS),
            ("skew", "reach"),
        ),
        Section(
            "compression",
            "Fewer bytes",
            "Bytes of a client's upload in a round: whole ciphertexts of 28,672 bytes, of which "
            "this model fills few; a norm check takes further room. Low rank is of the item table "
            "(d = 16), by a public random basis; a subset is of public random coordinates.",
            _compression(best),
            ("bytes", "checked", "large", "settings", "reach"),
        ),
        Section(
            "participation",
            "Part of the silos in a round",
            "Silos drawn at random, at least three of eight.",
            {f"{count} of 8": Trial(participation=count / 8) for count in (8, 5, 3)},
            ("reach",),
        ),
        Section(
            "devices",
            "Weak devices",
            "Half of the silos, of other tastes than the rest, manage a quarter of their batches "
            "in each round, or a quarter of the rounds. Corrected, they weigh four times as much. "
            "Weights shorten the mean where batches are missing, and a server rate of "
            f"{_LONGER:.2f} gives it the length of the mean progress. HR@10 also for the users of "
            "either half.",
            {
                "all strong": replace(_SCARCE, progress=1.0),
                "a quarter of the batches, naive": replace(_SCARCE, progress=0.25, corrected=False),
                "a quarter of the batches, corrected": replace(_SCARCE, progress=0.25),
                "a quarter of the batches, corrected, longer steps": replace(
                    _SCARCE, progress=0.25, server_rate=_LONGER
                ),
                "a quarter of the rounds, naive": replace(_SCARCE, presence=0.25, corrected=False),
                "a quarter of the rounds, corrected": replace(_SCARCE, presence=0.25),
            },
            ("weak", "strong"),
        ),
        Section(
            "shoppers",
            "Generated shoppers of a real product catalogue",
            "Shoppers are generated: this shows how methods compare, not how well anybody is "
            "recommended to. FedProx with μ 0.001, not chosen on anything.",
            _shoppers(),
            ("skew", "best"),
        ),
        Section(
            "crossed",
            "Optimisers on uneven data",
            "With the settings chosen on even data.",
            {
                f"{label}, {where}": _moved(trial, at)
                for where, at in _PARTITIONS.items()
                if at.partition == "taste"
                for label, trial in optimisers.items()
            },
            ("reach",),
        ),
    ]


def _moved(trial: Trial, at: Trial) -> Trial:
    return replace(trial, partition=at.partition, alpha=at.alpha, weight_cap=at.weight_cap)


def _compression(best: Callable[[str], Trial]) -> dict[str, Trial]:
    rows = {"8 bits": Trial(), "6 bits": Trial(bits=6)}
    rows |= {f"{bits} bits": best(f"bits {bits}") for bits in (4, 3)}
    rows |= {f"rank {rank}": best(f"rank {rank}") for rank in _RANKS}
    for kept, feedback in product(_KEPT, (False, True)):
        label = f"subset of {kept:.0%}" + (", error feedback" if feedback else "")
        rows[label] = _compressed(Trial(subset=kept, feedback=feedback))
    return rows


def _shoppers() -> dict[str, Trial]:
    base = Trial(dataset="amazon-products-2023")  # small silos: no cap is in their way
    kinds = replace(base, partition="preference")
    return {
        "most popular": replace(base, system="popular"),
        "centralised": replace(base, system="centralised"),
        "uniform silos, local only": replace(base, system="local"),
        "uniform silos, federated": base,
        "silos by kind of shopper, local only": replace(kinds, system="local"),
        "silos by kind of shopper, federated": kinds,
        "silos by kind of shopper, FedProx": replace(kinds, proximal=1e-3),
    }
