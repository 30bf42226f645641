"""Secrets at rest: the passphrase, the identity key, and the private keys of open rounds.

Everything here is worth nothing without the passphrase. A round key's file lives as long as its
round is open: what was recorded of a round can never be opened again once the file is erased.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from pydantic import SecretStr

from secagg.errors import ConfigurationError, SecaggError, StorageError
from secagg.failpoints import failpoint
from secagg.private_files import flush, make_folder, open_to_others, remove_drafts, write
from secagg.receipts import SigningKey
from secagg.transcript import DIGEST_BYTES, encode
from secagg.wire.codec import exact

__all__ = ["RoundKeys", "load_identity", "unsealing_passphrase"]

_MAX_SECRET_BYTES = 4096
_ENCRYPTED_PEM = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"
_SALT_BYTES = 16
_NONCE_BYTES = 12
_KEY_FILE = re.compile(r"([0-9a-f]{64})\.key")


def unsealing_passphrase(
    *, passphrase: SecretStr | None, passphrase_file: Path | None, share_files: Sequence[Path]
) -> str:
    """The passphrase that opens the key holder's secrets.

    Args:
        passphrase: itself.
        passphrase_file: a file that holds it; white space around it is not part of it.
        share_files: files of one custodian's mnemonic each.

    Raises:
        ConfigurationError: not exactly one of the three; an empty one; a file that cannot be read
            or that others than its owner can; shares that do not combine.
    """
    given = [passphrase is not None, passphrase_file is not None, bool(share_files)]
    if sum(given) != 1:
        raise ConfigurationError(
            "expected exactly one of a passphrase, a passphrase file and custodians' share files; "
            f"got {sum(given)} of them"
        )
    if passphrase_file is not None:
        return _private_text(passphrase_file)
    if passphrase is not None:
        if not passphrase.get_secret_value():
            raise ConfigurationError("expected a passphrase; it is empty; set it or a file of it")
        return passphrase.get_secret_value()
    from secagg import custodians

    return custodians.combine([" ".join(_private_text(path).split()) for path in share_files])


def _private_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(_MAX_SECRET_BYTES + 1)
        text = data.decode().strip()
    except OSError as error:
        raise ConfigurationError(f"expected a readable file; {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"expected text in {path}; it is not UTF-8") from None
    if open_to_others(status):
        raise ConfigurationError(
            f"expected {path} to be for its owner alone; got mode {status.st_mode & 0o777:04o}; "
            "run chmod 600 on it"
        )
    if not text or len(data) > _MAX_SECRET_BYTES:
        raise ConfigurationError(
            f"expected 1 to {_MAX_SECRET_BYTES} bytes of text in {path}; it holds none or more"
        )
    return text


def load_identity(path: Path, passphrase: str) -> SigningKey:
    """The Ed25519 key by which the key holder is known, from its encrypted PKCS#8 PEM.

    Raises:
        ConfigurationError: not there, not encrypted, not Ed25519, or another passphrase.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"expected the key holder's identity key; {path}: {error.strerror}; `secagg provision` "
            "makes one"
        ) from None
    if _ENCRYPTED_PEM not in data:
        raise ConfigurationError(
            f"expected an encrypted private key (PKCS#8 PEM) in {path}; it is not encrypted, or "
            "not one; `secagg provision` makes one"
        )
    try:
        key = load_pem_private_key(data, passphrase.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigurationError(
            f"expected {path} to open with the passphrase; it does not; check that passphrase and "
            "key belong together, and that the file is whole"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError(
            f"expected an Ed25519 key in {path}; got another kind; `secagg provision` makes one"
        )
    return SigningKey(key)


class RoundKeys:
    """Private keys of open rounds: a file each, encrypted under the passphrase.

    A file that was renamed to another round's opens nothing, because its name is authenticated.

    Args:
        folder: made if it is not there; for its owner alone.
        passphrase: stretched with scrypt and a salt that is kept in the folder.

    Raises:
        ConfigurationError: the folder cannot be used, is open to others, or has lost its salt.
    """

    def __init__(self, folder: Path, passphrase: str) -> None:
        self._folder = folder
        with _as_error(ConfigurationError, folder):
            _make_private(folder)
            remove_drafts(folder)
            salt = self._salt()
        # OWASP's setting for interactive use: 32 MiB and about 0.1 s, once a start.
        stretched = Scrypt(salt=salt, length=32, n=2**15, r=8, p=1).derive(passphrase.encode())
        self._cipher = ChaCha20Poly1305(stretched)

    def _salt(self) -> bytes:
        path = self._folder / "salt"
        if not path.exists():
            if self.names():
                raise ConfigurationError(
                    f"expected the salt of the round keys in {self._folder}; it is gone, and they "
                    "do not open without it; put it back, or remove the keys to abandon the rounds"
                )
            write(path, os.urandom(_SALT_BYTES))
        salt = path.read_bytes()
        if len(salt) != _SALT_BYTES:
            raise ConfigurationError(
                f"expected a salt of {_SALT_BYTES} bytes in {path}; got bytes={len(salt)}; put the "
                "right one back, or remove it with the keys to abandon the rounds"
            )
        return salt

    def put(self, round_key_id: bytes, private: bytes) -> None:
        """Store a round's private key; on return it survives a power failure.

        Raises:
            StorageError: the disk is full or fails; the key does not count as stored.
        """
        path, nonce = self._path(round_key_id), os.urandom(_NONCE_BYTES)
        with _as_error(StorageError, self._folder):
            write(path, nonce + self._cipher.encrypt(nonce, private, _bound_to(path)))
        failpoint("key-stored")

    def get(self, round_key_id: bytes) -> bytes | None:
        """A round's private key; None when there is none.

        Raises:
            ConfigurationError: there is a file, and it does not open: damaged, half erased,
                another round's, or stored under another passphrase.
        """
        path = self._path(round_key_id)
        try:
            data = path.read_bytes()
            return self._cipher.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], _bound_to(path))
        except FileNotFoundError:
            return None
        except (OSError, InvalidTag, ValueError):
            raise ConfigurationError(
                f"expected {path.name} to open with the passphrase; it does not; start with the "
                "passphrase it was stored under, or remove it to abandon its round"
            ) from None

    def erase(self, round_key_id: bytes) -> None:
        """Overwrite and remove a round's private key; one that is gone is no error.

        Record the end of the round first: a crash in between leaves a file that opens nothing.
        Copies that the file system or the disk has made of the file are beyond reach, and open
        with the passphrase alone.

        Raises:
            StorageError: the disk fails; the key may still be there.
        """
        path = self._path(round_key_id)
        with _as_error(StorageError, self._folder):
            with suppress(FileNotFoundError):
                _overwrite(path)
                path.unlink()
            flush(self._folder)
        failpoint("release-key-erased")

    def names(self) -> set[bytes]:
        """The ids of the rounds whose keys are here.

        Raises:
            StorageError: the folder cannot be read.
        """
        with _as_error(StorageError, self._folder):
            found = (_KEY_FILE.fullmatch(path.name) for path in self._folder.iterdir())
            return {bytes.fromhex(match[1]) for match in found if match}

    def _path(self, round_key_id: bytes) -> Path:
        return self._folder / f"{exact('round_key_id', round_key_id, DIGEST_BYTES).hex()}.key"


def _bound_to(path: Path) -> bytes:
    return encode("round key file", path.name)


@contextmanager
def _as_error(kind: type[SecaggError], folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise kind(
            f"expected a folder of round keys that can be written; {folder}: {error.strerror}; "
            "check its owner, its disk and the space left"
        ) from None


def _make_private(folder: Path) -> None:
    make_folder(folder)
    mode = folder.stat().st_mode & 0o777
    if mode & 0o077:
        raise ConfigurationError(
            f"expected {folder} to be for its owner alone; got mode {mode:04o}; run chmod 700 on it"
        )


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(os.urandom(os.fstat(file.fileno()).st_size))
        file.flush()
        os.fsync(file.fileno())
