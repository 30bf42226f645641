"""Server optimisers: their papers' formulas, torch where the two coincide, and exact state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from secagg.errors import ConfigurationError, MalformedError, ReleaseError
from secagg.optimisers import LEARNING_RATES, Optimiser

SIZE = 7
START = np.linspace(-1, 1, SIZE, dtype=np.float32)
MEANS = np.random.default_rng(0).normal(size=(3, SIZE)) / 20

_Vector = NDArray[np.float64]


def run(optimiser: Optimiser, means: _Vector) -> list[NDArray[np.float32]]:
    """The model after each round."""
    model, state, models = START, optimiser.initial(SIZE), []
    for mean in means:
        model, state = optimiser.step(model, mean, state)
        models.append(model)
    return models


def by_the_paper(name: str, eta: float, means: _Vector) -> list[list[float]]:
    """The papers' formulas on one parameter after the other, in Python's own floats."""
    b1, b2, tau = 0.9, 0.99, 1e-3
    columns = []
    for x, deltas in zip(START.tolist(), means.T.tolist(), strict=True):
        m, v, column = 0.0, 0.0 if name == "momentum" else tau**2, []
        for delta in deltas:
            if name == "average":
                x = x + eta * delta
            elif name == "momentum":
                v = b1 * v + delta
                x = x + eta * v
            else:
                m = b1 * m + (1 - b1) * delta
                if name == "adagrad":
                    v = v + delta**2
                elif name == "adam":
                    v = b2 * v + (1 - b2) * delta**2
                else:
                    v = v - (1 - b2) * delta**2 * math.copysign(1, v - delta**2)
                x = x + eta * m / (math.sqrt(v) + tau)
            column.append(x)
        columns.append(column)
    return np.array(columns).T.tolist()


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_every_step_is_that_of_the_paper(name: str) -> None:
    models = run(Optimiser(name, 0.05), MEANS)
    for model, wanted in zip(models, by_the_paper(name, 0.05, MEANS), strict=True):
        assert model.dtype == np.float32
        np.testing.assert_allclose(model, wanted, rtol=3e-7, atol=1e-7)


def test_averaging_adds_the_mean_bit_for_bit() -> None:
    (model,) = run(Optimiser(), MEANS[:1])
    np.testing.assert_array_equal(model, START + MEANS[0].astype(np.float32))


def torch_steps(kind: type[torch.optim.Optimizer], **options: float) -> list[_Vector]:
    """The same means as gradients that point uphill, by an optimiser of torch."""
    parameter = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimiser = kind([parameter], **options)  # type: ignore[call-arg]
    if kind is torch.optim.RMSprop:  # which starts its squares from zero
        optimiser.state[parameter] |= {
            "step": torch.tensor(0.0),
            "square_avg": torch.full((SIZE,), 1e-6, dtype=torch.float64),
        }
    models = []
    for mean in MEANS:
        parameter.grad = torch.tensor(-mean)
        optimiser.step()
        models.append(parameter.detach().numpy().copy())
    return models


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (Optimiser("average", 0.5), torch.optim.SGD, {"lr": 0.5}),
        (Optimiser("momentum", 0.5), torch.optim.SGD, {"lr": 0.5, "momentum": 0.9}),
        (
            Optimiser("adagrad", 0.05, beta1=0.0),
            torch.optim.Adagrad,
            {"lr": 0.05, "eps": 1e-3, "initial_accumulator_value": 1e-6},
        ),
        (
            Optimiser("adam", 0.05, beta1=0.0),
            torch.optim.RMSprop,
            {"lr": 0.05, "alpha": 0.99, "eps": 1e-3},
        ),
    ],
)
def test_torch_takes_the_same_steps_where_the_formulas_coincide(
    ours: Optimiser, theirs: type[torch.optim.Optimizer], options: dict[str, float]
) -> None:
    for one, other in zip(run(ours, MEANS), torch_steps(theirs, **options), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_adam_is_that_of_torch_once_its_bias_is_corrected_for() -> None:
    """What FedAdam leaves out is the correction, and where the squares start."""
    count, eta = 400, 0.01
    means = np.tile(MEANS[:1], (count, 1))
    ours = run(Optimiser("adam", eta), means)
    parameter = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.Adam([parameter], lr=eta, betas=(0.9, 0.99), eps=1e-3)
    steps = []
    for mean in means:
        before = parameter.detach().clone()
        parameter.grad = torch.tensor(-mean)
        theirs.step()
        steps.append((parameter.detach() - before).numpy())
    np.testing.assert_allclose(ours[-1] - ours[-2], steps[-1], rtol=0.02)


def test_yogi_takes_squares_back_no_faster_than_the_last_square() -> None:
    """Where they are above the new one, adam forgets by a factor and yogi by a difference."""
    states = {}
    for name in ("adam", "yogi"):
        optimiser = Optimiser(name)
        state = {"m": np.zeros(1), "v": np.ones(1)}
        _, states[name] = optimiser.step(np.zeros(1, np.float32), np.full(1, 0.1), state)
    assert states["adam"]["v"][0] == pytest.approx(0.99 + 0.01 * 0.01)
    assert states["yogi"]["v"][0] == pytest.approx(1 - 0.01 * 0.01)


@settings(deadline=None)
@given(st.sampled_from(list(LEARNING_RATES)), st.integers(1, 20), st.integers(0, 2**32))
def test_a_state_comes_back_from_its_bytes_and_goes_on_to_the_same_bits(
    name: str, size: int, seed: int
) -> None:
    optimiser, drawn = Optimiser(name), np.random.default_rng(seed)
    model, state = np.zeros(size, np.float32), optimiser.initial(size)
    for _ in range(3):
        data = optimiser.state_to_bytes(state)
        again = optimiser.state_from_bytes(data, size)
        mean = drawn.normal(size=size)
        restarted, _ = optimiser.step(model, mean, again)
        model, state = optimiser.step(model, mean, state)
        np.testing.assert_array_equal(model, restarted)
    assert len(data) == 8 * size * len(optimiser.remembers)


def test_a_step_changes_nothing_that_it_was_given() -> None:
    for name in LEARNING_RATES:
        optimiser = Optimiser(name)
        model, state = START.copy(), optimiser.initial(SIZE)
        kept = {key: value.copy() for key, value in state.items()}
        optimiser.step(model, MEANS[0], state)
        np.testing.assert_array_equal(model, START)
        for key, value in kept.items():
            np.testing.assert_array_equal(state[key], value)


@pytest.mark.parametrize(
    "data", [b"", bytes(8 * 2 * SIZE - 1), bytes(8 * 2 * SIZE + 8), bytes(8 * SIZE)]
)
def test_a_state_of_another_size_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedError, match="2 vectors of 7 float64"):
        Optimiser("adam").state_from_bytes(data, SIZE)


@pytest.mark.parametrize(
    ("name", "value"),
    [("average", 1e300), ("momentum", 1e308), ("adagrad", 1e200), ("adam", 1e200)],
)
def test_a_model_that_would_not_be_finite_is_refused(name: str, value: float) -> None:
    optimiser = Optimiser(name)
    state = {each: np.full(1, 1e308) for each in optimiser.remembers}
    with pytest.raises(ReleaseError, match="lower the learning rate"):
        optimiser.step(np.zeros(1, np.float32), np.full(1, value), state)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "sgd"}, "expected an optimiser in .*'sgd'"),
        ({"learning_rate": 0.0}, "learning_rate above 0"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": -0.1}, "beta2"),
        ({"beta2": math.nan}, "beta2"),
        ({"tau": 0.0}, "tau"),
        ({"tau": math.inf}, "tau"),
    ],
)
def test_an_optimiser_that_cannot_work_is_refused_by_its_name(
    options: dict[str, float], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Optimiser(**options)  # type: ignore[arg-type]
