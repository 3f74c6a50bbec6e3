import math
import pickle
import re

import pytest
import scipy.stats
import torch

from lightning_tricks.functional.erasing import erase, sample_erasing
from lightning_tricks.labels import MixedLabels
from lightning_tricks.transforms.erasing import Cutout, RandomErasing

ERASING = [RandomErasing(0.8), RandomErasing(1.0, fill=(1.0, 2.0, 3.0)), RandomErasing(0.8, fill="noise")]
every_erasing = pytest.mark.parametrize("transform", ERASING, ids=lambda transform: str(transform.fill))

AREAS = "two shares of the image's area in [0, 1], the smaller first"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ images


@every_erasing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8], ids=str)
@pytest.mark.parametrize("size", [12, 130])
def test_the_batch_is_kept_unless_in_place_which_gives_the_same(transform, dtype, size):
    images = torch.randint(10, 200, (7, 3, size, size + 1)).to(dtype).to(memory_format=torch.channels_last)
    kept, labels, address = images.clone(), torch.arange(7), images.data_ptr()
    erased, same_labels = transform(images, labels, generator())
    assert torch.equal(images, kept)
    assert not torch.equal(erased, kept)
    assert same_labels is labels
    again, _ = transform(images, labels, generator(), inplace=True)
    assert again is images
    assert images.data_ptr() == address
    assert torch.equal(images, erased)
    for result in (erased, images):
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=torch.channels_last)


@every_erasing
@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_boxes_are_those_drawn(transform, count):
    images = torch.rand(count, 3, 20, 30)
    boxes = sample_erasing(count, 20, 30, transform.prob, transform.scale, transform.ratio, generator())
    erased, _ = transform(images, None, generator())
    fill = 0.0 if transform.fill == "noise" else transform.fill
    if transform.fill == "noise":
        erased = erase(erased, boxes, fill)
    assert torch.equal(erased, erase(images, boxes, fill))


def test_each_image_has_a_box_of_its_own():
    erased = RandomErasing(1.0)(torch.ones(16, 1, 40, 40), None, generator())[0] == 0
    assert len({tuple(mask.flatten().tolist()) for mask in erased}) == 16


def test_a_probability_of_a_half_erases_half_of_the_images_where_kornia_erased_a_quarter():
    erased, _ = RandomErasing(0.5)(torch.ones(2000, 1, 8, 8), None, generator())
    assert scipy.stats.binomtest(int((erased == 0).flatten(1).any(1).sum()), 2000, 0.5).pvalue > 1e-3


@every_erasing
def test_draws_do_not_depend_on_channels_dtype_or_labels(transform):
    states = []
    for images, labels in [
        (torch.rand(5, 3, 9, 9), None),
        (torch.rand(5, 0, 9, 9), torch.arange(5)),
        (torch.zeros(5, 3, 9, 9, dtype=torch.uint8), MixedLabels(torch.arange(5))),
    ]:
        source, before = generator(), torch.get_rng_state()
        erased, same_labels = transform(images, labels, source)
        assert erased.shape == images.shape
        assert same_labels is labels
        assert torch.equal(torch.get_rng_state(), before)
        states.append(source.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_noise_differs_between_images_and_batches():
    transform, source = RandomErasing(1.0, (0.3, 0.3), (1.0, 1.0), "noise"), generator()
    erased = [transform(torch.zeros(2, 1, 20, 20), None, source)[0] for _ in range(2)]
    values = [image[image != 0][:50] for batch in erased for image in batch]
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


@every_erasing
def test_without_a_generator_draws_come_from_torchs_global_one(transform):
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        results.append(transform(torch.ones(5, 3, 9, 9), None)[0])
    assert torch.equal(*results)


# ------------------------------------------------------------------ strength


@pytest.mark.parametrize(
    ("size", "strength", "expected"), [(8, 0.5, 4), (8, 1, 8), (8, 2.0, 16), (8, 0.01, 1), (5, 0.7, 4)]
)
def test_a_strength_scales_the_side_of_a_cutout(size, strength, expected):
    assert Cutout(size, holes=2, fill=0.5).scaled(strength) == Cutout(expected, holes=2, fill=0.5)


def test_a_strength_scales_the_areas_of_random_erasing():
    transform = RandomErasing(0.5, (0.1, 0.4), (0.5, 2.0), "noise")
    assert transform.scaled(0.5) == RandomErasing(0.5, (0.05, 0.2), (0.5, 2.0), "noise")
    assert transform.scaled(2.5) == RandomErasing(0.5, (0.25, 1.0), (0.5, 2.0), "noise")
    assert RandomErasing().scaled(1) == RandomErasing()
    assert RandomErasing().scaled(3).scale[1] == 1.0
    with pytest.raises(ValueError, match=re.escape("RandomErasing: strength must be in (0, 2.5], got 3.")):
        transform.scaled(3)


@pytest.mark.parametrize("transform", [Cutout(4), RandomErasing()], ids=["Cutout", "RandomErasing"])
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1.0, ValueError), (math.nan, ValueError), ("1", TypeError)], ids=repr
)
def test_a_strength_must_be_above_0(transform, value, error):
    with pytest.raises(error, match=rf"{type(transform).__name__}: strength must be .*, got {value!r}\. Leave"):
        transform.scaled(value)


