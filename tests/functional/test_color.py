import colorsys
import re

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tricks.functional.color import jitter, lighting, normalize, sample_jitter, sample_lighting

DTYPES = [torch.uint8, torch.float32, torch.float64, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
NEUTRAL = torch.tensor([1.0, 1.0, 1.0, 0.0])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(shape, dtype=torch.float32, seed=0):
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator(seed)).to(dtype)
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def changed(image, kind, amount, whole):
    """One image (C, H, W), float64 in [0, 255] or [0, 1], by the definitions; hue by the standard library."""
    top = 255.0 if whole else 1.0
    grey = image.mean(0) if len(image) != 3 else 0.2989 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    grey = grey.floor() if whole and len(image) == 3 else grey
    if kind == 0:
        image = amount * image
    elif kind == 1:
        image = amount * image + (1 - amount) * grey.mean()
    elif kind == 2 and len(image) == 3:
        image = amount * image + (1 - amount) * grey
    elif kind == 3 and len(image) == 3:
        image = image.clone()
        for r in range(image.shape[1]):
            for c in range(image.shape[2]):
                hue, saturation, value = colorsys.rgb_to_hsv(*(image[:, r, c] / top).tolist())
                turned = colorsys.hsv_to_rgb((hue + amount) % 1, saturation, value)
                image[:, r, c] = torch.tensor(turned, dtype=torch.float64) * (255.999 if whole else 1)
    return image.clamp(0, top)


def jitter_by_loop(images, amounts, order):
    whole = not images.is_floating_point()
    results = []
    for image, amount, kinds in zip(images, amounts.tolist(), order.tolist(), strict=True):
        current = image.double()
        for kind in kinds:
            if amount[kind] != NEUTRAL[kind]:
                current = changed(current, kind, amount[kind], whole).to(images.dtype).double()
        results.append(current)
    return torch.stack(results)


def tolerance(dtype):
    return {torch.uint8: 0, torch.float32: 2e-6, torch.float64: 1e-7, torch.bfloat16: 0.02}[dtype]


# ------------------------------------------------------------------ jitter


@pytest.mark.parametrize("kind", range(4), ids=["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_change_is_its_definition(kind, dtype, channels):
    images = pictures((6, channels, 9, 8), dtype)
    images[5] = images[5, :1, :1, :1]  # a grey image, which has no hue
    images[4] = 0
    values = (0.0, 0.3137, 0.7071, 1.3131, 1.9191, 1.4142) if kind < 3 else (-0.5, -0.2, -0.03, 0.1, 0.37, 0.5)
    amounts = NEUTRAL.repeat(6, 1)
    amounts[:, kind] = torch.tensor(values)
    order = torch.arange(4).repeat(6, 1)
    result, expected = jitter(images, amounts, order), jitter_by_loop(images, amounts, order)
    assert result.dtype == dtype
    difference = (result.double() - expected).abs()
    if dtype == torch.uint8:  # what float32 rounds across a whole number is truncated to the one below
        assert difference.max() <= 1
        assert (difference == 0).double().mean() > 0.9
    else:
        assert difference.max() <= tolerance(dtype)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 5),
    st.sampled_from([0, 1, 3]),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from([torch.uint8, torch.float32, torch.float64]),
    st.booleans(),
    st.integers(0, 999),
)
def test_each_image_is_changed_by_its_own_amounts_in_its_own_order(count, channels, sides, dtype, inplace, seed):
    images = pictures((count, channels, *sides), dtype, seed)
    before = images.clone()
    amounts, order = sample_jitter(count, 0.4, 0.5, 0.6, 0.1, generator(seed))
    result = jitter(images, amounts, order, inplace)
    assert (result is images) == inplace
    assert inplace or torch.equal(images, before)
    if channels:
        difference = (result.double() - jitter_by_loop(before, amounts, order)).abs()
        assert difference.max() <= (8 if dtype == torch.uint8 else 1e-4)


