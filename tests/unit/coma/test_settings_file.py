"""Settings files in JSON, YAML and TOML: what they hold, what is refused and where, and hostile ones."""

import json
from pathlib import Path

import pytest

from coma.atomic_io import write_json
from coma.config import (
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneRunConfig,
    OptimizerConfig,
    encoder_preset,
    method_preset,
)
from coma.config.serialization import read_config, to_plain
from coma.config.settings_file import MAX_BYTES, MAX_JSON_BYTES
from coma.errors import BadInput
from pretrain.commands.pretrain import parse

YAML = """\
# a first try
model: tiny
objective: mae
data:
  images: PHOTOS
  image_size: 64
optimizer: &recipe
  epochs: 20
  base_lr: 1e-3  # YAML 1.1 would make a word of it
  betas: [0.9, 0.95]
run:
  out: runs/first
"""
TOML = """\
# a first try
model = "tiny"
objective = "mae"

[data]
images = "PHOTOS"
image_size = 64

[optimizer]
epochs = 20
base_lr = 1e-3
betas = [0.9, 0.95]

[run]
out = "runs/first"
"""


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("a.YML", YAML), ("a.toml", TOML)])
def test_the_command_line_and_a_file_say_the_same(tmp_path, name, text):
    flags = "PHOTOS --out runs/first --model tiny --method mae --image-size 64 --epochs 20 --base-lr 1e-3"
    path = written(tmp_path, name, text)
    assert parse(["--from", str(path)])[0] == parse([*flags.split()])[0] == read_config(path)
    other = parse(["--from", str(path), "--image-size", "224", "--epochs", "3"])[0]
    assert other.model == encoder_preset("tiny", 224)
    assert other.optimizer == OptimizerConfig(epochs=3, base_lr=1e-3)


def test_a_network_of_timm_gets_the_decoder_that_its_flag_gives_it(tmp_path):
    path = written(tmp_path, "a.yaml", "model: timm:test_vit\nobjective: mae\n")
    flags = ["PHOTOS", "--model", "timm:test_vit", "--method", "mae"]
    assert read_config(path).objective == parse(flags)[0].objective


def test_every_format_holds_all_settings_of_a_run(tmp_path):
    import yaml

    config = parse(["PHOTOS", "--method", "beyond", "--model", "vit-tiny", "--steps", "3"])[0]
    for name, text in [
        ("a.json", json.dumps(to_plain(config))),
        ("a.yaml", yaml.safe_dump(json.loads(json.dumps(to_plain(config))))),
        ("tabs.json", json.dumps(to_plain(config), indent="\t")),
    ]:
        assert read_config(written(tmp_path, name, text)) == config


