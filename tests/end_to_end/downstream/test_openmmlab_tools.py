"""OpenMMLab's own tools and functions work with what `coma` wrote, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from downstream_data import SMALL, artifact, coco, labelled

from coma.errors import BadInput
from downstream.commands import detect, segment
from downstream.openmmlab.__main__ import find_tool, main

pytestmark = [pytest.mark.openmmlab, pytest.mark.filterwarnings("ignore")]  # mm's packages warn of each other


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`detector` and `segmentor`, runs of one step, and their data."""
    folder = tmp_path_factory.mktemp("runs")
    encoder = artifact(folder / "encoder")
    coco(folder / "coco", train=2, val=2)
    labelled(folder / "scenes", train=2, val=2)
    data = ["--data", str(folder / "coco"), "--out", str(folder / "detector")]
    detect.run(["train", str(encoder), *data, "--steps", "1", "--model", "faster-rcnn", *SMALL])
    small = ["--head-channels", "32", "--crop-size", "64", "--batch-size", "2", "--workers", "0"]
    data = ["--data", str(folder / "scenes"), "--out", str(folder / "segmentor")]
    segment.run(["train", str(encoder), *data, "--steps", "1", *small])
    return folder


def tool(folder: Path, *arguments: str) -> str:
    """What a tool printed in a fresh process that began in `folder`."""
    command = [sys.executable, "-m", "downstream.openmmlab", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "run", "score"), [("mmdet", "detector", "coco/bbox_mAP"), ("mmseg", "segmentor", "mIoU")]
)
def test_a_run_is_trained_and_tested_by_the_tools_of_its_library(library, run, score, runs):
    work, config = run, f"{run}/config.py"
    if library == "mmdet":  # both libraries have the same tool
        work = f"{run}-again"
        tool(runs, "mmdet/tools/train.py", config, "--work-dir", work)
        assert (runs / work / "iter_1.pth").is_file()
    said = tool(runs, f"{library}/tools/test.py", config, f"{work}/iter_1.pth", "--work-dir", f"{run}-tested")
    assert f"{score}: " in said


@pytest.mark.slow
def test_logs_are_analysed(runs):
    (log,) = (runs / "detector").glob("*/vis_data/scalars.json")
    assert "loss" in json.loads(log.read_text().splitlines()[0])
    analyse = "mmdet/tools/analysis_tools/analyze_logs.py"
    tool(runs, analyse, "plot_curve", str(log), "--keys", "loss_cls", "--out", "curve.png")
    assert (runs / "curve.png").is_file()


FUNCTIONS = """
import downstream.openmmlab
import cv2, torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmseg.apis import MMSegInferencer, inference_model, init_model

model = init_detector("detector/config.py", "detector/iter_1.pth", device="cpu")
image = "coco/val/1.png"
found = [inference_detector(model, each).pred_instances for each in (image, cv2.imread(image))]
inferencer = DetInferencer("detector/config.py", "detector/iter_1.pth", device="cpu", show_progress=False)
(one,) = inferencer(image, no_save_vis=True)["predictions"]
assert len(inferencer("coco/val", no_save_vis=True)["predictions"]) == 2
assert torch.equal(found[0].scores, found[1].scores) and torch.equal(found[0].bboxes, found[1].bboxes)
assert torch.allclose(found[0].scores, torch.tensor(one["scores"])) and len(one["scores"]) > 0

image = "scenes/img_dir/val/0.png"
model = init_model("segmentor/config.py", "segmentor/iter_1.pth", device="cpu")
labels = [inference_model(model, each).pred_sem_seg.data for each in (image, cv2.imread(image))]
inferencer = MMSegInferencer("segmentor/config.py", "segmentor/iter_1.pth", device="cpu")
answer = torch.from_numpy(inferencer(image)["predictions"])
assert torch.equal(labels[0], labels[1]) and torch.equal(labels[0][0], answer) and answer.shape == (64, 96)
print("all equal")
"""


@pytest.mark.slow
def test_functions_and_inferencers_answer_alike_after_one_import(runs):
    (runs / "functions.py").write_text(FUNCTIONS)
    assert "all equal" in tool(runs, "functions.py")


def test_variables_of_pipelines_are_those_that_are_used(runs):
    """mmseg's `inference_model` reads `test_pipeline`."""
    from downstream.configs.load import load_config, pipeline_of

    config = load_config(runs / "segmentor" / "config.py")
    for name in ("train", "test"):
        assert config[f"{name}_pipeline"] == pipeline_of(config[f"{name}_dataloader"].dataset)


def test_tools_are_found_by_package_or_path(tmp_path, monkeypatch):
    assert find_tool("mmdet/tools/train.py").is_file() and find_tool("mmseg/tools/test.py").is_file()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("")
    assert find_tool("own.py") == tmp_path / "own.py"
    for name, message in (
        ("absent.py", "absent.py: no such file; name a file, or mmdet/tools/train.py"),
        ("mmdet/tools/absent.py", "mmdet has no such tool; it has tools/test.py"),
        ("nopackage/tools/train.py", "no such file"),
        ("../x.py", "no such file"),
    ):
        with pytest.raises(BadInput, match=message):
            find_tool(name)


def test_a_tool_runs_as_a_program_and_its_faults_are_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["before"])
    monkeypatch.setattr(sys, "path", ["first", *sys.path])
    (tmp_path / "beside.py").write_text("word = 'beside'")
    (tmp_path / "own.py").write_text("import sys, beside\nprint(__name__, sys.argv[1:], beside.word)")
    assert main([str(tmp_path / "own.py"), "--flag", "1"]) == 0
    assert capsys.readouterr().out == "__main__ ['--flag', '1'] beside\n"
    (tmp_path / "own.py").write_text("from coma.errors import BadInput\nraise BadInput('FILE: is wrong')")
    assert main([str(tmp_path / "own.py")]) == 2
    assert capsys.readouterr().err == "error: FILE: is wrong\n"
    (tmp_path / "own.py").write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="3"):
        main([str(tmp_path / "own.py")])
    assert main([]) == 2 and "mmdet/tools/test.py" in capsys.readouterr().err
    assert main(["--help"]) == 0 and "mmdet/tools/test.py" in capsys.readouterr().out