def test_bytes_are_those_of_torchvision():
    # torchvision.transforms.v2.functional.adjust_* of torchvision 0.28 on the CPU, of the pixels below, in turn.
    colours = [[200, 30, 90], [10, 250, 128], [77, 76, 75], [0, 0, 255], [255, 255, 255], [128, 64, 3]]
    images = torch.tensor(colours, dtype=torch.uint8).T.reshape(1, 3, 2, 3)
    expected = [
        (0, 0.6, [[120, 18, 54], [6, 150, 76], [46, 45, 45], [0, 0, 153], [153, 153, 153], [76, 38, 1]]),
        (0, 1.7, [[255, 51, 153], [17, 255, 217], [130, 129, 127], [0, 0, 255], [255, 255, 255], [217, 108, 5]]),
        (1, 0.4, [[148, 80, 104], [72, 168, 119], [99, 99, 98], [68, 68, 170], [170, 170, 170], [119, 94, 69]]),
        (1, 1.9, [[255, 0, 68], [0, 255, 140], [43, 41, 39], [0, 0, 255], [255, 255, 255], [140, 18, 0]]),
        (2, 0.25, [[115, 72, 87], [125, 185, 155], [76, 76, 75], [21, 21, 85], [254, 254, 254], [89, 73, 57]]),
        (2, 1.8, [[255, 0, 92], [0, 255, 99], [77, 76, 74], [0, 0, 255], [255, 255, 255], [169, 54, 0]]),
        (3, -0.3, [[30, 56, 200], [250, 176, 10], [76, 75, 77], [0, 255, 51], [255, 255, 255], [89, 3, 128]]),
        (3, 0.15, [[200, 123, 30], [10, 156, 250], [76, 77, 75], [230, 0, 255], [255, 255, 255], [79, 128, 3]]),
        (3, 0.5, [[30, 200, 140], [250, 10, 132], [75, 76, 77], [255, 255, 0], [255, 255, 255], [3, 67, 128]]),
    ]
    for kind, amount, pixels in expected:
        amounts = NEUTRAL.repeat(1, 1)
        amounts[:, kind] = amount
        result = jitter(images, amounts, torch.arange(4).repeat(1, 1))
        assert result.reshape(3, 6).T.tolist() == pixels


def test_the_order_matters_and_is_each_images_own():
    images = pictures((1, 3, 6, 6)).repeat(2, 1, 1, 1)
    amounts = torch.tensor([[1.4, 0.5, 1.0, 0.0]] * 2)
    order = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3]])
    result = jitter(images, amounts, order)
    assert not torch.allclose(result[0], result[1], atol=1e-3)
    for n in (0, 1):
        assert torch.equal(jitter(images[n : n + 1], amounts[:1], order[n : n + 1])[0], result[n])


def test_what_changes_nothing_leaves_the_bits():
    images = pictures((5, 3, 4, 4)) * 3 - 1  # beyond [0, 1]: nothing is clamped where nothing is done
    amounts, order = sample_jitter(5, generator=generator())
    assert torch.equal(amounts, NEUTRAL.repeat(5, 1))
    assert torch.equal(jitter(images, amounts, order), images)


@pytest.mark.parametrize("channels", [2, 4])
def test_images_of_other_channels_have_brightness_and_contrast_only(channels):
    images = pictures((3, channels, 5, 4), torch.float64)
    order = torch.arange(4).repeat(3, 1)
    amounts = torch.tensor([[0.5, 0.7, 1.0, 0.0]]).repeat(3, 1)
    torch.testing.assert_close(
        jitter(images, amounts, order), jitter_by_loop(images, amounts, order), rtol=0, atol=1e-7
    )
    text = f"ColorJitter: images must be of 1 or 3 channels (N, C, H, W), got (3, {channels}, 5, 4). Leave saturation"
    with pytest.raises(ValueError, match=re.escape(text)):
        jitter(images, torch.tensor([[1.0, 1.0, 1.0, 0.1]]).repeat(3, 1), order)


def test_more_images_than_are_worked_on_at_once_are_each_changed():
    images = pictures((6, 3, 300, 300))
    amounts, order = sample_jitter(6, 0.4, 0.4, 0.4, 0.1, generator())
    result = jitter(images, amounts, order)
    for n in range(6):
        alone = jitter(images[n : n + 1], amounts[n : n + 1], order[n : n + 1])
        torch.testing.assert_close(result[n], alone[0], rtol=0, atol=1e-5)


def test_amounts_and_orders_follow_their_laws():
    amounts, order = sample_jitter(6000, 0.4, 1.5, 0.0, 0.1, generator())
    assert amounts.dtype == torch.float32
    for column, low, high in ((0, 0.6, 1.4), (1, 0.0, 2.5), (3, -0.1, 0.1)):
        law = scipy.stats.uniform(low, high - low)
        assert scipy.stats.kstest(amounts[:, column].double().numpy(), law.cdf).pvalue > 1e-3
    assert (amounts[:, 2] == 1).all()
    counts = torch.bincount(order @ torch.tensor([64, 16, 4, 1]))
    counts = counts[counts > 0]
    assert len(counts) == 24
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


