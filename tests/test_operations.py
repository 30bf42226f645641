"""The operator's walk-through is executed as it is written; its tables say what the code says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_addresses

from secagg.rpc.deadlines import DEADLINES_S, deadline_s

DOCS = Path(__file__).parents[1] / "docs"


def commands() -> list[str]:
    page = (DOCS / "operations.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


@pytest.mark.slow
def test_the_walk_through_runs_from_an_empty_folder_to_the_end(tmp_path: Path) -> None:
    client, admin, key_holder = free_addresses(3)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "200",
        "SECAGG_KEYHOLDER_LISTEN": key_holder,
        "SECAGG_SERVER_LISTEN": client,
        "SECAGG_SERVER_ADMIN_LISTEN": admin,
        "SECAGG_KEYHOLDER_MONITOR_LISTEN": "off",
        "SECAGG_SERVER_MONITOR_LISTEN": "off",
        "SECAGG_SERVER_KEY_HOLDER": key_holder,
        "SECAGG_OPERATOR_ADMIN": admin,
        "SECAGG_CLIENT_SERVER": client,
    }
    ending = "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT"
    script = "\n".join(["set -e", ending, *commands()])
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    logs = "".join(file.read_text(encoding="utf-8") for file in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + logs[-3000:]
    assert "contributed to 3 rounds" in done.stdout
    assert "first: finished" in done.stdout
    assert "contributed to 2 rounds" in done.stdout
    assert "second: finished" in done.stdout
    assert "REVOKED" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr + logs


def test_the_table_of_deadlines_is_the_one_in_force() -> None:
    page = (DOCS / "limits.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([A-Z]\w+) \| (\d+) \|", page, re.MULTILINE))
    assert {name: float(seconds) for name, seconds in rows.items()} == DEADLINES_S
    assert deadline_s("/any.Service/NotListed") == 30.0
