"""Builds the images where no image registry can be reached, looks into them, and runs them.

``python -m deploy.rehearsal`` needs podman and debootstrap, and root. The Dockerfile is used as it
is; only its base is a stand-in, made of Debian packages, unless ``--base`` names a real one.
"""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["IMAGES", "ROOT", "RehearsalError", "image", "say"]

ROOT = Path(__file__).parents[2]
IMAGES = ("server", "keyholder", "client")


class RehearsalError(Exception):
    """Something could not be built, or is not as it should be; says what was expected."""


def image(target: str) -> str:
    """The rehearsal's name of an image, such as ``localhost/secagg-server:rehearsal``."""
    return f"localhost/secagg-{target}:rehearsal"


def say(line: str) -> None:
    """Progress, on standard error."""
    print(line, file=sys.stderr, flush=True)
