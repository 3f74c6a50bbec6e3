"""What the name of a metric says of it: whether low or high is better."""

import re
from typing import Literal

FALLING = set("loss error err nll mse rmse mae perplexity ppl brier ece bpc wer cer".split())
RISING = set("accuracy acc top1 top5 f1 auc auroc precision recall iou miou map bleu dice r2 psnr ssim rouge".split())


def better(name: str) -> Literal["min", "max"] | None:
    """What of a metric is better, where a word of its name is known; a falling one counts first.

    Args:
        name: as it was logged.
    Example:
        >>> better("val/loss"), better("val_acc"), better("val/score")
        ('min', 'max', None)
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    return "min" if words & FALLING else "max" if words & RISING else None


def doubt(owner: str, monitor: str, mode: str) -> str | None:
    """What to warn of where a mode and a metric's name do not go together; None where nothing is odd.

    Args:
        owner: class that watches the metric.
        monitor: its name.
        mode: "min" or "max".
    Example:
        >>> doubt("KeepBest", "val/acc", "min")
        "KeepBest: mode='min' takes a low 'val/acc' for better. Give mode='max' if a high one is."
    """
    if better(monitor) in (None, mode):
        return None
    taken, other, fix = ("low", "high", "max") if mode == "min" else ("high", "low", "min")
    return f"{owner}: mode={mode!r} takes a {taken} {monitor!r} for better. Give mode={fix!r} if a {other} one is."
