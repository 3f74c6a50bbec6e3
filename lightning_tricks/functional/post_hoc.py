"""Averages under power functions of the step, and how stored ones are put together into one of another width."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_tricks.functional.checks import check_number

WIDEST = 12**-0.5
"""The relative width of a plain mean (0.2887), which power functions stay below."""


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The exponent of the power function of a relative width.

        sigma_rel ** 2 * (gamma + 2) ** 2 * (gamma + 3) = gamma + 1,  gamma > 0

    Args:
        sigma_rel: standard deviation of the profile as a fraction of the steps so far, in [1e-6, 0.2887).
    Returns:
        The one positive root, about `1 / sigma_rel` for a narrow profile.
    Raises:
        TypeError, ValueError: no number, or out of range.
    References:
        Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024, arXiv:2312.02696,
            equation 126 and algorithm 2 (Deviates: the root in closed form).
    Example:
        >>> round(sigma_rel_to_gamma(0.1), 2), round(sigma_rel_to_gamma(0.05), 2)
        (6.94, 16.97)
    """
    check_sigma_rel("sigma_rel_to_gamma", "sigma_rel", sigma_rel)
    # With x = sigma_rel * (gamma + 7 / 3): x ** 3 - p * x + q = 0, whose largest root is Viete's.
    p, q = 1 + sigma_rel**2 / 3, 4 * sigma_rel / 3 + 2 * sigma_rel**3 / 27
    x = 2 * math.sqrt(p / 3) * math.cos(math.acos(-1.5 * q / p * math.sqrt(3 / p)) / 3)
    return x / sigma_rel - 7 / 3


def gamma_to_sigma_rel(gamma: float) -> float:
    """The relative width of a power function.

        sigma_rel = sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)

    Args:
        gamma: exponent, at least 0; 0 is the plain mean.
    Returns:
        Standard deviation of the profile as a fraction of the steps so far, in (0, 0.2887].
    Raises:
        TypeError, ValueError: no number, or negative.
    References:
        Karras et al., 2024, arXiv:2312.02696, equation 123.
    Example:
        >>> round(gamma_to_sigma_rel(0), 4)
        0.2887
    """
    check_number("gamma_to_sigma_rel", "gamma", gamma, "finite and at least 0", "0 is the mean", lambda x: x >= 0)
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


@dataclass(frozen=True)
class PowerFunction:
    """The decay under which the weights of step t count as t ** gamma: a profile that stretches with the run.

        decay = (1 - 1 / step) ** (gamma + 1),  step = updates + 1

    After t steps the weights of step k have the share ((k / t) ** (gamma + 1) - ((k - 1) / t) ** (gamma + 1)), so that
    the first step's copy, with which an average begins, is the formula's own.

    Args:
        sigma_rel: width of the profile as a fraction of the run so far, in [1e-6, 0.2887); 0.1 averages over about the
            last 10 %.
    Returns:
        Called with (updates, total_steps): the decay, in [0, 1); `total_steps` is not looked at.
    Raises:
        TypeError, ValueError: no number, or out of range.
    References:
        Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024, arXiv:2312.02696,
            section 3.1 and equation 127.
    Example:
        >>> [round(PowerFunction(0.1)(updates, 100), 3) for updates in (0, 1, 10, 99)]
        [0.0, 0.004, 0.469, 0.923]
    """

    sigma_rel: float

    def __post_init__(self) -> None:
        check_sigma_rel("PowerFunction", "sigma_rel", self.sigma_rel)

    @cached_property  # a run asks for it at every step
    def gamma(self) -> float:
        """The exponent."""
        return sigma_rel_to_gamma(self.sigma_rel)

    def __call__(self, updates: int, total_steps: float) -> float:
        return float((updates / (updates + 1)) ** (self.gamma + 1))


class Synthesis(NamedTuple):
    """What stored averages are added up with.

    Args:
        shares: (S, P) float64, the share of each of P profiles at each of S steps; they sum to 1, some are negative.
        error: distance of their sum from the profile that was asked for, as a fraction of its norm; it bounds the
            same for the shares of single steps.
    """

    shares: Tensor
    error: float


