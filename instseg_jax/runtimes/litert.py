"""The network as a file of LiteRT (TFLite), for phones: by JAX's jax2tf and TensorFlow's converter.

That is the way LiteRT documents for JAX. Two things of the network do not pass it and are replaced while it is traced:
JAX 0.10 writes top-k in a later StableHLO than TensorFlow 2.21 reads (1.15 against 1.13), and sorting, which could take
its place, is no operator of LiteRT; and LiteRT's operators take fewer axes than the sampling of attention has.
"""

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instseg_jax.files import write_bytes
from instseg_jax.models import deformable_attention
from instseg_jax.runtimes.shape import INPUT, OUTPUTS, Shape, check_cpu, describe


def write_litert(
    path: Path, make_detect: Any, shape: Shape, precision: str, calibration: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Write LiteRT's format (TFLite); `precision` "half" stores float16."""
    detect = make_detect(None)
    sides = (shape.batch, *shape.images[1:])
    data = convert_to_litert(lambda x: dict(zip(OUTPUTS, detect(x), strict=True)), sides, half=precision == "half")
    write_bytes(path, data)
    found = jax.eval_shape(detect, jax.ShapeDtypeStruct(sides, jnp.float32))
    return {
        "inputs": [describe(INPUT, sides, jnp.float32)],
        "outputs": [describe(name, one.shape, one.dtype) for name, one in zip(OUTPUTS, found, strict=True)],
    }


def open_litert(path: Path, settings: Mapping[str, Any], device: str, num_threads: int | None) -> Any:
    """A function that runs the file on the CPU. Raises ValueError for another device."""
    check_cpu(device, "litert")
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(path), num_threads=num_threads).get_signature_runner()
    name = settings["inputs"][0]["name"]
    lock = threading.Lock()

    def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
        with lock:
            found = runner(**{name: np.ascontiguousarray(images)})
            return tuple(np.array(found[output]) for output in OUTPUTS)

    return run


def convert_to_litert(
    detect: Callable[[jax.Array], dict[str, jax.Array]], shape: tuple[int, int, int, int], *, half: bool
) -> bytes:
    """The bytes of a .tflite file of a function from images to named arrays; `half` stores weights as float16."""
    import tensorflow as tf
    from jax.experimental import jax2tf

    module = tf.Module()
    module.detect = tf.function(
        jax2tf.convert(detect, with_gradient=False),
        input_signature=[tf.TensorSpec(shape, tf.float32, INPUT)],
        autograph=False,
    )
    with tempfile.TemporaryDirectory() as folder, replaced_operations():
        tf.saved_model.save(module, folder, signatures=module.detect.get_concrete_function())
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        if half:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.target_spec.supported_types = [tf.float16]
        return converter.convert()


@contextlib.contextmanager
def replaced_operations() -> Iterator[None]:
    """What is traced meanwhile has top-k and sampling in operators that LiteRT has."""
    places = ((jax.lax, "top_k", top_k), (deformable_attention, "sample_levels", sample_levels))
    before = [getattr(module, name) for module, name, _ in places]
    try:
        for module, name, replacement in places:
            setattr(module, name, replacement)
        yield
    finally:
        for (module, name, _), original in zip(places, before, strict=True):
            setattr(module, name, original)


def top_k(x: jax.Array, k: int, **_: object) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` over the last axis, one maximum after another: of equal values the first comes first."""
    length = x.shape[-1]
    rows = x.reshape(-1, length)
    positions, places = jnp.arange(length, dtype=jnp.int32)[None], jnp.arange(k, dtype=jnp.int32)[None]

    def take(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        left, values, index = state
        best = jnp.argmax(left, axis=1).astype(jnp.int32)[:, None]
        value = jnp.max(left, axis=1, keepdims=True)
        is_place = places == i
        return (
            jnp.where(positions == best, -jnp.inf, left),
            jnp.where(is_place, value, values),
            jnp.where(is_place, best, index),
        )

    empty = jnp.zeros((len(rows), k), x.dtype), jnp.zeros((len(rows), k), jnp.int32)
    _, values, index = jax.lax.fori_loop(0, k, take, (rows, *empty))
    return values.reshape(*x.shape[:-1], k), index.reshape(*x.shape[:-1], k)


def sample_levels(
    value: jax.Array,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: jax.Array,
    weights: jax.Array,
    *,
    fused: bool = False,
) -> jax.Array:
    """`deformable_attention.sample_levels` with three axes at most: query and head in one, level and point in one.

    `fused` changes nothing here.
    """
    batch, tokens, heads, channels = value.shape
    queries, levels, points = sampling_locations.shape[1], sampling_locations.shape[3], sampling_locations.shape[4]
    sizes = [height * width for height, width in spatial_shapes]
    heights, widths, starts = (
        np.repeat(np.array(numbers), points)[None]  # [1, levels * points]
        for numbers in (*zip(*spatial_shapes, strict=True), np.cumsum([0, *sizes[:-1]]))
    )
    rows = batch * queries * heads
    locations = sampling_locations.reshape(rows, levels * points, 2)
    x = locations[..., 0] * widths.astype(np.float32) - 0.5
    y = locations[..., 1] * heights.astype(np.float32) - 0.5
    image, head = np.divmod(np.arange(rows), queries * heads)[0], np.arange(rows) % heads
    own = (image * tokens * heads + head)[:, None]  # where the row's image and head begin in the table of values
    index, shares = [], []
    for down in (0, 1):
        for across in (0, 1):
            column, row = jnp.floor(x) + across, jnp.floor(y) + down
            share = (1 - jnp.abs(x - column)) * (1 - jnp.abs(y - row)) * weights.reshape(rows, levels * points)
            is_inside = (column >= 0) & (column < widths) & (row >= 0) & (row < heights)
            shares.append(jnp.where(is_inside, share, 0))
            column = jnp.clip(column, 0, (widths - 1).astype(np.float32)).astype(jnp.int32)
            row = jnp.clip(row, 0, (heights - 1).astype(np.float32)).astype(jnp.int32)
            index.append((starts + row * widths + column) * heads + own)
    samples = jnp.take(value.reshape(-1, channels), jnp.concatenate(index, axis=1), axis=0, mode="clip")
    summed = jnp.einsum("np,npc->nc", jnp.concatenate(shares, axis=1).astype(value.dtype), samples)
    return summed.reshape(batch, queries, heads, channels)
