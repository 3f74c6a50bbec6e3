"""What a schedule refuses, when it is made and when it is called, and how it says so."""

import dataclasses
import math
import re

import pytest
from schedule_examples import every_schedule, near

from lightning_tricks.functional.schedules import (
    SCHEDULES,
    Constant,
    Cooldown,
    Cosine,
    CosineRestarts,
    InverseSqrt,
    Join,
    Linear,
    OneCycle,
    Steps,
    Triangular,
    Warmup,
    WarmupCosine,
    WarmupStableDecay,
    check_duration,
    check_schedule,
    duration_in_steps,
)

# ------------------------------------------------------------------ one argument

NO_NUMBERS = [True, "0.5", None, [1.0], 3j]


def numbers(condition, fix, *outside):
    """Refused: what is no number, what is not finite, what is outside."""
    refused = [(value, ValueError, condition, fix) for value in (math.nan, math.inf, -math.inf, -1, -0.1, *outside)]
    return refused + [(value, TypeError, f"a number {condition}", fix) for value in NO_NUMBERS]


def counts(condition, fix):
    refused = [(value, ValueError, condition, fix) for value in (0, -1)]
    return refused + [(value, TypeError, condition, fix) for value in (True, 1.5, math.nan, math.inf, "3", [3])]


def choices(*names):
    condition = f"one of {', '.join(names)}"
    return [
        (value, ValueError, condition, "Choose one of them.") for value in ("", "Linear", "sqrt", None, 1, [names[0]])
    ]


def durations(least=0):
    fix = "Give 500 for steps, 0.05 for a fraction of the run, '3ep' for epochs."
    fraction = "in (0, 1) when it is a float (fraction of the run)"
    count = f"at least {least} when it is an int (optimizer steps)"
    refused = [(value, ValueError, fraction, fix) for value in (0.0, 1.0, 1.5, -0.1, math.nan, math.inf)]
    refused += [
        (value, ValueError, "epochs written as '3ep'", fix)
        for value in ("3", "ep", "-1ep", "3 ep", "3epochs", "", "3ep\n", "1e3ep", ".5ep", "nanep")
    ]
    refused += [(value, ValueError, count, fix) for value in (-1, least - 1)]
    return refused + [(value, TypeError, f"a number {count}", fix) for value in (True, None, [3], 3j)]


def milestones():
    fix, sort = "Give them as in ", "Sort them."
    order = "each later than the one before it"
    refused = [
        (value, TypeError, "a sequence of steps, fractions or epochs", fix) for value in (3, 0.5, "3ep", None, {3})
    ]
    refused += [([], ValueError, "at least one", fix), ((), ValueError, "at least one", fix)]
    refused += [
        (value, ValueError, order, sort) for value in ([5, 5], [5, 3], [0.5, 0.5], [0.5, 0.3], ["2ep", "2.0ep"])
    ]
    return [*refused, (["10ep", "9ep"], ValueError, order, sort), ([0.2, 1, 1], ValueError, order, sort)]


def no_schedules():
    condition, fix = (
        "a schedule (step, total_steps) -> factor",
        "Give a schedule, as Cosine() or Warmup(0.05, Cosine()).",
    )
    return [(value, TypeError, condition, fix) for value in (None, 0.5, True, "Cosine()", Cosine, [Cosine()])]


def schedule_lists():
    condition, fix = "a sequence of schedules", "Give them as in Join([Constant(), Linear()], [0.5])."
    return [(value, TypeError, condition, fix) for value in (None, 0.5, Constant(), {1: Constant()})]


FACTOR = numbers(
    "finite and at least 0 (factor of the base value)",
    "It multiplies the base value: 1.0 keeps it, 0.0 switches it off.",
)
POSITIVE = numbers(
    "finite and above 0 (factor of the base value)",
    "An exponential never leaves or reaches 0: give a small factor such as 0.01.",
    *(0, 0.0),
)
DURATION, AT_LEAST_A_STEP = durations(), durations(least=1)
CYCLES = counts("a whole number of at least 1 (cycles in the run)", "1 is a single cycle.")
GAMMA = numbers("in (0, 1]", "1.0 keeps the peaks, 0.5 halves each.", 0.0, 1.1, 2)
FALL = choices("linear", "cosine", "1-sqrt")

