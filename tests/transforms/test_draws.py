import pytest
import torch

import lightning_tricks as lt
from lightning_tricks.functional.picture_ops import SHEARS_AND_TURNS, affine_matrices, recolour, warp
from lightning_tricks.transforms.choice import apply_chain

TRANSFORMS = [
    lt.Mixup(0.2),
    lt.CutMix(),
    lt.Cutout(3, holes=2),
    lt.RandomErasing(0.5),
    lt.RandomErasing(0.5, fill="noise"),
    lt.RandAugment(2, 10),
    lt.TrivialAugment(),
    lt.RandomFlip(),
    lt.RandomCrop(9, padding=2),
    lt.RandomCrop(9, padding=2, padding_mode="reflect"),
    lt.RandomResizedCrop(8),
    lt.RandomResizedCrop(8, interpolation="nearest"),
    lt.ColorJitter(0.4, 0.4, 0.4, 0.1),
    lt.PCALighting(),
    lt.Normalize((0.5,) * 3, (0.25,) * 3),
    lt.OneOf([lt.Mixup(0.2), lt.RandomFlip()], weights=[1, 2]),
    lt.OneOf([lt.Mixup(0.2), lt.RandomFlip()], per_sample=False),
    lt.RandomApply(lt.Mixup(0.2)),
    lt.RandomApply(lt.RandomFlip(), per_sample=False),
]


@pytest.fixture
def odd_defaults():
    """As `Trainer(precision="64-true")` and `torch.set_default_device("cuda")` leave torch; nothing is on "meta"."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=TRANSFORMS, ids=repr)
def expected(request):
    """A transform, and what becomes of images and masks with torch's own defaults."""
    return request.param, *both(request.param)


def both(transform):
    source = torch.Generator("cpu")
    images = torch.rand(32, 3, 12, 14, generator=source.manual_seed(1), device="cpu", dtype=torch.float32)
    masks = torch.randint(0, 5, (32, 12, 14), generator=source, device="cpu")
    prob = 1.0 if isinstance(transform, (lt.RandomCrop, lt.RandomResizedCrop)) else 0.8
    new, _ = apply_chain("Test", [transform], images, None, source.manual_seed(2), prob)
    _, moved = apply_chain("Test", [transform], images[:, :0], masks, source.manual_seed(2), prob)
    return new, moved


def test_draws_know_neither_torchs_default_device_nor_its_default_dtype(expected, odd_defaults):
    transform, images, masks = expected
    new, moved = both(transform)
    assert new.device.type == moved.device.type == "cpu"
    assert new.dtype == torch.float32
    assert torch.equal(new, images)
    assert torch.equal(moved, masks)


def test_they_know_no_autocast_either(expected):
    transform, images, masks = expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        new, moved = both(transform)
    assert torch.equal(new, images)
    assert torch.equal(moved, masks)


def test_equalize_of_floats_is_of_256_levels_whatever_the_default_dtype():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = recolour("Equalize", images.clone(), torch.zeros(2))
    torch.set_default_dtype(torch.bfloat16)  # as in a `training_step` of Trainer(precision="bf16-true")
    try:
        assert torch.equal(recolour("Equalize", images.clone(), torch.zeros(2)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_pixel_between_two_others_falls_on_the_same_side_whatever_the_default_dtype(request):
    source = torch.Generator().manual_seed(0)
    images = torch.rand(300, 1, 33, 31, generator=source)
    degrees = torch.arange(300, dtype=torch.float64) % 61 - 30
    matrices = affine_matrices(torch.full((300,), SHEARS_AND_TURNS.index("Rotate")), degrees, 33, 31)
    expected = warp(images, matrices)
    request.getfixturevalue("odd_defaults")
    assert torch.equal(warp(images, matrices), expected)
