import math
import random
import signal

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from kit import MemoryLogger, Net, ResumableLoader, TwoOptimizers, assert_same, data, loader, make_trainer
from kit import plugin_that_skips as skipping
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_tricks.functional.range_test import heights
from lightning_tricks.lr_finder import LRCurve, find_lr


def trainer(callbacks=(), **options):
    return make_trainer(list(callbacks), **options)


# ---------------------------------------------------------------- oracles


class Quadratic(L.LightningModule):
    def __init__(self, matrix, start):
        super().__init__()
        self.matrix, self.point = matrix, nn.Parameter(start)

    def training_step(self, batch, batch_idx):
        return 0.5 * self.point @ self.matrix @ self.point

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("seed", range(50))
def test_suggestion_lies_below_the_largest_stable_rate_of_a_quadratic(seed):
    generator = torch.Generator().manual_seed(seed)
    size, largest = (
        int(torch.randint(1, 51, (), generator=generator)),
        10 ** (4 * torch.rand((), generator=generator) - 1),
    )
    values = largest * 10 ** (-4 * torch.rand(size, generator=generator) * torch.rand((), generator=generator))
    values[0] = largest
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    start = basis @ (torch.randn(size, generator=generator) / (values.sqrt() if seed % 2 else 1.0))
    curve = find_lr(trainer(), Quadratic(basis * values @ basis.T, start), [0])
    stable = 2 / values.max().item()
    assert 0.1 * stable <= curve.suggestion <= stable
    assert 0.01 * stable <= curve.steepest <= 10 * stable
    assert 0.01 * stable <= curve.valley <= 10 * stable
    assert curve.factor == curve.suggestion


class Groups(Net):
    """Two groups of different rates."""

    def configure_optimizers(self):
        groups = [{"params": self.body.parameters(), "lr": 0.02}, {"params": self.head.parameters(), "lr": 0.1}]
        return torch.optim.SGD(groups, momentum=0.9)


def by_hand(module, batches, rates, accumulate):
    """The test in plain torch: the loss of each step, and the rates of both groups."""
    optimizer = module.configure_optimizers()
    bases = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for i, rate in enumerate(rates):
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = base * (rate / 0.1)
        optimizer.zero_grad()
        window = []
        for j in range(accumulate):
            images, labels = batches[(i * accumulate + j) % len(batches)]
            loss = F.cross_entropy(module(images), labels)
            (loss / accumulate).backward()
            window.append(loss.item())
        optimizer.step()
        losses.append(sum(window) / accumulate)
    return losses


@pytest.mark.parametrize("accumulate", [1, 3])
def test_losses_are_those_of_a_loop_by_hand(accumulate):
    batches = list(loader())
    curve = find_lr(
        trainer(accumulate_grad_batches=accumulate), Groups(), loader(), min_lr=1e-3, max_lr=0.5, num_steps=20
    )
    expected = by_hand(Groups(), batches, curve.lrs, accumulate)
    torch.testing.assert_close(torch.tensor(curve.losses), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(curve.lrs), torch.logspace(-3, math.log10(0.5), 20))
    assert (curve.base_lr, curve.reason) == (0.1, "max_lr")


# ---------------------------------------------------------------- nothing is left


class Draws(Dataset):
    """Every kind of random generator, two of them in a plain object."""

    class Transform:
        def __init__(self):
            self.rng, self.old = np.random.default_rng(0), np.random.RandomState(0)

        def __call__(self, image):
            return image + self.rng.normal() + self.old.normal()

    def __init__(self):
        self.items, self.transform, self.random = data(), self.Transform(), random.Random(0)
        self.torch, self.served = torch.Generator().manual_seed(0), 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.served += 1
        image, label = self.items[index]
        noise = torch.randn((), generator=self.torch) + self.random.random() + random.random() + np.random.rand()
        return (self.transform(image) + noise + self.served).float(), label


