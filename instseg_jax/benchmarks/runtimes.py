"""The same network in several runtimes, timed side by side.

All of them stand ready in one process and answer in turn, round after round, so that ratios hold where something else
runs on the machine. The machine's limit is measured in the same rounds: the time that the network's floating-point
operations would take at the rate of a large matrix product.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instseg_jax.boxes import box_iou
from instseg_jax.inference.optimize import optimize_for_inference
from instseg_jax.inference.predictor import make_predict
from instseg_jax.memory import memory_above
from instseg_jax.runtimes.exported import Export, open_export
from instseg_jax.runtimes.formats import FORMATS
from instseg_jax.runtimes.shape import Shape
from instseg_jax.types import Detections

RUNTIMES = ("xla", "onnxruntime", "openvino", "openvino_bf16")
WARM_UPS = 2
MATRIX = 2048  # side of the matrix product that gives the machine's rate
KEPT_IOU = 0.9  # of two boxes that are one detection


@dataclasses.dataclass
class Candidate:
    """Something that answers, and how long it took in each round."""

    name: str
    run: Callable[[], Any]
    first_s: float | None = None  # to the first result: open or compile, and run
    memory_mb: float | None = None  # above the process, until the first result
    file_mb: float | None = None
    found: Detections | None = None
    times: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # (wall, process CPU) seconds


def compare_runtimes(
    model: Any,
    variables: dict,
    images: np.ndarray,
    *,
    runtimes: Sequence[str],
    num_detections: int,
    num_threads: int,
    repeats: int,
    folder: Path,
    peer: Path | None = None,
) -> dict:
    """Time a network on images [B, H, W, C] in each runtime, and `peer`, any ONNX file of one image input, beside them.

    The ONNX file is written to `folder`. XLA uses all usable cores, the others `num_threads`. Differences are to the
    network as it was trained, in XLA.

    Shares of the limit are of the quickest rounds, shares of the peer's time are of the medians.

    Returns: {"gflop", "gflops" (of the matrix product), "limit_s", "limit_cpu_s", "rows": [one of each candidate]}.
    """
    plain = jax.device_get(make_predict(model, num_detections=num_detections)(variables, images))
    network, weights = optimize_for_inference(model, variables)
    candidates, gflop = [], None
    for runtime in runtimes:
        if runtime == "xla":
            made, gflop = _xla(network, weights, images, num_detections)
        else:
            made = _exported(runtime, network, weights, images, num_detections, num_threads, folder)
        candidates.append(made)
    if peer is not None:
        candidates.append(_peer(peer, images, num_threads))
    if gflop is None:
        gflop = _operations(make_predict(network, num_detections=num_detections), weights, images)
    product = _matrix_product()
    _time_in_turn([*candidates, product], repeats)
    work = 2e-9 * MATRIX**3
    wall, cpu = (min(times) for times in zip(*product.times, strict=True))
    limit, limit_cpu = gflop * wall / work, gflop * cpu / work
    rows = [_row(candidate, plain, limit, limit_cpu) for candidate in candidates]
    for row in rows if peer is not None else ():
        row["times_peer"] = row["median_s"] / rows[-1]["median_s"]
        row["cpu_times_peer"] = row["cpu_median_s"] / rows[-1]["cpu_median_s"]
    return {"gflop": gflop, "gflops": work / wall, "limit_s": limit, "limit_cpu_s": limit_cpu, "rows": rows}


def agreement(found: Detections, expected: Detections) -> dict[str, float]:
    """How alike two sets of detections are, whose order may differ.

    "score": the largest difference of scores, rank by rank. "kept": the share of the expected detections that were
    found, with the same class and a box of an IoU of at least 0.9, and "box_iou", the mean IoU of these.
    """
    kept, ious = 0, []
    for image in range(len(expected.scores)):
        overlap = np.asarray(box_iou(expected.boxes_xyxy[image][:, None], found.boxes_xyxy[image][None]))
        same = np.asarray(expected.labels)[image][:, None] == np.asarray(found.labels)[image][None]
        best = np.where(same, overlap, 0).max(axis=1)
        kept += int((best >= KEPT_IOU).sum())
        ious.append(best[best >= KEPT_IOU])
    return {
        "score": float(np.abs(np.asarray(found.scores) - np.asarray(expected.scores)).max()),
        "kept": kept / np.size(expected.scores),
        "box_iou": float(np.concatenate(ious).mean()) if kept else 0.0,
    }


def _xla(network: Any, weights: dict, images: np.ndarray, count: int) -> tuple[Candidate, float]:
    predict = make_predict(network, num_detections=count)
    on_device = jax.device_put(weights)
    made = _first("xla", lambda: lambda: jax.device_get(predict(on_device, images)))
    made.file_mb = sum(np.asarray(x).nbytes for x in jax.tree.leaves(weights)) / 1e6
    return made, _operations(predict, on_device, images)


def _operations(predict: Any, weights: dict, images: np.ndarray) -> float:
    """Floating-point operations of a call in 1e9, as XLA counts them."""
    cost = predict.lower(weights, images).compile().cost_analysis()
    return float((cost[0] if isinstance(cost, list) else cost)["flops"]) / 1e9


def _exported(
    runtime: str, network: Any, weights: dict, images: np.ndarray, count: int, num_threads: int, folder: Path
) -> Candidate:
    """The network's ONNX file in another runtime, read from disk as a user's program would."""
    import onnx

    from instseg_jax.export.export import build_onnx

    batch, height, width, channels = images.shape
    path = folder / FORMATS["onnx"].file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shape = Shape(batch, (height, width), channels, dynamic_batch=False)
        onnx.save(build_onnx(network, weights, shape, num_detections=count), str(path))
    backend, _, precision = runtime.partition("_")
    settings = {
        "format": "onnx",
        "preprocessing": {"size": [height, width], "channels": channels},
        "batch": batch,
        "dynamic_batch": False,
        "num_detections": count,
        "compute_type": precision or "f32",
    }

    def start() -> Callable[[], Detections]:
        predict = open_export(Export(folder, settings, backend, num_threads), device="cpu", num_detections=count)
        return lambda: predict(images)

    made = _first(runtime, start)
    made.file_mb = path.stat().st_size / 1e6
    return made


def _peer(path: Path, images: np.ndarray, num_threads: int) -> Candidate:
    """Another network's ONNX file in ONNX Runtime, on the same images, in whichever order of axes it takes them."""
    import onnxruntime

    def start() -> Callable[[], Any]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = num_threads, 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        wanted = session.get_inputs()[0]
        first = images if wanted.shape[3] == images.shape[3] else images.transpose(0, 3, 1, 2)
        fed = {wanted.name: np.ascontiguousarray(first)}
        return lambda: session.run(None, fed)

    made = _first(f"peer {path.name}", start)
    made.found = None
    made.file_mb = path.stat().st_size / 1e6
    return made


