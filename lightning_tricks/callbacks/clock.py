"""How far an optimizer has come in its run, and the factor that a schedule gives at that point."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_tricks.functional.checks import check_count, message
from lightning_tricks.functional.schedules import Schedule, check_schedule, describe, is_ours, resolve_epochs, survey

STATE = ("step", "total_steps", "steps_per_epoch", "scale", "schedule")
OnNewHorizon = Literal["stretch", "keep"]
OnMismatch = Literal["refuse", "use_new"]


class Clock:
    """Real steps of one optimizer, the length of the run they belong to, and a schedule of both.

    Until `begin`, and for good in `fast_dev_run`, the factor is 1.

    Args:
        owner: callback named in messages.
        schedule: (step, total_steps) -> factor.
        total_steps: length of the run; None takes it from the run.
        on_new_horizon: what a run that is gone on with by another length does: `"stretch"` the schedule to the new
            length, or `"keep"` the old one.
        on_mismatch: what a run that is gone on with under another schedule does: `"refuse"`, or `"use_new"`.
    Raises:
        TypeError, ValueError: what is no schedule, no length or no such choice.
    """

    def __init__(
        self,
        owner: str,
        schedule: Schedule,
        total_steps: int | None = None,
        on_new_horizon: OnNewHorizon = "stretch",
        on_mismatch: OnMismatch = "refuse",
    ) -> None:
        check_schedule(owner, "schedule", schedule)
        if total_steps is not None:
            check_count(owner, "total_steps", total_steps, 1, "optimizer steps", "None takes it from the run")
        _check_choice(owner, "on_new_horizon", on_new_horizon, "stretch", "keep")
        _check_choice(owner, "on_mismatch", on_mismatch, "refuse", "use_new")
        self.owner, self.given, self.given_steps = owner, schedule, total_steps
        self.on_new_horizon, self.on_mismatch = on_new_horizon, on_mismatch
        self.schedule: Schedule | None = None  # without epochs, once the run has begun
        self.step = 0
        self.total_steps: int | None = None
        self.steps_per_epoch: int | None = None
        self.scale = 1.0  # what the batch multiplies every factor by
        self.highest = 1.0
        # Between two training steps the caches are cold: factors ahead cost a fifth when they are computed together. A
        # user's own function may look at a clock.
        self._ahead: list[float] = []
        self._begin, self._block = 0, 256 if is_ours(schedule) else 1
        self._guess: tuple[int, int] | None = None  # steps and batches at the beginning, where they are to be equal
        self.restored = self.kept = self.told = False

    @property
    def factor(self) -> float:
        """The factor of the base value that is in force now."""
        if self.schedule is None or self.total_steps is None:
            return 1.0
        place = self.step - self._begin
        if not 0 <= place < len(self._ahead):
            place, self._begin = 0, self.step
            steps = range(self.step, max(min(self.step + self._block, self.total_steps), self.step) + 1)
            self._ahead = [float(self.schedule(step, self.total_steps)) for step in steps]
        return self._ahead[place] * self.scale

    def begin(self, trainer: pl.Trainer) -> None:
        """Take the length from the run, look at the whole schedule, and say what it is; loops are restored by now."""
        if trainer.fast_dev_run:
            return
        if not self.restored and trainer.global_step > 0:
            self.step = trainer.global_step // len(trainer.optimizers)
            share = "" if len(trainer.optimizers) == 1 else ", if all optimizers have done as many"
            self._say(f"the run so far was trained without it; the schedule goes on at step {self.step}{share}.")
        steps_per_epoch = epoch_length(trainer)
        total_steps = run_length(self.owner, trainer) if self.given_steps is None else self.given_steps
        schedule = self._resolve(steps_per_epoch)
        if self.restored and self.total_steps is not None:
            total_steps, steps_per_epoch, schedule = self._meet_horizon(total_steps, steps_per_epoch, schedule)
        seen = survey(self.owner, schedule, total_steps)
        self.highest = max(factor for _, factor in seen)
        self.schedule, self.total_steps, self.steps_per_epoch = schedule, total_steps, steps_per_epoch
        step = next(step for step, factor in seen if factor == self.highest)
        self._guess = None
        if self.given_steps is None and not trainer.lightning_module.automatic_optimization:
            self._guess = (self.step, trainer.fit_loop.epoch_loop.batch_progress.total.processed)
        assumed = "" if self._guess is None else " (one for each batch is assumed)"
        self._say(
            f"{describe(self.given)} over {total_steps} optimizer steps{assumed}: factor {seen[0][1]:.4g} at first, at"
            f" most {self.highest:.4g} (step {step}), {seen[-1][1]:.4g} at the end."
        )

    def _meet_horizon(
        self, total_steps: int, steps_per_epoch: int | None, schedule: Schedule
    ) -> tuple[int, int | None, Schedule]:
        """The lengths to go on with, the old ones or the new, and the schedule for them; says which if they differ."""
        assert self.total_steps is not None
        same_epochs = steps_per_epoch == self.steps_per_epoch or schedule is self.given
        if total_steps == self.total_steps and same_epochs:
            return total_steps, steps_per_epoch, schedule
        # An explicit length is what the user wants now.
        self.kept = self.on_new_horizon == "keep" and self.given_steps is None
        self._say(
            f"the run had {self.total_steps} optimizer steps ({self.steps_per_epoch} an epoch), now it has"
            f" {total_steps} ({steps_per_epoch}); the schedule {'keeps its length' if self.kept else 'is stretched'}"
            f" and goes on at step {self.step} (on_new_horizon={self.on_new_horizon!r})."
        )
        if not self.kept:
            return total_steps, steps_per_epoch, schedule
        return self.total_steps, self.steps_per_epoch, self._resolve(self.steps_per_epoch)

    def end_epoch(self, trainer: pl.Trainer) -> None:
        """Warn once if the first epoch by hand had not the steps that were assumed."""
        if self._guess is None:
            return
        done = self.step - self._guess[0]
        assumed = trainer.fit_loop.epoch_loop.batch_progress.total.processed - self._guess[1]
        if assumed == 0:
            return
        self._guess = None
        if abs(done - assumed) > 0.01 * assumed:
            self.told = True
            rank_zero_warn(
                f"{self.owner}: an epoch by hand has {done} optimizer steps, and the schedule assumes {assumed}, one"
                " for each batch. Give total_steps=."
            )

    def end(self, asked_to_stop: bool) -> None:
        """Warn if the training was more than 1 % shorter or longer than the schedule, and that made a difference."""
        if self.schedule is None or self.total_steps is None or self.kept or self.told:
            return
        if abs(self.step - self.total_steps) <= 0.01 * self.total_steps or self._makes_no_difference():
            return
        last = self.schedule(self.step, self.total_steps)
        fix = "Give total_steps= if this was to be the whole run."
        if self.step < self.total_steps:
            end = self.schedule(self.total_steps, self.total_steps)
            what = f"had come to a factor of {last:.4g} instead of {end:.4g}"
            fix = "A callback had asked to stop." if asked_to_stop else fix
        else:
            what = f"stood at {last:.4g} for the last {self.step - self.total_steps} of them"
        rank_zero_warn(
            f"{self.owner}: the schedule is for {self.total_steps} optimizer steps, and training ended after"
            f" {self.step}: it {what}. {fix}"
        )

    def _makes_no_difference(self) -> bool:
        """Whether the schedule for the steps that were done would have been the same."""
        assert self.schedule is not None
        assert self.total_steps is not None
        try:
            ideal = survey(self.owner, self.schedule, max(self.step, 1))
        except Exception:  # a warmup longer than what was done, or whatever a user's function raises
            return False
        return all(factor == self.schedule(step, self.total_steps) for step, factor in ideal)

    def _resolve(self, steps_per_epoch: int | None) -> Schedule:
        schedule: Schedule = resolve_epochs(self.given, math.inf if steps_per_epoch is None else steps_per_epoch)
        return schedule

    def _say(self, text: str) -> None:
        rank_zero_info(f"{self.owner}: {text}")

    def state_dict(self) -> dict[str, Any]:
        """The step, the length of the run and of the epochs it belongs to, and the schedule as text."""
        values = self.step, self.total_steps, self.steps_per_epoch, self.scale, describe(self.given)
        return dict(zip(STATE, values, strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the count of another run; the length follows in `begin`."""
        self.check_same(state["schedule"])
        self.step, self.total_steps = state["step"], state["total_steps"]
        self.steps_per_epoch, self.scale, self.restored = state["steps_per_epoch"], state["scale"], True

    def check_same(self, old: str) -> None:
        """Refuse, or say, that what a checkpoint was trained under is not this schedule."""
        new = describe(self.given)
        if old == new:
            return
        if self.on_mismatch == "refuse":
            fix = f"This run has {new}. Resume with the old one, or give on_mismatch='use_new'"
            raise ValueError(message(self.owner, "checkpoint", "of a run under the same schedule", old, fix))
        self._say(f"the checkpoint was trained under {old}; from here on it is {new}.")


