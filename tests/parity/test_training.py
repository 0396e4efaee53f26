"""Real optimiser steps do what the official ones do: outputs, matches, losses, gradients, weights, moving averages.

Each case is trained once, by the step that training uses, with the reference's random draws. Its tolerances come from
the case's `_noise`: how far the official float32 run is from the official network in higher precision.
"""

import dataclasses
import functools
import math
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import synth
from jax import Array, lax
from reference import (
    NOISE_FACTOR,
    RELATIVE_FLOOR,
    REPORT,
    Case,
    find_cases,
    load_case,
    load_json,
    official_weights,
    stored_values,
)

from instseg_jax.config import load_config
from instseg_jax.models.denoising import count_slots, noise_targets
from instseg_jax.models.mask_rtdetr import build_model
from instseg_jax.models.sampling import sample_map
from instseg_jax.training.criterion import PointDraws, build_loss_settings, sum_terms
from instseg_jax.training.mask_planes import pack_masks
from instseg_jax.training.matching import match
from instseg_jax.training.optimizer import build_optimizer, build_schedule, ema_decay
from instseg_jax.training.state import initial_state
from instseg_jax.training.step import train_step
from instseg_jax.types import Batch, Targets
from instseg_jax.weights.names import flax_to_official, official_to_flax

TRAIN_CASES = find_cases("*/train_*.json")
NOISE_CASE = "s/train_128_const.json"  # whose noise counts for a case that states none
IMAGE_SEED, FIRST_SEED = 77, 1000
MIN_SLOTS = 4
NUM_CLASSES = 80
QUICKLY = {"xla_llvm_disable_expensive_passes": True}  # a few steps are not worth minutes of compiling
OFFICIAL = {"class": "class", "box_l1": "bbox", "box_giou": "giou", "mask_bce": "mask", "mask_dice": "dice"}
OUTPUT_NAMES = {"class_logits": "logits", "boxes": "boxes", "mask_queries": "masks"}
SAMPLE_LIMIT = 0.3  # relative; sixteen values of a tensor, of which the case states no noise
SAME_BOX = 1e-3  # normalised; boxes of one query differ less between two float32 runs
OUTPUT_LIMIT = 5e-4  # relative 2-norm; of these the case states no noise either
RATE_ROUNDING = 2e-11  # float32 near the full learning rate of 1e-4
parametrized = pytest.mark.parametrize("name", TRAIN_CASES)


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
    images = synth.synth_image(IMAGE_SEED, size, size, len(counts)).transpose(0, 2, 3, 1)
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
    schedule = build_schedule(config.optimizer, total_steps=527_688)
    optimizer, multipliers = build_optimizer(config.optimizer, variables["params"], schedule)
    return types.SimpleNamespace(
        case=case,
        history=case.info["history"],
        noise=case.info.get("_noise") or load_json(NOISE_CASE)["_noise"],
        config=config,
        batch=load_batch(case),
        variables=variables,
        model=build_model(config.model, NUM_CLASSES),
        schedule=schedule,
        optimizer=optax.chain(remember_gradients(), optimizer),
        multipliers=multipliers,
        settings=build_loss_settings(config.loss),
    )


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
    rng = np.random.Generator(np.random.PCG64(FIRST_SEED + step))
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
        points["matcher"],
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
    terms: list[dict[str, float]]
    gradients: dict[str, np.ndarray]
    grad_norm: float
    learning_rates: list[float]
    weights: dict[int, dict[str, np.ndarray]]  # after step k, counted from 1
    averages: dict[int, dict[str, np.ndarray]]


