import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import update_bn

from lightning_tricks.functional.batch_norm import (
    channel_moments,
    merge,
    population_statistics,
    write_statistics_,
)


def norms_of(module):
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)}


def update(module, batches, layers=None, forward=None):
    layers = norms_of(module) if layers is None else layers
    moments = population_statistics("Test", module, layers, batches, module if forward is None else forward)
    write_statistics_("Test", layers, moments)
    return moments


def frozen_copy(module):
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return state, [child.training for child in module.modules()]


def assert_untouched(module, before):
    state, modes = before
    assert [child.training for child in module.modules()] == modes
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert not any(child._forward_pre_hooks for child in module.modules())


def two_layers():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 3), nn.BatchNorm1d(3)
    )


# ---------------------------------------------------------------------- moments


@given(
    st.lists(
        st.lists(st.integers(0, 6), min_size=1, max_size=5),  # the sizes of one rank's batches
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 1000),
    st.sampled_from([0.0, 1e4]),
)
@settings(max_examples=60, deadline=None)
def test_any_split_into_batches_and_ranks_merges_to_the_same(ranks, seed, offset):
    generator = torch.Generator().manual_seed(seed)
    parts = [[torch.randn(n, 3, 2, generator=generator) + offset for n in sizes] for sizes in ranks]
    merged = merge(*(merge(*map(channel_moments, rank)) for rank in parts))
    whole = torch.cat([batch for rank in parts for batch in rank]).double().transpose(0, 1).flatten(1)
    assert merged.count == whole.shape[1]
    assert merged.batches == sum(map(len, ranks))
    if merged.count:
        torch.testing.assert_close(merged.mean, whole.mean(1), rtol=1e-12, atol=1e-12)
        expected = (whole - whole.mean(1, keepdim=True)).square().sum(1)
        torch.testing.assert_close(merged.m2, expected, rtol=1e-9, atol=1e-9)


def test_nothing_merges_with_nothing():
    nothing = channel_moments(torch.empty(0, 2))
    assert merge(nothing, nothing).count == 0
    assert merge(nothing, nothing).mean.tolist() == merge(nothing).m2.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 2)], ids=str)
def test_moments_are_those_of_a_loop_over_channels(dtype, shape):
    values = (10 * torch.randn(shape)).to(dtype)
    moments = channel_moments(values)
    for channel in range(3):
        numbers = values.select(1, channel).flatten().tolist()
        mean = math.fsum(numbers) / len(numbers)
        assert moments.count == len(numbers)
        assert moments.mean[channel].item() == pytest.approx(mean, rel=1e-12, abs=1e-12)
        assert moments.m2[channel].item() == pytest.approx(math.fsum((x - mean) ** 2 for x in numbers), rel=1e-12)


def test_half_precision_sums_do_not_overflow():
    moments = channel_moments(torch.full((1000, 1), 6e4, dtype=torch.float16))
    assert moments.mean.item() == torch.tensor(6e4, dtype=torch.float16).item()
    assert moments.m2.item() == 0


# ---------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4), (50, 4)),
        (nn.BatchNorm1d(4), (50, 4, 3)),
        (nn.BatchNorm2d(4), (50, 4, 3, 2)),
        (nn.BatchNorm3d(4), (50, 4, 3, 2, 2)),
        (nn.SyncBatchNorm(4), (50, 4, 3, 2)),
    ],
    ids=lambda value: repr(value),
)
def test_a_first_layer_has_the_statistics_of_the_whole_set_in_spite_of_a_large_mean(layer, shape):
    data = torch.randn(shape) + 1e4
    layer = copy.deepcopy(layer)
    moments = update(layer, data.split([20, 20, 7, 3]))[""]
    whole = data.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(moments.mean, whole.mean(1), rtol=0, atol=1e-9)
    torch.testing.assert_close(moments.m2 / (moments.count - 1), whole.var(1), rtol=1e-9, atol=0)
    assert torch.equal(layer.running_mean, moments.mean.float())
    torch.testing.assert_close(layer.running_var, whole.var(1).float(), rtol=1e-6, atol=0)
    assert layer.num_batches_tracked == moments.batches == 4


