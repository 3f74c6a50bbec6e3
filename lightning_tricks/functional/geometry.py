"""Flips, crops and resized crops: draw the places, then move the pixels."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lightning_tricks.functional.checks import check_images, holds, message

Axis = Literal["horizontal", "vertical"]
PaddingMode = Literal["constant", "reflect", "edge"]
Interpolation = Literal["bilinear", "nearest"]

ATTEMPTS = 10


def at_once(images: Tensor) -> int:
    """How many images are worked on at once: of more the copies leave the cache, of fewer the calls cost more.

    Args:
        images: (N, C, H, W).
    Returns:
        At least 1; 170 of 3 x 32 x 32, 3 of 3 x 224 x 224.
    Example:
        >>> at_once(torch.zeros(8, 3, 32, 32))
        170
    """
    return max(1, 2**19 // max(1, images.shape[1:].numel()))


def sample_flips(count: int, prob: float = 0.5, generator: Generator | None = None) -> Tensor:
    """Draw which images are flipped.

    Args:
        count: images in the batch.
        prob: probability of a flip, in [0, 1].
        generator: CPU generator; None takes torch's global one.
    Returns:
        (count,) bool on the CPU.
    Example:
        >>> sample_flips(3, prob=1.0)
        tensor([True, True, True])
    """
    return torch.rand(count, generator=generator, device="cpu", dtype=torch.float32) < prob


def flip(images: Tensor, flips: Tensor, axis: Axis = "horizontal", inplace: bool = False) -> Tensor:
    """Mirror some of the images.

        images'[n, :, r, c] = images[n, :, r, W - 1 - c]   where flips[n]      (horizontal)
        images'[n, :, r, c] = images[n, :, H - 1 - r, c]   where flips[n]      (vertical)

    Args:
        images: (N, C, H, W).
        flips: (N,) bool on the CPU.
        axis: "horizontal" exchanges left and right, "vertical" top and bottom.
        inplace: write the result into `images`.
    Returns:
        (N, C, H, W); a new tensor unless `inplace`.
    Raises:
        ValueError: images of another number of dimensions.
    Example:
        >>> flip(torch.tensor([[[[1, 2]]], [[[3, 4]]]]), torch.tensor([True, False])).flatten().tolist()
        [2, 1, 3, 4]
    """
    check_images("flip", images)
    flipped = images if inplace else images.clone()
    # One image at a time: its copy stays in the cache, and memory for half a batch need not be had.
    for n in flips.nonzero().squeeze(1).tolist():
        flipped[n].copy_(flipped[n].flip(-1 if axis == "horizontal" else -2))
    return flipped


def sample_crops(
    count: int, height: int, width: int, size: tuple[int, int], generator: Generator | None = None
) -> Tensor:
    """Draw where crops begin, uniform over the places where they fit.

    Args:
        count: images in the batch.
        height, width: size of an image with its padding (pixels).
        size: height and width of a crop (pixels).
        generator: CPU generator; None takes torch's global one.
    Returns:
        (count, 2) int64: row in [0, height - size[0]] and column in [0, width - size[1]] of the upper left corner.
    Raises:
        ValueError: a crop larger than the image.
    Example:
        >>> sample_crops(2, 8, 8, (8, 8))
        tensor([[0, 0],
                [0, 0]])
    """
    if size[0] > height or size[1] > width:
        condition = f"at most {(height, width)}, an image with its padding (pixels)"
        raise ValueError(message("RandomCrop", "size", condition, size, "Give more padding, or resize first"))
    rows = torch.randint(height - size[0] + 1, (count,), generator=generator, device="cpu")
    columns = torch.randint(width - size[1] + 1, (count,), generator=generator, device="cpu")
    return torch.stack([rows, columns], dim=-1)


def crop(
    images: Tensor,
    corners: Tensor,
    size: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    padding_mode: PaddingMode = "constant",
    fill: float = 0.0,
) -> Tensor:
    """Cut a window out of each image, which may be padded first.

        images'[n, :, r, c] = padded[n, :, row[n] + r, column[n] + c]

    Args:
        images: (N, C, H, W).
        corners: (N, 2) int64 on the CPU, row and column of the windows' upper left corners in the padded images
            (pixels).
        size: height and width of the windows (pixels).
        padding: rows added above and below, columns added left and right (pixels).
        padding_mode: what is added: "constant" `fill`, "reflect" the image mirrored at its outermost pixels, "edge"
            these pixels repeated.
        fill: value of constant padding.
    Returns:
        (N, C, *size); always a new tensor.
    Raises:
        ValueError: images of another number of dimensions, a fill that they cannot hold, or more padding than there is
            to reflect.
    Example:
        >>> crop(torch.tensor([[[[1, 2], [3, 4]]]]), torch.tensor([[0, 1]]), (2, 2), padding=(1, 1))
        tensor([[[[0, 0],
                  [1, 2]]]])
    """
    check_images("crop", images)
    cropped = _empty(images, size)
    places = corners.tolist()
    # A few images at a time: what is padded stays in the cache, and memory for a second batch need not be had.
    step = at_once(images)
    for start in range(0, len(images), step):
        padded = _pad(images[start : start + step], padding, padding_mode, fill)
        for n, image in enumerate(padded, start):
            row, column = places[n]
            cropped[n].copy_(image[:, row : row + size[0], column : column + size[1]])
    return cropped


def _empty(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images of another size, in the memory format of these."""
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    shape = (*images.shape[:2], *size)
    return torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=layout)


