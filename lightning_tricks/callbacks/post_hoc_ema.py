"""Averages of the weights stored through the run, from which one of any width is put together afterwards."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelPruning
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tricks.callbacks.averages import Averages
from lightning_tricks.callbacks.clock import epoch_length, run_length
from lightning_tricks.callbacks.run_folder import (
    Row,
    claim,
    half_written,
    later_files,
    missing,
    on_rank_zero,
    refuse_missing,
    write_manifest,
    write_whole,
)
from lightning_tricks.callbacks.shards import hold_parts, own_part
from lightning_tricks.callbacks.steps import (
    after_real_steps,
    name_in,
    refuse_sharded,
    refuse_twins,
    state_without_module,
)
from lightning_tricks.callbacks.weights import named_weights
from lightning_tricks.functional.averaging import Averaging, can_average
from lightning_tricks.functional.checks import message
from lightning_tricks.functional.post_hoc import PowerFunction, check_sigma_rel
from lightning_tricks.functional.schedules import Duration, check_duration, resolve_epochs
from lightning_tricks.loggers import log_settings
from lightning_tricks.post_hoc import FORMAT, read_manifest

KEY = "post_hoc_ema"
"""Where a checkpoint has the averages and the run's snapshots."""


class PostHocEMA(Callback):
    """Store averages of the weights through the run; `synthesize_ema` makes one of any width of them afterwards.

        average = decay * average + (1 - decay) * weights,  decay = (1 - 1 / step) ** (gamma + 1)

    after every real optimizer step, for each of a few widths: the decay of `PowerFunction`. A snapshot of all of them
    is written when one is due and at the end, on rank 0, that `torch.load` reads with `weights_only=True` and
    `mmap=True`, beside a `manifest.json`. Both are put in place whole: a crash loses nothing that was there.

    The module is never touched: it works beside EMA, EarlyStopping and any other callback. Steps count as EMA counts
    them. Floating buffers are averaged, as rank 0 has them; what is integer or not finite after the first step, and the
    vectors of spectral norm, are copied into each snapshot. Weights in half precision are averaged in float32.

    Memory: one copy of the weights for each width on rank 0, on the device of the weights; while a snapshot is written
    as much again on the host, and as much in every checkpoint. Disk: as much for each snapshot, 80 or 81 of them; half
    of it with `dtype="float16"`.

    A resumed run goes on in its directory and removes what was written after the checkpoint. In `fast_dev_run` there
    are no snapshots.

    Args:
        sigma_rels: widths of the averages as fractions of the run so far, at least one, each in [1e-6, 0.2887). The two
            of the paper serve targets from 0.03 to 0.25; one alone serves little but itself.
        directory: a folder for this run alone; None takes a new `post_hoc_ema` in the logger's folder, or in the
            Trainer's `default_root_dir`.
        every_n_steps: how often a snapshot is written: `int` = optimizer steps, `float` in (0, 1) = fraction of the
            run, `"1ep"` = epochs. With 16 in a run, targets from 0.04 to 0.2 are still met to 2 % of their profile.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`, what the files hold floating averages in (one that would
            overflow stays as it is); None keeps them as they are averaged. Half precision rounds the result by a few
            units of its own last place, targets below 0.03 by many.
    Raises:
        TypeError: an argument of another type, or an optimizer without step hooks.
        ValueError: a value out of range, a fraction of a run of unknown length, a directory with another run's
            snapshots, snapshots of a checkpoint that are gone, a checkpoint of other widths or of another module,
            parameters that are made during training, FSDP1 or DeepSpeed, another PostHocEMA or a ModelPruning in the
            Trainer.
    References:
        Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024, arXiv:2312.02696,
            section 3 and appendix C.
        Deviates: the files hold float32 by default, not float16.
    Example:
        >>> import lightning as L
        >>> from lightning_tricks import PostHocEMA
        >>> trainer = L.Trainer(callbacks=[PostHocEMA((0.05, 0.1))], logger=False, enable_checkpointing=False)
    """

    owner = "PostHocEMA"

    def __init__(
        self,
        sigma_rels: Sequence[float] = (0.05, 0.1),
        directory: str | None = None,
        *,
        every_n_steps: Duration = 0.0125,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ) -> None:
        fix = "(0.05, 0.1) serves most targets"
        if not isinstance(sigma_rels, (list, tuple)) or not sigma_rels:
            raise TypeError(message(self.owner, "sigma_rels", "a list of at least one width", sigma_rels, fix))
        for width in sigma_rels:
            check_sigma_rel(self.owner, "sigma_rels", width)
        if len(set(sigma_rels)) < len(sigma_rels):
            raise ValueError(message(self.owner, "sigma_rels", "different from each other", sigma_rels, fix))
        if directory is not None and "://" in str(directory):
            fix = "Copy the snapshots there afterwards"
            raise ValueError(message(self.owner, "directory", "a local folder", directory, fix))
        check_duration(self.owner, "every_n_steps", every_n_steps, least=1)
        if dtype not in (None, "float32", "bfloat16", "float16"):
            fix = "None keeps the averages' own"
            raise ValueError(message(self.owner, "dtype", "'float32', 'bfloat16' or 'float16'", dtype, fix))
        self.sigma_rels, self.directory = tuple(sigma_rels), directory
        self.every_n_steps, self.dtype = every_n_steps, dtype
        self._plan = Averaging(0.0, every_n_steps=every_n_steps)  # says which steps a snapshot is due after
        self._decays = [PowerFunction(width) for width in sigma_rels]
        self._total_steps = math.inf
        self._averages = Averages(self.owner, dtype=torch.float32)  # in half precision an average stands still
        self._watched: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []
        self._forget()

    def _forget(self) -> None:
        self._steps = 0
        self._averages.end()
        self._loaded: list[dict[str, Tensor]] = []  # averages of a checkpoint, until the training starts
        self._folder: str | None = None
        self._run: str | None = None  # which run the folder belongs to
        self._rows: list[Row] = []

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's configuration shows."""
        return {"sigma_rels": list(self.sigma_rels), "every_n_steps": self.every_n_steps, "dtype": self.dtype}

    @property
    def snapshots(self) -> list[Path]:
        """The files of this run's snapshots so far, in the order of their steps."""
        return [Path(self._folder or ".") / row["file"] for row in self._rows]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse weights that cannot be followed, and a second callback of the kind."""
        refuse_twins(self, trainer, "the averages that are stored")
        if any(isinstance(other, ModelPruning) for other in trainer.callbacks):
            fix = "It replaces the parameters that are averaged; prune after the training"
            raise ValueError(message(self.owner, "callbacks", "without ModelPruning", "ModelPruning", fix))
        refuse_sharded(self.owner, trainer, dtensors=True)

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the directory this run's, and average after every real optimizer step from here on."""
        if not trainer.fast_dev_run:
            self._begin(trainer, pl_module)
        log_settings(self, trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End with a snapshot, one that is not due if need be."""
        if self._handles and self._steps > (self._rows[-1]["step"] if self._rows else 0):
            self._snapshot(trainer, due=False)
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop averaging."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the device, as the module does."""
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._averages.follow()
        self._averages.forget_module()

    # ------------------------------------------------------------------ what

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self._forget()
        elif self._steps == 0:
            rank_zero_info(f"{self.owner}: the run so far was trained without it; its steps are counted from here.")
        optimizers, steps_per_epoch = len(trainer.optimizers), epoch_length(trainer)
        self._plan = resolve_epochs(
            Averaging(0.0, every_n_steps=self.every_n_steps),
            math.inf if steps_per_epoch is None else steps_per_epoch * optimizers,
        )
        if self._plan.needs_length:
            fix = "Give every_n_steps= in optimizer steps"
            self._total_steps = run_length(self.owner, trainer, fix) * optimizers
        default = Path(trainer.log_dir or trainer.default_root_dir) / "post_hoc_ema"
        if self._sharded(trainer):
            self._take_up(pl_module)

        def begin() -> tuple[str, str, list[Row]]:
            if not self._sharded(trainer):
                self._take_up(pl_module)
            return self._claim(default)

        self._folder, self._run, self._rows = on_rank_zero(trainer, begin)
        self._loaded = []
        rank_zero_info(f"{self.owner}: snapshots go to {self._folder} (every_n_steps={self.every_n_steps!r}).")
        self._watch(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Follow the module if it got other optimizers."""
        if self._handles and trainer.strategy.optimizers is not self._watched:
            self._watch(trainer)

    def _watch(self, trainer: pl.Trainer) -> None:
        for handle in self._handles:
            handle.remove()
        self._watched = trainer.strategy.optimizers
        self._handles = after_real_steps(self.owner, trainer.optimizers, partial(self._advance, trainer))

    def _sharded(self, trainer: pl.Trainer) -> bool:
        """Whether every rank has a part of the weights, and averages that."""
        return isinstance(trainer.strategy, ModelParallelStrategy)

    def _take_up(self, pl_module: pl.LightningModule) -> None:
        """Go on with the averages of a checkpoint or of the fit before; refuse those of another module."""
        averages, loaded = self._averages, self._loaded
        here = {name: t if loaded else own_part(t) for name, t in named_weights(pl_module).items()}
        known: Sequence[Mapping[str, Tensor | None]] = loaded or averages.tensors or [{}]
        first = {name: tensor for name, tensor in known[0].items() if tensor is not None}
        unlike = [name for name in first if name not in here]
        learned = [name for name, tensor in here.items() if isinstance(tensor, Parameter)]
        unlike += [name for name in learned if name in first and here[name].shape != first[name].shape]
        unlike += [name for name in learned if first and name not in first and can_average(own_part(here[name]))]
        if unlike:
            condition = "the one whose weights are in the averages"
            fix = "Go on with that module, or begin a new run"
            raise ValueError(message(self.owner, "module", condition, f"others at {', '.join(unlike)}", fix))
        averages.find(pl_module)
        averages.follow()
        if loaded:
            averages.begin(len(loaded), here.keys() - first.keys())
            for index, values in enumerate(loaded):
                averages.fill(index, values)

    def _advance(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        self._steps += 1
        if trainer.is_global_zero or self._sharded(trainer):
            if self._averages.begun:
                self._averages.update([decay(self._steps - 1, self._total_steps) for decay in self._decays])
            else:
                self._averages.find(trainer.lightning_module)
                self._averages.begin(len(self._decays))
        # Here and not at the batch's end, where a checkpoint of this step may have been written already.
        if self._plan(self._steps, 1, self._total_steps) is not None:
            self._snapshot(trainer, due=True)

    def _snapshot(self, trainer: pl.Trainer, due: bool) -> None:
        row: Row = {"file": f"snapshot-step={self._steps}.pt", "step": self._steps, "due": due}
        # What all ranks have parts of, they put together; else rank 0's error must come to all ranks.
        gathered = self._content(trainer.lightning_module) if self._sharded(trainer) else None

        def write() -> list[Row]:
            folder = Path(self._folder or ".")
            content = gathered or self._content(trainer.lightning_module)

            def save(file: BinaryIO) -> None:
                torch.save(content, file)

            write_whole(folder / row["file"], save)
            return self._write(folder, [*self._rows, row], set())

        self._rows = on_rank_zero(trainer, write)

    def _whole(self) -> list[dict[str, Tensor]]:
        """The averages with whole tensors; of sharded weights all ranks put them together."""
        names = set(self._averages.names)
        wholes = [self._averages.whole(index) for index in range(len(self._averages.tensors))]
        return [{name: tensor for name, tensor in whole.items() if name in names} for whole in wholes]

    def _content(self, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What a file holds, by the names of the module's state dict."""
        hold_parts(pl_module)
        # A hook of the module may rename its tensors, and tied ones have several names there.
        names = {id(tensor): name for name, tensor in named_weights(pl_module).items()}
        state = pl_module.state_dict(keep_vars=True)
        owners = {key: names.get(id(value), key) for key, value in state.items()}
        files = [{name: self._stored(tensor) for name, tensor in whole.items()} for whole in self._whole()]
        averaged = {key: name for key, name in owners.items() if name in files[0]}
        rest = {key: value for key, value in state.items() if key not in averaged}
        late = [key for key, v in rest.items() if isinstance(v, Parameter) and not self._averages.holds(v)]
        if late:
            condition = "one whose parameters are all there when training starts"
            fix = "Make them in __init__, setup or configure_model"
            raise ValueError(message(self.owner, "module", condition, f"later ones at {', '.join(late)}", fix))
        whole = {key: v.detach().full_tensor() if isinstance(v, DTensor) else v for key, v in rest.items()}
        return {
            "averages": [{key: file[name] for key, name in averaged.items()} for file in files],
            "dtypes": {key: state[key].dtype for key in averaged},
            "copied": {key: v.detach().cpu() if isinstance(v, Tensor) else v for key, v in whole.items()},
        }

    def _stored(self, average: Tensor) -> Tensor:
        average = average.cpu()
        if self.dtype is None or average.is_complex():
            return average
        narrow = average.to(getattr(torch, self.dtype))
        return narrow if torch.isfinite(narrow).all() else average

    # ------------------------------------------------------------------ the directory, on rank 0

    def _write(self, folder: Path, rows: list[Row], dropped: set[str]) -> list[Row]:
        entries = {"format": FORMAT, "run": self._run, "sigma_rels": list(self.sigma_rels)}
        return write_manifest(folder, entries, rows, dropped)

    def _claim(self, default: Path) -> tuple[str, str, list[Row]]:
        """The folder, the run's name and its snapshots up to now; what was written later is removed."""
        new = self._run is None
        folder, self._run = claim(self.owner, self.directory, self._folder, self._run, default, read_manifest)
        rows = [] if new else [row for row in self._rows if row["due"] and row["step"] <= self._steps]
        refuse_missing(self.owner, folder, missing(folder, rows), self._folder)
        later = set() if new else later_files(folder, rows)
        return str(folder), self._run, self._write(folder, rows, later | half_written(folder))

    # ------------------------------------------------------------------ saved

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the averages, and which snapshots there are, in the checkpoint's own key."""
        name_in(checkpoint, self)
        if not self._handles:  # before or after the training
            self._averages.find(pl_module)
        if self._run is not None and self._averages.fit_module:
            checkpoint[KEY] = {
                "sigma_rels": list(self.sigma_rels),
                "steps": self._steps,
                "averages": [{n: t.cpu() for n, t in whole.items()} for whole in self._loaded or self._whole()],
                "directory": self._folder,
                "run": self._run,
                "rows": [dict(row) for row in self._rows],
            }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up the averages and snapshots of a checkpoint, if it has any, and forget an earlier fit."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._forget()
        saved = checkpoint.get(KEY)
        if saved is None:
            return
        if saved["sigma_rels"] != list(self.sigma_rels):
            fix = f"Give sigma_rels={saved['sigma_rels']}, or begin a new run"
            raise ValueError(message(self.owner, "sigma_rels", "those of the checkpoint", self.sigma_rels, fix))
        self._steps, self._loaded = saved["steps"], saved["averages"]
        self._folder, self._run, self._rows = saved["directory"], saved["run"], saved["rows"]

    def __getstate__(self) -> dict[str, Any]:
        return state_without_module(self, _handles=[], _watched=[])
