"""What the filters and the aggregator make of NVFlare's messages; NVFlare itself is a few calls.

The key holder is the service itself, behind mutual TLS. Runs where nvflare is installed: see
`test_in_own_environment`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip(
    "nvflare", reason="needs the extra nvflare, which has an environment of its own"
)

from federations import CLIENTS, Site, new_federation, shared, shared_other, site
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_copy, make_reply
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.job_config.api import FedJob
from nvflare.job_config.defs import FilterType
from serving import LoopThread, loop_thread

import secagg
from secagg.errors import (
    ConfigurationError,
    ContextError,
    ForgedSketchError,
    InputError,
    NonFiniteError,
    QuorumError,
    SchemaError,
    UntrustedKeyError,
)
from secagg.nvflare import SecaggAggregator, SecaggEncryptor, SecaggJoin
from secagg.nvflare.messages import NOTICES, OFFERS
from secagg.nvflare.server import SHA256
from secagg.quantize import quantize
from secagg.release import sums_sha256
from secagg.sampling import Stream
from secagg_client.repeatable import repeatable_rounding

MODEL: dict[str, Any] = {
    "layer.weight": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "layer.bias": np.zeros(3, dtype=np.float64),
    "layer.seen": np.array(7, dtype=np.int64),
}
FLOATS = {"layer.weight": (3, 4), "layer.bias": (3,)}
STEPS = {"alice": 10, "bob": 20, "carol": 40, "dave": 90}
SEED = 5
_TASKS = iter(f"task-{number}" for number in range(1_000_000))


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


@pytest.fixture(scope="module")
def running(thread: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(thread, tmp_path_factory.mktemp("site"), shared()) as made:
        yield made


class Repeatable(SecaggJoin):
    """Rounds so that the test can round the same."""

    def _rounding(self, fl_ctx: FLContext) -> Callable[[secagg.RoundContext], Stream]:
        index = CLIENTS.index(fl_ctx.get_identity_name())
        return lambda context: repeatable_rounding(SEED, index, context.id.round_number)


class Engine:
    """What components ask of NVFlare's engine.

    Attributes:
        panics: why the job was to be stopped.
        handlers: of messages beside the tasks, by topic.
        sent: such messages, by client.
    """

    def __init__(self, folder: Path) -> None:
        self.panics: list[str] = []
        self.handlers: dict[str, Any] = {}
        self.sent: dict[str, Shareable] = {}
        self._workspace = SimpleNamespace(get_root_dir=lambda: str(folder))

    def get_workspace(self) -> object:
        return self._workspace

    def fire_event(self, event: str, fl_ctx: FLContext) -> None:
        if event == EventType.FATAL_SYSTEM_ERROR:
            self.panics.append(fl_ctx.get_prop(FLContextKey.EVENT_DATA))

    def register_aux_message_handler(self, topic: str, handler: object) -> None:
        assert topic not in self.handlers  # NVFlare raises as well
        self.handlers[topic] = handler

    def send_aux_request(
        self, targets: list[str], topic: str, request: Shareable, *_rest: object, optional: bool
    ) -> None:
        assert topic == NOTICES
        self.sent |= dict.fromkeys(targets, request)


def context_of(name: str, engine: Engine) -> FLContext:
    """What a component is called with."""
    fl_ctx = FLContext()
    fl_ctx.set_prop(ReservedKey.IDENTITY_NAME, name, private=False, sticky=True)
    fl_ctx.set_prop(ReservedKey.RUN_NUM, "job", private=False, sticky=True)
    fl_ctx.set_prop(ReservedKey.ENGINE, engine, private=True, sticky=True)
    return fl_ctx


@dataclass
class Flare:
    """NVFlare's part: a job with its contexts, and the order in which it calls."""

    folder: Path
    aggregator: SecaggAggregator
    join: SecaggJoin
    encryptor: SecaggEncryptor = field(default_factory=SecaggEncryptor)
    model: dict[str, Any] = field(default_factory=lambda: dict(MODEL))
    engines: dict[str, Engine] = field(default_factory=dict)

    def context(self, name: str) -> FLContext:
        """A new context of the server or a client."""
        engine = self.engines.setdefault(name, Engine(self.folder / name))
        return context_of(name, engine)

    def __enter__(self) -> Flare:
        self.server = self.context("server")
        self.aggregator.handle_event(EventType.START_RUN, self.server)
        return self

    def __exit__(self, *_: object) -> None:
        self.aggregator.handle_event(EventType.END_RUN, self.server)

    @property
    def panics(self) -> list[str]:
        return self.engines["server"].panics

    def task(self, client: str, number: int) -> Shareable:
        """What the server sends a client for a round, from 0."""
        task = DXO(DataKind.WEIGHTS, data=self.model).to_shareable()
        task.set_header(AppConstants.CURRENT_ROUND, number)
        fl_ctx = self.context("server")
        fl_ctx.set_peer_context(self.context(client))
        fl_ctx.set_prop(FLContextKey.TASK_NAME, "train", private=True, sticky=False)
        fl_ctx.set_prop(FLContextKey.TASK_DATA, task, private=True, sticky=False)
        self.aggregator.handle_event(EventType.AFTER_TASK_DATA_FILTER, fl_ctx)
        return make_copy(task)

    def answer(
        self, client: str, number: int = 0, result: Shareable | None = None, **steps: int
    ) -> Shareable:
        """What leaves a client: of its own training, or of this result."""
        fl_ctx = self.context(client)
        self.join.process(self.task(client, number), fl_ctx)
        return self.encryptor.process(result or trained(self.model, client, number), fl_ctx)

    def round(self, number: int = 0, clients: tuple[str, ...] = CLIENTS) -> DXO:
        """A whole round, as ScatterAndGather does it; the model that follows is kept."""
        for client in clients:
            answer = self.answer(client, number)
            assert self.aggregator.accept(answer, self.server)
        aggregate = from_shareable(self.aggregator.aggregate(self.server))
        self.aggregator.reset(self.server)
        assert aggregate.data_kind == DataKind.WEIGHT_DIFF
        self.model |= {name: self.model[name] + part for name, part in aggregate.data.items()}
        return aggregate


