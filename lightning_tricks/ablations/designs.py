"""Which combinations of tricks are trained, and which of them tell what a trick does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeAlias

from lightning_tricks.functional.checks import message

Kind: TypeAlias = Literal["one-at-a-time", "leave-one-out", "full"]
BASELINE, ALL, WITHOUT = "baseline", "all", "all-but-"
MOST_IN_FULL = 6
"""Tricks of a full design at most: 64 combinations, each with every seed."""
MEANING: Mapping[str, str] = {
    "one-at-a-time": "with this trick alone, less the baseline without any",
    "leave-one-out": "with all tricks, less all but this one (`all`: all tricks, less the baseline without any)",
    "full": "with this trick, less without it, averaged over all combinations of the others (main effect)",
}
"""What a difference is, for each design."""


@dataclass(frozen=True)
class Design:
    """What is trained and what is compared.

    Args:
        variants: name -> tricks that are on.
        contrasts: what is compared -> variant -> weight. The weights of one add up to 0, those above 0 to 1.
    """

    variants: Mapping[str, tuple[str, ...]]
    contrasts: Mapping[str, Mapping[str, float]]


def make_design(kind: str, tricks: Sequence[str]) -> Design:
    """Lay out an ablation.

    Args:
        kind: "one-at-a-time", "leave-one-out" or "full".
        tricks: their names, at least one.
    Raises:
        ValueError: another kind; more tricks than a full design can have.
    Example:
        >>> make_design("leave-one-out", ["EMA", "mixup", "cutout"]).contrasts["EMA"]
        {'all': 1.0, 'all-but-EMA': -1.0}
    """
    names = tuple(tricks)
    if kind == "one-at-a-time":
        alone = {name: (name,) for name in names}
        return Design({BASELINE: (), **alone}, {name: {name: 1.0, BASELINE: -1.0} for name in names})
    if kind == "leave-one-out":
        return _leave_one_out(names)
    if kind == "full":
        return _full(names)
    fix = "The last trains all combinations"
    raise ValueError(message("ablate", "design", "'one-at-a-time', 'leave-one-out' or 'full'", kind, fix))


def _leave_one_out(names: tuple[str, ...]) -> Design:
    if len(names) == 1:  # all but the only one is the baseline
        return Design({BASELINE: (), ALL: names}, {names[0]: {ALL: 1.0, BASELINE: -1.0}})
    rest = {f"{WITHOUT}{name}": tuple(other for other in names if other != name) for name in names}
    contrasts = {name: {ALL: 1.0, f"{WITHOUT}{name}": -1.0} for name in names}
    return Design({BASELINE: (), ALL: names, **rest}, {**contrasts, ALL: {ALL: 1.0, BASELINE: -1.0}})


def _full(names: tuple[str, ...]) -> Design:
    if len(names) > MOST_IN_FULL:
        got = f"{len(names)} tricks, which are {2 ** len(names)} combinations"
        fix = "Try design='leave-one-out', or leave out tricks"
        raise ValueError(message("ablate", "design", f"'full' for at most {MOST_IN_FULL} tricks", got, fix))
    subsets = [
        tuple(name for name, on in zip(names, switches, strict=True) if on)
        for switches in product((False, True), repeat=len(names))
    ]
    variants = {"+".join(subset) or BASELINE: subset for subset in sorted(subsets, key=len)}
    share = 2.0 / len(variants)
    return Design(
        variants,
        {name: {key: share if name in on else -share for key, on in variants.items()} for name in names},
    )
