"""Custodians: the key holder's passphrase, split so that a number of people must come together.

Shares are SLIP-39 mnemonics of the passphrase's 32 bytes (Shamir's scheme over GF(256)): fewer
than the threshold say nothing about it. A leaf that needs the extra ``keyholder``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from secagg.errors import ConfigurationError

if TYPE_CHECKING:
    from shamir_mnemonic import Share

__all__ = ["MAX_CUSTODIANS", "check_custodians", "combine", "fresh_passphrase", "split"]

MAX_CUSTODIANS = 16
"""Shares of one secret, at most (SLIP-39)."""

_SECRET_BYTES = 32
_PASSPHRASE = re.compile(r"[0-9a-f]{64}")
# Of the work to combine shares, which each share names itself: 15 would take minutes.
_EXPONENT = 1


def fresh_passphrase() -> str:
    """A new passphrase: 32 bytes from the operating system, in hexadecimal."""
    return os.urandom(_SECRET_BYTES).hex()


def check_custodians(threshold: int, count: int) -> None:
    """Refuse numbers of custodians that cannot be.

    Raises:
        ConfigurationError: not ``2 <= threshold <= count <= 16``.
    """
    if not 2 <= threshold <= count <= MAX_CUSTODIANS:
        raise ConfigurationError(
            f"expected 2 <= threshold <= custodians <= {MAX_CUSTODIANS}; got threshold={threshold} "
            f"custodians={count}; choose numbers within"
        )


def split(passphrase: str, threshold: int, count: int) -> list[str]:
    """Shares of a passphrase, one mnemonic a custodian; any ``threshold`` of them combine.

    Raises:
        ConfigurationError: see :func:`check_custodians`; not a passphrase as
            :func:`fresh_passphrase` makes them; the extra ``keyholder`` is not installed.
    """
    check_custodians(threshold, count)
    if _PASSPHRASE.fullmatch(passphrase) is None:
        raise ConfigurationError(
            f"expected a passphrase of {2 * _SECRET_BYTES} lower-case hexadecimal digits to split; "
            "got another; leave the choice of passphrase to `secagg provision`"
        )
    _require_extra()
    from shamir_mnemonic import generate_mnemonics

    secret = bytes.fromhex(passphrase)
    groups = generate_mnemonics(1, [(threshold, count)], secret, iteration_exponent=_EXPONENT)
    return list(groups[0])


def combine(shares: Sequence[str]) -> str:
    """The passphrase of which these are shares; more than needed do no harm.

    Raises:
        ConfigurationError: too few, damaged, of different secrets, or the extra ``keyholder`` is
            not installed.
    """
    _require_extra()
    from shamir_mnemonic import MnemonicError, combine_mnemonics

    parsed = [_parsed(share, number) for number, share in enumerate(shares, start=1)]
    if len({share.group_parameters() for share in parsed}) > 1:
        raise _different()
    if any(share.iteration_exponent != _EXPONENT for share in parsed):
        raise ConfigurationError(
            "expected shares that `secagg provision` wrote; these ask for another amount of work "
            "to combine them; bring the shares as they were handed out"
        )
    by_index = {share.index: share for share in parsed}
    threshold = parsed[0].member_threshold if parsed else 2
    missing = threshold - len(by_index)
    if missing > 0:
        raise ConfigurationError(
            f"expected {threshold if parsed else 'at least 2'} different shares of the passphrase; "
            f"got {len(by_index)}; bring {missing} more"
        )
    chosen = [by_index[index].mnemonic() for index in sorted(by_index)[:threshold]]
    try:
        secret = combine_mnemonics(chosen)
    except MnemonicError:
        raise _different() from None
    if len(secret) != _SECRET_BYTES:
        raise ConfigurationError(
            f"expected shares of a secret of {_SECRET_BYTES} bytes; got bytes={len(secret)}; bring "
            "shares that `secagg provision` wrote"
        )
    return secret.hex()


def _parsed(share: str, number: int) -> Share:
    from shamir_mnemonic import MnemonicError, Share

    try:
        return Share.from_mnemonic(share)
    # Its own error repeats the words, which are the secret.
    except (MnemonicError, ValueError):
        raise ConfigurationError(
            f"expected a share as it was written; share {number} is damaged: its checksum or a "
            "word does not fit; check it word by word"
        ) from None


def _different() -> ConfigurationError:
    return ConfigurationError(
        "expected shares of one passphrase; these belong to different ones; bring the shares that "
        "were made with the newest identity of the key holder"
    )


def _require_extra() -> None:
    try:
        import shamir_mnemonic  # noqa: F401
    except ImportError:
        raise ConfigurationError(
            "expected the package shamir-mnemonic, which splits and combines passphrases; it is "
            "not installed; run pip install 'secagg[keyholder]'"
        ) from None
