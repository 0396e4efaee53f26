"""Maps: where a pixel lies on the ground, to a tenth of a pixel and better; files that GIS programs read."""

import contextlib
import importlib.util
import json
import sqlite3

import numpy as np
import pytest
from fake_model import make_pipeline, picture
from pycocotools import mask as mask_api
from turned_pictures import turned, with_orientation

from instseg_jax import images
from instseg_jax.geo import georeference
from instseg_jax.geo.georeference import Georeference
from instseg_jax.geo.rasters import RasterImage, write_geotiff
from instseg_jax.masks import encode_mask
from instseg_jax.results.result import Result
from instseg_jax.windows import Window

rasterio = pytest.importorskip("rasterio")
features = pytest.importorskip("rasterio.features")
warp = pytest.importorskip("rasterio.warp")

# Half a metre a pixel, turned by about 10 degrees, in UTM zone 33.
TURNED = (
    rasterio.Affine.translation(500_000, 5_000_000) @ rasterio.Affine.rotation(-10) @ rasterio.Affine.scale(0.5, -0.5)
)
SQUARE = (0, 10, 20, 30, 50)


def write_raster(path, pixels, *, crs="EPSG:32633", transform=TURNED, **options):
    bands = np.moveaxis(pixels, -1, 0)
    with rasterio.open(
        path, "w", driver="GTiff", height=pixels.shape[0], width=pixels.shape[1], count=len(bands),
        dtype=pixels.dtype.name, crs=crs, transform=transform, **options,
    ) as file:  # fmt: skip
        file.write(bands)
    return path


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


def with_hole() -> np.ndarray:
    image = picture(SQUARE, size=(150, 200))
    image[30:36, 15:25] = 110
    return image


@pytest.mark.parametrize("tile", [None, 64])
def test_round_trip_to_a_tenth_of_a_pixel(tmp_path, pipe, tile):
    """Found in a GeoTIFF, written as GeoJSON, burnt into the same grid by rasterio: the same pixels."""
    if tile is None:
        image = picture(SQUARE)
        image[30:36, 15:25] = 110
    else:
        image = with_hole()
    path = write_raster(tmp_path / "field.tif", image)
    (result,) = pipe.predict(path, tile=tile, overlap=0.25)
    content = json.loads(georeference.write_geojson(tmp_path / "field.geojson", result).read_text())
    (feature,) = content["features"]
    assert "crs" not in content  # WGS 84, as RFC 7946 has it
    assert np.abs(np.array(feature["geometry"]["coordinates"][0][0]) - [15.0, 45.15]).max() < 0.01
    geometry = warp.transform_geom("EPSG:4326", "EPSG:32633", feature["geometry"])
    ((outer, hole),) = geometry["coordinates"]
    assert outer[0] == outer[-1] and len(outer) == 5 and len(hole) == 5
    corners = {tuple(np.round(~TURNED @ point, 2)) for point in outer}
    assert np.abs(np.array(sorted(corners)) - sorted([(10, 20), (30, 20), (10, 50), (30, 50)])).max() < 0.1
    burnt = features.rasterize([geometry], image.shape[:2], transform=TURNED)
    np.testing.assert_array_equal(burnt, mask_api.decode(result.masks[0]))
    properties = feature["properties"]
    assert properties["label"] == "red" and properties["area_px"] == 20 * 30 - 60
    assert properties["area_m2"] == pytest.approx(540 * 0.25, rel=2e-3)  # UTM is 0.04 % too small in its middle


