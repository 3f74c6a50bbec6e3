"""What users of other monitors complained of; each test has their names above it. Rows and runs: `test_loggers.py`."""

import math

import pytest
import torch
from kit import ByHand, MemoryLogger, Net, fit, plugin_that_skips
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import grad_norm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_tricks as lt


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


def operations(callbacks, **options):
    with Operations() as seen:
        fit(callbacks, Quiet(), logger=MemoryLogger(), max_epochs=1, limit_val_batches=0, **options)
    return seen.names


# Lightning: #11471, #16084; track_grad_norm is gone, and what is left is a function to call by hand.
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


# wandb.watch: #2268, #3701, HF #27233; every step pays for what is looked at seldom.
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


# Lightning: #10100, RadarML/nrdk: #38, wandb.watch; hooks on tensors see the gradient of each of the batches of a step.
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


# wandb: #4759; a thousand panels freeze the page.
def test_a_deep_model_has_as_few_panels_as_are_asked_for():
    class Deep(Net):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}) for _ in range(40))

    def panels(**options):
        monitor = lt.UpdateMonitor(1, **options)
        fit([monitor], Deep(), logger=MemoryLogger(), max_epochs=1, limit_train_batches=1)
        return len(monitor.last)

    assert panels() == 3 * (3 + 80 + 1)
    assert panels(layers=0) == 3
    assert panels(layers=1) == 3 * (2 + 1 + 1)
    assert panels(layers=[r"blocks\.\d+"], measures=["update_ratio"]) == 40 + 1


# Lightning: #19235, pytorch: #88621, DeepSpeed: #4555; norms of parts differ by rank: `test_sharded.py` and
# `test_update_monitor_measures.py` compare them with those of the gathered tensors. Lightning: #7490; under DeepSpeed
# nothing was measured, and nothing said so.
def test_what_cannot_be_measured_is_refused():
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

    for kind in (DeepSpeedStrategy, FSDPStrategy):
        strategy = object.__new__(kind)
        trainer = type("Trainer", (), {"strategy": strategy, "callbacks": [], "global_step": 0})()
        with pytest.raises(ValueError, match="UpdateMonitor: strategy must be one that keeps whole parameters"):
            lt.UpdateMonitor().setup(trainer, None, "fit")
