"""Runs the attack gallery: ``python -m secagg_bench.gallery.run``.

Every run is a job of its own, for as many processes as there are cores. What is measured: quality
and the place of a promoted item with and without each defence, refusals of attackers and of honest
clients, and which layer stops each malformed upload.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer

from secagg_bench.gallery.attacks import ATTACKS, WEIGHT_ATTACKS, Attack
from secagg_bench.gallery.federation import Defence, Federation, Run, Setting, partition
from secagg_bench.gallery.malformed import CASES, Case, Layer, Scene, outcome
from secagg_bench.gallery.single_users import single_user_cosines
from secagg_recommender.datasets import load_dataset
from secagg_recommender.interactions import Split, split_leave_one_out

_Named = TypeVar("_Named", Attack, Case)

__all__ = ["Sizes", "app", "run_gallery", "validate"]

_ATTACKERS = {1: (0,), 3: (0, 1, 2)}
_BATCH = 50
_CAP = 20_000
_SPLITS = ("random", "taste")
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
THRESHOLDS = (-0.2, -0.1, -0.05, 0.0, 0.05)
"""Values of min_cosine for which honest refusals are worked out from exact cosines."""

app = typer.Typer(help=__doc__)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is run.

    Attributes:
        setting: of every training run.
        trials: uploads of each malformed attack that the norm check must stop.
        attempts: whole attempts at a round of each other malformed attack.
        single_users: clients a round where each client is one user.
        seed: of the malformed attacks.
        tighter: clips under which one attack is run again, in units of the setting's.
        only: names of the attacks that are run; all when empty.
    """

    setting: Setting = field(default_factory=Setting)
    trials: int = 1000
    attempts: int = 10
    single_users: int = 60
    seed: int = 1
    tighter: tuple[float, ...] = (0.5, 0.2, 0.05)
    only: tuple[str, ...] = ()

    def chosen(self, among: Sequence[_Named]) -> list[_Named]:
        """Those of them that are run."""
        return [each for each in among if not self.only or each.name in self.only]


@dataclass(frozen=True, slots=True)
class _Job:
    """One run; its key says where its result belongs."""

    key: tuple[str, ...]
    work: Callable[..., Any]
    arguments: tuple[Any, ...]


_split: Split | None = None  # of this process


def _load(dataset: str, data_dir: Path | None) -> None:
    global _split  # once a process, so that jobs need not carry it
    _split = split_leave_one_out(load_dataset(dataset, data_dir))


def _loaded() -> Split:
    if _split is None:
        raise RuntimeError("expected data to be loaded before a job; call _load first")
    return _split


def _by_name(name: str) -> Attack:
    return next(each for each in (*ATTACKS, *WEIGHT_ATTACKS) if each.name == name)


def _train(
    setting: Setting, kind: str, attack: str | None, count: int, defence: Defence, *, clear: bool
) -> Run:
    """One federation; without an attack, of the clients that would not attack."""
    users = partition(_loaded(), setting.silos, kind, setting.seed)
    who = _ATTACKERS[count] if count else ()
    if attack is None:
        federation = Federation(_loaded(), users, setting, absent=who)
    else:
        federation = Federation(_loaded(), users, setting, _by_name(attack), who)
    return federation.run(defence, clear=clear)


def _train_clear(setting: Setting, kind: str, count: int) -> Run:
    """Honest clients alone, with the defended plan, added in the clear."""
    return _train(setting, kind, None, count, "norm", clear=True)


def _train_with(
    setting: Setting, kind: str, attack: str | None, count: int, defence: Defence
) -> Run:
    return _train(setting, kind, attack, count, defence, clear=False)


def _single(setting: Setting, clients: int) -> list[list[float]]:
    return single_user_cosines(_loaded(), setting, clients)


