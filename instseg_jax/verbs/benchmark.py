"""The verb `benchmark`: inference step by step, for sizes and batch sizes, and the training step."""

import argparse
import copy
import os
import platform
import tempfile
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from instseg_jax.benchmarks.inference import STEPS, measure_encoding, time_inference
from instseg_jax.commands import print_next
from instseg_jax.config import check_sizes, load_config
from instseg_jax.data import coco
from instseg_jax.data.source import build_dataset
from instseg_jax.devices import check_batch_size, make_mesh, put_batch, put_replicated, select_devices
from instseg_jax.files import write_json
from instseg_jax.images import preprocess, read_image
from instseg_jax.inference.optimize import optimize_for_inference
from instseg_jax.inference.predictor import load_model
from instseg_jax.messages import quote
from instseg_jax.models.mask_rtdetr import MaskRTDETR, build_model, count_parameters, initial_variables
from instseg_jax.models.variants import canonical_name
from instseg_jax.weights.checkpoint import library_versions

PARTS = ("inference", "training")


def benchmark(options: argparse.Namespace) -> int:
    """Time what was asked for; one table each, and one JSON file."""
    config = load_config(options.config, options.overrides)
    if options.repeats < 1:
        raise ValueError(f"--repeats is {options.repeats}, it must be at least 1")
    parts = options.parts.split(",")
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"--parts is {quote(options.parts)}; it may name {' and '.join(PARTS)}, separated by a comma")
    batch_sizes = _whole_numbers(options.batch_sizes)
    check_sizes(config.data, ["image_size"])
    config = copy.deepcopy(config)
    with config.unlocked():
        config.data.dir = config.data.dir or coco.EMBEDDED
    configs = [config]
    if options.models:
        names = [canonical_name(f"mask_rtdetr_{size}") for size in options.models.split(",")]
        configs = [_with_name(config, name) for name in names]
    table: dict = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "usable_cores": _usable_cores(),
        "huge_pages": "hugetlb" in os.environ.get("GLIBC_TUNABLES", ""),
        "versions": library_versions(),
    }
    if options.runtimes:
        table["runtimes"] = [_compare_runtimes(each, options) for each in configs]
        path = write_json(Path(options.workdir) / "runtimes.json", table, indent=2)
        print(f"all numbers: {path}")
        _print_next(options)
        return 0
    if "training" in parts:
        from instseg_jax.benchmarks.training import run_benchmark

        table["training"] = [run_benchmark(each, repeats=options.repeats) for each in configs]
    if "inference" in parts:
        table["inference"] = [_time_model(each, options, batch_sizes) for each in configs]
        table["encoding"] = measure_encoding(repeats=options.repeats)
        _print(table)
    path = write_json(Path(options.workdir) / "benchmark.json", table, indent=2)
    print(f"all numbers: {path}")
    _print_next(options)
    return 0


def _print_next(options: argparse.Namespace) -> None:
    print_next("export", f"--weights={options.weights or 'RUN'}", comment="for a quicker runtime")


def _load(config: ConfigDict, options: argparse.Namespace) -> tuple[ConfigDict, MaskRTDETR, dict, coco.CocoDataset]:
    """Config, network and variables (fresh ones without --weights), and the pictures."""
    dataset = build_dataset(config.data, "val")
    coco.check_images(dataset)
    if options.weights:
        loaded = load_model(options.weights, config)
        return loaded.config, loaded.network, loaded.variables, dataset
    model = build_model(config.model, len(dataset.categories))
    return config, model, initial_variables(model, seed=config.seed, channels=config.data.channels), dataset


