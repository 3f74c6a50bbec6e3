import copy
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_tricks import losses as module
from lightning_tricks.labels import MixedLabels, mix_labels, smooth_labels, soft_targets
from lightning_tricks.losses import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

K = 4
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0])
every_shape = pytest.mark.parametrize("shape", [(6,), (3, 5), (2, 4, 3)], ids=str)
every_smoothing = pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0, 1])


def batch(shape=(6,)):
    labels = torch.randint(K, shape)
    return torch.randn(shape[0], K, *shape[1:], dtype=torch.float64), labels


@every_smoothing
@every_shape
@pytest.mark.parametrize("weight", [None, WEIGHT.double()], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_torchs_and_smooths_in_training_only(smoothing, shape, weight, ignore_index, reduction):
    logits, labels = batch(shape)
    labels[0] = ignore_index
    options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
    loss = LabelSmoothingCrossEntropy(smoothing, **options)
    assert loss.training
    assert torch.equal(loss(logits, labels), F.cross_entropy(logits, labels, label_smoothing=smoothing, **options))
    assert torch.equal(loss.eval()(logits, labels), F.cross_entropy(logits, labels, **options))
    assert torch.equal(
        loss.train()(logits, labels), F.cross_entropy(logits, labels, label_smoothing=smoothing, **options)
    )


def test_the_loss_is_its_formula():
    logits, labels = batch()
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(x) for x in row))
        target = [0.9 * (c == label) + 0.1 / K for c in range(K)]
        expected -= sum(t * (x - log_sum) for t, x in zip(target, row, strict=True)) / len(labels)
    assert LabelSmoothingCrossEntropy(0.1)(logits, labels).item() == pytest.approx(expected, rel=1e-12)


def test_the_defaults_are_torchs_with_a_smoothing_of_a_tenth():
    logits, labels = batch()
    labels[0] = -100
    assert torch.equal(
        LabelSmoothingCrossEntropy()(logits, labels), nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels)
    )


def test_a_single_sample_without_a_batch_is_understood():
    logits, labels = batch()
    expected = F.cross_entropy(logits[0], labels[0], label_smoothing=0.1)
    assert torch.equal(LabelSmoothingCrossEntropy(0.1)(logits[0], labels[0]), expected)


