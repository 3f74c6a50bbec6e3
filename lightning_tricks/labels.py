"""What is done with labels that are or become mixed: mixed, moved, replaced in part, smoothed, made dense."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_tricks.functional.checks import message
from lightning_tricks.functional.components import changed, check_smoothing, dense, merged, smoothed
from lightning_tricks.functional.mixing import mixup
from lightning_tricks.mixed_labels import WAYS_OUT, MixedLabels, is_smoothed, join_labels, same_prior

__all__ = [
    "WAYS_OUT",
    "MixedLabels",
    "check_smoothing",
    "drop_ignored",
    "mix_labels",
    "move_labels",
    "put_labels",
    "smooth_labels",
    "soft_targets",
    "take_labels",
]

MOST_COMPONENTS = 8
"""Of labels on a GPU before equal ones are merged, for which the host waits: three mixings come without."""


def mix_labels(labels: Tensor, weight: Tensor, permutation: Tensor) -> Tensor:
    """Mix the labels of each sample with those of its partner.

        target' = weight * target + (1 - weight) * target[permutation]

    Args:
        labels: (N, ...) integers or MixedLabels, or floating targets, which are mixed as numbers.
        weight: (N,) share of the original sample, in [0, 1].
        permutation: (N,) int64, partner of each sample.
    Returns:
        MixedLabels of integers; a floating tensor of floating targets. What is mixed again has as
        many components as a sample has different labels, at most as there are classes; on a GPU up to eight are left
        unmerged, since it would be waited for.
    Example:
        >>> mix_labels(torch.tensor([0.0, 1.0]), torch.tensor([0.75, 0.5]), torch.tensor([1, 0]))
        tensor([0.2500, 0.5000])
    """
    if labels.is_floating_point():
        return mixup(labels, weight, permutation)
    permutation = permutation.to(labels.device)
    share = weight.to(labels.device, torch.float32).view(-1, *[1] * (labels.dim() - 1))
    if not isinstance(labels, MixedLabels):
        return MixedLabels(labels, labels[permutation], share)
    own = changed(labels._components, lambda y: y, lambda numbers: numbers)
    partner = changed(labels._components, lambda y: y[permutation], lambda numbers: numbers[permutation])
    components = tuple(part._replace(share=part.share * share) for part in own)
    components += tuple(part._replace(share=part.share * (1 - share)) for part in partner)
    mixed = MixedLabels._of(components, labels._prior, used=labels._used)
    if len(components) <= (2 if mixed.device.type == "cpu" else MOST_COMPONENTS):
        return mixed
    return MixedLabels._of(merged(components), labels._prior, mixed._plain, labels._used)


def move_labels(labels: Tensor, move: Callable[[Tensor, float], Tensor], fill: float) -> Tensor:
    """Move labels of pixels from place to place.

    Args:
        labels: (N, H, W) or (N, K, H, W); integers, MixedLabels or floats.
        move: takes such a tensor and the value of what comes from outside, and returns it moved.
        fill: value of what comes from outside.
    Returns:
        Labels of the same kind.
    Example:
        >>> move_labels(torch.tensor([[[1, 2]]]), lambda part, fill: part.roll(1, -1), -100)
        tensor([[[2, 1]]])
    """
    if not isinstance(labels, MixedLabels):
        return move(labels, fill)
    # What comes from outside is one label with the whole share.
    components = tuple(
        part._replace(
            labels=move(part.labels, fill),
            share=move(part.share, float(index == 0)),
            smoothing=move(part.smoothing, 0.0) if isinstance(part.smoothing, Tensor) else part.smoothing,
        )
        for index, part in enumerate(labels._components)
    )
    return MixedLabels._of(components, labels._prior, used=labels._used)


def take_labels(labels: Tensor, index: Tensor) -> Tensor:
    """Take the labels of some samples of a batch.

        labels' = labels[index]

    Args:
        labels: (N, ...) integers, MixedLabels or floating targets.
        index: (M,) int64, which samples; on the CPU or where the labels are.
    Returns:
        (M, ...) labels of the same kind; unlike `labels[index]`, mixed ones stay mixed under `torch.no_grad()` too.
    Example:
        >>> take_labels(torch.tensor([5, 6, 7]), torch.tensor([2, 0]))
        tensor([7, 5])
    """
    index = index.to(labels.device, non_blocking=True)
    if not isinstance(labels, MixedLabels):
        return labels.index_select(0, index)
    components = changed(labels._components, lambda y: y.index_select(0, index), lambda s: s.index_select(0, index))
    return MixedLabels._of(components, labels._prior, labels._plain.index_select(0, index), labels._used)


def put_labels(labels: Tensor, index: Tensor, part: Tensor) -> Tensor:
    """Replace the labels of some samples of a batch.

        labels'[index] = part, labels' = labels elsewhere

    Args:
        labels: (N, ...) integers, MixedLabels or floating targets.
        index: (M,) int64, the samples that get new labels, none twice; on the CPU or where the labels are.
        part: (M, ...) their labels, mixed and smoothed as they may be; floating where `labels` are.
    Returns:
        Labels of the whole batch: MixedLabels if one of both is, else a tensor as `labels`. The arguments are left as
        they are.
    Raises:
        TypeError: floating and integer labels in one batch.
        ValueError: a part of another length or shape, or priors that differ.
    Example:
        >>> put_labels(torch.tensor([0, 1, 2]), torch.tensor([1]), smooth_labels(torch.tensor([5]), 0.1))
        MixedLabels([0, 5, 2], components=1, smoothing=[0.0, 0.10000000149011612, 0.0])
    """
    if labels.is_floating_point() != part.is_floating_point():
        fix = "Transform all samples with those that make labels floating, or give floating labels in the data set"
        raise TypeError(message("put_labels", "part", f"labels like the others, {labels.dtype}", part.dtype, fix))
    if part.shape != (len(index), *labels.shape[1:]):
        shape = (len(index), *labels.shape[1:])
        fix = "Give a label for each sample of the index"
        raise ValueError(message("put_labels", "part", f"of shape {shape}", tuple(part.shape), fix))
    index = index.to(labels.device, non_blocking=True)
    if isinstance(labels, MixedLabels) or isinstance(part, MixedLabels):
        return join_labels([labels, part], lambda both: both[0].index_copy(0, index, both[1].to(both[0].dtype)))
    return labels.index_copy(0, index, part.to(labels.dtype))


def drop_ignored(labels: Tensor, ignore_index: int) -> tuple[MixedLabels, Tensor]:
    """Leave the components that are ignored out of each mix.

    Args:
        labels: (N, ...) integers or MixedLabels.
        ignore_index: label that is ignored.
    Returns:
        What the other components make, with shares that add up to 1, and the share that they had, (N, ...) float32.
        Where that is 0, no label has a share.
    Example:
        >>> labels, share = drop_ignored(MixedLabels(torch.tensor([0]), torch.tensor([-100]), 0.75), -100)
        >>> soft_targets(labels, 2), share
        (tensor([[1., 0.]]), tensor([0.7500]))
    """
    mixed = labels if isinstance(labels, MixedLabels) else MixedLabels(labels)
    ignored = [part.labels == ignore_index for part in mixed._components]
    parts = zip(mixed._components, ignored, strict=True)
    shares = [part.share.masked_fill(gone, 0) for part, gone in parts]
    total = torch.stack(shares).sum(0)
    whole = total.masked_fill(total == 0, 1)
    components = tuple(
        part._replace(labels=part.labels.masked_fill(gone, 0), share=share / whole)
        for part, gone, share in zip(mixed._components, ignored, shares, strict=True)
    )
    return MixedLabels._of(components, mixed._prior, mixed._plain, mixed._used), total


def smooth_labels(labels: Tensor, smoothing: float | Tensor, prior: Tensor | None = None) -> MixedLabels:
    """Spread a share of each target over all classes.

        target' = (1 - smoothing) * target + smoothing * prior

    Args:
        labels: (N, ...) integers or MixedLabels; the number of classes K is taken from the logits in the loss.
        smoothing: epsilon, in [0, 1]; a number, or a tensor that broadcasts to the shape of the labels.
        prior: (K,) probabilities; or (K, K), of which each label has its row (`target @ prior`); None is 1 / K.
    Returns:
        MixedLabels; labels that were smoothed already are smoothed again.
    Raises:
        TypeError: floating targets, which say nothing of what they mean.
        ValueError: smoothing outside [0, 1]; or labels that were smoothed with another prior, or with rows.
    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, arXiv:1512.00567, section 7.
    Example:
        >>> smooth_labels(torch.tensor([2, 0]), 0.1)
        MixedLabels([2, 0], components=1, smoothing=0.1)
    """
    if not isinstance(labels, MixedLabels):
        return MixedLabels(labels, smoothing=smoothing, prior=prior)
    if isinstance(smoothing, Tensor):
        smoothing = smoothing.to(labels.device, torch.float32).expand(labels.shape)
    else:
        check_smoothing("smooth_labels", smoothing)
    prior = None if prior is None else prior.to(labels.device)
    if is_smoothed(labels) and not (same_prior(labels._prior, prior) and (prior is None or prior.dim() == 1)):
        fix = "Smooth once, with a prior that is what both do together"
        got = [None if p is None else tuple(p.shape) for p in (labels._prior, prior)]
        condition = "the same (K,) prior as before, for labels that were smoothed already"
        raise ValueError(message("smooth_labels", "prior", condition, got, fix))
    components = tuple(smoothed(component, smoothing) for component in labels._components)
    return MixedLabels._of(components, prior, labels._plain, labels._used)


def soft_targets(labels: Tensor, num_classes: int) -> Tensor:
    """Dense targets of any labels: the probability of each class.

        targets = (1 - smoothing) * sum(share * one_hot(label)) + smoothing * prior

    Args:
        labels: (N,) or (N, H, W) integers (which give one-hot targets) or MixedLabels in [0, num_classes); or floating
            (N, num_classes, ...) targets, which are returned as they are.
        num_classes: number of classes K, at least 1.
    Returns:
        (N, K) or (N, K, H, W) float32, each summing to 1 over the classes.
    Raises:
        ValueError: a label outside [0, num_classes), a prior or floating targets of another number of classes.
    Example:
        >>> soft_targets(MixedLabels(torch.tensor([0]), torch.tensor([2]), 0.75), num_classes=3)
        tensor([[0.7500, 0.0000, 0.2500]])
    """
    fix = "Give the number of classes that the logits have"
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(message("soft_targets", "num_classes", "a whole number of at least 1", num_classes, fix))
    if labels.is_floating_point():
        if labels.dim() < 2 or labels.shape[1] != num_classes:
            shape = tuple(labels.shape)
            raise ValueError(message("soft_targets", "labels", f"of shape (N, {num_classes}, ...)", shape, fix))
        return labels
    mixed = labels if isinstance(labels, MixedLabels) else MixedLabels(labels)
    for cell in mixed._used:
        cell[0] = True
    targets = dense(mixed._components, num_classes, mixed._prior)
    return targets.movedim(-1, 1) if mixed.dim() > 0 else targets
