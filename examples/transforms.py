"""Train one plain network on CIFAR-10 pictures without and with each batch transform, and write what each is worth."""

import argparse
import io
import platform
import statistics
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from averages import difference, quieten
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_tricks as lt

BATCH, JUDGED = 100, 5000  # pictures; the file's last ones are judged
NORMALIZE = lt.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
Chain = Callable[[], list[lt.transforms.Transform]]
# Of uint8 pictures; what stands behind Normalize sees its floats.
ARMS: dict[str, Chain] = {
    "nothing": lambda: [NORMALIZE],
    "RandomFlip": lambda: [lt.RandomFlip(), NORMALIZE],
    "RandomCrop": lambda: [lt.RandomCrop(32, padding=4), NORMALIZE],
    "RandomResizedCrop": lambda: [lt.RandomResizedCrop(32, scale=(0.35, 1.0)), NORMALIZE],
    "ColorJitter": lambda: [lt.ColorJitter(0.4, 0.4, 0.4, 0.1), NORMALIZE],
    "PCALighting": lambda: [lt.PCALighting(0.1), NORMALIZE],
    "RandAugment": lambda: [lt.RandAugment(2, 9), NORMALIZE],
    "TrivialAugment": lambda: [lt.TrivialAugment(), NORMALIZE],
    "Cutout": lambda: [NORMALIZE, lt.Cutout(16)],
    "RandomErasing": lambda: [NORMALIZE, lt.RandomErasing(0.5)],
    "Mixup": lambda: [NORMALIZE, lt.Mixup(0.2)],
    "CutMix": lambda: [NORMALIZE, lt.CutMix(1.0)],
    "OneOf Mixup, CutMix": lambda: [NORMALIZE, lt.OneOf([lt.Mixup(0.2), lt.CutMix(1.0)])],
    "LabelSmoothing": lambda: [NORMALIZE, lt.LabelSmoothing(0.1)],
    "flip and crop": lambda: [lt.RandomCrop(32, padding=4), lt.RandomFlip(), NORMALIZE],
    "flip, crop, CutMix": lambda: [lt.RandomCrop(32, padding=4), lt.RandomFlip(), NORMALIZE, lt.CutMix(1.0)],
    "flip, crop, RandAugment, Cutout, OneOf, smoothing": lambda: [
        lt.RandomCrop(32, padding=4),
        lt.RandomFlip(),
        lt.RandAugment(2, 9),
        NORMALIZE,
        lt.Cutout(8),
        lt.OneOf([lt.Mixup(0.2), lt.CutMix(1.0)]),
        lt.LabelSmoothing(0.1),
    ],
}


class Score(NamedTuple):
    """Accuracy (%) and cross-entropy (nats) of judged pictures, accuracy (%) of the trained ones."""

    accuracy: float
    loss: float
    trained: float


class Net(L.LightningModule):
    """Five convolutions with batch norm; it imports nothing of the package."""

    def __init__(self, steps: int, lr: float = 3e-3) -> None:
        super().__init__()
        self.steps, self.lr = steps, lr
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 24, 1), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.log("loss", F.cross_entropy(logits, labels))
        self.log("accuracy", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, self.steps + 1, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def pictures(folder: Path, chosen: range) -> TensorDataset:
    """Pictures of `cifar10_train.npz`, as uint8."""
    with np.load(folder / "cifar10_train.npz") as file:
        data, offsets, labels = file["jpeg"], file["offsets"], file["labels"]
    rows = [np.asarray(Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes()))) for i in chosen]
    images = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()
    return TensorDataset(images, torch.from_numpy(labels[chosen.start : chosen.stop]).long())


