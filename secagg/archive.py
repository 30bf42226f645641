"""Tensors in ``.npz`` files, read without trusting them: no pickles, one clear error."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secagg.errors import InputError

__all__ = ["npz_of", "read_npz"]


def read_npz(file: Path) -> dict[str, NDArray[Any]]:
    """Every array of an archive, by name.

    Raises:
        InputError: not readable, not an archive of arrays, or one that holds Python objects.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"expected an .npz file of arrays; {file}: {error}") from None
    # From memory, because numpy leaves the file open when it is not an archive.
    return npz_of(data, str(file))


def npz_of(data: bytes, what: str) -> dict[str, NDArray[Any]]:
    """Every array of an archive in memory, by name.

    Args:
        what: names it in an error.

    Raises:
        InputError: not an archive of arrays, or one that holds Python objects.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    # Over damaged bytes numpy raises what its parts do: of zip files, of Python's own tokens, of
    # memory for a size that is written there.
    except Exception as error:
        raise InputError(f"expected an .npz file of arrays; {what}: {error}") from None