# By schedule: what makes a good one, and what is refused for each argument.
REFUSED = {
    "Constant": ({}, {"value": FACTOR}),
    "Linear": ({}, {"start": FACTOR, "end": FACTOR}),
    "Cosine": ({}, {"end": FACTOR}),
    "Polynomial": (
        {},
        {"power": numbers("finite and above 0 (exponent)", "1.0 is a straight line.", 0, 0.0), "end": FACTOR},
    ),
    "Exponential": ({}, {"end": POSITIVE}),
    "Steps": ({"milestones": [1]}, {"milestones": milestones(), "gamma": FACTOR}),
    "InverseSqrt": ({}, {"timescale": AT_LEAST_A_STEP}),
    "InverseTime": ({}, {"timescale": AT_LEAST_A_STEP}),
    "CosineRestarts": (
        {"cycles": 2},
        {
            "cycles": CYCLES,
            "length": AT_LEAST_A_STEP,
            "multiplier": numbers("finite and at least 1", "1.0 keeps the length, 2.0 doubles it.", 0, 0.5),
            "gamma": GAMMA,
            "end": FACTOR,
        },
    ),
    "OneCycle": (
        {},
        {
            "warmup": DURATION,
            "start": FACTOR,
            "peak": FACTOR,
            "end": FACTOR,
            "shape": choices("cosine", "linear"),
        },
    ),
    "Triangular": (
        {"cycles": 2},
        {
            "cycles": CYCLES,
            "length": AT_LEAST_A_STEP,
            "low": FACTOR,
            "gamma": GAMMA,
            "up": numbers("in (0, 1) (fraction of a cycle)", "0.5 rises as long as it falls.", 0, 0.0, 1, 1.0),
        },
    ),
    "Warmup": (
        {"duration": 1, "then": Cosine()},
        {
            "duration": DURATION,
            "then": no_schedules(),
            "start": FACTOR,
            "shape": choices("linear", "cosine", "exponential"),
        },
    ),
    "Cooldown": (
        {"duration": 1, "before": Constant()},
        {"duration": DURATION, "before": no_schedules(), "end": FACTOR, "shape": FALL},
    ),
    "Join": (
        {"schedules": [Constant(), Linear()], "milestones": [1]},
        {"schedules": schedule_lists(), "milestones": milestones()},
    ),
    "WarmupCosine": ({"warmup": 1}, {"warmup": DURATION, "end": FACTOR}),
    "WarmupStableDecay": (
        {"warmup": 1, "cooldown": 1},
        {"warmup": DURATION, "cooldown": DURATION, "end": FACTOR, "shape": FALL},
    ),
}


def test_every_argument_of_every_schedule_has_bad_values():
    arguments = {name: {field.name for field in dataclasses.fields(kind)} for name, kind in SCHEDULES.items()}
    arguments["OneCycle"].remove("three_phase")  # a yes or no: below
    assert {name: set(refused) for name, (_, refused) in REFUSED.items()} == arguments


@pytest.mark.parametrize(
    ("name", "argument", "value", "error", "condition", "fix"),
    [
        pytest.param(name, argument, *case, id=f"{name}-{argument}-{case[0]!r}")
        for name, (_, refused) in REFUSED.items()
        for argument, cases in refused.items()
        for case in cases
        if not (argument in ("cycles", "length") and case[0] is None)  # then it is left out
    ],
)
def test_a_bad_argument_is_refused_with_what_it_must_be(name, argument, value, error, condition, fix):
    arguments = {**REFUSED[name][0], argument: value}
    if argument == "length":
        del arguments["cycles"]
    text = f"{name}: {argument} must be {condition}, got {value!r}. {fix}"
    with pytest.raises(error, match=re.escape(text)) as caught:
        SCHEDULES[name](**arguments)
    assert type(caught.value) is error
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("name", ["Constant", "Warmup", "Polynomial", "InverseSqrt"])
def test_a_number_that_is_no_float_is_refused_as_infinite(name):
    arguments, refused = REFUSED[name]
    argument = next(iter(refused))
    with pytest.raises(ValueError, match=f"{name}: {argument} must be "):
        SCHEDULES[name](**{**arguments, argument: 10**400})


@pytest.mark.parametrize("value", [-1, True, None, 1.0, "3"], ids=repr)
def test_a_duration_is_checked_for_any_owner(value):
    with pytest.raises((TypeError, ValueError), match="Owner: length must be "):
        check_duration("Owner", "length", value)


@pytest.mark.parametrize("value", [Cosine, None, "Cosine()"], ids=repr)
def test_a_schedule_is_checked_for_any_owner(value):
    with pytest.raises(TypeError, match="Owner: lr must be a schedule "):
        check_schedule("Owner", "lr", value)


