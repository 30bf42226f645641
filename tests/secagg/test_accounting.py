"""Privacy accounting: against independent accountants, published values, and itself."""

from __future__ import annotations

import math
import re
import sys
import warnings

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prv_accountant.dpsgd import DPSGDAccountant
from scipy import optimize

from secagg import accounting
from secagg.accounting import (
    Budget,
    affordable,
    example_level,
    example_level_noise,
    gaussian_rho,
    noise_multiplier_for,
    releases_within,
    spent,
)
from secagg.errors import ConfigurationError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what opacus imports is not ours to keep free of warnings
    from opacus.accountants.analysis import rdp as opacus_rdp

RHOS = [10.0**power for power in np.arange(-6, 2.01, 0.5)]
DELTAS = [1e-12, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2]

epsilons = st.floats(0.05, 50)
deltas = st.floats(1e-12, 1e-2)
rhos = st.floats(1e-6, 100)
counts = st.integers(1, 100_000)


def best_over_real_orders(rho: float, delta: float) -> float:
    """Proposition 12 of Canonne, Kamath, Steinke 2020, minimised over all real orders by scipy."""

    def epsilon(log: float) -> float:
        order = 1 + math.exp(log)
        return order * rho + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)

    found = min(
        (
            optimize.minimize_scalar(epsilon, bounds=(low, low + 4), options={"xatol": 1e-10})
            for low in range(-4, 16, 2)
        ),
        key=lambda result: float(result.fun),
    )
    return max(0.0, float(found.fun))


# --- releases: zCDP by RDP --------------------------------------------------------------------


@pytest.mark.parametrize("delta", DELTAS)
def test_orders_are_as_good_as_all_real_ones(delta: float) -> None:
    for rho in RHOS:
        best = best_over_real_orders(rho, delta)
        assert best * (1 - 1e-9) <= spent(rho, delta) <= best * 1.001, (rho, delta)


@pytest.mark.parametrize(("noise", "releases"), [(1, 1), (1, 10), (4, 100), (20, 5), (50, 2000)])
@pytest.mark.parametrize("delta", [1e-4, 1e-6, 1e-9])
def test_rdp_agrees_with_an_independent_one(noise: float, releases: int, delta: float) -> None:
    # Opacus: its own curve of the Gaussian mechanism, and its own conversion.
    orders = [1 + 0.05 * 1.02**index for index in range(600)]
    curve = opacus_rdp.compute_rdp(q=1.0, noise_multiplier=noise, steps=releases, orders=orders)
    theirs, _ = opacus_rdp.get_privacy_spent(orders=orders, rdp=curve, delta=delta)
    assert spent(releases * gaussian_rho(noise), delta) == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize(
    ("rho", "delta", "published", "source"),
    [
        (2.56, 1e-10, 17.14, "2020 US Census, persons; press release of 9 June 2021"),
        (0.81, 1e-10, 8.9, "Gboard, Spanish; Google AI blog, 28 February 2022"),
        # TensorFlow Privacy, compute_dp_sgd_privacy_test.py, RDP without subsampling.
        (5 * gaussian_rho(1.0), 1e-6, 13.376, "statement, with microbatching: noise 2.0 / 2"),
        (2 * gaussian_rho(0.7), 1e-5, 10.8602036, "no microbatching"),
        (2 * gaussian_rho(0.35), 1e-5, 26.2880374, "microbatching"),
    ],
)
def test_published_losses_of_releases(
    rho: float, delta: float, published: float, source: str
) -> None:
    assert spent(rho, delta) == pytest.approx(published, rel=0.01), source


def test_what_a_tight_accountant_of_the_continuous_gaussian_would_save() -> None:
    # The figures in the docstring of the module: RDP costs this much more than the exact curve.
    epsilon_costs, noise_costs = [], []
    for delta in (1e-5, 1e-8):
        for rho in (0.005, 0.05, 0.5, 2, 8, 50):
            exact = dp_accounting.get_epsilon_gaussian(math.sqrt(0.5 / rho), delta)
            epsilon_costs.append(spent(rho, delta) / exact - 1)
            noise_costs.append(math.sqrt(rho / affordable(exact, delta)) - 1)
    assert 0.03 < min(epsilon_costs) < 0.04
    assert 0.10 < max(epsilon_costs) < 0.11
    assert 0.02 < min(noise_costs) < 0.03
    assert 0.09 < max(noise_costs) < 0.10


