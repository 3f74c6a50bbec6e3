"""MixedLabels, line by line of what it promises."""

import contextlib
import copy
import io
import math
import operator
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
import torchmetrics.functional as metrics
from torch import nn

from lightning_tricks.labels import (
    MixedLabels,
    check_smoothing,
    mix_labels,
    move_labels,
    put_labels,
    smooth_labels,
    soft_targets,
    take_labels,
)
from lightning_tricks.losses import LabelSmoothingCrossEntropy

K = 4
SHAPES = [(6,), (4, 5), (3, 4, 2)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
WAYS_OUT = ("F.cross_entropy", "soft_targets(labels, num_classes)", "targets='soft'", "labels=None")


def integers(shape=(6,), seed=0):
    return torch.randint(K, shape, generator=torch.Generator().manual_seed(seed))


def parameters(count, seed=0):
    """Weights and partners of a mixup, no sample its own partner."""
    weight = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return weight, torch.arange(count).roll(1)


def mixed(shape=(6,), smoothing=0.0, seed=0):
    labels = mix_labels(integers(shape, seed), *parameters(shape[0], seed))
    return smooth_labels(labels, smoothing) if smoothing else labels


def logits_for(labels, dtype=torch.float64, seed=0):
    shape = (*labels.shape[:1], K, *labels.shape[1:])
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.to(dtype).requires_grad_()


def one_hot(labels, classes=K):
    """Classes in the second dimension, or in the first of a single label."""
    coded = torch.zeros(labels.numel(), classes, dtype=torch.float64)
    for row, label in zip(coded, labels.flatten().tolist(), strict=True):
        row[int(label)] = 1
    return coded.view(*labels.shape, classes).movedim(-1, min(1, labels.dim()))


def dense_loss(logits, targets):
    """Sum over the samples of -target * log_softmax(logits)."""
    return -(targets * F.log_softmax(logits, dim=min(1, logits.dim() - 1))).sum()


def loss_by_loop(logits, labels, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """The loss as DESIGN words it: sample by sample, class by class, in float64 and without torch's losses."""
    classes = logits.shape[min(1, logits.dim() - 1)]
    rows = logits.detach().double().movedim(min(1, logits.dim() - 1), -1).reshape(-1, classes).tolist()
    parts = [(own.flatten().tolist(), share.flatten().tolist()) for own, share in labels.components]
    w = [1.0] * classes if weight is None else weight.tolist()
    smoothing = 1 - (1 - labels.smoothing) * (1 - label_smoothing)
    losses, total = [], 0.0
    for n, row in enumerate(rows):
        top = max(row)
        log_sum = top + math.log(sum(math.exp(x - top) for x in row))
        log_p = [x - log_sum for x in row]
        uniform = -sum(w[c] * log_p[c] for c in range(classes)) / classes
        sample = 0.0
        for own, share in parts:
            if own[n] != ignore_index:
                nll = -w[own[n]] * log_p[own[n]]
                sample += share[n] * ((1 - smoothing) * nll + smoothing * uniform)
                total += share[n] * w[own[n]]
        losses.append(sample)
    if reduction == "none":
        return torch.tensor(losses, dtype=torch.float64).view(labels.shape)
    return torch.tensor(math.fsum(losses) / (total if reduction == "mean" else 1), dtype=torch.float64)


def assert_close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual.detach().double(), expected.detach().double(), rtol=tolerance, atol=tolerance)


def assert_mixed(labels, targets):
    """These labels stand for these dense targets."""
    assert type(labels) is MixedLabels
    assert_close(soft_targets(labels, targets.shape[min(1, labels.dim())]), targets)


# ------------------------------------------------------------------ losses

CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)


def nll_of(loss):
    """The same call on log-probabilities; it has no smoothing of its own."""
    return lambda z, y, label_smoothing=0.0, **o: loss(F.log_softmax(z, min(1, z.dim() - 1)), y, **o)


CROSS_ENTROPIES = {
    "F.cross_entropy": F.cross_entropy,
    "F.cross_entropy by name": lambda z, y, **o: F.cross_entropy(target=y, input=z, **o),
    "nn.CrossEntropyLoss": lambda z, y, **o: nn.CrossEntropyLoss(**o)(z, y),
    "LabelSmoothingCrossEntropy": lambda z, y, label_smoothing=0.0, **o: LabelSmoothingCrossEntropy(
        label_smoothing, **o
    )(z, y),
}
NLL_LOSSES = {
    "F.nll_loss": nll_of(F.nll_loss),
    "F.nll_loss by name": nll_of(lambda z, y, **o: F.nll_loss(target=y, input=z, **o)),
    "nn.NLLLoss": nll_of(lambda z, y, **o: nn.NLLLoss(**o)(z, y)),
}
LOSSES = CROSS_ENTROPIES | NLL_LOSSES
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
weighted_or_not = pytest.mark.parametrize("weight", [None, CLASS_WEIGHTS], ids=["unweighted", "weighted"])


def smoothings(loss):
    return (0.0, 0.2) if loss in CROSS_ENTROPIES.values() else (0.0,)


@every_loss
@every_reduction
@weighted_or_not
@pytest.mark.parametrize("ignore_index", [-100, 1])
@pytest.mark.parametrize("shape", [(6,), (4, 5), (3, 4, 2), ()], ids=str)
def test_a_loss_is_its_formula_sample_by_sample(loss, reduction, weight, ignore_index, shape):
    for own_smoothing in (0.0, 0.1, 1.0):
        for label_smoothing in smoothings(loss):
            labels = mixed(shape or (3,), own_smoothing)
            logits = logits_for(labels)
            if not shape:
                labels, logits = labels[1], logits[1]
            options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
            actual = loss(logits, labels, **options, label_smoothing=label_smoothing)
            expected = loss_by_loop(logits, labels, label_smoothing=label_smoothing, **options)
            assert actual.shape == expected.shape
            assert_close(actual, expected)


@every_loss
@every_reduction
@weighted_or_not
@pytest.mark.parametrize("where", ["original", "partner", "both"])
def test_an_ignored_component_counts_in_neither_sum(loss, reduction, weight, where):
    plain, partner = integers(), integers(seed=1)
    for labels, name in ((plain, "original"), (partner, "partner")):
        if where in (name, "both"):
            labels[[0, 3]] = -100
    labels = MixedLabels(plain, partner, parameters(6)[0], smoothing=0.1)
    logits = logits_for(labels)
    options = {"weight": weight, "reduction": reduction}
    assert_close(loss(logits, labels, **options), loss_by_loop(logits, labels, **options))


@every_loss
def test_a_batch_of_ignored_labels_is_torchs(loss):
    plain = torch.full((3,), -100)
    logits, labels = logits_for(plain), smooth_labels(MixedLabels(plain, plain, 0.5), 0.1)
    for reduction in ("mean", "sum", "none"):
        expected = loss(logits, plain, reduction=reduction)
        torch.testing.assert_close(loss(logits, labels, reduction=reduction), expected, equal_nan=True)


@every_loss
@every_reduction
@every_shape
def test_without_class_weights_a_loss_is_torchs_dense_one(loss, reduction, shape):
    labels = mixed(shape, 0.1)
    logits = logits_for(labels)
    (first, share), (second, other) = labels.components
    targets = 0.9 * (one_hot(first) * share.unsqueeze(1) + one_hot(second) * other.unsqueeze(1)) + 0.1 / K
    for label_smoothing in smoothings(loss):
        expected = F.cross_entropy(logits, targets, reduction=reduction, label_smoothing=label_smoothing)
        actual = loss(logits, labels, reduction=reduction, label_smoothing=label_smoothing)
        assert_close(actual, expected)


@every_loss
@every_reduction
@weighted_or_not
@pytest.mark.parametrize("ignore_index", [-100, 1])
@every_shape
def test_an_unmixed_batch_keeps_the_users_loss(loss, reduction, weight, ignore_index, shape):
    plain = integers(shape)
    plain[0] = ignore_index
    logits = logits_for(plain)
    for labels in (MixedLabels(plain), MixedLabels(plain, plain.flip(0), 1.0), smooth_labels(plain, 0.0)):
        for label_smoothing in smoothings(loss):
            options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
            options["label_smoothing"] = label_smoothing
            assert_close(loss(logits, labels, **options), loss(logits, plain, **options), tolerance=1e-12)


@every_reduction
@weighted_or_not
def test_smoothed_labels_are_torchs_label_smoothing(reduction, weight):
    plain = integers()
    plain[2] = -100
    logits, options = logits_for(plain), {"weight": weight, "reduction": reduction}
    expected = F.cross_entropy(logits, plain, label_smoothing=0.1, **options)
    assert_close(F.cross_entropy(logits, smooth_labels(plain, 0.1), **options), expected, tolerance=1e-12)


