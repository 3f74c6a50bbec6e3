"""The structures that batches come in: read an item, write one into a copy, describe the whole for an error."""

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias, TypeGuard

from torch import Tensor

from lightning_tricks.functional.checks import message

Place: TypeAlias = int | str | tuple[int | str, ...] | tuple[Callable[..., Any], Callable[..., Any]]
"""Where something is in a batch: an index; a key or attribute; a path of these, as a tuple or with dots, as in
`"inputs.image"`; or two functions, `get(batch) -> tensor` and `put(batch, tensor) -> new batch`."""

_DEPTH, _ITEMS = 4, 6
_NOTHING = object()


def describe(batch: Any, depth: int = _DEPTH) -> str:
    """The structure of a batch in a line, for an error.

    Args:
        batch: anything.
        depth: containers inside one another that are looked into.
    Returns:
        Types, keys, attributes and shapes.
    Example:
        >>> import torch
        >>> describe({"image": torch.zeros(2, 3), "id": [1, 2]})
        "{'image': Tensor(2, 3) float32, 'id': [int, int]}"
    """
    if isinstance(batch, Tensor):
        shape = ", ".join(map(str, batch.shape))
        return f"{type(batch).__name__}({shape}) {str(batch.dtype).removeprefix('torch.')}"
    name = type(batch).__name__
    if isinstance(batch, Mapping):
        return _listed("{", [(f"{key!r}: ", value) for key, value in batch.items()], "}", depth)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return _listed(f"{name}(", [(f"{key}=", getattr(batch, key)) for key in batch._fields], ")", depth)
    if isinstance(batch, (list, tuple)):
        begin, end = "[]" if isinstance(batch, list) else "()"
        return _listed(begin, [("", value) for value in batch], end, depth)
    values = getattr(batch, "__dict__", {})
    names = [*values, *(slot for slot in getattr(batch, "__slots__", ()) if hasattr(batch, slot))]
    if isinstance(batch, type) or not names:
        return name
    return _listed(f"{name}(", [(f"{key}=", getattr(batch, key)) for key in names], ")", depth)


def _listed(begin: str, items: Sequence[tuple[str, Any]], end: str, depth: int) -> str:
    if depth == 0 and items:
        return f"{begin}...{end}"
    parts = [label + describe(value, depth - 1) for label, value in items[:_ITEMS]]
    return begin + ", ".join([*parts, *["..."] * (len(items) > _ITEMS)]) + end


def check_place(owner: str, name: str, place: Any) -> None:
    """Raise unless the value says where something is in a batch.

    Args:
        owner: class named in the error.
        name: argument named in the error.
        place: what came.
    Raises:
        TypeError: no `Place`.
    """
    if _is_pair(place) and callable(place[1]):
        return
    keys = place if isinstance(place, tuple) and place else (place,)
    if any(isinstance(key, bool) or not isinstance(key, (int, str)) for key in keys):
        fix = "Say where they are in a batch, as 0, 'image', 'inputs.image', or two functions (get, put)"
        raise TypeError(message(owner, name, "an index or a key, or a path of them", place, fix))


def name_place(place: Place) -> int | str:
    """A place as plain text or a number, the same in every process.

    Args:
        place: any.
    Example:
        >>> name_place(("inputs", 0, "image"))
        'inputs.0.image'
    """
    if not isinstance(place, tuple):
        return place
    return ".".join(str(key) if isinstance(key, (int, str)) else getattr(key, "__qualname__", "?") for key in place)


def read_place(batch: Any, place: Place) -> Any:
    """What is at a place of a batch.

    Args:
        batch: tuples, lists, mappings, dataclasses and plain objects, in one another.
        place: where.
    Returns:
        The item; None where there is none.
    """
    if _is_pair(place):
        return place[0](batch)
    for key in _path(batch, place):
        batch = read_item(batch, key)
    return batch


def is_none_at(batch: Any, place: Place) -> bool:
    """Whether a batch says None at a place or on the way to it, as CombinedLoader does for a loader that has run out.

    Args:
        batch: what `read_place` reads from.
        place: where; of functions it is never known.
    Example:
        >>> batch = {"labelled": None, "other": 1}
        >>> is_none_at(batch, "labelled.0"), is_none_at(batch, "other.0"), is_none_at(batch, "mistyped.0")
        (True, False, False)
    """
    if _is_pair(place):
        return False
    for key in _path(batch, place):
        batch = read_item(batch, key, _NOTHING)
        if batch is None:
            return True
    return False


def write_place(batch: Any, place: Place, value: Any) -> Any:
    """A copy of a batch with another value at a place; what is beside the way to it is shared.

    Args:
        batch: what `read_place` reads from.
        place: where.
        value: what it becomes.
    Returns:
        A batch of the same structure; the argument is untouched.
    Raises:
        TypeError: a function that puts it there and returns nothing.
    """
    if _is_pair(place):
        new = place[1](batch, value)
        if new is None:
            fix = "Return the new batch, as dataclasses.replace(batch, image=value) does"
            raise TypeError(message("BatchTransforms", "put", "a function that returns a batch", None, fix))
        return new
    key, *rest = _path(batch, place)
    return write_item(batch, key, write_place(read_item(batch, key), tuple(rest), value) if rest else value)


def _is_pair(place: Any) -> TypeGuard[tuple[Callable[..., Any], Callable[..., Any]]]:
    """Whether a place is two functions."""
    return isinstance(place, tuple) and len(place) == 2 and callable(place[0])


def _path(batch: Any, place: Place) -> tuple[Any, ...]:
    """The keys one after another; a string is split at its dots where the batch has nothing of the whole name."""
    if isinstance(place, tuple):
        return place
    if isinstance(place, str) and "." in place and read_item(batch, place) is None:
        return tuple(place.split("."))
    return (place,)


def read_item(batch: Any, where: int | str, default: Any = None) -> Any:
    """An item of a batch.

    Args:
        batch: a tuple, list, mapping, dataclass or plain object.
        where: its index, key or attribute; an index may be written as a string.
        default: what to return where there is none.
    Returns:
        The item, or `default`.
    """
    if isinstance(batch, Tensor):  # its rows are samples
        return default
    where = _key(batch, where)
    if isinstance(batch, Mapping):
        return batch.get(where, default)  # a defaultdict would make what it has not
    try:
        return getattr(batch, where) if isinstance(where, str) else batch[where]
    except (KeyError, IndexError, TypeError, AttributeError):
        return default


def _key(batch: Any, where: int | str) -> int | str:
    number = isinstance(where, str) and where.removeprefix("-").isdecimal()
    return int(where) if number and not (isinstance(batch, Mapping) and where in batch) else where


def write_item(batch: Any, where: int | str, value: Any) -> Any:
    """A shallow copy of a batch with one item changed.

    Args:
        batch: what `read_item` reads from.
        where: index, key or attribute of the item.
        value: what it becomes.
    Returns:
        A batch of the same type; the argument is untouched.
    """
    where = _key(batch, where)
    if isinstance(batch, Mapping):
        copied = copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
        copied[where] = value
        return copied
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return batch._replace(**{where if isinstance(where, str) else batch._fields[where]: value})
    if isinstance(where, str):
        copied = copy.copy(batch)
        try:
            setattr(copied, where, value)
        except AttributeError:  # a frozen dataclass
            object.__setattr__(copied, where, value)
        return copied
    items = list(batch)
    items[where] = value
    return items if isinstance(batch, list) else type(batch)(items)
