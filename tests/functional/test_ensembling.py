"""Every combination against a loop in double precision, over drawn logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tricks.functional.ensembling import (
    cycle_ends,
    disagreement,
    entropy,
    log_mean_logits,
    log_mean_probability,
    log_vote,
    mutual_information,
    weighted_average,
)
from lightning_tricks.functional.schedules import CosineRestarts, Triangular

COMBINATIONS = [log_mean_probability, log_mean_logits, log_vote]
SCORES = [entropy, mutual_information, disagreement]


@st.composite
def stacks(draw, least=1):
    members, samples, classes = draw(st.integers(least, 4)), draw(st.integers(1, 3)), draw(st.integers(2, 4))
    numbers = st.one_of(st.integers(-2, 2), st.floats(-80, 80, width=32))
    size = members * samples * classes
    values = draw(st.lists(numbers, min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float32).view(members, samples, classes)


def softmax(row):
    top = max(row)
    powers = [math.exp(z - top) for z in row]
    return [power / sum(powers) for power in powers]


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def nats(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def vote(row):
    top = max(row)
    return [(z == top) / sum(other == top for other in row) for z in row]


def by_sample(logits):
    """The members' rows of numbers for each sample."""
    return [[logits[m, n].double().tolist() for m in range(len(logits))] for n in range(logits.shape[1])]


def close(got, expected, atol=2e-6):
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=atol)


@settings(max_examples=60, deadline=None)
@given(stacks())
def test_mean_probability(logits):
    expected = [mean([softmax(row) for row in rows]) for rows in by_sample(logits)]
    close(log_mean_probability(logits).exp(), expected)
    torch.testing.assert_close(log_mean_probability(logits).exp().sum(1), torch.ones(logits.shape[1]))


@settings(max_examples=60, deadline=None)
@given(stacks())
def test_mean_logits(logits):
    close(log_mean_logits(logits).exp(), [softmax(mean(rows)) for rows in by_sample(logits)], atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(stacks())
def test_vote(logits):
    close(log_vote(logits).exp(), [mean([vote(row) for row in rows]) for rows in by_sample(logits)])


@settings(max_examples=60, deadline=None)
@given(stacks())
def test_entropy_and_mutual_information(logits):
    rows = [[softmax(row) for row in rows] for rows in by_sample(logits)]
    close(entropy(logits), [nats(mean(each)) for each in rows])
    close(mutual_information(logits), [nats(mean(each)) - mean([[nats(p)] for p in each])[0] for each in rows])
    assert (mutual_information(logits) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(stacks(least=2))
def test_disagreement(logits):
    expected = []
    for rows in by_sample(logits):
        named = [row.index(max(row)) for row in rows]
        pairs = [(a, b) for i, a in enumerate(named) for b in named[:i]]
        expected.append(sum(a != b for a, b in pairs) / len(pairs))
    close(disagreement(logits), expected)


@pytest.mark.parametrize("combine", COMBINATIONS + SCORES)
def test_places_of_an_image_are_samples(combine):
    logits = torch.randn(3, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    flat = logits.permute(0, 1, 3, 4, 2).reshape(3, -1, 4)
    got = combine(logits)
    expected = combine(flat).view(2, 5, 6, *combine(flat).shape[1:])
    torch.testing.assert_close(got, expected.permute(0, 3, 1, 2) if got.dim() == 4 else expected)


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_result_is_logits_of_itself(combine):
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    labels, combined = torch.arange(5) % 4, combine(logits)
    torch.testing.assert_close(F.log_softmax(combined, 1), combined)
    torch.testing.assert_close(F.cross_entropy(combined, labels), F.nll_loss(combined, labels))


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[[1e30, 0.0]], [[0.0, 1e4]]])
    close(log_mean_probability(logits), [[math.log(0.5), math.log(0.5)]])
    far = torch.tensor([[[0.0, -300.0]], [[0.0, -300.0]]])
    close(log_mean_probability(far), [[0.0, -300.0]])  # whose probability is 0 in single precision


def test_excluded_class():
    logits = torch.tensor([[[0.0, 0.0, -math.inf]], [[0.0, 0.0, -math.inf]]])
    for combine in COMBINATIONS:
        close(combine(logits).exp(), [[0.5, 0.5, 0.0]])
    close(entropy(logits), [math.log(2)])
    close(mutual_information(logits), [0.0])


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_nan_stays_nan(combine):
    assert combine(torch.tensor([[[0.0, math.nan]], [[0.0, 1.0]]])).isnan().any()


@pytest.mark.parametrize("combine", COMBINATIONS + SCORES)
def test_half_precision_is_widened(combine):
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert combine(logits.half()).dtype == combine(logits.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(combine(logits.half()), combine(logits.half().float()))


def test_double_precision_stays():
    assert log_mean_probability(torch.zeros(2, 1, 2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("combine", COMBINATIONS + SCORES)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (0, 3, 2)])
def test_single_logits_are_refused(combine, shape):
    with pytest.raises(ValueError, match=r"logits must be a floating tensor of shape \(M, N, K, ...\) with K >= 2"):
        combine(torch.zeros(shape))


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"entropy: logits must be a floating tensor"):
        entropy(torch.zeros(2, 3, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"log_vote: logits must be a floating tensor"):
        log_vote([1.0])
    with pytest.raises(ValueError, match="disagreement: logits must be of at least two members, got 1"):
        disagreement(torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match="weighted_average: states must be at least one"):
        weighted_average([], [])
    with pytest.raises(ValueError, match="weighted_average: states must be at least one, of the same names"):
        weighted_average([{"a": torch.ones(1)}, {"b": torch.ones(1)}], [0.5, 0.5])
    with pytest.raises(ValueError, match="weighted_average: states must be"):
        weighted_average([{"a": torch.ones(1)}], [0.5, 0.5])


def test_weighted_average_is_the_sum_by_hand():
    generator = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(3, 2, generator=generator), "count": torch.tensor(index)} for index in range(3)]
    got = weighted_average(states, [0.5, 0.2, 0.3])
    expected = 0.5 * states[0]["w"].double() + 0.2 * states[1]["w"].double() + 0.3 * states[2]["w"].double()
    torch.testing.assert_close(got["w"], expected.float())
    assert got["count"] == 0
    got["w"].zero_(), got["count"].add_(9)
    assert states[0]["w"].any()
    assert states[0]["count"] == 0


