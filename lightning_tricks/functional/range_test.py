"""What the losses of a learning-rate range test say about the rates; `lightning_tricks.lr_finder` makes the test."""

import itertools
import math
import sys
from collections.abc import Sequence

DECAY = 0.95  # of the moving average: it forgets in about 20 steps
VALLEY = 0.2  # a loss lower than this, as `heights` measures it, is in the valley
BURN_IN = 10  # steps until the average is one of enough losses
NOISE = 4.0  # standard deviations that are still noise
MARGIN = 8.0  # how far to stay below the rate at which the blow-up was seen


def smooth(losses: Sequence[float], decay: float = DECAY) -> list[float]:
    """Bias-corrected exponential moving average.

        average = decay * average + (1 - decay) * loss;  smoothed[i] = average / (1 - decay ** (i + 1))

    Args:
        losses: one number a step, in the order of the steps.
        decay: weight of the old average, in [0, 1).
    Returns:
        As many numbers as losses; the first is the first loss.
    Example:
        >>> smooth([1.0, 1.0, 3.0], decay=0.5)
        [1.0, 1.0, 2.142857142857143]
    """
    average, smoothed = 0.0, []
    for i, loss in enumerate(losses, 1):
        average = decay * average + (1 - decay) * loss
        smoothed.append(average / (1 - decay**i))
    return smoothed


