"""The ensemble against a loop over resident copies; what a Trainer sees; soups against averages by hand."""

import copy
import gc
import json
import math
import weakref

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from kit import Net, assert_same, data, fit, loader, make_trainer, snapshot
from torch import nn

from lightning_tricks.ensembles import COMBINE, Ensemble, greedy_soup, read_manifest

X = data(8, seed=5)[:][0]


def members(count=3, kind=Net):
    """Trained copies of a net, which have different statistics of batch norm."""
    found = []
    for index in range(count):
        module = kind()
        generator = torch.Generator().manual_seed(index)
        for tensor in module.state_dict().values():
            if tensor.is_floating_point() and tensor.isfinite().all():
                tensor += 0.3 * torch.rand(tensor.shape, generator=generator)
        found.append(module.eval())
    return found


def by_hand(modules, combine="probability", images=X):
    with torch.no_grad():
        return COMBINE[combine](torch.stack([module(images) for module in modules]))


def ensemble_of(modules, combine="probability"):
    return Ensemble(Net(), [module.state_dict() for module in modules], combine).eval()


@pytest.fixture
def folder(tmp_path):
    """A directory as SnapshotEnsemble writes it."""
    rows = []
    for index, module in enumerate(members()):
        torch.save({"state_dict": module.state_dict()}, tmp_path / f"{index}.pt")
        rows.append({"file": f"{index}.pt"})
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "snapshots": rows}))
    return tmp_path


# ------------------------------------------------------------------------------------------------------ plain module


@pytest.mark.parametrize("combine", COMBINE)
def test_equal_to_the_copies_one_after_the_other(combine):
    ensemble = ensemble_of(members(), combine)
    before = snapshot(ensemble.module)
    addresses = [tensor.data_ptr() for tensor in ensemble.module.state_dict().values()]
    got = ensemble(X)
    assert torch.equal(got, by_hand(members(), combine))
    assert_same(snapshot(ensemble.module), before)
    assert [tensor.data_ptr() for tensor in ensemble.module.state_dict().values()] == addresses
    assert not got.requires_grad
    torch.testing.assert_close(ensemble.logits(X), torch.stack([module(X).detach() for module in members()]))


def test_one_module_and_no_copies():
    ensemble = ensemble_of(members())
    assert len(ensemble) == 3
    assert sum(isinstance(module, Net) for module in ensemble.modules()) == 1
    assert "members=3, combine='probability'" in repr(ensemble)
    states = [module.state_dict() for module in members()]
    kept = Ensemble(Net(), states)._kept
    assert kept[1][0].data_ptr() == next(iter(states[1].values())).data_ptr()


def test_tensors_that_the_module_has_in_several_places():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.lstm = nn.LSTM(4, 4, batch_first=True)  # keeps a list of its weights

        def forward(self, x):
            return self.second(self.first(self.lstm(x)[0][:, -1]))

    copies = [Tied().eval() for _ in range(3)]
    ensemble = Ensemble(Tied(), [module.state_dict() for module in copies]).eval()
    x = torch.randn(2, 3, 4)
    assert torch.equal(ensemble(x), by_hand(copies, images=x))


def test_buffers_that_were_replaced_and_a_change_of_dtype():
    ensemble = ensemble_of(members()).double()
    copies = [module.double() for module in members()]
    torch.testing.assert_close(ensemble(X.double()), by_hand(copies, images=X.double()))
    assert ensemble.module.head.weight.dtype == torch.float64


def test_module_has_its_own_weights_after_an_exception():
    class Fails(Net):
        def forward(self, images):
            if self.head.weight.sum() > 5:
                raise RuntimeError("stop here")
            return super().forward(images)

    states = [module.state_dict() for module in members(2)]
    states[1] = {**states[1], "head.weight": states[1]["head.weight"] + 5}
    ensemble = Ensemble(Fails(), states).eval()
    before = snapshot(ensemble.module)
    with pytest.raises(RuntimeError, match="stop here"):
        ensemble(X)
    assert_same(snapshot(ensemble.module), before)


def test_module_can_be_trained_afterwards():
    ensemble, alone = ensemble_of(members()), Net()
    with torch.inference_mode():
        ensemble(X)
    fit([], ensemble.module.train()), fit([], alone)
    assert_same(snapshot(ensemble.module), snapshot(alone))


def test_pickle_and_copy():
    ensemble = ensemble_of(members())
    assert torch.equal(copy.deepcopy(ensemble)(X), ensemble(X))


