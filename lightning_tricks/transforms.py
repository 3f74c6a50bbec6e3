"""Batch transforms: frozen values that draw their parameters and apply them to images and labels.

Each is a plain callable `transform(images, labels, generator=None, inplace=False) -> (images, labels)`; so is any
function of that signature. Parameters are drawn on the CPU, so that they do not depend on the batch's device.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Generator, Tensor

from lightning_tricks.functional.checks import check_count, check_number, message
from lightning_tricks.functional.cross_entropy import check_smoothing
from lightning_tricks.functional.erasing import check_images, cutout, sample_centers
from lightning_tricks.functional.mixing import mixup, sample_mixup
from lightning_tricks.labels import mix_labels, smooth_labels


class Transform(Protocol):
    """What BatchTransforms applies: a callable on a batch of images and labels.

    Args:
        images: (N, C, H, W).
        labels: (N, ...) integers, MixedLabels or floating targets; None where the batch has none.
        generator: CPU generator of all draws; None takes torch's global one.
        inplace: whether `images` may be overwritten.
    Returns:
        The new images and labels.
    Example:
        >>> import torch
        >>> def darken(images, labels, generator=None, inplace=False):
        ...     return images * torch.rand(len(images), 1, 1, 1, generator=generator), labels
        >>> darken(torch.ones(2, 1, 4, 4), None)[0].shape
        torch.Size([2, 1, 4, 4])
    """

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        ...


@dataclass(frozen=True)
class Mixup:
    """Mix each image and its label with another one of the batch.

        images' = weight * images + (1 - weight) * images[permutation],  weight ~ Beta(alpha, alpha)
        target' = weight * target + (1 - weight) * target[permutation]

    Args:
        alpha: concentration of the Beta distribution, above 0; 0.2 mixes lightly, 1 draws the weight uniformly.
        per_sample: a weight for each image; otherwise one for the batch.
    Returns:
        Called with (images (N, ...), labels, generator, inplace): mixed images, and MixedLabels of integer labels, a
        floating tensor of floating ones, None of None.
    Raises:
        TypeError, ValueError: alpha is no number above 0.
    References:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018, arXiv:1710.09412, eq. 1.
        Deviates: a weight for each image (the authors' code draws one for the batch: `per_sample=False`).
    Example:
        >>> import torch
        >>> images, labels = Mixup(0.2)(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))
        >>> images.shape, type(labels).__name__
        (torch.Size([4, 1, 8, 8]), 'MixedLabels')
    """

    alpha: float = 0.2
    per_sample: bool = True

    def __post_init__(self) -> None:
        check_number("Mixup", "alpha", self.alpha, "above 0", "Try 0.2", lambda value: value > 0)

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        weight, permutation = sample_mixup(len(images), self.alpha, self.per_sample, generator)
        mixed = mixup(images, weight, permutation, inplace)
        return mixed, None if labels is None else mix_labels(labels, weight, permutation)


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


@dataclass(frozen=True)
class LabelSmoothing:
    """Spread a share of each label evenly over all classes, in training only.

        target' = (1 - smoothing) * target + smoothing / K

    Args:
        smoothing: epsilon, in [0, 1].
    Returns:
        Called with (images, labels, generator, inplace): the images as they came, and MixedLabels.
    Raises:
        TypeError: no labels, or floating ones, which say nothing of what they mean.
        ValueError: smoothing outside [0, 1].
    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, arXiv:1512.00567, section 7.
    Example:
        >>> import torch
        >>> LabelSmoothing(0.1)(torch.rand(2, 1, 8, 8), torch.tensor([3, 7]))[1]
        MixedLabels([3, 7], components=1, smoothing=0.1)
    """

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_smoothing("LabelSmoothing", self.smoothing)

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        if labels is None or labels.is_floating_point() or labels.is_complex():
            got = "no labels" if labels is None else labels.dtype
            fix = "Smooth floating targets in the data set, or leave LabelSmoothing out"
            raise TypeError(message("LabelSmoothing", "labels", "integers", got, fix))
        return images, smooth_labels(labels, self.smoothing)
