"""Losses for labels that were smoothed or mixed."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tricks.functional.checks import message
from lightning_tricks.functional.cross_entropy import check_smoothing


class LabelSmoothingCrossEntropy(nn.Module):
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
        ...), MixedLabels, or floating targets (N, K, ...).
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

    weight: Tensor | None

    def __init__(
        self, smoothing: float = 0.1, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_smoothing(owner, smoothing)
        if weight is not None and not (isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 1):
            fix = "Give one number for each class, as in torch.tensor([1.0, 2.0])"
            raise TypeError(message(owner, "weight", "a floating tensor of shape (K,) or None", weight, fix))
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(message(owner, "ignore_index", "an integer label", ignore_index, "The default is -100"))
        if reduction not in ("mean", "sum", "none"):
            fix = "'mean' is the default"
            raise ValueError(message(owner, "reduction", "'mean', 'sum' or 'none'", reduction, fix))
        self.smoothing = smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.register_buffer("weight", weight)

    def extra_repr(self) -> str:
        return f"smoothing={self.smoothing}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss; see the class."""
        smoothing = self.smoothing if self.training else 0.0
        return F.cross_entropy(
            logits,
            labels,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=smoothing,
        )
