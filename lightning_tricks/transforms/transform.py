"""What a batch transform is."""

from typing import Protocol

from torch import Generator, Tensor


class Transform(Protocol):
    """What BatchTransforms applies: a callable on a batch of images and labels.

    Args:
        images: (N, C, H, W).
        labels: (N, ...) integers, MixedLabels or floating targets; None where the batch has none.
        generator: CPU generator of all draws; None takes torch's global one.
        inplace: whether `images` may be overwritten.
    Returns:
        The new images and labels.
    Example:
        >>> import torch
        >>> def darken(images, labels, generator=None, inplace=False):
        ...     return images * torch.rand(len(images), 1, 1, 1, generator=generator), labels
        >>> darken(torch.ones(2, 1, 4, 4), None)[0].shape
        torch.Size([2, 1, 4, 4])
    """

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        ...
