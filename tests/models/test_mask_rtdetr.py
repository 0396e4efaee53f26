"""The public face of the model: sizes, names, shapes, and that outputs depend on what they should."""

import jax
import numpy as np
import pytest

import instseg_jax
from instseg_jax.models.mask_rtdetr import abstract_variables, count_parameters, initial_variables, make_model

OFFICIAL_COUNTS = {"s": 14_633_892, "m": 18_780_100, "l": 32_821_428, "x": 68_649_044, "h": 129_808_116}


@pytest.mark.parametrize("size", OFFICIAL_COUNTS)
def test_official_sizes_have_the_official_number_of_parameters(size):
    _, variables = instseg_jax.create_model(f"mask_rtdetr_{size}")
    assert set(variables) == {"params", "batch_stats"}
    assert count_parameters(variables["params"]) == OFFICIAL_COUNTS[size]


def test_size_n_is_small():
    _, variables = instseg_jax.create_model("mask_rtdetr_n")
    assert 4e6 < count_parameters(variables["params"]) < 6e6


def test_names_in_the_official_spelling_and_unknown_ones():
    assert instseg_jax.create_model("Mask-RT-DETR-N")[0] == instseg_jax.create_model("mask_rtdetr_n")[0]
    with pytest.raises(ValueError, match=r"'mask_rtdetr_q'.*mask_rtdetr_n, mask_rtdetr_s"):
        instseg_jax.create_model("mask_rtdetr_q")
    with pytest.raises(ValueError, match="num_queries is 0"):
        instseg_jax.create_model("mask_rtdetr_n", num_queries=0)


@pytest.fixture(scope="module")
def small():
    model, variables = instseg_jax.create_model("mask_rtdetr_n", num_classes=3, num_queries=20, seed=3)
    return model, variables, jax.jit(model.apply)


def test_outputs_have_the_promised_shapes_and_depend_on_the_image(small):
    _, variables, apply = small
    rng = np.random.default_rng(0)
    images = rng.random((2, 64, 96, 3), np.float32)
    outputs = apply(variables, images)
    assert outputs.class_logits.shape == (2, 20, 3)
    assert outputs.boxes.shape == (2, 20, 4)
    assert outputs.mask_logits.shape == (2, 20, 16, 24)
    changed = images.copy()
    changed[1, 10:40, 10:40] = 1 - changed[1, 10:40, 10:40]
    other = apply(variables, changed)
    for name in ("class_logits", "boxes", "mask_logits"):
        one, two = np.asarray(getattr(outputs, name)), np.asarray(getattr(other, name))
        assert np.isfinite(one).all() and np.abs(one).max() > 0
        np.testing.assert_allclose(one[0], two[0], atol=1e-5)  # the first image is as it was
        assert np.abs(one[1] - two[1]).max() > 1e-4
    assert (np.asarray(outputs.boxes) >= 0).all() and (np.asarray(outputs.boxes) <= 1).all()


def test_a_size_that_is_no_multiple_of_32_is_named(small):
    _, variables, apply = small
    with pytest.raises(ValueError, match="images are 64 x 100 pixels"):
        apply(variables, np.zeros((1, 64, 100, 3), np.float32))
    with pytest.raises(ValueError, match=r"shape \(64, 64, 3\)"):
        apply(variables, np.zeros((64, 64, 3), np.float32))


@pytest.mark.slow
def test_no_parameter_depends_on_the_number_of_queries(small):
    _, variables, _ = small
    more = make_model("mask_rtdetr_n", num_classes=3, num_queries=60)
    outputs = jax.jit(more.apply)(variables, np.random.default_rng(0).random((1, 64, 96, 3), np.float32))
    assert outputs.class_logits.shape == (1, 60, 3)


def test_rematerialisation_keeps_the_tree():
    trees = [
        abstract_variables(make_model("mask_rtdetr_n", num_classes=2, num_queries=5, remat=remat))
        for remat in (False, True)
    ]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])


def test_drawing_in_numpy_and_in_flax_make_the_same_tree_and_spread():
    model = make_model("mask_rtdetr_n", num_classes=2, num_queries=5)
    quick = initial_variables(model, seed=0)
    shapes = abstract_variables(model)
    assert jax.tree.map(np.shape, quick) == jax.tree.map(lambda x: x.shape, shapes)
    kernel = quick["params"]["neck"]["fpn_blocks_0"]["bottlenecks_0"]["conv1"]["conv"]["kernel"]
    assert kernel.std() == pytest.approx(np.sqrt(2 / np.prod(kernel.shape[:3])), rel=0.05)
    again, other = initial_variables(model, seed=0), initial_variables(model, seed=1)
    jax.tree.map(np.testing.assert_array_equal, quick, again)
    leaf = other["params"]["neck"]["fpn_blocks_0"]["bottlenecks_0"]["conv1"]["conv"]["kernel"]
    assert np.abs(leaf - kernel).max() > 0.01
    layers = quick["params"]["transformer"]["decoder"]
    jax.tree.map(np.testing.assert_array_equal, layers["layers_0"], layers["layers_2"])
    assert layers["layers_0"] is not layers["layers_2"]


@pytest.mark.slow
def test_denoising_slots_never_reach_the_queries():
    """A gradient from the queries' outputs to the denoising embedding would be a leak of the answers."""
    model = make_model("mask_rtdetr_n", num_classes=2, num_queries=6, num_decoder_layers=2)
    variables = initial_variables(model, seed=0)
    from instseg_jax.models.denoising import make_denoising_queries
    from instseg_jax.types import Targets

    targets = Targets(
        labels=np.zeros((1, 2), np.int32),
        boxes=np.array([[[0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1]]], np.float32),
        masks=np.ones((1, 2, 16, 16), np.uint8),
        valid=np.ones((1, 2), bool),
    )
    denoising = make_denoising_queries(
        targets, num_denoising=4, num_classes=2, num_queries=6, label_noise_ratio=0.5, box_noise_scale=1.0,
        rng=jax.random.key(0),
    )  # fmt: skip
    images = np.random.default_rng(0).random((1, 64, 64, 3), np.float32)

    def output_of(part: str, embedding):
        params = jax.tree.map(lambda x: x, variables["params"])
        params["transformer"]["denoising_class_embed"]["embedding"] = embedding
        outputs, _ = model.apply(
            {**variables, "params": params}, images, train=True, denoising=denoising, mutable=["batch_stats"]
        )
        predictions = getattr(outputs, part)
        return (predictions.class_logits[1:] ** 2).sum() + (predictions.boxes[1:] ** 2).sum()

    embedding = variables["params"]["transformer"]["denoising_class_embed"]["embedding"]
    leak, use = (jax.grad(lambda e, part=part: output_of(part, e))(embedding) for part in ("matching", "denoising"))
    assert np.abs(use).max() > 0
    assert np.abs(leak).max() == 0
