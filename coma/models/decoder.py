"""The decoder: a light transformer that fills in what a view does not see.

One decoder serves all views. Visible units bring their features, hidden units one learned mask token;
fixed positions tell them apart; every unit's pixels are predicted (MAE sec. 3; CoMA, Li et al. 2025).
"""

from __future__ import annotations

import torch
from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from coma.config import DecoderConfig
from coma.models.blocks import run_block
from coma.models.position_embeddings import sincos_positions
from coma.models.vit import init_xavier


class Decoder(nn.Module):
    """Features of the visible units to pixels of all units.

    Args:
        features: Channels of the encoder's output.
        pixels: Values per mask unit: unit x unit x image channels.
        config: Width, depth and heads.
    """

    def __init__(self, features: int, pixels: int, config: DecoderConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(features, config.dim)
        self.mask_token = nn.Parameter(torch.zeros(config.dim))
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, qkv_bias=True) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, pixels)
        self.grad_checkpointing = False
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(init_xavier)

    def forward(self, features: Tensor, visible: Tensor) -> Tensor:
        """Predict pixels, view by view.

        Args:
            features: `[b, h, w, c]` when the views share one map, else `[v, b, h, w, c]`; only what a view
                sees is used.
            visible: bool `[v, b, h, w]`.

        Returns:
            `[v, b, h, w, pixels]`.
        """
        return self.head(self.states(features, visible))

    def states(self, features: Tensor, visible: Tensor) -> Tensor:
        """Returns the features that pixels are predicted from, `[v, b, h, w, dim]`."""
        v, _, h, w = visible.shape
        tokens = self.embed(features)
        x = torch.where(visible[..., None], tokens, self.mask_token.to(tokens.dtype))
        x = x + sincos_positions(h, w, x.shape[-1], device=x.device).to(x.dtype)
        x = rearrange(x, "v b h w c -> (v b) (h w) c")
        for block in self.blocks:
            x = run_block(block, x, recompute=self.grad_checkpointing and self.training)
        return rearrange(self.norm(x), "(v b) (h w) c -> v b h w c", v=v, h=h)
