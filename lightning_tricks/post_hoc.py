"""Averages of any width from the snapshots of a run that is over."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tricks.ensembles import MANIFEST
from lightning_tricks.functional.checks import check_count, check_number, message
from lightning_tricks.functional.post_hoc import check_sigma_rel, synthesis

FORMAT = "post-hoc EMA 1"
OWNER = "synthesize_ema"


@torch.no_grad()
def synthesize_ema(
    directory: Path | str, sigma_rel: float, step: int | None = None, *, tolerance: float = 0.1
) -> dict[str, Tensor]:
    """The average of a width that was not tracked, from the snapshots of `PostHocEMA`.

        weights = sum(share * snapshot),  the shares of `functional.post_hoc.synthesis`

    The snapshots are read one at a time and added up in float64 on the CPU: besides the result it takes two copies of
    float32 weights. What was not averaged (integer buffers, extra state, the vectors of spectral norm, which belong to
    the raw weights) is the last snapshot's that is used.

    Args:
        directory: where PostHocEMA wrote.
        sigma_rel: width of the average as a fraction of the run so far, in [1e-6, 0.2887).
        step: optimizer step after which the average is wanted, at least 1; best one of a snapshot. None takes the last.
        tolerance: largest error of the profile that is put together, as a fraction of its norm, at least 0.
    Returns:
        A full state dict for `module.load_state_dict`, in the dtypes of the weights, on the CPU.
    Raises:
        TypeError: an argument of another type.
        ValueError: a value out of range, no snapshots there, a step beyond the last one, or snapshots that are too few
            or too unlike what is asked for.
    References:
        Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024, arXiv:2312.02696,
            section 3.2 and appendix C.3.
        Deviates: weights that stand still or move along a line at a constant speed are averaged exactly.
    Example:
        >>> from lightning_tricks import synthesize_ema
        >>> module.load_state_dict(synthesize_ema("snapshots", sigma_rel=0.15))  # doctest: +SKIP
    """
    check_sigma_rel(OWNER, "sigma_rel", sigma_rel)
    check_number(OWNER, "tolerance", tolerance, "at least 0 (fraction)", "0.1 is usual", lambda value: value >= 0)
    manifest = read_manifest(directory)
    rows = manifest["snapshots"]
    if not rows:
        fix = "Train on until one is taken"
        raise ValueError(message(OWNER, "directory", "one with snapshots", str(directory), fix))
    step = rows[-1]["step"] if step is None else step
    check_count(OWNER, "step", step, 1, "optimizer steps", "None takes the last")
    if step > rows[-1]["step"]:
        condition = f"at most {rows[-1]['step']}, that of the last snapshot (optimizer steps)"
        raise ValueError(message(OWNER, "step", condition, step, "None takes the last"))
    rows = rows[: 1 + sum(row["step"] < step for row in rows)]
    shares, error = synthesis([row["step"] for row in rows], manifest["sigma_rels"], step, sigma_rel)
    if error > tolerance:
        condition = f"one that the {len(rows)} snapshots of {manifest['sigma_rels']} up to step {step} can make"
        fix = (
            f"The profile would be wrong by {error:.2g} of its norm: take a width nearer to theirs, a step of a"
            " snapshot or more snapshots, or allow it with tolerance="
        )
        raise ValueError(message(OWNER, "sigma_rel", condition, sigma_rel, fix))
    paths = [Path(directory) / row["file"] for row in rows]
    gone = [path.name for path in paths if not path.is_file()]
    if gone:
        fix = "Put them back"
        raise ValueError(message(OWNER, "directory", f"one with {', '.join(gone)}", str(directory), fix))
    last = _read(paths[-1])
    total = {name: torch.zeros_like(tensor, dtype=_wide(tensor)) for name, tensor in last["averages"][0].items()}
    for path, row_shares in zip(paths, shares.tolist(), strict=True):
        for average, share in zip(_read(path)["averages"], row_shares, strict=True):
            for name, tensor in total.items():
                tensor.add_(average[name], alpha=share)
    weights = {name: tensor.to(last["dtypes"][name]) for name, tensor in total.items()}
    # Clones: a memory map would keep the file open.
    return weights | {key: v.clone() if isinstance(v, Tensor) else v for key, v in last["copied"].items()}


def read_manifest(directory: Path | str) -> dict[str, Any]:
    """What PostHocEMA wrote about a directory.

    Args:
        directory: where it wrote.
    Returns:
        The manifest; its `snapshots` are in the order of their steps.
    Raises:
        ValueError: there is none, or one of another format.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        fix = "Give the folder that PostHocEMA wrote to"
        raise ValueError(message(OWNER, "directory", f"one with a {MANIFEST}", str(directory), fix))
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        fix = "Give the folder that PostHocEMA wrote to, and read it with the version that wrote it"
        raise ValueError(message(OWNER, "directory", f"of format {FORMAT!r}", manifest.get("format"), fix))
    return manifest


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64
