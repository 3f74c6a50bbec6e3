import dataclasses
import math
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EarlyStopping

from lightning_tricks.functional.stopping import Patience, PatienceState, Stop

DYADIC = st.integers(-8, 8).map(lambda n: n / 16)
SPECIAL = st.sampled_from([math.nan, math.inf, -math.inf])
SCORES = DYADIC | DYADIC | DYADIC | st.floats(-0.5, 0.5, width=32) | SPECIAL
RULES = st.fixed_dictionaries(
    {
        "patience": st.integers(0, 3),
        "min_delta": st.sampled_from([0.0, 0.1, 0.25]),
        "mode": st.sampled_from(["min", "max"]),
        "check_finite": st.booleans(),
        "stopping_threshold": st.none() | DYADIC,
        "divergence_threshold": st.none() | DYADIC,
    }
)
check = settings(deadline=None, max_examples=150)


def run(rule, scores):
    """State and reason after each score."""
    state, history = PatienceState(), []
    for score in scores:
        state, stop = rule(state, score)
        history.append((state, stop))
    return history


def last(rule, scores):
    return run(rule, scores)[-1]


def same(a, b):
    return (a is None and b is None) or torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def assert_lightning_decides_the_same(arguments, scores):
    theirs = EarlyStopping("loss", **arguments)
    rule, state = Patience(**arguments), PatienceState()
    for score in scores:
        state, stop = rule(state, score)
        should_stop, _ = theirs._evaluate_stopping_criteria(score)
        assert (stop is not None) == should_stop
        if stop is not None:
            assert stop.kind == theirs.stopping_reason.name
        if stop is not None and stop.kind == "STOPPING_THRESHOLD":
            assert same(state.best, score)
            return  # Lightning does not record this score as the best
        assert state.waited == theirs.wait_count
        if state.best is None:
            assert theirs.best_score.isinf()
        else:
            assert same(state.best, theirs.best_score)


@check
@given(RULES, st.lists(SCORES, min_size=1, max_size=12))
def test_decisions_counts_and_best_score_are_lightnings(arguments, scores):
    assert_lightning_decides_the_same(arguments, torch.tensor(scores))


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience", range(4))
@pytest.mark.parametrize("check_finite", [True, False])
def test_on_noisy_curves_decisions_are_lightnings(mode, patience, check_finite):
    source = torch.Generator().manual_seed(patience)
    for min_delta in (0.0, 0.1, 0.25):
        for threshold in (None, -1.0, 1.0):
            for _ in range(5):
                scores = torch.randn(30, generator=source).cumsum(0) / 4
                scores[torch.randint(30, (2,), generator=source)] = torch.tensor([math.nan, math.inf])
                arguments = {"mode": mode, "patience": patience, "check_finite": check_finite, "min_delta": min_delta}
                assert_lightning_decides_the_same({**arguments, "stopping_threshold": threshold}, scores)
                assert_lightning_decides_the_same({**arguments, "divergence_threshold": threshold}, scores)


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
@pytest.mark.parametrize(("score", "improved"), [(0.5, True), (0.75, False), (0.875, False), (1.25, False)])
def test_an_improvement_is_larger_than_min_delta(mode, sign, score, improved):
    state, _ = last(Patience(mode=mode, min_delta=0.25), [sign * 1.0, sign * score])
    assert state.improved is improved
    assert state.best == sign * (score if improved else 1.0)
    assert state.waited == (0 if improved else 1)


@check
@given(RULES, st.lists(DYADIC | SPECIAL, min_size=1, max_size=10))
def test_numbers_and_tensors_are_judged_alike(arguments, scores):
    rule = Patience(**{**arguments, "min_delta": 0.25})
    for (state, stop), (state_of_tensor, stop_of_tensor) in zip(
        run(rule, scores), run(rule, torch.tensor(scores)), strict=True
    ):
        assert stop == stop_of_tensor
        assert same(state.best, state_of_tensor.best)
        assert (state.checks, state.waited, state.improved) == (
            state_of_tensor.checks,
            state_of_tensor.waited,
            state_of_tensor.improved,
        )


@check
@given(RULES, st.integers(0, 4), st.lists(SCORES, min_size=1, max_size=10))
def test_ignored_checks_are_as_if_they_had_not_been(arguments, ignored, scores):
    history = run(Patience(**arguments, ignore_first=ignored), torch.tensor(scores))
    assert [state.checks for state, _ in history] == list(range(1, len(scores) + 1))
    for state, stop in history[:ignored]:
        assert stop is None
        assert (state.waited, state.best, state.improved) == (0, None, False)
    later = run(Patience(**arguments), torch.tensor(scores)[ignored:])
    for (state, stop), (expected, expected_stop) in zip(history[ignored:], later, strict=True):
        assert stop == expected_stop
        assert same(state.best, expected.best)
        assert (state.waited, state.improved) == (expected.waited, expected.improved)


@check
@given(RULES, st.lists(DYADIC, min_size=1, max_size=10))
def test_min_and_max_mirror_each_other(arguments, scores):
    flip = {"min": "max", "max": "min"}[arguments["mode"]]
    thresholds = {
        name: None if arguments[name] is None else -arguments[name]
        for name in ("stopping_threshold", "divergence_threshold")
    }
    mirrored = run(Patience(**{**arguments, **thresholds, "mode": flip}), [-score for score in scores])
    for (state, stop), (other, other_stop) in zip(run(Patience(**arguments), scores), mirrored, strict=True):
        assert (state.waited, state.improved) == (other.waited, other.improved)
        assert (stop and stop.kind) == (other_stop and other_stop.kind)
        assert (state.best is None and other.best is None) or state.best == -other.best


