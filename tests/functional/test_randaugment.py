import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tricks.functional import randaugment as module
from lightning_tricks.functional.picture_ops import COLOUR, affine_matrices, recolour, translate, warp
from lightning_tricks.functional.randaugment import (
    GEOMETRY,
    OPS,
    SIGNED,
    op_magnitudes,
    randaugment,
    randaugment_ranges,
    sample_randaugment,
    trivialaugment_ranges,
)

BINS = 31
REFERENCE = np.load(Path(__file__).parent.parent / "reference" / "randaugment.npz")
RANGES = {"RandAugment": randaugment_ranges, "TrivialAugmentWide": lambda height, width: trivialaugment_ranges()}
every_op = pytest.mark.parametrize("name", OPS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=3, channels=3, height=9, width=12, seed=0):
    return torch.randint(256, (count, channels, height, width), generator=generator(seed), dtype=torch.uint8)


def at_every_bin(name, signs):
    """One operation at all bins, for each sign: ops, bins and signs of one round."""
    bins = torch.arange(BINS).repeat(len(signs)).unsqueeze(1)
    return torch.full_like(bins, OPS.index(name)), bins, torch.tensor(signs).repeat_interleave(BINS).unsqueeze(1)


def one(name, magnitude, count=1):
    return torch.full((count, 1), OPS.index(name)), torch.full((count, 1), magnitude, dtype=torch.float64)


def drawn(count, height, width, seed=0, num_ops=2):
    ops, signs = sample_randaugment(count, num_ops, generator=generator(seed))
    bins = torch.randint(BINS, ops.shape, generator=generator(seed))
    return ops, op_magnitudes(randaugment_ranges(height, width), ops, bins, signs)


# ---------------------------------------------------------------------- torchvision's pictures


@pytest.mark.parametrize("picture", [0, 1])
@pytest.mark.parametrize("space", RANGES)
@every_op
def test_every_operation_gives_torchvisions_picture_at_every_bin_and_sign(space, name, picture):
    image = torch.from_numpy(REFERENCE[f"picture{picture}"])
    stored = REFERENCE[f"{space}/{picture}/{name}"]
    expected = torch.from_numpy(np.cumsum(stored, axis=1, dtype=np.uint8))
    expected = expected.expand(1 + (name in SIGNED), BINS if expected.shape[1] == 1 else -1, -1, -1, -1).flatten(0, 1)
    ops, bins, signs = at_every_bin(name, [1, -1] if name in SIGNED else [1])
    magnitudes = op_magnitudes(RANGES[space](*image.shape[1:]), ops, bins, signs)
    ours = randaugment(image.expand_as(expected), ops, magnitudes)
    apart = (ours.int() - expected.int()).abs()
    assert apart.max() <= 1
    equal = (apart == 0).double().mean((1, 2, 3))
    assert equal.min() >= 0.75
    # As measured they are all equal; a processor that fuses products and sums may round a level otherwise.
    assert equal.mean() > 0.99


def test_the_stored_pictures_have_every_operation():
    names = {key.split("/")[-1] for key in REFERENCE.files if "/" in key}
    assert names == set(OPS)
    assert len(OPS) == 14


# ---------------------------------------------------------------------- loops


def source_by_loop(name, magnitude, height, width, row, column):
    """Where a pixel comes from, in pixels from the upper left pixel."""
    if name == "ShearX":
        return row, column + magnitude * (row + 0.5)
    if name == "ShearY":
        return row + magnitude * (column + 0.5), column
    if name == "TranslateX":
        return row, column - int(magnitude)
    if name == "TranslateY":
        return row - int(magnitude), column
    angle, y, x = math.radians(magnitude), row - (height - 1) / 2, column - (width - 1) / 2
    return (
        math.cos(angle) * y + math.sin(angle) * x + (height - 1) / 2,
        math.cos(angle) * x - math.sin(angle) * y + (width - 1) / 2,
    )


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(GEOMETRY), st.integers(1, 12), st.integers(1, 12), st.floats(-1, 1, width=32), st.integers(0, 999)
)
def test_pixels_move_as_a_loop_moves_them(name, height, width, share, seed):
    magnitude = share * {"S": 0.99, "T": 20, "R": 180}[name[0]]
    images = torch.randint(1, 100, (1, 2, height, width), generator=generator(seed))
    moved = randaugment(images, *one(name, magnitude), fill=-7, colour=False)
    for row in range(height):
        for column in range(width):
            y, x = source_by_loop(name, magnitude, height, width, row, column)
            if min(abs(y % 1 - 0.5), abs(x % 1 - 0.5)) < 1e-4:
                continue  # between two pixels, rounding decides
            y, x = round(y), round(x)
            expected = images[0, :, y, x].tolist() if 0 <= y < height and 0 <= x < width else [-7, -7]
            assert moved[0, :, row, column].tolist() == expected


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(-12, 12), st.booleans())
def test_translate_is_warp_by_whole_pixels(height, width, pixels, along_rows):
    images = pictures(2, 3, height, width)
    across, down = (-pixels, 0) if along_rows else (0, -pixels)
    shift = torch.tensor([[2 / width, 0, 2 * across / width], [0, 2 / height, 2 * down / height]]).repeat(2, 1, 1)
    name = "TranslateX" if along_rows else "TranslateY"
    moved = translate(images, name, torch.full((2,), float(pixels)), fill=3)
    assert torch.equal(moved, warp(images, shift, fill=3))


