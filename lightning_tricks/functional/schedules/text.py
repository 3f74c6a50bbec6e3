"""Schedules as text: read without evaluating it, and written so that it can be read again."""

import ast
import dataclasses
import functools
import inspect
from typing import Any

from lightning_tricks.functional.checks import message
from lightning_tricks.functional.schedules.cycles import CosineRestarts, OneCycle, Triangular
from lightning_tricks.functional.schedules.durations import Schedule
from lightning_tricks.functional.schedules.joins import Cooldown, Join, Warmup, WarmupCosine, WarmupStableDecay
from lightning_tricks.functional.schedules.shapes import (
    Constant,
    Cosine,
    Exponential,
    InverseSqrt,
    InverseTime,
    Linear,
    Polynomial,
    Steps,
)

SCHEDULES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Constant,
        Linear,
        Cosine,
        Polynomial,
        Exponential,
        Steps,
        InverseSqrt,
        InverseTime,
        CosineRestarts,
        OneCycle,
        Triangular,
        Warmup,
        Cooldown,
        Join,
        WarmupCosine,
        WarmupStableDecay,
    )
}
"""Every schedule of this package by its name."""


def describe(schedule: Any) -> str:
    """A schedule as text: the same for equal schedules, in every process.

    Args:
        schedule: any schedule. A function is told by its name alone, whatever it computes.
    Returns:
        The text; `parse` reads that of this package's schedules.
    Example:
        >>> describe(Warmup(500, Cosine(end=0.0)))
        "Warmup(duration=500, then=Cosine(end=0), start=0, shape='linear')"
    """
    if dataclasses.is_dataclass(schedule) and not isinstance(schedule, type):
        fields = [f"{field.name}={describe(getattr(schedule, field.name))}" for field in dataclasses.fields(schedule)]
        kind = type(schedule)
        ours = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
        name = kind.__name__ if ours else f"{kind.__module__}.{kind.__qualname__}"
        return f"{name}({', '.join(fields)})"
    if isinstance(schedule, functools.partial):
        given = [
            *map(describe, schedule.args),
            *(f"{key}={describe(value)}" for key, value in schedule.keywords.items()),
        ]
        return f"partial({', '.join([describe(schedule.func), *given])})"
    if isinstance(schedule, (tuple, list)):
        return f"[{', '.join(map(describe, schedule))}]"
    if isinstance(schedule, float) and schedule.is_integer():
        return str(int(schedule))  # 0 and 0.0 make the same schedule
    if isinstance(schedule, float):
        return float.__repr__(schedule)  # numpy's float64 is a float too
    if callable(schedule):
        named = schedule if hasattr(schedule, "__qualname__") else type(schedule)
        return f"{named.__module__}.{named.__qualname__}"
    return repr(schedule)


def is_ours(schedule: Any) -> bool:
    """Whether a schedule is of this package alone, nested ones too: then it depends on nothing but its arguments.

    Args:
        schedule: any schedule.
    Example:
        >>> is_ours(Warmup(2, Cosine())), is_ours(Warmup(2, lambda step, total_steps: 1.0))
        (True, False)
    """
    if isinstance(schedule, tuple):
        return all(map(is_ours, schedule))
    if not callable(schedule):
        return True
    if type(schedule) not in SCHEDULES.values():
        return False
    return all(is_ours(getattr(schedule, field.name)) for field in dataclasses.fields(schedule))


def parse(text: str) -> Schedule:
    """The schedule that a text describes, as Python would write it; nothing is evaluated.

    Args:
        text: calls of the names in `SCHEDULES`, with numbers, strings, True, False, None and lists as arguments.
    Returns:
        The schedule.
    Raises:
        ValueError: the text is no such call, or the schedule refuses its arguments.
        TypeError: the schedule refuses the type of an argument.
    Example:
        >>> parse("Warmup(0.05, Cosine())")
        Warmup(duration=0.05, then=Cosine(end=0.0), start=0.0, shape='linear')
    """
    if not isinstance(text, str):
        raise TypeError(message("parse", "text", "a string", text, "Give one such as 'Warmup(0.05, Cosine())'"))
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        schedule = _build(tree)
    except (SyntaxError, UnicodeError, RecursionError, MemoryError) as error:
        raise ValueError(_refusal(text)) from error
    if not callable(schedule):
        raise ValueError(_refusal(text))
    return schedule  # type: ignore[no-any-return]


def _build(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() as value) if value.bit_length() > 1023:
            raise ValueError(_refusal("a number of more than 300 digits"))
        case ast.Constant(value=value) if value is None or isinstance(value, (bool, int, float, str)):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_build(item) for item in items]
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=keywords) if name in SCHEDULES:
            named = {keyword.arg: _build(keyword.value) for keyword in keywords if keyword.arg is not None}
            if len(named) < len(keywords):
                raise ValueError(_refusal(ast.unparse(node)))
            kind, values = SCHEDULES[name], [_build(argument) for argument in arguments]
            try:
                inspect.signature(kind).bind(*values, **named)
            except TypeError as error:
                form = f"called as {name}{inspect.signature(kind)}".partition(" ->")[0]
                raise ValueError(
                    message("parse", "text", form, ast.unparse(node), str(error)[0].upper() + str(error)[1:])
                ) from error
            return kind(*values, **named)
    raise ValueError(_refusal(ast.unparse(node)))


def _refusal(got: str) -> str:
    fix = f"Names are {', '.join(SCHEDULES)}"
    return message("parse", "text", "a schedule such as Warmup(0.05, Cosine())", got[:80], fix)
