import itertools
import math

import pytest
import torch

from lightning_tricks.functional.range_test import below_blow_up, heights, smooth, spread, steepest, valley


def curve(seed, count=12):
    generator = torch.Generator().manual_seed(seed)
    return torch.logspace(-3, 0, count).tolist(), torch.randn(count, generator=generator).tolist()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_average_weighs_the_past_geometrically(decay):
    _, losses = curve(0)
    for i, value in enumerate(smooth(losses, decay)):
        weights = [decay ** (i - j) for j in range(i + 1)]
        expected = sum(w * loss for w, loss in zip(weights, losses, strict=False)) / sum(weights)
        assert value == pytest.approx(expected)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_spread_is_the_deviation_of_the_average_of_noise(decay):
    noise = 3.0 * torch.randn(50_000, generator=torch.Generator().manual_seed(0)).double()
    average = torch.tensor(smooth(noise.tolist(), decay))[1000:]
    # The median of |difference| of two normal numbers is 0.954 times their deviation.
    assert spread(noise.tolist(), decay) == pytest.approx(0.954 * float(average.std()), rel=0.05)


@pytest.mark.parametrize("count", [2, 3, 12, 101])
def test_spread_is_a_median_that_neither_an_offset_nor_a_blow_up_moves(count):
    noise = torch.randn(count, generator=torch.Generator().manual_seed(count)).double()
    jumps = torch.diff(noise).abs().sort().values
    assert spread(noise.tolist(), 0.6) == pytest.approx(float(jumps[(count - 1) // 2]) / 2)
    assert spread((7.0 - 100 * noise).tolist()) == pytest.approx(100 * spread(noise.tolist()))
    assert spread([*[2.0, 2.0] * count, 1e3]) == 0.0
    assert spread([1.0]) == 0.0


def slow_heights(losses):
    """The formula, one step at a time."""
    averages = []
    for i in range(len(losses)):
        weights = [0.95 ** (i - j) for j in range(i + 1)]
        averages.append(sum(w * loss for w, loss in zip(weights, losses, strict=False)) / sum(weights))
    if len(losses) <= 10:
        return [0.0] * len(losses)
    jumps = sorted(abs(losses[i] - losses[i - 1]) for i in range(1, len(losses)))
    noise = 4 * jumps[(len(losses) - 1) // 2] * (0.05 / 1.95) ** 0.5
    best = min(averages[i] for i in range(10, len(losses)))
    unit = max(abs(best), averages[10] - best)
    return [0.0] * 10 + [max(0.0, (averages[i] - best - noise) / unit) for i in range(10, len(losses))]


@pytest.mark.parametrize("count", [1, 10, 11, 12, 60])
@pytest.mark.parametrize(
    "trend",
    [
        lambda x: 3 - x,
        lambda x: 3 - 2.9 * x,
        lambda x: -1 - x,
        lambda x: 1 - 2 * x,
        lambda x: math.exp(6 * x),
        lambda x: 2 + (x > 0.9) * math.exp(40 * (x - 0.9)),
    ],
    ids=["falls", "falls below half", "negative", "changes sign", "rises", "blows up"],
)
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.5])
def test_heights_are_those_of_the_formula(trend, count, noise):
    random = torch.randn(count, generator=torch.Generator().manual_seed(count)).tolist()
    losses = [trend(i / count) + noise * r for i, r in enumerate(random)]
    assert heights(losses) == pytest.approx(slow_heights(losses), abs=1e-12)
    assert heights([1e3 * loss for loss in losses]) == pytest.approx(heights(losses), abs=1e-12)


def test_heights_are_ratios_of_positive_losses():
    losses = [2.0] * 20 + [9.0, 30.0]
    assert heights(losses) == pytest.approx([loss / 2 - 1 for loss in smooth(losses)])
    assert heights([5.0] * 10 + [2.0] * 10)[:10] == heights([0.0] * 10) == [0.0] * 10
    assert heights([0.0] * 12) == [0.0] * 12


def test_a_rise_after_a_gain_is_measured_by_the_gain():
    losses = [1.0] * 30 + [0.0] * 400 + [1.0]
    assert smooth(losses)[-2] < 1e-8
    assert heights(losses)[-1] == pytest.approx(0.05, rel=1e-3)  # not 5e7


@pytest.mark.parametrize(
    "loss",
    [lambda noise: (noise / 2).exp().mean(1), lambda noise: noise.square().mean(1)],
    ids=["log-normal", "square of two normal numbers"],
)
def test_noise_alone_never_reaches_the_height_that_ends_a_test(loss):
    for seed in range(50):
        losses = loss(torch.randn(100, 2, generator=torch.Generator().manual_seed(seed))).tolist()
        assert max(heights(losses[:count])[-1] for count in range(1, 101)) < 2


@pytest.mark.parametrize("seed", range(5))
def test_steepest_is_that_of_torchs_gradient(seed):
    lrs, losses = curve(seed)
    slopes = torch.gradient(torch.tensor(losses))[0][1:-1]
    assert steepest(lrs, losses) == lrs[1 + int(slopes.argmin())]


@pytest.mark.parametrize("seed", range(5))
def test_valley_lies_in_a_longest_decreasing_subsequence(seed):
    lrs, losses = curve(seed, 9)
    paths = [p for n in range(1, 10) for p in itertools.combinations(range(9), n)]
    falls = [p for p in paths if all(losses[a] > losses[b] for a, b in itertools.pairwise(p))]
    longest = [p for p in falls if len(p) == max(map(len, falls))]
    halves = {next(i for i in p if losses[i] <= (losses[p[0]] + losses[p[-1]]) / 2) for p in longest}
    assert lrs.index(valley(lrs, losses)) in halves


def quadratic(seed, noise=0.0):
    """A test in plain arithmetic: the rates, the losses, whether it diverged, and the edge, 2 / largest curvature."""
    generator = torch.Generator().manual_seed(seed)
    count = (50, 100, 200)[seed % 3]
    size = int(torch.randint(1, 51, (), generator=generator))
    largest = 10 ** (0.5 + 2.5 * torch.rand((), generator=generator).double())
    curvature = largest * 10 ** (-4 * torch.rand(size, generator=generator).double())
    curvature[0] = largest
    point = torch.randn(size, generator=generator).double() / (curvature.sqrt() if seed % 2 else 1)
    lrs, losses, above = [], [], [0.0]
    while len(lrs) < count and above[-1] <= 3:
        lrs.append(1e-7 * 1e8 ** (len(lrs) / (count - 1)))
        factor = math.exp(noise * float(torch.randn((), generator=generator)))
        losses.append(factor * float((curvature * point**2).sum() / 2))
        point = point - lrs[-1] * curvature * point
        above = heights(losses)
    return lrs, losses, above[-1] > 3, 2 / float(largest)


@pytest.mark.parametrize("seed", range(200))
def test_rate_is_below_the_edge_of_a_quadratic_and_within_ten_of_it(seed):
    lrs, losses, diverged, edge = quadratic(seed)
    assert 0.1 * edge <= below_blow_up(lrs, losses, diverged) <= edge


def test_noise_of_the_loss_leaves_the_rate_below_the_edge():
    ratios = []
    for seed in range(200):
        lrs, losses, diverged, edge = quadratic(seed, noise=0.3)
        ratios.append(below_blow_up(lrs, losses, diverged) / edge)
    assert max(ratios) <= 1
    assert sum(ratio >= 0.1 for ratio in ratios) >= 194


def bounds(lrs, losses, diverged):
    """The three numbers that the formula takes the least of; None where the last one does not hold."""
    above, smoothed, last = heights(losses), smooth(losses), len(losses) - 1
    v = next(i for i in range(last, -1, -1) if above[i] <= 0.2)
    blow_up = lrs[v] / 16
    if diverged:
        growth = 1.0 if v == last else ((1 + above[last]) / (1 + above[v])) ** (1 / (last - v))
        blow_up = lrs[last] / (8 * growth**0.5)
    start = 10 if last >= 10 else last
    best = start + smoothed[start:].index(min(smoothed[start:]))
    fall, h = smoothed[start] - smoothed[best], None
    early = ((1 + 0.95 ** (start + 1)) / (1 - 0.95 ** (start + 1))) ** 0.5  # as an average of few losses varies more
    if fall > max(4 * early * spread(losses), 1e-9 * abs(smoothed[best])):
        h = next(i for i in range(best - 1, -1, -1) if smoothed[i] - smoothed[best] > fall / 2)
    return blow_up, lrs[v] / 8, None if h is None else 2 * lrs[h]


def test_rate_is_that_of_the_formula_and_each_of_its_bounds_matters():
    held = []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        count, falls, grows, noise = (torch.rand(4, generator=generator) * torch.tensor([60, 2.5, 3, 0.3])).tolist()
        count = 11 + int(count)
        random = torch.randn(count, generator=generator).tolist()
        turn = 0.7 * count
        losses = [
            3 - falls * min(i / turn, 1) + math.expm1(max(i - turn, 0) * grows / 10) + noise * r
            for i, r in enumerate(random)
        ]
        lrs = [1e-5 * 1.3**i for i in range(count)]
        for diverged in (True, False):
            expected = bounds(lrs, losses, diverged)
            least = min(bound for bound in expected if bound is not None)
            assert below_blow_up(lrs, losses, diverged) == pytest.approx(least)
            held.append((diverged, expected.index(least), expected[2] is None))
    assert {(diverged, bound) for diverged, bound, _ in held} == set(itertools.product((True, False), (0, 1, 2))) - {
        (False, 1)
    }
    assert {flat for *_, flat in held} == {True, False}


@pytest.mark.parametrize("diverged", [True, False])
@pytest.mark.parametrize("level", [0.7, 2.3, 3.3, 5.535763738401513, -1.1, 0.0])
def test_rounding_of_a_constant_loss_is_no_fall(level, diverged):
    lrs = [1e-5 * 1.3**i for i in range(60)]
    losses = [level] * 59 + [1e3 * (1 + abs(level)) if diverged else level]
    expected = bounds(lrs, losses, diverged)[:2]
    assert below_blow_up(lrs, losses, diverged) == pytest.approx(min(expected))


def test_a_slow_climb_and_a_hidden_blow_up_are_kept_away_from():
    lrs = [10.0 ** (i / 5) for i in range(112)]
    early = [5.0] * 12 + [1.0] * 100  # and nothing more happens: the fall is all that is known
    excess = [4 * 0.95**k * (1 - 0.95**12) / (1 - 0.95 ** (12 + k)) for k in range(101)]
    half = max(k for k in range(101) if excess[k] > (4 + excess[-1]) / 2)
    assert below_blow_up(lrs, early, diverged=False) == pytest.approx(2 * lrs[11 + half])
    late = [5.0] * 111 + [1.0]
    assert below_blow_up(lrs, late, diverged=False) == pytest.approx(lrs[-1] / 16)
    climb = [1.05**i for i in range(112)]
    low = max(i for i, height in enumerate(heights(climb)) if height <= 0.2)
    assert 10 < low < 30
    assert below_blow_up(lrs, climb, diverged=True) == pytest.approx(lrs[low] / 8)
    lrs = [1.05**i for i in range(120)]
    valley_and_climb = [5 - i / 60 if i < 60 else 4 + (i - 60) / 10 for i in range(120)]
    blow_up, climb, half = bounds(lrs, valley_and_climb, diverged=True)
    assert climb < min(blow_up, half)
    assert below_blow_up(lrs, valley_and_climb, diverged=True) == pytest.approx(climb)