def test_a_quarter_turn_is_rot90():
    images = pictures(2, 3, 8, 8)
    turned = warp(images, affine_matrices(torch.tensor([2, 2]), torch.tensor([90.0, -90.0]).double(), 8, 8))
    assert torch.equal(turned[0], images[0].rot90(1, (1, 2)))
    assert torch.equal(turned[1], images[1].rot90(-1, (1, 2)))


def posterize_by_loop(values, bits):
    return [value >> (8 - bits) << (8 - bits) for value in values]


def solarize_by_loop(values, threshold):
    return [255 - value if value >= 255 * threshold else value for value in values]


def autocontrast_by_loop(values, _):
    low, high = min(values), max(values)
    return values if low == high else [int((value - low) * 255 / (high - low) + 1e-4) for value in values]


def equalize_by_loop(values, _):
    """Pillow's: equal counts of pixels for each level, the last level's pixels apart."""
    step = (len(values) - values.count(max(values))) // 255
    if step == 0:
        return values
    return [min(255, (step // 2 + sum(other < value for other in values)) // step) for value in values]


LOOPS = {
    "Posterize": (posterize_by_loop, 3),
    "Solarize": (solarize_by_loop, 0.3),
    "AutoContrast": (autocontrast_by_loop, 0),
    "Equalize": (equalize_by_loop, 0),
}


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("name", LOOPS)
def test_operations_on_the_values_of_a_channel_are_their_loops(name, channels):
    loop, magnitude = LOOPS[name]
    images = pictures(2, channels, 24, 30) // 3 + 60
    images[0, 0] = 77
    changed = randaugment(images, *one(name, magnitude, 2))
    expected = [[loop(channel.flatten().tolist(), magnitude) for channel in image] for image in images]
    assert (changed.flatten(2).int() - torch.tensor(expected)).abs().max() <= (name == "AutoContrast")


@pytest.mark.parametrize("magnitude", [-0.75, 0.0, 0.5])
@pytest.mark.parametrize("name", ["Brightness", "Color", "Contrast", "Sharpness"])
def test_blends_are_their_formula(name, magnitude):
    images = pictures(2, 3, 7, 6)
    values, factor = images.double(), 1 + magnitude
    gray = (0.2989 * values[:, 0] + 0.587 * values[:, 1] + 0.114 * values[:, 2]).floor().unsqueeze(1)
    other = {"Brightness": torch.zeros_like(values), "Color": gray, "Contrast": gray.mean((1, 2, 3), keepdim=True)}
    other["Sharpness"] = values.clone()
    for row in range(1, 6):
        for column in range(1, 5):
            near = values[:, :, row - 1 : row + 2, column - 1 : column + 2].sum((2, 3))
            other["Sharpness"][:, :, row, column] = ((near + 4 * values[:, :, row, column]) / 13).round()
    expected = (factor * values + (1 - factor) * other[name]).clamp(0, 255)
    changed = randaugment(images, *one(name, magnitude, 2)).double()
    assert ((changed - expected.floor()).abs() <= 1).all()
    assert (changed == expected.floor()).double().mean() > 0.99


def test_the_gray_value_is_the_mean_where_there_are_not_three_channels():
    images = torch.rand(1, 4, 5, 5, generator=generator(), dtype=torch.float64)
    drained = randaugment(images, *one("Color", -1.0))
    torch.testing.assert_close(drained, images.mean(1, keepdim=True).expand_as(images))
    flat = randaugment(images, *one("Contrast", -1.0))
    torch.testing.assert_close(flat, images.mean().expand_as(images))


def test_color_leaves_one_channel_alone():
    images = pictures(2, 1)
    assert torch.equal(randaugment(images, *one("Color", 0.9, 2)), images)


# ---------------------------------------------------------------------- all operations


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("AutoContrast", "Equalize")])
def test_the_smallest_magnitude_changes_nothing(name):
    images = pictures(2) // 2
    ops, signs = torch.full((2, 1), OPS.index(name)), torch.tensor([[1], [-1]])
    magnitudes = op_magnitudes(randaugment_ranges(9, 12), ops, torch.zeros(2, 1), signs)
    assert torch.equal(randaugment(images, ops, magnitudes), images)


def test_solarize_inverts_pure_white_even_at_its_smallest_magnitude():
    """As torchvision does: the threshold is the largest value."""
    white = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    assert not randaugment(white, *one("Solarize", 1.0)).any()


@every_op
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_an_image_does_not_depend_on_the_others(name, dtype):
    images = pictures(BINS) if dtype == torch.uint8 else pictures(BINS).float() / 255
    ops, bins, signs = at_every_bin(name, [-1])
    magnitudes = op_magnitudes(randaugment_ranges(9, 12), ops, bins, signs)
    together = randaugment(images, ops, magnitudes)
    alone = [randaugment(images[n : n + 1], ops[n : n + 1], magnitudes[n : n + 1]) for n in range(BINS)]
    assert torch.equal(together, torch.cat(alone))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(0, 1000))
