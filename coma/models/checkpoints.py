"""Checkpoints that others wrote: reading them without running code, and the names of their tensors.

Vision transformers are brought to the names that timm gives them, from those of Hugging Face's transformers
here, from those of MAE, DINOv2, DINOv3, CLIP and others by timm's own filters.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import sys
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from coma.config import ViTConfig
from coma.errors import BadInput
from coma.library_errors import first_line
from coma.messages import abridged, counted
from coma.models.position_embeddings import sincos_positions
from coma.preflight import check_regular_file
from coma.registry import ARCHITECTURES

Tensors = dict[str, Tensor]

_NESTS = (
    *("state_dict_ema", "model_ema", "teacher", "model", "state_dict", "model_state_dict", "module"),
    *("net", "network", "backbone", "encoder", "student"),
)
"""Keys behind which checkpoints keep the tensors of a model, in the order in which they are preferred."""
_DEEPEST = 8
"""Nests that are opened: a pickle may hold itself."""
_FIRST_LAYERS = (
    "stem.conv.weight",
    "stem.weight",
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
)
"""Names of the first layer of an encoder; what stands before one of them is the prefix of the encoder."""
_NOT_PREFERRED = ("student", "average", "momentum")
"""Parts of the prefixes of encoders that are copies of another one."""
_TRANSFORMERS = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda match: f".attn.{match[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)
"""Names of ViT, ViTMAE and DINOv2 in Hugging Face's transformers, and what timm calls them."""
_PART = re.compile(r"(.*\.attn\.)(?:[qkv]_proj\.(?:weight|bias)|[qkv]_bias)")
"""Names of queries, keys or values alone."""
_LAYER_SCALE = re.compile(r"(blocks\.\d+)\.(?:ls([12])\.gamma|gamma_([12]))")
_EVA = re.compile(r"q_bias$|q_proj\.|gamma_1$|^storage_tokens$")


@dataclass
class Checkpoint:
    """Tensors of an encoder.

    Attributes:
        tensors: By their names, without the prefix of the encoder.
        beside: Names of those that are not the encoder's.
        notes: What was chosen or changed on the way, for people.
    """

    tensors: Tensors
    beside: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_checkpoint(path: Path) -> Checkpoint:
    """Returns the tensors of a `.safetensors` file, or of one that `torch.save` wrote, on the CPU.

    Nothing in the file is run: Python objects other than plain data are refused.

    Raises:
        BadInput: no such file, a damaged one, or one without tensors.
    """
    check_regular_file(path, "give a file of weights, an artifact, timm:NAME or hf-hub:ORG/NAME")
    plain: Mapping[str, Any] = (
        _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    )
    notes = []
    for _ in range(_DEEPEST):
        if not (found := [name for name in _NESTS if isinstance(plain.get(name), Mapping)]):
            break
        if len(found) > 1:
            notes.append(f"of {', '.join(found)} in the file, {found[0]} is used")
        plain = plain[found[0]]
    tensors = {str(name): value for name, value in plain.items() if _is_plain(value)}
    if not tensors:
        raise BadInput(f"{path}: holds no tensors{_among(plain)}; give a file of a model's weights")
    checkpoint = of_encoder(tensors)
    return Checkpoint(checkpoint.tensors, checkpoint.beside, notes + checkpoint.notes)


def of_encoder(tensors: Tensors) -> Checkpoint:
    """Returns the encoder's tensors among those of a larger model, by their names in the encoder."""
    first = (name for name in tensors if name.endswith(_FIRST_LAYERS))
    prefixes = {name.removesuffix(last) for name in first for last in _FIRST_LAYERS if name.endswith(last)}
    prefixes = {prefix for prefix in prefixes if not prefix or prefix.endswith(".")}
    if not prefixes:
        return Checkpoint(tensors)
    chosen, *others = sorted(prefixes, key=_rank)
    notes = [f"of the encoders {chosen}* and {abridged([f'{p}*' for p in others])}, the first is used"]
    own = {name.removeprefix(chosen): t for name, t in tensors.items() if name.startswith(chosen)}
    beside = [name for name in tensors if not name.startswith(chosen)]
    return Checkpoint(own, beside, notes if others else [])


def _rank(prefix: str) -> tuple[bool, bool, int, str]:
    return any(p in prefix for p in _NOT_PREFERRED), "teacher" not in prefix, len(prefix), prefix


def _among(plain: Mapping[Any, Any]) -> str:
    return f" but {abridged([str(name) for name in plain], 5)}" if plain else ""


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a readable .safetensors file ({error}); copy it again") from None