def test_positional_options_are_understood():
    labels, weight = mixed(), CLASS_WEIGHTS
    logits = logits_for(labels)
    log_p = F.log_softmax(logits, 1)
    expected = loss_by_loop(logits, labels, weight, ignore_index=1, reduction="sum")
    assert_close(F.cross_entropy(logits, labels, weight, None, 1, None, "sum"), expected)
    assert_close(F.nll_loss(log_p, labels, weight, None, 1, None, "sum"), expected)
    smoothed = loss_by_loop(logits, labels, weight, ignore_index=1, reduction="sum", label_smoothing=0.3)
    assert_close(F.cross_entropy(logits, labels, weight, None, 1, None, "sum", 0.3), smoothed)


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("loss", [LOSSES["F.cross_entropy"], LOSSES["nn.CrossEntropyLoss"], LOSSES["F.nll_loss"]])
@pytest.mark.parametrize(
    ("legacy", "reduction"),
    [
        ({"size_average": False}, "sum"),
        ({"size_average": True}, "mean"),
        ({"reduce": False}, "none"),
        ({"reduce": True}, "mean"),
        ({"size_average": False, "reduce": True}, "sum"),
        ({"size_average": True, "reduce": False}, "none"),
    ],
    ids=str,
)
def test_legacy_reductions_are_understood(loss, legacy, reduction):
    labels = mixed()
    logits = logits_for(labels)
    assert_close(loss(logits, labels, **legacy), loss_by_loop(logits, labels, reduction=reduction))


@every_loss
@weighted_or_not
def test_gradients_are_those_of_the_loss(loss, weight):
    labels = mixed((3, 2), 0.1)
    options = {"weight": weight, "ignore_index": 1}
    assert torch.autograd.gradcheck(lambda z: loss(z, labels, **options), (logits_for(labels),))


def test_gradients_are_torchs_dense_ones():
    labels = mixed((3, 2), 0.1)
    logits = logits_for(labels)
    (first, share), (second, other) = labels.components
    targets = 0.9 * (one_hot(first) * share.unsqueeze(1) + one_hot(second) * other.unsqueeze(1)) + 0.1 / K
    (actual,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, targets), logits)
    assert_close(actual, expected)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_loss_has_the_dtype_of_the_logits(loss, dtype):
    labels = mixed((4, 3), 0.1)
    logits = logits_for(labels, dtype)
    actual = loss(logits, labels)
    assert actual.dtype == loss(logits, integers((4, 3))).dtype == dtype
    assert_close(actual, loss_by_loop(logits, labels), tolerance=4 * torch.finfo(dtype).eps + 1e-7)


