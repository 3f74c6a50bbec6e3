import copy
import logging
import math
import pickle
import warnings
from functools import partial

import lightning as L
import pytest
import torch
from kit import (
    Batches,
    ByHand,
    MemoryLogger,
    Net,
    ResumableLoader,
    StopAfter,
    TwoOptimizers,
    every_epoch,
    fit,
    loader,
    make_trainer,
)
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    Callback,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.optim import lr_scheduler as torch_schedulers
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

import lightning_tricks as lt


class Rates(Callback):
    """The rates in force when each batch is trained on."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append([[group["lr"] for group in optimizer.param_groups] for optimizer in trainer.optimizers])

    @property
    def first(self):
        return [rates[0][0] for rates in self.rates]


class Unsized(IterableDataset):
    def __iter__(self):
        yield from loader().dataset


class Groups(Net):
    """Two groups with rates of their own, as in layer-wise decay."""

    def configure_optimizers(self):
        groups = [{"params": self.head.parameters(), "lr": 0.1}, {"params": self.body.parameters(), "lr": 0.01}]
        return torch.optim.SGD(groups)


ends_elsewhere = pytest.mark.filterwarnings("ignore:.*(the schedule is for .* optimizer steps|an epoch by hand has)")


def factors(schedule, steps):
    return [schedule(step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", [lt.WarmupCosine(0.25), lt.Linear(), lt.Constant(0.5), lambda k, T: 1 / (1 + k)])
def test_rate_of_every_step_is_base_times_factor(schedule):
    rates = Rates()
    fit([lt.LRSchedule(schedule), rates])
    assert rates.first == pytest.approx([0.05 * factor for factor in factors(schedule, 12)], abs=1e-15)


def test_it_is_torch_cosine_stepped_each_step():
    rates = Rates()
    fit([lt.LRSchedule(lt.Cosine()), rates])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    oracle, expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12), []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    assert rates.first == pytest.approx(expected, abs=1e-12)


def test_every_group_keeps_its_own_base():
    rates = Rates()
    fit([lt.LRSchedule(lt.Linear()), rates], Groups())
    for step, (groups,) in enumerate(rates.rates):
        assert groups == pytest.approx([0.1 * (1 - step / 12), 0.01 * (1 - step / 12)])


def test_group_added_in_the_run_has_its_own_rate_as_base():
    class AddGroup(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                parameters = pl_module.frozen.requires_grad_(True).parameters()
                trainer.optimizers[0].add_param_group({"params": parameters, "lr": 0.3})

    rates = Rates()
    fit([lt.LRSchedule(lt.Linear()), AddGroup(), rates])
    assert rates.rates[6][0] == pytest.approx([0.05 * 0.5, 0.3 * 0.5])
    assert rates.rates[7][0] == pytest.approx([0.05 * 5 / 12, 0.3 * 5 / 12])


def test_rate_that_is_a_tensor_stays_the_same_tensor():
    class TensorRate(Net):
        def configure_optimizers(self):
            self.rate = torch.tensor(0.1)
            return torch.optim.Adam(self.head.parameters(), lr=self.rate, foreach=False, capturable=False)

    trainer, module = fit([lt.LRSchedule(lt.Linear())], TensorRate())
    assert trainer.optimizers[0].param_groups[0]["lr"] is module.rate
    assert module.rate.item() == 0.0


@ends_elsewhere
def test_each_of_several_optimizers_counts_its_own_steps():
    rates = Rates()
    trainer, _ = fit([lt.LRSchedule(lt.Linear()), rates], TwoOptimizers())
    first, second = (config.scheduler for config in trainer.lr_scheduler_configs)
    assert (first.last_epoch, second.last_epoch) == (12, 6)
    assert rates.rates[-1][0] == pytest.approx([0.1 * (1 - 11 / 12)])
    assert rates.rates[-1][1] == pytest.approx([0.01 * (1 - 5 / 12)])


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"max_epochs": 3}, 18),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, 6),
        ({"max_epochs": 3, "limit_train_batches": 4}, 12),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 9),
        ({"max_epochs": -1, "max_steps": 7}, 7),
        ({"max_epochs": 3, "max_steps": 7}, 7),
        ({"max_epochs": 1, "max_steps": 700}, 6),
    ],
)
def test_length_is_taken_from_the_run(options, length):
    trainer, _ = fit([lt.LRSchedule(lt.Linear())], **options)
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert (scheduler.clock.total_steps, scheduler.last_epoch) == (length, length)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


@ends_elsewhere
def test_length_that_was_given_wins():
    trainer, _ = fit([lt.LRSchedule(lt.Linear(), total_steps=24)])
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.025)


@ends_elsewhere
def test_constant_after_the_end():
    trainer, _ = fit([lt.LRSchedule(lt.Linear(end=0.25), total_steps=5)])
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.25)


@pytest.mark.parametrize("duration", [6, 0.5, "1ep"])
def test_duration_in_steps_fraction_and_epochs_agree(duration):
    rates = Rates()
    fit([lt.LRSchedule(lt.Warmup(duration, lt.Linear())), rates])
    assert rates.first == pytest.approx([0.05 * (k / 6 if k < 6 else 1 - (k - 6) / 6) for k in range(12)])


def test_epoch_of_accumulated_batches_is_its_optimizer_steps():
    trainer, _ = fit([lt.LRSchedule(lt.Warmup("1ep", lt.Constant()))], accumulate_grad_batches=4, max_epochs=2)
    assert trainer.lr_scheduler_configs[0].scheduler.clock.schedule == lt.Warmup(2, lt.Constant())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@ends_elsewhere
def test_step_without_a_loss_does_not_count():
    class Sometimes(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    trainer, _ = fit([lt.LRSchedule(lt.Linear())], Sometimes())
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 6


@pytest.mark.parametrize("skipped", [True, False])
def test_fused_optimizer_under_a_scaler_counts_real_steps(skipped):
    """Its step hook fires on a skipped step too; whether it was one stands in `found_inf`."""
    from lightning_tricks.callbacks.steps import is_real_step

    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, fused=True)
    parameter.grad = torch.full((2,), torch.inf if skipped else 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    seen = []
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(is_real_step(optimizer)))
    scaler.step(optimizer)
    assert seen == [not skipped]


def test_learning_rate_monitor_sees_it():
    logger = MemoryLogger()
    fit([lt.LRSchedule(lt.Linear()), LearningRateMonitor()], logger=logger, max_epochs=1)
    assert list(logger.series("lr-SGD").values()) == pytest.approx([0.05 * (1 - k / 6) for k in range(6)])


def test_resume_for_longer_stretches_the_schedule_and_says_so(tmp_path, caplog):
    rates = Rates()
    fit([lt.LRSchedule(lt.Linear()), every_epoch(tmp_path)], max_epochs=2)
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        fit(
            [lt.LRSchedule(lt.Linear()), rates, every_epoch(tmp_path / "rest")],
            ckpt_path=tmp_path / "epoch=1.ckpt",
            max_epochs=4,
        )
    assert rates.first == pytest.approx([0.05 * (1 - k / 24) for k in range(12, 24)])
    assert (
        "had 12 optimizer steps (6 an epoch), now it has 24 (6); the schedule is stretched and goes on at step 12"
        in caplog.text
    )


@pytest.mark.parametrize(("options", "total"), [({"accumulate_grad_batches": 2}, 18), ({"limit_train_batches": 3}, 18)])
def test_resume_with_other_epochs_counts_what_is_left(options, total, tmp_path):
    """Two epochs of six steps are done; the two that are left have three each."""
    fit([lt.LRSchedule(lt.Linear()), every_epoch(tmp_path)], max_epochs=4)
    trainer, _ = fit(
        [lt.LRSchedule(lt.Linear()), every_epoch(tmp_path / "rest")],
        ckpt_path=tmp_path / "epoch=1.ckpt",
        max_epochs=4,
        **options,
    )
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert (scheduler.clock.total_steps, scheduler.last_epoch) == (total, total)


def test_resume_of_a_run_whose_epochs_had_changed_already(tmp_path):
    fit([lt.LRSchedule(lt.Linear()), every_epoch(tmp_path / "1")], max_epochs=4)
    options = {"max_epochs": 4, "accumulate_grad_batches": 2}
    rates = Rates()
    callbacks = [lt.LRSchedule(lt.Linear()), rates, every_epoch(tmp_path / "2")]
    fit(callbacks, ckpt_path=tmp_path / "1" / "epoch=1.ckpt", **options)
    rest = Rates()
    callbacks = [lt.LRSchedule(lt.Linear()), rest, every_epoch(tmp_path / "3")]
    fit(callbacks, ckpt_path=tmp_path / "2" / "epoch=2.ckpt", **options)
    assert rest.first == rates.first[-len(rest.first) :]
    assert rest.first[-1] == pytest.approx(0.05 / 18)


def test_resume_in_the_middle_of_an_epoch_that_goes_on_otherwise(tmp_path):
    def save(folder):
        return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)

    fit([lt.LRSchedule(lt.Linear()), save(tmp_path)], train=ResumableLoader())
    trainer, _ = fit(
        [lt.LRSchedule(lt.Linear()), save(tmp_path / "rest")],
        train=ResumableLoader(),
        ckpt_path=tmp_path / "step=4.ckpt",
        accumulate_grad_batches=2,
    )
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert (scheduler.clock.total_steps, scheduler.last_epoch) == (8, 8)


@ends_elsewhere
def test_fit_that_had_nothing_to_train_or_failed_early_loses_no_step():
    class FailsInSanityCheck(Net):
        fail = False

        def validation_step(self, batch, batch_idx):
            if self.fail:
                raise RuntimeError("failed in the sanity check")
            super().validation_step(batch, batch_idx)

    rates = Rates()
    trainer, module = fit([lt.LRSchedule(lt.Linear(), total_steps=24), rates], FailsInSanityCheck())
    trainer.fit(module, loader(), loader(8))  # max_epochs was reached
    module.fail, trainer.fit_loop.max_epochs = True, 4
    with pytest.raises(RuntimeError, match="failed in the sanity check"):
        trainer.fit(module, loader(), loader(8))
    module.fail = False
    module.train()
    trainer.fit(module, loader(), loader(8))
    assert rates.first == pytest.approx([0.05 * (1 - k / 24) for k in range(24)])


def test_group_with_a_tensor_for_a_rate_that_is_added_in_the_run():
    class AddGroup(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                parameters = pl_module.frozen.requires_grad_(True).parameters()
                trainer.optimizers[0].add_param_group({"params": parameters, "lr": torch.tensor(0.3)})

    rates = Rates()

    class Copy(Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.rates.append([float(group["lr"]) for group in trainer.optimizers[0].param_groups])

    fit([lt.LRSchedule(lt.Linear()), AddGroup(), Copy()])
    assert [row[1] for row in rates.rates[6:]] == pytest.approx([0.3 * (1 - k / 12) for k in range(6, 12)])


def test_schedule_that_joins_a_resumed_run_goes_on_at_its_step(tmp_path):
    fit([every_epoch(tmp_path)], max_epochs=1)
    rates = Rates()
    fit([lt.LRSchedule(lt.Linear()), rates, every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "epoch=0.ckpt")
    assert rates.first == pytest.approx([0.05 * (1 - k / 12) for k in range(6, 12)])


def test_resume_of_a_run_with_another_scheduler_is_refused(tmp_path):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3)]

    fit([every_epoch(tmp_path)], Scheduled(), max_epochs=1)
    with pytest.raises(ValueError, match="LRSchedule: checkpoint must be of a run under the same schedule, got"):
        fit([lt.LRSchedule(lt.Linear()), every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "epoch=0.ckpt")


def test_new_trainer_starts_anew():
    callback = lt.LRSchedule(lt.Linear())
    fit([callback])
    rates = Rates()
    fit([callback, rates])
    assert rates.first == pytest.approx([0.05 * (1 - k / 12) for k in range(12)])


def test_no_hook_stays_on_an_optimizer_of_the_users_own():
    class Own(Net):
        def __init__(self):
            super().__init__()
            self.mine = torch.optim.SGD(self.head.parameters(), lr=0.1)

        def configure_optimizers(self):
            return self.mine

    module = Own()
    for _ in range(2):  # a second fit with the same optimizer has the same base
        rates = Rates()
        fit([lt.LRSchedule(lt.Linear()), rates, lt.EMA(), lt.UpdateMonitor(1)], module, logger=MemoryLogger())
        assert rates.first == pytest.approx([0.1 * (1 - k / 12) for k in range(12)])
        assert not module.mine._optimizer_step_post_hooks
        assert not module.mine._optimizer_step_pre_hooks


# ------------------------------------------------------------------------------------------------------------- refusals

NAMES_TOTAL_STEPS = r"LRSchedule.*: total_steps must be known, got .*{}.* "
NAMES_TOTAL_STEPS += r"Give total_steps="


def test_endless_training_asks_for_total_steps():
    with pytest.raises(ValueError, match=NAMES_TOTAL_STEPS.format("endless training")):
        fit([lt.LRSchedule(lt.Linear())], max_epochs=-1)


def test_unsized_loader_asks_for_total_steps():
    unsized = DataLoader(Unsized(), batch_size=4)
    with pytest.raises(ValueError, match=NAMES_TOTAL_STEPS.format("a loader without a length")):
        fit([lt.LRSchedule(lt.Linear())], train=unsized)
    trainer, _ = fit([lt.LRSchedule(lt.Linear(), total_steps=12)], train=DataLoader(Unsized(), batch_size=4))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


def test_changing_accumulation_asks_for_total_steps():
    with pytest.raises(ValueError, match=NAMES_TOTAL_STEPS.format("an accumulation that changes")):
        fit([lt.LRSchedule(lt.Linear()), GradientAccumulationScheduler({0: 1, 1: 2})])


def test_optimizers_that_share_max_steps_ask_for_total_steps():
    with pytest.raises(ValueError, match=NAMES_TOTAL_STEPS.format("max_steps=8 shared by 2 optimizers")):
        fit([lt.LRSchedule(lt.Linear())], TwoOptimizers(), max_steps=8, max_epochs=-1)


def test_epochs_of_an_unsized_loader_are_refused():
    schedule = lt.LRSchedule(lt.Warmup("1ep", lt.Linear()), total_steps=12)
    with pytest.raises(ValueError, match="Warmup: duration must be in steps or a fraction of the run.* got '1ep'"):
        fit([schedule], train=DataLoader(Unsized(), batch_size=4))


def test_warmup_longer_than_the_run_is_refused_before_the_first_step():
    module = Net()
    with pytest.raises(ValueError, match="Warmup: duration must be at most the run's 12 optimizer steps, got 500"):
        fit([lt.LRSchedule(lt.Warmup(500, lt.Linear()))], module)
    assert module.losses == []


def test_warmup_longer_than_a_fast_dev_run_is_not():
    trainer, _ = fit([lt.LRSchedule(lt.WarmupCosine(500))], fast_dev_run=True)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05


def test_scheduler_of_the_module_is_refused():
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3)]

    with pytest.raises(ValueError, match=r"LRSchedule: schedulers must be the only one .* got .StepLR"):
        fit([lt.LRSchedule(lt.Linear())], Scheduled())


def test_lightnings_swa_is_refused():
    with pytest.raises(ValueError, match="LRSchedule: callbacks must be the only one that sets the rate"):
        fit([lt.LRSchedule(lt.Linear()), StochasticWeightAveraging(swa_lrs=0.1)])
    with pytest.raises(ValueError, match=r"LRSchedule: callbacks .* got \['BackboneFinetuning'\]"):
        fit([lt.LRSchedule(lt.Linear()), BackboneFinetuning()])


@pytest.mark.parametrize("schedule", [None, 0.1, lt.Cosine])
def test_schedule_must_be_one(schedule):
    with pytest.raises(TypeError, match="LRSchedule: schedule must be a schedule .* got "):
        lt.LRSchedule(schedule)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError)])
def test_total_steps_must_be_a_count(value, error):
    with pytest.raises(error, match="LRSchedule: total_steps must be a whole number of at least 1"):
        lt.LRSchedule(lt.Cosine(), total_steps=value)


def test_optimizer_without_step_hooks_is_refused():
    from lightning_tricks.callbacks.steps import after_real_steps

    with pytest.raises(TypeError, match=r"EMA: optimizer must be a torch\.optim\.Optimizer, got 'object'"):
        after_real_steps("EMA", [object()], print)


# ------------------------------------------------------------------------------------------------- what the run is told


@pytest.fixture
def told(caplog):
    """What the schedules said so far."""
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    caplog.set_level(logging.INFO)
    return lambda: [m for m in (r.getMessage() for r in caplog.records) if m.startswith("LRSchedule")]


def test_a_line_before_the_first_step_says_what_the_schedule_does(told):
    class Silent(Callback):
        before = ()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = self.before or told()

    silent = Silent()
    fit([lt.LRSchedule(lt.WarmupCosine(3, end=0.01)), silent])
    line = "LRSchedule: WarmupCosine(warmup=3, end=0.01) over 12 optimizer steps: factor 0 at first, at most 1 (step 3)"
    assert silent.before == told() == [f"{line}, 0.01 at the end."]


def test_fast_dev_run_says_nothing_and_keeps_the_base_rates(told):
    rates = Rates()
    callback = lt.LRSchedule(lt.Linear(), scale_with_batch="linear", base_batch_size=1, prog_bar=True)
    fit([callback, rates], fast_dev_run=3)
    assert rates.first == [0.05] * 3
    assert told() == []


def end_warnings(callbacks, *args, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(callbacks, *args, **options)
    return [text for text in (str(w.message) for w in caught) if "the schedule is for" in text]


def test_training_that_ended_early_is_warned_of_once():
    assert end_warnings([lt.LRSchedule(lt.Linear()), StopAfter(1)]) == [
        "LRSchedule: the schedule is for 12 optimizer steps, and training ended after 6: it had come to a factor of 0.5"
        " instead of 0. A callback had asked to stop."
    ]


def test_training_that_ended_late_is_warned_of_once():
    assert end_warnings([lt.LRSchedule(lt.Linear(end=0.25), total_steps=5)]) == [
        "LRSchedule: the schedule is for 5 optimizer steps, and training ended after 12: it stood at 0.25 for the last"
        " 7 of them. Give total_steps= if this was to be the whole run."
    ]


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (lt.LRSchedule(lt.Linear()), {}),
        (lt.LRSchedule(lt.Constant(0.5), total_steps=100), {}),  # it makes no difference
        (lt.LRSchedule(lt.Linear(), total_steps=202), {"train": loader(400, 2, seed=1), "max_epochs": 1}),  # within 1 %
        (lt.LRSchedule(lt.Linear(), total_steps=199), {"train": loader(400, 2, seed=1), "max_epochs": 1}),
        (lt.LRSchedule(lt.Linear(), total_steps=100), {"fast_dev_run": True}),
        (lt.LRSchedule(lt.Linear(), total_steps=100), {"max_epochs": 0}),
        (lt.LRSchedule(lt.Linear(), total_steps=100), {"limit_train_batches": 0}),
    ],
)
def test_end_that_is_no_surprise_is_not_warned_of(schedule, options):
    assert end_warnings([schedule], **options) == []


@pytest.mark.parametrize("place", ["train", "validation"])
def test_training_that_failed_is_not_warned_of(place):
    with pytest.raises(RuntimeError, match="failed in"):
        fit([lt.LRSchedule(lt.Linear())], Net(fail_at=(place, 6)))


@pytest.mark.parametrize("options", [{"max_epochs": 2}, {"max_epochs": 1, "total_steps": 4}])
def test_end_is_not_warned_of_where_the_rest_of_the_schedule_is_flat(options):
    """A warmup to a constant rate that was over: another length would have made no difference."""
    schedule = lt.LRSchedule(lt.Warmup(3, lt.Constant()), total_steps=options.pop("total_steps", None))
    assert end_warnings([schedule, StopAfter(1)], **options) == []


# ------------------------------------------------------------------------------------ schedules that are looked through


def bad(value):
    return lambda step, total_steps: value if step == 7 else 1.0


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (math.nan, ValueError, "finite and at least 0 at step 7, got nan"),
        (math.inf, ValueError, "finite and at least 0 at step 7, got inf"),
        (-0.5, ValueError, "finite and at least 0 at step 7, got -0.5"),
        (None, TypeError, "a function with a number at step 7, got None"),
        ("1.0e", TypeError, "a function with a number at step 7, got '1.0e'"),
        ([1.0], TypeError, r"a function with a number at step 7, got \[1.0\]"),
    ],
)
def test_bad_factor_is_refused_before_the_first_step(value, error, message):
    module = Net()
    with pytest.raises(error, match=f"LRSchedule: schedule must be {message}"):
        fit([lt.LRSchedule(bad(value))], module)
    assert module.losses == []
    with pytest.raises(error, match=f"LRSchedule: schedule must be {message}"):
        lt.LRSchedule(bad(value)).preview(10)


def double(step, total_steps):
    return torch.tensor(2.0)


@pytest.mark.parametrize("schedule", [double, partial(pow, 2, mod=None), lambda step, total_steps: 2])
def test_function_is_a_schedule(schedule):
    if isinstance(schedule, partial):
        schedule = partial(lambda factor, step, total_steps: factor, 2)
    rates, logger = Rates(), MemoryLogger()
    fit([lt.LRSchedule(schedule), rates], logger=logger)
    assert rates.first == [0.1] * 12
    assert isinstance(logger.hparams["tricks"]["LRSchedule"]["schedule"], str)


# ----------------------------------------------------------------------------------------------------- scale_with_batch


@pytest.mark.parametrize(("mode", "scale"), [("linear", 3.0), ("sqrt", math.sqrt(3.0))])
def test_rates_are_scaled_by_the_global_batch(mode, scale, told):
    rates, logger = Rates(), MemoryLogger()
    callback = lt.LRSchedule(lt.Linear(), scale_with_batch=mode, base_batch_size=4)
    fit([callback, rates], Groups(), accumulate_grad_batches=3, logger=logger)
    for batch, (groups,) in enumerate(rates.rates):
        step = batch // 3
        assert groups == pytest.approx([0.1 * scale * (1 - step / 4), 0.01 * scale * (1 - step / 4)])
    assert told()[0] == (
        "LRSchedule: a global batch of 12 = 4 x 3 x 1 (loader x accumulation x ranks) scales the rates by"
        f" {scale:.4g} ({mode} from 4)."
    )
    settings = {"schedule": "Linear(start=1, end=0)", "total_steps": 4, "global_batch_size": 12, "batch_scale": scale}
    assert logger.hparams["tricks"]["LRSchedule"] == settings


def test_two_ranks_count_in_the_global_batch(tmp_path):
    class SaveRates(Rates):
        def on_train_end(self, trainer, pl_module):
            torch.save((self.first, trainer.logger.hparams), tmp_path / f"{trainer.global_rank}.pt")

    callback = lt.LRSchedule(lt.Linear(), scale_with_batch="linear", base_batch_size=4)
    options = {"strategy": "ddp_fork", "devices": 2, "accumulate_grad_batches": 3, "logger": MemoryLogger()}
    fit([callback, SaveRates()], **options)
    for rank in (0, 1):
        rates, hparams = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert rates == pytest.approx([0.05 * 6 * factor for factor in (1, 1, 1, 0.5, 0.5, 0.5)])
        if rank == 0:
            assert hparams["tricks"]["LRSchedule"]["global_batch_size"] == 24


def test_batch_size_of_a_batch_sampler_is_found():
    sampler = BatchSampler(SequentialSampler(loader().dataset), batch_size=4, drop_last=False)
    rates = Rates()
    callback = lt.LRSchedule(lt.Constant(), scale_with_batch="linear", base_batch_size=2)
    fit([callback, rates], train=DataLoader(loader().dataset, batch_sampler=sampler))
    assert rates.first == [0.1] * 12


@pytest.mark.parametrize(
    ("train", "got"),
    [
        (Batches(loader()), "Batches"),
        (DataLoader(list(loader()), batch_size=None), "DataLoader"),
        ({"a": loader(), "b": loader()}, "dict"),
        ([loader(), loader()], "list"),
    ],
)
def test_loader_without_one_batch_size_is_refused(train, got):
    class Any(Net):
        def training_step(self, batch, batch_idx):
            raise AssertionError("never reached")

    wanted = f"scale_with_batch must be None where the loader has no batch_size, got '{got}'. Leave it out and scale"
    with pytest.raises(ValueError, match=wanted):
        fit([lt.LRSchedule(lt.Linear(), scale_with_batch="linear")], Any(), train=train)


def test_scale_of_an_accumulation_that_changes_is_refused():
    callback = lt.LRSchedule(lt.Linear(), total_steps=9, scale_with_batch="linear")
    with pytest.raises(ValueError, match="scale_with_batch must be None where the accumulation changes"):
        fit([callback, GradientAccumulationScheduler({0: 1, 1: 2})])


@pytest.mark.parametrize("arguments", [{"scale_with_batch": "quadratic"}, {"base_batch_size": 0}, {"optimizer": -1}])
def test_argument_out_of_range_is_refused(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"LRSchedule: {name} must be"):
        lt.LRSchedule(lt.Linear(), **arguments)


@pytest.mark.parametrize("name", ["on_new_horizon", "on_mismatch"])
def test_choice_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=f"LRSchedule: {name} must be one of .*, got 'ignore'"):
        lt.LRSchedule(lt.Linear(), **{name: "ignore"})


def test_resume_with_another_batch_scales_anew_and_says_so(tmp_path, told):
    def scaled():
        return lt.LRSchedule(lt.Linear(), scale_with_batch="linear", base_batch_size=4)

    fit([scaled(), every_epoch(tmp_path)], max_epochs=2)
    rates = Rates()
    options = {"ckpt_path": tmp_path / "epoch=0.ckpt", "max_epochs": 2, "accumulate_grad_batches": 2}
    fit([scaled(), rates, every_epoch(tmp_path / "rest")], **options)
    # Six steps of one batch are done, three of two batches are left.
    assert rates.first == pytest.approx([0.1 * (1 - k / 9) for k in (6, 6, 7, 7, 8, 8)])
    assert "LRSchedule: the batch had scaled the rates by 1, now by 2." in told()


# --------------------------------------------------------------------------------------------- one optimizer of several


def each(first, second):
    return [lt.LRSchedule(first, optimizer=0), lt.LRSchedule(second, total_steps=6, optimizer=1)]


def rates_of_each(first, second):
    """Loops of their own: the second optimizer steps every other batch."""
    return [(0.1 * first(k, 12), 0.01 * second(k // 2, 6)) for k in range(12)]


def test_each_optimizer_can_have_a_schedule_of_its_own():
    rates, logger = Rates(), MemoryLogger()
    fit([*each(lt.Linear(), lt.Cosine(0.1)), rates], TwoOptimizers(), logger=logger)
    seen = [(first[0], second[0]) for first, second in rates.rates]
    assert seen == rates_of_each(lt.Linear(), lt.Cosine(0.1))
    first, second = logger.hparams["tricks"].values()
    assert first == {"schedule": "Linear(start=1, end=0)", "total_steps": 12, "optimizer": 0}
    assert second == {"schedule": "Cosine(end=0.1)", "total_steps": 6, "optimizer": 1}


@pytest.mark.parametrize("swapped", [False, True])
def test_two_schedules_resume_whatever_their_order(swapped, tmp_path):
    fit([*each(lt.Linear(), lt.Cosine(0.1)), every_epoch(tmp_path)], TwoOptimizers())
    rates, both = Rates(), each(lt.Linear(), lt.Cosine(0.1))
    callbacks = [*(both[::-1] if swapped else both), rates, every_epoch(tmp_path / "rest")]
    fit(callbacks, TwoOptimizers(), ckpt_path=tmp_path / "epoch=0.ckpt")
    seen = [(first[0], second[0]) for first, second in rates.rates]
    assert seen == rates_of_each(lt.Linear(), lt.Cosine(0.1))[6:]


def test_optimizer_that_is_not_chosen_keeps_its_rate():
    rates = Rates()
    fit([lt.LRSchedule(lt.Linear(), total_steps=6, optimizer=1), rates], TwoOptimizers())
    assert [first[0] for first, _ in rates.rates] == [0.1] * 12
    assert [second[0] for _, second in rates.rates] == [0.01 * (1 - k // 2 / 6) for k in range(12)]


@pytest.mark.parametrize("others", [None, 0])
def test_two_schedules_of_one_optimizer_are_refused(others):
    callbacks = [lt.LRSchedule(lt.Linear(), optimizer=0), lt.LRSchedule(lt.Linear(), optimizer=others)]
    with pytest.raises(
        ValueError, match=r"LRSchedule: callbacks must be the only one of its kind in a Trainer, got \["
    ):
        fit(callbacks, TwoOptimizers())


def test_index_without_an_optimizer_is_refused():
    fix = r"configure_optimizers returned \['SGD', 'Adam'\]"
    with pytest.raises(ValueError, match=f"LRSchedule: optimizer must be an index below 2, got 2. {fix}"):
        fit([lt.LRSchedule(lt.Linear(), optimizer=2)], TwoOptimizers())


@ends_elsewhere
def test_schedule_of_one_optimizer_never_takes_up_the_steps_of_another(tmp_path):
    """The checkpoint has the second optimizer's schedule alone; the resumed run has one for each."""
    fit([lt.LRSchedule(lt.Linear(), optimizer=1), every_epoch(tmp_path)], TwoOptimizers())
    trainer, _ = fit(
        [*(lt.LRSchedule(lt.Linear(), optimizer=index) for index in (0, 1)), every_epoch(tmp_path / "rest")],
        TwoOptimizers(),
        ckpt_path=tmp_path / "epoch=0.ckpt",
    )
    assert trainer.lr_scheduler_configs[1].scheduler.last_epoch == 6  # three of three in each epoch


