"""RandAugment and TrivialAugment: draw the operations, look up their magnitudes, then apply them."""

import torch
from torch import Generator, Tensor

from lightning_tricks.functional.checks import check_images, message
from lightning_tricks.functional.geometry import at_once
from lightning_tricks.functional.picture_ops import (
    COLOUR,
    SHEARS_AND_TURNS,
    TRANSLATIONS,
    affine_matrices,
    recolour,
    translate,
    warp,
)

GEOMETRY = (*SHEARS_AND_TURNS, *TRANSLATIONS)
OPS = (*GEOMETRY, *COLOUR, "Identity")
SIGNED = (*GEOMETRY, "Brightness", "Color", "Contrast", "Sharpness")


def randaugment_ranges(height: int, width: int) -> dict[str, tuple[float, float]]:
    """Give the magnitude of each operation of RandAugment at its first and last bin, as torchvision has them.

    Args:
        height, width: size of a picture (pixels).
    Returns:
        Slope of a shear, pixels of a translation, degrees of a rotation, factor minus 1 of a blend, bits kept by
        Posterize, threshold of Solarize (share of the range); operations left out have no magnitude.
    Example:
        >>> randaugment_ranges(331, 331)["TranslateX"]
        (0.0, 150.0)
    """
    ranges = dict.fromkeys(SIGNED, (0.0, 0.9))
    ranges |= {"ShearX": (0.0, 0.3), "ShearY": (0.0, 0.3), "Rotate": (0.0, 30.0)}
    ranges |= {"TranslateX": (0.0, 150.0 / 331.0 * width), "TranslateY": (0.0, 150.0 / 331.0 * height)}
    return ranges | {"Posterize": (8.0, 4.0), "Solarize": (1.0, 0.0)}


def trivialaugment_ranges() -> dict[str, tuple[float, float]]:
    """Give the same for TrivialAugment's wide space, where translations do not depend on the picture's size.

    Returns:
        As `randaugment_ranges`.
    Example:
        >>> trivialaugment_ranges()["Rotate"]
        (0.0, 135.0)
    """
    ranges = dict.fromkeys(SIGNED, (0.0, 0.99))
    ranges |= {"TranslateX": (0.0, 32.0), "TranslateY": (0.0, 32.0), "Rotate": (0.0, 135.0)}
    return ranges | {"Posterize": (8.0, 2.0), "Solarize": (1.0, 0.0)}


