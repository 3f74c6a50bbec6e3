import dataclasses
import math
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR

from lightning_tricks.functional.schedules import (
    Constant,
    Cosine,
    Linear,
    Warmup,
    WarmupCosine,
    check_duration,
    duration_in_steps,
    progress,
    resolve_epochs,
)

LENGTHS = [1, 2, 3, 7, 10, 51]
every_length = pytest.mark.parametrize("total", LENGTHS)
EXAMPLES = [Constant(0.5), Linear(0.25, 0.75), Cosine(0.1), Warmup(1, Linear(), 0.5), WarmupCosine(1, 0.2)]
every_schedule = pytest.mark.parametrize("schedule", EXAMPLES, ids=lambda s: type(s).__name__)


def near(value):
    return pytest.approx(value, rel=0, abs=1e-12)


def torch_factors(make_scheduler, steps):
    """Learning rate before the first step and after each, from a base of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = make_scheduler(optimizer)
    factors = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        factors.append(optimizer.param_groups[0]["lr"])
    return factors


def our_factors(schedule, total, steps=None):
    return [schedule(k, total) for k in range((total if steps is None else steps) + 1)]


@every_length
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_constant_is_torchs(total, value):
    expected = torch_factors(lambda o: ConstantLR(o, value, total_iters=10 * total), total)
    assert our_factors(Constant(value), total) == near(expected)


@every_length
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.2, 1.0), (1.0, 0.3), (0.5, 0.5)])
def test_linear_is_torchs_and_stays_at_the_end(total, start, end):
    expected = torch_factors(lambda o: LinearLR(o, start, end, total_iters=total), 2 * total)
    assert our_factors(Linear(start, end), total, 2 * total) == near(expected)


@every_length
@pytest.mark.parametrize("end", [0.0, 0.1, 1.0, 1.5])
def test_cosine_is_torchs(total, end):
    expected = torch_factors(lambda o: CosineAnnealingLR(o, T_max=total, eta_min=end), total)
    assert our_factors(Cosine(end), total) == near(expected)


@pytest.mark.filterwarnings("ignore:The epoch parameter in")
@pytest.mark.parametrize("total", [2, 3, 7, 10, 51])
@pytest.mark.parametrize("start", [0.01, 0.5])
def test_warmup_before_a_cosine_is_torchs_sequence(total, start):
    for duration in {1, total // 2, total - 1}:
        expected = torch_factors(
            lambda o, d=duration: SequentialLR(
                o,
                [LinearLR(o, start, 1.0, total_iters=d), CosineAnnealingLR(o, T_max=total - d, eta_min=0.1)],
                milestones=[d],
            ),
            total,
        )
        assert our_factors(Warmup(duration, Cosine(0.1), start), total) == near(expected)


@every_length
@pytest.mark.parametrize("end", [0.0, 0.2])
def test_warmup_cosine_is_torchs_lambda(total, end):
    for duration in {0, 1, total // 3, total}:

        def factor(k, d=duration):
            if k < d:
                return k / d
            x = (k - d) / (total - d) if total > d else 1.0
            return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * x))

        expected = torch_factors(lambda o, f=factor: LambdaLR(o, f), total)
        assert our_factors(WarmupCosine(duration, end), total) == near(expected)


@pytest.mark.parametrize(
    ("duration", "total"),
    [
        (d, total)
        for total in LENGTHS
        for d in (0, 1, 2, 7, 0.05, 1 / 3, 0.5, 0.9)
        if isinstance(d, float) or d <= total
    ],
)
@pytest.mark.parametrize("start", [0.0, 0.1, 1.0, 1.5])
def test_warmup_is_its_formula(total, duration, start):
    steps = duration * total if isinstance(duration, float) else duration
    then = Linear(1.0, 0.2)
    for k in range(total + 3):
        expected = start + (1 - start) * k / steps if k < steps else then(k - steps, total - steps)
        assert Warmup(duration, then, start)(k, total) == near(expected)


@every_length
@pytest.mark.parametrize("warmup", [0, 1, 0.05, 0.5])
def test_warmup_cosine_is_warmup_then_cosine(total, warmup):
    composed = Warmup(warmup, Cosine(0.1))
    assert our_factors(WarmupCosine(warmup, 0.1), total, total + 2) == our_factors(composed, total, total + 2)


def test_a_fraction_of_the_run_is_not_rounded():
    assert Warmup(0.15, Constant())(1, 10) == near(1 / 1.5)
    assert Warmup(0.15, Linear())(2, 10) == near(1 - 0.5 / 8.5)


@pytest.mark.parametrize(("steps", "fraction"), [(3, 0.25), (6, 0.5), (9, 0.75)])
def test_steps_and_the_same_fraction_agree(steps, fraction):
    assert our_factors(Warmup(steps, Cosine()), 12) == near(our_factors(Warmup(fraction, Cosine()), 12))
    assert our_factors(WarmupCosine(steps), 12) == near(our_factors(WarmupCosine(fraction), 12))


def test_any_function_can_follow_a_warmup_and_sees_what_is_left():
    seen = []
    Warmup(2, lambda k, total: seen.append((k, total)) or 0.5)(5, 9)
    assert seen == [(3, 7)]


@pytest.mark.parametrize(
    ("schedule", "end"),
    [(Constant(0.4), 0.4), (Linear(1, 0.3), 0.3), (Cosine(0.1), 0.1), (Warmup(0, Cosine(0.1)), 0.1)],
)
def test_a_run_of_no_steps_is_at_its_end(schedule, end):
    assert schedule(0, 0) == end


FACTORS = st.floats(0, 2)
FRACTIONS = st.floats(0.01, 0.99)
SHAPES = st.builds(Constant, FACTORS) | st.builds(Linear, FACTORS, FACTORS) | st.builds(Cosine, FACTORS)
SCHEDULES = st.recursive(SHAPES, lambda inner: st.builds(Warmup, FRACTIONS, inner, FACTORS), max_leaves=3) | st.builds(
    WarmupCosine, FRACTIONS, FACTORS
)
check = settings(deadline=None, max_examples=100)


def turning_points(schedule):
    match schedule:
        case Constant(value):
            return [value]
        case Linear(start, end):
            return [start, end]
        case Cosine(end):
            return [1.0, end]
        case Warmup(_, then, start):
            return [start, 1.0, *turning_points(then)]
        case WarmupCosine(_, end):
            return [0.0, 1.0, end]


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


@check
@given(FACTORS, st.integers(1, 200))
def test_shapes_reach_their_end_exactly(end, total):
    assert Linear(1.0, end)(total, total) == end
    assert Cosine(end)(total, total) == end
    assert Linear(end, 1.0)(0, total) == end


@check
@given(st.one_of(FRACTIONS, st.integers(1, 10)), st.sampled_from([Cosine(0.2), Linear(1.0, 0.5), Constant()]), FACTORS)
def test_a_warmup_meets_what_follows_without_a_jump(duration, then, start):
    total, schedule = 11, Warmup(duration, then, start)
    join = duration * total if isinstance(duration, float) else duration
    assert schedule(join, total) == near(1.0)
    assert schedule(join - 1e-9, total) == pytest.approx(1.0, abs=1e-6)


@check
@given(SCHEDULES)
def test_a_schedule_survives_pickle_and_repr_and_can_be_hashed(schedule):
    for again in (pickle.loads(pickle.dumps(schedule)), eval(repr(schedule))):
        assert again == schedule
        assert hash(again) == hash(schedule)


@every_schedule
def test_a_schedule_cannot_be_changed_and_differs_from_another(schedule):
    field = dataclasses.fields(schedule)[-1].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, field, 0.0)
    assert dataclasses.replace(schedule, **{field: 0.875}) != schedule


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
    ],
)
def test_epochs_become_steps_wherever_they_are(schedule, expected):
    before = repr(schedule)
    resolved = resolve_epochs(schedule, 10)
    assert resolved == expected
    assert our_factors(resolved, 50) == our_factors(expected, 50)
    assert repr(schedule) == before


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


@pytest.mark.parametrize(
    ("schedule", "where", "value"),
    [
        (Warmup("2ep", Cosine()), "Warmup: duration", "2ep"),
        (Warmup(3, WarmupCosine("1ep")), "WarmupCosine: warmup", "1ep"),
    ],
)
@pytest.mark.parametrize("length", [math.inf, math.nan])
def test_epochs_of_an_unsized_loader_are_refused(schedule, where, value, length):
    text = f"{where} must be in steps or a fraction of the run, since an epoch has no known length, got '{value}'. Give"
    with pytest.raises(ValueError, match=re.escape(text)):
        resolve_epochs(schedule, length)


def test_unresolved_epochs_are_refused_when_called():
    text = "must be in steps or a fraction of the run here, got '2ep'. Epochs are known in a Trainer only: pass"
    with pytest.raises(ValueError, match=re.escape(f"Warmup: duration {text}")):
        Warmup("2ep", Cosine())(0, 10)
    with pytest.raises(ValueError, match=re.escape(f"WarmupCosine: warmup {text}")):
        WarmupCosine("2ep")(0, 10)


# ------------------------------------------------------------------ bad values

BAD_FACTORS = [(-0.1, ValueError), (-1, ValueError), (math.nan, ValueError), (math.inf, ValueError)]
BAD_FACTORS += [(True, TypeError), ("0.5", TypeError), (None, TypeError), ([1.0], TypeError)]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Constant, "Constant: value"),
        (Linear, "Linear: start"),
        (lambda end: Linear(end=end), "Linear: end"),
        (Cosine, "Cosine: end"),
        (lambda start: Warmup(1, Cosine(), start), "Warmup: start"),
        (lambda end: WarmupCosine(1, end), "WarmupCosine: end"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize(("value", "error"), BAD_FACTORS, ids=repr)
def test_a_factor_must_be_a_finite_number_of_at_least_0(make, name, value, error):
    kind = "a number " if error is TypeError else ""
    text = f"{name} must be {kind}finite and at least 0 (factor of the base value), got {value!r}. It multiplies"
    with pytest.raises(error, match=re.escape(text)):
        make(value)


FRACTION = "in (0, 1) when it is a float (fraction of the run)"
COUNT = "at least 0 when it is an int (optimizer steps)"
BAD_DURATIONS = [(value, ValueError, FRACTION) for value in (0.0, 1.0, 1.5, -0.1, math.nan, math.inf)]
BAD_DURATIONS += [
    (value, ValueError, "epochs written as '3ep'") for value in ("3", "ep", "-1ep", "3 ep", "3epochs", "")
]
BAD_DURATIONS += [(-1, ValueError, COUNT)]
BAD_DURATIONS += [(value, TypeError, f"a number {COUNT}") for value in (True, None, [3], 3j)]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda d: Warmup(d, Cosine()), "Warmup: duration"),
        (WarmupCosine, "WarmupCosine: warmup"),
        (lambda d: check_duration("Owner", "length", d), "Owner: length"),
    ],
    ids=["Warmup", "WarmupCosine", "check_duration"],
)
@pytest.mark.parametrize(("value", "error", "condition"), BAD_DURATIONS, ids=repr)
def test_a_duration_must_be_steps_a_fraction_or_epochs(make, name, value, error, condition):
    text = f"{name} must be {condition}, got {value!r}. Give 500 for steps, 0.05 for a fraction of the run, '3ep'"
    with pytest.raises(error, match=re.escape(text)):
        make(value)


@pytest.mark.parametrize("then", [None, 0.5, "cosine", Cosine, [Cosine()]], ids=repr)
def test_what_follows_a_warmup_must_be_a_schedule(then):
    text = f"Warmup: then must be a schedule (step, total_steps) -> factor, got {then!r}. Give a schedule, as in"
    with pytest.raises(TypeError, match=re.escape(text)):
        Warmup(1, then)


def test_a_warmup_longer_than_the_run_is_refused():
    text = "must be at most the run's 10 optimizer steps, got 11. Shorten it, or train for longer."
    with pytest.raises(ValueError, match=re.escape(f"Warmup: duration {text}")):
        Warmup(11, Cosine())(0, 10)
    with pytest.raises(ValueError, match=re.escape(f"WarmupCosine: warmup {text}")):
        WarmupCosine(11)(0, 10)
    assert Warmup(10, Cosine())(10, 10) == 0.0


@every_schedule
@pytest.mark.parametrize("step", [-1, -0.5, math.nan])
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


@every_length
def test_progress_is_the_fraction_of_the_run_done(total):
    assert [progress("x", k, total) for k in range(total)] == near([k / total for k in range(total)])
    assert progress("x", total, total) == progress("x", total + 5, total) == 1.0


@pytest.mark.parametrize(("duration", "expected"), [(0, 0), (7, 7), (20, 20), (0.05, 1.0), (0.33, 6.6)])
def test_a_duration_in_steps_is_not_rounded(duration, expected):
    assert duration_in_steps("x", "y", duration, 20) == near(expected)