# ----------------------------------------------------------------------------------- schedulers that the module returns


class Scheduled(Net):
    """A module with a scheduler of its own."""

    def __init__(self, make, **options):
        super().__init__(**options)
        self.make = make

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = {"scheduler": self.make(optimizer), "interval": "step", "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def changed_by_its_constructor(optimizer):
    scheduler = torch_schedulers.LinearLR(optimizer, 0.1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    return scheduler


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch_schedulers.StepLR(optimizer, 3),
        changed_by_its_constructor,
        lambda optimizer: torch_schedulers.LambdaLR(optimizer, lambda step: 0.1),
        lambda optimizer: torch_schedulers.MultiplicativeLR(optimizer, lambda step: 0.1),
        lambda optimizer: torch_schedulers.ReduceLROnPlateau(optimizer),
        lambda optimizer: torch_schedulers.ChainedScheduler([torch_schedulers.ConstantLR(optimizer, 0.1)]),
        lambda optimizer: torch_schedulers.SequentialLR(
            optimizer, [torch_schedulers.LinearLR(optimizer, 0.1), torch_schedulers.StepLR(optimizer, 3)], [4]
        ),
    ],
    ids=["StepLR", "LinearLR", "LambdaLR", "MultiplicativeLR", "ReduceLROnPlateau", "ChainedScheduler", "SequentialLR"],
)
def test_scheduler_of_the_module_is_replaced_if_that_is_asked_for(make, told):
    rates = Rates()
    trainer, _ = fit([lt.LRSchedule(lt.Linear(), replace=True), rates], Scheduled(make))
    assert rates.first == pytest.approx([0.05 * (1 - k / 12) for k in range(12)], abs=1e-15)
    assert len(trainer.lr_scheduler_configs) == 1
    assert told()[0].startswith("LRSchedule: it replaces ")
    assert told()[0].endswith("), which the module returned.")


