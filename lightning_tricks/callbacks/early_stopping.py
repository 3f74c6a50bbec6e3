"""Lightning's early stopping, with checks to ignore, a decision all ranks share, and the best weights at the end."""

from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_tricks.callbacks.ema import EMA
from lightning_tricks.callbacks.steps import LIGHTNINGS_AVERAGES
from lightning_tricks.callbacks.weights import named_weights
from lightning_tricks.functional.checks import message
from lightning_tricks.functional.stopping import Patience, PatienceState, Stop
from lightning_tricks.loggers import log_settings


class EarlyStopping(pl.callbacks.EarlyStopping):
    """Stop when a metric no longer improves, and end with the weights that were best.

        improved = score < best - min_delta       (mode "min"; "max" the other way round)
        stop after `patience` checks in a row without an improvement

    A subclass of Lightning's, with its arguments in its order and its attributes (`best_score`, `wait_count`,
    `stopped_epoch`, `stopping_reason`). It adds `ignore_first` and `restore_best`; all ranks decide on rank 0's score
    (a non-finite one on any rank counts for all); a stop that `min_epochs` held up is taken back when the score
    improves meanwhile; a resumed run has the new `patience`, not the checkpoint's.

    `restore_best` keeps the weights that produced the best score: the average of `EMA` if validation evaluated that.
    `fit` ends with them in the module, whatever the order of the callbacks; checkpoints carry them for a resume.

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
        TypeError, ValueError: an argument out of range, or `restore_best` in two callbacks of one Trainer.
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
        self.ignore_first = ignore_first
        self.restore_best = restore_best
        self.checks = 0
        self.best_weights: dict[str, Tensor] | None = None
        self._candidate: tuple[Tensor, dict[str, Tensor]] | None = None
        self._before_validation: Tensor | None = None
        self._asked_to_stop = False
        self._has_news = False
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
        owners = [other.monitor for other in trainer.callbacks if getattr(other, "restore_best", False)]
        if self.restore_best and len(owners) > 1:
            fix = "Both would own the weights that fit ends with; keep it on one"
            raise ValueError(message("EarlyStopping", "restore_best", "True in one callback only", owners, fix))
        others = [type(other).__name__ for other in trainer.callbacks if isinstance(other, LIGHTNINGS_AVERAGES)]
        if self.restore_best and others:
            fix = "It cannot see what that evaluates, and that overwrites the final weights; use lightning_tricks.EMA"
            raise ValueError(
                message("EarlyStopping", "restore_best", "False beside Lightning's averaging", others, fix)
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the settings; what was asked of an earlier fit is over."""
        log_settings(self, trainer)
        self._fitting, self._asked_to_stop = True, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing to check yet: Lightning may end the epoch of a checkpoint once more, without having trained."""
        self._has_news = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The run has gone on."""
        self._has_news = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the score there is, to know a new one."""
        self._before_validation = trainer.callback_metrics.get(self.monitor)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the weights of a score that would be the best, and check if validation is when to."""
        if self._should_skip_check(trainer) or trainer.fast_dev_run:
            return
        self._has_news = True
        score = trainer.callback_metrics.get(self.monitor)
        self._candidate = None
        if (
            self.restore_best
            and score is not None
            and score is not self._before_validation
            and self.rule(self._state(), self._agreed(trainer, score))[0].improved
        ):
            self._candidate = score, self._evaluated_weights(trainer, pl_module)
        if not self._check_on_train_epoch_end:
            self._check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check if the end of the epoch is when to."""
        skip = self._should_skip_check(trainer) or trainer.fast_dev_run
        if self._check_on_train_epoch_end and self._has_news and not skip:
            self._check(trainer, pl_module)

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
            rank_zero_info(f"EarlyStopping: no score of {self.monitor} counted; the last weights are kept.")
            return
        for callback in trainer.callbacks:
            if isinstance(callback, EMA):
                callback.finish(trainer, pl_module)
        with torch.no_grad():
            for name, tensor in named_weights(pl_module).items():
                if name in self.best_weights:
                    tensor.copy_(self.best_weights[name])

    def _state(self) -> PatienceState:
        return PatienceState(checks=self.checks, waited=self.wait_count, best=self.best_score)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        if not self._validate_condition_metric(metrics):
            return
        score = metrics[self.monitor]
        previous = self.best_score
        state, stop = self.rule(self._state(), self._agreed(trainer, score))
        self.checks, self.wait_count = state.checks, state.waited
        self.best_score = state.best
        if state.improved and self.restore_best:
            if self._candidate is not None and self._candidate[0] is score:
                self.best_weights = self._candidate[1]
            else:
                self.best_weights = _copies(named_weights(pl_module))
        self._candidate = None
        if stop is not None:
            self._stop(trainer, stop)
        elif state.improved:
            self._go_on(trainer)
            self._say(trainer, f"{self.monitor} improved from {float(previous):g} to {float(self.best_score):g}")

    def _stop(self, trainer: pl.Trainer, stop: Stop) -> None:
        self._asked_to_stop = self._asked_to_stop or not trainer.should_stop
        trainer.should_stop = True
        self.stopped_epoch = trainer.current_epoch
        self.stopping_reason = EarlyStoppingReason[stop.kind]
        self.stopping_reason_message = f"{self.monitor}: {stop.reason}"
        self._say(trainer, self.stopping_reason_message)

    def _go_on(self, trainer: pl.Trainer) -> None:
        if self._asked_to_stop:
            trainer.should_stop = self._asked_to_stop = False
            self.stopped_epoch = 0
            self.stopping_reason, self.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None

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

    def _evaluated_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        for callback in trainer.callbacks:
            if isinstance(callback, EMA):
                return _copies(callback.evaluated_weights(pl_module))
        return _copies(named_weights(pl_module))

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state, the checks seen, and the best weights if they are to be restored."""
        return {**super().state_dict(), "checks": self.checks, "best_weights": self.best_weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the count of the checkpoint and the patience of this callback."""
        patience = self.patience
        super().load_state_dict(state_dict)
        self.patience = patience
        # A checkpoint of Lightning's own early stopping has neither.
        self.checks = state_dict.get("checks", self.ignore_first)
        self.best_weights = state_dict.get("best_weights")


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
