"""Outlines the plain way, an edge at a time: what `instseg_jax.outlines` must find, to the corner and in this order."""

import cv2
import numpy as np

# Steps along the four directions right, down, left, up, as (x, y). The object lies to the right of an edge.
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def walk_edges(mask: np.ndarray) -> list[tuple[list, list[list]]]:
    """Outer ring and hole rings, lists of [x, y], of each 4-connected part of a mask [h, w]."""
    padded = np.pad(mask.astype(np.uint8), 1)
    count, parts = cv2.connectedComponents(padded, connectivity=4)
    outers, holes = [None] * count, [[] for _ in range(count)]
    inside = padded != 0
    # An edge leaves corner (x, y), the top left of pixel (x, y), in direction d.
    leaves = np.zeros((4, padded.shape[0] + 1, padded.shape[1] + 1), bool)
    leaves[0, 1:-1, :-1] = inside[1:] & ~inside[:-1]  # along the top of a pixel, to the right
    leaves[1, :-1, 1:-1] = inside[:, :-1] & ~inside[:, 1:]  # down its right side
    leaves[2, 1:-1, 1:] = inside[:-1] & ~inside[1:]  # along its bottom, to the left
    leaves[3, 1:, 1:-1] = inside[:, 1:] & ~inside[:, :-1]  # up its left side
    for y, x in zip(*np.nonzero(leaves[0]), strict=True):
        if not leaves[0, y, x]:
            continue
        for ring in split_at_repeats(follow(leaves, int(x), int(y))):
            corners = np.array(ring)
            step = np.roll(corners, -1, axis=0) - corners
            turns = (corners[(step != np.roll(step, 1, axis=0)).any(axis=1)] - 1).tolist()
            ahead = np.roll(corners, -1, axis=0)
            if (corners[:, 0] * ahead[:, 1] - corners[:, 1] * ahead[:, 0]).sum() > 0:
                outers[parts[y, x]] = turns
            else:
                holes[parts[y, x]].append(turns)
    return [(outer, inner) for outer, inner in zip(outers, holes, strict=True) if outer is not None]


def follow(leaves: np.ndarray, x: int, y: int) -> list[tuple[int, int]]:
    """The corners from the edge that leaves (x, y) to the right until it comes again, which are taken off `leaves`."""
    corners, direction, start = [(x, y)], 0, (x, y)
    while True:
        x, y = x + STEPS[direction][0], y + STEPS[direction][1]
        # Right turn, straight on, left turn: in this order the walk stays with its own pixel.
        direction = next(d for turn in (1, 0, 3) if leaves[d := (direction + turn) % 4, y, x])
        leaves[direction, y, x] = False
        if (x, y) == start and direction == 0:
            return corners
        corners.append((x, y))


def split_at_repeats(corners: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Part a closed walk into rings that pass each corner once."""
    for end, corner in enumerate(corners):
        start = corners.index(corner)
        if start < end:
            return [corners[start:end], *split_at_repeats(corners[:start] + corners[end:])]
    return [corners]