def test_replaced_scheduler_is_replaced_in_a_resumed_run_too(tmp_path):
    def run(rates, folder, **options):
        module = Scheduled(changed_by_its_constructor)
        fit([lt.LRSchedule(lt.Linear(), replace=True), rates, every_epoch(folder)], module, **options)

    whole, rest = Rates(), Rates()
    run(whole, tmp_path / "whole")
    run(rest, tmp_path / "rest", ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    assert rest.rates == whole.rates[6:]


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch_schedulers.OneCycleLR(optimizer, 0.05, total_steps=12),
        lambda optimizer: torch_schedulers.CyclicLR(optimizer, 0.001, 0.05),
    ],
    ids=["OneCycleLR", "CyclicLR"],
)
def test_replacing_a_scheduler_that_has_lost_the_base_is_refused(make):
    with pytest.raises(
        ValueError, match="LRSchedule: replace must be beside schedulers that keep the optimizer.s own rate, got"
    ):
        fit([lt.LRSchedule(lt.Linear(), replace=True)], Scheduled(make))


class ScheduledByHand(TwoOptimizers):
    """Manual optimization whose schedulers are stepped by hand: the first in every batch, the second never."""

    def configure_optimizers(self):
        first, second = super().configure_optimizers()
        return [first, second], [torch_schedulers.StepLR(optimizer, 3) for optimizer in (first, second)]

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.lr_schedulers()[0].step()


