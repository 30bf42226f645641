"""A user's word that this client contributes nothing for now: a file, which a running client heeds.

It is looked for before a round is asked for, before training, and before each message of an upload.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from secagg.errors import ConfigurationError, PausedError
from secagg.private_files import flush, write

__all__ = ["Switch"]

_FILE = "paused"


class Switch:
    """Pauses and resumes whoever uses a folder.

    Args:
        folder: private to this client; None is never paused.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @property
    def paused(self) -> bool:
        """Whether nothing may be contributed."""
        return self._folder is not None and (self._folder / _FILE).exists()

    def since(self) -> str | None:
        """When it was paused, ISO 8601 in UTC; empty if that is not known, None if it is not."""
        try:
            return (self._folder / _FILE).read_text(encoding="utf-8") if self._folder else None
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError):
            return ""

    def require_on(self) -> None:
        """Go on only if nobody has paused this client.

        Raises:
            PausedError: somebody has.
        """
        if self.paused:
            raise PausedError(
                "expected a client that takes part; it is paused; nothing more is sent; run "
                "`secagg-client resume` to go on"
            )

    def pause(self) -> None:
        """Contribute nothing from now on; a first pause stands.

        Raises:
            ConfigurationError: the folder cannot be written.
        """
        if self._folder is None or self.paused:
            return
        try:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            write(self._folder / _FILE, now.encode())
        except OSError as error:
            raise self._unusable(error) from None

    def resume(self) -> None:
        """Contribute again.

        Raises:
            ConfigurationError: the folder cannot be written.
        """
        if self._folder is None:
            return
        try:
            (self._folder / _FILE).unlink()
            flush(self._folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: OSError) -> ConfigurationError:
        return ConfigurationError(
            f"expected a state folder that can be written; {self._folder}: {error.strerror}; "
            "nothing has changed; stop the client's process instead"
        )