# ----------------------------------------------------------------------------------------------------------- Trainer


@pytest.mark.parametrize("combine", ["probability", "logits"])
def test_unchanged_test_step_has_the_ensembles_loss(combine):
    ensemble = ensemble_of(members(), combine)
    module = ensemble.module
    before = snapshot(module)
    trainer = make_trainer([])
    with ensemble.as_forward():
        (result,) = trainer.test(module, loader(8, seed=5), verbose=False)
        predicted = torch.cat(trainer.predict(module, loader(8, seed=5)))
    labels = data(8, seed=5)[:][1]
    expected = [F.cross_entropy(by_hand(members(), combine)[half], labels[half]) for half in (slice(4), slice(4, 8))]
    assert result["test/loss"] == pytest.approx(sum(expected).item() / 2, rel=1e-6)
    assert torch.equal(predicted, torch.cat([by_hand(members(), combine, X[:4]), by_hand(members(), combine, X[4:])]))
    assert_same(snapshot(module), before)
    assert "forward" not in vars(module)
    (alone,) = trainer.test(module, loader(8, seed=5), verbose=False)
    assert alone != result


class ByParts(Net):
    """A test step that does not call the module."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(self.body, self.frozen, self.head)
        del self.body, self.frozen, self.head

    def test_step(self, batch, batch_idx):
        self.log("test/loss", F.cross_entropy(self.layers(batch[0]), batch[1]))


def test_a_part_that_has_all_the_weights():
    states = [{k.replace("body", "layers.0"): v for k, v in module.state_dict().items()} for module in members()]
    states = [{k.replace("frozen", "layers.1").replace("head", "layers.2"): v for k, v in s.items()} for s in states]
    module = ByParts()
    ensemble = Ensemble(module, states)
    trainer = make_trainer([])
    with ensemble.as_forward("layers"):
        (result,) = trainer.test(module, loader(8, 8, seed=5), verbose=False)
    expected = F.cross_entropy(by_hand(members()), data(8, seed=5)[:][1])
    assert result["test/loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert "forward" not in vars(module.layers)
    with (
        pytest.raises(ValueError, match=r"as_forward: at must be what the step calls, got ''. If the step calls"),
        ensemble.as_forward(),
    ):
        trainer.test(module, loader(8, 8, seed=5), verbose=False)
    assert "forward" not in vars(module)


def test_forward_of_the_users_own_comes_back():
    ensemble = ensemble_of(members())
    own = ensemble.module.forward
    ensemble.module.forward = own
    with pytest.raises(RuntimeError, match="in the test"), ensemble.as_forward():
        raise RuntimeError("in the test")
    assert ensemble.module.forward is own


def test_parts_that_cannot_answer():
    ensemble = ensemble_of(members())
    with pytest.raises(ValueError, match=r"at must be the name of a part of the module, got 'haed'. Take one of body"):
        ensemble.as_forward("haed").__enter__()
    with pytest.raises(ValueError, match=r"all the weights that member 0 has of its own, got 'head'. Outside are body"):
        ensemble.as_forward("head").__enter__()


def test_a_head_beside_a_body_that_all_share():
    heads = [{**Net().state_dict(), "head.bias": torch.full((3,), float(index))} for index in range(2)]
    ensemble = Ensemble(Net(), heads).eval()
    copies = [Net().eval(), Net().eval()]
    for module, state in zip(copies, heads, strict=True):
        module.load_state_dict(state)
    with ensemble.as_forward("head"):
        assert torch.equal(ensemble.module(X), by_hand(copies))


def test_compiled_module_is_refused():
    module = Net()
    ensemble = Ensemble(module, [module.state_dict()])
    compiled = torch.compile(module, backend="eager")
    L.pytorch.utilities.compile.from_compiled(compiled)
    with pytest.raises(ValueError, match=r"module must be uncompiled, got 'Net'. Give the module before torch.compile"):
        ensemble.as_forward().__enter__()


def test_forked_ranks_answer_as_the_ensemble(tmp_path):
    class Keep(Net):
        def predict_step(self, batch, batch_idx):
            torch.save(self(batch[0]), tmp_path / f"{self.global_rank}.pt")
            return batch_idx

    ensemble = Ensemble(Keep(), [module.state_dict() for module in members()])
    with ensemble.as_forward():
        make_trainer([], strategy="ddp_fork", devices=2).predict(
            ensemble.module, loader(8, seed=5), return_predictions=False
        )
    got = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    torch.testing.assert_close(got[0], by_hand(members(), images=X[::2]))
    torch.testing.assert_close(got[1], by_hand(members(), images=X[1::2]))


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("stream", [False, True])
def test_members_from_files(folder, stream):
    ensemble = Ensemble.load(folder, Net(), stream=stream).eval()
    assert torch.equal(ensemble(X), by_hand(members()))
    with ensemble.as_forward():
        predicted = make_trainer([]).predict(ensemble.module, loader(8, 8, seed=5))
    assert torch.equal(predicted[0], by_hand(members()))
    assert torch.equal(ensemble(X), by_hand(members()))
    assert not any(tensor.is_inference() for tensor in ensemble.module.state_dict().values())


def test_stream_holds_one_member_at_a_time(folder, monkeypatch):
    alive, most = [], []
    load = torch.load

    def counted(*args, **options):
        assert options["weights_only"]
        assert options["mmap"]
        gc.collect()
        most.append(sum(reference() is not None for reference in alive))
        content = load(*args, **options)
        alive.append(weakref.ref(content["state_dict"]["head.weight"].untyped_storage()))
        return content

    ensemble = Ensemble.load(folder, Net(), stream=True).eval()
    assert ensemble._kept == {}
    monkeypatch.setattr(torch, "load", counted)
    ensemble(X)
    assert len(most) == 3
    assert max(most) <= 1


def test_a_lightning_checkpoint_is_a_member(tmp_path):
    trainer, module = fit([])
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    ensemble = Ensemble(Net(), [tmp_path / "one.ckpt", str(tmp_path / "one.ckpt")]).eval()
    torch.testing.assert_close(ensemble(X), by_hand([module.eval()] * 2))


def test_members_that_do_not_fit(folder):
    class Wider(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 5)
            self.extra = nn.Linear(1, 1)
            del self.frozen

    with pytest.raises(
        ValueError, match=r"(?s)0.pt, got 'missing extra.bias, extra.weight; unexpected frozen.bias.*head"
    ):
        Ensemble.load(folder, Wider(), stream=True)
    with pytest.raises(ValueError, match=r"of the module \(Wider\) in member 0, got"):
        Ensemble.load(folder, Wider())


def test_directories_that_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(ValueError, match=r"directory must be one with a manifest.json, got"):
        Ensemble.load(tmp_path / "elsewhere", Net())
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "snapshots": []}))
    with pytest.raises(ValueError, match="directory must be one with snapshots, got"):
        Ensemble.load(folder, Net())
    (folder / "manifest.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="directory must be of format 1, got 2"):
        read_manifest(folder)


def test_what_is_refused():
    state = Net().state_dict()
    with pytest.raises(TypeError, match=r"Ensemble: module must be a torch.nn.Module, got 'type'"):
        Ensemble(Net, [state])
    with pytest.raises(ValueError, match="Ensemble: state_dicts must be at least one"):
        Ensemble(Net(), [])
    with pytest.raises(ValueError, match="Ensemble: combine must be one of probability, logits, vote, got 'mean'"):
        Ensemble(Net(), [state], "mean")
    with pytest.raises(TypeError, match="Ensemble.load: stream must be True or False, got 1"):
        Ensemble.load(".", Net(), stream=1)
    with pytest.raises(ValueError, match=r"Ensemble: module must be in eval\(\), got 'a module in train\(\)'"):
        Ensemble(Net().train(), [state])(X)
    single = nn.Linear(16, 1)
    with pytest.raises(ValueError, match="Of a single logit z for yes or no make two classes"):
        Ensemble(nn.Sequential(nn.Flatten(), single), [{"1." + k: v for k, v in single.state_dict().items()}]).eval()(X)

    class Pair(Net):
        def forward(self, images):
            return super().forward(images), None

    with pytest.raises(TypeError, match="Ensemble: module must be one that returns a tensor of logits, got 'tuple'"):
        Ensemble(Pair(), [state]).eval()(X)


# ------------------------------------------------------------------------------------------------------------- soups


def numbers(*weights):
    """Models of one number, and a count that is not averaged."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))
            self.register_buffer("count", torch.tensor(0))

    states = [{"weight": torch.tensor(w), "count": torch.tensor(index)} for index, w in enumerate(weights)]
    return Ensemble(One(), states)


