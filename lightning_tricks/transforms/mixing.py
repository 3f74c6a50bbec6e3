"""Mixup: images and labels mixed with others of the batch."""

from dataclasses import dataclass

from torch import Generator, Tensor

from lightning_tricks.functional.checks import check_number
from lightning_tricks.functional.mixing import mixup, sample_mixup
from lightning_tricks.labels import mix_labels


@dataclass(frozen=True)
class Mixup:
    """Mix each image and its label with another one of the batch.

        images' = weight * images + (1 - weight) * images[permutation],  weight ~ Beta(alpha, alpha)
        target' = weight * target + (1 - weight) * target[permutation]

    Args:
        alpha: concentration of the Beta distribution, above 0; 0.2 mixes lightly, 1 draws the weight uniformly.
        per_sample: a weight for each image; otherwise one for the batch.
    Returns:
        Called with (images (N, ...), labels, generator, inplace): mixed images, and MixedLabels of integer labels, a
        floating tensor of floating ones, None of None.
    Raises:
        TypeError, ValueError: alpha is no number above 0.
    References:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018, arXiv:1710.09412, eq. 1.
        Deviates: a weight for each image (the authors' code draws one for the batch: `per_sample=False`).
    Example:
        >>> import torch
        >>> images, labels = Mixup(0.2)(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))
        >>> images.shape, type(labels).__name__
        (torch.Size([4, 1, 8, 8]), 'MixedLabels')
    """

    alpha: float = 0.2
    per_sample: bool = True

    def __post_init__(self) -> None:
        check_number("Mixup", "alpha", self.alpha, "above 0", "Try 0.2", lambda value: value > 0)

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        weight, permutation = sample_mixup(len(images), self.alpha, self.per_sample, generator)
        mixed = mixup(images, weight, permutation, inplace)
        return mixed, None if labels is None else mix_labels(labels, weight, permutation)
