"""What averages of weights cost: an update, the swap for validation, a step of the Trainer, memory; beside the peers.

All is measured in one process, in turns (A B C, B C A, ...); a table has the median of the rounds, the least and the
most, and ratios are taken within a round. A turn is one call that does not count and some more in a row: the caches
hold what the call before left there, for all alike. Ratios mean something elsewhere, absolute times do not.

Peers are measured where they are installed, here or in `--peers FOLDER` (`pip install --no-deps --target FOLDER timm
torch_ema ema_pytorch mosaicml`). What is measured of timm and Composer is taken out of one file, without the package
around it, which imports much else. The goal of ensembles is measured by `ensembles.py`.
"""

import __future__

import argparse
import ast
import contextlib
import itertools
import logging
import os
import sys
from copy import deepcopy
from functools import partial
from importlib.metadata import distribution
from statistics import median
from timeit import Timer
from types import SimpleNamespace

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from schedules import _fit, _in_turns
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lightning_tricks as lt
from lightning_tricks.callbacks.averages import Averages

DECAY = 0.999
LIMIT, COPY = "one flat lerp_ (the limit)", "one flat copy_"


# ---------------------------------------------------------------------- the weights


def _resnet50():
    """The parameters of ResNet-50 in its order of layers, without the statistics of batch norm."""

    def block(inputs, outputs, size):
        yield nn.Conv2d(inputs, outputs, size, bias=False)
        yield nn.BatchNorm2d(outputs, track_running_stats=False)

    layers, inputs = [*block(3, 64, 7)], 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(count):
            layers += [*block(inputs, width, 1), *block(width, width, 3), *block(width, 4 * width, 1)]
            layers += block(inputs, 4 * width, 1) if index == 0 else ()
            inputs = 4 * width
    return nn.Sequential(*layers, nn.Linear(inputs, 1000))


def _transformer(width):
    """The parameters of a vision transformer of 24 layers; a width of 1024 is ViT-L's."""
    layers = [nn.TransformerEncoderLayer(width, 4, 4 * width) for _ in range(24)]
    ends = [nn.Conv2d(3, width, 4, 4), nn.Embedding(65, width), nn.Embedding(1, width)]
    return nn.Sequential(*ends, *layers, nn.LayerNorm(width), nn.Linear(width, 10))


def _module(layers, device):
    module = L.LightningModule()
    module.layers = layers
    return module.to(device)


# ---------------------------------------------------------------------- who averages: (an update, the average after it)


def _ours(module):
    averages = Averages("EMA")
    averages.find(module)
    averages.begin(1)
    return partial(averages.update, [DECAY]), averages.tensors[0].values


def _timm(module):
    names = {"torch": torch, "nn": nn, "deepcopy": deepcopy}
    ema = _taken("timm", "timm/utils/model_ema.py", ["ModelEmaV3"], names)["ModelEmaV3"]
    average = ema(module, DECAY, exclude_buffers=True)
    return partial(average.update, module), average.module.parameters


def _torch_ema(module):
    from torch_ema import ExponentialMovingAverage

    average = ExponentialMovingAverage(module.parameters(), DECAY, use_num_updates=False)
    return average.update, lambda: average.shadow_params


def _ema_pytorch(module):
    from ema_pytorch import EMA

    every_step = {"update_after_step": 0, "update_every": 1, "min_value": DECAY}
    average = EMA(module, beta=DECAY, use_foreach=True, **every_step)
    return average.update, average.ema_model.parameters


def _composer(module):
    is_fsdp = _taken("mosaicml", "composer/utils/misc.py", ["is_model_fsdp"], {})["is_model_fsdp"]
    names = {"torch": torch, "itertools": itertools, "contextlib": contextlib}
    names["misc"] = SimpleNamespace(is_model_fsdp=is_fsdp)
    wanted = ["compute_ema", "get_model_context_manager"]
    update = _taken("mosaicml", "composer/algorithms/ema/ema.py", wanted, names)["compute_ema"]
    average = deepcopy(module)
    return partial(update, module, average, DECAY), average.parameters


def _lightnings(module):
    callback = EMAWeightAveraging(decay=DECAY)
    callback.setup(None, module, "fit")
    return partial(callback._average_model.update_parameters, module), callback._average_model.module.parameters


def _torchs(module):
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return partial(average.update_parameters, module), average.module.parameters


PEERS = {
    "timm ModelEmaV3": _timm,
    "torch_ema": _torch_ema,
    "ema_pytorch, foreach": _ema_pytorch,
    "torch AveragedModel, multi_avg_fn": _torchs,
    "Composer compute_ema": _composer,
    "Lightning EMAWeightAveraging": _lightnings,
}


