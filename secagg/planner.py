"""From a wish (cohort, bits, parameters) to a plan whose sum is exact, or a refusal that says why.

The derivation, for n clients whose honest integers are at most V (see docs/cipher.md):

* R = n V bounds every digit of the sum, and B = 4R + 2 leaves a recognisable margin around it.
* The noise of a sum is strictly sub-Gaussian with variance 10.5 n per coefficient, so with
  c = sqrt(2 ln 2 (41 + log2 #coefficients)) no coefficient leaves G = c * 3.24 * sqrt(n) but with
  probability below 2**-40; nor can it ever leave 21 n.
* The grid 2**s > 2G separates values from noise.
* d digits fit when 2**s B**d <= q. The sum then stays within q/2 either way, because R < B/4 makes
  it smaller than 2**s B**d / 3.

With a norm check (docs/checks.md), for honest norms of at most T and f clients that break the plan:

* R = n V + f 1.5 T, and G grows by 28 f: what the checks let through cannot stop a round.
* B >= 9 (1 + margin) T: a sketch of an accepted update stays within a digit at 4.5 sigma.
* 2**s is large enough for a sketch's own noise to be lost in the norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from secagg.errors import PlanError
from secagg.parameters import (
    BLOCK_BYTES,
    MAX_COHORT,
    MAX_SEGMENTS,
    MAX_TENSORS,
    MAX_VALUES,
    MIN_COHORT,
    MODULUS,
    RING_DEGREE,
    SECURITY_BITS,
    FloatSegment,
    IntegerSegment,
    Layout,
    NormCheck,
    Plan,
    Segment,
    TensorSpec,
    Weighting,
    check_ring,
)
from secagg.sampling import CBD_BITS, ERROR_STD
from secagg.sketch_shape import (
    SKETCH_SIGMAS,
    SMALLEST_DIRECTION,
    honest_norm,
    quietest_shift,
    sketch_bytes,
)

__all__ = ["FAILURE_BITS", "Fact", "explain", "make_plan", "plan_integers", "plan_tensors"]

FAILURE_BITS = 40
"""An honest sum is refused for noise with probability below 2**-40."""


_AUDITED_NOISE = 28  # the largest that a noise audit may let pass

# What accepted updates may hold in one value: more than that, in one place, is refused. Spread over
# one root, up to twice the bound can get past, in values far below it (docs/checks.md).
_BEYOND = 1.5


def make_plan(
    segments: Sequence[Segment],
    *,
    max_clients: int,
    min_clients: int = MIN_COHORT,
    norm_check: NormCheck | None = None,
) -> Plan:
    """Derive the layout of every segment.

    Args:
        segments: 1 to 16 uniquely named segments.
        max_clients: largest cohort whose sum must be exact.
        min_clients: smallest cohort whose sum may be opened, at least 3.
        norm_check: what uploads are checked for before they are summed.

    Raises:
        PlanError: no exact plan exists; the message names the limit and what would work.
    """
    check_ring(RING_DEGREE, MODULUS)
    _check_cohort(min_clients, max_clients)
    _check_segments(segments)
    _check_weights(segments, min_clients, max_clients)
    if norm_check is not None:
        _check_checkable(segments, norm_check)
    guard = _guard(max_clients, sum(segment.values for segment in segments))
    if norm_check is not None:
        guard += _AUDITED_NOISE * norm_check.tolerated
    layouts = tuple(_layout(segment, max_clients, guard, norm_check) for segment in segments)
    return Plan(tuple(segments), layouts, min_clients, max_clients, norm_check)


def plan_tensors(
    tensors: Mapping[str, tuple[int, ...]] | int,
    *,
    max_clients: int,
    clip: float,
    bits: int = 8,
    min_clients: int = MIN_COHORT,
    weighting: Weighting = "equal",
    weight_cap: int = 1,
    norm_check: NormCheck | None = None,
) -> Plan:
    """A plan with one float segment called ``update``.

    Args:
        tensors: shapes by name, or a number for a single flat vector called ``vector``.
        max_clients, min_clients, norm_check: see :func:`make_plan`.
        clip, bits, weighting, weight_cap: see `FloatSegment`.

    Raises:
        PlanError: no exact plan exists.
    """
    shapes = {"vector": (tensors,)} if isinstance(tensors, int) else tensors
    specs = tuple(TensorSpec(name, tuple(shape)) for name, shape in shapes.items())
    segment = FloatSegment("update", specs, clip, bits, weighting, weight_cap)
    return make_plan(
        [segment], max_clients=max_clients, min_clients=min_clients, norm_check=norm_check
    )


def plan_integers(
    size: int,
    *,
    max_clients: int,
    max_abs: int,
    max_norm: float | None = None,
    min_clients: int = MIN_COHORT,
    norm_check: NormCheck | None = None,
) -> Plan:
    """A plan with one integer segment called ``counts``.

    Raises:
        PlanError: no exact plan exists.
    """
    segment = IntegerSegment("counts", size, max_abs, max_norm)
    return make_plan(
        [segment], max_clients=max_clients, min_clients=min_clients, norm_check=norm_check
    )


def _check_cohort(min_clients: int, max_clients: int) -> None:
    if not (isinstance(min_clients, int) and isinstance(max_clients, int)):
        raise PlanError(f"expected whole clients; got {min_clients=}, {max_clients=}")
    if min_clients < MIN_COHORT:
        raise PlanError(
            f"expected min_clients of {MIN_COHORT} or more, below which a sum protects nobody; "
            f"got {min_clients=}"
        )
    if not min_clients <= max_clients <= MAX_COHORT:
        raise PlanError(
            f"expected max_clients from min_clients={min_clients} to {MAX_COHORT}; "
            f"got {max_clients=}"
        )


def _check_segments(segments: Sequence[Segment]) -> None:
    names = [segment.name for segment in segments]
    if not 1 <= len(names) <= MAX_SEGMENTS or len(set(names)) != len(names):
        raise PlanError(f"expected 1 to {MAX_SEGMENTS} distinctly named segments; got {names=}")
    tensors = sum(len(s.tensors) for s in segments if isinstance(s, FloatSegment))
    if tensors > MAX_TENSORS:
        raise PlanError(f"expected at most {MAX_TENSORS} tensors in a plan; got {tensors=}")
    values = sum(segment.values for segment in segments)
    if values > MAX_VALUES:
        raise PlanError(
            f"expected at most {MAX_VALUES} values in one upload; got {values=}; split the "
            "vector into several tasks"
        )


def _check_weights(segments: Sequence[Segment], min_clients: int, max_clients: int) -> None:
    """Refuse a quantiser so coarse that even full weights would drown in its rounding."""
    for segment in segments:
        if not (isinstance(segment, FloatSegment) and segment.weighted):
            continue
        if segment.weight_slack(max_clients) > min_clients / 2:
            raise PlanError(
                f"segment {segment.name!r}: expected bits enough for the weights of "
                f"{max_clients} clients; got bits={segment.bits} for {segment.parameters} "
                "parameters; use more bits, or equal weights"
            )


def _guard(clients: int, values: int) -> int:
    """G: smallest safe bound on the summed noise, in units of the plaintext."""
    # Coefficients are at most as many as values, plus a block of padding a segment: values are an
    # upper bound once rounded up to whole blocks.
    coefficients = -(-values // RING_DEGREE) * RING_DEGREE + MAX_SEGMENTS * RING_DEGREE
    c = math.sqrt(2 * math.log(2) * (FAILURE_BITS + 1 + math.log2(coefficients)))
    return min(math.ceil(c * ERROR_STD * math.sqrt(clients)), CBD_BITS * clients)


def _check_checkable(segments: Sequence[Segment], check: NormCheck) -> None:
    """Refuse checks with nothing to look at, or that would show too much."""
    if not any(segment.norm_bound for segment in segments):
        raise PlanError(
            "expected a segment whose norm can be checked; integers need a max_norm for that; give "
            "one a max_norm, or leave the norm check out"
        )
    if check.min_cosine is None:
        return
    updates = [segment for segment in segments if isinstance(segment, FloatSegment)]
    if len(updates) != 1:
        raise PlanError(
            "expected one float segment, whose direction min_cosine is about; got "
            f"{len(updates)}; leave min_cosine out"
        )
    if updates[0].values < SMALLEST_DIRECTION:
        raise PlanError(
            f"expected a model of at least {SMALLEST_DIRECTION} packed values for min_cosine, "
            "because the coordinates that a sketch of a smaller one sums up could be guessed; got "
            f"{updates[0].values}; leave min_cosine out"
        )


def _layout(segment: Segment, clients: int, guard: int, check: NormCheck | None) -> Layout:
    norm = tolerance = least_base = 0
    shift = (2 * guard).bit_length()
    if check is not None and segment.norm_bound:
        norm = honest_norm(segment)
        tolerance = check.tolerated * math.ceil(_BEYOND * norm)
        least_base = math.ceil(SKETCH_SIGMAS * 2 * (1 + check.margin) * norm)
        shift = max(shift, quietest_shift(norm, segment.values))
    sum_abs = clients * segment.max_abs + tolerance
    base = max(4 * sum_abs + 2, least_base)
    digits = _most_digits(base, shift)
    if digits < 1:
        raise PlanError(_refusal(segment, clients, shift, base, check))
    return Layout(
        segment.values, segment.max_abs, sum_abs, base, digits, shift, guard, norm, tolerance
    )


def _most_digits(base: int, shift: int) -> int:
    digits = 0
    while base ** (digits + 1) << shift <= MODULUS:
        digits += 1
    return digits


def _refusal(segment: Segment, clients: int, shift: int, base: int, check: NormCheck | None) -> str:
    # Only integers can be too large: 16 bits of a million clients fit with room to spare.
    works = ((MODULUS >> shift) - 2) // 4 // clients
    hint = f"max_abs={works} would work"
    if check is not None and segment.norm_bound:
        hint = "plan a smaller max_abs or max_norm, fewer tolerated clients, or no norm check"
    return (
        f"segment {segment.name!r}: the sum of {clients} clients with values up to "
        f"{segment.max_abs} needs {base.bit_length()} bits above a grid of {shift}, but the "
        f"modulus has {MODULUS.bit_length()}; {hint}"
    )


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of a plan's explanation."""

    topic: str
    value: str
    reason: str


