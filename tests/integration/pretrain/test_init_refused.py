"""Weights that a run cannot start from, and those that need `--init-partial`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from short_runs import MODEL, starting

from coma.config import (
    PretrainConfig,
)
from coma.errors import BadInput
from coma.models import build_encoder
from coma.objectives.initialization import initial_objective, with_initial_weights
from pretrain.training import pretrain

pytestmark = pytest.mark.usefixtures("no_pictures")


def wrong_width(folder: Path) -> str:
    save_file(
        {n: torch.cat([t, t]) for n, t in build_encoder(MODEL).state_dict().items()}, folder / "w.safetensors"
    )
    return "w.safetensors"


def without_a_key(folder: Path) -> str:
    tensors = build_encoder(MODEL).state_dict()
    save_file({n: t for n, t in tensors.items() if n != "norm.bias"}, folder / "short.safetensors")
    return "short.safetensors"


def with_nan(folder: Path) -> str:
    tensors = build_encoder(MODEL).state_dict()
    tensors["norm.bias"][0] = torch.nan
    save_file(tensors, folder / "nan.safetensors")
    return "nan.safetensors"


def resnet(folder: Path) -> str:
    save_file(timm.create_model("test_resnet").state_dict(), folder / "resnet.safetensors")
    return "resnet.safetensors"


def empty(folder: Path) -> str:
    (folder / "empty.pth").touch()
    return "empty.pth"


def no_artifact(folder: Path) -> str:
    (folder / "photos").mkdir()
    return "photos"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (wrong_width, r"0 of \d+ tensors of the encoder; .* do not fit: stem.conv.weight is .*--model"),
        (without_a_key, r"1 not in the file: norm.bias; .*--init-partial"),
        (with_nan, "norm.bias holds values that are not finite"),
        (resnet, r"0 of \d+ tensors of the encoder.*give the --model of the weights"),
        (empty, r"empty.pth: not a readable file of weights \(the file is empty\)"),
        (no_artifact, "photos: not an artifact, it has no config.json"),
        (lambda _: "nowhere", "nowhere: no such file or directory"),
        (lambda _: "vit_tiny_patch16_224", "did you mean timm:vit_tiny_patch16_224"),
        (
            lambda _: "timm:vit_tiny_patch16_22",
            "no such model; did you mean vit_tiny_patch16_224",
        ),
        (lambda _: "timm:vit_tiny_patch16_224", "not on this machine; give --download"),
        (lambda _: "", "names no file or folder"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(
    settings: PretrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    source = make(tmp_path)
    with pytest.raises(BadInput, match=said):
        pretrain(starting(settings, source))
    assert not settings.run.out.exists()


def test_a_part_is_enough_where_that_is_allowed(settings: PretrainConfig, tmp_path: Path) -> None:
    source = tmp_path / without_a_key(tmp_path)
    said = initial_objective(starting(settings, source, init_partial=True))[1]
    assert "1 not in the file: norm.bias" in said
    nothing = tmp_path / resnet(tmp_path)
    with pytest.raises(BadInput, match="0 of"):
        with_initial_weights(starting(settings, nothing, init_partial=True))
