"""When an optimizer has really stepped, and which settings no callback of this package can serve."""

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tricks.functional.checks import message
from lightning_tricks.functional.norms import tensor_norms

LIGHTNINGS_AVERAGES = (WeightAveraging, StochasticWeightAveraging)
"""Lightning's own callbacks that own the weights a run ends with."""


def is_real_step(optimizer: Optimizer) -> bool:
    """Whether the step that an optimizer has just ended changed weights.

    A fused optimizer under a GradScaler is called for a skipped step too and carries `found_inf` meanwhile; a
    `training_step` that returned None leaves no gradients to step with; and for a sharded checkpoint torch lets an
    optimizer without a state, plain SGD, step with gradients of zero at a rate of zero.

    Args:
        optimizer: a torch optimizer, inside its step post-hook.
    Returns:
        Whether the step counts.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and found_inf.item() > 0:
        return False
    if not _has_gradients(optimizer):
        return False
    for group in optimizer.param_groups:
        if not _is_zero(group.get("lr")):
            return True
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(tensor_norms(gradients).any())


def _has_gradients(optimizer: Optimizer) -> bool:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                return True
    return False


def _is_zero(rate: Any) -> bool:
    """Whether a rate is 0; one on a GPU is not looked at, since torch puts a number of the host there."""
    return rate is not None and not (isinstance(rate, Tensor) and not rate.is_cpu) and bool(rate == 0)


PreHook = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]
PostHook = Callable[[Optimizer, object, object], None]


def after_real_steps(
    owner: str, optimizers: Iterable[object], call: Callable[[Optimizer], None], before: PreHook | None = None
) -> list[RemovableHandle]:
    """Call a function after every real step of these optimizers.

    Args:
        owner: callback named in an error.
        optimizers: the trainer's optimizers.
        call: called with the optimizer that stepped.
        before: called before every step, as a pre-hook of torch is.
    Returns:
        Handles whose `remove()` ends it.
    Raises:
        TypeError: an optimizer without step hooks.
    """
    handles, chosen = [], list(optimizers)
    for optimizer in chosen:
        if not isinstance(optimizer, Optimizer):
            fix = "Leave the callback out under this strategy"
            raise TypeError(message(owner, "optimizer", "a torch.optim.Optimizer", type(optimizer).__name__, fix))
    for optimizer in chosen:
        begin, end = before, _if_real(call)
        if sum("step" in vars(base) for base in type(optimizer).__mro__) > 2:  # Optimizer's own and another
            begin, end = _outermost(call, before)
        if begin is not None:
            handles.append(optimizer.register_step_pre_hook(begin))
        handles.append(optimizer.register_step_post_hook(end))
    return handles


def _if_real(call: Callable[[Optimizer], None]) -> PostHook:
    def end(optimizer: Optimizer, args: object, kwargs: object) -> None:
        if is_real_step(optimizer):
            call(optimizer)

    return end


def _outermost(call: Callable[[Optimizer], None], before: PreHook | None) -> tuple[PreHook, PostHook]:
    """Hooks for which a `super().step()` is a part of the step that it is in: torch may run all hooks for both."""
    real = False  # one of its parts was: it may have let go of the gradients since

    def begin(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        nonlocal real
        if _is_inner(optimizer, sys._getframe(1)):
            return None
        real = False
        return None if before is None else before(optimizer, args, kwargs)

    def end(optimizer: Optimizer, args: object, kwargs: object) -> None:
        nonlocal real
        real = real or is_real_step(optimizer)
        if real and not _is_inner(optimizer, sys._getframe(1)):
            real = False
            call(optimizer)

    return begin, end


def _is_inner(optimizer: Optimizer, wrapper: FrameType) -> bool:
    """Whether what torch wraps around a step runs within another one of the same optimizer.

    The stack says so, and not a count, which a step that raises would leave wrong.
    """
    caller = wrapper.f_back
    while caller is not None:
        if caller.f_code is wrapper.f_code and caller.f_locals.get("self") is optimizer:
            return True
        caller = caller.f_back
    return False


def state_without_module(callback: pl.Callback, **reset: Any) -> dict[str, Any]:
    """What a copy of a callback takes along: not the module, to which Lightning ties `log` and `log_dict`.

    Args:
        callback: any.
        reset: attributes that the copy has other values of.
    """
    return {**{key: value for key, value in vars(callback).items() if key not in ("log", "log_dict")}, **reset}


def name_in(checkpoint: dict[str, Any], callback: pl.Callback) -> None:
    """Put a callback among those of a checkpoint, so that Lightning says at a resume if it is missing there.

    Args:
        checkpoint: what is saved, the callback's state in keys of its own.
        callback: without a `state_dict`: Lightning refuses two of one class that have one before they can say why.
    """
    checkpoint.setdefault("callbacks", {}).setdefault(callback.state_key, {})


def say_if_never_due(owner: str, trainer: pl.Trainer, every_n_steps: int) -> None:
    """Say at the end of a training that it was shorter than the time between two logged steps.

    Args:
        owner: callback that logs.
        trainer: the trainer in `on_train_end`.
        every_n_steps: how often it logs.
    """
    steps = trainer.fit_loop.epoch_loop._batches_that_stepped
    if trainer.loggers and trainer.log_every_n_steps and not trainer.fast_dev_run and steps < every_n_steps:
        rank_zero_info(
            f"{owner}: nothing was logged, since every_n_steps={every_n_steps} and the run had {steps} steps."
        )


def refuse_sharded(owner: str, trainer: pl.Trainer, dtensors: bool = False) -> None:
    """Raise if the strategy shards the parameters in a way that a callback cannot serve.

    Args:
        owner: callback named in an error.
        trainer: the trainer in its setup.
        dtensors: whether the callback serves parameters in parts, where each is a DTensor (FSDP2, tensor parallelism).
    Raises:
        ValueError: FSDP1, DeepSpeed, or model parallelism without `dtensors`.
    """
    refused: tuple[type[Strategy], ...] = (FSDPStrategy, DeepSpeedStrategy)
    condition, fix = "one that keeps whole parameters on each rank", "Train with DDP or on one device"
    if dtensors:
        condition, fix = f"{condition}, or DTensors", "Train with ModelParallelStrategy (FSDP2), DDP or on one device"
    else:
        refused += (ModelParallelStrategy,)
    if isinstance(trainer.strategy, refused):
        raise ValueError(message(owner, "strategy", condition, type(trainer.strategy).__name__, fix))


def refuse_twins(
    callback: pl.Callback, trainer: pl.Trainer, what: str, rivals: Callable[[Any], bool] = lambda other: True
) -> None:
    """Raise if the trainer has another callback of the same class, where one thing has one owner.

    Args:
        callback: the callback that asks.
        trainer: the trainer in its setup.
        what: the thing that both would own.
        rivals: whether a callback of the class, this one among them, would own the same thing.
    Raises:
        ValueError: there are two.
    """
    owner = next(base for base in type(callback).__mro__ if base.__module__.startswith("lightning_tricks"))
    alike = [type(other).__name__ for other in trainer.callbacks if isinstance(other, owner) and rivals(other)]
    if len(alike) > 1:
        fix = f"Both would own {what}; keep one, or give each what is its own"
        raise ValueError(message(owner.__name__, "callbacks", "the only one of its kind in a Trainer", alike, fix))
