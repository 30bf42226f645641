"""The table of what happened, from the figures in ``bench/results/network.json``."""

from __future__ import annotations

from typing import Any

__all__ = ["table"]

_HEAD = "| fault | what happened | round | on again after | done after |"


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each scenario, and what it was run on."""
    rows = [_row(each) for each in results["scenarios"]]
    machine = results["machine"]
    loads = [each["load"] for each in results["scenarios"]]
    note = (
        "Seconds. *Round*: from its creation to its end, with whatever was cut and with clients "
        "that start; of two rounds, the second. *On again*: from healing until what was stuck "
        "went on; *done*: until the task was. "
        f"{results['clients']} clients, uploads of {results['upload_bytes'] / 1e6:.1f} MB; "
        f"{machine['processor']}, {machine['cores']} cores, with {min(loads):.0f} to "
        f"{max(loads):.0f} programs that wanted them. From "
        "[bench/results/network.json](../bench/results/network.json), written by "
        "`python -m secagg_bench.network`."
    )
    return "\n".join([_HEAD, "|---|---|--:|--:|--:|", *rows, "", note, ""])


def _row(scenario: dict[str, Any]) -> str:
    figures = scenario["figures"]
    said = "; ".join(scenario["violations"]) or "exact"
    if not scenario["violations"]:
        if figures["attempts"] > figures["rounds"]:
            said += f", in {figures['attempts']} attempts"
        if figures["gave_up"]:
            said += ", one client was started again"
        if "sent_after_bytes" in figures:
            share = figures["sent_after_bytes"] / figures["missing_bytes"]
            said += f"; {share:.0%} of what was missing was sent"
    seconds = (scenario["round_s"], scenario["on_again_s"], scenario["recovered_s"])
    cells = ["" if each is None else f"{each:.1f}" for each in seconds]
    return f"| {scenario['fault']} | {said} | {' | '.join(cells)} |"
