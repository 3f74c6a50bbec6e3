"""How often and how strongly, where in a batch, in which stage, and what is shown of it."""

import copy
import pickle
from collections import namedtuple
from dataclasses import dataclass

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import wandb
import yaml
from kit import (
    Batches,
    ByHand,
    MemoryLogger,
    Net,
    ResumableLoader,
    TwoOptimizers,
    assert_same,
    every_epoch,
    fit,
    loader,
    make_trainer,
    plugin_that_skips,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import CombinedLoader
from offline_wandb import read_run, runs
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import config_with, run

import lightning_tricks as lt
from lightning_tricks.callbacks.batches import read_place
from lightning_tricks.functional.pictures import picture_grid
from lightning_tricks.functional.window import Window
from lightning_tricks.labels import MixedLabels
from lightning_tricks.transforms.choice import OneOf, RandomApply

pytestmark = pytest.mark.filterwarnings("ignore:.*(the schedule is for .* optimizer steps|an epoch by hand has)")


@dataclass(frozen=True)
class Add:
    """Adds to the pixels; at another strength it adds more or less."""

    amount: float = 1.0

    def __call__(self, images, labels, generator=None, inplace=False):
        return (images.add_ if inplace else images.add)(self.amount), labels

    def scaled(self, strength):
        assert strength > 0
        return Add(self.amount * strength)


@dataclass(frozen=True)
class Halve:
    """What Normalize is: the same in every stage."""

    every_stage = True

    def __call__(self, images, labels, generator=None, inplace=False):
        return images / 2, labels


def shift(images, labels, generator=None, inplace=False):
    """Moves each image by columns drawn for it, and masks with it."""
    steps = torch.randint(images.shape[-1], (len(images),), generator=generator).tolist()

    def move(values):
        return torch.stack([value.roll(step, -1) for value, step in zip(values, steps, strict=True)])

    is_mask = labels is not None and labels.shape[-2:] == images.shape[-2:]
    return move(images), move(labels) if is_mask else labels


class Keep(Net):
    def __init__(self):
        super().__init__()
        self.batches, self.other = [], []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.other.append(batch[0])
        super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.other.append(batch[0])

    def predict_step(self, batch, batch_idx):
        self.other.append(batch if isinstance(batch, torch.Tensor) else batch[0])
        return batch_idx


def added(module, epochs=2):
    """What was added to the images of each batch; None where it is not the same for all."""
    plain = [images for images, _ in loader()] * epochs
    rises = [(seen - images).flatten() for seen, images in zip(module.seen, plain, strict=True)]
    return [round(float(rise.mean()), 5) if float(rise.std()) < 1e-5 else None for rise in rises]


def train(callback, module=None, **options):
    module = Net() if module is None else module
    fit([callback], module, **options)
    return added(module, options.get("max_epochs", 2))


# ------------------------------------------------------------------------------------ 1. schedules by real steps

WINDOWS = {
    (0, None): [1] * 12,
    (3, None): [0] * 3 + [1] * 9,
    (0, 5): [1] * 5 + [0] * 7,
    (0, 0.9): [1] * 11 + [0],  # 10.8 steps: those from 0 to 10
    (0.25, 0.75): [0] * 3 + [1] * 6 + [0] * 3,
    ("1ep", None): [0] * 6 + [1] * 6,
    (2, "1ep"): [0] * 2 + [1] * 4 + [0] * 6,
    (1, 2): [0, 1] + [0] * 10,
    (0, 12): [1] * 12,
}


@pytest.mark.parametrize(("start", "stop"), WINDOWS)
def test_window_begins_and_ends_at_the_right_step(start, stop):
    assert train(lt.BatchTransforms([Add()], start=start, stop=stop)) == WINDOWS[start, stop]


def test_batches_of_one_optimizer_step_have_one_value():
    options = {"accumulate_grad_batches": 4}  # 6 batches an epoch: windows of four and of two, 4 steps in all
    strengths = [0.0] * 4 + [0.25] * 2 + [0.5] * 4 + [0.75] * 2
    assert train(lt.BatchTransforms([Add()], strength=lt.Linear(0, 1)), **options) == strengths
    assert train(lt.BatchTransforms([Add()], stop=0.5), **options) == [1] * 6 + [0] * 6
    assert train(lt.BatchTransforms([Add()], stop=3), **options) == [1] * 10 + [0] * 2


def test_strength_follows_its_schedule():
    expected = [round(lt.Cosine(0.5)(step, 12), 5) for step in range(12)]
    assert train(lt.BatchTransforms([Add()], strength=lt.Cosine(0.5))) == expected
    assert train(lt.BatchTransforms([Add()], strength=lt.Linear(0, 1), total_steps=24)) == pytest.approx(
        [step / 24 for step in range(12)], abs=1e-5
    )
    assert train(lt.BatchTransforms([Add(2.0)], strength=0.5)) == [1] * 12
    assert train(lt.BatchTransforms([Add(2.0)], strength=2)) == [4] * 12
    assert train(lt.BatchTransforms([Add(), shift, OneOf([Add()])][::2], strength=0)) == [0] * 12


def test_probability_follows_its_schedule():
    def every_other(step, total_steps):
        assert total_steps == 12
        return step % 2

    assert train(lt.BatchTransforms([Add()], prob=every_other)) == [0, 1] * 6
    assert train(lt.BatchTransforms([Add()], prob=every_other, start=4, stop=8)) == [0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0]
    assert train(lt.BatchTransforms([Add()], prob=0.0)) == [0] * 12


def test_rate_of_a_scheduled_probability():
    """kornia #4649: p was applied twice, so that the rate was p * p."""
    batches = Batches([(torch.zeros(500, 1, 4, 4), torch.zeros(500).long())] * 8)
    for prob, rates in ((0.5, [0.5] * 8), (lt.Linear(0, 1), [step / 8 for step in range(8)])):
        module = Net()
        fit([lt.BatchTransforms([Add(), Add(2.0)], prob=prob, seed=1)], module, train=batches, max_epochs=1)
        for images, rate in zip(module.seen, rates, strict=True):
            assert set(images.unique().tolist()) <= {0.0, 3.0}
            assert abs(float(images.mean()) / 3 - rate) < 5 * (rate * (1 - rate) / 500) ** 0.5 + 1e-6


class Overflow(L.Callback):
    """Makes the gradients of two batches of the first epoch infinite."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.total_batch_idx in (1, 2):
            pl_module.head.weight.grad.fill_(torch.inf)


def test_steps_that_a_scaler_skips_do_not_count_also_after_a_resume(tmp_path):
    module = Net()
    callbacks = [lt.BatchTransforms([Add()], stop=8), Overflow(), every_epoch(tmp_path)]
    fit(callbacks, module, plugins=[plugin_that_skips(8.0)])
    assert added(module) == [1] * 10 + [0] * 2
    rest, callbacks = Net(), [lt.BatchTransforms([Add()], stop=8), Overflow(), every_epoch(tmp_path / "rest")]
    fit(callbacks, rest, plugins=[plugin_that_skips(8.0)], ckpt_path=tmp_path / "epoch=0.ckpt")
    assert added(rest, 1) == [1] * 4 + [0] * 2


def test_several_optimizers_go_by_the_first():
    class Rare(TwoOptimizers):
        def optimizers(self):
            first, second = super().optimizers()
            return second, first  # now the first steps every other batch

    for module, expected in ((TwoOptimizers(), [1] * 4 + [0] * 8), (Rare(), [1] * 8 + [0] * 4)):
        assert train(lt.BatchTransforms([Add()], stop=4), module) == expected


def test_fast_dev_run_transforms_as_if_there_were_no_schedule():
    module = Net()
    fit([lt.BatchTransforms([Add()], prob=lt.Linear(0, 1), strength=lt.Linear(0, 1), start=5)], module, fast_dev_run=1)
    assert float((module.seen[0] - next(iter(loader()))[0]).mean()) == pytest.approx(1)


def scheduled(**options):
    chain = [OneOf([lt.Mixup(0.5), lt.Cutout(2)]), Add(), RandomApply(lt.LabelSmoothing(0.1))]
    return lt.BatchTransforms(
        chain, **{"prob": lt.Linear(0, 1), "strength": lt.Linear(0, 2), "stop": 0.8, "seed": 3, **options}
    )


def same_batches(left, right):
    both = [[(images, lt.soft_targets(labels, 3)) for images, labels in batches] for batches in (left, right)]
    assert_same(*both)


def test_resumed_run_draws_and_ends_as_the_whole_one(tmp_path):
    for place, save, name, done in (
        ("epoch", every_epoch, "epoch=0.ckpt", 6),
        (
            "step",
            lambda folder: ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1),
            "step=5.ckpt",
            5,
        ),
    ):
        whole, rest = Keep(), Keep()
        fit([scheduled(), save(tmp_path / place)], whole, ResumableLoader(), max_epochs=2)
        path = tmp_path / place / name
        torch.load(path, weights_only=True)
        fit([scheduled(), save(tmp_path / "rest")], rest, ResumableLoader(), max_epochs=2, ckpt_path=path)
        same_batches(rest.batches, whole.batches[done:])
        kinds = [isinstance(labels, MixedLabels) for _, labels in whole.batches]
        assert kinds[-2:] == [False, False]
        assert any(kinds)


def test_longer_run_stretches_what_is_left(tmp_path):
    module = Net()
    fit([lt.BatchTransforms([Add()], strength=lt.Linear(0, 1), stop=0.75), every_epoch(tmp_path)], max_epochs=2)
    callbacks = [lt.BatchTransforms([Add()], strength=lt.Linear(0, 1), stop=0.75), every_epoch(tmp_path / "rest")]
    fit(callbacks, module, ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=4)
    expected = [step / 24 if step < 18 else 0.0 for step in range(12, 24)]
    assert added(module) == pytest.approx(expected, abs=1e-5)


def test_resumed_run_may_have_another_schedule(tmp_path):
    fit([lt.BatchTransforms([Add()], stop=3), every_epoch(tmp_path)], max_epochs=1)
    module, save = Net(), every_epoch(tmp_path / "rest")
    fit([lt.BatchTransforms([Add()], stop=8), save], module, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert added(module, 1) == [1, 1, 0, 0, 0, 0]


def test_run_that_was_begun_without_a_schedule_goes_on_in_the_middle_of_it(tmp_path):
    fit([lt.BatchTransforms([Add()]), every_epoch(tmp_path)], max_epochs=1)
    module, save = Net(), every_epoch(tmp_path / "rest")
    fit([lt.BatchTransforms([Add()], stop=8), save], module, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert added(module, 1) == [1, 1, 0, 0, 0, 0]


def test_second_fit_goes_on_and_a_new_trainer_begins_anew():
    callback, module = lt.BatchTransforms([Add()], stop=8, total_steps=12), Net()
    trainer, _ = fit([callback], module, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), loader(8, seed=5))
    assert added(module) == [1] * 8 + [0] * 4
    module = Net()
    fit([callback], module, max_epochs=1)
    assert added(module, 1) == [1] * 6


def test_strength_leaves_those_without_one_as_they_are():
    def count(images, labels, generator=None, inplace=False):
        return images + 10, labels

    assert train(lt.BatchTransforms([Add(), count], strength=lt.Linear(0, 12), total_steps=12)) == [
        10 + step for step in range(12)
    ]
    assert train(lt.BatchTransforms([OneOf([RandomApply(Add(), 1.0)]), count], strength=0)) == [10] * 12


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"prob": 1.5}, ValueError, r"prob must be in \[0, 1\] \(probability\), got 1.5"),
        ({"prob": "0.5"}, TypeError, "prob must be a number"),
        ({"prob": lt.Linear}, TypeError, "prob must be a schedule"),
        ({"prob": lambda step: step}, TypeError, r"prob must be a function of \(step, total_steps\)"),
        ({"strength": -1}, ValueError, "strength must be finite and at least 0, got -1"),
        ({"strength": None}, TypeError, "strength must be a number"),
        ({"strength": 0.5, "transforms": [shift]}, ValueError, "transforms must be such that one has a strength"),
        ({"strength": lt.Linear(), "transforms": [OneOf([shift])]}, ValueError, "such that one has a strength"),
        ({"start": -1}, ValueError, r"start must be at least 0 when it is an int \(optimizer steps\), got -1"),
        ({"stop": 1.5}, ValueError, r"stop must be in \(0, 1\) when it is a float \(fraction of the run\), got 1.5"),
        ({"stop": "3 epochs"}, ValueError, "stop must be epochs written as '3ep'"),
        ({"start": 0.5, "stop": 0.5}, ValueError, r"stop must be after start=0.5, got 0.5"),
        ({"stop": 0}, ValueError, "stop must be after start=0, got 0"),
        ({"stop": "0ep"}, ValueError, "stop must be after start=0, got '0ep'"),
        ({"start": "2ep", "stop": "2ep"}, ValueError, "stop must be after start='2ep', got '2ep'"),
        ({"total_steps": 100}, ValueError, "total_steps must be None where nothing depends on it, got 100"),
        ({"total_steps": 0, "stop": 3}, ValueError, "total_steps must be a whole number of at least 1"),
        ({"log_pictures": -1}, ValueError, "log_pictures must be a whole number of at least 0"),
        ({"images": []}, TypeError, r"images must be at least one place, got \[\]"),
        ({"images": [0, None]}, TypeError, "images must be an index or a key, or a path of them, got None"),
        ({"masks": [1.0]}, TypeError, "masks must be an index or a key, or a path of them, got 1.0"),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=f"BatchTransforms.*: .*{text}"):
        lt.BatchTransforms(**{"transforms": [Add()], **arguments})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prob": lt.Linear(0, 1.5)}, r"BatchTransforms: prob must be in \[0, 1\] \(probability\), got 1.5"),
        ({"prob": lambda k, t: -0.5}, r"BatchTransforms\(prob\): schedule must be finite and at least 0 at step 0"),
        (
            {"strength": lambda k, t: -k},
            r"BatchTransforms\(strength\): schedule must be finite and at least 0 at step 1",
        ),
        ({"start": 13}, "BatchTransforms: start must be at most the run's 12 optimizer steps, got 13"),
        ({"start": "1ep", "stop": 3}, "BatchTransforms: stop must be after start=6, got 3"),
        ({"stop": 0.5, "max_epochs": -1, "limit": True}, r"BatchTransforms\(stop\): total_steps must be known"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*max_epochs.*")
def test_what_does_not_fit_the_run_is_refused_before_the_first_step(arguments, text):
    options = {"max_epochs": arguments.pop("max_epochs")} if "max_epochs" in arguments else {}
    arguments.pop("limit", None)
    module = Net()
    with pytest.raises(ValueError, match=text):
        fit([lt.BatchTransforms([Add()], **arguments)], module, **options)
    assert module.seen == []


def test_strength_that_is_negative_between_the_points_that_were_looked_at():
    def dip(step, total_steps):
        return -1.0 if step == 3 else 0.5

    with pytest.raises(ValueError, match="BatchTransforms: strength must be finite and at least 0, got -1.0"):
        fit([lt.BatchTransforms([Add()], strength=dip, total_steps=100_000)])


def test_probability_that_leaves_its_range_between_the_points_that_were_looked_at():
    def spike(step, total_steps):
        return 1.5 if step == 3 else 0.5

    with pytest.raises(ValueError, match=r"BatchTransforms: prob must be in \[0, 1\] \(probability\), got 1.5"):
        fit([lt.BatchTransforms([Add()], prob=spike, total_steps=100_000)])


def test_window_is_a_schedule():
    window = Window(lt.Linear(0, 1), start=2, stop=0.8)
    assert [window(step, 10) for step in range(11)] == [0, 0, *[step / 10 for step in range(2, 8)], 0, 0, 0]
    assert pickle.loads(pickle.dumps(window)) == window


# -------------------------------------------------------------------------------------------- 2. where things sit


def stereo(count=8, size=5):
    images = torch.arange(count * 3 * 1 * size * size, dtype=torch.float32).view(count, 3, size, size)
    return images, torch.arange(count) % 3, (images[:, 0] % 7).long()


class Steps(Net):
    """Trains on whatever is read from the batch."""

    def __init__(self, read):
        super().__init__()
        self.read, self.batches, self.plain = read, [], torch.nn.Linear(1, 3)

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        images, labels = self.read(batch)
        return F.cross_entropy(self.plain(images.float().mean((1, 2, 3)).unsqueeze(1)), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.plain.parameters(), lr=1e-6)


def one_batch(callback, batch, read, **options):
    module = Steps(read)
    fit([callback], module, train=Batches([batch]), max_epochs=1, limit_val_batches=0, **options)
    return module.batches[0]


@pytest.mark.parametrize("prob", [1.0, 0.5])
@pytest.mark.parametrize("chain", [[shift], [OneOf([shift, lt.Cutout(2)]), RandomApply(shift)]])
def test_images_and_masks_of_a_sample_get_the_same_draw(chain, prob):
    images, labels, masks = stereo()
    batch = {
        "left": images,
        "views": [images[:, :1] * 2, {"depth": images.double() * 3}],
        "y": labels,
        "mask": masks,
        "edges": masks.float().unsqueeze(1),
    }
    callback = lt.BatchTransforms(
        chain, ["left", ("views", 0), "views.1.depth"], "y", seed=1, masks=["mask", "edges"], prob=prob
    )
    new = one_batch(callback, batch, lambda batch: (batch["left"], batch["y"]))
    assert torch.equal(new["views"][0], new["left"][:, :1] * 2)
    assert torch.equal(new["views"][1]["depth"], new["left"].double() * 3)
    assert torch.equal(new["edges"][:, 0].long(), new["mask"])
    assert torch.equal(new["y"], labels)
    assert new["left"].shape == images.shape
    moved = (new["left"] != images).flatten(1).any(1)
    assert moved.any()
    if chain == [shift]:
        assert torch.equal(new["mask"], (new["left"][:, 0] % 7).long())
        assert prob == 1.0 or not moved.all()
        still = (new["mask"] != masks).flatten(1).any(1)
        assert not (still & ~moved).any()


@pytest.mark.parametrize("prob", [1.0, 0.5])
def test_masks_that_are_the_labels_go_with_their_images(prob):
    images, _, masks = stereo()

    class Segments(Steps):
        def training_step(self, batch, batch_idx):
            self.batches.append(batch)
            return F.cross_entropy(self.plain.bias.view(1, 3, 1, 1).expand(8, 3, 5, 5), batch[1] % 3)

    module = Segments(None)
    callback = lt.BatchTransforms([shift], seed=1, prob=prob)
    fit([callback], module, train=Batches([(images, masks)]), max_epochs=1, limit_val_batches=0)
    ((moved, labels),) = module.batches
    assert not torch.equal(labels, masks)
    assert torch.equal(labels, (moved[:, 0] % 7).long())


def test_further_images_and_masks_are_mixed_with_the_same_partners():
    images, labels, masks = stereo()
    callback = lt.BatchTransforms([lt.Mixup(0.5)], [0, 1], 2, seed=1, masks=3)
    read = lambda batch: (batch[0], batch[2])  # noqa: E731

    class Both(Steps):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            logits = self.plain.bias.view(1, 3, 1, 1).expand(8, 3, 5, 5)
            return loss + F.cross_entropy(logits, batch[3])

    module = Both(read)
    batch = (images, -images, labels, masks % 3)
    fit([callback], module, train=Batches([batch]), max_epochs=1, limit_val_batches=0)
    left, right, y, mask = module.batches[0]
    torch.testing.assert_close(left, -right)
    assert_same(y.components[0][1].view(-1, 1, 1).expand_as(mask.components[0][1]), mask.components[0][1])
    assert isinstance(mask, MixedLabels)

    with pytest.raises(RuntimeError, match="labels must be used by a loss that knows mixed labels"):
        one_batch(lt.BatchTransforms([lt.Mixup(0.5)], [0, 1], 2, seed=1, masks=3), batch, read)


@dataclass
class Inputs:
    image: torch.Tensor
    name: str = "x"


Pair = namedtuple("Pair", "inputs label")

NESTED = {
    "dict of dicts": (lambda x, y: {"a": {"x": x}, "b": {"y": y}}, "a.x", "b.y"),
    "named tuple of a dataclass": (lambda x, y: Pair(Inputs(x), y), "inputs.image", "label"),
    "tuple of a list": (lambda x, y: ([x, "z"], y), (0, 0), 1),
    "list of a dict": (lambda x, y: [{"image.png": x}, {"cls": y}], (0, "image.png"), "1.cls"),
    "functions": (
        lambda x, y: {"x": x, "y": y},
        (lambda batch: batch["x"], lambda batch, value: {**batch, "x": value}),
        "y",
    ),
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_structures(name):
    make, images, labels = NESTED[name]
    given = list(loader())
    plain = [make(*batch) for batch in given]
    module = Steps(lambda batch: (read_place(batch, images), read_place(batch, labels)))
    callback = lt.BatchTransforms([lt.Cutout(2), lt.Mixup(0.5)], images, labels, seed=3)
    fit([callback], module, train=Batches(plain), max_epochs=1, limit_val_batches=0)
    reference = Keep()
    fit([lt.BatchTransforms([lt.Cutout(2), lt.Mixup(0.5)], seed=3)], reference, max_epochs=1)
    got = [module.read(batch) for batch in module.batches]
    same_batches(got, reference.batches)
    assert {type(batch) for batch in module.batches} == {type(plain[0])}
    assert_same([read_place(batch, images) for batch in plain], [images for images, _ in given])


def test_several_loaders_are_a_dict_of_batches():
    combined = CombinedLoader({"a": loader(), "b": loader()}, "min_size")
    module = Steps(lambda batch: (batch["a"][0], batch["a"][1]))
    fit([lt.BatchTransforms([Add()], "a.0", "a.1")], module, train=combined, max_epochs=1, limit_val_batches=0)
    for batch, (images, _) in zip(module.batches, loader(), strict=True):
        assert torch.equal(batch["a"][0], images + 1)
        assert torch.equal(batch["b"][0], images)


def test_loader_that_has_run_out_gives_nothing_to_transform():
    combined = CombinedLoader({"a": loader(8), "b": loader()}, "max_size")
    module = Steps(lambda batch: batch["b"])
    transforms = [lt.BatchTransforms([Add()], "a.0", "a.1"), lt.BatchTransforms([Add(2.0)], "b.0", None)]
    fit(transforms, module, train=combined, max_epochs=1, limit_val_batches=0)
    assert [batch["a"] is None for batch in module.batches] == [False] * 2 + [True] * 4
    for batch, (images, _) in zip(module.batches[:2], loader(8), strict=True):
        assert torch.equal(batch["a"][0], images + 1)
    for batch, (images, _) in zip(module.batches, loader(), strict=True):
        assert torch.equal(batch["b"][0], images + 2)


def test_loader_that_has_run_out_in_validation_gives_nothing_to_normalise():
    class Validated(Steps):
        def validation_step(self, batch, batch_idx):
            self.batches.append(batch)

    combined = CombinedLoader({"a": loader(8), "b": loader()}, "max_size")
    module = Validated(None)
    callback = lt.BatchTransforms([lt.Normalize((0.0,), (0.5,))], "a.0", None)
    make_trainer([callback]).validate(module, combined, verbose=False)
    assert [batch["a"] is None for batch in module.batches] == [False] * 2 + [True] * 4
    for batch, (images, _) in zip(module.batches[:2], loader(8), strict=True):
        assert torch.equal(batch["a"][0], images * 2)


def test_place_that_is_mistyped_is_no_loader_that_has_run_out():
    combined = CombinedLoader({"a": loader(8), "b": loader()}, "max_size")
    with pytest.raises(TypeError, match="batch must be one with tensors at images='c.0' and labels='c.1'"):
        fit([lt.BatchTransforms([Add()], "c.0", "c.1")], train=combined)


def test_each_of_several_loaders_may_have_its_own_transforms():
    combined = CombinedLoader({"a": loader(), "b": loader()}, "min_size")
    module = Steps(lambda batch: (batch["a"][0], batch["a"][1]))
    both = [lt.BatchTransforms([Add()], "a.0", "a.1"), lt.BatchTransforms([Add(2.0)], "b.0", None)]
    fit(both, module, train=combined, max_epochs=1, limit_val_batches=0)
    for batch, (images, _) in zip(module.batches, loader(), strict=True):
        assert torch.equal(batch["a"][0], images + 1)
        assert torch.equal(batch["b"][0], images + 2)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"images": ["left", "right"]},
            TypeError,
            r"tensors at images=\['left', 'right'\] and labels='y', got .*'left': Tensor\(8, 3, 5, 5\) float32, 'y'",
        ),
        ({"images": ("left", "right")}, TypeError, "images='left.right'.*a tuple is a path, a list has several places"),
        ({"masks": "z"}, TypeError, "tensors at images='left' and labels='y', masks='z'"),
        (
            {"images": ["left", "small"]},
            ValueError,
            r"images must be of one height and width, got '\(8, 3, 5, 5\), \(8",
        ),
        ({"masks": "half"}, ValueError, r"masks must be of shape \(N, H, W\) or \(N, K, H, W\), got '\(8, 2, 2\) for"),
        ({"masks": "few"}, ValueError, r"masks must be of shape .*, got '\(3, 5, 5\) for images \(8, 3, 5, 5\)'"),
    ],
)
def test_what_does_not_fit_prints_what_it_saw(arguments, error, text):
    images, labels, masks = stereo()
    batch = {"left": images, "y": labels, "small": images[..., 1:], "half": masks[:, :2, :2], "few": masks[:3]}
    with pytest.raises(error, match=text):
        one_batch(
            lt.BatchTransforms([Add()], **{"images": "left", "labels": "y", **arguments}),
            batch,
            lambda batch: (batch["left"], batch["y"]),
        )


def test_multi_hot_and_regression_targets_are_mixed_as_numbers():
    images, labels, _ = stereo()
    for targets in (F.one_hot(labels, 3).float() + F.one_hot(labels * 0, 3), labels.double() / 7):
        for prob in (1.0, 0.5):
            new = []

            class Regression(Steps):
                def training_step(self, batch, batch_idx):
                    new.append(batch)  # noqa: B023
                    return self.plain.weight.sum() * batch[1].mean().float()

            callback = lt.BatchTransforms([lt.Mixup(1.0)], seed=2, prob=prob)
            fit([callback], Regression(None), train=Batches([(images, targets)]), max_epochs=1, limit_val_batches=0)
            ((mixed, got),) = new
            assert type(got) is torch.Tensor
            assert got.dtype == targets.dtype
            assert not torch.equal(got, targets)
            # Images and targets are linear in the same weights: a target that is linear in the image stays so.
            untouched = (mixed == images).flatten(1).all(1)
            assert torch.equal(got[untouched], targets[untouched])


def test_soft_targets_are_dense_in_every_training_batch():
    module = Keep()
    callback = lt.BatchTransforms([lt.Mixup(1.0)], targets="soft", num_classes=3, seed=1, start=2, stop=8, prob=0.5)
    fit([callback], module)
    plain = [labels for _, labels in loader()] * 2
    for step, ((_, labels), hard) in enumerate(zip(module.batches, plain, strict=True)):
        assert type(labels) is torch.Tensor
        assert labels.shape == (4, 3)
        if not 2 <= step < 8:
            assert torch.equal(labels, F.one_hot(hard, 3).float())


def test_labels_that_no_transform_mixed_are_plain_integers():
    module = Keep()
    fit([lt.BatchTransforms([lt.Mixup(1.0)], start=2, stop=8, seed=1)], module)
    kinds = [isinstance(labels, MixedLabels) for _, labels in module.batches]
    assert kinds == [False] * 2 + [True] * 6 + [False] * 4


def test_loaders_batch_is_never_overwritten():
    def nothing(images, labels, generator=None, inplace=False):
        return images.view(images.shape), labels

    batches = [tuple(batch) for batch in loader()]
    copies = copy.deepcopy(batches)
    for prob in (1.0, 0.5):
        fit([lt.BatchTransforms([nothing, Add(), lt.Cutout(2), Add()], prob=prob)], train=Batches(batches))
        assert_same(batches, copies)


# ---------------------------------------------------------------------------------------------- 3. in every stage


def hooks_left(module):
    return [name for name in vars(module) if name.startswith("on_")]


def test_transform_for_every_stage_is_applied_in_each():
    module = Keep()
    callback = lt.BatchTransforms([Add(), Halve()], prob=0.0)
    trainer, _ = fit([callback], module, max_epochs=1, num_sanity_val_steps=1)
    plain = [images for images, _ in loader(8, seed=5)]
    assert_same(module.other, [images / 2 for images in plain[:1] + plain])
    assert_same(module.seen, [images / 2 for images, _ in loader()])
    assert hooks_left(module) == []
    for call in (trainer.validate, trainer.test):
        module.other.clear()
        call(module, loader(8, seed=5), verbose=False)
        assert_same(module.other, [images / 2 for images in plain])
        assert hooks_left(module) == []
    module.other.clear()
    trainer.predict(module, loader(8, seed=5))
    trainer.predict(module, Batches(plain))
    assert_same(module.other, [images / 2 for images in plain] * 2)
    assert hooks_left(module) == []


def test_stage_without_a_fit_needs_images_alone():
    module = Keep()
    trainer = make_trainer([lt.BatchTransforms([Halve()], ["a", "b"], "label", masks="mask")])
    module.predict_step = lambda batch, batch_idx: (batch["a"], batch["b"], batch["c"])
    batch = {"a": torch.ones(2, 1, 4, 4), "b": torch.ones(3, 1, 2, 2), "c": torch.ones(1)}
    ((a, b, c),) = trainer.predict(module, Batches([batch]))
    assert (a.mean(), b.mean(), c.mean()) == (0.5, 0.5, 1.0)
    with pytest.raises(TypeError, match=r"images=\['a', 'b'\], in every stage, got .*{'a': Tensor\(2, 1, 4, 4\)"):
        trainer.predict(module, Batches([{"a": batch["a"]}]))
    assert hooks_left(module) == []


def test_datamodule_has_its_batches_transformed_in_every_stage():
    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader(8)

    module, data = Keep(), Data()
    trainer = make_trainer([lt.BatchTransforms([Halve()])], max_epochs=1)
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    assert all(torch.equal(seen, images / 2) for seen, (images, _) in zip(module.seen, loader(), strict=True))
    assert torch.equal(module.other[0], next(iter(loader(8)))[0] / 2)
    assert hooks_left(data) == []


def test_exception_in_a_stage_gives_the_hook_back():
    class Fails(Keep):
        def test_step(self, batch, batch_idx):
            raise RuntimeError("failed in test")

    module = Fails()
    with pytest.raises(RuntimeError, match="failed in test"):
        make_trainer([lt.BatchTransforms([Halve()])]).test(module, loader(8), verbose=False)
    assert hooks_left(module) == []


def test_without_such_a_transform_nothing_is_attached_outside_of_fit():
    class Looks(Keep):
        def test_step(self, batch, batch_idx):
            assert hooks_left(self) == []

    make_trainer([lt.BatchTransforms([Add()])]).test(Looks(), loader(8), verbose=False)


def test_batch_that_a_validation_step_itself_moves_is_left_alone():
    extra = []

    class Moves(Keep):
        def validation_step(self, batch, batch_idx):
            extra.append(self._apply_batch_transfer_handler(next(iter(loader(4))))[0])
            super().validation_step(batch, batch_idx)

    fit([lt.BatchTransforms([Halve()])], Moves(), max_epochs=1)
    assert len(extra) == 3
    assert_same(extra, [next(iter(loader(4)))[0]] * 3)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor", "ignore:Found `dataloader_iter`")
def test_step_that_takes_an_iterator_is_refused_where_batches_must_be_transformed():
    class Iterates(Keep):
        def validation_step(self, dataloader_iter):
            return super().validation_step(next(dataloader_iter)[0], 0)

    refused = pytest.raises(TypeError, match="validation_step must be one that Lightning hands batches to")
    with refused:
        fit([lt.BatchTransforms([Halve()])], Iterates())
    with refused:
        make_trainer([lt.BatchTransforms([Halve()])]).validate(Iterates(), loader(8))
    fit([lt.BatchTransforms([Add()])], Iterates(), max_epochs=1)


def test_batch_norm_is_estimated_of_what_the_module_is_evaluated_on():
    """The statistics of batches halved by the callback are those of a module that gets halved data."""

    def statistics(callbacks, batches):
        module = Net()
        fit([*callbacks, lt.PolyakAverage(start=0.5, update_bn=True)], module, train=Batches(batches))
        return module.body[2].running_mean, module.body[2].running_var

    plain = [tuple(batch) for batch in loader()]
    halved = [(images / 2, labels) for images, labels in plain]
    assert_same(statistics([lt.BatchTransforms([Halve()])], plain), statistics([], halved))


# ---------------------------------------------------------------------------------------------------- 4. pictures


def expected_pictures(count=3):
    images = next(iter(loader()))[0][:count]
    return picture_grid(images), picture_grid(images + 1)


def opened(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).movedim(-1, 0)


@pytest.mark.parametrize("logger", [False, "csv", "memory"])
def test_pictures_are_files_where_no_logger_takes_them(logger, tmp_path):
    loggers = {False: False, "csv": CSVLogger(tmp_path), "memory": MemoryLogger()}
    trainer, _ = fit(
        [lt.BatchTransforms([Add()], log_pictures=3)], logger=loggers[logger], default_root_dir=str(tmp_path / "root")
    )
    folder = trainer.logger.log_dir if logger == "csv" else tmp_path / "root"
    for name, picture in zip(("before", "after"), expected_pictures(), strict=True):
        assert torch.equal(opened(f"{folder}/batch_transforms/{name}.png"), picture)


def test_pictures_in_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit([lt.BatchTransforms([Add()], log_pictures=3), lt.BatchTransforms([Halve()], log_pictures=1)], logger=logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    assert set(events.Tags()["images"]) == {
        f"batch_transforms{number}/{name}" for number in ("", "-2") for name in ("after", "before")
    }
    (image,) = events.Images("batch_transforms/after")
    assert image.step == 0
    path = tmp_path / "after.png"
    path.write_bytes(image.encoded_image_string)
    assert torch.equal(opened(path), expected_pictures()[1])


def test_pictures_in_a_real_offline_run(tmp_path):
    logger = WandbLogger(save_dir=str(tmp_path), project="tests", offline=True)
    try:
        fit([lt.BatchTransforms([Add()], log_pictures=3)], logger=logger, default_root_dir=str(tmp_path / "root"))
    finally:
        wandb.finish()
    (run_folder,) = runs(tmp_path)
    rows, config = read_run(run_folder)
    for name, picture in zip(("before", "after"), expected_pictures(), strict=True):
        (row,) = [row for row in rows if any(key.startswith(f"batch_transforms/{name}") for key in row)]
        assert row["trainer/global_step"] == 0
        (path,) = run_folder.glob(f"files/media/images/batch_transforms/{name}_*.png")
        assert torch.equal(opened(path), picture)
    assert config["tricks"]["BatchTransforms"]["log_pictures"] == 3
    assert not (tmp_path / "root").exists()


def test_first_batch_that_was_changed_is_shown_once_in_a_run(tmp_path):
    shown = []

    class Pictures(MemoryLogger):
        def log_image(self, key, images, step):
            shown.append((key, step, images[0]))

    def callbacks(folder):
        return [lt.BatchTransforms([Add()], start=8, log_pictures=4), every_epoch(tmp_path / folder)]

    fit(callbacks("whole"), logger=Pictures(), max_epochs=3)
    assert [(key, step) for key, step, _ in shown] == [("batch_transforms/before", 8), ("batch_transforms/after", 8)]
    third = list(loader())[2][0]
    assert np.array_equal(shown[1][2], picture_grid(third + 1).movedim(0, -1).numpy())
    shown.clear()
    fit(callbacks("a"), logger=Pictures(), max_epochs=3, ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    assert [step for _, step, _ in shown] == [8, 8]
    shown.clear()
    fit(callbacks("b"), logger=Pictures(), max_epochs=3, ckpt_path=tmp_path / "whole" / "epoch=1.ckpt")
    assert shown == []


def test_no_pictures_in_a_fast_dev_run(tmp_path):
    fit([lt.BatchTransforms([Add()], log_pictures=3)], fast_dev_run=True, default_root_dir=str(tmp_path / "root"))
    assert not (tmp_path / "root").exists()


# ---------------------------------------------------------------------------- 5. what users of peers complained of

TWO = {"strategy": "ddp_fork", "devices": 2}


class SaveSeen(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.seen, self.folder / f"{trainer.global_rank}.pt")


def on_two_ranks(callback, folder, **options):
    batches = [(torch.zeros(64, 1, 4, 4), torch.zeros(64).long())] * 4  # the same on both ranks
    fit([callback, SaveSeen(folder)], train=Batches(batches), default_root_dir=str(folder), **TWO, **options)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_every_epoch_has_other_draws_with_seeded_workers():
    """Lightning #20412: seed_everything(workers=True) and a mixup in the collate gave each epoch the same draws."""
    L.seed_everything(1, workers=True)
    module = Net()
    fit([lt.BatchTransforms([lt.Mixup(1.0)], prob=0.5)], module, max_epochs=3)
    epochs = [torch.cat(module.seen[start : start + 6]) for start in (0, 6, 12)]
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])


