"""What the norm check of one upload costs: sketches against squaring ciphertexts, the textbook way.

The textbook's server squares every ciphertext of the update, adds up, relinearises once, and sums
over the slots by rotations; the key owner decrypts the one number. It does so in SEAL, at its best
that we know: a level that the check does not need is dropped on arrival, and rotations take place
on the lowest one. Its *leanest* form supposes uploads made for it: encrypted without that level,
and stored uncompressed, which SEAL reads several times faster.

Both sides start from the upload as it is stored, on one core, in interleaved pairs; medians and the
medians of the pairs' ratios are reported. Targets are printed as met or not.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
import zstandard
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from secagg.challenger import Challenger
from secagg.direction import Direction
from secagg.parameters import FloatSegment, IntegerSegment, NormCheck, Plan, Segment, TensorSpec
from secagg.planner import make_plan
from secagg.residues import ResidueSum, widen
from secagg.sampling import Stream
from secagg_bench.one_core import in_child, machine, pin, timed

__all__ = ["app"]

_LARGEST_PERCENT = 15.0  # of an upload's bytes, to the key holder
_LEAST_RATIO = 3.0
_NORM = 0.9  # of the measured update; the clip norm is 1
_COUNTS = 10_000

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
class Setting:
    """How large a model, and for how many clients its round is planned."""

    parameters: int
    max_clients: int


_SETTINGS = (Setting(27_000, 8), Setting(1_000_000, 1_000))


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to check the same update with sketches.

    Attributes:
        name: what is particular about it.
        sketches: rows a segment.
        server_ms: parse the stored upload, sketch it, serialise the sketch.
        key_holder_ms: parse the sketch, open it, judge it.
        upload_bytes: ciphertexts of the upload; `unchecked_upload_bytes` without a check.
        sketch_bytes: from the server to the key holder; `share` of the upload.
        sums: both times together, in times of parsing the first variant's upload and adding it to
            a sum; `hashed_sums` with its SHA-256.
    """

    name: str
    sketches: int
    server_ms: float
    key_holder_ms: float
    upload_bytes: int
    unchecked_upload_bytes: int
    sketch_bytes: int
    share: float
    sums: float
    hashed_sums: float


def _plans(setting: Setting) -> dict[str, Plan]:
    update = FloatSegment("update", (TensorSpec("vector", (setting.parameters,)),), clip=1.0)
    counts = IntegerSegment("counts", _COUNTS, max_abs=20, max_norm=500.0)
    checks: dict[str, tuple[list[Segment], NormCheck]] = {
        "16 sketches": ([update], NormCheck()),
        "32 sketches": ([update], NormCheck(sketches=32)),
        "16 sketches and direction": ([update], NormCheck(min_cosine=0.0)),
        f"16 sketches, {_COUNTS:,} counts beside": ([update, counts], NormCheck()),
    }
    return {
        name: make_plan(segments, max_clients=setting.max_clients, norm_check=check)
        for name, (segments, check) in checks.items()
    }


def _update(parameters: int) -> NDArray[np.float32]:
    drawn = Stream.derive("check benchmark", parameters).uint32(parameters) * 2.0**-31 - 1.0
    update: NDArray[np.float32] = (drawn * _NORM / np.linalg.norm(drawn)).astype(np.float32)
    return update