class Data(L.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def setup(self, stage):
        self.served = Draws()

    def train_dataloader(self):
        return DataLoader(self.served, batch_size=4, shuffle=True, generator=self.generator)

    def val_dataloader(self):
        return loader(8)


class Counter(nn.Module):
    """Hidden state that only its own protocol shows."""

    def __init__(self):
        super().__init__()
        self.count = [0, (0,)]

    def forward(self, x):
        self.count[1] = (self.count[1][0] + 1,)
        return x + self.count[1][0]

    def get_extra_state(self):
        return self.count[1]

    def set_extra_state(self, state):
        self.count = [0, state]


class Rich(Net):
    """Dropout, a metric, an average that no checkpoint has, hidden state, a flag and gradients of its own."""

    def __init__(self, keep=True):
        super().__init__(optimizer="adam")
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.mean = torchmetrics.MeanMetric()
        self.drop, self.counter = nn.Dropout(0.5), Counter()
        self.register_buffer("average", torch.zeros(8), persistent=False)
        self.generator = torch.Generator().manual_seed(1)
        self.kept = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01) if keep else None
        self.frozen.eval()
        self.head.weight.grad = torch.ones_like(self.head.weight)

    def forward(self, images):
        hidden = self.drop(self.frozen(self.body(images)))
        self.average += hidden.detach().mean(0)
        return self.counter(self.head(hidden)) + torch.randn((), generator=self.generator)

    def training_step(self, batch, batch_idx):
        self.accuracy(self(batch[0]), batch[1])
        self.mean.update(1.0)
        self.head.bias.requires_grad_(not self.head.bias.requires_grad)
        return super().training_step(batch, batch_idx)

    def on_train_end(self):
        self.eval()
        self.late = True

    def configure_optimizers(self):
        optimizer = self.kept or super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def dropped():
    return Rich(keep=False)


SHUFFLED = {"batch_size": 4, "shuffle": True}
LOADERS = {
    "shuffled by the global generator": lambda: DataLoader(data(), **SHUFFLED),
    "shuffled by its own": lambda: DataLoader(data(), **SHUFFLED, generator=torch.Generator().manual_seed(7)),
    "with workers": lambda: DataLoader(data(), **SHUFFLED, num_workers=1, persistent_workers=True),
    "resumable": ResumableLoader,
    "random everywhere": lambda: {"a": DataLoader(Draws(), batch_size=4)},
    "a datamodule": Data,
}


class OfDict(Rich):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx)


def state_of(module):
    """All that a user could see of a module."""
    return {
        "parameters": {n: (p.detach().clone(), p.requires_grad) for n, p in module.named_parameters()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()},
        "buffers": {n: b.clone() for n, b in module.named_buffers()},
        "training": {n: m.training for n, m in module.named_modules()},
        "metrics": [module.accuracy.tp.clone(), module.accuracy._update_count, module.mean.mean_value.clone()],
        "rest": [module.counter.count, list(module.losses), hasattr(module, "late"), module._trainer is None],
        "random": module.generator.get_state(),
        "optimizer": module.kept.state_dict() if module.kept else None,
    }


@pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode")
@pytest.mark.parametrize("cls", [Rich, dropped], ids=["an optimizer of its own", "a new optimizer"])
@pytest.mark.parametrize("name", LOADERS)
def test_a_fit_afterwards_is_the_fit_without_it(name, cls):
    ends = []
    for tested in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        module = cls()
        if name == "random everywhere":
            module.__class__ = OfDict
        train, outer = LOADERS[name](), trainer()
        before = state_of(module)
        if tested:
            find_lr(outer, module, train, num_steps=20)
            assert_same(state_of(module), before)
        outer.fit(module, train, None if isinstance(train, Data) else loader(8))
        world = [torch.get_rng_state(), random.getstate(), float(np.random.rand()), outer.global_step]
        optimizer = outer.optimizers[0].state_dict()
        ends.append([state_of(module), module.seen, world, optimizer, outer.lr_scheduler_configs[0].scheduler._last_lr])
    assert_same(ends[0], ends[1])


class Fails(Rich):
    def training_step(self, batch, batch_idx):
        if len(self.seen) == 7:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode")
@pytest.mark.parametrize(("error", "seen"), [(OSError(), OSError), (KeyboardInterrupt(), SystemExit)])
def test_all_is_restored_after_an_error(error, seen):
    module, train, logger, watcher = Fails(), ResumableLoader(), MemoryLogger(), Watcher()
    module.error = error
    outer = trainer([watcher], logger=logger, limit_val_batches=3)
    before, parts, handler = state_of(module), dict(vars(outer)), signal.getsignal(signal.SIGINT)
    world = torch.get_rng_state()
    with pytest.raises(seen):
        find_lr(outer, module, train)
    assert_same(state_of(module), before)
    assert vars(outer) == parts
    assert outer.strategy.optimizers == outer.strategy.lr_scheduler_configs == []
    assert (outer.limit_val_batches, outer.num_sanity_val_steps, outer.should_stop) == (3, 1, False)
    assert (outer.state.status, outer.state.stage, outer.global_step) == ("initializing", None, 0)
    assert outer.callbacks == [watcher]
    assert outer.loggers == [logger]
    assert (train.position, logger.rows, watcher.calls) == (0, [], [])
    assert signal.getsignal(signal.SIGINT) is handler
    assert_same(torch.get_rng_state(), world)


