import functools
from collections import namedtuple
from dataclasses import dataclass

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from kit import Batches, Net, assert_same, data, every_epoch, fit, loader, make_trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import lightning_tricks as lt
from lightning_tricks.labels import MixedLabels


class Keep(Net):
    """Remembers the batches it trains and validates on."""

    def __init__(self):
        super().__init__()
        self.batches, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch)
        super().validation_step(batch, batch_idx)


def tricks(**options):
    return lt.BatchTransforms([lt.Cutout(2), lt.Mixup(0.5), lt.LabelSmoothing(0.1)], **{"seed": 3, **options})


def batches(module):
    return [(images, lt.soft_targets(labels, 3)) for images, labels in module.batches]


def test_unchanged_module_trains_on_mixed_images_and_their_loss():
    """autogluon #1730: mixup needed a loss of its own."""
    module = Keep()
    fit([tricks()], module, max_epochs=1)
    plain = list(loader())
    for (images, labels), (original, hard) in zip(module.batches, plain, strict=True):
        assert isinstance(labels, MixedLabels)
        assert not torch.equal(images, original)
        assert labels.components[0][0].equal(hard)
        logits = torch.randn(4, 3)
        expected = F.cross_entropy(logits, lt.soft_targets(labels, 3))
        torch.testing.assert_close(F.cross_entropy(logits, labels), expected)


def test_validation_sanity_check_test_and_predict_see_the_batch_as_it_is():
    module = Keep()
    trainer, _ = fit([tricks()], module, max_epochs=1, num_sanity_val_steps=2)
    plain = list(loader(8, seed=5)) * 2
    assert_same([tuple(batch) for batch in module.validated], [tuple(batch) for batch in plain])
    trainer.validate(module, loader(8), verbose=False)
    assert type(module.validated[-1][1]) is torch.Tensor


def test_loaders_batch_is_left_as_it_is():
    batches = [tuple(batch) for batch in loader()]
    copies = [(images.clone(), labels.clone()) for images, labels in batches]
    fit([tricks()], train=Batches(batches))
    assert_same(batches, copies)


def test_the_same_seed_draws_the_same_and_epochs_differ():
    first, second, other = Keep(), Keep(), Keep()
    fit([tricks()], first)
    fit([tricks()], second)
    fit([tricks(seed=4)], other)
    assert_same(batches(first), batches(second))
    assert not torch.equal(first.batches[0][0], other.batches[0][0])
    assert not torch.equal(first.batches[0][0], first.batches[6][0])


