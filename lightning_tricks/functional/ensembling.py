"""What the members of an ensemble say together, how far they differ, and when snapshots of a cyclic run are due."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tricks.functional.checks import message
from lightning_tricks.functional.schedules.durations import in_steps, snap


def log_mean_probability(logits: Tensor) -> Tensor:
    """Log of the members' mean probability.

        log(mean_m softmax(logits[m]))  =  logsumexp_m(log_softmax(logits[m])) - log(M)

    Args:
        logits: (M, N, K, ...) of M members, at least two classes K.
    Returns:
        (N, K, ...) log probabilities, in float32 at least.
    Raises:
        TypeError, ValueError: no floating tensor of such a shape.
    References:
        Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles", 2017,
        arXiv:1612.01474, section 2.4.
    Example:
        >>> log_mean_probability(torch.tensor([[[0.25, 0.75]], [[0.75, 0.25]]]).log()).exp()
        tensor([[0.5000, 0.5000]])
    """
    return torch.logsumexp(_log_probabilities("log_mean_probability", logits), 0) - math.log(len(logits))


def log_mean_logits(logits: Tensor) -> Tensor:
    """Log probabilities of the members' mean logits: the normalised geometric mean of their probabilities.

        log_softmax(mean_m logits[m])

    Args:
        logits: (M, N, K, ...) of M members, at least two classes K.
    Returns:
        (N, K, ...) log probabilities, in float32 at least. A class that one member excludes (-inf) is excluded.
    Raises:
        TypeError, ValueError: no floating tensor of such a shape.
    Example:
        >>> log_mean_logits(torch.tensor([[[0.0, 3.0]], [[0.0, -3.0]]])).exp()
        tensor([[0.5000, 0.5000]])
    """
    return F.log_softmax(_wide("log_mean_logits", logits).mean(0), dim=1)


def log_vote(logits: Tensor) -> Tensor:
    """Log of the shares of the members' votes.

        log(mean_m vote[m]),  vote[m] = 1 for the class with the largest logit, shared by classes that have the same one

    Args:
        logits: (M, N, K, ...) of M members, at least two classes K.
    Returns:
        (N, K, ...) log probabilities, in float32 at least: -inf for a class without votes, for which the cross-entropy
        is infinite; equal for classes with as many votes; NaN where a member says NaN.
    Raises:
        TypeError, ValueError: no floating tensor of such a shape.
    Example:
        >>> log_vote(torch.tensor([[[0.0, 3.0]], [[0.0, 0.0]]])).exp()
        tensor([[0.2500, 0.7500]])
    """
    logits = _wide("log_vote", logits)
    largest = (logits == logits.amax(2, keepdim=True)).to(logits.dtype)
    return (largest / largest.sum(2, keepdim=True)).mean(0).log()


def entropy(logits: Tensor) -> Tensor:
    """How uncertain the ensemble is: the entropy of the members' mean probability.

        -sum_k mean[k] * log(mean[k]),  mean = mean_m softmax(logits[m])

    Args:
        logits: (M, N, K, ...) of M members, at least two classes K.
    Returns:
        (N, ...) nats, in [0, log K].
    Raises:
        TypeError, ValueError: no floating tensor of such a shape.
    Example:
        >>> entropy(torch.zeros(3, 1, 2))
        tensor([0.6931])
    """
    return _entropy(_log_probabilities("entropy", logits).exp().mean(0), dim=1)


def mutual_information(logits: Tensor) -> Tensor:
    """How much of the uncertainty is the members' disagreement: what the ensemble's entropy has more than theirs.

        entropy(mean_m softmax(logits[m])) - mean_m entropy(softmax(logits[m]))

    Args:
        logits: (M, N, K, ...) of M members, at least two classes K.
    Returns:
        (N, ...) nats, in [0, log M].
    Raises:
        TypeError, ValueError: no floating tensor of such a shape.
    References:
        Houlsby et al., "Bayesian Active Learning for Classification and Preference Learning", 2011, arXiv:1112.5745,
        eq. 2.
    Example:
        >>> mutual_information(torch.tensor([[[9.0, -99.0]], [[-99.0, 9.0]]]))
        tensor([0.6931])
    """
    probabilities = _log_probabilities("mutual_information", logits).exp()
    # Never negative but for rounding.
    return (_entropy(probabilities.mean(0), dim=1) - _entropy(probabilities, dim=2).mean(0)).clamp(min=0)


def disagreement(logits: Tensor) -> Tensor:
    """Share of the pairs of members that name different classes.

        mean_{m < n} (argmax(logits[m]) != argmax(logits[n]))

    Args:
        logits: (M, N, K, ...) of at least two members M, at least two classes K. Of equal logits the first counts.
    Returns:
        (N, ...) shares, in [0, 1].
    Raises:
        TypeError, ValueError: no floating tensor of such a shape, or a single member.
    References:
        Fort et al., "Deep Ensembles: A Loss Landscape Perspective", 2019, arXiv:1912.02757, section 3.
    Example:
        >>> disagreement(torch.tensor([[[0.0, 1.0]], [[0.0, 2.0]], [[3.0, 0.0]]]))
        tensor([0.6667])
    """
    wide = _wide("disagreement", logits)
    named = wide.argmax(2)
    members = len(named)
    if members < 2:
        fix = "One member has nobody to disagree with"
        raise ValueError(message("disagreement", "logits", "of at least two members", members, fix))
    differs = named.unsqueeze(0) != named.unsqueeze(1)
    return differs.sum((0, 1)).to(wide.dtype) / (members * (members - 1))


def weighted_average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Weighted sum of state dicts.

        sum_i weights[i] * states[i]

    Args:
        states: state dicts of the same names and shapes, at least one.
        weights: as many shares, which sum to 1.
    Returns:
        New tensors of the first state's dtypes: floating ones summed in float32 at least, others (batch counts, masks)
        copied from the first state.
    Raises:
        ValueError: none, or of other names, or not as many weights.
    Example:
        >>> weighted_average([{"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}], [0.75, 0.25])
        {'w': tensor([1.])}
    """
    names = states[0].keys() if states else None
    if len(states) != len(weights) or names is None or any(state.keys() != names for state in states):
        got = [len(state) for state in states], list(weights)
        fix = "Give state dicts of one architecture, and a weight for each"
        raise ValueError(message("weighted_average", "states", "at least one, of the same names", got, fix))
    return {name: _weighted_sum([state[name] for state in states], weights) for name in names}


