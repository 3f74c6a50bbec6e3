import dataclasses
import math
import pickle
import re

import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from lightning_tricks.labels import MixedLabels, soft_targets
from lightning_tricks.transforms import Cutout, LabelSmoothing, Mixup

K = 5
TRANSFORMS = [Mixup(0.4), Mixup(1.0, per_sample=False), Cutout(3), Cutout(2, holes=3, fill=0.5), LabelSmoothing(0.1)]
every_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(count=6):
    return torch.rand(count, 3, 8, 7, generator=generator()) + 1, torch.arange(count) % K


def same(a, b):
    """The same labels, mixed or not."""
    if isinstance(a, MixedLabels):
        return torch.equal(soft_targets(a, K), soft_targets(b, K))
    return (a is None and b is None) or torch.equal(a, b)


# ------------------------------------------------------------------ what all promise


@every_transform
def test_the_batch_is_untouched(transform):
    images, labels = batch()
    kept_images, kept_labels = images.clone(), labels.clone()
    transform(images, labels, generator())
    assert torch.equal(images, kept_images)
    assert torch.equal(labels, kept_labels)
    assert type(labels) is torch.Tensor


@every_transform
def test_in_place_writes_the_same_images_into_the_batch(transform):
    images, labels = batch()
    kept = labels.clone()
    expected, expected_labels = transform(images, labels, generator())
    address = images.data_ptr()
    result, result_labels = transform(images, labels, generator(), inplace=True)
    assert result.data_ptr() == address
    assert torch.equal(images, expected)
    assert same(result_labels, expected_labels)
    assert torch.equal(labels, kept)


@every_transform
def test_draws_come_from_the_generator_alone(transform):
    images, labels = batch()
    before = torch.get_rng_state()
    first, again = transform(images, labels, generator(3)), transform(images, labels, generator(3))
    assert torch.equal(first[0], again[0])
    assert same(first[1], again[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if not isinstance(t, LabelSmoothing)], ids=repr)
def test_another_seed_gives_another_batch(transform):
    images, labels = batch()
    assert not torch.equal(transform(images, labels, generator(1))[0], transform(images, labels, generator(2))[0])
    source = generator(1)
    assert not torch.equal(transform(images, labels, source)[0], transform(images, labels, source)[0])


@every_transform
def test_without_a_generator_draws_come_from_torchs_global_one(transform):
    images, labels = batch()
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(transform(images, labels))
    assert torch.equal(results[0][0], results[1][0])
    assert same(results[0][1], results[1][1])


@pytest.mark.parametrize("transform", [Mixup(), Cutout(2)], ids=repr)
def test_a_batch_without_labels_stays_without(transform):
    images, _ = batch()
    result, labels = transform(images, None, generator())
    assert labels is None
    assert torch.equal(result, transform(images, batch()[1], generator())[0])


@every_transform
@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_samples_is_transformed(transform, count):
    images, labels = batch(count)
    result, result_labels = transform(images, labels, generator())
    assert result.shape == images.shape
    assert result_labels.shape == labels.shape


@every_transform
def test_a_transform_is_a_value(transform):
    for again in (pickle.loads(pickle.dumps(transform)), eval(repr(transform))):
        assert again == transform
        assert hash(again) == hash(transform)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(transform, dataclasses.fields(transform)[0].name, 1)


def test_transforms_of_other_settings_differ():
    assert len(set(TRANSFORMS)) == len(TRANSFORMS)
    assert repr(Mixup()) == "Mixup(alpha=0.2, per_sample=True)"
    assert repr(Cutout(8)) == "Cutout(size=8, holes=1, fill=0.0)"
    assert repr(LabelSmoothing()) == "LabelSmoothing(smoothing=0.1)"


# ------------------------------------------------------------------ Mixup


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("shape", [(9,), (9, 4), (9, 2, 3)], ids=str)
def test_images_and_labels_are_mixed_alike(per_sample, shape):
    labels = torch.randint(K, shape)
    codes = F.one_hot(labels, K).movedim(-1, 1).float()
    images, mixed = Mixup(1.0, per_sample)(codes, labels, generator())
    assert type(mixed) is MixedLabels
    torch.testing.assert_close(images, soft_targets(mixed, K))
    assert not torch.equal(images, codes)


