"""Uploads that no honest client makes, sent through the core library: which layer stops each?

An attacker here follows the protocol where it must (a valid receipt, a seed that opens) and nothing
else: it picks its plaintext coefficients, its bytes, its seeds. One attempt in one process: a few
honest clients, the attackers, and everything that server and key holder do before a sum is opened.
Read `attacks` for attackers that stay within the format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from secagg import onetime
from secagg.aggregator import Aggregator
from secagg.challenger import Challenger
from secagg.encryptor import encrypt_quantized
from secagg.errors import ReleaseError, SecaggError
from secagg.keyholder import KeyHolder
from secagg.noise_audit import dithered
from secagg.packing import pack
from secagg.parameters import (
    MODULUS,
    RESIDUE_BYTES,
    RING_DEGREE,
    FloatSegment,
    Layout,
    NormCheck,
    Plan,
)
from secagg.planner import plan_tensors
from secagg.quantize import Quantized
from secagg.receipts import NO_COMMITMENT, Receipt, SigningKey
from secagg.release import Release
from secagg.residues import ResidueSum, narrow, widen
from secagg.sampling import CBD_BITS
from secagg.sketches import Sketch
from secagg.upload import Admission, Upload
from secagg_bench.gallery import uploads

__all__ = ["CASES", "LAYERS", "Case", "Layer", "Outcome", "Scene", "gallery_plan", "outcome"]

Integers = NDArray[np.int64]
Residues = NDArray[np.uint64]

Layer = Literal["upload", "admission", "once", "norm", "audit", "range", "nothing"]

LAYERS: Final[dict[Layer, str]] = {
    "upload": "the server's check of format, signature and commitment",
    "admission": "the key holder's check of receipt, seal and seed",
    "once": "counted once, however often it is sent",
    "norm": "the norm check",
    "audit": "the release guard, then the noise audit",
    "range": "the range of the sum: the attempt is lost, and nobody is named",
    "nothing": "nothing",
}
"""Who stops an upload, from the first that looks at it to the last."""

_HONEST = 3
_TIMES_BOUND = 10.0


def gallery_plan(tolerated: int = 1, *, weighted: bool = False) -> Plan:
    """The demo's model for up to eight clients: three ciphertexts of three digits, some padding."""
    return plan_tensors(
        28_594,
        max_clients=8,
        clip=40.0,
        weighting="samples" if weighted else "equal",
        weight_cap=100 if weighted else 1,
        norm_check=NormCheck(tolerated=tolerated),
    )


