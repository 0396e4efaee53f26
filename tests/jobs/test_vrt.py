"""A VRT that is named is a map like any other, also where it has more pixels than COCO's codes can count."""

import pytest
from fake_model import make_pipeline, picture

from instseg_jax.geo.rasters import open_raster, write_geotiff
from instseg_jax.inference.sources import find_files
from instseg_jax.jobs.parts import compute_part, read_part
from instseg_jax.jobs.plan import build_plan
from instseg_jax.jobs.workers import part_file

rasterio = pytest.importorskip("rasterio")
TILE = 4096
SIDE = 17 * TILE  # more than 2^32 pixels, of which the last super-tile is one window


def write_vrt(folder, side: int, place: int):
    """A map of side x side pixels; all of it is in one file of 1,000 x 1,000 at (place, place)."""
    tile = picture((0, 200, 200, 700, 600), size=(1000, 1000))
    source = write_geotiff(folder / "source.tif", tile, epsg=32633, origin=(500_000, 5_000_000), pixel_size=0.1)
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}"><ColorInterp>{color}</ColorInterp><SimpleSource>'
        f'<SourceFilename relativeToVRT="1">{source.name}</SourceFilename><SourceBand>{band}</SourceBand>'
        f'<SrcRect xOff="0" yOff="0" xSize="1000" ySize="1000"/><DstRect xOff="{place}" yOff="{place}" xSize="1000" '
        'ySize="1000"/></SimpleSource></VRTRasterBand>'
        for band, color in ((1, "Red"), (2, "Green"), (3, "Blue"))
    )
    path = folder / "all.vrt"
    head = f'<VRTDataset rasterXSize="{side}" rasterYSize="{side}"><SRS>EPSG:32633</SRS>'
    path.write_text(f"{head}<GeoTransform>500000, 0.1, 0, 5000000, 0, -0.1</GeoTransform>{bands}</VRTDataset>")
    return path


def test_a_vrt_of_more_than_2_32_pixels_is_a_job(tmp_path):
    pipe = make_pipeline(image_size=256)
    path = write_vrt(tmp_path, SIDE, SIDE - 1000)
    settings = {"tile": TILE, "overlap": 0.0, "whole_image": True, "model": "fake", "bands": None, "batch_size": 1}
    settings |= {"thresholds": [0.1] * 3, "class_names": pipe.class_names, "category_ids": pipe.category_ids}
    plan = build_plan([str(path)], settings)
    assert plan.inputs[0].size == (SIDE, SIDE) and SIDE**2 > 2**32
    assert [part.kind for part in plan.parts] == ["tile"] * 4, "no view: its masks would be too large"
    content = compute_part(plan, plan.parts[3], pipe)
    part_file(tmp_path, 3).parent.mkdir()
    part_file(tmp_path, 3).write_bytes(content)
    found = read_part(part_file(tmp_path, 3), plan).pieces
    assert found.extents.tolist() == [pytest.approx([SIDE - 800, SIDE - 800, SIDE - 300, SIDE - 400], abs=TILE / 256)]


def test_what_predict_finds_in_a_vrt_lies_where_it_says(tmp_path):
    path = write_vrt(tmp_path, 1500, 500)
    (result,) = make_pipeline(image_size=64).predict(path, tile=1000, overlap=0.5)
    assert result.error is None and result.georeference.epsg == 32633
    assert [box["coordinate"] for box in result.boxes] == [pytest.approx([700, 700, 1200, 1100], abs=16)]


def test_only_who_names_a_vrt_has_it_read(tmp_path):
    """Its text names other files: a folder or a pattern never leads to one, a picture's name neither."""
    path = write_vrt(tmp_path, 1500, 500)
    assert find_files(path) == [path]
    assert find_files(tmp_path) == find_files(f"{tmp_path}/*") == [tmp_path / "source.tif"]
    for name in ("a.tif", "a.jpg", "a.png", "a"):
        (tmp_path / name).write_bytes(path.read_bytes())
        assert open_raster(tmp_path / name) is None
    path.write_text("nothing")
    with pytest.raises(ValueError, match=r"all.vrt"):
        open_raster(path)


def test_a_raster_too_large_to_be_read_at_once_is_told(tmp_path):
    path = write_vrt(tmp_path, SIDE, 0)
    with pytest.raises(ValueError, match=f"{SIDE} x {SIDE} pixels.*--tile"):
        list(make_pipeline().predict(path))
