"""Several averages, what of the module is averaged, where and how finely, and what validation sees."""

import copy
import logging
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from kit import MemoryLogger, Net, TwoOptimizers, assert_same, every_epoch, fit, loader, make_trainer, snapshot
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import lightning_tricks as lt
from lightning_tricks.callbacks.updater import Updater


class Loop(Callback):
    """Averages by an explicit loop in float64, and the raw weights."""

    def __init__(self, *decays):
        self.decays, self.averages, self.raw = decays, [{} for _ in decays], {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.raw = snapshot(pl_module)
        weights = {name: p.detach().clone().double() for name, p in pl_module.named_parameters()}
        for index, decay in enumerate(self.decays):
            old = self.averages[index] or weights
            self.averages[index] = {name: decay * old[name] + (1 - decay) * weights[name] for name in weights}


def parameters(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_close(left, right, atol=1e-6):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name].double(), right[name].double(), rtol=0, atol=atol, msg=name)


# ------------------------------------------------------------------------------------------------------ several decays


def test_several_averages_are_those_of_each_decay_alone():
    ema, loop = lt.EMA([0.5, 0.9, lt.Warmed(0.99)]), Loop(0.5, 0.9)
    _, module = fit([ema, loop])
    assert_close(parameters(module), loop.averages[0])
    assert ema.labels == ["0.5", "0.9", "Warmed-0.99"]
    for index, decay in enumerate([0.9, lt.Warmed(0.99)], start=1):
        _, alone = fit([lt.EMA(decay)])
        mine = ema._averages.tensors[index]
        assert_same({name: mine[name] for name in parameters(alone)}, parameters(alone))


@pytest.mark.parametrize(
    ("decay", "error", "what"),
    [
        ([], ValueError, r"EMA: decay must be at least one, got \[\]"),
        ([0.9, 0.9], ValueError, r"EMA: decay must be different for each average"),
        ([0.9, 1.5], ValueError, r"EMA: decay must be in \[0, 1\), got 1\.5"),
        ([0.9, "0.99"], TypeError, r"EMA: decay must be a number in \[0, 1\), got '0.99'"),
    ],
)
def test_bad_lists_of_decays(decay, error, what):
    with pytest.raises(error, match=what):
        lt.EMA(decay)


def test_resume_with_another_number_of_averages_is_refused(tmp_path):
    fit([lt.EMA([0.5, 0.9]), every_epoch(tmp_path)], max_epochs=1)
    with pytest.raises(ValueError, match=r"EMA: decay must be as in the checkpoint: 0\.5, 0\.9, got \['0\.5'\]"):
        fit([lt.EMA(0.5), every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "epoch=0.ckpt")


def test_half_life_in_samples():
    """Four samples of two batches: eight samples a step."""
    ema, loop = lt.EMA(lt.HalfLife("32samples")), Loop()
    fit([ema, loop], accumulate_grad_batches=2, max_epochs=1)
    assert [plan.decay for plan in ema._plans] == [pytest.approx(0.5 ** (8 / 32))]
    _, alone = fit([lt.EMA(0.5**0.25)], accumulate_grad_batches=2, max_epochs=1)
    _, module = fit([lt.EMA(lt.HalfLife("32samples"))], accumulate_grad_batches=2, max_epochs=1)
    assert_same(snapshot(module), snapshot(alone))


def test_half_life_in_samples_of_two_optimizers_counts_a_batch_once():
    ema = lt.EMA(lt.HalfLife("32samples"))
    fit([ema], TwoOptimizers(), max_epochs=1)
    assert ema._plans[0].decay == pytest.approx(0.5 ** (4 / 2 / 32))


def test_half_life_in_samples_needs_a_batch_size():
    batches = [(torch.zeros(4, 1, 4, 4), torch.zeros(4, dtype=torch.long))]

    class Batches:
        def __iter__(self):
            return iter(batches)

        def __len__(self):
            return 1

    with pytest.raises(ValueError, match=r"EMA: decay must be in steps where the loader has no batch_size"):
        fit([lt.EMA(lt.HalfLife("32samples"))], train=Batches())


# ------------------------------------------------------------------------------------------- include, exclude, buffers


def test_only_what_is_included_and_not_excluded_is_averaged():
    loop = Loop(0.5)
    _, module = fit([lt.EMA(0.5, include=["body.*", "head.*"], exclude="head.bias"), loop])
    for name, parameter in module.named_parameters():
        averaged = name.startswith(("body", "head")) and name != "head.bias"
        expected = loop.averages[0][name] if averaged else loop.raw[name]
        torch.testing.assert_close(parameter.detach().double(), expected.double(), rtol=0, atol=1e-6)
    assert not torch.equal(module.body[2].running_mean, loop.raw["body.2.running_mean"])


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_pattern_that_no_name_has(argument):
    with pytest.raises(
        ValueError, match=rf"EMA: {argument} must be patterns of .* got 'heads.*'. The module has mask, body"
    ):
        fit([lt.EMA(**{argument: ["heads.*"]})])
    with pytest.raises(TypeError, match=rf"EMA: {argument} must be names or patterns of names, got \[1\]"):
        lt.EMA(**{argument: [1]})


def test_patterns_see_the_names_of_before_torch_compile():
    module, loop = Net(), Loop(0.5)
    module.body = torch.compile(module.body, backend="eager")
    fit([lt.EMA(0.5, include="body.1.*"), loop], module)
    assert_close(
        {name: p for name, p in parameters(module).items() if "1.weight" in name},
        {name: p for name, p in loop.averages[0].items() if "1.weight" in name},
    )
    assert_same(module.head.weight.detach(), loop.raw["head.weight"])


def test_buffers_can_be_left_as_the_module_has_them():
    loop = Loop(0.5)
    _, module = fit([lt.EMA(0.5, buffers="copy"), loop])
    assert_close(parameters(module), loop.averages[0])
    for name, buffer in module.named_buffers():
        assert_same(buffer, loop.raw[name])


@pytest.mark.parametrize(
    ("argument", "value"), [("buffers", "none"), ("evaluate", "all"), ("device", "cuda:1"), ("dtype", "bfloat16")]
)
def test_values_that_there_are_not(argument, value):
    with pytest.raises(ValueError, match=f"EMA: {argument} must be '.*' or .*, got '{value}'"):
        lt.EMA(**{argument: value})


# ---------------------------------------------------------------------------------------------------- dtype and device


class Half(Net):
    """Weights in bfloat16."""

    def __init__(self):
        super().__init__()
        self.to(torch.bfloat16)

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].bfloat16(), batch[1]), batch_idx)

    def validation_step(self, batch, batch_idx):
        return super().validation_step((batch[0].bfloat16(), batch[1]), batch_idx)