def test_with_equal_batches_the_mean_is_torchs_and_the_variance_more_by_that_between_batches():
    data = torch.randn(6, 8, 3, dtype=torch.float64) + torch.arange(6.0).view(6, 1, 1)
    ours, torchs = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    update(ours, data)
    update_bn(data, torchs)
    torch.testing.assert_close(ours.running_mean, torchs.running_mean, rtol=1e-12, atol=1e-12)
    batches, size = 6, 8
    n = batches * size
    within = torchs.running_var * (size - 1) * batches
    between = size * (data.mean(1) - data.mean((0, 1))).square().sum(0)
    torch.testing.assert_close(ours.running_var, (within + between) / (n - 1), rtol=1e-12, atol=0)
    assert (ours.running_var > torchs.running_var).all()
    assert ours.num_batches_tracked == torchs.num_batches_tracked == 6


def test_a_second_layer_sees_what_the_first_makes_of_each_batch():
    module = two_layers()
    module.eval()
    expected = copy.deepcopy(module)
    batches = [torch.randn(n, 5) for n in (8, 8, 3)]
    update(module, batches)

    first, second = [], []
    with torch.no_grad():
        for batch in batches:
            hidden = expected[0](batch)
            first.append(hidden)
            normal = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + expected[1].eps).sqrt()
            second.append(expected[4]((expected[1].weight * normal + expected[1].bias).relu()))
    for layer, inputs in ((module[1], torch.cat(first)), (module[5], torch.cat(second))):
        torch.testing.assert_close(layer.running_mean, inputs.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var, inputs.var(0), rtol=1e-5, atol=1e-6)


def test_deep_means_are_torchs_without_dropout():
    module = two_layers()
    module[3].p = 0.0
    torchs = copy.deepcopy(module)
    batches = torch.randn(5, 8, 5)
    update(module, batches)
    update_bn(batches, torchs)
    for mine, theirs in zip(norms_of(module).values(), norms_of(torchs).values(), strict=True):
        torch.testing.assert_close(mine.running_mean, theirs.running_mean, rtol=1e-5, atol=1e-6)


