"""The operations of RandAugment on batches of pictures, each picture with its own magnitude.

Rounding follows torchvision's v2 operations on tensors, step by step: a pixel that lies between two levels, or between
two pixels, then falls on the same side.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SHEARS_AND_TURNS = ("ShearX", "ShearY", "Rotate")
TRANSLATIONS = ("TranslateX", "TranslateY")


def affine_matrices(ops: Tensor, magnitudes: Tensor, height: int, width: int) -> Tensor:
    """Where each pixel of a picture comes from.

        column' / (width / 2), row' / (height / 2) = matrix @ (column, row, 1)   in pixels from the picture's middle

    Args:
        ops: (M,) int64, positions in SHEARS_AND_TURNS.
        magnitudes: (M,) float64: slope of a shear about the upper left corner, degrees of a rotation about the middle.
        height, width: size of a picture (pixels).
    Returns:
        (M, 2, 3) float32.
    Example:
        >>> affine_matrices(torch.tensor([0]), torch.tensor([0.5]), 8, 2)
        tensor([[[1.0000, 0.5000, 2.0000],
                 [0.0000, 0.2500, 0.0000]]])
    """
    one, zero = torch.ones_like(magnitudes), torch.zeros_like(magnitudes)
    turn = torch.deg2rad(magnitudes % 360)
    cos, sin = turn.cos(), turn.sin()
    shear_x = [one, magnitudes, magnitudes * height / 2, zero, one, zero]
    shear_y = [one, zero, zero, magnitudes, one, magnitudes * width / 2]
    rotate = [cos, -sin, zero, sin, cos, zero]
    table = torch.stack(shear_x + shear_y + rotate).view(len(SHEARS_AND_TURNS), 6, -1)
    matrices = table[ops, :, torch.arange(len(ops), device="cpu")].view(-1, 2, 3)
    return matrices.float() / torch.tensor([[width / 2], [height / 2]], device="cpu", dtype=torch.float32)


def warp(images: Tensor, matrices: Tensor, fill: float = 0.0) -> Tensor:
    """Move the pixels of each picture along its matrix, to the nearest.

    Args:
        images: (M, C, H, W) of any dtype.
        matrices: (M, 2, 3) float32 on the CPU, from `affine_matrices`.
        fill: value of what comes from outside.
    Returns:
        (M, C, H, W) of the same dtype; a new tensor.
    Example:
        >>> upside_down = affine_matrices(torch.tensor([2]), torch.tensor([180.0]), 1, 3)
        >>> warp(torch.tensor([[[[1, 2, 3]]]]), upside_down)
        tensor([[[[3, 2, 1]]]])
    """
    height, width = images.shape[-2:]
    matrices = matrices.to(images.device, non_blocking=True)[..., None, None]
    column = torch.arange(width, device=images.device, dtype=torch.float32) + (0.5 - width / 2)
    row = torch.arange(height, device=images.device, dtype=torch.float32) + (0.5 - height / 2)
    row = row.unsqueeze(-1)

    # In float32, step by step: rounding decides about a pixel that lies between two others.
    place = (matrices[:, :, 0] * column + matrices[:, :, 1] * row).add_(matrices[:, :, 2])
    size = torch.tensor([[[width]], [[height]]], device="cpu", dtype=torch.float32).to(images.device, non_blocking=True)
    place = place.add_(1).mul_(size / 2).sub_(0.5).round_().clamp_(min=-1).minimum(size)
    # A border of one pixel holds what comes from outside.
    across, down = place.add_(1).int().unbind(1)
    index = down.mul_(width + 2).add_(across).long()
    bordered = F.pad(images, (1, 1, 1, 1), value=fill).flatten(2)
    return bordered.gather(2, index.view(len(images), 1, -1).expand(-1, images.shape[1], -1)).view(images.shape)


def translate(images: Tensor, name: str, magnitudes: Tensor, fill: float = 0.0) -> Tensor:
    """Move the pixels of each picture by whole pixels; as `warp` does, in a tenth of the time.

    Args:
        images: (M, C, H, W) of any dtype.
        name: one of TRANSLATIONS.
        magnitudes: (M,) on the CPU: pixels to the right or down; a fraction is cut off.
        fill: value of what comes from outside.
    Returns:
        (M, C, H, W) of the same dtype; a new tensor.
    Example:
        >>> translate(torch.tensor([[[[1, 2, 3]]]]), "TranslateX", torch.tensor([1.9]), fill=9)
        tensor([[[[9, 1, 2]]]])
    """
    axis = 0 if name == "TranslateX" else 2
    most = images.shape[-1 if name == "TranslateX" else -2]
    moved = []
    for image, pixels in zip(images.unbind(), magnitudes.clamp(-most, most).int().tolist(), strict=True):
        border = [0, 0, 0, 0]
        border[axis : axis + 2] = pixels, -pixels
        moved.append(F.pad(image, border, value=fill))
    return torch.stack(moved)


def recolour(name: str, images: Tensor, magnitudes: Tensor) -> Tensor:
    """Change the colours of each picture by its own magnitude.

    Args:
        name: one of COLOUR.
        images: (M, C, H, W) uint8, or floats in [0, 1]; the latter may be overwritten.
        magnitudes: (M,) float64 on the CPU: factor minus 1 of a blend, bits of Posterize, threshold of Solarize as a
            share of the range.
    Returns:
        (M, C, H, W) of the same dtype.
    Example:
        >>> recolour("Brightness", torch.full((1, 1, 1, 2), 100, dtype=torch.uint8), torch.tensor([0.5]))
        tensor([[[[150, 150]]]], dtype=torch.uint8)
    """
    return COLOUR[name](images, magnitudes.view(-1, 1, 1, 1))


def _bound(images: Tensor) -> int:
    return 1 if images.is_floating_point() else 255


def _floats(images: Tensor) -> Tensor:
    return images.to(torch.promote_types(images.dtype, torch.float32))


def _like(magnitudes: Tensor, images: Tensor) -> Tensor:
    return magnitudes.to(images.dtype).to(images.device, non_blocking=True)


def _back(work: Tensor, images: Tensor) -> Tensor:
    """Floats as pictures of the dtype of `images`, cut to their range; levels lose their fraction."""
    work.clamp_(0, _bound(images))
    # Straight from float32 to uint8 takes six times as long on a CPU.
    return work.to(images.dtype) if images.is_floating_point() else work.to(torch.int16).to(images.dtype)


def _blend(work: Tensor, other: Tensor, magnitudes: Tensor) -> Tensor:
    factor = 1 + magnitudes
    return work.mul_(_like(factor, work)).addcmul_(other, _like(1 - factor, work))


def _gray(work: Tensor, bound: int) -> Tensor:
    """Luminance of three channels, the mean of any other number of them: (M, 1, H, W)."""
    if work.shape[1] != 3:
        return work.mean(1, keepdim=True)
    red, green, blue = work.unbind(1)
    gray = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(1)
    return gray.floor_() if bound == 255 else gray


def _brightness(images: Tensor, magnitudes: Tensor) -> Tensor:
    work = _floats(images)
    return _back(work.mul_(_like(1 + magnitudes, work)), images)


def _color(images: Tensor, magnitudes: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    work = _floats(images)
    return _back(_blend(work, _gray(work, _bound(images)), magnitudes), images)


def _contrast(images: Tensor, magnitudes: Tensor) -> Tensor:
    work = _floats(images)
    mean = _gray(work, _bound(images)).mean((1, 2, 3), keepdim=True)
    mean = mean.expand_as(work).contiguous()  # as a view it takes five times as long on a CPU
    return _back(_blend(work, mean, magnitudes), images)


def _sharpness(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Blend with the picture blurred by 3 x 3 weights of 1, 5 in the middle; the border stays."""
    work = _floats(images)
    inner = work[..., 1:-1, 1:-1]
    columns = (work[..., :-2] + work[..., 1:-1]).add_(work[..., 2:])
    blurred = (columns[..., :-2, :] + columns[..., 1:-1, :]).add_(columns[..., 2:, :]).add_(inner, alpha=4).div_(13)
    if _bound(images) == 255:
        blurred.round_()
    inner.addcmul_(blurred.sub_(inner), _like(1 - (1 + magnitudes), work))
    return _back(work, images)


