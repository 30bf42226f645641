"""The only module that touches TenSEAL: polynomials modulo q, into SEAL's NTT form and back.

Coefficients go in and out as exact integers: SEAL's own NTT carries them between coefficient and
evaluation form, so there is no floating-point error at all (docs/decisions/0003-exact-encoding.md).
Nothing here knows what a polynomial means, a key or a message: see `ckks` for that.

TenSEAL never sees bytes from the network: arrays come from `residues.widen`, which has checked
each residue, and SEAL's file header is written here, from trusted constants. SEAL reads and writes
by path only; on Linux an anonymous memory file is one. Every call holds the GIL for a few
milliseconds at most (15 polynomials).
"""

from __future__ import annotations

import os
import struct
import tempfile
import threading
from collections.abc import Iterator

import numpy as np
import tenseal.sealapi as seal
import zstandard
from numpy.typing import NDArray

from secagg.parameters import MODULUS, RING_DEGREE

__all__ = [
    "CONTEXT",
    "EVALUATOR",
    "Residues",
    "batches",
    "centre",
    "coefficients",
    "dump",
    "from_ntt",
    "lift",
    "load",
    "plaintext",
    "to_ntt",
    "with_constant",
]

Residues = NDArray[np.uint64]

# SEAL ciphertexts hold at most 16 polynomials and at least 2. One is kept for a constant, so that
# a batch of one is allowed and SEAL never sees an all-zero ("transparent") ciphertext.
_BATCH = 15

_HEADER = struct.Struct("<HBBBBHQ")  # magic, header size, version, compression, reserved, total
_MAGIC, _VERSION = 0xA15E, (4, 3)
_UNCOMPRESSED, _ZSTD = 0, 2
_SHAPE = struct.Struct("<4QBQQQdQ")  # parms id, NTT form, polynomials, N, primes, scale, correction
_RESIDUES_AT = _SHAPE.size + _HEADER.size + 8


def _context() -> seal.SEALContext:
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(RING_DEGREE)
    parameters.set_coeff_modulus([seal.Modulus(MODULUS)])
    # SEAL itself refuses parameters below its 256-bit table here.
    context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC256)
    if not context.parameters_set():
        raise RuntimeError(f"SEAL refused the ring: {context.parameters_error_message()}")
    return context


CONTEXT = _context()
_PARMS_ID = CONTEXT.first_parms_id()
EVALUATOR = seal.Evaluator(CONTEXT)


class _ScratchFile:
    """A file that SEAL can open by name. Secrets pass through it, and never stay."""

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self._descriptor = os.memfd_create("secagg")
            self.path = f"/proc/self/fd/{self._descriptor}"
        else:  # pragma: no cover - not on Linux
            self._descriptor, self.path = tempfile.mkstemp()

    def put(self, data: bytes) -> str:
        self.clear()
        os.pwrite(self._descriptor, data, 0)
        return self.path

    def take(self) -> bytes:
        data = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        self.clear()
        return data

    def clear(self) -> None:
        os.ftruncate(self._descriptor, 0)

    def __del__(self) -> None:
        os.close(self._descriptor)


class _Scratch(threading.local):
    """One scratch file for each thread of each process.

    A forked child shares its parent's open files: two processes that wrote to one scratch file
    could encrypt under each other's keys.
    """

    def __init__(self) -> None:
        self._owner, self._file = os.getpid(), _ScratchFile()

    @property
    def file(self) -> _ScratchFile:
        if self._owner != os.getpid():
            self._owner, self._file = os.getpid(), _ScratchFile()
        return self._file


_SCRATCH = _Scratch()


def _serialised(polynomials: Residues, *, ntt: bool) -> bytes:
    """SEAL's file format of a ciphertext that consists of these polynomials."""
    data = np.ascontiguousarray(polynomials, dtype="<u8").tobytes()
    shape = _SHAPE.pack(*_PARMS_ID, ntt, polynomials.shape[0], RING_DEGREE, 1, 1.0, 1)
    array = _header(_HEADER.size + 8 + len(data)) + struct.pack("<Q", polynomials.size)
    return _header(_HEADER.size + len(shape) + len(array) + len(data)) + shape + array + data


def _header(total: int) -> bytes:
    return _HEADER.pack(_MAGIC, _HEADER.size, *_VERSION, _UNCOMPRESSED, 0, total)