def test_the_best_score_of_a_minimum_without_delta_is_the_least():
    scores = [3.0, 2.0, 2.5, 1.0, 4.0, 1.0]
    history = run(Patience(patience=10), scores)
    assert [state.best for state, _ in history] == [min(scores[: n + 1]) for n in range(len(scores))]
    assert [state.improved for state, _ in history] == [True, True, False, True, False, False]


@pytest.mark.parametrize(("mode", "scores", "best"), [("min", [0.25, 0.375], 0.25), ("max", [0.875, 0.625], 0.875)])
def test_a_worse_score_past_the_threshold_does_not_replace_the_best(mode, scores, best):
    state, stop = last(Patience(mode=mode, stopping_threshold=0.5), scores)
    assert stop.kind == "STOPPING_THRESHOLD"
    assert state.best == best
    assert not state.improved


def test_ignoring_the_first_checks_ignores_nan_and_thresholds():
    rule = Patience(patience=1, ignore_first=3, stopping_threshold=0.5, divergence_threshold=2.0)
    assert [stop for _, stop in run(rule, [math.nan, 0.0, 100.0])] == [None, None, None]


@pytest.mark.parametrize(
    ("arguments", "scores", "expected"),
    [
        (
            {"patience": 2},
            [1.0, 0.5, 0.5, 0.75],
            Stop("PATIENCE_EXHAUSTED", "no improvement in the last 2 checks; the best score was 0.5"),
        ),
        (
            {"patience": 1, "check_finite": False},
            [math.nan],
            Stop("PATIENCE_EXHAUSTED", "no improvement in the last 1 checks; there was no finite score"),
        ),
        ({}, [1.0, math.nan], Stop("NON_FINITE_METRIC", "the score nan is not finite")),
        ({}, [-math.inf], Stop("NON_FINITE_METRIC", "the score -inf is not finite")),
        (
            {"stopping_threshold": 0.5},
            [0.5, 0.25],
            Stop("STOPPING_THRESHOLD", "the score 0.25 is better than stopping_threshold=0.5"),
        ),
        (
            {"divergence_threshold": 2},
            [2.0, 2.5],
            Stop("DIVERGENCE_THRESHOLD", "the score 2.5 is worse than divergence_threshold=2"),
        ),
        (
            {"divergence_threshold": 0.5, "mode": "max"},
            [0.5, 0.25],
            Stop("DIVERGENCE_THRESHOLD", "the score 0.25 is worse than divergence_threshold=0.5"),
        ),
    ],
)
def test_the_reason_says_what_happened_with_the_numbers(arguments, scores, expected):
    for values in (scores, torch.tensor(scores)):
        history = run(Patience(**arguments), values)
        assert [stop for _, stop in history[:-1]] == [None] * (len(scores) - 1)
        assert history[-1][1] == expected


def test_a_rule_is_a_value():
    rule = Patience(patience=5, mode="max", stopping_threshold=0.9)
    for again in (pickle.loads(pickle.dumps(rule)), eval(repr(rule))):
        assert again == rule
        assert hash(again) == hash(rule)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.patience = 1


def test_a_rule_keeps_no_state_of_its_own():
    rule, state = Patience(patience=1), PatienceState(checks=3, waited=0, best=0.5)
    assert rule(state, 1.0) == rule(state, 1.0)
    assert state == PatienceState(checks=3, waited=0, best=0.5)


@pytest.mark.parametrize(
    ("name", "fix"), [("patience", "Try 5"), ("ignore_first", "0 ignores none")], ids=["patience", "ignore_first"]
)
@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), *((v, TypeError) for v in (1.5, True, "3", None))], ids=repr
)
def test_counts_of_checks_must_be_whole_numbers(name, fix, value, error):
    condition = "a whole number of at least 0 (validation checks)"
    with pytest.raises(error, match=re.escape(f"EarlyStopping: {name} must be {condition}, got {value!r}. {fix}.")):
        Patience(**{name: value})


@pytest.mark.parametrize(
    ("value", "error"),
    [
        *((v, ValueError) for v in (-0.1, math.nan, math.inf)),
        *((v, TypeError) for v in (True, "0.1", None)),
    ],
    ids=repr,
)
def test_min_delta_must_be_a_finite_number_of_at_least_0(value, error):
    kind = "a number " if error is TypeError else ""
    text = f"EarlyStopping: min_delta must be {kind}at least 0, got {value!r}. It is the smallest improvement that"
    with pytest.raises(error, match=re.escape(text)):
        Patience(min_delta=value)


@pytest.mark.parametrize("mode", ["MIN", "auto", "", None, 1], ids=repr)
def test_the_mode_must_be_min_or_max(mode):
    text = f"EarlyStopping: mode must be 'min' or 'max', got {mode!r}. A loss wants 'min', an accuracy 'max'."
    with pytest.raises(ValueError, match=re.escape(text)):
        Patience(mode=mode)


@pytest.mark.parametrize("name", ["stopping_threshold", "divergence_threshold"])
@pytest.mark.parametrize(
    ("value", "error"),
    [*((v, ValueError) for v in (math.nan, math.inf, -math.inf)), *((v, TypeError) for v in ("0.5", True, [0.5]))],
    ids=repr,
)
def test_a_threshold_must_be_a_finite_number(name, value, error):
    kind = "a number " if error is TypeError else ""
    text = f"EarlyStopping: {name} must be {kind}finite, got {value!r}. It is a value of the score; None switches it"
    with pytest.raises(error, match=re.escape(text)):
        Patience(**{name: value})
