"""Builds the images from the Dockerfile as it is."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from deploy.rehearsal import ROOT, image, say
from deploy.rehearsal.engine import podman, run
from deploy.rehearsal.pip_settings import folders, pip_conf, settings

__all__ = ["build", "project_version", "source_date_epoch"]


def project_version(root: Path = ROOT) -> str:
    """The version in pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


def source_date_epoch(root: Path = ROOT) -> int:
    """Seconds since 1970: SOURCE_DATE_EPOCH, or when the newest commit was made."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    return int(run(["git", "-C", root, "log", "-1", "--format=%ct"]).stdout)


def build(target: str, base: str, *, context: Path = ROOT, fresh: bool = False) -> None:
    """Build an image, under the name that `image` gives.

    Raises:
        RehearsalError: with the end of what the build said.
    """
    found = settings(sys.executable)
    epoch = source_date_epoch(context)
    arguments = {
        "PYTHON_IMAGE": base,
        "VERSION": project_version(context),
        "REVISION": run(["git", "-C", ROOT, "rev-parse", "HEAD"]).stdout.strip(),
        "CREATED": datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if target == "client" and (digest := _local_torch(found, context)):
        arguments["TORCH_SHA256"] = digest
    say(f"{target}: build; minutes, unless nothing changed")
    with tempfile.TemporaryDirectory(prefix="secagg-rehearsal-") as folder:
        secret = Path(folder) / "pip.conf"
        secret.touch(mode=0o600)
        secret.write_text(pip_conf(found), encoding="utf-8")
        podman(
            # Docker's format: the other one has no HEALTHCHECK. The host's network: its name
            # servers may be on a loopback.
            *("build", "--format", "docker", "--network", "host", "--layers"),
            *(["--no-cache"] if fresh else []),
            *("--file", context / "deploy/Dockerfile", "--target", target, "--tag", image(target)),
            *("--secret", f"id=pip,src={secret}"),
            *(word for each in folders(found) for word in ("--volume", f"{each}:{each}:ro")),
            *(
                word
                for key, value in arguments.items()
                for word in ("--build-arg", f"{key}={value}")
            ),
            context,
        )
    podman("tag", image(target), image(target).replace(":rehearsal", f":{arguments['VERSION']}"))


def _local_torch(found: Mapping[str, str], context: Path) -> str | None:
    """The SHA-256 of torch's wheel, where pip is told of a folder that holds just one."""
    lock = (context / "deploy/requirements/client-torch.txt").read_text(encoding="utf-8")
    version = lock.rpartition("torch==")[2].strip()
    wheels = [
        wheel
        for folder in found.get("find-links", "").split()
        for wheel in Path(folder.removeprefix("file://")).glob(f"torch-{version}[+-]*.whl")
    ]
    if len(wheels) != 1:
        return None
    with wheels[0].open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
