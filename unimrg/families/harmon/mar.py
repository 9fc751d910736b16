"""The masked auto-regressive image model: encoder, decoder and diffusion head (MAR, arXiv 2406.11838).

Harmon (arXiv 2503.21979) uses the encoder for understanding and drawing alike. Module names are those of
the published checkpoint. The encoder and the decoder come in two forms with one set of blocks: dense
(every picture shows the same number of tokens) and ragged (pictures concatenated, no padding).

Shape suffixes: B pictures, L cells of the grid (raster order), V visible tokens per picture, U buffer
tokens, S = U + V or U + L, N rows of several pictures together, C token width, W width, h heads,
d head width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimrg.families.harmon.config import MARConfig
from unimrg.families.harmon.diffusion import DiffusionHead

Grid = tuple[int, int]
# (q, k, v, dropout_p) -> out, all [..., h, d]: full attention, not causal.
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
# (q_Nhd, k_Nhd, v_Nhd, lengths, dropout_p) -> out_Nhd: full attention inside each run of `lengths` rows.
VarlenAttention = Callable[[Tensor, Tensor, Tensor, list[int], float], Tensor]


def dense_attention(q_BShd: Tensor, k_BShd: Tensor, v_BShd: Tensor, dropout_p: float) -> Tensor:
    """Full attention inside each picture of a batch of equal lengths [B, S, h, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BShd, k_BShd, v_BShd))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p).transpose(1, 2)


def sdpa_varlen(q_Nhd: Tensor, k_Nhd: Tensor, v_Nhd: Tensor, lengths: list[int], dropout_p: float) -> Tensor:
    """Full attention inside each run of rows; runs of equal length go through one call together."""
    alike: dict[int, list[int]] = defaultdict(list)
    for i, length in enumerate(lengths):
        alike[length].append(i)
    if len(alike) == 1:
        q, k, v = (x.unflatten(0, (len(lengths), lengths[0])) for x in (q_Nhd, k_Nhd, v_Nhd))
        return dense_attention(q, k, v, dropout_p).flatten(0, 1)
    runs = [x.split(lengths) for x in (q_Nhd, k_Nhd, v_Nhd)]
    out: list[Tensor] = [q_Nhd] * len(lengths)
    for members in alike.values():
        q, k, v = (torch.stack([run[i] for i in members]) for run in runs)
        for i, rows in zip(members, dense_attention(q, k, v, dropout_p).unbind(0), strict=True):
            out[i] = rows
    return torch.cat(out)


def interleave(first_BUx: Tensor, rest_Nx: Tensor, lengths: list[int]) -> Tensor:
    """Rows of several pictures [B*U + N, ...]: U first rows for each, then its `lengths[i]` of the rest."""
    pairs = zip(first_BUx.unbind(0), rest_Nx.split(lengths), strict=True)
    return torch.cat([part for pair in pairs for part in pair])


def repeat_rows(x_Bx: Tensor, lengths: list[int]) -> Tensor:
    """Row i of x `lengths[i]` times, [sum(lengths), ...]; the lengths stay on the host."""
    pairs = zip(x_Bx.unbind(0), lengths, strict=True)
    return torch.cat([row.expand(length, *row.shape) for row, length in pairs])


