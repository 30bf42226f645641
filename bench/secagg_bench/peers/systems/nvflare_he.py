"""NVIDIA FLARE's homomorphic encryption, by its own classes, without its network.

A client's update goes through `HEModelEncryptor` and `fobs`; the server reads it with `fobs` and
`HEInTimeAccumulateWeightedAggregator` takes it in and, at the end, divides the encrypted sum by the
weights; `serialize_nested_dict` and `fobs` make of that what goes out, and `HEModelDecryptor` opens
it. Keys are those of `HEBuilder`. Left out: provisioning and the signatures of its files (the
contexts are read by its own `SecurityContentService`, in its insecure mode), the model that its
`HEModelShareableGenerator` adds the mean to on the server, and all of its transport.

What travels for a layer of an upload, by `app_opt.he.decomposers.CKKSVectorDecomposer`: the vector
**and the client's TenSEAL context**, with public and relinearisation keys and without the secret
key. The server makes a context of each. On its way out a mean is bytes (`serialize_nested_dict`),
and every client reads it with the context that it has. ``ship_context=False`` treats uploads just
so, by the same functions of theirs. NVFlare 2.9 does not do that; it is what its uploads would cost
without these contexts.

Keys are for all rounds, and **every client has the secret key**: "opening" is what each client
does. `HEBuilder` has clients encrypt with it, which costs less than with a public key. Weights are
one; a client multiplies its values by its own, as NVFlare has it do before it encrypts.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from secagg_bench.peers.worker import Clock

_CLIENT_FILE, _SERVER_FILE = "client_context.tenseal", "server_context.tenseal"


class System:
    """One federation.

    Args:
        ship_context: whether each layer of an upload carries a context, as with NVFlare it does.
    """

    DISTRIBUTIONS: ClassVar = ("nvflare", "tenseal", "protobuf")

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        clients: int,
        clock: Clock,
        *,
        ship_context: bool = True,
    ) -> None:
        from nvflare.apis.event_type import EventType
        from nvflare.apis.utils.decomposers import flare_decomposers
        from nvflare.app_common.decomposers import common_decomposers
        from nvflare.app_opt.he.homomorphic_encrypt import load_tenseal_context_from_workspace
        from nvflare.app_opt.he.intime_accumulate_model_aggregator import (
            HEInTimeAccumulateWeightedAggregator,
        )
        from nvflare.app_opt.he.model_decryptor import HEModelDecryptor
        from nvflare.app_opt.he.model_encryptor import HEModelEncryptor
        from nvflare.fuel.sec.security_content_service import SecurityContentService
        from nvflare.fuel.utils import fobs
        from nvflare.lighter.impl.he import HEBuilder

        logging.disable(logging.CRITICAL)  # saying what happens is not its work
        flare_decomposers.register()
        common_decomposers.register()
        self._fobs: Any = fobs
        self._shapes, self._clock, self._ships = shapes, clock, ship_context
        builder = HEBuilder()
        builder.initialize(None, None)
        server = _context("server")
        with tempfile.TemporaryDirectory() as folder:
            for file, is_client in ((_CLIENT_FILE, True), (_SERVER_FILE, False)):
                Path(folder, file).write_bytes(builder.get_serialized_context(is_client))
            SecurityContentService.initialize(folder)
            self._encryptor, self._decryptor = HEModelEncryptor(), HEModelDecryptor()
            for each in (self._encryptor, self._decryptor):
                each.handle_event(EventType.START_RUN, _context("client"))
            self._server_context = load_tenseal_context_from_workspace(_SERVER_FILE, server)
        self._aggregator = HEInTimeAccumulateWeightedAggregator()
        self._aggregator.handle_event(EventType.START_RUN, server)
        self._server, self._number = server, 0

    def round(self) -> None:
        """Another number, and no sum yet; keys stay."""
        from nvflare.app_common.app_constant import AppConstants

        self._number += 1
        for each in self._aggregator.dxo_aggregators.values():
            each.reset_aggregation_helper()
        self._server.set_prop(AppConstants.CURRENT_ROUND, self._number)

    def client(self, number: int, update: Mapping[str, NDArray[np.float32]]) -> list[bytes]:
        """The filter, and one message."""
        from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
        from nvflare.app_opt.he.homomorphic_encrypt import serialize_nested_dict

        meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: 1}
        result = DXO(DataKind.WEIGHT_DIFF, data=dict(update), meta=meta).to_shareable()
        encrypted = self._encryptor.process(result, _context(_site(number)))
        if not self._ships:
            dxo = from_shareable(encrypted)
            serialize_nested_dict(dxo.data)
            encrypted = dxo.update_shareable(encrypted)
        return [self._fobs.dumps(encrypted)]

    def add(self, number: int, messages: list[bytes]) -> None:
        """What is no result of this round is refused; SEAL looks at each ciphertext."""
        from nvflare.apis.dxo import from_shareable
        from nvflare.apis.fl_constant import ReservedKey
        from nvflare.app_common.app_constant import AppConstants
        from nvflare.app_opt.he.homomorphic_encrypt import deserialize_nested_dict

        with self._clock.part("parse"):
            result = self._fobs.loads(messages[0])
            if not self._ships:
                dxo = from_shareable(result)
                deserialize_nested_dict(dxo.data, self._server_context)
                result = dxo.update_shareable(result)
        # What its transport and controller add to a result, by which the aggregator knows it.
        result.set_peer_props({ReservedKey.IDENTITY_NAME: _site(number)})
        result.add_cookie(AppConstants.CONTRIBUTION_ROUND, self._number)
        if not self._aggregator.accept(result, self._server):
            raise RuntimeError("expected NVFlare's aggregator to accept an update; it refused")

    def hand_over(self) -> list[bytes]:
        """Division by the weights is part of it: a product of each ciphertext and a number."""
        from nvflare.apis.dxo import from_shareable
        from nvflare.app_opt.he.homomorphic_encrypt import serialize_nested_dict

        dxo = from_shareable(self._aggregator.aggregate(self._server))
        serialize_nested_dict(dxo.data)
        return [self._fobs.dumps(dxo.to_shareable())]

    def open(self, messages: list[bytes]) -> dict[str, NDArray[Any]]:
        """The mean, float64."""
        from nvflare.apis.dxo import from_shareable

        with self._clock.part("parse"):
            result = self._fobs.loads(messages[0])
        opened = from_shareable(self._decryptor.process(result, _context("client"))).data
        return {
            name: np.asarray(opened[name]).reshape(shape) for name, shape in self._shapes.items()
        }


def _site(number: int) -> str:
    return f"site-{number}"


def _context(peer: str) -> Any:  # noqa: ANN401 - NVFlare has no types
    """A context of NVFlare's: not its secure mode, and somebody of this name on the other side."""
    from nvflare.apis.fl_constant import FLContextKey, ReservedKey
    from nvflare.apis.fl_context import FLContext

    context, other = FLContext(), FLContext()
    context.set_prop(FLContextKey.SECURE_MODE, False)
    other.set_prop(ReservedKey.IDENTITY_NAME, peer)
    context.set_peer_context(other)
    return context