def spread(losses: Sequence[float], decay: float = DECAY) -> float:
    """Standard deviation of the moving average that comes of the noise of the losses alone.

        median |losses[i + 1] - losses[i]| * sqrt((1 - decay) / (1 + decay))

    The median difference is about the losses' own standard deviation, and a blow-up at the end does not move it.

    Args:
        losses: one number a step.
        decay: of the average, in [0, 1).
    Returns:
        The deviation; 0 where most losses are equal.
    Example:
        >>> spread([1.0, 2.0, 1.0, 2.0, 90.0], decay=0.6)
        0.5
    """
    jumps = sorted(abs(later - earlier) for earlier, later in itertools.pairwise(losses))
    return jumps[len(jumps) // 2] * math.sqrt((1 - decay) / (1 + decay)) if jumps else 0.0


def heights(losses: Sequence[float]) -> list[float]:
    """How far the smoothed loss of each step is above the best one, beyond noise.

        height = max(smoothed - best - 4 * spread, 0) / max(|best|, first - best)

    As long as the best loss is positive and at least half of the first, this is `smoothed / best - 1` but for noise.
    Else the unit is what was gained: a rise from 1e-9 to 1e-6 is no divergence where the test began at 1, and losses
    may be negative. The first 10 steps, whose average is still one of a few losses, have a height of 0.

    Args:
        losses: at least one, all finite.
    Returns:
        As many numbers as losses, none below 0.
    Example:
        >>> round(heights([2.0] * 20 + [40.0])[-1], 2)
        1.44
    """
    smoothed = smooth(losses)
    settled = smoothed[BURN_IN:] or smoothed[-1:]
    best = min(settled)
    unit = max(abs(best), settled[0] - best, sys.float_info.min)
    floor = best + NOISE * spread(losses)
    return [max(loss - floor, 0.0) / unit if i >= BURN_IN else 0.0 for i, loss in enumerate(smoothed)]


def steepest(lrs: Sequence[float], smoothed: Sequence[float]) -> float:
    """The rate at which the loss fell fastest.

        argmin (smoothed[i + 1] - smoothed[i - 1]) / log(lrs[i + 1] / lrs[i - 1])

    The first tenth is left out: there the average is still one of a few losses.

    Args:
        lrs: at least 3 growing rates.
        smoothed: as many losses.
    Returns:
        One of the rates.
    Example:
        >>> steepest([1e-4, 1e-3, 1e-2, 1e-1, 1.0], [5.0, 4.9, 3.0, 1.0, 2.0])
        0.01
    """
    inner = range(max(1, len(lrs) // 10), len(lrs) - 1)
    return lrs[min(inner, key=lambda i: (smoothed[i + 1] - smoothed[i - 1]) / math.log(lrs[i + 1] / lrs[i - 1]))]


def valley(lrs: Sequence[float], smoothed: Sequence[float]) -> float:
    """The rate half-way down the longest valley: the longest decreasing subsequence of the losses.

    Args:
        lrs: at least one rate, growing.
        smoothed: as many losses.
    Returns:
        One of the rates.
    References:
        Howard and Gugger, "fastai: A Layered API for Deep Learning", 2020, arXiv:2002.04688 (`lr_find`, "valley").
        Deviates: half-way in loss, not in steps; where the loss has no noise its fall begins at the very first step.
    Example:
        >>> valley([1e-4, 1e-3, 1e-2, 1e-1, 1.0], [5.0, 4.9, 3.0, 1.0, 2.0])
        0.01
    """
    length, before = [1] * len(smoothed), [-1] * len(smoothed)
    for i in range(len(smoothed)):
        for j in range(i):
            if smoothed[j] > smoothed[i] and length[j] >= length[i]:
                length[i], before[i] = length[j] + 1, j
    path = [max(range(len(smoothed)), key=length.__getitem__)]
    while before[path[-1]] >= 0:
        path.append(before[path[-1]])
    middle = (smoothed[path[0]] + smoothed[path[-1]]) / 2
    return lrs[next(i for i in reversed(path) if smoothed[i] <= middle)]


def below_blow_up(lrs: Sequence[float], losses: Sequence[float], diverged: bool) -> float:
    """A rate safely below the one at which the loss blew up.

        min(lrs[-1] / (8 * sqrt(growth)), lrs[v] / 8, 2 * lrs[h])
        growth = ((1 + heights[-1]) / (1 + heights[v])) ** (1 / (steps since v))

    `v` is the last step with a height of at most 0.2, `h` the last one before the best at which the smoothed loss was
    more than half-way above it. A blow-up is seen late: what diverges was small when its rate became too large, and has
    first to outgrow the rest of the loss. The faster it grows when it is seen, the farther back it began; a loss grows
    as the square of a distance, hence the root. Where the loss climbs slowly instead, as that of a network with
    normalization, the other two bounds hold; the last one only where the loss fell by more than noise. Without a
    blow-up the first bound is `lrs[v] / 16`: one may be hidden there. The numbers were chosen on simulated quadratics,
    and so that they would not be far off on some small networks.

    Args:
        lrs: at least one rate, growing geometrically.
        losses: as many losses.
        diverged: whether the test ended in a blow-up.
    Returns:
        A rate, perhaps below the first one.
    References:
        Smith, 2017, arXiv:1506.01186, section 3.3. Deviates: a number where the paper reads a plot.
    Example:
        >>> lrs = [0.001 * 2**i for i in range(16)]
        >>> round(below_blow_up(lrs, [3.0] * 11 + [2.0, 1.0, 1.0, 9.0, 999.0], diverged=True), 2)
        1.02
    """
    above, smoothed = heights(losses), smooth(losses)
    last = len(above) - 1
    low = max(i for i, height in enumerate(above) if height <= VALLEY)
    first = lrs[low] / (MARGIN if diverged else 2 * MARGIN)
    if diverged and low < last:
        growth = ((1 + above[last]) / (1 + above[low])) ** (1 / (last - low))
        first = lrs[last] / (MARGIN * math.sqrt(growth))
    begin = min(BURN_IN, last)
    best = min(range(begin, last + 1), key=smoothed.__getitem__)
    fall = smoothed[begin] - smoothed[best]
    # After the burn-in the average is still one of few losses: it varies by more than a settled one.
    early = math.sqrt((1 + DECAY ** (begin + 1)) / (1 - DECAY ** (begin + 1)))
    if fall <= max(NOISE * early * spread(losses), 1e-9 * abs(smoothed[best])):
        return min(first, lrs[low] / MARGIN)
    half = max(i for i in range(begin, best) if smoothed[i] > smoothed[best] + fall / 2)
    return min(first, lrs[low] / MARGIN, 2 * lrs[half])
