"""What it costs to look at a training: one logged step, a step of the Trainer, a row of 300 keys; beside the peers.

All is measured in one process, in turns (A B C, B C A, ...); a table has the median of the rounds, the least and the
most, and ratios are taken within a round. Ratios mean something elsewhere, absolute times do not.

Histograms are those of `wandb.watch`, without its hooks and its transfer to a server: 64 bins of each gradient between
its least and its greatest entry. Naive is what is usually written by hand: a clone of each weight and an `item` of each
norm. Steps of a Trainer have a logger that keeps nothing, and rows of Weights & Biases go to an offline run.
"""

import argparse
import gc
import logging
import os
import tempfile
from collections import UserList
from functools import partial
from statistics import median

import lightning as L
import numpy as np
import torch
from averaging import _goal, _milliseconds, _ratio, _spread
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import grad_norm
from schedules import Tiny, _in_turns
from torch import nn

import lightning_tricks as lt
from lightning_tricks.callbacks.step_sums import SUMS, StepSums, WeightCopies, layer_values, to_host
from lightning_tricks.functional import tensor_norms
from lightning_tricks.loggers import log_scalars

MEASURES = ("grad_norm", "weight_norm", "update_ratio")
LIMIT = "one flat norm (the limit)"


# ---------------------------------------------------------------------- one logged step


class _Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        outputs = 4 * width
        sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        layers = [_convolution(*size) for size in sizes]
        self.body = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        same = inputs == outputs
        self.skip = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, images):
        return (self.body(images) + self.skip(images)).relu()


def _convolution(inputs, outputs, size, stride):
    layers = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)
    return nn.Sequential(*layers)


