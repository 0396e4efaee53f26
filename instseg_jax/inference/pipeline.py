"""Pictures in files to drawings and JSON."""

import pathlib
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from instseg_jax.images import preprocess, read_image
from instseg_jax.inference.postprocess import detections_to_instances
from instseg_jax.inference.predictor import LoadedModel, make_predict
from instseg_jax.inference.results import IMAGE_SUFFIXES, Result


def find_images(source: str | pathlib.Path) -> list[pathlib.Path]:
    """The picture, or all pictures of a folder in order of their names.

    Raises: FileNotFoundError when there is no such file or folder, or no picture in it.
    """
    path = pathlib.Path(source)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise FileNotFoundError(f"there is no picture ({', '.join(IMAGE_SUFFIXES)}) in {path}")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"there is no file or folder {path}")
    return [path]


def predict_files(
    model: LoadedModel,
    paths: Sequence[pathlib.Path],
    folder: pathlib.Path,
    *,
    threshold: float,
    progress: Callable[[Iterable, int], Iterable],
) -> dict:
    """Segment each picture and write `{stem}_res{ext}` and `{stem}_res.json` into `folder`.

    A picture that cannot be read is left out and reported; the rest goes on.

    Returns: {"images", "instances", "seconds", "failed": [(path, reason)]}.
    """
    predict = make_predict(model.model, num_detections=model.config.eval.num_detections)
    summary = {"images": 0, "instances": 0, "failed": []}
    started = time.monotonic()
    for path in progress(paths, len(paths)):
        try:
            image = read_image(path)
        except (ValueError, OSError) as error:
            summary["failed"].append((str(path), str(error)))
            continue
        result = predict_image(model, predict, image, input_path=path, threshold=threshold)
        result.save_to_img(folder)
        result.save_to_json(folder)
        summary["images"] += 1
        summary["instances"] += len(result)
    return summary | {"seconds": time.monotonic() - started}


def predict_image(
    model: LoadedModel, predict: Callable, image: np.ndarray, *, input_path: str | pathlib.Path, threshold: float
) -> Result:
    """Segment one picture [H, W, 3] uint8 RGB: its instances with a score of at least `threshold`."""
    data = model.config.data
    size = (data.image_size, data.image_size)
    pixels, content = preprocess(image, size, resize=data.resize, interpolation=data.eval_interpolation)
    detections = predict(model.variables, pixels[None])
    instances = detections_to_instances(
        detections,
        0,
        input_size=size,
        content_size=content,
        original_size=image.shape[:2],
        score_threshold=threshold,
    )
    return Result.from_instances(
        instances, class_names=model.class_names, input_path=input_path, size=image.shape[:2], image=image
    )