@pytest.mark.parametrize("part", [None, 0.5, "cosine", Cosine, [Cosine()]], ids=repr)
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_joined_must_be_schedules(part, place):
    parts = [Constant(), Linear()]
    parts[place] = part
    text = f"Join: schedules must be a schedule (step, total_steps) -> factor, got {part!r}. Give a schedule, as"
    with pytest.raises(TypeError, match=re.escape(text)):
        Join(parts, [0.5])


@pytest.mark.parametrize("bad", [0.0, 1.0, -1, math.nan, "3", True, None], ids=repr)
@pytest.mark.parametrize("make", [Steps, lambda places: Join([Constant()] * 3, places)], ids=["Steps", "Join"])
def test_every_milestone_must_be_a_duration(make, bad):
    for places in ([bad, 20], [2, bad]):
        with pytest.raises((TypeError, ValueError), match=re.escape("milestones must be ")) as caught:
            make(places)
        assert f"got {bad!r}. Give 500 for steps" in str(caught.value)


# ------------------------------------------------------------------ arguments that do not go together


@pytest.mark.parametrize("kind", [CosineRestarts, Triangular])
@pytest.mark.parametrize("arguments", [{}, {"cycles": 2, "length": 10}, {"cycles": 2, "length": 0.5}], ids=repr)
def test_cycles_are_given_by_their_number_or_by_their_length(kind, arguments):
    got = {"cycles": None, "length": None, **arguments}
    text = f"{kind.__name__}: cycles must be given, or length instead, and not both, got {got!r}. Give {kind.__name__}("
    with pytest.raises(ValueError, match=re.escape(text)):
        kind(**arguments)


@pytest.mark.parametrize("start", [0, 0.0, -0.1])
def test_an_exponential_warmup_cannot_begin_at_0(start):
    text = f"Warmup: start must be finite and above 0 (factor of the base value), got {start!r}. An exponential never"
    with pytest.raises(ValueError, match=re.escape(text)):
        Warmup(1, Cosine(), start, "exponential")
    with pytest.raises(ValueError, match=r"got 0.0\. An exponential never"):
        Warmup(1, Cosine(), shape="exponential")


@pytest.mark.parametrize("value", ["no", 1, None])
def test_a_yes_or_no_must_be_one(value):
    text = f"OneCycle: three_phase must be True or False, got {value!r}. True falls to start first"
    with pytest.raises(TypeError, match=re.escape(text)):
        OneCycle(three_phase=value)


@pytest.mark.parametrize("count", [0, 1])
def test_one_schedule_is_not_joined(count):
    with pytest.raises(ValueError, match=r"Join: schedules must be at least two, got .* Give them as in Join"):
        Join([Constant()] * count, [2])


@pytest.mark.parametrize("count", [2, 4])
def test_joined_schedules_and_milestones_must_fit(count):
    condition = f"one fewer than the {count} schedules"
    text = f"Join: milestones must be {condition}, got (2, 0.5). Give them as in Join([Constant(), Linear()], [0.5])."
    with pytest.raises(ValueError, match=re.escape(text)):
        Join([Constant()] * count, [2, 0.5])


def test_fractions_of_more_than_the_whole_run_are_refused():
    got = {"warmup": 0.6, "cooldown": 0.5}
    text = f"WarmupStableDecay: warmup must be at most the whole run together with cooldown, got {got}. Shorten one"
    with pytest.raises(ValueError, match=re.escape(text)):
        WarmupStableDecay(0.6, 0.5)


@pytest.mark.parametrize("tenths", range(1, 10))
def test_fractions_of_exactly_the_whole_run_are_not(tenths):
    schedule = WarmupStableDecay(tenths / 10, 1 - tenths / 10)
    for total in (1, 3, 7, 10, 49, 1000):
        assert schedule(total * tenths / 10, total) == near(1.0)
        assert WarmupStableDecay(tenths / 10, (10 - tenths) / 10)(total, total) == 0.0


# ------------------------------------------------------------------ when called