def test_models_and_methods_are_described_in_full_too(tmp_path):
    path = written(tmp_path, "a.toml", '[model]\narchitecture = "vit"\ndepth = 3\n')
    config = read_config(path)
    assert config.model.depth == 3  # type: ignore[union-attr]
    assert config.objective == method_preset("coma")
    assert read_config(written(tmp_path, "b.yaml", "run: {seed: 3}")).model == encoder_preset("small")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "optimizer:\n  epoch: 3\n", "line 2: no setting optimizer.epoch; did you mean epochs?"),
        ("a.toml", "[optimizer]\nepoch = 3\n", "line 2: no setting optimizer.epoch; did you mean epochs?"),
        (
            "a.json",
            '{"optimizer":\n{"epoch": 3}}',
            "line 2: no setting optimizer.epoch; did you mean epochs?",
        ),
        ("a.toml", "optimizer.epoch = 3\n", "line 1: no setting optimizer.epoch; did you mean epochs?"),
        ("a.toml", "\n[optimiser]\n", "line 2: no setting optimiser; did you mean optimizer?"),
        ("a.yaml", "run:\n  quite_other: 1\n", "line 2: no setting run.quite_other; there are: out, seed,"),
        (
            "a.yaml",
            "data:\n  image_size: '64'\n",
            "line 2: data.image_size: '64' must be a whole number, or two",
        ),
        ("a.yaml", "data:\n  images: 5\n", "line 2: data.images: 5 is not a path"),
        ("a.yaml", "data:\n  mean: [a]\n  std: [1]\n", "line 2: data.mean.0: 'a' is not of type float"),
        ("a.toml", "[run]\nparallel = 'dp'\n", "line 2: run.parallel: 'dp' is none of 'ddp', 'fsdp'"),
        ("a.toml", "[optimizer]\nbase_lr = -1\n", "line 2: base-lr -1 must be more than 0"),
        ("a.yaml", "data:\n  mean: [0.5]\n", "line 1: data: give both --mean and --std"),
        (
            "a.yaml",
            "run:\n  track: tensorbord\n",
            "line 1: run: --track 'tensorbord': give some of tensorboard",
        ),
        ("a.yaml", "data: 5\n", "line 1: data: is not a group of settings"),
        ("a.yaml", "\nmodel: tinny\n", "line 2: no model preset 'tinny'; there are: tiny, small"),
        ("a.yaml", "objective: simclr\n", "line 1: no method 'simclr'; there are: coma"),
        ("a.yaml", "a: 1\n---\nb: 2\n", "line 2: expected a single document in the stream"),
        ("a.yaml", "data:\n  images: a\n  images: b\n", "line 3: the key images is there twice"),
        ("a.yaml", "data:\n\timages: a\n", "line 2: while scanning"),
        ("a.yaml", "yes: 2\n", "line 1: keys must be words, the names of settings"),
        ("a.yaml", "- 1\n", "is not a group of settings"),
        ("a.yaml", "", "is not a group of settings"),
        ("a.toml", "[data]\nimages = \n", "not a readable settings file: Invalid value (at line 2"),
        ("a.toml", "a = 1\na = 2\n", "Cannot overwrite a value (at line 2"),
        ("a.json", '{"data": {\n"flip": tru}}', "its text is not JSON (line 2: Expecting value)"),
    ],
)
def test_what_does_not_fit_is_named_with_its_line(tmp_path, name, text, message):
    path = written(tmp_path, name, text)
    with pytest.raises(BadInput) as raised:
        read_config(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def bomb() -> str:
    """A list of lists of lists ... with 9 ** 12 words in all."""
    first = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    rest = [f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)]
    return first + "".join(rest)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", bomb(), "its aliases make more than 16,384 values of it"),
        ("a.yaml", "data: &a\n  images: *a\n", "line 1: the value contains itself"),
        (
            "a.yaml",
            "run: !!python/object/apply:os.mkdir [HACKED]\n",
            "line 1: could not determine a constructor",
        ),
        ("a.yaml", "run: !!python/name:os.system\n", "line 1: could not determine a constructor"),
        ("a.yaml", "data: {images: !!binary aGVsbG8=}\n", "is not a path"),
        ("a.yaml", "[" * 20_000, "is nested too deeply"),
        ("a.toml", "a = " + "[" * 20_000, "is nested too deeply"),
        ("a.yaml", "\x00\x01", "not a readable settings file"),
        ("a.yaml", "a: 1\n" * MAX_BYTES, "is longer than 262,144 bytes"),
        ("a.yaml", "optimizer: {epochs: " + "9" * 5000 + "}", ""),
    ],
)
def test_hostile_files_are_one_line(tmp_path, monkeypatch, name, text, message):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, name, text)
    with pytest.raises(BadInput) as raised:
        read_config(path)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 1000 + len(str(path)) and "\n" not in str(raised.value)
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_a_run_with_many_classes_is_read_back(tmp_path):
    names = tuple(f"{i:05d} Plantae Tracheophyta Magnoliopsida Asterales Asteraceae" for i in range(20_000))
    data, run = FinetuneDataConfig(images=tmp_path), FinetuneRunConfig(out=tmp_path)
    config = FinetuneConfig(artifact=Path("tiny-64"), data=data, run=run, class_names=names)
    write_json(tmp_path / "config.json", to_plain(config))
    assert (tmp_path / "config.json").stat().st_size > 4 * MAX_BYTES
    assert read_config(tmp_path, FinetuneConfig) == config


def test_the_lines_of_json_are_found_for_a_message_only(tmp_path, monkeypatch):
    path = written(tmp_path, "a.json", '{"optimizer":\n{"epochs": 3}}')
    with monkeypatch.context() as patch:
        patch.setattr("coma.config.settings_file._load_yaml", pytest.fail)
        assert read_config(path).optimizer.epochs == 3
    path = written(tmp_path, "a.json", " " * MAX_BYTES + '{"optimizer": {"epoch": 3}}')
    with pytest.raises(BadInput, match=r"a\.json: no setting optimizer\.epoch; did you mean epochs"):
        read_config(path)
    with path.open("r+b") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(BadInput, match="is longer than 67,108,864 bytes"):
        read_config(path)


def test_aliases_are_fine_where_they_repeat_little(tmp_path):
    text = "data: {mean: &half [0.5, 0.5, 0.5], std: *half}\noptimizer:\n  <<: {epochs: 3}\n  warmup: 0.2\n"
    config = read_config(written(tmp_path, "a.yaml", text))
    assert config.data.mean == config.data.std == (0.5, 0.5, 0.5)
    assert (config.optimizer.epochs, config.optimizer.warmup) == (3, 0.2)


def test_what_is_no_text_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(BadInput, match="not UTF-8 text"):
        read_config(path)
    with pytest.raises(BadInput, match=r"no such file; give a run directory, its config.json, or settings"):
        read_config(tmp_path / "missing.toml")
