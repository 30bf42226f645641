"""Why releases are integers: CKKS decryptions published as floats give the secret key away.

Li and Micciancio (eprint 2020/1533), against TenSEAL as it is commonly used: N = 8192, primes of
60, 40 and 40 bits, scale 2**40, public-key encryption, sums of two uploads, and the real parts of
the slots published as float64. Two such sums determine the key by a linear system of two unknowns
for each pair of conjugate evaluation points.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import numpy as np
import tenseal.sealapi as seal
import zstandard
from numpy.typing import NDArray

DEGREE, SLOTS, SCALE = 8192, 4096, 2.0**40


def stored_residues(item: object, primes: int) -> NDArray[np.uint64]:
    """The residues at the end of SEAL's file, uint64 (polynomials, primes, N)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "item")
        item.save(str(path))  # type: ignore[attr-defined]
        stored = path.read_bytes()
    body = stored[16:]
    if stored[5] == 2:
        body = zstandard.ZstdDecompressor().decompressobj().decompress(body)
    words = len(body) // 8 // (primes * DEGREE) * primes * DEGREE
    (count,) = struct.unpack_from("<Q", body, len(body) - 8 * words - 8)
    assert count == words
    return np.frombuffer(body, "<u8", offset=len(body) - 8 * words).reshape(-1, primes, DEGREE)


class Textbook:
    """A key holder that publishes float64 decryptions of sums."""

    def __init__(self) -> None:
        parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        parameters.set_poly_modulus_degree(DEGREE)
        moduli = seal.CoeffModulus.Create(DEGREE, [60, 40, 40])
        parameters.set_coeff_modulus(moduli)
        self.prime = moduli[0].value()
        self.context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
        keys = seal.KeyGenerator(self.context)
        public = seal.PublicKey()
        keys.create_public_key(public)
        self.secret = keys.secret_key()
        self.encryptor = seal.Encryptor(self.context, public)
        self.encoder = seal.CKKSEncoder(self.context)

    def sum_of(self, updates: list[NDArray[np.float64]]) -> seal.Ciphertext:
        total = None
        for update in updates:
            plain, sealed = seal.Plaintext(), seal.Ciphertext()
            self.encoder.encode(update.tolist(), SCALE, plain)
            self.encryptor.encrypt(plain, sealed)
            if total is None:
                total = sealed
            else:
                seal.Evaluator(self.context).add_inplace(total, sealed)
        return total

    def publish(self, total: seal.Ciphertext) -> NDArray[np.float64]:
        plain = seal.Plaintext()
        seal.Decryptor(self.context, self.secret).decrypt(total, plain)
        return np.array(self.encoder.decode_double(plain))


def conjugate_slots() -> NDArray[np.int64]:
    """For each evaluation point psi**(2 brev(t) + 1), the place of its inverse."""
    bits = DEGREE.bit_length() - 1
    order = np.array([int(f"{t:0{bits}b}"[::-1], 2) for t in range(DEGREE)])
    place = np.empty(DEGREE, dtype=np.int64)
    place[order] = np.arange(DEGREE)
    return place[DEGREE - 1 - order]  # 2N - (2 b + 1) = 2 (N - 1 - b) + 1


def attack(
    textbook: Textbook, sums: list[seal.Ciphertext], published: list[NDArray[np.float64]]
) -> list[int]:
    """The key's evaluations modulo the first prime, from public data alone."""
    q, mirror = textbook.prime, conjugate_slots()
    rows = []
    for total, floats in zip(sums, published, strict=True):
        first, second = stored_residues(total, 2)[:, 0, :]
        # Real slots are those of m + conj(m), halved: an exact integer polynomial after rounding.
        plain = seal.Plaintext()
        textbook.encoder.encode((2 * floats).tolist(), SCALE, plain)
        known = stored_residues(plain, 2)[0, 0, :]
        right = [
            (int(u) - int(c) - int(d)) % q
            for u, c, d in zip(known, first, first[mirror], strict=True)
        ]
        rows.append((second.tolist(), second[mirror].tolist(), right))
    (a1, b1, r1), (a2, b2, r2) = rows
    return [
        (r1[t] * b2[t] - r2[t] * b1[t]) * pow(a1[t] * b2[t] - a2[t] * b1[t], -1, q) % q
        for t in range(DEGREE)
    ]


def test_two_published_sums_give_every_word_of_the_key() -> None:
    textbook = Textbook()
    drawn = np.random.default_rng(1)
    sums = [
        textbook.sum_of([drawn.standard_normal(SLOTS) * 0.01 for _ in range(2)]) for _ in range(2)
    ]
    published = [textbook.publish(total) for total in sums]
    recovered = attack(textbook, sums, published)
    assert recovered == stored_residues(textbook.secret, 3)[0, 0, :].tolist()
    # Rounded to eight decimals, the same floats no longer determine it.
    rounded = [np.round(floats, 8) for floats in published]
    other = attack(textbook, sums, rounded)
    assert sum(a == b for a, b in zip(other, recovered, strict=True)) < 10
