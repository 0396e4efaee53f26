"""Runs the exported model beside this file: from a picture to instances, without the package that made it.

    python postprocess.py picture.jpg [more.png] [--threshold=0.4] [--threads=4] > found.json

Needs numpy, the runtime of the export's format (onnxruntime, openvino, jax or ai-edge-litert) and, to decode
pictures, Pillow or OpenCV (both for all TIFFs, Pillow for AVIF). `config.json` says how pictures are fed and what the
classes are. As a module:

    export = load(); result = segment(export, read_image("picture.jpg", export.config))

Masks are logits on a grid of a quarter of the network's input. They are enlarged as logits, in one bilinear step with
half-pixel centres straight to the picture, then cut at probability 0.5; results hold them as COCO run lengths.
"""

import argparse
import dataclasses
import json
import math
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from instseg_jax.pixels import decode, to_uint8

OUTPUTS = ("scores", "labels", "boxes_xyxy", "mask_logits")


@dataclasses.dataclass(frozen=True)
class Export:
    """An exported model that is ready for images."""

    config: dict  # config.json
    run: Callable  # images [B, H, W, C] float32 in 0..1 -> the four arrays of OUTPUTS


def load(folder=None, threads: int = 0) -> Export:
    """Open the export in `folder` (default: this file's) with `threads` CPU threads (0: as the runtime likes)."""
    folder = Path(folder or __file__).resolve()
    folder = folder if folder.is_dir() else folder.parent
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "files" in config:  # exports of before there were digests have none
        for name, wanted in config["files"].items():
            if f"{zlib.crc32((folder / name).read_bytes()):08x}" != wanted:
                raise ValueError(f"{folder / name} is damaged: its content is not what was written; export again")
    openers = {"onnx": _open_onnx, "ort": _open_onnx, "openvino": _open_openvino, "stablehlo": _open_stablehlo}
    openers |= {"litert": _open_litert, "deepness": _open_deepness}
    return Export(config, openers[config["format"]](folder / config["model_file"], config, threads))


def read_image(path, config: dict) -> np.ndarray:
    """Read a file to uint8 [h, w, C], turned as its EXIF orientation says; the same pixels as in training."""
    feeding = config["preprocessing"]
    is_color = feeding["channels"] == 3 and feeding["channel_ranges"] is None
    return scale_channels(decode(Path(path).read_bytes(), str(path), is_color=is_color), config, repr(str(path)))


def scale_channels(array: np.ndarray, config: dict, name: str = "the image") -> np.ndarray:
    """Bring pixels [h, w, C] of any type to uint8; by the ranges of config.json, where it has them."""
    feeding = config["preprocessing"]
    channels, ranges = feeding["channels"], feeding["channel_ranges"]
    found = array.shape[2] if array.ndim == 3 else 1
    if found != channels and (channels != 3 or ranges is not None):  # else grey and alpha become colours
        raise ValueError(f"{name} has {found} channels, the model takes {channels} channels.")
    return to_uint8(array, name, channels=channels, ranges=ranges)


def preprocess(image: np.ndarray, config: dict) -> tuple[np.ndarray, tuple[int, int]]:
    """Bring a picture [h, w, C] uint8 to the network's input: ([H, W, C] float32 in 0..1, (height, width) it fills)."""
    feeding = config["preprocessing"]
    size = tuple(feeding["size"])
    content = size
    if feeding["resize"] == "letterbox":  # keep the shape, from the top left corner
        scale = min(size[0] / image.shape[0], size[1] / image.shape[1])
        content = tuple(min(s, max(1, int(v * scale + 0.5))) for v, s in zip(image.shape, size, strict=False))
    pixels = np.zeros((*size, image.shape[2]), np.float32)
    pixels[: content[0], : content[1]] = resize(image, content, feeding["interpolation"]) * np.float32(1 / 255)
    return pixels, content


def segment(export: Export, image: np.ndarray, threshold: float | None = None) -> dict:
    """Find the instances of a picture [h, w, C] uint8: {"size", "boxes", "masks"}; see `find_instances`."""
    pixels, content = preprocess(image, export.config)
    outputs = export.run(pixels[None])
    return find_instances(outputs, 0, export.config, content, image.shape[:2], threshold)


