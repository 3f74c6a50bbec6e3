"""Flips, crops and resized crops, of images and of the masks beside them."""

from dataclasses import dataclass
from typing import Any, get_args

from torch import Generator, Tensor

from lightning_tricks.functional.checks import check_images, check_number, check_numbers, message, tuples
from lightning_tricks.functional.geometry import (
    Axis,
    Interpolation,
    PaddingMode,
    crop,
    flip,
    resized_crop,
    sample_crops,
    sample_flips,
    sample_resized_crops,
)
from lightning_tricks.transforms.masks import move_beside


@dataclass(frozen=True)
class RandomFlip:
    """Mirror images at random; masks go along.

        images'[n, :, :, c] = images[n, :, :, W - 1 - c]   with probability `prob`, for each image

    Args:
        prob: probability of a flip, in [0, 1].
        axis: "horizontal" exchanges left and right, "vertical" top and bottom.
    Returns:
        Called with (images (N, C, H, W), labels, generator, inplace): the images, and labels of the same kind; masks
        (N, H, W) or (N, K, H, W) are flipped as their images.
    Raises:
        TypeError, ValueError: an argument out of range, images of another number of dimensions, or labels of three or
            more dimensions that are no masks.
    References:
        Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", 2012, section 4.1.
    Example:
        >>> import torch
        >>> RandomFlip(prob=1.0)(torch.tensor([[[[1, 2, 3]]]]), torch.tensor([7]))
        (tensor([[[[3, 2, 1]]]]), tensor([7]))
    """

    prob: float = 0.5
    axis: Axis = "horizontal"

    def __post_init__(self) -> None:
        fix = "Half the images is usual"
        check_number("RandomFlip", "prob", self.prob, "in [0, 1]", fix, lambda value: 0 <= value <= 1)
        _check_choice("RandomFlip", "axis", self.axis, get_args(Axis), "Horizontal exchanges left and right")

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        check_images("RandomFlip", images)
        flips = sample_flips(len(images), self.prob, generator)
        moved = move_beside(labels, images, lambda part, _: flip(part, flips, self.axis), 0, "RandomFlip")
        return flip(images, flips, self.axis, inplace), moved


