import collections
import dataclasses
import types
from collections import namedtuple
from dataclasses import dataclass, field

import pytest
import torch
from kit import assert_same

from lightning_tricks.callbacks.batches import check_place, describe, is_none_at, name_place, read_place, write_place

Pair = namedtuple("Pair", "image label")


@dataclass
class Sample:
    image: object
    label: object = None


@dataclass(frozen=True)
class Frozen:
    image: object
    label: object = None
    made: int = field(default=7, init=False)


@dataclass(frozen=True, slots=True)
class Slots:
    image: object
    label: object = None


class Plain:
    def __init__(self, image, label=None):
        self.image, self.label = image, label


class Guarded:
    """An object that sets its image in a way of its own."""

    def __init__(self, image, label=None):
        self._image, self.label = image, label

    @property
    def image(self):
        return self._image

    @image.setter
    def image(self, value):
        self._image = value


class MyDict(dict):
    pass


def image(value=0.0):
    return torch.full((2, 1, 3, 3), value)


def as_dict(image, label=None):
    return {"image": image, "label": label}


def as_my_dict(image, label=None):
    return MyDict(image=image, label=label)


def as_user_dict(image, label=None):
    return collections.UserDict(image=image, label=label)


LEAVES = {
    "tuple": (lambda image, label=None: (image, label), 0),
    "list": (lambda image, label=None: [image, label], 0),
    "from the end": (lambda image, label=None: [label, image], -1),
    "dict": (as_dict, "image"),
    "dict of numbers": (lambda image, label=None: {0: image, 1: label}, 0),
    "subclass of dict": (as_my_dict, "image"),
    "user dict": (as_user_dict, "image"),
    "default dict": (lambda image, label=None: collections.defaultdict(list, image=image, label=label), "image"),
    "named tuple": (Pair, "image"),
    "named tuple by index": (Pair, 0),
    "dataclass": (Sample, "image"),
    "frozen dataclass": (Frozen, "image"),
    "frozen dataclass with slots": (Slots, "image"),
    "object": (Plain, "image"),
    "simple namespace": (lambda image, label=None: types.SimpleNamespace(image=image, label=label), "image"),
    "object with a property": (Guarded, "image"),
    "name with a dot": (lambda image, label=None: {"image.png": image, "cls": label}, "image.png"),
}


@pytest.mark.parametrize("outer", [None, *LEAVES])
def test_item_is_read_and_written_into_a_copy(outer):
    for make, key in LEAVES.values():
        inner = batch = make(image(), "label")
        place = key
        if outer:
            make_outer, outer_key = LEAVES[outer]
            batch, place = make_outer(inner, "beside"), (outer_key, key)
        assert read_place(batch, place) is (inner.image if hasattr(inner, "image") else inner[key])
        new = write_place(batch, place, image(1.0))
        assert type(new) is type(batch)
        assert torch.equal(read_place(new, place), image(1.0))
        assert torch.equal(read_place(batch, place), image(0.0))
        assert "Tensor(2, 1, 3, 3) float32" in describe(batch)
        if isinstance(inner, Frozen):
            assert (read_place(new, outer_key) if outer else new).made == 7


def test_path_may_be_written_with_dots():
    batch = ({"inputs": [Sample(image(3.0)), "x"], "a.b": {"c": 1}}, "y")
    assert_same(read_place(batch, "0.inputs.0.image"), image(3.0))
    new = write_place(batch, "0.inputs.-2.image", image(4.0))
    assert_same(read_place(new, (0, "inputs", 0, "image")), image(4.0))
    assert_same(read_place(batch, "0.inputs.0.image"), image(3.0))
    assert read_place(batch, (0, "a.b", "c")) == 1


