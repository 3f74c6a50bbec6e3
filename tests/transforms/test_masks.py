import re

import pytest
import torch
import torch.nn.functional as F

from lightning_tricks.labels import MixedLabels, mix_labels, soft_targets
from lightning_tricks.transforms.masks import is_mask, move_beside, move_mask

IMAGES = torch.zeros(4, 3, 5, 6)


def roll(part, fill):
    """Every row one down; what comes in from above is `fill`."""
    moved = part.roll(1, -2)
    moved[..., 0, :] = fill
    return moved


def mixed_masks():
    masks = torch.randint(0, 3, (4, 5, 6))
    return mix_labels(masks, torch.tensor([0.9, 0.4, 0.7, 1.0]), torch.tensor([1, 2, 3, 0]))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 5, 6), True),
        ((4, 1, 5, 6), True),
        ((4, 7, 5, 6), True),
        ((4,), False),
        ((4, 6), False),
        ((5, 6), False),
        ((4, 6, 5), False),
        ((4, 5, 5, 6, 1), False),
        ((4, 2, 2, 5, 6), False),
    ],
    ids=str,
)
def test_masks_have_the_height_and_width_of_their_images(shape, expected):
    labels = torch.zeros(shape, dtype=torch.int64)
    assert is_mask(labels, IMAGES) is expected
    assert is_mask(labels.float(), IMAGES[:, :0]) is expected
    assert is_mask(MixedLabels(labels), IMAGES) is expected


def test_no_labels_are_no_mask():
    assert is_mask(None, IMAGES) is False


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 2, 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_masks_of_every_kind_are_moved_once_and_stay_what_they_are(shape, dtype):
    masks, calls = torch.randint(0, 2, shape).to(dtype), []
    kept = masks.clone()

    def move(part, fill):
        calls.append(part.shape)
        return roll(part, fill)

    moved = move_mask(masks, move, 1, "Test")
    assert calls == [(4, shape[1] if len(shape) == 4 else 1, 5, 6)]
    assert torch.equal(moved, roll(masks, 1))
    assert moved.dtype == dtype
    assert torch.equal(masks, kept)


def test_each_part_of_mixed_masks_is_moved_once():
    masks, calls = mixed_masks(), []

    def move(part, fill):
        calls.append(fill)
        return roll(part, fill)

    move_mask(masks, move, 2, "Test")
    assert sorted(calls) == [0, 1, 2, 2]  # shares of the original and the partner, and the labels of both


def test_mixed_masks_are_moved_with_their_shares():
    masks = mixed_masks()
    moved = move_mask(masks, roll, 2, "Test")
    expected = roll(soft_targets(masks, 3), 0)
    expected[:, 2, 0] = 1  # what came from outside is of class 2 alone
    assert isinstance(moved, MixedLabels)
    torch.testing.assert_close(soft_targets(moved, 3), expected)


def test_pixels_from_outside_count_in_no_loss():
    masks, logits = mixed_masks(), torch.randn(4, 3, 5, 6)
    moved = move_mask(masks, roll, -100, "Test")
    expected = F.cross_entropy(logits[:, :, 1:], masks[:, :-1])
    torch.testing.assert_close(F.cross_entropy(logits, moved), expected)


def test_without_gradients_mixed_masks_stay_mixed():
    with torch.no_grad():
        moved = move_mask(mixed_masks(), roll, 0, "Test")
    assert isinstance(moved, MixedLabels)
    assert len(moved.components) == 2


def test_masks_may_change_their_size():
    moved = move_mask(torch.zeros(4, 5, 6), lambda part, fill: part[..., :2, :3], 0, "Test")
    assert moved.shape == (4, 2, 3)


@pytest.mark.parametrize("fill", [float("nan"), -100, 0.5])
def test_floating_masks_hold_any_fill(fill):
    moved = move_mask(torch.rand(4, 5, 6), roll, fill, "Test")
    torch.testing.assert_close(moved[:, 0], torch.full((4, 6), float(fill)), equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [(torch.uint8, -100), (torch.uint8, 256), (torch.bool, -100), (torch.int64, 0.5), (torch.int64, float("nan"))],
)
def test_a_fill_that_the_labels_cannot_hold_is_refused(dtype, fill):
    fix = "Give one they hold, and give the loss the same ignore_index"
    text = f"RandomCrop: label_fill must be a value of {dtype}, got {fill!r}. {fix}."
    with pytest.raises(ValueError, match=re.escape(text)):
        move_mask(torch.zeros(4, 5, 6).to(dtype), roll, fill, "RandomCrop")


@pytest.mark.parametrize("labels", [None, torch.arange(4), torch.ones(4, 9), MixedLabels(torch.arange(4))], ids=repr)
def test_labels_of_whole_images_stay(labels):
    assert move_beside(labels, IMAGES, roll, -100, "Test") is labels


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 2, 5, 6)], ids=str)
def test_masks_beside_images_go_along(shape):
    masks = torch.randint(0, 3, shape)
    assert torch.equal(move_beside(masks, IMAGES, roll, -100, "Test"), roll(masks, -100))


@pytest.mark.parametrize("shape", [(4, 10, 12), (4, 7, 4), (4, 1, 2, 5, 6)], ids=str)
def test_labels_that_cannot_move_are_refused(shape):
    fix = "Bring masks to the images' size; labels of other places have no way to move with them"
    text = f"RandomFlip: labels must be of whole images, (N,) or (N, K), or masks of 5 x 6 pixels, got {shape}. {fix}."
    with pytest.raises(ValueError, match=re.escape(text)):
        move_beside(torch.zeros(shape), IMAGES, roll, 0, "RandomFlip")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_integers_are_filled_with_what_losses_ignore(dtype):
    assert (move_mask(torch.ones(4, 5, 6, dtype=dtype), roll, None, "Test")[:, 0] == -100).all()


def test_floating_masks_have_no_fill_that_goes_without_saying():
    text = "RandomCrop: label_fill must be given for floating masks, got None. Give what the loss shall see"
    with pytest.raises(ValueError, match=re.escape(text)):
        move_mask(torch.ones(4, 5, 6), roll, None, "RandomCrop")


@pytest.mark.parametrize("count", [3, 5])
def test_labels_of_another_number_are_refused(count):
    for labels in (torch.zeros(count), torch.zeros(count, 5, 6)):
        with pytest.raises(ValueError, match="RandomFlip: labels must be one for each image, got"):
            move_beside(labels, IMAGES, roll, 0, "RandomFlip")
