"""The shell: callbacks that only say when."""

from lightning_tricks.callbacks.activation_monitor import ActivationMonitor
from lightning_tricks.callbacks.batch_transforms import BatchTransforms
from lightning_tricks.callbacks.early_stopping import EarlyStopping
from lightning_tricks.callbacks.ema import EMA
from lightning_tricks.callbacks.lr_schedule import LRSchedule
from lightning_tricks.callbacks.param_schedule import ParamSchedule
from lightning_tricks.callbacks.polyak_average import PolyakAverage
from lightning_tricks.callbacks.post_hoc_ema import PostHocEMA
from lightning_tricks.callbacks.snapshot_ensemble import KeepBest, SnapshotEnsemble
from lightning_tricks.callbacks.update_monitor import UpdateMonitor

__all__ = [
    "EMA",
    "ActivationMonitor",
    "BatchTransforms",
    "EarlyStopping",
    "KeepBest",
    "LRSchedule",
    "ParamSchedule",
    "PolyakAverage",
    "PostHocEMA",
    "SnapshotEnsemble",
    "UpdateMonitor",
]
