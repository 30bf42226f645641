"""Writes dashboards and rules, or says whether those that are there are what would be written."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from deploy.monitoring import FOLDER
from deploy.monitoring.alerts import rules
from deploy.monitoring.dashboards import dashboards

__all__ = ["files", "main", "outdated"]


def files() -> dict[Path, str]:
    """What is generated, by its place below this folder."""
    found = {Path("prometheus/rules.yaml"): rules()}
    for name, board in dashboards().items():
        text = json.dumps(board, indent=2, ensure_ascii=False) + "\n"
        found[Path("grafana/dashboards") / name] = text
    return found


def outdated(folder: Path = FOLDER) -> list[Path]:
    """Files that are not what would be written, and dashboards that nobody would write."""
    wanted = {folder / path: text for path, text in files().items()}
    there = {*wanted, *(folder / "grafana/dashboards").glob("*.json")}
    return sorted(
        path
        for path in there
        if not path.is_file() or path.read_text(encoding="utf-8") != wanted.get(path)
    )


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if something is outdated and was only to be checked."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.monitoring.generate", description=__doc__
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if outdated")
    old = outdated()
    if parser.parse_args(arguments).check:
        for path in old:
            print(f"{path.relative_to(FOLDER)}: run `python -m deploy.monitoring.generate`")
        return int(bool(old))
    for path, text in files().items():
        (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / path).write_text(text, encoding="utf-8")
    for path in old:
        print(path.relative_to(FOLDER))
    return 0


if __name__ == "__main__":
    sys.exit(main())
