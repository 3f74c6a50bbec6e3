import re

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tricks.functional.erasing import cutout, sample_centers


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
    with pytest.raises(ValueError, match=r"cutout: fill must be a value of torch\.uint8, got 0\.5"):
        cutout(images, torch.zeros(1, 1, 2, dtype=torch.int64), 2, fill=0.5)