@weighted_or_not
def test_labels_of_one_byte_are_understood_as_torch_does(weight):
    plain = integers().to(torch.uint8)
    logits, labels = logits_for(plain), MixedLabels(plain, plain.flip(0), 0.75)
    expected = loss_by_loop(logits, labels, weight)
    assert_close(F.cross_entropy(logits, labels, weight), expected)
    assert_close(
        F.cross_entropy(logits, MixedLabels(plain), weight), F.cross_entropy(logits, plain, weight), tolerance=1e-12
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_logits_of_an_ignored_sample_do_not_matter(label_smoothing):
    plain = torch.tensor([0, -100])
    logits = torch.tensor([[0.0, 1.0], [math.nan, math.inf]])
    expected = F.cross_entropy(logits, plain, label_smoothing=label_smoothing)
    assert expected.isfinite()
    assert_close(F.cross_entropy(logits, MixedLabels(plain), label_smoothing=label_smoothing), expected)


def test_a_partner_without_a_share_may_be_impossible():
    plain, logits = torch.tensor([0]), torch.tensor([[0.0, 1.0, -math.inf]])
    labels = MixedLabels(plain, torch.tensor([2]), 1.0)
    assert_close(F.cross_entropy(logits, labels), F.cross_entropy(logits, plain))


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_a_loss_checks_its_smoothing(value):
    text = f"F.cross_entropy: label_smoothing must be in [0, 1], got {value!r}. It is the share of the target spread"
    with pytest.raises(ValueError, match=re.escape(text)):
        F.cross_entropy(torch.zeros(6, K), mixed(), label_smoothing=value)


@pytest.mark.parametrize("loss", [F.cross_entropy, F.nll_loss])
def test_a_loss_checks_its_reduction_as_torch_does(loss):
    for labels in (mixed(), integers()):
        with pytest.raises(ValueError, match="average is not a valid value for reduction"):
            loss(torch.zeros(6, K), labels, reduction="average")


# ------------------------------------------------------------------ operations that keep the mix

MASK = torch.tensor([True, False, True, True])
REARRANGED = {
    "view(-1)": lambda y: y.view(-1),
    "view(2, -1)": lambda y: y.view(2, -1),
    "view((6, 4))": lambda y: y.view((6, 4)),
    "view_as": lambda y: y.view_as(torch.zeros(6, 4)),
    "reshape": lambda y: y.reshape(6, 4),
    "reshape_as": lambda y: y.reshape_as(torch.zeros(2, 12)),
    "torch.reshape": lambda y: torch.reshape(y, (6, 4)),
    "torch.reshape by name": lambda y: torch.reshape(input=y, shape=(6, 4)),
    "flatten": lambda y: y.flatten(),
    "torch.flatten": lambda y: torch.flatten(y, start_dim=0),
    "ravel": lambda y: y.ravel(),
    "unflatten": lambda y: y.unflatten(1, (2, 3)),
    "squeeze": lambda y: y[:, :1].squeeze(),
    "squeeze(1)": lambda y: y[:, :1].squeeze(1),
    "unsqueeze": lambda y: y.unsqueeze(1),
    "[0]": lambda y: y[0],
    "[0, 1]": lambda y: y[0, 1],
    "[-1]": lambda y: y[-1],
    "[1:3]": lambda y: y[1:3],
    "[:, ::2]": lambda y: y[:, ::2],
    "[..., 0]": lambda y: y[..., 0],
    "[None]": lambda y: y[:, None],
    "[mask]": lambda y: y[MASK],
    "[full mask]": lambda y: y[MASK[:, None].expand(4, 6)],
    "[long]": lambda y: y[torch.tensor([3, 3, 0])],
    "[list]": lambda y: y[[2, 1]],
    "[long, long]": lambda y: y[torch.tensor([0, 1]), torch.tensor([5, 4])],
    "index_select": lambda y: y.index_select(1, torch.tensor([4, 0])),
    "masked_select": lambda y: y.masked_select(MASK[:, None]),
    "select": lambda y: y.select(1, 2),
    "narrow": lambda y: y.narrow(1, 2, 3),
    "unbind": lambda y: y.unbind(1),
    "torch.unbind": lambda y: torch.unbind(y),
    "split": lambda y: y.split(3),
    "split of sizes": lambda y: y.split([1, 3]),
    "torch.split": lambda y: torch.split(y, 2, dim=1),
    "chunk": lambda y: y.chunk(2, dim=1),
    "permute": lambda y: y.permute(1, 0),
    "transpose": lambda y: y.transpose(0, 1),
    "t": lambda y: y.t(),
    "T": lambda y: y.T,
    "mT": lambda y: y.mT,
    "movedim": lambda y: y.movedim(0, 1),
    "moveaxis": lambda y: y.moveaxis(0, 1),
    "swapaxes": lambda y: y.swapaxes(0, 1),
    "swapdims": lambda y: y.swapdims(0, 1),
    "flip": lambda y: y.flip(0),
    "roll": lambda y: y.roll(1, 0),
    "repeat": lambda y: y.repeat(2, 1),
    "tile": lambda y: y.tile(2),
    "repeat_interleave": lambda y: y.repeat_interleave(2, dim=0),
    "torch.repeat_interleave": lambda y: torch.repeat_interleave(y, torch.tensor([1, 0, 2, 1]), dim=0),
    "expand": lambda y: y[:, :1].expand(4, 3),
    "expand_as": lambda y: y[:, :1].expand_as(torch.zeros(4, 3)),
    "broadcast_to": lambda y: y[:, :1].broadcast_to(4, 3),
    "tensor_split": lambda y: y.tensor_split(2),
    "diagonal": lambda y: y.diagonal(),
    "take": lambda y: y.take(torch.tensor([0, 7])),
    "gather": lambda y: y.gather(1, torch.tensor([[0], [1], [2], [3]])),
    "clone": lambda y: y.clone(),
    "detach": lambda y: y.detach(),
    "contiguous": lambda y: y.t().contiguous(),
    "cpu": lambda y: y.cpu(),
    "to(device)": lambda y: y.to("cpu"),
    "to(device, non_blocking)": lambda y: y.to(torch.device("cpu"), non_blocking=True),
    "to(device=)": lambda y: y.to(device="cpu", copy=True),
}


def planes(function, tensor):
    """What a rearrangement does to a tensor with the classes in its second dimension; always a list."""
    outputs = [function(plane.contiguous()) for plane in tensor.unbind(1)]
    if isinstance(outputs[0], torch.Tensor):
        outputs = [(output,) for output in outputs]
    return [torch.stack(part, dim=min(1, part[0].dim())) for part in zip(*outputs, strict=True)]


@pytest.mark.parametrize("function", REARRANGED.values(), ids=REARRANGED.keys())
def test_rearranged_labels_keep_the_mix(function):
    labels = mixed((4, 6), 0.1)
    logits = logits_for(labels)
    result = function(labels)
    parts = [result] if isinstance(result, torch.Tensor) else list(result)
    targets, moved_logits = planes(function, soft_targets(labels, K)), planes(function, logits)
    plain = function(torch.tensor(labels.tolist()))
    plains = [plain] if isinstance(plain, torch.Tensor) else list(plain)
    for part, dominant, target, own_logits in zip(parts, plains, targets, moved_logits, strict=True):
        assert_mixed(part, target)
        assert part.tolist() == dominant.tolist()
        assert part.stride() == dominant.stride()
        if own_logits.dim() < 2 or len(own_logits):
            assert_close(F.cross_entropy(own_logits, part, reduction="sum"), dense_loss(own_logits, target))


def test_labels_mixed_with_one_weight_for_the_batch_can_be_viewed():
    labels = MixedLabels(integers((4, 6)), integers((4, 6), seed=1), 0.7)
    assert_mixed(
        labels.view(-1), 0.7 * one_hot(integers((4, 6)).view(-1)) + 0.3 * one_hot(integers((4, 6), 1).view(-1))
    )


CASTS = {
    "long": (lambda y: y.long(), torch.int64),
    "int": (lambda y: y.int(), torch.int32),
    "short": (lambda y: y.short(), torch.int16),
    "char": (lambda y: y.char(), torch.int8),
    "byte": (lambda y: y.byte(), torch.uint8),
    "to(int32)": (lambda y: y.to(torch.int32), torch.int32),
    "to(dtype=int16)": (lambda y: y.to(dtype=torch.int16), torch.int16),
    "to(cpu, int32)": (lambda y: y.to("cpu", torch.int32), torch.int32),
    "to(other)": (lambda y: y.to(torch.zeros(1, dtype=torch.int32)), torch.int32),
    "type": (lambda y: y.type(torch.int32), torch.int32),
    "type_as": (lambda y: y.type_as(torch.zeros(1, dtype=torch.int32)), torch.int32),
    "int and long": (lambda y: y.int().long(), torch.int64),
}


@pytest.mark.parametrize(("cast", "dtype"), CASTS.values(), ids=CASTS.keys())
def test_labels_cast_to_integers_keep_the_mix(cast, dtype):
    labels = mixed((4, 3), 0.1)
    result = cast(labels)
    assert result.dtype == dtype
    assert_mixed(result, soft_targets(labels, K))
    assert_close(
        F.cross_entropy(logits_for(labels), result.long()), loss_by_loop(logits_for(labels), labels), tolerance=1e-6
    )


def test_the_usual_chain_in_a_training_step_keeps_the_mix():
    labels = mixed((4, 1, 5))
    logits = logits_for(labels.squeeze())
    flat = logits.permute(0, 2, 1).reshape(-1, K)
    assert_close(
        F.cross_entropy(flat, labels.squeeze().long().contiguous().view(-1)),
        loss_by_loop(logits, labels.squeeze()),
    )


# ------------------------------------------------------------------ operations that see plain integers

PLAIN = {
    "== int": lambda y: y == 2,
    "== labels": lambda y: y == y,
    "!=": lambda y: y != 1,
    "<": lambda y: y < 2,
    "argmax ==": lambda y: (torch.eye(K)[[3, 2, 1, 0, 0, 1]].argmax(1) == y).float().mean(),
    "eq(view_as)": lambda y: torch.zeros(6, 1, dtype=torch.int64).eq(y.view(-1, 1)),
    "topk": lambda y: (torch.arange(K).expand(6, K)[:, :2] == y[:, None]).any(1),
    "+": lambda y: y + 1,
    "int -": lambda y: 3 - y,
    "*": lambda y: y * 2,
    "%": lambda y: y % 2,
    "sum": lambda y: y.sum(),
    "max": lambda y: y.max(),
    "unique": lambda y: y.unique(),
    "bincount": lambda y: torch.bincount(y, minlength=K),
    "where": lambda y: torch.where(y == 2, -100, y),
    "masked_fill": lambda y: y.masked_fill(y == 2, -100),
    "argsort": lambda y: y.argsort(stable=True),
    "sort": lambda y: y.sort(stable=True).values,
    "bool": lambda y: y.bool(),
    "bits as floats": lambda y: y.view(torch.float64),
    "bits as other integers": lambda y: y.view(torch.int32),
    "bits by name": lambda y: y.view(dtype=torch.uint8),
    "ones_like": lambda y: torch.ones_like(y),
    "zeros_like as floats": lambda y: torch.zeros_like(y, dtype=torch.float32),
    "new_zeros": lambda y: y.new_zeros(2),
    "index of a table": lambda y: torch.arange(10.0, 14.0)[y],
    "index_add_ to counts": lambda y: torch.zeros(K).index_add_(0, y, torch.ones(6)),
    "scatter_ to counts": lambda y: torch.zeros(K).scatter_add_(0, y, torch.ones(6)),
    "assigned to a queue": lambda y: assigned(torch.zeros(8, dtype=torch.int64), slice(1, 7), y),
    "copy_ into a buffer": lambda y: torch.zeros(6, dtype=torch.int64).copy_(y),
    "index of an assignment": lambda y: assigned(torch.zeros(K), y, 1.0),
    "added in place": lambda y: torch.ones(6, dtype=torch.int64).add_(y),
    "out=": lambda y: torch.add(y, 1, out=torch.zeros(6, dtype=torch.int64)),
}


def assigned(tensor, index, value):
    tensor[index] = value
    return tensor


@pytest.mark.parametrize("function", PLAIN.values(), ids=PLAIN.keys())
def test_any_other_operation_sees_and_returns_plain_integers(function):
    labels = mixed(smoothing=0.1)
    result = function(labels)
    assert type(result) is torch.Tensor
    assert torch.equal(result, function(torch.tensor(labels.tolist())))
    assert not labels.used


def test_labels_look_like_integers_to_python():
    plain, labels = integers(), MixedLabels(integers(), integers(seed=1), 0.9)
    assert labels.tolist() == plain.tolist()
    assert labels.numpy().tolist() == plain.tolist()
    assert [int(label) for label in labels] == plain.tolist()
    assert len(labels) == 6
    assert labels.shape == plain.shape
    assert labels.dtype == torch.int64
    assert labels.device == plain.device
    assert not labels.requires_grad
    assert not labels.is_floating_point()
    assert labels[2].item() == plain[2].item()
    assert f"{labels[2]}" == str(plain[2].item())
    assert list(range(K))[labels[2]] == plain[2].item()
    assert labels.type() == plain.type()
    assert isinstance(labels, torch.Tensor)


def test_the_representation_says_what_they_are():
    labels = smooth_labels(MixedLabels(torch.tensor([2, 0]), torch.tensor([0, 1]), 0.75), 0.1)
    assert repr(labels) == "MixedLabels([2, 0], components=2, smoothing=0.1)"


def test_labels_can_be_embedded_without_a_gradient():
    labels, table = mixed(), torch.randn(K, 3)
    assert torch.equal(F.embedding(labels, table), table[torch.tensor(labels.tolist())])


METRICS = {
    "accuracy": lambda: torchmetrics.Accuracy(task="multiclass", num_classes=K),
    "micro accuracy": lambda: torchmetrics.Accuracy(task="multiclass", num_classes=K, average="micro"),
    "top-2 accuracy": lambda: torchmetrics.Accuracy(task="multiclass", num_classes=K, top_k=2),
    "F1": lambda: torchmetrics.F1Score(task="multiclass", num_classes=K, average="macro"),
    "AUROC": lambda: torchmetrics.AUROC(task="multiclass", num_classes=K),
    "binned AUROC": lambda: torchmetrics.AUROC(task="multiclass", num_classes=K, thresholds=5),
    "confusion matrix": lambda: torchmetrics.ConfusionMatrix(task="multiclass", num_classes=K),
    "calibration error": lambda: torchmetrics.CalibrationError(task="multiclass", num_classes=K),
    "Cohen's kappa": lambda: torchmetrics.CohenKappa(task="multiclass", num_classes=K),
    "Jaccard index": lambda: torchmetrics.JaccardIndex(task="multiclass", num_classes=K),
    "hinge loss": lambda: torchmetrics.HingeLoss(task="multiclass", num_classes=K),
}


def flat(values):
    if isinstance(values, (list, tuple)):
        return [item for value in values for item in flat(value)]
    return [values]


every_metric = pytest.mark.parametrize("make", METRICS.values(), ids=METRICS.keys())


@every_metric
def test_a_metric_is_that_of_the_plain_labels(make):
    labels = mixed((40,))
    plain, logits = torch.tensor(labels.tolist()), logits_for(labels)
    metric, expected = make(), make()
    assert_close(metric(logits, labels), expected(logits, plain))
    assert_close(metric.compute(), expected.compute())
    assert not labels.used


@every_metric
def test_a_metric_keeps_plain_tensors(make):
    labels, metric = mixed((40,)), make()
    metric.update(logits_for(labels), labels)
    assert {type(value) for value in flat(list(metric.metric_state.values()))} == {torch.Tensor}


@pytest.mark.parametrize(
    "measure",
    [
        lambda z, y: metrics.accuracy(z, y, task="multiclass", num_classes=K),
        lambda z, y: metrics.accuracy(z, y, task="multiclass", num_classes=K, top_k=2),
        lambda z, y: metrics.auroc(z, y, task="multiclass", num_classes=K),
        lambda z, y: metrics.auroc(z, y, task="multiclass", num_classes=K, thresholds=5),
        lambda z, y: metrics.calibration_error(z, y, task="multiclass", num_classes=K),
    ],
    ids=["accuracy", "top-2 accuracy", "AUROC", "binned AUROC", "calibration error"],
)
def test_a_metric_function_on_logits_with_a_gradient_is_that_of_the_plain_labels(measure):
    labels = mixed((40,))
    logits = logits_for(labels)
    assert_close(measure(logits, labels), measure(logits, torch.tensor(labels.tolist())))


# ------------------------------------------------------------------ what cannot know the mix raises


REFUSED = (TypeError, ValueError)  # Python's operators swallow a TypeError and lose its message


def focal_loss(logits, labels):
    log_p = F.log_softmax(logits, 1)
    own = log_p[torch.arange(len(labels)), labels]
    return -((1 - own.exp()) ** 2 * own).mean()


UNKNOWING = {
    "focal loss": (focal_loss, "__getitem__"),
    "gather": (lambda z, y: -F.log_softmax(z, 1).gather(1, y.view(-1, 1)).mean(), "gather"),
    "take_along_dim": (lambda z, y: z.take_along_dim(y[:, None], 1).mean(), "take_along_dim"),
    "F.multi_margin_loss": (F.multi_margin_loss, "multi_margin_loss"),
    "nn.MultiMarginLoss": (lambda z, y: nn.MultiMarginLoss()(z, y), "multi_margin_loss"),
    "F.mse_loss": (lambda z, y: F.mse_loss(z[:, 0], y), "mse_loss"),
    "F.smooth_l1_loss": (lambda z, y: F.smooth_l1_loss(z[:, 0], y), "smooth_l1_loss"),
    "difference": (lambda z, y: ((z[:, 0] - y) ** 2).mean(), "sub"),
    "product": (lambda z, y: (y * z[:, 0]).mean(), "mul"),
    "embedding": (lambda z, y: F.embedding(y, z), "embedding"),
    "nn.Embedding": (lambda z, y: nn.Embedding(K, 2)(y), "embedding"),
    "index_select": (lambda z, y: z.index_select(0, y), "index_select"),
    "where": (lambda z, y: torch.where(z[:, 0] > 0, z[:, 0], y), "where"),
    "sample by sample": (lambda z, y: torch.stack([z[n, label] for n, label in enumerate(y)]), "__getitem__"),
    "several outputs": (lambda z, y: torch.broadcast_tensors(z[:, 0], y), "broadcast_tensors"),
}


@pytest.mark.parametrize(("function", "name"), UNKNOWING.values(), ids=UNKNOWING.keys())
def test_a_gradient_from_the_dominant_labels_alone_is_refused_at_its_line(function, name):
    labels = mixed()
    condition = "used by a loss that knows mixed labels; here a gradient would come from the dominant labels alone"
    with pytest.raises(REFUSED, match=re.escape(f"MixedLabels: labels must be {condition}, got '")) as raised:
        function(logits_for(labels), labels)
    assert name in str(raised.value)
    assert all(way in str(raised.value) for way in WAYS_OUT)
    assert not labels.used


FLOAT_CASTS = {
    "float": lambda y: y.float(),
    "double": lambda y: y.double(),
    "half": lambda y: y.half(),
    "bfloat16": lambda y: y.bfloat16(),
    "to(float32)": lambda y: y.to(torch.float32),
    "to(dtype=float64)": lambda y: y.to(dtype=torch.float64),
    "to(cpu, float32)": lambda y: y.to("cpu", torch.float32),
    "to(logits)": lambda y: y.to(torch.zeros(1)),
    "to(complex64)": lambda y: y.to(torch.complex64),
    "type": lambda y: y.type(torch.float32),
    "type by name": lambda y: y.type("torch.FloatTensor"),
    "type_as": lambda y: y.type_as(torch.zeros(1)),
    "times 1.0": lambda y: y * 1.0,
    "1.0 times": lambda y: 1.0 * y,
    "divided": lambda y: y / 2,
    "1.0 minus": lambda y: 1.0 - y,
    "torch.add": lambda y: torch.add(y, 0.5),
    "to a power": lambda y: y**0.5,
    "times floats": lambda y: y * torch.ones(6),
}


@pytest.mark.parametrize("cast", FLOAT_CASTS.values(), ids=FLOAT_CASTS.keys())
def test_a_cast_to_floating_point_is_refused(cast):
    text = "MixedLabels: labels must be integers: a cast to floating point loses the mix, got '"
    with pytest.raises(REFUSED, match=re.escape(text)) as raised:
        cast(mixed())
    assert all(way in str(raised.value) for way in WAYS_OUT)


def set_item(labels):
    labels[labels == 2] = -100


def set_data(labels):
    labels.data = torch.zeros_like(labels)


IN_PLACE = {
    "[mask] =": set_item,
    "add_": lambda y: y.add_(1),
    "fill_": lambda y: y.fill_(0),
    "zero_": lambda y: y.zero_(),
    "copy_": lambda y: y.copy_(torch.zeros(6)),
    "masked_fill_": lambda y: y.masked_fill_(y == 2, -100),
    "clamp_": lambda y: y.clamp_(0, 1),
    "+=": lambda y: operator.iadd(y, 1),
    "-=": lambda y: operator.isub(y, 1),
    "*=": lambda y: operator.imul(y, 2),
    "//=": lambda y: operator.ifloordiv(y, 2),
    "|=": lambda y: operator.ior(y, 1),
    "out=": lambda y: torch.add(torch.ones(6, dtype=torch.int64), 1, out=y),
    "data =": set_data,
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE.keys())
def test_a_change_in_place_is_refused_and_changes_nothing(change):
    labels = mixed()
    before = labels.tolist()
    text = "MixedLabels: labels must be left unchanged once they are mixed, got '"
    with pytest.raises(REFUSED, match=re.escape(text)) as raised:
        change(labels)
    assert "Change them in the data set, before they are mixed, or leave label mixing out." in str(raised.value)
    assert labels.tolist() == before
    assert_mixed(labels, soft_targets(mixed(), K))


# ------------------------------------------------------------------ dense targets


@pytest.mark.parametrize("shape", [*SHAPES, ()], ids=str)
def test_soft_targets_of_integers_are_one_hot(shape):
    plain = integers(shape)
    targets = soft_targets(plain, K)
    assert targets.dtype == torch.float32
    assert torch.equal(targets.double(), one_hot(plain))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool], ids=str)
