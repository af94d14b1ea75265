"""Weights that come with the package, by name, wherever an artifact is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dataset_files import save
from safetensors import safe_open

import coma
from coma.artifact.load import artifact_hash
from coma.artifact.weights import read_weights
from coma.cli import main
from coma.commands.info import report
from coma.paths import artifact_directory, shipped_weights
from coma.runtimes.find import open_model

NAME = "tiny-64"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_names_stand_for_folders_of_the_package_unless_something_is_called_so(tmp_path):
    assert NAME in shipped_weights()
    shipped = artifact_directory(NAME)
    assert (shipped / "README.md").is_file() and tmp_path not in shipped.parents
    assert artifact_directory("tiny-65") == Path("tiny-65")
    (tmp_path / NAME).mkdir()
    assert artifact_directory(NAME) == Path(NAME)
    with pytest.raises(coma.BadArtifact, match=r"has no config\.json.*hides the weights tiny-64 .*rename it"):
        coma.load_encoder(NAME)
    (tmp_path / NAME).rmdir()
    (tmp_path / NAME).write_text("notes")
    with pytest.raises(coma.BadArtifact, match=r"is a file.*hides the weights tiny-64"):
        coma.load_encoder(NAME)
    with pytest.raises(coma.BadArtifact, match=r"tiny-65: no such directory; the weights .* are tiny-64"):
        coma.load_encoder("tiny-65")


def test_they_are_small_and_in_sixteen_bits():
    file = artifact_directory(NAME) / "model.safetensors"
    assert file.stat().st_size < 11e6
    with safe_open(file, framework="pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118


def test_they_load_as_encoder_and_with_their_decoder():
    encoder, objective = coma.load_encoder(NAME), coma.load_pretrained(NAME)
    assert encoder.artifact.image_size.words == "64" and not objective.config.norm_pix
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(encoder(images), objective.encoder(images), rtol=0, atol=0)
    assert artifact_hash(Path(NAME)) == artifact_hash(artifact_directory(NAME))
    assert read_weights(NAME).origin.name == NAME


def test_they_fill_in_better_than_the_mean_colour():
    from skimage import data
    from skimage.transform import resize

    objective = coma.load_pretrained(NAME)
    pixels = (
        torch.from_numpy(resize(data.coffee(), (64, 64), anti_aliasing=True)).permute(2, 0, 1)[None].float()
    )
    mean, std = (
        torch.tensor(each).view(1, -1, 1, 1) for each in (objective.artifact.mean, objective.artifact.std)
    )
    seeds = torch.arange(1)
    visible = objective.draw_visible(seeds, 4, 4)[0]
    shown = visible.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    filled = objective.reconstruct((pixels - mean) / std, visible) * std + mean
    colour = (pixels * shown).sum((2, 3), keepdim=True) / shown.sum()
    error, of_colour = ((((each - pixels) * ~shown) ** 2).sum() for each in (filled, colour))
    assert error < 0.7 * of_colour


def test_commands_take_them(tmp_path, capsys, monkeypatch):
    assert report(Path(NAME)).title == "artifact of kind pretrained"
    assert main(["info", NAME]) == 0
    shown = capsys.readouterr().out
    assert f"coma export {NAME} " in shown and str(artifact_directory(NAME) / "README.md") in shown
    assert "pooled" in [each.name for each in open_model(Path(NAME), "encoder").spec.outputs]
    assert "reconstruction" in [each.name for each in open_model(Path(NAME), "reconstructor").spec.outputs]
    save(tmp_path / "photos" / "one.png")
    length = ("--steps", "1", "--batch-size", "1", "--workers", "0", "--device", "cpu", "--track", "none")
    assert main(["pretrain", "photos", "--out", "run", "--init", NAME, *length]) == 0
    assert "predicted plain pixels (--objective.no-norm-pix continues" in capsys.readouterr().err
    assert (
        main(
            [
                "pretrain",
                "photos",
                "--out",
                "dry",
                "--init",
                NAME,
                "--objective.no-norm-pix",
                "--dry-run",
                *length,
            ]
        )
        == 0
    )
    said = "".join(capsys.readouterr())
    assert "of the decoder" in said and "predicted" not in said
    origin = coma.load_encoder("run/artifact").artifact.init
    assert origin and origin.name == NAME
    monkeypatch.chdir(tmp_path / "run")
    assert main(["pretrain", "--resume", ".", "--steps", "2"]) == 0