@functools.cache
def train(name: str) -> Run:
    setup = prepare(name)
    batch, targets, config = setup.batch, setup.batch.targets, setup.config
    seen = []

    def step(state, noise, points):
        denoising = noise_targets(
            targets, **noise, **config.denoising, num_classes=NUM_CLASSES, num_queries=setup.model.num_queries
        )

        def draw(outputs) -> PointDraws:
            outputs = lax.stop_gradient(outputs)
            num_slots = count_slots(targets.valid)
            planes = pack_masks(jnp.asarray(targets.masks), num_slots)
            arguments = (outputs.matching, outputs.mask_features, jax.tree.map(jnp.asarray, targets), planes, num_slots)
            query_index = match(*arguments, points["matcher"], setup.settings.match_weights)
            jax.debug.callback(lambda *x: seen.append(jax.tree.map(np.asarray, x)), outputs, query_index)
            return arrange_points(setup, points, outputs, query_index)

        return train_step(
            state,
            batch,
            denoising,
            draw,
            model=setup.model,
            optimizer=setup.optimizer,
            schedule=setup.schedule,
            multipliers=setup.multipliers,
            settings=setup.settings,
            decay=config.optimizer.ema_decay,
            ramp_steps=config.optimizer.ema_ramp_steps,
            mesh=None,
        )

    run = Run(None, None, [], {}, 0.0, [], {}, {})
    state = initial_state(setup.variables, setup.optimizer)
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(step).lower(state, *draw_step(setup, 0)).compile(QUICKLY)
        for i in range(len(setup.history)):
            state, metrics = compiled(state, *draw_step(setup, i))
            metrics = jax.tree.map(np.asarray, metrics)
            jax.effects_barrier()
            assert not metrics["skipped"]
            sums = sum_terms({key: value for key, value in metrics.items() if key.startswith("loss/")})
            run.terms.append({key: float(value) for key, value in sums.items()} | {"total": float(metrics["loss"])})
            run.learning_rates.append(float(metrics["learning_rate"]))
            if i == 0:
                run.outputs, run.query_index = seen[0]
                run.grad_norm = float(metrics["grad_norm"])
                gradients = jax.tree.map(np.asarray, state.opt_state[0])
                run.gradients = flax_to_official({"params": gradients, "batch_stats": {}})
            if any(key.startswith(f"P{i + 1}@") for key in setup.case.tensors):
                values = {"params": state.params, "batch_stats": state.batch_stats}
                run.weights[i + 1], run.averages[i + 1] = map(flax_to_official, (values, state.ema_variables))
            seen.clear()
    return run


def test_there_is_a_case():
    assert TRAIN_CASES or "INSTSEG_PARITY" in os.environ


def relative_noise(name: str) -> list[dict[str, float]]:
    """For each step the worst relative noise of a loss term, "terms", and that of the total, "total".

    Errors of the terms may cancel by luck, so that of the total counts as at least the root of their squares.
    """
    info = noise_info(name)
    steps = []
    for noise, values in zip(info["_noise"]["history"], info["history"], strict=True):
        terms = [key for key in noise if key != "loss" and values[key]]
        total = max(noise["loss"], float(np.linalg.norm([noise[key] for key in terms])))
        steps.append({"terms": max(noise[key] / abs(values[key]) for key in terms), "total": total / values["loss"]})
    return steps


def tolerance(noise: list[dict[str, float]], step: int) -> dict[str, float]:
    """Allowed relative errors in a step, counted from 0."""
    return {key: max(NOISE_FACTOR * x, RELATIVE_FLOOR) for key, x in noise[min(step, len(noise) - 1)].items()}


def noise_info(name: str) -> dict:
    info = prepare(name).case.info
    return info if "_noise" in info else load_json(NOISE_CASE)


def query_order(name: str) -> np.ndarray:
    """[B, Q] our query for each of the reference's: the same one, or one that changed places with it."""
    mine = train(name).outputs.matching.boxes[0]
    theirs = prepare(name).case.tensors.get("enc_boxes_full", mine)
    distance = np.abs(theirs[:, :, None] - mine[:, None]).max(axis=-1)
    same = np.diagonal(distance, axis1=1, axis2=2) < SAME_BOX
    order = np.where(same, np.arange(theirs.shape[1]), distance.argmin(axis=-1))
    assert all(len(set(row)) == len(row) for row in order)
    return order


@parametrized
def test_first_outputs(name):
    setup, run, order = prepare(name), train(name), query_order(name)
    outputs, used = run.outputs, used_slots(setup)
    mine = {}
    for kind in ("class_logits", "boxes", "mask_queries"):
        matching = np.take_along_axis(getattr(outputs.matching, kind), order[None, ..., None], axis=2)
        denoising = getattr(outputs.denoising, kind)[:, :, :used]
        rows = {"enc": matching[0], "init": np.concatenate([denoising[0], matching[1]], axis=1)}
        rows["dec"] = np.concatenate([denoising[1:], matching[2:]], axis=2)
        for stage, value in rows.items():
            if kind == "mask_queries":
                value = np.einsum("...bqp,bhwp->...bqhw", value, outputs.mask_features)
            mine[f"{stage}_{OUTPUT_NAMES[kind]}"] = value
    mine["mask_feat"] = np.moveaxis(outputs.mask_features, -1, 1)
    mine |= {f"neck{i}": np.moveaxis(np.asarray(x), -1, 1) for i, x in enumerate(neck_maps(setup))}
    mine |= {f"{stage}_boxes_full": mine[f"{stage}_boxes"] for stage in ("enc", "init")}
    errors = {}
    for stage, value in mine.items():
        pair = stored_values(setup.case.tensors, stage, value)
        if pair is not None:
            errors[stage] = np.linalg.norm(pair[1] - pair[0]) / np.linalg.norm(pair[0])
    worst = max(errors, key=errors.get)
    REPORT.append((name, "training outputs, worst stage", f"{errors[worst]:.1e} relative ({worst})"))
    assert errors and errors[worst] <= OUTPUT_LIMIT, errors


