"""The server's side: a round at the key holder for each of NVFlare's, and its mean as result."""

from __future__ import annotations

import contextlib
import logging
from threading import Lock
from typing import Any

import numpy as np
from nvflare.apis.dxo import from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator

from secagg.errors import ClosedError, ConfigurationError, IdentityError, RoundError, SecaggError
from secagg.nvflare.messages import NOTICES, OFFERS, floats, job_of, path_of, round_of, upload_in
from secagg.parameters import (
    MIN_COHORT,
    FloatSegment,
    NormCheck,
    Plan,
    Privacy,
    TensorSpec,
    Weighting,
)
from secagg.planner import PRIVATE_MARGIN, make_plan
from secagg_server.embedded import Conclusion, EmbeddedRound, EmbeddedServer

__all__ = ["SHA256", "SecaggAggregator"]

# Not NVFlare's own methods: what these add to a line names the client.
_LOG = logging.getLogger(__name__)
_SETTLE_S = 5.0  # for each client; all of them were there a moment ago

SHA256 = "secagg_sha256"
"""Meta property of an aggregate: SHA-256 of the round's exact sums, in hexadecimal."""


class SecaggAggregator(ModelAggregator):  # type: ignore[misc] # NVFlare has no types
    """Aggregator that adds what it cannot read, and hands on what the key holder opens.

    For ScatterAndGather (and so FedOpt), as the component ``aggregator``, and for FedAvg, as its
    argument of that name. It puts the round's offer into each training task, takes the encrypted
    answers, and returns their weighted mean as a ``WEIGHT_DIFF`` of the float arrays, whether the
    clients return differences or whole models. The meta of the aggregate has the sums' SHA-256.

    A round that cannot be opened, for example because too few updates have passed the checks,
    raises, and NVFlare aborts the job with the reason.

    Clients must be enrolled under their NVFlare names.

    Args:
        key_holder: address of the key holder, ``host:port``.
        kit: folder of the server's kit, made by ``secagg provision``; what is relative starts at
            the server's workspace.
        task: the task id; the job's id when empty. See `SecaggJoin`.
        clip: L2 norm, in model units, to which a larger update is scaled down.
        bits: of one quantised coordinate, see `FloatSegment`.
        weighting: ``"samples"`` weighs updates by the number of their local steps, encrypted;
            ``"equal"`` by nothing.
        weight_cap: steps beyond which a client gains no more weight; needed with ``"samples"``.
            About the most steps that clients take: a much larger one makes quantisation coarse.
        min_clients: fewest clients whose sum may be opened, 3 or more.
        max_clients: most clients in a round; all that are enrolled when 0.
        norm_check: whether updates are checked for their norm; or the fields of `NormCheck`.
        privacy: the fields of `Privacy`; None for none.
        train_task: name of the task whose results are updates.

    Raises:
        ConfigurationError: no ``weight_cap`` where one is needed.
        PlanError, TypeError: impossible or unknown fields in ``norm_check`` or ``privacy``.
    """

    def __init__(
        self,
        key_holder: str,
        kit: str = "local/secagg",
        task: str = "",
        clip: float = 1.0,
        bits: int = 8,
        weighting: Weighting = "samples",
        weight_cap: int = 0,
        min_clients: int = MIN_COHORT,
        max_clients: int = 0,
        norm_check: bool | dict[str, Any] = True,
        privacy: dict[str, Any] | None = None,
        train_task: str = "train",
    ) -> None:
        super().__init__()
        if weighting == "samples" and weight_cap < 1:
            raise ConfigurationError(
                'expected weight_cap with weighting="samples": about the most local steps that a '
                f'client takes in a round; got {weight_cap=}; set it, or weighting="equal"'
            )
        # Under the names of the arguments: NVFlare writes a job's configuration from them.
        self.key_holder = key_holder
        self.kit = kit
        self.task = task
        self.clip = clip
        self.bits = bits
        self.weighting = weighting
        self.weight_cap = weight_cap
        self.min_clients = min_clients
        self.max_clients = max_clients
        self.norm_check = norm_check
        self.privacy = privacy
        self.train_task = train_task
        self._noise = Privacy(**privacy) if privacy else None
        self._check = self._checked()
        self._lock = Lock()  # tasks are asked for, and answered, in many threads
        self._server: EmbeddedServer | None = None
        self._plan: Plan | None = None
        self._types: dict[str, np.dtype[Any]] = {}
        self._open: EmbeddedRound | None = None
        self._newest = 0  # number of the newest round that was opened
        self._judged: EmbeddedRound | None = None
        self._asked: tuple[str, ...] = ()  # whose uploads are in it, or were refused

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Follow the run: open rounds as their tasks go out, and close everything at its end."""
        super().handle_event(event_type, fl_ctx)
        try:
            if event_type == EventType.START_RUN:
                self._server = EmbeddedServer.load(path_of(self.kit, fl_ctx), self.key_holder)
            elif event_type == EventType.AFTER_TASK_DATA_FILTER:
                if fl_ctx.get_prop(FLContextKey.TASK_NAME) == self.train_task:
                    self._offer(fl_ctx)
            elif event_type == EventType.END_WORKFLOW:
                self._settle(fl_ctx)
            elif event_type == EventType.END_RUN:
                self._close()
        except SecaggError as error:
            # An exception would only be logged.
            self.system_panic(f"secagg: {error.reason}: {error}", fl_ctx)

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Take a client's answer; for ScatterAndGather.

        Returns:
            Whether it may be part of the sum; the log says why it may not.
        """
        self.fl_ctx = fl_ctx
        try:
            dxo = from_shareable(shareable)
        except ValueError:
            return self._take(None)
        return self._take(dxo.data)

    def accept_model(self, model: FLModel) -> bool:
        """Take a client's answer; for FedAvg. As :meth:`accept`."""
        return self._take(model.params)

    def aggregate_model(self) -> FLModel:
        """Close the round and return the mean of its updates.

        Returns:
            A model of kind ``DIFF``: the mean, of the types that the model's arrays have.

        Raises:
            RoundError: the round cannot be opened; says why.
            SecaggError: what else the key holder answered.
        """
        with self._lock:
            current, self._open = self._open, None
        if current is None:
            raise ClosedError(
                "expected a round with updates; no client has asked for its task; check the log "
                "for why"
            )
        try:
            conclusion = current.conclude()
        except SecaggError as error:
            _LOG.error("secagg: %s: %s", error.reason, error)
            raise
        self._judged = current
        self._asked = (*conclusion.contributors, *conclusion.refused)
        return self._aggregate(current, conclusion)

    def reset_stats(self) -> None:
        """Nothing: a round ends with its aggregate."""

    def _aggregate(self, current: EmbeddedRound, conclusion: Conclusion) -> FLModel:
        release, number = conclusion.release, current.context.id.round_number
        reasons = ", ".join(sorted(conclusion.refused.values()))
        _LOG.info(
            "secagg: round %d: %d contributors, %d refused%s, sha256=%s",
            number,
            release.contributors,
            len(conclusion.refused),
            reasons and f" ({reasons})",
            release.sha256,
        )
        mean = {name: value.astype(self._types[name]) for name, value in release.mean().items()}
        return FLModel(params_type=ParamsType.DIFF, params=mean, meta={SHA256: release.sha256})

    def _offer(self, fl_ctx: FLContext) -> None:
        """Put into a client's task what it needs to take part, and the verdict on its last part."""
        task: Shareable = fl_ctx.get_prop(FLContextKey.TASK_DATA)
        current = self._opened(task, fl_ctx)
        keys = self._keys(fl_ctx.get_peer_context().get_identity_name())
        offers = {key.hex(): current.offer(key) for key in keys} if current else {}
        task.set_header(OFFERS, offers)
        task.set_header(NOTICES, self._notices(keys))

    def _settle(self, fl_ctx: FLContext) -> None:
        """Show the clients of the last round their verdicts, which no other task will bring."""
        engine = fl_ctx.get_engine()
        for name in self._asked:
            if notices := self._notices(self._keys(name)):
                message = Shareable()
                message.set_header(NOTICES, notices)
                engine.send_aux_request([name], NOTICES, message, _SETTLE_S, fl_ctx, optional=True)

    def _keys(self, name: str) -> tuple[bytes, ...]:
        """The signing keys of a client; none if it may not take part, which is its own trouble."""
        try:
            return self._running().roster.require(name).signing_keys
        except IdentityError as error:
            _LOG.warning("secagg: a client is left out: %s: %s", error.reason, error)
            return ()

    def _notices(self, keys: tuple[bytes, ...]) -> dict[str, bytes]:
        """The verdicts of the last round on what was signed with these keys."""
        found: dict[str, bytes] = {}
        if (judged := self._judged) is not None:
            for key in keys:
                with contextlib.suppress(ClosedError):  # nothing of it was judged
                    found[key.hex()] = judged.notice(key)
        return found

    def _opened(self, task: Shareable, fl_ctx: FLContext) -> EmbeddedRound | None:
        """The round of a task, opened with the first client that asks for it; None once it is over.

        NVFlare may hand out a task in one thread while it closes the round in another.
        """
        number = round_of(task)
        with self._lock:
            if number == self._newest:
                return self._open
            if self._open is not None:
                self._open.abandon()
            model = floats(from_shareable(task).data)
            if self._plan is None:
                self._plan = self._planned(model)
                self._types = {name: value.dtype for name, value in model.items()}
            self._open = self._running().open(
                self._plan,
                task_id=job_of(self.task, fl_ctx),
                round_number=number,
                model=model,
            )
            self._newest = number
            return self._open

    def _planned(self, model: dict[str, Any]) -> Plan:
        tensors = tuple(TensorSpec(name, value.shape) for name, value in model.items())
        weighted = self.weighting == "samples"
        segment = FloatSegment(
            "update",
            tensors,
            self.clip,
            self.bits,
            self.weighting,
            self.weight_cap if weighted else 1,
        )
        enrolled = len(self._running().roster.active())
        return make_plan(
            [segment],
            min_clients=self.min_clients,
            max_clients=self.max_clients or max(enrolled, self.min_clients),
            norm_check=self._check,
            privacy=self._noise,
        )

    def _checked(self) -> NormCheck | None:
        if isinstance(self.norm_check, dict):
            return NormCheck(**self.norm_check)
        if not self.norm_check:
            return None
        return NormCheck(margin=PRIVATE_MARGIN) if self._noise else NormCheck()

    def _running(self) -> EmbeddedServer:
        if self._server is None:
            raise RoundError("expected a connection to the key holder; the run has none")
        return self._server

    def _take(self, data: object) -> bool:
        with self._lock:
            current = self._open
        try:
            if current is None:
                raise ClosedError("expected an open round; this one is over")
            current.add(upload_in(data))
        except SecaggError as error:
            _LOG.warning("secagg: refused an update: %s: %s", error.reason, error)
            return False
        return True

    def _close(self) -> None:
        with self._lock:
            if self._open is not None:
                self._open.abandon()
            if self._server is not None:
                self._server.close()
            self._open = self._judged = self._server = None