@given(rhos, rhos, deltas)
def test_loss_grows_with_rho_and_falls_with_delta(first: float, second: float, d: float) -> None:
    low, high = sorted((first, second))
    assert 0 <= spent(low, d) <= spent(high, d)
    assert spent(low, d / 2) >= spent(low, d)


@given(st.lists(st.floats(1e-6, 5), min_size=2, max_size=5), deltas)
def test_composition_is_one_accountant_fed_release_by_release(parts: list[float], d: float) -> None:
    accountant = dp_accounting.rdp.RdpAccountant([1 + 0.03 * 1.03**index for index in range(500)])
    for part in parts:
        accountant.compose(dp_accounting.GaussianDpEvent(math.sqrt(0.5 / part)))
    assert spent(math.fsum(parts), d) == pytest.approx(
        accountant.get_epsilon(d), rel=0.01, abs=1e-3
    )


def test_ends_of_the_range() -> None:
    assert spent(0.0, 1e-6) == 0.0
    assert spent(math.inf, 1e-6) == math.inf
    assert spent(1e-30, 1e-6) < 1e-3
    assert spent(1e6, 1e-6) >= 1e6
    assert affordable(1e-9, 1e-12) < 1e-20


# --- both ways round --------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(epsilons, deltas)
def test_affordable_is_the_largest_and_safe(epsilon: float, delta: float) -> None:
    rho = affordable(epsilon, delta)
    assert spent(rho, delta) <= epsilon
    assert spent(rho * (1 + 1e-9), delta) > epsilon


@settings(max_examples=25, deadline=None)
@given(rhos, deltas)
def test_affordable_undoes_spent(rho: float, delta: float) -> None:
    epsilon = spent(rho, delta)
    if epsilon > 1e-3:
        assert affordable(epsilon, delta) == pytest.approx(rho, rel=1e-6)


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(1e-6, 4e-2), (1e-9, 0.5), (1e-3, 0.9), (0.1, 0.99), (1e-12, 1e-12)]
)
def test_affordable_does_not_creep_where_epsilon_is_zero(
    monkeypatch: pytest.MonkeyPatch, epsilon: float, delta: float
) -> None:
    asked, search = [], accounting._epsilon_and_order

    def counted(rho: float, at: float) -> tuple[float, float]:
        asked.append(rho)
        assert len(asked) <= 500, "once it was 46 014 for the first of these"
        return search(rho, at)

    monkeypatch.setattr(accounting, "_epsilon_and_order", counted)
    accounting.affordable.cache_clear()
    rho = accounting.affordable(epsilon, delta)
    assert spent(rho, delta) <= epsilon < spent(rho * (1 + 1e-9), delta)


@settings(max_examples=25, deadline=None)
@given(epsilons, epsilons, deltas)
def test_affordable_grows_with_either(first: float, second: float, delta: float) -> None:
    low, high = sorted((first, second))
    assert affordable(low, delta) <= affordable(high, delta)
    assert affordable(low, delta / 2) <= affordable(low, delta) * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(epsilons, st.sampled_from(DELTAS), counts)
def test_noise_for_n_releases_is_noise_for_exactly_n(e: float, d: float, releases: int) -> None:
    noise = noise_multiplier_for(e, d, releases)
    rho = gaussian_rho(noise)
    assert releases_within(rho, e, d) == releases
    assert spent(releases * rho, d) <= e
    assert spent((releases + 1) * rho, d) > e
    # Short enough to be written down, and read again as the same number.
    digits = f"{noise:.15g}".replace(".", "").strip("0").split("e")[0]
    assert len(digits) <= 5 + len(str(releases))
    # And no tenth of a per cent more noise than needed.
    assert releases * gaussian_rho(noise * 0.998) > affordable(e, d)


@settings(max_examples=15, deadline=None)
@given(epsilons, st.integers(1, 3000))
def test_a_budget_spent_one_by_one_ends_where_it_should(epsilon: float, releases: int) -> None:
    budget = Budget(epsilon, 1e-6)
    rho = gaussian_rho(noise_multiplier_for(epsilon, 1e-6, releases))
    total = 0.0
    for done in range(releases):
        assert budget.left(total, rho) == releases - done
        total += rho  # as a ledger adds it up, rounding at each step
    assert budget.left(total, rho) == 0
    assert budget.spent(total) <= epsilon * (1 + 1e-9)


