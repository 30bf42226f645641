"""What travels in NVFlare's messages, and what a model is in them.

Beside the model of a task travel, in headers, the round's offer and the verdict on the upload of
the round before, by the signing key that they are for. Back comes one DXO of kind ``WEIGHT_DIFF``
with the upload and nothing else. The last round's verdict comes by itself, before the job ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants

from secagg.errors import ConfigurationError, SchemaError

__all__ = [
    "ALGORITHM",
    "NOTICES",
    "OFFERS",
    "floats",
    "job_of",
    "path_of",
    "round_of",
    "sealed",
    "upload_in",
]

OFFERS = "secagg_offers"
"""Header of a task: offers of its round, bytes, by signing key in hexadecimal."""

NOTICES = "secagg_notices"
"""Header of a task: verdicts on the uploads of the round before, likewise. Also the topic of the
message that brings those of the last round."""

ALGORITHM = "secagg"
"""What ``MetaKey.PROCESSED_ALGORITHM`` says of an upload, to components that expect a model."""

_UPLOAD = "secagg"


def floats(tensors: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The arrays of floats among a model's arrays: what is summed. Integers stay as they are.

    Raises:
        SchemaError: something that is no numpy array, or of neither floats nor integers.
    """
    for name, value in tensors.items():
        if not isinstance(value, np.ndarray | np.generic):
            raise SchemaError(
                f"tensor {name!r}: expected a numpy array; got {type(value).__name__}; let clients "
                "and server exchange ExchangeFormat.NUMPY"
            )
        if value.dtype.kind not in "fiub":
            raise SchemaError(
                f"tensor {name!r}: expected floats or integers; got dtype={value.dtype}; convert it"
            )
    return {name: np.asarray(v) for name, v in tensors.items() if v.dtype.kind == "f"}


def sealed(upload: bytes, result: Shareable) -> Shareable:
    """The message that takes the place of a client's result: its upload, and its round.

    Nothing else of the result is in it: no metrics, and no number of steps.
    """
    meta = {MetaKey.PROCESSED_ALGORITHM: ALGORITHM}
    reply = DXO(DataKind.WEIGHT_DIFF, data={_UPLOAD: upload}, meta=meta).to_shareable()
    if (number := result.get_header(AppConstants.CURRENT_ROUND)) is not None:
        reply.set_header(AppConstants.CURRENT_ROUND, number)
    return reply


def upload_in(data: object) -> bytes:
    """The upload of a client's answer, from the data of its DXO.

    Raises:
        SchemaError: it is not what `SecaggEncryptor` sends.
    """
    upload = data.get(_UPLOAD) if isinstance(data, dict) and len(data) == 1 else None
    if not isinstance(upload, bytes):
        raise SchemaError(
            "expected an update that SecaggEncryptor has encrypted; got another one, which is "
            "dropped unread; add SecaggJoin to the task data filters of every client, and "
            "SecaggEncryptor to its task result filters"
        )
    return upload


def round_of(task: Shareable) -> int:
    """A round's number, from 1; NVFlare counts from 0.

    Raises:
        ConfigurationError: the task has no round.
    """
    number = task.get_header(AppConstants.CURRENT_ROUND)
    if not isinstance(number, int) or number < 0:
        raise ConfigurationError(
            f"expected a task with a round number in its header {AppConstants.CURRENT_ROUND!r}; "
            "it has none; use a controller that sets it, such as ScatterAndGather or FedAvg"
        )
    return number + 1


def job_of(task: str, fl_ctx: FLContext) -> str:
    """The task id of a run: the one configured, or the job's id."""
    return task or str(fl_ctx.get_job_id())


def path_of(path: str, fl_ctx: FLContext) -> Path:
    """A folder of a site: ``{site}`` is its name, and what is relative starts at its workspace."""
    given = Path(path.replace("{site}", fl_ctx.get_identity_name()))
    return given if given.is_absolute() else Path(fl_ctx.get_workspace().get_root_dir()) / given