def test_floating_targets_are_mixed_as_the_images_are():
    images = torch.randn(9, 4)
    targets = images.clone()
    mixed, mixed_targets = Mixup(1.0)(images, targets, generator(), inplace=True)
    torch.testing.assert_close(mixed, mixed_targets)
    assert type(mixed_targets) is torch.Tensor
    assert not torch.equal(targets, mixed_targets)


def test_mixing_mixed_labels_keeps_both_mixes():
    labels = torch.randint(K, (9,))
    images, mixed = F.one_hot(labels, K).float(), labels
    for seed in range(3):
        images, mixed = Mixup(1.0)(images, mixed, generator(seed))
    torch.testing.assert_close(images, soft_targets(mixed, K))


@pytest.mark.parametrize("per_sample", [True, False])
def test_one_weight_for_the_batch_or_one_for_each_sample(per_sample):
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 4)
    labels = torch.arange(8)
    _, mixed = Mixup(1.0, per_sample)(images, labels, generator())
    assert len(set(mixed.components[0][1].tolist())) == (8 if per_sample else 1)


@pytest.mark.parametrize("alpha", [0.2, 1, 4.0])
def test_the_share_of_the_original_follows_the_beta_distribution(alpha):
    count = 4000
    images = torch.arange(float(count))
    _, mixed = Mixup(alpha)(images, torch.zeros(count, dtype=torch.int64), generator())
    shares = mixed.components[0][1].double().numpy()
    inner = shares[(shares > 1e-6) & (shares < 1 - 1e-6)]
    law = scipy.stats.beta(alpha, alpha)
    low, high = law.cdf([1e-6, 1 - 1e-6])
    assert scipy.stats.kstest((law.cdf(inner) - low) / (high - low), "uniform").pvalue > 1e-3
    assert scipy.stats.binomtest(len(inner), count, high - low).pvalue > 1e-3


def test_images_and_labels_of_another_number_are_refused():
    text = "Mixup: labels must be one for each image, got '(5,) for images (4, 3)'."
    with pytest.raises(ValueError, match=re.escape(text)):
        Mixup()(torch.rand(4, 3), torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("value", "error"),
    [*((v, ValueError) for v in (0, 0.0, -0.2, math.nan, math.inf)), *((v, TypeError) for v in (True, "0.2", None))],
    ids=repr,
)
def test_alpha_must_be_above_0(value, error):
    kind = "a number " if error is TypeError else ""
    with pytest.raises(error, match=re.escape(f"Mixup: alpha must be {kind}above 0, got {value!r}. Try 0.2.")):
        Mixup(value)


# ------------------------------------------------------------------ Cutout


@pytest.mark.parametrize(("size", "holes"), [(1, 1), (3, 1), (4, 2), (20, 1)])
def test_cutout_fills_squares_and_leaves_the_rest(size, holes):
    images, labels = batch()
    result, result_labels = Cutout(size, holes, fill=-1.0)(images, labels, generator())
    assert result_labels is labels
    cut = result == -1
    assert torch.equal(result[~cut], images[~cut])
    area = cut[:, 0].sum((1, 2))
    assert (cut == cut[:, :1]).all()
    assert ((area >= 1) & (area <= holes * size**2)).all()
    for mask in cut[:, 0]:
        if holes == 1:
            rows, columns = mask.any(1).sum(), mask.any(0).sum()
            assert mask.sum() == rows * columns
            assert max(rows, columns) <= size


@pytest.mark.parametrize("holes", [1, 3])
def test_each_image_gets_its_holes(holes):
    images = torch.ones(50, 1, 40, 60)
    result, _ = Cutout(1, holes)(images, None, generator())
    assert (result == 0).sum((1, 2, 3)).max() == holes