def test_name_with_dots_comes_before_a_path():
    assert read_place({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert read_place({"a": {"b": 2}}, "a.b") == 2
    assert read_place({"a.b": 1, "a": {"b": 2}}, ("a", "b")) == 2


def test_number_written_as_text_is_a_key_before_it_is_an_index():
    assert read_place({"0": "text", 0: "number"}, "0") == "text"
    assert read_place({0: "number"}, "0") == "number"
    assert read_place(["first"], "0") == "first"


@pytest.mark.parametrize(
    ("batch", "place"),
    [
        ((1, 2), 5),
        ((1, 2), "image"),
        ({"image": 1}, "label"),
        ({"image": 1}, 0),
        ({"image": torch.zeros(2, 3)}, ("image", 0)),
        (torch.zeros(2, 3), 0),
        (torch.zeros(2, 3), "data"),
        (Plain(1), "x"),
        (Plain(1), 0),
        (None, "a.b"),
        ({"a": {"b": 1}}, "a.c"),
        ({"a": {"b": 1}}, "x.b"),
    ],
)
def test_what_is_not_there_is_none(batch, place):
    assert read_place(batch, place) is None


def test_default_dict_gets_no_new_keys():
    batch = collections.defaultdict(list, image=1)
    assert read_place(batch, "label") is None
    assert list(batch) == ["image"]


def test_functions():
    def get(batch):
        return batch["views"][-1]

    def put(batch, value):
        return {**batch, "views": [*batch["views"][:-1], value]}

    batch = {"views": [1, 2], "y": 3}
    assert read_place(batch, (get, put)) == 2
    assert write_place(batch, (get, put), 5) == {"views": [1, 5], "y": 3}
    assert batch == {"views": [1, 2], "y": 3}
    assert name_place((get, put)) == "test_functions.<locals>.get.test_functions.<locals>.put"


def test_function_that_returns_no_batch_is_refused():
    with pytest.raises(TypeError, match="put must be a function that returns a batch, got None. Return the new batch"):
        write_place({"a": 1}, (lambda batch: 1, lambda batch, value: batch.update(a=value)), 2)


@pytest.mark.parametrize("place", [None, 1.0, True, (), (0, None), [0], (len,), (len, 0), (len, len, len), {"a": 1}])
def test_what_is_no_place(place):
    with pytest.raises(TypeError, match="Owner: images must be an index or a key, or a path of them, got "):
        check_place("Owner", "images", place)


@pytest.mark.parametrize("place", [0, -1, "image", "a.b", ("a", 0), ("a",), (len, setattr)])
def test_what_is_a_place(place):
    check_place("Owner", "images", place)


def test_description_of_nested_structures():
    x = torch.zeros(2, 3)
    text = describe({"a": Pair(Frozen([x, "text"]), Plain((x,))), "b": None, "n": 3})
    assert text == (
        "{'a': Pair(image=Frozen(image=[Tensor(2, 3) float32, str], label=NoneType), "
        "label=Plain(image=(Tensor(2, 3) float32), label=NoneType)), 'b': NoneType, 'n': int}"
    )
    assert describe(Slots(x)) == "Slots(image=Tensor(2, 3) float32, label=NoneType)"


def test_description_of_much_and_deep_structures_is_short():
    assert describe(list(range(9))) == "[int, int, int, int, int, int, ...]"
    assert describe(dict.fromkeys(range(7), 0)) == "{0: int, 1: int, 2: int, 3: int, 4: int, 5: int, ...}"
    assert describe([[[[[[1]]]]]]) == "[[[[[...]]]]]"
    loop = []
    loop.append(loop)
    assert describe(loop) == "[[[[[...]]]]]"
    assert describe([]) == "[]"
    assert describe(Sample) == "type"


def test_copy_shares_what_is_beside_the_way():
    beside = [1, 2]
    batch = {"inputs": {"image": image(), "other": beside}, "meta": beside}
    new = write_place(batch, "inputs.image", image(1.0))
    assert new["meta"] is beside
    assert new["inputs"]["other"] is beside
    assert new["inputs"] is not batch["inputs"]


def test_dataclass_is_not_made_anew():
    made = []

    @dataclass
    class Checked:
        image: object

        def __post_init__(self):
            made.append(self)

    write_place(Checked(image()), "image", image(1.0))
    assert len(made) == 1
    assert dataclasses.is_dataclass(Checked)


@pytest.mark.parametrize(
    ("batch", "place", "expected"),
    [
        ({"a": None}, "a", True),
        ({"a": None}, "a.0", True),
        ({"a": None}, ("a", 0, "image"), True),
        ({"a": [None, 1]}, "a.0", True),
        ({"a": [None, 1]}, "a.1", False),
        ({"a": None}, "b.0", False),
        ([None, 1], 0, True),
        ([None, 1], 2, False),
        (Sample(None), "image", True),
        (Sample(None), "picture", False),
        ({"a": None}, (lambda batch: None, lambda batch, value: batch), False),
    ],
)
def test_none_is_told_from_nothing(batch, place, expected):
    assert is_none_at(batch, place) is expected
