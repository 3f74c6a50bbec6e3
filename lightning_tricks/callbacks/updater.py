"""What one update of averages goes through: laid out once, used at every step."""

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_tricks.callbacks.shards import own_part
from lightning_tricks.functional.averaging import pieces


class Updater:
    """Moves averages towards weights, tensor beside tensor.

        average = decay * average + (1 - decay) * weights

    Weights on another device than their average (the host) are fetched without waiting for them: they are copied into
    pinned memory, and the average follows at the next update or at `settle`, whichever comes first.

    Args:
        averages: of each average its tensors.
        weights: as many tensors of the same shapes, as the module has them; of sharded ones this rank's part counts.
    """

    def __init__(self, averages: Sequence[Sequence[Tensor]], weights: Sequence[Tensor]) -> None:
        self._weights = list(weights)
        self._sharded = any(isinstance(weight, DTensor) for weight in weights)
        self._addresses = self._addresses_of(weights)
        self._fetched: list[tuple[Tensor, Tensor]] = []  # (on the host, weight)
        self._arrived: torch.cuda.Event | None = None
        self._due: Sequence[float] = ()
        here = []
        for first, weight in zip(averages[0], weights, strict=True):
            part = own_part(weight).detach()  # so that no update asks for gradients
            if first.device != part.device:
                host = torch.empty_like(part, device="cpu", pin_memory=part.is_cuda)
                self._fetched.append((host, part))
                part = host
            here.append(part)
        self._lists = []
        for average in averages:
            pairs = list(zip(average, here, strict=True))
            alike = [pair for pair in pairs if pair[0].dtype == pair[1].dtype]
            unlike = [pair for pair in pairs if pair[0].dtype != pair[1].dtype]
            self._lists.append((pieces([a for a, _ in alike], [w for _, w in alike]), unlike))

    def fits(self, weights: Sequence[Tensor | None]) -> bool:
        """Whether these are the weights that it was made for, where they were.

        Args:
            weights: as the module has them now; None for one that was taken away.
        """
        same = len(weights) == len(self._weights) and all(map(is_, weights, self._weights))
        return same and self._addresses_of(self._weights) == self._addresses

    def _addresses_of(self, weights: Sequence[Tensor]) -> list[int]:
        if self._sharded:
            weights = [own_part(weight) for weight in weights]
        return [weight.data_ptr() for weight in weights]

    def update(self, decays: Sequence[float]) -> None:
        """Update every average.

        Args:
            decays: for each the weight of the old average, in [0, 1).
        """
        if not self._fetched:
            self._move(decays)
            return
        self.settle()
        self._due = decays
        for host, weight in self._fetched:
            host.copy_(weight, non_blocking=True)
        if any(weight.is_cuda for _, weight in self._fetched):
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def settle(self) -> None:
        """Do what is left of the last update."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        if self._due:
            self._move(self._due)
            self._due = ()

    def _move(self, decays: Sequence[float]) -> None:
        for ((average, weights), unlike), decay in zip(self._lists, decays, strict=True):
            if average:
                torch._foreach_lerp_(average, weights, 1 - decay)
            for one, weight in unlike:  # one converted at a time
                one.lerp_(weight.to(one.dtype), 1 - decay)
