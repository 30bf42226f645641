"""Kubernetes manifests as kustomize renders them, with the kustomize inside kubectl."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

__all__ = ["KUBERNETES", "Document", "built", "kubectl", "named", "of_kind", "rendered"]

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"

Document = dict[str, Any]


def kubectl() -> str:
    """The program, as a package beside this interpreter brings it; skips the test without one."""
    beside = Path(sys.executable).with_name("kubectl")
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    if found is None:
        pytest.skip("kubectl not found: `make setup` installs it")
    return found


def rendered(folder: Path, overlay: str, components: Sequence[str] = ()) -> list[Document]:
    """The documents of an overlay with components, in a folder that is made for it."""
    folder.mkdir()
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(KUBERNETES / overlay, folder.resolve())],
        "components": [
            os.path.relpath(KUBERNETES / "components" / each, folder.resolve())
            for each in components
        ],
    }
    return built(folder, kustomization)


def built(folder: Path, kustomization: Document) -> list[Document]:
    """The documents of a kustomization in this folder; warnings are errors."""
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    done = subprocess.run(
        [kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(documents: Iterable[Document], kind: str) -> list[Document]:
    """The documents of one kind."""
    return [each for each in documents if each["kind"] == kind]


def named(items: Iterable[Document], name: str) -> Document:
    """The one of this name: a document, or an entry of a list with names."""
    (found,) = (each for each in items if (each.get("metadata") or each)["name"] == name)
    return found
