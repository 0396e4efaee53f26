"""The form for inference says what the trained network says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_model import random_images, random_variables, small_model

from instseg_jax.inference.optimize import optimize_for_inference
from instseg_jax.inference.postprocess import select_detections
from instseg_jax.models.attention import MANY_TOKENS, MultiHeadAttention
from instseg_jax.models.deformable_attention import sample_levels
from instseg_jax.models.mask_rtdetr import count_parameters
from instseg_jax.models.query_selection import masks_to_boxes
from instseg_jax.types import FactoredOutputs, Outputs

OUTPUTS = ("class_logits", "boxes", "mask_logits")


def both(model, variables, images):
    found = []
    for network, weights in ((model, variables), optimize_for_inference(model, variables)):
        outputs = jax.jit(network.apply)(weights, images)
        found.append({name: np.asarray(getattr(outputs, name)) for name in OUTPUTS})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("like", ["n", *(pytest.param(size, marks=pytest.mark.slow) for size in "sl")])
def test_outputs_are_equal_in_float64(like):
    model = small_model(like=like)
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda x: np.asarray(x, np.float64), random_variables(model))
        plain, folded = both(model, variables, random_images(2, 64, 96, 3).astype(np.float64))
    for name in OUTPUTS:
        assert plain[name].dtype == np.float64 and plain[name].std() > 0.01
        np.testing.assert_allclose(folded[name], plain[name], rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.slow
def test_outputs_are_equal_in_float32_and_near_in_bfloat16():
    model, images = small_model(), random_images(1, 64, 64, 3)
    variables = random_variables(model)
    plain, folded = both(model, variables, images)
    for name in OUTPUTS:
        np.testing.assert_allclose(folded[name], plain[name], rtol=0, atol=2e-4, err_msg=name)
    network, weights = optimize_for_inference(model.clone(dtype=jnp.dtype(jnp.bfloat16)), variables)
    rough = jax.jit(network.apply)(weights, images)
    assert np.abs(np.asarray(rough.class_logits) - plain["class_logits"]).mean() < 0.1


def test_norms_and_branches_are_gone_and_the_given_variables_are_as_they_were():
    model = small_model()
    variables = random_variables(model)
    before = jax.tree.map(np.copy, variables)
    network, folded = optimize_for_inference(model, variables)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert network.folded and not model.folded and set(folded) == {"params"}
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(folded)]
    assert not [path for path in paths if "'bn'" in path or "mean" in path or "denoising" in path]
    block = folded["params"]["neck"]["fpn_blocks_0"]["bottlenecks_0"]
    assert set(block) == {"conv"} and block["conv"]["kernel"].shape[:2] == (3, 3)
    assert count_parameters(folded["params"]) < count_parameters(variables["params"])
    assert {x.dtype for x in jax.tree.leaves(folded)} == {np.dtype(np.float32)}


def test_a_folded_network_or_another_one_comes_back_as_it_is():
    model = small_model()
    network, folded = optimize_for_inference(model, random_variables(model))
    assert optimize_for_inference(network, folded) == (network, folded)
    other = object()
    assert optimize_for_inference(other, {}) == (other, {})


def test_masks_are_made_of_the_kept_queries():
    rng = np.random.default_rng(0)
    logits, boxes = rng.standard_normal((2, 5, 3)), rng.random((2, 5, 4))
    queries, features = rng.standard_normal((2, 5, 4)), rng.standard_normal((2, 6, 8, 4))
    factored = FactoredOutputs(*(jnp.asarray(x, jnp.float32) for x in (logits, boxes, queries, features)))
    whole = Outputs(factored.class_logits, factored.boxes, np.einsum("bqp,bhwp->bqhw", queries, features))
    np.testing.assert_allclose(factored.mask_logits, whole.mask_logits, atol=1e-5)
    one, two = (select_detections(outputs, num_detections=4) for outputs in (factored, whole))
    assert one.mask_logits.shape == (2, 4, 6, 8)
    for name in ("scores", "labels", "boxes_xyxy", "mask_logits"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("tokens", [40, MANY_TOKENS + 6])
def test_attention_without_gradients_is_attention(tokens):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, tokens, 16)), jnp.float32)
    plain, quick = MultiHeadAttention(2), MultiHeadAttention(2, folded=True)
    variables = plain.init(jax.random.key(0), x[:, :3], x[:, :3], x[:, :3])
    one, two = (np.asarray(layer.apply(variables, x, 2 * x, x - 1)) for layer in (plain, quick))
    assert one.std() > 0.01
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_rows_added_one_by_one_are_the_same_samples():
    rng = np.random.default_rng(0)
    shapes = ((8, 12), (4, 6), (2, 3))
    value = jnp.asarray(rng.standard_normal((2, 126, 4, 8)), jnp.float32)
    locations = jnp.asarray(rng.uniform(-0.3, 1.3, (2, 5, 4, 3, 4, 2)), jnp.float32)
    weights = jnp.asarray(rng.random((2, 5, 4, 3, 4)), jnp.float32)
    one, two = (np.asarray(sample_levels(value, shapes, locations, weights, fused=f)) for f in (False, True))
    assert one.std() > 0.1
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)


def test_masks_to_boxes_by_hand():
    logits = np.full((1, 3, 4, 5), -1.0, np.float32)
    logits[0, 0, 1, 2] = logits[0, 0, 3, 1] = 0.5  # rows 1..3, columns 1..2
    logits[0, 1, 0, 4] = 1e-3
    boxes = np.asarray(masks_to_boxes(jnp.asarray(logits)))[0]
    np.testing.assert_allclose(boxes[0], [0.4, 0.625, 0.4, 0.75], atol=1e-6)
    np.testing.assert_allclose(boxes[1], [0.9, 0.125, 0.2, 0.25], atol=1e-6)
    np.testing.assert_array_equal(boxes[2], 0)
