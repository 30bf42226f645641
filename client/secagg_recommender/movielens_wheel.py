"""MovieLens 100K out of a wheel of the Python package index.

The only module of the recommender that reaches the network, and only when somebody calls it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from secagg_recommender.interactions import DataError

__all__ = ["fetch_movielens"]

_WHEEL: Final = "recbole==1.2.1"
_WHEEL_FOLDER: Final = "recbole/dataset_example/ml-100k"
# The wheel comes over the network, so what we unpack from it is pinned byte for byte.
_WHEEL_FILES: Final[Mapping[str, str]] = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}


def fetch_movielens(cache_dir: Path | str, *, timeout_s: float = 120.0) -> Path:
    """Download MovieLens 100K into ``cache_dir`` once; return a folder for load_movielens().

    The data comes out of the wheel ``recbole==1.2.1`` on the Python package index, fetched by the
    ordinary ``pip`` in a subprocess, without dependencies and without installing or running any
    of it; the files taken from it are pinned by SHA-256. GroupLens licenses the data for research
    and forbids redistribution: keep the cache out of anything you publish. Rows are in another
    order than in ``ratings.csv``: see :func:`~secagg_recommender.movielens.read_movielens` on ties.

    Raises:
        DataError: pip failed or took longer than ``timeout_s``, or the wheel does not hold the
            expected bytes.
    """
    folder = Path(cache_dir) / "ml-100k"
    if all(_has_digest(folder / name, digest) for name, digest in _WHEEL_FILES.items()):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _download_wheel(Path(scratch), timeout_s)
        contents = {name: _member(wheel, name) for name in _WHEEL_FILES}
    for name, content in contents.items():
        partial = folder / f"{name}.partial"
        partial.write_bytes(content)
        partial.replace(folder / name)
    return folder


def _has_digest(file: Path, digest: str) -> bool:
    """Whether the file exists and has this SHA-256."""
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == digest


def _download_wheel(folder: Path, timeout_s: float) -> Path:
    """Let pip put the wheel into ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder), _WHEEL]
    advice = "check the network, or put ratings.csv or ml-100k.inter into a folder and pass that"
    try:
        done = subprocess.run(  # noqa: S603 - fixed arguments, no shell
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"expected pip to fetch {_WHEEL}, got no answer in timeout_s={timeout_s}; {advice}"
        ) from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = done.stderr.strip().splitlines()
        raise DataError(
            f"expected pip to fetch {_WHEEL}, got exit={done.returncode}: "
            f"{lines[-1] if lines else 'no message'}; {advice}"
        )
    return wheels[0]


def _member(wheel: Path, name: str) -> bytes:
    """One pinned file out of the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(f"{_WHEEL_FOLDER}/{name}")
    except (KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"expected {name} in {wheel.name}, got {error}; clear pip's cache and fetch again"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != _WHEEL_FILES[name]:
        raise DataError(
            f"expected {name} with SHA-256 {_WHEEL_FILES[name]}, got sha256={digest}; do not use "
            "this file: clear pip's cache and fetch again from a trusted index"
        )
    return content
