"""CMT-MAE and balanced CoMA: masks, targets, moving average, runs."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from short_runs import MODEL, assert_same, at, interrupted, learned
from small_models import ENCODERS, loss_curve, pictures
from taught_models import METHODS, STATISTICS, objective, teacher

from coma import cli, load_pretrained
from coma.config import (
    BalancedCoMAConfig,
    CMTConfig,
    DataConfig,
    DecoderConfig,
    PretrainConfig,
    TeacherConfig,
    method_preset,
)
from coma.config.serialization import from_plain, to_plain
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.masking.sampling import deal
from coma.models import build_encoder
from coma.models.attention_maps import attend
from coma.models.teacher import to_units
from coma.objectives import build_objective
from coma.objectives.balanced import BalancedCoMA
from coma.objectives.cmt import CMT
from coma.objectives.teachers import load_teacher, training_objective
from pretrain.training import pretrain
from pretrain.training.checkpoint import read_state
from pretrain.training.train_step import TrainStep

# the objectives --------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ENCODERS)
def test_shapes_gradients_and_where_the_loss_lies(encoder):
    model = objective(encoder)
    assert isinstance(model, CMT)
    out = model(pictures(), torch.arange(4))
    width = 24 + model.encoder.num_features
    assert out.prediction.shape == (1, 4, 4, 4, width) and out.target.shape == (4, 4, 4, width)
    assert (out.visible.flatten(2).sum(-1) == 4).all()
    (gradient,) = torch.autograd.grad(out.loss, out.prediction, retain_graph=True)
    assert gradient[out.visible].abs().max() == 0
    assert (gradient[~out.visible] != 0).float().mean() > 0.99
    out.loss.backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {name for name, p in model.named_parameters() if p.grad is not None}
    assert not any(name.startswith("average.") for name in learning)
    assert all(p.grad is None for p in (model._teacher or teacher()).model.parameters())
    parts = {name.split(".")[0] for name in model.state_dict()}
    assert parts == {"encoder", "decoder", "average", "to_teacher", "to_student"}


def test_pixels_are_learned_beside_without_telling_the_rest():
    grads = []
    for factor in (1.0, 100.0):
        model = objective()
        with torch.no_grad():
            model.decoder.head.weight.mul_(factor)
        out = model(pictures(), torch.arange(4))
        out.loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        expected = 0.5 * out.metrics["loss_teacher"] + 0.5 * out.metrics["loss_student"]
        torch.testing.assert_close(out.loss, expected)
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]) == (not name.startswith("decoder.head")), name


@pytest.mark.parametrize(("distance", "share"), [("cosine", 0.3), ("smooth-l1", 1.0)])
def test_the_loss_computed_by_hand(distance, share):
    model = objective(distance=distance, target_share=share)
    out = model(pictures(), torch.arange(4))
    guess, target, hidden = out.prediction[0].detach().numpy(), out.target.numpy(), ~out.visible[0].numpy()
    losses = []
    for part in (slice(0, 24), slice(24, None)):
        a, b = guess[hidden][:, part].astype(np.float64), target[hidden][:, part].astype(np.float64)
        if distance == "cosine":
            losses.append(np.mean(1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))
        else:
            d = np.abs(a - b)
            losses.append(np.where(d < 1, d * d / 2, d - 0.5).mean())
    assert out.loss.item() == pytest.approx(share * losses[0] + (1 - share) * losses[1], rel=1e-4)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_targets_and_attention_are_those_of_teacher_and_average(encoder, norm):
    block = {"vit": 2, "dyvit": 1}[encoder]
    model = objective(encoder, mask_share=0.25, student_block=block, norm_targets=norm)
    images = pictures()
    (taught, learnt), attention = model.ask(images)
    expected, looked = teacher()(images, 4, 4)
    features, own = to_units(*attend(model.average, images, block=block), 4, 4)
    for target, raw in ((taught, expected), (learnt, features)):
        centred = raw - raw.mean(-1, keepdim=True)
        normed = centred / (raw.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(target, normed if norm else raw)
    torch.testing.assert_close(attention, 0.25 * looked + 0.75 * own)
    torch.testing.assert_close(attention.sum((1, 2)), torch.ones(4))


@pytest.mark.parametrize("hide", ["attended", "ignored"])
def test_polarity(hide):
    model = objective(hide=hide)
    peak = torch.full((500, 4, 4), 0.001)
    peak[:, 1, 2] = 1
    hidden = ~model.guided_visible(peak, torch.arange(500))[0]
    assert (hidden.flatten(1).sum(1) == 12).all()
    assert (
        hidden[:, 1, 2].float().mean() > 0.99 if hide == "attended" else hidden[:, 1, 2].float().mean() < 0.01
    )


def test_masks_are_random_at_first_and_guided_then():
    model = objective(random_share=0.5)
    images, seeds = pictures(), torch.arange(4)
    model.before_step(0.49)
    assert torch.equal(model(images, seeds).visible, model.draw_visible(seeds, 4, 4))
    model.before_step(0.5)
    guided = model.guided_visible(model.ask(images)[1], seeds)
    assert torch.equal(model(images, seeds).visible, guided)
    assert not torch.equal(guided, model.draw_visible(seeds, 4, 4))


@pytest.mark.parametrize("end", [1.0, 0.95])
def test_the_average_follows_the_formula_and_the_teacher_does_not_move(end):
    model = objective(ema_decay=0.9, ema_decay_end=end)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    frozen = {name: t.clone() for name, t in model._teacher.model.state_dict().items()}
    average = {name: t.clone() for name, t in model.encoder.state_dict().items()}
    for step in range(4):
        model.before_step(step / 4)
        model(pictures(), torch.arange(4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(step / 4)
        m = end - (end - 0.9) * (math.cos(math.pi * step / 4) + 1) / 2
        average = {n: m * average[n] + (1 - m) * t for n, t in model.encoder.state_dict().items()}
    for name, tensor in model.average.state_dict().items():
        torch.testing.assert_close(tensor, average[name])
        assert not torch.equal(tensor, model.encoder.state_dict()[name])
    assert all(torch.equal(t, frozen[name]) for name, t in model._teacher.model.state_dict().items())
    last = {name: t.clone() for name, t in model.average.state_dict().items()}
    model.after_step(1.0)
    for name, tensor in model.average.state_dict().items():
        torch.testing.assert_close(tensor, end * last[name] + (1 - end) * model.encoder.state_dict()[name])


def test_the_average_is_asked_without_drop_path():
    torch.manual_seed(0)
    encoder = build_encoder(replace(ENCODERS["vit"], drop_path=0.5))
    model: Any = build_objective(METHODS["cmt"], encoder, teacher()).train()
    assert model.encoder.training and not model.average.training
    one, other = model.ask(pictures())[0][1], model.ask(pictures())[0][1]
    assert torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_loss_does_not_depend_on_how_a_batch_is_split(encoder, method):
    model = objective(encoder, method)
    images, seeds = pictures(), torch.arange(4)
    with torch.no_grad():
        whole = model(images, seeds).loss
        halves = [model(images[part], seeds[part]).loss for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_balanced_coma_is_coma_with_other_views(encoder):
    model = objective(encoder, "coma-balanced")
    assert isinstance(model, BalancedCoMA)
    out = model(pictures(), torch.arange(4))
    assert (out.visible.sum(0) == 1).all() and (out.visible.flatten(2).sum(-1) == 8).all()
    _, attention = teacher()(pictures(), 4, 4)
    assert torch.equal(out.visible[1].long(), deal(attention, torch.arange(4), 2))
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_without_its_teacher_it_reconstructs_but_does_not_learn(method):
    model = build_objective(METHODS[method], build_encoder(ENCODERS["vit"])).eval()
    assert all(name.startswith(("encoder.", "decoder.")) for name in model.state_dict())
    visible = model.draw_visible(torch.arange(2), 4, 4)[0]
    assert model.reconstruct(pictures(2), visible).shape == (2, 3, 32, 32)
    with pytest.raises(RuntimeError, match="does not learn"):
        model(pictures(), torch.arange(4))


def test_settings():
    config = PretrainConfig(objective=method_preset("cmt"))
    assert from_plain(to_plain(config), PretrainConfig, source="x") == config
    balanced = PretrainConfig(objective=method_preset("coma-balanced"))
    assert to_plain(balanced)["objective"]["method"] == "coma-balanced"
    assert from_plain(to_plain(balanced), PretrainConfig, source="x") == balanced
    with pytest.raises(BadInput, match=r"--objective\.mask-ratio 1 must be"):
        CMTConfig(mask_ratio=1)
    with pytest.raises(BadInput, match=r"--objective.mask-share 1\.5 must be 0 to 1"):
        CMTConfig(mask_share=1.5)
    with pytest.raises(BadInput, match=r"--objective\.student-block 0 must be 1 to 256"):
        CMTConfig(student_block=0)
    with pytest.raises(BadInput, match=r"--objective\.teacher.block 0 must be 1 to 256"):
        TeacherConfig(block=0)
    with pytest.raises(BadInput, match="cannot be balanced"):
        BalancedCoMAConfig(masks="single")
    with pytest.raises(BadInput, match="leaves none to see"):
        objective(mask_ratio=0.99)(pictures(), torch.arange(4))


# runs ------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Without pictures."""
    for name in ("reconstruction_sheet", "loss_curve"):
        monkeypatch.setattr(f"pretrain.training.run_directory.{name}", lambda *_, **__: None)