def _pad(images: Tensor, padding: tuple[int, int], mode: PaddingMode, fill: float) -> Tensor:
    if padding == (0, 0):
        return images
    if mode == "constant":
        if not holds(images.dtype, fill):
            fix = "Images of integers take one of their own values"
            raise ValueError(message("crop", "fill", f"a value of {images.dtype}", fill, fix))
        return F.pad(images, (padding[1], padding[1], padding[0], padding[0]), value=fill)
    last = (images.shape[2] - 1, images.shape[3] - 1)
    if mode == "reflect" and (padding[0] > last[0] or padding[1] > last[1]):
        condition = f"at most {last} to reflect images of {tuple(images.shape[2:])} (pixels)"
        raise ValueError(message("RandomCrop", "padding", condition, padding, "Pad less, or by 'edge'"))
    # Pixels are taken by their places since F.pad reflects no integers.
    for dim, amount, end in ((2, padding[0], last[0]), (3, padding[1], last[1])):
        places = torch.arange(-amount, end + 1 + amount, device=images.device)
        places = places.clamp(0, end) if mode == "edge" else end - (end - places.abs()).abs()
        images = images.index_select(dim, places)
    return images


def sample_resized_crops(
    count: int,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: Generator | None = None,
) -> Tensor:
    """Draw boxes of random area and aspect ratio, uniform over the places where they fit.

        area ~ U(scale) * height * width,  log(aspect) ~ U(log(ratio))
        h = sqrt(area / aspect),  w = sqrt(area * aspect),  rounded

    The first of 10 attempts that lies within the image is taken; where none does, the largest box in the middle whose
    aspect ratio is allowed. All attempts are drawn, so that the number of draws depends on `count` alone.

    Args:
        count: images in the batch.
        height, width: size of an image (pixels).
        scale: smallest and largest area, as a share of the image's, in (0, 1].
        ratio: smallest and largest aspect ratio (width / height), above 0.
        generator: CPU generator; None takes torch's global one.
    Returns:
        (count, 4) int64: row, column, height and width of each box (pixels).
    References:
        Szegedy et al., "Going Deeper with Convolutions", 2015, arXiv:1409.4842, section 6.
    Example:
        >>> sample_resized_crops(1, 8, 8, scale=(1.0, 1.0), ratio=(1.0, 1.0))
        tensor([[0, 0, 8, 8]])
    """
    uniform = torch.rand((2, ATTEMPTS, count), dtype=torch.float64, generator=generator, device="cpu")
    places = torch.rand((2, count), dtype=torch.float64, generator=generator, device="cpu")
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[0])
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (log_low + (log_high - log_low) * uniform[1]).exp()
    heights, widths = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    first = fits.int().argmax(0, keepdim=True)
    found = fits.any(0)
    # The largest box with an allowed aspect ratio, as tall or as wide as the image.
    tallest = max(1, min(height, round(width / ratio[0])))
    widest = max(1, min(width, round(height * ratio[1])))
    h = torch.where(found, heights.gather(0, first)[0], tallest)
    w = torch.where(found, widths.gather(0, first)[0], widest)
    row = torch.where(found, (places[0] * (height - h + 1)).floor(), (height - tallest) // 2)
    column = torch.where(found, (places[1] * (width - w + 1)).floor(), (width - widest) // 2)
    return torch.stack([row, column, h, w], dim=-1).long()


def resized_crop(
    images: Tensor, boxes: Tensor, size: tuple[int, int], interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Cut a box out of each image and resize it.

    Bilinear weights are antialiased: a box that shrinks is averaged and not only sampled. The nearest pixel is that in
    which the middle of the new pixel lies, as mode="nearest-exact" of `F.interpolate` has it.

    Args:
        images: (N, C, H, W); any dtype for "nearest".
        boxes: (N, 4) int64 on the CPU: row, column, height and width of each box (pixels).
        size: new height and width (pixels); bilinear results are at least 2 wide.
        interpolation: "bilinear" or "nearest".
    Returns:
        (N, C, *size) of the dtype of `images`, integers rounded; always a new tensor.
    Raises:
        ValueError: images of another number of dimensions, or a bilinear result of one column.
    Example:
        >>> resized_crop(torch.arange(16.0).view(1, 1, 4, 4), torch.tensor([[2, 0, 2, 4]]), (1, 2))
        tensor([[[[10.7143, 12.2857]]]])
    """
    check_images("resized_crop", images)
    resized = _empty(images, size)
    if interpolation == "nearest":
        numbers = torch.arange(len(images), device=images.device).view(-1, 1, 1)
        rows, columns = (
            _nearest(boxes[:, axis], boxes[:, axis + 2], size[axis]).to(images.device, non_blocking=True)
            for axis in (0, 1)
        )
        return resized.copy_(images[numbers, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1))
    if size[1] == 1:  # of one column F.interpolate makes all rows alike (torch 2.13)
        raise ValueError(message("resized_crop", "size", "at least 2 wide (pixels)", size, "Take 'nearest'"))
    if resized.numel() == 0:  # F.interpolate refuses images of no channels
        return resized
    # The CPU resizes bytes as they are, two to five times as fast as floats; elsewhere there is no such kernel.
    as_is = images.dtype in (torch.float32, torch.float64) or (images.dtype == torch.uint8 and images.is_cpu)
    for n, (row, column, height, width) in enumerate(boxes.tolist()):
        box = images[n : n + 1, :, row : row + height, column : column + width]
        box = F.interpolate(box if as_is else box.float(), size, mode="bilinear", antialias=True)
        resized[n] = box[0] if images.is_floating_point() or as_is else box[0].round()
    return resized


def _nearest(first: Tensor, length: Tensor, size: int) -> Tensor:
    """Places in which the middles of `size` new pixels lie: (N, size), of (N,) first places and lengths."""
    return first[:, None] + (2 * torch.arange(size, device="cpu") + 1) * length[:, None] // (2 * size)
