import dataclasses
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F

from lightning_tricks.functional.geometry import resized_crop, sample_resized_crops
from lightning_tricks.labels import MixedLabels, soft_targets
from lightning_tricks.transforms.geometry import RandomCrop, RandomFlip, RandomResizedCrop
from lightning_tricks.transforms.mixing import Mixup

TRANSFORMS = [
    RandomFlip(),
    RandomFlip(0.7, "vertical"),
    RandomCrop(6),
    RandomCrop((8, 7), padding=2),
    RandomCrop((5, 9), padding=(1, 3), padding_mode="reflect"),
    RandomCrop(8, padding=3, padding_mode="edge"),
    RandomResizedCrop(6),
    RandomResizedCrop((9, 5), scale=(0.3, 0.6), ratio=(1.0, 2.0), interpolation="nearest"),
]
every_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
NEAREST = [t for t in TRANSFORMS if not isinstance(t, RandomResizedCrop) or t.interpolation == "nearest"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def filling(transform):
    """The same with masks filled as images are, where anything is."""
    fills = isinstance(transform, RandomCrop) and transform.padding and transform.padding_mode == "constant"
    return dataclasses.replace(transform, fill=0, label_fill=0) if fills else transform


def pictures(count=6, channels=3, dtype=torch.float32):
    return torch.randint(1, 200, (count, channels, 8, 7), generator=generator()).to(dtype)


# ------------------------------------------------------------------ what all promise


@every_transform
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 5])
def test_the_batch_is_untouched_and_the_dtype_kept(transform, dtype, count):
    images, labels = pictures(count, dtype=dtype), torch.arange(count)
    kept = images.clone()
    result, result_labels = transform(images, labels, generator())
    assert torch.equal(images, kept)
    assert result.dtype == dtype
    assert result_labels is labels


@every_transform
def test_in_place_gives_the_same_images(transform):
    images = pictures()
    expected, _ = transform(images, None, generator())
    result, _ = transform(images, None, generator(), inplace=True)
    assert torch.equal(result, expected)
    assert (result is images) == isinstance(transform, RandomFlip)