class Watcher(Callback):
    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if name.startswith("on_") or name == "setup":
            self.calls.append(name)
        return super().__getattribute__(name)


class WithCallback(Net):
    def configure_callbacks(self):
        return self.watcher


def test_no_callback_logger_or_validation_runs():
    module, watcher, logger = WithCallback(), Watcher(), MemoryLogger()
    module.watcher = watcher
    module.validation_step = None
    find_lr(trainer([watcher], logger=logger), module, loader(), num_steps=20)
    assert (watcher.calls, logger.rows, logger.hparams) == ([], [], {})


def test_between_two_fits_it_changes_nothing():
    ends = []
    for tested in (False, True):
        torch.manual_seed(0)
        module, outer, train = Net(), trainer(max_epochs=1), DataLoader(data(), **SHUFFLED)
        outer.fit(module, train, loader(8))
        metrics = dict(outer.callback_metrics)
        if tested:
            find_lr(outer, module, train)  # its epochs are over
            assert_same(dict(outer.callback_metrics), metrics)
        outer.fit_loop.max_epochs = 2
        outer.fit(module, train, loader(8))
        ends.append([module.state_dict(), module.losses, outer.optimizers[0].state_dict(), outer.global_step])
    assert_same(ends[0], ends[1])


# ---------------------------------------------------------------- every way of training


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 1},
        {"max_epochs": 0},
        {"max_time": {"seconds": 0}},
        {"min_epochs": 5, "max_epochs": 6},
        {"min_steps": 500},
        {"limit_train_batches": 2},
        {"overfit_batches": 1},
        {"accumulate_grad_batches": 4},
        {"gradient_clip_val": 0.1},
        {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=str,
)
def test_it_takes_its_steps_whatever_the_limits(options):
    curve = find_lr(trainer(**options), Net(), loader(), max_lr=1e-3, num_steps=30)
    assert (curve.reason, len(curve.losses)) == ("max_lr", 30)


class Scheduled(Net):
    """A schedule over the run, a rate that warms up by hand and a step hook: none of them may set the rate."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        self.steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=self.steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        for group in optimizer.param_groups:
            group["lr"] = 1e9
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.rates = [*getattr(self, "rates", []), optimizer.param_groups[0]["lr"]]

    def on_train_end(self):
        told.append((self.steps, self.rates))


told: list = []


def test_the_modules_own_schedule_does_not_set_the_rate():
    told.clear()
    curve = find_lr(trainer(max_epochs=3), Scheduled(), loader(), max_lr=1e-2, num_steps=20)
    assert told[0][0] == 18
    assert told[0][1] == pytest.approx(curve.lrs)
    assert curve.base_lr == pytest.approx(0.5 / 25)


class ReturnsLoss(TwoOptimizers):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in self.optimizers()])
        return {"loss": F.cross_entropy(self(batch[0]), batch[1])}


rates: list = []


def test_several_optimizers_by_hand_keep_their_ratio():
    rates.clear()
    curve = find_lr(trainer(), ReturnsLoss(), loader(), max_lr=0.01, num_steps=20)
    assert (len(curve.losses), curve.base_lr) == (20, 0.1)
    assert [first for first, _ in rates] == pytest.approx(curve.lrs)
    assert [second for _, second in rates][1::2] == pytest.approx([lr / 10 for lr in curve.lrs[1::2]])


def test_by_hand_without_a_loss_is_an_error():
    with pytest.raises(ValueError, match="training_step must be a function that returns the loss, got None"):
        find_lr(trainer(), TwoOptimizers(), loader())


def test_steps_that_a_scaler_skips_do_not_count():
    plugin = skipping(2.0**40)
    outer, module = trainer(plugins=[plugin]), Net()
    curve = find_lr(outer, module, loader(), max_lr=1e-4, num_steps=30)
    assert len(curve.losses) == 30
    assert plugin.scaler.state_dict() == skipping(2.0**40).scaler.state_dict()


def test_a_scaler_that_skips_all_ends_in_an_error():
    with pytest.raises(ValueError, match="steps must be real at least once in num_steps, got 20. A GradScaler"):
        find_lr(trainer(plugins=[skipping(2.0**100)]), Net(), loader(), num_steps=20)


class Returns(Net):
    """Its loss is a function of the number of batches so far."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def training_step(self, batch, batch_idx):
        value = self.function(len(self.losses))
        loss = super().training_step(batch, batch_idx)
        return None if value is None else loss * 0 + value


