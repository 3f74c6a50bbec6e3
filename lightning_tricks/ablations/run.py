"""`ablate`: runs the trials that are missing, and writes what all of them say."""

import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from os import PathLike
from pathlib import Path
from threading import Thread
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_tricks.ablations.designs import ALL, BASELINE, WITHOUT, Kind, make_design
from lightning_tricks.ablations.effects import Ablation, by_text, find_effects
from lightning_tricks.ablations.pictures import answer, forest
from lightning_tricks.ablations.training import is_first_rank, rehearse, run_trial
from lightning_tricks.ablations.trials import (
    TRIALS,
    Build,
    Plan,
    Result,
    Trick,
    describe_trick,
    find_fingerprint,
    trial_id,
)
from lightning_tricks.callbacks.run_folder import write_whole
from lightning_tricks.functional.checks import check_count, message
from lightning_tricks.plots import new_figure
from lightning_tricks.reports.build import as_png, write_page
from lightning_tricks.reports.summary import Mode

TABLE, FOREST, REPORT = "table.md", "forest.png", "report.html"
MOST_SEED = 2**32 - 1
Call: TypeAlias = Callable[[Plan, str], Any]
"""(plan, id of a trial) -> what came of it, a text where it went wrong."""


def ablate(
    build: Build,
    tricks: Mapping[str, Trick],
    *,
    metric: str,
    mode: Literal["min", "max"],
    seeds: int | Sequence[int] = 5,
    design: Kind = "leave-one-out",
    folder: str | PathLike[str] = "ablation",
    evaluate: Literal["validate", "test"] = "validate",
    processes: int = 1,
    project: str | None = None,
    trials: Sequence[str] | None = None,
) -> Ablation:
    """Train with and without each trick, at the same seeds and budget, and say what each does and costs.

    Before anything is trained, every variant is set up as far as its first batch: tricks that cannot live together say
    so at once, and not hours later. So `build`, `setup` and `on_train_start` of every variant run once more, without
    `on_train_end`: what they do outside of the training (a file, a global setting), they do once more and do not undo.

    A trial seeds everything, calls `build`, fits, and evaluates the weights that `fit` left. Its result is a small file
    in `folder`, written when it is whole: a call after a kill, an error, or with more seeds trains only what is missing
    (a trial that was in the middle begins anew). Afterwards `folder` has `table.md`, `forest.png`, `report.html` and a
    CSV log for each trial. A folder whose trials had other tricks or another `build` is refused, and so is one after a
    change of the functions and classes that these call by their names, if they are in the same file. Global values and
    what other files define are not compared: after a change there, give another folder. What their calls fill, such as
    a default or a class, is another one for the next call of the process. An edit of the file while it trains counts
    for the next call only.

    Args:
        build: (seed, callbacks, logger) -> (trainer, module, train_loader, val_loader, test_loader), or one datamodule
            in place of the loaders, or none where the module has them. It gives `callbacks` and `logger` to the
            Trainer, and the same budget to all; the table names variants that trained longer or shorter all the same.
        tricks: name -> a callback, a list of them (each trial gets copies), or a function that makes these.
        metric: what `validation_step` or `test_step` logs, as `"val/accuracy"`.
        mode: "min" or "max", what of it is better.
        seeds: number of seeds, from 0 on, or the seeds. An interval needs 3; that of 5 is wide, of 10 much less.
        design: "leave-one-out" trains the baseline, all tricks, and all but each; "one-at-a-time" the baseline and each
            alone; "full" all combinations of at most 6 tricks.
        folder: of this ablation. Its name is the group of the runs in W&B.
        evaluate: "validate" or "test".
        processes: how many train at a time, on this machine. Above 1 all that is given must be importable.
        project: W&B project that the runs are logged to as well; None for none.
        trials: ids of those to run, for a launcher of your own; the tables are written once all are there. None for
            all, `[]` for none.
    Returns:
        Results and effects of the finished trials; `print` it.
    Raises:
        TypeError, ValueError: an argument out of range; a folder whose trials were trained with other settings, or with
            a damaged result; a metric that no trial has logged (the first training is kept for the right name).
        RuntimeError: variants that refuse to begin, before anything is trained; trials that failed, once all others are
            finished and written.
        ImportError: matplotlib is not installed.
    References:
        Bouthillier et al., "Accounting for Variance in Machine Learning Benchmarks", 2021, arXiv:2103.03098.
    Example:
        >>> from lightning_tricks import EMA, ablate
        >>> ablate(lambda seed, callbacks, logger: None, {"EMA": EMA()}, metric="val/loss", mode="lowest")
        Traceback (most recent call last):
        ValueError: ablate: mode must be 'min' or 'max', got 'lowest'. Say what of the metric is better.
    """
    plan = _planned(build, tricks, metric, mode, seeds, design, folder, evaluate, project)
    check_count("ablate", "processes", processes, 1, "processes", "1 trains in this one")
    chosen = _chosen(plan, trials)
    new_figure("ablate", (1, 1))  # what is missing is said before the hours, not after them
    todo = [trial for trial in plan.trials if plan.read(trial) is None and trial in chosen]
    plan.check_metric()
    read = sum(plan.read(trial) is not None for trial in plan.trials)
    if read:
        rank_zero_info(f"ablate: {read} of {len(plan.trials)} trials were read from {plan.folder}")
    ablation = _read(plan, mode, design, _run(plan, todo, processes))
    if is_first_rank() and (trials is None or not ablation.unfinished):
        _write(ablation, plan.folder)
    if ablation.failed:
        some = _in_a_line(ablation.failed)
        raise RuntimeError(
            f"ablate: {len(ablation.failed)} of {len(plan.trials)} trials failed: {some}. The traces are in error.txt"
            f" of each one's folder in {plan.folder / TRIALS}. The others are kept; the next call tries these again."
        )
    return ablation


