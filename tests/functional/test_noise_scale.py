import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_tricks.functional.noise_scale import noise_terms

positive = st.floats(1e-3, 1e3)


@given(signal=positive, noise=positive, small=st.integers(1, 100), factor=st.integers(2, 100))
def test_terms_are_those_that_the_expected_norms_are_made_of(signal, noise, small, factor):
    """The mean gradient of B samples has `signal + noise / B` as its expected squared norm (McCandlish, A.1)."""
    large = small * factor
    terms = noise_terms(signal + noise / small, signal + noise / large, small, large)
    assert terms == pytest.approx((signal, noise), rel=1e-6, abs=1e-9 * (signal + noise) * large)


def test_means_over_many_steps_are_the_planted_terms():
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    spread = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    signals, noises = [], []
    for _ in range(4000):
        samples = mean + spread * torch.randn(16, 3, dtype=torch.float64, generator=generator)
        small, large = samples[:4].mean(0).square().sum(), samples.mean(0).square().sum()
        signal, noise = noise_terms(small.item(), large.item(), 4, 16)
        signals.append(signal)
        noises.append(noise)
    assert sum(signals) / 4000 == pytest.approx(mean.square().sum().item(), rel=0.05)
    assert sum(noises) / 4000 == pytest.approx(spread.square().sum().item(), rel=0.05)


@pytest.mark.parametrize("batches", [(4, 4), (8, 4), (0, 4), (-1, 4)])
def test_batch_sizes_must_be_in_order(batches):
    with pytest.raises(ValueError, match=r"noise_terms: small_batch must be above 0 and below large_batch \(samples\)"):
        noise_terms(1.0, 1.0, *batches)
