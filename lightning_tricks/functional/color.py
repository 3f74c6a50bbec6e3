"""Colour jitter, lighting and normalisation: draw the amounts, then change the colours."""

from itertools import product

import torch
from torch import Generator, Tensor

from lightning_tricks.functional.checks import check_channels, check_images, message
from lightning_tricks.functional.geometry import at_once

UNCHANGED = torch.tensor([1.0, 1.0, 1.0, 0.0], device="cpu", dtype=torch.float32)
"""Factors of brightness, contrast and saturation and shift of hue that leave an image as it is."""


def sample_jitter(
    count: int,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw how much each image's colours change, and in which order.

        factor ~ U(max(0, 1 - b), 1 + b)  for brightness, contrast and saturation,  shift ~ U(-h, h)  for hue

    Args:
        count: images in the batch.
        brightness, contrast, saturation: largest distance of a factor from 1, at least 0.
        hue: largest shift, in [0, 0.5] (turns of the colour wheel).
        generator: CPU generator; None takes torch's global one.
    Returns:
        amounts: (count, 4) float32: factor of brightness, of contrast, of saturation, and shift of hue.
        order: (count, 4) int64: columns of `amounts`, in the order in which they are applied.
    Example:
        >>> amounts, order = sample_jitter(5, brightness=0.4)
        >>> amounts.shape, sorted(order[0].tolist())
        (torch.Size([5, 4]), [0, 1, 2, 3])
    """
    reach = torch.tensor([brightness, contrast, saturation, hue], device="cpu", dtype=torch.float32)
    low = torch.maximum(UNCHANGED - reach, torch.tensor([0.0, 0.0, 0.0, -0.5], device="cpu", dtype=torch.float32))
    uniform = torch.rand((2, count, 4), generator=generator, device="cpu", dtype=torch.float32)
    return low + (UNCHANGED + reach - low) * uniform[0], uniform[1].argsort(1)


def jitter(images: Tensor, amounts: Tensor, order: Tensor, inplace: bool = False) -> Tensor:
    """Change brightness, contrast, saturation and hue of each image, in an order of its own.

        brightness:  factor * images
        contrast:    factor * images + (1 - factor) * mean over the image of grey
        saturation:  factor * images + (1 - factor) * grey          grey = 0.2989 r + 0.587 g + 0.114 b
        hue:         the colour wheel turned by `shift`

    After each the values are clamped to [0, 1] (floats), or truncated and clamped to the dtype's range (integers), as
    torchvision does. What leaves an image as it is (a factor of 1, a shift of 0) is left out.

    Args:
        images: (N, C, H, W) with values in [0, 1], or integers up to the largest of their dtype. Of one channel,
            saturation and hue are left alone; of another number than 3 the mean of the channels is their grey.
        amounts: (N, 4) float32 on the CPU, as `sample_jitter` gives them.
        order: (N, 4) int64 on the CPU, a permutation of 0 to 3 for each image.
        inplace: write the result into `images`.
    Returns:
        (N, C, H, W); a new tensor unless `inplace`.
    Raises:
        ValueError: images of another number of dimensions; saturation or hue of images of neither 1 nor 3 channels.
    Example:
        >>> jitter(torch.full((1, 1, 1, 1), 0.25), torch.tensor([[2.0, 1, 1, 0]]), torch.tensor([[0, 1, 2, 3]]))
        tensor([[[[0.5000]]]])
    """
    check_images("jitter", images)
    channels = images.shape[1]
    active = amounts != UNCHANGED
    if channels not in (0, 1, 3) and bool(active[:, 2:].any()):
        fix = "Leave saturation and hue at 0 for images of no colours"
        raise ValueError(message("ColorJitter", "images", "of 1 or 3 channels (N, C, H, W)", tuple(images.shape), fix))
    if channels < 3:
        active[:, 2:] = False
    jittered = images if inplace else images.clone()
    if images.numel() == 0:
        return jittered
    whole = not images.is_floating_point()
    top = torch.iinfo(images.dtype).max if whole else 1.0
    step = at_once(images)
    for turn, kind in product(range(4), range(4)):
        chosen = ((order[:, turn] == kind) & active[:, kind]).nonzero().squeeze(1)
        for start in range(0, len(chosen), step):
            some = chosen[start : start + step]
            index = some.to(images.device, non_blocking=True)
            part = jittered.index_select(0, index).to(_work_dtype(images))
            amount = amounts[some, kind].to(part.device, part.dtype, non_blocking=True).view(-1, 1, 1, 1)
            part = _turned(part, amount, top, whole) if kind == 3 else _blended(part, amount, kind, whole)
            jittered.index_copy_(0, index, part.clamp_(0, top).to(images.dtype))
    return jittered


def _blended(images: Tensor, factor: Tensor, kind: int, whole: bool) -> Tensor:
    """Brightness, contrast or saturation, in place: a mix with black, the mean grey or each pixel's grey."""
    if kind == 0:
        return images.mul_(factor)
    grey = images
    if images.shape[1] == 3:
        red, green, blue = images.chunk(3, dim=1)
        grey = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)
        grey = grey.floor_() if whole else grey
    if kind == 1:
        grey = grey.mean((1, 2, 3), keepdim=True)
    return images.mul_(factor).addcmul_(grey, 1 - factor)


