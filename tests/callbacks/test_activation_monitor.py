import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from kit import Batches, ByHand, MemoryLogger, Net, assert_same, fit, loader, make_trainer, plugin_that_skips, snapshot
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_tricks.callbacks.activation_monitor import ActivationMonitor


def loop(parts, ends=None):
    """Mean, deviation and shares of all numbers, by explicit loops in double precision."""
    values = [float(x) for part in parts for x in part.detach().double().flatten()]
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / len(values))
    row = {"mean": mean, "std": std, "zeros": sum(x == 0 for x in values) / len(values)}
    if ends is not None:
        low, high = ends
        margin = 0.01 * (high - low)
        row["saturated"] = sum(x <= low + margin or x >= high - margin for x in values) / len(values)
    return row


class Watched(Net):
    """A module that keeps what its layers put out in training, and the gradients that come to these, by itself."""

    def __init__(self, **options):
        super().__init__(**options)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.wide, self.squash = nn.Linear(3, 3), nn.Tanh()
            nn.init.normal_(self.wide.weight, std=5)
        self.kept, self.came = {}, {}

    def watch(self, name, values):
        if self.training and torch.is_grad_enabled() and self.trainer.training:
            step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
            self.kept.setdefault(step, {}).setdefault(name, []).append(values.detach().clone())
            if values.requires_grad:
                gradients = self.came.setdefault(step, {}).setdefault(name, [])
                values.register_hook(lambda gradient: gradients.append(gradient.clone()) and None)
        return values

    def forward(self, images):
        x = self.body[0](images)
        for name in ("1", "2", "3"):
            x = self.watch(f"body.{name}", self.body.get_submodule(name)(x))
        x = self.watch("head", self.head(self.watch("frozen", self.frozen(x))))
        return self.watch("squash", self.squash(self.watch("wide", self.wide(x))))

    def expected(self, step):
        row = {}
        for name, parts in self.kept[step].items():
            numbers = loop(parts, (-1.0, 1.0) if name == "squash" else None)
            row.update({f"activation_{kind}/{name}": value for kind, value in numbers.items()})
        return row


def ours(logger, words=("activation_", "_gradient_std")):
    rows = {}
    for step, row in logger.rows:
        found = {key: x for key, x in row.items() if any(word in key for word in words)}
        if found:
            assert step not in rows
            rows[step] = found
    return rows


def check(module=None, every=1, rel=1e-4, layers=None, **options):
    logger = MemoryLogger()
    module = Watched() if module is None else module
    fit([ActivationMonitor(every, layers)], module, logger=logger, **options)
    rows = ours(logger)
    assert rows
    assert list(rows) == [step for step in module.kept if (step + 1) % every == 0]
    for step, row in rows.items():
        assert row == pytest.approx(module.expected(step), rel=rel, abs=1e-6)
    return module, logger


def hooks_of(module):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(child, kind)) for child in module.modules() for kind in kinds)


# ------------------------------------------------------------------------------------------------------------ numbers


def test_numbers_are_those_of_explicit_loops():
    _, logger = check()
    row = ours(logger)[3]
    assert {key.partition("/")[2] for key in row} == {"body.1", "body.2", "body.3", "frozen", "head", "wide", "squash"}
    assert 0.1 < row["activation_zeros/body.3"] < 0.9
    assert 0.1 < row["activation_saturated/squash"] < 1
    assert [key for key in row if "saturated" in key] == ["activation_saturated/squash"]


def test_only_every_nth_step_is_logged_and_on_lightnings_own_row():
    _, logger = check(every=4, log_every_n_steps=4, max_epochs=3)
    losses = {step for step, row in logger.rows if "train/loss" in row}
    assert set(ours(logger)) == losses == {3, 7, 11, 15}


def test_all_batches_of_an_accumulated_step_count():
    module, logger = check(accumulate_grad_batches=4, every=2, max_epochs=2)
    assert list(ours(logger)) == [1, 3]
    assert [len(module.kept[step]["head"]) for step in range(4)] == [4, 2, 4, 2]


def test_validation_and_the_sanity_check_do_not_count():
    check(accumulate_grad_batches=3, val_check_interval=1, num_sanity_val_steps=2)


