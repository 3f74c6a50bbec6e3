import csv
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from offline_wandb import read_run, runs

EXAMPLES = Path(__file__).parents[1] / "examples"
TRICKS = {"LRSchedule", "EMA", "EarlyStopping", "BatchTransforms", "UpdateMonitor"}


def demo(*arguments: str) -> str:
    """Run the demo as a user would, and return what it printed."""
    command = [sys.executable, str(EXAMPLES / "digits.py"), *arguments]
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
    assert all(configs["baseline", seed]["tricks"].keys() == {"UpdateMonitor"} for seed in (0, 1))


def test_the_plain_module_knows_nothing_of_the_package():
    assert "lightning_tricks" not in (EXAMPLES / "plain_module.py").read_text()


def test_help_explains_every_option():
    options = re.findall(r'add_argument\(\s*"(--[a-z]+)"', (EXAMPLES / "digits.py").read_text())
    assert {"--seeds", "--epochs", "--output", "--project", "--fast"} <= set(options)
    text = demo("--help")
    for option in options:
        assert re.search(rf"^  {option}( [A-Z]+)?\s+\w+(\s+[^\s-]\S*){{3}}", text, re.MULTILINE), option
