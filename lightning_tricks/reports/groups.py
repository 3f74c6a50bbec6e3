"""Which runs belong together, what they are called, and by what their settings differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from lightning_tricks.functional.checks import message
from lightning_tricks.reports.runs import Run
from lightning_tricks.reports.settings import differing, flatten, is_seed


@dataclass(frozen=True)
class Group:
    """Runs that are summed up together."""

    name: str
    runs: tuple[Run, ...]


def kinship(groups: Sequence[Group]) -> str:
    """What the runs of a group have in common: "seeds", "equal settings", or "" where their settings say neither.

    Args:
        groups: those of one run say nothing.
    """
    each = [[flatten(run.settings) for run in group.runs] for group in groups if group.runs[1:]]
    names = [differing(settings) for settings in each]
    if resumed(groups) or not all(map(all, each)) or not all(is_seed(name) for found in names for name in found):
        return ""
    return "seeds" if all(names) else "" if any(names) else "equal settings"


def resumed(groups: Sequence[Group]) -> list[tuple[Run, Run]]:
    """Runs of a group with equal settings, of which the second begins after the step at which the first ends."""
    found = []
    for group in groups:
        spans = [(run, {step for series in run.series.values() for step in series}) for run in group.runs]
        ends = [(run, min(steps), max(steps)) for run, steps in spans if steps and run.settings]
        for (one, _, end), (other, start, _) in permutations(ends, 2):
            shared = one.series.keys() & other.series.keys()  # a log of a test alone has no metric of the training
            if end < start and shared and flatten(one.settings) == flatten(other.settings):
                found.append((one, other))
    return found


def group_runs(owner: str, runs: Sequence[Run], by: str | None) -> list[Group]:
    """Put runs together.

    Args:
        owner: function named in an error.
        runs: at least one.
        by: a setting (`arm`, `tricks.EMA.decay`): runs that have the same value are a group. None: names that the user
            gave, and else settings that are equal but for seeds; a run without settings is alone.
    Raises:
        ValueError: a run that has no such setting.
    """
    together: dict[Any, list[Run]] = {}
    for index, run in enumerate(runs):
        settings = flatten(run.settings)
        if by is not None:
            if by not in settings:
                fix = f"{run.path} has {', '.join(settings) or 'no settings'}"
                raise ValueError(message(owner, "group", "a setting that every run has", by, fix))
            key: Any = settings[by]
        elif run.group is not None:
            key = run.group
        else:
            key = frozenset(item for item in settings.items() if not is_seed(item[0])) if settings else index
        together.setdefault(key, []).append(run)
    groups = list(together.values())
    given = by is not None or all(run.group is not None for run in runs)
    names = [str(key) for key in together] if given else _names(groups)
    return [Group(name, tuple(members)) for name, members in zip(names, groups, strict=True)]


def _names(groups: list[list[Run]]) -> list[str]:
    """Names by what differs: settings, then tricks, then the first run's own name."""
    if len(groups) == 1:
        return [groups[0][0].name if len(groups[0]) == 1 else f"{len(groups[0])} runs"]
    settings = [flatten(members[0].settings) for members in groups]
    own = [name for name in differing(settings) if not name.startswith("tricks.") and not is_seed(name)][:3]
    tricks = [" + ".join(members[0].tricks) or "no tricks" for members in groups]
    first = [members[0].name for members in groups]
    values = [each.get(own[0], "none") for each in settings] if len(own) == 1 else []
    speaking = [] if any(value[:1].isdigit() or value in {"none", "True", "False"} for value in values) else values
    last = {name: name.rpartition(".")[2] for name in own}
    described = [", ".join(f"{last[name]} = {each.get(name, 'none')}" for name in own) for each in settings]
    both = [f"{text}, {trick}" if text else trick for text, trick in zip(described, tricks, strict=True)]
    candidates = [speaking, described, tricks, both]
    fitting = (names for names in candidates if len(set(names)) == len(groups) and max(map(len, names)) <= 48)
    return next(fitting, first)
