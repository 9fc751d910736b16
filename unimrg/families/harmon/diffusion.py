"""The diffusion head: a small network that models one latent token given its condition vector.

MAR (arXiv 2406.11838, section 3) with learned variances (improved DDPM, arXiv 2102.09672). Module names
are those of the published checkpoint. Shape suffixes: N rows (tokens times draws), R distinct conditions,
C token width, W condition width, D head width, S sampling steps.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimrg.families.harmon.config import MARConfig
from unimrg.families.harmon.process import (
    TRAIN_STEPS,
    reverse_moments,
    tables,
    timestep_map,
    variational_bits,
)

FREQUENCIES = 128
NORM_EPS = 1e-6


class TimeEmbedding(nn.Module):
    """Timesteps to vectors: cosines, then sines, then a two-layer network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_N: Tensor) -> Tensor:
        index = torch.arange(FREQUENCIES, dtype=torch.float32, device=t_N.device)
        angle = t_N.float().unsqueeze(-1) * torch.exp(-math.log(10000.0) * index / FREQUENCIES)
        return self.mlp(
            torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp.get_parameter("0.weight").dtype)
        )


class ResBlock(nn.Module):
    """Normalise, modulate, two-layer network, gated skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x_ND: Tensor, y_ND: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y_ND).chunk(3, dim=-1)
        return x_ND + gate * self.mlp(self.in_ln(x_ND) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """Normalise without parameters, modulate, project to noise and variance value."""

    def __init__(self, width: int, width_out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=NORM_EPS)
        self.linear = nn.Linear(width, width_out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_ND: Tensor, y_ND: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y_ND).chunk(2, dim=-1)
        return self.linear(self.norm_final(x_ND) * (1 + scale) + shift)


class HeadNetwork(nn.Module):
    """(noisy token, timestep, condition) -> [N, 2C]: predicted noise, then the variance value."""

    def __init__(self, token_width: int, condition_width: int, depth: int, width: int) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(condition_width, width)
        self.input_proj = nn.Linear(token_width, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * token_width)

    def forward(self, x_NC: Tensor, t_N: Tensor, condition_RW: Tensor, repeats: int = 1) -> Tensor:
        """Row k*R + r of x and t belongs to condition r; each condition is projected only once."""
        y_RD = self.cond_embed(condition_RW)
        y_ND = (y_RD + self.embed_times(t_N).unflatten(0, (repeats, y_RD.shape[0]))).flatten(0, 1)
        return self.denoise(x_NC, y_ND)

    def embed_times(self, t_N: Tensor) -> Tensor:
        """Time vectors [N, D]; each timestep is embedded once where there are more rows than timesteps."""
        if t_N.shape[0] <= TRAIN_STEPS:
            return self.time_embed(t_N)
        return F.embedding(t_N, self.time_embed(torch.arange(TRAIN_STEPS, device=t_N.device)))

    def denoise(self, x_NC: Tensor, y_ND: Tensor) -> Tensor:
        """The network after its time and condition have been summed into y."""
        x_ND = self.input_proj(x_NC.to(self.input_proj.weight.dtype))
        for block in self.res_blocks:
            x_ND = block(x_ND, y_ND)
        return self.final_layer(x_ND, y_ND)

    def reset_parameters(self) -> None:
        """Xavier everywhere; the modulations and the last projection start at zero (arXiv 2406.11838)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name in ("0.weight", "2.weight"):
            nn.init.normal_(self.time_embed.mlp.get_parameter(name), std=0.02)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)


