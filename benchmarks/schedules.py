"""What schedules cost: in a Trainer beside torch's schedulers, and by themselves beside the same formula by hand.

All is measured in one process, in turns (A B C, B C A, ...); a table has the median of the rounds, the least and the
most. A fit counts with the quickest tenth of its steps, which other work on the machine disturbs least. What is added
is the difference to the bare fit of the same round; a second bare fit shows the noise. Differences and ratios mean
something elsewhere, absolute times do not.
"""

import argparse
import gc
import logging
import time
from bisect import bisect_right
from collections import UserList
from functools import partial
from math import cos, pi
from statistics import median
from timeit import Timer

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import lightning_tricks as lt

# Schedules, and their formulas by hand at x = step / total_steps: a number, and all steps in an array.
FORMULAS = {
    "Cosine()": (lambda x: (1 + cos(pi * x)) / 2, lambda x: (1 + np.cos(pi * x)) / 2),
    "WarmupCosine(0.05)": (
        lambda x: x / 0.05 if x < 0.05 else (1 + cos(pi * (x - 0.05) / 0.95)) / 2,
        lambda x: np.where(x < 0.05, x / 0.05, (1 + np.cos(pi * (x - 0.05) / 0.95)) / 2),
    ),
    "OneCycle(0.3, 0.04, 1, 0)": (
        lambda x: 0.52 - 0.48 * cos(pi * x / 0.3) if x < 0.3 else (1 + cos(pi * (x - 0.3) / 0.7)) / 2,
        lambda x: np.where(x < 0.3, 0.52 - 0.48 * np.cos(pi * x / 0.3), (1 + np.cos(pi * (x - 0.3) / 0.7)) / 2),
    ),
    "Steps([0.5, 0.75, 0.9])": (
        lambda x: 0.1 ** bisect_right((0.5, 0.75, 0.9), x),
        lambda x: 0.1 ** np.searchsorted((0.5, 0.75, 0.9), x, side="right"),
    ),
    "CosineRestarts(4, gamma=0.5)": (
        lambda x: 0.5 ** (4 * x // 1) * (1 + cos(pi * (4 * x % 1))) / 2,
        lambda x: 0.5 ** (4 * x // 1) * (1 + np.cos(pi * (4 * x % 1))) / 2,
    ),
    "Warmup(0.05, Cooldown(0.2, Cosine(0.1)))": (
        lambda x: x / 0.05 if x < 0.05 else 0.55 + 0.45 * cos(pi * (x - 0.05) / 0.76) if x < 0.81 else (1 - x) / 1.9,
        lambda x: np.select(
            [x < 0.05, x < 0.81], [x / 0.05, 0.55 + 0.45 * np.cos(pi * (x - 0.05) / 0.76)], (1 - x) / 1.9
        ),
    ),
}


class Tiny(L.LightningModule):
    """One small linear layer for each parameter group, and maybe a scheduler of torch."""

    def __init__(self, groups, schedulers):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(groups))
        self.schedulers, self.times = schedulers, []

    def training_step(self, batch, batch_idx):
        self.times.append(time.perf_counter())
        return sum(layer(batch) for layer in self.layers).square().mean()

    def configure_optimizers(self):
        groups = [{"params": layer.parameters()} for layer in self.layers]
        optimizer = torch.optim.SGD(groups, lr=1e-3, weight_decay=1e-4)
        return [optimizer], [{"scheduler": make(optimizer), "interval": "step"} for make in self.schedulers]


def _fit(groups, steps, schedulers=(), callbacks=()):
    """Seconds from one training step to the next: the least but for a tenth of them."""
    off = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[make() for make in callbacks], **off)
    module, loader = Tiny(groups, schedulers), UserList([torch.ones(2, 4)] * steps)  # a list would be many loaders
    gc.collect()
    gc.disable()
    trainer.fit(module, loader)
    gc.enable()
    return np.quantile(np.diff(module.times), 0.1)


def _in_turns(calls, rounds, scale):
    """What each function gave in each round, times a scale; a round before them does not count."""
    names = list(calls)
    orders = [names[turn % len(names) :] + names[: turn % len(names)] for turn in range(rounds + 1)]
    results = [{name: calls[name]() * scale for name in order} for order in orders]
    return {name: [result[name] for result in results[1:]] for name in names}


def _spread(values):
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _in_trainer(groups, steps, rounds):
    lr, decay = partial(lt.LRSchedule, lt.WarmupCosine(0.05)), partial(lt.ParamSchedule, "weight_decay", lt.Cosine())
    by_hand = FORMULAS["WarmupCosine(0.05)"][0]
    fits = {
        "nothing": partial(_fit),
        "nothing again: noise": partial(_fit),
        "an empty Callback": partial(_fit, callbacks=[Callback]),
        "LambdaLR": partial(_fit, schedulers=[partial(LambdaLR, lr_lambda=lambda k: by_hand(k / steps))]),
        "CosineAnnealingLR": partial(_fit, schedulers=[partial(CosineAnnealingLR, T_max=steps)]),
        "LRSchedule": partial(_fit, callbacks=[lr]),
        "LRSchedule, ParamSchedule": partial(_fit, callbacks=[lr, decay]),
    }
    times = _in_turns({name: partial(fit, groups, steps) for name, fit in fits.items()}, rounds, 1e6)
    added = {name: [a - b for a, b in zip(values, times["nothing"], strict=True)] for name, values in times.items()}
    print(f"| {groups} | nothing | {_spread(times.pop('nothing'))} in all | | |")
    for name in times:
        more = [a - b for a, b in zip(added[name], added["LambdaLR"], strict=True)]
        ratio = median(added[name]) / median(added["LambdaLR"])
        print(f"| {groups} | {name} | {_spread(added[name])} | {_spread(more)} | {ratio:.2f} |", flush=True)


def _alone(name, steps, rounds):
    schedule, (plain, array) = lt.schedules.parse(name), FORMULAS[name]
    curves = {
        "ours": lambda: [schedule(k, steps) for k in range(steps)],
        "plain": lambda: [plain(k / steps) for k in range(steps)],
        "array": lambda: array(np.arange(steps) / steps),
    }
    assert np.ptp([curve() for curve in curves.values()], axis=0).max() <= 1e-12, f"{name}: not the same function"
    timers = {key: partial(Timer(curve).timeit, 1) for key, curve in curves.items()}
    times = _in_turns(timers, rounds, 1e9 / steps)
    row = [f"{_spread(values)} | {median(times['ours']) / median(values):.1f}" for values in times.values()]
    print("|", " | ".join([f"`{name}`", *row]), "|", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs: figures are noise")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of fits, and a third as many of evaluations")
    options = parser.parse_args()
    fit_steps, steps, rounds = (20, 1000, 1) if options.quick else (500, 1_000_000, options.rounds)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    print(f"Microseconds added to a step, fits of {fit_steps} steps, {rounds} rounds\n")
    print("| groups | in the Trainer | added | more than LambdaLR adds | ratio |\n|---|---|---|---|---|")
    for groups in (1, 2, 10):
        _in_trainer(groups, fit_steps, rounds)
    print(f"\nNanoseconds for each of {steps} factors, {-(-rounds // 3)} rounds\n")
    print("| schedule | ours | | plain Python | ratio | numpy, all at once | ratio |\n|---|---|---|---|---|---|---|")
    for name in FORMULAS:
        _alone(name, steps, -(-rounds // 3))
