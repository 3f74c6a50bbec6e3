"""Where the images, labels and masks of a batch sit: read together, checked, and written into a copy."""

from typing import Any, NamedTuple

from torch import Tensor

from lightning_tricks.callbacks.batches import (
    Place,
    check_place,
    describe,
    is_none_at,
    name_place,
    read_place,
    write_place,
)
from lightning_tricks.functional.checks import check_labels, message
from lightning_tricks.transforms.masks import is_mask


class Items(NamedTuple):
    """What transforms see of a batch."""

    images: list[Tensor]
    labels: Tensor | None
    masks: list[Tensor]


class Layout:
    """The places of a batch.

    Args:
        owner: callback named in errors.
        images: place or list of places, at least one.
        labels: place, or None.
        masks: place or list of places, or None.
    Raises:
        TypeError: what is no place.
        ValueError: two of one place.
    """

    def __init__(
        self, owner: str, images: Place | list[Place], labels: Place | None, masks: Place | list[Place] | None
    ) -> None:
        self._owner = owner
        self._images = _several(images)
        self._masks = [] if masks is None else _several(masks)
        self._labels = labels
        named = [("images", self._images), ("labels", [] if labels is None else [labels]), ("masks", self._masks)]
        taken = set[Any]()
        for name, places in named:
            for place in places:
                check_place(owner, name, place)
                key = place if isinstance(place, tuple) and callable(place[0]) else str(name_place(place))
                if key in taken:
                    fix = "Say where each is; labels=None where there are none"
                    raise ValueError(message(owner, name, "places of their own", place, fix))
                taken.add(key)
        if not self._images:
            fix = "Say where they are in a batch, as 0 or 'image'"
            raise TypeError(message(owner, "images", "at least one place", images, fix))
        self.settings: dict[str, Any] = {
            "images": _named(images),
            "labels": None if labels is None else name_place(labels),
            **({"masks": _named(masks)} if self._masks else {}),
        }
        """What the run's configuration shows."""

    def is_empty(self, batch: Any) -> bool:
        """Whether a batch says that it has no images, and has no labels or masks either.

        Args:
            batch: a batch of any stage.
        """
        others = [*self._masks, *([] if self._labels is None else [self._labels])]
        images = all(is_none_at(batch, place) for place in self._images)
        return images and all(read_place(batch, place) is None for place in others)

    def read(self, batch: Any) -> Items:
        """What the transforms see.

        Args:
            batch: a training batch.
        Returns:
            Images, labels and masks.
        Raises:
            TypeError: no tensors where they should be; the error describes the batch.
            ValueError: labels or masks that do not fit the images, or images of several sizes.
        """
        images, masks = self._tensors(batch, self._images), self._tensors(batch, self._masks)
        labels = None if self._labels is None else read_place(batch, self._labels)
        if isinstance(batch, Tensor):  # its rows are samples, not images and labels
            images = [batch] if len(self._images) == 1 and self._labels is None else None
        fits = self._labels is None or isinstance(labels, Tensor)
        if images is None or masks is None or not fits:
            places = ", ".join(f"{name}={place!r}" for name, place in self.settings.items())
            fix = (
                "Say where they are with images= and labels= (a tuple is a path, a list has several places), or"
                " labels=None for images alone"
            )
            condition = f"one with tensors at {places.replace(', labels', ' and labels')}"
            raise TypeError(message(self._owner, "batch", condition, describe(batch), fix))
        self._check(images, labels, masks)
        return Items(images, labels, masks)

    def read_images(self, batch: Any) -> list[Tensor]:
        """The images alone, of a batch that may have nothing else.

        Args:
            batch: a batch of any stage.
        Raises:
            TypeError: no tensors where they should be; the error describes the batch.
        """
        images = [batch] if isinstance(batch, Tensor) else self._tensors(batch, self._images)
        if images is None or len(images) < len(self._images):
            condition = f"one with tensors at images={self.settings['images']!r}, in every stage"
            fix = "A transform for every stage (Normalize) needs them in validation, test and predict too"
            raise TypeError(message(self._owner, "batch", condition, describe(batch), fix))
        return images

    def write(self, batch: Any, items: Items) -> Any:
        """A copy of a batch with other images, labels and masks.

        Args:
            batch: what they were read from.
            items: what they become; labels of None and missing masks stay as they are.
        Returns:
            A batch of the same structure; the argument is untouched.
        """
        if isinstance(batch, Tensor):
            return items.images[0]
        places = [*self._images, *self._masks[: len(items.masks)]]
        values: list[Tensor] = [*items.images, *items.masks]
        if self._labels is not None and items.labels is not None:
            places, values = [*places, self._labels], [*values, items.labels]
        for place, value in zip(places, values, strict=True):
            batch = write_place(batch, place, value)
        return batch

    def _tensors(self, batch: Any, places: list[Place]) -> list[Tensor] | None:
        found = [read_place(batch, place) for place in places]
        return found if all(isinstance(item, Tensor) for item in found) else None

    def _check(self, images: list[Tensor], labels: Tensor | None, masks: list[Tensor]) -> None:
        first = images[0]
        check_labels(self._owner, labels, first, "Say where they are with labels=")
        if any((len(other), other.shape[2:]) != (len(first), first.shape[2:]) for other in images[1:]):
            got = ", ".join(str(tuple(image.shape)) for image in images)
            fix = "Images that go by the same draw have one number, height and width; resize them, or leave some out"
            raise ValueError(message(self._owner, "images", "of one height and width", got, fix))
        for mask in masks:
            if not is_mask(mask, first) or len(mask) != len(first):
                got = f"{tuple(mask.shape)} for images {tuple(first.shape)}"
                fix = "Resize them to the images"
                raise ValueError(message(self._owner, "masks", "of shape (N, H, W) or (N, K, H, W)", got, fix))


def _several(places: Place | list[Place]) -> list[Place]:
    return list(places) if isinstance(places, list) else [places]


def _named(places: Place | list[Place] | None) -> Any:
    return [name_place(place) for place in places] if isinstance(places, list) else places and name_place(places)
