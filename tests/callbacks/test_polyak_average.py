"""Averages that begin late, are updated seldom, or are a plain mean, against the weights of every step in a loop."""

import pytest
import torch
from kit import (
    ByHand,
    MemoryLogger,
    Net,
    ResumableLoader,
    assert_same,
    every_epoch,
    fit,
    loader,
    make_trainer,
    snapshot,
)
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint
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
    with pytest.raises(ValueError, match=r"EMA: callbacks must be the only one of its kind in a Trainer, got \["):
        fit([lt.EMA(), lt.PolyakAverage()])
    with pytest.raises(ValueError, match=r"EMA: callbacks must be the only one of its kind in a Trainer, got \["):
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


# ---------------------------------------------------------------------------------------------------- at ends of cycles


@pytest.mark.parametrize(
    ("cycles", "ends"),
    [
        (lt.CosineRestarts(3), (6, 12, 18)),
        (lt.CosineRestarts(2, multiplier=2.0), (6, 18)),
        (lt.CosineRestarts(length="1ep"), (6, 12, 18)),
        (lt.Triangular(length=5), (5, 10, 15)),
    ],
)
def test_mean_of_the_weights_at_the_end_of_each_cycle(cycles, ends):
    watch = Watch()
    average = lt.PolyakAverage(0, every_n_steps=cycles)
    _, module = fit([average, lt.LRSchedule(cycles), watch], max_epochs=3)
    tail = [watch.steps[step - 1] for step in ends]
    assert_close(dict(module.named_parameters()), {n: torch.stack([w[n] for w in tail]).mean(0) for n in LEARNED})
    assert average.updates == len(ends)
    assert average.settings["every_n_steps"].startswith(f"{type(cycles).__name__}(cycles=")


def test_exponential_average_at_the_end_of_each_cycle_decays_once_a_step():
    watch = Watch()
    _, module = fit([lt.EMA(0.9, start=8, every_n_steps=lt.Triangular(4, low=0.1)), watch])
    first, second = watch.steps[8], watch.steps[11]
    assert_close(dict(module.named_parameters()), {n: 0.9**3 * first[n] + (1 - 0.9**3) * second[n] for n in LEARNED})


def test_schedule_without_cycles_is_refused():
    with pytest.raises(ValueError, match="PolyakAverage: every_n_steps must be a schedule that has cycles, got Cosine"):
        lt.PolyakAverage(0.5, every_n_steps=lt.Cosine())


# ------------------------------------------------------------------------------------------ batch-norm statistics anew


class Population(Callback):
    """What validation sees, and what it should: statistics of all training data under the weights that it sees."""

    def __init__(self):
        self.seen, self.expected = [], []

    def on_validation_epoch_start(self, trainer, pl_module):
        self.note(pl_module)

    def note(self, module):
        images = torch.cat([batch[0] for batch in loader()])
        linear = module.body[1]
        inputs = torch.nn.functional.linear(images.flatten(1), linear.weight, linear.bias).detach()
        self.expected.append((inputs.mean(0), inputs.var(0)))
        norm = module.body[2]
        self.seen.append((norm.running_mean.clone(), norm.running_var.clone()))

    def assert_same(self, first=0):
        assert len(self.seen) > first
        for seen, expected in zip(self.seen[first:], self.expected[first:], strict=True):
            torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


def test_statistics_of_the_mean_are_those_of_the_training_data():
    population, watch = Population(), Watch()
    _, module = fit([lt.PolyakAverage("1ep", update_bn=True), population, watch], max_epochs=3)
    population.note(module)
    population.assert_same(first=2)  # after the sanity check and the first epoch, where no mean had begun
    assert len(population.seen) == 5
    tail = watch.steps[6:]
    assert_close(dict(module.named_parameters()), {n: torch.stack([w[n] for w in tail]).mean(0) for n in LEARNED})
    _, plain = fit([])
    assert module.losses[:12] == plain.losses  # training goes on with its own statistics


