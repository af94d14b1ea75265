"""Models of Beyond Masking on the page: degraded as in training, and masked where they see something."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_files import DYVIT, OBJECTIVE, pretrained

from coma.config import BeyondConfig, Degradation
from coma.errors import BadInput
from coma.runtimes.model_spec import ModelSpec
from demo.masking import METHODS, mask_picture, pixel_view, zoom_in_view
from demo.models import Model, Models
from demo.reconstruction import reconstruct
from demo.resize import resize_picture

pytestmark = pytest.mark.filterwarnings("ignore")  # torch, of what the fixtures do

MEAN = (0.45, 0.42, 0.39)
UNIT = DYVIT.unit


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    from skimage import data

    return data.astronaut()


def undoing(degradation: Degradation, folder: Path) -> Model:
    method = BeyondConfig(degrade=degradation, decoder=OBJECTIVE.decoder)
    models = Models([pretrained(folder / "undoing", method=method)])
    return models[models.names[0]]


def test_a_model_that_undoes_blur_is_asked_for_every_pixel(tmp_path, photograph):
    model = undoing("blur", tmp_path)
    fitted = resize_picture(photograph, (48, 48), "crop", MEAN)
    what = mask_picture(model, fitted, "blur", 0, 0.5)
    assert model.method == "blur" and what.predicts_all and what.visible.all()
    runtime = model.runtime("reconstructor")
    assert reconstruct(runtime, fitted, what.visible, "visible", what.degraded, True).predicted.all()
    assert not mask_picture(model, fitted, "distort", 0, 0.5).predicts_all


@pytest.mark.parametrize("kind", ["zoom-out", "distort", "blur", "decolor"])
def test_what_is_undone_was_degraded_as_in_training(kind, tmp_path, photograph):
    model = undoing(kind, tmp_path)
    runtime: Any = model.runtime("reconstructor")
    objective = runtime.module.objective
    fitted = resize_picture(photograph, (48, 48), "crop", MEAN)
    rule = runtime.spec.preprocessing
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (rule.mean, rule.std))
    for seed in range(3):
        what = mask_picture(model, fitted, kind, seed, 0.5)
        rebuilt = reconstruct(runtime, fitted, what.visible, "visible", what.degraded, what.predicts_all)
        given = objective.degraded((fitted.pixels[None] - mean) / std, torch.tensor([seed]))
        filled = objective.reconstruct(given, what.visible)
        for ours, theirs in ((rebuilt.shown, given), (rebuilt.filled[0], filled)):
            pixels = (theirs[0] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
            np.testing.assert_allclose(ours, pixels, atol=1e-4)


class Echo:
    """A runtime that keeps what it gets, and gives it back."""

    title = "echo"

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def __call__(self, images: torch.Tensor, **_: torch.Tensor) -> dict[str, torch.Tensor]:
        self.got = images[0]
        return {"reconstruction": images}


def test_what_leaves_the_range_of_pixels_reaches_the_model_but_no_picture(tmp_path, photograph):
    about = undoing("decolor", tmp_path).description("reconstructor")
    rule = about.preprocessing
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (rule.mean, rule.std))
    fitted = resize_picture(photograph, (48, 48), "crop", MEAN)
    degraded, visible = fitted.pixels * 3 - 1, torch.ones(1, 3, 3, dtype=torch.bool)
    floats, whole = (
        Echo(replace(about, preprocessing=replace(rule, normalize_in_graph=i))) for i in (False, True)
    )
    for runtime in (floats, whole):
        rebuilt = reconstruct(runtime, fitted, visible, "visible", degraded, True)
        assert np.array_equal(rebuilt.shown, degraded.clamp(0, 1).permute(1, 2, 0).numpy())
    torch.testing.assert_close(floats.got * std + mean, degraded)
    assert whole.got.dtype == torch.uint8
    assert torch.equal(whole.got.float(), (degraded.clamp(0, 1) * 255).round())  # no 256 that became 0


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_zooms_in_gets_its_masks_on_the_centre(method, tmp_path, photograph):
    model = undoing("zoom-in+mask", tmp_path)
    fitted = resize_picture(photograph, (96, 96), "crop", MEAN)  # 6 x 6 units, of which it sees 4 x 4
    painted = np.zeros((96, 96), bool)
    painted[:48] = True
    what = mask_picture(model, fitted, method, 3, 0.75, painted)
    inside = zoom_in_view(6, 6)
    assert not (what.visible & ~inside).any()
    centre = what.visible[:, 1:5, 1:5]
    if METHODS[method].views > 1:
        assert (centre.sum(0) == 1).all()
    elif METHODS[method].ratio:
        assert centre.sum() == 4
    elif method == "brush":
        assert centre[0].sum(1).tolist() == [0, 0, 4, 4]
    border = ~pixel_view(inside, UNIT, 96, 96)[0]
    for statistics in ("visible", "target"):
        rebuilt = reconstruct(model.runtime("reconstructor"), fitted, what.visible, statistics, what.degraded)
        assert rebuilt.predicted[border].all() and np.isfinite(rebuilt.merged).all()


def test_a_model_that_zooms_in_needs_something_to_see(tmp_path, photograph):
    model = undoing("zoom-in", tmp_path)
    fitted = resize_picture(photograph, (96, 96), "crop", MEAN)
    painted = np.zeros((96, 96), bool)
    painted[16:80, 16:80] = True
    with pytest.raises(BadInput, match="sees only the centre"):
        mask_picture(model, fitted, "brush", 0, 0.5, painted)
    with pytest.raises(BadInput, match="zooming in needs at least 3 x 3"):
        mask_picture(model, resize_picture(photograph, (32, 32), "crop", MEAN), "coma", 0, 0.5)
