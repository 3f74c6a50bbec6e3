"""The README shows only what runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml
from kit import Net, loader
from test_cli import config_with, run

import lightning_tricks as lt

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(language):
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)[1]


def test_example_trains_a_module(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    names = {}
    exec(block("python"), names)
    trainer = names["trainer"]
    trainer.fit_loop.max_epochs = 6
    trainer.fit(Net(), loader(), loader(8, seed=5))
    assert [type(callback).__module__.split(".")[0] for callback in trainer.callbacks[:5]] == ["lightning_tricks"] * 5
    assert trainer.global_step == 36


def test_yaml_builds(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.setattr("sys.argv", ["train.py"])  # LightningCLI warns where arguments are given both ways
    cli = run(config_with(yaml.safe_load(block("yaml"))["trainer"]["callbacks"]), tmp_path)
    assert cli.trainer.callbacks[1].updates == 12


def test_every_name_of_the_table_is_public_and_every_public_name_in_it():
    table = README.partition("## The tricks")[2].partition("Good to know")[0]
    names = {
        name for row in table.splitlines() for name in re.findall(r"`(\w+)", row.split("|")[1] if "|" in row else "")
    }
    assert names == set(lt.__all__) - {"callbacks", "functional", "schedules", "transforms"}


def test_commands_are_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([\w-]+)", README)) <= targets
    assert (ROOT / ".ci" / "run").read_text().count("make ") == 2


def test_wheel_has_all_that_a_new_user_needs(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    assert (site / "lightning_tricks" / "py.typed").exists()
    assert not (site / "tests").exists()
    code = "import lightning_tricks\nprint(lightning_tricks.__file__)\n" + block("python")
    new = tmp_path / "new_project"
    new.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=new, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
