"""How large the gradients, the weights and the true updates are, measured on logged steps only."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tricks.callbacks.shards import hold_parts
from lightning_tricks.callbacks.steps import after_real_steps, refuse_sharded, refuse_twins
from lightning_tricks.functional.checks import check_count, message
from lightning_tricks.functional.norms import group_norms, tensor_norms, update_norms
from lightning_tricks.loggers import log_scalars, log_settings


class UpdateMonitor(Callback):
    """Log the gradient norm, the weight norm and the update:weight ratio, by module and in total.

        grad_norm = norm(gradients),  weight_norm = norm(weights before the step)
        update_ratio = norm(weights after the step - weights before it) / weight_norm

    The update is what the optimizer truly did, whatever its kind: weight decay, momentum and clipping included. A ratio
    of about 1e-3 is healthy as a rule. The gradients are those the step starts from: accumulated, unscaled, averaged
    over ranks, before Lightning clips them (a module that optimizes by hand may have clipped them itself). Keys are
    `grad_norm/total`, `weight_norm/total`, `update_ratio/total` and the same with the name of each module that has
    parameters of its own (`update_ratio/encoder.0`). A module of zeros that moves has a ratio of inf.

    Only every n-th step is measured, with one transfer to the host and one row in each logger, on the step of
    Lightning's own rows; the others cost nothing. A logged step that a GradScaler skipped has no row. Of several
    optimizers each one's next step is measured, and the total is over those that stepped in the batch. Without a logger
    nothing is measured. Of parameters in parts (DTensor: FSDP2, tensor parallelism) the norms are those of the whole
    ones; the ranks exchange sums, and no tensor is gathered.

    Args:
        every_n_steps: how often, at least 1; counted as Lightning counts `log_every_n_steps`: optimizer steps, or
            batches where the module optimizes by hand.
    Raises:
        TypeError, ValueError: an argument out of range, another UpdateMonitor in the Trainer, FSDP1 or DeepSpeed, or
            a module called `total`.
    References:
        Karpathy, "CS231n: Learning and Evaluation", 2015, the ratio of updates to weights.
    Example:
        >>> from lightning_tricks import UpdateMonitor
        >>> UpdateMonitor(every_n_steps=10).every_n_steps
        10
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        check_count("UpdateMonitor", "every_n_steps", every_n_steps, 1, "optimizer steps", "50 is the default")
        self.every_n_steps = every_n_steps
        self.last: dict[str, float] = {}
        self._manual = False
        self._due: set[int] = set()  # optimizers whose next real step is measured, by id
        self._names: dict[int, str] = {}
        self._parameters: dict[int, list[Tensor]] = {}
        self._weights: dict[int, list[Tensor]] = {}
        self._gradients: dict[int, Tensor] = {}
        self._fallback: dict[int, Tensor] = {}
        self._norms: list[tuple[list[str], tuple[Tensor, Tensor, Tensor]]] = []
        self._handles: list[RemovableHandle] = []

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's configuration shows."""
        return {"every_n_steps": self.every_n_steps}

    # ------------------------------------------------------------------ when

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be measured, and a second owner of the keys."""
        refuse_twins(self, trainer, "the keys grad_norm, weight_norm and update_ratio")
        refuse_sharded("UpdateMonitor", trainer, dtensors=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the optimizers, if there is a logger to tell."""
        log_settings(self, trainer)
        if not trainer.loggers or trainer.log_every_n_steps == 0:
            return
        if "total" in {_group(name) for name, _ in pl_module.named_parameters()}:
            fix = "Its keys would be those of the total; rename it"
            raise ValueError(message("UpdateMonitor", "modules", "none called 'total'", "total", fix))
        self._manual = not pl_module.automatic_optimization
        self._handles = after_real_steps("UpdateMonitor", trainer.optimizers, self._after_step)
        self._handles += [optimizer.register_step_pre_hook(self._before_step) for optimizer in trainer.optimizers]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether the coming step is a logged one."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        if self._handles and step % self.every_n_steps == 0:
            self._due = {id(optimizer) for optimizer in trainer.optimizers}
        if self._due:
            hold_parts(pl_module)
            self._names = {id(parameter): _group(name) for name, parameter in pl_module.named_parameters()}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure the gradients while they are fresh, unscaled and unclipped."""
        key = id(optimizer)
        if key not in self._due or (key in self._weights and key in self._gradients):
            return  # not asked for, or a further closure of the same step
        scale = 1.0
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scale = scaler.get_scale()  # a fused optimizer unscales inside its step
        self._gradients[key] = self._gradient_norms(optimizer) / scale

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move what was measured to the host at once, and log it in one row."""
        if self._norms:
            self.last = self._summary()
            log_scalars(trainer, self.last)
        if not self._manual and not trainer.fit_loop._should_accumulate():
            self._due = set()  # a step that was skipped has no row; a module that steps by hand may do so later
        self._forget()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop watching."""
        self._detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching."""
        self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._due = [], set()
        self._forget()

    def _forget(self) -> None:
        self._names, self._parameters, self._weights, self._norms = {}, {}, {}, []
        self._gradients, self._fallback = {}, {}

    def __getstate__(self) -> dict[str, Any]:
        kept = {"every_n_steps": self.every_n_steps, "last": self.last}
        return {**type(self)(self.every_n_steps).__dict__, **kept}

    # ------------------------------------------------------------------ what

    def _measured(self, optimizer: Optimizer) -> list[Tensor]:
        """The parameters that are measured in this step, each with one optimizer only."""
        if id(optimizer) not in self._parameters:
            taken = {id(p) for parameters in self._parameters.values() for p in parameters}
            every = [p for group in optimizer.param_groups for p in group["params"]]
            named = [p for p in every if p.requires_grad and p.numel() > 0 and id(p) in self._names]
            self._parameters[id(optimizer)] = [p for p in named if id(p) not in taken]
        return self._parameters[id(optimizer)]

    @torch.no_grad()
    def _gradient_norms(self, optimizer: Optimizer) -> Tensor:
        return tensor_norms([p.new_zeros(1) if p.grad is None else p.grad for p in self._measured(optimizer)])

    def _before_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        key = id(optimizer)
        if key in self._due and key not in self._weights:
            if self._manual:
                # Of an optimizer of the user's own, past Lightning's hook; where that comes it measures anew.
                self._fallback[key] = self._gradient_norms(optimizer)
            self._weights[key] = [p.detach().clone() for p in self._measured(optimizer)]

    def _after_step(self, optimizer: Optimizer) -> None:
        key = id(optimizer)
        before = self._weights.get(key)
        if key not in self._due or not before:
            return
        self._due.discard(key)  # of several steps in one batch the first is measured
        measured = self._measured(optimizer)
        updates = update_norms(before, [p.detach() for p in measured])
        names = [self._names[id(p)] for p in measured]
        gradients = self._gradients[key] if key in self._gradients else self._fallback[key]
        self._norms.append((names, (gradients, tensor_norms(before), updates)))

    def _summary(self) -> dict[str, float]:
        names = [name for group, _ in self._norms for name in group]
        groups = list(dict.fromkeys(names))
        index = [groups.index(name) for name in names]
        gradients, weights, updates = (
            group_norms(torch.cat([norms[i] for _, norms in self._norms]), index, len(groups)) for i in range(3)
        )
        ratios = torch.where(updates == 0, updates, updates / weights)
        rows = torch.stack([gradients, weights, ratios]).tolist()
        keys = ("grad_norm", "weight_norm", "update_ratio")
        return {
            f"{key}/{name}": x
            for key, row in zip(keys, rows, strict=True)
            for name, x in zip([*groups, "total"], row, strict=True)
        }


def _group(name: str) -> str:
    """The module that owns a parameter; the parameter itself where that is the root."""
    name = name.replace("_orig_mod.", "")  # of a compiled submodule
    return name.rpartition(".")[0] or name
