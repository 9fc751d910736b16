"""The cosine diffusion process and its shortened form (improved DDPM, arXiv 2102.09672), as tables.

Tables are computed in float64 once, kept as float32 per device outside any state dict, and looked up by
step without a host synchronisation. Shape suffixes: N rows, C token width, T steps.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

TRAIN_STEPS = 1000
LN2 = math.log(2.0)


class Tables(NamedTuple):
    """One value per step, or per row after a lookup."""

    betas: Tensor
    alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance: Tensor  # entry 0 (minus infinity) replaced by entry 1
    posterior_mean_x0: Tensor  # the posterior mean is this times x0 ...
    posterior_mean_xt: Tensor  # ... plus this times x_t
    log_betas: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    x0_from_xt: Tensor  # x0 is this times x_t ...
    x0_from_noise: Tensor  # ... minus this times the noise

    def at(self, step_N: Tensor) -> Tables:
        """The values of every row's step, as columns [N, 1]."""
        return Tables(*(table[step_N].unsqueeze(-1) for table in self))


def cosine_betas(steps: int = TRAIN_STEPS) -> Tensor:
    """beta_i = min(1 - abar((i+1)/T) / abar(i/T), 0.999), abar(u) = cos^2((u + 0.008) / 1.008 * pi / 2)."""

    def abar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - abar((i + 1) / steps) / abar(i / steps), 0.999) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float64)


def kept_timesteps(steps: int) -> list[int]:
    """Timesteps of the full process that one of `steps` steps keeps: evenly spread, with both ends."""
    stride = (TRAIN_STEPS - 1) / (steps - 1) if steps > 1 else 1.0
    return [round(i * stride) for i in range(steps)]


@lru_cache(maxsize=64)
def tables(steps: int, device: torch.device) -> Tables:
    """Float32 tables of the process respaced to `steps` steps, on `device`."""
    # Neither a meta-device context nor inference mode of the first caller may mark what all callers share.
    with torch.device("cpu"), torch.inference_mode(False):
        return Tables(*(table.float().to(device) for table in _tables64(steps)))


@lru_cache(maxsize=64)
def timestep_map(steps: int, device: torch.device) -> Tensor:
    """Original timestep of each kept step [T]: what the network is told."""
    with torch.inference_mode(False):
        return torch.tensor(kept_timesteps(steps), device=device)


def _tables64(steps: int) -> Tables:
    kept = torch.tensor(kept_timesteps(steps))
    abar = torch.cumprod(1.0 - cosine_betas(), dim=0)[kept]
    abar_before = torch.cat([abar.new_ones(1), abar[:-1]])
    betas = 1.0 - abar / abar_before
    variance = betas * (1.0 - abar_before) / (1.0 - abar)
    second = variance[1:2] if steps > 1 else betas
    return Tables(
        betas=betas,
        alphas_cumprod=abar,
        posterior_variance=variance,
        posterior_log_variance=torch.log(torch.cat([second, variance[1:]])),
        posterior_mean_x0=betas * abar_before.sqrt() / (1.0 - abar),
        posterior_mean_xt=(1.0 - abar_before) * (1.0 - betas).sqrt() / (1.0 - abar),
        log_betas=betas.log(),
        sqrt_alphas_cumprod=abar.sqrt(),
        sqrt_one_minus_alphas_cumprod=(1.0 - abar).sqrt(),
        x0_from_xt=(1.0 / abar).sqrt(),
        x0_from_noise=(1.0 / abar - 1.0).sqrt(),
    )


def reverse_moments(
    x_NC: Tensor, noise_NC: Tensor, value_NC: Tensor, at: Tables, clip: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and log-variance of the reverse step, and the predicted x0, from the network's two outputs.

    `value_NC` interpolates the log-variance between the posterior's (-1) and beta's (+1). clip: the predicted
    x0 is kept within +-clip; 0 = it is not.
    """
    x0_NC = at.x0_from_xt * x_NC - at.x0_from_noise * noise_NC
    if clip:
        x0_NC = x0_NC.clamp(-clip, clip)
    mean_NC = at.posterior_mean_x0 * x0_NC + at.posterior_mean_xt * x_NC
    share_NC = (value_NC + 1) / 2
    log_variance_NC = share_NC * at.log_betas + (1 - share_NC) * at.posterior_log_variance
    return mean_NC, log_variance_NC, x0_NC


def variational_bits(
    x0_NC: Tensor, xt_NC: Tensor, step_N: Tensor, mean_NC: Tensor, log_variance_NC: Tensor, at: Tables
) -> Tensor:
    """The variational bound's term of each row in bits [N]: KL, or for step 0 the discretised likelihood."""
    true_mean = at.posterior_mean_x0 * x0_NC + at.posterior_mean_xt * xt_NC
    kl = gaussian_kl(true_mean, at.posterior_log_variance, mean_NC, log_variance_NC)
    nll = -discretised_log_likelihood(x0_NC, mean_NC, 0.5 * log_variance_NC)
    return torch.where((step_N == 0).unsqueeze(-1), nll, kl).mean(dim=-1) / LN2


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of the first from the second Gaussian, per element, in nats."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() - 1.0 - ratio + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of the bin of half-width 1/255 around x; the bins at -1 and 1 are open outwards.

    The bins are those of 8-bit pixels; the loss keeps them although latents are no pixels.
    """
    centred, inverse_std = x - mean, torch.exp(-log_std)
    upper = _normal_cdf(inverse_std * (centred + 1.0 / 255.0))
    lower = _normal_cdf(inverse_std * (centred - 1.0 / 255.0))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1.0 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """tanh approximation of the standard normal distribution function, as the published loss uses."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