def trial_ids(tricks: Mapping[str, Trick], seeds: int | Sequence[int], design: Kind) -> list[str]:
    """The ids of all trials.

    Args:
        tricks, seeds, design: as `ablate` takes them.
    """
    _described(tricks)
    variants = make_design(design, list(tricks)).variants
    return [trial_id(name, seed) for seed in _seeds(seeds) for name in variants]


def _planned(
    build: Any, tricks: Any, metric: Any, mode: str, seeds: Any, design: Kind, folder: Any, evaluate: Any, project: Any
) -> Plan:
    """The checked arguments."""
    if not callable(build):
        fix = "Give a function (seed, callbacks, logger) -> (trainer, module, data...)"
        raise TypeError(message("ablate", "build", "a function", build, fix))
    described = _described(tricks)
    for argument, value, words, fix in (
        ("mode", mode, ("min", "max"), "Say what of the metric is better"),
        ("evaluate", evaluate, ("validate", "test"), "Say which of the data the metric comes from"),
    ):
        if value not in words:
            raise ValueError(message("ablate", argument, " or ".join(map(repr, words)), value, fix))
    if not isinstance(metric, str):
        fix = "Give the name that the module logs, such as 'val/accuracy'"
        raise TypeError(message("ablate", "metric", "a text", metric, fix))
    if not isinstance(project, (str, type(None))):
        raise TypeError(message("ablate", "project", "a text, or None", project, "Give the name of a W&B project"))
    if not isinstance(folder, (str, PathLike)):
        raise TypeError(message("ablate", "folder", "a path", folder, "Such as 'ablation'"))
    place = Path(folder)
    if place.exists() and not place.is_dir():
        fix = "Give another, which need not exist"
        raise ValueError(message("ablate", "folder", "a folder, and none of the files", str(place), fix))
    laid_out = make_design(design, list(tricks))
    version = find_fingerprint("build", build)
    return Plan(build, dict(tricks), version, described, laid_out, _seeds(seeds), metric, evaluate, place, project)


def _described(tricks: Any) -> dict[str, dict[str, Any]]:
    """What the tricks are, if they can be compared."""
    if not isinstance(tricks, Mapping) or not tricks:
        fix = "Such as {'EMA': lt.EMA(0.999)}"
        raise TypeError(message("ablate", "tricks", "a dict of name -> callbacks with one trick or more", tricks, fix))
    for name in tricks:
        plain = isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) is not None
        if not plain or name in (BASELINE, ALL) or name.startswith(WITHOUT):
            fix = f"They are parts of files' names; {BASELINE!r}, {ALL!r} and {WITHOUT + '...'!r} are taken"
            raise ValueError(message("ablate", "tricks", "named with letters, digits, '_', '.' and '-'", name, fix))
    return {name: describe_trick(trick) for name, trick in tricks.items()}


def _seeds(seeds: Any) -> tuple[int, ...]:
    fix = "Try 5; an interval needs 3"
    if isinstance(seeds, Sequence) and not isinstance(seeds, str):
        for seed in seeds:
            check_count("ablate", "seeds", seed, 0, "a seed", "Try range(5)")
            if seed > MOST_SEED:
                raise ValueError(message("ablate", "seeds", f"at most {MOST_SEED}", seed, "NumPy takes no larger one"))
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(message("ablate", "seeds", "one or more, all different", list(seeds), fix))
        return tuple(seeds)
    check_count("ablate", "seeds", seeds, 1, "seeds", fix)
    return tuple(range(seeds))


def _chosen(plan: Plan, trials: Any) -> list[str]:
    if trials is None:
        return list(plan.trials)
    listed = isinstance(trials, Sequence) and not isinstance(trials, str)
    unknown = [trial for trial in trials if trial not in plan.trials] if listed else trials
    if unknown or not listed:
        fix = f"They are {', '.join(list(plan.trials)[:8])}{', ...' if len(plan.trials) > 8 else ''}"
        raise ValueError(message("ablate", "trials", "a list of ids of this design", unknown, fix))
    return list(trials)


