"""Rasters and a layer of polygons to pictures for training: cut around what is labelled."""

import collections
import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from instseg_jax import masks
from instseg_jax.data.converted import ConvertedImage, ConvertedObject
from instseg_jax.geo.layers import Layer, pixel_sides, read_layer, shapes_in_pixels
from instseg_jax.geo.rasters import SUFFIXES, RasterImage
from instseg_jax.messages import quote
from instseg_jax.progress import Track
from instseg_jax.windows import Window

SLIVER_PX = 1.0  # pixels of a picture: an object, or what a border leaves of it, that is smaller is none
LARGE_SHARE = 0.25  # of a picture: so much of an object is worth learning, however little of the object it is


@dataclasses.dataclass(frozen=True)
class Cutting:
    """How rasters are cut."""

    tile: int  # pixels of a picture's side
    overlap: float  # of neighbouring pictures, as a share of their side
    min_visible: float  # share of an object that must be in a picture; less is marked to be ignored
    empty_share: float  # pictures without objects, for each one with some
    gsd: float | None  # metres on the ground that a pixel of a picture shows; None: as in the raster
    seed: int


def cut_maps(
    rasters: Sequence[str],
    labels: str,
    cutting: Cutting,
    *,
    class_field: str | None,
    class_name: str | None,
    labels_crs: str | None,
    aoi: str | None,
    notes: collections.Counter[str],
    progress: Track,
) -> list[ConvertedImage]:
    """Cut pictures from rasters around the polygons of a layer.

    `rasters` are files or folders of GeoTIFFs. An object keeps its holes and parts; where a border leaves less than
    `min_visible` of it, a further picture is cut around it, and it is ignored in the first one. Ground outside of the
    labelled area is never taught as background: pictures without objects lie within `aoi`, a layer of polygons, or
    without one within the hull of the labels; outside of `aoi` all is black. Raises ValueError or FileNotFoundError.
    """
    _check_cutting(cutting)
    layer = read_layer(labels, class_field=class_field, class_name=class_name, crs=labels_crs, notes=notes)
    area = None
    if aoi is not None:
        area = read_layer(aoi, class_field=None, class_name="area", crs=None, notes=collections.Counter())
    found: list[ConvertedImage] = []
    files = _find_rasters(rasters)
    is_used = np.zeros(len(layer.shapes), bool)
    for path in progress(files, len(files)):
        found += _cut_raster(path, layer, area, cutting, notes, is_used)
    if not any(image.objects for image in found):
        raise ValueError(f"No polygon of {labels} lies on a raster: compare their CRS, or name it with --labels_crs.")
    if missed := int((~is_used).sum()):
        notes["polygons that lie on no raster, or on none with content"] += missed
    return found


def _check_cutting(cutting: Cutting) -> None:
    if cutting.tile < 32:
        raise ValueError(f"--tile is {cutting.tile}, it must be at least 32 pixels.")
    if not 0 <= cutting.overlap < 1:
        raise ValueError(f"--overlap is {cutting.overlap}, it must be at least 0 and below 1.")
    if not 0 < cutting.min_visible <= 1:
        raise ValueError(f"--min_visible is {cutting.min_visible}, it must be above 0 and at most 1.")
    if cutting.empty_share < 0:
        raise ValueError(f"--empty_share is {cutting.empty_share}, it must be at least 0.")
    if cutting.gsd is not None and not 0 < cutting.gsd < 1e6:
        raise ValueError(f"--gsd is {cutting.gsd}, it must be above 0 metres.")


def _find_rasters(rasters: Sequence[str]) -> list[Path]:
    files = []
    for name in rasters:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise FileNotFoundError(f"There is no {' or '.join(SUFFIXES)} in {path}.")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"There is no raster {quote(name)}.")
    return files


def _cut_raster(
    path: Path, layer: Layer, area: Layer | None, cutting: Cutting, notes: collections.Counter[str], is_used: np.ndarray
) -> Iterator[ConvertedImage]:
    import shapely

    raster = RasterImage(path)
    if raster.georeference is None:
        raise ValueError(f"{path} does not say where it lies; a layer of polygons can't be laid on it.")
    height, width = raster.size
    whole = shapely.box(0, 0, width, height)
    shapes = shapes_in_pixels(layer, raster.georeference, str(path), raster.size)
    allowed = whole
    if area is not None:
        allowed = whole & shapely.union_all(shapes_in_pixels(area, raster.georeference, str(path), raster.size))
    sides = _window_sides(raster, path, cutting)
    on_it = np.flatnonzero(shapely.intersects(shapes, allowed))
    if not len(on_it):
        return
    visible = shapely.intersection(shapes[on_it], allowed)
    scale = cutting.tile / np.array(sides)  # (x, y) pixels of a picture for each one of the raster
    tree = shapely.STRtree(visible)
    grid = list(_grid(raster.size, sides, cutting.overlap))
    taken = {window: _objects_in(window, tree, visible, scale, cutting) for window in grid}
    with_objects = {window: found for window, found in taken.items() if any(is_whole for _, _, is_whole in found)}
    shown = {index for found in with_objects.values() for index, _, is_whole in found if is_whole}
    for index in sorted({i for found in taken.values() for i, _, _ in found} - shown):
        window = _around(visible[index], raster.size, sides)
        with_objects[window] = _objects_in(window, tree, visible, scale, cutting)
        notes["pictures moved to show an object that borders would cut"] += 1
    labelled = allowed if area is not None else shapely.convex_hull(shapely.union_all(visible)) & whole
    empty = [w for w, found in taken.items() if not found and labelled.contains(shapely.box(*w.box))]
    random.Random(cutting.seed).shuffle(empty)
    chosen = with_objects | {w: [] for w in empty[: round(cutting.empty_share * len(with_objects))]}
    for window in sorted(chosen, key=lambda w: (w.y, w.x)):
        image = _picture(raster, path, window, allowed, cutting)
        if image is None:
            notes["windows without content, skipped"] += 1
            continue
        objects = []
        for index, shape, is_whole in chosen[window]:
            objects.append(_to_object(shape, layer.names[on_it[index]], is_whole, cutting.tile))
            is_used[on_it[index]] |= is_whole
            notes["objects that a border cuts, marked to be ignored there"] += not is_whole
        name = f"{path.stem}_x{window.x}_y{window.y}.png"
        yield ConvertedImage(None, image, name, cutting.tile, cutting.tile, tuple(objects))
    notes += collections.Counter()  # drops those that counted nothing
    raster.close()