def test_rounds_follow_one_another(count, num_ops, seed):
    images = pictures(count, seed=seed)
    ops, magnitudes = drawn(count, 9, 12, seed, num_ops)
    step_by_step = images
    for op, magnitude in zip(ops.split(1, 1), magnitudes.split(1, 1), strict=True):
        step_by_step = randaugment(step_by_step, op, magnitude)
    assert torch.equal(randaugment(images, ops, magnitudes), step_by_step)


@pytest.mark.parametrize("count", [1, 3])
def test_working_on_a_few_at_once_gives_the_same(monkeypatch, count):
    images, parameters = pictures(40), drawn(40, 9, 12)
    whole = randaugment(images, *parameters)
    monkeypatch.setattr(module, "at_once", lambda images: count)
    assert torch.equal(randaugment(images, *parameters), whole)


@every_op
def test_floats_follow_the_same_formula(name):
    images = pictures(BINS, 3, 16, 20)
    ops, bins, signs = at_every_bin(name, [1])
    magnitudes = op_magnitudes(randaugment_ranges(16, 20), ops, bins, signs)
    levels, floats = (randaugment(part, ops, magnitudes).double() for part in (images, images.double() / 255))
    apart = (floats * 255 - levels).abs()
    # Steps of Posterize are parts of 1 there, and parts of 256 levels here.
    near = apart <= {"Posterize": 32, "Sharpness": 2, "Color": 2, "Contrast": 2}.get(name, 1) + 1e-6
    assert near.double().mean() > 0.99  # a value that is the threshold of Solarize may fall on either side


def test_floats_are_posterized_to_parts_of_one():
    images = torch.tensor([0.0, 0.24, 0.25, 0.99, 1.0]).view(1, 1, 1, 5)
    assert randaugment(images, *one("Posterize", 2.0)).flatten().tolist() == [0, 0, 0.25, 0.75, 0.75]


