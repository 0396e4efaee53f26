"""How long the steps of inference take and how much memory they want: load, preprocess, forward, postprocess, encode.

Each step runs alone, one after the other, so that its process CPU time is its own; predicting overlaps them
(`streaming.py`). The training half is `benchmarks/training.py`.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from instseg_jax.images import preprocess, read_image
from instseg_jax.inference.postprocess import detections_to_instances, encode_masks, select_detections
from instseg_jax.memory import memory_above, peak_memory_mb
from instseg_jax.models.mask_rtdetr import MaskRTDETR

STEPS = ("load", "preprocess", "forward", "postprocess", "encode")
WARM_UPS = 2


def time_inference(
    model: MaskRTDETR,
    variables: dict,
    files: Sequence[Path],
    *,
    put_images: Callable[[np.ndarray], jax.Array],
    batch_size: int,
    image_size: int,
    resize: str,
    interpolation: str,
    num_detections: int,
    repeats: int,
) -> dict:
    """Time each step on batches of picture files.

    `variables` lie on the devices already, and `put_images` brings a batch [B, H, W, 3] to them. Postprocessing is the
    choice of the best (query, class) pairs and their way to the host; encoding resizes their masks to the pictures'
    own sizes and makes RLEs.

    Returns: {step: {"median_s", "p95_s", "cpu_s" (median), "images_per_s"}} for a batch, "total" over the steps,
    "first_forward_s" with compiling, and "memory_mb", the process's highest so far.
    """
    size = (image_size, image_size)
    forward = jax.jit(model.apply)
    select = jax.jit(lambda outputs: select_detections(outputs, num_detections=num_detections))
    times: dict[str, list[tuple[float, float]]] = {step: [] for step in STEPS}
    first_forward = None

    for repeat in range(-WARM_UPS, repeats):
        clock = _Clock()
        chosen = [files[(repeat * batch_size + i) % len(files)] for i in range(batch_size)]
        images = [read_image(file) for file in chosen]
        clock.lap("load")
        fed = [preprocess(image, size, resize=resize, interpolation=interpolation) for image in images]
        batch = np.stack([pixels for pixels, _ in fed])
        clock.lap("preprocess")
        outputs = jax.block_until_ready(forward(variables, put_images(batch)))
        clock.lap("forward")
        detections = jax.tree.map(np.asarray, select(outputs))
        clock.lap("postprocess")
        for i, (image, (_, content)) in enumerate(zip(images, fed, strict=True)):
            original_size = (image.shape[0], image.shape[1])
            detections_to_instances(detections, i, input_size=size, content_size=content, original_size=original_size)
        clock.lap("encode")
        first_forward = clock.laps["forward"][0] if first_forward is None else first_forward
        if repeat >= 0:
            for step, lap in clock.laps.items():
                times[step].append(lap)
    total = [tuple(np.sum(laps, axis=0)) for laps in zip(*times.values(), strict=True)]
    return {
        "batch_size": batch_size,
        "steps": {step: _summarise(laps, batch_size) for step, laps in {**times, "total": total}.items()},
        "first_forward_s": first_forward,
        "memory_mb": peak_memory_mb(),
    }


def measure_encoding(*, repeats: int) -> dict:
    """Time and memory of encoding made-up objects, as a trained network's masks are: smooth, some large, most small.

    Returns: for 100 masks of 640 x 480 pixels, 100 that are all large, and 300 of 4000 x 3000, "median_s", "p95_s",
    "cpu_s" and "memory_mb", the memory of the process above what it had before; None where the system doesn't tell.
    """
    cases: tuple[tuple[str, int, tuple[int, int], dict], ...] = (
        ("100 masks, 640x480", 100, (480, 640), {}),
        ("100 large masks, 640x480", 100, (480, 640), {"half_axes": (0.3, 0.55)}),
        ("300 masks, 4000x3000", 300, (3000, 4000), {}),
    )
    measured = {}
    for name, count, size, shape in cases:
        logits = made_up_logits(count, seed=0, **shape)
        laps, highest = [], []
        for _ in range(repeats):
            clock = _Clock()
            with memory_above() as above:
                encode_masks(logits, input_size=(640, 640), content_size=(640, 640), original_size=size)
            clock.lap("encode")
            laps.append(clock.laps["encode"])
            highest.append(above)
        known = [sample[0] for sample in highest if sample]
        measured[name] = _summarise(laps, 1) | {"memory_mb": max(known) if known else None}
    return measured


def made_up_logits(
    count: int, *, seed: int, grid: int = 160, half_axes: tuple[float, float] = (0.02, 0.35)
) -> np.ndarray:
    """Mask logits [count, grid, grid] of tilted ellipses with wavy edges; `half_axes` is a range, in sides."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:grid, :grid] / grid
    logits = np.empty((count, grid, grid), np.float32)
    low, high = np.log(half_axes).tolist()
    for i in range(count):
        (x0, y0), angle = rng.random(2), rng.uniform(0, np.pi)
        a, b = np.exp(rng.uniform(low, high, 2))
        u = (x - x0) * np.cos(angle) + (y - y0) * np.sin(angle)
        v = (y - y0) * np.cos(angle) - (x - x0) * np.sin(angle)
        logits[i] = 6 * (1 - (u / a) ** 2 - (v / b) ** 2) + np.sin(12 * x + i) * np.cos(9 * y)
    return logits


class _Clock:
    """Wall and process CPU seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, tuple[float, float]] = {}
        self._last = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.laps[name] = now[0] - self._last[0], now[1] - self._last[1]
        self._last = time.perf_counter(), time.process_time()


def _summarise(laps: Sequence[tuple[float, ...]], images: int) -> dict:
    wall, cpu = np.array(laps).T
    median = float(np.median(wall))
    return {
        "median_s": median,
        "p95_s": float(np.quantile(wall, 0.95)),
        "cpu_s": float(np.median(cpu)),
        "images_per_s": images / median if median else None,
    }
