"""The mod: what leaves a node, what is refused before anything does, and what stays on it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import Site, shared, shared_other
from flower_grids import (
    BOUNDS,
    array_record,
    linear_app,
    node_context,
    rounding_of,
    server_context,
    trained,
)
from flower_runs import Run
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import arrays_size_mod, message_size_mod
from flwr.common.serde import message_to_proto

from secagg.flower import SecaggMod, secagg_mod
from secagg.flower.arrays import tensors_of
from secagg.flower.envelopes import Instruction, ciphertext_of, public_key_of
from secagg.flower.metrics import Metrics
from secagg.parameters import FloatSegment, NormCheck, Plan, TensorSpec
from secagg.planner import make_plan
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg_client.ledger import Fate, Ledger
from secagg_client.switch import Switch
from secagg_server.embedded import EmbeddedRound, EmbeddedServer


def plan(*, checked: bool = False) -> Plan:
    specs = tuple(TensorSpec(k, np.shape(v)) for k, v in tensors_of(array_record()).items())
    segments = [
        FloatSegment("update", specs, 1.0, 8, "samples", 1000),
        Metrics(BOUNDS, weighted=True).segment(4),
    ]
    return make_plan(segments, max_clients=4, norm_check=NormCheck() if checked else None)


class Node:
    """One node of a run, asked by hand; and rounds to ask it for."""

    def __init__(self, run: Run, server: EmbeddedServer, index: int = 0) -> None:
        server_context(run.run_id, {})
        self.run, self.server, self.index = run, server, index
        self.context = node_context(run.run_id, index, run.config, {})
        self.app = linear_app([secagg_mod])

    def open(self, number: int = 1, *, checked: bool = False, **options: Any) -> EmbeddedRound:  # noqa: ANN401
        model = options.pop("model", array_record())
        return self.server.open(
            plan(checked=checked),
            task_id=self.run.task_id,
            round_number=number,
            model=tensors_of(model),
            **options,
        )

    def ask(
        self,
        instruction: Instruction | None,
        kind: str = MessageType.TRAIN,
        model: ArrayRecord | None = None,
    ) -> Message:
        records: dict[str, Any] = {
            "arrays": model or array_record(),
            "config": ConfigRecord({"lr": 0.1}),
        }
        if instruction:
            records["secagg"] = instruction.to_record()
        message = Message(RecordDict(records), 1000 + self.index, kind)
        return self.app(message, self.context)

    def offered(self, current: EmbeddedRound, **changes: Any) -> Message:  # noqa: ANN401
        """The answer to an offer as the wrapper makes it."""
        key = b""
        if current.context.plan.norm_check:
            key, _ = public_key_of(self.ask(Instruction(hello=True)))
        given = {"model": "arrays", "examples": "num-examples", "bounds": BOUNDS}
        instruction = Instruction(offer=current.offer(key), weight_cap=1000, **(given | changes))
        return self.ask(instruction)

    def refuses(self, reply: Message, reason: str) -> None:
        assert reply.has_error()
        assert reply.error.reason == f"secagg: {reason}"


@pytest.fixture
def server(running: Site) -> Iterator[EmbeddedServer]:
    with EmbeddedServer.load(shared().kit("server"), running.key_holder) as made:
        yield made


@pytest.fixture
def node(run: Run, server: EmbeddedServer) -> Node:
    return Node(run, server)


def test_nothing_leaves_a_node_but_the_ciphertext(node: Node) -> None:
    current = node.open()
    reply = node.offered(current)
    assert not reply.has_error()
    assert list(reply.content) == ["secagg"]
    assert current.add(ciphertext_of(reply)) == "alice"
    sent = message_to_proto(reply).SerializeToString()
    assert len(sent) < current.context.plan.payload_bytes + 4096
    received, answer = array_record(), trained(0, array_record())
    new = answer.array_records["arrays"]
    for key, array in new.items():
        old, after = received[key].numpy(), array.numpy()
        for secret in (after, after - old, (after - old).astype("<f8")):
            if secret.size:
                assert secret.tobytes()[:8] not in sent, key
        assert key.encode() not in sent
    metrics = answer.metric_records["metrics"]
    for name, value in metrics.items():
        assert name.encode() not in sent
        assert struct.pack("<d", value) not in sent
    # A number of examples is too short to be looked for; there is no record where one could be.
    assert reply.content.metric_records == {}
    assert reply.content.config_records == {}


def test_a_reply_of_the_same_size_tells_nothing_of_the_data(
    node: Node, server: EmbeddedServer
) -> None:
    sizes = set()
    for index in range(3):
        other = Node(Run(node.run.config), server, index)
        sizes.add(len(message_to_proto(other.offered(other.open())).content.SerializeToString()))
    assert len(sizes) == 1


def test_training_without_an_offer_is_refused_and_the_app_is_not_called(node: Node) -> None:
    def train(*_: Any) -> RecordDict:  # noqa: ANN401
        raise AssertionError("called")

    node.app = linear_app([secagg_mod], train)
    node.refuses(node.ask(None), "CONTEXT_MISMATCH")
    node.refuses(node.ask(Instruction()), "MALFORMED")


@pytest.mark.parametrize("kind", ["train", "train.finetune"])
def test_every_kind_of_training_needs_an_offer(node: Node, kind: str) -> None:
    @node.app.train("finetune")
    def finetune(message: Message, context: Context) -> Message:
        raise AssertionError("called")

    node.refuses(node.ask(None, kind), "CONTEXT_MISMATCH")


def test_evaluation_without_an_offer_is_flowers_own(node: Node) -> None:
    reply = node.ask(None, MessageType.EVALUATE)
    assert reply.content.metric_records["metrics"]["accuracy"] == 0.0


def test_the_same_round_is_answered_once(node: Node) -> None:
    current = node.open()
    assert not node.offered(current).has_error()
    node.refuses(node.offered(current), "CONTEXT_MISMATCH")
    assert not node.offered(node.open(2)).has_error()


def test_with_a_state_folder_the_same_ciphertext_is_sent_again(node: Node, tmp_path: Path) -> None:
    node.context.node_config["secagg-state"] = str(tmp_path / "state")
    current = node.open()
    first, second = node.offered(current), node.offered(current)
    assert ciphertext_of(first) == ciphertext_of(second)
    (entry,) = Ledger(tmp_path / "state").entries()
    assert (entry.task, entry.round_number, entry.fate) == (node.run.task_id, 1, Fate.SENT)


def test_the_runs_state_folder_has_one_for_each_client(node: Node, tmp_path: Path) -> None:
    node.context.run_config["secagg-state"] = str(tmp_path)
    assert not node.offered(node.open()).has_error()
    assert [path.name for path in tmp_path.iterdir()] == ["alice"]


def test_a_paused_client_sends_nothing(node: Node, tmp_path: Path) -> None:
    node.context.node_config["secagg-state"] = str(tmp_path)
    Switch(tmp_path).pause()
    node.refuses(node.offered(node.open()), "PAUSED")
    Switch(tmp_path).resume()
    assert not node.offered(node.open(2)).has_error()


def test_a_client_that_wants_privacy_sends_nothing_without(node: Node) -> None:
    node.context.node_config["secagg-require-privacy"] = True
    node.refuses(node.offered(node.open()), "PRIVACY_REFUSED")


def test_another_model_than_the_endorsed_one_is_refused(node: Node) -> None:
    other = array_record()
    other["layer.bias"] = Array(np.ones(5, dtype=np.float32))
    node.refuses(node.offered(node.open(model=other)), "CONTEXT_MISMATCH")


def test_another_federations_key_holder_is_not_believed(node: Node) -> None:
    node.context.node_config["secagg-kit"] = str(shared_other().kit("alice"))
    node.refuses(node.offered(node.open()), "UNTRUSTED_KEY")


def test_another_runs_round_is_refused(node: Node, server: EmbeddedServer) -> None:
    other = Node(Run(node.run.config), server)
    node.refuses(node.offered(other.open()), "CONTEXT_MISMATCH")


def test_repeatable_rounding_is_refused_off_loopback(node: Node) -> None:
    node.app = linear_app([SecaggMod(rounding_of)])
    current = node.open()
    for address in ("key-holder.example:7402", "", "10.0.0.1:7402"):
        node.context.run_config["secagg-key-holder"] = address
        node.refuses(node.offered(current), "CONFIGURATION")
    node.app = linear_app([secagg_mod])
    assert not node.offered(current).has_error()


def test_a_node_without_a_kit_says_what_is_missing_in_its_own_log(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    del node.context.node_config["partition-id"]
    node.refuses(node.ask(Instruction(hello=True)), "CONFIGURATION")
    assert "--node-config" in caplog.text


@pytest.mark.parametrize(
    "values",
    [
        {"version": 2},
        {"offer": "text"},
        {"model": b"bytes"},
        {"weight-cap": 0},
        {"metrics": ["a"], "bounds": [1.0, 2.0]},
        {"metrics": [1], "bounds": [1.0]},
    ],
)
def test_a_record_that_is_not_ours_is_refused(node: Node, values: dict[str, Any]) -> None:
    record = ConfigRecord({"version": 1, "hello": True, **values})
    content = RecordDict({"arrays": array_record(), "secagg": record})
    reply = node.app(Message(content, 1000, MessageType.TRAIN), node.context)
    node.refuses(reply, "WIRE_VERSION" if "version" in values else "MALFORMED")


def test_a_model_that_was_taken_away_is_missed(node: Node) -> None:
    node.refuses(node.offered(node.open(), model="weights"), "MALFORMED")


def _without(name: str) -> Callable[[RecordDict], None]:
    def change(reply: RecordDict) -> None:
        del reply[name]

    return change


def _array(key: str, value: Any) -> Callable[[RecordDict], None]:  # noqa: ANN401
    def change(reply: RecordDict) -> None:
        reply.array_records["arrays"][key] = Array(np.asarray(value))

    return change


def _metric(name: str, value: Any) -> Callable[[RecordDict], None]:  # noqa: ANN401
    def change(reply: RecordDict) -> None:
        reply.metric_records["metrics"][name] = value

    return change


def _drop_array(reply: RecordDict) -> None:
    del reply.array_records["arrays"]["layer.bias"]


def _drop_metric(reply: RecordDict) -> None:
    del reply.metric_records["metrics"]["train_loss"]


def _two_arrays(reply: RecordDict) -> None:
    reply["more"] = array_record()


def _two_metrics(reply: RecordDict) -> None:
    reply["more"] = MetricRecord({"a": 1.0})


def _foreign(reply: RecordDict) -> None:
    array = reply.array_records["arrays"]["layer.bias"]
    array.stype = "pickle"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(_without("arrays"), "SCHEMA_MISMATCH", id="no arrays"),
        pytest.param(_without("metrics"), "SCHEMA_MISMATCH", id="no metrics"),
        pytest.param(_two_arrays, "SCHEMA_MISMATCH", id="two array records"),
        pytest.param(_two_metrics, "SCHEMA_MISMATCH", id="two metric records"),
        pytest.param(_drop_array, "SCHEMA_MISMATCH", id="an array is missing"),
        pytest.param(_array("extra", np.ones(3)), "SCHEMA_MISMATCH", id="an array too many"),
        pytest.param(_array("layer.bias", np.ones(6)), "SCHEMA_MISMATCH", id="another shape"),
        pytest.param(
            _array("layer.bias", np.ones(5, dtype=complex)), "SCHEMA_MISMATCH", id="complex"
        ),
        pytest.param(_array("layer.bias", np.full(5, np.nan)), "NON_FINITE", id="nan"),
        pytest.param(_array("layer.bias", np.full(5, np.inf)), "NON_FINITE", id="infinite"),
        pytest.param(_foreign, "SCHEMA_MISMATCH", id="another serialisation"),
        pytest.param(_drop_metric, "SCHEMA_MISMATCH", id="the metric is missing"),
        pytest.param(_metric("train_loss", [1.0]), "SCHEMA_MISMATCH", id="a list"),
        pytest.param(_metric("train_loss", float("nan")), "NON_FINITE", id="no loss"),
        pytest.param(_metric("num-examples", 0), "INVALID_INPUT", id="no examples"),
        pytest.param(_metric("num-examples", [5]), "SCHEMA_MISMATCH", id="a list of examples"),
    ],
)
def test_replies_that_cannot_be_summed_are_refused(
    node: Node, change: Callable[[RecordDict], None], reason: str
) -> None:
    def train(partition: int, received: ArrayRecord) -> RecordDict:
        reply = trained(partition, received)
        change(reply)
        return reply

    node.app = linear_app([secagg_mod], train)
    node.refuses(node.offered(node.open()), reason)


def test_what_an_exception_says_stays_on_the_node(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    def train(partition: int, received: ArrayRecord) -> RecordDict:
        raise ValueError("row 7 of patient-77 is not a number")

    node.app = linear_app([secagg_mod], train)
    reply = node.offered(node.open())
    assert b"patient-77" not in message_to_proto(reply).SerializeToString()
    assert reply.error.reason == "ValueError; see the node's log"
    assert "patient-77" in caplog.text


def test_what_an_error_reply_says_stays_on_the_node(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    app = ClientApp(mods=[secagg_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(Error(6, "patient-77 has left"), reply_to=message)

    node.app = app
    reply = node.offered(node.open())
    assert b"patient-77" not in message_to_proto(reply).SerializeToString()
    assert reply.error.code == 6
    assert "patient-77" in caplog.text


def test_flowers_own_mods_may_stand_on_either_side(node: Node) -> None:
    node.app = linear_app([message_size_mod, arrays_size_mod, secagg_mod, message_size_mod])
    assert not node.offered(node.open()).has_error()


def test_a_metric_beyond_its_bound_counts_as_that_and_says_so(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    assert not node.offered(node.open(), bounds={"train_loss": 0.5}).has_error()
    assert "'train_loss' is beyond its bound of 0.5" in caplog.text


def _judged(node: Node, server: EmbeddedServer) -> bytes:
    """The notice on node 0's upload of round 1."""
    current = node.open(checked=True)
    for index in range(4):
        other = node if index == 0 else Node(node.run, server, index)
        reply = other.offered(current)
        current.add(ciphertext_of(reply))
    current.conclude()
    key, judges = public_key_of(node.ask(Instruction(hello=True)))
    assert judges
    return current.notice(key)


def test_a_verdict_is_checked_where_the_upload_was_kept(
    node: Node, server: EmbeddedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node.context.node_config["secagg-state"] = str(tmp_path)
    notice = _judged(node, server)
    assert not node.ask(Instruction(hello=True, notice=notice)).has_error()
    assert not node.ask(Instruction(notice=notice), MessageType.EVALUATE).has_error()
    assert "cannot be checked" not in caplog.text


def test_a_server_that_had_something_else_judged_is_found_out(
    node: Node, server: EmbeddedServer, tmp_path: Path
) -> None:
    node.context.node_config["secagg-state"] = str(tmp_path)
    answer = pb.GetVerdictResponse.FromString(_judged(node, server))
    answer.challenge_key = bytes(32)
    node.refuses(
        node.ask(Instruction(hello=True, notice=answer.SerializeToString())), "FORGED_SKETCH"
    )
    assert list(tmp_path.glob("evidence-*"))
    node.refuses(node.offered(node.open(2)), "FORGED_SKETCH")


def test_a_verdict_on_nothing_is_a_warning(
    node: Node, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node.context.node_config["secagg-state"] = str(tmp_path)
    assert not node.ask(Instruction(hello=True, notice=b"nonsense")).has_error()
    assert "cannot be checked" in caplog.text
