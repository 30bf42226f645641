"""Our uploads are ordinary CKKS ciphertexts, and our arithmetic is that of Python integers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tenseal.sealapi as seal
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from round_support import raw_upload
from seal_support import (
    canonical_embedding,
    ciphertext,
    dense,
    negacyclic,
    plaintext,
    plaintext_residues,
    secret_key,
)

from secagg import ckks, onetime, ring
from secagg.keyholder import KeyHolder
from secagg.packing import pack
from secagg.parameters import MODULUS
from secagg.planner import plan_integers
from secagg.residues import ResidueSum, widen

# Never the zero polynomial: SEAL refuses to multiply by it, and no sum of honest keys is zero.
SPARSE = st.dictionaries(
    st.integers(0, 4095), st.integers(-(MODULUS - 1), MODULUS - 1), min_size=1, max_size=6
).filter(lambda polynomial: any(polynomial.values()))


def uniform(seed: int, blocks: int) -> NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(0, MODULUS, (blocks, 4096), dtype=np.uint64)


def small(seed: int, blocks: int, limit: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(-limit, limit, (blocks, 4096), endpoint=True)


def ternary_key(seed: int) -> NDArray[np.uint64]:
    return ring.to_ntt(small(seed, 1, 1))[0]


# --- one ciphertext, and sums of them -------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(first=SPARSE, second=SPARSE)
def test_products_equal_the_schoolbook_in_python_integers(
    first: dict[int, int], second: dict[int, int]
) -> None:
    public, key = ring.to_ntt(dense(first)), ring.to_ntt(dense(second))[0]
    nothing = np.zeros((1, 4096), dtype=np.uint64)
    expected = negacyclic(first, second)
    assert ckks.decrypt(nothing, public, key)[0].tolist() == expected
    # And encrypt(0) = -a s, in NTT form: opened by s, and unmasked where a is zero.
    masked = ckks.encrypt(np.zeros((1, 4096), np.int64), public, key)
    assert not ckks.decrypt(masked, public, key).any()
    wrapped = ckks.decrypt(masked, np.zeros((1, 4096), np.uint64), key)[0]
    assert (-wrapped).tolist() == expected


@pytest.mark.parametrize("blocks", [1, 2, 14, 15, 16, 30, 31])
def test_decrypt_undoes_encrypt_for_every_batch_size(blocks: int) -> None:
    message = small(blocks, blocks, MODULUS // 2)
    message[:, 0], message[:, -1] = MODULUS // 2, -(MODULUS // 2)
    public, key = uniform(blocks, blocks), ternary_key(1)
    sealed = ckks.encrypt(message, public, key)
    assert sealed.shape == (blocks, 4096)
    assert int(sealed.max()) < MODULUS
    assert np.array_equal(ckks.decrypt(sealed, public, key), message)
    alone = [ckks.encrypt(message[j : j + 1], public[j : j + 1], key) for j in range(blocks)]
    assert np.array_equal(np.concatenate(alone), sealed)


def test_another_key_opens_nothing() -> None:
    message, public = small(1, 2, 100), uniform(1, 2)
    sealed = ckks.encrypt(message, public, ternary_key(1))
    key = small(1, 1, 1)
    key[0, 4000] = 1 - key[0, 4000]  # one coefficient of the key differs
    opened = ckks.decrypt(sealed, public, ring.to_ntt(key)[0])
    # Uniform modulo q: below 2**40 in magnitude with probability 2**-15 each, so 100 of 8192 never.
    assert np.count_nonzero(np.abs(opened) < 1 << 40) < 100


def test_sums_of_ciphertexts_open_under_the_sum_of_keys() -> None:
    public, total, key = uniform(7, 3), ResidueSum(3), np.zeros((1, 4096), np.int64)
    exact = np.zeros((3, 4096), np.int64)
    for client in range(20):
        secret, message = small(client, 1, 1), small(100 + client, 3, 1 << 40)
        total.add(ckks.encrypt(message, public, ring.to_ntt(secret)[0]))
        key, exact = key + secret, exact + message
    assert np.array_equal(ckks.decrypt(total.value(), public, ring.to_ntt(key)[0]), exact)


def test_a_message_of_zero_under_public_polynomials_of_zero_is_accepted_by_seal() -> None:
    # SEAL refuses "transparent" ciphertexts; the extra constant must keep it from seeing one.
    nothing = np.zeros((2, 4096), dtype=np.uint64)
    message = np.zeros((2, 4096), dtype=np.int64)
    assert not ckks.encrypt(message, nothing, ternary_key(1)).any()
    assert not ckks.decrypt(nothing, nothing, ternary_key(1)).any()


# --- SEAL opens it --------------------------------------------------------------------------------


def test_seals_decryptor_opens_an_upload_with_the_one_time_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_integers(40_000, max_clients=10, max_abs=50)
    holder = KeyHolder(plan)
    seeds: list[bytes] = []
    genuine = onetime.fresh_seed

    def spy(*arguments: object) -> bytes:
        seeds.append(genuine(*arguments))  # type: ignore[arg-type]
        return seeds[-1]

    monkeypatch.setattr("secagg.encryptor.fresh_seed", spy)
    values = np.arange(40_000) % 101 - 50
    upload = raw_upload(holder.context, [values])
    seed, noise = seeds
    expected = pack(plan.layouts[0], values) + onetime.errors(noise, plan.blocks)

    decryptor = seal.Decryptor(ring.CONTEXT, secret_key(ring.to_ntt(onetime.secret(seed)[None])[0]))
    public = holder.context.public_polynomials()
    assert plan.blocks > 1
    for j, polynomial in enumerate(widen(upload.payload, plan.blocks)):
        opened = seal.Plaintext()
        decryptor.decrypt(ciphertext(polynomial, public[j]), opened)
        assert np.array_equal(plaintext_residues(opened), ring.to_ntt(expected[j : j + 1])[0])


def test_seals_decryptor_opens_a_sum_with_the_sum_of_keys() -> None:
    public, key, exact = uniform(3, 1), small(1, 1, 1), small(1, 1, 1 << 50)
    decryptor = seal.Decryptor(ring.CONTEXT, secret_key(ring.to_ntt(key * 5)[0]))
    total = ResidueSum(1)
    for _ in range(5):
        total.add(ckks.encrypt(exact // 5, public, ring.to_ntt(key)[0]))
    opened = seal.Plaintext()
    decryptor.decrypt(ciphertext(total.value()[0], public[0]), opened)
    assert np.array_equal(plaintext_residues(opened), ring.to_ntt(exact // 5 * 5)[0])


@pytest.mark.parametrize("limit", [1, 127, 1 << 20])
def test_ckks_encoding_of_the_canonical_embedding_gives_our_residues(limit: int) -> None:
    coefficients = small(limit, 1, limit)
    plain = seal.Plaintext()
    slots = canonical_embedding(coefficients[0]).tolist()
    seal.CKKSEncoder(ring.CONTEXT).encode(slots, 1.0, plain)
    assert np.array_equal(plaintext_residues(plain), ring.to_ntt(coefficients)[0])


@pytest.mark.parametrize("limit", [1, 1 << 20, 1 << 50])
def test_ckks_decoding_of_our_plaintext_gives_the_canonical_embedding(limit: int) -> None:
    coefficients = small(limit % 1000, 1, limit)
    plain = plaintext(ring.to_ntt(coefficients)[0])
    slots = np.array(seal.CKKSEncoder(ring.CONTEXT).decode_complex(plain))
    expected = canonical_embedding(coefficients[0])
    # Two FFTs in double precision: 12 stages each, relative to the norm of the coefficients.
    tolerance = 2 * 12 * 2.0**-52 * float(np.linalg.norm(coefficients.astype(float))) * 4
    assert np.abs(slots - expected).max() <= tolerance


# --- hygiene --------------------------------------------------------------------------------------


def scratch() -> bytes:
    """What lies in the scratch files, but for the head of what SEAL read last, and for zeros."""
    scratch = ring._SCRATCH
    read = os.pread(scratch.inbox._descriptor, 1 << 20, 0)
    written = os.pread(scratch.outbox._descriptor, 1 << 20, 0)
    return read[ring._HEADER.size + ring._RESIDUES_AT :].strip(b"\0") + written


def test_nothing_is_left_in_the_scratch_file() -> None:
    public, key = uniform(1, 1), ternary_key(1)
    assert scratch() == b""
    sealed = ckks.encrypt(small(1, 1, 9), public, key)
    assert scratch() == b""
    ckks.decrypt(sealed, public, key)
    assert scratch() == b""


def test_nothing_is_left_on_disk() -> None:
    for file in (ring._SCRATCH.inbox, ring._SCRATCH.outbox):
        assert "memfd" in Path(f"/proc/self/fd/{file._descriptor}").readlink().name


def test_nothing_is_left_in_the_scratch_file_when_seal_refuses() -> None:
    beyond = np.full((1, 4096), MODULUS, dtype=np.uint64)
    with pytest.raises(RuntimeError):
        ckks.decrypt(beyond, uniform(1, 1), ternary_key(1))
    assert scratch() == b""


def test_threads_do_not_mix_their_messages() -> None:
    def work(number: int) -> None:
        message = np.full((1, 4096), 0, dtype=np.int64)
        message[0, 0] = number
        for _ in range(20):
            if not (ring.to_ntt(message) == number).all():
                wrong.append(number)

    wrong: list[int] = []
    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORK = """
import os
from secagg import ring
def inode():
    return os.fstat(ring._SCRATCH.inbox._descriptor).st_ino

reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, str(inode()).encode())
    os._exit(0)
os.wait()
raise SystemExit(os.read(reader, 99).decode() == str(inode()))
"""


def test_a_forked_process_has_a_scratch_file_of_its_own() -> None:
    # Two processes that share it read one another's keys and plaintexts, or abort inside SEAL.
    assert subprocess.run([sys.executable, "-c", FORK], check=False).returncode == 0


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_finished_thread_leaves_no_open_file() -> None:
    before = open_files()
    for _ in range(5):
        thread = threading.Thread(target=ring.to_ntt, args=(small(1, 1, 1),))
        thread.start()
        thread.join()
    assert open_files() == before


def test_seal_accepts_the_ring_at_256_bits_and_no_larger_prime() -> None:
    assert ring.CONTEXT.parameters_set()
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(4096)
    parameters.set_coeff_modulus(seal.CoeffModulus.Create(4096, [30, 29]))
    context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC256)
    assert not context.parameters_set()
