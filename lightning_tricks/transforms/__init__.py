"""Batch transforms: frozen values that draw their parameters and apply them to images and labels.

Each is a plain callable `transform(images, labels, generator=None, inplace=False) -> (images, labels)`; so is any
function of that signature. Parameters are drawn on the CPU, so that they do not depend on the batch's device.
"""

from lightning_tricks.transforms.choice import OneOf, RandomApply
from lightning_tricks.transforms.color import ColorJitter, Normalize, PCALighting
from lightning_tricks.transforms.erasing import Cutout, RandomErasing
from lightning_tricks.transforms.geometry import RandomCrop, RandomFlip, RandomResizedCrop
from lightning_tricks.transforms.mixing import CutMix, Mixup
from lightning_tricks.transforms.randaugment import RandAugment, TrivialAugment
from lightning_tricks.transforms.smoothing import LabelSmoothing
from lightning_tricks.transforms.transform import Transform

__all__ = [
    "ColorJitter",
    "CutMix",
    "Cutout",
    "LabelSmoothing",
    "Mixup",
    "Normalize",
    "OneOf",
    "PCALighting",
    "RandAugment",
    "RandomApply",
    "RandomCrop",
    "RandomErasing",
    "RandomFlip",
    "RandomResizedCrop",
    "Transform",
    "TrivialAugment",
]
