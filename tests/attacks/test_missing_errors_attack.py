"""Ciphertexts without errors: who knows one block of a message divides the key out of it.

c = m - a s is one equation for each coefficient of s in NTT form, and a is public. Somebody who
knows what a single block holds (the last one is mostly padding; most items were bought by nobody)
solves for the key and reads all other blocks. Errors make it a sample of ring-LWE: the same
division gives noise.
"""

from __future__ import annotations

import numpy as np
import pytest
from attacker import Integers, Residues, coefficients, named, residues, signer, upload_under
from round_support import raw_upload

from secagg import ckks, ring
from secagg.keyholder import KeyHolder
from secagg.packing import unpack
from secagg.parameters import MODULUS, RING_DEGREE
from secagg.planner import plan_integers
from secagg.upload import Upload

PLAN = plan_integers(20_000, max_clients=6, max_abs=100)
(LAYOUT,) = PLAN.layouts
CONTEXT = KeyHolder(PLAN).context
BLOCK = LAYOUT.digits * RING_DEGREE
SECRET = np.random.default_rng(1).integers(-100, 100, LAYOUT.values, endpoint=True)


def divided(upload: Upload, known: Integers) -> Residues:
    """What a first block of which the message is known gives for the key, in NTT form."""
    message, sent = ring.to_ntt(known[None])[0], residues(upload)[0]
    public = CONTEXT.public_polynomials()[0]
    key = [
        (int(m) - int(c)) * pow(int(a), -1, MODULUS) % MODULUS
        for m, c, a in zip(message, sent, public, strict=True)
    ]
    return np.array(key, dtype=np.uint64)


def is_key(candidate: Residues) -> bool:
    """Keys are ternary; what is not one is not by a factor of 2**50."""
    return bool(np.abs(ring.from_ntt(candidate[None])).max() <= 1)


def test_one_known_block_of_a_ciphertext_without_errors_opens_all_others() -> None:
    silent = np.zeros((PLAN.blocks, RING_DEGREE), dtype=np.int64)
    upload = upload_under(CONTEXT, [SECRET], signer("victim"), named("seed"), silent)
    key = divided(upload, coefficients(PLAN, [SECRET])[0])
    assert is_key(key)
    opened = ckks.decrypt(residues(upload), CONTEXT.public_polynomials(), key)
    assert np.array_equal(unpack(LAYOUT, opened, 1)[BLOCK:], SECRET[BLOCK:])


@pytest.mark.parametrize("seed", range(3))
def test_ours_gives_no_key_whatever_of_the_message_is_known(seed: int) -> None:
    upload = raw_upload(CONTEXT, [np.roll(SECRET, seed)])
    assert not is_key(divided(upload, coefficients(PLAN, [np.roll(SECRET, seed)])[0]))
