"""Trains on a case of the reference by the step that training uses, with the random numbers of the case.

A case is trained in float32 and in float64, with our selection of queries and start boxes or with those that the
reference recorded (`reference_starts.py`). What comes out is compared in `test_training_steps.py`.
"""

import dataclasses
import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import synth
from jax import Array, lax
from reference import Case, load_case, official_weights
from sums import sum_terms

from instseg_jax.config import load_config
from instseg_jax.models.denoising import noise_targets
from instseg_jax.models.mask_rtdetr import build_model
from instseg_jax.models.sampling import sample_map
from instseg_jax.training.criterion import PointDraws, build_loss_settings
from instseg_jax.training.matching import assign
from instseg_jax.training.optimizer import build_optimizer, build_schedule
from instseg_jax.training.state import initial_state
from instseg_jax.training.step import Forward, run_backward, run_forward, update_state
from instseg_jax.types import Batch, Targets
from instseg_jax.weights.names import flax_to_official, official_to_flax

IMAGE_SEED, FIRST_SEED = 77, 1000
MIN_SLOTS = 4
NUM_CLASSES = 80
QUICK_COMPILE = {"xla_backend_optimization_level": 0}  # of a program of four hundred tensors that runs a few times
STEPS_IN_FLOAT64 = 2  # from the third on, two runs in float64 part as well


def image_seed(case: Case) -> int:
    """Seed of the case's pictures, from `_case` or from the call that its recipe writes down."""
    written = re.search(r"synth_image\((\d+)", str(case.info.get("recipe", {}).get("image", "")))
    return case.info.get("_case", {}).get("image_seed", int(written[1]) if written else IMAGE_SEED)


def first_seed(case: Case) -> int:
    """Seed of the first step's random numbers; that of step i is i higher."""
    written = re.search(r"PCG64\((\d+) *\+ *step", str(case.info.get("recipe", {}).get("rng", "")))
    return int(written[1]) if written else FIRST_SEED


def object_counts(case: Case) -> list[int]:
    return [len(case.tensors[f"gt_bbox{b}"]) for b in range(sum(key.startswith("gt_bbox") for key in case.tensors))]