@torch.compiler.disable
def _uncompiled(attend: Attend, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Outside of compiled blocks, which would be compiled again for other lengths."""
    return attend(q, k, v, dropout_p)


class Attention(nn.Module):
    """Multi-head attention with a fused projection; who attends to whom is up to `attend`."""

    def __init__(self, width: int, heads: int, attn_dropout: float, proj_dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attn_dropout = attn_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(proj_dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        out = _uncompiled(attend, q, k, v, self.attn_dropout if self.training else 0.0)
        return self.proj_drop(self.proj(out.flatten(-2)))


class MLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block on [B, S, W] or [N, W]."""

    def __init__(self, width: int, heads: int, config: MARConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = Attention(width, heads, config.attn_dropout, config.proj_dropout)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width, int(width * config.mlp_ratio), config.proj_dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.attn(self.norm1(x), attend)
        return x + self.mlp(self.norm2(x))


class MAR(nn.Module):
    """Encoder, decoder, their position tables, and the diffusion head `diffloss`.

    varlen_attention: used by the ragged forms; replace it by a faster kernel where there is one.
    """

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        self.varlen_attention: VarlenAttention = sdpa_varlen
        width, out_width, eps = config.encoder_width, config.decoder_width, config.norm_eps
        buffers, cells = config.buffer_size, config.grid[0] * config.grid[1]

        self.fake_latent = nn.Parameter(torch.empty(1, width))
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, buffers + cells, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, out_width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, buffers + cells, out_width))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, cells, out_width))
        # Published checkpoints carry this table; nothing reads it.
        self.class_emb = nn.Embedding(config.class_num, width).requires_grad_(False)

        self.z_proj = nn.Linear(config.token_width, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=eps)
        blocks = (Block(width, config.encoder_heads, config) for _ in range(config.encoder_depth))
        self.encoder_blocks = nn.ModuleList(blocks)
        self.encoder_norm = nn.LayerNorm(width, eps=eps)
        self.decoder_embed = nn.Linear(width, out_width)
        blocks = (Block(out_width, config.decoder_heads, config) for _ in range(config.decoder_depth))
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(out_width, eps=eps)
        self.diffloss = DiffusionHead(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for linears, standard deviation 0.02 for tables and tokens."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        tables = (
            self.encoder_pos_embed_learned,
            self.decoder_pos_embed_learned,
            self.diffusion_pos_embed_learned,
        )
        for parameter in (*tables, self.fake_latent, self.mask_token, self.class_emb.weight):
            nn.init.normal_(parameter, std=0.02)
        self.diffloss.net.reset_parameters()

    def encode(self, tokens_BLC: Tensor, grid: Grid, mask_BL: Tensor | None = None) -> Tensor:
        """Features [B, U + V, W] of the buffers (first) and the visible tokens in raster order.

        mask_BL: nonzero = hidden; every picture hides the same number. None hides nothing.
        """
        pos_SW = self._positions(self.encoder_pos_embed_learned, grid)
        x_BVW = self.z_proj(tokens_BLC) + pos_SW[self.config.buffer_size :]
        if mask_BL is not None:
            index_BV = visible_cells(mask_BL, count_visible(mask_BL))
            x_BVW = x_BVW.gather(1, index_BV.unsqueeze(-1).expand(-1, -1, x_BVW.shape[-1]))
        x_BSW = torch.cat([self._buffer_tokens(pos_SW, x_BVW.shape[0]).to(x_BVW.dtype), x_BVW], dim=1)
        x_BSW = self._run(self.encoder_blocks, self.z_proj_ln(x_BSW), dense_attention)
        return self.encoder_norm(x_BSW)

    def encode_ragged(self, tokens_NC: Tensor, cell_N: Tensor, lengths: list[int], grid: Grid) -> Tensor:
        """Features [sum(U + length), W] of several pictures' visible tokens, each picture's buffers first.

        cell_N: raster index of each token in the grid. lengths: visible tokens per picture; zero is allowed.
        """
        pos_SW = self._positions(self.encoder_pos_embed_learned, grid)
        x_NW = self.z_proj(tokens_NC) + F.embedding(cell_N, pos_SW[self.config.buffer_size :])
        buffers_BUW = self._buffer_tokens(pos_SW, len(lengths)).to(x_NW.dtype)
        x_NW = self.z_proj_ln(interleave(buffers_BUW, x_NW, lengths))
        whole = [self.config.buffer_size + length for length in lengths]

        def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
            return self.varlen_attention(q, k, v, whole, dropout_p)

        return self.encoder_norm(self._run(self.encoder_blocks, x_NW, attend))

    def decode(self, x_BSW: Tensor, mask_BL: Tensor, grid: Grid) -> Tensor:
        """Condition vectors [B, L, W'] from features [B, U + V, W] laid out as `encode` returns them."""
        B, S, _ = x_BSW.shape
        index_BV = visible_cells(mask_BL, S - self.config.buffer_size)
        return self.decode_ragged(x_BSW.flatten(0, 1), index_BV.flatten(), [index_BV.shape[1]] * B, grid)

    def decode_ragged(self, x_NW: Tensor, cell_N: Tensor, lengths: list[int], grid: Grid) -> Tensor:
        """Condition vectors [B, L, W'] from features laid out as `encode_ragged` returns them."""
        B, U, L = len(lengths), self.config.buffer_size, grid[0] * grid[1]
        start_B = torch.arange(B, device=cell_N.device) * (U + L)
        slots_BU = start_B.unsqueeze(1) + torch.arange(U, device=cell_N.device)
        slot_N = interleave(slots_BU, repeat_rows(start_B, lengths) + U + cell_N, lengths)

        known_NW = self.decoder_embed(x_NW)
        empty = self.mask_token.to(known_NW.dtype).expand(1, B * (U + L), -1).squeeze(0)
        y_BSW = empty.index_copy(0, slot_N, known_NW).unflatten(0, (B, U + L))
        y_BSW = y_BSW + self._positions(self.decoder_pos_embed_learned, grid)
        y_BSW = self.decoder_norm(self._run(self.decoder_blocks, y_BSW, dense_attention))
        return y_BSW[:, U:] + self._positions(self.diffusion_pos_embed_learned, grid, buffers=0)

    def _buffer_tokens(self, pos_SW: Tensor, pictures: int) -> Tensor:
        """Buffer tokens with their positions [B, U, W]; all start from one learned vector."""
        buffers_UW = self.fake_latent + pos_SW[: self.config.buffer_size]
        return buffers_UW.expand(pictures, -1, -1)

    def _positions(self, table_1SW: Tensor, grid: Grid, buffers: int | None = None) -> Tensor:
        """A position table [S, W] at another grid: its image part resized bilinearly, in float32."""
        U = self.config.buffer_size if buffers is None else buffers
        if grid == self.config.grid:
            return table_1SW[0]
        picture = table_1SW[:, U:].unflatten(1, self.config.grid).permute(0, 3, 1, 2).float()
        picture = F.interpolate(picture, size=grid, mode="bilinear", align_corners=False)
        return torch.cat([table_1SW[0, :U], picture[0].flatten(1).T.to(table_1SW.dtype)])

    def _run(self, blocks: nn.ModuleList, x: Tensor, attend: Attend) -> Tensor:
        for block in blocks:
            x = block(x, attend)
        return x


def count_visible(mask_BL: Tensor) -> int:
    """Visible tokens per picture. Reads the mask on the host, so the training path passes lengths instead."""
    return int((mask_BL[0] == 0).sum())


def visible_cells(mask_BL: Tensor, visible: int) -> Tensor:
    """Raster indices of the visible tokens [B, V], in raster order."""
    return (mask_BL != 0).to(torch.int8).argsort(dim=1, stable=True)[:, :visible]
