"""Labels that remember they were mixed or smoothed."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from lightning_tricks.dispatch import (
    JOINS,
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
from lightning_tricks.functional.components import (
    Component,
    changed,
    check_smoothing,
    common_smoothing,
    dense,
    dominant,
    joined,
)
from lightning_tricks.functional.cross_entropy import mixed_cross_entropy, mixed_nll
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

        target = (1 - smoothing) * (weight * one_hot(labels) + (1 - weight) * one_hot(partner)) + smoothing * prior

    and `F.cross_entropy`, `nn.CrossEntropyLoss`, `F.nll_loss` and the losses of this package compute the loss of that
    target, with their own `weight`, `ignore_index`, `label_smoothing` and `reduction`. With class weights w, "mean"
    divides by the sum over samples of `weight * w[labels] + (1 - weight) * w[partner]`; a component whose label is
    `ignore_index` counts neither there nor in the loss. Operations on shape, index and device, casts to integers,
    `clone`, `detach`, `contiguous`, `torch.cat` and `torch.stack` (with plain labels too) keep the mix; `F.one_hot`
    codes become its probabilities where floating numbers are made of them; every other operation, and every one under
    `torch.no_grad()` (as in a metric's `update`), sees and returns plain tensors.

    Args:
        labels: (N,) or (N, H, W) integers, the labels of the original samples.
        partner: labels of the samples they were mixed with, of the same shape; None is no mixing.
        weight: share of the original sample in the mix, in [0, 1]; broadcasts to the shape of `labels`.
        smoothing: epsilon of label smoothing, in [0, 1]; a number, or a tensor that broadcasts as `weight` does.
        prior: (K,) probabilities over which smoothing spreads, or (K, K), a row for each label; None is 1 / K for all.
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
    _prior: Tensor | None
    _used: tuple[list[bool], ...]

    def __new__(
        cls,
        labels: Tensor,
        partner: Tensor | None = None,
        weight: Tensor | float = 1.0,
        smoothing: Tensor | float = 0.0,
        prior: Tensor | None = None,
    ) -> "MixedLabels":
        for name, value in (("labels", labels), ("partner", labels if partner is None else partner)):
            if not isinstance(value, Tensor) or isinstance(value, MixedLabels) or is_floating(value):
                got: Any = value.dtype if type(value) is Tensor else type(value)
                fix = "Floating targets are mixed as numbers; labels that are mixed already are by mix_labels"
                raise TypeError(message("MixedLabels", name, "a tensor of integers", got, fix))
        if not isinstance(weight, Tensor):
            fix = "It is the share of the original sample"
            check_number("MixedLabels", "weight", weight, "in [0, 1]", fix, lambda value: 0 <= value <= 1)
        share = _per_label("weight", weight, labels)
        if isinstance(smoothing, Tensor):
            smoothing = _per_label("smoothing", smoothing, labels)
        else:
            check_smoothing("MixedLabels", smoothing)
        prior = None if prior is None else prior.to(labels.device)
        if partner is None:
            return cls._of((Component(labels, torch.ones_like(share), smoothing),), prior)
        if partner.shape != labels.shape:
            got = tuple(partner.shape)
            fix = "Take labels[permutation]"
            raise ValueError(message("MixedLabels", "partner", f"of shape {tuple(labels.shape)}", got, fix))
        return cls._of((Component(labels, share, smoothing), Component(partner, 1 - share, smoothing)), prior)

    @classmethod
    def _of(
        cls,
        components: tuple[Component, ...],
        prior: Tensor | None = None,
        plain: Tensor | None = None,
        used: tuple[list[bool], ...] | None = None,
    ) -> "MixedLabels":
        plain = dominant(components) if plain is None else plain
        self = Tensor._make_subclass(cls, plain)
        self._plain, self._components, self._prior = plain, components, prior
        self._used = ([False],) if used is None else used
        return self

    @property
    def components(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The (labels, share) pairs whose one-hot codes add up to the unsmoothed target; the original ones come first.

        Labels that were mixed again are merged where they are equal, in the order of the labels.
        """
        return tuple((own, share) for own, share, _ in self._components)

    @property
    def smoothing(self) -> float | Tensor:
        """Epsilon of label smoothing: a number, or one for each label where they differ."""
        common = common_smoothing(self._components)
        if common is not None:
            return common
        return torch.stack([component.spread() for component in self._components]).sum(0)

    @property
    def prior(self) -> Tensor | None:
        """Probabilities over which smoothing spreads, (K,) or (K, K), a row for each label; None is 1 / K for all."""
        return self._prior

    @property
    def used(self) -> bool:
        """Whether a gradient comes from a loss that knows mixed labels, of these or of what was sliced from them."""
        return any(cell[0] for cell in self._used)

    def __repr__(self) -> str:  # type: ignore[override]
        smoothing = self.smoothing.tolist() if isinstance(self.smoothing, Tensor) else self.smoothing
        prior = "" if self._prior is None else f", prior=a tensor of shape {tuple(self._prior.shape)}"
        count = len(self._components)
        return f"MixedLabels({self._plain.tolist()}, components={count}, smoothing={smoothing}{prior})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Plain tuples: a checkpoint is loaded with nothing but tensors, numbers and containers of them.
        return _rebuild, (tuple(tuple(component) for component in self._components), self._prior, self._plain)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MixedLabels":
        components = changed(self._components, Tensor.clone, Tensor.clone)
        prior = None if self._prior is None else self._prior.clone()
        return MixedLabels._of(components, prior, self._plain.clone(), self._used)

    def __copy__(self) -> "MixedLabels":
        return MixedLabels._of(self._components, self._prior, self._plain, self._used)

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
                codes = dense(first._components, result.shape[-1], first._prior)
                return MixedOneHot(result, codes, first._used)
            if casts_to_float(func, result):
                condition = "integers: a cast to floating point loses the mix"
                raise ValueError(message("MixedLabels", "labels", condition, name_of(func), WAYS_OUT))
            if keeps(func) or name_of(func) in MOVES:
                return _rearranged(first, func, args[1:], kwargs, result)
        if name_of(func) in JOINS and torch.is_grad_enabled() and not is_floating(result):
            return _joined(func, args, kwargs, result)
        if requires_grad(result):
            condition = (
                "used by a loss that knows mixed labels; here a gradient would come from the dominant labels alone"
            )
            raise ValueError(message("MixedLabels", "labels", condition, name_of(func), WAYS_OUT))
        return result


