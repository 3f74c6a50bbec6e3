"""Schedules to try a property on: some of every kind, and any that hypothesis can think of."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from lightning_tricks.functional.schedules import (
    Constant,
    Cooldown,
    Cosine,
    CosineRestarts,
    Exponential,
    InverseSqrt,
    InverseTime,
    Join,
    Linear,
    OneCycle,
    Polynomial,
    Steps,
    Triangular,
    Warmup,
    WarmupCosine,
    WarmupStableDecay,
)

check = settings(deadline=None, max_examples=100)


def near(value, abs=1e-12):
    return pytest.approx(value, rel=0, abs=abs)


EXAMPLES = [
    Constant(0.5),
    Linear(0.25, 0.75),
    Cosine(0.1),
    Polynomial(2.0, 0.1),
    Exponential(0.05),
    Steps([0.3, 0.6], 0.2),
    InverseSqrt(0.3),
    InverseTime(0.3),
    CosineRestarts(cycles=3, multiplier=1.5, gamma=0.8, end=0.1),
    CosineRestarts(length=0.25),
    OneCycle(),
    OneCycle(0.5, shape="linear", three_phase=True),
    Triangular(cycles=4, low=0.1, gamma=0.7, up=0.3),
    Triangular(length=0.2),
    Warmup(0.1, Linear(), 0.5),
    Warmup(0.3, Cosine(0.2), 0.01, "exponential"),
    Cooldown(0.2, Cosine(0.5), 0.1, "1-sqrt"),
    Join([Linear(0.1, 1.0), Constant(), Cosine()], [0.1, 0.7]),
    WarmupCosine(0.1, 0.2),
    WarmupStableDecay(0.1, 0.2, 0.05, "cosine"),
    Warmup(0.05, Cooldown(0.3, CosineRestarts(cycles=2), 0.01)),
]
"""Each a function of step / total_steps, since every duration is a fraction of the run."""

every_schedule = pytest.mark.parametrize(
    "schedule", EXAMPLES, ids=[f"{type(s).__name__}{i}" for i, s in enumerate(EXAMPLES)]
)

FACTORS = st.floats(0, 2)
POSITIVE = st.floats(0.001, 2)
PARTS = st.floats(0.05, 0.95) | st.integers(1, 19).map(lambda n: n / 20)
PEAKS = st.floats(0.1, 1)
FALLS = st.sampled_from(["linear", "cosine", "1-sqrt"])
MILESTONES = st.lists(st.integers(1, 39), min_size=1, max_size=4, unique=True).map(
    lambda twentieths: [n / 40 for n in sorted(twentieths)]
)
CYCLES = st.fixed_dictionaries({"cycles": st.integers(1, 6)}) | st.fixed_dictionaries({"length": PARTS})

SHAPES = st.one_of(
    st.builds(Constant, FACTORS),
    st.builds(Linear, FACTORS, FACTORS),
    st.builds(Cosine, FACTORS),
    st.builds(Polynomial, st.floats(0.1, 5), FACTORS),
    st.builds(Exponential, POSITIVE),
    st.builds(Steps, MILESTONES, FACTORS),
    st.builds(InverseSqrt, PARTS),
    st.builds(InverseTime, PARTS),
    st.builds(
        lambda cycles, *rest: CosineRestarts(**cycles, multiplier=rest[0], gamma=rest[1], end=rest[2]),
        CYCLES,
        st.sampled_from([1, 1.5, 2, 3]) | st.floats(1, 3),
        PEAKS,
        FACTORS,
    ),
    st.builds(
        lambda cycles, *rest: Triangular(**cycles, low=rest[0], gamma=rest[1], up=rest[2]),
        CYCLES,
        FACTORS,
        PEAKS,
        PARTS,
    ),
    st.builds(OneCycle, PARTS, FACTORS, FACTORS, FACTORS, st.sampled_from(["linear", "cosine"])),
    st.builds(
        lambda warmup, *rest: OneCycle(warmup / 2, *rest, three_phase=True),
        PARTS | st.just(1.0),
        FACTORS,
        FACTORS,
        FACTORS,
        st.sampled_from(["linear", "cosine"]),
    ),
    st.builds(WarmupCosine, PARTS, FACTORS),
    st.builds(
        lambda warmup, part, *rest: WarmupStableDecay(warmup, (1 - warmup) * part, *rest), PARTS, PARTS, FACTORS, FALLS
    ),
)


def around(inner):
    return st.one_of(
        st.builds(Warmup, PARTS, inner, POSITIVE, st.sampled_from(["linear", "cosine", "exponential"])),
        st.builds(Cooldown, PARTS, inner, FACTORS, FALLS),
        MILESTONES.flatmap(
            lambda stops: st.lists(inner, min_size=len(stops) + 1, max_size=len(stops) + 1).map(
                lambda schedules: Join(schedules, stops)
            )
        ),
    )


SCHEDULES = st.recursive(SHAPES, around, max_leaves=4)
"""Any schedule, and schedules of schedules, whose durations are fractions of the run."""


def turning_points(schedule):
    """Factors that a schedule turns at; it never leaves the span from the lowest to the highest."""
    match schedule:
        case Constant(value):
            return [value]
        case Linear(start, end):
            return [start, end]
        case Cosine(end) | Polynomial(_, end) | Exponential(end) | CosineRestarts(end=end):
            return [1.0, end]
        case Steps(milestones, gamma):
            return [1.0, gamma ** len(milestones)]
        case InverseSqrt() | InverseTime():
            return [1.0, schedule(100, 100)]
        case Triangular(low=low):
            return [low, 1.0]
        case OneCycle(_, start, peak, end):
            return [start, peak, end]
        case Warmup(_, then, start):
            return [start, 1.0, *turning_points(then)]
        case Cooldown(_, before, end):
            return [end, *turning_points(before)]
        case Join(schedules):
            return [point for schedule in schedules for point in turning_points(schedule)]
        case WarmupCosine(_, end) | WarmupStableDecay(_, _, end):
            return [0.0, 1.0, end]
