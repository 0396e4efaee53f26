"""One results file has one AP: during training, from `evaluate`, and from `compare`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import write_subset

from instseg_jax.cli import call
from instseg_jax.config import load_config
from instseg_jax.data.source import build_dataset
from instseg_jax.devices import make_mesh
from instseg_jax.evaluation.coco import coco_metrics, detection_limit
from instseg_jax.training.validation import build_score
from instseg_jax.types import Outputs

QUERIES = 150


class Crowded:
    """150 detections of one class in every image: the first is the left object, those from the 121st on the right."""

    def apply(self, variables: dict, images: jax.Array) -> Outputs:
        count, height, width, _ = images.shape
        rank = jnp.arange(QUERIES)
        scores = jnp.linspace(2.0, -2.0, QUERIES)
        x = jnp.where(rank == 0, 0.25, 0.75) * variables["scale"]
        side = jnp.where((rank == 0) | (rank >= 120), 0.375, 0.0625)
        boxes = jnp.stack([x, jnp.full(QUERIES, 0.5), side, side], axis=1)
        columns, rows = (jnp.arange(width // 4) + 0.5) / (width // 4), (jnp.arange(height // 4) + 0.5) / (height // 4)
        near = side[:, None, None] / 2
        inside = (jnp.abs(rows[:, None] - 0.5) < near) & (jnp.abs(columns - x[:, None, None]) < near)
        masks = jnp.where(inside, 5.0, -5.0)
        shape = (count, QUERIES)
        return Outputs(
            class_logits=jnp.broadcast_to(scores[:, None], (*shape, 1)),
            boxes=jnp.broadcast_to(boxes, (*shape, 4)),
            mask_logits=jnp.broadcast_to(masks, (*shape, height // 4, width // 4)),
        )


def with_two_squares(truth: Path) -> None:
    """Put a left and a right object into every image of an annotation file."""
    content = json.loads(truth.read_text())
    content["annotations"] = []
    for image in content["images"]:
        for x in (0.25, 0.75):
            w, h = 0.375 * image["width"], 0.375 * image["height"]
            left, top = x * image["width"] - w / 2, image["height"] / 2 - h / 2
            corners = [left, top, left + w, top, left + w, top + h, left, top + h]
            entry = {"id": len(content["annotations"]) + 1, "image_id": image["id"], "iscrowd": 0, "area": w * h}
            entry |= {
                "bbox": [left, top, w, h],
                "segmentation": [corners],
                "category_id": content["categories"][0]["id"],
            }
            content["annotations"].append(entry)
    truth.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Metrics that training notes, with results and truth as files."""
    folder = tmp_path_factory.mktemp("one_ap")
    data = write_subset(folder / "data", 2)
    with_two_squares(data / "annotations/instance_val.json")
    fields = {"data.dir": str(data), "data.image_size": "64", "eval.num_detections": str(QUERIES)}
    config = load_config("configs/quickstart.py", fields)
    dataset = build_dataset(config.data, "val")
    score = build_score(config, Crowded(), dataset, make_mesh(jax.devices()[:1]))
    metrics, results = score({"scale": np.float32(1)})
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "other.json").write_text(json.dumps([entry for entry in results if entry["score"] > 0.3]))
    return folder, data / "annotations/instance_val.json", metrics, results


def test_training_evaluate_and_compare_agree(scored):
    folder, truth, metrics, results = scored
    assert len(results) == 2 * QUERIES
    file = folder / "results.json"
    assert call("evaluate", f"--predictions={file}", f"--annotations={truth}", f"--workdir={folder / 'a'}") == 0
    names = ["compare", str(file), str(folder / "other.json"), f"--annotations={truth}", "--resamples=5"]
    assert call(*names, f"--workdir={folder / 'b'}") == 0
    evaluated = json.loads((folder / "a/evaluate_result.json").read_text())["metrics"]
    compared = json.loads((folder / "b/compare.json").read_text())["metrics"]["results"]
    for name, value in metrics.items():
        assert evaluated[name] == pytest.approx(value, abs=1e-12) and compared[name] == evaluated[name], name
    # The limit decides here, and it is COCO's.
    content = json.loads(truth.read_text())
    at_100 = coco_metrics(content, results, max_detections=100)["AP"]
    assert 0.3 < metrics["AP"] == at_100 < coco_metrics(content, results, max_detections=QUERIES)["AP"]


def test_the_limit_follows_from_the_truth():
    def truth(*counts):
        return {"annotations": [{"image_id": i, "category_id": 1} for i, n in enumerate(counts) for _ in range(n)]}

    assert detection_limit({}) == detection_limit(truth()) == detection_limit(truth(3, 100)) == 100
    assert detection_limit(truth(3, 101, 7)) == 101