def _taken(package, path, wanted, names):
    """Functions and classes out of a file of a distribution, without what else it defines and imports."""
    text = distribution(package).locate_file(path).read_text()
    body = [node for node in ast.parse(text).body if getattr(node, "name", None) in wanted]
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.Module(body, []), path, "exec", flags), names)
    return names


@torch.no_grad()
def _check(module, made):
    """That all give what an explicit loop gives; in a first update some copy the weights, as the average is anyway."""
    start = [parameter.clone() for parameter in module.parameters()]
    expected = [parameter.clone() for parameter in start]
    for shift in (0, 1, 1):
        for parameter, value in zip(module.parameters(), expected, strict=True):
            parameter.add_(shift)
            value.copy_(DECAY * value + (1 - DECAY) * parameter)
        for update, _ in made.values():
            update()
    for name, (_, average) in made.items():
        for tensor, value in zip(average(), expected, strict=True):
            assert (tensor - value).abs().max() < 1e-5, f"{name}: other numbers"
    for parameter, value in zip(module.parameters(), start, strict=True):
        parameter.copy_(value)


# ---------------------------------------------------------------------- the measurements


def _milliseconds(call, number, device):
    """Of one of so many calls in a row, after one more; what runs on the device has ended."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def row():
        for _ in range(number):
            call()
        wait()

    call()
    wait()
    return Timer(row).timeit(1) * 1e3 / number


def _ratio(values, others):
    return median(a / b for a, b in zip(values, others, strict=True))


def _spread(values, digits=2):
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _updates(title, module, rounds, number, device):
    """Print a table of updates; the times by name, and what of ours and the peers was measured."""
    numbers = [parameter.numel() for parameter in module.parameters()]
    flat, other = torch.randn(2, sum(numbers), device=device)
    made, missing = {"ours": _ours(module)}, {}
    for name, make in PEERS.items():
        try:
            made[name] = make(module)
        except (ImportError, OSError) as error:
            missing[name] = error
    _check(module, made)
    calls = {
        LIMIT: partial(flat.lerp_, other, 1 - DECAY),
        "again: noise": partial(flat.lerp_, other, 1 - DECAY),
        COPY: partial(flat.copy_, other),
        **{name: update for name, (update, _) in made.items()},
    }
    timers = {name: partial(_milliseconds, call, number, device) for name, call in calls.items()}
    times = _in_turns(timers, rounds, 1)
    print(f"\nMilliseconds of an update, {title}: {sum(numbers) / 1e6:.1f}M floats in {len(numbers)} tensors\n")
    print("| | ms | of the limit | of ours |\n|---|---|---|---|")
    for name, values in times.items():
        of_limit, of_ours = _ratio(values, times[LIMIT]), _ratio(values, times["ours"])
        print(f"| {name} | {_spread(values, 3)} | {of_limit:.2f} | {of_ours:.2f} |", flush=True)
    for name, error in missing.items():
        print(f"| {name} | not measured: {error} | | |")
    return times, made


def _update_goals(title, times, made, device):
    """The goals of an update: on a GPU beside a copy, else beside the limit or the best peer that is here."""
    ours, work = times["ours"], f"update, {title}"
    if device == "cuda":  # a copy moves each number twice, an update three times
        share = _ratio([1.5 * value for value in times[COPY]], ours)
        waits = _waits(made["ours"][0])
        bandwidth = (work, "bandwidth of a copy", share, "at least 0.8", share >= 0.8)
        return [bandwidth, (work, "waits of the host for the device", waits, "none", not waits)]
    if title == "ResNet-50":
        return [_goal(work, LIMIT, ours, times[LIMIT], 1.25)]
    best = min(made.keys() - {"ours"}, key=lambda name: median(times[name]))
    return [_goal(work, f"the best peer here, {best}", ours, times[best], 0.3)]


def _waits(call):
    """Whether the host waits for a GPU in a call."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _goal(work, beside, values, others, most):
    ratio = _ratio(values, others)
    return work, beside, ratio, f"at most {most}", ratio <= most


def _swap(module, rounds, number, device):
    """Print what an average costs that is shown for a validation."""
    averages, callback = Averages("EMA"), EMAWeightAveraging()
    averages.find(module)
    averages.begin(1)
    callback.setup(None, module, "fit")

    def ours():
        averages.show()
        averages.hide()

    def lightnings():
        callback._swap_models(module)
        callback._swap_models(module)

    def ours_and_update():  # which lays out its lists again
        ours()
        averages.update([DECAY])

    calls = {
        "ours": ours,
        "Lightning's": lightnings,
        "ours, and an update": ours_and_update,
        "an update": partial(averages.update, [DECAY]),
    }
    timers = {name: partial(_milliseconds, call, number, device) for name, call in calls.items()}
    times = _in_turns(timers, rounds, 1)
    print("\nMilliseconds of the swap for validation and back, ResNet-50\n\n| | ms |\n|---|---|")
    for name, values in times.items():
        print(f"| {name} | {_spread(values, 3)} |")
    return [_goal("swap for validation, ResNet-50", "Lightning's", times["ours"], times["Lightning's"], 0.05)]


