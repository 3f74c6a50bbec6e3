"""What every schedule must give: torch's own schedulers, stepped, or where torch has none the formula in a loop."""

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
)

from lightning_tricks.functional.schedules import (
    Constant,
    Cooldown,
    Cosine,
    CosineRestarts,
    Exponential,
    InverseSqrt,
    InverseTime,
    Join,
    Linear,
    OneCycle,
    Polynomial,
    Schedule,
    Steps,
    Triangular,
    Warmup,
    WarmupCosine,
    WarmupStableDecay,
)

LENGTHS = [1, 2, 3, 7, 10, 51]
Factors = Callable[[int], list[float]]


class Case(NamedTuple):
    """A schedule for a run of `total` steps, and the factors at 0, 1, ..., total that it must give."""

    label: str
    schedule: Callable[[int], Schedule]
    factors: Factors
    least: int = 1
    """Shortest run of the case."""


def our_factors(schedule: Schedule, total: int, steps: int | None = None) -> list[float]:
    return [schedule(k, total) for k in range((total if steps is None else steps) + 1)]


def torch_values(make_scheduler: Callable[[Any], Any], steps: int, key: str = "lr") -> list[float]:
    """The learning rate or the momentum before the first step and after each, from a learning rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0, momentum=0.5)
    scheduler = make_scheduler(optimizer)
    values = [float(optimizer.param_groups[0][key])]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        values.append(float(optimizer.param_groups[0][key]))
    return values


def stepped(make_scheduler: Callable[[Any, int], Any]) -> Factors:
    return lambda total: torch_values(lambda optimizer: make_scheduler(optimizer, total), total)


def at_every_step(formula: Callable[[int, int], float]) -> Factors:
    return lambda total: [formula(k, total) for k in range(total + 1)]


# ------------------------------------------------------------------ plain shapes


def constants() -> Iterable[Case]:
    for value in (0.0, 0.3, 1.0):
        torchs = stepped(lambda o, total, value=value: ConstantLR(o, value, total_iters=10 * total))
        yield Case(f"{value}", lambda total, value=value: Constant(value), torchs)


def lines() -> Iterable[Case]:
    for start, end in ((1.0, 0.0), (0.2, 1.0), (1.0, 0.3), (0.5, 0.5)):
        torchs = stepped(lambda o, total, ends=(start, end): LinearLR(o, *ends, total_iters=total))
        yield Case(f"{start} to {end}", lambda total, ends=(start, end): Linear(*ends), torchs)


def cosines() -> Iterable[Case]:
    for end in (0.0, 0.1, 1.0, 1.5):
        torchs = stepped(lambda o, total, end=end: CosineAnnealingLR(o, T_max=total, eta_min=end))
        yield Case(f"to {end}", lambda total, end=end: Cosine(end), torchs)


def polynomials() -> Iterable[Case]:
    for power in (1.0, 2, 0.5, 0.9):
        torchs = stepped(lambda o, total, power=power: PolynomialLR(o, total_iters=total, power=power))
        yield Case(f"power {power}", lambda total, power=power: Polynomial(power), torchs)
    yield Case(
        "to 0.25, torch has only 0",
        lambda total: Polynomial(2.0, end=0.25),
        at_every_step(lambda k, total: 0.25 + 0.75 * (1 - k / total) * (1 - k / total)),
    )


def exponentials() -> Iterable[Case]:
    for end in (0.01, 0.95**30, 1.0, 3.0):
        torchs = stepped(lambda o, total, end=end: ExponentialLR(o, gamma=end ** (1 / total)))
        yield Case(f"to {end:.3g}", lambda total, end=end: Exponential(end), torchs)


def steps() -> Iterable[Case]:
    def torchs(milestones: Callable[[int], list[int]], gamma: float) -> Factors:
        return stepped(lambda o, total: MultiStepLR(o, milestones(total), gamma))

    def thirds(total: int) -> list[int]:
        return sorted({1, total // 3 + 1, total})

    yield Case("steps", lambda total: Steps(thirds(total), 0.5), torchs(thirds, 0.5))
    yield Case("from step 0", lambda total: Steps([0, total]), torchs(lambda total: [0, total], 0.1))
    yield Case("rising", lambda total: Steps((1,), gamma=2), torchs(lambda total: [1], 2))
    for fractions in ((0.5,), (0.3, 0.7), (0.1, 0.2, 0.9)):
        # torch drops at the first whole step that is not before a fractional milestone
        whole = [Fraction(str(fraction)) for fraction in fractions]
        up = torchs(lambda total, whole=whole: [math.ceil(fraction * total) for fraction in whole], 0.1)
        yield Case(f"at {fractions}", lambda total, fractions=fractions: Steps(fractions), up)


def inverses() -> Iterable[Case]:
    for timescale in (1, 4, 10_000):  # big_vision's rsqrt
        rsqrt = at_every_step(lambda k, total, timescale=timescale: 1 / math.sqrt(1 + k / timescale))
        yield Case(f"timescale {timescale}", lambda total, timescale=timescale: InverseSqrt(timescale), rsqrt)
    rsqrt = at_every_step(lambda k, total: 1 / math.sqrt(1 + k / (0.3 * total)))
    yield Case("timescale 0.3 of the run", lambda total: InverseSqrt(0.3), rsqrt)


def inverse_times() -> Iterable[Case]:
    for timescale in (1, 4, 10_000):
        torchs = stepped(lambda o, total, timescale=timescale: LambdaLR(o, lambda k: 1 / (1 + k / timescale)))
        yield Case(f"timescale {timescale}", lambda total, timescale=timescale: InverseTime(timescale), torchs)
    inverse = at_every_step(lambda k, total: 1 / (1 + k / (0.3 * total)))
    yield Case("timescale 0.3 of the run", lambda total: InverseTime(0.3), inverse)


# ------------------------------------------------------------------ cycles


def walk(step: int, total: int, first: Fraction, multiplier: Fraction) -> tuple[int, Fraction]:
    """The cycle that a step is in and how much of it is done, cycle after cycle in exact arithmetic. The end of the run
    is the end of a cycle and not the beginning of the next one."""
    cycle, begin, length = 0, Fraction(0), first
    while begin + length < step or (begin + length == step and step < total):
        cycle, begin, length = cycle + 1, begin + length, length * multiplier
    return cycle, (step - begin) / length


def first_of(cycles: int, multiplier: Fraction, total: int) -> Fraction:
    """Length of the first of the cycles that fill a run."""
    lengths = [Fraction(1)]
    while len(lengths) < cycles:
        lengths.append(lengths[-1] * multiplier)
    return total / sum(lengths)


def decaying_restarts(step: int, total: int, first: Fraction, multiplier: float, gamma: float, end: float) -> float:
    cycle, x = walk(step, total, first, Fraction(multiplier))
    peak = 1.0
    for _ in range(cycle):
        peak = end + (peak - end) * gamma
    return end + (peak - end) * (1 + math.cos(math.pi * float(x))) / 2


def decaying_triangles(step: int, total: int, first: Fraction, gamma: float, low: float, up: Fraction) -> float:
    cycle, x = walk(step, total, first, Fraction(1))
    peak = 1.0
    for _ in range(cycle):
        peak = low + (peak - low) * gamma
    return low + (peak - low) * float(x / up if x <= up else (1 - x) / (1 - up))


def restarts() -> Iterable[Case]:
    def torchs(length: int, multiplier: int, end: float) -> Factors:
        def factors(total: int) -> list[float]:
            values = stepped(lambda o, total: CosineAnnealingWarmRestarts(o, length, multiplier, eta_min=end))(total)
            # where a cycle ends with the run, torch has begun a new one there; we are at the end of ours
            if walk(total, total, Fraction(length), Fraction(multiplier))[1] == 1:
                assert values[-1] == 1.0
                values[-1] = end
            return values

        return factors

    for length, multiplier, end in ((1, 1, 0.0), (3, 1, 0.1), (7, 1, 1.5), (1, 2, 0.0), (3, 2, 0.2), (1, 3, 0.0)):
        yield Case(
            f"length {length}, multiplier {multiplier}, to {end}",
            lambda total, values=(length, multiplier, end): CosineRestarts(
                length=values[0], multiplier=values[1], end=values[2]
            ),
            torchs(length, multiplier, end),
        )
    for cycles, multiplier, gamma, end in (
        (1, 1, 1, 0.0),
        (3, 1, 0.5, 0.1),
        (2, 1.5, 1, 0.0),
        (4, 1.25, 0.8, 0.3),
        (5, 3, 0.9, 0.0),
        (3, 1 + 1e-8, 0.5, 0.0),
    ):
        yield Case(
            f"{cycles} cycles, multiplier {multiplier}, gamma {gamma}, to {end}",
            lambda total, values=(cycles, multiplier, gamma, end): CosineRestarts(
                cycles=values[0], multiplier=values[1], gamma=values[2], end=values[3]
            ),
            at_every_step(
                lambda k, total, c=cycles, m=multiplier, gamma=gamma, end=end: decaying_restarts(
                    k, total, first_of(c, Fraction(m), total), m, gamma, end
                )
            ),
        )
    for length in (0.25, 0.3, 0.9):
        yield Case(
            f"length {length} of the run",
            lambda total, length=length: CosineRestarts(length=length, multiplier=1.5, gamma=0.5),
            at_every_step(
                lambda k, total, length=length: decaying_restarts(
                    k, total, Fraction(str(length)) * total, 1.5, 0.5, 0.0
                )
            ),
        )


def triangles() -> Iterable[Case]:
    for up, down, low in ((1, 1, 0.0), (2, 2, 0.1), (3, 1, 0.0), (2, 5, 0.3), (40, 60, 0.0)):
        for mode, gamma in (("triangular", 1.0), ("triangular2", 0.5)):
            torchs = stepped(
                lambda o, total, up=up, down=down, low=low, mode=mode: CyclicLR(
                    o, low, 1.0, up, down, mode=mode, cycle_momentum=False
                )
            )
            yield Case(
                f"{mode}, {up} up, {down} down, from {low}",
                lambda total, up=up, down=down, low=low, gamma=gamma: Triangular(
                    length=up + down, low=low, gamma=gamma, up=up / (up + down)
                ),
                torchs,
            )
    for cycles, low, gamma, up in ((1, 0.0, 1.0, 0.5), (3, 0.1, 0.7, 0.25), (4, 1.5, 0.5, 0.5)):
        yield Case(
            f"{cycles} cycles, from {low}, gamma {gamma}, up {up}",
            lambda total, values=(cycles, low, gamma, up): Triangular(
                cycles=values[0], low=values[1], gamma=values[2], up=values[3]
            ),
            at_every_step(
                lambda k, total, cycles=cycles, low=low, gamma=gamma, up=up: decaying_triangles(
                    k, total, Fraction(total, cycles), gamma, low, Fraction(up)
                )
            ),
        )
    yield Case(
        "length 0.3 of the run",
        lambda total: Triangular(length=0.3, gamma=0.5),
        at_every_step(lambda k, total: decaying_triangles(k, total, Fraction(3 * total, 10), 0.5, 0, Fraction(1, 2))),
    )


def torch_one_cycle(
    optimizer: Any, warmup: float, total: int, shape: str, three_phase: bool, start: float = 0.04, end: float = 4e-6
) -> OneCycleLR:
    """It peaks `warmup` steps and ends `total` steps after its first learning rate, as ours does."""
    return OneCycleLR(
        optimizer,
        max_lr=1.0,
        total_steps=total + 1,
        pct_start=(warmup + 1) / (total + 1),
        anneal_strategy={"cosine": "cos"}.get(shape, shape),
        base_momentum=0.85,
        max_momentum=0.95,
        div_factor=1 / start,
        final_div_factor=start / end,
        three_phase=three_phase,
    )


ONE_CYCLES = [
    (warmup, shape, three_phase)
    for shape in ("cosine", "linear")
    for three_phase in (False, True)
    for warmup in (0.3, 0.45, 1)
]
"""Warmup, shape, three_phase; a warmup of 1 step is for runs of at least 3."""


def one_cycles() -> Iterable[Case]:
    for warmup, shape, three_phase in ONE_CYCLES:
        for start, end in ((0.04, 4e-6), (0.5, 0.01)):

            def torchs(o, total, warmup=warmup, rest=(shape, three_phase, start, end)):
                return torch_one_cycle(o, warmup * total if warmup < 1 else warmup, total, *rest)

            yield Case(
                f"{shape}, {3 if three_phase else 2} phases, {warmup} of warmup, from {start} to {end}",
                lambda total, values=(warmup, start, end, shape, three_phase): OneCycle(
                    values[0], values[1], 1.0, *values[2:]
                ),
                stepped(torchs),
                least=1 if warmup < 1 else 3,
            )


# ------------------------------------------------------------------ schedules of schedules


def falling(shape: str, x: float) -> float:
    """1 at x = 0, 0 at x = 1."""
    return {"linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2, "1-sqrt": 1 - math.sqrt(x)}[shape]


def warmups() -> Iterable[Case]:
    for start in (0.01, 0.5):
        for part in (lambda total: 1, lambda total: total // 2, lambda total: total - 1):

            def torchs(o, total, start=start, part=part):
                rise = LinearLR(o, start, 1.0, total_iters=part(total))
                rest = CosineAnnealingLR(o, T_max=total - part(total), eta_min=0.1)
                return SequentialLR(o, [rise, rest], milestones=[part(total)])

            yield Case(
                f"{part(51)} of 51 steps from {start}",
                lambda total, start=start, part=part: Warmup(part(total), Cosine(0.1), start),
                stepped(torchs),
                least=2,
            )
    for duration in (1, 5, 400):
        for label, start, shape, rise in (
            ("linear", 0.0, "linear", lambda x: x),
            ("cosine", 0.2, "cosine", lambda x: 0.2 + 0.8 * math.sin(math.pi * x / 2) ** 2),
            ("exponential", 0.01, "exponential", lambda x: math.exp(math.log(0.01) * (1 - x))),
            ("falling exponential", 2.0, "exponential", lambda x: math.exp(math.log(2.0) * (1 - x))),
        ):

            def factors(total, duration=duration, rise=rise):
                steps, values = min(duration, total), []
                for k in range(total + 1):
                    values.append(rise(k / steps) if k < steps else 0.5 + 0.5 * (total - k) / max(total - steps, 1))
                values[-1] = 0.5
                return values

            yield Case(
                f"{label}, {duration} steps",
                lambda total, duration=duration, start=start, shape=shape: Warmup(
                    min(duration, total), Linear(1.0, 0.5), start, shape
                ),
                factors,
            )
    for steps in (1, 2, 4):  # Noam: the Transformer's
        noam = at_every_step(lambda k, total, d=steps: min(k / d, math.sqrt(d / k)) if k else 0.0)
        yield Case(f"Noam, {steps} steps", lambda total, d=steps: Warmup(d, InverseSqrt(d)), noam, least=steps)


def cooldowns() -> Iterable[Case]:
    for shape in ("linear", "cosine", "1-sqrt"):
        for end in (0.0, 0.2):

            def factors(total, shape=shape, end=end):
                length = max(1, total // 3)
                begin, values = total - length, []
                for k in range(begin + 1):
                    values.append(0.5 + 0.5 * (begin - k) / begin if begin else 0.5)
                for k in range(1, length + 1):
                    values.append(end + (0.5 - end) * falling(shape, k / length))
                return values

            yield Case(
                f"{shape} to {end}",
                lambda total, shape=shape, end=end: Cooldown(max(1, total // 3), Linear(1.0, 0.5), end, shape),
                factors,
            )

    def torchs(o, total):
        begin = total - max(1, total // 3)
        parts = [ConstantLR(o, 1.0), LinearLR(o, 1.0, 0.1, total_iters=total - begin)]
        return SequentialLR(o, parts, milestones=[begin])

    yield Case("linear after a constant", lambda t: Cooldown(max(1, t // 3), Constant(), 0.1), stepped(torchs), least=2)
    fraction = at_every_step(lambda k, total: 1.0 if k <= 0.7 * total else falling("cosine", (k / total - 0.7) / 0.3))
    yield Case("0.3 of the run", lambda total: Cooldown(0.3, Constant(), shape="cosine"), fraction)


def joins() -> Iterable[Case]:
    def bounds(total: int) -> tuple[int, int]:
        return max(1, total // 4), total // 2 + 1

    def torchs(o, total):
        first, second = bounds(total)
        parts = [
            LinearLR(o, 0.1, 1.0, total_iters=first),
            CosineAnnealingLR(o, T_max=second - first, eta_min=0.3),
            PolynomialLR(o, total_iters=total - second, power=2),
        ]
        return SequentialLR(o, parts, milestones=[first, second])

    three = [Linear(0.1, 1.0), Cosine(0.3), Polynomial(2)]
    yield Case("three", lambda total: Join(three, bounds(total)), stepped(torchs), least=3)

    def factors(total):
        values = []
        for k in range(total + 1):
            if 10 * k < 3 * total:
                values.append(k / (0.3 * total))
            elif 10 * k < 7 * total:
                values.append(0.5)
            else:
                values.append(max(0.0, 0.25 * (1 - (k - 0.7 * total) / (0.3 * total))))
        return values

    parts = [Linear(0.0, 1.0), Constant(0.5), Linear(0.25, 0.0)]
    yield Case("by fractions", lambda total: Join(parts, [0.3, 0.7]), factors)
    before = at_every_step(lambda k, total: 1.0 if k < total else 0.25)
    yield Case("at the end of the run", lambda total: Join([Constant(), Linear(1, 0.25)], [total]), before)
    after = at_every_step(lambda k, total: 1 - k / total)
    yield Case("at its beginning", lambda total: Join([Constant(), Linear()], [0]), after)


def warmup_cosines() -> Iterable[Case]:
    for end in (0.0, 0.2):
        for part in (lambda total: 0, lambda total: 1, lambda total: total // 3, lambda total: total):

            def factor(k, total, end=end, part=part):
                d = part(total)
                if k < d:
                    return k / d
                return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * (k - d) / (total - d))) if k < total else end

            torchs = stepped(lambda o, total, factor=factor: LambdaLR(o, lambda k: factor(k, total)))
            label = f"{part(51)} of 51 steps, to {end}"
            yield Case(label, lambda total, end=end, part=part: WarmupCosine(part(total), end), torchs)


def trapezoids() -> Iterable[Case]:
    for shape in ("linear", "cosine", "1-sqrt"):
        for end in (0.0, 0.1):

            def factors(total, shape=shape, end=end):
                warmup, length = total // 4, (total + 1) // 2
                values = [min(1.0, k / warmup) if warmup else 1.0 for k in range(total + 1)]
                for k in range(length + 1):
                    values[total - length + k] = end + (1 - end) * falling(shape, k / length)
                return values

            yield Case(
                f"{shape} to {end}",
                lambda total, end=end, shape=shape: WarmupStableDecay(total // 4, (total + 1) // 2, end, shape),
                factors,
            )
    trapezoid = at_every_step(lambda k, total: min(k / (0.1 * total), 1.0, (total - k) / (0.2 * total)))
    yield Case("by fractions", lambda total: WarmupStableDecay(0.1, 0.2), trapezoid)
    triangle = at_every_step(lambda k, total: min(k / (0.3 * total), (total - k) / (0.7 * total)))
    yield Case("never stable", lambda total: WarmupStableDecay(0.3, 0.7), triangle)


ORACLES = {
    "Constant": constants,
    "Linear": lines,
    "Cosine": cosines,
    "Polynomial": polynomials,
    "Exponential": exponentials,
    "Steps": steps,
    "InverseSqrt": inverses,
    "InverseTime": inverse_times,
    "CosineRestarts": restarts,
    "OneCycle": one_cycles,
    "Triangular": triangles,
    "Warmup": warmups,
    "Cooldown": cooldowns,
    "Join": joins,
    "WarmupCosine": warmup_cosines,
    "WarmupStableDecay": trapezoids,
}
"""Every schedule's cases by its name."""