def test_soft_targets_take_any_integers(dtype):
    plain = integers().clamp(max=1).to(dtype)
    assert torch.equal(soft_targets(plain, 2).double(), one_hot(plain, 2))


@every_shape
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_soft_targets_of_mixed_labels_are_their_formula(shape, smoothing):
    first, second, share = integers(shape), integers(shape, seed=1), torch.rand(shape)
    labels = MixedLabels(first, second, share, smoothing)
    mix = share.unsqueeze(1) * one_hot(first) + (1 - share).unsqueeze(1) * one_hot(second)
    targets = soft_targets(labels, K)
    assert targets.shape == (shape[0], K, *shape[1:])
    assert_close(targets, (1 - smoothing) * mix + smoothing / K)
    assert_close(targets.sum(1), torch.ones(shape))
    assert labels.used


def test_soft_targets_of_floating_targets_are_themselves():
    for targets in (torch.rand(3, K), torch.rand(3, K, 2, 2)):
        assert soft_targets(targets, K) is targets


def test_soft_targets_of_no_labels_are_empty():
    assert soft_targets(torch.zeros(0, dtype=torch.int64), K).shape == (0, K)


@every_shape
def test_a_loss_made_of_one_hot_codes_is_that_of_the_dense_mix(shape):
    targets = soft_targets(mixed(shape, 0.1), K)
    log_p = F.log_softmax(logits_for(mixed(shape)), 1).movedim(1, -1)
    for encode in (
        lambda y: F.one_hot(y, K),
        lambda y: F.one_hot(y, K).float(),
        lambda y: F.one_hot(y, num_classes=K).to(torch.float64),
        lambda y: F.one_hot(y.long(), K).type_as(log_p),
        lambda y: F.one_hot(y.flatten().squeeze(), K).view(*y.shape, K),
        lambda y: F.one_hot(y, K) * 1.0,
        lambda y: 1 - (1 - F.one_hot(y, K)),
        lambda y: (2 * F.one_hot(y, K) - 1 + 1) / 2,
        lambda y: F.one_hot(y, K).to("cpu").long().float(),
        lambda y: torch.stack([F.one_hot(y, K), F.one_hot(y, K)]).float()[0],
        lambda y: torch.cat([F.one_hot(y, K)]).to(log_p.dtype),
    ):
        labels = mixed(shape, 0.1)
        assert_close(-(encode(labels) * log_p).sum(), dense_loss(log_p.movedim(-1, 1), targets))
        assert labels.used


