"""Rasters and drawn layers become training pictures: every trap of maps, each with the right answer known."""

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

rasterio = pytest.importorskip("rasterio")
pyogrio = pytest.importorskip("pyogrio")
pyproj = pytest.importorskip("pyproj")
shapely = pytest.importorskip("shapely")

from instseg_jax.cli import main  # noqa: E402
from instseg_jax.geo.layer_files import write_layer as write_layer_file  # noqa: E402
from instseg_jax.outlines import rle_to_polygons  # noqa: E402

SIDE = 128
UTM, MERCATOR, FEET = 32616, 3857, 2264
ORIGIN = {UTM: (500_000.0, 3_700_000.0), MERCATOR: (1_000_000.0, 8_399_737.9), FEET: (1_500_000.0, 600_000.0)}
HOLE = ((80, 20), (120, 20), (120, 60), (80, 60))
INNER = ((95, 35), (105, 35), (105, 45), (95, 45))
OBJECTS = {  # in pixels: a triangle, a square with a hole, and one of two parts
    "tree": shapely.Polygon([(10, 10), (60, 20), (30, 55)]),
    "house": shapely.Polygon(HOLE, [INNER]),
    "car": shapely.MultiPolygon([shapely.box(15, 80, 45, 110), shapely.box(55, 80, 70, 110)]),
}


@pytest.fixture(autouse=True)
def no_second_start(monkeypatch):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")


def scene() -> np.ndarray:
    """Objects of brightness 200 on ground of 50, [SIDE, SIDE]."""
    canvas = np.full((SIDE, SIDE), 50, np.uint8)
    canvas[truth("tree") | truth("house") | truth("car")] = 200
    return canvas


