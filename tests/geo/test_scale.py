"""A raster of 20,000 x 20,000 px with 10,000 polygons: time and memory, all told with `-s`.

python -m pytest -m slow -n 0 -s tests/geo/test_scale.py
"""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from places import HELPERS, ROOT

rasterio = pytest.importorskip("rasterio")
pytest.importorskip("pyogrio")
pyproj = pytest.importorskip("pyproj")
shapely = pytest.importorskip("shapely")

from instseg_jax.geo.georeference import Georeference  # noqa: E402
from instseg_jax.geo.layer_files import read_layer_file, write_layer  # noqa: E402
from instseg_jax.geo.shaping import Shaping  # noqa: E402
from instseg_jax.outlines import Polygon  # noqa: E402
from instseg_jax.results.layer import open_layer  # noqa: E402

UTM, SIDE, COUNT = 32633, 20_000, 10_000


def run(*arguments: str) -> tuple[float, float]:
    """CPU seconds and peak of the memory in MB of a command; a stand-in for the network finds plain rectangles."""
    places = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HELPERS)]), "INSTSEG_HUGE_PAGES": "0"}
    command = [sys.executable, str(HELPERS / "standin_cli.py"), *arguments]
    done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True, check=True)
    cpu, memory, *_ = map(float, done.stdout.partition("standin:")[2].split())
    return cpu, memory


def houses(rng: np.random.Generator) -> np.ndarray:
    """COUNT boxes (x1, y1, x2, y2) in pixels, one in each cell of a grid."""
    cells = int(np.sqrt(COUNT))
    corner = np.stack(np.meshgrid(np.arange(cells), np.arange(cells)), axis=-1).reshape(-1, 2) * (SIDE // cells)
    start = corner + rng.integers(10, 60, (COUNT, 2))
    return np.concatenate([start, start + rng.integers(40, 120, (COUNT, 2))], axis=1)


def write_map(folder) -> np.ndarray:
    boxes = houses(np.random.default_rng(0))
    place = rasterio.transform.from_origin(500_000, 5_500_000, 0.1, 0.1)
    layout = {"driver": "GTiff", "tiled": True, "compress": "deflate", "photometric": "RGB", "dtype": "uint8"}
    shape = {"width": SIDE, "height": SIDE, "count": 3, "crs": f"EPSG:{UTM}", "transform": place}
    rows = SIDE // 100
    with rasterio.open(folder / "a.tif", "w", **layout, **shape) as file:
        for top in range(0, SIDE, rows):
            strip = np.random.default_rng(top).integers(90, 110, (1, rows // 4, SIDE // 4), np.uint8)
            strip = np.repeat(np.repeat(np.repeat(strip, 3, axis=0), 4, axis=1), 4, axis=2)
            for x1, y1, x2, y2 in boxes[(boxes[:, 3] > top) & (boxes[:, 1] < top + rows)]:
                part = strip[:, max(0, y1 - top) : y2 - top, x1:x2]
                part[0], part[1:] = 255, 0
            file.write(strip, window=rasterio.windows.Window(0, top, SIDE, rows))
    ground = boxes * [0.1, -0.1, 0.1, -0.1] + [500_000, 5_500_000] * 2
    shapes = shapely.box(ground[:, 0], ground[:, 3], ground[:, 2], ground[:, 1])
    write_layer(folder / "a.gpkg", shapes, {"kind": np.array(["house"] * COUNT, object)}, pyproj.CRS(UTM))
    return boxes


@pytest.mark.slow
def test_a_large_map_becomes_pictures(tmp_path):
    write_map(tmp_path)
    raster, layer, data = (tmp_path / name for name in ("a.tif", "a.gpkg", "data"))
    geo = ["convert", "--src_dataset_type=geo", f"--rasters={raster}", f"--labels={layer}", "--class_field=kind"]
    seconds, megabytes = run(*geo, f"--save_path={data}")
    content = json.loads((data / "annotations" / "instance_train.json").read_text())
    shown = sum(not entry["iscrowd"] for entry in content["annotations"])
    print(f"\nconvert: {seconds:.0f} CPU s, {megabytes:.0f} MB; {len(content['images'])} pictures, {shown} objects")
    assert shown >= COUNT


@pytest.mark.slow
def test_what_is_found_in_a_large_map_becomes_a_layer(tmp_path):
    write_map(tmp_path)
    where = ["--formats=json", f"--save_path={tmp_path / 'out'}", f"--layer={tmp_path / 'found.gpkg'}"]
    seconds, megabytes = run("predict", f"--input={tmp_path / 'a.tif'}", "--tile=480", *where)
    found = len(read_layer_file(tmp_path / "found.gpkg", None, ["label"])[0])
    print(f"\npredict: {seconds:.0f} CPU s, {megabytes:.0f} MB with --layer; {found} found")
    assert 0.99 * COUNT <= found <= 1.01 * COUNT


class Found:
    """A result with rectangles, as `FoundLayer.add` sees one."""

    input_path = "a.tif"
    georeference = Georeference((0.1, 0, 500_000, 0, -0.1, 5_500_000), pyproj.CRS(UTM).to_wkt(), UTM)

    def __init__(self, boxes: np.ndarray) -> None:
        self.boxes = boxes

    def __len__(self) -> int:
        return len(self.boxes)

    def outlines(self):
        for x1, y1, x2, y2 in self.boxes.tolist():
            ring = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.float64)
            yield {"label": "house", "cls_id": 0, "score": 0.5}, [Polygon(ring, ())]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"simplify": 0.5}, {"regularize": 1.0}], ids=str)
def test_many_features(tmp_path, options):
    """Time grows as the number of features does."""
    boxes, seconds = houses(np.random.default_rng(0)), []
    for count in (COUNT // 4, COUNT):
        layer = open_layer(tmp_path / f"{count}.gpkg", ["house"], None, Shaping(**options), is_single=True)
        started = time.process_time()
        layer.add(Found(boxes[:count]))
        added = time.process_time() - started
        layer.write()
        seconds.append(time.process_time() - started)
        print(f"\n{count} features {options}: {added:.1f} s to add, {seconds[-1] - added:.1f} s to write")
    assert seconds[1] < 8 * seconds[0]
