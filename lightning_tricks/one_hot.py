"""One-hot codes of mixed labels, for losses that are written with them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_tricks.dispatch import MOVES, changes_in_place, is_floating, keeps, name_of, replaced, requires_grad

_AFFINE = frozenset(
    (
        "add sub rsub mul neg sum cat concat concatenate stack "
        "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __neg__"
    ).split()
)


class MixedOneHot(Tensor):
    """Integer codes of the dominant labels that are the dense mix wherever floating numbers are made of them.

    A metric that compares, counts or indexes with the codes sees plain integers; a loss that casts them to floating
    point, or multiplies them with log-probabilities, gets the probabilities of the mix. What is added, subtracted,
    multiplied, rearranged or moved stays both; floating numbers made of them note when a gradient meets them. Integer
    codes that are changed in place are plain from then on.

    Args:
        plain: (..., K) integers, the codes of the dominant labels; or floats, which are `dense`.
        dense: (..., K) floats, the probabilities of the mix.
        used: where the labels note that a loss used them.
    """

    _plain: Tensor
    _dense: Tensor | None
    _used: tuple[list[bool], ...]
    _version_then: int | None

    def __new__(cls, plain: Tensor, dense: Tensor, used: tuple[list[bool], ...]) -> "MixedOneHot":
        self = Tensor._make_subclass(cls, plain)
        self._plain, self._dense, self._used = plain, dense, used
        # It counts changes through views too; a compiled graph does not know it.
        self._version_then = None if torch.compiler.is_compiling() else plain._version
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"MixedOneHot({self._plain.tolist()})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = _all((*args, *kwargs.values()))
        changed = kwargs.get("out", args[0] if args and changes_in_place(func) else None)
        if changed is not None:
            return _changed_in_place(func, args, kwargs, found, changed)
        plain = func(*replaced(args, MixedOneHot, "_plain"), **replaced(kwargs, MixedOneHot, "_plain"))
        if not _are_mixed(found):
            return plain
        own = found[0]
        if not isinstance(plain, Tensor) or plain.dtype == torch.bool:
            return plain
        if name_of(func) in MOVES and not is_floating(plain) and own._dense is not None:
            return MixedOneHot(plain, own._dense.to(plain.device), own._used)
        if not (is_floating(plain) or keeps(func) or name_of(func) in _AFFINE):
            return plain
        dense = plain
        if any(codes._plain is not codes._dense for codes in found):  # else `inplace=True` would work twice
            dense = func(*replaced(args, MixedOneHot, "_dense"), **replaced(kwargs, MixedOneHot, "_dense"))
        if requires_grad(dense):
            _note_use(found)
            return dense
        return MixedOneHot(dense if is_floating(plain) else plain, dense, own._used)


def _changed_in_place(func: Callable[..., Any], args: Any, kwargs: Any, found: list[MixedOneHot], changed: Any) -> Any:
    """Call a function that changes its argument: once, since what is floating of the codes is one tensor."""
    mixed = _are_mixed(found) and is_floating(changed)
    if isinstance(changed, MixedOneHot) and not is_floating(changed):
        changed._dense = None
    kind = "_dense" if mixed else "_plain"
    result = func(*replaced(args, MixedOneHot, kind), **replaced(kwargs, MixedOneHot, kind))
    if mixed and requires_grad(result):
        _note_use(found)
        return result
    return changed if isinstance(changed, MixedOneHot) and isinstance(result, Tensor) else result


def _are_mixed(found: list[MixedOneHot]) -> bool:
    return torch.is_grad_enabled() and bool(found) and all(map(_is_mixed, found))


def _is_mixed(codes: MixedOneHot) -> bool:
    if torch.compiler.is_compiling() or codes._version_then is None or codes._plain is codes._dense:
        return codes._dense is not None
    return codes._dense is not None and codes._plain._version == codes._version_then


def _note_use(found: list[MixedOneHot]) -> None:
    for codes in found:
        for cell in codes._used:
            cell[0] = True


def _all(values: Any) -> list[MixedOneHot]:
    """Every tensor of codes in the arguments of a function."""
    found: list[MixedOneHot] = []
    for value in values:
        if isinstance(value, MixedOneHot):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _all(value)
    return found
