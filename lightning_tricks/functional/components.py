"""Targets that are mixes of labels, held as labels and shares instead of a dense tensor."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tricks.functional.checks import check_number, message


class Component(NamedTuple):
    """A part of a mixed target: `share * ((1 - smoothing) * one_hot(labels) + smoothing * prior)`.

    Args:
        labels: (N, ...) integers.
        share: floats of the same shape; the shares of a sample add up to 1 over its components.
        smoothing: epsilon of label smoothing, in [0, 1]; a tensor of the same shape where samples differ.
    """

    labels: Tensor
    share: Tensor
    smoothing: float | Tensor = 0.0

    def spread(self) -> Tensor:
        """The share times the smoothing: what goes to the prior."""
        return self.share * self.smoothing

    def filled(self) -> Tensor:
        """The smoothing of each label."""
        return self.smoothing if isinstance(self.smoothing, Tensor) else torch.full_like(self.share, self.smoothing)


def check_smoothing(owner: str, smoothing: float, name: str = "smoothing") -> None:
    """Raise unless the value is an epsilon of label smoothing, in [0, 1].

    Args:
        owner: class or function named in the error.
        smoothing: what came.
        name: argument named in the error.
    Raises:
        TypeError: no number.
        ValueError: outside [0, 1].
    Example:
        >>> check_smoothing("LabelSmoothing", 0.1)
    """
    fix = "It is the share of the target spread over all classes, 0.1 as a rule"
    check_number(owner, name, smoothing, "in [0, 1]", fix, lambda value: 0 <= value <= 1)


def smoothed(component: Component, smoothing: float | Tensor) -> Component:
    """Smooth a component once more, with the same prior.

        smoothing' = 1 - (1 - component.smoothing) * (1 - smoothing)

    Args:
        component: as it is.
        smoothing: epsilon, in [0, 1]; a number or a tensor of the labels' shape.
    Returns:
        The component with the joint epsilon, exact where one of both is 0.
    Example:
        >>> smoothed(Component(torch.tensor([1]), torch.tensor([1.0]), 0.5), 0.5).smoothing
        0.75
    """
    first = component.smoothing
    return component._replace(smoothing=first + smoothing - first * smoothing)


def changed(
    components: Sequence[Component], labels: Callable[[Tensor], Tensor], numbers: Callable[[Tensor], Tensor]
) -> tuple[Component, ...]:
    """Rearrange or move components.

    Args:
        components: as they are.
        labels: what is done to labels.
        numbers: what is done to shares, and to a smoothing that samples do not have in common.
    Returns:
        As many components.
    Example:
        >>> changed([Component(torch.tensor([1, 2]), torch.ones(2))], lambda y: y[1:], lambda s: s[1:])[0].labels
        tensor([2])
    """
    return tuple(
        Component(labels(own), numbers(share), numbers(epsilon) if isinstance(epsilon, Tensor) else epsilon)
        for own, share, epsilon in components
    )


def common_smoothing(components: Sequence[Component]) -> float | None:
    """The smoothing of components.

    Args:
        components: at least one.
    Returns:
        A number, where it is the same for all; else None.
    Example:
        >>> common_smoothing([Component(torch.tensor([1]), torch.ones(1), 0.1)])
        0.1
    """
    first = components[0].smoothing
    numbers = all(not isinstance(part.smoothing, Tensor) and part.smoothing == first for part in components)
    return first if numbers and not isinstance(first, Tensor) else None


def joined(parts: Sequence[Sequence[Component]], join: Callable[[list[Tensor]], Tensor]) -> tuple[Component, ...]:
    """Join the components of several tensors of labels, the first with the first.

    Args:
        parts: the components of each; what has fewer gets some without a share.
        join: makes one tensor of one of each part, as `torch.cat`.
    Returns:
        As many components as the part with the most has.
    Example:
        >>> first, second = Component(torch.tensor([1]), torch.ones(1)), Component(torch.tensor([2]), torch.ones(1))
        >>> joined([[first], [second]], torch.cat)[0].labels
        tensor([1, 2])
    """
    most = max(len(part) for part in parts)
    padded = [
        [*part, *[part[0]._replace(share=torch.zeros_like(part[0].share))] * (most - len(part))] for part in parts
    ]
    result = []
    for row in zip(*padded, strict=True):
        common = common_smoothing(row)
        smoothing = join([component.filled() for component in row]) if common is None else common
        result.append(Component(join([c.labels for c in row]), join([c.share for c in row]), smoothing))
    return tuple(result)


def dominant(components: Sequence[Component]) -> Tensor:
    """The label with the largest share in all, of equal ones the first.

    Args:
        components: a mix.
    Returns:
        (N, ...) integers.
    Example:
        >>> first = Component(torch.tensor([1]), torch.tensor([0.4]))
        >>> dominant([first, Component(torch.tensor([2]), torch.tensor([0.6]))])
        tensor([2])
    """
    label, best = components[0].labels, torch.full_like(components[0].share, -1.0)
    for own, _, _ in components:
        total = sum((share * (other == own) for other, share, _ in components), torch.zeros_like(best))
        label, best = torch.where(total > best, own, label), torch.maximum(best, total)
    return label


def merged(components: Sequence[Component]) -> tuple[Component, ...]:
    """The same mix in as few components as its samples have different labels at most.

    Shares of equal labels are added. The number of components depends on the labels, which a GPU is asked for: the host
    waits for it.

    Args:
        components: a mix.
    Returns:
        Components of the same target, in no particular order.
    Example:
        >>> half = Component(torch.tensor([1, 2]), torch.tensor([0.5, 0.5]))
        >>> merged([half, half])[0].share
        tensor([1., 1.])
    """
    labels, order = torch.stack([component.labels for component in components]).sort(dim=0)
    share = torch.stack([component.share for component in components]).gather(0, order)
    slot = torch.zeros_like(order)
    slot[1:] = (labels[1:] != labels[:-1]).cumsum(0)
    count = int(slot.max()) + 1 if slot.numel() else 1
    own = labels[:1].repeat(count, *[1] * (labels.dim() - 1)).scatter_(0, slot, labels)
    total = torch.zeros_like(share[:1]).repeat(count, *[1] * (share.dim() - 1)).scatter_add_(0, slot, share)
    common = common_smoothing(components)
    if common is not None:
        return tuple(Component(labels, share, common) for labels, share in zip(own, total, strict=True))
    spread = torch.stack([component.spread() for component in components]).gather(0, order)
    spread = torch.zeros_like(total).scatter_add_(0, slot, spread)
    smoothing = torch.where(total > 0, spread / total, 0.0)
    return tuple(map(Component, own, total, smoothing))


def dense(components: Sequence[Component], num_classes: int, prior: Tensor | None = None) -> Tensor:
    """The probability of each class.

        targets = sum(share * ((1 - smoothing) * one_hot(labels) + smoothing * prior)) over the components

    Args:
        components: a mix of labels in [0, num_classes).
        num_classes: number of classes K.
        prior: (K,) probabilities, or (K, K), a row for each label; None is 1 / K for all.
    Returns:
        (N, ..., K) float32.
    Raises:
        ValueError: a label outside [0, num_classes), or a prior of another number of classes.
    Example:
        >>> dense([Component(torch.tensor([1]), torch.tensor([1.0]), 0.5)], 2)
        tensor([[0.2500, 0.7500]])
    """
    check_prior_fits("soft_targets", prior, num_classes)
    first = components[0].share
    targets = torch.zeros((*first.shape, num_classes), dtype=first.dtype, device=first.device)
    for component in components:
        own = component.labels.long()
        # A look at the labels would break a compiled graph.
        if own.numel() and not torch.compiler.is_compiling():
            least, most = int(own.min()), int(own.max())
            if least < 0 or most >= num_classes:
                fix = "Leave out the samples to be ignored, or give the right number of classes"
                got = f"[{least}, {most}]"
                raise ValueError(message("soft_targets", "labels", f"in [0, {num_classes - 1}]", got, fix))
        spread = component.spread()
        targets.scatter_add_(-1, own.unsqueeze(-1), (component.share - spread).unsqueeze(-1))
        if isinstance(component.smoothing, Tensor) or component.smoothing > 0:
            row = 1 / num_classes if prior is None else prior if prior.dim() == 1 else prior[own]
            targets += spread.unsqueeze(-1) * row
    return targets


def check_prior_fits(owner: str, prior: Tensor | None, num_classes: int) -> None:
    """Raise unless a prior is one of so many classes.

    Args:
        owner: class or function named in the error.
        prior: (K,) or (K, K), or None.
        num_classes: number of classes K that the logits or targets have.
    Raises:
        ValueError: another number of classes.
    Example:
        >>> check_prior_fits("F.cross_entropy", torch.tensor([0.5, 0.5]), 2)
    """
    if prior is not None and prior.shape[-1] != num_classes:
        fix = "Give LabelSmoothing a prior with one number for each class that the logits have"
        raise ValueError(message(owner, "prior", f"of {num_classes} classes", prior.shape[-1], fix))


def check_weight_fits(owner: str, weight: Tensor | None, num_classes: int, name: str = "weight") -> None:
    """Raise unless class weights are those of so many classes.

    Args:
        owner: class or function named in the error.
        weight: (K,) or None.
        num_classes: number of classes K that the logits or targets have.
        name: argument named in the error.
    Raises:
        ValueError: another shape.
    Example:
        >>> check_weight_fits("F.cross_entropy", torch.tensor([1.0, 2.0]), 2)
    """
    if weight is not None and weight.shape != (num_classes,):
        condition = f"of shape ({num_classes},), a number for each class that the logits have"
        fix = "Give as many weights as the model has outputs"
        raise ValueError(message(owner, name, condition, tuple(weight.shape), fix))
