"""What a search for images finds and what it skips: all of it is counted and named in one line."""

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from encoded_images import COLOUR, encoded
from image_folders import TINY, found, said, save
from PIL import Image

from coma.cli import main
from coma.data import inventory, open_source
from coma.data.decode import decode
from coma.data.sources.image_folder import FolderSource, list_folders
from coma.errors import BadImage, BadInput

# formats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AVIF", "GIF"])
def test_avif_and_still_gif_are_read(kind):
    pixels = decode(encoded(Image.fromarray(COLOUR), kind), "x").pixels
    assert pixels.shape == COLOUR.shape
    assert np.abs(pixels.astype(int) - COLOUR).mean() < 12


def test_avif_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = decode(encoded(Image.fromarray(COLOUR), "AVIF"), "x").pixels
    turned = decode(encoded(Image.fromarray(COLOUR), "AVIF", exif=exif), "x").pixels
    assert turned.shape == (83, 61, 3)
    assert np.abs(turned.astype(int) - np.rot90(upright, -1)).mean() < 6


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_animations_are_refused(kind):
    frames = [Image.fromarray(COLOUR[shift:]).resize((40, 30)) for shift in (0, 9)]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    with pytest.raises(BadImage, match=r"x: is an animation; save one frame as a still image"):
        decode(buffer.getvalue(), "x")


def heic(orientation: int = 1) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    pillow_heif.from_pillow(Image.fromarray(COLOUR)).save(buffer, exif=exif.tobytes())
    return buffer.getvalue()


def test_heic_is_read_with_the_extra(tmp_path):
    assert np.abs(decode(heic(), "x").pixels.astype(int) - COLOUR).mean() < 12
    assert decode(heic(6), "x").pixels.shape == (83, 61, 3)
    (tmp_path / "a.HEIC").write_bytes(heic())
    (tmp_path / "no_extension").write_bytes(heic())
    assert open_source(tmp_path).summary() == f"{tmp_path}: 2 images (1 .heic, 1 without extension)"
    with pytest.raises(BadImage, match="x: does not decode"):
        decode(heic()[:300], "x")


def test_without_the_extra_heic_is_counted_with_the_way_to_read_it(tmp_path, monkeypatch):
    monkeypatch.setattr(inventory, "find_spec", lambda name: None)
    save(tmp_path / "a.png")
    for number in range(3):
        (tmp_path / f"{number}.heic").write_bytes(b"")
    assert open_source(tmp_path).summary() == (
        f"{tmp_path}: 1 image (1 .png); skipped: 3 .heic (to read them: pip install 'coma-dyvit[heic]')"
    )
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadInput, match=r"it holds 3 \.heic \(to read them: pip install"):
        open_source(tmp_path)


def test_heic_under_another_name_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BadImage, match=r"x: HEIC images need an extra: pip install 'coma-dyvit\[heic\]'"):
        decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "x")


def test_what_has_no_extension_is_judged_by_its_content(tmp_path):
    for name in ("IMG_0001", "scan.001", "photo.jpg?width=200", "picture.jpg_large"):
        save(tmp_path / name)
    for kind in ("JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP"):
        save(tmp_path / "kinds" / kind, kind)
    for name in ("README", "BMW.2", "empty."):
        (tmp_path / name).write_text("BM of no image" if name != "empty." else "")
    np.save(tmp_path / "kinds" / "array.npy", COLOUR)
    (tmp_path / "kinds" / "array.npy").rename(tmp_path / "kinds" / "array")
    source = open_source(tmp_path)
    assert source.summary() == (
        f"{tmp_path}: 11 images (11 without extension); skipped: 3 without extension (not read)"
    )
    assert all(source.read(i).shape == COLOUR.shape for i in range(11))


