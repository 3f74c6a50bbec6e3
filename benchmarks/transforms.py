"""What batch transforms cost on a CPU beside the peers, and beside a copy of the batch.

All is measured in one process, in turns (A B C, B C A, ...); a table has the median of the rounds, the least and the
most, and ratios are taken within a round. A turn is one call that does not count and some more in a row. Each peer
makes what it makes of a batch and its labels: timm one-hot targets, kornia the three columns of its labels. "Fresh
memory" is a clone, whose pages the system hands out anew where it is large: what is not in place cannot be quicker.
RandAugment's peers take picture by picture, of smooth pictures with some noise; those "on PIL" get and give Pillow's
images, and timm applies each operation with probability 1/2, so it does half of the work.

Peers are measured where they are installed, here or in `--peers FOLDER` (`pip install --no-deps --target FOLDER timm
torchvision kornia kornia_rs`). Ratios mean something elsewhere, absolute times do not.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F


def _declare_torchvision():
    """Let torchvision's Python parts import beside a CPU build of torch, which its CUDA operators do not load into."""
    try:
        if torch.version.cuda is not None or version("torchvision").endswith("+cpu"):
            return None
    except PackageNotFoundError:
        return None
    library = torch.library.Library("torchvision", "DEF")
    pooling = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
    for name in ("nms", "qnms", *pooling, *(f"_{name}_backward" for name in pooling)):
        library.define(f"{name}(Tensor a) -> Tensor")
    return library  # what it declares lasts as long as it does


LIBRARY = _declare_torchvision()  # before torchmetrics, which imports torchvision where it is installed

from averaging import _milliseconds, _ratio, _spread  # noqa: E402
from schedules import _in_turns  # noqa: E402

from lightning_tricks.transforms.erasing import Cutout, RandomErasing  # noqa: E402
from lightning_tricks.transforms.mixing import CutMix, Mixup  # noqa: E402
from lightning_tricks.transforms.randaugment import RandAugment  # noqa: E402

COPY, CLONE = "a copy into kept memory", "a clone into fresh memory"
CLASSES = 1000


@dataclass
class Work:
    """What is compared: our transforms, what a peer makes of (images, labels), and the ratio to reach beside one."""

    title: str
    shape: tuple[int, ...]
    ours: dict[str, Callable]
    peers: dict[str, Callable]
    goals: dict[str, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


# ---------------------------------------------------------------------- peers: made when they are measured


def _timm_mix(images, labels, **settings):
    from timm.data.mixup import Mixup

    mix = Mixup(mode="elem", num_classes=CLASSES, label_smoothing=0.0, **settings)
    return lambda: mix(images, labels)


def _timm_erasing(images, labels):
    from timm.data.random_erasing import RandomErasing

    return partial(RandomErasing(probability=1.0, mode="const", device="cpu"), images)


def _kornia(images, labels, name, with_labels=True, **settings):
    import kornia.augmentation

    if with_labels:
        return partial(getattr(kornia.augmentation, name)(data_keys=["input", "class"], **settings), images, labels)
    return partial(getattr(kornia.augmentation, name)(**settings), images)


def _torchvision(images, labels, name, with_labels=True, **settings):
    from torchvision.transforms import v2

    if with_labels:
        return partial(getattr(v2, name)(num_classes=CLASSES, **settings), images, labels)
    return partial(getattr(v2, name)(**settings), images)


def _each(transform, images):
    return lambda: [transform(image) for image in images]


def _pil(images):
    from PIL import Image

    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]


def _timm_augment(images, labels, from_tensors=False):
    import numpy as np
    from timm.data.auto_augment import rand_augment_transform

    transform = rand_augment_transform("rand-m9-n2", {})
    if not from_tensors:
        return _each(transform, _pil(images))
    return lambda: torch.stack([torch.from_numpy(np.array(transform(each))).permute(2, 0, 1) for each in _pil(images)])


def _torchvision_augment(images, labels, on_pil=False):
    from torchvision.transforms import v2

    return _each(v2.RandAugment(2, 9), _pil(images) if on_pil else images.unbind())


def _kornia_augment(images, labels):
    from kornia.augmentation.auto import RandAugment

    return _each(RandAugment(2, 9), (images / 255).split(1))


# ---------------------------------------------------------------------- what is measured

SMALL, LARGE = (256, 3, 32, 32), (128, 3, 224, 224)
ONE_DRAW = "torchvision, one draw for the batch"


