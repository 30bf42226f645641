"""Tensors in ``.npz`` files, read without trusting them: no pickles, one clear error."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secagg.errors import InputError

__all__ = ["read_npz"]

# A flipped bit in its flags makes an archive look encrypted, or of an unknown kind.
_DAMAGED = (OSError, ValueError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)


def read_npz(file: Path) -> dict[str, NDArray[Any]]:
    """Every array of an archive, by name.

    Raises:
        InputError: not readable, not an archive of arrays, or one that holds Python objects.
    """
    try:
        # From memory, because numpy leaves the file open when it is not an archive.
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except _DAMAGED as error:
        raise InputError(f"expected an .npz file of arrays; {file}: {error}") from None
