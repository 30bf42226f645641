"""Encryption and decryption under a one-time key: ordinary CKKS ciphertexts, exact integers.

One upload is, per block j, the polynomial ``c_j = -a_j s + e_j + m_j``; ``(c_j, a_j)`` is an
ordinary two-part CKKS ciphertext under the one-time key s. The arithmetic is SEAL's: see `ring`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from secagg import ring
from secagg.ring import Residues
from secagg.sampling import Stream, uniform_polynomials

__all__ = ["decrypt", "encrypt"]


def encrypt(coefficients: NDArray[np.int64], public: Residues, key: Residues) -> Residues:
    """``c_j = NTT(coefficients_j) - a_j s``: plaintext plus error, hidden by the one-time key.

    Args:
        coefficients: int64 of shape (blocks, 4096), plaintext plus error, magnitudes below q.
        public: uint64 (blocks, 4096), the public polynomials a_j in NTT form.
        key: uint64 (4096,), the one-time key in NTT form. One key, one message, ever.
    """
    out = np.empty(public.shape, dtype=np.uint64)
    key_plain = ring.plaintext(key)
    for batch in ring.batches(public.shape[0]):
        message = ring.load(coefficients[batch], ntt=False)
        ring.EVALUATOR.transform_to_ntt_inplace(message)
        mask = ring.load(public[batch], ntt=True)
        ring.EVALUATOR.multiply_plain_inplace(mask, key_plain)
        ring.EVALUATOR.sub_inplace(message, mask)
        out[batch] = ring.dump(message)
    return out


def decrypt(ciphertexts: Residues, public: Residues, key: Residues) -> NDArray[np.int64]:
    """``c_j + a_j s`` back in coefficient form: plaintext plus noise, centred modulo q.

    Args:
        ciphertexts: uint64 (blocks, 4096) in NTT form, below q.
        public: uint64 (blocks, 4096), the public polynomials a_j in NTT form.
        key: uint64 (4096,), the key, or the sum of the keys, in NTT form.

    Returns:
        int64 of shape (blocks, 4096). Secret until rounded to the grid: see `packing.unpack`.
    """
    out = np.empty(public.shape, dtype=np.int64)
    key_plain = ring.plaintext(key)
    for batch in ring.batches(public.shape[0]):
        mask = ring.load(public[batch], ntt=True)
        ring.EVALUATOR.multiply_plain_inplace(mask, key_plain)
        opened = ring.load(ciphertexts[batch], ntt=True)
        ring.EVALUATOR.add_inplace(opened, mask)
        veil, coefficients = _veil(opened.size() - 1)
        ring.EVALUATOR.add_inplace(opened, veil)
        ring.EVALUATOR.transform_from_ntt_inplace(opened)
        unveiled = ring.dump(opened).view(np.int64) - coefficients
        out[batch] = ring.centre(ring.lift(unveiled))
    return out


@lru_cache(maxsize=16)
def _veil(count: int) -> tuple[ring.Ciphertext, NDArray[np.int64]]:
    """A public polynomial that looks random: so often as a ciphertext, and its coefficients.

    SEAL compresses whatever it hands out, and takes three times as long over plaintext, in which
    there is something to be found, as over random residues. The veil hides nothing from anybody.
    """
    polynomial = uniform_polynomials(Stream.derive("veil"), 1)
    coefficients = ring.coefficients(polynomial).view(np.int64)
    return ring.load(np.repeat(polynomial, count, axis=0), ntt=True), coefficients
