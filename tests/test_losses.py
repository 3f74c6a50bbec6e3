import copy
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_tricks.labels import MixedLabels, soft_targets
from lightning_tricks.losses import LabelSmoothingCrossEntropy

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
    assert torch.equal(loss(logits, targets), F.cross_entropy(logits, targets, label_smoothing=smoothing))
    assert torch.equal(loss.eval()(logits, targets), F.cross_entropy(logits, targets))


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
