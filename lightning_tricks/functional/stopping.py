"""Early stopping as a frozen rule beside its visible state: `rule(state, value) -> (state, stop or None)`."""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lightning_tricks.functional.checks import check_count, check_number, message


class PatienceState(NamedTuple):
    """What a patience rule remembers between two checks.

    Args:
        checks: checks seen so far, the ignored ones included.
        waited: checks since the best score.
        best: the best score so far; None before the first that counted.
        improved: whether the last check gave the best score.
    Example:
        >>> PatienceState()
        PatienceState(checks=0, waited=0, best=None, improved=False)
    """

    checks: int = 0
    waited: int = 0
    best: Any = None
    improved: bool = False


class Stop(NamedTuple):
    """Why a rule stops training.

    Args:
        kind: the name that Lightning's `EarlyStoppingReason` has for it.
        reason: the same in a sentence, with the numbers.
    Example:
        >>> Stop("PATIENCE_EXHAUSTED", "no improvement in the last 3 checks").kind
        'PATIENCE_EXHAUSTED'
    """

    kind: Literal["NON_FINITE_METRIC", "STOPPING_THRESHOLD", "DIVERGENCE_THRESHOLD", "PATIENCE_EXHAUSTED"]
    reason: str


@dataclass(frozen=True)
class Patience:
    """Stop after `patience` checks in a row without an improvement.

        improved = value < best - min_delta        (mode "min")
        improved = value > best + min_delta        (mode "max")

    The first `ignore_first` checks are not looked at: they neither count, nor stop, nor can be the best.

    Args:
        patience: checks without improvement after which to stop; at least 0.
        min_delta: smallest change that is an improvement, in the score's own unit; at least 0.
        mode: "min" or "max".
        ignore_first: checks at the beginning that are not looked at; at least 0.
        check_finite: stop on a NaN or infinite score.
        stopping_threshold: stop as soon as the score is better than this.
        divergence_threshold: stop as soon as the score is worse than this.
    Returns:
        Called with (state, value), value a number or 0-dim tensor: the next state, and why to stop or None.
    Raises:
        TypeError, ValueError: a value out of range.
    References:
        Prechelt, "Early Stopping - But When?", 1998, the criterion UP.
    Example:
        >>> rule, state = Patience(patience=2), PatienceState()
        >>> for loss in (1.0, 0.5, 0.6, 0.7):
        ...     state, stop = rule(state, loss)
        >>> state.best, stop.reason
        (0.5, 'no improvement in the last 2 checks; the best score was 0.5')
    """

    patience: int = 3
    min_delta: float = 0.0
    mode: Literal["min", "max"] = "min"
    ignore_first: int = 0
    check_finite: bool = True
    stopping_threshold: float | None = None
    divergence_threshold: float | None = None

    def __post_init__(self) -> None:
        owner = "EarlyStopping"  # whose arguments these are
        check_count(owner, "patience", self.patience, 0, "validation checks", "Try 5")
        check_count(owner, "ignore_first", self.ignore_first, 0, "validation checks", "0 ignores none")
        fix = "It is the smallest improvement that counts"
        check_number(owner, "min_delta", self.min_delta, "at least 0", fix, lambda value: value >= 0)
        for name in ("stopping_threshold", "divergence_threshold"):
            if (threshold := getattr(self, name)) is not None:
                check_number(owner, name, threshold, "finite", "It is a value of the score; None switches it off")
        if self.mode not in ("min", "max"):
            fix = "A loss wants 'min', an accuracy 'max'"
            raise ValueError(message(owner, "mode", "'min' or 'max'", self.mode, fix))

    def _better(self, value: Any, other: Any, delta: float = 0.0) -> bool:
        return bool(value + delta < other) if self.mode == "min" else bool(value - delta > other)

    def __call__(self, state: PatienceState, value: Any) -> tuple[PatienceState, Stop | None]:
        state = state._replace(checks=state.checks + 1, improved=False)
        if state.checks <= self.ignore_first:
            return state, None
        worst = math.inf if self.mode == "min" else -math.inf
        best = worst if state.best is None else state.best
        if self.check_finite and not math.isfinite(value):
            return state, Stop("NON_FINITE_METRIC", f"the score {float(value):g} is not finite")
        if (target := self.stopping_threshold) is not None and self._better(value, target):
            if self._better(value, best):  # where min_epochs hold a stop up, an earlier score may have passed it too
                state = state._replace(waited=0, best=value, improved=True)
            reason = f"the score {float(value):g} is better than stopping_threshold={target:g}"
            return state, Stop("STOPPING_THRESHOLD", reason)
        if (limit := self.divergence_threshold) is not None and self._better(limit, value):
            reason = f"the score {float(value):g} is worse than divergence_threshold={limit:g}"
            return state, Stop("DIVERGENCE_THRESHOLD", reason)
        if self._better(value, best, self.min_delta):
            return state._replace(waited=0, best=value, improved=True), None
        state = state._replace(waited=state.waited + 1)
        if state.waited < self.patience:
            return state, None
        known = f"the best score was {float(best):g}" if math.isfinite(best) else "there was no finite score"
        reason = f"no improvement in the last {state.waited} checks; {known}"
        return state, Stop("PATIENCE_EXHAUSTED", reason)
