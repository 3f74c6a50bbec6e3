"""RandAugment and TrivialAugment: operations drawn at random for each image."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lightning_tricks.functional.checks import (
    check_count,
    check_images,
    check_number,
    check_strength,
    check_unit,
    message,
)
from lightning_tricks.functional.randaugment import (
    GEOMETRY,
    OPS,
    op_magnitudes,
    randaugment,
    randaugment_ranges,
    sample_randaugment,
    trivialaugment_ranges,
)
from lightning_tricks.transforms.masks import move_beside


@dataclass(frozen=True)
class RandAugment:
    """Apply operations drawn at random to each image, all of one magnitude.

        images'[n] = op2(op1(images[n])),   each op uniform over `ops`, and its sign over 1 and -1

    Args:
        num_ops: operations applied to each image, one after another; at least 1.
        magnitude: bin of the magnitude, in [0, num_magnitude_bins - 1]; between two whole bins it is interpolated.
        num_magnitude_bins: bins from the smallest magnitude to the largest; at least 2.
        fill: value of what comes from outside an image, in the images' own units.
        label_fill: value of what comes from outside a mask; None is -100, which torch's losses ignore, in masks of
            integers, while those of floats must have it given.
        ops: names of the operations to draw from, None for all 14; a name given twice is drawn twice as often.
    Returns:
        Called with (images (N, C, H, W) uint8 or floats in [0, 1], labels, generator, inplace): images of the same
        dtype, and the labels as they came; masks move with their images in shears, translations and rotations.
    Raises:
        TypeError, ValueError: an argument out of range; images of another number of dimensions or of another dtype;
            floats outside [0, 1], as normalised images are; floating masks without a `label_fill`. The values are
            looked at on a CPU only: on another device that would wait for it.
    References:
        Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space", 2020,
        arXiv:1909.13719, section 3.
        Deviates: operations and magnitudes are torchvision's v2 ones, pixel for pixel on uint8 tensors, up to a sheared
        pixel between two others, which float32 gives to either. The gray value that Color and Contrast go by is the
        mean of the channels where there are not 3.
    Example:
        >>> import torch
        >>> images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
        >>> RandAugment(2, 9)(images, None)[0].shape
        torch.Size([4, 3, 8, 8])
        >>> moved, _ = RandAugment(1, 15, ops=["ShearX", "ShearY", "Rotate"])(images, None)
    """

    num_ops: int = 2
    magnitude: float = 9
    num_magnitude_bins: int = 31
    fill: float = 0
    label_fill: float | None = None
    ops: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_count("RandAugment", "num_ops", self.num_ops, 1, "operations", "The paper applies 1 to 3")
        _check_settings("RandAugment", self)
        last = self.num_magnitude_bins - 1
        fix = "torchvision's default is 9 of 0 to 30"
        check_number(
            "RandAugment", "magnitude", self.magnitude, f"in [0, {last}]", fix, lambda value: 0 <= value <= last
        )

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        _check_batch("RandAugment", images, self.fill)
        ops, signs = sample_randaugment(len(images), self.num_ops, len(_names(self)), generator)
        bins = torch.full(ops.shape, float(self.magnitude), device="cpu", dtype=torch.float64)
        ranges = randaugment_ranges(*images.shape[-2:])
        return _augment("RandAugment", self, ranges, (ops, bins, signs), images, labels, inplace)

    def scaled(self, strength: float) -> "RandAugment":
        """The same with `strength` times the magnitude, which must stay within the bins.

        Args:
            strength: factor, above 0.
        """
        check_strength("RandAugment", strength)
        return dataclasses.replace(self, magnitude=self.magnitude * strength)


@dataclass(frozen=True)
class TrivialAugment:
    """Apply one operation drawn at random to each image, of a magnitude drawn at random.

        images'[n] = op(images[n]),   op uniform over `ops`, its bin over the bins, and its sign over 1 and -1

    Args:
        num_magnitude_bins: bins from the smallest magnitude to the largest; at least 2.
        fill: value of what comes from outside an image, in the images' own units.
        label_fill: value of what comes from outside a mask; None is -100, which torch's losses ignore, in masks of
            integers, while those of floats must have it given.
        ops: names of the operations to draw from, None for all 14; a name given twice is drawn twice as often.
    Returns:
        As RandAugment.
    Raises:
        TypeError, ValueError: as RandAugment.
    References:
        Müller and Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", 2021,
        arXiv:2103.10158, section 3; the wide space of its table 1.
        Deviates: as RandAugment.
    Example:
        >>> import torch
        >>> images = torch.rand(4, 3, 8, 8)
        >>> TrivialAugment()(images, None)[0].shape
        torch.Size([4, 3, 8, 8])
    """

    num_magnitude_bins: int = 31
    fill: float = 0
    label_fill: float | None = None
    ops: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _check_settings("TrivialAugment", self)

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        _check_batch("TrivialAugment", images, self.fill)
        ops, signs = sample_randaugment(len(images), 1, len(_names(self)), generator)
        bins = torch.randint(self.num_magnitude_bins, ops.shape, generator=generator, device="cpu")
        return _augment("TrivialAugment", self, trivialaugment_ranges(), (ops, bins, signs), images, labels, inplace)


def _augment(
    owner: str,
    transform: RandAugment | TrivialAugment,
    ranges: dict[str, tuple[float, float]],
    drawn: tuple[Tensor, Tensor, Tensor],
    images: Tensor,
    labels: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, Tensor | None]:
    choice, bins, signs = drawn
    ops = torch.tensor([OPS.index(name) for name in _names(transform)], device="cpu")[choice]
    magnitudes = op_magnitudes(ranges, ops, bins, signs, transform.num_magnitude_bins)

    def move(part: Tensor, fill: float) -> Tensor:
        return randaugment(part, ops, magnitudes, fill, colour=False)

    if set(_names(transform)) & set(GEOMETRY):
        labels = move_beside(labels, images, move, transform.label_fill, owner)
    return randaugment(images, ops, magnitudes, transform.fill, inplace), labels


def _names(transform: RandAugment | TrivialAugment) -> Sequence[str]:
    return OPS if transform.ops is None else transform.ops


def _check_settings(owner: str, transform: RandAugment | TrivialAugment) -> None:
    bins, names = transform.num_magnitude_bins, transform.ops
    check_count(owner, "num_magnitude_bins", bins, 2, "bins", "torchvision's default is 31")
    check_number(owner, "fill", transform.fill, "finite", "0 is black")
    if transform.label_fill is not None:
        check_number(owner, "label_fill", transform.label_fill, "finite", "-100 is the ignore_index of torch's losses")
    if names is None:
        return
    if isinstance(names, str) or not names or not set(names) <= set(OPS):
        raise ValueError(message(owner, "ops", f"names out of {', '.join(OPS)}", names, "Correct or remove the name"))
    object.__setattr__(transform, "ops", tuple(names))


def _check_batch(owner: str, images: Tensor, fill: float) -> None:
    check_images(owner, images)
    floating = images.is_floating_point()
    if not (floating or images.dtype == torch.uint8):
        raise TypeError(message(owner, "images", "uint8, or floats in [0, 1]", images.dtype, "Convert them before"))
    if not (0 <= fill <= 1 if floating else 0 <= fill <= 255 and float(fill).is_integer()):
        condition = "in [0, 1] for floats" if floating else "a whole number in [0, 255] for uint8"
        raise ValueError(message(owner, "fill", condition, fill, "Give it in the units of the images"))
    check_unit(owner, images)