class _Ours:
    """One upload, which the server has stored and the key holder has admitted."""

    def __init__(self, plan: Plan, update: NDArray[np.float32]) -> None:
        from secagg.encryptor import Encryptor
        from secagg.keyholder import KeyHolder
        from secagg.receipts import SigningKey
        from secagg.sealing import RoundKeyPair, seal_info

        self.plan, self._pair = plan, RoundKeyPair()
        context = KeyHolder(plan, pair=self._pair).context
        segment = plan.segments[0]
        assert isinstance(segment, FloatSegment)  # noqa: S101 - see _plans
        # The direction is rotated once a round; that is not a cost of an upload.
        check, direction = plan.norm_check, None
        if check is not None and check.min_cosine is not None:
            direction = Direction.of(segment, update, context.rotation)
        self._challenger = Challenger(context, direction=direction)
        identity = SigningKey.generate()
        commitment = self._challenger.commitment(identity.public)
        contributions: dict[str, Any] = {"update": update, "counts": np.full(_COUNTS, 4)}
        names = [each.name for each in plan.segments]
        self._upload = Encryptor(context, identity, commitment=commitment).encrypt_segments(
            {name: contributions[name] for name in names}
        )
        receipt = self._upload.admission.receipt
        info = seal_info(context.id.digest, receipt.client_key, receipt.upload_digest)
        self._seed = self._pair.open(self._upload.admission.sealed_seed, info)
        self._sum = ResidueSum(plan.blocks)
        self.sketch = b""

    def pair(self) -> dict[str, float]:
        return {"server": timed(self._sketch), "key_holder": timed(self._judge)}

    def sum_pair(self) -> dict[str, float]:
        """Seconds of what the server does to the same upload anyway."""
        return {"sum": timed(self._add), "hash": timed(self._hash)}

    def _sketch(self) -> None:
        residues = widen(self._upload.payload, self.plan.blocks)
        receipt = self._upload.admission.receipt
        self.sketch = self._challenger.sketch_validated(receipt, [residues]).to_bytes()

    def _judge(self) -> None:
        from secagg.norm_check import passes
        from secagg.onetime import secret
        from secagg.sketches import Sketch

        shown = Sketch.from_bytes(
            self.plan, self._upload.admission.receipt.upload_digest, self.sketch
        )
        if not passes(self.plan, secret(self._seed), shown):
            raise RuntimeError("expected an honest update to pass; it was refused")

    def _add(self) -> None:
        self._sum.add(widen(self._upload.payload, self.plan.blocks))

    def _hash(self) -> None:
        hashlib.sha256(self._upload.payload).digest()


_SEAL_HEADER = struct.Struct("<HBBBBHQ")  # magic, header size, version, compression, 0, total


def _uncompressed(stored: bytes) -> bytes:
    """A file of SEAL's, which it has compressed, as SEAL stores it without."""
    magic, size, major, minor, _, zero, _ = _SEAL_HEADER.unpack_from(stored)
    body = zstandard.ZstdDecompressor().decompressobj().decompress(stored[size:])
    return _SEAL_HEADER.pack(magic, size, major, minor, 0, zero, size + len(body)) + body


