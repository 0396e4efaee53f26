"""Matching, denoising, loss terms and their gradients equal the reference's, with its random draws."""

import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import stored_values, whole_tensor
from sums import sum_terms

from instseg_jax import boxes as box_ops
from instseg_jax.models.denoising import noise_targets
from instseg_jax.models.sampling import sample_map
from instseg_jax.training.criterion import LossSettings, PointDraws, compute_losses, compute_match_costs
from instseg_jax.training.losses import uncertain_point_weights
from instseg_jax.training.mask_planes import pack_masks
from instseg_jax.training.matching import TermWeights, assign, match_cost
from instseg_jax.types import DenoisingQueries, Predictions, Targets, TrainingOutputs

HERE = pathlib.Path(__file__).parent
CASES = pathlib.Path(os.environ.get("INSTSEG_PARITY", HERE / "cases"))
NAMES = sorted(path.stem for path in CASES.glob("unit/loss_*.json") if path.stem != "loss_config")
CONFIG = json.loads((HERE / "cases/unit/loss_config.json").read_text())
MIN_SLOTS = 8  # more than the objects of these cases: some slots are never valid
NUM_CLASSES = 5
NUM_DENOISING = 20
LABEL_NOISE_RATIO, BOX_NOISE_SCALE = 0.5, 1.0
RELATIVE = 1e-5
OFFICIAL = {"class": "class", "box_l1": "bbox", "box_giou": "giou", "mask_bce": "mask", "mask_dice": "dice"}


def term_weights(key: str) -> TermWeights:
    return TermWeights(*(float(CONFIG[key][name]) for name in OFFICIAL.values()))


def settings(num_points: int) -> LossSettings:
    ratio = num_points / CONFIG["num_sample_points"]
    return LossSettings(
        weights=term_weights("loss_coeff"),
        match_weights=term_weights("matcher_coeff"),
        iou_target=CONFIG["vfl_iou_type"],
        aux_iou_target="box",
        alpha=0.75,
        gamma=CONFIG["gamma"],
        num_points=num_points,
        num_candidates=round(ratio * CONFIG["num_important_points"]),  # `load_draws` has chosen among them
        num_important=round(ratio * CONFIG["num_important_points"]),
    )


