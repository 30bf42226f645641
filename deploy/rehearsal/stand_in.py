"""A stand-in for python:3.11-slim-bookworm: the same Debian, with Python and pip in /usr/local.

It differs in Python itself, which is Debian's build here, and in its size. It never takes the name
of the real image.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from deploy.rehearsal import RehearsalError, say
from deploy.rehearsal.engine import podman, run

__all__ = ["NAME", "make"]

NAME = "localhost/secagg-rehearsal/python:3.11-slim-bookworm"
_SUITE = "bookworm"
# python3-distutils: what python3.11-venv asks for under a name that debootstrap does not know.
_PACKAGES = (
    "python3.11",
    "python3.11-venv",
    "python3-distutils",
    "ca-certificates",
    "netbase",
    "tzdata",
)
_CHANGES = (
    "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
    'CMD ["python3"]',
)


def make(*, fresh: bool = False) -> str:
    """The name of the stand-in, made now unless it is there.

    Raises:
        RehearsalError: Debian's packages cannot be had.
    """
    if not fresh and podman("image", "exists", NAME, check=False).returncode == 0:
        say(f"base: {NAME}, from before")
        return NAME
    say("base: debootstrap, about a minute")
    folder = Path(tempfile.mkdtemp(prefix="secagg-rehearsal-base-"))
    try:
        root = folder / "root"
        run(["debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", _SUITE, root])
        # As in the real one: programs in /usr/local/bin, pip in a folder that pip may change.
        run(["chroot", root, "python3.11", "-m", "venv", "/usr/local"])
        for cached in ("var/cache/apt/archives", "var/lib/apt/lists", "debootstrap", "var/log"):
            shutil.rmtree(root / cached, ignore_errors=True)
        _import(root)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return NAME


def _import(root: Path) -> None:
    changes = [word for change in _CHANGES for word in ("--change", change)]
    with subprocess.Popen(  # noqa: S603
        ["tar", "--numeric-owner", "--exclude=./dev/*", "-C", str(root), "-c", "."],  # noqa: S607
        stdout=subprocess.PIPE,
    ) as packing:
        podman("import", *changes, "-", NAME, stdin=packing.stdout)
    if packing.returncode:
        raise RehearsalError(f"expected tar to pack {root}; it ended with {packing.returncode}")
