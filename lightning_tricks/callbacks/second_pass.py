"""Validation of one batch with several sets of weights, each under names of its own."""

import copy
import inspect
import re
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_tricks.functional.checks import message

_AT_BATCHES = ("on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end")


class SecondPass:
    """Runs a module's `validation_step` again, with what it logs under names with a suffix.

    Metric objects of the module are replaced by copies meanwhile, so that each counts one pass. The step must leave the
    batch as it is, and log through the module.
    """

    def __init__(self) -> None:
        self._logged: dict[str, set[str]] = {}  # the names of each pass
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
        mine, names = vars(pl_module).get("log"), self._logged.setdefault(suffix, set())
        try:
            pl_module.log = partial(_log, pl_module.log, suffix, names)  # type: ignore[method-assign]
            for owner, key, twin in self._twins[suffix]:
                owner._modules[key] = twin
            with isolate_rng():
                trainer.strategy.validation_step(batch, index, *which)
        finally:
            vars(pl_module).pop("log", None)
            if mine is not None:
                pl_module.log = mine  # type: ignore[method-assign]
            for owner, key, metric in originals:
                owner._modules[key] = metric

        clash = names & {name.removesuffix(suffix) for name in names}
        if clash:
            fix = "Log it under another name"
            raise ValueError(message("EMA", "names", f"without {suffix!r} at the end of another's", sorted(clash), fix))

    def suffix_of(self, metric: str) -> str | None:
        """Which pass has logged a metric.

        Args:
            metric: as the Trainer calls it.
        Returns:
            The suffix of its names; None for the first pass.
        """
        name = re.sub(r"/dataloader_idx_\d+$", "", metric)
        for suffix, names in self._logged.items():
            if names & {name, name.removesuffix("_epoch"), name.removesuffix("_step")}:
                return suffix
        return None

    def forget(self) -> None:
        """Let go of the copied metrics."""
        self._twins, self._logged = {}, {}


def _log(log: Any, suffix: str, names: set[str], name: str, value: Any, *args: Any, **options: Any) -> None:
    names.add(f"{name}{suffix}")
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
