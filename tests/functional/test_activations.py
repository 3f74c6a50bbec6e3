import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_tricks.functional.activations import bounds, first_tensor, statistics, sums, whole

numbers = st.lists(st.sampled_from([0.0, -1.0, 1.0]) | st.floats(-1, 1, width=32), min_size=1, max_size=30)


def loop(values, ends=None):
    """Mean, deviation and shares by an explicit loop in double precision."""
    values = [float(x) for x in values]
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / len(values))
    saturated = 0
    if ends is not None:
        low, high = ends
        saturated = sum(x <= low + 0.01 * (high - low) or x >= high - 0.01 * (high - low) for x in values)
    return [mean, std, sum(x == 0 for x in values) / len(values), saturated / len(values)]


@given(numbers, st.sampled_from([None, (-1.0, 1.0), (0.0, 1.0), (-1.5, 0.25)]))
def test_statistics_are_those_of_an_explicit_loop(values, ends):
    found = statistics(sums(torch.tensor(values), ends)).tolist()
    assert found == pytest.approx(loop(torch.tensor(values), ends), rel=1e-5, abs=1e-6)


@given(st.lists(numbers, min_size=1, max_size=5))
def test_sums_of_parts_are_those_of_the_whole(parts):
    ends = (-1.0, 1.0)
    total = sum(sums(torch.tensor(part), ends) for part in parts)
    together = loop(torch.tensor([x for part in parts for x in part]), ends)
    assert statistics(total).tolist() == pytest.approx(together, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).to(dtype) + 3
    assert statistics(sums(values)).tolist() == pytest.approx(loop(values), rel=1e-5, abs=1e-6)
    assert abs(float(values.mean()) - loop(values)[0]) > 1e-5  # its own mean has lost that already


def test_a_small_spread_around_a_large_mean_is_not_lost():
    values = 1000 + 1e-2 * torch.randn(5_000, generator=torch.Generator().manual_seed(0))
    assert statistics(sums(values) + sums(values))[1].item() == pytest.approx(loop(values)[1], rel=1e-2)
    squares = values.square().mean() - values.mean() ** 2
    assert abs(float(squares)) > 10 * loop(values)[1] ** 2  # what plain sums in single precision would say


@pytest.mark.parametrize(("count", "scale"), [(1_000, 1e-25), (1_000, 1e20), (2**23, 1.0)])
def test_spread_of_tiny_huge_and_many_values(count, scale):
    values = scale * torch.randn(count, generator=torch.Generator().manual_seed(0))
    assert statistics(sums(values))[1].item() == pytest.approx(
        values.double().std(correction=0).item(), rel=1e-6, abs=0
    )


def test_what_is_not_finite_is_said():
    found = statistics(sums(torch.tensor([math.inf, 0.0, 0.0, 1.0]), (0.0, 1.0))).tolist()
    assert not math.isfinite(found[0])
    assert found[2:] == [0.5, 1.0]


def test_of_nothing_there_are_no_statistics():
    assert sums(torch.zeros(0, 3)).tolist() == [0.0] * 5
    assert all(math.isnan(x) for x in statistics(sums(torch.zeros(0))).tolist())


def test_nothing_is_changed_and_no_graph_is_kept():
    values = torch.randn(4, requires_grad=True)
    before = values.detach().clone()
    assert not sums(values).requires_grad
    assert torch.equal(values, before)


@pytest.mark.parametrize("layer", [nn.Tanh(), nn.Sigmoid(), nn.Hardtanh(-2, 3), nn.ReLU6(), nn.Hardsigmoid()])
def test_bounds_are_reached_and_not_passed(layer):
    low, high = bounds(layer)
    outputs = layer(torch.tensor([-1e4, 1e4]))
    assert outputs.tolist() == [low, high]
    assert statistics(sums(outputs, bounds(layer)))[3] == 1.0
    assert statistics(sums(layer(torch.full((3,), 0.1)), bounds(layer)))[3] == 0.0


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.GELU(), nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Softplus()])
def test_other_layers_do_not_saturate(layer):
    assert bounds(layer) is None


def test_softsign_comes_near_its_bounds():
    assert bounds(nn.Softsign()) == (-1.0, 1.0)


def test_first_floating_tensor_is_found_in_its_order():
    one, two = torch.zeros(1), torch.ones(1)
    assert first_tensor(one) is one
    assert first_tensor((torch.tensor([1]), [None, {"a": "text", "b": two}], one)) is two
    assert first_tensor(nn.LSTM(2, 3)(torch.zeros(4, 1, 2))).shape == (4, 1, 3)
    for nothing in (None, 3, "text", torch.tensor([1]), torch.zeros(2, 2).to_sparse(), torch.zeros(1) + 0j, ()):
        assert first_tensor(nothing) is None


def test_tensors_inside_a_transform_are_not_taken_out_of_it():
    def seen(row):
        found.append(first_tensor(row))
        return row

    found = []
    torch.func.vmap(seen)(torch.zeros(3, 2))
    torch.func.grad(lambda row: seen(row).sum())(torch.zeros(2))
    assert found == [None, None]


def test_tensors_that_are_not_in_parts_are_whole():
    values = torch.zeros(2)
    assert whole(values) is values
