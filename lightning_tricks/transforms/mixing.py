"""Mixup and CutMix: images and labels mixed with others of the batch."""

from dataclasses import dataclass, replace

from torch import Generator, Tensor

from lightning_tricks.functional.checks import check_flag, check_images, check_labels, check_number, check_strength
from lightning_tricks.functional.mixing import cutmix, mixup, sample_cutmix, sample_mixup
from lightning_tricks.labels import mix_labels, move_labels
from lightning_tricks.transforms.masks import check_beside, is_mask


@dataclass(frozen=True)
class Mixup:
    """Mix each image and its label with another one of the batch.

        images' = weight * images + (1 - weight) * images[permutation],  weight ~ Beta(alpha, alpha)
        target' = weight * target + (1 - weight) * target[permutation]

    Two images are each other's partners, of an odd number three go round, and each partner is uniform over the other
    images of the batch.

    Args:
        alpha: concentration of the Beta distribution, above 0; 0.2 mixes lightly, 1 draws the weight uniformly.
        per_sample: a weight for each image; otherwise one for the batch.
    Returns:
        Called with (images (N, ...), labels, generator, inplace): mixed images, and MixedLabels of integer labels, a
        floating tensor of floating ones, None of None.
    Raises:
        TypeError, ValueError: alpha is no number above 0, per_sample no bool, or labels not one for each image.
    References:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018, arXiv:1710.09412, eq. 1.
        Deviates: a weight for each image (the authors' code draws one for the batch: `per_sample=False`); no image is
        its own partner.
    Example:
        >>> import torch
        >>> images, labels = Mixup(0.2)(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))
        >>> images.shape, type(labels).__name__
        (torch.Size([4, 1, 8, 8]), 'MixedLabels')
    """

    alpha: float = 0.2
    per_sample: bool = True

    def __post_init__(self) -> None:
        check_number("Mixup", "alpha", self.alpha, "above 0", "Try 0.2", lambda value: value > 0)
        check_flag("Mixup", "per_sample", self.per_sample, "True draws a weight for each image")

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        check_labels("Mixup", labels, images)
        weight, permutation = sample_mixup(len(images), self.alpha, self.per_sample, generator)
        mixed = mixup(images, weight, permutation, inplace)
        return mixed, None if labels is None else mix_labels(labels, weight, permutation)

    def scaled(self, strength: float) -> "Mixup":
        """The same with alpha times a strength above 0."""
        check_strength("Mixup", strength)
        return replace(self, alpha=self.alpha * strength)


@dataclass(frozen=True)
class CutMix:
    """Paste a box of another image of the batch into each, and mix the labels by the area.

        images'[box] = images[permutation][box],  sides sqrt(1 - share) of the image's,  share ~ Beta(alpha, alpha)
        target' = weight * target + (1 - weight) * target[permutation],  weight = 1 - area of the box / of the image

    A box lies around a pixel drawn uniformly; what lies outside the image is clipped, and the weight is that of the
    pixels that were really pasted. Two images are each other's partners, of an odd number three go round, and each
    partner is uniform over the other images of the batch.

    Args:
        alpha: concentration of the Beta distribution, above 0; 1 draws the share uniformly.
        per_sample: a box for each image; otherwise one for the batch.
    Returns:
        Called with (images (N, C, H, W), labels, generator, inplace): mixed images, and MixedLabels of integer labels,
        a floating tensor of floating ones, None of None. Masks (N, H, W) or (N, K, H, W) with the height and width of
        the images are pasted as these are.
    Raises:
        TypeError, ValueError: alpha is no number above 0, per_sample no bool, images not (N, C, H, W), labels not one
            for each image, or labels of three or more dimensions that are no masks.
    References:
        Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", 2019,
        arXiv:1905.04899, eq. 1 and 2.
        Deviates: a box for each image (the authors' code draws one for the batch: `per_sample=False`); no image is its
        own partner; an odd side is pasted in full (the authors' code pastes one pixel less).
    Example:
        >>> import torch
        >>> images, labels = CutMix()(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))
        >>> images.shape, type(labels).__name__
        (torch.Size([4, 1, 8, 8]), 'MixedLabels')
    """

    alpha: float = 1.0
    per_sample: bool = True

    def __post_init__(self) -> None:
        check_number("CutMix", "alpha", self.alpha, "above 0", "Try 1.0", lambda value: value > 0)
        check_flag("CutMix", "per_sample", self.per_sample, "True draws a box for each image")

    def __call__(
        self, images: Tensor, labels: Tensor | None, generator: Generator | None = None, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the transform; see the class."""
        check_images("CutMix", images)
        check_beside("CutMix", labels, images)
        height, width = images.shape[-2:]
        boxes, weight, permutation = sample_cutmix(len(images), height, width, self.alpha, self.per_sample, generator)
        if is_mask(labels, images):
            labels = move_labels(labels, lambda part, fill: cutmix(part, boxes, permutation), 0)
        elif labels is not None:
            labels = mix_labels(labels, weight, permutation)
        return cutmix(images, boxes, permutation, inplace), labels

    def scaled(self, strength: float) -> "CutMix":
        """The same with alpha times a strength above 0."""
        check_strength("CutMix", strength)
        return replace(self, alpha=self.alpha * strength)