def test_square_metres_are_those_of_the_ground(tmp_path):
    """Web Mercator stretches areas by 1 / cos(latitude)^2: at 60 degrees north four times."""
    import math

    mask = np.zeros((100, 100), bool)
    mask[20:60, 10:50] = True
    y = math.log(math.tan(math.pi / 4 + math.radians(60) / 2)) * 6378137
    mercator = rasterio.crs.CRS.from_epsg(3857)
    place = Georeference((1.0, 0.0, 1_000_000.0, 0.0, -1.0, y), mercator.to_wkt(), 3857)
    box = {"cls_id": 0, "label": "red", "score": 0.9, "coordinate": [10, 20, 50, 60]}
    (feature,) = georeference.to_geojson(Result("a.tif", (100, 100), [box], [encode_mask(mask)], georeference=place))[
        "features"
    ]
    assert feature["properties"]["area_m2"] == pytest.approx(1600 / 4, rel=5e-3)
    degrees = Georeference((1e-5, 0.0, 15.0, 0.0, -1e-5, 45.0), rasterio.crs.CRS.from_epsg(4326).to_wkt(), 4326)
    content = georeference.to_geojson(Result("a.tif", (100, 100), [box], [encode_mask(mask)], georeference=degrees))
    # A degree at 45 north is 111,132 m of latitude and 78,847 m of longitude.
    assert content["features"][0]["properties"]["area_m2"] == pytest.approx(1600 * 1.11132 * 0.78847, rel=1e-3)
    assert "crs" not in content


def test_rings_run_as_geojson_wants_them(tmp_path, pipe):
    shapely = pytest.importorskip("shapely.geometry")
    (result,) = pipe.predict(write_raster(tmp_path / "field.tif", with_hole()), tile=64)
    shape = shapely.shape(georeference.to_geojson(result)["features"][0]["geometry"])
    (part,) = shape.geoms
    assert shape.is_valid and part.exterior.is_ccw and not part.interiors[0].is_ccw


def test_a_picture_without_a_place_is_in_pixels():
    mask = np.zeros((20, 20), bool)
    mask[2:5, 3:9] = True
    box = {"cls_id": 0, "label": "red", "score": 0.9, "coordinate": [3, 2, 9, 5]}
    content = georeference.to_geojson(Result("a.png", (20, 20), [box], [encode_mask(mask)]))
    ((ring,),) = content["features"][0]["geometry"]["coordinates"]
    assert {tuple(p) for p in ring} == {(3, 2), (9, 2), (9, 5), (3, 5)}
    assert content["features"][0]["properties"]["area_m2"] is None and "crs" not in content


def test_geopackage(tmp_path, pipe):
    pyogrio, shapely = pytest.importorskip("pyogrio"), pytest.importorskip("shapely")
    (result,) = pipe.predict(write_raster(tmp_path / "field.tif", with_hole()), tile=64)
    path = georeference.write_geopackage(tmp_path / "field.gpkg", result)
    meta, _, blobs, columns = pyogrio.raw.read(path, layer="instances")
    found = dict(zip(meta["fields"], columns, strict=True))
    assert pyogrio.read_info(path)["crs"] == "EPSG:32633"
    assert found["label"].tolist() == ["red"] and found["area_px"].tolist() == [540]
    assert found["area_m2"][0] == pytest.approx(540 * 0.25, rel=2e-3)
    ((parts, _),) = georeference.ground_features(result)
    expected = shapely.MultiPolygon([(rings[0], rings[1:]) for rings in parts])
    assert shapely.from_wkb(blobs[0]).equals(expected)
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT COUNT(*) FROM rtree_instances_geom").fetchone() == (1,)  # the spatial index
    again = georeference.write_geopackage(tmp_path / "again.gpkg", result)
    assert again.read_bytes() == path.read_bytes()


def test_a_geopackage_is_written_some_features_at_a_time(tmp_path, pipe, monkeypatch):
    pyogrio = pytest.importorskip("pyogrio")
    squares = [(0, 10 + 30 * k, 20, 30 + 30 * k, 50) for k in range(5)]
    (result,) = pipe.predict(write_raster(tmp_path / "field.tif", picture(*squares, size=(80, 200))), tile=64)
    monkeypatch.setattr(georeference, "AT_ONCE", 2)
    path = georeference.write_geopackage(tmp_path / "field.gpkg", result)
    assert len(result) == 5 and pyogrio.read_info(path)["features"] == 5