def test_every_rank_has_other_draws(tmp_path):
    """Lightning #16166: one seed on all ranks makes draws on the device the same on all."""
    first, second = on_two_ranks(lt.BatchTransforms([Add()], prob=0.5, seed=1), tmp_path, max_epochs=1)
    assert len(first) == len(second) == 4
    for one, other in zip(first, second, strict=True):
        assert set(one.unique().tolist()) == set(other.unique().tolist()) == {0.0, 1.0}
        assert not torch.equal(one, other)


def test_schedules_and_pictures_on_two_ranks(tmp_path):
    callback = lt.BatchTransforms([Add()], strength=lt.Linear(0, 1), stop=0.75, log_pictures=2, seed=1)
    first, second = on_two_ranks(callback, tmp_path, max_epochs=2)
    assert_same(first, second)
    assert [float(images.mean()) for images in first] == pytest.approx([k / 8 if k < 6 else 0.0 for k in range(8)])
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["after.png", "before.png"]


def test_batches_of_a_datamodule_are_transformed_where_the_module_is():
    """Lightning #790, #10469: augmentation of whole batches on the device, for data of a datamodule."""
    order = []

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            order.append("transfer")
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def note(images, labels, generator=None, inplace=False):
        order.append(str(images.device))
        return images, labels

    module = Net()
    module.validation_step = None
    make_trainer([lt.BatchTransforms([note])], max_epochs=1).fit(module, datamodule=Data())
    assert order == ["transfer", "cpu"] * 6


