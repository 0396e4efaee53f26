"""Layers held against each other: pairs counted by hand, in any CRS, by class, by block and within an area."""

import json

import numpy as np
import pytest

pytest.importorskip("rasterio")
pytest.importorskip("pyogrio")
pyproj = pytest.importorskip("pyproj")
shapely = pytest.importorskip("shapely")

from instseg_jax.cli import main  # noqa: E402
from instseg_jax.geo.layer_files import read_layer_file, write_layer  # noqa: E402
from instseg_jax.scoring.maps import ALL, MapLayer, by_block, match_layers  # noqa: E402

UTM = 32633
EAST, NORTH = 500_000, 5_500_000


@pytest.fixture(autouse=True)
def no_second_start(monkeypatch):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")


def square(x, y, side=20.0):
    return shapely.box(EAST + x, NORTH + y, EAST + x + side, NORTH + y + side)


def in_crs(shapes, epsg):
    step = pyproj.Transformer.from_crs(UTM, epsg, always_xy=True)
    return shapely.transform(np.array(shapes, object), lambda xy: np.stack(step.transform(*xy.T), axis=1))


def layers(tmp_path, epsg=UTM):
    """Houses: two right, one of them doubled, one too far off, one missed. Trees: one taken for a house."""
    true = {"house": [square(0, 0), square(100, 0), square(200, 0), square(300, 0)], "tree": [square(0, 200)]}
    found = [
        ("house", 0.9, square(2, 0)),  # IoU 18 / 22
        ("house", 0.8, square(0, 0)),  # the same house again
        ("house", 0.7, square(100, 5)),  # 15 / 25
        ("house", 0.6, square(212, 0)),  # 8 / 32: none
        ("house", 0.5, square(0, 200)),  # a tree
    ]
    labels = [name for name, shapes in true.items() for _ in shapes]
    shapes = np.array([shape for shapes in true.values() for shape in shapes], object)
    write_layer(tmp_path / "true.gpkg", shapes, {"kind": np.array(labels, object)}, pyproj.CRS(UTM))
    columns = {"label": np.array([f[0] for f in found], object), "score": np.array([f[1] for f in found])}
    write_layer(tmp_path / "found.gpkg", in_crs([f[2] for f in found], epsg), columns, pyproj.CRS(epsg))
    return tmp_path / "true.gpkg", tmp_path / "found.gpkg"


@pytest.mark.parametrize("epsg", [UTM, 4326, 3857])
def test_pairs_counted_by_hand(tmp_path, epsg, capsys):
    true, found = layers(tmp_path, epsg)
    options = [f"--against={true}", f"--predictions={found}", "--class_field=kind", "--block=140m"]
    assert main(["evaluate", *options, f"--workdir={tmp_path / 'out'}"]) == 0
    said = json.loads((tmp_path / "out" / "map_result.json").read_text())
    house, tree, all_classes = (said["classes"][name] for name in ("house", "tree", ALL))
    assert (house["true"], house["found"], house["pairs"]) == (4, 5, 2)
    assert house["precision"] == 2 / 5 and house["recall"] == 2 / 4 and house["f1"] == pytest.approx(4 / 9)
    assert house["iou"] == pytest.approx((18 / 22 + 15 / 25) / 2, abs=1e-3)
    assert house["true_m2"] == pytest.approx(4 * 400, rel=0.003) and house["found_m2"] == pytest.approx(2000, rel=0.003)
    assert tree["recall"] == 0 and tree["precision"] is None and tree["f1"] is None
    assert all_classes["true"] == 5 and all_classes["pairs"] == 2
    assert {name: (row["true"], row["found"]) for name, row in said["blocks"].items()} == {
        "0_0": (2, 3), "1_0": (1, 1), "2_0": (1, 0), "0_1": (1, 1),
    }  # fmt: skip
    report = (tmp_path / "out" / "map_report.html").read_text()
    assert report.count("<path") == 2 + 3 + 3 and "house" in report
    assert "house: 4 true, 5 found, 2 pairs; precision 0.400, recall 0.500" in capsys.readouterr().out


