"""Plain ViT that really drops tokens: the encoder of MAE (He et al. 2021, sec. 3 and appendix A.1).

Blocks are timm's; what is ours is that the views of `group` are encoded one sequence each (see
`view_sequences`) and put back on one map, so that an objective treats this encoder and DyViT alike.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from einops import rearrange, repeat
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from coma.config import ViTConfig
from coma.models.blocks import drop_path_rates, run_block
from coma.models.checkpoints import Checkpoint, Tensors, plain_vit
from coma.models.plain import PlainEncoder
from coma.models.position_embeddings import sincos_positions
from coma.models.view_sequences import ViewSequences

for _name in ("rearrange", "repeat", "sincos_positions"):
    torch.fx.wrap(_name)  # one node each in graphs of torch.fx


class ViT(PlainEncoder):
    """Backbone: images to a pyramid of one map.

    Args:
        config: Channels, patch, width, depth and heads.
    """

    config: ViTConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    num_prefix_tokens = 1

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.stem = nn.Conv2d(config.channels, config.dim, config.patch, stride=config.patch)
        self.cls_token = nn.Parameter(torch.zeros(config.dim))
        rates = drop_path_rates(config.drop_path, config.depth)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, config.mlp_ratio, qkv_bias=True, drop_path=rate) for rate in rates
        )
        self.norm = nn.LayerNorm(config.dim)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.xavier_uniform_(self.stem.weight.view(config.dim, -1))
        self.apply(init_xavier)

    def parts(self) -> list[nn.Module]:
        """Returns the stem with the class token, and the blocks, which can be frozen in this order."""
        return [nn.ModuleList([self.stem, nn.ParameterList([self.cls_token])]), *self.blocks]

    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed beyond vectors and biases: none (the cls token is a vector)."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise decay: stem, every block, norm (timm's convention)."""
        return {
            "stem": r"^stem|^cls_token",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def from_checkpoint(self, tensors: Tensors) -> Checkpoint:
        """Returns the tensors of a plain vision transformer, whoever made it, by the names of this one's."""
        return Checkpoint(tensors) if "stem.weight" in tensors else plain_vit(tensors)

    def _embed(self, images: Tensor) -> Tensor:
        x = rearrange(self.stem(images), "b c h w -> b h w c")
        return x + sincos_positions(x.shape[1], x.shape[2], self.config.dim, device=x.device).to(x.dtype)

    def _encode(self, tokens: Tensor, sequences: ViewSequences) -> Tensor:
        # with a cls token alongside
        cls = repeat(self.cls_token.to(tokens.dtype), "c -> n 1 c", n=tokens.shape[0])
        x = torch.cat([cls, tokens], dim=1)
        seen = sequences.attended(prefix=1)
        for block in self.blocks:
            x = run_block(block, x, seen, recompute=self.grad_checkpointing and self.training)
        return self.norm(x[:, 1:])


def init_xavier(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero biases, as MAE initialises (appendix A.1)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
