"""An index on disk: vectors that are read where they lie, and a check of which model they are.

A folder with ``vectors.npy``, ``bias.npy``, ``graph.usearch`` (for a graph) and ``index.json``,
which names the model by its digest and the other files by their SHA-256. Opening reads everything
once, block by block, so that damage is found there and not in somebody's recommendations.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg_recommender.graph_index import GraphIndex, new_graph
from secagg_recommender.index import BUDGET_BYTES, ExactIndex
from secagg_recommender.interactions import DataError

__all__ = ["open_index", "save_index"]

_VECTORS: Final = "vectors.npy"
_BIAS: Final = "bias.npy"
_GRAPH: Final = "graph.usearch"
_ABOUT: Final = "index.json"
_FORMAT: Final = 1


def save_index(index: ExactIndex | GraphIndex, folder: Path) -> None:
    """Write an index to a folder, over what is there; not the folder it was opened from.

    Raises:
        DataError: the index reads its vectors from this very folder.
    """
    exact = index.exact if isinstance(index, GraphIndex) else index
    folder.mkdir(parents=True, exist_ok=True)
    if any(_reads_from(rows, folder / _VECTORS) for rows, _ in exact.parts):
        raise DataError(
            f"expected another folder than the one the vectors are read from, got {folder}; "
            "save to a new one"
        )
    (folder / _ABOUT).unlink(missing_ok=True)  # whatever is cut off here is no index
    shape = (exact.n_items, exact.dimensions)
    vectors = np.lib.format.open_memmap(folder / _VECTORS, "w+", np.float32, shape)
    first = 0
    for rows, bias in exact.parts:
        vectors[first : first + len(bias)] = rows
        first += len(bias)
    vectors.flush()
    np.save(folder / _BIAS, np.concatenate([bias for _, bias in exact.parts]))
    graph = _GRAPH if isinstance(index, GraphIndex) else None
    if isinstance(index, GraphIndex):
        index.graph.save(os.fspath(folder / _GRAPH))
    files = {name: _fingerprint(folder / name) for name in [_BIAS, *([graph] if graph else [])]}
    about: dict[str, Any] = {
        "format": _FORMAT,
        "model": exact.digest,
        "graph": graph,
        "files": files,
    }
    if isinstance(index, GraphIndex):
        about["reach"] = index.reach.hex()
    (folder / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def open_index(
    folder: Path, *, model: str | None = None, budget_bytes: int = BUDGET_BYTES
) -> ExactIndex | GraphIndex:
    """Open what :func:`save_index` wrote; vectors stay in their file.

    Args:
        folder: where it lies.
        model: digest of the model that is served; None takes any.
        budget_bytes: see :class:`ExactIndex`.

    Raises:
        ConfigurationError: a graph, and usearch is not installed.
        DataError: not such a folder, a file that is damaged or cut off, or another model's index.
    """
    about = _about(folder)
    if model is not None and model != about["model"]:
        raise DataError(
            f"expected an index of the model {model[:12]}…, got one of {about['model'][:12]}…: it "
            "is stale; build it again from the model that is served"
        )
    damaged = f"expected an index as it was written, got a damaged file in {folder}; build it again"
    for name in [_BIAS, *([_GRAPH] if about["graph"] else [])]:
        if not (folder / name).is_file() or _fingerprint(folder / name) != about["files"].get(name):
            raise DataError(f"{damaged}: {name}")
    try:
        vectors = np.lib.format.open_memmap(folder / _VECTORS, "r")
        bias = np.load(folder / _BIAS, allow_pickle=False)
    # Over damaged bytes numpy raises whatever reads them: Python's own tokens, for one.
    except Exception as error:
        raise DataError(f"{damaged}: {error}") from None
    exact = ExactIndex(vectors, bias, budget_bytes=budget_bytes)
    if exact.digest != about["model"]:
        raise DataError(f"{damaged}: {_VECTORS}")
    if about["graph"] is None:
        return exact
    graph = new_graph(exact.dimensions)
    graph.load(os.fspath(folder / _GRAPH))
    return GraphIndex(exact, graph=(graph, float.fromhex(about["reach"])))


def _about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        known = about["format"] == _FORMAT and about["graph"] in (None, _GRAPH)
        if known and isinstance(about["files"], dict) and isinstance(about["model"], str):
            return dict(about)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"expected the folder of an index, got {folder}: {error}; save_index() writes one"
        ) from None
    raise DataError(
        f"expected an index of format {_FORMAT}, got another in {folder}; build it again"
    )


def _fingerprint(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _reads_from(rows: npt.NDArray[np.float32], file: Path) -> bool:
    name = getattr(rows, "filename", None)
    return name is not None and file.exists() and Path(name).resolve() == file.resolve()
