"""What one update of averages goes through: laid out once, used at every step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_tricks.functional.averaging import ema_, pieces


class Updater:
    """Moves averages towards weights, tensor beside tensor.

    Weights on another device than their average (the host) are fetched without waiting for them: they are copied into
    pinned memory, and the average follows at the next update or at `settle`, whichever comes first.

    Args:
        averages: of each average its tensors.
        weights: as many tensors of the same shapes.
    """

    def __init__(self, averages: Sequence[Sequence[Tensor]], weights: Sequence[Tensor]) -> None:
        self.pointers = [weight.data_ptr() for weight in weights]
        self._fetched: list[tuple[Tensor, Tensor]] = []  # (on the host, weight)
        self._arrived: torch.cuda.Event | None = None
        self._due: Sequence[float] = ()
        here = []
        for first, weight in zip(averages[0], weights, strict=True):
            if first.device != weight.device:
                host = torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda)
                self._fetched.append((host, weight))
                weight = host
            here.append(weight)
        self._lists = []
        for average in averages:
            pairs = list(zip(average, here, strict=True))
            alike = [pair for pair in pairs if pair[0].dtype == pair[1].dtype]
            unlike = [pair for pair in pairs if pair[0].dtype != pair[1].dtype]
            self._lists.append((pieces([a for a, _ in alike], [w for _, w in alike]), unlike))

    @torch.no_grad()
    def update(self, decays: Sequence[float]) -> None:
        """Update every average.

        Args:
            decays: for each the weight of the old average, in [0, 1).
        """
        self.settle()
        self._due = decays
        for host, weight in self._fetched:
            host.copy_(weight, non_blocking=True)
        if not self._fetched:
            self.settle()
        elif any(weight.is_cuda for _, weight in self._fetched):
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    @torch.no_grad()
    def settle(self) -> None:
        """Do what is left of the last update."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        for ((average, weights), unlike), decay in zip(self._lists, self._due, strict=False):
            ema_(average, weights, decay)
            for one, weight in unlike:  # one converted at a time
                ema_([one], [weight.to(one.dtype)], decay)
        self._due = ()
