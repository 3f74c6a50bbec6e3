import math
import re

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tricks.functional import erasing
from lightning_tricks.functional.erasing import cutout, erase, erase_with_noise, sample_centers, sample_erasing


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cutout_by_loop(images, centers, size, fill):
    cut = images.clone()
    _, _, height, width = images.shape
    for n, holes in enumerate(centers.tolist()):
        for row, column in holes:
            for r in range(row - size // 2, row - size // 2 + size):
                for c in range(column - size // 2, column - size // 2 + size):
                    if 0 <= r < height and 0 <= c < width:
                        cut[n, :, r, c] = fill
    return cut


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 12),
    st.sampled_from([0.0, -1.5, 7.0]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_cutout_is_its_formula_pixel_by_pixel(count, holes, height, width, size, fill, inplace, seed):
    images = torch.rand(count, 2, height, width, generator=generator(seed)) + 1
    centers = sample_centers(count, holes, height, width, generator(seed))
    expected = cutout_by_loop(images, centers, size, fill)
    assert torch.equal(cutout(images, centers, size, fill, inplace), expected)


@pytest.mark.parametrize("size", range(1, 9))
def test_a_square_inside_the_image_cuts_exactly_its_area(size):
    images = torch.ones(1, 3, 20, 17)
    cut = cutout(images, torch.tensor([[[9, 8]]]), size)
    assert (cut == 0).sum((2, 3)).tolist() == [[size**2] * 3]


def test_a_square_larger_than_the_image_cuts_all_of_it():
    assert not cutout(torch.ones(2, 1, 4, 5), torch.tensor([[[0, 0]], [[3, 4]]]), 20).any()


def test_holes_may_overlap_and_differ_between_images():
    centers = torch.tensor([[[1, 1], [1, 2]], [[0, 0], [4, 4]]])
    images = torch.rand(2, 1, 5, 5) + 1
    assert torch.equal(cutout(images, centers, 3), cutout_by_loop(images, centers, 3, 0.0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bfloat16, torch.float64], ids=str)
def test_the_dtype_is_kept(dtype):
    images = torch.randint(1, 100, (2, 3, 6, 6)).to(dtype)
    centers = sample_centers(2, 1, 6, 6, generator())
    cut = cutout(images, centers, 3, 7.0)
    assert cut.dtype == dtype
    assert torch.equal(cut, cutout_by_loop(images, centers, 3, 7))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_input_is_untouched_unless_in_place(layout):
    images = torch.rand(3, 3, 6, 6).to(memory_format=layout) + 1
    centers, before, address = sample_centers(3, 1, 6, 6, generator()), images.clone(), images.data_ptr()
    cut = cutout(images, centers, 3)
    assert torch.equal(images, before)
    assert not torch.equal(cut, before)
    again = cutout(images, centers, 3, inplace=True)
    assert again is images
    assert images.data_ptr() == address
    assert torch.equal(images, cut)
    assert images.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", [(4,), (4, 4), (3, 4, 4), (1, 3, 4, 4, 4)], ids=str)
def test_images_of_another_number_of_dimensions_are_refused(shape):
    text = f"cutout: images must be of shape (N, C, H, W), got {shape}. Add the missing dimension, or leave this"
    with pytest.raises(ValueError, match=re.escape(text)):
        cutout(torch.ones(shape), torch.zeros(shape[0], 1, 2, dtype=torch.int64), 2)


def test_centers_are_uniform_over_the_pixels():
    height, width = 4, 7
    centers = sample_centers(3000, 2, height, width, generator()).view(-1, 2)
    counts = torch.bincount(centers[:, 0] * width + centers[:, 1], minlength=height * width)
    assert len(counts) == height * width
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_centers_come_from_the_generator_alone():
    source, before = generator(7), torch.get_rng_state()
    first, second = sample_centers(9, 2, 8, 8, source), sample_centers(9, 2, 8, 8, source)
    assert torch.equal(first, sample_centers(9, 2, 8, 8, generator(7)))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == (9, 2, 2)
    assert first.dtype == torch.int64


def test_without_a_generator_centers_come_from_torchs_global_one():
    torch.manual_seed(3)
    first = sample_centers(9, 2, 8, 8)
    torch.manual_seed(3)
    assert torch.equal(first, sample_centers(9, 2, 8, 8))


def test_a_fraction_does_not_fill_images_of_integers():
    images = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"erase: fill must be a value of torch\.uint8, got 0\.5"):
        cutout(images, torch.zeros(1, 1, 2, dtype=torch.int64), 2, fill=0.5)


@pytest.mark.parametrize(("dtype", "fill"), [(torch.uint8, 256), (torch.uint8, -1), (torch.float16, 1e6)], ids=str)
def test_a_fill_that_the_images_cannot_hold_is_refused(dtype, fill):
    text = f"erase: fill must be a value of {dtype}, got {fill}. Integers hold"
    with pytest.raises(ValueError, match=re.escape(text)):
        cutout(torch.zeros(1, 1, 4, 4, dtype=dtype), torch.zeros(1, 1, 2, dtype=torch.int64), 2, fill=fill)


# ------------------------------------------------------------------ boxes with a constant, or one for each channel

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int32]


