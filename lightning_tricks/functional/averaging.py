"""In-place averaging of lists of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_tricks.functional.checks import check_number


def check_decay(owner: str, decay: float) -> None:
    """Raise unless `decay` is a weight of the old average, in [0, 1).

    Args:
        owner: class or function named in the error.
        decay: what came.
    Raises:
        TypeError: no number.
        ValueError: outside [0, 1).
    Example:
        >>> check_decay("EMA", 0.999)
    """
    fix = "It is the weight of the old average: 0.999 averages over about the last 1,000 steps"
    check_number(owner, "decay", decay, "in [0, 1)", fix, lambda value: 0 <= value < 1)


@torch.no_grad()
def ema_(average: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """Move the average towards the weights, in place, in one foreach call.

        average = decay * average + (1 - decay) * weights

    Args:
        average: floating or complex tensors; changed in place.
        weights: as many tensors of the same shapes and dtypes; read only.
        decay: weight of the old average, in [0, 1).
    Raises:
        TypeError, ValueError: decay is no number in [0, 1).
    References:
        Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; as an exponential average
        Tarvainen and Valpola, "Mean teachers are better role models", 2017, arXiv:1703.01780, section 2.
        Deviates: no debiasing division; what starts the average is the caller's choice.
    Example:
        >>> average = [torch.tensor([1.0])]
        >>> ema_(average, [torch.tensor([2.0])], decay=0.75)
        >>> average
        [tensor([1.2500])]
    """
    check_decay("ema_", decay)
    if average:
        torch._foreach_lerp_(list(average), list(weights), 1 - decay)


@torch.no_grad()
def can_average(tensor: Tensor) -> bool:
    """Whether an average of this tensor means anything: floating or complex, dense and finite throughout.

    Integers (batch counts, masks of indices) have no running mean, and an infinite entry (an attention mask's -inf)
    would turn into NaN.

    Args:
        tensor: any tensor.
    Returns:
        True where it can be averaged; otherwise it is to be copied.
    Example:
        >>> can_average(torch.ones(2)), can_average(torch.tensor(3)), can_average(torch.tensor(-torch.inf))
        (True, False, False)
    """
    number = tensor.is_floating_point() or tensor.is_complex()
    return number and tensor.layout == torch.strided and bool(torch.isfinite(tensor).all())