def test_one_line_mixes_the_batches_of_an_unchanged_module():
    """torchvision #7306: how do I even use it? braindecode #1121: a triple of targets broke loss, loader and a batch
    of three."""
    module = Keep()
    fit(
        [lt.BatchTransforms([OneOf([lt.Mixup(0.2), lt.Mixup(1.0)])])],
        module,
        train=loader(9, batch_size=3),
        max_epochs=1,
    )
    assert [tuple(images.shape) for images, _ in module.batches] == [(3, 1, 4, 4)] * 3
    assert all(isinstance(labels, MixedLabels) and labels.shape == (3,) for _, labels in module.batches)


def test_validation_sees_none_of_it():
    module = Keep()
    fit([scheduled(strength=1.0)], module)
    plain = [images for images, _ in loader(8, seed=5)]
    assert_same(module.other, plain[:1] + plain * 2)


# ----------------------------------------------------------------------------------------------------- 6. settings


def test_settings_show_what_is_not_as_usual():
    assert lt.BatchTransforms([Add()], seed=1).settings == {
        "transforms": ["Add(amount=1.0)"],
        "seed": 1,
        "images": 0,
        "labels": 1,
        "targets": "mixed",
        "num_classes": None,
    }
    logger = MemoryLogger()
    callback = lt.BatchTransforms(
        [Add()], [0, (1, "x")], "2", masks=3, prob=lt.Linear(0, 1), strength=0.5, start=2, stop=0.8, log_pictures=4
    )
    assert callback.settings == {
        "transforms": ["Add(amount=1.0)"],
        "seed": None,
        "images": [0, "1.x"],
        "labels": "2",
        "targets": "mixed",
        "num_classes": None,
        "masks": 3,
        "prob": "Linear(start=0, end=1)",
        "strength": 0.5,
        "start": 2,
        "stop": 0.8,
        "total_steps": None,
        "log_pictures": 4,
    }
    fit([lt.BatchTransforms([Add()], stop=0.8)], logger=logger)
    assert logger.hparams["tricks"]["BatchTransforms"]["total_steps"] == 12


