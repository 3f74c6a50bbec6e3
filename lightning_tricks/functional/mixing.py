"""Mixup and CutMix: draw the parameters, then apply them."""

from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor

from lightning_tricks.functional.checks import message
from lightning_tricks.functional.erasing import box_mask, clipped_boxes, pixels, sample_centers

LARGE = 2**15
"""Numbers in an image from which images are mixed one after another on a CPU."""


def sample_beta(alpha: float, size: tuple[int, ...], generator: Generator | None = None) -> Tensor:
    """Draw from the symmetric Beta(alpha, alpha), from a generator of one's own.

        weight = g1 / (g1 + g2),  g ~ Gamma(alpha) = Gamma(alpha + 1) * U ** (1 / alpha)

    The ratio is taken between logarithms, so that a tiny alpha gives 0 or 1 and never 0 / 0; those of U are subtracted
    before they are divided, so that it is not the difference of two infinities.

    Args:
        alpha: concentration, above 0; 1 is uniform, small values stay near 0 and 1.
        size: shape of the result.
        generator: CPU generator; None takes torch's global one.
    Returns:
        `size` float32 on the CPU, in [0, 1].
    References:
        Marsaglia and Tsang, "A Simple Method for Generating Gamma Variables", 2000, section 6.
    Example:
        >>> sample_beta(0.2, (3,)).shape
        torch.Size([3])
    """
    # torch.distributions takes no generator; this private function is the only sampler of gammas that does.
    shape = torch.full((2, *size), alpha + 1.0, dtype=torch.float64, device="cpu")
    gamma = torch._standard_gamma(shape, generator=generator)
    uniform = 1 - torch.rand(shape.shape, dtype=torch.float64, generator=generator, device="cpu")
    (log_gamma, other_gamma), (log_uniform, other_uniform) = gamma.log(), uniform.log()
    return torch.sigmoid(log_gamma - other_gamma + (log_uniform - other_uniform) / alpha).float()


def sample_partners(count: int, generator: Generator | None = None) -> Tensor:
    """Draw a partner for each sample: a random matching, in which two samples are each other's partners.

    The samples are shuffled and taken in pairs; of an odd number the last three go round. So no sample is its own
    partner where there is another, and each partner is uniform over the others. That is as random as it must be: the
    expected gradient of a loss that is a mean over samples depends on the law of each sample's own partner only. And
    it is all that mixing in place needs: two images are mixed with each other while only one is kept.

    Args:
        count: samples in the batch, at least 1.
        generator: CPU generator; None takes torch's global one.
    Returns:
        (count,) int64, a permutation.
    References:
        Deviates: the authors of mixup and CutMix draw any permutation, in which on average one sample is its own.
    Example:
        >>> partner = sample_partners(6)
        >>> partner[partner].tolist(), bool((partner == torch.arange(6)).any())
        ([0, 1, 2, 3, 4, 5], False)
    """
    order = torch.randperm(count, generator=generator, device="cpu")
    paired = max(count - 3, 0) if count % 2 else count
    partner = torch.empty_like(order)
    partner[order[:paired]] = order[:paired].view(-1, 2).flip(1).flatten()
    partner[order[paired:]] = order[paired:].roll(-1)
    return partner


