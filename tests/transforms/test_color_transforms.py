import dataclasses
import math
import pickle
import re

import pytest
import torch

from lightning_tricks.functional.color import jitter, lighting, normalize, sample_jitter, sample_lighting
from lightning_tricks.labels import MixedLabels
from lightning_tricks.transforms.color import EIGENVALUES, EIGENVECTORS, ColorJitter, Normalize, PCALighting

TRANSFORMS = [
    ColorJitter(0.4, 0.4, 0.4, 0.1),
    ColorJitter(brightness=1.5),
    PCALighting(),
    Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)),
]
every_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
RANDOM = pytest.mark.parametrize("transform", TRANSFORMS[:3], ids=repr)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=6, channels=3, dtype=torch.float32):
    values = torch.randint(0, 256, (count, channels, 8, 7), generator=generator())
    return values.to(dtype) if dtype == torch.uint8 else (values / 255).to(dtype)


# ------------------------------------------------------------------ what all promise


@every_transform
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 5])
def test_the_batch_is_untouched_and_in_place_gives_the_same(transform, dtype, count):
    images, labels = pictures(count, dtype=dtype), torch.arange(count)
    kept = images.clone()
    result, result_labels = transform(images, labels, generator())
    assert torch.equal(images, kept)
    assert result_labels is labels
    becomes_float = isinstance(transform, Normalize) and dtype == torch.uint8
    assert result.dtype == (torch.float32 if becomes_float else dtype)
    again, _ = transform(images, labels, generator(), inplace=True)
    assert torch.equal(again, result)
    assert (again is images) == (not becomes_float)
    assert not torch.equal(result.double(), kept.double())


