"""A client that follows every rule but one: it multiplies its update by minus ten.

It is enrolled, trains on a silo's data, and encrypts, seals and signs like everybody else. Nobody
can read what it sends. The demo shows what becomes of that.
"""

from __future__ import annotations

from dataclasses import replace

import typer

from secagg.commands import exits_cleanly, out
from secagg.encryptor import encrypt_integers, upload_integers
from secagg.errors import ConfigurationError
from secagg.options import with_settings
from secagg.quantize import quantize
from secagg_client.config import ClientSettings
from secagg_client.learners import Part, load_silo
from secagg_client.repeatable import repeatable_rounding
from secagg_client.session import ClientKit, ClientSession

__all__ = ["FACTOR", "main", "poison"]

FACTOR = -10


def poison(settings: ClientSettings, kit: ClientKit) -> int:
    """Send poison in every round until the task ends; how many uploads were sent."""
    silo = load_silo(Part.of(settings))
    sent = 0
    with ClientSession(settings.server, settings.task, kit, outbox=settings.state_dir) as session:
        for current in session.rounds():
            trained = silo.train(current.model.tensors, current.number)
            quantized = quantize(
                current.context.plan,
                {"update": trained.update},
                samples=trained.samples,
                rotation=current.context.rotation,
                randomness=repeatable_rounding(settings.seed, settings.silo, current.number),
            )
            scaled = [replace(part, values=part.values * FACTOR) for part in quantized]
            parts = upload_integers(current.context.plan, scaled)
            upload = encrypt_integers(current.context, parts, kit.identity, current.commitment)
            session.send(current.context, upload)
            sent += 1
    return sent


@exits_cleanly
@with_settings(ClientSettings)
def main(settings: ClientSettings) -> None:
    """Take part in a task with poisoned updates."""
    if settings.kit is None:
        raise ConfigurationError("expected a kit: a poisoner is enrolled like everybody else")
    sent = poison(settings, ClientKit.load(settings.kit))
    out.print(f"sent {sent} poisoned updates", highlight=False)


if __name__ == "__main__":
    typer.run(main)
