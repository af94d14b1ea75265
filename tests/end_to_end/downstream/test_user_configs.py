"""Configurations, checkpoints and artifacts of others are trained, loaded, or refused in one line."""

import copy
import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from downstream_data import artifact, coco

from coma.artifact import load_artifact
from coma.errors import BadArtifact, BadImage, BadInput
from downstream.commands.detect import run
from downstream.configs.load import PRESETS, differences, load_config, require_imports

pytestmark = [pytest.mark.openmmlab, pytest.mark.filterwarnings("ignore")]  # mm's packages warn of each other

RETINANET = "_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'\n"
SMALL = ["--head-channels", "32", "--short-side", "64", "--batch-size", "2", "--workers", "0"]


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return coco(tmp_path_factory.mktemp("coco") / "data", train=2, val=1)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return artifact(tmp_path_factory.mktemp("backbone") / "artifact")


@pytest.fixture(scope="module")
def trained(data, backbone, tmp_path_factory) -> Path:
    """A run of one step, with our RetinaNet."""
    out = tmp_path_factory.mktemp("runs") / "run"
    options = ["--data", str(data), "--out", str(out), "--steps", "1", "--model", "retinanet", *SMALL]
    run(["train", str(backbone), *options])
    return out


@pytest.fixture
def small(tmp_path) -> Path:
    """mmdet's RetinaNet for two small steps, with weights of its own that go for nothing."""
    path = tmp_path / "theirs.py"
    path.write_text(
        RETINANET
        + "train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=2, val_interval=2)\n"
        "loader = dict(num_workers=0, persistent_workers=False)\n"
        "train_dataloader = val_dataloader = loader\n"
        "default_hooks = dict(checkpoint=dict(by_epoch=False))\n"
        "load_from = 'their_detector.pth'\n"
        "resume = True\n"
        "work_dir = 'their_folder'\n"
    )
    return path


SIZES = [
    "train_dataloader.dataset.pipeline.2.scale=(96,64)",
    "val_dataloader.dataset.pipeline.1.scale=(96,64)",
]


