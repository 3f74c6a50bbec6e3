"""Schedules as text: written and read again, and nothing else is read."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from schedule_examples import EXAMPLES, SCHEDULES, check

from lightning_tricks.functional import schedules
from lightning_tricks.functional.schedules import (
    Constant,
    Cooldown,
    Cosine,
    CosineRestarts,
    Exponential,
    Join,
    Linear,
    OneCycle,
    Steps,
    Triangular,
    Warmup,
    WarmupStableDecay,
    describe,
    parse,
)

# ------------------------------------------------------------------ describe


@check
@given(SCHEDULES)
@example(Warmup("3ep", Steps(["1.5ep", 7, 0.5])))
@example(Linear(1e22, 1e-300))
@example(Constant(5e-324))
def test_a_described_schedule_is_parsed_as_itself(schedule):
    again = parse(describe(schedule))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert describe(again) == describe(schedule)
    assert parse(repr(schedule)) == schedule


@pytest.mark.parametrize("schedule", EXAMPLES, ids=lambda schedule: type(schedule).__name__)
def test_a_schedule_read_again_gives_the_same_factors(schedule):
    again = parse(describe(schedule))
    assert [again(k, 11) for k in range(14)] == [schedule(k, 11) for k in range(14)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Linear(1, 0), Linear(1.0, 0.0)),
        (Constant(-0.0), Constant(0)),
        (Steps([0.5, 5]), Steps((0.5, 5), gamma=0.1)),
        (CosineRestarts(cycles=2, multiplier=2), CosineRestarts(2, None, 2.0, 1, 0)),
        (Join([Constant(), Linear()], [5]), Join((Constant(1), Linear(1)), (5,))),
    ],
    ids=repr,
)
def test_equal_schedules_are_described_alike(one, other):
    assert one == other
    assert describe(one) == describe(other)


def test_a_schedule_of_numpys_numbers_is_described_as_one_of_pythons():
    numpy = pytest.importorskip("numpy")
    assert describe(Cosine(numpy.float64(0.1))) == describe(Cosine(0.1))
    assert parse(describe(Warmup(numpy.float64(0.05), Cosine()))) == Warmup(0.05, Cosine())


def my_schedule(step, total_steps):
    return 1.0


class Mine:
    def __call__(self, step, total_steps):
        return 1.0


def test_a_function_is_described_by_its_name():
    assert describe(my_schedule) == f"{__name__}.my_schedule"
    assert describe(Warmup(1, Mine())) == f"Warmup(duration=1, then={__name__}.Mine, start=0, shape='linear')"
    with pytest.raises(ValueError, match="parse: text must be a schedule such as"):
        parse(describe(Warmup(1, my_schedule)))


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_every_schedule_is_known_by_its_name(name):
    assert schedules.SCHEDULES[name] is getattr(schedules, name)


# ------------------------------------------------------------------ parse


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("Cosine()", Cosine()),
        (" \n Cosine( 0.1 )\t", Cosine(0.1)),
        ("Cosine(end=1e-3)", Cosine(0.001)),
        ("Constant(1_000)", Constant(1000)),
        ("Warmup(500, Cosine())", Warmup(500, Cosine())),
        ("Warmup('3ep', then=Cosine(0.1), shape=\"cosine\")", Warmup("3ep", Cosine(0.1), shape="cosine")),
        ("Steps([0.5, 0.75])", Steps([0.5, 0.75])),
        ("Steps((30, '60ep'), gamma=0.2)", Steps([30, "60ep"], 0.2)),
        ("Join([Constant(), Linear()], [0.5])", Join([Constant(), Linear()], [0.5])),
        ("CosineRestarts(cycles=None, length=0.25)", CosineRestarts(length=0.25)),
        ("OneCycle(three_phase=True)", OneCycle(three_phase=True)),
        ("Triangular(4, gamma=0.5)", Triangular(4, gamma=0.5)),
        ("WarmupStableDecay(\n  0.1,\n  0.2,  # of the run\n)", WarmupStableDecay(0.1, 0.2)),
        ("(Exponential(.01))", Exponential(0.01)),
    ],
)
def test_a_text_is_read_as_python_would(text, schedule):
    assert parse(text) == schedule


DEEP = 3000
HOSTILE = {
    "nothing": "",
    "blank": " \n",
    "a comment": "# Cosine()",
    "a number": "1.0",
    "a string": "'Cosine()'",
    "a list": "[Cosine()]",
    "none": "None",
    "a name": "Cosine",
    "two": "Cosine(), Cosine()",
    "two lines": "Cosine()\nCosine()",
    "a statement": "x = Cosine()",
    "an import": "import os",
    "a call": "print('made')",
    "a builtin": "eval('Cosine()')",
    "an unknown schedule": "Sine()",
    "a schedule's private name": "_locate()",
    "the abstract name": "Schedule()",
    "an attribute": "Cosine.__call__",
    "a call of an attribute": "Cosine().__call__(0, 1)",
    "a module's": "schedules.Cosine()",
    "a class's": "().__class__.__bases__[0].__subclasses__()",
    "a call of a call": "Cosine()()",
    "a call of a lambda": "(lambda: Cosine())()",
    "a call of an item": "[Cosine][0]()",
    "an item": "[Cosine()][0]",
    "a lambda": "lambda step, total: 1.0",
    "a lambda inside": "Warmup(1, lambda step, total: 1.0)",
    "a comprehension": "Steps([i for i in range(3)])",
    "a generator": "Steps(i for i in range(3))",
    "a set": "Steps({1, 2})",
    "a dictionary": "Steps({1: 2})",
    "a formatted string": "Warmup(f'{3}ep', Cosine())",
    "a formatted call": 'Warmup(f\'{open("made", "w")}\', Cosine())',
    "a walrus": "Warmup((d := 3), Cosine())",
    "a star": "Cosine(*[0.1])",
    "a star inside": "Steps([*[1, 2]])",
    "two stars": "Cosine(**{'end': 0.1})",
    "an await": "await Cosine()",
    "a yield": "(yield)",
    "a choice": "Cosine() if True else Linear()",
    "an or": "Cosine() or Linear()",
    "a comparison": "Cosine() == Cosine()",
    "a sum": "Cosine(0.1 + 0.1)",
    "a product": "Cosine(2 * 0.1)",
    "a power": "Cosine(10**10**10)",
    "a power of seven": "Cosine(9**9**9**9**9**9**9)",
    "a shift": "Cosine(1 << 10**12)",
    "a long string": "Warmup('ep' * 10**12, Cosine())",
    "a not": "OneCycle(three_phase=not True)",
    "a plus": "Cosine(+None)",
    "two minuses": "Cosine(--0.1)",
    "minus a string": "Cosine(-'0.1')",
    "bytes": "Warmup(b'3ep', Cosine())",
    "an ellipsis": "Cosine(...)",
    "an imaginary number": "Cosine(1j)",
    "a complex number": "Cosine(1 + 1j)",
    "nan": "Cosine(nan)",
    "inf": "Cosine(1e999)",
    "minus inf": "Cosine(-1e999)",
    "400 digits": f"Cosine(1{'0' * 400})",
    "5000 digits": f"Cosine(1{'0' * 5000})",
    "5000 hexadecimal digits": f"Cosine(0x1{'0' * 5000})",
    "5000 hexadecimal digits and too much": f"Cosine(0x1{'0' * 5000}, 1)",
    "a huge duration": f"Warmup(1{'0' * 400}, Cosine())",
    "a huge milestone": f"Steps([1, 1{'0' * 400}])",
    "huge epochs": f"InverseSqrt('{'9' * 5000}')",
    "a null byte": "Cosine(\0)",
    "half a character": "\ud800",
    "another alphabet": "\u0421osine()",
    "an unclosed bracket": "Cosine(",
    "an unclosed string": "Cosine('",
    "an escape": "Warmup('\\d', Cosine())",
    "deep brackets": f"{'(' * DEEP}Cosine(){')' * DEEP}",
    "deep lists": f"Steps({'[' * DEEP}1{']' * DEEP})",
    "shallow lists": f"Steps({'[' * 50}1{']' * 50})",
    "deep schedules": f"{'Warmup(1, ' * DEEP}Cosine(){')' * DEEP}",
    "deep attributes": f"Cosine{'.a' * DEEP * 30}()",
    "a deep sum": f"Cosine({'1+' * DEEP * 30}1)",
    "many minuses": f"Cosine({'-' * DEEP * 30}1)",
    "many nots": f"Cosine({'not ' * DEEP * 30}1)",
    "no arguments": "Warmup()",
    "too many": "Cosine(0.1, 0.2)",
    "an unknown one": "Cosine(start=1)",
    "one given twice": "Warmup(1, Cosine(), duration=2)",
    "one named twice": "Cosine(end=1, end=2)",
    "a class for a schedule": "Warmup(1, Cosine)",
    "a list for a schedule": "Warmup(1, [Cosine()])",
    "a string for a schedule": "Warmup(1, 'Cosine()')",
    "a schedule for a number": "Cosine(Cosine())",
    "true for a number": "Cosine(True)",
    "out of range": "Cosine(-0.1)",
    "no duration": "Warmup('3', Cosine())",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_anything_else_is_refused_and_nothing_is_evaluated(text, monkeypatch):
    called = []
    for name in ("eval", "exec", "open", "print"):
        monkeypatch.setattr(f"builtins.{name}", lambda *_, name=name: called.append(name))
    try:
        with pytest.raises((TypeError, ValueError)) as caught:
            parse(text)
    finally:
        monkeypatch.undo()
    assert called == []
    assert type(caught.value) in (TypeError, ValueError)
    assert re.fullmatch(r"(?s)\w+: \w+ must be .+, got .+\. .+\.", str(caught.value))
    assert len(str(caught.value)) < 20_000


@pytest.mark.parametrize("text", [None, 3, b"Cosine()", Cosine(), Cosine, ["Cosine()"]], ids=repr)
def test_what_is_no_text_is_refused(text):
    with pytest.raises(TypeError, match=r"parse: text must be .*, got "):
        parse(text)


@check
@given(st.text("Cosine()[]{}0123456789.,='\"+-*/:\\ \n", max_size=30) | st.text(max_size=20))
def test_any_text_is_read_or_refused(text):
    try:
        schedule = parse(text)
    except (TypeError, ValueError) as error:
        schedule = error
    assert callable(schedule) or " must be " in str(schedule)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "Sine()",
            "parse: text must be a schedule such as Warmup(0.05, Cosine()), got 'Sine()'. Names are Constant, Linear,",
        ),
        ("Warmup(1, Sine())", "parse: text must be a schedule such as Warmup(0.05, Cosine()), got 'Sine()'. Names are"),
        ("Cosine(0.1 + 0.1)", "got '0.1 + 0.1'. Names are"),
        ("Cosine(**{'end': 1})", "got \"Cosine(**{'end': 1})\". Names are"),
        (
            "Cosine(1, 2)",
            "parse: text must be called as Cosine(end: float = 0.0), got 'Cosine(1, 2)'. Too many positional",
        ),
        ("Cosine(End=1)", "got 'Cosine(End=1)'. Got an unexpected keyword argument 'End'."),
        ("Warmup(1)", "got 'Warmup(1)'. Missing a required argument: 'then'."),
        ("Cosine(-1)", "Cosine: end must be finite and at least 0 (factor of the base value), got -1. It multiplies"),
        ("Warmup(1, Cooldown(1.5, Cosine()))", "Cooldown: duration must be in (0, 1) when it is a float"),
    ],
)
def test_a_refusal_says_what_is_wrong_where(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(text)


def test_a_schedule_may_be_nested_far_deeper_than_anyone_would():
    schedule = Cosine()
    for _ in range(20):
        schedule = Cooldown(0.1, Warmup(0.1, schedule))
    assert parse(describe(schedule)) == schedule
