"""An ablation finds what was planted, goes on after a kill, and refuses what would make its table wrong."""

import copy
import csv
import gc
import importlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from base64 import b64encode
from functools import partial
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import make_trainer
from lightning import LightningDataModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import WandbLogger
from matplotlib.image import imread
from offline_wandb import _finished, read_run, runs

import lightning_tricks as lt
from lightning_tricks.__main__ import main
from lightning_tricks.ablations import Ablation, Effect, ablate
from lightning_tricks.ablations.designs import make_design
from lightning_tricks.ablations.effects import effect_rows, find_effects, signed, verdict
from lightning_tricks.ablations.fingerprints import fingerprint
from lightning_tricks.ablations.pictures import forest
from lightning_tricks.ablations.training import rehearse, run_trial
from lightning_tricks.ablations.trials import Plan, Result, describe_trick
from lightning_tricks.functional.bootstrap import bootstrap_interval
from lightning_tricks.reports.build import write_page

TESTS = Path(__file__).parent
STUDY = '''
import os
import signal
from pathlib import Path

import lightning as L
import torch
from kit import loader, make_trainer
from lightning.pytorch.callbacks import Callback

EPOCHS = 1


class Planted(L.LightningModule):
    """Its score is noise of the seed, noise of the training, and what tricks add."""

    def __init__(self, seed):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.bonus, self.luck, self.number = 0.0, torch.randn(1).item(), seed

    def training_step(self, batch, batch_idx):
        if self.bonus and self.number == 1 and Path("kill").exists():
            Path("kill").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.bonus and self.number == 1 and Path("fail").exists():
            raise RuntimeError("the disk is full")
        self.noise = torch.rand(1).item()
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        score = 10 * self.luck + 0.1 * getattr(self, "noise", 0) + self.bonus
        self.log("val/score", score, sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test/weight", self.weight, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Help(Callback):
    def __init__(self, bonus=1.0):
        self.bonus = bonus

    def on_train_start(self, trainer, module):
        module.bonus = self.bonus


class Draw(Callback):
    """Changes nothing but the draws that follow."""

    def on_train_start(self, trainer, module):
        torch.rand(1)


tricks = {"helps": Help(), "draws": [Draw()]}


def build(seed, callbacks, logger):
    trainer = make_trainer(callbacks, logger=logger, max_epochs=EPOCHS)
    return trainer, Planted(seed), loader(8), loader(4), loader(4)
'''
SCORE = {"metric": "val/score", "mode": "max"}
ONE = {**SCORE, "design": "one-at-a-time"}
WEIGHT = {"metric": "test/weight", "mode": "min", "evaluate": "test", "design": "one-at-a-time"}


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    """Intervals of a tenth of the draws: their own test has all."""
    monkeypatch.setattr("lightning_tricks.ablations.effects.DRAWS", 100)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The file that a user would write, in the working directory; what takes long and is tested elsewhere is off."""
    (tmp_path / "study.py").write_text(STUDY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("lightning_tricks.ablations.run.write_page", lambda *given, **options: None)
    monkeypatch.setattr("lightning_tricks.ablations.training.gc", SimpleNamespace(collect=lambda: None))
    yield importlib.import_module("study")
    del sys.modules["study"]


def environment():
    """That of a process beside the test's, which finds what the study imports."""
    paths = [str(TESTS), os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def scores(ablation):
    return {name: {seed: run.score for seed, run in of.items()} for name, of in ablation.results.items()}


def results(table):
    """Planted scores as results."""
    return {name: {seed: Result(score, 1, 1.0, None) for seed, score in enumerate(of)} for name, of in table.items()}


# ---------------------------------------------------------------------- designs


def test_one_at_a_time_compares_each_with_the_baseline():
    design = make_design("one-at-a-time", ["a", "b"])
    assert design.variants == {"baseline": (), "a": ("a",), "b": ("b",)}
    assert design.contrasts == {"a": {"a": 1, "baseline": -1}, "b": {"b": 1, "baseline": -1}}


def test_leave_one_out_compares_all_with_all_but_one():
    design = make_design("leave-one-out", ["a", "b"])
    assert design.variants == {"baseline": (), "all": ("a", "b"), "all-but-a": ("b",), "all-but-b": ("a",)}
    assert design.contrasts["a"] == {"all": 1, "all-but-a": -1}
    assert design.contrasts["all"] == {"all": 1, "baseline": -1}


def test_a_single_trick_is_trained_once_without_and_once_with_it():
    for kind in ("one-at-a-time", "leave-one-out", "full"):
        design = make_design(kind, ["a"])
        assert sorted(design.variants.values()) == [(), ("a",)]
        assert list(design.contrasts) == ["a"]


def test_full_trains_all_combinations():
    design = make_design("full", ["a", "b", "c"])
    assert list(design.variants) == ["baseline", "c", "b", "a", "b+c", "a+c", "a+b", "a+b+c"]
    assert design.contrasts["a"] == {name: 0.25 if "a" in on else -0.25 for name, on in design.variants.items()}


@given(st.sampled_from(["one-at-a-time", "leave-one-out", "full"]), st.lists(st.floats(-5, 5), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_every_design_finds_effects_that_add_up(kind, sizes):
    planted = {f"t{index}": size for index, size in enumerate(sizes)}
    design = make_design(kind, list(planted))
    table = {name: [seed + sum(map(planted.get, on)) for seed in range(3)] for name, on in design.variants.items()}
    found = find_effects(design, results(table), "max")
    expected = {**planted, "all": sum(sizes)} if "all" in design.contrasts else planted
    assert {name: effect.difference for name, effect in found.items()} == pytest.approx(expected, abs=1e-9)


def test_main_effects_are_those_of_least_squares():
    design = make_design("full", ["a", "b", "c"])
    table = {name: torch.randn(1).tolist() for name in design.variants}
    levels = torch.tensor([[1.0] + [0.5 if name in on else -0.5 for name in "abc"] for on in design.variants.values()])
    solution = torch.linalg.lstsq(levels, torch.tensor(list(table.values()))).solution.flatten()[1:]
    found = find_effects(design, results(table), "max")
    assert [found[name].difference for name in "abc"] == pytest.approx(solution.tolist(), rel=1e-4)


# ---------------------------------------------------------------------- what results say


@pytest.mark.parametrize("kind", ["one-at-a-time", "leave-one-out", "full"])
def test_the_interval_of_a_trick_without_effect_covers_0_in_95_of_100_repetitions(kind):
    design = make_design(kind, ["null", "helps"])
    covered, found = 0, 0
    for _ in range(200):
        luck, noise = torch.randn(5) * 10, torch.randn(len(design.variants), 5)
        rows = enumerate(design.variants.items())
        table = {name: (luck + noise[row] + 9 * ("helps" in on)).tolist() for row, (name, on) in rows}
        effects = find_effects(design, results(table), "max")
        covered += effects["null"].interval[0] <= 0 <= effects["null"].interval[1]
        found += effects["helps"].helps is True
    assert 0.91 <= covered / 200 <= 0.99
    assert found / 200 > 0.95


def test_what_helps_depends_on_the_mode():
    design = make_design("one-at-a-time", ["up", "down", "not"])
    table = {"baseline": [1.0, 2.0, 3.0], "up": [2.0, 3.1, 4.0], "down": [0.0, 0.9, 2.0], "not": [1.1, 2.0, 2.9]}
    for mode, up in (("max", True), ("min", False)):
        found = find_effects(design, results(table), mode)
        assert {name: effect.helps for name, effect in found.items()} == {"up": up, "down": not up, "not": None}


@pytest.mark.parametrize("kind", ["one-at-a-time", "leave-one-out", "full"])
def test_a_trick_that_changes_nothing_to_the_bit_has_no_effect_in_any_design(kind):
    design = make_design(kind, ["helps", "null", "harms"])
    luck = np.random.default_rng(0).normal([[0.8], [0.05], [-0.02]], 0.02, (50, 3, 5))
    for base, gain, loss in luck:
        table = {name: base + gain * ("helps" in on) + loss * ("harms" in on) for name, on in design.variants.items()}
        found = find_effects(design, results({name: row.tolist() for name, row in table.items()}), "max")["null"]
        assert (found.differences, found.interval, verdict(found)) == ((0.0,) * 5, (0.0, 0.0), "no effect seen")


def test_numbers_at_the_end_of_the_range_leave_the_effect_unknown():
    table = {"baseline": [-1e308, 0.0, 1.0, math.inf], "a": [1e308, 1.0, 3.0, math.inf]}
    effect = find_effects(make_design("one-at-a-time", ["a"]), results(table), "max")["a"]
    assert [math.isnan(difference) for difference in effect.differences] == [True, False, False, True]
    assert (effect.interval, effect.helps) == ((-math.inf, math.inf), None)


@pytest.mark.parametrize("count", [3, 5, 10])
def test_intervals_are_those_of_endlessly_many_resamples(count, monkeypatch):
    monkeypatch.undo()
    scores = np.random.default_rng(count).normal(size=count).tolist()
    table = {"baseline": [0.0] * count, "a": scores}
    found = find_effects(make_design("one-at-a-time", ["a"]), results(table), "max")["a"].interval
    many = np.mean([bootstrap_interval(scores, resamples=1_000_000, seed=seed) for seed in range(1, 6)], axis=0)
    assert np.abs(found - many).max() < 0.01 * (many[1] - many[0]) / 2


def test_costs_are_medians_of_what_a_trick_adds():
    design = make_design("leave-one-out", ["a", "b"])
    seconds = {"baseline": [1, 2, 4], "all": [2, 3, 9], "all-but-a": [1.5, 2, 8], "all-but-b": [2, 3, 9]}
    runs = {
        name: {seed: Result(0.0, 1, time, 100 * len(on) + seed) for seed, time in enumerate(seconds[name])}
        for name, on in design.variants.items()
    }
    found = find_effects(design, runs, "max")
    assert {name: (effect.time, effect.memory) for name, effect in found.items()} == {
        "a": (0.5, 100),
        "b": (0, 100),
        "all": (1, 200),
    }


def test_a_training_that_diverged_leaves_the_effect_unknown():
    table = {"baseline": [1.0, 2.0, 3.0], "a": [1.0, math.nan, 3.0]}
    effect = find_effects(make_design("one-at-a-time", ["a"]), results(table), "max")["a"]
    assert math.isnan(effect.difference)
    assert (effect.interval, effect.helps) == ((-math.inf, math.inf), None)


def test_seeds_that_change_nothing_leave_the_effect_unknown():
    """A build that ignores the seed repeats one training: its differences agree without saying anything."""
    table = {"baseline": [1.0, 1.0, 1.0], "a": [1.1, 1.1, 1.1], "b": [1.1, 1.1, 1.2]}
    found = find_effects(make_design("one-at-a-time", ["a", "b"]), results(table), "max")
    assert (found["a"].interval, found["a"].helps) == ((-math.inf, math.inf), None)
    assert math.isfinite(found["b"].interval[1])


def test_seeds_without_their_pair_do_not_count():
    table = results({"baseline": [1.0, 2.0, 4.0, 3.0], "a": [2.0, 3.5, 4.5, 3.25]})
    del table["a"][1]
    effect = find_effects(make_design("one-at-a-time", ["a"]), table, "max")["a"]
    assert effect.differences == (1.0, 0.5, 0.25)


# ---------------------------------------------------------------------- what must be as it was


def closure(held):
    return lambda seed, callbacks, logger: held


def default(held):
    return lambda seed, callbacks, logger, held=held: held


def keyword(held):
    return lambda seed, callbacks, logger, *, held=held: held


def typed(held):
    names = {}
    exec(f"def build(seed, callbacks, logger):\n    return {held!r}", names)
    return names["build"]


class Holds(Callback):
    def __init__(self, held):
        self.held = held

    def __call__(self, seed, callbacks, logger):
        return self.held


class Slots:
    __slots__ = ("held",)

    def __init__(self, held):
        self.held = held


class Ring:
    def __init__(self, held):
        self.held, self.ring = held, [self]


HOLDERS = {
    "closure": closure,
    "default": default,
    "keyword": keyword,
    "typed": typed,
    "object": Holds,
    "slots": Slots,
    "ring": Ring,
    "method": lambda held: Holds(held).__call__,
    "partial": lambda held: partial(study_of, held=held),
    "partial argument": lambda held: partial(study_of, held),
    "partial function": lambda held: partial(closure(held)),
    "tuple": lambda held: ({"a": [held]},),
}


def study_of(held, *given):
    return held


VALUES = {
    "number": (1e-3, 1e-6),
    "integer and float": (1, 1.0),
    "none": (None, False),
    "dict": ({"a": 1}, {"a": 2}),
    "set": ({"a", "b"}, {"a", "c"}),
    "tensor": (torch.zeros(9999), torch.zeros(9999).index_fill(0, torch.tensor([5000]), 1)),
    "dtype": (torch.float32, torch.float16),
    "array": (np.zeros(9999), np.eye(1, 9999, 5000)[0]),
    "function": (torch.relu, torch.tanh),
    "lambdas of a line": (lambda x: x + 1, lambda x: x - 1),
    "path": (Path("a"), Path("b")),
    "dataclass": (Result(0.0, 1, 1.0, None), Result(0.0, 2, 1.0, None)),
    "module": (torch.nn.Dropout(0.1), torch.nn.Dropout(0.2)),
    "class": (Slots, Ring),
}


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("holder", HOLDERS)
def test_fingerprints_tell_apart_what_is_held_and_are_the_same_for_the_same(holder, values):
    make, (one, other) = HOLDERS[holder], VALUES[values]
    if holder == "typed":
        one, other = f"{one} a {values}", f"{other} b {values}"
    assert fingerprint(make(one)) == fingerprint(make(copy.deepcopy(one)))
    assert fingerprint(make(one)) != fingerprint(make(other))


def test_fingerprints_tell_the_source_of_classes_apart(study):
    def made(number, base):
        names = {"Callback": base}
        exec(f"class Trick(Callback):\n    def on_fit_start(self, *given):\n        return {number}", names)
        return names["Trick"]()

    for base in (study.Callback, lt.EMA):
        assert describe_trick(made(1, base)) == describe_trick(made(1, base))
        assert describe_trick(made(1, base)) != describe_trick(made(2, base))
    assert describe_trick(Holds({"f": 1})) != describe_trick(Holds({"f": 2}))


def test_functions_among_the_settings_are_told_apart():
    def made(factor):
        return lt.ParamSchedule("weight_decay", lambda step, total: factor)

    assert describe_trick(made(1.0)) == describe_trick(made(1.0))
    assert describe_trick(made(1.0)) != describe_trick(made(2.0))


def test_fingerprints_are_the_same_in_another_process(study):
    program = (
        "import study\nfrom functools import partial\nfrom lightning_tricks.ablations.fingerprints import fingerprint\n"
        "held = {'a', 'b', 'c', study.Help, 1.5}\n"
        "print(fingerprint([study.build, partial(study.build, held), study.Help(held), study.torch.zeros(3)]))"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, check=True, env=environment(), capture_output=True, text=True).stdout
    held = {"a", "b", "c", study.Help, 1.5}
    here = [study.build, partial(study.build, held), study.Help(held), torch.zeros(3)]
    assert found.strip() == fingerprint(here)


@pytest.mark.parametrize("arguments", [{"tricks": {"a": lambda: Holds(Lock())}}, {"build": closure(Lock())}])
def test_what_cannot_be_described_is_refused_at_once(arguments):
    given = {"build": closure(1), "tricks": {"EMA": lt.EMA()}, **SCORE, **arguments}
    with pytest.raises(TypeError, match=f"^ablate: {next(iter(arguments))} must be made of what a later call can"):
        ablate(**given)


# ---------------------------------------------------------------------- trainings


def test_a_planted_trick_is_found_and_one_that_changes_only_the_draws_is_not(study, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_tricks.ablations.run.write_page", write_page)
    ablation = ablate(study.build, study.tricks, **ONE, folder=tmp_path / "out")
    assert ablation.effects["helps"].differences == pytest.approx([1.0] * 5, abs=1e-5)
    low, high = ablation.effects["draws"].interval
    assert -0.2 < low < 0 < high < 0.2
    assert (ablation.effects["helps"].helps, ablation.effects["draws"].helps) == (True, None)
    text = (tmp_path / "out" / "table.md").read_text()
    assert text == str(ablation)
    assert "| helps | +1 | +1 to +1 | helps |" in text
    assert "| draws | " in text
    assert imread(tmp_path / "out" / "forest.png").std() > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Ablation: out" in page
    assert b64encode((tmp_path / "out" / "forest.png").read_bytes()).decode() in page
    assert "Helps: helps; no effect seen: draws." in page
    for name, of in ablation.results.items():
        for seed, run in of.items():
            folder = tmp_path / "out" / "trials" / f"{name}-seed{seed}"
            with (folder / "metrics.csv").open(newline="") as file:
                logged = [float(row["val/score"]) for row in csv.DictReader(file) if row["val/score"]]
            assert logged[-1] == pytest.approx(run.score)
            assert run.steps == 2


def test_a_second_call_trains_nothing_and_more_seeds_train_only_theirs(study):
    seen = study.seen = []  # of the module: what a closure holds must stay as it was

    def build(seed, callbacks, logger):
        study.seen.append(seed)
        return study.build(seed, callbacks, logger)

    first = ablate(build, study.tricks, **ONE, seeds=2)
    rehearsed = [0, 0, 0]
    assert seen == [*rehearsed, 0, 0, 0, 1, 1, 1]
    assert str(ablate(build, study.tricks, **ONE, seeds=2)) == str(first)
    assert len(seen) == 9
    more = ablate(build, study.tricks, **ONE, seeds=3)
    rehearsed = [2, 2, 2]
    assert seen[9:] == [*rehearsed, 2, 2, 2]
    assert all(more.results[name][seed] == run for name, of in first.results.items() for seed, run in of.items())


def test_the_same_seed_gives_the_same_score_and_the_caller_draws_on_as_before(study):
    random = torch.get_rng_state()
    first = ablate(study.build, {"helps": study.Help(0.0)}, **ONE, seeds=[3, 7], folder="first")
    assert first.effects["helps"].differences == (0.0, 0.0)
    second = ablate(study.build, study.tricks, **ONE, seeds=[7, 3], folder="second")
    assert scores(second)["baseline"] == scores(first)["baseline"]
    assert torch.equal(torch.get_rng_state(), random)
    assert "PL_GLOBAL_SEED" not in os.environ


@pytest.mark.parametrize("evaluate", ["validate", "test"])
def test_data_come_as_loaders_as_a_datamodule_or_with_the_module(study, evaluate):
    def as_datamodule(seed, callbacks, logger):
        trainer, module, train, *others = study.build(seed, callbacks, logger)
        datamodule = LightningDataModule()
        datamodule.train_dataloader = lambda: train
        datamodule.val_dataloader, datamodule.test_dataloader = (lambda: others[0]), (lambda: others[1])
        return trainer, module, datamodule

    def with_module(seed, callbacks, logger):
        trainer, module, train, *others = study.build(seed, callbacks, logger)
        module.train_dataloader = lambda: train
        module.val_dataloader, module.test_dataloader = (lambda: others[0]), (lambda: others[1])
        return trainer, module

    metric = {"validate": "val/score", "test": "test/weight"}[evaluate]
    expected = ablate(study.build, study.tricks, metric=metric, mode="max", evaluate=evaluate, seeds=1)
    for build in (as_datamodule, with_module):
        folder = build.__name__
        found = ablate(build, study.tricks, metric=metric, mode="max", evaluate=evaluate, seeds=1, folder=folder)
        assert scores(found) == scores(expected)


def test_a_trick_that_draws_when_it_is_made_leaves_the_modules_draws_alone(study):
    def factory():
        return study.Help(0.0 * torch.rand(1).item())

    ablation = ablate(study.build, {"draws": factory}, **SCORE, seeds=2)
    assert ablation.effects["draws"].differences == (0.0, 0.0)


def test_callbacks_are_copied_for_each_trial_and_functions_make_new_ones(study):
    given, made = study.Help(), []

    def factory():
        made.append(study.Draw())
        return made[-1]

    used = []

    def build(seed, callbacks, logger):
        used.extend(callbacks)
        return study.build(seed, callbacks, logger)

    ablate(build, {"given": given, "made": factory}, **SCORE, seeds=1)
    assert len(used) == 8  # both in `all`, one in each of the others, rehearsed and trained
    assert len({id(callback) for callback in used}) == 8
    assert all(callback is not given for callback in used)
    assert any(callback is one for callback in used for one in made)


def test_the_weights_are_evaluated_that_fit_left(study):
    ablation = ablate(study.build, {"EMA": lt.EMA(0.5)}, **WEIGHT, seeds=1)
    assert scores(ablation) == {"baseline": {0: pytest.approx(-0.2)}, "EMA": {0: pytest.approx(-0.15)}}


def test_a_killed_run_goes_on_where_it_stopped(study):
    whole = ablate(study.build, study.tricks, **ONE, seeds=3, folder="whole")
    Path("kill").touch()
    program = (
        "import torch, study\nfrom lightning_tricks.ablations import ablate\ntorch.set_num_threads(1)\n"
        f"ablate(study.build, study.tricks, **{ONE!r}, seeds=3, folder='killed')"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, env=environment(), capture_output=True).returncode == -signal.SIGKILL
    done = {path.parent.name: path.stat().st_mtime_ns for path in Path("killed").rglob("result.json")}
    assert set(done) == {"baseline-seed0", "helps-seed0", "draws-seed0", "baseline-seed1"}
    assert Path("killed/trials/helps-seed1").is_dir()
    ended = ablate(study.build, study.tricks, **ONE, seeds=3, folder="killed")
    assert scores(ended) == scores(whole)
    assert [effect.interval for effect in ended.effects.values()] == [
        effect.interval for effect in whole.effects.values()
    ]
    for name, when in done.items():
        assert Path("killed/trials", name, "result.json").stat().st_mtime_ns == when


def test_two_processes_give_the_table_of_one_also_when_one_of_them_was_killed(study):
    one = ablate(study.build, study.tricks, **ONE, seeds=2, folder="one")
    Path("kill").touch()
    with pytest.raises(RuntimeError, match="helps-seed1.* .a process was killed before this was finished"):
        ablate(study.build, study.tricks, **ONE, seeds=2, folder="two", processes=2)
    two = ablate(study.build, study.tricks, **ONE, seeds=2, folder="two", processes=2)
    assert scores(two) == scores(one)
    assert not two.unfinished


@pytest.mark.slow
def test_the_processes_of_a_killed_call_end_with_it(study):
    program = (
        "import study\nfrom lightning_tricks.ablations import ablate\nif __name__ == '__main__':\n"
        f"    ablate(study.build, study.tricks, **{ONE!r}, seeds=200, folder='killed', processes=2)"
    )
    Path("main.py").write_text(program)
    command = [sys.executable, "main.py"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE) as process:
        while process.poll() is None and not any(Path().rglob("result.json")):
            time.sleep(0.05)
        process.kill()
        process.communicate(timeout=120)  # the pipe ends with the last process that holds it
    assert 0 < len(list(Path("killed").rglob("result.json"))) < 600


def test_a_trial_that_fails_is_named_and_the_others_are_kept(study):
    Path("fail").touch()
    with pytest.raises(RuntimeError, match=r"1 of 9 trials failed: helps-seed1 \(RuntimeError: the disk is full\)"):
        ablate(study.build, study.tricks, **ONE, seeds=3)
    assert "the disk is full" in Path("ablation/trials/helps-seed1/error.txt").read_text()
    text = Path("ablation/table.md").read_text()
    assert "helps-seed1 failed: RuntimeError: the disk is full" in text
    assert "Pairs of trainings: 2 to 3." in text
    Path("fail").unlink()
    ablation = ablate(study.build, study.tricks, **ONE, seeds=3)
    assert len(ablation.effects["helps"].differences) == 3
    assert not Path("ablation/trials/helps-seed1/error.txt").exists()


def test_trials_of_a_launcher_write_the_tables_when_the_last_is_there(study):
    ids = ["baseline-seed0", "helps-seed0", "draws-seed0"]
    for index, trial in enumerate(ids):
        assert not Path("ablation/table.md").exists()
        ablation = ablate(study.build, study.tricks, **ONE, seeds=1, trials=[trial])
        assert list(ablation.unfinished) == ids[index + 1 :]
    assert Path("ablation/table.md").read_text() == str(ablation)
    assert "An interval is unknown with fewer than 3 pairs" in str(ablation)


def test_trials_that_fail_alike_are_named_together(study):
    build = partial(full, study)
    with pytest.raises(RuntimeError, match=r"2 of 6 trials failed: helps-seed1, helps-seed2 \(OSError: full\)\. The"):
        ablate(build, study.tricks, **ONE, seeds=[1, 2])
    text = Path("ablation/table.md").read_text()
    assert "helps-seed1, helps-seed2 failed: OSError: full" in text


def test_what_was_read_and_not_trained_is_said(study, monkeypatch):
    said = []
    monkeypatch.setattr("lightning_tricks.ablations.run.rank_zero_info", said.append)
    ablate(study.build, study.tricks, **ONE, seeds=1)
    assert said == []
    ablate(study.build, study.tricks, **ONE, seeds=2)
    assert said == ["ablate: 3 of 6 trials were read from ablation"]


def test_the_peak_memory_of_a_trick_is_seen(study, monkeypatch):
    monkeypatch.setattr("lightning_tricks.ablations.training.gc", gc)
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not tell a process's peak memory anew")

    class Hoard(study.Callback):
        def on_train_start(self, trainer, module):
            self.kept = torch.ones(2**26)

    ablation = ablate(study.build, {"hoard": Hoard()}, **SCORE, seeds=3)
    assert 0.9 < ablation.effects["hoard"].memory / 2**28 < 1.2


EMAS = {"one": lt.EMA(0.5), "other": lt.EMA(0.9), "draws": Callback()}
RIVALS = {"lr": lt.LRSchedule(lt.Cosine()), "ensemble": lt.SnapshotEnsemble(2)}


@pytest.mark.parametrize(
    ("tricks", "words"),
    [
        (EMAS, r"2 of 5 variants .* all, all-but-draws \(ValueError: EMA: callbacks must be the only one"),
        (RIVALS, r"1 of 4 variants .* all \(ValueError: LRSchedule: callbacks must be the only one"),
        (
            {"draws": Callback(), "gamma": lt.ParamSchedule("gamma", lt.Cosine())},
            r"2 of 4 variants .* all, all-but-draws \(ValueError: ParamSchedule: name must be",
        ),
        (
            {"draws": Callback(), "long": lt.LRSchedule(lt.Warmup("3ep", lt.Cosine()))},
            r"2 of 4 variants .* all, all-but-draws \(ValueError: Warmup: duration must be at most the run's 2",
        ),
    ],
    ids=["in setup", "in setup of one of them", "where fit starts", "where training starts"],
)
def test_tricks_that_cannot_be_trained_are_refused_before_anything_is(study, tricks, words):
    random = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=f"^ablate: {words}.*Nothing was trained"):
        ablate(study.build, tricks, **SCORE)
    assert {path.name for path in Path("ablation").rglob("*") if path.is_file()} == {"error.txt"}
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("trick", [lt.SnapshotEnsemble(2, directory="own"), lt.PostHocEMA(directory="own")])
def test_a_trick_with_a_folder_of_its_own_is_refused_before_anything_is_made(study, trick):
    for one in (trick, [Callback(), trick], lambda: trick):
        with pytest.raises(ValueError, match="directory must be None, got 'own'. Leave it out: each trial has its own"):
            ablate(study.build, {"a": one}, **SCORE, seeds=2)
    assert {path.name for path in Path().iterdir()} <= {"study.py", "__pycache__"}


def of_its_callbacks(study, seed, callbacks, logger):
    trainer, *rest = study.build(seed, callbacks, logger)
    trainer.fit_loop.max_epochs = 1 + len(callbacks)
    return trainer, *rest


def test_budgets_that_differ_are_refused_before_anything_is_trained(study):
    words = r"^ablate: build must be .*, got {'baseline': {'max_epochs': 1}, 'all': {'max_epochs': 2}}. Nothing was"
    with pytest.raises(ValueError, match=words):
        ablate(partial(of_its_callbacks, study), {"helps": study.Help()}, **SCORE, seeds=2)
    assert not Path("ablation").exists()


class Sets(Callback):
    """A trick that makes the training longer, or asks it to stop at once."""

    def __init__(self, epochs, stop=False):
        self.epochs, self.stop = epochs, stop

    def setup(self, trainer, pl_module, stage):
        trainer.fit_loop.max_epochs = self.epochs

    def on_train_batch_end(self, trainer, *given):
        trainer.should_stop = self.stop


def test_a_trick_that_changes_the_budget_is_named_and_one_that_stops_is_not(study):
    tricks = {"longer": Sets(3), "same": Sets(1), "stops": Sets(5, stop=True)}
    ablation = ablate(study.build, tricks, **ONE, seeds=1)
    steps = {name: of[0].steps for name, of in ablation.results.items()}
    assert (steps["baseline"], steps["longer"], steps["same"]) == (2, 6, 2)
    assert steps["stops"] not in (2, 10)
    text = Path("ablation/table.md").read_text()
    assert [line for line in text.splitlines() if " took " in line] == [
        "longer took 6 optimizer steps beside 2 of the baseline, and nothing asked it to stop: "
        "what it does is also what its budget does."
    ]


@pytest.mark.slow
def test_other_processes_refuse_before_anything_is_trained_too(study):
    with pytest.raises(RuntimeError, match=r"^ablate: 2 of 5 variants cannot be trained: all, all-but-draws"):
        ablate(study.build, EMAS, **SCORE, processes=2)
    assert not list(Path("ablation").rglob("metrics.csv"))


def test_a_module_that_cannot_be_evaluated_is_refused_before_it_is_trained(study):
    def build(seed, callbacks, logger):
        trainer, module, *data = study.build(seed, callbacks, logger)
        module.test_step = super(study.Planted, module).test_step
        return trainer, module, *data

    with pytest.raises(RuntimeError, match=r"2 of 2 variants .*baseline, EMA .*No `test_step\(\)` method"):
        ablate(build, {"EMA": lt.EMA()}, **WEIGHT)
    assert not list(Path("ablation").rglob("metrics.csv"))


def test_a_rehearsal_leaves_nothing_behind(study):
    seen = []

    class Watch(study.Callback):
        def on_train_batch_start(self, *given):
            seen.append("train")

        def on_validation_batch_start(self, *given):
            seen.append("validate")

    tricks = {"watch": Watch(), "ensemble": lt.SnapshotEnsemble(2), "EMA": lt.EMA()}
    design = make_design("leave-one-out", list(tricks))
    described = {name: describe_trick(trick) for name, trick in tricks.items()}
    plan = Plan(study.build, tricks, "", described, design, (0,), "val/score", "validate", Path("ablation"), None)
    random, files = torch.get_rng_state(), set(Path().rglob("*"))
    assert rehearse(plan, "all-seed0")["max_epochs"] == 1
    assert seen == []
    assert set(Path().rglob("*")) == files
    assert torch.equal(torch.get_rng_state(), random)
    assert run_trial(plan, "all-seed0") is None
    assert "train" in seen


@pytest.mark.slow
def test_two_ranks_are_one_trial(study, tmp_path):
    text = "import torch, study\nfrom lightning_tricks.ablations import ablate\nimport lightning_tricks as lt\n"
    text += f"""
def build(seed, callbacks, logger):
    trainer = study.make_trainer(callbacks, logger=logger, max_epochs=1, strategy="ddp", devices=2)
    return trainer, study.Planted(seed), study.loader(16), study.loader(8), study.loader(8)

ablate(build, {{"EMA": lt.EMA(0.5)}}, **{WEIGHT!r}, seeds=2, folder="two")
"""
    (tmp_path / "main.py").write_text(text)
    done = subprocess.run([sys.executable, "main.py"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stored = {path.parent.name: json.loads(path.read_text()) for path in Path("two").rglob("result.json")}
    weights = {"baseline": -0.2, "EMA": -0.15}
    assert {name: (result["metrics"]["test/weight"], result["costs"]["steps"]) for name, result in stored.items()} == {
        f"{name}-seed{seed}": (pytest.approx(weight), 2) for name, weight in weights.items() for seed in (0, 1)
    }
    assert Path("two/table.md").is_file()


def logs_to_its_own(study, seed, callbacks, logger):
    own = WandbLogger(f"{len(callbacks)}-{seed}", Path("own").resolve(), offline=True, project="tests")
    return study.build(seed, callbacks, [*logger, own])


def test_a_wandb_logger_of_the_users_own_has_a_run_of_each_trial(study):
    ablation = ablate(partial(logs_to_its_own, study), {"helps": study.Help()}, **SCORE, seeds=2)
    assert wandb.run is None
    found = {}
    for folder in runs(Path("own")):
        rows, config = read_run(folder)
        found[config["variant"], config["seed"]] = [row["val/score"] for row in rows if "val/score" in row][-1]
    assert len(runs(Path("own"))) == 4  # a rehearsal leaves none
    assert found == {(name, seed): pytest.approx(x) for name, of in scores(ablation).items() for seed, x in of.items()}


def test_every_trial_is_a_run_of_the_group_in_wandb(study, tmp_path):
    ablate(study.build, {"EMA": lt.EMA(0.5)}, **SCORE, seeds=1, folder=tmp_path / "digits", project="tests")
    found = {}
    for folder in runs(tmp_path / "digits"):
        rows, config = read_run(folder)
        (run,) = [record.run for record in _finished(folder) if record.WhichOneof("record_type") == "run"]
        assert (run.project, run.run_group) == ("tests", "digits")
        assert (config["seed"], "tricks" in config) == (0, config["variant"] == "all")
        found[run.display_name] = [row["val/score"] for row in rows if "val/score" in row][-1]
    assert found == {
        f"{name}-seed0": pytest.approx(json.loads(path.read_text())["metrics"]["val/score"])
        for name in ("baseline", "all")
        for path in (tmp_path / "digits").rglob(f"{name}-seed0/result.json")
    }


# ---------------------------------------------------------------------- what is refused


def test_other_settings_in_the_same_folder_are_refused(study):
    ablate(study.build, study.tricks, **ONE, seeds=1)
    other = {"helps": study.Help(2.0), "draws": study.Draw()}
    with pytest.raises(ValueError, match=r"^ablate: tricks must be what .*, got \['helps'\]. It or.*helps-seed0"):
        ablate(study.build, other, **ONE, seeds=1)
    ablate(study.build, {"EMA": lt.EMA(lt.HalfLife("1ep"))}, **ONE, seeds=1, folder="decay")
    ablate(study.build, {"EMA": lt.EMA(lt.HalfLife("1ep"))}, **ONE, seeds=1, folder="decay")
    with pytest.raises(ValueError, match="^ablate: tricks must be what it was"):
        ablate(study.build, {"EMA": lt.EMA(lt.HalfLife("2ep"))}, **ONE, seeds=1, folder="decay")
    with pytest.raises(ValueError, match="^ablate: build must be what it was .*, got 'another one'. It or what it"):
        ablate(lambda *given: study.build(*given), study.tricks, **ONE, seeds=1)


OF_ITS_FILE = """
from functools import partial
import torch
from kit import loader, make_trainer
from study import Planted

HELD = {}

def half():
    return 0.5

class Rate:
    lr = 0.1

    def __call__(self):
        return half() if self else twice()

class Net(Planted):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=Rate()())

def twice():  # calls what calls it
    return [half() for _ in range(2)] if HELD else Net

def unused():
    return 1

def build(seed, callbacks, logger):
    return make_trainer(callbacks, logger=logger, max_epochs=1), Net(seed), loader(8), loader(4), loader(4)

class Builder:
    def __call__(self, *given):
        return build(*given)

def held(build):
    return lambda *given: build(*given)

builds = {"function": build, "object": Builder(), "method": Builder().__call__, "partial": partial(build)}
builds |= {"lambda": lambda *given: build(*given), "closure": held(build)}
"""


CHANGES = {"return 0.5": "return 0.4", "lr=Rate()()": "lr=1", "lr = 0.1": "lr = 0.2", "range(2)": "range(3)"}


def typed_file(text):
    """Its builds, as a shell or a notebook defines them."""
    names = {"__name__": "typed"}
    exec(text, names)
    return names["builds"]


@pytest.mark.parametrize("build", ["function", "object", "method", "partial", "lambda", "closure"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_build_calls_in_its_own_file_must_be_as_it_was(study, build, change):
    before, again = typed_file(OF_ITS_FILE), typed_file(OF_ITS_FILE.replace("return 1", "return 2"))
    after = typed_file(OF_ITS_FILE.replace(change, CHANGES[change]))
    ablate(before[build], {"helps": study.Help()}, **SCORE, seeds=1, trials=["baseline-seed0"])
    ablate(again[build], {"helps": study.Help()}, **SCORE, seeds=1, trials=[])
    with pytest.raises(ValueError, match="^ablate: build must be what it was for the trials in the folder"):
        ablate(after[build], {"helps": study.Help()}, **SCORE, seeds=1, trials=[])


OF_TRICKS = """
from functools import cached_property, lru_cache, partial, wraps
from threading import Lock
import lightning_tricks as lt
from lightning.pytorch.callbacks import Callback

def half(factor=0.5):
    return factor if factor else twice()

def twice():
    return half() * 2

def loud(function):
    @wraps(function)
    def call(*given):
        return function(*given)
    return call

@loud
def decorated():
    return half()

@lru_cache
def cached(step, total):
    return half()

class Base(Callback):
    lock = Lock()
    rates = [0.1, 0.2]

    def setup(self, trainer, pl_module, stage):
        pl_module.lr = half()

class Own(Base):
    pass

class Static(Callback):
    @staticmethod
    def rate():
        return half()

class Property(Callback):
    @cached_property
    def rate(self):
        return half()

    @property
    def other(self):
        return None

    @other.setter
    def other(self, value):
        half()

def rate(step, total):
    return decorated()

def unused():
    return 1

tricks = {"class": Own(), "static": Static(), "property": Property(), "function": lt.LRSchedule(rate)}
tricks |= {"cached": lt.LRSchedule(cached), "lambda": lt.LRSchedule(lambda step, total: half())}
tricks |= {"made": lambda: Own(), "partial": lt.LRSchedule(partial(rate)), "several": [Callback(), Own()]}
"""


def typed_tricks(text):
    names = {"__name__": "typed"}
    exec(text, names)
    return {name: describe_trick(trick)["fingerprint"] for name, trick in names["tricks"].items()}


@pytest.mark.parametrize(("old", "new"), [("=0.5", "=0.4"), ("half() * 2", "half() * 3")])
def test_what_a_trick_calls_in_its_own_file_must_be_as_it_was(old, new):
    before, after = typed_tricks(OF_TRICKS), typed_tricks(OF_TRICKS.replace(old, new))
    assert [name for name in before if before[name] == after[name]] == []


def test_what_a_class_holds_must_be_as_it_was():
    before, after = typed_tricks(OF_TRICKS), typed_tricks(OF_TRICKS.replace("0.2]", "0.3]"))
    assert [name for name in before if before[name] != after[name]] == ["class", "made", "several"]


def test_a_remark_another_place_and_what_no_trick_calls_may_change():
    moved = "# a remark\n\n" + OF_TRICKS.replace("return 1", "return 2").replace("def twice", "\n# more\ndef twice")
    assert typed_tricks(moved) == typed_tricks(OF_TRICKS)


def test_an_edit_of_the_file_while_it_trains_changes_no_result(study):
    file = Path("edited.py")
    file.write_text(OF_TRICKS + STUDY.replace("def build(", "def build_plain("))
    edited = importlib.import_module("edited")

    def build(seed, callbacks, logger):
        text = file.read_text()
        file.write_text(f"def moved_by_{len(text)}():\n    pass\n" * 40 + text)
        return study.build(seed, callbacks, logger)

    for _ in range(2):
        ablate(build, {"rate": lt.LRSchedule(edited.rate, replace=True), "own": edited.Own()}, **ONE, seeds=1)
    assert file.read_text().count("moved_by") == 6 * 40  # three rehearsed, three trained, none of them again


def typed_build(text):
    """The function that a text defines, as a shell or a notebook does."""
    names = {"__name__": "typed"}
    exec("import functools, enum, logging, re, torch, typing\n" + text, names)
    return names["build"]


UNCHANGED = {
    "docstring": ("def build():\n    'a'\n    return 1", "'a'", "'b'"),
    "new docstring": ("def build():\n    return 1", "    return", "    'a'\n    return"),
    "docstring of a class": ("class A:\n    'a'\ndef build(): return A()", "'a'", "'b'"),
    "new docstring of a class inside": ("def build():\n    class A:\n        x = 1", "    x", "    'a'\n        x"),
    "docstring of what is wrapped": (
        "class D:\n    def __init__(self, f): functools.update_wrapper(self, f)\n"
        "@D\ndef f():\n    'a'\ndef build(f=f): pass",
        "'a'",
        "'b'",
    ),
    "split line": ("def build(s):\n    return s.a(1).b(2)", "s.a(1).b(2)", "(s\n    .a(1)\n    .b(2))"),
    "split loop": ("def build(s):\n    while True: s()", "True: s", "True:\n        s"),
    "split try": ("def build(s):\n    try: s()\n    except OSError: pass", "try: s", "try:\n        s"),
}
CHANGED = {
    "attribute": ("def build(x): return x.a", "x.a", "x.b"),
    "global name": ("def build(x): return torch.optim.SGD(x)", "SGD", "Adam"),
    "keyword": ("def build(f): return f(a=1)", "a=1", "b=1"),
    "keyword only": ("def build(a=1): return a", "a=1", "*, a=1"),
    "position only": ("def build(a): return a", "a)", "a, /)"),
    "many": ("def build(*a): return 1", "*a", "**a"),
    "argument": ("def build(a):\n    b = a", "(a)", "(a, b)"),
    "argument by its name": ("def build(a):\n    b = a", "(a)", "(a, *, b)"),
    "name of an argument": ("def build(a): return 1", "(a)", "(b)"),
    "generator": ("def build(): return 1", "(): ", "():\n    if 0: yield\n    "),
    "what is tried": (
        "def build(f, g):\n    f()\n    try:\n        g()\n    except OSError: pass",
        "    f()\n    try:\n",
        "    try:\n        f()\n",
    ),
    "where it jumps": (
        "def build(x):\n    if x:\n        x()\n    x(1)\n    return x(2)",
        "\n    x(1)",
        "\n        x(1)",
    ),
    "set": ("def build(x): return x in {1, 2}", "2}", "3}"),
    "enum": ("class A(enum.Enum):\n    a = functools.partial(int, 1)\ndef build(x=A.a): return x", "1)", "2)"),
    "enum of a class": ("class A(enum.Enum):\n    a = 1\ndef build(): return A", "1", "2"),
    "partial": ("def f(x): return 1\ng = functools.partial(f, 2)\ndef build(): return g()", "return 1", "return 3"),
    "wrapper": (
        "class D:\n    def __init__(self, f): functools.update_wrapper(self, f)\n"
        "    def __call__(self): return 1\n@D\ndef f(): pass\ndef build(): return f()",
        "return 1",
        "return 2",
    ),
    "held function": (
        "class D:\n    def __init__(self, f): self.f = f\n    def __call__(self): return self.f()\n"
        "@D\ndef f(): return 1\ndef build(): return f()",
        "return 1",
        "return 2",
    ),
    "bound method": ("class A:\n    def f(self): return 1\nm = A().f\ndef build(): return m()", "1", "2"),
    "class method": ("class A:\n    @classmethod\n    def f(c): return 1\nm = A.f\ndef build(): m()", "1", "2"),
    "static method": ("@staticmethod\ndef f(): return 1\ndef build(): return f()", "1", "2"),
    "partial __call__": (
        "class A:\n    def f(self, x): pass\n    __call__ = functools.partialmethod(f, 1)\ndef build(): A()()",
        "1",
        "2",
    ),
    "cached __call__": (
        "class A:\n    @functools.lru_cache\n    def __call__(s): return 1\ndef build(): A()",
        "1",
        "2",
    ),
    "metaclass": (
        "class T(type):\n    def __call__(c): return 1\nclass A(metaclass=T): pass\ndef build(): A()",
        "1",
        "2",
    ),
    "base of a library": ("class A(torch.nn.ReLU): pass\ndef build(): A()", "nn.ReLU", "nn.SiLU"),
    "pattern of a class": ("class A:\n    p = re.compile('a')\ndef build(): A()", "'a'", "'b'"),
    "pattern as default": ("def f(p=re.compile('a')): pass\ndef build(): f()", "'a'", "'b'"),
    "compiled": ("@torch.compile(backend='eager')\ndef f(): return 1\ndef build(): f()", "1", "2"),
    "one of several": (
        "@functools.singledispatch\ndef f(x): return 1\n@f.register(int)\ndef _(x): return 2\ndef build(): f(3)",
        "return 2",
        "return 4",
    ),
}


@pytest.mark.parametrize("case", UNCHANGED)
def test_what_is_said_of_code_and_how_it_is_laid_out_may_change(case):
    text, old, new = UNCHANGED[case]
    assert old in text
    assert fingerprint(typed_build(text)) == fingerprint(typed_build(text.replace(old, new)))


@pytest.mark.parametrize("case", CHANGED)
def test_what_code_does_must_be_as_it_was(case):
    text, old, new = CHANGED[case]
    assert fingerprint(typed_build(text)) == fingerprint(typed_build(text))
    assert fingerprint(typed_build(text)) != fingerprint(typed_build(text.replace(old, new)))


USED = {
    "dispatched": "@functools.singledispatch\ndef f(x): return x\ndef build(): return f(3)",
    "flag": "class F(enum.Flag):\n    A = 1\n    B = 2\ndef build(): return F.A | F.B",
    "protocol": "class P(typing.Protocol): pass\nclass A(P, torch.nn.Module): pass\ndef build(): return A()",
    "compiled": "@torch.compile(backend='eager')\ndef f(x): return x + 1\ndef build(): return f(torch.zeros(2))",
    "called object": "class A:\n    n = 0\n    def __call__(self): self.n += 1\na = A()\ndef build(): a()",
}


@pytest.mark.parametrize("case", USED)
def test_use_changes_nothing(case):
    build = typed_build(USED[case])
    before = fingerprint(build)
    build()
    assert fingerprint(build) == before


OF_ANY_PROCESS = """
import enum, functools, logging, sys
import torch
from lightning_tricks.ablations.fingerprints import fingerprint

class Act(enum.Enum):
    RELU = functools.partial(torch.relu)

class Net(torch.nn.Module):
    'Said.'
    log, act = logging.getLogger(__name__), Act.RELU

    @torch.compile(backend='eager')
    def forward(self, x):
        'Said.'
        return self.act.value(x)

class Call:
    def __init__(self, function):
        functools.update_wrapper(self, function)

@Call
def call():
    return Act.RELU

@torch.compile(backend='eager')
def score(x):
    return Net()(x)

def build(act=Act.RELU, call=call):
    return score(act)

print(fingerprint([build, Net, Act.RELU, Net.forward, score, functools.lru_cache(build)]))
"""


@pytest.mark.slow
def test_every_way_to_start_a_file_gives_the_same(study):
    Path("anywhere.py").write_text(OF_ANY_PROCESS)
    found = [
        subprocess.run([sys.executable, *how], check=True, env=environment(), capture_output=True, text=True).stdout
        for how in (
            ["-OO", "anywhere.py"],
            ["-c", "import anywhere"],
            ["-m", "cProfile", "anywhere.py"],
        )
    ]
    assert len({text.splitlines()[0] for text in found}) == 1


def test_what_pickle_takes_through_its_table_is_told_apart():
    items = [re.compile("a"), re.compile("b"), np.sin, np.cos, int | str, int | None]
    assert len(set(map(fingerprint, items))) == len(items)


class Node:
    def __init__(self, near):
        self.near = near


def chain(length):
    node = Node([length])
    for _ in range(1000):
        node = Node([node, node])
    return node


def ring(last):
    nodes = [Node(number) for number in range(29)] + [Node(last)]
    for node in nodes:
        node.near = [node.near, *nodes]
    return nodes[0]


@pytest.mark.parametrize("make", [chain, ring])
def test_objects_that_refer_to_each_other_are_walked_once(make):
    assert fingerprint(make(1)) == fingerprint(make(1)) != fingerprint(make(2))


def test_a_number_of_thousands_of_digits_is_refused():
    with pytest.raises(TypeError, match="^ablate: tricks must be made of what a later call can compare"):
        describe_trick(Holds(10**5000))


class Places(Callback):
    def __init__(self, places):
        self._lock, self.places = Lock(), places

    def __deepcopy__(self, memo):
        return Places(self.places)

    @property
    def settings(self):
        return {"places": self.places, "nested": Result(0.0, 1, 1.0, self.places)}


def test_sets_among_the_settings_are_the_same_in_every_process():
    program = (
        "from test_ablation import Places, Result, describe_trick, fingerprint, partial\n"
        "print(describe_trick(Places({'a', 'b', 'c', 'd', Result, partial}))['fingerprint'])"
    )
    command = [sys.executable, "-c", program]
    found = [
        subprocess.run(
            command, check=True, env=environment() | {"PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] == describe_trick(Places({"a", "b", "c", "d", Result, partial}))["fingerprint"]
    assert found[0] != describe_trick(Places({"a", "b", "c", "e", Result, partial}))["fingerprint"]


def test_a_method_that_was_replaced_is_another(study, monkeypatch):
    before = fingerprint(study.build)
    monkeypatch.setattr(study.Planted, "training_step", lambda self, batch: 0 * self.weight.sum())
    assert fingerprint(study.build) != before


def test_another_budget_is_refused(study, monkeypatch):
    ablate(study.build, study.tricks, **ONE, seeds=1)
    monkeypatch.setattr(study, "EPOCHS", 2)
    with pytest.raises(RuntimeError, match=r"same budget, got .*'max_epochs': 2.*baseline-seed0 was trained with"):
        ablate(study.build, study.tricks, **ONE, seeds=2)


def full(study, seed, callbacks, logger):
    trainer, module, *data = study.build(seed, callbacks, logger)

    def training_step(batch, batch_idx):
        raise OSError("full")

    if any(isinstance(callback, study.Help) for callback in callbacks):
        module.training_step = training_step
    return trainer, module, *data


def without(name):
    def build(study, seed, callbacks, logger):
        given = {"callbacks": callbacks, "logger": logger, name: [] if name == "callbacks" else False}
        return study.make_trainer(**given, max_epochs=1), study.Planted(seed), study.loader(8), study.loader(4)

    return build


def forked(study, seed, callbacks, logger):
    trainer = study.make_trainer(callbacks, logger=logger, strategy="ddp_fork", devices=2)
    return trainer, study.Planted(seed), study.loader(8), study.loader(4)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (without("callbacks"), r"build must be one that gives its callbacks to the Trainer"),
        (without("logger"), r"build must be one that gives its logger to the Trainer"),
        (lambda study, *given: study.build(*given)[0], r"build must be a function that returns .*, got 'Trainer'. End"),
        (lambda study, *given: study.build(*given)[1::-1], r"returns .*, got \('Planted', 'Trainer'\). End it with"),
        (lambda study, *given: study.build(*given)[:3], r"build must be one that returns 2 loaders or more, got 1"),
        (forked, r"strategy must be one that starts no process by spawn or fork, got 'DDPStrategy'"),
    ],
)
def test_a_build_that_would_compare_nothing_is_refused(study, build, words):
    with pytest.raises(RuntimeError, match=words):
        ablate(lambda *given: build(study, *given), {"helps": study.Help()}, **SCORE, seeds=1)


def test_a_misspelt_metric_stops_after_the_first_trial_and_the_right_one_trains_only_the_others(study):
    words = "^ablate: metric must be one that the module logs, got 'accuracy'. trainer.validate logged val/score."
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            ablate(study.build, study.tricks, metric="accuracy", mode="max", seeds=2)
    (done,) = Path("ablation").rglob("result.json")
    time = done.stat().st_mtime_ns
    assert len(ablate(study.build, study.tricks, **SCORE, seeds=2).results["all"]) == 2
    assert done.stat().st_mtime_ns == time


def test_a_trial_that_alone_lacks_the_metric_is_named_and_its_pair_does_not_count(study, monkeypatch):
    def validation_step(module, batch, batch_idx):
        module.log("val/other" if module.bonus and module.number == 1 else "val/score", module.bonus)

    monkeypatch.setattr(study.Planted, "validation_step", validation_step)
    words = "1 of 8 trials failed: all-seed1 .val/score is not among what it logged, val/other; delete its folder"
    for _ in range(2):  # and what is read again is what was written
        with pytest.raises(RuntimeError, match=words):
            ablate(study.build, {"helps": study.Help()}, **SCORE, seeds=4)
        text = Path("ablation/table.md").read_text()
        assert "| helps | +1 |" in text
        assert "Pairs of trainings: 3." in text


@pytest.mark.slow
def test_a_misspelt_metric_stops_other_processes_too(study):
    with pytest.raises(ValueError, match="^ablate: metric must be one that the module logs, got 'accuracy'"):
        ablate(study.build, study.tricks, metric="accuracy", mode="max", seeds=30, processes=2)
    assert 0 < len(list(Path("ablation").rglob("result.json"))) < 60


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """What a trial wrote, and the call that reads it again."""
    folder = tmp_path_factory.mktemp("stored")
    call = partial(ablate, Small(), {"a": Callback()}, metric="loss", mode="min", seeds=1, folder=folder)
    call()
    path = folder / "trials" / "all-seed0" / "result.json"
    return path, path.read_text(), call


class Small:
    def __call__(self, seed, callbacks, logger):
        module = BoringModel()
        module.validation_step = lambda batch, batch_idx: module.log("loss", 1.0)
        return make_trainer(callbacks, logger=logger, max_epochs=1), module


DAMAGES = {
    "cut off": lambda text: text[:50],
    "a list": lambda text: "[1]",
    "settings missing": lambda text: text.replace('"settings"', '"other"'),
    "settings a text": lambda text: json.dumps(json.loads(text) | {"settings": "a"}),
    "budget a number": lambda text: json.dumps(json.loads(text) | {"budget": 1}),
    "metric a text": lambda text: json.dumps(json.loads(text) | {"metrics": {"loss": "1"}}),
    "seconds a text": lambda text: re.sub('"seconds": [^,]*', '"seconds": "1"', text),
    "memory a list": lambda text: re.sub('"memory": [^,}]*', '"memory": [1]', text),
    "a trick a number": lambda text: re.sub('"a": {[^}]*}', '"a": 1', text),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_result_is_named(stored, damage):
    path, text, call = stored
    path.write_text(DAMAGES[damage](text))
    assert path.read_text() != text
    with pytest.raises(ValueError, match=f"^ablate: result.json must be as a trial writes it, got '{path}'. Delete"):
        call()


def test_a_result_of_another_seed_is_refused_also_where_the_trials_is_0(stored):
    path, text, call = stored
    content = json.loads(text)
    path.write_text(json.dumps(content | {"settings": content["settings"] | {"seed": 1}}))
    with pytest.raises(ValueError, match="^ablate: seed must be what it was for the trials in the folder, got 0"):
        call()


@pytest.mark.parametrize("other", [None, "2 on Python 3.1"])
def test_a_result_of_another_version_is_not_said_to_have_changed(stored, other):
    path, text, call = stored
    path.write_text(json.dumps(json.loads(text) | {"format": other}))
    with pytest.raises(
        ValueError, match=r"^ablate: result.json must be of format '2 on Python 3.\d+', got .* Give anoth"
    ):
        call()


def test_a_score_that_is_not_finite_is_in_the_table_and_its_effect_unknown(study):
    study.tricks["helps"] = study.Help(math.nan)
    for _ in range(2):  # and what is read again is what was written
        ablation = ablate(study.build, study.tricks, **ONE, seeds=3)
    text = Path("ablation/table.md").read_text()
    assert text == str(ablation)
    assert "| helps | nan | nan | nan, nan, nan |" in text
    assert "| helps | diverged | unknown | unknown |" in text
    assert Path("ablation/forest.png").is_file()
    opposite = {"baseline": [math.inf, 0.0, 1.0], "a": [0.0, math.inf, 1.0]}
    design = make_design("one-at-a-time", ["a"])
    found = Ablation("x", "max", "one-at-a-time", results(opposite), find_effects(design, results(opposite), "max"))
    assert "| a | diverged | unknown | unknown |" in str(found)
    forest(found).savefig("forest.png")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"build": None}, "build must be a function, got None"),
        ({"tricks": {}}, "tricks must be a dict of name -> callbacks with one trick or more"),
        ({"tricks": {"EMA": 0.99}}, "tricks must be callbacks, lists of them or functions that make them, got 0.99"),
        ({"tricks": {"a/b": lt.EMA()}}, "tricks must be named with letters.*got 'a/b'"),
        ({"tricks": {1: lt.EMA()}}, "tricks must be named with letters.*got 1"),
        ({"tricks": {"baseline": lt.EMA()}}, "tricks must be named with letters.*got 'baseline'"),
        ({"mode": "best"}, "mode must be 'min' or 'max', got 'best'"),
        ({"evaluate": "predict"}, "evaluate must be 'validate' or 'test', got 'predict'"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1"),
        ({"seeds": [1, 1]}, "seeds must be one or more, all different"),
        ({"seeds": [2**32]}, "seeds must be at most 4294967295, got 4294967296"),
        ({"project": 5}, "project must be a text, or None, got 5"),
        ({"folder": None}, "folder must be a path, got None"),
        ({"tricks": {"none": []}}, "tricks must be callbacks, lists of them or functions that make them, got \\[\\]"),
        ({"design": "half"}, "design must be 'one-at-a-time', 'leave-one-out' or 'full', got 'half'"),
        (
            {"design": "full", "tricks": {f"t{n}": lt.EMA() for n in range(7)}},
            "design must be 'full' for at most 6 tricks.*128",
        ),
        (
            {"tricks": {"stop": lt.EarlyStopping}},
            "tricks must be callbacks, and not the class of one.*Say how.*monitor",
        ),
        ({"trials": 5}, "trials must be a list of ids of this design, got 5. They are baseline-seed0"),
        ({"metric": None}, "metric must be a text, got None"),
        ({"folder": __file__}, "folder must be a folder, and none of the files, got '.*test_ablation.py'"),
        ({"processes": 0}, "processes must be a whole number of at least 1"),
        ({"processes": 2}, "processes must be 1 for what cannot be imported"),
        (
            {"trials": ["EMA-seed9"]},
            "trials must be a list of ids of this design, got .'EMA-seed9'.. They are",
        ),
    ],
)
def test_what_is_out_of_range_is_refused_at_once(arguments, words):
    given = {"build": lambda *given: None, "tricks": {"EMA": lt.EMA()}, **SCORE, **arguments}
    with pytest.raises((TypeError, ValueError), match=f"^ablate: {words}"):
        ablate(**given)
    assert not Path("ablation").exists()


# ---------------------------------------------------------------------- the shell


def test_the_shell_runs_trials_by_their_ids_and_prints_the_table_at_the_end(study, capsys):
    options = ["study.py:build", "--metric", "val/score", "--mode", "max", "--seeds", "3", "--design", "one-at-a-time"]
    main(["ablate", options[0], *options[-4:], "--list"])
    ids = capsys.readouterr().out.split()
    assert len(ids) == 9
    assert not Path("ablation").exists()
    command = [sys.executable, "-m", "lightning_tricks", "ablate", *options, "--trial", ids[0], ids[1]]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2 finished, 7 unfinished.\n"), done.stderr
    main(["ablate", *options, "--trial", ids[0]])  # which is read
    assert capsys.readouterr().out == "2 finished, 7 unfinished.\n"
    main(["ablate", *options])
    assert Path("ablation/table.md").read_text() in capsys.readouterr().out
    expected = ablate(study.build, study.tricks, **ONE, seeds=3, folder="here")
    stored = {path.parent.name: json.loads(path.read_text()) for path in Path("ablation").rglob("result.json")}
    assert {name: result["metrics"]["val/score"] for name, result in stored.items()} == {
        f"{name}-seed{seed}": score for name, of in scores(expected).items() for seed, score in of.items()
    }


def test_the_shell_takes_seeds_as_a_list(study, capsys):
    main(["ablate", "study.py:build", "--seeds", "0,7", "--design", "one-at-a-time", "--list"])
    assert capsys.readouterr().out.split() == [
        f"{name}-seed{n}" for n in (0, 7) for name in ("baseline", "helps", "draws")
    ]
    with pytest.raises(SystemExit, match="2"):
        main(["ablate", "study.py:build", "--seeds", "0;7", "--list"])
    assert "argument --seeds: invalid seeds value: '0;7'" in capsys.readouterr().err


def test_the_shell_lists_all_trials_or_trains_some(study, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["ablate", "study.py:build", "--list", "--trial", "all-seed0"])
    assert "--list must be without --trial, got ['all-seed0']" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["--metric", "--mode"])
def test_the_shell_says_that_a_training_needs_metric_and_mode(study, capsys, missing):
    given = {"--metric": "val/score", "--mode": "max"}
    del given[missing]
    with pytest.raises(SystemExit, match="2"):
        main(["ablate", "study.py:build", *next(iter(given.items()))])
    assert f"ablate: {missing[2:]} must be" in capsys.readouterr().err


def test_a_reader_that_has_read_enough_is_no_error(study):
    options = "study.py:build --seeds 20000 --list"  # more than a pipe holds
    command = f"{sys.executable} -m lightning_tricks ablate {options} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("baseline-seed0\n0\n", "")


def test_a_pipe_that_broke_elsewhere_is_an_error(monkeypatch, capsys):
    def broken(*given):
        raise BrokenPipeError("the worker has gone")

    monkeypatch.setattr("lightning_tricks.__main__.draw", broken)
    with pytest.raises(SystemExit, match="2"):
        main(["schedule", "Cosine()", "--steps", "10"])
    assert "the worker has gone" in capsys.readouterr().err


OF_A_SCRIPT = """
import lightning_tricks as lt
from study import Callback, loader, make_trainer, Planted

class Own(Callback):
    def __init__(self):
        self.kept = [Own]

def rate(step, total):
    return 1.0

def build(seed, callbacks, logger):
    return make_trainer(callbacks, logger=logger, max_epochs=1), Planted(seed), loader(8), loader(4)

tricks = {"own": Own(), "rate": lt.LRSchedule(rate, replace=True)}

if __name__ == "__main__":
    lt.ablate(build, tricks, metric="val/score", mode="max", seeds=1, design="one-at-a-time", processes=2)
"""


def test_a_script_its_processes_and_the_shell_share_a_folder(study, capsys):
    Path("script.py").write_text(OF_A_SCRIPT)
    options = ["script.py:build", "--metric", "val/score", "--mode", "max", "--seeds", "1"]
    options += ["--design", "one-at-a-time"]
    main(["ablate", *options, "--trial", "own-seed0"])
    when = Path("ablation/trials/own-seed0/result.json").stat().st_mtime_ns
    done = subprocess.run([sys.executable, "script.py"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = {path: path.stat().st_mtime_ns for path in Path("ablation").rglob("result.json")}
    assert (len(written), written[Path("ablation/trials/own-seed0/result.json")]) == (3, when)
    main(["ablate", *options])
    assert Path("ablation/table.md").read_text() in capsys.readouterr().out
    assert written == {path: path.stat().st_mtime_ns for path in Path("ablation").rglob("result.json")}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        ("nothing.py:build", "FILE:build must be a Python file that exists, got 'nothing.py'"),
        ("study.py", "FILE:build must be a Python file, ':' and a function in it, got 'study.py'"),
        ("study.py:no", "FILE:build must be a file that defines no, got 'study.py'"),
    ],
)
def test_the_shell_says_what_is_wrong_as_argparse_does(study, capsys, build, words):
    with pytest.raises(SystemExit, match="2"):
        main(["ablate", build, "--metric", "val/score", "--mode", "max"])
    assert words in " ".join(capsys.readouterr().err.split())


@given(st.floats(-1e3, 1e3), st.floats(0, 1e3))
def test_the_ends_of_an_interval_are_shown_with_their_signs(low, width):
    effect = Effect((low,), (low, low + width), 0.0, None, None)
    shown = [float(signed(end, effect)) for end in effect.interval]
    assert [math.copysign(1, end) * (end != 0) for end in shown] == [
        math.copysign(1, end) * (end != 0) for end in effect.interval
    ]


def test_long_names_leave_the_forest_plot_its_width_and_its_ticks_apart():
    effects = {f"{'a_very_long_name' * 8}{n}": Effect((0.1,), (-0.4, 0.05), 0.0, None, None) for n in range(3)}
    figure = forest(Ablation("val/" + "a_metric" * 20, "max", "full", results={}, effects=effects))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_window_extent().width > 0.4 * figure.bbox.width
    ticks = [tick.get_window_extent() for tick in axes.get_xticklabels()]
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(ticks))
    names = [name.get_window_extent() for name in axes.get_yticklabels()]
    assert all(one.y0 > other.y1 for one, other in itertools.pairwise(names))
    assert len({name.get_text() for name in axes.get_yticklabels()}) == 3


def test_foreign_names_have_letters_in_the_forest_plot():
    effect = Effect((0.1,), (-0.4, 0.05), 0.0, None, None)
    figure = forest(Ablation("val/loss", "max", "full", results={}, effects={"損失": effect}))
    figure.draw_without_rendering()  # which warns of a letter that is not in its font
    assert [name.get_text() for name in figure.axes[0].get_yticklabels()] == [r"\u640d\u5931"]


def test_what_helps_is_not_shown_as_0():
    effect = Effect((0.01, 0.02, 0.04), (0.0003, 0.05), 0.0, None, True)
    found = Ablation("x", "max", "full", results={}, effects={"a": effect})
    assert "| a | +0.0233 | +0.0003 to +0.0500 | helps |" in str(found)


def test_costs_of_nothing_have_no_minus():
    effect = Effect((0.0,), (0.0, 0.0), -0.0002, -4096.0, None)
    assert list(effect_rows(Ablation("x", "max", "full", results={}, effects={"a": effect})))[1][4:] == [
        "+0.0%",
        "+0.0 MiB",
    ]


def test_an_effect_has_the_mean_of_its_differences():
    assert Effect((1.0, 2.0, 6.0), (0.0, 6.0), 0.0, None, None).difference == 3.0
