"""Hooks on optimizers that measure a real step: gradients and weights before it, what it added, and the step before."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tricks.callbacks.layer_names import Layers, layer_of
from lightning_tricks.callbacks.step_rows import StepRows, fit_in_rows
from lightning_tricks.callbacks.step_sums import StepSums, WeightCopies, bytes_of_copy
from lightning_tricks.callbacks.steps import after_real_steps
from lightning_tricks.functional.checks import message


@dataclass(frozen=True)
class Measured:
    """What is measured of an optimizer, as long as what it has stays what it is.

    Args:
        every: all its parameters, held so that no other gets the number of one of them.
        state: what this depends on; None if it is to be looked at anew each time.
        parameters: those that are measured.
        layers: their layers.
        rows: what measures them, where they are a small model's.
    """

    every: Sequence[Tensor]
    state: Sequence[Any] | None
    parameters: Sequence[Tensor]
    layers: Sequence[str | None]
    rows: StepRows | None


class StepWatch:
    """Measure the next real step of each optimizer that is due.

    Args:
        owner: callback named in an error.
        layers: how parameters are grouped.
        wanted: names of the sums, out of `SUMS`.
        max_memory: bytes of the copies of weights, of all optimizers together; None for no limit.
    """

    def __init__(self, owner: str, layers: Layers, wanted: set[str], max_memory: int | None) -> None:
        self.owner, self.layers, self.wanted, self.max_memory = owner, layers, wanted, max_memory
        self.scaler: Any = None  # a GradScaler
        self.due: set[int] = set()  # optimizers whose next real step is measured, by id
        self.leading: set[int] = set()  # those whose next steps may be the last before one that is measured
        self.measured: list[StepSums | StepRows] = []
        self._steps: dict[int, StepSums | StepRows] = {}  # of the batch
        self._module: nn.Module | None = None
        self._known: dict[int, Measured] = {}  # by an optimizer's id
        self._turns: Sequence[set[str | None]] = []  # layers to measure the updates of in one step; none: all
        self._told = False  # of a layer that is too large for its turn
        self.counts: Counter[int] = Counter()  # steps that were measured, by an optimizer's id
        self._stepped: set[int] = set()  # optimizers that did in this step of the trainer
        self._copies: dict[int, WeightCopies] = {}
        self._last: dict[int, WeightCopies] = {}  # updates of the step before
        self._optimizers: list[Optimizer] = []  # that have the hooks
        self._handles: list[RemovableHandle] = []

    def __bool__(self) -> bool:
        """Whether it watches."""
        return bool(self._handles)

    def begin_batch(self, module: nn.Module, optimizers: list[Optimizer]) -> None:
        """Watch the optimizers, and see what the parameters are.

        Args:
            module: with the parameters by name.
            optimizers: all of the trainer.
        """
        self._module = module
        self._turns = self.turns(module, begun=True)
        if self._optimizers != optimizers or not all(map(_is_last, self._handles)):
            self.unhook()
            self._optimizers = list(optimizers)
            self._handles = after_real_steps(self.owner, optimizers, self._after_step, self._before_step)

    def turns(self, module: nn.Module, begun: bool = False) -> Sequence[set[str | None]]:
        """The layers whose updates are measured one after another, so that copies fit into memory; none if all do.

        Args:
            module: as for `begin_batch`.
            begun: whether training has: a layer that was unfrozen since and does not fit has no turn then.
        Raises:
            ValueError: a layer does not fit.
        """
        if self.max_memory is None or "update" not in self.wanted:
            return []
        sizes: dict[str | None, int] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                layer = layer_of(name, self.layers)
                sizes[layer] = sizes.get(layer, 0) + bytes_of_copy(parameter)
        small = {layer: size for layer, size in sizes.items() if size <= self.max_memory}
        smaller = "" if self.layers == "tensor" else "measure smaller layers (layers='tensor'), "
        fix = f"Raise it, {smaller}or leave the measures of updates out"
        if begun and len(small) < len(sizes):
            if not self._told:
                large = {layer or "the rest": size for layer, size in sizes.items() if layer not in small}
                condition = f"at least {max(large.values())} (bytes) for what was unfrozen, {', '.join(large)}"
                told = message(self.owner, "max_extra_memory", condition, self.max_memory, fix)
                rank_zero_warn(f"{told} Its updates are not measured.")
            self._told = True
            return turns_that_fit(self.owner, small, self.max_memory, fix) or [set(small)]
        return turns_that_fit(self.owner, sizes, self.max_memory, fix)

    def end_batch(self) -> None:
        """Forget what belongs to the batch."""
        self._steps.clear()
        self.measured.clear()

    def end_step(self) -> None:
        """What comes next does not follow the last step of an optimizer that did not step now."""
        for key, last in self._last.items():
            if key not in self._stepped:
                last.parameters = []
        self.leading.clear()
        self._stepped.clear()

    def forget_names(self) -> None:
        """Look anew at what the module's parameters are called."""
        self._known = {}

    def unhook(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers = [], []

    def of(self, optimizer: Optimizer) -> Measured:
        """What is measured of an optimizer: parameters of the module that are trained now.

        Args:
            optimizer: one of those that are watched.
        """
        every = [p for group in optimizer.param_groups for p in group["params"]]
        state = [(id(p), p.requires_grad, p.shape, p.dtype) for p in every]
        known = self._known.get(id(optimizer))
        if known is None or known.state != state:
            names = {} if self._module is None else {id(p): name for name, p in self._module.named_parameters()}
            parameters = [p for p in every if p.requires_grad and p.numel() > 0 and id(p) in names]
            layers = [layer_of(names[id(p)], self.layers) for p in parameters]
            small = self.max_memory is None and fit_in_rows(parameters, layers, self.wanted)
            rows = StepRows(parameters, layers, self.wanted) if small else None
            all_named = all(id(p) in names for p in every)  # else one may get its name later
            known = Measured(every, state if all_named else None, parameters, layers, rows)
            self._known[id(optimizer)] = known
        return known

    def see_gradients(self, optimizer: Optimizer) -> None:
        """The gradients are fresh and not clipped; of several closures those of the first count.

        Args:
            optimizer: which is about to step with them.
        """
        if id(optimizer) in self.due and id(optimizer) not in self._steps:
            self._step(optimizer).add_gradients(self._scale(optimizer))

    def loss_scale(self, device: torch.device) -> Tensor | float:
        """What a GradScaler multiplies the loss by, without waiting for the device as `get_scale()` would.

        Args:
            device: of the result.
        """
        scale: Tensor | float = 1.0
        return scale if self.scaler is None else self.scaler.scale(torch.ones((), device=device))

    def _scale(self, optimizer: Optimizer) -> Tensor | float:
        """What the gradients are still multiplied by: a fused optimizer unscales inside its step."""
        if self.scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    return self.loss_scale(parameter.device)
        return 1.0

    def _step(self, optimizer: Optimizer) -> StepSums | StepRows:
        """What is measured in the step of an optimizer; each parameter with one optimizer only."""
        step = self._steps.get(id(optimizer))
        if step is None:
            step = self._steps[id(optimizer)] = self._new_step(self.of(optimizer), self.counts[id(optimizer)])
        return step

    def _new_step(self, known: Measured, count: int) -> StepSums | StepRows:
        taken = {id(p) for step in self._steps.values() for p in step.parameters} if self._steps else set()
        if known.rows is not None and taken.isdisjoint(map(id, known.parameters)):
            known.rows.begin()
            return known.rows
        chosen = [i for i, p in enumerate(known.parameters) if id(p) not in taken]
        layers, updated = [known.layers[i] for i in chosen], None
        if self._turns:
            turn = self._turns[count % len(self._turns)]
            updated = [i for i, layer in enumerate(layers) if layer in turn]
        return StepSums([known.parameters[i] for i in chosen], layers, self.wanted, updated)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Measure what there is before the step: where that calls a closure, after the first call of it."""
        if id(optimizer) not in self.due and id(optimizer) not in self.leading:
            return None
        by_name = kwargs.get("closure") is not None
        closure = kwargs["closure"] if by_name else args[1] if len(args) > 1 else None  # args[0] is the optimizer
        if not callable(closure):
            self._begin(optimizer)
            return None
        calls = 0

        def then_measure() -> Any:
            nonlocal calls
            loss, calls = closure(), calls + 1
            if calls == 1:
                self._begin(optimizer)
            return loss

        if by_name:
            return args, {**kwargs, "closure": then_measure}
        return (args[0], then_measure, *args[2:]), kwargs

    def _begin(self, optimizer: Optimizer) -> None:
        step, scale = self._step(optimizer), self._scale(optimizer)
        if isinstance(step, StepSums) and "update" in self.wanted:
            copies = self._copies.get(id(optimizer)) or WeightCopies()
            if self.max_memory is not None:
                self._copies = {}  # others are freed before there are these
            self._copies[id(optimizer)] = step.copies = copies
            copies.take([step.parameters[i] for i in step.updated])
        if id(optimizer) in self.due:
            if not step.has_gradients:  # an optimizer of the user's own, past Lightning's hook
                step.add_gradients(scale)
            step.add_before_step(scale)

    def _after_step(self, optimizer: Optimizer) -> None:
        key = id(optimizer)
        if key not in self._steps or (key not in self.due and key not in self.leading):
            return
        self._stepped.add(key)
        step, last = self._steps[key], self._last.get(key)
        if isinstance(step, StepRows):
            step.add_update()
        elif step.copies is not None:
            step.copies.subtract()
            if key in self.due:
                step.add_update(last)
            if "last" in self.wanted:
                self._copies[key], self._last[key] = last or WeightCopies(), step.copies
            step.copies = None
        if key in self.due:
            self.due.discard(key)  # of several steps in one batch the first is measured
            self.counts[key] += 1
            self.measured += [step] if step.parameters else []


def _is_last(handle: RemovableHandle) -> bool:
    """Whether a hook is the last of its kind: what others do to the weights belongs to the step."""
    hooks: Any = handle.hooks_dict_ref()
    return hooks is not None and next(reversed(hooks), None) == handle.id


def turns_that_fit(owner: str, sizes: Mapping[str | None, int], limit: int, fix: str) -> Sequence[set[str | None]]:
    """Layers in groups of at most so many bytes, in their order; none where all of them fit at once.

    Args:
        owner: callback named in an error.
        sizes: bytes of each layer; of None, what is in the total alone.
        limit: bytes.
        fix: what an error advises.
    Raises:
        ValueError: a layer is larger, or there are none.
    Example:
        >>> turns_that_fit("UpdateMonitor", {"a": 2, "b": 2, "c": 3}, limit=5, fix="Raise it") == [{"a", "b"}, {"c"}]
        True
    """
    if sum(sizes.values()) <= limit:
        return []
    layers = {layer: size for layer, size in sizes.items() if layer is not None}
    least = max(layers.values()) if layers else sum(sizes.values())
    if least > limit:
        condition = f"at least {least} (bytes; a copy of the largest layer)"
        raise ValueError(message(owner, "max_extra_memory", condition, limit, fix))
    turns: list[set[str | None]] = []
    room = 0
    for layer, size in layers.items():
        if size > room:
            turns.append(set())
            room = limit
        turns[-1].add(layer)
        room -= size
    return turns
