"""Chance: one of several transforms for each image, transforms of some of the images, and a whole chain of them."""

import dataclasses
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Generator, Tensor

from lightning_tricks.functional.checks import check_flag, check_labels, check_number, message
from lightning_tricks.labels import MixedLabels, put_labels, take_labels
from lightning_tricks.transforms.transform import Transform


@dataclass(frozen=True)
class OneOf:
    """Give each image one of several transforms.

        (images', labels')[n] = transforms[k]((images, labels)[n])   with probability weights[k] / sum(weights)

    Each transform sees the images that drew it, as a batch of their own: one that mixes mixes within them. So an image
    that is alone in drawing it stays unmixed, which is rare in large batches: of 4 images that draw one of two such
    transforms it happens to an eighth. With `per_sample=False` it happens to none.

    Args:
        transforms: at least one, as `[Mixup(0.2), CutMix(1.0)]`.
        weights: how often each is drawn, at least 0, in any unit; None draws all equally often.
        per_sample: a draw for each image; otherwise one for the batch.
    Returns:
        Called with (images (N, C, H, W), labels, generator, inplace): images and labels of the same kinds.
    Raises:
        TypeError: what is no transform, or one for every stage.
        ValueError: weights that do not fit; when called per sample, a transform that changes the size or dtype.
    References:
        One of mixup and CutMix for each image: Wightman et al., 2021, arXiv:2110.00476.
    Example:
        >>> import torch
        >>> from lightning_tricks import Cutout, Mixup, OneOf
        >>> images, labels = OneOf([Mixup(0.2), Cutout(4)], weights=[3, 1])(torch.rand(4, 1, 8, 8), torch.arange(4))
        >>> images.shape, type(labels).__name__
        (torch.Size([4, 1, 8, 8]), 'MixedLabels')
    """

    transforms: Sequence[Transform]
    weights: Sequence[float] | None = None
    per_sample: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "transforms", _parts("OneOf", self.transforms))
        check_flag("OneOf", "per_sample", self.per_sample, "False makes one draw for the batch")
        if self.weights is None:
            return
        fix = "Give one for each transform, as in weights=[3, 1]"
        if not isinstance(self.weights, (list, tuple)):
            raise TypeError(message("OneOf", "weights", "a list of numbers", self.weights, fix))
        for weight in self.weights:
            check_number("OneOf", "weights", weight, "finite and at least 0", fix, lambda value: value >= 0)
        if len(self.weights) != len(self.transforms) or not any(self.weights):
            condition = f"one for each of the {len(self.transforms)} transforms, and one of them above 0"
            raise ValueError(message("OneOf", "weights", condition, self.weights, fix))
        object.__setattr__(self, "weights", tuple(self.weights))

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        check_labels("OneOf", labels, images)
        weights = torch.tensor(self.weights or [1.0] * len(self.transforms), dtype=torch.float64, device="cpu")
        count = len(images) if self.per_sample else 1
        # Of no images torch refuses to draw.
        choice = torch.multinomial(weights, max(count, 1), replacement=True, generator=generator)[:count]
        if not self.per_sample:
            return in_turn("OneOf", [self.transforms[int(choice)]], images, labels, generator, inplace)
        new, new_labels = images if inplace else torch.empty_like(images), labels
        for number, transform in enumerate(self.transforms):
            index = (choice == number).nonzero().flatten()
            new_labels = transform_part("OneOf", [transform], (images, labels), index, generator, (new, new_labels))
        return new, new_labels

    def scaled(self, strength: float) -> "OneOf":
        """The same with those transforms that have a strength at this one; at 0 these change nothing."""
        return dataclasses.replace(self, transforms=[at_strength(part, strength) for part in self.transforms])


@dataclass(frozen=True)
class RandomApply:
    """Transform each image with some probability, and leave the others as they are.

        (images', labels')[n] = transforms((images, labels)[n])   with probability prob

    The transforms see the images that were drawn, as a batch of their own: one that mixes mixes within them. So an
    image that is drawn alone stays unmixed: of N images the share prob * (1 - (1 - prob) ** (N - 1)) is mixed, which is
    0.05 instead of 0.1 for N = 8, and 0.1 for N = 64. With `per_sample=False` it is prob.

    Args:
        transforms: a transform, or several that are applied one after another.
        prob: probability of each image, in [0, 1].
        per_sample: a draw for each image; otherwise one for the batch.
    Returns:
        Called with (images (N, C, H, W), labels, generator, inplace): images and labels of the same kinds.
    Raises:
        TypeError: what is no transform, or one for every stage.
        ValueError: a probability outside [0, 1]; when called per sample, a transform that changes the size or dtype.
    Example:
        >>> import torch
        >>> from lightning_tricks import Cutout, RandomApply
        >>> images, _ = RandomApply(Cutout(4), prob=0.5)(torch.ones(100, 1, 8, 8), None)
        >>> 20 < int((images.amin((1, 2, 3)) == 0).sum()) < 80
        True
    """

    transforms: Transform | Sequence[Transform]
    prob: float = 0.5
    per_sample: bool = True

    def __post_init__(self) -> None:
        given: Any = self.transforms
        parts = _parts("RandomApply", given if isinstance(given, (list, tuple)) else [given])
        object.__setattr__(self, "transforms", parts)
        check_prob("RandomApply", self.prob)
        check_flag("RandomApply", "per_sample", self.per_sample, "False makes one draw for the batch")

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        check_labels("RandomApply", labels, images)
        count = len(images) if self.per_sample else 1
        chosen = torch.rand(count, generator=generator, device="cpu", dtype=torch.float32) < self.prob
        if self.per_sample:
            index = chosen.nonzero().flatten()
            return _transform_some("RandomApply", self._parts, images, labels, index, generator, inplace)
        if not chosen.item():
            return images, labels
        return in_turn("RandomApply", self._parts, images, labels, generator, inplace)

    def scaled(self, strength: float) -> "RandomApply":
        """The same with those transforms that have a strength at this one; at 0 these change nothing."""
        return dataclasses.replace(self, transforms=[at_strength(part, strength) for part in self._parts])

    @property
    def _parts(self) -> tuple[Transform, ...]:
        return self.transforms  # type: ignore[return-value]