def test_statistics_can_come_from_a_function_of_the_batch():
    class Dictionary(DataLoader):
        def __init__(self):
            super().__init__(loader().dataset, batch_size=4, collate_fn=self.collate)

        @staticmethod
        def collate(rows):
            return {"image": torch.stack([row[0] for row in rows]), "label": torch.stack([row[1] for row in rows])}

    class OfDictionaries(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["image"], batch["label"]), batch_idx)

    def forward(module, batch):
        return module(batch["image"])

    population = Population()
    _, module = fit([lt.PolyakAverage(0.5, update_bn=forward)], OfDictionaries(), train=Dictionary())
    population.note(module)
    population.assert_same()
    with pytest.raises(TypeError, match="PolyakAverage"):
        fit([lt.PolyakAverage(0.5, update_bn=True)], OfDictionaries(), train=Dictionary())


def test_best_checkpoint_has_the_statistics_that_were_validated(tmp_path):
    population = Population()
    save = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1, filename="{epoch}")
    _, module = fit([lt.PolyakAverage("1ep", update_bn=True), population, save], max_epochs=3)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    mean, _ = population.seen[2]
    assert_same(saved["state_dict"]["body.2.running_mean"], mean)
    assert saved["state_dict"]["body.2.num_batches_tracked"].item() == 6
    assert saved["current_model_state"]["body.2.num_batches_tracked"].item() == 12
    last = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    assert_same(dict(last["state_dict"]), snapshot(module))


def test_layer_that_the_user_froze_keeps_its_statistics():
    class Frozen(Net):
        def on_train_epoch_start(self):
            self.body[2].eval()

    _, module = fit([lt.PolyakAverage(0.5, update_bn=True)], Frozen())
    assert_same(module.body[2].running_mean, Net().body[2].running_mean)


def test_error_while_statistics_are_estimated_leaves_the_raw_weights():
    def forward(module, batch):
        raise RuntimeError("failed in the estimate")

    watch, module = Watch(), Net()
    with pytest.raises(RuntimeError, match="failed in the estimate"):
        fit([watch, lt.PolyakAverage("1ep", update_bn=forward)], module, max_epochs=3)
    assert_same({n: p.detach() for n, p in module.named_parameters()}, watch.steps[-1])
    _, plain = fit([], max_epochs=2)
    assert_same(snapshot(module), snapshot(plain))


@pytest.mark.parametrize(("value", "error"), [(1, TypeError), ("yes", TypeError), (Net, TypeError)])
def test_update_bn_of_another_type(value, error):
    with pytest.raises(error, match="PolyakAverage: update_bn must be a bool or a function of"):
        lt.PolyakAverage(update_bn=value)


def test_statistics_of_weights_that_nobody_evaluates_are_refused():
    with pytest.raises(
        ValueError, match="PolyakAverage: evaluate must be 'average' or 'both' with update_bn, got 'raw'"
    ):
        lt.PolyakAverage(update_bn=True, evaluate="raw")


def test_ranks_share_the_statistics_of_all_data(tmp_path):
    class Save(Callback):
        def on_train_end(self, trainer, pl_module):
            torch.save(snapshot(pl_module), tmp_path / f"{trainer.global_rank}.pt")

    fit([lt.PolyakAverage(0.5, update_bn=True), Save()], strategy="ddp_fork", devices=2, max_epochs=4)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(first, second)
    module, population = Net(), Population()
    module.load_state_dict(first)
    population.note(module)
    population.assert_same()


@pytest.mark.parametrize("evaluate", ["average", "both"])
def test_statistics_of_a_finer_mean_stay_with_it(evaluate, tmp_path):
    population = Population()
    save = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1, filename="{epoch}")
    average = lt.PolyakAverage("1ep", update_bn=True, dtype="float64", evaluate=evaluate)
    trainer, module = fit([average, population, save], val=loader(24, seed=5), max_epochs=3)
    population.note(module)
    population.assert_same(first=2)
    model = lt.load_average(tmp_path / "epoch=2.ckpt", Net())
    assert_same(snapshot(model), snapshot(module))
    logged = trainer.callback_metrics["val/loss"]
    (again,) = make_trainer([]).validate(model, loader(24, seed=5), verbose=False)
    assert again["val/loss"] == pytest.approx(logged.item(), abs=1e-6)