def score(module):
    return -abs(module.weight.item() - 1)


def test_soup_takes_what_makes_it_no_worse():
    ensemble = numbers(3.0, 1.25, 0.5, 0.875)
    soup = greedy_soup(ensemble, score)
    # by hand: 0.875 alone -> -0.125; with 1.25 -> -0.0625; with 0.5 -> -0.125: no; with 3.0: no
    assert soup.members == [3, 1]
    assert soup.state_dict["weight"].item() == 1.0625
    assert soup.state_dict["count"] == 3
    assert soup.score == -0.0625
    assert ensemble.module.weight == 0
    ensemble.module.load_state_dict(soup.state_dict)
    assert greedy_soup(numbers(3.0, 1.25, 0.5, 0.875), lambda m: -score(m), mode="min")[1] == [3, 1]
    assert greedy_soup(numbers(1.0, 1.0), score).members == [0, 1]  # as good is good enough


def test_soup_of_nets_is_the_average():
    ensemble = ensemble_of(members())
    soup = greedy_soup(ensemble, lambda module: 0.5)
    assert soup.members == [0, 1, 2]
    states = [module.state_dict() for module in members()]
    for name in ("head.weight", "body.2.running_var"):
        torch.testing.assert_close(soup.state_dict[name], sum(state[name] for state in states) / 3)
    ensemble.module.load_state_dict(soup.state_dict)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_barrier_is_seen_wherever_it_is(share):
    def bump(module):
        return 1.0 - 0.5 * (abs(module.weight.item() - share) < 0.01)

    message = (
        r"barrier must be at most 0.02 on the line from member 0 to member 1, got 0.5. .* average their predictions"
    )
    with pytest.raises(ValueError, match=message):
        greedy_soup(numbers(0.0, 1.0), bump)
    assert greedy_soup(numbers(0.0, 1.0), bump, barrier=0.5).members[0] == 0
    asked = []
    greedy_soup(numbers(0.0, 1.0), lambda module: asked.append(1) or 1.0, barrier=math.inf)
    assert len(asked) == 3  # two members and one mean


