"""An ablation from a shell, whole or trial by trial: `python -m lightning_tricks ablate FILE:build ...`."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from lightning_tricks.ablations.designs import MEANING
from lightning_tricks.ablations.run import ablate, trial_ids
from lightning_tricks.functional.checks import message


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options are the arguments of `ablate`, and what of its trials is done.

    Args:
        parser: of the command.
    """
    parser.add_argument("build", metavar="FILE:build", help="Python file, and its function that builds a training")
    parser.add_argument("--tricks", default="tricks", metavar="NAME", help="name of the dict of tricks in that file")
    parser.add_argument("--metric", help="what the module logs, such as val/accuracy; needed but for --list")
    parser.add_argument("--mode", choices=["min", "max"], help="what of the metric is better; needed but for --list")
    words = "their number, from 0 on, or they themselves, such as 0,3,7 (default: 5)"
    parser.add_argument("--seeds", type=seeds, default=5, metavar="SEEDS", help=words)
    parser.add_argument("--design", default="leave-one-out", choices=list(MEANING), help="default: leave-one-out")
    parser.add_argument("--folder", default="ablation", help="where all is written (default: ablation)")
    parser.add_argument("--evaluate", default="validate", choices=["validate", "test"], help="default: validate")
    parser.add_argument("--processes", type=int, default=1, help="how many train at a time (default: 1)")
    parser.add_argument("--project", help="W&B project to log to as well")
    parser.add_argument("--trial", nargs="+", action="extend", metavar="ID", help="train these only")
    parser.add_argument("--list", action="store_true", help="print the ids of all trials, and train none")


def seeds(text: str) -> int | list[int]:
    """Those that a text names.

    Args:
        text: their number, or they themselves with commas between them; one alone has one behind it.
    Example:
        >>> seeds("5"), seeds("0,3,7"), seeds("3,")
        (5, [0, 3, 7], [3])
    """
    return [int(seed) for seed in text.removesuffix(",").split(",")] if "," in text else int(text)


def run(options: argparse.Namespace) -> str:
    """Do what the options say.

    Args:
        options: as parsed.
    Returns:
        What there is to print.
    Raises:
        TypeError, ValueError, RuntimeError, ImportError, OSError: as `ablate` does; no such file or name in it.
    """
    file, _, name = options.build.rpartition(":")
    if not file or not name:
        fix = "Such as train.py:build"
        raise ValueError(message("ablate", "FILE:build", "a Python file, ':' and a function in it", options.build, fix))
    if options.list and options.trial:
        fix = "Leave one of them out: it prints the ids, and trains none"
        raise ValueError(message("ablate", "--list", "without --trial", options.trial, fix))
    found = _names(Path(file), name, options.tricks)
    if options.list:
        return "\n".join(trial_ids(found[options.tricks], options.seeds, options.design))
    ablation = ablate(
        found[name],
        found[options.tricks],
        metric=options.metric,
        mode=options.mode,
        seeds=options.seeds,
        design=options.design,
        folder=options.folder,
        evaluate=options.evaluate,
        processes=options.processes,
        project=options.project,
        trials=options.trial,
    )
    if ablation.unfinished and options.trial:
        return f"{sum(map(len, ablation.results.values()))} finished, {len(ablation.unfinished)} unfinished."
    return str(ablation)


def _names(file: Path, *names: str) -> dict[str, Any]:
    """What a file defines, imported under its own name, so that other processes can import it too."""
    if file.suffix != ".py" or not file.is_file():
        fix = "Such as train.py:build"
        raise ValueError(message("ablate", "FILE:build", "a Python file that exists", str(file), fix))
    sys.path.insert(0, str(file.resolve().parent))
    module = importlib.import_module(file.stem)
    if Path(module.__file__ or "").resolve() != file.resolve():
        fix = f"{module.__file__} has it already: rename the file"
        raise ValueError(message("ablate", "FILE:build", "a file with a name of its own", str(file), fix))
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        fix = "Define them at the top of the file, or name others: FILE:name, --tricks name"
        raise ValueError(message("ablate", "FILE:build", f"a file that defines {', '.join(missing)}", str(file), fix))
    return {name: getattr(module, name) for name in names}
