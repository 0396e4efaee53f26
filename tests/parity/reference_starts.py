"""Which tokens become queries and where they start to look: our choice, the reference's, and if rounding parts them.

Both are decisions: the best scores are kept, a box ends where a mask's logits change sign. A float32 run may decide
otherwise only where the deciding score or logit is within rounding; it is then continued from what the reference chose.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from reference import NOISE_FACTOR, whole_tensor
from reference_steps import Run, object_counts, prepare, run_steps, train, used_slots, widen

from instseg_jax.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from instseg_jax.models.query_selection import masks_to_boxes

SAME_BOX = 1e-3  # normalised; boxes of one token differ less between two float32 runs
SAME_EDGE = 1e-4  # normalised; start boxes lie on the grid of the masks, those at 0 and 1 are clipped to 1e-5
SPARE_QUERIES = 40  # tokens after the last selected one that a near-tie may bring in


def tight_boxes(masks: np.ndarray) -> np.ndarray:
    """Start boxes [B, Q, 4] of logits [B, Q, h, w] of any type; only their signs count."""
    return np.asarray(masks_to_boxes(jnp.asarray(np.sign(masks), jnp.float32)))


def check_selection(scores: np.ndarray, ours: np.ndarray, theirs: np.ndarray, noise: float) -> None:
    """Assert that only near-ties tell two selections [B, Q] apart; scores [B, T] of all tokens."""
    for b in range(len(theirs)):
        last = np.sort(scores[b])[-theirs.shape[1]]
        differing = sorted(set(ours[b]) ^ set(theirs[b]))
        assert len(set(theirs[b])) == theirs.shape[1]
        assert (np.abs(scores[b][differing] - last) <= noise).all(), f"image {b}: tokens {differing} are no near-ties"
        rising = np.diff(scores[b][theirs[b]])
        assert rising.max(initial=0) <= noise, f"image {b}: the order differs by a score of {rising.max():.1e}"


def check_start_boxes(masks: np.ndarray, theirs: np.ndarray, noise: float) -> np.ndarray:
    """Assert that start boxes [B, Q, 4] end where the logits [B, Q, h, w] do, give or take `noise`.

    Returns: which boxes differ, [B, Q].
    """
    sides = np.array([masks.shape[-1], masks.shape[-2]] * 2)
    ours = np.asarray(cxcywh_to_xyxy(jnp.asarray(tight_boxes(masks))))
    theirs = np.asarray(cxcywh_to_xyxy(jnp.asarray(theirs)))
    differs = (np.abs(ours - theirs) > SAME_EDGE).any(axis=-1)
    for b, q in np.argwhere(differs):
        first, last = np.round(theirs[b, q] * sides).astype(int).reshape(2, 2)
        for axis, (low, high) in enumerate(zip(first, last, strict=True)):
            highest = masks[b, q].max(axis=axis)  # of each column, then of each row
            inside = (np.arange(len(highest)) >= low) & (np.arange(len(highest)) < high)
            assert 0 <= low <= high <= len(highest), f"image {b}, query {q}: the box {theirs[b, q]} leaves the picture"
            # The reference's box: nothing above zero outside, and something above zero at both ends.
            wrong = [highest[~inside].max(initial=-np.inf)]
            wrong += [-highest[low], -highest[high - 1]] if high > low else []
            assert max(wrong) <= noise, f"image {b}, query {q}: the deciding logit is {max(wrong):.1e} off"
    return differs


@functools.cache
def inspect(name: str, dtype: str) -> dict[str, np.ndarray | list]:
    """Neck maps, scores of all tokens, and boxes and masks of the best ones of a training case's first step."""
    setup = prepare(name)
    model = setup.model.clone(num_queries=setup.model.num_queries + SPARE_QUERIES)

    def run(variables, images):
        _, state = model.apply(variables, images, train=True, mutable=["batch_stats", "intermediates"])
        state, inner = state["intermediates"], state["intermediates"]["transformer"]
        _, mask_queries, boxes = inner["encoder_set"][0]
        masks = jnp.einsum("bqp,bhwp->bqhw", mask_queries, state["mask_features"][0])
        found = {"scores": inner["enc_score_max"], "tokens": inner["selected_index"]}
        return {key: value[0] for key, value in found.items()} | {
            "maps": state["maps"][0],
            "boxes": boxes,
            "masks": masks,
        }

    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, jax.jit(run)(*widen((setup.variables, setup.batch.images), dtype)))


