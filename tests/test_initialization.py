import copy
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import Net, assert_same, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_tricks.initialization import lsuv_init


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.branch = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, bias=False))
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        x = self.stem(images)
        x = x + self.branch(x)
        return self.head(self.up(x).mean((2, 3)))


def mlp(widths, activation):
    layers = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def images(count=32):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


MODELS = {
    "deep tanh": lambda: (mlp([16] + [24] * 12 + [3], nn.Tanh), torch.randn(64, 16)),
    "deep relu": lambda: (mlp([16] + [24] * 12 + [3], nn.ReLU), 100 * torch.randn(64, 16) + 5),
    "residual with batch norm": lambda: (Residual(), images()),
    "one dimension": lambda: (nn.Sequential(nn.Conv1d(2, 4, 3), nn.GELU(), nn.Conv1d(4, 4, 3)), torch.randn(8, 2, 9)),
    "three dimensions": lambda: (nn.Conv3d(1, 4, 2), torch.randn(4, 1, 3, 3, 3)),
    "dropout": lambda: (
        nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 4)),
        torch.randn(64, 8),
    ),
}


def first_outputs(model, *args, **kwargs):
    """What each layer puts out at its first call, in double precision, in the order of the calls."""
    found, handles = {}, []

    def keep(name):
        def hook(layer, inputs, output):
            found.setdefault(name or "model", output.detach().double())

        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            handles.append(layer.register_forward_hook(keep(name)))
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


def mean_and_std(outputs):
    values = outputs.flatten().tolist()
    mean = sum(values) / len(values)
    return mean, (sum((x - mean) ** 2 for x in values) / len(values)) ** 0.5


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_of_every_layer_have_a_variance_of_one(name, orthogonal):
    model, batch = MODELS[name]()
    torch.manual_seed(3)
    before = first_outputs(copy.deepcopy(model), batch)
    torch.manual_seed(3)
    table = lsuv_init(model, batch, orthogonal=orthogonal, tol=0.05)
    after = first_outputs(model, batch)
    assert [row.layer for row in table.rows] == list(after) == list(before)
    assert not table.left
    for row in table.rows:
        assert (row.mean_before, row.std_before) == pytest.approx(mean_and_std(before[row.layer]), rel=1e-4, abs=1e-5)
        assert (row.mean_after, row.std_after) == pytest.approx(mean_and_std(after[row.layer]), rel=1e-4, abs=1e-5)
        assert abs(row.std_after**2 - 1) < 0.05
    assert any(abs(row.std_before**2 - 1) > 0.05 for row in table.rows)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(2, 12), min_size=2, max_size=5),
    st.sampled_from([nn.Tanh, nn.GELU, nn.Identity]),
    st.floats(1e-3, 1e3),
    st.floats(0.01, 0.5),
)
def test_variance_of_any_chain_comes_within_tol(widths, activation, scale, tol):
    torch.manual_seed(0)
    table = lsuv_init(mlp(widths, activation), scale * torch.randn(40, widths[0]), tol=tol)
    assert len(table.rows) == len(widths) - 1
    assert all(abs(row.std_after**2 - 1) < tol for row in table.rows)


def test_layers_are_scaled_in_the_order_of_the_forward_pass():
    """Backwards, the first one's inputs would be of another scale when it comes to the second one."""

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.last(F.relu(self.first(x)))

    table = lsuv_init(Backwards(), 50 * torch.randn(32, 8))
    assert [row.layer for row in table.rows] == ["first", "last"]
    assert all(abs(row.std_after**2 - 1) < 0.1 for row in table.rows)


def test_weights_are_multiples_of_orthogonal_matrices_and_biases_zero():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 9))
    lsuv_init(model, torch.randn(32, 6))
    for weight in (model[0].weight, model[2].weight.T):
        product = weight @ weight.T
        assert torch.allclose(product, product[0, 0] * torch.eye(4), atol=1e-5)
    assert not model[0].bias.any()
    assert not model[2].bias.any()


def test_without_orthogonal_matrices_weights_are_only_scaled_and_biases_stay():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 9))
    before = snapshot(model)
    lsuv_init(model, torch.randn(32, 6), orthogonal=False, max_iter=50)
    for name in ("0", "2"):
        ratio = model.get_parameter(f"{name}.weight") / before[f"{name}.weight"]
        assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio))
        assert torch.equal(model.get_parameter(f"{name}.bias"), before[f"{name}.bias"])


def test_layer_that_is_within_tol_is_not_touched():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    batch = torch.randn(32, 6)
    lsuv_init(model, batch)
    before = snapshot(model)
    again = lsuv_init(model, batch, orthogonal=False)
    assert [row.iterations for row in again.rows] == [0, 0]
    assert_same(snapshot(model), before)


