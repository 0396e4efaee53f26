"""Splits of pictures of maps by where they lie: in blocks on the ground, so that neighbours never stand on both sides.

The pictures say it themselves (`lon_lat` and `metres`, as `convert --src_dataset_type=geo` writes them).
"""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from instseg_jax.data.split import Content, deal_groups, take_images
from instseg_jax.geo.plane import to_plane
from instseg_jax.messages import quote

SLACK = 0.02  # of a picture's sides


def split_blocks(
    content: Content, *, val_share: float, block: float, gap: float, seed: int
) -> tuple[Content, Content, Content]:
    """Deal the pictures of a COCO content out in blocks of `block` metres: training, validation, and left out.

    Left out are pictures of the training blocks whose ground lies within `gap` metres of that of a validated one, or
    on it. Raises ValueError for pictures that don't say where they lie, and for too few blocks.
    """
    places = place_images(content["images"])
    groups = _blocks(places, block)
    if len(groups) < 2:
        raise ValueError(f"All {len(places)} pictures lie in one block of {block:g} m; name a smaller --block.")
    chosen = deal_groups(content, _ids(content, groups), val_share, seed)
    return _part(content, places, [i for number in sorted(chosen) for i in groups[number]], gap)


def fold_blocks(
    content: Content, *, folds: int, block: float, gap: float, seed: int
) -> list[tuple[Content, Content, Content]]:
    """As `split_blocks`, `folds` times: each picture is validated in exactly one of them."""
    places = place_images(content["images"])
    groups = _blocks(places, block)
    if not 2 <= folds <= len(groups):
        raise ValueError(
            f"--folds is {folds}, it must be from 2 to {len(groups)}, the number of blocks of {block:g} m."
        )
    left = list(range(len(groups)))
    parts: list[list[int]] = []
    for number in range(folds - 1):
        ids = _ids(content, [groups[g] for g in left])
        known = {i for group in ids for i in group}
        share = 1 / (folds - number)
        spare = len(left) - (folds - number - 1)  # a block at least stays for each fold to come
        chosen = set(sorted(deal_groups(take_images(content, known), ids, share, seed))[:spare])
        parts.append([left[k] for k in sorted(chosen)])
        left = [g for k, g in enumerate(left) if k not in chosen]
    parts.append(left)
    return [_part(content, places, [i for g in part for i in groups[g]], gap) for part in parts]


def place_images(entries: Sequence[dict[str, Any]]) -> np.ndarray:
    """Corners [n, 4, 2] of pictures in metres on a plane, around each. Raises ValueError where one doesn't say."""
    middles, ways = [], []
    for entry in entries:
        place, extent = entry.get("lon_lat"), entry.get("metres")
        if not (_is_pair(place) and _is_pair(extent)):
            raise ValueError(
                f"The picture {quote(entry.get('file_name'))} doesn't say where it lies (lon_lat, metres); "
                "convert --src_dataset_type=geo writes that."
            )
        middles.append(place)
        turned, sides = entry.get("east_north"), [entry.get("width"), entry.get("height")]
        if isinstance(turned, list) and len(turned) == 2 and all(map(_is_pair, turned)) and _is_pair(sides):
            ways.append((np.array(turned, np.float64) * np.array(sides)[:, None] / 2).tolist())
        else:  # north is up
            ways.append([[extent[0] / 2, 0], [0, -extent[1] / 2]])  # type: ignore[index]
    lon_lat = np.array(middles, np.float64).reshape(-1, 2)
    middle = to_plane(lon_lat, np.array([lon_lat[0, 0], lon_lat[:, 1].mean()]))
    around = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) @ np.array(ways, np.float64)
    return middle[:, None] + around


def _blocks(places: np.ndarray, block: float) -> list[list[int]]:
    """Positions of the pictures of each block, from the south west on; the middle of a picture decides."""
    if not block > 0:
        raise ValueError(f"--block is {block:g}, it must be above 0 metres.")
    middle = places.mean(axis=1)
    cells = np.floor((middle - middle.min(axis=0)) / block).astype(int)
    found: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
    for position, cell in enumerate(cells.tolist()):
        found[tuple(cell)].append(position)
    return [found[cell] for cell in sorted(found)]


def _ids(content: Content, groups: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[content["images"][position]["id"] for position in group] for group in groups]


def _part(
    content: Content, places: np.ndarray, validated: Sequence[int], gap: float
) -> tuple[Content, Content, Content]:
    if not gap >= 0:
        raise ValueError(f"--gap is {gap:g}, it must be at least 0 metres.")
    is_val = np.zeros(len(places), bool)
    is_val[list(validated)] = True
    is_near = _are_near(places, np.flatnonzero(is_val), gap)
    parts = (~is_val & ~is_near, is_val, ~is_val & is_near)
    if not parts[0].any():
        raise ValueError(
            f"No picture is farther than {gap:g} m from the validated ones; name a smaller --gap or --block."
        )
    ids = np.array([entry["id"] for entry in content["images"]])
    train, val, left_out = (take_images(content, set(ids[part].tolist())) for part in parts)
    return train, val, left_out


def _are_near(places: np.ndarray, others: np.ndarray, gap: float) -> np.ndarray:
    """Which pictures [n] lie within `gap` metres of one of the others (positions), or on it, along their sides."""
    # The plane is true to about 0.3 %, so pictures that only touch may seem to overlap by a little.
    shrunk = places + SLACK * (places.mean(axis=1, keepdims=True) - places)
    sides = places[:, [1, 2]] - places[:, [0, 1]]
    # Two parallelograms are apart where they are along a normal of a side of either.
    normals = sides[..., ::-1] * [1, -1] / np.maximum(np.linalg.norm(sides, axis=-1, keepdims=True), 1e-9)
    is_near = np.zeros(len(places), bool)
    for other in others:
        axes = np.concatenate([normals, np.broadcast_to(normals[other], normals.shape)], axis=1)  # [n, 4, 2]
        here, there = (np.einsum("npx,nax->nap", corners, axes) for corners in (shrunk, places[[other]]))
        apart = np.maximum(here.min(axis=2) - there.max(axis=2), there.min(axis=2) - here.max(axis=2))
        is_near |= apart.max(axis=1) < gap
    return is_near


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(isinstance(x, (int, float)) and abs(x) < 1e9 for x in value)
    )
