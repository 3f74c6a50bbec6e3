import itertools

import pytest
import torch

from lightning_tricks.functional.range_test import below_blow_up, heights, smooth, steepest, valley


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


def test_heights_are_ratios_of_positive_losses_and_have_no_unit():
    losses = [3.0, 2.0, 2.5, 9.0]
    assert heights(losses) == pytest.approx([loss / 2.0 - 1 for loss in losses])
    _, losses = curve(1)
    assert heights([1e3 * loss for loss in losses]) == pytest.approx(heights(losses))
    assert heights([1.0, 0.0, 1e-6, 4.5])[2:] == pytest.approx([1e-6, 4.5])
    assert heights([0.0, 0.0]) == [0.0, 0.0]


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


@pytest.mark.parametrize("seed", range(200))
def test_rate_is_below_the_edge_of_a_quadratic_and_within_ten_of_it(seed):
    """Without noise, in plain arithmetic; the edge is 2 / the largest curvature."""
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
        losses.append(float((curvature * point**2).sum() / 2))
        point = point - lrs[-1] * curvature * point
        above = heights(smooth(losses))
    ratio = below_blow_up(lrs, smooth(losses), above[-1] > 3) * float(largest) / 2
    assert 0.1 <= ratio <= 1


def test_a_slow_climb_and_a_hidden_blow_up_are_kept_away_from():
    lrs = [10.0**i for i in range(5)]
    assert below_blow_up(lrs, [5.0, 4.0, 3.0, 2.0, 1.0], diverged=False) == pytest.approx(
        3 * valley(lrs, [5, 4, 3, 2, 1])
    )
    assert below_blow_up(lrs, [5.0, 5.0, 5.0, 5.0, 1.0], diverged=False) == 1e4 / 16
    assert below_blow_up(lrs, [5.0, 1.0, 1.0, 1.0, 1.0], diverged=True) == 30.0