def epoch_length(trainer: pl.Trainer) -> int | None:
    """Optimizer steps of an epoch; None where it has no length, or not always the same.

    Args:
        trainer: the trainer in `on_train_start`.
    """
    batches = trainer.num_training_batches / trainer.accumulate_grad_batches
    if not math.isfinite(batches) or changes_accumulation(trainer):
        return None
    return math.ceil(batches)


def changes_accumulation(trainer: pl.Trainer) -> bool:
    """Whether a callback changes the batches of an optimizer step between epochs.

    Args:
        trainer: a trainer.
    """
    return any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)


def run_length(
    owner: str, trainer: pl.Trainer, fix: str = "Give total_steps=..., the optimizer steps of the whole run"
) -> int:
    """Optimizer steps of the whole run, for each optimizer: those that are done and those that are left.

    Steps that a GradScaler skipped are among those done: a run that was not stopped had counted on them.

    Args:
        owner: callback named in an error.
        trainer: the trainer in `on_train_start`, with its loops restored.
        fix: what the callback's user is to do where the run does not tell it.
    Returns:
        Steps from the beginning of the run; under manual optimization as many as batches.
    Raises:
        ValueError: it cannot be known; the error names `total_steps` as the way out.
    """
    got: Any = None
    optimizers, steps_per_epoch = len(trainer.optimizers), epoch_length(trainer)
    if changes_accumulation(trainer):
        got = "an accumulation that changes between epochs"
    elif optimizers > 1 and trainer.max_steps != -1:
        got = f"max_steps={trainer.max_steps} shared by {optimizers} optimizers"
    elif trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
        got = "endless training (neither max_epochs nor max_steps ends it)"
    elif steps_per_epoch is None and trainer.max_steps == -1:
        got = "a loader without a length and no max_steps"
    elif steps_per_epoch is None and trainer.max_epochs not in (None, -1):
        got = "a loader without a length, and max_epochs beside max_steps"
    if got is not None:
        raise ValueError(message(owner, "total_steps", "known", got, fix))
    if trainer.max_epochs in (None, -1) or steps_per_epoch is None:
        return trainer.max_steps
    loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    automatic = trainer.lightning_module.automatic_optimization
    done = trainer.global_step if automatic else epoch_loop.batch_progress.total.processed
    # `current_epoch` is one too low after a resume under max_steps.
    total_steps: int = done + (trainer.max_epochs - loop.epoch_progress.current.processed) * steps_per_epoch
    if loop.restarting:  # maybe in mid-epoch: of its steps some are done, and a batch that failed is done again
        ended = epoch_loop.restarted_on_train_batch_end
        batches = epoch_loop.batch_progress.current.completed + ended
        if batches < trainer.num_training_batches:
            total_steps -= batches // trainer.accumulate_grad_batches
        elif not ended:  # else Lightning begins a new epoch
            total_steps -= steps_per_epoch
    return total_steps if trainer.max_steps == -1 else min(total_steps, trainer.max_steps)


def _check_choice(owner: str, name: str, value: Any, *choices: str) -> None:
    if value not in choices:
        raise ValueError(message(owner, name, f"one of {', '.join(choices)}", value, "Choose one of them"))