# ------------------------------------------------------------------ values


@every_erasing
def test_random_erasing_is_a_value(transform):
    assert pickle.loads(pickle.dumps(transform)) == transform == eval(repr(transform))
    assert hash(transform) == hash(pickle.loads(pickle.dumps(transform)))


def test_lists_as_a_yaml_file_gives_them_become_tuples():
    transform = RandomErasing(scale=[0.1, 0.2], ratio=[0.5, 2.0], fill=[0.1, 0.2, 0.3])
    assert transform == RandomErasing(scale=(0.1, 0.2), ratio=(0.5, 2.0), fill=(0.1, 0.2, 0.3))
    assert hash(transform)


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("prob", 1.5, ValueError, "in [0, 1], got 1.5. Try 0.25."),
        ("prob", True, TypeError, "a number in [0, 1], got True. Try 0.25."),
        ("scale", (0.3, 0.2), ValueError, f"{AREAS}, got (0.3, 0.2)."),
        ("scale", (-0.1, 0.2), ValueError, f"{AREAS}, got (-0.1, 0.2)."),
        ("scale", (0.1, 1.1), ValueError, f"{AREAS}, got (0.1, 1.1)."),
        ("scale", 0.2, TypeError, f"{AREAS}, got 0.2."),
        ("scale", (0.1, math.nan), ValueError, f"{AREAS}, got (0.1, nan)."),
        ("ratio", (0, 1.0), ValueError, "two numbers above 0, the smaller first, got (0, 1.0). Try (0.3, 3.3)."),
        ("ratio", (2.0, 1.0), ValueError, "two numbers above 0, the smaller first, got (2.0, 1.0)."),
        ("ratio", (1.0,), TypeError, "two numbers above 0, the smaller first, got (1.0,)."),
        ("fill", "random", TypeError, "a number finite, got 'random'. Give a number, one for each channel, or 'noise'"),
        ("fill", math.inf, ValueError, "finite, got inf. Give a number, one for each channel, or 'noise'."),
        ("fill", (0.0, math.nan), ValueError, "finite, got nan."),
        ("fill", (), TypeError, "a number finite, got ()."),
    ],
    ids=str,
)
def test_an_argument_out_of_range_is_refused(name, value, error, text):
    with pytest.raises(error, match=re.escape(f"RandomErasing: {name} must be {text}")):
        RandomErasing(**{name: value})


def test_a_fill_for_other_channels_is_refused():
    text = "erase: fill must be 1 values, one for each channel, got (1.0, 2.0, 3.0)."
    with pytest.raises(ValueError, match=re.escape(text)):
        ERASING[1](torch.ones(2, 1, 8, 8), None)


@pytest.mark.parametrize("shape", [(4,), (3, 8, 8), (2, 3, 4, 8, 8)], ids=str)
def test_random_erasing_is_for_images(shape):
    text = f"RandomErasing: images must be of shape (N, C, H, W), got {shape}."
    with pytest.raises(ValueError, match=re.escape(text)):
        RandomErasing()(torch.ones(shape), None)
