"""Label smoothing, in training only."""

from dataclasses import dataclass

from torch import Generator, Tensor

from lightning_tricks.functional.checks import message
from lightning_tricks.functional.cross_entropy import check_smoothing
from lightning_tricks.labels import smooth_labels


@dataclass(frozen=True)
class LabelSmoothing:
    """Spread a share of each label evenly over all classes, in training only.

        target' = (1 - smoothing) * target + smoothing / K

    Args:
        smoothing: epsilon, in [0, 1].
    Returns:
        Called with (images, labels, generator, inplace): the images as they came, and MixedLabels.
    Raises:
        TypeError: no labels, or floating ones, which say nothing of what they mean.
        ValueError: smoothing outside [0, 1].
    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, arXiv:1512.00567, section 7.
    Example:
        >>> import torch
        >>> LabelSmoothing(0.1)(torch.rand(2, 1, 8, 8), torch.tensor([3, 7]))[1]
        MixedLabels([3, 7], components=1, smoothing=0.1)
    """

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_smoothing("LabelSmoothing", self.smoothing)

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        if labels is None or labels.is_floating_point() or labels.is_complex():
            got = "no labels" if labels is None else labels.dtype
            fix = "Smooth floating targets in the data set, or leave LabelSmoothing out"
            raise TypeError(message("LabelSmoothing", "labels", "integers", got, fix))
        return images, smooth_labels(labels, self.smoothing)
