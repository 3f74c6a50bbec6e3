"""The one form of error message, and the checks of plain numbers that every constructor needs."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST = sys.float_info.max
ROUNDING = 1e-6
"""What a resized image may leave [0, 1] by: the weights of its pixels add up to 1 in float32."""


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


def check_labels(
    owner: str, labels: Tensor | None, images: Tensor, fix: str = "Give those of the same batch, or None"
) -> None:
    """Raise unless there is a label for each image, or none at all.

    Args:
        owner: class or function named in the error.
        labels: (N, ...) or None.
        images: (N, ...).
        fix: as in `message`.
    Raises:
        ValueError: another number of labels.
    Example:
        >>> import torch
        >>> check_labels("Mixup", torch.arange(2), torch.zeros(2, 1, 8, 8))
    """
    if labels is not None and (labels.dim() == 0 or len(labels) != len(images)):
        got = f"{tuple(labels.shape)} for images {tuple(images.shape)}"
        raise ValueError(message(owner, "labels", "one for each image", got, fix))


def check_unit(owner: str, images: Tensor) -> None:
    """Raise unless floating images lie in [0, 1], apart from the rounding of a resize.

    The values are looked at on a CPU only: on another device that would wait for it.

    Args:
        owner: class or function named in the error.
        images: of any shape and dtype.
    Raises:
        ValueError: values outside, as normalised images have.
    Example:
        >>> import torch
        >>> check_unit("RandAugment", torch.rand(2, 1, 8, 8))
    """
    if not (images.is_floating_point() and images.device.type == "cpu" and images.numel()):
        return
    low, high = (value.item() for value in torch.aminmax(images.detach()))
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        fix = "Normalise after this transform, not before it"
        raise ValueError(message(owner, "images", "in [0, 1]", f"{low} to {high}", fix))


def tuples(value: Any, *names: str) -> None:
    """Turn the lists in fields of a frozen dataclass, as a YAML file gives them, into tuples: it is a value.

    Args:
        value: a frozen dataclass, which is changed.
        names: fields; those that hold no list stay.
    """
    for name in names:
        held = getattr(value, name)
        if isinstance(held, (list, tuple)):
            held = tuple(tuple(part) if isinstance(part, list) else part for part in held)
            object.__setattr__(value, name, held)


def check_numbers(
    owner: str,
    name: str,
    value: Any,
    count: int | None,
    condition: str,
    fix: str,
    ok: Callable[[Sequence[float]], bool] = lambda numbers: True,
) -> None:
    """Raise unless the value is a tuple or list of finite numbers that satisfy their condition.

    Args:
        owner, name, condition, fix: as in `message`.
        value: what came.
        count: how many there must be; None takes any but none at all.
        ok: whether the condition holds; only asked of finite numbers.
    Raises:
        TypeError: another thing, or another number of numbers.
        ValueError: they are not finite, or `ok` says no.
    Example:
        >>> check_numbers("Normalize", "mean", (0.5, 0.4), None, "one number for each channel", "Give one for each")
    """
    numbers = isinstance(value, (tuple, list)) and len(value) > 0 and count in (None, len(value))
    if not numbers or any(isinstance(number, bool) or not isinstance(number, (int, float)) for number in value):
        raise TypeError(message(owner, name, condition, value, fix))
    if not (all(-LARGEST <= number <= LARGEST for number in value) and ok(value)):
        raise ValueError(message(owner, name, condition, value, fix))


def holds(dtype: torch.dtype, value: float) -> bool:
    """Whether a tensor of a dtype can hold a value as it is.

    Args:
        dtype: dtype of the tensor.
        value: any number; floating tensors hold it rounded.
    Returns:
        False for a number out of range, and for a fraction in integers or booleans.
    Example:
        >>> import torch
        >>> holds(torch.uint8, -100), holds(torch.int64, -100), holds(torch.float32, 0.5)
        (False, True, True)
    """
    if dtype.is_floating_point or dtype.is_complex:
        return not math.isfinite(value) or abs(value) <= torch.finfo(dtype).max
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return float(value).is_integer() and low <= value <= high


def check_channels(owner: str, images: Tensor, channels: int) -> None:
    """Raise unless these are images of so many channels, or of none: those stand for labels.

    Args:
        owner: class or function named in the error.
        images: what came.
        channels: channels that they must have.
    Raises:
        ValueError: another number of dimensions or channels.
    Example:
        >>> import torch
        >>> check_channels("Normalize", torch.zeros(2, 3, 8, 8), 3)
    """
    check_images(owner, images)
    if images.shape[1] not in (0, channels):
        fix = "Leave it out for images of other colours, or give it what belongs to theirs"
        raise ValueError(message(owner, "images", f"of {channels} channels (N, C, H, W)", tuple(images.shape), fix))


def check_strength(
    owner: str, strength: Any, condition: str = "above 0", ok: Callable[[float], bool] = lambda value: True
) -> None:
    """Raise unless the value is what a transform may be scaled by.

    Args:
        owner: class named in the error.
        strength: what came.
        condition: what it must be.
        ok: whether the rest of the condition holds; only asked of a number above 0.
    Raises:
        TypeError, ValueError: it is no number above 0, or `ok` says no.
    Example:
        >>> check_strength("Mixup", 0.5)
    """
    fix = f"Leave {owner} out at 0, and let 1 be the transform as it is"
    check_number(owner, "strength", strength, condition, fix, lambda value: value > 0 and ok(value))
