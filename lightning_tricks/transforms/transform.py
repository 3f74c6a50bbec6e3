"""What a batch transform is."""

from typing import Protocol

from torch import Generator, Tensor


class Transform(Protocol):
    """What BatchTransforms applies: a callable on a batch of images and labels.

    What it returns is its input, a view of that, or new: the transform after it may overwrite what is new. The random
    numbers that it takes from the generator depend on N, H, W and its settings alone, so that the same generator again
    gives the same draw to another image of the sample, or, beside a batch of zero channels, to a mask as the labels.

    A transform may have two things more. `scaled(strength)` returns it at another strength, a number above 0 of which 1
    is the transform as it is. The class attribute `every_stage = True` says that validation, test and predict need it
    too; it is then called without labels.

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
