"""One layer for everything that is found on rasters: where it lies, what it says, and that adding to it is safe."""

import json
import sqlite3
import threading

import numpy as np
import pytest

rasterio = pytest.importorskip("rasterio")
pyogrio = pytest.importorskip("pyogrio")
pyproj = pytest.importorskip("pyproj")
shapely = pytest.importorskip("shapely")
pytest.importorskip("pyarrow")

from instseg_jax.geo.georeference import Georeference  # noqa: E402
from instseg_jax.geo.layer_files import read_layer_file  # noqa: E402
from instseg_jax.geo.shaping import Shaping  # noqa: E402
from instseg_jax.masks import encode_mask  # noqa: E402
from instseg_jax.results import layer as layer_room  # noqa: E402
from instseg_jax.results.layer import FIELDS, open_layer  # noqa: E402
from instseg_jax.results.result import Result  # noqa: E402
from instseg_jax.results.visualize import class_color  # noqa: E402

NAMES = ("house", "tree & bush")
ORIGIN = (500_000.0, 5_500_000.0)
SIDE = 0.5
AS_IT_IS = Shaping()
SUFFIXES = ("gpkg", "geojson", "fgb", "parquet")


def place(epsg=32633, east=0.0) -> Georeference:
    crs = rasterio.crs.CRS.from_epsg(epsg)
    return Georeference((SIDE, 0, ORIGIN[0] + east, 0, -SIDE, ORIGIN[1]), crs.to_wkt(), epsg)


def result(name="a.tif", *, where=None, count=2) -> Result:
    """A house with a court, 40 x 30 pixels, and a tree."""
    house, tree = np.zeros((100, 100), np.uint8), np.zeros((100, 100), np.uint8)
    house[10:40, 20:60] = 1
    house[20:30, 30:40] = 0
    y, x = np.mgrid[:100, :100]
    tree[(y - 70) ** 2 + (x - 70) ** 2 <= 15**2] = 1
    boxes = [{"label": NAMES[k], "cls_id": k, "score": 0.9 - k / 10, "coordinate": [0, 0, 9, 9]} for k in range(2)]
    masks = [encode_mask(house), encode_mask(tree)]
    return Result(name, (100, 100), boxes[:count], masks[:count], georeference=where or place())


def written(path, results, *, crs=None, shaping=AS_IT_IS, is_single=True):
    layer = open_layer(path, NAMES, crs, shaping, is_single=is_single)
    assert len(list(layer.follow(iter(results)))) == len(results)
    layer.write()
    return layer


def read(path):
    blobs, columns, crs = read_layer_file(path, None, FIELDS)
    return shapely.from_wkb(blobs), columns, pyproj.CRS.from_user_input(crs)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_holds_the_same(tmp_path, suffix):
    path = tmp_path / f"found.{suffix}"
    written(path, [result()])
    shapes, columns, crs = read(path)
    order = np.argsort(columns["cls_id"])  # FlatGeobuf sorts by place
    shapes = [shapes[k] for k in order]
    assert [columns["label"][k] for k in order] == list(NAMES)
    assert [columns["source"][k] for k in order] == ["a.tif"] * 2
    np.testing.assert_allclose([columns["score"][k] for k in order], [0.9, 0.8])
    to_utm = pyproj.Transformer.from_crs(crs, 32633, always_xy=True)
    ground = shapely.transform(np.array(shapes, object), lambda xy: np.stack(to_utm.transform(*xy.T), axis=1))
    court = shapely.box(ORIGIN[0] + 15, ORIGIN[1] - 15, ORIGIN[0] + 20, ORIGIN[1] - 10)
    house = shapely.box(ORIGIN[0] + 10, ORIGIN[1] - 20, ORIGIN[0] + 30, ORIGIN[1] - 5) - court
    assert (ground[0] & house).area / (ground[0] | house).area > 0.999
    scale = 0.9996**2  # of areas in the middle of a UTM zone
    assert columns["area_m2"][order[0]] == pytest.approx(house.area / scale, rel=1e-4)
    assert columns["perimeter_m"][order[0]] == pytest.approx(house.length / 0.9996, rel=1e-4)
    assert crs.equals(pyproj.CRS(4326)) == (suffix == "geojson")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rings_turn_as_the_formats_say(tmp_path, suffix):
    """Outer rings counter-clockwise: in GeoJSON by its RFC, in GeoParquet by what the file says of itself."""
    written(tmp_path / f"found.{suffix}", [result()])
    for shape in read(tmp_path / f"found.{suffix}")[0]:
        for part in shape.geoms:
            assert part.exterior.is_ccw and not any(hole.is_ccw for hole in part.interiors)