def _rebuild(components: tuple[Any, ...], prior: Tensor | None, plain: Tensor) -> MixedLabels:
    return MixedLabels._of(tuple(Component(*component) for component in components), prior, plain)


# So that a checkpoint with a metric that keeps labels loads with weights_only=True.
torch.serialization.add_safe_globals([_rebuild])


def _per_label(name: str, value: Tensor | float, labels: Tensor) -> Tensor:
    """A number for each label, in memory of its own."""
    numbers = torch.as_tensor(value, dtype=torch.float32, device=labels.device)
    try:
        return numbers.expand(labels.shape).contiguous()
    except RuntimeError:
        fix = "Give (N,) weights, with a dimension of 1 for each further one of the labels"
        shape = tuple(numbers.shape)
        raise ValueError(message("MixedLabels", name, f"of shape {tuple(labels.shape)}", shape, fix)) from None


def _target(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("target")


# ---------------------------------------------------------------------- what keeps the mix


def _rearranged(
    mixed: MixedLabels, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Any:
    """What a function that keeps the mix makes of mixed labels; `result` is what it made of the dominant ones."""
    several = isinstance(result, (tuple, list))
    plains = list(result) if several else [result]
    name = name_of(func)
    read_as_bits = name == "view" and any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))
    if read_as_bits or not all(isinstance(plain, Tensor) for plain in plains):
        return result  # or the name of a type
    args, kwargs = replaced(args, MixedLabels, "_plain"), replaced(kwargs, MixedLabels, "_plain")
    apply = VIEWS.get(name, func)
    device = plains[0].device if plains else mixed.device
    wrapped = []
    for i, plain in enumerate(plains):

        def own(labels: Tensor, i: int = i) -> Tensor:
            new = apply(labels, *args, **kwargs)
            part: Tensor = new[i] if several else new
            return part

        def numbers(share: Tensor, i: int = i) -> Tensor:
            # A cast to integers is not for shares.
            return share.to(device) if name in MOVES else own(share, i)

        components = changed(mixed._components, own, numbers)
        prior = None if mixed._prior is None else mixed._prior.to(device)
        wrapped.append(MixedLabels._of(components, prior, plain, mixed._used))
    return type(result)(wrapped) if several else wrapped[0]


