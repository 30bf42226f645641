"""How much privacy a number of releases costs, and how much noise a budget asks for.

Everything is computed by Google's ``dp-accounting``; this module chooses the theorem, the orders
and the rounding, always towards more noise. What it counts, and why that is allowed:

* *One release* is a sum of L2 sensitivity T plus discrete Gaussian noise of standard deviation at
  least zT on each integer. It satisfies rho-zCDP with rho = 1 / (2 z**2): Canonne, Kamath, Steinke,
  "The Discrete Gaussian for Differential Privacy" (2020, arXiv 2004.00010), Theorem 4, and for
  vectors Theorem 14. Where clients add the noise in shares, Kairouz, Liu, Steinke, "The Distributed
  Discrete Gaussian Mechanism" (2021, arXiv 2102.06387), Theorem 1, says the same of the sum of
  shares but for a term that `secagg.privacy` answers for.
* *Many releases*, each chosen after the ones before were seen, satisfy the sum of their rhos:
  Bun, Steinke, "Concentrated Differential Privacy" (2016, arXiv 1605.02065), Lemma 2.3.
* *(epsilon, delta)* follows from rho by Proposition 12 of Canonne et al., minimised over orders.

Releases are accounted by RDP and not by a privacy loss distribution (PLD), although that prints a
smaller epsilon: the theorem above holds for the discrete Gaussian exactly, of any dimension and
however T is spread over the coordinates, and a PLD would be that of the continuous Gaussian, which
nobody samples here. The price is 3 to 10 % in epsilon, or 2 to 9 % in noise, for rho from 0.005 to
50 and delta of 1e-5 and 1e-8; `tests/secagg/test_accounting.py` measures it. No amplification by
sampling of clients is claimed: the server chooses and sees who takes part.

`example_level` is another thing: DP-SGD inside one silo, whose sampling nobody else sees.

Needs the extra ``privacy``. It is imported on first use: it takes a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction
from functools import lru_cache
from types import ModuleType

import numpy as np

from secagg.errors import ConfigurationError

__all__ = [
    "Budget",
    "affordable",
    "example_level",
    "example_level_noise",
    "gaussian_rho",
    "noise_multiplier_for",
    "releases_within",
    "spent",
]

# Rényi orders, 1 + a geometric sequence. The best real order is near 1 + sqrt(ln(1/delta) / rho):
# 1.2 to 5300 for rho from 1e-6 to 100 and delta from 1e-12 to 1e-2. Steps of 1.8 % lose less than
# 0.1 % of epsilon.
_LEAST_ORDER = 0.02
_GREATEST_ORDER = 1e6
_ORDERS = 1000

# A sum of up to a million equal floats is off by less than this, in parts of the sum.
_ROUNDING = 1e-9

# Stop refining a PLD when a step four times as fine changes epsilon by less than this part: the
# error falls with the square of the step, so that a fifteenth of it is left.
_REFINED = 0.015
_COARSEST_STEP = 0.05
_FINEST_STEP = 5e-6


@dataclass(frozen=True, slots=True)
class Budget:
    """What a task may spend: (epsilon, delta)-differential privacy over all of its releases.

    Attributes:
        epsilon: positive and finite.
        delta: in (0, 1); well below one over the number of people, or it promises little.

    Raises:
        ConfigurationError: a value outside of these.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)
        _check_delta(self.delta)

    @property
    def rho(self) -> float:
        """The whole budget as zCDP; see `affordable`."""
        return affordable(self.epsilon, self.delta)

    def spent(self, rho: float) -> float:
        """Epsilon of a total loss `rho` at this budget's delta; see `spent`."""
        return spent(rho, self.delta)

    def left(self, rho_spent: float, rho_each: float) -> int:
        """How many more releases of `rho_each` fit after a total loss of `rho_spent`; 0 if none."""
        _check_rho(rho_spent)
        return _whole(Fraction(self.rho) - _exact(rho_spent), rho_each)

    def check(self, rho_each: float, releases: int = 1, rho_spent: float = 0.0) -> None:
        """Refuse what does not fit, before it is begun.

        Raises:
            ConfigurationError: fewer than `releases` of `rho_each` fit after `rho_spent`. The
                message has the noise multiplier, or the epsilon, with which they would.
        """
        _check_releases(releases)
        room = self.left(rho_spent, rho_each)
        if room >= releases:
            return
        used = f", {self.spent(rho_spent):.4g} of it spent" if rho_spent else ""
        noise = math.sqrt(1 / (2 * rho_each))
        total = rho_spent + releases * rho_each
        ways = [f"an epsilon of at least {_round_up(self.spent(total) * (1 + _ROUNDING), 3):g}"]
        rest = self.rho - rho_spent
        if rest > _ROUNDING * self.rho:
            ways.insert(0, f"a noise_multiplier of at least {_least_noise(rest, releases):g}")
        raise ConfigurationError(
            f"expected room for {releases} release(s) at noise_multiplier={noise:.4g} in "
            f"epsilon={self.epsilon:g}, delta={self.delta:g}{used}; got room for {room}; "
            f"use {', or '.join(ways)}"
        )