def explain(plan: Plan) -> list[Fact]:
    """The plan in words, line by line, for people; programs read the plan itself."""
    parameters = sum(_inputs(segment) for segment in plan.segments)
    first = plan.layouts[0]
    rows = [
        Fact(
            "cohort",
            f"{plan.min_clients} to {plan.max_clients} clients",
            "fewer are never opened; more could wrap",
        ),
        Fact("ring", f"Z_q[X]/(X^{RING_DEGREE} + 1)", "polynomials of 4096 integer coefficients"),
        Fact(
            "modulus",
            f"q = {MODULUS} ({MODULUS.bit_length()} bits)",
            "one prime: no key switching, 7 bytes a coefficient",
        ),
        Fact(
            "security",
            f"{SECURITY_BITS}-bit classical",
            "ternary secrets, in the model of the tables of eprint 2024/463",
        ),
        Fact(
            "noise",
            f"at most {first.guard} in a sum",
            f"errors CBD({CBD_BITS}), variance {CBD_BITS / 2}, summed over the largest cohort",
        ),
        Fact("grid", f"2^{first.shift} = {1 << first.shift}", "more than twice the noise"),
        Fact("failure", f"below 2^-{FAILURE_BITS}", "that noise alone makes an honest sum refuse"),
    ]
    for segment, layout in zip(plan.segments, plan.layouts, strict=True):
        rows += _explain_segment(segment, layout)
    if plan.norm_check is not None:
        rows.append(_explain_check(plan, plan.norm_check))
    rows += [
        Fact("ciphertexts", f"{plan.blocks} polynomials", "one each: the other half is public"),
        Fact(
            "upload",
            f"{plan.payload_bytes} bytes",
            f"{plan.payload_bytes / parameters:.3f} a parameter (float32: 4), "
            f"{plan.chunks} messages",
        ),
    ]
    return rows


