"""Numbers of the report: which keys mean what, the last and the best value, mean and spread."""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

from lightning_tricks.functional.checks import check_numbers, message
from lightning_tricks.functional.metric_names import better
from lightning_tricks.reports.runs import Run, Series, is_rate, natural

Mode = Literal["min", "max"]

QUANTITIES: dict[str, tuple[str, str]] = {
    "grad_norm": ("Gradient norm, before clipping", "norm of the gradients"),
    "grad_norm_clipped": ("Gradient norm, after clipping", "norm of the gradients"),
    "weight_norm": ("Weight norm", "norm of the weights"),
    "update_norm": ("Update norm", "norm of the update"),
    "update_ratio": ("Update ratio", "norm(update) / norm(weights)"),
    "grad_zeros": ("Gradients that are zero", "share"),
    "grad_nonfinite": ("Gradients that are not finite", "count"),
    "noise_scale": ("Gradient noise scale", "samples"),
    "update_cosine": ("Cosine between successive updates", "cosine"),
    "activation_mean": ("Activations: mean", "mean"),
    "activation_std": ("Activations: standard deviation", "standard deviation"),
    "activation_zeros": ("Activations: share of zeros", "share"),
    "activation_saturated": ("Activations: share that is saturated", "share"),
    "input_gradient_std": ("Gradients of the inputs: standard deviation", "standard deviation"),
    "output_gradient_std": ("Gradients of the outputs: standard deviation", "standard deviation"),
}
"""What the monitors log as `<quantity>/<layer>` and `<quantity>/total`: title and unit."""

CHAPTERS = {
    "Updates": ["update_ratio", "update_norm", "weight_norm", "update_cosine"],
    "Gradients": ["grad_norm", "grad_norm_clipped", "grad_zeros", "grad_nonfinite", "noise_scale"],
    "Activations": [name for name in QUANTITIES if name.startswith(("activation", "input", "output"))],
}

STAGES = {"train": "training", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}


class Best(NamedTuple):
    """A best value and the step it was logged at."""

    value: float
    step: int


def check_band(owner: str, band: tuple[float, float]) -> None:
    """Raise unless a band has a lower and a higher end, both finite and above 0.

    Args:
        owner: function named in an error.
        band: of ratios of update to weights.
    Raises:
        TypeError, ValueError: no such band.
    """
    condition, fix = "two numbers, 0 < low < high (update / weights)", "(1e-4, 1e-2) is the default"
    check_numbers(owner, "band", band, 2, condition, fix, lambda ends: 0 < ends[0] < ends[1])


def check_title(owner: str, title: Any) -> None:
    """Raise unless a title is text.

    Args:
        owner: function named in an error.
        title: of a page.
    Raises:
        TypeError: it is something else.
    """
    if not isinstance(title, str):
        raise TypeError(message(owner, "title", "a text", title, "'Training report' is the default"))


def quantity(key: str) -> str | None:
    """The quantity of a monitor's key, `event` of an event, `lr` of a learning rate; None of a metric."""
    first, _, rest = key.partition("/")
    if rest and (first in QUANTITIES or first == "event"):
        return first
    return "lr" if is_rate(key) else None


def schedule_keys(runs: Sequence[Run]) -> list[str]:
    """Keys of values that follow a schedule: learning rates, then what the settings say is scheduled."""
    keys = {key for run in runs for key in run.series if quantity(key) == "lr"}
    for run in runs:
        given = [each for each in run.tricks.values() if isinstance(each, Mapping)]
        names = [str(each["name"]) for each in given if "name" in each and "schedule" in each]
        follows = tuple(name + mark for name in names for mark in "-/")  # what several groups or optimizers add
        keys |= {key for key in run.series if key in names or key.startswith(follows)}
    return sorted(keys, key=lambda key: (quantity(key) != "lr", natural(key)))


def metric_keys(runs: Sequence[Run]) -> list[str]:
    """Keys of metrics: those of test and validation first."""
    keys = {key for run in runs for key in run.series if quantity(key) is None} - set(schedule_keys(runs))
    order = ["test", "validation", "", "training"]
    return sorted(keys, key=lambda key: (order.index(stage(key)[1]), natural(key)))


