"""The verb `benchmark`: how long the parts of a config take on this machine.

Each part is warmed up, then timed several times; medians count. Process CPU time is steadier than wall time on
a machine that does other things too.
"""

import copy
import itertools
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from instseg_jax.data import loader
from instseg_jax.devices import select_devices
from instseg_jax.inference.predictor import make_predict
from instseg_jax.models.mask_rtdetr import build_model, count_parameters, initial_variables
from instseg_jax.training import loop, sharding
from instseg_jax.training.optimizer import build_optimizer, build_schedule
from instseg_jax.training.state import initial_state
from instseg_jax.training.step import build_train_step
from instseg_jax.weights.checkpoint import library_versions


def run_benchmark(config: ConfigDict, *, repeats: int) -> dict:
    """Time loading, forward pass (one image) and training step; print a table and return its numbers.

    Uses the config's data, or the embedded pictures when it names none. Times in seconds, memory in MB.

    Raises: ValueError when `repeats` is below one, and whatever reading the data raises.
    """
    if repeats < 1:
        raise ValueError(f"--repeats is {repeats}, it must be at least 1")
    config = copy.deepcopy(config)
    with config.unlocked():
        config.data.dir = config.data.dir or "embedded"
        config.data.train_sizes = (config.data.image_size,)
    mesh = sharding.make_mesh(select_devices(config.device))
    sharding.check_batch_size(config.train.batch_size, mesh, "train.batch_size")
    dataset = loop.read_split(config.data, "train")
    train_loader = loader.build_train_loader(config, dataset)
    model = build_model(config.model, len(dataset.categories))
    variables = initial_variables(model, seed=config.seed)
    batches = train_loader.batches()
    first = next(batches)

    parts = {"load a batch": _time_loading(batches, repeats, config.train.batch_size)}
    batches.close()
    predict = make_predict(model, num_detections=config.eval.num_detections)
    image = first.images[:1]
    on_device = jax.device_put(variables, mesh.devices.flat[0])
    parts["forward, 1 image"] = _time_compiled(
        predict, lambda run: run(on_device, image), (on_device, image), repeats, 1
    )

    schedule = build_schedule(config.optimizer, config.train.epochs * train_loader.num_batches)
    optimizer, multipliers = build_optimizer(config.optimizer, variables["params"], schedule)
    state = jax.device_put(initial_state(variables, optimizer), sharding.replicated(mesh))
    step = build_train_step(config, model, optimizer, schedule, multipliers, mesh)
    batch = sharding.put_batch(first, mesh)
    holder = [state]

    def one_step(run: Callable) -> object:
        holder[0], metrics = run(holder[0], batch)
        return metrics

    parts["training step"] = _time_compiled(step, one_step, (state, batch), repeats, config.train.batch_size)
    table = {
        "model": config.model.name,
        "parameters": count_parameters(variables["params"]),
        "image_size": config.data.image_size,
        "batch_size": config.train.batch_size,
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in mesh.devices.flat],
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "huge_pages": "hugetlb" in os.environ.get("GLIBC_TUNABLES", ""),
        "versions": library_versions(),
        "peak_memory_mb": _peak_memory_mb(),
        "parts": parts,
    }
    _print(table)
    return table


def _time(function: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median wall and process CPU seconds of a call whose result is waited for."""
    wall, cpu = [], []
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        jax.block_until_ready(function())
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    return statistics.median(wall), statistics.median(cpu)


def _time_loading(batches, repeats: int, batch_size: int) -> dict:
    """Throughput of the loader with its threads running ahead: the time of a run of batches, divided."""
    count = max(8, repeats)
    started, used = time.perf_counter(), time.process_time()
    for _ in itertools.islice(batches, count):
        pass
    wall, cpu = ((now - then) / count for now, then in ((time.perf_counter(), started), (time.process_time(), used)))
    return {"wall_s": wall, "cpu_s": cpu, "images_per_s": batch_size / wall}


def _time_compiled(function, call: Callable, arguments: tuple, repeats: int, images: int) -> dict:
    started = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    compile_s = time.perf_counter() - started
    for _ in range(2):
        jax.block_until_ready(call(compiled))
    wall, cpu = _time(lambda: call(compiled), repeats)
    memory = compiled.memory_analysis()
    temporary = None if memory is None else memory.temp_size_in_bytes / 1e6
    return {
        "compile_s": compile_s,
        "wall_s": wall,
        "cpu_s": cpu,
        "images_per_s": images / wall,
        "temporary_memory_mb": temporary,
    }


def _peak_memory_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def _print(table: dict) -> None:
    title = "{model}, {image_size} px, batch {batch_size}, {machine}".format(**table)
    shown = Table("part", "wall ms", "CPU ms", "images/s", "compile s", "temporary MB", title=title)
    for name, part in table["parts"].items():
        extra = [
            f"{part[key]:.0f}" if part.get(key) is not None else "" for key in ("compile_s", "temporary_memory_mb")
        ]
        shown.add_row(
            name, f"{1e3 * part['wall_s']:.1f}", f"{1e3 * part['cpu_s']:.1f}", f"{part['images_per_s']:.1f}", *extra
        )
    Console().print(shown)
    print(f"peak memory of the process {table['peak_memory_mb']:.0f} MB")
