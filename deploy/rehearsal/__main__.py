"""``python -m deploy.rehearsal``: build the images, look into them, run them; figures as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploy.rehearsal import IMAGES, ROOT, RehearsalError, image, say
from deploy.rehearsal.behaviour import federation, helps, rehearse, startup, stops_at_once
from deploy.rehearsal.build import build, project_version
from deploy.rehearsal.contents import (
    Image,
    distributions,
    privileged,
    read,
    secrets,
    unaccounted,
    uncompiled,
)
from deploy.rehearsal.engine import configured, enter_namespace, inspect, podman, require
from deploy.rehearsal.pip_settings import CANARY
from deploy.rehearsal.report import replace
from deploy.rehearsal.stand_in import NAME as STAND_IN
from deploy.rehearsal.stand_in import make

__all__ = ["PAGE", "RESULTS", "main"]

_FORBIDDEN = {
    "server": ("torch", "pandas", "grpcio-tools", "pip", "setuptools", "wheel", "pytest"),
    "keyholder": ("torch", "pandas", "sqlalchemy", "grpcio-tools", "pip", "wheel", "pytest"),
    "client": ("pip", "wheel", "grpcio-tools", "pytest"),
}
RESULTS = ROOT / "bench" / "results" / "images.json"
PAGE = ROOT / "docs" / "deploy.md"
_SIZES = ROOT / "build" / "rehearsal" / "compressed.json"  # by layer: it takes a minute to find out
_MB = 1_000_000


def main() -> int:
    """Do what the command line says; 0 if everything is as it should be."""
    arguments = _arguments()
    # So that folders and containers are removed then, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        require("podman", "tar", "git", *(() if arguments.base else ("debootstrap",)))
        enter_namespace()
        with configured():
            figures = _rehearsal(arguments)
    except RehearsalError as error:
        say(f"FAILED: {error}")
        return 1
    text = json.dumps(figures, indent=2) + "\n"
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
        say(f"wrote {arguments.output}")
        if arguments.output.resolve() == RESULTS and "federation" in figures:
            replace(PAGE, figures)
    else:
        sys.stdout.write(text)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deploy.rehearsal", description=__doc__)
    parser.add_argument(
        "--base", help="image to build on; else a stand-in is made with debootstrap"
    )
    parser.add_argument(
        "--only", choices=IMAGES, action="append", help="build and look into these alone"
    )
    parser.add_argument("--fresh", action="store_true", help="use nothing that was built before")
    parser.add_argument("--built", action="store_true", help="take the images as they are")
    parser.add_argument("--build-only", action="store_true", help="neither look into nor run them")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


def _rehearsal(arguments: argparse.Namespace) -> dict[str, Any]:
    base = arguments.base or make(fresh=arguments.fresh)
    targets = tuple(arguments.only or IMAGES)
    if not arguments.built:
        for target in targets:
            build(target, base, fresh=arguments.fresh)
    figures: dict[str, Any] = {
        "version": project_version(),
        "base": {"name": base, "stand_in": base == STAND_IN, **_base_size(base)},
        "engine": podman("--version").stdout.strip(),
        "machine": platform.machine(),
        # Seconds by the clock are worth little where this is far above the number of processors.
        "load": round(os.getloadavg()[2], 1),
        "processors": os.cpu_count(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "how": "python -m deploy.rehearsal --output bench/results/images.json",
        "images": {},
    }
    if arguments.build_only:
        return figures
    layers = frozenset(inspect("image", base)["RootFS"]["Layers"])
    figures["planted_secrets_found"] = _planted(targets[0], layers)
    for target in targets:
        say(f"{target}: look into every layer")
        looked = _look_into(target, layers)
        say(f"{target}: --help on a root file system that cannot be written to")
        helps(target)
        figures["images"][target] = {
            **looked,
            **startup(target),
        }
    if set(targets) == set(IMAGES):
        with federation() as found:
            figures["federation"] = rehearse(found)
        with federation() as found:
            figures["stops_while_loading_s"] = stops_at_once(found)
    return figures


def _base_size(base: str) -> dict[str, float]:
    return {"mb": round(inspect("image", base)["Size"] / _MB, 1)}


def _look_into(target: str, base: frozenset[str]) -> dict[str, Any]:
    """Sizes of an image, if nothing is in it that should not be.

    Raises:
        RehearsalError: names everything that should not be there.
    """
    found = _saved(image(target), base)
    wrong = [
        *secrets(found),
        *(f"{line}: nobody has brought it" for line in unaccounted(found)),
        *privileged(found),
        *uncompiled(found),
        *(f"{name} is installed" for name in _FORBIDDEN[target] if name in distributions(found)),
        *_configuration(target, found.config["config"]),
    ]
    if wrong:
        raise RehearsalError(
            f"expected nothing in secagg-{target} that should not be there; found {len(wrong)}:\n"
            + "\n".join(wrong[:30])
        )
    known = json.loads(_SIZES.read_text()) if _SIZES.exists() else {}
    known |= {layer.digest: layer.compressed for layer in found.layers if layer.compressed}
    _SIZES.parent.mkdir(parents=True, exist_ok=True)
    _SIZES.write_text(json.dumps(known))
    return {
        "mb": round(sum(layer.size for layer in found.layers) / _MB, 1),
        "mb_above_base": round(sum(layer.size for layer in found.own) / _MB, 1),
        "mb_above_base_compressed": round(sum(known[layer.digest] for layer in found.own) / _MB, 1),
        "layers_above_base_mb": [round(layer.size / _MB, 1) for layer in found.own],
        "distributions": len(distributions(found)),
    }


def _saved(name: str, base: frozenset[str], *, squeeze: bool = True) -> Image:
    known = set(json.loads(_SIZES.read_text())) if _SIZES.exists() else set()
    if not squeeze:
        known |= set(inspect("image", name)["RootFS"]["Layers"])
    with tempfile.TemporaryDirectory(prefix="secagg-rehearsal-") as folder:
        archive = Path(folder) / "image.tar"
        podman("save", "--quiet", "--format", "docker-archive", "--output", archive, name)
        return read(archive, base=base, canary=CANARY, squeezed=known | base)


def _planted(target: str, base: frozenset[str]) -> int:
    """How many secrets the scan finds in an image that hides four: the control of the scan."""
    below = frozenset(inspect("image", image(target))["RootFS"]["Layers"]) | base
    name = "localhost/secagg-rehearsal/planted:latest"
    with tempfile.TemporaryDirectory(prefix="secagg-rehearsal-") as folder:
        context = Path(folder)
        body = "\n".join(["A" * 64] * 3)
        (context / "notes.txt").write_text(
            f"-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n"
        )
        (context / "pip.conf").write_text(f"[global]\n# {CANARY}\n")
        (context / "index.txt").write_text("https://reader:" + "hunter2@packages.invalid/simple\n")
        (context / "Dockerfile").write_text(
            f"FROM {image(target)}\nUSER 0\nCOPY notes.txt index.txt /opt/\n"
            "COPY pip.conf /etc/pip.conf\nRUN rm /opt/notes.txt /opt/index.txt /etc/pip.conf\n"
        )
        podman("build", "--format", "docker", "--tag", name, context)
    try:
        found = secrets(_saved(name, below, squeeze=False))
    finally:
        podman("rmi", "--force", name, check=False)
    if len(found) < 4:
        raise RehearsalError(f"expected the scan to find 4 planted secrets; it found {found}")
    return len(found)


def _configuration(target: str, config: dict[str, Any]) -> list[str]:
    """What an image's configuration says that it should not, or the other way round."""
    labels = config.get("Labels") or {}
    checks = {
        "User is 10001:10001": config.get("User") == "10001:10001",
        "Entrypoint is the program": config.get("Entrypoint") == [f"secagg-{target}"],
        "the version is the project's": labels.get("org.opencontainers.image.version")
        == project_version(),
        "a revision is told": len(labels.get("org.opencontainers.image.revision", "")) == 40,
        "there is a volume": "/var/lib/secagg" in (config.get("Volumes") or {}),
        "SIGTERM stops it": config.get("StopSignal") in ("SIGTERM", "15"),
        "health is checked": config.get("Healthcheck", {}).get("Test")
        == (["NONE"] if target == "client" else ["CMD", f"secagg-{target}", "health"]),
    }
    return [
        f"configuration: expected that {what}; it is not so"
        for what, so in checks.items()
        if not so
    ]


if __name__ == "__main__":
    raise SystemExit(main())
