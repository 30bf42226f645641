"""The client's side: join a round before the model is trained, encrypt what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from numpy.typing import NDArray
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply

from secagg.context import RoundContext
from secagg.errors import ConfigurationError, InputError, SchemaError
from secagg.nvflare.messages import NOTICES, OFFERS, floats, job_of, path_of, sealed
from secagg.parameters import FloatSegment
from secagg.sampling import Stream
from secagg_client.embedded import EmbeddedClient, JoinedRound
from secagg_client.kits import ClientKit
from secagg_client.ledger import Limits

__all__ = ["SecaggEncryptor", "SecaggJoin"]

_JOINED, _SEALED = "secagg_joined", "secagg_sealed"  # in the context of a task
_MODELS = (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF, DataKind.FL_MODEL, DataKind.COLLECTION)


@dataclass(frozen=True)
class _Joined:
    """A round, and the model that it started from: float arrays by name, as they were received."""

    round: JoinedRound
    model: dict[str, NDArray[Any]] = field(repr=False)


@dataclass
class _Site:
    """One client; in a simulation, a process may be several."""

    client: EmbeddedClient
    awaits_verdict: bool = False


class _InstalledFilter(Filter):  # type: ignore[misc] # NVFlare has no types
    """A filter of a package that sites have installed."""

    def add_to_fed_job(self, job: Any, ctx: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """What NVFlare's job API calls: none of our sources is to travel in a job."""
        job.set_app_packages(sorted({*job.job.app_packages, "secagg"}))
        super().add_to_fed_job(job, ctx, **kwargs)


class SecaggJoin(_InstalledFilter):
    """Task data filter: checks a round before anything is computed for it.

    What it checks is what `EmbeddedClient.join` does: the key holder's endorsement, the task, that
    the round is a later one, the SHA-256 of the model as it came, and what privacy may cost. A
    round that fails makes NVFlare answer ``TASK_DATA_FILTER_ERROR``: nothing is trained. Tasks
    without an offer pass as they are.

    With a norm check, the next round, or the end of the job, brings the verdict on the last update,
    which is checked too: a server that had something else judged than it had committed to gets
    nothing more.

    Args:
        kit: folder of this client's kit, made by ``secagg provision``. ``{site}`` stands for the
            client's name; what is relative starts at the client's workspace.
        task: the task id; the job's id when empty. Simulations need one of their own each time,
            because all have the same job id.
        state: folder for what must outlive a crash, see `EmbeddedClient`; as ``kit``. Nothing is
            kept when empty.
        max_epsilon, require_privacy: see `Limits`.
    """

    def __init__(
        self,
        kit: str = "local/secagg",
        task: str = "",
        state: str = "secagg",
        max_epsilon: float | None = None,
        require_privacy: bool = False,
    ) -> None:
        super().__init__()
        # Under the names of the arguments: NVFlare writes a job's configuration from them.
        self.kit = kit
        self.task = task
        self.state = state
        self.max_epsilon = max_epsilon
        self.require_privacy = require_privacy
        self._sites: dict[tuple[str, str], _Site] = {}
        self._lock = Lock()

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Join the round of a task, if it has one.

        Raises:
            SecaggError: see `EmbeddedClient.join` and `EmbeddedClient.judge`; also no kit, or a
                client that the server knows under another key or not at all.
        """
        offers = shareable.get_header(OFFERS)
        if offers is None or fl_ctx.get_prop(_JOINED) is not None:
            return shareable
        site = self._site(fl_ctx)
        self._settle(site, shareable, fl_ctx)
        if (key := site.client.public_key.hex()) not in offers:
            raise ConfigurationError(
                "expected an offer for this client's signing key; the server has none; either the "
                "round is over, or this client is not enrolled under its NVFlare name with this kit"
            )
        # A trainer may work on these very arrays: what was received is kept as it is.
        model = {name: v.copy() for name, v in floats(_model_of(shareable)).items()}
        joined = site.client.join(offers[key], model)
        site.awaits_verdict = joined.context.plan.norm_check is not None
        fl_ctx.set_prop(_JOINED, _Joined(joined, model), private=True, sticky=False)
        return shareable

    def _settle(self, site: _Site, message: Shareable, fl_ctx: FLContext) -> None:
        """Check the verdict on the last update, which a message has to bring."""
        notice = message.get_header(NOTICES, {}).get(site.client.public_key.hex())
        if notice is None:
            if site.awaits_verdict:
                self.log_warning(fl_ctx, "secagg: the server shows no verdict on the last round")
        elif site.awaits_verdict and not site.client.judge(notice).accepted:
            self.log_warning(fl_ctx, "secagg: the norm check refused this client's last update")
        site.awaits_verdict = False

    def _site(self, fl_ctx: FLContext) -> _Site:
        name = (fl_ctx.get_identity_name(), job_of(self.task, fl_ctx))
        with self._lock:
            if name not in self._sites:
                client = EmbeddedClient(
                    ClientKit.load(path_of(self.kit, fl_ctx)),
                    name[1],
                    folder=path_of(self.state, fl_ctx) if self.state else None,
                    limits=Limits(self.max_epsilon, self.require_privacy),
                    rounding=self._rounding(fl_ctx),
                )
                self._sites[name] = _Site(client)
                fl_ctx.get_engine().register_aux_message_handler(NOTICES, self._last_notice)
            return self._sites[name]

    def _last_notice(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        """What the server tells at the end of a job."""
        self._settle(self._site(fl_ctx), request, fl_ctx)
        return make_reply(ReturnCode.OK)

    def _rounding(self, _fl_ctx: FLContext) -> Callable[[RoundContext], Stream] | None:
        """Repeatable rounding, for tests on one machine that override this; None for none."""
        return None


class SecaggEncryptor(_InstalledFilter):
    """Task result filter: puts a client's encrypted update in the place of its result.

    What leaves is the upload and the round's number. The number of local steps, in the result's
    ``MetaKey.NUM_STEPS_CURRENT_ROUND``, is the update's weight, and travels encrypted with it where
    the plan weighs at all. Metrics stay at home, and so does everything else of the result. Arrays
    that are not floats, such as counters, take no part: the server's stay as they are.

    A model that comes from a task without an offer is refused, so that with both filters among a
    site's own (``local/privacy.json``) no job gets at an update in the clear; a job may have them
    as well. Results without a model, such as those of an evaluation, pass as they are.
    """

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Encrypt a result.

        Raises:
            SchemaError: no single model, or other tensors than the round's.
            InputError: no number of steps where updates are weighed by it; or NaN or infinity.
            ConfigurationError: a model, and no round that was joined for it.
            SecaggError: see `JoinedRound.encrypt`.
        """
        code = shareable.get_return_code()
        if code != ReturnCode.OK:
            return make_reply(code)
        if shareable is fl_ctx.get_prop(_SEALED):
            return shareable  # by a filter of this kind before this one
        joined: _Joined | None = fl_ctx.get_prop(_JOINED)
        fl_ctx.set_prop(_JOINED, None, private=True, sticky=False)
        dxo = _dxo_of(shareable)
        if joined is None:
            if dxo is not None and dxo.data_kind in _MODELS:
                raise ConfigurationError(
                    "expected no model from a task without an encrypted round; got one, which does "
                    "not leave; add SecaggJoin to the task data filters, and SecaggAggregator to "
                    "the server"
                )
            return shareable
        if dxo is None or dxo.data_kind not in (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF):
            raise SchemaError(
                "expected one model, as WEIGHTS or WEIGHT_DIFF, from a training task; got "
                f"{dxo.data_kind if dxo else 'something else'}, which does not leave"
            )
        plan = joined.round.context.plan
        segment = plan.segments[0]
        if len(plan.segments) != 1 or not isinstance(segment, FloatSegment):
            raise SchemaError("expected a plan for one model; got another; nothing leaves")
        upload = joined.round.encrypt(
            {segment.name: _change(dxo, joined.model)}, samples=_samples(dxo, segment)
        )
        self.log_info(fl_ctx, f"secagg: encrypted an update, {len(upload)} bytes")
        reply = sealed(upload, shareable)
        fl_ctx.set_prop(_SEALED, reply, private=True, sticky=False)
        return reply


