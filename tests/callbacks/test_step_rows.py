"""A small model's norms in rows, beside explicit loops and beside what measures any model tensor by tensor."""

import math

import pytest
import torch
from kit import ByHand, MemoryLogger, Net, fit
from lightning.pytorch.callbacks import Callback
from torch import nn

import lightning_tricks as lt
from lightning_tricks.callbacks import step_rows
from lightning_tricks.callbacks.step_rows import StepRows, fit_in_rows

NAMES = {"gradient", "clipped", "weight", "update"}
MEASURES = ("grad_norm", "grad_norm_clipped", "weight_norm", "update_norm", "update_ratio")


def norm(tensors):
    return math.sqrt(math.fsum(float(x) ** 2 for tensor in tensors for x in tensor.detach().double().flatten()))


def parameters(dtypes, shapes=((2, 3), (), (5,), (3, 1, 2), (1,))):
    return [nn.Parameter(torch.randn(shape).to(dtypes[i % len(dtypes)])) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("layers", [list("abcde"), list("abbac"), ["a", None, None, "a", "b"], [None] * 5], ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [[torch.float32], [torch.float64], [torch.bfloat16], [torch.float16, torch.float64, torch.float32]],
    ids=str,
)
def test_norms_of_rows_are_those_of_loops(dtypes, layers):
    trained = parameters(dtypes)
    for parameter in trained[:4]:  # the last has no gradient
        parameter.grad = torch.randn_like(parameter)
    rows = StepRows(trained, layers, NAMES)
    for _ in range(2):  # the same rows are used again
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]
        before = [p.detach().double().clone() for p in trained]
        rows.add_gradients(4.0)
        for parameter in trained[:4]:
            parameter.grad *= 0.5
        rows.add_before_step(4.0)
        with torch.no_grad():
            for parameter in trained:
                parameter += 0.25
        rows.add_update()
        (norms,) = rows.to_move()
        each = rows.of_each(iter([norms.tolist()]))
        after = [p.detach().double() for p in trained]
        expected = {
            "gradient": [g.double() / 4 for g in gradients],
            "clipped": [g.double() / 8 for g in gradients],
            "weight": before,
            "update": [new - old for new, old in zip(after, before, strict=True)],
        }
        assert rows.layers == tuple(dict.fromkeys(layers))
        assert each.keys() == expected.keys()
        for name, tensors in expected.items():
            for layer, value in zip(rows.layers, each[name], strict=True):
                mine = [tensor for tensor, other in zip(tensors, layers, strict=True) if other == layer]
                assert value == pytest.approx(norm(mine), rel=1e-12), (name, layer)


def test_tiny_and_huge_entries_neither_vanish_nor_overflow():
    trained = [nn.Parameter(torch.full((3,), value)) for value in (1e-30, 1e30)]
    rows = StepRows(trained, ["tiny", "huge"], {"weight"})
    rows.add_before_step()
    norms = rows.of_each(iter([rows.to_move()[0].tolist()]))["weight"]
    assert norms == pytest.approx([1e-30 * math.sqrt(3), 1e30 * math.sqrt(3)], rel=1e-6)


def test_a_scale_is_of_its_own_step():
    trained = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    rows = StepRows(trained, ["a", "b"], {"gradient"})
    for scale, factor in ((torch.tensor(0.0), math.inf), (torch.tensor(2.0), 0.5), (1.0, 1.0)):
        rows.begin()
        rows.add_gradients(scale)
        assert rows.to_move()[0].tolist() == pytest.approx([factor * math.sqrt(2), factor * math.sqrt(3)])
    rows.add_gradients(torch.tensor(2.0))  # of a step that was skipped
    rows.begin()
    rows.add_gradients(1.0)
    assert rows.to_move()[0].tolist() == pytest.approx([math.sqrt(2), math.sqrt(3)])


