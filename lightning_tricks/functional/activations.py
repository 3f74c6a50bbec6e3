"""Mean, spread, zeros and saturation of what layers put out, as sums that add up over calls, batches and ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.distributed.tensor import DTensor

from lightning_tricks.functional.norms import tensor_norms

MARGIN = 0.01  # share of a bounded activation's range, at either end, that counts as saturated
BOUNDS: dict[type[nn.Module], tuple[float, float]] = {
    nn.Tanh: (-1.0, 1.0),
    nn.Sigmoid: (0.0, 1.0),
    nn.Hardsigmoid: (0.0, 1.0),
    nn.Softsign: (-1.0, 1.0),
}


def bounds(layer: nn.Module) -> tuple[float, float] | None:
    """The range of a bounded activation function; None of other layers.

    Args:
        layer: Tanh, Sigmoid, Hardtanh (ReLU6 is one), Hardsigmoid, Softsign, or any other.
    Returns:
        Lowest and highest value that it can put out.
    Example:
        >>> bounds(torch.nn.Tanh()), bounds(torch.nn.ReLU6()), bounds(torch.nn.ReLU())
        ((-1.0, 1.0), (0.0, 6.0), None)
    """
    if isinstance(layer, nn.Hardtanh):
        return float(layer.min_val), float(layer.max_val)
    return next((ends for kind, ends in BOUNDS.items() if isinstance(layer, kind)), None)


@torch.no_grad()
def sums(values: Tensor, ends: tuple[float, float] | None = None) -> Tensor:
    """Sums of which `statistics` makes a distribution's; those of a union are their sum.

        [count, sum(values), sum(values ** 2), count(values == 0), count(values within 1 % of the range of an end)]

    Args:
        values: floating, of any shape; half precision is summed in float32.
        ends: lowest and highest possible value, where there are such; the last sum is 0 without.
    Returns:
        (5,) float64 on their device (of Apple's GPUs, which have no float64, float32); nothing goes to the host.
    Example:
        >>> sums(torch.tensor([0.0, 0.0, 2.0, 2.0]), ends=(0.0, 6.0)).tolist()
        [4.0, 4.0, 8.0, 2.0, 2.0]
    """
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    count = values.numel()
    if count == 0:
        return torch.zeros(5, dtype=wide, device=values.device)
    values = values.detach()
    values = values if values.dtype == torch.float64 else values.float()
    mean = values.mean()
    centred = values - mean  # torch.var is eight times slower on a CPU
    spread = torch.linalg.vector_norm(centred) if wide == torch.float32 else tensor_norms([centred])[0]
    mean = mean.to(wide)
    nonzero = torch.count_nonzero(values)
    saturated = torch.zeros_like(nonzero)
    if ends is not None:
        low, high = ends
        margin = MARGIN * (high - low)
        saturated = torch.count_nonzero((values <= low + margin) | (values >= high - margin))
    total = torch.full_like(mean, count)
    return torch.stack(
        [total, count * mean, spread.square() + count * mean.square(), (count - nonzero).to(wide), saturated.to(wide)]
    )


def statistics(total: Tensor) -> Tensor:
    """What sums say of the distribution they are of.

        mean = sum / count;  std = sqrt(sum of squares / count - mean ** 2);  shares = counts / count

    Args:
        total: (..., 5) as `sums` makes them, or sums of those.
    Returns:
        (..., 4) mean, standard deviation (of the values themselves, not an estimate of a larger set's), share of zeros
        and share of saturated values; NaN where there was nothing.
    Example:
        >>> statistics(sums(torch.tensor([0.0, 2.0])) + sums(torch.tensor([4.0, 2.0])))
        tensor([2.0000, 1.4142, 0.2500, 0.0000], dtype=torch.float64)
    """
    count, first, second, zeros, saturated = total.unbind(-1)
    mean = first / count
    std = (second / count - mean.square()).clamp_min(0.0).sqrt()
    return torch.stack([mean, std, zeros / count, saturated / count], -1)


def first_tensor(values: Any) -> Tensor | None:
    """The first dense tensor of floating numbers in what a layer takes or puts out; none inside a torch.func transform.

    Args:
        values: a tensor, or tuples, lists and mappings around it, searched in their order.
    Returns:
        The tensor itself, None where there is none.
    Example:
        >>> first_tensor((torch.tensor([1]), {"hidden": torch.tensor([0.5])}))
        tensor([0.5000])
    """
    if isinstance(values, Tensor):
        dense = values.layout == torch.strided and not values.is_nested and not is_functorch_wrapped_tensor(values)
        return values if dense and values.is_floating_point() else None
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, (tuple, list)):
        return next((found for found in map(first_tensor, values) if found is not None), None)
    return None


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which each rank may have a part (DTensor), for all ranks to call.

    Args:
        tensor: any.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
