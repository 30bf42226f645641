"""The authority's list is believed whole or not at all, and only ever moves forward."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from secagg import enrolment
from secagg.authority import Authority
from secagg.certificates import Role
from secagg.enrolment import Enrolment, EnrolmentFile, Member, OpenEnrolment, Roster
from secagg.errors import (
    CertificateError,
    ConfigurationError,
    MalformedError,
    NotEnrolledError,
    RevokedError,
    UntrustedKeyError,
)
from secagg.transcript import encode

OURS, OTHER = Authority.create(), Authority.create()


def key(number: int) -> bytes:
    return bytes([number]) * 32


MEMBERS = {
    "alice": Member("alice", (key(1),)),
    "bob": Member("bob", (key(3), key(2))),
    "eve": Member("eve", (key(4),), revoked=True),
}
LIST = Enrolment(7, MEMBERS, (key(9), key(8)), frozenset({1, 2**159 + 1}))
SIGNED = LIST.to_bytes(OURS.key)


def body() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(SIGNED)
    inner: dict[str, Any] = document["enrolment"]
    return inner


def signed(inner: object, authority: Authority = OURS) -> bytes:
    """Any document, signed as if it were a list."""
    canonical = json.dumps(inner, sort_keys=True, separators=(",", ":")).encode()
    signature = authority.key.sign(encode("enrolment", canonical), ec.ECDSA(hashes.SHA256()))
    return json.dumps({"enrolment": inner, "signature": signature.hex()}).encode()


def unsigned(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The list, changed behind the authority's back."""
    document = json.loads(SIGNED)
    change(document["enrolment"])
    return json.dumps(document).encode()


def test_a_signed_list_comes_back_whole() -> None:
    assert Enrolment.from_bytes(SIGNED, OURS.ca_pem) == LIST
    assert Enrolment.from_bytes(signed(body()), OURS.ca_pem) == LIST


def test_clients_are_known_by_each_of_their_keys_and_by_name() -> None:
    assert LIST.client_of(key(1)) == "alice"
    assert LIST.client_of(key(2)) == LIST.client_of(key(3)) == "bob"
    assert LIST.require("bob").signing_keys == (key(3), key(2))
    assert LIST.active() == ["alice", "bob"]


@pytest.mark.parametrize("stranger", [key(5), b"", key(1)[:-1], key(9)])
def test_a_key_of_nobody_is_refused(stranger: bytes) -> None:
    with pytest.raises(NotEnrolledError, match="nobody's"):
        LIST.client_of(stranger)


@pytest.mark.parametrize("name", ["mallory", "", "Alice", key(1).hex()])
def test_a_name_of_nobody_is_refused(name: str) -> None:
    with pytest.raises(NotEnrolledError, match="nobody has this one"):
        LIST.require(name)


def test_a_revoked_client_is_refused_by_key_and_by_name() -> None:
    with pytest.raises(RevokedError):
        LIST.client_of(key(4))
    with pytest.raises(RevokedError):
        LIST.require("eve")


