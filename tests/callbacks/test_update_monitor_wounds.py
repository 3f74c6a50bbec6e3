"""What users of other monitors complained of; each test has their names above it. Rows and runs: `test_loggers.py`."""

import math
from itertools import pairwise

import pytest
import sharded
import torch
import torch.distributed as dist
from kit import ByHand, MemoryLogger, Net, Unfreeze, fit, plugin_that_skips
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import grad_norm
from sharded import ShardedNet, on_ranks
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_tricks as lt
from lightning_tricks.callbacks import step_rows
from lightning_tricks.functional import norms


def series(monitor, key, module=None, **options):
    logger = MemoryLogger()
    fit([monitor], module, logger=logger, **{"max_epochs": 1, **options})
    return list(logger.series(key).values())


class TakesMore(torch.optim.SGD):
    """An optimizer whose step has arguments of its own."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.told = []

    def step(self, closure=None, extra=None, *, word=None):
        self.told.append((extra, word))
        return super().step(closure)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_step_with_a_closure_keeps_all_its_arguments(by_name):
    class Module(ByHand):
        def configure_optimizers(self):
            return TakesMore(self.parameters(), lr=0.1)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)

            def closure():
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
                self.manual_backward(loss)
                return loss

            if by_name:
                optimizer.step(closure=closure, extra=5, word="x")
            else:
                optimizer.step(closure, 5, word="x")

    logger = MemoryLogger()
    trainer, _ = fit([lt.UpdateMonitor(1)], Module(), logger=logger, max_epochs=1)
    assert trainer.optimizers[0].told == [(5, "x")] * 6
    assert len(logger.series("update_ratio/total")) == 6


class Operations(TorchDispatchMode):
    """The names of all operations of torch."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class Quiet(Net):
    """Without log and item, so that every transfer is the monitor's.

    In double precision a CPU takes norms as a GPU takes all: without looking at them.
    """

    def __init__(self):
        super().__init__()
        self.double()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0].double()), batch[1])


class Deep(Quiet):
    """As many layers as are asked for, of 2176 bytes each."""

    def __init__(self, depth):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), *(nn.Linear(16, 16) for _ in range(depth)))
        self.frozen, self.head = nn.Identity(), nn.Linear(16, 3)
        self.double()


def operations(callbacks, module=None, **options):
    with Operations() as seen:
        fit(callbacks, module or Quiet(), logger=MemoryLogger(), max_epochs=1, limit_val_batches=0, **options)
    return seen.names


# Lightning: #16084; track_grad_norm is gone, and what is left is a function to call by hand.
def test_gradient_norms_are_lightnings():
    class Theirs(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rows.append(grad_norm(pl_module, 2))

    rows, logger = [], MemoryLogger()
    fit([Theirs(), lt.UpdateMonitor(1, ["grad_norm"], "tensor")], logger=logger, max_epochs=1)
    assert len(rows) == 6
    for step, row in enumerate(rows):
        assert logger.series("grad_norm/total")[step] == pytest.approx(float(row["grad_2.0_norm_total"]), rel=1e-3)
        theirs = float(row["grad_2.0_norm/head.weight"])
        assert logger.series("grad_norm/head.weight")[step] == pytest.approx(theirs, rel=1e-3)  # rounded to 4 digits


# Lightning: #11471; the norms of all layers fill the progress bar.
def test_the_progress_bar_has_no_norms():
    def shown(callbacks):
        trainer, _ = fit(callbacks, logger=MemoryLogger(), max_epochs=1)
        return trainer.progress_bar_metrics.keys(), trainer.callback_metrics.keys()

    monitors = [lt.UpdateMonitor(1, band=(0.0, 1e9)), lt.ActivationMonitor(1)]
    assert shown(monitors) == shown([])


# torchtune: #1407; without clipping there is no norm of the gradient.
@pytest.mark.parametrize("clip", [None, 0.5])
def test_norms_are_there_with_and_without_clipping(clip):
    logger = MemoryLogger()
    monitor = lt.UpdateMonitor(1, ["grad_norm", "grad_norm_clipped"], layers=0)
    fit([monitor], logger=logger, max_epochs=1, gradient_clip_val=clip)
    whole, clipped = (list(logger.series(f"{key}/total").values()) for key in ("grad_norm", "grad_norm_clipped"))
    assert len(whole) == 6
    assert max(whole) > 0.5
    assert clipped == pytest.approx([min(norm, clip or math.inf) for norm in whole], rel=1e-4)


# Lightning's grad_norm: one transfer for each parameter; Composer, NeMo: one for each metric.
def test_a_logged_step_has_one_transfer():
    plain = operations([])
    measures = ["grad_norm", "grad_norm_clipped", "weight_norm", "update_norm", "update_ratio", "update_cosine"]
    transfers, original = [], torch.Tensor.tolist
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda self: transfers.append(1) or original(self))
        watched = operations([lt.UpdateMonitor(2, measures, "tensor")])
    assert len(transfers) == 3
    assert len(watched) > len(plain)
    assert watched.count("_local_scalar_dense") == plain.count("_local_scalar_dense")  # what `item` does


