"""Averages that begin late, are updated seldom, or are a plain mean, against the weights of every step in a loop."""

import pytest
import torch
from kit import ByHand, MemoryLogger, Net, ResumableLoader, assert_same, every_epoch, fit, loader, snapshot
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset

import lightning_tricks as lt

LEARNED = [name for name, _ in Net().named_parameters()]


class Watch(Callback):
    """The raw weights after every step, and what validation sees."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    def on_validation_epoch_start(self, trainer, pl_module):
        self.validated.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def assert_close(left, right):
    for name in LEARNED:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("start", "first"), [(0.75, 10), (0.5, 7), (9, 10), ("1ep", 7), (0, 1)])
def test_it_is_the_mean_of_the_tail(start, first):
    watch = Watch()
    _, module = fit([lt.PolyakAverage(start), watch])
    tail = watch.steps[first - 1 :]
    assert_close(dict(module.named_parameters()), {n: torch.stack([w[n] for w in tail]).mean(0) for n in LEARNED})


def test_once_an_epoch_it_is_torchs_swa():
    class Swa(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch >= 1:
                if not hasattr(self, "model"):
                    self.model = AveragedModel(pl_module.body)
                self.model.update_parameters(pl_module.body)

    swa = Swa()
    _, module = fit([lt.PolyakAverage("1ep", every_n_steps="1ep"), swa], max_epochs=4)
    for got, expected in zip(module.body.parameters(), swa.model.module.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("average", "decays"),
    [
        (lt.EMA(lt.HalfLife("1ep")), dict.fromkeys(range(1, 13), 0.5 ** (1 / 6))),
        (lt.EMA(lt.HalfLife(0.5)), dict.fromkeys(range(1, 13), 0.5 ** (1 / 6))),
        (lt.EMA(lt.Warmed(0.8)), {k: min(0.8, 1 - (1 + (k - 1)) ** (-2 / 3)) for k in range(1, 13)}),
        (lt.EMA(0.9, start=5), dict.fromkeys(range(6, 13), 0.9)),
        (lt.EMA(0.9, every_n_steps=4), dict.fromkeys((4, 8, 12), 0.9**4)),
        (lt.EMA(0.9, start="1ep", every_n_steps=2), dict.fromkeys((8, 10, 12), 0.9**2)),
        (lt.EMA(lambda updates, total: updates / total), {k: (k - 1) / 12 for k in range(1, 13)}),
    ],
)
def test_it_is_the_average_of_an_explicit_loop(average, decays):
    watch = Watch()
    _, module = fit([average, watch])
    expected = None
    for step, weights in enumerate(watch.steps, start=1):
        if step in decays:
            decay = decays[step]
            old = expected or weights
            expected = {n: decay * old[n] + (1 - decay) * weights[n] for n in LEARNED}
    assert_close(dict(module.named_parameters()), expected)
    assert average.updates == len(decays)


def test_validation_sees_the_raw_weights_until_it_has_started():
    watch = Watch()
    fit([lt.PolyakAverage("1ep"), watch], num_sanity_val_steps=0, max_epochs=3)
    assert_same(watch.validated[0], watch.steps[5])
    tail = watch.steps[6:12]
    assert_close(watch.validated[1], {n: torch.stack([w[n] for w in tail]).mean(0) for n in LEARNED})


def test_training_that_ended_before_the_start_says_so_and_keeps_its_weights():
    watch = Watch()
    with pytest.warns(UserWarning, match="PolyakAverage: training ended after 12 real steps, before the average start"):
        _, module = fit([lt.PolyakAverage(start=100), watch])
    assert_same({n: p.detach() for n, p in module.named_parameters()}, watch.steps[-1])


def test_resume_from_before_the_start_counts_on(tmp_path):
    _, whole = fit([lt.PolyakAverage(start=8), every_epoch(tmp_path)], train=ResumableLoader(), max_epochs=3)
    callbacks = [lt.PolyakAverage(start=8), every_epoch(tmp_path / "rest")]
    _, resumed = fit(callbacks, train=ResumableLoader(), max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(snapshot(resumed), snapshot(whole))
    assert callbacks[0].updates == 10


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_checkpoint_of_lightnings_own_average_is_gone_on_with(tmp_path):
    fit([EMAWeightAveraging(decay=0.9, use_buffers=False), every_epoch(tmp_path)], max_epochs=2)
    ema = lt.EMA(0.9, every_n_steps=2)
    fit([ema, every_epoch(tmp_path / "rest")], max_epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert (ema._steps, ema.updates) == (18, 12 + 3)


class Unsized(IterableDataset):
    def __iter__(self):
        yield from loader().dataset


def test_fraction_of_a_run_of_unknown_length_is_refused():
    text = "PolyakAverage: total_steps must be known, got 'a loader without a length.*Give optimizer steps"
    with pytest.raises(ValueError, match=text):
        fit([lt.PolyakAverage(0.5)], train=DataLoader(Unsized(), batch_size=4))
    callback = lt.PolyakAverage(8)
    fit([callback], train=DataLoader(Unsized(), batch_size=4))
    assert callback.updates == 4


def test_two_evaluated_averages_are_refused():
    with pytest.raises(ValueError, match="EMA: callbacks must be the only one of its kind in a Trainer, got 2"):
        fit([lt.EMA(), lt.PolyakAverage()])
    with pytest.raises(ValueError, match="EMA: callbacks must be the only one of its kind in a Trainer, got 2"):
        fit([lt.PolyakAverage(), lt.EMA()])


def test_early_stopping_restores_the_mean_that_was_evaluated():
    class Seen(EarlyStopping):
        pass

    watch = Watch()
    stop = lt.EarlyStopping("val/loss", patience=100, restore_best=True)
    _, module = fit([lt.PolyakAverage(0.5), stop, watch], max_epochs=4)
    restored = {n: p.detach() for n, p in module.named_parameters()}
    assert any(all(torch.equal(restored[n], seen[n]) for n in LEARNED) for seen in watch.validated)


def test_settings_are_plain():
    logger = MemoryLogger()
    fit([lt.EMA(lt.HalfLife("1ep"), start="1ep")], logger=logger)
    expected = {"decay": "HalfLife(duration='1ep')", "start": "1ep", "every_n_steps": 1}
    assert logger.hparams["tricks"]["EMA"] == expected


def test_steps_by_hand_count():
    class Steps(ByHand):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    callback = lt.PolyakAverage(0.5)
    fit([callback], Steps())
    assert callback.updates == 6
