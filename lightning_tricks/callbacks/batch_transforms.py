"""Transforms of whole batches, on the batch's device, for an unchanged module."""

import hashlib
import inspect
import os
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Generator, Tensor
from torch.optim import Optimizer

from lightning_tricks.callbacks.batch_dose import Dose
from lightning_tricks.callbacks.batch_hook import HOOK, attach, detach, owner_of_hook
from lightning_tricks.callbacks.batch_layout import Items, Layout
from lightning_tricks.callbacks.batches import Place
from lightning_tricks.callbacks.steps import name_in, state_without_module
from lightning_tricks.functional.checks import check_count, message
from lightning_tricks.functional.pictures import picture_grid, png
from lightning_tricks.functional.schedules import Duration, Schedule
from lightning_tricks.labels import WAYS_OUT, MixedLabels, soft_targets
from lightning_tricks.loggers import log_picture, log_settings
from lightning_tricks.transforms import Transform
from lightning_tricks.transforms.choice import apply_chain, check_transforms, in_every_stage

OWNER = "BatchTransforms"
SEEDS, STATES = "batch_transforms_seeds", "batch_transforms_states"
"""Where a checkpoint has what a callback saves, by its place among its kind: two may have the same settings."""

_EVALUATION = {"fit": "validation_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}


class BatchTransforms(Callback):
    """Transform each training batch, after it has reached its device and before `training_step` sees it.

        images, labels = transform(images, labels, generator)     for each transform, in order

    Nothing happens in validation, the sanity check, `test` or `predict`, but for transforms that say they are for every
    stage (`Normalize`). The batch that the loader gave is left as it is, and so is every other item of it: a loss of
    further labels would see mixed images and unmixed labels. Integer labels become `MixedLabels` where a transform
    mixes or smooths them: the module's own cross-entropy computes the right loss of them, and its metrics see the
    dominant label of each sample.

    A batch's draws are a function of (seed, rank, epoch, batch index): every rank and epoch differs, a resumed run
    draws what the run it continues would have drawn, and torch's global generator is untouched. Ranks that share their
    batches (tensor parallelism) draw alike.

    A place in a batch is an index, a key or attribute, a path of these (`"inputs.image"`, where the batch has no key of
    that whole name, or a tuple `("inputs", 0)`), or two functions: `get(batch) -> tensor` and `put(batch, tensor)`,
    which returns a new batch. A list has several places.

    Args:
        transforms: callables `(images, labels, generator=None, inplace=False) -> (images, labels)`, as `Mixup(0.2)`.
        images: place of the images (N, C, H, W), or several places of a height and width, whose images of a sample
            are transformed by the same draw.
        labels: place of the labels (N, ...); None leaves the batch's labels alone, for transforms of images.
        seed: any int of at least 0; None takes that of `seed_everything`, else a random one that all ranks share. A
            resumed run goes on with the first run's seed.
        targets: "mixed" for `MixedLabels`; "soft" for dense (N, K) probabilities, for a loss that knows no MixedLabels.
        num_classes: number of classes K, for targets="soft".
        masks: place or places of masks (N, H, W) or (N, K, H, W) beside the labels, which go with the images by the
            same draw. Each is the labels to the transforms, LabelSmoothing too: give that to a BatchTransforms of its
            own. `targets` is not about them.
        prob: probability that an image is transformed, drawn once for all transforms; or a schedule of it, (step,
            total_steps) -> number in [0, 1], as `Linear(0, 1)`. Only then the images keep their size and dtype. Those
            drawn are mixed among themselves: one that is drawn alone stays unmixed, as `RandomApply` says.
        strength: what every transform that has a strength is `scaled` by, at least 0; or a schedule of it. At 0 these
            are left out; flips, crops and the like have none, and are applied as they are.
        start: stretch of the run that is left out at the beginning: `int` = optimizer steps, `float` in (0, 1) =
            fraction of the run, `"3ep"` = epochs.
        stop: where the transforms end, in the same units from the run's beginning: with 0.9 the last tenth of the run
            is trained without them. None for never.
        total_steps: length of the run (optimizer steps) for schedules, `start` and `stop`; None takes it from the run.
            With several optimizers the first one's steps count.
        log_pictures: how many images of the first batch of a run that was changed are shown before and after, in the
            loggers that take pictures, else as PNG files in the run's folder; of several places the first one's.
    Raises:
        TypeError: no transforms, a `training_step` that takes a `dataloader_iter`, or a batch without images and labels
            where they should be.
        ValueError: an argument out of range or of no effect, labels that are not as many as the images, images or masks
            of several sizes, a schedule that leaves [0, 1], or a run of unknown length.
        RuntimeError: in a step with a loss, mixed labels that no loss used which knows them, or a batch that went past
            the transforms. (Of several losses, one that knows them is enough.)
    Example:
        >>> import lightning as L
        >>> from lightning_tricks import BatchTransforms, Cutout, LabelSmoothing, Mixup
        >>> tricks = BatchTransforms([Cutout(8), Mixup(0.2), LabelSmoothing(0.1)], stop=0.9)
        >>> trainer = L.Trainer(callbacks=[tricks], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        transforms: list[Transform],
        images: list[Place] | Place = 0,
        labels: Place | None = 1,
        seed: int | None = None,
        targets: Literal["mixed", "soft"] = "mixed",
        num_classes: int | None = None,
        *,
        masks: list[Place] | Place | None = None,
        prob: float | Schedule = 1.0,
        strength: float | Schedule = 1.0,
        start: Duration = 0,
        stop: Duration | None = None,
        total_steps: int | None = None,
        log_pictures: int = 0,
    ) -> None:
        self.transforms = check_transforms(OWNER, transforms)
        self._layout = Layout(OWNER, images, labels, masks)
        self._dose = Dose(OWNER, self.transforms, prob, strength, start, stop, total_steps)
        if seed is not None:
            check_count(OWNER, "seed", seed, 0, "seed", "None takes that of seed_everything")
        if targets not in ("mixed", "soft"):
            fix = "'soft' is for a loss that knows no MixedLabels"
            raise ValueError(message(OWNER, "targets", "'mixed' or 'soft'", targets, fix))
        if targets == "soft" and num_classes is None:
            fix = "Dense targets have a column for each class"
            raise ValueError(message(OWNER, "num_classes", "given with targets='soft'", num_classes, fix))
        if targets == "soft" and labels is None:
            fix = "Dense targets are made of labels: say where they are"
            raise ValueError(message(OWNER, "labels", "given with targets='soft'", labels, fix))
        if num_classes is not None:
            check_count(OWNER, "num_classes", num_classes, 1, "classes", "Give what the logits have")
            if targets == "mixed":
                fix = "It is for targets='soft'; mixed labels take it from the logits"
                raise ValueError(message(OWNER, "num_classes", "None with targets='mixed'", num_classes, fix))
        check_count(OWNER, "log_pictures", log_pictures, 0, "images", "0 shows none")
        self.images, self.labels, self.masks = images, labels, masks
        self.seed, self.targets, self.num_classes = seed, targets, num_classes
        self.prob, self.strength, self.start, self.stop = prob, strength, start, stop
        self.total_steps, self.log_pictures = total_steps, log_pictures
        self._always = [transform for transform in self.transforms if in_every_stage(transform)]
        self._seed = seed  # the one in force
        self._entropy: int | None = None
        self._index = 0
        self._pictured = False
        self._folder: str | None = None  # where pictures go, while they are to be shown
        self._trainer: pl.Trainer | None = None
        self._owner: Any = None
        self._mixed: list[MixedLabels] = []
        self._waiting = self._transformed = self._had_loss = self._evaluating = False

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's configuration shows: of the later arguments those that are not as usual."""
        places = self._layout.settings
        return {
            "transforms": [repr(transform) for transform in self.transforms],
            "seed": self._seed,
            "images": places["images"],
            "labels": places["labels"],
            "targets": self.targets,
            "num_classes": self.num_classes,
            **{name: place for name, place in places.items() if name == "masks"},
            **self._dose.settings,
            **({"log_pictures": self.log_pictures} if self.log_pictures else {}),
        }

    # ------------------------------------------------------------------ when

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the seed, and refuse a module whose batches cannot be reached."""
        steps = ["training_step"] * (stage == "fit") + [_EVALUATION[stage]] * bool(self._always)
        for step in steps:
            if "dataloader_iter" in inspect.signature(getattr(pl_module, step)).parameters:
                fix = "Let it take a batch"
                got = f"{step}(dataloader_iter)"
                raise TypeError(message(OWNER, step, "one that Lightning hands batches to", got, fix))
        if stage != "fit":
            if self._always:
                self._stand(trainer, pl_module)
            return
        self._index = [other for other in trainer.callbacks if isinstance(other, BatchTransforms)].index(self)
        if self._seed is None or trainer.global_step == 0:  # a further fit of a run has the run's
            given = os.environ.get("PL_GLOBAL_SEED")
            self._seed = int(given) if self.seed is None and given else self.seed
        if self._seed is None:
            if self._entropy is None:
                self._entropy = trainer.strategy.broadcast(int.from_bytes(os.urandom(4), "little"))
            self._seed = self._entropy
        if trainer.global_step == 0:
            self._pictured = False
            self._dose.forget()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stand behind the hook through which every batch comes."""
        self._waiting = True
        self._stand(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the length from the run, and show the settings."""
        self._dose.begin(trainer)
        if self.log_pictures and not (self._pictured or trainer.fast_dev_run):
            self._folder = trainer.log_dir or trainer.default_root_dir  # asked for on all ranks
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
        mixed, self._mixed = self._mixed, []
        transformed, self._transformed, self._waiting = self._transformed, False, True
        if not transformed:
            got = "a batch that went past it"
            fix = f"Let other callbacks leave {HOOK} of {type(self._owner).__name__} alone"
            raise RuntimeError(message(OWNER, "hook", "the one that Lightning calls", got, fix))
        if self._had_loss and not all(labels.used for labels in mixed):
            condition = "used by a loss that knows mixed labels, in every step that has a loss"
            got = f"a training_step of {type(pl_module).__name__} whose loss did not use them"
            raise RuntimeError(message(OWNER, "labels", condition, got, WAYS_OUT))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the epoch with what was assumed of it."""
        self._dose.end_epoch(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop counting; what still comes is not trained on."""
        self._waiting = False
        self._dose.end(trainer)

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """What the step itself moves to the device is the module's own affair."""
        self._evaluating = True

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """The next batch that comes is one of the loader's."""
        self._evaluating = False

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the hook back, after every other callback has ended its training."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the hook back."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the hook back."""
        self._release()

    def _stand(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trainer, self._owner, self._evaluating = trainer, owner_of_hook(trainer, pl_module), False
        attach(self, self._owner)

    def _release(self) -> None:
        if self._owner is not None:
            detach(self, self._owner)
        self._dose.release()
        self._trainer = self._owner = self._folder = None
        self._mixed = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the module in the middle of a run carries a copy of this along: without a trainer it does nothing.
        return state_without_module(self, _trainer=None, _owner=None, _mixed=[])

    # ------------------------------------------------------------------ what

    def transform_batch(self, batch: Any) -> Any:
        """Apply the transforms to a batch of the loader; the argument is left as it is.

        Args:
            batch: what the loader gave, on its device.
        Returns:
            A batch of the same structure.
        """
        trainer = self._trainer
        if trainer is None:
            return batch
        if trainer.training:
            return self._train(batch, trainer) if self._waiting else batch
        if not self._always or self._evaluating or batch is None or self._layout.is_empty(batch):
            return batch
        images = self._layout.read_images(batch)
        new = [apply_chain(OWNER, self._always, image, None, Generator())[0] for image in images]
        return self._layout.write(batch, Items(new, None, []))

    def _train(self, batch: Any, trainer: pl.Trainer) -> Any:
        self._transformed, self._had_loss, self._mixed = True, False, []
        # Lightning skips a batch of None; of several loaders one that has run out gives None.
        if batch is None or self._layout.is_empty(batch):
            return batch
        given = self._layout.read(batch)
        transforms, prob, seed = self._dose.transforms, self._dose.prob, self._draw_seed(trainer)

        def run(images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
            # The same generator again is the same draw: what is drawn depends neither on channels nor on labels.
            return apply_chain(OWNER, transforms, images, labels, Generator().manual_seed(seed), prob)

        first, labels = run(given.images[0], given.labels)
        others = [run(images, given.labels)[0] for images in given.images[1:]]
        moved = [run(given.images[0][:, :0], mask)[1] for mask in given.masks]
        masks = [mask if new is None else new for mask, new in zip(given.masks, moved, strict=True)]
        if labels is not None and self.targets == "soft":
            assert self.num_classes is not None
            labels = soft_targets(labels, self.num_classes)
        self._mixed = [each for each in (labels, *masks) if isinstance(each, MixedLabels)]
        if self._folder is not None and prob > 0:
            self._show(trainer, given.images[0], first)
        return self._layout.write(batch, Items([first, *others], labels, masks))

    def _draw_seed(self, trainer: pl.Trainer) -> int:
        batch_idx = trainer.fit_loop.batch_idx + 1  # of the batch that is on its way
        # By which the loader's batches are dealt: ranks that share a batch have it in common.
        rank = (trainer.distributed_sampler_kwargs or {}).get("rank", trainer.global_rank)
        place = (self._seed, rank, trainer.current_epoch, batch_idx, self._index)
        return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=8).digest(), "little")

    def _show(self, trainer: pl.Trainer, before: Tensor, after: Tensor) -> None:
        """Show the first batch that was changed: at the beginning of a rise nothing may be."""
        if after is before or (after.shape == before.shape and torch.equal(after, before)):
            return
        folder, self._folder, self._pictured = self._folder, None, True
        assert folder is not None
        number = f"-{self._index + 1}" if self._index else ""
        for name, images in (("before", before), ("after", after)) if trainer.is_global_zero else ():
            picture = picture_grid(images[: self.log_pictures])
            log_picture(trainer, f"batch_transforms{number}/{name}", picture, png(picture), folder)

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the seed, and how far schedules have come."""
        name_in(checkpoint, self)
        if self._seed is not None:
            checkpoint.setdefault(SEEDS, {})[self._index] = self._seed
        states = self._dose.states
        if states or self.log_pictures:
            checkpoint.setdefault(STATES, {})[self._index] = {**states, "pictured": self._pictured}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with the first run's seed and schedules."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._seed = checkpoint.get(SEEDS, {}).get(self._index, self._seed)
            states = dict(checkpoint.get(STATES, {}).get(self._index, {}))
            self._pictured = states.pop("pictured", True)
            self._dose.load(states)
