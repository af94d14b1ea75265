"""Pictures that a page has to take, and files that it has to refuse."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG of one byte a pixel whose header says this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bad_files(folder: Path) -> dict[str, Path]:
    """Name of the trouble to a file that has it."""
    folder.mkdir(parents=True, exist_ok=True)
    photograph = Image.fromarray(NOISE)
    whole = io.BytesIO()
    photograph.save(whole, "PNG")
    heic = io.BytesIO()
    pillow_heif.from_pillow(photograph).save(heic)
    files: dict[str, bytes] = {
        "not a picture.jpg": b"just some text that calls itself a photograph\n" * 20,
        "not a picture (empty).png": b"",
        "damaged.png": whole.getvalue()[: len(whole.getvalue()) // 2],
        "too large.png": png(10_000, 10_000, zlib.compress(bytes(10_001 * 10_000), 9)),  # 100 megapixels
        "too large (bomb).png": png(60_000, 60_000, zlib.compress(bytes(1000))),
        "damaged.heic": heic.getvalue()[:-900],
        "damaged (header).heic": heic.getvalue()[:150],
        "damaged.gif": _saved_bytes("GIF", [photograph])[:600],
        "damaged.avif": _saved_bytes("AVIF", [photograph])[:-300],
        "not a picture (svg).png": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    saved(folder / "several pages.tif", photograph, save_all=True, append_images=[photograph])
    saved(folder / "ICO pictures.png", photograph, format="ICO")
    return {path.name: path for path in folder.iterdir()}


def _saved_bytes(kind: str, frames: list[Image.Image], **options) -> bytes:
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    return file.getvalue()


def animations(folder: Path) -> dict[str, Path]:
    """Files of three frames, the first of which is `NOISE`, by their format on the page."""
    frames = [Image.fromarray(each) for each in (NOISE, 255 - NOISE, NOISE // 2)]
    content = {
        "GIF": _saved_bytes("GIF", frames),
        "WebP": _saved_bytes("WEBP", frames, lossless=True),
        "PNG": _saved_bytes("PNG", frames),
        "AVIF": _saved_bytes("AVIF", frames, quality=100, subsampling="4:4:4"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for kind, data in content.items():
        (folder / f"moving.{kind.lower()}").write_bytes(data)
    return {kind: folder / f"moving.{kind.lower()}" for kind in content}


def good_files(folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    import imagecodecs

    photograph = Image.fromarray(NOISE)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: what is stored lying is seen upright
    (folder / "16 bit.png").write_bytes(imagecodecs.png_encode(NOISE.astype(np.uint16) * 257))
    saved(folder / "cmyk.jpg", photograph.convert("CMYK"))
    saved(folder / "turned.jpg", photograph, exif=exif)
    saved(folder / "transparent.png", Image.fromarray(np.dstack([NOISE, np.zeros((40, 60), np.uint8)])))
    saved(folder / "grey.png", photograph.convert("L"))
    saved(folder / "palette.png", photograph.convert("P"))
    saved(folder / "renamed.txt.png", photograph, format="BMP")
    saved(folder / "still.gif", photograph)
    saved(folder / "still.avif", photograph)
    saved(folder / "still.webp", photograph)
    pillow_heif.from_pillow(photograph).save(folder / "still.heic")
    saved(folder / "large.jpg", Image.fromarray(np.zeros((4000, 3000, 3), np.uint8)))
    return {path.name: path for path in folder.iterdir()}