def test_a_boundary_is_met_exactly() -> None:
    rho = affordable(1.0, 1e-6)
    assert releases_within(rho, 1.0, 1e-6) == 1
    assert releases_within(rho / 4, 1.0, 1e-6) == 4
    assert releases_within(math.nextafter(rho, 1), 1.0, 1e-6) == 0
    assert releases_within(math.nextafter(rho / 4, 1), 1.0, 1e-6) == 3


def test_more_noise_more_releases_and_more_releases_more_noise() -> None:
    noises = [noise_multiplier_for(1.0, 1e-6, releases) for releases in (1, 2, 10, 1000)]
    assert noises == sorted(noises)
    assert len(set(noises)) == len(noises)
    assert noise_multiplier_for(2.0, 1e-6, 10) < noise_multiplier_for(1.0, 1e-6, 10)
    assert noise_multiplier_for(1.0, 1e-5, 10) < noise_multiplier_for(1.0, 1e-6, 10)
    within = [releases_within(gaussian_rho(noise), 1.0, 1e-6) for noise in (1, 10, 20, 100)]
    assert within == sorted(within)
    assert within[0] == 0


# --- budgets ----------------------------------------------------------------------------------


def test_budget_is_the_functions_with_two_arguments_fewer() -> None:
    budget = Budget(2.0, 1e-6)
    assert budget.rho == affordable(2.0, 1e-6)
    assert budget.spent(0.01) == spent(0.01, 1e-6)
    assert budget.left(0.0, 1e-3) == releases_within(1e-3, 2.0, 1e-6)
    assert budget.left(budget.rho, 1e-9) == 0
    assert budget.left(5 * budget.rho, 1e-9) == 0
    assert budget.left(math.inf, 1e-9) == 0
    budget.check(1e-3, budget.left(0.0, 1e-3))


@pytest.mark.parametrize(
    ("epsilon", "noise", "releases", "rho_spent"),
    [(0.1, 1, 1, 0.0), (1.0, 1, 10, 0.02), (1.0, 30, 1000, 0.0), (3.0, 2, 5, 0.1)],
)
def test_a_refused_budget_says_what_would_work(
    epsilon: float, noise: float, releases: int, rho_spent: float
) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        Budget(epsilon, 1e-5).check(gaussian_rho(noise), releases, rho_spent)
    text = str(refusal.value)
    more = re.search(r"noise_multiplier of at least ([0-9.e+-]+)", text)
    larger = re.search(r"an epsilon of at least ([0-9.e+-]+)", text)
    assert more
    assert larger
    Budget(epsilon, 1e-5).check(gaussian_rho(float(more[1])), releases, rho_spent)
    Budget(float(larger[1]), 1e-5).check(gaussian_rho(noise), releases, rho_spent)
    # And neither suggestion is far from the least that works.
    with pytest.raises(ConfigurationError):
        Budget(epsilon, 1e-5).check(gaussian_rho(float(more[1]) * 0.99), releases, rho_spent)
    with pytest.raises(ConfigurationError):
        Budget(float(larger[1]) * 0.98, 1e-5).check(gaussian_rho(noise), releases, rho_spent)


def test_a_spent_budget_is_helped_by_epsilon_alone() -> None:
    budget = Budget(1.0, 1e-5)
    with pytest.raises(ConfigurationError, match="of it spent; got room for 0") as refusal:
        budget.check(0.5, 1, rho_spent=2 * budget.rho)
    assert "noise_multiplier of at least" not in str(refusal.value)
    assert "an epsilon of at least" in str(refusal.value)


# --- refusals ---------------------------------------------------------------------------------

BAD_DELTAS = [0.0, 1.0, -1e-6, 2.0, math.nan]
BAD_EPSILONS = [0.0, -1.0, math.inf, math.nan]
BAD_RHOS = [-1e-9, math.nan]
BAD_NOISES = [0.0, -1.0, math.inf, math.nan]


@pytest.mark.parametrize("delta", BAD_DELTAS)
def test_bad_deltas_are_refused_everywhere(delta: float) -> None:
    for call in (
        lambda: spent(0.0, delta),
        lambda: affordable(1.0, delta),
        lambda: releases_within(0.1, 1.0, delta),
        lambda: noise_multiplier_for(1.0, delta, 1),
        lambda: example_level(1.0, 0.1, 1, delta),
        lambda: example_level_noise(1.0, delta, 0.1, 1),
        lambda: Budget(1.0, delta),
    ):
        with pytest.raises(ConfigurationError, match=r"expected delta in \(0, 1\); got delta="):
            call()