def test_one_hot_codes_without_a_gradient_are_those_of_the_dominant_labels():
    labels = mixed(smoothing=0.1)
    plain = F.one_hot(torch.tensor(labels.tolist()), K)
    assert torch.equal(F.one_hot(labels, K).long(), plain)
    assert F.one_hot(labels, K).sum(0).tolist() == plain.sum(0).tolist()
    assert torch.equal(F.one_hot(labels, K) == plain, torch.ones_like(plain, dtype=torch.bool))
    with torch.no_grad():
        assert torch.equal(F.one_hot(labels, K).float(), plain.float())
    assert not labels.used


def test_a_binary_loss_made_of_one_hot_codes_by_hand_is_that_of_the_dense_mix():
    labels, p = mixed(smoothing=0.1), logits_for(mixed()).sigmoid()
    codes, dense = F.one_hot(labels, K), soft_targets(mixed(smoothing=0.1), K)
    loss = -(codes * p.log() + (1 - codes) * (1 - p).log()).mean()
    assert_close(loss, -(dense * p.log() + (1 - dense) * (1 - p).log()).mean())
    assert labels.used


def test_one_hot_codes_that_are_only_logged_are_no_use():
    labels = mixed()
    frequency = F.one_hot(labels, K).float().mean(0)
    assert_close(frequency.sum(), torch.tensor(1.0))
    assert not labels.used


def test_one_hot_codes_that_are_changed_in_place_are_plain_from_then_on():
    labels = mixed()
    codes = F.one_hot(labels, K)
    codes[0] = 0
    assert codes.float().sum().item() == len(labels) - 1
    (codes * logits_for(labels)).sum()
    assert not labels.used
    floats = F.one_hot(labels, K).float()
    floats[0] = 0
    assert_close(floats.sum(1), (torch.arange(len(labels)) > 0).float())
    codes = F.one_hot(labels, K)
    codes[:, 0].zero_()  # through a view
    assert torch.equal(codes.float(), F.one_hot(torch.tensor(labels.tolist()), K).float() * torch.tensor([0, 1, 1, 1]))


CHANGED_CODES = {
    "mul_": lambda o, y: o.mul_(0.9).add_(0.1 / K),
    "*=": lambda o, y: operator.iadd(operator.imul(o, 0.9), 0.1 / K),
    "out=": lambda o, y: torch.add(torch.mul(o, 0.9, out=o), 0.1 / K, out=o),
    "integer codes in place": lambda o, y: o.mul_(0.9).add_(0.1 / K).sub_(F.one_hot(y, K)).add_(F.one_hot(y, K)),
}


@pytest.mark.parametrize("change", CHANGED_CODES.values(), ids=CHANGED_CODES.keys())
@pytest.mark.parametrize("rebound", [True, False])
def test_floating_codes_are_changed_in_place_once(change, rebound):
    labels = mixed()
    expected = 0.9 * soft_targets(mixed(), K) + 0.1 / K
    codes = F.one_hot(labels, K).float()
    result = change(codes, labels)
    assert_close(result, expected)
    logits = logits_for(labels)
    assert not labels.used
    assert_close(F.cross_entropy(logits, result if rebound else codes), F.cross_entropy(logits, expected))
    assert labels.used


def test_floating_codes_are_changed_once_by_a_function_that_may_work_in_place():
    codes = F.one_hot(mixed(), K).float()
    assert_close(F.hardtanh(codes.sub_(0.5), 0.0, 1.0, inplace=True), (soft_targets(mixed(), K) - 0.5).clamp(0))
    assert_close(F.elu(codes.sub_(0.5), inplace=True), F.elu((soft_targets(mixed(), K) - 0.5).clamp(0) - 0.5))


def test_what_is_changed_by_codes_is_changed_once():
    labels, counts = mixed(), torch.zeros(6, K)
    counts += F.one_hot(labels, K)
    assert_close(counts, soft_targets(mixed(), K))
    whole = torch.zeros(6, K, dtype=torch.int64)
    whole += F.one_hot(labels, K)
    assert torch.equal(whole, F.one_hot(torch.tensor(labels.tolist()), K))
    with torch.no_grad():
        assert torch.equal(torch.zeros(6, K).add_(F.one_hot(labels, K)), whole.float())
    assert not labels.used
    log_p = F.log_softmax(logits_for(labels), 1)
    expected = dense_loss(logits_for(labels), soft_targets(mixed(), K))
    assert_close(-log_p.mul_(F.one_hot(labels, K)).sum(), expected)
    assert labels.used


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_targets_are_float32_whatever_the_default_is(dtype):
    """Lightning's precision="64-true", "bf16-true" and "16-true" set it."""
    expected = [soft_targets(KINDS[kind]((6,), 0), K) for kind in KINDS]
    torch.set_default_dtype(dtype)
    try:
        labels = [MixedLabels(y, y.flip(0), 0.25) for y in [integers()]]
        parameters32 = torch.linspace(0, 1, 6, dtype=torch.float32), torch.arange(6).roll(1)
        labels += [mix_labels(smooth_labels(labels[0], 0.1), *parameters32), smooth_labels(integers(), 0.1, PRIOR)]
        labels += [mix_labels(labels[1], *parameters32), torch.cat([labels[0], labels[1]])]
        targets = [soft_targets(y, K) for y in labels]
        assert {t.dtype for t in targets} == {(F.one_hot(y, K) * 1.0).dtype for y in labels} == {torch.float32}
        assert soft_targets(integers(), K).dtype == torch.float32
        losses = [F.cross_entropy(logits_for(y), y) for y in labels]
    finally:
        torch.set_default_dtype(torch.float32)
    for y, target, loss in zip(labels, targets, losses, strict=True):
        assert_close(loss, F.cross_entropy(logits_for(y), target.double()))
    assert {target.dtype for target in expected} == {torch.float32}


def test_one_hot_codes_are_pickled_as_plain_ones():
    codes = F.one_hot(mixed(), K)
    again = pickle.loads(pickle.dumps(codes))
    assert type(again) is torch.Tensor
    assert again.tolist() == codes.tolist()
    assert repr(codes) == f"MixedOneHot({codes.tolist()})"


@pytest.mark.parametrize("weight", [1.5, -0.1, float("nan")])
def test_a_weight_must_be_a_share(weight):
    with pytest.raises(ValueError, match=re.escape("MixedLabels: weight must be in [0, 1], got")):
        MixedLabels(integers(), integers(seed=1), weight)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None], ids=repr)
def test_the_number_of_classes_must_be_a_count(value):
    text = f"soft_targets: num_classes must be a whole number of at least 1, got {value!r}. Give the number of classes"
    with pytest.raises(ValueError, match=re.escape(text)):
        soft_targets(integers(), value)


@pytest.mark.parametrize("shape", [(3,), (3, K + 1), (3, 1, K)], ids=str)
def test_floating_targets_of_another_number_of_classes_are_refused(shape):
    text = f"soft_targets: labels must be of shape (N, {K}, ...), got {shape}. Give the number of classes that"
    with pytest.raises(ValueError, match=re.escape(text)):
        soft_targets(torch.rand(shape), K)


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (torch.tensor([0, K]), f"[0, {K}]"),
        (torch.tensor([-100, 1]), "[-100, 1]"),
        (MixedLabels(torch.tensor([0, 1]), torch.tensor([2, 7]), 0.5), "[2, 7]"),
    ],
    ids=repr,
)
def test_a_label_that_is_no_class_is_refused(labels, got):
    fix = "Leave out the samples to be ignored, or give the right number of classes"
    text = f"soft_targets: labels must be in [0, {K - 1}], got {got!r}. {fix}."
    with pytest.raises(ValueError, match=re.escape(text)):
        soft_targets(labels, K)


# ------------------------------------------------------------------ mixing and smoothing, in any order


def mix_dense(targets, weight, permutation):
    share = weight.double().view(-1, *[1] * (targets.dim() - 1))
    return share * targets + (1 - share) * targets[permutation]


def smooth_dense(targets, smoothing):
    return (1 - smoothing) * targets + smoothing / K


