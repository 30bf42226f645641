"""What a round computes on: the ring, the segments of an upload, and the checked plan.

A `Plan` is what everybody agrees on before anything is encrypted; its digest is part of every
message. Users describe *segments* (what is summed, how precisely) and a cohort; `planner` derives
the rest (grid, digit base, digits) or refuses. Nothing here touches the cipher or any secret.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from functools import cached_property
from operator import index

from secagg.errors import PlanError
from secagg.transcript import digest

__all__ = [
    "BLOCK_BYTES",
    "CHUNK_BLOCKS",
    "CHUNK_BYTES",
    "MIN_COHORT",
    "MODULUS",
    "NOISE_TAIL",
    "RESIDUE_BYTES",
    "RING_DEGREE",
    "Compression",
    "FloatSegment",
    "IntegerSegment",
    "Layout",
    "LowRank",
    "NormCheck",
    "Plan",
    "Privacy",
    "RandomSubset",
    "RowThreshold",
    "Segment",
    "TensorSpec",
    "Weighting",
    "check_ring",
]

RING_DEGREE = 4096
"""N: the ring is Z_q[X] / (X**4096 + 1)."""

MODULUS = 72_057_594_021_150_721
"""q = 2**56 - 2**24 + 1: prime, and 1 modulo 2N, so that an NTT of length N exists."""

RESIDUE_BYTES = 7
"""Bytes of one residue modulo q on the wire."""

BLOCK_BYTES = RING_DEGREE * RESIDUE_BYTES
"""Bytes of one polynomial on the wire: 28 672."""

CHUNK_BLOCKS = 32
"""Polynomials in one upload message."""

CHUNK_BYTES = CHUNK_BLOCKS * BLOCK_BYTES
"""Bytes of one full upload message: 917 504, well under gRPC's default limit of 4 MiB."""

MIN_COHORT = 3
"""Hard floor of `Plan.min_clients`: a sum of two is no secret from either of them."""

MAX_COHORT = 1_000_000
MAX_SEGMENTS = 16
MAX_TENSORS = 4096  # in all segments, so that a plan fits into one message
MAX_VALUES = 1 << 28
_INTEGER_BITS = 64  # of any number of a plan on the wire
_LEAST_SHARE = 1e-6  # of a privacy cost: dividing by its root stays far from the limits of floats

# log2 q that still gives 256 bits of classical security against the known lattice attacks, with
# ternary secrets, per ring degree: Bossuat et al., "Security Guidelines for Implementing
# Homomorphic Encryption" (eprint 2024/463), its parameter tables. One row: one preset is enough.
SECURITY_BITS = 256
_LARGEST_MODULUS_BITS = {4096: 56}

_NAME = re.compile(r"[A-Za-z0-9_./-]{1,128}")
_ROTATION_LIMIT = RING_DEGREE

# Wide enough for any model, and narrow enough that a step and its inverse are ordinary float32.
_CLIP_RANGE = (1e-20, 1e20)

# Rotated coordinates are close to Gaussian; a range of 4 standard deviations saturates 6 in
# 100 000 of an update that uses its whole clip norm, and none of a smaller one.
RANGE_STDS = 4.0

CLIP_BIT_SCALE = 0.25
"""Length of a clip bit, as a fraction of the clip norm. It lengthens an update by 3 percent, and a
share of clients is read with a standard deviation of 2.06 noise multipliers by their number."""

NOISE_TAIL = 10
"""A sample of privacy noise stays below so many of its standard deviations (`discrete_gaussian`);
so does, up to the plan's failure probability, every one of 2**28 sums of samples."""

Weighting = str
"""``"equal"`` (every client counts once) or ``"samples"`` (by a bounded, encrypted weight)."""

_WEIGHTINGS = ("equal", "samples")

PrivacyMode = str
"""Who adds the noise: ``"release"`` (the key holder), ``"distributed"`` (clients, each a share), or
``"local"`` (clients, each all of it)."""

_MODES = ("release", "distributed", "local")


