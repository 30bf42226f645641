"""Honest clients upload while others attack: what the server holds meanwhile, and what stays.

One server and key holder for all attacks, one after another; each has a task of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from secagg.errors import RoundError
from secagg.wire.codec import sums_from_bytes
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg_bench.load.attackers import ATTACKS, attacking
from secagg_bench.load.members import plan_of
from secagg_bench.load.probing import Answer, probing, summary
from secagg_bench.load.uploaders import Uploaders
from secagg_bench.load.uploads import Watch, ended
from secagg_bench.load.vitals import Vitals, folder_bytes, vitals
from secagg_bench.processes import Services, running_services
from secagg_server.operator import Operator
from secagg_server.tasks import TaskSpec

__all__ = ["CALM", "Wanted", "measure"]

CALM = "nobody attacks"
_DEADLINE_MS = 10 * 60_000
_SETTLE_S = 30.0
_POLL_S = 0.25

OnProgress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Who is there.

    Attributes:
        honest, hostile: enrolled clients of either kind.
        warm_s: seconds that an attack goes on before the honest upload.
        attacks: which, in order; see `ATTACKS`.
    """

    honest: int = 20
    hostile: int = 12
    parameters: int = 300_000
    warm_s: float = 5.0
    attacks: tuple[str, ...] = (CALM, *ATTACKS)


def measure(wanted: Wanted, folder: Path, say: OnProgress) -> dict[str, Any]:
    """One row for each attack.

    Raises:
        RoundError: an honest client did not finish, or a sum is not exact.
    """
    with (
        running_services(folder, wanted.honest + wanted.hostile) as services,
        contextlib.closing(services.operator()) as operator,
    ):
        rows = [
            _run(wanted, name, f"task-{number}", services, operator, folder, say)
            for number, name in enumerate(wanted.attacks)
        ]
    return {"honest": wanted.honest, "hostile": wanted.hostile, "rows": rows}


def _run(
    wanted: Wanted,
    name: str,
    task_id: str,
    services: Services,
    operator: Operator,
    folder: Path,
    say: OnProgress,
) -> dict[str, Any]:
    key_holder, server = (program.process.pid for program in services.programs)
    watch = Watch(server, key_holder)
    answers: list[Answer] = []
    did: dict[str, int] = {}
    everybody = wanted.honest + wanted.hostile
    plan = plan_of(wanted.parameters, everybody)
    spec = TaskSpec(task_id, plan, 1, _DEADLINE_MS, 1, wanted.honest)
    operator.create_task(spec)
    before = vitals(server)
    with contextlib.ExitStack() as stack:
        uploaders = Uploaders(
            services, task_id, range(wanted.honest), folder / "clients", folder / "clients.log"
        )
        stack.callback(uploaders.stop)
        clear = uploaders.encrypted()
        stack.enter_context(probing(services, answers))
        stack.enter_context(watch.watching())
        if name != CALM:
            hostile = range(wanted.honest, everybody)
            stack.enter_context(attacking(name, services, task_id, hostile, did))
            time.sleep(wanted.warm_s)
        began = time.monotonic()
        uploaders.send()
        sent = uploaders.sent()
        over = time.monotonic()
        unfinished = folder_bytes(folder / "server" / "uploads")
        answer = ended(operator, task_id)
    if answer.task.state != pb.TASK_STATE_FINISHED or any(one.refused for one in sent):
        raise RoundError(f"expected honest clients to finish in spite of: {name}")
    data, contributors = operator.sums(task_id, 1)
    sums = sums_from_bytes(data, plan)
    exact = all(np.array_equal(one, other) for one, other in zip(sums, clear, strict=True))
    if contributors != wanted.honest or not exact:
        raise RoundError(f"expected the honest clients' sum, exactly, in spite of: {name}")
    after = _settled(server, before.fds)
    row = {
        "attack": name,
        "did": did,
        "upload_s": round(over - began, 2),
        "told_to_wait": sum(one.waits for one in sent),
        "health": summary(answers, began, over),
        "peaks": watch.most,
        "rss_before": before.rss,
        "rss_after": after.rss,
        "fds_before": before.fds,
        "fds_after": after.fds,
        "disk_bytes": unfinished,
        "disk_bound": everybody * plan.payload_bytes,
        "disk_after": folder_bytes(folder / "server" / "uploads"),
    }
    say(
        f"{name}: {row['upload_s']} s, server {watch.most['server_rss'] / 1e6:.0f} MB, "
        f"{watch.most['server_fds']} files"
    )
    return row


def _settled(pid: int, fds: int) -> Vitals:
    """The server once the attackers' connections are gone, or after a while."""
    give_up_at = time.monotonic() + _SETTLE_S
    while (found := vitals(pid)).fds > fds + 2 and time.monotonic() < give_up_at:
        time.sleep(_POLL_S)
    return found
