"""An exponential moving average of the weights, evaluated instead of them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelPruning
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tricks.callbacks import average_checkpoint
from lightning_tricks.callbacks.averages import Averages
from lightning_tricks.callbacks.clock import epoch_length, run_length
from lightning_tricks.callbacks.lr_schedule import global_batch_size
from lightning_tricks.callbacks.second_pass import SecondPass
from lightning_tricks.callbacks.steps import (
    LIGHTNINGS_AVERAGES,
    after_real_steps,
    name_in,
    refuse_sharded,
    refuse_twins,
    state_without_module,
)
from lightning_tricks.functional.averaging import Averaging, Decay, HalfLife
from lightning_tricks.functional.checks import message
from lightning_tricks.functional.schedules import Duration, Schedule, describe, resolve_epochs
from lightning_tricks.functional.slots import plain_name
from lightning_tricks.loggers import log_settings


class EMA(Callback):
    """Average the weights over the run, and evaluate the average instead of them.

        average = weights                                        after the first real optimizer step
        average = decay * average + (1 - decay) * weights        after each later one

    Validation inside `fit` sees the average, and `fit` ends with it in the module, so that `test`, `predict` and
    `trainer.save_checkpoint` use it. A checkpoint holds it in `state_dict` (`load_from_checkpoint` gives the average)
    and the raw weights under `current_model_state`, from which training resumes: the layout of Lightning's own
    averaging, whose checkpoints can be resumed too; `load_average` reads either. Until the first real step validation
    sees the raw weights. A step that a GradScaler skipped and a batch that only accumulates gradients do not count;
    with several optimizers each one's steps do.

    Floating buffers (batch-norm statistics) are averaged, on several ranks as rank 0 has them; what is integer or not
    finite after the first step, what no checkpoint holds, and what changes its shape stay as the module has them;
    spectral norm gets vectors of its own for the average. Of sharded parameters (`ModelParallelStrategy`) each rank
    averages its own part. A second `fit()` goes on with the raw weights and the average, unless the module's weights
    were changed in between. An exception in training or validation leaves the raw weights.

    Args:
        decay: weight of the old average, in [0, 1); 0.999 averages over about the last 1,000 steps. Or a decay such as
            `HalfLife("2ep")` or `Warmed(0.9999)`, or any function of (updates, total_steps). Or several in a list, each
            with an average of its own: the first is the one that is evaluated.
        start: stretch of the run that is left out: `int` = optimizer steps, `float` in (0, 1) = fraction of the run,
            `"3ep"` = epochs. Validation sees the raw weights until the average has started.
        every_n_steps: how often the average is updated, in the same units; the decay is applied once for each step in
            between, so that it keeps its meaning. Or a schedule that has cycles: at the end of each.
        evaluate: what validation sees, and `fit` ends with. `"both"` ends with the average and validates each batch
            again with the other averages and the raw weights: `val/loss` is that of the (first) average,
            `val/loss_0.9999` that of a further one, `val/loss_raw` that of the raw weights. With `"raw"` the averages
            are only in the checkpoints, for `load_average`.
        device: `"cpu"` keeps the average in the host's memory, where it costs none of an accelerator's.
        dtype: `"float32"` or `"float64"`: what the average is at least kept in, where the weights are coarser.
        include: patterns of names of the weights that are averaged, as `"backbone.*"`; None for all.
        exclude: patterns of names that are not; the module keeps its own of them.
        buffers: `"copy"` leaves floating buffers too as the module has them.
    Raises:
        TypeError: decay is no number and no decay, or an optimizer has no step hooks.
        ValueError: a value out of range, a pattern without a name, a fraction of a run of unknown length, another
            averaging callback in the Trainer, FSDP1 or DeepSpeed, a parameter that comes or changes its shape after
            the average has begun, a module that cannot be validated twice, or trainable weights in half precision
            without `dtype`, in which an average stands still.
    References:
        Polyak and Juditsky, 1992; Tarvainen and Valpola, 2017, arXiv:1703.01780, section 2.
        Deviates: starts as a copy of the weights after the first step; no debiasing division.
    Example:
        >>> import lightning as L
        >>> from lightning_tricks import EMA
        >>> trainer = L.Trainer(callbacks=[EMA(decay=0.999)], logger=False, enable_checkpointing=False)
    """

    owner = "EMA"

    def __init__(
        self,
        decay: float | Decay | Sequence[float | Decay] = 0.999,
        *,
        start: Duration = 0,
        every_n_steps: Duration | Schedule = 1,
        evaluate: Literal["average", "raw", "both"] = "average",
        device: Literal["cpu"] | None = None,
        dtype: Literal["float32", "float64"] | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        buffers: Literal["average", "copy"] = "average",
    ) -> None:
        decays: list[float | Decay] = list(decay) if isinstance(decay, (list, tuple)) else [decay]  # type: ignore[list-item]
        if not decays:
            raise ValueError(message(self.owner, "decay", "at least one", decay, "0.999 is usual"))
        self.decay, self.start, self.every_n_steps = decay, start, every_n_steps
        self._averaging = [Averaging(one, start, every_n_steps, self.owner) for one in decays]
        self.labels = [label(one) for one in decays]
        if len(set(self.labels)) < len(decays):
            raise ValueError(message(self.owner, "decay", "different for each average", decay, "Leave one out"))
        for name, value, allowed, fix in (
            ("evaluate", evaluate, ("average", "raw", "both"), "'average' is usual"),
            ("device", device, ("cpu", None), "None keeps it beside the weights"),
            ("buffers", buffers, ("average", "copy"), "'average' is usual"),
        ):
            if value not in allowed:
                raise ValueError(message(self.owner, name, " or ".join(map(repr, allowed)), value, fix))
        dtypes = {"float32": torch.float32, "float64": torch.float64}
        plain = str(dtype).removeprefix("torch.")
        if dtype is not None and plain not in dtypes:
            fix = "None takes that of the weights"
            raise ValueError(message(self.owner, "dtype", "'float32' or 'float64'", dtype, fix))
        self.evaluate, self.device, self.buffers = evaluate, device, buffers
        self.dtype = None if dtype is None else plain
        self.include = None if include is None else _patterns(self.owner, "include", include)
        self.exclude = _patterns(self.owner, "exclude", exclude)
        average_buffers = buffers == "average"
        self._averages = Averages(self.owner, self.include, self.exclude, average_buffers, device, dtypes.get(plain))
        self._plans = self._averaging
        self._total_steps = math.inf
        self._steps = 0  # real steps, whether or not they are in the average
        self._updates = 0
        self._since = 0  # real steps since the average began
        self._left: list[int] | None = None  # fingerprint of what the last fit left in the module
        self._again = SecondPass()
        self._watched: list[Optimizer] = []
        self._known: dict[int, tuple[int, set[int]]] = {}  # parameters of each optimizer
        self._fitting = False
        self._evaluated = False
        self._handles: list[RemovableHandle] = []
        self._unwrap: Callable[[], None] | None = None
        self._end_migration: Callable[[], None] = _nothing

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's configuration shows: of the later arguments those that are not as usual."""
        decays = [describe(plan.decay) if callable(plan.decay) else plan.decay for plan in self._averaging]
        every = self.every_n_steps
        usual: dict[str, Any] = {
            "evaluate": "average",
            "device": None,
            "dtype": None,
            "include": None,
            "exclude": [],
            "buffers": "average",
        }
        chosen = {name: getattr(self, name) for name in usual}
        return {
            "decay": decays if isinstance(self.decay, (list, tuple)) else decays[0],
            "start": self.start,
            "every_n_steps": describe(every) if callable(every) else every,
            **{name: value for name, value in chosen.items() if value != usual[name]},
        }

    @property
    def updates(self) -> int:
        """Updates of the average, its beginning among them: the steps whose weights are in it."""
        return self._updates

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be averaged, and a second owner of the evaluated weights."""
        refuse_twins(self, trainer, "the weights that are evaluated")
        others = [type(other).__name__ for other in trainer.callbacks if isinstance(other, LIGHTNINGS_AVERAGES)]
        if others:
            fix = "Both would own the weights that are evaluated; keep one"
            raise ValueError(message(self.owner, "callbacks", "the only one that averages", others, fix))
        if any(isinstance(other, ModelPruning) for other in trainer.callbacks):
            fix = "It replaces the parameters that are averaged; prune after the training"
            raise ValueError(message(self.owner, "callbacks", "without ModelPruning", "ModelPruning", fix))
        refuse_sharded(self.owner, trainer, dtensors=True)
        if self.evaluate == "both" and stage == "fit":
            SecondPass.check(self.owner, pl_module)
        self._end_migration()
        if stage == "fit":
            self._end_migration = average_checkpoint.migrate_both(pl_module)

    # ------------------------------------------------------------------ when

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the average of a checkpoint or of the fit before, if the module still is what that left."""
        self._end_migration()
        for name, parameter in pl_module.named_parameters():
            half = parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16)
            if half and self.dtype is None:
                fix = f"{name} would stand still; give dtype='float32', or train with precision='bf16-mixed'"
                raise ValueError(message(self.owner, "precision", "one with float32 weights", parameter.dtype, fix))
        self._averages.find(pl_module)
        if trainer.strategy.reduce_boolean_decision(self._changed(), all=False):
            rank_zero_info(f"{self.owner}: the module's weights are not those of the last fit; a new average starts.")
            self._forget()
        self._fitting = True
        self._averages.follow()
        self._averages.hide()
        # Lightning calls no callback for a weights-only checkpoint, but the module.
        hook = partial(_save_average, pl_module.on_save_checkpoint, self, pl_module)
        self._unwrap = average_checkpoint.replace_hook(pl_module, "on_save_checkpoint", hook)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Update after every real optimizer step from here on."""
        self._averages.find(pl_module)  # the module's own on_fit_start may have added some
        if trainer.global_step == 0:
            self._steps = 0
        self._plans = self._resolved(trainer)
        if any(plan.needs_length for plan in self._plans):
            fix = "Give optimizer steps where a fraction of the run is"
            self._total_steps = run_length(self.owner, trainer, fix) * len(trainer.optimizers)
        self._watch(trainer, pl_module)
        log_settings(self, trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Follow the module if it got other optimizers."""
        if trainer.strategy.optimizers is not self._watched:
            self._watch(trainer, pl_module)

    def _watch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._watched = trainer.strategy.optimizers
        self._known = {id(optimizer): _parameters(optimizer) for optimizer in trainer.optimizers}
        self._handles = after_real_steps(self.owner, trainer.optimizers, partial(self._update, pl_module))

    def _resolved(self, trainer: pl.Trainer) -> list[Averaging]:
        """The plans in optimizer steps."""
        optimizers, epoch = len(trainer.optimizers), epoch_length(trainer)
        plans = []
        for plan in self._averaging:
            if isinstance(plan.decay, HalfLife) and plan.decay.samples is not None:
                fix = "Give HalfLife steps or epochs"
                batch = math.prod(global_batch_size(trainer, self.owner, "decay", "in steps", fix)) / optimizers
                plan = dataclasses.replace(plan, decay=0.5 ** (batch / plan.decay.samples))
            plans.append(resolve_epochs(plan, math.inf if epoch is None else epoch * optimizers))
        return plans

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average into the module."""
        if self._fitting:
            self._evaluated = self._averages.begun and self.evaluate != "raw"
            self._put(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Validate the batch with the other weights too, where both were asked for."""
        if not self._fitting or self.evaluate != "both":
            return
        averages = self._averages
        averages.hide()
        try:
            for index, name in [*enumerate(self.labels), (None, "raw")][1:]:
                if index is not None:
                    averages.show(index)
                self._again.run(trainer, pl_module, f"_{name}", batch, batch_idx, dataloader_idx)
                averages.hide()
        finally:
            averages.hide()
            averages.show()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the raw weights back."""
        if self._fitting:
            self._averages.hide()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End with the average in the module."""
        if not self._averages.begun and self._steps > 0 and not trainer.fast_dev_run:
            rank_zero_warn(
                f"{self.owner}: training ended after {self._steps} real steps, before the average started"
                f" (start={self.start!r}); the module has its own weights."
            )
        self.finish(trainer)

    def finish(self, trainer: pl.Trainer) -> None:
        """Put the average into the module for good; done once, whoever of several callbacks asks first.

        Args:
            trainer: the trainer in `on_train_end`.
        """
        if self._fitting:
            self._put(trainer, trainer.lightning_module)
            self._detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the raw weights in the module."""
        self._end_migration()
        if self._fitting:
            self._averages.hide()
            self._detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Follow the module to the device that Lightning leaves it on."""
        self.finish(trainer)  # where there was nothing to train, nobody has
        self._averages.follow()
        self._again.forget()

    def _put(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the module show what is evaluated."""
        self._averages.agree_on_buffers(trainer)
        if self.evaluate != "raw":
            self._averages.show()

    def _detach(self) -> None:
        self._fitting = False
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._unwrap is not None:
            self._unwrap()
            self._unwrap = None
        try:
            self._left = self._averages.fingerprint()
        except RuntimeError:  # a device that failed: what it held cannot be gone on with
            self._forget()

    def _forget(self) -> None:
        self._averages.end()
        self._updates, self._since = 0, 0

    def _changed(self) -> bool:
        """Whether the module's weights are others than the last fit left in it."""
        return self._left is not None and self._left != self._averages.fingerprint()

    # ------------------------------------------------------------------ what

    def _update(self, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        self._steps += 1
        self._since += self._updates > 0
        decays = [plan(self._steps, self._updates or 1, self._total_steps, self._since) for plan in self._plans]
        due = [decay for decay in decays if decay is not None]
        count = 0
        for group in optimizer.param_groups:
            count += len(group["params"])
        if count != self._known[id(optimizer)][0]:
            self._look_at_new_parameters(pl_module, optimizer)
        if not due:
            return
        if self._updates:
            self._averages.update(due)
        else:
            self._averages.find(pl_module)
            self._averages.begin(len(due))
        self._updates += 1

    def _look_at_new_parameters(self, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Refuse a parameter of which a running average knows nothing, since it would be evaluated without one."""
        count, parameters = _parameters(optimizer)
        new = parameters - self._known[id(optimizer)][1]
        for name, parameter in pl_module.named_parameters():
            if self._averages.begun and id(parameter) in new and not self._averages.holds(parameter):
                fix = "Make it in __init__ or configure_model, or let the average start later (start=)"
                condition = "in the module before the average begins"
                raise ValueError(message(self.owner, "parameters", condition, plain_name(name), fix))
        self._known[id(optimizer)] = count, parameters

    def evaluated_weights(self, metric: str | None = None) -> dict[str, Tensor]:
        """What the last validation inside `fit` saw, as far as the module does not hold it now.

        Args:
            metric: name of a metric; under `evaluate="both"` it says which of the weights.
        Returns:
            The average by name; nothing where it had not started. Live tensors, to be copied by whoever keeps them.
        """
        if not self._evaluated:
            return {}
        suffix = None if metric is None else self._again.suffix_of(metric)
        if suffix == "_raw":
            return self.raw_weights()
        return self._averages.values(self.labels.index(suffix[1:]) if suffix else 0)

    def averaged_weights(self, name: str | None = None) -> dict[str, Tensor]:
        """An average as it is now.

        Args:
            name: which, as `"0.999"`; None for the first.
        Returns:
            Averaged weights by name; nothing before the average has begun. Live tensors: copy what is to be kept.
        Raises:
            ValueError: no average of that name.
        """
        if name is not None and name not in self.labels:
            fix = "Choose one of them"
            raise ValueError(message(self.owner, "name", f"one of {', '.join(self.labels)}", name, fix))
        return self._averages.values(0 if name is None else self.labels.index(name))

    def raw_weights(self) -> dict[str, Tensor]:
        """The raw weights, where the module holds the average at the moment.

        Returns:
            Raw weights by name; nothing where the module holds them. Live tensors, to be copied by whoever keeps them.
        """
        return self._averages.own_values()

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average in `state_dict` and the raw weights beside it, whichever of them the module holds now."""
        name_in(checkpoint, self)
        checkpoint["averaging_steps"], checkpoint["averaging_since"] = self._steps, self._since
        averages = self._averages
        if not averages.begun:
            return
        if not self._fitting:
            averages.find(pl_module)
            if trainer.strategy.reduce_boolean_decision(self._changed(), all=False):
                return
        average_checkpoint.save(averages, self.labels, self._updates, trainer, checkpoint, self.evaluate != "raw")

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Resume: the module holds the average by now; keep that, and load the raw weights."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._forget()
        self._left = None
        self._steps = checkpoint.get("averaging_steps", checkpoint["global_step"])
        self._updates = average_checkpoint.load(self._averages, self.labels, trainer, pl_module, checkpoint)
        self._since = checkpoint.get("averaging_since", max(self._updates - 1, 0))
        if not self._averages.begun:
            rank_zero_info(f"{self.owner}: the checkpoint holds no average; it starts after the next step that is due.")

    def both_state_dicts(
        self, trainer: pl.Trainer, here: dict[str, Any], read: average_checkpoint.Read = average_checkpoint.read_module
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state dict of the average and of the raw weights.

        Args:
            trainer: with the module, in `fit` after the average has begun.
            here: the state dict of the weights that the module holds now.
            read: what has read it.
        Returns:
            The average's and the raw one's, one of which is `here`.
        """
        return average_checkpoint.both_state_dicts(self._averages, trainer, here, read)

    def __getstate__(self) -> dict[str, Any]:
        idle: dict[str, Any] = {"_handles": [], "_watched": [], "_known": {}, "_unwrap": None, "_fitting": False}
        return state_without_module(self, **idle, _again=SecondPass(), _end_migration=_nothing)


def _nothing() -> None:
    pass


def label(decay: float | Decay) -> str:
    """How an average is called beside others: in the names of metrics, and in a checkpoint.

    Args:
        decay: its decay.
    Returns:
        As `"0.999"`, or `"HalfLife-2ep"`.
    """
    if not callable(decay):
        return f"{decay:.12g}"
    one: Any = decay
    if not dataclasses.is_dataclass(one):
        return str(getattr(one, "__name__", type(one).__name__))
    values = [(getattr(one, field.name), field.default) for field in dataclasses.fields(one)]
    return "-".join([type(one).__name__, *(str(value) for value, usual in values if value != usual)])


def _patterns(owner: str, name: str, given: str | Sequence[str]) -> list[str]:
    patterns: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(message(owner, name, "names or patterns of names", given, "Give them as in 'backbone.*'"))
    return patterns


def _parameters(optimizer: Optimizer) -> tuple[int, set[int]]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return len(parameters), set(map(id, parameters))


def _save_average(
    original: Callable[[dict[str, Any]], None], ema: EMA, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
) -> None:
    # A copy of the module carries the wrapper along, around a copy of the callback that takes part in no fit.
    if "callbacks" not in checkpoint and ema._fitting and ema._averages.begun and ema.evaluate != "raw":
        checkpoint["state_dict"], _ = ema.both_state_dicts(pl_module.trainer, checkpoint["state_dict"])
        checkpoint[average_checkpoint.NAMES] = ema.labels[:1]
    original(checkpoint)
