"""Whether a module trains or is evaluated, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval(module: nn.Module) -> Iterator[None]:
    """Have every part of a module in eval mode, and each in its own mode again afterwards, also after an exception.

    A module's own `train()` is not called: it may keep some parts as they are.

    Args:
        module: any.
    Example:
        >>> layer = nn.Dropout()
        >>> with in_eval(layer):
        ...     layer.training
        False
        >>> layer.training
        True
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, training in modes:
            part.training = training