def test_a_stricter_threshold_and_an_area(tmp_path):
    true, found = layers(tmp_path)
    area = np.array([shapely.box(EAST - 10, NORTH - 10, EAST + 150, NORTH + 50)], object)
    write_layer(tmp_path / "aoi.gpkg", in_crs(area, 4326), {"name": np.array(["a"], object)}, pyproj.CRS(4326))
    options = [f"--against={true}", f"--predictions={found}", "--class_field=kind", f"--aoi={tmp_path / 'aoi.gpkg'}"]
    assert main(["evaluate", *options, "--iou=0.7", f"--workdir={tmp_path / 'out'}"]) == 0
    house = json.loads((tmp_path / "out" / "map_result.json").read_text())["classes"]["house"]
    assert (house["true"], house["found"], house["pairs"]) == (2, 3, 1)


def test_pairs_of_many_are_those_of_all_against_all():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 300, (2, 150, 2))
    labels = [np.array(rng.choice(["a", "b"], 150), object) for _ in range(2)]
    shapes = [np.array([square(x, y, 40) for x, y in each], object) for each in corners]
    crs, scores = pyproj.CRS(UTM), rng.permutation(150) / 150
    found, true = (MapLayer(shapes[k], labels[k], (scores, np.ones(150))[k], crs) for k in range(2))
    pairs = match_layers(found, true, iou=0.3, area=None)
    taken, expected = set(), {}
    for i in np.argsort(-scores):
        ious = [
            (shapes[0][i] & other).area / (shapes[0][i] | other).area
            if labels[0][i] == labels[1][j] and j not in taken else 0
            for j, other in enumerate(shapes[1])
        ]  # fmt: skip
        if max(ious) >= 0.3:
            expected[int(i)] = int(np.argmax(ious))
            taken.add(expected[int(i)])
    assert {i: int(j) for i, j in enumerate(pairs.of_found) if j >= 0} == expected and len(expected) > 30
    blocks = by_block(pairs, 100.0)
    assert sum(row["pairs"] for row in blocks.values()) == len(expected)


def test_true_polygons_that_say_no_crs_are_asked_for(tmp_path, capsys):
    """Nothing but the file itself can tell where they lie: as degrees they would be nowhere."""
    true, found = layers(tmp_path)
    blobs, columns, _ = read_layer_file(true, None, None)
    write_layer(tmp_path / "true.geojson", shapely.from_wkb(blobs), columns, pyproj.CRS(UTM))
    said = json.loads((tmp_path / "true.geojson").read_text())
    del said["crs"]
    (tmp_path / "true.geojson").write_text(json.dumps(said))
    options = [f"--against={tmp_path / 'true.geojson'}", f"--predictions={found}", "--class_field=kind"]
    assert main(["evaluate", *options, f"--workdir={tmp_path / 'out'}"]) != 0
    assert "--labels_crs=EPSG:" in capsys.readouterr().err
    assert main(["evaluate", *options, f"--labels_crs=EPSG:{UTM}", f"--workdir={tmp_path / 'out'}"]) == 0
    said = json.loads((tmp_path / "out" / "map_result.json").read_text())
    assert said["classes"]["house"]["pairs"] == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--class_field=kind", "--iou=0"], "--iou is 0, it must be above 0"),
        (["--class_field=kind", "--block=0"], "--block is 0, it must be above 0"),
        (["--class_name=roof"], "No class is in both layers: 'house' were found, 'roof' are true"),
        ([], "has no field 'label'; it has kind"),
    ],
)
def test_errors_say_what_is_allowed(tmp_path, capsys, more, message):
    true, found = layers(tmp_path)
    options = [f"--against={true}", f"--predictions={found}", f"--workdir={tmp_path / 'out'}"]
    assert main(["evaluate", *options, *more]) != 0
    assert message in capsys.readouterr().err