def test_geojson_is_what_the_rfc_asks_for(tmp_path):
    path = tmp_path / "found.geojson"
    written(path, [result()])
    content = json.loads(path.read_text())
    assert "crs" not in content and content["type"] == "FeatureCollection"
    for feature in content["features"]:
        for polygon in feature["geometry"]["coordinates"]:
            outer, *holes = (shapely.LinearRing(ring) for ring in polygon)
            assert outer.is_ccw and not any(hole.is_ccw for hole in holes)
            lon, lat = outer.coords[0]
            assert 14 < lon < 16 and 49 < lat < 50.5
    other = tmp_path / "utm.geojson"
    written(other, [result()], crs="EPSG:32633")
    assert "32633" in json.loads(other.read_text())["crs"]["properties"]["name"]


def test_rasters_in_several_crs_make_one_layer(tmp_path):
    to_zone = pyproj.Transformer.from_crs(32633, 32632, always_xy=True)
    x, y = to_zone.transform(*ORIGIN)
    crs = rasterio.crs.CRS.from_epsg(32632)
    here = Georeference((SIDE, 0, x, 0, -SIDE, y), crs.to_wkt(), 32632)
    written(tmp_path / "found.gpkg", [result("a.tif"), result("b.tif", where=here)], is_single=False)
    shapes, columns, crs = read(tmp_path / "found.gpkg")
    assert crs.to_epsg() == 32633 and list(columns["source"]) == ["a.tif"] * 2 + ["b.tif"] * 2
    corner = np.array(shapes[0].bounds) - np.array(shapes[2].bounds)
    assert np.abs(corner).max() < 3  # the axes of the zones differ by some degrees


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_command_again_changes_nothing_and_others_are_added(tmp_path, suffix):
    path = tmp_path / f"found.{suffix}"
    written(path, [result("a.tif"), result("b.tif", where=place(east=100))])
    written(path, [result("b.tif", where=place(east=100), count=1)])
    written(path, [result("c.tif", where=place(east=200))])
    _, columns, _ = read(path)
    assert sorted(columns["source"]) == ["a.tif", "a.tif", "b.tif", "c.tif", "c.tif"]


def test_two_that_write_at_once_lose_nothing(tmp_path, monkeypatch):
    path = tmp_path / "found.gpkg"
    write_layer, begun = layer_room.write_layer, []

    def write_late(*arguments, **options):
        if not begun:  # the other one begins when this one has read the file
            begun.append(threading.Thread(target=written, args=(path, [result("b.tif")])))
            begun[0].start()
            begun[0].join(0.5)
        return write_layer(*arguments, **options)

    monkeypatch.setattr(layer_room, "write_layer", write_late)
    written(path, [result("a.tif")])
    begun[0].join()
    assert sorted(read(path)[1]["source"]) == ["a.tif"] * 2 + ["b.tif"] * 2


def test_a_layer_of_somebody_else_stays_as_it_is(tmp_path):
    path = tmp_path / "trees.gpkg"
    pyogrio.raw.write(
        path, shapely.to_wkb(np.array([shapely.box(0, 0, 1, 1)], object)), [np.array([1])], ["height"],
        geometry_type="Polygon", crs="EPSG:4326", driver="GPKG",
    )  # fmt: skip
    before = path.read_bytes()
    with pytest.raises(ValueError, match="has no field 'label'"):  # before anything is predicted
        open_layer(path, NAMES, None, AS_IT_IS, is_single=True)
    with pytest.raises(ValueError, match="has no field 'label'"):
        written(path, [result()])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["trees.gpkg"]


def test_qgis_finds_index_and_style(tmp_path):
    written(tmp_path / "found.gpkg", [result()])
    database = sqlite3.connect(tmp_path / "found.gpkg")
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    assert "rtree_instances_geom" in tables
    asked = "SELECT f_table_name, styleQML, useAsDefault FROM layer_styles"
    name, style, is_default = database.execute(asked).fetchone()
    assert name == "instances" and is_default
    color = ",".join(map(str, class_color(1)))
    assert 'value="tree &amp; bush"' in style and f'value="{color},90"' in style
    written(tmp_path / "found.fgb", [result()])
    assert (tmp_path / "found.qml").read_text() == style


def test_simplified_outlines_say_how_far_they_moved(tmp_path):
    layer = written(tmp_path / "found.gpkg", [result()], shaping=Shaping(simplify=1.0))
    plain = written(tmp_path / "plain.gpkg", [result()])
    (shapes, _, _), (whole, _, _) = read(tmp_path / "found.gpkg"), read(tmp_path / "plain.gpkg")
    assert shapely.get_num_coordinates(shapes[1]) < shapely.get_num_coordinates(whole[1]) / 3
    off = [shapely.hausdorff_distance(one, other) for one, other in zip(shapes, whole, strict=True)]
    assert 0 < max(off) <= 1.001
    (line,) = [line for line in layer.say() if line.startswith("outlines simplified")]
    assert f"at most {max(off):.2f} m" in line and not any(line.startswith("outlines") for line in plain.say())
    assert len(shapes[0].geoms[0].interiors) == 1


