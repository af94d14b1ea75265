"""Code blocks of documents: commands are parsed and run, Python runs.

Every command of a shell block is parsed by the real parser here; slow tests run it, in a folder of small data
and with small settings put behind its own. `NOT_RUN` names the commands that are not run, and why. Blocks of
Python run as they stand. Blocks of YAML and TOML are files, which begin with their names as comments.
"""

import contextlib
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import tyro
from class_folders import class_folders
from documents import LANGUAGES, ROOT, Command, blocks, commands
from export_files import DYVIT, VIT, classifier, pretrained, segmentor
from feature_files import features, vectors
from PIL import Image
from pyarrow import parquet

from coma import cli
from coma.config import (
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneRunConfig,
    PretrainConfig,
    encoder_preset,
)
from coma.config.serialization import to_plain

BLOCKS = list(blocks())
COMMANDS = commands(BLOCKS)

GPU, CLIP, INSTALLS = "needs an NVIDIA GPU", "needs CLIP's weights", "changes the environment"
REMOTE = "needs that storage; test_remote_runs.py reads from a server of this machine"
WEIGHTS = "needs weights that others published"
NOT_RUN: dict[str, str] = {
    "make quickstart": "takes three minutes; test_quickstart.py runs what it runs",
    "make test": "runs this test",
    "make test-slow": "runs this test",
    "make lint types rooms": "continuous integration runs it",
    "make docs": "test_the_site_builds_without_a_network runs it",
    "bash .ci/run": "runs this test",
    "source .venv/bin/activate": "changes the shell",
    ".venv/bin/uv build --no-build-isolation --out-dir dist": "the test of the wheel builds it",
    ".venv/bin/python -m zipfile --list dist/coma_dyvit-X.Y.Z-py3-none-any.whl": "shows a release",
    "pip install .": INSTALLS,
    "pip install '.[export,onnxruntime,openvino]'": INSTALLS,
    "pip install '.[downstream,mmcv-lite]'": INSTALLS,
    "pip install '.[export,onnxruntime-gpu,demo,heic]'": INSTALLS,
    "pip install '.[tensorrt-rtx]'": INSTALLS,
    "pip install tensorrt-cu13": INSTALLS,
    "coma pretrain PHOTOS --out runs/cmt --method cmt --teacher-weights CLIP.safetensors": CLIP,
    "coma pretrain PHOTOS --out runs/dino --method mae --init timm:vit_small_patch14_reg4_dinov2.lvd142m "
    "--download": WEIGHTS,
    "coma pretrain PHOTOS --out runs/mine --method mae --init mae_vit_base.pth --model vit-base": WEIGHTS,
    "coma pretrain SHARDS --out runs/dali --loader dali": "needs DALI, an extra for NVIDIA GPUs",
    "coma pretrain 'https://HOST/shards-{000..127}.tar' --out runs/web": REMOTE,
    "coma pretrain s3://BUCKET/shards --out runs/s3": REMOTE,
    "coma pretrain hf://datasets/ORGANISATION/NAME --out runs/hub": REMOTE,
    "coma export runs/first/artifact --to onnx,tensorrt --precision fp16": GPU,
    "coma compare PHOTOS --methods mae coma 'zoom: beyond --degrade zoom-in+mask' --models tiny vit-tiny "
    "--seeds 0 1 2 --budget images 100000 --test CLASSES --protocols knn linear --probes 5 --out comparison "
    "-- --image-size 64": "test_sweep.py runs comparisons, with a process for every run",
    "coma export runs/classifier/artifact --to onnx,aoti": "takes minutes; test_torch_program.py compiles",
    "coma embed timm:vit_small_patch14_dinov2.lvd142m IMAGES --out dinov2.parquet --download": "downloads "
    "weights",
    "coma embed runs/first/artifact IMAGES --out features.parquet --ray auto": "needs a Ray cluster; "
    "test_embed.py starts one",
    "python -m downstream.openmmlab mmdet/tools/test.py runs/detector/config.py CHECKPOINT": "test_openmmlab_"
    "tools.py runs tools",
    "coma demo": "the other demo is run",
    "coma detect train runs/first/artifact --data COCO --config ANY.py --cfg-options "
    "optim_wrapper.optimizer.lr=0.0002 --out runs/own": "test_user_configs.py trains several configurations",
}
NOT_RUN |= {each.text: "needs several GPUs" for each in COMMANDS if each.words[0] == "torchrun"}
"""Commands that no test runs, with the reason; of coma's own the flags are checked all the same."""