class Scene:
    """One attempt at a round: a key holder, a server's challenger and a few honest clients.

    Args:
        plan: of one segment, with a norm check.
        seed: of everything that the honest clients and the attackers choose at random.
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan, self.rng = plan, np.random.default_rng(seed)
        self.holder = KeyHolder(plan)
        self.context = self.holder.context
        self.challenger = Challenger(self.context)
        self.honest: list[Upload] = []
        self.seeds: list[bytes] = []
        self.total = np.zeros(self.layout.values, dtype=np.int64)
        for _ in range(_HONEST):
            self._join()

    @property
    def layout(self) -> Layout:
        """Of the plan's one segment."""
        return self.plan.layouts[0]

    @property
    def segment(self) -> FloatSegment:
        """The plan's one segment."""
        (segment,) = self.plan.segments
        assert isinstance(segment, FloatSegment)  # noqa: S101 - for the type checker
        return segment

    def weighed_values(self, length: float, weight: float) -> Integers:
        """A random update of so many clips under any weight, int64 (layout.values,)."""
        drawn = self.rng.normal(size=self.segment.parameters)
        vector = drawn * (length * self.segment.clip / np.linalg.norm(drawn))
        return uploads.integers(
            self.segment, self.context.rotation, vector.astype(np.float32), weight, self.rng
        )

    def honest_values(self) -> Integers:
        """Random integers of nine tenths of what is allowed, int64 (layout.values,).

        Where there are weights, under half of the largest one.
        """
        if self.segment.weighted:
            values = self.weighed_values(0.45, 0.5)
            return np.clip(values, -self.layout.max_abs, self.layout.max_abs)
        spread = 0.9 * self.layout.norm / math.sqrt(self.layout.values)
        drawn = np.rint(self.rng.normal(0.0, spread, self.layout.values)).astype(np.int64)
        return np.clip(drawn, -self.layout.max_abs, self.layout.max_abs)

    def _join(self) -> None:
        identity, values = SigningKey.generate(), self.honest_values()
        commitment = self.challenger.commitment(identity.public)
        upload = encrypt_quantized(self.context, [Quantized(values)], identity, commitment)
        self.honest.append(upload)
        self.total += values

    def zeros(self) -> Integers:
        """A plaintext of nothing, int64 (plan.blocks, 4096)."""
        return np.zeros((self.plan.blocks, RING_DEGREE), dtype=np.int64)

    def encrypted(self, plaintext: Integers, seed: bytes) -> Residues:
        """See `uploads.encrypted`."""
        return uploads.encrypted(self.context, plaintext, seed)

    def signed(
        self,
        payload: bytes,
        seed: bytes,
        identity: SigningKey | None = None,
        commitment: bytes | None = None,
    ) -> Upload:
        """See `uploads.signed`: by somebody new, with the server's commitment, when omitted."""
        identity = identity or SigningKey.generate()
        if commitment is None:
            commitment = self.challenger.commitment(identity.public)
        return uploads.signed(self.context, payload, seed, identity, commitment)

    def upload(self, plaintext: Integers, noise: Integers | None = None) -> Upload:
        """See `uploads.upload`: by somebody new."""
        identity = SigningKey.generate()
        commitment = self.challenger.commitment(identity.public)
        return uploads.upload(self.context, plaintext, identity, commitment, noise)

    def in_digit(self, values: Integers, digit: int = 0) -> Integers:
        """Integers of shape (blocks, 4096), of any magnitude, as one digit of a plaintext."""
        plaintext: Integers = (values * self.layout.base**digit) << self.layout.shift
        return plaintext


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the attackers' uploads.

    Attributes:
        layers: what stopped each of them, in the order they were sent.
        reasons: the reason code of the error, or an empty text, for each.
        released: whether a sum was opened in the end.
        excess: largest coordinate of what the attackers added to it, in units of the norm bound.
    """

    layers: tuple[Layer, ...]
    reasons: tuple[str, ...]
    released: bool
    excess: float = 0.0


@dataclass
class _Attempt:
    scene: Scene
    attackers: Sequence[Upload]
    layers: dict[int, Layer] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    sketches: dict[int, Sketch] = field(default_factory=dict)

    def stop(self, attacker: int, layer: Layer, reason: str = "") -> None:
        self.layers[attacker], self.reasons[attacker] = layer, reason

    def left(self) -> list[int]:
        return [i for i in range(len(self.attackers)) if i not in self.layers]


def outcome(scene: Scene, attackers: Sequence[Upload]) -> Outcome:
    """Send the honest uploads, then the attackers', and finish the attempt as far as it goes.

    Raises:
        RuntimeError: an honest client was refused, or a sum is not that of the accepted uploads.
    """
    attempt = _Attempt(scene, attackers)
    _admit(attempt)
    _judge(attempt)
    release = _release(attempt)
    layers: list[Layer] = [attempt.layers.get(i, "nothing") for i in range(len(attackers))]
    reasons = tuple(attempt.reasons.get(i, "") for i in range(len(attackers)))
    if release is None:
        return Outcome(tuple(layers), reasons, released=False)
    added = release.sums[0] - scene.total
    if "nothing" not in layers and added.any():
        raise RuntimeError("expected the sum of the honest clients alone; got another one")
    excess = float(np.abs(added).max()) / scene.layout.norm
    return Outcome(tuple(layers), reasons, released=True, excess=excess)


def _admit(attempt: _Attempt) -> None:
    """What looks at bytes, signatures and seals."""
    scene = attempt.scene
    for upload in scene.honest:
        scene.holder.admit(upload.admission)
    for index, upload in enumerate(attempt.attackers):
        if upload in scene.honest:
            attempt.stop(index, "once")
            continue
        try:
            attempt.sketches[index] = scene.challenger.sketch(upload)
        except SecaggError as error:
            attempt.stop(index, "upload", error.reason)
            continue
        try:
            scene.holder.admit(upload.admission)
        except SecaggError as error:
            attempt.stop(index, "admission", error.reason)


def _judge(attempt: _Attempt) -> None:
    """The norm check."""
    scene = attempt.scene
    for upload in scene.honest:
        scene.holder.submit_sketch(scene.challenger.sketch(upload))
    for index in attempt.left():
        scene.holder.submit_sketch(attempt.sketches[index])
    accepted = {v.receipt.upload_digest: v.accepted for v in scene.holder.verdicts()}
    if not all(accepted[u.admission.receipt.upload_digest] for u in scene.honest):
        raise RuntimeError("expected honest clients to pass the norm check; one did not")
    for index in attempt.left():
        if not accepted[attempt.attackers[index].admission.receipt.upload_digest]:
            attempt.stop(index, "norm", "NORM_REFUSED")


def _release(attempt: _Attempt) -> Release | None:
    """Open the sum; where that fails, audit, and open the sum over the others."""
    scene = attempt.scene
    for _ in range(2):
        left = attempt.left()
        aggregator = Aggregator(scene.context)
        for upload in (*scene.honest, *(attempt.attackers[i] for i in left)):
            aggregator.add(upload)
        try:
            return scene.holder.release(aggregator.aggregate())
        except ReleaseError as error:
            named = [i for i in left if _audited(scene, attempt.attackers[i])]
            if any(_audited(scene, upload) for upload in scene.honest):
                raise RuntimeError("expected the audit to pass honest clients") from error
            for index in named or left:
                attempt.stop(index, "audit" if named else "range", error.reason)
            if not named:
                return None
    return None


def _audited(scene: Scene, upload: Upload) -> bool:
    low = dithered(scene.plan, upload.validate(scene.context))
    return scene.holder.audit(upload.admission.receipt.upload_digest, low)


# --- the gallery ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """One malformed attack.

    Attributes:
        name: for people.
        layer: what must stop it.
        build: the attackers' uploads in a scene.
        tolerated: clients that break the plan, and that the plan puts up with.
        same: whether its bytes are the same every time, so that a round takes only one of them.
        weighted: whether the plan has weights.
    """

    name: str
    layer: Layer
    build: Callable[[Scene], list[Upload]] = field(repr=False)
    tolerated: int = 1
    same: bool = False
    weighted: bool = False

    @property
    def plan(self) -> Plan:
        """What the attempt computes on."""
        return gallery_plan(self.tolerated, weighted=self.weighted)


def _plaintext(
    name: str, layer: Layer, build: Callable[[Scene], Integers], tolerated: int = 1
) -> Case:
    """A case of one attacker that chooses nothing but its plaintext."""
    return Case(name, layer, lambda scene: [scene.upload(build(scene))], tolerated)


def _wave(scene: Scene, *, constant: bool, everywhere: bool) -> Integers:
    """One value or one wave all over, of ten times the bound's norm."""
    blocks = scene.plan.blocks if everywhere else 1
    wave = np.ones(RING_DEGREE)
    if not constant:
        turns, phase = scene.rng.integers(1, RING_DEGREE // 2), scene.rng.uniform(0, math.tau)
        wave = np.cos((2 * turns + 1) * math.pi * np.arange(RING_DEGREE) / RING_DEGREE + phase)
    scale = _TIMES_BOUND * scene.layout.norm / (np.linalg.norm(wave) * math.sqrt(blocks))
    values = np.zeros((scene.plan.blocks, RING_DEGREE), dtype=np.int64)
    values[:blocks] = np.rint(wave * scale).astype(np.int64)
    return scene.in_digit(values, int(scene.rng.integers(scene.layout.digits)))


def _waves() -> list[Case]:
    cases = []
    for constant, what in ((True, "a constant"), (False, "a wave")):
        one = partial(_wave, constant=constant, everywhere=False)
        everywhere = partial(_wave, constant=constant, everywhere=True)
        cases += [
            _plaintext(f"{what} in one ciphertext", "norm", one),
            _plaintext(f"{what} in all ciphertexts", "norm", everywhere),
        ]
    return cases


def _shifted(scene: Scene, amount: int, digit: int, where: str) -> Integers:
    """An honest update, some of whose coefficients are moved by a number of steps of one digit."""
    values = np.zeros((scene.plan.blocks, RING_DEGREE), dtype=np.int64)
    if where == "one":
        values[0, scene.rng.integers(RING_DEGREE)] = amount
    elif where == "every 64th":
        values[:, scene.rng.integers(64) :: 64] = amount
    elif where == "a whole block":
        values[0] = amount
    else:
        values[:] = amount
    return pack(scene.layout, scene.honest_values()) + scene.in_digit(values, digit)


def _shift(name: str, of_base: Callable[[Layout], int], digit: int, where: str) -> Case:
    return _plaintext(
        f"{name} on {where}",
        "norm",
        lambda scene: _shifted(scene, of_base(scene.layout), digit, where),
    )


def _shifts() -> list[Case]:
    cases = []
    for where in ("one", "every 64th", "a whole block", "all"):
        cases += [
            _shift("half a digit base", lambda layout: layout.base // 2, 0, where),
            _shift("a third of a digit base", lambda layout: layout.base // 3, 1, where),
            _shift(
                "many times the digit base",
                lambda layout: 3 * layout.norm * layout.base,
                0,
                where,
            ),
        ]
    return cases


def _four_squares(scene: Scene) -> Integers:
    """Coefficients whose squares add up to q: a norm that is computed modulo q is zero."""
    while True:
        a, b = (int(x) for x in scene.rng.integers(1 << 26, 1 << 27, 2))
        rest = MODULUS - a * a - b * b
        for c in range(math.isqrt(rest), math.isqrt(rest) - 1000, -1):
            d = math.isqrt(rest - c * c)
            if c * c + d * d == rest:
                plaintext = scene.zeros()
                places = scene.rng.choice(RING_DEGREE, 4, replace=False)
                plaintext[0, places] = np.array([a, b, c, d]) << scene.layout.shift
                return plaintext


def _carry(scene: Scene) -> Integers:
    """A digit so close to its end that an honest client's one more makes it carry."""
    values = np.zeros((scene.plan.blocks, RING_DEGREE), dtype=np.int64)
    values[0, scene.rng.integers(RING_DEGREE)] = scene.layout.base // 2 - 1
    return scene.in_digit(values)


def _one_coordinate(scene: Scene, amount: int, place: int = 0) -> Integers:
    values = np.zeros((scene.plan.blocks, RING_DEGREE), dtype=np.int64)
    values[0, place] = amount
    return scene.in_digit(values)


def _weighed(name: str, layer: Layer, length: float, weight: float) -> Case:
    """A case of one attacker with an update of so many clips under this weight."""

    def build(scene: Scene) -> list[Upload]:
        return [scene.upload(pack(scene.layout, scene.weighed_values(length, weight)))]

    return Case(name, layer, build, weighted=True)


def _padding(scene: Scene) -> Integers:
    values = np.zeros((scene.plan.blocks, RING_DEGREE), dtype=np.int64)
    values[-1, -1] = 1
    return scene.in_digit(values, scene.layout.digits - 1)


def _off_grid(scene: Scene, *, everywhere: bool) -> list[Upload]:
    half = 1 << (scene.layout.shift - 1)
    noise = onetime.errors(scene.rng.bytes(32), scene.plan.blocks)
    if everywhere:
        noise = np.full_like(noise, half - 1)
    else:
        noise[0, scene.rng.integers(RING_DEGREE)] = half
    return [scene.upload(pack(scene.layout, scene.honest_values()), noise)]


def _colluders(scene: Scene, amounts: Sequence[float]) -> list[Upload]:
    """So many bounds each, all on one coordinate."""
    return [
        scene.upload(_one_coordinate(scene, int(amount * scene.layout.norm))) for amount in amounts
    ]


def _cancelling(scene: Scene) -> list[Upload]:
    """Two uploads of anything at all, whose sum is small."""
    anything = scene.rng.integers(-(1 << 53), 1 << 53, (scene.plan.blocks, RING_DEGREE))
    own = pack(scene.layout, scene.honest_values())
    return [scene.upload(anything + own), scene.upload(-anything)]


def _malleated(scene: Scene) -> list[Upload]:
    """Somebody's ciphertext plus a message: under its own seed, as nobody knows the other."""
    victim = widen(scene.honest[0].payload, scene.plan.blocks)
    seed = scene.rng.bytes(32)
    total = ResidueSum(scene.plan.blocks)
    total.add(victim)
    total.add(scene.encrypted(pack(scene.layout, scene.honest_values()), seed))
    return [scene.signed(narrow(total.value()), seed)]


def _resigned(scene: Scene) -> list[Upload]:
    """Somebody's bytes and seal under a receipt of the thief's own."""
    victim, thief = scene.honest[0], SigningKey.generate()
    sealed = victim.admission.sealed_seed
    name = victim.admission.receipt.upload_digest
    commitment = scene.challenger.commitment(thief.public)
    receipt = Receipt.sign(thief, scene.context.id, name, sealed, commitment)
    return [replace(victim, admission=Admission(receipt, sealed))]


def _resealed(scene: Scene) -> list[Upload]:
    """Somebody's bytes with a seal of the thief's own: the key does not fit."""
    return [scene.signed(bytes(scene.honest[0].payload), scene.rng.bytes(32))]


def _twins(scene: Scene) -> list[Upload]:
    """Two clients that share a seed."""
    seed = scene.rng.bytes(32)
    return [
        scene.signed(narrow(scene.encrypted(pack(scene.layout, each), seed)), seed)
        for each in (scene.honest_values(), scene.honest_values())
    ]


def _two_of_one(scene: Scene) -> list[Upload]:
    """One client's two uploads, each valid."""
    identity = SigningKey.generate()
    sent = []
    for _ in range(2):
        seed = scene.rng.bytes(32)
        payload = narrow(scene.encrypted(pack(scene.layout, scene.honest_values()), seed))
        sent.append(scene.signed(payload, seed, identity))
    return sent


def _valid(scene: Scene) -> tuple[bytes, bytes]:
    """Payload and seed of an honest update."""
    seed = scene.rng.bytes(32)
    return narrow(scene.encrypted(pack(scene.layout, scene.honest_values()), seed)), seed


def _bytes(name: str, layer: Layer, change: Callable[[Scene, bytes], bytes]) -> Case:
    """A case of one attacker that changes its ciphertext bytes, and signs what it sends."""

    def build(scene: Scene) -> list[Upload]:
        payload, seed = _valid(scene)
        return [scene.signed(change(scene, payload), seed)]

    return Case(name, layer, build)


def _commitment(name: str, change: Callable[[Scene], bytes]) -> Case:
    """A case of one attacker whose receipt commits to a challenge of its own choosing."""

    def build(scene: Scene) -> list[Upload]:
        payload, seed = _valid(scene)
        return [scene.signed(payload, seed, commitment=change(scene))]

    return Case(name, "upload", build)


def _zero_bytes(scene: Scene) -> list[Upload]:
    payload, seed = _valid(scene)
    return [scene.signed(bytes(len(payload)), seed)]


def _yesterdays(scene: Scene) -> list[Upload]:
    return Scene(scene.plan, int(scene.rng.integers(1 << 30))).honest[:1]


CASES: Final[tuple[Case, ...]] = (
    *_waves(),
    *_shifts(),
    _plaintext(
        "q / 2 everywhere",
        "norm",
        lambda scene: np.full((scene.plan.blocks, RING_DEGREE), MODULUS // 2 - 2 * CBD_BITS),
    ),
    _plaintext("squares that add up to q", "norm", _four_squares),
    _plaintext("a digit about to carry", "norm", _carry),
    _plaintext(
        "one coordinate beyond the sum's range",
        "norm",
        lambda scene: _one_coordinate(scene, scene.layout.sum_abs + 1),
    ),
    _weighed("a weight of 0 under half a bound", "norm", 0.5, 0.0),
    _weighed("a tenth of a weight under half a bound", "norm", 0.5, 0.1),
    _weighed("a weight of -0.1 under nothing", "norm", 0.0, -0.1),
    _weighed("a weight of -1 under nothing", "norm", 0.0, -1.0),
    _weighed("a weight of -1 under a whole bound", "norm", 1.0, -1.0),
    _weighed("two weights and more", "norm", 0.0, 2.1),
    Case(
        "half a step off the grid, once", "audit", lambda scene: _off_grid(scene, everywhere=False)
    ),
    Case("off the grid everywhere", "audit", lambda scene: _off_grid(scene, everywhere=True)),
    Case("all bytes zero", "norm", _zero_bytes, same=True),
    _bytes(
        "random residues",
        "norm",
        lambda scene, payload: narrow(
            scene.rng.integers(0, MODULUS, len(payload) // RESIDUE_BYTES, dtype=np.uint64)
        ),
    ),
    Case("somebody's ciphertext plus a message", "norm", _malleated),
    Case("somebody's ciphertext, sealed anew", "admission", _resealed),
    Case("somebody's ciphertext, signed anew", "admission", _resigned),
    Case("two that cancel in the sum", "norm", _cancelling),
    Case("the very upload of somebody else", "once", lambda scene: scene.honest[:1]),
    Case("two clients under one seed", "admission", _twins),
    Case("a second upload of one client", "admission", _two_of_one),
    _bytes("a residue of q", "upload", lambda _s, p: MODULUS.to_bytes(7, "little") + p[7:]),
    _bytes("residues of 2^56 - 1", "upload", lambda _s, p: b"\xff" * len(p)),
    _bytes("a byte short", "upload", lambda _s, p: p[:-1]),
    _bytes("a block too many", "upload", lambda _s, p: p + p[: RING_DEGREE * RESIDUE_BYTES]),
    _bytes("no bytes", "upload", lambda _s, _p: b""),
    _commitment("no challenge commitment", lambda _scene: NO_COMMITMENT),
    _commitment(
        "another client's commitment",
        lambda scene: scene.honest[0].admission.receipt.challenge_commitment,
    ),
    Case("yesterday's upload", "upload", _yesterdays),
    _plaintext(
        "the whole bound on one coordinate",
        "nothing",
        lambda scene: _one_coordinate(scene, scene.layout.norm),
    ),
    Case(
        "two whole bounds on one coordinate, one tolerated",
        "range",
        lambda scene: _colluders(scene, (1.0, 1.0)),
    ),
    Case(
        "two whole bounds on one coordinate, two tolerated",
        "nothing",
        lambda scene: _colluders(scene, (1.0, 1.0)),
        tolerated=2,
    ),
    _plaintext("one step where no value is", "nothing", _padding),
    _weighed("one and a half weights under nothing", "nothing", 0.0, 1.5),
)
"""Every malformed attack, with the layer that stops it."""
