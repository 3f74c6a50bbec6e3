"""Train-only transforms of whole batches, on the batch's device, for an unchanged module."""

import hashlib
import inspect
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Generator, Tensor
from torch.optim import Optimizer

from lightning_tricks.callbacks.batches import describe, read_item, write_item
from lightning_tricks.callbacks.steps import state_without_module
from lightning_tricks.functional.checks import check_count, message
from lightning_tricks.labels import WAYS_OUT, MixedLabels, soft_targets
from lightning_tricks.loggers import log_settings
from lightning_tricks.transforms import Transform

_HOOK = "on_after_batch_transfer"


class BatchTransforms(Callback):
    """Transform each training batch, after it has reached its device and before `training_step` sees it.

        images, labels = transform(images, labels, generator)     for each transform, in order

    Nothing happens in validation, the sanity check, `test` or `predict`. The batch that the loader gave is left as it
    is, and so is every other item of it: a loss of further labels would see mixed images and unmixed labels. Integer
    labels become `MixedLabels` where a transform mixes or smooths them: the module's own cross-entropy computes the
    right loss of them, and its metrics see the dominant label of each sample.

    A batch's draws are a function of (seed, rank, epoch, batch index): every rank and epoch differs, a resumed run
    draws what the run it continues would have drawn, and torch's global generator is untouched. Ranks that share their
    batches (tensor parallelism) draw alike.

    Args:
        transforms: callables `(images, labels, generator=None, inplace=False) -> (images, labels)`, as `Mixup(0.2)`.
        images: index or key of the images (N, C, H, W) in the batch.
        labels: index or key of the labels (N, ...); None leaves the batch's labels alone, for transforms of images.
        seed: any int of at least 0; None takes that of `seed_everything`, else a random one that all ranks share. A
            resumed run goes on with the first run's seed.
        targets: "mixed" for `MixedLabels`; "soft" for dense (N, K) probabilities, for a loss that knows no MixedLabels.
        num_classes: number of classes K, for targets="soft".
    Raises:
        TypeError: no transforms, a `training_step` that takes a `dataloader_iter`, or a batch without images and labels
            where they should be.
        ValueError: an argument out of range, or labels that are not as many as the images.
        RuntimeError: in a step with a loss, mixed labels that no loss used which knows them, or a batch that went past
            the transforms. (Of several losses, one that knows them is enough.)
    Example:
        >>> import lightning as L
        >>> from lightning_tricks import BatchTransforms, Cutout, LabelSmoothing, Mixup
        >>> tricks = BatchTransforms([Cutout(8), Mixup(0.2), LabelSmoothing(0.1)])
        >>> trainer = L.Trainer(callbacks=[tricks], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        transforms: list[Transform],
        images: int | str = 0,
        labels: int | str | None = 1,
        seed: int | None = None,
        targets: Literal["mixed", "soft"] = "mixed",
        num_classes: int | None = None,
    ) -> None:
        owner = "BatchTransforms"
        chosen = list(transforms) if isinstance(transforms, (list, tuple)) else []
        if not chosen or not all(callable(transform) and not isinstance(transform, type) for transform in chosen):
            fix = "Give at least one, as in [Mixup(0.2)]"
            raise TypeError(message(owner, "transforms", "a list of transforms", transforms, fix))
        for name, where in (("images", images), ("labels", labels)):
            if isinstance(where, bool) or (
                not isinstance(where, (int, str)) and not (name == "labels" and where is None)
            ):
                fix = "Say where they are in a batch, as 0 or 'image'"
                raise TypeError(message(owner, name, "an index or a key", where, fix))
        if seed is not None:
            check_count(owner, "seed", seed, 0, "seed", "None takes that of seed_everything")
        if targets not in ("mixed", "soft"):
            fix = "'soft' is for a loss that knows no MixedLabels"
            raise ValueError(message(owner, "targets", "'mixed' or 'soft'", targets, fix))
        if targets == "soft" and num_classes is None:
            fix = "Dense targets have a column for each class"
            raise ValueError(message(owner, "num_classes", "given with targets='soft'", num_classes, fix))
        if num_classes is not None:
            check_count(owner, "num_classes", num_classes, 1, "classes", "Give what the logits have")
        self.transforms = chosen
        self.images = images
        self.labels = labels
        self.seed = seed
        self.targets = targets
        self.num_classes = num_classes
        self._seed = seed  # the one in force
        self._entropy: int | None = None
        self._index = 0
        self._trainer: pl.Trainer | None = None
        self._owner: Any = None
        self._mixed: MixedLabels | None = None
        self._waiting = self._transformed = self._had_loss = False

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's configuration shows."""
        names = ("images", "labels", "targets", "num_classes")
        chosen = {name: getattr(self, name) for name in names}
        return {"transforms": [repr(transform) for transform in self.transforms], "seed": self._seed, **chosen}

    # ------------------------------------------------------------------ when

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the seed, and refuse a module whose batches cannot be reached."""
        if stage != "fit":
            return
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            fix = "Let it take a batch"
            got = "training_step(dataloader_iter)"
            raise TypeError(
                message("BatchTransforms", "training_step", "one that Lightning hands batches to", got, fix)
            )
        self._index = [other for other in trainer.callbacks if isinstance(other, BatchTransforms)].index(self)
        if self._seed is None or trainer.global_step == 0:  # a further fit of a run has the run's
            given = os.environ.get("PL_GLOBAL_SEED")
            self._seed = int(given) if self.seed is None and given else self.seed
        if self._seed is None:
            if self._entropy is None:
                self._entropy = trainer.strategy.broadcast(int.from_bytes(os.urandom(4), "little"))
            self._seed = self._entropy

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stand behind the hook through which every batch comes."""
        self._trainer, self._waiting = trainer, True
        self._owner = _owner_of_hook(trainer, pl_module)
        _attach(self, self._owner)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the settings."""
        log_settings(self, trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The next batch that comes is one to train on."""
        self._waiting = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """What the step itself moves to the device is the module's own affair."""
        self._waiting = False

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note that the step has a loss: a module that optimizes by hand may call backward past Lightning's hook."""
        self._had_loss = self._had_loss or not pl_module.automatic_optimization

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Note that the step has a loss."""
        self._had_loss = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refuse a loss that went past the mixed labels: it would train on the wrong targets without a word."""
        mixed, self._mixed = self._mixed, None
        transformed, self._transformed, self._waiting = self._transformed, False, True
        if not transformed:
            got = "a batch that went past it"
            fix = f"Let other callbacks leave {_HOOK} of {type(self._owner).__name__} alone"
            raise RuntimeError(message("BatchTransforms", "hook", "the one that Lightning calls", got, fix))
        if mixed is not None and self._had_loss and not mixed.used:
            condition = "used by a loss that knows mixed labels, in every step that has a loss"
            got = f"a training_step of {type(pl_module).__name__} whose loss did not use them"
            raise RuntimeError(message("BatchTransforms", "labels", condition, got, WAYS_OUT))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the hook back."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the hook back."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the hook back."""
        self._release()

    def _release(self) -> None:
        if self._owner is not None:
            _detach(self, self._owner)
        self._trainer = self._owner = self._mixed = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the module in the middle of a run carries a copy of this along: without a trainer it does nothing.
        return state_without_module(self, _trainer=None, _owner=None, _mixed=None)

    # ------------------------------------------------------------------ what

    def transform_batch(self, batch: Any) -> Any:
        """Apply the transforms to a batch if the trainer is training; the argument is left as it is.

        Args:
            batch: what the loader gave, on its device.
        Returns:
            A batch of the same structure.
        """
        trainer = self._trainer
        if trainer is None or not trainer.training or not self._waiting:
            return batch
        self._transformed, self._had_loss, self._mixed = True, False, None
        if batch is None:  # Lightning skips it
            return batch
        images, labels = self._read(batch)
        generator = self._generator(trainer)
        for transform in self.transforms:
            mixed = isinstance(labels, MixedLabels)
            images, labels = transform(images, labels, generator=generator)
            if mixed and labels is not None and not (isinstance(labels, MixedLabels) or labels.is_floating_point()):
                fix = "Put it before those that mix labels, or let it index them, which keeps the mix"
                condition = "one that keeps the mix of the labels"
                raise TypeError(message("BatchTransforms", "transforms", condition, transform, fix))
        if labels is None:
            return write_item(batch, self.images, images)
        if self.targets == "soft":
            assert self.num_classes is not None
            labels = soft_targets(labels, self.num_classes)
        elif isinstance(labels, MixedLabels):
            self._mixed = labels
        assert self.labels is not None
        return write_item(write_item(batch, self.images, images), self.labels, labels)

    def _generator(self, trainer: pl.Trainer) -> Generator:
        batch_idx = trainer.fit_loop.batch_idx + 1  # of the batch that is on its way
        # By which the loader's batches are dealt: ranks that share a batch have it in common.
        rank = (trainer.distributed_sampler_kwargs or {}).get("rank", trainer.global_rank)
        place = (self._seed, rank, trainer.current_epoch, batch_idx, self._index)
        digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
        return Generator().manual_seed(int.from_bytes(digest, "little"))

    def _read(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        images = read_item(batch, self.images)
        labels = None if self.labels is None else read_item(batch, self.labels)
        if isinstance(batch, Tensor):  # its rows are samples, not images and labels
            images, labels = batch if self.labels is None else None, None
        if not isinstance(images, Tensor) or isinstance(labels, Tensor) != (self.labels is not None):
            condition = f"one with tensors at images={self.images!r} and labels={self.labels!r}"
            fix = "Say where they are with images= and labels=, or labels=None for images alone"
            raise TypeError(message("BatchTransforms", "batch", condition, describe(batch), fix))
        if labels is not None and (labels.dim() == 0 or len(labels) != len(images)):
            got = f"{tuple(labels.shape)} for images {tuple(images.shape)}"
            fix = "Say where they are with labels="
            raise ValueError(message("BatchTransforms", "labels", "one for each image", got, fix))
        return images, labels

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the seed, by the callback's place among its kind: two may have the same settings."""
        if self._seed is not None:
            checkpoint.setdefault("batch_transforms_seeds", {})[self._index] = self._seed

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with the first run's seed."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._seed = checkpoint.get("batch_transforms_seeds", {}).get(self._index, self._seed)