def sample_mixup(
    count: int, alpha: float, per_sample: bool = True, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw the weights and partners of a mixup.

    Args:
        count: samples in the batch, at least 1.
        alpha: concentration of Beta(alpha, alpha), above 0.
        per_sample: a weight for each sample; otherwise one for the batch.
        generator: CPU generator; None takes torch's global one.
    Returns:
        weight: (count,) float32, share of the original sample, in [0, 1].
        permutation: (count,) int64, partner of each sample; see `sample_partners`.
    Example:
        >>> weight, permutation = sample_mixup(5, alpha=0.2)
        >>> weight.shape, sorted(permutation.tolist())
        (torch.Size([5]), [0, 1, 2, 3, 4])
    """
    weight = sample_beta(alpha, (count if per_sample else 1,), generator).expand(count)
    return weight, sample_partners(count, generator)


def mixup(images: Tensor, weight: Tensor, permutation: Tensor, inplace: bool = False) -> Tensor:
    """Mix each sample with another one of the batch.

        images' = weight * images + (1 - weight) * images[permutation]

    Integers and numbers of 16 bits are mixed in float32 and rounded once.

    Args:
        images: (N, ...) floating or integer numbers.
        weight: (N,) share of the original sample, in [0, 1].
        permutation: (N,) int64, partner of each sample.
        inplace: write the result into `images`.
    Returns:
        (N, ...) of the dtype and layout of `images`; a new tensor unless `inplace`.
    Raises:
        ValueError: weight or permutation of another length.
    References:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018, arXiv:1710.09412, eq. 1.
    Example:
        >>> mixup(torch.tensor([[0.0], [1.0]]), torch.tensor([0.75, 0.5]), torch.tensor([1, 0]))
        tensor([[0.2500],
                [0.5000]])
    """
    if not len(images) == len(weight) == len(permutation):
        got = (len(images), len(weight), len(permutation))
        fix = "Draw them with sample_mixup(len(images), alpha)"
        raise ValueError(message("mixup", "weight and permutation", "one for each image", got, fix))
    floating = images.is_floating_point() or images.is_complex()
    if floating and _in_turn(images) and (cycles := _cycles(permutation)):
        return _mix_in_turn(images, weight.tolist(), cycles, inplace)
    # lerp's formula, here and for one image after another: both give the same numbers.
    wide = images if floating and images.element_size() > 2 else images.float()
    share = weight.to(wide.device, wide.dtype, non_blocking=True).view(-1, *[1] * (images.dim() - 1))
    mixed = _partners(wide, permutation).lerp_(wide, share)
    if not floating:
        mixed.round_()
    return images.copy_(mixed) if inplace else mixed.to(images.dtype)


def sample_cutmix(
    count: int, height: int, width: int, alpha: float, per_sample: bool = True, generator: Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the boxes and partners of a CutMix.

        side = floor(sqrt(1 - share) * length) of height and width,  share ~ Beta(alpha, alpha)
        weight = 1 - area of the box inside the image / (height * width)

    Args:
        count: samples in the batch, at least 1.
        height, width: size of an image (pixels).
        alpha: concentration of Beta(alpha, alpha), above 0.
        per_sample: a box for each sample; otherwise one for the batch.
        generator: CPU generator; None takes torch's global one.
    Returns:
        boxes: (count, 4) int64: top, left, bottom, right (pixels; the last two are the first ones outside), around a
            pixel drawn uniformly, clipped at the border.
        weight: (count,) float32, share of the original sample, in [0, 1].
        permutation: (count,) int64, partner of each sample; see `sample_partners`.
    References:
        Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", 2019,
        arXiv:1905.04899, eq. 1 and 2, and its appendix A.
        Deviates: an odd side is pasted in full (the authors' code pastes one pixel less).
    Example:
        >>> boxes, weight, permutation = sample_cutmix(5, 32, 32, alpha=1.0)
        >>> boxes.shape, weight.shape, permutation.shape
        (torch.Size([5, 4]), torch.Size([5]), torch.Size([5]))
    """
    draws = count if per_sample else 1
    share = sample_beta(alpha, (draws, 1), generator).double()
    centers = sample_centers(draws, 1, height, width, generator).squeeze(1)
    sides = ((1 - share).sqrt() * torch.tensor([height, width], device="cpu")).long()
    boxes = clipped_boxes(centers, sides, height, width).expand(count, 4)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).double()
    return boxes, (1 - area / (height * width)).float(), sample_partners(count, generator)


