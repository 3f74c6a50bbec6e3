"""The trials of an ablation: what they are, what they came to, and whether a stored result is theirs."""

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from lightning_tricks.ablations.designs import Design
from lightning_tricks.functional.checks import message

Build: TypeAlias = Callable[[int, list[Callback], list[Logger]], tuple[Any, ...]]
"""(seed, callbacks, loggers) -> (trainer, module, data...)."""
Trick: TypeAlias = "Callback | Sequence[Callback] | Callable[[], Callback | Sequence[Callback]]"
TRIALS, RESULT = "trials", "result.json"


@dataclass(frozen=True)
class Result:
    """What a training came to.

    Args:
        score: of the metric, after `fit`.
        steps: `trainer.global_step` at its end.
        seconds: wall-clock time of `fit`.
        memory: peak during `fit` (bytes): allocated on the GPU, resident of the process on a CPU; None where the system
            does not tell.
    """

    score: float
    steps: int
    seconds: float
    memory: int | None


@dataclass(frozen=True)
class Plan:
    """All that a trial needs to know; it can be sent to another process."""

    build: Build
    tricks: Mapping[str, Trick]
    design: Design
    seeds: tuple[int, ...]
    metric: str
    evaluate: Literal["validate", "test"]
    folder: Path
    project: str | None

    @property
    def trials(self) -> dict[str, tuple[str, int]]:
        """Id -> variant and seed; whole pairs come early."""
        return {trial_id(name, seed): (name, seed) for seed in self.seeds for name in self.design.variants}

    def callbacks(self, variant: str) -> list[Callback]:
        """New callbacks of the tricks that are on."""
        return [callback for name in self.design.variants[variant] for callback in make_callbacks(self.tricks[name])]

    def settings(self, trial: str) -> dict[str, Any]:
        """What must be as it was for a stored result to be this trial's."""
        variant, seed = self.trials[trial]
        tricks = {
            name: list(map(_described, make_callbacks(self.tricks[name]))) for name in self.design.variants[variant]
        }
        settings = {
            "seed": seed,
            "tricks": tricks,
            "metric": self.metric,
            "evaluate": self.evaluate,
            "build": _source(self.build),
        }
        return json.loads(json.dumps(settings, default=_text))  # type: ignore[no-any-return]

    def read(self, trial: str) -> tuple[Result, dict[str, Any]] | None:
        """A finished trial's result and its budget; None if it is not finished.

        Raises:
            ValueError: it was another trial.
        """
        path = self.folder / TRIALS / trial / RESULT
        if not path.is_file():
            return None
        stored = json.loads(path.read_text())
        for key, value in self.settings(trial).items():
            if stored["settings"].get(key) != value:
                fix = f"It has changed since {trial} was trained: give another folder, or delete {path.parent}"
                got = f"{value!r} beside {stored['settings'].get(key)!r}"
                raise ValueError(message("ablate", key, "what it was for the trials in the folder", got, fix))
        return Result(**stored["result"]), stored["budget"]


def trial_id(variant: str, seed: int) -> str:
    """The name of a trial, of its folder and of its run."""
    return f"{variant}-seed{seed}"


def make_callbacks(trick: Trick) -> list[Callback]:
    """New callbacks: copies of those given, or what a function makes.

    Args:
        trick: a callback, several, or a function that makes these.
    Raises:
        TypeError: something else.
    """
    made = deepcopy(trick) if isinstance(trick, (Callback, Sequence)) else trick() if callable(trick) else trick
    several = [made] if isinstance(made, Callback) else made
    if not isinstance(several, Sequence) or not all(isinstance(callback, Callback) for callback in several):
        fix = "Such as {'EMA': lt.EMA(0.999)}, or lambda: [lt.EMA(0.999)] for callbacks that cannot be copied"
        raise TypeError(message("ablate", "tricks", "callbacks, lists of them or functions that make them", made, fix))
    return list(several)


def _described(callback: Callback) -> dict[str, Any]:
    """A callback's class and settings; of one that has no settings its plain attributes."""
    plain = {key: value for key, value in vars(callback).items() if isinstance(value, (bool, int, float, str))}
    kind = type(callback)
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "settings": getattr(callback, "settings", plain)}


def _text(item: Any) -> str:
    """What an object says of itself, which is the same in every process."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(item))


def _source(build: Build) -> str:
    try:
        text = inspect.getsource(build)
    except (OSError, TypeError):  # of no file, or no function
        text = getattr(build, "__qualname__", type(build).__qualname__)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