def cycle_ends(cycles: int, total_steps: int, multiplier: float = 1.0, owner: str = "cycle_ends") -> list[int]:
    """After how many real steps the cycles of a run are over, every rate of theirs used.

        ceil(total_steps * i / cycles)                                                 i = 1 ... cycles
        ceil(total_steps * (multiplier ** i - 1) / (multiplier ** cycles - 1))         cycles that grow

    Args:
        cycles: number of cycles that fill the run, at least 1.
        total_steps: length of the run (optimizer steps), at least 1.
        multiplier: each cycle is so many times as long as the one before it, at least 1.
        owner: function or class named in an error.
    Returns:
        `cycles` whole steps, the last of them `total_steps`.
    Raises:
        ValueError: a cycle shorter than a step.
    References:
        Huang et al., "Snapshot Ensembles: Train 1, get M for free", 2017, arXiv:1704.00109, eq. 2.
        Deviates: they have cycles of ceil(total_steps / cycles) steps, which do not fill the run.
    Example:
        >>> cycle_ends(3, 10)
        [4, 7, 10]
    """
    if multiplier == 1:
        ends = [-(-total_steps * i // cycles) for i in range(1, cycles + 1)]
    else:  # both powers of the formula would overflow
        first = multiplier**-cycles
        shares = [(multiplier ** (i - cycles) - first) / (1 - first) for i in range(1, cycles)]
        ends = [*(math.ceil(snap(total_steps * share)) for share in shares), total_steps]
    if len({0, *ends}) <= cycles:
        fix = "Train longer, or in fewer cycles"
        condition = f"few enough for each to have one of the run's {total_steps} optimizer steps"
        raise ValueError(message(owner, "cycles", condition, cycles, fix))
    return ends


def ends_of_cycles(schedule: Any, total_steps: int, owner: str = "ends_of_cycles", length: str = "length") -> list[int]:
    """After how many real steps the cycles of a schedule are over, as far as they end within the run.

    Args:
        schedule: with `cycles` that fill the run, or the `length` of the first one (steps or a fraction of the run),
            and perhaps a `multiplier`, as `CosineRestarts` and `Triangular` have them.
        total_steps: length of the run (optimizer steps), at least 1.
        owner: function or class named in an error.
        length: what it calls the length of the first cycle.
    Returns:
        Whole steps, each above the one before it; at least one.
    Raises:
        ValueError: a cycle shorter than a step, or longer than the run.
    Example:
        >>> from lightning_tricks import CosineRestarts
        >>> ends_of_cycles(CosineRestarts(length=2, multiplier=2), 10)
        [2, 6]
    """
    growth: float = getattr(schedule, "multiplier", 1.0)
    if schedule.cycles is not None:
        return cycle_ends(schedule.cycles, total_steps, growth, owner)
    stretch = in_steps(owner, length, schedule.length, total_steps)
    if not 1 <= stretch <= total_steps:
        fix = "Train longer, or in other cycles"
        condition = f"between one and the run's {total_steps} optimizer steps"
        raise ValueError(message(owner, length, condition, schedule.length, fix))
    ends, end = [], snap(stretch)
    while end <= total_steps:
        ends.append(math.ceil(end))
        stretch *= growth
        end = snap(end + stretch)
    return ends


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    first = tensors[0]
    if not (first.is_floating_point() or first.is_complex()):
        return first.clone()
    total = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float32))
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.to(total), alpha=weight)
    return total.to(first.dtype)


def _entropy(probabilities: Tensor, dim: int) -> Tensor:
    terms: Tensor = torch.special.entr(probabilities)  # 0 where the probability is 0
    return terms.sum(dim)


def _log_probabilities(owner: str, logits: Tensor) -> Tensor:
    return F.log_softmax(_wide(owner, logits), dim=2)


def _wide(owner: str, logits: Tensor) -> Tensor:
    """The logits in float32 at least: a mean of half-precision probabilities loses small ones."""
    condition = "a floating tensor of shape (M, N, K, ...)"
    if not (isinstance(logits, Tensor) and logits.is_floating_point()):
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(message(owner, "logits", condition, got, "Stack the members' logits"))
    if logits.dim() < 3 or len(logits) == 0 or logits.shape[2] < 2:
        fix = "Of a single logit z for yes or no make two classes: torch.stack([torch.zeros_like(z), z], dim=1)"
        raise ValueError(message(owner, "logits", f"{condition} with K >= 2", tuple(logits.shape), fix))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
