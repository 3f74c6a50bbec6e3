"""The trials of an ablation: what they are, what they came to, and whether a stored result is theirs."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from lightning_tricks.ablations.designs import Design
from lightning_tricks.ablations.fingerprints import fingerprint, full_name
from lightning_tricks.callbacks.post_hoc_ema import PostHocEMA
from lightning_tricks.callbacks.snapshot_ensemble import SnapshotEnsemble
from lightning_tricks.functional.checks import message

Build: TypeAlias = Callable[[int, list[Callback], list[Logger]], tuple[Any, ...]]
"""(seed, callbacks, loggers) -> (trainer, module, data...)."""
Trick: TypeAlias = "Callback | Sequence[Callback] | Callable[[], Callback | Sequence[Callback]]"
TRIALS, RESULT = "trials", "result.json"
FORMAT = f"2 on Python {sys.version_info.major}.{sys.version_info.minor}"
"""What a result is read by: fingerprints are of the code that this Python makes of a source."""


@dataclass(frozen=True)
class Result:
    """What a training came to.

    Args:
        score: of the metric, after `fit`.
        steps: `trainer.global_step` at its end.
        seconds: wall-clock time of `fit`.
        memory: peak during `fit` (bytes): allocated on the GPU, resident of the process on a CPU; None where the system
            does not tell.
        stopped: whether something asked it to stop before its budget ended, such as `EarlyStopping`.
    """

    score: float
    steps: int
    seconds: float
    memory: int | None
    stopped: bool = False


@dataclass(frozen=True)
class Plan:
    """All that a trial needs to know; it can be sent to another process."""

    build: Build
    tricks: Mapping[str, Trick]
    version: str  # of build, as it was before anything ran; so are these of the tricks
    described: Mapping[str, Mapping[str, Any]]
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
        tricks = {name: self.described[name] for name in self.design.variants[variant]}
        return {"seed": seed, "tricks": tricks, "evaluate": self.evaluate, "build": self.version}

    def read(self, trial: str) -> dict[str, Any] | None:
        """What a finished trial wrote; None if it is not finished.

        Raises:
            ValueError: it was another trial; its file is damaged, or of another format.
        """
        path = self._path(trial)
        if not path.is_file():
            return None
        stored = _stored(path)
        for key, value in self.settings(trial).items():
            changed = _changed(key, value, stored["settings"].get(key))
            if changed is not None:
                fix = f"It or what it calls has changed since {trial} was trained"
                fix = f"{fix}: give another folder, or delete {path.parent}"
                raise ValueError(message("ablate", key, "what it was for the trials in the folder", changed, fix))
        return stored

    def result(self, stored: Mapping[str, Any]) -> Result | None:
        """A finished trial as seen by this metric; None if it did not measure it."""
        metrics = stored["metrics"]
        return Result(metrics[self.metric], **stored["costs"]) if self.metric in metrics else None

    def check_metric(self, newest: Mapping[str, Any] | None = None) -> None:
        """Raise if trials are finished, and none has measured the metric.

        Args:
            newest: what a trial came to, which another rank may not have written yet.
        Raises:
            ValueError: so it is.
        """
        finished: list[Mapping[str, Any]] = [] if newest is None else [newest]
        finished += [_stored(path) for path in map(self._path, self.trials) if path.is_file()]
        if finished and not any(map(self.result, finished)):
            logged = ", ".join(finished[0]["metrics"]) or "nothing"
            place = self.folder / TRIALS
            fix = f"trainer.{self.evaluate} logged {logged}. What was trained is kept; if the module has changed since,"
            fix = f"{fix} delete {place}"
            raise ValueError(message("ablate", "metric", "one that the module logs", self.metric, fix))

    def _path(self, trial: str) -> Path:
        return self.folder / TRIALS / trial / RESULT


def _stored(path: Path) -> dict[str, Any]:
    """What a file says, if it says all that is needed."""
    fix = f"Delete {path}, and it is trained again"
    try:
        stored = json.loads(path.read_text())
        if (written := stored.get("format")) == FORMAT and _is_whole(stored):
            return stored  # type: ignore[no-any-return]
    except (AttributeError, KeyError, TypeError, ValueError):
        written = FORMAT
    if written != FORMAT:
        fix = f"Give another folder, or delete {path.parent.parent}: another version wrote {path}"
        raise ValueError(message("ablate", "result.json", f"of format {FORMAT!r}", written, fix))
    raise ValueError(message("ablate", "result.json", "as a trial writes it", f"{path}", fix))


def _is_whole(stored: Mapping[str, Any]) -> bool:
    """Whether the values are of their types; raises where one is missing."""
    result = Result(0.0, **stored["costs"])
    numbers = [*stored["metrics"].values(), result.steps, result.seconds, result.memory or 0, result.stopped]
    dicts = (stored["budget"], stored["settings"], _fingerprints(stored["settings"]["tricks"]))
    return all(isinstance(n, (int, float)) for n in numbers) and all(isinstance(each, dict) for each in dicts)


def _fingerprints(tricks: Mapping[str, Any]) -> dict[str, str]:
    """What of tricks is compared; the rest is there to be read."""
    return {name: trick["fingerprint"] for name, trick in tricks.items()}


def _changed(key: str, value: Any, other: Any) -> Any:
    """What of a setting is another one; None if all is the same."""
    if key == "tricks":
        now, then = _fingerprints(value), _fingerprints(other)
        return [name for name in {**now, **then} if now.get(name) != then.get(name)] or None
    return None if value == other else "another one" if key == "build" else value


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
    try:
        made = deepcopy(trick) if isinstance(trick, (Callback, Sequence)) else trick() if callable(trick) else trick
    except TypeError as error:
        if not isinstance(trick, type):
            raise
        fix = f"Say how it is made: {trick.__name__}(...). {error}".rstrip(".")
        raise TypeError(message("ablate", "tricks", "callbacks, and not the class of one", trick, fix)) from error
    several = [made] if isinstance(made, Callback) else made
    listed = isinstance(several, Sequence) and len(several) > 0
    if not listed or not all(isinstance(callback, Callback) for callback in several):
        fix = "Such as {'EMA': lt.EMA(0.999)}, or lambda: [lt.EMA(0.999)] for callbacks that cannot be copied"
        raise TypeError(message("ablate", "tricks", "callbacks, lists of them or functions that make them", made, fix))
    return list(several)


def describe_trick(trick: Trick) -> dict[str, Any]:
    """What a trick's callbacks are, to be read, and the fingerprint that is compared with a later one.

    Args:
        trick: as `make_callbacks` takes it.
    Raises:
        TypeError: something else, or what cannot be compared with a later one.
        ValueError: a folder of its own, which would be that of all trials.
    """
    made = make_callbacks(trick)
    for callback in made:
        if isinstance(callback, (PostHocEMA, SnapshotEnsemble)) and callback.directory is not None:
            fix = "Leave it out: each trial has its own"
            raise ValueError(message("ablate", f"{type(callback).__name__}.directory", "None", callback.directory, fix))
    compared = " ".join(map(_whole, made))  # first: it refuses what cannot be shown
    return {"callbacks": list(map(_shown, made)), "fingerprint": compared}


def find_fingerprint(name: str, item: Any) -> str:
    """Shorten what an argument is made of.

    Args:
        name: of the argument.
        item: it, or a part of it.
    Raises:
        TypeError: it cannot be described, so a later call could not tell whether it is the same.
    """
    try:
        return fingerprint(item)
    except (TypeError, ValueError, RecursionError) as error:
        fix = "Make what cannot be pickled inside of the function or of its hooks, or give the callback `settings`"
        raise TypeError(message("ablate", name, "made of what a later call can compare", f"{error}", fix)) from error


def _whole(callback: Callback) -> str:
    """The fingerprint of all that a callback holds, or of what it says of itself."""
    try:
        return find_fingerprint("tricks", callback)
    except TypeError:
        if not hasattr(callback, "settings"):
            raise
        return find_fingerprint("tricks", (type(callback), callback.settings))


def _shown(callback: Callback) -> str:
    plain = {key: value for key, value in vars(callback).items() if isinstance(value, (bool, int, float, str))}
    return f"{full_name(type(callback))} {getattr(callback, 'settings', plain)}"
