"""The ServerApp's side: a strategy whose replies are ciphertexts, around one that sees their mean.

Whom to ask, and what to do with the mean, is the inner strategy's business; it gets a single reply
a round: the model moved by the mean of the updates, the means of the metrics, and the summed
weight. In between, a round is opened at the key holder, offered to each node, and its sum opened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Literal

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from secagg.certificates import Kit, Role
from secagg.enrolment import EnrolmentFile
from secagg.errors import (
    BudgetError,
    ConfigurationError,
    QuorumError,
    ReleaseError,
    RoundError,
    SecaggError,
    UploadError,
)
from secagg.flower.arrays import as_received, moved, tensors_of
from secagg.flower.envelopes import RECORD, Instruction
from secagg.flower.fitting import require_fitting
from secagg.flower.metrics import Metrics
from secagg.flower.mod import task_of
from secagg.flower.nodes import Nodes
from secagg.flower.plans import UPDATE, Terms
from secagg.flower.rounds import TaskRounds
from secagg.flower.settings import server_settings
from secagg.parameters import MIN_COHORT, NormCheck, Plan, Privacy, Weighting
from secagg.quantize import Update
from secagg.release import Release
from secagg_server.embedded import EmbeddedServer

__all__ = ["SecureAggregation"]

_EXAMPLES = "num-examples"  # Flower's own default
_FAREWELL_S = 30.0  # what a run waits for at its end, to have the last verdicts checked
_LOG = logging.getLogger("flwr")


class SecureAggregation(Strategy):
    """Flower's strategies on encrypted updates.

    Args:
        strategy: one of Flower's that needs the mean of the updates alone, such as `FedAvg`,
            `FedProx`, `FedAvgM`, `FedAdam`, `FedYogi` or `FedAdagrad`; or one of your own. Its
            least numbers of nodes are raised to ``min_clients``.
        context: the ServerApp's; says where kit and key holder are, see `settings`.
        clip: L2 norm, in model units, to which a larger update (trained - received, over all
            arrays of floats) is scaled down.
        bits: of one quantised value, 2 to 16.
        max_clients: most nodes in one sum; all clients that are enrolled now when omitted.
        min_clients: fewest nodes whose sum is opened, 3 or more; a round with fewer is skipped.
        weighting: ``"samples"`` (the default) weighs by number of examples, encrypted;
            ``"equal"`` (the default with privacy) counts every node once.
        weight_cap: examples beyond which a node gains no more weight. Of nodes with far fewer,
            the updates are rounded more coarsely.
        norm_check: what updates must pass before they are summed; by default `NormCheck`, with the
            margin that privacy asks for; None for nothing.
        privacy: noise and budget of the model and the training metrics. Once the budget is spent,
            no more rounds are scheduled.
        metrics: largest magnitude by name of the training metrics that are averaged, encrypted.
            No others leave a node.
        evaluate_metrics: the same for evaluation, which then is an encrypted round of its own. If
            omitted, evaluation metrics travel in plaintext, as Flower sends them.
        evaluate_privacy: noise and budget of these; with privacy, they must have one.

    Attributes:
        sums: SHA-256 of the opened sums, in hexadecimal, by Flower's number of the training round.
        contributors: nodes in the sum, by round.
        refused: nodes that were asked and are not in it, by round, counted by reason.
        releases: the opened sums themselves, by round.

    Raises:
        ConfigurationError: a strategy or a setting that can never work; says why.
        IdentityError: the server's kit cannot be used; see `Kit.load`.
    """

    def __init__(
        self,
        strategy: Strategy,
        context: Context,
        *,
        clip: float,
        bits: int = 8,
        max_clients: int | None = None,
        min_clients: int = MIN_COHORT,
        weighting: Weighting | None = None,
        weight_cap: int = 1000,
        norm_check: NormCheck | Literal["auto"] | None = "auto",
        privacy: Privacy | None = None,
        metrics: Mapping[str, float] | None = None,
        evaluate_metrics: Mapping[str, float] | None = None,
        evaluate_privacy: Privacy | None = None,
    ) -> None:
        super().__init__()
        self._inner = require_fitting(strategy)
        if privacy and evaluate_metrics and not evaluate_privacy:
            raise ConfigurationError(
                "expected evaluate_privacy with evaluate_metrics, because privacy covers the model "
                "and the training metrics alone; give it a budget of its own"
            )
        weighting = weighting or ("equal" if privacy else "samples")
        weighted = weighting == "samples"
        averaged = Metrics(metrics or {}, weighted)
        self._evaluation = Metrics(evaluate_metrics or {}, weighted and not evaluate_privacy)
        self._evaluate_privacy = evaluate_privacy
        self._examples: str = getattr(strategy, "weighted_by_key", _EXAMPLES)
        if self._examples in {**averaged.bounds, **self._evaluation.bounds}:
            raise ConfigurationError(
                f"expected metrics other than {self._examples!r}, which is the weight of all of "
                "them; leave it out"
            )
        self._train = TaskRounds(task_of(context.run_id, training=True))
        self._evaluate = TaskRounds(task_of(context.run_id, training=False))
        self._nodes = Nodes()
        settings = server_settings(context)
        self._kit, self._key_holder = Kit.load(settings.kit, Role.SERVER), settings.key_holder
        self._roster = EnrolmentFile(self._kit.file("enrolment.json"), self._kit.ca)
        self._server: EmbeddedServer | None = None
        self._training_over = self._evaluation_over = self._warned = False
        self._model, self._key = ArrayRecord(), ""
        self._asked: dict[TaskRounds, Message] = {}  # one of the messages of each task's round
        self._timeout = 3600.0
        self.sums: dict[int, str] = {}
        self.contributors: dict[int, int] = {}
        self.refused: dict[int, dict[str, int]] = {}
        self.releases: dict[int, Release] = {}
        self._terms = Terms(
            clip,
            bits,
            min_clients,
            max_clients or max(MIN_COHORT, len(self._roster.active())),
            weighting,
            weight_cap if weighted else 1,
            norm_check,
            privacy,
            averaged,
        )
        self._raise_least_nodes()

    @property
    def server(self) -> EmbeddedServer:
        """The connection to the key holder: made for the first round, and anew after `close`."""
        if self._server is None:
            self._server = EmbeddedServer(self._key_holder, self._kit, self._roster)
        return self._server

    def close(self) -> None:
        """Give up what is open, and close the connection."""
        self._train.abandon()
        self._evaluate.abandon()
        if self._server is not None:
            self._server.close()
            self._server = None

    def summary(self) -> None:
        """Log the settings, and the inner strategy's."""
        terms, privacy = self._terms, self._terms.privacy
        budget = f"{privacy.mode}, epsilon {privacy.epsilon:g}" if privacy else "none"
        _LOG.info("\t├──> Secure aggregation:")
        _LOG.info("\t│\t├── Clients: %d to %d", terms.min_clients, terms.max_clients)
        _LOG.info("\t│\t├── Clip norm: %g | bits: %d", terms.clip, terms.bits)
        _LOG.info("\t│\t├── Weighting: %s, up to %d", terms.weighting, terms.weight_cap)
        _LOG.info("\t│\t├── Privacy: %s", budget)
        _LOG.info("\t│\t└── Metrics: %s", ", ".join(sorted(terms.metrics.bounds)) or "none")
        self._inner.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds; see `Strategy.start`. Where none came about, the arrays are the first."""
        self._timeout = timeout
        try:
            result = super().start(
                grid,
                initial_arrays,
                num_rounds,
                timeout,
                train_config,
                evaluate_config,
                evaluate_fn,
            )
            self._farewell(grid)
        finally:
            self.close()
        if not result.arrays:
            result.arrays = initial_arrays
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages, each with the offer of an encrypted round."""
        self._train.abandon()
        if self._training_over:
            return []
        messages = list(self._inner.configure_train(server_round, arrays, config, grid))
        if not messages:
            return []
        self._key, self._model = _model_of(messages, self._inner)
        tensors = tensors_of(self._model)
        plan = self._terms.training(tensors)
        instruction = self._instruction(self._terms.metrics, self._key)
        try:
            return self._offered(self._train, plan, tensors, messages, instruction, grid)
        except BudgetError as error:
            if not self._train.begun:
                raise  # there never was a budget for a single round
            self._training_over = True
            _LOG.info("secagg: no more rounds: %s: %s", error.reason, error)
        except (RoundError, UploadError) as error:
            _skipped("round", server_round, error)
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the inner strategy makes of the mean; nothing where no sum was opened."""
        outcome = self._train.conclude(replies)
        if outcome is None:
            return None, None
        self._nodes.learn(outcome)
        self.refused[server_round] = dict(outcome.refused)
        try:
            release = outcome.opened()
            arrays = moved(self._model, release.mean(UPDATE))
            weight = release.weight(UPDATE) * self._terms.weight_cap
        except SecaggError as error:
            _skipped("round", server_round, error, outcome.refused)
            return None, None
        self.releases[server_round] = release
        self.sums[server_round] = release.sha256
        self.contributors[server_round] = release.contributors
        _opened("round", server_round, release, outcome.refused)
        means = _means(self._terms.metrics, release)
        reply = self._reply(self._train, {self._key: arrays}, means, weight)
        result, aggregated = self._inner.aggregate_train(server_round, [reply])
        return (None if result is None else as_received(self._model, result)), aggregated

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages; with the offer of an encrypted round, if one is wanted."""
        self._evaluate.abandon()
        if self._training_over or self._evaluation_over:
            return []
        messages = list(self._inner.configure_evaluate(server_round, arrays, config, grid))
        if not messages:
            return []
        if not self._evaluation.bounds:
            return self._in_plaintext(messages)
        plan = self._terms.evaluation(self._evaluation, self._evaluate_privacy)
        instruction = self._instruction(self._evaluation, "")
        try:
            return self._offered(self._evaluate, plan, None, messages, instruction, grid)
        except BudgetError as error:
            if not self._evaluate.begun:
                raise
            self._evaluation_over = True
            _LOG.info("secagg: no more evaluation: %s: %s", error.reason, error)
        except (RoundError, UploadError) as error:
            _skipped("evaluation", server_round, error)
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """What the inner strategy makes of the means; or of the replies, where those are plain."""
        if not self._evaluation.bounds:
            return self._inner.aggregate_evaluate(server_round, replies)
        outcome = self._evaluate.conclude(replies)
        if outcome is None:
            return None
        try:
            release = outcome.opened()
            means = self._evaluation.means(release)
        except SecaggError as error:
            _skipped("evaluation", server_round, error, outcome.refused)
            return None
        _opened("evaluation", server_round, release, outcome.refused)
        cap = self._terms.weight_cap if self._evaluation.weighted else 1
        weight = self._evaluation.weight(release) * cap
        reply = self._reply(self._evaluate, {}, means, weight)
        return self._inner.aggregate_evaluate(server_round, [reply])

    def _raise_least_nodes(self) -> None:
        """Have the inner strategy ask, and wait for, as many nodes as a sum needs."""
        names = ["min_train_nodes", "min_available_nodes"]
        if self._evaluation.bounds:
            names.append("min_evaluate_nodes")
        for name in names:
            least = getattr(self._inner, name, 0)
            if 0 < least < self._terms.min_clients:  # 0: the strategy leaves this part out
                setattr(self._inner, name, self._terms.min_clients)

    def _instruction(self, metrics: Metrics, model: str) -> Instruction:
        weighted = metrics.weighted
        return Instruction(
            model=model,
            examples=self._examples if weighted else "",
            weight_cap=self._terms.weight_cap if weighted else 1,
            bounds=metrics.bounds,
        )

    def _offered(
        self,
        task: TaskRounds,
        plan: Plan,
        model: Update | None,
        messages: list[Message],
        instruction: Instruction,
        grid: Grid,
    ) -> list[Message]:
        """Open a round and offer it.

        Raises:
            QuorumError: there are too few nodes for a sum.
            SecaggError: see `TaskRounds.open`.
        """
        _require_enough(plan, messages, {})
        # Also where the plan needs no keys: in a simulation, nodes that answer say that Ray has
        # started. It forks while it does, which may abort beside a gRPC connection, as ours is.
        refused = self._nodes.greet(messages, grid, self._timeout)
        messages, others = self._nodes.enrolled(messages, self._roster)
        refused += others
        _require_enough(plan, messages, refused)
        opened = task.open(self.server, plan, model)
        self._asked[task] = messages[0]
        task.asked(len(messages), refused)
        offer = b"" if plan.norm_check else opened.offer()
        for message in messages:
            own = offer or opened.offer(self._nodes.key(message) or b"")
            notice = self._nodes.notice(message)
            _instruct(message, replace(instruction, offer=own, notice=notice))
        return messages

    def _in_plaintext(self, messages: list[Message]) -> list[Message]:
        if not self._warned:
            self._warned = True
            _LOG.warning(
                "secagg: evaluation metrics travel in plaintext, each node's by itself%s; name "
                "them in evaluate_metrics to have them averaged encrypted, or set "
                "fraction_evaluate=0.0",
                ", and the privacy budget does not cover them" if self._terms.privacy else "",
            )
        for message in messages:
            if notice := self._nodes.notice(message):
                _instruct(message, Instruction(notice=notice))
        return messages

    def _reply(
        self,
        task: TaskRounds,
        arrays: Mapping[str, ArrayRecord],
        means: Mapping[str, float],
        weight: float,
    ) -> Message:
        """The one reply that the inner strategy gets."""
        metrics = MetricRecord({**means, self._examples: weight})
        return Message(RecordDict({**arrays, RECORD: metrics}), reply_to=self._asked[task])

    def _farewell(self, grid: Grid) -> None:
        """Tell the last verdicts to those who check them."""
        if (asked := self._asked.get(self._train)) is None:
            return
        if last := self._nodes.last_notices(asked.metadata.message_type):
            grid.send_and_receive(last, timeout=min(self._timeout, _FAREWELL_S))


