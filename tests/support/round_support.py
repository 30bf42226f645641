"""One round in one process, for tests: key holder, uploads, server, release."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from secagg.aggregator import Aggregator
from secagg.context import RoundContext
from secagg.encryptor import encrypt_quantized
from secagg.keyholder import KeyHolder
from secagg.parameters import Plan
from secagg.quantize import Quantized
from secagg.receipts import Receipt, SigningKey
from secagg.release import Release
from secagg.upload import Admission, Upload

Values = Sequence[NDArray[np.int64]]


def raw_upload(context: RoundContext, parts: Values, identity: SigningKey | None = None) -> Upload:
    """An honest upload of these very integers, one array a segment, past the quantiser."""
    quantized = [Quantized(np.asarray(part, dtype=np.int64)) for part in parts]
    return encrypt_quantized(context, quantized, identity or SigningKey.generate())


def run_round(plan: Plan, clients: Sequence[Values]) -> Release:
    """Encrypt, add and release one set of integers for each client."""
    holder = KeyHolder(plan)
    server = Aggregator(holder.context)
    for parts in clients:
        assert server.add(raw_upload(holder.context, parts))
    return holder.release(server.aggregate())


def exact_sums(clients: Sequence[Values]) -> list[NDArray[np.int64]]:
    """What the release must say, in plain integers."""
    return [np.sum(np.stack(parts), axis=0) for parts in zip(*clients, strict=True)]


def resigned(upload: Upload, identity: SigningKey, sealed: bytes | None = None) -> Upload:
    """The same payload under a receipt of ``identity``, with another sealed seed if given."""
    receipt = upload.admission.receipt
    seed = sealed or upload.admission.sealed_seed
    fresh = Receipt.sign(identity, receipt.context, receipt.upload_digest, seed)
    return replace(upload, admission=Admission(fresh, seed))
