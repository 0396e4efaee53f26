"""Made-up scenes: objects of a data set scattered over made-up ground, and examples written as a data set.

For trying things out where there are no pictures of the right kind, such as large aerial images. A network that is good
on them has shown that the machinery works, and nothing more.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from instseg_jax import masks
from instseg_jax.data import coco, copy_paste, examples, rasterize
from instseg_jax.geo.layer_files import write_layer
from instseg_jax.geo.rasters import write_geotiff
from instseg_jax.outlines import rle_to_polygons

GROUND_COLORS = np.array([(86, 98, 62), (142, 132, 104)], np.float32)  # RGB: grass and gravel
GROUND_SCALES = (4, 16, 64)  # pixels of the spots of which the ground is mixed
GRAIN = 6.0  # standard deviation of the noise of single pixels, of 255


def scatter_objects(
    dataset: coco.CocoDataset,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    count: int,
    scale_range: tuple[float, float],
) -> examples.Example:
    """Make a picture of `size` (height, width): ground, and `count` objects of random pictures of the data set on it.

    Objects are scaled by a factor from `scale_range` and half of them are mirrored. Later ones hide earlier ones, which
    go when less than a fifth is left of them; so there may be fewer in the end.

    Raises ValueError when the data set has no object.
    """
    donors = [i for i, annotations in enumerate(dataset.annotations) if annotations]
    if not donors:
        raise ValueError(f"{dataset.name} has no object to scatter.")
    scene = examples.Example(
        image=make_ground(size, rng),
        view=rasterize.whole_view(*size),
        is_float=False,
        boxes_xyxy_px=np.zeros((0, 4), np.float32),
        labels=np.zeros(0, np.int32),
        segmentations=(),
    )
    for _ in range(count):
        donor = examples.load_example(dataset, int(rng.choice(donors)))
        scene = copy_paste.paste_objects(scene, donor, rng, max_objects=1, scale_range=scale_range)
    return scene


def make_ground(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Draw ground without anything on it: spots of several sizes between two colours, [height, width, 3] uint8."""
    height, width = size
    mixture = np.zeros(size, np.float32)
    for scale in GROUND_SCALES:
        spots = rng.random((height // scale + 2, width // scale + 2), np.float32)
        mixture += cv2.resize(spots, (width, height), interpolation=cv2.INTER_CUBIC)
    share = np.clip(mixture / len(GROUND_SCALES), 0, 1)[..., None]
    colors = GROUND_COLORS[0] * (1 - share) + GROUND_COLORS[1] * share
    colors += rng.normal(0, GRAIN, (height, width, 1)).astype(np.float32)
    return np.rint(np.clip(colors, 0, 255)).astype(np.uint8)


def write_map(
    raster: str | Path,
    layer: str | Path,
    scene: examples.Example,
    class_names: Sequence[str],
    *,
    epsg: int,
    origin: tuple[float, float],
    pixel_size: float,
) -> None:
    """Write a scene as a GeoTIFF, north up, and its objects as a layer of polygons with a field `kind` (extra `geo`).

    `origin` is the (x, y) of the top left corner in the CRS of the EPSG code, `pixel_size` the side of a pixel there.
    """
    import pyproj
    import shapely

    write_geotiff(raster, scene.image, epsg=epsg, origin=origin, pixel_size=pixel_size)
    shapes = []
    for segmentation in scene.segmentations:
        parts = rle_to_polygons(masks.segmentation_to_rle(segmentation, *scene.image.shape[:2]))
        shape = shapely.multipolygons([shapely.Polygon(part.outer, part.holes) for part in parts])
        shapes.append(shapely.transform(shape, lambda xy: xy * [pixel_size, -pixel_size] + origin))
    kinds = np.array([class_names[label] for label in scene.labels], object)
    write_layer(layer, np.array([*shapes, None], object)[:-1], {"kind": kinds}, pyproj.CRS.from_epsg(epsg))
