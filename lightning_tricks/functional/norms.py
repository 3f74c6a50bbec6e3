"""Norms and update ratios of lists of tensors, without a transfer to the host."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate


@torch.no_grad()
def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each tensor.

        norms[i] = sqrt(sum(|tensors[i]| ** 2))

    Args:
        tensors: floating or complex tensors of any shapes, dense or sparse. Squares are summed in float32, of
            float64 in float64: entries of float32 beyond 1e-19 or 1e19 count as 0 or give inf. DTensors must be the
            same ones, in the same order, on all ranks.
    Returns:
        (len(tensors),) float64 on the first one's device; nothing is transferred to the host. Of DTensors the norms of
        the whole tensors, on every rank: no tensor is gathered, the ranks add up the squares of all tensors at once.
    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.zeros(2)])
        tensor([5., 0.], dtype=torch.float64)
    """
    parts = {i: _resolved(t) for i, t in enumerate(tensors) if isinstance(t, DTensor)}
    local = [parts[i].to_local() if i in parts else t for i, t in enumerate(tensors)] if parts else tensors
    dense = [t.coalesce().values() if t.is_sparse else t for t in local]
    real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in dense]
    norms: list[Tensor] = [torch.empty(())] * len(real)
    for dtype in {t.dtype for t in real}:
        chosen = [i for i, t in enumerate(real) if t.dtype == dtype]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for i, norm in zip(chosen, torch._foreach_norm([real[i] for i in chosen], 2, dtype=wide), strict=True):
            norms[i] = norm.double().to(real[0].device)
    result = torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64)
    return _over_ranks(result, parts) if parts else result


def _resolved(tensor: DTensor) -> DTensor:
    """The same with the sums over ranks carried out that are still to be done."""
    if not any(placement.is_partial() for placement in tensor.placements):
        return tensor
    done = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
    return tensor.redistribute(placements=done)


def _over_ranks(norms: Tensor, parts: dict[int, DTensor]) -> Tensor:
    """Norms of whole tensors from those of each rank's part; along a dimension of replicas there is nothing to add."""
    split: dict[tuple[DeviceMesh, int], list[int]] = {}
    for i, tensor in parts.items():
        for dim, placement in enumerate(tensor.placements):
            if not placement.is_replicate():
                split.setdefault((tensor.device_mesh, dim), []).append(i)
    squares = norms.square()
    for (mesh, dim), index in split.items():
        sums = squares[index].to(mesh.device_type)  # parts that are offloaded are on another device than the ranks' own
        dist.all_reduce(sums, group=mesh.get_group(dim))
        squares[index] = sums.to(squares.device)
    return squares.sqrt()


def group_norms(norms: Tensor, groups: Sequence[int], count: int) -> Tensor:
    """Norm of each group of tensors from the norms of its members, and of all of them together.

        result[g] = sqrt(sum(norms[i] ** 2 for i with groups[i] == g));  result[count] = sqrt(sum(norms ** 2))

    Args:
        norms: (n,) norms of the tensors.
        groups: n group numbers in [0, count).
        count: number of groups.
    Returns:
        (count + 1,) norms; the last is the total.
    Example:
        >>> group_norms(torch.tensor([3.0, 4.0, 12.0]), [0, 0, 1], 2)
        tensor([ 5., 12., 13.])
    """
    squares = norms.square()
    index = torch.tensor(groups, dtype=torch.int64, device=norms.device)
    sums = squares.new_zeros(count + 1).index_add_(0, index, squares)
    sums[count] = squares.sum()
    return sums.sqrt()


@torch.no_grad()
def update_norms(before: Iterable[Tensor], after: Iterable[Tensor]) -> Tensor:
    """Norm of the true update of each tensor, whatever the optimizer did to it.

        norms[i] = norm(after[i] - before[i])

    Args:
        before: tensors as they were before the step.
        after: the same tensors after it; both lists are left untouched.
    Returns:
        (n,) float64 norms on their device.
    Example:
        >>> update_norms([torch.zeros(2)], [torch.tensor([0.3, 0.4])])
        tensor([0.5000], dtype=torch.float64)
    """
    pairs = zip(after, before, strict=True)
    return tensor_norms([_widened(new) - _widened(old) for new, old in pairs])


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