def _first(name: str, start: Callable[[], Callable[[], Any]]) -> Candidate:
    """A candidate, which `start` makes ready, with what it took to its first result."""
    with memory_above() as memory:
        began = time.perf_counter()
        run = start()
        found = run()
        first_s = time.perf_counter() - began
    return Candidate(name, run, first_s, memory[0] if memory else None, found=found)


def _matrix_product() -> Candidate:
    matrix = jnp.asarray(np.random.default_rng(0).random((MATRIX, MATRIX), np.float32))
    product = jax.jit(lambda a: a @ a)
    return Candidate("matrix product", lambda: jax.block_until_ready(product(matrix)))


def _time_in_turn(candidates: Sequence[Candidate], repeats: int) -> None:
    for repeat in range(-WARM_UPS, repeats):
        for candidate in candidates:
            wall, cpu = time.perf_counter(), time.process_time()
            candidate.run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if repeat >= 0:
                candidate.times.append((wall, cpu))


def _row(candidate: Candidate, plain: Detections, limit: float, limit_cpu: float) -> dict:
    wall, cpu = np.array(candidate.times).T
    return {
        "runtime": candidate.name,
        "min_s": float(wall.min()),
        "median_s": float(np.median(wall)),
        "p95_s": float(np.quantile(wall, 0.95)),
        "cpu_min_s": float(cpu.min()),
        "cpu_median_s": float(np.median(cpu)),
        "times_limit": float(wall.min() / limit),
        "cpu_times_limit": float(cpu.min() / limit_cpu),
        "first_s": candidate.first_s,
        "memory_mb": candidate.memory_mb,
        "file_mb": candidate.file_mb,
        "difference": None if candidate.found is None else agreement(candidate.found, plain),
    }
