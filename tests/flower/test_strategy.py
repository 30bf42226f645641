"""The wrapper: what reaches the inner strategy, and what becomes of missing nodes and sums."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import CLIENTS, Site, shared, shared_other
from flower_grids import (
    BOUNDS,
    NodeGrid,
    array_record,
    linear_app,
    poisoner,
    rounding,
    rounding_of,
    trained,
)
from flower_runs import Run
from flower_twin import clear_run
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedYogi,
    Strategy,
)

from secagg.accounting import noise_multiplier_for
from secagg.errors import (
    BudgetError,
    ConfigurationError,
    PlanError,
    ReleaseError,
    UnavailableError,
)
from secagg.flower import SecaggMod, secagg_mod
from secagg.flower.arrays import moved
from secagg.parameters import NormCheck, Privacy
from secagg_client.ledger import Fate, Ledger
from secagg_keyholder.policy import DEFAULT_ATTEMPTS
from secagg_server.embedded import EmbeddedRound, EmbeddedServer

FLOATS = ("layer.bias", "layer.weight")
RELEASE = Privacy("release", 1.0, 1.0, 1e-5)


def same(one: ArrayRecord, other: ArrayRecord) -> None:
    assert list(one) == list(other)
    for key, array in one.items():
        np.testing.assert_array_equal(array.numpy(), other[key].numpy(), strict=True)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the wrapper and the mods have said."""
    return [each.getMessage() for each in caplog.records if "secagg:" in each.getMessage()]


def newest(running: Site, run: Run) -> tuple[int, int]:
    """Round and attempt that the key holder opened last for a run's training."""
    found = running.held._ledger.current(run.task_id)
    assert found is not None
    assert found.state != "OPEN", "every round comes to an end"
    return found.id.round_number, found.id.attempt