LONGER = "at most the run's 10 optimizer steps, got 11. Shorten it, or train for longer."
ORDER = "each later than the one before it, got"


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (Warmup(11, Cosine()), f"Warmup: duration must be {LONGER}"),
        (Cooldown(11, Constant()), f"Cooldown: duration must be {LONGER}"),
        (WarmupCosine(11), f"WarmupCosine: warmup must be {LONGER}"),
        (WarmupStableDecay(11, 1), f"WarmupStableDecay: warmup must be {LONGER}"),
        (WarmupStableDecay(1, 11), f"WarmupStableDecay: cooldown must be {LONGER}"),
        (OneCycle(11), f"OneCycle: warmup must be {LONGER}"),
        (Steps([0.5, 11]), f"Steps: milestones must be {LONGER}"),
        (Join([Constant(), Linear()], [11]), f"Join: milestones must be {LONGER}"),
        (
            WarmupStableDecay(6, 0.5),
            "WarmupStableDecay: warmup must be at most the run's 10 optimizer steps together with cooldown, "
            "got {'warmup': 6, 'cooldown': 0.5}. Shorten one of them.",
        ),
        (
            OneCycle(6, three_phase=True),
            "OneCycle: warmup must be at most half the run's 10 optimizer steps with three_phase, got 6. Shorten it",
        ),
        (OneCycle(0.6, three_phase=True), "with three_phase, got 0.6. Shorten it, or leave three_phase out."),
        (
            Steps([6, 0.5]),
            f"Steps: milestones must be {ORDER} (6, 0.5). Sort them; in a run of 10 steps they are at [6, 5].",
        ),
        (
            Steps([5, 0.5]),
            f"Steps: milestones must be {ORDER} (5, 0.5). Sort them; in a run of 10 steps they are at [5, 5].",
        ),
        (
            Join([Constant()] * 3, [0.5, 4]),
            f"Join: milestones must be {ORDER} (0.5, 4). Sort them; in a run of 10 steps",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else repr(value),
)
@pytest.mark.parametrize("step", [0, 5, 10, 20])
def test_what_does_not_fit_in_the_run_is_refused_at_every_step(schedule, text, step):
    with pytest.raises(ValueError, match=re.escape(text)):
        schedule(step, 10)


@pytest.mark.parametrize(
    "schedule",
    [
        Warmup(10, Cosine()),
        Cooldown(10, Constant()),
        WarmupCosine(10),
        WarmupStableDecay(5, 5),
        WarmupStableDecay(0.5, 5),
        OneCycle(10, end=0.0),
        OneCycle(5, end=0.0, three_phase=True),
        Steps([10], gamma=0.0),
        Join([Constant(), Cosine()], [10]),
    ],
    ids=repr,
)
def test_what_just_fits_in_the_run_is_not(schedule):
    assert [schedule(k, 10) for k in (10, 11)] == [0.0, 0.0]


def test_what_does_not_fit_in_what_is_left_of_the_run_is_refused():
    with pytest.raises(ValueError, match="Warmup: duration must be at most the run's 7 optimizer steps, got 8. "):
        Warmup(3, Warmup(8, Cosine()))(3, 10)


def test_a_duration_longer_than_the_run_is_refused_for_any_owner():
    assert duration_in_steps("Owner", "length", 10, 10) == 10
    with pytest.raises(ValueError, match=re.escape(f"Owner: length must be {LONGER}")):
        duration_in_steps("Owner", "length", 11, 10)


def test_a_long_run_is_told_in_full():
    with pytest.raises(ValueError, match="at most the run's 1234567 optimizer steps, got 2000000"):
        Warmup(2_000_000, Cosine())(0, 1_234_567)


@every_schedule
@pytest.mark.parametrize("step", [-1, -0.5, -1e-9, math.nan, -math.inf])
def test_a_step_must_be_at_least_0(schedule, step):
    text = f"{type(schedule).__name__}: step must be at least 0 (optimizer steps), got {step!r}. Count the steps done"
    with pytest.raises(ValueError, match=re.escape(text)):
        schedule(step, 10)


@every_schedule
@pytest.mark.parametrize("total", [-1, math.inf, math.nan])
def test_the_run_must_have_a_finite_length(schedule, total):
    condition = "total_steps must be finite and at least 0 (optimizer steps)"
    text = f"{type(schedule).__name__}: {condition}, got {total!r}. Give the length of the run"
    for step in (0, 5):
        with pytest.raises(ValueError, match=re.escape(text)):
            schedule(step, total)


@pytest.mark.parametrize("length", [1e-10, 1e-300])
def test_the_least_fraction_of_a_run_is_a_fraction(length):
    for schedule in (CosineRestarts(length=length), Triangular(length=length)):
        assert all(0 <= schedule(k, 2) <= 1 for k in range(4))
    assert InverseSqrt(length)(1, 2) == near((2 * length / (2 * length + 1)) ** 0.5)
