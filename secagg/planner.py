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

With noise by the clients (docs/privacy.md), of standard deviation t and norms of at most T':

* R grows by 10 t sqrt(n) for the noise of a sum, and by f 1.5 T'. B >= 9 (1 + margin) T' as well.
* Noise that has ciphertexts of its own makes a sum one of 2n, and G that of 2n. Where it has not,
  T is the norm of both together.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from secagg.discrete_gaussian import LARGEST_STD
from secagg.errors import PlanError
from secagg.parameters import (
    BLOCK_BYTES,
    MAX_COHORT,
    MAX_SEGMENTS,
    MAX_TENSORS,
    MAX_VALUES,
    MIN_COHORT,
    MODULUS,
    NOISE_TAIL,
    RING_DEGREE,
    SECURITY_BITS,
    Compression,
    FloatSegment,
    IntegerSegment,
    Layout,
    LowRank,
    NormCheck,
    Plan,
    Privacy,
    RowThreshold,
    Segment,
    TensorSpec,
    Weighting,
    check_ring,
)
from secagg.privacy import multipliers, noise_norm, noisy_norm, release_rho, share_std
from secagg.sampling import CBD_BITS, ERROR_STD
from secagg.sketch_shape import (
    SKETCH_SIGMAS,
    SMALLEST_DIRECTION,
    honest_norm,
    quietest_shift,
    sketch_bytes,
)

__all__ = [
    "FAILURE_BITS",
    "Fact",
    "explain",
    "make_plan",
    "mean_noise",
    "noise_headroom",
    "plan_integers",
    "plan_tensors",
]

FAILURE_BITS = 40
"""An honest sum is refused for noise with probability below 2**-40."""


_AUDITED_NOISE = 28  # the largest that a noise audit may let pass

PRIVATE_MARGIN = 0.3
"""Least margin of a norm check beside privacy: an honest update at its bound, estimated from 256
values or more, is refused with probability 3e-11."""

# What accepted updates may hold in one value: more than that, in one place, is refused. Spread over
# one root, up to twice the bound can get past, in values far below it (docs/checks.md).
_BEYOND = 1.5


def make_plan(
    segments: Sequence[Segment],
    *,
    max_clients: int,
    min_clients: int = MIN_COHORT,
    norm_check: NormCheck | None = None,
    privacy: Privacy | None = None,
    threshold: RowThreshold | None = None,
) -> Plan:
    """Derive the layout of every segment.

    Args:
        segments: 1 to 16 uniquely named segments.
        max_clients: largest cohort whose sum must be exact.
        min_clients: smallest cohort whose sum may be opened, at least 3.
        norm_check: what uploads are checked for before they are summed.
        privacy: the noise of releases, and their budget.
        threshold: rows to withhold.

    Raises:
        PlanError: no exact plan exists; the message names the limit and what would work.
    """
    check_ring(RING_DEGREE, MODULUS)
    _check_cohort(min_clients, max_clients)
    _check_segments(segments)
    _check_weights(segments, min_clients, max_clients)
    if norm_check is not None:
        _check_checkable(segments, norm_check)
    if privacy is not None:
        privacy = _resolved(privacy, segments, min_clients, norm_check)
    if threshold is not None:
        _check_threshold(segments, threshold)
    doubled = privacy is not None and privacy.apart
    guard = _guard_of(segments, max_clients, norm_check, privacy)
    stds = _noise_stds(segments, privacy)
    shares = stds if privacy and privacy.by_clients else [0] * len(segments)
    layouts = tuple(
        _layout(segment, max_clients, guard, norm_check, share, privacy)
        for segment, share in zip(segments, shares, strict=True)
    )
    return Plan(
        tuple(segments),
        layouts,
        min_clients,
        max_clients,
        norm_check,
        privacy,
        threshold,
        tuple(stds) if privacy else (),
        tuple(map(_noise_layout, layouts)) if doubled else (),
    )


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
    privacy: Privacy | None = None,
) -> Plan:
    """A plan with one float segment called ``update``.

    Args:
        tensors: shapes by name, or a number for a single flat vector called ``vector``.
        max_clients, min_clients, norm_check, privacy: see :func:`make_plan`.
        clip, bits, weighting, weight_cap: see `FloatSegment`.

    Raises:
        PlanError: no exact plan exists.
    """
    shapes = {"vector": (tensors,)} if isinstance(tensors, int) else tensors
    specs = tuple(TensorSpec(name, tuple(shape)) for name, shape in shapes.items())
    segment = FloatSegment("update", specs, clip, bits, weighting, weight_cap)
    return make_plan(
        [segment],
        max_clients=max_clients,
        min_clients=min_clients,
        norm_check=norm_check,
        privacy=privacy,
    )