def test_optimization_by_hand_counts_batches():
    class WatchedByHand(Watched, ByHand):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in range(2):
                self.optimizers().zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                self.optimizers().step()

    module, logger = check(WatchedByHand(), every=3)
    assert list(ours(logger)) == [2, 5, 8, 11]
    assert len(module.kept[2]["head"]) == 2


def test_every_call_of_a_shared_layer_counts():
    class Shared(Watched):
        def forward(self, images):
            x = super().forward(images)
            return self.watch("squash", self.squash(2 * self.watch("wide", self.wide(x))))

    module, _ = check(Shared())
    assert len(module.kept[0]["wide"]) == 2


def test_of_two_names_of_one_layer_the_first_is_logged():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.same = self.head

    logger = MemoryLogger()
    fit([ActivationMonitor(1)], Tied(), logger=logger, max_epochs=1)
    assert not [key for row in ours(logger).values() for key in row if key.endswith("/same")]


def test_layers_that_were_not_called_have_no_numbers_and_functions_are_no_layers():
    class Part(Net):
        def forward(self, images):
            return F.relu(self.head(self.body(images)))

    logger = MemoryLogger()
    fit([ActivationMonitor(1)], Part(), logger=logger, max_epochs=1)
    names = {key.partition("/")[2] for row in ours(logger).values() for key in row}
    assert names == {"body.1", "body.2", "body.3", "head"}


def test_layers_by_patterns_containers_too():
    logger = MemoryLogger()
    module = Watched()
    fit([ActivationMonitor(1, ["body.[12]", "body", "squash"])], module, logger=logger, max_epochs=1)
    names = {key.partition("/")[2] for row in ours(logger).values() for key in row}
    assert names == {"body.1", "body.2", "squash"}  # the module calls body's layers past body itself
    logger = MemoryLogger()
    fit([ActivationMonitor(1, "body")], Net(), logger=logger, max_epochs=1)
    assert {key.partition("/")[2] for row in ours(logger).values() for key in row} == {"body"}


def test_of_tuples_and_mappings_the_first_floating_tensor_counts():
    class Pairs(nn.Module):
        def forward(self, x):
            return {"index": x.argmax(1), "values": (3 * x + 1, x)}

    class Structured(Watched):
        def __init__(self):
            super().__init__()
            self.pairs = Pairs()

        def forward(self, images):
            x = super().forward(images)
            self.watch("pairs", 3 * x + 1)
            return self.pairs(x)["values"][1]

    check(Structured(), layers=["body.[123]", "frozen", "head", "wide", "squash", "pairs"])


def test_parametrized_layers_are_measured_and_their_weights_are_not():
    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3, bias=False))

    logger = MemoryLogger()
    fit([ActivationMonitor(1)], Normed(), logger=logger, max_epochs=1)
    names = {key.partition("/")[2] for row in ours(logger).values() for key in row}
    assert names == {"body.1", "body.2", "body.3", "frozen", "head"}


def test_layers_that_work_in_place():
    class InPlace(Watched):
        def __init__(self):
            super().__init__()
            self.body[3] = nn.ReLU(inplace=True)

    plain, other = MemoryLogger(), MemoryLogger()
    fit([ActivationMonitor(1, gradients=True)], Watched(), logger=plain)
    fit([ActivationMonitor(1, gradients=True)], InPlace(), logger=other)
    assert_same(ours(plain), ours(other))


def test_under_autocast_statistics_are_of_single_precision():
    module, _ = check(precision="bf16-mixed", max_epochs=1)
    assert module.kept[0]["head"][0].dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_for_the_backward_pass_does_not_count_twice(reentrant):
    class Checkpointed(Watched):
        def forward(self, images):
            x = checkpoint(self.body, images.requires_grad_(), use_reentrant=reentrant)
            x = self.head(self.frozen(x)) + checkpoint(self.head, x, use_reentrant=reentrant)
            return self.squash(self.wide(x))

    class Plain(Watched):
        def forward(self, images):
            x = self.body(images.requires_grad_())
            return self.squash(self.wide(self.head(self.frozen(x)) + self.head(x)))

    rows = []
    for module in (Checkpointed(), Plain()):
        module.body[2] = nn.Identity()  # a batch norm would count the batch twice, monitor or not
        logger = MemoryLogger()
        monitor = ActivationMonitor(1, gradients=True)
        fit([monitor], module, logger=logger, max_epochs=1, num_sanity_val_steps=0, limit_val_batches=0)
        rows.append(ours(logger))
    assert rows[0].keys() == rows[1].keys()
    for step, row in rows[0].items():
        expected = rows[1][step]
        if reentrant:  # of layers that had no graph in the forward pass there is nothing to wait for
            expected = {key: expected[key] for key in row if key != "output_gradient_std/head"}
            row.pop("output_gradient_std/head")
            missing = {key.partition("/")[2] for key in rows[1][step].keys() - row.keys()}
            assert missing == {"body.1", "body.3", "head"}
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-9)
        assert any(key.startswith("activation_mean") for key in row)


