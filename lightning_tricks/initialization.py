"""Weights to begin with, scaled on a batch of data."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor, nn

from lightning_tricks.functional.activations import statistics, sums
from lightning_tricks.functional.checks import check_count, check_flag, check_number, message
from lightning_tricks.functional.slots import plain_name
from lightning_tricks.rollback import Rollback

Result = TypeVar("Result")
LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class InitializedLayer(NamedTuple):
    """A row of the table that `lsuv_init` returns.

    Args:
        layer: its name; "model" where it is the whole model.
        mean_before, std_before: of what the layer put out on the batch before.
        mean_after, std_after: the same afterwards.
        iterations: how often its weights were scaled.
    """

    layer: str
    mean_before: float
    std_before: float
    mean_after: float
    std_after: float
    iterations: int


@dataclass(frozen=True)
class InitializedLayers:
    """What `lsuv_init` did; printed, a table.

    Args:
        rows: a row a layer, in the order of the forward pass.
        left: layers that were left as they were, and why.
    """

    rows: tuple[InitializedLayer, ...]
    left: Mapping[str, str]

    def __str__(self) -> str:
        width = max(len("layer"), *(len(row.layer) for row in self.rows))
        lines = [f"{'layer':{width}}  mean before  std before  mean after  std after  iterations"]
        for row in self.rows:
            before = f"{row.mean_before:#11.4g}  {row.std_before:#10.4g}"
            after = f"{row.mean_after:#10.4g}  {row.std_after:#9.4g}"
            lines.append(f"{row.layer:{width}}  {before}  {after}  {row.iterations:10d}")
        lines += [f"left as it was: {name} ({reason})" for name, reason in self.left.items()]
        return "\n".join(lines)


@torch.no_grad()
def lsuv_init(
    model: nn.Module, batch: Any, orthogonal: bool = True, tol: float = 0.1, max_iter: int = 10
) -> InitializedLayers:
    """Scale the weights of each linear and convolutional layer until its outputs on a batch have a variance of 1.

        weight = orthogonal matrix, bias = 0                                       (if orthogonal)
        while |var(outputs) - 1| >= tol: weight = weight / sqrt(var(outputs))      (layer after layer)

    In the order of the forward pass, so that each layer has the inputs that the scaled ones before it make. All numbers
    that a layer puts out are one set, as in the paper. The model runs in the mode it is in (a new one is in training
    mode, with dropout and the batch's own statistics), three times: to see, to scale, and to see again. Nothing else of
    it changes: gradients, buffers, batch-norm statistics and the random generators are as they were, and after an error
    the weights too. Of a layer that is called several times, the first call counts. The matrices are drawn from torch's
    own generator: seed it to have the same ones again.

    Left as they were, and named: frozen layers, weights that several layers share or that are computed from others
    (parametrizations), and layers that the forward pass does not call.

    Args:
        model: any module, not trained yet; of a LightningModule `forward` counts.
        batch: what its forward takes, on its device: a tensor, a tuple or list of arguments, or a mapping of keywords.
            A batch of training's size does.
        orthogonal: whether to begin with orthogonal matrices and biases of zero; else with the weights as they are.
        tol: how far from 1 the variance of a layer may stay, above 0.
        max_iter: how often a layer is scaled at most, at least 1.
    Returns:
        A table of means and standard deviations before and after, and what was left out; print it.
    Raises:
        TypeError, ValueError: an argument out of range, a batch that forward does not take, a lazy layer that has no
            weights yet, complex weights, no layer to scale, or one whose outputs do not vary, are not finite, or do not
            come within tol and stay there.
    References:
        Mishkin and Matas, "All you need is a good init", ICLR 2016, arXiv:1511.06422, algorithm 1; orthogonal matrices:
        Saxe et al., 2013, arXiv:1312.6120.
        Deviates: layers that do not come within tol are an error, and one forward pass scales all. The authors' later
        code also shifts the biases until the mean is 0; this does not.
    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> table = lsuv_init(model, torch.randn(64, 4))
        >>> [(row.layer, round(row.std_after, 3)) for row in table.rows]
        [('0', 1.0), ('2', 1.0)]
    """
    check_flag("lsuv_init", "orthogonal", orthogonal, "False keeps the weights and biases that are there")
    check_number("lsuv_init", "tol", tol, "above 0", "Try 0.1", lambda value: value > 0)
    check_count("lsuv_init", "max_iter", max_iter, 1, "scalings of a layer", "Try 10")
    if not isinstance(model, nn.Module):
        raise TypeError(message("lsuv_init", "model", "a torch module", model, "Give the model itself"))
    layers, left = _layers(model)
    with ExitStack() as undo:
        Rollback(undo).keep(model)
        undo.enter_context(torch.compiler.set_stance("force_eager"))  # a compiled forward does not see new hooks
        states = _collect_rng_states()

        def at_first_calls(look: Callable[..., Result]) -> dict[str, Result]:
            _set_rng_states(states)  # the same dropout in every pass
            return _at_first_calls(look, layers, model, batch)

        before = at_first_calls(_mean_and_std)
        left |= {name: "not called in the forward pass" for name in layers if name not in before}
        if not before:
            fix = "Give a model whose forward calls linear or convolutional layers that are not frozen"
            raise ValueError(message("lsuv_init", "layers", "at least one that can be scaled", left, fix))
        if orthogonal:
            for name in before:
                _make_orthogonal_(layers[name])
        iterations = at_first_calls(partial(_scale_, tol, max_iter))
        after = at_first_calls(_mean_and_std)
        for name, (_, std) in after.items():
            if not abs(std**2 - 1) < tol:
                condition = f"within {tol} of 1 in another pass too"
                fix = "The forward pass is another one each time: it may change its batch in place, or draw by itself"
                raise ValueError(message("lsuv_init", f"variance of {name}", condition, std**2, fix))
        made = [[tensor.clone() for tensor in _weights(layers[name])] for name in before]
    for name, tensors in zip(before, made, strict=True):
        for tensor, value in zip(_weights(layers[name]), tensors, strict=True):
            tensor.copy_(value)
    rows = [InitializedLayer(name, *before[name], *after[name], iterations[name]) for name in before]
    return InitializedLayers(tuple(rows), left)


def _layers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers that can be scaled, by name, and why others cannot."""
    holders = Counter(id(tensor) for child in model.modules() for tensor in child._parameters.values())
    layers: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for full, child in model.named_modules():
        if not isinstance(child, LAYERS):
            continue
        name = plain_name(full) or "model"
        weight: Any = child._parameters.get("weight")
        if isinstance(weight, nn.UninitializedParameter):
            fix = "Call the model on the batch once, so that it takes its shape"
            raise ValueError(message("lsuv_init", f"weight of {name}", "there", "a lazy layer without one", fix))
        if weight is None:
            left[name] = "its weight is computed from others"
        elif holders[id(weight)] > 1:
            left[name] = "its weight is another layer's too"
        elif not weight.requires_grad:
            left[name] = "frozen"
        elif weight.is_complex():
            fix = "Freeze such layers, or initialize the model without lsuv_init"
            raise TypeError(message("lsuv_init", f"weight of {name}", "of real numbers", weight.dtype, fix))
        else:
            layers[name] = child
    return layers, left


def _weights(layer: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (layer._parameters["weight"], layer._parameters["bias"]) if tensor is not None]


def _at_first_calls(
    look: Callable[..., Result], layers: Mapping[str, nn.Module], model: nn.Module, batch: Any
) -> dict[str, Result]:
    """Run the model, and keep what a function says of each layer just before its first call, in the order of these."""
    found: dict[str, Result] = {}

    def hook(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in found:
            found[name] = look(name, layer, lambda: layer.forward(*args, **kwargs))

    with ExitStack() as undo:
        for name, layer in layers.items():
            undo.callback(layer.register_forward_pre_hook(partial(hook, name), with_kwargs=True).remove)
        try:
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, (tuple, list)):
                model(*batch)
            else:
                model(batch)
        except TypeError as error:
            got = f"{type(batch).__name__} ({error})"
            fix = "Of a batch of inputs and labels give batch[0]"
            raise TypeError(message("lsuv_init", "batch", "what the model's forward takes", got, fix)) from error
    return found


def _mean_and_std(name: str, layer: nn.Module, outputs: Callable[[], Tensor]) -> tuple[float, float]:
    mean, std, *_ = statistics(sums(outputs())).tolist()
    return mean, std


def _make_orthogonal_(layer: nn.Module) -> None:
    weight, *bias = _weights(layer)
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight.copy_(nn.init.orthogonal_(torch.empty_like(weight, dtype=wide, memory_format=torch.contiguous_format)))
    for tensor in bias:
        tensor.zero_()


def _scale_(tol: float, max_iter: int, name: str, layer: nn.Module, outputs: Callable[[], Tensor]) -> int:
    """Scale a layer's weight until its outputs vary as they should; returns how often."""
    for iteration in range(max_iter + 1):
        _, std = _mean_and_std(name, layer, outputs)
        if not 0 < std < math.inf:
            fix = "Look at the batch and the layers before it: what goes in may be all zero, or NaN"
            raise ValueError(message("lsuv_init", f"variance of {name}", "finite and above 0", std**2, fix))
        if abs(std**2 - 1) < tol:
            return iteration
        if iteration < max_iter:
            _weights(layer)[0].div_(std)
    fix = "Its bias may vary that much by itself: use orthogonal=True, or a larger max_iter or tol"
    condition = f"within {tol} of 1 after {max_iter} scalings"
    raise ValueError(message("lsuv_init", f"variance of {name}", condition, std**2, fix))
