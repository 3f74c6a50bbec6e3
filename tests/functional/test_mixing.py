import math
import re
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tricks.functional.mixing import mixup, sample_beta, sample_mixup


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mixup_by_loop(images, weight, permutation):
    """Each sample in float64; integers rounded half to even."""
    mixed = torch.empty(images.shape, dtype=torch.float64)
    for n in range(len(images)):
        share = weight[n].double()
        mixed[n] = share * images[n].double() + (1 - share) * images[permutation[n]].double()
    return mixed if images.is_floating_point() else mixed.round()


def images_of(dtype, shape=(5, 3, 4, 6)):
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=torch.float64).to(dtype)
    return torch.randint(0, 256, shape).to(dtype)


# ------------------------------------------------------------------ applying


@pytest.mark.parametrize("shape", [(5,), (5, 7), (4, 3, 6, 5), (1, 2, 3), (2, 1, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_mixup_is_its_formula_sample_by_sample(shape, dtype, inplace):
    images = images_of(dtype, shape)
    weight, permutation = torch.rand(shape[0]).to(dtype).float(), torch.randperm(shape[0])
    expected = mixup_by_loop(images, weight, permutation)
    mixed = mixup(images, weight, permutation, inplace)
    eps = 4 * torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.double(), expected, rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_integers_are_rounded_not_truncated(dtype, inplace):
    images = images_of(dtype)
    weight, permutation = torch.tensor([0.5, 0.25, 0.75, 1.0, 0.0]), torch.tensor([1, 2, 3, 4, 0])
    expected = mixup_by_loop(images, weight, permutation)
    truncated = mixup_by_loop(images.double(), weight, permutation).trunc()
    assert not torch.equal(expected, truncated)
    mixed = mixup(images, weight, permutation, inplace)
    assert mixed.dtype == dtype
    assert torch.equal(mixed.double(), expected)


def test_complex_numbers_are_mixed():
    images, weight, permutation = torch.randn(3, 2, dtype=torch.complex64), torch.rand(3), torch.tensor([2, 0, 1])
    expected = torch.complex(
        mixup_by_loop(images.real, weight, permutation), mixup_by_loop(images.imag, weight, permutation)
    )
    torch.testing.assert_close(mixup(images, weight, permutation), expected.to(torch.complex64))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.floats(0, 1), st.integers(0, 1000))
def test_one_weight_for_the_batch_conserves_its_mean(count, weight, seed):
    images = torch.randn(count, 3, generator=generator(seed), dtype=torch.float64)
    permutation = torch.randperm(count, generator=generator(seed + 1))
    mixed = mixup(images, torch.tensor(weight).expand(count), permutation)
    torch.testing.assert_close(mixed.mean(0), images.mean(0), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(0, 1000))
def test_a_mixed_value_lies_between_the_two(count, seed):
    images = torch.randn(count, 4, generator=generator(seed))
    weight, permutation = sample_mixup(count, 0.5, generator=generator(seed))
    mixed, partner = mixup(images, weight, permutation), images[permutation]
    assert (mixed >= torch.minimum(images, partner) - 1e-6).all()
    assert (mixed <= torch.maximum(images, partner) + 1e-6).all()


def test_weights_of_1_and_0_give_the_sample_and_its_partner():
    images, permutation = torch.randn(3, 2), torch.tensor([1, 2, 0])
    assert torch.equal(mixup(images, torch.ones(3), permutation), images)
    assert torch.equal(mixup(images, torch.zeros(3), permutation), images[permutation])


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16], ids=str)
def test_the_input_is_untouched_unless_in_place(dtype):
    images, (weight, permutation) = images_of(dtype), sample_mixup(5, 1.0, generator=generator())
    before, address = images.clone(), images.data_ptr()
    mixed = mixup(images, weight, permutation)
    assert torch.equal(images, before)
    assert mixed.data_ptr() != address
    again = mixup(images, weight, permutation, inplace=True)
    assert again is images
    assert images.data_ptr() == address
    assert torch.equal(images, mixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_channels_last_is_kept(dtype, inplace):
    images = images_of(dtype).to(memory_format=torch.channels_last)
    mixed = mixup(images, torch.rand(5), torch.randperm(5), inplace)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("weights", "partners"), [(3, 4), (4, 3), (1, 4), (5, 5)])