@every_smoothing
def test_floating_targets_are_smoothed_as_torch_does(smoothing):
    logits, _ = batch()
    targets = torch.rand(6, K, dtype=torch.float64).softmax(1)
    loss = LabelSmoothingCrossEntropy(smoothing)
    torch.testing.assert_close(
        loss(logits, targets), F.cross_entropy(logits, targets, label_smoothing=smoothing), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(loss.eval()(logits, targets), F.cross_entropy(logits, targets), rtol=1e-12, atol=0)


def test_mixed_labels_are_smoothed_in_training_and_only_mixed_in_evaluation():
    logits, labels = batch()
    labels = MixedLabels(labels, labels.flip(0), 0.7)
    targets, loss = soft_targets(labels, K).double(), LabelSmoothingCrossEntropy(0.1)
    torch.testing.assert_close(loss(logits, labels), F.cross_entropy(logits, targets, label_smoothing=0.1))
    torch.testing.assert_close(loss.eval()(logits, labels), F.cross_entropy(logits, targets))


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_torchs(training):
    logits, labels = batch()
    logits.requires_grad_()
    (actual,) = torch.autograd.grad(LabelSmoothingCrossEntropy(0.1).train(training)(logits, labels), logits)
    reference = F.cross_entropy(logits, labels, label_smoothing=0.1 if training else 0.0)
    assert torch.equal(actual, torch.autograd.grad(reference, logits)[0])


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
def test_the_state_dict_is_that_of_torchs_loss(weight):
    ours, theirs = LabelSmoothingCrossEntropy(weight=weight), nn.CrossEntropyLoss(weight=weight)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert list(dict(ours.named_buffers())) == list(dict(theirs.named_buffers()))
    assert not list(ours.parameters())


def test_the_weight_moves_with_the_module():
    logits, labels = batch()
    loss = nn.Sequential(LabelSmoothingCrossEntropy(weight=WEIGHT)).to(torch.float64)[0]
    assert loss.weight.dtype == torch.float64
    assert torch.equal(loss.eval()(logits, labels), F.cross_entropy(logits, labels, weight=WEIGHT.double()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_computes_the_same(duplicate):
    logits, labels = batch()
    loss = LabelSmoothingCrossEntropy(0.3, WEIGHT.double(), 1, "sum")
    assert torch.equal(duplicate(loss)(logits, labels), loss(logits, labels))


def test_the_representation_shows_the_settings():
    expected = "LabelSmoothingCrossEntropy(smoothing=0.2, ignore_index=-1, reduction='sum')"
    assert repr(LabelSmoothingCrossEntropy(0.2, None, -1, "sum")) == expected


@pytest.mark.parametrize(
    ("value", "error"),
    [*((v, ValueError) for v in (-0.1, 1.1, math.nan, math.inf)), *((v, TypeError) for v in (True, "0.1", None))],
    ids=repr,
)
def test_the_smoothing_must_be_a_share(value, error):
    kind = "a number " if error is TypeError else ""
    text = (
        f"LabelSmoothingCrossEntropy: smoothing must be {kind}in [0, 1], got {value!r}. It is the share of the target"
    )
    with pytest.raises(error, match=re.escape(text)):
        LabelSmoothingCrossEntropy(value)


@pytest.mark.parametrize("value", [[1.0, 2.0], 2.0, torch.tensor([1, 2]), torch.ones(2, 2), torch.tensor(1.0)], ids=str)
def test_the_weight_must_be_one_number_for_each_class(value):
    text = (
        f"LabelSmoothingCrossEntropy: weight must be a floating tensor of shape (K,) or None, got {value!r}. Give one"
    )
    with pytest.raises(TypeError, match=re.escape(text)):
        LabelSmoothingCrossEntropy(weight=value)


@pytest.mark.parametrize("value", [1.0, True, None, "-100"], ids=repr)
def test_the_ignored_index_must_be_an_integer(value):
    text = f"LabelSmoothingCrossEntropy: ignore_index must be an integer label, got {value!r}. The default is -100."
    with pytest.raises(TypeError, match=re.escape(text)):
        LabelSmoothingCrossEntropy(ignore_index=value)


@pytest.mark.parametrize("value", ["average", "", None, ["mean"]], ids=repr)
def test_the_reduction_must_be_known(value):
    text = (
        f"LabelSmoothingCrossEntropy: reduction must be 'mean', 'sum' or 'none', got {value!r}. 'mean' is the default."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        LabelSmoothingCrossEntropy(reduction=value)


@pytest.mark.parametrize("weight", [None, WEIGHT.double()], ids=["unweighted", "weighted"])
@every_shape
def test_many_logits_are_worked_on_in_parts_and_give_the_same(weight, shape, monkeypatch):
    logits, labels = batch(shape)
    labels.view(-1)[0] = -100
    logits.requires_grad_()
    loss = LabelSmoothingCrossEntropy(0.1, weight)
    expected = loss(logits, labels)
    monkeypatch.setattr(module, "CHUNK", 1)
    actual = loss(logits, labels)
    every = module.mixed_cross_entropy(logits, [(labels, torch.ones(shape))], reduction="none")
    assert "InChunks" in str(every.grad_fn)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------------ one normalisation for integers, mixes and dense


def kinds_of_one_target(labels, smoothing=0.0):
    """The same targets as MixedLabels and as dense ones."""
    other, share = labels.flip(0), torch.linspace(0.25, 1, len(labels)).view(-1, *[1] * (labels.dim() - 1))
    mixed = MixedLabels(labels, other, share, smoothing)
    return mixed, soft_targets(mixed, K).double()


def test_class_weights_do_not_rescale_the_loss_when_labels_become_dense():
    """Section 6: torch's class-weighted cross-entropy is 1.389 of integers and 3.472 of the same labels as one-hot."""
    logits = torch.tensor([[1.0, 0.5, -0.5], [0.0, 2.0, 0.3]], dtype=torch.float64)
    labels, weight = torch.tensor([2, 0]), torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    dense = F.one_hot(labels, 3).double()
    expected = F.cross_entropy(logits, labels, weight)
    assert F.cross_entropy(logits, dense, weight).item() == pytest.approx(expected.item() * 5 / 2)  # torch's own
    loss = SoftTargetCrossEntropy(weight)
    for labels_of_a_kind in (labels, dense, MixedLabels(labels), MixedLabels(labels, labels.flip(0), 1.0)):
        torch.testing.assert_close(loss(logits, labels_of_a_kind), expected)


@every_shape
@pytest.mark.parametrize("weight", [None, WEIGHT.double()], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mixed_and_dense_targets_have_one_loss(shape, weight, ignore_index, reduction):
    """pytorch #7455, #69339, #72056, #73205, #91383: weights, smoothing, ignored labels and soft targets together."""
    logits, labels = batch(shape)
    mixed, dense = kinds_of_one_target(labels)
    options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
    for loss in (SoftTargetCrossEntropy(**options), LabelSmoothingCrossEntropy(0.1, **options)):
        torch.testing.assert_close(loss(logits, dense), loss(logits, mixed), rtol=1e-6, atol=1e-6)
        one_hot = F.one_hot(labels, K).movedim(-1, 1).double()
        torch.testing.assert_close(loss(logits, one_hot), loss(logits, labels), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight", [None, WEIGHT.double()], ids=["unweighted", "weighted"])
def test_ignored_places_may_be_dense_too(weight):
    """pytorch #7455: a place of a map whose targets are all 0 counts no more than one that is ignored."""
    logits, labels = batch((2, 4, 3))
    one_hot = F.one_hot(labels, K).movedim(-1, 1).double()
    one_hot[0, :, :2] = 0
    labels[0, :2] = -100
    for loss in (SoftTargetCrossEntropy(weight), LabelSmoothingCrossEntropy(0.1, weight)):
        torch.testing.assert_close(loss(logits, one_hot), loss(logits, labels), rtol=1e-12, atol=1e-12)


def test_labels_that_timm_refuses_are_understood():
    """Section 6: timm's smoothing loss raises RuntimeError for ignored labels and for (N, C, H, W)."""
    logits, labels = batch((2, 4, 3))
    labels[0, 0] = -100
    actual = LabelSmoothingCrossEntropy(0.1)(logits, labels)
    assert torch.equal(actual, F.cross_entropy(logits, labels, label_smoothing=0.1))


@pytest.mark.parametrize("loss", [SoftTargetCrossEntropy(WEIGHT.double()), LabelSmoothingCrossEntropy(0.1)], ids=str)
def test_losses_have_exact_gradients_of_every_kind_of_label(loss):
    logits, labels = batch((3, 2))
    logits.requires_grad_()
    for target in (labels, *kinds_of_one_target(labels, 0.1)):
        assert torch.autograd.gradcheck(lambda z, target=target: loss(z, target), (logits,))


def test_a_soft_loss_does_not_change_in_evaluation():
    logits, labels = batch()
    loss = SoftTargetCrossEntropy()
    assert torch.equal(loss.eval()(logits, labels), loss.train()(logits, labels))
    assert repr(loss) == "SoftTargetCrossEntropy(ignore_index=-100, reduction='mean')"


def test_the_losses_use_mixed_labels():
    logits, labels = batch()
    for loss in (SoftTargetCrossEntropy(), LabelSmoothingCrossEntropy(), BinaryCrossEntropy()):
        mixed = MixedLabels(labels, labels.flip(0), 0.5)
        loss(logits.requires_grad_(), mixed)
        assert mixed.used


# ------------------------------------------------------------------ binary


def binary_by_loop(logits, targets, weight=None, pos_weight=None):
    """One number for each class and place."""
    losses = torch.zeros_like(logits)
    w, p = (torch.ones(K) if v is None else v.expand(K) for v in (weight, pos_weight))
    for place in [(n, c, *rest) for n, c, *rest in torch.ones_like(logits).nonzero().tolist()]:
        q = 1 / (1 + math.exp(-logits[place].item()))
        t, c = targets[place].item(), place[1]
        losses[place] = -w[c] * (p[c] * t * math.log(q) + (1 - t) * math.log(1 - q))
    return losses


@every_shape
@pytest.mark.parametrize("weight", [None, WEIGHT.double()], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("pos_weight", [None, WEIGHT.double().flip(0), torch.tensor(2.0)], ids=["none", "each", "one"])
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_a_binary_loss_is_its_formula(shape, weight, pos_weight, threshold):
    logits, labels = batch(shape)
    mixed, dense = kinds_of_one_target(labels)
    one_hot = F.one_hot(labels, K).movedim(-1, 1).double()
    for given, soft in (
        (labels, 0.9 * one_hot + 0.1 / K),
        (mixed, 0.9 * dense + 0.1 / K),
        (dense, 0.9 * dense + 0.05),
    ):
        targets = soft if threshold is None else (soft > threshold).double()
        expected = binary_by_loop(logits, targets, weight, pos_weight)
        options = {"weight": weight, "pos_weight": pos_weight, "target_threshold": threshold}
        for sum_classes in (False, True):
            values = expected.sum(1) if sum_classes else expected
            for reduction, wanted in (("mean", values.mean()), ("sum", values.sum()), ("none", values)):
                loss = BinaryCrossEntropy(0.1, **options, sum_classes=sum_classes, reduction=reduction)
                torch.testing.assert_close(loss(logits, given), wanted, rtol=1e-6, atol=1e-6)


def test_a_binary_loss_smooths_in_training_only():
    logits, labels = batch()
    one_hot = F.one_hot(labels, K).double()
    expected = F.binary_cross_entropy_with_logits(logits, one_hot)
    loss = BinaryCrossEntropy(0.3).eval()
    torch.testing.assert_close(loss(logits, labels), expected)
    torch.testing.assert_close(loss(logits, one_hot), expected)
    assert loss.train()(logits, labels) != expected


def test_a_binary_loss_of_a_thresholded_mix_has_both_labels_whole():
    """arXiv:2110.00476: what of a mix has more than the threshold is there."""
    logits, _ = batch((1,))
    labels = MixedLabels(torch.tensor([0]), torch.tensor([2]), 0.7)
    expected = F.binary_cross_entropy_with_logits(logits, torch.tensor([[1.0, 0, 1, 0]], dtype=torch.float64))
    torch.testing.assert_close(BinaryCrossEntropy(0.1, target_threshold=0.2)(logits, labels), expected)


@pytest.mark.parametrize("prior", [torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.eye(K).roll(1, 0)], ids=["prior", "rows"])
def test_a_binary_loss_smooths_towards_all_classes_alike_what_has_a_prior(prior):
    logits, labels = batch()
    smoothed = smooth_labels(labels, 0.5, prior)
    targets = 0.9 * soft_targets(smoothed, K).double() + 0.1 / K
    expected = F.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(BinaryCrossEntropy(0.1)(logits, smoothed), expected, rtol=1e-6, atol=1e-6)


@every_shape
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("sum_classes", [False, True])
def test_a_binary_loss_leaves_out_what_is_ignored(shape, ignore_index, threshold, sum_classes):
    """Of a mix the components that are not ignored count, each with its share; of dense targets the numbers."""
    logits, labels = batch(shape)
    labels.view(-1)[0] = ignore_index
    other, share = labels.flip(0), torch.linspace(0.25, 1, len(labels), dtype=torch.float64)
    share = share.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    dense = torch.rand_like(logits)
    dense.view(-1)[:2] = min(ignore_index, -100)
    options = {"target_threshold": threshold, "sum_classes": sum_classes}

    def by_loop(parts):
        """(targets, counts), of each class and place."""
        targets, counts = torch.zeros_like(logits), torch.zeros_like(logits)
        for own, part in parts:
            for place in [tuple(p) for p in torch.ones(shape).nonzero().tolist()]:
                if own[place] != ignore_index:
                    n, *rest = place
                    targets[(n, own[place], *rest)] += part[place]
                    counts[(n, slice(None), *rest)] += part[place]
        return 0.9 * targets / counts.where(counts > 0, 1) + 0.1 / K, counts

    cases = [
        (labels, *by_loop([(labels, torch.ones(shape))])),
        (MixedLabels(labels, other, share), *by_loop([(labels, share), (other, 1 - share)])),
    ]
    if ignore_index < 0:
        counts = (dense != ignore_index).double()
        cases.append((dense, torch.where(counts > 0, 0.9 * dense + 0.05, 0.5), counts))
    for given, targets, counts in cases:
        targets = targets if threshold is None else (targets > threshold).double()
        losses = counts * binary_by_loop(logits, targets)
        losses = losses.sum(1) if sum_classes else losses
        total = counts.amax(1).sum() if sum_classes else counts.sum()
        for reduction, wanted in (("mean", losses.sum() / total), ("sum", losses.sum()), ("none", losses)):
            loss = BinaryCrossEntropy(0.1, **options, reduction=reduction, ignore_index=ignore_index)
            torch.testing.assert_close(loss(logits, given), wanted, rtol=1e-6, atol=1e-6)


def test_logits_of_what_a_binary_loss_ignores_do_not_matter():
    logits, labels = torch.tensor([[0.0, 1.0], [math.nan, math.inf]]), torch.tensor([0, -100])
    expected = BinaryCrossEntropy(0.1)(logits[:1], labels[:1])
    torch.testing.assert_close(BinaryCrossEntropy(0.1)(logits, labels), expected)
    assert BinaryCrossEntropy()(logits, labels[1:].expand(2)).isnan()  # as torch's mean of nothing


def test_a_binary_mean_of_many_coarse_losses_is_finite():
    logits = torch.full((200, K), 400.0, dtype=torch.float16)
    assert BinaryCrossEntropy(0.0)(logits, torch.zeros_like(logits)).item() == 400


def test_floating_targets_of_a_binary_loss_may_be_any_label_that_is_ignored():
    """A 1 of dense targets is a share, and no label."""
    logits, labels = batch()
    targets = F.one_hot(labels, K).double()
    expected = F.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(BinaryCrossEntropy(0.0, ignore_index=1)(logits, targets), expected)


LOSSES = [LabelSmoothingCrossEntropy(0.1), SoftTargetCrossEntropy(), BinaryCrossEntropy(0.1)]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)


@every_loss
def test_multi_hot_integers_are_refused(loss):
    codes = torch.randint(2, (6, K))
    text = f"{type(loss).__name__}: labels must be of shape (6,), got (6, 4). Make multi-hot targets floating in the"
    for labels in (codes, MixedLabels(codes, codes.flip(0), 0.5), codes.bool()):
        with pytest.raises(ValueError, match=re.escape(text)):
            loss(torch.zeros(6, K), labels)


@every_loss
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_labels_are_integers_of_any_size_however_many(loss, dtype, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    logits, labels = batch()
    for training in (True, False):
        loss.train(training)
        torch.testing.assert_close(loss(logits, labels.to(dtype)), loss(logits, labels), rtol=1e-12, atol=0)
        with torch.no_grad():
            mixed = MixedLabels(labels.to(dtype), labels.flip(0).to(dtype), 0.6)
            expected = loss(logits, MixedLabels(labels, labels.flip(0), 0.6))
            torch.testing.assert_close(loss(logits, mixed), expected, rtol=1e-12, atol=0)
    loss.train()


@pytest.mark.parametrize("count", [1, K + 1])
def test_class_weights_of_other_classes_are_refused(count):
    logits, labels = batch()
    weight = torch.ones(count)
    fix = f"must be of shape (4,), a number for each class that the logits have, got ({count},)."
    mixed, dense = kinds_of_one_target(labels)
    for make in (SoftTargetCrossEntropy, LabelSmoothingCrossEntropy):
        for given in (labels, mixed, dense):
            with pytest.raises(ValueError, match=re.escape(f"{make.__name__}: weight {fix}")):
                make(weight=weight)(logits, given)
    for name in ("weight", "pos_weight"):
        for given in (labels, mixed, dense):
            with pytest.raises(ValueError, match=re.escape(f"BinaryCrossEntropy: {name} {fix}")):
                BinaryCrossEntropy(**{name: weight})(logits, given)


def test_a_binary_loss_has_an_exact_gradient_and_needs_no_batch():
    logits, labels = batch((3, 2))
    logits.requires_grad_()
    loss = BinaryCrossEntropy(0.1, weight=WEIGHT.double())
    for target in (labels, *kinds_of_one_target(labels)):
        assert torch.autograd.gradcheck(lambda z, target=target: loss(z, target), (logits,))
    single = loss(logits[0, :, 0], labels[0, 0])
    torch.testing.assert_close(single, loss(logits[:1, :, 0], labels[:1, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_binary_loss_has_the_dtype_of_torchs(dtype):
    logits, labels = batch()
    logits = logits.to(dtype)
    expected = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, K).to(dtype))
    actual = BinaryCrossEntropy(0.0)(logits, labels)
    assert actual.dtype == expected.dtype


def test_mixed_labels_of_several_transforms_have_a_binary_loss():
    logits, labels = batch()
    weight, permutation = torch.rand(6), torch.randperm(6)
    mixed = smooth_labels(mix_labels(mix_labels(labels, weight, permutation), weight, permutation.flip(0)), 0.1)
    targets = soft_targets(mixed, K).double()
    expected = F.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(BinaryCrossEntropy(0.0)(logits, mixed), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"smoothing": 1.5}, ValueError, "smoothing must be in [0, 1], got 1.5."),
        ({"target_threshold": 1.0}, ValueError, "target_threshold must be in [0, 1), got 1.0. 0.2 is the paper's"),
        ({"weight": [1.0]}, TypeError, "weight must be a floating tensor of shape (K,) or None, got [1.0]."),
        ({"pos_weight": 2.0}, TypeError, "pos_weight must be a floating tensor of shape (K,) or () or None, got 2.0."),
        ({"sum_classes": 1}, TypeError, "sum_classes must be True or False, got 1."),
        ({"reduction": "average"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'average'."),
    ],
    ids=str,
)
def test_arguments_of_a_binary_loss_are_checked(options, error, text):
    with pytest.raises(error, match=re.escape(f"BinaryCrossEntropy: {text}")):
        BinaryCrossEntropy(**options)


def test_binary_targets_of_another_shape_are_refused():
    text = "BinaryCrossEntropy: targets must be of shape (6, 4), got (6, 3). Give a number for each class, or integer"
    with pytest.raises(ValueError, match=re.escape(text)):
        BinaryCrossEntropy()(torch.zeros(6, K), torch.rand(6, 3))


@pytest.mark.parametrize("make", [SoftTargetCrossEntropy, BinaryCrossEntropy], ids=lambda make: make.__name__)
def test_further_losses_are_copied_with_their_weight(make):
    logits, labels = batch()
    loss = make(weight=WEIGHT.double())
    assert torch.equal(pickle.loads(pickle.dumps(loss))(logits, labels), loss(logits, labels))
    assert list(loss.state_dict()) == ["weight"]
