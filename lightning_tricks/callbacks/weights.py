"""The tensors that make up a model's weights, and whether they were changed in between."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a module by name; tied ones once.

    Args:
        module: any module.
    Returns:
        The live tensors.
    """
    return {name: tensor for name, holder, key in weight_slots(module) if (tensor := holder[key]) is not None}


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> list[int]:
    """A number for each tensor that changes when its bits do, the same on every device.

    Args:
        tensors: any tensors.
    Returns:
        Sums of the bits read as integers, which no order of summation can change.
    """
    sums = []
    for tensor in tensors:
        flat = (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).contiguous().view(-1)
        sums.append(flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64))
    return [int(total) for total in sums]