def truth(name: str) -> np.ndarray:
    """The pixels whose centres lie in an object."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    return shapely.contains_xy(OBJECTS[name], x, y)


def north_up(epsg: int, size: float = 1.0):
    return rasterio.Affine(size, 0, ORIGIN[epsg][0], 0, -size, ORIGIN[epsg][1])


def write_raster(path: Path, pixels: np.ndarray, crs, transform, *, after=lambda file: None, **more) -> Path:
    bands = pixels[None] if pixels.ndim == 2 else pixels
    shape = {"height": bands.shape[1], "width": bands.shape[2], "count": len(bands), "dtype": bands.dtype}
    place = {} if transform is None else {"crs": crs, "transform": transform}
    with rasterio.open(path, "w", driver="GTiff", **shape, **place, **more) as file:
        file.write(bands)
        after(file)
    return path


def write_layer(path: Path, shapes: dict, transform, crs, to=None, driver="GPKG") -> Path:
    """Shapes in pixels as a layer in the CRS `to` (default: that of the raster)."""
    step = None if to in (None, crs) else pyproj.Transformer.from_crs(crs, to, always_xy=True)

    def place(xy):
        a, b, c, d, e, f = tuple(transform)[:6]
        x, y = a * xy[:, 0] + b * xy[:, 1] + c, d * xy[:, 0] + e * xy[:, 1] + f
        return np.stack(step.transform(x, y) if step else (x, y), axis=1)

    placed = [
        shapely.transform(shapely.segmentize(shape, 2.0) if shape.is_valid else shape, place)
        for shape in shapes.values()
    ]
    names = np.array([name.split("#")[0] for name in shapes], object)
    known = None if to is None and crs is None else f"EPSG:{to or crs}"
    pyogrio.raw.write(
        path, shapely.to_wkb(np.array(placed, object)), [names], ["kind"], geometry_type="Unknown", crs=known,
        driver=driver,
    )  # fmt: skip
    return path


def cut(folder: Path, raster: Path, layer: Path, *more: str) -> dict:
    """What `convert` writes."""
    named = [f"--rasters={raster}", f"--labels={layer}", f"--save_path={folder / 'out'}"]
    if not any(option.startswith("--class_name") for option in more):
        named.append("--class_field=kind")
    assert main(["convert", "--src_dataset_type=geo", f"--tile={SIDE}", *named, *more]) == 0
    return json.loads((folder / "out" / "annotations" / "instance_train.json").read_text())


def masks_of(content: dict, image: dict) -> dict[str, np.ndarray]:
    names = {category["id"]: category["name"] for category in content["categories"]}
    found = {}
    for entry in content["annotations"]:
        if entry["image_id"] == image["id"] and not entry["iscrowd"]:
            rle = entry["segmentation"]
            if isinstance(rle, list):
                rle = coco_mask.merge(coco_mask.frPyObjects(rle, image["height"], image["width"]))
            found[names[entry["category_id"]]] = coco_mask.decode(rle).astype(bool)
    return found


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


def check_whole(folder: Path, content: dict, view=lambda x: x, contrast: float = 100) -> None:
    """One picture with the three objects where they are, and the pixels that belong there."""
    (image,) = content["images"]
    picture = cv2.imread(str(folder / "out" / "images" / image["file_name"]))[..., ::-1].astype(float)
    found = masks_of(content, image)
    assert found.keys() == OBJECTS.keys()
    for name, mask in found.items():
        assert iou(mask, view(truth(name))) > 0.93, name
        inside = cv2.erode(mask.astype(np.uint8), np.ones((3, 3))).astype(bool)
        assert picture[inside].mean() - picture[~view(truth_of_all())].mean() > contrast, name


def truth_of_all() -> np.ndarray:
    return truth("tree") | truth("house") | truth("car")


@pytest.mark.parametrize(
    ("to", "driver", "suffix"),
    [
        (UTM, "GPKG", "gpkg"),
        (MERCATOR, "GPKG", "gpkg"),  # another CRS
        (4326, "GPKG", "gpkg"),  # whose axes are latitude, longitude by its definition
        (4326, "GeoJSON", "geojson"),
        (4326, "ESRI Shapefile", "shp"),
        (MERCATOR, "GeoJSON", "geojson"),  # with a crs member
    ],
)
def test_a_layer_in_any_crs(tmp_path, to, driver, suffix):
    raster = write_raster(tmp_path / "a.tif", scene(), UTM, north_up(UTM))
    layer = write_layer(tmp_path / f"a.{suffix}", OBJECTS, north_up(UTM), UTM, to, driver)
    check_whole(tmp_path, cut(tmp_path, raster, layer))


def test_geojson_that_says_no_crs_and_is_not_in_wgs_84(tmp_path, caplog):
    raster = write_raster(tmp_path / "a.tif", scene(), UTM, north_up(UTM))
    layer = write_layer(tmp_path / "a.geojson", OBJECTS, north_up(UTM), UTM, UTM, "GeoJSON")
    said = json.loads(layer.read_text())
    del said["crs"]
    layer.write_text(json.dumps(said))
    check_whole(tmp_path, cut(tmp_path, raster, layer))
    assert "says no CRS" in caplog.text


def test_a_layer_that_can_lie_anywhere_is_asked_for(tmp_path, capsys):
    raster = write_raster(tmp_path / "a.tif", scene(), UTM, north_up(UTM))
    layer = write_layer(tmp_path / "a.geojson", OBJECTS, north_up(UTM), UTM, 32617, "GeoJSON")
    said = json.loads(layer.read_text())
    del said["crs"]
    layer.write_text(json.dumps(said))
    options = [f"--rasters={raster}", f"--labels={layer}", "--class_field=kind", f"--save_path={tmp_path / 'out'}"]
    assert main(["convert", "--src_dataset_type=geo", *options]) != 0
    assert "--labels_crs=EPSG:" in capsys.readouterr().err and not (tmp_path / "out").exists()
    check_whole(tmp_path, cut(tmp_path, raster, layer, "--labels_crs=EPSG:32617"))


def test_a_shapefile_without_prj_lies_in_the_rasters_crs(tmp_path):
    raster = write_raster(tmp_path / "a.tif", scene(), UTM, north_up(UTM))
    layer = write_layer(tmp_path / "a.shp", OBJECTS, north_up(UTM), UTM, UTM, "ESRI Shapefile")
    layer.with_suffix(".prj").unlink()
    check_whole(tmp_path, cut(tmp_path, raster, layer))


@pytest.mark.parametrize("angle", [30, 90, 180])
def test_rotated(tmp_path, angle):
    transform = north_up(UTM) * rasterio.Affine.rotation(angle)
    raster = write_raster(tmp_path / "a.tif", scene(), UTM, transform)
    check_whole(tmp_path, cut(tmp_path, raster, write_layer(tmp_path / "a.gpkg", OBJECTS, transform, UTM, 4326)))


def test_south_up(tmp_path):
    transform = rasterio.Affine(1, 0, ORIGIN[UTM][0], 0, 1, ORIGIN[UTM][1])
    raster = write_raster(tmp_path / "a.tif", scene(), UTM, transform)
    check_whole(tmp_path, cut(tmp_path, raster, write_layer(tmp_path / "a.gpkg", OBJECTS, transform, UTM, 4326)))


def test_ground_control_points(tmp_path):
    transform = north_up(UTM)
    corners = [(0, 0), (0, SIDE), (SIDE, 0), (SIDE, SIDE)]

    def place(file):
        points = [rasterio.control.GroundControlPoint(y, x, *(transform * (x, y))) for x, y in corners]
        file.gcps = points, rasterio.crs.CRS.from_epsg(UTM)

    raster = write_raster(tmp_path / "a.tif", scene(), None, None, after=place)
    check_whole(tmp_path, cut(tmp_path, raster, write_layer(tmp_path / "a.gpkg", OBJECTS, transform, UTM, 4326)))


# Metres on the ground of a pixel of one unit; the Mercator map is stretched by 1 / cos(latitude), 60 degrees.
@pytest.mark.parametrize(
    ("epsg", "transform", "metres"),
    [
        (UTM, north_up(UTM), 0.9996),  # the scale on its middle meridian
        (MERCATOR, north_up(MERCATOR), 0.5),
        (FEET, north_up(FEET), 0.3048),
        (4326, rasterio.Affine(1e-5, 0, 10.0, 0, -1e-5, 0.0), 1.11),  # on the equator
    ],
)
def test_resolution_on_the_ground(tmp_path, epsg, transform, metres):
    raster = write_raster(tmp_path / "a.tif", scene(), f"EPSG:{epsg}", transform)
    layer = write_layer(tmp_path / "a.gpkg", OBJECTS, transform, epsg)
    content = cut(tmp_path, raster, layer)
    check_whole(tmp_path, content)
    assert content["info"]["map"]["gsd"] == pytest.approx(metres, rel=0.01)
    content = cut(tmp_path, raster, layer, f"--gsd={metres / 2}", "--overlap=0", f"--save_path={tmp_path / 'fine'}")
    content = json.loads((tmp_path / "fine" / "annotations" / "instance_train.json").read_text())
    assert content["info"]["map"]["gsd"] == metres / 2
    sides = np.array([image["window"][2:] for image in content["images"]])
    assert np.abs(sides - SIDE / 2).max() <= 1
    area = sum(entry["area"] for entry in content["annotations"] if not entry["iscrowd"])
    assert area >= 4 * truth_of_all().sum() * 0.9


def test_sixteen_bits_have_one_stretch_that_nodata_takes_no_part_in(tmp_path):
    bright, dark = (scene().astype(np.uint16) * 20 for _ in range(2))
    bright[:, 100:], dark = 65535, dark // 4
    folder = tmp_path / "rasters"
    folder.mkdir()
    east = rasterio.Affine.translation(200, 0)
    write_raster(folder / "a.tif", bright, UTM, north_up(UTM), nodata=65535)
    write_raster(folder / "b.tif", dark, UTM, north_up(UTM) * east, nodata=65535)
    shapes = OBJECTS | {f"{name}#": shapely.affinity.translate(shape, 200) for name, shape in OBJECTS.items()}
    content = cut(tmp_path, folder, write_layer(tmp_path / "a.gpkg", shapes, north_up(UTM), UTM))
    low, high = np.array(content["info"]["map"]["stretch"])
    assert (low == 250).all() and (high == 4000).all()
    one, other = (cv2.imread(str(tmp_path / "out" / "images" / i["file_name"])) for i in content["images"])
    assert (one[:, 100:] == 0).all() and one[truth("tree")].min() == 255
    assert np.abs(other[truth("tree")].astype(float) - (1000 - 250) / 3750 * 255).max() <= 1


def test_what_is_transparent_is_no_content(tmp_path):
    pixels = np.stack([scene(), scene(), scene(), np.full((SIDE, SIDE), 255, np.uint8)])
    pixels[:3, 64:] = 77  # beneath the transparent part
    pixels[3, 64:] = 0
    raster = write_raster(tmp_path / "a.tif", pixels, UTM, north_up(UTM), photometric="RGB", alpha="YES")
    content = cut(tmp_path, raster, write_layer(tmp_path / "a.gpkg", OBJECTS, north_up(UTM), UTM), "--tile=64")
    assert max(image["window"][1] for image in content["images"]) < 64
    for image in content["images"]:
        picture = cv2.imread(str(tmp_path / "out" / "images" / image["file_name"]))
        assert not (picture == 77).any()


def test_a_palette_is_looked_up(tmp_path):
    numbers = (scene() == 200).astype(np.uint8)
    colors = {0: (40, 50, 60, 255), 1: (240, 230, 220, 255)}
    raster = write_raster(
        tmp_path / "a.tif", numbers, UTM, north_up(UTM), photometric="PALETTE",
        after=lambda file: file.write_colormap(1, colors),
    )  # fmt: skip
    content = cut(tmp_path, raster, write_layer(tmp_path / "a.gpkg", OBJECTS, north_up(UTM), UTM))
    check_whole(tmp_path, content)
    picture = cv2.imread(str(tmp_path / "out" / "images" / content["images"][0]["file_name"]))[..., ::-1]
    assert {tuple(color) for color in picture.reshape(-1, 3).tolist()} == {(40, 50, 60), (240, 230, 220)}


def test_bands_are_taken_by_colour_or_number(tmp_path, capsys):
    pixels = np.stack([np.full((SIDE, SIDE), value, np.uint8) for value in (10, 20, 30, 40)])
    names = [rasterio.enums.ColorInterp[name] for name in ("blue", "green", "red", "nir")]
    raster = write_raster(
        tmp_path / "a.tif", pixels, UTM, north_up(UTM), photometric="MINISBLACK",
        after=lambda file: setattr(file, "colorinterp", names),
    )  # fmt: skip
    layer = write_layer(tmp_path / "a.gpkg", OBJECTS, north_up(UTM), UTM)
    for bands, expected in (("nir,red,2", [40, 30, 20]), (None, [30, 20, 10])):
        content = cut(tmp_path, raster, layer, *([f"--bands={bands}"] if bands else []))
        picture = cv2.imread(str(tmp_path / "out" / "images" / content["images"][0]["file_name"]))[..., ::-1]
        assert picture[3, 3].tolist() == expected
        (tmp_path / "out" / "images" / content["images"][0]["file_name"]).unlink()
    options = [f"--rasters={raster}", f"--labels={layer}", "--class_field=kind", f"--save_path={tmp_path / 'out'}"]
    assert main(["convert", "--src_dataset_type=geo", *options, "--bands=swir,red,green"]) != 0
    assert "it has 1 (blue), 2 (green), 3 (red), 4 (nir)" in capsys.readouterr().err


def test_objects_at_borders_are_shown_whole_somewhere(tmp_path, capsys):
    pixels = np.full((300, 300), 50, np.uint8)
    shapes = {"house": shapely.box(60, 10, 70, 20), "house#2": shapely.box(50, 150, 78, 178)}  # across 64 and 128
    raster = write_raster(tmp_path / "a.tif", pixels, UTM, north_up(UTM))
    layer = write_layer(tmp_path / "a.gpkg", shapes, north_up(UTM), UTM)
    content = cut(tmp_path, raster, layer, "--tile=64", "--overlap=0", "--min_visible=0.9", "--empty_share=0")
    assert "pictures moved to show an object that borders would cut: 2" in capsys.readouterr().out
    whole = [entry["area"] for entry in content["annotations"] if not entry["iscrowd"]]
    assert sorted(whole) == [100, 784]
    for entry in content["annotations"]:
        if entry["iscrowd"]:
            assert entry["area"] < 0.9 * 784


def test_unlabelled_ground_is_never_background(tmp_path):
    pixels = np.full((640, 640), 90, np.uint8)
    shapes = {"house": shapely.box(10, 10, 30, 30), "house#2": shapely.box(200, 150, 220, 170)}
    raster = write_raster(tmp_path / "a.tif", pixels, UTM, north_up(UTM))
    layer = write_layer(tmp_path / "a.gpkg", shapes, north_up(UTM), UTM)
    options = ("--tile=64", "--overlap=0", "--empty_share=9")
    by_hull = cut(tmp_path, raster, layer, *options)
    hull = shapely.union_all(list(shapes.values())).convex_hull
    used = {entry["image_id"] for entry in by_hull["annotations"]}
    for image in by_hull["images"]:
        x, y, width, height = image["window"]
        assert image["id"] in used or hull.contains(shapely.box(x, y, x + width, y + height))
    area = write_layer(tmp_path / "aoi.gpkg", {"area": shapely.box(0, 0, 250, 200)}, north_up(UTM), UTM)
    content = cut(tmp_path, raster, layer, *options, f"--aoi={area}", f"--save_path={tmp_path / 'aoi'}")
    content = json.loads((tmp_path / "aoi" / "annotations" / "instance_train.json").read_text())
    assert len(content["images"]) > len(by_hull["images"])
    for image in content["images"]:
        picture = cv2.imread(str(tmp_path / "aoi" / "images" / image["file_name"]))
        x, y, *_ = image["window"]
        rows, columns = np.mgrid[y : y + 64, x : x + 64]
        assert (picture[(rows >= 200) | (columns >= 250)] == 0).all()


def test_flaws_are_counted(tmp_path, capsys):
    raster = write_raster(tmp_path / "a.tif", scene(), UTM, north_up(UTM))
    bow = shapely.Polygon([(10, 60), (50, 77), (47, 60), (12, 75)])  # crosses itself
    more = {"tree#bow": bow, "tree#2": OBJECTS["tree"], "car#tiny": shapely.box(5, 5, 5.5, 5.5)}
    more |= {"house#far": shapely.box(5000, 5000, 5010, 5010)}
    layer = write_layer(tmp_path / "a.gpkg", OBJECTS | more, north_up(UTM), UTM)
    content = cut(tmp_path, raster, layer)
    said = capsys.readouterr().out
    for note in (
        "invalid rings, mended",
        "there twice, left out once",
        "slivers smaller than a pixel",
        "lie on no raster",
    ):
        assert any(note in line and line.endswith(": 1") for line in said.splitlines()), (note, said)
    assert len(content["annotations"]) == 4


def test_what_is_no_polygon_on_the_ground_ends_nothing(tmp_path, capsys):
    """Collections in collections, a point that is no number, and a shape on the other side of the globe."""
    raster = write_raster(tmp_path / "a.tif", scene(), UTM, north_up(UTM))
    house = shapely.GeometryCollection([shapely.Point(1, 1), shapely.GeometryCollection([OBJECTS["house"]])])
    odd = shapely.Polygon([(10, 10), (math.inf, 20), (30, 30)])
    layer = write_layer(tmp_path / "a.gpkg", OBJECTS | {"house": house, "tree#odd": odd}, north_up(UTM), UTM)
    check_whole(tmp_path, cut(tmp_path, raster, layer))
    assert "coordinates are no numbers, left out: 1" in capsys.readouterr().out
    layer = write_layer(tmp_path / "b.gpkg", OBJECTS, north_up(UTM), UTM, 4326)
    beyond = shapely.to_wkb(np.array([shapely.box(0, 89, 10, 95)], object))
    pyogrio.raw.write(
        layer, beyond, [np.array(["tree"], object)], ["kind"], geometry_type="Polygon", crs="EPSG:4326", driver="GPKG",
        layer="b", append=True,
    )  # fmt: skip
    check_whole(tmp_path, cut(tmp_path, raster, layer))
    assert "lie on no raster, or on none with content: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "pixels", "message"),
    [
        (["--gsd=1000"], 90, "smaller than a pixel of the pictures; name a finer --gsd"),
        (["--gsd=0.001"], 90, "made at most 16 times finer"),
        ([], 0, "have no content where the polygons"),
    ],
)
def test_a_set_without_objects_is_not_written(tmp_path, capsys, options, pixels, message):
    raster = write_raster(tmp_path / "a.tif", np.full((SIDE, SIDE), pixels, np.uint8), UTM, north_up(UTM))
    layer = write_layer(tmp_path / "a.gpkg", OBJECTS, north_up(UTM), UTM)
    named = [f"--rasters={raster}", f"--labels={layer}", "--class_field=kind", f"--save_path={tmp_path / 'out'}"]
    assert main(["convert", "--src_dataset_type=geo", *named, *options]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out" / "annotations").exists()


def test_a_layer_whose_features_are_all_left_out_says_why(tmp_path, capsys):
    raster = write_raster(tmp_path / "a.tif", scene(), UTM, north_up(UTM))
    layer = write_layer(tmp_path / "a.gpkg", {" ": OBJECTS["tree"], "#": OBJECTS["house"]}, north_up(UTM), UTM)
    named = [f"--rasters={raster}", f"--labels={layer}", "--class_field=kind", f"--save_path={tmp_path / 'out'}"]
    assert main(["convert", "--src_dataset_type=geo", *named]) == 1
    assert "has no polygon with a class; features without a value of kind, left out: 2" in capsys.readouterr().err


def test_there_and_back(tmp_path):
    """Layer to masks of pictures, and their outlines to the ground again."""
    rng = np.random.default_rng(0)
    side = 1000
    shapes = {}
    for number in range(9):
        x, y = 170 + 320 * (number % 3), 170 + 320 * (number // 3)
        angles = np.sort(rng.uniform(0, 2 * math.pi, 14))
        radius = rng.uniform(100, 150, 14)
        ring = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)
        shapes[f"tree#{number}"] = shapely.make_valid(shapely.Polygon(ring))
    transform = north_up(UTM, 0.3) * rasterio.Affine.rotation(20)
    raster = write_raster(tmp_path / "a.tif", np.full((side, side), 90, np.uint8), UTM, transform)
    layer = write_layer(tmp_path / "a.gpkg", shapes, transform, UTM, 4326)
    content = cut(tmp_path, raster, layer, f"--tile={side}")
    assert len(content["images"]) == 1
    found = []
    for entry in content["annotations"]:
        rle = entry["segmentation"]
        if isinstance(rle, list):
            rle = coco_mask.merge(coco_mask.frPyObjects(rle, side, side))
        parts = rle_to_polygons(rle)
        found.append(shapely.union_all([shapely.Polygon(part.outer, part.holes) for part in parts]))
    assert len(found) == len(shapes) == 9
    for shape in shapes.values():
        best = max(found, key=lambda other: (shape & other).area)
        assert (shape & best).area / (shape | best).area >= 0.99
    total = sum(shape.area for shape in shapes.values())
    assert sum(shape.area for shape in found) == pytest.approx(total, rel=0.005)


def test_a_file_of_several_layers_is_asked_which_one(tmp_path, capsys):
    raster = write_raster(tmp_path / "a.tif", scene(), UTM, north_up(UTM))
    layer = write_layer(tmp_path / "a.gpkg", OBJECTS, north_up(UTM), UTM)
    pyogrio.raw.write(
        layer, shapely.to_wkb(np.array([shapely.box(0, 0, 1, 1)], object)), [np.array(["x"], object)], ["kind"],
        geometry_type="Polygon", crs=f"EPSG:{UTM}", driver="GPKG", layer="roads", append=True,
    )  # fmt: skip
    options = [f"--rasters={raster}", f"--labels={layer}", "--class_field=kind", f"--save_path={tmp_path / 'out'}"]
    assert main(["convert", "--src_dataset_type=geo", *options]) != 0
    assert "several layers, name one as" in capsys.readouterr().err
    check_whole(tmp_path, cut(tmp_path, raster, f"{layer}:a"))


def test_labels_from_geoparquet(tmp_path):
    pytest.importorskip("pyarrow")
    raster = write_raster(tmp_path / "a.tif", scene(), UTM, north_up(UTM))
    placed = [shapely.transform(s, lambda xy: xy * [1, -1] + ORIGIN[UTM]) for s in OBJECTS.values()]
    columns = {"kind": np.array(list(OBJECTS), object)}
    write_layer_file(tmp_path / "a.parquet", np.array(placed, object), columns, pyproj.CRS(UTM))
    check_whole(tmp_path, cut(tmp_path, raster, tmp_path / "a.parquet"))


def test_a_layer_without_crs_on_one_of_several_rasters(tmp_path):
    folder = tmp_path / "rasters"
    folder.mkdir()
    write_raster(folder / "a.tif", scene(), UTM, north_up(UTM) @ rasterio.Affine.translation(9000, 0))
    write_raster(folder / "b.tif", scene(), UTM, north_up(UTM))
    layer = write_layer(tmp_path / "a.shp", OBJECTS, north_up(UTM), UTM, UTM, "ESRI Shapefile")
    layer.with_suffix(".prj").unlink()
    check_whole(tmp_path, cut(tmp_path, folder, layer))


def test_class_names_are_what_the_reader_of_coco_makes_of_them(tmp_path):
    raster = write_raster(tmp_path / "a.tif", scene(), UTM, north_up(UTM))
    shapes = {"flat\nroof": OBJECTS["house"], " tree ": OBJECTS["tree"]}
    content = cut(tmp_path, raster, write_layer(tmp_path / "a.gpkg", shapes, north_up(UTM), UTM))
    assert {category["name"] for category in content["categories"]} == {"flat roof", "tree"}


def test_what_was_dealt_out_before_is_put_aside(tmp_path, capsys):
    """Else the old validation part would list pictures that the new training part has as well."""
    raster = write_raster(tmp_path / "a.tif", np.full((400, 400), 90, np.uint8), UTM, north_up(UTM))
    shapes = {f"house#{n}": shapely.box(20 + 90 * n, 30, 40 + 90 * n, 50) for n in range(4)}
    layer = write_layer(tmp_path / "a.gpkg", shapes, north_up(UTM), UTM)
    cut(tmp_path, raster, layer, "--tile=64", "--overlap=0")
    split = ["split", f"--config.data.dir={tmp_path / 'out'}", "--by=blocks", "--block=50m"]
    assert main([*split, "--train_percent=70", "--val_percent=30"]) == 0 and main([*split, "--folds=2"]) == 0
    capsys.readouterr()
    folder = tmp_path / "out" / "annotations"
    foreign = {"images": [{"id": 1, "file_name": "other.png"}], "annotations": [], "categories": []}
    (folder / "instance_mine.json").write_text(json.dumps(foreign))
    cut(tmp_path, raster, layer, "--tile=64", "--overlap=0")
    left = {path.name for path in folder.glob("*.json")}
    assert left == {"instance_train.json", "instance_mine.json"}
    assert "files of an earlier split of these pictures, now .bak" in capsys.readouterr().out
    assert (folder / "instance_val.json.bak").is_file() and (folder / "instance_fold1_val.json.bak").is_file()
