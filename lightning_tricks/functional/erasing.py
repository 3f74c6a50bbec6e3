"""Cutout and random erasing: draw boxes, then fill them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from lightning_tricks.functional.checks import check_images, holds, message

ATTEMPTS = 10
"""Boxes drawn for an image of which the first that fits is erased, as in torchvision and timm."""


def sample_centers(count: int, holes: int, height: int, width: int, generator: Generator | None = None) -> Tensor:
    """Draw the middle of each hole, uniform over the pixels.

    Args:
        count: images in the batch.
        holes: holes in each image.
        height, width: size of an image (pixels).
        generator: CPU generator; None takes torch's global one.
    Returns:
        (count, holes, 2) int64: row in [0, height) and column in [0, width).
    Example:
        >>> sample_centers(4, 1, 8, 8).shape
        torch.Size([4, 1, 2])
    """
    rows = torch.randint(height, (count, holes), generator=generator, device="cpu")
    columns = torch.randint(width, (count, holes), generator=generator, device="cpu")
    return torch.stack([rows, columns], dim=-1)


def sample_erasing(
    count: int,
    height: int,
    width: int,
    prob: float,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: Generator | None = None,
) -> Tensor:
    """Draw the box that random erasing erases in each image; always as many random numbers for as many images.

        area = height * width * U(scale),  log(ratio) ~ U(log(ratio[0]), log(ratio[1]))
        box  = round(sqrt(area * ratio)) rows, round(sqrt(area / ratio)) columns, anywhere inside the image

    Of ten boxes the first is taken that fits; where none does, nothing is erased.

    Args:
        count: images in the batch.
        height, width: size of an image (pixels).
        prob: share of images that lose a box, in [0, 1].
        scale: least and largest share of the image's area, in [0, 1].
        ratio: least and largest height of a box in widths, above 0.
        generator: CPU generator; None takes torch's global one.
    Returns:
        (count, 1, 4) int64: top, left, bottom, right (pixels; the last two are the first ones outside); all 0 where
        nothing is erased.
    References:
        Zhong et al., "Random Erasing Data Augmentation", 2017, arXiv:1708.04896, algorithm 1.
        Deviates: ten attempts instead of any number, and a ratio uniform in its logarithm, so that tall boxes are as
        likely as wide ones; both as in torchvision and timm, which refuse a box as high or as wide as the image.
    Example:
        >>> top, left, bottom, right = sample_erasing(1, 32, 32, 1.0, (0.25, 0.25), (1.0, 1.0))[0, 0].tolist()
        >>> bottom - top, right - left
        (16, 16)
    """
    size = torch.tensor([height, width], device="cpu")
    chance = torch.rand(count, 1, dtype=torch.float64, generator=generator, device="cpu")
    place = torch.rand(count, 2, dtype=torch.float64, generator=generator, device="cpu")
    share, stretch = torch.rand(2, count, ATTEMPTS, dtype=torch.float64, generator=generator, device="cpu")
    area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * stretch).exp()
    sides = torch.stack([area * aspect, area / aspect], dim=-1).sqrt().round().long()
    fits = ((sides >= 1) & (sides <= size)).all(dim=-1)
    side = sides[torch.arange(count, device="cpu"), fits.int().argmax(dim=1)]
    first = (place * (size - side + 1)).long()
    erased = fits.any(dim=1, keepdim=True) & (chance < prob)
    return (torch.cat([first, first + side], dim=-1) * erased).unsqueeze(1)


def clipped_boxes(centers: Tensor, sides: Tensor | int, height: int, width: int) -> Tensor:
    """Boxes around pixels, without what would lie outside the image.

    Args:
        centers: (..., 2) int64, row and column of the middle of each box (pixels).
        sides: height and width of each box (pixels), broadcast to `centers`.
        height, width: size of an image (pixels).
    Returns:
        (..., 4) int64: top, left, bottom, right (pixels; the last two are the first ones outside).
    Example:
        >>> clipped_boxes(torch.tensor([[0, 1]]), 2, height=3, width=3)
        tensor([[0, 0, 1, 2]])
    """
    first = centers - sides // 2
    outside = torch.tensor([height, width, height, width], device=centers.device)
    return torch.cat([first, first + sides], dim=-1).clamp(min=0).minimum(outside)


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Which pixels lie inside boxes.

    Args:
        boxes: (..., 4) int64: top, left, bottom, right (pixels).
        height, width: size of an image (pixels).
    Returns:
        (..., height, width) bool, on the device of `boxes`.
    Example:
        >>> box_mask(torch.tensor([0, 1, 2, 2]), 2, 3)
        tensor([[False,  True, False],
                [False,  True, False]])
    """
    top, left, bottom, right = boxes.unsqueeze(-2).unbind(-1)
    rows, columns = torch.arange(height, device=boxes.device), torch.arange(width, device=boxes.device)
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return in_rows.unsqueeze(-1) & in_columns.unsqueeze(-2)


def pixels(images: Tensor) -> Any:
    """The memory of images on a CPU as a numpy array, whose slices are written in a quarter of a tensor's time.

    Args:
        images: any tensor.
    Returns:
        An array of the same memory, of the bits of bfloat16, which numpy lacks; None for what is on another device or
        takes part in a gradient.
    Example:
        >>> pixels(torch.ones(2)), pixels(torch.ones(2, requires_grad=True))
        (array([1., 1.], dtype=float32), None)
    """
    if images.device.type != "cpu" or (images.requires_grad and torch.is_grad_enabled()):
        return None
    images = images.detach()
    return (images.view(torch.int16) if images.dtype == torch.bfloat16 else images).numpy()


