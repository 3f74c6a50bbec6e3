"""Power functions against explicit sums, integrals and loops; synthesis against what was tracked directly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tricks.functional.averaging import Averaging, ema_
from lightning_tricks.functional.post_hoc import (
    PowerFunction,
    gamma_to_sigma_rel,
    mean_steps,
    profile_products,
    sigma_rel_to_gamma,
    synthesis,
)

WIDTHS = (0.04, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2)


def profile(k, step, gamma):
    """The power function itself, at points k."""
    return torch.where(k <= step, (gamma + 1) * (k / step).clamp(max=1) ** gamma / step, 0.0)


def shares_of_steps(step, gamma, length):
    """What each of `length` steps weighs in the average after one of them."""
    k = torch.arange(length + 1, dtype=torch.float64).clamp(max=step)
    return ((k / step) ** (gamma + 1)).diff()


# -------------------------------------------------------------------------------------------------- width and exponent


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.10, 6.94), (0.05, 16.97)])
def test_pairs_of_the_paper(sigma_rel, gamma):
    assert sigma_rel_to_gamma(sigma_rel) == pytest.approx(gamma, abs=0.005)


@settings(deadline=None)
@given(st.floats(1e-6, 0.2886))
def test_width_to_exponent_and_back(sigma_rel):
    gamma = sigma_rel_to_gamma(sigma_rel)
    assert gamma > 0
    assert gamma_to_sigma_rel(gamma) == pytest.approx(sigma_rel, rel=1e-12)


@settings(deadline=None)
@given(st.floats(0.001, 1e5))
def test_exponent_to_width_and_back(gamma):
    assert sigma_rel_to_gamma(gamma_to_sigma_rel(gamma)) == pytest.approx(gamma, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.001, 0.05, 0.2, 0.288])
def test_exponent_is_the_root_that_bisection_finds(sigma_rel):
    low, high = 0.0, 2 / sigma_rel
    for _ in range(200):
        middle = (low + high) / 2
        wider = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma_rel**2
        low, high = (middle, high) if wider else (low, middle)
    assert sigma_rel_to_gamma(sigma_rel) == pytest.approx(low, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 0.2887, 1, 1e-7, math.nan, math.inf])
def test_width_out_of_range(sigma_rel):
    expected = r"sigma_rel must be in \[1e-6, 0.2887\) \(fraction of the steps so far\), got"
    with pytest.raises(ValueError, match=f"sigma_rel_to_gamma: {expected}"):
        sigma_rel_to_gamma(sigma_rel)
    with pytest.raises(ValueError, match=f"PowerFunction: {expected}"):
        PowerFunction(sigma_rel)


def test_what_is_no_number():
    with pytest.raises(TypeError, match="sigma_rel must be a number"):
        PowerFunction("0.1")
    with pytest.raises(ValueError, match="gamma must be finite and at least 0, got -0.1"):
        gamma_to_sigma_rel(-0.1)


def test_widest_is_the_plain_mean():
    assert gamma_to_sigma_rel(0) == pytest.approx(math.sqrt(1 / 12))


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_width_is_the_standard_deviation_of_the_shares(sigma_rel):
    steps = 100_000
    shares, k = shares_of_steps(steps, sigma_rel_to_gamma(sigma_rel), steps), torch.arange(steps) + 0.5
    mean = (shares * k).sum()
    assert ((shares * (k - mean) ** 2).sum().sqrt() / steps).item() == pytest.approx(sigma_rel, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- decay


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_average_under_the_decay_is_the_sum_under_the_profile(sigma_rel):
    weights = torch.randn(40, 3, dtype=torch.float64)
    decay, average = PowerFunction(sigma_rel), torch.full((3,), torch.nan, dtype=torch.float64)
    for updates, weight in enumerate(weights):
        if updates == 0:
            average = weight.clone()
        else:
            ema_([average], [weight], decay(updates, math.inf))
        expected = shares_of_steps(updates + 1, decay.gamma, 40) @ weights
        torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-12)


def test_first_weights_are_copied_by_the_formula_itself():
    assert PowerFunction(0.1)(0, 100) == 0.0


def test_decay_does_not_depend_on_the_length_of_the_run():
    assert PowerFunction(0.1)(7, 10) == PowerFunction(0.1)(7, math.inf) == (7 / 8) ** (PowerFunction(0.1).gamma + 1)


def test_it_is_a_decay_of_an_average():
    assert Averaging(PowerFunction(0.1))(8, 7, 100) == PowerFunction(0.1)(7, 100)


# ------------------------------------------------------------------------------------------------- products and means


@pytest.mark.parametrize(("step", "other"), [(10, 10), (4, 10), (10, 4), (1, 1000)])
@pytest.mark.parametrize(("gamma", "other_gamma"), [(0.0, 0.0), (0.0, 3.5), (6.94, 16.97), (16.97, 16.97)])
def test_products_are_integrals(step, other, gamma, other_gamma):
    end = min(step, other)
    k = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 * end
    expected = (profile(k, step, gamma) * profile(k, other, other_gamma)).mean() * end
    got = profile_products([step], [gamma], [other], [other_gamma])
    assert got.shape == (1, 1)
    torch.testing.assert_close(got[0, 0], expected, rtol=1e-7, atol=0)


def test_products_are_laid_out_step_by_step():
    got = profile_products([2, 5], [1.0, 3.0], [4], [0.0, 2.0])
    pairs = [(2, 1.0), (2, 3.0), (5, 1.0), (5, 3.0)]
    for row, (step, gamma) in zip(got, pairs, strict=True):
        for value, other in zip(row, (0.0, 2.0), strict=True):
            assert value == profile_products([step], [gamma], [4], [other])[0, 0]


@pytest.mark.parametrize("gamma", [0.0, 0.3, 6.94, 50.0])
def test_mean_steps_are_sums(gamma):
    steps = [1, 2, 7, 8, 100]
    expected = [(shares_of_steps(t, gamma, t) * (torch.arange(t) + 1)).sum() for t in steps]
    torch.testing.assert_close(mean_steps(steps, gamma), torch.stack(expected), rtol=1e-13, atol=0)


# ---------------------------------------------------------------------------------------------------------- synthesis


EIGHTY = [7 * (index + 1) for index in range(80)]


def missed(steps, sigma_rels, shares, step, sigma_rel, points=200_000):
    """The distance of a sum of profiles from a profile, by integration, as a fraction of its norm."""
    end = max(steps)
    k = (torch.arange(points, dtype=torch.float64) + 0.5) / points * end
    wanted = profile(k, step, sigma_rel_to_gamma(sigma_rel))
    made = torch.zeros_like(k)
    for t, row in zip(steps, shares, strict=True):
        for width, share in zip(sigma_rels, row, strict=True):
            made += share * profile(k, t, sigma_rel_to_gamma(width))
    return ((made - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("sigma_rel", WIDTHS)
@pytest.mark.parametrize("steps", [EIGHTY, [1, 2, 3, 5, 8, 13], [40, 100]])
def test_error_is_the_distance_of_the_profiles(steps, sigma_rel):
    shares, error = synthesis(steps, (0.05, 0.1), steps[-1], sigma_rel)
    assert error == pytest.approx(missed(steps, (0.05, 0.1), shares, steps[-1], sigma_rel), rel=1e-3, abs=2e-6)


@pytest.mark.parametrize("sigma_rel", [0.04, 0.07, 0.16])
def test_no_other_shares_that_meet_the_conditions_come_nearer(sigma_rel):
    steps, widths = [20, 40, 60, 80, 100], (0.05, 0.1)
    shares, error = synthesis(steps, widths, 100, sigma_rel)
    means = torch.stack([mean_steps(steps, sigma_rel_to_gamma(width)) for width in widths], dim=1).flatten()
    conditions, _ = torch.linalg.qr(torch.stack([torch.ones(10, dtype=torch.float64), means], dim=1))
    for _ in range(20):
        direction = torch.randn(10, dtype=torch.float64)
        direction -= conditions @ (conditions.T @ direction)
        for size in (-0.01, 0.01):
            other = shares + size * direction.view(5, 2)
            assert missed(steps, widths, other, 100, sigma_rel, 20_000) > error


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1])
@pytest.mark.parametrize("step", [7, 280, 560])
def test_what_was_stored_is_found_again(sigma_rel, step):
    steps = [s for s in EIGHTY if s <= step]
    shares, error = synthesis(steps, (0.05, 0.1), step, sigma_rel)
    expected = torch.zeros_like(shares)
    expected[-1, [0.05, 0.1].index(sigma_rel)] = 1
    torch.testing.assert_close(shares, expected, rtol=0, atol=1e-9)
    assert error < 1e-7


def test_one_snapshot_of_one_profile():
    shares, error = synthesis([10], [0.1], 10, 0.1)
    torch.testing.assert_close(shares, torch.ones(1, 1, dtype=torch.float64))
    assert error < 1e-7
    assert synthesis([10], [0.1], 10, 0.2).error > 0.3


@pytest.mark.parametrize("sigma_rel", [0.03, *WIDTHS, 0.25])
@pytest.mark.parametrize("sigma_rels", [(0.05, 0.1), (0.1,), (0.03, 0.06, 0.12)])
@pytest.mark.parametrize("steps", [EIGHTY, [1, 2, 3, 4, 5, 6, 7, 8, 9]])
def test_linear_drift_is_exact(steps, sigma_rels, sigma_rel):
    """With frozen weights as the drift of speed 0."""
    length = steps[-1]
    speed = torch.tensor([0.0, 1.0, -3.0], dtype=torch.float64)
    path = 2 + torch.arange(1, length + 1, dtype=torch.float64)[:, None] * speed
    stored = torch.stack(
        [
            torch.stack([shares_of_steps(t, sigma_rel_to_gamma(width), length) @ path for width in sigma_rels])
            for t in steps
        ]
    )
    shares, _ = synthesis(steps, sigma_rels, length, sigma_rel)
    made = (shares[..., None] * stored).sum(dim=(0, 1))
    direct = shares_of_steps(length, sigma_rel_to_gamma(sigma_rel), length) @ path
    torch.testing.assert_close(made, direct, rtol=1e-11, atol=0)


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_error_bounds_what_single_steps_miss(sigma_rel):
    steps = [20, 40, 60, 80, 100]
    shares, error = synthesis(steps, (0.05, 0.1), 100, sigma_rel)
    made = torch.zeros(100, dtype=torch.float64)
    for t, row in zip(steps, shares, strict=True):
        for width, share in zip((0.05, 0.1), row, strict=True):
            made += share * shares_of_steps(t, sigma_rel_to_gamma(width), 100)
    k = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 1000
    norm = profile(k, 100, sigma_rel_to_gamma(sigma_rel)).square().mean().mul(100).sqrt()
    wanted = shares_of_steps(100, sigma_rel_to_gamma(sigma_rel), 100)
    assert ((made - wanted).norm() / norm).item() <= error * (1 + 1e-6) + 1e-6


def test_eighty_snapshots_of_two_profiles_serve_the_widths_of_the_paper():
    errors = [synthesis(EIGHTY, (0.05, 0.1), EIGHTY[-1], sigma_rel).error for sigma_rel in (0.03, *WIDTHS, 0.25)]
    assert max(errors) < 0.012
    assert max(errors[1:-1]) < 0.0013


def test_a_thousand_snapshots_of_close_profiles_do_not_blow_up():
    steps = list(range(10, 5010, 10))
    shares, error = synthesis(steps, (0.1, 0.10001), 5000, 0.11)
    assert error < 0.05
    assert shares.abs().sum() < 100


@pytest.mark.parametrize("sigma_rel", [1e-6, 0.28867])
def test_ends_of_the_range_give_numbers(sigma_rel):
    shares, error = synthesis([50, 100], (0.05, 0.1), 100, sigma_rel)
    assert torch.isfinite(shares).all()
    assert error > 0.1


def test_default_device_and_dtype_are_not_looked_at():
    expected = synthesis([50, 100], (0.05, 0.1), 100, 0.07)
    with torch.device("meta"):
        got = synthesis([50, 100], (0.05, 0.1), 100, 0.07)
    assert torch.equal(got.shares, expected.shares)
