"""Put a trainer, a module and its data back as they were."""

import copy
import random
import signal
from collections import deque
from contextlib import ExitStack
from types import FunctionType, ModuleType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

SHORT = 10_000  # entries of a container of data that are still looked into
TRAINED = (nn.Module, Optimizer, LRScheduler, torch.amp.GradScaler)
DATA = (DataLoader, Sampler, Dataset, CombinedLoader, pl.LightningDataModule)


class Rollback:
    """Notes what objects are like and, when the stack closes, puts it back in place, the latest note first.

    The global random generators and the handler of Ctrl-C are among it from the beginning. What cannot be put back:
    files, other processes, global variables, attributes of plain objects, entries of numpy arrays.

    Args:
        undo: the stack; an exception closes it too.
    """

    def __init__(self, undo: ExitStack) -> None:
        undo.callback(_set_rng_states, _collect_rng_states())  # isolate_rng forgets to after an exception
        undo.callback(_set_handler, signal.getsignal(signal.SIGINT))
        self._undo = undo
        self._seen: dict[int, object] = {}

    def trainer(self, trainer: pl.Trainer) -> None:
        """The trainer's own parts; what a user gave it does not run, or is looked into by itself.

        Args:
            trainer: before it runs.
        """
        own = [part for name, part in vars(trainer).items() if name.endswith(("_connector", "_loop"))]
        sources = [part._data_source for part in own if hasattr(part, "_data_source")]
        for part in (trainer, trainer.state, trainer.strategy, trainer.precision_plugin, *own, *sources):
            self._attributes(part)
            for value in vars(part).values():
                self._entries(value)
        self.keep(trainer.scaler)

    def keep(self, item: Any, data: bool = False) -> None:
        """Note an object and all it consists of; of data only what moves on, not the data.

        Args:
            item: anything.
            data: whether it is data, a loader, a sampler or a dataset.
        """
        todo = [(item, data)]
        while todo:
            item, data = todo.pop()
            if id(item) in self._seen or isinstance(item, (type, ModuleType, FunctionType, pl.Trainer)):
                continue
            self._seen[id(item)] = item
            children: list[Any] = []
            if isinstance(item, Tensor):
                children = [] if data else self._tensor(item)
            elif isinstance(item, (dict, list, tuple, set, deque)):
                if not data or len(item) <= SHORT:
                    self._entries(item)
                    children = [*item, *item.values()] if isinstance(item, dict) else list(item)
            elif isinstance(item, torch.Generator) or type(item).__name__ == "RandomState":
                self._undo.callback(item.set_state, item.get_state())
            elif isinstance(item, random.Random):
                self._undo.callback(item.setstate, item.getstate())
            elif hasattr(item, "bit_generator"):  # of numpy
                self._undo.callback(setattr, item.bit_generator, "state", item.bit_generator.state)
            elif hasattr(item, "__dict__"):
                children, data = self._object(item), not isinstance(item, TRAINED)
            todo += [(child, data) for child in children]

    def _object(self, item: Any) -> list[Any]:
        """Of an object that is nothing of training or of data, only the random generators are put back."""
        loads = isinstance(item, DATA) or hasattr(type(item), "__iter__") or hasattr(type(item), "__getitem__")
        if isinstance(item, TRAINED) or loads:
            # Undone in the opposite order, so that these find the attributes as they were.
            if isinstance(item, nn.Module):
                if type(item).get_extra_state is not nn.Module.get_extra_state:
                    self._undo.callback(item.set_extra_state, copy.deepcopy(item.get_extra_state()))
            elif loads and not isinstance(item, DataLoader) and hasattr(item, "load_state_dict"):
                self._undo.callback(item.load_state_dict, copy.deepcopy(item.state_dict()))
            self._attributes(item)
        of_script = [*item.parameters(False), *item.buffers(False)] if isinstance(item, nn.Module) else []
        return [*vars(item).values(), *of_script]

    def _attributes(self, item: Any) -> None:
        self._undo.callback(_refill, vars(item), dict(vars(item)))

    def _entries(self, item: Any) -> None:
        if isinstance(item, (dict, list, set, deque)):
            self._undo.callback(_refill, item, copy.copy(item))

    def _tensor(self, item: Tensor) -> list[Any]:
        grad = item.grad if item.is_leaf else None
        self._undo.callback(_reset, item, item.data, item.detach().clone(), grad, item.requires_grad)
        return [grad]


def _refill(item: Any, entries: Any) -> None:
    item.clear()
    item.extend(entries) if isinstance(item, (list, deque)) else item.update(entries)


def _reset(item: Tensor, data: Tensor, values: Tensor, grad: Tensor | None, requires_grad: bool) -> None:
    """Into the same storage, which others may share."""
    item.data = data
    with torch.inference_mode():  # a metric's state may have been made in validation
        data.copy_(values)
    if item.is_leaf:
        item.requires_grad_(requires_grad)
        item.grad = grad


def _set_handler(handler: Any) -> None:
    """Lightning leaves Ctrl-C ignored after it."""
    if signal.getsignal(signal.SIGINT) is not handler:
        signal.signal(signal.SIGINT, handler)