def _window_sides(raster: RasterImage, path: Path, cutting: Cutting) -> tuple[int, int]:
    """Width and height in pixels of the raster of what a picture shows."""
    if cutting.gsd is None:
        return cutting.tile, cutting.tile
    assert_place = raster.georeference
    lengths = None if assert_place is None else pixel_sides(assert_place, raster.size)
    if lengths is None:
        raise ValueError(f"{path} has no CRS with a way to metres, --gsd={cutting.gsd} can't be kept.")
    width, height = (max(1, round(cutting.tile * cutting.gsd / length)) for length in lengths)
    return width, height


def _grid(size: tuple[int, int], sides: tuple[int, int], overlap: float) -> Iterator[Window]:
    """Windows that cover an image of `size` (height, width); the last ones reach its edge, where it is large enough."""

    def starts(length: int, side: int) -> list[int]:
        step = max(1, round(side * (1 - overlap)))
        return sorted({min(start, max(0, length - side)) for start in range(0, max(1, length), step)})

    for y in starts(size[0], sides[1]):
        for x in starts(size[1], sides[0]):
            yield Window(x, y, *sides)


def _around(shape: Any, size: tuple[int, int], sides: tuple[int, int]) -> Window:
    """The window with a shape in its middle, moved to lie on the image."""
    left, top, right, bottom = shape.bounds
    x = min(max(0, round((left + right - sides[0]) / 2)), max(0, size[1] - sides[0]))
    y = min(max(0, round((top + bottom - sides[1]) / 2)), max(0, size[0] - sides[1]))
    return Window(x, y, *sides)


def _objects_in(
    window: Window, tree: Any, shapes: np.ndarray, scale: np.ndarray, cutting: Cutting
) -> list[tuple[int, Any, bool]]:
    """(index, shape in pixels of the picture, whether enough of it is seen) of the shapes that a window shows."""
    import shapely

    box = shapely.box(*window.box)
    found = []
    for index in sorted(tree.query(box, predicate="intersects").tolist()):
        part = shapes[index] & box
        seen = part.area * scale.prod()
        if seen < SLIVER_PX:
            continue
        enough = part.area >= cutting.min_visible * shapes[index].area or seen >= LARGE_SHARE * cutting.tile**2
        shape = shapely.transform(part, lambda xy: (xy - [window.x, window.y]) * scale)
        found.append((index, shape, bool(enough)))
    return found


def _picture(raster: RasterImage, path: Path, window: Window, allowed: Any, cutting: Cutting) -> bytes | None:
    """A window as the bytes of a PNG; None where nothing of it is content."""
    import shapely

    pixels = raster.read(window)
    if not allowed.contains(shapely.box(*window.box) & shapely.box(0, 0, raster.size[1], raster.size[0])):
        inside = shapely.transform(allowed & shapely.box(*window.box), lambda xy: xy - [window.x, window.y])
        pixels = pixels * _draw(inside, pixels.shape[:2])[..., None]
    if not pixels.any():
        return None
    if pixels.shape[:2] != (cutting.tile, cutting.tile):
        is_smaller = pixels.shape[0] > cutting.tile
        method = cv2.INTER_AREA if is_smaller else cv2.INTER_LINEAR
        pixels = cv2.resize(pixels, (cutting.tile, cutting.tile), interpolation=method)
    is_good, data = cv2.imencode(".png", np.ascontiguousarray(pixels[..., ::-1]))
    if not is_good:
        raise ValueError(f"A picture of {path} can't be encoded as PNG.")
    return data.tobytes()


def _draw(shape: Any, size: tuple[int, int]) -> np.ndarray:
    """The pixels [height, width] uint8 0/1 whose centres lie in a shape."""
    parts = [part for part in getattr(shape, "geoms", [shape]) if part.geom_type == "Polygon" and not part.is_empty]
    drawn = np.zeros(size, np.uint8)
    for part in parts:
        own = masks.rasterize_polygons([np.asarray(part.exterior.coords)], *size)
        for hole in part.interiors:
            own &= 1 - masks.rasterize_polygons([np.asarray(hole.coords)], *size)
        drawn |= own
    return drawn


def _to_object(shape: Any, name: str, is_whole: bool, tile: int) -> ConvertedObject:
    parts = [part for part in getattr(shape, "geoms", [shape]) if part.geom_type == "Polygon" and not part.is_empty]
    if any(part.interiors for part in parts) or not is_whole:
        return ConvertedObject(name, masks.encode_mask(_draw(shape, (tile, tile))), is_crowd=not is_whole)
    return ConvertedObject(name, [np.asarray(part.exterior.coords)[:-1].ravel().tolist() for part in parts])