def used_slots(setup: types.SimpleNamespace) -> int:
    most = int(setup.batch.targets.valid.sum(axis=1).max())
    return most * max(1, setup.config.denoising.num_denoising // most)


def neck_maps(setup: types.SimpleNamespace) -> list[Array]:
    def run(variables, images):
        _, state = setup.model.apply(variables, images, train=True, mutable=["batch_stats", "intermediates"])
        return state["intermediates"]["maps"][0]

    with jax.default_matmul_precision("highest"):
        return jax.jit(run)(setup.variables, setup.batch.images)


@parametrized
def test_matches_are_identical(name):
    """Call 0 of the reference matches the last layer, the next ones the sets in our order."""
    setup, run, order = prepare(name), train(name), query_order(name)
    sets = len(run.query_index)
    compared = 0
    for call, one_set in enumerate((sets - 1, *range(sets - 1))):
        for b, n in enumerate(object_counts(setup.case)):
            if n == 0 or f"match{call}_img{b}" not in setup.case.tensors:
                continue
            queries, objects = setup.case.tensors[f"match{call}_img{b}"]
            expected = np.full(n, -1)
            expected[objects] = order[b][queries]
            np.testing.assert_array_equal(run.query_index[one_set, b, :n], expected, err_msg=f"call {call}, image {b}")
            compared += n
    swapped = int((order != np.arange(order.shape[1])).sum())
    REPORT.append((name, "matches, first step", f"{compared} identical; {swapped} queries in another place"))
    assert compared


@parametrized
def test_loss_terms(name):
    setup, run, noise = prepare(name), train(name), relative_noise(name)
    ratios, totals = [], []
    for i, (mine, theirs) in enumerate(zip(run.terms, setup.history, strict=True)):
        limit = tolerance(noise, i)
        for term, official in OFFICIAL.items():
            for suffix in ("", "_aux", "_dn", "_aux_dn"):
                value = theirs[f"loss_{official}{suffix}"]
                error = abs(mine[term + suffix] - value) / abs(value)
                ratios.append((error / limit["terms"], f"step {i + 1}, {term}{suffix}"))
        error = abs(mine["total"] - theirs["loss"]) / theirs["loss"]
        totals.append((error / limit["total"], f"step {i + 1}"))
    for what, found in (("loss terms", ratios), ("total loss", totals)):
        ratio, where = max(found)
        REPORT.append((name, f"{what}, {len(run.terms)} steps", f"{ratio:.2f} of the tolerance ({where})"))
    assert len(ratios) == 20 * len(setup.history)
    assert max(ratios)[0] <= 1, max(ratios)
    assert max(totals)[0] <= 1, max(totals)


@parametrized
def test_gradients(name):
    setup, run = prepare(name), train(name)
    expected, total = setup.case.info["grad_norms"], setup.case.info["grad_global_norm"]
    noise = noise_info(name)["_noise"]
    limit, median_limit = (NOISE_FACTOR * noise[f"grad_norms_{kind}_relative"] for kind in ("worst", "median"))
    # Biases before a batch norm have no gradient; what is computed for them is rounding, here and there.
    rounding = np.finfo(np.float32).eps * total
    norms = {key: np.linalg.norm(gradient.astype(np.float64)) for key, gradient in run.gradients.items()}
    assert {key for key, norm in norms.items() if norm > 0} <= set(expected)
    errors = {key: abs(norms[key] - norm) / max(norm, rounding / limit) for key, norm in expected.items()}
    samples = {}
    for key, norm in expected.items():
        if f"G@{key}" in setup.case.tensors:
            theirs, mine = setup.case.tensors[f"G@{key}"], run.gradients[key].reshape(-1)
            mine = mine[synth.subsample_indices(f"G@{key}", mine.size, len(theirs))]
            samples[key] = np.linalg.norm(mine - theirs) / max(np.linalg.norm(theirs), rounding / SAMPLE_LIMIT)
    worst, median = max(errors, key=errors.get), float(np.median(list(errors.values())))
    worst_sample, median_sample = max(samples, key=samples.get), float(np.median(list(samples.values())))
    total_error = abs(run.grad_norm - total) / total
    REPORT.append((name, "gradient norms, worst tensor", f"{errors[worst] / limit:.2f} of the tolerance ({worst})"))
    REPORT.append((name, "gradient norms, median", f"{median / median_limit:.2f} of the tolerance"))
    REPORT.append((name, "global gradient norm", f"{total_error / limit:.2f} of the tolerance"))
    figures = f"{median_sample:.1e} and {samples[worst_sample]:.1e} relative ({worst_sample})"
    REPORT.append((name, "gradient samples, median and worst", figures))
    assert errors[worst] <= limit, worst
    assert median <= median_limit
    assert total_error <= limit
    assert samples[worst_sample] <= SAMPLE_LIMIT, samples


@parametrized
def test_weights_statistics_and_moving_averages(name):
    """Weights in units of the learning rate: Adam turns noise in small gradients into steps of that size."""
    setup, run, relative = prepare(name), train(name), relative_noise(name)
    noise = noise_info(name)["_noise"]["parameters_in_lr"]
    assert run.weights
    for k in run.weights:
        stated = min(noise, key=lambda n: (int(n) < k, abs(int(n) - k)))
        limits = NOISE_FACTOR * np.array(noise[stated])  # of the maximum, the 99 % quantile and the median
        statistics_limit = tolerance(relative, k - 1)["total"]
        rate = np.mean([row["lr"] for row in setup.history[:k]])
        for letter, what, state in (("P", "weights", run.weights[k]), ("E", "moving averages", run.averages[k])):
            errors, statistics = [], []
            for key, expected in setup.case.tensors.items():
                if not key.startswith(f"{letter}{k}@"):
                    continue
                tensor = key.partition("@")[2]
                mine = state[tensor].reshape(-1)
                mine = mine[synth.subsample_indices(f"P@{tensor}", mine.size, len(expected))]
                difference = np.abs(mine.astype(np.float64) - expected)
                if tensor.endswith(("_mean", "_variance")):
                    statistics.append(difference.max() / np.abs(expected).max())
                else:
                    rounding = 2 * k * np.spacing(np.abs(expected))
                    errors.append(np.maximum(difference - rounding, 0) / rate)
            errors = np.concatenate(errors)
            figures = np.array([errors.max(), np.quantile(errors, 0.99), np.median(errors)])
            text = f"{(figures / limits).max():.2f} of the tolerance (99 % within {figures[1]:.2g} learning rates)"
            REPORT.append((name, f"{what}, step {k}", text))
            assert (figures <= limits).all(), figures
            ratio = max(statistics) / statistics_limit
            REPORT.append((name, f"batch statistics, {what}, step {k}", f"{ratio:.2f} of the tolerance"))
            assert ratio <= 1


@parametrized
def test_learning_rates_and_decay_of_the_averages(name):
    setup, run = prepare(name), train(name)
    info, optimizer = setup.case.info, setup.config.optimizer
    np.testing.assert_allclose(run.learning_rates, [row["lr"] for row in setup.history], rtol=1e-6, atol=RATE_ROUNDING)
    for step, rate in listed_rates(info.get("lr_schedule", setup.case.tensors.get("lr_schedule", []))):
        np.testing.assert_allclose(setup.schedule(step), rate, rtol=1e-6, atol=RATE_ROUNDING)
    for key, value in info.items():
        if key.startswith("ema_decay_step"):
            count = int(key.removeprefix("ema_decay_step")) - 1
            decay = ema_decay(count, decay=optimizer.ema_decay, ramp_steps=optimizer.ema_ramp_steps)
            np.testing.assert_allclose(decay, value, rtol=1e-6)


def listed_rates(schedule) -> list[tuple[int, float]]:
    """(step, rate) of a table {step: rate}, of a list of rates, or of a list of such pairs."""
    if isinstance(schedule, dict):
        return [(int(step), float(rate)) for step, rate in schedule.items()]
    return [(int(row[0]), float(row[1])) if np.ndim(row) else (i, float(row)) for i, row in enumerate(schedule)]
