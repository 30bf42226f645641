"""How pip finds packages on this machine, for a build: one file, and the folders that it names."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

from deploy.rehearsal.engine import run

__all__ = ["CANARY", "folders", "pip_conf", "settings"]

# In the pip.conf of every rehearsal. Wherever it is found again, a secret would be.
CANARY = "canary-" + "1f6e4c0d9ab37752e8"
_WANTED = ("cert", "extra-index-url", "find-links", "index-url", "proxy", "timeout", "trusted-host")


def settings(python: str) -> dict[str, str]:
    """What ``pip config list`` says that finding packages depends on."""
    listed = run([python, "-m", "pip", "config", "list"]).stdout
    found: dict[str, str] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2].removeprefix("default-")
        if key in _WANTED:
            found[key] = str(ast.literal_eval(value))
    return found


def pip_conf(found: Mapping[str, str]) -> str:
    """A pip.conf that says the same, with the canary in it."""
    lines = [f"{key} = {' '.join(value.split())}" for key, value in sorted(found.items())]
    return "\n".join([f"# {CANARY}", "[global]", *lines, ""])


def folders(found: Mapping[str, str]) -> list[Path]:
    """Folders of this machine that the settings name; a build needs them in the same place."""
    paths = [Path(word) for value in found.values() for word in value.split() if word[0] == "/"]
    # The pages of an index refer to files beside them.
    indexes = [word for value in found.values() for word in value.split() if word[:7] == "file://"]
    paths += [Path(word.removeprefix("file://")).parent for word in indexes]
    folders = {path if path.is_dir() else path.parent for path in paths if path.exists()}
    # A folder below another one comes with it.
    return sorted(path for path in folders if not any(up in folders for up in path.parents))