def cutmix(images: Tensor, boxes: Tensor, permutation: Tensor, inplace: bool = False) -> Tensor:
    """Paste a box of another sample of the batch into each.

        images'[n, ..., top:bottom, left:right] = images[permutation[n], ..., top:bottom, left:right]

    Args:
        images: (N, ..., H, W) of any dtype.
        boxes: (N, 4) int64: top, left, bottom, right (pixels), inside the image; empty ones paste nothing.
        permutation: (N,) int64, partner of each sample.
        inplace: write the result into `images`.
    Returns:
        (N, ..., H, W) of the dtype and layout of `images`; a new tensor unless `inplace`.
    Raises:
        ValueError: fewer than three dimensions, or boxes or permutation of another length.
    References:
        Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", 2019,
        arXiv:1905.04899, eq. 1.
    Example:
        >>> cutmix(torch.arange(6).view(2, 1, 3), torch.tensor([[0, 0, 1, 1], [0, 1, 1, 3]]), torch.tensor([1, 0]))
        tensor([[[3, 1, 2]],
        <BLANKLINE>
                [[3, 1, 2]]])
    """
    if images.dim() < 3:
        fix = "Boxes lie on the last two dimensions"
        raise ValueError(message("cutmix", "images", "of shape (N, ..., H, W)", tuple(images.shape), fix))
    if not len(images) == len(boxes) == len(permutation):
        got = (len(images), len(boxes), len(permutation))
        fix = "Draw them with sample_cutmix(len(images), height, width, alpha)"
        raise ValueError(message("cutmix", "boxes and permutation", "one for each image", got, fix))
    if (sources := pixels(images)) is not None and (cycles := _cycles(permutation)):
        result = images if inplace else images.clone()
        _paste_in_turn(pixels(result), sources, boxes.tolist(), cycles)
        return result
    height, width = images.shape[-2:]
    mask = box_mask(boxes.to(images.device, non_blocking=True), height, width)
    mask = mask.view(-1, *[1] * (images.dim() - 3), height, width)
    pasted = torch.where(mask, _partners(images, permutation), images)
    return images.copy_(pasted) if inplace else pasted


def _partners(images: Tensor, permutation: Tensor) -> Tensor:
    """The partner of each image, in the layout of the images."""
    index = permutation.to(images.device, non_blocking=True)
    if images.requires_grad:
        return images[index]
    # Several times as fast as plain indexing, on a CPU.
    return torch.index_select(images, 0, index, out=torch.empty_like(images))


def _in_turn(images: Tensor) -> bool:
    """Whether to mix one image after another, or all at once.

    On a CPU, a buffer as large as a batch of large images costs several times the work on them, since its memory is
    fresh each time; where images are small, a call for each of them costs more.
    """
    large = images.device.type == "cpu" and images.numel() >= LARGE * len(images) > 0
    return large and not (images.requires_grad and torch.is_grad_enabled())


def _cycles(permutation: Tensor) -> list[list[int]]:
    """Samples in the order of partners, until the first comes again; none where some sample is nobody's partner."""
    partners = permutation.tolist()
    if sorted(partners) != list(range(len(partners))):
        return []
    cycles, seen = [], set[int]()
    for sample in range(len(partners)):
        cycle = []
        while sample not in seen:
            seen.add(sample)
            cycle.append(sample)
            sample = partners[sample]
        if cycle:
            cycles.append(cycle)
    return cycles


def _mix_in_turn(images: Tensor, weight: list[float], cycles: list[list[int]], inplace: bool) -> Tensor:
    """Each sample takes from the next before that is overwritten; the last one from a copy of the first."""
    result = images if inplace else torch.empty_like(images)
    sources, results = images.unbind(), result.unbind()
    kept = torch.empty_like(sources[0])
    for cycle in cycles:
        kept.copy_(sources[cycle[0]])
        for sample, partner in pairwise(cycle):
            torch.lerp(sources[partner], sources[sample], weight[sample], out=results[sample])
        last = cycle[-1]
        torch.lerp(kept, sources[last], weight[last], out=results[last])
    return result


def _paste_in_turn(results: Any, sources: Any, boxes: list[list[int]], cycles: list[list[int]]) -> None:
    """Each sample takes from the next before that is overwritten; the last one from a copy of the first."""
    for cycle in cycles:
        top, left, bottom, right = boxes[cycle[-1]]
        kept = sources[cycle[0], ..., top:bottom, left:right].copy()
        for sample, partner in pairwise(cycle):
            top, left, bottom, right = boxes[sample]
            results[sample, ..., top:bottom, left:right] = sources[partner, ..., top:bottom, left:right]
        top, left, bottom, right = boxes[cycle[-1]]
        results[cycle[-1], ..., top:bottom, left:right] = kept
