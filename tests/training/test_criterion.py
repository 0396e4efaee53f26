"""The loss of a step as a whole: what it depends on, what it must not depend on, and its gradient."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from ml_collections import ConfigDict
from places import HELPERS, ROOT
from sums import sum_terms

from instseg_jax.devices import make_mesh, put_batch, split_over_batch
from instseg_jax.models.denoising import make_denoising_queries
from instseg_jax.training.criterion import (
    LossSettings,
    PointDraws,
    build_loss_settings,
    compute_losses,
    compute_match_costs,
    draw_match_points,
    draw_points,
    set_names,
)
from instseg_jax.training.matching import TermWeights, assign
from instseg_jax.types import Predictions, Targets, TrainingOutputs

WEIGHTS = TermWeights(class_=4.0, box_l1=5.0, box_giou=2.0, mask_bce=5.0, mask_dice=5.0)
SETTINGS = LossSettings(
    weights=WEIGHTS,
    match_weights=WEIGHTS,
    iou_target="mask",
    aux_iou_target="box",
    alpha=0.75,
    gamma=2.0,
    num_points=32,
    num_candidates=96,
    num_important=24,
)
QUERIES, CLASSES, SLOTS, CHANNELS, SIZE, NUM_DENOISING, LAYERS = 9, 3, 5, 4, 8, 12, 2


def boxes(rng, *shape) -> np.ndarray:
    return np.concatenate([rng.uniform(0.3, 0.7, (*shape, 2)), rng.uniform(0.1, 0.5, (*shape, 2))], -1).astype(
        np.float32
    )


def make_targets(counts, seed=0) -> Targets:
    rng, batch = np.random.default_rng(seed), len(counts)
    masks = rng.random((batch, SLOTS, SIZE // 2, SIZE // 2)) < 0.4
    return Targets(
        labels=rng.integers(0, CLASSES, (batch, SLOTS)).astype(np.int32),
        boxes=boxes(rng, batch, SLOTS),
        masks=np.kron(masks, np.ones((1, 1, 8, 8))).astype(np.uint8),
        valid=np.arange(SLOTS) < np.array(counts)[:, None],
    )


def make_outputs(batch, seed=1, use_denoising=True) -> TrainingOutputs:
    rng = np.random.default_rng(seed)

    def predict(sets, queries):
        return Predictions(
            class_logits=rng.standard_normal((sets, batch, queries, CLASSES)).astype(np.float32),
            boxes=boxes(rng, sets, batch, queries),
            mask_queries=rng.standard_normal((sets, batch, queries, CHANNELS)).astype(np.float32),
        )

    features = rng.standard_normal((batch, SIZE, SIZE, CHANNELS)).astype(np.float32)
    matching, denoising = predict(LAYERS + 2, QUERIES), predict(LAYERS + 1, NUM_DENOISING)
    if not use_denoising:
        return TrainingOutputs(jax.tree.map(lambda x: np.delete(x, 1, axis=0), matching), None, features)
    return TrainingOutputs(matching, denoising, features)


def make_denoising(targets):
    return make_denoising_queries(
        targets, num_denoising=NUM_DENOISING, num_classes=CLASSES, num_queries=QUERIES,
        label_noise_ratio=0.5, box_noise_scale=1.0, rng=jax.random.key(7),
    )  # fmt: skip


match_costs = functools.partial(jax.jit, static_argnames=("settings", "mesh"))(compute_match_costs)


@functools.partial(jax.jit, static_argnames=("settings", "mesh"))
def score_matches(outputs, targets, denoising, query_index, draws, settings, mesh=None):
    def loss(outputs):
        return compute_losses(outputs, targets, denoising, query_index, draws, settings, mesh=mesh)

    return jax.value_and_grad(loss, has_aux=True)(outputs)


def score(outputs, targets, denoising, draws, settings=SETTINGS, mesh=None):
    """(total, terms), gradient to the outputs; draws: points of matching and of the losses."""
    costs = match_costs(outputs, targets, draws[0], settings, mesh=mesh)
    return score_matches(
        outputs, targets, denoising, assign(costs, targets.valid), draws[1], settings=settings, mesh=mesh
    )


def draw_both(rng, settings, outputs) -> tuple[jax.Array, PointDraws]:
    match_key, key = jax.random.split(rng)
    return draw_match_points(match_key, settings, outputs), draw_points(key, settings, outputs)


def run_case(counts=(3, 2), seed=1, use_denoising=True):
    targets, outputs = make_targets(counts), make_outputs(len(counts), seed, use_denoising)
    denoising = make_denoising(targets) if use_denoising else None
    draws = draw_both(jax.random.key(3), SETTINGS, outputs)
    return outputs, targets, denoising, draws


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_names_and_sum():
    (total, terms), _ = score(*run_case())
    names = ["", "/encoder", "/initial", "/layer0", "/denoising", "/denoising/initial", "/denoising/layer0"]
    parts = ("class", "box_l1", "box_giou", "mask_bce", "mask_dice")
    assert set(terms) == {f"loss/{part}{name}" for part in parts for name in names}
    assert all(float(x) > 0 for x in terms.values())
    np.testing.assert_allclose(total, sum(float(x) for x in terms.values()), rtol=1e-5)
    sums = sum_terms(terms)
    assert len(sums) == 20
    np.testing.assert_allclose(
        sums["mask_dice_aux"], sum(terms[f"loss/mask_dice/{x}"] for x in ("encoder", "initial", "layer0")), rtol=1e-6
    )
    np.testing.assert_allclose(sums["class_dn"], terms["loss/class/denoising"])


def test_set_names_without_denoising():
    assert set_names(3, use_denoising=False) == ["/encoder", "/layer0", ""]
    assert set_names(4, use_denoising=True)[:4] == ["/encoder", "/initial", "/layer0", ""]


@pytest.mark.slow
def test_right_predictions_cost_next_to_nothing():
    outputs, targets, _, draws = run_case(use_denoising=False)
    targets = dataclasses.replace(targets, masks=np.ones_like(targets.masks))
    shape = outputs.matching.class_logits.shape[:3]
    logits, queries = np.full((*shape, CLASSES), -20, np.float32), np.zeros((*shape, CHANNELS), np.float32)
    found = np.tile(np.array([0.9, 0.9, 0.1, 0.1], np.float32), (*shape, 1))
    for b in range(2):
        for n in range(int(targets.valid[b].sum())):
            logits[:, b, 2 * n, targets.labels[b, n]] = 20
            found[:, b, 2 * n] = targets.boxes[b, n]
            queries[:, b, 2 * n, 0] = 12
    right = TrainingOutputs(Predictions(logits, found, queries), None, np.ones_like(outputs.mask_features))
    nowhere = np.zeros_like(queries)
    nowhere[..., 0] = -12
    wrong = TrainingOutputs(Predictions(-logits, found[:, :, ::-1], nowhere), None, right.mask_features)
    (_, low), _ = score(right, targets, None, draws)
    (_, high), _ = score(wrong, targets, None, draws)
    for name in low:
        # Masks fade out in the half pixel at the image's edge, earlier where pixels are larger.
        limit = {"mask_bce": 4, "mask_dice": 0.5}.get(name.split("/")[1], 1e-3)
        assert abs(float(low[name])) < limit, name
        assert float(high[name]) > 9 * limit, name


def test_order_of_targets_does_not_matter():
    outputs, targets, _, draws = run_case(counts=(5, 5), use_denoising=False)
    order = np.array([4, 2, 0, 1, 3])
    before = score(outputs, targets, None, draws)
    after = score(outputs, jax.tree.map(lambda x: x[:, order], targets), None, draws)
    for a, b in zip(leaves(before), leaves(after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_slots_that_are_not_valid_change_nothing():
    outputs, targets, denoising, draws = run_case()
    before = score(outputs, targets, denoising, draws)
    noise = make_targets((5, 5), seed=9)
    real = targets.valid

    def spoil(x, other):
        return np.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, other)

    spoiled = Targets(*(spoil(getattr(targets, k), getattr(noise, k)) for k in ("labels", "boxes", "masks")), real)
    assert (spoiled.boxes != targets.boxes).any()
    for a, b in zip(leaves(before), leaves(score(outputs, spoiled, denoising, draws)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_denoising_slots_that_are_not_in_use_change_nothing():
    outputs, targets, denoising, draws = run_case(counts=(5, 2))  # 2 groups of 5: 10 of 12 slots
    before = score(outputs, targets, denoising, draws)
    (_, _), gradient = before
    assert (np.asarray(gradient.denoising.class_logits)[:, :, 10:] == 0).all()
    # Padding inside a group counts as background. (Of a pair with an IoU of 0 the label itself has no gradient.)
    assert (np.asarray(gradient.denoising.class_logits)[:, :, :10] != 0).any(axis=-1).all()
    spoiled = jax.tree.map(lambda x: np.concatenate([x[:, :, :10], x[:, :, 10:] + 1], axis=2), outputs.denoising)
    after = score(dataclasses.replace(outputs, denoising=spoiled), targets, denoising, draws)
    for a, b in zip(leaves(before), leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_objects():
    """As the reference: no `initial` set, nothing to denoise, background classes only."""
    outputs, targets, denoising, draws = run_case(counts=(0, 0))
    (total, terms), gradient = score(outputs, targets, denoising, draws)
    assert all(np.isfinite(x).all() for x in leaves(gradient))
    present = {name for name, value in terms.items() if value != 0}
    assert present == {"loss/class", "loss/class/encoder", "loss/class/layer0"}
    plain = make_outputs(2, use_denoising=False)
    (plain_total, _), plain_gradient = score(
        plain, targets, None, jax.tree.map(lambda x: np.delete(x, 1, axis=0)[:3], draws)
    )
    np.testing.assert_allclose(total, plain_total, rtol=1e-6)
    np.testing.assert_allclose(
        np.delete(gradient.matching.class_logits, 1, axis=0), plain_gradient.matching.class_logits, rtol=1e-6
    )
    assert (np.asarray(gradient.matching.class_logits[1]) == 0).all()


@pytest.mark.slow
def test_an_image_without_objects_adds_background_only():
    outputs, targets, denoising, draws = run_case(counts=(3, 0))
    (_, both), gradient = score(outputs, targets, denoising, draws)
    halves = [jax.tree.map(lambda x: x[:, :1], (outputs.matching, outputs.denoising)), outputs.mask_features[:1]]
    first = TrainingOutputs(*halves[0], halves[1])
    alone = jax.tree.map(lambda x: x[:1], targets)
    (_, one), _ = score(first, alone, make_denoising(alone), jax.tree.map(lambda x: x[:, :1], draws))
    for name in both:
        if "/denoising" in name:
            continue  # other noise
        if "class" in name:
            assert both[name] > one[name]
        else:
            np.testing.assert_allclose(both[name], one[name], rtol=1e-5)
    assert (np.asarray(gradient.matching.class_logits)[:, 1] != 0).all()
    for rest in (gradient.matching.boxes, gradient.matching.mask_queries):
        assert (np.asarray(rest)[:, 1] == 0).all()
    assert (np.asarray(gradient.mask_features)[1] == 0).all()


def test_gradient_reaches_every_matched_prediction():
    outputs, targets, denoising, draws = run_case()
    _, gradient = score(outputs, targets, denoising, draws)
    assert (np.asarray(gradient.matching.class_logits) != 0).any(axis=-1).all()
    for part in (gradient.matching.boxes, gradient.matching.mask_queries):
        hit = (np.asarray(part) != 0).all(axis=-1).sum(axis=-1)  # [S, B]
        np.testing.assert_array_equal(hit, np.tile([3, 2], (len(part), 1)))
    hit = (np.asarray(gradient.denoising.mask_queries) != 0).all(axis=-1)
    np.testing.assert_array_equal(hit, np.tile(np.asarray(denoising.valid), (len(hit), 1, 1)))


@pytest.mark.slow
def test_gradient_against_finite_differences():
    with jax.enable_x64(True):
        outputs, targets, denoising, draws = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64) if x.dtype == np.float32 else jnp.asarray(x), run_case()
        )
        settings = dataclasses.replace(SETTINGS, iou_target="none", aux_iou_target="none")  # IoUs have no gradient
        (total, _), gradient = score(outputs, targets, denoising, draws, settings)
        assert total.dtype == jnp.float64
        rng = np.random.default_rng(5)
        for name in ("matching", "denoising", "mask_features"):
            direction = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), getattr(outputs, name))

            def at(step, name=name, direction=direction):
                moved = jax.tree.map(lambda x, along: x + step * along, getattr(outputs, name), direction)
                return score(dataclasses.replace(outputs, **{name: moved}), targets, denoising, draws, settings)[0][0]

            numeric = (at(1e-6) - at(-1e-6)) / 2e-6
            exact = sum(jnp.vdot(g, d) for g, d in zip(leaves(getattr(gradient, name)), leaves(direction), strict=True))
            np.testing.assert_allclose(exact, numeric, rtol=1e-5)


def test_float64_agrees_with_float32():
    case = run_case()
    (narrow, _), _ = score(*case)
    with jax.enable_x64(True):
        outputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), case[0])
        (wide, terms), gradient = score(outputs, *jax.tree.map(jnp.asarray, case[1:]))
        assert {x.dtype for x in [wide, *terms.values(), *leaves(gradient)]} == {np.dtype(np.float64)}
    np.testing.assert_allclose(narrow, wide, rtol=1e-5)


@pytest.mark.slow
def test_bfloat16_predictions_are_scored_in_float32():
    outputs, targets, denoising, draws = run_case()
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), outputs)
    (total, _), gradient = score(low, targets, denoising, draws)
    (wide, _), _ = score(jax.tree.map(lambda x: x.astype(jnp.float32), low), targets, denoising, draws)
    assert total.dtype == jnp.float32 and total == wide
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("where", ["class_logits", "boxes", "mask_queries"])
def test_predictions_that_are_not_numbers_are_reported(where):
    outputs, targets, denoising, draws = run_case()
    broken = getattr(outputs.matching, where).copy()
    broken[:, 0] = np.nan
    matching = dataclasses.replace(outputs.matching, **{where: broken})
    (total, terms), _ = score(dataclasses.replace(outputs, matching=matching), targets, denoising, draws)
    assert not np.isfinite(total)
    assert np.isfinite(terms["loss/class/denoising"])


def test_shared_points_and_own_points_agree():
    """A row of points for every mask, all rows equal, is the same as one row for all masks."""
    outputs, targets, denoising, draws = run_case()
    rows = NUM_DENOISING
    own = (draws[0], jax.tree.map(lambda x: jnp.repeat(x, rows, axis=2), draws[1]))
    for a, b in zip(
        leaves(score(outputs, targets, denoising, draws)), leaves(score(outputs, targets, denoising, own)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


def test_sharing_points_leaves_the_expected_loss_as_it_is():
    outputs, targets, denoising, _ = run_case()
    rng = np.random.default_rng(0)
    sets, rows = 2 * LAYERS + 3, NUM_DENOISING
    sums = {"shared": [], "own": []}
    for i in range(150):
        shared = draw_both(jax.random.key(i), SETTINGS, outputs)
        own = [rng.random((sets, 2, rows, n, 2)).astype(np.float32) for n in (SETTINGS.num_candidates, 8)]
        for kind, draws in (("shared", shared), ("own", (shared[0], PointDraws(*own)))):
            (_, terms), _ = score(outputs, targets, denoising, draws)
            sums[kind].append([terms["loss/mask_bce/denoising"], terms["loss/mask_dice/denoising"]])
    shared, own = np.array(sums["shared"]), np.array(sums["own"])
    error = np.sqrt((shared.var(axis=0) + own.var(axis=0)) / len(own))
    assert (error < 0.01 * own.mean(axis=0)).all()
    assert (np.abs(shared.mean(axis=0) - own.mean(axis=0)) < 4 * error).all()


def test_points_are_uniform_and_independent():
    settings = dataclasses.replace(SETTINGS, num_points=20000, num_candidates=60000, num_important=15000)
    draws = draw_both(jax.random.key(0), settings, make_outputs(1))
    assert draws[0].shape == (LAYERS + 2, 1, 20000, 2)
    assert draws[1].candidates.shape == (2 * LAYERS + 3, 1, 1, 60000, 2)
    assert draws[1].extra.shape == (2 * LAYERS + 3, 1, 1, 5000, 2)
    for x in leaves(draws):
        flat = x.reshape(-1, x.shape[-2], 2)
        assert (flat >= 0).all() and (flat < 1).all()
        for points in flat[:3]:
            for axis in (0, 1):
                assert scipy.stats.kstest(points[:, axis], "uniform").pvalue > 1e-3
            assert abs(np.corrcoef(points.T)[0, 1]) < 4 / np.sqrt(len(points))
        assert np.unique(flat[:, :100], axis=0).shape == flat[:, :100].shape  # every set has its own


@pytest.mark.slow
@pytest.mark.parametrize("field", ["iou_target", "aux_iou_target"])
@pytest.mark.parametrize("kind", ["mask", "box", "none"])
def test_iou_targets(field, kind):
    case = run_case()
    base, terms = score(*case)[0][1], score(*case, dataclasses.replace(SETTINGS, **{field: kind}))[0][1]
    for name in base:
        is_aux = name.split("/")[-1] in ("encoder", "initial", "layer0")
        concerned = name.startswith("loss/class") and is_aux == (field == "aux_iou_target")
        changed = concerned and kind != getattr(SETTINGS, field)
        assert (terms[name] != base[name]) == changed, name


def test_settings_from_a_config():
    section = {
        "class_weight": 4, "box_l1_weight": 5, "box_giou_weight": 2, "mask_bce_weight": 5, "mask_dice_weight": 6,
        "match_class_weight": 1, "match_box_l1_weight": 5, "match_box_giou_weight": 2, "match_mask_bce_weight": 5,
        "match_mask_dice_weight": 5, "iou_target": "mask", "aux_iou_target": "box", "alpha": 0.75, "gamma": 2.0,
        "num_points": 12544, "oversample_ratio": 3.0, "important_ratio": 0.75,
    }  # fmt: skip

    settings = build_loss_settings(ConfigDict(section))
    assert (settings.num_candidates, settings.num_important) == (37632, 9408)
    assert settings.weights.mask_dice == 6 and settings.match_weights.class_ == 1
    for name, value in (("iou_target", "giou"), ("num_points", 0), ("oversample_ratio", 0.5), ("important_ratio", 1.5)):
        with pytest.raises(ValueError, match=f"loss.{name} is"):
            build_loss_settings(ConfigDict(section | {name: value}))


def test_denoising_and_its_predictions_come_together():
    outputs, targets, denoising, draws = run_case()
    with pytest.raises(ValueError, match="both be given"):
        score(outputs, targets, None, draws)
    del denoising


@pytest.mark.slow
def test_a_mesh_of_one_device_changes_nothing():
    outputs, targets, _, draws = run_case(use_denoising=False)
    mesh = make_mesh(jax.devices()[:1])
    (total, terms), _ = score(outputs, targets, None, draws, mesh=mesh)
    (wanted, wanted_terms), _ = score(outputs, targets, None, draws)
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    assert terms.keys() == wanted_terms.keys()


def sharded_losses(num_devices: int) -> dict:
    """Loss, terms and gradient norms of a batch of 8 over some devices."""
    mesh = make_mesh(jax.devices()[:num_devices])
    targets, outputs = make_targets((3, 2, 0, 5, 1, 4, 2, 3)), make_outputs(8)
    targets = put_batch(targets, mesh)
    by_set = jax.tree.map(
        lambda x: jax.device_put(x, split_over_batch(mesh).update(spec=(None, "data"))),
        (outputs.matching, outputs.denoising),
    )
    outputs = TrainingOutputs(*by_set, put_batch(outputs.mask_features, mesh))

    denoising, draws = jax.jit(lambda rng: (make_denoising(targets), draw_both(rng, SETTINGS, outputs)))(
        jax.random.key(3)
    )
    (total, terms), gradient = score(outputs, targets, denoising, draws, mesh=mesh)
    directions = jax.tree.map(lambda x: np.cos(np.arange(x.size, dtype=np.float64)).reshape(x.shape), gradient)
    projections = [float((np.asarray(g) * d).sum()) for g, d in zip(leaves(gradient), leaves(directions), strict=True)]
    kept = len(gradient.matching.boxes.sharding.device_set)
    return {
        "total": float(total),
        "terms": {k: float(v) for k, v in terms.items()},
        "gradient": projections,
        "devices": kept,
    }


@pytest.mark.slow
def test_eight_devices_agree_with_one():
    code = "import json, test_criterion as t; print(json.dumps([t.sharded_losses(n) for n in (1, 8)]))"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HELPERS), str(ROOT)]),
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "rematerialization" not in result.stderr
    one, eight = json.loads(result.stdout.splitlines()[-1])
    assert (one["devices"], eight["devices"]) == (1, 8)
    np.testing.assert_allclose(eight["total"], one["total"], rtol=1e-5)
    for name, value in one["terms"].items():
        np.testing.assert_allclose(eight["terms"][name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(eight["gradient"], one["gradient"], rtol=1e-4, atol=1e-5)
    # Without a mesh the same batch gives the same loss.
    outputs, targets = make_outputs(8), make_targets((3, 2, 0, 5, 1, 4, 2, 3))
    (total, _), _ = score(outputs, targets, make_denoising(targets), draw_both(jax.random.key(3), SETTINGS, outputs))
    np.testing.assert_allclose(total, one["total"], rtol=1e-5)
