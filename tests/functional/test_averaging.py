import copy
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_tricks import Cosine, CosineRestarts, PowerFunction, Triangular
from lightning_tricks.functional.averaging import (
    Averaging,
    HalfLife,
    Warmed,
    can_average,
    check_decay,
    ema_,
    mean,
    pieces,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Weights(nn.Module):
    """A parameter of every kind that is averaged."""

    def __init__(self):
        super().__init__()
        self.several = nn.ParameterList(
            [torch.randn(3, 4).to(dtype) for dtype in DTYPES]
            + [torch.randn(()), torch.randn(0, 3), torch.randn(4, 3).t(), torch.randn(2, 3, 4, 4)[:, 1]]
        )


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.9, 0.999])
def test_the_average_is_torchs_bit_for_bit(decay):
    module = Weights()
    theirs = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))
    ours = []
    for step in range(30):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        theirs.update_parameters(module)
        if step == 0:
            ours = [p.detach().clone() for p in module.parameters()]
        else:
            ema_(ours, list(module.parameters()), decay)
    for own, expected in zip(ours, theirs.module.parameters(), strict=True):
        assert own.dtype == expected.dtype
        assert torch.equal(own, expected)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=10),
    st.floats(0, 1, exclude_max=True),
)
def test_the_average_is_its_formula(weights, decay):
    average = [torch.tensor(0.5, dtype=torch.float64)]
    expected = 0.5
    for weight in weights:
        ema_(average, [torch.tensor(weight, dtype=torch.float64)], decay)
        expected = decay * expected + (1 - decay) * weight
    assert average[0].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@every_dtype
def test_a_step_is_exact_to_the_rounding_of_the_dtype(dtype):
    average, weights = torch.randn(50).to(dtype), torch.randn(50).to(dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = 0.75 * average.to(wide) + 0.25 * weights.to(wide)
    ema_([average], [weights], 0.75)
    eps = torch.finfo(dtype).eps
    assert average.dtype == dtype
    torch.testing.assert_close(average.to(wide), expected, rtol=2 * eps, atol=2 * eps)


def test_a_decay_of_0_copies_the_weights():
    average, weights = torch.randn(5), torch.randn(5)
    ema_([average], [weights], 0)
    assert torch.equal(average, weights)


def test_the_average_changes_in_place_and_the_weights_stay():
    whole = torch.randn(4, 6)
    average, untouched = whole[:, ::2], whole[:, 1::2].clone()
    weights = torch.randn(3, 4).t()
    address, before, expected = average.data_ptr(), weights.clone(), 0.5 * average + 0.5 * weights
    ema_([average], [weights], 0.5)
    assert average.data_ptr() == address
    torch.testing.assert_close(whole[:, ::2], expected)
    assert torch.equal(whole[:, 1::2], untouched)
    assert torch.equal(weights, before)


def test_parameters_that_require_a_gradient_are_averaged_without_a_graph():
    average, weights = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    ema_([average], [weights], 0.5)
    assert average.grad_fn is None
    assert average.tolist() == [0.5, 0.5]


def test_lists_of_another_length_are_refused():
    with pytest.raises(RuntimeError, match="same number of tensors"):
        ema_([torch.ones(1)], [torch.ones(1), torch.ones(1)], 0.5)


def test_nothing_to_average_is_no_error():
    average = []
    ema_(average, [], 0.5)
    assert average == []


@pytest.mark.parametrize(
    "call", [lambda d: ema_([torch.ones(1)], [torch.ones(1)], d), lambda d: check_decay("ema_", d)]
)
@pytest.mark.parametrize(
    ("decay", "error"),
    [
        *((value, ValueError) for value in (-0.1, 1, 1.0, 1.5, math.nan, math.inf, -math.inf)),
        *((value, TypeError) for value in (True, "0.9", None, [0.9])),
    ],
    ids=repr,
)
def test_a_decay_must_be_a_share_of_the_old_average(call, decay, error):
    kind = "a number " if error is TypeError else ""
    text = f"ema_: decay must be {kind}in [0, 1), got {decay!r}. It is the weight of the old average: 0.999 averages"
    with pytest.raises(error, match=re.escape(text)):
        call(decay)


def test_a_refused_decay_changes_nothing():
    average = torch.ones(2)
    with pytest.raises(ValueError, match="decay"):
        ema_([average], [torch.zeros(2)], 1.0)
    assert average.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        *((torch.ones(2, dtype=dtype), True) for dtype in DTYPES),
        *((torch.ones(2, dtype=dtype), False) for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool)),
        (torch.tensor(1.0), True),
        (torch.empty(0), True),
        (torch.empty(0, dtype=torch.int64), False),
        (torch.tensor([0.0, math.inf]), False),
        (torch.tensor([0.0, -math.inf]), False),
        (torch.tensor([0.0, math.nan]), False),
        (torch.tensor([complex(0, math.inf)]), False),
    ],
)
def test_only_finite_floating_or_complex_tensors_can_be_averaged(tensor, expected):
    before = copy.deepcopy(tensor)
    assert can_average(tensor) is expected
    assert torch.equal(tensor.isnan(), before.isnan())


