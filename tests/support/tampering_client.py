"""A client like any other, except that it flips one residue of every upload before signing it."""

from __future__ import annotations

from secagg import encryptor
from secagg.parameters import RESIDUE_BYTES

_narrow = encryptor.narrow


def _flipped(residues) -> bytes:  # type: ignore[no-untyped-def]  # noqa: ANN001
    data = bytearray(_narrow(residues))
    # The lowest bit of one residue: still below q, correctly signed, and wrong.
    data[5 * RESIDUE_BYTES] ^= 1
    return bytes(data)


if __name__ == "__main__":
    import sys

    from secagg_client.cli import app

    if "--silo" in sys.argv and sys.argv[sys.argv.index("--silo") + 1] == "1":
        encryptor.narrow = _flipped
    app()
