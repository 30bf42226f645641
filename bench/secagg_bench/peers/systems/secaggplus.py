"""Flower's SecAgg+ (Bell et al. 2020), by its own code, one client at a time.

All that a client computes is `secaggplus_mod`'s. The server is `SecAggPlusWorkflow`, whose stages
are called one by one; only the loop in which it adds up what clients send stands here, in its own
functions, since theirs takes all clients at once. How its steps are counted:

* a *client's* time and bytes are those of its first three stages: keys and shares, which all
  clients exchange when a round begins, and the masked vector;
* *opening* is what the server does to take the masks off. There is no key holder, and nothing is
  handed over. What clients do for it, looking up shares, is given beside it; its bytes, some tens
  a neighbour, are not counted.

Who is not added has dropped out. Weights are equal, and values are clipped at 1; the ranges are its
own defaults, 22 bits in 32. Neither training nor sending takes any time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ._flat import flatten, shaped

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict

    from secagg_bench.peers.worker import Clock, Times

_RANGES: dict[str, Any] = {
    "max_weight": 1.0,
    "clipping_range": 1.0,
    "quantization_range": 1 << 22,
    "modulus_range": 1 << 32,
}


class System:
    """One cohort; every round has keys of its own.

    Args:
        shares: of each secret, at least 3, odd unless it is the cohort; half of them and one more
            open it. When omitted, 2 ceil(log2 clients) + 1 as the authors propose, or the cohort.
    """

    DISTRIBUTIONS: ClassVar = ("flwr", "cryptography")

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        clients: int,
        clock: Clock,
        *,
        shares: int | None = None,
    ) -> None:
        os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
        from flwr.supercore.task_identity import TaskIdentity

        logging.getLogger("flwr").setLevel(logging.CRITICAL)  # saying what happens is not its work
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
        self._shares = shares or min(clients, 2 * (clients - 1).bit_length() + 1)
        self._shapes, self._clients, self._clock = shapes, clients, clock

    def round(self) -> None:
        """Keys and shares of all clients; what is asked of each, until it is its turn."""
        from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
        from flwr.server.compat.legacy_context import LegacyContext
        from flwr.server.workflow import SecAggPlusWorkflow
        from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
        from flwr.server.workflow.secure_aggregation.secaggplus_workflow import WorkflowState

        # Nodes have numbers from 1.
        self._nodes = {number + 1: _Node(number + 1) for number in range(self._clients)}
        self._strategy = _Strategy(self._nodes)
        self._workflow = SecAggPlusWorkflow(self._shares, self._shares // 2 + 1, **_RANGES)
        self._state = WorkflowState()
        configs = ConfigRecord({Key.CURRENT_ROUND: 1})
        records = RecordDict({MAIN_CONFIGS_RECORD: configs, MAIN_PARAMS_RECORD: ArrayRecord()})
        self._context = LegacyContext(Context(1, 0, {}, records, {}), strategy=self._strategy)  # type: ignore[arg-type]
        self._total: list[NDArray[Any]] = []
        self._added: set[int] = set()
        self._spent: dict[int, Times] = {}
        self._sent: dict[int, list[bytes]] = {node: [] for node in self._nodes}
        grid: Any = _Grid(self._exchanged)
        for stage in (self._workflow.setup_stage, self._workflow.share_keys_stage):
            if not stage(grid, self._context, self._state):
                raise RuntimeError("expected all clients to agree on keys; SecAgg+ halted")
        # Of the third stage, only what it asks; it takes all for gone, which is put right later.
        asked: list[Message] = []
        asking: Any = _Grid(asked.extend)
        self._workflow.collect_masked_vectors_stage(asking, self._context, self._state)
        self._asked = {each.metadata.dst_node_id: each for each in asked}

    def _exchanged(self, messages: list[Message]) -> list[Message]:
        """Every client's answer; the clients' time is theirs, not the server's."""
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            with self._clock.beside("clients") as spent:
                reply = self._nodes[node].answer(message)
                self._sent[node].append(_to_bytes(reply))
            self._spent[node] = self._spent[node] + spent if node in self._spent else spent
            replies.append(reply)
        return replies

    def client(self, number: int, update: Mapping[str, NDArray[np.float32]]) -> list[bytes]:
        """A message a stage."""
        node = number + 1
        with self._clock.beside("training"):
            trained = _trained(flatten(update))
        self._clock.earlier("keys_and_shares", self._spent[node])
        reply = self._nodes[node].answer(self._asked[node], trained)
        return [*self._sent[node], _to_bytes(reply)]

    def add(self, number: int, messages: list[bytes]) -> None:
        """What the third stage does with each reply; there is nothing to check."""
        from flwr.common import bytes_to_ndarray
        from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition
        from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
        from flwr.common.serde import recorddict_from_proto
        from flwr.compat.common.recorddict_compat import recorddict_to_fitres
        from flwr.proto.recorddict_pb2 import RecordDict as Message

        with self._clock.part("parse"):
            content = recorddict_from_proto(Message.FromString(messages[-1]))
        sent: Any = content.config_records[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS]
        masked = [bytes_to_ndarray(each) for each in sent]
        self._total = parameters_addition(self._total, masked) if self._total else masked
        node = number + 1
        self._added.add(node)
        result = recorddict_to_fitres(content, keep_input=True)
        self._state.legacy_results.append((self._state.nid_to_proxies[node], result))

    def hand_over(self) -> list[bytes]:
        """Nothing: the end of the third stage, in which the sum is reduced."""
        from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_mod

        self._state.active_node_ids = set(self._added)
        self._state.aggregate_ndarrays = parameters_mod(self._total, self._state.mod_range)
        return []

    def open(self, messages: list[bytes]) -> dict[str, NDArray[Any]]:
        """The mean, float64."""
        grid: Any = _Grid(self._exchanged)
        if not self._workflow.unmask_stage(grid, self._context, self._state):
            raise RuntimeError("expected SecAgg+ to end with a sum; too few shares came back")
        return shaped(self._strategy.mean(), self._shapes)


