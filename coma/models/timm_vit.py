"""timm's vision transformers as encoders that really drop tokens.

The network is timm's own, unchanged, under the name `timm`: `timm.blocks.0.norm1.weight` is timm's
`blocks.0.norm1.weight`, so weights go from one to the other by a prefix. Its classifier head and attention
pooling are left out. What is ours is the order of things: patches are embedded and get their positions first,
then each view becomes a sequence of its own patches behind its own copy of the class and register tokens
(see `view_sequences`). Rotary angles travel with the patches.

Without groups, features equal timm's `forward_features`. Networks that timm builds to be pooled before their
last norm (`fc_norm`) have no other norm there; here it normalises every patch, which is what such networks
were trained with before timm moved it (EVA-02, BEiT-3).
"""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.fx
from einops import rearrange
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from coma.config import TimmConfig
from coma.errors import BadInput
from coma.models.blocks import run_block
from coma.models.checkpoints import (
    Checkpoint,
    Tensors,
    fuse_qkv,
    is_part_of_qkv,
    resample_positions,
    timm_named,
)
from coma.models.hub import unknown_to_timm
from coma.models.plain import PlainEncoder
from coma.models.position_embeddings import cubic_weights
from coma.models.view_sequences import ViewSequences, is_exporting

for _name in ("rearrange", "resample_abs_pos_embed", "_rotations"):
    torch.fx.wrap(_name)  # one node each in graphs of torch.fx


