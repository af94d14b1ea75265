"""The folder of `coma demo --space`: a wheel of what is running, its requirements, weights, no more."""

import csv
import hashlib
import io
import re
import zipfile
from base64 import urlsafe_b64decode
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from demo_files import models

from coma.artifact import load_artifact
from coma.cli import main
from coma.errors import BadInput
from demo.models import Model
from demo.space import PACKAGES, pinned_requirements, write_space, write_wheel

ROOT = Path(__file__).parents[3]


def test_the_wheel_holds_every_file_of_the_package_and_says_so(tmp_path):
    file = write_wheel(tmp_path)
    assert file.name == f"coma_dyvit-{metadata.version('coma-dyvit')}-py3-none-any.whl"
    with zipfile.ZipFile(file) as wheel:
        content = {name: wheel.read(name) for name in wheel.namelist()}
    stem = f"coma_dyvit-{metadata.version('coma-dyvit')}.dist-info"
    rows = list(csv.reader(io.StringIO(content[f"{stem}/RECORD"].decode())))
    assert {row[0] for row in rows} == set(content)
    for name, digest, size in rows[:-1]:
        told = urlsafe_b64decode(digest.removeprefix("sha256=") + "==")
        assert told == hashlib.sha256(content[name]).digest() and int(size) == len(content[name])
    modules = {path.relative_to(ROOT).as_posix() for each in PACKAGES for path in (ROOT / each).rglob("*.py")}
    assert modules == {name for name in content if name.endswith(".py")}
    assert b"coma = coma.cli:main" in content[f"{stem}/entry_points.txt"]
    assert content == {name: data for name, data in content.items() if "__pycache__" not in name}
    packages = re.search(r"wheel\]\npackages = \[(.*)\]", (ROOT / "pyproject.toml").read_text())
    assert packages and packages[1] == ", ".join(f'"{each}"' for each in PACKAGES)


def test_requirements_are_those_of_the_page_in_the_versions_that_run_here():
    pinned = dict(line.split("==") for line in pinned_requirements(["demo"]))
    for name in ("torch", "timm", "gradio", "gradio-client", "scikit-learn", "numpy", "starlette"):
        assert pinned[name] == metadata.version(name).partition("+")[0]
    assert not {"coma-dyvit", "onnx", "mmdet", "pillow-heif", "triton"} & set(pinned)
    assert not [name for name in pinned if name.startswith("nvidia")]
    assert "pillow-heif" in dict(line.split("==") for line in pinned_requirements(["demo", "heic"]))


def test_the_folder_holds_weights_and_no_list_of_training_images(tmp_path, capsys):
    given = models(tmp_path / "given")
    assert (given[0].parent / "data.json.gz").is_file()
    (given[0] / "README.md").write_text("# The card of this model")
    out = tmp_path / "space"
    assert main(["demo", "--space", "--out", str(out), *map(str, given)]) == 0
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    wheel = next(out.glob("*.whl")).name
    weights = {f"models/{model}/{name}" for model in ("small", "pets", "masked")
               for name in ("config.json", "model.safetensors")}  # fmt: skip
    weights.add("models/small/README.md")
    written = {"app.py", "requirements.txt", "Dockerfile", "README.md", ".dockerignore", wheel}
    assert names == weights | written and "docker build" in capsys.readouterr().out
    assert "MODELS = ['models/small', 'models/pets', 'models/masked']" in (out / "app.py").read_text()
    told = (out / "README.md").read_text()
    assert told.startswith("---\ntitle: CoMA-DyViT\n") and told.count("[model card]") == 1
    assert "([model card](models/small/README.md))" in told
    assert main(["demo", "--space", "--out", str(out), str(given[0])]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_models_of_like_names_have_folders_of_their_own(tmp_path):
    made = models(tmp_path / "given")
    names = ("run_a", "run-a", "модель", "模型")
    config = load_artifact(made[0]).config
    given: Any = Given({name: Model(name, "pretrained", config, made[0], []) for name in names})
    write_space(tmp_path / "space", given)
    folders = sorted(path.parent.name for path in (tmp_path / "space").glob("models/*/model.safetensors"))
    assert folders == ["run-a", "run-a-2", "модель", "模型"]


@pytest.mark.parametrize(
    ("kind", "artifact", "what"),
    [("segmentor", Path("roads/artifact"), "a segmentor"), ("pretrained", None, "an exported file")],
)
def test_what_requirements_alone_do_not_run_is_refused(tmp_path, kind, artifact, what):
    given: Any = Given(roads=Model("roads", kind, None, artifact, []))
    with pytest.raises(BadInput, match=f"roads is {what}; give artifacts of"):
        write_space(tmp_path / "space", given)
    assert not (tmp_path / "space").exists()


class Given(dict[str, Model]):
    """Models of the page by name."""

    @property
    def names(self) -> list[str]:
        return list(self)
