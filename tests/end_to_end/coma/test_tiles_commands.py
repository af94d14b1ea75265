"""--tiles and DICOM through the commands: info, pretrain, pack, embed, search; and the memory they take."""

import json
import re
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
import tifffile
from dicom_files import dicom
from encoded_images import tiff
from skimage import data as pictures

from coma import cli
from coma.data.listing import read_listing

COLOUR = pictures.coffee()[:200, :300]
RUN = ("--model", "tiny", "--image-size", "32", "--batch-size", "8", "--device", "cpu", "--workers", "0")


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    (folder / "a.tif").write_bytes(tiff(COLOUR, photometric="rgb", tile=(64, 64), compression="zlib"))
    frames = np.stack([COLOUR[:100, :100], 255 - COLOUR[:100, :100]])
    (folder / "b.dcm").write_bytes(dicom(frames, "RGB", frames=2))
    return folder


def test_info_counts_windows(scans, capsys):
    assert cli.main(["info", str(scans), "--tiles", "100"]) == 0
    printed = capsys.readouterr().out
    assert "2 images (1 .dcm, 1 .tif); --tiles 100: 8 windows of 2 images, 0 whole" in printed
    assert f"coma pack {scans} --out PACK --tiles 100" in printed


@pytest.mark.slow
def test_pretrain_takes_every_window_and_resumes_with_the_same_tiles_only(scans, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["pretrain", str(scans), "--out", str(run), *RUN, "--steps", "1", "--tiles", "100"]
    assert cli.main(arguments) == 0
    assert json.loads((run / "config.json").read_text())["data"]["tiles"] == 100
    listing = read_listing(run)
    assert listing is not None
    assert listing["images"]["names"][-3:] == ["a.tif#xywh=200,100,100,100", "b.dcm#frame=1", "b.dcm#frame=2"]
    capsys.readouterr()
    assert cli.main(["pretrain", "--resume", str(run), "--tiles", "64"]) == 2
    assert "data.tiles 100 -> 64" in capsys.readouterr().err
    assert cli.main(["pretrain", "--resume", str(run), "--steps", "2"]) == 0


def test_packs_hold_windows_in_full_size(scans, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["pack", str(scans), "--out", str(out), "--tiles", "100", "--workers", "0"]) == 0
    with tarfile.open(out / "shard-000000.tar") as tar:
        names = tar.getnames()
    assert names[0] == "00000000-a_xywh_0_0_100_100.jpg"
    assert len(names) == 8
    index = json.loads((out / "index.json").read_text())
    assert index["size"] == 100
    assert cli.main(["pack", str(out), "--out", str(tmp_path / "again"), "--tiles", "100"]) == 2
    assert "--tiles cuts image files on a disk" in capsys.readouterr().err


def test_other_commands_refuse_tiles(scans, tmp_path, capsys):
    compare = ["compare", str(scans), "--test", str(scans), "--budget", "images", "8", "--out"]
    assert cli.main([*compare, str(tmp_path / "x"), "--tiles", "100"]) == 2
    assert cli.main(["evaluate", "ARTIFACT", "--data", str(scans), "--tiles", "100"]) == 2
    assert cli.main(["info", str(scans), "--tiles", "5"]) == 2
    assert "--tiles 5 must be at least 32" in capsys.readouterr().err


# memory ------------------------------------------------------------------------------------------

SIDE = 20_000


def large(path, layout: str) -> None:
    """A TIFF of 20,000 x 20,000 RGB pixels: one tile, or one strip, again and again."""
    rng = np.random.default_rng(0)
    tile = np.kron(rng.integers(0, 255, (32, 32, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    form = {"shape": (SIDE, SIDE, 3), "dtype": np.uint8, "photometric": "rgb", "metadata": None}
    if layout == "tiles":
        form |= {"tile": (256, 256), "bigtiff": True}
        count = (-(-SIDE // 256)) ** 2
    else:
        tile, count = np.tile(tile[:8], (1, SIDE // 256 + 1, 1))[:, :SIDE], SIDE // 8
        form |= {"rowsperstrip": 8}
    segment = zlib.compress(tile.tobytes(), 1)
    tifffile.imwrite(path, (segment for _ in range(count)), compression="zlib", **form)


def peak_mb(*arguments: str) -> float:
    """The largest resident memory of a command; getrusage's would include the process that starts it."""
    code = "import sys; from pathlib import Path; from coma import cli; code = cli.main(sys.argv[1:]); "
    code += "print(Path('/proc/self/status').read_text()); sys.exit(code)"
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return int(re.findall(r"VmHWM:\s+(\d+) kB", ran.stdout)[-1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("layout", ["tiles", "strips"])
def test_a_large_tiff_takes_little_more_memory_than_a_small_one(tmp_path, layout):
    for name in ("large", "small"):
        (tmp_path / name).mkdir()
    large(tmp_path / "large" / "a.tif", layout)
    (tmp_path / "small" / "a.tif").write_bytes(
        tiff(np.tile(pictures.coffee()[:256, :256], (8, 8, 1)), photometric="rgb", tile=(256, 256))
    )
    statistics = ("--mean", ".5", ".5", ".5", "--std", ".3", ".3", ".3", "--tiles", "512", "--steps", "3")

    def pretrained(name: str) -> float:
        return peak_mb(
            "pretrain", str(tmp_path / name), "--out", str(tmp_path / f"{name}-run"), *RUN, *statistics
        )

    small, big = pretrained("small"), pretrained("large")
    packed = peak_mb(
        *(
            "pack",
            str(tmp_path / "large"),
            "--out",
            str(tmp_path / "pack"),
            "--tiles",
            "512",
            "--workers",
            "0",
        )
    )
    print(f"{layout}: pretrain {big:.0f} MB, {small:.0f} MB with a small image; pack {packed:.0f} MB")
    assert big - small < 250
    assert packed < 1000