@every_transform
def test_draws_come_from_the_generator_and_are_each_images_own(transform):
    images = pictures(1).expand(16, -1, -1, -1).clone()
    first, _ = transform(images, None, generator(1))
    before = torch.get_rng_state()
    assert torch.equal(first, transform(images, None, generator(1))[0])
    assert not torch.equal(first, transform(images, None, generator(2))[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert len({tuple(image.flatten().tolist()) for image in first}) > 1
    torch.manual_seed(3)
    second, _ = transform(images, None)
    torch.manual_seed(3)
    assert torch.equal(second, transform(images, None)[0])


@every_transform
def test_the_draws_are_the_same_whatever_the_pixels_and_labels_are(transform):
    transform, states = filling(transform), []
    for images, labels in (
        (pictures(), None),
        (pictures(channels=1, dtype=torch.uint8), torch.arange(6)),
        (pictures(channels=0), torch.zeros(6, 8, 7, dtype=torch.int64)),
        (pictures(channels=5, dtype=torch.bfloat16), MixedLabels(torch.zeros(6, 8, 7, dtype=torch.int64))),
        (pictures(), torch.rand(6, 2, 8, 7)),
    ):
        source = generator(4)
        transform(images, labels, source)
        states.append(source.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


@every_transform
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_memory_format_is_kept(transform, layout):
    images = pictures().to(memory_format=layout)
    result, _ = transform(images, None, generator())
    assert result.is_contiguous(memory_format=layout)
    assert torch.equal(result, transform(images.contiguous(), None, generator())[0])


@every_transform
def test_a_transform_is_a_value(transform):
    assert pickle.loads(pickle.dumps(transform)) == transform
    with pytest.raises(dataclasses.FrozenInstanceError):
        transform.size = 3
    assert hash(transform) == hash(dataclasses.replace(transform))


# ------------------------------------------------------------------ masks


@pytest.mark.parametrize("transform", NEAREST, ids=repr)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32], ids=str)
def test_a_mask_goes_where_its_image_goes(transform, dtype):
    transform = filling(transform)
    masks = pictures(channels=1, dtype=dtype)
    images = masks.float()
    moved, moved_masks = transform(images, masks[:, 0], generator())
    assert moved_masks.dtype == dtype
    assert torch.equal(moved_masks, moved[:, 0].to(dtype))
    several = torch.cat([masks, masks + 1], dim=1)
    _, moved_several = transform(images, several, generator())
    assert torch.equal(moved_several[:, 0], moved_masks)
    assert moved_several.shape == (6, 2, *moved.shape[2:])


@every_transform
def test_a_mask_beside_images_of_no_channels_moves_alike(transform):
    images, masks = pictures(), torch.randint(0, 9, (6, 8, 7))
    moved, moved_masks = transform(images, masks, generator())
    none, again = transform(images[:, :0], masks, generator())
    assert torch.equal(again, moved_masks)
    assert none.shape == (6, 0, *moved.shape[2:])


def test_a_mask_takes_the_pixel_in_the_middle_of_what_its_image_averages():
    images, masks = torch.rand(6, 3, 40, 30), torch.randint(0, 9, (6, 40, 30))
    transform = RandomResizedCrop((13, 11))
    _, moved = transform(images, masks, generator())
    boxes = sample_resized_crops(6, 40, 30, generator=generator())
    assert torch.equal(moved, resized_crop(masks[:, None], boxes, (13, 11), "nearest")[:, 0])


def test_pixels_from_outside_are_ignored_by_the_loss():
    images, masks = torch.ones(20, 1, 8, 8), torch.ones(20, 8, 8, dtype=torch.int64)
    moved, moved_masks = RandomCrop(8, padding=3)(images, masks, generator())
    assert torch.equal(moved_masks == -100, moved[:, 0] == 0)
    assert (moved_masks == -100).any()
    logits = torch.randn(20, 3, 8, 8)
    expected = F.cross_entropy(logits.movedim(1, -1)[moved[:, 0] == 1], torch.ones(int(moved.sum()), dtype=torch.int64))
    torch.testing.assert_close(F.cross_entropy(logits, moved_masks), expected)


@every_transform
def test_mixed_masks_keep_their_mix(transform):
    images, masks = pictures(channels=1), torch.randint(0, 3, (6, 8, 7))
    transform = filling(transform)
    images, mixed = Mixup(1.0)(images, masks, generator())
    _, moved = transform(images, mixed, generator())
    dense = soft_targets(mixed, 3)
    if isinstance(transform, RandomResizedCrop):
        transform = dataclasses.replace(transform, interpolation="nearest")
    expected, _ = transform(dense, None, generator())
    outside = expected.sum(1) == 0  # padding, which the labels fill with class 0
    expected[:, 0][outside] = 1
    assert isinstance(moved, MixedLabels)
    torch.testing.assert_close(soft_targets(moved, 3), expected)


def test_bytes_need_a_fill_that_they_can_hold():
    images, masks = pictures(), torch.zeros(6, 8, 7, dtype=torch.uint8)
    text = "RandomCrop: label_fill must be a value of torch.uint8, got -100. Give one they hold, and give the loss"
    with pytest.raises(ValueError, match=re.escape(text)):
        RandomCrop(8, padding=2)(images, masks)
    assert RandomCrop(8, padding=2, label_fill=255)(images, masks)[1].max() == 255
    for unfilled in (RandomCrop(4), RandomCrop(4, padding=2, padding_mode="edge"), RandomFlip(), RandomResizedCrop(4)):
        assert unfilled(images, masks)[1].dtype == torch.uint8


@every_transform
@pytest.mark.parametrize("shape", [(6, 4, 5), (6, 4, 4), (6, 2, 4, 3), (6, 1, 2, 8, 7)], ids=str)
def test_boxes_and_masks_of_another_size_are_refused(transform, shape):
    owner = type(transform).__name__
    text = f"{owner}: labels must be of whole images, (N,) or (N, K), or masks of 8 x 7 pixels, got {shape}. Bring"
    with pytest.raises(ValueError, match=re.escape(text)):
        transform(pictures(), torch.zeros(shape))


# ------------------------------------------------------------------ each of them


def test_flips_mirror_about_half_of_the_images():
    images = pictures(200)
    for axis, dim in (("horizontal", -1), ("vertical", -2)):
        result, _ = RandomFlip(axis=axis)(images, None, generator())
        mirrored = [torch.equal(a, b.flip(dim)) for a, b in zip(result, images, strict=True)]
        kept = [torch.equal(a, b) for a, b in zip(result, images, strict=True)]
        assert all(a != b for a, b in zip(mirrored, kept, strict=True))
        assert 70 < sum(mirrored) < 130
    assert torch.equal(RandomFlip(0.0)(images, None)[0], images)
    assert torch.equal(RandomFlip(1)(images, None)[0], images.flip(-1))


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_a_crop_of_a_padded_image_is_a_window_of_torchs_padding(mode):
    images = pictures(20)
    kind = {"edge": "replicate"}.get(mode, mode)
    padded = F.pad(images, (2, 2, 3, 3), mode=kind)
    result, _ = RandomCrop((8, 7), padding=(3, 2), padding_mode=mode)(images, None, generator())
    windows = padded.unfold(2, 8, 1).unfold(3, 7, 1)  # (N, C, rows, columns, 8, 7)
    found = (windows == result[:, :, None, None]).all(-1).all(-1).all(1)
    assert found.flatten(1).any(1).all()
    assert len(found.flatten(1).float().argmax(1).unique()) > 5


def test_a_crop_of_its_own_size_without_padding_is_a_copy():
    images = pictures()
    result, _ = RandomCrop((8, 7))(images, None)
    assert torch.equal(result, images)
    assert result.data_ptr() != images.data_ptr()


def test_resized_crops_are_those_of_their_boxes():
    images = pictures()
    transform = RandomResizedCrop((5, 6), scale=(0.2, 0.9), ratio=(0.5, 2.0))
    boxes = sample_resized_crops(6, 8, 7, (0.2, 0.9), (0.5, 2.0), generator(3))
    for interpolation in ("bilinear", "nearest"):
        result, _ = dataclasses.replace(transform, interpolation=interpolation)(images, None, generator(3))
        assert torch.equal(result, resized_crop(images, boxes, (5, 6), interpolation))


# ------------------------------------------------------------------ errors


def test_a_crop_larger_than_its_padded_image_is_refused():
    text = (
        "RandomCrop: size must be at most (10, 9), an image with its padding (pixels), got (10, 10). Give more padding"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        RandomCrop(10, padding=1)(pictures(), None)


@pytest.mark.parametrize("transform", [RandomFlip(), RandomCrop(2), RandomResizedCrop(2)], ids=repr)
@pytest.mark.parametrize("shape", [(4,), (3, 8, 8), (2, 3, 4, 8, 8)], ids=str)
def test_images_of_another_number_of_dimensions_are_refused(transform, shape):
    owner = type(transform).__name__
    with pytest.raises(ValueError, match=re.escape(f"{owner}: images must be of shape (N, C, H, W), got {shape}.")):
        transform(torch.ones(shape), None)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: RandomFlip(1.5), ValueError, "RandomFlip: prob must be in [0, 1], got 1.5. Half the images is usual."),
        (lambda: RandomFlip("0.5"), TypeError, "RandomFlip: prob must be a number in [0, 1], got '0.5'."),
        (lambda: RandomFlip(0.5, "left"), ValueError, "axis must be 'horizontal' or 'vertical', got 'left'."),
        (lambda: RandomCrop(0), ValueError, "size must be a whole number of at least 1, or two for height and width"),
        (lambda: RandomCrop((4, -1)), ValueError, "RandomCrop: size must be a whole number of at least 1, or two"),
        (lambda: RandomCrop((4, 4, 4)), TypeError, "(pixels), got (4, 4, 4). Give the side of the windows."),
        (lambda: RandomCrop(4.0), TypeError, "RandomCrop: size must be a whole number of at least 1"),
        (lambda: RandomCrop(True), TypeError, "RandomCrop: size must be a whole number of at least 1"),
        (lambda: RandomCrop(4, -1), ValueError, "padding must be a whole number of at least 0, or two for height"),
        (lambda: RandomCrop(4, 1, "wrap"), ValueError, "must be 'constant' or 'reflect' or 'edge', got 'wrap'."),
        (lambda: RandomCrop(4, fill=math.nan), ValueError, "RandomCrop: fill must be finite, got nan."),
        (lambda: RandomCrop(4, label_fill="x"), TypeError, "RandomCrop: label_fill must be a number finite, got 'x'."),
        (lambda: RandomResizedCrop(1), ValueError, "RandomResizedCrop: size must be a whole number of at least 2"),
        (
            lambda: RandomResizedCrop(4, scale=(0.5, 0.2)),
            ValueError,
            "scale must be two numbers in (0, 1], the smaller",
        ),
        (
            lambda: RandomResizedCrop(4, scale=(0.0, 1.0)),
            ValueError,
            "scale must be two numbers in (0, 1], the smaller",
        ),
        (
            lambda: RandomResizedCrop(4, scale=(0.5, 1.1)),
            ValueError,
            "scale must be two numbers in (0, 1], the smaller",
        ),
        (lambda: RandomResizedCrop(4, scale=0.5), TypeError, "scale must be two numbers in (0, 1], the smaller first"),
        (lambda: RandomResizedCrop(4, ratio=(-1, 1)), ValueError, "ratio must be two numbers above 0, the smaller"),
        (lambda: RandomResizedCrop(4, ratio=(1, "2")), TypeError, "ratio must be two numbers above 0, the smaller"),
        (
            lambda: RandomResizedCrop(4, interpolation="cubic"),
            ValueError,
            "must be 'bilinear' or 'nearest', got 'cubic'",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(build, error, text):
    with pytest.raises(error, match=re.escape(text)):
        build()


@pytest.mark.parametrize("padding", [{}, {"padding": (0, 0)}, {"padding": 2, "padding_mode": "edge"}], ids=str)
@pytest.mark.parametrize(("fill", "usual"), [({"fill": 3.0}, 0), ({"label_fill": -100}, None)], ids=str)
def test_a_fill_of_nothing_is_refused(padding, fill, usual):
    with pytest.raises(ValueError, match=f"fill must be {usual} unless padding is constant, got"):
        RandomCrop(4, **padding, **fill)


def test_floating_masks_must_have_a_fill():
    images, masks = pictures(), torch.rand(6, 8, 7)
    with pytest.raises(ValueError, match="RandomCrop: label_fill must be given for floating masks, got None"):
        RandomCrop(8, padding=2)(images, masks)
    assert RandomCrop(8, padding=2, label_fill=-1)(images, masks)[1].min() == -1
    for unfilled in (RandomCrop(4), RandomFlip(), RandomResizedCrop(4)):
        assert unfilled(images, masks)[1].min() >= 0


def test_lists_as_a_yaml_file_gives_them_become_tuples():
    assert RandomCrop([8, 8], padding=[1, 2]) == RandomCrop((8, 8), padding=(1, 2))
    assert RandomResizedCrop([8, 8], [0.5, 1.0], [1.0, 2.0]) == RandomResizedCrop((8, 8), (0.5, 1.0), (1.0, 2.0))
    assert len({RandomCrop([8, 8]), RandomResizedCrop([8, 8], [0.5, 1.0])}) == 2
