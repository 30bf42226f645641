"""Secrets at rest open with the right passphrase, under their own name, whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from secagg.errors import ConfigurationError, MalformedError, StorageError
from secagg.sealing import ROUND_PRIVATE_BYTES, RoundKeyPair
from secagg_keyholder.vault import RoundKeys, load_identity, unsealing_passphrase

PASSPHRASE = "a passphrase for tests"  # noqa: S105
FIRST, SECOND = bytes(32), bytes(range(32))
PRIVATE = bytes(range(100, 100 + ROUND_PRIVATE_BYTES))
OVERHEAD = 12 + 16

property_test = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def keys(folder: Path) -> RoundKeys:
    return RoundKeys(folder, PASSPHRASE)


def key_file(folder: Path, round_key_id: bytes) -> Path:
    return folder / f"{round_key_id.hex()}.key"


def private_file(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    path.chmod(0o600)
    return path


# --- the passphrase ---------------------------------------------------------------------------


def test_a_passphrase_comes_from_a_setting_or_a_file(tmp_path: Path) -> None:
    path = private_file(tmp_path / "passphrase", f"  {PASSPHRASE}\n")
    given_directly = unsealing_passphrase(
        passphrase=SecretStr(PASSPHRASE), passphrase_file=None, share_files=[]
    )
    from_file = unsealing_passphrase(passphrase=None, passphrase_file=path, share_files=[])
    assert given_directly == from_file == PASSPHRASE


def test_a_passphrase_comes_from_enough_custodians(tmp_path: Path) -> None:
    from secagg import custodians

    wanted = custodians.fresh_passphrase()
    shares = custodians.split(wanted, 2, 3)
    # Line ends of an editor are not part of a mnemonic.
    files = [
        private_file(tmp_path / str(index), share.replace(" ", "\n", 1) + "\n")
        for index, share in enumerate(shares)
    ]
    for chosen in (files[:2], files[1:], [files[2], files[0]]):
        assert (
            unsealing_passphrase(passphrase=None, passphrase_file=None, share_files=chosen)
            == wanted
        )
    with pytest.raises(ConfigurationError) as error:
        unsealing_passphrase(passphrase=None, passphrase_file=None, share_files=files[:1])
    assert not set(shares[0].split()[4:8]) & set(str(error.value).split())


@pytest.mark.parametrize(
    ("passphrase", "file", "shares"),
    [(False, False, 0), (True, True, 0), (True, False, 1), (False, True, 2), (True, True, 2)],
)
def test_any_other_number_of_ways_is_refused(
    tmp_path: Path, passphrase: bool, file: bool, shares: int
) -> None:
    path = private_file(tmp_path / "passphrase", PASSPHRASE)
    with pytest.raises(ConfigurationError, match="exactly one") as error:
        unsealing_passphrase(
            passphrase=SecretStr(PASSPHRASE) if passphrase else None,
            passphrase_file=path if file else None,
            share_files=[path] * shares,
        )
    assert PASSPHRASE not in str(error.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o777])
@pytest.mark.parametrize("way", ["passphrase", "share"])
def test_a_secret_that_others_can_reach_is_refused(tmp_path: Path, mode: int, way: str) -> None:
    path = private_file(tmp_path / "secret", PASSPHRASE)
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match=f"{mode:04o}.*chmod 600") as error:
        unsealing_passphrase(
            passphrase=None,
            passphrase_file=path if way == "passphrase" else None,
            share_files=[path] if way == "share" else [],
        )
    assert PASSPHRASE not in str(error.value)


@pytest.mark.parametrize(
    "data", [b"", b" \n\t\r\n", b"\xff\xfe secret", b"x" * 4097], ids=["no", "blank", "raw", "long"]
)
def test_what_is_no_secret_is_refused(tmp_path: Path, data: bytes) -> None:
    path = private_file(tmp_path / "secret", data)
    with pytest.raises(ConfigurationError, match=str(path)) as error:
        unsealing_passphrase(passphrase=None, passphrase_file=path, share_files=[])
    assert "secret" not in str(error.value).replace(str(path), "")


def test_an_empty_passphrase_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="empty"):
        unsealing_passphrase(passphrase=SecretStr(""), passphrase_file=None, share_files=[])


@pytest.mark.parametrize("name", ["missing", "folder"])
def test_a_passphrase_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir(mode=0o700)
    with pytest.raises(ConfigurationError, match=name):
        unsealing_passphrase(passphrase=None, passphrase_file=tmp_path / name, share_files=[])


# --- the identity -----------------------------------------------------------------------------


RIGHT = BestAvailableEncryption(b"right")


def pem(key: object, encryption: KeySerializationEncryption = RIGHT) -> bytes:
    data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)  # type: ignore[attr-defined]
    assert isinstance(data, bytes)
    return data


def test_an_identity_is_the_key_that_was_stored(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    path = private_file(tmp_path / "identity.key", pem(key))
    assert load_identity(path, "right").to_bytes() == key.private_bytes_raw()


@pytest.mark.parametrize("passphrase", ["wrong", "", "right ", "Right"])
def test_another_passphrase_opens_no_identity(tmp_path: Path, passphrase: str) -> None:
    path = private_file(tmp_path / "identity.key", pem(Ed25519PrivateKey.generate()))
    with pytest.raises(ConfigurationError, match="passphrase"):
        load_identity(path, passphrase)


@pytest.mark.parametrize("passphrase", ["right", ""])
def test_an_identity_in_the_clear_is_refused(tmp_path: Path, passphrase: str) -> None:
    data = pem(Ed25519PrivateKey.generate(), NoEncryption())
    with pytest.raises(ConfigurationError, match="not encrypted") as error:
        load_identity(private_file(tmp_path / "identity.key", data), passphrase)
    assert data.splitlines()[1].decode() not in str(error.value)


def test_another_kind_of_key_is_refused(tmp_path: Path) -> None:
    path = private_file(tmp_path / "identity.key", pem(generate_private_key(SECP256R1())))
    with pytest.raises(ConfigurationError, match="Ed25519"):
        load_identity(path, "right")


@pytest.mark.parametrize("name", ["missing", "folder"])
def test_an_identity_that_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigurationError, match=f"{name}.*secagg provision"):
        load_identity(tmp_path / name, "right")


IDENTITY = pem(Ed25519PrivateKey.generate())


@settings(deadline=None, max_examples=30)
@given(cut=st.integers(0, len(IDENTITY) - 30), data=st.binary(max_size=40))
def test_a_damaged_identity_is_refused(
    tmp_path_factory: pytest.TempPathFactory, cut: int, data: bytes
) -> None:
    path = private_file(tmp_path_factory.mktemp("identity") / "key", IDENTITY[:cut] + data)
    with pytest.raises(ConfigurationError):
        load_identity(path, "right")


# --- round keys -------------------------------------------------------------------------------


def test_a_key_comes_back_after_a_restart(folder: Path, keys: RoundKeys) -> None:
    pair = RoundKeyPair()
    keys.put(FIRST, pair.to_bytes())
    again = RoundKeys(folder, PASSPHRASE)
    assert again.names() == keys.names() == {FIRST}
    stored = again.get(FIRST)
    assert stored is not None
    assert RoundKeyPair.from_bytes(stored).public == pair.public


def test_a_key_that_was_never_stored_is_none(keys: RoundKeys) -> None:
    assert keys.get(FIRST) is None
    assert keys.names() == set()


@property_test
@given(name=st.binary(min_size=32, max_size=32), data=st.binary(max_size=300))
def test_what_is_stored_is_encrypted_and_comes_back(
    keys: RoundKeys, folder: Path, name: bytes, data: bytes
) -> None:
    keys.put(name, data)
    stored = key_file(folder, name).read_bytes()
    assert keys.get(name) == data
    assert len(stored) == len(data) + OVERHEAD
    assert len(data) < 4 or data not in stored
    keys.put(name, data)
    assert key_file(folder, name).read_bytes() != stored  # another nonce


@pytest.mark.parametrize("passphrase", ["", "another", PASSPHRASE + " ", PASSPHRASE.upper()])
def test_another_passphrase_opens_no_key(folder: Path, keys: RoundKeys, passphrase: str) -> None:
    keys.put(FIRST, PRIVATE)
    with pytest.raises(ConfigurationError, match="passphrase") as error:
        RoundKeys(folder, passphrase).get(FIRST)
    assert PASSPHRASE not in str(error.value)
    assert keys.get(FIRST) == PRIVATE


def test_a_key_under_another_rounds_name_does_not_open(folder: Path, keys: RoundKeys) -> None:
    keys.put(FIRST, PRIVATE)
    keys.put(SECOND, PRIVATE[::-1])
    one, other = key_file(folder, FIRST), key_file(folder, SECOND)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    for name in (FIRST, SECOND):
        with pytest.raises(ConfigurationError):
            keys.get(name)


def test_a_key_with_another_folders_salt_does_not_open(tmp_path: Path, keys: RoundKeys) -> None:
    keys.put(FIRST, PRIVATE)
    other = tmp_path / "other"
    RoundKeys(other, PASSPHRASE)
    shutil.copy(key_file(tmp_path / "keys", FIRST), other)
    with pytest.raises(ConfigurationError):
        RoundKeys(other, PASSPHRASE).get(FIRST)


@property_test
@given(cut=st.integers(0, ROUND_PRIVATE_BYTES + OVERHEAD - 1))
def test_a_truncated_key_does_not_open(keys: RoundKeys, folder: Path, cut: int) -> None:
    keys.put(FIRST, PRIVATE)
    path = key_file(folder, FIRST)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ConfigurationError):
        keys.get(FIRST)


@property_test
@given(at=st.integers(0, ROUND_PRIVATE_BYTES + OVERHEAD - 1), flip=st.integers(1, 255))
def test_a_changed_key_does_not_open(keys: RoundKeys, folder: Path, at: int, flip: int) -> None:
    keys.put(FIRST, PRIVATE)
    path = key_file(folder, FIRST)
    data = bytearray(path.read_bytes())
    data[at] ^= flip
    path.write_bytes(data)
    with pytest.raises(ConfigurationError) as error:
        keys.get(FIRST)
    assert PRIVATE[:8].hex() not in str(error.value)


@property_test
@given(data=st.binary(max_size=200))
def test_garbage_is_no_key(keys: RoundKeys, folder: Path, data: bytes) -> None:
    key_file(folder, FIRST).write_bytes(data)
    with pytest.raises(ConfigurationError):
        keys.get(FIRST)


def test_a_folder_in_the_place_of_a_key_does_not_open(keys: RoundKeys, folder: Path) -> None:
    key_file(folder, FIRST).mkdir()
    with pytest.raises(ConfigurationError):
        keys.get(FIRST)
    with pytest.raises(StorageError):
        keys.erase(FIRST)


@given(name=st.binary(max_size=70).filter(lambda name: len(name) != 32))
@property_test
def test_only_round_key_ids_are_names(keys: RoundKeys, name: bytes) -> None:
    for call in (keys.get, keys.erase, lambda each: keys.put(each, PRIVATE)):
        with pytest.raises(MalformedError, match="round_key_id of 32"):
            call(name)


def test_an_erased_key_is_gone_and_was_overwritten(
    keys: RoundKeys, folder: Path, tmp_path: Path
) -> None:
    keys.put(FIRST, PRIVATE)
    keys.put(SECOND, PRIVATE)
    # A second name shows what is left of the file once the first one is gone.
    os.link(key_file(folder, FIRST), tmp_path / "leftover")
    stored = key_file(folder, FIRST).read_bytes()
    keys.erase(FIRST)
    leftover = (tmp_path / "leftover").read_bytes()
    assert keys.get(FIRST) is None
    assert keys.names() == {SECOND}
    assert len(leftover) == len(stored)
    assert leftover[12:28] not in stored
    assert sum(a == b for a, b in zip(leftover, stored, strict=True)) < len(stored) / 4
    shutil.copy(tmp_path / "leftover", key_file(folder, FIRST))
    with pytest.raises(ConfigurationError):
        keys.get(FIRST)


def test_erasing_again_is_no_error(keys: RoundKeys) -> None:
    keys.put(FIRST, PRIVATE)
    for _ in range(2):
        keys.erase(FIRST)
    keys.erase(SECOND)
    assert keys.names() == set()


def test_everything_is_for_the_owner_alone(folder: Path, keys: RoundKeys) -> None:
    previous = os.umask(0)
    try:
        keys.put(FIRST, PRIVATE)
        open_folder = folder.parent / "wide"
        RoundKeys(open_folder, PASSPHRASE)
    finally:
        os.umask(previous)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert {folder.stat().st_mode & 0o777, open_folder.stat().st_mode & 0o777} == {0o700}


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o777])
def test_a_folder_that_others_can_reach_is_refused(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod 700"):
        RoundKeys(folder, PASSPHRASE)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        RoundKeys(private_file(tmp_path / "file", b""), PASSPHRASE)
    with pytest.raises(ConfigurationError, match="File exists"):
        RoundKeys(tmp_path / "file" / "keys", PASSPHRASE)


def test_keys_without_their_salt_are_not_hidden_behind_a_new_one(
    folder: Path, keys: RoundKeys
) -> None:
    keys.put(FIRST, PRIVATE)
    salt = (folder / "salt").read_bytes()
    (folder / "salt").unlink()
    with pytest.raises(ConfigurationError, match="salt"):
        RoundKeys(folder, PASSPHRASE)
    assert not (folder / "salt").exists()
    (folder / "salt").write_bytes(salt)
    assert RoundKeys(folder, PASSPHRASE).get(FIRST) == PRIVATE


@pytest.mark.parametrize("size", [0, 15, 17])
def test_a_damaged_salt_is_refused(folder: Path, keys: RoundKeys, size: int) -> None:
    (folder / "salt").write_bytes(bytes(size))
    with pytest.raises(ConfigurationError, match=f"bytes={size}"):
        RoundKeys(folder, PASSPHRASE)


def test_salts_differ(tmp_path: Path) -> None:
    for name in ("a", "b"):
        RoundKeys(tmp_path / name, PASSPHRASE)
    assert (tmp_path / "a" / "salt").read_bytes() != (tmp_path / "b" / "salt").read_bytes()


# --- crashes ----------------------------------------------------------------------------------


def test_drafts_of_a_crash_are_removed_and_nothing_else(folder: Path, keys: RoundKeys) -> None:
    keys.put(FIRST, PRIVATE)
    (folder / ".x7f3.draft").write_bytes(b"half of a")
    (folder / "notes.txt").write_text("an operator's")
    again = RoundKeys(folder, PASSPHRASE)
    assert {path.name for path in folder.iterdir()} == {
        "salt",
        "notes.txt",
        key_file(folder, FIRST).name,
    }
    assert again.names() == {FIRST}


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_key_that_could_not_be_stored_whole_is_not_there(
    folder: Path, keys: RoundKeys, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, step, no_space)
        with pytest.raises(StorageError, match="No space"):
            keys.put(FIRST, PRIVATE)
    assert keys.get(FIRST) is None
    assert [path.name for path in folder.iterdir()] == ["salt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_salt_that_could_not_be_stored_whole_is_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder.mkdir(mode=0o700)
    with monkeypatch.context() as patched:
        patched.setattr(os, step, no_space)
        with pytest.raises(ConfigurationError, match="No space"):
            RoundKeys(folder, PASSPHRASE)
    assert list(folder.iterdir()) == []


def test_a_key_that_could_not_be_unlinked_no_longer_opens(
    keys: RoundKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.put(FIRST, PRIVATE)
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", no_space)
        with pytest.raises(StorageError):
            keys.erase(FIRST)
    with pytest.raises(ConfigurationError):
        keys.get(FIRST)
    keys.erase(FIRST)
    assert keys.get(FIRST) is None


def test_bytes_are_flushed_before_they_get_their_name_and_overwritten_before_they_lose_it(
    keys: RoundKeys, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def noted(name: str, call: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*arguments: object, **named: object) -> None:
            what = name
            if name == "fsync":
                target = Path(f"/proc/self/fd/{arguments[0]}").readlink()
                what = "fsync folder" if target == folder else "fsync file"
            steps.append(what)
            call(*arguments, **named)

        return wrapped

    for name in ("fsync", "replace", "unlink"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    keys.put(FIRST, PRIVATE)
    assert steps == ["fsync file", "replace", "fsync folder"]
    steps.clear()
    keys.erase(FIRST)
    assert steps == ["fsync file", "unlink", "fsync folder"]


DYING = """
import os, signal, sys
from pathlib import Path
from secagg_keyholder.vault import RoundKeys