# ---------------------------------------------------------------------- running


def _run(plan: Plan, todo: Sequence[str], processes: int) -> dict[str, str]:
    """Train what is left; id -> error of what failed."""
    firsts: dict[str, str] = {}
    for trial in todo:
        firsts.setdefault(plan.trials[trial][0], trial)
    with _caller(plan, min(processes, len(todo))) as call:
        # One variant alone refuses as soon as it is trained.
        rehearsed = call(rehearse, list(firsts.values())) if len(firsts) > 1 else {}
        refused = {trial: error for trial, error in rehearsed.items() if isinstance(error, str)}
        if refused:
            some = _in_a_line({plan.trials[trial][0]: error for trial, error in refused.items()})
            raise RuntimeError(
                f"ablate: {len(refused)} of {len(firsts)} variants cannot be trained: {some}. The traces are in"
                f" error.txt of {', '.join(refused)} in {plan.folder / TRIALS}. Nothing was trained."
            )
        _check_budgets({plan.trials[trial][0]: budget for trial, budget in rehearsed.items()})
        return {trial: error for trial, error in call(run_trial, todo).items() if error is not None}


def _in_a_line(errors: Mapping[str, str]) -> str:
    return "; ".join(f"{', '.join(names)} ({error})" for error, names in by_text(errors).items())


def _check_budgets(budgets: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise unless all variants train as long."""
    for variant, budget in budgets.items():
        first, other = next(iter(budgets.items()))
        names = [name for name, value in budget.items() if value != other[name]]
        if names:
            got = {each: {name: budgets[each][name] for name in names} for each in (first, variant)}
            fix = "Nothing was trained: let it give the Trainer the same whatever the callbacks are"
            raise ValueError(message("ablate", "build", "one that gives all trials the same budget", got, fix))


@contextmanager
def _caller(plan: Plan, processes: int) -> Iterator[Callable[[Call, Sequence[str]], dict[str, Any]]]:
    """What calls a function with each of some trials, and returns id -> what came of it: here, or in new processes."""
    if processes <= 1:
        yield lambda call, trials: {trial: call(plan, trial) for trial in trials}
        return
    try:
        pickle.dumps(plan)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        fix = "Define functions at the top of a file, give callbacks in place of lambdas, or take processes=1"
        raise ValueError(message("ablate", "processes", "1 for what cannot be imported", f"{error}", fix)) from error
    threads = max(1, torch.get_num_threads() // processes)
    # Not forked: threads and a GPU's state do not survive that.
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin_process, (threads,)) as pool:
        yield partial(_in_pool, pool, plan)


def _begin_process(threads: int) -> None:
    torch.set_num_threads(threads)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent's processes would train on, beside those of the next call and in the same folders."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_pool(pool: ProcessPoolExecutor, plan: Plan, call: Call, trials: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for trial, future in [(trial, pool.submit(call, plan, trial)) for trial in trials]:
        try:
            found[trial] = future.result()
        except BrokenProcessPool:
            found[trial] = None if plan.read(trial) else "a process was killed before this was finished"
        except ValueError:  # no trial will measure the metric
            pool.shutdown(cancel_futures=True)
            raise
    return found


# ---------------------------------------------------------------------- what came of it


def _read(plan: Plan, mode: Literal["min", "max"], design: Kind, failed: Mapping[str, str]) -> Ablation:
    results: dict[str, dict[int, Result]] = {name: {} for name in plan.design.variants}
    unfinished, missing = [], {}
    for trial, (variant, seed) in plan.trials.items():
        read = plan.read(trial)
        result = None if read is None else plan.result(read)
        if result is not None:
            results[variant][seed] = result
        elif read is not None:
            logged = ", ".join(read["metrics"]) or "nothing"
            missing[trial] = f"{plan.metric} is not among what it logged, {logged}; delete its folder to train it again"
        elif trial not in failed:
            unfinished.append(trial)
    effects = find_effects(plan.design, results, mode)
    return Ablation(plan.metric, mode, design, results, effects, tuple(unfinished), {**failed, **missing})


def _write(ablation: Ablation, folder: Path) -> None:
    """Tables and pictures of what is there."""
    text = str(ablation).encode()
    write_whole(folder / TABLE, lambda file: file.write(text))
    first = []
    if ablation.effects:
        png = as_png(forest(ablation))
        write_whole(folder / FOREST, lambda file: file.write(png))
        first.append(answer(ablation, png))
    logs = {
        variant: [folder / TRIALS / trial_id(variant, seed) for seed in runs]
        for variant, runs in ablation.results.items()
        if runs
    }
    if logs:
        modes: dict[str, Mode] = {ablation.metric: ablation.mode}
        write_page(logs, folder / REPORT, modes=modes, title=f"Ablation: {folder.name}", first=first)