def check_ring(degree: int, modulus: int) -> None:
    """Refuse a ring below the security level that the documentation claims.

    Raises:
        PlanError: the degree has no row in the table, or the modulus has too many bits for it.
    """
    limit = _LARGEST_MODULUS_BITS.get(degree)
    if limit is None:
        raise PlanError(f"expected a ring degree in {sorted(_LARGEST_MODULUS_BITS)}; got {degree=}")
    if modulus.bit_length() > limit:
        raise PlanError(
            f"expected a modulus of at most {limit} bits at {degree=} for {SECURITY_BITS}-bit "
            f"classical security; got bits={modulus.bit_length()}; use a smaller prime"
        )


def _check_integers(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise PlanError(f"expected an integer; got {name}={value!r}")
        if value.bit_length() > _INTEGER_BITS:  # a file may hold one that fits into no float
            raise PlanError(f"expected {name} of at most {_INTEGER_BITS} bits; it is larger")


def _check_name(kind: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise PlanError(
            f"expected a {kind} name of 1 to 128 letters, digits, '_', '.', '/' or '-'; got {name=}"
        )


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name and shape of one tensor; a scalar has the empty shape."""

    name: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_name("tensor", self.name)
        try:
            # Other integers, such as numpy's, become Python's own, which never overflow.
            object.__setattr__(self, "shape", tuple(index(side) for side in self.shape))
        except TypeError:
            raise PlanError(
                f"expected whole sides; tensor {self.name!r} has {self.shape=}"
            ) from None
        if any(side < 1 for side in self.shape):
            raise PlanError(f"expected positive sides; tensor {self.name!r} has {self.shape=}")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class LowRank:
    """Send every table of d columns as one of ``rank`` columns: its product with a public random
    matrix, drawn anew in each round (CoLR: Nguyen et al. 2024, "Towards Efficient Communication and
    Secure Federated Recommendation System via Low-rank Training").

    Tensors of one side, and those of no more columns than the rank, are sent as they are. The last
    side counts the columns.
    """

    rank: int

    def __post_init__(self) -> None:
        _check_integers(rank=self.rank)
        if not 1 <= self.rank <= MAX_VALUES:
            raise PlanError(f"expected a rank of 1 to {MAX_VALUES}; got rank={self.rank}")

    def sent(self, tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        """What travels in place of these tensors."""
        return tuple(
            TensorSpec(each.name, (*each.shape[:-1], min(each.shape[-1], self.rank)))
            if len(each.shape) > 1
            else each
            for each in tensors
        )


@dataclass(frozen=True, slots=True)
class RandomSubset:
    """Send a public random part of the coordinates, drawn anew in each round: sparsification that
    needs no indices (Konečný et al. 2016, "Federated Learning: Strategies for Improving
    Communication Efficiency", random masks).
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction < 1.0:
            raise PlanError(
                f"expected a fraction between 0 and 1; got fraction={self.fraction}; leave "
                "compression out to send every coordinate"
            )

    def sent(self, tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        """What travels in place of these tensors: one vector."""
        size = sum(tensor.size for tensor in tensors)
        return (TensorSpec("subset", (math.ceil(self.fraction * size),)),)


Compression = LowRank | RandomSubset
"""How an update travels in fewer floats: by a public linear map, so that sums stay sums."""


@dataclass(frozen=True)
class FloatSegment:
    """A model update: named float32 tensors, clipped, weighted, rotated and rounded together.

    Tensors are flattened in the order of this tuple, which is sorted by name (the one canonical
    flattening), so that many small layers cost no more than one large one.

    Attributes:
        name: the segment's name, unique in its plan.
        tensors: what is summed; sorted by name on construction.
        clip: L2 norm, in model units, to which a larger update is scaled down.
        bits: of one quantised coordinate, 2 to 16; it lies in [-(2**(bits-1)-1), 2**(bits-1)-1].
        weighting: ``"equal"``, or ``"samples"`` for the weight min(samples, cap) / cap in (0, 1],
            which is encrypted with the update and never sent in clear.
        weight_cap: samples beyond which a client gains no more weight; 1 when equal.
        rows: rows of an item table that must stay apart, so that single ones can be withheld
            (`RowThreshold`); the first side of every tensor. Each row is then rotated by itself,
            and as a row may hold a whole update, quantised more coarsely: plan 12 bits or more.
            0 rotates everything together.
        clip_bit: send along, in the update's own coordinates, whether it was within the clip norm,
            which the aggregate tells the share of (Andrew et al. 2021, "Differentially Private
            Learning with Adaptive Clipping").
        compression: how the update travels in fewer floats, before it is clipped; None for all.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    clip: float
    bits: int = 8
    weighting: Weighting = "equal"
    weight_cap: int = 1
    rows: int = 0
    clip_bit: bool = False
    compression: Compression | None = None

    def __post_init__(self) -> None:
        _check_name("segment", self.name)
        object.__setattr__(self, "tensors", tuple(sorted(self.tensors, key=lambda t: t.name)))
        names = [tensor.name for tensor in self.tensors]
        if not names or len(set(names)) != len(names):
            raise PlanError(f"expected one or more distinctly named tensors; got {names=}")
        _check_integers(bits=self.bits, weight_cap=self.weight_cap, rows=self.rows)
        if not _CLIP_RANGE[0] <= self.clip <= _CLIP_RANGE[1]:
            raise PlanError(
                f"expected a clip norm from {_CLIP_RANGE[0]} to {_CLIP_RANGE[1]}; got "
                f"clip={self.clip}; rescale the model"
            )
        if not 2 <= self.bits <= 16:
            raise PlanError(f"expected 2 to 16 bits per value; got bits={self.bits}")
        if self.weighting not in _WEIGHTINGS:
            raise PlanError(f"expected weighting in {_WEIGHTINGS}; got {self.weighting!r}")
        if not 1 <= self.weight_cap < 2**53 or (self.weighting == "equal" and self.weight_cap != 1):
            raise PlanError(
                "expected weight_cap of 1 or more samples, and exactly 1 with equal weights; got "
                f"weight_cap={self.weight_cap}, weighting={self.weighting!r}"
            )

        self._check_companions()

    def _check_companions(self) -> None:
        if self.weighted and (self.clip_bit or self.rows):
            raise PlanError(
                f"segment {self.name!r}: expected equal weights with a clip bit or with rows that "
                'stay apart; got weighting="samples"; use equal weights'
            )
        if self.rows and not all(t.shape and t.shape[0] == self.rows for t in self.tensors):
            raise PlanError(
                f"segment {self.name!r}: expected tensors with a first side of rows={self.rows}; "
                f"got shapes {[list(tensor.shape) for tensor in self.tensors][:5]}; leave rows "
                "out, or sum the others in a segment of their own"
            )
        if self.rows and isinstance(self.compression, RandomSubset):
            raise PlanError(
                f"segment {self.name!r}: expected rows that stay whole; a random subset of "
                "coordinates tears them; compress by a low rank, or leave one of the two out"
            )

    @property
    def parameters(self) -> int:
        """Number of model parameters."""
        return sum(tensor.size for tensor in self.tensors)

    @cached_property
    def sent(self) -> tuple[TensorSpec, ...]:
        """What travels: the tensors, or what they are compressed to."""
        return self.tensors if self.compression is None else self.compression.sent(self.tensors)

    @cached_property
    def carried(self) -> int:
        """Number of floats that travel."""
        return sum(tensor.size for tensor in self.sent)

    @property
    def weighted(self) -> bool:
        """Whether an encrypted weight travels with the update."""
        return self.weighting == "samples"

    @property
    def companion(self) -> float:
        """Length of what travels along with the update, a weight or a clip bit, by the clip norm.

        0 where nothing does.
        """
        return 1.0 if self.weighted else CLIP_BIT_SCALE * self.clip_bit

    @cached_property
    def rotation_length(self) -> int:
        """L: length of the longest rotation block, a power of two of at most 4096."""
        if self.rows:
            return 1 << ((self.carried // self.rows).bit_length() - 1)
        wanted = self.carried + bool(self.companion)
        return min(_ROTATION_LIMIT, 1 << (wanted - 1).bit_length())

    @cached_property
    def rotations(self) -> tuple[tuple[int, int], ...]:
        """How many rotation blocks of which length follow one another: (count, length) each.

        Together, they are J blocks of length L, whose last place is the companion's, if there is
        one. By rows, the powers of two that make up a row's width, and the companion by itself.
        """
        if self.rows:
            width = self.carried // self.rows
            powers = [1 << bit for bit in reversed(range(width.bit_length())) if width >> bit & 1]
            runs = [(self.rows, power) for power in powers]
            return (*runs, (1, 1)) if self.companion else tuple(runs)
        payload = self.rotation_length - bool(self.companion)
        return ((-(-self.carried // payload), self.rotation_length),)

    @property
    def values(self) -> int:
        """Integers that are packed and encrypted."""
        return sum(count * length for count, length in self.rotations)

    @property
    def max_abs(self) -> int:
        """V: largest magnitude of one honest integer."""
        return (1 << (self.bits - 1)) - 1

    @property
    def norm_bound(self) -> float:
        """L2 norm, in model units, of an honest update with its companion."""
        return self.clip * math.sqrt(1.0 + self.companion**2)

    @property
    def step(self) -> float:
        """Size of one quantisation step in model units.

        The range is that of a Gaussian of the bound's energy, but never wider than the bound: no
        coordinate of a short vector, or of one row, can exceed the vector's norm.
        """
        spread = 1.0 if self.rows else min(1.0, RANGE_STDS / math.sqrt(self.values))
        return spread * self.norm_bound / self.max_abs

    def weight_slack(self, clients: int) -> float:
        """How far rounding can move the summed weight of so many clients, at eight sigma.

        A rounding error has a standard deviation of at most half a step, and they are independent.
        """
        return 8 * 0.5 * self.step * math.sqrt(clients) / self.clip


@dataclass(frozen=True)
class IntegerSegment:
    """Raw integers that are summed exactly: counts, histograms, Gram matrices, a clip bit.

    Attributes:
        name: the segment's name, unique in its plan.
        size: how many integers.
        max_abs: V, the largest magnitude one client may contribute to one entry.
        max_norm: L2 norm of one client's integers, from 1 to V * sqrt(size), to which a norm check
            holds the segment; a vote for one of many items, say, has a norm of 1. Omitted, the
            segment is not checked: a sketch of few integers would tell the key holder how large
            they are.
    """

    name: str
    size: int
    max_abs: int
    max_norm: float | None = None

    def __post_init__(self) -> None:
        _check_name("segment", self.name)
        _check_integers(size=self.size, max_abs=self.max_abs)
        if self.size < 1 or self.max_abs < 1:
            raise PlanError(
                f"expected size and max_abs of 1 or more; segment {self.name!r} has "
                f"size={self.size}, max_abs={self.max_abs}"
            )
        if self.max_norm is not None and not 1 <= self.max_norm <= self._largest_norm:
            raise PlanError(
                f"expected max_norm from 1 to max_abs * sqrt(size) = {self._largest_norm:g}; "
                f"segment {self.name!r} has max_norm={self.max_norm}"
            )

    @property
    def _largest_norm(self) -> float:
        return self.max_abs * math.sqrt(self.size)

    @property
    def norm_bound(self) -> float:
        """L2 norm of an honest client's integers; 0 where it is not checked."""
        return self.max_norm or 0.0

    @property
    def values(self) -> int:
        """Integers that are packed and encrypted."""
        return self.size


Segment = FloatSegment | IntegerSegment


@dataclass(frozen=True, slots=True)
class Layout:
    """How the integers of one segment lie in polynomial coefficients; made by the planner.

    A coefficient is ``2**shift * sum(base**d * v_d)``: ``digits`` integers in balanced base
    ``base``, on the grid of multiples of ``2**shift``. Digit d of block j, coefficient k, is value
    ``(j * digits + d) * 4096 + k``; slots past ``values`` are zero.

    Attributes:
        values: integers in the segment.
        max_abs: V, magnitude of one client's integer.
        sum_abs: R = max_clients * V + tolerance, magnitude of a summed integer; and its noise.
        base: B >= 4R + 2, so that a digit beyond R is recognised instead of carried.
        digits: integers in one coefficient.
        shift: s, log2 of the grid.
        guard: G, the largest noise of a sum, up to the plan's failure probability; 2**s > 2G.
        norm: T, the L2 norm that one honest client's integers do not exceed, with their noise if
            they share ciphertexts; 0 where it is not checked.
        tolerance: what clients that the norm check lets through may add to a summed integer beyond
            an honest client's share; 0 without a check.
        noise: standard deviation of the noise that each client adds to each integer, in this
            layout or in one apart; 0 for none.
    """

    values: int
    max_abs: int
    sum_abs: int
    base: int
    digits: int
    shift: int
    guard: int
    norm: int = 0
    tolerance: int = 0
    noise: int = 0

    @property
    def blocks(self) -> int:
        """Number of polynomials."""
        return -(-self.values // (self.digits * RING_DEGREE))

    def summed_noise(self, clients: int) -> int:
        """Largest magnitude of so many clients' summed noise, up to the failure probability."""
        return NOISE_TAIL * math.ceil(self.noise * math.sqrt(clients))


@dataclass(frozen=True, slots=True)
class NormCheck:
    """How uploads are checked before they are summed: see `sketches` and docs/checks.md.

    Attributes:
        margin: how far above its bound the estimated norm of an honest update may come out, as a
            fraction of the bound; estimates have a standard deviation of 3 to 5 percent.
        sketches: independent looks at an update. Each halves what an update made to be overlooked
            can hope for, and costs 20 to 24 KiB between server and key holder.
        tolerated: f, accepted clients that break the plan, and still cannot stop a round.
        min_cosine: also refuse updates whose cosine to the last round's aggregate is below this;
            None for no direction check. The key holder then sees each update's cosine.
    """

    margin: float = 0.2
    sketches: int = 16
    tolerated: int = 1
    min_cosine: float | None = None

    def __post_init__(self) -> None:
        _check_integers(sketches=self.sketches, tolerated=self.tolerated)
        if not 0.15 <= self.margin <= 1.0:
            raise PlanError(
                "expected a margin from 0.15, below which honest updates are refused, to 1.0; got "
                f"margin={self.margin}"
            )
        if not 8 <= self.sketches <= 64:
            raise PlanError(f"expected 8 to 64 sketches; got sketches={self.sketches}")
        if not 0 <= self.tolerated <= MAX_COHORT:
            raise PlanError(f"expected tolerated from 0 to {MAX_COHORT}; got {self.tolerated}")
        if self.min_cosine is not None and not -1.0 <= self.min_cosine <= 0.5:
            raise PlanError(f"expected min_cosine from -1 to 0.5; got {self.min_cosine}")


@dataclass(frozen=True, slots=True)
class Privacy:
    """Differential privacy of a task for each client: docs/privacy.md.

    Two neighbouring runs differ in one client's contributions being replaced by zeros.

    Attributes:
        mode: who adds the noise; see `PrivacyMode`.
        noise_multiplier: z: one release satisfies 1/(2 z**2)-zCDP over all of its segments.
        epsilon, delta: what all releases of the task may cost; none is made beyond.
        honest_clients: in mode ``"distributed"``, how many clients' noise makes up the full noise:
            at most the plan's min_clients, and as many of its clients as are trusted to add it. 0
            leaves it to `make_plan`. In mode ``"local"`` it is 1, in mode ``"release"`` 0.
        integer_share: part of a release's cost that goes to segments of integers, if there is one
            of floats too; 1e-6 or more, below 1.
    """

    mode: PrivacyMode
    noise_multiplier: float
    epsilon: float
    delta: float
    honest_clients: int = 0
    integer_share: float = 0.1

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise PlanError(f"expected a privacy mode in {_MODES}; got mode={self.mode!r}")
        if not 0.01 <= self.noise_multiplier <= 1e6:
            raise PlanError(
                "expected a noise_multiplier from 0.01 to 1e6, about 1 for a strong guarantee; got "
                f"noise_multiplier={self.noise_multiplier}; leave privacy out for no noise at all"
            )
        if not 0.0 < self.epsilon <= 1e6:
            raise PlanError(f"expected epsilon above 0, up to 1e6; got epsilon={self.epsilon}")
        if not 1e-30 <= self.delta <= 0.1:
            raise PlanError(
                "expected delta from 1e-30 to 0.1, well below one by the number of clients; got "
                f"delta={self.delta}"
            )
        if not _LEAST_SHARE <= self.integer_share < 1.0:
            raise PlanError(
                f"expected integer_share between 0 and 1, {_LEAST_SHARE:g} at the least; got "
                f"integer_share={self.integer_share}"
            )
        _check_integers(honest_clients=self.honest_clients)
        allowed = {"release": 0, "distributed": MAX_COHORT, "local": 1}[self.mode]
        if not 0 <= self.honest_clients <= allowed:
            raise PlanError(
                f"expected honest_clients from 0 to {allowed} in mode {self.mode!r}; got "
                f"honest_clients={self.honest_clients}"
            )

    @property
    def by_clients(self) -> bool:
        """Whether clients add the noise."""
        return self.mode != "release"

    @property
    def apart(self) -> bool:
        """Whether noise has ciphertexts of its own, so that the update's norm is checked alone.

        In mode ``"local"`` it has not: then nobody can open an update without its noise, not even
        server and key holder together.
        """
        return self.mode == "distributed"


@dataclass(frozen=True, slots=True)
class RowThreshold:
    """Withhold rows of an item table to which too few clients have contributed something positive.

    The sum of a row that one client alone has touched is that client's row. The key holder zeroes
    such rows before anything leaves it, and never tells the counts.

    Attributes:
        counts: name of the segment of integers, one a row and at most 1, in which a client counts
            the rows that it has something positive of.
        least: k: contributors a row must have; 2 or more.
    """

    counts: str
    least: int

    def __post_init__(self) -> None:
        _check_name("segment", self.counts)
        _check_integers(least=self.least)
        if not 2 <= self.least <= MAX_COHORT:
            raise PlanError(
                f"expected least from 2 contributors to {MAX_COHORT}; got least={self.least}; "
                "leave the threshold out to release every row"
            )


@dataclass(frozen=True)
class Plan:
    """Everything that client, server and key holder must agree on before a round.

    Made by :func:`secagg.planner.make_plan`; the layouts are always derived, never received.

    Attributes:
        segments: what an upload consists of, in order.
        layouts: one for each segment.
        min_clients: fewest distinct clients whose sum may be opened; 3 or more.
        max_clients: most clients whose sum is guaranteed exact.
        norm_check: what an upload must pass before it may be summed; None for nothing.
        privacy: how releases are noised, and what they may cost; None for exact sums.
        threshold: which rows are withheld; None for none.
        noise_stds: standard deviation, in quantisation steps, of the privacy noise that is drawn
            for each integer of each segment: for the sum, or for one client; none without.
        noise_layouts: where noise has ciphertexts of its own, one for each segment, laid out like
            the segment it is added to; they follow those of all segments in the upload.
    """

    segments: tuple[Segment, ...]
    layouts: tuple[Layout, ...] = field(repr=False)
    min_clients: int
    max_clients: int
    norm_check: NormCheck | None = None
    privacy: Privacy | None = None
    threshold: RowThreshold | None = None
    noise_stds: tuple[int, ...] = field(repr=False, default=())
    noise_layouts: tuple[Layout, ...] = field(repr=False, default=())

    @property
    def upload_layouts(self) -> tuple[Layout, ...]:
        """Of each run of blocks in an upload: the segments', then their noises'."""
        return self.layouts + self.noise_layouts

    @property
    def upload_abs(self) -> tuple[int, ...]:
        """Largest magnitude of one client's integers in each of these."""
        within = self.privacy is not None and self.privacy.by_clients and not self.noise_layouts
        return tuple(
            layout.max_abs + within * NOISE_TAIL * layout.noise for layout in self.upload_layouts
        )

    @property
    def blocks(self) -> int:
        """Polynomials in one upload, over all segments and their noise."""
        return sum(layout.blocks for layout in self.upload_layouts)

    @property
    def sum_blocks(self) -> int:
        """Polynomials in a sum, once each segment and its noise have been added up."""
        return sum(layout.blocks for layout in self.layouts)

    @property
    def released_abs(self) -> tuple[int, ...]:
        """Magnitude that nothing released of a segment exceeds, the key holder's noise included."""
        by_clients = self.privacy is None or self.privacy.by_clients
        stds = [0] * len(self.layouts) if by_clients else self.noise_stds
        return tuple(
            layout.sum_abs + NOISE_TAIL * std
            for layout, std in zip(self.layouts, stds, strict=True)
        )

    @property
    def payload_bytes(self) -> int:
        """Exact ciphertext bytes of one upload."""
        return self.blocks * BLOCK_BYTES

    @property
    def chunks(self) -> int:
        """Upload messages that carry the payload."""
        return -(-self.blocks // CHUNK_BLOCKS)

    def chunk_blocks(self, chunk: int) -> int:
        """Polynomials in chunk ``chunk``; only the last one may be shorter."""
        if not 0 <= chunk < self.chunks:
            raise PlanError(f"expected a chunk index below {self.chunks}; got {chunk=}")
        return min(CHUNK_BLOCKS, self.blocks - chunk * CHUNK_BLOCKS)

    def upload_ranges(self) -> Iterable[tuple[Layout, slice]]:
        """Each run of blocks in an upload: its layout and its place."""
        start = 0
        for layout in self.upload_layouts:
            yield layout, slice(start, start + layout.blocks)
            start += layout.blocks

    def block_ranges(self) -> Iterable[tuple[Segment, Layout, slice]]:
        """Each segment with its layout and its blocks' place, in an upload and in a sum."""
        for segment, (layout, blocks) in zip(self.segments, self.upload_ranges(), strict=False):
            yield segment, layout, blocks

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over ring, cohort, segments and derived layouts; 32 bytes."""
        return digest("plan", json.dumps(self._canonical(), sort_keys=True, separators=(",", ":")))

    def _canonical(self) -> dict[str, object]:
        return {
            "degree": RING_DEGREE,
            "modulus": str(MODULUS),
            "min_clients": self.min_clients,
            "max_clients": self.max_clients,
            "segments": [_canonical_segment(segment) for segment in self.segments],
            "layouts": [list(astuple(layout)) for layout in self.layouts],
            "norm_check": _canonical_check(self.norm_check),
            "privacy": _canonical_privacy(self.privacy),
            "threshold": None if self.threshold is None else list(astuple(self.threshold)),
            "noise_stds": list(self.noise_stds),
            "noise_layouts": [list(astuple(layout)) for layout in self.noise_layouts],
        }


def _canonical_check(check: NormCheck | None) -> list[object] | None:
    if check is None:
        return None
    cosine = None if check.min_cosine is None else float(check.min_cosine).hex()
    return [float(check.margin).hex(), check.sketches, check.tolerated, cosine]


def _canonical_privacy(privacy: Privacy | None) -> list[object] | None:
    if privacy is None:
        return None
    return [
        privacy.mode,
        *(
            float(number).hex()
            for number in (
                privacy.noise_multiplier,
                privacy.epsilon,
                privacy.delta,
                privacy.integer_share,
            )
        ),
        privacy.honest_clients,
    ]


def _canonical_segment(segment: Segment) -> dict[str, object]:
    if isinstance(segment, IntegerSegment):
        return {
            "name": segment.name,
            "size": segment.size,
            "max_abs": str(segment.max_abs),
            "max_norm": float(segment.norm_bound).hex(),
        }
    floats = {
        "name": segment.name,
        "tensors": [[tensor.name, list(tensor.shape)] for tensor in segment.tensors],
        # Hexadecimal: exact, and the same on every platform.
        "clip": float(segment.clip).hex(),
        "bits": segment.bits,
        "weighting": segment.weighting,
        "weight_cap": segment.weight_cap,
        "rows": segment.rows,
        "clip_bit": segment.clip_bit,
    }
    # Named only where there is one: plans from before there was any keep their digest.
    return floats | _canonical_compression(segment.compression)


def _canonical_compression(compression: Compression | None) -> dict[str, object]:
    if compression is None:
        return {}
    if isinstance(compression, LowRank):
        return {"low_rank": compression.rank}
    return {"random_subset": float(compression.fraction).hex()}