@functools.cache
def decisions(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, Q] and start boxes [B, Q, 4] of a training case's first step, as the reference chose them.

    Asserts that float64 would choose the same but for what lies within NOISE_FACTOR times the difference of our own
    two runs. A case that doesn't record them gets those of our run in float64.
    """
    setup, single, double = prepare(name), inspect(name, "float32"), inspect(name, "float64")
    batch, queries = len(double["scores"]), min(setup.model.num_queries, double["scores"].shape[1])
    tokens = double["tokens"][:, :queries].astype(np.int32)
    boxes = whole_tensor(setup.case.tensors, "enc_boxes_full", (batch, queries, 4))
    if boxes is not None:
        order = np.array([same_boxes(*pair) for pair in zip(boxes, double["boxes"], strict=True)])
        tokens = np.take_along_axis(double["tokens"], order, axis=1).astype(np.int32)
        noise = NOISE_FACTOR * np.abs(single["scores"] - double["scores"]).max()
        check_selection(double["scores"], double["tokens"][:, :queries], tokens, noise)
    masks = choose(double, tokens)
    used = used_slots(setup)
    starts = whole_tensor(setup.case.tensors, "init_boxes_full", (batch, used + queries, 4))
    if starts is None or boxes is None:
        return tokens, tight_boxes(masks)
    sides = np.array([masks.shape[-1], masks.shape[-2]] * 2)
    corners = np.round(np.asarray(cxcywh_to_xyxy(jnp.asarray(starts[:, used:]))) * sides) / sides
    starts = np.asarray(xyxy_to_cxcywh(jnp.asarray(corners)))
    check_start_boxes(masks, starts, NOISE_FACTOR * mask_noise(single, double))
    return tokens, starts


def same_boxes(theirs: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """For each box [Q, 4] the place of ours [Q', 4] that is the same: the same place, or else the nearest one."""
    distance = np.abs(theirs[:, None] - ours).max(axis=-1)
    place, nearest = np.arange(len(theirs)), distance.argmin(axis=-1)
    found = np.where(distance[place, place] < SAME_EDGE, place, nearest)
    assert distance[place, found].max() <= SAME_BOX, "the reference selects a box that none of our tokens has"
    return found


def choose(inspected: dict, tokens: np.ndarray) -> np.ndarray:
    """Masks [B, Q, h, w] of tokens [B, Q]."""
    return np.take_along_axis(inspected["masks"], places(inspected["tokens"], tokens)[..., None, None], axis=1)


def places(own: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Where each of the tokens [B, Q] stands in a longer list of our own [B, Q']."""
    return np.array([[list(row).index(t) for t in chosen] for row, chosen in zip(own, tokens, strict=True)])


def mask_noise(single: dict, double: dict) -> float:
    """Largest difference between the masks of tokens that both runs looked at."""
    worst = 0.0
    for b in range(len(double["tokens"])):
        _, i, j = np.intersect1d(single["tokens"][b], double["tokens"][b], return_indices=True)
        worst = max(worst, np.abs(single["masks"][b][i] - double["masks"][b][j]).max())
    return worst


@functools.cache
def train_from_reference_starts(name: str, dtype: str) -> Run:
    """Our steps with the queries and start boxes of the reference, in its order.

    The network doesn't mind the order of its queries: where that alone differs, ours are put in the reference's.
    """
    start = differing_start(name, dtype)
    if start:
        return run_steps(name, dtype, start)
    tokens, own = decisions(name)[0], inspect(name, dtype)["tokens"]
    run, order = train(name, dtype), places(own, tokens)
    index = np.argsort(order, axis=1)[None, :, :]  # the reference's place of each of our queries
    matches = np.where(run.query_index < 0, -1, np.take_along_axis(index, np.maximum(run.query_index, 0), axis=2))
    if (np.argsort(matches, axis=2) != np.argsort(run.query_index, axis=2)).any():
        # Random points are handed out in the order of matched queries.
        return run_steps(name, dtype, {"selected_index": tokens, "reference_boxes": decisions(name)[1]})
    matching = jax.tree.map(lambda x: np.take_along_axis(x, order[None, ..., None], axis=2), run.outputs.matching)
    return dataclasses.replace(
        run,
        outputs=dataclasses.replace(run.outputs, matching=matching),
        query_index=matches,
        match_costs=np.take_along_axis(run.match_costs, order[None, ..., None], axis=2),
    )


def differing_start(name: str, dtype: str) -> dict[str, np.ndarray]:
    """What `run_steps` is to be given; nothing where our run in this type chooses the same as the reference."""
    tokens, starts = decisions(name)
    own = inspect(name, dtype)
    own_tokens = own["tokens"][:, : tokens.shape[1]]
    is_same = (np.sort(own_tokens) == np.sort(tokens)).all()
    if is_same and np.abs(tight_boxes(choose(own, tokens)) - starts).max() < SAME_EDGE:
        return {}
    return {"selected_index": tokens, "reference_boxes": starts}


def recorded_matches(name: str, ours: np.ndarray) -> tuple[np.ndarray, int]:
    """Queries [S, B, N] that the reference matches in the first step, ours where it records none; and how many it does.

    Its call 0 matches the last layer, the next ones the sets in our order.
    """
    case, sets, expected, recorded = prepare(name).case, len(ours), ours.copy(), 0
    for call, one_set in enumerate((sets - 1, *range(sets - 1))):
        for b, n in enumerate(object_counts(case)):
            pairs = whole_tensor(case.tensors, f"match{call}_img{b}", (2, n))
            if n and pairs is not None:
                expected[one_set, b, :n] = -1
                expected[one_set, b, pairs[1]] = pairs[0]
                recorded += n
    return expected, recorded


@functools.cache
def train_as_reference(name: str, dtype: str) -> Run:
    """Our steps; the first one with the queries, start boxes and matches of the reference."""
    run = train_from_reference_starts(name, dtype)
    expected, _ = recorded_matches(name, run.query_index)
    if (expected == run.query_index).all():
        return run
    return run_steps(name, dtype, {**differing_start(name, dtype), "query_index": expected})
