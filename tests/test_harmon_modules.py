"""Properties of Harmon's modules that need no golden numbers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unimrg.families.harmon.config import VARIANTS, HarmonConfig, MARConfig, tiny
from unimrg.families.harmon.diffusion import DiffusionHead
from unimrg.families.harmon.mar import MAR, sdpa_varlen
from unimrg.families.harmon.process import TRAIN_STEPS, kept_timesteps, tables, timestep_map
from unimrg.families.harmon.sampling import guidance_at, mask_schedule, tokens_to_predict
from unimrg.families.harmon.vae import KLVAE

SMALL = MARConfig(
    grid=(4, 4),
    latent_channels=3,
    encoder_width=24,
    encoder_depth=2,
    encoder_heads=3,
    decoder_width=16,
    decoder_depth=2,
    decoder_heads=2,
    buffer_size=2,
    class_num=3,
    head_depth=2,
    head_width=16,
    sampling_steps=5,
)
GRID = (5, 3)
CELLS = GRID[0] * GRID[1]


def open_head(mar: MAR) -> MAR:
    """Give the layers that start at zero random numbers, so that gradients reach everything."""
    for parameter in mar.diffloss.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return mar


@pytest.fixture
def mar() -> MAR:
    torch.manual_seed(0)
    return open_head(MAR(SMALL)).eval()


def draw(lengths: list[int], seed: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Visible cells (sorted) and tokens of each picture."""
    generator = torch.Generator().manual_seed(seed)
    cells = [torch.randperm(CELLS, generator=generator)[:length].sort().values for length in lengths]
    return cells, [torch.randn(length, SMALL.token_width, generator=generator) for length in lengths]


def dense(mar: MAR, cell: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """One picture through the dense forms: features and conditions."""
    mask = torch.ones(1, CELLS).index_fill(1, cell, 0.0)
    everything = torch.randn(1, CELLS, SMALL.token_width).index_copy(1, cell, tokens[None])
    features = mar.encode(everything, GRID, mask)
    return features[0], mar.decode(features, mask, GRID)[0]


def gradients(mar: MAR, loss: Tensor) -> dict[str, Tensor]:
    used = {name: p for name, p in mar.named_parameters() if p.requires_grad and "diffloss" not in name}
    return dict(zip(used, torch.autograd.grad(loss, list(used.values())), strict=True))


@pytest.mark.parametrize("lengths", [[5, 0, 15, 3, 5], [0], [0, 0], [7, 7], [15, 1, 0]])
def test_ragged_and_dense_agree(mar: MAR, lengths: list[int]) -> None:
    cells, tokens = draw(lengths)
    alone = [dense(mar, cell, token) for cell, token in zip(cells, tokens, strict=True)]
    features = mar.encode_ragged(torch.cat(tokens), torch.cat(cells), lengths, GRID)
    conditions = mar.decode_ragged(features, torch.cat(cells), lengths, GRID)
    torch.testing.assert_close(features, torch.cat([f for f, _ in alone]), rtol=0, atol=2e-6)
    torch.testing.assert_close(conditions, torch.stack([c for _, c in alone]), rtol=0, atol=2e-6)

    weight = torch.randn_like(conditions)
    ragged_gradients = gradients(mar, (conditions * weight).sum())
    dense_gradients = gradients(mar, sum((c * w).sum() for (_, c), w in zip(alone, weight, strict=True)))
    for name, want in dense_gradients.items():
        # The key bias shifts all scores of a query alike: its true gradient is zero, the rest rounding.
        torch.testing.assert_close(ragged_gradients[name], want, rtol=1e-4, atol=2e-5, msg=name)


def test_dense_without_a_mask_sees_everything(mar: MAR) -> None:
    tokens = torch.randn(2, CELLS, SMALL.token_width)
    got = mar.encode(tokens, GRID)
    torch.testing.assert_close(got, mar.encode(tokens, GRID, torch.zeros(2, CELLS)), rtol=0, atol=0)


def test_pictures_of_a_ragged_batch_do_not_see_each_other(mar: MAR) -> None:
    lengths = [4, 9]
    cells, tokens = draw(lengths)
    first = SMALL.buffer_size + lengths[0]
    before = mar.encode_ragged(torch.cat(tokens), torch.cat(cells), lengths, GRID)
    after = mar.encode_ragged(torch.cat([tokens[0], tokens[1] + 1]), torch.cat(cells), lengths, GRID)
    assert torch.equal(before[:first], after[:first])
    assert not torch.allclose(before[first:], after[first:])


def test_varlen_attention_can_be_replaced(mar: MAR) -> None:
    seen = []

    def spy(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], dropout_p: float) -> Tensor:
        seen.append((tuple(q.shape), lengths, dropout_p))
        return sdpa_varlen(q, k, v, lengths, dropout_p)

    cells, tokens = draw([4, 9])
    mar.varlen_attention = spy
    mar.train().encode_ragged(torch.cat(tokens), torch.cat(cells), [4, 9], GRID)
    width = SMALL.encoder_width // SMALL.encoder_heads
    assert seen == [((17, SMALL.encoder_heads, width), [6, 11], SMALL.attn_dropout)] * SMALL.encoder_depth