class _Textbook:
    """The same update under one public key, 4096 values a ciphertext, in files.

    Args:
        update: whose squared norm is wanted.
        folder: for what is stored before the clock runs.
    """

    DEGREE, MODULUS_BITS, SCALE = 8192, (60, 40, 40, 60), 2.0**40

    def __init__(self, update: NDArray[np.float32], folder: Path) -> None:
        import tenseal.sealapi as seal

        self._seal: Any = seal
        parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        parameters.set_poly_modulus_degree(self.DEGREE)
        parameters.set_coeff_modulus(seal.CoeffModulus.Create(self.DEGREE, list(self.MODULUS_BITS)))
        self._context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
        keys = seal.KeyGenerator(self._context)
        public, self._relinearise, self._galois = (
            seal.PublicKey(),
            seal.RelinKeys(),
            seal.GaloisKeys(),
        )
        keys.create_public_key(public)
        keys.create_relin_keys(self._relinearise)
        # Only the rotations by powers of two, which is all that summing over the slots takes.
        self._steps = [1 << bit for bit in range((self.DEGREE // 2).bit_length() - 1)]
        turns = [pow(3, step, 2 * self.DEGREE) for step in self._steps]
        keys.create_galois_keys(turns, self._galois)
        self._evaluator = seal.Evaluator(self._context)
        self._encoder = seal.CKKSEncoder(self._context)
        self._decryptor = seal.Decryptor(self._context, keys.secret_key())
        self._encryptor = seal.Encryptor(self._context, public)
        self._folder, self._result = folder, str(folder / "result")
        self._expected, self.error = float(np.square(update, dtype=np.float64).sum()), 0.0
        stored = [
            self._store(index, values)
            for index, values in enumerate(
                np.array_split(update.astype(np.float64), range(4096, update.size, 4096))
            )
        ]
        self._uploads, self._lean_uploads = zip(*stored, strict=True)

    def _store(self, index: int, values: NDArray[np.float64]) -> tuple[str, str]:
        """A ciphertext as it is encrypted, and one made for this check alone."""
        encoded, ciphertext = self._seal.Plaintext(), self._seal.Ciphertext()
        self._encoder.encode(values.tolist(), self.SCALE, encoded)
        self._encryptor.encrypt(encoded, ciphertext)
        usual, lean = self._folder / f"{index}", self._folder / f"{index}-lean"
        ciphertext.save(str(usual))
        self._evaluator.mod_switch_to_next_inplace(ciphertext)
        ciphertext.save(str(lean))
        lean.write_bytes(_uncompressed(lean.read_bytes()))
        return str(usual), str(lean)

    def pair(self) -> dict[str, float]:
        seconds = {}
        for prefix, uploads in (("", self._uploads), ("lean_", self._lean_uploads)):
            seconds[prefix + "server"] = timed(lambda: self._compute(uploads))  # noqa: B023
            seconds[prefix + "key_holder"] = timed(self._open)
            if self.error > 0.01:
                raise RuntimeError(f"expected the squared norm; got one off by {self.error:.1%}")
        return seconds

    def _compute(self, uploads: Sequence[str]) -> None:
        evaluator, total, square = self._evaluator, None, self._seal.Ciphertext()
        for path in uploads:
            square.load(self._context, path)
            if square.coeff_modulus_size() > 2:
                evaluator.mod_switch_to_next_inplace(square)
            evaluator.square_inplace(square)
            if total is None:
                total, square = square, self._seal.Ciphertext()
            else:
                evaluator.add_inplace(total, square)
        evaluator.relinearize_inplace(total, self._relinearise)
        evaluator.rescale_to_next_inplace(total)
        turned = self._seal.Ciphertext()
        for step in self._steps:
            evaluator.rotate_vector(total, step, self._galois, turned)
            evaluator.add_inplace(total, turned)
        total.save(self._result)  # type: ignore[union-attr]  # there is at least one upload

    def _open(self) -> None:
        result, opened = self._seal.Ciphertext(), self._seal.Plaintext()
        result.load(self._context, self._result)
        self._decryptor.decrypt(result, opened)
        found = self._encoder.decode_double(opened)[0]
        self.error = max(self.error, abs(found / self._expected - 1))

    def facts(self) -> dict[str, object]:
        """Sizes in bytes, and how far off the result was."""
        return {
            "ring_degree": self.DEGREE,
            "modulus_bits": self.MODULUS_BITS,
            "ciphertexts": len(self._uploads),
            "upload_bytes": sum(Path(path).stat().st_size for path in self._uploads),
            "lean_upload_bytes": sum(Path(path).stat().st_size for path in self._lean_uploads),
            "result_bytes": Path(self._result).stat().st_size,
            "relinearisation_key_bytes": self._size(self._relinearise),
            "galois_key_bytes": self._size(self._galois),
            "relative_error": self.error,
        }

    def _size(self, keys: Any) -> int:  # noqa: ANN401 - of SEAL
        path = self._folder / "keys"
        keys.save(str(path))
        return path.stat().st_size


_Sample = dict[str, dict[str, float]]


def _measured(setting: Setting, pairs: int) -> dict[str, Any]:
    """All figures of one model size, as they go into the results."""
    update, plans = _update(setting.parameters), _plans(setting)
    with tempfile.TemporaryDirectory() as folder:
        theirs = _Textbook(update, Path(folder))
        ours = {name: _Ours(plan, update) for name, plan in plans.items()}
        first = next(iter(ours.values()))

        def sample() -> _Sample:
            taken = {"textbook": theirs.pair(), "sums": first.sum_pair()}
            return taken | {name: each.pair() for name, each in ours.items()}

        sample()  # warms caches, and loads what is loaded late
        samples = [sample() for _ in range(pairs)]
        facts = theirs.facts()
    variants = [_variant(name, each, samples) for name, each in ours.items()]
    return {
        **asdict(setting),
        "plan_digest": first.plan.digest.hex(),
        "rows": [asdict(row) for row in _rows(samples, variants[0], facts)],
        "sum_ms": 1000 * median(taken["sums"]["sum"] for taken in samples),
        "hash_ms": 1000 * median(taken["sums"]["hash"] for taken in samples),
        "variants": [asdict(variant) for variant in variants],
        "textbook": facts,
    }


def _variant(name: str, ours: _Ours, samples: list[_Sample]) -> Variant:
    plan, check = ours.plan, ours.plan.norm_check
    assert check is not None  # noqa: S101 - see _plans
    unchecked = make_plan(plan.segments, max_clients=plan.max_clients)
    both = [sum(taken[name].values()) for taken in samples]
    sums = [taken["sums"] for taken in samples]
    return Variant(
        name,
        check.sketches,
        1000 * median(taken[name]["server"] for taken in samples),
        1000 * median(taken[name]["key_holder"] for taken in samples),
        plan.payload_bytes,
        unchecked.payload_bytes,
        len(ours.sketch),
        len(ours.sketch) / plan.payload_bytes,
        median(mine / each["sum"] for mine, each in zip(both, sums, strict=True)),
        median(mine / sum(each.values()) for mine, each in zip(both, sums, strict=True)),
    )


_TIMES: tuple[tuple[str, tuple[str, ...], str, float | None], ...] = (
    ("server: parse, compute, serialise", ("server",), "", None),
    ("key holder: parse, open, judge", ("key_holder",), "", None),
    ("server and key holder", ("server", "key_holder"), "", _LEAST_RATIO),
    ("the same, textbook at its leanest", ("server", "key_holder"), "lean_", None),
)


def _rows(samples: list[_Sample], first: Variant, facts: dict[str, Any]) -> list[Row]:
    """Times and bytes of the first variant beside the textbook's."""
    rows = []
    for name, steps, prefix, target in _TIMES:
        mine = [sum(taken[first.name][step] for step in steps) for taken in samples]
        other = [sum(taken["textbook"][prefix + step] for step in steps) for taken in samples]
        ratio = median(b / a for a, b in zip(mine, other, strict=True))
        wanted = "" if target is None else f">= {target:g}x"
        met = None if target is None else ratio >= target
        rows.append(Row(name, "ms", 1000 * median(mine), 1000 * median(other), ratio, wanted, met))
    return [
        *rows,
        _share_row(100 * first.share, 100 * facts["result_bytes"] / facts["upload_bytes"]),
    ]


def _share_row(ours: float, theirs: float) -> Row:
    name, met = "bytes to the key holder, of the upload's", ours <= _LARGEST_PERCENT
    return Row(name, "%", ours, theirs, theirs / ours, f"<= {_LARGEST_PERCENT:g} %", met)


@app.command("measure", hidden=True)
def _measure_command(parameters: int, max_clients: int, pairs: int) -> None:
    pin()
    sys.stdout.write(json.dumps(_measured(Setting(parameters, max_clients), pairs)))


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    largest: Annotated[int, typer.Option(help="leave out larger models")] = 1_000_000,
    pairs: Annotated[int, typer.Option(min=1, help="interleaved repetitions")] = 21,
    output: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
) -> None:
    """Measure the norm check against squaring ciphertexts."""
    if context.invoked_subcommand is not None:
        return
    sizes = [
        in_child("secagg_bench.check_cost", "measure", each.parameters, each.max_clients, pairs)
        for each in _SETTINGS
        if each.parameters <= largest
    ]
    if output is not None:
        results = {"pairs": pairs, "machine": machine(), "sizes": sizes}
        output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for size in sizes:
        _show(size, pairs)


def _show(size: dict[str, Any], pairs: int) -> None:
    title = f"{size['parameters']:,} parameters, one core, median of {pairs} pairs"
    table = Table("what", "unit", "secagg", "textbook", "ratio", "target", "met", title=title)
    for row in (Row(**each) for each in size["rows"]):
        met = {True: "[green]met[/]", False: "[red]not met[/]", None: ""}[row.met]
        figures = (f"{row.ours:.3g}", f"{row.tenseal:.3g}", f"{row.ratio:.2g}x")
        table.add_row(row.name, row.unit, *figures, row.target, met)
    others = Table("check", "server", "key holder", "of the upload", "plain sums", "with SHA-256")
    for each in (Variant(**each) for each in size["variants"]):
        times = (f"{each.server_ms:.3g} ms", f"{each.key_holder_ms:.3g} ms")
        sums = (f"{each.sums:.3g}x", f"{each.hashed_sums:.3g}x")
        others.add_row(each.name, *times, f"{each.share:.1%}", *sums)
    console, theirs = Console(), size["textbook"]
    keys = theirs["relinearisation_key_bytes"] + theirs["galois_key_bytes"]
    console.print(table)
    console.print(f"evaluation keys: none; the textbook's {keys / 1e6:.1f} MB")
    console.print(others)


if __name__ == "__main__":
    app()
