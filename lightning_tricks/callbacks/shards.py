"""Tensors of which each rank has a part (DTensor: FSDP2, tensor parallelism)."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def hold_parts(module: nn.Module) -> None:
    """Let a module under FSDP2 hold each rank's own parts of its parameters.

    A validation leaves the whole parameters of a root in place, as plain tensors that the next forward throws away:
    their values may be read, but what is written to them is lost, and the optimizer knows the parts alone.

    Args:
        module: any module; one that is not sharded is left alone.
    """
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same storage; the tensor itself where each rank has the whole.

    Args:
        tensor: any tensor.
    """
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def as_part_of(part: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that is sharded as another one, from this rank's part of it, in the same storage.

    Args:
        part: this rank's.
        tensor: of the same shape and sharding; one that is not sharded gives the part itself.
    """
    if not isinstance(tensor, DTensor):
        return part
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def split_as(whole: Tensor, tensor: Tensor | None) -> Tensor:
    """A whole tensor sharded as another one, without communication; as it is where that is not sharded, or unlike it.

    Args:
        whole: the same on every rank, on any device; the result is there too.
        tensor: what it shall be like.
    """
    if not isinstance(tensor, DTensor) or isinstance(whole, DTensor) or whole.shape != tensor.shape:
        return whole
    parts = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return parts.to(whole.device, copy=True)  # or the whole one stays in memory behind it


def state_dict_in_one(trainer: pl.Trainer) -> dict[str, Any]:
    """The module's state dict with whole tensors, for all ranks to call; of sharded weights rank 0 alone has it.

    Args:
        trainer: with the module.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(trainer.lightning_module, options=options)
    return trainer.strategy.lightning_module_state_dict()
