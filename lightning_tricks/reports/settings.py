"""Settings of a run as names and texts, which of them are seeds, and which differ."""

from collections.abc import Mapping, Sequence
from typing import Any


def is_seed(name: str) -> bool:
    """Whether a setting only numbers the repetitions."""
    last = name.rpartition(".")[2].lower()
    return last in ("seed", "seed_everything") or last.endswith("_seed")


def seeds(settings: Mapping[str, Any]) -> dict[str, str]:
    """The seeds among a run's settings.

    Args:
        settings: as they were logged.
    Example:
        >>> seeds({"lr": 0.1, "seed_everything": 1, "data": {"split_seed": 2}})
        {'seed_everything': '1', 'data.split_seed': '2'}
    """
    return {name: text for name, text in flatten(settings).items() if is_seed(name)}


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as names with dots and values as text.

    Args:
        settings: as they were logged.
        prefix: what the names begin with.
    Example:
        >>> flatten({"lr": 0.1, "tricks": {"EMA": {"decay": 0.999, "keys": ["a", "b"]}}})
        {'lr': '0.1', 'tricks.EMA.decay': '0.999', 'tricks.EMA.keys': 'a, b'}
        >>> flatten({"lr": 0.1, "_instantiator": "lightning.pytorch.cli.instantiate_module"})
        {'lr': '0.1'}
    """
    flat: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if key == "_instantiator":  # how Lightning's command line would make the module again
            continue
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = _text(value)
    return flat


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, float):
        short = f"{value:.6g}"
        return short if float(short) == value else repr(value)
    return "none" if value is None or value == {} else str(value)


def differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Names whose values are not the same everywhere, in the order of their first appearance."""
    names = dict.fromkeys(name for each in settings for name in each)
    return [name for name in names if len({each.get(name) for each in settings}) > 1]