def _model_of(messages: list[Message], strategy: Strategy) -> tuple[str, ArrayRecord]:
    """The model that a round's messages carry, and the name of its record.

    Raises:
        ConfigurationError: not one, the same in all.
    """
    records = messages[0].content.array_records
    key: str = getattr(strategy, "arrayrecord_key", "")
    if key not in records:
        if len(records) != 1:
            raise ConfigurationError(
                "expected one ArrayRecord in a training message, the model; got "
                f"{sorted(records)}; give the strategy an arrayrecord_key"
            )
        (key,) = records
    model = records[key]
    if any(message.content.get(key) != model for message in messages[1:]):
        raise ConfigurationError(
            "expected the same model for all nodes of a round; the strategy sends different ones, "
            "and the mean of their updates would be about neither"
        )
    return key, model


def _require_enough(plan: Plan, messages: list[Message], refused: Mapping[str, int]) -> None:
    if len(messages) < plan.min_clients:
        raise QuorumError(
            f"expected at least min_clients={plan.min_clients} nodes to offer a round to; got "
            f"{len(messages)}{_counted(refused)}"
        )


def _instruct(message: Message, instruction: Instruction) -> None:
    if RECORD in message.content:
        raise ConfigurationError(
            f"expected messages without a record {RECORD!r}, which is the one for offers; rename it"
        )
    # The strategy's messages may share one content.
    message.content = RecordDict({**message.content, RECORD: instruction.to_record()})


def _means(metrics: Metrics, release: Release) -> dict[str, float]:
    try:
        return metrics.means(release)
    except ReleaseError as error:
        _LOG.warning("secagg: no metrics: %s: %s", error.reason, error)
        return {}


def _opened(what: str, number: int, release: Release, refused: Mapping[str, int]) -> None:
    _LOG.info(
        "secagg: %s %d: %d contributors, %d refused%s, sha256=%s",
        what,
        number,
        release.contributors,
        sum(refused.values()),
        _counted(refused),
        release.sha256,
    )


def _skipped(
    what: str, number: int, error: SecaggError, refused: Mapping[str, int] | None = None
) -> None:
    _LOG.warning(
        "secagg: %s %d skipped: %s: %s%s; the model stays as it is",
        what,
        number,
        error.reason,
        error,
        _counted(refused or {}),
    )


def _counted(refused: Mapping[str, int]) -> str:
    counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(refused.items()))
    return f" ({counts})" if counts else ""
