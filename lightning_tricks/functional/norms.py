"""Sums over the entries of each tensor of a list: norms, counts, inner products. The tensors may be in parts."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

_PIECE = 2**12
"""Entries of which float32 adds up the squares with an error below 1e-5 where all are equal, else of about 1e-7."""
_AT_ONCE = 2**16
"""So many entries of short tensors are copied one after another."""


@torch.no_grad()
def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each tensor.

        norms[i] = sqrt(sum(|tensors[i]| ** 2))

    Squares are added up in float64; of long tensors on a CPU, where that takes ten times as long, over pieces of 4096
    entries in float32 and over these in float64, with another factor where squares would underflow or overflow.

    Args:
        tensors: floating or complex tensors of any shapes, dense or sparse. DTensors must be the same ones, in the
            same order, on all ranks.
    Returns:
        (len(tensors),) float64 on the first one's device; nothing is transferred to the host. Of DTensors the norms of
        the whole tensors, on every rank: no tensor is gathered, the ranks add up the squares of all tensors at once.
    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.zeros(2)])
        tensor([5., 0.], dtype=torch.float64)
    """
    local, parts = _local(tensors)
    real = [_real(tensor) for tensor in local]
    kinds = {(tensor.device, tensor.dtype) for tensor in real}
    if not kinds:
        return torch.zeros(0, dtype=torch.float64)
    if len(kinds) == 1:
        result = _norms(real)
    else:
        norms: dict[int, Tensor] = {}
        for kind in kinds:
            chosen = [i for i, tensor in enumerate(real) if (tensor.device, tensor.dtype) == kind]
            norms |= zip(chosen, _norms([real[i] for i in chosen]).to(real[0].device), strict=True)
        result = torch.stack([norms[i] for i in range(len(real))])
    return _over_ranks(result.square(), parts).sqrt() if parts else result


def _norms(tensors: list[Tensor], before: Callable[[list[int]], object] = lambda numbers: None) -> Tensor:
    """Norms of tensors of one device and dtype; `before` is told which of them are read next, by their numbers."""
    if not tensors[0].is_cpu:
        before(list(range(len(tensors))))
        return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64))
    with torch.autocast("cpu", enabled=False):  # which refuses to join tensors of some dtypes
        return _norms_on_cpu(tensors, before)


def _norms_on_cpu(tensors: list[Tensor], before: Callable[[list[int]], object]) -> Tensor:
    counts = [tensor.numel() for tensor in tensors]  # of numbers whose squares add up to those of each tensor
    long = [i for i, count in enumerate(counts) if count > _PIECE]
    short = [i for i, count in enumerate(counts) if count <= _PIECE] if long else list(range(len(tensors)))
    if short:
        before(short)
    numbers = list(tensors)
    for i in long:
        before([i])
        numbers[i] = _norms_of_pieces(tensors[i])
        counts[i] = numbers[i].numel()
    sums = _sums_of_squares(numbers, counts)
    in_float32 = long if tensors[0].dtype != torch.float64 else []
    for i, square in zip(in_float32, sums[in_float32].tolist() if in_float32 else [], strict=True):
        # Squares of less than 1e-38 are lost in float32: not more of a norm of 1e-10 than of its rounding.
        if (square < 1e-20 and tensors[i].count_nonzero()) or square == math.inf:
            factor = 2.0**96 if square < 1 else 2.0**-96
            sums[i] = _norms_of_pieces(tensors[i], factor).double().square_().sum() / factor**2
    return sums.sqrt_()


def _norms_of_pieces(tensor: Tensor, factor: float = 1.0) -> Tensor:
    """Norms of a long tensor's pieces, and what entries are left after the last of these; both times a factor."""
    if not tensor.is_contiguous():
        as_stored = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        tensor = tensor.permute(as_stored).reshape(-1).contiguous()  # a copy only of what has gaps
    if left := tensor.numel() % _PIECE:
        pieces, rest = tensor.view(-1)[:-left].view(-1, _PIECE), tensor.view(-1)[-left:]
        return torch.cat([_norms_of_pieces(pieces, factor), rest if factor == 1 else rest.float() * factor])
    pieces = tensor.view(-1, _PIECE)
    if factor != 1:
        pieces = pieces.float() * factor
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    norms: Tensor = torch.linalg.vector_norm(pieces, dim=1, dtype=dtype)
    return norms