def _turned(images: Tensor, shift: Tensor, top: float, whole: bool) -> Tensor:
    """Hue, on the hexagon of hues: red lies at 0, green at 2, blue at 4 of 6."""
    red, green, blue = images.div_(top).chunk(3, dim=1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    span = chroma + (chroma == 0)  # grey has any hue
    hue = torch.where(high == green, (blue - red).div_(span).add_(2), (red - green).div_(span).add_(4))
    hue = torch.where(high == red, (green - blue).div_(span), hue).add_(6 * shift).remainder_(6)
    red = (hue - 3).abs_().sub_(1)
    green = (hue - 2).abs_().neg_().add_(2)
    blue = (hue - 4).abs_().neg_().add_(2)
    images = torch.cat([red, green, blue], dim=1).clamp_(0, 1).mul_(chroma).add_(low)
    # Integers: equal shares of [0, 1], as torchvision has it.
    return images.mul_(top + 1 - 1e-3) if whole else images


def sample_lighting(count: int, std: float = 0.1, generator: Generator | None = None) -> Tensor:
    """Draw how far each image's colours go along each principal component.

        alpha ~ N(0, std ** 2)

    Args:
        count: images in the batch.
        std: standard deviation, at least 0.
        generator: CPU generator; None takes torch's global one.
    Returns:
        (count, 3) float32 on the CPU.
    Example:
        >>> sample_lighting(4).shape
        torch.Size([4, 3])
    """
    return torch.randn((count, 3), generator=generator, device="cpu", dtype=torch.float32) * std


def lighting(
    images: Tensor, alphas: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, inplace: bool = False
) -> Tensor:
    """Add to each pixel of an image one colour, made of the principal components of colours.

        images' = images + eigenvectors @ (alphas * eigenvalues)

    Args:
        images: (N, 3, H, W), floats in units of [0, 1], which are not clamped; or uint8, rounded and clamped.
        alphas: (N, 3), as `sample_lighting` gives them.
        eigenvalues: (3,) of the covariance of colours in [0, 1].
        eigenvectors: (3, 3), a column for each eigenvalue, a row for each channel.
        inplace: write the result into `images`.
    Returns:
        (N, 3, H, W); a new tensor unless `inplace`.
    Raises:
        ValueError: images of another number of dimensions, or of channels.
    References:
        Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", 2012, section 4.1.
    Example:
        >>> lighting(torch.zeros(1, 3, 1, 1), torch.ones(1, 3), torch.tensor([1.0, 2.0, 3.0]), torch.eye(3)).flatten()
        tensor([1., 2., 3.])
    """
    check_channels("PCALighting", images, 3)
    lit = images if inplace else images.clone()
    if images.shape[1] == 0:
        return lit
    shift = (alphas * eigenvalues).unsqueeze(1).mul(eigenvectors).sum(2)  # autocast would take a product in bfloat16
    shift = shift.to(images.device, _work_dtype(images), non_blocking=True)
    shift = shift[:, :, None, None]
    if images.is_floating_point():
        return lit.add_(shift)
    top = torch.iinfo(images.dtype).max
    for part, colour in zip(torch.split(lit, at_once(lit)), torch.split(shift * top, at_once(lit)), strict=True):
        part.copy_((part + colour).round_().clamp_(0, top))
    return lit


def normalize(images: Tensor, mean: Tensor, std: Tensor, inplace: bool = False) -> Tensor:
    """Subtract the mean of each channel and divide by its standard deviation.

        images' = (images - mean) / std

    Args:
        images: (N, C, H, W), floats, or uint8, which are scaled to [0, 1] first.
        mean: (C,) in units of [0, 1] where the images are uint8.
        std: (C,), above 0, in the same units.
        inplace: write the result into `images`, where these are floats.
    Returns:
        (N, C, H, W), float32 of uint8; a new tensor unless `inplace` and floats.
    Raises:
        ValueError: images of another number of dimensions, or of channels.
    Example:
        >>> normalize(torch.full((1, 1, 1, 2), 255, dtype=torch.uint8), torch.tensor([0.5]), torch.tensor([0.25]))
        tensor([[[[2., 2.]]]])
    """
    check_channels("Normalize", images, len(mean))
    floating = images.is_floating_point()
    dtype = _work_dtype(images)
    normalized = images if inplace and floating else images.to(images.dtype if floating else dtype, copy=True)
    if images.shape[1] == 0:
        return normalized
    scale = 1 if floating else torch.iinfo(images.dtype).max
    mean, std = ((value * scale).to(images.device, dtype, non_blocking=True)[:, None, None] for value in (mean, std))
    return normalized.sub_(mean).div_(std)


def _work_dtype(images: Tensor) -> torch.dtype:
    return torch.promote_types(images.dtype, torch.float32)
