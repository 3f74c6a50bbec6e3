"""One training of an ablation: made, measured and written down."""

import gc
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_tricks.ablations.trials import FORMAT, RESULT, TRIALS, Plan
from lightning_tricks.callbacks.run_folder import write_whole
from lightning_tricks.functional.checks import message
from lightning_tricks.loggers import finish_runs, silence_runs, trial_logger

TRACE = "error.txt"
BUDGET = ("max_epochs", "max_steps", "min_epochs", "min_steps", "accumulate_grad_batches", "limit_train_batches")
SEED = "PL_GLOBAL_SEED"


def is_first_rank() -> bool:
    """Whether this process writes the files; others may be ranks of the same trainings."""
    return bool(vars(rank_zero_only).get("rank", 0) == 0)


def run_trial(plan: Plan, trial: str) -> str | None:
    """Train and evaluate once, and write the result.

    Args:
        plan: of the ablation.
        trial: its id.
    Returns:
        What went wrong, in a line; the trace is in the trial's folder. None if nothing did.
    Raises:
        ValueError: no trial so far has measured the metric, and the next would not do either. The result is kept.
    """
    rank_zero_info(f"ablate: {trial}")
    folder = plan.folder / TRIALS / trial
    if is_first_rank():
        shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
        folder.mkdir(parents=True)
    with _seeded(plan.trials[trial][1]):
        try:
            stored, wait = _run(plan, trial)
        except Exception as error:
            return _traced(folder, error)
    if is_first_rank():
        text = json.dumps(stored, indent=1).encode()
        write_whole(folder / RESULT, lambda file: file.write(text))
    wait()  # or another rank would read what is not written yet
    plan.check_metric(stored)
    return None


def rehearse(plan: Plan, trial: str) -> dict[str, Any] | str:
    """Begin to train and to evaluate, and stop before the first batch of each: what refuses, refuses here.

    The random state stays as it is. Files are left by what makes them at its beginning, in a folder of its own choice.

    Args:
        plan: of the ablation.
        trial: its id.
    Returns:
        The budget it would have; or what went wrong, as `run_trial` tells it.
    """
    variant, seed = plan.trials[trial]
    rank_zero_info(f"ablate: sets up {variant}, to see whether it can be trained")
    with TemporaryDirectory() as folder, _seeded(seed), ExitStack() as ends:
        try:
            trainer, module, data, budget = _made(plan, trial, [CSVLogger(folder, name=TRIALS, version=trial)])
            silence_runs(trainer.loggers)
            ends.callback(finish_runs, trainer.loggers)
            # All `on_train_start` are called; of the evaluation nothing that may rest on a training.
            stop = LambdaCallback(on_train_epoch_start=_stop, on_validation_start=_stop, on_test_start=_stop)
            trainer.callbacks.insert(0, stop)
            trainer.num_sanity_val_steps = 0
            _measured(plan, trainer, module, data)
        except Exception as error:
            return _traced(plan.folder / TRIALS / trial, error)
    return budget