# transformers: #27233; with 70 billion parameters watching takes 20 minutes. Here all tensors are measured at once.
@pytest.mark.parametrize("small", [True, False])
def test_a_deeper_model_takes_no_more_operations_and_transfers(small):
    measures = ["grad_norm", "grad_norm_clipped", "weight_norm", "update_norm", "update_ratio"]

    def added(depth):
        monitor = lt.UpdateMonitor(3, measures, "tensor", max_extra_memory=None if small else 10**9)
        plain, watched = operations([], Deep(depth)), operations([monitor], Deep(depth))
        assert len(monitor.last) == 5 * (2 * depth + 2 + 1)
        counts = {name: watched.count(name) - plain.count(name) for name in set(watched)}
        views = {"view", "slice", "select", "detach", "is_same_size", "empty"}  # of no numbers
        assert counts.pop("empty_like", 0) == (0 if small else 2 * depth + 2)  # the copies are made once
        return {name: count for name, count in counts.items() if name not in views}

    few = added(2)
    assert sum(few.values()) > 0
    assert added(30) == few


# wandb: #3701; a step takes 2.2 s at first and 5.7 s later.
def test_a_late_step_takes_no_more_operations_than_an_early_one():
    def ends(callbacks):
        class Count(Callback):
            def on_train_batch_end(self, *args):
                counts.append(len(seen.names))

        counts = []
        with Operations() as seen:
            fit([*callbacks, Count()], Deep(2), logger=MemoryLogger(), max_epochs=4, limit_val_batches=0)
        return counts

    monitors = [lt.UpdateMonitor(1, ["update_ratio", "update_cosine"], band=(0.0, 1e9)), lt.ActivationMonitor(1)]
    more = [watched - plain for watched, plain in zip(ends(monitors), ends([]), strict=True)]
    steps = {after - before for before, after in pairwise(more[2:])}  # the first two make copies
    assert len(more) == 24
    assert len(steps) == 1
    assert min(steps) > 0


