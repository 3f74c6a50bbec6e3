"""The report as a Report and a Workspace of W&B, where the runs are."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lightning_tricks.functional.checks import message
from lightning_tricks.reports.offline import STEP
from lightning_tricks.reports.runs import Run, Runs, read_runs
from lightning_tricks.reports.settings import flatten
from lightning_tricks.reports.summary import (
    CHAPTERS,
    QUANTITIES,
    by_metric,
    check_band,
    check_title,
    metric_keys,
    quantity,
    schedule_keys,
    stage,
)

COLUMNS, WIDTH, HEIGHT = 2, 12, 8
"""Panels beside each other, and their size in W&B's grid of 24 columns."""


class WandbViews(NamedTuple):
    """A report and a workspace view; each has a `url` once it is saved, and `save()`."""

    report: Any
    workspace: Any


def wandb_report(
    runs: Runs,
    entity: str,
    project: str,
    *,
    group: str | None = None,
    band: tuple[float, float] = (1e-4, 1e-2),
    title: str = "Training report",
    save: bool = True,
) -> WandbViews:
    """Build a W&B Report and a Workspace view with the panels of `report`, for runs that are in a W&B project.

    The logs on disk say which panels there are; the numbers in them are those of the project's own runs, so offline
    runs must be uploaded, before or after (`wandb sync`). W&B has no picture of layers by steps: layers are lines.

    Args:
        runs: logs of these runs, as `report` takes them.
        entity: user or team that owns the project.
        project: its name.
        group: a setting by which W&B puts runs together: lines are then means, with the standard deviation around them.
            None shows single runs.
        band: lowest and highest healthy ratio of update to weights; it is in the panel's title.
        title: of the report and of the view.
        save: whether to send both to W&B, which needs a network and a login; False only builds them.
    Returns:
        The report and the workspace, objects of wandb-workspaces that can be changed and saved again.
    Raises:
        ImportError: wandb-workspaces is not installed.
        RuntimeError: nobody is logged in to W&B, and `save`.
        TypeError, ValueError: no entity or project, a title that is no text, a setting that no run has, logs of which
            none can be read.
    Example:
        >>> from lightning_tricks import wandb_report
        >>> wandb_report("no_such_folder", "me", "digits", save=False)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: wandb_report: runs must be paths that exist, got 'no_such_folder'. Give a folder of ...
    """
    for name, value in (("entity", entity), ("project", project)):
        if not isinstance(value, str) or not value:
            fix = "It is the part of the project's address, wandb.ai/entity/project"
            raise ValueError(message("wandb_report", name, "a name", value, fix))
    check_band("wandb_report", band)
    check_title("wandb_report", title)
    read = read_runs("wandb_report", runs)
    settings = {name for run in read for name in flatten(run.settings)}
    if group is not None and group not in settings:
        fix = f"The runs have {', '.join(sorted(settings)) or 'no settings'}"
        raise ValueError(message("wandb_report", "group", "a setting of the runs", group, fix))
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ImportError('wandb_report needs wandb-workspaces: pip install "lightning-tricks[reports]".') from error
    if save:
        _check_login()
    by = [] if group is None else [f"config.{group}"]
    chapters = {heading: panels for heading, panels in _chapters(wr, read, group, band) if panels}
    blocks: list[Any] = [wr.P(f"Built from the logs of {len(read)} run(s)."), wr.TableOfContents()]
    for heading, panels in chapters.items():
        runset = wr.Runset(entity=entity, project=project, name="Runs", groupby=by)
        blocks += [wr.H2(heading), wr.PanelGrid(runsets=[runset], panels=_in_a_grid(wr, panels))]
    sections = [
        ws.Section(heading, panels=_in_a_grid(wr, panels), is_open=True) for heading, panels in chapters.items()
    ]
    views = WandbViews(
        wr.Report(project=project, entity=entity, title=title, blocks=blocks, width="fluid"),
        ws.Workspace(
            entity=entity,
            project=project,
            name=title,
            sections=sections,
            settings=ws.WorkspaceSettings(x_axis=STEP),
            runset_settings=ws.RunsetSettings(groupby=[ws.Config(group)] if group is not None else []),
        ),
    )
    if save:
        views.report.save()
        views.workspace.save()
    return views


def _check_login() -> None:
    import wandb

    try:
        wandb.Api()
    except Exception as error:
        fix = "run `wandb login` or set WANDB_API_KEY; save=False builds both without"
        raise RuntimeError(f"wandb_report: saving needs a login to W&B: {fix}.") from error


def _chapters(
    wr: Any, runs: Sequence[Run], group: str | None, band: tuple[float, float]
) -> Iterator[tuple[str, list[Any]]]:
    """Headings and their panels, in the order of `report`."""
    grouped = {} if group is None else {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}

    def lines(title: str, keys: Sequence[str], unit: str, **options: Any) -> Any:
        return wr.LinePlot(title=title, x=STEP, y=list(keys), title_x="step", title_y=unit, **grouped, **options)

    logged = {key for run in runs for key in run.series}
    finals = [key for key in metric_keys(runs) if stage(key)[1] != "training"]
    yield "Results", [wr.BarPlot(title=key, metrics=[key], **grouped) for key in finals]
    smooth = {"smoothing_type": "exponentialTimeWeighted", "smoothing_factor": 0.6, "smoothing_show_original": True}
    shown = [(key, metric) for metric, keys in by_metric(runs).items() for key in keys]
    yield "Learning curves", [lines(key, [key], metric, **smooth) for key, metric in shown]
    yield "Learning rate and schedules", [lines(key, [key], key) for key in schedule_keys(runs)]
    for chapter, names in CHAPTERS.items():
        panels = []
        for name in names:
            heading, unit = QUANTITIES[name]
            log = {"log_y": True} if name.startswith(("grad_norm", "update_norm", "update_ratio")) else {}
            words = f"{heading}, {band[0]:g} to {band[1]:g} is healthy" if name == "update_ratio" else heading
            if f"{name}/total" in logged:
                panels.append(lines(f"{words}: all layers", [f"{name}/total"], unit, **log))
            if any(key.startswith(f"{name}/") for key in logged - {f"{name}/total"}):
                panels.append(lines(f"{words}: by layer", [], unit, metric_regex=f"^{name}/", **log))
        yield chapter, panels
    events = sorted(key for key in logged if quantity(key) == "event")
    yield "Events", [lines(key.partition("/")[2].replace("_", " "), [key], "1 where it happened") for key in events]
    yield "Settings", [wr.RunComparer(diff_only="split")]


def _in_a_grid(wr: Any, panels: Sequence[Any]) -> list[Any]:
    for index, panel in enumerate(panels):
        panel.layout = wr.Layout(x=index % COLUMNS * WIDTH, y=index // COLUMNS * HEIGHT, w=WIDTH, h=HEIGHT)
    return list(panels)
