"""How many images of a batch are transformed and how strongly, at each point of a run."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tricks.callbacks.clock import Clock
from lightning_tricks.callbacks.steps import after_real_steps
from lightning_tricks.functional.checks import check_number, message
from lightning_tricks.functional.schedules import Duration, Schedule, check_schedule, describe
from lightning_tricks.functional.window import Window
from lightning_tricks.transforms import Transform
from lightning_tricks.transforms.choice import at_strength, check_prob, has_strength


class Dose:
    """A probability and a strength, each a number or a schedule of the first optimizer's real steps.

    In `fast_dev_run` and before the run has begun, schedules are taken at 1 and the window is open.

    Args:
        owner: callback named in messages.
        transforms: what they are of.
        prob, strength, start, stop, total_steps: as in `BatchTransforms`.
    Raises:
        TypeError, ValueError: as in `BatchTransforms`.
    """

    def __init__(
        self,
        owner: str,
        transforms: Sequence[Transform],
        prob: float | Schedule,
        strength: float | Schedule,
        start: Duration,
        stop: Duration | None,
        total_steps: int | None,
    ) -> None:
        self._owner, self._transforms, self._total_steps = owner, transforms, total_steps
        self._prob: float = 1.0 if callable(prob) else prob
        self._strength: float = 1.0 if callable(strength) else strength
        self._schedules: dict[str, Schedule] = {}
        # What the user gave: a window has a schedule of the probability for its own sake.
        edge = "start" if stop is None else "stop"
        self._named = {"prob": "prob" if callable(prob) else edge, "strength": "strength"}
        if callable(prob):
            check_schedule(owner, "prob", prob)
        else:
            check_prob(owner, prob)
        window = Window(prob if callable(prob) else 1.0, start, stop)
        if callable(prob) or start != 0 or stop is not None:
            self._schedules["prob"] = window
        if callable(strength):
            check_schedule(owner, "strength", strength)
            self._schedules["strength"] = strength
        else:
            self._at(strength)
        if strength != 1 and not any(map(has_strength, transforms)):
            fix = "Leave strength out; prob= makes transforms rarer"
            got = f"{list(transforms)}"
            raise ValueError(message(owner, "transforms", "such that one has a strength, with strength=", got, fix))
        if total_steps is not None and not self._schedules:
            fix = "It is the length of a schedule, or of a run that start= or stop= is in"
            raise ValueError(message(owner, "total_steps", "None where nothing depends on it", total_steps, fix))
        self._shown = {"prob": prob, "strength": strength, "start": start, "stop": stop}
        self._clocks = self._new_clocks()
        self._states: dict[str, dict[str, Any]] = {}  # of the clocks, in a checkpoint or at the end of the last fit
        self._handles: list[RemovableHandle] = []

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's configuration shows: what is not as usual."""
        usual = {"prob": 1, "strength": 1, "start": 0, "stop": None}
        chosen = {name: value for name, value in self._shown.items() if value != usual[name]}
        shown = {name: describe(value) if callable(value) else value for name, value in chosen.items()}
        lengths = [state["total_steps"] for state in self.states.values()]
        return {**shown, "total_steps": lengths[0] or self._total_steps} if lengths else shown

    @property
    def prob(self) -> float:
        """The probability in force for the batch of the next real step.

        Raises:
            ValueError: a schedule that has left [0, 1].
        """
        value = self._prob * self._factor("prob")
        if self._factor("prob") != 1:
            check_prob(self._owner, value)
        return value

    @property
    def transforms(self) -> list[Transform]:
        """The transforms at the strength in force for the batch of the next real step.

        Raises:
            ValueError: a schedule that has become negative.
        """
        return self._at(self._strength * self._factor("strength"))

    def _factor(self, name: str) -> float:
        return self._clocks[name].factor if name in self._clocks else 1.0

    def _at(self, strength: float) -> list[Transform]:
        fix = "1 takes the transforms as they are"
        check_number(self._owner, "strength", strength, "finite and at least 0", fix, lambda value: value >= 0)
        return [at_strength(transform, strength) for transform in self._transforms]

    def _new_clocks(self) -> dict[str, Clock]:
        return {
            name: Clock(f"{self._owner}({self._named[name]})", schedule, self._total_steps, on_mismatch="use_new")
            for name, schedule in self._schedules.items()
        }

    # ------------------------------------------------------------------ when

    def forget(self) -> None:
        """Another run begins."""
        self._clocks, self._states = self._new_clocks(), {}

    def load(self, states: dict[str, dict[str, Any]]) -> None:
        """Take up a checkpoint, when the run begins."""
        self._states = states

    def begin(self, trainer: pl.Trainer) -> None:
        """Take the length from the run, and count real steps from here."""
        self._clocks = self._new_clocks()
        for name, clock in self._clocks.items():
            if name in self._states:
                clock.load_state_dict(self._states[name])
            clock.begin(trainer)
        self._states = {}
        if "prob" in self._clocks:
            check_prob(self._owner, self._clocks["prob"].highest)
        if "strength" in self._clocks:
            self._at(self._clocks["strength"].highest)  # what a transform refuses, it refuses now
        if self._clocks:
            self._handles = after_real_steps(self._owner, trainer.optimizers[:1], self._advance)

    def _advance(self, optimizer: Optimizer) -> None:
        for clock in self._clocks.values():
            clock.step += 1

    def end_epoch(self, trainer: pl.Trainer) -> None:
        """Compare an epoch by hand with what was assumed of it."""
        for clock in self._clocks.values():
            clock.end_epoch(trainer)

    def end(self, trainer: pl.Trainer) -> None:
        """Stop counting, and compare the schedules' end with the training's."""
        self.release()
        for clock in self._clocks.values():
            clock.end(trainer.should_stop)

    def release(self) -> None:
        """Stop counting; a second time does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._states = self.states

    @property
    def states(self) -> dict[str, dict[str, Any]]:
        """Where the clocks stand; what was loaded, until the run has begun."""
        return self._states or {name: clock.state_dict() for name, clock in self._clocks.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handles": []}