# ------------------------------------------------------------------ lighting


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_lighting_is_its_formula_image_by_image(dtype, inplace):
    images = pictures((5, 3, 4, 6), dtype)
    alphas, values, vectors = sample_lighting(5, 0.5, generator()), torch.rand(3), torch.rand(3, 3)
    expected = images.double().clone()
    for n in range(5):
        for c in range(3):
            shift = sum(vectors[c, i].double() * alphas[n, i].double() * values[i].double() for i in range(3))
            expected[n, c] += shift * (255 if dtype == torch.uint8 else 1)
    if dtype == torch.uint8:
        expected = expected.round().clamp(0, 255)
    before = images.clone()
    result = lighting(images, alphas, values, vectors, inplace)
    assert result.dtype == dtype
    assert (result is images) == inplace
    assert inplace or torch.equal(images, before)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=max(tolerance(dtype), 1e-6))


def test_alphas_are_normal():
    alphas = sample_lighting(4000, 0.1, generator())
    for column in alphas.double().T:
        assert scipy.stats.kstest(column.numpy(), scipy.stats.norm(0, 0.1).cdf).pvalue > 1e-3


# ------------------------------------------------------------------ normalisation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_normalisation_is_its_formula(dtype, inplace, channels):
    images = pictures((4, channels, 3, 5), dtype)
    before = images.clone()
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:channels], torch.tensor([0.25, 0.2, 0.3])[:channels]
    values = images.double() / (255 if dtype == torch.uint8 else 1)
    expected = (values - mean.double()[:, None, None]) / std.double()[:, None, None]
    result = normalize(images, mean, std, inplace)
    floating = dtype != torch.uint8
    assert result.dtype == (dtype if floating else torch.float32)
    assert (result is images) == (inplace and floating)
    assert (inplace and floating) or torch.equal(images, before)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=max(2 * tolerance(dtype), 5e-6))


# ------------------------------------------------------------------ all


CALLS = {
    "jitter": lambda images: jitter(images, *sample_jitter(len(images), 0.4, 0.4, 0.4, 0.1, generator())),
    "lighting": lambda images: lighting(images, torch.ones(len(images), 3), torch.ones(3), torch.eye(3)),
    "normalize": lambda images: normalize(images, torch.zeros(3), torch.ones(3)),
}


@every_layout
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_memory_format_is_kept(call, dtype, layout):
    images = pictures((4, 3, 5, 6), dtype).to(memory_format=layout)
    assert call(images).is_contiguous(memory_format=layout)
    torch.testing.assert_close(
        call(images), call(images.contiguous()), rtol=0, atol=1e-6 if dtype.is_floating_point else 1
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_images_of_no_channels_pass(call, dtype):
    assert call(torch.zeros((3, 0, 5, 6), dtype=dtype)).shape == (3, 0, 5, 6)


@pytest.mark.parametrize("call", [CALLS["lighting"], CALLS["normalize"]], ids=["PCALighting", "Normalize"])
def test_other_numbers_of_channels_are_refused(call, request):
    owner = request.node.callspec.id
    text = f"{owner}: images must be of 3 channels (N, C, H, W), got (2, 4, 5, 5). Leave it out for images of other"
    with pytest.raises(ValueError, match=re.escape(text)):
        call(torch.zeros(2, 4, 5, 5))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_images_of_another_number_of_dimensions_are_refused(call):
    with pytest.raises(ValueError, match=re.escape("images must be of shape (N, C, H, W), got (3, 8, 8).")):
        call(torch.zeros(3, 8, 8))


@pytest.mark.parametrize(
    "sample",
    [
        lambda source: torch.cat(sample_jitter(9, 0.4, 0.4, generator=source)),
        lambda source: sample_lighting(9, 1, source),
    ],
    ids=["jitter", "lighting"],
)
def test_amounts_come_from_the_generator_alone(sample):
    source, before = generator(7), torch.get_rng_state()
    first, second = sample(source), sample(source)
    assert torch.equal(first, sample(generator(7)))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    third = sample(None)
    torch.manual_seed(3)
    assert torch.equal(third, sample(None))


@pytest.mark.parametrize("kind", range(4))
def test_gradients_go_through_each_change(kind):
    images = pictures((2, 3, 2, 3), torch.float64).requires_grad_()
    amounts, order = NEUTRAL.repeat(2, 1), torch.arange(4).repeat(2, 1)
    amounts[:, kind] = 0.2
    assert torch.autograd.gradcheck(lambda x: jitter(x, amounts, order), images)
