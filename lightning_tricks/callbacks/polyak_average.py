"""The plain mean of the weights over the tail of the run, evaluated instead of them."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_tricks.callbacks.batch_norm import update_batch_norm
from lightning_tricks.callbacks.ema import EMA
from lightning_tricks.functional.averaging import mean
from lightning_tricks.functional.checks import message
from lightning_tricks.functional.schedules import Duration, Schedule


class PolyakAverage(EMA):
    """Average the weights over the tail of the run with equal weights, and evaluate the mean instead of them.

        average = mean of the weights after each step from `start` on

    Everything else is as in `EMA`, of which it is a kind: validation, test and checkpoints use the mean once it has
    started. A batch-norm layer's running statistics are averaged too, unless they are estimated anew.

    Args:
        start: stretch of the run that is left out: `int` = optimizer steps, `float` in (0, 1) = fraction of the run,
            `"3ep"` = epochs.
        every_n_steps: how often weights are taken into the mean, in the same units: `"1ep"` takes those at the end of
            each epoch, as SWA does; a schedule with cycles, as `CosineRestarts(5)`, those at the end of each cycle.
        update_bn: estimate the running statistics of the batch-norm layers that train anew, as the mean and variance of
            their inputs over the training data of all ranks, each time before the mean is validated and at the end: the
            data are read once more each time. The module is called with a batch, or with the first item of a sequence;
            another batch needs a function of (module, batch) here that runs the module. A checkpoint has the statistics
            of the last estimate, averaged with those of the steps since.
        evaluate: as in `EMA`, and so are the others:
        device: `"cpu"` or None.
        dtype: `"float32"`, `"float64"` or None.
        include: patterns of names, or None.
        exclude: patterns of names.
        buffers: `"average"` or `"copy"`.
    Raises:
        TypeError, ValueError: a value out of range, and what `EMA` refuses.
    References:
        Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; once an epoch and with
        statistics anew Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018,
        arXiv:1803.05407; at the end of cycles Garipov et al., 2018, arXiv:1802.10026.
    Example:
        >>> from lightning_tricks import PolyakAverage
        >>> PolyakAverage(start=0.5, every_n_steps="1ep").settings
        {'start': 0.5, 'every_n_steps': '1ep'}
    """

    owner = "PolyakAverage"

    def __init__(
        self,
        start: Duration = 0.75,
        *,
        every_n_steps: Duration | Schedule = 1,
        update_bn: bool | Callable[[pl.LightningModule, Any], Any] = False,
        evaluate: Literal["average", "raw", "both"] = "average",
        device: Literal["cpu"] | None = None,
        dtype: Literal["float32", "float64"] | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        buffers: Literal["average", "copy"] = "average",
    ) -> None:
        super().__init__(
            mean,
            start=start,
            every_n_steps=every_n_steps,
            evaluate=evaluate,
            device=device,
            dtype=dtype,
            include=include,
            exclude=exclude,
            buffers=buffers,
        )
        if not isinstance(update_bn, bool) and (isinstance(update_bn, type) or not callable(update_bn)):
            fix = "True calls the module with the first item of a batch"
            raise TypeError(message(self.owner, "update_bn", "a bool or a function of (module, batch)", update_bn, fix))
        if update_bn is not False and evaluate == "raw":
            fix = "Choose 'average' or 'both', or leave update_bn out"
            raise ValueError(message(self.owner, "evaluate", "'average' or 'both' with update_bn", evaluate, fix))
        self.labels = ["mean"]
        self.update_bn = update_bn
        self._training: list[_BatchNorm] | None = None  # the layers that training updates

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's configuration shows."""
        shown = {name: value for name, value in super().settings.items() if name != "decay"}
        return shown if self.update_bn is False else {**shown, "update_bn": True}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the average of a checkpoint or of the fit before."""
        self._guard(pl_module)
        self._training = None
        super().on_fit_start(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Resume the average."""
        self._guard(pl_module)
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _guard(self, pl_module: pl.LightningModule) -> None:
        """Let all that a new estimate writes belong to what is shown, and not to the raw weights."""
        if self.update_bn is not False:
            layers = [(name, layer) for name, layer in pl_module.named_modules() if isinstance(layer, _BatchNorm)]
            self._averages.guarded = [f"{name}.{key}" for name, layer in layers for key, _ in layer.named_buffers()]

    def _update(self, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        super()._update(pl_module, optimizer)
        if self._training is None and self.update_bn is not False:
            # A layer that the user froze in eval() keeps its statistics; in validation all layers are in eval().
            self._training = [part for part in pl_module.modules() if isinstance(part, _BatchNorm) and part.training]

    def _put(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super()._put(trainer, pl_module)
        if self.update_bn is not False and self._averages.raw is not None and self._training is not None:
            forward = None if self.update_bn is True else self.update_bn
            update_batch_norm(self.owner, trainer, pl_module, self._training, forward)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_training": None}
