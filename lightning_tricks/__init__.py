"""The tricks of training neural networks, as callbacks for an unchanged PyTorch Lightning module."""

from lightning_tricks import callbacks, functional
from lightning_tricks.callbacks import EMA, BatchTransforms, EarlyStopping, LRSchedule, UpdateMonitor
from lightning_tricks.functional import schedules
from lightning_tricks.functional.schedules import Constant, Cosine, Linear, Warmup, WarmupCosine
from lightning_tricks.labels import MixedLabels, soft_targets
from lightning_tricks.losses import LabelSmoothingCrossEntropy
from lightning_tricks.transforms import Cutout, LabelSmoothing, Mixup

__all__ = [
    "EMA",
    "BatchTransforms",
    "Constant",
    "Cosine",
    "Cutout",
    "EarlyStopping",
    "LRSchedule",
    "LabelSmoothing",
    "LabelSmoothingCrossEntropy",
    "Linear",
    "MixedLabels",
    "Mixup",
    "UpdateMonitor",
    "Warmup",
    "WarmupCosine",
    "callbacks",
    "functional",
    "schedules",
    "soft_targets",
]

__version__ = "0.1.0"
