"""Weak devices: budgets that are kept, and sums that do not lean towards the strong."""

from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg_recommender.devices import Budget, Workload, seconds_per_step
from secagg_recommender.factorisation import LocalUpdate, Silo, TrainConfig, init_shared
from secagg_recommender.interactions import DataError, Split, split_leave_one_out
from secagg_recommender.marketplace import generate_marketplace
from secagg_recommender.partition import partition_by_taste

CONFIG = TrainConfig(dimensions=4, batch_size=64, seed=11)


@lru_cache
def shoppers() -> Split:
    return split_leave_one_out(generate_marketplace(3, n_shoppers=200, n_products=120))


def workload(**change: int) -> Workload:
    plain = {"steps": 4, "full_steps": 8, "uploads": 3, "rounds": 12, "seed": 0, "device": 0}
    return Workload(**{**plain, **change})


def planned(budget: Budget, **change: Any) -> Workload:  # noqa: ANN401
    plain = {"full_steps": 10, "step_s": 0.5, "rounds": 20, "round_bytes": 1000}
    return budget.workload(**{**plain, "seed": 0, "device": 0, **change})


# --- budgets ------------------------------------------------------------------------------------


def test_without_limits_a_device_does_everything_at_its_plain_weight() -> None:
    work = planned(Budget())
    assert (work.steps, work.uploads) == (10, 20)
    assert all(work.takes_part(number) for number in range(1, 21))
    assert work.correction == 1
    assert work.weight(123, cap=123) == 123


@settings(deadline=None)
@given(
    seconds=st.floats(0.01, 100),
    nbytes=st.integers(1, 10**6),
    step_s=st.floats(1e-3, 10),
    full_steps=st.integers(1, 60),
    rounds=st.integers(1, 60),
    round_bytes=st.integers(1, 10**5),
    device=st.integers(0, 1000),
)
def test_budgets_are_kept_for_certain(
    seconds: float,
    nbytes: int,
    step_s: float,
    full_steps: int,
    rounds: int,
    round_bytes: int,
    device: int,
) -> None:
    terms = {"full_steps": full_steps, "step_s": step_s, "rounds": rounds}
    terms |= {"round_bytes": round_bytes, "device": device}
    if seconds < step_s or nbytes < round_bytes:
        with pytest.raises(DataError, match="raise it"):
            planned(Budget(seconds, nbytes), **terms)
        return
    work = planned(Budget(seconds, nbytes), **terms)
    assert work.steps * step_s <= seconds * (1 + 1e-12)
    uploads = sum(work.takes_part(number) for number in range(1, rounds + 1))
    assert uploads == work.uploads
    assert uploads * round_bytes <= nbytes


@pytest.mark.parametrize("name", ["train_seconds", "upload_bytes"])
@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_impossible_limits_are_refused(name: str, limit: float) -> None:
    with pytest.raises(DataError, match=name):
        Budget(**{name: limit})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"steps": 9}, {"uploads": 0}, {"uploads": 13}, {"rounds": 2}]
)
def test_impossible_workloads_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(DataError, match="uploads"):
        workload(**change)


@pytest.mark.parametrize("number", [0, -1, 13])
def test_rounds_outside_the_task_are_refused(number: int) -> None:
    with pytest.raises(DataError, match="round"):
        workload().takes_part(number)


def test_a_weight_that_would_be_cut_is_refused() -> None:
    assert workload().weight(100, cap=800) == 800
    with pytest.raises(DataError, match="weight_cap=799"):
        workload().weight(100, cap=799)


def test_steps_are_timed_without_leaving_a_trace() -> None:
    silo, shared = Silo(0, shoppers(), np.arange(100), CONFIG), init_shared(120, 4, 0)
    before = silo.state()
    times = iter([10.0, 14.0])
    assert seconds_per_step(silo, shared, lambda: next(times)) == 4.0 / 8
    assert silo.state() == before


def test_the_silo_stays_as_it_was_when_timing_fails() -> None:
    silo = Silo(0, shoppers(), np.arange(100), CONFIG)
    before = silo.state()
    with pytest.raises(StopIteration):
        seconds_per_step(silo, init_shared(120, 4, 0), partial(next, iter([1.0])))
    assert silo.state() == before


# --- sums that do not lean ------------------------------------------------------------------------