def sample_randaugment(
    count: int, num_ops: int, choices: int = len(OPS), generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw the operations of each image and their signs, all independent and uniform.

    Args:
        count: images in the batch.
        num_ops: operations applied to each image, one after another.
        choices: how many operations there are to choose from.
        generator: CPU generator; None takes torch's global one.
    Returns:
        ops: (count, num_ops) int64 in [0, choices).
        signs: (count, num_ops) int64, 1 or -1; drawn for operations that have none, too.
    Example:
        >>> ops, signs = sample_randaugment(4, 2)
        >>> ops.shape, signs.shape
        (torch.Size([4, 2]), torch.Size([4, 2]))
    """
    ops = torch.randint(choices, (count, num_ops), generator=generator, device="cpu")
    return ops, 1 - 2 * torch.randint(2, (count, num_ops), generator=generator, device="cpu")


def op_magnitudes(
    ranges: dict[str, tuple[float, float]], ops: Tensor, bins: Tensor, signs: Tensor, num_bins: int = 31
) -> Tensor:
    """Look up what a bin means for each operation.

    Args:
        ranges: magnitude of each operation at its first and last bin, evenly spaced between.
        ops: (N, num_ops) int64, positions in OPS.
        bins: (N, num_ops) in [0, num_bins - 1]; between two whole bins the magnitudes are interpolated.
        signs: (N, num_ops), 1 or -1; operations without a sign ignore theirs.
        num_bins: number of bins, at least 2.
    Returns:
        (N, num_ops) float64.
    Example:
        >>> op = torch.tensor([[OPS.index("Rotate")]])
        >>> op_magnitudes({"Rotate": (0.0, 30.0)}, op, torch.tensor([[9]]), torch.tensor([[-1]]))
        tensor([[-9.]], dtype=torch.float64)
    """
    # In float32, as torchvision has them: a threshold or a tie may hang on the last digit.
    rows = [torch.linspace(*ranges.get(name, (0.0, 0.0)), num_bins, device="cpu", dtype=torch.float32) for name in OPS]
    table = torch.stack(rows).double()
    bins = bins.double()
    low, high = table[ops, bins.floor().long()], table[ops, bins.ceil().long()]
    signed = torch.tensor([name in SIGNED for name in OPS], device="cpu")[ops]
    return torch.lerp(low, high, bins.frac()) * torch.where(signed, signs, 1)


@torch.no_grad()
def randaugment(
    images: Tensor, ops: Tensor, magnitudes: Tensor, fill: float = 0.0, inplace: bool = False, colour: bool = True
) -> Tensor:
    """Apply to each image its own operations, one after another.

    Args:
        images: (N, C, H, W) uint8, or floats in [0, 1]; of any dtype without `colour`.
        ops: (N, num_ops) int64 on the CPU, positions in OPS.
        magnitudes: (N, num_ops) float64 on the CPU, from `op_magnitudes`.
        fill: value of what a shear, translation or rotation brings in from outside, in the images' own units.
        inplace: write the result into `images`.
        colour: whether colours change, or pixels only move (as masks do).
    Returns:
        (N, C, H, W) of the same dtype and memory format; a new tensor unless `inplace`. It carries no gradient.
    Raises:
        ValueError: images of another number of dimensions; ops or magnitudes of another length.
    References:
        Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space", 2020,
        arXiv:1909.13719. The operations are torchvision's v2 ones on uint8 tensors, interpolation nearest.
        Deviates: the gray value of images of neither 1 nor 3 channels is the mean of their channels.
    Example:
        >>> invert = torch.tensor([[OPS.index("Solarize")]]), torch.tensor([[0.0]], dtype=torch.float64)
        >>> randaugment(torch.tensor([[[[0.25, 1.0]]]]), *invert)
        tensor([[[[0.7500, 0.0000]]]])
    """
    check_images("randaugment", images)
    if not len(images) == len(ops) == len(magnitudes):
        got = (len(images), len(ops), len(magnitudes))
        raise ValueError(message("randaugment", "ops and magnitudes", "one row for each image", got, "Draw them anew"))
    out = images if inplace else images.clone()
    if out.numel() == 0:
        return out
    size = at_once(out) if out.device.type == "cpu" else len(out)  # elsewhere there is no cache to stay in
    views = out.unbind()
    for op, magnitude in zip(ops.unbind(1), magnitudes.unbind(1), strict=True):
        for name, group in _groups(op, colour):
            parameters = magnitude[group]
            if name in SHEARS_AND_TURNS:
                parameters = affine_matrices(op[group], parameters, *out.shape[-2:])
            for rows, values in zip(torch.split(group, size), torch.split(parameters, size), strict=True):
                part = _apply(name, out.index_select(0, rows.to(out.device, non_blocking=True)), values, fill)
                # A loop of copies: index_copy_ takes each number by itself on a CPU, many times as long.
                torch._foreach_copy_([views[row] for row in rows.tolist()], part.unbind())
    return out


def _groups(op: Tensor, colour: bool) -> list[tuple[str, Tensor]]:
    """Names of operations that change something, and the images they change; SHEARS_AND_TURNS are one group."""
    counts = torch.bincount(op, minlength=len(OPS)).tolist()
    one = len(SHEARS_AND_TURNS)
    groups = torch.split(op.argsort(), [sum(counts[:one]), *counts[one:]])
    names = OPS[one - 1 : -1] if colour else GEOMETRY[one - 1 :]
    return [(name, rows) for name, rows in zip(names, groups, strict=False) if len(rows)]


def _apply(name: str, images: Tensor, parameters: Tensor, fill: float) -> Tensor:
    if name in SHEARS_AND_TURNS:
        return warp(images, parameters, fill)
    if name in TRANSLATIONS:
        return translate(images, name, parameters, fill)
    return recolour(name, images, parameters)
