"""What a function or an object is, as a short text that is the same in every process."""

import copyreg
import dis
import enum
import hashlib
import inspect
import json
import os
import sys
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from logging import Logger
from pathlib import Path
from types import CellType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

LIBRARIES = {"lightning", "lightning_tricks", "numpy", "pytorch_lightning", "torch"}
"""What they and Python's own define is described by its name: another version of a library is not another training."""
STARTED = ("__main__", "__mp_main__")
REMEMBER = ("functools", "torch._dynamo.eval_frame")
"""Whose wrappers, of `singledispatch` and `torch.compile`, keep what calls left in them."""
PLAIN = (bool, int, float, complex, str, type(None), type(...))
SILENT = ("NOP", "RESUME", "EXTENDED_ARG", "CACHE")
"""Instructions that do nothing: there are others where a line is split."""
KINDS = (
    inspect.CO_VARARGS
    | inspect.CO_VARKEYWORDS
    | inspect.CO_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ITERABLE_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
)
"""Flags of code that say how it is called, and not how it was written."""


def fingerprint(item: Any) -> str:
    """Shorten what an object is made of.

    Of a function: its code, defaults and closure, and so of all that it calls by a global name in its own file; neither
    comments and docstrings, nor its place in the file, nor the global values that it reads. Of other objects: their
    class with its methods and values, and all that pickle would keep of them, as they are now: a default or a class
    that calls fill is another one afterwards. What a class or a called function holds and pickle refuses goes by its
    type.

    Args:
        item: anything.
    Returns:
        16 hexadecimal digits.
    Raises:
        TypeError: it holds what cannot be compared with a later one, such as an open file or a lock.
        ValueError: a whole number of thousands of digits.
    Example:
        >>> fingerprint([1, 2]) == fingerprint([1, 2]), fingerprint([1, 2]) == fingerprint([1, 3])
        (True, False)
    """
    met = _Met()
    described = [_part(item, met, strict=True)]
    for each, strict in met.items:  # which grows meanwhile
        described.append(_described(each, met, strict))
        described += [_part(other, met, strict=False) for other in _called(each)]
    return _digest(json.dumps(described).encode())


def full_name(kind: Any) -> str:
    """The name of a class or function, the same whether its file was started or imported.

    Args:
        kind: class or function.
    Example:
        >>> full_name(fingerprint)
        'lightning_tricks.ablations.fingerprints.fingerprint'
    """
    module = str(kind.__module__)
    return f"{module}.{kind.__qualname__}" if _of_library(module) else str(kind.__qualname__)


class _Met:
    """What was met, in order: its place stands for it elsewhere, so nothing is walked twice, nor deeper and deeper."""

    def __init__(self) -> None:
        self.items: list[tuple[Any, bool]] = []
        self._places: dict[tuple[int, bool], int] = {}

    def place(self, item: Any, strict: bool) -> int:
        """That of an object, which is kept: another one may not take its id."""
        place = self._places.setdefault((id(item), strict), len(self.items))
        if place == len(self.items):
            self.items.append((item, strict))
        return place


def _of_library(module: str) -> bool:
    """Whether it is of a library or Python's own, and no file of the same name hides that."""
    first = module.partition(".")[0]
    file = getattr(sys.modules.get(module), "__file__", None) or os.__file__
    return first in LIBRARIES or (first in sys.stdlib_module_names and file.startswith(os.path.dirname(os.__file__)))


def _is_library(item: Any) -> bool:
    """Whether a class or function is one of a library, and found there."""
    module = str(item.__module__)
    found: Any = sys.modules.get(module)
    for name in item.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is item and _of_library(module)


def _called(item: Any) -> Iterator[Any]:
    """The classes and functions that a function calls by a global name, if its own file defines them."""
    if isinstance(item, FunctionType):
        for other in [item.__globals__.get(name) for name in _globals(item.__code__)]:
            named = other.func if isinstance(other, partial) else other
            if callable(other) and getattr(named, "__module__", None) == item.__module__:
                yield from _code_of(other)


def _code_of(item: Any) -> Iterator[Any]:
    """The classes and functions that a callable is made of; none of the values that it holds, which are global ones."""
    if isinstance(item, (type, FunctionType)):
        yield item
    elif isinstance(item, MethodType):
        yield from (item.__func__, item.__self__ if isinstance(item.__self__, type) else type(item.__self__))
    else:
        yield type(item)
        named = {"": getattr(item, "__wrapped__", None), **getattr(item, "__dict__", {})}
        for each in (item.func, *item.args, *item.keywords.values()) if isinstance(item, partial) else named.values():
            if isinstance(each, (type, FunctionType, MethodType, partial)):
                yield from _code_of(each)


def _globals(code: CodeType) -> Iterator[str]:
    """The global names that it and the functions inside of it read."""
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals(inner)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _part(item: Any, met: _Met, strict: bool) -> Any:
    """A value, or the place of what is described there.

    Args:
        item: anything.
        met: what was met so far; this is added.
        strict: raise for what pickle refuses.
    """
    kind = full_name(type(item))
    if type(item) in PLAIN:
        return [kind, repr(item)]
    if type(item) is bytes:
        return [kind, _digest(item)]
    if type(item) is tuple:  # one of a function's constants may be one object or several
        return [kind, *(_part(part, met, strict) for part in item)]
    if type(item) is CodeType:
        return [kind, *(_part(part, met, strict) for part in _steps(item))]
    return met.place(item, strict)


def _described(item: Any, met: _Met, strict: bool) -> Any:
    """Lists and texts; arguments as of `_part`."""
    if isinstance(item, (type, FunctionType)) and _is_library(item):
        return [full_name(type(item)), full_name(item)]
    try:
        return [full_name(type(item)), _part(_held(item), met, strict and not isinstance(item, type))]
    except TypeError:
        if strict:
            raise
        return full_name(type(item))


