"""Tables of what was measured, for the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["hostile_table", "soak_table", "uploads_table"]

_PROGRAMS = {
    "server": "server",
    "key_holder": "key holder",
    "clients": "10 clients and the measuring",
}


def uploads_table(results: dict[str, Any]) -> str:
    """Clients that upload at once: memory, health, speed."""
    found, machine = results["uploads"], results["machine"]
    rows = [
        [
            row["clients"],
            f"{row['accepted']} of {row['clients']}",
            row["told_to_wait"],
            f"{row['upload_s']:.1f} s",
            f"{row['megabytes_s']:.0f} MB/s",
            f"{row['server_cpu_s']:.1f} s",
            f"{_mb(row['peaks']['server_rss'])} + {_mb(row['peaks']['workers_rss'])}",
            _quantiles(row["health"]["idle"]),
            _quantiles(row["health"]["uploading"]),
        ]
        for row in found["rows"]
    ]
    head = (
        *("clients at once", "accepted", "told to wait", "uploaded in", "speed", "server's CPU"),
        *("peak memory, server + workers", "health p50 / p99 / most, idle", "while they upload"),
    )
    note = (
        f"{found['parameters']:,} parameters, {found['rows'][0]['upload_bytes'] / 1e6:.2f} MB an "
        f"upload, {found['enrolled']:,} clients enrolled, norm check on, every sum exact. All on "
        f"one machine of {machine['cores']} cores, clients at low priority; health in ms, by gRPC "
        f"over mutual TLS, asked for every 50 ms; memory in MB. gRPC {machine['grpc']}. From "
        "[bench/results/load.json](../bench/results/load.json), written by `python -m "
        "secagg_bench.load uploads`."
    )
    return _page(head, rows, note)


def hostile_table(results: dict[str, Any]) -> str:
    """Honest clients while others attack."""
    found = results["hostile"]
    rows = [
        [
            row["attack"],
            f"{row['upload_s']:.1f} s",
            _mb(row["peaks"]["server_rss"]),
            f"{row['peaks']['server_fds']}, then {row['fds_after']}",
            row["peaks"]["server_threads"],
            f"{_mb(row['disk_bytes'])} of {_mb(row['disk_bound'])}, then {_mb(row['disk_after'])}",
            _quantiles(row["health"]),
        ]
        for row in found["rows"]
    ]
    head = (
        *("attack", "honest ones done in", "server's peak, MB", "open files", "threads"),
        *("uploads on disk, MB", "health p50 / p99 / most, ms"),
    )
    note = (
        f"{found['honest']} honest clients upload while {found['hostile']} enrolled ones, or "
        "strangers, attack; every sum is exactly that of the honest. One server for all, so that "
        "its peak never falls. From [bench/results/load.json](../bench/results/load.json), written "
        "by `python -m secagg_bench.load hostile`."
    )
    return _page(head, rows, note)


def soak_table(results: dict[str, Any]) -> str:
    """What the programs hold after the first minutes and in the end."""
    rows = []
    for name, title in _PROGRAMS.items():
        seen = results["settled"][name]
        growth = seen["rss_late"] / seen["rss_early"] - 1
        rows.append(
            [
                title,
                *(_mb(seen[f"rss_{when}"]) for when in ("early", "late")),
                f"{growth:+.1%}",
                *(
                    f"{seen[f'{key}_{w}']:.0f}"
                    for key in ("fds", "threads")
                    for w in ("early", "late")
                ),
            ]
        )
    acts, rounds = results["acts"], results["rounds"]
    head = (
        *("", "MB after 5 minutes", "MB in the end", "change"),
        *("files after 5 minutes", "in the end", "threads after 5 minutes", "in the end"),
    )
    did = ", ".join(f"{count} × {act}" for act, count in acts.items())
    note = (
        f"{results['minutes']:.0f} minutes, {sum(results['tasks'].values())} tasks, "
        f"{rounds['done']} rounds done and {rounds['aborted']} aborted for want of clients, "
        f"{rounds['refused']} uploads refused, {len(results['wrong'])} sums wrong; "
        f"{results['upload_bytes_left']} bytes of uploads left. What clients did: {did}. From "
        "[bench/results/soak.json](../bench/results/soak.json), written by `python -m "
        "secagg_bench.load soak`."
    )
    return _page(head, rows, note)


def _quantiles(health: dict[str, Any]) -> str:
    seen = health["grpc"]
    return f"{seen['p50_ms']:.0f} / {seen['p99_ms']:.0f} / {seen['max_ms']:.0f}"


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f}"


def _page(head: Sequence[str], rows: Sequence[Sequence[object]], note: str) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    aligned = "|".join(["---", *["--:"] * (len(head) - 1)])
    return "\n".join([f"| {' | '.join(head)} |", f"|{aligned}|", *lines, "", note, ""])
