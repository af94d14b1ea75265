"""`coma detect` from end to end: train, stop, resume, measure; with our settings and with others."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import label_files
import numpy as np
import pytest
import torch
from downstream_data import DYVIT, SMALL, VIT, artifact, coco
from PIL import Image

from coma.artifact import load_artifact, save_artifact
from coma.errors import BadInput, CheckFailed, Interrupted
from coma.locks import lock_run
from downstream.commands.detect import run

pytestmark = [pytest.mark.openmmlab, pytest.mark.filterwarnings("ignore")]  # mm's packages warn of each other


def test_a_run_leaves_an_artifact_of_the_best_checkpoint(trained, backbone):
    found = load_artifact(trained / "artifact")
    assert found.config.kind == "detector" and found.config.class_names == ("square", "disc")
    assert found.config.model == replace(DYVIT, drop_path=0.1)
    assert found.config.mean == pytest.approx((0.4,) * 3)
    head = found.config.head or {}
    assert head["library"] == "mmdet" and head["category_ids"] == [1, 2]
    assert found.config.trained["steps"] == 4 and "coco/segm_mAP" in found.config.trained["scores"]
    best = torch.load(trained / found.config.trained["checkpoint"])["state_dict"]
    assert best.keys() == found.tensors.keys()
    assert all(torch.equal(best[name], found.tensors[name]) for name in best)
    before = load_artifact(backbone).tensors["stages.3.blocks.0.mlp.fc1.weight"]
    after = found.tensors["backbone.encoder.stages.3.blocks.0.mlp.fc1.weight"]
    assert not torch.equal(before, after) and torch.allclose(
        before, after, atol=0.01
    )  # it started from there
    assert len(list(trained.glob("iter_*.pth"))) == 2 and list(trained.rglob("events.out.tfevents*"))


def test_the_log_of_a_run_that_has_ended_is_closed(trained):
    """mmengine writes to its logs whenever a model is initialised, also to one that a server has closed."""
    from mmengine.logging import MMLogger

    open_files = [
        getattr(handler, "baseFilename", "")
        for logger in MMLogger._instance_dict.values()
        for handler in logger.handlers
    ]
    assert list(trained.rglob("*.log")) and not [name for name in open_files if str(trained) in name]


def test_the_artifact_gives_what_the_trained_model_gave(trained, data, tmp_path, capsys):
    run(["test", str(trained / "artifact"), "--data", str(data), "--out", str(tmp_path)])
    scores = json.loads((tmp_path / "scores.json").read_text())
    kept = load_artifact(trained / "artifact").config.trained["scores"]
    assert "coco/bbox_mAP_50" in kept and {k: scores[k] for k in kept} == pytest.approx(kept, abs=1e-3)
    assert "coco/bbox_mAP" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_images_that_come_next(data, backbone, tmp_path, monkeypatch):
    from downstream.openmmlab.runner import _ProgressHook

    after = _ProgressHook.after_train_iter
    seen: list[list[int]] = []

    def stopped(self, runner, batch_idx, data_batch, *args, **kwargs):
        seen.append([sample.img_id for sample in data_batch["data_samples"]])
        if runner.iter == 1 and not (tmp_path / "run" / "iter_2.pth").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        after(self, runner, batch_idx, data_batch, *args, **kwargs)

    monkeypatch.setattr(_ProgressHook, "after_train_iter", stopped)
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match=r"stopped at step 2 of 3; everything is saved"):
        run(
            [
                "train",
                str(backbone),
                "--data",
                str(data),
                "--out",
                str(out),
                "--steps",
                "3",
                "--validations",
                "1",
                *SMALL,
            ]
        )
    halfway = torch.load(out / "iter_2.pth")
    with lock_run(out), pytest.raises(BadInput, match="another process is training in"):
        run(["train", "--resume", str(out)])
    run(["train", "--resume", str(out)])
    end = torch.load(out / "iter_3.pth")
    assert (halfway["meta"]["iter"], end["meta"]["iter"]) == (2, 3)
    moments = [state["optimizer"]["state"][0]["step"] for state in (halfway, end)]
    assert [float(moment) for moment in moments] == [2, 3]  # the optimizer went on, too
    images = [image for batch in seen for image in batch]
    assert sorted(images) == [1, 2, 3, 4, 5, 6]  # three steps of two see all six once
    assert (out / "artifact" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_before_it_is_saved(data, backbone, tmp_path):
    spoilt = load_artifact(backbone)
    spoilt.tensors["stem.conv.weight"][0, 0, 0, 0] = float("nan")
    save_artifact(tmp_path / "spoilt", tensors=spoilt.tensors, config=spoilt.config)
    with pytest.raises(CheckFailed, match=r"the loss is nan at step 1"):
        run(["train", str(tmp_path / "spoilt"), "--data", str(data), "--out", str(tmp_path / "run"),
             "--steps", "2",
             "--save-steps", "1", "--model", "retinanet", *SMALL])  # fmt: skip
    assert not list((tmp_path / "run").glob("*.pth"))


@pytest.mark.slow
def test_a_signal_to_the_whole_job_saves_as_well(data, backbone, tmp_path):
    """Schedulers send it to the reading processes, too, which die of it."""
    from downstream.openmmlab.checkpoint import checkpoint_weights

    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "coma",
        "detect",
        "train",
        str(backbone),
        "--data",
        str(data),
        "--out",
    ]
    command += [str(out), "--steps", "500", "--model", "retinanet", *SMALL[:-1], "1"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "step 25/500" in line:
            os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == Interrupted.exit_code, "".join(said[-30:])
    done = int((out / "last_checkpoint").read_text().rpartition("_")[2].removesuffix(".pth"))
    assert 25 <= done < 100 and checkpoint_weights(out / f"iter_{done}.pth")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["retinanet", "cascade-mask-rcnn"])
def test_other_detectors_train_and_predict(model, data, backbone, tmp_path):
    out = tmp_path / "run"
    run(
        [
            "train",
            str(backbone),
            "--data",
            str(data),
            "--out",
            str(out),
            "--steps",
            "1",
            "--model",
            model,
            *SMALL,
        ]
    )
    image = str(data / "val" / "1.png")
    run(["predict", str(out / "artifact"), image, "--out", str(tmp_path / "p"), "--device", "cpu"])
    assert (tmp_path / "p" / "pictures" / "1.png").is_file()


@pytest.mark.slow
def test_boxes_alone_and_five_channels_and_a_plain_vit(tmp_path):
    """Without masks the default is Faster R-CNN; TIFF of five channels; a ViT makes its own pyramid."""
    import tifffile

    data = coco(tmp_path / "data", train=2, val=1, masks=False)
    for split in ("train", "val"):
        content = json.loads((data / "annotations" / f"{split}.json").read_text())
        for image in content["images"]:
            path = data / split / image["file_name"]
            pixels = np.asarray(Image.open(path))
            path.unlink()
            image["file_name"] = f"{image['id']}.tif"
            bands = np.concatenate([pixels, pixels[..., :2]], axis=2)
            tifffile.imwrite(path.with_suffix(".tif"), bands, photometric="minisblack", planarconfig="contig")
        (data / "annotations" / f"{split}.json").write_text(json.dumps(content))
    path = artifact(tmp_path / "a", replace(VIT, channels=5))
    out = tmp_path / "run"
    run(["train", str(path), "--data", str(data), "--out", str(out), "--steps", "1", *SMALL])
    head = load_artifact(out / "artifact").config.head or {}
    assert head["model"]["type"] == "FasterRCNN" and head["model"]["neck"]["type"] == "SimpleFeaturePyramid"
    run(["predict", str(out / "artifact"), str(data / "val"), "--out", str(tmp_path / "p")])
    assert Image.open(tmp_path / "p" / "pictures" / "1.png").size == (96, 64)
    with pytest.raises(BadInput, match="needs a mask for every object"):
        run(
            [
                "train",
                str(path),
                "--data",
                str(data),
                "--out",
                str(tmp_path / "r"),
                "--model",
                "mask-rcnn",
                *SMALL,
            ]
        )


@pytest.mark.slow
def test_any_configuration_of_mmdet(data, backbone, tmp_path):
    """Its backbone, classes and data are replaced; its schedule is its own."""
    theirs = tmp_path / "theirs.py"
    theirs.write_text(
        "_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'\n"
        "train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=2, val_interval=2)\n"
        "train_dataloader = dict(num_workers=0, persistent_workers=False)\n"
        "val_dataloader = dict(num_workers=0, persistent_workers=False)\n"
    )
    out = tmp_path / "run"
    small = ["neck.out_channels=16", "bbox_head.in_channels=16", "bbox_head.feat_channels=16"]
    options = [f"model.{each}" for each in small] + ["default_hooks.checkpoint.by_epoch=False"]
    options += [
        "train_dataloader.dataset.pipeline.2.scale=(96,64)",
        "val_dataloader.dataset.pipeline.1.scale=(96,64)",
    ]
    run(["train", str(backbone), "--config", str(theirs), "--data", str(data), "--out", str(out),
         "--cfg-options", *options])  # fmt: skip
    config = load_artifact(out / "artifact").config
    assert config.class_names == ("square", "disc") and config.trained["steps"] == 2
    assert (config.head or {})["model"]["backbone"]["out_indices"] == [1, 2, 3]


def test_what_cannot_become_an_artifact_is_known_before_training(data, backbone, tmp_path):
    theirs = tmp_path / "theirs.py"
    theirs.write_text(
        "_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'\n"
        "model = dict(test_cfg=dict(chosen=print))\n"
    )
    out = tmp_path / "run"
    with pytest.raises(BadInput, match="which an artifact cannot"):
        run(["train", str(backbone), "--config", str(theirs), "--data", str(data), "--out", str(out)])
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.slow
def test_a_plain_runner_runs_what_the_command_wrote(trained, tmp_path):
    """mmengine alone, in a process of its own, from the run's configuration file."""
    script = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from mmengine.config import Config; from mmengine.runner import Runner\n"
        "config = Config.fromfile(sys.argv[1]); config.work_dir = sys.argv[2]\n"
        "config.train_cfg.max_iters = 1; config.train_cfg.val_interval = 9; config.param_scheduler = None\n"
        "Runner.from_cfg(config).train()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(trained / "config.py"), str(tmp_path / "work")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "work" / "last_checkpoint").is_file()