def unchanged(
    images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The transform that changes nothing.

    Args:
        images, labels: what is returned.
        generator, inplace: not looked at.
    """
    return images, labels


def has_strength(transform: Any) -> bool:
    """Whether a transform, or one of those in it, has a strength.

    Args:
        transform: any.
    Example:
        >>> has_strength(unchanged)
        False
    """
    if isinstance(transform, (OneOf, RandomApply)):
        return any(map(has_strength, transform.transforms))  # type: ignore[arg-type]
    return callable(getattr(transform, "scaled", None))


def at_strength(transform: Transform, strength: float) -> Transform:
    """A transform at another strength.

    Args:
        transform: any.
        strength: at least 0; 1 is the transform as it is.
    Returns:
        At 0 one that changes nothing; the argument itself where it has no strength.
    Example:
        >>> at_strength(OneOf([unchanged]), 0.5) == OneOf([unchanged])
        True
    """
    if strength == 1 or not has_strength(transform):
        return transform
    if strength > 0 or isinstance(transform, (OneOf, RandomApply)):
        return transform.scaled(strength)  # type: ignore[no-any-return, attr-defined]
    return unchanged


def in_every_stage(transform: Any) -> bool:
    """Whether a transform is for validation, test and predict too: its class says `every_stage = True`."""
    return bool(getattr(transform, "every_stage", False))


def apply_chain(
    owner: str,
    transforms: Iterable[Transform],
    images: Tensor,
    labels: Tensor | None,
    generator: Generator | None = None,
    prob: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Apply transforms one after another to images of which each is drawn once for the whole chain.

    Args:
        owner: class named in an error.
        transforms: those for every stage are applied to all images, whatever is drawn.
        images: (N, C, H, W); not overwritten, unlike what one transform makes for the next.
        labels: (N, ...) or None.
        generator: CPU generator of all draws.
        prob: probability that an image is transformed, in [0, 1].
    Returns:
        The new images and labels.
    """
    given, index = images, None
    if prob < 1:
        chosen = torch.rand(len(images), generator=generator, device="cpu", dtype=torch.float32) < prob
        index = chosen.nonzero().flatten()
    for always, group in groupby(transforms, in_every_stage):
        inplace = _is_new(images, given)
        if always or index is None:
            images, labels = in_turn(owner, group, images, labels, generator, inplace)
        else:
            images, labels = _transform_some(owner, list(group), images, labels, index, generator, inplace)
    return images, labels


def in_turn(
    owner: str,
    transforms: Iterable[Transform],
    images: Tensor,
    labels: Tensor | None,
    generator: Generator | None,
    inplace: bool,
) -> tuple[Tensor, Tensor | None]:
    """Apply transforms one after another, in place from the first on that made new images.

    Args:
        owner: class named in an error.
        transforms: any number.
        images: (N, C, H, W).
        labels: (N, ...) or None.
        generator: CPU generator of all draws.
        inplace: whether `images` may be overwritten.
    Returns:
        The new images and labels.
    Raises:
        TypeError: a transform that returns no images and labels, or as many of them, or loses the mix of the labels.
    """
    given = images
    for transform in transforms:
        mixed = isinstance(labels, MixedLabels)
        result = transform(images, labels, generator=generator, inplace=inplace or _is_new(images, given))
        _check_result(owner, transform, result)
        images, labels = result
        if mixed and labels is not None and not (isinstance(labels, MixedLabels) or labels.is_floating_point()):
            fix = "Put it before those that mix labels, or let it index them, which keeps the mix"
            raise TypeError(message(owner, "transforms", "one that keeps the mix of the labels", transform, fix))
    return images, labels


def _check_result(owner: str, transform: Transform, result: Any) -> None:
    """A tensor is looked at too: of two images it would be taken for images and labels."""
    pair = result if isinstance(result, (tuple, list)) else [result]
    batch = [part for part in pair if isinstance(part, Tensor) and part.dim() > 0]
    is_pair = len(pair) == 2 and len(batch) == 2 - (pair[1] is None) and batch[0] is pair[0]
    if not is_pair or len(batch[0]) != len(batch[-1]):
        kinds = ", ".join(str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in pair)
        fix = "Return (images, labels), as many labels as images, or None"
        raise TypeError(message(owner, "transforms", "such as return a batch", f"{kinds} from {transform}", fix))


def transform_part(
    owner: str,
    transforms: Sequence[Transform],
    batch: tuple[Tensor, Tensor | None],
    index: Tensor,
    generator: Generator | None,
    new: tuple[Tensor, Tensor | None],
) -> Tensor | None:
    """Transform some images of a batch, as a batch of their own, and write them into another.

    Args:
        owner: class named in an error.
        transforms: applied one after another; not called for no images.
        batch: images (N, C, H, W) and labels.
        index: (n,) int64 on the CPU, which images.
        generator: CPU generator of all draws.
        new: images that are written to, which may be the same, and labels of the other images so far.
    Returns:
        The labels with those of these images.
    Raises:
        TypeError: a transform that has labels only before or only after.
        ValueError: images of another number, size or dtype afterwards.
    """
    (images, labels), (new_images, new_labels) = batch, new
    if len(index) == 0:
        return new_labels
    where = index.to(images.device, non_blocking=True)
    some = images.index_select(0, where)
    some_labels = None if labels is None else take_labels(labels, index)
    part, part_labels = in_turn(owner, transforms, some, some_labels, generator, inplace=True)
    if part.shape != (len(index), *images.shape[1:]) or part.dtype != images.dtype:
        condition = f"such as keep {tuple(images.shape[1:])} {images.dtype} where only some images are transformed"
        fix = "Apply it to all images, in a BatchTransforms of its own"
        got = f"{tuple(part.shape[1:])} {part.dtype} of {len(part)} for {len(index)}, by {list(transforms)}"
        raise ValueError(message(owner, "transforms", condition, got, fix))
    new_images.index_copy_(0, where, part)
    if new_labels is None and part_labels is None:
        return None
    if new_labels is None or part_labels is None:
        fix = "Return the labels as they came where they are not changed"
        raise TypeError(message(owner, "transforms", "such as keep the labels", list(transforms), fix))
    return put_labels(new_labels, index, part_labels)


def _transform_some(
    owner: str,
    transforms: Sequence[Transform],
    images: Tensor,
    labels: Tensor | None,
    index: Tensor,
    generator: Generator | None,
    inplace: bool,
) -> tuple[Tensor, Tensor | None]:
    if len(index) == 0:
        return images, labels
    new = images if inplace else images.clone()
    return new, transform_part(owner, transforms, (images, labels), index, generator, (new, labels))


def _is_new(images: Tensor, given: Tensor) -> bool:
    """Whether images lie in memory of their own, and each value in a place of its own."""
    if images.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
        return False
    return all(step > 0 or size == 1 for step, size in zip(images.stride(), images.shape, strict=True))


def check_transforms(owner: str, transforms: Any) -> list[Transform]:
    """Transforms as a list; raise unless there is at least one.

    Args:
        owner: class named in the error.
        transforms: a list or tuple of callables.
    Raises:
        TypeError: another thing, an empty list, a class instead of an instance, or what cannot be called so.
    """
    chosen = list(transforms) if isinstance(transforms, (list, tuple)) else []
    if not chosen or not all(callable(transform) and not isinstance(transform, type) for transform in chosen):
        fix = "Give at least one, as in [Mixup(0.2)]"
        raise TypeError(message(owner, "transforms", "a list of transforms", transforms, fix))
    for transform in chosen:
        if not _takes_a_batch(transform):
            fix = "Wrap it in a function that does: (images, labels, generator=None, inplace=False)"
            condition = "callables of images and labels that know generator= and inplace="
            raise TypeError(message(owner, "transforms", condition, transform, fix))
    return chosen


def _takes_a_batch(transform: Any) -> bool:
    call = transform.forward if isinstance(transform, torch.nn.Module) else transform  # a module's takes anything
    try:
        inspect.signature(call).bind(None, None, generator=None, inplace=False)
    except TypeError:
        return False
    except ValueError:  # what is not written in Python may tell none
        return True
    return True


def check_prob(owner: str, prob: Any) -> None:
    """Raise unless the value is a probability.

    Args:
        owner: class named in the error.
        prob: what came.
    Raises:
        TypeError, ValueError: it is no number in [0, 1].
    """
    fix = "It is the chance of each image to be transformed"
    check_number(owner, "prob", prob, "in [0, 1] (probability)", fix, lambda value: 0 <= value <= 1)


def _parts(owner: str, transforms: Any) -> tuple[Transform, ...]:
    parts = check_transforms(owner, transforms)
    for part in parts:
        if in_every_stage(part):
            fix = "Put it beside this one, where validation finds it"
            raise TypeError(message(owner, "transforms", "for training only", part, fix))
    return tuple(parts)
