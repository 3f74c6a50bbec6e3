"""Batch-norm statistics of the training data, estimated anew in the middle of a run that does not notice."""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset, Sampler

from lightning_tricks.callbacks.batches import describe
from lightning_tricks.functional.batch_norm import Moments, merge, population_statistics, write_statistics_
from lightning_tricks.functional.checks import message
from lightning_tricks.rollback import Rollback

Forward = Callable[[pl.LightningModule, Any], Any]


def update_batch_norm(
    owner: str,
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    layers: Iterable[_BatchNorm],
    forward: Forward | None = None,
) -> None:
    """Go through the training data once more, and give batch-norm layers the statistics of all of it.

        running_mean, running_var = mean and unbiased variance of a layer's inputs over all batches of all ranks

    The same on every rank, to be called on all of them, in `fit` once its data are there. The run does not notice: the
    loader is copied, not its data, and every random generator and sampler is put back. Batches come as in validation:
    `BatchTransforms` leaves them alone. An exception leaves the module as it was.

    Args:
        owner: callback named in an error and beside the progress bar.
        trainer: the trainer, in `fit`.
        pl_module: the module, with the weights that the statistics are to be of.
        layers: some of its batch-norm layers; one without running statistics has nothing to estimate.
        forward: called with (module, batch); None calls the module with the batch, or with the first item of a
            sequence.
    Raises:
        TypeError: a batch whose images have to be told from the rest by `forward`, or a loader of training data that
            cannot be read a second time.
        ValueError: what `population_statistics` and `write_statistics_` refuse.
    """
    names = {module: name for name, module in pl_module.named_modules()}
    named = {names[layer]: layer for layer in layers if layer.running_mean is not None}
    if not named:
        return

    def run(batch: Any) -> None:
        with trainer.precision_plugin.val_step_context():
            pl_module(_first_item(owner, batch)) if forward is None else forward(pl_module, batch)

    with torch.inference_mode(False):
        with ExitStack() as undo:
            loader = _second_reading(owner, trainer)
            Rollback(undo).keep(loader, data=True)
            undo.callback(loader.reset)
            if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
                for one in loader.flattened:
                    _rewind(owner, one)
            undo.callback(setattr, trainer.state, "stage", trainer.state.stage)
            trainer.state.stage = RunningStage.VALIDATING
            moments = population_statistics(owner, pl_module, named, _batches(owner, trainer, loader), run)
        # The random generators are put back by now, and with them whatever else the data hold on to.
        write_statistics_(owner, named, _of_all_ranks(trainer, moments))


def _first_item(owner: str, batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if not isinstance(images, Tensor):
        condition = "a tensor, or a sequence that begins with one"
        fix = "Give forward=, a function of (module, batch) that runs the module"
        raise TypeError(message(owner, "batch", condition, describe(batch), fix))
    return images


def _second_reading(owner: str, trainer: pl.Trainer) -> CombinedLoader:
    """A copy of the trainer's loaders, while they may be in the middle of their own data."""
    live = trainer.fit_loop._combined_loader
    if live is None:
        fix = "Lightning loads them after the sanity check"
        raise ValueError(message(owner, "training data", "loaded", None, fix))
    loader = copy.copy(live)
    loader._iterator = None
    loader.flattened = [_fresh(owner, one) for one in live.flattened]
    return loader


def _fresh(owner: str, loader: Any) -> Any:
    """A shallow copy that can be iterated without moving the original on; a map-style dataset is shared."""
    if hasattr(type(loader), "__next__"):
        fix = "Let iter() of it begin a new iterator each time"
        got = f"a {type(loader).__name__}, which is its own iterator"
        raise TypeError(message(owner, "training data", "such as can be read twice at once", got, fix))
    loader = copy.copy(loader)
    if isinstance(loader, DataLoader):
        vars(loader).update(_iterator=None, persistent_workers=False)  # the live one's workers would begin again
    for name, part in _moving_parts(loader).items():
        vars(loader)[name] = _fresh(owner, part)
    return loader


def _rewind(owner: str, loader: Any) -> None:
    """What resumes in the middle of its data begins at the beginning once it has come to the end."""
    if not _resumes(loader):
        return
    if sized_len(loader) is None:
        fix = "Let it have a length, or validate at the end of an epoch only"
        got = f"a {type(loader).__name__} in the middle of them"
        raise TypeError(message(owner, "training data", "such as come to an end", got, fix))
    for _ in loader:
        pass


def _resumes(loader: Any) -> bool:
    own = hasattr(loader, "load_state_dict") and not isinstance(loader, DataLoader)
    return own or any(map(_resumes, _moving_parts(loader).values()))


def _moving_parts(loader: Any) -> dict[str, Any]:
    parts = getattr(loader, "__dict__", {})
    return {name: part for name, part in parts.items() if isinstance(part, (DataLoader, Sampler, IterableDataset))}


def _batches(owner: str, trainer: pl.Trainer, loader: CombinedLoader) -> Iterator[Any]:
    """An epoch's batches on their device, as Lightning brings them there."""
    limit = None if trainer.num_training_batches == float("inf") else int(trainer.num_training_batches)
    shown = trainer.progress_bar_callback
    hidden = shown is None or getattr(shown, "is_disabled", False) or not trainer.is_global_zero
    bar = Tqdm(
        total=limit, desc=f"{owner}: batch norm", leave=False, dynamic_ncols=True, disable=hidden, file=sys.stdout
    )
    with bar:
        for batch, _, index in islice(loader, limit):
            if batch is not None:  # Lightning skips it
                batch = trainer.precision_plugin.convert_input(batch)
                batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=index)
                yield trainer.strategy.batch_to_device(batch, dataloader_idx=index)
            bar.update()


def _of_all_ranks(trainer: pl.Trainer, moments: Mapping[str, Moments]) -> dict[str, Moments]:
    """Merge in the order of the ranks, with one collective call: ranks may have had unequal numbers of batches."""
    rows = [torch.cat([m.mean.new_tensor([m.count, m.batches]), m.mean, m.m2]) for m in moments.values()]
    ranks = [torch.cat(rows)]
    if trainer.world_size > 1:
        own, ranks = ranks[0], [torch.empty_like(ranks[0]) for _ in range(trainer.world_size)]
        dist.all_gather(ranks, own)  # the strategy's own calls what torch has deprecated
    blocks = torch.split(torch.stack(ranks), [len(row) for row in rows], dim=1)
    return {name: merge(*map(_unpack, block)) for name, block in zip(moments, blocks, strict=True)}


def _unpack(row: Tensor) -> Moments:
    count, batches = row[:2].long().tolist()
    mean, m2 = row[2:].chunk(2)
    return Moments(count, mean, m2, batches)
