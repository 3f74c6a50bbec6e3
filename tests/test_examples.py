import csv
import importlib
import io
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from offline_wandb import read_run, runs
from PIL import Image
from scipy import stats
from torch.optim.optimizer import register_optimizer_step_post_hook

EXAMPLES = Path(__file__).parents[1] / "examples"
WATCHERS = {"UpdateMonitor", "ActivationMonitor"}
TRICKS = {"LRSchedule", "EMA", "EarlyStopping", "BatchTransforms", *WATCHERS}


def demo(*arguments: str, script: str = "digits.py") -> str:
    """Run an example as a user would, and return what it printed."""
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def logged_accuracy(folder: Path, arm: str) -> list[float]:
    """Test accuracy (%) of seeds 0 and 1, from the CSV logs."""
    accuracy = []
    for seed in (0, 1):
        with (folder / "csv" / f"{arm}-seed{seed}" / "metrics.csv").open(newline="") as file:
            (value,) = [row["test/accuracy"] for row in csv.DictReader(file) if row["test/accuracy"]]
        accuracy.append(100 * float(value))
    return accuracy


def table_row(text: str, name: str) -> list[float]:
    """The numbers of one row: mean, standard deviation, and one for each seed."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", row)]


# One test, since each part would have to train again on another worker.
def test_the_demo_leaves_a_picture_a_table_and_a_run_for_each_training(tmp_path):
    folder = tmp_path / "new" / "folder"
    printed = demo("--fast", "--output", str(folder), "--project", "smoke")

    picture = (folder / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")
    assert width >= 1200
    assert height >= 800
    assert len(picture) > 50_000

    text = (folder / "table.md").read_text()
    assert text in printed
    arms = {arm: logged_accuracy(folder, arm) for arm in ("baseline", "tricks")}
    difference = [b - a for a, b in zip(*arms.values(), strict=True)]
    for name, values in {**arms, "paired difference": difference}.items():
        expected = [statistics.mean(values), statistics.stdev(values), *values]
        assert table_row(text, name) == [float(f"{number:.2f}") for number in expected]

    configs = {}
    for rows, config in map(read_run, runs(folder)):
        configs[config["arm"], config["seed"]] = config
        assert any("update_ratio/total" in row for row in rows)
        assert [100 * row["test/accuracy"] for row in rows if "test/accuracy" in row] == [
            arms[config["arm"]][config["seed"]]
        ]
    assert len(runs(folder)) == 4
    assert configs.keys() == {(arm, seed) for arm in arms for seed in (0, 1)}
    assert all(configs["tricks", seed]["tricks"].keys() == TRICKS for seed in (0, 1))
    assert all(configs["baseline", seed]["tricks"].keys() == WATCHERS for seed in (0, 1))


def test_the_plain_module_knows_nothing_of_the_package():
    assert "lightning_tricks" not in (EXAMPLES / "plain_module.py").read_text()


@pytest.mark.parametrize(
    ("script", "some"),
    [("digits.py", "--seeds --epochs --output --project --fast"), ("averages.py", "--seeds --steps --out --fast")],
)
def test_help_explains_every_option(script, some):
    options = re.findall(r'add_argument\(\s*"(--[a-z-]+)"', (EXAMPLES / script).read_text())
    assert set(some.split()) <= set(options)
    text = demo("--help", script=script)
    for option in options:
        assert re.search(rf"^  {option}( \S+)?\s+\w+(\s+[^\s-]\S*){{3}}", text, re.MULTILINE), option


@pytest.fixture
def averages(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("averages")


def test_the_averages_example_writes_the_table_that_it_prints(tmp_path):
    path = tmp_path / "new" / "table.md"
    printed = demo("--fast", "--out", str(path), script="averages.py")
    text = path.read_text()
    assert printed.endswith(text)
    assert not re.search(r"\bnan\b|/home/|/tmp/", text)
    assert all(len(line) <= 120 for line in text.splitlines())
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert {row[0] for row in table} > {"single model, cosine", "EMA, cosine", "Polyak average, constant rate"}
    assert [row[-1] for row in table].count("5") == 3
    reference = table[0]
    assert reference[2] == reference[4] == ""
    for row in table[1:]:
        for value, difference, digits in ((1, 2, 2), (3, 4, 4)):
            expected = float(row[value]) - float(reference[value])
            assert float(row[difference].strip("*").split()[0]) == pytest.approx(expected, abs=2 * 10**-digits)


def test_every_row_of_the_averages_example_has_the_same_budget(averages):
    averages.quieten()
    task = averages.draw(seed=0, steps=20, judge="val")
    steps = []
    counting = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        for name, arm in averages.ARMS.items():
            steps.clear()
            assert arm(task, averages.BEST_RATE[name])
            assert len(steps) == 20, name
    finally:
        counting.remove()


def test_no_picture_of_the_averages_example_is_used_twice(averages):
    for seed in (0, 100):
        task = averages.draw(seed, steps=10, judge="test")
        sets = [task.train, task.val.dataset, task.judge.dataset]
        assert [len(part) for part in sets] == [averages.TRAIN, averages.VAL, averages.TEST]
        pictures = torch.cat([part.tensors[0] for part in sets])
        assert len(pictures.unique(dim=0)) == len(pictures)
    again = averages.draw(0, steps=10, judge="test").judge.dataset
    assert torch.equal(again.tensors[1], sets[2].tensors[1])


def test_the_interval_of_the_averages_example_is_that_of_a_paired_t_test(averages):
    values = [0.5, 1.0, -0.25, 0.75, 0.5]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mean, margin = (low + high) / 2, (high - low) / 2
    assert averages.difference(values, 3) == f"{mean:+.3f} +/- {margin:.3f}"
    assert averages.difference([value + 1 for value in values], 3) == f"**{mean + 1:+.3f} +/- {margin:.3f}**"


def test_the_verdict_of_the_averages_example_names_what_is_bold_by_its_meaning(averages):
    first = [averages.Score(90 + seed, 0.5, 1) for seed in range(3)]
    better = [averages.Score(92 + 1.1 * seed, 0.4, 1) for seed in range(3)]
    noise = [averages.Score(91 - seed, 0.5 + 0.1 * (seed - 1), 1) for seed in range(3)]
    text = averages.verdict(averages.table({"one": first, "good": better, "same": noise}))
    assert text.endswith("by accuracy: good. By cross-entropy: good. Worse, by accuracy: none. By cross-entropy: none.")
    text = averages.verdict(averages.table({"good": better, "one": first, "same": noise}))
    assert text.endswith("by accuracy: none. By cross-entropy: none. Worse, by accuracy: one. By cross-entropy: one.")


def test_each_transform_has_a_row_beside_nothing(tmp_path):
    generator = np.random.default_rng(0)
    files = []
    for _ in range(120):
        files.append(io.BytesIO())
        Image.fromarray(generator.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(files[-1], "JPEG")
    jpeg = [np.frombuffer(file.getvalue(), np.uint8) for file in files]
    offsets = np.cumsum([0, *map(len, jpeg)])
    labels = generator.integers(10, size=120)
    np.savez(tmp_path / "cifar10_train.npz", jpeg=np.concatenate(jpeg), offsets=offsets, labels=labels)
    small = ("--pictures", "100", "--epochs", "1", "--seeds", "2", "--only", "CutMix", "RandAugment")
    out = tmp_path / "new" / "table.md"
    printed = demo("--data-dir", str(tmp_path), *small, "--out", str(out), script="transforms.py")
    assert out.read_text() in printed
    accuracy = {
        name: [float(x) for x in re.findall(rf"seed \d, {name}: ([\d.]+) %", printed)] for name in ("nothing", "CutMix")
    }
    difference = statistics.mean(b - a for a, b in zip(*accuracy.values(), strict=True))
    assert table_row(printed, "nothing")[0] == pytest.approx(statistics.mean(accuracy["nothing"]), abs=0.006)
    assert table_row(printed, "CutMix")[1] == pytest.approx(difference, abs=0.011)
    assert len(table_row(printed, "RandAugment")) == 7
