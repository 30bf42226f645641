"""Stop criteria: what ends a task, from the record of its rounds alone."""

from __future__ import annotations

import math
from typing import Any

import pytest

from secagg.errors import ConfigurationError
from secagg_server.stopping import Outcome, Stop
from secagg_server.task_files import _Stop


def figures(*values: float | None) -> list[Outcome]:
    return [Outcome(number, value) for number, value in enumerate(values, 1)]


def changes(*values: float | None) -> list[Outcome]:
    return [Outcome(number, None, value) for number, value in enumerate(values, 1)]


FIGURE = Stop(2, figure="validation")
GAIN = Stop(2, figure="validation", least_gain=0.05)
CHANGE = Stop(3, least_change=0.01)
EITHER = Stop(2, least_change=0.01, figure="validation")


@pytest.mark.parametrize(
    ("stop", "outcomes", "said"),
    [
        (FIGURE, [], ""),
        (FIGURE, figures(0.1), ""),
        (FIGURE, figures(0.1, 0.1), ""),
        (FIGURE, figures(0.1, 0.1, 0.1), "above 0.1000, that of the model that round 1"),
        (FIGURE, figures(0.1, 0.3, 0.2, 0.2), "above 0.3000, that of the model that round 2"),
        (FIGURE, figures(0.1, 0.0, 0.2, 0.1), ""),
        (FIGURE, figures(0.0, 0.0, 0.0), "above 0.0000"),
        # Rounds that tell nothing count neither way.
        (FIGURE, figures(0.1, None, 0.1, None, None), ""),
        (FIGURE, figures(0.1, None, 0.1, None, 0.1), "in 2 rounds above 0.1000"),
        (FIGURE, figures(None, None, None, None), ""),
        (GAIN, figures(0.1, 0.14, 0.16), ""),  # above the best, which is 0.1
        (GAIN, figures(0.1, 0.14, 0.149), "above 0.1000"),
        (CHANGE, changes(0.001, 0.001), ""),
        (CHANGE, changes(0.5, 0.001, 0.009, 0.0), "less than 0.01 in 3 rounds"),
        (CHANGE, changes(0.001, 0.01, 0.001), ""),
        (CHANGE, changes(0.001, None, 0.001), ""),
        (CHANGE, changes(0.001, 0.001, 0.001, 0.2), ""),
        (EITHER, [Outcome(1, 0.1, 0.0), Outcome(2, 0.2, 0.0)], "less than 0.01 in 2 rounds"),
        (EITHER, [Outcome(n, 0.1, 0.5) for n in (1, 2, 3)], "did not rise"),
    ],
)
def test_a_task_ends_when_its_criteria_are_met_and_not_before(
    stop: Stop, outcomes: list[Outcome], said: str
) -> None:
    reason = stop.reason(outcomes)
    assert said in reason
    assert bool(said) == bool(reason)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"patience": 0, "figure": "f"}, "patience of 1"),
        ({"patience": 1_000_001, "figure": "f"}, "patience of 1"),
        ({"patience": 2}, "something to stop by"),
        ({"patience": 2, "least_gain": 0.1}, "something to stop by"),
        ({"patience": 2, "least_change": 0.1, "least_gain": 0.1}, "expected a figure"),
        ({"patience": 2, "least_change": -0.1}, "least_change"),
        ({"patience": 2, "least_change": 1.0}, "least_change"),
        ({"patience": 2, "least_change": math.nan}, "least_change"),
        ({"patience": 2, "figure": "f", "least_gain": math.nan}, "least_gain"),
        ({"patience": 2, "figure": "f", "least_gain": -0.1}, "least_gain"),
    ],
)
def test_criteria_that_cannot_be_met_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Stop(**options)


@pytest.mark.parametrize("stop", [FIGURE, GAIN, CHANGE, EITHER])
def test_criteria_come_back_from_the_wire(stop: Stop) -> None:
    assert Stop.from_wire(stop.to_wire()) == stop


def test_a_file_may_leave_the_figure_to_its_usual_name() -> None:
    section = _Stop(patience=3, most_users=100)
    assert section.stop() == Stop(3, figure="validation")
    assert section.segment() is not None
    assert _Stop(patience=3, least_change=0.1).segment() is None