def test_an_empty_geopackage(tmp_path):
    pyogrio = pytest.importorskip("pyogrio")
    path = georeference.write_geopackage(tmp_path / "none.gpkg", Result("a.png", (20, 20), [], []))
    said = pyogrio.read_info(path, layer="instances")
    assert said["features"] == 0 and list(said["fields"]) == ["label", "cls_id", "score", "area_px", "area_m2"]


# --- reading -------------------------------------------------------------------------------------------------------


def test_windows_of_a_raster_are_its_pixels(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (90, 70, 4)).astype(np.uint8)
    raster = RasterImage(write_raster(tmp_path / "a.tif", pixels, tiled=True, blockxsize=32, blockysize=32))
    assert raster.size == (90, 70) and raster.georeference.epsg == 32633
    np.testing.assert_array_equal(raster.read(Window(10, 20, 30, 40)), pixels[20:60, 10:40, :3])
    beyond = raster.read(Window(50, 60, 64, 64))
    np.testing.assert_array_equal(beyond[:30, :20], pixels[60:, 50:, :3])
    assert beyond.shape == (64, 64, 3) and not beyond[30:].any() and not beyond[:, 20:].any()
    np.testing.assert_array_equal(raster.picture(), pixels[..., :3])
    # A smooth picture: GDAL's mean takes in neighbours at the borders of blocks.
    smooth = np.add.outer(np.arange(90), np.arange(70)).astype(np.uint8)[..., None].repeat(3, axis=2)
    view = RasterImage(write_raster(tmp_path / "b.tif", smooth, tiled=True, blockxsize=32, blockysize=32)).view(45)
    assert view.shape == (45, 35, 3)
    np.testing.assert_allclose(view, smooth.reshape(45, 2, 35, 2, 3).mean(axis=(1, 3)), atol=2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_raster_is_read_and_placed_as_it_is_shown(tmp_path, orientation):
    stored = np.random.default_rng(0).integers(0, 256, (40, 70, 3)).astype(np.uint8)
    path = write_raster(tmp_path / "a.tif", stored, photometric="RGB")
    path.write_bytes(with_orientation(path.read_bytes(), orientation))
    raster, shown = RasterImage(path), turned(stored, orientation)
    assert raster.size == shown.shape[:2]
    np.testing.assert_array_equal(raster.whole(), shown)
    np.testing.assert_array_equal(raster.picture(), shown)
    np.testing.assert_array_equal(raster.read(Window(3, 5, 20, 30)), shown[5:35, 3:23])
    np.testing.assert_array_equal(raster.whole(), images.read_image(path))
    # A pixel lies where it lay: centres of all, by the way that the pixels themselves went.
    y, x = np.mgrid[:40, :70] + 0.5
    wanted = (
        Georeference(tuple(TURNED)[:6], None, None).to_ground(np.stack([x.ravel(), y.ravel()], 1)).reshape(40, 70, 2)
    )
    y, x = np.mgrid[: shown.shape[0], : shown.shape[1]] + 0.5
    found = raster.georeference.to_ground(np.stack([x.ravel(), y.ravel()], 1))
    np.testing.assert_allclose(found.reshape(*shown.shape[:2], 2), turned(wanted, orientation), atol=1e-6)


def test_sixteen_bits_are_stretched_the_same_everywhere(tmp_path):
    pixels = np.tile(np.linspace(200, 3000, 100).astype(np.uint16)[None, :, None], (80, 1, 1))
    raster = RasterImage(write_raster(tmp_path / "a.tif", pixels))
    whole = raster.read(Window(0, 0, 100, 80))
    np.testing.assert_array_equal(whole[:, 40:60], raster.read(Window(40, 0, 20, 80)))
    assert whole[0, 0, 0] == 0 and whole[0, -1, 0] == 255 and (np.diff(whole[0, :, 0].astype(int)) >= 0).all()


def test_a_broken_raster_is_told(tmp_path, pipe):
    (tmp_path / "a.tif").write_bytes(b"II*\0 nothing")
    with pytest.raises(ValueError, match=r"a\.tif' can't be read as an image"):
        list(pipe.predict(tmp_path / "a.tif", tile=64))


def test_a_place_of_its_own_crs_is_kept(tmp_path, pipe):
    """A CRS without EPSG number, and none at all."""
    local = "+proj=tmerc +lat_0=48 +lon_0=11 +ellps=GRS80 +units=m"
    (result,) = pipe.predict(
        write_raster(tmp_path / "a.tif", with_hole(), crs=rasterio.crs.CRS.from_proj4(local)), tile=64
    )
    content = georeference.to_geojson(result)
    assert "crs" not in content and 11 < content["features"][0]["geometry"]["coordinates"][0][0][0][0] < 180
    if importlib.util.find_spec("pyogrio"):
        assert georeference.write_geopackage(tmp_path / "a.gpkg", result).stat().st_size > 0
    (result,) = pipe.predict(write_raster(tmp_path / "b.tif", with_hole(), crs=None), tile=64)
    (feature,) = georeference.to_geojson(result)["features"]
    assert feature["properties"]["area_m2"] is None and feature["geometry"]["coordinates"][0][0][0][0] > 400_000


def test_a_place_without_a_way_to_the_globe_stays_where_it_is():
    mask = np.zeros((20, 20), bool)
    mask[2:5, 3:9] = True
    box = {"cls_id": 0, "label": "red", "score": 0.9, "coordinate": [3, 2, 9, 5]}
    site = Georeference((1.0, 0.0, 100.0, 0.0, -1.0, 50.0), 'LOCAL_CS["site",UNIT["metre",1]]', None)
    content = georeference.to_geojson(Result("a.tif", (20, 20), [box], [encode_mask(mask)], georeference=site))
    assert "site" in content["crs"]["properties"]["name"]
    ((ring,),) = content["features"][0]["geometry"]["coordinates"]
    assert {tuple(p) for p in ring} == {(103, 48), (109, 48), (109, 45), (103, 45)}


def test_an_instance_on_the_border_of_the_world_is_cut_there():
    mask = np.zeros((20, 40), bool)
    mask[5:10, 5:35] = True
    box = {"cls_id": 0, "label": "red", "score": 0.9, "coordinate": [5, 5, 35, 10]}
    wkt = rasterio.crs.CRS.from_epsg(32660).to_wkt()
    x = warp.transform("EPSG:4326", "EPSG:32660", [180.0], [0.0])[0][0]
    place = Georeference((100.0, 0.0, x - 2000, 0.0, -100.0, 1000.0), wkt, 32660)
    content = georeference.to_geojson(Result("a.tif", (20, 40), [box], [encode_mask(mask)], georeference=place))
    east, west = (np.array(ring) for (ring,) in content["features"][0]["geometry"]["coordinates"])
    assert west[:, 0].max() == 180 and west[:, 0].min() > 179.9
    assert east[:, 0].min() == -180 and east[:, 0].max() < -179.9


def test_a_written_geotiff_lies_where_it_was_told(tmp_path):
    pixels = with_hole()
    path = write_geotiff(tmp_path / "a.tif", pixels, epsg=32632, origin=(395_000.0, 5_268_000.0), pixel_size=0.2)
    with rasterio.open(path) as file:
        assert file.crs.to_epsg() == 32632 and file.profile["tiled"]
        assert file.xy(0, 0) == pytest.approx((395_000.1, 5_267_999.9))  # the middle of the first pixel
        np.testing.assert_array_equal(np.moveaxis(file.read(), 0, -1), pixels)
    raster = RasterImage(path)
    assert raster.is_plain and raster.georeference.epsg == 32632
    np.testing.assert_array_equal(raster.whole(), pixels)
    with pytest.raises(ValueError, match="uint8"):
        write_geotiff(path, pixels.astype(float), epsg=32632, origin=(0, 0), pixel_size=1)
    with pytest.raises(ValueError, match="pixel_size is 0"):
        write_geotiff(path, pixels, epsg=32632, origin=(0, 0), pixel_size=0)


VRT = """<VRTDataset rasterXSize="8" rasterYSize="8"><VRTRasterBand dataType="Byte" band="1">
<SimpleSource><SourceFilename relativeToVRT="0">{}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>
</VRTRasterBand></VRTDataset>"""


@pytest.mark.parametrize("name", ["evil.tif", "evil.tiff"])
def test_a_tiff_is_one_by_its_content(tmp_path, pipe, name):
    """Text of another GDAL driver in a .tif would read other files of the machine, or the network."""
    write_raster(tmp_path / "secret.tif", with_hole())
    (tmp_path / name).write_text(VRT.format(tmp_path / "secret.tif"))
    with rasterio.open(tmp_path / name) as file:
        assert file.driver == "VRT"  # left to itself, GDAL would follow it
    with pytest.raises(ValueError, match=name):
        list(pipe.predict(tmp_path / name))
    results = list(pipe.predict([tmp_path / name, tmp_path / "secret.tif"]))
    assert results[0].error is not None and results[1].error is None


def test_a_crs_without_a_way_to_the_globe_has_its_map_and_no_area(tmp_path, pipe):
    local = 'LOCAL_CS["unknown",UNIT["metre",1]]'
    crs = rasterio.crs.CRS.from_wkt(local)
    (result,) = pipe.predict(write_raster(tmp_path / "a.tif", with_hole(), crs=crs), tile=64)
    (feature,) = georeference.to_geojson(result)["features"]
    assert feature["properties"]["area_m2"] is None and feature["geometry"]["coordinates"]


@pytest.mark.parametrize("latitude", [5.0, 48.0, 71.0])
def test_areas_of_large_objects_are_geodesic(latitude):
    pyproj = pytest.importorskip("pyproj")
    place = Georeference((0.01, 0.0, 10.0, 0.0, -0.01, latitude), rasterio.crs.CRS.from_epsg(4326).to_wkt(), 4326)
    mask = np.zeros((600, 900), np.uint8)
    mask[50:550, 100:800] = 1  # 7 by 5 degrees
    box = {"cls_id": 0, "label": "lake", "score": 0.9, "coordinate": [100, 50, 800, 550]}
    (feature,) = georeference.to_geojson(Result("a.tif", (600, 900), [box], [encode_mask(mask)], georeference=place))[
        "features"
    ]
    x, y = np.array([[11, 18, 18, 11], [latitude - 0.5, latitude - 0.5, latitude - 5.5, latitude - 5.5]])
    # Edges run along parallels, as in the picture, not along geodesics: many points make them so.
    along = np.linspace(0, 1, 500, endpoint=False)[:, None]
    corners = np.stack([x, y], axis=1)
    ring = np.concatenate([a + (b - a) * along for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True)])
    wanted = abs(pyproj.Geod(ellps="WGS84").polygon_area_perimeter(ring[:, 0], ring[:, 1])[0])
    assert feature["properties"]["area_m2"] == pytest.approx(wanted, rel=0.01)