def _joined(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> Any:
    """Mixed and plain labels in one tensor; `result` is that of the dominant ones."""
    names = [name for name in ("tensors", "input") if name in kwargs]
    parts = args[0] if args else kwargs.pop(names[0])
    return join_labels(list(parts), lambda tensors: func(tensors, *args[1:], **kwargs), result)


def join_labels(
    parts: list[Tensor], join: Callable[[list[Tensor]], Tensor], plain: Tensor | None = None
) -> MixedLabels:
    """Make one tensor of mixed and plain labels.

    Args:
        parts: integers or MixedLabels; at least one is MixedLabels.
        join: what is done with a tensor of each part, as `torch.cat`.
        plain: the dominant labels of the result; None joins those of the parts.
    Returns:
        MixedLabels, whose use is a use of each of the parts.
    Raises:
        ValueError: parts that were smoothed with different priors.
    Example:
        >>> join_labels([torch.tensor([1]), MixedLabels(torch.tensor([2]))], torch.cat).tolist()
        [1, 2]
    """
    mixed = [part if isinstance(part, MixedLabels) else MixedLabels(part) for part in parts]
    prior = common_prior("torch.cat of mixed labels", mixed)
    plain = join([part._plain for part in mixed]) if plain is None else plain
    cells = {id(cell): cell for part in parts if isinstance(part, MixedLabels) for cell in part._used}
    return MixedLabels._of(joined([part._components for part in mixed], join), prior, plain, tuple(cells.values()))


def is_smoothed(labels: MixedLabels) -> bool:
    """Whether labels may have a share that is spread over a prior.

    Args:
        labels: as they are.
    Returns:
        False if all their smoothing is 0; tensors on a GPU, for which the host would wait, are not asked.
    Example:
        >>> is_smoothed(MixedLabels(torch.tensor([0])))
        False
    """
    epsilons = [component.smoothing for component in labels._components]
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return any(isinstance(epsilon, Tensor) or epsilon > 0 for epsilon in epsilons)
    return any(bool((epsilon > 0).any()) if isinstance(epsilon, Tensor) else epsilon > 0 for epsilon in epsilons)


def common_prior(owner: str, parts: list[MixedLabels]) -> Tensor | None:
    """The prior of all labels that were smoothed.

    Args:
        owner: function named in the error.
        parts: labels that are to be one tensor.
    Returns:
        (K,), (K, K) or None, as in MixedLabels.
    Raises:
        ValueError: different priors.
    Example:
        >>> common_prior("torch.cat", [MixedLabels(torch.tensor([0]), smoothing=0.1)])
    """
    priors = [part._prior for part in parts if is_smoothed(part)]
    for prior in priors[1:]:
        if not same_prior(prior, priors[0]):
            fix = "Give every LabelSmoothing of the list the same prior, or smooth all samples in one of them"
            shapes = [None if prior is None else tuple(prior.shape) for prior in priors]
            raise ValueError(message(owner, "prior", "the same for all labels of a batch", shapes, fix))
    return priors[0] if priors else None


def same_prior(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two priors are one; the values are compared only where the objects differ, which a GPU is waited for.

    Args:
        first, second: (K,), (K, K) or None.
    Returns:
        True for the same.
    Example:
        >>> same_prior(None, torch.tensor([0.5, 0.5]))
        False
    """
    return first is second or (first is not None and second is not None and torch.equal(first, second))


# ---------------------------------------------------------------------- losses that know the mix


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
    reduction = _reduction(size_average, reduce, reduction)
    _note_use(input, target)
    return mixed_cross_entropy(
        input, target._components, label_smoothing, weight, ignore_index, reduction, target._prior
    )


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
    _note_use(input, target)
    # Autocast computes the losses of plain labels in float32.
    log_probs = input.float() if torch.is_autocast_enabled(input.device.type) else input
    return mixed_nll(log_probs, target._components, 0.0, weight, ignore_index, reduction, target._prior)


def _note_use(input: Tensor, target: MixedLabels) -> None:
    for cell in target._used:
        cell[0] |= torch.is_grad_enabled() and input.requires_grad


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    return reduction