def test_position_tables_are_resized_bilinearly(mar: MAR) -> None:
    """A plane stays a plane inside, buffers stay as they are, gradients reach the small table."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    plane = (2 * rows + 5 * columns).flatten()
    table = torch.cat([torch.tensor([100.0, 200.0]), plane])[None, :, None].requires_grad_()
    assert torch.equal(mar._positions(table, (4, 4)), table[0])
    doubled = mar._positions(table, (8, 8))
    assert doubled[:2].flatten().tolist() == [100.0, 200.0]
    centre = (torch.arange(8.0) + 0.5) / 2 - 0.5  # cell centres of the finer grid on the coarser one
    want = 2 * centre[1:7, None] + 5 * centre[None, 1:7]
    torch.testing.assert_close(doubled[2:].reshape(8, 8)[1:7, 1:7], want)
    doubled.sum().backward()
    assert table.grad is not None
    assert torch.allclose(table.grad[0, 2:].sum(), torch.tensor(64.0))


def test_class_table_is_kept_but_not_trained(mar: MAR) -> None:
    assert "class_emb.weight" in mar.state_dict()
    assert not mar.class_emb.weight.requires_grad


def test_dropout_is_active_in_training_only(mar: MAR) -> None:
    tokens = torch.randn(1, CELLS, SMALL.token_width)
    assert torch.equal(mar.encode(tokens, GRID), mar.encode(tokens, GRID))
    mar.train()
    assert not torch.equal(mar.encode(tokens, GRID), mar.encode(tokens, GRID))


def test_training_path_never_waits_for_the_device() -> None:
    """Tensors on the meta device hold no numbers: an `.item()`, boolean index or branch on data fails."""
    with torch.device("meta"):
        mar = MAR(SMALL)
        lengths, rows = [4, 0, 9], 2
        tokens, cells = torch.empty(13, SMALL.token_width), torch.empty(13, dtype=torch.long)
        features = mar.encode_ragged(tokens, cells, lengths, GRID)
        conditions = mar.decode_ragged(features, cells, lengths, GRID).flatten(0, 1)
        targets = torch.empty(len(conditions), SMALL.token_width)
        t = torch.empty(rows * len(conditions), dtype=torch.long)
        mse, bits = mar.diffloss.row_losses(targets, conditions, t, torch.empty(len(t), 3), repeats=rows)
    (mse + bits).mean().backward()
    assert mse.shape == bits.shape == (rows * 3 * CELLS,)


# -- the diffusion head ------------------------------------------------------------------------------------


def test_tables_are_no_part_of_the_state_and_survive_the_meta_device() -> None:
    with torch.device("meta"):
        head = DiffusionHead(SMALL)
        first = tables(7, torch.device("cpu"))  # whoever comes first must not spoil the cache for the others
    assert first.betas.device.type == "cpu"
    assert not dict(head.named_buffers())
    head = head.to_empty(device="cpu")
    head.net.reset_parameters()
    mse, bits = head.row_losses(torch.randn(64, 3), torch.randn(64, 16), torch.arange(64), torch.randn(64, 3))
    assert torch.isfinite(mse).all() and torch.isfinite(bits).all()
    copy.deepcopy(head)


def test_tables_first_made_in_inference_mode_can_be_trained_with() -> None:
    with torch.inference_mode():
        made = tables(11, torch.device("cpu"))
        assert not timestep_map(11, torch.device("cpu")).is_inference()
    assert not made.betas.is_inference()


def test_repeated_conditions_equal_copied_ones(mar: MAR) -> None:
    """Draw k of token r is row k*R + r; more rows than timesteps take the shared time embedding."""
    rows, repeats = 300, 4
    target, condition = torch.randn(rows, 3), torch.randn(rows, SMALL.decoder_width)
    t, noise = torch.randint(TRAIN_STEPS, (rows * repeats,)), torch.randn(rows * repeats, 3)
    together = mar.diffloss.row_losses(target, condition, t, noise, repeats=repeats)
    for k in range(repeats):
        at = slice(k * rows, (k + 1) * rows)
        alone = mar.diffloss.row_losses(target, condition, t[at], noise[at])
        for got, want in zip(together, alone, strict=True):
            torch.testing.assert_close(got[at], want, rtol=1e-5, atol=1e-5)


def test_bound_trains_the_variance_only(mar: MAR) -> None:
    _, bits = mar.diffloss.row_losses(
        torch.randn(9, 3), torch.randn(9, 16), torch.arange(9), torch.randn(9, 3)
    )
    bits.sum().backward()
    gradient = mar.diffloss.net.final_layer.linear.weight.grad
    assert gradient is not None
    assert not gradient[:3].any() and gradient[3:].all(dim=1).any()


def test_fresh_head_predicts_nothing() -> None:
    head = DiffusionHead(SMALL)
    head.net.reset_parameters()
    noise = torch.randn(50, 3)
    mse, _ = head.row_losses(torch.randn(50, 3), torch.randn(50, 16), torch.arange(50), noise)
    torch.testing.assert_close(mse, noise.square().mean(dim=-1))


@pytest.mark.parametrize("steps", [1, 2, 20, 100, 1000])
def test_kept_timesteps_reach_both_ends(steps: int) -> None:
    kept = kept_timesteps(steps)
    assert len(set(kept)) == steps and kept == sorted(kept) and kept[0] == 0
    assert steps == 1 or kept[-1] == TRAIN_STEPS - 1


class Oracle(torch.nn.Module):
    """The best noise prediction for Gaussian data of standard deviation 0.5, in place of the network."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.cond_embed = torch.nn.Identity()
        self.abar, self.time = (
            tables(steps, torch.device("cpu")).alphas_cumprod,
            timestep_map(steps, torch.device("cpu")),
        )

    def time_embed(self, t: Tensor) -> Tensor:
        return self.abar.unsqueeze(-1)

    def denoise(self, x: Tensor, y: Tensor) -> Tensor:
        abar = y[:, :1]
        noise = (1 - abar).sqrt() * x / (0.25 * abar + 1 - abar)
        return torch.cat([noise, torch.full_like(noise, -1.0)], dim=-1)


