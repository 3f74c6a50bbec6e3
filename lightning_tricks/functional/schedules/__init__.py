"""Schedules: `schedule(step, total_steps) -> factor` of a base value.

A schedule is a frozen value: it can be compared, printed, pickled and nested, and it knows neither an optimizer nor a
trainer. `schedule(k, T)` is the factor in force after `k` real optimizer steps of a run of `T`; `k = 0` is before the
first. A shape reaches its end at `k = T` and is constant afterwards. Any function of the same signature is a schedule
too.
"""

from lightning_tricks.functional.schedules.cycles import CosineRestarts, OneCycle, Triangular
from lightning_tricks.functional.schedules.durations import (
    Duration,
    Schedule,
    check_duration,
    check_schedule,
    duration_in_steps,
    in_steps,
    interpolate,
    progress,
    resolve_epochs,
    survey,
)
from lightning_tricks.functional.schedules.joins import Cooldown, Join, Warmup, WarmupCosine, WarmupStableDecay
from lightning_tricks.functional.schedules.shapes import (
    Constant,
    Cosine,
    Exponential,
    InverseSqrt,
    InverseTime,
    Linear,
    Polynomial,
    Steps,
)
from lightning_tricks.functional.schedules.text import SCHEDULES, describe, is_ours, parse

__all__ = [
    "SCHEDULES",
    "Constant",
    "Cooldown",
    "Cosine",
    "CosineRestarts",
    "Duration",
    "Exponential",
    "InverseSqrt",
    "InverseTime",
    "Join",
    "Linear",
    "OneCycle",
    "Polynomial",
    "Schedule",
    "Steps",
    "Triangular",
    "Warmup",
    "WarmupCosine",
    "WarmupStableDecay",
    "check_duration",
    "check_schedule",
    "describe",
    "duration_in_steps",
    "in_steps",
    "interpolate",
    "is_ours",
    "parse",
    "progress",
    "resolve_epochs",
    "survey",
]
