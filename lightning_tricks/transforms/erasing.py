"""Cutout: images with holes."""

from dataclasses import dataclass

from torch import Generator, Tensor

from lightning_tricks.functional.checks import check_count, check_images, check_number
from lightning_tricks.functional.erasing import cutout, sample_centers


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
