"""A model that needs no training: it finds the one-coloured rectangles and blobs of a picture.

It stands in the network's place in tests of what lies around it. Every connected part of a plain colour that covers
at least some pixels is an instance: red is class 0, green 1, blue 2. Scores fall with the number of the part.
"""

import cv2
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from instseg_jax.inference.pipeline import Pipeline
from instseg_jax.inference.predictor import LoadedModel
from instseg_jax.inference.streaming import Feeding
from instseg_jax.types import Detections, Outputs

CLASS_NAMES = ("red", "green", "blue")
CATEGORY_IDS = (7, 3, 90)
SLOTS = 12
NETWORK_SCORES = (0.95, 0.92, 0.9)  # of red, green and blue
SCORES = np.linspace(0.95, 0.4, SLOTS)


def find_parts(image: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(class, mask [H, W] bool) of each one-coloured part of a picture in 0..1."""
    parts = []
    for label in range(3):
        others = [c for c in range(3) if c != label]
        plain = (image[..., label] > 0.8) & (image[..., others].max(axis=2) < 0.2)
        count, numbers = cv2.connectedComponents(plain.astype(np.uint8), connectivity=8)
        parts += [(label, numbers == n) for n in range(1, count) if (numbers == n).sum() >= 6]
    return sorted(parts, key=lambda part: -part[1].sum())[:SLOTS]


def detect(images: np.ndarray) -> Detections:
    """Detections of a batch [B, H, W, 3], with masks at the resolution of the input."""
    images = np.asarray(images)
    batch, height, width = images.shape[:3]
    scores, labels = np.zeros((batch, SLOTS), np.float32), np.zeros((batch, SLOTS), np.int32)
    boxes = np.zeros((batch, SLOTS, 4), np.float32)
    logits = np.full((batch, SLOTS, height, width), -5, np.float32)
    for b, image in enumerate(images):
        for i, (label, mask) in enumerate(find_parts(image)):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            scores[b, i], labels[b, i] = SCORES[i], label
            boxes[b, i] = columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
            logits[b, i][mask] = 5
    return Detections(scores=scores, labels=labels, boxes_xyxy=boxes, mask_logits=logits)


class FakeNetwork:
    """The same in JAX, for what compiles: one instance of each colour; counts how often it is traced."""

    def __init__(self) -> None:
        self.traced: list[tuple[int, ...]] = []

    def apply(self, variables, images) -> Outputs:
        self.traced.append(images.shape)
        height, width = images.shape[1:3]
        others = jnp.stack([jnp.maximum(images[..., (c + 1) % 3], images[..., (c + 2) % 3]) for c in range(3)], axis=-1)
        plain = jnp.moveaxis((images > 0.8) & (others < 0.2), -1, 1)  # [B, 3, H, W]
        in_rows, in_columns = plain.any(axis=3), plain.any(axis=2)
        y1, x1 = jnp.argmax(in_rows, axis=2), jnp.argmax(in_columns, axis=2)
        y2, x2 = height - jnp.argmax(in_rows[..., ::-1], axis=2), width - jnp.argmax(in_columns[..., ::-1], axis=2)
        boxes = jnp.stack([(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height], -1)
        scores = jnp.asarray(NETWORK_SCORES)
        logits = jnp.where(plain.any(axis=(2, 3)), jnp.log(scores / (1 - scores)), -9.0)
        class_logits = jnp.where(jnp.eye(3, dtype=bool), logits[:, :, None], -9.0)
        return Outputs(class_logits=class_logits, boxes=boxes, mask_logits=jnp.where(plain, 5.0, -5.0))


def make_model(*, image_size: int = 64, thresholds: dict | None = None, resize: str = "letterbox") -> LoadedModel:
    """A loaded model as `load_model` gives one, with a `FakeNetwork`."""
    config = ConfigDict(
        {
            "device": "auto",
            "model": {"name": "mask_rtdetr_n"},
            "data": {
                "image_size": image_size,
                "resize": resize,
                "eval_interpolation": "nearest",
                "channels": 3,
                "scaling": "none",
                "map_gsd": None,
                "map_bands": None,
                "map_stretch": None,
            },
            "eval": {"num_detections": SLOTS},
        }
    )
    return LoadedModel(FakeNetwork(), {}, config, CLASS_NAMES, CATEGORY_IDS, {}, "", thresholds)  # type: ignore[arg-type]


def make_pipeline(*, image_size: int = 64, threshold: float = 0.1, batch_size: int = 2) -> Pipeline:
    """A pipeline around `detect`."""
    return Pipeline(
        run=detect,
        feeding=Feeding((image_size, image_size), "letterbox", "nearest"),
        class_names=CLASS_NAMES,
        category_ids=CATEGORY_IDS,
        thresholds=np.full(3, threshold),
        batch_size=batch_size,
    )


def picture(*rectangles: tuple[int, int, int, int, int], size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """A grey picture [height, width, 3] with rectangles (class, x1, y1, x2, y2) of the plain colours."""
    image = np.full((*size, 3), 110, np.uint8)
    for label, x1, y1, x2, y2 in rectangles:
        image[y1:y2, x1:x2] = np.eye(3, dtype=np.uint8)[label] * 255
    return image
