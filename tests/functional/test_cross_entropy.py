"""The cross-entropy of mixes and of dense targets, beside explicit loops and torch's own."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tricks.functional import cross_entropy as module
from lightning_tricks.functional.components import Component, changed, dense, dominant, joined, merged
from lightning_tricks.functional.cross_entropy import mixed_cross_entropy, mixed_nll, soft_cross_entropy

K = 4
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
ROWS = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.0, 1.0, 0.0, 0.0], [0.2, 0.2, 0.6, 0.0], [0.25] * 4])
PRIORS = {"even": None, "prior": torch.tensor([0.5, 0.3, 0.2, 0.0]), "rows": ROWS}
every_prior = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS.keys())
every_shape = pytest.mark.parametrize("shape", [(5,), (3, 2), (2, 2, 3)], ids=str)
every_weight = pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@pytest.fixture(params=[1, 1 << 18], ids=["a row at a time", "at once"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", request.param)


def mix(shape=(5,), count=3, smoothing="each", ignored=-100):
    """Components with shares that add up to 1, each with a smoothing of its own, one label of them ignored."""
    shares = torch.rand(count, *shape).add(0.1)
    shares = shares / shares.sum(0)
    result = []
    for share in shares:
        labels = torch.randint(K, shape)
        epsilon = torch.rand(shape) if smoothing == "each" else smoothing
        result.append(Component(labels, share, epsilon))
    result[0].labels.view(-1)[0] = ignored
    return result


def logits_of(shape=(5,), dtype=torch.float64):
    return torch.randn(shape[0], K, *shape[1:], dtype=torch.float64).to(dtype).requires_grad_()


def loss_by_loop(logits, components, smoothing=0.0, weight=None, ignore_index=-100, reduction="mean", prior=None):
    rows = logits.detach().movedim(1, -1).reshape(-1, K).tolist()
    w = [1.0] * K if weight is None else weight.tolist()
    losses, total = [], 0.0
    for n, row in enumerate(rows):
        log_sum = math.log(sum(math.exp(x) for x in row))
        loss = 0.0
        for labels, share, epsilon in components:
            label, part = labels.flatten()[n].item(), share.flatten()[n].item()
            if label == ignore_index:
                continue
            total += part * w[label]
            own = epsilon.flatten()[n].item() if isinstance(epsilon, torch.Tensor) else epsilon
            spread = [1 / K] * K if prior is None else (prior if prior.dim() == 1 else prior[label]).tolist()
            for c in range(K):
                target = (1 - own) * (c == label) + own * spread[c]
                target = (1 - smoothing) * target + smoothing / K
                loss -= part * target * w[c] * (row[c] - log_sum)
        losses.append(loss)
    if reduction == "none":
        return torch.tensor(losses, dtype=torch.float64).view(components[0][0].shape)
    return torch.tensor(math.fsum(losses) / (total if reduction == "mean" else 1), dtype=torch.float64)


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


# ------------------------------------------------------------------ mixes


@every_shape
@every_prior
@every_weight
@every_reduction
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_a_loss_is_its_formula(shape, prior, weight, reduction, ignore_index, chunk):
    for smoothing in (0.0, 0.2):
        for own in ("each", 0.0, 0.3):
            components, logits = mix(shape, smoothing=own, ignored=ignore_index), logits_of(shape)
            options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "prior": prior}
            expected = loss_by_loop(logits, components, smoothing, **options)
            close(mixed_cross_entropy(logits, components, smoothing, **options).detach(), expected)
            close(mixed_nll(logits.log_softmax(1), components, smoothing, **options).detach(), expected)


@every_shape
@every_prior
@every_weight
def test_a_gradient_by_hand_is_that_of_autograd(shape, prior, weight, chunk):
    components, logits = mix(shape), logits_of(shape)
    scale = torch.rand(shape, dtype=torch.float64)
    options = {"smoothing": 0.1, "weight": weight, "reduction": "none", "prior": prior}
    (actual,) = torch.autograd.grad(mixed_cross_entropy(logits, components, **options), logits, scale)
    (expected,) = torch.autograd.grad(mixed_nll(logits.log_softmax(1), components, **options), logits, scale)
    close(actual, expected, 1e-12)


@every_prior
@every_weight
def test_first_and_second_gradients_are_those_of_finite_differences(prior, weight):
    components, logits = mix((3,)), logits_of((3,))

    def loss(z):
        return mixed_cross_entropy(z, components, 0.1, weight, prior=prior)

    assert torch.autograd.gradcheck(loss, (logits,))
    assert torch.autograd.gradgradcheck(loss, (logits,))


def test_a_gradient_penalty_trains_as_with_torchs_own_operations(chunk):
    components, logits = mix(), logits_of()
    penalties = []
    for loss in (mixed_cross_entropy(logits, components), mixed_nll(logits.log_softmax(1), components)):
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        penalties.append(torch.autograd.grad(loss + first.square().sum(), logits)[0])
    close(*penalties, 1e-12)


def test_the_same_graph_gives_its_gradient_again(chunk):
    logits, components = logits_of(), mix()
    loss = mixed_cross_entropy(logits, components)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0].clone()
    again = torch.autograd.grad(3 * loss, logits, retain_graph=True)[0]
    close(again, 3 * first, 1e-12)
    loss.backward()
    loss_of_others = mixed_cross_entropy(logits, components)
    loss_of_others.backward()
    close(logits.grad, 2 * first, 1e-12)


def test_logits_may_be_changed_after_the_loss_as_after_torchs(chunk):
    leaf, components = logits_of(), mix()
    (expected,) = torch.autograd.grad(mixed_cross_entropy(leaf, components), leaf)
    logits = leaf * 1
    loss = mixed_cross_entropy(logits, components)
    logits.mul_(2)
    (actual,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("case", ["coarse", "second gradient", "dense", "dense targets"])
def test_changes_after_the_loss_that_would_matter_are_noticed(case):
    leaf = logits_of(dtype=torch.bfloat16 if case == "coarse" else torch.float64)
    logits, targets = leaf * 1, torch.rand(5, K, dtype=torch.float64).softmax(1)
    loss = soft_cross_entropy(logits, targets) if case[:5] == "dense" else mixed_cross_entropy(logits, mix())
    if case == "second gradient":
        torch.autograd.grad(loss, leaf, retain_graph=True)
    (targets if case == "dense targets" else logits).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Largest(TorchDispatchMode):
    """Counts the tensors of at least so many numbers that operations make in memory of their own."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.made = numbers, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in [result] if isinstance(result, torch.Tensor) else []:
            storage = tensor.untyped_storage()
            outs = [v for v in (kwargs or {}).values() if isinstance(v, torch.Tensor)]
            own = storage.data_ptr() not in before | {v.untyped_storage().data_ptr() for v in outs}
            if own and storage.nbytes() >= self.numbers * tensor.element_size():
                self.made.append(func.__name__)
        return result