def random_numbers(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@functools.cache
def load(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    info = json.loads((CASES / f"unit/{name}.json").read_text())
    with np.load(CASES / f"unit/{name}.npz") as file:
        return info, dict(file)


def counts(z: dict) -> list[int]:
    return [len(z[f"gt_bbox{b}"]) for b in range(z["logits"].shape[1])]


def load_targets(z: dict, dtype=np.float32) -> Targets:
    numbers = counts(z)
    slots = max(MIN_SLOTS, *numbers)
    batch, size = len(numbers), z["gt_mask0"].shape[-2:]
    labels, boxes = np.zeros((batch, slots), np.int32), np.zeros((batch, slots, 4), dtype)
    masks, valid = np.zeros((batch, slots, *size), np.uint8), np.zeros((batch, slots), bool)
    for b, n in enumerate(numbers):
        labels[b, :n], boxes[b, :n], masks[b, :n] = z[f"gt_class{b}"][:, 0], z[f"gt_bbox{b}"], z[f"gt_mask{b}"]
        valid[b, :n] = True
    return Targets(labels, boxes, masks, valid)


def load_outputs(z: dict, slots: int) -> TrainingOutputs:
    """Predictions with given masks: every mask is a channel of the features, and its query picks it."""
    stacks = {"": z["logits"].shape[2]} | ({"dn_": slots} if "dn_logits" in z else {})
    channels, predictions, first = [], [], 0
    total = sum(z[f"{kind}logits"].shape[0] * queries for kind, queries in stacks.items())
    for kind, queries in stacks.items():
        logits, boxes, masks = (pad_queries(z[f"{kind}{name}"], queries) for name in ("logits", "boxes", "masks"))
        sets, batch = logits.shape[:2]
        channels.append(np.moveaxis(masks, 0, 1).reshape(batch, sets * queries, *masks.shape[3:]))
        own = np.eye(total, dtype=np.float32)[first : first + sets * queries].reshape(sets, 1, queries, total)
        predictions.append(Predictions(logits, boxes, np.repeat(own, batch, axis=1)))
        first += sets * queries
    features = np.moveaxis(np.concatenate(channels, axis=1), 1, -1)
    return TrainingOutputs(predictions[0], predictions[1] if len(predictions) > 1 else None, features)


def pad_queries(x: np.ndarray, queries: int) -> np.ndarray:
    """[S, B, q, ..] -> [S, B, queries, ..]; slots that the reference doesn't have hold an arbitrary 0.5."""
    padding = [(0, 0), (0, 0), (0, queries - x.shape[2])] + [(0, 0)] * (x.ndim - 3)
    return np.pad(x, padding, constant_values=0.5)


def load_denoising(info: dict, z: dict, targets: Targets) -> DenoisingQueries | None:
    if "dn_num_group" not in z:
        return None
    batch, used = len(counts(z)), int(z["dn_num_split"][0])
    slots = max(NUM_DENOISING, targets.valid.shape[1])
    rng = random_numbers(info["seed_dn"])
    u_flip = rng.random(batch * used, dtype=np.float32).reshape(batch, used)
    real = np.tile(targets.valid[:, : max(counts(z))], int(z["dn_num_group"]))
    flipped = (u_flip < LABEL_NOISE_RATIO * 0.5) & real
    random_labels = np.zeros((batch, used), np.int64)
    random_labels[flipped] = rng.integers(0, NUM_CLASSES, flipped.sum())
    u_box = rng.random((batch, used, 4), dtype=np.float32)
    spare = [(0, 0), (0, slots - used)]
    return noise_targets(
        targets,
        u_flip=jnp.asarray(np.pad(u_flip, spare)),
        random_labels=jnp.asarray(np.pad(random_labels, spare)),
        u_box=jnp.asarray(np.pad(u_box, [*spare, (0, 0)])),
        num_denoising=NUM_DENOISING,
        num_classes=NUM_CLASSES,
        num_queries=z["logits"].shape[2],
        label_noise_ratio=LABEL_NOISE_RATIO,
        box_noise_scale=BOX_NOISE_SCALE,
    )


def load_draws(info: dict, z: dict, targets: Targets, denoising, outputs) -> tuple[np.ndarray, PointDraws]:
    """The reference's draws, points of matching and of the losses.

    They come per set: matcher, candidates, extra, the main set first; then the denoising sets.

    Candidates are those that the reference keeps. Which of several equally uncertain ones it keeps depends on the
    last bit of its sampling and on the C++ library; `test_selection` compares our own choice with its.
    """
    s = settings(info["P"])
    sets, batch = z["logits"].shape[:2]
    rng = random_numbers(info["seed_loss"])
    drawn = [rng.random(shape, dtype=np.float32) for _, shape in info["draw_order"]]
    for i, values in enumerate(drawn):
        if f"loss_rand{i:02d}" in z:
            np.testing.assert_array_equal(values, z[f"loss_rand{i:02d}"])

    def empty(sets: int, rows: int, points: int) -> np.ndarray:
        return np.full((sets, batch, rows, points, 2), 0.5, np.float32)

    slots, num_extra = targets.valid.shape[1], s.num_points - s.num_important
    rows = slots if denoising is None else denoising.valid.shape[1]
    all_sets = sets if denoising is None else 2 * sets - 1
    matcher = np.zeros((sets, batch, info["P"], 2), np.float32)
    candidates = np.full((all_sets, batch, rows, s.num_important, 2), 0.5, np.float32)
    extra = np.full((all_sets, batch, rows, num_extra, 2), 0.5, np.float32)
    if not drawn:
        return matcher, PointDraws(candidates, extra)
    order = [sets - 1, *range(sets - 1)]
    for i, one_set in enumerate(order):
        matcher[one_set] = drawn[3 * i][:, 0]
    query_index = find_matches(outputs, targets, matcher, s)
    for i, one_set in enumerate(order):
        masks = [np.take(m, q, axis=0) for m, q in zip(z["masks"][one_set], query_index[one_set], strict=True)]
        real = [np.argsort(q)[np.count_nonzero(q < 0) :] for q in query_index[one_set]]
        arrange(drawn[3 * i + 1], drawn[3 * i + 2], masks, real, candidates[one_set], extra[one_set])
    real = [np.flatnonzero(row) for row in np.asarray(denoising.valid)]
    for i, one_set in enumerate([sets - 2, *range(sets - 2)]):
        pair = drawn[3 * sets + 2 * i : 3 * sets + 2 * i + 2]
        arrange(*pair, z["dn_masks"][one_set], real, candidates[sets + one_set], extra[sets + one_set])
    return matcher, PointDraws(candidates, extra)


def arrange(drawn, drawn_extra, masks, rows, candidates, extra) -> None:
    """Hand draws, which come image by image for its rows in order, to slots; keep the uncertain candidates."""
    left = zip(drawn[:, 0], drawn_extra, strict=True)
    for b, image_rows in enumerate(rows):
        for row in image_rows:
            points, extra[b, row] = next(left)
            kept = select_as_reference(masks[b][row], points, candidates.shape[2])
            candidates[b, row] = points[kept]
    assert next(left, None) is None


def select_as_reference(mask: np.ndarray, points: np.ndarray, count: int) -> np.ndarray:
    """Indices of the most uncertain points, as Paddle's top-k on a CPU finds them."""
    return nth_element(-np.abs(grid_sample(mask, points)), count)[:count]


def grid_sample(mask: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Paddle's arithmetic in its order, so that equal values are equal here when they are there."""
    one, half = np.float32(1), np.float32(0.5)
    height, width = mask.shape
    grid = 2 * points - one
    x, y = (grid[:, 0] + one) * np.float32(width / 2) - half, (grid[:, 1] + one) * np.float32(height / 2) - half
    west, north = np.floor(x), np.floor(y)
    east, south = west + one, north + one

    def value(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        row, column = np.clip(row, 0, height - 1).astype(int), np.clip(column, 0, width - 1).astype(int)
        return np.where(inside, mask[row, column], np.float32(0))

    upper = value(north, west) * (east - x) * (south - y) + value(north, east) * (x - west) * (south - y)
    return upper + value(south, west) * (east - x) * (y - north) + value(south, east) * (x - west) * (y - north)


def nth_element(values: np.ndarray, count: int) -> np.ndarray:
    """Indices in the order that libstdc++'s introselect leaves for the `count` largest values."""
    index = list(range(len(values)))
    first, last = 0, len(index)

    def above(i: int, j: int) -> bool:
        return values[index[i]] > values[index[j]]

    def swap(i: int, j: int) -> None:
        index[i], index[j] = index[j], index[i]

    while last - first > 3:
        a, b, c = first + 1, first + (last - first) // 2, last - 1
        if above(a, b):
            swap(first, b if above(b, c) else c if above(a, c) else a)
        else:
            swap(first, a if above(a, c) else c if above(b, c) else b)
        i, j = first + 1, last
        while True:
            while above(i, first):
                i += 1
            j -= 1
            while above(first, j):
                j -= 1
            if i >= j:
                break
            swap(i, j)
            i += 1
        first, last = (i, last) if i <= count - 1 else (first, i)
    index[first:last] = sorted(index[first:last], key=lambda i: -values[i])
    return np.array(index)


def prepare_match(outputs, targets):
    outputs, targets = jax.tree.map(jnp.asarray, (outputs, targets))
    num_slots = jnp.asarray(np.max(np.asarray(targets.valid).sum(1)), jnp.int32)
    return outputs.matching, outputs.mask_features, targets, pack_masks(targets.masks, num_slots), num_slots


def find_matches(outputs, targets, points, s: LossSettings) -> np.ndarray:
    cost = match_cost(*prepare_match(outputs, targets), jnp.asarray(points), s.match_weights)
    return np.asarray(assign(cost, targets.valid))


@functools.cache
def run(name: str):
    """Everything of a case: terms, total and gradients."""
    info, z = load(name)
    targets = load_targets(z)
    denoising = load_denoising(info, z, targets)
    outputs = jax.tree.map(jnp.asarray, load_outputs(z, 0 if denoising is None else denoising.valid.shape[1]))
    match_points, draws = load_draws(info, z, targets, denoising, outputs)
    costs = compute_match_costs(outputs, targets, jnp.asarray(match_points), settings(info["P"]))
    query_index = assign(costs, targets.valid)

    def loss(outputs):
        return compute_losses(outputs, targets, denoising, query_index, draws, settings(info["P"]))

    (total, terms), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jax.tree.map(jnp.asarray, outputs))
    return total, sum_terms(terms), jax.tree.map(np.asarray, gradient)


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def assert_stored(z: dict, name: str, mine, **limits: float) -> None:
    """Compare the values that the case stores of a tensor, all or samples; nothing where it stores none."""
    if (pair := stored_values(z, name, np.asarray(mine))) is not None:
        np.testing.assert_allclose(pair[1], pair[0], err_msg=name, **limits)


def test_there_are_cases():
    assert (HERE / "cases/unit/loss_config.json").exists()
    assert NAMES or "INSTSEG_PARITY" in os.environ


@pytest.mark.parametrize("name", NAMES)
def test_match(name):
    info, z = load(name)
    targets = load_targets(z)
    if not any(key.startswith("match_") for key in z):
        assert max(counts(z)) == 0
        return
    batch = len(counts(z))
    points = random_numbers(info["seed_match"]).random((batch, 1, info["P"], 2), dtype=np.float32)[:, 0]
    outputs = load_outputs({k: v for k, v in z.items() if not k.startswith("dn_")}, 0)
    points = np.broadcast_to(points, (len(z["logits"]), *points.shape))
    s = settings(info["P"])
    cost = match_cost(*prepare_match(outputs, targets), jnp.asarray(points), s.match_weights)
    query_index = find_matches(outputs, targets, points, s)[-1]
    for b, n in enumerate(counts(z)):
        assert_stored(z, f"match_cost{b}", cost[-1, b, :, :n], rtol=RELATIVE, atol=RELATIVE)
        objects, queries = (whole_tensor(z, f"match_{end}{b}", (n,)) for end in ("dst", "src"))
        if objects is not None and queries is not None:
            expected = np.full(targets.valid.shape[1], -1)
            expected[objects] = queries
            np.testing.assert_array_equal(query_index[b], expected)


@pytest.mark.parametrize("name", NAMES)
def test_denoising_queries(name):
    info, z = load(name)
    denoising = load_denoising(info, z, load_targets(z))
    if denoising is None:
        assert max(counts(z)) == 0
        return
    used, queries = map(int, z["dn_num_split"])
    slots = denoising.valid.shape[1]
    assert int(denoising.num_groups) == int(z["dn_num_group"])
    if "dn_class_embed_table" in z:
        table = np.concatenate([z["dn_class_embed_table"], np.zeros_like(z["dn_class_embed_table"][:1])])
        assert_stored(z, "dn_query_class", table[denoising.labels[:, :used]], rtol=0)
    assert_stored(z, "dn_query_bbox_unact", denoising.boxes_unact[:, :used], rtol=RELATIVE, atol=RELATIVE)
    for b in range(len(counts(z))):
        assert_stored(z, f"dn_positive_idx{b}", np.flatnonzero(denoising.valid[b]), rtol=0)
    mask = np.asarray(denoising.attention_mask)
    kept = np.r_[:used, slots : slots + queries]
    assert_stored(z, "dn_attn_mask", mask[np.ix_(kept, kept)], rtol=0)
    assert not mask[:, used:slots].any()


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "loss_b")) for name in NAMES])
def test_loss_terms(name):
    _, z = load(name)
    total, sums, _ = run(name)
    for term, official in OFFICIAL.items():
        for suffix in ("", "_aux", "_dn", "_aux_dn"):
            assert_stored(z, f"L_loss_{official}{suffix}", sums[term + suffix][None], rtol=RELATIVE)
    assert_stored(z, "L_total", total[None], rtol=RELATIVE)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "loss_b")) for name in NAMES])
