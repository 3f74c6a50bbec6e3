import copy
import logging
import math
import pickle
import re
import signal
import warnings

import pytest
import torch
from kit import (
    MemoryLogger,
    Net,
    ResumableLoader,
    TwoOptimizers,
    assert_same,
    every_epoch,
    fit,
    loader,
    plugin_that_skips,
)
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, OnExceptionCheckpoint
from test_contract import CountSteps, Overflow
from torch import nn

import lightning_tricks as lt

ends_elsewhere = pytest.mark.filterwarnings("ignore:.*(the schedule is for .* optimizer steps|an epoch by hand has)")


class Watch(Callback):
    """What each batch is trained with."""

    def __init__(self, read):
        self.read, self.values = read, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.values.append(self.read(trainer, pl_module))


def group_value(key, index=0):
    return Watch(lambda trainer, pl_module: trainer.optimizers[0].param_groups[index][key])


class Rates(Net):
    """Rates of every kind: of a layer found by index, a float, an int, and a buffer that the forward pass uses."""

    def __init__(self, **options):
        super().__init__(**options)
        self.body.append(nn.Dropout(0.5))
        self.rate, self.count = 0.3, 4
        self.register_buffer("share", torch.tensor(0.7), persistent=False)

    def forward(self, images):
        return super().forward(images) * self.share


class Decayed(Net):
    """Adam whose second group has no weight decay, as biases have none."""

    def configure_optimizers(self):
        groups = [
            {"params": self.head.parameters(), "weight_decay": 0.2},
            {"params": self.body.parameters(), "weight_decay": 0.0, "betas": (0.8, 0.9)},
        ]
        return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99))


# ---------------------------------------------------------------------------------- hyperparameters of the optimizer


@pytest.mark.parametrize("schedule", [lt.Cosine(0.1), lt.Warmup("1ep", lt.Linear()), lambda k, T: 1 / (1 + k)])
def test_weight_decay_of_every_step_is_base_times_factor(schedule):
    watch = group_value("weight_decay")
    fit([lt.ParamSchedule("weight_decay", schedule), watch])
    plain = lt.Warmup(6, lt.Linear()) if isinstance(schedule, lt.Warmup) else schedule
    assert watch.values == [1e-3 * plain(k, 12) for k in range(12)]


def test_weight_decay_reaches_the_update():
    """The oracle sets the decay of each step by hand, in a loop of torch's own."""
    module = Net()
    fit([lt.ParamSchedule("weight_decay", lt.Linear())], module)
    oracle = Net()
    optimizer = oracle.configure_optimizers()
    for step in range(12):
        images, labels = list(loader())[step % 6]
        optimizer.param_groups[0]["weight_decay"] = 1e-3 * (1 - step / 12)
        optimizer.zero_grad()
        nn.functional.cross_entropy(oracle(images), labels).backward()
        optimizer.step()
    assert_same(dict(module.head.state_dict()), dict(oracle.head.state_dict()))


def test_momentum_is_that_of_one_cycle_in_torch():
    rates, momenta = group_value("lr"), group_value("momentum")

    class Cyclic(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.05, momentum=0.95)

    warmup = 3
    callbacks = [
        lt.LRSchedule(lt.OneCycle(warmup)),
        lt.ParamSchedule("momentum", lt.OneCycle(warmup, start=1, peak=0.85 / 0.95, end=1)),
    ]
    fit([*callbacks, rates, momenta], Cyclic())
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05, momentum=0.95)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=13, pct_start=(warmup + 1) / 13)
    expected = []
    for _ in range(12):
        expected.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        scheduler.step()
    assert rates.values == pytest.approx([rate for rate, _ in expected], abs=1e-12)
    assert momenta.values == pytest.approx([momentum for _, momentum in expected], abs=1e-12)