def area_of(place: Georeference, size: tuple[int, int], rectangle: tuple[int, int, int, int]) -> float | None:
    """The area in square metres of a rectangle x1, y1, x2, y2 of pixels."""
    x1, y1, x2, y2 = rectangle
    mask = np.zeros(size, np.uint8)
    mask[y1:y2, x1:x2] = 1
    box = {"cls_id": 0, "label": "lake", "score": 0.9, "coordinate": list(map(float, rectangle))}
    result = Result("a.tif", size, [box], [encode_mask(mask)], georeference=place)
    return georeference.to_geojson(result)["features"][0]["properties"]["area_m2"]


@pytest.mark.parametrize(
    "rectangle",
    [(100, 145, 29, 30), (10, 350, 20, 160), (0, 360, 0, 180), (0, 180, 0, 90), (340, 360, 80, 100)],
    ids=["45 degrees at 60 N", "nearly the globe", "the globe", "an eighth", "to the antimeridian"],
)
def test_areas_of_degrees_are_those_of_zones(rectangle):
    """Against the closed form of a zone of the ellipsoid, for objects as large as the world; pixels of a degree."""
    west, east, north, south = rectangle
    place = Georeference((1.0, 0.0, -180.0, 0.0, -1.0, 90.0), rasterio.crs.CRS.from_epsg(4326).to_wkt(), 4326)
    axis, e2 = 6378137.0, 0.0066943799901413165
    sines = np.sin(np.radians([90 - north, 90 - south]))
    e = np.sqrt(e2)
    zone = np.log((1 + e * sines) / (1 - e * sines)) / (2 * e) + sines / (1 - e2 * sines**2)
    wanted = axis**2 * (1 - e2) / 2 * np.radians(east - west) * (zone[0] - zone[1])
    found = area_of(place, (180, 360), (west, north, east, south))
    assert found == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("epsg", "transform", "rectangle"),
    [
        (32633, (10, 0, 500_000, 0, -10, 5_500_000), (50, 50, 450, 400)),
        (3857, (40_000, 0, -15_000_000, 0, -40_000, 9_000_000), (5, 5, 700, 225)),
        (3031, (10_000, 0, -3e6, 0, -10_000, 3e6), (50, 100, 550, 500)),  # around the pole
        (3031, (10_000, 0, -3e6, 0, -10_000, 3e6), (350, 100, 550, 250)),  # beside it
        (3413, (10_000, 0, -3e6, 0, -10_000, 3e6), (50, 50, 250, 250)),  # over the antimeridian
    ],
)
def test_areas_of_projected_rasters_are_geodesic(epsg, transform, rectangle):
    pyproj = pytest.importorskip("pyproj")
    place = Georeference(transform, rasterio.crs.CRS.from_epsg(epsg).to_wkt(), epsg)
    x1, y1, x2, y2 = rectangle
    along = np.linspace(0, 1, 1000, endpoint=False)[:, None]
    corners = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], float)
    ring = np.concatenate([a + (b - a) * along for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True)])
    to_degrees = pyproj.Transformer.from_crs(epsg, 4326, always_xy=True)
    longitudes, latitudes = to_degrees.transform(*place.to_ground(ring).T)
    wanted = abs(pyproj.Geod(ellps="WGS84").polygon_area_perimeter(longitudes, latitudes)[0])
    assert area_of(place, (600, 750), rectangle) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("crs", "transform", "rectangle", "is_known"),
    [
        ("+proj=longlat +R=1737400 +no_defs", (0.1, 0, 0, 0, -0.1, 20), (10, 10, 100, 100), False),  # the moon
        ("+proj=geos +h=35785831 +sweep=y", (15_000, 0, -5.5e6, 0, -15_000, 5.5e6), (0, 0, 80, 80), False),
        ("+proj=geos +h=35785831 +sweep=y", (15_000, 0, -5.5e6, 0, -15_000, 5.5e6), (240, 240, 440, 440), True),
        # The middle of the image off the disc, the object on it.
        ("+proj=geos +h=35785831 +sweep=y", (15_000, 0, 0, 0, -15_000, 1e6), (10, 10, 60, 60), True),
        ("+proj=utm +zone=33", (1000, 0, 2.5e7, 0, -1000, 5.5e6), (50, 50, 450, 400), False),
        ("+proj=longlat", (1, 0, 0, 0, -1, 120), (10, 10, 100, 100), False),  # beyond the pole
    ],
)
def test_an_area_is_null_rather_than_wrong(caplog, crs, transform, rectangle, is_known):
    wkt = rasterio.crs.CRS.from_proj4(crs).to_wkt()
    if "1737400" in crs:
        wkt = wkt.replace('"unknown"', '"Moon 2000"')
    area = area_of(Georeference(transform, wkt, None), (750, 750), rectangle)
    assert (area is not None) == is_known
    assert ("no way to the globe" in caplog.text) != is_known