def test_nothing_but_weights_is_changed():
    class Counts(Residual):
        calls = 0

        def forward(self, images):
            self.calls += 1
            random.random()
            return super().forward(F.dropout(images, 0.1))

    model = Counts()
    model.branch[0].eval()
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    norm = {name: p.clone() for name, p in model.branch[0].named_parameters()}
    identities = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    modes = [child.training for child in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    lsuv_init(model, images())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert model.calls == 0
    assert_same(dict(model.named_buffers()), buffers)
    assert_same({name: p.detach() for name, p in model.branch[0].named_parameters()}, norm)
    assert torch.equal(model.stem.weight.grad, torch.ones_like(model.stem.weight))
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == identities
    assert [child.training for child in model.modules()] == modes
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert not any(child._forward_pre_hooks or child._forward_hooks for child in model.modules())


def test_seed_decides_on_the_weights():
    def made(seed):
        torch.manual_seed(seed)
        model = Net()
        lsuv_init(model, images()[:, :, :4, :4])
        return snapshot(model)

    assert_same(made(1), made(1))
    assert not torch.equal(made(1)["head.weight"], made(2)["head.weight"])


def test_mode_of_the_model_counts():
    """In eval mode a new batch norm lets through what training would normalise."""
    results = []
    for mode in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6)).train(mode)
        results.append(lsuv_init(model, 100 * torch.randn(32, 6), orthogonal=False, max_iter=20).rows[0].std_before)
    assert results[1] > 20 * results[0]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "mapping"])
def test_batch_is_what_forward_takes(kind):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(5, 4)

        def forward(self, left, right=None):
            return self.a(left) if right is None else self.a(left) + self.b(right)

    left, right = torch.randn(16, 3), torch.randn(16, 5)
    batch = {"tensor": left, "tuple": (left, right), "list": [left, right], "mapping": {"right": right, "left": left}}
    table = lsuv_init(Two(), batch[kind])
    assert [row.layer for row in table.rows] == (["a"] if kind == "tensor" else ["a", "b"])
    assert table.left == ({"b": "not called in the forward pass"} if kind == "tensor" else {})


def test_layers_that_cannot_be_scaled_stay_and_are_named():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 5)
            self.frozen = nn.Linear(5, 5).requires_grad_(False)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
            self.free = nn.Linear(5, 5)
            self.head = nn.Linear(5, 7)
            self.head.weight = self.table.weight
            self.unused = nn.Linear(2, 2)

        def forward(self, ids):
            return self.head(self.free(self.normed(self.frozen(self.table(ids)))))

    model = Strange()
    before = snapshot(model)
    table = lsuv_init(model, torch.randint(7, (32,)))
    assert [row.layer for row in table.rows] == ["free"]
    assert table.left == {
        "frozen": "frozen",
        "normed": "its weight is computed from others",
        "head": "its weight is another layer's too",
        "unused": "not called in the forward pass",
    }
    after = snapshot(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"free.weight", "free.bias"}
    assert "left as it was: frozen (frozen)" in str(table)


def test_of_a_layer_that_is_called_twice_the_first_call_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.between = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.inner(3 * self.between(self.inner(x)))

    model, batch = Twice(), torch.randn(64, 6)
    table = lsuv_init(model, batch)
    assert [row.layer for row in table.rows] == ["inner", "between"]
    for row, outputs in zip(table.rows, first_outputs(model, batch).values(), strict=True):
        assert row.std_after == pytest.approx(mean_and_std(outputs)[1], rel=1e-4)
        assert abs(row.std_after**2 - 1) < 0.1


def test_checkpointed_layers():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(checkpoint(self.body, x, use_reentrant=False))

    table = lsuv_init(Checkpointed(), 5 * torch.randn(64, 6))
    assert [row.layer for row in table.rows] == ["body", "head"]
    assert table.rows[0].iterations == 1
    assert all(abs(row.std_after**2 - 1) < 0.1 for row in table.rows)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_model(whole):
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 2)))
    if not whole:
        model[1] = torch.compile(model[1], backend="eager")
    compiled = torch.compile(model, backend="eager") if whole else model
    batch = torch.randn(32, 6)
    with torch.no_grad():
        compiled(batch)
    table = lsuv_init(compiled, batch)
    assert [row.layer for row in table.rows] == ["0", "1.1"]
    with torch.no_grad():
        assert compiled(batch).std(correction=0).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = mlp([8, 16, 4], nn.Tanh).to(dtype)
    table = lsuv_init(model, torch.randn(64, 8).to(dtype))
    assert all(abs(row.std_after**2 - 1) < 0.1 for row in table.rows)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("layer", "size", "layout"),
    [(nn.Conv2d, (8, 8), torch.channels_last), (nn.Conv3d, (4, 4, 4), torch.channels_last_3d)],
)
def test_weights_whose_channels_come_last(layer, size, layout):
    def made(layout):
        torch.manual_seed(0)
        model = layer(3, 8, 3).to(memory_format=layout)
        return lsuv_init(model, torch.randn(8, 3, *size)), model.weight

    (table, weight), (plain, expected) = made(layout), made(torch.contiguous_format)
    assert weight.is_contiguous(memory_format=layout)
    assert torch.allclose(weight, expected, rtol=1e-4)
    assert table.rows[0].std_after == pytest.approx(plain.rows[0].std_after)


@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_inputs_of_any_scale(scale):
    assert lsuv_init(nn.Linear(8, 3), scale * torch.randn(64, 8)).rows[0].std_after == pytest.approx(1.0)