def test_only_the_gradient_is_as_large_as_the_logits(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 20 * K)
    for logits in (logits_of((200,)), logits_of((200,), torch.bfloat16), logits_of((200,), torch.float32).detach()):
        components = mix((200,), smoothing=0.1)
        with Largest(logits.numel()) as large:
            loss = mixed_cross_entropy(logits, components)
            if logits.requires_grad:
                torch.autograd.grad(loss, logits)
        assert len(large.made) == int(logits.requires_grad), large.made


def test_a_class_without_a_share_may_be_impossible(chunk):
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0]] * 3, dtype=torch.float64, requires_grad=True)
    labels, other = torch.tensor([0, 1, 3]), torch.tensor([2, 2, 2])
    share = torch.ones(3)
    expected = F.cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(expected, logits)
    prior = torch.tensor([0.5, 0.5, 0.0, 0.0])
    for components in (
        [Component(labels, share)],
        [Component(labels, share), Component(other, 0 * share)],
        [Component(labels, share, torch.zeros(3))],
    ):
        for loss in (
            mixed_cross_entropy(logits, components),
            mixed_cross_entropy(logits, components, prior=prior),
            mixed_nll(logits.log_softmax(1), components),
        ):
            close(loss.detach(), expected.detach())
            close(torch.autograd.grad(loss, logits)[0], gradient)
    smoothed = [Component(labels, share, 0.2)]
    assert mixed_cross_entropy(logits, smoothed, prior=prior).isfinite()
    assert mixed_cross_entropy(logits, smoothed).item() == math.inf


