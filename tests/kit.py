"""What the tests of callbacks share: a plain module, small data, a logger that remembers, and one way to train."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning, Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 3


class Net(L.LightningModule):
    """An ordinary classifier, with batch norm, a frozen layer and a buffer of -inf; it imports nothing of the
    package."""

    def __init__(self, lr: float = 0.05, optimizer: str = "sgd", fail_at: tuple[str, int] | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU())
            self.frozen = nn.Linear(8, 8).requires_grad_(False)
            self.head = nn.Linear(8, CLASSES)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.lr, self.kind, self.fail_at = lr, optimizer, fail_at
        self.losses: list[float] = []
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.frozen(self.body(images)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        self.seen.append(images.detach().clone())
        loss = F.cross_entropy(self(images), labels)
        self.losses.append(loss.item())
        self.log("train/loss", loss)
        if self.fail_at == ("train", self.global_step):
            raise RuntimeError("failed in training")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("val/loss", F.cross_entropy(self(images), labels), sync_dist=True)
        if self.fail_at is not None and self.fail_at[0] == "validation" and self.global_step >= self.fail_at[1]:
            raise RuntimeError("failed in validation")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("test/loss", F.cross_entropy(self(images), labels))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.parameters() if p.requires_grad]
        if self.kind == "adam":
            return torch.optim.Adam(parameters, lr=self.lr)
        return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=1e-3)


class ByHand(Net):
    """The same classifier, to be optimized by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(ByHand):
    """Two optimizers by hand; the second steps every other batch."""

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:  # type: ignore[override]
        return torch.optim.SGD(self.head.parameters(), lr=0.1), torch.optim.Adam(self.body.parameters(), lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.seen.append(images.detach().clone())
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(F.cross_entropy(self(images), labels))
        first.step()
        if batch_idx % 2:
            second.step()


def data(count: int = 24, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    images = torch.randn(count, 1, 4, 4, generator=generator) + labels.view(-1, 1, 1, 1)
    return TensorDataset(images, labels)


def loader(count: int = 24, batch_size: int = 4, seed: int = 0) -> DataLoader:
    return DataLoader(data(count, seed), batch_size=batch_size)


class ResumableLoader:
    """A loader that can restore its position in the middle of an epoch."""

    def __init__(self, count: int = 24, batch_size: int = 4) -> None:
        self.batches = list(loader(count, batch_size))
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for index in range(self.position, len(self.batches)):
            self.position = (index + 1) % len(self.batches)  # Lightning stops at the length, not at the end
            yield self.batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class MemoryLogger(Logger):
    """A logger that remembers its rows and settings."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.hparams: dict[str, Any] = {}

    name = version = "memory"

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.hparams.update(params)

    def series(self, key: str) -> dict[int, float]:
        return {step: row[key] for step, row in self.rows if key in row}


class StopAfter(Callback):
    """End training after some epochs, as a user who interrupts a run at an epoch's end."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 == self.epochs:
            trainer.should_stop = True


def every_epoch(folder: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)


def make_trainer(callbacks: list[Callback], **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 1,
        "log_every_n_steps": 1,
    }
    return L.Trainer(callbacks=callbacks, **{**settings, **options})


def fit(
    callbacks: list[Callback],
    module: L.LightningModule | None = None,
    train: Any = None,
    val: Any = None,
    ckpt_path: Any = None,
    **options: Any,
) -> tuple[L.Trainer, Any]:
    """Train a module with these callbacks; validation data are other than training's."""
    module = Net() if module is None else module
    trainer = make_trainer(callbacks, **options)
    trainer.fit(
        module, loader() if train is None else train, loader(8, seed=5) if val is None else val, ckpt_path=ckpt_path
    )
    return trainer, module


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Equal bit for bit, through containers; a NaN equals a NaN."""
    assert type(left) is type(right), where
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(torch.nan_to_num(left.double()), torch.nan_to_num(right.double())), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert left == right or (left != left and right != right), f"{where}: {left!r} is not {right!r}"


def plugin_that_skips(init_scale: float = 2.0**16):
    """Half precision on the CPU with a scaler; whether a step is skipped is decided by the gradients."""
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=1000)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


class Turns(ByHand):
    """Two optimizers, of which one steps in each batch."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), 0.1), torch.optim.SGD(self.body.parameters(), 0.1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class Unfreeze(BaseFinetuning):
    """Train the body of a `Net` from the second epoch on."""

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer)


class Batches:
    """A loader of batches that are there already (Lightning takes a plain list for several loaders)."""

    def __init__(self, batches: Any) -> None:
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)
