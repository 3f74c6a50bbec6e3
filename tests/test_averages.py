"""An average goes from a checkpoint into a model that no Trainer has seen."""

import pytest
import torch
from kit import Net, assert_same, every_epoch, fit, snapshot
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from sharded import ShardedNet, on_ranks
from sharded import fit as fit_sharded
from torch import nn

import lightning_tricks as lt
from lightning_tricks.averages import load_average


class Follow(Callback):
    """Averages by hand, and the raw weights."""

    def __init__(self, *decays):
        self.averages = [None for _ in decays]
        self.decays = decays
        self.raw = {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.raw = {name: p.detach().clone().double() for name, p in pl_module.named_parameters()}
        for index, decay in enumerate(self.decays):
            if self.averages[index] is None:
                self.averages[index] = self.raw
            else:
                old = self.averages[index]
                self.averages[index] = {name: decay * old[name] + (1 - decay) * self.raw[name] for name in old}


def assert_holds(module, expected):
    assert expected
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("evaluate", ["average", "raw", "both"])
def test_every_average_of_a_checkpoint_can_be_loaded(evaluate, tmp_path):
    follow = Follow(0.5, 0.9)
    fit([lt.EMA([0.5, 0.9], evaluate=evaluate), follow, every_epoch(tmp_path)])
    path = tmp_path / "epoch=1.ckpt"
    assert_holds(load_average(path, Net()), follow.averages[0])
    assert_holds(load_average(str(path), Net(), "0.5"), follow.averages[0])
    assert_holds(load_average(torch.load(path, weights_only=True), Net(), name="0.9"), follow.averages[1])
    assert_holds(load_average(path, Net(), "raw"), follow.raw)
    model = Net()
    assert load_average(path, model) is model


def test_checkpoint_of_lightnings_own_averaging(tmp_path):
    follow = Follow(0.9)
    fit([EMAWeightAveraging(decay=0.9, use_buffers=False), follow, every_epoch(tmp_path)], max_epochs=1)
    loaded = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    model = load_average(loaded, Net())
    assert_same(snapshot(model), dict(loaded["state_dict"]))
    assert_holds(load_average(loaded, Net(), "raw"), follow.raw)


def test_checkpoint_of_weights_only(tmp_path):
    follow = Follow(0.9)
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_weights_only=True, save_top_k=-1)
    fit([lt.EMA(0.9), follow, save])
    assert_holds(load_average(tmp_path / "epoch=1.ckpt", Net()), follow.averages[0])
    with pytest.raises(
        ValueError, match=r"load_average: name must be an average of the checkpoint, which has 0\.9, got"
    ):
        load_average(tmp_path / "epoch=1.ckpt", Net(), "raw")


def test_model_of_another_precision_and_a_compiled_one(tmp_path):
    follow = Follow(0.9)
    fit([lt.EMA(0.9, dtype="float64"), follow, every_epoch(tmp_path)])
    wide = load_average(tmp_path / "epoch=1.ckpt", Net().double())
    for name, parameter in wide.named_parameters():
        torch.testing.assert_close(parameter.detach(), follow.averages[0][name], rtol=0, atol=1e-14)


def test_batch_norm_and_what_is_not_averaged_come_along(tmp_path):
    _, module = fit([lt.EMA(0.9, exclude="head.*"), every_epoch(tmp_path)])
    assert_same(snapshot(load_average(tmp_path / "epoch=1.ckpt", Net())), snapshot(module))


def test_checkpoint_without_an_average_is_refused(tmp_path):
    fit([every_epoch(tmp_path)], max_epochs=1)
    model = Net()
    for name in (None, "raw", "0.9"):
        with pytest.raises(ValueError, match="load_average: name must be an average of the checkpoint, which has none"):
            load_average(tmp_path / "epoch=0.ckpt", model, name)
    assert_same(snapshot(model), snapshot(Net()))


