"""Batch-norm statistics of a whole set of data, as another set of weights makes them."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_tricks.functional.checks import message
from lightning_tricks.functional.modes import in_eval

Batch = TypeVar("Batch")


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and squared deviations of each channel, of which those of a union can be made exactly.

        mean = sum(values) / count;  m2 = sum((values - mean) ** 2)

    Args:
        count: numbers in each channel, at least 0.
        mean: (C,) float64.
        m2: (C,) float64.
        batches: batches that they come from.
    """

    count: int
    mean: Tensor
    m2: Tensor
    batches: int = 1


def channel_moments(values: Tensor) -> Moments:
    """Moments of each channel over all other dimensions, in float64.

    Args:
        values: (N, C) or (N, C, ...) floating; N may be 0.
    Returns:
        Moments on its device (of Apple's GPUs, which have no float64, on the CPU).
    Example:
        >>> moments = channel_moments(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        >>> moments.count, moments.mean.tolist(), moments.m2.tolist()
        (2, [2.0, 5.0], [2.0, 0.0])
    """
    count = values.numel() // values.shape[1]
    wide = _double(values.detach())
    others = [dim for dim in range(wide.dim()) if dim != 1]
    mean = wide.sum(others, keepdim=True) / max(count, 1)
    return Moments(count, mean.flatten(), (wide - mean).square_().sum(others))


def merge(first: Moments, *others: Moments) -> Moments:
    """Moments of a union of disjoint sets, the same whatever the split but for float64 rounding.

        mean = mean_a + (mean_b - mean_a) * count_b / count
        m2 = m2_a + m2_b + (mean_b - mean_a) ** 2 * count_a * count_b / count

    Args:
        first, others: moments of the same channels, on one device; merged in this order.
    Returns:
        New moments, without a transfer to the host.
    References:
        Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983, equations 2.1.
    Example:
        >>> union = merge(*(channel_moments(torch.tensor([[value]])) for value in (1.0, 3.0)))
        >>> union.count, union.mean.tolist(), union.m2.tolist(), union.batches
        (2, [2.0], [2.0], 2)
    """
    return reduce(_merge_two, others, first)


def _merge_two(a: Moments, b: Moments) -> Moments:
    count = a.count + b.count
    share = b.count / max(count, 1)
    delta = b.mean - a.mean
    return Moments(
        count, a.mean + delta * share, a.m2 + b.m2 + delta.square() * (a.count * share), a.batches + b.batches
    )


@torch.no_grad()
def population_statistics(
    owner: str,
    module: nn.Module,
    layers: Mapping[str, _BatchNorm],
    batches: Iterable[Batch],
    forward: Callable[[Batch], Any],
) -> dict[str, Moments]:
    """Moments of what goes into batch-norm layers, over all batches.

    The module is in eval mode meanwhile, so that nothing is random and nothing else of it moves; only the given layers
    normalise with the statistics of the batch, as in training. A compiled module runs as it was written.

    Args:
        owner: class or function named in an error.
        module: the module, which is left as it was, also by an exception.
        layers: some of its layers by name, each with running statistics.
        batches: what `forward` takes, one at a time.
        forward: runs the module on a batch; what it returns is not looked at.
    Returns:
        Moments by name, on the layers' devices; those of a layer that was not reached have a count of 0.
    Raises:
        ValueError: a batch with one number per channel, which cannot be normalised by its own statistics.
    References:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018, arXiv:1803.05407,
        section 3.2; torch.optim.swa_utils.update_bn.
        Deviates: the variance is that of the whole set, not the mean of the batches' variances. SyncBatchNorm
        normalises with the statistics of its own rank's batch.
    """
    found = {name: _nothing(layer) for name, layer in layers.items()}

    def collect(name: str, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        part = channel_moments(args[0] if args else kwargs["input"])
        if part.count == 1:
            fix = "Let the loader drop the last, smaller batch (drop_last=True)"
            raise ValueError(message(owner, f"inputs of {name}", "at least 2 per channel in a batch", 1, fix))
        found[name] = merge(found[name], part)
        if part.count:
            _assign_(layer, part.mean, part.m2 / part.count)  # in eval mode a layer normalises with these

    with ExitStack() as undo:
        undo.enter_context(in_eval(module))
        for name, layer in layers.items():
            undo.callback(_assign_, layer, layer.running_mean.clone(), layer.running_var.clone())  # type: ignore[union-attr]
            hook = layer.register_forward_pre_hook(partial(collect, name), with_kwargs=True)
            undo.callback(hook.remove)
        undo.enter_context(torch.compiler.set_stance("force_eager"))  # a compiled forward does not see new hooks
        for batch in batches:
            forward(batch)
    return found


@torch.no_grad()
def write_statistics_(owner: str, layers: Mapping[str, _BatchNorm], moments: Mapping[str, Moments]) -> None:
    """Make moments the running statistics of layers, in place; of all of them or of none.

        running_mean = mean;  running_var = m2 / (count - 1);  num_batches_tracked = batches

    Args:
        owner: class or function named in an error.
        layers: batch-norm layers by name, each with running statistics.
        moments: of their inputs, by the same names.
    Raises:
        ValueError: a layer without inputs, with one per channel, or with statistics that are not finite.
    """
    values = {}
    for name, layer in layers.items():
        found = moments[name]
        if found.count < 2:
            fix = "Let forward run the layer on every batch, or freeze it in training with eval()"
            raise ValueError(message(owner, f"inputs of {name}", "at least 2 per channel", found.count, fix))
        mean = found.mean.to(layer.running_mean)
        var = (found.m2 / (found.count - 1)).to(layer.running_var)
        if not (mean.isfinite().all() and var.isfinite().all()):
            fix = "Look for infinite or NaN data and weights"
            raise ValueError(message(owner, f"statistics of {name}", "finite", "inf or NaN", fix))
        values[name] = (mean, var)
    for name, layer in layers.items():
        _assign_(layer, *values[name])
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(moments[name].batches)


def _assign_(layer: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)


def _nothing(layer: _BatchNorm) -> Moments:
    assert layer.running_mean is not None
    zeros = _double(torch.zeros_like(layer.running_mean))
    return Moments(0, zeros, zeros, batches=0)


def _double(tensor: Tensor) -> Tensor:
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
