"""Rasters that lie elsewhere, or are made of others: read in ranges, and only where a person names them."""

import json

import numpy as np
import pytest
from range_server import serve_ranges

rasterio = pytest.importorskip("rasterio")
pyogrio = pytest.importorskip("pyogrio")
pyproj = pytest.importorskip("pyproj")
shapely = pytest.importorskip("shapely")

from instseg_jax.cli import main  # noqa: E402
from instseg_jax.geo.layer_files import write_layer  # noqa: E402
from instseg_jax.geo.rasters import open_raster  # noqa: E402
from instseg_jax.inference.sources import find_files, find_sources  # noqa: E402

UTM = 32633
PLACE = rasterio.Affine(1, 0, 500_000, 0, -1, 5_500_000)
SIDE = 2048


@pytest.fixture(autouse=True)
def no_second_start(monkeypatch):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")


def write_raster(path, side=SIDE, place=PLACE):
    """Noise, which no compression makes smaller, in blocks."""
    pixels = np.random.default_rng(0).integers(1, 255, (3, side, side), np.uint8)
    layout = {"tiled": True, "blockxsize": 256, "blockysize": 256, "photometric": "RGB"}
    shape = {"height": side, "width": side, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", driver="GTiff", crs=f"EPSG:{UTM}", transform=place, **shape, **layout) as file:
        file.write(pixels)
    return np.moveaxis(pixels, 0, -1)


def write_labels(path, boxes):
    shapes = [shapely.box(500_000 + x, 5_500_000 - y - 40, 500_000 + x + 40, 5_500_000 - y) for x, y in boxes]
    columns = {"kind": np.array(["house"] * len(boxes), object)}
    return write_layer(path, np.array(shapes, object), columns, pyproj.CRS(UTM))


def convert(folder, rasters, labels):
    options = [f"--rasters={rasters}", f"--labels={labels}", "--class_field=kind", f"--save_path={folder}"]
    assert (
        main(
            [
                "convert",
                "--src_dataset_type=geo",
                "--tile=256",
                "--overlap=0",
                "--empty_share=0",
                "--min_visible=0.9",
                *options,
            ]
        )
        == 0
    )
    return json.loads((folder / "annotations" / "instance_train.json").read_text())


def test_bytes_are_in_proportion_to_the_windows(tmp_path):
    write_raster(tmp_path / "a.tif")
    whole = (tmp_path / "a.tif").stat().st_size
    sent = {}
    many = [(x, y) for x in range(100, 2000, 300) for y in (700, 1500)]
    for count, boxes in (("few", [(100, 100), (1900, 1900)]), ("many", many)):
        labels = write_labels(tmp_path / f"{count}.gpkg", boxes)
        name = f"{count}.tif"  # GDAL keeps what it has read, by address
        (tmp_path / name).write_bytes((tmp_path / "a.tif").read_bytes())
        with serve_ranges(tmp_path) as (address, count_sent):
            content = convert(tmp_path / count, f"{address}/{name}", labels)
            sent[count] = count_sent()
        windows = len(content["images"]) * 256 * 256 * 3
        assert windows <= sent[count] <= 3 * windows + 200_000
    assert sent["few"] < whole / 6 and sent["few"] < sent["many"] < whole


def test_the_pixels_are_those_of_the_file(tmp_path):
    pixels = write_raster(tmp_path / "a.tif", 512)
    labels = write_labels(tmp_path / "l.gpkg", [(100, 100)])
    with serve_ranges(tmp_path) as (address, _):
        content = convert(tmp_path / "far", f"{address}/a.tif", labels)
    assert content["images"][0]["raster"] == f"{address}/a.tif"
    near = convert(tmp_path / "near", tmp_path / "a.tif", labels)
    name = near["images"][0]["file_name"]
    assert (tmp_path / "far" / "images" / name).read_bytes() == (tmp_path / "near" / "images" / name).read_bytes()
    assert pixels.std() > 50


def test_a_folder_of_tiles_as_one_raster(tmp_path):
    """A VRT that the user names joins two files; an object across their border is whole."""
    folder = tmp_path / "tiles"
    folder.mkdir()
    write_raster(folder / "west.tif", 512)
    write_raster(folder / "east.tif", 512, PLACE * rasterio.Affine.translation(512, 0))
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}">'
        + "".join(
            f'<SimpleSource><SourceFilename relativeToVRT="1">tiles/{name}.tif</SourceFilename><SourceBand>{band}'
            f'</SourceBand><SrcRect xOff="0" yOff="0" xSize="512" ySize="512"/><DstRect xOff="{x}" yOff="0" '
            'xSize="512" ySize="512"/></SimpleSource>'
            for name, x in (("west", 0), ("east", 512))
        )
        + "</VRTRasterBand>"
        for band in (1, 2, 3)
    )
    wkt = pyproj.CRS(UTM).to_wkt("WKT1_GDAL").replace('"', "&quot;")
    place = ", ".join(map(str, PLACE.to_gdal()))
    vrt = tmp_path / "all.vrt"
    vrt.write_text(
        f'<VRTDataset rasterXSize="1024" rasterYSize="512"><SRS>{wkt}</SRS><GeoTransform>{place}</GeoTransform>{bands}'
        "</VRTDataset>"
    )
    content = convert(tmp_path / "out", vrt, write_labels(tmp_path / "l.gpkg", [(492, 100)]))
    areas = [entry["area"] for entry in content["annotations"] if not entry["iscrowd"]]
    assert areas == [1600]
    (source,), count = find_sources(str(vrt), channels="rgb")  # as in prediction
    assert count == 1 and source.raster.size == (512, 1024) and source.georeference.epsg == UTM
    np.testing.assert_array_equal(source.read()[:, 512:], open_raster(folder / "east.tif").whole())
    (folder / "all.vrt").write_bytes(vrt.read_bytes())  # nobody names that one
    assert [path.name for path in find_files(folder)] == ["east.tif", "west.tif"]
    disguised = tmp_path / "harmless.tif"  # never because a file's content says so
    disguised.write_bytes(vrt.read_bytes())
    assert open_raster(disguised) is None