def plan_integers(
    size: int,
    *,
    max_clients: int,
    max_abs: int,
    max_norm: float | None = None,
    min_clients: int = MIN_COHORT,
    norm_check: NormCheck | None = None,
    privacy: Privacy | None = None,
) -> Plan:
    """A plan with one integer segment called ``counts``.

    Raises:
        PlanError: no exact plan exists.
    """
    segment = IntegerSegment("counts", size, max_abs, max_norm)
    return make_plan(
        [segment],
        max_clients=max_clients,
        min_clients=min_clients,
        norm_check=norm_check,
        privacy=privacy,
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
    parameters = sum(_inputs(segment) for segment in segments)
    if parameters > MAX_VALUES:
        raise PlanError(
            f"expected at most {MAX_VALUES} parameters, however few of them travel; got "
            f"{parameters}; split the model into several tasks"
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


def noise_headroom(plan: Plan, clients: int) -> float:
    """Bits between what a plan guards against and the least that so many clients would need.

    By their number alone, 0 for the largest cohort: the noise that a sum has would tell of its key.
    """
    least = _guard_of(plan.segments, clients, plan.norm_check, plan.privacy)
    return math.log2(plan.layouts[0].guard / least)


def _guard_of(
    segments: Sequence[Segment], clients: int, check: NormCheck | None, privacy: Privacy | None
) -> int:
    """G of a sum over so many clients, with what the checks may let through."""
    doubled = privacy is not None and privacy.apart
    guard = _guard(clients << doubled, sum(segment.values for segment in segments) << doubled)
    return guard if check is None else guard + (_AUDITED_NOISE * check.tolerated << doubled)


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
    if updates[0].rows:
        raise PlanError(
            "expected an update that is rotated as a whole for min_cosine, because single rows "
            "would show which ones are not empty; got rows that stay apart; leave one of them out"
        )
    if updates[0].values < SMALLEST_DIRECTION:
        raise PlanError(
            f"expected a model of at least {SMALLEST_DIRECTION} packed values for min_cosine, "
            "because the coordinates that a sketch of a smaller one sums up could be guessed; got "
            f"{updates[0].values}; leave min_cosine out"
        )


def _resolved(
    privacy: Privacy, segments: Sequence[Segment], min_clients: int, check: NormCheck | None
) -> Privacy:
    """With the clients whose noise counts filled in; refuses what no noise makes private."""
    if any(isinstance(segment, FloatSegment) and segment.weighted for segment in segments):
        raise PlanError(
            'expected weighting="equal" with privacy: the number of samples is data as well, and a '
            "sum of weights under noise is nothing to divide by; use equal weights"
        )
    if check is not None and check.min_cosine is not None:
        raise PlanError(
            "expected no min_cosine with privacy: a refusal for its direction tells something of "
            "an update that no noise covers; leave min_cosine out"
        )
    # In mode "local" a verdict is on what is private already.
    if check is not None and check.margin < PRIVATE_MARGIN and privacy.mode != "local":
        raise PlanError(
            f"expected a margin of at least {PRIVATE_MARGIN} with privacy, so that an honest "
            "update is refused once in 10**10 times: how many contribute is public, and a refusal "
            f"changes it; got margin={check.margin}; margin={PRIVATE_MARGIN} would work"
        )
    if privacy.mode == "release":
        return privacy
    if privacy.mode == "local":
        return replace(privacy, honest_clients=1)
    tolerated = check.tolerated if check else 0
    honest = privacy.honest_clients or max(min_clients - tolerated, 1)
    if honest > min_clients:
        raise PlanError(
            f"expected noise that the smallest cohort of min_clients={min_clients} carries by "
            f"itself; got honest_clients={honest}; min_clients={honest} would work, or "
            f"honest_clients={min_clients}, with more noise from each"
        )
    return replace(privacy, honest_clients=honest)


def _check_threshold(segments: Sequence[Segment], threshold: RowThreshold) -> None:
    """Refuse a threshold without rows, or without counts of them."""
    tables = [s for s in segments if isinstance(s, FloatSegment) and s.rows]
    if len(tables) != 1:
        raise PlanError(
            "expected one segment with rows that stay apart, for a threshold to be about; got "
            f"{len(tables)}; set rows, or leave the threshold out"
        )
    rows = tables[0].rows
    counts = [s for s in segments if s.name == threshold.counts]
    if not (
        counts
        and isinstance(counts[0], IntegerSegment)
        and (counts[0].size, counts[0].max_abs) == (rows, 1)
    ):
        raise PlanError(
            f"expected a segment {threshold.counts!r} of size={rows} integers with max_abs=1 that "
            "counts contributors, one for each row; there is none; add it"
        )


def _noise_stds(segments: Sequence[Segment], privacy: Privacy | None) -> list[int]:
    """What is drawn at a time for each segment; refuses more than can be drawn."""
    if privacy is None:
        return [0] * len(segments)
    shares = multipliers(privacy, segments)
    stds = [share_std(privacy, each, z) for each, z in zip(segments, shares, strict=True)]
    if max(stds) > LARGEST_STD:
        works = privacy.noise_multiplier * LARGEST_STD / (max(stds) + 1)
        raise PlanError(
            f"expected noise of a standard deviation up to {LARGEST_STD} steps; got "
            f"noise_multiplier={privacy.noise_multiplier:g}, which needs {max(stds)}; "
            f"noise_multiplier={_rounded_down(works)} would work, or fewer bits"
        )
    return stds


def _layout(
    segment: Segment,
    clients: int,
    guard: int,
    check: NormCheck | None,
    noise: int,
    privacy: Privacy | None,
) -> Layout:
    """The layout of a segment to which each client adds noise of this standard deviation."""

    def tightest(std: int) -> Layout:
        apart = privacy is not None and privacy.apart
        return _tightest(segment, clients, guard, check, std, apart=apart)

    layout = tightest(noise)
    if layout.digits:
        return layout
    needed = (
        f"segment {segment.name!r}: the sum of {clients} clients with values up to "
        f"{segment.max_abs} needs {layout.base.bit_length()} bits above a grid of {layout.shift}, "
        f"but the modulus has {MODULUS.bit_length()}; "
    )
    if privacy is not None and tightest(0).digits:
        too_much = bisect.bisect_left(range(noise), 1, key=lambda std: not tightest(std).digits)
        works = _rounded_down(privacy.noise_multiplier * (too_much - 1) / noise)
        raise PlanError(
            f"{needed}noise_multiplier={works} would work, or more honest_clients, or fewer bits"
        )
    # Only integers can be too large: 16 bits of a million clients fit with room to spare.
    largest = ((MODULUS >> layout.shift) - 2) // 4 // clients
    hint = f"max_abs={largest} would work"
    if check is not None and segment.norm_bound:
        hint = "plan a smaller max_abs or max_norm, fewer tolerated clients, or no norm check"
    raise PlanError(needed + hint)


def _tightest(
    segment: Segment,
    clients: int,
    guard: int,
    check: NormCheck | None,
    noise: int,
    *,
    apart: bool,
) -> Layout:
    """As many digits as fit; perhaps none."""
    norm = tolerance = least_base = 0
    shift = (2 * guard).bit_length()
    if check is not None and segment.norm_bound:
        norm, longest = honest_norm(segment), noise_norm(noise, segment.values)
        shift = max(shift, quietest_shift(norm, segment.values))
        norms = [norm, longest] if apart else [noisy_norm(norm, noise, longest)]
        norm = norms[0]
        tolerance = check.tolerated * sum(math.ceil(_BEYOND * each) for each in norms)
        least_base = math.ceil(SKETCH_SIGMAS * 2 * (1 + check.margin) * max(norms))
    sum_abs = clients * segment.max_abs + tolerance
    layout = Layout(
        segment.values, segment.max_abs, sum_abs, 2, 0, shift, guard, norm, tolerance, noise
    )
    sum_abs += layout.summed_noise(clients)
    base = max(4 * sum_abs + 2, least_base)
    return replace(layout, sum_abs=sum_abs, base=base, digits=_most_digits(base, shift))


def _noise_layout(layout: Layout) -> Layout:
    """Where the noise of a segment lies before the two are added up: as the segment does."""
    norm = noise_norm(layout.noise, layout.values) if layout.norm else 0
    return replace(layout, max_abs=NOISE_TAIL * layout.noise, norm=norm)


def _rounded_down(number: float) -> float:
    """To three digits, so that what is said to work does."""
    step: float = 10.0 ** (math.floor(math.log10(number)) - 2) if number > 0 else 1.0
    return float(f"{math.floor(number / step) * step:.3g}")


def _most_digits(base: int, shift: int) -> int:
    digits = 0
    while base ** (digits + 1) << shift <= MODULUS:
        digits += 1
    return digits


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
    if plan.privacy is not None:
        rows += _explain_privacy(plan, plan.privacy)
    if plan.threshold is not None:
        rows.append(
            Fact(
                "threshold",
                f"rows of {plan.threshold.least} contributors or more",
                "the key holder zeroes all others, and never tells the counts",
            )
        )
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


def _explain_privacy(plan: Plan, privacy: Privacy) -> list[Fact]:
    rho = release_rho(plan)
    who = {
        "release": "added by the key holder",
        "distributed": f"the noise of any {privacy.honest_clients} clients suffices",
        "local": "the noise of each client suffices",
    }
    rows = [
        Fact(
            "privacy",
            f"{privacy.mode}, noise multiplier {privacy.noise_multiplier:g}",
            f"{who[privacy.mode]}; a release costs each client {rho:.4g}-zCDP",
        ),
        Fact(
            "budget",
            f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g}",
            "what all releases may cost, where a client's contributions could be zeros instead",
        ),
    ]
    for index, segment in enumerate(plan.segments):
        std = mean_noise(plan, index, plan.max_clients)
        from_each = "from each client" if privacy.by_clients else "in the sum"
        if isinstance(segment, FloatSegment):
            norm = std * math.sqrt(segment.values) / segment.clip
            mean = f"{std:.3g} in model units, {norm:.3g} clip norms over the whole update"
        else:
            mean = f"{std:.3g}"
        rows.append(
            Fact(
                f"{segment.name}: privacy",
                f"std {plan.noise_stds[index]} steps a value {from_each}",
                f"in the mean of {plan.max_clients}: {mean}",
            )
        )
    return rows


def mean_noise(plan: Plan, index: int, clients: int) -> float:
    """Standard deviation of the privacy noise of one value, in the mean over so many clients.

    In model units, or in whole numbers for a segment of integers; 0 without privacy.

    Args:
        index: of the segment.
    """
    if plan.privacy is None:
        return 0.0
    segment, std = plan.segments[index], float(plan.noise_stds[index])
    if plan.privacy.by_clients:
        std *= math.sqrt(clients)
    return std * (segment.step if isinstance(segment, FloatSegment) else 1.0) / clients


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
        if segment.compression is not None:
            rows.insert(0, _explain_compression(segment, segment.compression))
        rows.insert(
            0,
            Fact(
                f"{name}: quantiser",
                f"{segment.bits} bits, clip {segment.clip:g}",
                f"rotation in blocks of {segment.rotation_length}, step {segment.step:.3g}",
            ),
        )
    return rows


def _explain_compression(segment: FloatSegment, compression: Compression) -> Fact:
    if isinstance(compression, LowRank):
        how = f"tables of {compression.rank} columns, by a public random matrix a round"
    else:
        how = "other coordinates in each round, which ones is public"
    return Fact(
        f"{segment.name}: compression",
        f"{segment.carried} of {segment.parameters} floats",
        how,
    )


def _used_bits(layout: Layout) -> float:
    span = layout.sum_abs * (layout.base**layout.digits - 1) // (layout.base - 1)
    return math.log2((span << layout.shift) + (1 << (layout.shift - 1)))


def _inputs(segment: Segment) -> int:
    return segment.parameters if isinstance(segment, FloatSegment) else segment.size