def _stop(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """End it as Lightning's tuner does: not as an error, which callbacks might write down."""
    raise _TunerExitException


def _traced(folder: Path, error: Exception) -> str:
    """Write down where it went wrong; what, in a line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRACE).write_text("".join(traceback.format_exception(error)))
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


def _run(plan: Plan, trial: str) -> tuple[dict[str, Any], Callable[[], None]]:
    """What is to be stored, and what waits for all ranks."""
    loggers: list[Logger] = [CSVLogger(plan.folder, name=TRIALS, version=trial)]
    group = plan.folder.resolve().name
    if plan.project is not None:
        loggers.append(trial_logger(plan.project, group, trial, plan.folder))
    with ExitStack() as ends:
        ends.callback(finish_runs, loggers)
        trainer, module, data, budget = _made(plan, trial, loggers)
        ends.callback(finish_runs, trainer.loggers)
        for logger in trainer.loggers:
            logger.log_hyperparams(dict(zip(("variant", "seed"), plan.trials[trial], strict=True)))
        measured = _measured(plan, trainer, module, data)
    return {"format": FORMAT, "settings": plan.settings(trial), "budget": budget, **measured}, trainer.strategy.barrier


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The same draws for every variant; the caller's own go on as if nothing had been drawn."""
    before = os.environ.get(SEED)
    gc.collect()  # what an earlier trial left in memory is none of this one's cost
    with isolate_rng():
        pl.seed_everything(seed, verbose=False)
        try:
            yield
        finally:
            if before is None:
                del os.environ[SEED]
            else:
                os.environ[SEED] = before


def _made(
    plan: Plan, trial: str, loggers: list[Logger]
) -> tuple[Any, pl.LightningModule, tuple[Any, ...], dict[str, Any]]:
    """Trainer, module and data of a trial, and its budget, which is that of the others."""
    variant, seed = plan.trials[trial]
    callbacks = plan.callbacks(variant)
    pl.seed_everything(seed, verbose=False)  # again: what was drawn so far must not change the module's weights
    trainer, module, data = _built(plan, seed, callbacks, loggers)
    budget = {name: getattr(trainer, name) for name in BUDGET}
    _check_budget(plan, budget)
    return trainer, module, data, budget


def _built(
    plan: Plan, seed: int, callbacks: list[Callback], loggers: list[Logger]
) -> tuple[pl.Trainer, pl.LightningModule, tuple[Any, ...]]:
    """What the user's function returns, if the tricks are in it."""
    built = plan.build(seed, list(callbacks), list(loggers))
    if not isinstance(built, tuple) or len(built) < 2 or not isinstance(built[0], pl.Trainer):
        fix = "End it with `return trainer, module, train_loader, val_loader`"
        got: Any = tuple(map(_name, built)) if isinstance(built, tuple) else _name(built)
        raise TypeError(message("ablate", "build", "a function that returns (trainer, module, data...)", got, fix))
    trainer, module, *data = built
    for name, given, there in (("callbacks", callbacks, trainer.callbacks), ("logger", loggers, trainer.loggers)):
        if any(all(one is not other for other in there) for one in given):
            fix = f"Say Trainer({name}={name}, ...), without fast_dev_run and barebones, or nothing would be compared"
            got = [_name(one) for one in there]
            raise ValueError(message("ablate", "build", f"one that gives its {name} to the Trainer", got, fix))
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        name = type(trainer.strategy).__name__
        fix = "What other processes log and measure does not come back: take one device, or strategy='ddp'"
        raise ValueError(message("ablate", "strategy", "one that starts no process by spawn or fork", name, fix))
    needed = 2 if plan.evaluate == "validate" else 3
    if data and not isinstance(data[0], pl.LightningDataModule) and len(data) < needed:
        fix = "Return (trainer, module, train_loader, val_loader, test_loader), the last for evaluate='test'"
        raise ValueError(message("ablate", "build", f"one that returns {needed} loaders or more", len(data), fix))
    return trainer, module, tuple(data)


def _name(item: Any) -> str:
    return type(item).__name__


def _check_budget(plan: Plan, budget: dict[str, Any]) -> None:
    """Compare with a trial that is finished; so are all, one by one."""
    other, read = next(((other, read) for other in plan.trials if (read := plan.read(other))), ("", None))
    if read is not None and read["budget"] != budget:
        fix = f"{other} was trained with {read['budget']}: give all the same, or begin in another folder"
        raise ValueError(message("ablate", "build", "one that gives all trials the same budget", budget, fix))


def _measured(plan: Plan, trainer: Any, module: pl.LightningModule, data: tuple[Any, ...]) -> dict[str, Any]:
    """Train and evaluate; all metrics are kept, so that another one can be asked for later."""
    whole = bool(data) and isinstance(data[0], pl.LightningDataModule)
    device = trainer.strategy.root_device
    began = _start_memory(device)
    start = time.perf_counter()
    trainer.fit(module, *data[:1] if whole else data[:2])
    seconds, steps, stopped = time.perf_counter() - start, trainer.global_step, trainer.should_stop
    memory = _peak_memory(device) if began else None
    place = 1 if plan.evaluate == "validate" else 2
    given = data[0] if whole else data[place] if data else None
    getattr(trainer, plan.evaluate)(module, given, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    costs = {"steps": steps, "seconds": seconds, "memory": memory, "stopped": stopped}
    return {"metrics": metrics, "costs": costs}


def _start_memory(device: torch.device) -> bool:
    """Begin to look for the peak; False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is what there is now
    except OSError:
        return False
    return True


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return peaks[0] if peaks else None
