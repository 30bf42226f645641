"""Virtual environments for systems whose libraries do not go with ours, made when they are needed.

A system has one if there is a file for it in ``requirements``, which pins all that goes into it; it
is made anew when that file, or the Python, is another one. Other systems run in the environment
that this is.
"""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
from pathlib import Path

from secagg.errors import UnavailableError

__all__ = ["FOLDER", "interpreter"]

FOLDER = Path("build", "peers")
"""Where environments are made, in a checkout."""

_REQUIREMENTS = Path(__file__).with_name("requirements")
_LIMIT_S = 900.0
# An index that cannot be reached is not asked for long.
_INSTALL = ("install", "--quiet", "--no-deps", "--no-compile", "--retries", "1", "--timeout", "15")


def interpreter(system: str, folder: Path = FOLDER) -> Path:
    """The Python that a system runs in; its environment is made first, if that has to be.

    Args:
        system: its name.
        folder: of all environments. What pip said is beside each, in a log.

    Raises:
        UnavailableError: an environment cannot be made, such as without a network.
    """
    requirements = _REQUIREMENTS / f"{system}.txt"
    if not requirements.is_file():
        return Path(sys.executable)
    home = folder.resolve() / system
    python, stamp = home / "bin" / "python", home / "made-from"
    wanted = hashlib.sha256(sys.version.encode() + requirements.read_bytes()).hexdigest()
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_suffix(".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes meanwhile waits, and finds it made
        if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted):
            _make(system, home, python, requirements)
            stamp.write_text(wanted, encoding="utf-8")  # last: what is half made has none
    return python


def _make(system: str, home: Path, python: Path, requirements: Path) -> None:
    here = (sys.executable, "-m")
    commands: list[tuple[str | Path, ...]] = [
        (*here, "venv", "--clear", "--without-pip", home),
        # Our pip: another one would have to be installed first.
        (*here, "pip", "--python", python, *_INSTALL, "--requirement", requirements),
    ]
    with home.with_suffix(".log").open("wb") as log:
        for command in commands:
            try:
                subprocess.run(  # noqa: S603 - venv and pip, no shell
                    command, check=True, timeout=_LIMIT_S, stdout=log, stderr=subprocess.STDOUT
                )
            except (subprocess.SubprocessError, OSError) as error:
                raise UnavailableError(
                    f"expected to install what {system} needs into an environment of its own; "
                    f"{command[2]} did not succeed; see {log.name} and try again with a network"
                ) from error