def test_scheduler_of_another_optimizer_stays_and_is_stepped_by_the_module():
    rates = Rates()
    callback = lt.LRSchedule(lt.Linear(), total_steps=6, optimizer=1, replace=True)
    fit([callback, rates], ScheduledByHand())
    assert [first[0] for first, _ in rates.rates] == pytest.approx([0.1 * 0.1 ** (k // 3) for k in range(12)])
    assert [second[0] for _, second in rates.rates] == [0.01 * (1 - k // 2 / 6) for k in range(12)]


def test_replaced_scheduler_keeps_its_place_among_those_of_the_module():
    """A module that steps by hand finds its schedulers by position."""
    rates = Rates()
    fit([lt.LRSchedule(lt.Linear(), optimizer=0, replace=True), rates], ScheduledByHand())
    assert [first[0] for first, _ in rates.rates] == [0.1 * (1 - k / 12) for k in range(12)]
    assert [second[0] for _, second in rates.rates] == [0.01] * 12  # the module never steps its scheduler


@pytest.mark.parametrize("argument", [(), (3,)])
def test_step_that_a_module_asks_for_by_hand_does_not_count_twice(argument):
    class Stepped(ByHand):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch_schedulers.StepLR(optimizer, 3)]

        def training_step(self, batch, batch_idx):
            images, labels = batch
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(images), labels))
            optimizer.step()
            self.lr_schedulers().step(*argument)

    rates = Rates()
    fit([lt.LRSchedule(lt.Linear(), replace=True), rates], Stepped())
    assert rates.first == [0.05 * (1 - k / 12) for k in range(12)]


# ---------------------------------------------------------------------------- a run that is gone on with in another way


def resumed_rates(tmp_path, schedule, first=None, callbacks=(), **options):
    """Rates of a run that is gone on with from its first epoch's end."""
    first = {"max_epochs": 2} if first is None else first
    fit([schedule(), every_epoch(tmp_path / "first")], **first)
    rates = Rates()
    callbacks = [schedule(), rates, *callbacks, every_epoch(tmp_path / "rest")]
    fit(callbacks, ckpt_path=tmp_path / "first" / "epoch=0.ckpt", **options)
    return rates.first


@ends_elsewhere
@pytest.mark.parametrize("way", ["stretch", "keep"])
def test_run_that_becomes_longer_is_stretched_or_keeps_its_length(way, tmp_path, told):
    shape = lt.Warmup("1ep", lt.Cosine(0.1))
    rates = resumed_rates(tmp_path, lambda: lt.LRSchedule(shape, on_new_horizon=way), max_epochs=4)
    total = 24 if way == "stretch" else 12
    assert rates == [0.05 * lt.Warmup(6, lt.Cosine(0.1))(k, total) for k in range(6, 24)]
    what = "is stretched" if way == "stretch" else "keeps its length"
    assert (
        "LRSchedule: the run had 12 optimizer steps (6 an epoch), now it has 24 (6); the schedule"
        f" {what} and goes on at step 6 (on_new_horizon='{way}')."
    ) in told()


@ends_elsewhere
@pytest.mark.parametrize("way", ["stretch", "keep"])
def test_run_whose_epochs_become_shorter_is_stretched_or_keeps_its_length(way, tmp_path):
    """Six steps are done; the three epochs that are left have three steps each."""
    rates = resumed_rates(
        tmp_path,
        lambda: lt.LRSchedule(lt.Warmup("2ep", lt.Linear()), on_new_horizon=way),
        {"max_epochs": 4},
        max_epochs=4,
        limit_train_batches=3,
    )
    warmup, total = (6, 15) if way == "stretch" else (12, 24)
    assert rates == [0.05 * lt.Warmup(warmup, lt.Linear())(k, total) for k in range(6, 15)]


def test_run_that_keeps_its_length_keeps_the_length_of_its_epochs_too(tmp_path):
    """`max_steps` is the same, the epochs are not: durations in epochs stay what they were."""
    options = {"max_epochs": -1, "max_steps": 24}
    rates = resumed_rates(
        tmp_path,
        lambda: lt.LRSchedule(lt.Warmup("2ep", lt.Linear()), on_new_horizon="keep"),
        options,
        limit_train_batches=3,
        **options,
    )
    assert rates[:18] == [0.05 * lt.Warmup(12, lt.Linear())(k, 24) for k in range(6, 24)]


@ends_elsewhere
def test_length_that_was_kept_once_is_kept_again(tmp_path):
    def schedule():
        return lt.LRSchedule(lt.Linear(), on_new_horizon="keep")

    fit([schedule(), every_epoch(tmp_path / "1")], max_epochs=3)
    fit([schedule(), every_epoch(tmp_path / "2")], max_epochs=4, ckpt_path=tmp_path / "1" / "epoch=0.ckpt")
    rates = Rates()
    callbacks = [schedule(), rates, every_epoch(tmp_path / "3")]
    fit(callbacks, max_epochs=5, ckpt_path=tmp_path / "2" / "epoch=1.ckpt")
    assert rates.first == [0.05 * lt.Linear()(k, 18) for k in range(12, 30)]


def test_second_fit_for_longer_is_stretched():
    callback, rates = lt.LRSchedule(lt.Linear()), Rates()
    trainer, module = fit([callback, rates])
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader(), loader(8))
    assert rates.first[12:] == [0.05 * (1 - k / 24) for k in range(12, 24)]


def test_checkpoint_of_another_schedule_is_refused_and_both_are_shown(tmp_path):
    fit([lt.LRSchedule(lt.Warmup("1ep", lt.Linear())), every_epoch(tmp_path)])
    module = Net()
    old = r"Warmup\(duration='1ep', then=Linear\(start=1, end=0\), start=0, shape='linear'\)"
    with pytest.raises(ValueError, match=rf"{old}.*\. This run has Cosine\(end=0\)\. .* on_mismatch='use_new'"):
        fit([lt.LRSchedule(lt.Cosine()), every_epoch(tmp_path)], module, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert module.losses == []


def test_checkpoint_of_another_schedule_is_gone_on_with_if_that_is_asked_for(tmp_path, told):
    fit([lt.LRSchedule(lt.WarmupCosine(3)), every_epoch(tmp_path)])
    rates = Rates()
    callbacks = [lt.LRSchedule(lt.Linear(), on_mismatch="use_new"), rates, every_epoch(tmp_path / "rest")]
    fit(callbacks, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert rates.first == [0.05 * (1 - k / 12) for k in range(6, 12)]
    assert (
        "LRSchedule: the checkpoint was trained under WarmupCosine(warmup=3, end=0); from here on it is"
        " Linear(start=1, end=0)."
    ) in told()


def test_checkpoint_of_a_scheduler_of_torch_is_gone_on_with_from_the_true_base(tmp_path, told):
    make = partial(torch_schedulers.StepLR, step_size=3)
    fit([every_epoch(tmp_path)], Scheduled(make))
    rates = Rates()
    callbacks = [lt.LRSchedule(lt.Linear(), on_mismatch="use_new"), rates, every_epoch(tmp_path / "rest")]
    fit(callbacks, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert rates.first == pytest.approx([0.05 * (1 - k / 12) for k in range(6, 12)])
    assert any("the checkpoint was trained under a scheduler of torch with" in line for line in told())


@pytest.mark.parametrize("way", ["refuse", "use_new"])
def test_checkpoint_without_any_scheduler_is_gone_on_with(way, tmp_path, told):
    fit([every_epoch(tmp_path)])
    rates = Rates()
    callbacks = [lt.LRSchedule(lt.Linear(), on_mismatch=way), rates, every_epoch(tmp_path / "rest")]
    fit(callbacks, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert rates.first == [0.05 * (1 - k / 12) for k in range(6, 12)]
    assert told()[0] == "LRSchedule: the run so far was trained without it; the schedule goes on at step 6."


def test_equal_schedules_written_otherwise_are_the_same(tmp_path):
    fit([lt.LRSchedule(lt.Join([lt.Constant(), lt.Linear()], [3])), every_epoch(tmp_path)])
    again = lt.LRSchedule(lt.Join((lt.Constant(1.0), lt.Linear(1, 0)), (3,)))
    trainer, _ = fit([again, every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "epoch=0.ckpt")
    assert trainer.lr_scheduler_configs[0].scheduler.clock.restored


def test_run_that_was_saved_after_it_had_ended_goes_on(tmp_path):
    trainer, _ = fit([lt.LRSchedule(lt.Linear(), on_new_horizon="stretch")])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    rates = Rates()
    fit([lt.LRSchedule(lt.Linear()), rates], ckpt_path=tmp_path / "last.ckpt", max_epochs=4)
    assert rates.first == [0.05 * (1 - k / 24) for k in range(12, 24)]


# ------------------------------------------------------------------------------------------------ preview, bar, loggers


def test_preview_before_in_and_after_a_run():
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(callback.preview())

    callback = lt.LRSchedule(lt.WarmupCosine(3))
    expected = [lt.WarmupCosine(3)(k, 12) for k in range(13)]
    assert callback.preview(12) == expected
    fit([callback, Look()])
    assert seen == [expected] * 12
    assert callback.preview() == expected
    assert callback.preview(4) == [lt.WarmupCosine(3)(k, 4) for k in range(5)]
    assert lt.LRSchedule(lt.WarmupCosine(3), total_steps=12).preview() == expected


def test_preview_is_the_rates_of_the_run():
    callback, rates = lt.LRSchedule(lt.OneCycle("1ep")), Rates()
    fit([callback, rates])
    assert rates.first == [0.05 * factor for factor in callback.preview(12, steps_per_epoch=6)[:-1]]


@pytest.mark.parametrize("total_steps", [None, 0])
def test_preview_asks_for_a_length(total_steps):
    with pytest.raises(
        (TypeError, ValueError), match=r"LRSchedule.preview: total_steps must be .* preview\(total_steps"
    ):
        lt.LRSchedule(lt.Linear()).preview(total_steps)


def test_preview_asks_for_the_length_of_an_epoch():
    with pytest.raises(ValueError, match="Warmup: duration must be in steps .* got '1ep'"):
        lt.LRSchedule(lt.Warmup("1ep", lt.Linear())).preview(12)


def test_preview_after_a_fast_dev_run_has_the_length_that_was_given():
    callback = lt.LRSchedule(lt.Linear(), total_steps=2)
    fit([callback], fast_dev_run=True)
    assert callback.preview() == [1.0, 0.5, 0.0]


def test_progress_bar_has_the_rate_and_loggers_have_it_once():
    logger = MemoryLogger()
    trainer, _ = fit([lt.LRSchedule(lt.Linear(), prog_bar=True)], logger=logger)
    assert trainer.progress_bar_metrics["lr-SGD"] == pytest.approx(0.05 / 12)  # at the start of the last batch
    assert len(logger.series("lr-SGD")) == 12


@ends_elsewhere
def test_progress_bar_tells_optimizers_apart():
    schedules = [lt.LRSchedule(lt.Linear(), optimizer=index, prog_bar=True) for index in (1, 0)]
    trainer, _ = fit(schedules, TwoOptimizers())
    assert trainer.progress_bar_metrics["lr-SGD"] == pytest.approx(0.1 / 12)
    assert trainer.progress_bar_metrics["lr-Adam"] == pytest.approx(0.01 * 7 / 12)


def rows_with(logger, key):
    return [(step, row[key]) for step, row in logger.rows if key in row]


@pytest.mark.parametrize("monitors", [[], [LearningRateMonitor()], [LearningRateMonitor("step")]])
def test_every_logger_gets_the_rates_exactly_once(monitors):
    first, second = MemoryLogger(), MemoryLogger()
    fit([lt.LRSchedule(lt.Linear()), *monitors], logger=[first, second])
    for logger in (first, second):
        assert rows_with(logger, "lr-SGD") == [(k, 0.05 * (1 - k / 12)) for k in range(12)]


def test_rates_are_logged_on_the_steps_that_lightning_logs():
    logger = MemoryLogger()
    fit([lt.LRSchedule(lt.Linear())], Groups(), logger=logger, log_every_n_steps=5)
    for key, base in (("lr-SGD/pg1", 0.1), ("lr-SGD/pg2", 0.01)):
        assert rows_with(logger, key) == [(k, pytest.approx(base * (1 - k / 12))) for k in (4, 9)]


@ends_elsewhere
def test_two_schedules_log_the_rates_of_each_optimizer_once():
    logger = MemoryLogger()
    fit([lt.LRSchedule(lt.Linear(), optimizer=index) for index in (0, 1)], TwoOptimizers(), logger=logger)
    assert rows_with(logger, "lr-SGD") == [(k, 0.1 * (1 - k / 12)) for k in sorted(logger.series("lr-SGD"))]


def test_rate_that_is_a_tensor_is_logged_as_a_number():
    class TensorRate(Net):
        def configure_optimizers(self):
            return torch.optim.Adam(self.head.parameters(), lr=torch.tensor(0.1), foreach=False)

    logger = MemoryLogger()
    fit([lt.LRSchedule(lt.Linear())], TensorRate(), logger=logger)
    assert [float(rate) for _, rate in rows_with(logger, "lr-Adam")] == pytest.approx(
        [0.1 * (1 - k / 12) for k in range(12)]
    )


# -------------------------------------------------------------------------------------------------------------- corners


def test_line_search_counts_one_step_however_often_it_evaluates():
    class LineSearch(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad], lr=0.1, max_iter=3)

    rates = Rates()
    fit([lt.LRSchedule(lt.Linear()), rates], LineSearch())
    assert rates.first == [0.1 * (1 - k / 12) for k in range(12)]


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 2},
        {"gradient_clip_val": 0.1},
        {"reload_dataloaders_every_n_epochs": 1},
        {"max_time": "00:01:00:00"},
        {"check_val_every_n_epoch": 2},
        {"precision": "bf16-mixed"},
        {"limit_val_batches": 0},
    ],
)
def test_rates_are_the_same_under_other_options(options):
    rates = Rates()
    fit([lt.LRSchedule(lt.Linear(), prog_bar=True), rates], **options)
    assert rates.first == [0.05 * (1 - k / 12) for k in range(12)]


def test_training_by_time_alone_asks_for_total_steps():
    with pytest.raises(ValueError, match=NAMES_TOTAL_STEPS.format("endless training")):
        fit([lt.LRSchedule(lt.Linear())], max_epochs=None, max_time="00:01:00:00")


def test_unsized_loader_with_max_steps_resumes(tmp_path):
    options = {"max_epochs": -1, "max_steps": 18}
    whole, rest = Rates(), Rates()
    fit([lt.LRSchedule(lt.Linear()), whole, every_epoch(tmp_path)], train=DataLoader(Unsized(), 4), **options)
    callbacks = [lt.LRSchedule(lt.Linear()), rest, every_epoch(tmp_path / "rest")]
    fit(callbacks, train=DataLoader(Unsized(), 4), ckpt_path=tmp_path / "epoch=1.ckpt", **options)
    assert whole.first == [0.05 * (1 - k / 18) for k in range(18)]
    assert rest.first == whole.first[12:]


@pytest.mark.filterwarnings("ignore:.*barebones")
def test_barebones_trainer_trains_with_it():
    trainer = L.Trainer(
        barebones=True, max_epochs=1, accelerator="cpu", callbacks=[lt.LRSchedule(lt.Linear(), prog_bar=True)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of log() and of the loop that it leaves out
        trainer.fit(Net(), loader())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


def test_stages_around_a_fit_change_nothing():
    rates = Rates()
    trainer, module = make_trainer([lt.LRSchedule(lt.Linear()), rates]), Net()
    for stage in (trainer.validate, trainer.test):
        stage(module, loader(8), verbose=False)
    trainer.fit(module, loader(), loader(8))
    for stage in (trainer.validate, trainer.test):
        stage(module, loader(8), verbose=False)
    assert rates.first == [0.05 * (1 - k / 12) for k in range(12)]


def test_subclass_is_a_schedule_and_still_the_only_one():
    class Ours(lt.LRSchedule):
        def __init__(self, warmup):
            super().__init__(lt.WarmupCosine(warmup))

    rates, logger = Rates(), MemoryLogger()
    fit([Ours(3), rates], logger=logger)
    assert rates.first == [0.05 * lt.WarmupCosine(3)(k, 12) for k in range(12)]
    assert list(logger.hparams["tricks"]) == ["Ours"]
    with pytest.raises(ValueError, match="LRSchedule: callbacks must be the only one of its kind"):
        fit([Ours(3), lt.LRSchedule(lt.Linear())])


def test_copy_from_the_middle_of_a_run_starts_anew():
    copies = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            copies.extend([copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))])

    callback = lt.LRSchedule(lt.Linear())
    fit([callback, Copy()], max_epochs=1)
    for twin in (copies[6], copies[7], callback):
        rates = Rates()
        fit([twin, rates])
        assert rates.first == [0.05 * (1 - k / 12) for k in range(12)]


def test_search_for_a_rate_is_not_disturbed():
    """Lightning's finder owns the rate while it searches; the schedule has it afterwards."""

    def search(callbacks):
        trainer, module = make_trainer([*callbacks, rates], max_epochs=2), Net()
        tuner = Tuner(trainer)
        found = tuner.lr_find(module, loader(), loader(8), num_training=5, early_stop_threshold=None, update_attr=False)
        rates.rates.clear()
        trainer.fit(module, loader(), loader(8))
        return found.results

    rates = Rates()
    expected = search([])
    assert search([lt.LRSchedule(lt.Warmup(3, lt.Linear()))]) == expected
    assert rates.first == [0.05 * lt.Warmup(3, lt.Linear())(k, 12) for k in range(12)]


# ------------------------------------------------------------------------------- what a stranger's first hour has found


class Breaks(Net):
    """Fails before its optimizers are made."""

    def configure_optimizers(self):
        raise RuntimeError("no optimizers")


def test_checkpoint_that_was_never_gone_on_with_is_forgotten(tmp_path):
    fit([lt.LRSchedule(lt.Linear()), every_epoch(tmp_path)])
    callback, rates = lt.LRSchedule(lt.Linear()), Rates()
    with pytest.raises(RuntimeError, match="no optimizers"):
        fit([callback, every_epoch(tmp_path / "1")], Breaks(), ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=3)
    fit([callback, rates])
    assert rates.first == [0.05 * (1 - k / 12) for k in range(12)]
    other, rates = lt.LRSchedule(lt.Cosine()), Rates()
    with pytest.raises(ValueError, match="under the same schedule"):
        fit([other, every_epoch(tmp_path / "2")], ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=3)
    fit([other, rates])
    assert rates.first[0] == 0.05


@pytest.mark.parametrize("order", [1, -1])
def test_group_that_lightnings_finetuning_adds_is_scheduled_from_its_first_step(order, tmp_path):
    """It has the rate that it is given as its base; a run that is stopped and resumed has the same rates."""

    def callbacks(folder):
        rates = Rates()
        return [*[lt.LRSchedule(lt.Linear()), Finetune()][::order], rates, every_epoch(tmp_path / folder)], rates

    given, rates = callbacks("whole")
    _, whole = fit(given, HeadFirst(), max_epochs=3)
    for k, (row,) in enumerate(rates.rates):
        assert row == pytest.approx([base * (1 - k / 18) for base in ([0.05] if k < 6 else [0.05, 0.4])])

    given, again = callbacks("again")
    _, resumed = fit(given, HeadFirst(), max_epochs=3, ckpt_path=tmp_path / "whole" / "epoch=1.ckpt")
    assert again.rates == rates.rates[12:]
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start"])
def test_group_is_scheduled_from_its_first_step_whatever_adds_it(hook, order, told):
    class Add(Callback):
        def add(self, trainer, *args):
            if trainer.global_step == 6 and len(trainer.optimizers[0].param_groups) == 1:
                parameters = trainer.lightning_module.body.parameters()
                trainer.optimizers[0].add_param_group({"params": parameters, "lr": 0.4, "weight_decay": 0.1})

    class Seen(Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.optimizers[0].register_step_post_hook(self.see)  # before the schedule's own

        def see(self, optimizer, *args):
            seen.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])

    class Module(HeadFirst):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.05, weight_decay=0.2)

    setattr(Add, hook, Add.add)
    seen = []
    fit(
        [Seen(), *[lt.LRSchedule(lt.Linear()), lt.ParamSchedule("weight_decay", lt.Linear()), Add()][::order]], Module()
    )
    bases = [[(0.05, 0.2)]] * 6 + [[(0.05, 0.2), (0.4, 0.1)]] * 6
    for k, (groups, expected) in enumerate(zip(seen, bases, strict=True)):
        factor = 1 - k / 12
        assert groups == [pytest.approx((lr * factor, decay * factor)) for lr, decay in expected]
    assert "LRSchedule: a group was added; what it had, 0.4, is its base, now times 0.5." in told()


