"""Label Studio's code of masks drawn with a brush: runs and single values in a stream of bits.

The stream: 32 bits how many values, 5 bits the width of a value - 1, four times 4 bits the widths of lengths - 1. Then
blocks: 1 bit (a run of one value, or values one by one), 2 bits which width the length has, the length - 1, the value
or values. The values are those of an RGBA picture, four a pixel; the last of them says whether the pixel is drawn.
"""

from collections.abc import Sequence

import numpy as np

VALUE_BITS, LENGTH_BITS = 8, (3, 4, 8, 16)
CHANNELS = 4


def encode_brush(mask: np.ndarray) -> list[int]:
    """The code of a mask [h, w], as bytes."""
    flat = np.repeat(np.asarray(mask).ravel() != 0, CHANNELS)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])
    bits = [f"{flat.size:032b}{VALUE_BITS - 1:05b}", *(f"{width - 1:04b}" for width in LENGTH_BITS)]
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        value = f"{255 if flat[start] else 0:0{VALUE_BITS}b}"
        while start < end:
            length = min(end - start, 1 << LENGTH_BITS[-1])
            which = next(i for i, width in enumerate(LENGTH_BITS) if length <= 1 << width)
            bits.append(f"1{which:02b}{length - 1:0{LENGTH_BITS[which]}b}{value}")
            start += length
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def decode_brush(code: Sequence[int], height: int, width: int) -> np.ndarray:
    """The mask [height, width] uint8, 0 or 1, of a code. Raises ValueError for a damaged one."""
    text, at = "".join(f"{byte:08b}" for byte in bytes(code)), 0

    def read(count: int) -> int:
        nonlocal at
        at += count
        if at > len(text):
            raise ValueError(f"the brush's code ends after {len(code)} bytes, before its last value")
        return int(text[at - count : at], 2)

    size = read(32)
    if size != height * width * CHANNELS:
        raise ValueError(f"the brush's code has {size} values, {height} x {width} pixels have {height * width * 4}")
    bits = read(5) + 1
    lengths = [read(4) + 1 for _ in range(4)]
    values, i = np.zeros(size, np.uint8), 0
    while i < size:
        is_run = read(1)
        end = i + 1 + read(lengths[read(2)])
        if end > size:
            raise ValueError(f"the brush's code has more than the {size} values it tells of")
        values[i:end] = read(bits) > 0 if is_run else [read(bits) > 0 for _ in range(end - i)]
        i = end
    return values.reshape(height, width, CHANNELS)[..., -1].copy()