class Storages(TorchDispatchMode):
    """How many bytes are there of what operations have made: at most, and now."""

    def __init__(self):
        super().__init__()
        self.bytes, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        storages = [leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.bytes |= {StorageWeakRef(storage): storage.nbytes() for storage in storages}
        self.most = max(self.most, self.now())
        return result

    def now(self):
        self.bytes = {storage: size for storage, size in self.bytes.items() if not storage.expired()}
        return sum(self.bytes.values())


WHOLE = 8 * 2176 + 8 * 3 * 17
"""Bytes of the parameters of 8 layers and a head."""


def memory(callbacks, depth=8):
    """Bytes after each batch, at most, and after the training."""

    class Look(Callback):
        def on_train_batch_end(self, *args):
            after.append(storages.now())

    after = []
    with Storages() as storages:
        kept = fit([*callbacks, Look()], Deep(depth), logger=MemoryLogger(), max_epochs=1, limit_val_batches=0)
        return after, storages.most, storages.now(), kept


# wandb: #2644; watching takes more and more memory.
@pytest.mark.parametrize(
    ("monitor", "copies"),
    [
        (lambda: lt.UpdateMonitor(2), WHOLE),
        (lambda: lt.UpdateMonitor(2, ["grad_norm", "grad_norm_clipped", "weight_norm", "grad_zeros"]), 0),
        (lambda: lt.UpdateMonitor(2, ["update_cosine"]), 2 * WHOLE),
        (lambda: lt.UpdateMonitor(2, max_extra_memory=2 * 2176), 2 * 2176),
        (lambda: lt.ActivationMonitor(2, gradients=True), 0),
    ],
    ids=["updates", "gradients", "cosine", "in turn", "activations"],
)
def test_no_more_memory_is_held_than_the_documented_copies(monitor, copies, monkeypatch):
    monkeypatch.setattr(step_rows, "_ENTRIES", 0)  # as of a model that is not small
    monkeypatch.setattr(norms, "_AT_ONCE", 256)
    (after, most, left, _), (plain, plain_most, plain_left, _) = memory([monitor()]), memory([])
    held = [one - other for one, other in zip(after, plain, strict=True)]
    assert max(held[1:5]) - copies <= 2 * 8 * 18  # a number or two for each tensor
    assert held[5] <= max(held[1:4])
    assert most - plain_most <= copies + 8 * 256 + 2048  # in a step there are short tensors and the sums, too
    assert left == plain_left


def test_a_small_model_takes_the_documented_rows():
    (after, most, left, _), (plain, plain_most, plain_left, _) = memory([lt.UpdateMonitor(2)]), memory([])
    rows = 3 * 9 * (16 * 16 + 16) * 8
    held = [one - other for one, other in zip(after, plain, strict=True)]
    assert held[1:5] == [rows] * 4
    assert rows <= most - plain_most <= rows + 8 * 3 * 9 + 1024
    assert rows <= 3 * step_rows._ENTRIES * 8 <= 2**19
    assert left == plain_left


# wandb: #2268; every step pays for what is looked at seldom.
def test_a_step_that_is_not_logged_has_no_operation_more():
    monitor = lt.UpdateMonitor(7, band=(1e-4, 1e-2), measures=["update_ratio", "noise_scale", "update_cosine"])
    options = {"limit_train_batches": 5, "accumulate_grad_batches": 2}
    assert operations([monitor], **options) == operations([], **options)


def test_hooks_are_there_on_logged_steps_only():
    class Look(Callback):
        def on_train_batch_end(self, trainer, *args):
            optimizer = trainer.optimizers[0]
            seen.append(len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks))

    seen = []
    fit([Look(), lt.UpdateMonitor(3)], logger=MemoryLogger(), max_epochs=1)
    assert seen == [0, 0, 2, 0, 0, 2]


