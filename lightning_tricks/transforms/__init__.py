"""Batch transforms: frozen values that draw their parameters and apply them to images and labels.

Each is a plain callable `transform(images, labels, generator=None, inplace=False) -> (images, labels)`; so is any
function of that signature. Parameters are drawn on the CPU, so that they do not depend on the batch's device.
"""

from lightning_tricks.transforms.erasing import Cutout
from lightning_tricks.transforms.mixing import Mixup
from lightning_tricks.transforms.smoothing import LabelSmoothing
from lightning_tricks.transforms.transform import Transform

__all__ = ["Cutout", "LabelSmoothing", "Mixup", "Transform"]