def find_instances(
    outputs: tuple, index: int, config: dict, content: tuple, original: tuple, threshold: float | None = None
) -> dict:
    """The instances of image `index` of a batch of outputs, in pixels of the original (height, width).

    A box is {"cls_id", "label", "score", "coordinate": [x1, y1, x2, y2]}, clipped to the image; a mask is the COCO RLE
    of the whole image. `threshold` counts for all classes; None: those of config.json.
    """
    scores, labels, boxes, logits = (np.asarray(outputs[i][index]) for i in range(4))
    names, size = config["class_names"], config["preprocessing"]["size"]
    lowest = np.array(config["thresholds"] if threshold is None else [threshold] * len(names))
    kept = np.flatnonzero(scores.astype(np.float32) >= lowest[labels])
    scale = [o * s / c for o, s, c in zip(original, size, content, strict=True)]
    boxes = boxes[kept].astype(np.float32) * np.array([scale[1], scale[0]] * 2, np.float32)
    boxes = np.clip(boxes.astype(np.float64), 0, [original[1], original[0]] * 2)
    return {
        "size": [int(side) for side in original],
        "boxes": [
            {"cls_id": int(labels[i]), "label": names[labels[i]], "score": float(scores[i]), "coordinate": box.tolist()}
            for i, box in zip(kept, boxes, strict=True)
        ],
        "masks": [mask_to_rle(enlarge_mask(logits[i], size, content, original)) for i in kept],
    }


