import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_tricks as lt
from lightning_tricks.labels import MixedLabels
from lightning_tricks.transforms.choice import OneOf, RandomApply, apply_chain, at_strength, has_strength, unchanged


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def shade(value):
    def transform(images, labels, generator=None, inplace=False):
        return torch.full_like(images, value), labels

    return transform


def noise(images, labels, generator=None, inplace=False):
    return images + torch.rand(len(images), 1, 1, 1, generator=generator), labels


def batch(count=7, channels=3, size=4, seed=1):
    images = torch.randn(count, channels, size, size, generator=generator(seed))
    return images, torch.arange(count) % 3


@dataclass(frozen=True)
class Add:
    """Adds to the pixels; `scaled` adds more or less."""

    amount: float

    def __call__(self, images, labels, generator=None, inplace=False):
        return (images.add_ if inplace else images.add)(self.amount), labels

    def scaled(self, strength):
        assert strength > 0
        return Add(self.amount * strength)


@dataclass(frozen=True)
class Halve:
    every_stage = True

    def __call__(self, images, labels, generator=None, inplace=False):
        return images / 2, labels


# ------------------------------------------------------------------------------------------------------------- choices


def within(count, trials, probability):
    """Whether a count of a binomial is within five standard deviations."""
    return abs(count - trials * probability) < 5 * (trials * probability * (1 - probability)) ** 0.5


def test_rate_of_random_apply_is_prob():
    images, _ = RandomApply(shade(1.0), prob=0.3)(torch.zeros(4000, 1, 1, 1), None, generator())
    assert within(int(images.sum()), 4000, 0.3)


def test_nested_rates_multiply_and_are_not_applied_twice():
    """kornia #4649: p was applied once for the whole and once for each image, so that the rate was p * p."""
    for transform, rate in (
        (RandomApply([shade(1.0)], 0.5), 0.5),
        (RandomApply([unchanged, shade(1.0)], 0.5), 0.5),
        (RandomApply(RandomApply(shade(1.0), 0.5), 0.5), 0.25),
        (OneOf([RandomApply(shade(1.0), 0.5), shade(1.0)]), 0.75),
    ):
        images, _ = transform(torch.zeros(4000, 1, 1, 1), None, generator())
        assert within(int(images.sum()), 4000, rate)


@pytest.mark.parametrize("weights", [None, [3, 1, 0], [0.1, 0.2, 0.7]])
def test_one_of_draws_by_its_weights(weights):
    shades = [shade(1.0), shade(2.0), shade(3.0)]
    images, _ = OneOf(shades, weights)(torch.zeros(4000, 1, 1, 1), None, generator())
    shares = torch.tensor(weights or [1.0, 1.0, 1.0], dtype=torch.float64)
    for value, share in zip((1, 2, 3), shares / shares.sum(), strict=True):
        count = int((images == value).sum())
        assert count == 0 if share == 0 else within(count, 4000, float(share))


def test_one_draw_for_the_batch():
    seen = set()
    for seed in range(20):
        for transform in (
            OneOf([shade(1.0), shade(2.0)], per_sample=False),
            RandomApply(shade(1.0), per_sample=False),
        ):
            images, _ = transform(torch.zeros(9, 1, 2, 2), None, generator(seed))
            assert len(images.unique()) == 1
            seen.add((type(transform).__name__, float(images[0, 0, 0, 0])))
    assert seen == {("OneOf", 1.0), ("OneOf", 2.0), ("RandomApply", 0.0), ("RandomApply", 1.0)}


