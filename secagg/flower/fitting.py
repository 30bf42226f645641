"""Which strategies work on a mean alone, and what to do instead of those that do not."""

from __future__ import annotations

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from secagg.errors import ConfigurationError

__all__ = ["require_fitting"]

_ROBUST = (
    "picks or sorts single updates, which nobody sees here",
    "use FedAvg, and the norm check (on by default), which refuses updates beyond the clip norm",
)
_NOISE = (
    "clips single updates or adds noise for a number of replies, and it gets one mean",
    "wrap the plain strategy and pass privacy=secagg.Privacy(...), whose noise the key holder or "
    "the clients add",
)
_TREES = (
    "puts clients' trees together, and a sum of trees is none",
    "keep it as it is, or train a model of float arrays",
)

_UNFIT: dict[type[Strategy], tuple[str, str]] = {
    flower.FedMedian: _ROBUST,
    flower.FedTrimmedAvg: _ROBUST,
    flower.MultiKrum: _ROBUST,  # Krum is one of these
    flower.Bulyan: _ROBUST,
    flower.QFedAvg: (
        "weighs each update by its own loss, which nobody sees here",
        'use FedAvg; metrics={"train_loss": BOUND} gives the mean loss',
    ),
    flower.FedXgbBagging: _TREES,
    flower.FedXgbCyclic: _TREES,
    flower.DifferentialPrivacyServerSideFixedClipping: _NOISE,
    flower.DifferentialPrivacyServerSideAdaptiveClipping: _NOISE,
    flower.DifferentialPrivacyClientSideFixedClipping: _NOISE,
    flower.DifferentialPrivacyClientSideAdaptiveClipping: _NOISE,
}


def require_fitting(strategy: object) -> Strategy:
    """The strategy itself, if it makes sense of one reply that is the mean of all.

    A strategy of your own is taken at its word: it gets one reply a round.

    Raises:
        ConfigurationError: it does not; says why, and what to use instead.
    """
    if not isinstance(strategy, Strategy):
        raise ConfigurationError(
            "expected a strategy of Flower's Message API, flwr.serverapp.strategy.Strategy; got "
            f"{type(strategy).__name__}; those of flwr.server.strategy have a successor of the "
            "same name there"
        )
    for kind, (why, instead) in _UNFIT.items():
        if isinstance(strategy, kind):
            raise ConfigurationError(
                f"expected a strategy that needs the mean of the updates alone; got {kind.__name__}"
                f", which {why}; {instead}"
            )
    if type(strategy).start is not Strategy.start:
        raise ConfigurationError(
            f"expected a strategy that leaves start() to Flower; {type(strategy).__name__} has its "
            "own, which would not be called; put it into a subclass of SecureAggregation"
        )
    return strategy
