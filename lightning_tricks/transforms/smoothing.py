"""Label smoothing, in training only."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from lightning_tricks.functional.checks import check_number, message
from lightning_tricks.functional.components import check_smoothing
from lightning_tricks.labels import smooth_labels


@dataclass(frozen=True)
class LabelSmoothing:
    """Spread a share of each label over all classes, in training only.

        target' = (1 - smoothing) * target + smoothing / K
        target' = (1 - smoothing) * target + smoothing * prior              prior (K,), as the classes' frequencies
        target' = (1 - smoothing) * target + smoothing * target @ prior     prior (K, K), a row for each label

    Args:
        smoothing: epsilon, in [0, 1].
        prior: K probabilities, or K rows of K, as a list, tensor or array, which say with what each class is confused;
            None spreads evenly. With rows and a smoothing of 1 the target is the label's row.
    Returns:
        Called with (images, labels, generator, inplace): the images as they came, and MixedLabels.
    Raises:
        TypeError: no labels, or floating ones, which say nothing of what they mean.
        ValueError: smoothing outside [0, 1], a prior that is no probabilities, or labels smoothed with another one.
    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, arXiv:1512.00567, section 7.
    Example:
        >>> import torch
        >>> LabelSmoothing(0.1)(torch.rand(2, 1, 8, 8), torch.tensor([3, 7]))[1]
        MixedLabels([3, 7], components=1, smoothing=0.1)
    """

    smoothing: float = 0.1
    prior: Sequence[float] | Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        check_smoothing("LabelSmoothing", self.smoothing)
        if self.prior is not None:
            given = _numbers(self.prior)
            object.__setattr__(self, "_prior", _probabilities(self.prior, given))
            # A value: what was given may change, and lists have no hash.
            object.__setattr__(self, "prior", tuple(tuple(row) if given.dim() == 2 else row for row in given.tolist()))

    def __repr__(self) -> str:
        prior = "" if self.prior is None else f", prior={list(self.prior)}"
        return f"LabelSmoothing(smoothing={self.smoothing}{prior})"

    def __reduce__(self) -> Any:
        return LabelSmoothing, (self.smoothing, self.prior)  # without the tensor, which may be on a device

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        if labels is None or labels.is_floating_point() or labels.is_complex():
            got = "no labels" if labels is None else labels.dtype
            fix = "Smooth floating targets in the data set, or leave LabelSmoothing out"
            raise TypeError(message("LabelSmoothing", "labels", "integers", got, fix))
        prior: Tensor | None = getattr(self, "_prior", None)
        if prior is not None and prior.device != labels.device:  # moved once, and the same object for every batch
            prior = prior.to(labels.device)
            object.__setattr__(self, "_prior", prior)
        return images, smooth_labels(labels, self.smoothing, prior)

    def scaled(self, strength: float) -> "LabelSmoothing":
        """The same with another share.

            smoothing' = strength * smoothing

        Args:
            strength: above 0; 1 is as it is.
        Returns:
            A new transform.
        Raises:
            ValueError: a strength of 0 or less, or one that makes the smoothing larger than 1.
        Example:
            >>> LabelSmoothing(0.2).scaled(0.5)
            LabelSmoothing(smoothing=0.1)
        """
        fix = f"The largest is {1 / self.smoothing:g}" if self.smoothing > 0 else "Try 1"
        check_number(
            "LabelSmoothing", "strength", strength, "above 0, with strength * smoothing of at most 1", fix,
            lambda value: value > 0 and value * self.smoothing <= 1,
        )  # fmt: skip
        return replace(self, smoothing=self.smoothing * strength)


_CONDITION = "probabilities that add up to 1"
_FIX = "Give K of them, or K rows of K, as in [0.7, 0.2, 0.1]"


def _numbers(prior: Any) -> Tensor:
    """What was given as a prior, as a tensor; raise unless it is numbers."""
    try:
        return torch.as_tensor(prior, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError):
        raise TypeError(message("LabelSmoothing", "prior", _CONDITION, prior, _FIX)) from None


def _probabilities(prior: Any, tensor: Tensor) -> Tensor:
    """The tensor of a prior, each row with a sum of 1; raise unless it is one."""
    shape = tuple(tensor.shape)
    if not (len(shape) == 1 or (len(shape) == 2 and shape[0] == shape[1])) or 0 in shape:
        raise ValueError(message("LabelSmoothing", "prior", "of shape (K,) or (K, K)", shape, _FIX))
    if bool((tensor < 0).any()) or not bool(((tensor.sum(-1) - 1).abs() < 1e-4).all()):
        got = prior if tensor.numel() <= 10 else f"sums of {tensor.sum(-1).tolist()[:10]}"
        raise ValueError(message("LabelSmoothing", "prior", _CONDITION, got, _FIX))
    return (tensor / tensor.sum(-1, keepdim=True)).float()
