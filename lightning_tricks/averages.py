"""Averages of weights that were saved, for use without a Trainer."""

import pickle
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_tricks.callbacks.average_checkpoint import BESIDE, EXTRA, NAMES, RAW
from lightning_tricks.callbacks.weights import named_weights
from lightning_tricks.functional.checks import message
from lightning_tricks.functional.slots import plain_name, weight_slots

Module = TypeVar("Module", bound=nn.Module)
Part = Callable[[], tuple[Mapping[str, Any], Mapping[str, Tensor]]]
"""Reads a state dict, and tensors that go over it."""


def load_average(checkpoint: str | Path | Mapping[str, Any], model: Module, name: str | None = None) -> Module:
    """Put an average of a checkpoint into a model.

    Args:
        checkpoint: a file, the folder of a distributed checkpoint, or what `torch.load` gave; written with `EMA` or
            `PolyakAverage`, or with Lightning's `WeightAveraging`.
        model: the module that was trained, or one with the same state dict; changed in place, on the device it is on.
        name: which average: None for the one that was evaluated (the first), `"raw"` for the raw weights, or as it is
            called in the metrics of `EMA([0.99, 0.999], evaluate="both")`: `"0.999"`.
    Returns:
        The model itself.
    Raises:
        ValueError: no such average in the checkpoint, or one of other weights than the model's.
        RuntimeError: the state dict does not fit the model.
    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> checkpoint = {"state_dict": {"weight": torch.tensor([[2.0]])}, "average_names": ["0.999"]}
        >>> load_average(checkpoint, model).weight.item()
        2.0
    """
    folder = Path(checkpoint) if isinstance(checkpoint, (str, Path)) and Path(checkpoint).is_dir() else None
    saved = checkpoint if isinstance(checkpoint, Mapping) else _load(Path(checkpoint))
    if folder is None and "state_dict" not in saved:
        fix = "Give what a Trainer saved"
        raise ValueError(message("load_average", "checkpoint", "one with a state_dict", sorted(saved), fix))
    parts = _in_file(saved) if folder is None else _in_folder(folder, saved, model)
    if name is None and saved.get(NAMES, RAW in saved):
        name = next(iter(parts))
    if name is None or name not in parts:
        fix = "One of weights alone that was saved after fit has the average as its state_dict, which needs no name"
        condition = f"an average of the checkpoint, which has {', '.join(parts) or 'none'}"
        raise ValueError(message("load_average", "name", condition, name, fix))
    state, average = parts[name]()
    live = {plain_name(own): tensor for own, tensor in named_weights(model).items()}
    average = {plain_name(own): tensor for own, tensor in average.items()}
    for own, tensor in average.items():
        if own not in live or live[own].shape != tensor.shape:
            fix, condition = "Give the model that was trained", f"one with {own} of {tuple(tensor.shape)}"
            got = tuple(live[own].shape) if own in live else "none"
            raise ValueError(message("load_average", "model", condition, got, fix))
    if isinstance(model, pl.LightningModule):  # which may rename its keys
        state = {**saved, "state_dict": dict(state)}
        model.on_load_checkpoint(state)
        state = state["state_dict"]
    keys = {plain_name(key): key for key in model.state_dict()}
    state = {keys.get(plain_name(key), key): value for key, value in state.items()}
    model.load_state_dict(state, strict=getattr(model, "strict_loading", True))
    with torch.no_grad():
        for own, tensor in average.items():
            live[own].copy_(tensor)
    return model


def _load(path: Path) -> Mapping[str, Any]:
    fix = "Load it with torch.load(path, weights_only=False), if you trust it, and give the result"
    if path.is_dir() and not (path / "meta.pt").is_file():
        fix = "Give the folder that a Trainer wrote under ModelParallelStrategy, or a file"
        raise ValueError(message("load_average", "checkpoint", "a folder with meta.pt", str(path), fix))
    try:
        saved: Any = torch.load(path / "meta.pt" if path.is_dir() else path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        condition = "one that torch.load reads with weights_only=True"
        raise ValueError(message("load_average", "checkpoint", condition, str(path), fix)) from error
    if not isinstance(saved, Mapping):
        raise ValueError(message("load_average", "checkpoint", "what a Trainer saved", type(saved).__name__, fix))
    return saved


def _in_file(saved: Mapping[str, Any]) -> dict[str, Part]:
    names = saved.get(NAMES, ["average"] if RAW in saved else [])
    kept: Mapping[str, Any] = saved.get(EXTRA, {})
    raw = saved.get(RAW, saved["state_dict"])
    parts: dict[str, Part] = {}
    for index, name in enumerate(names):
        evaluated = index == 0 and (RAW in saved or not kept)
        parts[name] = partial(_both, saved["state_dict"] if evaluated else raw, kept.get(name, {}))
    if RAW in saved or kept:
        parts["raw"] = partial(_both, raw, {})
    return parts


def _both(state: Mapping[str, Any], average: Mapping[str, Tensor]) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    return state, average


def _in_folder(folder: Path, saved: Mapping[str, Any], model: nn.Module) -> dict[str, Part]:
    """Of a distributed checkpoint, whose tensors are read once it is known which."""
    beside = saved.get(BESIDE, {})
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    averaged = [name for name, _, _ in weight_slots(model) if name not in saved.get("unaveraged_weights", ())]

    def read(name: str, evaluated: bool) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        whole = {key: torch.empty_like(value, device="cpu") for key, value in state.items()}
        in_state = evaluated or not beside.get(RAW)
        found: dict[str, Any] = {"state_dict": whole} if in_state else {beside["place"]: {RAW: whole}}
        average: dict[str, Tensor] = {}
        if name in beside.get(EXTRA, ()):
            average = {key: torch.empty_like(state[key], device="cpu") for key in averaged}
            found.setdefault(beside["place"], {})[EXTRA] = {name: average}
        with warnings.catch_warnings():  # torch says that one process reads, which is meant
            warnings.simplefilter("ignore", UserWarning)
            load(found, checkpoint_id=folder, no_dist=True)
        return whole, average

    names = saved.get(NAMES, [])
    evaluated = bool(names) and (bool(beside.get(RAW)) or not beside)
    parts: dict[str, Part] = {name: partial(read, name, evaluated and index == 0) for index, name in enumerate(names)}
    if beside:
        parts["raw"] = partial(read, "raw", False)
    return parts