def _explain_check(plan: Plan, check: NormCheck) -> Fact:
    direction = "" if check.min_cosine is None else f", cosine at least {check.min_cosine:g}"
    size = sketch_bytes(plan, direction=True)
    return Fact(
        "norm check",
        f"{check.sketches} sketches, margin {check.margin:.0%}{direction}",
        f"{size} bytes a client from server to key holder; {check.tolerated} client(s) that get "
        "past it cannot stop a round",
    )


def _explain_segment(segment: Segment, layout: Layout) -> list[Fact]:
    name = segment.name
    used = _used_bits(layout)
    rows = [
        Fact(
            f"{name}: range",
            f"±{layout.max_abs} a client, ±{layout.sum_abs} in the sum",
            "R = clients times V" + (", and what may get past the norm check" * bool(layout.norm)),
        ),
        Fact(
            f"{name}: digits",
            f"{layout.digits} in base {layout.base} a coefficient",
            "B >= 4R + 2: a digit out of range shows instead of carrying",
        ),
        Fact(
            f"{name}: headroom",
            f"{MODULUS.bit_length() - 1 - used:.2f} of {MODULUS.bit_length() - 1} bits unused",
            f"half of q, less {used:.2f} bits",
        ),
        Fact(
            f"{name}: blocks",
            f"{layout.blocks}",
            f"{BLOCK_BYTES} bytes each, for {segment.values} values",
        ),
    ]
    if layout.norm:
        rows.append(
            Fact(
                f"{name}: norm",
                f"at most {layout.norm} steps",
                "what an honest client cannot exceed; refused above it and the margin",
            )
        )
    if isinstance(segment, FloatSegment):
        rows.insert(
            0,
            Fact(
                f"{name}: quantiser",
                f"{segment.bits} bits, clip {segment.clip:g}",
                f"rotation in blocks of {segment.rotation_length}, step {segment.step:.3g}",
            ),
        )
    return rows


def _used_bits(layout: Layout) -> float:
    span = layout.sum_abs * (layout.base**layout.digits - 1) // (layout.base - 1)
    return math.log2((span << layout.shift) + (1 << (layout.shift - 1)))


def _inputs(segment: Segment) -> int:
    return segment.parameters if isinstance(segment, FloatSegment) else segment.size
