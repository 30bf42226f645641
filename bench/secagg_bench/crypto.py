"""What encryption costs: this library against TenSEAL's `CKKSVector` as it is commonly used.

Both sides encrypt the same vector, on one core, in interleaved pairs; the medians and the medians
of the pairs' ratios are reported. Peak server memory is that of a process of its own. Nothing here
judges a pull request: targets are printed as met or not.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from secagg.aggregator import Aggregator
from secagg.context import NO_MODEL, RoundContext
from secagg.parameters import Plan
from secagg.planner import plan_tensors
from secagg.quantize import quantize
from secagg.receipts import CLIENT_KEY_BYTES, SIGNATURE_BYTES, Receipt, SigningKey
from secagg.residues import ResidueSum, narrow, widen
from secagg.sampling import Stream, uniform_polynomials
from secagg.sealing import ROUND_KEY_BYTES, SEALED_SEED_BYTES
from secagg.transcript import DIGEST_BYTES
from secagg.upload import Admission, Upload
from secagg_bench.one_core import in_child, machine, pin, timed

__all__ = ["app"]

_MAX_CLIENTS = 1000
_MEMORY_COHORTS = (3, 30, 300)
_SLOTS = 4096
_FLOAT32_BYTES = 4.0
_RECEIPT_BYTES = CLIENT_KEY_BYTES + SIGNATURE_BYTES + 5 * DIGEST_BYTES

app = typer.Typer(help=__doc__)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the comparison.

    ``ratio`` is theirs over ours. A target is its least value, but for bytes, where it is the
    largest value of ours; a line without a target (``""``) is there to explain another one.
    """

    name: str
    unit: str
    ours: float
    tenseal: float
    ratio: float
    target: str
    met: bool | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak resident memory of a server process that has summed this many uploads."""

    clients: int
    peak_bytes: int


def _plan(parameters: int) -> Plan:
    return plan_tensors(parameters, max_clients=_MAX_CLIENTS, clip=1.0)


def _vector(parameters: int) -> NDArray[np.float32]:
    drawn = Stream.derive("benchmark", parameters).uint32(parameters)
    centred = drawn * 2.0**-31 - 1.0
    update: NDArray[np.float32] = (centred * 0.9 / np.linalg.norm(centred)).astype(np.float32)
    return update


class _Ours:
    """One round of this library at a time; every step once a pair."""

    def __init__(self, parameters: int) -> None:
        self.plan = _plan(parameters)
        self.update = _vector(parameters)
        self.bytes = self.plan.payload_bytes + SEALED_SEED_BYTES + _RECEIPT_BYTES

    def pair(self) -> dict[str, float]:
        from secagg.encryptor import Encryptor, encrypt_quantized
        from secagg.keyholder import KeyHolder

        holder = KeyHolder(self.plan)
        context = holder.context
        parts = quantize(
            self.plan,
            {"update": self.update},
            samples=1,
            rotation=context.rotation,
            randomness=Stream.from_os(),
        )
        uploads: list[Upload] = []
        seconds = {
            "encrypt": timed(
                lambda: uploads.append(encrypt_quantized(context, parts, SigningKey.generate()))
            ),
            "quantize_encrypt": timed(
                lambda: uploads.append(Encryptor(context).encrypt(self.update))
            ),
        }
        uploads.append(Encryptor(context).encrypt(self.update))
        server = Aggregator(context)
        # The first addition of a round pays for fresh memory; neither side's is timed.
        for upload in uploads[1:]:
            server.add(upload)
        seconds["add"] = timed(lambda: server.add(uploads[0]))
        total = ResidueSum(self.plan.blocks)
        total.add(widen(uploads[1].payload, self.plan.blocks))
        seconds["add_unauthenticated"] = timed(
            lambda: total.add(widen(uploads[0].payload, self.plan.blocks))
        )
        aggregate = server.aggregate()
        for admission in aggregate.manifest:
            holder.admit(admission)
        seconds["decrypt"] = timed(lambda: holder.release(aggregate).mean())
        return seconds


class _TenSeal:
    """`CKKSVector` under one public key, a vector for every 4096 values."""

    def __init__(self, parameters: int) -> None:
        import tenseal

        self._api: Any = tenseal
        self._secret = self._api.context(
            self._api.SCHEME_TYPE.CKKS,
            8192,
            coeff_mod_bit_sizes=[60, 40, 40],
            n_threads=1,
        )
        self._secret.global_scale = 2.0**40
        self._public = self._secret.copy()
        self._public.make_context_public()
        self._chunks = np.array_split(
            _vector(parameters).astype(np.float64), range(_SLOTS, parameters, _SLOTS)
        )
        self._sealed = self._encrypt()
        self.bytes = sum(map(len, self._sealed))
        self._sum = [self._api.ckks_vector_from(self._public, part) for part in self._sealed]

    def _encrypt(self) -> list[bytes]:
        return [
            self._api.ckks_vector(self._public, chunk.tolist()).serialize()
            for chunk in self._chunks
        ]

    def _add(self) -> None:
        for total, part in zip(self._sum, self._sealed, strict=True):
            total += self._api.ckks_vector_from(self._public, part)

    def pair(self) -> dict[str, float]:
        seconds = {"encrypt": timed(self._encrypt), "add": timed(self._add)}
        opened = [self._api.ckks_vector_from(self._secret, part) for part in self._sealed]
        seconds["decrypt"] = timed(lambda: [vector.decrypt() for vector in opened])
        return seconds


_TIMES = (
    ("client: encode, encrypt, serialise", "encrypt", "encrypt", 10.0),
    ("client: the same with quantising", "quantize_encrypt", "encrypt", 7.0),
    # Like for like: TenSEAL authenticates nothing, so the line with a target does not either.
    ("server: parse, validate, add", "add_unauthenticated", "add", 80.0),
    ("server: the same, with SHA-256 and receipt", "add", "add", None),
    ("key holder: decrypt, decode", "decrypt", "decrypt", 2.0),
)
_LARGEST_BYTES = 3.6


def _rows(parameters: int, pairs: int) -> list[Row]:
    ours, theirs = _Ours(parameters), _TenSeal(parameters)
    ours.pair(), theirs.pair()  # warms caches, and loads what is loaded late
    samples = [(ours.pair(), theirs.pair()) for _ in range(pairs)]
    mine, other = ours.bytes / parameters, theirs.bytes / parameters
    size = Row(
        "wire",
        "bytes/parameter",
        mine,
        other,
        other / mine,
        f"<= {_LARGEST_BYTES} bytes",
        mine <= _LARGEST_BYTES,
    )
    return [size, *(_time_row(samples, *line) for line in _TIMES)]


def _time_row(
    samples: list[tuple[dict[str, float], dict[str, float]]],
    name: str,
    ours: str,
    tenseal: str,
    target: float | None,
) -> Row:
    ratio = median(b[tenseal] / a[ours] for a, b in samples)
    mine = 1000 * median(a[ours] for a, _ in samples)
    other = 1000 * median(b[tenseal] for _, b in samples)
    if target is None:
        return Row(name, "ms", mine, other, ratio, "", None)
    return Row(name, "ms", mine, other, ratio, f">= {target:g}x", ratio >= target)


def _peak_bytes(parameters: int, clients: int) -> int:
    """Sum ``clients`` well-formed uploads as a server does, without a cipher in the process.

    The payload is uniform residues, which no server can tell from a ciphertext; each client signs
    it, and a sealed seed of its own, with a key of its own.
    """
    plan = _plan(parameters)
    context = RoundContext.create(
        plan,
        bytes(ROUND_KEY_BYTES),
        task_id="benchmark",
        round_number=1,
        attempt=1,
        model_digest=NO_MODEL,
    )
    payload = narrow(uniform_polynomials(Stream.from_os(), plan.blocks))
    payload_digest = hashlib.sha256(payload).digest()
    server = Aggregator(context)
    for _ in range(clients):
        sealed = os.urandom(SEALED_SEED_BYTES)
        receipt = Receipt.sign(SigningKey.generate(), context.id, payload_digest, sealed)
        # A copy of the bytes for each, as they would come from the network.
        server.add(Upload(Admission(receipt, sealed), bytes(bytearray(payload))))
    server.aggregate()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@app.command("times", hidden=True)
def _times_command(parameters: int, pairs: int) -> None:
    pin()
    sys.stdout.write(json.dumps([asdict(row) for row in _rows(parameters, pairs)]))


@app.command("memory", hidden=True)
def _memory_command(parameters: int, clients: int) -> None:
    pin()
    sys.stdout.write(json.dumps(_peak_bytes(parameters, clients)))


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    parameters: Annotated[int, typer.Option(min=1, help="model parameters")] = 1_000_000,
    pairs: Annotated[int, typer.Option(min=1, help="interleaved repetitions")] = 9,
    output: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
) -> None:
    """Measure time, bytes and memory against TenSEAL's CKKSVector."""
    if context.invoked_subcommand is not None:
        return
    rows = [Row(**row) for row in in_child("secagg_bench.crypto", "times", parameters, pairs)]
    memory = [
        Memory(clients, in_child("secagg_bench.crypto", "memory", parameters, clients))
        for clients in _MEMORY_COHORTS
    ]
    if output is not None:
        output.write_text(json.dumps(_results(parameters, pairs, rows, memory), indent=2) + "\n")
    _show(parameters, pairs, rows, memory)


