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
from instseg_jax.data import coco_entries
from instseg_jax.data.convert import Conversion, write_converted
from instseg_jax.data.converted import ConvertedImage, ConvertedObject
from instseg_jax.data.map_windows import SLIVER_PX, Cutting, around, check_cutting, grid, objects_in, window_sides
from instseg_jax.data.replacing import take_back
from instseg_jax.files import write_bytes
from instseg_jax.geo import stac
from instseg_jax.geo.layer_files import require_extra
from instseg_jax.geo.layers import Layer, find_ground, pixel_sides, read_layer, shapes_in_pixels
from instseg_jax.geo.rasters import SAME_GSD, SUFFIXES, RasterImage, find_stretch, is_remote
from instseg_jax.messages import quote
from instseg_jax.progress import Track
from instseg_jax.windows import Window

OVERVIEWS, OVERVIEW_SIDE = "overviews", 1600  # folder of the data set; pixels
SLIVERS, NO_CONTENT = "slivers smaller than a pixel, left out", "windows without content, skipped"
UNKNOWN_STRETCH = np.zeros((2, 3))


@dataclasses.dataclass(frozen=True)
class Labels:
    """What is known of the ground: polygons, and within which area they are all."""

    layer: Layer
    area: Layer | None  # None: within the hull of the polygons of a raster


def convert_maps(
    rasters: Sequence[str],
    labels: str,
    target: Path,
    cutting: Cutting,
    *,
    class_field: str | None,
    class_name: str | None,
    labels_crs: str | None,
    aoi: str | None,
    percentages: tuple[int, int] | None,
    progress: Track,
) -> Conversion:
    """Cut pictures from rasters around the polygons of a layer, and write them to `target` as COCO.

    `rasters` are files, folders of GeoTIFFs, or URLs. An object keeps its holes and parts; where borders leave less
    than `min_visible` of it in every picture, a further one is cut around it, and it is ignored in the others. Ground
    outside of the labelled area is never taught as background: pictures without objects lie within `aoi`, a layer of
    polygons, or without one within the hull of the labels; outside of `aoi` all is black. Resolution, bands and stretch
    are kept in the annotation files. Raises ValueError or FileNotFoundError.
    """
    require_extra("--src_dataset_type=geo")
    check_cutting(cutting)
    take_back(target / "annotations")
    notes: collections.Counter[str] = collections.Counter()
    layer = read_layer(labels, class_field=class_field, class_name=class_name, crs=labels_crs, notes=notes)
    area = None
    if aoi is not None:
        area = read_layer(aoi, class_field=None, class_name="area", crs=None, notes=collections.Counter())
    files = _find_rasters(rasters)
    stretch, gsd = _look_at(files, cutting, notes)
    layer = dataclasses.replace(
        layer, names=tuple(coco_entries.read_name(name, f"A class of {labels}") for name in layer.names)
    )
    names = list(dict.fromkeys(layer.names))
    is_used = np.zeros(len(layer.shapes), bool)
    overviews: dict[str, dict[str, Any]] = {}

    def images() -> Iterator[ConvertedImage]:
        is_shown = False
        for path in progress(files, len(files)):
            raster = RasterImage(path, driver=None, bands=cutting.bands, stretch=stretch)
            try:
                pictures = 0
                for picture in _cut_raster(raster, Labels(layer, area), cutting, notes, is_used):
                    yield picture
                    is_shown |= any(not o.is_crowd for o in picture.objects)
                    pictures += 1
                if pictures > 1 and not is_remote(path):  # those would be read as a whole
                    overviews[path] = _write_overview(raster, target / OVERVIEWS, len(overviews) + 1)
            finally:
                raster.close()
        if not is_shown:
            raise ValueError(_say_nothing_shown(labels, notes))
        notes["polygons that lie on no raster, or on none with content"] += int((~is_used).sum())
        for note in [note for note, count in notes.items() if not count]:
            del notes[note]

    known = {
        "gsd": gsd,
        "stretch": None if stretch is None else stretch.tolist(),
        "bands": None if cutting.bands is None else list(cutting.bands),
    }
    return write_converted(
        {"train": images()},
        names,
        target,
        percentages=percentages,
        group_by=None,
        seed=cutting.seed,
        notes=notes,
        info={
            "description": f"{labels} on {len(files)} raster{'s' * (len(files) > 1)}",
            "map": known,
            "overviews": overviews,
        },
    )


