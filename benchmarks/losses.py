"""What the loss of smoothed and mixed labels costs, forward and backward: its time and its memory, beside the peers.

All is measured in one process, in turns (A B C, B C A, ...); a table has the median of the rounds, the least and the
most, and ratios are taken within a round. A turn is one call that does not count and some more in a row. Ratios mean
something elsewhere, absolute times do not. Memory is what torch's allocator gave out at most, beyond the logits and the
targets, in multiples of the logits: the gradient itself is 1.

Peers are measured where they are installed, here or in `--peers FOLDER` (`pip install --no-deps --target FOLDER timm`);
timm's losses are taken out of their file, without the package around it, which imports much else.
"""

import argparse
import os
import sys
from functools import partial

import torch
import torch.nn.functional as F
from averaging import _allocated, _milliseconds, _ratio, _spread, _taken
from schedules import _in_turns

import lightning_tricks as lt
from lightning_tricks.labels import mix_labels, smooth_labels
from lightning_tricks.losses import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

SMOOTHING = 0.1
DENSE, SMOOTHED = "torch, dense targets", "torch, label_smoothing alone"
MIXED, OURS_SMOOTHED = "ours, smoothed and mixed labels", "ours, smoothed labels"
SIZES = {(256, 1000): (20, 0.75), (1024, 50_000): (1, 0.4)}  # calls in a turn, what the ratio must reach


def _timm(labels, targets):
    """timm's losses, by what they are given."""
    names = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    wanted = ["LabelSmoothingCrossEntropy", "SoftTargetCrossEntropy"]
    losses = _taken("timm", "timm/loss/cross_entropy.py", wanted, names)
    smoothed = losses["LabelSmoothingCrossEntropy"](SMOOTHING)
    return {
        "timm SoftTargetCrossEntropy": lambda logits: losses["SoftTargetCrossEntropy"]()(logits, targets),
        "timm LabelSmoothingCrossEntropy": lambda logits: smoothed(logits, labels),
    }


def _losses(samples, classes, device):
    """Losses of logits, by who computes them; and why a peer is not among them."""
    labels = torch.randint(classes, (samples,), device=device)
    mixed = smooth_labels(mix_labels(labels, torch.rand(samples), torch.randperm(samples)), SMOOTHING)
    targets = lt.soft_targets(mixed, classes)
    smooth, soft = LabelSmoothingCrossEntropy(SMOOTHING), SoftTargetCrossEntropy()
    losses = {
        DENSE: lambda logits: F.cross_entropy(logits, targets),
        "again: noise": lambda logits: F.cross_entropy(logits, targets),
        SMOOTHED: lambda logits: F.cross_entropy(logits, labels, label_smoothing=SMOOTHING),
        MIXED: lambda logits: F.cross_entropy(logits, mixed),
        OURS_SMOOTHED: lambda logits: smooth(logits, labels),
        "ours, dense targets": lambda logits: soft(logits, targets),
    }
    try:
        return losses | _timm(labels, targets), None
    except (ImportError, OSError) as error:
        return losses, error


def _step(loss, logits):
    logits.grad = None
    loss(logits).backward()


def _check(losses, logits):
    """That all give the loss and the gradient of the same targets."""
    for names in ([DENSE, MIXED, "ours, dense targets", "timm SoftTargetCrossEntropy"], [SMOOTHED, OURS_SMOOTHED]):
        reference = None
        for name in (name for name in names if name in losses):
            _step(losses[name], logits)
            reference = logits.grad.clone() if reference is None else reference
            assert (logits.grad - reference).abs().max() < 1e-6, f"{name}: other numbers"
    logits.grad = None


def _table(samples, classes, rounds, number, device):
    """Print the times and the memory of one size; the goals that are measured with it."""
    logits = torch.randn(samples, classes, device=device).requires_grad_()
    losses, missing = _losses(samples, classes, device)
    _check(losses, logits)
    steps = {name: partial(_step, loss, logits) for name, loss in losses.items()}
    times = _in_turns({name: partial(_milliseconds, step, number, device) for name, step in steps.items()}, rounds, 1)
    size, memory = logits.numel() * logits.element_size(), {}
    for name, step in steps.items():
        step()
        logits.grad = None
        memory[name] = _allocated(step, device)[0] / size
    logits.grad = None
    print(f"\nForward and backward, {samples} x {classes} float32\n")
    print(f"| | ms | of {DENSE} | memory, of the logits |\n|---|---|---|---|")
    for name, values in times.items():
        ratio = _ratio(values, times[DENSE])
        print(f"| {name} | {_spread(values)} | {ratio:.2f} | {memory[name]:.2f} |", flush=True)
    if missing is not None:
        print(f"| timm | not measured: {missing} | | |")
    work, most = f"{samples} x {classes}", SIZES[samples, classes][1]
    ratio = _ratio(times[MIXED], times[DENSE])
    goals = [(f"time, {work}", ratio, f"at most {most} of {DENSE}", ratio <= most)]
    if classes > 1000:
        goals += [(f"memory, {work}", memory[MIXED], "at most 1.1 of the logits", memory[MIXED] <= 1.1)]
    return goals


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some seconds, to see that it runs: figures are noise")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each size")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch; its own number")
    parser.add_argument("--peers", metavar="FOLDER", help="where peers are installed beside the environment")
    options = parser.parse_args()
    sys.path += [options.peers] if options.peers else []
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
    rounds = 1 if options.quick else options.rounds
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {rounds} rounds")
    goals = []
    for (samples, classes), (number, _) in SIZES.items():
        goals += _table(samples, classes, rounds, 1 if options.quick else number, options.device)
    print("\n| | measured | goal | reached |\n|---|---|---|---|")
    for work, value, goal, reached in goals:
        print(f"| {work} | {value:.2f} | {goal} | {'yes' if reached else 'no'} |")
