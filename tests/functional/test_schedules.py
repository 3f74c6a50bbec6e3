"""Every schedule against an oracle, and what holds for all of them."""

import dataclasses
import math
import pickle
import re
from fractions import Fraction
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_examples import EXAMPLES, FACTORS, PARTS, SCHEDULES, check, every_schedule, near, turning_points
from schedule_oracles import (
    LENGTHS,
    ONE_CYCLES,
    ORACLES,
    decaying_restarts,
    decaying_triangles,
    first_of,
    our_factors,
    torch_one_cycle,
    torch_values,
)

from lightning_tricks.functional import schedules
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
    duration_in_steps,
    in_steps,
    interpolate,
    progress,
    resolve_epochs,
)

every_length = pytest.mark.parametrize("total", LENGTHS)
KINDS = schedules.SCHEDULES

# ------------------------------------------------------------------ against the oracles


def test_every_schedule_has_an_oracle_and_an_example():
    assert list(ORACLES) == list(KINDS)
    assert {type(schedule) for schedule in EXAMPLES} == set(KINDS.values())


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # torch's own SequentialLR uses it
@pytest.mark.parametrize(
    ("name", "case", "total"),
    [
        pytest.param(name, case, total, id=f"{name}: {case.label}, in {total}")
        for name, cases in ORACLES.items()
        for case in cases()
        for total in LENGTHS
        if total >= case.least
    ],
)
def test_a_schedule_is_its_oracle_at_every_step(name, case, total):
    schedule = case.schedule(total)
    assert type(schedule).__name__ == name
    assert our_factors(schedule, total) == near(case.factors(total))


@pytest.mark.parametrize(
    ("total", "warmup", "shape", "three_phase"),
    [(total, *one_cycle) for total in LENGTHS for one_cycle in ONE_CYCLES if one_cycle[0] < 1 or total >= 3],
)
def test_one_cycle_of_the_momentum_is_torchs(total, warmup, shape, three_phase):
    steps = warmup * total if warmup < 1 else warmup
    expected = torch_values(lambda o: torch_one_cycle(o, steps, total, shape, three_phase), total, key="momentum")
    schedule = OneCycle(warmup, start=1, peak=0.85 / 0.95, end=1, shape=shape, three_phase=three_phase)
    assert [0.95 * factor for factor in our_factors(schedule, total)] == near(expected)