def _held(item: Any) -> tuple[Any, ...]:
    """What an object is made of."""
    if isinstance(item, type):
        return full_name(item), type(item), item.__bases__, _members(item)
    if isinstance(item, FunctionType):
        return _of_function(item)
    if isinstance(item, ModuleType):
        return (_module_name(item),)
    if type(item) is list:
        return tuple(item)
    if type(item) in (dict, MappingProxyType):
        return tuple(item.items())
    if type(item) in (set, frozenset):
        return tuple(sorted(item, key=_order))
    if isinstance(item, enum.Enum):
        return type(item), item.name, item.value
    if isinstance(item, Logger):  # named after a module, which may have been started
        return ()
    return (type(item), *(_wrapped(item) or (_numbers(item) if isinstance(item, Tensor) else _reduced(item))))


def _order(item: Any) -> str:
    """What tells the parts of a set apart in every process alike, as far as their own values do."""
    met = _Met()
    part = _part(item, met, strict=False)
    return json.dumps([part, *(_described(each, met, strict) for each, strict in met.items[:])])


def _module_name(module: ModuleType) -> str:
    """Of one that was started, nothing more is known than its file."""
    file = getattr(module, "__file__", None) if module.__name__ in STARTED else None
    return Path(file).stem if file else module.__name__


def _of_function(item: FunctionType) -> tuple[Any, ...]:
    own = vars(item)
    if "__wrapped__" in own and item.__globals__.get("__name__") in REMEMBER:
        return item.__code__.co_name, own["__wrapped__"], own.get("registry")
    filled = (cell for cell in item.__closure__ or () if cell != CellType())  # an empty one holds none
    cells = tuple(cell.cell_contents for cell in filled)
    return full_name(item), item.__code__, item.__defaults__, item.__kwdefaults__, cells, _counted(own)


def _steps(code: CodeType) -> tuple[Any, ...]:
    """What it does and how it is called, and neither where it stands nor what is said of it."""
    steps = list(_unsaid([step for step in dis.get_instructions(code) if step.opname not in SILENT]))
    offsets = [step.offset for step in steps]
    found = []
    for step in steps:
        value = code.co_consts[step.arg or 0] if step.opname == "KW_NAMES" else step.argval
        value = tuple(sorted(value, key=repr)) if isinstance(value, frozenset) else value
        jumps = step.opcode in dis.hasjrel or step.opcode in dis.hasjabs
        found.append((step.opname, bisect_left(offsets, value) if jumps else value))
    called = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & KINDS)
    return (*called, code.co_varnames, tuple(found), tuple(_caught(code, offsets)))


def _unsaid(steps: list[dis.Instruction]) -> Iterator[dis.Instruction]:
    """Less what the body of a class says of itself: one loads it, and the next stores it."""
    said = [step.opname == "STORE_NAME" and step.argval in ("__doc__", "__firstlineno__") for step in steps]
    yield from (step for step, *pair in zip(steps, said, [*said[1:], False], strict=True) if not any(pair))


def _caught(code: CodeType, offsets: list[int]) -> Iterator[tuple[int, ...]]:
    """Which instructions are in a `try` or `with`, and where it goes on from there; before Python 3.11 they say so."""
    entries = dis._parse_exception_table(code) if sys.version_info >= (3, 11) else ()  # type: ignore[attr-defined]
    for entry in entries:
        start, end, target = (bisect_left(offsets, place) for place in (entry.start, entry.end, entry.target))
        if start < end:
            yield start, end, target, entry.depth, entry.lasti


def _members(kind: type) -> tuple[Any, ...]:
    """What a class itself defines, less what Python keeps there, such as the `__init__` that a Protocol inherits."""

    def inherits(name: str, member: Any) -> bool:
        return _acts(member) and any(vars(base).get(name) is member for base in kind.__mro__[1:])

    mine = {name: member for name, member in vars(kind).items() if name != "_abc_impl" and not inherits(name, member)}
    if issubclass(kind, enum.Enum):
        mine = {name: member for name, member in mine.items() if not name.startswith("_") or _acts(member)}
        return _counted(mine | {name: member.value for name, member in kind.__members__.items()})
    return _counted(mine)


def _counted(names: Mapping[Any, Any]) -> tuple[Any, ...]:
    """Less what Python says of it, such as `__doc__` and `__module__`."""
    return tuple((name, value) for name, value in names.items() if not str(name).startswith("__") or _acts(value))


def _acts(member: Any) -> bool:
    return callable(member) or hasattr(type(member), "__get__")


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
    known = copyreg.dispatch_table.get(type(item))
    try:
        reduced = item.__reduce_ex__(4) if known is None else known(item)
    except Exception as error:
        raise TypeError(f"{type(item).__qualname__}: {error}") from error
    if isinstance(reduced, str):
        module = str(getattr(item, "__module__", None))
        return module if _of_library(module) else None, reduced, getattr(item, "__wrapped__", None)
    make, arguments, state, items, pairs = (*reduced, None, None, None, None)[:5]
    state = _counted(state) if type(state) is dict else state
    return make, arguments, state, None if items is None else list(items), None if pairs is None else list(pairs)


def _numbers(tensor: Tensor) -> tuple[Any, ...]:
    try:
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    except (NotImplementedError, RuntimeError) as error:  # sparse, or without values
        raise TypeError(f"{type(tensor).__qualname__}: {error}") from error
    return str(tensor.dtype), list(tensor.shape), tensor.requires_grad, values