def test_every_pixel_can_be_cut():
    images = torch.ones(400, 1, 5, 4)
    result, _ = Cutout(1)(images, None, generator())
    counts = (result == 0).sum(0).flatten()
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    "labels", [torch.rand(6, 2), torch.zeros(6, 8, 7, dtype=torch.int64), MixedLabels(torch.arange(6))]
)
def test_cutout_returns_the_labels_as_they_came(labels):
    assert Cutout(2)(batch()[0], labels, generator())[1] is labels


@pytest.mark.parametrize("shape", [(4,), (4, 4), (3, 8, 8), (2, 3, 4, 8, 8)], ids=str)
def test_images_of_another_number_of_dimensions_are_refused(shape):
    text = f"images must be of shape (N, C, H, W), got {shape}. Add the missing dimension, or leave this transform out."
    with pytest.raises(ValueError, match=re.escape(text)):
        Cutout(2)(torch.ones(shape), None)


@pytest.mark.parametrize(
    ("name", "unit", "fix"),
    [("size", "pixels", "Try half the image's side"), ("holes", "squares", "The paper cuts 1")],
    ids=["size", "holes"],
)
@pytest.mark.parametrize(
    ("value", "error"),
    [*((v, ValueError) for v in (0, -2)), *((v, TypeError) for v in (1.5, True, "2", None))],
    ids=repr,
)
def test_size_and_holes_must_be_counts(name, unit, fix, value, error):
    text = f"Cutout: {name} must be a whole number of at least 1 ({unit}), got {value!r}. {fix}."
    with pytest.raises(error, match=re.escape(text)):
        Cutout(**{"size": 2, name: value})


@pytest.mark.parametrize(
    ("value", "error"),
    [*((v, ValueError) for v in (math.nan, math.inf, -math.inf)), *((v, TypeError) for v in (True, "0", None))],
    ids=repr,
)
def test_the_fill_must_be_a_finite_number(value, error):
    kind = "a number " if error is TypeError else ""
    text = f"Cutout: fill must be {kind}finite, got {value!r}. 0 is the mean of normalised images."
    with pytest.raises(error, match=re.escape(text)):
        Cutout(2, fill=value)


# ------------------------------------------------------------------ LabelSmoothing


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 2, 3)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_labels_are_smoothed_and_images_are_returned_as_they_came(shape, smoothing):
    images, labels = batch()[0], torch.randint(K, shape)
    result, smoothed = LabelSmoothing(smoothing)(images, labels)
    assert result is images
    assert type(smoothed) is MixedLabels
    assert smoothed.tolist() == labels.tolist()
    logits = torch.randn(6, K, *shape[1:])
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(F.cross_entropy(logits, smoothed), expected)


@pytest.mark.parametrize("first", [Mixup(1.0), LabelSmoothing(0.2)], ids=repr)
def test_transformed_labels_are_smoothed_again(first):
    images, labels = batch()
    _, once = first(images, labels, generator())
    _, twice = LabelSmoothing(0.1)(images, once)
    torch.testing.assert_close(soft_targets(twice, K), 0.9 * soft_targets(once, K) + 0.1 / K)


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (None, "'no labels'"),
        (torch.rand(6, K), "torch.float32"),
        (torch.rand(6, dtype=torch.float64), "torch.float64"),
        (torch.zeros(6, dtype=torch.complex64), "torch.complex64"),
    ],
    ids=["None", "float32", "float64", "complex64"],
)
def test_only_integer_labels_can_be_smoothed(labels, got):
    fix = "Smooth floating targets in the data set, or leave LabelSmoothing out"
    text = f"LabelSmoothing: labels must be integers, got {got}. {fix}."
    with pytest.raises(TypeError, match=re.escape(text)):
        LabelSmoothing()(batch()[0], labels)


@pytest.mark.parametrize(
    ("value", "error"),
    [*((v, ValueError) for v in (-0.1, 1.1, math.nan, math.inf)), *((v, TypeError) for v in (True, "0.1", None))],
    ids=repr,
)
def test_the_smoothing_must_be_a_share(value, error):
    kind = "a number " if error is TypeError else ""
    text = (
        f"LabelSmoothing: smoothing must be {kind}in [0, 1], got {value!r}. It is the share of the target spread over"
    )
    with pytest.raises(error, match=re.escape(text)):
        LabelSmoothing(value)