def test_gradients(name):
    _, z = load(name)
    _, _, gradient = run(name)
    masks = np.moveaxis(gradient.mask_features, -1, 1)
    for kind, part in (("", gradient.matching), ("dn_", gradient.denoising)):
        if part is None:
            continue
        sets, batch, queries = part.boxes.shape[:3]
        used = z[f"{kind}logits"].shape[2]
        own, masks = masks[:, : sets * queries], masks[:, sets * queries :]
        own = np.moveaxis(own.reshape(batch, sets, queries, *own.shape[2:]), 1, 0)
        for name_, ours in (("logits", part.class_logits), ("boxes", part.boxes), ("masks", own)):
            assert not ours[:, :, used:].any()
            ours = ours[:, :, :used]
            theirs = whole_tensor(z, f"G_{kind}{name_}", ours.shape)
            pair = stored_values(z, f"G_{kind}{name_}", ours)
            # Set by set where the whole tensor is stored: a small gradient beside a large one counts too.
            pairs = [] if pair is None else [pair] if theirs is None else zip(theirs, ours, strict=True)
            for i, (expected, mine) in enumerate(pairs):
                error = relative_error(mine, expected)
                assert error < RELATIVE, (kind, name_, i, error)


@pytest.mark.parametrize("name", NAMES)
def test_selection(name):
    """Our weights keep as uncertain points as the reference's choice; it differs among equals only."""
    info, z = load(name)
    important = settings(info["P"]).num_important
    rng = random_numbers(0)
    masks = np.concatenate([m.reshape(-1, *m.shape[-2:]) for m in (z["masks"], z.get("dn_masks", z["masks"]))])
    masks = masks[rng.choice(len(masks), 40, replace=False)]
    points = rng.random((len(masks), 4 * important, 2), dtype=np.float32)
    logits = sample_map(jnp.asarray(masks)[..., None], jnp.asarray(points))[..., 0]
    weights = np.asarray(uncertain_point_weights(logits, points.shape[1], important))
    np.testing.assert_allclose(weights.sum(axis=1), important, rtol=1e-6)
    for mask, at, ours, weight in zip(masks, points, np.abs(logits), weights, strict=True):
        theirs = np.sort(np.abs(grid_sample(mask, at))[select_as_reference(mask, at, important)])
        assert np.sort(np.abs(grid_sample(mask, at)))[:important].tolist() == theirs.tolist()
        np.testing.assert_allclose((ours * weight).sum(), theirs.sum(), rtol=RELATIVE)
        assert ours[weight == 1].max() < theirs.max() + 1e-5
        assert ours[weight == 0].min() > theirs.max() - 1e-5


