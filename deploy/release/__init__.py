"""Making a release: lock files, wheel, source distribution, bills of materials, checksums.

``python -m deploy.release --help`` says what there is; ``make release`` is what is used. It runs in
the development environment and is part of no package.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import Version

__all__ = [
    "REQUIREMENTS",
    "ROOT",
    "Project",
    "ReleaseError",
    "check_changelog",
    "git",
    "project_version",
]

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path("deploy", "requirements")  # in a checkout
_NEWEST = re.compile(r"^## (?P<version>\S+)(?: \((?P<note>[^)]*)\))?$", re.MULTILINE)
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
UNRELEASED = "not released"


class ReleaseError(Exception):
    """A release that cannot be made, or should not be; the message says what to do."""


@dataclass(frozen=True)
class Project:
    """What ``pyproject.toml`` says, the only place that knows the version."""

    metadata: dict[str, Any]
    build_requires: tuple[str, ...]
    packages: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path = ROOT) -> Project:
        found = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
        wheel = found["tool"]["hatch"]["build"]["targets"]["wheel"]
        packages = tuple(Path(path).name for path in wheel["packages"])
        return cls(found["project"], tuple(found["build-system"]["requires"]), packages)

    @property
    def name(self) -> str:
        return str(self.metadata["name"])

    @property
    def version(self) -> Version:
        return Version(self.metadata["version"])

    @property
    def extras(self) -> tuple[str, ...]:
        return tuple(self.metadata["optional-dependencies"])

    def requirements(self, extras: tuple[str, ...]) -> list[str]:
        """What is required with ``extras``, those that extras ask for themselves included."""
        offered: dict[str, list[str]] = self.metadata["optional-dependencies"]
        own = re.compile(rf"{re.escape(canonicalize_name(self.name))}\[(?P<extras>[^]]+)\]")
        found, seen, open_extras = list(self.metadata["dependencies"]), set[str](), [*extras]
        while open_extras:
            extra = open_extras.pop(0)
            if extra in seen:
                continue
            seen.add(extra)
            for line in offered[extra]:
                if inner := own.fullmatch(line):
                    open_extras += [name.strip() for name in inner["extras"].split(",")]
                else:
                    found.append(line)
        return list(dict.fromkeys(found))


def project_version(folder: Path = ROOT) -> str:
    """The version in ``pyproject.toml``, as it is written there."""
    return str(Project.read(folder).metadata["version"])


def check_changelog(folder: Path, version: Version) -> None:
    """The changelog begins with the version at hand: dated if it is a release, open if it is not.

    Raises:
        ReleaseError: it begins with another version, or says of a release that it is none.
    """
    path = folder / "CHANGELOG.md"
    newest = _NEWEST.search(path.read_text(encoding="utf-8"))
    said = newest[0] if newest else "nothing"
    if not newest or newest["version"] != version.base_version:
        raise ReleaseError(
            f"expected {path.name} to begin with '## {version.base_version}'; it begins with "
            f"{said!r}; say there what the version changes"
        )
    note = newest["note"] or ""
    if version.is_devrelease and note != UNRELEASED:
        raise ReleaseError(
            f"expected '## {version.base_version} ({UNRELEASED})' in {path.name}, for "
            f"pyproject.toml has {version}; got {said!r}; take the .dev away, or the date"
        )
    if not version.is_devrelease and not _DAY.fullmatch(note):
        raise ReleaseError(
            f"expected '## {version.base_version} (YYYY-MM-DD)' in {path.name}; got {said!r}; put "
            "the day of the release there"
        )


def git(folder: Path, *arguments: str) -> str:
    """What a git command prints.

    Raises:
        ReleaseError: it failed; git is missing, or this is no checkout.
    """
    try:
        done = subprocess.run(  # noqa: S603 - fixed arguments, no shell
            ["git", *arguments],  # noqa: S607 - the developer's own git
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except FileNotFoundError:
        raise ReleaseError("expected git; there is none on the path; install it") from None
    except subprocess.CalledProcessError as error:
        lines = str(error.stderr).strip().splitlines()
        raise ReleaseError(
            f"expected a git checkout in {folder}; `git {arguments[0]}` said: "
            f"{lines[-1] if lines else 'nothing'}"
        ) from None
    return done.stdout
