"""Cross-entropy of labels that were mixed and smoothed, and of dense targets, with one normalisation for both."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parameter import Parameter

from lightning_tricks.functional.checks import message
from lightning_tricks.functional.components import Component, check_prior_fits, check_weight_fits, common_smoothing

CHUNK = 1 << 18
"""Logits that are worked on at once: what is made of them stays in a CPU's cache, in memory that is used again and
again, and they keep its cores busy. With twice as many the allocator hands memory back and gets it anew each time."""


class _Target(NamedTuple):
    """A target times the class weights, as a sum; of n components, each with a number for each label."""

    mass: Tensor  # (N, d1, ...), sum over the classes
    total: Tensor  # what the "mean" divides by
    labels: Tensor | None = None  # (N, n, d1, ...), none of them ignored
    points: Tensor | None = None  # (N, n, d1, ...), what stands at the label
    even: Tensor | None = None  # (N, d1, ...), what is spread over all classes, by their weights
    spread: Tensor | None = None  # (N, n, d1, ...), what is spread over the prior
    dense: Tensor | None = None  # (N, K, d1, ...)
    weights: Tensor | None = None  # (K,); None is 1 for all
    scales: Tensor | None = (
        None  # by class: of the spread the weighted prior, (K,) or (K, K), of the dense (K,) or None
    )

    def split(self, count: int) -> "list[_Target]":
        """The targets of so many samples each."""
        of_samples = ("mass", "labels", "points", "even", "spread", "dense")
        names = [name for name in of_samples if getattr(self, name) is not None]
        parts = zip(*(torch.split(getattr(self, name), count) for name in names), strict=True)
        return [self._replace(**dict(zip(names, part, strict=True))) for part in parts]


def mixed_nll(
    log_probs: Tensor,
    components: Sequence[Sequence[Any]],
    smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    prior: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of a mix of labels, without a dense target.

        loss[n] = sum(share * ((1 - smoothing) * -w[label] * log_probs[n, label] + smoothing * spread[n]))
        spread[n] = sum(prior[c] * -w[c] * log_probs[n, c] for every class c)
        "mean" = sum(loss) / sum(share * w[label])

    Sums run over the components; one whose label is `ignore_index` counts in none.

    Args:
        log_probs: (N, K), (N, K, d1, ...) or (K,) log-probabilities.
        components: (labels, share) or (labels, share, smoothing) of shape (N,), (N, d1, ...) or (), as `Component`; the
            shares of a sample add up to 1.
        smoothing: epsilon of label smoothing, in [0, 1], over all classes alike, beside that of the components.
        weight: (K,) weight w of each class; None is 1 for all.
        ignore_index: label that counts neither in the loss nor in the mean.
        reduction: "mean", "sum" or "none".
        prior: (K,) probabilities over which the components' smoothing spreads, or (K, K), a row for each label; None is
            1 / K for all.
    Returns:
        A scalar, or the loss of each label.
    Raises:
        ValueError: a prior or weights of another number of classes.
    References:
        Zhang et al., 2018, arXiv:1710.09412, eq. 1; Szegedy et al., 2016, arXiv:1512.00567, section 7.
        Deviates: normalised as for integer labels, so that an unmixed batch has torch's loss with class weights too.
    Example:
        >>> components = [(torch.tensor([0]), torch.tensor([0.75])), (torch.tensor([1]), torch.tensor([0.25]))]
        >>> mixed_nll(torch.tensor([[0.5, 0.5]]).log(), components)
        tensor(0.6931)
    """
    batch = log_probs.unsqueeze(0) if log_probs.dim() == 1 else log_probs
    target = _mixed_target(batch, components, smoothing, weight, ignore_index, prior, log_probs.dtype)
    return _reduced(_losses(batch, target), target.total, reduction, log_probs)