@every_op
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_float32_rounded(name, dtype):
    images = (pictures(BINS).float() / 255).to(dtype)
    ops, bins, signs = at_every_bin(name, [1])
    magnitudes = op_magnitudes(randaugment_ranges(9, 12), ops, bins, signs)
    changed = randaugment(images, ops, magnitudes)
    assert changed.dtype == dtype
    assert torch.equal(changed, randaugment(images.float(), ops, magnitudes).to(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_input_is_untouched_unless_in_place(layout, dtype):
    images = pictures(40) if dtype == torch.uint8 else (pictures(40) / 255).to(dtype)
    parameters, plain = drawn(40, 9, 12), images
    images = images.to(memory_format=layout)
    before, address = images.clone(), images.data_ptr()
    changed = randaugment(images, *parameters)
    assert torch.equal(changed, randaugment(plain, *parameters))
    assert changed.is_contiguous(memory_format=layout)
    assert torch.equal(images, before)
    assert not torch.equal(changed, before)
    again = randaugment(images, *parameters, inplace=True)
    assert again is images
    assert images.data_ptr() == address
    assert torch.equal(images, changed)
    assert images.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", [(5, 0, 6, 7), (0, 3, 6, 7)], ids=str)
def test_images_without_channels_and_no_images_at_all_pass_through(shape):
    images = torch.zeros(shape, dtype=torch.uint8)
    assert randaugment(images, *drawn(shape[0], 6, 7)).shape == shape


@pytest.mark.parametrize("shape", [(4, 3, 1, 1), (4, 3, 2, 9), (4, 1, 1, 9)], ids=str)
@every_op
def test_tiny_images_work(shape, name):
    images = pictures(*shape)
    assert randaugment(images, *one(name, 1.0, 4)).shape == shape


def test_without_colour_only_places_change():
    values = torch.arange(9 * 12).view(1, 1, 9, 12).expand(len(OPS), -1, -1, -1)
    magnitudes = torch.tensor([[40.0 if name == "Rotate" else 1.0] for name in OPS], dtype=torch.float64)
    moved = randaugment(values, torch.arange(len(OPS)).unsqueeze(1), magnitudes, fill=-100, colour=False)
    changed = [name for name, new, old in zip(OPS, moved, values, strict=True) if not torch.equal(new, old)]
    assert changed == list(GEOMETRY)
    assert moved.dtype == values.dtype


def test_fill_comes_from_outside():
    images = torch.ones(1, 2, 3, 3, dtype=torch.uint8)
    assert randaugment(images, *one("TranslateX", 2.0), fill=9)[0, 1].tolist() == [[9, 9, 1]] * 3
    assert randaugment(images, *one("ShearX", 0.99), fill=9)[0, 1].tolist() == [[1, 1, 1], [1, 1, 9], [1, 9, 9]]


def test_recolour_overwrites_no_pictures_of_levels():
    images = pictures()
    before = images.clone()
    for name in COLOUR:
        recolour(name, images, torch.full((3,), 0.5, dtype=torch.float64))
    assert torch.equal(images, before)


@pytest.mark.parametrize("shape", [(4,), (3, 4, 4), (1, 3, 4, 4, 4)], ids=str)
def test_images_of_another_number_of_dimensions_are_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"randaugment: images must be of shape (N, C, H, W), got {shape}.")):
        randaugment(torch.zeros(shape), *drawn(shape[0], 4, 4))


def test_parameters_of_another_length_are_refused():
    text = "randaugment: ops and magnitudes must be one row for each image, got (3, 2, 2). Draw them anew."
    with pytest.raises(ValueError, match=re.escape(text)):
        randaugment(pictures(3), *drawn(2, 9, 12))


# ---------------------------------------------------------------------- magnitudes and draws


def test_magnitudes_between_two_bins_are_interpolated():
    ops = torch.tensor([[OPS.index("Rotate"), OPS.index("Solarize"), OPS.index("Identity")]])
    signs = torch.tensor([[-1, -1, -1]])
    magnitudes = op_magnitudes(randaugment_ranges(9, 9), ops, torch.full((1, 3), 9.5), signs)
    torch.testing.assert_close(magnitudes, torch.tensor([[-9.5, 1 - 9.5 / 30, 0.0]], dtype=torch.float64))


def test_other_numbers_of_bins_span_the_same_range():
    ops = torch.full((1, 3), OPS.index("TranslateX"))
    magnitudes = op_magnitudes(randaugment_ranges(331, 662), ops, torch.tensor([[0, 1, 2]]), torch.ones(1, 3), 3)
    assert magnitudes.tolist() == [[0, 150, 300]]


def test_operations_and_signs_are_uniform_and_independent():
    ops, signs = sample_randaugment(6000, 2, generator=generator(1))
    assert ops.shape == signs.shape == (6000, 2)
    assert set(signs.unique().tolist()) == {-1, 1}
    for counted in (ops * 2 + (signs > 0), (ops[:, 0] * 14 + ops[:, 1]), signs[:, 0] * 2 + signs[:, 1] + 3):
        counts = counted.flatten().unique(return_counts=True)[1]
        assert len(counts) in (28, 196, 4)
        assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_draws_come_from_the_generator_alone_and_their_number_is_fixed():
    before, source = torch.get_rng_state(), generator(7)
    first = sample_randaugment(9, 2, generator=source)
    after = source.get_state()
    assert torch.equal(torch.get_rng_state(), before)
    fewer = generator(7)
    few, signs = sample_randaugment(9, 2, choices=3, generator=fewer)
    assert torch.equal(fewer.get_state(), after)
    assert torch.equal(signs, first[1])
    assert few.max() < 3
    again = sample_randaugment(9, 2, generator=source)
    assert not torch.equal(first[0], again[0])
