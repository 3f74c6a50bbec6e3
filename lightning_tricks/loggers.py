"""The edge: what is sent to loggers, Weights & Biases among them. Nothing else in the package knows a logger."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

_SWEEP = "LIGHTNING_TRICKS_SWEEP"
"""The environment variable in which the processes that Lightning starts find the first rank's configuration."""


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float]) -> None:
    """Give numbers for the row of this step: one row in every logger, however many callbacks give some.

    The row is written when the last callback has ended the batch, on the step that Lightning's own row of the batch
    has; under accumulation with the batch that steps. What is given outside a batch is written when the hook ends that
    it is given in, and whatever happens before the training ends.

    Args:
        trainer: a trainer in training.
        scalars: names and plain numbers; a name that is there already has the new number. None make no row.
    """
    if not trainer.loggers or not scalars:
        return
    waiting = next((other for other in trainer.callbacks if isinstance(other, _Rows)), None)
    if waiting is None:
        waiting = _Rows()
        trainer.callbacks.append(waiting)  # behind all others, also in the hook that runs now
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    waiting.scalars.setdefault(step, {}).update(scalars)


class _Rows(pl.Callback):
    """Rows that are still to be written, by their steps; behind all callbacks of a trainer until they are."""

    def __init__(self) -> None:
        self.scalars: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._write(trainer)

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._write(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._write(trainer, ended=True)

    def on_fit_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._write(trainer, ended=True)

    def on_exception(self, trainer: pl.Trainer, *args: Any) -> None:
        self._write(trainer, ended=True)

    def teardown(self, trainer: pl.Trainer, *args: Any) -> None:
        self._write(trainer, ended=True)

    def _write(self, trainer: pl.Trainer, ended: bool = False) -> None:
        loop, errors = trainer.fit_loop, []
        accumulates = (
            trainer.accumulate_grad_batches > 1
            and not ended
            and trainer.lightning_module.automatic_optimization
            and loop._should_accumulate()
        )
        for step in list(self.scalars):
            if not (accumulates and step == loop.epoch_loop._batches_that_stepped):
                row = self.scalars.pop(step)
                for logger in trainer.loggers:
                    try:
                        logger.log_metrics(dict(row), step=step)
                    except Exception as error:  # the row of the others is not lost with that of one
                        errors.append(error)
        if not self.scalars:  # another list, since Lightning is running through this one
            trainer.callbacks = [other for other in trainer.callbacks if other is not self]
        if errors:
            raise errors[0]


def alert(trainer: pl.Trainer, title: str, text: str) -> None:
    """Say what a person should look at: as a warning, and as an alert of Weights & Biases; on the first rank.

    Args:
        trainer: the trainer whose loggers it is.
        title: below 64 characters.
        text: the whole of it, which the warning says.
    """
    rank_zero_warn(text)
    for run in _wandb_runs(trainer):
        run.alert(title=title, text=text, level="WARN", wait_duration=0.001)  # 0 would be a minute without alerts


def trial_logger(project: str, group: str, name: str, folder: Path) -> WandbLogger:
    """A logger of one of several runs that belong together.

    Args:
        project: of Weights & Biases.
        group: name of what they belong to.
        name: of the run.
        folder: where it is written.
    """
    return WandbLogger(name=name, save_dir=folder.resolve(), project=project, group=group)


def silence_runs(loggers: Iterable[Logger]) -> None:
    """Let loggers of Weights & Biases that have no run yet make one that nobody sees.

    Args:
        loggers: those of a trainer.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger._wandb_init["mode"] = "disabled"


def finish_runs(loggers: Iterable[Logger]) -> None:
    """End the runs of Weights & Biases, or the next training in this process would go on in them.

    Args:
        loggers: those of a trainer; on other ranks than the first they have no run.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            logger._experiment.finish()


def _wandb_runs(trainer: pl.Trainer) -> list[Any]:
    """The runs of this trainer; on other ranks than the first none, where asking for one must not make one."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def sweep_config(logger: Logger) -> dict[str, Any]:
    """The configuration of a Weights & Biases run, as a sweep sets it, the same on all ranks.

    Only the first rank has a run. Asked in the script, before the module is made, it starts the run there. The
    processes that Lightning then starts (`strategy="ddp"`) are told through their environment, those that somebody else
    has started (torchrun) through their process group.

    Args:
        logger: the WandbLogger that the Trainer will have.
    Returns:
        The run's configuration: names and values that JSON can hold.
    Raises:
        RuntimeError: another rank than the first, to which nobody has told it.
        TypeError: another logger.
    References:
        W&B, "Sweeps", https://docs.wandb.ai/guides/sweeps.
    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> sweep_config(CSVLogger("logs"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        TypeError: sweep_config: logger must be a WandbLogger, got ...
    """
    if not isinstance(logger, WandbLogger):
        fix = "Other loggers have no sweeps"
        raise TypeError(f"sweep_config: logger must be a WandbLogger, got {logger!r}. {fix}.")
    first, together = rank_zero_only.rank == 0, dist.is_available() and dist.is_initialized()
    if first:
        os.environ[_SWEEP] = json.dumps(dict(logger.experiment.config))
    told = [os.environ.get(_SWEEP) if first or not together else None]
    if together:
        dist.broadcast_object_list(told, src=0)
    if told[0] is None:
        fix = "Start it without torchrun, so that Lightning starts the ranks, or call init_process_group() before"
        raise RuntimeError(f"sweep_config: config must be known to rank {rank_zero_only.rank}, got nothing. {fix}.")
    return cast(dict[str, Any], json.loads(told[0]))


def log_settings(callback: pl.Callback, trainer: pl.Trainer) -> None:
    """Write the settings of every trick of the trainer to the run's configuration, under `tricks`, once.

    Each callback of this package calls it at the end of its `on_train_start`, when what it takes from the run is known;
    the last of them writes for all. A trick that is there twice is numbered: `BatchTransforms`, `BatchTransforms-2`.

    Args:
        callback: the callback that calls.
        trainer: its trainer.
    """
    tricks = [other for other in trainer.callbacks if _is_trick(other)]
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
    _declare_metrics(trainer)


def _declare_metrics(trainer: pl.Trainer) -> None:
    """Let the summary of a run have the best value of each metric that a callback decides by, beside the last."""
    modes: dict[str, set[str]] = {}
    for callback in trainer.callbacks:
        if isinstance(callback, (EarlyStopping, ModelCheckpoint)) and callback.monitor is not None:
            modes.setdefault(callback.monitor, set()).add(callback.mode)
    for run in _wandb_runs(trainer):
        for monitor, best in modes.items():  # a name of its own does not inherit the step of "*"
            summary = ",".join([*sorted(best), "last"])
            run.define_metric(monitor, summary=summary, step_metric="trainer/global_step", step_sync=True)


def _is_trick(callback: pl.Callback) -> bool:
    ours = any(base.__module__.startswith("lightning_tricks.") for base in type(callback).__mro__)
    return ours and not isinstance(callback, _Rows)


def log_picture(trainer: pl.Trainer, name: str, picture: Any, png: bytes, folder: str) -> None:
    """Show a picture in every logger that takes pictures, on the step of Lightning's own row of this batch.

    Where none does, it is the file `folder/name.png`. Only the first rank writes.

    Args:
        trainer: a trainer in training.
        name: as `"batch_transforms/before"`.
        picture: (3, height, width) tensor of uint8 on the CPU.
        png: the same as a file.
        folder: `trainer.log_dir`, which all ranks must have asked for.
    """
    if not trainer.is_global_zero:
        return
    step, shown = trainer.fit_loop.epoch_loop._batches_that_stepped, False
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, step)
        elif hasattr(logger, "log_image"):
            # As an array: of tensors Weights & Biases makes pictures with torchvision only.
            logger.log_image(key=name, images=[picture.movedim(0, -1).numpy()], step=step)
        else:
            continue
        shown = True
    if not shown:
        path = Path(folder, f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