CALLBACK = """
class_path: lightning_tricks.BatchTransforms
init_args:
  transforms:
  - class_path: lightning_tricks.OneOf
    init_args:
      transforms:
      - {class_path: lightning_tricks.Mixup, init_args: {alpha: 0.5}}
      - class_path: lightning_tricks.RandomApply
        init_args:
          transforms: {class_path: lightning_tricks.Cutout, init_args: {size: 2}}
          prob: 0.25
      weights: [3, 1]
  - class_path: lightning_tricks.RandomApply
    init_args:
      transforms:
      - {class_path: lightning_tricks.LabelSmoothing}
  prob: {class_path: lightning_tricks.Linear, init_args: {start: 0.0, end: 1.0}}
  start: 1ep
  stop: 0.9
  seed: 1
"""


@pytest.mark.parametrize(
    ("options", "images"),
    [
        ({}, 0),
        ({"images": [0]}, [0]),
        ({"images": [[0]], "log_pictures": 2}, [(0,)]),
    ],
)
def test_everything_from_yaml(options, images, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    config = yaml.safe_load(CALLBACK)
    config["init_args"].update(options)
    callback = run(config_with([config]), tmp_path).trainer.callbacks[0]
    assert callback.transforms == [
        OneOf([lt.Mixup(0.5), RandomApply(lt.Cutout(2), 0.25)], [3, 1]),
        RandomApply(lt.LabelSmoothing()),
    ]
    assert (callback.images, callback.prob, callback.start, callback.stop) == (images, lt.Linear(0, 1), "1ep", 0.9)
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (tmp_path / "config.yaml").unlink()
    assert run(saved, tmp_path).trainer.callbacks[0].settings == callback.settings


def test_manual_optimization_has_a_step_for_each_batch():
    class Manual(ByHand):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    assert train(lt.BatchTransforms([Add()], stop=0.5), Manual()) == [1] * 6 + [0] * 6
