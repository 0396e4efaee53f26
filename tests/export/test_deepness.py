"""The export for QGIS' Deepness: what the plugin makes of it, by its documented steps, is what we find ourselves."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from instseg_jax import masks  # noqa: E402
from instseg_jax.export import standalone  # noqa: E402
from instseg_jax.runtimes import deepness  # noqa: E402
from instseg_jax.runtimes.shape import Shape  # noqa: E402

HEIGHT, WIDTH, COUNT = 64, 96, 5
NAMES = ["house", "tree", "car"]
LABELS = np.array([[2, 0, 1, 0, 2]], np.int32)
SCORES = np.array([[0.9, 0.8, 0.6, 0.35, 0.1]], np.float32)
BOXES_PX = np.array([[8, 8, 40, 40], [48, 4, 92, 28], [4, 44, 28, 60], [60, 36, 90, 60], [0, 0, 9, 9]], np.float32)


def make_logits() -> np.ndarray:
    """Ellipses in the boxes, on a quarter of the grid."""
    y, x = (np.mgrid[: HEIGHT // 4, : WIDTH // 4] + 0.5) * 4
    x1, y1, x2, y2 = BOXES_PX.T[:, :, None, None]
    inside = ((x - (x1 + x2) / 2) / (x2 - x1) * 2) ** 2 + ((y - (y1 + y2) / 2) / (y2 - y1) * 2) ** 2
    return (6 * (1 - inside)).clip(-8, 8)[None].astype(np.float32)


def make_detect(dtype):
    """A network that always finds the same, more surely where the picture is bright."""
    boxes = (BOXES_PX / np.array([WIDTH, HEIGHT] * 2, np.float32))[None]

    def detect(images):
        light = images[:, 0, 0, 0]  # also tells that channels are where they belong
        return (
            SCORES * light[:, None],
            jnp.asarray(LABELS),
            boxes + 0 * light[:, None, None],
            make_logits() + 0 * light[:, None, None, None],
        )

    return detect


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """The file, and what config.json says of it."""
    path = tmp_path_factory.mktemp("export") / "model.deepness.onnx"
    shape = Shape(1, (HEIGHT, WIDTH), 3, dynamic_batch=False)
    settings = {
        "class_names": NAMES,
        "thresholds": [0.4, 0.3, 0.5],
        "preprocessing": {"size": [HEIGHT, WIDTH]},
        "config": {"data": {"map_gsd": 0.3}},
    }
    said = deepness.write_deepness(path, make_detect, shape, "", ())
    return path, settings | said | deepness.finish_deepness(path, settings)


def picture() -> np.ndarray:
    image = np.zeros((1, HEIGHT, WIDTH, 3), np.float32)
    image[..., 0] = 1
    return image


def run_plugin(path, image: np.ndarray) -> list[tuple[int, float, np.ndarray, np.ndarray]]:
    """(class, score, box, mask) of each detection, by the steps that the plugin takes after the network."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["model_type"]) == "Detector"
    assert json.loads(said["det_type"]) == "YOLO_Ultralytics_segmentation"
    classes = len(json.loads(said["class_names"]))
    (given,) = session.get_inputs()
    assert given.shape == [1, 3, HEIGHT, WIDTH] and len(session.get_outputs()[0].shape) == 3
    rows, prototypes = session.run(None, {given.name: image.transpose(0, 3, 1, 2)})
    found = []
    for row in rows[0].T:
        probabilities = row[4 : 4 + classes]
        if probabilities.max() < json.loads(said["det_conf"]):
            continue
        middle_x, middle_y, width, height = row[:4]
        box = np.array([middle_x - width / 2, middle_y - height / 2, middle_x + width / 2, middle_y + height / 2], int)
        values = 1 / (1 + np.exp(-np.tensordot(row[4 + classes :], prototypes[0], 1)))
        y, x = np.mgrid[: values.shape[0], : values.shape[1]]
        x1, y1, x2, y2 = box / 4
        found.append(
            (
                int(probabilities.argmax()),
                float(probabilities.max()),
                box,
                values * ((x >= x1) & (x < x2) & (y >= y1) & (y < y2)),
            )
        )
    return found


def test_the_plugin_finds_what_we_find(export):
    path, _ = export
    found = run_plugin(path, picture())
    assert [one[0] for one in found] == [2, 0, 1, 0]  # the last one is below the lowest threshold
    np.testing.assert_allclose([one[1] for one in found], SCORES[0, :4], rtol=1e-6)
    np.testing.assert_allclose([one[2] for one in found], BOXES_PX[:4], atol=1)
    for (_, _, _, mask), logits in zip(found, make_logits()[0], strict=False):
        wanted = logits > 0
        assert wanted.sum() >= 20 and ((mask >= 0.5) == wanted).all()
    assert run_plugin(path, 0.5 * picture())[0][1] == pytest.approx(0.45)


def test_it_is_read_as_every_export(export):
    path, settings = export
    opened = [
        deepness.open_deepness(path, settings, "cpu", None)(picture()),
        standalone._open_deepness(path, settings, 0)(picture()),
    ]
    for scores, labels, boxes, logits in opened:
        np.testing.assert_allclose(scores, SCORES, rtol=1e-6)
        np.testing.assert_array_equal(labels, LABELS)
        np.testing.assert_allclose(boxes * [WIDTH, HEIGHT, WIDTH, HEIGHT], BOXES_PX[None], atol=1e-4)
        np.testing.assert_allclose(logits, make_logits(), atol=1e-5)
    rle = masks.encode_mask(logits[0, 0] > 0)
    assert masks.rle_area(rle) > 20


def test_the_file_says_what_the_plugin_asks_for(export):
    path, settings = export
    said = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_modelmeta()
    values = {key: json.loads(value) for key, value in said.custom_metadata_map.items()}
    assert values["class_names"] == {"0": "house", "1": "tree", "2": "car"}
    assert values["resolution"] == pytest.approx(30) and values["tile_size"] == WIDTH and values["det_conf"] == 0.3
    assert settings["outputs"][0]["shape"] == [1, 4 + 3 + COUNT, COUNT]


def test_one_picture_with_three_channels(tmp_path):
    for batch, channels in ((2, 3), (1, 4)):
        with pytest.raises(ValueError, match="takes one RGB picture"):
            deepness.write_deepness(tmp_path / "a.onnx", make_detect, Shape(batch, (64, 64), channels, False), "", ())
