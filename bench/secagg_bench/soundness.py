"""How often the norm check is wrong: honest updates that it refuses, and others that it accepts.

Three ways to judge an upload, each checked against the next:

* ``integers``: the multipliers of the library, applied to plaintexts exactly, without any cipher;
  what a key holder would open but for the noise, which is lost in the norm. Ten times as fast.
* ``zero key``: the library's own sketches and verdicts of ciphertexts under the zero key, which are
  their plaintexts.
* ``encrypted``: whole clients, encryption and all.

And the law of `pass_law`, for what is too rare to be counted. Every trial has a challenge of its
own, expanded from the seed: the same figures come out again.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import numpy as np
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from secagg import ring
from secagg.challenger import Challenger
from secagg.context import RoundContext, rotation_string
from secagg.encryptor import Encryptor, encrypt_quantized
from secagg.keyholder import KeyHolder
from secagg.norm_check import passes
from secagg.packing import balanced_digits, pack
from secagg.parameters import MODULUS, RING_DEGREE, FloatSegment, NormCheck, Plan, TensorSpec
from secagg.planner import make_plan, plan_integers
from secagg.quantize import Quantized, quantize
from secagg.receipts import SigningKey
from secagg.sampling import Stream, uniform_polynomials
from secagg.sketch_shape import BLINDS, noise_energy, noise_spread, norm_shapes
from secagg.sketches import _NormLook, sketch
from secagg_bench.pass_law import (
    blocks_in_phase,
    confidence,
    dense_passes,
    drawn_mixes,
    many_blocks,
    one_block,
    pass_probability,
    refused,
)

__all__ = ["app"]

_SEED = 1
_PORTION = 50  # trials that a process does at a time
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

Integers = NDArray[np.int64]
Make = Callable[[Plan, np.random.Generator], Integers]

app = typer.Typer(help=__doc__)


# --- plans ----------------------------------------------------------------------------------------


def _floats(parameters: int, clients: int, bits: int, check: NormCheck, cap: int = 1) -> Plan:
    weighting = "samples" if cap > 1 else "equal"
    tensors = (TensorSpec("w", (parameters,)),)
    segment = FloatSegment("update", tensors, 1.0, bits, weighting, cap)
    return make_plan([segment], max_clients=clients, norm_check=check)


@cache
def _plan(name: str) -> Plan:
    check = NormCheck()
    plans = {
        # All values in one digit of one block: the fewest degrees of freedom there are.
        "one block": lambda: _floats(4000, 8, 8, check),
        "three blocks": lambda: _floats(27_000, 8, 8, check),
        "a million": lambda: _floats(1_000_000, 1000, 8, check),
        "2 bits": lambda: _floats(4000, 8, 2, check),
        "16 bits": lambda: _floats(4000, 8, 16, check),
        "weighted": lambda: _floats(4000, 8, 8, check, cap=100),
        "votes": lambda: plan_integers(
            5000, max_clients=100, max_abs=1, max_norm=1, norm_check=check
        ),
    }
    return plans[name]()


@cache
def _context(name: str) -> RoundContext:
    return KeyHolder(_plan(name)).context


# --- what is uploaded -----------------------------------------------------------------------------


def _quantized(plan: Plan, vector: NDArray[np.float64], drawn: np.random.Generator) -> Integers:
    """Integers of an update scaled to the clip norm, by the library's quantiser."""
    segment = plan.segments[0]
    parts = quantize(
        plan,
        {segment.name: vector / np.linalg.norm(vector)},
        samples=int(drawn.integers(1, 101)),
        rotation=rotation_string("task", 1, plan),
        randomness=Stream(drawn.bytes(32)),
    )
    return pack(plan.layouts[0], parts[0].values)


def _parameters(plan: Plan) -> int:
    segment = plan.segments[0]
    return segment.parameters if isinstance(segment, FloatSegment) else segment.size


def _dense(plan: Plan, drawn: np.random.Generator) -> Integers:
    return _quantized(plan, drawn.standard_normal(_parameters(plan)), drawn)


def _one_coordinate(plan: Plan, drawn: np.random.Generator) -> Integers:
    vector = np.zeros(_parameters(plan))
    vector[drawn.integers(vector.size)] = 1.0
    return _quantized(plan, vector, drawn)