TINY_DYVIT = "--model.dim 8 --model.depths 1 1 1 1 --model.heads 2 2 2 2"
TINY_VIT = "--model.dim 16 --model.depth 1 --model.heads 2"
TINY_TIMM = "--model.dim 24 --model.depth 1 --model.patch 8"
TINY_DECODER = "--objective.decoder.dim 16 --objective.decoder.depth 1 --objective.decoder.heads 2"
TINY_DOWNSTREAM = (
    "--steps 2 --batch-size 2 --workers 0 --head-channels 32 --validations 1 --short-side 64 --device cpu"
)


def fewer_units(words: list[str]) -> list[str]:
    """Small images have few mask units."""
    return ["--visible-units", "2"] if "--visible-units" in words else []


def small(words: list[str], number: int) -> list[str]:
    """The same command with settings behind it that make it quick; those given last hold."""
    steps = f"--steps {2 + number} --batch-size 4 --device cpu --workers 0"
    match words:
        case ["pretrain", "--resume", *_]:
            return [*words, "--steps", str(2 + number)]
        case ["pretrain", "--from", file, *_] if file.endswith(".json"):
            return words
        case ["pretrain", *_] if "--init" in words:
            return [*words, *steps.split()]
        case ["pretrain", *_]:
            model = TINY_VIT if any(word.startswith("vit-") for word in words) else TINY_DYVIT
            model = TINY_TIMM if any(word.startswith("timm:") for word in words) else model
            more = f"{steps} --micro-batch 4 --no-compile --image-size 32 {model} {TINY_DECODER}"
            return [*words, *more.split()]
        case ["evaluate", *_]:
            return [*words, "--device", "cpu", "--workers", "0", "--image-size", "32"]
        case ["classify", "train", "--resume", *_]:
            return [*words, "--steps", str(2 + number)]
        case ["classify", "train", *_] if "--frozen" in words:
            return [*words, *["--batch-size", "4", "--device", "cpu", "--workers", "0", "--image-size", "32"]]
        case ["classify", "train", *_]:
            return [*words, *f"{steps} --image-size 32".split()]
        case ["detect" | "segment", "train", "--resume", *_]:
            return words
        case ["detect" | "segment", "train", *_]:
            tiny = ["--preset", "tiny"] if "--preset" in words else []
            return [*words, *tiny, *TINY_DOWNSTREAM.split()]
        case ["classify" | "detect" | "segment", "test" | "predict", *_]:
            return [*words, "--device", "cpu"]
        case ["export", artifact, *_]:  # a dataset has images of any size
            size = "1x3x32x32:1x3x64x96:2x3x96x96" if "--dataset" in words else "1x3x48x48"
            fewer = f"--shapes {size} --benchmark-seconds 0 --verify-images 4 --calibrate-images 4"
            graph = ["--graph", "encoder"] if "first" in artifact else []  # half of the time
            return [*words, *fewer.split(), *graph, *fewer_units(words)]
        case ["benchmark", *_]:
            return [*words, "--batch", "1", "--size", "48x48", *fewer_units(words)]
        case ["embed", *_]:
            return [*words, "--device", "cpu", "--workers", "0"]
        case ["degrade", *_]:
            return [*words, "--size", "72", "--unit", "8", "--draws", "1"]
        case ["pack", *_]:
            return [*words, "--workers", "0"]
        case ["demo", *_]:
            return [*words, "--port", "0", "--device", "cpu"]
    return words


