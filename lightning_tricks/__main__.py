"""From a shell: `python -m lightning_tricks schedule "Warmup(0.05, Cosine())" --steps 10000 --png out.png`."""

import argparse
import os
import sys
from collections.abc import Sequence

from lightning_tricks.ablations import command
from lightning_tricks.functional.schedules import SCHEDULES, parse
from lightning_tricks.plots import plot_schedule, sample_schedule, text_picture
from lightning_tricks.reports import report


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and print what it says; what is wrong with its arguments is said as argparse says it."""
    parser = argparse.ArgumentParser(prog="python -m lightning_tricks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    schedule = commands.add_parser("schedule", help="draw a schedule", description="Draw a schedule.")
    schedule.add_argument("schedule", help=f"such as 'Warmup(0.05, Cosine())'; names are {', '.join(SCHEDULES)}")
    schedule.add_argument("--steps", type=int, required=True, help="optimizer steps of the run")
    schedule.add_argument("--steps-per-epoch", type=int, help="optimizer steps of an epoch, for durations as '3ep'")
    schedule.add_argument("--png", help="picture to write; without it the terminal is drawn in")
    schedule.set_defaults(
        run=lambda given: draw(given.schedule, given.steps, given.steps_per_epoch, given.png), parser=schedule
    )
    page = commands.add_parser("report", help="show what runs logged", description="Write one HTML page of runs.")
    page.add_argument("runs", nargs="+", help="folders with logs of CSVLogger or offline runs, or folders above them")
    page.add_argument("--out", default="report.html", help="page to write; its pictures lie in a folder beside it")
    page.add_argument("--group", help="setting whose values make groups; without it, equal settings but for seeds")
    page.add_argument("--title", default="Training report", help="title of the page")
    page.set_defaults(
        run=lambda given: report(given.runs, given.out, group=given.group, title=given.title), parser=page
    )
    words = "Train with and without each trick, and say what each does and costs."
    ablation = commands.add_parser("ablate", help="train with and without each trick", description=words)
    command.add_options(ablation)
    ablation.set_defaults(run=command.run, parser=ablation)
    given = parser.parse_args(arguments)
    try:
        _say(given.run(given))
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        given.parser.error(str(error))


def _say(found: object) -> None:
    """Print what a command came to, if that is anything."""
    if found is None:
        return
    try:
        print(found, flush=True)
    except BrokenPipeError:  # of `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says so once more at its end


def draw(text: str, total_steps: int, steps_per_epoch: int | None, png: str | None) -> str | None:
    """Draw the schedule that a text describes, in a file or in the text that is returned."""
    schedule = parse(text)
    if png is not None:
        plot_schedule(schedule, total_steps, steps_per_epoch).savefig(png, format="png")
        return None
    steps, factors = sample_schedule("schedule", schedule, total_steps, steps_per_epoch)
    picture = f"{schedule!r}, {total_steps} optimizer steps\n\n{text_picture(factors)}"
    return f"{picture}\n         {'step 0':<36}{f'step {steps[-1]}':>36}"


if __name__ == "__main__":
    main()
