import re
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tricks.functional import mixing
from lightning_tricks.functional.mixing import cutmix, mixup, sample_beta, sample_cutmix, sample_mixup, sample_partners


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


def test_weights_do_not_depend_on_the_partners():
    source = generator()
    draws = [sample_mixup(4, 1.0, generator=source) for _ in range(3000)]
    first = [float(weight[0]) for weight, permutation in draws if permutation[0] == 1]
    others = [float(weight[0]) for weight, permutation in draws if permutation[0] != 1]
    assert scipy.stats.ks_2samp(first, others).pvalue > 1e-3


# ------------------------------------------------------------------ partners


def lengths_of_cycles(permutation):
    lengths, left = [], set(range(len(permutation)))
    while left:
        start = sample = min(left)
        length = 0
        while length == 0 or sample != start:
            left.discard(sample)
            sample, length = int(permutation[sample]), length + 1
        lengths.append(length)
    return sorted(lengths)


@pytest.mark.parametrize(
    ("count", "lengths"), [(1, [1]), (2, [2]), (3, [3]), (4, [2, 2]), (5, [2, 3]), (8, [2] * 4), (9, [2, 2, 2, 3])]
)
def test_samples_are_each_others_partners_and_of_an_odd_number_three_go_round(count, lengths):
    for seed in range(20):
        assert lengths_of_cycles(sample_partners(count, generator(seed))) == lengths


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9])
def test_a_partner_is_uniform_over_the_other_samples(count):
    source, trials = generator(), 1500
    counts = torch.zeros(count, count)
    for _ in range(trials):
        counts[torch.arange(count), sample_partners(count, source)] += 1
    assert not counts.diagonal().any()
    for sample in range(count):
        others = np.delete(counts[sample].numpy(), sample)
        assert count == 2 or scipy.stats.chisquare(others).pvalue > 1e-4


@pytest.mark.parametrize(("count", "arrangements"), [(4, 3), (5, 20), (6, 15)])
def test_each_way_to_pair_samples_is_as_likely(count, arrangements):
    source = generator()
    counts = Counter(tuple(sample_partners(count, source).tolist()) for _ in range(150 * arrangements))
    assert len(counts) == arrangements
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 1e-3


# ------------------------------------------------------------------ all at once, or one after another

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int64]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def in_both_ways(apply, images):
    """What is made of images in turn and all at once, in place and not; each from a copy of its own."""
    for large in (1, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mixing, "LARGE", large)
            if large > 1:
                patch.setattr(mixing, "pixels", lambda images: None)
            for inplace in (False, True):
                given = images.clone()
                result = apply(given, inplace)
                assert (result is given) == inplace
                assert inplace or torch.equal(given, images)
                for layout in LAYOUTS if images.dim() == 4 and images.numel() else ():
                    assert result.is_contiguous(memory_format=layout) == images.is_contiguous(memory_format=layout)
                yield result


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 9),
    st.integers(0, 4),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.integers(0, 1000),
)
def test_mixup_gives_the_same_bits_in_turn_and_all_at_once(count, channels, height, width, dtype, layout, any_, seed):
    torch.manual_seed(seed)
    images = images_of(dtype, (count, channels, height, width)).to(memory_format=layout)
    weight, permutation = sample_mixup(count, 0.5)
    permutation = torch.randperm(count) if any_ else permutation
    results = list(in_both_ways(lambda given, inplace: mixup(given, weight, permutation, inplace), images))
    assert all(torch.equal(result, results[0]) for result in results[1:])
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0.5
    expected = mixup_by_loop(images, weight, permutation)
    torch.testing.assert_close(results[0].double(), expected, rtol=4 * max(eps, 1e-7), atol=4 * max(eps, 1e-7))


def test_a_list_of_partners_that_is_no_permutation_is_followed_all_the_same():
    images, weight, partners = torch.randn(4, 3), torch.rand(4), torch.tensor([1, 1, 1, 0])
    for result in in_both_ways(lambda given, inplace: mixup(given, weight, partners, inplace), images):
        torch.testing.assert_close(result.double(), mixup_by_loop(images, weight, partners))
    boxes = torch.tensor([[0, 0, 2, 2]] * 4)
    images = torch.randn(4, 1, 3, 3)
    for result in in_both_ways(lambda given, inplace: cutmix(given, boxes, partners, inplace), images):
        assert torch.equal(result, cutmix_by_loop(images, boxes, partners))


def test_numbers_of_16_bits_are_mixed_with_weights_of_32_and_rounded_once():
    images, weight = torch.tensor([[0.0], [256.0]], dtype=torch.bfloat16), torch.tensor([0.505, 0.505])
    expected = torch.tensor([[126.5], [129.0]], dtype=torch.bfloat16)  # 126.72 and 129.28
    assert 256 * (1 - weight.bfloat16()[0]) == 127
    for result in in_both_ways(lambda given, inplace: mixup(given, weight, torch.tensor([1, 0]), inplace), images):
        assert torch.equal(result, expected)


def test_a_gradient_goes_through_a_mix():
    for shape in [(3, 2, 4, 4), (3, 2**9, 8, 8)]:
        images, weight, permutation = torch.randn(shape, requires_grad=True), torch.rand(3), torch.tensor([1, 2, 0])
        mixup(images, weight, permutation).sum().backward()
        shares = weight + (1 - weight)[[2, 0, 1]]
        torch.testing.assert_close(images.grad, shares.view(3, 1, 1, 1).expand(shape))
        images.grad = None
        cutmix(images, torch.tensor([[0, 0, 2, 2]] * 3), permutation).sum().backward()
        assert torch.equal(images.grad, torch.ones(shape))