def _results(
    parameters: int, pairs: int, rows: list[Row], memory: list[Memory]
) -> dict[str, object]:
    plan = _plan(parameters)
    return {
        "parameters": parameters,
        "pairs": pairs,
        "plan_digest": plan.digest.hex(),
        "digits": plan.layouts[0].digits,
        "float32_bytes_per_parameter": _FLOAT32_BYTES,
        "machine": machine(),
        "rows": [asdict(row) for row in rows],
        "server_memory": [asdict(line) for line in memory],
    }


def _show(parameters: int, pairs: int, rows: list[Row], memory: list[Memory]) -> None:
    title = f"{parameters} parameters, one core, median of {pairs} pairs"
    table = Table("what", "unit", "secagg", "CKKSVector", "ratio", "target", "met", title=title)
    for row in rows:
        met = {True: "[green]met[/]", False: "[red]not met[/]", None: ""}[row.met]
        figures = (f"{row.ours:.3g}", f"{row.tenseal:.3g}", f"{row.ratio:.3g}x")
        table.add_row(row.name, row.unit, *figures, row.target, met)
    peaks = Table("uploads summed", "peak memory of the server", title="one sum in memory, ever")
    for line in memory:
        peaks.add_row(str(line.clients), f"{line.peak_bytes / 1e6:.1f} MB")
    console = Console()
    console.print(table)
    console.print(f"plain float32: {_FLOAT32_BYTES:g} bytes a parameter")
    console.print(peaks)


if __name__ == "__main__":
    app()
