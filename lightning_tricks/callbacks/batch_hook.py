"""The hook through which Lightning sends every batch that has reached its device, and who stands behind it."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

HOOK = "on_after_batch_transfer"


class TransformsBatch(Protocol):
    """Who stands behind the hook."""

    def transform_batch(self, batch: Any) -> Any:
        """What becomes of a batch."""
        ...


def owner_of_hook(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """Whose hook Lightning calls: the datamodule's, unless the module alone overrides it.

    Args:
        trainer: with its data.
        pl_module: its module.
    """
    # The trainer's own attribute may be that of an earlier call.
    selector = trainer._data_connector._datahook_selector
    datamodule = None if selector is None else selector.datamodule
    if datamodule is None or (is_overridden(HOOK, pl_module) and not is_overridden(HOOK, datamodule)):
        return pl_module
    return datamodule


def attach(callback: TransformsBatch, owner: Any) -> None:
    """Stand behind the owner's hook; several callbacks share one wrapper, so that it can be taken off in any order.

    Args:
        callback: whose `transform_batch` gets what the hook returns.
        owner: whose hook it is.
    """
    hook = vars(owner).get(HOOK)
    if isinstance(hook, partial) and hook.func is _dispatch:
        hook.args[1].append(callback)
    else:
        setattr(owner, HOOK, partial(_dispatch, getattr(owner, HOOK), [callback], hook))


def detach(callback: TransformsBatch, owner: Any) -> None:
    """Take a callback off the owner's hook; the last one gives back what was there before.

    Args:
        callback: any; one that is not there changes nothing.
        owner: whose hook it is.
    """
    hook = vars(owner).get(HOOK)
    if not (isinstance(hook, partial) and hook.func is _dispatch and callback in hook.args[1]):
        return
    hook.args[1].remove(callback)
    if not hook.args[1]:
        delattr(owner, HOOK)
        if hook.args[2] is not None:
            setattr(owner, HOOK, hook.args[2])


def _dispatch(
    original: Callable[[Any, int], Any], callbacks: list[TransformsBatch], before: Any, batch: Any, dataloader_idx: int
) -> Any:
    batch = original(batch, dataloader_idx)
    for callback in callbacks:
        batch = callback.transform_batch(batch)
    return batch
