import re
from fractions import Fraction

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tricks.functional.geometry import (
    crop,
    flip,
    holds,
    resized_crop,
    sample_crops,
    sample_flips,
    sample_resized_crops,
)

DTYPES = [torch.uint8, torch.float32, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(shape, dtype=torch.uint8, seed=0, layout=torch.contiguous_format):
    return torch.randint(0, 256, shape, generator=generator(seed)).to(dtype).to(memory_format=layout)


def pixel(image, row, column, mode, fill):
    """The pixel at a place that may lie outside, as a list over the channels."""
    _, height, width = image.shape
    if mode == "edge":
        row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
    if mode == "reflect":
        row, column = (-i if i < 0 else 2 * (n - 1) - i if i >= n else i for i, n in ((row, height), (column, width)))
    inside = 0 <= row < height and 0 <= column < width
    return image[:, row, column] if inside else torch.full((len(image),), fill, dtype=image.dtype)


def crop_by_loop(images, corners, size, padding, mode, fill):
    result = torch.empty((*images.shape[:2], *size), dtype=images.dtype)
    for n, (top, left) in enumerate(corners.tolist()):
        for r in range(size[0]):
            for c in range(size[1]):
                place = top + r - padding[0], left + c - padding[1]
                result[n, :, r, c] = pixel(images[n], *place, mode, fill)
    return result


def boxes_by_loop(area, log_aspect, places, height, width, scale, ratio):
    """torchvision's algorithm, image by image, from the numbers drawn."""
    boxes = []
    for n in range(area.shape[1]):
        for attempt in range(10):
            target = height * width * (scale[0] + (scale[1] - scale[0]) * area[attempt, n])
            low, high = torch.tensor(ratio, dtype=torch.float64).log()
            aspect = (low + (high - low) * log_aspect[attempt, n]).exp()
            w, h = round((target * aspect).sqrt().item()), round((target / aspect).sqrt().item())
            if 0 < w <= width and 0 < h <= height:
                boxes.append([int(places[0, n] * (height - h + 1)), int(places[1, n] * (width - w + 1)), h, w])
                break
        else:
            h, w = height, width
            if width / height < ratio[0]:
                h = max(1, round(width / ratio[0]))
            elif width / height > ratio[1]:
                w = max(1, round(height * ratio[1]))
            boxes.append([(height - h) // 2, (width - w) // 2, h, w])
    return torch.tensor(boxes)


def triangle_weights(length, size):
    """(size, length) weights of antialiased bilinear interpolation, from the definition."""
    ratio = length / size
    support = max(ratio, 1.0)
    weights = torch.zeros(size, length, dtype=torch.float64)
    for i in range(size):
        for j in range(length):
            weights[i, j] = max(0.0, 1 - abs(j + 0.5 - ratio * (i + 0.5)) / support)
    return weights / weights.sum(1, keepdim=True)


# ------------------------------------------------------------------ flips


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5),
    st.integers(0, 3),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from(DTYPES),
    st.sampled_from(["horizontal", "vertical"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_a_flip_is_its_formula_pixel_by_pixel(count, channels, height, width, dtype, axis, inplace, seed):
    images = pictures((count, channels, height, width), dtype, seed)
    flips = sample_flips(count, 0.5, generator(seed))
    expected = images.clone()
    for n, r, c in torch.cartesian_prod(*map(torch.arange, (count, height, width))).tolist():
        if flips[n]:
            source = (r, width - 1 - c) if axis == "horizontal" else (height - 1 - r, c)
            expected[n, :, r, c] = images[n, :, source[0], source[1]]
    before = images.clone()
    result = flip(images, flips, axis, inplace)
    assert torch.equal(result, expected)
    assert (result is images) == inplace
    assert torch.equal(images, expected if inplace else before)


@every_layout
@pytest.mark.parametrize("inplace", [False, True])
def test_a_flip_keeps_the_memory_format(layout, inplace):
    images = pictures((4, 3, 5, 6), layout=layout)
    assert flip(images, torch.tensor([True, False, True, True]), inplace=inplace).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("prob", [0.0, 0.3, 0.5, 1.0])
def test_flips_are_as_frequent_as_they_should_be(prob):
    flips = sample_flips(4000, prob, generator())
    assert flips.dtype == torch.bool
    assert scipy.stats.binomtest(int(flips.sum()), 4000, prob).pvalue > 1e-3


# ------------------------------------------------------------------ crops


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 4),
    st.integers(0, 3),
    st.tuples(st.integers(2, 6), st.integers(2, 6)),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.sampled_from(["constant", "reflect", "edge"]),
    st.sampled_from([torch.uint8, torch.int64, torch.bool, torch.float32, torch.bfloat16]),
    st.sampled_from([0, 1]),
    st.integers(0, 99),
    st.data(),
)
def test_a_crop_is_its_formula_pixel_by_pixel(count, channels, sides, padding, mode, dtype, fill, seed, data):
    if mode == "reflect":
        padding = (min(padding[0], sides[0] - 1), min(padding[1], sides[1] - 1))
    size = tuple(data.draw(st.integers(1, side + 2 * more)) for side, more in zip(sides, padding, strict=True))
    images = pictures((count, channels, *sides), dtype, seed)
    before = images.clone()
    corners = sample_crops(count, sides[0] + 2 * padding[0], sides[1] + 2 * padding[1], size, generator(seed))
    result = crop(images, corners, size, padding, mode, fill)
    assert result.dtype == dtype
    assert torch.equal(result, crop_by_loop(images, corners, size, padding, mode, fill))
    assert torch.equal(images, before)


def test_a_batch_larger_than_what_is_worked_on_at_once_is_cropped_in_order():
    images = pictures((7, 3, 300, 301))
    corners = sample_crops(7, 304, 305, (290, 280), generator())
    result = crop(images, corners, (290, 280), (2, 2), "edge")
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="replicate").to(torch.uint8)
    for n, (row, column) in enumerate(corners.tolist()):
        assert torch.equal(result[n], padded[n, :, row : row + 290, column : column + 280])


@every_layout
@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
@pytest.mark.parametrize("padding", [(0, 0), (2, 1)])
def test_a_crop_keeps_the_memory_format_and_never_aliases(layout, mode, padding):
    images = pictures((4, 3, 8, 9), layout=layout)
    whole = crop(images, torch.zeros(4, 2, dtype=torch.int64), (8, 9), padding, mode)
    assert whole.is_contiguous(memory_format=layout)
    assert whole.data_ptr() != images.data_ptr()


def test_corners_are_uniform_over_the_places_that_fit():
    corners = sample_crops(3000, 6, 9, (3, 4), generator())
    assert corners.dtype == torch.int64
    counts = torch.bincount(corners[:, 0] * 6 + corners[:, 1], minlength=24)
    assert len(counts) == 24
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("size", [(9, 3), (3, 10)])
def test_a_crop_larger_than_the_padded_image_is_refused(size):
    text = f"RandomCrop: size must be at most (8, 9), an image with its padding (pixels), got {size}. Give more padding"
    with pytest.raises(ValueError, match=re.escape(text)):
        sample_crops(2, 8, 9, size)


def test_more_than_an_image_has_is_not_reflected():
    text = (
        "RandomCrop: padding must be at most (3, 4) to reflect images of (4, 5) (pixels), got (1, 5). Pad less, or by"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        crop(pictures((1, 3, 4, 5)), torch.zeros(1, 2, dtype=torch.int64), (2, 2), (1, 5), "reflect")


@pytest.mark.parametrize("fill", [0.5, -1, 256])
def test_a_fill_that_bytes_cannot_hold_is_refused(fill):
    text = f"crop: fill must be a value of torch.uint8, got {fill}. Images of integers take one of their own values."
    with pytest.raises(ValueError, match=re.escape(text)):
        crop(pictures((1, 3, 4, 5)), torch.zeros(1, 2, dtype=torch.int64), (2, 2), (1, 1), "constant", fill)


@pytest.mark.parametrize(
    ("dtype", "value", "held"),
    [
        (torch.uint8, 255, True),
        (torch.uint8, -100, False),
        (torch.int64, -100, True),
        (torch.int64, 0.5, False),
        (torch.int64, float("nan"), False),
        (torch.bool, 1, True),
        (torch.bool, 2, False),
        (torch.float16, float("nan"), True),
        (torch.complex64, 0.5, True),
    ],
)
def test_what_a_dtype_holds(dtype, value, held):
    assert holds(dtype, value) is held


# ------------------------------------------------------------------ resized crops


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([(0.08, 1.0), (0.5, 0.5), (0.9, 1.0), (1e-4, 1e-3)]),
    st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (2.0, 4.0), (0.1, 0.2)]),
    st.integers(0, 999),
)
def test_boxes_are_those_of_the_loop_over_images_and_attempts(height, width, scale, ratio, seed):
    boxes = sample_resized_crops(9, height, width, scale, ratio, generator(seed))
    source = generator(seed)
    uniform = torch.rand((2, 10, 9), dtype=torch.float64, generator=source)
    places = torch.rand((2, 9), dtype=torch.float64, generator=source)
    assert boxes.dtype == torch.int64
    assert torch.equal(boxes, boxes_by_loop(uniform[0], uniform[1], places, height, width, scale, ratio))
    row, column, h, w = boxes.unbind(1)
    assert (torch.stack([row, column]) >= 0).all()
    assert ((h >= 1) & (w >= 1) & (row + h <= height) & (column + w <= width)).all()


