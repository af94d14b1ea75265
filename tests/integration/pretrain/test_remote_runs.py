"""Runs on remote images: resumed ones equal uninterrupted ones, servers fail, secrets are kept nowhere."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from remote_files import FileServer, impatient, server  # noqa: F401 (fixtures)
from short_runs import assert_same, at, interrupted, rows

from coma import cli
from coma.config import PretrainConfig
from coma.data import evaluation_batches, open_source
from coma.errors import BadInput
from coma.paths import Address
from pretrain.training import pretrain

pytestmark = pytest.mark.usefixtures("no_pictures")

SECRET = "sig=hush-hush"


def pictures(count: int) -> list[bytes]:
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


@pytest.fixture
def images(server: FileServer, request: pytest.FixtureRequest) -> Address:  # noqa: F811
    """Ten pictures in two files."""
    kind, halves = request.param, (pictures(10)[:5], pictures(10)[5:])
    for k, half in enumerate(halves):
        path = server.folder / f"photos-{k}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"image": half}), path, row_group_size=2)
            continue
        with tarfile.open(path, "w") as tar:
            for i, content in enumerate(half):
                info = tarfile.TarInfo(f"{k}{i}.png")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return Address(f"{server.url}/photos-{{0,1}}.{kind}?{SECRET}")


def on(config: PretrainConfig, images: Address | Path) -> PretrainConfig:
    return replace(config, data=replace(config.data, images=images, mean=None, std=None))


both = pytest.mark.parametrize("images", ["tar", "parquet"], indirect=True)


@both
def test_a_resumed_run_is_an_uninterrupted_one(resumable, images, server, tmp_path, caplog):  # noqa: F811
    whole = on(at(resumable, tmp_path / "whole"), images)
    pretrain(whole)
    server.fails_every = 10
    stopped = on(at(resumable, tmp_path / "stopped"), images)
    interrupted(stopped, 4)
    pretrain(stopped, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    assert "repeated; the last: " in caplog.text
    for path in (tmp_path / "stopped").rglob("*"):
        assert path.is_dir() or b"hush" not in path.read_bytes()
    assert "hush" not in caplog.text
    local = on(at(resumable, tmp_path / "local"), Path(f"{server.folder}/{images.name}"))
    pretrain(local)
    assert [row["loss"] for row in rows(tmp_path / "local")] == [
        row["loss"] for row in rows(tmp_path / "whole")
    ]


@both
def test_a_file_that_changed_is_refused_by_name(resumable, images, server, tmp_path):  # noqa: F811
    config = on(at(resumable, tmp_path / "run"), images)
    interrupted(config, 4)
    (path,) = server.folder.glob("photos-1.*")
    changed = bytearray(path.read_bytes())
    changed[-1 if path.suffix == ".tar" else 1500] ^= 1  # names and sizes stay
    path.write_bytes(changed)
    with pytest.raises(BadInput, match=rf"images have changed: 1 file changed \({path.name} \("):
        pretrain(config, resume=True)
    pretrain(config, resume=True, allow_changed_data=True)


@pytest.mark.parametrize("images", ["tar"], indirect=True)
def test_the_secret_is_given_again(resumable, images, tmp_path, capsys):
    run = tmp_path / "run"
    interrupted(on(at(resumable, run), images), 4)
    assert cli.main(["pretrain", "--resume", str(run)]) == 2
    told = capsys.readouterr().err
    assert "photos-{0,1}.tar?***: was saved without its password or query string" in told
    assert cli.main(["pretrain", images.url, "--resume", str(run)]) == 0
    assert "hush" not in capsys.readouterr().err


@pytest.mark.parametrize("images", ["tar"], indirect=True)
def test_every_command_that_reads_images_takes_addresses(images, tmp_path, capsys):
    assert cli.main(["pack", images.url, "--out", str(tmp_path / "pack"), "--workers", "0"]) == 0
    assert len(open_source(tmp_path / "pack")) == 10
    assert b"hush" not in (tmp_path / "pack" / "index.json").read_bytes()
    assert cli.main(["info", images.url]) == 0
    assert "10 images" in capsys.readouterr().out
    assert cli.main(["pretrain", images.url, "--out", "s3://bucket/run"]) == 2
    assert "s3://bucket/run: only images are read from remote storage" in capsys.readouterr().err


@pytest.mark.parametrize("images", ["tar"], indirect=True)
def test_workers_open_their_own_connections(images, server, caplog):  # noqa: F811
    source = open_source(images)
    server.fails_every = 5
    batches = list(evaluation_batches(source, image_size=4, channels=3, batch_size=2, workers=2))
    assert sum(len(batch.indices) for batch in batches) == 10
    assert "repeated; the last: " in caplog.text