@pytest.fixture
def flare(running: Site, tmp_path: Path) -> Callable[..., Flare]:
    """A job at the running key holder, with a task of its own."""
    task, federation = next(_TASKS), running.federation

    def made(join: Mapping[str, Any] | None = None, **options: Any) -> Flare:  # noqa: ANN401
        given = {"weight_cap": 50, "task": task, "kit": str(federation.kit("server"))}
        clients = str(federation.kit("alice").parent / "{site}")
        return Flare(
            tmp_path,
            SecaggAggregator(running.key_holder, **(given | options)),
            Repeatable(**({"kit": clients, "task": task} | dict(join or {}))),
        )

    return made


def change(client: str, number: int) -> dict[str, Any]:
    """What training changes: floats by little, the counter by one."""
    random = np.random.default_rng((CLIENTS.index(client), number))
    parts = {name: random.normal(size=shape) / 50 for name, shape in FLOATS.items()}
    return {name: parts[name].astype(MODEL[name].dtype) for name in FLOATS}


def trained(model: Mapping[str, Any], client: str, number: int) -> Shareable:
    """A client's result: the whole model from some, the difference from others."""
    changed = change(client, number)
    meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: STEPS[client], MetaKey.INITIAL_METRICS: {"loss": 0.5}}
    if client in ("alice", "bob"):
        whole = {name: model[name] + part for name, part in changed.items()}
        whole["layer.seen"] = model["layer.seen"] + 1
        return result_of(whole, DataKind.WEIGHTS, meta)
    return result_of(changed, DataKind.WEIGHT_DIFF, meta)


def result_of(
    data: dict[str, Any], kind: str = DataKind.WEIGHT_DIFF, meta: dict[str, Any] | None = None
) -> Shareable:
    given = {MetaKey.NUM_STEPS_CURRENT_ROUND: 10} if meta is None else meta
    result = DXO(kind, data=data, meta=given).to_shareable()
    result.set_header(AppConstants.CURRENT_ROUND, 0)
    result.set_header("diary", "what the trainer noted")
    return result


