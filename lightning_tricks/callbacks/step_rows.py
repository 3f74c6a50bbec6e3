"""The norms of a small model's step: each layer is a row of one kept tensor, so that a step costs few operations."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_ENTRIES = 2**14
"""So many entries of one quantity, with the rows filled up to the longest: beyond, operations are not what costs."""
_NAMES = ("gradient", "clipped", "weight", "update")


class StepRows:
    """Norms of each layer in a step of one optimizer, as `StepSums` has sums of each parameter; without `WeightCopies`.

    Args:
        parameters: what is measured, of which `fit_in_rows` is true.
        layers: the layer of each, None for the total alone.
        wanted: names of sums.
    """

    def __init__(self, parameters: list[Tensor], layers: Sequence[str | None], wanted: set[str]) -> None:
        self.parameters, self.layers = parameters, tuple(dict.fromkeys(layers))
        self.has_gradients = False
        self._scales: dict[str, Tensor | float] = {}
        names = [name for name in _NAMES if name in wanted or (name == "weight" and "update" in wanted)]
        places, width = _places(parameters, layers)
        count = len(self.layers)
        self._rows = torch.zeros(len(names) * count, width, dtype=torch.float64, device="cpu")
        self._row = dict(zip(names, torch.split(self._rows, count), strict=True))
        self._entries = {
            name: [
                rows[row, start : start + p.numel()].view(p.shape)
                for p, (row, start) in zip(parameters, places, strict=True)
            ]
            for name, rows in self._row.items()
        }

    def begin(self) -> None:
        """A step begins, whatever became of the last."""
        self.has_gradients = False
        self._scales.clear()

    def add_gradients(self, scale: Tensor | float = 1.0) -> None:
        """The gradients before clipping.

        Args:
            scale: what they are still multiplied by.
        """
        self.has_gradients = True
        self._add("gradient", self._gradients(), scale)

    def add_before_step(self, scale: Tensor | float = 1.0) -> None:
        """The gradients after clipping, and the weights.

        Args:
            scale: what the gradients are still multiplied by.
        """
        if "clipped" in self._row:
            self._add("clipped", self._gradients(), scale)
        self._add("weight", self.parameters)

    def add_update(self) -> None:
        """What the step added to the weights."""
        self._add("update", self.parameters)

    def _add(self, name: str, tensors: list[Tensor], scale: Tensor | float = 1.0) -> None:
        if name in self._row:
            with torch.no_grad():
                torch._foreach_copy_(self._entries[name], tensors)
            if not isinstance(scale, float) or scale != 1:
                self._scales[name] = scale

    def _gradients(self) -> list[Tensor]:
        gradients = [parameter.grad for parameter in self.parameters]
        for i, gradient in enumerate(gradients):
            if gradient is None:
                gradients[i] = torch.zeros_like(self.parameters[i])
            elif gradient.layout != torch.strided:
                gradients[i] = gradient.to_dense()
        return gradients  # type: ignore[return-value]

    def to_move(self) -> list[Tensor]:
        """What is to be moved to the host: the norms of all rows, one after another."""
        if "update" in self._row:
            self._row["update"].sub_(self._row["weight"])
        norms = torch.linalg.vector_norm(self._rows, dim=1)
        for i, name in enumerate(self._row if self._scales else ()):
            norms[i * len(self.layers) : (i + 1) * len(self.layers)] /= self._scales.get(name, 1.0)
        return [norms]

    def of_each(self, numbers: Iterator[Sequence[float]]) -> dict[str, Sequence[float]]:
        """The norms of each layer by name.

        Args:
            numbers: on the host.
        """
        norms, count = next(numbers), len(self.layers)
        return {name: norms[i * count : (i + 1) * count] for i, name in enumerate(self._row)}


def fit_in_rows(parameters: Sequence[Tensor], layers: Sequence[str | None], wanted: set[str]) -> bool:
    """Whether `StepRows` can measure these, and gains by it.

    Args:
        parameters, layers, wanted: as it takes them.
    Example:
        >>> fit_in_rows([torch.ones(2, 3), torch.ones(3)], ["a", "b"], {"weight"})
        True
    """
    return (
        len(parameters) > 0
        and wanted <= set(_NAMES)
        and all(type(p.data) is Tensor and p.layout == torch.strided for p in parameters)
        and all(p.is_cpu and p.is_floating_point() for p in parameters)
        and len(set(layers)) * _places(parameters, layers)[1] <= _ENTRIES
    )


def _places(parameters: Sequence[Tensor], layers: Sequence[str | None]) -> tuple[list[tuple[int, int]], int]:
    """Row and first column of each parameter, and the number of columns."""
    rows = {layer: row for row, layer in enumerate(dict.fromkeys(layers))}
    lengths, places = [0] * len(rows), []
    for parameter, layer in zip(parameters, layers, strict=True):
        places.append((rows[layer], lengths[rows[layer]]))
        lengths[rows[layer]] += parameter.numel()
    return places, max(lengths, default=0)
