"""The house stays as designed: imports point one way, and every public name is documented in full."""

import ast
import inspect
import sys
from pathlib import Path

import pytest

import lightning_tricks as lt

ROOT = Path(lt.__file__).parent
LAYERS = {"functional", "dispatch", "one_hot", "labels", "losses", "transforms", "loggers", "plots", "callbacks"}
LAYERS |= {
    "ablations",
    "mixed_labels",
    "initialization",
    "reports",
    "wandb_report",
    "averages",
    "ensembles",
    "lr_finder",
    "post_hoc",
    "rollback",
    "__main__",
    "__init__",
}
MAY_IMPORT = {
    "functional": {"functional"},
    "dispatch": set(),
    "one_hot": {"dispatch"},
    "mixed_labels": {"functional", "dispatch", "one_hot"},
    "labels": {"functional", "mixed_labels"},
    "losses": {"functional", "labels"},
    "transforms": {"functional", "labels", "transforms"},
    "loggers": set(),
    "plots": {"functional"},
    "callbacks": {
        "functional",
        "labels",
        "losses",
        "transforms",
        "ensembles",
        "loggers",
        "post_hoc",
        "rollback",
        "callbacks",
    },
    "ablations": {"functional", "callbacks", "loggers", "plots", "reports", "ablations"},
    "averages": {"functional", "callbacks"},
    "ensembles": {"functional"},
    "lr_finder": {"functional", "callbacks", "plots", "rollback"},
    "post_hoc": {"functional", "ensembles"},
    "initialization": {"functional", "rollback"},
    "reports": {"functional", "plots", "reports"},
    "wandb_report": {"functional", "reports"},
    "rollback": set(),
    "__main__": {"ablations", "functional", "plots", "reports"},
    "__init__": LAYERS,
}
OUTSIDE = {
    "functional": {"torch"},
    "dispatch": {"torch"},
    "one_hot": {"torch"},
    "labels": {"torch"},
    "mixed_labels": {"torch"},
    "losses": {"torch"},
    "transforms": {"torch"},
    "loggers": {"torch", "lightning"},
    "plots": {"matplotlib"},
    "ablations": {"torch", "lightning", "matplotlib"},
    "averages": {"torch", "lightning"},
    "callbacks": {"torch", "torchmetrics", "lightning"},
    "ensembles": {"torch"},
    "lr_finder": {"torch", "lightning"},
    "post_hoc": {"torch"},
    "initialization": {"torch", "lightning"},
    "reports": {"matplotlib", "yaml", "wandb"},
    "wandb_report": {"wandb", "wandb_workspaces"},
    "rollback": {"torch", "lightning"},
    "__main__": set(),
    "__init__": set(),
}
FILES = sorted(ROOT.rglob("*.py"))


