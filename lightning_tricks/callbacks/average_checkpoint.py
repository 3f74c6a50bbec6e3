"""Where averages are in a checkpoint: laid out as Lightning's own averaging does, with what that has no place for."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read_folder
from torch.distributed.tensor import DTensor

from lightning_tricks.callbacks.averages import Averages
from lightning_tricks.functional.checks import message

RAW = "current_model_state"
"""The raw weights, where `state_dict` has an average; Lightning's key."""
EXTRA = "averages"
"""Averages by label and name, as far as `state_dict` does not have them exactly."""
BESIDE = "averages_beside"
"""Where a distributed checkpoint has both of these."""
NAMES = "average_names"
"""Labels of all averages; the first is the one that is evaluated."""


Read = Callable[[pl.Trainer], dict[str, Any]]
"""Reads the state dict of a trainer's module."""


def read_module(trainer: pl.Trainer) -> dict[str, Any]:
    """The state dict as Lightning puts it into a checkpoint.

    Args:
        trainer: with the module.
    """
    return trainer.strategy.lightning_module_state_dict()


def both_state_dicts(
    averages: Averages, trainer: pl.Trainer, here: dict[str, Any], read: Read = read_module
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dict of the first average and of the raw weights; one of them is `here`.

    The module writes both, so that its own state-dict hooks apply to both.

    Args:
        averages: begun.
        trainer: with the module.
        here: the state dict of the weights that the module holds now.
        read: what has read it.
    """
    index, shown = averages.shown, averages.raw is not None
    averages.hide() if shown else averages.show()
    try:
        other = read(trainer)
        if averages.copies:  # the module's own storages, which get other values now
            other = {name: value.clone() if isinstance(value, Tensor) else value for name, value in other.items()}
    finally:
        averages.show(index) if shown else averages.hide()
    return (here, other) if shown else (other, here)


def save(
    averages: Averages,
    labels: list[str],
    updates: int,
    trainer: pl.Trainer,
    checkpoint: dict[str, Any],
    evaluated: bool,
) -> None:
    """Write averages into a checkpoint.

    Args:
        averages: begun.
        labels: of each.
        updates: of them.
        trainer: that writes the checkpoint, on all ranks.
        checkpoint: with the state dict of what the module holds; changed.
        evaluated: whether `state_dict` is to be the first average, else it is the raw weights.
    """
    here = checkpoint["state_dict"]
    sharded = any(isinstance(value, DTensor) for value in here.values())
    if sharded:  # of what is whole on each rank, any rank's is written
        averages.agree_on_buffers(trainer)
    exact = not evaluated or averages.dtype is not None  # a state dict has the module's dtypes
    read = averages.values if sharded else averages.whole
    extra = {label: read(index) for index, label in enumerate(labels) if index or exact}
    raw: dict[str, Any] = {}
    if evaluated:
        checkpoint["state_dict"], raw[RAW] = both_state_dicts(averages, trainer, here)
    if extra:
        raw[EXTRA] = extra
    checkpoint["averaging_state"] = {"n_averaged": torch.tensor(updates)}
    checkpoint[NAMES] = labels
    checkpoint["unaveraged_weights"] = averages.unaveraged
    if sharded:  # of a distributed checkpoint only these parts are written by every rank
        place = f"optimizer_{len(checkpoint['optimizer_states'])}"
        checkpoint[BESIDE] = {"place": place, RAW: evaluated, EXTRA: list(extra)}
        checkpoint["optimizer_states"].append(raw)
    elif trainer.is_global_zero or not isinstance(trainer.strategy, ModelParallelStrategy):
        checkpoint.update(raw)


def load(
    averages: Averages, labels: list[str], trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
) -> int:
    """Take averages and raw weights from a checkpoint whose `state_dict` the module holds.

    Args:
        averages: of the module.
        labels: of each average.
        trainer: that resumes.
        module: the module.
        checkpoint: as it was saved; a distributed one without what it has on disk.
    Returns:
        The updates that are in the averages; 0 where the checkpoint has none.
    Raises:
        ValueError: another number of averages.
    """
    saved = checkpoint.get(NAMES, [labels[0]])
    if BESIDE not in checkpoint and RAW not in checkpoint and EXTRA not in checkpoint:
        return 0
    if len(saved) != len(labels):
        fix = "Resume with the decays of that run"
        raise ValueError(message(averages.owner, "decay", f"as in the checkpoint: {', '.join(saved)}", labels, fix))
    averages.find(module)
    averages.begin(len(labels), checkpoint.get("unaveraged_weights"))
    others = iter([label for label in saved if label not in labels])
    sources = [label if label in saved else next(others) for label in labels]
    if sources != labels:  # another decay: the average goes on under it
        rank_zero_info(f"{averages.owner}: the checkpoint's averages {sources} go on as {labels}.")
    if BESIDE in checkpoint:
        checkpoint = {**checkpoint, **_read_beside(averages, trainer, module, checkpoint[BESIDE])}
    for index, label in enumerate(sources):
        if label in checkpoint.get(EXTRA, {}):
            averages.fill(index, checkpoint[EXTRA][label])
    if RAW in checkpoint:
        _load_raw(trainer, module, checkpoint)
    return int(checkpoint["averaging_state"]["n_averaged"])


def _load_raw(trainer: pl.Trainer, module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    raw = {**{key: value for key, value in checkpoint.items() if key != RAW}, "state_dict": checkpoint[RAW]}
    if isinstance(trainer.strategy, ModelParallelStrategy):
        whole = not any(isinstance(value, DTensor) for value in raw["state_dict"].values())
        options = StateDictOptions(full_state_dict=whole, strict=module.strict_loading)
        set_model_state_dict(module, dict(raw["state_dict"]), options=options)
        return
    trainer.strategy.load_model_state_dict(raw, strict=module.strict_loading)


def migrate_both(module: pl.LightningModule) -> Callable[[], None]:
    """Let the module's `on_load_checkpoint` do to the raw weights what it does to the average.

    It is called again only where it changed the state dict, with a checkpoint as it was before.

    Args:
        module: before it is restored.
    Returns:
        What ends it.
    """
    if not is_overridden("on_load_checkpoint", module):
        return lambda: None
    return replace_hook(module, "on_load_checkpoint", partial(_migrate, module.on_load_checkpoint))


def _migrate(original: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any]) -> None:
    before = dict(checkpoint)
    state = dict(checkpoint.get("state_dict", {}))
    versions = {name: value._version for name, value in state.items() if isinstance(value, Tensor)}
    original(checkpoint)
    after = checkpoint.get("state_dict", {})
    same = after.keys() == state.keys() and all(after[name] is state[name] for name in state)
    if RAW in before and not (same and all(after[name]._version == version for name, version in versions.items())):
        raw = before[RAW]
        again = {**{key: value for key, value in before.items() if key != RAW}, "state_dict": dict(raw)}
        original(again)
        checkpoint[RAW] = again["state_dict"]


def replace_hook(module: pl.LightningModule, name: str, hook: Callable[..., Any]) -> Callable[[], None]:
    """Put a hook over a module's own, as an attribute of this one object.

    Args:
        module: whose.
        name: of the hook.
        hook: what is called instead.
    Returns:
        What puts the old one back.
    """
    mine = vars(module).get(name)
    setattr(module, name, hook)

    def undo() -> None:
        if mine is not None:
            setattr(module, name, mine)
        else:
            vars(module).pop(name, None)

    return undo


def _read_beside(
    averages: Averages, trainer: pl.Trainer, module: pl.LightningModule, beside: Mapping[str, Any]
) -> dict[str, Any]:
    """What a distributed checkpoint has on disk beside the optimizers' states."""
    parts: dict[str, Any] = {}
    if beside[RAW]:
        state: dict[str, Any] = get_model_state_dict(module)
        parts[RAW] = {name: value.clone() for name, value in state.items()}
    if beside[EXTRA]:
        parts[EXTRA] = {
            label: {name: value.clone() for name, value in averages.values(0).items()} for label in beside[EXTRA]
        }
    read_folder({beside["place"]: parts}, checkpoint_id=trainer.strategy.broadcast(trainer.ckpt_path))
    return parts