def gaussian_rho(noise_multiplier: float) -> float:
    """zCDP of one release: 1 / (2 z**2). Canonne, Kamath, Steinke 2020, Theorems 4 and 14.

    Raises:
        ConfigurationError: a noise multiplier that is not positive and finite.
    """
    _check_noise(noise_multiplier)
    return 0.5 / noise_multiplier / noise_multiplier


def spent(rho: float, delta: float) -> float:
    """Epsilon at `delta` of a total zCDP loss `rho`, the sum over all releases.

    Within 0.1 % of the best over all real orders, and never below it, for rho from 1e-6 to 100 and
    delta from 1e-12 to 1e-2; safe outside of that, if less tight. Never falls when `rho` grows.
    Source: Canonne, Kamath, Steinke 2020, Proposition 12, through ``dp_accounting.rdp``.

    Raises:
        ConfigurationError: a negative rho, a delta outside (0, 1), or no ``dp-accounting``.
    """
    _check_rho(rho)
    _check_delta(delta)
    if rho == 0.0 or math.isinf(rho):
        return rho
    return _epsilon_and_order(rho, delta)[0]


@lru_cache(maxsize=256)
def affordable(epsilon: float, delta: float) -> float:
    """The largest total rho with ``spent(rho, delta) <= epsilon``, to 1 part in 1e12, from below.

    0.0 where not even a rho of 1e-30 fits.

    Raises:
        ConfigurationError: an epsilon that is not positive and finite, or a delta outside (0, 1).
    """
    _check_epsilon(epsilon)
    _check_delta(delta)
    # Bun, Steinke 2016, Proposition 1.3, solved for rho: a little less than there is.
    root = math.sqrt(-math.log(delta))
    low, high = (epsilon / (math.sqrt(root * root + epsilon) + root)) ** 2, math.inf
    level, order = _epsilon_and_order(low, delta)
    while level > epsilon:
        low /= 2
        if low < 1e-30:
            return 0.0
        level, order = _epsilon_and_order(low, delta)
    while True:
        # Epsilon is the least of many lines in rho, whose slopes are the orders: the line that is
        # least here lies above the others' least everywhere, so that a step along it falls short.
        middle = low + (1 - 1e-13) * (epsilon - level) / order
        if level <= 0.0:  # no line is least where epsilon is 0, and it may be for long
            middle = 2 * low
        if middle >= high:
            middle = (low + high) / 2
        if middle - low <= 1e-12 * low:
            return low
        found, slope = _epsilon_and_order(middle, delta)
        if found <= epsilon:
            low, level, order = middle, found, slope
        else:
            high = middle


def releases_within(rho_each: float, epsilon: float, delta: float) -> int:
    """How many releases of `rho_each` a budget has room for; 0 if none.

    Exact division of the two floats: nothing is lost or won to rounding.

    Raises:
        ConfigurationError: a rho that is not positive and finite, or an impossible budget.
    """
    return Budget(epsilon, delta).left(0.0, rho_each)


def noise_multiplier_for(epsilon: float, delta: float, releases: int) -> float:
    """The smallest noise multiplier with which `releases` fit into a budget, rounded up.

    To 4 significant digits, or as many more as it takes that one release more would not fit: what
    it returns can be written down, and `releases_within` finds the number of releases again.

    Raises:
        ConfigurationError: an impossible budget, or fewer than one release.
    """
    _check_releases(releases)
    rho = affordable(epsilon, delta)
    if rho == 0.0:
        raise ConfigurationError(
            f"expected an epsilon that some amount of noise can reach; got {epsilon=:g}, "
            f"{delta=:g}; use a larger epsilon or a larger delta"
        )
    return _least_noise(rho, releases)


