"""Make docs/transforms.jpg: every batch transform on real pictures, drawn by the package."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images
from torch import Tensor

import lightning_tricks as lt

SIZE, DRAWS = 160, 7
GALLERY: list[lt.transforms.Transform] = [
    lt.RandomFlip(),
    lt.RandomCrop(SIZE, padding=40),
    lt.RandomResizedCrop(SIZE),
    lt.ColorJitter(0.5, 0.5, 0.5, 0.2),
    lt.PCALighting(0.3),
    lt.RandAugment(2, 9),
    lt.TrivialAugment(),
    lt.Cutout(60),
    lt.RandomErasing(1.0),
    lt.Mixup(1.0),
    lt.CutMix(1.0),
    lt.RandomApply(lt.ColorJitter(saturation=1.0), 0.5),
    lt.OneOf([lt.Mixup(1.0), lt.CutMix(1.0)]),
    lt.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
]


def pictures() -> Tensor:
    """Two photographs in turns, as a batch (N, 3, SIZE, SIZE) of uint8."""
    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    small = torch.nn.functional.interpolate(torch.stack(photographs).float(), (SIZE, SIZE * 3 // 2), mode="area")
    return small.round().byte()[:, :, :, -SIZE:].repeat((DRAWS + 1) // 2, 1, 1, 1)[:DRAWS]


def row(transform: lt.transforms.Transform) -> Tensor:
    """The pictures as the transform makes them, side by side, in [0, 1]."""
    images, _ = transform(pictures(), torch.zeros(DRAWS, dtype=torch.int64), torch.Generator().manual_seed(2))
    # What is not in a picture's own range is stretched into it.
    images = (images - images.min()) / (images.max() - images.min()) if images.is_floating_point() else images / 255
    return torch.cat([torch.nn.functional.pad(image, (0, 4), value=1.0) for image in images], dim=2)


def gallery() -> Figure:
    """One row of pictures for each transform, below those they are made of."""
    rows = {"the pictures": row(lambda images, labels, generator: (images, labels))}
    rows |= {repr(transform): row(transform) for transform in GALLERY}
    figure = Figure(figsize=(11, 1.85 * len(rows)), layout="constrained")
    for (text, pictures_of_row), ax in zip(rows.items(), figure.subplots(len(rows), 1), strict=True):
        ax.imshow(pictures_of_row.permute(1, 2, 0).numpy())
        ax.set_title(text if len(text) < 110 else text[:107] + "...", fontsize=8, family="monospace", loc="left", pad=3)
        ax.axis("off")
    return figure


if __name__ == "__main__":
    gallery().savefig(Path(__file__).with_name("transforms.jpg"), dpi=75, pil_kwargs={"quality": 80})