def test_every_round_has_the_same_probability() -> None:
    devices = 4000
    times = np.zeros(12)
    for device in range(devices):
        work = workload(device=device)
        times += [work.takes_part(number) for number in range(1, 13)]
    # 3 of 12 rounds: a share of 1/4, with a standard error of 0.007.
    assert times / devices == pytest.approx(np.full(12, 0.25), abs=0.03)


def test_weights_of_missed_rounds_add_up_to_those_of_a_device_that_misses_none() -> None:
    work = workload(steps=8)
    weights = [work.weight(100, 10**6) * work.takes_part(number) for number in range(1, 13)]
    assert sum(weights) == 100 * 12


def test_fewer_steps_are_the_first_of_all_steps() -> None:
    silo, shared = Silo(0, shoppers(), np.arange(100), CONFIG), init_shared(120, 4, 0)
    start = silo.state()

    def trained(steps: int | None) -> LocalUpdate:
        silo.restore(start)
        return silo.train(shared, 1, steps=steps)

    full = silo.full_steps
    everything = trained(None)
    for steps in (full, full + 1):
        assert all(map(np.array_equal, *map(_values, (everything, trained(steps)))))
    assert not all(map(np.array_equal, *map(_values, (everything, trained(full - 1)))))
    assert np.isfinite(trained(1).loss)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_step_at_all_is_refused(steps: int) -> None:
    silo = Silo(0, shoppers(), np.arange(100), CONFIG)
    with pytest.raises(DataError, match="steps"):
        silo.train(init_shared(120, 4, 0), 1, steps=steps)


@lru_cache
def _pull_of_strong_and_weak(gradient_descent: bool) -> tuple[float, float]:
    """How much a strong and an equally large weak silo of other tastes pull at the mean update.

    Each in parts of what it pulls at full strength; the weak one takes a quarter of its steps.
    """
    with pytest.MonkeyPatch.context() as patch:
        if gradient_descent:
            patch.setattr(torch.optim, "Adam", partial(_slow_descent, torch.optim.SGD))
        parts = partition_by_taste(shoppers(), 2, 0)
        silos = [Silo(index, shoppers(), users, CONFIG) for index, users in enumerate(parts)]
        shared = init_shared(120, 4, 0)
        for number in range(1, 4):  # Away from a start that knows no tastes.
            moves = [_values(silo.train(shared, number)) for silo in silos]
            shared = {
                name: (old + np.mean([move[place] for move in moves], axis=0)).astype(np.float32)
                for place, (name, old) in enumerate(shared.items())
            }
        full = [_mean_update(silo, shared, silo.full_steps) for silo in silos]
        partly = _mean_update(silos[1], shared, silos[1].full_steps // 4)
    both, *_ = np.linalg.lstsq(np.stack(full, axis=1), full[0] + partly, rcond=None)
    return float(both[0]), float(both[1]) * silos[1].full_steps / (silos[1].full_steps // 4)


def _slow_descent(sgd: Any, parameters: Any, lr: float) -> Any:  # noqa: ANN401
    return sgd(parameters, lr=lr / 2)


def _values(trained: LocalUpdate) -> list[npt.NDArray[np.float32]]:
    return list(trained.update.values())


def _mean_update(
    silo: Silo, shared: dict[str, npt.NDArray[np.float32]], steps: int
) -> npt.NDArray[np.float32]:
    """Mean over 12 draws of batches and negatives, from the same start."""
    start, moves = silo.state(), []
    for number in range(100, 112):
        silo.restore(start)
        moves.append(
            np.concatenate([v.ravel() for v in _values(silo.train(shared, number, steps=steps))])
        )
    silo.restore(start)
    return np.asarray(np.mean(moves, axis=0))


def test_with_gradient_descent_a_weighted_weak_silo_pulls_as_a_strong_one() -> None:
    strong, weak = _pull_of_strong_and_weak(True)
    assert strong == pytest.approx(1, abs=0.05)
    assert weak == pytest.approx(1, abs=0.1)


def test_with_adam_a_weighted_weak_silo_pulls_about_as_a_strong_one() -> None:
    strong, weak = _pull_of_strong_and_weak(False)
    assert strong == pytest.approx(1, abs=0.1)
    # Without its weight it would be a quarter of this.
    assert 0.7 < weak < 1.5