def _steps(rounds, steps):
    """Print what a callback adds to a step of a Trainer."""
    fits = {
        "nothing": [],
        "nothing again: noise": [],
        "an empty Callback": [Callback],
        "EMA": [lt.EMA],
        "Lightning EMAWeightAveraging": [EMAWeightAveraging],
    }
    times = _in_turns({name: partial(_fit, 2, steps, (), made) for name, made in fits.items()}, rounds, 1e6)
    bare = times.pop("nothing")
    added = {name: [a - b for a, b in zip(values, bare, strict=True)] for name, values in times.items()}
    print(f"\nMicroseconds added to a step of a Trainer, fits of {steps} steps of two `Linear(4, 4)`")
    print(f"\n| | added |\n|---|---|\n| nothing | {_spread(bare, 1)} in all |")
    for name, values in added.items():
        print(f"| {name} | {_spread(values, 1)} |")
    ours = median(added["EMA"])
    return [("microseconds added to a Trainer's step", "nothing", ours, "at most 40", ours <= 40)]


def _memory(module, device):
    """Print what is held beside the weights: at most in a phase, and after it."""
    averages, callback = Averages("EMA"), EMAWeightAveraging()
    averages.find(module)
    updates = partial(averages.update, [DECAY]), lambda: callback._average_model.update_parameters(module)
    phases = {
        "begin": (partial(averages.begin, 1), partial(callback.setup, None, module, "fit")),
        "update": updates,
        "again": updates,
        "show": (averages.show, partial(callback._swap_models, module)),
        "hide": (averages.hide, partial(callback._swap_models, module)),
    }
    weights = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    print("\nMemory beside the weights, in multiples of them, ResNet-50: at most, and afterwards")
    print("\n| | ours | Lightning's |\n|---|---|---|")
    held, most = [0.0, 0.0], [0.0, 0.0]
    for phase, calls in phases.items():
        cells = []
        for who, call in enumerate(calls):
            peak, rest = _allocated(call, device)
            most[who] = max(most[who], held[who] + peak / weights)
            cells.append(f"{held[who] + peak / weights:.3f}, {held[who] + rest / weights:.3f}")
            held[who] += rest / weights
        print(f"| {phase} | {cells[0]} | {cells[1]} |")
    return [("extra memory", "the weights", most[0], "at most 1", most[0] < 1.001)]


def _allocated(call, device):
    """Bytes that torch's allocator gave out in a call, less those given back: at most, and at its end."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    totals = [0, *itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))]
    return max(totals), totals[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some seconds, to see that it runs: figures are noise")
    parser.add_argument("--rounds", type=int, default=31, help="rounds of updates and swaps, and half as many of fits")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of updates, swap and memory")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch; its own number")
    parser.add_argument("--peers", metavar="FOLDER", help="where peers are installed beside the environment")
    options = parser.parse_args()
    rounds, number, fit_steps = (1, 1, 20) if options.quick else (options.rounds, 20, 500)
    device = options.device
    sys.path += [options.peers] if options.peers else []
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {rounds} rounds of {number} calls")
    resnet = _module(_resnet50(), device)
    assert [sum(p.numel() for p in resnet.parameters()), len(list(resnet.parameters()))] == [25_557_032, 161]
    modules = {"ResNet-50": resnet, "transformer": _module(_transformer(96), device)}
    if device == "cuda":
        modules["ViT-L"] = _module(_transformer(1024), device)
    goals = []
    for title, module in modules.items():
        goals += _update_goals(title, *_updates(title, module, rounds, number, device), device)
    goals += _swap(resnet, rounds, number, device)
    goals += _steps(-(-rounds // 2), fit_steps)
    goals += _memory(resnet, device)
    print("\n| work | beside | measured | goal | reached |\n|---|---|---|---|---|")
    for work, beside, value, goal, reached in goals:
        print(f"| {work} | {beside} | {value:.3g} | {goal} | {'yes' if reached else 'no'} |")
    print("| ensemble of 5, batch 1 and 64 | a loop over 5 modules | see `ensembles.py` | at most 1.05 | |")