def load_batch(case: Case) -> Batch:
    z, counts = case.tensors, object_counts(case)
    most = int(np.argmax(counts))
    size = math.isqrt(8 * len(z[f"gt_mask{most}_packbits"]) // counts[most])
    shape = (len(counts), max(MIN_SLOTS, *counts))
    labels, boxes = np.zeros(shape, np.int32), np.zeros((*shape, 4), np.float32)
    masks, valid = np.zeros((*shape, size, size), np.uint8), np.zeros(shape, bool)
    for b, n in enumerate(counts):
        labels[b, :n], boxes[b, :n], valid[b, :n] = z[f"gt_class{b}"][:, 0], z[f"gt_bbox{b}"], True
        bits = np.unpackbits(z[f"gt_mask{b}_packbits"], count=n * size * size)
        masks[b, :n] = bits.reshape(n, size, size)
    images = synth.synth_image(image_seed(case), size, size, len(counts)).transpose(0, 2, 3, 1)
    sizes = np.full((len(counts), 2), size, np.int32)
    index = np.arange(len(counts), dtype=np.int32)
    return Batch(images, Targets(labels, boxes, masks, valid), index >= 0, index, sizes, sizes)


@functools.cache
def prepare(name: str) -> types.SimpleNamespace:
    """A case with the model, optimizer and settings that the official recipe's config describes."""
    case = load_case(name)
    overrides = {"model.rectangular": "official"}
    if "lr_schedule" not in case.info and "lr_schedule" not in case.tensors:
        overrides["optimizer.warmup_steps"] = "0"
    config = load_config(f"configs/mask_rtdetr.py:{name.split('/')[0]}", overrides)
    variables = official_to_flax(official_weights(name.split("/")[0]))
    schedule = build_schedule(config.optimizer, total_steps=527_688, batch_size=16)
    optimizer, multipliers = build_optimizer(config.optimizer, variables["params"], schedule)
    return types.SimpleNamespace(
        case=case,
        history=case.info["history"],
        config=config,
        batch=load_batch(case),
        variables=variables,
        model=build_model(config.model, NUM_CLASSES),
        schedule=schedule,
        optimizer=optax.chain(remember_gradients(), optimizer),
        multipliers=multipliers,
        settings=build_loss_settings(config.loss),
    )


def used_slots(setup: types.SimpleNamespace) -> int:
    """Denoising slots that the reference has."""
    most = int(setup.batch.targets.valid.sum(axis=1).max())
    return most * max(1, setup.config.denoising.num_denoising // most)


def remember_gradients() -> optax.GradientTransformation:
    """Changes nothing and keeps the last gradients as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradients, state, params: (gradients, gradients)
    )


def draw_step(setup: types.SimpleNamespace, step: int) -> tuple[dict, dict]:
    """The reference's random numbers of one step, drawn in its order: those of the noise and those of the points.

    Rows of points are a mask each: `candidates` and `extra` [S, objects, ..] image by image by rising query, the
    denoising ones [S - 1, B, D, ..] by slot.
    """
    targets, s, info = setup.batch.targets, setup.settings, setup.case.info
    rng = np.random.Generator(np.random.PCG64(first_seed(setup.case) + step))
    drawn = []

    def rand(*shape: int) -> np.ndarray:
        drawn.append(["rand", list(shape)])
        return rng.random(shape, dtype=np.float32)

    counts = targets.valid.sum(axis=1)
    batch, most, objects = len(counts), int(counts.max()), int(counts.sum())
    num_denoising = setup.config.denoising.num_denoising
    used, slots = most * max(1, num_denoising // most), max(num_denoising, targets.valid.shape[1])
    real = np.tile(targets.valid[:, :most], used // most)
    sets = setup.model.variant.num_decoder_layers + 2
    num_extra = s.num_points - s.num_important

    noise = {
        "u_flip": np.zeros((batch, slots), np.float32),
        "random_labels": np.zeros((batch, slots), np.int32),
        "u_box": np.zeros((batch, slots, 4), np.float32),
    }
    noise["u_flip"][:, :used] = rand(batch * used).reshape(batch, used)
    flipped = (noise["u_flip"][:, :used] < setup.config.denoising.label_noise_ratio * 0.5) & real
    if flipped.any():
        drawn.append(["randint", [int(flipped.sum())]])
        noise["random_labels"][:, :used][flipped] = rng.integers(0, NUM_CLASSES, flipped.sum())
    noise["u_box"][:, :used] = rand(batch, used, 4)

    points = {
        "matcher": np.empty((sets, batch, s.num_points, 2), np.float32),
        "candidates": np.empty((sets, objects, s.num_candidates, 2), np.float32),
        "extra": np.empty((sets, objects, num_extra, 2), np.float32),
        "denoising_candidates": np.full((sets - 1, batch, slots, s.num_candidates, 2), 0.5, np.float32),
        "denoising_extra": np.full((sets - 1, batch, slots, num_extra, 2), 0.5, np.float32),
    }
    for i in (sets - 1, *range(sets - 1)):
        points["matcher"][i] = rand(batch, 1, s.num_points, 2)[:, 0]
        points["candidates"][i] = rand(objects, 1, s.num_candidates, 2)[:, 0]
        points["extra"][i] = rand(objects, num_extra, 2)
    for i in (sets - 2, *range(sets - 2)):
        points["denoising_candidates"][i, :, :used][real] = rand(int(real.sum()), 1, s.num_candidates, 2)[:, 0]
        points["denoising_extra"][i, :, :used][real] = rand(int(real.sum()), num_extra, 2)
    if step == 0 and "draws_step0" in info:
        assert drawn == info["draws_step0"]
    return noise, points


def arrange_points(setup: types.SimpleNamespace, points: dict, outputs, query_index: Array) -> PointDraws:
    """Hand each matched mask the points that the reference draws for it, in the order of query indices."""
    targets, count = setup.batch.targets, setup.settings.num_important * 17 // 16
    counts = targets.valid.sum(axis=1)
    first = (np.cumsum(counts) - counts)[:, None]
    is_before = targets.valid[:, None, :] & (query_index[..., None, :] < query_index[..., :, None])
    row = jnp.where(targets.valid, first + is_before.sum(axis=-1), 0)
    candidates, extra = (jax.vmap(lambda x, r: x[r])(points[key], row) for key in ("candidates", "extra"))
    mask_queries = jnp.take_along_axis(outputs.matching.mask_queries, jnp.maximum(query_index, 0)[..., None], axis=2)

    def prune(queries: Array, drawn: Array) -> Array:
        return lax.map(lambda one_set: keep_uncertain(*one_set, outputs.mask_features, count), (queries, drawn))

    def join(matched: Array, denoising: Array) -> Array:
        spare = [(0, 0), (0, 0), (0, denoising.shape[2] - matched.shape[2]), (0, 0), (0, 0)]
        return jnp.concatenate([jnp.pad(matched, spare, constant_values=0.5), denoising])

    return PointDraws(
        join(prune(mask_queries, candidates), prune(outputs.denoising.mask_queries, points["denoising_candidates"])),
        join(extra, points["denoising_extra"]),
    )


def keep_uncertain(mask_queries: Array, points: Array, mask_features: Array, count: int) -> Array:
    """Of the points [B, R, C, 2] of each mask the `count` with logits nearest to zero, more than the loss will keep.

    All forty thousand of two hundred masks would fill the memory.
    """
    masks = jnp.einsum("brp,bhwp->brhw", mask_queries, mask_features)
    rows = points.reshape(-1, *points.shape[2:])
    logits = sample_map(masks.reshape(-1, *masks.shape[2:], 1), rows)[..., 0]
    _, kept = lax.top_k(-jnp.abs(logits), count)
    return jnp.take_along_axis(rows, kept[..., None], axis=1).reshape(*points.shape[:2], count, 2)


@dataclasses.dataclass
class Run:
    """What our steps did; weights and gradients under official names and in official layout."""

    outputs: object  # of the first step
    query_index: np.ndarray  # [S, B, N] of the first step
    match_costs: np.ndarray  # [S, B, Q, N]
    terms: list[dict[str, float]]
    gradients: dict[str, np.ndarray]
    grad_norm: float
    learning_rates: list[float]
    weights: dict[int, dict[str, np.ndarray]]  # after step k, counted from 1
    averages: dict[int, dict[str, np.ndarray]]


@functools.cache
def train(name: str, dtype: str = "float32") -> Run:
    """Our steps from our own selection of queries and start boxes."""
    return run_steps(name, dtype, {})


def run_steps(name: str, dtype: str, start: dict[str, np.ndarray]) -> Run:
    """Our steps; `start` may give the first step's `selected_index`, `reference_boxes` and `query_index`.

    In float64 two steps are made and float32 inputs, weights and random numbers are taken as they are.
    """
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        return _run_steps(name, dtype, start)


def widen(tree, dtype: str):
    """Floating-point leaves in another type."""
    return jax.tree.map(lambda x: x.astype(dtype) if np.issubdtype(np.asarray(x).dtype, np.floating) else x, tree)


def _run_steps(name: str, dtype: str, start: dict[str, np.ndarray]) -> Run:
    setup = prepare(name)
    batch, config = widen(setup.batch, dtype), setup.config
    targets, start = batch.targets, widen(start, dtype)
    matches = start.pop("query_index", None)
    fixed = {"settings": setup.settings, "mesh": None}

    def forward(params, batch_stats, noise, points, start) -> Forward:
        denoising = noise_targets(
            targets, **noise, **config.denoising, num_classes=NUM_CLASSES, num_queries=setup.model.num_queries
        )
        model = types.SimpleNamespace(apply=functools.partial(setup.model.apply, **start))
        options = {"model": model, "multipliers": setup.multipliers, **fixed}
        return run_forward(params, batch_stats, batch, denoising, lambda _: points["matcher"], **options)

    def backward(ahead, query_index, points):
        draws = arrange_points(setup, points, ahead.outputs, query_index)
        return run_backward(ahead, targets, query_index, draws, jnp.sum(jnp.asarray(targets.valid)), **fixed)

    update = functools.partial(
        update_state,
        optimizer=setup.optimizer,
        schedule=setup.schedule,
        multipliers=setup.multipliers,
        decay=config.optimizer.ema_decay,
        ramp_steps=config.optimizer.ema_ramp_steps,
    )
    run = Run(None, None, None, [], {}, 0.0, [], {}, {})
    # On a device from the start, as all later states are: else the second step compiles everything again.
    state = jax.device_put(initial_state(widen(setup.variables, dtype), setup.optimizer), jax.devices()[0])
    forward, backward = map(jax.jit, (forward, backward))
    update = jax.jit(update, compiler_options=QUICK_COMPILE)
    for i in range(min(len(setup.history), STEPS_IN_FLOAT64 if dtype == "float64" else len(setup.history))):
        noise, points = widen(draw_step(setup, i), dtype)
        ahead = forward(state.params, state.batch_stats, noise, points, start if i == 0 else {})
        query_index = assign(ahead.match_costs, targets.valid)
        if i == 0:
            query_index = jnp.asarray(matches) if matches is not None else query_index
        gradients, loss, terms = backward(ahead, query_index, points)
        assert loss.dtype == dtype
        state, metrics = update(state, gradients, ahead.batch_stats, loss, terms)
        metrics = jax.tree.map(np.asarray, metrics)
        assert not metrics["skipped"]
        sums = sum_terms({key: value for key, value in metrics.items() if key.startswith("loss/")})
        run.terms.append({key: float(value) for key, value in sums.items()} | {"total": float(metrics["loss"])})
        run.learning_rates.append(float(metrics["learning_rate"]))
        if i == 0:
            run.outputs, run.query_index, run.match_costs = jax.tree.map(
                np.asarray, (ahead.outputs, query_index, ahead.match_costs)
            )
            run.grad_norm = float(metrics["grad_norm"])
            gradients = jax.tree.map(np.asarray, state.opt_state[0])
            run.gradients = flax_to_official({"params": gradients, "batch_stats": {}})
        if i == 0 or any(key.startswith(f"P{i + 1}@") for key in setup.case.tensors):
            values = {"params": state.params, "batch_stats": state.batch_stats}
            run.weights[i + 1], run.averages[i + 1] = map(flax_to_official, (values, state.ema_variables))
    return run