def test_it_stops_where_the_loss_blows_up_or_is_not_finite():
    curve = find_lr(trainer(), Returns(lambda i: 3.0 if i < 30 else 1e3), loader())
    assert (curve.reason, curve.losses) == ("diverged", (3.0,) * 30 + (1e3,))
    for bad in (math.nan, math.inf):
        curve = find_lr(trainer(), Returns(lambda i, bad=bad: 3.0 if i < 30 else bad), loader())
        assert (curve.reason, curve.losses) == ("not finite", (3.0,) * 30)


class Root(L.LightningModule):
    """Its loss is NaN as soon as a step has gone too far."""

    def __init__(self):
        super().__init__()
        self.point = nn.Parameter(torch.ones(3))

    def training_step(self, batch, batch_idx):
        return self.point.sqrt().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_a_loss_that_training_makes_nan_stops():
    curve = find_lr(trainer(), Root(), [0])
    assert curve.reason == "not finite"
    assert all(map(math.isfinite, curve.losses))
    assert curve.lrs[0] < curve.suggestion < curve.lrs[-1] < 100
    assert len(curve.lrs) == len(curve.losses) < 100


@pytest.mark.parametrize("stop_ratio", [1.5, 4.0, 20.0])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_it_stops_at_stop_ratio_times_the_best_average(stop_ratio, noise):
    generator = torch.Generator().manual_seed(0)
    shape = [3 - 0.02 * min(i, 40) + 0.01 * 1.5 ** max(i - 40, 0) for i in range(100)]
    values = (torch.tensor(shape) + noise * torch.randn(100, generator=generator)).tolist()
    average, averages = 0.0, []
    for i, value in enumerate(values):
        average = 0.95 * average + 0.05 * value
        averages.append(average / (1 - 0.95 ** (i + 1)))
        jumps = np.sort(np.abs(np.diff(values[: i + 1])))
        if i >= 10 and averages[-1] > stop_ratio * min(averages[10:]) + 4 * jumps[i // 2] * math.sqrt(0.05 / 1.95):
            break
    curve = find_lr(trainer(), Returns(values.__getitem__), loader(), stop_ratio=stop_ratio)
    assert (curve.reason, curve.losses) == ("diverged", tuple(values[: i + 1]))
    assert 40 < i < 99


@pytest.mark.parametrize("seed", [0, 1, 2, 12, 20, 28, 31, 38])
def test_the_noise_of_batches_of_one_does_not_end_it(seed):
    torch.manual_seed(seed)
    curve = find_lr(trainer(), BoringModel())
    assert 1e-3 < curve.suggestion < 0.2


def test_a_negative_loss_stops_where_it_has_lost_more_than_it_gained():
    curve = find_lr(trainer(), Returns(lambda i: -1.0 - i / 10 if i < 50 else i * 1.0), loader())
    assert curve.reason == "diverged"
    assert heights(curve.losses)[-1] > 3 >= max(heights(curve.losses[:-1]))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_without_a_loss_takes_no_step():
    curve = find_lr(trainer(), Returns(lambda i: None if i % 3 else 90.0 - i), loader(), num_steps=20)
    assert curve.losses == tuple(90.0 - i for i in range(0, 60, 3))


def test_ranks_stop_together():
    outer = trainer()
    outer.strategy.reduce = lambda tensor, reduce_op: tensor * 0 + 7.0
    assert set(find_lr(outer, Net(), loader(), max_lr=1e-3, num_steps=20).losses) == {7.0}


# ---------------------------------------------------------------- refusals


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.lazy = nn.LazyLinear(2)


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"min_lr": 0}, ValueError, "min_lr must be above 0"),
        ({"min_lr": "1"}, TypeError, "min_lr must be a number above 0"),
        ({"min_lr": math.nan}, ValueError, "min_lr must be above 0"),
        ({"min_lr": 1.0, "max_lr": 1.0}, ValueError, "max_lr must be above min_lr=1"),
        ({"max_lr": math.inf}, ValueError, "max_lr must be above min_lr=1e-07"),
        ({"num_steps": 19}, ValueError, "num_steps must be a whole number of at least 20"),
        ({"num_steps": 20.0}, TypeError, "num_steps must be a whole number"),
        ({"stop_ratio": 1}, ValueError, "stop_ratio must be above 1"),
        ({"train_dataloaders": iter([0])}, TypeError, "train_dataloaders must be iterable more than once"),
        ({"model": Lazy()}, ValueError, "model must be one without uninitialized parameters"),
        ({"model": Net(lr=0.0)}, ValueError, "base rates must be above 0 in one group at least, got 0.0"),
        (
            {"model": Returns(lambda i: math.nan)},
            ValueError,
            "losses must be finite at the first step, got 'not finite'",
        ),
        ({"model": nn.Linear(1, 1)}, TypeError, "model must be a LightningModule"),
        ({"trainer": None}, TypeError, "trainer must be a Trainer"),
        ({"datamodule": loader()}, TypeError, "datamodule must be a LightningDataModule, got 'DataLoader'"),
    ],
)
def test_a_bad_argument_is_refused(arguments, error, reason):
    defaults = {"trainer": trainer(), "model": Net(), "train_dataloaders": loader()}
    with pytest.raises(error, match="find_lr: " + reason):
        find_lr(**{**defaults, **arguments})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"limit_train_batches": 0}, "losses must be finite at the first step, got 'no batch'"),
        ({"fast_dev_run": True}, "fast_dev_run must be off, got True"),
        ({"strategy": "ddp_spawn", "devices": 2}, "strategy must be one that starts no process by spawn or fork"),
        ({"strategy": "ddp_fork", "devices": 2}, "strategy must be one that starts no process by spawn or fork"),
    ],
)
def test_a_trainer_it_cannot_use_is_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        find_lr(trainer(**options), Net(), loader())


