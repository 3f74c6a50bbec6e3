import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tricks.functional.mixing import sample_cutmix, sample_mixup
from lightning_tricks.labels import MixedLabels, soft_targets
from lightning_tricks.transforms.mixing import CutMix, Mixup

K = 5
both = pytest.mark.parametrize("transform", [Mixup(0.7), Mixup(0.7, per_sample=False), CutMix(), CutMix(0.5, False)])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def colours(labels, size=(9, 11)):
    """Images whose K channels are everywhere the one-hot code of their label, so that their mean is the target."""
    return F.one_hot(labels, K).float().view(-1, K, 1, 1).expand(-1, K, *size).contiguous()


# ------------------------------------------------------------------ what peers get wrong


@both
@pytest.mark.parametrize("count", [1, 3, 7])
def test_an_odd_batch_is_mixed_where_timm_refuses_it(transform, count):
    """timm #1304: Mixup asserts that the number of images is even."""
    labels = torch.arange(count) % K
    images, mixed = transform(colours(labels), labels, generator())
    torch.testing.assert_close(images.mean((2, 3)), soft_targets(mixed, K))


@both
def test_the_input_is_kept_where_timm_overwrites_it(transform):
    labels = torch.arange(6) % K
    images = colours(labels)
    kept = images.clone()
    mixed, _ = transform(images, labels, generator())
    assert torch.equal(images, kept)
    assert torch.equal(labels, torch.arange(6) % K)
    assert not torch.equal(mixed, kept)


@both
def test_floating_targets_of_8_by_5_stay_8_by_5_where_timm_makes_40_rows_of_them(transform):
    targets = torch.rand(8, 5)
    images = targets.view(8, 5, 1, 1).expand(8, 5, 6, 7).contiguous()
    mixed, mixed_targets = transform(images, targets, generator())
    assert mixed_targets.shape == (8, 5)
    assert type(mixed_targets) is torch.Tensor
    torch.testing.assert_close(mixed.mean((2, 3)), mixed_targets)


def test_each_image_has_a_cut_of_its_own_where_kornia_cut_all_at_one_place():
    """kornia #4712: one position for the whole batch."""
    images = torch.arange(16.0).view(16, 1, 1, 1).expand(16, 1, 32, 32).contiguous()
    pasted = CutMix()(images, None, generator())[0] != images
    assert len({tuple(mask.flatten().tolist()) for mask in pasted}) >= 12


def test_the_weight_is_that_of_the_pixels_pasted_where_others_forget_the_border():
    """timm #8: the weight must be corrected where the box is clipped."""
    labels = torch.arange(12) % K
    _, mixed = CutMix()(colours(labels), labels, generator())
    _, uncorrected = Mixup(1.0)(colours(labels), labels, generator())  # the same draws of Beta
    assert (mixed.components[0][1] >= uncorrected.components[0][1] - 1e-6).all()
    assert (mixed.components[0][1] > uncorrected.components[0][1] + 0.05).any()


def test_the_weight_is_the_share_of_the_original_where_kornia_gives_the_share_of_the_other():
    labels = torch.arange(12)
    images = labels.float().view(12, 1, 1, 1).expand(12, 1, 10, 10).contiguous()
    pasted, mixed = CutMix()(images, labels, generator())
    torch.testing.assert_close(mixed.components[0][1], (pasted == images).float().mean((1, 2, 3)))


def test_the_weights_of_a_mixup_are_beta_where_kornia_draws_them_uniformly():
    labels = torch.zeros(4000, dtype=torch.int64)
    shares = Mixup(0.2)(torch.zeros(4000, 1), labels, generator())[1].components[0][1]
    middle = ((shares > 0.25) & (shares < 0.75)).float().mean()
    assert 0.1 < middle < 0.2  # Beta(0.2, 0.2) has 0.155 there, a uniform weight 0.5


# ------------------------------------------------------------------ labels


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 999),
)
def test_the_target_is_the_mean_over_the_pixels(count, height, width, is_cutmix, per_sample, inplace, seed):
    transform = CutMix(0.8, per_sample) if is_cutmix else Mixup(0.8, per_sample)
    labels = torch.randint(K, (count,), generator=generator(seed))
    images, mixed = transform(colours(labels, (height, width)), labels, generator(seed), inplace)
    assert type(mixed) is MixedLabels
    torch.testing.assert_close(images.mean((2, 3)), soft_targets(mixed, K), rtol=1e-4, atol=1e-5)


def test_cutmix_of_a_mixup_keeps_both_mixes():
    labels = torch.arange(8) % K
    images, mixed = colours(labels), labels
    for transform in (Mixup(1.0), CutMix()):
        images, mixed = transform(images, mixed, generator())
    torch.testing.assert_close(images.mean((2, 3)), soft_targets(mixed, K))