def _read_pickle(path: Path) -> Mapping[str, Any]:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about pickles that torch.save did not write
            plain = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{blocked[1]}, which could run code and is never loaded" if blocked else "no plain tensors"
        raise BadInput(f"{path}: holds {what}; give the model as a .safetensors file") from None
    except Exception as error:  # of zip archives, of numbers that make no sense
        reason = first_line(error) if path.stat().st_size else "the file is empty"
        raise BadInput(f"{path}: not a readable file of weights ({reason}); copy it again") from None
    if not isinstance(plain, Mapping):
        raise BadInput(f"{path}: holds a {type(plain).__name__}, not tensors by their names")
    return plain


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def timm_named(tensors: Tensors, network: nn.Module | None = None) -> Tensors:
    """Returns the tensors of a vision transformer by the names that timm gives them; no size changes.

    Args:
        tensors: As published.
        network: The network of timm's that is to take them; by default a plain vision transformer.

    Raises:
        BadInput: timm's filter takes for granted what is not there.
    """
    from timm.models import eva, vision_transformer

    if "embeddings.patch_embeddings.projection.weight" in tensors:
        tensors = {_from_transformers(name): tensor for name, tensor in tensors.items()}
        tensors = fuse_qkv({n: t for n, t in tensors.items() if n != "mask_token"})
    module = sys.modules[type(network).__module__] if network else vision_transformer
    if network is None and any(_EVA.search(name) for name in tensors):
        module = eva
    rename = getattr(module, "checkpoint_filter_fn", None)
    if rename is None:
        return tensors
    try:
        with redirect_stdout(StringIO()):  # the filter of EVA prints what it skips
            return dict(rename(dict(tensors), _as_stored(tensors, network)).items())
    except Exception as error:  # timm takes for granted what a file holds
        raise BadInput(f"not the weights of a vision transformer ({first_line(error)})") from None


def _as_stored(tensors: Tensors, network: nn.Module | None) -> Any:
    """Returns what timm's filters look at, with the sizes of the file, so that they resample nothing."""
    kernel = tensors.get("patch_embed.proj.weight")
    if network is not None and (kernel is None or kernel.ndim != 4):
        kernel = network.get_parameter("patch_embed.proj.weight")
    return SimpleNamespace(
        patch_embed=SimpleNamespace(proj=SimpleNamespace(weight=kernel)),
        pos_embed=None,
        head=None,
        get_parameter=network.get_parameter if network else lambda _: None,
    )


def _from_transformers(name: str) -> str:
    for pattern, replacement in _TRANSFORMERS:
        name = re.sub(pattern, replacement, name)
    return name


def is_part_of_qkv(name: str) -> bool:
    """Returns whether a tensor holds weights or biases of queries, keys or values alone."""
    return _PART.fullmatch(name) is not None


def fuse_qkv(tensors: Tensors) -> Tensors:
    """Returns the tensors with queries, keys and values as timm's one `qkv`; biases that are absent are 0."""
    fused = dict(tensors)
    for name in tensors:
        match = _PART.fullmatch(name)
        if match is None or name not in fused:
            continue
        prefix, kind = match[1], "weight" if name.endswith("weight") else "bias"
        suffixes = ("_proj.weight",) if kind == "weight" else ("_proj.bias", "_bias")
        found = [[f"{prefix}{part}{last}" for last in suffixes] for part in "qkv"]
        names = [next((name for name in each if name in fused), None) for each in found]
        if kind == "weight" and None in names:
            continue
        parts = [fused.pop(name) if name else None for name in names]
        like = next(part for part in parts if part is not None)
        fused[f"{prefix}qkv.{kind}"] = torch.cat([torch.zeros_like(like) if p is None else p for p in parts])
    return fused


def fold_layer_scale(tensors: Tensors) -> Tensors:
    """Returns the tensors without layer scale: its factors go into the linear layers before it, exactly."""
    folded = dict(tensors)
    for name in tensors:
        match = _LAYER_SCALE.fullmatch(name)
        layer = match and f"{match[1]}.{('attn.proj', 'mlp.fc2')[int(match[2] or match[3]) - 1]}"
        if layer and f"{layer}.weight" in folded:
            factor = folded.pop(name)
            folded[f"{layer}.weight"] = factor[:, None] * folded[f"{layer}.weight"]
            if f"{layer}.bias" in folded:
                folded[f"{layer}.bias"] = factor * folded[f"{layer}.bias"]
    return folded