def example_level(noise_multiplier: float, sampling_rate: float, steps: int, delta: float) -> float:
    """Epsilon of DP-SGD in one silo, neighbours differing in one example added or removed.

    The Gaussian mechanism on a Poisson sample (Mironov, Talwar, Zhang, "Rényi Differential Privacy
    of the Sampled Gaussian Mechanism", 2019, arXiv 1908.10530, who account for it by RDP), composed
    by its privacy loss distribution (Koskela, Jälkö, Honkela, "Computing Tight Differential Privacy
    Guarantees Using FFT", 2020, arXiv 1906.03049) as ``dp_accounting.pld`` implements it, which
    rounds the loss up. Without sampling: the exact curve of the Gaussian (Balle, Wang, 2018,
    arXiv 1805.06530).

    It holds if *each step takes each example with probability `sampling_rate`, independently of
    all others and of the steps before*, if nobody outside sees which, if the sum of clipped
    gradients (clip norm C) gets continuous Gaussian noise of standard deviation `noise_multiplier`
    times C, and if it is divided by something that does not depend on the sample. Shuffled epochs
    and batches of a fixed size are not covered.

    Tight to about 0.1 %, except where the loss of one step is many times below 5e-6, such as
    sampling_rate / noise_multiplier under 1e-4: safe there, but loose. Infinite for a delta below
    what the discretisation cuts off, about 1e-14.

    Args:
        noise_multiplier: standard deviation of the noise over the clip norm.
        sampling_rate: in (0, 1].
        steps: number of noisy gradients, not of epochs.
        delta: in (0, 1).

    Raises:
        ConfigurationError: a value outside its range, or no ``dp-accounting``.
    """
    _check_noise(noise_multiplier)
    _check_sampling(sampling_rate, steps)
    _check_delta(delta)
    return _example_level(noise_multiplier, sampling_rate, steps, delta, _COARSEST_STEP)[0]