def test_group_that_is_added_with_a_rate_of_0_is_told_of():
    """As unfreeze_and_add_param_group does in a warmup that begins at 0, if it is not given a rate."""

    class Unfreezes(Finetune):
        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 0:
                self.unfreeze_and_add_param_group(pl_module.body, optimizer)

    with pytest.warns(UserWarning, match="LRSchedule: a group was added with a value of 0, which is its base"):
        fit([lt.LRSchedule(lt.WarmupCosine(0.25)), Unfreezes()], HeadFirst())


class HeadFirst(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.05)


class Finetune(BaseFinetuning):
    """Trains the head, and the body from the second epoch on."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=0.4)
        elif epoch > 1:  # a resumed run has frozen it again
            self.make_trainable(pl_module.body)


def test_function_in_a_schedule_is_asked_for_its_own_steps_only():
    asked = []

    def table(step, total_steps):
        asked.append(step)
        return [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0][int(step)]

    rates = Rates()
    fit([lt.LRSchedule(lt.Warmup(2, table)), rates])
    assert rates.first == pytest.approx([0, 0.025, *(0.05 * (1 - k / 10) for k in range(10))])
    assert max(asked) == 10
    assert asked[-10:] == list(range(1, 11))  # one by one, when its turn comes


@pytest.mark.parametrize("fail_at", [9, 3, 6])
def test_fit_that_was_broken_off_and_called_again_ends_at_the_end(fail_at, told):
    """Lightning begins the broken epoch again, so that the run becomes longer."""
    module, rates = Net(fail_at=("train", fail_at)), Rates()
    callback = lt.LRSchedule(lt.Linear())
    trainer = make_trainer([callback, rates], max_epochs=3)
    with pytest.raises(RuntimeError, match="failed in training"):
        trainer.fit(module, loader(), loader(8))
    module.fail_at = None
    trainer.fit(module, loader(), loader(8))
    again = fail_at + 18 - fail_at // 6 * 6
    assert trainer.global_step == again
    assert rates.first[-1] == pytest.approx(0.05 / again)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


@ends_elsewhere
@pytest.mark.parametrize("middle", [{"on_new_horizon": "keep"}, {"total_steps": 50}])
def test_length_is_that_of_the_run_whatever_a_resumed_part_of_it_was_told(middle, tmp_path):
    """Two epochs of six, one of three, one of six: 21 steps."""
    fit([lt.LRSchedule(lt.Linear()), every_epoch(tmp_path / "1")], max_epochs=4)
    options = {"max_epochs": 4, "ckpt_path": tmp_path / "1" / "epoch=1.ckpt", "limit_train_batches": 3}
    fit([lt.LRSchedule(lt.Linear(), **middle), every_epoch(tmp_path / "2")], **options)
    options = {"max_epochs": 4, "ckpt_path": tmp_path / "2" / "epoch=2.ckpt"}
    trainer, _ = fit([lt.LRSchedule(lt.Linear()), every_epoch(tmp_path / "3")], **options)
    clock = trainer.lr_scheduler_configs[0].scheduler.clock
    assert (clock.total_steps, clock.step) == (21, 21)


class EveryThird(ByHand):
    """Accumulates by hand over three batches."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / 3)
        if batch_idx % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()