keys = RoundKeys(Path(sys.argv[1]), {passphrase!r})
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] != "nowhere":
    setattr(os, sys.argv[2], die)
getattr(keys, sys.argv[3])(bytes(32), *([bytes(96)] if sys.argv[3] == "put" else []))
"""


def dies(folder: Path, call: str, step: str = "nowhere", failpoint: str = "") -> None:
    command = [sys.executable, "-c", DYING.format(passphrase=PASSPHRASE), str(folder), step, call]
    ended = subprocess.run(
        command, env=os.environ | {"SECAGG_FAILPOINT": failpoint}, capture_output=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_process_killed_while_it_stores_leaves_no_key(folder: Path, step: str) -> None:
    RoundKeys(folder, PASSPHRASE)
    dies(folder, "put", step)
    assert any(path.name.endswith(".draft") for path in folder.iterdir())
    keys = RoundKeys(folder, PASSPHRASE)
    assert keys.get(bytes(32)) is None
    assert [path.name for path in folder.iterdir()] == ["salt"]


def test_a_process_killed_once_it_has_stored_leaves_the_key(folder: Path) -> None:
    dies(folder, "put", failpoint="key-stored")
    assert RoundKeys(folder, PASSPHRASE).get(bytes(32)) == bytes(96)


def test_a_process_killed_while_it_erases_leaves_nothing_that_opens(folder: Path) -> None:
    RoundKeys(folder, PASSPHRASE).put(bytes(32), bytes(96))
    dies(folder, "erase", "unlink")
    keys = RoundKeys(folder, PASSPHRASE)
    assert keys.names() == {bytes(32)}
    with pytest.raises(ConfigurationError):
        keys.get(bytes(32))
    keys.erase(bytes(32))
    assert keys.names() == set()


def test_a_process_killed_once_it_has_erased_leaves_nothing(folder: Path) -> None:
    RoundKeys(folder, PASSPHRASE).put(bytes(32), bytes(96))
    dies(folder, "erase", failpoint="release-key-erased")
    assert [path.name for path in folder.iterdir()] == ["salt"]


def test_a_repr_shows_no_secret(keys: RoundKeys) -> None:
    assert PASSPHRASE not in repr(keys)
