"""Where the tensors live that are a module's weights."""

from collections.abc import Iterator

from torch import Tensor, nn


def weight_slots(module: nn.Module) -> Iterator[tuple[str, dict[str, Tensor | None], str]]:
    """Where the parameters and persistent buffers of a module live; tied ones once.

    Args:
        module: any module.
    Returns:
        (full name, the dictionary that holds the tensor, its key there); a buffer that is assigned anew is found again
        through its dictionary.
    """
    seen: set[int] = set()
    for prefix, child in module.named_modules():
        persistent = [key for key in child._buffers if key not in child._non_persistent_buffers_set]
        slots = [(child._parameters, key) for key in child._parameters] + [(child._buffers, key) for key in persistent]
        for holder, key in slots:
            tensor = holder[key]
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{prefix}.{key}" if prefix else key, holder, key


def plain_name(name: str) -> str:
    """The name that a module or tensor had before something that holds it was compiled.

    Example:
        >>> plain_name("_orig_mod.body.0._orig_mod.weight")
        'body.0.weight'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
