"""The structures that batches come in: read an item, write one into a copy, describe the whole for an error."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def describe(batch: Any) -> str:
    """The structure of a batch in a line, for an error.

    Args:
        batch: anything.
    Returns:
        Types, keys and shapes.
    Example:
        >>> import torch
        >>> describe({"image": torch.zeros(2, 3), "id": [1, 2]})
        "{'image': Tensor(2, 3) float32, 'id': [int, int]}"
    """
    if isinstance(batch, Tensor):
        shape = ", ".join(map(str, batch.shape))
        return f"{type(batch).__name__}({shape}) {str(batch.dtype).removeprefix('torch.')}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, (list, tuple)):
        items = ", ".join(describe(value) for value in batch[:6]) + (", ..." if len(batch) > 6 else "")
        return f"[{items}]" if isinstance(batch, list) else f"({items})"
    return type(batch).__name__


def read_item(batch: Any, where: int | str) -> Any:
    """An item of a batch.

    Args:
        batch: a tuple, list, mapping, dataclass or plain object.
        where: its index, key or attribute.
    Returns:
        The item; None where there is none.
    """
    try:
        return _item(batch, where)
    except (KeyError, IndexError, TypeError, AttributeError):
        return None


def _item(batch: Any, where: int | str) -> Any:
    if isinstance(where, str) and not isinstance(batch, Mapping):
        return getattr(batch, where)
    return batch[where]


def write_item(batch: Any, where: int | str, value: Any) -> Any:
    """A shallow copy of a batch with one item changed.

    Args:
        batch: what `read_item` reads from, or a tensor, which is its own only item.
        where: index, key or attribute of the item.
        value: what it becomes.
    Returns:
        A batch of the same type; the argument is untouched.
    """
    if isinstance(batch, Tensor):
        return value
    if isinstance(batch, Mapping):
        copied = batch.copy() if hasattr(batch, "copy") else dict(batch)
        copied[where] = value
        return copied
    if dataclasses.is_dataclass(batch) and isinstance(where, str):
        return dataclasses.replace(batch, **{where: value})  # type: ignore[type-var]
    if hasattr(batch, "_replace"):
        return batch._replace(**{where if isinstance(where, str) else batch._fields[where]: value})
    if isinstance(where, str):
        copied = copy.copy(batch)
        setattr(copied, where, value)
        return copied
    items = list(batch)
    items[where] = value
    return items if isinstance(batch, list) else type(batch)(items)
