"""What a function or an object is, as a short text that is the same in every process."""

import dis
import enum
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

LIBRARIES = {"builtins", "copyreg", "lightning", "lightning_tricks", "numpy", "pytorch_lightning", "torch"}
"""What they define is described by its name: another version of a library is not another training."""
PLAIN = (bool, int, float, complex, str, type(None), type(...), enum.Enum)


def fingerprint(item: Any) -> str:
    """Shorten what an object is made of.

    Of a function: its source, defaults and closure; not the functions it calls (`called` tells them) and the global
    names it reads. Of other objects: the source of their class, and all that pickle would keep of them.

    Args:
        item: anything.
    Returns:
        16 hexadecimal digits.
    Raises:
        TypeError: it holds what cannot be compared with a later one, such as an open file or a lock.
    Example:
        >>> fingerprint([1, 2]) == fingerprint([1, 2]), fingerprint([1, 2]) == fingerprint([1, 3])
        (True, False)
    """
    return _digest(json.dumps(_described(item, ())).encode())


def called(item: Any) -> list[Any]:
    """What a function calls by a global name, as far as that is defined in its own file, and what that calls.

    Args:
        item: a function, or what holds it: a method, a partial, a closure, an object that can be called.
    Returns:
        Classes, and the code of functions and of the classes' methods.
    """
    found: dict[Any, None] = {}
    todo = [item]
    while todo:
        item = todo.pop()
        if isinstance(item, partial):
            todo.append(item.func)
        elif isinstance(item, MethodType):
            todo += [item.__func__, item.__self__]
        elif isinstance(item, type):
            if item not in found and not _is_library(item):
                found[item] = None
                todo += [base for base in item.__bases__ if base.__module__ == item.__module__]
                todo += [member for _, member in _members(item)]
        elif not isinstance(item, FunctionType):
            todo.append(getattr(item, "__wrapped__", type(item)))
        elif item.__code__ not in found and not _is_library(item):
            found[item.__code__] = None
            cells = [cell.cell_contents for cell in item.__closure__ or () if cell != CellType()]
            others = [*cells, *(item.__globals__.get(name) for name in _globals(item.__code__))]
            todo += [other for other in others if callable(other) and _module(other) == _module(item)]
    return list(found)


def _module(item: Any) -> str | None:
    return getattr(item, "__module__", None)


def _globals(code: CodeType) -> Iterator[str]:
    """The global names that it and the functions inside of it read."""
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals(inner)


def _is_library(item: Any) -> bool:
    """Whether a class or function is one of a library, and found there."""
    found: Any = sys.modules.get(str(item.__module__))
    for name in item.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is item and item.__module__.split(".")[0] in LIBRARIES


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _described(item: Any, outer: tuple[int, ...]) -> Any:
    """Lists and texts; `outer` are the ids of what holds it, for objects that hold themselves."""
    if id(item) in outer:
        return ["again", outer.index(id(item))]
    outer = (*outer, id(item))

    def parts(items: Any) -> list[Any]:
        return [_described(part, outer) for part in items]

    kind = f"{type(item).__module__}.{type(item).__qualname__}"
    if isinstance(item, bytes):
        return [kind, _digest(item)]
    if isinstance(item, PLAIN):
        return [kind, repr(item)]
    if isinstance(item, ModuleType):
        return [kind, item.__name__]
    if isinstance(item, type):
        return [kind, item.__module__, item.__qualname__, *parts(_sources(item))]
    if isinstance(item, FunctionType) and _is_library(item):
        return [kind, item.__module__, item.__qualname__]
    if isinstance(item, FunctionType):
        cells = [cell.cell_contents for cell in item.__closure__ or () if cell != CellType()]  # an empty one holds none
        held = (item.__defaults__, item.__kwdefaults__, cells, vars(item))
        return [kind, item.__module__, item.__qualname__, *parts((item.__code__, *held))]
    if isinstance(item, CodeType):
        return [kind, _source(item), item.co_code.hex(), *parts((item.co_names, item.co_consts))]
    if isinstance(item, Tensor):
        return [kind, str(item.dtype), list(item.shape), item.requires_grad, _numbers(item)]
    if type(item) in (tuple, list):
        return [kind, *parts(item)]
    if type(item) is dict:
        return [kind, *parts(item.items())]
    if type(item) in (set, frozenset):
        return [kind, *sorted(parts(item), key=json.dumps)]
    made: type = type(item)
    return [kind, *parts(_sources(made)), *parts(_reduced(item))]


def _reduced(item: Any) -> tuple[Any, ...]:
    """What pickle would make it from."""
    try:
        reduced = item.__reduce_ex__(4)
    except Exception as error:
        raise TypeError(f"{type(item).__qualname__}: {error}") from error
    if isinstance(reduced, str):
        return getattr(item, "__module__", None), reduced
    make, arguments, state, items, pairs = (*reduced, None, None, None, None)[:5]
    return make, arguments, state, None if items is None else list(items), None if pairs is None else list(pairs)


def _numbers(tensor: Tensor) -> str:
    try:
        values = tensor.detach().cpu().contiguous().flatten()
        return _digest(values.view(torch.uint8).numpy().tobytes())
    except (NotImplementedError, RuntimeError) as error:  # sparse, or without values
        raise TypeError(f"{type(tensor).__qualname__}: {error}") from error


def _source(item: Any) -> str:
    try:
        return inspect.getsource(item)
    except (OSError, TypeError):  # typed into a shell, or built in
        return ""


@lru_cache
def _sources(kind: Any) -> tuple[Any, ...]:
    """Of a class and those it is derived from; what a class is made of where there is no source."""
    own = [base for base in kind.__mro__ if not _is_library(base)]
    return tuple(_source(base) or _members(base) for base in own)


def _members(kind: type) -> list[Any]:
    members = [(name, getattr(member, "__func__", member)) for name, member in vars(kind).items()]
    asked = [(name, getattr(member, "fget", member)) for name, member in members]
    return [(name, member) for name, member in asked if isinstance(member, (FunctionType, *PLAIN))]
