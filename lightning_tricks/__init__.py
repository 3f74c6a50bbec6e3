"""The tricks of training neural networks, as callbacks for an unchanged PyTorch Lightning module."""

from lightning_tricks import callbacks, functional
from lightning_tricks.averages import load_average
from lightning_tricks.callbacks import (
    EMA,
    BatchTransforms,
    EarlyStopping,
    KeepBest,
    LRSchedule,
    ParamSchedule,
    PolyakAverage,
    PostHocEMA,
    SnapshotEnsemble,
    UpdateMonitor,
)
from lightning_tricks.ensembles import Ensemble, greedy_soup
from lightning_tricks.functional import schedules
from lightning_tricks.functional.averaging import HalfLife, Warmed
from lightning_tricks.functional.post_hoc import PowerFunction
from lightning_tricks.functional.schedules import (
    Constant,
    Cooldown,
    Cosine,
    CosineRestarts,
    Exponential,
    InverseSqrt,
    InverseTime,
    Join,
    Linear,
    OneCycle,
    Polynomial,
    Steps,
    Triangular,
    Warmup,
    WarmupCosine,
    WarmupStableDecay,
)
from lightning_tricks.labels import MixedLabels, soft_targets
from lightning_tricks.losses import LabelSmoothingCrossEntropy
from lightning_tricks.lr_finder import LRCurve, find_lr
from lightning_tricks.plots import plot_schedule
from lightning_tricks.post_hoc import synthesize_ema
from lightning_tricks.transforms import Cutout, LabelSmoothing, Mixup

__all__ = [
    "EMA",
    "BatchTransforms",
    "Constant",
    "Cooldown",
    "Cosine",
    "CosineRestarts",
    "Cutout",
    "EarlyStopping",
    "Ensemble",
    "Exponential",
    "HalfLife",
    "InverseSqrt",
    "InverseTime",
    "Join",
    "KeepBest",
    "LRCurve",
    "LRSchedule",
    "LabelSmoothing",
    "LabelSmoothingCrossEntropy",
    "Linear",
    "MixedLabels",
    "Mixup",
    "OneCycle",
    "ParamSchedule",
    "PolyakAverage",
    "Polynomial",
    "PostHocEMA",
    "PowerFunction",
    "SnapshotEnsemble",
    "Steps",
    "Triangular",
    "UpdateMonitor",
    "Warmed",
    "Warmup",
    "WarmupCosine",
    "WarmupStableDecay",
    "callbacks",
    "find_lr",
    "functional",
    "greedy_soup",
    "load_average",
    "plot_schedule",
    "schedules",
    "soft_targets",
    "synthesize_ema",
]

__version__ = "0.1.0"
