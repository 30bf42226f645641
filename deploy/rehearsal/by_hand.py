"""``python -m deploy.rehearsal.by_hand``: the README's ``docker run`` lines, as they stand there.

With podman in the place of docker, on the images that are built already, in a folder and under
names that are removed afterwards. Two more clients are started by the client's line under other
names, since a task needs three; the task is created as the README says, by the host's operator.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path

from deploy.rehearsal import IMAGES, ROOT, RehearsalError, image, say
from deploy.rehearsal.engine import configured, enter_namespace, podman, require, run

__all__ = ["lines", "main"]

_BLOCK = re.compile(r"<!-- docker run -->\n```console\n(.*?)```", re.DOTALL)
_TASK = """
export SECAGG_OPERATOR_KIT=$PWD/kits/operators/admin SECAGG_CLIENT_DATASET=marketplace
export SECAGG_CLIENT_SILOS=3 SECAGG_OPERATOR_ADMIN=localhost:7401
secagg-client prepare work --rounds 3
for attempt in $(seq 120); do podman exec server secagg-server health && break; sleep 1; done
secagg-server task create work/task.toml --model work/initial.npz
"""
_END = """
for name in client-1 client-2 client-3; do podman wait $name; done
secagg-server task show recommender --format json > shown.json
podman stop server keyholder
for name in server keyholder; do podman inspect --format '{{.State.ExitCode}}' $name; done
"""


def lines(readme: str) -> list[str]:
    """The commands of the README's block, each on one line.

    Raises:
        RehearsalError: there is no such block.
    """
    found = _BLOCK.search(readme)
    if found is None:
        raise RehearsalError("expected a block of docker lines in README.md; found none")
    joined = found[1].replace("\\\n", " ")
    return [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ ")]


def script(readme: str) -> str:
    """What is run: those lines but for the builds, clients 2 and 3, a task, and its end."""
    told = [line for line in lines(readme) if not line.startswith("docker build")]
    (joins,) = (line for line in told if "--name client-1" in line)
    before = [line for line in told if line != joins]
    clients = [
        joins.replace("client-1", f"client-{number + 1}").replace("SILO=0", f"SILO={number}")
        for number in range(3)
    ]
    shim = 'docker() { podman "$@"; }\nsudo() { "$@"; }\n'
    return "\n".join([shim, *before, _TASK, *clients, _END])


def main() -> int:
    """0 if the task is done, and server and key holder have left with 0."""
    try:
        require("podman")
        enter_namespace("deploy.rehearsal.by_hand")
        with configured():
            _run()
    except RehearsalError as error:
        say(f"FAILED: {error}")
        return 1
    return 0


def _run() -> None:
    names = ("keyholder", "server", "client-1", "client-2", "client-3")
    text = script((ROOT / "README.md").read_text(encoding="utf-8"))
    for target in IMAGES:
        podman("tag", image(target), f"secagg-{target}")
    try:
        with tempfile.TemporaryDirectory(prefix="secagg-by-hand-") as folder:
            say("README.md: its docker lines")
            programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            said = run(["bash", "-euc", text], cwd=folder, env=os.environ | {"PATH": programs})
            shown = json.loads((Path(folder) / "shown.json").read_text(encoding="utf-8"))
        state, codes = shown["task"]["state"], said.stdout.split()[-2:]
        if state != "TASK_STATE_FINISHED" or codes != ["0", "0"]:
            raise RehearsalError(
                "expected a finished task, and 0 from server and key holder when they are stopped; "
                f"got {state} and {codes}"
            )
        say(f"a task of {len(shown['rounds'])} rounds is done; server and key holder left with 0")
    finally:
        podman("rm", "--force", "--volumes", *names, check=False)
        podman("volume", "rm", "--force", "keyholder", "server", *names[2:], check=False)
        podman("network", "rm", "--force", "federation", check=False)


if __name__ == "__main__":
    sys.exit(main())
