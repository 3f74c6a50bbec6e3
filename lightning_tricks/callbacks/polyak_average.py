"""The plain mean of the weights over the tail of the run, evaluated instead of them."""

from lightning_tricks.callbacks.ema import EMA
from lightning_tricks.functional.averaging import mean
from lightning_tricks.functional.schedules import Duration


class PolyakAverage(EMA):
    """Average the weights over the tail of the run with equal weights, and evaluate the mean instead of them.

        average = mean of the weights after each step from `start` on

    Everything else is as in `EMA`, of which it is a kind: validation, test and checkpoints use the mean once it has
    started. With a batch-norm network the running statistics are averaged too; they are not estimated anew.

    Args:
        start: stretch of the run that is left out: `int` = optimizer steps, `float` in (0, 1) = fraction of the run,
            `"3ep"` = epochs.
        every_n_steps: how often weights are taken into the mean, in the same units: `"1ep"` takes those at the end of
            each epoch, as SWA does.
    Raises:
        TypeError, ValueError: a value out of range, and what `EMA` refuses.
    References:
        Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; once an epoch Izmailov et
        al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018, arXiv:1803.05407.
    Example:
        >>> from lightning_tricks import PolyakAverage
        >>> PolyakAverage(start=0.5, every_n_steps="1ep").settings
        {'start': 0.5, 'every_n_steps': '1ep'}
    """

    owner = "PolyakAverage"

    def __init__(self, start: Duration = 0.75, *, every_n_steps: Duration = 1) -> None:
        super().__init__(mean, start=start, every_n_steps=every_n_steps)

    @property
    def settings(self) -> dict[str, object]:
        """What the run's configuration shows."""
        return {"start": self.start, "every_n_steps": self.every_n_steps}