def test_fine_average_of_coarse_weights(tmp_path):
    ema, loop = lt.EMA(0.99, dtype="float32"), Loop(0.99)
    module = Half()
    trainer = make_trainer([ema, loop, every_epoch(tmp_path)], max_epochs=3)
    trainer.fit(module, loader(), loader(8))
    kept = {name: tensor for name, tensor in ema._averages.tensors[0].items() if name in loop.averages[0]}
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    assert_close(kept, loop.averages[0], atol=1e-6)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert_same(parameters(module), {name: tensor.bfloat16() for name, tensor in kept.items()})

    # A resumed run goes on with the fine average, not with what the state dict has of it.
    again = lt.EMA(0.99, dtype="float32")
    _, resumed = fit([again, every_epoch(tmp_path / "rest")], Half(), max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(again._averages.tensors[0], ema._averages.tensors[0])
    assert_same(snapshot(resumed), snapshot(module))


def test_average_is_finer_than_the_weights_and_validation_leaves_them_alone():
    _, module = fit([lt.EMA(0.9, dtype="float64")])
    _, plain = fit([lt.EMA(0.9)])
    assert module.losses == plain.losses
    assert_close(parameters(module), parameters(plain))


def test_average_in_the_hosts_memory_of_a_module_there_is_the_same():
    _, module = fit([lt.EMA(0.9, device="cpu")])
    _, plain = fit([lt.EMA(0.9)])
    assert_same(snapshot(module), snapshot(plain))


def test_weights_that_are_fetched_arrive_one_update_later_or_when_settled(monkeypatch):
    """Tensors of another device come through a copy on the host; a tensor subclass plays the device here."""

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    values = [torch.tensor([4.0]), torch.tensor([8.0, 0.0])]
    weights = [value.as_subclass(Elsewhere) for value in values]
    average = [torch.tensor([0.0]), torch.tensor([0.0, 0.0], dtype=torch.float64)]
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: torch.empty(tensor.shape))
    updater = Updater([average], weights)
    updater.update([0.5])
    assert [tensor.tolist() for tensor in average] == [[0.0], [0.0, 0.0]]
    values[0].fill_(100.0)  # the next step changes the weights: what was fetched is not changed
    updater.update([0.75])
    assert [tensor.tolist() for tensor in average] == [[2.0], [4.0, 0.0]]
    updater.settle()
    assert [tensor.tolist() for tensor in average] == [[26.5], [5.0, 0.0]]
    updater.settle()
    assert average[0].tolist() == [26.5]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "options", [{}, {"device": "cpu"}, {"dtype": "float64"}, {"device": "cpu", "dtype": "float64"}]
)
def test_average_of_a_module_on_a_gpu(options):
    loop = Loop(0.9)
    ema = lt.EMA(0.9, **options)
    _, module = fit([ema, loop], accelerator="gpu", max_epochs=3)
    expected = {name: tensor.cpu() for name, tensor in loop.averages[0].items()}
    assert_close({name: tensor.cpu() for name, tensor in parameters(module).items()}, expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ evaluate


class Scores(Net):
    """Everything that users log in a validation step: tensors, numbers, metric objects, of two loaders."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.metrics = MetricCollection({"top": MulticlassAccuracy(3, average="micro")}, prefix="all/")

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.metrics.update(logits, batch[1])
        self.log("val/acc", self.accuracy)
        self.log_dict(self.metrics)
        self.log_dict({"val/loss": F.cross_entropy(logits, batch[1]), "val/size": float(len(logits))}, on_step=True)
        torch.rand(1)  # what it draws is drawn once


class After(Callback):
    """The metrics of every validation, and those of each set of weights by hand."""

    def __init__(self, ema):
        self.ema, self.rows = ema, []

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        ema = self.ema._averages
        row = {}
        raw = snapshot(pl_module)
        sets = {"": raw, **{f"_{name}": ema.tensors[i] for i, name in enumerate(self.ema.labels)}, "_raw": raw}
        for suffix, weights in sets.items():
            pl_module.load_state_dict({**raw, **weights})
            pl_module.eval()
            batch = next(iter(loader(8, batch_size=8, seed=5)))
            logits = pl_module(batch[0])
            row[suffix] = F.cross_entropy(logits, batch[1]).item(), (logits.argmax(1) == batch[1]).float().mean().item()
        pl_module.load_state_dict(raw)
        pl_module.train()
        seen = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.rows.append((row, seen))


def test_both_validates_every_set_of_weights_under_its_own_names():
    ema = lt.EMA([0.5, 0.95], evaluate="both")
    after = After(ema)  # before the average is put back
    logger = MemoryLogger()
    _, module = fit([ema, after], Scores(), logger=logger, max_epochs=3)
    assert len(after.rows) == 3
    for row, seen in after.rows:
        for name, suffix in (("", "_0.5"), ("_0.95", "_0.95"), ("_raw", "_raw")):
            loss, accuracy = row[suffix]
            assert seen[f"val/loss{name}_epoch"] == pytest.approx(loss, abs=1e-6), name
            assert seen[f"val/acc{name}"] == pytest.approx(accuracy)
            assert seen[f"all/top{name}"] == pytest.approx(accuracy)
            assert seen[f"val/size{name}_epoch"] == 4
    assert len({row["_0.5"][0] for row, _ in after.rows} | {row["_raw"][0] for row, _ in after.rows}) == 6
    plain_ema = lt.EMA(0.5)
    torch.manual_seed(0)
    _, plain = fit([plain_ema], Scores(), max_epochs=3)
    assert_same(parameters(module), parameters(plain))
    assert "log" not in vars(module)
    assert isinstance(module.accuracy, MulticlassAccuracy)
    pickle.loads(pickle.dumps(ema))


def test_names_are_there_before_the_average_begins():
    checkpoint = []

    class Names(Callback):
        def on_validation_end(self, trainer, pl_module):
            checkpoint.append({name: v.item() for name, v in trainer.callback_metrics.items() if "val" in name})

    fit([lt.EMA(0.9, start=12, evaluate="both"), Names()], max_epochs=3)
    assert [set(row) for row in checkpoint[1:]] == [{"val/loss", "val/loss_raw"}] * 3
    assert checkpoint[2]["val/loss"] == checkpoint[2]["val/loss_raw"]
    assert checkpoint[3]["val/loss"] != checkpoint[3]["val/loss_raw"]


def test_checkpoint_and_early_stopping_can_follow_either(tmp_path):
    save = ModelCheckpoint(tmp_path, monitor="val/loss_raw", filename="best")
    stop = lt.EarlyStopping(monitor="val/loss_raw", patience=100, restore_best=True)
    loop = Loop()

    class Best(Callback):
        """The raw weights of the best raw score."""

        score, weights = torch.inf, {}

        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking and trainer.callback_metrics["val/loss_raw"] < self.score:
                self.score, self.weights = trainer.callback_metrics["val/loss_raw"].item(), loop.raw

    best = Best()
    _, module = fit([loop, lt.EMA(0.9, evaluate="both"), stop, save, best], max_epochs=4)
    assert save.best_model_score.item() == pytest.approx(best.score)
    assert stop.best_score.item() == pytest.approx(best.score)
    names = parameters(module).keys()
    assert_same(parameters(module), {name: best.weights[name] for name in names})
    raw = lt.load_average(tmp_path / "best.ckpt", Net(), "raw")
    assert_same(parameters(raw), {name: best.weights[name] for name in names})


def test_two_loaders_of_validation():
    logger = MemoryLogger()
    loaders = [loader(8, seed=5), loader(12, seed=6)]
    trainer, _ = fit([lt.EMA(0.9, evaluate="both")], Scores(), val=loaders, logger=logger)
    names = {name for name in trainer.callback_metrics if name.startswith("val/acc")}
    assert names == {f"val/acc{which}/dataloader_idx_{i}" for which in ("", "_raw") for i in (0, 1)}


def test_second_pass_draws_nothing_that_the_run_would_have_drawn():
    class Draws(Net):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            torch.rand(1)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * torch.rand(1)

    losses = []
    for evaluate in ("average", "both"):
        torch.manual_seed(3)
        losses.append(fit([lt.EMA(0.9, evaluate=evaluate)], Draws())[1].losses)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("hook", ["on_validation_epoch_end", "on_validation_batch_end", "on_validation_batch_start"])
def test_module_that_gathers_what_batches_leave_is_refused(hook):
    module = type("Gathers", (Net,), {hook: lambda self, *args: None})()
    with pytest.raises(
        ValueError, match=rf"EMA: evaluate must be 'average' or 'raw' with a module .* got \['{hook}'\]"
    ):
        fit([lt.EMA(evaluate="both")], module)
    fit([lt.EMA(evaluate="average")], module, max_epochs=1)


@pytest.mark.parametrize("when", ["average", "raw"])
def test_error_in_a_second_pass_leaves_the_raw_weights(when):
    class Fails(Net):
        passes = 0

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.passes += self.global_step > 6
            if self.passes == {"average": 2, "raw": 3}[when]:
                raise RuntimeError("failed in a second pass")

    loop, module = Loop(), Fails()
    with pytest.raises(RuntimeError, match="failed in a second pass"):
        fit([loop, lt.EMA([0.5, 0.9], evaluate="both")], module)
    assert_same(parameters(module), {name: loop.raw[name] for name in parameters(module)})
    assert "log" not in vars(module)


def test_raw_evaluation_leaves_everything_as_if_nobody_averaged(tmp_path):
    logger, plain_logger = MemoryLogger(), MemoryLogger()
    ema = lt.EMA(0.9, evaluate="raw")
    _, module = fit([ema, every_epoch(tmp_path)], logger=logger)
    _, plain = fit([every_epoch(tmp_path / "plain")], logger=plain_logger)
    assert_same(snapshot(module), snapshot(plain))
    assert_same(logger.rows, plain_logger.rows)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert_same(dict(saved["state_dict"]), snapshot(plain))
    assert "current_model_state" not in saved
    _, averaged = fit([lt.EMA(0.9)])
    assert_same(snapshot(lt.load_average(tmp_path / "epoch=1.ckpt", Net())), snapshot(averaged))


def test_resume_changes_what_is_evaluated(tmp_path):
    fit([lt.EMA(0.9, evaluate="raw"), every_epoch(tmp_path)], max_epochs=4)
    _, whole = fit([lt.EMA(0.9)], max_epochs=4)
    callbacks = [lt.EMA(0.9), every_epoch(tmp_path / "rest")]
    _, module = fit(callbacks, max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_same(snapshot(module), snapshot(whole))
    callbacks = [lt.EMA(0.9, evaluate="raw"), every_epoch(tmp_path / "back")]
    _, module = fit(callbacks, max_epochs=4, ckpt_path=tmp_path / "rest" / "epoch=2.ckpt")
    assert_same(snapshot(module), snapshot(fit([], max_epochs=4)[1]))


# ----------------------------------------------------------------------------------------- parameters that come and go


class Grows(Net):
    """Gets another layer in its second epoch."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.late = nn.Linear(3, 3)
            self.trainer.optimizers[0].add_param_group({"params": self.late.parameters()})

    def forward(self, images):
        logits = super().forward(images)
        return self.late(logits) if hasattr(self, "late") else logits


def test_parameters_that_appear_after_the_average_has_begun_are_refused():
    with pytest.raises(
        ValueError, match=r"EMA: parameters must be in the module before the average begins, got 'late.we"
    ):
        fit([lt.EMA(0.9)], Grows(), max_epochs=2)


def test_parameters_that_appear_before_the_average_begins_are_in_it():
    loop = Loop(0.5)
    loop.on_train_batch_end = lambda trainer, pl_module, *args, add=loop.on_train_batch_end: (
        add(trainer, pl_module) if trainer.global_step > 8 else None
    )
    _, module = fit([lt.EMA(0.5, start=8), loop], Grows(), max_epochs=3)
    assert "late.weight" in parameters(module)
    assert_close(parameters(module), loop.averages[0])


def test_parameters_that_are_thawed_late_are_averaged_from_the_beginning():
    class Thaws(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.frozen.requires_grad_(True)
                self.trainer.optimizers[0].add_param_group({"params": self.frozen.parameters()})

    loop = Loop(0.9)
    _, module = fit([lt.EMA(0.9), loop], Thaws(), max_epochs=3)
    assert_close(parameters(module), loop.averages[0])
    assert not torch.equal(module.frozen.weight.detach(), Net().frozen.weight.detach())


def test_parameter_that_changes_its_shape_is_refused():
    class Reshapes(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.frozen.weight = nn.Parameter(torch.zeros(8, 4), requires_grad=False)

        def forward(self, images):
            return self.head(self.body(images))

    with pytest.raises(
        ValueError, match=r"EMA: parameters must be of one shape, \(8, 8\), got 'frozen.weight of \(8, 4\)"
    ):
        fit([lt.EMA(0.9)], Reshapes(), max_epochs=2)


def test_parameter_that_is_replaced_by_another_is_followed():
    class Replaces(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.frozen.weight = nn.Parameter(self.frozen.weight.detach() + 1, requires_grad=False)

    loop = Loop(0.5)
    _, module = fit([lt.EMA(0.5), loop], Replaces(), max_epochs=2)
    assert_close(parameters(module), loop.averages[0])


def test_tensors_that_are_not_contiguous_and_those_cut_in_pieces():
    class Wide(Net):
        def __init__(self):
            super().__init__()
            self.wide = nn.Linear(16, 5000)
            self.turned = nn.Parameter(torch.randn(30, 40000).t())
            self.image = nn.Conv2d(3, 20, 30).to(memory_format=torch.channels_last)

        def training_step(self, batch, batch_idx):
            extra = self.wide(batch[0].flatten(1)).square().mean() + 1e-3 * self.turned.square().sum()
            extra = extra + 1e-3 * self.image(torch.ones(1, 3, 30, 30)).square().mean()
            return super().training_step(batch, batch_idx) + extra

    loop = Loop(0.9)
    _, module = fit([lt.EMA(0.9), loop], Wide())
    assert_close(parameters(module), loop.averages[0], atol=1e-5)
    assert module.turned.stride() == (1, 40000)


def test_settings_show_what_is_not_as_usual():
    assert lt.EMA().settings == {"decay": 0.999, "start": 0, "every_n_steps": 1}
    ema = lt.EMA([0.9, lt.HalfLife("2ep")], evaluate="both", dtype=torch.float64, exclude="head.*", buffers="copy")
    assert ema.settings == {
        "decay": [0.9, "HalfLife(duration='2ep')"],
        "start": 0,
        "every_n_steps": 1,
        "evaluate": "both",
        "dtype": "float64",
        "exclude": ["head.*"],
        "buffers": "copy",
    }


def test_empty_validation_and_batches_of_other_sizes_weigh_as_they_do():
    data = TensorDataset(torch.randn(7, 1, 4, 4), torch.zeros(7, dtype=torch.long))
    trainer, _ = fit([lt.EMA(0.0, evaluate="both")], val=DataLoader(data, batch_size=4))
    metrics = trainer.callback_metrics  # a decay of 0 averages over the last step alone
    assert metrics["val/loss"].item() == pytest.approx(metrics["val/loss_raw"].item(), abs=1e-6)


# ---------------------------------------------------------------------------------------------------- odd surroundings


class Spectral(Net):
    def __init__(self):
        super().__init__()
        self.head = nn.utils.parametrizations.spectral_norm(self.head)


def test_spectral_norm_of_a_finer_average():
    _, module = fit([lt.EMA(0.9, dtype="float64")], Spectral(), max_epochs=4)
    module.eval()
    module(torch.zeros(2, 1, 4, 4))
    assert torch.linalg.matrix_norm(module.head.weight.detach(), 2).item() == pytest.approx(1, abs=1e-3)


class Named(Net):
    """Metrics whose names end as those of the passes do."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val/loss", loss, on_step=True, on_epoch=True)
        self.log("val/psnr_raw", loss)


@pytest.mark.filterwarnings("ignore:EarlyStopping. mode=")
@pytest.mark.parametrize(
    ("monitor", "which"),
    [
        ("val/loss_epoch", "average"),
        ("val/loss_raw_epoch", "raw"),
        ("val/psnr_raw", "average"),
        ("val/psnr_raw_raw", "raw"),
        ("val/loss_0.5_epoch", "other"),
    ],
)
def test_restored_weights_are_those_of_the_metrics_own_pass(monitor, which):
    loop, seen = Loop(0.9, 0.5), {}

    class Note(Callback):
        def on_validation_end(self, trainer, pl_module):
            raw = {name: tensor.double() for name, tensor in loop.raw.items()}
            seen.update({"average": loop.averages[0], "other": loop.averages[1], "raw": raw})

    stop = lt.EarlyStopping(monitor=monitor, patience=100, mode="min", restore_best=True)
    ema = lt.EMA([0.9, 0.5], evaluate="both")
    _, module = fit([loop, Note(), ema, stop], Named(), max_epochs=1)
    assert_close(parameters(module), {name: seen[which][name] for name in parameters(module)})


def test_loader_index_does_not_hide_the_pass():
    loop = Loop(0.9)
    stop = lt.EarlyStopping(monitor="val/loss_raw_epoch/dataloader_idx_1", patience=100, restore_best=True)
    loaders = [loader(8, seed=5), loader(8, seed=6)]
    _, module = fit([loop, lt.EMA(0.9, evaluate="both"), stop], Named(), val=loaders, max_epochs=1)
    assert_same(parameters(module), {name: loop.raw[name] for name in parameters(module)})


def test_names_of_two_passes_that_meet_are_refused():
    class Meets(Net):
        def validation_step(self, batch, batch_idx):
            self.log_dict({"val/loss": 1.0, "val/loss_raw": 2.0})

    with pytest.raises(ValueError, match=r"EMA: names must be without '_raw' at the end of .* got \['val/loss_raw'\]"):
        fit([lt.EMA(evaluate="both")], Meets())


def test_averages_can_be_looked_at_during_and_after_the_training():
    ema, loop, seen = lt.EMA([0.5, 0.9]), Loop(0.5, 0.9), []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append({name: ema.averaged_weights(name)["head.weight"].clone() for name in (None, "0.9")})

    assert ema.averaged_weights() == {}
    _, module = fit([ema, loop, Look()])
    torch.testing.assert_close(seen[-1][None].double(), loop.averages[0]["head.weight"], rtol=0, atol=1e-6)
    torch.testing.assert_close(seen[-1]["0.9"].double(), loop.averages[1]["head.weight"], rtol=0, atol=1e-6)
    assert_same(ema.averaged_weights()["head.weight"], module.head.weight.detach())
    assert_same(ema.raw_weights()["head.weight"], loop.raw["head.weight"])
    with pytest.raises(ValueError, match=r"EMA: name must be one of 0\.5, 0\.9, got '0.7'"):
        ema.averaged_weights("0.7")


def test_averages_are_found_again_by_name(tmp_path):
    loop = Loop(0.5, 0.9)
    fit([lt.EMA([0.5, 0.9]), every_epoch(tmp_path)], max_epochs=4)
    _, module = fit(
        [lt.EMA([0.9, 0.5]), loop, every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=4
    )
    _, whole = fit([lt.EMA([0.9, 0.5])], max_epochs=4)
    assert_same(snapshot(module), snapshot(whole))


def test_average_that_goes_on_under_another_decay_says_so(tmp_path, caplog):
    fit([lt.EMA(0.5), every_epoch(tmp_path)], max_epochs=1)
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        fit([lt.EMA(0.9), every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "epoch=0.ckpt")
    assert "EMA: the checkpoint's averages ['0.5'] go on as ['0.9']." in caplog.text


def test_what_is_excluded_now_is_not_averaged_after_a_resume(tmp_path):
    loop = Loop(0.9)
    fit([lt.EMA(0.9), every_epoch(tmp_path)], max_epochs=1)
    callbacks = [lt.EMA(0.9, exclude="head.*"), loop, every_epoch(tmp_path / "rest")]
    _, module = fit(callbacks, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(module.head.weight.detach(), loop.raw["head.weight"])
    assert not torch.equal(module.body[1].weight.detach(), loop.raw["body.1.weight"])


def test_buffer_that_validation_takes_away_stays_away():
    class Forgets(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", torch.ones(1))

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.cache = None

    loop = Loop(0.9)
    for dtype in (None, "float64"):
        _, module = fit([lt.EMA(0.9, dtype=dtype), loop], Forgets(), num_sanity_val_steps=0)
        assert module.cache is None
        loop.averages = [{}]
    _, module = fit([lt.EMA(0.9), loop], Forgets(), num_sanity_val_steps=0)
    assert_close(parameters(module), loop.averages[0])


def test_optimizers_that_replace_others_are_followed():
    class Anew(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.trainer.strategy.setup_optimizers(self.trainer)

    ema, loop = lt.EMA(0.9), Loop(0.9)
    _, module = fit([ema, loop], Anew(), max_epochs=3)
    assert ema.updates == 18
    assert_close(parameters(module), loop.averages[0])


@pytest.mark.parametrize("options", [{"include": []}, {"exclude": "*"}, {"include": "*num_batches_tracked"}])
def test_settings_that_leave_nothing_to_average_are_refused(options):
    with pytest.raises(ValueError, match="EMA: include must be patterns of floating weights, got"):
        fit([lt.EMA(**options)])


def interrupted(call, limit):
    """Call a function, with Ctrl-C at the so-manieth line of averages.py; whether it came to that."""
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        if not frame.f_code.co_filename.endswith("averages.py"):
            return None
        lines += event == "line"
        if lines > limit:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("dtype", [None, "float64"])
@pytest.mark.parametrize("step", ["show", "hide"])
def test_interrupt_at_any_line_is_undone_by_hide(step, dtype):
    average = lt.PolyakAverage(0, update_bn=True, dtype=dtype)  # guards a counter
    _, module = fit([average], Spectral(), max_epochs=1)
    averages = average._averages
    shown = snapshot(module)
    averages.hide()
    raw, kept = snapshot(module), {name: tensor.clone() for name, tensor in averages.tensors[0].items()}
    for limit in range(1000):
        if step == "hide":
            averages.show()
        came = interrupted(getattr(averages, step), limit)
        averages.hide()
        assert_same(snapshot(module), raw)
        assert_same(averages.tensors[0], kept)
        averages.show()
        assert_same(snapshot(module), shown)
        averages.hide()
        if not came:
            break
    assert 20 < limit < 999


def test_migration_of_values_reaches_average_and_raw_weights(tmp_path):
    class Doubles(Net):
        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"]["head.weight"] = 2 * checkpoint["state_dict"]["head.weight"]

    fit([lt.EMA(0.9), every_epoch(tmp_path)], max_epochs=1)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    ema, start = lt.EMA(0.9), {}

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            start["raw"], start["average"] = snapshot(pl_module), ema.averaged_weights()["head.weight"].clone()

    fit([ema, Start(), every_epoch(tmp_path / "rest")], Doubles(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(start["raw"]["head.weight"], 2 * saved["current_model_state"]["head.weight"])
    assert_same(start["raw"]["head.bias"], saved["current_model_state"]["head.bias"])
    assert_same(start["average"], 2 * saved["state_dict"]["head.weight"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: lt.EMA(0.9),
        lambda: lt.PolyakAverage(0.5, update_bn=True),
        lambda: lt.PostHocEMA(every_n_steps=5),
        lambda: lt.LRSchedule(lt.Cosine()),
        lambda: lt.SnapshotEnsemble(2),
        lambda: lt.EarlyStopping("val/loss", restore_best=True),
        lambda: lt.BatchTransforms([lt.Mixup(0.5)]),
        lambda: lt.UpdateMonitor(2),
    ],
)
def test_copy_of_a_callback_has_no_module(make):
    class NoCopies(Net):
        def __deepcopy__(self, memo):
            raise AssertionError("the module was copied")

        def __reduce_ex__(self, protocol):
            raise AssertionError("the module was pickled")

    callback = make()
    fit([callback], NoCopies())
    assert copy.deepcopy(callback).settings == callback.settings
    assert pickle.loads(pickle.dumps(callback)).settings == callback.settings


def test_average_of_wide_weights_stays_wide_after_a_resume(tmp_path):
    kinds = []

    class Kinds(Callback):
        def on_train_end(self, trainer, pl_module):
            kinds.append({tensor.dtype for tensor in ema.averaged_weights().values()})

    ema = lt.EMA(0.9)
    fit([ema, Kinds(), every_epoch(tmp_path)], precision="64-true", max_epochs=1)
    ema = lt.EMA(0.9)
    fit([ema, Kinds(), every_epoch(tmp_path / "b")], precision="64-true", ckpt_path=tmp_path / "epoch=0.ckpt")
    assert kinds == [{torch.float64}, {torch.float64}]


def test_hook_that_leaves_the_state_dict_alone_is_called_once(tmp_path):
    class Counts(Net):
        count = 0

        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = 3

        def on_load_checkpoint(self, checkpoint):
            self.count += checkpoint.pop("mine")

    fit([lt.EMA(0.9), every_epoch(tmp_path)], Counts(), max_epochs=1)
    callbacks = [lt.EMA(0.9), every_epoch(tmp_path / "rest")]
    _, module = fit(callbacks, Counts(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert module.count == 3
    assert "on_load_checkpoint" not in vars(module)


class Decays(Callback):
    """What each update of an average weighs the old one with."""

    def __init__(self, ema):
        self.ema, self.decays = ema, []

    def on_train_start(self, trainer, pl_module):
        original = self.ema._averages.update
        self.ema._averages.update = lambda decays: (self.decays.extend(decays), original(decays))

    def on_train_end(self, trainer, pl_module):
        del self.ema._averages.update


def test_growing_decay_goes_on_in_a_second_fit_and_after_a_resume(tmp_path):
    class Plain(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def make():
        ema = lt.EMA(lt.Warmed(0.99), every_n_steps=2)
        return ema, Decays(ema)

    ema, whole = make()
    _, module = fit([ema, whole], Plain(), max_epochs=4)
    ema, first = make()
    _, twice = fit([ema, first, every_epoch(tmp_path)], Plain(), max_epochs=2)
    second = Decays(ema)
    fit([ema, second], twice, max_epochs=2)
    assert first.decays + second.decays == whole.decays
    assert_same(snapshot(twice), snapshot(module))
    ema, rest = make()
    fit([ema, rest, every_epoch(tmp_path / "rest")], Plain(), ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=4)
    assert rest.decays == second.decays


def test_copy_of_a_callback_has_the_averages():
    ema = lt.EMA(0.9)
    _, module = fit([ema])
    twin = copy.deepcopy(ema)
    assert_same(twin.averaged_weights()["head.weight"], module.head.weight.detach())
    assert_same(twin.raw_weights()["head.weight"], ema.raw_weights()["head.weight"])


def test_buffer_that_is_deleted_is_dropped():
    class Deletes(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("extra", torch.ones(1))

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                del self.extra

    loop = Loop(0.9)
    _, module = fit([lt.EMA(0.9), loop], Deletes(), max_epochs=3)
    assert_close(parameters(module), loop.averages[0])
    fit([lt.EMA([0.9, 0.5], evaluate="both"), lt.PostHocEMA(every_n_steps=5)], Deletes(), max_epochs=3)


def test_module_that_has_grown_since_the_checkpoint(tmp_path):
    class Grown(Net):
        strict_loading = False

        def __init__(self):
            super().__init__()
            self.more = nn.Linear(3, 3).requires_grad_(False)

    fit([lt.EMA([0.5, 0.9]), every_epoch(tmp_path)], max_epochs=1)
    callbacks = [lt.EMA([0.5, 0.9]), every_epoch(tmp_path / "rest")]
    _, module = fit(callbacks, Grown(), ckpt_path=tmp_path / "epoch=0.ckpt")
    _, whole = fit([lt.EMA([0.5, 0.9])])
    assert_same(module.head.weight.detach(), whole.head.weight.detach())
    assert_same(callbacks[0].averaged_weights("0.9")["more.weight"], module.more.weight.detach())


def test_average_of_a_name_stays_with_it_when_others_change(tmp_path):
    fit([lt.EMA([0.5, 0.9]), every_epoch(tmp_path)])
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    ema, start = lt.EMA([0.9, 0.99]), {}

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            start.update({name: ema.averaged_weights(name)["head.weight"].clone() for name in ("0.9", "0.99")})

    fit([ema, Start(), every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert_same(start["0.9"], saved["averages"]["0.9"]["head.weight"])
    assert_same(start["0.99"], saved["state_dict"]["head.weight"])


def test_decay_of_a_user_may_be_a_number_of_torch():
    _, module = fit([lt.EMA(lambda updates, total: torch.tensor(0.5, dtype=torch.float64))])
    _, plain = fit([lt.EMA(0.5)])
    assert_same(snapshot(module), snapshot(plain))


def test_stored_averages_follow_other_optimizers_and_are_not_mixed_up_with_another_module(tmp_path):
    class Anew(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.trainer.strategy.setup_optimizers(self.trainer)

    stored = lt.PostHocEMA(every_n_steps=6)
    trainer, _ = fit([stored, every_epoch(tmp_path)], Anew())
    assert [path.name for path in stored.snapshots] == ["snapshot-step=6.pt", "snapshot-step=12.pt"]
    other = Net()
    other.lin, other.head = other.head, nn.Linear(8, 3)
    del other.frozen.bias
    other.frozen.bias = None
    trainer.validate(other.eval(), loader(8), verbose=False)
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    assert "post_hoc_ema" not in torch.load(tmp_path / "other.ckpt", weights_only=True)
