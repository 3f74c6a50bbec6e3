"""Several sets of weights as one module, and as one set of weights."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_tricks.functional.checks import check_flag, check_number, message
from lightning_tricks.functional.ensembling import log_mean_logits, log_mean_probability, log_vote, weighted_average
from lightning_tricks.functional.modes import in_eval
from lightning_tricks.functional.slots import weight_slots

MANIFEST = "manifest.json"
FORMAT = 1
COMBINE: dict[str, Callable[[Tensor], Tensor]] = {
    "probability": log_mean_probability,
    "logits": log_mean_logits,
    "vote": log_vote,
}
Combine = Literal["probability", "logits", "vote"]


class Ensemble(nn.Module):
    """Let several sets of weights answer together through the one module that they are for.

        log_probabilities = combine(stack([forward(*args) with state_dicts[m] in the module, m = 1 ... M]))

    Log probabilities are logits too: cross-entropy, argmax and calibration of them are the ensemble's. The members run
    one after the other and put their tensors into the module for that time, parameters and persistent buffers
    (batch-norm statistics) both; the module has its own again after every call, also after an exception. No gradients.

    With a Trainer, the unchanged LightningModule answers as the ensemble within `as_forward`:

        with Ensemble.load("snapshots", module).as_forward():
            trainer.test(module, datamodule)

    Args:
        module: any module whose forward returns one tensor of logits (N, K, ...), K >= 2 classes, and neither writes to
            its input nor to its buffers in `eval()`. A single logit for yes or no is refused.
        state_dicts: the members, at least one: state dicts of the module, which are kept and not copied, or paths of
            files that hold one (a Lightning checkpoint does), each read anew at every call. They are no part of this
            module's own state dict.
        combine: `"probability"` averages probabilities, `"logits"` averages logits, `"vote"` counts the members' most
            probable classes (a class without votes has -inf).
    Returns:
        Called like the module, in `eval()`: (N, K, ...) log probabilities, in float32 at least.
    Raises:
        TypeError: what is no module; an output that is no floating tensor.
        ValueError: no members, members that do not fit the module, an unknown way to combine, logits of another shape,
            or a module in `train()`, where batch norm and dropout make it another one.
    References:
        Huang et al., "Snapshot Ensembles: Train 1, get M for free", 2017, arXiv:1704.00109, section 3.
    Example:
        >>> import torch
        >>> flip = [{"weight": torch.tensor([[0.0], [z]])} for z in (3.0, -3.0)]
        >>> Ensemble(torch.nn.Linear(1, 2, bias=False), flip).eval()(torch.ones(1, 1)).exp()
        tensor([[0.5000, 0.5000]])
    """

    def __init__(
        self,
        module: nn.Module,
        state_dicts: Sequence[Mapping[str, Tensor] | Path | str],
        combine: Combine = "probability",
    ) -> None:
        super().__init__()
        if not isinstance(cast(object, module), nn.Module):
            fix = "The members' weights are put into it"
            raise TypeError(message("Ensemble", "module", "a torch.nn.Module", type(module).__name__, fix))
        if not state_dicts:
            raise ValueError(
                message("Ensemble", "state_dicts", "at least one", state_dicts, "Give the members' weights")
            )
        if combine not in COMBINE:
            fix = "'probability' is usual"
            raise ValueError(message("Ensemble", "combine", f"one of {', '.join(COMBINE)}", combine, fix))
        self.module, self.combine = module, combine
        self._slots: dict[str, tuple[dict[str, Any], str]] = {
            name: (holder, key) for name, holder, key in weight_slots(module)
        }
        self._sources = list(state_dicts)
        self._kept: dict[int, list[Tensor]] = {}  # the tensors of members that are in memory, in the slots' order
        for index, source in enumerate(self._sources):
            tensors = self._in_order(index, self.member(index))
            if isinstance(source, Mapping):
                self._kept[index] = tensors

    @classmethod
    def load(
        cls, directory: Path | str, module: nn.Module, combine: Combine = "probability", stream: bool = False
    ) -> "Ensemble":
        """The snapshots of a directory as members, incomplete ones too.

        Args:
            directory: where SnapshotEnsemble wrote.
            module: a module of the architecture that was trained.
            combine: as in `Ensemble`.
            stream: whether the members stay on disk and are read one at a time, at every call.
        Returns:
            The ensemble; without `stream` it holds the files' memory maps, and their tensors where the module is not on
            the CPU.
        Raises:
            ValueError: no snapshots there, or snapshots that do not fit the module.
        """
        check_flag("Ensemble.load", "stream", stream, "True keeps the members on disk")
        paths = [Path(directory) / row["file"] for row in read_manifest(directory)["snapshots"]]
        if not paths:
            fix = "Train on until a cycle ends"
            raise ValueError(message("Ensemble.load", "directory", "one with snapshots", str(directory), fix))
        return cls(module, paths if stream else [_read(path) for path in paths], combine)

    def __len__(self) -> int:
        return len(self._sources)

    def extra_repr(self) -> str:
        return f"members={len(self)}, combine={self.combine!r}"

    def member(self, index: int) -> Mapping[str, Tensor]:
        """The state dict of a member, read from its file where it is one; the member's own tensors.

        Args:
            index: which.
        """
        source = self._sources[index]
        return source if isinstance(source, Mapping) else _read(source)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The combined log probabilities; see the class."""
        return COMBINE[self.combine](self.logits(*args, **kwargs))

    def logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """What each member says.

        Returns:
            (M, N, K, ...), for `disagreement`, `entropy` and `mutual_information` of `functional.ensembling`.
        """
        return self._run(self.module, *args, **kwargs)

    @contextmanager
    def as_forward(self, at: str = "") -> Iterator[None]:
        """Let the module itself, or a part of it, answer as the ensemble for a while.

        An unchanged `test_step` or `predict_step` that calls `self(x)` or `self.forward(x)` gets log probabilities of
        the ensemble; one that calls `self.layers(x)` does with `at="layers"`. Loss and metrics are the step's own. A
        step that computes its logits in another way, from several parts, cannot be served, and one that calls a loss on
        probabilities must take log probabilities. Works with every strategy that keeps whole parameters on each rank.

        Args:
            at: name of the part whose output are the logits, as `get_submodule` takes it; "" is the module itself. The
                weights outside it must be the same in the members and the module: a head beside a frozen backbone.
        Raises:
            ValueError: no such part, other weights outside it, a module compiled as a whole, or nothing called it.
        """
        if getattr(self.module, "_compiler_ctx", None) is not None:
            fix = "Give the module before torch.compile"
            raise ValueError(message("Ensemble.as_forward", "module", "uncompiled", type(self.module).__name__, fix))
        parts = dict(self.module.named_modules())
        if at not in parts:
            fix = f"Take one of {', '.join(name for name in parts if name)}"
            raise ValueError(message("Ensemble.as_forward", "at", "the name of a part of the module", at, fix))
        self._refuse_elsewhere(at)
        part = parts[at]
        before = dict(vars(part))
        called: Tensor = torch.zeros(1).share_memory_()  # type: ignore[no-untyped-call]  # ranks may be other processes
        part.forward = partial(self._answer, part.forward, called)
        try:
            yield
        finally:
            if "forward" in before:
                part.forward = before["forward"]
            else:
                del part.forward
        if not called:
            fix = 'If the step calls self.layers(x), say, give as_forward("layers")'
            raise ValueError(message("Ensemble.as_forward", "at", "what the step calls", at, fix))

    def _refuse_elsewhere(self, at: str) -> None:
        """Raise if members differ from the module where the part's forward does not reach."""
        prefix = f"{at}." if at else ""
        slots = {name: holder[key] for name, (holder, key) in self._slots.items() if not name.startswith(prefix)}
        for index in range(len(self) if slots else 0):
            state = self.member(index)
            others = [name for name, tensor in slots.items() if not torch.equal(state[name].to(tensor), tensor)]
            if others:
                condition = f"a part with all the weights that member {index} has of its own"
                fix = f"Outside are {', '.join(others)}; take the part that they are in too"
                raise ValueError(message("Ensemble.as_forward", "at", condition, at, fix))

    def _answer(self, forward: Callable[..., Any], called: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.inference_mode(False):
            called.fill_(1)
        return COMBINE[self.combine](self._run(forward, *args, **kwargs))

    @torch.no_grad()
    def _run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        if self.module.training:
            fix = "Call .eval() first"
            raise ValueError(message("Ensemble", "module", "in eval()", "a module in train()", fix))
        outputs, live = [], self._live()
        own = [tensor.data for tensor in live]
        try:
            for index in range(len(self)):
                _put(self._tensors(index, live), live)
                outputs.append(_checked(forward(*args, **kwargs)))
        finally:
            _put(own, live)
        return torch.stack(outputs)

    def _live(self) -> list[Tensor]:
        return [holder[key] for holder, key in self._slots.values()]

    def _tensors(self, index: int, live: list[Tensor]) -> list[Tensor]:
        """A member's tensors where the module's are; those in memory stay there."""
        if index not in self._kept:
            return _placed(self._in_order(index, self.member(index)), live)
        tensors = self._kept[index]
        if tensors and (tensors[0].device != live[0].device or tensors[0].dtype != live[0].dtype):
            tensors = self._kept[index] = _placed(tensors, live)
        return tensors

    def _in_order(self, index: int, state: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors of a state dict in the order of the slots; an error says what does not fit."""
        misfit = {
            "missing": [name for name in self._slots if name not in state],
            "unexpected": list(state.keys() - self.module.state_dict().keys()),
            "of another shape": [
                name
                for name, (holder, key) in self._slots.items()
                if name in state and getattr(state[name], "shape", None) != holder[key].shape
            ],
        }
        if any(misfit.values()):
            source = self._sources[index]
            where = f"member {index}" if isinstance(source, Mapping) else str(source)
            got = "; ".join(f"{what} {', '.join(sorted(names))}" for what, names in misfit.items() if names)
            condition = f"of the module ({type(self.module).__name__}) in {where}"
            raise ValueError(
                message("Ensemble", "state_dicts", condition, got, "Give the architecture that was trained")
            )
        return [state[name].detach() for name in self._slots]


class Soup(NamedTuple):
    """Averaged weights.

    Args:
        state_dict: the weights; floating tensors averaged in float32 at least, others as the best member has them.
        members: which members are in it, the best first.
        score: what the metric says of it.
    """

    state_dict: dict[str, Tensor]
    members: list[int]
    score: float

    def __repr__(self) -> str:
        return f"Soup(state_dict of {len(self.state_dict)} tensors, members={self.members}, score={self.score})"


@torch.no_grad()
def greedy_soup(
    ensemble: Ensemble,
    metric: Callable[[nn.Module], float],
    *,
    mode: Literal["min", "max"] = "max",
    barrier: float = 0.02,
) -> Soup:
    """Average the weights of those members that make the average no worse: one model at the cost of one.

    The members are tried in the order of their own scores, each is added if the score of the mean does not fall.
    Before, the straight lines from the best member to each other one are walked: members of different basins have a
    mean that knows nothing, and are refused.

    Args:
        ensemble: the members.
        metric: called as `metric(module)` with the ensemble's module, which has the weights to judge and is in eval();
            it returns their score on held-out data, say `lambda module: accuracy(module, val_loader)`.
        mode: whether `"max"` or `"min"` is better.
        barrier: how much worse (units of the metric) a quarter, half or three quarters of a line may be than the same
            share of its ends' scores, at least 0; `math.inf` walks no lines.
    Returns:
        The average, its members and its score. The statistics of batch norm are averaged too and fit no member: let
        `metric` estimate them anew with `torch.optim.swa_utils.update_bn` and do the same with the soup.
    Raises:
        TypeError: the barrier is no number, the metric cannot be called.
        ValueError: a higher barrier, a score that is not finite, an unknown mode.
    References:
        Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
            increasing inference time", 2022, arXiv:2203.05482, recipe 1.
        Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020, arXiv:1912.05671, section 2
            (the barrier, and 2 % of it).
        Deviates: members that no straight line connects are refused before anything is averaged.
    Example:
        >>> near = Ensemble(nn.Linear(1, 1, bias=False), [{"weight": torch.tensor([[w]])} for w in (0.9, 1.2, 3.0)])
        >>> greedy_soup(near, lambda module: abs(module.weight.item() - 1), mode="min").members
        [0, 1]
    """
    if mode not in ("min", "max"):
        raise ValueError(message("greedy_soup", "mode", "'min' or 'max'", mode, "'max' suits an accuracy"))
    given: Any = metric
    if not callable(given):
        fix = "Give a function that takes the module: lambda module: accuracy(module, val_loader)"
        raise TypeError(message("greedy_soup", "metric", "a function of a module", metric, fix))
    if barrier != math.inf:
        fix = "math.inf looks for none"
        check_number("greedy_soup", "barrier", barrier, "at least 0 (units of the metric)", fix, lambda x: x >= 0)
    sign = 1 if mode == "max" else -1

    def mean(members: Sequence[int], weights: Sequence[float]) -> dict[str, Tensor]:
        return weighted_average([ensemble.member(index) for index in members], weights)

    def score(state: Mapping[str, Tensor]) -> float:
        live = ensemble._live()
        own = [tensor.data for tensor in live]
        try:  # a metric that estimates the statistics of batch norm anew writes into the copies
            _put(_placed([state[name].clone() for name in ensemble._slots], live), live)
            with in_eval(ensemble.module):
                value = float(metric(ensemble.module))
        finally:
            _put(own, live)
        if not math.isfinite(value):
            raise ValueError(message("greedy_soup", "metric", "finite", value, "Leave broken members out"))
        return value

    scores = [score(ensemble.member(index)) for index in range(len(ensemble))]
    best, *others = sorted(range(len(ensemble)), key=lambda index: -sign * scores[index])
    if barrier != math.inf:
        for other in others:
            for share in (0.5, 0.25, 0.75):
                expected = (1 - share) * scores[best] + share * scores[other]
                height = sign * (expected - score(mean([best, other], [1 - share, share])))
                if height > barrier:
                    condition = f"at most {barrier} on the line from member {best} to member {other}"
                    fix = "Their mean is no model: average their predictions with Ensemble instead"
                    raise ValueError(message("greedy_soup", "barrier", condition, round(height, 6), fix))
    soup, state, top = [best], mean([best], [1.0]), scores[best]
    for other in others:
        members = [*soup, other]
        candidate = mean(members, [1 / len(members)] * len(members))
        if sign * ((value := score(candidate)) - top) >= 0:
            soup, state, top = members, candidate, value
    return Soup(state, soup, top)


def read_manifest(directory: Path | str) -> dict[str, Any]:
    """What SnapshotEnsemble wrote about a directory.

    Args:
        directory: where it wrote.
    Returns:
        The manifest; its `snapshots` are in the order in which they were taken.
    Raises:
        ValueError: there is none, or one of a later format.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        fix = "Give the folder that SnapshotEnsemble wrote to"
        raise ValueError(message("Ensemble", "directory", f"one with a {MANIFEST}", str(directory), fix))
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        fix = "Read it with the version of lightning_tricks that wrote it"
        raise ValueError(message("Ensemble", "directory", f"of format {FORMAT}", manifest["format"], fix))
    return manifest


def _read(path: Path | str) -> Mapping[str, Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    state: Mapping[str, Tensor] = content.get("state_dict", content)
    return state


def _put(tensors: list[Tensor], live: list[Tensor]) -> None:
    # Not other tensor objects: what refers to these (a recurrent layer's flat list, a tied layer) must see the member.
    for tensor, value in zip(live, tensors, strict=True):
        tensor.data = value


def _placed(tensors: list[Tensor], live: list[Tensor]) -> list[Tensor]:
    return [tensor.to(where) for tensor, where in zip(tensors, live, strict=True)]


def _checked(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        fix = 'as_forward("layers"), say, takes a part of the module that does'
        raise TypeError(
            message("Ensemble", "module", "one that returns a tensor of logits", type(output).__name__, fix)
        )
    return output
