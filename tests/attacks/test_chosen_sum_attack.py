"""A server that has something else opened as "the sum": one client's upload, or the key itself.

Whoever decrypts what they are given is a decryption oracle, and CKKS has none to spare (it is not
even secure when honest decryptions are published: Li and Micciancio, eprint 2020/1533). Broken
here: a service with one long-term key, and a service that computes the right sum key but lets the
server choose both halves of the ciphertext. The pair (0, 2**s) decrypts to 2**s times the key.

Ours takes no second half, because the round fixes it; a manifest fixes the key, and what opens
under it is the sum over that manifest. What leaves is integers, which depend on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
from attacker import Integers, Residues, key_of, named, read, residues, signer, summed, upload_under

from secagg import ckks, onetime
from secagg.aggregator import Aggregate
from secagg.context import RoundContext
from secagg.errors import ClosedError, ReleaseError
from secagg.keyholder import KeyHolder
from secagg.parameters import MODULUS
from secagg.planner import plan_integers
from secagg.release import Release
from secagg.sealing import RoundKeyPair
from secagg.upload import Upload

SIZE, CLIENTS = 50, 5
PLAN = plan_integers(SIZE, max_clients=6, max_abs=100)
STEP = 1 << PLAN.layouts[0].shift
SHAPE = (PLAN.blocks, 4096)
# Server's choice of a ciphertext that "encrypts" the key: (0, 2**s).
NOTHING, ONE = np.zeros(SHAPE, np.uint64), np.full(SHAPE, STEP, np.uint64)


def values(client: int) -> list[Integers]:
    return [np.random.default_rng(client).integers(-100, 100, SIZE, endpoint=True)]


def seed(client: int) -> bytes:
    return named("seed", client)


def uploads(context: RoundContext) -> list[Upload]:
    return [
        upload_under(context, values(client), signer(f"client {client}"), seed(client))
        for client in range(CLIENTS)
    ]


def ternary_of(opened: Integers) -> Integers:
    """A key, or a sum of keys, out of 2**s times itself."""
    return np.rint(opened[0] / STEP).astype(np.int64)


# --- broken ---------------------------------------------------------------------------------------


class LongTermKey:
    """Broken: everybody encrypts under one key, and its holder decrypts "the sum" it is given."""

    def __init__(self) -> None:
        self.secret = onetime.secret(named("long-term key"))
        self.context = KeyHolder(PLAN).context

    def upload(self, client: int) -> Upload:
        return upload_under(self.context, values(client), signer("client"), named("long-term key"))

    def decrypt(self, first: Residues, second: Residues) -> Integers:
        return ckks.decrypt(first, second, key_of([named("long-term key")]))


class SumKey:
    """Broken: adds up the keys of any three or more clients, and decrypts any pair under that."""

    def decrypt(self, clients: range, first: Residues, second: Residues) -> Integers:
        assert len(clients) >= 3
        return ckks.decrypt(first, second, key_of([seed(client) for client in clients]))


def test_one_long_term_key_opens_a_single_upload_as_the_sum() -> None:
    scheme = LongTermKey()
    stolen = residues(scheme.upload(3))
    opened = scheme.decrypt(stolen, scheme.context.public_polynomials())
    grid = np.rint(opened[0, :SIZE] / STEP).astype(np.int64)
    assert np.array_equal(grid, values(3)[0])


def test_one_long_term_key_is_given_away_by_a_single_decryption() -> None:
    scheme = LongTermKey()
    assert np.array_equal(ternary_of(scheme.decrypt(NOTHING, ONE)), scheme.secret)


def test_sum_keys_give_away_the_key_of_one_client_as_a_difference() -> None:
    scheme = SumKey()
    all_of_them = ternary_of(scheme.decrypt(range(CLIENTS), NOTHING, ONE))
    all_but_one = ternary_of(scheme.decrypt(range(CLIENTS - 1), NOTHING, ONE))
    victim = CLIENTS - 1
    assert np.array_equal(all_of_them - all_but_one, onetime.secret(seed(victim)))
    context = KeyHolder(PLAN).context
    # The key that fell out of the difference reads the upload as the client's own does.
    opened = read(context, key_of([seed(victim)]), residues(uploads(context)[victim]))
    assert np.array_equal(opened[0], values(victim)[0])


# --- ours -----------------------------------------------------------------------------------------

CHOICES: dict[str, Callable[[KeyHolder, list[Upload]], Residues]] = {
    "one upload": lambda _holder, sent: residues(sent[0]),
    "one upload, once for each name": lambda _holder, sent: summed([sent[0]] * CLIENTS),
    "all uploads but one": lambda _holder, sent: summed(sent[1:]),
    "zero": lambda _holder, _sent: NOTHING,
    "the second half of (0, 2**s)": lambda _holder, _sent: ONE,
    "the round's own polynomials": lambda holder, _sent: holder.context.public_polynomials(),
    "their negative": lambda holder, _sent: MODULUS - holder.context.public_polynomials(),
    "twice the sum": lambda _holder, sent: summed(sent + sent),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_ours_opens_nothing_but_the_sum_over_the_manifest(choice: str) -> None:
    holder = KeyHolder(PLAN)
    sent = uploads(holder.context)
    manifest = tuple(upload.admission for upload in sent)
    chosen = CHOICES[choice](holder, sent) % np.uint64(MODULUS)
    with pytest.raises(ReleaseError):
        holder.release(Aggregate(manifest, chosen))
    released = holder.release(Aggregate(manifest, summed(sent)))
    assert np.array_equal(released.sums[0], sum(values(client)[0] for client in range(CLIENTS)))


def test_ours_opens_one_cohort_and_never_a_second() -> None:
    holder = KeyHolder(PLAN)
    sent = uploads(holder.context)
    manifest = tuple(upload.admission for upload in sent)
    holder.release(Aggregate(manifest, summed(sent)))
    with pytest.raises(ClosedError):
        holder.release(Aggregate(manifest[:-1], summed(sent[:-1])))


def test_what_ours_releases_depends_on_the_integers_alone() -> None:
    # Other keys, other noise, another round key: the same bytes. So none of these is in them.
    released: list[Release] = []
    for run in range(2):
        holder = KeyHolder(PLAN, pair=RoundKeyPair())
        sent = [
            upload_under(holder.context, values(i), signer(f"{i}"), named("run", run, i))
            for i in range(CLIENTS)
        ]
        manifest = tuple(upload.admission for upload in sent)
        released.append(holder.release(Aggregate(manifest, summed(sent))))
    first, second = released
    assert {part.name for part in fields(Release)} == {"plan", "rotation", "contributors", "sums"}
    assert (first.rotation, first.contributors) == (second.rotation, second.contributors)
    assert first.sums[0].tobytes() == second.sums[0].tobytes()
    assert first.sums[0].dtype == np.int64