def silence(grid: NodeGrid, *partitions: set[int]) -> None:
    """Who does not answer, each time that anything is sent; everybody does afterwards."""
    due, plain = iter(partitions), grid.send_and_receive

    def send(messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        if messages := list(messages):
            grid.silent = next(due, set())
        return plain(messages, timeout=timeout)

    grid.send_and_receive = send  # type: ignore[method-assign]


def test_every_sum_is_that_of_the_same_app_in_the_clear(run: Run) -> None:
    strategy = run.strategy(metrics=BOUNDS)
    result = strategy.start(run.grid(), array_record(), 3)
    sums, arrays = clear_run(
        lambda mod: linear_app([mod]),
        FedAvg(fraction_evaluate=0.0),
        array_record(),
        rounds=3,
        nodes=4,
        plan=strategy.releases[1].plan,
        task_id=run.task_id,
        rounding=rounding,
        bounds=BOUNDS,
    )
    assert strategy.sums == sums
    assert len(set(sums.values())) == 3
    assert strategy.contributors == dict.fromkeys((1, 2, 3), 4)
    for key in FLOATS:
        np.testing.assert_array_equal(arrays[key].numpy(), result.arrays[key].numpy())


def test_the_model_moves_by_the_weighted_mean_and_the_metrics_are_the_weighted_means(
    run: Run,
) -> None:
    strategy = run.strategy(metrics=BOUNDS, bits=14, weight_cap=102)
    result = strategy.start(run.grid(), array_record(), 1)
    weights = np.array([100, 101, 102, 102]) / 102  # of 103 examples, one is above the cap
    start = array_record()["layer.weight"].numpy()
    moves = [
        trained(index, array_record()).array_records["arrays"]["layer.weight"].numpy() - start
        for index in range(4)
    ]
    wanted = start + np.average(moves, axis=0, weights=weights)
    found = result.arrays["layer.weight"].numpy()
    np.testing.assert_allclose(found, wanted, atol=4 * 1.5 * 2 / (1 << 13))
    loss = result.train_metrics_clientapp[1]["train_loss"]
    losses = [1.5 + index / 8 for index in range(4)]
    assert loss == pytest.approx(np.average(losses, weights=weights), abs=1e-5)


def test_equal_weights_need_no_number_of_examples(run: Run) -> None:
    def train(partition: int, received: ArrayRecord) -> RecordDict:
        reply = trained(partition, received)
        del reply["metrics"]
        return reply

    strategy = run.strategy(weighting="equal")
    result = strategy.start(run.grid(train), array_record(), 1)
    assert strategy.contributors == {1: 4}
    assert strategy.releases[1].weight() == 4
    assert not np.array_equal(
        result.arrays["layer.bias"].numpy(), array_record()["layer.bias"].numpy()
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_arrays_come_back_as_wide_as_they_were_and_counters_stay(run: Run, dtype: str) -> None:
    result = run.strategy().start(run.grid(), array_record(dtype), 2)
    before = array_record(dtype)
    assert [array.dtype for array in result.arrays.values()] == [a.dtype for a in before.values()]
    assert result.arrays["norm.batches"].numpy() == 7
    assert result.arrays["norm.empty"].numpy().shape == (0, 3)
    assert not np.array_equal(result.arrays["layer.weight"].numpy(), before["layer.weight"].numpy())


OPTIMISERS: dict[str, Callable[[], Strategy]] = {
    "FedAvg": lambda: FedAvg(fraction_evaluate=0.0),
    "FedProx": lambda: FedProx(fraction_evaluate=0.0, proximal_mu=0.1),
    "FedAvgM": lambda: FedAvgM(
        fraction_evaluate=0.0, server_learning_rate=0.5, server_momentum=0.9
    ),
    "FedAdam": lambda: FedAdam(fraction_evaluate=0.0),
    "FedYogi": lambda: FedYogi(fraction_evaluate=0.0),
    "FedAdagrad": lambda: FedAdagrad(fraction_evaluate=0.0),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_server_optimiser_does_what_it_does_with_the_plain_mean(run: Run, name: str) -> None:
    strategy = run.strategy(OPTIMISERS[name]())
    result = strategy.start(run.grid(), array_record(), 2)
    plain, grid = OPTIMISERS[name](), run.grid()
    model = array_record()
    for number in (1, 2):
        (first, *_) = plain.configure_train(number, model, ConfigRecord(), grid)
        mean = moved(model, strategy.releases[number].mean())
        content = RecordDict({"a": mean, "m": MetricRecord({"num-examples": 9})})
        arrays, _ = plain.aggregate_train(number, [Message(content, reply_to=first)])
        assert arrays is not None
        model = ArrayRecord(
            {
                key: Array(array.numpy().astype(model[key].dtype)) if key in FLOATS else model[key]
                for key, array in arrays.items()
            }
        )
    same(result.arrays, model)


def test_records_and_weights_may_have_other_names(run: Run) -> None:
    def train(partition: int, received: ArrayRecord) -> RecordDict:
        reply = trained(partition, received)
        loss = MetricRecord({"train_loss": 2.0, "rows": 30})
        return RecordDict({"what": reply.array_records["arrays"], "ever": loss})

    inner = FedAvg(
        fraction_evaluate=0.0, arrayrecord_key="net", configrecord_key="c", weighted_by_key="rows"
    )
    strategy = run.strategy(inner, metrics=BOUNDS)
    result = strategy.start(run.grid(train), array_record(), 1)
    assert strategy.contributors == {1: 4}
    assert result.train_metrics_clientapp[1] == {"train_loss": pytest.approx(2.0, abs=1e-3)}


def test_names_that_no_plan_may_have_are_numbered(run: Run) -> None:
    model = ArrayRecord({"dense 1:kernel": array_record()["layer.weight"], "b": Array(np.ones(3))})
    strategy = run.strategy()
    result = strategy.start(run.grid(), model, 1)
    assert list(strategy.releases[1].mean()) == ["0000", "0001"]
    assert result.arrays["dense 1:kernel"].shape == (8, 5)
    assert not np.array_equal(result.arrays["b"].numpy(), np.ones(3))


def test_who_drops_out_or_does_not_answer_is_counted_and_not_named(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    def train(partition: int, received: ArrayRecord) -> RecordDict:
        if partition == 3:
            raise RuntimeError("the file of patient-77 is gone")
        return trained(partition, received)

    strategy = run.strategy()
    with caplog.at_level(logging.INFO):
        strategy.start(run.grid(train), array_record(), 1)
    assert strategy.refused == {1: {"CLIENT_APP_RAISED_EXCEPTION": 1}}
    (line,) = [line for line in logged(caplog) if "round 1:" in line]
    assert line == (
        "secagg: round 1: 3 contributors, 1 refused (CLIENT_APP_RAISED_EXCEPTION: 1), "
        f"sha256={strategy.sums[1]}"
    )
    for said in logged(caplog):
        assert not any(word in said for word in (*CLIENTS, "1003", "patient-77"))


def test_a_round_with_too_few_is_skipped_and_the_next_one_goes_on(
    run: Run, running: Site, caplog: pytest.LogCaptureFixture
) -> None:
    strategy, grid = run.strategy(), run.grid()
    silence(grid, set(), {0, 1}, set(), {2})
    result = strategy.start(grid, array_record(), 3)
    assert strategy.contributors == {2: 4, 3: 3}
    assert strategy.refused == {1: {"NO_REPLY": 2}, 2: {}, 3: {"NO_REPLY": 1}}
    said = [line for line in logged(caplog) if "skipped" in line]
    assert said == [
        "secagg: round 1 skipped: QUORUM_NOT_REACHED: expected at least min_clients=3 accepted "
        "uploads at the deadline; got 2; a longer deadline or more clients would help (NO_REPLY: 2)"
        "; the model stays as it is"
    ]
    # The attempt that failed counts for nothing: the next one has the same number.
    assert newest(running, run) == (2, 1)
    assert result.arrays


def test_the_model_stays_where_no_round_came_about(run: Run) -> None:
    strategy, grid = run.strategy(), run.grid()
    grid.silent = {0, 1, 2, 3}
    same(strategy.start(grid, array_record(), 2).arrays, array_record())
    assert strategy.sums == {}


def test_too_few_nodes_are_not_even_asked(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    class Two(FedAvg):
        def configure_train(self, *given: Any) -> list[Message]:  # noqa: ANN401
            return list(super().configure_train(*given))[:2]

    grid = run.grid()
    run.strategy(Two(fraction_evaluate=0.0)).start(grid, array_record(), 1)
    assert grid.asked == []
    assert "nodes to offer a round to; got 2" in logged(caplog)[-1]


def test_a_key_holder_that_is_away_costs_rounds_and_nothing_else(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = run.strategy()
    opened = strategy.server.open

    def away(*given: Any, **named: Any) -> Any:  # noqa: ANN401
        monkeypatch.setattr(strategy.server, "open", opened)
        raise UnavailableError("nobody there")

    monkeypatch.setattr(strategy.server, "open", away)
    strategy.start(run.grid(), array_record(), 2)
    assert list(strategy.sums) == [2]
    assert any("round 1 skipped: UNAVAILABLE: nobody there" in line for line in logged(caplog))


def test_the_least_numbers_of_nodes_are_those_of_a_sum(run: Run) -> None:
    inner = FedAvg(fraction_train=0.5, fraction_evaluate=0.0, min_available_nodes=9)
    run.strategy(inner, max_clients=5, min_clients=4).close()
    assert (inner.min_train_nodes, inner.min_available_nodes, inner.min_evaluate_nodes) == (4, 9, 0)


@pytest.mark.parametrize("beside", [False, True], ids=["in its place", "beside it"])
def test_plaintext_in_place_of_a_ciphertext_or_beside_it_is_dropped(run: Run, beside: bool) -> None:
    grid = run.grid()

    def plaintext(partition: int, reply: Message) -> Message:
        if partition == 2:
            kept = dict(reply.content) if beside else {}
            reply.content = RecordDict({**kept, **trained(2, array_record())})
        return reply

    grid.change = plaintext
    strategy = run.strategy()
    strategy.start(grid, array_record(), 1)
    assert strategy.refused == {1: {"MALFORMED": 1}}
    assert strategy.contributors == {1: 3}


def test_who_is_not_enrolled_and_who_answers_for_another_are_left_out(run: Run) -> None:
    strategy, grid = run.strategy(norm_check=NormCheck()), run.grid(nodes=5)
    stranger, double = list(grid.contexts.values())[-2:]
    stranger.node_config["secagg-kit"] = str(shared_other().kit("dave"))
    double.node_config["secagg-kit"] = str(shared().kit("alice"))
    strategy.start(grid, array_record(), 1)
    assert strategy.contributors == {1: 3}
    assert strategy.refused == {1: {"NOT_ENROLLED": 1, "DUPLICATE_UPLOAD": 1}}


def test_the_key_holder_is_called_once_nodes_have_answered(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A simulation forks while it starts, and a fork beside a gRPC connection may abort."""
    strategy, grid = run.strategy(), run.grid()
    answered: list[int] = []
    connected = EmbeddedServer.__init__

    def connect(self: EmbeddedServer, *given: Any) -> None:  # noqa: ANN401
        answered.append(len(grid.replies))
        connected(self, *given)

    monkeypatch.setattr(EmbeddedServer, "__init__", connect)
    strategy.start(grid, array_record(), 1)
    assert answered == [4]


def test_nodes_are_greeted_once(run: Run) -> None:
    strategy, grid = run.strategy(norm_check=NormCheck()), run.grid()
    strategy.start(grid, array_record(), 2)
    hellos = [m for m in grid.asked if "arrays" not in m.content]
    assert len(hellos) == 4
    assert len(grid.asked) == 4 + 2 * 4


def test_evaluation_is_in_plaintext_unless_it_is_asked_for_and_says_so_once(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    strategy, grid = run.strategy(FedAvg()), run.grid()
    result = strategy.start(grid, array_record(), 2)
    weights = [10, 20, 30, 40]
    wanted = np.average([0, 0.1, 0.2, 0.3], weights=weights)
    assert result.evaluate_metrics_clientapp[2]["accuracy"] == pytest.approx(wanted)
    assert sum("in plaintext" in line for line in logged(caplog)) == 1


def test_evaluation_metrics_are_summed_encrypted(run: Run) -> None:
    strategy, grid = run.strategy(FedAvg(), evaluate_metrics={"accuracy": 1.0}), run.grid()
    result = strategy.start(grid, array_record(), 2)
    wanted = np.average([0, 0.1, 0.2, 0.3], weights=[10, 20, 30, 40])
    for number in (1, 2):
        found = result.evaluate_metrics_clientapp[number]
        assert found == {"accuracy": pytest.approx(wanted, abs=1e-4)}
    names = {
        name for reply in grid.replies for name in (b"accuracy", b"num-examples") if name in reply
    }
    assert names == set()


def test_an_evaluation_with_too_few_gives_no_metrics(run: Run) -> None:
    grid = run.grid()
    grid.silent = {0, 1}
    strategy = run.strategy(FedAvg(), evaluate_metrics={"accuracy": 1.0})
    assert strategy.start(grid, array_record(), 1).evaluate_metrics_clientapp == {}


def test_a_spent_budget_ends_the_rounds_and_the_run_ends_as_any_other(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    noise = noise_multiplier_for(4.0, 1e-5, releases=2)
    privacy = Privacy("release", noise, 4.0, 1e-5)
    strategy, grid = run.strategy(privacy=privacy, bits=12), run.grid()
    with caplog.at_level(logging.INFO):
        result = strategy.start(grid, array_record(), 4)
    assert list(strategy.sums) == [1, 2]
    assert len(grid.asked) == 4 + 2 * 4
    assert sum("no more rounds: BUDGET_SPENT" in line for line in logged(caplog)) == 1
    # What the key holder has added is there: one step of the clip norm is far below it.
    found = strategy.releases[1].mean()["layer.weight"]
    start = array_record()["layer.weight"].numpy()
    moves = [
        trained(index, array_record()).array_records["arrays"]["layer.weight"].numpy() - start
        for index in range(4)
    ]
    assert np.std(found - np.mean(moves, axis=0)) > 0.01
    assert result.arrays


def test_noise_in_shares_is_in_the_sum_and_an_attempt_that_failed_costs_nothing(run: Run) -> None:
    noise = noise_multiplier_for(2.0, 1e-5, releases=1)
    privacy = Privacy("distributed", noise, 2.0, 1e-5)
    strategy = run.strategy(privacy=privacy, norm_check="auto", metrics=BOUNDS, bits=10)
    grid = run.grid(mods=[secagg_mod])
    silence(grid, set(), {0, 1})  # greeted, and then gone
    result = strategy.start(grid, array_record(), 3)
    assert strategy.contributors == {2: 4}
    plan = strategy.releases[2].plan
    assert plan.privacy is not None
    assert (plan.privacy.by_clients, plan.norm_check) == (True, NormCheck(margin=0.3))
    assert [segment.name for segment in plan.segments] == ["update", "metrics"]
    # The noise of one client alone is many steps: what the four have sent is not there to see.
    assert np.std(strategy.releases[2].sums[0]) > plan.noise_stds[0] > 100
    assert set(result.train_metrics_clientapp[2]) == {"train_loss"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"privacy": Privacy("release", 1, 1, 1e-5), "evaluate_metrics": {"a": 1}},
            "evaluate_privacy",
        ),
        ({"metrics": {"num-examples": 3.0}}, "which is the weight"),
        ({"metrics": {"train_loss": 0.0}}, "a bound above 0"),
        ({"metrics": {"train_loss": float("inf")}}, "a bound above 0"),
    ],
)
def test_options_that_can_never_work_are_refused(run: Run, options: Any, match: str) -> None:  # noqa: ANN401
    with pytest.raises(ConfigurationError, match=match):
        run.strategy(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"clip": 0.0}, "clip norm"),
        ({"bits": 40}, "bits"),
        ({"min_clients": 2}, "min_clients of 3"),
        ({"min_clients": 4, "max_clients": 3}, "max_clients"),
        ({"weighting": "samples", "privacy": RELEASE}, 'weighting="equal"'),
    ],
)
def test_plans_that_cannot_be_end_the_run(run: Run, options: Any, match: str) -> None:  # noqa: ANN401
    with pytest.raises(PlanError, match=match):
        run.strategy(**options).start(run.grid(), array_record(), 1)


def test_a_strategy_that_sends_different_models_is_refused(run: Run) -> None:
    class Different(FedAvg):
        def configure_train(self, *given: Any) -> list[Message]:  # noqa: ANN401
            messages = list(super().configure_train(*given))
            messages[1].content = RecordDict(
                {**messages[1].content, "arrays": array_record("float64")}
            )
            return messages

    with pytest.raises(ConfigurationError, match="the same model for all"):
        run.strategy(Different(fraction_evaluate=0.0)).start(run.grid(), array_record(), 1)


def test_poison_is_refused_and_its_node_is_told_and_checks_it(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = run.strategy(norm_check="auto", clip=0.2)
    grid = run.grid(mods=[poisoner([3]), SecaggMod(rounding_of)], state=tmp_path)
    strategy.start(grid, array_record(), 2)
    assert strategy.refused == {number: {"NORM_REFUSED": 1} for number in (1, 2)}
    assert strategy.contributors == {1: 3, 2: 3}
    # 4 hellos, 2 rounds of 4, and a farewell to the 4 of whom each keeps its upload.
    assert len(grid.asked) == 4 + 8 + 4
    refusals = [line for line in logged(caplog) if "was refused by the norm check" in line]
    assert refusals == [
        f"secagg: the update of round {number} was refused by the norm check" for number in (1, 2)
    ]
    assert not any("cannot be checked" in line for line in logged(caplog))
    fates = {
        index: {entry.fate for entry in Ledger(tmp_path / str(index)).entries()}
        for index in range(4)
    }
    assert fates == {0: {Fate.SENT}, 1: {Fate.SENT}, 2: {Fate.SENT}, 3: {Fate.REFUSED}}


def test_a_round_that_poison_has_left_too_small_says_so(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = run.strategy(norm_check="auto", clip=0.2, min_clients=4)
    grid = run.grid(mods=[poisoner([3]), SecaggMod(rounding_of)])
    strategy.start(grid, array_record(), 1)
    assert strategy.refused == {1: {"NORM_REFUSED": 1}}
    assert strategy.contributors == {}
    assert any("(NORM_REFUSED: 1)" in line for line in logged(caplog) if "skipped" in line)


def test_a_strategy_may_be_started_again(run: Run) -> None:
    strategy, grid = run.strategy(), run.grid()
    first = strategy.start(grid, array_record(), 1)
    names = dict(strategy.sums)
    strategy.start(grid, first.arrays, 1)
    assert strategy.sums != names


def test_a_budget_without_room_for_one_round_is_an_error(run: Run) -> None:
    with pytest.raises(BudgetError, match="0 spent by 0 releases"):
        run.strategy(privacy=RELEASE).start(run.grid(), array_record(), 1)


def test_a_record_of_our_name_is_refused(run: Run) -> None:
    strategy = run.strategy(FedAvg(fraction_evaluate=0.0, configrecord_key="secagg"))
    with pytest.raises(ConfigurationError, match="a record 'secagg'"):
        strategy.start(run.grid(), array_record(), 1)


def test_after_a_sum_that_did_not_open_the_next_round_has_the_next_number(
    run: Run, running: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    concluded = EmbeddedRound.conclude

    def void(self: EmbeddedRound) -> Any:  # noqa: ANN401
        monkeypatch.setattr(EmbeddedRound, "conclude", concluded)
        self.abandon()
        raise ReleaseError("it does not open")

    monkeypatch.setattr(EmbeddedRound, "conclude", void)
    strategy = run.strategy()
    strategy.start(run.grid(), array_record(), 2)
    assert list(strategy.sums) == [2]
    assert newest(running, run) == (2, 1)


def test_attempts_on_one_model_are_used_up_and_those_at_an_evaluation_are_not(
    run: Run, running: Site, caplog: pytest.LogCaptureFixture
) -> None:
    training, evaluation = run.grid(), run.grid()
    for grid in (training, evaluation):
        silence(grid, set(), *[{0, 1}] * DEFAULT_ATTEMPTS)
    trains = run.strategy()
    trains.start(training, array_record(), DEFAULT_ATTEMPTS + 2)
    assert trains.sums == {}
    assert sum("skipped: ROUND_CLOSED" in line for line in logged(caplog)) == 2
    evaluates = run.strategy(FedAvg(fraction_train=0.0), evaluate_metrics={"accuracy": 1.0})
    result = evaluates.start(evaluation, array_record(), DEFAULT_ATTEMPTS + 1)
    assert list(result.evaluate_metrics_clientapp) == [DEFAULT_ATTEMPTS + 1]


def test_an_exception_in_between_leaves_no_round_open(
    run: Run, running: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = run.grid()
    plain = grid.send_and_receive

    def broken(messages: Iterable[Message], **_: Any) -> Iterable[Message]:  # noqa: ANN401
        messages = list(messages)
        if any("arrays" in message.content for message in messages):
            raise ConnectionError("the link is down")
        return plain(messages)

    monkeypatch.setattr(grid, "send_and_receive", broken)
    with pytest.raises(ConnectionError):
        run.strategy().start(grid, array_record(), 1)
    assert newest(running, run) == (1, 1)


def test_a_node_that_has_got_another_key_is_greeted_again(run: Run) -> None:
    strategy, grid = run.strategy(norm_check=NormCheck()), run.grid(nodes=3)
    (first, *_) = grid.contexts.values()
    arrays = strategy.start(grid, array_record(), 1).arrays
    first.node_config["secagg-kit"] = str(shared().kit("dave"))
    strategy.start(grid, arrays, 2)
    assert strategy.contributors == {1: 3, 2: 3}
    assert strategy.refused == {1: {"INVALID_RECEIPT": 1}, 2: {}}