MASKS = {
    "integers": lambda images: images[:, 0].long(),
    "floats": lambda images: images[:, :2].clone(),
    "mixed": lambda images: MixedLabels(images[:, 0].long(), images[:, 1].long(), torch.full((7, 1, 1), 0.7)),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("inplace", [False, True])
def test_cutmix_pastes_masks_as_it_pastes_the_images(kind, inplace):
    images = torch.randint(K, (7, 3, 12, 10)).float()
    images, masks = CutMix()(images, MASKS[kind](images), generator(), inplace)
    expected = MASKS[kind](images)
    assert type(masks) is type(expected)
    if kind == "mixed":
        assert torch.equal(soft_targets(masks, K), soft_targets(expected, K))
    else:
        assert torch.equal(masks, expected)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_pasted_mask_brings_the_shares_of_its_mix_along(share):
    images = torch.randint(K, (7, 3, 12, 10)).float()
    shares = torch.linspace(0.1, share, 7).view(7, 1, 1)
    masks = MixedLabels(images[:, 0].long(), images[:, 1].long(), shares)
    with_shares = torch.cat([images, shares.unsqueeze(1).expand(7, 1, 12, 10)], dim=1)
    pasted, mixed = CutMix()(with_shares, masks, generator())
    expected = MixedLabels(pasted[:, 0].long(), pasted[:, 1].long(), pasted[:, 3])
    torch.testing.assert_close(soft_targets(mixed, K), soft_targets(expected, K))


@both
def test_a_batch_without_channels_takes_the_same_draws(transform):
    images, targets = torch.rand(7, 3, 12, 10), torch.arange(7)
    _, expected = transform(images, targets, generator())
    empty, labels = transform(images[:, :0], targets, generator())
    assert empty.shape == (7, 0, 12, 10)
    for a, b in zip(labels.components, expected.components, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    for dtype in (torch.uint8, torch.float64):
        source = generator()
        transform(images.to(dtype), None, source)
        other = generator()
        transform(images[:, :0], targets, other)
        assert torch.equal(source.get_state(), other.get_state())


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize("size", [8, 130])
def test_the_dtype_and_the_layout_are_kept_and_in_place_is_the_same(transform, dtype, size):
    images = torch.randint(255, (5, 3, size, size)).to(dtype).to(memory_format=torch.channels_last)
    labels = torch.arange(5)
    expected, _ = transform(images, labels, generator())
    address = images.data_ptr()
    mixed, _ = transform(images, labels, generator(), inplace=True)
    assert mixed is images
    assert images.data_ptr() == address
    assert torch.equal(mixed, expected)
    for result in (mixed, expected):
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_the_transforms_are_their_samples_applied():
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6)
    _, mixed = Mixup(0.3)(images, labels, generator())
    weight, permutation = sample_mixup(6, 0.3, generator=generator())
    assert torch.equal(mixed.components[0][1], weight)
    assert torch.equal(mixed.components[1][0], permutation)
    _, mixed = CutMix(0.3)(images, labels, generator())
    _, weight, permutation = sample_cutmix(6, 8, 8, 0.3, generator=generator())
    assert torch.equal(mixed.components[0][1], weight)
    assert torch.equal(mixed.components[1][0], permutation)


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("kind", [Mixup, CutMix])
def test_a_strength_scales_alpha(kind):
    assert kind(0.4, per_sample=False).scaled(0.5) == kind(0.2, per_sample=False)
    assert kind(0.4).scaled(2) == kind(0.8)
    assert kind(0.4).scaled(1) == kind(0.4)
    for value, error in [(0, ValueError), (-1.0, ValueError), (math.nan, ValueError), ("1", TypeError)]:
        with pytest.raises(error, match=rf"{kind.__name__}: strength must be .*above 0, got {value!r}\. Leave"):
            kind().scaled(value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_alpha_must_be_above_0(value):
    with pytest.raises(ValueError, match=re.escape(f"CutMix: alpha must be above 0, got {value!r}. Try 1.0.")):
        CutMix(value)


@pytest.mark.parametrize("kind", [Mixup, CutMix])
def test_per_sample_must_be_true_or_false(kind):
    with pytest.raises(TypeError, match=f"{kind.__name__}: per_sample must be True or False, got 0"):
        kind(per_sample=0)


@pytest.mark.parametrize("shape", [(4,), (3, 8, 8), (2, 3, 4, 8, 8)], ids=str)
def test_cutmix_is_for_images(shape):
    with pytest.raises(ValueError, match=re.escape(f"CutMix: images must be of shape (N, C, H, W), got {shape}.")):
        CutMix()(torch.ones(shape), None)


@pytest.mark.parametrize("labels", [torch.zeros(4, 8, 8).long(), torch.zeros(4, 7, 4), torch.zeros(4, 1, 2, 9, 9)])
def test_boxes_and_masks_of_another_size_are_not_mixed_by_the_area(labels):
    text = "CutMix: labels must be of whole images, (N,) or (N, K), or masks of 32 x 32 pixels, got"
    with pytest.raises(ValueError, match=re.escape(text)):
        CutMix()(torch.rand(4, 3, 32, 32), labels)


@both
@pytest.mark.parametrize("count", [3, 5])
def test_labels_of_another_number_are_refused(transform, count):
    with pytest.raises(ValueError, match="labels must be one for each image, got"):
        transform(torch.rand(4, 3, 8, 8), torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize("alpha", [5e-324, 1e-310, 1e-200])
def test_the_tiniest_alpha_mixes_nothing(alpha):
    images = torch.rand(64, 1, 4, 4)
    mixed, _ = Mixup(alpha)(images, None, generator())
    assert all(any(torch.equal(image, other) for other in images) for image in mixed)