def test_check_prints_what_a_dataset_holds(data, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "120")
    run(["check", "--data", str(data), "--out", str(tmp_path / "sheet")])
    said = capsys.readouterr().out
    assert "96 x 64 / 96 x 64 / 96 x 64" in said and "no errors found" in said
    boxes = [
        each["bbox"][2:]
        for each in json.loads((data / "annotations" / "val.json").read_text())["annotations"]
        if each["category_id"] == 2
    ]
    low, high = (f"{int(size[0])} x {int(size[1])}" for size in (min(boxes), max(boxes)))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines()]
    assert ["", "val", str(len(boxes)), str(len(boxes)), low, high] in rows
    with Image.open(tmp_path / "sheet" / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 600 and len(sheet.convert("RGB").getcolors(1 << 20) or [0] * 999) > 500
    with pytest.raises(BadInput, match="is not empty"):
        run(["check", "--data", str(data), "--out", str(tmp_path / "sheet")])


def test_labels_of_another_format_are_kept_in_the_run(trained, data, backbone, tmp_path, capsys):
    """Training reads what was converted, also when it is resumed; a run that never began leaves nothing."""
    other, out = label_files.yolo(data, tmp_path / "yolo", polygons=True), tmp_path / "run"
    options = ["train", str(backbone), "--data", str(other), "--out", str(out), "--steps", "1", *SMALL]
    with pytest.raises(BadInput, match="must be name=value"):
        run([*options, "--cfg-options", "nonsense"])
    assert not out.exists()
    run(options)
    assert {path.name for path in (out / "labels").iterdir()} == {"train.json", "val.json"}
    shutil.rmtree(other / "labels")
    run(["train", "--resume", str(out)])
    with pytest.raises(BadInput, match="square, disc"):
        run(["test", str(trained / "artifact"), "--data", str(label_files.voc(data, tmp_path / "voc"))])
    (tmp_path / "voc" / "classes.txt").write_text("square\ndisc\n")
    run(
        [
            "test",
            str(trained / "artifact"),
            "--data",
            str(tmp_path / "voc"),
            "--out",
            str(tmp_path / "scores"),
        ]
    )
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    kept = load_artifact(trained / "artifact").config.trained["scores"]
    assert scores["coco/bbox_mAP"] == pytest.approx(kept["coco/bbox_mAP"], abs=1e-3)


def test_the_stand_in_operators_are_announced(caplog):
    import downstream.openmmlab  # noqa: F401
    from downstream.openmmlab import op_registry

    sys.modules.pop("mmcv._ext")
    with caplog.at_level(logging.INFO, "downstream.openmmlab.op_registry"):
        op_registry.register_ops()
        op_registry.register_ops()
    assert len([r for r in caplog.records if "torchvision" in r.message]) == 1