def _owner_of_hook(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """Whose hook Lightning calls: the datamodule's, unless the module alone overrides it."""
    # The trainer's own attribute may be that of an earlier call.
    selector = trainer._data_connector._datahook_selector
    datamodule = None if selector is None else selector.datamodule
    if datamodule is None or (is_overridden(_HOOK, pl_module) and not is_overridden(_HOOK, datamodule)):
        return pl_module
    return datamodule


def _attach(callback: BatchTransforms, owner: Any) -> None:
    """Stand behind the owner's hook; several callbacks share one wrapper, so that it can be taken off in any order."""
    hook = vars(owner).get(_HOOK)
    if isinstance(hook, partial) and hook.func is _dispatch:
        hook.args[1].append(callback)
    else:
        setattr(owner, _HOOK, partial(_dispatch, getattr(owner, _HOOK), [callback], hook))


def _detach(callback: BatchTransforms, owner: Any) -> None:
    hook = vars(owner).get(_HOOK)
    if not (isinstance(hook, partial) and hook.func is _dispatch and callback in hook.args[1]):
        return
    hook.args[1].remove(callback)
    if not hook.args[1]:
        delattr(owner, _HOOK)
        if hook.args[2] is not None:
            setattr(owner, _HOOK, hook.args[2])


def _dispatch(
    original: Callable[[Any, int], Any], callbacks: list[BatchTransforms], before: Any, batch: Any, dataloader_idx: int
) -> Any:
    batch = original(batch, dataloader_idx)
    for callback in callbacks:
        batch = callback.transform_batch(batch)
    return batch
