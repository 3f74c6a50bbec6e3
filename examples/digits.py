"""Train one plain module on scans of handwritten digits, as it is and with the tricks, and show what they did."""

import argparse
import csv
import logging
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import torch
import wandb
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from plain_module import DigitsNet, loaders
from scipy import stats

import lightning_tricks as lt

LOG_EVERY = 10
COLOURS = {"baseline": "#6b7280", "tricks": "#d9480f"}

Series = tuple[np.ndarray, np.ndarray]
Record = dict[str, Series]


def tricks() -> list[Callback]:
    """All that is added to the Trainer; the module stays as it is."""
    return [
        lt.LRSchedule(lt.WarmupCosine(0.1)),
        lt.EMA(0.98),
        lt.EarlyStopping(monitor="val/loss", patience=10, ignore_first=3, restore_best=True),
        lt.BatchTransforms([lt.Cutout(3), lt.Mixup(0.2), lt.LabelSmoothing(0.1)]),
    ]


def watchers() -> list[Callback]:
    """What both arms have, so that both can be drawn: it observes and changes nothing."""
    return [lt.UpdateMonitor(LOG_EVERY), lt.ActivationMonitor(LOG_EVERY), LearningRateMonitor("step")]


ARMS: dict[str, Callable[[], list[Callback]]] = {"baseline": list, "tricks": tricks}


# ---------------------------------------------------------------------- training


def train(arm: str, seed: int, options: argparse.Namespace) -> Record:
    """Train and test the module once, log it to W&B and CSV, and read the CSV back."""
    # One seed gives both arms the same first weights and the same order of the batches.
    L.seed_everything(seed, verbose=False)
    module = DigitsNet()
    train_loader, val_loader, test_loader = loaders(seed)
    csv_logger = CSVLogger(options.output, name="csv", version=f"{arm}-seed{seed}")
    shutil.rmtree(csv_logger.log_dir, ignore_errors=True)  # of an earlier demo in the same folder
    wandb_logger = WandbLogger(f"{arm}-seed{seed}", options.output, project=options.project, group=arm)
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=options.epochs,
        callbacks=ARMS[arm]() + watchers(),
        logger=[csv_logger, wandb_logger],
        log_every_n_steps=LOG_EVERY,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    for logger in trainer.loggers:
        logger.log_hyperparams({"arm": arm, "seed": seed, "max_epochs": options.epochs})
    trainer.fit(module, train_loader, val_loader)
    trainer.test(module, test_loader, verbose=False)
    wandb.finish()
    return read(Path(csv_logger.log_dir) / "metrics.csv")