def test_half_precision_is_summed_wide():
    states = [{"w": torch.full((1,), 1.0 + 2**-10, dtype=torch.float16)} for _ in range(7)]
    assert weighted_average(states, [1 / 7] * 7)["w"] == states[0]["w"]
    infinite = {"mask": torch.tensor([0.0, -math.inf])}
    assert weighted_average([infinite, infinite], [0.25, 0.75])["mask"].tolist() == [0.0, -math.inf]


@given(st.integers(1, 12), st.integers(1, 400))
def test_cycle_ends_are_where_the_schedule_begins_a_new_cycle(cycles, total_steps):
    if cycles > total_steps:
        with pytest.raises(ValueError, match=f"cycle_ends: cycles must be few enough .* {total_steps} optimizer steps"):
            cycle_ends(cycles, total_steps)
        return
    ends = cycle_ends(cycles, total_steps)
    # The cycle that the rate of each step belongs to, in whole numbers.
    cycle = [step * cycles // total_steps for step in range(total_steps)]
    assert ends == [1 + max(step for step in range(total_steps) if cycle[step] == i) for i in range(cycles)]


@pytest.mark.parametrize(
    "schedule", [CosineRestarts(cycles=4), Triangular(cycles=4), CosineRestarts(cycles=4, end=0.3)]
)
@pytest.mark.parametrize("total_steps", [40, 41, 43])
def test_rate_of_the_step_before_an_end_is_the_cycles_last(schedule, total_steps):
    for end in cycle_ends(4, total_steps)[:-1]:
        before, after = schedule(end - 1, total_steps), schedule(end, total_steps)
        falls = schedule(end - 2, total_steps) > before
        assert falls
        assert after > before or isinstance(schedule, Triangular)


@pytest.mark.parametrize("multiplier", [1.5, 2.0, 3.0])
def test_cycles_that_grow(multiplier):
    schedule, total_steps = CosineRestarts(cycles=4, multiplier=multiplier), 1000
    factors = [schedule(step, total_steps) for step in range(total_steps)]
    restarts = [step for step in range(1, total_steps) if factors[step] > factors[step - 1]]
    assert cycle_ends(4, total_steps, multiplier) == [*restarts, total_steps]
    assert cycle_ends(2, 3, 2.0) == [1, 3]
    with pytest.raises(ValueError, match="cycle_ends: cycles must be few enough"):
        cycle_ends(10, 100, 3.0)
    with pytest.raises(ValueError, match="cycle_ends: cycles must be few enough"):
        cycle_ends(2000, 10000, 3.0)


def test_disagreement_has_the_logits_dtype_whatever_the_default():
    logits = torch.eye(3)[[0, 0, 1]].reshape(3, 1, 3).repeat(1, 2, 1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.testing.assert_close(disagreement(logits), torch.full((2,), 2 / 3, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