def test_sampler_restores_the_data_distribution() -> None:
    head = DiffusionHead(SMALL)
    head.net = Oracle(100)  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    sample = head.sample(torch.zeros(20000, 1), generator=generator, steps=100)
    assert abs(sample.mean().item()) < 0.01
    assert abs(sample.std().item() - 0.5) < 0.02


def test_sampler_is_a_function_of_its_generator(mar: MAR) -> None:
    condition = torch.randn(8, SMALL.decoder_width)

    def run(seed: int, guidance: float) -> Tensor:
        return mar.diffloss.sample(condition, guidance, generator=torch.Generator().manual_seed(seed))

    assert run(0, 1.0).shape == (8, 3) and run(0, 3.0).shape == (4, 3)
    assert torch.equal(run(0, 3.0), run(0, 3.0))
    assert not torch.equal(run(0, 3.0), run(1, 3.0))


def test_guidance_without_a_difference_changes_nothing(mar: MAR) -> None:
    condition = torch.randn(4, SMALL.decoder_width)
    plain = mar.diffloss.sample(condition, generator=torch.Generator().manual_seed(0))
    both = mar.diffloss.sample(condition.repeat(2, 1), 3.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(both, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


# -- schedules, configuration, autoencoder -----------------------------------------------------------------


@pytest.mark.parametrize(("length", "iterations"), [(64, 8), (64, 64), (5, 9), (1, 1), (100, 1)])
def test_every_token_is_revealed_once(length: int, iterations: int) -> None:
    counts = tokens_to_predict(length, iterations)
    assert len(counts) == iterations == len(mask_schedule(length, iterations))
    assert sum(counts) == length and min(counts) >= 0 and counts[-1] > 0


def test_guidance_schedules() -> None:
    assert guidance_at(3.0, 64, 40) == 3.0
    assert guidance_at(3.0, 64, 64, "linear") == 1.0
    assert guidance_at(3.0, 64, 0, "linear") == 3.0
    with pytest.raises(ValueError, match="cosine"):
        guidance_at(3.0, 64, 0, "cosine")


@pytest.mark.parametrize("name", VARIANTS)
def test_configuration_round_trips(name: str, tmp_path: Path) -> None:
    config = VARIANTS[name]()
    config.save_pretrained(tmp_path)
    loaded = HarmonConfig.from_pretrained(tmp_path)
    assert (loaded.vae, loaded.mar) == (config.vae, config.mar)
    assert loaded.llm.to_dict() == config.llm.to_dict()
    assert (loaded.image_size, loaded.grad_scale, loaded.vae_scale) == (
        config.image_size,
        0.1,
        config.vae.scale,
    )
    assert loaded.grid_of(config.image_size, config.image_size)[0] >= config.mar.grid[0]


def test_configuration_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="latent channels"):
        HarmonConfig(vae={"latent_channels": 4})
    with pytest.raises(ValueError, match="8-pixel"):
        tiny().grid_of(60, 64)


def test_tokens_hold_all_of_a_patch() -> None:
    """Tokenising with a patch of 2 only rearranges the tokens, and decodes to the same picture."""
    torch.manual_seed(0)
    vae = KLVAE(tiny().vae).eval()
    with torch.no_grad():
        moments = vae.encode(torch.randn(1, 3, 64, 32))
        cells, patches = vae.tokenize(moments, 1), vae.tokenize(moments, 2)
        assert cells.shape == (1, 8, 4, 16) and patches.shape == (1, 4, 2, 64)
        assert torch.equal(patches[0, 1, 0].reshape(16, 2, 2)[:, 1, 0], cells[0, 3, 0])
        pictures = vae.decode_tokens(patches, 2), vae.decode_tokens(cells, 1)
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-5)
