"""Labels that lie on the pixels of their images, and go where these go."""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor

from lightning_tricks.functional.checks import message
from lightning_tricks.labels import move_labels


def is_mask(labels: Tensor | None, images: Tensor) -> TypeGuard[Tensor]:
    """Whether labels belong to pixels: (N, H, W) or (N, K, H, W), with the height and width of the images.

    Args:
        labels: what came beside the images.
        images: (N, C, H, W).
    Returns:
        True for masks.
    Example:
        >>> images = torch.zeros(2, 3, 8, 8)
        >>> is_mask(torch.zeros(2, 8, 8), images), is_mask(torch.zeros(2), images)
        (True, False)
    """
    return labels is not None and labels.dim() in (3, 4) and labels.shape[-2:] == images.shape[-2:]


def move_mask(labels: Tensor, move: Callable[[Tensor, float], Tensor], fill: float, owner: str) -> Tensor:
    """Move masks as their images were moved.

    Args:
        labels: (N, H, W) or (N, K, H, W); integers, MixedLabels or floats.
        move: takes (N, C, H, W) of any dtype and the value of what comes from outside the images, and returns it moved;
            each value of it was there before (nearest neighbour).
        fill: value of what comes from outside.
        owner: transform named in an error.
    Returns:
        Labels of the same kind, with the new height and width.
    Raises:
        ValueError: a fill that labels of this dtype cannot hold.
    Example:
        >>> move_mask(torch.tensor([[[1, 2]]]), lambda part, fill: part.flip(-1), -100, "RandomFlip")
        tensor([[[2, 1]]])
    """
    if not labels.is_floating_point():
        held = torch.iinfo(labels.dtype)
        if not (float(fill).is_integer() and held.min <= fill <= held.max):
            fix = "Give one they hold, and give the loss the same ignore_index"
            raise ValueError(message(owner, "label_fill", f"a value of {labels.dtype}", fill, fix))

    def moved(part: Tensor, value: float) -> Tensor:
        return move(part.unsqueeze(1), value).squeeze(1) if part.dim() == 3 else move(part, value)

    return move_labels(labels, moved, fill)