def read(path: Path) -> Record:
    """Steps and values of everything in a CSV log."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    record = {}
    for name in rows[0]:
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        record[name] = (np.array([step for step, _ in points]), np.array([value for _, value in points]))
    return record


# ---------------------------------------------------------------------- what came of it


def table(records: dict[str, list[Record]]) -> str:
    """Test accuracy of both arms and their difference, seed by seed, as Markdown, and what they say in words."""
    accuracy = {arm: [100 * float(record["test/accuracy"][1][-1]) for record in records[arm]] for arm in ARMS}
    difference = [b - a for a, b in zip(accuracy["baseline"], accuracy["tricks"], strict=True)]
    rows = [(arm, accuracy[arm], "") for arm in ARMS] + [("paired difference", difference, "+")]
    lines = ["| test accuracy (%) | mean | standard deviation | each seed |", "|---|---|---|---|"]
    for name, values, sign in rows:
        mean, spread = f"{statistics.mean(values):{sign}.2f}", f"{statistics.stdev(values):.2f}"
        lines.append(f"| {name} | {mean} | {spread} | {', '.join(f'{value:{sign}.2f}' for value in values)} |")
    epochs = {arm: ", ".join(str(len(record["val/loss"][0])) for record in records[arm]) for arm in ARMS}
    lines += [
        "",
        verdict(difference),
        f"Epochs trained, seed by seed: baseline {epochs['baseline']}; tricks {epochs['tricks']}.",
        "Both arms carry UpdateMonitor, ActivationMonitor and LearningRateMonitor, which observe and change nothing.",
    ]
    return "\n".join(lines) + "\n"


def verdict(difference: list[float]) -> str:
    """What the paired differences (percentage points) say, in words."""
    mean, count = statistics.mean(difference), len(difference)
    margin = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(difference) / count**0.5
    word = "within noise of" if abs(mean) <= margin else "better than" if mean > 0 else "worse than"
    return (
        f"The tricks are {word} the baseline: {mean:+.2f} +/- {margin:.2f} percentage points (95%"
        f" confidence, {count} pairs of one seed each, one split of the data)."
    )


def moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the `width` values around each, of fewer at both ends."""
    sums = np.cumsum([0, *values])
    middle = np.arange(len(values))
    start = np.maximum(middle - width // 2, 0)
    stop = np.minimum(middle + width // 2 + 1, len(values))
    return (sums[stop] - sums[start]) / (stop - start)


# ---------------------------------------------------------------------- pictures


def picture(records: dict[str, list[Record]], path: Path) -> None:
    """Learning curves, learning rate and update ratio of every training, and the test accuracy, in one file."""
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    loss, val_loss, val_accuracy, rate, ratio, test = figure.subplots(2, 3).flat
    curves(loss, records, "train/loss", "Training loss (tricks: of mixed, smoothed labels)", "cross-entropy (nats)", 5)
    curves(val_loss, records, "val/loss", "Validation loss (tricks: of averaged weights)", "cross-entropy (nats)", 3)
    curves(val_accuracy, records, "val/accuracy", "Validation accuracy (tricks: of averaged weights)", "accuracy", 3)
    curves(rate, records, "lr-AdamW", "Learning rate", "learning rate", 1)
    curves(ratio, records, "update_ratio/total", "Update ratio, all weights", "norm(update) / norm(weights)", 5)
    pairs(test, records)
    for axes in (loss, val_loss, ratio):
        axes.set_yscale("log")
    for axes in (val_accuracy, test):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    ratio.axhspan(1e-4, 1e-2, color="#2b8a3e", alpha=0.1, label="update ratio 1e-4 to 1e-2")
    ratio.axhline(1e-3, color="#2b8a3e", linestyle="--", label="update ratio 1e-3, healthy as a rule")
    # What matters is where they end, not the first epochs.
    lowest = min(record["val/accuracy"][1][-1] for arm in ARMS for record in records[arm])
    val_accuracy.set_ylim(min(0.9, lowest - 0.02), 1.005)
    ratio.set_ylim(1e-5, 1e-1)  # where the learning rate ends at 0 the ratio does too
    figure.legend(*ratio.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(
        "Points: every seed as logged. Thin lines: their moving averages."
        " Thick lines: mean of these, as long as every seed trains."
    )
    figure.savefig(path, dpi=120)


def curves(axes: Axes, records: dict[str, list[Record]], name: str, title: str, unit: str, width: int) -> None:
    """Every seed as points and a thin moving average of `width` points, and the mean of these."""
    for arm, colour in COLOURS.items():
        averages = []
        for steps, values in (record[name] for record in records[arm]):
            averages.append(moving_average(values, width))
            axes.scatter(steps, values, s=5, color=colour, alpha=0.3, linewidths=0)
            axes.plot(steps, averages[-1], color=colour, alpha=0.35, linewidth=0.7)
        # A mean over the seeds that are left would jump where early stopping ends one.
        common = min(len(average) for average in averages)
        mean = np.mean([average[:common] for average in averages], axis=0)
        axes.plot(records[arm][0][name][0][:common], mean, color=colour, linewidth=2.2, label=f"{arm}, mean")
    axes.set(title=title, xlabel="optimizer steps", ylabel=unit)
    axes.grid(alpha=0.2)


def pairs(axes: Axes, records: dict[str, list[Record]]) -> None:
    """Test accuracy of each seed without and with the tricks, joined by a line, and its mean and spread beside it."""
    accuracy = np.array([[record["test/accuracy"][1][-1] for record in records[arm]] for arm in ARMS])
    axes.plot([0, 1], accuracy, color="#adb5bd", linewidth=1)
    for index, (values, colour) in enumerate(zip(accuracy, COLOURS.values(), strict=True)):
        axes.scatter([index] * len(values), values, color=colour, alpha=0.6, zorder=2)
        beside = index + (0.15 if index else -0.15)
        axes.errorbar(beside, values.mean(), values.std(ddof=1), color=colour, fmt="D", capsize=4)
    axes.set_xticks([0, 1], list(ARMS))
    axes.set(title="Test accuracy: a line for each seed; mean and sd", ylabel="accuracy", xlim=(-0.5, 1.5))
    axes.grid(axis="y", alpha=0.2)


# ---------------------------------------------------------------------- which of them it was


def ablated() -> dict[str, Callback]:
    """The tricks that are tried one at a time."""
    return {
        "schedule": lt.LRSchedule(lt.WarmupCosine(0.1)),
        "EMA": lt.EMA(lt.HalfLife("1ep")),
        "mixing": lt.BatchTransforms([lt.Cutout(3), lt.Mixup(0.2), lt.LabelSmoothing(0.1)]),
    }


def build(seed: int, callbacks: list[Callback], logger: list[Logger]) -> tuple[object, ...]:
    """A short training of the same module, for `lt.ablate`, which runs it in processes of its own."""
    quieten()
    torch.set_num_threads(1)
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=10,
        callbacks=callbacks,
        logger=logger,
        log_every_n_steps=LOG_EVERY,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return trainer, DigitsNet(), *loaders(seed)


def ablation(options: argparse.Namespace) -> str:
    """What each trick does by itself, in a short training."""
    folder = options.output / "ablation"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier demo
    found = lt.ablate(
        build,
        ablated(),
        metric="test/accuracy",
        mode="max",
        evaluate="test",
        design="one-at-a-time",
        seeds=1 if options.fast else options.seeds,
        folder=folder,
        processes=1 if options.fast else 2,
    )
    return str(found)


# ---------------------------------------------------------------------- the command


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each arm, from seed 0 on; at least 2")
    parser.add_argument("--epochs", type=int, default=40, help="longest training, the same for both arms; at least 1")
    parser.add_argument("--output", type=Path, default=Path("outputs/digits"), help="folder for all that is written")
    parser.add_argument("--project", default="lightning-tricks-digits", help="W&B project of the runs")
    parser.add_argument("--fast", action="store_true", help="smoke test: 2 seeds and 2 epochs, whatever the others say")
    options = parser.parse_args()
    if options.fast:
        options.seeds, options.epochs = 2, 2
    if options.seeds < 2:
        parser.error(f"--seeds must be at least 2, got {options.seeds}: one training has no spread.")
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {options.epochs}.")
    return options


def quieten() -> None:
    """Choose offline W&B unless the user chose, and let nobody say the same thing in every training."""
    if os.environ.setdefault("WANDB_MODE", "offline") == "offline":
        os.environ.setdefault("WANDB_QUIET", "true")
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not (message in said or said.add(message))

    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(is_new)
    # Lightning's own use of a name that torch is about to remove.
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    # A thousand small images are faster without workers.
    warnings.filterwarnings("ignore", ".*does not have many workers")


def main() -> None:
    """Train both arms on every seed, and write the picture and the table."""
    options = parse()
    quieten()
    # Images of 8x8 pixels gain nothing from more threads, which stall beside any other process.
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    records: dict[str, list[Record]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):
        for arm in ARMS:
            print(f"\n{arm}, seed {seed} of 0 to {options.seeds - 1}", flush=True)
            records[arm].append(train(arm, seed, options))
    picture(records, options.output / "curves.png")
    lt.report(options.output / "csv", options.output / "report.html", group="arm", title="Digits, with tricks or not")
    text = table(records)
    (options.output / "table.md").write_text(text)
    print(f"\n{text}\nOne trick at a time, in 10 epochs:\n\n{ablation(options)}")
    print(f"\nWritten to {options.output} in {time.monotonic() - began:.0f} s.")
    if os.environ["WANDB_MODE"] == "offline":
        print(f"To upload the W&B runs: wandb sync {options.output}/wandb/offline-run-*")


if __name__ == "__main__":
    main()