def test_an_address_without_a_raster_is_named(tmp_path, capsys):
    labels = write_labels(tmp_path / "l.gpkg", [(100, 100)])
    with serve_ranges(tmp_path) as (address, _):
        options = [f"--rasters={address}/none.tif", f"--labels={labels}", "--class_field=kind"]
        assert main(["convert", "--src_dataset_type=geo", *options, f"--save_path={tmp_path / 'out'}"]) != 0
        assert f"{address}/none.tif" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_asset_of_a_stac_item(tmp_path, capsys):
    """By the address of the item, with an asset beside it, or as a file, with an asset elsewhere."""
    write_raster(tmp_path / "a.tif", 512)
    labels = write_labels(tmp_path / "l.gpkg", [(100, 100)])
    with serve_ranges(tmp_path) as (address, count_sent):
        assets = {"near": {"href": "./a.tif"}, "far": {"href": f"{address}/a.tif"}, "odd": {"title": "none"}}
        assets |= {"file": {"href": f"file://{tmp_path / 'a.tif'}"}, "driver": {"href": f"/vsicurl/{address}/a.tif"}}
        (tmp_path / "item.json").write_text(json.dumps({"type": "Feature", "assets": assets}))
        for name in (f"{address}/item.json#near", f"{tmp_path / 'item.json'}#far"):
            content = convert(tmp_path / str(len(name)), name, labels)
            assert content["images"][0]["raster"] == f"{address}/a.tif" and count_sent() > 100_000
        content = convert(tmp_path / "near", f"{tmp_path / 'item.json'}#near", labels)
        assert content["images"][0]["raster"] == str(tmp_path / "a.tif")
        options = [f"--labels={labels}", "--class_field=kind", f"--save_path={tmp_path / 'out'}"]
        for name, message in (
            (f"{tmp_path / 'item.json'}#blue", "has no asset 'blue'; it has near, far, odd, file, driver"),
            (f"{tmp_path / 'item.json'}#odd", "has no asset 'odd'"),
            (f"{address}/item.json#file", "lies at 'file://"),
            (f"{tmp_path / 'item.json'}#file", "lies at 'file://"),
            (f"{tmp_path / 'item.json'}#driver", "lies at '/vsicurl/"),
            (f"{address}/none.json#near", "can't be fetched"),
            (f"{tmp_path / 'none.json'}#near", "There is no STAC item"),
        ):
            assert main(["convert", "--src_dataset_type=geo", f"--rasters={name}", *options]) == 1
            assert message in capsys.readouterr().err