FIRST, SECOND = parameters(3, seed=1), (torch.tensor([0.2, 0.5, 0.9]), torch.tensor([2, 0, 1]))
ORDERS = {
    "mixed": [(mix_labels, mix_dense, FIRST)],
    "smoothed": [(smooth_labels, smooth_dense, (0.1,))],
    "mixed twice": [(mix_labels, mix_dense, FIRST), (mix_labels, mix_dense, SECOND)],
    "smoothed twice": [(smooth_labels, smooth_dense, (0.1,)), (smooth_labels, smooth_dense, (0.3,))],
    "mixed, smoothed": [(mix_labels, mix_dense, FIRST), (smooth_labels, smooth_dense, (0.1,))],
    "smoothed, mixed": [(smooth_labels, smooth_dense, (0.1,)), (mix_labels, mix_dense, FIRST)],
    "mixed, smoothed, mixed, smoothed": [
        (mix_labels, mix_dense, FIRST),
        (smooth_labels, smooth_dense, (0.1,)),
        (mix_labels, mix_dense, SECOND),
        (smooth_labels, smooth_dense, (0.2,)),
    ],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 2)], ids=str)
def test_transforms_of_labels_are_those_of_dense_targets(order, shape):
    plain = integers(shape)
    before, labels, targets = plain.clone(), plain, one_hot(plain)
    for own, dense, arguments in order:
        labels, targets = own(labels, *arguments), dense(targets, *arguments)
    assert_mixed(labels, targets)
    logits = logits_for(labels)
    assert_close(F.cross_entropy(logits, labels), F.cross_entropy(logits, targets))
    assert torch.equal(plain, before)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 2)], ids=str)
def test_floating_targets_are_mixed_as_numbers(shape):
    targets = torch.randn(shape, dtype=torch.float64)
    before = targets.clone()
    result = mix_labels(targets, *SECOND)
    assert type(result) is torch.Tensor
    assert_close(result, mix_dense(targets, *SECOND))
    assert torch.equal(targets, before)


def test_shares_are_float32_whatever_the_weights_are():
    for dtype in (torch.float64, torch.bfloat16):
        weight, permutation = FIRST[0].to(dtype), FIRST[1]
        labels = mix_labels(mix_labels(integers((3,)), weight, permutation), weight, permutation)
        targets = mix_dense(mix_dense(one_hot(integers((3,))), weight, permutation), weight, permutation)
        assert soft_targets(labels, K).dtype == torch.float32
        assert_mixed(labels, targets)


def test_floating_targets_cannot_be_smoothed():
    with pytest.raises(TypeError, match=re.escape("labels must be a tensor of integers, got torch.float32")):
        smooth_labels(torch.rand(3), 0.1)


def test_smoothing_smoothed_labels_checks_the_smoothing():
    text = "smooth_labels: smoothing must be in [0, 1], got 1.5. It is the share of the target spread over all classes"
    with pytest.raises(ValueError, match=re.escape(text)):
        smooth_labels(mixed(), 1.5)


# ------------------------------------------------------------------ labels of a part of the batch, and joined

PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.1])
ROWS = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.0, 1.0, 0.0, 0.0], [0.2, 0.2, 0.6, 0.0], [0.25] * 4])
KINDS = {
    "integers": lambda shape, seed: integers(shape, seed),
    "mixed": lambda shape, seed: mixed(shape, 0.0, seed),
    "smoothed": lambda shape, seed: smooth_labels(integers(shape, seed), 0.1),
    "mixed and smoothed": lambda shape, seed: mixed(shape, 0.3, seed),
    "each smoothed by itself": lambda shape, seed: smooth_labels(mixed(shape, 0.0, seed), torch.rand(shape)),
    "mixed twice": lambda shape, seed: mix_labels(mixed(shape, 0.0, seed), *parameters(shape[0], seed + 1)),
    "on a prior": lambda shape, seed: smooth_labels(mixed(shape, 0.0, seed), 0.2, PRIOR),
}
several_kinds = [(a, b) for a in KINDS for b in KINDS if {a, b} <= {"integers", "mixed", "on a prior"} or
                 "on a prior" not in (a, b)]  # fmt: skip
every_pair = pytest.mark.parametrize(("first", "second"), several_kinds)


@every_pair
@pytest.mark.parametrize("shape", [(5,), (5, 2, 3)], ids=str)
def test_labels_of_some_samples_can_be_replaced(first, second, shape):
    labels, part = KINDS[first](shape, 0), KINDS[second]((2, *shape[1:]), 1)
    index = torch.tensor([3, 1])
    expected = soft_targets(labels, K).clone()
    expected[index] = soft_targets(part, K)
    plain = torch.tensor(labels.tolist())
    result = put_labels(labels, index, part)
    assert_close(soft_targets(result, K), expected)
    assert labels.tolist() == plain.tolist()
    plain[index] = torch.tensor(part.tolist())
    assert result.tolist() == plain.tolist()
    assert type(result) is (torch.Tensor if first == second == "integers" else MixedLabels)
    logits = logits_for(result)
    assert_close(F.cross_entropy(logits, result, reduction="sum"), dense_loss(logits, expected))


def test_parts_that_were_transformed_alike_keep_one_smoothing():
    labels = put_labels(mixed(smoothing=0.1), torch.tensor([0, 2]), smooth_labels(integers((2,)), 0.1))
    assert labels.smoothing == 0.1
    assert len(labels.components) == 2


def test_floating_labels_of_some_samples_can_be_replaced():
    labels = torch.rand(4, K)
    result = put_labels(labels, torch.tensor([2]), torch.ones(1, K))
    assert result[2].tolist() == [1.0] * K
    assert torch.equal(result[[0, 1, 3]], labels[[0, 1, 3]])
    assert labels[2].tolist() != [1.0] * K


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_some_samples_can_be_taken_with_gradients_and_without(kind):
    labels, index = KINDS[kind]((5, 2), 0), torch.tensor([3, 1, 3])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            part = take_labels(labels, index)
            again = put_labels(labels, index[:2], take_labels(labels, index[:2]))
        assert type(part) is type(labels)
        assert part.tolist() == [labels.tolist()[n] for n in index]
        assert_close(soft_targets(part, K), soft_targets(labels, K)[index])
        assert_close(soft_targets(again, K), soft_targets(labels, K))


def test_floating_labels_of_some_samples_can_be_taken_and_use_of_those_taken_is_a_use():
    targets = torch.rand(4, K)
    assert torch.equal(take_labels(targets, torch.tensor([2, 0])), targets[[2, 0]])
    labels = mixed()
    part = take_labels(labels, torch.tensor([2, 0]))
    F.cross_entropy(logits_for(part), part)
    assert labels.used


def test_use_of_replaced_labels_is_a_use_of_both():
    labels, part = mixed(), mixed((2,))
    result = put_labels(labels, torch.tensor([0, 1]), part)
    assert not result.used
    F.cross_entropy(logits_for(result), result)
    assert result.used
    assert labels.used
    assert part.used


def test_a_part_must_fit_its_place():
    text = "put_labels: part must be labels like the others, torch.int64, got torch.float32. Transform all samples"
    with pytest.raises(TypeError, match=re.escape(text)):
        put_labels(integers(), torch.tensor([0]), torch.rand(1))
    text = "put_labels: part must be of shape (2,), got (1,). Give a label for each sample of the index."
    with pytest.raises(ValueError, match=re.escape(text)):
        put_labels(mixed(), torch.tensor([0, 1]), mixed((1,)))


@pytest.mark.parametrize("join", [put_labels, lambda a, i, b: torch.cat([a, b])], ids=["put_labels", "torch.cat"])
def test_priors_that_differ_within_a_batch_are_refused(join):
    labels = smooth_labels(integers(), 0.1)
    for prior in (PRIOR, ROWS):
        part = smooth_labels(integers((1,)), 0.1, prior)
        with pytest.raises(ValueError, match="prior must be the same for all labels of a batch, got .*Give every"):
            join(labels, torch.tensor([0]), part)
        join(mixed(), torch.tensor([0]), part)  # what is not smoothed has no prior
        join(part, torch.tensor([0]), smooth_labels(integers((1,)), 0.1, prior.clone()))


JOINS = {
    "torch.cat": torch.cat,
    "torch.cat by name": lambda parts: torch.cat(tensors=parts, dim=0),
    "torch.concat": torch.concat,
    "torch.stack": torch.stack,
    "torch.stack at the end": lambda parts: torch.stack(parts, dim=-1),
    "torch.hstack": torch.hstack,
}


@every_pair
@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS.keys())
def test_joined_labels_keep_the_mix(first, second, join):
    parts = [KINDS[first]((4, 3), 0), KINDS[second]((4, 3), 1)]
    planes_of = [soft_targets(part, K).unbind(1) for part in parts]
    result = join(parts)
    expected = torch.stack([join(list(pair)) for pair in zip(*planes_of, strict=True)], dim=1)
    assert_close(soft_targets(result, K), expected)
    assert result.tolist() == join([torch.tensor(part.tolist()) for part in parts]).tolist()