TRAINS = ("pretrain", "classify", "detect", "segment")
NEEDED: dict[str, list[str]] = {
    "docs/guides/resume.md": ["coma pretrain PHOTOS --out runs/first"],
    "docs/guides/pretrain.md": ["coma pretrain PHOTOS --out runs/mae --method mae"],
    "docs/guides/export.md": ["coma detect train runs/mae/artifact --data COCO --out runs/detector"],
    "docs/guides/demo.md": [
        "coma detect train runs/mae/artifact --data COCO --out runs/detector",
        "coma embed runs/first/artifact IMAGES --out features.parquet",
    ],
}
"""Commands of other pages that come before those of a page."""


def finetuning(root: Path) -> FinetuneConfig:
    data = FinetuneDataConfig(images=root / "CLASSES")
    return FinetuneConfig(root / "runs/first/artifact", data, FinetuneRunConfig(out=root / "runs/classifier"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the documents name: images, datasets, a run, artifacts of very small models."""
    root = tmp_path_factory.mktemp("docs")
    rng = np.random.default_rng(0)
    for name in ("PHOTOS", "IMAGES"):
        (root / name).mkdir()
        for number in range(12):
            pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((96, 72)).save(root / name / f"{number}.jpg")
    photographs = [path.read_bytes() for path in sorted((root / "PHOTOS").iterdir())]
    (root / "PARQUET").mkdir()
    parquet.write_table(pyarrow.table({"image": photographs}), root / "PARQUET" / "train.parquet")
    class_folders(root / "CLASSES", classes=3)
    for folder in (root / "CLASSES").glob("*/class?"):  # by the names of the classifier's classes
        folder.rename(folder.with_name(("cat", "cup", "face")[int(folder.name[-1])]))
    for run, model in (("first", DYVIT), ("mae", VIT)):
        pretrained(root / f"runs/{run}/artifact", model)
    pretrained(root / "runs/tiny/artifact", encoder_preset("tiny", 48))
    classifier(root / "runs/classifier/artifact", replace(DYVIT, dim=32))  # narrower ones lose much in int8
    features(root / "dinov2.parquet", vectors(12))
    config = PretrainConfig()
    config = replace(config, data=replace(config.data, images=root / "PHOTOS"))
    (root / "runs/first/config.json").write_text(json.dumps(to_plain(config)))
    for block in BLOCKS:
        if block.language in ("yaml", "toml"):  # the first line names the file
            (root / block.code.splitlines()[0].removeprefix("# ")).write_text(block.code)
    (root / "runs/classifier/config.json").write_text(json.dumps(to_plain(finetuning(root))))
    return root


@pytest.fixture
def inside(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


class Parsed(Exception):
    """The parser has taken all arguments."""


@pytest.fixture
def parse(inside, monkeypatch) -> Callable[[list[str]], None]:
    """Parses the arguments of a command as the command does, and stops there."""
    real = tyro.cli

    def stopping(*args: Any, **options: Any) -> Any:
        settings = real(*args, **options)
        if options.get("return_unknown_args"):  # a first look at some of the flags
            return settings
        raise Parsed

    def run(words: list[str]) -> None:
        if words[0] == "compare" and "--" in words:
            run(["pretrain", "PHOTOS", "--out", "out", *words[words.index("--") + 1 :]])
        try:
            cli.find_commands()[words[0]].load()(words[1:])
        except Parsed:
            return
        except SystemExit as end:
            assert not end.code, words
            return
        raise AssertionError(f"{words}: the command did not stop at its parser")

    monkeypatch.setattr(tyro, "cli", stopping)
    return run


@pytest.mark.parametrize(
    "command", [each for each in COMMANDS if each.coma is not None], ids=lambda each: each.text
)
def test_flags_of_commands_exist(parse, command):
    parse(command.coma)
    if command.text not in NOT_RUN and command.words[0] == "coma":
        parse(small(command.coma, 0))


def test_an_unknown_flag_is_noticed(parse, capsys):
    with pytest.raises(AssertionError):
        parse(["pretrain", "PHOTOS", "--no-such-flag", "1"])
    with pytest.raises(KeyError):
        parse(["no-such-command"])


@pytest.mark.parametrize(
    "command", [each for each in COMMANDS if each.coma is None], ids=lambda each: each.text
)
def test_other_commands_name_what_exists(command):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    match command.words:
        case ["make", *names]:
            assert set(names) <= set(targets)
        case ["pip", "install", name]:
            found = re.fullmatch(r"\.(?:\[(.*)\])?", name)
            extras = project["optional-dependencies"]
            known = str(extras)
            assert set(filter(None, (found[1] or "").split(","))) <= set(extras) if found else name in known
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module), module
        case [program, *_]:
            assert program in ("bash", "source") or program.startswith(".venv/bin/"), command.text


def test_the_list_of_commands_that_are_not_run_is_exact():
    texts = {command.text for command in COMMANDS}
    assert set(NOT_RUN) <= texts, "not in any document"
    others = {each.text for each in COMMANDS if each.coma is None} - set(NOT_RUN)
    assert not others, "nothing runs these"


def test_blocks_say_their_language_and_hide_no_commands():
    for block in BLOCKS:
        assert block.language in LANGUAGES, f"{block.page}: a block of {block.language or 'no language'}"
        if block.language != "sh":
            assert not re.search(r"^\$? ?(coma|make|pip|python|torchrun) ", block.code, re.MULTILINE), block


def _pages(language: str, *, slow: bool | None = None) -> list[str]:
    found = [each for each in BLOCKS if each.language == language]
    if slow is not None:
        found = [each for each in found if ("downstream" in each.code) is slow]
    return list(dict.fromkeys(each.page for each in found))


def run_python(page: str) -> dict[str, Any]:
    """Runs the blocks of a page one after another, as one program."""
    names: dict[str, Any] = {"__name__": page}
    for block in BLOCKS:
        if block.page == page and block.language == "python":
            exec(compile(block.code, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", _pages("python", slow=False))
def test_python_runs(inside, page):
    run_python(page)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in json.loads((ROOT / "docs/first_steps.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["losses"].losses and names["scores"]["top1"] > 0.5 and names["path"].is_file()


@pytest.mark.slow
def test_the_configuration_of_a_detector_builds_its_backbone(inside):
    names = run_python("docs/guides/detect.md")
    for module in names["custom_imports"]["imports"]:
        importlib.import_module(module)
    from mmengine.registry import MODELS

    backbone = {key: value for key, value in names["model"]["backbone"].items() if key != "_delete_"}
    assert MODELS.build(backbone) is not None


def run_command(words: list[str]) -> None:
    """Runs a command in this process; the page of the demo in another, which Ctrl-C ends."""
    if words[0] == "demo" and "--space" not in words:
        with subprocess.Popen(
            [sys.executable, "-m", "coma", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as served:
            assert served.stdout
            said = []
            for line in served.stdout:
                said.append(line)
                if "http://127.0.0.1" in line:
                    served.send_signal(signal.SIGINT)
            assert any("http://127.0.0.1" in line for line in said), "".join(said)
        return
    out = StringIO()
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        code = cli.main(words)
    assert code == 0, f"coma {' '.join(words)}\n{out.getvalue()}"


def to_run(page: str) -> Iterator[Command]:
    yield from (Command(page, tuple(text.split())) for text in NEEDED.get(page, []))
    for command in COMMANDS:
        if command.page == page and command.words[0] == "coma" and command.text not in NOT_RUN:
            yield command


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", [page for page in _pages("sh") if any(to_run(page))])
def test_commands_run(tmp_path_factory, folder, page, monkeypatch):
    from downstream_data import coco, labelled

    place = tmp_path_factory.mktemp("page") / "here"
    shutil.copytree(folder, place)
    coco(place / "COCO", masks=False)
    labelled(place / "SCENES")
    if "segmentor/" in Path(ROOT / page).read_text():
        segmentor(place / "runs/segmentor/artifact")
    monkeypatch.chdir(place)
    for number, command in enumerate(to_run(page)):
        words = small(list(command.coma or ()), number)
        if words[0] in TRAINS and "--out" in words:  # a page may write where another one wrote
            shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
        run_command(words)
