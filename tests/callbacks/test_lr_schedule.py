import logging

import pytest
import torch
from kit import MemoryLogger, Net, ResumableLoader, TwoOptimizers, every_epoch, fit, loader, make_trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

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
    assert rates.rates[6][0] == pytest.approx([0.05 * 0.5, 0.3])
    assert rates.rates[7][0] == pytest.approx([0.05 * 5 / 12, 0.3 * 5 / 12])


def test_rate_that_is_a_tensor_stays_the_same_tensor():
    class TensorRate(Net):
        def configure_optimizers(self):
            self.rate = torch.tensor(0.1)
            return torch.optim.Adam(self.head.parameters(), lr=self.rate, foreach=False, capturable=False)

    trainer, module = fit([lt.LRSchedule(lt.Linear())], TensorRate())
    assert trainer.optimizers[0].param_groups[0]["lr"] is module.rate
    assert module.rate.item() == 0.0


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
    assert (scheduler.total_steps, scheduler.last_epoch) == (length, length)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


def test_length_that_was_given_wins():
    trainer, _ = fit([lt.LRSchedule(lt.Linear(), total_steps=24)])
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.025)


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
    assert trainer.lr_scheduler_configs[0].scheduler.schedule == lt.Warmup(2, lt.Constant())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
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
    assert "had 12 optimizer steps, now it has 24; the schedule is stretched, and goes on at step 12" in caplog.text


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
    assert (scheduler.total_steps, scheduler.last_epoch) == (total, total)


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
    assert (scheduler.total_steps, scheduler.last_epoch) == (8, 8)


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
    assert [row[1] for row in rates.rates[6:]] == pytest.approx([0.3] + [0.3 * (1 - k / 12) for k in range(7, 12)])


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
    with pytest.raises(ValueError, match="LRSchedule: checkpoint must be one of LRSchedule, got"):
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


# ------------------------------------------------------------------------------------------------------------ refusals

NAMES_TOTAL_STEPS = r"LRSchedule: total_steps must be given where the run does not tell it, got .*{}.* "
NAMES_TOTAL_STEPS += r"Give LRSchedule\(schedule, total_steps=\.\.\.\)"


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

    with pytest.raises(ValueError, match=r"LRSchedule: schedulers must be the only one .* got \['StepLR'\]"):
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


def test_length_of_a_run_is_asked_late_enough_for_a_loader_that_resumes():
    """Reading it before the loops are restored would make a resumable loader begin again."""
    trainer = make_trainer([lt.LRSchedule(lt.Linear())], max_epochs=1)
    asked = []
    original = type(trainer).estimated_stepping_batches.fget

    class Watched(type(trainer)):
        @property
        def estimated_stepping_batches(self):
            asked.append(self.fit_loop._combined_loader is not None)
            return original(self)

    trainer.__class__ = Watched
    trainer.fit(Net(), loader(), loader(8))
    assert asked == [True]
