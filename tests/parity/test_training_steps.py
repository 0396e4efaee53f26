"""Real optimiser steps do what the official ones do: outputs, matches, losses, gradients, weights, moving averages.

Each case is trained once. Its tolerances come from its `_noise`: how far the official float32 run is from the
official network in higher precision.
"""

import os
import types

import jax
import numpy as np
import pytest
import synth
from jax import Array
from reference import NOISE_FACTOR, RELATIVE_FLOOR, REPORT, find_cases, load_json, stored_values
from reference_steps import object_counts, prepare, train

from instseg_jax.training.optimizer import ema_decay

TRAIN_CASES = find_cases("*/train_*.json")
NOISE_CASE = "s/train_128_const.json"  # whose noise counts for a case that states none
OFFICIAL = {"class": "class", "box_l1": "bbox", "box_giou": "giou", "mask_bce": "mask", "mask_dice": "dice"}
OUTPUT_NAMES = {"class_logits": "logits", "boxes": "boxes", "mask_queries": "masks"}
SAMPLE_LIMIT = 0.3  # relative; sixteen values of a tensor, of which the case states no noise
SAME_BOX = 1e-3  # normalised; boxes of one query differ less between two float32 runs
OUTPUT_LIMIT = 5e-4  # relative 2-norm; of these the case states no noise either
RATE_ROUNDING = 2e-11  # float32 near the full learning rate of 1e-4
parametrized = pytest.mark.parametrize("name", TRAIN_CASES)


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
    for key in expected:
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
