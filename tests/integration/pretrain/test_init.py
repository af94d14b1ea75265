"""Runs that start from weights that exist, and go on when the weights are gone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from short_runs import MODEL, OBJECTIVE, Killed, assert_same, at, interrupted, killed_in, starting
from taught_models import timm_weights

from coma import cli
from coma.artifact import ArtifactConfig, library_versions, load_artifact, save_artifact
from coma.artifact import weights as weights_module
from coma.artifact.weights import read_weights
from coma.atomic_io import sha256_of
from coma.config import (
    CMTConfig,
    CoMAConfig,
    DecoderConfig,
    InitConfig,
    PretrainConfig,
    TeacherConfig,
    ViTConfig,
    encoder_preset,
)
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.models import build_encoder
from coma.objectives import build_objective
from coma.objectives.initialization import initial_objective, origin_of, with_initial_weights
from pretrain.commands.pretrain import parse
from pretrain.training import pretrain
from pretrain.training.distributed import Processes
from pretrain.training.run_plan import prepare

pytestmark = pytest.mark.usefixtures("no_pictures")
PREFIXES = {"backbone": "", "pretrained": "encoder.", "classifier": "", "detector": "backbone.encoder."}


def artifact(folder: Path, kind: str = "pretrained", **changes: Any) -> Path:
    torch.manual_seed(9)
    tensors = build_objective(OBJECTIVE, build_encoder(changes.get("model", MODEL))).state_dict()
    for tensor in tensors.values():
        torch.nn.init.normal_(tensor, std=0.1)
    if kind != "pretrained":
        own = {name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")}
        tensors = {PREFIXES[kind] + name: tensor for name, tensor in own.items()}
        tensors |= (
            {} if kind == "backbone" else {"head.weight": torch.ones(2, 64), "head.bias": torch.ones(2)}
        )
    about = ArtifactConfig(
        kind=kind,  # type: ignore[arg-type]
        model=MODEL,
        objective=OBJECTIVE if kind == "pretrained" else None,
        image_size=ImageSize.of(16),
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        class_names=None if kind in ("backbone", "pretrained") else ("a", "b"),
        trained={},
        versions=library_versions(),
    )
    save_artifact(folder, tensors=tensors, config=replace(about, **changes))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert cli.main(["pretrain", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1, err
    return err


# what is taken ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PREFIXES)
def test_every_kind_of_artifact_gives_its_encoder(
    settings: PretrainConfig, tmp_path: Path, kind: str
) -> None:
    place = artifact(tmp_path / "artifact", kind)
    objective, said = initial_objective(starting(settings, place))
    stored, own = load_artifact(place).tensors, objective.state_dict()
    for name, tensor in objective.encoder.state_dict().items():
        assert torch.equal(tensor, stored[PREFIXES[kind] + name])
    count = len(objective.encoder.state_dict())
    assert f"{count} of {count} tensors of the encoder" in said
    decoder = [name for name in own if name.startswith("decoder.")]
    if kind == "pretrained":
        assert all(torch.equal(own[name], stored[name]) for name in decoder)
        assert f"{len(decoder)} of {len(decoder)} tensors of the decoder" in said and "left out" not in said
    else:
        assert f"0 of {len(decoder)} tensors of the decoder" in said
        assert ("2 left out: head.bias, head.weight" in said) == (kind != "backbone")


def test_a_decoder_is_taken_as_far_as_it_fits(settings: PretrainConfig, tmp_path: Path) -> None:
    place = artifact(tmp_path / "artifact")
    deeper = CoMAConfig(decoder=DecoderConfig(8, 2, 2))
    objective, said = initial_objective(starting(replace(settings, objective=deeper), place))
    assert torch.equal(objective.decoder.mask_token, load_artifact(place).tensors["decoder.mask_token"])
    assert "19 of 31 tensors of the decoder" in said


def test_a_decoder_with_nan_is_refused(settings: PretrainConfig, tmp_path: Path) -> None:
    place = artifact(tmp_path / "artifact")
    held = load_artifact(place)
    held.tensors["decoder.mask_token"].fill_(torch.nan)
    save_artifact(place, tensors=held.tensors, config=held.config)
    with pytest.raises(BadInput, match=r"decoder\.mask_token holds values that are not finite"):
        initial_objective(starting(settings, place))


def test_random_numbers_of_the_rest_are_those_of_other_runs(settings: PretrainConfig, tmp_path: Path) -> None:
    backbone = artifact(tmp_path / "artifact", "backbone")
    torch.manual_seed(0)
    objective, _ = initial_objective(starting(settings, backbone))
    torch.manual_seed(0)
    other = build_objective(settings.objective, build_encoder(settings.model))
    assert torch.equal(objective.decoder.head.weight, other.decoder.head.weight)


def test_the_moving_average_of_cmt_starts_there_too(
    settings: PretrainConfig, tmp_path: Path, weights: Path
) -> None:
    config = replace(
        settings,
        data=replace(settings.data, mean=(0.5,) * 3, std=(0.2,) * 3),
        objective=CMTConfig(teacher=TeacherConfig("test_vit", weights), decoder=DecoderConfig(8, 1, 2)),
    )
    objective: Any = initial_objective(starting(config, artifact(tmp_path / "artifact")))[0]
    stored = load_artifact(tmp_path / "artifact").tensors
    assert torch.equal(objective.average.norm.weight, stored["encoder.norm.weight"])


def test_a_run_tells_where_it_began(
    settings: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = artifact(tmp_path / "first" / "artifact")
    config = starting(settings, first)
    config = replace(config, optimizer=replace(config.optimizer, steps=1, ema_decay=0.9, base_lr=1e-9))
    run = pretrain(config)
    assert "starts from first/artifact: " in capsys.readouterr().err
    result, digest = load_artifact(run / "artifact"), sha256_of(first / "model.safetensors")
    assert result.config.init is not None
    assert (result.config.init.name, result.config.init.sha256) == ("first/artifact", digest)
    init = json.loads((run / "config.json").read_text())["init"]
    assert init["init"] == str(first) and init["init_sha256"] == digest
    before = load_artifact(first).tensors["encoder.norm.weight"]
    torch.testing.assert_close(result.tensors["encoder.norm.weight"], before, atol=1e-5, rtol=1e-5)
    assert cli.main(["info", str(run / "artifact")]) == 0
    assert f"init       first/artifact (SHA-256 {digest})" in capsys.readouterr().out


# resume -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [True, False])
def test_a_resumed_run_needs_the_weights_only_before_its_first_state(
    resumable: PretrainConfig, tmp_path: Path, saved: bool
) -> None:
    place = artifact(tmp_path / "artifact")
    config = starting(resumable, place)
    whole = pretrain(at(config, tmp_path / "whole"))
    run = at(config, tmp_path / "run")
    if saved:
        interrupted(run, 3)
        place.rename(tmp_path / "gone")
    else:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            killed_in(patch, 1)
            pretrain(run)
    command, resume, *_ = parse(["--resume", str(run.run.out)])
    assert resume and command.init.init == str(place)
    pretrain(replace(command, data=run.data), resume=True)
    assert_same(run.run.out, whole)


def test_a_run_without_a_state_starts_again_from_the_same_weights_only(
    resumable: PretrainConfig, tmp_path: Path
) -> None:
    place = artifact(tmp_path / "artifact")
    run = at(starting(resumable, place), tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_in(patch, 1)
        pretrain(run)
    changed = {name: 2 * tensor for name, tensor in load_artifact(place).tensors.items()}
    save_artifact(place, tensors=changed, config=load_artifact(place).config)
    with pytest.raises(BadInput, match=r"its SHA-256 is .*, not the expected"):
        pretrain(parse(["--resume", str(run.run.out)])[0], resume=True)


def test_other_weights_than_asked_for_are_refused(
    settings: PretrainConfig, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = artifact(tmp_path / "artifact")
    argv = (photos, "--out", tmp_path / "run", "--init", place, "--workers", 0, "--batch-size", 4)
    assert "not the expected abc" in refused(capsys, *argv, "--init-sha256", "abc")
    assert "--init does not go with --resume" in refused(capsys, "--resume", tmp_path, "--init", place)
    assert not (tmp_path / "run").exists()


# which model ------------------------------------------------------------------------------------


def test_an_artifact_brings_its_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = artifact(tmp_path / "artifact")
    caplog.set_level("INFO")
    config = parse(["photos", "--init", str(place)])[0]
    assert config.model == MODEL and config.data.image_size == (16, 16)
    assert config.objective == OBJECTIVE
    assert f"--init {place}: trains its model (architecture dyvit, channels 3, patch 1" in caplog.text
    assert "--image-size 16" in caplog.text
    wide = parse(["photos", "--init", str(place), "--channels", "4", "--image-size", "32"])[0]
    assert wide.model == replace(MODEL, channels=4) and wide.data.image_size == (32, 32)
    assert parse(["photos", "--init", str(place), "--model", "tiny"])[0].model != MODEL
    classifier = artifact(tmp_path / "other", "classifier")
    assert parse(["photos", "--init", str(classifier)])[0].objective.decoder.dim == 192


def test_a_file_of_a_known_size_brings_its_model(tmp_path: Path) -> None:
    config = ViTConfig(patch=14, dim=192, depth=12, heads=3)
    save_file(build_encoder(config).state_dict(), tmp_path / "tiny.safetensors")
    assert parse(["photos", "--init", str(tmp_path / "tiny.safetensors")])[0].model == config
    with pytest.raises(BadInput, match=r"does not say of which model it is.*give --model"):
        parse(["photos", "--init", str(timm_weights(tmp_path))])


def test_a_name_of_timm_brings_its_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timm:test_vit", "timm:test_vit.r160_in1k", "hf-hub:timm/test_vit.r160_in1k"):
        assert parse(["photos", "--init", name])[0].model == encoder_preset("timm:test_vit")
    found = str(timm_weights(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: found)
    config = replace(PretrainConfig(), model=encoder_preset("timm:test_vit"))
    objective: Any = initial_objective(starting(config, "timm:test_vit.r160_in1k"))[0]
    wanted = timm.create_model("test_vit", checkpoint_path=found).state_dict()
    own = objective.encoder.timm.state_dict()
    assert own and all(torch.equal(tensor, wanted[name]) for name, tensor in own.items())
    origin = origin_of(with_initial_weights(starting(config, "timm:test_vit.r160_in1k")))
    assert origin is not None and origin.name == "timm:test_vit.r160_in1k"


# how pixels are normalised -----------------------------------------------------------------------


def statistics(config: PretrainConfig, caplog: pytest.LogCaptureFixture, **data: Any) -> tuple[Any, str]:
    """Mean and standard deviation that a run would take, and the line about them."""
    caplog.clear()
    caplog.set_level("INFO")
    plain = replace(config, data=replace(config.data, **{"mean": None, "std": None, **data}))
    plan = prepare(plain, Processes(torch.device("cpu")), resume=False)
    lines = [line for line in caplog.messages if line.startswith("pixels are normalised")]
    return plan.statistics, lines[0] if lines else ""


def test_pixels_are_normalised_as_the_weights_expect(
    settings: PretrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = artifact(tmp_path / "artifact", mean=(0.5, 0.4, 0.3), std=(0.2,) * 3)
    measured, line = statistics(settings, caplog)
    assert not line
    assert statistics(starting(settings, place), caplog) == (
        ((0.5, 0.4, 0.3), (0.2,) * 3),
        "pixels are normalised by mean and standard deviation of the weights (0.5 0.4 0.3 and 0.2 0.2 0.2); "
        "--init-normalization images takes those of the images",
    )
    images = starting(settings, place, init_normalization="images")
    found, line = statistics(images, caplog)
    assert found == measured and line.endswith("(--init-normalization weights takes those of the weights)")
    given = {"mean": (0.1,) * 3, "std": (0.3,) * 3}
    assert statistics(starting(settings, place), caplog, **given) == ((given["mean"], given["std"]), "")
    wide = starting(replace(settings, model=replace(MODEL, channels=1)), place)
    found, line = statistics(wide, caplog)
    assert len(found[0]) == 1 and "those of the weights have 3 channels, the images 1" in line
    save_file(build_encoder(MODEL).state_dict(), tmp_path / "plain.safetensors")
    found, line = statistics(starting(settings, tmp_path / "plain.safetensors"), caplog)
    assert found == measured and "the weights do not name theirs; --mean and --std set them" in line


def test_timm_says_how_its_pixels_are_normalised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = str(timm_weights(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: found)
    config = timm.get_pretrained_cfg("test_vit.r160_in1k")
    assert config is not None
    for name in ("timm:test_vit.r160_in1k", "hf-hub:timm/test_vit.r160_in1k"):
        assert read_weights(name).statistics == (tuple(config.mean), tuple(config.std))


def test_weights_are_read_once_and_freed(
    settings: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, read = artifact(tmp_path / "artifact"), []
    load = weights_module.load_artifact
    monkeypatch.setattr(weights_module, "load_artifact", lambda path: read.append(path) or load(path))
    words = [str(settings.data.images), "--init", str(place), "--out", str(tmp_path / "run")]
    quick = ["--steps", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu"]
    config = parse([*words, *quick])[0]
    pretrain(config)
    assert read == [place] and not weights_module._last
    read_weights(str(place))
    artifact(place, mean=(0.1,) * 3)
    again = read_weights(str(place))
    assert again.about is not None and again.about.mean == (0.1,) * 3 and len(read) == 3
    weights_module.forget_weights()


def test_settings_of_a_run_bring_its_weights(settings: PretrainConfig, tmp_path: Path) -> None:
    place = artifact(tmp_path / "artifact")
    config = starting(settings, place)
    run = pretrain(replace(config, optimizer=replace(config.optimizer, steps=1)))
    new = parse(["--from", str(run), "--out", str(tmp_path / "new")])[0]
    assert new.init == InitConfig(str(place)) and new.model == MODEL
