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

import contextlib
import mmap
import os
import struct
import tempfile
import threading
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import tenseal.sealapi as seal
import zstandard
from numpy.typing import NDArray

from secagg.parameters import MODULUS, RING_DEGREE

__all__ = [
    "CONTEXT",
    "EVALUATOR",
    "Ciphertext",
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
]

Residues = NDArray[np.uint64]
Integers = NDArray[np.int64]
Ciphertext = seal.Ciphertext

# SEAL ciphertexts hold at most 16 polynomials and at least 2. One is kept for a constant, so that
# a batch of one is allowed and SEAL never sees an all-zero ("transparent") ciphertext.
_BATCH = 15

_HEADER = struct.Struct("<HBBBBHQ")  # magic, header size, version, compression, reserved, total
_MAGIC, _VERSION = 0xA15E, (4, 3)
_UNCOMPRESSED, _ZSTD = 0, 2
_SHAPE = struct.Struct("<4QBQQQdQ")  # parms id, NTT form, polynomials, N, primes, scale, correction
_RESIDUES_AT = _SHAPE.size + _HEADER.size + 8
_INBOX_BYTES = _HEADER.size + _RESIDUES_AT + 8 * RING_DEGREE * (_BATCH + 1)


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


class _Inbox:
    """A file that SEAL can read by name, written in place. Secrets pass through it, and never stay.

    Attributes:
        path: its name.
    """

    def __init__(self) -> None:
        self._descriptor, self.path = _scratch_file()
        os.ftruncate(self._descriptor, _INBOX_BYTES)
        self._map = mmap.mmap(self._descriptor, _INBOX_BYTES)

    @contextlib.contextmanager
    def holding(self, head: bytes, polynomials: int) -> Iterator[Residues]:
        """A file that begins with ``head``; its polynomials are for the caller to write.

        Yields:
            uint64 (polynomials, 4096), which is wiped in the end.
        """
        self._map[: len(head)] = head
        size = polynomials * RING_DEGREE
        # SEAL's heads are not of whole words: numpy writes to such places, if a little slower.
        residues = np.frombuffer(self._map, "<u8", size, len(head)).reshape(-1, RING_DEGREE)
        try:
            yield residues
        finally:
            residues.fill(0)

    def __del__(self) -> None:
        os.close(self._descriptor)


class _Outbox:
    """A file that SEAL can write by name."""

    def __init__(self) -> None:
        self._descriptor, self.path = _scratch_file()

    def take(self) -> bytes:
        data = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        self.clear()
        return data

    def clear(self) -> None:
        os.ftruncate(self._descriptor, 0)

    def __del__(self) -> None:
        os.close(self._descriptor)


def _scratch_file() -> tuple[int, str]:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("secagg")
        return descriptor, f"/proc/self/fd/{descriptor}"
    return tempfile.mkstemp()  # pragma: no cover - not on Linux


class _Scratch(threading.local):
    """Scratch files of each thread of each process.

    A forked child shares its parent's open files: two processes that wrote to one scratch file
    could encrypt under each other's keys.
    """

    def __init__(self) -> None:
        self._owner = 0

    def _own(self) -> None:
        if self._owner != os.getpid():
            self._owner, self._inbox, self._outbox = os.getpid(), _Inbox(), _Outbox()

    @property
    def inbox(self) -> _Inbox:
        self._own()
        return self._inbox

    @property
    def outbox(self) -> _Outbox:
        self._own()
        return self._outbox


_SCRATCH = _Scratch()


def _header(total: int) -> bytes:
    return _HEADER.pack(_MAGIC, _HEADER.size, *_VERSION, _UNCOMPRESSED, 0, total)


@lru_cache(maxsize=64)
def _ciphertext_head(polynomials: int, *, ntt: bool) -> bytes:
    """SEAL's file format of a ciphertext, up to its polynomials."""
    count = polynomials * RING_DEGREE
    shape = _SHAPE.pack(*_PARMS_ID, ntt, polynomials, RING_DEGREE, 1, 1.0, 1)
    array = _header(_HEADER.size + 8 + 8 * count) + struct.pack("<Q", count)
    total = _HEADER.size + len(shape) + len(array) + 8 * count
    return _header(total) + shape + array


