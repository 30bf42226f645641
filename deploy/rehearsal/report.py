"""What was measured, as a table for the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

__all__ = ["markdown", "replace"]

_BLOCK = re.compile(r"(<!-- images -->\n).*?(<!-- /images -->)", re.DOTALL)


def markdown(figures: dict[str, Any]) -> str:
    """A table of the images, and how it was made; ends with a newline."""
    lines = [
        "| image | above its base | to download of that | packages | `--help` | if not compiled |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for target, found in figures["images"].items():
        with_it, without = found["help"]["cpu_s"], found["help_without_bytecode"]["cpu_s"]
        lines.append(
            f"| `secagg-{target}` | {found['mb_above_base']:.0f} MB "
            f"| {found['mb_above_base_compressed']:.0f} MB | {found['distributions']} "
            f"| {with_it:.1f} s | {without:.1f} s |"
        )
    ran, base = figures["federation"], figures["base"]
    stand_in = ", a stand-in," if base["stand_in"] else ""
    lines += [
        "",
        f"The base{stand_in} has {base['mb']:.0f} MB. `--help` is seconds of a processor, with the "
        "bytecode that is in the image and without it. Idle, a server takes "
        f"{ran['server_idle_mb']} MB of memory and a key holder {ran['keyholder_idle_mb']} MB; a "
        f"client that trains takes {ran['client_mb']} MB. A health check takes "
        f"{ran['server_health']['cpu_s']:.1f} s of processor time. SIGTERM in the middle of a "
        f"round ended the server in {ran['server_stops_s']:.1f} s, the key holder in "
        f"{ran['keyholder_stops_again_s']:.1f} s and a client in {ran['client_stops_s']:.1f} s. "
        f"{figures['engine'].capitalize()}, {figures['machine']}, {figures['date']}. From "
        "bench/results/images.json, written by `make images`.",
        "",
    ]
    return "\n".join(lines)


def replace(page: Path, figures: dict[str, Any]) -> None:
    """Put the table between the page's marks."""
    text = page.read_text(encoding="utf-8")
    page.write_text(_BLOCK.sub(rf"\g<1>{markdown(figures)}\2", text), encoding="utf-8")
