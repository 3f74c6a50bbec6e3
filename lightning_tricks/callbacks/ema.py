"""An exponential moving average of the weights, evaluated instead of them."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelPruning
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tricks.callbacks.clock import epoch_length, run_length
from lightning_tricks.callbacks.steps import LIGHTNINGS_AVERAGES, after_real_steps, refuse_sharded, refuse_twins
from lightning_tricks.callbacks.weights import (
    SpectralNormOf,
    fingerprint,
    leading_singular_vectors,
    named_weights,
    spectral_norms,
)
from lightning_tricks.functional.averaging import Averaging, Decay, can_average, ema_
from lightning_tricks.functional.checks import message
from lightning_tricks.functional.schedules import Duration, describe, resolve_epochs
from lightning_tricks.functional.slots import weight_slots
from lightning_tricks.loggers import log_settings


class EMA(Callback):
    """Average the weights over the run, and evaluate the average instead of them.

        average = weights                                        after the first real optimizer step
        average = decay * average + (1 - decay) * weights        after each later one

    Validation inside `fit` sees the average, and `fit` ends with it in the module, so that `test`, `predict` and
    `trainer.save_checkpoint` use it. A checkpoint holds it in `state_dict` (`load_from_checkpoint` gives the average)
    and the raw weights under `current_model_state`, from which training resumes: the layout of Lightning's own
    averaging. Until the first real step validation sees the raw weights. A step that a GradScaler skipped and a batch
    that only accumulates gradients do not count; with several optimizers each one's steps do.

    Floating buffers (batch-norm statistics) are averaged, on several ranks as rank 0 has them; what is integer or not
    finite after the first step, what no checkpoint holds, and what changes its shape stay as the module has them;
    spectral norm gets vectors of its own for the average. A second `fit()` goes on with the raw weights and the
    average, unless the module's weights were changed in between. An exception in training or validation leaves the raw
    weights.

    Args:
        decay: weight of the old average, in [0, 1); 0.999 averages over about the last 1,000 steps. Or a decay such as
            `HalfLife("2ep")` or `Warmed(0.9999)`, or any function of (updates, total_steps).
        start: stretch of the run that is left out: `int` = optimizer steps, `float` in (0, 1) = fraction of the run,
            `"3ep"` = epochs. Validation sees the raw weights until the average has started.
        every_n_steps: how often the average is updated, in the same units; the decay is applied once for each step in
            between, so that it keeps its meaning.
    Raises:
        TypeError: decay is no number and no decay, or an optimizer has no step hooks.
        ValueError: a value out of range, a fraction of a run of unknown length, another averaging callback in the
            Trainer, a strategy that shards the parameters, or trainable weights in half precision, in which an average
            stands still.
    References:
        Polyak and Juditsky, 1992; Tarvainen and Valpola, 2017, arXiv:1703.01780, section 2.
        Deviates: starts as a copy of the weights after the first step; no debiasing division.
    Example:
        >>> import lightning as L
        >>> from lightning_tricks import EMA
        >>> trainer = L.Trainer(callbacks=[EMA(decay=0.999)], logger=False, enable_checkpointing=False)
    """

    owner = "EMA"

    def __init__(self, decay: float | Decay = 0.999, *, start: Duration = 0, every_n_steps: Duration = 1) -> None:
        self.decay, self.start, self.every_n_steps = decay, start, every_n_steps
        self._plan = Averaging(decay, start, every_n_steps)
        self._total_steps = math.inf
        self._steps = 0  # real steps, whether or not they are in the average
        self._average: dict[str, Tensor] | None = None
        self._raw: dict[str, Tensor] | None = None  # the raw weights, while the module holds the average
        self._updates = 0
        self._buffers: list[str] = []  # of the averaged tensors
        self._slots: dict[str, tuple[dict[str, Tensor | None], str]] = {}
        self._spectral: list[SpectralNormOf] = []
        self._left: list[int] | None = None  # fingerprint of what the last fit left in the module
        self._fitting = False
        self._evaluated = False
        self._handles: list[RemovableHandle] = []
        self._unwrap: Callable[[], None] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's configuration shows."""
        decay = describe(self.decay) if callable(self.decay) else self.decay
        return {"decay": decay, "start": self.start, "every_n_steps": self.every_n_steps}

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
        refuse_sharded(self.owner, trainer)

    # ------------------------------------------------------------------ when

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the average of a checkpoint or of the fit before, if the module still is what that left."""
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                fix = f"{name} would stand still; train with precision='bf16-mixed' or '16-mixed' instead"
                raise ValueError(message(self.owner, "precision", "one with float32 weights", parameter.dtype, fix))
        self._find_tensors(pl_module)
        for norm in self._spectral:
            if norm.weight not in self._slots:
                fix = "Put spectral norm first, or leave the other parametrization out"
                got = f"{norm.left} behind one of several tensors"
                raise ValueError(
                    message(self.owner, "parametrizations", "of one tensor before spectral norm", got, fix)
                )
        if self._changed():
            rank_zero_info(f"{self.owner}: the module's weights are not those of the last fit; a new average starts.")
            self._average, self._raw, self._updates = None, None, 0
        self._fitting = True
        if self._average is not None:
            here = self._tensors(self._average)
            if self._raw is None:
                self._average = {name: tensor.to(here[name].device) for name, tensor in self._average.items()}
            else:
                self._average = {name: tensor.data for name, tensor in here.items()}
                self._raw = {name: tensor.to(here[name].device) for name, tensor in self._raw.items()}
                self._hide()
        self._unwrap = _wrap_on_save_checkpoint(self, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Update after every real optimizer step from here on."""
        self._find_tensors(pl_module)  # the module's own on_fit_start may have added some
        if trainer.global_step == 0:
            self._steps = 0
        optimizers = len(trainer.optimizers)
        steps_per_epoch = epoch_length(trainer)
        self._plan = resolve_epochs(
            Averaging(self.decay, self.start, self.every_n_steps),
            math.inf if steps_per_epoch is None else steps_per_epoch * optimizers,
        )
        if self._plan.needs_length:
            self._total_steps = (
                run_length(self.owner, trainer, "Give optimizer steps where a fraction of the run is") * optimizers
            )
        self._handles = after_real_steps(self.owner, trainer.optimizers, self._update)
        log_settings(self, trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average into the module."""
        if self._fitting:
            self._evaluated = self._average is not None
            self._agree_on_buffers(trainer)
            self._show()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the raw weights back."""
        if self._fitting:
            self._hide()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End with the average in the module."""
        if self._average is None and self._steps > 0 and not trainer.fast_dev_run:
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
            self._agree_on_buffers(trainer)
            self._show()
            self._detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the raw weights in the module."""
        if self._fitting:
            self._hide()
            self._detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Follow the module to the device that Lightning leaves it on."""
        self.finish(trainer)  # where there was nothing to train, nobody has
        if self._raw is not None and self._slots:
            here = self._tensors(self._raw)
            self._average = {name: tensor.data for name, tensor in here.items()}
            self._raw = {name: tensor.to(here[name].device) for name, tensor in self._raw.items()}
        self._slots = {}

    def _detach(self) -> None:
        self._fitting = False
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._unwrap is not None:
            self._unwrap()
            self._unwrap = None
        try:
            self._left = self._fingerprint()
        except RuntimeError:  # a device that failed: what it held cannot be gone on with
            self._average, self._raw, self._updates = None, None, 0

    # ------------------------------------------------------------------ what

    def _find_tensors(self, pl_module: pl.LightningModule) -> None:
        self._slots = {name: (holder, key) for name, holder, key in weight_slots(pl_module)}
        self._spectral = spectral_norms(pl_module)

    def _tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        slots = self._slots
        return {name: slots[name][0][slots[name][1]] for name in names}  # type: ignore[misc]

    def _start(self, weights: dict[str, Tensor]) -> None:
        """Begin the average as a copy of those weights that have one."""
        vectors = _vectors(self._spectral)
        chosen = {name: t for name, t in weights.items() if name not in vectors and can_average(t)}
        self._average = {name: tensor.detach().clone() for name, tensor in chosen.items()}
        self._buffers = [name for name, tensor in chosen.items() if not isinstance(tensor, Parameter)]

    def _update(self, optimizer: Optimizer) -> None:
        self._steps += 1
        decay = self._plan(self._steps, max(self._updates, 1), self._total_steps)
        if decay is None:
            return
        if self._average is None:
            self._start({name: tensor for name, tensor in self._tensors(self._slots).items() if tensor is not None})
        else:
            weights = self._tensors(self._average)
            for name in self._buffers:
                if weights[name] is None or weights[name].shape != self._average[name].shape:
                    # A buffer that grows, or was taken away, has no average: it stays as the module has it.
                    del self._average[name], weights[name]
                    self._buffers = [other for other in self._buffers if other != name]
            ema_(list(self._average.values()), list(weights.values()), decay)
        self._updates += 1

    def _show(self) -> None:
        # Each assignment can be repeated, so that an interrupt in the middle is undone by `_hide`.
        if self._average is not None and self._raw is None:
            self._average = self._evaluable(self._average)
            self._raw = {name: tensor.data for name, tensor in self._tensors(self._average).items()}
            self._assign(self._average)

    def _evaluable(self, average: dict[str, Tensor]) -> dict[str, Tensor]:
        """The average with the vectors of spectral norm that belong to it: averaged ones would not normalise."""
        average = dict(average)
        for norm in self._spectral:
            if norm.weight in average:
                start = self._tensors([norm.left])[norm.left] if self._raw is None else self._raw[norm.left]
                with torch.no_grad():
                    weight = average[norm.weight]
                    for part in norm.before:
                        weight = part(weight)
                average[norm.left], average[norm.right] = leading_singular_vectors(weight, start, norm.dim)
        return average

    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self._tensors(values).items():
            tensor.data = values[name]

    def _hide(self) -> None:
        if self._raw is not None:
            self._assign(self._raw)
            self._raw = None
            vectors = _vectors(self._spectral)
            self._average = {name: t for name, t in (self._average or {}).items() if name not in vectors}

    def _fingerprint(self) -> list[int] | None:
        """Of the averaged tensors as the module holds them; None where it has no such tensors."""
        if self._average is None or not self._average.keys() <= self._slots.keys():
            return None
        return fingerprint(self._tensors(self._average).values())

    def _changed(self) -> bool:
        """Whether the module's weights are others than the last fit left in it."""
        return self._left is not None and self._left != self._fingerprint()

    def _agree_on_buffers(self, trainer: pl.Trainer) -> None:
        if trainer.world_size > 1 and self._average is not None and self._raw is None:
            agreed = trainer.strategy.broadcast({name: self._average[name].cpu() for name in self._buffers})
            for name in self._buffers:
                del self._average[name]
            here = self._tensors(agreed)
            self._average |= {name: tensor.to(here[name].device) for name, tensor in agreed.items()}
            self._buffers = list(agreed)

    def evaluated_weights(self) -> dict[str, Tensor]:
        """What the last validation inside `fit` saw instead of the module's own weights.

        Returns:
            The average by name; nothing where it had not started. Live tensors, to be copied by whoever keeps them.
        """
        return self._evaluable(self._average) if self._evaluated and self._average is not None else {}

    def raw_weights(self) -> dict[str, Tensor]:
        """The raw weights, where the module holds the average at the moment.

        Returns:
            Raw weights by name; nothing where the module holds them. Live tensors, to be copied by whoever keeps them.
        """
        return {} if self._raw is None else dict(self._raw)

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average in `state_dict` and the raw weights beside it, whichever of them the module holds now."""
        checkpoint["averaging_steps"] = self._steps
        if self._average is None:
            return
        if not self._slots:
            self._find_tensors(pl_module)
        if not self._fitting and self._changed():
            return
        average, raw = self.both_state_dicts(trainer, checkpoint["state_dict"])
        checkpoint["state_dict"], checkpoint["current_model_state"] = average, raw
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._updates)}
        averaged = self._average.keys() - _vectors(self._spectral)
        checkpoint["unaveraged_weights"] = [name for name in self._slots if name not in averaged]

    def both_state_dicts(self, trainer: pl.Trainer, here: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state dict of the average and of the raw weights; one of them is `here`.

        The module writes both, so that its own state-dict hooks apply to both.
        """
        if self._raw is None:
            self._show()
            try:
                return trainer.strategy.lightning_module_state_dict(), here
            finally:
                self._hide()
        raw, shown = self._raw, {name: t.data for name, t in self._tensors(self._raw).items()}
        try:
            self._assign(raw)
            return here, trainer.strategy.lightning_module_state_dict()
        finally:
            self._assign(shown)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Resume: the module holds the average by now; keep that, and load the raw weights."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._average, self._raw, self._updates, self._left = None, None, 0, None
        self._steps = checkpoint.get("averaging_steps", checkpoint["global_step"])
        if "current_model_state" not in checkpoint:
            rank_zero_info(f"{self.owner}: the checkpoint holds no average; it starts after the next step that is due.")
            return
        self._spectral = spectral_norms(pl_module)
        unaveraged = checkpoint.get("unaveraged_weights", ())
        self._start({name: tensor for name, tensor in named_weights(pl_module).items() if name not in unaveraged})
        self._updates = int(checkpoint["averaging_state"]["n_averaged"])
        raw = {**checkpoint, "state_dict": checkpoint["current_model_state"]}
        if raw["state_dict"].keys() != checkpoint["state_dict"].keys():
            pl_module.on_load_checkpoint(raw)  # which has renamed the average's keys
        trainer.strategy.load_model_state_dict(raw, strict=pl_module.strict_loading)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": [], "_slots": {}, "_unwrap": None, "_fitting": False}


def _vectors(spectral: Iterable[SpectralNormOf]) -> set[str]:
    return {name for norm in spectral for name in (norm.left, norm.right)}


def _wrap_on_save_checkpoint(ema: EMA, pl_module: pl.LightningModule) -> Callable[[], None]:
    """Let weights-only checkpoints hold the average too: Lightning calls no callback for them, but the module."""
    mine = vars(pl_module).get("on_save_checkpoint")
    wrapper = partial(_save_average, pl_module.on_save_checkpoint, ema, pl_module)
    pl_module.on_save_checkpoint = wrapper  # type: ignore[method-assign]

    def unwrap() -> None:
        if mine is not None:
            pl_module.on_save_checkpoint = mine  # type: ignore[method-assign]
        else:
            del pl_module.on_save_checkpoint

    return unwrap


def _save_average(
    original: Callable[[dict[str, Any]], None], ema: EMA, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
) -> None:
    # A copy of the module carries the wrapper along, around a copy of the callback that has no slots.
    if "callbacks" not in checkpoint and ema._average is not None and ema._slots:
        checkpoint["state_dict"], _ = ema.both_state_dicts(pl_module.trainer, checkpoint["state_dict"])
    original(checkpoint)