def mixed_cross_entropy(
    logits: Tensor,
    components: Sequence[Sequence[Any]],
    smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    prior: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of a mix of labels: `mixed_nll` of `log_softmax(logits)`, in little memory.

    Some rows at a time are worked on, and the gradient is the only tensor as large as the logits that is ever made.
    Where the gradient is differentiated again, the same is computed by torch's own operations.

    Args:
        logits: (N, K), (N, K, d1, ...) or (K,); 16-bit ones are worked on in float32.
        components, smoothing, weight, ignore_index, reduction, prior: as in `mixed_nll`.
    Returns:
        A scalar, or the loss of each label; of the dtype of the logits, under autocast float32.
    Raises:
        ValueError: a prior or weights of another number of classes.
    Example:
        >>> mixed_cross_entropy(torch.tensor([[2.0, 0.0]]), [(torch.tensor([0]), torch.tensor([1.0]))])
        tensor(0.1269)
    """
    batch = logits.unsqueeze(0) if logits.dim() == 1 else logits
    target = _mixed_target(batch, components, smoothing, weight, ignore_index, prior, _working_dtype(logits))
    return _loss_of(batch, target, reduction, logits)


def soft_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    owner: str = "soft_cross_entropy",
) -> Tensor:
    """Cross-entropy of dense targets, normalised as that of integer labels.

        loss[n] = -sum(w[c] * smoothed[n, c] * log_softmax(logits)[n, c] for every class c)
        smoothed = (1 - smoothing) * targets + smoothing / K * sum(targets)
        "mean" = sum(loss) / sum(w[c] * targets[n, c])

    A class `ignore_index`, where it is one of the K, counts in no sum but that of the smoothing; a sample whose targets
    are all 0 counts in none.

    Args:
        logits: (N, K), (N, K, d1, ...) or (K,); 16-bit ones are worked on in float32.
        targets: floats of the same shape, the probability of each class.
        smoothing, weight, ignore_index, reduction: as in `mixed_nll`.
        owner: function or class named in an error.
    Returns:
        A scalar, or the loss of each sample; of the dtype of the logits, under autocast float32.
    References:
        Szegedy et al., 2016, arXiv:1512.00567, section 7.
        Deviates: torch's mean of dense targets divides by N, which with class weights is another loss than that of the
        same labels as integers.
    Example:
        >>> soft_cross_entropy(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]]), weight=torch.tensor([3.0, 1.0]))
        tensor(0.1269)
    """
    if targets.shape != logits.shape:
        fix = "Give a probability for each class, or integer labels"
        shape = tuple(logits.shape)
        raise ValueError(message(owner, "targets", f"of shape {shape}", tuple(targets.shape), fix))
    single = logits.dim() == 1
    batch, dense = (logits.unsqueeze(0), targets.unsqueeze(0)) if single else (logits, targets)
    dtype, classes = _working_dtype(logits), batch.shape[1]
    check_weight_fits("F.cross_entropy", weight, classes)
    ones = torch.ones(classes, dtype=dtype, device=logits.device)
    if 0 <= ignore_index < classes:
        ones[ignore_index] = 0
    weight = None if weight is None else weight.to(dtype)
    weights = ones if weight is None else ones * weight
    with torch.autocast(logits.device.type, enabled=False):
        share, own = (dense.movedim(1, -1).to(dtype) @ torch.stack([ones, weights], dim=1)).unbind(-1)
    mass, even = own, None
    if smoothing > 0:
        even = smoothing * share
        mass = (1 - smoothing) * own + (even if weight is None else even * weight.mean())
    plain = weight is None and smoothing == 0 and not 0 <= ignore_index < classes
    scales = None if plain else (1 - smoothing) * weights
    target = _Target(mass, own.sum(), even=even, dense=dense, weights=weight, scales=scales)
    return _loss_of(batch, target, reduction, logits)


# ---------------------------------------------------------------------- the target


def _mixed_target(
    logits: Tensor,
    components: Sequence[Sequence[Any]],
    smoothing: float,
    weight: Tensor | None,
    ignore_index: int,
    prior: Tensor | None,
    dtype: torch.dtype,
) -> _Target:
    """What a mix of labels is, of so many samples as the logits have."""
    classes, size = logits.shape[1], logits.shape[:1] + logits.shape[2:]
    check_prior_fits("F.cross_entropy", prior, classes)
    check_weight_fits("F.cross_entropy", weight, classes)
    parts = [Component(*component) for component in components]
    single = parts[0].labels.dim() == 0 and size == (1,)  # one sample without a batch
    if parts[0].labels.shape != size and not single:
        fix = "Give a label for each sample, or for each of its places"
        got = tuple(parts[0].labels.shape)
        raise ValueError(message("F.cross_entropy", "labels", f"of shape {tuple(size)}", got, fix))
    given = torch.stack([part.labels.reshape(size) for part in parts], dim=1)
    share = torch.stack([part.share.reshape(size) for part in parts], dim=1).to(dtype)
    ignored = given == ignore_index
    labels, share = given.masked_fill(ignored, 0).long(), share.masked_fill(ignored, 0)
    weights = None if weight is None else weight.to(dtype)
    own = share if weights is None else share * weights[labels]
    target = _Target(own, own.sum(), labels, weights=weights)
    epsilon = _epsilons(parts, size)
    if prior is None:  # both smoothings are one
        smoothing_of_all = epsilon + smoothing - epsilon * smoothing
        target = target._replace(points=own * (1 - smoothing_of_all), even=share * smoothing_of_all)
        smoothed = isinstance(smoothing_of_all, Tensor) or smoothing_of_all > 0
    else:
        target = target._replace(points=own * ((1 - epsilon) * (1 - smoothing)), even=share * smoothing)
        scales = prior.to(dtype) if weights is None else prior.to(dtype) * weights
        target = target._replace(spread=share * (epsilon * (1 - smoothing)), scales=scales)
        smoothed = smoothing > 0
    return _with_mass(target, smoothed)


def _with_mass(target: _Target, smoothed: bool) -> _Target:
    """Sum the target of a mix over the components, and over the classes for its mass."""
    assert target.points is not None
    assert target.even is not None
    mass, even = target.points.sum(1), target.even.sum(1) if smoothed else None
    if even is not None:
        mass = mass + (even if target.weights is None else even * target.weights.mean())
    if target.spread is not None and target.scales is not None:
        sums = target.scales.sum(-1)
        mass = mass + (target.spread * (sums if target.scales.dim() == 1 else sums[target.labels])).sum(1)
    return target._replace(mass=mass, even=even)


def _epsilons(parts: list[Component], size: torch.Size) -> float | Tensor:
    """The smoothing of the components, a number where it is the same for all."""
    common = common_smoothing(parts)
    return torch.stack([part.filled().reshape(size) for part in parts], dim=1) if common is None else common


# ---------------------------------------------------------------------- the loss


def _losses(values: Tensor, target: _Target, shift: Callable[[Tensor], Tensor] = lambda values: values) -> Tensor:
    """The loss of each label, by operations that autograd knows. A class without a share may have probability 0.

    What `shift` makes of the values, (N, n, d1, ...), are log-probabilities; it is asked for those alone that count.
    """
    losses = torch.zeros_like(target.mass)
    if target.labels is not None and target.points is not None:
        losses = losses - _times(shift(values.gather(1, target.labels)), target.points)
    if target.even is not None:
        if target.weights is None:
            value = shift(values.mean(1, keepdim=True)).squeeze(1)
        else:
            value = _times(shift(values), _along(target.weights / values.shape[1], values))
        losses = losses - torch.where(target.even == 0, 0, target.even * value)
    if target.spread is not None or target.dense is not None:
        losses = losses - _times(shift(values), _further(target, values))
    return losses


def _further(target: _Target, logits: Tensor) -> Tensor:
    """The part of a target that is dense, (N, K, d1, ...)."""
    if target.dense is not None:
        return target.dense if target.scales is None else target.dense * _along(target.scales, logits)
    assert target.spread is not None
    assert target.scales is not None
    assert target.labels is not None
    if target.scales.dim() == 1:
        return target.spread.sum(1, keepdim=True) * _along(target.scales, logits)
    dense = torch.zeros_like(logits)
    for share, label in zip(target.spread.unbind(1), target.labels.unbind(1), strict=True):
        dense = dense + share.unsqueeze(1) * target.scales[label].movedim(-1, 1)
    return dense


def _times(log_probs: Tensor, shares: Tensor) -> Tensor:
    return (log_probs * shares).masked_fill(shares == 0, 0).sum(1)


def _along(vector: Tensor, logits: Tensor) -> Tensor:
    """A number for each class, in the dimension that the logits have them in."""
    return vector.view(-1, *[1] * (logits.dim() - 2))


def _loss_of(batch: Tensor, target: _Target, reduction: str, logits: Tensor) -> Tensor:
    if _can_be_fused(logits, target):
        losses: Tensor = _InChunks.apply(batch, target)  # type: ignore[no-untyped-call]
    else:
        losses = _losses(torch.log_softmax(batch.to(target.mass.dtype), dim=1), target)
    return _reduced(losses, target.total, reduction, logits)


def _reduced(losses: Tensor, total: Tensor, reduction: str, logits: Tensor) -> Tensor:
    loss = losses.sum() / total if reduction == "mean" else losses.sum() if reduction == "sum" else losses
    if reduction == "none" and logits.dim() == 1:
        loss = loss.squeeze(0)
    return loss if torch.is_autocast_enabled(logits.device.type) else loss.to(logits.dtype)


def _working_dtype(logits: Tensor) -> torch.dtype:
    return torch.float32 if logits.dtype in (torch.float16, torch.bfloat16) else logits.dtype


def _can_be_fused(logits: Tensor, target: _Target) -> bool:
    """Whether a gradient by hand will do: the compiler and torch.func have their own, and know none by hand."""
    return (
        type(logits) in (Tensor, Parameter)
        and not torch.compiler.is_compiling()
        and not any(tensor is not None and tensor.requires_grad for tensor in target)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


class _InChunks(torch.autograd.Function):
    """The loss of each label; the only tensor of the logits' size is that which becomes the gradient.

    Until then it holds their softmax. Of 16-bit logits that would be too coarse: it is computed again, as it is for a
    second gradient from the same graph.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: _Target) -> Tensor:
        ctx.target = target
        ctx.save_for_backward(logits, target.dense)
        losses = torch.empty_like(target.mass)
        ctx.kept = torch.empty_like(logits) if ctx.needs_input_grad[0] and logits.dtype == losses.dtype else None
        with torch.autocast(logits.device.type, enabled=False):
            for part, own, out, kept in _chunks(logits, target, losses, ctx.kept):
                if kept is None:
                    out.copy_(_losses(torch.log_softmax(part, dim=1, dtype=losses.dtype), own))
                else:  # without a second exponential: the largest probability is at least 1 / K
                    torch.softmax(part, dim=1, out=kept)
                    shift = partial(_as_log_probs, part.amax(1, keepdim=True), kept.amax(1, keepdim=True).log_())
                    out.copy_(_losses(part, own, shift))
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        target, kept, ctx.kept = ctx.target, ctx.kept, None
        # The softmax is enough, as it is for torch: the logits may have changed since, which saved tensors refuse.
        logits = kept
        if kept is None or target.dense is not None or torch.is_grad_enabled():
            logits, _ = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated
            losses = _losses(torch.log_softmax(logits.to(grad.dtype), dim=1), target)
            return *torch.autograd.grad(losses, logits, grad, create_graph=True), None
        result = torch.empty_like(logits) if kept is None else kept
        with torch.autocast(logits.device.type, enabled=False):
            for part, own, scale, out in _chunks(logits, target, grad, result):
                work = out if out.dtype == scale.dtype else torch.empty_like(out, dtype=scale.dtype)
                if kept is None:
                    torch.softmax(part, dim=1, dtype=scale.dtype, out=work)
                _make_gradient(work, own, scale)
                if work is not out:
                    out.copy_(work)
        return result, None