def test_steps_by_hand_that_were_assumed_wrongly_are_told_after_one_epoch():
    with pytest.warns(UserWarning, match="an epoch by hand") as caught:
        fit([lt.LRSchedule(lt.Linear())], EveryThird(), max_epochs=3)
    (text,) = [str(warning.message) for warning in caught if "LRSchedule" in str(warning.message)]
    assert text == (
        "LRSchedule: an epoch by hand has 2 optimizer steps, and the schedule assumes 6, one for each batch. Give"
        " total_steps=."
    )
    trainer, _ = fit([lt.LRSchedule(lt.Linear(), total_steps=6)], EveryThird(), max_epochs=3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


def test_base_rate_that_was_changed_in_the_code_is_told_to_be_the_checkpoints(tmp_path, told):
    class Faster(Net):
        def __init__(self):
            super().__init__(lr=0.5)

    fit([lt.LRSchedule(lt.Linear()), every_epoch(tmp_path)])
    rates = Rates()
    callbacks = [lt.LRSchedule(lt.Linear()), rates, every_epoch(tmp_path / "rest")]
    fit(callbacks, Faster(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert rates.first[0] == 0.025
    assert (
        "LRSchedule: the base values are the checkpoint's, [0.05], and not those of the code, [0.5]: torch restores the"
        " groups of an optimizer."
    ) in told()


def test_resume_in_mid_epoch_with_another_accumulation_ends_at_the_end(tmp_path):
    """Seven batches an epoch; four are done one by one, the windows of two then begin at the epoch's fourth batch."""

    def save(folder):
        return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)

    fit([lt.LRSchedule(lt.Linear()), save(tmp_path)], train=ResumableLoader(28))
    for stop in (4,):
        trainer, _ = fit(
            [lt.LRSchedule(lt.Linear()), save(tmp_path / "rest")],
            train=ResumableLoader(28),
            ckpt_path=tmp_path / f"step={stop}.ckpt",
            accumulate_grad_batches=2,
        )
        clock = trainer.lr_scheduler_configs[0].scheduler.clock
        assert clock.total_steps == clock.step == trainer.global_step


def test_function_that_fails_for_another_length_does_not_fail_a_run_that_is_done():
    def pole(step, total_steps):
        return 1 + step / (total_steps - 5)

    with pytest.warns(UserWarning, match="the schedule is for 12 optimizer steps, and training ended after 5"):
        fit([lt.LRSchedule(pole, total_steps=12)], limit_train_batches=5, max_epochs=1)


def test_partial_functions_are_known_by_their_arguments(tmp_path):
    def power(exponent, step, total_steps):
        return (1 - step / total_steps) ** exponent

    fit([lt.LRSchedule(partial(power, 2.0)), every_epoch(tmp_path)])
    with pytest.raises(ValueError, match=r"got 'partial\(.*power, 2\)'. This run has partial\(.*power, 3\)"):
        fit([lt.LRSchedule(partial(power, 3.0)), every_epoch(tmp_path / "1")], ckpt_path=tmp_path / "epoch=0.ckpt")


def test_function_of_the_step_alone_is_refused_when_built():
    with pytest.raises(TypeError, match=r"LRSchedule: schedule must be a function of \(step, total_steps\), got"):
        lt.LRSchedule(lambda step: 0.9**step)


def test_copy_of_a_callback_in_mid_run_has_its_step():
    copies = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            copies.append(copy.deepcopy(trainer.callbacks[0]).settings["total_steps"])

    fit([lt.LRSchedule(lt.Linear()), Copy()])
    assert copies == [12] * 12


def length_of(trainer):
    clock = trainer.lr_scheduler_configs[0].scheduler.clock
    return clock.total_steps, clock.step


def test_length_under_both_limits_is_the_same_after_a_resume(tmp_path):
    limits = {"max_epochs": 4, "max_steps": 1000}
    fit([lt.LRSchedule(lt.Linear()), every_epoch(tmp_path)], **limits)
    trainer, _ = fit(
        [lt.LRSchedule(lt.Linear()), every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "epoch=1.ckpt", **limits
    )
    # Lightning counts an epoch without batches after such a resume.
    total, done = length_of(trainer)
    assert total == done


def test_checkpoint_of_the_validation_at_an_epochs_end_has_its_last_window(tmp_path):
    def save(folder):
        return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=False)

    options = {"accumulate_grad_batches": 4, "max_epochs": 3}
    fit([lt.LRSchedule(lt.Linear()), save(tmp_path)], **options)
    callbacks = [lt.LRSchedule(lt.Linear()), save(tmp_path / "rest")]
    trainer, _ = fit(callbacks, ckpt_path=tmp_path / "epoch=0.ckpt", **options)
    assert length_of(trainer) == (6, 6)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_batch_that_failed_is_counted_once_it_is_done(tmp_path):
    with pytest.raises(RuntimeError, match="failed in training"):
        fit([lt.LRSchedule(lt.Linear()), OnExceptionCheckpoint(tmp_path)], Net(fail_at=("train", 8)), max_epochs=3)
    callbacks = [lt.LRSchedule(lt.Linear()), OnExceptionCheckpoint(tmp_path / "rest")]
    trainer, _ = fit(callbacks, ckpt_path=tmp_path / "on_exception.ckpt", max_epochs=3)
    assert length_of(trainer) == (18, 18)


def test_fit_by_hand_that_was_broken_off_and_called_again_ends_at_the_end():
    class Steps(ByHand):
        fail = True

        def training_step(self, batch, batch_idx):
            if self.fail and self.global_step == 8:
                raise RuntimeError("failed by hand")
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    module = Steps()
    trainer = make_trainer([lt.LRSchedule(lt.Linear())], max_epochs=3)
    with pytest.raises(RuntimeError, match="failed by hand"):
        trainer.fit(module, loader(), loader(8))
    module.fail = False
    trainer.fit(module, loader(), loader(8))
    assert length_of(trainer) == (20, 20)


def test_epoch_by_hand_that_ends_early_is_not_taken_for_a_wrong_length():
    class Steps(ByHand):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    trainer, _ = fit([lt.LRSchedule(lt.Linear())], Steps(), max_epochs=3, max_steps=4)  # a warning would be an error
    assert length_of(trainer) == (4, 4)


def test_optimizer_of_the_users_own_in_a_second_fit_is_no_checkpoint(told):
    class Own(Net):
        def __init__(self):
            super().__init__()
            self.mine = torch.optim.SGD(self.head.parameters(), lr=0.1)

        def configure_optimizers(self):
            return self.mine

    module = Own()
    trainer, _ = fit([lt.LRSchedule(lt.Linear(end=0.1))], module)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader(), loader(8))
    assert not any("base values" in line for line in told())


def test_epochs_of_a_loader_without_a_length_beside_max_steps_ask_for_total_steps():
    with pytest.raises(ValueError, match=NAMES_TOTAL_STEPS.format("max_epochs beside max_steps")):
        fit([lt.LRSchedule(lt.Linear())], train=DataLoader(Unsized(), batch_size=4), max_epochs=2, max_steps=100)
    trainer, _ = fit(
        [lt.LRSchedule(lt.Linear())], train=DataLoader(Unsized(), batch_size=4), max_epochs=-1, max_steps=10
    )
    assert length_of(trainer) == (10, 10)


def test_base_batch_size_without_scaling_is_refused():
    with pytest.raises(ValueError, match="LRSchedule: base_batch_size must be left out here, got 128"):
        lt.LRSchedule(lt.Cosine(), base_batch_size=128)
    lt.LRSchedule(lt.Cosine(), scale_with_batch="linear", base_batch_size=128)
