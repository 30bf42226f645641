"""Wheel and source distribution, the same bytes wherever and whenever they are built.

Built from the commit, not from the folder: nothing that lies about gets in. The source distribution
is made first, and the wheel from it, so that whoever has the one can make the other. Times in them
are the commit's, and the build tools those of ``deploy/requirements/build.txt``.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from packaging.metadata import Metadata

from deploy.release import REQUIREMENTS, Project, ReleaseError, git
from deploy.release.lock import BUILD

__all__ = ["build", "check_sdist", "check_wheel", "commit_time", "sha256"]

# Code, its stubs and marker, what the operator's page is made of, and what benchmarks are told of.
_IN_PACKAGES = {".py", ".pyi", ".typed", ".html", ".css", ".js", ".svg"}
_IN_BENCHMARKS = {".toml", ".txt"}


def commit_time(folder: Path) -> int:
    """When the newest commit was made, in seconds since 1970."""
    return int(git(folder, "log", "-1", "--format=%ct", "HEAD"))


def build(folder: Path, out: Path) -> tuple[Path, Path]:
    """Build the newest commit of the checkout ``folder``; returns source distribution and wheel.

    Raises:
        ReleaseError: no checkout, or it cannot be built.
    """
    epoch = commit_time(folder)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        tools, source, unpacked = (Path(scratch) / name for name in ("tools", "source", "unpacked"))
        _install_tools(folder, tools)
        archive = Path(scratch) / "source.tar"
        git(folder, "-c", "tar.umask=0022", "archive", "--output", str(archive), "HEAD")
        _unpack(archive, source)
        sdist = _hatchling(tools, source, "sdist", out, epoch)
        _unpack(sdist, unpacked)
        (top,) = unpacked.iterdir()
        wheel = _hatchling(tools, top, "wheel", out, epoch)
    return sdist, wheel


def _install_tools(folder: Path, tools: Path) -> None:
    requirements = folder / REQUIREMENTS / f"{BUILD}.txt"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tools)]
    command += ["--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", str(requirements)]
    _run([*command, "--disable-pip-version-check", "--no-compile"], folder, dict(os.environ))


def _hatchling(tools: Path, source: Path, target: str, out: Path, epoch: int) -> Path:
    # -S: with the tools that are locked, not with those of the environment this runs in.
    command = [sys.executable, "-S", "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    environment = {
        "PYTHONPATH": str(tools),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": os.defpath,
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "SOURCE_DATE_EPOCH": str(epoch),
    }
    said = _run(command, source, environment).splitlines()
    built = Path(said[-1].strip()) if said else Path()
    if not built.is_file():
        raise ReleaseError(f"expected hatchling to build a {target}; it said: {' '.join(said)}")
    return built


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(  # noqa: S603 - fixed arguments, no shell
        command,
        cwd=folder,
        env=environment,
        umask=0o022,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ReleaseError(
            f"expected `{' '.join(command[1:4])}` to succeed; it exited with {done.returncode}: "
            f"{done.stderr.strip()[-2000:]}"
        )
    return done.stdout + done.stderr


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- what is in them ----------------------------------------------------------------------------


def check_wheel(wheel: Path, project: Project) -> None:
    """The wheel holds the packages of ``pyproject.toml``, code alone, and says what it should.

    Raises:
        ReleaseError: the first thing that is not so.
    """
    info = f"{project.name}-{project.version}.dist-info"
    with zipfile.ZipFile(wheel) as opened:
        entries = [entry for entry in opened.infolist() if not entry.is_dir()]
        metadata = opened.read(f"{info}/METADATA")
    tops = {PurePosixPath(entry.filename).parts[0] for entry in entries}
    if tops != {*project.packages, info}:
        raise ReleaseError(
            f"expected {', '.join(sorted(project.packages))} in {wheel.name}; it has "
            f"{', '.join(sorted(tops - {info}))}; see [tool.hatch.build.targets.wheel]"
        )
    for entry in entries:
        path = PurePosixPath(entry.filename)
        more = _IN_BENCHMARKS if path.parts[0] == "secagg_bench" else set()
        if path.parts[0] != info and path.suffix not in _IN_PACKAGES | more:
            raise ReleaseError(
                f"expected code alone in {wheel.name}; it has {path}; keep it out of the package, "
                "or name its kind in deploy/release/artifacts.py"
            )
        mode = entry.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG) or stat.S_IMODE(mode) not in (0o644, 0o755):
            raise ReleaseError(
                f"expected files that everybody may read in {wheel.name}; {path} has mode {mode:o}"
            )
    _check_metadata(metadata, project, wheel.name)


def check_sdist(sdist: Path, project: Project, tracked: Collection[str]) -> None:
    """The source distribution holds the files that git tracks, its own record, and nothing else.

    Raises:
        ReleaseError: the first thing that is not so.
    """
    top = f"{project.name}-{project.version}"
    with tarfile.open(sdist) as opened:
        found = {member.name for member in opened if not member.isdir()}
        record = opened.extractfile(f"{top}/PKG-INFO")
        metadata = record.read() if record else b""
    expected = {f"{top}/{name}" for name in (*tracked, "PKG-INFO")}
    if differing := sorted(found ^ expected):
        raise ReleaseError(
            f"expected the files that git tracks in {sdist.name}; {differing[0]} is in one alone, "
            f"as are {len(differing) - 1} others; see .gitignore and [tool.hatch.build]"
        )
    _check_metadata(metadata, project, sdist.name)


def _check_metadata(text: bytes, project: Project, where: str) -> None:
    try:
        said = Metadata.from_email(text, validate=True)
    except ExceptionGroup as group:
        raise ReleaseError(
            f"expected valid metadata in {where}; {'; '.join(map(str, group.exceptions))}"
        ) from None
    for key, got, expected in (
        ("name", said.name, project.name),
        ("version", str(said.version), str(project.version)),
        ("licence", said.license_expression, project.metadata["license"]),
        ("requires-python", str(said.requires_python), project.metadata["requires-python"]),
        ("description's type", said.description_content_type, "text/markdown"),
        ("extras", sorted(said.provides_extra or []), sorted(project.extras)),
    ):
        if got != expected:
            raise ReleaseError(f"expected {key} {expected!r} in {where}; got {got!r}")