def layer_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """Every module that a file imports, wherever in the file; relative imports are resolved."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the full name"
            if node.module == "lightning_tricks":
                names += [f"lightning_tricks.{alias.name}" for alias in node.names]
            else:
                names.append(node.module)
    return names


def broken_rules(path):
    layer, broken = layer_of(path), []
    for name in imported(path):
        first, _, rest = name.partition(".")
        if first == "lightning_tricks":
            if rest.split(".")[0] not in MAY_IMPORT[layer]:
                broken.append(name)
        elif first not in OUTSIDE[layer] | set(sys.stdlib_module_names):
            broken.append(name)
    return broken


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    assert layer_of(path) in LAYERS
    assert broken_rules(path) == []


def test_the_rule_sees_a_forbidden_import(tmp_path, monkeypatch):
    bad = tmp_path / "functional" / "bad.py"
    bad.parent.mkdir()
    bad.write_text("import wandb\ndef f():\n    from lightning_tricks.callbacks import EMA\n    import lightning\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert broken_rules(bad) == ["wandb", "lightning_tricks.callbacks", "lightning"]


def test_only_the_edge_knows_wandb():
    edge = {"loggers.py", "wandb_report.py", "reports/offline.py"}
    names = {str(path.relative_to(ROOT)): path for path in FILES}
    assert {name for name, path in names.items() if any(x.startswith("wandb") for x in imported(path))} <= edge
    mentions = {name for name, path in names.items() if "wandb" in path.read_text().lower()}
    assert mentions <= edge | {"__init__.py"}


PUBLIC = {name: getattr(lt, name) for name in lt.__all__ if not inspect.ismodule(getattr(lt, name))}
PUBLISHED = {
    "ActivationMonitor": "Glorot",
    "BinaryCrossEntropy": "2110.00476",
    "ColorJitter": "1312.5402",
    "Cooldown": "2405.18392",
    "Cosine": "1608.03983",
    "CosineRestarts": "1608.03983",
    "CutMix": "1905.04899",
    "Cutout": "1708.04552",
    "EMA": "1703.01780",
    "EarlyStopping": "Prechelt",
    "Ensemble": "1704.00109",
    "HalfLife": "1912.04958",
    "InverseSqrt": "1706.03762",
    "InverseTime": "Robbins",
    "LRCurve": "1506.01186",
    "LRSchedule": "1706.02677",
    "LabelSmoothing": "1512.00567",
    "LabelSmoothingCrossEntropy": "1512.00567",
    "MixedLabels": "1710.09412",
    "Mixup": "1710.09412",
    "OneCycle": "1708.07120",
    "OneOf": "2110.00476",
    "PCALighting": "Krizhevsky",
    "ParamSchedule": "1711.05101",
    "PolyakAverage": "1803.05407",
    "Polynomial": "1606.00915",
    "PostHocEMA": "2312.02696",
    "PowerFunction": "2312.02696",
    "RandAugment": "1909.13719",
    "RandomCrop": "1512.03385",
    "RandomErasing": "1708.04896",
    "RandomFlip": "Krizhevsky",
    "RandomResizedCrop": "1409.4842",
    "SnapshotEnsemble": "1704.00109",
    "Steps": "1512.03385",
    "Triangular": "1506.01186",
    "TrivialAugment": "2103.10158",
    "UpdateMonitor": "Karpathy",
    "Warmed": "Crowson",
    "SoftTargetCrossEntropy": "1503.02531",
    "ablate": "2103.03098",
    "find_lr": "1506.01186",
    "greedy_soup": "2203.05482",
    "lsuv_init": "1511.06422",
    "Warmup": "1706.02677",
    "WarmupCosine": "1706.02677",
    "WarmupStableDecay": "2404.06395",
    "sweep_config": "docs.wandb.ai",
    "synthesize_ema": "2312.02696",
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_documented_in_full(name):
    item = PUBLIC[name]
    doc = inspect.getdoc(item)
    first = doc.splitlines()[0]
    assert first.endswith(".")
    assert len(first) <= 120
    assert ">>> " in doc.partition("Example:")[2]
    assert len([line for line in doc.splitlines() if line.strip().startswith((">>>", "..."))]) <= 5
    parameters = [p for p in inspect.signature(item).parameters if p not in ("args", "kwargs")]
    if parameters:
        arguments = doc.partition("Args:\n")[2]
        for parameter in parameters:
            assert f"\n    {parameter}:" in "\n" + arguments or f" {parameter}:" in arguments
        assert "Raises:" in doc
    if not inspect.isclass(item) or "__call__" in vars(item) or "forward" in vars(item):
        assert "Returns:" in doc
    if name in PUBLISHED:
        assert PUBLISHED[name] in doc.partition("References:")[2]


def test_every_trick_that_was_published_says_where():
    plain = {
        "BatchTransforms",
        "Constant",
        "Exponential",
        "Join",
        "KeepBest",
        "Linear",
        "Normalize",
        "RandomApply",
        "load_average",
        "plot_schedule",
        "report",
        "soft_targets",
        "wandb_report",
    }
    assert set(PUBLIC) - plain == set(PUBLISHED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_assert_checks_what_a_user_gives(path):
    """An assert may tell the type checker what holds; it never has a message for a user."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assert):
            assert node.msg is None


def test_names_of_the_contract_are_there():
    names = """LRSchedule EMA EarlyStopping BatchTransforms UpdateMonitor Constant Linear Cosine Warmup WarmupCosine
    Mixup Cutout LabelSmoothing MixedLabels soft_targets LabelSmoothingCrossEntropy functional schedules callbacks"""
    assert set(names.split()) <= set(lt.__all__)
    assert sorted(lt.__all__) == sorted(set(lt.__all__))
    assert lt.schedules is lt.functional.schedules