def _one_item(plan: Plan, drawn: np.random.Generator) -> Integers:
    vector = np.zeros(_parameters(plan))
    start = int(drawn.integers(vector.size - 64))
    vector[start : start + 64] = drawn.standard_normal(64)
    return _quantized(plan, vector, drawn)


def _vote(plan: Plan, drawn: np.random.Generator) -> Integers:
    values = np.zeros(plan.layouts[0].values, dtype=np.int64)
    values[drawn.integers(values.size)] = drawn.choice([-1, 1])
    return pack(plan.layouts[0], values)


def _digits(plan: Plan, values: NDArray[np.float64], norm: float) -> Integers:
    """Any numbers (blocks, digits, 4096), scaled to a multiple of the bound and packed."""
    layout = plan.layouts[0]
    scaled = np.rint(values * (norm * layout.norm / np.linalg.norm(values))).astype(np.int64)
    powers = layout.base ** np.arange(layout.digits)
    packed: Integers = np.einsum("bdk,d->bk", scaled, powers) << layout.shift
    return packed


def _zeros(plan: Plan) -> NDArray[np.float64]:
    layout = plan.layouts[0]
    return np.zeros((layout.blocks, layout.digits, RING_DEGREE))


def _random_direction(norm: float) -> Make:
    def make(plan: Plan, drawn: np.random.Generator) -> Integers:
        values = _zeros(plan)
        values.reshape(-1)[: plan.layouts[0].values] = drawn.standard_normal(plan.layouts[0].values)
        return _digits(plan, values, norm)

    return make


def _wave(root: int) -> NDArray[np.float64]:
    """All energy at one root and its conjugate."""
    wave: NDArray[np.float64] = np.cos(
        np.pi * (2 * root + 1) * np.arange(RING_DEGREE) / RING_DEGREE
    )
    return wave


def _sinusoid(norm: float, *, blocks: int = 0, digits: int = 1, root: int | None = None) -> Make:
    """In phase in the first ``blocks`` blocks, or all of them, and in the first digits."""

    def make(plan: Plan, drawn: np.random.Generator) -> Integers:
        values = _zeros(plan)
        place = int(drawn.integers(RING_DEGREE)) if root is None else root
        values[: blocks or None, : digits or None] = _wave(place)
        return _digits(plan, values, norm)

    return make


def _constant(norm: float) -> Make:
    def make(plan: Plan, drawn: np.random.Generator) -> Integers:
        values = _zeros(plan)
        values[:, 0] = 1.0
        return _digits(plan, values, norm)

    return make


def _two_blocks(norm: float, sign: int) -> Make:
    def make(plan: Plan, drawn: np.random.Generator) -> Integers:
        values = _zeros(plan)
        values[0, 0] = drawn.standard_normal(RING_DEGREE)
        values[1, 0] = sign * values[0, 0]
        return _digits(plan, values, norm)

    return make


def _spike(norm: float) -> Make:
    def make(plan: Plan, drawn: np.random.Generator) -> Integers:
        values = _zeros(plan)
        values[0, 0, drawn.integers(RING_DEGREE)] = 1.0
        return _digits(plan, values, norm)

    return make


