"""Labels that lie on the pixels of their images, and go where these go."""

from collections.abc import Callable
from typing import TypeGuard

from torch import Tensor

from lightning_tricks.functional.checks import check_labels, holds, message
from lightning_tricks.labels import move_labels

IGNORED = -100
"""What torch's losses ignore, unless they are told another number."""


def is_mask(labels: Tensor | None, images: Tensor) -> TypeGuard[Tensor]:
    """Whether labels belong to pixels: (N, H, W) or (N, K, H, W), with the height and width of the images.

    Args:
        labels: what came beside the images.
        images: (N, C, H, W).
    Returns:
        True for masks.
    Example:
        >>> import torch
        >>> images = torch.zeros(2, 3, 8, 8)
        >>> is_mask(torch.zeros(2, 8, 8), images), is_mask(torch.zeros(2), images)
        (True, False)
    """
    return labels is not None and labels.dim() in (3, 4) and labels.shape[-2:] == images.shape[-2:]


def check_beside(owner: str, labels: Tensor | None, images: Tensor) -> None:
    """Raise unless labels are those of whole images or masks of the images' size, one for each image, or None.

    Boxes, points and masks of another size would no longer lie on the pixels they are about.

    Args:
        owner: transform named in an error.
        labels: what came beside the images.
        images: (N, C, H, W).
    Raises:
        ValueError: labels of three or more dimensions that are no masks, or another number of them.
    Example:
        >>> import torch
        >>> check_beside("CutMix", torch.zeros(2, 8, 8), torch.zeros(2, 3, 8, 8))
    """
    check_labels(owner, labels, images)
    if labels is not None and labels.dim() > 2 and not is_mask(labels, images):
        height, width = images.shape[-2:]
        condition = f"of whole images, (N,) or (N, K), or masks of {height} x {width} pixels"
        fix = "Bring masks to the images' size; labels of other places have no way to move with them"
        raise ValueError(message(owner, "labels", condition, tuple(labels.shape), fix))


def move_mask(labels: Tensor, move: Callable[[Tensor, float], Tensor], fill: float | None, owner: str) -> Tensor:
    """Move masks as their images were moved.

    Args:
        labels: (N, H, W) or (N, K, H, W); integers, booleans, MixedLabels or floats.
        move: takes (N, C, H, W) of any dtype and the value of what comes from outside the images, and returns it moved,
            as a new tensor; each value of it was there before (nearest neighbour).
        fill: value of what comes from outside; 0 where nothing does; None for -100, torch's ignore_index, in integers.
        owner: transform named in an error.
    Returns:
        Labels of the same kind, with the new height and width.
    Raises:
        ValueError: a fill that labels of this dtype cannot hold; None for floating ones, of which no loss ignores any.
    Example:
        >>> import torch
        >>> move_mask(torch.tensor([[[1, 2]]]), lambda part, fill: part.flip(-1), 0, "RandomFlip")
        tensor([[[2, 1]]])
    """
    if fill is None and labels.is_floating_point():
        fix = "Give what the loss shall see there, as 0"
        raise ValueError(message(owner, "label_fill", "given for floating masks", fill, fix))
    fill = IGNORED if fill is None else fill
    if not holds(labels.dtype, fill):
        fix = "Give one they hold, and give the loss the same ignore_index"
        raise ValueError(message(owner, "label_fill", f"a value of {labels.dtype}", fill, fix))

    def moved(part: Tensor, value: float) -> Tensor:
        return move(part.unsqueeze(1), value).squeeze(1) if part.dim() == 3 else move(part, value)

    return move_labels(labels, moved, fill)


def move_beside(
    labels: Tensor | None, images: Tensor, move: Callable[[Tensor, float], Tensor], fill: float | None, owner: str
) -> Tensor | None:
    """What becomes of labels when their images are moved: masks go along, labels of whole images stay.

    Args:
        labels: None, (N,), (N, K), or masks (N, H, W) or (N, K, H, W).
        images: (N, C, H, W), as they were before.
        move, fill, owner: as in `move_mask`.
    Returns:
        The labels, or moved masks.
    Raises:
        ValueError: as `check_beside` and `move_mask`.
    Example:
        >>> import torch
        >>> move_beside(torch.tensor([7]), torch.zeros(1, 3, 2, 2), lambda part, fill: part.flip(-1), 0, "RandomFlip")
        tensor([7])
    """
    check_beside(owner, labels, images)
    return move_mask(labels, move, fill, owner) if is_mask(labels, images) else labels