def test_each_group_keeps_its_own_base_and_its_other_beta():
    first, second, betas = (
        group_value("weight_decay"),
        group_value("weight_decay", 1),
        [group_value("betas", i) for i in (0, 1)],
    )
    callbacks = [
        lt.ParamSchedule("weight_decay", lt.Linear()),
        lt.ParamSchedule("betas[0]", lt.Linear(end=0.5)),
        lt.ParamSchedule("betas[1]", lt.Linear(1.0, 1.01)),
    ]
    trainer, _ = fit([*callbacks, first, second, *betas], Decayed())
    for k in range(12):
        assert (first.values[k], second.values[k]) == (0.2 * (1 - k / 12), 0.0)
        for watch, base in zip(betas, [(0.9, 0.99), (0.8, 0.9)], strict=True):
            assert watch.values[k] == pytest.approx((base[0] * (1 - k / 24), base[1] * (1 + 0.01 * k / 12)))
            assert isinstance(watch.values[k], tuple)
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.0


@pytest.mark.parametrize("fused", [False, True])
def test_fused_optimizer_follows_too(fused):
    class Adam(Net):
        def configure_optimizers(self):
            parameters = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1, fused=fused)

    watch = group_value("weight_decay")
    fit([lt.ParamSchedule("weight_decay", lt.Linear()), watch], Adam())
    assert watch.values == [0.1 * (1 - k / 12) for k in range(12)]


def test_group_added_in_the_run_has_its_own_value_as_base():
    class AddGroup(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                parameters = pl_module.frozen.requires_grad_(True).parameters()
                trainer.optimizers[0].add_param_group({"params": parameters, "weight_decay": 0.3})

    watch = Watch(lambda trainer, pl_module: [group["weight_decay"] for group in trainer.optimizers[0].param_groups])
    fit([lt.ParamSchedule("weight_decay", lt.Linear()), AddGroup(), watch])
    assert watch.values[7:] == [[1e-3 * (1 - k / 12), 0.3 * (1 - k / 12)] for k in range(7, 12)]


# ----------------------------------------------------------------------------------------------- rates of the module


@pytest.mark.parametrize(
    ("name", "base", "read"),
    [
        ("body.4.p", 0.5, lambda module: module.body[4].p),
        ("rate", 0.3, lambda module: module.rate),
        ("count", 4, lambda module: module.count),
        ("share", 0.7, lambda module: module.share.item()),
    ],
)
def test_rate_of_the_module_follows_and_is_given_back(name, base, read):
    module, watch = Rates(), Watch(lambda trainer, pl_module: read(pl_module))
    fit([lt.ParamSchedule(name, lt.Warmup(3, lt.Linear(), start=0.1)), watch], module)
    expected = [base * lt.Warmup(3, lt.Linear(), start=0.1)(k, 12) for k in range(12)]
    assert watch.values == pytest.approx(expected, rel=1e-6)
    assert read(module) == read(Rates())
    assert type(read(module)) is type(read(Rates()))


def test_buffer_is_filled_in_place():
    module = Rates()
    share = module.share
    fit([lt.ParamSchedule("share", lt.Linear())], module)
    assert module.share is share


def ctrl_c():
    raise KeyboardInterrupt


def failure():
    raise RuntimeError("failed")


@pytest.mark.parametrize("error", [ctrl_c, failure])
@pytest.mark.parametrize("place", ["train", "validation", "sanity"])
def test_rates_are_given_back_after_an_exception(place, error):
    class Interrupted(Rates):
        def training_step(self, batch, batch_idx):
            if place == "train" and self.global_step == 8:
                error()
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            if place == "sanity" or (place == "validation" and self.global_step):
                error()
            super().validation_step(batch, batch_idx)

    module = Interrupted()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises((RuntimeError, SystemExit)):
        fit([lt.ParamSchedule(name, lt.Linear()) for name in ("body.4.p", "rate", "count", "share")], module)
    signal.signal(signal.SIGINT, handler)
    assert (module.body[4].p, module.rate, module.count) == (0.5, 0.3, 4)
    assert torch.equal(module.share, torch.tensor(0.7))


OTHER_WEIGHTS = {
    "EMA": lambda: lt.EMA(decay=0.9),
    "EarlyStopping": lambda: lt.EarlyStopping(monitor="val/loss", patience=100, restore_best=True),
}


@pytest.mark.parametrize("name", OTHER_WEIGHTS)
@pytest.mark.parametrize("first", [True, False])
def test_buffer_is_given_back_beside_callbacks_that_exchange_weights(first, name):
    callbacks = [lt.ParamSchedule("share", lt.Linear()), OTHER_WEIGHTS[name]()]
    module, watch = Rates(), Watch(lambda trainer, pl_module: pl_module.share.item())
    fit([*(callbacks if first else callbacks[::-1]), watch], module)
    assert watch.values == pytest.approx([0.7 * (1 - k / 12) for k in range(12)])
    assert torch.equal(module.share, torch.tensor(0.7))


@pytest.mark.parametrize("place", ["train", "validation"])
@pytest.mark.parametrize("first", [True, False])
def test_buffer_is_given_back_after_an_exception_beside_an_average(first, place):
    callbacks = [lt.ParamSchedule("share", lt.Linear()), lt.EMA(decay=0.9)]
    module = Rates(fail_at=(place, 6))
    with pytest.raises(RuntimeError, match="failed in"):
        fit(callbacks if first else callbacks[::-1], module)
    assert torch.equal(module.share, torch.tensor(0.7))


def test_second_fit_goes_on_and_gives_back_again():
    callback = lt.ParamSchedule("rate", lt.Linear(), total_steps=24)
    module, watch = Rates(), Watch(lambda trainer, pl_module: pl_module.rate)
    with pytest.warns(UserWarning, match="the schedule is for 24 .* ended after 12"):
        trainer, _ = fit([callback, watch], module)
    assert module.rate == 0.3
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader(), loader(8))
    assert watch.values == [0.3 * (1 - k / 24) for k in range(24)]
    assert module.rate == 0.3