def _case(index: int, trials: int, attempts: int, seed: int) -> dict[str, Any]:
    """How often each layer stopped the last upload of a malformed attack."""
    case, layers, lost, excess = CASES[index], Counter[Layer](), 0, 0.0
    for number, count in enumerate(_batches(case, trials, attempts)):
        scene = Scene(case.plan, seed + 1000 * index + number)
        sent = [upload for _ in range(count) for upload in case.build(scene)]
        ended = outcome(scene, sent)
        # Of a second one of a kind, only the second can be told from an honest upload.
        counted = ended.layers if case.layer == "norm" else ended.layers[-1:]
        layers.update(counted)
        lost += not ended.released
        excess = max(excess, ended.excess)
    total = layers.total()
    return {
        "name": case.name,
        "layer": case.layer,
        "trials": total,
        "stopped_there": layers[case.layer],
        "layers": dict(layers),
        "attempts_lost": lost,
        "largest_excess": excess,
    }


def _batches(case: Case, trials: int, attempts: int) -> Iterator[int]:
    """Attempts at a round, by how often the attack is in it: many at once where all are stopped."""
    if case.same or case.layer != "norm":
        yield from [1] * attempts
        return
    for start in range(0, trials, _BATCH):
        yield min(_BATCH, trials - start)


def _jobs(sizes: Sizes) -> list[_Job]:
    setting = sizes.setting
    weighted = replace(setting, weight_cap=_CAP)
    jobs = [
        _Job(("taste", "undefended"), _train_with, (setting, "taste", _FLIP, 3, "none")),
        _Job(("taste", "checked"), _train_with, (setting, "taste", _FLIP, 3, "norm")),
        _Job(("taste", "honest, in the clear"), _train_clear, (setting, "taste", 3)),
    ]
    for group, base, attacks in (
        ("attacks", setting, ATTACKS),
        ("weights", weighted, WEIGHT_ATTACKS),
    ):
        for count in _ATTACKERS:
            alone = (base, "random", None, count, "none")
            jobs.append(_Job((group, "", str(count), "alone"), _train_with, alone))
            for attack in sizes.chosen(attacks):
                defences: list[Defence] = ["none", "norm"]
                if group == "attacks" and attack.within:
                    defences.append("norm and direction")
                jobs += [
                    _Job(
                        (group, attack.name, str(count), defence),
                        _train_with,
                        (base, "random", attack.name, count, defence),
                    )
                    for defence in defences
                ]
    jobs += [
        _Job(("clips", f"{base.clip:g}", str(count), name), _train_with, (base, *arguments))
        for base in _tighter(sizes)
        for count in _ATTACKERS
        for name, arguments in (
            ("alone", ("random", None, count, "none")),
            ("none", ("random", _PROMOTION, count, "none")),
            ("norm", ("random", _PROMOTION, count, "norm")),
        )
    ]
    for kind in _SPLITS:
        for silos in (setting.silos - 2, setting.silos):
            base = replace(setting, silos=silos)
            honest = (base, kind, None, 0, "norm and direction")
            jobs.append(_Job(("direction", kind, str(silos)), _train_with, honest))
        flip = (setting, kind, "sign flip at the bound", 1, "norm and direction")
        jobs.append(_Job(("flip", kind), _train_with, flip))
    jobs.append(_Job(("direction", "single users"), _single, (setting, sizes.single_users)))
    jobs += [
        _Job(("malformed", case.name), _case, (i, sizes.trials, sizes.attempts, sizes.seed))
        for i, case in enumerate(CASES)
        if case in sizes.chosen(CASES)
    ]
    return jobs


_FLIP = "update times -10"
_PROMOTION = "promotion at the bound"


def _tighter(sizes: Sizes) -> list[Setting]:
    setting = sizes.setting
    return [replace(setting, clip=share * setting.clip) for share in sizes.tighter]