def test_nothing_is_random_and_only_the_statistics_change():
    module = two_layers().train()
    module[1].momentum = None
    again = copy.deepcopy(module)
    batches = torch.randn(5, 8, 5).unbind()
    before, modes = frozen_copy(module)
    state = torch.get_rng_state()
    update(module, batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert [child.training for child in module.modules()] == modes
    assert module[1].momentum is None
    assert not any(child._forward_pre_hooks for child in module.modules())
    for name, tensor in module.state_dict().items():
        written = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(tensor, before[name]) != written, name
    torch.rand(3)
    update(again, batches)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name


def test_a_layer_that_is_not_given_normalises_with_its_own_statistics():
    module = two_layers().train()
    module[1].eval()
    module[1].running_mean.fill_(0.3)
    expected = copy.deepcopy(module).eval()
    batches = torch.randn(5, 8, 5).unbind()
    update(module, batches, {"5": module[5]})
    assert torch.equal(module[1].running_mean, torch.full((4,), 0.3))
    assert module[1].num_batches_tracked == 0
    assert not module[1].training
    inputs = torch.cat([expected[:5](batch) for batch in batches]).detach()
    torch.testing.assert_close(module[5].running_mean, inputs.mean(0), rtol=1e-5, atol=1e-6)


def test_a_layer_used_twice_has_the_statistics_of_both_uses():
    layer = nn.BatchNorm1d(2)
    batches = torch.randn(3, 4, 2).unbind()
    update(layer, batches, forward=lambda batch: layer(layer(input=batch)))
    with torch.no_grad():
        second = [nn.BatchNorm1d(2).train()(batch) for batch in batches]
    whole = torch.cat([*batches, *second])
    torch.testing.assert_close(layer.running_mean, whole.mean(0))
    torch.testing.assert_close(layer.running_var, whole.var(0), rtol=1e-4, atol=1e-5)
    assert layer.num_batches_tracked == 6


def test_a_layer_that_does_more_than_normalise_keeps_doing_it():
    class WithActivation(nn.BatchNorm1d):
        def forward(self, values):
            return super().forward(values).relu()

    module = nn.Sequential(WithActivation(2), nn.BatchNorm1d(2))
    update(module, torch.randn(4, 50, 2))
    assert (module[1].running_mean > 0.3).all()  # of a rectified normal variable 0.4


def test_an_empty_batch_adds_nothing():
    module, other = two_layers(), two_layers()
    batches = [torch.randn(6, 5), torch.randn(4, 5)]
    update(module, batches)
    update(other, [batches[0], torch.empty(0, 5), batches[1]])
    assert torch.equal(other[5].running_mean, module[5].running_mean)
    assert torch.equal(other[5].running_var, module[5].running_var)


def test_autocast_inputs_are_summed_in_double_precision():
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    seen = []

    def forward(batch):
        with torch.autocast("cpu", torch.bfloat16):
            seen.append(module[0](batch))
            module(batch)

    update(module, (torch.randn(5, 8, 5) + 3).unbind(), forward=forward)
    assert seen[0].dtype == torch.bfloat16
    whole = torch.cat(seen).detach().double()
    torch.testing.assert_close(module[1].running_mean, whole.mean(0).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(module[1].running_var, whole.var(0).float(), rtol=1e-6, atol=0)


def test_a_compiled_module_is_reached():
    module = two_layers()
    expected = copy.deepcopy(module)
    compiled = torch.compile(module, backend="eager")
    compiled.eval()
    with torch.no_grad():
        compiled(torch.randn(8, 5))  # there is a graph without hooks already
    batches = torch.randn(3, 8, 5).unbind()
    update(module, batches, forward=compiled)
    update(expected, batches)
    assert torch.equal(module[5].running_var, expected[5].running_var)


# ---------------------------------------------------------------------- what is refused


def failing(module, at):
    def forward(batch, calls=[]):  # noqa: B006
        calls.append(batch)
        module(batch)
        if len(calls) == at:
            raise KeyboardInterrupt

    return forward


def test_an_exception_leaves_the_module_as_it_was():
    module = two_layers().train()
    module[1].eval()
    before = frozen_copy(module)
    with pytest.raises(KeyboardInterrupt):
        update(module, torch.randn(4, 8, 5), forward=failing(module, at=3))
    assert_untouched(module, before)


@pytest.mark.parametrize(
    ("batches", "forward", "reason"),
    [
        ([], None, "Test: inputs of 1 must be at least 2 per channel, got 0. Let forward"),
        ([torch.randn(8, 5)], "body", "Test: inputs of 5 must be at least 2 per channel, got 0. Let forward"),
        ([torch.randn(8, 5), torch.randn(1, 5)], None, "Test: inputs of 1 .* in a batch, got 1. .*drop_last=True"),
        ([torch.randn(8, 5), torch.full((2, 5), torch.inf)], None, "Test: statistics of 1 must be finite"),
        ([torch.full((2, 5), torch.nan), torch.randn(8, 5)], None, "Test: statistics of 1 must be finite"),
    ],
    ids=["no batch", "not reached", "one sample", "inf", "nan"],
)
def test_what_has_no_statistics_is_refused_by_name_and_nothing_is_written(batches, forward, reason):
    module = two_layers().train()
    before = frozen_copy(module)
    with pytest.raises(ValueError, match=reason):
        update(module, batches, forward=None if forward is None else module[:3])
    assert_untouched(module, before)


def test_a_variance_that_does_not_fit_the_buffer_is_refused():
    layer = nn.BatchNorm1d(1).half()
    before = frozen_copy(layer)
    with pytest.raises(ValueError, match="must be finite"):
        update(layer, [torch.tensor([[6e4], [-6e4]])], forward=lambda batch: layer(batch.half()))
    assert_untouched(layer, before)