def test_optimizers_that_are_replaced_are_followed_at_every_step():
    class Replaces(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2:
                trainer.strategy.optimizers = [torch.optim.SGD(pl_module.head.parameters(), lr=0.01)]

    logger = MemoryLogger()
    trainer, _ = fit([Replaces(), lt.UpdateMonitor(1)], logger=logger, max_epochs=1)
    layers = [{key for key in row if key.startswith("update_ratio/")} for _, row in logger.rows]
    assert [len(keys) for keys in layers if keys] == [4, 4, 2, 2, 2, 2]
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


# wandb: #10100, RadarML/nrdk: #38; hooks on tensors see the gradient of each of the batches of a step.
def test_accumulated_gradients_are_measured_once_and_whole():
    class Same(Net):
        """The same batch again and again: the mean of its gradients is that of one."""

        def on_train_batch_start(self, batch, batch_idx):
            first.setdefault("batch", batch)

        def training_step(self, batch, batch_idx):
            return super().training_step(first["batch"], batch_idx)

    first = {}
    accumulated = series(lt.UpdateMonitor(1), "grad_norm/total", Same(), accumulate_grad_batches=3)
    assert len(accumulated) == 2
    plain = series(lt.UpdateMonitor(1), "grad_norm/total", limit_train_batches=1)
    assert accumulated[0] == pytest.approx(plain[0], rel=1e-5)


# Lightning: #21589, #21720; a fused optimizer's gradients are still multiplied by 65536.
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_a_fused_optimizer_are_unscaled(fused):
    class Fused(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01, fused=fused)

    keys = ["grad_norm", "grad_norm_clipped"]
    for key in keys:
        norms = [
            series(lt.UpdateMonitor(1, keys), f"{key}/total", Fused(), plugins=[plugin_that_skips(scale)])[0]
            for scale in (1.0, 1024.0)
        ]
        assert norms[1] == pytest.approx(norms[0], rel=0.01)


# Composer's OptimizerMonitor: update norms of optimizers that report them alone, DecoupledAdamW.
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adagrad(p, 0.01),
        lambda p: torch.optim.RMSprop(p, 0.01),
        lambda p: torch.optim.Adafactor(p, 0.01),
        lambda p: torch.optim.NAdam(p, 0.01),
        lambda p: torch.optim.Rprop(p, 0.01),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    ],
)
def test_the_update_of_any_optimizer_is_measured(make):
    class Any(Net):
        def configure_optimizers(self):
            return make([p for p in self.parameters() if p.requires_grad])

        def optimizer_step(self, *args, **kwargs):
            before = [p.detach().double().clone() for p in self.parameters()]
            super().optimizer_step(*args, **kwargs)
            moved = [p.detach().double() - old for p, old in zip(self.parameters(), before, strict=True)]
            truth.append(math.sqrt(math.fsum(x**2 for d in moved for x in d.flatten().tolist())))

    truth = []
    assert series(lt.UpdateMonitor(1, ["update_norm"]), "update_norm/total", Any()) == pytest.approx(truth, rel=1e-5)


# wandb: #1819; nothing is measured of what is in a DataParallel, or before so many steps.
def test_layers_in_a_data_parallel_are_measured_from_the_first_step_on():
    class Parallel(Net):
        def __init__(self):
            super().__init__()
            self.body = nn.DataParallel(self.body)

    plain, logger = MemoryLogger(), MemoryLogger()
    fit([lt.UpdateMonitor(1), lt.ActivationMonitor(1)], logger=plain, max_epochs=1)
    fit([lt.UpdateMonitor(1), lt.ActivationMonitor(1)], Parallel(), logger=logger, max_epochs=1)
    for key in ("grad_norm", "weight_norm", "update_ratio", "activation_std"):
        assert len(plain.series(f"{key}/body.1")) == 6
        assert logger.series(f"{key}/body.module.1") == plain.series(f"{key}/body.1")


# wandb: #1639; in adversarial training the generator's gradients are missing.
def test_both_sides_of_adversarial_training_are_measured_in_every_step():
    class Adversarial(ByHand):
        def __init__(self):
            super().__init__()
            self.generator, self.critic = nn.Linear(4, 16), nn.Linear(16, 1)

        def configure_optimizers(self):
            return [torch.optim.Adam(side.parameters(), lr=0.01) for side in (self.generator, self.critic)]

        def training_step(self, batch, batch_idx):
            made = self.generator(torch.randn(4, 4))
            real = self.critic(batch[0].flatten(1)).mean()
            for optimizer, side in zip(self.optimizers(), (self.generator, self.critic), strict=True):
                ours = side is self.generator
                self.toggle_optimizer(optimizer)
                loss = -self.critic(made).mean() if ours else self.critic(made.detach()).mean() - real
                optimizer.zero_grad()
                self.manual_backward(loss)
                norms[ours].append(torch.cat([p.grad.flatten() for p in side.parameters()]).norm().item())
                optimizer.step()
                self.untoggle_optimizer(optimizer)

    norms, logger = {True: [], False: []}, MemoryLogger()
    fit([lt.UpdateMonitor(1)], Adversarial(), logger=logger, max_epochs=1)
    for ours, name in ((True, "generator"), (False, "critic")):
        assert list(logger.series(f"grad_norm/{name}").values()) == pytest.approx(norms[ours], rel=1e-4)
        assert len(logger.series(f"update_ratio/{name}")) == 6