def test_complex_weights_are_refused():
    model = nn.Linear(4, 4, dtype=torch.complex64)
    before = snapshot(model)
    with pytest.raises(TypeError, match="lsuv_init: weight of model must be of real numbers, got torch.complex64"):
        lsuv_init(model, torch.randn(9, 4, dtype=torch.complex64))
    assert all(torch.equal(before[name], value) for name, value in snapshot(model).items())


def test_a_forward_pass_that_is_another_one_each_time_is_an_error():
    class Drifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x.mul_(3))

    model = Drifts()
    before = snapshot(model)
    with pytest.raises(ValueError, match="lsuv_init: variance of inner must be within 0.1 of 1 in another pass"):
        lsuv_init(model, torch.randn(64, 4))
    assert_same(snapshot(model), before)


def test_model_that_is_trained_goes_on_from_there():
    module = Net()
    table = lsuv_init(module, images()[:, :, :4, :4])
    assert [row.layer for row in table.rows] == ["body.1", "head"]
    assert table.left == {"frozen": "frozen"}
    loss = F.cross_entropy(module(images()[:, :, :4, :4]), torch.zeros(32, dtype=torch.int64))
    loss.backward()
    assert module.head.weight.grad.abs().sum() > 0


def test_table_reads_well():
    torch.manual_seed(0)
    table = lsuv_init(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), 1000 * torch.randn(64, 4))
    lines = str(table).splitlines()
    assert lines[0] == "layer  mean before  std before  mean after  std after  iterations"
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[0] == "0"
    assert lines[1].split()[-2:] == ["1.000", "1"]


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_a_model_of_one_layer_is_named(wrap):
    table = lsuv_init(wrap(nn.Linear(4, 8)), torch.randn(64, 4))
    assert [row.layer for row in table.rows] == ["model"]
    with pytest.raises(ValueError, match="lsuv_init: variance of model must be finite and above 0"):
        lsuv_init(wrap(nn.Linear(4, 8)), torch.zeros(64, 4))


@pytest.mark.parametrize("kind", [tuple, list, lambda pair: {"x": pair[0], "labels": pair[1]}])
def test_a_batch_that_forward_does_not_take_is_an_error_that_says_what_to_do(kind):
    model = nn.Sequential(nn.Linear(4, 2))
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"^lsuv_init: batch must be what the model's forward takes, got .*batch\[0\]"):
        lsuv_init(model, kind((torch.randn(8, 4), torch.zeros(8))))
    assert_same(snapshot(model), before)


def failing(layer, error):
    class Fails(Net):
        def forward(self, images):
            x = super().forward(images)
            if layer == "end" and self.head.bias.abs().sum() == 0:  # after it was made orthogonal
                raise error
            return x

    return Fails()


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_exception_leaves_the_model_as_it_was(error):
    model = failing("end", error)
    before = snapshot(model)
    with pytest.raises(type(error)):
        lsuv_init(model, images()[:, :, :4, :4])
    assert_same(snapshot(model), before)
    assert not any(child._forward_pre_hooks for child in model.modules())


@pytest.mark.parametrize(("batch", "got"), [(torch.zeros(8, 6), "0.0"), (torch.full((8, 6), torch.nan), "nan")])
def test_layer_without_a_variance_is_named_and_nothing_is_changed(batch, got):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"lsuv_init: variance of 0 must be finite and above 0, got {got}. Look at"):
        lsuv_init(model, batch)
    assert_same(snapshot(model), before)


def test_bias_that_varies_too_much_by_itself_is_an_error():
    model = nn.Sequential(nn.Linear(6, 6))
    with torch.no_grad():
        model[0].bias.copy_(10 * torch.arange(6.0))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"variance of 0 must be within 0.1 of 1 after 10 scalings, got \d+.*orthogon"):
        lsuv_init(model, torch.randn(32, 6), orthogonal=False)
    assert_same(snapshot(model), before)


def test_lazy_layer_has_to_be_called_first():
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match="lsuv_init: weight of 0 must be there, got 'a lazy layer"):
        lsuv_init(model, torch.randn(8, 3))
    model(torch.randn(8, 3))
    assert len(lsuv_init(model, torch.randn(8, 3)).rows) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": "net"}, TypeError, "model must be a torch module, got 'net'"),
        ({"model": nn.ReLU()}, ValueError, "layers must be at least one that can be scaled, got {}"),
        ({"orthogonal": 1}, TypeError, "orthogonal must be True or False, got 1"),
        ({"tol": 0}, ValueError, "tol must be above 0, got 0"),
        ({"tol": "1"}, TypeError, "tol must be a number above 0, got '1'"),
        ({"max_iter": 0}, ValueError, r"max_iter must be a whole number of at least 1 \(scalings of a layer\), got 0"),
    ],
)
def test_arguments_out_of_range(arguments, error, words):
    with pytest.raises(error, match=f"lsuv_init: {words}"):
        lsuv_init(**{"model": nn.Linear(2, 2), "batch": torch.randn(8, 2), **arguments})