def _as_log_probs(top: Tensor, log_top: Tensor, logits: Tensor) -> Tensor:
    """Log-probabilities of logits, given the largest logit of each label and the logarithm of its probability."""
    return (logits - top).add_(log_top)


def _chunks(logits: Tensor, target: _Target, numbers: Tensor, others: Tensor | None) -> Iterable[Any]:
    """Some samples of everything at a time."""
    count = max(1, CHUNK * len(logits) // max(1, logits.numel()))
    if count >= len(logits):
        return [(logits, target, numbers, others)]
    parts = itertools.repeat(None) if others is None else torch.split(others, count)
    return zip(torch.split(logits, count), target.split(count), torch.split(numbers, count), parts)  # noqa: B905


def _make_gradient(softmax: Tensor, target: _Target, scale: Tensor) -> None:
    """Write `scale * (mass * softmax - target)` in the place of the softmax."""
    softmax.mul_((scale * target.mass).unsqueeze(1))
    if target.even is not None:
        share = (scale * target.even / softmax.shape[1]).unsqueeze(1)
        softmax.sub_(share if target.weights is None else share * _along(target.weights, softmax))
    if target.spread is not None or target.dense is not None:
        softmax.sub_(_further(target, softmax) * scale.unsqueeze(1))
    if target.labels is not None and target.points is not None:
        softmax.scatter_add_(1, target.labels, target.points * -scale.unsqueeze(1))
