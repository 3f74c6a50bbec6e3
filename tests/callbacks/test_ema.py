import copy
import logging

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from kit import (
    Net,
    ResumableLoader,
    TwoOptimizers,
    assert_same,
    every_epoch,
    fit,
    loader,
    make_trainer,
    plugin_that_skips,
    snapshot,
)
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lightning_tricks as lt


class Oracle(Callback):
    """torch's own averaged model, updated after each batch; keeps the raw weights and what validation saw."""

    def __init__(self, decay=0.9):
        self.decay = decay
        self.averaged = None
        self.validated, self.expected, self.raw = [], [], {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        if self.averaged is None:
            self.averaged = AveragedModel(
                copy.deepcopy(pl_module), multi_avg_fn=get_ema_multi_avg_fn(self.decay), use_buffers=False
            )
        self.averaged.update_parameters(pl_module)
        self.raw = snapshot(pl_module)

    def on_validation_epoch_start(self, trainer, pl_module):
        if self.averaged is not None:
            self.validated.append(parameters(pl_module))
            self.expected.append(parameters(self.averaged.module))


def parameters(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def learned(state):
    return {name: state[name] for name, _ in Net().named_parameters()}


def test_it_is_torch_ema_and_validation_sees_it():
    oracle = Oracle()
    _, module = fit([lt.EMA(decay=0.9), oracle], max_epochs=3)
    assert_same(oracle.validated, oracle.expected)
    assert len(oracle.validated) == 3
    assert_same(parameters(module), parameters(oracle.averaged.module))


def test_an_update_is_one_foreach_call(monkeypatch):
    calls, original = [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *args: calls.append(len(args[0])) or original(*args))
    ema = lt.EMA(decay=0.9)
    fit([ema], max_epochs=1)
    assert calls == [10] * 5  # six learned, two frozen parameters and two buffers, at each step but the first


def test_training_goes_as_if_nobody_averaged():
    _, module = fit([lt.EMA(decay=0.9)])
    _, plain = fit([])
    assert module.losses == plain.losses


def test_first_update_copies_and_the_initial_weights_are_never_averaged():
    ema = lt.EMA(decay=0.9)
    _, module = fit([ema], max_epochs=1, limit_train_batches=1)
    _, plain = fit([], max_epochs=1, limit_train_batches=1)
    assert ema.updates == 1
    assert_same(snapshot(module), snapshot(plain))


def test_validation_before_the_first_step_sees_the_raw_weights():
    seen = []

    class Look(Callback):
        def on_validation_epoch_start(self, trainer, pl_module):
            seen.append(parameters(pl_module))

    fit([lt.EMA(decay=0.9), Look()], plugins=[plugin_that_skips(2.0**100)], limit_train_batches=3, max_epochs=1)
    assert_same(seen, [parameters(Net()), parameters(Net())])


def test_buffers_of_numbers_are_averaged_and_others_copied():
    raw, averages, decay = [], None, 0.9

    class Buffers(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            raw.append(snapshot(pl_module))

    _, module = fit([lt.EMA(decay=decay), Buffers()])
    for state in raw:
        mean = state["body.2.running_mean"].double()
        averages = mean if averages is None else decay * averages + (1 - decay) * mean
    torch.testing.assert_close(module.body[2].running_mean.double(), averages, rtol=0, atol=1e-6)
    assert module.body[2].num_batches_tracked.item() == 12  # an average of counts would say 8 or so
    assert module.mask.tolist() == [0.0, -torch.inf]  # an average of -inf would be NaN


def test_buffer_that_is_assigned_anew_is_followed():
    class Assigns(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("center", torch.zeros(1))

        def training_step(self, batch, batch_idx):
            self.center = self.center + 1
            return super().training_step(batch, batch_idx)

    _, module = fit([lt.EMA(decay=0.5)], Assigns(), max_epochs=1)
    average = 1.0
    for count in range(2, 7):
        average = 0.5 * average + 0.5 * count
    assert module.center.item() == pytest.approx(average)


def test_buffer_that_no_checkpoint_holds_stays():
    class Extra(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("scratch", torch.zeros(1), persistent=False)

        def training_step(self, batch, batch_idx):
            self.scratch += 1
            return super().training_step(batch, batch_idx)

    _, module = fit([lt.EMA(decay=0.5)], Extra(), max_epochs=1)
    assert module.scratch.item() == 6


def test_tied_weights_stay_tied_and_are_averaged_once():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.twin = nn.Linear(8, 3)
            self.twin.weight = self.head.weight

    oracle = Oracle()
    _, module = fit([lt.EMA(decay=0.9), oracle], Tied())
    assert module.twin.weight is module.head.weight
    assert_same(parameters(module), parameters(oracle.averaged.module))


def test_module_that_writes_its_own_state_dict():
    """The module's own hooks on its state dict apply to the average and to the raw weights alike."""

    class Renames(Net):
        def state_dict(self, *args, **kwargs):
            return {f"renamed.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}

        def load_state_dict(self, state, strict=True, assign=False):
            return super().load_state_dict({k.removeprefix("renamed."): v for k, v in state.items()}, strict, assign)

    oracle = Oracle()
    trainer, _ = fit([lt.EMA(decay=0.9), oracle], Renames())
    checkpoint = trainer._checkpoint_connector.dump_checkpoint()
    for name, value in parameters(oracle.averaged.module).items():
        assert_same(checkpoint["state_dict"][f"renamed.{name}"], value)
        assert_same(checkpoint["current_model_state"][f"renamed.{name}"], oracle.raw[f"renamed.{name}"])


class WithBuffer(Net):
    """A buffer that each training step changes."""

    def __init__(self, change, start):
        super().__init__()
        self.register_buffer("extra", start)
        self.change = change

    def training_step(self, batch, batch_idx):
        self.extra = self.change(self.extra)
        return super().training_step(batch, batch_idx)


def test_buffer_that_grows_or_is_taken_away_stays_as_the_module_has_it():
    _, module = fit([lt.EMA(0.9)], WithBuffer(lambda bank: torch.cat([bank, torch.ones(1)]), torch.zeros(1)))
    assert module.extra.tolist() == [0.0] + [1.0] * 12
    _, module = fit([lt.EMA(0.9)], WithBuffer(lambda bank: None, torch.zeros(1)))
    assert module.extra is None


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_buffer_stays_as_the_module_has_it(layout):
    graph = torch.eye(3).to_sparse(layout=layout)
    trainer, module = fit([lt.EMA(0.9)], WithBuffer(lambda same: same, graph))
    assert module.extra is graph
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader(), loader(8))


def parametrized(layer):
    return nn.utils.parametrizations.spectral_norm(layer)


class Scaled(nn.Module):
    def forward(self, weight):
        return 3 * weight.flip(0)


def scaled_first(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", Scaled())
    return parametrized(layer)


def test_spectral_norm_behind_a_weight_of_two_tensors_is_refused():
    module = Net()
    parametrized(nn.utils.parametrizations.weight_norm(module.head))
    with pytest.raises(ValueError, match="EMA: parametrizations must be of one tensor before spectral norm"):
        fit([lt.EMA()], module)


@pytest.mark.filterwarnings("ignore:EarlyStopping. mode=")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated")
@pytest.mark.parametrize("norm", [parametrized, nn.utils.spectral_norm, scaled_first])
def test_spectral_norm_normalises_the_average(norm):
    class Spectral(Net):
        def __init__(self):
            super().__init__()
            self.head = norm(nn.Linear(8, 3))

    def norm_after(callbacks):
        trainer, module = fit(callbacks, Spectral(), max_epochs=6)
        module.eval()
        module(torch.zeros(2, 1, 4, 4))
        return torch.linalg.matrix_norm(module.head.weight.detach(), 2).item(), trainer, module

    best = {"monitor": "val/loss", "mode": "max", "patience": 100, "restore_best": True}
    for callbacks in ([], [lt.EarlyStopping(**best)]):
        for ordered in ([lt.EMA(0.99), *callbacks], [*callbacks, lt.EMA(0.99)]):
            top, trainer, module = norm_after(ordered)
            assert top == pytest.approx(1, abs=1e-3)
    loaded = Spectral()
    trainer.save_checkpoint("spectral.ckpt")
    loaded.load_state_dict(torch.load("spectral.ckpt", weights_only=True)["state_dict"])
    loaded.eval()
    assert_same(loaded(torch.ones(2, 1, 4, 4)), module(torch.ones(2, 1, 4, 4)))


# --------------------------------------------------------------------------------------------------------- checkpoints


class SaveEverywhere(Callback):
    """Checkpoints from wherever a user may write one, with the weights that are right at that moment."""

    def __init__(self, folder):
        self.folder = folder
        self.expected = {}

    def save(self, trainer, place, **options):
        if self.oracle.averaged is not None:
            trainer.save_checkpoint(self.folder / f"{place}.ckpt", **options)
            self.expected[place] = parameters(self.oracle.averaged.module), learned(self.oracle.raw)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 3:
            self.save(trainer, "in_training")
            self.save(trainer, "weights_only_in_training", weights_only=True)

    def on_validation_start(self, trainer, pl_module):
        self.save(trainer, "validation_start")

    def on_validation_batch_end(self, trainer, pl_module, *args):
        self.save(trainer, "swapped")
        self.save(trainer, "weights_only_swapped", weights_only=True)

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, "epoch_end")

    def on_train_end(self, trainer, pl_module):
        self.save(trainer, "train_end")

    def on_fit_end(self, trainer, pl_module):
        self.save(trainer, "fit_end")


@pytest.mark.parametrize("order", ["first", "last"])
def test_average_and_raw_weights_are_under_the_right_keys_wherever_it_is_saved(order, tmp_path):
    oracle, save, ema = Oracle(), SaveEverywhere(tmp_path), lt.EMA(decay=0.9)
    save.oracle = oracle
    trainer, module = fit([oracle, ema, save] if order == "first" else [oracle, save, ema])
    trainer.save_checkpoint(tmp_path / "after_fit.ckpt")
    save.expected["after_fit"] = parameters(oracle.averaged.module), learned(oracle.raw)
    trainer.validate(module, loader(8), verbose=False)
    trainer.save_checkpoint(tmp_path / "after_validate.ckpt")
    save.expected["after_validate"] = save.expected["after_fit"]
    assert len(save.expected) == 11
    for place, (average, raw) in save.expected.items():
        checkpoint = torch.load(tmp_path / f"{place}.ckpt", weights_only=True)
        assert_same(learned(checkpoint["state_dict"]), average, place)
        if "weights_only" in place:
            assert "current_model_state" not in checkpoint
        else:
            assert_same(learned(checkpoint["current_model_state"]), raw, place)


def test_load_from_checkpoint_gives_the_average(tmp_path):
    _, module = fit([lt.EMA(decay=0.9), every_epoch(tmp_path)])
    loaded = Net.load_from_checkpoint(tmp_path / "epoch=1.ckpt")
    assert_same(snapshot(loaded), snapshot(module))


def test_weights_only_model_checkpoint_holds_the_average(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_weights_only=True, save_top_k=-1)
    _, module = fit([lt.EMA(decay=0.9), save])
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert_same(dict(saved), snapshot(module))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_lightnings_own_averaging_reads_our_checkpoint(tmp_path):
    oracle = Oracle()
    fit([lt.EMA(decay=0.9), oracle, every_epoch(tmp_path)], max_epochs=1)
    theirs = EMAWeightAveraging(decay=0.9, use_buffers=False)
    _, module = fit([theirs, every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=1)
    assert_same(learned(theirs._average_model.module.state_dict()), parameters(oracle.averaged.module))
    assert_same(learned(module.state_dict()), learned(oracle.raw))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_we_read_the_checkpoint_of_lightnings_own_averaging(tmp_path):
    fit([EMAWeightAveraging(decay=0.9, use_buffers=False), every_epoch(tmp_path)], max_epochs=1)
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    ema, start, updates = lt.EMA(decay=0.9), [], []

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            start.append(parameters(pl_module))

        def on_train_batch_end(self, *args):
            updates.append(ema.updates)

    fit([ema, Start(), every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert_same(start, [learned(checkpoint["current_model_state"])])
    assert updates == [7, 8, 9, 10, 11, 12]


def test_ema_that_joins_a_resumed_run_starts_after_its_first_step(tmp_path):
    fit([every_epoch(tmp_path)], max_epochs=1)
    ema = lt.EMA(decay=0.9)
    fit([ema, every_epoch(tmp_path / "rest")], ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert ema.updates == 6


def test_resume_without_a_part_of_the_module(tmp_path):
    class Larger(Net):
        def __init__(self):
            super().__init__()
            self.auxiliary = nn.Linear(2, 2)

    class Smaller(Net):
        strict_loading = False

    fit([lt.EMA(0.9), every_epoch(tmp_path)], Larger(), max_epochs=1)
    ema = lt.EMA(0.9)
    with pytest.raises(ValueError, match="optimizer"):  # Lightning's own refusal, once the weights are loaded
        fit([ema, every_epoch(tmp_path / "rest")], Smaller(), ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert ema.updates == 6


def test_resume_of_a_module_that_renames_its_keys(tmp_path):
    oracle = Oracle()
    fit([lt.EMA(0.9), oracle, every_epoch(tmp_path)], max_epochs=1)

    class Renamed(Net):
        def __init__(self):
            super().__init__()
            self.classifier = self.head
            del self.head

        def forward(self, images):
            return self.classifier(self.frozen(self.body(images)))

        def on_load_checkpoint(self, checkpoint):
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {key.replace("head.", "classifier."): value for key, value in state.items()}

    ema, start = lt.EMA(0.9), []

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            start.append(parameters(pl_module))

    callbacks = [ema, Start(), every_epoch(tmp_path / "rest")]
    fit(callbacks, Renamed(), ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert_same(start[0]["classifier.weight"], oracle.raw["head.weight"])
    assert ema.updates == 12


def test_stages_with_a_checkpoint_see_the_average(tmp_path):
    _, module = fit([lt.EMA(decay=0.9), every_epoch(tmp_path)])
    other = Net()
    trainer = make_trainer([lt.EMA(decay=0.9), every_epoch(tmp_path / "rest")])
    trainer.test(other, loader(8), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert_same(snapshot(other), snapshot(module))


# ----------------------------------------------------------------------------------------------- several fits, failures


def test_second_fit_of_a_changed_module_starts_a_new_average(caplog):
    ema = lt.EMA(decay=0.9)
    trainer, module = fit([ema])
    module.load_state_dict(Net().state_dict())
    start = []

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            start.append(parameters(pl_module))

    trainer.callbacks.append(Start())
    trainer.fit_loop.max_epochs = 3
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        trainer.fit(module, loader(), loader(8))
    assert ema.updates == 6
    assert_same(start, [parameters(Net())])
    assert "a new average starts" in caplog.text


def test_second_fit_of_a_module_whose_rows_were_swapped_starts_a_new_average():
    ema = lt.EMA(decay=0.9)
    trainer, module = fit([ema])
    with torch.no_grad():
        module.head.weight.copy_(module.head.weight.flip(0))
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader(), loader(8))
    assert ema.updates == 6


def test_checkpoint_of_a_module_that_was_changed_after_fit_is_that_module(tmp_path):
    trainer, module = fit([lt.EMA(decay=0.9)])
    module.load_state_dict(Net().state_dict())
    trainer.save_checkpoint(tmp_path / "changed.ckpt")
    checkpoint = torch.load(tmp_path / "changed.ckpt", weights_only=True)
    assert_same(dict(checkpoint["state_dict"]), snapshot(Net()))
    assert "current_model_state" not in checkpoint


def test_another_module_in_the_same_trainer_gets_an_average_of_its_own():
    ema = lt.EMA(decay=0.9)
    trainer, _ = fit([ema])
    trainer.fit_loop.epoch_progress.reset()
    trainer.fit_loop.epoch_loop.batch_progress.reset()
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.reset()
    other = Net(lr=0.01)
    trainer.fit(other, loader(), loader(8))
    oracle = Oracle()
    _, expected = fit([lt.EMA(decay=0.9), oracle], Net(lr=0.01))
    assert_same(parameters(other), parameters(expected))


def test_refit_after_an_exception_goes_on_with_the_average():
    ema = lt.EMA(decay=0.9)
    module = Net(fail_at=("validation", 6))
    trainer = make_trainer([ema])
    with pytest.raises(RuntimeError, match="failed in validation"):
        trainer.fit(module, loader(), loader(8))
    assert ema.updates == 6
    module.fail_at = None
    module.train()  # Lightning leaves it in eval mode
    trainer = make_trainer([ema], max_epochs=1)
    trainer.fit(module, loader(), loader(8))
    assert ema.updates == 12


def test_exception_checkpoint_has_the_right_order_of_weights(tmp_path):
    oracle = Oracle()
    with pytest.raises(RuntimeError, match="failed in validation"):
        fit(
            [lt.EMA(decay=0.9), oracle, OnExceptionCheckpoint(tmp_path)],
            Net(fail_at=("validation", 6)),
            train=ResumableLoader(),
        )
    checkpoint = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert_same(learned(checkpoint["state_dict"]), parameters(oracle.averaged.module))
    assert_same(learned(checkpoint["current_model_state"]), learned(oracle.raw))


def test_error_before_a_second_fit_begins_leaves_the_average():
    class Fails(Callback):
        def setup(self, trainer, pl_module, stage):
            if trainer.global_step:
                raise RuntimeError("failed in setup")

    ema = lt.EMA(decay=0.9)
    trainer, module = fit([ema, Fails()])
    average = snapshot(module)
    trainer.fit_loop.max_epochs = 3
    with pytest.raises(RuntimeError, match="failed in setup"):
        trainer.fit(module, loader(), loader(8))
    assert_same(snapshot(module), average)


def test_several_validations_an_epoch():
    oracle = Oracle()
    fit([lt.EMA(decay=0.9), oracle], val_check_interval=2)
    assert len(oracle.validated) == 6
    assert_same(oracle.validated, oracle.expected)


def test_gan_like_module_counts_each_optimizers_steps():
    ema = lt.EMA(decay=0.9)
    fit([ema], TwoOptimizers(), max_epochs=1)
    assert ema.updates == 6 + 3  # the second one steps every other batch


def test_compiled_module():
    module = Net()
    module.body = torch.compile(module.body, backend="eager")
    oracle = Oracle()
    oracle.on_train_batch_end = lambda *args: None
    seen = []

    class Look(Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(trainer.callback_metrics["val/loss"].item())

    fit([lt.EMA(decay=0.9), Look()], module, max_epochs=2)
    expected = []

    class LookPlain(Callback):
        def on_validation_end(self, trainer, pl_module):
            expected.append(trainer.callback_metrics["val/loss"].item())

    fit([lt.EMA(decay=0.9), LookPlain()], max_epochs=2)
    assert seen == pytest.approx(expected, abs=1e-6)


def test_configure_model():
    class Late(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    oracle = Oracle()
    _, module = fit([lt.EMA(decay=0.9), oracle], Late())
    assert_same(parameters(module), parameters(oracle.averaged.module))


def test_complex_and_double_parameters():
    class Strange(Net):
        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
            self.wide = nn.Parameter(torch.ones(2, dtype=torch.float64))
            self.empty = nn.Parameter(torch.ones(0))

        def training_step(self, batch, batch_idx):
            extra = self.phase.abs().sum() + self.wide.float().sum() + self.empty.sum()
            return super().training_step(batch, batch_idx) + 0.1 * extra

    oracle = Oracle()
    _, module = fit([lt.EMA(decay=0.9), oracle], Strange())
    assert_same(
        {name: torch.view_as_real(p) if p.is_complex() else p for name, p in parameters(module).items()},
        {
            name: torch.view_as_real(p) if p.is_complex() else p
            for name, p in parameters(oracle.averaged.module).items()
        },
    )


def test_no_module_is_copied_and_one_copy_of_the_weights_is_held():
    class NoCopies(Net):
        def __deepcopy__(self, memo):
            raise AssertionError("the module was copied")

    ema = lt.EMA(decay=0.9)
    _, module = fit([ema], NoCopies())
    module_storages = {tensor.data_ptr() for tensor in module.state_dict().values()}
    held = {t.data_ptr() for part in (ema._averages.tensors[0], ema._averages.raw) for t in part.values()}
    assert len(held - module_storages) == len(ema._averages.raw)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(("decay", "error"), [(1.0, ValueError), (-0.1, ValueError), (float("nan"), ValueError)])
def test_decay_out_of_range(decay, error):
    with pytest.raises(error, match=r"EMA: decay must be in \[0, 1\), got"):
        lt.EMA(decay=decay)


@pytest.mark.parametrize("decay", ["0.9", None, True])
def test_decay_of_another_type(decay):
    with pytest.raises(TypeError, match=r"EMA: decay must be a number in \[0, 1\), got"):
        lt.EMA(decay=decay)


def test_lightnings_averaging_beside_ours_is_refused():
    with pytest.raises(ValueError, match="EMA: callbacks must be the only one that averages, got"):
        fit([lt.EMA(), EMAWeightAveraging()])
    with pytest.raises(ValueError, match="EMA: callbacks must be the only one that averages, got"):
        fit([lt.EMA(), StochasticWeightAveraging(swa_lrs=0.1)])


def test_pruning_beside_it_is_refused():
    with pytest.raises(ValueError, match="EMA: callbacks must be without ModelPruning, got 'ModelPruning'"):
        fit([lt.EMA(), ModelPruning("l1_unstructured")])


def test_half_precision_weights_are_refused():
    with pytest.raises(ValueError, match=r"EMA: precision must be one with float32 weights, got torch\.bfloat16"):
        fit([lt.EMA()], precision="bf16-true")


def test_sharded_strategy_is_refused():
    from lightning.pytorch.strategies import ModelParallelStrategy

    from lightning_tricks.callbacks.steps import refuse_sharded

    class Sharded:
        strategy = ModelParallelStrategy()

    with pytest.raises(ValueError, match="EMA: strategy must be one that keeps whole parameters on each rank"):
        refuse_sharded("EMA", Sharded())
