"""The report: its numbers are those of the logs, its pictures what they say, and its page reads well in a browser."""

import base64
import csv
import html
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kit import fit
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from matplotlib.colors import LogNorm
from offline_wandb import payloads, read_run
from offline_wandb import runs as offline_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_tricks as lt
from lightning_tricks.ablations import Ablation, Effect
from lightning_tricks.ablations.pictures import answer, forest
from lightning_tricks.reports import report
from lightning_tricks.reports.build import _learning_rates, as_png, file_name, learning_curves, write_page
from lightning_tricks.reports.groups import group_runs
from lightning_tricks.reports.offline import read_offline
from lightning_tricks.reports.pictures import Curve, Panel, curves, layers, mean_line
from lightning_tricks.reports.runs import Run, read_runs
from lightning_tricks.reports.settings import flatten
from lightning_tricks.reports.summary import (
    QUANTITIES,
    best,
    by_metric,
    direction,
    last,
    moving_average,
    quantity,
    stage,
    thin,
    with_spread,
)

ARMS = {"plain": 0.05, "hot": 0.8}


def tricks():
    return [
        lt.UpdateMonitor(every_n_steps=2),
        lt.LRSchedule(lt.WarmupCosine(0.25)),
        lt.ParamSchedule("weight_decay", lt.Linear()),
        lt.EarlyStopping("val/loss", patience=1, min_delta=1.0),  # nothing improves so much: it stops
    ]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Two arms of two seeds each, with every logger; of the second arm only the CSV log."""
    folder = tmp_path_factory.mktemp("logs")
    for arm, lr in ARMS.items():
        for seed in range(2):
            torch.manual_seed(seed)
            loggers = [CSVLogger(folder, "csv", f"{arm}-{seed}")]
            if arm == "plain":
                loggers.append(WandbLogger(f"{arm}-{seed}", folder, offline=True, project="tests"))
                loggers.append(TensorBoardLogger(folder, "tensorboard", f"{arm}-{seed}"))
            for logger in loggers:
                logger.log_hyperparams({"arm": arm, "lr": lr, "seed": seed})
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*training ended after")
                fit(tricks(), logger=loggers, max_epochs=4)
            wandb.finish()
    return written(folder)


def written(folder):
    """The folder, once W&B has written its runs, which it does in another process."""
    for run in offline_runs(folder):
        read_run(run)
    return folder


def write_log(folder, rows, **settings):
    """A log as CSVLogger writes it."""
    folder.mkdir(parents=True)
    keys = sorted({key for row in rows for key in row})
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
    if settings:
        (folder / "hparams.yaml").write_text(yaml.dump(settings))
    return folder


def text_of(page):
    return html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<style>.*?</style>", "", Path(page).read_text())))


# ---------------------------------------------------------------------- reading


def test_identical_numbers_from_csv_and_wandb_and_tensorboard(logs):
    from_csv = read_runs("report", [logs / "csv" / f"plain-{seed}" for seed in range(2)])
    from_wandb = read_runs("report", logs / "wandb")
    assert [run.name for run in from_csv] == [run.name for run in from_wandb] == ["plain-0", "plain-1"]
    for one, other in zip(from_csv, from_wandb, strict=True):
        assert one.series == other.series
        assert one.settings == other.settings
        assert one.notes == other.notes == ()
        events = EventAccumulator(str(logs / "tensorboard" / one.name)).Reload()
        for key, series in one.series.items():
            scalars = {event.step: event.value for event in events.Scalars(key)}
            assert scalars == pytest.approx(series, rel=1e-6)  # which keeps 32 bits


def test_early_stopping_is_an_event_on_the_step_at_which_it_asked(logs):
    for run in read_runs("report", logs / "csv"):
        # Validated after 6, 12 and 18 steps: the second and third did not improve enough, with patience for one.
        assert list(run.series["event/early_stopping"].values()) == [1.0]
        (step,) = run.series["event/early_stopping"]
        assert step in (11, 12)  # rows of the last batch have the step before
        assert max(run.series["train/loss"]) == 11


def test_a_resumed_offline_run_is_one_run(tmp_path):
    for steps in (range(4), range(3, 6)):
        run = wandb.init(id="same", name="mine", dir=tmp_path, project="tests", resume="allow", mode="offline")
        for step in steps:
            run.log({"loss": len(steps) * 10 + step, "trainer/global_step": step})
        run.finish()
        time.sleep(1.1)  # W&B names folders by the second
    folder = written(tmp_path / "wandb")
    first, second = sorted(folder.glob("offline-run-*"))
    for paths in (folder, [first, folder], [second, first], [second / "run-same.wandb", folder]):
        (run,) = read_runs("report", paths)
        assert run.name == "mine"
        assert run.series == {"loss": {0: 40, 1: 41, 2: 42, 3: 33, 4: 34, 5: 35}}
    shutil.copytree(
        folder, tmp_path / "other" / "wandb", symlinks=True
    )  # another study's run of this id is another run
    assert len(read_runs("report", tmp_path)) == 2


def test_a_killed_run_is_read_as_far_as_it_was_written(logs, tmp_path):
    (file,) = [path for path in logs.rglob("*.wandb") if "plain-0" in read_runs("report", path.parent)[0].name]
    whole = read_runs("report", file)[0]
    cut = tmp_path / "offline-run-x" / file.name
    cut.parent.mkdir()
    cut.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    (run,) = read_runs("report", cut.parent)
    assert 0 < len(run.series["train/loss"]) < len(whole.series["train/loss"])
    assert run.series["train/loss"].items() <= whole.series["train/loss"].items()
    assert "not finished or was killed" in run.notes[0]


def test_a_run_that_is_being_written_is_read_as_far_as_it_is_there(logs, tmp_path):
    """At every 17th byte, and at every one of the last."""
    file = min(logs.rglob("*.wandb"), key=lambda path: path.stat().st_size)
    data, cut = file.read_bytes(), tmp_path / file.name
    whole, oracle = read_offline("report", file), list(payloads(data))
    for size in (*range(7, len(data) - 100, 17), *range(len(data) - 100, len(data))):
        cut.write_bytes(data[:size])
        part = read_offline("report", cut)
        assert part.rows == whole.rows[: len(part.rows)], size
        assert part.cut_off, size
        there = list(payloads(data[:size]))
        assert there == oracle[: len(there)], size
    assert not whole.cut_off


def test_a_row_that_was_cut_off_is_left_out_and_said(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\r\n0,1.5\r\n1,1.25\r\n2,0.12")
    (run,) = read_runs("report", tmp_path)
    assert run.series == {"train/loss": {0: 1.5, 1: 1.25}}
    assert "last row was cut off" in run.notes[0]


@pytest.mark.parametrize(
    "bad", ["1,2", "1,2,3,4", "inf,2,3", "nan,2,3", "1e300,2,3", "x,2,3", "\0" * 200_000, "1,\0,3"]
)
def test_a_damaged_line_in_the_middle_is_left_out_and_said(bad, tmp_path):
    (tmp_path / "metrics.csv").write_text(f"step,loss,accuracy\n0,4,5\n{bad}\n2,6,7\n")
    (run,) = read_runs("report", tmp_path)
    assert run.series == {"accuracy": {0: 5, 2: 7}, "loss": {0: 4, 2: 6}}
    assert run.notes == (f"{tmp_path / 'metrics.csv'}: 1 damaged line(s) are left out: 3.",)


def test_thousands_of_rows_with_gaps_are_read_as_a_loop_reads_them(tmp_path):
    rows, expected = ["step,loss,epoch,accuracy,note,loss"], {}
    for row in range(2500):
        step, loss, accuracy = (row * 7) % 2000, row / 8 if row % 3 else "", row / 4 if row % 50 == 0 else ""
        rows.append("damaged" if row == 1999 else f"{step},-1,0,{accuracy},{'word' if row == 5 else ''},{loss}")
        for key, value in (("loss", loss), ("accuracy", accuracy)):
            if value != "" and row != 1999:
                expected.setdefault(key, {})[step] = value
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    (run,) = read_runs("report", tmp_path)
    assert run.series == expected
    assert all(list(series) == sorted(series) for series in run.series.values())
    assert [note.rpartition(": ")[2] for note in run.notes[:1]] == ["2001."]
    assert "note is left out, since it holds no plain numbers." in run.notes[-1]


@pytest.mark.parametrize("first", ["step,loss", "loss,step"])
def test_a_table_that_a_spreadsheet_saved_is_read(first, tmp_path):
    (tmp_path / "metrics.csv").write_text(f"{first}\n1,1\n2,2\n", encoding="utf-8-sig")
    assert read_runs("report", tmp_path)[0].series == {"loss": {1: 1, 2: 2}}


def test_cells_that_hold_no_numbers_are_named_and_the_others_read(tmp_path):
    rows = ["step,a,b,c", "0,0.5,True,x", "1,n/a,1,y", "2,0.3,,", *(f"{step},error,," for step in range(3, 9))]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    (run,) = read_runs("report", tmp_path)
    assert run.series == {"a": {0: 0.5, 2: 0.3}, "b": {1: 1}}
    assert [note.partition("metrics.csv: ")[2] for note in run.notes] == [
        "of a these are no numbers, and left out: 'n/a' (step 1), 'error' (step 3), 'error' (step 4), ... (7).",
        "of b these are no numbers, and left out: 'True' (step 0).",
        "c is left out, since it holds no plain numbers.",
    ]


def test_of_columns_of_one_name_the_last_is_shown_and_that_is_said(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,loss,epoch\n0,1,2,0\n1,3,4,0\n")
    (run,) = read_runs("report", tmp_path)
    assert run.series == {"loss": {0: 2, 1: 4}}
    assert run.notes == (f"{tmp_path / 'metrics.csv'}: of several columns named loss the last is shown.",)


def just_begun(kind, folder):
    """A run as a kill, a full disk or a first second of training leaves it."""
    folder.mkdir(parents=True)
    table = folder / "metrics.csv"
    if kind.startswith("table"):
        table.write_text({"table of 0 bytes": "", "table with half a header": "epoch,st"}[kind])
        return table
    if kind.startswith("W&B"):
        file = folder / "run-x.wandb"
        if kind == "W&B link to nothing":
            file.symlink_to("nothing")
            return file
        file.write_bytes(b":W&B"[: int(kind.split()[-1])])
        return file
    table.write_text("step,loss\n0,1\n")
    (folder / "hparams.yaml").write_text({"cut settings": "lr: [1,", "settings in themselves": "x: &a [1, *a]\n"}[kind])
    return folder / "hparams.yaml"


KINDS = ["table of 0 bytes", "table with half a header", *(f"W&B file of {size}" for size in range(4))]
KINDS += ["W&B link to nothing", "cut settings", "settings in themselves"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_several_runs_that_cannot_be_read_is_left_out_and_said(kind, tmp_path):
    write_log(tmp_path / "a", [{"step": 0, "loss": 1}, {"step": 1, "loss": 2}])
    bad = just_begun(kind, tmp_path / "b")
    for paths in (tmp_path, [tmp_path / "a", tmp_path / "b"]):
        with pytest.warns(UserWarning, match=re.escape("report: Left out: runs must be")) as caught:
            text = text_of(report(paths, tmp_path / "report.html"))
        (warning,) = caught
        assert f"got '{bad}'" in str(warning.message)
        assert warning.filename == __file__
        assert str(warning.message).removeprefix("report: ") in text.rpartition("Left out ")[2]
        assert "One run: a." in text
    for alone in (tmp_path / "b", [tmp_path / "b"]):
        with pytest.raises(ValueError, match=re.escape(f"got '{bad}'")):
            report(alone)


@given(place=st.integers(7, 10**9), bit=st.integers(0, 7))
def test_a_bit_that_fell_over_in_a_wandb_file_is_an_error_that_names_it(logs, tmp_path_factory, place, bit):
    """Or it is past what is read: in what fills a block, or in a length, which is then longer than the file."""
    file = min(logs.rglob("*.wandb"), key=lambda path: path.stat().st_size)
    data, broken = bytearray(file.read_bytes()), tmp_path_factory.mktemp("broken") / "run-x.wandb"
    data[place % (len(data) - 7) + 7] ^= 1 << bit
    broken.write_bytes(data)
    whole = read_offline("report", file)
    with suppress(ValueError):
        part = read_offline("report", broken)
        assert part.rows == whole.rows[: len(part.rows)]
        assert part.cut_off


def test_a_byte_that_is_another_in_a_wandb_file_is_an_error_that_names_it(logs, tmp_path):
    """Here in a number of the log, which could be read as well."""
    file = min(logs.rglob("*.wandb"), key=lambda path: path.stat().st_size)
    data, broken = bytearray(file.read_bytes()), tmp_path / file.name
    place = data.index(b"train/loss")
    data[data.index(b"0.", place) + 3] ^= 1
    broken.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f"got '{broken}'. It is damaged: byte ")):
        read_offline("report", broken)


@pytest.mark.parametrize("lost", [8, 40, 4000])
def test_a_wandb_file_whose_end_is_zeros_is_read_as_far_as_it_was_written(logs, tmp_path, lost):
    """As a machine that lost power leaves it: the file has its length already."""
    file = min(logs.rglob("*.wandb"), key=lambda path: path.stat().st_size)
    data, broken = file.read_bytes(), tmp_path / file.name
    broken.write_bytes(data[:-lost] + bytes(lost))
    cut = tmp_path / "cut.wandb"
    cut.write_bytes(data[:-lost])
    assert read_offline("report", broken) == read_offline("report", cut)


def test_a_resumed_wandb_run_whose_last_part_has_just_begun_is_still_shown(tmp_path):
    run = wandb.init(id="same", name="mine", dir=tmp_path, project="tests", mode="offline")
    run.log({"loss": 1.0, "trainer/global_step": 0})
    run.finish()
    written(tmp_path)
    just_begun("W&B file of 2", tmp_path / "wandb" / "offline-run-99990101_000000-same").rename(
        tmp_path / "wandb" / "offline-run-99990101_000000-same" / "run-same.wandb"
    )
    with pytest.warns(UserWarning, match="files that W&B wrote"):
        (run,) = read_runs("report", tmp_path)
    assert run.series == {"loss": {0: 1.0}}
    assert "99990101" in run.notes[0]


def test_settings_with_a_tag_of_the_users_own_are_read_and_said(tmp_path):
    write_log(tmp_path / "run", [{"step": 0, "loss": 1}])
    (tmp_path / "run" / "hparams.yaml").write_text("lr: !Rate 0.5\nnet: !Net {depth: 3}\nseeds: !Rate [1, 2]\n")
    (run,) = read_runs("report", tmp_path)
    assert run.settings == {"lr": "0.5", "net": {"depth": 3}, "seeds": [1, 2]}
    assert "unknown tag !Rate, !Net" in run.notes[0]


def test_rows_by_hand_have_the_step_before_and_a_run_without_lightning_its_own(tmp_path):
    run = wandb.init(name="mixed", dir=tmp_path / "a", project="tests", mode="offline")
    run.log({"loss": 1.0, "trainer/global_step": 7})
    run.log({"mine": 2.0})
    run.finish()
    run = wandb.init(name="plain", dir=tmp_path / "b", project="tests", mode="offline")
    for value in (3.0, 4.0):
        run.log({"loss": value, "words": "three"})
    run.finish()
    assert read_runs("report", written(tmp_path / "a"))[0].series == {"loss": {7: 1.0}, "mine": {7: 2.0}}
    (run,) = read_runs("report", written(tmp_path / "b"))
    assert run.series == {"loss": {0: 3.0, 1: 4.0}}
    assert run.notes[0].endswith("words is left out, since it holds no plain numbers.")


def test_settings_are_read_without_making_objects(tmp_path):
    write_log(tmp_path / "run", [{"step": 0, "loss": 1}])
    text = "betas: !!python/tuple [0.9, 0.99]\nrun: !!python/object/apply:os.system ['touch made']\n"
    (tmp_path / "run" / "hparams.yaml").write_text(text + "kind: !!python/name:torch.optim.SGD ''\n")
    (run,) = read_runs("report", tmp_path / "run")
    assert run.settings == {"betas": [0.9, 0.99], "run": ["touch made"], "kind": "torch.optim.SGD"}
    assert not Path("made").exists()


def test_runs_of_one_name_are_told_apart(tmp_path):
    for name in "ab":
        write_log(tmp_path / name / "version_0", [{"step": 0, "loss": 1}])
    assert [run.name for run in read_runs("report", tmp_path)] == ["a/version_0", "b/version_0"]
    assert [run.name for run in read_runs("report", tmp_path / "a")] == ["version_0"]


def test_a_link_to_a_log_leads_to_it_and_links_below_a_folder_count_nothing_twice(logs, tmp_path):
    """W&B makes one called latest-run itself, beside the run."""
    (tmp_path / "link").symlink_to(logs / "csv")
    found = read_runs("report", logs / "csv")
    assert [run.series for run in read_runs("report", tmp_path / "link")] == [run.series for run in found]
    assert [run.name for run in read_runs("report", tmp_path / "link" / "hot-0")] == ["hot-0"]
    (latest,) = read_runs("report", logs / "wandb" / "latest-run")
    assert latest.name == "plain-1"
    assert len(read_runs("report", logs / "wandb")) == 2
    (tmp_path / "own" / "run").mkdir(parents=True)
    (tmp_path / "own" / "run" / "metrics.csv").write_text("step,loss\n0,1\n")
    (tmp_path / "own" / "best").symlink_to(tmp_path / "own" / "run")
    assert [run.name for run in read_runs("report", tmp_path / "own")] == ["run"]


def damaged(kind, folder):
    path = folder / kind
    path.mkdir()
    table = path / "metrics.csv"
    if kind == "no step":
        table.write_text("epoch,loss\n0,1\n")
    elif kind == "too short":
        table.write_text("step,loss,accuracy\n\n1,2\n")
    elif kind == "too long":
        table.write_text("step,loss\n0,1,2\n")
    elif kind == "no number":
        table.write_text("step,loss\nfirst,1\n")
    elif kind == "binary":
        table.write_bytes(b"\xff\xfe\x00\x01")
    elif kind == "yaml":
        table.write_text("step,loss\n0,1\n")
        (path / "hparams.yaml").write_text("lr: [1, 2\n")
    elif kind == "wandb":
        (path / "run-x.wandb").write_bytes(b"something else")
    elif kind == "records":
        (path / "run-x.wandb").write_bytes(b":W&B\x00\x00\x00" + b"\x00\x00\x00\x00\x05\x00\x01" + b"\xff" * 5)
    return path


MESSAGES = {
    "no step": "logs with a column 'step'",
    "too short": "line 3",
    "too long": "line 2",
    "no number": "line 2",
    "binary": "files that can be read",
    "yaml": "settings that YAML can read",
    "wandb": "files that W&B wrote",
    "records": "W&B runs that can be read",
    "empty": "folders with a log",
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_file_that_cannot_be_read_is_named(kind, tmp_path):
    path = damaged(kind, tmp_path)
    with pytest.raises(ValueError, match=re.escape(MESSAGES[kind])) as caught:
        report(path)
    assert str(path) in str(caught.value)
    assert not Path("report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"runs": 3}, TypeError, "a path, several"),
        ({"runs": []}, ValueError, "at least one run"),
        ({"runs": "nowhere"}, ValueError, "paths that exist"),
        ({"smooth": 0}, ValueError, "smooth"),
        ({"smooth": 4}, ValueError, "odd"),
        ({"band": (1e-2, 1e-4)}, ValueError, "low < high"),
        ({"modes": {"loss": "down"}}, ValueError, "'min' or 'max'"),
        ({"modes": "min"}, TypeError, "modes must be a dict of 'min' or 'max' for each metric, got 'min'"),
        ({"modes": ["min"]}, TypeError, "modes must be a dict"),
        ({"modes": {"nope": "min"}}, ValueError, "got ['nope']. There are loss."),
        ({"title": None}, TypeError, "title must be a text, got None"),
        ({"title": 5}, TypeError, "title must be a text, got 5"),
        ({"group": "arms"}, ValueError, "has arm, lr, seed"),
        ({"output": "."}, ValueError, "output must be a file, got '.'. Give the page's name"),
    ],
)
def test_wrong_arguments_are_refused_with_the_way_out(arguments, error, words, tmp_path):
    log = write_log(tmp_path / "run", [{"step": 0, "loss": 1}], arm="a", lr=0.1, seed=0)
    with pytest.raises(error, match=re.escape(words)):
        report(**{"runs": log, **arguments})


@pytest.mark.parametrize("name", ["matplotlib.figure", "wandb.proto"])
def test_what_is_not_installed_is_named(name, logs, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'report needs .*pip install "lightning-tricks\[(plots|wandb)\]"'):
        report(logs / "wandb")


def test_csv_logs_beside_wandb_runs_are_read_without_wandb(logs, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb.proto", None)
    with pytest.warns(UserWarning, match="Left out: report needs wandb to read"):
        runs = read_runs("report", logs)
    assert len(runs) == 4
    assert sum("pip install" in note for note in runs[0].notes) == 2


# ---------------------------------------------------------------------- numbers


@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=40), st.integers(0, 9)
)
def test_moving_average_is_the_mean_of_a_centred_window(values, radius):
    expected = []
    for index in range(len(values)):
        reach = min(radius, index, len(values) - 1 - index)
        around = [values[place] for place in range(index - reach, index + reach + 1) if math.isfinite(values[place])]
        expected.append(sum(around) / len(around) if around else math.nan)
    assert moving_average(values, 2 * radius + 1) == pytest.approx(expected, nan_ok=True, abs=1e-6)
    assert moving_average(values, 2 * radius + 1, 3) == pytest.approx(expected[::3], nan_ok=True, abs=1e-6)


def test_a_loss_that_exploded_leaves_the_average_after_it_alone():
    assert moving_average([1.0, 1e30, 1.0, 1.0, 1.0, 1.0], 3)[3:] == [1.0, 1.0, 1.0]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.integers(2, 30))
def test_thinned_points_keep_the_spikes(values, limit):
    series = dict(enumerate(values))
    kept = thin(series, limit)
    assert len(kept) <= limit
    assert kept.items() <= series.items()
    assert list(kept) == sorted(kept)
    assert {min(values), max(values)} <= set(kept.values())


@given(st.lists(st.floats(0.01, 1000), min_size=2, max_size=8, unique=True))
def test_spread_is_mean_and_deviation(values):
    mean, deviation = map(float, with_spread(values).split(" ± "))
    assert deviation == pytest.approx(statistics.stdev(values), rel=0.06, abs=1e-6)
    assert mean == pytest.approx(statistics.mean(values), rel=1e-3, abs=0.06 * statistics.stdev(values) + 1e-6)


@given(st.lists(st.integers(10**6, 10**6 + 5000), min_size=2, max_size=8, unique=True), st.sampled_from([-12, 0, 12]))
def test_a_mean_is_written_as_exactly_as_its_spread(numbers, power):
    values = [number * 10.0**power for number in numbers]
    mean, deviation = map(Decimal, with_spread(values).split(" ± "))
    exact = statistics.stdev(map(Decimal, values))
    place = Decimal(10) ** (exact.adjusted() - 1)  # of its second digit
    assert abs(deviation - exact) <= place * Decimal("0.501")
    assert abs(mean - statistics.mean(map(Decimal, values))) <= place * Decimal("0.501")


def test_a_mean_of_nearly_nothing_has_no_sign():
    assert with_spread([-0.0003, 0.1, -0.1]) == "0.00 ± 0.10"


def test_best_and_last():
    series = {0: 3.0, 5: 1.0, 9: math.nan, 12: 1.0, 20: 2.0}
    assert last(series) == 2.0
    assert best(series, "min") == (1.0, 5)
    assert best(series, "max") == (3.0, 0)
    assert best({0: math.nan}, "min") is None


def test_what_is_better_is_said_by_the_user_then_the_monitor_then_the_name():
    stopping = {"EarlyStopping": {"monitor": "val/score", "mode": "max"}}
    run = Run("run", Path(), {}, {"tricks": stopping})
    assert direction("val/score", [run], {}) == "max"
    assert direction("val/score", [run], {"val/score": "min"}) == "min"
    assert direction("val/score", [], {}) is None
    assert [direction(key, [], {}) for key in ("val/loss", "test_acc", "val_top1", "valid/mse")] == [
        "min",
        "max",
        "max",
        "min",
    ]
    assert stage("classification/loss") == ("classification/loss", "")
    assert [quantity(key) for key in ("lr", "lr-SGD", "learning_rate/0", "lr_loss", "lrelu")] == ["lr"] * 3 + [None] * 2


# ---------------------------------------------------------------------- groups


def test_seeds_are_found_by_equal_settings(logs):
    groups = group_runs("report", read_runs("report", logs / "csv"), None)
    assert {group.name: [run.name for run in group.runs] for group in groups} == {
        "arm = hot, lr = 0.8": ["hot-0", "hot-1"],
        "arm = plain, lr = 0.05": ["plain-0", "plain-1"],
    }


def test_groups_by_a_setting_and_by_the_users_names(logs):
    read = read_runs("report", logs / "csv")
    assert [group.name for group in group_runs("report", read, "arm")] == ["hot", "plain"]
    assert [len(group.runs) for group in group_runs("report", read, "tricks.UpdateMonitor.every_n_steps")] == [4]
    named = read_runs("report", {"ours": logs / "csv" / "hot-0", "theirs": [logs / "csv" / f"plain-{n}" for n in "01"]})
    assert [(group.name, len(group.runs)) for group in group_runs("report", named, None)] == [
        ("ours", 1),
        ("theirs", 2),
    ]


def test_groups_that_differ_by_their_tricks_are_called_by_them(tmp_path):
    tricks = {"EMA": {"decay": 0.999}, "LRSchedule": {"schedule": "Linear(start=1, end=0)"}}
    write_log(tmp_path / "a", [{"step": 0, "loss": 1}], lr=0.1)
    write_log(tmp_path / "b", [{"step": 0, "loss": 1}], lr=0.1, tricks=tricks)
    groups = group_runs("report", read_runs("report", tmp_path), None)
    assert [group.name for group in groups] == ["no tricks", "EMA + LRSchedule"]


def test_runs_without_settings_are_not_taken_for_seeds(tmp_path):
    for name in "ab":
        write_log(tmp_path / name, [{"step": 0, "loss": 1}])
    assert [group.name for group in group_runs("report", read_runs("report", tmp_path), None)] == ["a", "b"]


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ({"lr": 0.1, "wd": 0.2, "seed": 0}, {"wd": 0.2, "seed": 1, "lr": 0.1}, True),
        ({"tricks": {"EMA": {"decay": 0.9}, "Mixup": {}}}, {"tricks": {"Mixup": {}, "EMA": {"decay": 0.9}}}, True),
        ({"seed": 0}, {"seed": 1}, True),
        ({"lr": 0.1, "seed_everything": 1}, {"lr": 0.1, "seed_everything": 2}, True),
        ({"lr": 1}, {"lr": 1.0}, True),
        ({"lr": 0.1}, {"lr": 0.10000001}, False),
        ({"betas": [0.9, 0.99]}, {"betas": [0.99, 0.9]}, False),
    ],
)
def test_runs_are_together_whose_settings_are_equal_in_any_order(one, other, together):
    runs = [Run(name, Path(name), {}, settings) for name, settings in (("a", one), ("b", other))]
    assert len(group_runs("report", runs, None)) == (1 if together else 2)


@pytest.mark.parametrize(
    ("settings", "by", "lead", "spread"),
    [
        ([{"lr": 1, "seed": n} for n in range(2)], None, "1 group of runs that differ by their seed", "over the seeds"),
        ([{"lr": 1}, {"lr": 1}], None, "1 group of runs with equal settings:", "over runs with equal settings"),
        ([{"arm": "a", "lr": n, "seed": 0} for n in range(2)], "arm", "1 group: a", "over the runs of a group"),
    ],
)
def test_a_spread_is_over_seeds_only_where_the_settings_say_so(settings, by, lead, spread, tmp_path):
    for index, each in enumerate(settings):
        write_log(tmp_path / f"run{index}", [{"step": step, "val/loss": index + step} for step in range(3)], **each)
    text = text_of(report(tmp_path, tmp_path / "report.html", group=by))
    assert f"2 runs in {lead}" in text
    assert f"{spread} (n - 1)" in text
    assert ("the seeds" in text, "their seed" in text) == ("seeds" in spread,) * 2


def test_a_csv_run_that_was_resumed_is_not_called_two_seeds(tmp_path):
    for version, first in enumerate((0, 100)):
        rows = [{"step": step, "val/loss": 10 - step / 20} for step in range(first, first + 90, 10)]
        write_log(tmp_path / f"version_{version}", rows, lr=0.1, seed=0)
    text = text_of(report(tmp_path, tmp_path / "report.html"))
    assert "The steps of version_1 follow those of version_0, and both have the same settings" in text
    assert "over the seeds" not in text
    assert "by their seed" not in text
    write_log(tmp_path / "version_2", [{"step": 200, "val/loss": 1.0}], lr=0.1, seed=1)
    text = text_of(report(tmp_path, tmp_path / "report.html"))
    assert text.count("follow those of") == 1
    assert "over the seeds" not in text


def test_a_log_of_a_test_alone_is_no_part_of_a_resumed_run(tmp_path):
    write_log(tmp_path / "fit", [{"step": step, "val/loss": 1.0} for step in range(9)], lr=0.1)
    write_log(tmp_path / "test", [{"step": 9, "test/loss": 1.0}], lr=0.1)
    assert "follow those of" not in text_of(report(tmp_path, tmp_path / "report.html"))


def test_settings_are_flattened():
    given = {"a": {"b": {"c": 1e-7}, "d": []}, "e": None, "f": (1, 0.5), "g": {}, "h": True}
    assert flatten(given) == {"a.b.c": "1e-07", "a.d": "none", "e": "none", "f": "1, 0.5", "g": "none", "h": "True"}


# ---------------------------------------------------------------------- pictures


def lines_of(axes, label=None):
    return [line for line in axes.lines if (label is None or line.get_label() == label) and len(line.get_xdata()) > 1]


def test_the_smoothed_curve_is_not_only_in_a_ui():
    first = {step: float((7 * step) % 13) for step in range(0, 60, 2)}
    second = {step: value + 1 for step, value in first.items() if step < 40}
    panel = Panel("loss", "loss", (Curve("seeds", "#0072B2", "solid", (first, second)),))
    picture = curves("loss", "loss", [panel], [], smooth=5)
    (axes,) = picture.figure.axes
    (mean,) = lines_of(axes, "seeds")
    thin_lines = [line for line in lines_of(axes) if line is not mean]
    averages = [moving_average(list(series.values()), 5) for series in (first, second)]
    assert [list(line.get_ydata()) for line in thin_lines] == averages
    # The mean ends with the first seed that ends.
    assert list(mean.get_xdata()) == list(second)
    expected = [(one + other) / 2 for one, other in zip(averages[0], averages[1], strict=False)]
    assert list(mean.get_ydata()) == pytest.approx(expected)
    points = {tuple(point) for collection in axes.collections for point in collection.get_offsets().tolist()}
    assert points == {(step, value) for series in (first, second) for step, value in series.items()}
    assert "moving averages of 5 points" in picture.caption


@pytest.mark.parametrize("starts", [(0, 1), (0, 0.5, 0.25)])
@pytest.mark.parametrize("size", [50, 1500])
def test_runs_that_were_logged_at_other_steps_have_a_mean(starts, size):
    """Of straight lines the mean is the straight line between them, wherever their points are."""
    runs = tuple(
        {int(100 * (n + start)): index + 3.0 * (n + start) for n in range(size)} for index, start in enumerate(starts)
    )
    picture = curves("loss", "loss", [Panel("loss", "loss", (Curve("runs", "#0072B2", "solid", runs),))], [], 1)
    (mean,) = lines_of(picture.figure.axes[0], "runs")
    steps = list(mean.get_xdata())
    offset = statistics.mean(range(len(starts)))
    assert list(mean.get_ydata()) == pytest.approx([offset + 0.03 * step for step in steps])
    assert len(steps) > 45
    assert steps[0] == max(min(run) for run in runs)


def test_where_no_mean_is_drawn_neither_legend_nor_words_have_one():
    runs = tuple({step: float(step) for step in range(first, first + 9)} for first in (0, 100))
    panel = Panel("loss", "loss", (Curve("parts", "#0072B2", "dashed", runs),))
    picture = curves("loss", "loss", [panel], [], 1)
    (axes,) = picture.figure.axes
    assert {line.get_linestyle() for line in axes.lines} == {"-"}
    assert [text.get_text() for text in picture.figure.legends[0].get_texts()] == ["parts"]
    assert [line.get_linestyle() for line in picture.figure.legends[0].get_lines()] == ["-"]
    assert "No mean is drawn of parts: at no two steps in a row have all its runs a value." in picture.caption


@pytest.mark.parametrize(
    "runs",
    [
        ({step: float(step) for step in range(11)}, {5: 1.0}),
        (dict.fromkeys(range(6), 1.0), dict.fromkeys(range(5, 9), 2.0)),
        (
            {step: (1.0, math.nan)[step % 2] for step in range(9)},
            {step: (math.nan, 1.0)[step % 2] for step in range(9)},
        ),
    ],
    ids=["one point", "one step together", "never both"],
)
def test_a_mean_of_one_point_is_no_line(runs):
    assert mean_line(runs) == {}


def test_a_short_run_beside_a_long_one_keeps_its_points():
    """Thinned alike, the mean would have none left of the range that both cover."""
    runs = (dict.fromkeys(range(60000), 1.0), dict.fromkeys(range(90), 3.0))
    picture = curves("loss", "loss", [Panel("loss", "loss", (Curve("both", "#0072B2", "solid", runs),))], [], 1)
    (mean,) = lines_of(picture.figure.axes[0], "both")
    assert list(mean.get_ydata()) == [2.0] * 90


def drawn_outside(figure):
    """Titles and names that do not fit on a figure."""
    figure.draw_without_rendering()
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    texts += [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    boxes = {text.get_text(): text.get_window_extent() for text in [*texts, *figure.texts] if text.get_text()}
    within = figure.bbox.padded(1)
    return [text for text, box in boxes.items() if not (within.contains(*box.min) and within.contains(*box.max))]


def test_long_names_are_wrapped_and_fit_on_their_pictures(tmp_path):
    long = "a_very_long_name_" * 12
    rows = [{"step": step, f"val/{long}": step, "update_ratio/conv": 1e-3} for step in range(3)]
    groups = {f"{long} {name}": write_log(tmp_path / name, rows) for name in "ab"}
    groups = group_runs("report", read_runs("report", groups), None)
    found = [
        *learning_curves(groups, None),
        *layers("x", "Update ratio", "ratio", groups, "update_ratio", (1e-4, 1e-2)),
    ]
    assert len(found) == 3
    assert [len(picture.figure.legends) for picture in found] == [1, 0, 0]
    for picture in found:
        assert drawn_outside(picture.figure) == []


def test_letters_that_the_font_lacks_are_written_as_their_numbers(tmp_path):
    """Matplotlib would warn, which is an error here, and draw empty boxes."""
    names = ["損失", "🔥loss", "емкость", "größe", ""]
    log = write_log(tmp_path / "実験", [{"step": step, **dict.fromkeys(names, step)} for step in range(3)])
    groups = group_runs("report", read_runs("report", log), None)
    found = [picture.figure.axes[0].get_title() for picture in learning_curves(groups, None)]
    assert sorted(found) == sorted(["\\u640d\\u5931", "\\U0001f525loss", "емкость", "größe", "(no name)"])
    text = text_of(report(log, tmp_path / "report.html"))
    assert all(name in text for name in ["損失", "🔥loss", "(no name)", "実験"])


def test_thousands_of_points_are_thinned_out_and_it_is_said():
    series = {step: 1.0 + step % 7 for step in range(50_000)} | {31_415: 100.0}
    picture = curves("loss", "loss", [Panel("loss", "loss", (Curve("run", "#000000", "solid", (series,)),))], [], None)
    (axes,) = picture.figure.axes
    offsets = axes.collections[0].get_offsets().tolist()
    assert len(offsets) <= 600
    assert [31_415.0, 100.0] in offsets
    assert "of up to 50,000 a run, the lowest and the highest of each stretch" in picture.caption


def test_events_are_marked_at_the_edge_on_the_time_axis_of_the_curves():
    series = dict.fromkeys(range(100), 1.0)
    panel = Panel("loss", "loss", (Curve("run", "#000000", "solid", (series,)),))
    picture = curves("loss", "loss", [panel], [("early_stopping", "#333333", [42])], None)
    (axes,) = picture.figure.axes
    marks = [line for line in axes.lines if line.get_marker() == "v" and len(line.get_xdata())]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in marks] == [([42], [1.0])]
    (legend,) = picture.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["run", "early stopping"]
    picture.figure.draw_without_rendering()
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())  # outside of the data


def measured(folder, names, steps=50):
    rows = [
        {"step": step, **{f"update_ratio/{name}": 10.0 ** (-5 + index) for index, name in enumerate(names)}}
        for step in range(steps)
    ]
    write_log(folder, rows)
    return group_runs("report", read_runs("report", folder), None)


def test_layers_stand_against_the_band_in_the_order_of_their_numbers(tmp_path):
    groups = measured(tmp_path / "run", ["layers.2", "layers.10", "layers.1"])
    (picture,) = layers("x", "Update ratio", "ratio", groups, "update_ratio", (1e-4, 1e-2))
    axes = picture.figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layers.1", "layers.2", "layers.10"]
    array = axes.collections[0].get_array().reshape(3, 50)
    assert array[:, 0].tolist() == pytest.approx([1e-3, 1e-5, 1e-4])
    assert "below the band: layers.2." in picture.caption
    colours = axes.collections[0].cmap(axes.collections[0].norm([1e-5, 2e-4, 5e-3, 1e-1]))
    blue, red = colours[:, 2], colours[:, 0]
    assert blue[0] > red[0]
    assert red[3] > blue[3]
    assert (abs(colours[1:3, 0] - colours[1:3, 2]) < 0.02).all()  # grey within


def test_layers_that_are_in_the_middle_of_the_band_are_seen_and_all_columns_are_alike(tmp_path):
    (picture,) = layers("x", "Ratio", "ratio", measured(tmp_path / "run", ["a"]), "update_ratio", (1e-8, 1e-2))
    mesh = picture.figure.axes[0].collections[0]
    assert (mesh.cmap(mesh.norm([1e-5]))[0, :3] < 0.95).all()  # the paper is white
    edges = mesh.get_coordinates()[0, :, 0]
    assert edges.tolist() == [step - 0.5 for step in range(51)]
    (picture,) = layers("x", "Ratio", "ratio", measured(tmp_path / "one", ["a"], 1), "update_ratio", (1e-8, 1e-2))
    assert picture.figure.axes[0].collections[0].get_coordinates()[0, :, 0].tolist() == [-0.5, 0.5]


def test_names_of_thirty_layers_do_not_overlap(tmp_path):
    names = [f"backbone.encoder.blocks.{index}.attention.projection" for index in range(30)]
    groups = measured(tmp_path / "run", names, steps=3)
    (picture,) = layers("x", "Update ratio", "ratio", groups, "update_ratio", (1e-40, 1e2))
    picture.figure.draw_without_rendering()
    axes = picture.figure.axes[0]
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) == 30
    assert min(box.x0 for box in boxes) >= 0
    tops = sorted((box.y0, box.y1) for box in boxes)
    assert all(upper[0] >= lower[1] - 1 for lower, upper in pairwise(tops))


def test_zeros_infinities_and_what_is_no_number_have_a_colour(tmp_path):
    rows = [
        {"step": step, "update_ratio/a": value, "update_ratio/b": 1e-3}
        for step, value in enumerate([0, math.inf, math.nan])
    ]
    write_log(tmp_path / "run", rows)
    groups = group_runs("report", read_runs("report", tmp_path), None)
    (picture,) = layers("x", "Update ratio", "ratio", groups, "update_ratio", (1e-4, 1e-2))
    array = picture.figure.axes[0].collections[0].get_array().reshape(2, 3)
    assert bool(array.mask[0, 2])
    assert array[0, :2].tolist() == pytest.approx([1e-6, 1.0])
    assert "White: not logged, or not a number." in picture.caption


@pytest.mark.parametrize(
    ("quantity", "values", "scale", "ends"),
    [
        ("activation_zeros", [0.01, 0.9], "linear", (0, 1)),
        ("activation_mean", [-0.5, 1.5], "linear", (-0.5, 1.5)),
        ("grad_norm", [1e-4, 1.0], "log", (1e-4, 1.0)),
        ("weight_norm", [3.0, 3.0], "linear", (2.5, 3.5)),
    ],
)
def test_groups_share_a_scale_of_colours(quantity, values, scale, ends, tmp_path):
    for name, value in zip("ab", values, strict=True):
        write_log(tmp_path / name, [{"step": step, f"{quantity}/head": value} for step in range(2)])
    groups = group_runs("report", read_runs("report", tmp_path), None)
    found = list(layers("x", "Layers", QUANTITIES[quantity][1], groups, quantity))
    assert [picture.name for picture in found] == ["x-a", "x-b"]
    for picture in found:
        norm = picture.figure.axes[0].collections[0].norm
        assert (norm.vmin, norm.vmax) == pytest.approx(ends)
        assert isinstance(norm, LogNorm) == (scale == "log")


# ---------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def page(logs, tmp_path_factory):
    return report(logs / "csv", tmp_path_factory.mktemp("page") / "report.html", group="arm")


def test_the_page_is_whole_and_its_pictures_lie_beside_it(page):
    source = page.read_text()
    embedded = [base64.b64decode(text) for text in re.findall(r'src="data:image/png;base64,([^"]+)"', source)]
    beside = sorted(path.read_bytes() for path in (page.parent / "report_pictures").glob("*.png"))
    assert sorted(embedded) == beside
    names = {path.stem for path in (page.parent / "report_pictures").glob("*.png")}
    assert {"loss", "lr-SGD", "weight_decay", "update_ratio", "grad_norm", "update_ratio-layers-hot"} <= names
    without = re.sub(r'src="data:[^"]+"', "", source)
    assert not re.findall(r"https?:|<script|<link rel=.stylesheet|@import|url\(", without)


def test_results_are_means_and_spreads_of_what_was_logged(page, logs):
    text = re.sub(r"\s+", " ", text_of(page))
    for arm in ARMS:
        tables = []
        for seed in range(2):
            with (logs / "csv" / f"{arm}-{seed}" / "metrics.csv").open(newline="") as file:
                tables.append([float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]])
        assert with_spread([values[-1] for values in tables]) in text
        assert f"best {with_spread([min(values) for values in tables])}" in text
    assert "4 runs in 2 groups of runs that differ by their seed: hot (2), plain (2)." in text


def test_tricks_settings_events_and_what_is_missing_are_in_words(page):
    text = re.sub(r"\s+", " ", text_of(page))
    for words in (
        "early stopping hot-0",
        "LRSchedule.schedule WarmupCosine(warmup=0.25, end=0)",
        "EarlyStopping.patience 1",
        "By what the groups differ: hot plain arm hot plain lr 0.8 0.05",
        "Activations: nothing was logged; ActivationMonitor logs them.",
    ):
        assert words in text


def test_keys_that_differ_in_case_or_in_a_mark_have_pictures_of_their_own(tmp_path):
    keys = ["Loss", "loss", "LOSS", "A/B", "a b"]
    rows = [{"step": step, **dict.fromkeys(keys, step)} for step in range(3)]
    report(write_log(tmp_path / "run", rows), tmp_path / "report.html")
    names = [path.name.casefold() for path in (tmp_path / "report_pictures").iterdir()]
    assert len(set(names)) == len(keys)
    assert {"loss.png", "a-b.png"} <= set(names)


def test_what_a_picture_would_show_nothing_of_is_said_in_words(tmp_path):
    rows = [
        {"step": step, "grad_norm/a": 1.0 + step, "grad_norm_clipped/a": 1.0 + step, "grad_nonfinite/total": 0}
        | {"activation_zeros/a": 0.0, "activation_zeros/total": 0.0}
        for step in range(3)
    ]
    page = report(write_log(tmp_path / "run", rows), tmp_path / "report.html")
    text = text_of(page)
    assert "Gradient norm, after clipping: the same as before, nothing was clipped." in text
    assert "Gradients that are not finite: 0 at every layer and step." in text
    assert "Activations: share of zeros: 0 at every layer and step." in text
    assert "Activations: nothing was logged" not in text
    assert [path.name for path in page.with_name("report_pictures").iterdir()] == ["grad_norm-layers-run.png"]
    clipped = [
        row | {"grad_norm_clipped/a": 1.0, "grad_nonfinite/total": math.nan, "activation_zeros/a": 0.5} for row in rows
    ]
    page = report(write_log(tmp_path / "clipped", clipped), tmp_path / "clipped.html")
    assert "every layer and step" not in text_of(page)
    assert "nothing was clipped" not in text_of(page)
    assert page.with_name("clipped_pictures").joinpath("grad_norm_clipped-layers-clipped.png").exists()


def test_a_curve_that_one_of_several_groups_has_is_named(tmp_path):
    rows = [{"step": step, "lr-SGD": 0.1, "val/loss": 1.0} for step in range(3)]
    others = [{"step": row["step"], "val/loss": 1.0} for row in rows]
    logs = {"ours": write_log(tmp_path / "a", rows), "theirs": write_log(tmp_path / "b", others)}
    (picture,) = _learning_rates(group_runs("report", read_runs("report", logs), None))
    assert [text.get_text() for text in picture.figure.legends[0].get_texts()] == ["ours"]
    (picture,) = _learning_rates(group_runs("report", read_runs("report", tmp_path / "a"), None))
    assert not picture.figure.legends  # the only one there is


def test_tricks_that_some_groups_have_are_named_and_their_settings_folded(tmp_path):
    monitor = {"UpdateMonitor": {"every_n_steps": 5}}
    for name, tricks in (("a", {}), ("b", {"EMA": {"decay": 0.9}}), ("c", {"UpdateMonitor": {"every_n_steps": 9}})):
        write_log(tmp_path / name, [{"step": 0, "loss": 1.0}], tricks=monitor | tricks, name=name)
    text = re.sub(r"\s+", " ", text_of(report(tmp_path, tmp_path / "report.html", group="name")))
    shown, folded = text.partition("By what the groups differ:")[2].split("Tricks and their settings")
    assert shown.strip() == "a b c tricks that not all have none EMA none name a b c UpdateMonitor.every_n_steps 5 5 9"
    assert "EMA.decay - 0.9 -" in folded


def test_the_page_of_an_ablation_begins_with_its_answer(ablation_page):
    page, png = ablation_page
    source = page.read_text()
    first = source.index("<section")
    assert source.index(base64.b64encode(png).decode()) > first
    text = re.sub(r"\s+", " ", text_of(page))
    answered = text[text.index("Harms: mixing; helps: EMA; unknown: luck.") : text.index("Last logged value")]
    assert "EMA +0.021 +0.013 to +0.034 helps +5.0% +1.0 MiB mixing -0.050 -0.080 to -0.013 harms" in answered
    assert "luck +0.001 unknown unknown" in answered
    assert "with this trick alone, less the baseline without any" in answered


@pytest.fixture(scope="module")
def ablation_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    logs = {name: write_log(folder / name, [{"step": step, "val/accuracy": 0.9} for step in range(3)]) for name in "ab"}
    effects = {
        "EMA": Effect((0.015, 0.0213, 0.027), (0.0128, 0.0336), time=0.05, memory=2.0**20, helps=True),
        "mixing": Effect((-0.06, -0.04), (-0.0795, -0.0131), time=0.0, memory=None, helps=False),
        "luck": Effect((0.001,), (-math.inf, math.inf), time=0.0, memory=None, helps=None),
    }
    ablation = Ablation("val/accuracy", "max", "one-at-a-time", results={}, effects=effects)
    png = as_png(forest(ablation))
    return write_page(logs, folder / "report.html", title="Ablation", first=[answer(ablation, png)]), png


def test_a_run_with_little_in_it_still_has_a_report(tmp_path):
    write_log(tmp_path / "run", [{"step": 0, "val/score": 0.5}])
    text = text_of(report(tmp_path / "run", tmp_path / "out" / "little.html"))
    for words in ("One run: run.", "0.5", "No settings were logged.", "Learning curves: no metric was logged at two"):
        assert words in text
    assert "Whether low or high is better is not known of val/score" in text
    assert list((tmp_path / "out" / "little_pictures").iterdir()) == []


def test_a_page_that_is_written_again_leaves_no_pictures_of_the_earlier_one(tmp_path):
    rows = [{"step": step, "val/loss": step, "val/old": 2 * step} for step in range(3)]
    before = write_log(tmp_path / "before", rows)
    after = write_log(tmp_path / "after", [{key: row[key] for key in ("step", "val/loss")} for row in rows])
    page = report(before, tmp_path / "report.html")
    folder = page.with_name("report_pictures")
    assert {path.name for path in folder.iterdir()} == {"loss.png", "old.png"}
    for name in ("mine.png", "mine.txt"):
        (folder / name).write_bytes(b"" if name.endswith("png") else b"words")
    picture, *_ = learning_curves(group_runs("report", read_runs("report", before), None), 1)
    (folder / "other.png").write_bytes(as_png(picture.figure)[:-1])
    shutil.copy(folder / "old.png", folder / "for_the_paper.png")
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to("nothing")
    report(after, page)
    users = {"mine.png", "mine.txt", "other.png", "for_the_paper.png", "folder.png", "link.png"}
    assert {path.name for path in folder.iterdir()} == {"loss.png", *users}


def test_the_best_group_of_each_metric_is_marked_where_a_direction_is_known(tmp_path):
    values = {"a": (1.0, 0.5, 3), "b": (0.5, 0.5, 4), "c": (math.nan, 0.5, 5)}
    for name, (loss, accuracy, score) in values.items():
        row = {"val/loss": loss, "val/acc": accuracy, "val/score": score, "train/loss": score}
        write_log(tmp_path / name, [{"step": 0, **row}])
    source = report(tmp_path, tmp_path / "report.html").read_text()
    results = source[source.index("<h2>Results") : source.index("<h2>Settings")]
    cells = re.findall(r"<t[dh](?: [^>]*)?>(.*?)</t[dh]>", results)
    columns = [
        "val/acc<small>high is better</small>",
        "val/loss<small>low is better</small>",
        "val/score",
        "train/loss",
    ]
    rows = ["a 0.5 1 3 3", "b 0.5 ★_0.5 4 4", "c 0.5 nan 5 5"]
    assert cells == ["", *columns, *(cell.replace("_", " ") for row in rows for cell in row.split())]
    assert "★ is the best last value, however small its lead." in results
    text = text_of(report(tmp_path, tmp_path / "report.html", modes={"val/score": "max"}))
    assert "★ 5" in text


def test_rounding_is_no_lead_and_what_diverged_none(tmp_path):
    for name, loss in {"a": 0.1 + 0.2, "b": 0.3}.items():
        write_log(tmp_path / "same" / name, [{"step": 0, "val/loss": loss}])
    assert "★" not in text_of(report(tmp_path / "same", tmp_path / "same.html"))
    for name, loss in {"a": math.nan, "b": 0.3}.items():
        write_log(tmp_path / "lost" / name, [{"step": 0, "val/loss": loss}])
    assert "★ 0.3" in text_of(report(tmp_path / "lost", tmp_path / "lost.html"))


def test_names_are_text_and_not_html_or_mathematics(tmp_path):
    name = "<script>alert(1)</script> & $x_$ _"
    rows = [{"step": step, "val/$a$ <b>": step, "update_ratio/$_$": 1e-3} for step in range(3)]
    groups = {name: write_log(tmp_path / "a", rows), "_hidden": write_log(tmp_path / "b", rows)}
    source = report(groups, tmp_path / "report.html").read_text()
    assert "<script>" not in source
    assert html.escape(name) in source


def test_values_that_are_not_finite_are_said(tmp_path):
    rows = [{"step": step, "train/loss": value} for step, value in enumerate([1.0, math.nan, math.inf, 0.5])]
    text = text_of(report(write_log(tmp_path / "run", rows), tmp_path / "report.html"))
    assert "2 values are not finite, or beyond 1e100, and not drawn." in text


def test_a_metric_that_is_nowhere_finite_has_no_empty_picture(tmp_path):
    rows = [{"step": step, "train/loss": math.nan, "grad_norm/total": math.inf, "val/loss": 1.0} for step in range(3)]
    page = report({"a": write_log(tmp_path / "a", rows), "b": write_log(tmp_path / "b", rows)}, tmp_path / "page.html")
    assert [path.name for path in (tmp_path / "page_pictures").iterdir()] == ["loss.png"]
    assert "no value is finite of grad_norm/total, train/loss, which have no curves." in text_of(page)


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (lambda step: math.nan, "At some steps or at all not finite: a."),
        (lambda step: 1.0 if step < 3 else math.nan, "steps above the band: a. At some steps or at all not finite: a."),
        (lambda step: 1e-3, "Every layer is in the band"),
        (lambda step: 1e-6 if step % 2 else 1.0, "For more than half of the steps above the band: a."),
        (lambda step: (1e-6, 1.0, 1e-3)[step % 3], "more than half of the steps now above and now below the band: a."),
    ],
)
def test_what_is_not_finite_is_not_in_the_band(ratio, words, tmp_path):
    rows = [{"step": step, "update_ratio/a": ratio(step)} for step in range(9)]
    text = text_of(report(write_log(tmp_path / "run", rows), tmp_path / "report.html"))
    assert words in text
    assert ("is in the band" in text) == (words == "Every layer is in the band")


def test_huge_numbers_long_names_and_strange_tricks_have_a_report(tmp_path):
    long = "val/" + "long_" * 100
    numbers = [1e308, -1e308, 1e308, 1.0]
    rows = [{"step": step, "val/loss": x, "update_norm/a": x, long: x} for step, x in enumerate(numbers)]
    logs = [write_log(tmp_path / f"{tricks}", rows, tricks=tricks) for tricks in ("some", "others", 3)]
    logs += [write_log(tmp_path / f"seed{seed}", rows[:3], lr=1, seed=seed) for seed in range(3)]
    text = text_of(report(logs, tmp_path / "report.html"))
    assert "beyond 1e100" in text
    names = [path.stem for path in (tmp_path / "report_pictures").iterdir()]
    assert max(map(len, names)) < 130
    assert file_name(long.removeprefix("val/")) in names
    assert file_name(long + "a") != file_name(long + "b")


def test_layers_of_many_groups_are_drawn_of_the_first_ones(tmp_path):
    rows = [{"step": step, "update_norm/a": 1.0, "val/loss": 1.0} for step in range(3)]
    logs = {f"run{index}": write_log(tmp_path / f"run{index}", rows) for index in range(11)}
    text = text_of(report(logs, tmp_path / "report.html"))
    assert len(list((tmp_path / "report_pictures").glob("update_norm-layers-*"))) == 8
    assert "of the first 8 of 11 runs or groups; the other 3 have none." in text


def test_wandb_runs_beside_csv_logs_are_not_counted_twice(logs, tmp_path):
    runs = read_runs("report", logs)
    assert len(runs) == 4
    assert "2 W&B run(s)" in runs[0].notes[0]


def test_a_wandb_run_without_a_csv_log_of_its_own_is_kept_beside_others(logs, tmp_path):
    shutil.copytree(logs / "wandb", tmp_path / "wandb", symlinks=True)
    shutil.copytree(logs / "csv" / "plain-0", tmp_path / "csv" / "plain-0")
    shutil.copytree(logs / "csv" / "hot-0", tmp_path / "csv" / "hot-0")
    for paths in (tmp_path, [tmp_path / "csv", tmp_path / "wandb"], [tmp_path / "wandb", tmp_path / "csv"]):
        runs = read_runs("report", paths)
        assert {run.name: run.path.parent.name for run in runs} == {
            "plain-0": "csv",
            "hot-0": "csv",
            "plain-1": "wandb",
        }
        assert "1 W&B run(s) are left out, since CSV logs have the same numbers: plain-0." in runs[0].notes
    apart = read_runs("report", {"ours": tmp_path / "csv" / "plain-0", "theirs": tmp_path / "wandb"})
    assert [run.group for run in apart] == ["ours", "theirs", "theirs"]  # as they were given


def test_equal_numbers_of_other_seeds_are_other_trainings(tmp_path):
    write_log(tmp_path / "csv", [{"step": 0, "val/accuracy": 0.5}], seed=0)
    for seed in range(2):
        run = wandb.init(dir=tmp_path, name=f"seed{seed}", project="tests", mode="offline", config={"seed": seed})
        run.log({"val/accuracy": 0.5, "trainer/global_step": 0})
        run.finish()
    assert [run.name for run in read_runs("report", written(tmp_path))] == ["csv", "seed1"]


@pytest.mark.parametrize(
    ("key", "value", "ours", "theirs", "same"),
    [
        ("val/accuracy", 0.5, {"arm": "a"}, {"arm": "a"}, True),
        ("val/accuracy", 0.5, {"arm": "a"}, {"arm": "b"}, False),
        ("val/accuracy", 0.5, {"net": "Linear"}, {"net": "Linear(in_features=2, out_features=2)"}, True),
        ("val/loss", math.nan, {}, {}, False),
        ("lr-SGD", 0.1, {}, {}, False),
    ],
)
def test_a_training_is_known_by_its_metrics_and_its_settings(key, value, ours, theirs, same, tmp_path):
    """What diverged and what follows one schedule is equal in many; of objects each logger writes something else."""
    write_log(tmp_path / "csv", [{"step": 0, key: value}], **ours)
    run = wandb.init(dir=tmp_path, name="wandb", project="tests", mode="offline", config=theirs)
    run.log({key: value, "trainer/global_step": 0})
    run.finish()
    assert [run.name for run in read_runs("report", written(tmp_path))] == ["csv", "wandb"][: 2 - same]


def test_a_run_that_several_paths_lead_to_counts_once(logs):
    csv_log = logs / "csv" / "hot-0"
    assert [run.name for run in read_runs("report", [csv_log, logs / "csv", csv_log / "metrics.csv"])] == [
        *("hot-0", "hot-1", "plain-0", "plain-1")
    ]
    assert len(read_runs("report", [logs / "wandb", logs / "wandb" / "latest-run"])) == 2
    assert len(read_runs("report", {"ours": csv_log, "all": logs / "csv"})) == 5  # as they were given


def test_pictures_and_histograms_that_wandb_has_are_no_metrics(tmp_path):
    with wandb.init(name="media", dir=tmp_path, project="tests", mode="offline") as run:
        picture = wandb.Image(torch.zeros(4, 4, 3).numpy())
        run.log({"loss": 1.0, "nested": {"a": 2.0, "picture": picture}, "pictures": [picture] * 2})
        run.log({"loss": 0.5, "histogram": wandb.Histogram([1, 2, 3])})
    (run,) = read_runs("report", written(tmp_path))
    assert run.series == {"loss": {0: 1.0, 1: 0.5}, "nested.a": {0: 2.0}}
    assert run.notes == ()


def test_training_and_validation_of_one_run_are_in_one_picture(logs):
    read = read_runs("report", logs / "csv")
    assert by_metric(read) == {"loss": ["train/loss", "val/loss"]}
    (one,) = learning_curves(group_runs("report", read[:1], None), None)
    assert [axes.get_title() for axes in one.figure.axes] == ["loss"]
    assert {"training", "validation"} <= {line.get_label() for line in one.figure.axes[0].lines}
    (several,) = learning_curves(group_runs("report", read, "arm"), None)
    assert [axes.get_title() for axes in several.figure.axes] == ["loss, training", "loss, validation"]
    for axes in several.figure.axes:
        assert {"hot", "plain"} <= {line.get_label() for line in axes.lines}


# ---------------------------------------------------------------------- in a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
MEASURE = """
<script>window.addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest(".table")).map(e => e.outerHTML.slice(0, 80));
  const found = {width: innerWidth, scroll: document.documentElement.scrollWidth, wide: wide,
    pictures: [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth, i.alt]),
    tops: [...document.images].map(i => i.getBoundingClientRect().top),
    asked: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
    text: document.body.innerText, ink: getComputedStyle(document.body).color,
    paper: getComputedStyle(document.body).backgroundColor};
  parent.postMessage(JSON.stringify(found), "*"); });</script></body>"""
# A window has a least width that is more than a phone's; a frame has none. It has its frame's colours.
FRAME = """<!DOCTYPE html><html style="color-scheme: light dark"><pre id="measured"></pre><script>
addEventListener("message", event => document.getElementById("measured").textContent = event.data)</script>
<iframe src="measured.html" style="border: 0; width: %dpx; height: 900px"></iframe></html>"""


def browse(page, width, dark=False):
    """What a browser of that width makes of the page, and what it complains about."""
    page.with_name("measured.html").write_text(page.read_text().replace("</body>", MEASURE))
    frame = page.with_name("frame.html")
    frame.write_text(FRAME % width)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    options += ["--window-size=1400,1000", "--enable-logging=stderr", f"--user-data-dir={page.parent / 'profile'}"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [BROWSER, *options, "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (measured,) = re.findall(r'(?s)<pre id="measured">(.*?)</pre>', done.stdout)
    return json.loads(html.unescape(measured)), re.findall(r".*CONSOLE.*", done.stderr)


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")


def brightness(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_the_page_reads_well_in_a_browser(page, width, dark):
    seen, complaints = browse(page, width, dark)
    assert complaints == []
    assert seen["asked"] == []
    assert seen["width"] == width
    assert seen["scroll"] <= width
    assert seen["wide"] == []
    assert len(seen["pictures"]) == len(list((page.parent / "report_pictures").glob("*.png"))) > 8
    assert all(complete and natural > 400 and shown > 300 and alt for complete, natural, shown, alt in seen["pictures"])
    for heading in ("Training report", "Results", "Learning curves", "Updates", "Gradients", "Events", "Settings"):
        assert heading in seen["text"]
    contrast = brightness(seen["paper"]) - brightness(seen["ink"])
    assert (contrast < -150) if dark else (contrast > 150)


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_answer_of_an_ablation_is_on_the_first_screen_of_a_browser(ablation_page, width):
    seen, complaints = browse(ablation_page[0], width)
    assert complaints == []
    assert seen["scroll"] <= width
    assert seen["wide"] == []
    complete, natural, shown, alt = seen["pictures"][0]
    assert (complete, natural > 400, shown > 300) == (True, True, True)
    assert "paired differences" in alt
    assert "Harms: mixing; helps: EMA; unknown: luck." in seen["text"]
    assert seen["tops"][0] < 500


@needs_browser
def test_the_browser_test_sees_what_is_wrong(tmp_path):
    broken = tmp_path / "broken.html"
    wrong = '<p style="width: 3000px">x</p><img src="data:image/png;base64,AAAA" alt="x">'
    broken.write_text(f"<!DOCTYPE html><body>{wrong}<script>console.error('oops')</script></body></html>")
    seen, complaints = browse(broken, 800)
    assert len(complaints) == 1
    assert "oops" in complaints[0]
    assert seen["scroll"] > 800
    assert seen["wide"]
    assert seen["pictures"][0][1] == 0
