"""Labels that remember they were mixed or smoothed, and dense targets of any labels."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from lightning_tricks.dispatch import (
    MOVES,
    VIEWS,
    casts_to_float,
    changes_in_place,
    is_floating,
    keeps,
    name_of,
    replaced,
    requires_grad,
)
from lightning_tricks.functional.checks import check_number, message
from lightning_tricks.functional.cross_entropy import Component, check_smoothing, mixed_nll
from lightning_tricks.functional.mixing import mixup
from lightning_tricks.one_hot import MixedOneHot

WAYS_OUT = (
    "Use F.cross_entropy, F.nll_loss or a loss of lightning_tricks; or take dense (N, K) probabilities, from "
    "soft_targets(labels, num_classes) or BatchTransforms(targets='soft', num_classes=K); or give floating labels in "
    "the data set, which are mixed as numbers; or, where the loss needs no labels, BatchTransforms(labels=None)"
)


class MixedLabels(Tensor):
    """Integer labels that remember they were mixed or smoothed, so that an unchanged loss computes the right thing.

    The tensor itself is the dominant label of each sample: metrics, comparisons and indexing see plain integers. The
    target it stands for is, over K classes,

        target = (1 - smoothing) * (weight * one_hot(labels) + (1 - weight) * one_hot(partner)) + smoothing / K

    and `F.cross_entropy`, `nn.CrossEntropyLoss`, `F.nll_loss` and the losses of this package compute the loss of that
    target, with their own `weight`, `ignore_index`, `label_smoothing` and `reduction`. With class weights w, "mean"
    divides by the sum over samples of `weight * w[labels] + (1 - weight) * w[partner]`; a component whose label is
    `ignore_index` counts neither there nor in the loss. Operations on shape, index and device, casts to integers,
    `clone`, `detach` and `contiguous` keep the mix; `F.one_hot` codes become its probabilities where floating numbers
    are made of them; every other operation, and every one under `torch.no_grad()` (as
    in a metric's `update`), sees and returns plain tensors.

    Args:
        labels: (N,) or (N, H, W) integers, the labels of the original samples.
        partner: labels of the samples they were mixed with, of the same shape; None is no mixing.
        weight: share of the original sample in the mix, in [0, 1]; broadcasts to the shape of `labels`.
        smoothing: epsilon of label smoothing, in [0, 1].
    Raises:
        TypeError: labels or a partner that are no integers, or are mixed already.
        ValueError: a smoothing outside [0, 1], or shapes that do not fit; later an in-place change, a cast to floating
            point, or an operation that does not know mixed labels and whose result requires a gradient: it would train
            on the dominant labels alone.
    References:
        Zhang et al., 2018, arXiv:1710.09412, eq. 1; Szegedy et al., 2016, arXiv:1512.00567, section 7.
        Deviates: the loss is normalised as for integer labels, so that an unmixed batch keeps the user's loss.
    Example:
        >>> labels = MixedLabels(torch.tensor([0, 1]), partner=torch.tensor([1, 0]), weight=torch.tensor([0.7, 0.2]))
        >>> labels.tolist(), round(F.cross_entropy(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), labels).item(), 3)
        ([0, 0], 0.627)
    """

    _plain: Tensor
    _components: tuple[Component, ...]
    _used: list[bool]
    smoothing: float

    def __new__(
        cls, labels: Tensor, partner: Tensor | None = None, weight: Tensor | float = 1.0, smoothing: float = 0.0
    ) -> "MixedLabels":
        check_smoothing("MixedLabels", smoothing)
        for name, value in (("labels", labels), ("partner", labels if partner is None else partner)):
            if not isinstance(value, Tensor) or isinstance(value, MixedLabels) or is_floating(value):
                got: Any = value.dtype if type(value) is Tensor else type(value)
                fix = "Floating targets are mixed as numbers; labels that are mixed already are by mix_labels"
                raise TypeError(message("MixedLabels", name, "a tensor of integers", got, fix))
        if not isinstance(weight, Tensor):
            fix = "It is the share of the original sample"
            check_number("MixedLabels", "weight", weight, "in [0, 1]", fix, lambda value: 0 <= value <= 1)
        share = torch.as_tensor(weight, dtype=torch.float32, device=labels.device)
        try:
            share = share.expand(labels.shape).contiguous()
        except RuntimeError:
            got = tuple(share.shape)
            fix = "Give (N,) weights, with a dimension of 1 for each further one of the labels"
            raise ValueError(message("MixedLabels", "weight", f"of shape {tuple(labels.shape)}", got, fix)) from None
        if partner is None:
            return cls._of(((labels, torch.ones_like(share)),), smoothing)
        if partner.shape != labels.shape:
            got = tuple(partner.shape)
            fix = "Take labels[permutation]"
            raise ValueError(message("MixedLabels", "partner", f"of shape {tuple(labels.shape)}", got, fix))
        return cls._of(((labels, share), (partner, 1 - share)), smoothing)

    @classmethod
    def _of(
        cls, components: tuple[Component, ...], smoothing: float, plain: Tensor | None = None, used: Any = None
    ) -> "MixedLabels":
        plain = _dominant(components) if plain is None else plain
        self = Tensor._make_subclass(cls, plain)
        self._plain, self._components, self.smoothing = plain, components, smoothing
        self._used = [False] if used is None else used
        return self

    @property
    def components(self) -> tuple[Component, ...]:
        """The (labels, share) pairs whose one-hot codes add up to the target; the original samples come first."""
        return self._components

    @property
    def used(self) -> bool:
        """Whether a gradient comes from a loss that knows mixed labels, of these or of what was sliced from them."""
        return self._used[0]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"MixedLabels({self._plain.tolist()}, components={len(self._components)}, smoothing={self.smoothing})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._components, self.smoothing, self._plain)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MixedLabels":
        components = tuple((labels.clone(), share.clone()) for labels, share in self._components)
        return MixedLabels._of(components, self.smoothing, self._plain.clone(), self._used)

    def __copy__(self) -> "MixedLabels":
        return MixedLabels._of(self._components, self.smoothing, self._plain, self._used)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        if func is F.cross_entropy and isinstance(_target(args, kwargs), MixedLabels):
            return _cross_entropy(*args, **kwargs)
        if func is F.nll_loss and isinstance(_target(args, kwargs), MixedLabels):
            return _nll_loss(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(kwargs.get("out"), MixedLabels) or (isinstance(first, MixedLabels) and changes_in_place(func)):
            fix = "Change them in the data set, before they are mixed, or leave label mixing out"
            got = name_of(func)
            raise ValueError(message("MixedLabels", "labels", "left unchanged once they are mixed", got, fix))
        result = func(*replaced(args, MixedLabels, "_plain"), **replaced(kwargs, MixedLabels, "_plain"))
        # Metrics are updated without gradients; what they see and keep is plain.
        if isinstance(first, MixedLabels) and torch.is_grad_enabled():
            if name_of(func) == "one_hot":
                return MixedOneHot(result, _dense(first, result.shape[-1]), first._used)
            if casts_to_float(func, result):
                condition = "integers: a cast to floating point loses the mix"
                raise ValueError(message("MixedLabels", "labels", condition, name_of(func), WAYS_OUT))
            if keeps(func) or name_of(func) in MOVES:
                return _rearranged(first, func, args[1:], kwargs, result)
        if requires_grad(result):
            condition = (
                "used by a loss that knows mixed labels; here a gradient would come from the dominant labels alone"
            )
            raise ValueError(message("MixedLabels", "labels", condition, name_of(func), WAYS_OUT))
        return result


def _rebuild(components: tuple[Component, ...], smoothing: float, plain: Tensor) -> MixedLabels:
    return MixedLabels._of(components, smoothing, plain)


# So that a checkpoint with a metric that keeps labels loads with weights_only=True.
torch.serialization.add_safe_globals([_rebuild])


def _dominant(components: tuple[Component, ...]) -> Tensor:
    """The label with the largest share in all, of equal ones the first."""
    label, best = components[0][0], torch.full_like(components[0][1], -1.0)
    for own, _ in components:
        total = sum((share * (other == own) for other, share in components), torch.zeros_like(best))
        label, best = torch.where(total > best, own, label), torch.maximum(best, total)
    return label


def _target(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("target")


def _rearranged(
    mixed: MixedLabels, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Any:
    """What a function that keeps the mix makes of mixed labels; `result` is what it made of the dominant ones."""
    several = isinstance(result, (tuple, list))
    plains = list(result) if several else [result]
    if not all(isinstance(plain, Tensor) for plain in plains) or any(is_floating(plain) for plain in plains):
        return result  # the name of a type, or bits read as numbers
    args, kwargs = replaced(args, MixedLabels, "_plain"), replaced(kwargs, MixedLabels, "_plain")
    name = name_of(func)
    apply = VIEWS.get(name, func)

    def rearrange(part: Tensor, is_share: bool) -> list[Tensor]:
        if is_share and name in MOVES:
            return [part.to(plains[0].device)]  # a cast to integers is not for shares
        new = apply(part, *args, **kwargs)
        return list(new) if several else [new]

    labels = [rearrange(own, is_share=False) for own, _ in mixed._components]
    shares = [rearrange(share, is_share=True) for _, share in mixed._components]
    wrapped = [
        MixedLabels._of(
            tuple((own[i], share[i]) for own, share in zip(labels, shares, strict=True)),
            mixed.smoothing,
            plain,
            mixed._used,
        )
        for i, plain in enumerate(plains)
    ]
    return type(result)(wrapped) if several else wrapped[0]


def _cross_entropy(
    input: Tensor,
    target: MixedLabels,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    check_smoothing("F.cross_entropy", label_smoothing, name="label_smoothing")
    log_probs = F.log_softmax(_widened(input), dim=min(1, input.dim() - 1))
    smoothing = _smoothed_twice(target.smoothing, label_smoothing)
    reduction = _reduction(size_average, reduce, reduction)
    target._used[0] |= torch.is_grad_enabled() and input.requires_grad
    return mixed_nll(log_probs, target._components, smoothing, weight, ignore_index, reduction)


def _nll_loss(
    input: Tensor,
    target: MixedLabels,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    reduction = _reduction(size_average, reduce, reduction)
    target._used[0] |= torch.is_grad_enabled() and input.requires_grad
    return mixed_nll(_widened(input), target._components, target.smoothing, weight, ignore_index, reduction)


def _widened(values: Tensor) -> Tensor:
    """In float32 under autocast, which does so for the losses of plain labels."""
    return values.float() if torch.is_autocast_enabled(values.device.type) else values


def _smoothed_twice(first: float, second: float) -> float:
    """1 - (1 - first) * (1 - second), exact where one of them is 0."""
    return first + second - first * second


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    return reduction


def mix_labels(labels: Tensor, weight: Tensor, permutation: Tensor) -> Tensor:
    """Mix the labels of each sample with those of its partner.

        target' = weight * target + (1 - weight) * target[permutation]

    Args:
        labels: (N, ...) integers or MixedLabels, or floating targets, which are mixed as numbers.
        weight: (N,) share of the original sample, in [0, 1].
        permutation: (N,) int64, partner of each sample.
    Returns:
        MixedLabels of integers; a floating tensor of floating targets.
    Example:
        >>> mix_labels(torch.tensor([0.0, 1.0]), torch.tensor([0.75, 0.5]), torch.tensor([1, 0]))
        tensor([0.2500, 0.5000])
    """
    if labels.is_floating_point():
        return mixup(labels, weight, permutation)
    permutation = permutation.to(labels.device)
    share = weight.to(labels.device).view(-1, *[1] * (labels.dim() - 1))
    if not isinstance(labels, MixedLabels):
        return MixedLabels(labels, labels[permutation], share)
    first = tuple((own, own_share * share) for own, own_share in labels._components)
    second = tuple((own[permutation], own_share[permutation] * (1 - share)) for own, own_share in labels._components)
    return MixedLabels._of(first + second, labels.smoothing, used=labels._used)


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
    components = tuple(
        (move(own, fill), move(share, float(index == 0))) for index, (own, share) in enumerate(labels._components)
    )
    return MixedLabels._of(components, labels.smoothing, used=labels._used)


def smooth_labels(labels: Tensor, smoothing: float) -> MixedLabels:
    """Spread a share of each target evenly over all classes.

        target' = (1 - smoothing) * target + smoothing / K

    Args:
        labels: (N, ...) integers or MixedLabels; the number of classes K is taken from the logits in the loss.
        smoothing: epsilon, in [0, 1].
    Returns:
        MixedLabels; labels that were smoothed already are smoothed again.
    Raises:
        TypeError: floating targets, which say nothing of what they mean.
        ValueError: smoothing outside [0, 1].
    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, arXiv:1512.00567, section 7.
    Example:
        >>> smooth_labels(torch.tensor([2, 0]), 0.1)
        MixedLabels([2, 0], components=1, smoothing=0.1)
    """
    if not isinstance(labels, MixedLabels):
        return MixedLabels(labels, smoothing=smoothing)
    check_smoothing("smooth_labels", smoothing)
    combined = _smoothed_twice(labels.smoothing, smoothing)
    return MixedLabels._of(labels._components, combined, labels._plain, labels._used)


def soft_targets(labels: Tensor, num_classes: int) -> Tensor:
    """Dense targets of any labels: the probability of each class.

        targets = (1 - smoothing) * sum(share * one_hot(label)) + smoothing / num_classes

    Args:
        labels: (N,) or (N, H, W) integers (which give one-hot targets) or MixedLabels in [0, num_classes); or floating
            (N, num_classes, ...) targets, which are returned as they are.
        num_classes: number of classes K, at least 1.
    Returns:
        (N, K) or (N, K, H, W) float32, each summing to 1 over the classes.
    Raises:
        ValueError: a label outside [0, num_classes), or floating targets of another number of classes.
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
    mixed._used[0] = True
    targets = _dense(mixed, num_classes)
    return targets.movedim(-1, 1) if mixed.dim() > 0 else targets


def _dense(mixed: MixedLabels, num_classes: int) -> Tensor:
    """The probabilities of the classes, in the last dimension."""
    targets = torch.zeros((*mixed.shape, num_classes), device=mixed.device)
    for own, share in mixed._components:
        if own.numel() and not (int(own.min()) >= 0 and int(own.max()) < num_classes):
            got = f"[{int(own.min())}, {int(own.max())}]"
            fix = "Leave out the samples to be ignored, or give the right number of classes"
            raise ValueError(message("soft_targets", "labels", f"in [0, {num_classes - 1}]", got, fix))
        targets.scatter_add_(-1, own.long().unsqueeze(-1), share.unsqueeze(-1))
    return (1 - mixed.smoothing) * targets + mixed.smoothing / num_classes
