"""The one form of error message, and the checks of plain numbers that every constructor needs."""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

LARGEST = sys.float_info.max


def message(owner: str, name: str, condition: str, got: Any, fix: str) -> str:
    """Say which argument is wrong, what it must be, what came and what to do.

    Args:
        owner: class or function whose argument it is.
        name: the argument.
        condition: what it must be, with its unit.
        got: the value that came.
        fix: what to do instead, a sentence without its full stop.
    Returns:
        The sentence that an error carries.
    Example:
        >>> message("EMA", "decay", "in [0, 1)", 2, "Try 0.999")
        'EMA: decay must be in [0, 1), got 2. Try 0.999.'
    """
    return f"{owner}: {name} must be {condition}, got {got!r}. {fix}."


def check_number(
    owner: str, name: str, value: Any, condition: str, fix: str, ok: Callable[[float], bool] = lambda value: True
) -> None:
    """Raise unless the value is a finite real number that satisfies its condition.

    Args:
        owner, name, condition, fix: as in `message`.
        value: what came.
        ok: whether the condition holds; only asked of a finite number.
    Raises:
        TypeError: the value is no int or float (a bool is neither).
        ValueError: it is not finite, or `ok` says no.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(message(owner, name, f"a number {condition}", value, fix))
    # An int beyond the largest float is infinite as a factor; math.isfinite would raise OverflowError.
    if not (-LARGEST <= value <= LARGEST and ok(value)):
        raise ValueError(message(owner, name, condition, value, fix))


def check_count(owner: str, name: str, value: Any, least: int, unit: str, fix: str) -> None:
    """Raise unless the value is a whole number of at least `least`.

    Args:
        owner, name, fix: as in `message`.
        value: what came.
        least: smallest value allowed.
        unit: what is counted, for the message.
    Raises:
        TypeError: the value is no int (a bool is none).
        ValueError: it is below `least`.
    """
    condition = f"a whole number of at least {least} ({unit})"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(message(owner, name, condition, value, fix))
    if value < least:
        raise ValueError(message(owner, name, condition, value, fix))


def check_flag(owner: str, name: str, value: Any, fix: str) -> None:
    """Raise unless the value is True or False.

    Args:
        owner, name, fix: as in `message`.
        value: what came.
    Raises:
        TypeError: it is another thing, 0 and 1 among them.
    """
    if not isinstance(value, bool):
        raise TypeError(message(owner, name, "True or False", value, fix))


def check_images(owner: str, images: Tensor) -> None:
    """Raise unless these are images of shape (N, C, H, W).

    Args:
        owner: class or function named in the error.
        images: what came.
    Raises:
        ValueError: another number of dimensions.
    Example:
        >>> import torch
        >>> check_images("Cutout", torch.zeros(2, 1, 8, 8))
    """
    if images.dim() != 4:
        fix = "Add the missing dimension, or leave this transform out"
        raise ValueError(message(owner, "images", "of shape (N, C, H, W)", tuple(images.shape), fix))