@pytest.mark.parametrize("epsilon", BAD_EPSILONS)
def test_bad_epsilons_are_refused_everywhere(epsilon: float) -> None:
    for call in (
        lambda: affordable(epsilon, 1e-6),
        lambda: releases_within(0.1, epsilon, 1e-6),
        lambda: noise_multiplier_for(epsilon, 1e-6, 1),
        lambda: example_level_noise(epsilon, 1e-6, 0.1, 1),
        lambda: Budget(epsilon, 1e-6),
    ):
        with pytest.raises(ConfigurationError, match="positive, finite epsilon; got epsilon="):
            call()


@pytest.mark.parametrize("rho", BAD_RHOS)
def test_bad_losses_are_refused(rho: float) -> None:
    with pytest.raises(ConfigurationError, match="rho of at least 0; got rho="):
        spent(rho, 1e-6)
    with pytest.raises(ConfigurationError, match="rho of at least 0; got rho="):
        Budget(1.0, 1e-6).left(rho, 0.1)


@pytest.mark.parametrize("rho", [*BAD_RHOS, 0.0, math.inf])
def test_a_release_costs_something(rho: float) -> None:
    # Free releases would be without end.
    with pytest.raises(ConfigurationError, match="positive, finite rho of one release"):
        releases_within(rho, 1.0, 1e-6)


@pytest.mark.parametrize("noise", BAD_NOISES)
def test_bad_noise_is_refused(noise: float) -> None:
    with pytest.raises(ConfigurationError, match="positive, finite noise_multiplier"):
        gaussian_rho(noise)
    with pytest.raises(ConfigurationError, match="positive, finite noise_multiplier"):
        example_level(noise, 0.1, 1, 1e-6)


@pytest.mark.parametrize("releases", [0, -1])
def test_no_release_is_refused(releases: int) -> None:
    with pytest.raises(ConfigurationError, match="at least 1 release"):
        noise_multiplier_for(1.0, 1e-6, releases)
    with pytest.raises(ConfigurationError, match="at least 1 release"):
        Budget(1.0, 1e-6).check(0.1, releases)


@pytest.mark.parametrize(
    ("rate", "steps"), [(0.0, 1), (-0.1, 1), (1.1, 1), (math.nan, 1), (0.1, 0)]
)
def test_bad_sampling_is_refused(rate: float, steps: int) -> None:
    with pytest.raises(ConfigurationError, match=r"sampling_rate=|steps="):
        example_level(1.0, rate, steps, 1e-6)
    with pytest.raises(ConfigurationError, match=r"sampling_rate=|steps="):
        example_level_noise(1.0, 1e-6, rate, steps)


def test_budgets_out_of_reach_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="use a larger epsilon"):
        noise_multiplier_for(1e-9, 1e-200, 1)
    with pytest.raises(ConfigurationError, match="use a larger epsilon"):
        example_level_noise(1e-9, 1e-12, 1.0, 1)
    with pytest.raises(ConfigurationError, match="use a smaller epsilon"):
        example_level_noise(1e9, 1e-6, 1.0, 1)


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    for call in (lambda: spent(0.1, 1e-6), lambda: example_level(1.0, 0.1, 1, 1e-6)):
        with pytest.raises(ConfigurationError, match=re.escape("pip install 'secagg[privacy]'")):
            call()


