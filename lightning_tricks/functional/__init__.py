"""The pure half: torch and the standard library alone, no trainer, no logger, no global random state."""

from lightning_tricks.functional import (
    averaging,
    batch_norm,
    checks,
    cross_entropy,
    ensembling,
    erasing,
    mixing,
    norms,
    post_hoc,
    schedules,
    stopping,
)
from lightning_tricks.functional.averaging import can_average, ema_
from lightning_tricks.functional.cross_entropy import mixed_nll
from lightning_tricks.functional.erasing import cutout, sample_centers
from lightning_tricks.functional.mixing import mixup, sample_beta, sample_mixup
from lightning_tricks.functional.norms import group_norms, tensor_norms, update_norms
from lightning_tricks.functional.stopping import Patience, PatienceState, Stop

__all__ = [
    "Patience",
    "PatienceState",
    "Stop",
    "averaging",
    "batch_norm",
    "can_average",
    "checks",
    "cross_entropy",
    "cutout",
    "ema_",
    "ensembling",
    "erasing",
    "group_norms",
    "mixed_nll",
    "mixing",
    "mixup",
    "norms",
    "post_hoc",
    "sample_beta",
    "sample_centers",
    "sample_mixup",
    "schedules",
    "stopping",
    "tensor_norms",
    "update_norms",
]
