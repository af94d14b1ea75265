"""Checkpoints of others: what they hold is found, brought to our names, and computes the same."""

import argparse
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from coma.config import DyViTConfig, ViTConfig
from coma.errors import BadInput
from coma.models import build_encoder
from coma.models.checkpoints import Checkpoint, fuse_qkv, of_encoder, plain_vit, read_checkpoint, vit_like
from coma.models.initialize import initialize
from coma.models.position_embeddings import sincos_positions
from coma.models.timm_vit import timm_config

CONFIG = ViTConfig(patch=8, dim=32, depth=2, heads=2)
SHAPE: dict[str, Any] = {
    **{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0},
    "dynamic_img_size": True,
}


def network(kind: Callable[..., Any] = VisionTransformer, **settings: Any) -> Any:
    """A network of timm's whose every weight differs from zero and one."""
    torch.manual_seed(1)
    built = kind(**SHAPE | settings).eval()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return built


def with_fixed_positions(built: Any) -> Any:
    grid = sincos_positions(4, 4, 32, device=torch.device("cpu"))
    with torch.no_grad():
        built.pos_embed[:, -16:] = grid.flatten(0, 1)
    return built


def features(built: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(2, 3, 32, 32)
    return images, built.forward_features(images)[:, -16:].unflatten(1, (4, 4))


# the same numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"init_values": 0.5}, {"qkv_bias": False}])
def test_timms_vision_transformer_computes_the_same_here(settings: dict[str, Any]) -> None:
    built = with_fixed_positions(network(**settings))
    encoder: Any = build_encoder(CONFIG)
    taken = initialize(encoder, of_encoder(built.state_dict()))
    assert taken.matched == taken.total == len(dict(encoder.named_parameters()))
    assert not taken.left_out
    images, wanted = features(built)
    torch.testing.assert_close(encoder.eval().forward_features(images), wanted, atol=2e-3, rtol=1e-3)


def test_learned_positions_are_left_out_and_that_is_said() -> None:
    taken = initialize(build_encoder(CONFIG), of_encoder(network(reg_tokens=2, pre_norm=True).state_dict()))
    assert taken.matched == taken.total
    assert {"pos_embed", "reg_token", "norm_pre.weight"} <= set(taken.left_out)
    assert "computes fixed positions" in str(taken) and "absent bias set to 0" in str(taken)


def test_positions_on_no_square_are_left_out() -> None:
    built = network(img_size=(32, 64))
    taken = initialize(build_encoder(CONFIG), of_encoder(built.state_dict()))
    assert taken.matched == taken.total and "pos_embed" in taken.left_out


@pytest.mark.parametrize("kind", [torch.float16, torch.float64, torch.float8_e4m3fn])
def test_other_number_formats_are_converted_and_said(kind: torch.dtype) -> None:
    tensors = {name: tensor.to(kind) for name, tensor in network().state_dict().items()}
    encoder: Any = build_encoder(CONFIG)
    name = str(kind).removeprefix("torch.")
    assert f"{name} converted to float32" in str(initialize(encoder, of_encoder(tensors)))
    assert encoder.norm.weight.dtype == torch.float32


def test_eva_has_scales_and_biases_elsewhere() -> None:
    """DINOv3 in timm is of this family: rotary positions, no position table, biases of q and v alone."""
    built = network(
        Eva, qkv_fused=True, use_rot_pos_emb=True, use_abs_pos_emb=False, init_values=0.5, num_reg_tokens=2
    )
    encoder: Any = build_encoder(CONFIG)
    taken = initialize(encoder, of_encoder(built.state_dict()))
    assert taken.matched == taken.total and taken.left_out == ("reg_token",)
    block, ours = built.blocks[1], encoder.blocks[1]
    tokens = torch.randn(2, 5, 32)
    torch.testing.assert_close(ours(tokens), block(tokens), atol=1e-4, rtol=1e-4)
    split = network(Eva, qkv_fused=False)
    assert initialize(encoder, of_encoder(split.state_dict())).matched == taken.total
    torch.testing.assert_close(encoder.blocks[0](tokens), split.blocks[0](tokens), atol=1e-4, rtol=1e-4)


FAMILIES = {
    "test_vit": {},
    "test_vit2": {},
    "test_vit3": {},
    "vit_small_patch14_reg4_dinov2": {"dim": 96, "depth": 1},
    "vit_small_patch16_dinov3": {"dim": 96, "depth": 1},
    "eva02_tiny_patch14_224": {"depth": 1},
    "vit_base_patch16_clip_224": {"dim": 96, "depth": 1},
}
"""Networks of timm, made small: with registers, layer scale, rotary positions, SwiGLU, a norm in front."""


@pytest.mark.parametrize("name", FAMILIES)
def test_networks_of_timm_take_their_own_weights(name: str) -> None:
    torch.manual_seed(2)
    config = replace(timm_config(name), **FAMILIES[name])
    built = timm.create_model(name, embed_dim=config.dim, depth=config.depth).eval()
    encoder: Any = build_encoder(config)
    taken = initialize(encoder, of_encoder(built.state_dict()))
    assert taken.matched == taken.total and not taken.adapted
    assert not [name for name in taken.left_out if not name.startswith(("head.", "attn_pool.", "fc_norm."))]
    own = encoder.timm.state_dict()
    assert all(torch.equal(own[n], t) for n, t in built.state_dict().items() if n in own)


def test_positions_of_timm_are_resampled() -> None:
    built: Any = timm.create_model("test_vit", img_size=96)
    encoder: Any = build_encoder(timm_config("test_vit"))
    taken = initialize(encoder, of_encoder(built.state_dict()))
    assert taken.matched == taken.total
    assert taken.adapted == ("pos_embed from 6 x 6 to 10 x 10 positions",)
    assert torch.equal(encoder.timm.pos_embed[:, :1], built.pos_embed[:, :1])


def test_positions_on_no_square_are_refused_by_networks_with_a_table() -> None:
    built: Any = timm.create_model("test_vit", img_size=(96, 160))
    with pytest.raises(BadInput, match="its 61 positions are no square"):
        initialize(build_encoder(timm_config("test_vit")), of_encoder(built.state_dict()))


def test_an_artifact_of_a_network_of_timm_gives_its_tensors() -> None:
    config = replace(timm_config("vit_small_patch16_dinov3"), dim=96, depth=1)
    source, target = (build_encoder(replace(config, channels=channels)) for channels in (3, 4))
    stored = {f"encoder.{name}": tensor for name, tensor in source.state_dict().items()}
    taken = initialize(target, of_encoder(stored))
    assert taken.matched == taken.total
    assert taken.adapted == ("timm.patch_embed.proj.weight from 3 channels to 4",)


def in_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors by the names of Hugging Face's ViT."""
    named = {}
    for name, tensor in tensors.items():
        for ours, theirs in (
            ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
            ("cls_token", "embeddings.cls_token"),
            ("pos_embed", "embeddings.position_embeddings"),
            ("blocks.", "encoder.layer."),
            (".norm1.", ".layernorm_before."),
            (".norm2.", ".layernorm_after."),
            (".attn.proj.", ".attention.output.dense."),
            (".mlp.fc1.", ".intermediate.dense."),
            (".mlp.fc2.", ".output.dense."),
        ):
            name = name.replace(ours, theirs)
        name = f"vit.{'layernorm.' + name[5:] if name.startswith('norm.') else name}"
        parts = (
            dict(zip(("query", "key", "value"), tensor.chunk(3), strict=False))
            if ".qkv." in name
            else {None: tensor}
        )
        named |= {name.replace(".attn.qkv.", f".attention.attention.{part}."): t for part, t in parts.items()}
    return named | {
        "classifier.weight": torch.zeros(2, 32),
        "vit.embeddings.mask_token": torch.zeros(1, 1, 32),
    }


def test_names_of_transformers_are_known() -> None:
    tensors = with_fixed_positions(network()).state_dict()
    found = of_encoder({n: t.contiguous() for n, t in in_transformers(tensors).items()})
    assert found.beside == ["classifier.weight"]
    wanted, named = plain_vit(tensors).tensors, plain_vit(found.tensors).tensors
    assert named.keys() == wanted.keys() and all(torch.equal(named[n], wanted[n]) for n in wanted)


def test_parts_of_a_weight_are_no_whole() -> None:
    parts = {f"blocks.0.attn.{part}_proj.weight": torch.ones(4, 4) for part in "qk"}
    assert fuse_qkv(parts) == parts


# sizes ------------------------------------------------------------------------------------------


def test_patches_and_channels_are_adapted_and_said() -> None:
    built = network()
    encoder: Any = build_encoder(ViTConfig(patch=4, dim=32, depth=2, heads=2, channels=4))
    taken = initialize(encoder, of_encoder(built.state_dict()))
    assert taken.matched == taken.total
    assert "stem.weight from 8 x 8 to 4 x 4 px and from 3 channels to 4" in str(taken)
    gray: Any = build_encoder(ViTConfig(patch=8, dim=32, depth=2, heads=2, channels=1))
    initialize(gray, of_encoder(built.state_dict()))
    image = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(gray.stem(image), built.patch_embed.proj(image.expand(-1, 3, -1, -1)))
    wide: Any = build_encoder(ViTConfig(patch=8, dim=32, depth=2, heads=2, channels=6))
    initialize(wide, of_encoder(built.state_dict()))
    torch.testing.assert_close(
        wide.stem(image.expand(-1, 6, -1, -1)), built.patch_embed.proj(image.expand(-1, 3, -1, -1))
    )


def test_dyvit_starts_from_another_patch() -> None:
    small = DyViTConfig(
        patch=1, dim=16, depths=(1, 1, 1, 1), heads=(2, 2, 4, 4), windows=((4, 8), (2, 4), (2, 0), (0,))
    )
    source: Any = build_encoder(small)
    target: Any = build_encoder(replace(small, patch=2))
    taken = initialize(target, of_encoder(source.state_dict()))
    assert taken.matched == taken.total and "stem.conv.weight from 1 x 1 to 2 x 2 px" in str(taken)
    assert torch.equal(target.stages[2].blocks[0].norm1.weight, source.stages[2].blocks[0].norm1.weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm.weight": None}, "1 not in the file: norm.weight"),
        ({"norm.weight": torch.ones(16)}, r"1 do not fit: norm.weight is \[16\], the encoder has \[32\]"),
        (
            {"norm.weight": torch.ones(32, dtype=torch.int64)},
            r"norm.weight is \[32\] of int64, the encoder has \[32\]",
        ),
        ({"head.weight": torch.ones(5, 32)}, "left out: head.weight"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], said: str) -> None:
    tensors = {
        n: t for n, t in (with_fixed_positions(network()).state_dict() | change).items() if t is not None
    }
    taken = initialize(build_encoder(CONFIG), of_encoder(tensors))
    assert taken.matched == taken.total - (0 if "left out" in said else 1)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(str(taken))


def test_numbers_that_are_not_finite_are_refused() -> None:
    tensors = network().state_dict() | {"norm.weight": torch.full((32,), torch.nan)}
    with pytest.raises(BadInput, match=r"norm\.weight holds values that are not finite"):
        initialize(build_encoder(CONFIG), of_encoder(tensors))


@pytest.mark.parametrize(
    "name", ["pos_embed", "cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"]
)
@pytest.mark.parametrize("shape", [(), (0,), (1, 0, 32), (1, 5, 30), (32, 0, 8, 8), (32, 3, 1, 99)])
def test_tensors_of_any_shape_break_nothing(name: str, shape: tuple[int, ...]) -> None:
    tensors = network().state_dict() | {name: torch.zeros(shape)}
    try:
        taken = initialize(build_encoder(CONFIG), of_encoder(tensors))
        assert taken.matched < taken.total or name == "pos_embed"
    except BadInput:
        pass


def test_other_families_have_nothing_in_common() -> None:
    taken = initialize(build_encoder(CONFIG), of_encoder(timm.create_model("test_resnet").state_dict()))
    assert taken.matched == 0 or taken.unfit or taken.missing


def test_presets_are_recognised_by_their_size() -> None:
    with torch.device("meta"):
        tiny = build_encoder(ViTConfig(dim=192, depth=12, heads=3, patch=14))
    stored = {name: torch.zeros(tensor.shape) for name, tensor in tiny.state_dict().items()}
    assert vit_like(stored) == tiny.config
    assert vit_like(network().state_dict()) is None
    assert vit_like({"layer.weight": torch.zeros(3)}) is None


# files ------------------------------------------------------------------------------------------


def saved(folder: Path, content: Any, name: str = "weights.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


@pytest.mark.parametrize(
    "nested",
    [
        lambda tensors: tensors,
        lambda tensors: {"model": tensors, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda tensors: {"state_dict": {f"module.{n}": t for n, t in tensors.items()}},
        lambda tensors: {"teacher": {f"backbone.{n}": t for n, t in tensors.items()}, "student": {"x": 1}},
        lambda tensors: {f"module.encoder.{n}": t for n, t in tensors.items()},
        lambda tensors: {f"visual.trunk.{n}": t for n, t in tensors.items()} | {"logit_scale": torch.ones(1)},
        lambda tensors: {
            "model": {
                **{f"average.{n}": -t for n, t in tensors.items()},
                **{f"encoder.{n}": t for n, t in tensors.items()},
            }
        },
    ],
)
def test_nests_are_unwrapped(tmp_path: Path, nested: Callable[[Any], Any]) -> None:
    tensors = network().state_dict()
    found = read_checkpoint(saved(tmp_path, nested(tensors)))
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)


def test_a_file_that_holds_itself_ends(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"w": torch.zeros(1)}
    endless["model"] = endless
    assert read_checkpoint(saved(tmp_path, endless)).tensors.keys() == {"w"}


def test_a_choice_among_models_is_said(tmp_path: Path) -> None:
    tensors = network().state_dict()
    both = {"model": tensors, "model_ema": {name: -tensor for name, tensor in tensors.items()}}
    found = read_checkpoint(saved(tmp_path, both))
    assert torch.equal(found.tensors["norm.weight"], -tensors["norm.weight"])
    assert found.notes == ["of model_ema, model in the file, model_ema is used"]
    two = {f"{place}.{n}": t for place in ("student", "teacher") for n, t in tensors.items()}
    (note,) = of_encoder(two).notes
    assert note == "of the encoders teacher.* and student.*, the first is used"


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_code_never_runs(tmp_path: Path) -> None:
    mark, legacy = tmp_path / "it ran", tmp_path / "legacy.bin"
    legacy.write_bytes(pickle.dumps({"model": Planted(mark)}, protocol=2))
    for file in (saved(tmp_path, {"model": Planted(mark)}), legacy):
        with pytest.raises(BadInput, match=r"mkdir.*never loaded; give the model as a \.safetensors file"):
            read_checkpoint(file)
    assert not mark.exists()
    pickle.loads(legacy.read_bytes())
    assert mark.exists()  # the trap works


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"\x80\x02}q\x00."])
def test_files_of_something_else_are_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    file = tmp_path / f"odd{suffix}"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=r"odd\.\w+: (not a readable|holds no)"):
        read_checkpoint(file)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_cut_files_are_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"cut{suffix}"
    tensors = network().state_dict()
    torch.save(tensors, file) if suffix == ".pth" else save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(BadInput, match=r"cut\.\w+: not a readable"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({"epoch": 3}, "holds no tensors but epoch"),
        ({"model": {}}, "holds no tensors"),
        ({"w": torch.zeros(2, 2).to_sparse()}, "holds no tensors"),
        ({"w": torch.zeros(2, device="meta")}, "holds no tensors"),
    ],
)
def test_plain_data_without_tensors_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        read_checkpoint(saved(tmp_path, content))


def test_places_that_are_no_files_are_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere.pth"):
        with pytest.raises(BadInput, match="give a file of weights"):
            read_checkpoint(place)


def test_checkpoints_without_an_encoder_are_taken_whole() -> None:
    assert of_encoder({"weight": torch.zeros(1)}) == Checkpoint({"weight": torch.zeros(1)})
