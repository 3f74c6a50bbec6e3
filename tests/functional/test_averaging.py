import copy
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_tricks.functional.averaging import can_average, check_decay, ema_

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
