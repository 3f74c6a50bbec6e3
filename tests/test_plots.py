"""Pictures show the factors of the schedule, and the shell draws what Python draws."""

import subprocess
import sys

import pytest
from matplotlib.image import imread

import lightning_tricks as lt
from lightning_tricks.__main__ import main
from lightning_tricks.plots import POINTS, new_axes, text_picture


def line_of(figure):
    (line,) = figure.axes[0].lines
    return list(line.get_xdata()), list(line.get_ydata())


def test_picture_has_the_factor_of_every_step():
    schedule = lt.Warmup(3, lt.Steps([0.5]))
    steps, factors = line_of(lt.plot_schedule(schedule, 20))
    assert steps == list(range(21))
    assert factors == [schedule(step, 20) for step in steps]


def test_picture_of_a_long_run_has_its_ends():
    steps, factors = line_of(lt.plot_schedule(lt.Linear(), 10**6))
    assert (steps[0], steps[-1], len(steps)) == (0, 10**6, POINTS + 1)
    assert (factors[0], factors[-1]) == (1.0, 0.0)


def test_epochs_are_resolved():
    _, factors = line_of(lt.plot_schedule(lt.Warmup("2ep", lt.Constant()), 10, steps_per_epoch=3))
    assert factors == [lt.Warmup(6, lt.Constant())(step, 10) for step in range(11)]


def test_several_schedules_in_the_axes_of_a_user():
    ax = new_axes("test")
    for schedule in (lt.Linear(), lt.Cosine()):
        assert lt.plot_schedule(schedule, 10, ax=ax) is ax.figure
    assert len(ax.lines) == 2


def test_pyplot_has_no_figure_of_ours():
    from matplotlib import pyplot

    lt.plot_schedule(lt.Linear(), 10)
    assert pyplot.get_fignums() == []


def test_missing_matplotlib_is_said_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'plot_schedule needs matplotlib: pip install "lightning-tricks\[plots\]"'):
        lt.plot_schedule(lt.Linear(), 10)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((lt.Cosine, 10), TypeError, "plot_schedule: schedule must be a schedule"),
        ((lt.Cosine(), 0), ValueError, "plot_schedule: total_steps must be a whole number of at least 1"),
        ((lt.Cosine(), 2.5), TypeError, "plot_schedule: total_steps must be a whole number"),
        ((lt.Cosine(), 10, 0), ValueError, "plot_schedule: steps_per_epoch must be a whole number of at least 1"),
        (
            (lt.WarmupCosine("1ep"), 10),
            ValueError,
            "WarmupCosine: warmup must be in steps .* got '1ep'.*steps_per_epoch",
        ),
        ((lt.WarmupCosine(11), 10), ValueError, "WarmupCosine: warmup must be at most the run's 10"),
    ],
)
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        lt.plot_schedule(*arguments)


def heights(picture, width, height):
    """The lowest and highest mark of each column, from the bottom."""
    rows = [line[9:].ljust(width) for line in picture.splitlines()[:height]][::-1]
    marks = [[row for row in range(height) if rows[row][column] == "*"] for column in range(width)]
    return [(min(column), max(column)) for column in marks]


def test_picture_of_characters_has_a_mark_at_every_value():
    values = [k / 10 for k in range(11)]
    marks = heights(text_picture(values, width=11, height=11), 11, 11)
    assert marks == [(k, k) for k in range(11)]


def test_jumps_are_filled_so_that_the_line_does_not_break():
    marks = heights(text_picture([0, 0, 1, 1, 0.5], width=5, height=9), 5, 9)
    assert marks == [(0, 0), (0, 0), (1, 8), (8, 8), (4, 7)]


@pytest.mark.parametrize("values", [[0.0], [0.5], [0.0, 0.0], [1.0] * 300, [0.0, 3.0]])
def test_any_values_can_be_drawn(values):
    lines = text_picture(values).splitlines()
    assert len(lines) == 15
    assert max(map(len, lines)) <= 9 + 72


def test_shell_draws_in_the_terminal(capsys):
    main(["schedule", "Warmup(0.05, Cosine())", "--steps", "10000"])
    out = capsys.readouterr().out
    assert "Warmup(duration=0.05, then=Cosine(end=0.0), start=0.0, shape='linear'), 10000 optimizer steps" in out
    assert text_picture([lt.WarmupCosine(0.05)(step, 10000) for step in range(0, 10001, 5)]) in out
    assert out.rstrip().endswith("step 10000")


def test_shell_writes_a_picture(tmp_path, capsys):
    path = tmp_path / "out.png"
    main(
        [
            "schedule",
            "Join([Constant(), Cosine()], ['2ep'])",
            "--steps",
            "10",
            "--steps-per-epoch",
            "2",
            "--png",
            str(path),
        ]
    )
    height, width, _ = imread(path).shape
    assert min(height, width) > 100
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["__import__('os').system('true')", "--steps", "10"], "text must be a schedule such as"),
        (["Cosine()", "--steps", "0"], "total_steps must be a whole number of at least 1"),
        (["Cosine()", "--steps", "ten"], "invalid int value"),
        (["Cosine()"], "--steps"),
        (["Cosine(end=-1)", "--steps", "10"], "Cosine: end must be finite and at least 0"),
        (["Warmup('1ep', Cosine())", "--steps", "10"], "steps_per_epoch"),
        (["Cosine()", "--steps", "10", "--png", "/nowhere/out.png"], "No such file or directory"),
    ],
)
def test_shell_says_what_is_wrong(arguments, text, capsys):
    with pytest.raises(SystemExit) as end:
        main(["schedule", *arguments])
    assert end.value.code == 2
    assert text in capsys.readouterr().err


def test_module_is_a_command():
    command = [sys.executable, "-m", "lightning_tricks", "schedule", "Linear()", "--steps", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("Linear(start=1.0, end=0.0), 4 optimizer steps")