def test_new_trainer_starts_anew():
    callback = lt.ParamSchedule("rate", lt.Linear())
    for _ in range(2):
        watch = Watch(lambda trainer, pl_module: pl_module.rate)
        fit([callback, watch], Rates())
        assert watch.values == [0.3 * (1 - k / 12) for k in range(12)]


@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"limit_train_batches": 0}, {"fast_dev_run": True}])
def test_fit_without_a_schedule_leaves_the_values(options):
    module = Rates()
    callbacks = [lt.ParamSchedule(name, lt.Linear(0.5, 0.0)) for name in ("rate", "share", "weight_decay")]
    trainer, _ = fit(callbacks, module, **options)
    assert (module.rate, module.share.item()) == (0.3, torch.tensor(0.7).item())
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 1e-3


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = 0.5
        self.register_buffer("share", torch.tensor(0.7), persistent=False)
        self.linear = nn.Linear(16, 3)

    def forward(self, images):
        return self.linear(images.flatten(1)) * self.rate * self.share


class Outer(Net):
    def __init__(self, compiled):
        super().__init__()
        torch.manual_seed(1)
        self.model = torch.compile(Inner(), backend="eager") if compiled else Inner()

    def forward(self, images):
        return self.model(images)


@pytest.mark.parametrize("name", ["model.rate", "model.share"])
def test_compiled_model_sees_the_rate_of_each_step(name):
    modules = [Outer(compiled=False), Outer(compiled=True)]
    for module in modules:
        fit([lt.ParamSchedule(name, lt.Linear(1.0, 0.5))], module)
    assert modules[1].losses == pytest.approx(modules[0].losses, rel=1e-6)
    assert modules[1].model.rate == 0.5
    assert modules[1].model.share.item() == pytest.approx(0.7)


# ------------------------------------------------------------------------------------------------------------ resume


def everything():
    names = ("weight_decay", "momentum", "body.4.p", "rate", "share")
    return [lt.ParamSchedule(name, lt.Warmup(3, lt.Cosine(0.1), start=0.2)) for name in names]


def values():
    return Watch(
        lambda trainer, pl_module: (
            *(trainer.optimizers[0].param_groups[0][key] for key in ("weight_decay", "momentum")),
            *(pl_module.body[4].p, pl_module.rate, pl_module.share.item()),
        )
    )


def test_resumed_run_has_the_same_values_to_the_last_bit(tmp_path):
    whole, rest, module = values(), values(), Rates()
    fit([*everything(), whole, every_epoch(tmp_path)], Rates(), max_epochs=4)
    fit(
        [*everything(), rest, every_epoch(tmp_path / "rest")], module, ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=4
    )
    assert rest.values == whole.values[12:]
    assert (module.body[4].p, module.rate, module.share.item()) == (0.5, 0.3, torch.tensor(0.7).item())