def example_level_noise(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest noise multiplier with `example_level` within `epsilon`: 4 digits, rounded up.

    Raises:
        ConfigurationError: a value outside its range, or an epsilon that no noise multiplier from
            2**-7 to 2**20 meets.
    """
    _check_epsilon(epsilon)
    _check_delta(delta)
    _check_sampling(sampling_rate, steps)
    step = min(_COARSEST_STEP, epsilon / 20)

    def level(noise: float) -> float:
        nonlocal step
        found, finest = _example_level(noise, sampling_rate, steps, delta, step)
        step = min(_COARSEST_STEP, 16 * finest)  # the next noise is close by
        return found

    noise = _least(level, epsilon)
    # What people will check it with may have stopped at a coarser step.
    while example_level(noise, sampling_rate, steps, delta) > epsilon:
        noise = _next(noise, 1)
    return noise


def _example_level(
    noise: float, rate: float, steps: int, delta: float, step: float
) -> tuple[float, float]:
    """Epsilon, and the discretisation step that was fine enough for it."""
    dp = _dp_accounting()
    if rate == 1.0:
        with np.errstate(divide="ignore"):  # a delta too small for a float is none
            return float(dp.get_epsilon_gaussian(noise / math.sqrt(steps), delta)), step
    event = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise))
    best = math.inf
    while True:
        accountant = dp.pld.PLDAccountant(value_discretization_interval=step)
        accountant.compose(event, steps)
        # Every step gives an upper bound, so the least of them is one.
        last, best = best, min(best, float(accountant.get_epsilon(delta)))
        if last - best <= _REFINED * best or step / 4 < _FINEST_STEP or 4 * best / step > 1e6:
            return best, step
        step /= 4


def _least(level: Callable[[float], float], epsilon: float) -> float:
    """The smallest noise of 4 digits whose level is within epsilon.

    By interpolation: the logarithm of epsilon is almost linear in that of the noise.
    """
    low, high = 0.5, 1.0
    above, below = level(low), level(high)
    while below > epsilon:
        low, above, high = high, below, _round_up(2 * high, 4)
        if high > 2.0**20:
            raise ConfigurationError(
                f"expected an epsilon that a noise multiplier up to 2**20 reaches; got {epsilon=:g}"
                "; use a larger epsilon or delta, or fewer steps"
            )
        below = level(high)
    while above <= epsilon:
        high, below, low = low, above, low / 2
        if low < 2.0**-7:
            raise ConfigurationError(
                "expected an epsilon that asks for a noise multiplier of at least 2**-6; got "
                f"{epsilon=:g}; use a smaller epsilon"
            )
        above = level(low)
    high = _round_up(high, 4)
    rounds = 0
    while low < _next(high, -1):
        rounds += 1
        way = (_log(above) - _log(epsilon)) / (_log(above) - _log(below))
        guess = low * (high / low) ** (way if rounds % 3 else 0.5)
        guess = min(_round_up(guess, 4), _next(high, -1))
        found = level(guess)
        if found <= epsilon:
            high, below = guess, found
        else:
            low, above = guess, found
    return high


def _log(epsilon: float) -> float:
    return math.log(min(max(epsilon, 1e-300), 1e300))


def _next(value: float, direction: int) -> float:
    """The number of 4 significant digits that follows one of 4 significant digits."""
    exact = Decimal(repr(value))
    return float(exact + direction * Decimal((0, (1,), exact.adjusted() - 3)))


def _epsilon_and_order(rho: float, delta: float) -> tuple[float, float]:
    dp = _dp_accounting()
    accountant = dp.rdp.RdpAccountant(_orders())
    accountant.compose(dp.ZCDpEvent(rho))
    epsilon, order = accountant.get_epsilon_and_optimal_order(delta)
    return float(epsilon), float(order)


def _dp_accounting() -> ModuleType:
    # Not at the top: services of tasks without a budget should not pay a second for it.
    try:
        import dp_accounting
    except ImportError:
        raise ConfigurationError(
            "expected the package dp-accounting, which computes privacy budgets; it is not "
            "installed; do pip install 'secagg[privacy]'"
        ) from None
    module: ModuleType = dp_accounting
    return module


@lru_cache(maxsize=1)
def _orders() -> tuple[float, ...]:
    ratio = (_GREATEST_ORDER / _LEAST_ORDER) ** (1 / (_ORDERS - 1))
    return tuple(1 + _LEAST_ORDER * ratio**index for index in range(_ORDERS))


def _least_noise(rho: float, releases: int) -> float:
    """Smallest z, rounded up, with `releases` / (2 z**2) within `rho`, and one more not."""
    least = math.sqrt(releases / (2 * rho))
    for digits in range(4, 16):
        noise = _round_up(least * (1 + _ROUNDING), digits)
        if (releases + 1) * gaussian_rho(noise) > rho * (1 + _ROUNDING):
            break
    return noise


def _round_up(value: float, digits: int) -> float:
    exact = Decimal(value)
    return float(exact.quantize(Decimal((0, (1,), exact.adjusted() - digits + 1)), ROUND_CEILING))


def _whole(room: Fraction, rho_each: float) -> int:
    if not 0 < rho_each < math.inf:
        raise ConfigurationError(
            f"expected a positive, finite rho of one release; got rho={rho_each}; "
            "set a positive noise_multiplier"
        )
    return max(0, int(room // Fraction(rho_each)))


def _exact(rho: float) -> Fraction:
    # A loss beyond all bounds leaves no room; no budget is larger than this.
    return Fraction(min(rho, 1e300))


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < math.inf:
        raise ConfigurationError(
            f"expected a positive, finite epsilon; got {epsilon=}; use one from 0.1 to 20, smaller "
            "being more private"
        )


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigurationError(
            f"expected delta in (0, 1); got {delta=}; use one well below 1 over the number of "
            "people, such as 1e-6"
        )


def _check_rho(rho: float) -> None:
    if not rho >= 0:
        raise ConfigurationError(f"expected rho of at least 0; got {rho=}; use a sum of releases")


def _check_noise(noise_multiplier: float) -> None:
    if not 0 < noise_multiplier < math.inf:
        raise ConfigurationError(
            f"expected a positive, finite noise_multiplier; got {noise_multiplier=}; "
            "ask for one by epsilon, delta and the number of releases"
        )


def _check_releases(releases: int) -> None:
    if releases < 1:
        raise ConfigurationError(f"expected at least 1 release; got {releases=}; use 1 or more")


def _check_sampling(sampling_rate: float, steps: int) -> None:
    if not 0 < sampling_rate <= 1:
        raise ConfigurationError(
            f"expected a sampling rate in (0, 1]; got {sampling_rate=}; use the batch size over "
            "the number of examples"
        )
    if steps < 1:
        raise ConfigurationError(f"expected at least 1 step; got {steps=}; use 1 or more")