def _say_nothing_shown(labels: str, notes: collections.Counter[str]) -> str:
    """Why no picture has an object."""
    if notes[NO_CONTENT]:
        return (
            f"The rasters have no content where the polygons of {labels} lie: {notes[NO_CONTENT]} windows are black, "
            "transparent or nodata."
        )
    if notes[SLIVERS]:
        return f"All polygons of {labels} are smaller than a pixel of the pictures; name a finer --gsd."
    return (
        f"No polygon of {labels} lies on a raster: compare their CRS, or name that of the labels with "
        "--labels_crs=EPSG:NUMBER."
    )


def _write_overview(raster: RasterImage, folder: Path, number: int) -> dict[str, Any]:
    """Keep a small picture of a whole raster, on which check_dataset draws; returns what the annotation file says."""
    file = folder / f"{number}.jpg"
    write_bytes(file, cv2.imencode(".jpg", np.ascontiguousarray(raster.view(OVERVIEW_SIDE)[..., ::-1]))[1].tobytes())
    return {"file": f"{OVERVIEWS}/{file.name}", "size": list(raster.size)}


def _find_rasters(rasters: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in map(_named, rasters):
        path = Path(name)
        if is_remote(name) or path.is_file():
            found.append(name)
        elif path.is_dir():
            inside = sorted(str(p) for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise FileNotFoundError(f"There is no {' or '.join(SUFFIXES)} in {path}.")
            found += inside
        else:
            raise FileNotFoundError(f"There is no raster {quote(name)}.")
    return list(dict.fromkeys(found))


def _named(name: str) -> str:
    return stac.find_asset(name) if stac.is_asset(name) and not Path(name).exists() else name


def _look_at(
    files: Sequence[str], cutting: Cutting, notes: collections.Counter[str]
) -> tuple[np.ndarray | None, float | None]:
    """One stretch for all rasters that need one, and the resolution of the pictures in metres, None where unknown."""
    samples, lengths = [], []
    for name in files:
        raster = RasterImage(name, driver=None, bands=cutting.bands, stretch=UNKNOWN_STRETCH)
        if raster.georeference is None:
            raise ValueError(f"{name} does not say where it lies; a layer of polygons can't be laid on it.")
        sides = pixel_sides(raster.georeference, raster.size)
        if sides is not None:
            lengths.append(float(np.sqrt(sides[0] * sides[1])))
        elif cutting.gsd is not None:
            raise ValueError(f"{name} has no CRS with a way to metres, --gsd={cutting.gsd} can't be kept.")
        if raster.is_stretched:
            samples.append(raster.sample()[:, :: len(files)])
        raster.close()
    stretch = find_stretch(samples) if samples else None
    if cutting.gsd is None and lengths and max(lengths) > SAME_GSD * min(lengths):
        notes[f"rasters of {min(lengths):.3g} to {max(lengths):.3g} m a pixel; --gsd makes them one scale"] += len(
            lengths
        )
    return stretch, cutting.gsd if cutting.gsd is not None or not lengths else float(np.median(lengths))


def _cut_raster(
    raster: RasterImage, labels: Labels, cutting: Cutting, notes: collections.Counter[str], is_used: np.ndarray
) -> Iterator[ConvertedImage]:
    """The pictures of one raster. `is_used` is set for the polygons that some picture shows, or that are slivers."""
    import shapely

    place = raster.georeference
    assert place is not None  # _look_at has seen to that
    layer, area = labels.layer, labels.area
    height, width = raster.size
    whole = shapely.box(0, 0, width, height)
    shapes = shapes_in_pixels(layer, place, raster.name, raster.size)
    allowed = whole
    if area is not None:
        allowed = whole & shapely.union_all(shapes_in_pixels(area, place, raster.name, raster.size))
    on_it = np.flatnonzero(shapely.intersects(shapes, allowed))
    if not len(on_it):
        return
    lengths = pixel_sides(place, raster.size) or (1.0, 1.0)
    sides = window_sides(raster.name, lengths, cutting)
    visible = shapely.intersection(shapes[on_it], allowed)
    scale = cutting.tile / np.array(sides)  # (x, y) pixels of a picture for each one of the raster
    is_sliver = shapely.area(visible) * scale.prod() < SLIVER_PX
    notes[SLIVERS] += int(is_sliver.sum())
    is_used[on_it[is_sliver]] = True
    on_it, visible = on_it[~is_sliver], visible[~is_sliver]
    if not len(on_it):
        return
    tree = shapely.STRtree(visible)
    taken = {
        window: objects_in(window, tree, visible, scale, cutting)
        for window in grid(raster.size, sides, cutting.overlap)
    }
    chosen = {window: found for window, found in taken.items() if any(is_whole for _, _, is_whole in found)}
    shown = {index for found in chosen.values() for index, _, is_whole in found if is_whole}
    for index in range(len(visible)):
        if index not in shown:
            window = around(visible[index], raster.size, sides)
            chosen[window] = objects_in(window, tree, visible, scale, cutting)
            shown.update(i for i, _, is_whole in chosen[window] if is_whole)
            notes["pictures moved to show an object that borders would cut"] += 1
    labelled = allowed if area is not None else shapely.convex_hull(shapely.union_all(visible)) & whole
    empty = [w for w, found in taken.items() if not found and labelled.contains(shapely.box(*w.box) & whole)]
    random.Random(cutting.seed).shuffle(empty)
    chosen |= {window: [] for window in empty[: round(cutting.empty_share * len(chosen))]}
    stem = Path(raster.name).stem
    for window in sorted(chosen, key=lambda w: (w.y, w.x)):
        data = _picture(raster, window, allowed, cutting.tile)
        if data is None:
            notes[NO_CONTENT] += 1
            continue
        objects = []
        for index, shape, is_whole in chosen[window]:
            objects.append(_to_object(shape, layer.names[on_it[index]], is_whole, cutting.tile))
            is_used[on_it[index]] |= is_whole
            notes["objects that a border cuts, marked to be ignored there"] += not is_whole
        facts = {"raster": raster.name, "window": [window.x, window.y, window.width, window.height]}
        ground = find_ground(place, window)
        if ground is not None:
            facts |= {"lon_lat": ground[0], "metres": [window.width * lengths[0], window.height * lengths[1]]}
            facts["east_north"] = (ground[1] / cutting.tile).round(9).tolist()  # of a pixel to the right, and down
        name = f"{stem}_x{window.x}_y{window.y}.png"
        yield ConvertedImage(None, data, name, cutting.tile, cutting.tile, tuple(objects), facts)


def _picture(raster: RasterImage, window: Window, allowed: Any, tile: int) -> bytes | None:
    """A window as the bytes of a PNG; None where nothing of it is content."""
    import shapely

    pixels = raster.read(window)
    box = shapely.box(*window.box)
    if not allowed.contains(box & shapely.box(0, 0, raster.size[1], raster.size[0])):
        inside = shapely.transform(allowed & box, lambda xy: xy - [window.x, window.y])
        pixels = pixels * _draw(inside, pixels.shape[:2])[..., None]
    if not pixels.any():
        return None
    if pixels.shape[:2] != (tile, tile):
        method = cv2.INTER_AREA if pixels.shape[0] > tile else cv2.INTER_LINEAR
        pixels = cv2.resize(pixels, (tile, tile), interpolation=method)
    is_good, data = cv2.imencode(".png", np.ascontiguousarray(pixels[..., ::-1]))
    if not is_good:
        raise ValueError(f"A picture of {raster.name} can't be encoded as PNG.")
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