def erase(images: Tensor, boxes: Tensor, fill: float | Sequence[float] = 0.0, inplace: bool = False) -> Tensor:
    """Fill boxes in each image with a constant.

        images'[n, c, top:bottom, left:right] = fill[c]   for each box of image n

    Args:
        images: (N, C, H, W).
        boxes: (N, holes, 4) int64: top, left, bottom, right (pixels), inside the image; empty ones erase nothing.
        fill: value written, or one for each channel.
        inplace: write the result into `images`.
    Returns:
        (N, C, H, W); a new tensor unless `inplace`.
    Raises:
        ValueError: images of another number of dimensions or channels, boxes of another number of images, or a fill
            that the images cannot hold.
    Example:
        >>> erase(torch.ones(1, 1, 2, 3), torch.tensor([[[0, 1, 2, 2]]]))
        tensor([[[[1., 0., 1.],
                  [1., 0., 1.]]]])
    """
    _check_boxes("erase", images, boxes)
    values = [fill] if isinstance(fill, (int, float)) else list(fill)
    _check_values(images, values)
    if len(values) > 1 and images.shape[1] not in (0, len(values)):
        fix = "Give one number, or one for each channel"
        raise ValueError(message("erase", "fill", f"{images.shape[1]} values, one for each channel", fill, fix))
    result = images if inplace else images.clone()
    if (array := pixels(result)) is None:
        mask = box_mask(boxes.to(images.device, non_blocking=True), *images.shape[-2:]).any(dim=1, keepdim=True)
        parts = [result] if len(values) == 1 else [result[:, c : c + 1] for c in range(images.shape[1])]
        for part, value in zip(parts, values, strict=False):  # a batch without channels takes any fill
            part.masked_fill_(mask, value)
        return result
    written = pixels(torch.tensor(values[: max(1, images.shape[1])], dtype=images.dtype, device="cpu").view(-1, 1, 1))
    for image, holes in zip(array, boxes.tolist(), strict=True):
        for top, left, bottom, right in holes:
            image[:, top:bottom, left:right] = written
    return result


def erase_with_noise(images: Tensor, boxes: Tensor, seeds: Tensor, inplace: bool = False) -> Tensor:
    """Fill boxes in each image with noise: standard normal numbers, or any of the 256 values where images are uint8.

    An image's noise is made on the CPU, from a generator with the image's own seed: the same on every device, and only
    as much as is erased.

    Args:
        images: (N, C, H, W) floating or uint8.
        boxes: (N, holes, 4) int64: top, left, bottom, right (pixels), inside the image; empty ones erase nothing.
        seeds: (N,) int64, at least 0.
        inplace: write the result into `images`.
    Returns:
        (N, C, H, W); a new tensor unless `inplace`.
    Raises:
        ValueError: images of another number of dimensions, or boxes of another number of images.
        TypeError: images of other integers.
    Example:
        >>> noisy = erase_with_noise(torch.ones(1, 1, 2, 3), torch.tensor([[[0, 1, 2, 2]]]), torch.tensor([0]))
        >>> (noisy != 1).tolist()
        [[[[False, True, False], [False, True, False]]]]
    """
    _check_boxes("erase_with_noise", images, boxes)
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        fix = "Convert them, or fill with a number"
        raise TypeError(message("erase_with_noise", "images", "floating or uint8", images.dtype, fix))
    result = images if inplace else images.clone()
    for n, (holes, seed) in enumerate(zip(boxes.tolist(), seeds.tolist(), strict=True)):
        source = Generator().manual_seed(seed)
        for top, left, bottom, right in holes:
            window = result[n, :, top:bottom, left:right]
            if images.is_floating_point():
                noise = torch.randn(window.shape, generator=source, device="cpu", dtype=torch.float32)
            else:
                noise = torch.randint(256, window.shape, generator=source, dtype=torch.uint8, device="cpu")
            window.copy_(noise, non_blocking=True)
    return result


def cutout(images: Tensor, centers: Tensor, size: int, fill: float = 0.0, inplace: bool = False) -> Tensor:
    """Fill a square in each image; what would lie outside the image is clipped.

        images'[n, :, r, c] = fill   where  -(size // 2) <= r - row < size - size // 2,  the same for c

    Args:
        images: (N, C, H, W).
        centers: (N, holes, 2) int64, row and column of the middle of each hole (pixels).
        size: side of the square (pixels); a side of 15 cuts 15.
        fill: value written.
        inplace: write the result into `images`.
    Returns:
        (N, C, H, W); a new tensor unless `inplace`.
    Raises:
        ValueError: images of another number of dimensions, or a fill that their dtype cannot hold.
    References:
        DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017,
        arXiv:1708.04552, section 3.1.
        Deviates: an odd side is cut in full (the authors' code cuts one pixel less).
    Example:
        >>> cutout(torch.ones(1, 1, 3, 3), torch.tensor([[[0, 1]]]), size=2)
        tensor([[[[0., 0., 1.],
                  [1., 1., 1.],
                  [1., 1., 1.]]]])
    """
    check_images("cutout", images)
    return erase(images, clipped_boxes(centers, size, *images.shape[-2:]), fill, inplace)


def _check_boxes(owner: str, images: Tensor, boxes: Tensor) -> None:
    check_images(owner, images)
    if boxes.dim() != 3 or boxes.shape[::2] != (len(images), 4):
        fix = "Draw them with sample_erasing(len(images), ...)"
        raise ValueError(message(owner, "boxes", f"of shape ({len(images)}, holes, 4)", tuple(boxes.shape), fix))


def _check_values(images: Tensor, values: Sequence[float]) -> None:
    for value in values:
        if not holds(images.dtype, value):
            fix = "Integers hold no fractions, and no dtype what is out of its range"
            raise ValueError(message("erase", "fill", f"a value of {images.dtype}", value, fix))