def test_parameters_of_another_length_are_refused(weights, partners):
    got = (4, weights, partners)
    text = f"mixup: weight and permutation must be one for each image, got {got}. Draw them with sample_mixup(len("
    with pytest.raises(ValueError, match=re.escape(text)):
        mixup(torch.rand(4, 2), torch.rand(weights), torch.arange(partners))


# ------------------------------------------------------------------ drawing

# Beyond these, float32 rounds to 0 and 1.
THRESHOLDS = np.concatenate([np.logspace(-30, -3, 100), np.linspace(0.001, 0.999, 999), 1 - np.logspace(-6, -3, 50)])


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_weights_follow_the_beta_distribution(alpha, seed):
    draws = np.sort(sample_beta(alpha, (20_000,), generator(seed)).double().numpy())
    empirical = np.searchsorted(draws, THRESHOLDS, side="right") / len(draws)
    distance = np.abs(empirical - scipy.stats.beta(alpha, alpha).cdf(THRESHOLDS)).max()
    assert scipy.stats.kstwo.sf(distance, len(draws)) > 1e-3


def test_the_distribution_test_can_tell_one_alpha_from_another():
    draws = np.sort(sample_beta(0.2, (20_000,), generator()).double().numpy())
    empirical = np.searchsorted(draws, THRESHOLDS, side="right") / len(draws)
    distance = np.abs(empirical - scipy.stats.beta(0.22, 0.22).cdf(THRESHOLDS)).max()
    assert scipy.stats.kstwo.sf(distance, len(draws)) < 1e-3


@pytest.mark.parametrize("alpha", [1e-3, 1e-6, 1e-12])
def test_a_tiny_alpha_gives_0_or_1_and_never_nan(alpha):
    draws = sample_beta(alpha, (10_000,), generator())
    assert ((draws >= 0) & (draws <= 1)).all()
    ends = ((draws == 0) | (draws == 1)).double().mean()
    assert ends > 0.8
    assert scipy.stats.binomtest(int((draws > 0.5).sum()), len(draws)).pvalue > 1e-3


def test_a_huge_alpha_gives_a_half():
    assert sample_beta(1e12, (100,), generator()).tolist() == pytest.approx([0.5] * 100, abs=1e-4)


@pytest.mark.parametrize("size", [(), (3,), (2, 3)])
def test_draws_are_float32_of_the_size_asked_for(size):
    draws = sample_beta(0.5, size, generator())
    assert draws.shape == size
    assert draws.dtype == torch.float32


@pytest.mark.parametrize(
    "draw", [lambda g: sample_beta(0.2, (50,), g), lambda g: torch.stack(sample_mixup(50, 0.2, generator=g))]
)
def test_draws_come_from_the_generator_alone(draw):
    source, before = generator(7), torch.get_rng_state()
    first, second = draw(source), draw(source)
    assert torch.equal(first, draw(generator(7)))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_draws_come_from_torchs_global_one():
    torch.manual_seed(3)
    weight, permutation = sample_mixup(20, 0.2)
    torch.manual_seed(3)
    again, permutation_again = sample_mixup(20, 0.2)
    assert torch.equal(weight, again)
    assert torch.equal(permutation, permutation_again)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("per_sample", [True, False])
def test_each_sample_has_a_weight_and_one_partner(count, per_sample):
    weight, permutation = sample_mixup(count, 1.0, per_sample, generator())
    assert weight.shape == permutation.shape == (count,)
    assert weight.dtype == torch.float32
    assert permutation.dtype == torch.int64
    assert sorted(permutation.tolist()) == list(range(count))
    assert len(set(weight.tolist())) == (count if per_sample else 1)


def test_partners_are_uniform_over_all_permutations():
    source, trials = generator(), 4800
    counts = Counter(tuple(sample_mixup(4, 1.0, generator=source)[1].tolist()) for _ in range(trials))
    assert len(counts) == math.factorial(4)
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_weights_do_not_depend_on_the_partners():
    source = generator()
    draws = [sample_mixup(2, 1.0, generator=source) for _ in range(2000)]
    swapped = [float(weight[0]) for weight, permutation in draws if permutation[0] == 1]
    kept = [float(weight[0]) for weight, permutation in draws if permutation[0] == 0]
    assert scipy.stats.ks_2samp(swapped, kept).pvalue > 1e-3