def test_every_other_format_is_counted_by_its_extension(tmp_path):
    save(tmp_path / "a.png")
    names = ("b.svg", "c.mp4", "d.nef", "e.CR2", "f.dng", "g.psd", "h.fits", "i.jp2", "j.NEF", "k.jpg.xmp")
    for name in names:
        (tmp_path / name).write_bytes(encoded(Image.fromarray(COLOUR), "JPEG"))  # never looked into
    assert open_source(tmp_path).summary() == (
        f"{tmp_path}: 1 image (1 .png); skipped: "
        "2 .nef, 1 .cr2, 1 .dng, 1 .fits, 1 .jp2, 1 .mp4, 1 .psd, 1 .svg, 1 .xmp (not read)"
    )
    for number in range(40):
        (tmp_path / f"x.e{number:02d}").touch()
    assert open_source(tmp_path).summary().endswith(".e08, 37 more of 37 kinds (not read)")


# what systems leave behind ----------------------------------------------------------------------

SYSTEM = (
    *("__MACOSX/._cat.png", "@eaDir/cat.png/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/$R1.png", "#recycle/x.png"),
    *("System Volume Information/x.png", "lost+found/x.png", "Thumbnails/x.png", "found.000/x.png"),
)
HIDDEN = (
    "._cat.png",
    ".DS_Store",
    ".ipynb_checkpoints/cat.png",
    ".thumbnails/x.png",
    ".Trash-0/x.png",
)


def test_folders_of_systems_are_neither_images_nor_classes(tmp_path):
    for name in ("cat/1.png", "dog/2.png", *SYSTEM, *(f"cat/{name}" for name in SYSTEM), *HIDDEN):
        save(tmp_path / name)
    (tmp_path / "Thumbs.db").touch()
    (tmp_path / "ghost").mkdir()
    source = open_source(tmp_path)
    assert found(tmp_path) == ["cat/1.png", "dog/2.png"]
    assert source.class_names == ("cat", "dog")
    assert list_folders(tmp_path) == ["cat", "dog", "ghost"]
    summary = source.summary()
    assert "16 system folders (#recycle, $RECYCLE.BIN, @eaDir, ...)" in summary
    assert "5 hidden files or folders (.DS_Store, .Trash-0, ._cat.png, ...)" in summary
    assert "1 .db (not read)" in summary
    assert "1 folder without an image (ghost)" in summary


def test_whoever_points_at_such_a_folder_gets_it(tmp_path):
    save(tmp_path / "thumbnails" / "1.png")
    save(tmp_path / ".hidden" / "2.png")
    assert len(open_source(tmp_path / "thumbnails")) == len(open_source(tmp_path / ".hidden")) == 1


# odd objects of the file system -----------------------------------------------------------------


