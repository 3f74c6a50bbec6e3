"""What the trials of an ablation say: means, paired differences with their intervals, costs."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Literal

from lightning_tricks.ablations.designs import BASELINE, MEANING, Design, Kind
from lightning_tricks.ablations.trials import Result
from lightning_tricks.functional.bootstrap import LEAST, bootstrap_interval

UNKNOWN = (-math.inf, math.inf)
DRAWS = 2_000_000
"""Values that an interval draws: its ends come within 1 % of its half width of those of endlessly many."""


@dataclass(frozen=True)
class Effect:
    """What a trick did to the score, and what it cost.

    Args:
        differences: a seed each, of the score with it less the score without it.
        interval: ends of the 95 % interval of their mean; infinite with fewer than 3 seeds and where it is not known.
        time: wall-clock time of `fit` that it adds, as a share of the baseline's (median over seeds).
        memory: peak memory that it adds (bytes, median over seeds); None where the system does not tell.
        helps: whether the interval says so: True, False where it harms, None where it holds 0.
    Example:
        >>> Effect((1.0, 2.0, 3.0), (0.5, 3.5), time=0.05, memory=None, helps=True).difference
        2.0
    """

    differences: tuple[float, ...]
    interval: tuple[float, float]
    time: float
    memory: float | None
    helps: bool | None

    @property
    def difference(self) -> float:
        """Mean over the seeds."""
        return _mean(self.differences)


@dataclass(frozen=True)
class Ablation:
    """What came of an ablation; `print` shows its tables.

    Args:
        metric: name of the score.
        mode: "min" or "max", what is better.
        design: "one-at-a-time", "leave-one-out" or "full": says what a difference is.
        results: variant -> seed -> score, steps, seconds and memory of a finished trial.
        effects: trick -> what it did.
        unfinished: ids of trials that are still to be trained.
        failed: id -> error, of trials that were tried and failed.
    Example:
        >>> ablation = Ablation("val/loss", "min", "full", results={}, effects={}, unfinished=("baseline-seed0",))
        >>> "1 trial is unfinished: baseline-seed0" in str(ablation)
        True
    """

    metric: str
    mode: Literal["min", "max"]
    design: Kind
    results: Mapping[str, Mapping[int, Result]]
    effects: Mapping[str, Effect]
    unfinished: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        tables = [line for rows in (self._scores(), effect_rows(self)) for line in (*_markdown(list(rows)), "")]
        return "\n".join([*tables, *notes(self)]) + "\n"

    def _scores(self) -> Iterator[list[str]]:
        yield [self.metric, "mean", "standard deviation", "each seed", "optimizer steps", "seconds"]
        for name, runs in self.results.items():
            if runs:
                scores = [run.score for run in runs.values()]
                spread = f"{_deviation(scores):.2g}" if len(scores) > 1 else "-"
                each = ", ".join(f"{score:.4g}" for score in scores)
                steps = sorted({run.steps for run in runs.values()})
                counts = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
                seconds = median(run.seconds for run in runs.values())
                yield [name, f"{_mean(scores):.4g}", spread, each, counts, f"{seconds:.3g}"]


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]


def effect_rows(ablation: Ablation) -> Iterator[list[str]]:
    """The table of effects, its head first."""
    yield ["trick", "paired difference", "95 % interval", "what it says", "time", "peak memory"]
    for name, effect in ablation.effects.items():
        low, high = effect.interval
        interval = f"{signed(low, effect)} to {signed(high, effect)}" if math.isfinite(high) else "unknown"
        memory = "-" if effect.memory is None else f"{_rounded(effect.memory / 2**20, 1):+.1f} MiB"
        time = f"{_rounded(effect.time, 3):+.1%}"
        yield [name, signed(effect.difference, effect), interval, verdict(effect), time, memory]


def verdict(effect: Effect) -> str:
    """What its interval says of a trick."""
    neither = "no effect seen" if math.isfinite(effect.interval[1]) else "unknown"
    return {True: "helps", False: "harms", None: neither}[effect.helps]


def signed(value: float, effect: Effect) -> str:
    """A difference with its sign, as exact as the second digit of its interval's width, and as the first of its ends.

    Args:
        value: on the scale of the effect's differences; nan where a training diverged.
        effect: which has the interval.
    Example:
        >>> effect = Effect((0.0,), (-0.00305, 0.0031), time=0.0, memory=None, helps=None)
        >>> signed(0.000333, effect), signed(-0.00305, effect)
        ('+0.0003', '-0.0031')
    """
    if math.isnan(value):
        return "diverged"
    low, high = effect.interval
    if not 0 < high - low < math.inf:
        return f"{value:+.3g}"
    decimals = max(1 + _decimals(high - low), *(_decimals(end) for end in (low, high) if end))
    return f"{_rounded(value, decimals):+.{decimals}f}" if 0 <= decimals <= 6 else f"{value:+.3g}"


def _decimals(value: float) -> int:
    """Those that show its first digit."""
    return -math.floor(math.log10(abs(value)))


def _rounded(value: float, decimals: int) -> float:
    return round(value, decimals) + 0.0  # without -0


def notes(ablation: Ablation) -> Iterator[str]:
    """What the tables mean and what is missing of them, in sentences."""
    better = {"min": "Lower", "max": "Higher"}[ablation.mode]
    yield f"Difference: {ablation.metric} {MEANING[ablation.design]}, at the same seed. {better} is better."
    yield "Interval: smoothed bootstrap-t over the seeds. Of twenty tricks without effect, one seems to have one."
    yield "Time and memory: the same differences, medians over the seeds, time as a share of the baseline's."
    pairs = {len(effect.differences) for effect in ablation.effects.values()}
    if pairs:
        yield f"Pairs of trainings: {' to '.join(str(count) for count in sorted({min(pairs), max(pairs)}))}."
    if any(math.isinf(effect.interval[1]) for effect in ablation.effects.values()):
        why = f"with fewer than {LEAST} pairs, where a training diverged, and where all seeds came to the same"
        yield f"An interval is unknown {why}."
    for name, steps in other_steps(ablation.results).items():
        yield f"{name} took {steps}, and nothing asked it to stop: what it does is also what its budget does."
    if ablation.unfinished:
        count = len(ablation.unfinished)
        yield f"{count} trial{'s are' if count > 1 else ' is'} unfinished: {', '.join(ablation.unfinished)}."
    for error, trials in by_text(ablation.failed).items():
        yield f"{', '.join(trials)} failed: {error}"


def other_steps(results: Mapping[str, Mapping[int, Result]]) -> dict[str, str]:
    """The variants that trained longer or shorter than the baseline, where neither was stopped early.

    Args:
        results: variant -> seed -> result.
    Example:
        >>> other_steps({"baseline": {0: Result(0.5, 16, 1.0, None)}, "a": {0: Result(0.4, 40, 2.0, None)}})
        {'a': '40 optimizer steps beside 16 of the baseline'}
    """
    base = results.get(BASELINE, {})
    return {
        name: f"{run.steps} optimizer steps beside {base[seed].steps} of the baseline"
        for name, runs in results.items()
        for seed, run in runs.items()
        if seed in base and run.steps != base[seed].steps and not (run.stopped or base[seed].stopped)
    }


def by_text(errors: Mapping[str, str]) -> dict[str, list[str]]:
    """What failed with each error.

    Args:
        errors: name -> error.
    Example:
        >>> by_text({"a": "no memory", "b": "no data", "c": "no memory"})
        {'no memory': ['a', 'c'], 'no data': ['b']}
    """
    found: dict[str, list[str]] = {}
    for name, error in errors.items():
        found.setdefault(error, []).append(name)
    return found


def find_effects(
    design: Design, results: Mapping[str, Mapping[int, Result]], mode: Literal["min", "max"]
) -> dict[str, Effect]:
    """Compare trainings of the same seed.

    Args:
        design: what is compared.
        results: variant -> seed -> result. A seed counts where neither a training of a comparison nor the baseline is
            missing.
        mode: "min" or "max".
    Returns:
        What is compared -> its effect; a comparison without any seed is left out.
    """
    effects = {}
    for name, weights in design.contrasts.items():
        needed = [set(results.get(variant, ())) for variant in (*weights, BASELINE)]
        seeds = sorted(set.intersection(*needed))
        if seeds:
            runs = [{variant: results[variant][seed] for variant in (*weights, BASELINE)} for seed in seeds]
            effects[name] = _effect(weights, runs, mode)
    return effects


def _effect(weights: Mapping[str, float], seeds: list[dict[str, Result]], mode: str) -> Effect:
    """One comparison, from what each seed came to."""

    def contrast(quantity: Callable[[Result], float]) -> list[float]:
        return [_sum(weight * quantity(runs[variant]) for variant, weight in weights.items()) for runs in seeds]

    scores = contrast(lambda run: run.score)
    varied = any(len({runs[variant].score for runs in seeds}) > 1 for variant in weights)
    low, high = _interval(scores) if varied else UNKNOWN  # a build that draws nothing repeats one training
    better = None if low <= 0 <= high else (low > 0) == (mode == "max")
    bases = [runs[BASELINE].seconds for runs in seeds]
    times = [time / base for time, base in zip(contrast(lambda run: run.seconds), bases, strict=True)]
    told = all(runs[variant].memory is not None for runs in seeds for variant in weights)
    memory = median(contrast(lambda run: run.memory or 0)) if told else None
    return Effect(tuple(scores), (low, high), median(times), memory, better)


def _sum(terms: Iterable[float]) -> float:
    """Exact, so that what cancels leaves 0; nan where nothing can be said."""
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):  # of numbers around 1e308, and of inf - inf
        return math.nan


def _mean(numbers: Sequence[float]) -> float:
    """nan where a training diverged."""
    return fmean(numbers) if all(map(math.isfinite, numbers)) else math.nan


def _deviation(numbers: Sequence[float]) -> float:
    return stdev(numbers) if all(map(math.isfinite, numbers)) else math.nan


def _interval(scores: list[float]) -> tuple[float, float]:
    """Nothing is known of too few seeds, nor of a training that diverged."""
    if len(scores) < LEAST or not all(map(math.isfinite, scores)):
        return UNKNOWN
    return bootstrap_interval(scores, resamples=max(10_000, DRAWS // len(scores)))