def load(polynomials: Residues, *, ntt: bool) -> seal.Ciphertext:
    """A SEAL ciphertext that consists of these 2 to 16 polynomials, uint64 (count, 4096).

    Raises:
        RuntimeError: SEAL refuses them; a residue is q or more.
    """
    ciphertext, scratch = seal.Ciphertext(), _SCRATCH.file
    try:
        ciphertext.load(CONTEXT, scratch.put(_serialised(polynomials, ntt=ntt)))
    finally:
        scratch.clear()
    return ciphertext


def dump(ciphertext: seal.Ciphertext) -> Residues:
    """The polynomials of a SEAL ciphertext, uint64 (count, 4096), below q; not writable."""
    scratch = _SCRATCH.file
    ciphertext.save(scratch.path)
    stored = scratch.take()
    magic, size, _, _, compression, _, total = _HEADER.unpack_from(stored)
    if magic != _MAGIC or total != len(stored) or compression not in (_UNCOMPRESSED, _ZSTD):
        raise RuntimeError("SEAL wrote a file of an unknown format; is tenseal 0.3.18 installed?")
    body = stored[size:]
    if compression == _ZSTD:
        body = zstandard.ZstdDecompressor().decompressobj().decompress(body)
    return np.frombuffer(body, dtype="<u8", offset=_RESIDUES_AT).reshape(-1, RING_DEGREE)


def plaintext(polynomial: Residues) -> seal.Plaintext:
    """One polynomial in NTT form as a SEAL plaintext of scale 1."""
    data = np.ascontiguousarray(polynomial, dtype="<u8").tobytes()
    array = _header(_HEADER.size + 8 + len(data)) + struct.pack("<Q", polynomial.size)
    body = struct.pack("<4QQd", *_PARMS_ID, polynomial.size, 1.0) + array + data
    plain, scratch = seal.Plaintext(), _SCRATCH.file
    try:
        plain.load(CONTEXT, scratch.put(_header(_HEADER.size + len(body)) + body))
    finally:
        scratch.clear()
    return plain


def lift(coefficients: NDArray[np.int64]) -> Residues:
    """Signed coefficients of magnitude below q as residues."""
    return np.where(coefficients < 0, coefficients + MODULUS, coefficients).view(np.uint64)


def centre(residues: Residues) -> NDArray[np.int64]:
    """Residues as signed integers in (-q/2, q/2)."""
    signed = residues.astype(np.int64)
    return np.where(signed > MODULUS // 2, signed - MODULUS, signed)


def with_constant(polynomials: Residues) -> Residues:
    """These polynomials and a last one that is never zero, for SEAL's sake."""
    last = np.ones((1, RING_DEGREE), dtype=np.uint64)
    return np.concatenate([polynomials, last])


def batches(blocks: int) -> Iterator[slice]:
    """Slices of so many polynomials as fit into one SEAL ciphertext with a constant."""
    return (slice(at, min(at + _BATCH, blocks)) for at in range(0, blocks, _BATCH))


def to_ntt(polynomials: NDArray[np.int64]) -> Residues:
    """Exact NTT of signed integer polynomials.

    Args:
        polynomials: int64 of shape (blocks, 4096), magnitudes below q.

    Returns:
        uint64 of the same shape: SEAL's NTT form, below q.
    """
    out = np.empty(polynomials.shape, dtype=np.uint64)
    for batch in batches(polynomials.shape[0]):
        ciphertext = load(with_constant(lift(polynomials[batch])), ntt=False)
        EVALUATOR.transform_to_ntt_inplace(ciphertext)
        out[batch] = dump(ciphertext)[:-1]
    return out


def from_ntt(residues: Residues) -> NDArray[np.int64]:
    """The exact inverse of `to_ntt`.

    Args:
        residues: uint64 of shape (blocks, 4096) in NTT form, below q.

    Returns:
        int64 of the same shape: coefficients centred modulo q, magnitudes of at most (q - 1) / 2.
    """
    return centre(coefficients(residues))


def coefficients(residues: Residues) -> Residues:
    """The same, as residues: uint64 of the same shape, below q."""
    out = np.empty(residues.shape, dtype=np.uint64)
    for batch in batches(residues.shape[0]):
        ciphertext = load(with_constant(residues[batch]), ntt=True)
        EVALUATOR.transform_from_ntt_inplace(ciphertext)
        out[batch] = dump(ciphertext)[:-1]
    return out