def test_logits_far_from_zero_lose_nothing():
    logits = torch.tensor([[1e4, 1e4 + 1, 1e4 - 2, 1e4 - 30]], requires_grad=True)
    components = [Component(torch.tensor([1]), torch.ones(1), 0.1)]
    expected = F.cross_entropy(logits, torch.tensor([1]), label_smoothing=0.1)
    close(mixed_cross_entropy(logits, components).detach(), expected.detach(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_gradient_has_the_dtype_of_the_logits_and_is_as_fine_as_it_can_be(dtype, chunk):
    components = mix((40,), smoothing=0.1)
    logits = logits_of((40,), dtype)
    exact = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(mixed_cross_entropy(exact, components, reduction="sum"), exact)
    (actual,) = torch.autograd.grad(mixed_cross_entropy(logits, components, reduction="sum"), logits)
    assert actual.dtype == dtype
    close(actual, expected, 2 * torch.finfo(dtype).eps)


def test_under_autocast_a_loss_of_coarse_logits_is_fine_and_so_is_its_gradient():
    components = mix((40,), smoothing=0.1)
    logits = logits_of((40,), torch.bfloat16)
    exact = logits.detach().double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mixed_cross_entropy(logits, components)
        soft = soft_cross_entropy(logits, dense([c._replace(labels=c.labels.clamp(0)) for c in components], K))
    assert loss.dtype == soft.dtype == torch.float32
    close(loss.detach(), mixed_cross_entropy(exact, components))
    assert torch.autograd.grad(loss, logits)[0].dtype == torch.bfloat16


def test_any_layout_of_the_logits_will_do(chunk):
    components = mix((2, 3, 5))
    logits = logits_of((2, 3, 5)).detach()
    expected = mixed_cross_entropy(logits, components)
    for other in (
        logits.contiguous(memory_format=torch.channels_last),
        logits.movedim(1, -1).contiguous().movedim(-1, 1),
        torch.stack([logits, logits], -1)[..., 0],
    ):
        own = other.requires_grad_()
        loss = mixed_cross_entropy(own, components)
        close(loss.detach(), expected, 1e-12)
        plain = logits.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(mixed_nll(plain.log_softmax(1), components), plain)
        close(torch.autograd.grad(loss, own)[0], wanted, 1e-12)


def test_a_batch_of_no_samples_is_torchs():
    logits, labels = torch.zeros(0, K, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(logits, labels, reduction=reduction)
        actual = mixed_cross_entropy(logits, [Component(labels, torch.zeros(0))], reduction=reduction)
        close(actual.detach(), expected.detach())
        assert torch.autograd.grad(actual.sum(), logits)[0].shape == (0, K)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, as it makes forward formulas
def test_function_transforms_and_forward_mode_have_the_same_numbers():
    components, logits = mix(), logits_of()
    (expected,) = torch.autograd.grad(mixed_cross_entropy(logits, components), logits)
    close(torch.func.grad(lambda z: mixed_cross_entropy(z, components))(logits.detach()), expected, 1e-12)
    tangent = torch.randn_like(logits)
    _, slope = torch.func.jvp(lambda z: mixed_cross_entropy(z, components), (logits.detach(),), (tangent,))
    close(slope, (expected * tangent).sum(), 1e-12)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits.detach(), tangent)
        close(forward_ad.unpack_dual(mixed_cross_entropy(dual, components)).tangent, slope, 1e-12)
    several = torch.stack([logits.detach(), 2 * logits.detach()])
    losses = torch.func.vmap(lambda z: mixed_cross_entropy(z, components))(several)
    close(losses, torch.stack([mixed_cross_entropy(z, components) for z in several]), 1e-12)


def test_class_weights_that_are_learnt_have_their_gradient():
    components, logits = mix(), logits_of().detach()
    weight = WEIGHT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: mixed_cross_entropy(logits, components, 0.1, w), (weight,))


def test_a_prior_of_other_classes_is_refused():
    text = "F.cross_entropy: prior must be of 4 classes, got 3. Give LabelSmoothing a prior with one number for each"
    with pytest.raises(ValueError, match=re.escape(text)):
        mixed_cross_entropy(logits_of(), mix(), prior=torch.tensor([0.5, 0.3, 0.2]))


@pytest.mark.parametrize("shape", [(K + 1,), (3, 2), (1,), ()], ids=str)
def test_class_weights_of_other_classes_are_refused(shape):
    got = f"F.cross_entropy: weight must be of shape (4,), a number for each class that the logits have, got {shape}."
    weight, logits = torch.ones(shape), logits_of()
    for loss, target in (
        (mixed_cross_entropy, mix()),
        (mixed_nll, mix()),
        (soft_cross_entropy, torch.rand_like(logits)),
    ):
        with pytest.raises(ValueError, match=re.escape(got)):
            loss(logits, target, weight=weight)


# ------------------------------------------------------------------ dense targets


def soft_by_loop(logits, targets, smoothing=0.0, weight=None, ignore_index=-100, reduction="mean"):
    rows, wanted = (t.detach().movedim(1, -1).reshape(-1, K).tolist() for t in (logits, targets))
    w = [1.0] * K if weight is None else weight.tolist()
    losses, total = [], 0.0
    for row, target in zip(rows, wanted, strict=True):
        log_sum = math.log(sum(math.exp(x) for x in row))
        valid = [t if c != ignore_index else 0.0 for c, t in enumerate(target)]
        total += sum(t * v for t, v in zip(valid, w, strict=True))
        smoothed = [(1 - smoothing) * t + smoothing / K * sum(valid) for t in valid]
        losses.append(-sum(t * v * (x - log_sum) for t, v, x in zip(smoothed, w, row, strict=True)))
    if reduction == "none":
        return torch.tensor(losses, dtype=torch.float64).view(targets.shape[:1] + targets.shape[2:])
    return torch.tensor(math.fsum(losses) / (total if reduction == "mean" else 1), dtype=torch.float64)


@every_shape
@every_weight
@every_reduction
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_dense_loss_is_its_formula(shape, weight, reduction, ignore_index, smoothing, chunk):
    logits = logits_of(shape)
    targets = torch.rand_like(logits).softmax(1)
    targets[0] = 0  # ignored
    options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
    actual = soft_cross_entropy(logits, targets, smoothing, **options)
    close(actual.detach(), soft_by_loop(logits, targets, smoothing, **options), 1e-12)
    plain = F.log_softmax(logits, 1)
    masked = targets.clone()
    if ignore_index == 2:
        masked[:, 2] = 0
    w = (torch.ones(K) if weight is None else weight).view(-1, *[1] * (logits.dim() - 2))
    smoothed = (1 - smoothing) * masked + smoothing / K * masked.sum(1, keepdim=True)
    expected = -(smoothed * w * plain).sum(1)
    expected = expected.sum() / (masked * w).sum() if reduction == "mean" else expected
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (actual, expected)]
    close(*gradients, 1e-12)