def test_a_revoked_certificate_is_refused() -> None:
    for serial in LIST.revoked_certificates:
        with pytest.raises(RevokedError, match="newest kit"):
            LIST.check_certificate(serial)
    LIST.check_certificate(3)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b["members"]["alice"].update(signing_keys=[key(6).hex()]),
        lambda b: b["members"]["bob"]["signing_keys"].reverse(),
        lambda b: b["members"]["bob"]["signing_keys"].pop(),
        lambda b: b["members"].update(alice=b["members"]["bob"], bob=b["members"]["alice"]),
        lambda b: b["members"].update(mallory=b["members"].pop("alice")),
        lambda b: b["members"].pop("alice"),
        lambda b: b["members"]["eve"].update(revoked=False),
        lambda b: b["revoked_certificates"].pop(),
        lambda b: b.update(serial=8),
        lambda b: b.update(key_holder_identities=[key(6).hex()]),
        lambda b: b["key_holder_identities"].reverse(),
        lambda b: b.update(extra=1),
        lambda b: b.pop("members"),
        lambda b: b.clear(),
    ],
    ids=lambda _: "",
)
def test_a_list_that_was_changed_is_not_trusted(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(UntrustedKeyError, match="signature does not cover"):
        Enrolment.from_bytes(unsigned(change), OURS.ca_pem)


def test_a_list_of_another_authority_is_not_trusted() -> None:
    for data in (LIST.to_bytes(OTHER.key), signed(body(), OTHER)):
        with pytest.raises(UntrustedKeyError):
            Enrolment.from_bytes(data, OURS.ca_pem)


def test_a_signature_over_something_else_is_not_trusted() -> None:
    # The authority signs certificates with the same key; the label keeps the two apart.
    document = json.loads(SIGNED)
    plain = json.dumps(document["enrolment"], sort_keys=True, separators=(",", ":")).encode()
    document["signature"] = OURS.key.sign(plain, ec.ECDSA(hashes.SHA256())).hex()
    for signature in (document["signature"], "", "00", "30" * 70):
        document["signature"] = signature
        with pytest.raises(UntrustedKeyError):
            Enrolment.from_bytes(json.dumps(document).encode(), OURS.ca_pem)


def test_the_authority_must_be_one() -> None:
    client = OURS.issue(Role.CLIENT, "alice").certificate
    for pem in (b"", b"garbage", client):
        with pytest.raises(CertificateError):
            Enrolment.from_bytes(SIGNED, pem)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.update(extra=1),
        lambda b: b.pop("revoked_certificates"),
        lambda b: b.update(version=2),
        lambda b: b.update(serial=0),
        lambda b: b.update(serial=-1),
        lambda b: b.update(serial=1 << 63),
        lambda b: b.update(serial="7"),
        lambda b: b.update(serial=True),
        lambda b: b.update(serial=None),
        lambda b: b.update(members=[]),
        lambda b: b["members"].update({"../x": b["members"]["alice"]}),
        lambda b: b["members"]["alice"].update(extra=1),
        lambda b: b["members"]["alice"].pop("revoked"),
        lambda b: b["members"]["alice"].update(revoked=0),
        lambda b: b["members"]["alice"].update(revoked=None),
        lambda b: b["members"].update(alice=None),
        lambda b: b["members"]["alice"].update(signing_keys=[]),
        lambda b: b["members"]["alice"].update(signing_keys=[key(n).hex() for n in (5, 6, 7)]),
        lambda b: b["members"]["alice"].update(signing_keys=[key(1).hex()] * 2),
        lambda b: b["members"]["alice"].update(signing_keys=key(1).hex()),
        lambda b: b["members"]["alice"].update(signing_keys=[key(1).hex()[:-2]]),
        lambda b: b["members"]["alice"].update(signing_keys=[key(0xAA).hex().upper()]),
        lambda b: b["members"]["alice"].update(signing_keys=[" " + key(1).hex()]),
        lambda b: b["members"]["alice"].update(signing_keys=["zz" * 32]),
        lambda b: b["members"]["alice"].update(signing_keys=[1]),
        # Bob's old key, Eve's: whoever signs with it would be two clients at once.
        lambda b: b["members"]["alice"].update(signing_keys=[key(2).hex()]),
        lambda b: b["members"]["alice"].update(signing_keys=[key(4).hex()]),
        lambda b: b.update(key_holder_identities=[]),
        lambda b: b.update(key_holder_identities=[key(8).hex()] * 2),
        lambda b: b.update(key_holder_identities=[key(n).hex() for n in (6, 7, 8)]),
        lambda b: b.update(revoked_certificates=[1]),
        lambda b: b.update(revoked_certificates={"1": 1}),
        lambda b: b.update(revoked_certificates=["01", "01"]),
        lambda b: b.update(revoked_certificates=["00"]),
        lambda b: b.update(revoked_certificates=[""]),
    ],
    ids=lambda _: "",
)
def test_a_list_that_cannot_be_is_refused_even_when_signed(
    change: Callable[[dict[str, Any]], object],
) -> None:
    inner = body()
    change(inner)
    with pytest.raises(MalformedError, match="expected a signed document with"):
        Enrolment.from_bytes(signed(inner), OURS.ca_pem)


@pytest.mark.parametrize("inner", [None, 1, "text", [], [body()], True])
def test_something_else_is_refused_even_when_signed(inner: object) -> None:
    with pytest.raises(MalformedError):
        Enrolment.from_bytes(signed(inner), OURS.ca_pem)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff" + SIGNED,
        SIGNED.decode().encode("utf-16"),
        SIGNED + b"{}",
        SIGNED[:-2] + b',"extra":1}',
        SIGNED.replace(b'"serial":7', b'"serial":7.0'),
        SIGNED.replace(b'"serial":7', b'"serial":7e0'),
        SIGNED.replace(b'"serial":7', b'"serial":NaN'),
        SIGNED.replace(b'"serial":7', b'"serial":' + b"7" * 5000),
        b"[" * 200_000,
        b'{"signature":"00","enrolment":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=range(14),
)
def test_what_is_not_one_strict_document_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedError):
        Enrolment.from_bytes(data, OURS.ca_pem)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (b'"serial":7', b'"serial":7,"serial":7'),
        (b'"revoked":true', b'"revoked":true,"revoked":true'),
        (b'"members":{', b'"members":{},"members":{'),
        (b'"signature":', b'"signature":"00","signature":'),
        (b'{"enrolment":', b'{"enrolment":{},"enrolment":'),
    ],
)
def test_a_field_that_comes_twice_is_refused(one: bytes, two: bytes) -> None:
    # Two readers could pick different ones, and the signature would cover either.
    assert one in SIGNED
    with pytest.raises(MalformedError, match="every field once"):
        Enrolment.from_bytes(SIGNED.replace(one, two), OURS.ca_pem)


