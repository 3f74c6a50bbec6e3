"""Which steps of an optimizer count, where a step has another within it."""

import contextlib
import gc
import weakref

import pytest
import torch
from kit import ByHand, MemoryLogger, Net, fit, snapshot
from lightning.pytorch.callbacks import Callback

import lightning_tricks as lt
from lightning_tricks.callbacks.steps import after_real_steps

torch.optim.SGD(
    [torch.ones(1)]
)  # any instance makes torch run hooks around SGD.step, and so within steps of a subclass


class Decayed(torch.optim.SGD):
    """Changes weights before and after the step of its base class; may fail between them."""

    fails = False

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.scale(0.75)
        super().step()
        if self.fails:
            raise RuntimeError("failed in a step")
        self.scale(0.5)
        return loss

    def scale(self, factor):
        torch._foreach_mul_([p for group in self.param_groups for p in group["params"]], factor)


class Halves(Net):
    def configure_optimizers(self):
        return Decayed([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Updates(Callback):
    """Norms of what each batch did to all trained weights, by a loop."""

    def __init__(self):
        self.norms, self.rates = [], []

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.before = snapshot(pl_module)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, *args):
        pairs = [(p, self.before[name]) for name, p in pl_module.named_parameters() if p.requires_grad]
        self.norms.append(sum((p.double() - old.double()).square().sum() for p, old in pairs).sqrt().item())


@pytest.mark.parametrize("measures", [["update_norm"], ["update_norm", "grad_zeros"]], ids=["rows", "tensors"])
def test_a_step_within_a_step_is_one_step(measures):
    """Measured from the outer step's beginning to its end, averaged once, and one for the schedule."""
    logger, updates, ema = MemoryLogger(), Updates(), lt.EMA(0.5)
    fit([lt.UpdateMonitor(1, measures), ema, lt.LRSchedule(lt.Linear()), updates], Halves(), logger=logger)
    assert list(logger.series("update_norm/total").values()) == pytest.approx(updates.norms, rel=1e-5)
    assert ema.updates == 12
    assert updates.rates == pytest.approx([0.1 * (1 - k / 12) for k in range(12)])


def test_a_step_that_lets_go_of_its_gradients_counts():
    class Zeroes(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            self.zero_grad()
            return loss

    class Module(Net):
        def configure_optimizers(self):
            return Zeroes(self.parameters(), lr=0.1)

    ema, updates = lt.EMA(0.5), Updates()
    fit([ema, lt.LRSchedule(lt.Linear()), updates], Module())
    assert ema.updates == 12
    assert updates.rates == pytest.approx([0.1 * (1 - k / 12) for k in range(12)])


def test_a_step_that_failed_lets_go_of_what_it_held():
    """Its frames have the activations, which a retry with a smaller batch has no room for."""
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = Decayed([parameter], lr=0.1)
    optimizer.fails, parameter.grad = True, torch.ones(1)
    handles = after_real_steps("EMA", [optimizer], print)

    def step():
        large = torch.ones(10)
        held.append(weakref.ref(large))
        optimizer.step()

    held = []
    with contextlib.suppress(RuntimeError):
        step()
    gc.collect()
    assert held[0]() is None
    assert len(handles) == 2


def test_a_step_that_failed_hides_no_later_one():
    class Catches(Halves, ByHand):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.fails = batch_idx == 1
            optimizer.zero_grad()
            self.manual_backward(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))
            if optimizer.fails:
                with pytest.raises(RuntimeError, match="failed in a step"):
                    optimizer.step()
            else:
                optimizer.step()

    ema = lt.EMA(0.5)
    fit([ema], Catches(), max_epochs=1)
    assert ema.updates == 5


def test_one_optimizer_without_hooks_leaves_none_on_the_others():
    good = torch.optim.SGD([torch.ones(1)])
    with pytest.raises(TypeError, match=r"EMA: optimizer must be a torch.optim.Optimizer, got 'object'"):
        after_real_steps("EMA", [good, object()], print)
    assert not good._optimizer_step_post_hooks
