"""Plain ViT that really drops tokens: the encoder of MAE (He et al. 2021, sec. 3 and appendix A.1).

Blocks are timm's; what is ours is that the views of `group` are gathered, encoded one sequence each, and
put back on one map, so that an objective treats this encoder and DyViT alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pretrain.config import ViTConfig
from pretrain.masking.units import pad_to_units
from pretrain.models.blocks import drop_path_rates, run_block
from pretrain.models.dyvit import check_images
from pretrain.models.positions import sincos_positions


class ViT(nn.Module):
    """Backbone: images to a pyramid of one map.

    Args:
        config: Channels, patch, width, depth and heads.
    """

    output_fmt = "NHWC"

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.unit = config.unit
        self.num_features = config.dim
        self.strides = (config.patch,)
        self.grad_checkpointing = False
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

    def forward(self, images: Tensor, group: Tensor | None = None) -> tuple[Tensor, ...]:
        """One map `[b, dim, ceil(H/patch), ceil(W/patch)]`; see `DyViT.forward` for `group` and errors."""
        return (rearrange(self.forward_features(images, group), "b h w c -> b c h w"),)

    def forward_features(
        self, images: Tensor, group: Tensor | None = None, sizes: Sequence[int] | None = None
    ) -> Tensor:
        """One feature vector per mask unit, `[b, h, w, dim]`; zeros where the group is -1.

        Args:
            images: `[b, c, H, W]`, normalised.
            group: View of every unit, int64 `[b, h, w]`; -1 for units that are dropped.
            sizes: Units in each group, the same in every sample; counted (which waits for the device)
                when not given, and samples with different counts are then encoded one by one.
        """
        check_images(images, group, self.config.channels, self.unit)
        x = rearrange(self.stem(pad_to_units(images, self.unit)), "b c h w -> b h w c")
        b, h, w, _ = x.shape
        x = x + sincos_positions(h, w, x.shape[-1], device=x.device).to(x.dtype)
        tokens = x.flatten(1, 2)
        if group is None:
            return self._encode(tokens).view(b, h, w, -1)
        if sizes is None:
            counts = [row.unique(return_counts=True) for row in group.flatten(1)]
            sizes = [int(n) for view, n in zip(*counts[0], strict=True) if view >= 0]
            if any(not torch.equal(torch.stack(count), torch.stack(counts[0])) for count in counts[1:]):
                singles = zip(images.split(1), group.split(1), strict=True)
                return torch.cat([self.forward_features(image, views) for image, views in singles])
        return self._encode_views(tokens, group.flatten(1), sizes).view(b, h, w, -1)

    def pool(self, images: Tensor) -> Tensor:
        """Mean of the map, `[b, dim]`: what linear and nearest-neighbour classifiers work on."""
        return self.forward_features(images).mean(dim=(1, 2))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed beyond vectors and biases: none (the cls token is a vector)."""
        return set()

    def _encode_views(self, tokens: Tensor, group: Tensor, sizes: Sequence[int]) -> Tensor:
        # Units sorted by group: dropped ones (-1) first, then view by view.
        order = group.argsort(dim=1, stable=True)[:, group.shape[1] - sum(sizes) :]
        index = order[:, :, None].expand(-1, -1, tokens.shape[-1])
        shown = tokens.gather(1, index)
        if len(set(sizes)) == 1:  # views of one size share a batch
            views = rearrange(shown, "b (k n) c -> (b k) n c", k=len(sizes))
            encoded = rearrange(self._encode(views), "(b k) n c -> b (k n) c", k=len(sizes))
        else:
            encoded = torch.cat([self._encode(view) for view in shown.split(list(sizes), dim=1)], dim=1)
        empty = encoded.new_zeros(*tokens.shape[:2], encoded.shape[-1])
        return empty.scatter(1, index, encoded)

    def _encode(self, tokens: Tensor) -> Tensor:
        # b n c -> b n c, with a cls token alongside
        x = torch.cat([repeat(self.cls_token.to(tokens.dtype), "c -> b 1 c", b=len(tokens)), tokens], dim=1)
        for block in self.blocks:
            x = run_block(block, x, recompute=self.grad_checkpointing and self.training)
        return self.norm(x[:, 1:])


def init_xavier(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero biases, as MAE initialises (appendix A.1)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
