"""What a layer is called, and which tensors make it up."""

import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

from lightning_tricks.functional.checks import message
from lightning_tricks.functional.slots import plain_name

Layers = Literal["module", "tensor"] | int | Sequence[str]
"""`"module"`: what owns parameters; `"tensor"`: each parameter; a number: so many parts of the name; patterns."""


def check_layers(owner: str, layers: Any) -> None:
    """Raise unless these are layers.

    Args:
        owner: callback named in an error.
        layers: what came.
    Raises:
        TypeError, ValueError: it is none of what `Layers` says, or a pattern is not a regular expression.
    """
    condition = "'module', 'tensor', a depth of at least 0 (parts of the name) or regular expressions"
    fix = "'module' is the default, 2 joins 'encoder.0.attention' to 'encoder.0', ['encoder', 'head'] are two layers"
    if layers in ("module", "tensor"):
        return
    if isinstance(layers, int) and not isinstance(layers, bool) and layers >= 0:
        return
    if isinstance(layers, (int, str)) and not isinstance(layers, bool):
        raise ValueError(message(owner, "layers", condition, layers, fix))
    if not isinstance(layers, Sequence) or not layers or not all(isinstance(each, str) for each in layers):
        raise TypeError(message(owner, "layers", condition, layers, fix))
    for pattern in layers:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(message(owner, "layers", condition, pattern, f"It does not compile: {error}")) from error


def layer_of(name: str, layers: Layers) -> str | None:
    r"""The layer that a parameter belongs to.

    Args:
        name: the parameter's in the module.
        layers: by module that owns it (the parameter itself where that is the root), by tensor, by the first parts of
            the module's name, or by the first pattern that matches a part of the name's beginning: the layer is then
            called by what matched, so that `r"blocks\.\d+"` gives each block a layer.
    Returns:
        Its name; None if it is in the total alone: at a depth of 0, or where no pattern matches.
    Example:
        >>> layer_of("blocks.3.mlp.weight", [r"blocks\.\d+", "head"])
        'blocks.3'
    """
    name = plain_name(name)
    if layers == "tensor":
        return name
    owner = name.rpartition(".")[0] or name
    if layers == "module":
        return owner
    if isinstance(layers, int):
        return ".".join(owner.split(".")[:layers]) or None
    return next((found[0] for pattern in layers if (found := re.match(pattern, name)) and found[0]), None)


def check_names(owner: str, names: Collection[str], layers: Layers) -> None:
    """Raise if a pattern is of no parameter, or a layer has the name under which the sum over all is logged.

    Args:
        owner: callback named in an error.
        names: of the parameters.
        layers: as for `layer_of`.
    Raises:
        ValueError: a pattern matches none, or a layer is called `total`.
    """
    for pattern in () if isinstance(layers, (str, int)) else layers:
        if all(layer_of(name, [pattern]) is None for name in names):
            condition = "patterns of parameter names, matched from their beginning"
            fix = "Give patterns of the names that named_parameters() has"
            raise ValueError(message(owner, "layers", condition, pattern, fix))
    if "total" in (layer_of(name, layers) for name in names):
        fix = "Its keys would be those of the total; rename it"
        raise ValueError(message(owner, "layers", "none called 'total'", "total", fix))
