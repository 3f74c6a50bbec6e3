"""What is added up over each parameter in one real step of an optimizer, and what is made of it for each layer."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from operator import truediv
from typing import Any, Literal

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


def _ratio(update: float, weight: float) -> float:
    return update if update == 0 else update / weight if weight else math.inf * update


def _cosine(product: float, update: float, last: float) -> float:
    lengths = update * last
    return product / lengths if lengths else 0.0


_FORMULAS: dict[str, tuple[tuple[str, ...], Callable[..., float] | None]] = {
    "grad_norm": (("gradient",), None),
    "grad_norm_clipped": (("clipped",), None),
    "weight_norm": (("weight",), None),
    "update_norm": (("update",), None),
    "update_ratio": (("update", "weight"), _ratio),
    "grad_zeros": (("zeros", "size"), truediv),
    "grad_nonfinite": (("nonfinite",), None),
    "update_cosine": (("product", "update", "last"), _cosine),
    "noise_scale": (("gradient",), None),
}
"""What each measure of a layer is made of, and how: of norms, counts and products over its parameters."""

SUMS: dict[str, set[str]] = {measure: set(names) for measure, (names, _) in _FORMULAS.items()}
"""The sums that each measure needs."""

_NORMS = {"gradient", "clipped", "weight", "update", "last"}
"""Roots of sums of squares; the others are sums."""


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
        return len(own) == len(self.tensors) and all(
            copy.is_same_size(tensor) and copy.dtype == _wide(tensor.dtype) and copy.get_device() == tensor.get_device()
            for copy, tensor in zip(self.tensors, own, strict=True)
        )

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
        self.copies: WeightCopies | None = None  # of the weights whose update is measured, once they are taken
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

    def add_before_step(self, scale: Tensor | float = 1.0) -> None:
        """The gradients after clipping, and the weights.

        Args:
            scale: what the gradients are still multiplied by.
        """
        if "clipped" in self.wanted:
            self.sums["clipped"] = _unscaled(tensor_norms(self._gradients()), scale)
        if "weight" in self.wanted:
            if self.copies is not None and self.copies.is_of(self.parameters):
                self.sums["weight"] = self.copies.norms
            else:
                self.sums["weight"] = tensor_norms(self.parameters)

    def add_update(self, last: WeightCopies | None = None) -> None:
        """What the step added to the weights, which its copies now are, and how it lies to the step before.

        Args:
            last: the update before, if it is known.
        """
        if self.copies is None:
            return
        self.sums["update"] = self.copies.norms
        if last is not None and last.is_of(self.copies.parameters):
            self.sums["last"] = last.norms
            self.sums["product"] = inner_products(self.copies.whole(), last.whole())

    def _gradients(self) -> list[Tensor]:
        return [p.new_zeros(1) if p.grad is None else p.grad for p in self.parameters]

    def to_move(self) -> list[Tensor]:
        """What is to be moved to the host."""
        return list(self.sums.values())

    def of_each(self, numbers: Iterator[list[float]]) -> dict[str, Sequence[float | None]]:
        """The sums of each parameter by name, None where one is not known, and their `size` where that is wanted.

        Args:
            numbers: of `to_move`, on the host.
        """
        each: dict[str, Sequence[float | None]] = {name: next(numbers) for name in self.sums}
        if len(self.updated) < len(self.parameters):
            for name in each.keys() & {"update", "last", "product"}:
                known = dict(zip(self.updated, each[name], strict=True))
                each[name] = [known.get(i) for i in range(len(self.parameters))]
        if "zeros" in each:
            each["size"] = sizes = [parameter.numel() for parameter in self.parameters]
            missing = set(self.without_gradient)
            each["zeros"] = [sizes[i] if i in missing else count for i, count in enumerate(each["zeros"])]
        return each


def _unscaled(norms: Tensor, scale: Tensor | float) -> Tensor:
    return norms if isinstance(scale, float) and scale == 1 else norms / scale


def to_host(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Lists of numbers on the device as lists on the host, in one transfer.

    Args:
        tensors: one-dimensional, float64.
    """
    if len(tensors) < 2:
        return [tensor.tolist() for tensor in tensors]
    numbers = torch.cat([tensor.to(tensors[0].device) for tensor in tensors]).tolist()
    lengths = [tensor.numel() for tensor in tensors]
    return [numbers[end - length : end] for length, end in zip(lengths, accumulate(lengths), strict=True)]


