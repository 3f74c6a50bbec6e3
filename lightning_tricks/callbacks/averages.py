"""Averages of a module's weights, and whether the module holds its own weights or those of an average."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from lightning_tricks.callbacks.shards import as_part_of, own_part, split_as
from lightning_tricks.callbacks.updater import Updater
from lightning_tricks.callbacks.weights import SpectralNormOf, fingerprint, leading_singular_vectors, spectral_norms
from lightning_tricks.functional.averaging import can_average
from lightning_tricks.functional.checks import message
from lightning_tricks.functional.slots import plain_name, weight_slots


class Averages:
    """Averages of one module's weights, of which it can show one at a time in the place of its own.

    An average is shown by exchanging storages, which copies nothing. What is sharded, or averaged on another device or
    in another dtype, is copied instead, one tensor at a time. Whatever is interrupted can be undone by `hide`. Of a
    sharded tensor each rank averages its own part.

    Args:
        owner: callback named in errors.
        include: patterns of names that are averaged; None for all.
        exclude: patterns of names that are not.
        buffers: whether floating buffers are averaged too.
        device: `"cpu"`, or None for each tensor's own.
        dtype: least dtype of averages of real numbers; None for each tensor's own.
    """

    def __init__(
        self,
        owner: str,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        buffers: bool = True,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.owner, self.include, self.exclude, self.buffers = owner, include, exclude, buffers
        self.device, self.dtype = device, dtype
        self.tensors: list[dict[str, Tensor | None]] = []  # of each average; None where it was copied into the module
        self.raw: dict[str, Tensor] | None = None  # the module's own, while it shows an average
        self.shown = 0
        self.guarded: list[str] = []  # buffers that may change while an average is shown
        self._slots: dict[str, tuple[dict[str, Tensor | None], str]] = {}
        self._spectral: list[SpectralNormOf] = []
        self._sharded: list[FSDPModule] = []
        self._added: set[str] = set()  # what is shown beside the averaged tensors
        self._kept: dict[str, Tensor | None] = {}  # of the guarded ones what the last showing left
        self._updater: Updater | None = None
        self._places: list[tuple[dict[str, Tensor | None], str]] = []  # what the updater looks at

    @property
    def begun(self) -> bool:
        """Whether there are averages yet."""
        return bool(self.tensors)

    @property
    def names(self) -> list[str]:
        """The averaged tensors."""
        return [name for name in self.tensors[0] if name not in self._added] if self.tensors else []

    @property
    def unaveraged(self) -> list[str]:
        """The tensors that stay as the module has them."""
        averaged = set(self.names)
        return [name for name in self._slots if name not in averaged]

    @property
    def copies(self) -> bool:
        """Whether what is shown is copied into the module's own storage, not exchanged with it."""
        sharded = any(isinstance(holder.get(key), DTensor) for holder, key in self._slots.values())
        return sharded or self.device is not None or self.dtype is not None

    @property
    def fit_module(self) -> bool:
        """Whether the module that was found has all the averaged tensors."""
        return set(self.names) <= self._slots.keys()

    # ------------------------------------------------------------------ the module

    def find(self, module: nn.Module) -> None:
        """Find out where the module's tensors live.

        Args:
            module: with all its parameters.
        Raises:
            ValueError: a pattern that no name has, or spectral norm that no average can follow.
        """
        self._sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
        self._reshard()
        self._slots = {name: (holder, key) for name, holder, key in weight_slots(module)}
        self._spectral = spectral_norms(module)
        self._updater = None
        for argument, patterns in (("include", self.include or ()), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(_matches(name, [pattern]) for name in self._slots):
                    fix = f"The module has {', '.join(list(map(plain_name, self._slots))[:5])}, ..."
                    condition = "patterns of the names of the module's weights, as 'backbone.*'"
                    raise ValueError(message(self.owner, argument, condition, pattern, fix))
        if self._slots and not any(self._wanted(name, holder.get(key)) for name, (holder, key) in self._slots.items()):
            fix = "Let them leave something to average"
            given = {"include": self.include, "exclude": self.exclude}
            raise ValueError(message(self.owner, "include", "patterns of floating weights", given, fix))
        for norm in self._spectral:
            fix = "Put spectral norm first, or leave the other parametrization out"
            condition = "of one tensor before spectral norm"
            if norm.weight not in self._slots:
                got = f"{norm.left} behind one of several tensors"
                raise ValueError(message(self.owner, "parametrizations", condition, got, fix))
            if isinstance(self._live([norm.weight])[norm.weight], DTensor):
                fix, condition = "Keep its layer whole on each rank", "without spectral norm of a sharded weight"
                raise ValueError(message(self.owner, "parametrizations", condition, norm.weight, fix))

    def forget_module(self) -> None:
        """Let go of the module."""
        self._settle()
        self._slots, self._sharded, self._updater, self._places = {}, [], None, []

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of those that were found.

        Args:
            tensor: any tensor.
        """
        return any(holder.get(key) is tensor for holder, key in self._slots.values())

    def _live(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The module's tensors; whoever lets time pass must look for None, a buffer that was taken away."""
        self._reshard()
        slots = self._slots
        return {name: slots[name][0].get(slots[name][1]) for name in names}  # type: ignore[misc]

    # ------------------------------------------------------------------ updates

    @torch.no_grad()
    def begin(self, count: int, unaveraged: Collection[str] | None = None) -> None:
        """Begin so many averages as copies of the weights.

        Args:
            count: at least 1.
            unaveraged: names of the tensors that are left out; None for those that cannot be averaged or shall not.
        """
        live = {name: tensor for name, (holder, key) in self._slots.items() if (tensor := holder.get(key)) is not None}
        if unaveraged is None:
            names = self._choose(live)
        else:
            names = [name for name in live if name not in unaveraged and self._wanted(name, live[name])]
        parts = {name: own_part(live[name]) for name in names}
        self.end()
        self.tensors = [{name: self._copied(part) for name, part in parts.items()} for _ in range(count)]
        if unaveraged is not None:  # the module shows an average that was saved
            self._kept = {name: live[name].detach().clone() for name in self.guarded if name in unaveraged}

    def end(self) -> None:
        """Let go of the averages."""
        self.tensors, self.raw, self.shown, self._updater = [], None, 0, None
        self._added, self._kept = set(), {}

    def update(self, decays: Sequence[float]) -> None:
        """Move each average towards the weights.

        Args:
            decays: for each average the weight of the old one, in [0, 1).
        Raises:
            ValueError: a parameter that is averaged has another shape now.
        """
        if self._sharded:
            self._reshard()
        if self._updater is None or not self._updater.fits([holder.get(key) for holder, key in self._places]):
            self._settle()
            self._drop_what_changed_shape()
            averages = [[tensor for tensor in average.values() if tensor is not None] for average in self.tensors]
            self._places = [self._slots[name] for name in self.tensors[0]]
            self._updater = Updater(averages, list(self._live(self.tensors[0]).values()))
        self._updater.update(decays)

    def _reshard(self) -> None:
        """A forward without a backward leaves some parameters gathered, which the module's parts do not follow."""
        for part in self._sharded:
            part.reshard()

    def _choose(self, live: dict[str, Tensor]) -> list[str]:
        names = [name for name, tensor in live.items() if self._wanted(name, tensor)]
        able = [can_average(own_part(live[name])) for name in names]
        if any(isinstance(live[name], DTensor) for name in names):  # no rank sees what the others' parts hold
            everywhere: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, able)
            able = [all(ranks) for ranks in zip(*everywhere, strict=True)]
        return [name for name, fine in zip(names, able, strict=True) if fine]

    def _wanted(self, name: str, tensor: Tensor | None) -> bool:
        """Whether the settings let a tensor be averaged, if it can be."""
        return (
            tensor is not None
            and (tensor.is_floating_point() or tensor.is_complex())
            and name not in _vectors(self._spectral)
            and (self.buffers or isinstance(tensor, Parameter) or name in self.guarded)
            and (self.include is None or _matches(name, self.include))
            and not _matches(name, self.exclude)
        )

    def _copied(self, part: Tensor) -> Tensor:
        dtype = part.dtype
        if self.dtype is not None and part.is_floating_point():
            dtype = torch.promote_types(dtype, self.dtype)
        home = self._home(part)
        if home.type == "cpu" and part.is_cuda:
            return torch.empty_like(part, device=home, dtype=dtype, pin_memory=True).copy_(part.detach())
        return part.detach().to(home, dtype, copy=True)

    def _home(self, part: Tensor) -> torch.device:
        return torch.device("cpu") if self.device == "cpu" else part.device

    def _drop_what_changed_shape(self) -> None:
        for name, tensor in self._live(list(self.tensors[0])).items():
            before = self.tensors[0][name]
            if before is None or (tensor is not None and own_part(tensor).shape == before.shape):
                continue
            if isinstance(tensor, Parameter):
                fix = "Give it its shape before the training, or let the average start later (start=)"
                got = f"{plain_name(name)} of {tuple(own_part(tensor).shape)}"
                raise ValueError(message(self.owner, "parameters", f"of one shape, {tuple(before.shape)}", got, fix))
            for average in self.tensors:  # a buffer that grows, or was taken away, stays as the module has it
                del average[name]

    def _settle(self) -> None:
        if self._updater is not None:
            self._updater.settle()

    # ------------------------------------------------------------------ show and hide

    def show(self, index: int = 0) -> None:
        """Put an average into the module, if there is one and none is shown.

        Args:
            index: which.
        """
        if not self.tensors or self.raw is not None:
            return
        self._settle()
        self._drop_what_changed_shape()
        # Validation is in inference mode; what training goes on with must not be made of inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            average = self._complete(self.tensors[index])
            self._added = average.keys() - self.tensors[index].keys()
            self.shown, self.raw = index, {}
            self.tensors[index] = average
            for name, tensor in self._live(average).items():
                value = average[name]
                assert value is not None
                if _exchangeable(tensor, value):
                    self.raw[name] = tensor.data
                    tensor.data = value
                else:
                    part = own_part(tensor)
                    self.raw[name] = part.to(value.device, copy=True)
                    part.copy_(value)
                    if value.dtype == part.dtype or name in self.guarded:
                        average[name] = None  # the module has it: no third copy

    def hide(self) -> None:
        """Put the module's own weights back; can be repeated after an interrupt, also of `show`."""
        if self.raw is None:
            return
        average = self.tensors[self.shown]
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in self._live(self.raw).items():
                if tensor is None or name not in average:  # taken away meanwhile, or already put back
                    continue
                raw, value = self.raw[name], average[name]
                if value is not None and _exchangeable(tensor, value):
                    tensor.data = raw
                    continue
                part = own_part(tensor)
                if value is None:
                    average[name] = self._copied(part)
                part.copy_(raw)
        self._kept |= {name: average[name] for name in self._added & set(self.guarded) if name in average}
        self.tensors[self.shown] = {name: value for name, value in average.items() if name not in self._added}
        self.raw, self.shown, self._added, self._updater = None, 0, set(), None

    def values(self, index: int = 0) -> dict[str, Tensor]:
        """What the module shows, or would show, of an average: live tensors, sharded where the module's are.

        Args:
            index: which.
        """
        if not self.tensors:
            return {}
        self._settle()
        if not self._slots:  # a copy, which has no module
            return {name: value for name, value in self.tensors[index].items() if value is not None}
        shown = self.raw is not None and index == self.shown
        average = self.tensors[index] if shown else self._complete(self.tensors[index])
        live = {name: tensor for name, tensor in self._live(average).items() if tensor is not None}
        parts = {name: own_part(live[name]) if average[name] is None else average[name] for name in live}
        return {name: as_part_of(part, live[name]).detach() for name, part in parts.items() if part is not None}

    def own_values(self) -> dict[str, Tensor]:
        """The module's own, of the tensors in whose place it shows an average: live, sharded where the module's are."""
        raw = self.raw or {}
        if not self._slots:
            return dict(raw)
        return {name: as_part_of(raw[name], tensor) for name, tensor in self._live(raw).items() if tensor is not None}

    def _complete(self, average: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """With what belongs to an average but is none: singular vectors, which would not normalise if averaged."""
        average = dict(average)
        for norm in self._spectral:
            weight = average.get(norm.weight)
            if weight is not None:
                start = self._live([norm.left])[norm.left].to(weight.dtype)
                with torch.no_grad():
                    for part in norm.before:
                        weight = part(weight)
                average[norm.left], average[norm.right] = leading_singular_vectors(weight, start, norm.dim)
        for name, tensor in self._live(name for name in self.guarded if name in self._slots).items():
            if name not in average:
                kept = self._kept.get(name)
                average[name] = tensor.detach().clone() if kept is None else kept.to(tensor.device)
        return average

    # ------------------------------------------------------------------ devices, ranks, changes

    def follow(self) -> None:
        """Follow the module to the device that it was moved to, if there is one."""
        if not self._slots:
            return
        self._settle()
        for index, average in enumerate(self.tensors):
            for name, tensor in self._live(average).items():
                value = average[name]
                if value is None or tensor is None:
                    continue
                shown = self.raw is not None and index == self.shown
                exchanged = shown and value.dtype == tensor.dtype and self.device is None
                finer = torch.promote_types(value.dtype, tensor.dtype)  # a resumed module is widened late
                average[name] = tensor.data if exchanged else value.to(self._home(tensor), finer)
        if self.raw is not None:
            live = self._live(self.raw)
            self.raw = {
                name: raw if live[name] is None else raw.to(self._home(live[name])) for name, raw in self.raw.items()
            }
        self._updater = None

    def whole(self, index: int) -> dict[str, Tensor]:
        """An average as a checkpoint in one file holds it; all ranks together.

        Args:
            index: which.
        """
        values = self.values(index)
        return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in values.items()}

    @torch.no_grad()
    def fill(self, index: int, values: Mapping[str, Tensor]) -> None:
        """Put what `whole` gave into an average.

        Args:
            index: which.
            values: by name; a whole tensor also where the module's is sharded.
        """
        for name, live in self._live(self.names).items():
            mine = self.tensors[index][name]
            if mine is not None and name in values:  # else the module has grown since
                mine.copy_(own_part(split_as(values[name], live)))

    def agree_on_buffers(self, trainer: pl.Trainer) -> None:
        """Let all ranks average the buffers as rank 0 has them; batch statistics are each rank's own.

        Args:
            trainer: with the ranks.
        """
        if trainer.world_size == 1 or not self.tensors or self.raw is not None:
            return
        self._settle()
        live = self._live(self.names)
        buffers = [name for name, t in live.items() if not isinstance(t, (Parameter, DTensor))]
        mine = [{name: average[name].cpu() for name in buffers} for average in self.tensors]  # type: ignore[union-attr]
        agreed = trainer.strategy.broadcast(mine)
        for average, values in zip(self.tensors, agreed, strict=True):
            for name in buffers:
                del average[name]
            average |= {name: value.to(self._home(live[name])) for name, value in values.items()}
        self._updater = None

    def fingerprint(self) -> list[int] | None:
        """A fingerprint of the averaged tensors as the module holds them; None where it has no such tensors."""
        if not self.tensors or not self.tensors[0].keys() <= self._slots.keys():
            return None
        live: Iterable[Tensor | None] = self._live(self.tensors[0]).values()
        return fingerprint(own_part(tensor) for tensor in live if tensor is not None)

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**self.__dict__, "_slots": {}, "_sharded": [], "_updater": None, "_places": []}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(plain_name(name), pattern) for pattern in patterns)


def _vectors(spectral: Iterable[SpectralNormOf]) -> set[str]:
    return {name for norm in spectral for name in (norm.left, norm.right)}


def _exchangeable(tensor: Tensor, value: Tensor) -> bool:
    """Whether a module's tensor can take over the storage of a value; a sharded layer would not look at it."""
    return not isinstance(tensor, DTensor) and (tensor.device, tensor.dtype) == (value.device, value.dtype)