@pytest.mark.parametrize("multiplier", [1, 1.5, 2, 3])
@pytest.mark.parametrize("cycles", [1, 2, 3, 7, 20])
def test_cycles_begin_at_their_step_for_any_length_of_the_run(cycles, multiplier):
    restarts = CosineRestarts(cycles=cycles, multiplier=multiplier, gamma=0.9, end=0.1)
    triangles = Triangular(cycles=cycles, low=0.1, gamma=0.9)
    for total in (*range(1, 31), 60, 77, 100, 120, 200):
        first = first_of(cycles, Fraction(multiplier), total)
        for k in {*range(min(total, 30) + 1), *(total * i // cycles for i in range(cycles + 1)), total - 1}:
            assert restarts(k, total) == near(decaying_restarts(k, total, first, multiplier, 0.9, 0.1))
            if multiplier == 1:
                assert triangles(k, total) == near(decaying_triangles(k, total, first, 0.9, 0.1, Fraction(1, 2)))


@pytest.mark.parametrize("tenths", range(1, 10))
def test_cycles_of_tenths_of_the_run_begin_at_their_step(tenths):
    restarts, triangles = CosineRestarts(length=tenths / 10, gamma=0.5), Triangular(length=tenths / 10, gamma=0.5)
    for total in (*range(1, 26), 50, 70, 110, 250, 490, 500):
        first = Fraction(tenths * total, 10)
        for k in {*range(min(total, 20) + 1), total * tenths // 10, total * tenths // 5, total - 1, total}:
            if k <= total:
                assert restarts(k, total) == near(decaying_restarts(k, total, first, 1, 0.5, 0.0))
                assert triangles(k, total) == near(decaying_triangles(k, total, first, 0.5, 0.0, Fraction(1, 2)))


@pytest.mark.parametrize("total", [10**6, 10**9, 10**10])
@pytest.mark.parametrize(
    "schedule",
    [
        Linear(),
        Cosine(),
        CosineRestarts(cycles=1),
        CosineRestarts(cycles=2, multiplier=2),
        Triangular(cycles=1),
        Triangular(cycles=3),
        OneCycle(0.3, 0.0, 1.0, 0.0),
        WarmupStableDecay(0.1, 0.2),
        Cooldown(0.3, Constant()),
    ],
    ids=repr,
)
def test_a_run_may_be_long(schedule, total):
    """In a long run the last step but one is all but the end, not yet the end, and no beginning of another cycle."""
    assert schedule(total, total) == 0.0
    assert 0.0 <= schedule(total - 1, total) <= 2e-5
    assert schedule(total // 2, total) == near(schedule(5 * 10**5, 10**6), abs=1e-5)


@every_length
def test_a_step_may_be_fractional(total):
    for step in (0.25, 0.5 * total, 0.3 * total, total - 0.125):
        assert Linear()(step, total) == near(1 - step / total)
        assert CosineRestarts(cycles=1)(step, total) == near(Cosine()(step, total))
        assert Triangular(cycles=1)(step, total) == near(1 - abs(1 - 2 * step / total))


@every_length
@pytest.mark.parametrize("warmup", [0, 1, 0.05, 0.5])
def test_warmup_cosine_is_warmup_then_cosine(total, warmup):
    composed = Warmup(warmup, Cosine(0.1))
    assert our_factors(WarmupCosine(warmup, 0.1), total, total + 2) == our_factors(composed, total, total + 2)


@pytest.mark.parametrize("total", [2, 3, 7, 10, 51])
@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_warmup_stable_decay_is_warmup_then_cooldown(total, shape):
    composed = Warmup(1, Cooldown(total // 2, Constant(), 0.1, shape))
    expected = our_factors(composed, total, total + 2)
    assert our_factors(WarmupStableDecay(1, total // 2, 0.1, shape), total, total + 2) == near(expected)


def test_a_fraction_of_the_run_is_not_rounded():
    assert Warmup(0.15, Constant())(1, 10) == near(1 / 1.5)
    assert Warmup(0.15, Linear())(2, 10) == near(1 - 0.5 / 8.5)
    assert Cooldown(0.15, Constant())(9, 10) == near(1 / 1.5)
    assert OneCycle(0.15, 0.0, 1.0, 0.0, "linear")(1, 10) == near(1 / 1.5)


def test_any_function_can_be_part_of_a_schedule_and_sees_its_own_stretch():
    seen = []

    def remember(k, total):
        seen.append((k, total))
        return 0.5

    Warmup(2, remember)(5, 9)
    Cooldown(2, remember)(5, 9)
    Cooldown(2, remember)(8, 9)
    Join([Constant(), remember, Constant()], [2, 6])(5, 9)
    assert seen == [(3, 7), (5, 7), (7, 7), (3, 4)]


@pytest.mark.parametrize(
    "schedule", [InverseSqrt(1000), InverseTime(1000), CosineRestarts(length=1000), Triangular(length=1000)], ids=repr
)
def test_what_is_no_part_of_the_run_may_be_longer_than_it(schedule):
    assert schedule(7, 10) == near(schedule(7, 100))


# ------------------------------------------------------------------ what holds for all


@check
@given(SCHEDULES, st.integers(1, 200), st.data())
def test_a_factor_lies_between_the_lowest_and_the_highest(schedule, total, data):
    step = data.draw(st.integers(0, 2 * total))
    points = turning_points(schedule)
    assert min(points) - 1e-12 <= schedule(step, total) <= max(points) + 1e-12


@check
@given(SCHEDULES, st.integers(1, 200), st.integers(1, 10**6))
def test_a_schedule_is_constant_after_the_end(schedule, total, after):
    assert schedule(total + after, total) == schedule(total, total)
    assert schedule(math.inf, total) == schedule(total, total)


@check
@given(FACTORS, st.integers(1, 200), PARTS)
def test_a_schedule_reaches_its_end_exactly(end, total, part):
    for schedule in (
        Linear(0.4, end),
        Cosine(end),
        Polynomial(2, end),
        CosineRestarts(cycles=3, end=end),
        CosineRestarts(length=0.2, multiplier=1, end=end),
        Triangular(cycles=3, low=end),
        OneCycle(part, end=end),
        OneCycle(part / 2, end=end, three_phase=True),
        Warmup(part, Cosine(end)),
        Cooldown(part, Constant(0.4), end),
        Cooldown(part, Constant(0.4), end, "1-sqrt"),
        Join([Constant(), Cosine(end)], [part]),
        WarmupCosine(part, end),
        WarmupStableDecay((1 - part) / 2, part, end),
    ):
        assert schedule(total, total) == end
    assert Exponential(end + 0.01)(total, total) == end + 0.01


@check
@given(SCHEDULES, st.integers(1, 200), st.data())
def test_with_fractions_a_factor_depends_on_the_fraction_of_the_run_alone(schedule, total, data):
    step = data.draw(st.integers(0, total))
    assert schedule(2 * step, 2 * total) == near(schedule(step, total), abs=1e-9)


@every_schedule
def test_a_run_of_no_steps_is_at_its_end(schedule):
    if isinstance(schedule, (InverseSqrt, InverseTime)):  # theirs is where so many steps get: nowhere
        assert schedule(0, 0) == schedule(3, 0) == 1.0
    else:
        assert schedule(0, 0) == schedule(3, 0) == near(schedule(10, 10))


@check
@given(SCHEDULES, st.integers(0, 5))
def test_schedules_of_schedules_go_with_a_run_of_any_length(schedule, total):
    factors = our_factors(schedule, total, total + 3)
    assert all(0 <= factor <= 1000 for factor in factors)


JOINS = [
    (lambda f: Warmup(f, Cosine(0.2), 0.1), lambda f: [f]),
    (lambda f: Warmup(f, Linear(), shape="cosine"), lambda f: [f]),
    (lambda f: Warmup(f, InverseSqrt(0.3), 0.01, "exponential"), lambda f: [f]),
    (lambda f: Warmup(f, CosineRestarts(cycles=1), 1.5), lambda f: [f]),
    (lambda f: Cooldown(f, Constant(0.4), 1.0), lambda f: [1 - f]),
    (lambda f: Cooldown(f, Cosine(0.2), shape="cosine"), lambda f: [1 - f]),
    (lambda f: Cooldown(f, CosineRestarts(cycles=2, end=0.3), shape="1-sqrt"), lambda f: [1 - f]),
    (lambda f: Cooldown(f, Triangular(cycles=2, low=0.3)), lambda f: [(1 - f) / 2, 1 - f]),
    (lambda f: WarmupCosine(f, 0.2), lambda f: [f]),
    (lambda f: WarmupStableDecay(f, (1 - f) / 2), lambda f: [f, (1 + f) / 2]),
    (lambda f: WarmupStableDecay(1 - f, f, shape="1-sqrt"), lambda f: [1 - f]),
    (lambda f: OneCycle(f), lambda f: [f]),
    (lambda f: OneCycle(f / 2, shape="linear", three_phase=True), lambda f: [f / 2, f]),
    (lambda f: Triangular(cycles=2, low=0.1, gamma=0.5, up=f), lambda f: [f / 2, 0.5, (1 + f) / 2]),
    (lambda f: Triangular(length=f, gamma=0.7), lambda f: [f / 2, f]),
    (lambda f: Join([Linear(0.0, 0.7), Constant(0.7)], [f]), lambda f: [f]),
]


@check
@given(st.sampled_from(JOINS), PARTS, st.sampled_from([*LENGTHS, 1000]))
def test_the_parts_of_a_schedule_meet_without_a_jump(joined, part, total):
    schedule, joins = joined[0](part), [place * total for place in joined[1](part)]
    for join in joins:
        assert schedule(join - 1e-8 * total, total) == near(schedule(join, total), abs=1e-3)
        assert schedule(join + 1e-8 * total, total) == near(schedule(join, total), abs=1e-3)


@check
@given(st.one_of(PARTS, st.integers(1, 10)), st.sampled_from([Cosine(0.2), Linear(1.0, 0.5), Constant()]), FACTORS)
def test_a_warmup_reaches_1_where_it_ends(duration, then, start):
    total, schedule = 11, Warmup(duration, then, start)
    join = duration * total if isinstance(duration, float) else duration
    assert schedule(join, total) == near(1.0)
    assert schedule(join - 1e-9, total) == near(1.0, abs=1e-6)


DURATIONS = {
    ("Steps", "milestones"): lambda d: Steps([d], 0.5),
    ("InverseSqrt", "timescale"): InverseSqrt,
    ("InverseTime", "timescale"): InverseTime,
    ("CosineRestarts", "length"): lambda d: CosineRestarts(length=d, gamma=0.5),
    ("OneCycle", "warmup"): OneCycle,
    ("Triangular", "length"): lambda d: Triangular(length=d, gamma=0.5),
    ("Warmup", "duration"): lambda d: Warmup(d, CosineRestarts(cycles=2)),
    ("Cooldown", "duration"): lambda d: Cooldown(d, CosineRestarts(cycles=2, end=0.3)),
    ("Join", "milestones"): lambda d: Join([Linear(0.0, 1.0), Cosine(0.2)], [d]),
    ("WarmupCosine", "warmup"): WarmupCosine,
    ("WarmupStableDecay", "warmup"): lambda d: WarmupStableDecay(d, 0),
    ("WarmupStableDecay", "cooldown"): lambda d: WarmupStableDecay(0, d),
}


def holds_durations(field):
    return str in get_args(field.type) or schedules.Duration in get_args(field.type)


def test_every_duration_is_tried_as_steps_and_as_a_fraction():
    fields = {
        (name, field.name)
        for name, kind in KINDS.items()
        for field in dataclasses.fields(kind)
        if holds_durations(field)
    }
    assert fields == set(DURATIONS)


@pytest.mark.parametrize("make", DURATIONS.values(), ids=map(".".join, DURATIONS))
@pytest.mark.parametrize(("steps", "total"), [(7, 100), (29, 100), (57, 100), (3, 12), (6, 12), (1, 3), (1, 49)])
def test_steps_and_the_same_fraction_agree(make, steps, total):
    assert our_factors(make(steps / total), total) == near(our_factors(make(steps), total))


@check
@given(st.sampled_from([*DURATIONS.values()]), st.integers(2, 500), st.data())
def test_steps_and_the_same_fraction_agree_for_any_length(make, total, data):
    steps = data.draw(st.integers(1, total - 1))
    by_steps, by_fraction = make(steps), make(steps / total)
    for k in {0, 1, steps - 1, steps, steps + 1, total - steps, total - 1, total}:
        assert by_fraction(k, total) == near(by_steps(k, total))


@pytest.mark.parametrize(
    ("schedule", "total", "drop"),
    [
        (Warmup(0.55, Steps([0.2])), 25, 16),
        (Warmup(0.55, Steps([0.6])), 50, 41),
        (Join([Constant(), Join([Constant(), Constant(0.1)], [0.2])], [0.55]), 25, 16),
    ],
)
def test_what_happens_at_a_step_inside_another_schedule_does_not_wait_for_the_next(schedule, total, drop):
    """13.75 steps of warmup and 2.25 more are 16, though 0.55 * 25 is a little above 13.75."""
    assert [schedule(k, total) for k in range(drop - 2, drop + 3)] == near([1, 1, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(
    "inner",
    [Warmup(9, Constant()), OneCycle(9), Steps([9]), Join([Constant(), Cosine()], [9]), WarmupStableDecay(5, 4)],
    ids=repr,
)
def test_a_stretch_as_long_as_what_is_left_fits_in_it(inner):
    """0.45 * 25 * 0.8 is 9 steps, though the numbers are a little below."""
    schedule = Warmup(0.55, Warmup(0.2, inner))
    assert schedule(25, 25) == near(inner(9, 9))


def test_a_restart_before_a_cooldown_is_not_one_more_cycle():
    schedule = Warmup(0.55, Cooldown(0.8, CosineRestarts(cycles=2, end=0.3), shape="1-sqrt"))
    assert schedule(16, 25) == near(0.3, abs=1e-6)


def test_a_rise_and_a_fall_of_half_the_run_each_fit_in_it():
    schedule = Warmup(0.55, Warmup(0.2, OneCycle(0.5, three_phase=True)))
    assert schedule(50, 50) == OneCycle().end


@pytest.mark.parametrize("multiplier", [2, 2.0, 1e9])
def test_a_multiplier_may_make_the_first_cycles_next_to_nothing(multiplier):
    schedule = CosineRestarts(cycles=2000, multiplier=multiplier)
    factors = our_factors(schedule, 8)
    assert all(0 <= factor <= 1 for factor in factors)
    last = 8 * (1 - 1 / multiplier)  # length of the last cycle; all the others are before it
    assert factors[7:] == near([(1 + math.cos(math.pi * (1 - 1 / last))) / 2, 0.0], abs=1e-6)


@check
@given(SCHEDULES)
def test_a_schedule_survives_pickle_and_repr_and_can_be_hashed(schedule):
    for again in (pickle.loads(pickle.dumps(schedule)), eval(repr(schedule))):
        assert again == schedule
        assert hash(again) == hash(schedule)


@every_schedule
def test_a_schedule_cannot_be_changed_and_differs_from_another(schedule):
    for field in dataclasses.fields(schedule):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(schedule, field.name, getattr(schedule, field.name))
    numbers = [field.name for field in dataclasses.fields(schedule) if type(getattr(schedule, field.name)) is float]
    for name in numbers:
        assert dataclasses.replace(schedule, **{name: 0.4375 if name != "multiplier" else 1.75}) != schedule
    assert numbers or isinstance(schedule, Join)


def test_a_list_of_milestones_or_schedules_is_copied():
    milestones, parts = [0.5], [Constant(), Linear()]
    steps, joined = Steps(milestones), Join(parts, milestones)
    milestones.append(0.75)
    parts.pop()
    assert steps == Steps((0.5,))
    assert joined == Join((Constant(), Linear()), (0.5,))


# ------------------------------------------------------------------ epochs


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Warmup("2ep", Cosine()), Warmup(20, Cosine())),
        (Warmup("0.5ep", Cosine(), 0.1), Warmup(5, Cosine(), 0.1)),
        (WarmupCosine("3ep", 0.1), WarmupCosine(30, 0.1)),
        (Warmup(4, Warmup("1ep", Cosine())), Warmup(4, Warmup(10, Cosine()))),
        (Warmup("1ep", Warmup(0.5, WarmupCosine("2ep"))), Warmup(10, Warmup(0.5, WarmupCosine(20)))),
        (Warmup("0ep", Cosine()), Warmup(0, Cosine())),
        (Steps(["1ep", 20, "3ep", 0.9]), Steps([10, 20, 30, 0.9])),
        (InverseSqrt("2ep"), InverseSqrt(20)),
        (InverseTime("2ep"), InverseTime(20)),
        (CosineRestarts(length="1ep", multiplier=2), CosineRestarts(length=10, multiplier=2)),
        (Triangular(length="0.4ep"), Triangular(length=4)),
        (OneCycle("2ep"), OneCycle(20)),
        (Cooldown("1ep", Steps(["2ep"]), 0.1), Cooldown(10, Steps([20]), 0.1)),
        (WarmupStableDecay("1ep", "2ep"), WarmupStableDecay(10, 20)),
        (WarmupStableDecay("1ep", 0.5), WarmupStableDecay(10, 0.5)),
        (Join([Constant(), Linear()], ["3ep"]), Join([Constant(), Linear()], [30])),
        (
            Join([Warmup("1ep", Cosine()), Linear(), OneCycle("1ep")], [0.4, "3ep"]),
            Join([Warmup(10, Cosine()), Linear(), OneCycle(10)], [0.4, 30]),
        ),
    ],
    ids=repr,
)
def test_epochs_become_steps_wherever_they_are(schedule, expected):
    before = repr(schedule)
    resolved = resolve_epochs(schedule, 10)
    assert resolved == expected
    assert our_factors(resolved, 50) == our_factors(expected, 50)
    assert repr(schedule) == before


def test_every_duration_may_be_given_in_epochs():
    for make in DURATIONS.values():
        assert resolve_epochs(make("3ep"), 10) == make(30)


def test_epochs_of_a_fractional_length_become_whole_steps():
    resolved = resolve_epochs(WarmupCosine("3ep"), 2.5)
    assert isinstance(resolved.warmup, int)
    assert abs(resolved.warmup - 7.5) <= 0.5


@every_schedule
@pytest.mark.parametrize("steps_per_epoch", [10, math.inf])
def test_a_schedule_without_epochs_is_returned_itself(schedule, steps_per_epoch):
    assert resolve_epochs(schedule, steps_per_epoch) is schedule


@pytest.mark.parametrize("schedule", [math.hypot, Warmup, None])
def test_what_is_no_schedule_dataclass_is_returned_itself(schedule):
    assert resolve_epochs(schedule, 10) is schedule


EPOCHS = [
    *((make("2ep"), f"{name}: {field}") for (name, field), make in DURATIONS.items()),
    (Warmup(3, WarmupCosine("2ep")), "WarmupCosine: warmup"),
    (Join([Constant(), Cooldown("2ep", Constant())], [0.5]), "Cooldown: duration"),
]
every_epochs = pytest.mark.parametrize(
    ("schedule", "where"), EPOCHS, ids=[f"{where}{i}" for i, (_, where) in enumerate(EPOCHS)]
)


@every_epochs
@pytest.mark.parametrize("length", [math.inf, math.nan])
def test_epochs_of_an_unsized_loader_are_refused(schedule, where, length):
    text = f"{where} must be in steps or a fraction of the run, since an epoch has no known length, got '2ep'. Give"
    with pytest.raises(ValueError, match=re.escape(text)):
        resolve_epochs(schedule, length)


@every_epochs
def test_unresolved_epochs_are_refused_when_called(schedule, where):
    text = "must be in steps or a fraction of the run here, got '2ep'. Epochs are known in a Trainer only: pass"
    with pytest.raises(ValueError, match=re.escape(f"{where} {text}")):
        schedule(9, 10)


# ------------------------------------------------------------------ what they are made of


@every_length
def test_progress_is_the_fraction_of_the_run_done(total):
    assert [progress("x", k, total) for k in range(total)] == near([k / total for k in range(total)])
    assert progress("x", total, total) == progress("x", total + 5, total) == 1.0


@pytest.mark.parametrize(("duration", "expected"), [(0, 0), (7, 7), (20, 20), (0.05, 1.0), (0.33, 6.6)])
def test_a_duration_in_steps_is_not_rounded(duration, expected):
    assert duration_in_steps("x", "y", duration, 20) == near(expected)
    assert in_steps("x", "y", duration, 20) == near(expected)


@pytest.mark.parametrize("total", [100, 300, 1000, 10_000])
def test_a_fraction_that_is_whole_steps_is_exactly_so(total):
    for hundredths in range(1, 100):
        steps = in_steps("x", "y", hundredths / 100, total)
        assert steps == hundredths * total // 100


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt", "exponential"])
@pytest.mark.parametrize(("start", "end"), [(0.1, 0.7), (3.0, 0.3)])
def test_the_way_between_two_factors_ends_at_them_exactly(shape, start, end):
    assert interpolate(shape, start, end, 0.0) == interpolate(shape, start, end, -1.0) == start
    assert interpolate(shape, start, end, 1.0) == interpolate(shape, start, end, 2.0) == end
    way = [interpolate(shape, start, end, i / 20) for i in range(21)]
    assert way == sorted(way, reverse=start > end)