def test_dead_and_broken_layers_are_seen():
    class Dead(Net):
        def __init__(self):
            super().__init__()
            nn.init.constant_(self.body[2].bias, -100)
            nn.init.constant_(self.head.bias, torch.nan)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).nan_to_num()

    logger = MemoryLogger()
    fit([ActivationMonitor(1)], Dead(), logger=logger, max_epochs=1, limit_train_batches=1)
    assert ours(logger)[0]["activation_zeros/body.3"] == 1.0
    assert ours(logger)[0]["activation_std/body.3"] == 0.0
    assert math.isnan(ours(logger)[0]["activation_mean/head"])


# ---------------------------------------------------------------------------------------------------------- gradients


def gradients_of(module, **options):
    logger = MemoryLogger()
    fit([ActivationMonitor(1, gradients=True)], module, logger=logger, **options)
    return ours(logger, ("_gradient_std",))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}])
def test_gradients_are_those_of_explicit_loops(options):
    module = Watched()
    inputs = {"body.2": "body.1", "body.3": "body.2", "frozen": "body.3", "head": "frozen", "wide": "head"}
    inputs["squash"] = "wide"
    rows = gradients_of(module, **options)
    assert list(rows) == list(module.came)
    for step, row in rows.items():
        deviations = {name: loop(parts)["std"] for name, parts in module.came[step].items()}
        expected = {f"output_gradient_std/{name}": deviation for name, deviation in deviations.items()}
        expected |= {f"input_gradient_std/{name}": deviations[before] for name, before in inputs.items()}
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-9)  # images need no gradient: nothing of body.1's input


def test_scaled_gradients_are_unscaled():
    scaled = gradients_of(Net(), plugins=[plugin_that_skips(2.0**10)], max_epochs=1)
    plain = gradients_of(Net(), max_epochs=1)
    assert scaled.keys() == plain.keys()
    for step, row in scaled.items():
        assert row == pytest.approx(plain[step], rel=0.1)


def test_a_derivative_inside_the_loss_is_not_the_losss_gradient():
    class Penalty(Watched):
        def training_step(self, batch, batch_idx):
            images = batch[0].requires_grad_()
            outputs = self(images)
            (slope,) = torch.autograd.grad(outputs.sum(), images, create_graph=True)
            for gradients in self.came[self.global_step].values():
                gradients.clear()
            return F.cross_entropy(outputs, batch[1]) + slope.square().sum()

    module = Penalty()
    rows = gradients_of(module, max_epochs=1)
    for step, row in rows.items():
        for name, parts in module.came[step].items():
            assert row[f"output_gradient_std/{name}"] == pytest.approx(loop(parts)["std"], rel=1e-4, abs=1e-9)


def test_gradients_are_only_measured_on_request():
    logger = MemoryLogger()
    fit([ActivationMonitor(1)], logger=logger, max_epochs=1)
    assert not [key for _, row in logger.rows for key in row if "gradient" in key]


def test_hook_on_a_tensor_that_stays_is_taken_away():
    class Learned(Net):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.randn(4, 8))

        def forward(self, images):
            return super().forward(images) + self.head(self.token)

    module = Learned()
    gradients_of(module, max_epochs=1)
    assert not module.token._backward_hooks


# ------------------------------------------------------------------------------------------- it changes nothing