def _resnet50():
    layers, inputs = [_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(count):
            layers.append(_Bottleneck(inputs, width, 2 if index == 0 and width > 64 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


class _Ours:
    """What UpdateMonitor does in a logged step, without the Trainer around it."""

    def __init__(self, module, step):
        self.named, self.step, self.copies = list(module.named_parameters()), step, WeightCopies()

    def __call__(self):
        parameters = [parameter for _, parameter in self.named]
        layers = [name.rpartition(".")[0] for name, _ in self.named]
        sums = StepSums(parameters, layers, {name for measure in MEASURES for name in SUMS[measure]})
        sums.add_gradients()
        sums.copies = self.copies
        self.copies.take(parameters)
        sums.add_before_step()
        self.step()
        self.copies.subtract()
        sums.add_update()
        return layer_values(layers, sums.of_each(iter(to_host(sums.to_move()))), MEASURES)


@torch.no_grad()
def _naive(module, step):
    before = [parameter.clone() for parameter in module.parameters()]
    norms = [(p.grad.norm().item(), p.norm().item()) for p in module.parameters()]
    step()
    updates = [(p - old).norm().item() for p, old in zip(module.parameters(), before, strict=True)]
    return norms, updates


def _histograms(module):
    rows = []
    for parameter in module.parameters():
        least, greatest = parameter.grad.min().item(), parameter.grad.max().item()
        rows.append(torch.histc(parameter.grad, 64, least, greatest).tolist())
    return rows


def _logged_step(module, rounds, number, device):
    """Print what one logged step costs, and its share of a training step; the goals."""
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradients = [parameter.grad for parameter in module.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    moves = partial(torch._foreach_add_, [parameter.detach() for parameter in module.parameters()], 1e-4)
    calls = {
        LIMIT: lambda: torch.linalg.vector_norm(flat),
        "again: noise": lambda: torch.linalg.vector_norm(flat),
        "ours, gradient norms": partial(tensor_norms, gradients),
        "Lightning grad_norm": partial(grad_norm, module, 2),
        "a step": moves,
        "ours, gradient, weight and update norms": _Ours(module, moves),
        "naive, the same": partial(_naive, module, moves),
        "histograms of the gradients": partial(_histograms, module),
    }
    _check(module, gradients)
    times = _in_turns({name: partial(_milliseconds, call, number, device) for name, call in calls.items()}, rounds, 1)
    steps = times.pop("a step")  # no part of looking at it
    for name in ("ours, gradient, weight and update norms", "naive, the same"):
        times[name] = [value - step for value, step in zip(times[name], steps, strict=True)]
    print(f"\nMilliseconds of a logged step: {flat.numel() / 1e6:.1f}M floats in {len(gradients)} tensors\n")
    print("| | ms | of the limit |\n|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {_spread(values)} | {_ratio(values, times[LIMIT]):.2f} |", flush=True)
    ours, all_three = times["ours, gradient norms"], times["ours, gradient, weight and update norms"]
    return times, [
        _goal("gradient norms", LIMIT, ours, times[LIMIT], 1.35),
        ("gradient, weight and update norms (ms)", "", median(all_three), "at most 20", median(all_three) <= 20),
    ]


def _check(module, gradients):
    """That ours are the norms of a loop in double precision."""

    @torch.no_grad()
    def step():
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter.sub_(1e-3 * gradient)

    before = [parameter.detach().double().clone() for parameter in module.parameters()]
    row = _Ours(module, step)()
    pairs = zip(module.parameters(), before, strict=True)
    update = sum((parameter.detach().double() - old).square().sum() for parameter, old in pairs).sqrt()
    weight = sum(old.square().sum() for old in before).sqrt()
    expected = sum(gradient.double().square().sum() for gradient in gradients).sqrt()
    for key, value in (("grad_norm", expected), ("weight_norm", weight), ("update_ratio", update / weight)):
        assert abs(row[f"{key}/total"] / value.item() - 1) < 1e-6, f"{key}: other numbers"


def _share(module, times, rounds, device):
    """Print the share of a training step that looking at every 50th costs."""
    optimizer = torch.optim.SGD(module.parameters(), 1e-6)
    images, labels = torch.randn(8, 3, 224, 224, device=device), torch.randint(1000, (8,), device=device)

    def train():
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images), labels).backward()
        optimizer.step()

    step = median(_in_turns({"step": partial(_milliseconds, train, 1, device)}, rounds, 1)["step"])
    print(f"\nA step of ResNet-50 at batch 8: {step:.0f} ms; share of it, averaged over 50 steps\n\n| | % |\n|---|---|")
    shares = {name: 100 * median(values) / 50 / step for name, values in times.items()}
    for name in ("ours, gradient, weight and update norms", "histograms of the gradients"):
        print(f"| {name} | {shares[name]:.4f} |")
    ours = shares["ours, gradient, weight and update norms"]
    return [("every 50th step (% of a step)", "", ours, "at most 0.03", ours <= 0.03)]


# ---------------------------------------------------------------------- a step of the Trainer


class Forgets(Logger):
    """A logger that keeps nothing."""

    name = version = "forgets"

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class LogsNorms(Callback):
    """What Lightning's documentation proposes."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pl_module.log_dict(grad_norm(pl_module, 2))


class LogsDict(Callback):
    """So many keys by the module's own `log_dict`."""

    def __init__(self, count):
        self.row = {f"layer/{i}": float(i) for i in range(count)}

    def on_train_batch_end(self, trainer, pl_module, *args):
        pl_module.log_dict(self.row)


class LogsScalars(LogsDict):
    """The same by ours."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        log_scalars(trainer, self.row)


class Bare(Callback):
    """The same three norms of each layer, of one optimizer with a closure and nothing else: what they cost at least."""

    def on_train_start(self, trainer, pl_module):
        names, self.parameters = zip(*pl_module.named_parameters(), strict=True)
        self.layers, self.copies = [name.rpartition(".")[0] for name in names], [p.clone() for p in self.parameters]
        trainer.optimizers[0].register_step_pre_hook(self.before_step)
        trainer.optimizers[0].register_step_post_hook(self.after_step)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms = torch._foreach_norm([p.grad for p in self.parameters], 2, dtype=torch.float64)

    def before_step(self, optimizer, args, kwargs):
        def then_measure():
            loss = kwargs["closure"]()
            with torch.no_grad():
                torch._foreach_copy_(self.copies, self.parameters)
                self.norms += torch._foreach_norm(self.copies, 2, dtype=torch.float64)
            return loss

        return args, {**kwargs, "closure": then_measure}

    @torch.no_grad()
    def after_step(self, *args):
        torch._foreach_sub_(self.copies, self.parameters)
        self.norms += torch._foreach_norm(self.copies, 2, dtype=torch.float64)

    def on_train_batch_end(self, trainer, *args):
        numbers, count, row = torch.stack(self.norms).tolist(), len(self.layers), {}
        for measure, start in zip(MEASURES, (0, count, 2 * count), strict=True):
            for layer, number in zip(self.layers, numbers[start:], strict=False):
                for key in (f"{measure}/{layer}", f"{measure}/total"):
                    row[key] = row.get(key, 0.0) + number**2
        log_scalars(trainer, {key: value**0.5 for key, value in row.items()})


def _fit(steps, callbacks=(), logger=Forgets):
    """Seconds from one training step to the next: the least but for a tenth of them."""
    off = dict.fromkeys(["enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    options = {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, "logger": logger(), **off}
    trainer = L.Trainer(callbacks=[make() for make in callbacks], **options)
    module, loader = Tiny(2, ()), UserList([torch.ones(2, 4)] * steps)  # a list would be many loaders
    gc.collect()
    gc.disable()
    trainer.fit(module, loader)
    gc.enable()
    return np.quantile(np.diff(module.times), 0.1)


def _added(title, fits, rounds, scale, digits):
    """Print what each adds to the first, and give it."""
    times = _in_turns(fits, rounds, scale)
    bare = times.pop(next(iter(fits)))
    added = {name: [a - b for a, b in zip(values, bare, strict=True)] for name, values in times.items()}
    print(f"\n{title}\n\n| | added |\n|---|---|\n| nothing | {_spread(bare, digits)} in all |")
    for name, values in added.items():
        print(f"| {name} | {_spread(values, digits)} |", flush=True)
    return added


def _steps(rounds, steps):
    """Print what UpdateMonitor adds to a step of a Trainer; the goals."""
    monitor = partial(lt.UpdateMonitor, 1)
    fits = {
        "nothing": [],
        "nothing again: noise": [],
        "an empty Callback": [Callback],
        "UpdateMonitor, an idle step": [partial(lt.UpdateMonitor, 10**9)],
        "the same norms by a bare callback, every step": [Bare],
        "UpdateMonitor, every step": [monitor],
        "UpdateMonitor and LRSchedule, every step": [monitor, partial(lt.LRSchedule, lt.WarmupCosine(0.05))],
        "log_dict(grad_norm), every step": [LogsNorms],
    }
    title = f"Microseconds added to a step of a Trainer, fits of {steps} steps of two `Linear(4, 4)`"
    added = _added(title, {name: partial(_fit, steps, made) for name, made in fits.items()}, rounds, 1e6, 1)
    logged, idle = median(added["UpdateMonitor, every step"]), added["UpdateMonitor, an idle step"]
    more = median([a - b for a, b in zip(idle, added["an empty Callback"], strict=True)])
    return [
        ("microseconds added to a logged step", "nothing", logged, "at most 120", logged <= 120),
        ("microseconds added to an idle step", "nothing", median(idle), "at most 10", median(idle) <= 10),
        ("microseconds added to an idle step", "an empty Callback", more, "at most 10", more <= 10),
    ]


def _rows(rounds, steps, count):
    """Print what a row of so many keys costs with Weights & Biases; the goal."""
    import wandb

    os.environ["WANDB_SILENT"] = "true"

    def fit(callbacks):
        with tempfile.TemporaryDirectory() as folder:
            seconds = _fit(steps, callbacks, lambda: WandbLogger(save_dir=folder, project="benchmark", offline=True))
            wandb.finish()
        return seconds

    fits = {"nothing": [], f"ours, {count} keys": [partial(LogsScalars, count)]}
    fits[f"log_dict, {count} keys"] = [partial(LogsDict, count)]
    title = f"Milliseconds added to a step of a Trainer with an offline W&B run, fits of {steps} steps"
    added = _added(title, {name: partial(fit, made) for name, made in fits.items()}, rounds, 1e3, 2)
    ours = median(added[f"ours, {count} keys"])
    return [(f"{count} keys to W&B (ms)", "nothing", ours, "at most 5", ours <= 5)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some seconds, to see that it runs: figures are noise")
    parser.add_argument("--rounds", type=int, default=31, help="rounds of logged steps, half as many of fits")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the logged step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch; its own number")
    options = parser.parse_args()
    rounds, number, steps = (1, 1, 20) if options.quick else (options.rounds, 5, 300)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {rounds} rounds of {number} calls")
    resnet = _resnet50().to(options.device)
    assert [sum(p.numel() for p in resnet.parameters()), len(list(resnet.parameters()))] == [25_557_032, 161]
    times, goals = _logged_step(resnet, rounds, number, options.device)
    goals += _share(resnet, times, -(-rounds // 6), options.device)
    goals += _steps(-(-rounds // 2), steps)
    goals += _rows(-(-rounds // 6), steps // 3, 300)
    print("\n| work | beside | measured | goal | reached |\n|---|---|---|---|---|")
    for work, beside, value, goal, reached in goals:
        print(f"| {work} | {beside} | {value:.3g} | {goal} | {'yes' if reached else 'no'} |")