def test_what_rows_cannot_hold_does_not_fit():
    sparse_names = NAMES | {"zeros"}
    plain = parameters([torch.float32])
    assert fit_in_rows(plain, list("abcde"), NAMES)
    assert not fit_in_rows(plain, list("abcde"), sparse_names)
    assert not fit_in_rows([], [], NAMES)
    assert not fit_in_rows([nn.Parameter(torch.eye(3).to_sparse())], ["a"], NAMES)
    assert not fit_in_rows([*plain, nn.Parameter(torch.randn(2, dtype=torch.complex64))], list("abcdef"), NAMES)
    assert not fit_in_rows([nn.Parameter(torch.empty(2, device="meta"))], ["a"], NAMES)
    long = [nn.Parameter(torch.ones(step_rows._ENTRIES // 2)), nn.Parameter(torch.ones(1))]
    assert fit_in_rows(long, ["a", "b"], NAMES)
    assert not fit_in_rows(
        [*long, nn.Parameter(torch.ones(1))], ["a", "b", "c"], NAMES
    )  # rows are as long as the longest


def both(monkeypatch, make, callbacks=(), **options):
    """The rows of the same training, measured in rows and tensor by tensor."""
    told = []
    for entries in (step_rows._ENTRIES, 0):
        monkeypatch.setattr(step_rows, "_ENTRIES", entries)
        torch.manual_seed(1)
        logger = MemoryLogger()
        fit([*callbacks, lt.UpdateMonitor(1, MEASURES)], make(), logger=logger, max_epochs=2, **options)
        keys = ("grad_", "weight_", "update_")
        told.append([{key: x for key, x in row.items() if key.startswith(keys)} for _, row in logger.rows])
    in_rows, by_tensor = ([row for row in rows if row] for rows in told)
    assert len(in_rows) == len(by_tensor) > 0
    for one, other in zip(in_rows, by_tensor, strict=True):
        assert one.keys() == other.keys()
        assert one == pytest.approx(other, rel=1e-5, abs=1e-12)
    return in_rows


class Plain(Net):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Sparse(Plain):
    """With an embedding whose gradients are sparse, and one that has no gradient."""

    def __init__(self):
        super().__init__()
        self.words, self.idle = nn.Embedding(4, 3, sparse=True), nn.Linear(2, 2)

    def forward(self, x):
        return super().forward(x) + self.words(torch.zeros(len(x), dtype=torch.int64))


class Grows(Callback):
    """A parameter has another shape from the middle of the second epoch on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 2:
            bias = pl_module.extra
            bias.data, bias.grad = torch.ones(5), None


class WithExtra(Plain):
    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return super().forward(x) + self.extra.sum()


def test_sparse_gradients_and_none(monkeypatch):
    rows = both(monkeypatch, Sparse)
    assert all(row["grad_norm/idle"] == 0 < row["grad_norm/words"] for row in rows)


def test_a_parameter_that_takes_another_shape_is_measured_anew(monkeypatch):
    weights = [row["weight_norm/extra"] for row in both(monkeypatch, WithExtra, [Grows()])]
    assert weights[8] == pytest.approx(math.sqrt(5), rel=0.2)
    assert weights[7] < 2


class SparseWeight(Plain):
    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.eye(3).to_sparse())

    def forward(self, x):
        return super().forward(x) + 0.1 * torch.sparse.sum(self.extra) * torch.tensor([1.0, 2.0, 3.0])


def test_a_sparse_parameter_is_measured(monkeypatch):
    for row in both(monkeypatch, SparseWeight):
        assert row["weight_norm/extra"] == pytest.approx(math.sqrt(3), rel=0.5)
        assert row["update_norm/extra"] == pytest.approx(0.1 * row["grad_norm/extra"], rel=1e-3)


class BecomesComplex(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 2:
            pl_module.extra.data, pl_module.extra.grad = torch.complex(torch.ones(2), 5 * torch.ones(2)), None


class WithComplex(WithExtra):
    def forward(self, x):
        return super().forward(x) if not self.extra.is_complex() else Net.forward(self, x) + self.extra.sum().real


def test_a_parameter_that_takes_another_dtype_is_measured_anew(monkeypatch):
    weights = [row["weight_norm/extra"] for row in both(monkeypatch, WithComplex, [BecomesComplex()])]
    assert weights[8] == pytest.approx(math.sqrt(52), rel=0.2)


class Late(Plain):
    """The optimizer has a parameter that the module has a name of later."""

    def __init__(self):
        super().__init__()
        self.held = [nn.Parameter(torch.ones(2))]

    def configure_optimizers(self):
        return torch.optim.SGD([*self.head.parameters(), *self.held], lr=0.1)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            self.extra = self.held[0]

    def forward(self, x):
        return super().forward(x) + self.held[0].sum()


def test_a_parameter_that_gets_its_name_late_is_measured_from_then_on(monkeypatch):
    there = ["weight_norm/extra" in row for row in both(monkeypatch, Late)]
    assert there == [False, False, *[True] * 10]


@pytest.mark.parametrize("every", [1, 2])
def test_what_hooks_of_others_do_to_the_weights_belongs_to_the_step(every):
    class Halves(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2:
                trainer.optimizers[0].register_step_post_hook(self.halve)

        @torch.no_grad()
        def halve(self, optimizer, *args):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.5)

    for callbacks in ([Halves(), lt.UpdateMonitor(every)], [lt.UpdateMonitor(every), Halves()]):
        logger = MemoryLogger()
        fit(callbacks, Plain(), logger=logger, max_epochs=1)
        ratios = logger.series("update_ratio/total")
        # Registered in the batch itself, behind the monitor's own, it counts from the next one on.
        assert all((ratio > 0.3) == (step > 2) for step, ratio in ratios.items() if step != 2)


def test_a_parameter_of_two_optimizers_is_measured_once(monkeypatch):
    class Shared(ByHand):
        def configure_optimizers(self):
            head = list(self.head.parameters())
            return torch.optim.SGD(head, 0.1), torch.optim.SGD([*head, *self.body[1].parameters()], 0.1)

        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)

    rows = both(monkeypatch, Shared)
    assert {"weight_norm/head", "weight_norm/body.1"} <= rows[0].keys()


def test_averages_that_are_shown_between_steps_are_not_what_is_measured(monkeypatch):
    with_average = both(monkeypatch, Net, [lt.EMA(0.5)], val_check_interval=2)
    for one, other in zip(with_average, both(monkeypatch, Net, val_check_interval=2), strict=True):
        assert one == pytest.approx(other, rel=1e-6)