def test_model_of_other_weights_is_refused_and_left_alone(tmp_path):
    fit([lt.EMA([0.5, 0.9]), every_epoch(tmp_path)], max_epochs=1)
    model = Net()
    model.head = nn.Linear(8, 4)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"load_average: model must be one with head.weight of \(3, 8\), got \(4, 8\)"):
        load_average(tmp_path / "epoch=0.ckpt", model, "0.9")
    assert_same(snapshot(model), before)
    with pytest.raises(RuntimeError, match=r"size mismatch for head.weight"):
        load_average(tmp_path / "epoch=0.ckpt", model)


@pytest.mark.parametrize("evaluate", ["average", "raw"])
@pytest.mark.parametrize("distributed", [False, True], ids=["one file", "a folder"])
def test_checkpoint_of_sharded_parameters(evaluate, distributed, tmp_path):
    def run():
        callbacks = [lt.EMA([0.5, 0.9], evaluate=evaluate), every_epoch(tmp_path)]
        _, module = fit_sharded(callbacks, ShardedNet(), distributed, use_distributed_sampler=False)
        return {name: parameter.full_tensor().detach() for name, parameter in module.named_parameters()}

    ended = on_ranks(run)[0]
    follow = Follow(0.5, 0.9)
    fit([follow])  # both ranks see all data
    path = tmp_path / "epoch=1.ckpt"
    assert path.is_dir() == distributed
    end = {"average": follow.averages[0], "raw": follow.raw}[evaluate]
    for name, expected in (("0.5", follow.averages[0]), ("0.9", follow.averages[1]), ("raw", follow.raw)):
        assert_holds(load_average(path, Net(), name), expected)
    assert_holds(load_average(path, Net()), follow.averages[0])
    for name, value in ended.items():
        torch.testing.assert_close(value.double(), end[name], rtol=0, atol=1e-6)


def test_compiled_and_plain_modules_read_each_others_checkpoints(tmp_path):
    def compiled():
        module = Net()
        module.body = torch.compile(module.body, backend="eager")
        return module

    follow = Follow(0.9)
    fit([lt.EMA([0.9, 0.5]), follow, every_epoch(tmp_path)], compiled())
    for name in ("0.9", "0.5", "raw"):
        plain = load_average(tmp_path / "epoch=1.ckpt", Net(), name)
        again = load_average(tmp_path / "epoch=1.ckpt", compiled(), name)
        assert_same([p.detach() for p in plain.parameters()], [p.detach() for p in again.parameters()])
    fit([lt.EMA(0.9), every_epoch(tmp_path / "plain")])
    whole = load_average(tmp_path / "plain" / "epoch=1.ckpt", compiled())
    plain = load_average(tmp_path / "plain" / "epoch=1.ckpt", Net())
    assert_same([p.detach() for p in whole.parameters()], [p.detach() for p in plain.parameters()])


def test_module_that_is_not_strict_about_its_keys(tmp_path):
    class Partial(Net):
        strict_loading = False

        def state_dict(self, *args, **kwargs):
            return {key: value for key, value in super().state_dict(*args, **kwargs).items() if "frozen" not in key}

    _, module = fit([lt.EMA(0.9), every_epoch(tmp_path)], Partial())
    assert_same(snapshot(load_average(tmp_path / "epoch=1.ckpt", Partial())), snapshot(module))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    text = "load_average: checkpoint must be "
    with pytest.raises(ValueError, match=text + r"one with a state_dict, got \['weight'\]"):
        load_average({"weight": torch.zeros(1)}, Net())
    with pytest.raises(ValueError, match=text + "a folder with meta.pt"):
        load_average(tmp_path, Net())
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=text + "what a Trainer saved, got 'list'"):
        load_average(tmp_path / "list.pt", Net())
    torch.save({"state_dict": {}, "hyper_parameters": Follow(0.9)}, tmp_path / "object.pt")
    with pytest.raises(ValueError, match=text + "one that torch.load reads with weights_only=True.* Load it with"):
        load_average(tmp_path / "object.pt", Net())


def test_weights_alone_saved_after_fit_need_no_name(tmp_path):
    trainer, _ = fit([lt.EMA(0.9)])
    trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="One of weights alone that was saved after fit has the average as its state_"):
        load_average(tmp_path / "after.ckpt", Net())
