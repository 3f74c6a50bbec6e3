"""How noisy a gradient is, from its norms at two batch sizes."""

from lightning_tricks.functional.checks import message


def noise_terms(small: float, large: float, small_batch: float, large_batch: float) -> tuple[float, float]:
    """Squared norm of the true gradient and its noise, from squared norms at two batch sizes; both without bias.

        signal = (large_batch * large - small_batch * small) / (large_batch - small_batch)
        noise = (small - large) / (1 / small_batch - 1 / large_batch)

    The gradient noise scale is `noise / signal` (samples): well below that batch size, twice the batch needs half the
    steps; well above it, it saves next to none. Both terms scatter widely from step to step, below 0 too, and their
    quotient is biased: average each over steps first.

    Args:
        small, large: squared norms of the mean gradient of a batch of either size.
        small_batch, large_batch: samples, `0 < small_batch < large_batch`.
    Returns:
        signal, an estimate of `|E[gradient]| ** 2`, and noise, of the trace of one sample's gradient covariance.
    Raises:
        ValueError: the batch sizes are not in this order.
    References:
        McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, arXiv:1812.06162, appendix A.1.
    Example:
        >>> noise_terms(small=3.0, large=1.5, small_batch=1, large_batch=4)
        (1.0, 2.0)
    """
    if not 0 < small_batch < large_batch:
        got, fix = (small_batch, large_batch), "Give the smaller one first"
        raise ValueError(message("noise_terms", "small_batch", "above 0 and below large_batch (samples)", got, fix))
    signal = (large_batch * large - small_batch * small) / (large_batch - small_batch)
    noise = (small - large) / (1 / small_batch - 1 / large_batch)
    return signal, noise