@given(st.integers(1, 9), st.integers(0, 3), st.integers(0, 1000), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_random_apply_is_the_transform_of_the_drawn_images_alone(count, channels, seed, channels_last, inplace):
    images, labels = batch(count, channels, seed=seed)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    twin = generator(seed)
    chosen = torch.rand(count, generator=twin) < 0.5
    expected, expected_labels = images.clone(), lt.soft_targets(labels, 3)
    if chosen.any():
        part, part_labels = lt.Mixup(0.5)(images[chosen], labels[chosen], twin)
        expected[chosen], expected_labels[chosen] = part, lt.soft_targets(part_labels, 3)
    before = images.clone()
    new, new_labels = RandomApply(lt.Mixup(0.5))(images, labels, generator(seed), inplace)
    torch.testing.assert_close(new, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(lt.soft_targets(new_labels, 3), expected_labels, rtol=0, atol=1e-6)
    assert new.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if inplace:
        assert new is images
    else:
        assert torch.equal(images, before)


@given(st.integers(1, 9), st.integers(0, 3), st.integers(0, 1000), st.booleans())
@settings(max_examples=40, deadline=None)
def test_one_of_is_each_transform_of_its_images_alone(count, channels, seed, inplace):
    images, labels = batch(count, channels, seed=seed)
    choices = [lt.Mixup(0.5), lt.Cutout(2), lt.LabelSmoothing(0.3)]
    twin = generator(seed)
    drawn = torch.multinomial(torch.ones(3, dtype=torch.float64), count, replacement=True, generator=twin)
    expected, targets = images.clone(), lt.soft_targets(labels, 3)
    for number, transform in enumerate(choices):
        index = [place for place in range(count) if drawn[place] == number]
        if index:
            expected[index], part = transform(images[index], labels[index], twin)
            targets[index] = lt.soft_targets(part, 3)
    new, new_labels = OneOf(choices)(images.clone(), labels, generator(seed), inplace)
    torch.testing.assert_close(new, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(lt.soft_targets(new_labels, 3), targets, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "transform",
    [
        OneOf([lt.Mixup(0.5), lt.Cutout(2)]),
        RandomApply([lt.Mixup(0.5), lt.Cutout(2)]),
        OneOf([RandomApply(lt.Mixup(1.0)), OneOf([lt.Cutout(1), lt.Cutout(3)], [1, 2])], per_sample=False),
    ],
)
def test_draws_depend_on_the_number_and_size_of_images_alone(transform):
    images, labels = batch()
    states = []
    masks = torch.zeros(7, 4, 4).long()
    for one, other in (
        (images, labels),
        (images[:, :0], masks),
        (images[:, :1].double(), labels.float()),
        (images, None),
    ):
        source = generator(5)
        transform(one, other, source)
        states.append(source.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


def test_dtypes_labels_and_masks_are_kept():
    images, labels = batch()
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.uint8):
        new, _ = RandomApply(lt.Cutout(2))(images.abs().to(dtype), labels, generator())
        assert new.dtype == dtype
    new, targets = OneOf([lt.Mixup(0.5), lt.Cutout(2)])(images, F.one_hot(labels, 3).float(), generator())
    assert type(targets) is torch.Tensor
    assert targets.sum(1).tolist() == pytest.approx([1.0] * 7)
    assert RandomApply(lt.Cutout(2))(images, None, generator())[1] is None
    masks = torch.randint(3, (7, 4, 4), generator=generator())
    assert isinstance(RandomApply(lt.Mixup(1.0))(images, masks, generator())[1], MixedLabels)


def test_transform_of_no_images_is_not_called():
    def refuse(images, labels, generator=None, inplace=False):
        raise AssertionError

    images, labels = batch()
    new, new_labels = RandomApply(refuse, prob=0.0)(images, labels, generator())
    assert new is images
    assert new_labels is labels
    new, _ = OneOf([refuse, lt.Cutout(1)], [0, 1])(images, labels, generator())
    assert not torch.equal(new, images)


def test_global_generator_is_the_default():
    images, labels = batch()
    torch.manual_seed(3)
    first, _ = RandomApply(noise)(images, labels)
    torch.manual_seed(3)
    assert torch.equal(RandomApply(noise)(images, labels)[0], first)


def test_values_compare_print_and_pickle():
    one, other = OneOf([lt.Mixup(0.2), lt.Cutout(4)], [3, 1]), OneOf((lt.Mixup(0.2), lt.Cutout(4)), (3, 1))
    assert one == other
    assert hash(one) == hash(other)
    assert one != OneOf([lt.Mixup(0.2), lt.Cutout(4)], [1, 3])
    assert pickle.loads(pickle.dumps(one)) == one
    assert eval(repr(one), {"OneOf": OneOf, "Mixup": lt.Mixup, "Cutout": lt.Cutout}) == one
    assert RandomApply(lt.Cutout(4)) == RandomApply([lt.Cutout(4)])
    assert repr(RandomApply(lt.Cutout(4), 0.25)).startswith("RandomApply(transforms=(Cutout(size=4, holes=1")


# ----------------------------------------------------------------------------------------------------------- strength


def test_strength_reaches_those_inside_that_have_one():
    nested = OneOf([RandomApply([Add(2.0), unchanged]), OneOf([Add(4.0)]), unchanged], [1, 2, 3], per_sample=False)
    half = at_strength(nested, 0.5)
    assert half == OneOf(
        [RandomApply([Add(1.0), unchanged]), OneOf([Add(2.0)]), unchanged], [1, 2, 3], per_sample=False
    )
    assert at_strength(nested, 0) == OneOf(
        [RandomApply([unchanged, unchanged]), OneOf([unchanged]), unchanged], [1, 2, 3], per_sample=False
    )
    assert at_strength(nested, 1) is nested
    assert at_strength(Add(2.0), 0) is unchanged
    assert at_strength(noise, 0) is noise


def test_who_has_a_strength():
    assert [has_strength(t) for t in (Add(1.0), RandomApply(OneOf([noise, Add(1.0)])), OneOf([noise]), noise)] == [
        True,
        True,
        False,
        False,
    ]


# -------------------------------------------------------------------------------------------------------------- chains


def test_chain_draws_each_image_once_for_all_its_transforms():
    images, _ = apply_chain("X", [Add(1.0), Add(2.0)], torch.zeros(2000, 1, 1, 1), None, generator(), prob=0.5)
    assert set(images.unique().tolist()) == {0.0, 3.0}
    assert within(int((images == 3).sum()), 2000, 0.5)


def test_chain_applies_what_is_for_every_stage_to_all_images():
    chain = [Add(1.0), Halve(), Add(1.0)]
    images, _ = apply_chain("X", chain, torch.ones(50, 1, 1, 1), None, generator(), prob=0.5)
    assert set(images.unique().tolist()) == {0.5, 2.0}
    assert apply_chain("X", chain, torch.ones(1, 1, 1, 1), None, generator(), prob=0.0)[0].item() == 0.5
    assert apply_chain("X", chain, torch.ones(1, 1, 1, 1), None, generator(), prob=1.0)[0].item() == 2.0


class Watch:
    """Notes whether it may work in place, and what it was given."""

    def __init__(self, result):
        self.result, self.inplace = result, []

    def __call__(self, images, labels, generator=None, inplace=False):
        self.inplace.append(inplace)
        return self.result(images), labels


@pytest.mark.parametrize(
    ("result", "owned"),
    [
        (torch.clone, True),
        (lambda images: images, False),
        (lambda images: images.flip(-1), True),
        (lambda images: images[..., 1:], False),
        (lambda images: images.view(images.shape), False),
        (lambda images: images.mean(1, keepdim=True).expand_as(images), False),
    ],
)
def test_only_what_a_transform_made_is_overwritten(result, owned):
    images = torch.randn(4, 3, 4, 4)
    before, last = images.clone(), Watch(lambda images: images)
    first = Watch(result)
    apply_chain("X", [first, last], images, None, generator())
    assert first.inplace == [False]
    assert last.inplace == [owned]
    apply_chain("X", [Watch(result), Add(1.0), Add(1.0)], images, None, generator())
    assert torch.equal(images, before)


# -------------------------------------------------------------------------------------------------------------- errors


def crop(images, labels, generator=None, inplace=False):
    return images[..., 1:], labels


def widen(images, labels, generator=None, inplace=False):
    return images.double(), labels


def drop(images, labels, generator=None, inplace=False):
    return images, None


@pytest.mark.parametrize("choice", [RandomApply(crop), OneOf([crop]), RandomApply(widen), OneOf([widen])])
def test_part_that_changes_its_size_or_dtype_is_refused(choice):
    with pytest.raises(ValueError, match=r"transforms must be such as keep \(3, 4, 4\) torch.float32 where only some"):
        choice(*batch(), generator())


def test_batch_that_changes_as_a_whole_may_change_its_size():
    assert OneOf([crop], per_sample=False)(*batch())[0].shape == (7, 3, 4, 3)
    assert RandomApply(crop, 1.0, per_sample=False)(*batch())[0].shape == (7, 3, 4, 3)


def test_transform_that_loses_the_labels_of_some_images_is_refused():
    with pytest.raises(TypeError, match="RandomApply: transforms must be such as keep the labels"):
        RandomApply(drop)(*batch(), generator())


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (lambda x, y: x, r"Tensor|\(2, 3, 4, 4\)"),
        (lambda x, y: (x,), r"\(2, 3, 4, 4\)"),
        (lambda x, y: (x, y, y), r"\(2, 3, 4, 4\), \(2,\), \(2,\)"),
        (lambda x, y: (x[:1], y), r"\(1, 3, 4, 4\), \(2,\)"),
        (lambda x, y: (None, y), r"NoneType, \(2,\)"),
        (lambda x, y: (x, [0, 1]), r"\(2, 3, 4, 4\), list"),
        (lambda x, y: None, "NoneType"),
    ],
)
@pytest.mark.parametrize("per_sample", [True, False])
def test_what_returns_no_batch_is_refused_whatever_its_size(result, got, per_sample):
    def transform(images, labels, generator=None, inplace=False):
        return result(images, labels)

    with pytest.raises(TypeError, match=rf"RandomApply: transforms must be such as return a batch, got '({got}) from"):
        RandomApply(transform, 1.0, per_sample)(*batch(2))


@pytest.mark.parametrize("choice", [RandomApply(lt.Mixup(1.0), 1.0), OneOf([lt.Mixup(1.0)])], ids=repr)
@pytest.mark.parametrize("count", [6, 8])
def test_labels_of_another_number_are_refused(choice, count):
    with pytest.raises(ValueError, match=rf"labels must be one for each image, got '\({count},\) for images \(7, 3, 4"):
        choice(batch()[0], torch.arange(count))


class Module(torch.nn.Module):
    """As torchvision's: it takes images alone."""

    def forward(self, images):
        return images


class Good(torch.nn.Module):
    def forward(self, images, labels, generator=None, inplace=False):
        return images + 1, labels


@pytest.mark.parametrize(
    "transform",
    [Module(), lambda images: images, lambda x, y: (x, y), print],
    ids=["module", "images alone", "no generator", "print"],
)
def test_what_takes_no_batch_is_refused_at_once(transform):
    text = "RandomApply: transforms must be callables of images and labels that know generator= and inplace="
    with pytest.raises(TypeError, match=text):
        RandomApply(transform)


def test_modules_and_functions_of_keywords_are_transforms_too():
    images, labels = batch()
    functions = [Good(), lambda x, y, **options: (x + 1, y)]
    assert torch.equal(RandomApply(functions, 1.0)(images, labels)[0], images + 1 + 1)


@pytest.mark.parametrize("choice", [RandomApply(lt.Mixup(1.0), 0.7), OneOf([lt.Mixup(1.0), lt.CutMix()])], ids=repr)
def test_mix_is_kept_without_gradients(choice):
    """Under no_grad torch hands plain tensors to functions of labels: those of some images lost their mix."""
    images, labels = lt.Mixup(1.0)(*batch(), generator())
    _, expected = choice(images, labels, generator(3))
    with torch.no_grad():
        _, mixed = choice(images, labels, generator(3))
    assert isinstance(mixed, MixedLabels)
    assert torch.equal(lt.soft_targets(mixed, 3), lt.soft_targets(expected, 3))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: OneOf([]), TypeError, r"OneOf: transforms must be a list of transforms, got \[\]"),
        (lambda: OneOf(lt.Mixup(0.2)), TypeError, "OneOf: transforms must be a list of transforms, got Mixup"),
        (lambda: OneOf([lt.Mixup]), TypeError, "OneOf: transforms must be a list of transforms"),
        (
            lambda: OneOf([noise], [1, 2]),
            ValueError,
            r"OneOf: weights must be one for each of the 1 transforms.*got \[1,",
        ),
        (
            lambda: OneOf([noise, noise], [0, 0]),
            ValueError,
            "OneOf: weights must be one for each of the 2 transforms, and one of",
        ),
        (lambda: OneOf([noise, noise], [1, -1]), ValueError, "OneOf: weights must be finite and at least 0, got -1"),
        (lambda: OneOf([noise], "1"), TypeError, "OneOf: weights must be a list of numbers, got '1'"),
        (lambda: OneOf([noise], per_sample=1), TypeError, "OneOf: per_sample must be True or False, got 1"),
        (lambda: OneOf([Halve()]), TypeError, r"OneOf: transforms must be for training only, got Halve\(\)"),
        (lambda: RandomApply(RandomApply), TypeError, "RandomApply: transforms must be a list of transforms"),
        (lambda: RandomApply([]), TypeError, "RandomApply: transforms must be a list of transforms"),
        (
            lambda: RandomApply(noise, 1.5),
            ValueError,
            r"RandomApply: prob must be in \[0, 1\] \(probability\), got 1.5",
        ),
        (lambda: RandomApply(noise, True), TypeError, "RandomApply: prob must be a number"),
        (lambda: RandomApply(noise, 0.5, None), TypeError, "RandomApply: per_sample must be True or False, got None"),
    ],
)
def test_bad_arguments(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("per_sample", [True, False])
def test_no_images_are_no_images(per_sample):
    images, labels = batch(0)
    new, _ = lt.OneOf([lt.Mixup(0.2), lt.Cutout(2)], per_sample=per_sample)(images, labels, generator())
    assert new.shape == images.shape
