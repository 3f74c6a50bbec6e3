"""Which runs belong together, what they are called, and by what their settings differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_tricks.functional.checks import message
from lightning_tricks.reports.runs import Run


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed."""

    name: str
    runs: tuple[Run, ...]


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
            key = tuple((name, text) for name, text in settings.items() if not is_seed(name)) or index
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


def is_seed(name: str) -> bool:
    """Whether a setting only numbers the repetitions."""
    last = name.rpartition(".")[2].lower()
    return last == "seed" or last.endswith("_seed")


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as names with dots and values as text.

    Args:
        settings: as they were logged.
        prefix: what the names begin with.
    Example:
        >>> flatten({"lr": 0.1, "tricks": {"EMA": {"decay": 0.999, "keys": ["a", "b"]}}})
        {'lr': '0.1', 'tricks.EMA.decay': '0.999', 'tricks.EMA.keys': 'a, b'}
    """
    flat: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = _text(value)
    return flat


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None or value == {} else str(value)


def differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Names whose values are not the same everywhere, in the order of their first appearance."""
    names = dict.fromkeys(name for each in settings for name in each)
    return [name for name in names if len({each.get(name) for each in settings}) > 1]
