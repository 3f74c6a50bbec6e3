"""What LRSchedule and ParamSchedule share: when a clock begins, counts, is saved and ends."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tricks.callbacks.clock import Clock, OnMismatch, OnNewHorizon
from lightning_tricks.callbacks.param_groups import chosen_optimizers, read_value
from lightning_tricks.callbacks.steps import after_real_steps, name_in, refuse_twins, state_without_module
from lightning_tricks.functional.checks import check_count, check_flag
from lightning_tricks.functional.schedules import Schedule, describe
from lightning_tricks.loggers import log_scalars, log_settings

KEY = "schedules"
"""Where a checkpoint has the clocks, by the name of what is scheduled and the optimizer's place."""


@dataclass
class Target:
    """An optimizer, the clock that counts its steps, and the values its groups were given in code."""

    optimizer: Optimizer
    clock: Clock
    given: list[Any]
    groups: int = 0  # how many have the value in force


class Scheduled(Callback):
    """A value that follows a schedule of the real steps of one optimizer or of all.

    A subclass says what the value is: `apply` sets it, `values` reads it.

    Args:
        name: what is scheduled.
        schedule, total_steps, optimizer, on_new_horizon, on_mismatch, prog_bar: as in `LRSchedule`.
    """

    owner: ClassVar[str]

    def __init__(
        self,
        name: str,
        schedule: Schedule,
        total_steps: int | None,
        optimizer: int | None,
        on_new_horizon: OnNewHorizon,
        on_mismatch: OnMismatch,
        prog_bar: bool,
    ) -> None:
        Clock(self.owner, schedule, total_steps, on_new_horizon, on_mismatch)  # checks them
        if optimizer is not None:
            check_count(self.owner, "optimizer", optimizer, 0, "index", "None takes all")
        check_flag(self.owner, "prog_bar", prog_bar, "True shows the value in the progress bar")
        self._options = total_steps, on_new_horizon, on_mismatch
        self.name, self.schedule, self.total_steps = name, schedule, total_steps
        self.optimizer, self.prog_bar = optimizer, prog_bar
        names = {key: value for key, value in (("name", name), ("optimizer", optimizer)) if value not in ("lr", None)}
        self._state_key = self._generate_state_key(**names) if names else type(self).__qualname__
        self._logging = self._resumed = False
        self._targets: dict[int, Target] = {}
        self._handles: list[RemovableHandle] = []
        self._loaded: dict[int, dict[str, Any]] = {}  # states of a checkpoint
        self._last: dict[int, dict[str, Any]] = {}  # states at the end of the last fit

    def apply(self, target: Target) -> None:
        """Set the value in force at the clock's step."""
        raise NotImplementedError

    def values(self, trainer: pl.Trainer) -> dict[str, float]:
        """The values in force, by their names in a log."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's configuration shows."""
        length = next((state["total_steps"] for state in self._states().values()), None) or self.total_steps
        settings = {"schedule": describe(self.schedule), "total_steps": length}
        return settings if self.optimizer is None else {**settings, "optimizer": self.optimizer}

    # ------------------------------------------------------------------ when

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a second owner of the same value; forget a checkpoint that was never gone on with."""
        refuse_twins(self, trainer, f"{self.name!r} of an optimizer", self._is_rival)
        self._loaded = {}

    def _is_rival(self, other: "Scheduled") -> bool:
        apart = None not in (self.optimizer, other.optimizer) and self.optimizer != other.optimizer
        return self.name == other.name and not apart

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the clocks, and let them go on from a checkpoint or from the fit before."""
        chosen = chosen_optimizers(self.owner, trainer, self.optimizer)
        for place, optimizer in chosen.items():
            parts = [repr(self.name)] if self.name != "lr" else []
            parts += [f"optimizer={place}"] if len(trainer.optimizers) > 1 else []
            label = f"{self.owner}({', '.join(parts)})" if parts else self.owner
            given = [read_value(group, self.name) for group in optimizer.param_groups]
            self._targets[place] = Target(optimizer, Clock(label, self.schedule, *self._options), given)
        self._take_up(self._last if trainer.global_step > 0 else {})

    def _take_up(self, last: dict[int, dict[str, Any]]) -> None:
        """Let the clocks go on from a checkpoint, or else from this."""
        self._resumed = bool(self._loaded)
        states, self._loaded = self._loaded or last, {}
        for place, target in self._targets.items():
            if place not in states:
                continue
            target.clock.load_state_dict(states[place])
            # Of a distributed checkpoint an optimizer takes up only what it has itself by now.
            for group, base in zip(target.optimizer.param_groups, states[place].get("bases", ()), strict=False):
                if self._resumed and base is not None:
                    group[f"initial_{self.name}"] = base

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the length from the run, set the values of the first step, and count real steps from here."""
        for target in self._targets.values():
            target.clock.begin(trainer)
            self._set(target)
            self._compare_bases(target)
            hooks = partial(self._advance, target), partial(self._before_step, target)
            self._handles += after_real_steps(self.owner, [target.optimizer], *hooks)
        self._logging = bool(trainer.loggers) and self.logs(trainer)
        log_settings(self, trainer)

    def _compare_bases(self, target: Target) -> None:
        """Say that a resumed optimizer has the base values of its checkpoint, if those of the code are others."""
        both = zip(self._bases(target), target.given, strict=False)
        pairs = [(float(old), float(new)) for old, new in both if old and new]
        if self._resumed and any(old != new for old, new in pairs):
            old, new = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            rank_zero_info(
                f"{target.clock.owner}: the base values are the checkpoint's, {old}, and not those of the code, {new}:"
                " torch restores the groups of an optimizer."
            )

    def _advance(self, target: Target, optimizer: Optimizer) -> None:
        target.clock.step += 1
        self._set(target)

    def _before_step(self, target: Target, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self._schedule_new_groups(target)

    def _schedule_new_groups(self, target: Target) -> None:
        """Set the value of groups that something has added since, and say what their bases are."""
        count = len(target.optimizer.param_groups)
        if target.groups == count:
            return
        added = range(target.groups, count)
        self._set(target)
        bases = [base for place, base in enumerate(self._bases(target)) if place in added and base is not None]
        if bases and not all(bases):
            rank_zero_warn(
                f"{target.clock.owner}: a group was added with a value of 0, which is its base, and stays at 0. Give it"
                " another, as in BaseFinetuning.unfreeze_and_add_param_group(..., lr=0.001)."
            )
        elif bases:
            texts = ", ".join(f"{float(base):.4g}" for base in bases)
            rank_zero_info(
                f"{target.clock.owner}: a group was added; what it had, {texts}, is its base, now times"
                f" {target.clock.factor:.4g}."
            )

    def _set(self, target: Target) -> None:
        self.apply(target)
        target.groups = len(target.optimizer.param_groups)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the values of groups that are new, and show what the batch is trained with."""
        for target in self._targets.values():
            self._schedule_new_groups(target)
        if self._logging and trainer._logger_connector.should_update_logs:
            log_scalars(trainer, self.values(trainer))
        if self.prog_bar:
            pl_module.log_dict(self.values(trainer), prog_bar=True, logger=False)

    def logs(self, trainer: pl.Trainer) -> bool:
        """Whether the values are for this callback to log."""
        return True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare an epoch by hand with what was assumed of it."""
        for target in self._targets.values():
            target.clock.end_epoch(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop counting, and compare the schedule's end with the training's."""
        self._stop()
        for target in self._targets.values():
            target.clock.end(trainer.should_stop)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the optimizers, after every other callback has ended its training."""
        self.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Undo all that was done."""
        self.release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Undo all that was done."""
        self.release()

    def release(self) -> None:
        """Stop counting and let go of the optimizers; a second time does nothing."""
        self._stop()
        self._last = self._states()
        self._targets, self._loaded = {}, {}

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ------------------------------------------------------------------ saved

    @property
    def state_key(self) -> str:
        """What tells it from others of its class in a checkpoint."""
        return self._state_key

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the clocks in the checkpoint's own keys."""
        name_in(checkpoint, self)
        checkpoint.setdefault(KEY, {}).setdefault(self.name, {}).update(self._states())

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up the clocks of a checkpoint, if it has any, and forget an earlier fit."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._loaded, self._last = checkpoint.get(KEY, {}).get(self.name, {}), {}
            if self._targets:  # strategies that shard restore only after `on_fit_start`
                self._take_up({})

    def _states(self) -> dict[int, dict[str, Any]]:
        """The clocks' states, while they run and afterwards."""
        running = {
            place: {**target.clock.state_dict(), "bases": self._bases(target)}
            for place, target in self._targets.items()
        }
        return running or self._last

    def _bases(self, target: Target) -> list[Any]:
        return [group.get(f"initial_{self.name}") for group in target.optimizer.param_groups]

    def __getstate__(self) -> dict[str, Any]:
        return state_without_module(self, _targets={}, _handles=[], _last=self._states())