@RANDOM
def test_draws_come_from_the_generator_and_are_each_images_own(transform):
    images = pictures(1).expand(8, -1, -1, -1).clone()
    before = torch.get_rng_state()
    first, _ = transform(images, None, generator(1))
    assert torch.equal(first, transform(images, None, generator(1))[0])
    assert not torch.equal(first, transform(images, None, generator(2))[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert len({tuple(image.flatten().tolist()) for image in first}) == 8
    torch.manual_seed(3)
    second, _ = transform(images, None)
    torch.manual_seed(3)
    assert torch.equal(second, transform(images, None)[0])


@every_transform
def test_the_draws_are_the_same_whatever_the_pixels_are(transform):
    states = []
    for images in (pictures(), pictures(dtype=torch.uint8), pictures(channels=0), torch.zeros(6, 3, 2, 2)):
        source = generator(4)
        result, _ = transform(images, None, source)
        assert result.shape == images.shape
        states.append(source.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


@every_transform
@pytest.mark.parametrize(
    "labels",
    [None, torch.rand(6, 2), torch.zeros(6, 8, 7, dtype=torch.int64), MixedLabels(torch.arange(6))],
    ids=["None", "numbers", "masks", "mixed"],
)
def test_labels_come_back_as_they_came(transform, labels):
    assert transform(pictures(), labels, generator())[1] is labels


@every_transform
def test_a_transform_is_a_value(transform):
    assert pickle.loads(pickle.dumps(transform)) == transform
    with pytest.raises(dataclasses.FrozenInstanceError):
        transform.std = 3
    assert hash(transform) == hash(dataclasses.replace(transform))


@every_transform
def test_images_of_another_number_of_dimensions_are_refused(transform):
    owner = type(transform).__name__
    with pytest.raises(ValueError, match=re.escape(f"{owner}: images must be of shape (N, C, H, W), got (3, 8, 8).")):
        transform(torch.ones(3, 8, 8), None)


def test_only_normalisation_is_for_every_stage():
    assert [getattr(transform, "every_stage", False) for transform in TRANSFORMS] == [False, False, False, True]
    assert [field.name for field in dataclasses.fields(Normalize)] == ["mean", "std"]


# ------------------------------------------------------------------ each of them


def test_each_applies_what_its_functions_draw():
    images = pictures()
    drawn = sample_jitter(6, 0.4, 0.3, 0.2, 0.1, generator())
    assert torch.equal(ColorJitter(0.4, 0.3, 0.2, 0.1)(images, None, generator())[0], jitter(images, *drawn))
    alphas = sample_lighting(6, 0.3, generator())
    expected = lighting(images, alphas, torch.tensor(EIGENVALUES), torch.tensor(EIGENVECTORS))
    assert torch.equal(PCALighting(0.3)(images, None, generator())[0], expected)
    expected = normalize(images, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close(Normalize((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))(images, None)[0], expected)


def test_imagenets_components_are_orthonormal_and_in_order():
    vectors = torch.tensor(EIGENVECTORS)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3), rtol=0, atol=2e-3)
    assert sorted(EIGENVALUES, reverse=True) == list(EIGENVALUES)


def test_normalised_images_have_mean_0_and_deviation_1():
    images = torch.rand(64, 3, 16, 16)
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3))
    result, _ = Normalize(tuple(mean.tolist()), tuple(std.tolist()))(images, None)
    torch.testing.assert_close(result.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(result.std((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-5)


def test_grey_images_have_no_saturation_or_hue():
    images = pictures(channels=1)
    assert torch.equal(ColorJitter(saturation=0.9, hue=0.5)(images, None, generator())[0], images)


@pytest.mark.parametrize("transform", [ColorJitter(saturation=0.4), ColorJitter(hue=0.1)], ids=repr)
def test_four_channels_have_no_saturation_or_hue(transform):
    text = "ColorJitter: images must be of 1 or 3 channels (N, C, H, W), got (6, 4, 8, 7)."
    with pytest.raises(ValueError, match=re.escape(text)):
        transform(pictures(channels=4), None)
    assert ColorJitter(0.4, 0.4)(pictures(channels=4), None, generator())[0].shape == (6, 4, 8, 7)


@pytest.mark.parametrize("strength", [0.5, 1, 2.0])
def test_strength_scales_the_ranges(strength):
    jittered = ColorJitter(0.4, 0.3, 0.2, 0.1).scaled(strength)
    assert jittered == ColorJitter(0.4 * strength, 0.3 * strength, 0.2 * strength, 0.1 * strength)
    assert PCALighting(0.1, (1.0, 2.0, 3.0)).scaled(strength) == PCALighting(0.1 * strength, (1.0, 2.0, 3.0))


def test_strength_beyond_the_colour_wheel_is_refused():
    with pytest.raises(ValueError, match=re.escape("ColorJitter: hue must be in [0, 0.5], got 0.6000000000000001.")):
        ColorJitter(hue=0.2).scaled(3)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("transform", [ColorJitter(0.4), PCALighting()], ids=repr)
@pytest.mark.parametrize(
    ("value", "error"),
    [*((v, ValueError) for v in (0, -1.0, math.nan, math.inf)), *((v, TypeError) for v in (True, "1", None))],
    ids=repr,
)
def test_strength_must_be_above_0(transform, value, error):
    with pytest.raises(error, match=re.escape(f"{type(transform).__name__}: strength must be")):
        transform.scaled(value)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: ColorJitter(-0.1), ValueError, "ColorJitter: brightness must be at least 0, got -0.1. Try 0.4."),
        (lambda: ColorJitter(contrast="1"), TypeError, "ColorJitter: contrast must be a number at least 0, got '1'."),
        (lambda: ColorJitter(saturation=math.inf), ValueError, "ColorJitter: saturation must be at least 0, got inf."),
        (lambda: ColorJitter(hue=0.6), ValueError, "hue must be in [0, 0.5], got 0.6. 0.5 is the opposite colour"),
        (lambda: PCALighting(-1), ValueError, "PCALighting: std must be at least 0, got -1. The paper takes 0.1."),
        (lambda: PCALighting(0.1, (1.0, 2.0)), TypeError, "eigenvalues must be three numbers, got (1.0, 2.0)."),
        (lambda: PCALighting(0.1, eigenvectors=((1.0,) * 3,) * 2), TypeError, "eigenvectors must be three rows, got"),
        (lambda: PCALighting(0.1, eigenvectors=((1.0,),) * 3), TypeError, "must be three rows of three numbers, got"),
        (lambda: Normalize((0.5,), (0.0,)), ValueError, "Normalize: std must be one number for each channel, above 0"),
        (lambda: Normalize((), ()), TypeError, "Normalize: mean must be one number for each channel, got ()."),
        (lambda: Normalize(0.5, 0.5), TypeError, "Normalize: mean must be one number for each channel, got 0.5."),
        (lambda: Normalize((0.5,), ("1",)), TypeError, "Normalize: std must be one number for each channel, above"),
        (lambda: Normalize((0.5,), (1.0, 1.0)), ValueError, "std must be as many numbers as mean, 1, got (1.0, 1.0)."),
    ],
)
def test_arguments_out_of_range_are_refused(build, error, text):
    with pytest.raises(error, match=re.escape(text)):
        build()


@pytest.mark.parametrize("transform", TRANSFORMS[2:], ids=repr)
def test_other_numbers_of_channels_are_refused(transform):
    text = f"{type(transform).__name__}: images must be of 3 channels (N, C, H, W), got (6, 1, 8, 7)."
    with pytest.raises(ValueError, match=re.escape(text)):
        transform(pictures(channels=1), None)


@pytest.mark.parametrize("value", [-0.1, 1.2, math.nan])
def test_normalised_images_are_not_jittered(value):
    images = torch.rand(2, 3, 4, 4)
    images[1, 2, 3, 1] = value
    with pytest.raises(ValueError, match=re.escape("ColorJitter: images must be in [0, 1], got")):
        ColorJitter(0.4)(images, None)


def test_lists_as_a_yaml_file_gives_them_become_tuples():
    assert Normalize([0.5], [0.25]) == Normalize((0.5,), (0.25,))
    lighting = PCALighting(0.1, list(EIGENVALUES), [list(row) for row in EIGENVECTORS])
    assert lighting == PCALighting()
    assert hash(lighting) == hash(PCALighting())
    assert hash(Normalize([0.5], [0.25])) == hash(Normalize((0.5,), (0.25,)))


def test_a_deviation_that_float32_has_as_0_is_refused():
    with pytest.raises(ValueError, match="Normalize: std must be one number for each channel, above 0, and 1.2e-38 at"):
        Normalize((0.5,), (1e-60,))
