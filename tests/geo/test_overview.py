"""From raster and layer to `check_dataset`: a layer that is off is named with how far, a right one passes."""

import json

import cv2
import numpy as np
import pytest
from places import EMBEDDED

pytest.importorskip("rasterio")
pytest.importorskip("pyogrio")
pyproj = pytest.importorskip("pyproj")
shapely = pytest.importorskip("shapely")

from instseg_jax.cli import main  # noqa: E402
from instseg_jax.data import coco, overview, scenes  # noqa: E402
from instseg_jax.geo.layer_files import read_layer_file, write_layer  # noqa: E402

UTM, ORIGIN, PX = 32632, (395_000.0, 5_268_000.0), 0.5


def make_map(folder, offset):
    """A raster of houses and a layer of their outlines, `offset` metres (east, north) off."""
    dataset = coco.read_coco(EMBEDDED / "annotations" / "instance_train.json", EMBEDDED / "images")
    scene = scenes.scatter_objects(dataset, (700, 900), np.random.default_rng(3), count=50, scale_range=(0.3, 0.5))
    place = {"epsg": UTM, "origin": ORIGIN, "pixel_size": PX}
    scenes.write_map(folder / "a.tif", folder / "true.gpkg", scene, ["house"], **place)
    blobs, columns, _ = read_layer_file(folder / "true.gpkg", None, ["kind"])
    shapes = shapely.transform(shapely.from_wkb(blobs), lambda xy: xy + offset)
    assert len(shapes) == len(scene.labels) and set(columns["kind"]) == {"house"}
    write_layer(folder / "a.gpkg", shapes, columns, pyproj.CRS(UTM))


@pytest.mark.parametrize("offset", [(0.0, 0.0), (9.0, -12.0)])
def test_a_layer_that_is_off_is_named(tmp_path, capsys, monkeypatch, offset):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")
    make_map(tmp_path, offset)
    options = [f"--rasters={tmp_path / 'a.tif'}", f"--labels={tmp_path / 'a.gpkg'}", "--class_field=kind"]
    target = f"--save_path={tmp_path / 'out'}"
    assert main(["convert", "--src_dataset_type=geo", "--tile=192", "--overlap=0", *options, target]) == 0
    data = f"--config.data.dir={tmp_path / 'out'}"
    assert main(["split", data, "--by=blocks", "--block=100m", "--train_percent=70", "--val_percent=30"]) == 0
    capsys.readouterr()
    work = tmp_path / "work"
    assert main(["check_dataset", "--config=configs/quickstart.py", data, f"--workdir={work}"]) == 0
    said = capsys.readouterr().out
    found = [line for line in said.splitlines() if "labels lie" in line]
    if offset == (0.0, 0.0):
        assert not found
    else:
        (line,) = found
        assert "m south-east of what they show" in line and "a.tif" in line
        east, north = (float(word) for word in line.split("(")[1].replace(" m", "").split() if word[0] in "+-")
        assert (east, north) == pytest.approx(offset, abs=1.0)
    (drawn,) = json.loads((work / "check_dataset_result.json").read_text())["analysis"]["overviews"]
    picture = cv2.imread(str(work / drawn["file"]))
    assert picture.shape == (700, 900, 3) and "pictures of val" in drawn["caption"]
    assert drawn["file"] in (work / "check_dataset.html").read_text()


def test_shifts_are_searched_once_and_what_is_left_out_is_said(tmp_path, capsys, monkeypatch):
    """A repair changes no place; the pictures that a split has left out are on the overview."""
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")
    monkeypatch.setenv("INSTSEG_COMPILED", "")
    make_map(tmp_path, (0.0, 0.0))
    options = [f"--rasters={tmp_path / 'a.tif'}", f"--labels={tmp_path / 'a.gpkg'}", "--class_field=kind"]
    target = f"--save_path={tmp_path / 'out'}"
    assert main(["convert", "--src_dataset_type=geo", "--tile=192", "--overlap=0", *options, target]) == 0
    data = f"--config.data.dir={tmp_path / 'out'}"
    split = ["split", data, "--by=blocks", "--block=100m", "--gap=5m", "--train_percent=70", "--val_percent=30"]
    assert main(split) == 0
    left_out = json.loads((tmp_path / "out" / "annotations" / "instance_left_out.json").read_text())["images"]
    asked = []
    monkeypatch.setattr(overview, "find_shift_flaws", lambda rasters: asked.append(rasters) or [])
    main(["check_dataset", "--config=configs/quickstart.py", data, "--fix", f"--workdir={tmp_path / 'work'}"])
    assert len(asked) == 1 and f", {len(left_out)} left out" in capsys.readouterr().out and left_out
