"""The gradient noise scale of a run, from the gradient of one batch on one rank beside that of the whole step."""

import math
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_tricks.callbacks.lr_schedule import global_batch_size
from lightning_tricks.functional.checks import message
from lightning_tricks.functional.noise_scale import noise_terms
from lightning_tricks.functional.norms import tensor_norms

_KEPT = 0.9
"""Decay of the running means: what a logged step counts, the next ten of them forget most of."""


class GradientNoise:
    """Running means of a gradient's signal and noise over the logged steps.

    Args:
        signal, noise: the means so far, as `noise_terms` gives the terms.
    """

    def __init__(self, signal: float = 0.0, noise: float = 0.0) -> None:
        self.signal, self.noise = signal, noise
        self.small: Tensor | None = None
        self._batch = self._accumulation = self._ranks = 1
        self._batches = 0  # of the step that is watched
        self._with_gradients: set[int] = set()  # those of them that had a backward
        self._short = False  # whether one of them may have fewer samples
        self._handles: list[RemovableHandle] = []

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the two batch sizes from the run.

        Raises:
            ValueError: there are no two gradients to compare, or no batch size.
        """
        without = "without 'noise_scale'"
        fix = "Set accumulate_grad_batches to 2 or more, train on several ranks with DDP, or leave it out"
        if isinstance(trainer.strategy, ModelParallelStrategy):
            got = type(trainer.strategy).__name__
            raise ValueError(message("UpdateMonitor", "measures", f"{without} where parameters are in parts", got, fix))
        if not pl_module.automatic_optimization:
            got, fix = "automatic_optimization=False", "Which gradients are of one batch is not known; leave it out"
            raise ValueError(message("UpdateMonitor", "measures", f"{without} under manual optimization", got, fix))
        sizes = global_batch_size(trainer, "UpdateMonitor", "measures", without, "Leave it out")
        self._batch, self._accumulation, self._ranks = sizes
        if self._accumulation * self._ranks == 1:
            condition, got = f"{without} where a step is one batch on one rank", f"{sizes[0]} samples"
            raise ValueError(message("UpdateMonitor", "measures", condition, got, fix))

    def begin_batch(self, trainer: pl.Trainer) -> None:
        """Count the batches of a step."""
        self._batches += 1
        self._short |= trainer.is_last_batch and ends_short(trainer.train_dataloader, self._batch)

    def begin_backward(self, parameters: Iterable[Tensor]) -> None:
        """Look at the gradients of a batch before ranks average them; those of accumulated ones wait for its end.

        Args:
            parameters: what is measured. Gradients that a module takes in its `training_step` are none of the step's.
        """
        if self._accumulation == 1:
            self._handles = [parameter.register_hook(self._see) for parameter in parameters]  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _see(self, gradient: Tensor) -> None:
        square = tensor_norms([gradient]).square().sum()
        self.small = square if self.small is None else self.small + square.to(self.small.device)

    def end_backward(self, parameters: Iterable[Tensor], scale: Tensor | float) -> None:
        """The backward of a batch is over: the first one's gradients are all there is as yet.

        Args:
            parameters: as of `begin_backward`.
            scale: what its gradients were multiplied by.
        """
        self._with_gradients.add(self._batches)
        if self._batches > 1:
            return
        if self._accumulation > 1:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            self.small = tensor_norms(gradients).square().sum() if gradients else None
        if self.small is not None:
            self.small = self.small * (self._accumulation / scale) ** 2  # Lightning has divided the loss
        self._unhook()

    def over_ranks(self, trainer: pl.Trainer) -> list[Tensor]:
        """The squared norm of the mean gradient of one batch on one rank: its mean over ranks, (1,); maybe none."""
        if self.small is None or self._batches != self._accumulation:  # an epoch's last step may be of fewer batches
            return []
        # One rank may have the short batch: what is not finite leaves the step out on all of them.
        whole = not self._short and len(self._with_gradients) == self._batches
        small = self.small if whole else self.small * math.nan
        small = small if self._ranks == 1 else trainer.strategy.reduce(small, reduce_op="mean")
        return [small.reshape(1)]

    def scale(self, small: float, large: float) -> dict[str, float]:
        """The noise scale (samples) after one more logged step; nothing while an estimate is not above 0.

        Args:
            small, large: squared norms of the gradient of one batch on one rank, and of the step's.
        """
        if not math.isfinite(small + large):
            return {}
        total = self._batch * self._accumulation * self._ranks
        signal, noise = noise_terms(small, large, self._batch, total)
        self.signal = _KEPT * self.signal + (1 - _KEPT) * signal
        self.noise = _KEPT * self.noise + (1 - _KEPT) * noise
        return {"noise_scale/total": self.noise / self.signal} if min(self.signal, self.noise) > 0 else {}

    def forget(self) -> None:
        """A new step begins."""
        self._unhook()
        self.small, self._batches, self._short, self._with_gradients = None, 0, False, set()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def ends_short(loader: Any, batch_size: int) -> bool:
    """Whether the last batch of an epoch may have fewer samples than the others.

    Args:
        loader: of the training data.
        batch_size: of its batches.
    Example:
        >>> ends_short(torch.utils.data.DataLoader(range(10)), 5), ends_short(torch.utils.data.DataLoader(range(10)), 4)
        (False, True)
    """
    batches = getattr(loader, "batch_sampler", None)
    batches = loader if batches is None else batches
    if getattr(batches, "drop_last", False):
        return False
    try:
        return len(batches.sampler) % batch_size > 0
    except (AttributeError, TypeError):  # a stream, or a loader of the user's own
        return True