def _time_model(config: ConfigDict, options: argparse.Namespace, batch_sizes: list[int]) -> dict:
    """One size of the model with all batch sizes, on all devices of the config."""
    config, model, variables, dataset = _load(config, options)
    mesh = make_mesh(select_devices(config.device))
    for batch_size in batch_sizes:
        check_batch_size(batch_size, mesh, "--batch_sizes")
    network, optimised = optimize_for_inference(model, variables)
    on_devices = put_replicated(optimised, mesh)
    return {
        "model": config.model.name,
        "parameters": count_parameters(variables["params"]),
        "weights": options.weights or "fresh",
        "image_size": config.data.image_size,
        "pictures": f"{len(dataset)} of {dataset.name}",
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in mesh.devices.flat],
        "batches": [
            time_inference(
                network,
                on_devices,
                [dataset.image_path(i) for i in range(len(dataset))],
                put_images=lambda images: put_batch(images, mesh),
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


def _compare_runtimes(config: ConfigDict, options: argparse.Namespace) -> dict:
    """The network of one size in each runtime, batch 1, on the first validation picture; prints its table."""
    from instseg_jax.benchmarks.runtimes import RUNTIMES, compare_runtimes

    runtimes = options.runtimes.split(",")
    if not set(runtimes) <= set(RUNTIMES):
        raise ValueError(f"--runtimes is {quote(options.runtimes)}; it may name {', '.join(RUNTIMES)}")
    if "openvino" in runtimes and "openvino_bf16" not in runtimes:
        runtimes.append("openvino_bf16")
    peers = _peers(options.peer)
    config, model, variables, dataset = _load(config, options)
    size = config.data.image_size
    picture = read_image(dataset.image_path(0))
    pixels, _ = preprocess(
        picture, (size, size), resize=config.data.resize, interpolation=config.data.eval_interpolation
    )
    name, threads = config.model.name, _usable_cores() or os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        found = compare_runtimes(
            model,
            variables,
            pixels[None],
            runtimes=runtimes,
            num_detections=config.eval.num_detections,
            num_threads=threads,
            repeats=options.repeats,
            folder=Path(folder),
            peer=peers.get(name),
        )
    found = {"model": name, "weights": options.weights or "fresh", "image_size": size, "threads": threads} | found
    _print_runtimes(found | {"queries": model.num_queries})
    return found


def _peers(text: str | None) -> dict[str, Path]:
    """The ONNX file beside each size, from "s=FILE,l=FILE"."""
    peers = {}
    for part in text.split(",") if text else []:
        size, mark, file = part.partition("=")
        if not mark or not Path(file).is_file():
            raise ValueError(f"--peer holds {quote(part)}, it must be SIZE=FILE with an ONNX file that is there")
        peers[canonical_name(f"mask_rtdetr_{size}")] = Path(file)
    return peers


def _print_runtimes(found: dict) -> None:
    """A row a runtime; shares of the limit and of the peer in wall / CPU time, which also holds beside other work."""
    title = (
        f"{found['model']}, {found['image_size']} px, {found['queries']} queries, {found['threads']} threads; limit "
        f"{1e3 * found['limit_s']:.0f} ms ({1e3 * found['limit_cpu_s']:.0f} CPU): {found['gflop']:.0f} GFLOP at "
        f"{found['gflops']:.0f} GFLOP/s"
    )
    columns = (
        "runtime",
        "ms median / 95 %",
        "CPU ms",
        "x limit",
        "x peer",
        "first, s",
        "MB",
        "file, MB",
        "score off",
        "found",
    )
    shown = Table(*columns, title=title, title_justify="left")
    for row in found["rows"]:
        difference = row["difference"]
        shown.add_row(
            row["runtime"],
            f"{1e3 * row['median_s']:.0f} / {1e3 * row['p95_s']:.0f}",
            f"{1e3 * row['cpu_median_s']:.0f}",
            f"{row['times_limit']:.2f} / {row['cpu_times_limit']:.2f}",
            f"{row['times_peer']:.2f} / {row['cpu_times_peer']:.2f}" if "times_peer" in row else "",
            f"{row['first_s']:.1f}",
            "" if row["memory_mb"] is None else f"{row['memory_mb']:.0f}",
            f"{row['file_mb']:.0f}",
            "" if difference is None else f"{difference['score']:.0e}",
            "" if difference is None else f"{100 * difference['kept']:.0f} %",
        )
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(shown)


def _with_name(config: ConfigDict, name: str) -> ConfigDict:
    """The config for another size of the model."""
    config = copy.deepcopy(config)
    config.model.name = name
    return config


def _whole_numbers(text: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
        raise ValueError(f"--batch_sizes is {quote(text)}, it must be whole numbers from 1 on, separated by commas")
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