@given(st.integers(0, len(SIGNED) - 3))
def test_a_list_that_was_cut_is_refused(size: int) -> None:
    with pytest.raises(MalformedError):
        Enrolment.from_bytes(SIGNED[:size], OURS.ca_pem)


@given(st.integers(0, len(SIGNED) - 2), st.integers(1, 255))
def test_no_changed_byte_gives_another_list(position: int, change: int) -> None:
    damaged = bytearray(SIGNED)
    damaged[position] ^= change
    with suppress(MalformedError, UntrustedKeyError):
        assert Enrolment.from_bytes(bytes(damaged), OURS.ca_pem) == LIST


@given(st.binary(max_size=300))
def test_no_bytes_are_a_list(data: bytes) -> None:
    with pytest.raises(MalformedError):
        Enrolment.from_bytes(data, OURS.ca_pem)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)


@given(
    st.sampled_from(["serial", "members", "key_holder_identities", "revoked_certificates"]), JSON
)
def test_any_signed_value_is_refused_or_kept_as_it_is(field: str, value: object) -> None:
    inner = body() | {field: value}
    try:
        read = Enrolment.from_bytes(signed(inner), OURS.ca_pem)
    except MalformedError:
        return
    assert json.loads(read.to_bytes(OURS.key))["enrolment"] == inner


NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")


@given(
    st.lists(NAMES, unique=True, max_size=6),
    st.data(),
    st.integers(1, 2**63 - 1),
    st.frozensets(st.integers(1, 2**160 - 1), max_size=5),
)
def test_every_list_comes_back_whole(
    names: list[str], data: st.DataObject, serial: int, revoked: frozenset[int]
) -> None:
    members = {}
    for number, name in enumerate(names):
        count = data.draw(st.integers(1, 2))
        keys = tuple(key(2 * number + which) for which in range(count))
        members[name] = Member(name, keys, data.draw(st.booleans()))
    made = Enrolment(serial, members, (key(200),), revoked)
    assert Enrolment.from_bytes(made.to_bytes(OURS.key), OURS.ca_pem) == made
    for name, member in members.items():
        assert (name in made.active()) is not member.revoked
        if not member.revoked:
            assert {made.client_of(each) for each in member.signing_keys} == {name}


def test_an_oversized_list_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "MAX_BYTES", len(SIGNED) - 1)
    with pytest.raises(MalformedError, match=f"at most {len(SIGNED) - 1} bytes"):
        Enrolment.from_bytes(SIGNED, OURS.ca_pem)
    with pytest.raises(MalformedError, match="at most"):
        Enrolment.from_bytes(b"[" * len(SIGNED), OURS.ca_pem)


def test_the_limit_is_64_mib() -> None:
    with pytest.raises(MalformedError, match="at most 67108864 bytes"):
        Enrolment.from_bytes(bytes(64 * 1024 * 1024 + 1), OURS.ca_pem)


def test_a_list_that_cannot_be_cannot_be_made() -> None:
    for wrong in (
        {"serial": 0},
        {"members": {"alice": Member("bob", (key(1),))}},
        {"members": MEMBERS | {"x": Member("x", (key(1),))}},
        {"key_holder_identities": ()},
        {"key_holder_identities": (b"short",)},
        {"revoked_certificates": frozenset({0})},
    ):
        with pytest.raises(MalformedError):
            replace(LIST, **wrong)  # type: ignore[arg-type]


def test_names_and_keys_are_not_shown() -> None:
    for shown in (repr(LIST), repr(LIST.require("alice"))):
        assert "alice" not in shown
        assert repr(key(1)) not in shown
    with pytest.raises(RevokedError) as refusal:
        LIST.require("eve")
    assert "eve" not in str(refusal.value)


def test_without_an_enrolment_a_key_is_its_clients_name() -> None:
    roster: Roster = OpenEnrolment()
    name = roster.client_of(key(5))
    assert name == key(5).hex()
    assert roster.require(name) == Member(name, (key(5),))
    assert roster.active() == []
    roster.check_certificate(1)


@pytest.mark.parametrize(
    "name", ["", "alice", key(5).hex()[:-2], key(0xAB).hex().upper(), "é" * 64]
)
def test_without_an_enrolment_other_names_are_nobodys(name: str) -> None:
    with pytest.raises(NotEnrolledError):
        OpenEnrolment().require(name)


# A file that is replaced while services read it.


def put(path: Path, data: bytes) -> None:
    """Replace a file in one step, as provisioning does."""
    draft = path.with_suffix(".draft")
    draft.write_bytes(data)
    os.replace(draft, path)  # noqa: PTH105


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "enrolment.json"
    file.write_bytes(SIGNED)
    return file


