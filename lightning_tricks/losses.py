"""Losses for labels that were smoothed or mixed, and for dense targets."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tricks.functional.checks import check_flag, check_number, message
from lightning_tricks.functional.components import Component, check_smoothing, check_weight_fits
from lightning_tricks.functional.cross_entropy import CHUNK, mixed_cross_entropy, soft_cross_entropy
from lightning_tricks.labels import MixedLabels, drop_ignored, soft_targets


class _CrossEntropy(nn.Module):
    """What the cross-entropies have in common."""

    weight: Tensor | None

    def __init__(self, weight: Tensor | None, ignore_index: int, reduction: str) -> None:
        super().__init__()
        owner = type(self).__name__
        _check_weight(owner, "weight", weight)
        _check_reduction(owner, reduction)
        _check_ignore_index(owner, ignore_index)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.register_buffer("weight", weight)

    def _loss(self, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        check_weight_fits(type(self).__name__, self.weight, logits.shape[_class_dim(logits)])
        options: dict[str, Any] = {
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
        }
        if labels.is_floating_point():
            return soft_cross_entropy(logits, labels, smoothing, **options, owner=type(self).__name__)
        _check_labels(type(self).__name__, logits, labels)
        if not isinstance(labels, MixedLabels):
            labels = labels.long()  # mixed ones may be of any size
        # torch's own, which keeps three tensors of the logits' size, is as fast while these fit a CPU's cache.
        if smoothing > 0 and logits.numel() > CHUNK and not isinstance(labels, MixedLabels):
            component = Component(labels, torch.ones_like(labels, dtype=torch.float32))
            return mixed_cross_entropy(logits, [component], smoothing, **options)
        return F.cross_entropy(logits, labels, label_smoothing=smoothing, **options)


class LabelSmoothingCrossEntropy(_CrossEntropy):
    """Cross-entropy that smooths the labels in `train()` and is the plain negative log-likelihood in `eval()`.

        loss = -sum(target * log_softmax(logits)),  target = (1 - smoothing) * one_hot(labels) + smoothing / K

    `F.cross_entropy(label_smoothing=)` is the same in training; this module switches it off in validation, so that
    validation losses can be compared between runs of different smoothing.

    Args:
        smoothing: epsilon, in [0, 1].
        weight: (K,) weight of each class; None weighs all alike.
        ignore_index: label that counts neither in the loss nor in the mean.
        reduction: "mean" (over the sum of the labels' weights), "sum" or "none".
    Returns:
        Called with logits (N, K, ...) and labels: the loss, a scalar or one for each label. Labels are integers (N,
        ...), MixedLabels, or floating targets (N, K, ...), as in SoftTargetCrossEntropy.
    Raises:
        TypeError, ValueError: an argument out of range.
    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, arXiv:1512.00567, section 7.
    Example:
        >>> import torch
        >>> loss, logits, labels = LabelSmoothingCrossEntropy(0.1), torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        >>> round(loss.train()(logits, labels).item(), 3), round(loss.eval()(logits, labels).item(), 3)
        (0.227, 0.127)
    """

    def __init__(
        self, smoothing: float = 0.1, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        check_smoothing(type(self).__name__, smoothing)
        super().__init__(weight, ignore_index, reduction)
        self.smoothing = smoothing

    def extra_repr(self) -> str:
        return f"smoothing={self.smoothing}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss; see the class."""
        return self._loss(logits, labels, self.smoothing if self.training else 0.0)


class SoftTargetCrossEntropy(_CrossEntropy):
    """Cross-entropy of dense targets, the same number as that of the labels they were made of.

        loss[n] = -sum(w[c] * target[n, c] * log_softmax(logits)[n, c] for every class c)
        "mean" = sum(loss) / sum(w[c] * target[n, c])

    With class weights w, `F.cross_entropy` divides by N where targets are dense and by the labels' weights where they
    are integers; here both divide alike, so that mixing does not rescale the loss.

    Args:
        weight: (K,) weight w of each class; None weighs all alike.
        ignore_index: label that counts neither in the loss nor in the mean. Of dense targets this is a column, if it is
            one of the K; a sample whose targets are all 0 is ignored too.
        reduction: "mean", "sum" or "none".
    Returns:
        Called with logits (N, K, ...) and targets: the loss, a scalar or one for each sample. Targets are floats (N, K,
        ...), integers (N, ...) or MixedLabels.
    Raises:
        TypeError, ValueError: an argument out of range, or targets of another shape.
    References:
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531.
        Deviates: normalised as for integer labels.
    Example:
        >>> import torch
        >>> loss, logits = SoftTargetCrossEntropy(weight=torch.tensor([3.0, 1.0])), torch.tensor([[2.0, 0.0]])
        >>> round(loss(logits, torch.tensor([[1.0, 0.0]])).item(), 3), round(loss(logits, torch.tensor([0])).item(), 3)
        (0.127, 0.127)
    """

    def __init__(self, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__(weight, ignore_index, reduction)

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss; see the class."""
        return self._loss(logits, targets, 0.0)


class BinaryCrossEntropy(nn.Module):
    """A binary cross-entropy for each class, of labels that are smoothed in `train()` and may be mixed.

        loss = -w * (pos_weight * target * log(p) + (1 - target) * log(1 - p)),  p = sigmoid(logits)
        target = (1 - smoothing) * one_hot(labels) + smoothing / K      integers, MixedLabels
        target = (1 - smoothing) * target + smoothing / 2               dense, each class a choice of two
        target = 1 where target > target_threshold, else 0              with a threshold

    In `eval()` nothing is smoothed; the threshold applies there too. Of a mix the components that are not ignored make
    the target, and their share is what the sample counts, in the loss and in the mean.

    Args:
        smoothing: epsilon, in [0, 1].
        target_threshold: makes every class of a mix a whole one, in [0, 1); 0.2 in the paper; None leaves targets soft.
        weight: (K,) weight w of each class; None weighs all alike.
        pos_weight: (K,) or () weight of what is 1, beside what is 0.
        sum_classes: sum over the classes; otherwise their mean.
        ignore_index: label that counts neither in the loss nor in the mean; a negative one also as a number of floating
            targets, for a class of a sample that is not known.
        reduction: "mean" (over the samples), "sum", or "none" (one number for each class, or, with `sum_classes`, for
            each sample).
    Returns:
        Called with logits (N, K, ...) and labels: the loss. Labels are integers (N, ...), MixedLabels, or floating
        targets (N, K, ...).
    Raises:
        TypeError, ValueError: an argument out of range, a label outside [0, K), or labels, targets or weights of
            another shape.
    References:
        Wightman et al., "ResNet strikes back", 2021, arXiv:2110.00476, section 4.1.
        Deviates: dense targets are smoothed as well, towards 1 / 2.
    Example:
        >>> import torch
        >>> loss = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.2)
        >>> labels = MixedLabels(torch.tensor([0]), torch.tensor([2]), 0.7)
        >>> round(loss(torch.tensor([[4.0, -4.0, 4.0]]), labels).item(), 3)
        0.018
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        smoothing: float = 0.1,
        target_threshold: float | None = None,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        sum_classes: bool = False,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        owner = "BinaryCrossEntropy"
        check_smoothing(owner, smoothing)
        if target_threshold is not None:
            fix = "0.2 is the paper's; None leaves targets soft"
            check_number(owner, "target_threshold", target_threshold, "in [0, 1)", fix, lambda value: 0 <= value < 1)
        _check_weight(owner, "weight", weight)
        _check_weight(owner, "pos_weight", pos_weight, dims=(0, 1))
        check_flag(owner, "sum_classes", sum_classes, "True sums over the classes")
        _check_reduction(owner, reduction)
        _check_ignore_index(owner, ignore_index)
        self.ignore_index = ignore_index
        self.smoothing = smoothing
        self.target_threshold = target_threshold
        self.sum_classes = sum_classes
        self.reduction = reduction
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)

    def extra_repr(self) -> str:
        return (
            f"smoothing={self.smoothing}, target_threshold={self.target_threshold}, sum_classes={self.sum_classes}, "
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}"
        )

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss; see the class."""
        classes = _class_dim(logits)
        check_weight_fits("BinaryCrossEntropy", self.weight, logits.shape[classes])
        if self.pos_weight is not None and self.pos_weight.dim() > 0:
            check_weight_fits("BinaryCrossEntropy", self.pos_weight, logits.shape[classes], "pos_weight")
        targets, share = self._targets(logits, labels)
        if self.target_threshold is not None:
            targets = targets > self.target_threshold
        targets = targets.to(logits.dtype)
        # The classes of (N, K, d1, ...) are in the second dimension, of (K,) in the only one.
        ahead = [-1] + [1] * (logits.dim() - 2)
        weight, pos_weight = (w if w is None or w.dim() == 0 else w.view(ahead) for w in (self.weight, self.pos_weight))
        loss = F.binary_cross_entropy_with_logits(logits, targets, weight, pos_weight=pos_weight, reduction="none")
        loss = torch.where(share == 0, 0, loss * share.to(loss.dtype))
        if self.sum_classes:
            loss, share = loss.sum(classes), share.amax(classes)
        if self.reduction == "none":
            return loss
        if self.reduction == "sum":
            return loss.sum()
        # Half precision neither counts a batch nor holds its sum.
        exact = torch.promote_types(loss.dtype, torch.float32)
        return (loss.sum(dtype=exact) / share.expand_as(loss).sum(dtype=exact)).to(loss.dtype)

    def _targets(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Dense targets, and what each counts, of a shape that broadcasts to theirs."""
        smoothing, classes = self.smoothing if self.training else 0.0, _class_dim(logits)
        if labels.is_floating_point():
            if labels.shape != logits.shape:
                fix, shape = "Give a number for each class, or integer labels", tuple(logits.shape)
                got = tuple(labels.shape)
                raise ValueError(message("BinaryCrossEntropy", "targets", f"of shape {shape}", got, fix))
            # A 0 or 1 of floating targets is a share, and no label.
            known = (labels != self.ignore_index) | (self.ignore_index >= 0)
            return (labels + smoothing * (0.5 - labels)).where(known, 0.5), known.float()
        _check_labels("BinaryCrossEntropy", logits, labels)
        labels, share = drop_ignored(labels, self.ignore_index)
        targets = soft_targets(labels, logits.shape[classes])
        return targets + smoothing * (1 / logits.shape[classes] - targets), share.unsqueeze(classes)


def _class_dim(logits: Tensor) -> int:
    return min(1, logits.dim() - 1)


def _check_labels(owner: str, logits: Tensor, labels: Tensor) -> None:
    shape = tuple(size for dim, size in enumerate(logits.shape) if dim != _class_dim(logits))
    if labels.shape != shape:
        fix = "Make multi-hot targets floating in the data set, or give one label for each sample or place"
        raise ValueError(message(owner, "labels", f"of shape {shape}", tuple(labels.shape), fix))


def _check_ignore_index(owner: str, ignore_index: int) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(message(owner, "ignore_index", "an integer label", ignore_index, "The default is -100"))


def _check_weight(owner: str, name: str, weight: Tensor | None, dims: tuple[int, ...] = (1,)) -> None:
    if weight is not None and not (isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() in dims):
        fix = "Give one number for each class, as in torch.tensor([1.0, 2.0])"
        shapes = "(K,) or None" if dims == (1,) else "(K,) or () or None"
        raise TypeError(message(owner, name, f"a floating tensor of shape {shapes}", weight, fix))


def _check_reduction(owner: str, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        fix = "'mean' is the default"
        raise ValueError(message(owner, "reduction", "'mean', 'sum' or 'none'", reduction, fix))