def _posterize(images: Tensor, magnitudes: Tensor) -> Tensor:
    levels = 2 ** magnitudes.round()
    if _bound(images) == 255:
        return images.bitwise_and(_like(256 - 256 / levels, images))
    work = _floats(images)
    levels = _like(levels, work)
    return _back(work.mul_(levels).floor_().minimum(levels - 1).div_(levels), images)


def _solarize(images: Tensor, magnitudes: Tensor) -> Tensor:
    # The mask has the dtype of the numbers: a comparison that gives bool takes ten times as long on a CPU.
    if _bound(images) == 255:
        bright = images.clone().ge_(_like((255 * magnitudes).float().ceil(), images))
        return bright.mul_(255).bitwise_xor_(images)
    work = _floats(images)
    bright = work.clone().ge_(_like(magnitudes, work))
    return _back(bright.sub_(work).abs_(), images)


def _autocontrast(images: Tensor, magnitudes: Tensor) -> Tensor:
    work = _floats(images)
    low, high = work.amin((2, 3), keepdim=True), work.amax((2, 3), keepdim=True)
    flat = low == high
    scale = torch.where(flat, 1.0, (high - low) * (1 / _bound(images)))
    return _back(work.sub_(torch.where(flat, 0.0, low)).div_(scale), images)


def _equalize(images: Tensor, magnitudes: Tensor) -> Tensor:
    """As Pillow does it: a table from the running sum of the counts below each level; floats by way of 256 levels."""
    levels = images if _bound(images) == 255 else _floats(images) * 255.999
    levels = levels.flatten(0, 1).flatten(1).long()
    counts = torch.zeros(len(levels), 256, dtype=torch.int32, device=images.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=torch.int32))
    below = counts.cumsum(1)
    last = counts.gather(1, below.argmax(1, keepdim=True))
    step = (levels.shape[1] - last) // 255
    below = F.pad(below[:, :-1], (1, 0))
    table = ((below + step // 2) // step.clamp(min=1)).clamp(0, 255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    table = (table if _bound(images) == 255 else table.double() / 255).to(images.dtype)
    return table.gather(1, levels).view(images.shape)


COLOUR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}