# wandb: #2625; layers that are unfrozen later are not watched.
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_layers_that_are_unfrozen_later_are_measured_from_then_on():
    logger = MemoryLogger()
    fit([Unfreeze(), lt.UpdateMonitor(1)], logger=logger, max_epochs=2)
    assert list(logger.series("update_ratio/head")) == list(range(12))
    assert list(logger.series("update_ratio/body.1")) == list(range(6, 12))


# wandb: #4759, fairchem: #747; a thousand panels of histograms freeze the page.
def test_a_deep_model_has_as_few_panels_as_are_asked_for():
    class Blocks(Net):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}) for _ in range(40))

    def panels(**options):
        monitor = lt.UpdateMonitor(1, **options)
        fit([monitor], Blocks(), logger=MemoryLogger(), max_epochs=1, limit_train_batches=1)
        assert {type(value) for value in monitor.last.values()} == {float}
        return len(monitor.last)

    assert panels() == 3 * (3 + 80 + 1)
    assert panels(layers=0) == 3
    assert panels(layers=1) == 3 * (2 + 1 + 1)
    assert panels(layers=[r"blocks\.\d+"], measures=["update_ratio"]) == 40 + 1


# pytorch: #88621, Lightning: #19235, Composer: #3920; of parameters in parts each rank has the norm of its own part, or
# an error. (`test_sharded.py` and `test_update_monitor_measures.py` compare with the gathered tensors.)
def test_norms_in_parts_are_those_of_data_parallel_training():
    options = {"max_epochs": 1, "limit_val_batches": 0}

    def measure(train, module):
        logger, monitor = MemoryLogger(), lt.UpdateMonitor(1, ["grad_norm", "weight_norm", "update_norm"])
        train([monitor], module, logger=logger, **options)
        return [row for _, row in logger.rows if "grad_norm/total" in row], monitor.last

    in_parts = on_ranks(lambda: measure(sharded.fit, ShardedNet()))
    options |= {"strategy": "ddp", "devices": 2}
    whole = on_ranks(lambda: measure(fit, Net()))
    assert len(in_parts[0][0]) == len(whole[0][0]) == 3
    for got, expected in zip(in_parts[0][0], whole[0][0], strict=True):
        assert got == pytest.approx(expected, rel=1e-4)
    assert in_parts[0][1] == in_parts[1][1]


# transformers: #27233; the ranks exchange the sums of all tensors at once.
def test_ranks_meet_once_for_each_measure_and_not_for_each_tensor():
    class Wide(ShardedNet):
        def __init__(self):
            super().__init__()
            self.more = nn.ModuleList(nn.Linear(4, 4) for _ in range(20))

    def meetings(make, watched):
        calls, original = [], dist.all_reduce
        measures = ["grad_norm", "weight_norm", "update_norm"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
            monitors = [lt.UpdateMonitor(1, measures, "tensor")] if watched else []
            sharded.fit(monitors, make(), logger=MemoryLogger(), max_epochs=1, limit_val_batches=0)
        return len(calls)

    for make in (ShardedNet, Wide):
        with_it, without = (on_ranks(lambda m=make, w=watched: meetings(m, w)) for watched in (True, False))
        assert [one - other for one, other in zip(with_it, without, strict=True)] == [3 * 3, 3 * 3]


# Lightning: #7490, DeepSpeed: #4555; under DeepSpeed nothing is measured, and nothing says so.
def test_what_cannot_be_measured_is_refused():
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

    for kind in (DeepSpeedStrategy, FSDPStrategy):
        strategy = object.__new__(kind)
        trainer = type("Trainer", (), {"strategy": strategy, "callbacks": [], "global_step": 0})()
        with pytest.raises(ValueError, match="UpdateMonitor: strategy must be one that keeps whole parameters"):
            lt.UpdateMonitor().setup(trainer, None, "fit")
