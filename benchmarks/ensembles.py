"""What one module and five sets of weights cost beside five modules in memory, to predict with.

Both run the members one after the other and combine what they say by the same function. All is measured in one process,
in turns (A B, B A, ...); a table has the median of the rounds, the least and the most, in milliseconds for a batch.
Ratios mean something elsewhere, absolute times do not.
"""

import argparse
import copy
import gc
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from timeit import Timer

import torch
from torch import nn

from lightning_tricks.ensembles import Ensemble
from lightning_tricks.functional.ensembling import log_mean_probability

MEMBERS = 5


def _block(channels):
    return [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]


MODULES = {
    "two linear layers": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 512), nn.ReLU(), nn.Linear(512, 10))),
    "20 convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 32, 3), *(part for _ in range(19) for part in _block(32)), nn.Flatten(), nn.LazyLinear(10)
        )
    ),
    "4 transformer layers": (
        lambda: nn.Sequential(
            nn.Flatten(2),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, 512, batch_first=True), 4),
            nn.Flatten(),
            nn.LazyLinear(10),
        )
    ),
}


@torch.inference_mode()
def _loop(modules, images):
    return log_mean_probability(torch.stack([module(images) for module in modules]))


@torch.inference_mode()
def _ensemble(ensemble, images):
    return ensemble(images)


def _in_turns(calls, rounds, number):
    """Milliseconds of each function in each round; a round before them does not count."""
    names, times = list(calls), {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            times[name].append(Timer(calls[name]).timeit(number) * 1e3 / number)
    return {name: values[1:] for name, values in times.items()}


def _spread(values):
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _row(name, batch, rounds, number, device):
    images = torch.randn(batch, 3, 16, 16, device=device)
    first = MODULES[name]().to(device).eval()
    first(images)
    modules = [copy.deepcopy(first) for _ in range(MEMBERS)]
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.05)
    states = [module.state_dict() for module in modules]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{index}.pt" for index in range(MEMBERS)]
        for state, path in zip(states, paths, strict=True):
            torch.save({"state_dict": state}, path)
        ours, streamed = Ensemble(first, states).eval(), Ensemble(first, paths).eval()
        assert torch.equal(_ensemble(ours, images), _loop(modules, images)), f"{name}: not the same function"
        calls = {
            "loop": partial(_loop, modules, images),
            "again": partial(_loop, modules, images),
            "ours": partial(_ensemble, ours, images),
            "stream": partial(_ensemble, streamed, images),
        }
        if device != "cpu":
            calls = {key: partial(_synchronized, call) for key, call in calls.items()}
        times = _in_turns(calls, rounds, number)
    ratio = {key: median([a / b for a, b in zip(values, times["loop"], strict=True)]) for key, values in times.items()}
    cells = [_spread(times["loop"]), f"{ratio['again']:.3f}", _spread(times["ours"]), f"{ratio['ours']:.3f}"]
    print("|", " | ".join([name, str(batch), *cells, f"{ratio['stream']:.2f}"]), "|", flush=True)


def _synchronized(call):
    call()
    torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs: figures are noise")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rounds, number = (1, 1) if options.quick else (options.rounds, 5)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    print(f"Milliseconds to predict with {MEMBERS} members on {options.device}, {rounds} rounds\n")
    print("| module | batch | loop over 5 modules | noise | Ensemble | ratio | ratio, stream=True |")
    print("|---|---|---|---|---|---|---|")
    for name in MODULES:
        for batch in (1, 64):
            _row(name, batch, rounds, number, options.device)
