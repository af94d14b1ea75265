"""Parquet files with a column of images: layouts, orders that read few row groups, damaged and odd files."""

import io
import json
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from remote_files import FileServer, impatient, server  # noqa: F401 (fixtures)

from coma.config import DataConfig
from coma.data import BatchLayout, compute_mean_std, open_source, training_batches
from coma.data.shuffle import Blocks
from coma.data.sources import parquet
from coma.data.sources.subset import Subset
from coma.errors import BadImage, BadInput
from coma.image_size import ImageSize
from coma.paths import Address
from pretrain.commands.pack import run as pack


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((5, 4, 3), (value, 7, 9), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def structs(values: list[int]) -> pa.Array:
    return pa.array([{"bytes": png(value), "path": f"{value}.png"} for value in values])


def write(
    path: Path, columns: dict[str, Any], names: list[str] | None = None, rows: int = 3, **options
) -> Path:
    """Writes a file as the library datasets does, with row groups of a few rows."""
    table = pa.table(columns)
    features: dict[str, Any] = {name: {"_type": "Image"} for name in columns if name.startswith("im")}
    if names:
        features["label"] = {"names": names, "_type": "ClassLabel"}
    told = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(told), path, row_group_size=rows, **options)
    return path


def hub(root: Path) -> Path:
    """A data set as on the Hugging Face hub: two training files and a test file in data/."""
    for k, first in enumerate((0, 7)):
        values = list(range(first, first + 7))
        columns = {"image": structs(values), "label": pa.array([v % 2 for v in values])}
        write(root / "data" / f"train-{k:05}-of-00002.parquet", columns, ["cat", "dog"])
    write(
        root / "data" / "test-00000-of-00001.parquet", {"image": structs([50]), "label": [1]}, ["cat", "dog"]
    )
    (root / "README.md").write_text("of the data set")
    return root


def red(source) -> list[int]:
    return [int(source.read(i)[0, 0, 0]) for i in range(len(source))]


# layouts ----------------------------------------------------------------------------------------


def test_a_data_set_of_the_hub(tmp_path, server):  # noqa: F811
    hub(server.folder)
    folder = open_source(server.folder)
    there = open_source(f"{server.url}/data/train-{{00000,00001}}-of-00002.parquet")
    for source in (folder, there, pickle.loads(pickle.dumps(there))):
        assert red(source) == list(range(14))
        assert source.class_names == ("cat", "dog")
        assert source.labels is not None
        assert source.labels.tolist() == [i % 2 for i in range(14)]
        assert source.label(3) == 1
    assert folder.split == "train"
    assert "test-00000-of-00001.parquet" in folder.notes[0]
    assert red(open_source(server.folder, "test")) == [50]
    assert folder.describe(8) == f"{server.folder}/data/train-00001-of-00002.parquet[1]"
    assert there.listing() == folder.listing()
    assert folder.listing()[0][6:8] == ["train-00000-of-00002.parquet/6", "train-00001-of-00002.parquet/0"]
    assert there.index is not None
    assert there.index["files"][0][0] == "train-00000-of-00002.parquet"


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_bytes_without_labels(tmp_path, kind):
    path = write(tmp_path / "a.parquet", {"photo": pa.array([png(3), png(4)], kind), "id": [1, 2]})
    source = open_source(path)
    assert red(source) == [3, 4]
    assert source.labels is None


def test_the_column_of_images(tmp_path):
    two = {"left": structs([1]), "right": structs([2])}
    path = write(tmp_path / "two.parquet", two)
    with pytest.raises(BadInput, match=r"several columns of images, left, right; .* as in DATA#left"):
        open_source(path)
    assert red(open_source(Path(f"{path}#right"))) == [2]
    assert red(open_source(f"{path}#left")) == [1]
    with pytest.raises(BadInput, match=r"'id' is no column of images; its columns: left: struct.*, right: "):
        open_source(f"{path}#id")
    assert red(open_source(write(tmp_path / "b.parquet", {**two, "image": structs([3])}))) == [3]
    with pytest.raises(BadInput, match=r"no column of images .*its columns: name: string, size: int64"):
        open_source(write(tmp_path / "c.parquet", {"name": ["a"], "size": [1]}))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(png(8))
    write(tmp_path / "photos" / "features.parquet", {"path": ["a.png"], "feature": [[1.0]]})
    assert red(open_source(tmp_path / "photos")) == [8]  # other tables are no images