def by_metric(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Metrics that have a curve, losses first, each with its keys, training before validation."""
    metrics: dict[str, list[str]] = {}
    for key in reversed(metric_keys(runs)):
        if any(len(run.series.get(key, ())) > 1 for run in runs):
            metrics.setdefault(stage(key)[0], []).append(key)
    return {metric: metrics[metric] for metric in sorted(metrics, key=lambda name: ("loss" not in name, natural(name)))}


def stage(key: str) -> tuple[str, str]:
    """The metric of a key and the stage it was logged in, "" where the key does not say.

    Args:
        key: a metric's name.
    Example:
        >>> stage("val/accuracy"), stage("train_loss_step"), stage("loss")
        (('accuracy', 'validation'), ('loss_step', 'training'), ('loss', ''))
    """
    first, separator, rest = re.sub(r"^([a-z]+)[/_]", r"\1/", key).partition("/")
    return (rest, STAGES[first]) if separator and first in STAGES else (key, "")


def direction(key: str, runs: Iterable[Run], modes: Mapping[str, Mode]) -> Mode | None:
    """Whether a metric is good when low or high: as the user says, as a monitor has it, as its name has it."""
    if key in modes:
        return modes[key]
    for run in runs:
        for settings in run.tricks.values():
            mode = settings.get("mode") if isinstance(settings, Mapping) and settings.get("monitor") == key else None
            if mode in ("min", "max"):
                return cast(Mode, mode)
    return better(key)


def last(series: Series) -> float | None:
    """The value of the last step; None of an empty series."""
    return series[max(series)] if series else None


def best(series: Series, mode: Mode) -> Best | None:
    """The best finite value and its first step; None without one."""
    finite = [Best(value, step) for step, value in series.items() if math.isfinite(value)]
    if not finite:
        return None
    return min(finite, key=lambda each: each.value) if mode == "min" else max(finite, key=lambda each: each.value)


def moving_average(values: Sequence[float], width: int, every: int = 1) -> list[float]:
    """Mean of the finite ones of the `width` values around each n-th value; NaN of none.

    Towards both ends the windows are narrower and still centred, so that a steep curve begins and ends where it did.

    Args:
        values: one after the other.
        width: values of a mean, odd.
        every: which values a mean is taken around.
    Example:
        >>> moving_average([0, 2, 4, 100], width=3)
        [0.0, 2.0, 35.333333333333336, 100.0]
    """
    means = []
    for index in range(0, len(values), every):
        radius = min(width // 2, index, len(values) - 1 - index)
        around = [value for value in values[index - radius : index + radius + 1] if math.isfinite(value)]
        means.append(math.fsum(around) / len(around) if around else math.nan)
    return means


def thin(series: Series, limit: int) -> Series:
    """At most `limit` points: of each stretch the lowest and the highest, so that no spike is lost.

    Args:
        series: step -> value.
        limit: points to keep, at least 2.
    Example:
        >>> thin({0: 1.0, 1: 5.0, 2: 0.0, 3: 2.0, 4: 3.0, 5: 9.0}, limit=4)
        {1: 5.0, 2: 0.0, 3: 2.0, 5: 9.0}
    """
    if len(series) <= limit:
        return series
    points = list(series.items())
    stretches = limit // 2
    kept: dict[int, float] = {}
    for index in range(stretches):
        stretch = points[index * len(points) // stretches : (index + 1) * len(points) // stretches]
        ends = min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])
        kept.update(sorted(ends))
    return kept


def with_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation (n - 1) as text, the mean as exact as the deviation's second digit.

    Args:
        values: at least one, of one metric.
    Example:
        >>> with_spread([0.9712, 0.9653, 0.9687]), with_spread([0.5]), with_spread([2.0, 2.0])
        ('0.9684 ± 0.0030', '0.5', '2 ± 0')
        >>> with_spread([1234567, 1234267, 1234400])
        '1234410 ± 150'
    """
    if len(values) == 1 or not all(map(math.isfinite, values)):
        return ", ".join(map(short, values))
    try:
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        if deviation == 0:
            return f"{short(mean)} ± 0"
        decimals = 1 - math.floor(math.log10(deviation))
        mean, deviation = round(mean, decimals) + 0.0, round(deviation, decimals)  # without -0
    except OverflowError:  # of numbers around 1e308
        return ", ".join(map(short, values))
    style = f".{decimals}f" if 0 <= decimals <= 6 else ".15g"
    return f"{mean:{style}} ± {deviation:{style}}"


def short(value: float) -> str:
    """Four digits, and no more than a value has."""
    return f"{value:.4g}"
