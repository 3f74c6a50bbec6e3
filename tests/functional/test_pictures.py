import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_tricks.functional.pictures import picture_grid, png


def by_hand(images, columns):
    """The grid pixel by pixel, of images in [0, 255]."""
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = torch.zeros(3, rows * (height + 2) + 2, columns * (width + 2) + 2)
    for n in range(count):
        for c in range(3):
            for y in range(height):
                for x in range(width):
                    value = images[n, c if channels == 3 else 0, y, x]
                    grid[c, 2 + (n // columns) * (height + 2) + y, 2 + (n % columns) * (width + 2) + x] = value
    return grid.to(torch.uint8)


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_grid_has_each_image_in_its_place(count, channels, height, width, columns):
    images = torch.randint(256, (count, channels, height, width), dtype=torch.uint8)
    assert torch.equal(picture_grid(images, columns), by_hand(images, columns))


def test_floats_in_the_unit_range_keep_their_brightness():
    images = torch.tensor([0.25, 0.5]).view(2, 1, 1, 1)
    assert picture_grid(images)[0, 2, [2, 5]].tolist() == [64, 128]


def test_floats_outside_are_stretched_from_their_own_range():
    images = torch.tensor([-1.0, 0.0, 3.0]).view(3, 1, 1, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        assert picture_grid(images.to(dtype))[0, 2, [2, 5, 8]].tolist() == [0, 64, 255]


def test_values_that_are_not_finite_and_images_of_one_value():
    images = torch.tensor([torch.nan, -torch.inf, torch.inf, 0.0, 2.0]).view(5, 1, 1, 1)
    assert picture_grid(images)[0, 2, [2, 5, 8, 11, 14]].tolist() == [0, 0, 255, 0, 255]
    assert picture_grid(torch.full((1, 1, 1, 1), torch.nan))[0, 2, 2] == 0
    assert picture_grid(torch.full((1, 3, 1, 1), 7.0))[0, 2, 2] == 0


def test_images_are_left_as_they_are():
    images = torch.randn(2, 3, 4, 4)
    before = images.clone()
    picture_grid(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("images", "columns", "error", "text"),
    [
        (torch.zeros(3, 4, 4), 8, ValueError, r"images must be of shape \(N, C, H, W\)"),
        (torch.zeros(0, 3, 4, 4), 8, ValueError, "images must be at least one, of one channel"),
        (torch.zeros(2, 0, 4, 4), 8, ValueError, "images must be at least one, of one channel"),
        (torch.zeros(2, 3, 4, 4), 0, ValueError, "columns must be a whole number of at least 1"),
    ],
)
def test_bad_arguments(images, columns, error, text):
    with pytest.raises(error, match=f"picture_grid: {text}"):
        picture_grid(images, columns)


@given(st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_file_is_read_back_by_another_program(height, width):
    picture = torch.randint(256, (3, height, width), dtype=torch.uint8)
    image = Image.open(io.BytesIO(png(picture)))
    assert image.mode == "RGB"
    assert torch.equal(torch.from_numpy(np.array(image)).movedim(-1, 0), picture)