@functools.cache
def functions() -> dict[str, np.ndarray]:
    path = CASES / "unit/funcs.npz"
    if not path.exists():
        pytest.skip("this folder has no unit/funcs.npz")
    with np.load(path) as file:
        return dict(file)


def test_sampling():
    z = functions()
    sampled = sample_map(jnp.asarray(np.moveaxis(z["gs_x"], 1, -1)), jnp.asarray(z["gs_u"]))
    np.testing.assert_allclose(np.moveaxis(sampled, -1, 1), z["gs_out"], rtol=RELATIVE, atol=1e-6)


def test_uncertain_points():
    z = functions()
    u1, u2, expected = z["pt_u1"][:, 0], z["pt_u2"], z["pt_points"]
    important = expected.shape[1] - u2.shape[1]
    points = np.concatenate([u1, u2], axis=1)
    logits = sample_map(jnp.asarray(z["pt_masks"])[..., None], jnp.asarray(points))[..., 0]
    weights = np.asarray(uncertain_point_weights(logits, u1.shape[1], important))
    assert set(np.unique(weights)) == {0, 1}
    for ours, weight, theirs in zip(points, weights, expected, strict=True):
        # The reference orders the important points by uncertainty and keeps the extra ones as drawn.
        kept = ours[weight > 0]
        assert sorted(map(tuple, kept)) == sorted(map(tuple, theirs))


def test_generalized_box_iou():
    z = functions()
    a, b = (box_ops.cxcywh_to_xyxy(jnp.asarray(z[name])) for name in ("giou_a", "giou_b"))
    np.testing.assert_allclose(1 - box_ops.generalized_box_iou(a, b), z["giou_loss"][:, 0], rtol=RELATIVE, atol=1e-6)


def test_inverse_sigmoid():
    z = functions()
    np.testing.assert_allclose(
        box_ops.inverse_sigmoid(jnp.asarray(z["m2b_xywh"])), z["m2b_invsig"], rtol=1e-5, atol=1e-5
    )