def load(polynomials: Integers | Residues, *, ntt: bool, constant: bool = True) -> seal.Ciphertext:
    """A SEAL ciphertext that consists of these polynomials.

    Args:
        polynomials: (count, 4096), 1 to 15 of them: in SEAL's NTT form, uint64 below q; otherwise
            int64, magnitudes below q.
        ntt: which of the two.
        constant: whether a last one follows that is never zero, as `dump` expects. It is for SEAL's
            sake, which refuses ciphertexts of one polynomial, or of zeros.

    Raises:
        RuntimeError: SEAL refuses them; a residue is q or more.
    """
    ciphertext, inbox, count = seal.Ciphertext(), _SCRATCH.inbox, polynomials.shape[0]
    parts = count + constant
    with inbox.holding(_ciphertext_head(parts, ntt=ntt), parts) as residues:
        if ntt:
            residues[:count] = polynomials
        else:
            lift(polynomials.view(np.int64), out=residues[:count])
        residues[count:] = 1
        ciphertext.load(CONTEXT, inbox.path)
    return ciphertext


def dump(ciphertext: seal.Ciphertext) -> Residues:
    """What `load` loaded: uint64 (count, 4096), below q, without the last one; not writable."""
    outbox = _SCRATCH.outbox
    ciphertext.save(outbox.path)
    stored = outbox.take()
    magic, size, _, _, compression, _, total = _HEADER.unpack_from(stored)
    if magic != _MAGIC or total != len(stored) or compression not in (_UNCOMPRESSED, _ZSTD):
        raise RuntimeError("SEAL wrote a file of an unknown format; is tenseal 0.3.18 installed?")
    body: bytes | memoryview = memoryview(stored)[size:]
    if compression == _ZSTD:
        most = _RESIDUES_AT + 8 * ciphertext.size() * RING_DEGREE
        body = zstandard.ZstdDecompressor().decompress(body, max_output_size=most)
    return np.frombuffer(body, "<u8", offset=_RESIDUES_AT).reshape(-1, RING_DEGREE)[:-1]


def plaintext(polynomial: Residues) -> seal.Plaintext:
    """One polynomial in NTT form as a SEAL plaintext of scale 1."""
    array = _header(_HEADER.size + 8 + 8 * polynomial.size) + struct.pack("<Q", polynomial.size)
    shape = struct.pack("<4QQd", *_PARMS_ID, polynomial.size, 1.0)
    head = _header(_HEADER.size + len(shape) + len(array) + 8 * polynomial.size) + shape + array
    plain, inbox = seal.Plaintext(), _SCRATCH.inbox
    with inbox.holding(head, 1) as residues:
        residues[0] = polynomial
        plain.load(CONTEXT, inbox.path)
    return plain


def lift(coefficients: Integers, out: Residues | None = None) -> Residues:
    """Signed coefficients of magnitude below q as residues, in ``out`` where it is given."""
    negative = coefficients >> np.int64(63)  # all bits where it is negative
    negative &= np.int64(MODULUS)
    out = np.empty(coefficients.shape, dtype=np.uint64) if out is None else out
    np.add(coefficients, negative, out=out.view(np.int64))
    return out


def centre(residues: Residues) -> Integers:
    """Residues as signed integers in (-q/2, q/2)."""
    above = (residues > np.uint64(MODULUS // 2)).astype(np.int64)
    above *= -MODULUS
    above += residues.view(np.int64)
    return above


def batches(blocks: int) -> Iterator[slice]:
    """Slices of so many polynomials as fit into one SEAL ciphertext with a constant."""
    return (slice(at, min(at + _BATCH, blocks)) for at in range(0, blocks, _BATCH))


def to_ntt(polynomials: Integers) -> Residues:
    """Exact NTT of signed integer polynomials.

    Args:
        polynomials: int64 of shape (blocks, 4096), magnitudes below q.

    Returns:
        uint64 of the same shape: SEAL's NTT form, below q.
    """
    out = np.empty(polynomials.shape, dtype=np.uint64)
    for batch in batches(polynomials.shape[0]):
        ciphertext = load(polynomials[batch], ntt=False)
        EVALUATOR.transform_to_ntt_inplace(ciphertext)
        out[batch] = dump(ciphertext)
    return out


def from_ntt(residues: Residues) -> Integers:
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
        ciphertext = load(residues[batch], ntt=True)
        EVALUATOR.transform_from_ntt_inplace(ciphertext)
        out[batch] = dump(ciphertext)
    return out
