"""`coma classify train --dry-run` says what the run then does, and writes nothing."""

import re
from dataclasses import replace

import pytest
from classifier_runs import to
from short_runs import MODEL, ROWS, everything_in, table

from coma.cli import main
from coma.errors import BadInput
from coma.models.classifiers import build_classifier
from downstream.classify.finetune import describe, finetune
from pretrain.training.throughput import encoder_flops
from pretrain.training.train_step import TrainStep

pytestmark = pytest.mark.usefixtures("no_curves")
FROZEN_ROWS = [name for name in ROWS if name not in ("steps", "learning rate")]


def test_three_real_steps_are_estimated_and_nothing_is_written(short, place, tmp_path, monkeypatch):
    steps: list[int] = []
    take = TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", lambda self, n, *rest: steps.append(n) or take(self, n, *rest))
    before = everything_in(place)
    lines = describe(to(short, tmp_path / "run"))
    assert steps == [0, 1, 2]
    assert everything_in(place) == before and not list(tmp_path.iterdir())
    told = table("\n".join(lines))
    assert list(told) == [*ROWS, "time", "memory"] and lines[-1] == "nothing was written: a dry run"
    data = place / "data"
    shown = f"12 training in {data}/train, 6 validation in {data}/val, 9 test in {data}/test; 3 channels"
    assert told["images"] == shown
    assert told["crops"].startswith("16 x 16 px, 8% to 100% of the area, half of them flipped")
    assert told["steps"] == "7 of 4 images (2 passes of 2), which are 2.333 epochs"
    assert told["learning rate"].startswith("0.00156 at its peak (0.1 x 4 / 256)")
    assert re.match(r"0:00:\d\d for 7 steps, .* \(mean of 2 steps after the first\)", told["time"])


@pytest.mark.parametrize(
    ("frozen_stages", "frozen", "parts"), [(-1, False, 0), (2, False, 3), (-1, True, 5)], ids=str
)
def test_parameters_that_are_trained_are_counted(short, tmp_path, frozen_stages, frozen, parts):
    classifier = build_classifier(MODEL, 3)
    frozen_modules = [*classifier.parts()[:parts], *([classifier.norm] if parts == 5 else [])]
    still = sum(p.numel() for module in frozen_modules for p in module.parameters())
    trained = sum(p.numel() for p in classifier.parameters()) - still
    lines = describe(to(short, tmp_path / "run", frozen=frozen, frozen_stages=frozen_stages))
    assert f"with a linear head {trained:,} are trained" in table("\n".join(lines))["model"]


def test_a_linear_head_is_described_by_its_features(short, place, tmp_path):
    told = table("\n".join(describe(to(short, tmp_path / "run", frozen=True))))
    assert list(told) == [*FROZEN_ROWS, "time", "memory"]
    assert not list(tmp_path.iterdir())
    assert told["crops"] == "16 x 16 px, the centre crop of each image; 4 mask units of 8 px"
    flops = re.fullmatch(r"([\d.]+) MFLOPs for the encoder on one image of 16 px", told["FLOPs"])
    assert flops and float(flops[1]) == pytest.approx(encoder_flops(MODEL, 16) / 1e6, rel=1e-3)
    batches = 6 + 3 + 5  # of 2 images each
    shown = rf"0:00:\d\d for {batches} batches, without the fit of the head: \S+ s a batch \(mean of 2 "
    assert re.match(shown, told["time"])


@pytest.mark.parametrize("frozen", [False, True])
def test_the_same_lines_open_a_run_and_its_files_are_those_announced(short, tmp_path, capsys, frozen):
    config = to(short, tmp_path / "run", frozen=frozen)
    dry = table("\n".join(describe(config)))
    capsys.readouterr()
    finetune(config)
    told = table(capsys.readouterr().err)
    rows = FROZEN_ROWS if frozen else ROWS
    assert {name: told[name] for name in rows} == {name: dry[name] for name in rows}
    made = {path.name + "/" * path.is_dir() for path in config.run.out.iterdir()}
    announced = set(dry["writes"].partition(": ")[2].partition(";")[0].split(", "))
    assert announced - {"loss_curve.png"} == made  # no_curves


def test_the_command_runs_dry_also_where_a_run_is(short, place, tmp_path, capsys):
    run = finetune(to(short, tmp_path / "run")).config.run.out
    before = everything_in(run)
    assert main(["classify", "train", "--resume", str(run), "--steps", "9", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "for 2 steps" in table(told)["time"]
    assert told.endswith("nothing was written: a dry run\n")
    assert everything_in(run) == before
    words = [str(place / "artifact"), "--data", str(place / "data"), "--out", str(tmp_path / "new")]
    assert main(["classify", "train", *words, "--frozen", "--dry-run", "--device", "cpu"]) == 0
    assert "for 3 batches" in table(capsys.readouterr().out)["time"]
    assert not (tmp_path / "new").exists()


def test_bad_settings_are_refused_as_in_a_run(short, tmp_path):
    with pytest.raises(BadInput, match="multiple of the 8 px mask unit"):
        describe(replace(short, data=replace(short.data, image_size=20)))