def joined(steps: Sequence[Mapping[str, Sequence[float | None]]]) -> Mapping[str, Sequence[float | None]]:
    """The sums of several optimizers one after another, None where one of them has none of a name.

    Args:
        steps: of each its sums by name.
    Example:
        >>> joined([{"weight": [9.0], "last": [1.0]}, {"weight": [16.0]}])
        {'weight': [9.0, 16.0], 'last': [1.0, None]}
    """
    if len(steps) == 1:
        return steps[0]
    result: dict[str, list[float | None]] = {
        name: [] for name in dict.fromkeys(name for sums in steps for name in sums)
    }
    for sums in steps:
        missing = [None] * max(map(len, sums.values()))
        for name, values in result.items():
            values += sums.get(name, missing)
    return result


def layer_values(
    layers: Sequence[str | None], sums: Mapping[str, Sequence[float | None]], measures: Sequence[str]
) -> dict[str, float]:
    """The measures of every layer and in total, by their keys.

        grad_norm/head = sqrt(sum(sums["gradient"][i] ** 2 for the parameters i of head))

    Args:
        layers: of every parameter its layer, None for the total alone.
        sums: of every parameter its norms, counts and products, by name; None where one is not known.
        measures: names out of `SUMS`.
    Returns:
        `measure/layer` and `measure/total`; where a parameter lacks a sum, its layer and the total lack the measure.
    Example:
        >>> layer_values(["a", "b"], {"weight": [3.0, 4.0]}, ["weight_norm"])
        {'weight_norm/a': 3.0, 'weight_norm/b': 4.0, 'weight_norm/total': 5.0}
    """
    groups, keys = _groups_and_keys(tuple(layers), tuple(measures))
    added = {name: _added(name, values, groups) for name, values in sums.items()}
    result: dict[str, float] = {}
    for measure, its_keys in keys.items():
        names, formula = _FORMULAS[measure]
        if not added.keys() >= SUMS[measure]:
            continue
        values = added[names[0]]
        if formula is not None:
            rows = zip(*[added[name] for name in names], strict=True)
            values = [None if None in terms else formula(*terms) for terms in rows]
        for key, value in zip(its_keys, values, strict=True):
            if value is not None:
                result[key] = value
    return result


@lru_cache(maxsize=8)
def _groups_and_keys(
    layers: tuple[str | None, ...], measures: tuple[str, ...]
) -> tuple[list[list[int]], dict[str, list[str]]]:
    """The numbers of each layer's parameters, and of each measure the keys of all layers and the total."""
    members: dict[str | None, list[int]] = {}
    for i, layer in enumerate(layers):
        members.setdefault(layer, []).append(i)
    members.pop(None, None)
    named = [measure for measure in measures if measure != "noise_scale"]
    keys = {measure: [f"{measure}/{layer}" for layer in (*members, "total")] for measure in named}
    return list(members.values()), keys


def _added(name: str, values: Sequence[Any], groups: Sequence[Sequence[int]]) -> list[float | None]:
    """Of each group and of all; None where one of them is not known."""
    add: Callable[[Iterable[float]], float] = _norm if name in _NORMS else sum
    if None in values:
        chosen = [[values[i] for i in group] for group in groups]
        return [None if None in group else add(group) for group in [*chosen, values]]
    if len(groups) == len(values):
        return [*values, add(values)]
    return [*[add([values[i] for i in group]) for group in groups], add(values)]


def _norm(values: Iterable[float]) -> float:
    return math.sqrt(sum([value * value for value in values]))  # math.hypot gives inf of inf and nan
