"""The tensors that make up a model's weights, and whether they were changed in between."""

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from lightning_tricks.functional.slots import weight_slots

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a module by name; tied ones once.

    Args:
        module: any module.
    Returns:
        The live tensors.
    """
    return {name: tensor for name, holder, key in weight_slots(module) if (tensor := holder[key]) is not None}


class SpectralNormOf(NamedTuple):
    """The names of what spectral norm follows a weight with.

    Args:
        weight: the weight before it is normalised.
        left, right: the buffers with its leading singular vectors.
        dim: the dimension of the weight that is a matrix's rows.
        before: what the weight goes through first.
    """

    weight: str
    left: str
    right: str
    dim: int
    before: tuple[nn.Module, ...] = ()


def spectral_norms(module: nn.Module) -> list[SpectralNormOf]:
    """Where a module has spectral norm, of `nn.utils.parametrizations` or the older one of `nn.utils`.

    Args:
        module: any module.
    Returns:
        The names of its tensors, for each weight.
    """
    found = []
    for name, child in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(child, ParametrizationList):
            for index, part in enumerate(child):
                if type(part).__name__ == "_SpectralNorm" and hasattr(part, "_u"):
                    left, right = f"{prefix}{index}._u", f"{prefix}{index}._v"
                    found.append(
                        SpectralNormOf(f"{prefix}original", left, right, cast(int, part.dim), tuple(child)[:index])
                    )
        for hook in child._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                name = prefix + hook.name
                found.append(SpectralNormOf(f"{name}_orig", f"{name}_u", f"{name}_v", int(hook.dim)))
    return found


@torch.no_grad()
def leading_singular_vectors(weight: Tensor, start: Tensor, dim: int, iterations: int = 30) -> tuple[Tensor, Tensor]:
    """Left and right singular vector of the largest singular value, by power iteration.

    Args:
        weight: a tensor of at least two dimensions.
        start: (weight.shape[dim],) a vector to begin with; untouched.
        dim: the dimension that is the matrix's rows.
        iterations: how many.
    Returns:
        Two unit vectors.
    """
    matrix = weight.movedim(dim, 0).flatten(1)
    left = start
    for _ in range(iterations):
        right = F.normalize(matrix.mH @ left, dim=0, eps=1e-12)
        left = F.normalize(matrix @ right, dim=0, eps=1e-12)
    return left, right


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor], chunk: int = 1 << 20) -> list[int]:
    """A number for each tensor that changes when its bits or their order do, the same on every device.

        sum((2 * i + 1) * bits[i])  modulo 2 ** 64

    Args:
        tensors: any dense tensors.
        chunk: numbers that are read at once.
    Returns:
        Sums of integers, which no order of summation can change.
    """
    sums = []
    for tensor in tensors:
        flat = (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).contiguous().view(-1)
        bits = flat.view(_INTEGERS[flat.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=bits.device)
        for start in range(0, len(bits), chunk):
            part = bits[start : start + chunk].long()
            total += (part * (2 * torch.arange(start, start + len(part), device=bits.device) + 1)).sum()
        sums.append(total)
    return [int(total) for total in sums]
