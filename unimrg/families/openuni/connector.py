"""The connector: what the language model's queries become before SANA reads them (OpenUni, arXiv 2505.23661).

A pre-norm transformer over the queries of one drawing, bidirectional, without positions and without a final
norm. Parameter names are the published ones.

Shape suffixes: G drawings, Q queries, W width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from unimrg.families.openuni.config import ConnectorConfig


class Attention(nn.Module):
    """Multi-head self-attention, every projection with a bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_GQW: Tensor) -> Tensor:
        projected = (project(x_GQW) for project in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)
        out = scaled_dot_product_attention(query, key, value)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_GQW: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x_GQW), approximate="tanh"))


class Layer(nn.Module):
    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.self_attn = Attention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_width)

    def forward(self, x_GQW: Tensor) -> Tensor:
        x_GQW = x_GQW + self.self_attn(self.layer_norm1(x_GQW))
        return x_GQW + self.mlp(self.layer_norm2(x_GQW))


class Connector(nn.Module):
    """Layers of self-attention over [G, Q, W]; the shape stays."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        for layer in self.layers:
            _initialise(layer)

    def forward(self, x_GQW: Tensor) -> Tensor:
        for layer in self.layers:
            x_GQW = layer(x_GQW)
        return x_GQW


def _initialise(layer: nn.Module) -> None:
    """Xavier for matrices; attention biases zero, those of the MLP nearly."""
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if name.startswith("mlp"):
                nn.init.normal_(module.bias, std=1e-6)
            else:
                nn.init.zeros_(module.bias)
