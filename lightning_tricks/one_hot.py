"""One-hot codes of mixed labels, for losses that are written with them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_tricks.dispatch import is_floating, keeps, replaced, requires_grad


class MixedOneHot(Tensor):
    """Integer codes of the dominant labels that are the dense mix wherever floating numbers are made of them.

    A metric that compares, counts or indexes with the codes sees plain integers; a loss that casts them to floating
    point, or multiplies them with log-probabilities, gets the probabilities of the mix.

    Args:
        plain: (..., K) integers, the codes of the dominant labels.
        dense: (..., K) floats, the probabilities of the mix.
        used: the list in which the labels note that a loss used them.
    """

    _plain: Tensor
    _dense: Tensor
    _used: list[bool]

    def __new__(cls, plain: Tensor, dense: Tensor, used: list[bool]) -> "MixedOneHot":
        self = Tensor._make_subclass(cls, plain)
        self._plain, self._dense, self._used = plain, dense, used
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
        plain = func(*replaced(args, MixedOneHot, "_plain"), **replaced(kwargs, MixedOneHot, "_plain"))
        own = next((value for value in (*args, *kwargs.values()) if isinstance(value, MixedOneHot)), None)
        if own is None:
            return plain
        if is_floating(plain) or requires_grad(plain):
            own._used[0] = True
            return func(*replaced(args, MixedOneHot, "_dense"), **replaced(kwargs, MixedOneHot, "_dense"))
        if keeps(func) and args and args[0] is own and isinstance(plain, Tensor):
            return MixedOneHot(plain, func(own._dense, *args[1:], **kwargs), own._used)
        return plain
