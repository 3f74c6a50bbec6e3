"""An ordinary LightningModule and its data: 1,797 scans of handwritten digits, 8x8 pixels, in ten classes."""

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

CLASSES = 10


class DigitsNet(L.LightningModule):
    """A small convolutional classifier of (N, 1, 8, 8) images."""

    def __init__(self, lr: float = 3e-3, weight_decay: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(
            convolution(1, 32), convolution(32, 64), nn.MaxPool2d(2), convolution(64, 64), nn.AdaptiveAvgPool2d(1)
        )
        self.head = nn.Linear(64, CLASSES)
        self.train_accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.val_accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.test_accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).flatten(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.train_accuracy(logits, labels)
        self.log("train/loss", loss)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log("val/loss", F.cross_entropy(logits, labels))
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test/accuracy", self.test_accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=self.hparams.weight_decay)


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """A 3x3 convolution with batch norm and ReLU, of unchanged height and width."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def loaders(seed: int, batch_size: int = 64) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Training, validation and test batches: half, a sixth and a third of the scans; the seed orders training only."""
    images, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(range(len(labels)), test_size=600, stratify=labels, random_state=0)
    train, val = train_test_split(rest, test_size=300, stratify=labels[rest], random_state=0)
    mean, std = images[train].mean(), images[train].std()
    images = torch.tensor((images - mean) / std, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(labels)
    order = torch.Generator().manual_seed(seed)
    return (
        # A last batch of one image would upset the batch norm.
        DataLoader(TensorDataset(images[train], labels[train]), batch_size, True, generator=order, drop_last=True),
        DataLoader(TensorDataset(images[val], labels[val]), batch_size=300),
        DataLoader(TensorDataset(images[test], labels[test]), batch_size=300),
    )
