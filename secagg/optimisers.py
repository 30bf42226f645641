"""What a server does with the mean update: federated averaging, or an optimiser of its own.

To an optimiser, the clients' mean update is a (pseudo-)gradient that points downhill. It sees only
what was released, so that it costs no privacy and needs no trust. All arithmetic is in float64,
element by element: the same mean gives the same model on every machine.

Sources: McMahan et al. 2017 (average); Hsu, Qi and Brown 2019, "Measuring the Effects of
Non-Identical Data Distribution for Federated Visual Classification", section 3 (momentum, FedAvgM);
Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2 (FedAdagrad, FedAdam, FedYogi).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from secagg.errors import ConfigurationError, MalformedError, ReleaseError

__all__ = ["LEARNING_RATES", "Optimiser", "OptimiserState"]

_Vector = NDArray[np.float64]

OptimiserState = Mapping[str, _Vector]
"""What an optimiser remembers, by the letter that its paper has for it; never changed in place."""

LEARNING_RATES: Final[Mapping[str, float]] = {
    "average": 1.0,
    # Which makes the sum of what is remembered a mean; Hsu et al. have none, that is 1.
    "momentum": 0.1,
    "adagrad": 0.1,
    "adam": 0.1,
    "yogi": 0.1,
}
"""The optimisers, and the step that each takes unless it is told another one."""

_VALUE_BYTES = 8


@dataclass(frozen=True, slots=True)
class Optimiser:
    """A server optimiser; its defaults are those of the paper.

    Attributes:
        name: ``"average"`` (FedAvg), ``"momentum"`` (FedAvgM), ``"adagrad"``, ``"adam"`` or
            ``"yogi"``.
        learning_rate: above 0; the usual one of `LEARNING_RATES` when omitted. The papers tune it
            for every task; adaptive ones move a parameter by about this much in a round.
        beta1: decay of the momentum, 0 up to but without 1; unused by ``"average"``.
        beta2: decay of the squares, likewise; used by ``"adam"`` and ``"yogi"``.
        tau: how far an adaptive one adapts; above 0. Squares start from its square.
    """

    name: str = "average"
    learning_rate: float | None = None
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        if self.name not in LEARNING_RATES:
            raise ConfigurationError(
                f"expected an optimiser in {list(LEARNING_RATES)}; got name={self.name!r}"
            )
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", LEARNING_RATES[self.name])
        if not 0.0 < self.rate <= 1e6:
            raise ConfigurationError(
                "expected a learning_rate above 0, up to 1e6; got "
                f"learning_rate={self.learning_rate}; {LEARNING_RATES[self.name]} is usual for "
                f"{self.name!r}"
            )
        if not (0.0 <= self.beta1 < 1.0 and 0.0 <= self.beta2 < 1.0):
            raise ConfigurationError(
                f"expected beta1 and beta2 from 0, below 1; got beta1={self.beta1}, "
                f"beta2={self.beta2}; 0.9 and 0.99 are usual"
            )
        if not 1e-12 <= self.tau <= 1e6:
            raise ConfigurationError(
                f"expected tau from 1e-12 to 1e6; got tau={self.tau}; 1e-3 is usual"
            )

    @property
    def rate(self) -> float:
        """The learning rate."""
        return LEARNING_RATES[self.name] if self.learning_rate is None else self.learning_rate

    @property
    def remembers(self) -> tuple[str, ...]:
        """Names of the vectors that it keeps from round to round."""
        return {"average": (), "momentum": ("v",)}.get(self.name, ("m", "v"))

    @property
    def described(self) -> str:
        """Its name, and the numbers that it uses."""
        numbers = {"learning rate": self.rate}
        if self.name != "average":
            numbers["beta1"] = self.beta1
        if self.name in ("adam", "yogi"):
            numbers["beta2"] = self.beta2
        if self.name in _SQUARES:
            numbers["tau"] = self.tau
        return ", ".join([self.name, *(f"{name} {value:g}" for name, value in numbers.items())])

    def initial(self, size: int) -> OptimiserState:
        """What it remembers before the first round: no momentum, and squares of tau."""
        start = {"m": 0.0, "v": 0.0 if self.name == "momentum" else self.tau**2}
        return {name: np.full(size, start[name]) for name in self.remembers}

    def step(
        self, model: NDArray[np.float32], mean: _Vector, state: OptimiserState
    ) -> tuple[NDArray[np.float32], OptimiserState]:
        """The model after a round, and what is remembered for the next one.

        Args:
            model: float32 of shape (n,).
            mean: the mean update, float64 of shape (n,).
            state: of `initial`, or of the step before.

        Raises:
            ReleaseError: the model would not be finite.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            state = self._remembered(mean, state)
            direction = self._direction(mean, state)
            moved = model + (self.rate * direction).astype(np.float32)
        if not (np.isfinite(moved).all() and all(np.isfinite(v).all() for v in state.values())):
            raise ReleaseError(
                f"expected a finite model after a step of {self.name!r}; it is not; lower the "
                "learning rate of the task's optimiser"
            )
        return moved, state

    def _remembered(self, mean: _Vector, state: OptimiserState) -> OptimiserState:
        if self.name == "average":
            return state
        if self.name == "momentum":
            return {"v": self.beta1 * state["v"] + mean}
        momentum = self.beta1 * state["m"] + (1.0 - self.beta1) * mean
        return {"m": momentum, "v": _SQUARES[self.name](state["v"], mean * mean, self.beta2)}

    def _direction(self, mean: _Vector, state: OptimiserState) -> _Vector:
        if "m" in state:
            return state["m"] / (np.sqrt(state["v"]) + self.tau)
        return state.get("v", mean)

    def state_to_bytes(self, state: OptimiserState) -> bytes:
        """The state exactly, as little-endian float64: its vectors one after the other."""
        return b"".join(state[name].astype("<f8").tobytes() for name in self.remembers)

    def state_from_bytes(self, data: bytes, size: int) -> OptimiserState:
        """The inverse of :meth:`state_to_bytes`.

        Raises:
            MalformedError: not exactly the vectors of this optimiser for ``size`` parameters.
        """
        if len(data) != len(self.remembers) * size * _VALUE_BYTES:
            raise MalformedError(
                f"expected {len(self.remembers)} vectors of {size} float64 as the state of "
                f"{self.name!r}; got bytes={len(data)}"
            )
        vectors = np.frombuffer(data, dtype="<f8").reshape(len(self.remembers), size)
        return dict(zip(self.remembers, vectors.astype(np.float64), strict=True))


def _adagrad(squares: _Vector, square: _Vector, _decay: float) -> _Vector:
    return squares + square


def _adam(squares: _Vector, square: _Vector, decay: float) -> _Vector:
    return decay * squares + (1.0 - decay) * square


def _yogi(squares: _Vector, square: _Vector, decay: float) -> _Vector:
    return squares - (1.0 - decay) * square * np.sign(squares - square)


_SQUARES: Final[Mapping[str, Callable[[_Vector, _Vector, float], _Vector]]] = {
    "adagrad": _adagrad,
    "adam": _adam,
    "yogi": _yogi,
}