def synthesis(steps: Sequence[int], sigma_rels: Sequence[float], step: int, sigma_rel: float) -> Synthesis:
    """The sum of stored averages that is nearest to an average of another width.

        minimise  integral of (sum(shares * profiles) - profile) ** 2
        with      sum(shares) = 1  and  sum(shares * mean_steps) = mean_step

    The two conditions make it exact where the weights stand still or move along a line at a constant speed.

    Args:
        steps: (S,) after which the averages were stored, at least 1 and ascending.
        sigma_rels: (P,) the widths of the stored averages, each in [1e-6, 0.2887).
        step: the step whose average is wanted, at least 1.
        sigma_rel: the width that is wanted, in [1e-6, 0.2887).
    Returns:
        The shares, and how far they miss the profile.
    Raises:
        TypeError, ValueError: a width out of range.
    References:
        Karras et al., 2024, arXiv:2312.02696, section 3.2, appendix C.3 and algorithm 3.
        Deviates: the two conditions; without them frozen weights would come out wrong by up to a part in a thousand,
            with the usual 80 snapshots of two profiles.
    Example:
        >>> shares, error = synthesis([50, 100], [0.05, 0.1], 100, 0.1)
        >>> shares.abs().round(decimals=6).tolist(), round(error, 6)
        ([[0.0, 0.0], [0.0, 1.0]], 0.0)
    """
    gammas, wanted = [sigma_rel_to_gamma(width) for width in sigma_rels], [sigma_rel_to_gamma(sigma_rel)]
    products = profile_products(steps, gammas, steps, gammas)
    onto = profile_products(steps, gammas, [step], wanted)[:, 0]
    own = profile_products([step], wanted, [step], wanted)[0, 0]
    # Profiles of norm 1 keep the condition number of a usual run below 1e6.
    norms = products.diagonal().sqrt()
    products, onto = products / norms / norms[:, None], onto / norms
    means = torch.stack([mean_steps(steps, gamma) for gamma in gammas], dim=1).flatten()
    conditions = torch.stack([torch.ones_like(means), means / step]) / norms * norms.max()
    values = torch.stack([norms.max(), mean_steps([step], wanted[0])[0] / step * norms.max()])
    # What satisfies the conditions, and the directions that leave them satisfied.
    left, singular, right = torch.linalg.svd(conditions)
    rank = int((singular > 1e-12 * singular[0]).sum())
    start = right[:rank].T @ (left[:, :rank].T @ values / singular[:rank])
    free = right[rank:].T
    if free.shape[1]:
        gradient = free.T @ (onto - products @ start)
        # What is cut off (1e-10) gains nothing in distance, and would multiply the files' rounding by large shares.
        moved = torch.linalg.lstsq(free.T @ products @ free, gradient[:, None], rcond=1e-10, driver="gelsd").solution
        start = start + free @ moved[:, 0]
    square = float((start @ products @ start - 2 * start @ onto + own) / own)
    return Synthesis((start / norms).reshape(len(steps), len(gammas)), math.sqrt(max(square, 0.0)))


def profile_products(
    steps: Sequence[float], gammas: Sequence[float], other_steps: Sequence[float], other_gammas: Sequence[float]
) -> Tensor:
    """The inner products of power functions, each at each of its steps.

        profile(k; t, gamma) = (gamma + 1) * k ** gamma / t ** (gamma + 1)  for k in [0, t], else 0
        product = integral of profile(k; t, gamma) * profile(k; u, other_gamma) over k

    Args:
        steps, gammas: (S,) and (P,) of the one side, steps above 0 and gammas at least 0.
        other_steps, other_gammas: (U,) and (Q,) of the other.
    Returns:
        (S * P, U * Q) float64, the gammas running faster.
    References:
        Karras et al., 2024, arXiv:2312.02696, appendix C.3 and algorithm 3 (`p_dot_p`).
    Example:
        >>> profile_products([2], [0], [4], [0]).item()
        0.25
    """
    t, g = (axis[:, None] for axis in _pairs(steps, gammas))
    u, h = _pairs(other_steps, other_gammas)
    end = torch.minimum(t, u)
    # Powers of fractions at most 1, which cannot overflow.
    return (g + 1) * (h + 1) / (g + h + 1) * (end / t) ** g * (end / u) ** h * end / (t * u)


def mean_steps(steps: Sequence[int], gamma: float) -> Tensor:
    """The mean step of what is in an average under a power function, after each of several steps.

        mean_step = sum(k * ((k / t) ** (gamma + 1) - ((k - 1) / t) ** (gamma + 1)) for k = 1 ... t)

    Args:
        steps: (S,) at least 1, ascending; the work grows with the last one.
        gamma: exponent, at least 0.
    Returns:
        (S,) float64.
    Example:
        >>> mean_steps([1, 3], 0.0)
        tensor([1., 2.], dtype=torch.float64)
    """
    means, total, last = [], 0.0, 0
    for step in steps:  # t - sum((k / t) ** (gamma + 1) for k < t), each k looked at once
        part = torch.arange(last, step, dtype=torch.float64, device="cpu") / step
        total = total * (last / step) ** (gamma + 1) + float((part ** (gamma + 1)).sum())
        means.append(step - total)
        last = step
    return torch.tensor(means, dtype=torch.float64, device="cpu")


def check_sigma_rel(owner: str, name: str, value: Any) -> None:
    """Raise unless the value is the relative width of a power function.

    Args:
        owner: class or function named in the error.
        name: argument named in the error.
        value: what came.
    Raises:
        TypeError: no number.
        ValueError: outside [1e-6, 0.2887).
    """
    condition = "in [1e-6, 0.2887) (fraction of the steps so far)"
    fix = "0.1 averages over about the last 10 %; PolyakAverage is a plain mean"
    check_number(owner, name, value, condition, fix, lambda width: 1e-6 <= width < WIDEST)


def _pairs(steps: Sequence[float], gammas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Each step with each gamma, flat."""
    t = torch.tensor(steps, dtype=torch.float64, device="cpu")
    g = torch.tensor(gammas, dtype=torch.float64, device="cpu")
    return t.repeat_interleave(len(g)), g.repeat(len(t))