def test_barrier_is_over_the_line_and_not_over_the_best_end():
    falls = numbers(1.0, 3.0)  # the score falls in a straight line: no barrier
    assert greedy_soup(falls, score, barrier=0.0).members == [0]


def test_metric_that_estimates_the_statistics_anew_leaves_the_members_alone():
    ensemble = ensemble_of(members(2))
    expected = [snapshot(module) for module in members(2)]

    def metric(module):
        torch.optim.swa_utils.update_bn([X], module)
        module.eval()
        return -F.cross_entropy(module(X), data(8, seed=5)[:][1]).item()

    before = snapshot(ensemble.module)
    greedy_soup(ensemble, metric, barrier=math.inf)
    assert_same([dict(ensemble.member(index)) for index in (0, 1)], expected)
    assert_same(snapshot(ensemble.module), before)


def test_metric_sees_a_module_in_eval_as_fit_does_not_leave_it():
    """Dropout and batch norm of a module that is still in training would make every score a draw."""
    ensemble = ensemble_of(members(2))
    ensemble.train()
    ensemble.module.body[2].eval()  # frozen by hand
    modes, seen = [part.training for part in ensemble.module.modules()], []
    soup = greedy_soup(ensemble, lambda module: seen.extend(p.training for p in module.modules()) or 1.0)
    assert not any(seen)
    assert [part.training for part in ensemble.module.modules()] == modes
    assert repr(soup) == f"Soup(state_dict of {len(soup.state_dict)} tensors, members=[0, 1], score=1.0)"
    with pytest.raises(RuntimeError, match="no data"):
        greedy_soup(ensemble, fails)
    assert [part.training for part in ensemble.module.modules()] == modes


def fails(module):
    raise RuntimeError("no data")


def test_soup_refuses():
    with pytest.raises(TypeError, match="greedy_soup: metric must be a function of a module, got 'val/acc'"):
        greedy_soup(numbers(1.0), "val/acc")
    with pytest.raises(ValueError, match="greedy_soup: mode must be 'min' or 'max', got 'best'"):
        greedy_soup(numbers(1.0), score, mode="best")
    with pytest.raises(ValueError, match=r"greedy_soup: barrier must be at least 0"):
        greedy_soup(numbers(1.0), score, barrier=-1)
    ensemble = numbers(1.0)
    with pytest.raises(ValueError, match="greedy_soup: metric must be finite, got nan"):
        greedy_soup(ensemble, lambda module: math.nan)
    assert ensemble.module.weight == 0