def coma(*arguments: object) -> str:
    """What the command said on stderr, in a process of its own."""
    command = [sys.executable, "-m", "coma", "detect", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
def test_a_configuration_of_mmdet_in_processes_of_its_own(small, data, backbone, tmp_path):
    """Train, go on and predict where nothing imported our modules before; all that is changed is said."""
    out = tmp_path / "run"
    said = coma("train", backbone, "--config", small, "--data", data, "--out", out, "--head-channels", "32",
                "--cfg-options", *SIZES)  # fmt: skip
    lines = said.splitlines()
    (weights,) = [line for line in lines if line.startswith("not loaded:")]
    assert "load_from=their_detector.pth, model.backbone.init_cfg=torchvision://resnet18;" in weights
    assert f"starts from {backbone}; --cfg-options load_from=FILE" in weights
    fitted, read, placed = [line for line in lines if "theirs.py: changed" in line]
    for name in (
        "model.backbone (ResNet -> DyViT)",
        "model.neck.in_channels",
        "model.data_preprocessor.mean",
    ):
        assert name in fitted
    for name in ("train_dataloader.dataset", "val_evaluator", "model.bbox_head.num_classes (80 -> 2)"):
        assert name in read
    assert f"work_dir (their_folder -> {out})" in placed and "resume (True -> False)" in placed
    config = (out / "config.py").read_text()
    (out / "config.py").write_text(config.replace("max_iters=2", "max_iters=3"))
    run(["train", "--resume", str(out)])
    assert load_artifact(out / "artifact").config.trained["steps"] == 3
    coma("predict", out / "artifact", data / "val", "--out", tmp_path / "p")
    assert (tmp_path / "p" / "pictures" / "1.png").is_file()


def test_our_modules_are_imported_before_those_of_a_configuration():
    config = load_config(PRESETS / "mmdet" / "retinanet_dyvit_fpn_1x_coco.py")
    config.custom_imports = {"imports": "their.module", "allow_failed_imports": True}
    require_imports(config, "ours", "ours.too")
    require_imports(config, "ours")
    assert config.custom_imports["imports"] == ["ours", "ours.too", "their.module"]
    assert config.custom_imports["allow_failed_imports"] is True
    config.pop("custom_imports")
    require_imports(config, "ours")
    assert config.custom_imports == {"imports": ["ours"], "allow_failed_imports": False}


def test_differences_name_what_a_user_set():
    before = {
        "model": {"type": "A", "width": 1, "neck": {"type": "N"}, "sizes": (1, 2)},
        "train_dataloader": {"dataset": {"type": "D", "root": "x"}},
        "steps": [{"type": "S", "n": 1}, {"type": "T"}],
        "work_dir": None,
    }
    after = copy.deepcopy(before) | {"added": 1, "work_dir": None}
    assert differences(before, after) == []
    after["model"] |= {"width": 2, "neck": {"type": "M"}, "sizes": [1, 2], "more": None}
    after["train_dataloader"]["dataset"]["root"] = "y"
    after["steps"][0]["n"] = 3
    assert differences(before, after) == [
        "model.width (1 -> 2)",
        "model.neck (N -> M)",
        "train_dataloader.dataset",
        "steps.0.n (1 -> 3)",
    ]


def continued(trained: Path, checkpoint: Path, data: Path, out: Path) -> dict[str, torch.Tensor]:
    """Weights after a step of rate 0 of the run's configuration, without an artifact, from a checkpoint."""
    theirs = out.parent / "again.py"
    theirs.write_text(
        f"_base_ = {str(trained / 'config.py')!r}\nload_from = {str(checkpoint)!r}\n"
        "optim_wrapper = dict(optimizer=dict(lr=0.0))\nparam_scheduler = []\n"
    )
    run(["train", "--config", str(theirs), "--data", str(data), "--out", str(out)])
    return torch.load(out / "iter_1.pth")["state_dict"]


def test_without_an_encoder_load_from_is_loaded(trained, data, tmp_path, caplog):
    saved = torch.load(trained / "iter_1.pth")
    for tensor in saved["state_dict"].values():
        tensor.add_(1)
    taken = sorted(saved["state_dict"])[:2]
    rest = {name: tensor for name, tensor in saved["state_dict"].items() if name not in taken}
    torch.save({**saved, "state_dict": rest | {"other.weight": torch.ones(1)}}, tmp_path / "some.pth")
    weights = continued(trained, tmp_path / "some.pth", data, tmp_path / "run")
    assert all(torch.equal(weights[name], tensor) for name, tensor in rest.items())
    (said,) = [
        r.getMessage() for r in caplog.records if "some.pth" in r.getMessage() and r.levelname == "WARNING"
    ]
    assert (
        f"loaded {len(rest)} of the model's {len(rest) + 2} tensors (backbone" in said
        and "; 1 tensors of the file are unused" in said
    )
    assert said.endswith(f"not loaded: {', '.join(n for n in weights if n in taken)}")


def test_a_checkpoint_of_another_model_is_refused(trained, data, tmp_path):
    torch.save({"state_dict": {"other.weight": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(BadInput, match=r"other\.pth: none of its 1 tensors fits"):
        continued(trained, tmp_path / "other.pth", data, tmp_path / "run")
    with pytest.raises(BadInput, match=r"again\.py: .*absent\.pth can not be found"):
        continued(trained, tmp_path / "absent.pth", data, tmp_path / "next")


def test_nothing_in_a_checkpoint_is_executed(trained, data, tmp_path, monkeypatch, capsys):
    """Neither a pickled object nor the configuration that mmengine would run as a program."""
    mark = tmp_path / "mark"
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"state_dict": Evil(mark)}, tmp_path / "evil.pth")
    with pytest.raises(BadInput, match=r"evil\.pth: holds other objects than tensors"):
        continued(trained, tmp_path / "evil.pth", data, tmp_path / "run")
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is ignored" in capsys.readouterr().err
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    last = torch.load(again / "iter_1.pth")
    last["meta"]["config"] = f"import pathlib; pathlib.Path({str(mark)!r}).touch()"
    torch.save(last, again / "iter_1.pth")
    run(["train", "--resume", str(again)])
    assert not mark.exists()


def test_what_is_fetched_is_not_unpickled_either(tmp_path, monkeypatch):
    """As `init_cfg=dict(type='Pretrained', checkpoint='https://...')` fetches it."""
    from mmengine.runner.checkpoint import CheckpointLoader

    import downstream.openmmlab  # noqa: F401

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.save({"state_dict": Evil(tmp_path / "mark")}, tmp_path / "evil.pth")
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "good.pth")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            good = CheckpointLoader.load_checkpoint(f"{address}/good.pth", "cpu")
            with pytest.raises(pickle.UnpicklingError):
                CheckpointLoader.load_checkpoint(f"{address}/evil.pth", "cpu")
        finally:
            server.shutdown()
            thread.join()
    assert torch.equal(good["state_dict"]["a"], torch.ones(2)) and not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_base_ = 'mmdet::nope/nope.py'", r"cannot be read \(FileNotFoundError: .*nope\.py"),
        ("_base_ = './missing.py'", r"cannot be read \(FileNotFoundError: .*missing\.py"),
        ("_base_ = 'mmdet3d::x/y.py'", "mmdet3d is not installed"),
        ("model = dict(", "cannot be read \\(SyntaxError: .*was never closed"),
        (RETINANET + "import no_such_module", "No module named 'no_such_module'"),
        (RETINANET + "custom_imports = dict(imports=['no_such_module'])", "no_such_module"),
        ("raise SystemExit(3)", r"cannot be read \(SystemExit: 3\)"),
        ("a = 1", "has no default_scope; a detector needs a configuration of mmdet"),
        ("_base_ = 'mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py'", "default_scope is mmseg; a detector"),
        ("default_scope = 'mmdet'\nmodel = 3", "has no model with a backbone"),
        (RETINANET + "model = dict(bbox_head=dict(type='RetinaHeadd'))", "RetinaHeadd is not in the"),
        (RETINANET + "model = dict(bbox_head=dict(num_clases=3))",
         r"TypeError at mmdet/models/dense_heads/retina_head\.py:\d+: .*'num_clases'"),
        (RETINANET + "model = dict(bbox_head=dict(anchor_generator=dict(strides=[8, 16])))",
         r"bbox_head \(RetinaHead\): its prior_generator\.strides are 8, 16, but the maps .* 8, 16, 32"),
    ],
)  # fmt: skip
def test_a_fault_of_a_configuration_is_one_line(text, message, data, backbone, tmp_path):
    theirs = tmp_path / "theirs.py"
    theirs.write_text(text)
    with pytest.raises(BadInput, match=message) as raised:
        run(
            [
                "train",
                str(backbone),
                "--config",
                str(theirs),
                "--data",
                str(data),
                "--out",
                str(tmp_path / "x"),
            ]
        )
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_an_image_that_a_reading_process_cannot_read_is_one_line(data, backbone, tmp_path, monkeypatch):
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    for path in (broken / "train").glob("*.png"):  # sizes can be read, pixels cannot
        path.write_bytes(path.read_bytes()[:400])
    options = ["--data", str(broken), "--out", str(tmp_path / "run"), "--steps", "1", "--model", "retinanet"]
    with pytest.raises(BadImage, match=r"^\S+\.png: .+$") as raised:
        run(["train", str(backbone), *options, *SMALL[:-1], "1"])
    assert "Traceback" not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"backbone": {"type": "pathlib.Path.touch", "self": "M"}}},
        {"model": {"bbox_head": {"type": "mmdet.apis.inference.Path", "self": "M"}}},
        {"model": {"test_cfg": {"nms": {"type": "exec", "iou_threshold": 0.5}}}},
        {"pipeline": [{"type": "os.mkdir", "path": "M"}]},
        {"pipeline": [{"type": "LoadBiomedicalData", "decode_backend": "pickle"}]},
    ],
)
def test_an_artifact_names_registered_classes_alone(changes, trained, data, tmp_path):
    """mmengine takes any function of any module by its name, and mmcv executes that of its suppression."""
    spoilt, mark = tmp_path / "artifact", tmp_path / "mark"
    shutil.copytree(trained / "artifact", spoilt)
    content = json.loads((spoilt / "config.json").read_text())

    def merge(into: dict[str, Any], changed: dict[str, Any]) -> None:
        for name, value in changed.items():
            if isinstance(value, dict):
                merge(into[name], value)
            else:
                into[name] = value

    content.pop("checksums")
    merge(content["head"], json.loads(json.dumps(changes).replace('"M"', json.dumps(str(mark)))))
    (spoilt / "config.json").write_text(json.dumps(content))
    for arguments in (["predict", str(spoilt), str(data / "val"), "--out", str(tmp_path / "p")],
                      ["test", str(spoilt), "--data", str(data)]):  # fmt: skip
        with pytest.raises(BadArtifact, match=r"the artifact's config\.json names '"):
            run(arguments)
    assert not mark.exists()


def test_settings_that_build_no_model_are_one_line(trained, data, tmp_path):
    spoilt = tmp_path / "artifact"
    shutil.copytree(trained / "artifact", spoilt)
    content = json.loads((spoilt / "config.json").read_text())
    content.pop("checksums")
    content["head"]["model"]["neck"]["bogus"] = 1
    (spoilt / "config.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"config\.json: describes a model that cannot be built .*'bogus'"):
        run(["predict", str(spoilt), str(data / "val"), "--out", str(tmp_path / "p")])


def test_a_configuration_whose_data_are_missing_is_told_of_data(backbone, tmp_path):
    theirs = tmp_path / "theirs.py"
    theirs.write_text(RETINANET)
    with pytest.raises(BadInput, match=r"No such file.*instances_train2017.*name your own with --data"):
        run(["train", str(backbone), "--config", str(theirs), "--out", str(tmp_path / "run")])