def test_seed_is_that_of_seed_everything(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    seeded, given = Keep(), Keep()
    fit([tricks(seed=None)], seeded)
    fit([tricks(seed=3)], given)
    assert_same(batches(seeded), batches(given))


def test_without_any_seed_two_runs_differ():
    first, second = Keep(), Keep()
    fit([tricks(seed=None)], first, max_epochs=1)
    fit([tricks(seed=None)], second, max_epochs=1)
    assert not torch.equal(first.batches[0][0], second.batches[0][0])


def test_resumed_run_goes_on_with_the_first_runs_seed(tmp_path, monkeypatch):
    whole, rest = Keep(), Keep()
    fit([tricks(seed=None), every_epoch(tmp_path)], whole, max_epochs=2)
    monkeypatch.setenv("PL_GLOBAL_SEED", "99")
    callbacks = [tricks(seed=None), every_epoch(tmp_path / "rest")]
    fit(callbacks, rest, max_epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(batches(rest), batches(whole)[6:])


def test_two_instances_draw_independently():
    draws = []

    def draw(images, labels, generator=None, inplace=False):
        draws.append(float(torch.rand(1, generator=generator)))
        return images, labels

    fit([lt.BatchTransforms([draw], seed=1), lt.BatchTransforms([draw], seed=1)], max_epochs=1)
    assert len(set(draws)) == len(draws) > 2


def test_accuracy_of_the_unchanged_module_sees_dominant_labels():
    class Accuracy(Keep):
        def __init__(self):
            super().__init__()
            self.accuracy = MulticlassAccuracy(3, average="micro")

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.accuracy(self(batch[0]), batch[1])
            self.log("train/accuracy", self.accuracy, on_epoch=True)
            return loss

    module = Accuracy()
    fit([tricks()], module, max_epochs=1)
    assert all(type(getattr(module.accuracy, name)) is torch.Tensor for name in ("tp", "fp", "tn", "fn"))


# -------------------------------------------------------------------------------------------- where a batch comes from

Pair = namedtuple("Pair", "image label weight")


@dataclass
class Sample:
    image: torch.Tensor
    label: torch.Tensor
    name: str = "x"


class Plain:
    def __init__(self, image, label):
        self.image, self.label = image, label


def as_dict(images, labels):
    return {"image": images, "label": labels, "name": "x"}


STRUCTURES = {
    "tuple": (lambda x, y: (x, y, "x"), {}),
    "list": (lambda x, y: [x, y, "x"], {}),
    "named tuple": (lambda x, y: Pair(x, y, 1.0), {}),
    "named tuple by name": (lambda x, y: Pair(x, y, 1.0), {"images": "image", "labels": "label"}),
    "dict": (as_dict, {"images": "image", "labels": "label"}),
    "dataclass": (lambda x, y: Sample(x, y), {"images": "image", "labels": "label"}),
    "object": (Plain, {"images": "image", "labels": "label"}),
    "from the end": (lambda x, y: ("x", x, y), {"images": -2, "labels": -1}),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_of_a_batch_is_kept(name):
    make, options = STRUCTURES[name]
    given = []

    class Reads(Net):
        def training_step(self, batch, batch_idx):
            given.append(batch)
            values = batch.values() if name == "dict" else vars(batch).values() if hasattr(batch, "__dict__") else batch
            images, labels = [value for value in values if isinstance(value, torch.Tensor)]
            return F.cross_entropy(self(images), labels)

    plain = [make(*batch) for batch in loader()]
    fit([tricks(**options)], Reads(), train=Batches(plain), max_epochs=1)
    assert {type(batch) for batch in given} == {type(plain[0])}
    assert len(given) == 6


def test_images_alone():
    class Reads(Net):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            return self(batch).square().mean()

    images = [batch[0] for batch in loader()]
    module = Reads()
    fit([lt.BatchTransforms([lt.Mixup(0.5)], labels=None, seed=1)], module, train=Batches(images), max_epochs=1)
    assert not torch.equal(module.seen[0], images[0])


def test_labels_none_leaves_the_labels_of_a_pair():
    module = Keep()
    fit([lt.BatchTransforms([lt.Mixup(0.5)], labels=None, seed=1)], module, max_epochs=1)
    assert all(type(labels) is torch.Tensor for _, labels in module.batches)


def test_soft_targets_for_a_loss_that_knows_nothing_of_mixed_labels():
    module = Keep()
    fit([tricks(targets="soft", num_classes=3)], module, max_epochs=1)
    mixed = Keep()
    fit([tricks()], mixed, max_epochs=1)
    for (_, dense), (_, labels) in zip(module.batches, mixed.batches, strict=True):
        assert type(dense) is torch.Tensor
        assert_same(dense, lt.soft_targets(labels, 3))
    assert module.losses == pytest.approx(mixed.losses, abs=1e-5)


def test_floating_targets_are_mixed_as_numbers():
    class Regression(Net):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch[1])
            return F.mse_loss(self(batch[0])[:, 0], batch[1])

    pairs = [(images, labels.float()) for images, labels in loader()]
    module = Regression()
    fit([lt.BatchTransforms([lt.Mixup(0.5)], seed=1)], module, train=Batches(pairs), max_epochs=1)
    assert module.seen[0].dtype == torch.float32
    assert not torch.equal(module.seen[0], pairs[0][1])


def test_segmentation():
    class Segments(Net):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, padding=1)

        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            return F.cross_entropy(self.conv(batch[0]), batch[1], ignore_index=2)

        def configure_optimizers(self):
            return torch.optim.SGD(self.conv.parameters(), lr=0.1)

    pairs = [(images, torch.randint(3, (4, 4, 4))) for images, _ in loader()]
    module = Segments()
    fit(
        [lt.BatchTransforms([lt.Mixup(0.5)], seed=1)],
        module,
        train=Batches(pairs),
        val=Batches(pairs[:1]),
        max_epochs=1,
        limit_val_batches=0,
    )
    assert module.seen[0][1].shape == (4, 4, 4)


# ------------------------------------------------------------------------------------------------ whose hook is wrapped


def hook_of(name):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.order.append((name, type(batch[1]).__name__))
        return batch

    return on_after_batch_transfer


class Data(L.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.order = []

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(8)


DataWithHook = type("DataWithHook", (Data,), {"on_after_batch_transfer": hook_of("data")})


class NetWithHook(Keep):
    on_after_batch_transfer = hook_of("module")

    def __init__(self):
        super().__init__()
        self.order = []


@pytest.mark.parametrize("data_module", [None, Data, DataWithHook])
@pytest.mark.parametrize("module", [Keep, NetWithHook])
@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in")
def test_the_owners_own_hook_comes_first(data_module, module):
    module, data_module = module(), data_module and data_module()
    trainer = make_trainer([tricks()], max_epochs=1)
    if data_module:
        trainer.fit(module, datamodule=data_module)
    else:
        trainer.fit(module, loader(), loader(8))
    assert all(isinstance(labels, MixedLabels) for _, labels in module.batches)
    owner = data_module if isinstance(data_module, DataWithHook) else module
    if hasattr(owner, "order") and type(owner) in (DataWithHook, NetWithHook):
        assert len(owner.order) > 6
        assert {kind for _, kind in owner.order} == {"Tensor"}
    for thing in (module, data_module):
        assert "on_after_batch_transfer" not in vars(thing or module)


def test_datamodule_of_an_earlier_call_is_not_asked():
    module, trainer = Keep(), make_trainer([tricks()], max_epochs=1)
    trainer.validate(module, datamodule=Data(), verbose=False)
    trainer.fit(module, loader(), loader(8))
    assert all(isinstance(labels, MixedLabels) for _, labels in module.batches)


def test_batch_that_goes_past_the_transforms_is_an_error():
    class Replaces(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.on_after_batch_transfer = functools.partial(lambda batch, dataloader_idx: batch)

    with pytest.raises(
        RuntimeError, match="hook must be the one that Lightning calls, got 'a batch that went past it'"
    ):
        fit([tricks(), Replaces()])


def test_batch_that_the_step_itself_moves_is_left_alone():
    extra = []

    class Moves(Keep):
        def training_step(self, batch, batch_idx):
            extra.append(self._apply_batch_transfer_handler(next(iter(loader(4)))))
            return super().training_step(batch, batch_idx)

    fit([tricks()], Moves(), max_epochs=1)
    assert all(type(labels) is torch.Tensor for _, labels in extra)


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_batch_of_none_is_skipped_as_lightning_does():
    batches = [None if index == 2 else tuple(batch) for index, batch in enumerate(loader())]
    module = Keep()
    trainer, _ = fit([tricks()], module, train=Batches(batches), max_epochs=2)
    assert trainer.global_step == len(module.batches) == 10


def test_epoch_that_the_module_ends_early():
    class Ends(Keep):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 3 else None

    module = Ends()
    fit([tricks()], module, max_epochs=2)
    assert len(module.batches) == 6
    assert all(isinstance(labels, MixedLabels) for _, labels in module.batches)


def test_new_run_has_the_seed_of_its_own_time(monkeypatch):
    callback, runs = tricks(seed=None), {}
    for seed in ("1", "2", "1"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        module = Keep()
        fit([callback], module, max_epochs=1)
        runs.setdefault(seed, []).append(module.batches[0][0])
    assert torch.equal(*runs["1"])
    assert not torch.equal(runs["1"][0], runs["2"][0])


def test_data_module_without_a_hook_gets_no_warning():
    trainer = make_trainer([tricks()], max_epochs=1)
    trainer.fit(Keep(), datamodule=Data())
    assert trainer.global_step == 6


def test_hook_that_the_user_put_on_the_instance_is_given_back():
    module = Keep()
    mine = functools.partial(lambda batch, dataloader_idx: batch)
    module.on_after_batch_transfer = mine
    fit([tricks(), tricks()], module, max_epochs=1)
    assert module.on_after_batch_transfer is mine


def test_callbacks_that_end_in_any_order_leave_nothing():
    from lightning_tricks.callbacks.batch_hook import attach, detach

    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        module, callbacks = Net(), [tricks(), tricks(), tricks()]
        for callback in callbacks:
            attach(callback, module)
        for index in order:
            detach(callbacks[index], module)
        assert "on_after_batch_transfer" not in vars(module)


def test_own_transform_is_a_function():
    def darken(images, labels, generator=None, inplace=False):
        return images * torch.rand(len(images), 1, 1, 1, generator=generator), labels

    module = Keep()
    fit([lt.BatchTransforms([darken], seed=1)], module, max_epochs=1)
    assert not torch.equal(module.batches[0][0], data()[0:4][0])


# --------------------------------------------------------------------------------------- losses that would be wrong


class Loss(Net):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])


WAYS_OUT = r"soft_targets\(labels, num_classes\) or BatchTransforms\(targets='soft', num_classes=K\).*labels=None"


def focal(logits, labels):
    log_probs = logits.log_softmax(1)[torch.arange(len(labels)), labels]
    return -((1 - log_probs.exp()) ** 2 * log_probs).mean()


@pytest.mark.parametrize("loss", [focal, F.multi_margin_loss, lambda x, y: F.mse_loss(x[:, 0], y)])
def test_loss_that_does_not_know_mixed_labels_is_refused_at_its_line(loss):
    with pytest.raises(ValueError, match="MixedLabels: labels must be used by a loss that knows.*" + WAYS_OUT):
        fit([tricks()], Loss(loss))


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward(logits)
        return logits.sum()

    @staticmethod
    def backward(ctx, gradient):
        return torch.ones_like(ctx.saved_tensors[0]) * gradient, None


@pytest.mark.parametrize(
    "loss",
    [Opaque.apply, lambda x, y: x.square().mean(), lambda x, y: F.cross_entropy(x, torch.where(y == 2, 0, y))],
)
def test_labels_that_no_known_loss_used_are_refused_at_the_steps_end(loss):
    with pytest.raises(RuntimeError, match=f"got 'a training_step of Loss whose loss did not use them'.*{WAYS_OUT}"):
        fit([tricks()], Loss(loss))


def test_loss_made_of_one_hot_codes_beside_cross_entropy_sees_the_mix():
    def dice(logits, targets):
        probabilities = logits.softmax(1)
        return 1 - 2 * (probabilities * targets).sum() / (probabilities + targets).sum()

    module = Loss(lambda x, y: F.cross_entropy(x, y) + dice(x, F.one_hot(y, 3).float()))
    dense = Loss(lambda x, y: F.cross_entropy(x, y) + dice(x, y))
    fit([tricks()], module)
    fit([tricks(targets="soft", num_classes=3)], dense)
    for one, other in zip(module.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_known_loss_that_is_only_logged_does_not_pass_for_the_loss():
    def loss(logits, labels):
        with torch.no_grad():
            F.cross_entropy(logits, labels)
        F.cross_entropy(logits.detach(), labels)
        return logits.square().mean()

    with pytest.raises(RuntimeError, match="whose loss did not use them"):
        fit([tricks()], Loss(loss))


def test_backward_past_lightnings_hook_is_watched_too():
    class Manual(Loss):
        def __init__(self, loss):
            super().__init__(loss)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx).backward()
            self.optimizers().step()

    fit([tricks()], Manual(F.cross_entropy))
    with pytest.raises(RuntimeError, match="whose loss did not use them"):
        fit([tricks()], Manual(lambda x, y: x.square().mean()))


def test_transform_that_loses_the_mix_is_refused():
    def next_class(images, labels, generator=None, inplace=False):
        return images, (labels + 1) % 3

    with pytest.raises(TypeError, match="BatchTransforms: transforms must be one that keeps the mix of the labels"):
        fit([lt.BatchTransforms([lt.Mixup(1.0), next_class])])
    module = Keep()
    fit([lt.BatchTransforms([next_class, lt.Mixup(1.0)])], module, max_epochs=1)
    assert module.batches[0][1].components[0][0].equal((next(iter(loader()))[1] + 1) % 3)


def test_transform_may_make_a_batch_of_another_size():
    def twice(images, labels, generator=None, inplace=False):
        return torch.cat([images, images]), torch.cat([labels, labels])

    module = Keep()
    fit([lt.BatchTransforms([twice, lt.Mixup(1.0)])], module, max_epochs=1)
    assert len(module.batches[0][1]) == 8


def test_manual_optimization_is_watched_too():
    class Manual(Loss):
        def __init__(self, loss):
            super().__init__(loss)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    fit([tricks()], Manual(F.cross_entropy))
    with pytest.raises(RuntimeError, match="whose loss did not use them"):
        fit([tricks()], Manual(lambda x, y: x.square().mean()))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_step_without_a_loss_needs_no_labels():
    class Nothing(Net):
        def training_step(self, batch, batch_idx):
            return None

    trainer, _ = fit([tricks()], Nothing(), max_epochs=1)
    assert trainer.global_step == 6


def test_compiled_training_step():
    module = Keep()
    module.forward = torch.compile(module.forward, backend="eager")
    fit([tricks()], module, max_epochs=1)
    plain = Keep()
    fit([tricks()], plain, max_epochs=1)
    assert module.losses == pytest.approx(plain.losses, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_dataloader_iter_is_refused():
    class Iterates(Net):
        def training_step(self, dataloader_iter):
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(TypeError, match="training_step must be one that Lightning hands batches to"):
        fit([tricks()], Iterates())


@pytest.mark.parametrize(
    ("batch", "structure"),
    [
        ({"x": torch.zeros(4, 1, 4, 4), "y": torch.zeros(4)}, r"{'x': Tensor\(4, 1, 4, 4\) float32, 'y'"),
        (torch.zeros(4, 1, 4, 4), r"Tensor\(4, 1, 4, 4\) float32"),
        ([torch.zeros(4, 1, 4, 4)], r"\[Tensor\(4, 1, 4, 4\) float32\]"),
        (({"left": torch.zeros(4)}, torch.zeros(4)), r"\({'left': Tensor\(4\) float32}, Tensor\(4\) float32\)"),
        ((torch.zeros(4, 1, 4, 4), ["a", "b"]), r"\(Tensor\(4, 1, 4, 4\) float32, \[str, str\]\)"),
    ],
)
def test_unknown_structure_prints_what_it_saw(batch, structure):
    with pytest.raises(TypeError, match="BatchTransforms: batch must be one with tensors at images=0.*" + structure):
        fit([tricks()], train=Batches([batch]))


def test_combined_loader_prints_what_it_saw():
    combined = CombinedLoader({"a": loader(), "b": loader()}, "min_size")
    with pytest.raises(TypeError, match=r"batch must be one with tensors.*{'a': \[Tensor\(4, 1, 4, 4\)"):
        fit([tricks()], train=combined)


def test_labels_that_are_not_as_many_as_the_images():
    with pytest.raises(ValueError, match=r"labels must be one for each image, got '\(3,\) for images \(4, 1, 4, 4\)'"):
        fit([tricks()], train=Batches([(torch.zeros(4, 1, 4, 4), torch.zeros(3).long())]))


def test_smoothing_of_floating_targets_is_refused():
    with pytest.raises(TypeError, match=r"LabelSmoothing: labels must be integers, got torch\.float32"):
        fit([tricks()], train=Batches([(torch.zeros(4, 1, 4, 4), torch.zeros(4))]))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"transforms": []}, TypeError, r"transforms must be a list of transforms, got \[\]"),
        ({"transforms": lt.Mixup(0.2)}, TypeError, "transforms must be a list of transforms, got Mixup"),
        ({"transforms": [lt.Mixup]}, TypeError, "transforms must be a list of transforms"),
        ({"images": None}, TypeError, "images must be an index or a key, or a path of them, got None"),
        ({"labels": 1.0}, TypeError, r"labels must be an index or a key, or a path of them, got 1\.0"),
        ({"seed": -1}, ValueError, r"seed must be a whole number of at least 0 \(seed\), got -1"),
        ({"seed": "a"}, TypeError, "seed must be a whole number"),
        ({"targets": "hard"}, ValueError, "targets must be 'mixed' or 'soft', got 'hard'"),
        ({"targets": "soft"}, ValueError, "num_classes must be given with targets='soft', got None"),
        ({"num_classes": 3}, ValueError, "num_classes must be None with targets='mixed', got 3"),
        ({"targets": "soft", "num_classes": 3, "labels": None}, ValueError, "labels must be given with targets='soft'"),
        ({"images": 0, "labels": 0}, ValueError, "labels must be places of their own, got 0"),
        ({"images": [0, "0"]}, ValueError, "images must be places of their own, got '0'"),
        ({"images": "a.0", "masks": ("a", 0)}, ValueError, r"masks must be places of their own, got \('a', 0\)"),
        ({"masks": 1}, ValueError, "masks must be places of their own, got 1. Say where each is; labels=None where"),
        ({"transforms": [torch.nn.Identity()]}, TypeError, "transforms must be callables of images and labels that"),
        ({"transforms": [lambda images: images]}, TypeError, "transforms must be callables of images and labels that"),
        ({"transforms": [lambda x, y: (x, y)]}, TypeError, "transforms must be callables .* got <function"),
        ({"num_classes": 0}, ValueError, r"num_classes must be a whole number of at least 1 \(classes\), got 0"),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=f"BatchTransforms: {text}"):
        lt.BatchTransforms(**{"transforms": [lt.Mixup(0.2)], **arguments})


def test_lightning_loader_of_a_data_set_keeps_its_order():
    module = Keep()
    fit([lt.BatchTransforms([lt.Cutout(1)], seed=1)], module, train=DataLoader(data(), batch_size=4), max_epochs=1)
    assert torch.cat([labels for _, labels in module.batches]).equal(data().tensors[1])


def test_step_hooks_of_other_callbacks_see_the_transformed_batch():
    kinds = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            kinds.append(type(batch[1]))

    fit([tricks(), Look()], max_epochs=1)
    assert kinds == [MixedLabels] * 6