def test_use_of_joined_labels_is_a_use_of_each():
    first, second = mixed(), mixed((3,))
    both = torch.cat([first, integers((2,)), second])
    F.cross_entropy(logits_for(both[:1]), both[:1])
    assert first.used
    assert second.used
    assert not mixed().used


def test_joined_with_floats_or_without_gradients_labels_are_plain():
    with torch.no_grad():
        assert type(torch.cat([mixed(), mixed()])) is torch.Tensor
    assert type(torch.cat([mixed(), torch.rand(2)])) is torch.Tensor


# ------------------------------------------------------------------ smoothing of each sample, priors, many mixings


@pytest.mark.parametrize("prior", [None, PRIOR], ids=["even", "prior"])
def test_samples_of_different_smoothing_are_mixed_exactly(prior):
    plain, epsilon = integers(), torch.tensor([0.0, 0.1, 0.2, 0.5, 1.0, 0.3])
    spread = torch.full((K,), 1 / K) if prior is None else prior
    targets = (1 - epsilon.double())[:, None] * one_hot(plain) + epsilon.double()[:, None] * spread
    labels = mix_labels(smooth_labels(plain, epsilon, prior), *parameters(6))
    targets = mix_dense(targets, *parameters(6))
    assert_mixed(labels, targets)
    labels, targets = smooth_labels(labels, 0.1, prior), 0.9 * targets + 0.1 * spread
    assert_mixed(labels, targets)
    assert_mixed(labels[2:].view(2, 2).flatten(), targets[2:])
    logits = logits_for(plain)
    assert_close(F.cross_entropy(logits, labels), F.cross_entropy(logits, targets))
    expected = F.cross_entropy(logits, targets, label_smoothing=0.3)
    assert_close(F.cross_entropy(logits, labels, label_smoothing=0.3), expected)
    assert_close(F.nll_loss(F.log_softmax(logits, 1), labels), F.cross_entropy(logits, targets))


def test_rows_are_a_matrix_that_the_targets_are_multiplied_with():
    plain = mixed()
    targets = soft_targets(plain, K)
    assert_mixed(smooth_labels(plain, 1.0, ROWS), targets @ ROWS)
    labels = smooth_labels(plain, 0.3, ROWS)
    assert_mixed(labels, 0.7 * targets + 0.3 * targets @ ROWS)
    assert_mixed(mix_labels(labels, *parameters(6, 4)), mix_dense(soft_targets(labels, K), *parameters(6, 4)))
    logits = logits_for(plain)
    assert_close(F.cross_entropy(logits, labels), F.cross_entropy(logits, soft_targets(labels, K).double()))


def test_smoothing_with_another_prior_is_refused():
    for before, after in ((None, PRIOR), (PRIOR, None), (PRIOR, PRIOR.flip(0)), (ROWS, ROWS)):
        labels = smooth_labels(integers(), 0.1, before)
        with pytest.raises(ValueError, match="prior must be the same .* prior as before.*Smooth once"):
            smooth_labels(labels, 0.1, after)
    assert smooth_labels(smooth_labels(integers(), 0.5, PRIOR), 0.5, PRIOR.clone()).smoothing == 0.75


@pytest.mark.parametrize("prior", [PRIOR, ROWS], ids=["prior", "rows"])
def test_labels_mixed_twice_are_not_smoothed_and_may_be(prior):
    labels = mix_labels(mixed(), *parameters(6, 1))
    targets = soft_targets(labels, K)
    assert labels.smoothing == 0.0
    assert repr(labels).endswith("smoothing=0.0)")
    spread = targets @ prior if prior.dim() == 2 else prior
    assert_mixed(smooth_labels(labels, 0.2, prior), 0.8 * targets + 0.2 * spread)
    labels = mix_labels(mix_labels(smooth_labels(mixed(), 0.1), *parameters(6)), *parameters(6, 1))
    assert labels.smoothing == 0.1


def test_a_smoothing_of_zeros_is_none():
    labels = smooth_labels(integers(), torch.tensor([0.0, 0.1, 0.0, 0.0, 0.0, 0.0]))
    some = smooth_labels(labels[2:], 0.2, PRIOR)
    assert_mixed(some, 0.8 * one_hot(integers()[2:]) + 0.2 * PRIOR)
    with pytest.raises(ValueError, match="prior must be the same"):
        smooth_labels(labels, 0.2, PRIOR)


@pytest.mark.parametrize("times", [3, 4, 6])
def test_labels_mixed_many_times_stay_exact_with_few_components(times):
    labels, targets = smooth_labels(integers((40,)), torch.rand(40)), None
    targets = soft_targets(labels, K).double()
    for seed in range(times):
        labels, targets = mix_labels(labels, *parameters(40, seed)), mix_dense(targets, *parameters(40, seed))
    assert_mixed(labels, targets)
    assert len(labels.components) <= 8  # 2 ** times without merging; four mixings leave K = 4, and go on from there
    logits = logits_for(labels)
    assert_close(F.cross_entropy(logits, labels), F.cross_entropy(logits, targets))
    assert labels.tolist() == labels.long().tolist()


def test_moved_labels_keep_the_smoothing_of_each():
    labels = smooth_labels(mixed((2, 2, 3)), torch.rand(2, 2, 3), PRIOR)
    moved = move_labels(labels, lambda part, fill: part.flip(-1), -100)
    assert_mixed(moved, soft_targets(labels, K).flip(-1))


def test_the_representation_shows_a_smoothing_of_each_and_a_prior():
    labels = smooth_labels(torch.tensor([2, 0]), torch.tensor([0.5, 0.25]), PRIOR)
    expected = "MixedLabels([2, 0], components=1, smoothing=[0.5, 0.25], prior=a tensor of shape (4,))"
    assert repr(labels) == expected


@pytest.mark.parametrize("prior", [PRIOR, ROWS], ids=["prior", "rows"])
def test_copies_and_one_hot_codes_know_the_prior(prior):
    labels = smooth_labels(mixed(), torch.rand(6), prior)
    targets = soft_targets(labels, K)
    for again in (pickle.loads(pickle.dumps(labels)), copy.deepcopy(labels), copy.copy(labels), labels.cpu().int()):
        assert_mixed(again, targets)
    assert_close(F.one_hot(labels, K) * 1.0, targets)


def test_labels_load_with_weights_only():
    file = io.BytesIO()
    torch.save(smooth_labels(mixed(), torch.rand(6), PRIOR), file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)) is MixedLabels


@pytest.mark.parametrize("prior", [None, PRIOR, ROWS], ids=["even", "prior", "rows"])
def test_compiled_the_loss_of_any_labels_breaks_no_graph(prior):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    labels = smooth_labels(mixed((4, 3)), torch.rand(4, 3), prior)

    def step(z, y):
        both = torch.cat([y, y.flip(0)])
        return F.cross_entropy(torch.cat([z, z]), both) + F.nll_loss(F.log_softmax(z, 1), y.view(4, 3))

    logits = logits_for(labels)
    actual = torch.compile(step, backend="aot_eager", fullgraph=True)(logits, labels)
    expected = step(logits, labels)
    assert_close(actual, expected, tolerance=1e-12)
    assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (actual, expected)), tolerance=1e-12)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_loss_made_of_one_hot_codes_breaks_no_graph():
    torch._dynamo.reset()
    labels = mixed((6,), 0.1)

    def encode(y):
        return F.one_hot(y, K)

    def loss(z, codes):
        return -(codes * F.log_softmax(z, 1)).sum()

    logits, compiled = logits_for(labels), {"backend": "aot_eager", "fullgraph": True}
    expected = dense_loss(logits, soft_targets(mixed((6,), 0.1), K))
    assert_close(torch.compile(lambda z, y: loss(z, encode(y)), **compiled)(logits, labels), expected)
    assert labels.used
    torch._dynamo.reset()
    assert_close(loss(logits, torch.compile(encode, **compiled)(mixed((6,), 0.1))), expected)


def test_dense_targets_are_made_in_a_compiled_graph():
    torch._dynamo.reset()
    labels = mixed((4, 3), 0.1)
    compiled = torch.compile(lambda y: soft_targets(y, K), backend="aot_eager", fullgraph=True)
    assert_close(compiled(labels), soft_targets(labels, K))


@pytest.mark.parametrize("shape", [(3, 2), (5,), (1, 6), ()], ids=str)
def test_labels_of_another_shape_than_the_logits_are_refused(shape):
    text = f"F.cross_entropy: labels must be of shape (6,), got {shape}. Give a label for each sample, or"
    with pytest.raises(ValueError, match=re.escape(text)):
        F.cross_entropy(torch.zeros(6, K), mixed(shape) if shape else mixed()[0])


# ------------------------------------------------------------------ the dominant label


def test_the_dominant_label_has_the_larger_share_and_ties_go_to_the_original():
    labels = MixedLabels(torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1]), torch.tensor([0.75, 0.5, 0.25]))
    assert labels.tolist() == [0, 0, 1]
    assert smooth_labels(labels, 0.5).tolist() == [0, 0, 1]


