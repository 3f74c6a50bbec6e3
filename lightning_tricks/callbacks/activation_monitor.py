"""How the outputs of layers are distributed, and the gradients that come back, measured on logged steps only."""

from collections.abc import Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.utils.hooks import RemovableHandle

from lightning_tricks.callbacks.steps import refuse_sharded, refuse_twins, say_if_never_due, state_without_module
from lightning_tricks.functional.activations import bounds, first_tensor, statistics, sums, whole
from lightning_tricks.functional.checks import check_count, check_flag, message
from lightning_tricks.functional.slots import plain_name
from lightning_tricks.loggers import log_scalars, log_settings

OUTPUT, INPUT_GRADIENT, OUTPUT_GRADIENT = "activation", "input_gradient", "output_gradient"


class ActivationMonitor(Callback):
    """Log mean, spread, share of zeros and of saturation of each layer's outputs, and on request its gradients' spread.

        activation_mean = mean(outputs),  activation_std = standard deviation(outputs)
        activation_zeros = share of outputs that are 0: of a ReLU, how much of it is dead
        activation_saturated = share of outputs within 1 % of the range from either end

    All numbers that a layer puts out in a step are one set: every batch of an accumulated step, every call of a layer
    that is used several times, every rank; a step's numbers are the same on all ranks. What checkpointed layers compute
    again in the backward pass does not count twice, and validation does not count. Statistics are of float32 at least,
    also under autocast. Saturation is that of bounded functions: Tanh, Sigmoid, Hardtanh, ReLU6, Hardsigmoid, Softsign.
    Of a tuple or a mapping the first floating tensor counts. Functions, as `F.relu`, are no layers, nor are modules
    whose `forward` is called past its hooks. Keys are `activation_mean/body.1`, and so on.

    Only every n-th step is measured: hooks are there for its batches alone, and one transfer to the host and one row in
    each logger come of it; other steps cost nothing. Training is the same to the bit with and without it, but for
    compiled modules: these run as they were written on logged steps, since what is compiled has no hooks, and rounding
    and random draws may differ there. Without a logger nothing is measured.

    Args:
        every_n_steps: how often, at least 1; counted as Lightning counts `log_every_n_steps`: optimizer steps, or
            batches where the module optimizes by hand.
        layers: patterns of module names (`"encoder.*"`), any module may be one; None takes the layers that have
            parameters of their own, frozen ones too, and torch's activation functions. TorchScript's modules, which
            take no such hooks, are left out.
        gradients: whether to log `input_gradient_std` and `output_gradient_std` too: the spread of the loss's
            derivatives by the tensors that go into a layer and come out, in all their uses (beside a residual branch
            too). They are those that Lightning propagates: unscaled, of each rank's own loss, which it divides by the
            number of accumulated batches. Layers in a checkpoint of `use_reentrant=True` have none.
    Raises:
        TypeError, ValueError: an argument out of range, a pattern without a module or of one of TorchScript, another
            ActivationMonitor in the Trainer, FSDP1 or DeepSpeed.
    References:
        Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS 2010,
        figures 2 to 4 and 7.
        Deviates: numbers, not histograms.
    Example:
        >>> from lightning_tricks.callbacks.activation_monitor import ActivationMonitor
        >>> ActivationMonitor(layers=["encoder.*"]).settings
        {'every_n_steps': 50, 'layers': ['encoder.*'], 'gradients': False}
    """

    def __init__(
        self, every_n_steps: int = 50, layers: str | Sequence[str] | None = None, gradients: bool = False
    ) -> None:
        check_count("ActivationMonitor", "every_n_steps", every_n_steps, 1, "optimizer steps", "50 is the default")
        check_flag("ActivationMonitor", "gradients", gradients, "True logs two more numbers of each layer")
        self.every_n_steps = every_n_steps
        self.layers = _patterns(layers)
        self.gradients = gradients
        self.last: dict[str, float] = {}
        self._undo = ExitStack()
        self._layers: dict[str, nn.Module] = {}
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._scale: Tensor | None = None
        self._measuring = self._backward = False

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's configuration shows."""
        return {"every_n_steps": self.every_n_steps, "layers": self.layers, "gradients": self.gradients}

    # ------------------------------------------------------------------ when

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be measured, and a second owner of the keys."""
        refuse_twins(self, trainer, "the keys activation_mean, activation_std and so on")
        refuse_sharded("ActivationMonitor", trainer, dtensors=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look for the layers while there is time to say that they are missing."""
        self._chosen(pl_module)
        log_settings(self, trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hook into the layers if the coming batch is one of a logged step."""
        if not self._is_due(trainer):
            return
        self._undo.close()
        self._layers = self._chosen(pl_module)
        self._undo.enter_context(torch.compiler.set_stance("force_eager"))  # a compiled forward does not see new hooks
        for name, layer in self._layers.items():
            self._undo.callback(layer.register_forward_hook(partial(self._after_layer, name)).remove)
            if self.gradients:
                hook = layer.register_forward_pre_hook(partial(self._before_layer, name), with_kwargs=True)
                self._undo.callback(hook.remove)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if self.gradients and scaler is not None:
            self._scale = scaler.scale(torch.ones((), device=trainer.strategy.root_device))
        self._measuring = True

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Expect gradients, and forward passes that are only repeated ones."""
        self._backward = True

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Expect outputs again."""
        self._backward = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the hooks away; at the step's end, move what was measured to the host at once and log it in one row."""
        self._undo.close()
        self._measuring = self._backward = False
        if not self._is_due(trainer) or trainer.fit_loop._should_accumulate():
            return
        row = self._row(trainer, pl_module)
        self._forget()
        if row:
            self.last = row
            log_scalars(trainer, row)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of a step that the epoch ended in the middle of."""
        self._forget()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say if no step was one to log."""
        say_if_never_due("ActivationMonitor", trainer, self.every_n_steps)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the hooks away."""
        self._forget()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the hooks away."""
        self._forget()

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """The same on all ranks, whatever their batches are: it decides whether they add up."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        return step % self.every_n_steps == 0 and bool(trainer.loggers) and trainer.log_every_n_steps != 0

    def _forget(self) -> None:
        self._undo.close()
        self._layers, self._sums, self._scale = {}, {}, None
        self._measuring = self._backward = False

    def __getstate__(self) -> dict[str, Any]:
        kept = {"_undo": ExitStack(), "_layers": {}, "_sums": {}, "_scale": None}
        return state_without_module(self, **kept, _measuring=False, _backward=False)

    # ------------------------------------------------------------------ what

    def _chosen(self, pl_module: pl.LightningModule) -> dict[str, nn.Module]:
        """The layers by the names they had before they were compiled; one that is there twice by its first."""
        found = {plain_name(name): child for name, child in pl_module.named_modules() if not _is_wrapper(child)}
        found.pop("", None)
        if self.layers is None:
            return {name: child for name, child in found.items() if _is_layer(child)}
        for pattern in self.layers:
            if not any(fnmatchcase(name, pattern) for name in found):
                fix = "Give patterns of the names that named_modules() has"
                raise ValueError(message("ActivationMonitor", "layers", "patterns of module names", pattern, fix))
        chosen = {name: child for name, child in found.items() if any(fnmatchcase(name, p) for p in self.layers)}
        scripted = [name for name, child in chosen.items() if isinstance(child, torch.jit.ScriptModule)]
        if scripted:
            condition, fix = "patterns without modules of TorchScript", "They take no hooks: name the others"
            raise ValueError(message("ActivationMonitor", "layers", condition, ", ".join(scripted), fix))
        return chosen

    def _before_layer(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._expect_gradient((INPUT_GRADIENT, name), first_tensor((args, kwargs)))

    def _after_layer(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None and self._expects_outputs():
            self._add((OUTPUT, name), tensor, bounds(layer))
        if self.gradients:
            self._expect_gradient((OUTPUT_GRADIENT, name), tensor)

    def _expects_outputs(self) -> bool:
        """Not in a copy of the module, nor in what is computed again for the backward pass."""
        return self._measuring and not self._backward

    def _expect_gradient(self, key: tuple[str, str], tensor: Tensor | None) -> None:
        # Not a module's backward hook: that puts nodes of its own into the graph, and breaks layers that work in place.
        if tensor is not None and tensor.requires_grad and self._expects_outputs():
            handle: RemovableHandle = tensor.register_hook(partial(self._after_gradient, key))  # type: ignore[no-untyped-call]
            self._undo.callback(handle.remove)

    def _after_gradient(self, key: tuple[str, str], gradient: Tensor | None) -> None:
        if self._backward and gradient is not None:  # a derivative that is a part of the loss is not the loss's
            self._add(key, gradient)

    def _add(self, key: tuple[str, str], values: Tensor, ends: tuple[float, float] | None = None) -> None:
        found = sums(whole(values), ends)
        self._sums[key] = self._sums[key] + found if key in self._sums else found

    def _row(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        layers = self._layers or self._chosen(pl_module)  # a rank may have had no batch
        if not layers:
            return {}
        kinds = (OUTPUT, INPUT_GRADIENT, OUTPUT_GRADIENT) if self.gradients else (OUTPUT,)
        device = trainer.strategy.root_device
        nothing = sums(torch.zeros(0, device=device))
        total = torch.stack([self._sums.get((kind, name), nothing).to(device) for kind in kinds for name in layers])
        if trainer.world_size > 1:
            dist.all_reduce(total)  # the strategy's own waits at a barrier before
        found = torch.cat([total[:, :1], statistics(total)], 1).view(len(kinds), len(layers), 5)
        if self._scale is not None:
            found[1:, :, 2] /= self._scale
        row = {}
        for kind, table in zip(kinds, found.tolist(), strict=True):
            for (name, layer), (count, mean, std, zeros, saturated) in zip(layers.items(), table, strict=True):
                if count == 0:
                    continue  # it was not called, or no gradient came
                row[f"{kind}_std/{name}"] = std
                if kind == OUTPUT:
                    row |= {f"{kind}_mean/{name}": mean, f"{kind}_zeros/{name}": zeros}
                    if bounds(layer) is not None:
                        row[f"{kind}_saturated/{name}"] = saturated
        return row


def _patterns(layers: Any) -> list[str] | None:
    if layers is None:
        return None
    patterns = [layers] if isinstance(layers, str) else layers
    fix = 'Give names or patterns as "encoder.*", or None'
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(message("ActivationMonitor", "layers", "patterns of module names", layers, fix))
    if not patterns:
        raise ValueError(message("ActivationMonitor", "layers", "one pattern at least", layers, fix))
    return list(patterns)


def _is_wrapper(module: nn.Module) -> bool:
    """What torch.compile puts around a module, which has the module's own name."""
    return "_orig_mod" in module._modules


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, (ParametrizationList, torch.jit.ScriptModule)):
        return False  # the one puts out weights, the other takes no hooks that are not scripted
    own = any(parameter is not None for parameter in module._parameters.values()) or is_parametrized(module)
    return own or type(module).__module__ == nn.ReLU.__module__
