"""Images of a batch as one picture, and a picture as a file."""

import math
import struct
import zlib

import torch
from torch import Tensor

from lightning_tricks.functional.checks import check_count, check_images, message

_GAP = 2


def picture_grid(images: Tensor, columns: int = 8) -> Tensor:
    """Lay images out in rows, from left to right, with a black frame of 2 pixels around each.

        value = (image - min(images)) / (max(images) - min(images))   where floats are outside [0, 1]

    Args:
        images: (N, C, H, W), N and C at least 1; uint8 as they are, anything else as floats in [0, 1] or stretched to
            that from the range of their finite values. With 3 channels red, green and blue; else the first one in grey.
        columns: images in a row, at least 1.
    Returns:
        (3, height, width) uint8 on the CPU.
    Raises:
        TypeError, ValueError: another shape, or no whole number of columns.
    Example:
        >>> picture_grid(torch.rand(5, 1, 8, 8), columns=4).shape
        torch.Size([3, 22, 42])
    """
    check_images("picture_grid", images)
    check_count("picture_grid", "columns", columns, 1, "images in a row", "8 is usual")
    if 0 in images.shape:
        fix = "Leave an empty batch out"
        raise ValueError(message("picture_grid", "images", "at least one, of one channel", tuple(images.shape), fix))
    shown = images.detach().cpu()
    shown = shown if shown.shape[1] == 3 else shown[:, :1].expand(-1, 3, -1, -1)
    if shown.dtype != torch.uint8:
        shown = (_in_unit_range(shown.double()) * 255).round().to(torch.uint8)
    count, _, height, width = shown.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    grid = torch.zeros(3, rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, dtype=torch.uint8)
    for place, image in enumerate(shown):
        top, left = ((place // columns) * (height + _GAP) + _GAP, (place % columns) * (width + _GAP) + _GAP)
        grid[:, top : top + height, left : left + width] = image
    return grid


def _in_unit_range(values: Tensor) -> Tensor:
    finite = values[values.isfinite()]
    low, high = (finite.min(), finite.max()) if len(finite) else (values.new_zeros(()), values.new_ones(()))
    if low < 0 or high > 1:
        values = (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)
    return values.nan_to_num(0.0, 1.0, 0.0)


def png(picture: Tensor) -> bytes:
    """A picture as the contents of a PNG file.

    Args:
        picture: (3, height, width) uint8.
    Returns:
        The bytes; what reads them gets every value back.
    References:
        ISO/IEC 15948, "Portable Network Graphics": 8 bits, colour type 2, no filter.
    Example:
        >>> png(torch.zeros(3, 2, 2, dtype=torch.uint8))[:4]
        b'\\x89PNG'
    """
    _, height, width = picture.shape
    rows = picture.cpu().movedim(0, -1).reshape(height, 3 * width)
    lines = torch.cat([rows.new_zeros(height, 1), rows], dim=1)  # each row begins with its filter
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(lines.numpy().tobytes())
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", data), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
