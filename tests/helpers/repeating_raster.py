"""A GeoTIFF of any size whose blocks lie in the file once: its table of blocks names the same few again and again."""

import struct
from pathlib import Path

import cv2
import numpy as np
from places import EMBEDDED

BLOCK = 512
SHORT, LONG, DOUBLE = 3, 4, 12  # types of TIFF


def real_blocks() -> list[np.ndarray]:
    """Aerial pictures [BLOCK, BLOCK, 3] with a plain rectangle each, around the middle."""
    blocks = []
    for i, path in enumerate(sorted((EMBEDDED / "images").glob("*.jpg"))[:4]):
        block = cv2.resize(cv2.imread(str(path)), (BLOCK, BLOCK))[..., ::-1] // 2 + 40
        block[190 + 15 * i : 270 + 15 * i, 190:350] = np.eye(3, dtype=np.uint8)[i % 3] * 255
        blocks.append(block)
    return blocks


def write_repeating(path: Path, side: int, *, bad: tuple[int, int] | None = None) -> Path:
    """Write an image of side x side pixels of `real_blocks`, 10 cm each; the block `bad` (row, column) lies nowhere."""
    blocks = real_blocks()
    count = -(-side // BLOCK)
    chosen = np.random.default_rng(0).integers(0, len(blocks), (count, count))
    size = blocks[0].nbytes
    offsets = 8 + chosen * size
    if bad is not None:
        offsets[bad] = 2**32 - 1 - size
    keys = [1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633]  # projected, pixels are areas, UTM 33N
    fields = [
        (256, LONG, [side]),
        (257, LONG, [side]),
        (258, SHORT, [8, 8, 8]),
        (259, SHORT, [1]),
        (262, SHORT, [2]),
        (277, SHORT, [3]),
        (284, SHORT, [1]),
        (322, LONG, [BLOCK]),
        (323, LONG, [BLOCK]),
        (324, LONG, offsets.ravel()),
        (325, LONG, np.full(count * count, size)),
        (33550, DOUBLE, [0.1, 0.1, 0]),
        (33922, DOUBLE, [0, 0, 0, 500000, 5000000, 0]),
        (34735, SHORT, keys),
    ]
    with path.open("wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, 8 + len(blocks) * size))
        for block in blocks:
            file.write(block.tobytes())
        entries, end = b"", file.tell() + 2 + 12 * len(fields) + 4
        values = b""
        for tag, kind, numbers in fields:
            data = np.asarray(numbers).astype({SHORT: "<u2", LONG: "<u4", DOUBLE: "<f8"}[kind]).tobytes()
            place = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", end + len(values))
            entries += struct.pack("<HHI", tag, kind, len(numbers)) + place
            values += data if len(data) > 4 else b""
        file.write(struct.pack("<H", len(fields)) + entries + bytes(4) + values)
    return path