def twin(flare: Flare, number: int, clients: tuple[str, ...]) -> secagg.Release:
    """The round in the clear: the same integers, added without any cipher."""
    plan = secagg.plan_tensors(
        FLOATS,
        max_clients=4,
        clip=1.0,
        weighting="samples",
        weight_cap=50,
        norm_check=secagg.NormCheck(),
    )
    from secagg.context import rotation_string

    rotation = rotation_string(flare.join.task, number + 1, plan)
    parts = [
        quantize(
            plan,
            {"update": sent(flare.model, client, number)},
            samples=STEPS[client],
            rotation=rotation,
            randomness=repeatable_rounding(SEED, CLIENTS.index(client), number + 1),
        )[0].values
        for client in clients
    ]
    return secagg.Release(plan, rotation, len(clients), (np.sum(parts, axis=0),))


def sent(model: Mapping[str, Any], client: str, number: int) -> dict[str, Any]:
    """The update behind a client's result: rounded to the model's types on the way, if it was."""
    changed = change(client, number)
    if client in ("alice", "bob"):
        return {name: (model[name] + part) - model[name] for name, part in changed.items()}
    return changed


def test_rounds_are_those_in_the_clear_bit_for_bit(flare: Callable[..., Flare]) -> None:
    with flare() as job:
        for number, clients in enumerate((CLIENTS, CLIENTS[1:], CLIENTS[:3])):
            clear, before = twin(job, number, clients), dict(job.model)
            found = job.round(number, clients)
            assert found.get_meta_prop(SHA256) == clear.sha256
            for name in FLOATS:
                mean = clear.mean()[name].astype(MODEL[name].dtype)
                np.testing.assert_array_equal(job.model[name], before[name] + mean)
                assert job.model[name].dtype == MODEL[name].dtype
        assert not job.panics
    assert job.model["layer.seen"] == 7


def test_the_mean_is_weighted_by_steps_up_to_the_cap(flare: Callable[..., Flare]) -> None:
    with flare(bits=16) as job:
        found = job.round()
    weights = np.array([min(STEPS[client], 50) for client in CLIENTS])
    parts = [change(client, 0)["layer.weight"] for client in CLIENTS]
    wanted = np.tensordot(weights / weights.sum(), np.array(parts), 1)
    np.testing.assert_allclose(found.data["layer.weight"], wanted, atol=1e-3)


def test_nothing_of_a_result_leaves_but_the_upload_and_the_round(
    flare: Callable[..., Flare],
) -> None:
    with flare() as job:
        answer = job.answer("alice")
        dxo = from_shareable(answer)
        (upload,) = dxo.data.values()
        payload = job.aggregator._plan.payload_bytes
    assert isinstance(upload, bytes)
    assert payload < len(upload) < payload + 2048
    assert dxo.meta == {MetaKey.PROCESSED_ALGORITHM: "secagg"}
    assert answer.get_header(AppConstants.CURRENT_ROUND) == 0
    assert answer.get_header("diary") is None
    assert set(answer) == {"DXO", "__headers__"}


def test_fedavg_gets_the_same_as_scatter_and_gather(flare: Callable[..., Flare]) -> None:
    with flare() as job:
        clear = twin(job, 0, CLIENTS)
        for client in CLIENTS:
            model = FLModelUtils.from_shareable(job.answer(client))
            assert job.aggregator.accept_model(model)
        found = job.aggregator.aggregate_model()
        job.aggregator.reset_stats()
    whole = FLModelUtils.from_shareable(DXO(DataKind.WEIGHTS, data=dict(MODEL)).to_shareable())
    after = FLModelUtils.update_model(whole, found).params
    np.testing.assert_array_equal(
        after["layer.weight"],
        MODEL["layer.weight"] + clear.mean()["layer.weight"].astype(np.float32),
    )
    assert found.meta == {SHA256: clear.sha256}


