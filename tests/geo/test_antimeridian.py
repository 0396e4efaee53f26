"""Shapes across 180 degrees: cut as RFC 7946 asks, nothing of them lost, and read back as one."""

import collections

import numpy as np
import pytest

rasterio = pytest.importorskip("rasterio")
pytest.importorskip("pyogrio")
pyproj = pytest.importorskip("pyproj")
shapely = pytest.importorskip("shapely")

from instseg_jax.geo import georeference  # noqa: E402
from instseg_jax.geo.antimeridian import cut_at_180, mend_torn  # noqa: E402
from instseg_jax.geo.georeference import Georeference  # noqa: E402
from instseg_jax.geo.layer_files import read_layer_file  # noqa: E402
from instseg_jax.geo.layers import read_layer, shapes_in_pixels  # noqa: E402
from instseg_jax.geo.shaping import Shaping  # noqa: E402
from instseg_jax.masks import encode_mask  # noqa: E402
from instseg_jax.results.layer import open_layer  # noqa: E402
from instseg_jax.results.result import Result  # noqa: E402
from instseg_jax.scoring.maps import MapLayer, match_layers  # noqa: E402

GEOD = pyproj.Geod(ellps="WGS84")
SIZE = (60, 100)


def metres_place() -> Georeference:
    """In the last UTM zone, 180 degrees in its middle, turned a little."""
    x, y = pyproj.Transformer.from_crs(4326, 32660, always_xy=True).transform(180.0, -17.0)
    turned = rasterio.Affine(10, 0, x, 0, -10, y) @ rasterio.Affine.rotation(8) @ rasterio.Affine.translation(-50, -30)
    return Georeference(tuple(turned)[:6], pyproj.CRS(32660).to_wkt(), 32660)


def degrees_place() -> Georeference:
    return Georeference((1e-4, 0, 180 - 50e-4, 0, -1e-4, -17), pyproj.CRS(4326).to_wkt(), 4326)


def found(place: Georeference) -> Result:
    """An object with a hole, both across 180 degrees, and one east of it."""
    ring, east = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
    ring[10:50, 20:85] = 1
    ring[20:40, 40:60] = 0
    east[2:8, 70:90] = 1
    boxes = [{"label": "lake", "cls_id": 0, "score": 0.9 - k / 10, "coordinate": [0, 0, 9, 9]} for k in range(2)]
    return Result("a.tif", SIZE, boxes, [encode_mask(ring), encode_mask(east)], georeference=place)


def area(shape) -> float:
    return abs(GEOD.geometry_area_perimeter(shapely.orient_polygons(shape))[0])


@pytest.mark.parametrize("place", [metres_place(), degrees_place()])
def test_geojson_of_a_picture_is_cut(place):
    features = georeference.to_geojson(found(place))["features"]
    lake, east = (shapely.geometry.shape(feature["geometry"]) for feature in features)
    assert len(lake.geoms) == 2 and len(east.geoms) == 1 and lake.is_valid
    assert sorted([shapely.bounds(part)[[0, 2]].round(2).tolist() for part in lake.geoms]) == [
        [-180, pytest.approx(-180, abs=0.02)],
        [pytest.approx(180, abs=0.02), 180],
    ]
    assert -180 < east.bounds[0] < -179.9
    for shape, feature in zip((lake, east), features, strict=True):
        assert area(shape) == pytest.approx(feature["properties"]["area_m2"], rel=1e-4)
        assert all(part.exterior.is_ccw for part in shape.geoms)


@pytest.mark.parametrize("place", [metres_place(), degrees_place()])
@pytest.mark.parametrize("suffix", ["geojson", "gpkg", "parquet"])
def test_a_layer_in_degrees_is_whole(tmp_path, place, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    layer = open_layer(tmp_path / f"found.{suffix}", ["lake"], "EPSG:4326", Shaping(), is_single=True)
    layer.add(found(place))
    layer.write()
    blobs, columns, _ = read_layer_file(tmp_path / f"found.{suffix}", None, ["area_m2"])
    shapes = shapely.from_wkb(blobs)
    assert [area(shape) for shape in shapes] == pytest.approx(list(columns["area_m2"]), rel=1e-4)
    parts = shapely.bounds(shapely.get_parts(shapes))
    assert (parts[:, 2] - parts[:, 0] < 0.02).all()
    if suffix == "geojson":
        assert np.abs(parts[:, [0, 2]]).max() <= 180 and len(parts) == 3


@pytest.mark.parametrize("place", [metres_place(), degrees_place()])
def test_what_is_cut_is_read_as_one(tmp_path, place):
    """As labels of the same raster, and held against the shapes as they were."""
    path = tmp_path / "found.geojson"
    layer = open_layer(path, ["lake"], None, Shaping(), is_single=True)
    layer.add(found(place))
    layer.write()
    notes: collections.Counter[str] = collections.Counter()
    labels = read_layer(str(path), class_field="label", class_name=None, crs=None, notes=notes)
    lake, east = shapes_in_pixels(labels, place, "a.tif", SIZE)
    whole = shapely.box(20, 10, 85, 50) - shapely.box(40, 20, 60, 40)
    assert (lake & whole).area / (lake | whole).area > 0.9999 and not notes
    assert (east & shapely.box(70, 2, 90, 8)).area == pytest.approx(120, rel=1e-3)
    names, scores, crs = np.array(labels.names, object), np.ones(2), pyproj.CRS.from_wkt(place.wkt)
    ground = shapely.transform(np.array([whole, shapely.box(70, 2, 90, 8)], object), place.to_ground)
    pairs = match_layers(
        MapLayer(labels.shapes, names, scores, labels.crs), MapLayer(ground, names, scores, crs), iou=0.99, area=None
    )
    assert (pairs.of_found == [0, 1]).all()


def test_labels_of_minus_110_degrees_lie_on_a_raster_of_250(tmp_path):
    place = Georeference((1e-4, 0, 250, 0, -1e-4, 40), pyproj.CRS(4326).to_wkt(), 4326)
    boxes = [shapely.box(-110 + 1e-3, 40 - 3e-3, -110 + 4e-3, 40 - 1e-3)]
    feature = {"type": "Feature", "properties": {"kind": "a"}, "geometry": shapely.geometry.mapping(boxes[0])}
    (tmp_path / "a.geojson").write_text(georeference.json.dumps({"type": "FeatureCollection", "features": [feature]}))
    notes: collections.Counter[str] = collections.Counter()
    labels = read_layer(str(tmp_path / "a.geojson"), class_field="kind", class_name=None, crs=None, notes=notes)
    (shape,) = shapes_in_pixels(labels, place, "a.tif", SIZE)
    np.testing.assert_allclose(shape.bounds, [10, 10, 40, 30], atol=1e-6)


def test_a_ring_around_a_pole_keeps_it():
    """The cap north of 80 degrees, with its area on the globe."""
    longitudes = (np.arange(0, 360, 5.0) + 182.5) % 360 - 180
    cap = mend_torn(shapely.multipolygons([shapely.Polygon(np.stack([longitudes, np.full(72, 80.0)], axis=1))]))
    assert cap.is_valid and np.abs(shapely.bounds(cap)[[0, 2]]).max() <= 180
    assert cap.area == pytest.approx(360 * 10, rel=1e-6)


def test_what_lies_elsewhere_stays_itself():
    shape = shapely.multipolygons([shapely.box(-180, 3, -179, 4), shapely.box(179, 3, 180, 4)])
    assert cut_at_180(shape) is shape and mend_torn(shape) is shape
