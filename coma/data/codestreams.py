"""Checks the size that a JPEG, JPEG-LS, JPEG 2000, PNG or WebP stream inside another file says of itself.

Decoders allocate memory for the size in the stream, whatever the file around it says.
"""

from __future__ import annotations

from coma.errors import BadImage

_JPEG, _JPEG_2000 = b"\xff\xd8", b"\xff\x4f\xff\x51"
PNG = b"\x89PNG\r\n\x1a\n"
_BOXED_JPEG_2000 = b"\0\0\0\x0cjP  "
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7)
"""Second bytes of the markers that begin a frame: ITU-T T.81, table B.1; T.87 (JPEG-LS), table C.1."""


def codestream_size(data: bytes) -> tuple[int, int] | None:
    """Returns height and width of a stream; None if it is of another kind, or does not say them."""
    if data.startswith(_BOXED_JPEG_2000):
        data = data[max(data.find(_JPEG_2000), 0) :]
    if data.startswith(_JPEG_2000):  # ITU-T T.800, A.5.1: the size and offset of the reference grid
        columns, rows, left, top = (int.from_bytes(data[at : at + 4]) for at in (8, 12, 16, 20))
        return rows - top, columns - left
    if data.startswith(PNG):
        return int.from_bytes(data[20:24]), int.from_bytes(data[16:20])
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp_size(data)
    if not data.startswith(_JPEG):
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:  # T.81, B.2.2: length, precision, lines, samples per line
            return int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    match data[12:16]:
        case b"VP8X":  # RFC 9649, 2.7.1: the canvas, from which frames are cut
            return 1 + int.from_bytes(data[27:30], "little"), 1 + int.from_bytes(data[24:27], "little")
        case b"VP8L":  # RFC 9649, 3.4: two times 14 bits
            bits = int.from_bytes(data[21:25], "little")
            return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
        case b"VP8 ":  # RFC 6386, 9.1: 14 bits each, and 2 for scaling
            width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
            return height, width
    return None


def check_codestream(data: bytes, height: int, width: int) -> None:
    """Checks that a stream is not larger than the part of the image that it holds.

    Raises:
        BadImage: It is.
    """
    size = codestream_size(data)
    if size is not None and (size[0] > height or size[1] > width):
        raise BadImage(
            f"is damaged: a part of {height} x {width} pixels says that it has {size[0]} x {size[1]}"
        )