def test_an_update_in_the_clear_is_dropped(
    flare: Callable[..., Flare], caplog: pytest.LogCaptureFixture
) -> None:
    with flare() as job, caplog.at_level("WARNING"):
        job.task("alice", 0)
        plain = trained(job.model, "alice", 0)
        assert not job.aggregator.accept(plain, job.server)
        assert not job.aggregator.accept_model(FLModelUtils.from_shareable(plain))
        assert not job.aggregator.accept(make_reply(ReturnCode.OK), job.server)
        assert job.aggregator._open.uploads == 0
    assert "add SecaggJoin" in caplog.text
    said = [record for record in caplog.records if record.name == "secagg.nvflare.server"]
    assert said
    assert not any(name in record.getMessage() for record in said for name in CLIENTS)


def test_uploads_of_another_round_or_twice_do_not_count(flare: Callable[..., Flare]) -> None:
    with flare() as job:
        early = job.answer("alice")
        job.round(0)
        assert not job.aggregator.accept(early, job.server)  # over
        job.task("bob", 1)
        assert not job.aggregator.accept(early, job.server)  # another round's
        again = job.answer("alice", 1)
        assert job.aggregator.accept(again, job.server)
        assert job.aggregator.accept(again, job.server)  # the same one: taken once
        assert job.aggregator._open.uploads == 1


def test_too_few_updates_are_not_opened(flare: Callable[..., Flare]) -> None:
    with flare() as job:
        for client in CLIENTS[:2]:
            assert job.aggregator.accept(job.answer(client), job.server)
        with pytest.raises(QuorumError, match="got 2"):
            job.aggregator.aggregate(job.server)


def test_a_task_id_serves_one_run(flare: Callable[..., Flare]) -> None:
    with flare() as job:
        job.round(0)
    with flare() as job:
        job.task("alice", 0)
        assert "ROUND_CLOSED" in job.panics[0]


def test_fedopt_steps_with_the_opened_mean(flare: Callable[..., Flare]) -> None:
    torch = pytest.importorskip("torch")
    from nvflare.app_common.abstract.model import ModelLearnableKey, make_model_learnable
    from nvflare.app_opt.pt.fedopt import PTFedOptModelShareableGenerator

    model = torch.nn.Linear(4, 3).double()
    shapes = {name: tuple(part.shape) for name, part in model.state_dict().items()}
    optimiser = {"path": "torch.optim.SGD", "args": {"lr": 0.5}}
    generator = PTFedOptModelShareableGenerator(optimiser, source_model=model, device="cpu")
    with flare(weighting="equal", bits=16) as job:
        engine = job.engines["server"]
        engine.build_component = lambda given: torch.optim.SGD(**given["args"])
        generator.handle_event(EventType.START_RUN, job.server)
        job.model = {n: p.numpy().copy() for n, p in model.state_dict().items()}
        before = make_model_learnable(dict(job.model), {})
        job.server.set_prop(AppConstants.GLOBAL_MODEL, before, private=True, sticky=True)
        for client in CLIENTS:
            change = {name: np.full(shape, 0.02) for name, shape in shapes.items()}
            answer = job.answer(client, result=result_of(change))
            assert job.aggregator.accept(answer, job.server)
        aggregate = job.aggregator.aggregate(job.server)
        after = generator.shareable_to_learnable(aggregate, job.server)
    for name in shapes:
        moved = after[ModelLearnableKey.WEIGHTS][name] - job.model[name]
        np.testing.assert_allclose(moved, 0.01, atol=1e-4)


