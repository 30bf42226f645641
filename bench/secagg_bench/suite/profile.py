"""Where the time of a client, the server and the key holder goes, by part of their work.

Each party's work is run under Python's profiler, on one core with one thread, a few times. Almost
all of it is in few and long calls of numpy, SEAL and OpenSSL, of which the profiler tells without
getting in their way. A part is what one function of ours takes with all that it calls; parts do not
overlap, and what no part accounts for is shown as the rest.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from secagg.aggregator import Aggregator
from secagg.encryptor import Encryptor
from secagg.keyholder import KeyHolder
from secagg.planner import plan_tensors
from secagg.receipts import SigningKey
from secagg.wire.codec import upload_from_bytes, upload_to_bytes
from secagg_bench.one_core import hardware, in_child, pin

__all__ = ["PARTS", "measured", "split", "table"]

PARTS: Mapping[str, Mapping[str, tuple[tuple[str, str], ...]]] = {
    "client": {
        "quantise: clip, rotate, round": (("quantize.py", "quantize"),),
        "name the message, for a key of its own": (("onetime.py", "message_salt"),),
        "sample errors": (("onetime.py", "errors"),),
        "pack two values into a coefficient": (("packing.py", "pack"),),
        "expand the public polynomials": (("context.py", "public_polynomials"),),
        "transform (SEAL's NTT)": (("~", "transform_to_ntt_inplace"),),
        "multiply with the key, subtract": (
            ("~", "multiply_plain_inplace"),
            ("~", "sub_inplace"),
        ),
        "into SEAL, and out again": (("ring.py", "load"), ("ring.py", "dump")),
        "seven bytes a residue": (("residues.py", "narrow"),),
        "digest, seal, sign": (("encryptor.py", "_signed"),),
        "serialise": (("codec.py", "upload_to_bytes"),),
    },
    "server, for each client": {
        "parse": (("codec.py", "upload_from_bytes"),),
        "check the receipt": (("upload.py", "verify"),),
        "digest (SHA-256)": (("~", "openssl_sha256"),),
        "read residues, check their range": (("residues.py", "widen"),),
        "add": (("residues.py", "add"),),
    },
    "key holder, once for three clients": {
        "open seeds, check receipts": (("keyholder.py", "admit"),),
        "name the sum, to release it once": (("transcript.py", "digest"),),
        "expand the public polynomials": (("context.py", "summed_polynomials"),),
        "multiply with the keys, add": (("~", "multiply_plain_inplace"), ("~", "add_inplace")),
        "transform back (SEAL's NTT)": (("~", "transform_from_ntt_inplace"),),
        "into SEAL, and out again": (("ring.py", "load"), ("ring.py", "dump")),
        "take noise off, unpack": (("packing.py", "unpack"),),
        "mean: rotate back, scale": (("release.py", "mean"),),
    },
}
"""By party and part, the functions that it consists of: file and name; ``~`` for a library's."""

_CLIENTS = 3
_REPETITIONS = 5


def measured(parameters: int = 1_000_000, repetitions: int = _REPETITIONS) -> dict[str, Any]:
    """Median seconds of every part, for a plan of 8 bits and 1,000 clients."""
    found: dict[str, list[dict[str, float]]] = {party: [] for party in PARTS}
    for repetition in range(repetitions + 1):
        profiles = _round(parameters, repetition)
        if repetition:  # the first one loads what is loaded late
            for party, profile in profiles.items():
                found[party].append(split(_calls(profile), PARTS[party]))
    return {
        "machine": hardware(),
        "parameters": parameters,
        "repetitions": repetitions,
        "seconds": {
            party: {part: median(each[part] for each in every) for part in every[0]}
            for party, every in found.items()
        },
    }


def _round(parameters: int, seed: int) -> dict[str, cProfile.Profile]:
    plan = plan_tensors({"w": (parameters,)}, max_clients=1000, clip=1.0, bits=8)
    holder = KeyHolder(plan, round_number=seed + 1)
    server = Aggregator(holder.context)
    drawn = np.random.default_rng(seed)
    update = {"w": (drawn.normal(size=parameters) / parameters**0.5).astype(np.float32)}
    encryptors = [Encryptor(holder.context, SigningKey.generate()) for _ in range(_CLIENTS)]
    sent = [upload_to_bytes(each.encrypt(update)) for each in encryptors[1:]]

    def client() -> None:
        sent.append(upload_to_bytes(encryptors[0].encrypt(update)))

    def added_before() -> None:  # the first one pays for fresh memory
        for each in sent[:-1]:
            server.add(upload_from_bytes(each, plan))

    def add() -> None:
        server.add(upload_from_bytes(sent[-1], plan))

    def release() -> None:
        holder.release(server.aggregate()).mean()

    profiles = [_profiled(client)]
    added_before()
    profiles += [_profiled(add), _profiled(release)]
    return dict(zip(PARTS, profiles, strict=True))


def _profiled(work: Callable[[], object]) -> cProfile.Profile:
    # Processor time: what else the machine does is left out.
    profile = cProfile.Profile(time.process_time)
    profile.runcall(work)
    return profile


def _calls(profile: cProfile.Profile) -> list[tuple[str, str, float, float]]:
    """File, name, own seconds and seconds with all that it calls, of each function."""
    stats: Any = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    return [
        (Path(file).name, name, own, whole)
        for (file, _, name), (_, _, own, whole, _) in stats.items()
    ]


def split(
    calls: Sequence[tuple[str, str, float, float]],
    parts: Mapping[str, tuple[tuple[str, str], ...]],
) -> dict[str, float]:
    """Seconds of each part, and of ``rest``.

    Args:
        calls: file, name, own seconds, seconds with all that it calls.

    Raises:
        ValueError: a part has no function that was called: one has another name now.
    """
    found = {}
    for part, functions in parts.items():
        matching = [
            whole
            for file, name, _, whole in calls
            if any(file == wanted and _is_named(name, like) for wanted, like in functions)
        ]
        if not matching:
            raise ValueError(f"expected calls of {functions} for {part!r}; there were none")
        found[part] = sum(matching)
    return found | {"rest": sum(own for _, _, own, _ in calls) - sum(found.values())}


def _is_named(name: str, like: str) -> bool:
    """Functions of libraries are named like ``<built-in method module.name>``."""
    return name == like or name.removesuffix(">").split(".")[-1] == like


def table(found: Mapping[str, Any]) -> str:
    """Parts of every party, and their share of it."""
    lines = ["| | part | time | share |", "|---|---|--:|--:|"]
    for party, parts in found["seconds"].items():
        whole = sum(parts.values())
        lines.append(f"| **{party}** | | **{whole * 1e3:.1f} ms** | |")
        lines += [
            f"| | {part} | {seconds * 1e3:.2f} ms | {seconds / whole:.0%} |"
            for part, seconds in parts.items()
        ]
    note = (
        f"{found['parameters']:,} parameters, 8 bits, planned for 1,000 clients; medians of "
        f"{found['repetitions']} repetitions under Python's profiler. {found['machine']}. From "
        "[bench/results/profile.json](../bench/results/profile.json), written by "
        "`python -m secagg_bench.suite.profile`."
    )
    return "\n".join([*lines, "", note, ""])


def main() -> None:
    """Measure in a process of its own, and write the results."""
    found = in_child(__spec__.name, "measure")
    path = Path("bench/results/profile.json")
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        pin()
        print(json.dumps(measured()))
    else:
        main()