@pytest.fixture
def guided(resumable, weights):
    method = CMTConfig(
        teacher=TeacherConfig("test_vit", weights),
        random_share=0.3,
        ema_decay=0.9,
        decoder=DecoderConfig(8, 1, 2),
    )
    return replace(resumable, objective=method)


@pytest.mark.usefixtures("quick")
def test_interrupted_and_resumed_is_uninterrupted(guided, tmp_path):
    whole, run = pretrain(at(guided, tmp_path / "whole")), tmp_path / "run"
    interrupted(at(guided, run), 4)
    torch.rand(3)
    pretrain(at(guided, run), resume=True)
    assert_same(run, whole)
    state = read_state(run / "state", warn=pytest.fail)
    assert state is not None
    assert any(name.startswith("average.") for name in state["model"])
    names = learned(run)[1]
    assert names and all(name.startswith(("encoder.", "decoder.")) for name in names)


@pytest.mark.usefixtures("quick")
def test_a_forgotten_average_would_be_noticed(guided, tmp_path, monkeypatch):
    whole, run = pretrain(at(guided, tmp_path / "whole")), tmp_path / "run"
    interrupted(at(guided, run), 4)
    load = TrainStep.load_state_dict

    def forget(self, state):
        load(self, state)
        self.objective.average.load_state_dict(self.objective.encoder.state_dict())

    monkeypatch.setattr(TrainStep, "load_state_dict", forget)
    pretrain(at(guided, run), resume=True)
    with pytest.raises(AssertionError):
        assert_same(run, whole)