@dataclass(frozen=True)
class RandomCrop:
    """Cut a window out of each image, at a place of its own; masks go along.

        images'[n, :, r, c] = padded[n, :, row[n] + r, column[n] + c],  row and column uniform over where it fits

    Args:
        size: side of the windows, or (height, width) (pixels). `RandomCrop(32, padding=4)` is the usual one for CIFAR.
        padding: pixels added on each side before, or (above and below, left and right).
        padding_mode: what is added: "constant" `fill`, "reflect" the image mirrored at its outermost pixels, "edge"
            these pixels repeated.
        fill: value of constant padding, in the images' own units (0 is black, or the mean of normalised ones).
        label_fill: value of constant padding in masks; None is -100, which torch's losses ignore, in those of integers,
            while those of floats must have it given.
    Returns:
        Called with (images (N, C, H, W), labels, generator, inplace): images (N, C, *size), always a new tensor, and
        labels of the same kind; masks (N, H, W) or (N, K, H, W) are cut as their images.
    Raises:
        TypeError, ValueError: an argument out of range, a fill of padding that is not constant, images of another
            number of dimensions or smaller than a window, labels not one for each image, or of three or more dimensions
            that are no masks, or floating masks without a `label_fill`.
    References:
        He et al., "Deep Residual Learning for Image Recognition", 2016, arXiv:1512.03385, section 4.2.
    Example:
        >>> import torch
        >>> RandomCrop(32, padding=4)(torch.rand(2, 3, 32, 32), None)[0].shape
        torch.Size([2, 3, 32, 32])
    """

    size: int | tuple[int, int]
    padding: int | tuple[int, int] = 0
    padding_mode: PaddingMode = "constant"
    fill: float = 0.0
    label_fill: float | None = None

    def __post_init__(self) -> None:
        _pair("RandomCrop", "size", self.size, 1, "Give the side of the windows")
        _pair("RandomCrop", "padding", self.padding, 0, "An eighth of the side is usual")
        tuples(self, "size", "padding")
        modes = get_args(PaddingMode)
        _check_choice("RandomCrop", "padding_mode", self.padding_mode, modes, "Constant padding has the value `fill`")
        check_number("RandomCrop", "fill", self.fill, "finite", "0 is the mean of normalised images")
        if self.label_fill is not None:
            check_number("RandomCrop", "label_fill", self.label_fill, "finite", "Give the loss's ignore_index")
        for name, value, usual in (("fill", self.fill, 0), ("label_fill", self.label_fill, None)):
            if value != usual and not self._fills:
                fix = "Nothing is filled without padding, or with another padding_mode"
                raise ValueError(message("RandomCrop", name, f"{usual} unless padding is constant", value, fix))

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        check_images("RandomCrop", images)
        size = _pair("RandomCrop", "size", self.size, 1, "")
        padding = _pair("RandomCrop", "padding", self.padding, 0, "")
        height, width = images.shape[2] + 2 * padding[0], images.shape[3] + 2 * padding[1]
        corners = sample_crops(len(images), height, width, size, generator)

        def cut(part: Tensor, fill: float) -> Tensor:
            return crop(part, corners, size, padding, self.padding_mode, fill)

        moved = move_beside(labels, images, cut, self.label_fill if self._fills else 0, "RandomCrop")
        return cut(images, self.fill), moved

    @property
    def _fills(self) -> bool:
        return self.padding_mode == "constant" and self.padding not in (0, (0, 0))


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cut a box of random area, aspect ratio and place out of each image, and resize it; masks go along.

        area ~ U(scale) * H * W,  log(aspect) ~ U(log(ratio)),  h = sqrt(area / aspect),  w = sqrt(area * aspect)

    The first of 10 attempts that lies within the image is taken; where none does, the largest box in the middle whose
    aspect ratio is allowed.

    Args:
        size: side of the results, or (height, width) (pixels), at least 2.
        scale: smallest and largest area of a box, as a share of the image's, in (0, 1].
        ratio: smallest and largest aspect ratio of a box (width / height), above 0.
        interpolation: "bilinear", with antialiasing, or "nearest", of images; masks always take the nearest pixel.
    Returns:
        Called with (images (N, C, H, W), labels, generator, inplace): images (N, C, *size), always a new tensor, and
        labels of the same kind; masks (N, H, W) or (N, K, H, W) are cut and resized as their images.
    Raises:
        TypeError, ValueError: an argument out of range, images of another number of dimensions, or labels of three or
            more dimensions that are no masks.
    References:
        Szegedy et al., "Going Deeper with Convolutions", 2015, arXiv:1409.4842, section 6.
        Deviates: the nearest pixel is that in which the middle of the new one lies; torchvision takes that of its upper
        left corner, which moves masks by half a pixel against their images.
    Example:
        >>> import torch
        >>> RandomResizedCrop(16)(torch.rand(2, 3, 32, 48), None)[0].shape
        torch.Size([2, 3, 16, 16])
    """

    size: int | tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        owner = "RandomResizedCrop"
        _pair(owner, "size", self.size, 2, "Give the side of the results")
        condition, fix = "two numbers in (0, 1], the smaller first", "(0.08, 1.0) is usual"
        check_numbers(owner, "scale", self.scale, 2, condition, fix, lambda pair: 0 < pair[0] <= pair[1] <= 1)
        condition, fix = "two numbers above 0, the smaller first", "(3 / 4, 4 / 3) is usual"
        check_numbers(owner, "ratio", self.ratio, 2, condition, fix, lambda pair: 0 < pair[0] <= pair[1])
        tuples(self, "size", "scale", "ratio")
        ways = get_args(Interpolation)
        _check_choice(owner, "interpolation", self.interpolation, ways, "Masks take the nearest pixel anyway")

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        owner = "RandomResizedCrop"
        check_images(owner, images)
        size = _pair(owner, "size", self.size, 2, "")
        height, width = images.shape[2:]
        boxes = sample_resized_crops(len(images), height, width, self.scale, self.ratio, generator)
        moved = move_beside(labels, images, lambda part, _: resized_crop(part, boxes, size, "nearest"), 0, owner)
        return resized_crop(images, boxes, size, self.interpolation), moved


def _pair(owner: str, name: str, value: Any, least: int, fix: str) -> tuple[int, int]:
    """Height and width, which one number may stand for."""
    pair = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, value)
    for side in pair:
        if isinstance(side, bool) or not isinstance(side, int) or side < least:
            condition = f"a whole number of at least {least}, or two for height and width (pixels)"
            kind = ValueError if isinstance(side, int) and not isinstance(side, bool) else TypeError
            raise kind(message(owner, name, condition, value, fix))
    return pair[0], pair[1]


def _check_choice(owner: str, name: str, value: Any, choices: tuple[str, ...], fix: str) -> None:
    if value not in choices:
        raise ValueError(message(owner, name, " or ".join(map(repr, choices)), value, fix))
