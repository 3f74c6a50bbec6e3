"""The pages of docs show only what runs."""

import importlib.util
import re
from pathlib import Path

import pytest
from kit import fit
from lightning.pytorch.callbacks import Timer

import lightning_tricks as lt

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def code(page):
    return re.findall(r"^( *)```python\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_a_page_runs_from_top_to_bottom(page):
    names = {}
    for indent, block in code(page):
        exec(re.sub(rf"^{indent}", "", block, flags=re.MULTILINE), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_links_to_is_there(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        assert target.startswith("http") or (DOCS / target).exists()


def test_gallery_shows_every_schedule():
    spec = importlib.util.spec_from_file_location("gallery", DOCS / "gallery.py")
    gallery = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gallery)
    shown = [lt.schedules.parse(text) for text in gallery.GALLERY.strip().splitlines()]
    assert {type(schedule).__name__ for schedule in shown} == set(lt.schedules.SCHEDULES)
    figure = gallery.gallery(total_steps=50)
    assert [ax.get_title() for ax in figure.axes] == gallery.GALLERY.strip().splitlines()
    assert [len(ax.lines[0].get_xdata()) for ax in figure.axes] == [51] * len(shown)


def test_gallery_shows_every_transform():
    spec = importlib.util.spec_from_file_location("transforms_gallery", DOCS / "transforms_gallery.py")
    gallery = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gallery)
    assert {type(transform).__name__ for transform in gallery.GALLERY} == set(lt.transforms.__all__) - {
        "LabelSmoothing",  # changes no picture
        "Transform",
    }
    figure = gallery.gallery()
    plain, *rows = [ax.images[0].get_array() for ax in figure.axes]
    assert all(row.shape == plain.shape and (row != plain).any() for row in rows)


def test_every_schedule_is_on_the_page():
    text = (DOCS / "schedules.md").read_text() + (DOCS / "gallery.py").read_text()
    assert [name for name in lt.schedules.SCHEDULES if name not in text] == []


def test_schedule_by_time_follows_the_timer():
    """As the page does it for max_time."""
    elapsed = iter(range(10**6))

    class Ticking(Timer):
        def time_elapsed(self, stage="train"):
            return next(elapsed)

    timer = Ticking(duration={"seconds": 10**6})
    schedule = lt.LRSchedule(lambda step, total_steps: 1 / (1 + timer.time_elapsed()), total_steps=1)
    with pytest.warns(UserWarning, match="the schedule is for 1 optimizer steps, and training ended after 12"):
        trainer, _ = fit([schedule, timer])
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.05 / 12