@pytest.mark.usefixtures("quick")
def test_another_teacher_is_refused_when_a_run_goes_on(guided, tmp_path, weights):
    run, moved, other = tmp_path / "run", tmp_path / "moved.safetensors", tmp_path / "other.safetensors"
    interrupted(at(guided, run), 2)
    save_file(timm.create_model("test_vit").state_dict(), other)
    moved.write_bytes(weights.read_bytes())

    def taught_by(path):
        method = replace(guided.objective, teacher=replace(guided.objective.teacher, weights=path))
        return at(replace(guided, objective=method), run)

    with pytest.raises(BadInput, match="not the weights of teacher test_vit that the run was started with"):
        pretrain(taught_by(other), resume=True)
    pretrain(taught_by(moved), resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cmt", "coma-balanced"])
def test_a_run_from_the_command_line(method, photos, weights, tmp_path, capsys):
    small = ["--model", "tiny", "--image-size", "16", "--steps", "2", "--batch-size", "2", "--workers", "0"]
    common = ["pretrain", str(photos), "--device", "cpu", *small, "--objective.decoder.depth", "1"]
    teach = ["--method", method, "--teacher", "test_vit", "--teacher-weights", str(weights)]
    out = tmp_path / "run"
    assert cli.main([*common, *teach, "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert ("not CLIP ViT-B/16" in said) == (method == "cmt")
    assert next((out / "reconstructions").glob("*.png")).stat().st_size > 5000
    model = load_pretrained(out / "artifact")
    about = model.artifact
    assert ("remarks" in about.trained) == (method == "cmt")
    assert about.trained["method"] == method
    assert model.reconstruct(pictures(2), model.draw_visible(torch.arange(2), 4, 4)[0]).isfinite().all()
    plain = json.loads((out / "config.json").read_text())
    assert len(plain["objective"]["teacher"]["sha256"]) == 64
    again = ["--method", method, "--teacher", str(out / "artifact"), "--out", str(tmp_path / "second")]
    assert cli.main([*common, *again]) == 0
    assert (
        cli.main(["pretrain", "--resume", str(out), "--steps", "3", "--teacher-weights", str(weights)]) == 0
    )


def test_what_the_command_line_refuses(photos, weights, tmp_path, capsys):
    common = [
        "pretrain",
        str(photos),
        "--out",
        str(tmp_path / "run"),
        "--model",
        "tiny",
        "--image-size",
        "16",
    ]
    for argv, message in (
        (["--method", "mae", "--teacher", "test_vit"], "--teacher test_vit belongs to --method cmt"),
        (["--teacher-weights", str(weights)], "belongs to --method cmt and coma-balanced"),
        (["--method", "cmt", "--teacher", "test_vti"], "did you mean"),
        (["--method", "cmt", "--teacher", "test_vit", "--teacher-weights", "none.safetensors"], "existing"),
        (
            [
                "--method",
                "cmt",
                "--teacher",
                "test_vit",
                "--teacher-weights",
                str(weights),
                "--channels",
                "1",
            ],
            "takes images of 3 channels",
        ),
    ):
        assert cli.main([*common, *argv]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_dyvit_taught_by_an_artifact_of_another_size(settings, tmp_path):
    folder = pretrain(at(replace(settings, model=MODEL), tmp_path / "first"))
    method = CMTConfig(teacher=TeacherConfig(str(folder / "artifact")), decoder=DecoderConfig(8, 1, 2))
    data = DataConfig(images=settings.data.images, image_size=ImageSize.of(24), workers=0)
    config = replace(settings, model=ENCODERS["vit"], objective=method, data=data)
    filled = replace(config, data=replace(data, mean=STATISTICS[0], std=STATISTICS[1]))
    model = training_objective(filled)
    out = model(pictures(2, 24), torch.arange(2))
    assert out.target.shape == (2, 3, 3, 64 + 32)
    with pytest.raises(BadInput, match="did you mean"):
        load_teacher(TeacherConfig(str(folder)), STATISTICS)


CURVES = [("dyvit", "cmt"), ("vit", "cmt"), ("vit", "coma-balanced")]


@pytest.mark.parametrize(("encoder", "method"), CURVES)
def test_golden_loss_curve(encoder, method, golden_curve):
    curve = loss_curve(objective(encoder, method), pictures(8), steps=20)
    golden_curve("loss_curves_cmt.json", f"{encoder} {method}", curve)