def test_areas_and_aspect_ratios_follow_their_laws():
    side = 4000  # rounding is small, and no box of these is too large
    boxes = sample_resized_crops(4000, side, side, (0.1, 0.6), (3 / 4, 4 / 3), generator()).double()
    area = boxes[:, 2] * boxes[:, 3] / side**2
    log_aspect = (boxes[:, 3] / boxes[:, 2]).log()
    log_ratio = torch.tensor(4 / 3).log().item()
    assert scipy.stats.kstest(area.numpy(), scipy.stats.uniform(0.1, 0.5).cdf).pvalue > 1e-3
    law = scipy.stats.uniform(-log_ratio, 2 * log_ratio)
    assert scipy.stats.kstest(log_aspect.numpy(), law.cdf).pvalue > 1e-3
    for start, free in ((boxes[:, 0], side - boxes[:, 2]), (boxes[:, 1], side - boxes[:, 3])):
        assert scipy.stats.kstest((start / free).numpy(), "uniform").pvalue > 1e-3


def test_rows_and_columns_are_uniform_to_the_last_place():
    boxes = sample_resized_crops(3000, 6, 6, (4 / 9, 4 / 9), (1.0, 1.0), generator())
    assert (boxes[:, 2:] == 4).all()
    counts = torch.bincount(boxes[:, 0] * 3 + boxes[:, 1])
    assert len(counts) == 9
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 12), st.integers(2, 12)),
    st.integers(0, 99),
)
def test_resizing_is_the_antialiased_mean_of_its_box(count, channels, sides, size, seed):
    images = torch.rand((count, channels, *sides), generator=generator(seed))
    boxes = sample_resized_crops(count, *sides, generator=generator(seed))
    result = resized_crop(images, boxes, size)
    for n, (row, column, h, w) in enumerate(boxes.tolist()):
        box = images[n, :, row : row + h, column : column + w].double()
        expected = triangle_weights(h, size[0]) @ box @ triangle_weights(w, size[1]).T
        torch.testing.assert_close(result[n].double(), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(0, 3),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([torch.uint8, torch.int64, torch.bool, torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_the_nearest_pixel_is_that_in_which_the_middle_lies(count, channels, sides, size, dtype, seed):
    images = pictures((count, channels, *sides), dtype, seed)
    boxes = sample_resized_crops(count, *sides, generator=generator(seed))
    expected = torch.empty((count, channels, *size), dtype=dtype)
    for n, (row, column, h, w) in enumerate(boxes.tolist()):
        for r in range(size[0]):
            for c in range(size[1]):
                y = row + int((r + Fraction(1, 2)) * h / size[0])
                x = column + int((c + Fraction(1, 2)) * w / size[1])
                expected[n, :, r, c] = images[n, :, y, x]
    assert torch.equal(resized_crop(images, boxes, size, "nearest"), expected)


def test_the_nearest_pixel_is_torchs_nearest_exact():
    images = torch.rand(3, 2, 17, 23)
    boxes = torch.tensor([[0, 0, 17, 23], [2, 3, 13, 19], [5, 1, 7, 11]])
    result = resized_crop(images, boxes, (10, 9), "nearest")
    for n, (row, column, h, w) in enumerate(boxes.tolist()):
        box = images[n : n + 1, :, row : row + h, column : column + w]
        assert torch.equal(result[n], F.interpolate(box, (10, 9), mode="nearest-exact")[0])


@every_layout
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_is_resized_to_its_rounding(dtype, layout):
    images = pictures((4, 3, 16, 12), dtype, layout=layout)
    boxes = sample_resized_crops(4, 16, 12, generator=generator())
    result = resized_crop(images, boxes, (7, 13))
    expected = resized_crop(images.double(), boxes, (7, 13))
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=layout)
    # Bytes are resized with weights of fixed point.
    atol, rtol = (1 if dtype == torch.uint8 else 0.501, 0.0) if not dtype.is_floating_point else (0.0, None)
    rtol = torch.finfo(dtype).eps if rtol is None else rtol
    torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=atol)
    nearest = resized_crop(images, boxes, (7, 13), "nearest")
    assert nearest.is_contiguous(memory_format=layout)


def test_a_bilinear_result_of_one_column_is_refused():
    text = "resized_crop: size must be at least 2 wide (pixels), got (3, 1). Take 'nearest'."
    with pytest.raises(ValueError, match=re.escape(text)):
        resized_crop(torch.rand(1, 1, 4, 4), torch.tensor([[0, 0, 4, 4]]), (3, 1))


def test_a_box_of_the_whole_image_at_its_own_size_is_the_image():
    images = torch.rand(2, 3, 7, 5)
    boxes = torch.tensor([[0, 0, 7, 5]] * 2)
    assert torch.equal(resized_crop(images, boxes, (7, 5)), images)
    assert torch.equal(resized_crop(images, boxes, (7, 5), "nearest"), images)


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_images_of_no_channels_are_resized(interpolation):
    boxes = sample_resized_crops(3, 8, 8, generator=generator())
    assert resized_crop(torch.zeros(3, 0, 8, 8), boxes, (4, 5), interpolation).shape == (3, 0, 4, 5)


# ------------------------------------------------------------------ all


SAMPLERS = {
    "flips": lambda source: sample_flips(9, 0.5, source),
    "crops": lambda source: sample_crops(9, 12, 14, (4, 4), source),
    "resized crops": lambda source: sample_resized_crops(9, 30, 40, generator=source),
}


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_places_come_from_the_generator_alone(sample):
    source, before = generator(7), torch.get_rng_state()
    first, second = sample(source), sample(source)
    assert torch.equal(first, sample(generator(7)))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    third = sample(None)
    torch.manual_seed(3)
    assert torch.equal(third, sample(None))


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 0.1)])
def test_what_is_drawn_depends_on_the_number_of_images_alone(scale):
    source, other = generator(1), generator(1)
    sample_resized_crops(5, 8, 200, scale, (1.0, 1.0), source)
    sample_resized_crops(5, 300, 3, (0.3, 0.4), (0.1, 5.0), other)
    assert torch.equal(source.get_state(), other.get_state())


@pytest.mark.parametrize("shape", [(4,), (3, 4, 4), (1, 3, 4, 4, 4)], ids=str)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("flip", lambda images: flip(images, torch.tensor([True]))),
        ("crop", lambda images: crop(images, torch.zeros(1, 2, dtype=torch.int64), (2, 2))),
        ("resized_crop", lambda images: resized_crop(images, torch.tensor([[0, 0, 2, 2]]), (2, 2))),
    ],
)
def test_images_of_another_number_of_dimensions_are_refused(name, call, shape):
    text = f"{name}: images must be of shape (N, C, H, W), got {shape}. Add the missing dimension"
    with pytest.raises(ValueError, match=re.escape(text)):
        call(torch.ones(shape))