class CallsIt(Callback):
    """Looks for a rate when the fit has begun, as a scheduler might."""

    def __init__(self):
        self.error = None

    def on_train_start(self, trainer, pl_module):
        try:
            find_lr(trainer, pl_module, loader())
        except ValueError as error:
            self.error = error


def test_a_running_fit_is_refused_and_goes_on_unharmed():
    inside, plain, called = CallsIt(), Net(), Net()
    trainer().fit(plain, loader(), loader(8))
    outer = trainer([inside])
    outer.fit(called, loader(), loader(8))
    assert str(inside.error) == "find_lr: trainer must be at rest, got 'in fit'. Call it before trainer.fit."
    assert_same(called.state_dict(), plain.state_dict())
    assert (called.losses, outer.global_step, outer.current_epoch) == (plain.losses, 12, 2)
    assert len(find_lr(outer, called, loader(), max_lr=1e-3, num_steps=20).losses) == 20  # it is over


def test_data_that_end_are_refused():
    class Once(torch.utils.data.IterableDataset):
        source = iter(data())

        def __iter__(self):
            return self.source

    with pytest.raises(ValueError, match="train_dataloaders must be of at least one batch an epoch, got 0"):
        find_lr(trainer(), Net(), DataLoader(Once(), batch_size=4))


def test_a_curve_that_ends_too_soon_says_so():
    short = LRCurve((1.0, 2.0), (1.0, 9.0), 1.0, "diverged")
    for name in ("suggestion", "steepest", "valley", "factor"):
        with pytest.raises(ValueError, match=r"at least 12 \(steps\), got 2. The loss blew up at the first rates"):
            getattr(short, name)
    with pytest.raises(ValueError, match="suggestion must be at least min_lr=1, got .*lower min_lr"):
        _ = LRCurve(tuple(map(float, range(1, 13))), (1.0,) * 11 + (99.0,), 1.0, "diverged").suggestion


def test_plot(tmp_path, monkeypatch):
    curve = find_lr(trainer(), Quadratic(torch.eye(2), torch.ones(2)), [0])
    curve.plot().figure.savefig(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 0
    axes = curve.plot()
    assert curve.plot(axes) is axes
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-tricks\[plots\]"'):
        curve.plot()


def test_plot_of_a_curve_without_a_suggestion_leaves_out_the_line():
    good = LRCurve(tuple(2.0**i for i in range(13)), (3.0,) * 12 + (999.0,), 1.0, "diverged")
    assert [line.get_label() for line in good.plot().lines] == ["loss", "smoothed", f"suggestion {good.suggestion:.2g}"]
    for losses in ((1.0,), (1.0, 9.0), (1.0,) * 11 + (99.0,)):  # too short, and below the first rate
        axes = LRCurve(tuple(map(float, range(1, len(losses) + 1))), losses, 1.0, "diverged").plot()
        assert [line.get_label() for line in axes.lines] == ["loss", "smoothed"]
        assert tuple(axes.lines[0].get_ydata()) == losses
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["loss", "smoothed"]
