"""The verb `benchmark`: how long the parts of a config take on this machine.

Each part is warmed up, then timed several times; medians count. Process CPU time is steadier than wall time on
a machine that does other things too.
"""

import copy
import itertools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from instseg_jax.data import loader
from instseg_jax.data.source import build_dataset
from instseg_jax.devices import check_batch_size, make_mesh, put_micro_batches, put_replicated, select_devices
from instseg_jax.memory import peak_memory_mb
from instseg_jax.models.denoising import make_denoising_queries
from instseg_jax.models.mask_rtdetr import build_model, count_parameters, count_queries, initial_variables
from instseg_jax.training.criterion import (
    build_loss_settings,
    compute_losses,
    compute_match_costs,
    draw_match_points,
    draw_points,
)
from instseg_jax.training.matching import assign
from instseg_jax.training.optimizer import build_optimizer, build_schedule
from instseg_jax.training.state import initial_state
from instseg_jax.training.step import build_train_step
from instseg_jax.types import Batch


def run_benchmark(config: ConfigDict, *, repeats: int) -> dict:
    """Time loading, the training step and its parts; print a table and return its numbers.

    All images get the size of evaluation. Times in seconds, memory in MB. Raises what reading the data raises.
    """
    config = copy.deepcopy(config)
    with config.unlocked():
        config.data.train_sizes = (config.data.image_size,)
    mesh = make_mesh(select_devices(config.device))
    check_batch_size(config.train.batch_size, mesh, "train.batch_size", config.train.micro_batches)
    dataset = build_dataset(config.data, "train")
    train_loader = loader.build_train_loader(config, dataset)
    model = build_model(config.model, len(dataset.categories))
    variables = initial_variables(model, seed=config.seed, channels=config.data.channels)
    batches = train_loader.batches()
    first = next(batches)

    parts = {"load a batch": _time_loading(batches, repeats, config.train.batch_size)}
    batches.close()
    schedule = build_schedule(config.optimizer, config.train.epochs * train_loader.num_batches, config.train.batch_size)
    optimizer, multipliers = build_optimizer(config.optimizer, variables["params"], schedule)
    holder = [put_replicated(initial_state(variables, optimizer), mesh)]
    step = build_train_step(config, model, optimizer, schedule, multipliers, mesh)
    micro_batches = put_micro_batches(first, mesh, config.train.micro_batches)

    def one_step() -> object:
        holder[0], metrics = step(holder[0], micro_batches)
        return holder[0], metrics

    parts["training step"] = _time_calls(one_step, repeats, config.train.batch_size)
    highest_mb = peak_memory_mb()  # before the parts are held in memory a second time
    parts |= _time_criterion(config, model, variables, micro_batches[0], mesh, repeats)
    table = {
        "model": config.model.name,
        "parameters": count_parameters(variables["params"]),
        "image_size": config.data.image_size,
        "batch_size": config.train.batch_size,
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in mesh.devices.flat],
        "peak_memory_mb": highest_mb,
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


def _time_calls(call: Callable[[], object], repeats: int, images: int) -> dict:
    """First call, which compiles (or finds the program in WORKDIR/compiled), and the median of later ones."""
    started = time.perf_counter()
    jax.block_until_ready(call())
    first_s = time.perf_counter() - started
    jax.block_until_ready(call())
    wall, cpu = _time(call, repeats)
    return {"first_s": first_s, "wall_s": wall, "cpu_s": cpu, "images_per_s": images / wall}


def _time_criterion(config: ConfigDict, model, variables: dict, batch: Batch, mesh: Mesh, repeats: int) -> dict:
    """The parts of a step that are not the network: matching, and the losses with their gradient to its outputs.

    They are timed on random predictions of the real shapes; what they cost does not depend on the values.
    """
    settings = build_loss_settings(config.loss)
    num_queries = count_queries(model.num_queries, *batch.images.shape[1:3])
    noise = dict(config.denoising) | {"num_classes": model.num_classes, "num_queries": num_queries}
    key = jax.random.key(config.seed)
    denoising = jax.jit(lambda targets: make_denoising_queries(targets, rng=key, **noise))(batch.targets)
    shapes = jax.eval_shape(
        lambda v, images, dn: model.apply(v, images, train=True, denoising=dn, mutable=["batch_stats"])[0],
        variables,
        batch.images,
        denoising,
    )
    rng = np.random.default_rng(config.seed)
    outputs = jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape, np.float32), x.dtype), shapes)
    draws = jax.jit(lambda: (draw_match_points(key, settings, outputs), draw_points(key, settings, outputs)))()
    costs = jax.jit(lambda o, t, p: compute_match_costs(o, t, p, settings, mesh=mesh))
    losses = jax.jit(
        jax.value_and_grad(lambda o, t, dn, q, d: compute_losses(o, t, dn, q, d, settings, mesh=mesh), has_aux=True)
    )
    found = costs(outputs, batch.targets, draws[0])
    query_index = assign(found, batch.targets.valid)
    images, targets = batch.images.shape[0], batch.targets
    return {
        "- matching costs": _time_calls(lambda: costs(outputs, targets, draws[0]), repeats, images),
        "- assignment": _time_calls(lambda: assign(found, targets.valid), repeats, images),
        "- losses, gradient": _time_calls(
            lambda: losses(outputs, targets, denoising, query_index, draws[1]), repeats, images
        ),
    }


def _print(table: dict) -> None:
    title = "{model}, {image_size} px, batch {batch_size}".format(**table)
    shown = Table("part", "wall ms", "CPU ms", "images/s", "first call s", title=title)
    for name, part in table["parts"].items():
        first = f"{part['first_s']:.1f}" if "first_s" in part else ""
        times = (f"{1e3 * part[key]:.1f}" for key in ("wall_s", "cpu_s"))
        shown.add_row(name, *times, f"{part['images_per_s']:.1f}", first)
    Console().print(shown)
    print(f"peak memory of the process {table['peak_memory_mb']:.0f} MB")