class Random(Net):
    """With dropout in training."""

    def forward(self, images):
        return super().forward(F.dropout(images, 0.2, self.training))


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}]
)
@pytest.mark.parametrize("gradients", [True, False])
def test_training_is_the_same_to_the_bit(options, gradients):
    def trained(callbacks):
        torch.manual_seed(4)
        trainer, module = fit(callbacks, Random(optimizer="adam"), logger=MemoryLogger(), **options)
        return snapshot(module), module.losses, trainer.optimizers[0].state_dict(), torch.get_rng_state()

    assert_same(trained([ActivationMonitor(1, gradients=gradients)]), trained([]))


class HooksInside(Net):
    """Counts its hooks in every step, and in validation."""

    def __init__(self, **options):
        super().__init__(**options)
        self.counts, self.outside = [], []

    def training_step(self, batch, batch_idx):
        self.counts.append(hooks_of(self))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.outside.append(hooks_of(self))
        return super().validation_step(batch, batch_idx)


def test_hooks_are_not_left_but_are_there_for_logged_steps_alone():
    """Hooks that stay in place slow down every step, and outlive the run."""
    module = HooksInside()
    trainer, _ = fit([ActivationMonitor(4, gradients=True)], module, logger=MemoryLogger(), val_check_interval=1)
    layers = 5
    assert module.counts == [2 * layers if step % 4 == 0 else 0 for step in range(1, 13)]
    assert set(module.outside) == {0}
    assert hooks_of(module) == 0
    trainer.test(module, loader(8), verbose=False)
    assert hooks_of(module) == 0


@pytest.mark.parametrize("fail_at", [("train", 3), ("validation", 6)])
def test_hooks_are_taken_away_after_an_exception(fail_at):
    module = HooksInside(fail_at=fail_at)
    monitor = ActivationMonitor(1, gradients=True)
    with pytest.raises(RuntimeError, match="failed in"):
        fit([monitor], module, logger=MemoryLogger())
    assert module.counts[0] == 10
    assert hooks_of(module) == 0
    assert torch._dynamo.eval_frame._stance.stance == "default"
    module.fail_at = None
    logger = MemoryLogger()
    fit([monitor], module.train(), logger=logger, max_epochs=1)
    assert len(ours(logger)) == 6


def test_epoch_that_the_module_cuts_short_leaves_no_hooks_and_no_half_a_step():
    class Cut(Watched):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 3 else None

        def on_train_epoch_end(self):
            left.append(hooks_of(self))
            del self.kept[self.trainer.fit_loop.epoch_loop._batches_that_stepped]  # its second batch did not come

    left = []
    _, logger = check(Cut(), accumulate_grad_batches=2)
    assert list(ours(logger)) == [0, 1]
    assert left == [0, 0]


def test_no_item_of_every_layer_but_one_transfer_and_one_row_a_logged_step(monkeypatch):
    """Statistics that call `.item()` layer by layer, as fastai's, wait for the device once a number."""
    transfers = []
    for name in ("tolist", "item", "cpu", "numpy", "__float__", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda *a, name=name, original=original, **k: transfers.append(name) or original(*a, **k),
        )

    class Quiet(Net):
        """In double precision a CPU takes norms as a GPU takes all: without looking at them."""

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0].double()), batch[1])

    def transfers_with(callbacks):
        transfers.clear()
        fit(callbacks, Quiet().double(), logger=logger, max_epochs=1, limit_val_batches=0)
        return sorted(transfers)

    logger = MemoryLogger()
    without = transfers_with([])
    assert transfers_with([ActivationMonitor(3, gradients=True)]) == sorted([*without, "tolist", "tolist"])
    assert len(ours(logger)) == 2


def test_no_histograms_and_steps_that_are_not_logged_cost_nothing(monkeypatch):
    """`wandb.watch` and its histograms take a share of every step."""
    monkeypatch.setattr("lightning_tricks.callbacks.activation_monitor.sums", None)
    monkeypatch.setattr("lightning_tricks.callbacks.activation_monitor.partial", None)
    fit([ActivationMonitor(50, gradients=True)], logger=MemoryLogger())


def test_without_a_logger_nothing_is_measured():
    monitor, module = ActivationMonitor(1), HooksInside()
    fit([monitor], module)
    assert monitor.last == {}
    assert set(module.counts) == {0}


