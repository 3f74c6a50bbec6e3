import dataclasses
import pickle
import re

import jsonargparse
import pytest
import scipy.stats
import torch

from lightning_tricks.functional.randaugment import (
    GEOMETRY,
    OPS,
    op_magnitudes,
    randaugment,
    randaugment_ranges,
    sample_randaugment,
    trivialaugment_ranges,
)
from lightning_tricks.transforms.geometry import RandomResizedCrop
from lightning_tricks.transforms.randaugment import RandAugment, TrivialAugment

TRANSFORMS = [RandAugment(), RandAugment(3, 22.5, ops=["Rotate", "Color"]), TrivialAugment(), TrivialAugment(5)]
every_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
both = pytest.mark.parametrize("kind", [RandAugment, TrivialAugment], ids=lambda kind: kind.__name__)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=40, channels=3, height=9, width=12, seed=0):
    return torch.randint(1, 255, (count, channels, height, width), generator=generator(seed), dtype=torch.uint8)


def test_randaugment_applies_what_it_draws():
    images, labels = pictures(), torch.arange(40)
    ops, signs = sample_randaugment(40, 3, generator=generator(5))
    magnitudes = op_magnitudes(randaugment_ranges(9, 12), ops, torch.full((40, 3), 12), signs)
    expected = randaugment(images, ops, magnitudes, fill=128)
    changed, unchanged = RandAugment(3, 12, fill=128)(images, labels, generator(5))
    assert torch.equal(changed, expected)
    assert unchanged is labels


def test_trivialaugment_draws_a_magnitude_for_each_image():
    images, source = pictures(), generator(5)
    ops, signs = sample_randaugment(40, 1, generator=source)
    bins = torch.randint(31, (40, 1), generator=source)
    expected = randaugment(images, ops, op_magnitudes(trivialaugment_ranges(), ops, bins, signs))
    assert torch.equal(TrivialAugment()(images, None, generator(5))[0], expected)


def test_the_bins_of_trivialaugment_are_uniform():
    """As its brightness shows: a picture of ones becomes 1 + 0.99 * bin / 8 where its sign is 1."""
    images = torch.full((4000, 1, 1, 1), 0.25)
    changed = TrivialAugment(9, ops=["Brightness"])(images, None, generator())[0].flatten()
    bins = ((changed * 4 - 1) * 8 / 0.99).round().int()
    counts = torch.bincount(bins + 8, minlength=17).double()
    expected = torch.full((17,), 4000 / 18, dtype=torch.float64)
    expected[8] *= 2
    assert scipy.stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3


@both
def test_only_the_operations_named_are_drawn(kind):
    images = pictures(200, height=3, width=3) // 4
    changed, _ = kind(ops=["Solarize", "Identity"])(images, None, generator())
    assert set(torch.where(changed == images, 0, changed.int() + images.int()).unique().tolist()) <= {0, 255}
    assert not kind(ops=["Identity"])(images, None)[0].ne(images).any()


@every_transform
@pytest.mark.parametrize("inplace", [False, True])
def test_images_are_overwritten_only_in_place(transform, inplace):
    images = pictures().to(memory_format=torch.channels_last)
    before = images.clone()
    changed, _ = transform(images, None, generator(), inplace)
    assert torch.equal(changed, transform(before.contiguous(), None, generator())[0])
    assert not torch.equal(changed, before)
    assert (changed is images) == inplace
    assert torch.equal(images, changed if inplace else before)
    assert changed.is_contiguous(memory_format=torch.channels_last)


@every_transform
@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_images_is_transformed(transform, count):
    images = pictures(count)
    changed, _ = transform(images, None, generator())
    assert changed.shape == images.shape
    assert changed.dtype == images.dtype


@every_transform
def test_draws_do_not_depend_on_what_the_images_hold(transform):
    """Several images of a sample, and masks beside them, are transformed by the same draw, one after another."""
    states = []
    for images in (pictures(), pictures(channels=1) / 255, pictures(channels=0).double()):
        for labels in (None, pictures()[:, 0].long()):
            source = generator(3)
            transform(images, labels, source)
            states.append(source.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


@every_transform
def test_draws_come_from_the_generator_alone(transform):
    images, before = pictures(), torch.get_rng_state()
    first, again = (transform(images, None, generator(3))[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, transform(images, None, generator(4))[0])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    unseeded, _ = transform(images, None)
    torch.manual_seed(3)
    assert torch.equal(unseeded, transform(images, None)[0])


@both
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32], ids=str)
def test_masks_follow_their_images(kind, dtype):
    images = pictures(200)
    masks = images[:, 0].to(dtype)
    changed, moved = kind(fill=0, label_fill=255, ops=GEOMETRY)(images, masks, generator())
    from_outside = changed[:, 0] == 0
    assert 0 < from_outside.sum() < 0.5 * from_outside.numel()
    assert moved.dtype == dtype
    assert torch.equal(moved, torch.where(from_outside, 255, changed[:, 0]).to(dtype))


@both
def test_what_comes_from_outside_is_ignored_in_masks(kind):
    images, masks = pictures(100), torch.zeros(100, 9, 12, dtype=torch.int64)
    moved = kind()(images, masks, generator())[1]
    assert set(moved.unique().tolist()) == {0, -100}
    assert not masks.any()


@both
def test_masks_beside_images_without_channels_move_the_same(kind):
    images, masks = pictures(100), pictures(100)[:, :2].long()
    _, expected = kind()(images, masks, generator(3))
    nothing, moved = kind()(images[:, :0], masks, generator(3))
    assert torch.equal(moved, expected)
    assert nothing.shape == (100, 0, 9, 12)