def plain_vit(tensors: Tensors) -> Checkpoint:
    """Returns the tensors of a vision transformer by the names of `coma.models.vit.ViT`.

    The computation stays the same as far as it can be expressed: layer scale goes into the linear layers, the
    position of the class token into the token. What has no place there keeps timm's name.
    """
    named = timm_named(tensors)
    folded = fold_layer_scale(fuse_qkv(named))
    scaled = any(map(_LAYER_SCALE.fullmatch, named))
    notes = ["layer scale folded into the layers before it"] if scaled else []
    for kind in ("weight", "bias"):
        for ours, theirs in (("stem", "patch_embed.proj"), ("norm", "fc_norm")):
            if f"{ours}.{kind}" not in folded and f"{theirs}.{kind}" in folded:
                folded[f"{ours}.{kind}"] = folded.pop(f"{theirs}.{kind}")
    absent = [name for name in folded if name.endswith(("stem.weight", "attn.qkv.weight"))]
    absent = [name for name in absent if name.replace("weight", "bias") not in folded]
    folded |= {name.replace("weight", "bias"): folded[name].new_zeros(len(folded[name])) for name in absent}
    notes += [f"{counted(len(absent), 'absent bias', 'absent biases')} set to 0"] if absent else []
    token, positions = folded.pop("cls_token", None), folded.get("pos_embed")
    if positions is not None and positions.ndim == 3:
        prefix = _prefix_positions(positions.shape[1], named)
        if _are_fixed(positions[0, prefix:]):
            del folded["pos_embed"]
        else:
            notes.append("this encoder computes fixed positions; --model timm:NAME keeps learned ones")
        if prefix and token is not None and token.shape[-1] == positions.shape[-1]:
            token = token + positions[:, :1]
    return Checkpoint(folded | ({} if token is None else {"cls_token": token.flatten()}), notes=notes)


def resample_positions(positions: Tensor, prefix: int, grid: tuple[int, int]) -> tuple[Tensor, str]:
    """Returns learned positions `[1, prefix + places, dim]` for another grid, and what was done.

    Raises:
        ValueError: the places are no square, so how they lie is not known.
    """
    side = math.isqrt(positions.shape[1] - prefix)
    if side < 1 or side**2 + prefix != positions.shape[1]:
        raise ValueError(f"its {positions.shape[1]} positions are no square")
    resample: Any = resample_abs_pos_embed
    resampled = resample(positions, list(grid), [side, side], num_prefix_tokens=prefix)
    return resampled, f"pos_embed from {side} x {side} to {grid[0]} x {grid[1]} positions"


def _are_fixed(positions: Tensor) -> bool:
    """Returns whether positions `[n, dim]` are those that our encoder computes, as MAE's are."""
    count, dim = positions.shape
    side = math.isqrt(count)
    if side**2 != count or dim % 4:
        return False
    fixed = sincos_positions(side, side, dim, device=positions.device).flatten(0, 1)
    return torch.allclose(positions.float(), fixed, atol=1e-3)


def _prefix_positions(count: int, named: Tensors) -> int:
    """Returns how many of the positions belong to class and register tokens: the rest fill a square."""
    tokens = [named[name].shape[1] for name in ("cls_token", "reg_token") if name in named]
    rests = ((n, count - n) for n in (sum(tokens), *tokens[:1]))
    return next((n for n, rest in rests if rest > 0 and math.isqrt(rest) ** 2 == rest), 0)


def vit_like(tensors: Tensors) -> ViTConfig | None:
    """Returns the preset of a plain vision transformer that takes all of these tensors, if there is one.

    Heads leave no trace in the tensors; those of the preset are taken. Learned positions and registers
    have no place in it.
    """
    try:
        named = tensors if "stem.weight" in tensors else plain_vit(tensors).tensors
    except Exception:  # tensors of anything
        return None
    kernel = named.get("stem.weight")
    if kernel is None or kernel.ndim != 4 or {"pos_embed", "reg_token", "norm_pre.weight"} & named.keys():
        return None
    depth = len({match[1] for name in named if (match := re.match(r"blocks\.(\d+)\.", name))})
    dim, channels, patch = kernel.shape[:3]
    for preset in ARCHITECTURES["vit"].presets.values():
        if (preset.settings["dim"], preset.settings["depth"]) == (dim, depth):
            return ViTConfig(channels=channels, patch=patch, **preset.settings)
    return None