def train(name: str, seed: int, parts: tuple[TensorDataset, TensorDataset], epochs: int) -> Score:
    """One training and its score."""
    # One seed gives all rows the same first weights and the same order of the batches.
    L.seed_everything(seed, verbose=False)
    trained, judged = parts
    module = Net(epochs * (len(trained) // BATCH)).to(memory_format=torch.channels_last)  # quicker convolutions
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=epochs,
        callbacks=[lt.BatchTransforms(ARMS[name]())],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    order = torch.Generator().manual_seed(seed)
    trainer.fit(module, DataLoader(trained, BATCH, shuffle=True, drop_last=True, generator=order))
    trainer.limit_val_batches = 1.0
    (on_judged,) = trainer.validate(module, DataLoader(judged, 500), verbose=False)
    (on_trained,) = trainer.validate(module, DataLoader(trained, 500), verbose=False)
    return Score(100 * on_judged["accuracy"], on_judged["loss"], 100 * on_trained["accuracy"])


# ---------------------------------------------------------------------- what came of it


def table(results: dict[str, list[Score]]) -> str:
    """Means over the seeds, and the paired differences to the first row, as Markdown."""
    (reference, base), *_ = results.items()
    lines = [
        "| transforms | accuracy (%) | difference | cross-entropy | difference | on trained pictures (%) |",
        "|---|---|---|---|---|---|",
    ]
    for name, scores in results.items():
        cells = [name]
        for quantity, digits in (("accuracy", 2), ("loss", 3)):
            values = [getattr(score, quantity) for score in scores]
            pairs = zip(values, (getattr(score, quantity) for score in base), strict=True)
            cells += [
                f"{statistics.mean(values):.{digits}f}",
                "" if name == reference else difference([a - b for a, b in pairs], digits),
            ]
        cells.append(f"{statistics.mean(score.trained for score in scores):.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page(results: dict[str, list[Score]], options: argparse.Namespace) -> str:
    """The table and all that is needed to read it."""
    packages = {"lightning_tricks": lt, "torch": torch, "lightning": L}
    versions = ", ".join(f"{name} {package.__version__}" for name, package in packages.items())
    steps = options.epochs * (options.pictures // BATCH)
    last = options.first_seed + options.seeds - 1
    notes = [
        "Differences are to the first row, paired by seed, with their 95 % interval (t-distribution); bold where that"
        " leaves out 0. Nothing is corrected for the number of rows. High accuracy is good, and low cross-entropy"
        " (nats, of plain labels).",
        f"Data: CIFAR-10, the first {options.pictures:,} pictures of the file to train on; the last {JUDGED:,} are"
        " judged, the same for every seed, so the intervals do not cover their choice. A seed draws the first weights,"
        " the order of the batches and the transforms.",
        f"{options.epochs} epochs, {steps} steps of {BATCH} pictures for each row: a short training of a small network"
        " (five convolutions, `examples/transforms.py`; AdamW, one cycle to a rate of 3e-3). Strong transforms"
        " earn their keep in long trainings of large networks: where the pictures that were trained on are not yet"
        " learnt by heart, making them harder is no help.",
        "Strengths are the papers' or the usual ones of CIFAR-10 and were not tuned here.",
        "What a transform costs is measured in `benchmarks/`.",
        f"{'CPU, one thread' if not torch.cuda.is_available() else torch.cuda.get_device_name()};"
        f" Python {platform.python_version()}, {versions}.",
    ]
    title = "# Each transform on CIFAR-10 pictures"
    first = (
        "What `python examples/transforms.py --data-dir FOLDER` writes: means over"
        f" {options.seeds} seeds ({options.first_seed} to {last})."
    )
    listed = [textwrap.fill(note, 120, initial_indent="- ", subsequent_indent="  ") for note in notes]
    return "\n".join([title, "", first, "", table(results), *listed]) + "\n"


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of cifar10_train.npz")
    parser.add_argument("--pictures", type=int, default=2000, help=f"pictures to train on; a multiple of {BATCH}")
    parser.add_argument("--epochs", type=int, default=20, help="passes over them")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each row; at least 2")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--only", nargs="+", choices=list(ARMS)[1:], help="rows beside the first; if not given, all")
    parser.add_argument("--out", type=Path, help="file for the table; if not given, it is only printed")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds must be at least 2, got {options.seeds}: one training has no spread.")
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {options.epochs}.")
    if options.pictures < BATCH or options.pictures % BATCH:
        parser.error(f"--pictures must be a multiple of {BATCH}, got {options.pictures}: all rows have as many.")
    return options


def main() -> None:
    """Train every row on every seed, and write the table."""
    options = parse()
    quieten()
    torch.set_num_threads(1)
    with np.load(options.data_dir / "cifar10_train.npz") as file:
        count = len(file["labels"])
    trained = pictures(options.data_dir, range(min(options.pictures, count)))
    parts = (trained, pictures(options.data_dir, range(max(0, count - JUDGED), count)))
    results: dict[str, list[Score]] = {
        name: [] for name in ARMS if options.only is None or name in ["nothing", *options.only]
    }
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        began = time.monotonic()
        for name, scores in results.items():
            scores.append(train(name, seed, parts, options.epochs))
            print(f"seed {seed}, {name}: {scores[-1].accuracy:.2f} %", flush=True)
        print(f"seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    text = page(results, options)
    print(f"\n{text}", end="")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


if __name__ == "__main__":
    main()
