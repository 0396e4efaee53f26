"""Pictures that say how they are to be turned."""

import struct

import numpy as np

ORIENTATION = 274


def turned(array, orientation):
    """By rotations and mirrors, as the EXIF standard words it."""
    steps = {1: (0, False), 2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True)}
    quarters, is_mirrored = steps.get(orientation, (1, False))
    array = np.rot90(array, quarters)  # against the clock
    return array[:, ::-1] if is_mirrored else array


def with_orientation(tiff, orientation):
    """The bytes of a TIFF, little-endian, whose first directory gets the tag."""
    start = struct.unpack_from("<I", tiff, 4)[0]
    count = struct.unpack_from("<H", tiff, start)[0]
    entries = [tiff[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(count)]
    entries = [entry for entry in entries if struct.unpack_from("<H", entry)[0] != ORIENTATION]
    entries.append(struct.pack("<HHIHH", ORIENTATION, 3, 1, orientation, 0))
    directory = struct.pack("<H", len(entries)) + b"".join(sorted(entries, key=lambda e: struct.unpack_from("<H", e)))
    return tiff[:4] + struct.pack("<I", len(tiff)) + tiff[8:] + directory + struct.pack("<I", 0)