class DiffusionHead(nn.Module):
    """The network with its training loss and its sampler."""

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.sampling_steps = config.sampling_steps
        self.clip = config.clip_latents
        self.token_width = config.token_width
        self.net = HeadNetwork(config.token_width, config.decoder_width, config.head_depth, config.head_width)

    def row_losses(
        self, target_RC: Tensor, condition_RW: Tensor, t_N: Tensor, noise_NC: Tensor, repeats: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Squared error of the noise and variational bits of each row, both [N] float32 with N = repeats * R.

        t_N: timesteps in 0..999. Row k*R + r is the k-th draw for token r. A row's loss is the sum of both.
        """
        target_NC = target_RC.float().repeat(repeats, 1)
        at = tables(TRAIN_STEPS, t_N.device).at(t_N)
        x_NC = at.sqrt_alphas_cumprod * target_NC + at.sqrt_one_minus_alphas_cumprod * noise_NC
        predicted_NC, value_NC = self.net(x_NC, t_N, condition_RW, repeats).float().chunk(2, dim=-1)
        mse_N = (noise_NC - predicted_NC).square().mean(dim=-1)
        # The bound trains the variance only: the predicted noise is taken as a constant.
        mean_NC, log_variance_NC, _ = reverse_moments(x_NC, predicted_NC.detach(), value_NC, at)
        return mse_N, variational_bits(target_NC, x_NC, t_N, mean_NC, log_variance_NC, at)

    def reverse_step(
        self,
        x_NC: Tensor,
        output_NC2: Tensor,
        step_N: Tensor,
        noise_NC: Tensor,
        temperature: float,
        steps: int,
    ) -> Tensor:
        """One step of the process respaced to `steps` steps; the last one (step 0) adds no noise.

        output_NC2: the network's output [N, 2C], guidance applied. step_N: kept steps, [N] or [1].
        """
        predicted_NC, value_NC = output_NC2.float().chunk(2, dim=-1)
        mean_NC, log_variance_NC, _ = reverse_moments(
            x_NC, predicted_NC, value_NC, tables(steps, x_NC.device).at(step_N), self.clip
        )
        noisy = (step_N != 0).unsqueeze(-1)
        return mean_NC + noisy * torch.exp(0.5 * log_variance_NC) * noise_NC * temperature

    @torch.no_grad()
    def sample(
        self,
        condition_MW: Tensor,
        guidance: float = 1.0,
        temperature: float = 1.0,
        init_noise_NC: Tensor | None = None,
        step_noise_SNC: Tensor | None = None,
        generator: torch.Generator | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Latent tokens [N, C] float32.

        condition_MW: [N, W]; with guidance != 1 [2N, W], the conditional half first.
        init_noise_NC, step_noise_SNC: explicit noise; entry 0 of the latter is the noisiest step. Else drawn.
        """
        steps, device = steps or self.sampling_steps, condition_MW.device
        rows = condition_MW.shape[0] // (1 if guidance == 1.0 else 2)
        x_NC = self._draw(rows, generator, device) if init_noise_NC is None else init_noise_NC.float()
        y_MD = self.net.cond_embed(condition_MW)  # neither condition nor times change between steps
        times_SD = self.net.time_embed(timestep_map(steps, device))
        order_S = torch.arange(steps, device=device)
        for k, step in enumerate(reversed(range(steps))):
            output_NC2 = self._guided(x_NC, y_MD + times_SD[step], guidance)
            noise_NC = (
                self._draw(rows, generator, device) if step_noise_SNC is None else step_noise_SNC[k, :rows]
            )
            x_NC = self.reverse_step(x_NC, output_NC2, order_S[step : step + 1], noise_NC, temperature, steps)
        return x_NC

    def _guided(self, x_NC: Tensor, y_MD: Tensor, guidance: float) -> Tensor:
        """Network output [N, 2C]; the variance value stays the conditional one under guidance."""
        if guidance == 1.0:
            return self.net.denoise(x_NC, y_MD).float()
        with_condition, without = self.net.denoise(x_NC.repeat(2, 1), y_MD).float().chunk(2, dim=0)
        noise, value = with_condition.chunk(2, dim=-1)
        base = without[:, : self.token_width]
        return torch.cat([base + guidance * (noise - base), value], dim=-1)

    def _draw(self, rows: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Standard normal noise, drawn where the generator lives: a CPU generator serves any device."""
        source = device if generator is None else generator.device
        return torch.randn(rows, self.token_width, generator=generator, device=source).to(device)
