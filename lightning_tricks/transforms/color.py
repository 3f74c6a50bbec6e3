"""Colour jitter, lighting and normalisation; labels stay as they are."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lightning_tricks.functional.checks import (
    check_channels,
    check_images,
    check_number,
    check_numbers,
    check_strength,
    check_unit,
    message,
    tuples,
)
from lightning_tricks.functional.color import (
    jitter,
    lighting,
    normalize,
    sample_jitter,
    sample_lighting,
)

# Of the colours of ImageNet's pictures in [0, 1], as the ResNets of 2015 and after were trained with.
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

SMALLEST = torch.finfo(torch.float32).tiny
"""What float32 holds in full precision: less may be 0 there."""


@dataclass(frozen=True)
class ColorJitter:
    """Change brightness, contrast, saturation and hue of each image by amounts and in an order of its own.

        brightness:  factor * images
        contrast:    factor * images + (1 - factor) * mean over the image of grey
        saturation:  factor * images + (1 - factor) * grey
        hue:         the colour wheel turned by shift
        factor ~ U(max(0, 1 - b), 1 + b),  shift ~ U(-hue, hue)

    For images before they are normalised: floats are clamped to [0, 1] after each change, as torchvision does.

    Args:
        brightness: largest distance b of a factor from 1, at least 0; 0 leaves it alone.
        contrast: the same.
        saturation: the same.
        hue: largest shift, in [0, 0.5] (turns of the colour wheel); 0 leaves it alone.
    Returns:
        Called with (images (N, C, H, W), labels, generator, inplace): the images, and the labels as they came. Images
        of one channel have neither saturation nor hue.
    Raises:
        TypeError, ValueError: an argument out of range, images of another number of dimensions, or of neither 1 nor 3
            channels where saturation or hue change; floats outside [0, 1], as normalised images are. The values are
            looked at on a CPU only: on another device that would wait for it.
    References:
        Howard, "Some Improvements on Deep Convolutional Neural Network Based Image Classification", 2013,
        arXiv:1312.5402, section 2.
        Deviates: the amounts are torchvision's; he draws factors in [0.5, 1.5].
    Example:
        >>> import torch
        >>> images, _ = ColorJitter(0.4, 0.4, 0.4, 0.1)(torch.rand(4, 3, 8, 8), None)
        >>> images.shape
        torch.Size([4, 3, 8, 8])
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            check_number("ColorJitter", name, value, "at least 0", "Try 0.4", lambda value: value >= 0)
        fix = "0.5 is the opposite colour; try 0.1"
        check_number("ColorJitter", "hue", self.hue, "in [0, 0.5]", fix, lambda value: 0 <= value <= 0.5)

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        check_images("ColorJitter", images)
        check_unit("ColorJitter", images)
        reach = (self.brightness, self.contrast, self.saturation, self.hue)
        amounts, order = sample_jitter(len(images), *reach, generator)
        return jitter(images, amounts, order, inplace), labels

    def scaled(self, strength: float) -> "ColorJitter":
        """The same with all ranges times a strength above 0; a hue beyond 0.5 is refused."""
        check_strength("ColorJitter", strength)
        names = ("brightness", "contrast", "saturation", "hue")
        return replace(self, **{name: getattr(self, name) * strength for name in names})


@dataclass(frozen=True)
class PCALighting:
    """Add one random colour to each image, along the principal components of colours: AlexNet's.

        images' = images + eigenvectors @ (alpha * eigenvalues),  alpha ~ N(0, std ** 2)

    Args:
        std: standard deviation of alpha, at least 0.
        eigenvalues: three, of the covariance of colours in [0, 1]; by default ImageNet's.
        eigenvectors: three rows, one for each channel, with a column for each eigenvalue; by default ImageNet's.
    Returns:
        Called with (images (N, 3, H, W), labels, generator, inplace): the images, and the labels as they came. Floats
        are in units of [0, 1] and not clamped; uint8 are rounded and clamped.
    Raises:
        TypeError, ValueError: an argument out of range, images of another number of dimensions or of channels.
    References:
        Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", 2012, section 4.1.
    Example:
        >>> import torch
        >>> images, _ = PCALighting()(torch.rand(4, 3, 8, 8), None)
        >>> images.shape
        torch.Size([4, 3, 8, 8])
    """

    std: float = 0.1
    eigenvalues: tuple[float, float, float] = EIGENVALUES
    eigenvectors: tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]] = (
        EIGENVECTORS
    )

    def __post_init__(self) -> None:
        check_number("PCALighting", "std", self.std, "at least 0", "The paper takes 0.1", lambda value: value >= 0)
        check_numbers("PCALighting", "eigenvalues", self.eigenvalues, 3, "three numbers", "One for each component")
        fix = "A row for each channel"
        if not isinstance(self.eigenvectors, (tuple, list)) or len(self.eigenvectors) != 3:
            raise TypeError(message("PCALighting", "eigenvectors", "three rows", self.eigenvectors, fix))
        for row in self.eigenvectors:
            check_numbers("PCALighting", "eigenvectors", row, 3, "three rows of three numbers", fix)
        tuples(self, "eigenvalues", "eigenvectors")

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        check_channels("PCALighting", images, 3)
        alphas = sample_lighting(len(images), self.std, generator)
        values, vectors = (
            torch.tensor(value, device="cpu", dtype=torch.float32) for value in (self.eigenvalues, self.eigenvectors)
        )
        return lighting(images, alphas, values, vectors, inplace), labels

    def scaled(self, strength: float) -> "PCALighting":
        """The same with a standard deviation times a strength above 0."""
        check_strength("PCALighting", strength)
        return replace(self, std=self.std * strength)


@dataclass(frozen=True)
class Normalize:
    """Subtract the mean of each channel and divide by its standard deviation, in every stage.

        images' = (images - mean) / std

    What was trained on normalised images must be validated on them: BatchTransforms applies this in validation, test
    and prediction too (`every_stage`).

    Args:
        mean: one number for each channel, in units of [0, 1] where the images are uint8.
        std: one number above 0 for each channel, in the same units; not so small that float32 has 0 for it.
    Returns:
        Called with (images (N, C, H, W), labels, generator, inplace): the images, and the labels as they came. uint8
        images are scaled to [0, 1] first and give float32, a new tensor.
    Raises:
        TypeError, ValueError: an argument out of range, images of another number of dimensions or of channels.
    Example:
        >>> import torch
        >>> Normalize((0.5,), (0.25,))(torch.tensor([[[[0.0, 0.5, 1.0]]]]), None)[0]
        tensor([[[[-2.,  0.,  2.]]]])
    """

    every_stage: ClassVar[bool] = True

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        fix = "Give one for each channel"
        check_numbers("Normalize", "mean", self.mean, None, "one number for each channel", fix)
        check_numbers(
            "Normalize",
            "std",
            self.std,
            None,
            f"one number for each channel, above 0, and {SMALLEST:.2g} at least",
            fix,
            lambda numbers: min(numbers) >= SMALLEST,
        )
        if len(self.mean) != len(self.std):
            raise ValueError(message("Normalize", "std", f"as many numbers as mean, {len(self.mean)}", self.std, fix))
        tuples(self, "mean", "std")

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        mean, std = (torch.tensor(value, device="cpu", dtype=torch.float64) for value in (self.mean, self.std))
        return normalize(images, mean, std, inplace), labels
