"""podman, in a mount namespace of our own where it does not take the machine's control groups."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.rehearsal import RehearsalError

__all__ = ["configured", "enter_namespace", "inspect", "podman", "require", "run"]

_UNIFIED = Path("/sys/fs/cgroup/unified")
_ENTERED = "SECAGG_REHEARSAL_NAMESPACE"


def run(
    command: Iterable[str | Path],
    *,
    check: bool = True,
    timeout_s: float = 900,
    **options: Any,  # noqa: ANN401 - handed on
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end.

    Raises:
        RehearsalError: it failed, and ``check``; or it took longer than ``timeout_s``.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(  # noqa: S603
            words, capture_output=True, text=True, check=False, timeout=timeout_s, **options
        )
    except subprocess.TimeoutExpired:
        raise RehearsalError(
            f"expected `{' '.join(words[:4])} ...` to end within {timeout_s:g} s; it did not"
        ) from None
    if check and done.returncode:
        raise RehearsalError(
            f"expected `{' '.join(words[:4])} ...` to work; it ended with {done.returncode}:\n"
            + "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        )
    return done


def podman(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401
    """Run podman; see :func:`run`."""
    return run(["podman", *words], **options)


def inspect(kind: str, name: str) -> dict[str, Any]:
    """What podman knows of an ``image`` or a ``container``.

    Raises:
        RehearsalError: there is none of that name.
    """
    found: list[dict[str, Any]] = json.loads(podman(kind, "inspect", name).stdout)
    return found[0]


def require(*programs: str) -> None:
    """Raise unless these programs are there, and we are root.

    Raises:
        RehearsalError: says which is not, and what to do.
    """
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise RehearsalError(
            f"expected {' and '.join(programs)} on this machine; got none of the name "
            f"{' or '.join(missing)}; install it (Debian has packages of these names)"
        )
    if os.geteuid():
        raise RehearsalError("expected root, which debootstrap needs; run it with sudo")


def _hybrid() -> bool:
    """Whether both versions of control groups are mounted, which crun refuses."""
    return _UNIFIED.is_mount()


def enter_namespace(module: str = "deploy.rehearsal") -> None:
    """Where it is needed, start again in a mount namespace without the second control groups.

    Nothing outside of it changes. Elsewhere, this does nothing.

    Args:
        module: what is run.
    """
    if not _hybrid() or os.environ.get(_ENTERED):
        return
    script = f'umount {_UNIFIED} && exec "$@"'
    program = [sys.executable, "-m", module, *sys.argv[1:]]
    os.environ[_ENTERED] = "1"
    os.execvp("unshare", ["unshare", "--mount", "sh", "-c", script, "sh", *program])  # noqa: S606, S607


@contextmanager
def configured() -> Iterator[None]:
    """For a while, tell podman to leave control groups alone, if we are in that namespace."""
    if not os.environ.get(_ENTERED):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="secagg-rehearsal-") as folder:
        file = Path(folder) / "containers.conf"
        file.write_text(
            f'[containers]\ncgroups = "disabled"\ndefault_ulimits = {_limits()}\n'
            '[engine]\nevents_logger = "file"\n'
        )
        with _environment({"CONTAINERS_CONF": str(file)}):
            yield


def _limits() -> str:
    """No more than we have ourselves: what engines ask for may be refused."""
    asked = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    have = {name: resource.getrlimit(number)[1] for name, number in asked.items()}
    allowed = {name: 4096 if hard < 0 else min(hard, 4096) for name, hard in have.items()}
    return json.dumps([f"{name}={limit}:{limit}" for name, limit in allowed.items()])


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