def _sums_of_squares(tensors: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Of tensors on a CPU with so many entries each, in float64: of many tensors at once, so that calls cost little."""
    sums, first = list[Tensor](), 0
    while first < len(counts):
        last, entries = first + 1, counts[first]
        while last < len(counts) and entries + counts[last] <= _AT_ONCE:
            entries += counts[last]
            last += 1
        flat: Tensor = _flatten_dense_tensors(tensors[first:last])  # type: ignore[no-untyped-call]
        lengths = torch.tensor(counts[first:last], device="cpu")
        sums.append(torch.segment_reduce(flat.double().square(), "sum", lengths=lengths, unsafe=True))
        first = last
    return torch.cat(sums)


@torch.no_grad()
def norms_after(
    change: Callable[[list[Tensor], list[Tensor]], object], parts: Sequence[Tensor], tensors: Sequence[Tensor]
) -> Tensor:
    """Change tensors by others, and give the norms that they then have.

        change(parts, tensors);  norms[i] = norm(parts[i])

    On a CPU large ones one by one, so that norms are taken of what is still in its cache: to read and write the memory
    is what all of this costs.

    Args:
        change: as `torch._foreach_copy_` and `torch._foreach_sub_`, tensor by tensor and in place.
        parts: what is changed; of DTensors this rank's part.
        tensors: as many, of the same shapes; where they are DTensors the norms are those of the whole ones.
    Returns:
        (len(parts),) float64, as of `tensor_norms`.
    Example:
        >>> update = [torch.tensor([1.0, 1.0])]
        >>> norms_after(torch._foreach_sub_, update, [torch.tensor([4.0, 5.0])]), update
        (tensor([5.], dtype=torch.float64), [tensor([-3., -4.])])
    """
    theirs, sharded = _local(tensors)
    if len({(part.device, part.dtype, part.layout) for part in parts}) == 1 and parts[0].layout == torch.strided:

        def change_these(numbers: list[int]) -> None:
            change([parts[i] for i in numbers], [theirs[i] for i in numbers])

        norms = _norms([_real(part) for part in parts], change_these)
    else:
        if parts:
            change(list(parts), list(theirs))
        norms = tensor_norms(parts)
    return _over_ranks(norms.square(), sharded).sqrt() if sharded else norms


@torch.no_grad()
def zero_counts(tensors: Sequence[Tensor]) -> Tensor:
    """How many entries of each tensor are exactly 0; those that a sparse tensor does not store among them.

    Args:
        tensors: as for `tensor_norms`.
    Returns:
        (len(tensors),) float64, as of `tensor_norms`.
    Example:
        >>> zero_counts([torch.tensor([0.0, 2.0, -0.0]), torch.ones(2)])
        tensor([2., 0.], dtype=torch.float64)
    """
    return _counts(tensors, lambda tensor, values: tensor.numel() - values.count_nonzero())


@torch.no_grad()
def nonfinite_counts(tensors: Sequence[Tensor]) -> Tensor:
    """How many entries of each tensor are infinite or NaN.

    Args:
        tensors: as for `tensor_norms`.
    Returns:
        (len(tensors),) float64, as of `tensor_norms`.
    Example:
        >>> nonfinite_counts([torch.tensor([0.0, torch.inf, torch.nan]), torch.ones(2)])
        tensor([2., 0.], dtype=torch.float64)
    """
    return _counts(tensors, lambda tensor, values: values.numel() - values.isfinite().count_nonzero())


def _counts(tensors: Sequence[Tensor], count: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    local, parts = _local(tensors)
    return _stacked([count(tensor, _values(tensor)).double() for tensor in local], parts)


@torch.no_grad()
def inner_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Inner product of each two tensors, added up in float64.

        products[i] = sum(left[i] * right[i])

    Args:
        left, right: as many dense tensors of the same shapes each, DTensors of the same placements; of complex ones
            real and imaginary parts count as entries of their own.
    Returns:
        (len(left),) float64, as of `tensor_norms`.
    Example:
        >>> inner_products([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -1.0])])
        tensor([1.], dtype=torch.float64)
    """
    ours, parts = _local(left)
    pairs = zip(ours, _local(right)[0], strict=True)
    return _stacked([(_real(one).double() * _real(other).double()).sum() for one, other in pairs], parts)


def _values(tensor: Tensor) -> Tensor:
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _real(tensor: Tensor) -> Tensor:
    values = _values(tensor)
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def _stacked(sums: Sequence[Tensor], parts: dict[int, DTensor]) -> Tensor:
    """Sums of each rank's parts as those of whole tensors, on the first one's device."""
    result = torch.stack([each.to(sums[0].device) for each in sums]) if sums else torch.zeros(0, dtype=torch.float64)
    return _over_ranks(result, parts)


def _local(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], dict[int, DTensor]]:
    """This rank's part of each tensor, and which of them are parts."""
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return tensors, {}
    parts = {i: _resolved(tensor) for i, tensor in enumerate(tensors) if isinstance(tensor, DTensor)}
    return [parts[i].to_local() if i in parts else tensor for i, tensor in enumerate(tensors)], parts


def _resolved(tensor: DTensor) -> DTensor:
    """The same with the sums over ranks carried out that are still to be done."""
    if not any(placement.is_partial() for placement in tensor.placements):
        return tensor
    done = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
    return tensor.redistribute(placements=done)


def _over_ranks(sums: Tensor, parts: dict[int, DTensor]) -> Tensor:
    """Sums over whole tensors from those of each rank's part; along a dimension of replicas there is nothing to add."""
    split: dict[tuple[DeviceMesh, int], list[int]] = {}
    for i, tensor in parts.items():
        for dim, placement in enumerate(tensor.placements):
            if not placement.is_replicate():
                split.setdefault((tensor.device_mesh, dim), []).append(i)
    for (mesh, dim), index in split.items():
        own = sums[index].to(mesh.device_type)  # parts that are offloaded are on another device than the ranks' own
        dist.all_reduce(own, group=mesh.get_group(dim))
        sums[index] = own.to(sums.device)
    return sums


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
