"""The tricks of training neural networks, as callbacks for an unchanged PyTorch Lightning module."""

from lightning_tricks import callbacks, functional, transforms
from lightning_tricks.ablations import ablate
from lightning_tricks.averages import load_average
from lightning_tricks.callbacks import (
    EMA,
    ActivationMonitor,
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
from lightning_tricks.initialization import lsuv_init
from lightning_tricks.labels import MixedLabels, soft_targets
from lightning_tricks.loggers import sweep_config
from lightning_tricks.losses import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from lightning_tricks.lr_finder import LRCurve, find_lr
from lightning_tricks.plots import plot_schedule
from lightning_tricks.post_hoc import synthesize_ema
from lightning_tricks.reports import report
from lightning_tricks.transforms import (
    ColorJitter,
    CutMix,
    Cutout,
    LabelSmoothing,
    Mixup,
    Normalize,
    OneOf,
    PCALighting,
    RandAugment,
    RandomApply,
    RandomCrop,
    RandomErasing,
    RandomFlip,
    RandomResizedCrop,
    TrivialAugment,
)
from lightning_tricks.wandb_report import wandb_report

__all__ = [
    "EMA",
    "ActivationMonitor",
    "BatchTransforms",
    "BinaryCrossEntropy",
    "ColorJitter",
    "Constant",
    "Cooldown",
    "Cosine",
    "CosineRestarts",
    "CutMix",
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
    "Normalize",
    "OneCycle",
    "OneOf",
    "PCALighting",
    "ParamSchedule",
    "PolyakAverage",
    "Polynomial",
    "PostHocEMA",
    "PowerFunction",
    "RandAugment",
    "RandomApply",
    "RandomCrop",
    "RandomErasing",
    "RandomFlip",
    "RandomResizedCrop",
    "SnapshotEnsemble",
    "SoftTargetCrossEntropy",
    "Steps",
    "Triangular",
    "TrivialAugment",
    "UpdateMonitor",
    "Warmed",
    "Warmup",
    "WarmupCosine",
    "WarmupStableDecay",
    "ablate",
    "callbacks",
    "find_lr",
    "functional",
    "greedy_soup",
    "load_average",
    "lsuv_init",
    "plot_schedule",
    "report",
    "schedules",
    "soft_targets",
    "sweep_config",
    "synthesize_ema",
    "transforms",
    "wandb_report",
]

__version__ = "0.1.0"