@pytest.mark.parametrize("seed", range(2))
def test_the_dominant_label_of_labels_mixed_twice_is_the_class_with_the_largest_share(seed):
    labels = mix_labels(mix_labels(integers((50,)), *parameters(50, seed)), *parameters(50, seed + 10))
    assert labels.tolist() == soft_targets(labels, K).argmax(1).tolist()


# ------------------------------------------------------------------ used


def test_a_metric_does_not_use_labels_and_a_loss_does():
    labels = mixed()
    assert not labels.used
    assert bool((labels == labels).all())
    assert not labels.used
    F.cross_entropy(logits_for(labels), labels)
    assert labels.used


@pytest.mark.parametrize(
    "derive",
    [
        lambda y: y[:3],
        lambda y: y.unbind(0)[1].unsqueeze(0),
        lambda y: y.view(-1).long().clone(),
        lambda y: y.split(2)[0],
        lambda y: mix_labels(y, *parameters(6)),
        lambda y: smooth_labels(y, 0.1),
        lambda y: smooth_labels(mix_labels(y[:4], *parameters(4)), 0.1).to("cpu"),
    ],
)
def test_use_is_shared_by_slices_and_later_transforms(derive):
    labels = mixed()
    derived = derive(labels)
    F.nll_loss(torch.zeros(len(derived), K, requires_grad=True), derived)
    assert labels.used
    assert derived.used
    assert not mixed().used


def test_dense_targets_are_a_use():
    labels = mixed()
    soft_targets(labels, K)
    assert labels.used


# ------------------------------------------------------------------ copies


def saved(labels):
    file = io.BytesIO()
    torch.save(labels, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [lambda y: pickle.loads(pickle.dumps(y)), copy.deepcopy, copy.copy, saved, lambda y: y.clone()]
)
def test_a_copy_stands_for_the_same_targets(duplicate):
    labels = mixed((4, 3), 0.1)
    again = duplicate(labels)
    assert again.tolist() == labels.tolist()
    assert again.smoothing == labels.smoothing
    assert_mixed(again, soft_targets(labels, K))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_use_of_a_copy_is_a_use(duplicate):
    labels = mixed()
    F.cross_entropy(logits_for(labels).requires_grad_(), duplicate(labels))
    assert labels.used


def test_a_loss_without_a_gradient_is_no_use():
    """It is logged beside another one, from which the training comes."""
    labels = mixed()
    F.cross_entropy(logits_for(labels).detach(), labels)
    with torch.no_grad():
        F.nll_loss(logits_for(labels).requires_grad_(), labels)
    assert not labels.used


def test_a_deep_copy_shares_no_memory():
    labels = mixed()
    again = copy.deepcopy(labels)
    addresses = [{t.data_ptr() for part in y.components for t in part} for y in (labels, again)]
    assert not addresses[0] & addresses[1]


# ------------------------------------------------------------------ compiled and autocast


def loss_of(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_compiled_loss_is_the_same_number(smoothing):
    torch._dynamo.reset()
    labels = mixed((4, 3), smoothing)
    logits = logits_for(labels)
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    actual = compiled(logits, labels)
    assert labels.used
    assert_close(actual, loss_of(logits, labels), tolerance=1e-12)
    (gradient,) = torch.autograd.grad(actual, logits)
    (expected,) = torch.autograd.grad(loss_of(logits, labels), logits)
    assert_close(gradient, expected, tolerance=1e-12)


def test_a_compiled_loss_follows_the_mix_of_each_batch():
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        labels = mixed(seed=seed)
        assert_close(compiled(logits_for(labels), labels), loss_of(logits_for(labels), labels), tolerance=1e-12)
        assert labels.used


def test_a_compiled_loss_breaks_no_graph():
    torch._dynamo.reset()
    labels = mixed()
    assert torch._dynamo.explain(F.cross_entropy)(logits_for(labels), labels).graph_break_count == 0
    assert labels.used


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace", "ignore:The .grad attribute of a Tensor")
def test_a_compiled_training_step_is_the_same():
    def step(logits, labels):
        accuracy = (logits.argmax(1) == labels).double().mean()
        return F.cross_entropy(logits.movedim(1, -1).reshape(-1, K), labels.reshape(-1).long()), accuracy

    torch._dynamo.reset()
    labels = mixed((4, 3))
    logits = logits_for(labels)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(logits, labels), step(logits, labels), strict=True):
        assert_close(actual, expected, tolerance=1e-12)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace", "ignore:The .grad attribute of a Tensor")
def test_a_compiled_loss_that_does_not_know_the_mix_does_not_pass_for_one_that_does():
    torch._dynamo.reset()
    labels = mixed()
    with contextlib.suppress(*REFUSED):
        torch.compile(focal_loss, backend="aot_eager")(logits_for(labels), labels)
    assert not labels.used


@pytest.mark.parametrize("loss", ["F.cross_entropy", "F.nll_loss", "LabelSmoothingCrossEntropy"])
@weighted_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_an_unmixed_batch_keeps_the_users_loss(loss, weight, dtype):
    plain, loss = integers(), LOSSES[loss]
    logits, weight = logits_for(plain, dtype), None if weight is None else weight.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = loss(logits, plain, weight=weight), loss(logits, MixedLabels(plain), weight=weight)
    assert actual.dtype == expected.dtype == torch.float32
    assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_a_mixed_loss_is_computed_in_float32(dtype):
    labels = mixed((200,), 0.1)
    logits = logits_for(labels, dtype)
    log_p = F.log_softmax(logits.double(), 1).to(dtype)
    expected = -(soft_targets(labels, K) * log_p.double()).sum() / len(labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for actual, wanted in (
            (F.cross_entropy(logits, labels), loss_by_loop(logits, labels)),
            (F.nll_loss(log_p, labels), expected),
        ):
            assert actual.dtype == torch.float32
            assert_close(actual, wanted, tolerance=1e-5)


# ------------------------------------------------------------------ arguments


def test_one_weight_or_one_for_each_label_is_understood():
    first, second = integers((3, 2)), integers((3, 2), seed=1)
    for weight in (0.3, torch.tensor(0.3), torch.tensor([[0.2], [0.5], [0.9]]), torch.rand(3, 2, dtype=torch.float64)):
        share = torch.as_tensor(weight, dtype=torch.float64).expand(3, 2).unsqueeze(1)
        assert_mixed(MixedLabels(first, second, weight), share * one_hot(first) + (1 - share) * one_hot(second))


def test_labels_that_are_mixed_already_are_no_plain_ones():
    for arguments in ((mixed(),), (integers(), mixed(), 0.5)):
        with pytest.raises(TypeError, match="must be a tensor of integers, got .*MixedLabels.*mix_labels"):
            MixedLabels(*arguments)


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (torch.rand(3), "torch.float32"),
        (torch.zeros(3, dtype=torch.complex64), "torch.complex64"),
        ([0, 1, 2], "<class 'list'>"),
        (None, "<class 'NoneType'>"),
    ],
    ids=["floats", "complex", "list", "None"],
)
def test_labels_must_be_a_tensor_of_integers(labels, got):
    text = f"must be a tensor of integers, got {got}. Floating targets are mixed as numbers; labels that"
    with pytest.raises(TypeError, match=re.escape(f"MixedLabels: labels {text}")):
        MixedLabels(labels)
    if labels is not None:
        with pytest.raises(TypeError, match=re.escape(f"MixedLabels: partner {text}")):
            MixedLabels(torch.tensor([0, 1, 2]), labels)


def test_the_partner_must_have_the_shape_of_the_labels():
    text = "MixedLabels: partner must be of shape (3,), got (2,). Take labels[permutation]."
    with pytest.raises(ValueError, match=re.escape(text)):
        MixedLabels(torch.tensor([0, 1, 2]), torch.tensor([0, 1]))


def test_the_weight_must_fit_the_labels():
    text = "MixedLabels: weight must be of shape (2, 3), got (2,). Give (N,) weights, with a dimension of 1 for each"
    with pytest.raises(ValueError, match=re.escape(text)):
        MixedLabels(integers((2, 3)), integers((2, 3)), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(
    ("value", "error"),
    [*((v, ValueError) for v in (-0.1, 1.5, math.nan, math.inf)), *((v, TypeError) for v in (True, "0.1", None))],
    ids=repr,
)
@pytest.mark.parametrize(
    ("make", "owner"),
    [
        (lambda s: MixedLabels(torch.tensor([0]), smoothing=s), "MixedLabels"),
        (lambda s: smooth_labels(torch.tensor([0]), s), "MixedLabels"),
        (lambda s: check_smoothing("Owner", s), "Owner"),
    ],
    ids=["MixedLabels", "smooth_labels", "check_smoothing"],
)
def test_the_smoothing_must_be_a_share(make, owner, value, error):
    kind = "a number " if error is TypeError else ""
    text = f"{owner}: smoothing must be {kind}in [0, 1], got {value!r}. It is the share of the target spread over all"
    with pytest.raises(error, match=re.escape(text)):
        make(value)