# ------------------------------------------------------------------ decays, and when an average is updated


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_what_was_averaged_weighs_half_after_its_half_life(steps):
    average = [torch.ones(1, dtype=torch.float64)]
    for step in range(steps):
        ema_(average, [torch.zeros(1, dtype=torch.float64)], HalfLife(steps)(step + 1, 5000))
    assert average[0].item() == pytest.approx(0.5)
    assert HalfLife(steps / 10_000)(1, 10_000) == HalfLife(steps)(1, 10_000)


@pytest.mark.parametrize("updates", [1, 2, 10, 1000, 10**6])
def test_warmed_decay_is_timms(updates):
    for decay, gamma, power in ((0.9999, 1.0, 2 / 3), (0.99, 5.0, 0.75)):
        expected = max(0.0, min(decay, 1 - (1 + updates / gamma) ** -power))
        assert Warmed(decay, power, gamma)(updates, 10**6) == pytest.approx(expected, abs=1e-15)


def test_average_under_the_mean_is_the_mean():
    values = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    average = [values[0].clone()]
    for updates, value in enumerate(values[1:], start=1):
        ema_(average, [value], mean(updates, 50))
    assert torch.allclose(average[0], values.mean(0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("start", [0, 1, 4, 0.25, 0.7])
@pytest.mark.parametrize("every", [1, 2, 3, 0.1, 0.15])
def test_steps_that_are_due_are_those_of_an_explicit_count(start, every):
    total = 20
    begin = start * total if isinstance(start, float) else start
    stretch = every * total if isinstance(every, float) else every
    due, filled = [], 0
    for step in range(1, total + 1):
        complete = math.floor(step / stretch + 1e-9)
        if complete > filled and step > begin:
            due.append(step)
        filled = complete
    plan = Averaging(0.9, start, every)
    got = [step for step in range(1, total + 1) if plan(step, 1, total) is not None]
    assert got == due
    assert [plan(step, 1, total) for step in got] == pytest.approx([0.9**stretch] * len(got))


@pytest.mark.parametrize(("schedule", "ends"), [(Triangular(4), [5, 10, 15, 20]), (CosineRestarts(3), [7, 14, 20])])
def test_steps_that_are_due_at_ends_of_cycles(schedule, ends):
    plan = Averaging(0.9, 0.3, schedule)
    due = {step: decay for step in range(1, 21) if (decay := plan(step, 1, 20)) is not None}
    stretches = {end: end - before for before, end in zip([0, *ends], ends, strict=False)}
    assert due == pytest.approx({end: 0.9 ** stretches[end] for end in ends if end > 6})
    assert plan.needs_length


def test_half_life_in_samples():
    assert HalfLife("2e5samples").samples == 200_000
    assert HalfLife("12.5samples").samples == 12.5
    assert HalfLife(5).samples is None
    assert HalfLife("5ep").samples is None


@given(st.lists(st.integers(0, 70_000), max_size=4), st.booleans())
def test_pieces_are_the_same_numbers(sizes, transposed):
    tensors = [torch.arange(2.0 * size).view(2, size) for size in sizes]
    tensors = [tensor.t() for tensor in tensors] if transposed else tensors
    averages = [torch.zeros_like(tensor) for tensor in tensors]
    cut_averages, cut = pieces(averages, tensors)
    ema_(cut_averages, cut, 0.0)
    for average, tensor in zip(averages, tensors, strict=True):
        assert torch.equal(average, tensor)
    assert all(left.shape == right.shape for left, right in zip(cut_averages, cut, strict=True))
    assert transposed or all(part.numel() < 1 << 15 or part.numel() >= 1 << 17 for part in cut)


def test_large_tensors_and_those_of_unlike_layout_are_not_cut():
    large = torch.zeros(1 << 17)
    assert [len(part) for part in pieces([large], [large])] == [1, 1]
    square = torch.zeros(300, 300)
    assert [len(part) for part in pieces([square.t()], [square])] == [1, 1]


def test_decays_of_updates_take_no_notice_of_the_steps_in_between():
    assert Averaging(mean, every_n_steps=5)(10, 3, 100) == 0.75
    assert Averaging(PowerFunction(0.1), every_n_steps=5)(10, 3, 100) == PowerFunction(0.1)(3, 100)


def test_length_of_the_run_is_asked_for_only_where_a_fraction_is():
    assert not Averaging(PowerFunction(0.1)).needs_length
    without = [Averaging(0.9), Averaging(HalfLife(5)), Averaging(Warmed(), 3, "1ep"), Averaging(mean, "1ep")]
    assert [plan.needs_length for plan in without] == [False] * 4
    needing = [Averaging(0.9, 0.5), Averaging(HalfLife(0.1)), Averaging(mean, 0, 0.1), Averaging(lambda n, T: 0.5)]
    assert [plan.needs_length for plan in needing] == [True] * 4


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: HalfLife(0), ValueError, "HalfLife: duration must be at least 1"),
        (lambda: HalfLife(1.5), ValueError, r"HalfLife: duration must be in \(0, 1\)"),
        (lambda: HalfLife(None), TypeError, "HalfLife: duration must be a number"),
        (lambda: HalfLife("0samples"), ValueError, "HalfLife: duration must be above 0 samples, got '0samples'"),
        (lambda: HalfLife("many samples"), ValueError, "HalfLife: duration must be samples written as '50000samples'"),
        (lambda: HalfLife("50samples")(1, 9), ValueError, "HalfLife: duration must be in steps outside a run"),
        (
            lambda: Averaging(0.9, every_n_steps=Cosine()),
            ValueError,
            "EMA: every_n_steps must be a schedule that has c",
        ),
        (lambda: Warmed(1.0), ValueError, r"Warmed: decay must be in \[0, 1\), got 1.0"),
        (lambda: Warmed(power=0), ValueError, "Warmed: power must be finite and above 0, got 0"),
        (lambda: Warmed(inv_gamma=-1), ValueError, "Warmed: inv_gamma must be finite and above 0"),
        (lambda: Averaging(1.5), ValueError, r"EMA: decay must be in \[0, 1\), got 1.5"),
        (lambda: Averaging(HalfLife), TypeError, r"EMA: decay must be a number in \[0, 1\), got <class"),
        (lambda: Averaging("0.9"), TypeError, r"EMA: decay must be a number in \[0, 1\), got '0.9'"),
        (lambda: Averaging(0.9, start=-1), ValueError, "EMA: start must be at least 0"),
        (lambda: Averaging(0.9, every_n_steps=0), ValueError, "EMA: every_n_steps must be at least 1"),
    ],
)
def test_wrong_values_of_a_plan(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("every", [1, 3, 10])
def test_growing_decay_looks_back_as_far_when_updates_are_seldom(every):
    """Mean age of what is averaged, in steps, after 3,000 of them."""
    plan, age, updates = Averaging(Warmed(0.9999), every_n_steps=every), 0.0, 0
    for step in range(1, 3001):
        decay = plan(step, max(updates, 1), 3000)
        age += 1
        if decay is not None:
            age, updates = (decay * age if updates else 0.0), updates + 1
    assert age == pytest.approx(197, rel=0.05)


def test_function_of_a_user_sees_the_steps_since_the_average_began():
    seen = []
    plan = Averaging(lambda updates, total: seen.append(updates) or 0.5, start=4, every_n_steps=3)
    assert [plan(step, 1, 20) for step in (5, 6, 9, 12)] == [None, 0.5**3, 0.5**3, 0.5**3]
    assert seen == [1, 3, 6]


@given(st.integers(1, 400), st.sampled_from([0.1, 0.2, 0.25, 0.05, 1 / 3, 0.7]))
def test_stretches_that_are_a_fraction_of_the_run_end_with_it(total, every):
    plan = Averaging(0.5, every_n_steps=every)
    due = {step: decay for step in range(1, total + 1) if (decay := plan(step, 1, total)) is not None}
    if (1 / every).is_integer():
        assert total in due
    assert len(due) == min(total, math.floor(1 / every + 1e-9))
    stretches = [step - before for before, step in zip([0, *due], due, strict=False)]
    assert list(due.values()) == [0.5**stretch for stretch in stretches]


def test_eight_bits_are_not_averaged():
    assert not can_average(torch.ones(2).to(torch.float8_e4m3fn))


@pytest.mark.parametrize(("value", "error"), [(1.0, ValueError), (-0.1, ValueError), (None, TypeError)])
@pytest.mark.parametrize("every", [1, 3])
def test_what_a_function_of_a_user_gives_is_checked(value, error, every):
    with pytest.raises(error, match=r"EMA: decay must be .*in \[0, 1\), got"):
        Averaging(lambda updates, total: value, every_n_steps=every)(3, 2, 10)
