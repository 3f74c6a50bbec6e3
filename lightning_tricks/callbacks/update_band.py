"""Which layers move too much or too little in a step, and what a person can do about it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_tricks.functional.checks import check_count, check_number, message

_NAMED = 6
"""So many layers are named in one sentence, and the others counted."""


@dataclass(frozen=True)
class UpdateBand:
    """Tell of layers whose update:weight ratio is outside a band for some logs in a row, of each once.

    Args:
        low, high: the band, `0 <= low < high` (update norm / weight norm).
        patience: logs in a row, at least 1.
    Raises:
        TypeError, ValueError: an argument out of range.
    Example:
        >>> UpdateBand(1e-4, 1e-2, patience=1)({}, {"head": 0.03, "body": 1e-3})
        ({'head': 1, 'body': 0}, ['head moves 3 % per step: lower its learning rate'])
    """

    low: float
    high: float
    patience: int = 3

    def __post_init__(self) -> None:
        fix = "(1e-4, 1e-2) suits most layers"
        for value in (self.low, self.high):
            check_number("UpdateMonitor", "band", value, "of at least 0", fix, lambda value: value >= 0)
        if not self.low < self.high:
            got = (self.low, self.high)
            raise ValueError(message("UpdateMonitor", "band", "a lower and a higher ratio", got, fix))
        check_count("UpdateMonitor", "patience", self.patience, 1, "logs in a row", "3 is the default")

    def __call__(self, counts: Mapping[str, int], ratios: Mapping[str, float]) -> tuple[dict[str, int], list[str]]:
        """What is to be said after one more log.

        Args:
            counts: for how many logs in a row each layer was outside; of one that was told of, it stays.
            ratios: by layer; one that is not finite (a layer of zeros that moves) says nothing.
        Returns:
            The new counts, and a sentence for each layer to tell of.
        """
        after, news = dict(counts), []
        for layer, ratio in ratios.items():
            if counts.get(layer, 0) >= self.patience or not math.isfinite(ratio):
                continue
            after[layer] = 0 if self.low <= ratio <= self.high else counts.get(layer, 0) + 1
            if after[layer] == self.patience:
                news.append(self._advice(layer, ratio))
        return after, news

    def _advice(self, layer: str, ratio: float) -> str:
        if ratio == 0:
            return f"{layer} does not move: it gets no gradient, or its learning rate is 0"
        what = "lower" if ratio > self.high else "raise"
        return f"{layer} moves {_percent(ratio)} per step: {what} its learning rate"

    def sentence(self, news: list[str]) -> str:
        """All of it as one text.

        Args:
            news: as `__call__` returns it, at least one.
        """
        more = f"; and {len(news) - _NAMED} more" if len(news) > _NAMED else ""
        logs = "1 log" if self.patience == 1 else f"{self.patience} logs in a row"
        band = f"outside {_percent(self.low)} to {_percent(self.high)} for {logs}"
        return f"UpdateMonitor: {'; '.join(news[:_NAMED])}{more} ({band})."


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.2g} %"


def as_band(band: Any, patience: Any) -> UpdateBand | None:
    """The band that a user gave as two numbers; None for none.

    Args:
        band: `(low, high)`, a list too, or None.
        patience: logs in a row.
    Raises:
        TypeError, ValueError: as `UpdateBand`, or it is no pair.
    """
    if band is None:
        UpdateBand(0, 1, patience)  # checks it
        return None
    if not isinstance(band, (tuple, list)) or len(band) != 2:
        raise TypeError(message("UpdateMonitor", "band", "a pair of ratios or None", band, "(1e-4, 1e-2) suits most"))
    low, high = band
    return UpdateBand(low, high, patience)