def test_lightning_told_to_log_nothing():
    logger = MemoryLogger()
    fit([ActivationMonitor(1)], logger=logger, log_every_n_steps=0, max_epochs=1)
    assert ours(logger) == {}


# ------------------------------------------------------------------------------------------------ company of all sorts


def test_two_ranks_log_the_numbers_of_both_and_the_same(tmp_path):
    class Keep(Callback):
        def on_train_end(self, trainer, pl_module):
            report = {"kept": pl_module.kept, "last": monitor.last, "rows": ours(trainer.logger)}
            torch.save(report, tmp_path / f"{trainer.global_rank}.pt")

    monitor = ActivationMonitor(3, gradients=True)
    options = {"strategy": "ddp_fork", "devices": 2, "logger": MemoryLogger(), "max_epochs": 1}
    fit([monitor, Keep()], Watched(), **options)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["last"] == second["last"]
    assert first["rows"] == {2: first["last"]}
    assert second["rows"] == {}
    for name, parts in first["kept"][2].items():
        both = loop([*parts, *second["kept"][2][name]])
        assert not torch.equal(parts[0], second["kept"][2][name][0])
        for kind in ("mean", "std", "zeros"):
            assert first["last"][f"activation_{kind}/{name}"] == pytest.approx(both[kind], rel=1e-4, abs=1e-6)


def test_layer_that_only_one_rank_calls_is_logged(tmp_path):
    class Sometimes(Net):
        def forward(self, images):
            x = super().forward(images)
            if self.global_rank == 1:
                self.log_of_rank_one(x.detach())
            return x

        def __init__(self):
            super().__init__()
            self.log_of_rank_one = nn.Tanh()

    class Keep(Callback):
        def on_train_end(self, trainer, pl_module):
            torch.save(monitor.last, tmp_path / f"{trainer.global_rank}.pt")

    monitor = ActivationMonitor(3)
    fit([monitor, Keep()], Sometimes(), strategy="ddp_fork", devices=2, logger=MemoryLogger(), max_epochs=1)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second
    assert "activation_saturated/log_of_rank_one" in first


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
@pytest.mark.parametrize("which", ["module", "submodule", "in place"])
def test_compiled_modules_are_measured_under_their_own_names(which):
    class Quiet(Net):  # what Lightning's log() does cannot be compiled
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    module = Quiet()
    if which == "submodule":
        module.body = torch.compile(module.body, backend="eager")
        module.head = torch.compile(module.head, backend="eager")
    elif which == "in place":
        module.body.compile(backend="eager")
    given = torch.compile(module, backend="eager") if which == "module" else module
    logger, plain = MemoryLogger(), MemoryLogger()
    trainer = make_trainer([ActivationMonitor(2, gradients=True)], logger=logger)
    trainer.fit(given, loader(), loader(8))
    fit([ActivationMonitor(2, gradients=True)], logger=plain)
    assert list(ours(logger)) == list(ours(plain)) == [1, 3, 5, 7, 9, 11]
    for step, row in ours(logger).items():
        assert row == pytest.approx(ours(plain)[step], rel=1e-4, abs=1e-6)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_batches_that_are_none_are_passed_over():
    batches = [batch if index % 3 else None for index, batch in enumerate(loader())]
    logger = MemoryLogger()
    with pytest.warns(UserWarning, match="train_dataloader yielded None"):
        fit([ActivationMonitor(1)], train=Batches(batches), logger=logger, max_epochs=1)
    assert [len(row) for row in ours(logger).values()] == [15] * 4


def test_layers_inside_a_transform_of_functions_are_passed_over():
    class PerSample(Net):
        def training_step(self, batch, batch_idx):
            torch.func.vmap(self.head)(torch.randn(3, 8))
            return super().training_step(batch, batch_idx)

    logger, plain = MemoryLogger(), MemoryLogger()
    fit([ActivationMonitor(1, gradients=True)], PerSample(), logger=logger, max_epochs=1)
    fit([ActivationMonitor(1, gradients=True)], Net(), logger=plain, max_epochs=1)
    assert_same(ours(logger), ours(plain))