def _mixing_and_erasing(shape):
    """The rows of one size; the goals are those of ours in place."""
    large = shape == LARGE
    timm, kornia = "timm, elem", "kornia"
    mixup_peers = {
        timm: partial(_timm_mix, mixup_alpha=0.2, cutmix_alpha=0.0),
        kornia: partial(_kornia, name="RandomMixUpV2"),
        ONE_DRAW: partial(_torchvision, name="MixUp", alpha=0.2),
    }
    cutmix_peers = {
        timm: partial(_timm_mix, mixup_alpha=0.0, cutmix_alpha=1.0),
        kornia: partial(_kornia, name="RandomCutMixV2", use_correct_lambda=True),
        ONE_DRAW: partial(_torchvision, name="CutMix", alpha=1.0),
    }
    erasing_peers = {
        "timm, const": _timm_erasing,
        kornia: partial(_kornia, name="RandomErasing", with_labels=False, p=1.0),
        ONE_DRAW: partial(_torchvision, name="RandomErasing", with_labels=False, p=1.0),
    }
    cutout = Cutout(shape[-1] // 2)
    return [
        Work("mixup", shape, {"Mixup(0.2)": Mixup(0.2)}, mixup_peers, {timm: 0.12} if large else {kornia: 0.2}),
        Work("cutmix", shape, {"CutMix(1.0)": CutMix(1.0)}, cutmix_peers, {timm: 0.2} if large else {kornia: 0.15}),
        Work(
            "cutout and erasing",
            shape,
            {f"Cutout({cutout.size})": cutout, "RandomErasing(1.0)": RandomErasing(1.0)},
            erasing_peers,
            {"timm, const": 0.8} if large else {kornia: 0.6},
        ),
    ]


def _randaugment(side, goals):
    peers = {
        TO_PIL: partial(_timm_augment, from_tensors=True),
        "timm on PIL": _timm_augment,
        ON_PIL: partial(_torchvision_augment, on_pil=True),
        "torchvision on tensors": _torchvision_augment,
        "kornia, image by image": _kornia_augment,
    }
    return Work(
        "randaugment", (128, 3, side, side), {"RandAugment(2, 9)": RandAugment(2, 9)}, peers, goals, torch.uint8
    )


TO_PIL, ON_PIL = "timm, from tensors to PIL and back", "torchvision on PIL"
WORKS = [
    *_mixing_and_erasing(SMALL),
    *_mixing_and_erasing(LARGE),
    _randaugment(32, {TO_PIL: 0.28}),
    _randaugment(224, {ON_PIL: 1.0}),
]


# ---------------------------------------------------------------------- the measurements


def _measure(work, rounds, threads):
    """Print a table; the rows of the table of goals."""
    count = work.shape[0]
    smooth = F.interpolate(torch.rand(*work.shape[:2], 8, 8), work.shape[2:], mode="bilinear")
    numbers = 0.9 * smooth + 0.1 * torch.rand(work.shape)
    images = (numbers if work.dtype.is_floating_point else numbers * 255).to(work.dtype)
    labels, kept = torch.randint(CLASSES, (count,)), torch.empty_like(images)
    calls, missing = {}, {}
    for name, transform in work.ours.items():
        calls[f"{name}, in place"] = partial(transform, images, labels, inplace=True)
        calls[name] = partial(transform, images, labels)
    for name, make in work.peers.items():
        try:
            calls[name] = make(images, labels)
        except ImportError as error:
            missing[name] = error
    calls |= {COPY: partial(kept.copy_, images), CLONE: images.clone}
    number = max(1, 2**22 // images.numel())
    timers = {name: partial(_milliseconds, call, number, "cpu") for name, call in calls.items()}
    times = _in_turns(timers, rounds, 1)

    size = f"{' x '.join(map(str, work.shape))}, {str(work.dtype).removeprefix('torch.')}, {threads} threads"
    first = next(iter(calls))
    print(f"\nMilliseconds of {work.title}, {size}\n\n| | ms | of {first} |\n|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {_spread(values)} | {_ratio(values, times[first]):.2f} |", flush=True)
    for name, error in missing.items():
        print(f"| {name} | not measured: {error} | |")
    rows = []
    for peer, most in work.goals.items():
        for name in work.ours:
            done = f"{name}, in place"
            ratio = _ratio(times[done], times[peer]) if peer in times else None
            rows.append((done, size, peer, ratio, most))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, to see that it runs: figures are noise")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peers", default=None, help="a folder with peers, or none")
    parser.add_argument("--threads", default="2", help="numbers of threads, as 1,2")
    parser.add_argument("--only", default="", help="what the title must contain")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.peers not in (None, "none"):
        sys.path.append(options.peers)
    LIBRARY = LIBRARY or _declare_torchvision()  # of the folder
    goals = []
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        for work in WORKS:
            if options.peers == "none":
                work.peers.clear()
            if options.only in work.title:
                goals += _measure(work, 1 if options.quick else options.rounds, threads)
    print("\n| work | | beside | ratio | must reach | reached |\n|---|---|---|---|---|---|")
    for done, size, peer, ratio, most in goals:
        shown = "not measured | " if ratio is None else f"{ratio:.2f} | "
        verdict = "" if ratio is None else "yes" if ratio <= most else "no"
        print(f"| {done} | {size} | {peer} | {shown}{most} | {verdict} |")