class TimmViT(PlainEncoder):
    """Backbone: images to a pyramid of one map.

    Args:
        config: Name of the network in timm, channels, patch, width and depth.

    Raises:
        BadInput: timm has no such network, or cannot build it with these settings.
    """

    config: TimmConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    timm: Any
    """timm's network, without a head."""

    def __init__(self, config: TimmConfig) -> None:
        super().__init__(config)
        self.timm = _network(
            config.name,
            in_chans=config.channels,
            patch_size=config.patch,
            img_size=tuple(side * config.patch for side in config.position_grid),
            embed_dim=config.dim,
            depth=config.depth,
            drop_path_rate=config.drop_path,
        )
        self.num_prefix_tokens = self.timm.num_prefix_tokens
        self.register_load_state_dict_post_hook(_compute_buffers)

    @property
    def blocks(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Transformer blocks."""
        return self.timm.blocks

    @property
    def norm(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Norm of the features; nn.Identity for networks that have none."""
        return self.timm.fc_norm if isinstance(self.timm.norm, nn.Identity) else self.timm.norm

    def parts(self) -> list[nn.Module]:
        """Returns the stem with tokens and positions, and the blocks, which can be frozen in this order."""
        network = self.timm
        layers = [network.patch_embed, network.norm_pre, _rope_of(network) or nn.Identity()]
        tokens = nn.ParameterList(network.parameters(recurse=False))
        return [nn.ModuleList([*layers, tokens]), *network.blocks]

    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed beyond vectors and biases: tokens and positions."""
        return {f"timm.{name}" for name in self.timm.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise decay: stem, every block, norm (timm's convention)."""
        return {
            "stem": r"^timm\.(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre|rope)",
            "blocks": [(r"^timm\.blocks\.(\d+)", None), (r"^timm\.(?:fc_)?norm\.", (99999,))],
        }

    def from_checkpoint(self, tensors: Tensors) -> Checkpoint:
        """Returns the tensors of a vision transformer by the names of this one's; positions are resampled."""
        network, notes = self.timm, []
        own = network.state_dict()
        named = timm_named(tensors, network)
        if not any(map(is_part_of_qkv, own)):
            named = fuse_qkv(named)
        for kind in ("weight", "bias"):
            for theirs, ours in (("norm", "fc_norm"), ("fc_norm", "norm")):
                if f"{ours}.{kind}" in own.keys() - named.keys() and f"{theirs}.{kind}" in named:
                    named[f"{ours}.{kind}"] = named.pop(f"{theirs}.{kind}")
        stored, own_positions = named.get("pos_embed"), network.pos_embed
        prefix = 0 if network.no_embed_class else self.num_prefix_tokens
        if stored is not None and own_positions is not None and stored.shape != own_positions.shape:
            named["pos_embed"], note = resample_positions(stored, prefix, network.patch_embed.grid_size)
            notes.append(note)
        known = {f"timm.{name}": tensor for name, tensor in named.items() if name in own}
        return Checkpoint(known, [name for name in named if name not in own], notes)

    def _embed(self, images: Tensor) -> Tensor:
        network, patches = self.timm, self.timm.patch_embed
        x = patches.norm(rearrange(patches.proj(images), "b c h w -> b h w c"))
        if network.pos_embed is None:
            return x
        table = network.pos_embed[:, 0 if network.no_embed_class else self.num_prefix_tokens :]
        return x + self._resampled(table, x.shape[1], x.shape[2]).to(x.dtype)

    def _resampled(self, table: Tensor, rows: int, cols: int) -> Tensor:
        # 1 places c -> 1 rows cols c
        old = self.config.position_grid
        if is_exporting():
            down = cubic_weights(old[0], rows, device=table.device)
            across = cubic_weights(old[1], cols, device=table.device)
            places = table.float().unflatten(1, old).permute(0, 3, 1, 2)
            return (down @ places @ across.T).permute(0, 2, 3, 1)
        resample: Any = resample_abs_pos_embed  # torch.fx.wrap hides its type
        return resample(table, [rows, cols], list(old), num_prefix_tokens=0).unflatten(1, (rows, cols))

    def _encode(self, tokens: Tensor, sequences: ViewSequences) -> Tensor:
        network, before = self.timm, self.num_prefix_tokens
        x = torch.cat([*self._prefix(tokens), tokens], dim=1)
        x = network.norm_pre(x)
        seen = sequences.attended(prefix=before)
        rope, blocks = _rope_of(network), len(network.blocks)
        angles = [None] * blocks if rope is None else _rotations(rope, sequences, blocks)
        for i, block in enumerate(network.blocks):
            context = (angles[i], seen) if isinstance(network, Eva) else (seen,)
            x = run_block(block, x, *context, recompute=self.grad_checkpointing and self.training)
        return self.norm(x[:, before:])

    def _prefix(self, tokens: Tensor) -> list[Tensor]:
        # class and register tokens of every sequence, n p c; none for networks without
        network = self.timm
        own = [each for each in (network.cls_token, network.reg_token) if each is not None]
        if not own:
            return []
        prefix = torch.cat(own, dim=1)
        if network.pos_embed is not None and not network.no_embed_class:
            prefix = prefix + network.pos_embed[:, : self.num_prefix_tokens]
        return [prefix.to(tokens.dtype).expand(tokens.shape[0], -1, -1)]


def timm_config(name: str, channels: int = 3) -> TimmConfig:
    """Returns the settings of a network of timm's, with its own patch, width, depth and positions.

    Args:
        name: Name in timm; with or without the tag of weights, which may be made for another image size.
        channels: Channels of the images.

    Raises:
        BadInput: timm has no such network, or it is no vision transformer that can drop tokens.
    """
    with torch.device("meta"):
        network = _network(name)
    embed = network.patch_embed
    return TimmConfig(
        name=network.pretrained_cfg["architecture"],
        patch=embed.patch_size[0],
        dim=network.embed_dim,
        depth=len(network.blocks),
        position_grid=embed.grid_size,
        channels=channels,
    )


def _rotations(rope: Any, sequences: ViewSequences, blocks: int) -> list[Tensor]:
    """Returns the rotary angles of every slot for every block, each `[n, heads, s, c]`."""
    table = _rotary_table(rope, sequences.rows, sequences.cols)
    tables = table if table.ndim == 4 else table[None, None]  # blocks heads places c
    angles = [sequences.at(each.transpose(0, 1)).transpose(1, 2) for each in tables]
    return angles if len(angles) == blocks else angles * blocks


def _rotary_table(rope: Any, rows: int, cols: int) -> Tensor:
    """Returns sines and cosines of all places, `[places, c]` or `[blocks, heads, places, c]`."""
    if not (
        is_exporting() and isinstance(rope, RotaryEmbeddingDinoV3) and rope.normalize_coords == "separate"
    ):
        return rope.get_embed(shape=[rows, cols])
    # timm makes numbers of rows and cols, which a graph for any size must not
    device: Any = rope.periods.device
    sides = ((torch.arange(n, device=device) + 0.5 + rope.grid_offset) / n for n in (rows, cols))
    places = torch.cartesian_prod(*sides) * 2 - 1
    turned = places.flip(-1) if rope.grid_indexing == "xy" else places
    return torch.cat(rope._get_pos_embed_from_coords(turned), dim=-1)


def _compute_buffers(encoder: Any, _: Any) -> None:
    """Computes what no file holds (angles, zero biases) of a network that was built on the device meta."""
    if encoder.timm.patch_embed.proj.weight.is_meta:
        return
    for module in encoder.timm.modules():
        missing = {name: each for name, each in module.named_buffers(recurse=False) if each.is_meta}
        for name, each in missing.items():
            setattr(module, name, torch.empty_like(each, device="cpu"))
        if missing:
            module.init_non_persistent_buffers()


def _network(name: str, **settings: Any) -> Any:
    if not timm.is_model(name):
        raise BadInput(f"timm:{name}: no model of timm's; {unknown_to_timm(name)}")
    unfit = f"timm:{name}: not a vision transformer that can drop tokens; one is vit_small_patch14_dinov2"
    try:
        network: Any = timm.create_model(name, num_classes=0, dynamic_img_size=True, **settings)
    except TypeError:  # of a network without these settings
        raise BadInput(unfit) from None
    except (AssertionError, RuntimeError, ValueError) as error:
        raise BadInput(f"timm:{name}: cannot be built with these settings ({error})") from None
    patches = getattr(network, "patch_embed", None)
    if type(network) not in (VisionTransformer, Eva) or type(patches) is not PatchEmbed:
        raise BadInput(unfit)
    network.reset_classifier(0, "")
    return network


def _rope_of(network: Any) -> nn.Module | None:
    return getattr(network, "rope", None)
