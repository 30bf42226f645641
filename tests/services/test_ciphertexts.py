"""Low bits as the server makes them: the same for the same upload, and for no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from secagg.context import RoundContext
from secagg.keyholder import KeyHolder
from secagg.parameters import MODULUS, RING_DEGREE
from secagg.planner import plan_integers
from secagg_server.blobs import BlobStore
from secagg_server.ciphertexts import Ciphertexts, here

PLAN = plan_integers(100, max_clients=6, max_abs=100)
CONTEXT, ANOTHER = (KeyHolder(PLAN).context for _ in range(2))
SECRET = bytes(range(32))
RESIDUES = np.random.default_rng(1).integers(
    0, MODULUS, (PLAN.blocks, RING_DEGREE), dtype=np.uint64
)


def low_bits(
    folder: Path,
    *names: bytes,
    context: RoundContext = CONTEXT,
    secret: bytes = SECRET,
) -> NDArray[np.uint32]:
    """Of one and the same ciphertext, as if it were that of these uploads."""
    ciphertexts = Ciphertexts(BlobStore(folder), here, secret)
    return ciphertexts.low_bits(context, RESIDUES, *names)


def test_an_upload_has_the_same_dither_again(tmp_path: Path) -> None:
    first, again = (low_bits(tmp_path, b"1", b"2") for _ in range(2))
    assert np.array_equal(first, again)
    assert np.array_equal(first, low_bits(tmp_path, b"2", b"1"))


@pytest.mark.parametrize(
    ("names", "changed"),
    [
        ((b"2",), {}),
        ((b"1", b"2"), {}),
        ((b"1",), {"context": ANOTHER}),
        ((b"1",), {"secret": bytes(32)}),
    ],
    ids=["another upload", "a sum", "another attempt", "another server"],
)
def test_anything_else_has_another_dither(
    tmp_path: Path, names: tuple[bytes, ...], changed: dict[str, object]
) -> None:
    """Dithers that two uploads share cancel in their difference."""
    one = low_bits(tmp_path, b"1")
    other = low_bits(tmp_path, *names, **changed)  # type: ignore[arg-type]
    # Cover and dither agree at about three coefficients in ten.
    assert np.mean(one == other) < 0.4