# order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[5], [100] * 31 + [7], [3000, 1, 2000, 40], list(range(1, 60))])
def test_every_epoch_has_every_image_once(sizes):
    blocks, n = Blocks(np.array(sizes)), sum(sizes)
    rank, epochs = np.arange(n), []
    for epoch in range(3):
        found = blocks.indices(5, np.full(n, epoch), rank)
        assert sorted(found.tolist()) == list(range(n))
        again = np.concatenate(
            [blocks.indices(5, np.array([epoch]), rank[i : i + 1]) for i in range(0, n, 997)]
        )
        assert again.tolist() == found[::997].tolist()
        epochs.append(found.tolist())
    assert n < 6 or (epochs[0] != epochs[1] and epochs[0] != blocks.indices(6, rank * 0, rank).tolist())
    both = np.array([0, 1]), np.array([n - 1, 0])
    assert pickle.loads(pickle.dumps(blocks)).indices(5, *both).tolist() == [epochs[0][-1], epochs[1][0]]


def test_batches_are_of_few_blocks():
    blocks = Blocks(np.full(500, 100))
    found = blocks.indices(1, np.zeros(50_000, np.int64), np.arange(50_000))
    windows = found.reshape(-1, 1000)  # ten blocks are at least 1,024 images only with an eleventh
    assert max(len(np.unique(window // 100)) for window in windows) <= 22
    first = found[:1100] // 100
    assert len(np.unique(first)) == 11
    assert len(np.unique(first[:100])) > 8  # and mixed inside


def test_a_sample_is_of_few_blocks_too():
    blocks = Blocks(np.full(500, 100))
    assert len({i // 100 for i in blocks.sample(400)}) == 8
    assert len(set(blocks.sample(400))) == 400
    assert sorted(Blocks(np.array([2, 3])).sample(99)) == list(range(5))
    assert len(set(Blocks(np.full(300, 2)).sample(100))) == 100


def test_two_processes_see_disjoint_images_and_each_row_group_is_read_once(tmp_path, monkeypatch):
    for k in range(4):
        write(tmp_path / f"{k}.parquet", {"image": structs([8 * k + i for i in range(8)])}, rows=4)
    source = open_source(tmp_path)
    read = []
    take = parquet._Reader._read
    monkeypatch.setattr(parquet._Reader, "_read", lambda self, key: read.append(key) or take(self, key))
    data, seen = DataConfig(tmp_path, image_size=ImageSize.of(4), workers=0), []
    for rank in range(2):
        batches = training_batches(source, data, channels=3, seed=3, batch=BatchLayout(8, 4, rank, 2))
        seen.append([i for batch in islice(batches, 4) for i in batch.indices.tolist()])
    assert sorted(seen[0] + seen[1]) == list(range(32))
    assert len(read) == len(set(read)) == 8
    alone = training_batches(source, data, channels=3, seed=3, batch=BatchLayout(8, 8))
    assert next(alone).indices.tolist() == seen[0][:4] + seen[1][:4]
    late = training_batches(source, data, channels=3, seed=3, batch=BatchLayout(8, 8), start=24)
    assert next(late).indices.tolist() == seen[0][12:] + seen[1][12:]


def test_row_groups_are_read_at_the_same_time(tmp_path, server):  # noqa: F811
    """A reader of pyarrow that threads share crashes the process, or mixes up their bytes."""
    write(server.folder / "a.parquet", {"image": structs(list(range(60)))}, rows=2)
    read_by_one = [png(value) for value in range(60)]
    for _ in range(10):
        source = open_source(Address(f"{server.url}/a.parquet"))
        source.prefetch(range(60))
        assert [source.read_bytes(i) for i in range(60)] == read_by_one


def test_few_row_groups_are_kept(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (40, 1000), np.uint8)
    write(tmp_path / "a.parquet", {"image": [row.tobytes() for row in noise]}, rows=4)
    source = open_source(tmp_path)
    monkeypatch.setattr(parquet, "_CACHE", 10_000)
    source.prefetch(range(40))
    assert [source.read_bytes(i) for i in range(40)] == [row.tobytes() for row in noise]
    assert len(source._reader._groups) <= 3  # type: ignore[attr-defined]
    subset = Subset(source, np.array([0, 1, 9, 39]))
    assert subset.blocks is not None
    assert subset.blocks.sizes.tolist() == [2, 1, 1]
    assert Subset(source, np.array([9, 0])).blocks is None


def test_mean_and_deviation(tmp_path, server):  # noqa: F811
    write(server.folder / "a.parquet", {"image": structs([10, 200] * 8)})
    local, there = open_source(server.folder), open_source(f"{server.url}/a.parquet")
    assert compute_mean_std(local, 1, workers=0) == compute_mean_std(there, 1, workers=0)
    assert len(server.requests) < 20


# odd and damaged files --------------------------------------------------------------------------


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    row = {"bytes": None, "path": "/etc/passwd"}
    path = write(tmp_path / "a.parquet", {"image": pa.array([row, {"bytes": b"junk", "path": None}])})
    source = open_source(path)
    with pytest.raises(BadImage, match=r"a.parquet\[0\]: the field bytes of 'image' is empty; files outside"):
        source.read_bytes(0)
    with pytest.raises(BadImage, match=r"a.parquet\[1\]: not an image"):
        source.read(1)
    with pytest.raises(BadInput, match="no row in 1 parquet file"):
        open_source(write(tmp_path / "b.parquet", {"image": structs([1])[:0]}))
    other = write(tmp_path / "set" / "b.parquet", {"photo": structs([1])})
    write(tmp_path / "set" / "a.parquet", {"image": structs([1])})
    with pytest.raises(BadInput, match=rf"{other}: lacks the column 'image.bytes' of the other files"):
        open_source(tmp_path / "set")
    monkeypatch.setattr(parquet, "MAX_ROW_GROUP", 50)
    with pytest.raises(BadInput, match=r"a row group holds .* of images.*row_group_size=100"):
        open_source(tmp_path / "set" / "a.parquet")


@pytest.mark.parametrize("remote", [False, True])
def test_damaged_files(tmp_path, server, remote):  # noqa: F811
    good = write(
        server.folder / "a.parquet", {"image": structs([1, 2, 3, 4, 5])}, compression="none"
    ).read_bytes()
    huge_footer = good[:-8] + (0x7FFFFFF0).to_bytes(4, "little") + b"PAR1"
    zeros = good[: len(good) // 3 * 2] + bytes(len(good) // 3 - 8) + good[-8:]
    for data in (b"", b"PAR1", b"junk" * 99, good[:-20], huge_footer, zeros):
        (server.folder / "a.parquet").write_bytes(data)
        with pytest.raises(BadInput, match=r"a.parquet: not a readable parquet file \(.+\)"):
            open_source(f"{server.url}/a.parquet" if remote else server.folder / "a.parquet")
    (server.folder / "a.parquet").write_bytes(good[:4] + bytes(200) + good[204:])  # pages of the first group
    source = open_source(f"{server.url}/a.parquet" if remote else server.folder)
    with pytest.raises(BadImage, match=r"a.parquet\[0\]: its row group cannot be read"):
        source.read(0)
    assert source.read(4)[0, 0, 0] == 5


def test_labels_that_do_not_fit(tmp_path):
    columns = {"image": structs([1, 2])}
    lacking = open_source(write(tmp_path / "a.parquet", columns | {"label": pa.array([0, None])}))
    assert pickle.loads(pickle.dumps(lacking)).unlabelled_reason == "1 row has no label in 'label'"
    assert lacking.labels is None
    assert lacking.unlabelled_reason == "1 row has no label in 'label'"
    beyond = open_source(write(tmp_path / "b.parquet", columns | {"label": [0, 2]}, ["a", "b"]))
    with pytest.raises(BadInput, match="labels run to 2, but 2 classes are named"):
        beyond.labels  # noqa: B018
    words = open_source(write(tmp_path / "c.parquet", columns | {"label": ["cat", "dog"]}))
    assert words.labels is None


def test_a_pack_says_why_it_has_no_labels(tmp_path, capsys):
    columns = {"image": structs([1, 2]), "label": pa.array([0, None])}
    pack([str(write(tmp_path / "a.parquet", columns)), "--out", str(tmp_path / "out"), "--workers", "0"])
    assert "labels are not packed: 1 row has no label in 'label'\n" in capsys.readouterr().out


def test_a_dead_server_is_not_a_damaged_file(server):  # noqa: F811
    write(server.folder / "a.parquet", {"image": structs([1, 2, 3, 4])})
    source = open_source(f"{server.url}/a.parquet")
    server.status = 500
    with pytest.raises(BadInput, match="the server answers 500") as caught:
        source.read(3)
    assert not isinstance(caught.value, BadImage)


def test_a_missing_package(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"image": structs([1])})
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(BadInput, match=r"parquet files need an extra: pip install 'coma-dyvit\[parquet\]'"):
        open_source(path)