class Poisoned(SecaggEncryptor):
    """Sends ten times what it should, past the clipping."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        import secagg_client.embedded as embedded
        from secagg.encryptor import encrypt_integers

        def tenfold(context: Any, quantized: Any, *rest: Any) -> Any:  # noqa: ANN401
            return encrypt_integers(context, [part.values * 10 for part in quantized], *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(embedded, "encrypt_quantized", tenfold)
            return super().process(shareable, fl_ctx)


def large(client: str) -> Shareable:
    """An update at the clip norm."""
    return result_of({n: np.full(s, 1.0, MODEL[n].dtype) for n, s in FLOATS.items()})


def test_a_poisoned_update_stays_out_and_its_client_is_told(
    flare: Callable[..., Flare], caplog: pytest.LogCaptureFixture
) -> None:
    with flare() as job:
        honest = CLIENTS[1:]
        clear = twin(job, 0, honest)
        for client in honest:
            assert job.aggregator.accept(job.answer(client), job.server)
        job.encryptor = Poisoned()
        assert job.aggregator.accept(job.answer("alice", result=large("alice")), job.server)
        with caplog.at_level("INFO"):
            found = from_shareable(job.aggregator.aggregate(job.server))
        assert found.get_meta_prop(SHA256) == clear.sha256
        assert "3 contributors, 1 refused (NORM_REFUSED)" in caplog.text
        caplog.clear()
        job.encryptor = SecaggEncryptor()
        for client in ("alice", "bob"):
            job.answer(client, 1)
    assert caplog.text.count("refused this client's last update") == 1


def test_a_forged_verdict_ends_a_clients_part(flare: Callable[..., Flare]) -> None:
    with flare() as job:
        job.round(0)
        task = job.task("alice", 1)
        (key, notice), *_ = task.get_header(NOTICES).items()
        task.set_header(NOTICES, {key: forged(notice)})
        with pytest.raises(ForgedSketchError):
            job.join.process(task, job.context("alice"))
        with pytest.raises(ForgedSketchError, match="evidence"):
            job.answer("alice", 1)


def test_the_last_rounds_verdicts_come_before_the_job_ends(
    flare: Callable[..., Flare], caplog: pytest.LogCaptureFixture
) -> None:
    def tell(job: Flare, client: str) -> Shareable:
        """Hand a client what the server has sent it."""
        handler = job.engines[client].handlers[NOTICES]
        answer: Shareable = handler(
            NOTICES, job.engines["server"].sent[client], job.context(client)
        )
        return answer

    with flare() as job:
        for client in CLIENTS[:3]:
            job.aggregator.accept(job.answer(client), job.server)
        job.encryptor = Poisoned()
        job.aggregator.accept(job.answer("dave", result=large("dave")), job.server)
        job.aggregator.aggregate(job.server)
        job.aggregator.handle_event(EventType.END_WORKFLOW, job.server)
        assert job.engines["server"].sent.keys() == set(CLIENTS)
        assert tell(job, "alice").get_return_code() == ReturnCode.OK
        assert "refused this client" not in caplog.text
        tell(job, "dave")
        assert caplog.text.count("refused this client's last update") == 1
        (notice,) = job.engines["server"].sent["bob"].get_header(NOTICES).items()
        job.engines["server"].sent["bob"].set_header(NOTICES, {notice[0]: forged(notice[1])})
        with pytest.raises(ForgedSketchError, match="evidence"):
            tell(job, "bob")


def forged(notice: bytes) -> bytes:
    """With another challenge key than was committed to, which is the last thing in it."""
    return notice[:-1] + bytes([notice[-1] ^ 1])


def test_a_hidden_verdict_is_noticed(
    flare: Callable[..., Flare], caplog: pytest.LogCaptureFixture
) -> None:
    with flare() as job:
        job.round(0)
        task = job.task("alice", 1)
        del task["__headers__"][NOTICES]
        job.join.process(task, job.context("alice"))
    assert "shows no verdict" in caplog.text


def test_a_model_that_was_changed_on_its_way_is_refused(flare: Callable[..., Flare]) -> None:
    with flare() as job:
        task = job.task("alice", 0)
        job.model["layer.weight"] = MODEL["layer.weight"] + np.float32(1e-6)
        other = job.task("bob", 0)
        task["DXO"] = other["DXO"]
        with pytest.raises(ContextError, match="different models to different clients"):
            job.join.process(task, job.context("alice"))


def test_an_offer_of_another_job_or_another_key_holder_is_refused(
    flare: Callable[..., Flare], running: Site
) -> None:
    other = {"kit": str(shared_other().kit("alice").parent / "{site}")}
    with flare() as job, flare({"task": "another"}) as elsewhere, flare(other) as stranger:
        task = job.task("alice", 0)
        with pytest.raises(ContextError, match="another one"):
            elsewhere.join.process(task, job.context("alice"))
        job.engines.pop("alice")
        with pytest.raises(ConfigurationError, match="expected an offer for this client"):
            stranger.join.process(task, job.context("alice"))
        (offer,) = task.get_header(OFFERS).values()
        key = stranger.join._site(job.context("alice")).client.public_key
        task.set_header(OFFERS, {key.hex(): offer})
        with pytest.raises(UntrustedKeyError):
            stranger.join.process(task, job.context("alice"))


def test_who_is_not_enrolled_gets_no_offer_and_the_others_go_on(
    flare: Callable[..., Flare], caplog: pytest.LogCaptureFixture
) -> None:
    with flare() as job:
        assert job.task("mallory", 0).get_header(OFFERS) == {}
        job.round(0)
        assert not job.panics
    assert "NOT_ENROLLED" in caplog.text


def test_a_client_whose_signing_key_was_rotated_takes_part_with_either(
    thread: LoopThread, tmp_path: Path
) -> None:
    federation = new_federation(tmp_path / "federation")
    old = tmp_path / "old"
    import shutil

    shutil.copytree(federation.kit("alice"), old)
    federation.rotate_client("alice")
    task = next(_TASKS)
    with site(thread, tmp_path / "site", federation) as running:
        aggregator = SecaggAggregator(
            running.key_holder,
            kit=str(federation.kit("server")),
            task=task,
            weighting="equal",
            min_clients=3,
        )
        kits = str(federation.kit("bob").parent / "{site}")
        with Flare(tmp_path, aggregator, SecaggJoin(kit=kits, task=task)) as job:
            offers = job.task("alice", 0).get_header(OFFERS)
            assert len(offers) == 2
            new_kit, job.join = job.join, SecaggJoin(kit=str(old), task=task)
            assert job.aggregator.accept(job.answer("alice"), job.server)
            job.join = new_kit
            job.engines.pop("alice")
            for client in ("bob", "carol"):
                assert job.aggregator.accept(job.answer(client), job.server)
            job.aggregator.aggregate(job.server)
            job.round(1, CLIENTS[:3])


@pytest.mark.parametrize(
    ("result", "error", "says"),
    [
        (result_of({"layer.weight": np.zeros((3, 4))}), SchemaError, "missing"),
        (
            result_of({n: np.zeros(s) for n, s in FLOATS.items()} | {"more": np.zeros(2)}),
            SchemaError,
            "more",
        ),
        (
            result_of({n: np.zeros(9) for n in FLOATS}, DataKind.WEIGHTS),
            SchemaError,
            "expected shape",
        ),
        (result_of({n: np.full(s, np.nan) for n, s in FLOATS.items()}), NonFiniteError, "layer."),
        (result_of({n: [0.0] for n in FLOATS}), SchemaError, r"ExchangeFormat\.NUMPY"),
        (result_of({n: np.zeros(s, "c8") for n, s in FLOATS.items()}), SchemaError, "complex64"),
        (
            result_of({n: np.zeros(s) for n, s in FLOATS.items()}, meta={}),
            InputError,
            "local steps",
        ),
        (result_of({"loss": 0.5}, DataKind.METRICS), SchemaError, "METRICS"),
        (Shareable({"a model": b"in hiding"}), SchemaError, "something else"),
    ],
    ids=["missing", "extra", "shape", "nan", "no array", "dtype", "no steps", "metrics", "no dxo"],
)
def test_a_result_that_cannot_be_used_does_not_leave(
    flare: Callable[..., Flare], result: Shareable, error: type[Exception], says: str
) -> None:
    with flare() as job, pytest.raises(error, match=says):
        job.answer("alice", result=result)


def test_a_failed_training_says_so_and_nothing_else(flare: Callable[..., Flare]) -> None:
    failed = trained(MODEL, "alice", 0)
    failed.set_return_code(ReturnCode.EXECUTION_EXCEPTION)
    with flare() as job:
        answer = job.answer("alice", result=failed)
    assert answer.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert set(answer) == {"__headers__"}


def test_a_model_without_a_round_does_not_leave_but_metrics_do(tmp_path: Path) -> None:
    fl_ctx, encryptor = context_of("alice", Engine(tmp_path)), SecaggEncryptor()
    task = DXO(DataKind.WEIGHTS, data=dict(MODEL)).to_shareable()
    assert SecaggJoin().process(task, fl_ctx) is task
    collection = DXO(DataKind.COLLECTION, data={"a": DXO(DataKind.WEIGHTS, data=dict(MODEL))})
    for hidden in (result_of(dict(MODEL), DataKind.WEIGHTS), collection.to_shareable()):
        with pytest.raises(ConfigurationError, match="does not leave"):
            encryptor.process(hidden, fl_ctx)
    metrics = result_of({"accuracy": 0.5}, DataKind.METRICS)
    assert encryptor.process(metrics, fl_ctx) is metrics


def test_a_round_is_encrypted_for_once(flare: Callable[..., Flare]) -> None:
    with flare() as job:
        fl_ctx = job.context("alice")
        job.join.process(job.task("alice", 0), fl_ctx)
        job.encryptor.process(trained(job.model, "alice", 0), fl_ctx)
        with pytest.raises(ConfigurationError, match="does not leave"):
            job.encryptor.process(trained(job.model, "alice", 0), fl_ctx)


def test_a_site_and_a_job_may_both_have_the_filters(flare: Callable[..., Flare]) -> None:
    with flare() as job, flare() as again:
        fl_ctx, task = job.context("alice"), job.task("alice", 0)
        for join in (job.join, again.join):
            task = join.process(task, fl_ctx)
        answer = trained(job.model, "alice", 0)
        for encryptor in (job.encryptor, again.encryptor):
            answer = encryptor.process(answer, fl_ctx)
        assert job.aggregator.accept(answer, job.server)


def test_a_trainer_may_work_on_the_arrays_it_was_given(flare: Callable[..., Flare]) -> None:
    with flare() as job:
        fl_ctx, clear = job.context("bob"), twin(job, 0, ("bob",) * 3)
        job.model = {name: np.array(value) for name, value in MODEL.items()}
        task = job.join.process(job.task("bob", 0), fl_ctx)
        given = from_shareable(task).data
        for name, part in change("bob", 0).items():
            given[name] += part
        meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: STEPS["bob"]}
        uploads = []
        with pytest.MonkeyPatch.context() as patch:
            import secagg_client.embedded as embedded

            real = embedded.encrypt_quantized
            patch.setattr(
                embedded,
                "encrypt_quantized",
                lambda *rest: uploads.append(rest[1]) or real(*rest),
            )
            job.encryptor.process(result_of(given, DataKind.WEIGHTS, meta), fl_ctx)
    assert sums_sha256((3 * uploads[0][0].values,)) == clear.sha256


def test_privacy_noises_the_mean_and_ends_with_its_budget(flare: Callable[..., Flare]) -> None:
    privacy = {"mode": "release", "noise_multiplier": 1.0, "epsilon": 8.0, "delta": 1e-6}
    with flare(weighting="equal", privacy=privacy) as job:
        found = job.round(0)
        assert job.aggregator._plan.norm_check.margin == 0.3
        number = 0
        while not job.panics:
            number += 1
            task = job.task("alice", number)
        assert task.get_header(OFFERS) is None
        assert "BUDGET_SPENT" in job.panics[0]
    assert number > 1
    mean = np.mean([change(client, 0)["layer.weight"] for client in CLIENTS], axis=0)
    # Noise of z C / n = 0.25 a coordinate, well above rounding.
    assert 0.05 < np.abs(found.data["layer.weight"] - mean).mean() < 1.0


def test_a_client_refuses_what_its_limits_forbid(flare: Callable[..., Flare]) -> None:
    with flare({"require_privacy": True}) as job:
        with pytest.raises(Exception, match="privacy") as caught:
            job.answer("alice")
        assert caught.type.__name__ == "PrivacyError"


def test_a_job_without_its_kit_or_key_holder_is_stopped_with_the_reason(
    flare: Callable[..., Flare], tmp_path: Path
) -> None:
    with flare(kit="local/secagg") as job:
        assert len(job.panics) == 1
        assert "CERTIFICATE" in job.panics[0]
        job.task("alice", 0)
        assert len(job.panics) == 2


def test_an_impossible_plan_stops_the_job_with_what_would_work(
    flare: Callable[..., Flare],
) -> None:
    with flare(bits=1) as job:
        job.task("alice", 0)
        assert "IMPOSSIBLE_PLAN: expected 2 to 16 bits" in job.panics[0]


def test_a_task_that_comes_after_its_round_has_no_offer(flare: Callable[..., Flare]) -> None:
    """NVFlare hands out tasks in one thread and closes rounds in another."""
    with flare() as job:
        job.round(0, CLIENTS[:3])
        late = job.task("dave", 0)
        assert late.get_header(OFFERS) == {}
        with pytest.raises(ConfigurationError, match="the round is over"):
            job.join.process(late, job.context("dave"))
        assert not job.panics
        job.round(1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"norm_check": {"margins": 0.4}},
        {"norm_check": {"margin": 0.01}},
        {"privacy": {"mode": "release"}},
        {"privacy": {"mode": "none", "noise_multiplier": 1, "epsilon": 1, "delta": 1e-6}},
    ],
)
def test_wrong_settings_are_refused_before_a_job_runs(wrong: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ConfigurationError), match=r"margin|missing|mode"):
        SecaggAggregator("127.0.0.1:7402", weighting="equal", **wrong)


def test_weights_need_a_cap() -> None:
    with pytest.raises(ConfigurationError, match="weight_cap"):
        SecaggAggregator("127.0.0.1:7402")
    SecaggAggregator("127.0.0.1:7402", weighting="equal")


def test_a_job_carries_its_settings_and_none_of_our_sources(tmp_path: Path) -> None:
    """NVFlare writes a job's configuration from attributes that have the arguments' names."""
    job = FedJob(name="job", min_clients=3)
    settings = {
        "key_holder": "holder.example:7402",
        "kit": "kits/server",
        "task": "mine",
        "clip": 2.0,
        "bits": 10,
        "weighting": "equal",
        "weight_cap": 5,
        "min_clients": 4,
        "max_clients": 9,
        "norm_check": {"margin": 0.4},
        "privacy": {"mode": "local", "noise_multiplier": 1.0, "epsilon": 1.0, "delta": 1e-6},
        "train_task": "learn",
    }
    joins = {"kit": "k", "task": "t", "state": "", "max_epsilon": 1.0, "require_privacy": True}
    job.to_server(SecaggAggregator(**settings), id="aggregator")
    job.to_clients(SecaggJoin(**joins), filter_type=FilterType.TASK_DATA, tasks=["train"])
    job.to_clients(SecaggEncryptor(), filter_type=FilterType.TASK_RESULT, tasks=["train"])
    job.export_job(str(tmp_path))
    import json

    (server,) = tmp_path.rglob("config_fed_server.json")
    (client,) = tmp_path.rglob("config_fed_client.json")
    components = json.loads(server.read_text(encoding="utf-8"))["components"]
    made = next(c for c in components if c["id"] == "aggregator")
    assert made["path"] == "secagg.nvflare.server.SecaggAggregator"
    assert made["args"] == settings
    written = json.loads(client.read_text(encoding="utf-8"))
    assert written["task_data_filters"][0]["filters"][0]["args"] == joins
    assert written["task_result_filters"][0]["filters"][0]["args"] == {}
    assert not list(tmp_path.rglob("*.py"))
