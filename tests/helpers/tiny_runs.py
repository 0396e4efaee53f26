"""Trainings that take seconds: a tiny config on a few of the embedded pictures."""

import json
import pathlib
import shutil

from places import EMBEDDED

QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

TINY = {
    "model.num_decoder_layers": "1",
    "model.num_queries": "8",
    "data.image_size": "64",
    "data.train_sizes": "(64,)",
    "data.max_instances": "6",
    "data.num_workers": "1",
    "denoising.num_denoising": "6",
    "loss.num_points": "64",
    "optimizer.warmup_steps": "2",
    "train.batch_size": "2",
    "train.epochs": "2",
    "eval.every_epochs": "2",
    "checkpoint.every_steps": "100",
}


def write_subset(folder: pathlib.Path, count: int) -> pathlib.Path:
    """A data set whose training and validation images are the same few embedded ones."""
    whole = json.loads((EMBEDDED / "annotations/instance_train.json").read_text())
    images = whole["images"][:: len(whole["images"]) // count][:count]
    ids = {image["id"] for image in images}
    annotations = [a for a in whole["annotations"] if a["image_id"] in ids]
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    for image in images:
        shutil.copy(EMBEDDED / "images" / image["file_name"], folder / "images")
    for split in ("train", "val"):
        subset = {"images": images, "annotations": annotations, "categories": whole["categories"]}
        (folder / f"annotations/instance_{split}.json").write_text(json.dumps(subset))
    return folder