@both
def test_colours_leave_masks_alone(kind):
    images, masks = pictures(), pictures()[:, 0].long()
    _, moved = kind(ops=[name for name in OPS if name not in GEOMETRY])(images, masks, generator())
    assert torch.equal(moved, masks)


@pytest.mark.parametrize("magnitude", [9, 10.0, 7.25])
def test_scaled_scales_the_magnitude(magnitude):
    transform = RandAugment(1, magnitude, fill=3, ops=["Rotate"])
    assert transform.scaled(1.5) == RandAugment(1, magnitude * 1.5, fill=3, ops=["Rotate"])
    assert transform.scaled(1) == transform


def test_a_tiny_strength_hardly_moves_a_pixel():
    images = pictures()
    changed, _ = RandAugment(2, 9, ops=[*GEOMETRY, "Posterize"]).scaled(1e-3)(images, None, generator())
    assert torch.equal(changed, images)


@every_transform
def test_transforms_are_values(transform):
    assert pickle.loads(pickle.dumps(transform)) == transform
    assert dataclasses.replace(transform) == transform
    assert len({transform, dataclasses.replace(transform)}) == 1


@both
def test_a_yaml_file_can_build_them(kind):
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--transform", type=kind)
    built = parser.instantiate_classes(parser.parse_args(["--transform.fill=7", '--transform.ops=["Rotate", "Color"]']))
    assert built.transform == kind(fill=7, ops=("Rotate", "Color"))


@both
@pytest.mark.parametrize(
    ("argument", "value", "text"),
    [
        ("num_magnitude_bins", 1, "must be a whole number of at least 2 (bins), got 1. torchvision's default is 31."),
        ("fill", float("nan"), "must be finite, got nan. 0 is black."),
        ("label_fill", float("inf"), "must be finite, got inf. -100 is the ignore_index of torch's losses."),
        ("ops", (), f"must be names out of {', '.join(OPS)}, got (). Correct or remove the name."),
        ("ops", ["Invert"], f"must be names out of {', '.join(OPS)}, got ['Invert']. Correct or remove the name."),
        ("ops", "Rotate", f"must be names out of {', '.join(OPS)}, got 'Rotate'. Correct or remove the name."),
    ],
)
def test_a_wrong_setting_is_refused(kind, argument, value, text):
    with pytest.raises(ValueError, match=re.escape(f"{kind.__name__}: {argument} {text}")):
        kind(**{argument: value})


@pytest.mark.parametrize("magnitude", [-1, 30.5, float("nan")])
def test_a_magnitude_outside_the_bins_is_refused(magnitude):
    text = f"RandAugment: magnitude must be in [0, 30], got {magnitude}. torchvision's default is 9 of 0 to 30."
    with pytest.raises(ValueError, match=re.escape(text)):
        RandAugment(2, magnitude)


def test_no_operations_are_refused():
    text = "RandAugment: num_ops must be a whole number of at least 1 (operations), got 0. The paper applies 1 to 3."
    with pytest.raises(ValueError, match=re.escape(text)):
        RandAugment(0)


@pytest.mark.parametrize(("strength", "name"), [(0, "strength"), (-1, "strength"), (4, "magnitude")])
def test_a_strength_that_leaves_the_bins_is_refused(strength, name):
    with pytest.raises(ValueError, match=f"RandAugment: {name} must be"):
        RandAugment(2, 9).scaled(strength)


@both
@pytest.mark.parametrize("value", [-0.1, 1.2, float("nan")])
def test_normalised_images_are_refused(kind, value):
    images = torch.rand(2, 3, 4, 4)
    images[1, 2, 3, 0] = value
    with pytest.raises(ValueError, match=rf"{kind.__name__}: images must be in \[0, 1\], got '.*'\. Normalise after"):
        kind()(images, None)


@both
def test_images_of_another_dtype_are_refused(kind):
    text = f"{kind.__name__}: images must be uint8, or floats in [0, 1], got torch.int64. Convert them before."
    with pytest.raises(TypeError, match=re.escape(text)):
        kind()(torch.zeros(2, 3, 4, 4, dtype=torch.int64), None)


@both
@pytest.mark.parametrize(
    ("fill", "images", "text"),
    [
        (128, torch.rand(1, 3, 4, 4), "in [0, 1] for floats, got 128"),
        (0.5, pictures(1), "a whole number in [0, 255] for uint8, got 0.5"),
        (256, pictures(1), "a whole number in [0, 255] for uint8, got 256"),
    ],
)
def test_a_fill_that_images_cannot_hold_is_refused(kind, fill, images, text):
    with pytest.raises(ValueError, match=re.escape(f"{kind.__name__}: fill must be {text}.")):
        kind(fill=fill)(images, None)


@both
@pytest.mark.parametrize("shape", [(4, 4), (3, 4, 4)], ids=str)
def test_images_of_another_number_of_dimensions_are_refused(kind, shape):
    with pytest.raises(ValueError, match=f"{kind.__name__}: images must be of shape"):
        kind()(torch.zeros(shape), None)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_a_resize_rounds_past_1_is_in_range(kind, dtype):
    images, _ = RandomResizedCrop(24)(torch.ones(32, 3, 100, 120, dtype=dtype), None, generator())
    assert dtype != torch.float32 or images.max() > 1
    result, _ = kind()(images, None, generator())
    assert result.isfinite().all()
    assert result.min() >= 0
    assert float(result.max()) < 1 + 1e-6


@both
def test_floating_masks_must_have_a_fill(kind):
    images, masks = torch.rand(8, 3, 9, 9), torch.rand(8, 9, 9)
    with pytest.raises(ValueError, match=f"{kind.__name__}: label_fill must be given for floating masks, got None"):
        kind(ops=GEOMETRY)(images, masks)
    assert kind(ops=["Color"])(images, masks)[1] is masks
