"""Asks a running Prometheus every query of every panel and alert; says which fail, or are empty.

An empty one is not wrong: nothing may have happened yet. Exit status 1 if a query fails, a rule is
missing or unwell, or no service is scraped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from deploy.monitoring import FOLDER
from deploy.monitoring.asking import Prometheus, PrometheusError, filled, panels, read, values

__all__ = ["Answer", "ask_alerts", "ask_panels", "main"]


@dataclass(frozen=True)
class Answer:
    """What came of one query: how many lines it has drawn, or why it failed."""

    asker: str
    lines: int
    error: str = ""


def ask_panels(
    prometheus: Prometheus, start: float, end: float, step: float, rate_interval: str
) -> Iterator[Answer]:
    """Every query of every dashboard, over a time."""
    for path in sorted((FOLDER / "grafana" / "dashboards").glob("*.json")):
        board = read(path)
        variables = values(board, prometheus, start, end)
        empty = sorted(name for name, value in variables.items() if not value)
        if empty:
            yield Answer(board["title"], 0, f"nothing is scraped that ${', $'.join(empty)} names")
            continue
        variables |= {"__rate_interval": rate_interval, "__range": f"{end - start:.0f}s"}
        for panel in panels(board):
            for expr, _ in panel.queries:
                asker = f"{board['title']} / {panel.row} / {panel.title}"
                try:
                    query = filled(expr, variables)
                    found = (
                        prometheus.now(query, end)
                        if panel.instant
                        else prometheus.over(query, start, end, step)
                    )
                    yield Answer(asker, len(found))
                except PrometheusError as error:
                    yield Answer(asker, 0, str(error))


def ask_alerts(prometheus: Prometheus, end: float) -> Iterator[Answer]:
    """Every alert: its expression, and whether Prometheus has it and is well with it."""
    text = (FOLDER / "prometheus" / "rules.yaml").read_text(encoding="utf-8")
    loaded = {
        rule["name"]: rule
        for group in prometheus.ask("rules", type="alert")["groups"]
        for rule in group["rules"]
    }
    for group in yaml.safe_load(text)["groups"]:
        for rule in group["rules"]:
            asker = f"alert / {rule['alert']}"
            there = loaded.get(rule["alert"])
            if there is None:
                yield Answer(asker, 0, "Prometheus has no rule of that name")
            elif there["health"] == "err":
                yield Answer(asker, 0, there["lastError"])
            else:
                try:
                    yield Answer(asker, len(prometheus.now(rule["expr"], end)))
                except PrometheusError as error:
                    yield Answer(asker, 0, str(error))


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deploy.monitoring.check", description=__doc__)
    parser.add_argument("prometheus", help="its address, such as http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=60, help="how far back to ask")
    parser.add_argument("--step", type=float, default=15, help="seconds from point to point")
    parser.add_argument("--rate-interval", default="1m", help="for $__rate_interval")
    given = parser.parse_args(arguments)
    end = time.time()
    start = end - 60 * given.minutes
    try:
        prometheus = Prometheus(given.prometheus)
        answers = [
            *ask_panels(prometheus, start, end, given.step, given.rate_interval),
            *ask_alerts(prometheus, end),
        ]
    except PrometheusError as error:
        print(error, file=sys.stderr)
        return 1
    for each in answers:
        said = each.error or (f"{each.lines} lines" if each.lines else "empty")
        print(f"{'FAILS' if each.error else 'ok':6}{each.asker}: {said}")
    failed = sum(bool(each.error) for each in answers)
    empty = sum(not each.lines and not each.error for each in answers)
    print(f"{len(answers)} queries, {failed} failed, {empty} empty")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
