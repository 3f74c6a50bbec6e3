"""Two processes that share one model in parts (FSDP2, gloo), from within a test."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import kit
import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes

RANKS = 2


def on_ranks(call: Callable[[], Any], count: int = RANKS, timeout: float = 120.0) -> list[Any]:
    """Call a function in forked processes that Lightning, and `init_device_mesh`, take for the ranks of a run.

    Args:
        call: any function, a closure too; its result must be what `torch.load` reads with `weights_only=True`.
        count: how many ranks.
        timeout: seconds after which ranks that wait for each other for ever are ended.
    Returns:
        What each rank returned. An error of one rank ends both and is raised, with its traceback.
    """
    with TemporaryDirectory() as folder:
        ranks = start_processes(
            _rank, (call, folder, count, find_free_network_port()), nprocs=count, join=False, start_method="fork"
        )
        assert ranks is not None
        deadline = time.monotonic() + timeout
        while not ranks.join(max(0.0, deadline - time.monotonic())):  # it returns when the first of them ends, too
            if time.monotonic() >= deadline:
                for process in ranks.processes:
                    process.kill()
                raise TimeoutError(f"the ranks did not end in {timeout} s")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(count)]


def _rank(rank: int, call: Callable[[], Any], folder: str, count: int, port: int) -> None:
    # Lightning's own environment sees by LOCAL_RANK that somebody else has made the processes.
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        result = call()
    except BaseException as error:  # a failed distributed checkpoint, or an interrupt, is no Exception
        raise RuntimeError(f"rank {rank} failed") from error
    torch.save(result, Path(folder, f"{rank}.pt"))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class Sharded(L.LightningModule):
    """Mixed in before a module: each layer with parameters of its own is sharded over all ranks."""

    def own_layers(self) -> list[nn.Module]:
        """What is gathered and freed by itself; the root has the rest."""
        return [layer for layer in self.modules() if layer is not self and list(layer.parameters(recurse=False))]

    def configure_model(self) -> None:
        if isinstance(self, FSDPModule):
            return  # a second fit
        mesh = self.device_mesh["data_parallel"]
        for layer in self.own_layers():
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)


class ShardedNet(Sharded, kit.Net):
    """The shared classifier in parts; its head has three rows, so that the parts are uneven."""


class RootedNet(ShardedNet):
    """The same, with all but the first layer left to the root, whose parameters a validation leaves whole."""

    def own_layers(self) -> list[nn.Module]:
        return [self.body[1]]


def fit(
    callbacks: list[Callback], module: L.LightningModule | None = None, distributed: bool = False, **options: Any
) -> tuple[L.Trainer, Any]:
    """`kit.fit` on two ranks with FSDP2; only inside `on_ranks`.

    Args:
        callbacks, module, options: as for `kit.fit`; the module is a `ShardedNet` by default.
        distributed: whether each rank writes its own part of a checkpoint, which is a folder then.
    """
    strategy = ModelParallelStrategy(RANKS, 1, save_distributed_checkpoint=distributed)
    module = ShardedNet() if module is None else module
    return kit.fit(callbacks, module, **{"strategy": strategy, "devices": RANKS, **options})


def whole(value: Any) -> Any:
    """Copies with whole tensors in place of parts, through containers; a collective, for all ranks to call."""
    if isinstance(value, nn.Module):
        return whole(value.state_dict())
    if isinstance(value, DTensor):
        return value.detach().full_tensor().clone()
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return type(value)(whole(item) for item in value) if isinstance(value, (list, tuple)) else value
