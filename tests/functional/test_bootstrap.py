"""The interval covers what it says, of few values too, and is reproducible."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_tricks.functional.bootstrap import bootstrap_interval

values = st.lists(st.floats(-100, 100), min_size=3, max_size=12)


def covered(draws, truth=0.0):
    """Share of the rows whose interval holds the truth."""
    ends = [bootstrap_interval(row, resamples=1000, seed=index) for index, row in enumerate(draws.tolist())]
    return sum(low <= truth <= high for low, high in ends) / len(ends)


# Of 1000 repetitions the share of an interval that covers in 95 % lies in [0.93, 0.97] with 99.6 % probability.
@pytest.mark.parametrize(("count", "low", "high"), [(3, 0.93, 0.98), (5, 0.93, 0.98), (10, 0.93, 0.97)])
def test_it_covers_the_mean_of_few_normal_values(count, low, high):
    assert low <= covered(torch.randn(1000, count, dtype=torch.float64) + 3, truth=3) <= high


@pytest.mark.parametrize("count", [3, 5, 10])
def test_it_covers_the_mean_of_skewed_values_better_than_students_interval(count):
    draws = torch.empty(1000, count, dtype=torch.float64).exponential_()
    student = stats.ttest_1samp(draws.numpy(), 1, axis=1).pvalue
    assert covered(draws, truth=1) >= max(0.89, (student >= 0.05).mean())


def test_the_percentile_bootstrap_would_not():
    draws = torch.randn(1000, 5, dtype=torch.float64)
    means = draws[:, torch.randint(5, (1000, 5))].mean(2)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=1)
    assert ((low <= 0) & (high >= 0)).double().mean() < 0.88


def test_it_is_what_an_explicit_loop_draws():
    drawn, resamples = [1.0, 4.0, 2.0, 7.0], 200
    mean, spread = 3.5, stats.tstd(drawn)
    generator = torch.Generator().manual_seed(5)
    picks = torch.randint(4, (resamples, 4), generator=generator).tolist()
    noise = torch.randn(resamples, 4, generator=generator, dtype=torch.float64).tolist()
    t = []
    for places, bumps in zip(picks, noise, strict=True):
        sample = [drawn[place] + bump * spread / 2 for place, bump in zip(places, bumps, strict=True)]
        t.append((sum(sample) / 4 - mean) / (stats.tstd(sample) / 2))
    t.sort()

    def quantile(share):
        place = share * (resamples - 1)
        below = math.floor(place)
        return t[below] + (place - below) * (t[below + 1] - t[below])

    expected = [mean - quantile(0.95) * spread / 2, mean - quantile(0.05) * spread / 2]
    assert bootstrap_interval(drawn, 0.9, resamples, seed=5) == pytest.approx(expected, rel=1e-12)


def test_with_many_values_it_is_students_interval():
    drawn = torch.randn(400, dtype=torch.float64).tolist()
    expected = stats.ttest_1samp(drawn, 0).confidence_interval(0.95)
    assert bootstrap_interval(drawn) == pytest.approx(list(expected), abs=0.01)


@settings(max_examples=30, deadline=None)
@given(values)
def test_it_holds_the_mean_and_is_finite_also_where_values_are_equal(drawn):
    low, high = bootstrap_interval(drawn, resamples=1000)
    mean = sum(drawn) / len(drawn)
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert low - 1e-9 <= mean <= high + 1e-9


@settings(max_examples=30, deadline=None)
@given(values, st.floats(0.1, 10), st.floats(-10, 10))
def test_it_moves_and_stretches_with_the_values(drawn, scale, shift):
    low, high = bootstrap_interval(drawn, resamples=100)
    moved = bootstrap_interval([scale * value + shift for value in drawn], resamples=100)
    assert moved == pytest.approx((scale * low + shift, scale * high + shift), rel=1e-6, abs=1e-6)


def test_values_without_spread_have_their_mean():
    assert bootstrap_interval([0.25] * 5) == (0.25, 0.25)


def test_a_higher_level_is_wider():
    drawn = [0.4, 0.9, 0.1, 0.6, 0.5]
    (low, high), (lower, higher) = bootstrap_interval(drawn, 0.8), bootstrap_interval(drawn, 0.99)
    assert lower < low < high < higher


def test_it_draws_from_a_generator_of_its_own():
    before = torch.get_rng_state()
    assert bootstrap_interval([1.0, 2.0, 4.0]) == bootstrap_interval([1.0, 2.0, 4.0])
    assert bootstrap_interval([1.0, 2.0, 4.0]) != bootstrap_interval([1.0, 2.0, 4.0], seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"values": [1.0, 2.0]}, "values must be at least 3, got"),
        ({"values": [1.0, 2.0, math.nan]}, "values must be finite, got nan"),
        ({"level": 1.0}, r"level must be in \(0, 1\), got 1.0"),
        ({"resamples": 10}, "resamples must be a whole number of at least 100"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments, words):
    with pytest.raises(ValueError, match=f"^bootstrap_interval: {words}"):
        bootstrap_interval(**{"values": [1.0, 2.0, 4.0], **arguments})