def test_copies_in_the_middle_of_a_step_are_inert():
    class CopiesItself(Net):
        def training_step(self, batch, batch_idx):
            self.__dict__["twins"] = [copy.deepcopy(self), pickle.loads(pickle.dumps(self))]
            return super().training_step(batch, batch_idx)

    CopiesItself.__module__, CopiesItself.__qualname__ = __name__, "CopiesItself"
    globals()["CopiesItself"] = CopiesItself
    module, monitor = CopiesItself(), ActivationMonitor(1)
    fit([monitor], module, logger=MemoryLogger(), max_epochs=1, limit_train_batches=1)
    last = dict(monitor.last)
    for twin in module.twins:
        twin(torch.randn(4, 1, 4, 4)).sum().backward()
        (hook,) = twin.head._forward_hooks.values()
        assert hook.func.__self__ is not monitor
        assert hook.func.__self__._sums == {}
    assert monitor.last == last


def test_copies_of_the_callback_keep_its_settings_and_nothing_of_the_run():
    monitor = ActivationMonitor(2, ["body.*"], gradients=True)
    fit([monitor], logger=MemoryLogger(), max_epochs=1)
    for twin in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert twin.settings == monitor.settings == {"every_n_steps": 2, "layers": ["body.*"], "gradients": True}
        assert twin.last == monitor.last
        assert "log" not in vars(twin)


def test_second_fit_measures_again():
    logger, monitor = MemoryLogger(), ActivationMonitor(3)
    trainer, module = fit([monitor], logger=logger, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), loader(8))
    assert list(ours(logger)) == [2, 5, 8, 11]


def test_settings_are_in_the_run_configuration():
    logger = MemoryLogger()
    fit([ActivationMonitor(3, "body.*")], logger=logger, max_epochs=1)
    expected = {"every_n_steps": 3, "layers": ["body.*"], "gradients": False}
    assert logger.hparams["tricks"]["ActivationMonitor"] == expected


def test_module_without_layers():
    class Bare(Net):
        def __init__(self):
            super().__init__()
            del self.body, self.frozen, self.head
            self.weight = nn.Parameter(torch.zeros(16, 3))

        def forward(self, images):
            return images.flatten(1) @ self.weight

    logger = MemoryLogger()
    fit([ActivationMonitor(1)], Bare(), logger=logger, max_epochs=1)
    assert ours(logger) == {}


# ------------------------------------------------------------------------------------------------------------- refusals


def test_two_are_refused():
    with pytest.raises(ValueError, match="ActivationMonitor: callbacks must be the only one of its kind"):
        fit([ActivationMonitor(1), ActivationMonitor(2)])


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_modules_are_left_out_and_refused_by_name():
    module, logger = Net(), MemoryLogger()
    module.body = torch.jit.script(module.body)
    fit([ActivationMonitor(1, gradients=True)], module, logger=logger, max_epochs=1)
    names = {key.partition("/")[2] for _, row in logger.rows for key in row if key.startswith("activation")}
    assert names == {"frozen", "head"}
    with pytest.raises(ValueError, match=r"layers must be patterns without modules of TorchScript, got 'body.0, "):
        fit([ActivationMonitor(50, ["body.*", "head"])], module, logger=logger)


def test_pattern_without_a_module_is_refused_before_training():
    module = Net()
    with pytest.raises(ValueError, match=r"ActivationMonitor: layers must be patterns of module names, got 'legs.\*'"):
        fit([ActivationMonitor(50, ["body.*", "legs.*"])], module, logger=MemoryLogger())
    assert module.losses == []


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"every_n_steps": 0},
            ValueError,
            r"every_n_steps must be a whole number of at least 1 \(optimizer steps\), got 0",
        ),
        ({"every_n_steps": 2.0}, TypeError, "every_n_steps must be a whole number"),
        ({"layers": 3}, TypeError, "layers must be patterns of module names, got 3"),
        ({"layers": [nn.ReLU]}, TypeError, "layers must be patterns of module names, got "),
        ({"layers": []}, ValueError, r"layers must be one pattern at least, got \[\]"),
        ({"gradients": 1}, TypeError, "gradients must be True or False, got 1"),
    ],
)
def test_arguments_out_of_range(arguments, error, words):
    with pytest.raises(error, match=f"ActivationMonitor: {words}"):
        ActivationMonitor(**arguments)
