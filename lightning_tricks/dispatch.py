"""What functions of torch do to labels that carry more than their numbers; by name, which torch.compile can trace."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

KEEP = frozenset(
    (
        "__getitem__ broadcast_to chunk clone contiguous detach diagonal expand expand_as flatten flip gather "
        "index_select masked_select moveaxis movedim narrow permute pin_memory ravel repeat repeat_interleave reshape "
        "reshape_as roll select split squeeze swapaxes swapdims t take tensor_split tile transpose unbind unflatten "
        "unsqueeze view view_as"
    ).split()
)
"""What rearranges or copies labels: the result carries what they carry."""

JOINS = frozenset("cat concat concatenate stack hstack vstack".split())
"""What makes one tensor of several: the result carries what each carries."""

MOVES = frozenset("byte char cpu cuda int long short to type type_as".split())
"""What moves labels, or casts them to another integer type."""

FLOAT_CASTS = frozenset("float double half bfloat16 cfloat cdouble chalf".split())
"""What casts labels to floating point, whatever the arguments."""

ARITHMETIC = frozenset(
    (
        "add sub rsub mul div pow subtract multiply divide true_divide "
        "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __div__ __rdiv__ __pow__ __rpow__"
    ).split()
)
"""What casts labels to floating point where the other number is floating: `labels * 1.0`."""

# What the labels carry may not be laid out as they are.
VIEWS: dict[str, Callable[..., Any]] = {"view": Tensor.reshape, "view_as": Tensor.reshape_as}

_PROPERTIES = (Tensor.T.__get__, Tensor.mT.__get__, Tensor.data.__get__)  # type: ignore[attr-defined]
_ASSIGNMENTS = (Tensor.data.__set__,)  # type: ignore[attr-defined]
_IN_PLACE = frozenset(
    (
        "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__ "
        "__ilshift__ __irshift__"
    ).split()
)


def name_of(func: Any) -> str:
    """The name of a function, as torch writes it."""
    return getattr(func, "__name__", "")


def keeps(func: Any) -> bool:
    """Whether a function rearranges or copies its first argument."""
    name = name_of(func)
    return name in KEEP or (name == "__get__" and func in _PROPERTIES)


def changes_in_place(func: Any) -> bool:
    """Whether a function changes its first argument."""
    name = name_of(func)
    if name[:2] == "__":
        return name in _IN_PLACE or (name == "__set__" and func in _ASSIGNMENTS)
    return name[-1:] == "_"


def casts_to_float(func: Any, result: Any) -> bool:
    """Whether a function, with this result, was a cast of its first argument to floating point."""
    name = name_of(func)
    return name in FLOAT_CASTS or (name in MOVES | ARITHMETIC and is_floating(result) and not result.requires_grad)


def is_floating(value: Any) -> bool:
    """Whether a value is a tensor of floating or complex numbers."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def requires_grad(value: Any) -> bool:
    """Whether there is a tensor in a value that requires a gradient."""
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, (tuple, list)) and any(requires_grad(item) for item in value)


def replaced(value: Any, kind: type, attribute: str) -> Any:
    """A value with an attribute of theirs in the place of all tensors of a kind, through containers."""
    if isinstance(value, kind):
        return getattr(value, attribute)
    if isinstance(value, (tuple, list)):
        items = [replaced(item, kind, attribute) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: replaced(item, kind, attribute) for key, item in value.items()}
    return value
