"""Cutout and random erasing: images with holes."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Generator, Tensor

from lightning_tricks.functional.checks import (
    LARGEST,
    check_count,
    check_images,
    check_number,
    check_numbers,
    check_strength,
    tuples,
)
from lightning_tricks.functional.erasing import cutout, erase, erase_with_noise, sample_centers, sample_erasing


@dataclass(frozen=True)
class Cutout:
    """Blank a square at a random place in each image; what lies outside the image is clipped.

        images'[n, :, r, c] = fill   inside the square around a pixel drawn uniformly

    Args:
        size: side of the square (pixels), at least 1.
        holes: squares in each image, at least 1.
        fill: value written, in the images' own units (0 is the mean of normalised ones).
    Returns:
        Called with (images (N, C, H, W), labels, generator, inplace): images with holes, and the labels as they came.
    Raises:
        TypeError, ValueError: an argument out of range, or images of another number of dimensions.
    References:
        DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017,
        arXiv:1708.04552, section 3.1.
        Deviates: an odd side is cut in full (the authors' code cuts one pixel less).
    Example:
        >>> import torch
        >>> images, _ = Cutout(2)(torch.ones(4, 1, 8, 8), None)
        >>> bool((images.sum((1, 2, 3)) >= 60).all())
        True
    """

    size: int
    holes: int = 1
    fill: float = 0.0

    def __post_init__(self) -> None:
        check_count("Cutout", "size", self.size, 1, "pixels", "Try half the image's side")
        check_count("Cutout", "holes", self.holes, 1, "squares", "The paper cuts 1")
        check_number("Cutout", "fill", self.fill, "finite", "0 is the mean of normalised images")

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        check_images("Cutout", images)
        height, width = images.shape[-2:]
        centers = sample_centers(len(images), self.holes, height, width, generator)
        return cutout(images, centers, self.size, self.fill, inplace), labels

    def scaled(self, strength: float) -> "Cutout":
        """The same with sides times a strength above 0, rounded to whole pixels, at least 1."""
        check_strength("Cutout", strength)
        return replace(self, size=max(1, round(self.size * strength)))


@dataclass(frozen=True)
class RandomErasing:
    """Fill a box of random size and shape at a random place in some images, all of it inside the image.

        images'[n, :, top:bottom, left:right] = fill,  area ~ U(scale) of the image's,  log(height / width) ~ U

    Of ten boxes drawn the first is taken that fits into the image; where none does, the image stays as it is.

    Args:
        prob: share of images that lose a box, in [0, 1].
        scale: least and largest area, as shares of the image's, in [0, 1].
        ratio: least and largest height of the box in widths, above 0.
        fill: value written, in the images' own units (0 is the mean of normalised ones), or one for each channel; or
            "noise", standard normal numbers for floating images and any of the 256 values for uint8.
    Returns:
        Called with (images (N, C, H, W), labels, generator, inplace): images with boxes erased, and the labels as they
        came.
    Raises:
        TypeError, ValueError: an argument out of range, or images of another number of dimensions or channels.
    References:
        Zhong et al., "Random Erasing Data Augmentation", 2017, arXiv:1708.04896, algorithm 1.
        Deviates: ten attempts instead of any number, and a ratio uniform in its logarithm, both as in torchvision and
        timm; and timm's defaults (the paper's are prob=0.5, scale=(0.02, 0.4), and noise).
    Example:
        >>> import torch
        >>> images, _ = RandomErasing(prob=1.0)(torch.ones(4, 1, 32, 32), None)
        >>> bool((images.mean((1, 2, 3)) < 1).all())
        True
    """

    prob: float = 0.25
    scale: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 10 / 3)
    fill: float | tuple[float, ...] | Literal["noise"] = 0.0

    def __post_init__(self) -> None:
        check_number("RandomErasing", "prob", self.prob, "in [0, 1]", "Try 0.25", lambda value: 0 <= value <= 1)
        areas = "two shares of the image's area in [0, 1], the smaller first"
        numbers = "two numbers above 0, the smaller first"
        owner = "RandomErasing"
        check_numbers(owner, "scale", self.scale, 2, areas, "Try (0.02, 0.33)", lambda x: 0 <= x[0] <= x[1] <= 1)
        check_numbers(owner, "ratio", self.ratio, 2, numbers, "Try (0.3, 3.3)", lambda x: 0 < x[0] <= x[1])
        tuples(self, "scale", "ratio", "fill")
        if self.fill == "noise":
            return
        fix = "Give a number, one for each channel, or 'noise'"
        for value in self.fill if isinstance(self.fill, tuple) and self.fill else [self.fill]:
            check_number("RandomErasing", "fill", value, "finite", fix)

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        check_images("RandomErasing", images)
        count, _, height, width = images.shape
        boxes = sample_erasing(count, height, width, self.prob, self.scale, self.ratio, generator)
        if isinstance(self.fill, str):
            seeds = torch.randint(2**63 - 1, (count,), generator=generator, device="cpu")
            return erase_with_noise(images, boxes, seeds, inplace), labels
        return erase(images, boxes, self.fill, inplace), labels

    def scaled(self, strength: float) -> "RandomErasing":
        """The same with areas times a strength above 0, which leaves them shares of at most 1."""
        most = 1 / self.scale[1] if self.scale[1] else LARGEST
        check_strength("RandomErasing", strength, f"in (0, {most:.4g}]", lambda value: value <= most)
        return replace(self, scale=(self.scale[0] * strength, min(1.0, self.scale[1] * strength)))
