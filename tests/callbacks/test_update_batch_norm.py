"""Batch-norm statistics estimated anew during a run: those of all the training data, and a run that does not notice."""

import numpy as np
import pytest
import torch
from kit import Batches, Net, ResumableLoader, assert_same, data, fit, loader, snapshot
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

import lightning_tricks as lt
from lightning_tricks.callbacks import batch_norm
from lightning_tricks.callbacks.batch_norm import update_batch_norm

TWO = {"strategy": "ddp_fork", "devices": 2}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def norms_of(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm1d)]


def inputs_of_norm(module, images):
    with torch.no_grad():
        return module.body[:2](images).double()


class Estimate(Callback):
    """Estimate the statistics at some moment, note them, and put the module's own back."""

    def __init__(self, when="on_validation_start", forward=None, images=None, layers=norms_of):
        self.forward, self.layers = forward, layers
        self.images = data().tensors[0] if images is None else images
        self.found, self.expected, self.modes = [], [], []
        setattr(self, when, self.estimate)

    def estimate(self, trainer, pl_module, *args):
        if trainer.sanity_checking:
            return
        before = snapshot(pl_module)
        modes, stage = [child.training for child in pl_module.modules()], trainer.state.stage
        self.expected.append(inputs_of_norm(pl_module, self.images))
        try:
            update_batch_norm("Estimate", trainer, pl_module, self.layers(pl_module), self.forward)
        finally:
            assert [child.training for child in pl_module.modules()] == modes
            assert trainer.state.stage == stage
            layer = pl_module.body[2]
            self.found.append({name: getattr(layer, name).clone() for name in STATISTICS})
            self.after = snapshot(pl_module)
            self.before = before
            assert not any(buffer.is_inference() for buffer in pl_module.buffers())
            with torch.inference_mode(False):
                pl_module.load_state_dict(before)

    def check(self, calls, batches=6):
        assert len(self.found) == calls
        for found, expected in zip(self.found, self.expected, strict=True):
            torch.testing.assert_close(found["running_mean"], expected.mean(0).float(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found["running_var"], expected.var(0).float(), rtol=1e-5, atol=0)
            assert found["num_batches_tracked"] == batches


class Stream(IterableDataset):
    """Single samples, that go on where they were."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        for index in range(self.position, 24):
            self.position = (index + 1) % 24
            yield data()[index]

    def __len__(self):
        return 24

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class StatefulSampler(Sampler):
    """An order that can be resumed in the middle, from a state of its own."""

    def __init__(self):
        self.start = self.at = 0

    def __len__(self):
        return 24

    def __iter__(self):
        start, self.start = self.start, 0
        for self.at in range(start + 1, 25):
            yield self.at - 1
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.start = self.at = state["at"]


class Noisy(Dataset):
    """Draws from a generator of its own, from numpy's and from Python's."""

    def __init__(self):
        self.own = np.random.default_rng(1)

    def __len__(self):
        return 24

    def __getitem__(self, index):
        images, labels = data()[index]
        return images, (labels + int(self.own.integers(3)) + int(np.random.randint(3))) % 3


class Wrapper:
    """An iterable around a loader with a worker that stays."""

    def __init__(self):
        self.loader = persistent()

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        yield from self.loader


def persistent():
    options = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    return DataLoader(data(), 4, shuffle=True, **options)


def with_own_generator():
    return DataLoader(data(), 4, shuffle=True, generator=torch.Generator().manual_seed(5))


def with_sampler_of_own_generator():
    return DataLoader(data(), 4, sampler=RandomSampler(data(), generator=torch.Generator().manual_seed(5)))


LOADERS = {
    "plain": loader,
    "shuffled": lambda: DataLoader(data(), 4, shuffle=True),
    "generator of its own": with_own_generator,
    "sampler's generator": with_sampler_of_own_generator,
    "resumable": ResumableLoader,
    "persistent worker": persistent,
    "wrapped": Wrapper,
    "stream": lambda: DataLoader(Stream(), 4),
    "stateful sampler": lambda: DataLoader(data(), 4, sampler=StatefulSampler()),
    "noisy": lambda: DataLoader(Noisy(), 4, shuffle=True),
}


def run(make_loader, callbacks, module=None, **options):
    torch.manual_seed(7)
    np.random.seed(7)
    _, module = fit(callbacks, module, train=make_loader(), **{"max_epochs": 2, "val_check_interval": 3, **options})
    return {"seen": module.seen, "losses": module.losses, "state": snapshot(module), "rng": torch.get_rng_state()}


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize("name", LOADERS)
def test_a_run_does_not_notice_that_statistics_are_estimated_in_the_middle_of_an_epoch(name):
    estimate = Estimate()
    expected, got = run(LOADERS[name], []), run(LOADERS[name], [estimate])
    assert_same(got, expected)
    assert len(got["losses"]) == 12
    estimate.check(calls=4)


@pytest.mark.parametrize("when", ["on_train_start", "on_train_epoch_end", "on_train_batch_end", "on_train_end"])
def test_it_may_be_called_whenever_the_data_are_there(when):
    estimate = Estimate(when)
    options = {"max_epochs": 2, "val_check_interval": 1.0}
    expected, got = run(LOADERS["shuffled"], [], **options), run(LOADERS["shuffled"], [estimate], **options)
    assert_same(got, expected)
    estimate.check(calls={"on_train_epoch_end": 2, "on_train_batch_end": 12}.get(when, 1))


def test_in_validation_the_module_makes_ordinary_tensors():
    made = []
    estimate = Estimate(forward=lambda module, batch: made.append(module(batch[0])))
    run(loader, [estimate])
    assert len(made) == 24
    assert not any(output.is_inference() or output.requires_grad for output in made)


def test_the_statistics_are_left_in_the_module():
    class AtTheEnd(Callback):
        def on_train_end(self, trainer, pl_module):
            update_batch_norm("AtTheEnd", trainer, pl_module, norms_of(pl_module))

    _, module = fit([AtTheEnd()])
    inputs = inputs_of_norm(module, data().tensors[0])
    torch.testing.assert_close(module.body[2].running_mean, inputs.mean(0).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module.body[2].running_var, inputs.var(0).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("limit", "batches"), [(2, 2), (0.5, 3)])
def test_only_as_many_batches_as_are_trained_on(limit, batches):
    estimate = Estimate(images=data().tensors[0][: 4 * batches])
    run(loader, [estimate], limit_train_batches=limit, val_check_interval=1)
    estimate.check(calls=2 * batches, batches=batches)


def test_an_endless_loader_is_read_to_its_limit():
    class Unsized(IterableDataset):
        def __iter__(self):
            while True:
                yield from data()

    estimate = Estimate()
    run(lambda: DataLoader(Unsized(), 4), [estimate], limit_train_batches=6)
    estimate.check(calls=4)


def test_a_loader_without_a_length_is_read_to_its_end():
    class Unsized(IterableDataset):
        def __iter__(self):
            yield from data()

    estimate = Estimate()
    run(lambda: DataLoader(Unsized(), 4), [estimate])
    estimate.check(calls=4)


def both(batch):
    return torch.cat([batch["one"][0], batch["two"][0]])


class OfTwo(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step((both(batch), torch.cat([batch["one"][1], batch["two"][1]])), batch_idx)


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size"])
def test_several_loaders_are_read_as_lightning_combines_them(mode):
    def loaders():
        return CombinedLoader({"one": persistent(), "two": DataLoader(data(12, seed=2), 2)}, mode)

    images = torch.cat([data().tensors[0], data(12, seed=2).tensors[0]])
    estimate = Estimate(forward=lambda module, batch: module(both(batch)), images=images)
    assert_same(run(loaders, [estimate], OfTwo()), run(loaders, [], OfTwo()))
    estimate.check(calls=4)


class TwoNorms(Net):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.body.append(nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8), nn.BatchNorm1d(8)))


def test_dropout_draws_nothing():
    class Twice(Estimate):
        def estimate(self, trainer, pl_module, *args):
            for _ in range(2):
                super().estimate(trainer, pl_module, *args)
                self.states = [*getattr(self, "states", []), self.after]

    twice = Twice("on_train_end")
    got = run(loader, [twice], TwoNorms())
    assert_same(got, run(loader, [], TwoNorms()))
    assert_same(twice.states[0], twice.states[1])
    assert not torch.equal(twice.after["body.4.2.running_var"], twice.before["body.4.2.running_var"])


def test_a_layer_that_is_not_given_is_untouched():
    estimate = Estimate("on_train_end", layers=lambda module: norms_of(module)[1:])
    run(loader, [estimate], TwoNorms())
    changed = {name for name in estimate.after if not torch.equal(estimate.after[name], estimate.before[name])}
    assert changed == {"body.4.2.running_mean", "body.4.2.running_var", "body.4.2.num_batches_tracked"}


def test_without_a_layer_to_estimate_no_data_are_read():
    class Untracked(Net):
        def __init__(self):
            super().__init__()
            self.body[2] = nn.BatchNorm1d(8, track_running_stats=False)

    class Nothing(Callback):
        def on_train_end(self, trainer, pl_module):
            counts.append(0)
            update_batch_norm("Nothing", trainer, pl_module, norms_of(pl_module))
            update_batch_norm("Nothing", trainer, pl_module, [])

    counts = []

    class Counted(Batches):
        def __iter__(self):
            counts.append(1)
            return super().__iter__()

    fit([Nothing()], Untracked(), train=Counted(loader()), max_epochs=1)
    assert counts[-1] == 0


@pytest.mark.parametrize("when", ["on_validation_start", "on_train_batch_end", "on_train_end"])
def test_transforms_of_training_batches_leave_them_alone(when):
    def transforms():
        return lt.BatchTransforms([lt.Cutout(2), lt.Mixup(0.5)], seed=3)

    estimate = Estimate(when)
    assert_same(run(loader, [transforms(), estimate]), run(loader, [transforms()]))
    estimate.check(calls={"on_validation_start": 4, "on_train_batch_end": 12, "on_train_end": 1}[when])


def test_hooks_of_the_module_see_each_batch_as_in_training():
    class Scaled(Net):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [2 * batch[0], batch[1]]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 1, batch[1]]

    estimate = Estimate(images=2 * data().tensors[0] + 1)
    run(loader, [estimate], Scaled())
    estimate.check(calls=4)


def test_batches_that_lightning_skips_are_skipped():
    batches = list(loader())
    estimate = Estimate("on_train_end")
    with pytest.warns(UserWarning, match="train_dataloader yielded None"):
        run(lambda: Batches([*batches[:2], None, *batches[2:]]), [estimate], val_check_interval=1.0, max_epochs=1)
    estimate.check(calls=1)


def test_bf16_mixed_inputs_are_summed_in_double_precision():
    seen = []

    class Autocast(Net):
        def forward(self, images):
            if not self.training:
                seen.append(self.body[:2](images))
            return super().forward(images)

    class Last(Estimate):
        def estimate(self, *args):
            seen.clear()
            super().estimate(*args)

    estimate = Last("on_train_end")
    run(loader, [estimate], Autocast(), precision="bf16-mixed")
    assert len(seen) == 6
    assert {inputs.dtype for inputs in seen} == {torch.bfloat16}
    expected = torch.cat(seen).double()
    torch.testing.assert_close(estimate.found[0]["running_mean"], expected.mean(0).float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(estimate.found[0]["running_var"], expected.var(0).float(), rtol=1e-6, atol=0)


# ---------------------------------------------------------------------- ranks


class UnevenShards(Net):
    """The first rank has 6 batches of 4, the second 4 of 3."""

    def train_dataloader(self):
        dataset, size = (data(24), 4) if self.global_rank == 0 else (data(12, seed=9), 3)
        return DataLoader(dataset, size, shuffle=True)

    def val_dataloader(self):
        return loader(8, seed=5)


class Report(Estimate):
    def on_fit_end(self, trainer, pl_module):
        torch.save((self.found, self.expected), f"{trainer.global_rank}.pt")


def test_ranks_have_the_statistics_of_the_union_of_their_unequal_shards():
    from kit import make_trainer

    report = Report("on_train_end", images=torch.cat([data(24).tensors[0], data(12, seed=9).tensors[0]]))
    make_trainer([report], max_steps=3, use_distributed_sampler=False, **TWO).fit(UnevenShards())
    reports = [torch.load(f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_same(reports[0], reports[1])
    report.found, report.expected = reports[0]
    report.check(calls=1, batches=10)


def test_ranks_agree_in_the_middle_of_an_epoch_and_train_on_as_before():
    class Seen(Callback):
        def __init__(self, name):
            self.name = name

        def on_fit_end(self, trainer, pl_module):
            torch.save([pl_module.seen, pl_module.losses], f"{self.name}{trainer.global_rank}.pt")

    def train(name, callbacks):
        torch.manual_seed(7)
        shuffled = DataLoader(data(), 4, shuffle=True)
        fit([*callbacks, Seen(name)], train=shuffled, max_epochs=2, val_check_interval=2, **TWO)
        return [torch.load(f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)]

    report = Report()
    assert_same(train("with", [report]), train("without", []))
    reports = [torch.load(f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_same(reports[0], reports[1])
    report.found, report.expected = reports[0]
    report.check(calls=2, batches=6)


# ---------------------------------------------------------------------- what is refused


def fails(exception):
    calls = []

    def forward(module, batch):
        calls.append(batch)
        module(batch[0])
        if len(calls) == 4:
            raise exception

    return forward


@pytest.mark.parametrize("make_loader", [LOADERS["shuffled"], persistent, ResumableLoader])
def test_an_exception_leaves_the_module_and_the_random_numbers_as_they_were(make_loader):
    class Caught(Estimate):
        def estimate(self, trainer, pl_module, *args):
            state = torch.get_rng_state()
            self.forward = fails(ArithmeticError("in forward"))
            if not trainer.sanity_checking:
                with pytest.raises(ArithmeticError, match="in forward"):
                    super().estimate(trainer, pl_module)
                assert torch.equal(torch.get_rng_state(), state)
                assert_same(self.after, self.before)

    caught = Caught()
    assert_same(run(make_loader, [caught]), run(make_loader, []))
    assert len(caught.found) == 4


class OfDict(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["image"], batch["label"]), batch_idx)


def test_a_batch_whose_images_are_not_first_needs_a_forward():
    def dicts():
        return Batches({"image": images, "label": labels} for images, labels in loader())

    with pytest.raises(TypeError, match="Estimate: batch must be a tensor, or a sequence .* Give forward="):
        run(dicts, [Estimate()], OfDict())
    estimate = Estimate(forward=lambda module, batch: module(batch["image"]))
    run(dicts, [estimate], OfDict())
    estimate.check(calls=4)


def test_data_that_are_their_own_iterator_are_refused_and_not_moved_on():
    class Once:
        def __init__(self):
            self.left = list(loader())

        def __iter__(self):
            return self

        def __next__(self):
            if not self.left:
                raise StopIteration
            return self.left.pop(0)

    class OnceDataset(Once, IterableDataset):
        pass

    for make_loader in (Once, lambda: DataLoader(OnceDataset(), batch_size=None)):
        module = Net()
        reason = "Estimate: training data must be such as can be read twice at once, got .* its own iterator"
        with pytest.raises(TypeError, match=reason):
            run(make_loader, [Estimate()], module)
        assert len(module.seen) == 3


def test_a_resumable_loader_without_an_end_is_refused_in_its_middle():
    class Endless:
        position = 0

        def __iter__(self):
            while True:
                yield from loader()

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    with pytest.raises(TypeError, match="such as come to an end, got 'a Endless in the middle of them'"):
        run(Endless, [Estimate()], limit_train_batches=6)


def test_before_the_data_are_loaded_it_is_refused():
    class Early(Callback):
        def on_sanity_check_start(self, trainer, pl_module):
            update_batch_norm("Early", trainer, pl_module, norms_of(pl_module))

    with pytest.raises(ValueError, match="Early: training data must be loaded, got None"):
        fit([Early()])


# ---------------------------------------------------------------------- progress


@pytest.mark.parametrize(("enabled", "rank"), [(True, 0), (False, 0), (True, 1)])
def test_progress_is_shown_where_the_trainer_shows_it(enabled, rank, monkeypatch):
    bars = []

    class Bar(batch_norm.Tqdm):
        def __init__(self, **options):
            bars.append((options["disable"], options["total"], options["desc"]))
            super().__init__(**{**options, "disable": True})

        def update(self, n=1):
            bars.append(n)

    class OnRank(Estimate):
        def estimate(self, trainer, pl_module, *args):
            monkeypatch.setattr(type(trainer), "is_global_zero", rank == 0)
            super().estimate(trainer, pl_module, *args)
            monkeypatch.undo()
            monkeypatch.setattr(batch_norm, "Tqdm", Bar)

    monkeypatch.setattr(batch_norm, "Tqdm", Bar)
    run(loader, [OnRank("on_train_end")], enable_progress_bar=enabled)
    assert bars == [(not enabled or rank == 1, 6, "Estimate: batch norm"), *[1] * 6]
