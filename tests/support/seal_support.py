"""What tests need of SEAL beyond the library: a key of one's own making, plaintexts, embeddings."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import numpy as np
import tenseal.sealapi as seal
import zstandard
from numpy.typing import NDArray

from secagg import ring
from secagg.parameters import MODULUS, RING_DEGREE

Residues = NDArray[np.uint64]

_HEADER = struct.Struct("<HBBBBHQ")
_PLAINTEXT_RESIDUES_AT = 48 + 24  # parms id, count, scale; header and length of the array


def _header(total: int) -> bytes:
    return _HEADER.pack(0xA15E, 16, 4, 3, 0, 0, total)


def plaintext_file(residues: Residues, scale: float = 1.0) -> bytes:
    """SEAL's file of a plaintext in NTT form; a secret key's file is the same."""
    data = np.ascontiguousarray(residues, dtype="<u8").tobytes()
    array = _header(24 + len(data)) + struct.pack("<Q", residues.size) + data
    body = struct.pack("<4QQd", *ring.CONTEXT.first_parms_id(), residues.size, scale) + array
    return _header(16 + len(body)) + body


def secret_key(residues: Residues) -> seal.SecretKey:
    """A SEAL secret key from a polynomial in NTT form."""
    key = seal.SecretKey()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "key")
        path.write_bytes(plaintext_file(residues))
        key.load(ring.CONTEXT, str(path))
    return key


def plaintext(residues: Residues, scale: float = 1.0) -> seal.Plaintext:
    """A SEAL plaintext from a polynomial in NTT form."""
    plain = seal.Plaintext()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plain")
        path.write_bytes(plaintext_file(residues, scale))
        plain.load(ring.CONTEXT, str(path))
    return plain


def plaintext_residues(plain: seal.Plaintext) -> Residues:
    """The residues of a SEAL plaintext."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plain")
        plain.save(str(path))
        stored = path.read_bytes()
    body = stored[16:]
    if stored[5] == 2:
        body = zstandard.ZstdDecompressor().decompressobj().decompress(body)
    return np.frombuffer(body, dtype="<u8", offset=_PLAINTEXT_RESIDUES_AT)


def ciphertext(first: Residues, second: Residues) -> seal.Ciphertext:
    """An ordinary two-part CKKS ciphertext (c, a) in NTT form."""
    return ring.load(np.stack([first, second]), ntt=True, constant=False)


def root_of_unity() -> int:
    """SEAL's choice: the smallest primitive 2N-th root of unity modulo q."""
    order = 2 * RING_DEGREE
    generator = next(
        g
        for base in range(2, 1000)
        if pow(g := pow(base, (MODULUS - 1) // order, MODULUS), order // 2, MODULUS) == MODULUS - 1
    )
    square = generator * generator % MODULUS
    root = smallest = generator
    for _ in range(RING_DEGREE):
        smallest = min(smallest, root)
        root = root * square % MODULUS
    return smallest


def evaluations(polynomial: dict[int, int]) -> list[int]:
    """Exact NTT of a sparse polynomial in SEAL's order, with Python integers."""
    psi = root_of_unity()
    powers = [1]
    for _ in range(2 * RING_DEGREE - 1):
        powers.append(powers[-1] * psi % MODULUS)
    bits = RING_DEGREE.bit_length() - 1
    out = []
    for slot in range(RING_DEGREE):
        exponent = 2 * int(f"{slot:0{bits}b}"[::-1], 2) + 1
        terms = (c * powers[k * exponent % (2 * RING_DEGREE)] for k, c in polynomial.items())
        out.append(sum(terms) % MODULUS)
    return out


def negacyclic(first: dict[int, int], second: dict[int, int]) -> list[int]:
    """Schoolbook product of sparse polynomials modulo X^N + 1 and q, centred, Python integers."""
    out = [0] * RING_DEGREE
    for i, a in first.items():
        for j, b in second.items():
            sign = -1 if i + j >= RING_DEGREE else 1
            out[(i + j) % RING_DEGREE] += sign * a * b
    return [(value + MODULUS // 2) % MODULUS - MODULUS // 2 for value in out]


def dense(polynomial: dict[int, int]) -> NDArray[np.int64]:
    """A sparse polynomial as an array of shape (1, N)."""
    out = np.zeros((1, RING_DEGREE), dtype=np.int64)
    for index, value in polynomial.items():
        out[0, index] = value
    return out


def canonical_embedding(coefficients: NDArray[np.int64]) -> NDArray[np.complex128]:
    """z_i = sum_k m_k zeta^(k 3^i), zeta = exp(i pi / N): one twisted FFT, then a permutation."""
    k = np.arange(RING_DEGREE)
    twisted = coefficients * np.exp(1j * np.pi * k / RING_DEGREE)
    # ifft * N evaluates at zeta^(2 t + 1) for t = 0 .. N - 1.
    values = np.fft.ifft(twisted) * RING_DEGREE
    exponents = [pow(3, i, 2 * RING_DEGREE) for i in range(RING_DEGREE // 2)]
    return values[[(e - 1) // 2 for e in exponents]]