def run_gallery(
    sizes: Sizes,
    dataset: str,
    data_dir: Path | None,
    say: Callable[[str], None],
    *,
    command: str = "",
    processes: int | None = None,
) -> dict[str, Any]:
    """Run everything.

    Args:
        sizes: how much.
        dataset: ``"ml-100k"``, with its folder, or ``"marketplace"``.
        say: told a line about each job that is done.
        command: how to repeat it, for the record.
        processes: that work side by side; one for each core when omitted.

    Returns:
        What is written to ``bench/results/gallery.json``, validated.
    """
    started, done = time.perf_counter(), {}
    jobs, processes = _jobs(sizes), processes or os.cpu_count() or 1
    with ProcessPoolExecutor(
        processes,
        # Processes of their own, so that libraries read how many threads they may have.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_load,
        initargs=(dataset, data_dir),
    ) as pool:
        waiting = {pool.submit(job.work, *job.arguments): job for job in jobs}
        for number, future in enumerate(as_completed(waiting), start=1):
            job = waiting[future]
            done[job.key] = future.result()
            seconds = time.perf_counter() - started
            say(f"[{number}/{len(jobs)}, {seconds:.0f} s] {', '.join(filter(None, job.key))}")
    results = {
        "command": command,
        "dataset": dataset,
        "sizes": asdict(sizes),
        "seconds": time.perf_counter() - started,
        "machine": {
            "processes": processes,
            "platform": platform.platform(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("secagg", "numpy", "torch", "tenseal")},
        },
        "taste": _taste(sizes.setting, done),
        "attacks": _rows("attacks", sizes.chosen(ATTACKS), done),
        "weights": _rows("weights", sizes.chosen(WEIGHT_ATTACKS), done),
        "clips": _clips(sizes, done),
        "direction": _direction(sizes.setting, done),
        "malformed": [done["malformed", case.name] for case in sizes.chosen(CASES)],
    }
    validate(results)
    return results


def _taste(setting: Setting, done: dict[Any, Any]) -> dict[str, Any]:
    runs: dict[str, Run] = {
        name: done["taste", name] for name in ("undefended", "checked", "honest, in the clear")
    }
    checked, alone = runs["checked"], runs["honest, in the clear"]
    pairs = list(zip(checked.models, alone.models, strict=True))
    return {
        "attack": _FLIP,
        "clients": setting.silos,
        "attackers": 3,
        "rounds": setting.rounds,
        "runs": {name: run.summary() for name, run in runs.items()},
        "models": [{"checked": a, "honest": b} for a, b in pairs],
        "bit_identical": all(a == b for a, b in pairs),
    }


def _rows(group: str, attacks: Sequence[Attack], done: dict[Any, Any]) -> list[dict[str, Any]]:
    rows = []
    for attack in attacks:
        for count in _ATTACKERS:
            runs = {"alone": done[group, "", str(count), "alone"]}
            for defence in ("none", "norm", "norm and direction"):
                if (key := (group, attack.name, str(count), defence)) in done:
                    runs[defence] = done[key]
            rows.append(
                {
                    "name": attack.name,
                    "label": attack.label,
                    "within_bound": attack.within,
                    "attackers": count,
                    "runs": {name: run.summary() for name, run in runs.items()},
                }
            )
    return rows


def _clips(sizes: Sizes, done: dict[Any, Any]) -> dict[str, Any]:
    """The promotion again under tighter clips, and what honest updates measure."""
    alone: Run = done["attacks", "", "1", "alone"]
    return {
        "attack": _PROMOTION,
        "honest_norms": [
            {"least": min(row), "median": float(np.median(row)), "most": max(row)}
            for row in alone.norms
        ],
        "rows": [
            {
                "clip": base.clip,
                "attackers": count,
                "runs": {
                    name: done["clips", f"{base.clip:g}", str(count), name].summary()
                    for name in ("alone", "none", "norm")
                },
            }
            for base in _tighter(sizes)
            for count in _ATTACKERS
        ],
    }


def _direction(setting: Setting, done: dict[Any, Any]) -> dict[str, Any]:
    honest = []
    for kind in _SPLITS:
        for silos in (setting.silos - 2, setting.silos):
            run: Run = done["direction", kind, str(silos)]
            rows = [list(each) for each in run.cosines]
            honest.append({"clients": silos, "split": kind, "run": run.summary(), **_spread(rows)})
    single = done["direction", "single users"]
    return {
        "min_cosine": setting.min_cosine,
        "honest": honest,
        "single_users": _spread(single),
        "flip": {kind: done["flip", kind].summary() for kind in _SPLITS},
    }


def _spread(rows: list[list[float]]) -> dict[str, Any]:
    """Exact cosines of honest updates with the last aggregate: by round, and refusals they mean."""
    values = np.concatenate([np.asarray(row) for row in rows])
    return {
        "updates": int(values.size),
        "least_by_round": [float(min(row)) for row in rows],
        "median_by_round": [float(np.median(row)) for row in rows],
        "below": {f"{t:g}": float(np.mean(values < t)) for t in THRESHOLDS},
    }


