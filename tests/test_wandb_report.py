"""What is sent to W&B as a report and a workspace, against a stored specification; nothing here needs a login."""

import json
import math
import sys
from pathlib import Path

import pytest
import wandb
from test_report import write_log

from lightning_tricks.wandb_report import wandb_report

REFERENCE = Path(__file__).parent / "reference" / "wandb_report.json"
# wandb-workspaces declares its own models in pydantic's old way.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")


@pytest.fixture
def interface(monkeypatch):
    """wandb-workspaces, with a project that is there without asking."""
    reason = 'no wandb-workspaces here: pip install "lightning-tricks[reports]"'
    found = pytest.importorskip("wandb_workspaces.reports.v2.interface", reason=reason)
    monkeypatch.setattr(found, "_get_api", lambda: None)
    monkeypatch.setattr(found, "execute_graphql", lambda *arguments: {"project": {"internalId": "1"}})
    return found


@pytest.fixture
def logs(tmp_path):
    """Runs in which every chapter has something."""
    row = {"train/loss": 1.0, "train/accuracy": 0.5, "lr-SGD": 0.1, "weight_decay": 0.01}
    for quantity in ("update_ratio", "grad_norm", "activation_zeros"):
        row |= {f"{quantity}/{name}": 1e-3 for name in ("body.0", "head", "total")}
    rows = [{"step": step, **row} for step in (0, 10)]
    rows += [{"step": step, "val/loss": 1.0, "val/accuracy": 0.5} for step in (4, 14)]
    rows.append({"step": 14, "event/early_stopping": 1})
    schedule = {"ParamSchedule": {"name": "weight_decay", "schedule": "Linear(start=1, end=0)"}}
    for seed in range(2):
        write_log(tmp_path / f"run-{seed}", rows, arm="tricks", seed=seed, tricks=schedule)
    return tmp_path


def specification(views):
    """Chapters and their panels as W&B gets them, without what is drawn by chance or belongs to the library."""

    def panels(found):
        return [{key: panel[key] for key in ("viewType", "config", "layout")} for panel in found]

    report = json.loads(views.report._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    workspace = json.loads(views.workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    chapters, heading = {}, ""
    for block in report["blocks"]:
        if block["type"] == "heading":
            heading = block["children"][0]["text"]
        elif block["type"] == "panel-grid":
            grid = block["metadata"]
            chapters[heading] = {
                "runs": [{key: runs[key] for key in ("project", "grouping")} for runs in grid["runSets"]],
                "panels": panels(grid["panelBankSectionConfig"]["panels"]),
            }
    section = workspace["section"]
    bank = section["panelBankConfig"]["sections"]
    return {
        "report": chapters,
        "workspace": {
            "sections": {part["name"]: panels(part["panels"]) for part in bank},
            "xAxis": section["settings"]["xAxis"],
            "grouping": section["runSets"][0]["grouping"],
        },
    }


def test_report_and_workspace_are_those_of_the_specification(interface, logs):
    got = specification(wandb_report(logs, "me", "digits", group="arm", save=False))
    assert got == json.loads(REFERENCE.read_text())


def test_every_curve_is_on_the_axis_of_optimizer_steps(interface, logs):
    """W&B's own `_step` counts log calls: with two a step it runs twice as fast."""
    got = specification(wandb_report(logs, "me", "digits", save=False))
    lines = [
        panel["config"]
        for chapter in got["report"].values()
        for panel in chapter["panels"]
        if panel["viewType"] == "Run History Line Plot"
    ]
    assert len(lines) == 13
    assert {line["xAxis"] for line in lines} == {got["workspace"]["xAxis"]} == {"trainer/global_step"}
    assert not any("groupAgg" in line for line in lines)  # single runs, since no group was asked for


def test_the_number_of_panels_does_not_grow_with_the_layers(interface, tmp_path):
    """W&B's page freezes at a thousand panels."""
    counts = []
    for layers in (3, 300):
        row = {f"{quantity}/layer.{n}": 1.0 for n in range(layers) for quantity in ("update_ratio", "grad_norm")}
        write_log(tmp_path / str(layers), [{"step": step, **row} for step in range(2)])
        got = specification(wandb_report(tmp_path / str(layers), "me", "digits", save=False))
        counts.append(sum(len(panels) for panels in got["workspace"]["sections"].values()))
    assert counts == [3, 3]


def test_both_are_saved_when_somebody_is_logged_in(interface, logs, monkeypatch):
    from wandb_workspaces.workspaces.interface import Workspace

    saved = []
    monkeypatch.setattr(wandb, "Api", lambda: None)
    monkeypatch.setattr(interface.Report, "save", lambda report: saved.append(report))
    monkeypatch.setattr(Workspace, "save", lambda workspace: saved.append(workspace))
    views = wandb_report(logs, "me", "digits", title="Ours")
    assert saved == list(views)
    assert (views.report.title, views.workspace.name) == ("Ours", "Ours")


def test_without_a_login_saving_says_so(interface, logs, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"needs a login to W&B: run `wandb login` or set WANDB_API_KEY; save=False"):
        wandb_report(logs, "me", "digits")


def test_without_wandb_workspaces_the_extra_is_named(logs, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(ImportError, match=r'wandb_report needs wandb-workspaces: pip install "lightning-tricks\[rep'):
        wandb_report(logs, "me", "digits", save=False)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"entity": ""}, ValueError, "entity must be a name"),
        ({"project": None}, ValueError, "project must be a name"),
        ({"title": None}, TypeError, "wandb_report: title must be a text, got None"),
        ({"group": "arms"}, ValueError, "The runs have arm, seed"),
        ({"runs": "nowhere"}, ValueError, "paths that exist"),
        ({"band": (math.nan, 1)}, ValueError, "low < high"),
    ],
)
def test_wrong_arguments_are_refused_with_the_way_out(arguments, error, words, logs):
    with pytest.raises(error, match=words):
        wandb_report(**{"runs": logs, "entity": "me", "project": "digits", "save": False, **arguments})
