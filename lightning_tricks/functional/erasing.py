"""Cutout: draw the boxes, then fill them."""

import torch
from torch import Generator, Tensor

from lightning_tricks.functional.checks import check_images, message


def sample_centers(count: int, holes: int, height: int, width: int, generator: Generator | None = None) -> Tensor:
    """Draw the middle of each hole, uniform over the pixels.

    Args:
        count: images in the batch.
        holes: holes in each image.
        height, width: size of an image (pixels).
        generator: CPU generator; None takes torch's global one.
    Returns:
        (count, holes, 2) int64: row in [0, height) and column in [0, width).
    Example:
        >>> sample_centers(4, 1, 8, 8).shape
        torch.Size([4, 1, 2])
    """
    rows = torch.randint(height, (count, holes), generator=generator)
    columns = torch.randint(width, (count, holes), generator=generator)
    return torch.stack([rows, columns], dim=-1)


def cutout(images: Tensor, centers: Tensor, size: int, fill: float = 0.0, inplace: bool = False) -> Tensor:
    """Fill a square in each image; what would lie outside the image is clipped.

        images'[n, :, r, c] = fill   where  -(size // 2) <= r - row < size - size // 2,  the same for c

    Args:
        images: (N, C, H, W).
        centers: (N, holes, 2) int64, row and column of the middle of each hole (pixels).
        size: side of the square (pixels); a side of 15 cuts 15.
        fill: value written.
        inplace: write the result into `images`.
    Returns:
        (N, C, H, W); a new tensor unless `inplace`.
    Raises:
        ValueError: images of another number of dimensions, or a fraction for images of integers.
    References:
        DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017,
        arXiv:1708.04552, section 3.1.
        Deviates: an odd side is cut in full (the authors' code cuts one pixel less).
    Example:
        >>> cutout(torch.ones(1, 1, 3, 3), torch.tensor([[[0, 1]]]), size=2)
        tensor([[[[0., 0., 1.],
                  [1., 1., 1.],
                  [1., 1., 1.]]]])
    """
    check_images("cutout", images)
    if not (images.is_floating_point() or float(fill).is_integer()):
        fix = "Images of integers take an integer"
        raise ValueError(message("cutout", "fill", f"a value of {images.dtype}", fill, fix))
    first = centers.to(images.device) - size // 2
    inside = []
    for axis, length in enumerate(images.shape[-2:]):
        offset = torch.arange(length, device=images.device) - first[..., axis, None]
        inside.append((offset >= 0) & (offset < size))
    mask = (inside[0][..., :, None] & inside[1][..., None, :]).any(dim=1).unsqueeze(1)
    return images.masked_fill_(mask, fill) if inplace else images.masked_fill(mask, fill)
