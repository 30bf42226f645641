"""Puts a backup of the ledger in the place of a lost one."""

from __future__ import annotations

from pathlib import Path

from secagg.audit import load_audit_key
from secagg.errors import ConfigurationError
from secagg.settings import write_private
from secagg_keyholder.ledger import Ledger

__all__ = ["restore_ledger"]

_LEDGER = "ledger.sqlite3"


def restore_ledger(backup: Path, state_dir: Path) -> None:
    """Copy a backup into an empty state directory.

    Raises:
        ConfigurationError: there is a ledger already, or the file is not a backup.
    """
    target = state_dir / _LEDGER
    if target.exists():
        raise ConfigurationError(
            f"expected a state_dir without a ledger; {str(state_dir)!r} has one, which knows more "
            "than any backup; move it away only if it is damaged"
        )
    try:
        data = backup.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"expected a readable backup; {backup}: {error.strerror}"
        ) from None
    write_private(target, data)
    try:
        ledger = Ledger(target, load_audit_key(state_dir / "audit.key"))
        restored = ledger.restored()
        ledger.close()
    except ConfigurationError:
        target.unlink()
        raise
    if not restored:
        target.unlink()
        raise ConfigurationError(
            "expected a file written by `secagg-keyholder backup`; this is a ledger that was "
            "copied some other way: it could reopen rounds that were released"
        )
