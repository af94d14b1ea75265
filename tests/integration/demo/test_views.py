"""What the page computes, arrays in and arrays out: no gradio anywhere."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_files import exported_models, models_in
from export_files import DYVIT, backbone, pretrained

from coma.artifact import load_encoder
from coma.config import ViTConfig
from coma.errors import BadArtifact, BadInput
from coma.runtimes.pytorch import TorchRuntime
from demo import compare_runtimes
from demo.compare_runtimes import time_runtimes
from demo.introspection import attention_maps_of, feature_pyramid, gate_weights, pyramid_colours
from demo.masking import METHODS, mask_picture, painted_view, pixel_view, sample_views, zoom_in_view
from demo.models import Models
from demo.predict import (
    SHOWN,
    STRENGTH,
    Detection,
    paste_mask,
    shares,
    show_classes,
    show_objects,
    shown_picture,
)
from demo.reconstruction import measure_hidden, merge_views, reconstruct
from demo.render import heat_map, overlay
from demo.resize import resize_picture

pytestmark = pytest.mark.filterwarnings("ignore")  # torch, of what the fixtures do

MEAN = (0.45, 0.42, 0.39)
UNIT = DYVIT.unit


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    from skimage import data

    return data.astronaut()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return Models([pretrained(tmp_path_factory.mktemp("small") / "artifact")])


@pytest.mark.parametrize(("shape", "size"), [((40, 80, 3), (24, 48)), ((80, 40, 3), (48, 24))])
def test_a_letter_box_keeps_the_whole_picture_and_says_so(shape, size):
    pixels = np.full(shape, 200, np.uint8)
    fitted = resize_picture(pixels, (48, 48), "letterbox", MEAN)
    assert fitted.pixels.shape == (3, 48, 48) and fitted.content[2:] == size
    inside = fitted.crop(fitted.pixels.permute(1, 2, 0).numpy())
    assert inside.shape[:2] == size and np.allclose(inside, 200 / 255, atol=1e-6)
    assert torch.allclose(fitted.pixels[:, 0, 0], torch.tensor(MEAN))
    assert fitted.note.startswith(f"resized to {size[1]} x {size[0]} px and letter-boxed to 48 x 48")
    assert resize_picture(pixels, (48, 48), "crop", MEAN).pixels.shape == (3, 48, 48)
    whole = resize_picture(pixels, (48, 48), "whole", MEAN).pixels.shape[1:]
    assert min(whole) == 48 and max(whole) == 96
    strip = np.zeros((10, 1000, 3), np.uint8)
    assert max(resize_picture(strip, (48, 48), "whole", MEAN, 16).pixels.shape) == 144


@pytest.mark.parametrize(("method", "views"), [("coma", 2), ("coma4", 4)])
def test_views_share_out_every_unit(method, views):
    visible = sample_views(method, 5, 4, 5)
    assert visible.shape == (views, 4, 5) and (visible.sum(0) == 1).all()
    assert visible.equal(sample_views(method, 5, 4, 5)) and not visible.equal(sample_views(method, 6, 4, 5))
    with pytest.raises(BadInput, match="too few"):
        sample_views(method, 5, 1, 1)


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.99])
def test_one_unit_at_least_is_hidden_and_one_is_seen(ratio):
    visible = sample_views("mae", 0, 3, 3, ratio)
    assert visible.sum() == min(max(round(9 * (1 - ratio)), 1), 8)
    assert zoom_in_view(5, 5).sum() == 9


def test_paint_hides_the_units_it_covers_and_no_others():
    covered = np.zeros((80, 120), bool)
    covered[0:40, 60:90] = True  # of 48 x 72 px: rows 0 to 24, columns 36 to 54
    visible = painted_view(covered, 48, 72, 16)[0]
    assert visible.shape == (3, 5)
    assert (~visible).nonzero().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    with pytest.raises(BadInput, match="Nothing is painted"):
        painted_view(np.zeros((8, 8), bool), 48, 48, 16)
    with pytest.raises(BadInput, match="Everything"):
        painted_view(np.ones((8, 8), bool), 48, 48, 16)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "brush"])
def test_every_method_hides_rebuilds_and_measures(models, photograph, method):
    model = models[models.names[0]]
    fitted = resize_picture(photograph, (48, 48), "crop", MEAN)
    what = mask_picture(model, fitted, method, 3, 0.5)
    rebuilt = reconstruct(model.runtime("reconstructor"), fitted, what.visible, "visible", what.degraded)
    assert rebuilt.merged.shape == (48, 48, 3) and np.isfinite(rebuilt.score.psnr)
    assert (rebuilt.hidden.mean(axis=(1, 2)) > 0).all()
    if METHODS[method].views > 1:
        assert rebuilt.predicted.all()
    seen = ~rebuilt.hidden[0]
    assert np.array_equal(rebuilt.filled[0][seen], rebuilt.shown[seen])


def test_hidden_pixels_have_no_influence_unless_the_true_statistics_are_asked_for(models, photograph):
    model = models[models.names[0]]
    assert model.norm_pix
    fitted = resize_picture(photograph, (48, 48), "crop", MEAN)
    visible = sample_views("mae", 1, 3, 3, 0.5)
    hidden = torch.from_numpy(~pixel_view(visible, UNIT, 48, 48)[0])
    other = replace(fitted, pixels=torch.where(hidden, 0.1 * fitted.pixels, fitted.pixels))
    runtime = model.runtime("reconstructor")
    one, two = (reconstruct(runtime, each, visible).merged for each in (fitted, other))
    assert np.array_equal(one, two)
    one, two = (reconstruct(runtime, each, visible, "target").merged for each in (fitted, other))
    assert np.abs(one - two).max() > 0.05


def test_true_statistics_are_those_of_the_objective_itself(models, photograph):
    from coma.data.transforms import normalize

    model = models[models.names[0]]
    runtime = model.runtime("reconstructor")
    assert isinstance(runtime, TorchRuntime)
    fitted = resize_picture(photograph, (48, 48), "crop", MEAN)
    visible = sample_views("coma", 2, 3, 3)
    rule = runtime.spec.preprocessing
    images = normalize(fitted.pixels[None], rule.mean, rule.std).expand(2, -1, -1, -1)
    expected = runtime.module.objective.reconstruct(images, visible, "target")  # pyright: ignore
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (rule.mean, rule.std))
    pixels = (expected * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.allclose(reconstruct(runtime, fitted, visible, "target").filled, pixels, atol=1e-5)


def test_numbers_are_of_the_hidden_pixels_alone():
    rng = np.random.default_rng(0)
    original = rng.random((16, 16, 3), dtype=np.float32)
    rebuilt, hidden = original.copy(), np.zeros((16, 16), bool)
    hidden[:8] = True
    rebuilt[:8] += 0.1
    score = measure_hidden(original, rebuilt, hidden)
    assert score.psnr == pytest.approx(20, abs=1e-3) and score.ssim is not None and score.ssim < 1
    rebuilt[8:] = 0  # what is visible does not count ...
    assert measure_hidden(original, rebuilt, hidden).psnr == pytest.approx(20, abs=1e-3)
    assert measure_hidden(original, rebuilt, ~hidden).psnr < 10  # ... unless it is asked for
    assert measure_hidden(original, original, hidden).psnr == np.inf


def test_merged_pixels_come_from_views_that_did_not_see_them():
    original = np.zeros((2, 2, 1), np.float32)
    filled = np.stack([np.full((2, 2, 1), v, np.float32) for v in (0.2, 0.6)])
    hidden = np.array([[[True, False], [True, False]], [[False, True], [True, False]]])
    merged, predicted = merge_views(original, filled, hidden)
    assert np.allclose(merged[..., 0], [[0.2, 0.6], [0.4, 0.0]])
    assert predicted.tolist() == [[True, True], [True, False]]


def test_attention_is_what_the_layer_computes(tmp_path):
    encoder = load_encoder(backbone(tmp_path / "a"))
    image = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    for stage, tokens in ((1, 24), (2, 12), (3, 6), (4, 3)):
        maps = attention_maps_of(encoder, image, stage, 0.4, 0.7)
        assert all(
            m.shape == (tokens, tokens) and m.sum() == pytest.approx(1, abs=1e-5) for m in maps.values()
        )
    # heads that all look at one value give it back: compare with the layer's own output, window by window
    attention = encoder.stages[2].blocks[-1].attn  # pyright: ignore
    taken: dict = {}
    handle = attention.register_forward_hook(lambda m, i, o: taken.update(inputs=i))  # pyright: ignore
    from coma.models.dyvit import DyViT

    DyViT.forward(encoder, image)  # pyright: ignore
    handle.remove()
    x, layout = taken["inputs"]
    from coma.models.position_embeddings import rotate
    from coma.models.windows import nest

    qk, _ = attention.qkv(x).unflatten(-1, (3, attention.heads, -1)).split((2, 1), dim=3)  # pyright: ignore
    q, k = rotate(qk, layout.rotary).unbind(dim=3)
    row, col = 2, 4
    for i, m in enumerate(attention_maps_of(encoder, image, 3, (row + 0.5) / 6, (col + 0.5) / 6).values()):
        values = torch.randn(1, 6, 6, 1, generator=torch.Generator().manual_seed(1))
        tokens = (
            layout.sequences.gather(nest(values, 2))[..., None, :].expand_as(q.chunk(2, 3)[i]).contiguous()
        )
        out = layout.windows[i].attend(q.chunk(2, 3)[i], k.chunk(2, 3)[i], tokens, fused=False)
        from coma.models.windows import unnest

        whole = unnest(layout.sequences.scatter(out.mean(-1, keepdim=True)), 2, 3, 3)[0, row, col, 0]
        assert float(whole) == pytest.approx(float((torch.from_numpy(m) * values[0, ..., 0]).sum()), abs=1e-5)


def test_gates_are_read_as_they_are(tmp_path):
    encoder = load_encoder(backbone(tmp_path / "a"))
    image = torch.randn(1, 3, 48, 48)
    gates = gate_weights(encoder, image)
    assert [(g.stage, g.windows) for g in gates] == [(1, (4, 8)), (2, (2, 4)), (3, (0, 2))]
    for gate, side in zip(gates, (24, 12, 6), strict=True):
        assert np.mean(gate.weights) == pytest.approx(1, abs=1e-5) and sum(gate.wins) == pytest.approx(1)
        assert gate.strongest.shape == (side, side) and set(np.unique(gate.strongest)) <= {0, 1}
    torch.nn.init.constant_(encoder.stages[0].blocks[0].attn.gate.out.bias[: DYVIT.dim // 2], 20)  # pyright: ignore
    assert gate_weights(encoder, image)[0].wins == (1.0, 0.0)  # the first window wins everywhere


def test_plain_vit_has_attention_and_no_gates(tmp_path):
    encoder = load_encoder(backbone(tmp_path / "v", ViTConfig(patch=16, dim=16, depth=2, heads=2)))
    image = torch.randn(1, 3, 48, 64)
    (found,) = attention_maps_of(encoder, image, 1, 0.5, 0.5).values()
    assert found.shape == (3, 4) and found.sum() == pytest.approx(1, abs=1e-5)
    with pytest.raises(BadInput, match="no gates"):
        gate_weights(encoder, image)


def test_principal_colours_tell_two_regions_apart(tmp_path):
    maps = torch.zeros(1, 5, 4, 6)
    maps[:, :, :, 3:] = torch.randn(5).view(1, 5, 1, 1)
    (picture,) = pyramid_colours((maps,))
    assert picture.shape == (4, 6, 3) and (picture[:, :3] == picture[0, 0]).all()
    assert (picture[:, 0] != picture[:, 5]).any()
    encoder = load_encoder(backbone(tmp_path / "a"))
    assert len(pyramid_colours(feature_pyramid(encoder, torch.randn(1, 3, 48, 48)))) == 4


def test_masks_and_classes_are_drawn_where_they_are():
    mask = paste_mask(np.ones((28, 28), np.float32), (10.0, 20.0, 30.0, 40.0), 50, 60)
    assert mask[20:40, 10:30].all() and mask.sum() == 400
    assert not paste_mask(np.ones((28, 28)), (5, 5, 5, 5), 50, 60).any()
    classes = np.array([[0, 1], [1, 1]])
    assert shares(classes, ("a", "b", "c")) == [(1, "b", 0.75), (0, "a", 0.25)]
    shown = shown_picture(np.zeros((2, 2, 3), np.uint8))
    annotations: Any = show_classes(classes, ("a", "b", "c"), shown)
    (b, b_label), (a, a_label) = annotations
    assert (a_label, b_label) == ("a 25%", "b 75%") and shown.shape == (SHOWN, SHOWN, 3)
    assert a[0, 0] == b[-1, -1] == b[0, -1] == pytest.approx(STRENGTH) and a[-1, -1] == b[0, 0] == 0
    found = [
        Detection("cat", 0, 0.91, (10, 20, 30, 40)),
        Detection("cat", 0, 0.914, (0, 0, 50, 50), mask[:50]),
    ]
    annotations = show_objects(found, 50, 60, np.zeros((100, 120, 3), np.uint8))
    (box, first), (painted, second) = annotations
    assert box == (20, 40, 60, 80) and (first, second) == ("cat 0.91", "cat 0.91 (2)")
    assert painted.shape == (100, 120) and (painted > 0).sum() == 4 * mask.sum()
    heat = heat_map(np.array([[0.0, 0.6]]), np.array([[True, False]]))
    assert heat[0, 0].sum() < 10 and heat[0, 1].tolist() == [128, 134, 148]
    assert overlay(np.zeros((8, 8, 3), np.uint8), np.eye(4)).shape == (8, 8, 3)


# models and runtimes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(once) -> Path:
    return models_in(once("page", exported_models))[0]


@pytest.mark.filterwarnings("ignore")
def test_exported_files_beside_an_artifact_run_and_agree(exported, photograph):
    models = Models([exported])
    model = models[models.names[0]]
    titles = {option.title: option.reason for option in model.options("reconstructor")}
    assert titles["PyTorch"] is None and titles["ONNX Runtime"] is None
    assert "coma export" in str(titles["TensorRT"])
    rows = {row.title: row for row in time_runtimes(model, "reconstructor", photograph)}
    assert rows["ONNX Runtime"].cosine > 0.99999 and rows["ONNX Runtime"].difference < 0.1
    assert rows["ONNX Runtime"].milliseconds > 0 and rows["TensorRT"].reason
    assert rows["OpenVINO"].cosine > 0.99999 and rows["OpenVINO"].version.startswith("OpenVINO")
    assert "finds no Intel GPU" in str(rows["OpenVINO on an Intel GPU"].reason)
    with pytest.raises(BadInput, match="not available"):
        model.runtime("reconstructor", "TensorRT")
    file = exported.parent / "export" / "reconstructor.onnx"
    alone = Models([file])
    assert alone.names == ["reconstructor.onnx"]
    assert alone[alone.names[0]].runtime("reconstructor").title.startswith("ONNX Runtime")
    assert Models([file, exported]).names == models.names  # of the same weights: one model


@pytest.mark.filterwarnings("ignore")
def test_exports_are_found_from_within_the_artifact(exported, monkeypatch):
    monkeypatch.chdir(exported)
    models = Models([Path()])
    titles = {option.title: option.reason for option in models[models.names[0]].options("reconstructor")}
    assert titles["ONNX Runtime"] is None


@pytest.mark.filterwarnings("ignore")
def test_outputs_that_are_not_finite_are_no_agreement(exported, photograph, monkeypatch):
    compute = compare_runtimes.run

    def broken(runtime: Any, images: Any, **others: Any) -> dict[str, Any]:
        outputs = compute(runtime, images, **others)
        if runtime.title.startswith("ONNX Runtime"):
            outputs["extra"] = torch.tensor([1, float("nan")])
        return outputs | {"extra": outputs.get("extra", torch.ones(2))}

    monkeypatch.setattr(compare_runtimes, "run", broken)
    models = Models([exported])
    rows = {row.title: row for row in time_runtimes(models[models.names[0]], "reconstructor", photograph)}
    assert rows["ONNX Runtime"].reason == "its output extra is not finite"
    assert rows["PyTorch"].reason is None and rows["OpenVINO"].cosine > 0.9999


@pytest.mark.filterwarnings("ignore")
def test_a_file_given_by_name_is_hashed_once(exported, monkeypatch):
    from demo import runtimes

    hashed, sha256_of = [], runtimes.sha256_of
    monkeypatch.setattr(runtimes, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
    Models([exported.parent / "export" / "reconstructor.onnx"])["reconstructor.onnx"].options("reconstructor")
    assert hashed == ["reconstructor.onnx"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("there", "title", "device"),
    [(["cpu"], "ONNX Runtime on the CPU", "cpu"), (["cuda", "cpu"], "ONNX Runtime", "cuda")],
)
def test_without_cuda_onnx_runtime_runs_on_the_cpu_and_says_so(exported, monkeypatch, there, title, device):
    monkeypatch.setattr("coma.runtimes.onnxruntime.providers", lambda: there)
    file = exported.parent / "export" / "reconstructor.onnx"
    (model,) = Models([file], "cuda").having("reconstructor")
    option = model.options("reconstructor")[0]
    assert (option.title, option.device, option.reason) == (title, device, None)


def test_a_file_that_was_changed_or_mixed_up_is_not_offered(exported, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(exported.parent, run)
    file = run / "export" / "reconstructor.onnx"
    file.write_bytes(file.read_bytes() + b"\0")
    options = Models([run / "artifact"])[tmp_path.name].options("reconstructor")
    assert "differs from the file" in str(next(o.reason for o in options if o.title == "ONNX Runtime"))
    with pytest.raises(BadInput, match="differs from the file"):
        Models([file])
    manifest = run / "export" / "manifest.json"
    plain = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**plain, "source": "0" * 64}))  # of other weights
    options = Models([run / "artifact"])[tmp_path.name].options("reconstructor")
    assert "coma export" in str(next(o.reason for o in options if o.title == "ONNX Runtime"))
    manifest.write_text(json.dumps({**plain, "files": []}))
    with pytest.raises(BadInput, match="is not listed"):
        Models([file])


def test_only_what_was_named_can_be_had(models, tmp_path):
    for name in ("other", str(tmp_path), "../artifact"):
        with pytest.raises(BadInput, match="no such model"):
            models[name]
    with pytest.raises(BadArtifact):
        Models([tmp_path / "none"])


@pytest.mark.slow
def test_what_is_computed_needs_no_gradio():
    code = (
        "import demo.upload, demo.resize, demo.masking, demo.render, demo.reconstruction, "
        "demo.introspection, demo.predict, demo.compare_runtimes, demo.models\n"
        "import sys; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not {"gradio", "onnxruntime", "mmengine"} & {m.partition(".")[0] for m in done.stdout.split()}
