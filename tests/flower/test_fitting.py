"""Strategies that need single updates are refused, and told why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Result

from secagg.errors import ConfigurationError
from secagg.flower.fitting import require_fitting

UNFIT: list[tuple[Callable[[], object], str]] = [
    (flower.FedMedian, "FedMedian, which picks or sorts single updates.*the norm check"),
    (flower.FedTrimmedAvg, "FedTrimmedAvg, which picks or sorts"),
    (flower.Krum, "picks or sorts single updates"),
    (flower.MultiKrum, "picks or sorts single updates"),
    (flower.Bulyan, "Bulyan, which picks or sorts"),
    (lambda: flower.QFedAvg(0.1), "weighs each update by its own loss.*train_loss"),
    (flower.FedXgbBagging, "a sum of trees is none"),
    (flower.FedXgbCyclic, "a sum of trees is none"),
    (
        lambda: flower.DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 3),
        "privacy=secagg.Privacy",
    ),
    (
        lambda: flower.DifferentialPrivacyClientSideFixedClipping(FedAvg(), 1.0, 1.0, 3),
        "privacy=secagg.Privacy",
    ),
    (
        lambda: flower.DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.1, 3),
        "privacy=secagg.Privacy",
    ),
    (
        lambda: flower.DifferentialPrivacyClientSideAdaptiveClipping(FedAvg(), 0.1, 3),
        "privacy=secagg.Privacy",
    ),
    (lambda: object(), "Message API.*got object"),
    (lambda: FedAvg, "got ABCMeta"),
]


@pytest.mark.parametrize(("make", "why"), UNFIT)
def test_what_needs_single_updates_is_refused(make: Callable[[], object], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        require_fitting(make())


def test_every_strategy_of_flower_is_known() -> None:
    """A later flwr that brings another one must make up its mind about it."""
    fitting = {"FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedProx", "FedYogi"}
    unfit = {
        "Bulyan",
        "DifferentialPrivacyClientSideAdaptiveClipping",
        "DifferentialPrivacyClientSideFixedClipping",
        "DifferentialPrivacyServerSideAdaptiveClipping",
        "DifferentialPrivacyServerSideFixedClipping",
        "FedMedian",
        "FedTrimmedAvg",
        "FedXgbBagging",
        "FedXgbCyclic",
        "Krum",
        "MultiKrum",
        "QFedAvg",
    }
    assert set(flower.__all__) == fitting | unfit | {"Result", "Strategy"}
    for name in fitting:
        assert require_fitting(getattr(flower, name)())


def test_a_start_of_its_own_would_not_be_called() -> None:
    class Saving(FedAvg):
        def start(self, *_: Any, **__: Any) -> Result:  # noqa: ANN401
            raise AssertionError("called")

    with pytest.raises(ConfigurationError, match="subclass of SecureAggregation"):
        require_fitting(Saving())