@pytest.mark.timeout(60)
def test_odd_objects_end_in_a_count_and_never_in_a_wait(tmp_path):
    folder = tmp_path / "photos"
    save(folder / "good.png")
    save(folder / "folder.jpg" / "inside.png")
    os.mkfifo(folder / "fifo.jpg")
    os.mkfifo(folder / "fifo")
    here = os.getcwd()
    os.chdir(folder)  # a socket's path may have a hundred bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket.jpg")
    finally:
        os.chdir(here)
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "loop").symlink_to("loop")
    (folder / "ping.jpg").symlink_to("pong.jpg")
    (folder / "pong.jpg").symlink_to("ping.jpg")
    (folder / "again").symlink_to(".")
    (folder / "empty.jpg").touch()
    source = open_source(folder)
    assert found(folder) == ["empty.jpg", "folder.jpg/inside.png", "good.png"]
    with pytest.raises(BadImage, match=r"empty\.jpg: the file is empty"):
        source.read(0)
    assert source.summary() == (
        f"{folder}: 3 images (2 .png, 1 .jpg); skipped: 4 special files (fifo, fifo.jpg, socket.jpg, ...), "
        "4 broken links (gone.jpg, loop, ping.jpg, ...), 1 folder reached twice by links (again/)"
    )


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["a.jpg", "a.npz", "a.tar", "a"])
def test_a_pipe_is_refused_in_one_line(tmp_path, name, capsys):
    os.mkfifo(tmp_path / name)
    assert main(["pretrain", str(tmp_path / name), "--out", str(tmp_path / "run")]) == 2
    way_out = "give a folder of images, a .npz pack, .tar shards or .parquet files"
    assert capsys.readouterr().err == f"error: {tmp_path / name}: is not a regular file; {way_out}\n"
    assert main(["degrade", str(tmp_path / name), "--out", str(tmp_path / "sheet.png")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / name}: is not a regular file; give an image file\n"


@pytest.mark.parametrize("name", ["loop", "x" * 300, "x/" * 3000])
def test_paths_that_cannot_be_followed_are_refused_in_one_line(tmp_path, name, capsys):
    (tmp_path / "loop").symlink_to("loop")
    assert main(["pretrain", str(tmp_path / name), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"{tmp_path}/" in error
    assert error.count("\n") == 1


def test_names_of_any_bytes_make_one_printable_line(tmp_path):
    save(tmp_path / "good.png")
    for name in (b"caf\xe9.png", b"new\nline.png", b"\x1b[31mred.png"):
        save(tmp_path / "plain.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    (tmp_path / os.fsdecode(b".hid\xe9den\n")).touch()
    (tmp_path / os.fsdecode(b"x.\xe9\n")).touch()
    source = open_source(tmp_path)
    lines = [source.summary(), *(source.describe(i) for i in range(len(source)))]
    assert len(source) == 4
    assert all(line.isprintable() and line.encode() for line in lines)
    assert ".hid\\udce9den\\n" in lines[0]


# the line ---------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path) -> Path:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for number in range(3):
                save(tmp_path / "data" / split / name / f"{number}.png")
    (tmp_path / "data" / "train" / "film.mp4").touch()
    return tmp_path / "data"


def test_every_command_says_what_it_reads(labelled, tmp_path, caplog):
    train = f"{labelled}/train: 6 images (6 .png); skipped: 1 .mp4 (not read)"
    note = (
        f"{labelled}: reads train/ (6 images) and skips test/ (6 images); "
        "to use one of these, give its own path"
    )
    test = f"{labelled}/test: 6 images (6 .png)"
    run = tmp_path / "run"
    assert main(["pretrain", str(labelled), "--out", str(run), "--steps", "1", *TINY]) == 0
    assert said(caplog) == [train, note]
    arguments = ["--data", str(labelled), "--workers", "0", "--device", "cpu"]
    assert main(["evaluate", str(run / "artifact"), *arguments, "--k", "1"]) == 0
    assert set(said(caplog)) == {train, test}
    assert main(["pack", str(labelled), "--out", str(tmp_path / "packed"), "--workers", "0"]) == 0
    assert said(caplog) == [train, note]


def test_the_line_comes_first_and_once(labelled, tmp_path):
    command = "import sys; from coma.cli import main; from coma.data import open_source\n"
    place = labelled / "train"
    arguments = ["pack", str(place), "--out", str(tmp_path / "out"), "--workers", "0"]
    command += f"assert main({arguments}) == 0\n"
    command += f"open_source({str(place)!r})"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == f"{labelled}/train: 6 images (6 .png); skipped: 1 .mp4 (not read)\npacking\n"


def test_opening_asks_the_file_system_nothing_about_ordinary_files(tmp_path, monkeypatch):
    for number in range(20):
        save(tmp_path / f"{number}.png")
    asked = []
    for name in ("stat", "lstat", "open"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path, *a, f=real, **k: asked.append(path) or f(path, *a, **k))
    monkeypatch.setattr("builtins.open", lambda path, *a, **k: pytest.fail(f"opened {path}"))
    assert len(open_source(tmp_path)) == 20
    assert not [path for path in asked if str(path).endswith(".png")]


def test_a_split_is_searched_once(labelled, monkeypatch):
    save(labelled / "train" / "cat" / ".hidden.png")
    searched, real = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: searched.append(os.path.realpath(path)) or real(path))
    source = FolderSource(labelled)
    assert sorted(searched) == sorted({str(labelled), *(str(each) for each in labelled.rglob("*/"))})
    assert source.summary() == (
        f"{labelled}/train: 6 images (6 .png); skipped: 1 .mp4 (not read), "
        "1 hidden file or folder (cat/.hidden.png)"
    )
