"""Intermediates by name: that they are the values the outputs are made of, in the frames that they claim."""

import jax
import numpy as np
import pytest

import instseg_jax
from instseg_jax.models.anatomy import explain_mask, look_inside

HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="module")
def seen():
    model, variables = instseg_jax.create_model("mask_rtdetr_n", num_classes=3, num_queries=20, seed=1)
    images = np.random.default_rng(0).random((2, HEIGHT, WIDTH, 3), np.float32)
    return model, variables, images, look_inside(model, variables, images)


@pytest.mark.slow
def test_looking_changes_nothing(seen):
    model, variables, images, anatomy = seen
    outputs = jax.jit(model.apply)(variables, images)
    for name in ("class_logits", "boxes", "mask_logits"):
        np.testing.assert_allclose(getattr(anatomy.outputs, name), getattr(outputs, name), atol=1e-5)
    np.testing.assert_array_equal(anatomy.reference_boxes[-1], anatomy.outputs.boxes)


@pytest.mark.slow
def test_mask_queries_and_prototypes_make_the_masks(seen):
    anatomy = seen[3]
    logits = np.einsum("bqp,bhwp->bqhw", anatomy.mask_queries, anatomy.prototypes)
    np.testing.assert_allclose(logits, anatomy.outputs.mask_logits, atol=1e-4)
    order, parts = explain_mask(anatomy, 1, 7)
    assert sorted(order) == list(range(anatomy.prototypes.shape[-1]))
    np.testing.assert_allclose(parts.sum(axis=0), anatomy.outputs.mask_logits[1, 7], atol=1e-4)
    np.testing.assert_array_equal(parts[0], anatomy.prototypes[1, ..., order[0]] * anatomy.mask_queries[1, 7, order[0]])
    spread = parts.std(axis=(1, 2))
    assert (np.diff(spread) <= 0).all() and spread[0] > spread[-1]


@pytest.mark.slow
def test_selected_queries_are_the_best_tokens_where_they_lie(seen):
    anatomy = seen[3]
    assert [x.shape[1:] for x in anatomy.token_scores] == [(8, 12), (4, 6), (2, 3)]
    for image in range(2):
        best = np.sort(np.concatenate([x[image].ravel() for x in anatomy.token_scores]))[::-1][:20]
        np.testing.assert_array_equal(anatomy.selected_scores[image], best)
        for query in range(20):
            scores = anatomy.token_scores[anatomy.selected_level[image, query]][image]
            x, y = anatomy.selected_points[image, query]
            assert (x * scores.shape[1]) % 1 == pytest.approx(0.5, abs=1e-6)  # the middle of a token
            value = scores[int(y * scores.shape[0]), int(x * scores.shape[1])]
            assert value == anatomy.selected_scores[image, query]
    assert len(np.unique(anatomy.selected_level)) > 1


@pytest.mark.slow
def test_a_fresh_network_samples_along_the_directions_of_its_heads(seen):
    """Offsets of a fresh layer are constants: head 0 goes right, point i goes (i + 1) / points of half the box."""
    anatomy = seen[3]
    reference = anatomy.reference_boxes[0, 1, 5].astype(np.float64)
    reference = np.clip(reference, 1e-5, 1 - 1e-5)
    points = anatomy.sampling_points[0, 1, 5, 0]  # [levels, points, 2] of head 0
    for i, step in enumerate((0.25, 0.5, 0.75, 1.0)):
        expected = (reference[0] + step * reference[2] / 2, reference[1])
        np.testing.assert_allclose(points[:, i], np.tile(expected, (3, 1)), atol=1e-5)
    np.testing.assert_allclose(anatomy.sampling_weights.sum(axis=(-2, -1)), 1, atol=1e-5)
    np.testing.assert_allclose(anatomy.sampling_weights[0], 1 / 12, atol=1e-6)


@pytest.mark.slow
def test_encoder_attention_is_a_distribution_over_its_map(seen):
    model, _, _, anatomy = seen
    height, width = anatomy.encoder_attention_size
    assert (height, width) == anatomy.maps[model.variant.attention_level].shape[1:3]
    assert anatomy.encoder_attention.shape == (2, model.variant.num_heads, height * width, height * width)
    np.testing.assert_allclose(anatomy.encoder_attention.sum(axis=-1), 1, atol=1e-5)
    assert np.abs(anatomy.encoder_attention[0] - anatomy.encoder_attention[1]).max() > 1e-6


def test_features_are_found_by_the_paths_of_their_modules():
    """Traced alone; where a module returns several values, each has a number."""
    model, variables = instseg_jax.create_model("mask_rtdetr_n", num_classes=2, num_queries=8)
    images = np.zeros((1, 64, 96, 3), np.float32)

    def shapes(*patterns) -> dict:
        def find(variables, images):
            return instseg_jax.features(model, variables, images, patterns)

        return {path: value.shape for path, value in jax.eval_shape(find, variables, images).items()}

    found = shapes("^backbone$", "decoder/layers_0$")
    assert [found[f"backbone/{i}"][1:3] for i in range(4)] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert found["transformer/decoder/layers_0"][:2] == (1, 8) and len(found) == 5
    with pytest.raises(ValueError, match="no module's path contains 'backbon3'"):
        shapes("^backbone$", "backbon3")
