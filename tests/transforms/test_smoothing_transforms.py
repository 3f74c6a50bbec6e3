"""LabelSmoothing over all classes, over a prior, and by rows."""

import math
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser

from lightning_tricks.labels import soft_targets
from lightning_tricks.transforms import LabelSmoothing, Mixup

K = 3
PRIOR = [0.5, 0.3, 0.2]
ROWS = [[0.8, 0.2, 0.0], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0]]
SETTINGS = [LabelSmoothing(0.1), LabelSmoothing(0.2, PRIOR), LabelSmoothing(0.3, ROWS), LabelSmoothing(1.0, ROWS)]
every_setting = pytest.mark.parametrize("smoothing", SETTINGS, ids=repr)


def batch():
    return torch.rand(4, 1, 2, 2), torch.tensor([0, 2, 1, 1])


def expected(targets, smoothing):
    """The formulas, class by class."""
    rows = []
    for target in targets.tolist():
        row = []
        for c in range(K):
            spread = 1 / K
            if smoothing.prior is not None and isinstance(smoothing.prior[0], tuple):
                spread = sum(target[j] * smoothing.prior[j][c] for j in range(K))
            elif smoothing.prior is not None:
                spread = smoothing.prior[c]
            row.append((1 - smoothing.smoothing) * target[c] + smoothing.smoothing * spread)
        rows.append(row)
    return torch.tensor(rows)


@every_setting
def test_targets_are_smoothed_by_their_formula(smoothing):
    images, labels = batch()
    same, smoothed = smoothing(images, labels)
    assert same is images
    assert smoothed.tolist() == labels.tolist()
    torch.testing.assert_close(soft_targets(smoothed, K), expected(F.one_hot(labels, K).float(), smoothing))


@every_setting
def test_mixed_labels_are_smoothed_by_the_same_formula(smoothing):
    images, labels = Mixup(1.0)(*batch(), torch.Generator().manual_seed(0))
    targets = soft_targets(labels, K)
    torch.testing.assert_close(soft_targets(smoothing(images, labels)[1], K), expected(targets, smoothing))


@every_setting
def test_strength_scales_the_share_that_is_spread(smoothing):
    _, labels = batch()
    half = smoothing.scaled(0.5)
    assert half == LabelSmoothing(smoothing.smoothing / 2, smoothing.prior)
    one_hot = F.one_hot(labels, K).float()
    middle = (one_hot + soft_targets(smoothing(*batch())[1], K)) / 2
    torch.testing.assert_close(soft_targets(half(*batch())[1], K), middle)
    assert smoothing.scaled(1.0) == smoothing


@pytest.mark.parametrize("strength", [0, -1.0, 10.5, math.nan], ids=repr)
def test_a_strength_must_leave_a_share(strength):
    text = f"strength must be above 0, with strength * smoothing of at most 1, got {strength!r}. The largest is 10."
    with pytest.raises(ValueError, match=re.escape(f"LabelSmoothing: {text}")):
        LabelSmoothing(0.1).scaled(strength)


@every_setting
def test_it_is_a_value(smoothing):
    again = pickle.loads(pickle.dumps(smoothing))
    assert again == smoothing
    assert hash(again) == hash(smoothing)
    assert eval(repr(smoothing)) == smoothing
    images, labels = batch()
    assert torch.equal(soft_targets(again(images, labels)[1], K), soft_targets(smoothing(images, labels)[1], K))


def test_all_batches_share_one_prior():
    smoothing = LabelSmoothing(0.2, PRIOR)
    first, second = smoothing(*batch())[1], smoothing(*batch())[1]
    assert first.prior is second.prior
    assert soft_targets(torch.cat([first, second]), K).shape == (8, K)


def test_two_that_have_one_prior_may_follow_each_other():
    images, labels = LabelSmoothing(0.5, PRIOR)(*batch())
    assert LabelSmoothing(0.5, PRIOR)(images, labels)[1].smoothing == 0.75
    with pytest.raises(ValueError, match="prior must be the same"):
        LabelSmoothing(0.5)(images, labels)


@pytest.mark.parametrize("prior", [None, PRIOR, ROWS], ids=["none", "prior", "rows"])
def test_it_can_be_built_from_a_file(prior):
    parser = ArgumentParser()
    parser.add_class_arguments(LabelSmoothing, "smooth")
    config = parser.parse_object({"smooth": {"smoothing": 0.2, "prior": prior}})
    assert parser.instantiate_classes(config).smooth == LabelSmoothing(0.2, prior)


@pytest.mark.parametrize("prior", [PRIOR, ROWS], ids=["prior", "rows"])
@pytest.mark.parametrize("given", [torch.tensor, np.array, tuple, lambda p: torch.tensor(p).requires_grad_()])
def test_a_prior_may_be_a_tensor_or_an_array(prior, given):
    smoothing = LabelSmoothing(0.2, given(prior))
    images, labels = batch()
    expected = soft_targets(LabelSmoothing(0.2, prior)(images, labels)[1], K)
    torch.testing.assert_close(soft_targets(smoothing(images, labels)[1], K), expected)
    assert pickle.loads(pickle.dumps(smoothing)) == smoothing
    assert hash(smoothing) == hash(LabelSmoothing(0.2, smoothing.prior))
    assert isinstance(smoothing.prior, tuple)


@pytest.mark.parametrize(
    ("prior", "error", "got"),
    [
        ([0.5, 0.6], ValueError, "probabilities that add up to 1, got [0.5, 0.6]"),
        ([1.5, -0.5], ValueError, "probabilities that add up to 1, got [1.5, -0.5]"),
        ([math.nan, 1.0], ValueError, "probabilities that add up to 1, got [nan, 1.0]"),
        ([[1.0, 0.0]], ValueError, "of shape (K,) or (K, K), got (1, 2)"),
        ([], ValueError, "of shape (K,) or (K, K), got (0,)"),
        (0.5, ValueError, "of shape (K,) or (K, K), got ()"),
        ([[1.0], [0.5, 0.5]], TypeError, "probabilities that add up to 1, got [[1.0], [0.5, 0.5]]"),
        ("abc", TypeError, "probabilities that add up to 1, got 'abc'"),
    ],
    ids=repr,
)
def test_a_prior_must_be_probabilities(prior, error, got):
    with pytest.raises(error, match=re.escape(f"LabelSmoothing: prior must be {got}. Give K of them, or K rows of K")):
        LabelSmoothing(0.1, prior)