# --- examples: the sampled Gaussian by PLD ----------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"),
    [
        (4.0, 0.01, 10_000, 1e-5),
        (1.3, 256 / 60_000, 3515, 1e-5),
        (0.8, 0.005, 1000, 1e-6),
        (1.5, 0.04, 2250, 1e-5),
        (20.0, 0.5, 100, 1e-6),
        (0.6, 0.02, 200, 1e-8),
    ],
)
def test_pld_agrees_with_prv(noise: float, rate: float, steps: int, delta: float) -> None:
    # Gopi, Lee, Wutschitz 2021, in their own code; lower and upper are proven bounds.
    ours = example_level(noise, rate, steps, delta)
    lower, estimate, upper = DPSGDAccountant(
        noise_multiplier=noise,
        sampling_probability=rate,
        max_steps=steps,
        eps_error=0.01 * min(1.0, ours),
        delta_error=delta / 1000,
    ).compute_epsilon(delta, steps)
    assert ours == pytest.approx(estimate, rel=0.01)
    assert lower <= ours <= upper


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta", "published"),
    [
        # TensorFlow Privacy, compute_dp_sgd_privacy_test.py, PLD: 1.2 epochs at 1/100, with
        # noise 0.7, and halved by microbatching; 5 epochs of 10000 examples in batches of 64.
        (0.7, 0.01, 120, 1e-5, 2.4612381),
        (0.35, 0.01, 120, 1e-5, 18.6977407),
        (1.0, 64 / 10_000, 782, 1e-6, 1.199),
        (0.7, 1.0, 2, 1e-5, 10.1224946),
        (0.35, 1.0, 2, 1e-5, 24.7160779),
        (1.0, 1.0, 5, 1e-6, 12.595),
        # Opacus, accountants_test.py, test_prv_accountant: PRV with an error up to 0.01.
        (1.5, 0.04, 2249, 1e-5, 6.777395712150674),
    ],
)
def test_published_losses_of_examples(
    noise: float, rate: float, steps: int, delta: float, published: float
) -> None:
    assert example_level(noise, rate, steps, delta) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "published"),
    [
        (4.0, 0.01, 10_000, 1.26),  # Abadi et al. 2016, section 3.2
        (1.3, 256 / 60_000, 4687, 1.34),  # Bu, Dong, Long, Su 2020, figure 4, 20 epochs
        (0.7, 256 / 60_000, 16_406, 8.68),  # the same, 70 epochs
    ],
)
def test_published_moments_accountants_are_reproduced_and_beaten(
    noise: float, rate: float, steps: int, published: float
) -> None:
    # They print the moments accountant, with the conversion of its time. Computed so, the values
    # come out: it is the same mechanism. What we say of it is smaller.
    orders = [1 + tenth / 10 for tenth in range(1, 100)] + list(range(11, 65))
    curve = opacus_rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=orders)
    theirs = min(np.array(curve) - math.log(1e-5) / (np.array(orders) - 1))
    assert theirs == pytest.approx(published, rel=0.01)
    assert 0.7 * published < example_level(noise, rate, steps, 1e-5) < published


def test_without_sampling_it_is_the_gaussian_mechanism() -> None:
    # Balle, Wang 2018, theorem 8, written out.
    epsilon = example_level(5.0, 1.0, 25, 1e-5)
    deviation = 5.0 / math.sqrt(25)

    def below(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    delta = below(0.5 / deviation - epsilon * deviation) - math.exp(epsilon) * below(
        -0.5 / deviation - epsilon * deviation
    )
    assert delta == pytest.approx(1e-5, rel=1e-6)
    assert epsilon < spent(25 * gaussian_rho(5.0), 1e-5)


def test_loss_of_examples_is_monotone_in_each_argument() -> None:
    base = example_level(1.0, 0.01, 500, 1e-5)
    assert example_level(1.05, 0.01, 500, 1e-5) < base < example_level(0.95, 0.01, 500, 1e-5)
    assert example_level(1.0, 0.009, 500, 1e-5) < base < example_level(1.0, 0.011, 500, 1e-5)
    assert example_level(1.0, 0.01, 450, 1e-5) < base < example_level(1.0, 0.01, 550, 1e-5)
    assert example_level(1.0, 0.01, 500, 2e-5) < base < example_level(1.0, 0.01, 500, 5e-6)
    # Sampling amplifies: all examples in every step cost more.
    assert base < example_level(1.0, 1.0, 500, 1e-5)


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps"),
    [(8, 1e-5, 0.04, 100), (0.5, 1e-6, 0.02, 200), (2, 1e-5, 0.3, 20), (1.0, 1e-6, 1.0, 7)],
)
def test_noise_for_examples_is_the_least_of_four_digits(
    epsilon: float, delta: float, rate: float, steps: int
) -> None:
    noise = example_level_noise(epsilon, delta, rate, steps)
    assert float(f"{noise:.4g}") == noise
    assert example_level(noise, rate, steps, delta) <= epsilon
    assert example_level(noise * 0.998, rate, steps, delta) > epsilon


@pytest.mark.parametrize(("steps", "published"), [(2250, 1.34765625), (2000, 1.2915)])
def test_published_noise_for_examples(steps: int, published: float) -> None:
    # Opacus, accountants_test.py, test_get_noise_multiplier_prv_epochs and _steps.
    assert example_level_noise(8, 1e-5, 0.04, steps) == pytest.approx(published, rel=0.01)
