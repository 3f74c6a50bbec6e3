"""The edge: what is sent to loggers, Weights & Biases among them. Nothing else in the package knows a logger."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float]) -> None:
    """Write one row to every logger, on the step Lightning's own row of this batch has.

    Args:
        trainer: a trainer in training.
        scalars: names and plain numbers.
    """
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=step)


def log_settings(callback: pl.Callback, trainer: pl.Trainer) -> None:
    """Write the settings of every trick of the trainer to the run's configuration, under `tricks`, once.

    Each callback of this package calls it at the end of its `on_train_start`, when what it takes from the run is known;
    the last of them writes for all. A trick that is there twice is numbered: `BatchTransforms`, `BatchTransforms-2`.

    Args:
        callback: the callback that calls.
        trainer: its trainer.
    """
    package = __name__.partition(".")[0]
    tricks = [other for other in trainer.callbacks if any(_is_from(package, base) for base in type(other).__mro__)]
    if not tricks or tricks[-1] is not callback:
        return
    config: dict[str, Any] = {}
    for trick in tricks:
        name = type(trick).__name__
        count = sum(key.split("-")[0] == name for key in config)
        config[name if count == 0 else f"{name}-{count + 1}"] = trick.settings
    for logger in trainer.loggers:
        # TensorBoard would log a metric of its own, hp_metric = -1, for settings without metrics.
        options: dict[str, Any] = {"metrics": {}} if isinstance(logger, TensorBoardLogger) else {}
        logger.log_hyperparams({"tricks": config}, **options)


def _is_from(package: str, kind: type) -> bool:
    return kind.__module__.partition(".")[0] == package