def test_run_resumed_in_the_middle_of_an_epoch_has_the_same_values(tmp_path):
    def save(folder):
        return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=8, save_top_k=-1)

    whole, rest = values(), values()
    fit([*everything(), whole, save(tmp_path)], Rates(), train=ResumableLoader())
    callbacks = [*everything(), rest, save(tmp_path / "rest")]
    fit(callbacks, Rates(), train=ResumableLoader(), ckpt_path=tmp_path / "step=8.ckpt")
    assert rest.values == whole.values[8:]


def test_checkpoint_that_is_saved_after_the_run_has_the_state(tmp_path):
    trainer, _ = fit([lt.ParamSchedule("rate", lt.Linear(), total_steps=12)], Rates())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["schedules"]["rate"][0]
    assert (state["step"], state["total_steps"]) == (12, 12)


def test_checkpoint_that_is_saved_on_an_exception_has_the_state(tmp_path):
    callbacks = [lt.ParamSchedule("share", lt.Linear()), OnExceptionCheckpoint(tmp_path)]
    with pytest.raises(RuntimeError, match="failed in validation"):
        fit(callbacks, Rates(fail_at=("validation", 6)))
    state = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["schedules"]["share"][0]
    assert (state["step"], state["total_steps"]) == (6, 12)


@ends_elsewhere
@pytest.mark.parametrize(("way", "total"), [("stretch", 24), ("keep", 12)])
def test_run_that_becomes_longer_is_stretched_or_keeps_its_length(way, total, tmp_path):
    def schedule():
        return lt.ParamSchedule("weight_decay", lt.Linear(end=0.1), on_new_horizon=way)

    fit([schedule(), every_epoch(tmp_path)])
    watch = group_value("weight_decay")
    callbacks = [schedule(), watch, every_epoch(tmp_path / "rest")]
    fit(callbacks, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=4)
    assert watch.values == [1e-3 * lt.Linear(end=0.1)(k, total) for k in range(6, 24)]


def test_checkpoint_of_another_schedule_is_refused_or_gone_on_with(tmp_path):
    fit([lt.ParamSchedule("weight_decay", lt.Cosine()), every_epoch(tmp_path)])
    options = {"ckpt_path": tmp_path / "epoch=0.ckpt"}
    with pytest.raises(
        ValueError, match=r"ParamSchedule\('weight_decay'\): checkpoint .* got 'Cosine\(end=0\)'. This run has Linear"
    ):
        fit([lt.ParamSchedule("weight_decay", lt.Linear()), every_epoch(tmp_path / "rest")], **options)
    watch = group_value("weight_decay")
    callback = lt.ParamSchedule("weight_decay", lt.Linear(), on_mismatch="use_new")
    fit([callback, watch, every_epoch(tmp_path / "rest")], **options)
    assert watch.values == [1e-3 * (1 - k / 12) for k in range(6, 12)]


def test_schedule_that_joins_a_resumed_run_goes_on_at_its_step(tmp_path):
    fit([every_epoch(tmp_path)])
    watch = group_value("weight_decay")
    callbacks = [lt.ParamSchedule("weight_decay", lt.Linear()), watch, every_epoch(tmp_path / "rest")]
    fit(callbacks, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert watch.values == [1e-3 * (1 - k / 12) for k in range(6, 12)]


def test_copy_from_the_middle_of_a_run_starts_anew():
    copies = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            copies.extend([copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))])

    callback, module = lt.ParamSchedule("rate", lt.Linear()), Rates()
    fit([callback, Copy()], module)
    for twin in copies[6:8]:
        watch = Watch(lambda trainer, pl_module: pl_module.rate)
        fit([twin, watch], Rates())
        assert watch.values == [0.3 * (1 - k / 12) for k in range(12)]


# ------------------------------------------------------------------------------------------------------- real steps


