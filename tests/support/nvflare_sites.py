"""The custom code of a test's job: training that anybody can repeat, and one site that poisons."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.executor import Executor
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import (
    ModelLearnable,
    ModelLearnableKey,
    make_model_learnable,
)
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from secagg.context import RoundContext
from secagg.encryptor import encrypt_integers
from secagg.nvflare import SecaggEncryptor, SecaggJoin
from secagg.quantize import Quantized
from secagg.receipts import SigningKey
from secagg.sampling import Stream
from secagg.upload import Upload
from secagg_client import embedded
from secagg_client.repeatable import repeatable_rounding

SHAPES = {"dense.weight": (40, 25), "dense.bias": (40,)}
SEED = 11
POISONER = "site-4"


def number_of(site: str) -> int:
    """The same number for a site in every process."""
    return zlib.crc32(site.encode())


def initial() -> dict[str, Any]:
    """What training starts from; the counter is no float."""
    model: dict[str, Any] = {n: np.full(s, 0.25, np.float32) for n, s in SHAPES.items()}
    return model | {"norm.seen": np.array(3)}


def steps_of(site: str) -> int:
    """Local steps of a site."""
    return 10 + number_of(site) % 50


def trained(model: Mapping[str, Any], site: str, number: int) -> dict[str, Any]:
    """The model that a site makes of one, in a round from 0: a step towards what the site likes."""
    random = np.random.default_rng((number_of(site), number))
    after = {
        name: model[name] - (model[name] - random.normal(size=s).astype(np.float32)) / 64
        for name, s in SHAPES.items()
    }
    return after | {"norm.seen": model["norm.seen"] + 1}


class Persistor(ModelPersistor):
    """Starts from the initial model, and writes every next one."""

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        return make_model_learnable(initial(), {})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        number = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        np.savez(Path.cwd() / f"model-{number}.npz", **model[ModelLearnableKey.WEIGHTS])


class Recorder(FLComponent):
    """Writes what the aggregate of each round says of itself."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == AppEventType.AFTER_AGGREGATION:
            found = from_shareable(fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT))
            number = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
            with Path(self.file).open("a", encoding="utf-8") as log:
                log.write(json.dumps({"round": number, "meta": found.meta}) + "\n")


class Trainer(Executor):
    """Trains, and returns the whole model or the difference."""

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        site, number = fl_ctx.get_identity_name(), shareable.get_header(AppConstants.CURRENT_ROUND)
        model = from_shareable(shareable).data
        after = trained(model, site, number)
        meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: steps_of(site)}
        if number % 2:
            change = {name: after[name] - model[name] for name in after}
            return DXO(DataKind.WEIGHT_DIFF, data=change, meta=meta).to_shareable()
        return DXO(DataKind.WEIGHTS, data=after, meta=meta).to_shareable()


class RepeatableJoin(SecaggJoin):
    """Rounds so that the test can round the same."""

    def _rounding(self, fl_ctx: FLContext) -> Callable[[RoundContext], Stream]:
        silo = number_of(fl_ctx.get_identity_name())
        return lambda context: repeatable_rounding(SEED, silo, context.id.round_number)


class PoisonousEncryptor(SecaggEncryptor):
    """One site sends forty times its update, past the clipping, and properly signed."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        honest = embedded.encrypt_quantized

        def fortyfold(
            context: RoundContext, parts: Sequence[Quantized], key: SigningKey, commitment: bytes
        ) -> Upload:
            if fl_ctx.get_identity_name() != POISONER:
                return honest(context, parts, key, commitment)
            return encrypt_integers(context, [p.values * 40 for p in parts], key, commitment)

        embedded.encrypt_quantized = fortyfold
        try:
            return super().process(shareable, fl_ctx)
        finally:
            embedded.encrypt_quantized = honest