def _shift(part: int, every: int = 1, *, block: bool = False, single: bool = False) -> Make:
    """A part of a digit's base on every so-manieth coefficient of all blocks, or the first one."""

    def make(plan: Plan, drawn: np.random.Generator) -> Integers:
        layout = plan.layouts[0]
        out = np.zeros((layout.blocks, RING_DEGREE), dtype=np.int64)
        places = slice(77, 78) if single else slice(None, None, every)
        out[: 1 if block or single else None, places] = (layout.base // part) << layout.shift
        return out

    return make


def _half_of_q(plan: Plan, drawn: np.random.Generator) -> Integers:
    return np.full((plan.blocks, RING_DEGREE), MODULUS // 2)


def _huge(plan: Plan, drawn: np.random.Generator) -> Integers:
    out = np.zeros((plan.blocks, RING_DEGREE), dtype=np.int64)
    out[0, drawn.integers(RING_DEGREE)] = drawn.integers(MODULUS // 8, MODULUS // 2)
    return out


def _folding_squares(plan: Plan, drawn: np.random.Generator) -> Integers:
    """Two coefficients whose squares add up to a multiple of q."""
    roots = (pow(each, (MODULUS - 1) // 4, MODULUS) for each in range(2, 100))
    root = next(each for each in roots if each not in (1, MODULUS - 1))
    small = int(drawn.integers(1, 1 << 20))
    out = np.zeros((plan.blocks, RING_DEGREE), dtype=np.int64)
    pair = np.array([small, small * root % MODULUS], dtype=np.uint64)
    out[0, drawn.choice(RING_DEGREE, 2, replace=False)] = ring.centre(pair)
    return out


def _uniform(plan: Plan, drawn: np.random.Generator) -> Integers:
    return ring.centre(uniform_polynomials(Stream(drawn.bytes(32)), plan.blocks))


def _nothing(plan: Plan, drawn: np.random.Generator) -> Integers:
    return np.zeros((plan.blocks, RING_DEGREE), dtype=np.int64)


# --- how it is judged -----------------------------------------------------------------------------


def _zero_key(name: str, coefficients: Integers, drawn: np.random.Generator) -> bool:
    """The library's own sketch and verdict, of a ciphertext under the zero key."""
    nothing = np.zeros(RING_DEGREE, dtype=np.int64)
    residues = ring.to_ntt(coefficients)
    made = sketch(_context(name), drawn.bytes(32), [residues], drawn.bytes(32))
    return passes(_plan(name), nothing, made)


def _integers(name: str, coefficients: Integers, drawn: np.random.Generator) -> bool:
    """The same multipliers, products by transforms in floating point that are rounded.

    Exact for updates: integers below 2**40 on the grid, as packed. Segments without a weight.
    """
    plan = _plan(name)
    (shape,), layout, check = norm_shapes(plan), plan.layouts[0], plan.norm_check
    margin = 0.0 if check is None else check.margin
    opened = _opened(name, coefficients, drawn.bytes(32), drawn.bytes(32))
    energy = float(np.square(opened.astype(np.float64)).sum(axis=1).mean())
    energy -= noise_energy(layout, shape)
    allowed = (1 + margin) ** 2 * layout.norm**2 + 6 * noise_spread(layout, shape)
    return energy <= allowed


def _opened(name: str, coefficients: Integers, upload: bytes, key: bytes) -> Integers:
    """Digits of the shown values, int64 (rows, digits, values), without noise."""
    plan = _plan(name)
    (shape,), layout = norm_shapes(plan), plan.layouts[0]
    look = _NormLook(
        shape, slice(0, layout.blocks), Stream.derive("sketch", key, upload, shape.segment)
    )
    mixes = look._mixes.reshape(shape.rows, BLINDS, 2, layout.blocks)
    mixed = mixes[:, :, 0] + 1j * mixes[:, :, 1]
    blinds = _spectrum(look._blinds).reshape(shape.rows, BLINDS, -1)
    digits = np.moveaxis(balanced_digits(layout, coefficients >> layout.shift), 1, 0)
    shown = np.zeros((shape.rows, layout.digits, shape.values), dtype=np.int64)
    places = look._positions.astype(np.intp)
    for digit, values in enumerate(digits):
        if values.any():
            rows = (blinds * (mixed @ _spectrum(values))).sum(axis=1)
            shown[:, digit] = np.take_along_axis(_coefficients(rows), places, axis=1)
    # Digits of the sum: what leaves one goes over into the next.
    half_base = layout.base // 2
    for digit in range(layout.digits - 1):
        carry = (shown[:, digit] + half_base) // layout.base
        shown[:, digit] -= carry * layout.base
        shown[:, digit + 1] += carry
    return shown


@cache
def _twist() -> NDArray[np.complex128]:
    twist: NDArray[np.complex128] = np.exp(1j * np.pi * np.arange(RING_DEGREE // 2) / RING_DEGREE)
    return twist


def _spectrum(polynomials: Integers) -> NDArray[np.complex128]:
    """Values at those roots of X**4096 + 1 where X**2048 is i; at the others, their conjugates."""
    low, high = np.split(polynomials.astype(np.float64), 2, axis=-1)
    return np.fft.ifft((low + 1j * high) * _twist(), axis=-1, norm="forward")


def _coefficients(spectrum: NDArray[np.complex128]) -> Integers:
    folded = np.fft.fft(spectrum, axis=-1, norm="forward") * _twist().conj()
    whole: Integers = np.rint(np.concatenate([folded.real, folded.imag], -1)).astype(np.int64)
    return whole


def _encrypted(name: str, norm: float, drawn: np.random.Generator) -> bool:
    """A whole client of a million parameters; its plan believes a larger clip norm than it has."""
    plan, holder = _plan(name), _holder(name)
    segment = plan.segments[0]
    if not isinstance(segment, FloatSegment):
        raise TypeError("expected a plan of floats")
    challenger = Challenger(holder.context, drawn.bytes(32))
    identity = SigningKey.from_bytes(drawn.bytes(32))
    vector = drawn.standard_normal(segment.parameters)
    vector *= segment.clip / np.linalg.norm(vector)
    commitment = challenger.commitment(identity.public)
    if norm == 1.0:
        encryptor = Encryptor(holder.context, identity, commitment=commitment)
        upload = encryptor.encrypt(vector)
    else:
        values = np.rint(norm * vector / segment.step)
        padded = np.zeros(segment.values, dtype=np.int64)
        padded[: values.size] = np.clip(values, -segment.max_abs, segment.max_abs)
        upload = encrypt_quantized(holder.context, [Quantized(padded)], identity, commitment)
    holder.admit(upload.admission)
    return holder.submit_sketch(challenger.sketch(upload)).passed


@cache
def _holder(name: str) -> KeyHolder:
    return KeyHolder(_plan(name))


# --- trials ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trial:
    """One line of what is measured: so many uploads of one form, judged one way."""

    form: str
    plan: str
    judged: str
    trials: int
    make: Make | None = None
    norm: float = 1.0


def _trials() -> Iterator[Trial]:
    yield from _honest()
    yield from _too_large()
    yield from _malformed()


def _honest() -> Iterator[Trial]:
    yield Trial("honest: dense", "one block", "integers", 30_000, _dense)
    yield Trial("honest: dense", "one block", "zero key", 1_000, _dense)
    yield Trial("honest: dense", "three blocks", "integers", 3_000, _dense)
    yield Trial("honest: dense", "2 bits", "integers", 3_000, _dense)
    yield Trial("honest: dense", "16 bits", "integers", 3_000, _dense)
    yield Trial("honest: dense, weights 1 to 100", "weighted", "zero key", 2_000, _dense)
    yield Trial("honest: one coordinate", "one block", "integers", 3_000, _one_coordinate)
    yield Trial("honest: one item's row", "one block", "integers", 3_000, _one_item)
    yield Trial("honest: one vote", "votes", "integers", 3_000, _vote)
    yield Trial("honest: dense", "a million", "encrypted", 40)


def _too_large() -> Iterator[Trial]:
    yield Trial("random direction", "a million", "encrypted", 20, None, 1.5)
    for norm, trials in ((1.2, 1_000), (1.3, 2_000), (1.5, 10_000), (2.0, 2_000)):
        name = ("one block", "integers", trials, _random_direction(norm), norm)
        yield Trial("random direction", *name)
    yield Trial("random direction", "three blocks", "integers", 2_000, _random_direction(1.5), 1.5)
    for norm, trials in ((1.2, 1_000), (1.5, 2_000), (2.0, 8_000), (3.0, 2_000)):
        for blocks, plan in ((1, "one block"), (0, "three blocks")):
            form = "one root" if blocks else "one root, all blocks in phase"
            make = _sinusoid(norm, blocks=blocks)
            yield Trial(form, plan, "integers", trials, make, norm)
    for norm in (5.0, 10.0):
        make = _sinusoid(norm)
        trials = 10_000 if norm == 5.0 else 1_000
        form = "one root, all blocks in phase"
        yield Trial(form, "three blocks", "zero key", trials, make, norm)
        yield Trial("one root, all digits", "three blocks", "integers", 1_000,
                    _sinusoid(norm, digits=0), norm)  # fmt: skip
    for norm in (2.0, 5.0):
        others = {
            "one root, all digits": _sinusoid(norm, digits=0),
            "lowest root": _sinusoid(norm, root=0),
            "constant coefficients": _constant(norm),
            "two equal blocks": _two_blocks(norm, 1),
            "two opposite blocks": _two_blocks(norm, -1),
            "one coefficient": _spike(norm),
        }
        for form, make in others.items():
            if norm == 2.0 or "digits" not in form:
                yield Trial(form, "three blocks", "integers", 1_000, make, norm)
    yield Trial("one root, all blocks in phase", "a million", "zero key", 300, _sinusoid(2.0), 2.0)


def _malformed() -> Iterator[Trial]:
    forms = {
        "half a base on one coefficient": _shift(2, single=True),
        "half a base on every 64th": _shift(2, 64),
        "half a base on every 8th": _shift(2, 8),
        "half a base on every 4th": _shift(2, 4),
        "half a base on every 2nd": _shift(2, 2),
        "half a base on all of one block": _shift(2, block=True),
        "half a base everywhere": _shift(2),
        "a third of a base everywhere": _shift(3),
        "a quarter of a base everywhere": _shift(4),
        "half of q everywhere": _half_of_q,
        "one huge coefficient": _huge,
        "squares that fold to zero": _folding_squares,
        "uniformly random": _uniform,
        "all zero (accepted)": _nothing,
    }
    for form, make in forms.items():
        yield Trial(form, "three blocks", "zero key", 1_000, make)
    for every, form in ((1, "everywhere"), (2, "on every 2nd"), (4, "on every 4th")):
        name = (f"half a base {form}", "three blocks", "integers", 20_000)
        yield Trial(*name, _shift(2, every))


def _portion(index: int, start: int, count: int) -> int:
    """How many of so many trials pass; runs in a process of its own."""
    trial = list(_trials())[index]
    passed = 0
    for number in range(start, start + count):
        drawn = np.random.default_rng([_SEED, index, number])
        if trial.make is None:
            passed += _encrypted(trial.plan, trial.norm, drawn)
            continue
        judge = _integers if trial.judged == "integers" else _zero_key
        passed += judge(trial.plan, trial.make(_plan(trial.plan), drawn), drawn)
    return passed


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one trial; ``low`` and ``high`` bound the pass probability at 95 percent."""

    form: str
    plan: str
    judged: str
    norm: float
    trials: int
    passed: int
    low: float
    high: float
    seconds: float


def _outcome(trial: Trial, trials: int, passed: int, seconds: float) -> Outcome:
    low, high = confidence(passed, trials)
    return Outcome(
        trial.form, trial.plan, trial.judged, trial.norm, trials, passed, low, high, seconds
    )


def _measure(scale: float, pool: Executor, progress: Progress) -> list[Outcome]:
    outcomes = []
    for index, trial in enumerate(_trials()):
        trials = max(1, round(trial.trials * scale))
        task = progress.add_task(f"{trial.form}, {trial.norm:g}x, {trial.plan}", total=trials)
        started = time.perf_counter()
        starts = range(0, trials, _PORTION)
        portions = [
            pool.submit(_portion, index, start, min(_PORTION, trials - start)) for start in starts
        ]
        passed = 0
        for start, portion in zip(starts, portions, strict=True):
            passed += portion.result()
            progress.update(task, completed=min(start + _PORTION, trials))
        progress.remove_task(task)
        outcomes.append(_outcome(trial, trials, passed, time.perf_counter() - started))
        progress.console.print(
            f"{trial.form}, {trial.norm:g}x, {trial.plan}, {trial.judged}: {passed} of {trials}"
        )
    return outcomes


# --- checks of the measurement itself -------------------------------------------------------------


def _rows_that_see_half_a_base(trials: int) -> tuple[int, int]:
    """Of half a base on every coefficient: rows, and rows that see it."""
    coefficients = _shift(2)(_plan("three blocks"), np.random.default_rng(0))
    half, seen = _plan("three blocks").layouts[0].base // 4, 0
    for number in range(trials):
        drawn = np.random.default_rng([_SEED, number])
        digits = _opened("three blocks", coefficients, drawn.bytes(32), drawn.bytes(32))[:, 0]
        loud = np.abs(digits) > half
        if not (loud.all(axis=1) | ~loud.any(axis=1)).all():
            raise RuntimeError("a row saw half a base in some of its values only")
        seen += int(loud[:, 0].sum())
    return seen, trials * 16


def _integers_agree(trials: int) -> int:
    """Uploads of all kinds that exact integers and the library judge differently."""
    different = 0
    kinds = [
        ("one block", _dense),
        ("three blocks", _random_direction(1.2)),
        ("three blocks", _sinusoid(1.7)),
        ("one block", _sinusoid(3.0)),
        ("votes", _vote),
    ]
    for number in range(trials):
        for name, make in kinds:
            drawn = np.random.default_rng([_SEED, number])
            coefficients = make(_plan(name), drawn)
            state = drawn.bit_generator.state
            first = _integers(name, coefficients, drawn)
            drawn.bit_generator.state = state
            different += first != _zero_key(name, coefficients, drawn)
    return different


def _model_passes(norm: float, blocks: int, trials: int) -> int:
    """One root, the mixes and a Gaussian value of the blinds there, drawn: places and folds too."""
    layout = _plan("three blocks").layouts[0]
    (shape,) = norm_shapes(_plan("three blocks"))
    drawn, passed = np.random.default_rng([_SEED, blocks]), 0
    limit, width = 1.2**2, RING_DEGREE // shape.values
    for start in range(0, trials, 1000):
        count = min(1000, trials - start)
        rows = count * shape.rows
        mixed = np.zeros((rows, BLINDS), dtype=np.complex128)
        for _ in range(blocks):
            mixed += drawn_mixes(drawn, rows)
        blinds = drawn.standard_normal((rows, 2 * BLINDS)) @ np.array(
            [[1, 0], [1j, 0], [0, 1], [0, 1j]]
        )
        amplitude = norm * (mixed * blinds).sum(axis=1) / math.sqrt(2 * blocks)
        root = np.repeat(drawn.integers(0, RING_DEGREE, count), shape.rows)
        places = np.arange(shape.values) * width + drawn.integers(0, width, (rows, shape.values))
        angle = np.pi * (2 * root[:, None] + 1) * places / RING_DEGREE
        values = (amplitude[:, None] * np.exp(1j * angle)).real
        base = layout.base / layout.norm
        folded = values - base * np.rint(values / base)
        energy = np.square(folded).reshape(count, -1).mean(axis=1)
        passed += int((energy <= limit).sum())
    return passed


# --- results --------------------------------------------------------------------------------------


_NORMS = (1.5, 2.0, 3.0, 5.0)
_SKETCHES = (8, 16, 32)
_MARGINS = (0.15, 0.2, 0.3)
_DEGREES = (256, 512, 768)


def _law_table() -> list[dict[str, float]]:
    return [
        {
            "sketches": sketches,
            "norm": norm,
            "one_block": pass_probability(one_block, norm, 0.2, sketches),
            "two_blocks": pass_probability(two, norm, 0.2, sketches),
            "many_blocks": pass_probability(many_blocks, norm, 0.2, sketches),
        }
        for two in [blocks_in_phase(np.array([1, 1j]), _SEED)]
        for sketches in _SKETCHES
        for norm in _NORMS
    ]


def _refusal_table() -> list[dict[str, float]]:
    return [
        {"margin": margin, "degrees": degrees, "refused": refused(margin, degrees)}
        for margin in _MARGINS
        for degrees in _DEGREES
    ]


def _search(draws: int) -> list[dict[str, object]]:
    """How the energy at one root is best spread over blocks: pass probabilities at 2 and 5."""
    candidates: dict[str, NDArray[np.complexfloating]] = {}
    for blocks in (1, 2, 3, 4, 8, 20, 60, 123):
        candidates[f"{blocks} equal, in phase"] = np.ones(blocks, dtype=np.complex128)
    for blocks in (2, 4, 8):
        candidates[f"{blocks} equal, quarter turns"] = np.exp(0.5j * np.pi * np.arange(blocks))
        turns = np.exp(2j * np.pi * np.arange(blocks) / blocks)
        candidates[f"{blocks} equal, phases all around"] = turns
    for ratio in (0.5, 0.9, 0.97):
        candidates[f"geometric, {ratio:g}"] = ratio ** np.arange(60).astype(np.complex128)
    for rest in (0.3, 1.0, 3.0):
        small = np.full(100, rest / 10)
        candidates[f"one and a hundred of {rest:g} together"] = np.append(1.0, small) + 0j
    drawn = np.random.default_rng(_SEED)
    for number in range(draws):
        blocks = int(drawn.integers(2, 40))
        sizes = np.exp(drawn.standard_normal(blocks) * drawn.uniform(0, 1.5))
        phases = np.exp(2j * np.pi * drawn.random(blocks) * drawn.integers(0, 2))
        candidates[f"random {number}"] = sizes * phases
    found: list[dict[str, object]] = []
    for name, amplitudes in candidates.items():
        law = blocks_in_phase(amplitudes, _SEED)
        found.append(
            {
                "form": name,
                "blocks": int(amplitudes.size),
                "at_2": pass_probability(law, 2.0, 0.2, 16),
                "at_5": pass_probability(law, 5.0, 0.2, 16),
            }
        )
    return found


def _check(results: dict[str, object], outcomes: list[Outcome]) -> None:
    """Refuse results that cannot be right, or that the documentation could not say.

    Raises:
        RuntimeError: an honest update was refused, or an attack passes more often than claimed.
    """
    for line in outcomes:
        named = f"{line.form}, {line.norm:g}x, {line.plan}, {line.judged}"
        accepted = line.form.startswith(("honest", "all zero"))
        if not 0 <= line.low <= line.passed / line.trials <= line.high <= 1:
            raise RuntimeError(f"no probabilities: {named}")
        # Where all energy is in one digit, the law allows five in a million: see `refused`.
        if accepted and line.trials - line.passed > line.trials // 10_000:
            raise RuntimeError(f"{line.trials - line.passed} refused: {named}")
        if line.form == "random direction" and line.norm >= 1.5 and line.passed > line.trials / 1e3:
            raise RuntimeError(f"{line.passed} of {line.trials} passed: {named}")
        if line.norm >= 5 and line.passed > 1:
            raise RuntimeError(f"{line.passed} of {line.trials} passed: {named}")
    if results["judged_differently"]:
        raise RuntimeError("exact integers and the library judged an upload differently")
    json.dumps(results, allow_nan=False)


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="write the figures here as JSON")] = Path(
        "bench/results/soundness.json"
    ),
    figure: Annotated[Path, typer.Option(help="draw them here as SVG")] = Path(
        "docs/soundness.svg"
    ),
    scale: Annotated[float, typer.Option(min=0.0001, help="share of the trials to make")] = 1.0,
    processes: Annotated[int, typer.Option(min=1, help="worker processes")] = 2,
    redraw: Annotated[bool, typer.Option(help="only draw what is in the output file")] = False,
) -> None:
    """Measure how often the norm check is wrong, and draw it."""
    if redraw:
        kept = json.loads(output.read_text(encoding="utf-8"))
        _draw([Outcome(**line) for line in kept["outcomes"]], figure)
        return
    started = time.perf_counter()
    os.environ.update(_ONE_THREAD)  # of the workers, which start afresh
    console = Console()
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
    with (
        ProcessPoolExecutor(processes, get_context("spawn")) as pool,
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
    ):
        outcomes = _measure(scale, pool, progress)
    results = _results(scale, outcomes)
    results["seconds"] = time.perf_counter() - started
    _show(console, outcomes)
    _check(results, outcomes)
    output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _draw(outcomes, figure)


def _results(scale: float, outcomes: list[Outcome]) -> dict[str, object]:
    few = max(5, round(60 * scale))
    seen, rows = _rows_that_see_half_a_base(max(20, round(1000 * scale)))
    model = max(1000, round(100_000 * scale))
    plan = _plan("three blocks")
    return {
        "seed": _SEED,
        "scale": scale,
        "check": asdict(NormCheck()),
        "plans": {name: _described(name) for name in sorted({line.plan for line in outcomes})},
        "outcomes": [asdict(line) for line in outcomes],
        "half_a_base": {"rows": rows, "seen": seen},
        "judged_differently": _integers_agree(few),
        "model": [
            {
                "norm": norm,
                "blocks": blocks,
                "trials": model,
                "passed": _model_passes(norm, blocks, model),
                "values": norm_shapes(plan)[0].values,
            }
            for norm in (1.5, 2.0, 3.0)
            for blocks in (1, 3, 123)
        ],
        "law": _law_table(),
        "refusals": _refusal_table(),
        "search": _search(max(3, round(60 * scale))),
        "machine": {
            "processor": platform.machine(),
            "system": platform.system(),
            "python": platform.python_version(),
            "numpy": version("numpy"),
        },
    }


def _described(name: str) -> dict[str, object]:
    plan = _plan(name)
    layout, (shape,) = plan.layouts[0], norm_shapes(plan)
    return {
        "digest": plan.digest.hex(),
        "values": layout.values,
        "blocks": layout.blocks,
        "digits": layout.digits,
        "base_over_norm": layout.base / layout.norm,
        "shown": shape.values,
    }


# --- the figure -----------------------------------------------------------------------------------


_INK, _SOFT, _LINE = "#1f2933", "#5a6672", "#d9dee3"
_SERIES = {
    "random direction": ("#2f7d5b", "dense, any direction", "one block", "o"),
    "one root": ("#4e79a7", "one root of one block", "one block", "s"),
    "one root, all blocks in phase": ("#b5543c", "one root of three blocks", "three blocks", "D"),
}
_FLOOR = 1e-9


def _draw(outcomes: list[Outcome], target: Path) -> None:
    """Pass probability against the norm: the laws as lines, the trials as points."""
    mpl.rcParams["svg.hashsalt"] = "secagg"
    mpl.rcParams["font.size"] = 10
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    norms = np.concatenate([np.linspace(1.0, 1.5, 40), np.linspace(1.55, 3.6, 42)])
    three = blocks_in_phase(np.ones(3, dtype=np.complex128), _SEED)
    (shape,) = norm_shapes(_plan("one block"))  # one digit of which is filled
    curves = {
        "random direction": [dense_passes(n, 0.2, shape.rows * shape.values) for n in norms],
        "one root": [pass_probability(one_block, n, 0.2, 16) for n in norms],
        "one root, all blocks in phase": [pass_probability(three, n, 0.2, 16) for n in norms],
    }
    for form, (colour, label, plan, marker) in _SERIES.items():
        axes.plot(norms, curves[form], color=colour, linewidth=1.6, label=label)
        _points(axes, [o for o in outcomes if (o.form, o.plan) == (form, plan)], colour, marker)
    many = [pass_probability(many_blocks, n, 0.2, 16) for n in norms]
    axes.plot(norms, many, color=_INK, linewidth=1.2, linestyle="--", label="many: the worst found")
    axes.axvline(1.2, color=_SOFT, linewidth=0.8, linestyle=":", zorder=0)
    axes.annotate(
        "threshold", (1.2, 2.2e-9), (-4, 0), textcoords="offset points", color=_SOFT, ha="right",
        va="bottom", rotation=90,
    )  # fmt: skip
    axes.plot([], [], "v", color=_SOFT, markerfacecolor="white", label="none passed: at most")
    axes.set(yscale="log", ylim=(_FLOOR, 1.8), xlim=(1.0, 3.6))
    axes.set_xlabel("norm of the update, as a multiple of the honest bound")
    axes.set_ylabel("probability of being accepted")
    axes.grid(axis="y", color=_LINE, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(
        frameon=False,
        loc="upper right",
        title="lines: law, points: trials",
        fontsize=9,
        labelspacing=0.25,
    )
    figure.savefig(target, metadata={"Date": None})


def _points(axes: mpl.axes.Axes, lines: list[Outcome], colour: str, marker: str) -> None:
    for line in lines:
        if not 1.0 <= line.norm <= 3.6:
            continue
        if not line.passed:  # nothing passed: at most so often
            axes.plot(line.norm, line.high, marker="v", color=colour, markerfacecolor="white")
            continue
        share = line.passed / line.trials
        errors = [[share - line.low], [line.high - share]]
        axes.errorbar(line.norm, share, errors, color=colour, marker=marker, markersize=5)


def _show(console: Console, outcomes: list[Outcome]) -> None:
    table = Table("form", "norm", "plan", "judged by", "passed", "trials", "at most (97.5 %)")
    for line in outcomes:
        figures = (f"{line.passed}", f"{line.trials}", f"{line.high:.2g}")
        table.add_row(line.form, f"{line.norm:g}", line.plan, line.judged, *figures)
    console.print(table)


if __name__ == "__main__":
    app()
