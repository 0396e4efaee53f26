"""Labels of a map that miss what they show, all by the same way: those in a wrong CRS or datum do.

The outlines of the labels are laid over the edges of their pictures, moved by every way; where labels fit, edges lie
below them and run along them. Each compares directions, as doubled angles of gradients: with a picture of something
else the sum is 0 on average. Where the sum over all pictures is largest tells how far labels lie off.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from instseg_jax import masks

SIDE = 256  # pixels: pictures are compared at this size
REACH_M = 60.0  # metres that labels may be off, if half a picture shows as much
LEAST_REACH, MOST_REACH = 32, 128  # pixels at that size
MIN_TILES, MIN_OBJECTS = 4, 8
# Noise has a standard deviation of 1. Labels that are where they should be, shifted ones and those of other pictures,
# in aerial pictures and photographs: see tests/data/test_overview.py.
MIN_SCORE, MIN_LEAD = 9.0, 1.25  # of the best way, and by how much it must be better than all far from it
MIN_OPPOSITE_LEAD = 2.0  # than the same way to the other side
NEAR_PX = 6  # at that size: ways that differ by no more are one
MAX_DIFFERENCE_PX = 3.0  # between what one half of the pictures says, and the other
MIN_PX, MIN_M = 3.0, 1.0  # of the pictures, and on the ground: less is how exactly people draw


@dataclasses.dataclass(frozen=True)
class Evidence:
    """For each way [2 r + 1, 2 r + 1] (down, right) that labels of a picture may be off: the sum, and its weight."""

    sums: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class Shift:
    """How many metres labels lie east and north of what they show, and how sure that is, in standard deviations."""

    east: float
    north: float
    score: float

    def say(self) -> str:
        """In words."""
        names = ("east", "north-east", "north", "north-west", "west", "south-west", "south", "south-east")
        towards = names[round(np.arctan2(self.north, self.east) / (np.pi / 4)) % 8]
        return (
            f"labels lie {np.hypot(self.east, self.north):.1f} m {towards} of what they show "
            f"({self.east:+.1f} m east, {self.north:+.1f} m north)"
        )


def reduced_scale(size: tuple[int, int]) -> float:
    """By which a picture of a size is made smaller before it is looked at."""
    return min(1.0, SIDE / max(size))


def find_reach(metres_per_px: float) -> int:
    """How far labels may be off, in pixels of a reduced picture whose pixels show so many metres."""
    return int(np.clip(REACH_M / metres_per_px, LEAST_REACH, MOST_REACH))


def weigh(image: np.ndarray, rles: Sequence[dict[str, Any]], reach: int) -> Evidence:
    """Lay the outlines of masks, RLEs of the picture's size, over the edges of a picture [H, W, 3] uint8."""
    scale = reduced_scale(image.shape[:2])
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    outlines = np.zeros((height, width), np.complex64)
    for rle in rles:
        mask = cv2.resize(masks.decode_rle(rle).astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
        _add_outline(outlines, mask)
    border = 2  # where a picture ends, an outline is none
    outlines[:border] = outlines[-border:] = outlines[:, :border] = outlines[:, -border:] = 0
    edges = _edges(small)
    shape = tuple(cv2.getOptimalDFTSize(length + reach) for length in (height, width))
    ways = np.arange(reach, -reach - 1, -1)  # labels that lie too far right have their edges on the left
    window = np.ix_(ways, ways)

    def correlate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.fft.ifft2(np.conj(np.fft.fft2(a, shape)) * np.fft.fft2(b, shape)).real[window].astype(np.float32)

    return Evidence(correlate(outlines, edges), correlate(np.abs(outlines), (edges != 0).astype(np.float32)))


def find_shift(evidence: Sequence[Evidence], ground: Sequence[np.ndarray], scale: Sequence[float]) -> Shift | None:
    """The way by which the labels of pictures are off; None where they are not, or nothing tells.

    `ground` [2, 2] of each picture says how many metres (east, north; rows) its reduced pixels to the right and down
    (columns) are, `scale` how much it was reduced.
    """
    if len(evidence) < MIN_TILES:
        return None
    step = float(np.median([_px_metres(matrix) for matrix in ground]))
    reach = max(one.sums.shape[0] // 2 for one in evidence)
    sums, weights = np.zeros((2, 2, 2 * reach + 1, 2 * reach + 1))  # of every second picture, and the others
    for number, (one, matrix) in enumerate(zip(evidence, ground, strict=True)):
        for total, part in ((sums, one.sums), (weights, one.weights)):
            total[number % 2] += _on_ground(part, matrix, step, reach)
    scores = _scores(sums.sum(axis=0), weights.sum(axis=0))
    best = _peak(scores)
    axes, score = np.mgrid[-reach : reach + 1, -reach : reach + 1], float(scores.max())
    far = np.hypot(*(axes - np.array(best)[:, None, None])) > NEAR_PX
    if score < MIN_SCORE or score < MIN_LEAD * scores[far].max():
        return None
    # Outlines that are drawn too wide, or too narrow, fit on every side.
    opposite = (np.tensordot(best, axes, 1) < 0) & (np.hypot(*axes) < 1.5 * np.hypot(*best) + 2)
    if opposite.any() and score < MIN_OPPOSITE_LEAD * scores[opposite].max():
        return None
    for half in range(2):
        if np.hypot(*np.subtract(_peak(_scores(sums[half], weights[half])), best)) > MAX_DIFFERENCE_PX:
            return None
    south, east = np.array(best) * step
    length = float(np.hypot(south, east))
    if length < max(MIN_M, MIN_PX * step * float(np.median(scale))):
        return None
    return Shift(float(east), float(-south), score)


def _add_outline(outlines: np.ndarray, mask: np.ndarray) -> None:
    """Add the outline of a mask [H, W] float32 to those that are there."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    margin = 3  # pixels into which smoothing carries an edge
    part = np.s_[
        max(0, rows[0] - margin) : rows[-1] + margin + 1, max(0, columns[0] - margin) : columns[-1] + margin + 1
    ]
    strength, direction = _gradients(np.ascontiguousarray(mask[part]))
    outlines[part] += strength / 4 * direction


def _edges(image: np.ndarray) -> np.ndarray:
    """The edges of a picture, complex64: as long as they are strong, up to 1; none beside black: no content."""
    is_black = ~image.any(axis=2)
    strength, direction = _gradients(image.astype(np.float32).mean(axis=2))
    typical = max(float(np.median(strength[~is_black])) if not is_black.all() else 0.0, 1e-3)
    edges = strength / (strength + 2 * typical) * direction
    edges[cv2.dilate(np.asarray(is_black, np.uint8), np.ones((7, 7), np.uint8)) > 0] = 0
    return edges.astype(np.complex64)


def _gradients(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Strength of the gradients of [H, W] float32, and their directions with doubled angle, of length 1."""
    smooth = cv2.GaussianBlur(values, (0, 0), 1.0, borderType=cv2.BORDER_REPLICATE)
    gradient = cv2.Sobel(smooth, cv2.CV_32F, 1, 0) + 1j * cv2.Sobel(smooth, cv2.CV_32F, 0, 1)
    strength = np.abs(gradient)
    return strength, (gradient / np.maximum(strength, 1e-6)) ** 2


def _px_metres(matrix: np.ndarray) -> float:
    return float(np.sqrt(abs(np.linalg.det(matrix))))


def _on_ground(part: np.ndarray, matrix: np.ndarray, step: float, reach: int) -> np.ndarray:
    """What depends on ways in pixels, by ways in steps on the ground: rows to the south, columns to the east."""
    to_pixels = np.linalg.inv(matrix) @ np.array([[step, 0], [0, -step]])  # (right, down) of (steps east, steps south)
    own = part.shape[0] // 2
    offset = own - to_pixels @ [reach, reach]
    affine = np.concatenate([to_pixels, offset[:, None]], axis=1)
    size = (2 * reach + 1, 2 * reach + 1)
    return cv2.warpAffine(part, affine, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def _scores(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums as multiples of the noise, which grows with the root of the weight and is told by most of the ways."""
    plain = sums / np.sqrt(np.maximum(weights, 0.05 * max(float(weights.max()), 1e-9)))
    plain = plain - np.median(plain)
    return plain / max(1.4826 * float(np.median(np.abs(plain))), 1e-9)


def _peak(scores: np.ndarray) -> tuple[float, float]:
    """Where scores are largest, (down, right) from the middle, between pixels by a parabola each way."""
    reach = scores.shape[0] // 2
    row, column = np.unravel_index(np.argmax(scores), scores.shape)
    return _top(scores[:, column], int(row)) - reach, _top(scores[row], int(column)) - reach


def _top(values: np.ndarray, at: int) -> float:
    before, here, after = values[max(0, at - 1)], values[at], values[min(at + 1, len(values) - 1)]
    bend = before - 2 * here + after
    return at + float(0.5 * (before - after) / bend if bend < 0 else 0.0)