class _Node:
    """A client of SecAgg+, and what it remembers between stages."""

    def __init__(self, name: int) -> None:
        from flwr.app import Context, RecordDict

        self._context = Context(1, name, {}, RecordDict(), {})

    def answer(self, message: Message, trained: RecordDict | None = None) -> Message:
        """What the mod replies; what was trained is there already."""
        from flwr.app import Message, RecordDict
        from flwr.client.mod import secaggplus_mod
        from flwr.common.serde import message_from_proto, message_to_proto

        def train(message: Message, _: object) -> Message:
            return Message(trained or RecordDict(), reply_to=message)

        # A copy, as it would come from the network: the workflow shares contents among clients.
        copy = message_from_proto(message_to_proto(message))
        return secaggplus_mod(copy, self._context, train)


class _Grid:
    """Stands in for Flower's: whoever is asked answers at once."""

    def __init__(self, answers: Callable[[list[Message]], list[Message] | None]) -> None:
        self._answers = answers

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Their `Grid.send_and_receive`."""
        return self._answers(list(messages)) or []


class _Strategy:
    """Asks all clients, sends no model, and takes the mean as it comes."""

    def __init__(self, nodes: Iterable[int]) -> None:
        self._nodes = list(nodes)
        self._results: list[tuple[Any, Any]] = []

    def configure_fit(self, *_: object) -> list[tuple[Any, Any]]:
        """Their `Strategy.configure_fit`."""
        from flwr.common import FitIns, Parameters

        nothing = FitIns(Parameters([], ""), {})
        return [(SimpleNamespace(node_id=node), nothing) for node in self._nodes]

    def aggregate_fit(
        self, _: int, results: list[tuple[Any, Any]], failures: list[Any]
    ) -> tuple[None, dict[str, Any]]:
        """Their `Strategy.aggregate_fit`."""
        self._results = results
        return None, {}

    def mean(self) -> NDArray[np.float64]:
        """Of those that were added."""
        from flwr.common import parameters_to_ndarrays

        (mean,) = parameters_to_ndarrays(self._results[0][1].parameters)
        return np.asarray(mean, dtype=np.float64)


def _trained(vector: NDArray[np.float32]) -> RecordDict:
    """What training would leave."""
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
    from flwr.compat.common.recorddict_compat import fitres_to_recorddict

    parameters = ndarrays_to_parameters([vector])
    result = FitRes(Status(Code.OK, ""), parameters, num_examples=1, metrics={})
    return fitres_to_recorddict(result, keep_input=True)


def _to_bytes(message: Message) -> bytes:
    from flwr.common.serde import recorddict_to_proto

    return recorddict_to_proto(message.content).SerializeToString()
