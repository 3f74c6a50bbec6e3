"""Lightning's early stopping, with checks to ignore, a decision all ranks share, and the best weights at the end."""

from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_tricks.callbacks.ema import EMA
from lightning_tricks.callbacks.shards import hold_parts, split_as
from lightning_tricks.callbacks.steps import LIGHTNINGS_AVERAGES, refuse_sharded, state_without_module
from lightning_tricks.callbacks.weights import named_weights
from lightning_tricks.functional.checks import message
from lightning_tricks.functional.metric_names import doubt
from lightning_tricks.functional.slots import weight_slots
from lightning_tricks.functional.stopping import Patience, PatienceState, Stop
from lightning_tricks.loggers import log_scalars, log_settings


class EarlyStopping(pl.callbacks.EarlyStopping):
    """Stop when a metric no longer improves, and end with the weights that were best.

        improved = score < best - min_delta       (mode "min"; "max" the other way round)
        stop after `patience` checks in a row without an improvement

    A subclass of Lightning's, with its arguments in its order and its attributes (`best_score`, `wait_count`,
    `stopped_epoch`, `stopping_reason`). It adds `ignore_first` and `restore_best`; all ranks decide on rank 0's score
    (a non-finite one on any rank counts for all); while `min_epochs` hold training up, later checks decide anew; a
    score that was checked already is not checked again; a resumed run has the new `patience`, not the checkpoint's; a
    new Trainer begins anew.

    `restore_best` keeps the weights that produced the best score: the average of `EMA` if validation evaluated that.
    `fit` ends with them in the module, whatever the order of the callbacks; checkpoints carry them for a resume. Of
    parameters in parts (DTensor: FSDP2, tensor parallelism) each rank keeps its own; a checkpoint has whole ones, also
    one that is distributed, which rank 0 gathers one at a time.

    Args:
        monitor: metric to look at, as the module logs it.
        min_delta: smallest change that is an improvement, in the metric's unit; at least 0.
        patience: checks without improvement after which to stop; a check is a validation, not an epoch.
        verbose: say when the score improves and why training stops.
        mode: "min" or "max".
        strict: raise if the metric is missing; otherwise such checks are skipped.
        check_finite: stop on a NaN or infinite score.
        stopping_threshold: stop as soon as the score is better than this.
        divergence_threshold: stop as soon as the score is worse than this.
        check_on_train_epoch_end: check at the end of the training epoch rather than of validation; None takes the
            former if validation runs once an epoch.
        log_rank_zero_only: let rank 0 alone say something.
        ignore_first: checks at the beginning that are not looked at, NaN included: they neither count, nor stop, nor
            can be the best.
        restore_best: end `fit` with the weights of the best score.
    Raises:
        TypeError, ValueError: an argument out of range, or `restore_best` in two callbacks of one Trainer, or with
            FSDP1 or DeepSpeed.
        RuntimeError: the metric is missing and `strict`.
    References:
        Prechelt, "Early Stopping - But When?", 1998, the criterion UP.
    Example:
        >>> from lightning_tricks import EarlyStopping
        >>> EarlyStopping("val/loss", patience=5, ignore_first=3, restore_best=True).patience
        5
    """

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
        *,
        ignore_first: int = 0,
        restore_best: bool = False,
    ) -> None:
        if not isinstance(monitor, str) or not monitor:
            fix = "Give the name under which the module logs it, as 'val/loss'"
            raise TypeError(message("EarlyStopping", "monitor", "the name of a metric", monitor, fix))
        self.rule = Patience(
            patience=patience,
            min_delta=min_delta,
            mode=cast(Literal["min", "max"], mode),
            ignore_first=ignore_first,
            check_finite=check_finite,
            stopping_threshold=stopping_threshold,
            divergence_threshold=divergence_threshold,
        )
        super().__init__(
            monitor,
            min_delta,
            patience,
            verbose,
            mode,
            strict,
            check_finite,
            stopping_threshold,
            divergence_threshold,
            check_on_train_epoch_end,
            log_rank_zero_only,
        )
        if odd := doubt("EarlyStopping", monitor, mode):
            rank_zero_warn(odd)
        self.ignore_first = ignore_first
        self.restore_best = restore_best
        self.checks = 0
        self.best_weights: dict[str, Tensor] | None = None
        # The score of a validation that is still to be checked, and its weights if it would be the best.
        self._pending: tuple[Tensor, dict[str, Tensor] | None] | None = None
        self._before: Tensor | None = None  # the score there was before the validation
        self._checked: Tensor | None = None  # the score there was at the last check
        self._stop: Stop | None = None  # what the last check asked for, while min_epochs or min_steps hold it up
        self._asked = False  # to stop, in this fit: Lightning validates once more before it does
        self._has_news = False
        self._resumed = False
        self._fitting = False

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's configuration shows."""
        names = ["monitor", "patience", "mode", "ignore_first", "restore_best", "check_finite", "stopping_threshold"]
        names += ["divergence_threshold"]
        return {"min_delta": self.rule.min_delta, **{name: getattr(self, name) for name in names}}

    # ------------------------------------------------------------------ when

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a second owner of the final weights."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.global_step == 0:
            self._begin_anew()
        ours = [other for other in trainer.callbacks if isinstance(other, EarlyStopping)]
        owners = [other.monitor for other in ours if other.restore_best]
        if self.restore_best and len(owners) > 1:
            fix = "Both would own the weights that fit ends with; keep it on one"
            raise ValueError(message("EarlyStopping", "restore_best", "True in one callback only", owners, fix))
        others = [type(other).__name__ for other in trainer.callbacks if isinstance(other, LIGHTNINGS_AVERAGES)]
        if self.restore_best:
            refuse_sharded("EarlyStopping", trainer, dtensors=True)
        if self.restore_best and others:
            fix = "It cannot see what that evaluates, and that overwrites the final weights; use lightning_tricks.EMA"
            condition = "False beside Lightning's averaging"
            raise ValueError(message("EarlyStopping", "restore_best", condition, others, fix))

    def _begin_anew(self) -> None:
        """A new Trainer is a new run, maybe of another module: nothing of the last one may decide or be restored."""
        self.checks = self.wait_count = self.stopped_epoch = 0
        self.best_score = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        self.stopping_reason, self.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None
        self.best_weights = self._pending = self._stop = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on scores count."""
        self._fitting = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing to check yet: Lightning may end the epoch of a checkpoint once more, without having trained."""
        self._has_news = self._asked = False
        if self.best_weights is not None:  # a checkpoint has whole ones
            self.best_weights = _parts(self.best_weights, pl_module)
        log_settings(self, trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The run has gone on, maybe as far as `min_steps`."""
        self._has_news = True
        self._end_if_allowed(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the score there is, to know a new one."""
        self._before = trainer.callback_metrics.get(self.monitor)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the new score, with the weights that produced it; check it now if this is when to."""
        if self._should_skip_check(trainer) or trainer.fast_dev_run:
            return
        self._has_news, self._resumed = True, False
        score = trainer.callback_metrics.get(self.monitor)
        if score is not None and score is not self._before:
            value, weights = self._agreed(trainer, score), None
            if self.restore_best and self.rule(self._state(), value)[0].improved:
                weights = self._weights(trainer, pl_module, evaluated=True)
            self._pending = value, weights
        if not self._check_on_train_epoch_end:
            self._check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check if the end of the epoch is when to; an earlier check may have waited for it."""
        news = self._has_news or self._pending is not None
        if self._check_on_train_epoch_end and news and not (self._should_skip_check(trainer) or trainer.fast_dev_run):
            self._check(trainer, pl_module)
        self._end_if_allowed(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the best weights into the module, after an average has taken its place there."""
        self._end_with_the_best(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the weights there are."""
        self._fitting = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End with the best weights of a checkpoint too, after which there was nothing to train."""
        self._end_with_the_best(trainer, pl_module)

    # ------------------------------------------------------------------ what

    def _end_with_the_best(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fitting, self._fitting = self._fitting, False
        if not (fitting and self.restore_best):
            return
        if self.best_weights is None:
            rank_zero_info(
                f"EarlyStopping: {self.checks} checks of {self.monitor}, of which the first {self.ignore_first} do not"
                " count, found no best weights; the last ones are kept."
            )
            return
        for callback in trainer.callbacks:
            if isinstance(callback, EMA):
                callback.finish(trainer)
        best_weights = _parts(self.best_weights, pl_module)
        for name, holder, key in weight_slots(pl_module):
            tensor, best = holder[key], best_weights.get(name)
            if tensor is None or best is None:
                continue
            if tensor.shape == best.shape:
                tensor.detach().copy_(best)
            elif isinstance(tensor, nn.Parameter):
                tensor.data = best.to(tensor.device)
            else:  # a buffer that has grown since
                holder[key] = best.to(tensor.device)

    def _state(self) -> PatienceState:
        return PatienceState(checks=self.checks, waited=self.wait_count, best=self.best_score)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        score = metrics.get(self.monitor)
        if self._pending is None:
            # Lightning restores no metrics: a resumed run has none before its next validation.
            if (score is None and self._resumed) or not self._validate_condition_metric(metrics) or score is None:
                return
            if score is self._checked:  # no new one since
                return
            value, weights = self._agreed(trainer, score), None
        else:
            value, weights = self._pending
        self._pending, self._checked = None, score
        previous = self.best_score
        state, self._stop = self.rule(self._state(), value)
        self.checks, self.wait_count = state.checks, state.waited
        self.best_score = state.best
        if state.improved:
            if self.restore_best:
                # A score of training was made by the raw weights.
                self.best_weights = weights or self._weights(trainer, pl_module, evaluated=False)
            before = f"improved from {float(previous):g} to" if torch.isfinite(previous) else "begins at"
            self._say(trainer, f"{self.monitor} {before} {float(self.best_score):g}")
        self._end_if_allowed(trainer)

    def _end_if_allowed(self, trainer: pl.Trainer) -> None:
        """End the training if the last check said so, once there are `min_epochs` and `min_steps`."""
        if self._stop is None or self._asked or not trainer.fit_loop._can_stop_early:
            return
        stop, self._stop = self._stop, None
        trainer.should_stop = self._asked = True
        self.stopped_epoch = trainer.current_epoch
        self.stopping_reason = EarlyStoppingReason[stop.kind]
        self.stopping_reason_message = f"{self.monitor}: {stop.reason}"
        self._say(trainer, self.stopping_reason_message)
        log_scalars(trainer, {"event/early_stopping": 1.0})

    def _say(self, trainer: pl.Trainer, text: str) -> None:
        if self.verbose:
            self._log_info(trainer, f"EarlyStopping: {text}.", self.log_rank_zero_only)

    def _agreed(self, trainer: pl.Trainer, score: Tensor) -> Tensor:
        """Rank 0's score on every rank; a non-finite one if any rank has that and it would stop."""
        own = score.detach().squeeze().cpu()
        if trainer.world_size == 1:
            return own
        agreed = trainer.strategy.broadcast(own)
        finite = trainer.strategy.reduce_boolean_decision(bool(torch.isfinite(own)), all=True)
        return agreed if finite or not self.check_finite else agreed + torch.nan

    def _weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule, evaluated: bool) -> dict[str, Tensor]:
        """Copies of the weights that validation evaluated last, or of the raw ones."""
        hold_parts(pl_module)
        weights = named_weights(pl_module)
        for callback in trainer.callbacks:
            if isinstance(callback, EMA):
                weights |= callback.evaluated_weights(self.monitor) if evaluated else callback.raw_weights()
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state, the checks seen, a stop that waits, and the best weights if they are to be restored.

        Parts are gathered, by all ranks together, and rank 0 alone has the whole then.
        """
        pending = self._pending
        if pending is not None:
            pending = pending[0], _whole(pending[1])
        waits = None if self._stop is None else tuple(self._stop)
        own = {"checks": self.checks, "best_weights": _whole(self.best_weights), "pending": pending, "stop": waits}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the count of the checkpoint and the patience of this callback."""
        patience = self.patience
        super().load_state_dict(state_dict)
        self.patience = patience
        # A checkpoint of Lightning's own early stopping has neither.
        self.checks = state_dict.get("checks", self.ignore_first)
        self.best_weights = state_dict.get("best_weights")
        self._pending = state_dict.get("pending")
        self._stop = Stop(*state_dict["stop"]) if state_dict.get("stop") else None
        self._resumed = True

    def __getstate__(self) -> dict[str, Any]:
        return state_without_module(self)


def _whole(weights: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The weights with whole tensors in place of parts; on rank 0 alone where there are parts."""
    if weights is None or not any(isinstance(tensor, DTensor) for tensor in weights.values()):
        return weights
    gathered = {}
    for name, tensor in weights.items():
        if isinstance(tensor, DTensor):  # the ranks exchange tensors where the mesh is, which may be a GPU
            tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()
        if dist.get_rank() == 0:
            gathered[name] = tensor.cpu()
    return gathered


def _parts(weights: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The weights with each rank's own part of those that the module has in parts; no communication."""
    hold_parts(module)
    live = named_weights(module)
    return {name: split_as(tensor, live.get(name)) for name, tensor in weights.items()}