def _dxo_of(shareable: Shareable) -> DXO | None:
    try:
        return from_shareable(shareable)
    except ValueError:
        return None


def _model_of(task: Shareable) -> dict[str, Any]:
    dxo = _dxo_of(task)
    if dxo is None or dxo.data_kind != DataKind.WEIGHTS:
        raise SchemaError(
            "expected the whole model, as WEIGHTS, with a training task; got "
            f"{dxo.data_kind if dxo else 'something else'}"
        )
    model: dict[str, Any] = dxo.data
    return model


def _change(dxo: DXO, model: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What training has added to the model: float arrays by name."""
    result = floats(dxo.data)
    if result.keys() != model.keys():
        missing, extra = sorted(model.keys() - result.keys()), sorted(result.keys() - model.keys())
        raise SchemaError(
            f"expected the float tensors that the round started from; got {missing=}, "
            f"unexpected={extra}; return the whole model"
        )
    if dxo.data_kind == DataKind.WEIGHT_DIFF:
        return result
    for name, value in result.items():
        if value.shape != model[name].shape:
            raise SchemaError(
                f"tensor {name!r}: expected shape={model[name].shape}; got shape={value.shape}"
            )
    return {name: value - model[name] for name, value in result.items()}


def _samples(dxo: DXO, segment: FloatSegment) -> int:
    steps = dxo.get_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND)
    if not segment.weighted:
        return 1
    if steps is None:
        raise InputError(
            f"expected the number of local steps as {MetaKey.NUM_STEPS_CURRENT_ROUND!r} in the "
            'meta of the result, which updates are weighed by; got none; set it, or weighting="'
            'equal" at the server'
        )
    return int(steps)