NEWER = replace(LIST, serial=8, members={"alice": MEMBERS["alice"]})


def test_a_replaced_file_is_in_force_at_once(path: Path) -> None:
    roster: Roster = EnrolmentFile(path, OURS.ca_pem)
    assert roster.client_of(key(2)) == "bob"
    put(path, NEWER.to_bytes(OURS.key))
    with pytest.raises(NotEnrolledError):
        roster.client_of(key(2))
    with pytest.raises(NotEnrolledError):
        roster.require("bob")
    assert roster.active() == ["alice"]


def test_a_revocation_is_in_force_at_once(path: Path) -> None:
    file = EnrolmentFile(path, OURS.ca_pem)
    file.check_certificate(77)
    put(path, replace(LIST, serial=8, revoked_certificates=frozenset({77})).to_bytes(OURS.key))
    with pytest.raises(RevokedError):
        file.check_certificate(77)
    assert file.problem is None


def test_a_file_of_the_same_size_is_read_as_well(path: Path) -> None:
    size = len(SIGNED) + 64
    put(path, SIGNED.ljust(size))
    file = EnrolmentFile(path, OURS.ca_pem)
    put(path, replace(LIST, serial=8).to_bytes(OURS.key).ljust(size))
    assert file.current().serial == 8


def test_an_unchanged_file_is_not_parsed_again(path: Path) -> None:
    file = EnrolmentFile(path, OURS.ca_pem)
    assert file.current() is file.current()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "one whole JSON document"),
        (NEWER.to_bytes(OURS.key)[:-5], "one whole JSON document"),
        (NEWER.to_bytes(OTHER.key), "signature does not cover"),
        (unsigned(lambda b: b.update(serial=8)), "signature does not cover"),
        (replace(NEWER, serial=6).to_bytes(OURS.key), "follows serial=7.*got serial=6"),
        (replace(NEWER, serial=7).to_bytes(OURS.key), "follows serial=7.*got serial=7"),
    ],
)
def test_a_bad_file_leaves_the_list_in_force_until_a_good_one_comes(
    path: Path, data: bytes, problem: str
) -> None:
    file = EnrolmentFile(path, OURS.ca_pem)
    put(path, data)
    for _ in range(2):
        assert file.current() == LIST
        assert file.problem is not None
        assert re.search(problem, file.problem)
    put(path, NEWER.to_bytes(OURS.key))
    assert file.current() == NEWER
    assert file.problem is None


def test_the_same_list_again_is_no_problem(path: Path) -> None:
    file = EnrolmentFile(path, OURS.ca_pem)
    put(path, b"")
    file.current()
    put(path, SIGNED)
    assert file.current() == LIST
    assert file.problem is None


def test_a_missing_file_leaves_the_list_in_force_until_it_is_back(path: Path) -> None:
    file = EnrolmentFile(path, OURS.ca_pem)
    kept = path.rename(path.with_suffix(".kept"))
    assert file.current() == LIST
    assert file.problem is not None
    assert "No such file" in file.problem
    # Back with the very stamp it had.
    kept.rename(path)
    assert file.current() == LIST
    assert file.problem is None


def test_a_folder_in_its_place_is_a_problem_too(path: Path) -> None:
    file = EnrolmentFile(path, OURS.ca_pem)
    path.unlink()
    path.mkdir()
    assert file.current() == LIST
    assert file.problem is not None
    path.rmdir()
    path.write_bytes(NEWER.to_bytes(OURS.key))
    assert file.current() == NEWER


def test_an_older_list_never_comes_back(path: Path) -> None:
    file = EnrolmentFile(path, OURS.ca_pem)
    put(path, NEWER.to_bytes(OURS.key))
    assert file.current() == NEWER
    put(path, SIGNED)
    assert file.current() == NEWER
    with pytest.raises(NotEnrolledError):
        file.client_of(key(2))


def test_the_first_list_must_be_good(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.json.*secagg provision"):
        EnrolmentFile(tmp_path / "nowhere.json", OURS.ca_pem)
    with pytest.raises(ConfigurationError):
        EnrolmentFile(tmp_path, OURS.ca_pem)
    with pytest.raises(UntrustedKeyError):
        EnrolmentFile(path, OTHER.ca_pem)
    path.write_bytes(SIGNED[:-9])
    with pytest.raises(MalformedError):
        EnrolmentFile(path, OURS.ca_pem)


def test_an_oversized_file_is_not_read_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = EnrolmentFile(path, OURS.ca_pem)
    monkeypatch.setattr(enrolment, "MAX_BYTES", 10_000)
    put(path, NEWER.to_bytes(OURS.key) + b" " * 10_000)
    assert file.current() == LIST
    assert file.problem is not None
    assert "at most 10000 bytes" in file.problem
