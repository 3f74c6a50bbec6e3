"""What is added up over each parameter in one real step of an optimizer, and what is made of it for each layer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_tricks.callbacks.shards import as_part_of, own_part
from lightning_tricks.functional.norms import inner_products, nonfinite_counts, norms_after, tensor_norms, zero_counts

Measure = Literal[
    "grad_norm",
    "grad_norm_clipped",
    "weight_norm",
    "update_norm",
    "update_ratio",
    "grad_zeros",
    "grad_nonfinite",
    "update_cosine",
    "noise_scale",
]

SUMS: dict[str, set[str]] = {
    "grad_norm": {"gradient"},
    "grad_norm_clipped": {"clipped"},
    "weight_norm": {"weight"},
    "update_norm": {"update"},
    "update_ratio": {"weight", "update"},
    "grad_zeros": {"zeros"},
    "grad_nonfinite": {"nonfinite"},
    "update_cosine": {"update", "last", "product"},
    "noise_scale": {"gradient"},
}
"""The sums that each measure is made of: of squares, of counts, of products."""

_SQUARES = {"gradient", "clipped", "weight", "update", "last"}
"""Sums of squares; on the device they are norms."""


class WeightCopies:
    """Copies of weights from before a step, which become its update; their storage is kept and used again."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.parameters: list[Tensor] = []
        self.norms = torch.zeros(0)
        """(len(parameters),) of what the copies hold now; of parts the norms of the whole."""

    def take(self, parameters: Sequence[Tensor]) -> None:
        """Copy these parameters, of each rank its part; half precision in float32, which holds the difference.

        Args:
            parameters: all of one optimizer, or some.
        """
        own = [own_part(parameter) for parameter in parameters]
        if not self._fits(own):
            self.tensors = []  # freed before there are others
            self.tensors = [torch.empty_like(tensor, dtype=_wide(tensor.dtype)) for tensor in own]
        self.parameters = list(parameters)
        self.norms = norms_after(torch._foreach_copy_, self.tensors, self.parameters)

    def _fits(self, own: list[Tensor]) -> bool:
        kept = [(tensor.shape, tensor.device, tensor.dtype) for tensor in self.tensors]
        return kept == [(tensor.shape, tensor.device, _wide(tensor.dtype)) for tensor in own]

    def subtract(self) -> None:
        """Take the parameters' values of now from the copies: what remains is the update with another sign."""
        self.norms = norms_after(torch._foreach_sub_, self.tensors, self.parameters)

    def whole(self) -> list[Tensor]:
        """The copies, sharded as the parameters are."""
        pairs = zip(self.tensors, self.parameters, strict=True)
        return [as_part_of(tensor, parameter) for tensor, parameter in pairs]

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these parameters are the copied ones."""
        return [id(parameter) for parameter in parameters] == [id(parameter) for parameter in self.parameters]


def bytes_of_copy(parameter: Tensor) -> int:
    """Bytes that a copy takes on one rank: the same number on all ranks, of parts the largest.

    Args:
        parameter: any.
    """
    shape = list(parameter.shape)
    if isinstance(parameter, DTensor):
        for dim, placement in enumerate(parameter.placements):
            if placement.is_shard():
                shape[placement.dim] = math.ceil(shape[placement.dim] / parameter.device_mesh.size(dim))
    return math.prod(shape) * torch.empty(0, dtype=_wide(parameter.dtype)).element_size()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class StepSums:
    """Sums over each parameter in a step of one optimizer; on the device until `to_host` moves them.

    Args:
        parameters: what is measured.
        layers: the layer of each, None for the total alone.
        wanted: names of sums, out of `SUMS`.
        updated: numbers of the parameters whose update is measured, None for all.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        layers: Sequence[str | None],
        wanted: set[str],
        updated: Sequence[int] | None = None,
    ) -> None:
        self.parameters, self.layers, self.wanted = parameters, layers, wanted
        self.updated = range(len(parameters)) if updated is None else updated
        self.sums: dict[str, Tensor] = {}
        self.has_gradients = False
        self.without_gradient: list[int] = []

    def add_gradients(self, scale: Tensor | float = 1.0) -> None:
        """The gradients before clipping.

        Args:
            scale: what they are still multiplied by.
        """
        self.has_gradients = True
        self.without_gradient = [i for i, parameter in enumerate(self.parameters) if parameter.grad is None]
        gradients = self._gradients()
        if "gradient" in self.wanted:
            self.sums["gradient"] = _unscaled(tensor_norms(gradients), scale)
        if "zeros" in self.wanted:
            self.sums["zeros"] = zero_counts(gradients)
        if "nonfinite" in self.wanted:
            self.sums["nonfinite"] = nonfinite_counts(gradients)

    def add_before_step(self, scale: Tensor | float = 1.0, copies: WeightCopies | None = None) -> None:
        """The gradients after clipping, and the weights.

        Args:
            scale: what the gradients are still multiplied by.
            copies: of the weights, those whose update is measured.
        """
        if "clipped" in self.wanted:
            self.sums["clipped"] = _unscaled(tensor_norms(self._gradients()), scale)
        if "weight" in self.wanted:
            if copies is not None and copies.is_of(self.parameters):
                self.sums["weight"] = copies.norms
            else:
                self.sums["weight"] = tensor_norms(self.parameters)

    def add_update(self, copies: WeightCopies, last: WeightCopies | None) -> None:
        """What the step added to the weights, and how it lies to the step before.

        Args:
            copies: the update.
            last: the one before, if it is known.
        """
        self.sums["update"] = copies.norms
        if last is not None and last.is_of(copies.parameters):
            self.sums["last"] = last.norms
            self.sums["product"] = inner_products(copies.whole(), last.whole())

    def _gradients(self) -> list[Tensor]:
        return [p.new_zeros(1) if p.grad is None else p.grad for p in self.parameters]

    def of_each(self, sums: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
        """The sums parameter by parameter, those that it has, and its `size`.

        Args:
            sums: by name, on the host.
        """
        each: list[dict[str, float]] = [{"size": parameter.numel()} for parameter in self.parameters]
        for name, values in sums.items():
            places = self.updated if name in ("update", "last", "product") else range(len(self.parameters))
            for i, value in zip(places, values, strict=True):
                each[i][name] = value * value if name in _SQUARES else value
        if "zeros" in sums:
            for i in self.without_gradient:
                each[i]["zeros"] = each[i]["size"]
        return each


def _unscaled(norms: Tensor, scale: Tensor | float) -> Tensor:
    return norms if isinstance(scale, float) and scale == 1 else norms / scale


def to_host(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Lists of numbers on the device as lists on the host, in one transfer.

    Args:
        tensors: one-dimensional, float64.
    """
    if not tensors:
        return []
    numbers = torch.cat([tensor.to(tensors[0].device) for tensor in tensors]).tolist()
    lengths = [tensor.numel() for tensor in tensors]
    return [numbers[end - length : end] for length, end in zip(lengths, accumulate(lengths), strict=True)]


def layer_values(each: Iterable[tuple[str | None, Mapping[str, float]]], measures: Sequence[str]) -> dict[str, float]:
    """The measures of every layer and in total, by their keys.

        grad_norm/head = sqrt(sum(row["gradient"] for the parameters of head))

    Args:
        each: of every parameter its layer, None for the total alone, and its sums.
        measures: names out of `SUMS`.
    Returns:
        `measure/layer` and `measure/total`; where a parameter lacks a sum, its layer and the total lack the measure.
    Example:
        >>> layer_values([("a", {"weight": 9.0}), ("b", {"weight": 16.0})], ["weight_norm"])
        {'weight_norm/a': 3.0, 'weight_norm/b': 4.0, 'weight_norm/total': 5.0}
    """
    sums: dict[str | None, dict[str, float]] = {}
    for layer, row in each:
        sums[layer] = _added(sums[layer], row) if layer in sums else dict(row)
    total = reduce(_added, sums.values())
    sums.pop(None, None)
    sums["total"] = total
    return {
        f"{measure}/{layer}": _value(measure, row)
        for measure in measures
        if measure != "noise_scale"
        for layer, row in sums.items()
        if row.keys() >= SUMS[measure]
    }


def _added(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: value + other[name] for name, value in one.items() if name in other}


def _value(measure: str, sums: Mapping[str, float]) -> float:
    if measure == "update_ratio":
        update, weight = math.sqrt(sums["update"]), math.sqrt(sums["weight"])
        return update if update == 0 else update / weight if weight else math.inf * update
    if measure == "update_cosine":
        lengths = math.sqrt(sums["update"]) * math.sqrt(sums["last"])
        return sums["product"] / lengths if lengths else 0.0
    if measure == "grad_zeros":
        return sums["zeros"] / sums["size"]
    (name,) = SUMS[measure]
    return sums[name] if measure == "grad_nonfinite" else math.sqrt(sums[name])
