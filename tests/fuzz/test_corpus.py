"""Every decoder on everything that fuzzing has kept, and on seeds with random changes.

Needs no atheris: what it has found runs here as it is. An input is decoded or refused with an error
that is documented; a target raises anything else.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from random import Random
from unittest import mock

import pytest
import structlog
from fuzz_inputs import FOLDER, Choices, Target, altered, corpus_of, found_of
from fuzz_server import announced, committed, program, put
from fuzz_targets import NAMES, target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FOUND = [(name, file) for name in NAMES for file in found_of(name)]
EXAMPLES = {"server": 100, "keyholder": 100}
MOST_COMMITTED = 1_000_000


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """Services log what they do, some hundred times here."""
    with structlog.testing.capture_logs():
        yield


@pytest.mark.parametrize("name", NAMES)
def test_seeds_and_corpus_are_decoded_or_refused(name: str) -> None:
    chosen = target(name)
    for data in [*chosen.seeds().values(), *corpus_of(name)]:
        chosen.one(data)


@pytest.mark.parametrize(("name", "file"), FOUND, ids=["-".join(found) for found in FOUND])
def test_what_once_failed_is_decoded_or_refused(name: str, file: str) -> None:
    target(name).one(found_of(name)[file])


@pytest.mark.parametrize("name", NAMES)
def test_seeds_with_random_changes_are_decoded_or_refused(name: str) -> None:
    chosen = target(name)
    pool = [*chosen.seeds().values(), *corpus_of(name), *found_of(name).values()]
    change = chosen.mutate or altered

    @settings(
        max_examples=EXAMPLES.get(name, 300),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, len(pool) - 1), st.integers(0, (1 << 64) - 1), st.integers(1, 4))
    def check(place: int, seed: int, changes: int) -> None:
        data, random = pool[place], Random(seed)
        for _ in range(changes):
            data = change(data, random)
        chosen.one(data)

    check()


DIGESTS = """
import hashlib
from fuzz_targets import NAMES, target
for name in NAMES:
    seeds = target(name).seeds()
    print(name, hashlib.sha256(repr(sorted(seeds.items())).encode()).hexdigest())
"""


def test_seeds_are_the_same_in_every_run() -> None:
    """Inputs are kept and compared between runs; ciphertexts in them must not change."""
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent / "support")}
    command = [sys.executable, "-c", DIGESTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    expected = {name: target(name).seeds() for name in NAMES}
    found = dict(line.split() for line in done.stdout.splitlines())
    for name, seeds in expected.items():
        assert len(set(seeds.values())) == len(seeds) >= 8
        assert hashlib.sha256(repr(sorted(seeds.items())).encode()).hexdigest() == found[name], name


def test_what_is_committed_stays_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_COMMITTED
    assert {path.stem for path in (FOLDER / "corpus").iterdir()} == set(NAMES)
    assert {path.name for path in (FOLDER / "found").iterdir()} <= set(NAMES)


# --- targets can fail ---------------------------------------------------------------------------

WRONG = {
    "wire": "secagg.wire.codec.make_plan",
    "server": "secagg_server.intake.widen",
    "keyholder": "secagg_keyholder.service.low_from_bytes",
    "answers": "secagg_client.offers.round_context_from_wire",
    "frameworks": "secagg.flower.arrays._trained",
    "identities": "secagg.enrolment._member",
    "monitor": "secagg.monitor._is_here",
    "settings": "secagg_server.task_files.make_plan",
    "datasets": "secagg_recommender.reading._decoded",
    "states": "secagg_client.outbox._unframed",
}
"""A decoder of each target."""


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_that_raises_something_else_is_found(name: str) -> None:
    chosen = target(name)
    chosen.prepare()
    # The monitor answers 500, which its target complains of.
    expected = AssertionError if name == "monitor" else KeyError
    with mock.patch(WRONG[name], side_effect=KeyError("wrong")), pytest.raises(expected):
        _all(chosen)


def _all(chosen: Target) -> None:
    for data in chosen.seeds().values():
        chosen.one(data)


def test_a_codec_that_loses_a_field_is_found() -> None:
    chosen = target("wire")
    data = chosen.seeds()["plan private"]
    with (
        mock.patch("secagg.wire.codec._privacy_to_wire", return_value=None),
        pytest.raises(AssertionError),
    ):
        chosen.one(data)


def test_a_server_that_counts_other_bytes_than_the_signed_ones_is_found() -> None:
    """One byte of a chunk is another, in a server that does not compare digests."""
    chosen = target("server")
    chosen.prepare()
    changed = b"\0\0\1\1\0\0\3\0\x55\0"
    data = program(0, (announced, b"\0\0"), (put, changed), (committed, b"\0\0"))
    chosen.one(data)
    with (
        mock.patch("secagg_server.intake.Intake._sha256", _as_announced),
        pytest.raises(AssertionError),
    ):
        chosen.one(data)


def _as_announced(_intake: object, _current: object, upload_digest: bytes) -> bytes:
    return upload_digest


def test_a_key_holder_that_opens_too_small_a_sum_is_found() -> None:
    chosen = target("keyholder")
    chosen.prepare()
    data = chosen.seeds()["too few"]
    chosen.one(data)
    with (
        mock.patch("secagg.keyholder.KeyHolder._check_cohort"),
        pytest.raises(AssertionError),
    ):
        chosen.one(data)


# --- decisions from bytes -----------------------------------------------------------------------


def test_decisions_run_out_into_zeros() -> None:
    choices = Choices(b"\x05\x01")
    assert (choices.number(4), choices.flip(), choices.left) == (1, True, False)
    assert (choices.number(1000), choices.pick("abc"), choices.taken(3)) == (0, "a", b"")
    assert Choices(b"").altered(b"as it is") == b"as it is"


@given(st.binary(max_size=64), st.integers(0, 1 << 32))
def test_changes_stay_near_the_size_of_what_is_changed(data: bytes, seed: int) -> None:
    assert len(altered(data, Random(seed))) <= len(data) + 3 * (1 << 16)
