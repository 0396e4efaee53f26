"""The verb `benchmark`: inference step by step, for sizes and batch sizes, and the training step."""

import argparse
import copy
import os
import platform
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from instseg_jax import sharding
from instseg_jax.data import coco
from instseg_jax.data.source import build_dataset
from instseg_jax.devices import select_devices
from instseg_jax.files import write_json
from instseg_jax.inference.benchmark import STEPS, measure_encoding, time_inference
from instseg_jax.inference.predictor import load_model
from instseg_jax.models.mask_rtdetr import build_model, count_parameters, initial_variables
from instseg_jax.models.variants import canonical_name
from instseg_jax.weights.checkpoint import library_versions

PARTS = ("inference", "training")


def benchmark(config: ConfigDict, options: argparse.Namespace) -> int:
    """Time what was asked for; one table each, and one JSON file."""
    if options.repeats < 1:
        raise ValueError(f"--repeats is {options.repeats}, it must be at least 1")
    parts = options.parts.split(",")
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"--parts is {options.parts!r}; it may name {' and '.join(PARTS)}, separated by a comma")
    batch_sizes = _whole_numbers(options.batch_sizes)
    config = copy.deepcopy(config)
    with config.unlocked():
        config.data.dir = config.data.dir or coco.EMBEDDED
    configs = [config]
    if options.sizes:
        names = [canonical_name(f"mask_rtdetr_{size}") for size in options.sizes.split(",")]
        configs = [_with_name(config, name) for name in names]
    table: dict = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "usable_cores": _usable_cores(),
        "huge_pages": "hugetlb" in os.environ.get("GLIBC_TUNABLES", ""),
        "versions": library_versions(),
    }
    if "training" in parts:
        from instseg_jax.training.benchmark import run_benchmark

        table["training"] = [run_benchmark(each, repeats=options.repeats) for each in configs]
    if "inference" in parts:
        table["inference"] = [_time_model(each, options, batch_sizes) for each in configs]
        table["encoding"] = measure_encoding(repeats=options.repeats)
        _print(table)
    path = write_json(Path(options.workdir) / "benchmark.json", table, indent=2)
    print(f"all numbers: {path}")
    return 0


def _time_model(config: ConfigDict, options: argparse.Namespace, batch_sizes: list[int]) -> dict:
    """One size of the model with all batch sizes, on all devices of the config."""
    dataset = build_dataset(config.data, "val")
    coco.check_images(dataset)
    if options.weights:
        loaded = load_model(options.weights, config)
        model, variables, config = loaded.network, loaded.variables, loaded.config
    else:
        model = build_model(config.model, len(dataset.categories))
        variables = initial_variables(model, seed=config.seed, channels=config.data.channels)
    mesh = sharding.make_mesh(select_devices(config.device))
    for batch_size in batch_sizes:
        sharding.check_batch_size(batch_size, mesh, "--batch_sizes")
    on_devices = sharding.put_replicated(variables, mesh)
    return {
        "model": config.model.name,
        "parameters": count_parameters(variables["params"]),
        "weights": options.weights or "fresh",
        "image_size": config.data.image_size,
        "pictures": f"{len(dataset)} of {dataset.name}",
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in mesh.devices.flat],
        "batches": [
            time_inference(
                model,
                on_devices,
                [dataset.image_path(i) for i in range(len(dataset))],
                put_images=lambda images: sharding.put_batch(images, mesh),
                batch_size=batch_size,
                image_size=config.data.image_size,
                resize=config.data.resize,
                interpolation=config.data.eval_interpolation,
                num_detections=config.eval.num_detections,
                repeats=options.repeats,
            )
            for batch_size in batch_sizes
        ],
    }


def _with_name(config: ConfigDict, name: str) -> ConfigDict:
    """The config for another size of the model."""
    config = copy.deepcopy(config)
    config.model.name = name
    return config


def _whole_numbers(text: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
        raise ValueError(f"--batch_sizes is {text!r}, it must be whole numbers from 1 on, separated by commas")
    return [int(number) for number in numbers]


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _print(table: dict) -> None:
    """A table a model, a row a step: wall (median and 95 %) and CPU milliseconds of a batch."""
    console = Console()
    console.print(f"{table['machine']}, {table['usable_cores']} usable; wall ms median / 95 % (CPU ms) of a batch")
    for entry in table["inference"]:
        batches = [f"batch {batch['batch_size']}" for batch in entry["batches"]]
        title = f"{entry['model']}, {entry['image_size']} px, {', '.join(entry['devices'])}"
        shown = Table("step", *batches, title=title, title_justify="left")
        for step in (*STEPS, "total"):
            shown.add_row(step, *(_cell(batch["steps"][step]) for batch in entry["batches"]))
        shown.add_row("images/s", *(f"{batch['steps']['total']['images_per_s']:.1f}" for batch in entry["batches"]))
        shown.add_row("first forward, s", *(f"{batch['first_forward_s']:.1f}" for batch in entry["batches"]))
        shown.add_row("highest memory, MB", *(f"{batch['memory_mb']:.0f}" for batch in entry["batches"]))
        console.print(shown)
    made_up = Table("masks of made-up objects", "encode", "MB above the process")
    for name, entry in table["encoding"].items():
        memory = entry["memory_mb"]
        made_up.add_row(name, _cell(entry), "" if memory is None else f"{memory:.0f}")
    console.print(made_up)


def _cell(times: dict) -> str:
    return f"{1e3 * times['median_s']:.1f} / {1e3 * times['p95_s']:.1f} ({1e3 * times['cpu_s']:.1f})"
