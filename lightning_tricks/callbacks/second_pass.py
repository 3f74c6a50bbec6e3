"""Validation of one batch with several sets of weights, each under names of its own."""

import copy
import inspect
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_tricks.functional.checks import message

_AT_BATCHES = ("on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end")


class SecondPass:
    """Runs a module's `validation_step` again, with what it logs under names with a suffix.

    Metric objects of the module are replaced by copies meanwhile, so that each counts one pass.
    """

    def __init__(self) -> None:
        self._twins: dict[str, list[tuple[nn.Module, str, nn.Module]]] = {}

    @staticmethod
    def check(owner: str, pl_module: pl.LightningModule) -> None:
        """Raise unless all that a module does with a validation batch is in its `validation_step`.

        Args:
            owner: callback named in the error.
            pl_module: the module.
        Raises:
            ValueError: it has a hook that gathers what other batches left, or that fetches batches itself.
        """
        hooks = [hook for hook in _AT_BATCHES if is_overridden(hook, pl_module)]
        if "dataloader_iter" in inspect.signature(pl_module.validation_step).parameters:
            hooks.append("validation_step(dataloader_iter)")
        if hooks:
            fix = "It would mix the two passes; log in validation_step, or choose 'average' or 'raw'"
            condition = "'average' or 'raw' with a module that has hooks of its own around validation_step"
            raise ValueError(message(owner, "evaluate", condition, hooks, fix))

    def run(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, suffix: str, batch: Any, index: int, loader: int
    ) -> None:
        """Validate a batch once more, in the callback's own `on_validation_batch_end`.

        Args:
            trainer: in its validation.
            pl_module: with the weights that are asked for.
            suffix: what follows the names of all that is logged.
            batch: on its device.
            index: of the batch.
            loader: index of the loader.
        """
        if suffix not in self._twins:
            self._twins[suffix] = [
                (owner, key, copy.deepcopy(metric)) for owner, key, metric in _metrics(pl_module, set())
            ]
        originals = [(owner, key, owner._modules[key]) for owner, key, _ in self._twins[suffix]]
        which = [loader] if "dataloader_idx" in inspect.signature(pl_module.validation_step).parameters else []
        pl_module.log = partial(_log, pl_module.log, suffix)  # type: ignore[method-assign]
        try:
            for owner, key, twin in self._twins[suffix]:
                owner._modules[key] = twin
            with isolate_rng():
                trainer.strategy.validation_step(batch, index, *which)
        finally:
            del pl_module.log
            for owner, key, metric in originals:
                owner._modules[key] = metric

    def forget(self) -> None:
        """Let go of the copied metrics."""
        self._twins = {}


def _log(log: Any, suffix: str, name: str, value: Any, *args: Any, **options: Any) -> None:
    if isinstance(value, Metric):  # of which Lightning would look for the attribute
        options.setdefault("metric_attribute", f"{name}{suffix}")
    log(f"{name}{suffix}", value, *args, **options)


def _metrics(module: nn.Module, seen: set[int]) -> list[tuple[nn.Module, str, nn.Module]]:
    """The outermost metric objects of a module, with who has them under which name."""
    found: list[tuple[nn.Module, str, nn.Module]] = []
    for key, child in module._modules.items():
        if isinstance(child, (Metric, MetricCollection)):
            found.append((module, key, child))
        elif child is not None and id(child) not in seen:
            seen.add(id(child))
            found += _metrics(child, seen)
    return found