def erase_by_loop(images, boxes, fill):
    erased = images.clone()
    for n, holes in enumerate(boxes.tolist()):
        for top, left, bottom, right in holes:
            for c in range(images.shape[1]):
                erased[n, c, top:bottom, left:right] = fill[c] if isinstance(fill, tuple) else fill
    return erased


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 5),
    st.integers(0, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from(DTYPES),
    st.sampled_from([torch.contiguous_format, torch.channels_last]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_boxes_are_erased_alike_with_slices_and_with_masks(
    count, channels, height, width, holes, dtype, layout, per_channel, seed
):
    torch.manual_seed(seed)
    images = torch.randint(10, 100, (count, channels, height, width)).to(dtype).to(memory_format=layout)
    boxes = torch.cat([sample_erasing(count, height, width, 0.7, (0.0, 1.0), (0.3, 3.0)) for _ in range(holes)], dim=1)
    fill = tuple(float(c) for c in range(channels or 3)) if per_channel else 3.0
    expected = erase_by_loop(images, boxes, fill)
    for slices in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not slices:
                patch.setattr(erasing, "pixels", lambda images: None)
            for inplace in (False, True):
                given = images.clone()
                result = erase(given, boxes, fill, inplace)
                assert (result is given) == inplace
                assert inplace or torch.equal(given, images)
                assert result.is_contiguous(memory_format=layout)
                assert torch.equal(result, expected)


@pytest.mark.parametrize("fill", [(1.0, 2.0), (1.0, 2.0, 3.0, 4.0)])
def test_as_many_values_as_channels_are_needed(fill):
    text = f"erase: fill must be 3 values, one for each channel, got {fill}. Give one number, or one for each channel."
    with pytest.raises(ValueError, match=re.escape(text)):
        erase(torch.ones(1, 3, 4, 4), torch.zeros(1, 1, 4, dtype=torch.int64), fill)


def test_a_gradient_goes_through_what_is_left():
    images, boxes = torch.rand(2, 3, 4, 4, requires_grad=True), torch.tensor([[[0, 0, 2, 3]], [[1, 1, 4, 4]]])
    erase(images, boxes, (0.0, 1.0, 2.0)).sum().backward()
    assert torch.equal(images.grad, erase_by_loop(torch.ones(2, 3, 4, 4), boxes, 0.0))
    images.grad = None
    erase_with_noise(images, boxes, torch.tensor([1, 2])).sum().backward()
    assert torch.equal(images.grad, erase_by_loop(torch.ones(2, 3, 4, 4), boxes, 0.0))


# ------------------------------------------------------------------ noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_noise_stays_inside_its_boxes_and_is_the_same_in_place(dtype, layout):
    images = torch.full((6, 3, 9, 8), 100).to(dtype).to(memory_format=layout)
    boxes, seeds = sample_erasing(6, 9, 8, 1.0, (0.3, 0.5), (0.5, 2.0), generator()), torch.arange(6)
    before = images.clone()
    noisy = erase_with_noise(images, boxes, seeds)
    assert torch.equal(images, before)
    assert erase_with_noise(images, boxes, seeds, inplace=True) is images
    assert torch.equal(images, noisy)
    assert images.is_contiguous(memory_format=layout)
    assert torch.equal(erase(noisy, boxes, 0), erase(before, boxes, 0))
    assert not torch.equal(noisy, before)


def test_noise_of_floating_images_is_standard_normal_and_of_uint8_uniform():
    boxes, seeds = torch.tensor([[[0, 0, 60, 50]]] * 2), torch.tensor([1, 2])
    noise = erase_with_noise(torch.zeros(2, 3, 60, 50), boxes, seeds)
    assert scipy.stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert not torch.equal(noise[0], noise[1])
    levels = erase_with_noise(torch.zeros(2, 3, 60, 50, dtype=torch.uint8), boxes, seeds)
    assert scipy.stats.chisquare(torch.bincount(levels.flatten().long(), minlength=256).numpy()).pvalue > 1e-3


def test_noise_leaves_torchs_generator_alone_and_is_its_seeds():
    images, boxes, before = torch.zeros(2, 1, 8, 8), torch.tensor([[[0, 0, 8, 8]]] * 2), torch.get_rng_state()
    noise = erase_with_noise(images, boxes, torch.tensor([5, 5]))
    assert torch.equal(noise[0], noise[1])
    assert torch.equal(noise[0], torch.randn(1, 8, 8, generator=generator(5)))
    assert torch.equal(torch.get_rng_state(), before)


def test_there_is_no_noise_of_other_integers():
    text = "erase_with_noise: images must be floating or uint8, got torch.int64. Convert them, or fill with a number."
    with pytest.raises(TypeError, match=re.escape(text)):
        erase_with_noise(torch.zeros(1, 1, 4, 4, dtype=torch.int64), torch.zeros(1, 1, 4), torch.zeros(1))


@pytest.mark.parametrize("shape", [(3, 4), (2, 1, 4), (3, 1, 2)], ids=str)
def test_boxes_of_another_number_are_refused(shape):
    images, boxes = torch.zeros(3, 1, 4, 4), torch.zeros(shape, dtype=torch.int64)
    for name, apply in (("erase", erase), ("erase_with_noise", erase_with_noise)):
        text = f"{name}: boxes must be of shape (3, holes, 4), got {shape}. Draw them with sample_erasing("
        with pytest.raises(ValueError, match=re.escape(text)):
            apply(images, boxes, 0.0)


# ------------------------------------------------------------------ drawing the boxes of random erasing


def sides_of(boxes):
    return (boxes[:, 0, 2:] - boxes[:, 0, :2]).double()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from([(0.0, 1.0), (0.02, 0.33), (0.5, 0.5), (1.0, 1.0), (0.0, 0.0)]),
    st.sampled_from([(0.3, 3.3), (1.0, 1.0), (20.0, 30.0)]),
    st.integers(0, 1000),
)
def test_boxes_lie_inside_the_image_and_have_the_area_asked_for(count, height, width, scale, ratio, seed):
    boxes = sample_erasing(count, height, width, 1.0, scale, ratio, generator(seed))
    assert boxes.shape == (count, 1, 4)
    assert boxes.dtype == torch.int64
    assert (boxes >= 0).all()
    assert (boxes[:, 0, 2:] <= torch.tensor([height, width])).all()
    for rows, columns in sides_of(boxes).tolist():
        if rows:
            # Each side is rounded by at most half a pixel.
            assert (rows - 0.5) * (columns - 0.5) <= scale[1] * height * width + 1e-6
            assert (rows + 0.5) * (columns + 0.5) >= scale[0] * height * width - 1e-6
            assert (rows - 0.5) / (columns + 0.5) <= ratio[1] + 1e-9
            assert (rows + 0.5) / (columns - 0.5) >= ratio[0] - 1e-9


def test_areas_and_ratios_and_places_follow_their_distributions():
    size = 10_000
    boxes = sample_erasing(4000, size, size, 1.0, (0.02, 0.2), (0.5, 3.0), generator())
    sides = sides_of(boxes)
    share, stretch = (sides[:, 0] * sides[:, 1] / size**2 - 0.02) / 0.18, (sides[:, 0] / sides[:, 1]).log()
    stretch = (stretch - math.log(0.5)) / math.log(6.0)
    for place in (*(boxes[:, 0, :2] / (size - sides + 1)).T, share, stretch):
        assert scipy.stats.kstest(place.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("prob", [0.0, 0.25, 1.0])
def test_the_share_of_erased_images_is_the_probability(prob):
    boxes = sample_erasing(4000, 32, 32, prob, (0.1, 0.2), (0.5, 2.0), generator())
    erased = boxes.any(dim=2).sum().item()
    assert scipy.stats.binomtest(erased, 4000, prob).pvalue > 1e-3


def test_of_ten_boxes_the_first_that_fits_is_taken_and_without_one_nothing_is_erased():
    never = sample_erasing(100, 10, 1000, 1.0, (0.5, 0.5), (1.0, 1.0), generator())
    assert not never.any()
    # A box of half a square image with a ratio uniform in its logarithm on [1/8, 8] fits if it is in [1/2, 2].
    sometimes = sample_erasing(4000, 1000, 1000, 1.0, (0.5, 0.5), (1 / 8, 8.0), generator())
    missing = (~sometimes.any(dim=2)).sum().item()
    assert scipy.stats.binomtest(missing, 4000, (2 / 3) ** 10).pvalue > 1e-3
    sides = sides_of(sometimes[sometimes.any(dim=2).flatten()])
    stretch = ((sides[:, 0] / sides[:, 1]).log() / math.log(2) + 1) / 2
    assert scipy.stats.kstest(stretch.numpy(), "uniform").pvalue > 1e-3


def test_as_many_numbers_are_drawn_whatever_comes_of_them():
    after = []
    for height, width, prob, scale in [(1, 1, 0.0, (1.0, 1.0)), (32, 48, 1.0, (0.1, 0.2)), (10, 1000, 1.0, (0.5, 0.5))]:
        source = generator(5)
        sample_erasing(7, height, width, prob, scale, (0.5, 2.0), source)
        after.append(torch.rand(4, generator=source).tolist())
    assert after[0] == after[1] == after[2]
