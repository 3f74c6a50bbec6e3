"""Average the weights or the predictions of one plain module at equal budget, and write what each way is worth."""

import argparse
import logging
import platform
import statistics
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lightning as L
import sklearn
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from plain_module import DigitsNet
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import lightning_tricks as lt

TRAIN, VAL, TEST, BATCH = 100, 300, 1000, 25  # pictures
MEMBERS = 5
CONSTANT, COSINE = lt.Warmup(0.1, lt.Constant()), lt.WarmupCosine(0.1)


class Score(NamedTuple):
    """Accuracy (%), cross-entropy (nats), and how many networks have to be run for an answer."""

    accuracy: float
    loss: float
    networks: int


class Task(NamedTuple):
    """What one seed gives to every training."""

    seed: int
    steps: int
    train: TensorDataset
    val: DataLoader
    judge: DataLoader


Scores = dict[str, Score]  # of each row of the table


class Net(DigitsNet):
    """The other example's module, which logs its test loss too."""

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.test_accuracy(logits, labels)
        self.log("test/accuracy", self.test_accuracy)
        self.log("test/loss", F.cross_entropy(logits, labels))


def draw(seed: int, steps: int, judge: str) -> Task:
    """Draw all pictures but the test's, which are the same for every seed."""
    images, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(range(len(labels)), test_size=TEST, stratify=labels, random_state=0)
    train, val = train_test_split(rest, train_size=TRAIN, test_size=VAL, stratify=labels[rest], random_state=seed)
    mean, std = images[train].mean(), images[train].std()
    images = torch.tensor((images - mean) / std, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(labels)
    parts = {name: TensorDataset(images[part], labels[part]) for name, part in (("val", val), ("test", test))}
    loaders = {name: DataLoader(part, batch_size=100) for name, part in parts.items()}
    return Task(seed, steps, TensorDataset(images[train], labels[train]), loaders["val"], loaders[judge])


# ---------------------------------------------------------------------- training


def trainer(steps: int = 0, *callbacks: Callback) -> L.Trainer:
    """A Trainer that writes nothing."""
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def begin(seed: int, lr: float) -> Net:
    """A module with the first weights of that seed."""
    L.seed_everything(seed, verbose=False)
    return Net(lr=lr)


def fit(module: Net, task: Task, order: int, steps: int, *callbacks: Callback) -> None:
    """Train on the pictures in an order of their own."""
    generator = torch.Generator().manual_seed(order)
    loader = DataLoader(task.train, BATCH, shuffle=True, generator=generator)
    trainer(steps, *callbacks).fit(module, loader)


def score(module: Net, task: Task, networks: int = 1) -> Score:
    """What the unchanged `test_step` logs."""
    (logged,) = trainer().test(module, task.judge, verbose=False)
    return Score(100 * logged["test/accuracy"], logged["test/loss"], networks)


def weights(module: Net) -> dict[str, Tensor]:
    """A copy that training does not change."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# ---------------------------------------------------------------------- the arms


def single(task: Task, lr: float, name: str, callbacks: Callable[[], list[Callback]]) -> Scores:
    """One model, perhaps with averaged weights."""
    module = begin(task.seed, lr)
    fit(module, task, task.seed, task.steps, *callbacks())
    return {name: score(module, task)}


def snapshots(task: Task, lr: float) -> Scores:
    """A run of as many cycles as there are members."""
    module = begin(task.seed, lr)
    with tempfile.TemporaryDirectory() as folder:
        fit(module, task, task.seed, task.steps, lt.SnapshotEnsemble(MEMBERS, folder))
        last = score(module, task)
        with lt.Ensemble.load(folder, module).as_forward():
            return {f"snapshot ensemble, {MEMBERS} cycles": score(module, task, MEMBERS), "its last snapshot": last}


def soup(task: Task, lr: float) -> Scores:
    """Half the steps for a common trunk, which is then annealed once for each member, in other orders."""
    module = begin(task.seed, lr)
    fit(module, task, task.seed, task.steps // 2, lt.LRSchedule(CONSTANT))
    trunk, members = weights(module), []
    for member in range(MEMBERS):
        module.load_state_dict(trunk)
        order = task.seed + 1000 * (member + 1)
        fit(module, task, order, task.steps // 2 // MEMBERS, lt.LRSchedule(lt.Cosine()))
        members.append(weights(module))
    last = score(module, task)
    ensemble = lt.Ensemble(module, members)
    with ensemble.as_forward():
        together = score(module, task, MEMBERS)
    all_pictures = DataLoader(task.train, batch_size=TRAIN)

    def val_accuracy(module: Net) -> float:
        update_bn(all_pictures, module)
        (logged,) = trainer().validate(module, task.val, verbose=False)
        return logged["val/accuracy"]

    update_bn(all_pictures, module)
    last_anew = score(module, task)
    module.load_state_dict(lt.greedy_soup(ensemble, val_accuracy).state_dict)
    update_bn(all_pictures, module)
    return {
        f"greedy soup of {MEMBERS} fine-tunings": score(module, task),
        "its last fine-tuning": last,
        "its last fine-tuning, batch norm anew": last_anew,
        "its fine-tunings as an ensemble": together,
    }


def short_runs(task: Task, lr: float) -> Scores:
    """As many whole runs as there are members, each with its share of the steps."""
    runs = []
    for member in range(MEMBERS):
        module = begin(task.seed + 1000 * member, lr)
        fit(module, task, task.seed + 1000 * member, task.steps // MEMBERS, lt.LRSchedule(COSINE))
        runs.append(module)
    first = score(runs[0], task)
    with lt.Ensemble(runs[0], [weights(run) for run in runs]).as_forward():
        return {f"ensemble of {MEMBERS} short runs": score(runs[0], task, MEMBERS), "its first run": first}


SINGLES: dict[str, Callable[[], list[Callback]]] = {
    "single model, constant rate": lambda: [lt.LRSchedule(CONSTANT)],
    "EMA, constant rate": lambda: [lt.LRSchedule(CONSTANT), lt.EMA(0.99)],
    "Polyak average, constant rate": lambda: [lt.LRSchedule(CONSTANT), lt.PolyakAverage(0.75)],
    "single model, cosine": lambda: [lt.LRSchedule(COSINE)],
    "EMA, cosine": lambda: [lt.LRSchedule(COSINE), lt.EMA(0.99)],
    "Polyak average, cosine": lambda: [lt.LRSchedule(COSINE), lt.PolyakAverage(0.75)],
}
ARMS: dict[str, Callable[[Task, float], Scores]] = {
    **{name: partial(single, name=name, callbacks=callbacks) for name, callbacks in SINGLES.items()},
    "snapshots": snapshots,
    "soup": soup,
    "short runs": short_runs,
}
# The best of RATES by the validation cross-entropy of an arm's first row:
# for each rate, python examples/averages.py --judge val --first-seed 100 --seeds 3 --lr RATE
# The best of the short runs was at the end: 0.1 was tried for them too.
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
BEST_RATE = dict.fromkeys(ARMS, 1e-2) | {"soup": 3e-3, "short runs": 3e-2}


# ---------------------------------------------------------------------- what came of it


def table(results: dict[str, list[Score]]) -> str:
    """Means over the seeds, and the paired differences to the first row, as Markdown."""
    (reference, base), *_ = results.items()
    lines = [
        "| | accuracy (%) | difference | cross-entropy (nats) | difference | networks run |",
        "|---|---|---|---|---|---|",
    ]
    for name, scores in results.items():
        cells = [name]
        for quantity, digits in (("accuracy", 2), ("loss", 4)):
            values = [getattr(score, quantity) for score in scores]
            pairs = zip(values, (getattr(score, quantity) for score in base), strict=True)
            cells += [
                f"{statistics.mean(values):.{digits}f}",
                "" if name == reference else difference([a - b for a, b in pairs], digits),
            ]
        lines.append(f"| {' | '.join(cells)} | {scores[0].networks} |")
    return "\n".join(lines) + "\n"


def difference(values: list[float], digits: int) -> str:
    """Mean and 95 % interval of paired differences, bold where the interval leaves out 0."""
    mean, count = statistics.mean(values), len(values)
    margin = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(values) / count**0.5
    text = f"{mean:+.{digits}f} +/- {margin:.{digits}f}"
    return f"**{text}**" if abs(mean) > margin else text


def verdict(lines: str) -> str:
    """What the bold differences of a table say, in words."""
    rows = [line.strip("| ").split(" | ") for line in lines.splitlines()[3:]]

    def named(column: int, sign: str) -> str:
        return "; ".join(row[0] for row in rows if row[column].startswith(f"**{sign}")) or "none"

    return (
        f"Better than the first row beyond noise, by accuracy: {named(2, '+')}. By cross-entropy: {named(4, '-')}."
        f" Worse, by accuracy: {named(2, '-')}. By cross-entropy: {named(4, '+')}."
    )


def page(results: dict[str, list[Score]], options: argparse.Namespace) -> str:
    """The table and all that is needed to read it."""
    count, half = options.seeds, options.steps // 2
    title = "# Averages and ensembles on digits, at equal budget"
    first = (
        f"What `python examples/averages.py` writes: means over {count} seeds ({options.first_seed} to"
        f" {options.first_seed + count - 1}), on {'test' if options.judge == 'test' else 'validation'} pictures."
    )
    packages = {"lightning_tricks": lt, "torch": torch, "lightning": L, "scikit-learn": sklearn}
    versions = [f"{name} {package.__version__}" for name, package in packages.items()]
    rows = table(results)
    notes = [
        verdict(rows),
        f"Differences are to the first row, paired by seed, with their 95 % interval (t-distribution, {count} pairs);"
        " bold where that leaves out 0. Nothing is corrected for the number of rows: one difference in twenty is bold"
        " by chance. High accuracy is good, and low cross-entropy.",
        f"Budget: {options.steps} optimizer steps for each row, trunk and members together. The networks run are the"
        " price of an answer.",
        f"Data: scikit-learn's digits, 8x8 pixels, ten classes; {TRAIN} pictures to train on, {VAL} to validate,"
        f" {TEST:,} to test. The test pictures are the same for every seed, so the intervals do not cover their"
        " choice; a seed draws the other pictures, the first weights and the order of the batches, for all rows alike."
        " With more pictures the task is nearly solved: their number was chosen by the validation accuracy of a single"
        " model.",
        "Network: three convolutions with batch norm (`examples/plain_module.py`) in a module that also logs its test"
        f" loss; AdamW, batches of {BATCH}. The constant rate and the cosine begin with a warmup over a tenth of the"
        " run.",
        "EMA: decay 0.99. Polyak average: the last quarter of the run. Both average the batch-norm statistics too."
        f" Snapshots: {MEMBERS} cycles of a cosine. Short runs: the cosine, each from first weights of its own.",
        f"Soup: {half} steps at the constant rate, then {MEMBERS} times {half // MEMBERS} steps of a cosine from there,"
        " in other orders. The validation accuracy chooses its members, which no other row has the use of;"
        " batch-norm statistics are estimated anew on the training pictures, and for comparison those of one of its"
        " members.",
        f"{rates(options.lr)} Nothing was chosen on test pictures.",
        f"CPU, one thread; Python {platform.python_version()}, {', '.join(versions)}.",
    ]
    listed = [textwrap.fill(note, 120, initial_indent="- ", subsequent_indent="  ") for note in notes]
    return "\n".join([title, "", first, "", rows, *listed]) + "\n"


def rates(lr: float | None) -> str:
    """Where the learning rates come from."""
    if lr is not None:
        return f"Learning rate: {lr:g} everywhere."
    most = statistics.mode(BEST_RATE.values())
    chosen = ", ".join(f"{rate:g} for the {name}" for name, rate in BEST_RATE.items() if rate != most)
    return (
        f"Learning rate: the best of {', '.join(f'{rate:g}' for rate in RATES)} (for the short runs, 0.1 too) for each"
        f" training by validation cross-entropy, over seeds 100 to 102: {chosen}, {most:g} for the others. The first"
        " row is the better of the two schedules by the same measure; EMA, Polyak average and cycles were fixed"
        " beforehand."
    )


# ---------------------------------------------------------------------- the command


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each kind; at least 2")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of each; a multiple of ten")
    parser.add_argument("--lr", type=float, help="one learning rate for all; if not given, the best for each")
    parser.add_argument("--judge", choices=("test", "val"), default="test", help="pictures that the table is about")
    parser.add_argument("--out", type=Path, help="file for the table; if not given, it is only printed")
    parser.add_argument("--fast", action="store_true", help="smoke test: 2 seeds, 10 steps, fewer pictures")
    options = parser.parse_args()
    if options.fast:
        options.seeds, options.steps, options.judge = 2, 10, "val"
    if options.seeds < 2:
        parser.error(f"--seeds must be at least 2, got {options.seeds}: one training has no spread.")
    if options.steps < 1 or options.steps % (2 * MEMBERS):
        parser.error(f"--steps must be a multiple of {2 * MEMBERS}, got {options.steps}: all rows have as many.")
    return options


def quieten() -> None:
    """Let nobody say the same thing in each of a hundred trainings."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning's own use of a name that torch is about to remove.
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    # None is needed: nothing is chosen during the training.
    warnings.filterwarnings("ignore", ".*no `val_dataloader`")
    # A hundred small images are faster without workers.
    warnings.filterwarnings("ignore", ".*does not have many workers")


def main() -> None:
    """Train every arm on every seed, and write the table."""
    options = parse()
    quieten()
    # Images of 8x8 pixels gain nothing from more threads, which stall beside any other process.
    torch.set_num_threads(1)
    results: dict[str, list[Score]] = {}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        began = time.monotonic()
        task = draw(seed, options.steps, options.judge)
        for name, arm in ARMS.items():
            for row, result in arm(task, BEST_RATE[name] if options.lr is None else options.lr).items():
                results.setdefault(row, []).append(result)
        print(f"seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    text = page(results, options)
    print(f"\n{text}", end="")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


if __name__ == "__main__":
    main()
