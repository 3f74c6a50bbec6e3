"""Mixup: draw the parameters, then apply them."""

import torch
from torch import Generator, Tensor

from lightning_tricks.functional.checks import message


def sample_beta(alpha: float, size: tuple[int, ...], generator: Generator | None = None) -> Tensor:
    """Draw from the symmetric Beta(alpha, alpha), from a generator of one's own.

        weight = g1 / (g1 + g2),  g ~ Gamma(alpha) = Gamma(alpha + 1) * U ** (1 / alpha)

    The ratio is taken between logarithms, so that a tiny alpha gives 0 or 1 and never 0 / 0.

    Args:
        alpha: concentration, above 0; 1 is uniform, small values stay near 0 and 1.
        size: shape of the result.
        generator: CPU generator; None takes torch's global one.
    Returns:
        `size` float32 on the CPU, in [0, 1].
    References:
        Marsaglia and Tsang, "A Simple Method for Generating Gamma Variables", 2000, section 6.
    Example:
        >>> sample_beta(0.2, (3,)).shape
        torch.Size([3])
    """
    # torch.distributions takes no generator; this private function is the only sampler of gammas that does.
    shape = torch.full((2, *size), alpha + 1.0, dtype=torch.float64)
    gamma = torch._standard_gamma(shape, generator=generator)
    uniform = 1 - torch.rand(shape.shape, dtype=torch.float64, generator=generator)
    log_gamma = gamma.log() + uniform.log() / alpha
    return torch.sigmoid(log_gamma[0] - log_gamma[1]).float()


def sample_mixup(
    count: int, alpha: float, per_sample: bool = True, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw the weights and partners of a mixup.

    Args:
        count: samples in the batch, at least 1.
        alpha: concentration of Beta(alpha, alpha), above 0.
        per_sample: a weight for each sample; otherwise one for the batch.
        generator: CPU generator; None takes torch's global one.
    Returns:
        weight: (count,) float32, share of the original sample, in [0, 1].
        permutation: (count,) int64, partner of each sample; a sample may be its own.
    Example:
        >>> weight, permutation = sample_mixup(5, alpha=0.2)
        >>> weight.shape, sorted(permutation.tolist())
        (torch.Size([5]), [0, 1, 2, 3, 4])
    """
    weight = sample_beta(alpha, (count if per_sample else 1,), generator).expand(count)
    return weight, torch.randperm(count, generator=generator)


def mixup(images: Tensor, weight: Tensor, permutation: Tensor, inplace: bool = False) -> Tensor:
    """Mix each sample with another one of the batch.

        images' = weight * images + (1 - weight) * images[permutation]

    Args:
        images: (N, ...) floating or integer numbers; integers are mixed in float32 and rounded.
        weight: (N,) share of the original sample, in [0, 1].
        permutation: (N,) int64, partner of each sample.
        inplace: write the result into `images`.
    Returns:
        (N, ...) of the dtype of `images`; a new tensor unless `inplace`.
    Raises:
        ValueError: weight or permutation of another length.
    References:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018, arXiv:1710.09412, eq. 1.
    Example:
        >>> mixup(torch.tensor([[0.0], [1.0]]), torch.tensor([0.75, 0.5]), torch.tensor([1, 0]))
        tensor([[0.2500],
                [0.5000]])
    """
    if not len(images) == len(weight) == len(permutation):
        got = (len(images), len(weight), len(permutation))
        fix = "Draw them with sample_mixup(len(images), alpha)"
        raise ValueError(message("mixup", "weight and permutation", "one for each image", got, fix))
    floating = images.is_floating_point() or images.is_complex()
    weight = weight.to(images.device, images.dtype if floating else torch.float32)
    weight = weight.view(-1, *[1] * (images.dim() - 1))
    partner = images[permutation.to(images.device)]
    if floating and inplace:
        return images.mul_(weight).add_(partner * (1 - weight))
    mixed = images * weight + partner * (1 - weight)
    if not floating:
        mixed = mixed.round().to(images.dtype)
    return images.copy_(mixed) if inplace else mixed