def test_small_objects_are_left_out_and_counted(tmp_path):
    layer = written(tmp_path / "found.gpkg", [result()], shaping=Shaping(min_area=200.0))
    _, columns, _ = read(tmp_path / "found.gpkg")
    assert list(columns["label"]) == ["house"] and "1 objects of less than 200 m2" in "\n".join(layer.say())


def test_pictures_without_a_place_are_named(tmp_path):
    lost = result("c.png", where=Georeference((1, 0, 0, 0, -1, 0), None, None))
    layer = written(tmp_path / "found.gpkg", [lost, result()])
    assert layer.say()[-1] == "not in the layer, they don't say where they lie, or have no way to it: c.png"
    assert len(read(tmp_path / "found.gpkg")[0]) == 2


def test_a_crs_without_a_way_to_the_others_ends_nothing(tmp_path):
    local = Georeference((1, 0, 0, 0, -1, 0), 'LOCAL_CS["drawing",UNIT["metre",1]]', None)
    layer = written(
        tmp_path / "found.gpkg", [result(), result("drawing.tif", where=local), result("c.tif", where=place(east=100))]
    )
    assert layer.say()[-1].endswith(": drawing.tif") and len(read(tmp_path / "found.gpkg")[0]) == 4
    alone = written(tmp_path / "alone.gpkg", [result("drawing.tif", where=local)], shaping=Shaping(simplify=1.0))
    blobs, columns, _ = read_layer_file(tmp_path / "alone.gpkg", None, FIELDS)
    assert len(blobs) == 2 and np.isnan(columns["area_m2"].astype(float)).all() and not alone.unplaced


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_found_is_an_empty_layer(tmp_path, suffix):
    written(tmp_path / f"found.{suffix}", [result(count=0)])
    assert len(read(tmp_path / f"found.{suffix}")[0]) == 0


def test_errors_say_what_is_allowed(tmp_path):
    with pytest.raises(ValueError, match=r"\.gpkg, \.geojson, .* is none of them"):
        open_layer(tmp_path / "found.shp", NAMES, None, AS_IT_IS, is_single=True)
    with pytest.raises(ValueError, match="--smooth is -1, it must be at least 0"):
        open_layer(tmp_path / "found.gpkg", NAMES, None, Shaping(smooth=-1.0), is_single=True)
    with pytest.raises(ValueError, match="The CRS 'EPSG:1' is unknown"):
        open_layer(tmp_path / "found.gpkg", NAMES, "EPSG:1", AS_IT_IS, is_single=True)


def test_houses_are_squared_and_trees_are_rounded(tmp_path):
    shaping = Shaping(smooth=1.0, regularize=1.0, regularize_classes=("house",))
    layer = written(tmp_path / "found.gpkg", [result()], shaping=shaping)
    shapes, _, _ = read(tmp_path / "found.gpkg")
    assert shapely.get_num_coordinates(shapes[0]) == 5 + 5  # with its court
    told = [line.split(",")[0] for line in layer.say() if line.startswith("outlines")]
    assert told == ["outlines regularized: 1 of 2", "outlines smoothed: 1 of 2"]


def test_what_rasters_that_overlap_both_show_is_one_feature(tmp_path):
    """The surer one, or the whole one where a raster's border cuts the other."""
    surer = result("b.tif")
    for box in surer.boxes:
        box["score"] += 0.05
    cut = result("c.tif", count=1)  # half of the house, and very sure
    cut.boxes[0]["score"] = 0.99
    half = np.zeros((100, 100), np.uint8)
    half[10:40, 20:34] = 1
    cut.masks[0] = encode_mask(half)
    beside = result("d.tif", where=place(east=12), count=1)  # covers little of the house
    layer = written(tmp_path / "found.gpkg", [result(), surer, cut, beside])
    _, columns, _ = read(tmp_path / "found.gpkg")
    assert list(columns["source"]) == ["b.tif", "b.tif", "d.tif"]
    assert list(columns["label"]) == ["house", "tree & bush", "house"]
    assert layer.say()[0].endswith(", 3 features of 4 rasters") and layer.say()[1].startswith("3 objects of rasters")
    written(tmp_path / "all.gpkg", [result(), surer, cut, beside], is_single=False)
    assert len(read(tmp_path / "all.gpkg")[0]) == 6


def test_two_objects_of_one_raster_are_never_doubles(tmp_path):
    twice = result()
    twice.boxes[1] = twice.boxes[0] | {"score": 0.3}
    twice.masks[1] = twice.masks[0]
    written(tmp_path / "found.gpkg", [twice, result("b.tif", where=place(east=500))])
    assert len(read(tmp_path / "found.gpkg")[0]) == 4
