"""What a function or an object is, as a short text that is the same in every process."""

import dis
import enum
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

LIBRARIES = {"lightning", "lightning_tricks", "numpy", "pytorch_lightning", "torch"}
"""What they and Python's own define is described by its name: another version of a library is not another training."""
STARTED = ("__main__", "__mp_main__")
PLAIN = (bool, int, float, complex, str, type(None), type(...), enum.Enum)


def fingerprint(item: Any) -> str:
    """Shorten what an object is made of.

    Of a function: its code, defaults and closure, and so of all that it calls by a global name in its own file; neither
    comments, nor its place in the file, nor the global values that it reads. Of other objects: their class with its
    methods and values, and all that pickle would keep of them. What a class or a called function holds and pickle
    refuses goes by its type.

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
    met: list[Any] = []
    described = [_described(item, (), met)]
    for each in met:  # which grows meanwhile
        described += [_described(other, (), met, strict=False) for other in _called(each)]
    return _digest(json.dumps(described).encode())


def full_name(kind: Any) -> str:
    """The name of a class or function, the same whether its file was started or imported.

    Args:
        kind: class or function.
    Example:
        >>> full_name(fingerprint)
        'lightning_tricks.ablations.fingerprints.fingerprint'
    """
    return f"{_module_name(str(kind.__module__))}.{kind.__qualname__}"


def _module_name(name: str) -> str:
    """Libraries by their full name; others by that of their file, as nothing more is known of one that was started."""
    if name.partition(".")[0] in LIBRARIES:
        return name
    file = getattr(sys.modules.get(name), "__file__", None) if name in STARTED else None
    return Path(file).stem if file else name.rpartition(".")[2]


def _is_library(item: Any) -> bool:
    """Whether a class or function is one of a library, and found there."""
    module = str(item.__module__)
    found: Any = sys.modules.get(module)
    for name in item.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is item and (module.partition(".")[0] in LIBRARIES or _is_standard(module))


def _is_standard(module: str) -> bool:
    """Whether it is one of Python's own, and no file of the same name hides that."""
    file = getattr(sys.modules[module], "__file__", None) or os.__file__
    return module.partition(".")[0] in sys.stdlib_module_names and file.startswith(os.path.dirname(os.__file__))


def _called(item: Any) -> Iterator[Any]:
    """The classes and functions that a function calls by a global name, if its own file defines them."""
    if isinstance(item, FunctionType):
        for other in [item.__globals__.get(name) for name in _globals(item.__code__)]:
            if callable(other) and getattr(other, "__module__", None) == item.__module__:
                plain = isinstance(other, (type, FunctionType))
                yield other if plain else getattr(other, "__wrapped__", type(other))


def _globals(code: CodeType) -> Iterator[str]:
    """The global names that it and the functions inside of it read."""
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals(inner)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _described(item: Any, outer: tuple[int, ...], met: list[Any], strict: bool = True) -> Any:
    """Lists and texts.

    Args:
        item: anything.
        outer: ids of what holds it, for objects that hold themselves.
        met: classes and functions that are described already; those in it are added.
        strict: raise for what pickle refuses.
    """
    if id(item) in outer:
        return ["again", outer.index(id(item))]
    outer = (*outer, id(item))

    def parts(items: Any, strict: bool = strict) -> list[Any]:
        return [_described(part, outer, met, strict) for part in items]

    kind = full_name(type(item))
    if isinstance(item, bytes):
        return [kind, _digest(item)]
    if isinstance(item, PLAIN):
        return [kind, repr(item)]
    if isinstance(item, ModuleType):
        return [kind, _module_name(item.__name__)]
    if isinstance(item, (type, FunctionType)):
        if _is_library(item):
            return [kind, full_name(item)]
        known = next((place for place, other in enumerate(met) if other is item), None)
        if known is not None:
            return ["met", known]
        met.append(item)
        if isinstance(item, type):
            own = [base for base in item.__mro__ if not _is_library(base)]
            return [kind, full_name(item), *parts(map(_members, own), strict=False)]
        cells = [cell.cell_contents for cell in item.__closure__ or () if cell != CellType()]  # an empty one holds none
        held = (item.__defaults__, item.__kwdefaults__, cells, vars(item))
        return [kind, full_name(item), *parts((item.__code__, *held))]
    if isinstance(item, CodeType):
        return [kind, *parts(_instructions(item))]
    if type(item) in (tuple, list):
        return [kind, *parts(item)]
    if type(item) is dict:
        return [kind, *parts(item.items())]
    if type(item) in (set, frozenset):
        return [kind, *parts(sorted(item, key=lambda part: json.dumps(_described(part, outer, [*met], strict))))]
    try:
        held = _wrapped(item) or (_numbers(item) if isinstance(item, Tensor) else _reduced(item))
    except TypeError:
        if strict:
            raise
        return [kind]
    return [kind, *parts((type(item), *held))]


def _instructions(code: CodeType) -> tuple[Any, ...]:
    """What it does, and neither where it stands nor what is said of it."""
    raised = getattr(code, "co_exceptiontable", b"")  # since Python 3.11
    arguments = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_varnames, code.co_freevars, code.co_names)
    return code.co_code, raised, arguments, names, code.co_consts


def _members(kind: type) -> list[Any]:
    """What a class itself defines, less what Python keeps there for itself."""
    functions = (FunctionType, staticmethod, classmethod)
    return [
        (name, member)
        for name, member in vars(kind).items()
        if isinstance(member, functions) or not (name.startswith("__") or name == "_abc_impl")
    ]


def _wrapped(item: Any) -> tuple[Any, ...]:
    """The functions inside of what a class makes methods of them with, which pickle refuses."""
    if isinstance(item, MethodType):
        return item.__func__, item.__self__
    if isinstance(item, (staticmethod, classmethod)):
        return (item.__func__,)
    if isinstance(item, property):
        return item.fget, item.fset, item.fdel
    return (item.func,) if isinstance(item, cached_property) else ()


def _reduced(item: Any) -> tuple[Any, ...]:
    """What pickle would make it from."""
    try:
        reduced = item.__reduce_ex__(4)
    except Exception as error:
        raise TypeError(f"{type(item).__qualname__}: {error}") from error
    if isinstance(reduced, str):
        return _module_name(str(getattr(item, "__module__", None))), reduced, getattr(item, "__wrapped__", None)
    make, arguments, state, items, pairs = (*reduced, None, None, None, None)[:5]
    return make, arguments, state, None if items is None else list(items), None if pairs is None else list(pairs)


def _numbers(tensor: Tensor) -> tuple[Any, ...]:
    try:
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    except (NotImplementedError, RuntimeError) as error:  # sparse, or without values
        raise TypeError(f"{type(tensor).__qualname__}: {error}") from error
    return str(tensor.dtype), list(tensor.shape), tensor.requires_grad, values
