"""The hyperparameters in an optimizer's groups, and which optimizers a callback is about."""

import functools
import re
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from lightning_tricks.functional.checks import message

_INDEXED = re.compile(r"(\w+)\[(\d+)\]")


def chosen_optimizers(owner: str, trainer: pl.Trainer, index: int | None) -> dict[int, Optimizer]:
    """The optimizers of a run that a callback is about, by their place in `configure_optimizers`.

    Args:
        owner: callback named in an error.
        trainer: the trainer once the optimizers are made.
        index: one of the places, or None for all.
    Returns:
        One optimizer or all.
    Raises:
        ValueError: the module has no optimizer, or none of this index.
    """
    optimizers = dict(enumerate(trainer.optimizers))
    names = [type(optimizer).__name__ for optimizer in optimizers.values()]
    if not any(optimizer.param_groups for optimizer in optimizers.values()):
        fix = "Leave the callback out, or return one from configure_optimizers"
        raise ValueError(message(owner, "optimizers", "at least one", "none", fix))
    if index is None:
        return optimizers
    if index not in optimizers:
        fix = f"configure_optimizers returned {names}"
        raise ValueError(message(owner, "optimizer", f"an index below {len(optimizers)}", index, fix))
    return {index: optimizers[index]}


def read_value(group: dict[str, Any], name: str) -> Any:
    """A hyperparameter of a group.

    Args:
        group: a parameter group of an optimizer.
        name: its key, with an index where the value is a tuple: `"lr"`, `"betas[0]"`.
    Returns:
        The number or tensor; None if the group has no number of this name.
    Example:
        >>> read_value({"lr": 0.1, "betas": (0.9, 0.99)}, "betas[1]")
        0.99
    """
    key, index = _split(name)
    value = group.get(key)
    if index is not None:
        value = value[index] if isinstance(value, (tuple, list)) and index < len(value) else None
    return value if isinstance(value, (int, float, Tensor)) and not isinstance(value, bool) else None


def numbers_of(group: dict[str, Any]) -> list[str]:
    """Names of the numbers of a group, as `read_value` takes them.

    Args:
        group: a parameter group of an optimizer.
    Example:
        >>> numbers_of({"params": [], "lr": 0.1, "betas": (0.9, 0.99), "fused": None})
        ['lr', 'betas[0]', 'betas[1]']
    """
    places = {key: len(value) for key, value in group.items() if isinstance(value, (tuple, list)) and key != "params"}
    names = [name for key in group for name in [key, *(f"{key}[{place}]" for place in range(places.get(key, 0)))]]
    return [name for name in names if read_value(group, name) is not None and not name.startswith("initial_")]


def scale_groups(optimizer: Optimizer, name: str, factor: float) -> None:
    """Set a hyperparameter of every group to its base value times a factor.

    The base is what the group had when it was first scaled; it is kept in the group as `initial_` and the name, as
    torch keeps `initial_lr`, so that the optimizer's own state carries it through a resume. A tensor is filled in
    place: a captured graph keeps it.

    Args:
        optimizer: every group of it must have the hyperparameter.
        name: as in `read_value`.
        factor: of the base values.
    """
    key, index = _split(name)
    initial = f"initial_{name}"
    for group in optimizer.param_groups:
        value = group[key] if index is None else group[key][index]
        base = group.get(initial)
        if base is None:
            base = group[initial] = value.clone() if isinstance(value, Tensor) else value
        if isinstance(value, Tensor):
            value.fill_(base * factor)
        elif index is None:
            group[key] = base * factor
        else:
            group[key] = type(group[key])([*group[key][:index], base * factor, *group[key][index + 1 :]])


def label_groups(
    trainer: pl.Trainer, chosen: dict[int, Optimizer], name: str, kinds: bool = True
) -> list[tuple[str, dict[str, Any]]]:
    """The groups of optimizers with their names in a log, formed as LearningRateMonitor forms them.

    Args:
        trainer: the trainer once the optimizers are made.
        chosen: some of its optimizers by their place.
        name: of the value.
        kinds: whether the optimizer's class is in the names.
    Returns:
        Pairs of a name, such as `"lr-SGD"`, `"lr-SGD-1/pg2"`, and its group.
    """
    labelled = []
    for place, optimizer in chosen.items():
        kind = type(optimizer)
        before = sum(type(other) is kind for other in trainer.optimizers[:place])
        label = name + (f"-{kind.__name__}" + (f"-{before}" if before else "") if kinds else "")
        own = [group.get("name") for group in optimizer.param_groups]
        for number, (group, given) in enumerate(zip(optimizer.param_groups, own, strict=True), start=1):
            if given is not None and own.count(given) == 1:
                labelled.append((f"{label}/{given}", group))
            else:
                labelled.append((f"{label}/pg{number}" if len(own) > 1 else label, group))
    return labelled


@functools.cache
def _split(name: str) -> tuple[str, int | None]:
    match = _INDEXED.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, None)
