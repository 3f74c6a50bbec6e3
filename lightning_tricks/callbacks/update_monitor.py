"""How large the gradients, the weights and the true updates are, measured on logged steps only."""

from collections.abc import Sequence
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_tricks.callbacks.gradient_noise import GradientNoise
from lightning_tricks.callbacks.layer_names import Layers, check_layers, check_names
from lightning_tricks.callbacks.shards import hold_parts
from lightning_tricks.callbacks.step_sums import SUMS, Measure, joined, layer_values, to_host
from lightning_tricks.callbacks.step_watch import StepWatch
from lightning_tricks.callbacks.steps import refuse_sharded, refuse_twins, say_if_never_due, state_without_module
from lightning_tricks.callbacks.update_band import as_band
from lightning_tricks.functional.checks import check_count, message
from lightning_tricks.loggers import alert, log_scalars, log_settings

KEY = "update_monitor"
"""Where a checkpoint has the running means and the counts."""


class UpdateMonitor(Callback):
    """Log the gradient norm, the weight norm and the update:weight ratio, by module and in total.

        grad_norm = norm(gradients),  weight_norm = norm(weights before the step)
        update_ratio = norm(weights after the step - weights before it) / weight_norm

    The update is what the optimizer truly did, whatever its kind: weight decay, momentum and clipping included. A ratio
    of about 1e-3 is healthy as a rule. The gradients are those the step starts from: accumulated, unscaled, averaged
    over ranks, before Lightning clips them (a module that optimizes by hand may have clipped them itself). Keys are
    `grad_norm/total`, `weight_norm/total`, `update_ratio/total` and the same with the name of each layer
    (`update_ratio/encoder.0`). A layer of zeros that moves has a ratio of inf. On request:

    - `grad_norm_clipped` after clipping, `update_norm`;
    - `grad_zeros`: share of entries that are exactly 0, all where there is no gradient; `grad_nonfinite`: their count;
    - `update_cosine` between this update and that of the step before, for which that is measured too; an optimizer that
      did not step in the batch before has none, nor has the first step after a resume;
    - `noise_scale/total` (samples), from the gradient of one batch on one rank beside that of the step, as means over
      logged steps with a decay of 0.9. That needs accumulation or ranks (DDP; then no layer in several reentrant
      checkpoints, whose gradients come in parts) and a loader with a `batch_size`, and is not logged while the estimate
      of the true gradient's square, or of the noise, is not above 0. Steps with the last batch of an epoch are left out
      where that may be smaller than the others, and so are those with a batch whose `training_step` returned None.

    Only every n-th step is measured, with one transfer to the host and one row in each logger, on the step of
    Lightning's own rows; the others cost nothing. A logged step that a GradScaler skipped has no row. Of several
    optimizers each one's next step is measured, and the total is over those that stepped in the batch. Without a logger
    nothing is measured. Of parameters in parts (DTensor: FSDP2, tensor parallelism) the norms are those of the whole
    ones; the ranks exchange sums, and no tensor is gathered.

    Args:
        every_n_steps: how often, at least 1; counted as Lightning counts `log_every_n_steps`: optimizer steps, or
            batches where the module optimizes by hand.
        measures: what is logged, of the names above.
        layers: `"module"`, each module with parameters of its own; `"tensor"`, each parameter; a number, so many parts
            of a module's name (0: the total alone); or regular expressions, matched from the beginning of a parameter's
            name: what matched is the layer, and what none matches is in the total alone. Each must match a parameter.
        band: (lowest, highest) update ratio of a layer that is well, as `(1e-4, 1e-2)`; layers outside are named once,
            in a warning and an alert of Weights & Biases, with `event/update_band` in the row. None names none: rates
            that warm up or decay to 0 leave every band.
        patience: logs in a row that a layer must be outside.
        max_extra_memory: bytes on each rank for the copies of weights from before a step; None is as many as the
            measured parameters take (half precision: as in float32), twice that with `update_cosine`. (Where norms and
            ratios alone are measured and the number of layers times the entries of the largest is at most 16384, up to
            half a megabyte for an optimizer: they are taken at once.) With less, the updates of some layers are
            measured in one logged step of an optimizer and those of others in its next, in turn; where some are not
            known, the measures of updates have no total. It must hold the largest layer; one that is unfrozen later and
            too large for it is not measured, with a warning.
    Raises:
        TypeError, ValueError: an argument out of range, another UpdateMonitor in the Trainer, FSDP1 or DeepSpeed, a
            layer called `total`, a pattern without a parameter, a layer larger than `max_extra_memory`, or nothing to
            take the noise scale from.
    References:
        Karpathy, "CS231n: Learning and Evaluation", 2015, the ratio of updates to weights; McCandlish et al., "An
            Empirical Model of Large-Batch Training", 2018, arXiv:1812.06162, appendix A.1, the noise scale.
    Example:
        >>> from lightning_tricks import UpdateMonitor
        >>> UpdateMonitor(every_n_steps=10, layers=1, band=(1e-4, 1e-2)).every_n_steps
        10
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        measures: Sequence[Measure] = ("grad_norm", "weight_norm", "update_ratio"),
        layers: Layers = "module",
        band: tuple[float, float] | None = None,
        patience: int = 3,
        max_extra_memory: int | None = None,
    ) -> None:
        check_count("UpdateMonitor", "every_n_steps", every_n_steps, 1, "optimizer steps", "50 is the default")
        _check_measures(measures, band, max_extra_memory)
        check_layers("UpdateMonitor", layers)
        self._band = as_band(band, patience)
        if max_extra_memory is not None:
            check_count("UpdateMonitor", "max_extra_memory", max_extra_memory, 1, "bytes", "None sets no limit")
        self.every_n_steps, self.measures, self.layers = every_n_steps, tuple(measures), layers
        self.band, self.patience, self.max_extra_memory = band, patience, max_extra_memory
        self.last: dict[str, float] = {}
        self._outside: dict[str, int] = {}  # logs in a row, by layer
        self._counts: list[int] = []  # measured steps of each optimizer, up to the last checkpoint or the run's end
        self._noise = GradientNoise()
        self._on = self._sharded = False
        self._watch = self._new_watch()

    def _new_watch(self) -> StepWatch:
        wanted = {name for measure in self.measures for name in SUMS[measure]}
        return StepWatch("UpdateMonitor", self.layers, wanted, self.max_extra_memory)

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's configuration shows."""
        layers = self.layers if isinstance(self.layers, (str, int)) else list(self.layers)
        settings = {"every_n_steps": self.every_n_steps, "measures": list(self.measures), "layers": layers}
        if self.band is not None:
            settings |= {"band": list(self.band), "patience": self.patience}
        if self.max_extra_memory is not None:
            settings["max_extra_memory"] = self.max_extra_memory
        return settings

    # ------------------------------------------------------------------ when

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be measured, and a second owner of the keys; a new run counts anew."""
        refuse_twins(self, trainer, "the keys grad_norm, weight_norm and update_ratio")
        refuse_sharded("UpdateMonitor", trainer, dtensors=True)
        if stage == "fit" and trainer.global_step == 0:
            self._outside, self._noise, self._counts = {}, GradientNoise(), []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See what there is to measure, if there is a logger to tell."""
        log_settings(self, trainer)
        if not trainer.loggers or trainer.log_every_n_steps == 0:
            return
        hold_parts(pl_module)
        self._sharded = any(isinstance(parameter, DTensor) for parameter in pl_module.parameters())
        check_names("UpdateMonitor", [name for name, _ in pl_module.named_parameters()], self.layers)
        self._watch.turns(pl_module)
        self._watch.counts.update(dict(zip(map(id, trainer.optimizers), self._counts, strict=False)))
        if "noise_scale" in self.measures:
            self._noise.begin(trainer, pl_module)
        self._watch.scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._on = True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Parameters may have been replaced."""
        self._watch.forget_names()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether the coming step is a logged one, or the one before it."""
        if not self._on:
            return
        step, watch = trainer.fit_loop.epoch_loop._batches_that_stepped + 1, self._watch
        if step % self.every_n_steps == 0:
            watch.due = {id(optimizer) for optimizer in trainer.optimizers}
        if "update_cosine" in self.measures and (step + 1) % self.every_n_steps == 0:
            watch.leading = {id(optimizer) for optimizer in trainer.optimizers}
        if not (watch.due or watch.leading):
            return
        if self._sharded:
            hold_parts(pl_module)
        watch.begin_batch(pl_module, trainer.optimizers)
        if watch.due and "noise_scale" in self.measures:
            self._noise.begin_batch(trainer)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Watch the gradients of one batch on one rank."""
        if self._watch.due and "noise_scale" in self.measures:
            self._noise.begin_backward(self._watch.of(trainer.optimizers[0]).parameters)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The gradients of one batch on one rank have been seen."""
        if self._watch.due and "noise_scale" in self.measures:
            parameters = self._watch.of(trainer.optimizers[0]).parameters
            self._noise.end_backward(parameters, self._watch.loss_scale(pl_module.device))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure the gradients while they are fresh and unclipped."""
        self._watch.see_gradients(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move what was measured to the host at once, and log it in one row."""
        watch = self._watch
        if not watch:
            return
        if watch.measured:
            self.last = self._summary(trainer)
            log_scalars(trainer, {**self.last, **self._tell_of_outsiders(trainer)})
        watch.end_batch()
        if trainer.accumulate_grad_batches > 1 and trainer.fit_loop._should_accumulate():
            return
        if "noise_scale" in self.measures:
            self._noise.forget()
        watch.end_step()
        if pl_module.automatic_optimization:
            watch.due = set()  # a step that was skipped has no row; a module that steps by hand may do so later
        if not watch.due and self.every_n_steps > 1:  # else the next step is measured as well
            watch.unhook()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop watching."""
        say_if_never_due("UpdateMonitor", trainer, self.every_n_steps)
        self._counts = self._counted(trainer)
        self._detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop watching; a checkpoint of the exception has the counts."""
        self._counts = self._counted(trainer)
        self._detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching."""
        self._detach()

    def _detach(self) -> None:
        self._watch.unhook()
        self._noise.forget()
        self._on, self._watch = False, self._new_watch()

    # ------------------------------------------------------------------ saved

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save in the checkpoint's own keys: Lightning refuses two callbacks of one class before they can say why."""
        means = {"signal": self._noise.signal, "noise": self._noise.noise}
        checkpoint[KEY] = {"outside": dict(self._outside), "measured": self._counted(trainer), **means}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with the counts and the means of a checkpoint, if it has any."""
        if trainer.state.fn == TrainerFn.FITTING and KEY in checkpoint:
            self._outside, self._counts = dict(checkpoint[KEY]["outside"]), list(checkpoint[KEY]["measured"])
            self._noise = GradientNoise(checkpoint[KEY]["signal"], checkpoint[KEY]["noise"])

    def __getstate__(self) -> dict[str, Any]:
        noise = GradientNoise(self._noise.signal, self._noise.noise)
        return state_without_module(self, _on=False, _watch=self._new_watch(), _noise=noise)

    def _counted(self, trainer: pl.Trainer) -> list[int]:
        return [self._watch.counts[id(optimizer)] for optimizer in trainer.optimizers] if self._on else self._counts

    # ------------------------------------------------------------------ what

    def _summary(self, trainer: pl.Trainer) -> dict[str, float]:
        small, steps = self._noise.over_ranks(trainer), self._watch.measured
        numbers = iter(to_host([*(tensor for step in steps for tensor in step.to_move()), *small]))
        sums = joined([step.of_each(numbers) for step in steps])
        layers = steps[0].layers if len(steps) == 1 else [layer for step in steps for layer in step.layers]
        result = layer_values(layers, sums, self.measures)
        if small:
            large = sum(norm * norm for norm in sums["gradient"] if norm is not None)  # each is known
            result |= self._noise.scale(next(numbers)[0], large)
        return result

    def _tell_of_outsiders(self, trainer: pl.Trainer) -> dict[str, float]:
        """Name the layers that have left the band, each once."""
        if self._band is None:
            return {}
        prefix = "update_ratio/"
        ratios = {key.removeprefix(prefix): x for key, x in self.last.items() if key.startswith(prefix)}
        total = ratios.pop("total", 0.0)
        self._outside, news = self._band(self._outside, ratios or {"the model": total})
        if not news:
            return {}
        alert(trainer, "Layers outside the update band", self._band.sentence(news))
        return {"event/update_band": 1.0}


def _check_measures(measures: Any, band: Any, limit: Any) -> None:
    known, condition = get_args(Measure), f"names out of {', '.join(get_args(Measure))}"
    fix = "('grad_norm', 'weight_norm', 'update_ratio') is the default"
    if isinstance(measures, str) or not isinstance(measures, Sequence) or not all(isinstance(x, str) for x in measures):
        raise TypeError(message("UpdateMonitor", "measures", condition, measures, fix))
    if not measures or len(set(measures)) < len(measures) or not set(measures) <= set(known):
        raise ValueError(message("UpdateMonitor", "measures", f"different {condition}", measures, fix))
    if band is not None and "update_ratio" not in measures:
        fix = "Add 'update_ratio', which the band is of"
        raise ValueError(message("UpdateMonitor", "band", "None without that measure", band, fix))
    if limit is not None and "update_cosine" in measures:
        fix = "It compares the updates of two steps in a row, and so needs all of both; leave one of them out"
        raise ValueError(message("UpdateMonitor", "max_extra_memory", "None beside 'update_cosine'", limit, fix))