@pytest.mark.parametrize("inplace", [False, True])
def test_large_images_are_mixed_one_after_another(inplace, monkeypatch):
    calls = []
    monkeypatch.setattr(mixing, "_partners", lambda *args: calls.append(args))
    images, weight, permutation = torch.rand(3, 2, 128, 128), torch.rand(3), torch.tensor([1, 2, 0])
    expected = mixup_by_loop(images, weight, permutation)
    torch.testing.assert_close(mixup(images, weight, permutation, inplace).double(), expected, rtol=0, atol=1e-6)
    assert not calls


# ------------------------------------------------------------------ cutmix


def cutmix_by_loop(images, boxes, permutation):
    pasted = images.clone()
    for n, (top, left, bottom, right) in enumerate(boxes.tolist()):
        for r in range(top, bottom):
            for c in range(left, right):
                pasted[n, ..., r, c] = images[permutation[n], ..., r, c]
    return pasted


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 7),
    st.sampled_from([(), (0,), (1,), (3,), (2, 2)]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([*DTYPES, torch.bool]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_cutmix_is_its_formula_pixel_by_pixel(count, between, height, width, dtype, channels_last, any_, seed):
    torch.manual_seed(seed)
    images = images_of(dtype, (count, *between, height, width))
    if channels_last and len(between) == 1:
        images = images.to(memory_format=torch.channels_last)
    boxes, _, permutation = sample_cutmix(count, height, width, 1.0)
    permutation = torch.randperm(count) if any_ else permutation
    expected = cutmix_by_loop(images, boxes, permutation)
    for result in in_both_ways(lambda given, inplace: cutmix(given, boxes, permutation, inplace), images):
        assert result.dtype == dtype
        assert torch.equal(result, expected)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 1000))
def test_the_weight_of_a_cutmix_is_exactly_the_area_that_was_not_pasted(count, height, width, per_sample, seed):
    boxes, weight, permutation = sample_cutmix(count, height, width, 1.0, per_sample, generator(seed))
    images = torch.arange(count).view(-1, 1, 1).expand(count, height, width).contiguous()
    pasted = cutmix(images, boxes, permutation)
    kept = (pasted == images).sum((1, 2)) if count > 1 else None
    area = torch.tensor([(bottom - top) * (right - left) for top, left, bottom, right in boxes.tolist()])
    assert kept is None or torch.equal(kept, height * width - area)
    assert torch.equal(weight, (1 - area.double() / (height * width)).float())
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= torch.tensor([height, width])).all()


@pytest.mark.parametrize("alpha", [0.3, 1.0, 3.0])
def test_sides_of_boxes_follow_the_beta_distribution(alpha, monkeypatch):
    centre = torch.tensor([[[50_000, 50_000]]])
    monkeypatch.setattr(mixing, "sample_centers", lambda count, *rest: centre.expand(count, 1, 2))
    boxes, weight, _ = sample_cutmix(5000, 100_001, 100_001, alpha, generator=generator())
    law = scipy.stats.beta(alpha, alpha)
    assert scipy.stats.kstest(weight.double().numpy(), law.cdf).pvalue > 1e-3
    sides = (boxes[:, 2:] - boxes[:, :2]).double() / 100_001
    torch.testing.assert_close(sides[:, 0] ** 2, 1 - weight.double(), rtol=0, atol=1e-4)


def test_box_centres_are_uniform_over_the_pixels(monkeypatch):
    monkeypatch.setattr(mixing, "sample_beta", lambda alpha, size, generator: torch.full(size, 0.96))
    boxes, _, _ = sample_cutmix(4000, 6, 7, 1.0, generator=generator())  # sides of one pixel
    counts = torch.bincount(boxes[:, 0] * 7 + boxes[:, 1], minlength=42)
    assert len(counts) == 42
    assert ((boxes[:, 2:] - boxes[:, :2]) == 1).all()
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("per_sample", [True, False])
def test_each_image_has_a_box_of_its_own_or_all_have_one(per_sample):
    boxes, weight, permutation = sample_cutmix(8, 64, 64, 1.0, per_sample, generator())
    assert boxes.shape == (8, 4)
    assert (boxes.dtype, weight.dtype, permutation.dtype) == (torch.int64, torch.float32, torch.int64)
    assert len({tuple(box) for box in boxes.tolist()}) == len(set(weight.tolist())) == (8 if per_sample else 1)


@pytest.mark.parametrize("per_sample", [True, False])
def test_as_many_numbers_are_drawn_whatever_the_size_of_the_images(per_sample):
    after = []
    for height, width in [(1, 1), (32, 48), (5000, 3)]:
        source = generator(5)
        _, _, permutation = sample_cutmix(7, height, width, 0.7, per_sample, source)
        after.append((permutation.tolist(), torch.rand(4, generator=source).tolist()))
    assert after[0] == after[1] == after[2]


@pytest.mark.parametrize(("boxes", "partners"), [(3, 4), (4, 3), (1, 4), (5, 5)])
def test_boxes_of_another_number_are_refused(boxes, partners):
    text = f"cutmix: boxes and permutation must be one for each image, got {(4, boxes, partners)}. Draw them with"
    with pytest.raises(ValueError, match=re.escape(text)):
        cutmix(torch.rand(4, 1, 3, 3), torch.zeros(boxes, 4, dtype=torch.int64), torch.arange(partners))


def test_images_without_height_and_width_are_not_cut():
    with pytest.raises(
        ValueError, match=re.escape("cutmix: images must be of shape (N, ..., H, W), got (4, 3). Boxes")
    ):
        cutmix(torch.rand(4, 3), torch.zeros(4, 4, dtype=torch.int64), torch.arange(4))