def validate(results: dict[str, Any]) -> None:
    """Check that results are complete and add up.

    Raises:
        ValueError: says what does not.
    """
    expected = {
        *("command", "dataset", "sizes", "seconds", "machine"),
        *("taste", "attacks", "weights", "clips", "direction", "malformed"),
    }
    if set(results) != expected:
        raise ValueError(f"expected results with {sorted(expected)}; got {sorted(results)}")
    only = results["sizes"]["only"]
    for group, attacks in (("attacks", ATTACKS), ("weights", WEIGHT_ATTACKS)):
        names = [attack.name for attack in attacks if not only or attack.name in only]
        wanted = [(name, count) for name in names for count in _ATTACKERS]
        if [(row["name"], row["attackers"]) for row in results[group]] != wanted:
            raise ValueError(f"expected a row for each of {group} and number of attackers")
        for row in results[group]:
            for name, run in row["runs"].items():
                _check_run(f"{row['name']}, {name}", run, results["sizes"]["setting"])
    setting, rows = results["sizes"]["setting"], results["clips"]["rows"]
    clips = [share * setting["clip"] for share in results["sizes"]["tighter"]]
    tighter = [(clip, count) for clip in clips for count in _ATTACKERS]
    if [(row["clip"], row["attackers"]) for row in rows] != tighter:
        raise ValueError("expected a row for each tighter clip and number of attackers")
    for row in rows:
        for name, run in row["runs"].items():
            _check_run(f"clip {row['clip']}, {name}", run, setting)
    for row in results["malformed"]:
        if sum(row["layers"].values()) != row["trials"] or row["trials"] < 1:
            raise ValueError(f"expected layers of {row['name']!r} to add up to its trials")
    if [row["name"] for row in results["malformed"]] != [
        case.name for case in CASES if not only or case.name in only
    ]:
        raise ValueError("expected a row for each malformed attack")


def _check_run(name: str, run: dict[str, float], setting: dict[str, Any]) -> None:
    shares = [run[key] for key in ("hr10", "ndcg10", "full_hr10", "target_share")]
    uploads = run["attacker_uploads"] + run["honest_uploads"]
    most = setting["silos"] * setting["rounds"]
    refused = (run["attacker_refusals"], run["honest_refusals"])
    if not all(0 <= share <= 1 for share in shares) or not 0 < uploads <= most:
        raise ValueError(f"expected shares and counts in range; {name} has others: {run}")
    if refused[0] > run["attacker_uploads"] or refused[1] > run["honest_uploads"]:
        raise ValueError(f"expected no more refusals than uploads; {name} has: {run}")


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="where the results go")] = Path(
        "bench/results/gallery.json"
    ),
    figure: Annotated[Path, typer.Option(help="where the figure goes")] = Path("docs/gallery.svg"),
    table: Annotated[Path | None, typer.Option(help="where the Markdown tables go")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(envvar="SECAGG_DATA_DIR", help="the folder of ml-100k")
    ] = None,
    rounds: Annotated[int, typer.Option(help="of each training run")] = Setting().rounds,
    trials: Annotated[int, typer.Option(help="of each malformed attack")] = Sizes().trials,
    processes: Annotated[int | None, typer.Option(help="side by side; default: all cores")] = None,
) -> None:
    """Run the gallery on MovieLens 100K, or on generated data without it."""
    from secagg_bench.gallery.report import markdown, save_figure

    sizes = replace(Sizes(), setting=replace(Setting(), rounds=rounds), trials=trials)
    dataset = "ml-100k" if data_dir else "marketplace"
    command = shlex.join(
        ["python", "-m", "secagg_bench.gallery.run", f"--rounds={rounds}", f"--trials={trials}"]
    )
    # Jobs run side by side already: more threads would only wait for each other.
    os.environ.update(_ONE_THREAD)
    results = run_gallery(
        sizes, dataset, data_dir, typer.echo, command=command, processes=processes
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    save_figure(results, figure)
    if table is not None:
        table.write_text(markdown(results), encoding="utf-8")
    typer.echo(f"wrote {output} and {figure} in {results['seconds']:.0f} s")


if __name__ == "__main__":
    sys.exit(app())