def enlarge_mask(logits: np.ndarray, size: tuple, content: tuple, original: tuple) -> np.ndarray:
    """Binary mask [height, width] of the picture from logits [h, w] on a grid that spans the network's input."""
    values = np.asarray(logits, np.float32)
    for axis in (0, 1):
        cells = values.shape[axis]
        last = -(-content[axis] * cells // size[axis]) - 1  # cells beyond it show padding
        centres = (np.arange(original[axis]) + 0.5) * (content[axis] * cells / (original[axis] * size[axis])) - 0.5
        position = np.clip(centres, 0, last)
        lower = position.astype(np.intp)
        weight = (position - lower).astype(np.float32)
        weight = weight[:, None] if axis == 0 else weight
        upper = np.minimum(lower + 1, last)
        values = values.take(lower, axis) * (1 - weight) + values.take(upper, axis) * weight
    return values > 0


def mask_to_rle(mask: np.ndarray) -> dict:
    """COCO's compressed run lengths of a binary mask [height, width], down its columns, background first."""
    flat = np.concatenate([[False], mask.T.reshape(-1)])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    characters = []
    for i, count in enumerate(counts):
        number = count - counts[i - 2] if i > 2 else count
        more = True
        while more:  # base 32, lowest digit first; bit 5 says that another one follows
            digit = number & 0x1F
            number >>= 5
            more = number != (-1 if digit & 0x10 else 0)
            characters.append(chr((digit | (0x20 if more else 0)) + 48))
    return {"size": [int(side) for side in mask.shape], "counts": "".join(characters)}


def resize(image: np.ndarray, content: tuple, interpolation: str) -> np.ndarray:
    """Resize uint8 [h, w, C] to uint8 [*content, C]: by OpenCV where it is installed, else the same in numpy."""
    if tuple(content) == image.shape[:2]:
        return image
    try:
        import cv2
    except ImportError:
        return resize_numpy(image, content, interpolation)
    flags = {"nearest": 0, "linear": 1, "cubic": 2, "area": 3, "lanczos": 4}
    parts = [
        cv2.resize(np.ascontiguousarray(image[..., i : i + 4]), content[::-1], interpolation=flags[interpolation])
        for i in range(0, image.shape[2], 4)
    ]
    return np.concatenate([part if part.ndim == 3 else part[..., None] for part in parts], axis=2)


def resize_numpy(image: np.ndarray, content: tuple, interpolation: str) -> np.ndarray:
    """OpenCV's resizing in numpy, to one grey level: without antialiasing, except for "area"."""
    # An area that grows in one direction is interpolated in both.
    shrinks = image.shape[0] >= content[0] and image.shape[1] >= content[1]
    values = image.astype(np.float32)
    for axis in (1, 0):
        index, weights = _taps(image.shape[axis], content[axis], interpolation, shrinks)
        shape = [1, 1, 1]
        shape[axis] = content[axis]
        values = sum(values.take(index[:, tap], axis) * weights[:, tap].reshape(shape) for tap in range(len(index.T)))
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _taps(pixels: int, wanted: int, interpolation: str, shrinks: bool) -> tuple[np.ndarray, np.ndarray]:
    """Source positions [wanted, taps] and weights of each along one axis."""
    scale = pixels / wanted
    if interpolation == "nearest":
        index = np.minimum((np.arange(wanted) * scale).astype(int), pixels - 1)[:, None]
        return index, np.ones((wanted, 1), np.float32)
    if interpolation == "area" and shrinks:  # how much of each pixel lies below the new one
        start = np.arange(wanted) * scale
        index = np.floor(start).astype(int)[:, None] + np.arange(math.ceil(scale) + 1)
        overlap = np.minimum(index + 1, start[:, None] + scale) - np.maximum(index, start[:, None])
        overlap = np.maximum(overlap, 0) * (index < pixels)
        return np.minimum(index, pixels - 1), (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)
    centre = (np.arange(wanted) + 0.5) * scale - 0.5
    if interpolation == "area":
        first = np.floor(np.arange(wanted) * scale)
        part = np.arange(wanted) + 1 - (first + 1) / scale
        centre = first + np.where(part <= 0, 0, part - np.floor(part))
    lower = np.floor(centre)
    part = (centre - lower)[:, None]
    if interpolation in ("linear", "area"):
        reach, weights = np.arange(2), np.concatenate([1 - part, part], 1)
    elif interpolation == "cubic":
        reach, a = np.arange(-1, 3), -0.75
        distance = np.abs(part - reach)
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        weights = np.where(distance <= 1, near, ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a)
    else:
        reach = np.arange(-3, 5)
        distance = np.where(np.abs(part - reach) < 1e-7, 1e-7, part - reach)
        weights = np.sin(np.pi * distance) * np.sin(np.pi * distance / 4) / distance**2
    weights = weights / weights.sum(1, keepdims=True)
    return np.clip(lower[:, None].astype(int) + reach, 0, pixels - 1), weights.astype(np.float32)


def _open_onnx(path: Path, config: dict, threads: int) -> Callable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = config["inputs"][0]["name"]
    return lambda images: session.run(list(OUTPUTS), {name: np.ascontiguousarray(images, np.float32)})


def _open_deepness(path: Path, config: dict, threads: int) -> Callable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    size, classes = config["preprocessing"]["size"], len(config["class_names"])

    def run(images):
        pixels = np.ascontiguousarray(np.moveaxis(np.asarray(images, np.float32), 3, 1))
        rows, prototypes = session.run(None, {"image": pixels})
        rows = rows.transpose(0, 2, 1)
        middle, half, scores = rows[..., :2], rows[..., 2:4] / 2, rows[..., 4 : 4 + classes]
        boxes = np.concatenate([middle - half, middle + half], axis=2) / np.array([size[1], size[0]] * 2, np.float32)
        logits = np.einsum("btm,bmhw->bthw", rows[..., 4 + classes :], prototypes)
        return scores.max(axis=2), scores.argmax(axis=2), boxes, logits

    return run


def _open_openvino(path: Path, config: dict, threads: int) -> Callable:
    # It would report every import over the network.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    settings["INFERENCE_PRECISION_HINT"] = config["compute_type"]
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    ports = [compiled.output(name) for name in OUTPUTS]

    def run(images):
        found = compiled(np.ascontiguousarray(images, np.float32))
        return tuple(found[port] for port in ports)

    return run


def _open_stablehlo(path: Path, config: dict, threads: int) -> Callable:
    import jax
    import jax.export

    call = jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)
    return lambda images: jax.device_get(call(np.asarray(images, np.float32)))


def _open_litert(path: Path, config: dict, threads: int) -> Callable:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads or None)
    runner = interpreter.get_signature_runner()

    def run(images):
        found = runner(**{config["inputs"][0]["name"]: np.ascontiguousarray(images, np.float32)})
        return tuple(found[name] for name in OUTPUTS)

    return run


def main() -> int:
    """Print the instances of some pictures as JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description="Find the instances in pictures; prints JSON.")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE")
    parser.add_argument("--threshold", type=float, help="lowest score (default: those of config.json)")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU (default: all)")
    options = parser.parse_args()
    try:
        export = load(threads=options.threads)
        results = []
        for path in options.pictures:
            found = segment(export, read_image(path, export.config), options.threshold)
            results.append({"res": {"input_path": path, "page_index": None, **found}})
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(results[0] if len(results) == 1 else results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
