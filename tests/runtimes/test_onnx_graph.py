"""The ONNX graph against the program that it was translated from, in ONNX Runtime."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_model import random_images, random_variables, small_model

from instseg_jax.inference.optimize import optimize_for_inference
from instseg_jax.inference.predictor import make_predict

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from instseg_jax.export.export import build_onnx  # noqa: E402
from instseg_jax.runtimes.onnx import OPSET  # noqa: E402
from instseg_jax.runtimes.onnx_translate import translate  # noqa: E402
from instseg_jax.runtimes.shape import OUTPUTS, Shape  # noqa: E402


def run(graph, images):
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})


def detections(model, variables, images, count):
    network, weights = optimize_for_inference(model, variables)
    found = make_predict(network, num_detections=count)(weights, images)
    return [np.asarray(getattr(found, name)) for name in OUTPUTS]


@pytest.mark.parametrize(
    ("like", "batch", "images"),
    [("n", None, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("s", None, 2), ("l", 2, 2)))],
)
def test_the_graph_finds_what_the_network_finds(like, batch, images):
    model = small_model(like=like)
    variables, pictures = random_variables(model), random_images(images, 64, 96, 3)
    graph = build_onnx(model, variables, Shape(batch or 1, (64, 96), 3, batch is None), num_detections=9)
    onnx.checker.check_model(graph, full_check=True)
    assert [output.name for output in graph.graph.output] == list(OUTPUTS)
    expected = detections(model, variables, pictures, 9)
    assert expected[0].std() > 1e-4 and expected[3].std() > 0.01
    for name, mine, theirs in zip(OUTPUTS, run(graph, pictures), expected, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4, err_msg=name)
    if batch is None:  # any number of images
        for name, mine, theirs in zip(OUTPUTS, run(graph, pictures[1:]), expected, strict=True):
            np.testing.assert_allclose(mine, theirs[1:], rtol=0, atol=1e-4, err_msg=name)


def test_the_graph_is_made_of_operators_that_runtimes_know_whole():
    model = small_model()
    graph = build_onnx(model, random_variables(model, channels=4), Shape(1, (64, 64), 4, False), num_detections=5)
    (images,) = graph.graph.input
    assert [side.dim_value for side in images.type.tensor_type.shape.dim] == [1, 64, 64, 4]
    assert graph.opset_import[0].version == OPSET
    count = collections.Counter(node.op_type for node in graph.graph.node)
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    depthwise = [n for n in convolutions if any(a.name == "group" and a.i > 1 for a in n.attribute)]
    assert len(depthwise) == 3 + 6  # a stride at the head of three stages, and three layers in each of two
    assert all(len(node.input) == 3 for node in convolutions)  # all have their bias
    assert count["LayerNormalization"] == 2 + 1 + 3 * 3 + 2 and count["MaxPool"] == 1 and count["Gelu"] == 1
    assert count["Pad"] == 0 and count["BatchNormalization"] == 0


FUNCTIONS = {
    "axes": lambda x: jnp.transpose(x, (2, 0, 1)).reshape(-1, 6) @ jnp.arange(12.0).reshape(6, 2),
    "broadcast": lambda x: x * jnp.arange(4.0)[None, None] + x.mean(axis=2, keepdims=True) - x[:, :1],
    "pad and slice": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0)), constant_values=3.0)[:, 1:5, 2],
    "reverse and join": lambda x: jnp.concatenate([x[..., ::-1], 2 * x], axis=1),
    "stack and split": lambda x: jnp.stack(jnp.split(x, 2, axis=2), axis=1),
    "choice": lambda x: jnp.where(x > 0.5, x, -jnp.square(x)).clip(-0.2, 0.8),
    "rows": lambda x: jnp.take(x.reshape(-1, 4), jnp.argmax(x, axis=2), axis=0, mode="clip"),
    "best": lambda x: jax.lax.top_k(x.reshape(x.shape[0], -1), 3)[0],
    "rows of each": lambda x: jnp.take_along_axis(x, jnp.argmax(x, axis=1)[..., None] % 3, axis=1),
    "products": lambda x: jnp.einsum("bqc,bkc->bkq", x, x + 1),
    "outer product": lambda x: jnp.einsum("bq,bkc->bqkc", x[:, 0], x),
    "logic": lambda x: (~(x > 0.3).all(axis=2) | (x < 0.1).any(axis=2)) * 2.0 + jnp.arange(x.shape[0])[:, None],
    "whole numbers": lambda x: ((x * 40).astype(jnp.int32) // 7 - (x * 40).astype(jnp.int32) % 5),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("fixed", [True, False])
def test_small_functions(name, fixed):
    x = random_images(2, 3, 4)
    expected = np.asarray(FUNCTIONS[name](jnp.asarray(x)))
    shape = (2 if fixed else None, 3, 4)
    graph = translate(lambda x: (FUNCTIONS[name](x),), shape, input_name="x", output_names=["y"], opset=OPSET)
    (found,) = run(graph, x)
    assert found.dtype == expected.dtype and expected.std() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_what_is_not_known_is_named():
    with pytest.raises(NotImplementedError, match="the primitive cumsum"):
        translate(lambda x: (jnp.cumsum(x),), (2, 3), input_name="x", output_names=["y"], opset=OPSET)