def test_dense_targets_have_first_and_second_gradients(chunk):
    logits = logits_of((3,))
    targets = torch.rand_like(logits).softmax(1).requires_grad_()

    def loss(z, t):
        return soft_cross_entropy(z, t, 0.1, WEIGHT)

    assert torch.autograd.gradcheck(loss, (logits, targets))
    assert torch.autograd.gradcheck(lambda z: loss(z, targets.detach()), (logits,))
    assert torch.autograd.gradgradcheck(lambda z: loss(z, targets.detach()), (logits,))


def test_without_class_weights_a_dense_loss_is_torchs():
    logits = logits_of()
    targets = torch.rand_like(logits).softmax(1)
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.1):
            expected = F.cross_entropy(logits, targets, reduction=reduction, label_smoothing=smoothing)
            actual = soft_cross_entropy(logits, targets, smoothing, reduction=reduction)
            close(actual.detach(), expected.detach(), 1e-12)


def test_a_dense_target_of_0_may_be_of_an_impossible_class():
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0]], requires_grad=True)
    loss = soft_cross_entropy(logits, torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_dense_targets_of_another_shape_are_refused():
    text = "soft_cross_entropy: targets must be of shape (5, 4), got (5, 3). Give a probability for each class, or"
    with pytest.raises(ValueError, match=re.escape(text)):
        soft_cross_entropy(logits_of(), torch.rand(5, 3))


# ------------------------------------------------------------------ components


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from(["each", 0.0, 0.3]))
def test_merged_components_are_the_same_target_of_as_few_labels_as_there_are(seed, count, smoothing):
    torch.manual_seed(seed)
    components = mix((3, 2), count, smoothing, ignored=0)
    fewer = merged(components)
    assert len(fewer) <= min(K, count)
    close(dense(fewer, K), dense(components, K))
    for label in range(K):  # class weights are those of the unsmoothed shares
        shares = [sum(part.share * (part.labels == label) for part in parts) for parts in (components, fewer)]
        close(*shares)
    most = max(len(set(row)) for row in torch.stack([c.labels.flatten() for c in components], 1).tolist())
    assert len(fewer) == most


def test_joined_components_stand_for_the_joined_targets():
    parts = [mix((4,), 3, "each", 0), mix((2,), 1, 0.2, 0), mix((3,), 2, 0.0, 0)]
    close(dense(joined(parts, torch.cat), K), torch.cat([dense(part, K) for part in parts]))
    same = joined([mix((4,), 1, 0.2, 0), mix((2,), 3, 0.2, 0)], torch.cat)
    assert [component.smoothing for component in same] == [0.2] * 3


def test_changed_components_have_their_labels_and_numbers_changed():
    components = mix((4,), 2, "each", 0)
    close(dense(changed(components, lambda y: y.flip(0), lambda s: s.flip(0)), K), dense(components, K).flip(0))


def test_the_dominant_label_is_that_of_the_largest_share_in_all():
    components = mix((60,), 4, 0.0, 0)
    assert dominant(components).tolist() == dense(components, K).argmax(1).tolist()
