"""Negative log-likelihood of labels that were mixed and smoothed."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tricks.functional.checks import check_number

Component: TypeAlias = tuple[Tensor, Tensor]
"""Labels and the share they have in the target, of one shape."""


def check_smoothing(owner: str, smoothing: float, name: str = "smoothing") -> None:
    """Raise unless the value is an epsilon of label smoothing, in [0, 1].

    Args:
        owner: class or function named in the error.
        smoothing: what came.
        name: argument named in the error.
    Raises:
        TypeError: no number.
        ValueError: outside [0, 1].
    Example:
        >>> check_smoothing("LabelSmoothing", 0.1)
    """
    fix = "It is the share of the target spread over all classes, 0.1 as a rule"
    check_number(owner, name, smoothing, "in [0, 1]", fix, lambda value: 0 <= value <= 1)


def mixed_nll(
    log_probs: Tensor,
    components: Sequence[Component],
    smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of a mix of labels, without a dense target.

        loss[n] = sum(share * ((1 - smoothing) * -w[label] * log_probs[n, label] + smoothing * uniform[n]))
        uniform[n] = mean(-w[c] * log_probs[n, c] for every class c)
        "mean" = sum(loss) / sum(share * w[label])

    Sums run over the components; one whose label is `ignore_index` counts in none.

    Args:
        log_probs: (N, K), (N, K, d1, ...) or (K,) log-probabilities.
        components: (labels, share) pairs of shape (N,), (N, d1, ...) or (); the shares of a sample add up to 1.
        smoothing: epsilon of label smoothing, in [0, 1].
        weight: (K,) weight w of each class; None is 1 for all.
        ignore_index: label that counts neither in the loss nor in the mean.
        reduction: "mean", "sum" or "none".
    Returns:
        A scalar, or the loss of each label.
    References:
        Zhang et al., 2018, arXiv:1710.09412, eq. 1; Szegedy et al., 2016, arXiv:1512.00567, section 7.
        Deviates: normalised as for integer labels, so that an unmixed batch has torch's loss with class weights too.
    Example:
        >>> components = [(torch.tensor([0]), torch.tensor([0.75])), (torch.tensor([1]), torch.tensor([0.25]))]
        >>> mixed_nll(torch.tensor([[0.5, 0.5]]).log(), components)
        tensor(0.6931)
    """
    unbatched = log_probs.dim() == 1
    if unbatched:
        log_probs = log_probs.unsqueeze(0)
        components = [(labels.unsqueeze(0), share.unsqueeze(0)) for labels, share in components]
    uniform: Tensor | None = None
    if smoothing > 0:
        weighted = log_probs if weight is None else log_probs * weight.view(-1, *[1] * (log_probs.dim() - 2))
        uniform = -weighted.mean(dim=1)
    loss = total = torch.zeros((), dtype=log_probs.dtype, device=log_probs.device)
    for labels, share in components:
        valid = labels != ignore_index
        share = (share * valid).to(log_probs.dtype)
        nll = F.nll_loss(log_probs, labels, weight, ignore_index=ignore_index, reduction="none")
        part = nll if uniform is None else (1 - smoothing) * nll + smoothing * uniform
        # A class of probability 0 must not matter where its share is 0.
        loss = loss + torch.where(share == 0, share, share * part)
        if reduction == "mean":
            total = total + (share if weight is None else share * weight[labels.masked_fill(~valid, 0).long()]).sum()
    if reduction == "mean":
        return loss.sum() / total
    return loss.sum() if reduction == "sum" else loss.squeeze(0) if unbatched else loss