def test_batches_that_only_accumulate_do_not_count():
    watch = group_value("weight_decay")
    fit([lt.ParamSchedule("weight_decay", lt.Linear()), watch], accumulate_grad_batches=3)
    assert watch.values == [1e-3 * (1 - k // 3 / 4) for k in range(12)]


@ends_elsewhere
def test_steps_that_a_scaler_skips_do_not_count():
    watch, count = group_value("weight_decay"), CountSteps()
    callbacks = [lt.ParamSchedule("weight_decay", lt.Linear()), lt.ParamSchedule("rate", lt.Linear())]
    fit([*callbacks, watch, Overflow({0, 3, 4, 7}), count], Rates(), plugins=[plugin_that_skips(8.0)])
    done = [sum(b not in {0, 3, 4, 7} for b in range(batch)) for batch in range(12)]
    assert watch.values == [1e-3 * (1 - k / 12) for k in done]
    assert count.steps == 8


class TwoDecayed(TwoOptimizers):
    def __init__(self):
        super().__init__()
        self.rate = 0.3

    def configure_optimizers(self):
        first, second = super().configure_optimizers()
        first.param_groups[0]["weight_decay"], second.param_groups[0]["weight_decay"] = 0.1, 0.2
        return first, second


def both(trainer, pl_module):
    return tuple(optimizer.param_groups[0]["weight_decay"] for optimizer in trainer.optimizers)


@ends_elsewhere
def test_each_of_several_optimizers_counts_its_own_steps():
    watch = Watch(both)
    fit([lt.ParamSchedule("weight_decay", lt.Linear()), watch], TwoDecayed())
    assert watch.values == [(0.1 * (1 - k / 12), 0.2 * (1 - k // 2 / 12)) for k in range(12)]


def test_each_optimizer_can_have_a_schedule_of_its_own_and_resume(tmp_path):
    def callbacks():
        second = lt.ParamSchedule("weight_decay", lt.Cosine(), total_steps=6, optimizer=1)
        return [lt.ParamSchedule("weight_decay", lt.Linear(), optimizer=0), second]

    whole, rest = Watch(both), Watch(both)
    fit([*callbacks(), whole, every_epoch(tmp_path)], TwoDecayed())
    others = [*callbacks()[::-1], rest, every_epoch(tmp_path / "rest")]
    fit(others, TwoDecayed(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert whole.values == [(0.1 * (1 - k / 12), 0.2 * lt.Cosine()(k // 2, 6)) for k in range(12)]
    assert rest.values == whole.values[6:]


def test_rate_counts_the_steps_of_the_optimizer_that_was_chosen():
    watch = Watch(lambda trainer, pl_module: pl_module.rate)
    fit([lt.ParamSchedule("rate", lt.Linear(), total_steps=6, optimizer=1), watch], TwoDecayed())
    assert watch.values == [0.3 * (1 - k // 2 / 6) for k in range(12)]


# ---------------------------------------------------------------------------------------------------------- errors


def test_unknown_name_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(
        ValueError,
        match=r"ParamSchedule: name must be a number of every chosen group .*momentum.*weight_decay.* or a path of Net",
    ):
        fit([lt.ParamSchedule("weight_decy", lt.Linear())])


@pytest.mark.parametrize("name", ["body.7.p", "nothing.rate", "hparams.rate", "betas[2]", "rate.x"])
def test_path_that_leads_nowhere_is_refused(name):
    with pytest.raises(ValueError, match="ParamSchedule: name must be a number of every chosen group"):
        fit([lt.ParamSchedule(name, lt.Linear())], Rates(optimizer="adam"))


@pytest.mark.parametrize("name", ["", ".rate", "model..rate"])
def test_name_that_is_no_name_is_refused_when_built(name):
    with pytest.raises(ValueError, match="ParamSchedule: name must be a name, or names separated by dots, got"):
        lt.ParamSchedule(name, lt.Linear())


@pytest.mark.parametrize("name", ["lr", "lr[0]", "initial_lr"])
def test_learning_rate_is_refused_when_built(name):
    with pytest.raises(ValueError, match="ParamSchedule: name must be another than lr, got .* LRSchedule"):
        lt.ParamSchedule(name, lt.Linear())


def test_two_paths_to_one_rate_are_refused():
    class Alias(Net):
        def __init__(self):
            super().__init__()
            self.other = self.body

    paths = ("body.2.momentum", "other.2.momentum")
    text = "ParamSchedule: name must be of a rate with one owner, got 'other.2.momentum'. Both would own it"
    with pytest.raises(ValueError, match=text):
        fit([lt.ParamSchedule(path, lt.Linear()) for path in paths], Alias())


def test_hyperparameter_that_only_some_optimizers_have_is_refused_with_the_way_out():
    text = r"ParamSchedule: name must be a number of every chosen group \(.*\) .* Some groups have it: choose"
    with pytest.raises(ValueError, match=text):
        fit([lt.ParamSchedule("betas[0]", lt.Linear())], TwoDecayed())


def test_name_that_is_no_string_is_refused():
    with pytest.raises(TypeError, match="ParamSchedule: name must be a string, got 3"):
        lt.ParamSchedule(3, lt.Linear())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("training", "bool"), ("kind", "str"), ("head.weight", "Parameter"), ("mask", "Tensor"), ("head", "Linear")],
)
def test_attribute_that_is_no_number_is_refused(name, kind):
    with pytest.raises(TypeError, match=f"ParamSchedule: name must be the path of a number, got '{kind}'"):
        fit([lt.ParamSchedule(name, lt.Linear())])


def test_hyperparameter_without_an_index_that_it_has_is_refused():
    for name in ("lr[0]", "weight_decay[0]"):
        with pytest.raises(ValueError, match="ParamSchedule: name must be"):
            fit([lt.ParamSchedule(name, lt.Linear())])


@pytest.mark.parametrize("name", ["weight_decay", "nothing"])
def test_base_of_zero_is_refused(name):
    class Zero(Net):
        nothing = 0.0

        def configure_optimizers(self):
            return torch.optim.Adam(self.head.parameters())

    with pytest.raises(ValueError, match=f"ParamSchedule: {name} must be other than 0, got 0"):
        fit([lt.ParamSchedule(name, lt.Linear())], Zero())


@pytest.mark.parametrize("name", ["momentum", "betas[0]", "betas[1]"])
def test_momentum_that_reaches_one_is_refused_before_the_first_step(name):
    module = Net(optimizer="sgd" if name == "momentum" else "adam")
    wanted = f"ParamSchedule: {re.escape(name)} must be below 1 at every step, got .* Lower the base value or the"
    with pytest.raises(ValueError, match=wanted):
        fit([lt.ParamSchedule(name, lt.Linear(1.0, 1.2))], module)
    assert module.losses == []


@pytest.mark.parametrize("index", [None, 0])
def test_two_of_one_name_are_refused(index):
    callbacks = [lt.ParamSchedule("weight_decay", lt.Linear(), optimizer=i) for i in (index, None)]
    wanted = "ParamSchedule: callbacks must be the only one of its kind .* Both would own 'weight_decay'"
    with pytest.raises(ValueError, match=wanted):
        fit(callbacks)


def test_rate_beside_several_optimizers_needs_the_index_of_one():
    with pytest.raises(ValueError, match="ParamSchedule: optimizer must be given for 'rate', got None"):
        fit([lt.ParamSchedule("rate", lt.Linear())], TwoDecayed())
    with pytest.raises(ValueError, match="ParamSchedule: optimizer must be an index below 2, got 2"):
        fit([lt.ParamSchedule("rate", lt.Linear(), optimizer=2)], TwoDecayed())


@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_bad_factor_is_refused_before_the_first_step(value):
    module = Rates()
    with pytest.raises(ValueError, match=r"ParamSchedule\('rate'\): schedule must be finite and at least 0 at step 7"):
        fit([lt.ParamSchedule("rate", lambda k, T: value if k == 7 else 1.0)], module)
    assert (module.losses, module.rate) == ([], 0.3)


@pytest.mark.parametrize("schedule", [None, 0.5, lt.Linear])
def test_schedule_must_be_one(schedule):
    with pytest.raises(TypeError, match="ParamSchedule: schedule must be a schedule"):
        lt.ParamSchedule("rate", schedule)


def test_property_that_cannot_be_set_is_refused():
    class Fixed(Net):
        @property
        def rate(self):
            return 0.5

    with pytest.raises((TypeError, ValueError), match="ParamSchedule: name must be"):
        fit([lt.ParamSchedule("rate", lt.Linear())], Fixed())


# --------------------------------------------------------------------------------------------------- what is shown


def test_values_are_logged_under_their_name_on_the_steps_that_lightning_logs():
    first, second = MemoryLogger(), MemoryLogger()
    callbacks = [lt.ParamSchedule("rate", lt.Linear()), lt.ParamSchedule("share", lt.Linear())]
    fit(callbacks, Rates(), logger=[first, second], log_every_n_steps=5)
    for logger in (first, second):
        assert logger.series("rate") == {k: 0.3 * (1 - k / 12) for k in (4, 9)}
        assert logger.series("share") == pytest.approx({k: 0.7 * (1 - k / 12) for k in (4, 9)})


def test_groups_are_named_as_lightnings_monitor_names_them():
    logger = MemoryLogger()
    monitor = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    callbacks = [
        lt.LRSchedule(lt.Cosine()),
        lt.ParamSchedule("weight_decay", lt.Linear()),
        lt.ParamSchedule("betas[0]", lt.Linear(end=0.5)),
        monitor,
    ]
    fit(callbacks, Decayed(), logger=logger)
    for group in ("pg1", "pg2"):
        assert logger.series(f"weight_decay/{group}") == logger.series(f"lr-AdamW/{group}-weight_decay")
        assert logger.series(f"betas[0]/{group}") == logger.series(f"lr-AdamW/{group}-momentum")
        assert len(logger.series(f"betas[0]/{group}")) == 12
    assert logger.series("weight_decay/pg1") == {k: 0.2 * (1 - k / 12) for k in range(12)}


@ends_elsewhere
@pytest.mark.parametrize("apart", [False, True])
def test_values_of_several_optimizers_have_names_of_their_own(apart):
    logger = MemoryLogger()
    indices = (0, 1) if apart else (None,)
    fit([lt.ParamSchedule("weight_decay", lt.Linear(), optimizer=i) for i in indices], TwoDecayed(), logger=logger)
    assert logger.series("weight_decay-SGD")[0] == 0.1
    assert logger.series("weight_decay-Adam")[0] == 0.2


def test_progress_bar_has_the_value_and_the_settings_have_the_schedule():
    logger = MemoryLogger()
    trainer, _ = fit([lt.ParamSchedule("rate", lt.Linear(), prog_bar=True)], Rates(), logger=logger)
    assert trainer.progress_bar_metrics["rate"] == pytest.approx(0.3 / 12)
    settings = {"name": "rate", "schedule": "Linear(start=1, end=0)", "total_steps": 12}
    assert logger.hparams["tricks"]["ParamSchedule"] == settings


def test_a_line_at_the_start_and_a_warning_at_an_unexpected_end(caplog):
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    caplog.set_level(logging.INFO)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([lt.ParamSchedule("rate", lt.Linear(), total_steps=24)], Rates())
    line = (
        "ParamSchedule('rate'): Linear(start=1, end=0) over 24 optimizer steps: factor 1 at first, at most 1 (step 0)"
    )
    assert f"{line}, 0 at the end." in caplog.messages
    assert sum("ParamSchedule('rate'): the schedule is for 24" in str(warning.message) for warning in caught) == 1


def test_two_ranks_have_the_same_values(tmp_path):
    class Save(Watch):
        def on_train_end(self, trainer, pl_module):
            torch.save(self.values, tmp_path / f"{trainer.global_rank}.pt")

    save = Save(lambda trainer, pl_module: (*both(trainer, pl_module), pl_module.rate, pl_module.share.item()))
    callbacks = [lt.ParamSchedule(name, lt.Linear()) for name in ("weight_decay", "rate", "share")]
    fit([*callbacks, save], Rates(), strategy="ddp_fork", devices=2)
    for rank in (0, 1):
        rows = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        expected = [tuple(base * (1 - k / 6) for base in (1e-3, 0.3, 0.7)) for k in range(6)]
        assert [pytest.approx(row) for row in expected] == rows
