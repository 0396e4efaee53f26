"""8-bit layers in an ONNX graph, and the search for those that stay float32, on a small network made by hand."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import numpy_helper  # noqa: E402

from instseg_jax.models.convolution import depthwise_conv  # noqa: E402
from instseg_jax.runtimes import quantize as room  # noqa: E402
from instseg_jax.runtimes.onnx import OPSET  # noqa: E402
from instseg_jax.runtimes.onnx_translate import translate  # noqa: E402
from instseg_jax.runtimes.qdq import calibrate, find_layers, open_graph, quantize_layers  # noqa: E402
from instseg_jax.runtimes.shape import INPUT, OUTPUTS  # noqa: E402

SIDE, CHANNELS, KEPT = 12, 8, 6
LOUD = 3000.0  # the value of a channel that nothing reads


def network(images, *, loud=0.0):
    """Six layers: what their names say; "mixed" is given a channel that is larger by `loud` and does not use it."""
    rng = np.random.default_rng(0)

    def weights(*shape):
        return rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape).astype(np.float32)

    def conv(x, kernel):
        if kernel.shape[2] == 1:
            made = depthwise_conv(x, kernel, 1, (1, 1))
        else:
            sides = ("NHWC", "HWIO", "NHWC")
            made = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=sides)
        return made + rng.normal(0, 0.1, kernel.shape[-1]).astype(np.float32)

    with jax.named_scope("net"), jax.named_scope("stem"):
        x = jnp.clip(conv(images, weights(3, 3, 3, CHANNELS)), 0, 6)
    with jax.named_scope("net"), jax.named_scope("depthwise"):
        y = jax.nn.relu(conv(x, weights(3, 3, 1, CHANNELS)))
    with jax.named_scope("net"), jax.named_scope("mixed"):
        kernel = weights(1, 1, CHANNELS, CHANNELS)
        kernel[:, :, 0] = 0
        x = jax.nn.silu(conv(y + loud * np.eye(1, CHANNELS, dtype=np.float32)[0] if loud else y, kernel)) + x
    with jax.named_scope("net"), jax.named_scope("features"):
        x = jax.nn.silu(conv(x, weights(3, 3, CHANNELS, CHANNELS)))
    tokens = x.reshape(len(images), -1, CHANNELS)
    with jax.named_scope("net"), jax.named_scope("scores"):
        logits = tokens @ weights(CHANNELS, 2)
    with jax.named_scope("net"), jax.named_scope("boxes"):
        boxes = jax.nn.sigmoid(tokens @ weights(CHANNELS, 4))
    scores, chosen = jax.lax.top_k(logits.max(axis=2), KEPT)
    boxes = jnp.take_along_axis(boxes, chosen[..., None], axis=1)
    queries = jnp.take_along_axis(tokens, chosen[..., None], axis=1)
    masks = jnp.einsum("btc,bqc->bqt", tokens, queries).reshape(-1, KEPT, SIDE, SIDE)
    corners = jnp.concatenate([boxes[..., :2] / 2, 0.5 + boxes[..., 2:] / 2], axis=2)
    return jax.nn.sigmoid(scores), chosen.astype(jnp.int32), corners, masks - 1


@functools.cache
def graph(loud=0.0, batch=1):
    shape = batch, SIDE, SIDE, 3
    made = translate(lambda x: network(x, loud=loud), shape, input_name=INPUT, output_names=OUTPUTS, opset=OPSET)
    onnx.checker.check_model(made, full_check=True)
    return made


def pictures(count=6):
    return list(np.random.default_rng(1).random((count, SIDE, SIDE, 3), np.float32))


def run(model, images=None):
    return open_graph(model)(np.stack(images or pictures(1)), OUTPUTS)


def quantized(names, loud=0.0):
    calibration = calibrate(graph(loud), find_layers(graph(loud)), [image[None] for image in pictures()])
    return quantize_layers(graph(loud), names, calibration)


def test_layers_have_the_names_of_the_network():
    assert [layer.doc_string for layer in find_layers(graph())] == [
        "stem", "depthwise", "mixed", "features", "scores", "boxes"
    ]  # fmt: skip


def test_what_lies_between_8_bit_convolutions_is_in_8_bits_too():
    layers = [layer.name for layer in find_layers(graph())]
    plain, whole = graph(), quantized(layers)
    onnx.checker.check_model(whole, full_check=True)
    assert run(quantized([]))[0].tolist() == run(plain)[0].tolist()
    assert 0 < np.abs(run(whole)[0] - run(plain)[0]).max() < 0.002  # scores, of 0.572 to 0.584
    count = collections.Counter(node.op_type for node in whole.graph.node)
    # Of the picture, of the clipped stem, of the depthwise one's ReLU, of "mixed" with its sigmoid, product and sum,
    # of "features" as of the convolution alone (its product goes to no convolution), and of the tokens.
    assert count["QuantizeLinear"] == 1 + 1 + 1 + 4 + 1 + 1
    weights = {tensor.name: tensor for tensor in whole.graph.initializer}
    stem = numpy_helper.to_array(weights[f"{layers[0]}/weight/integers"])
    assert stem.dtype == np.int8 and np.abs(stem).max() == 127
    assert weights[f"{layers[0]}/weight/scale"].dims == [CHANNELS]
    count = collections.Counter(node.op_type for node in quantized(layers[3:4]).graph.node)
    assert count["QuantizeLinear"] == 2 and count["DequantizeLinear"] == 2 + 2  # and of weight and bias


def test_a_bias_makes_up_for_rounded_weights():
    """A constant picture: what comes out of the first layer is right on average, to a step of its 8-bit bias."""
    image = np.full((1, SIDE, SIDE, 3), 1.0, np.float32)
    layers = find_layers(graph())
    whole = quantize_layers(graph(), [layers[0].name], calibrate(graph(), layers, [image]))
    stem = next(node for node in whole.graph.node if node.name == layers[0].name)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in whole.graph.initializer}
    plain = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph().graph.initializer}

    def value(name):
        return arrays[f"{name}/integers"] * arrays[f"{name}/scale"].reshape(
            -1, *[1] * (arrays[f"{name}/integers"].ndim - 1)
        )

    weight, bias = (value(name) for name in stem.input[1:])
    wanted = plain[layers[0].input[1]].sum(axis=(1, 2, 3)) + plain[layers[0].input[2]]
    without = weight.sum(axis=(1, 2, 3)) + plain[layers[0].input[2]]
    assert np.abs(without - wanted).max() > 1e-3
    np.testing.assert_allclose(weight.sum(axis=(1, 2, 3)) + bias, wanted, atol=1e-4)


def test_a_selection_is_held():
    held, (selection,) = room.hold_selection(graph())
    scores, labels, boxes, masks = run(graph())
    given = {selection: labels.astype(np.int64)}
    names = [name for name in OUTPUTS if name != "labels"]
    image = np.stack(pictures(1))
    for mine, theirs in zip(open_graph(held)(image, names, given), (scores, boxes, masks), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    given[selection] = given[selection][:, ::-1].copy()
    np.testing.assert_array_equal(open_graph(held)(image, names, given)[0], scores[:, ::-1])


def test_distance_by_hand():
    scores, boxes = np.array([[0.8, 0.2]]), np.array([[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 0.5]]])
    masks = np.array([[[[1.0, 1.0]], [[1.0, -1.0]]]])
    assert room.distance((scores, boxes, masks), (scores, boxes, masks)) == 0
    half = np.array([[[0.0, 0.0, 1.0, 0.5], [0.0, 0.0, 0.5, 0.5]]])
    other = np.array([[[[1.0, 1.0]], [[-1.0, 1.0]]]])
    found = room.distance((scores, boxes, masks), (scores + np.array([[0.1, 0]]), half, other))
    assert found == pytest.approx(0.8 * (0.5 + 0.1) + 0.2 * 1)


def groups(*pairs):
    return [room.Group((), share, sensitivity) for share, sensitivity in pairs]


def agree_without(needed):
    """An agreement that is reached where none of the groups with these sensitivities is in 8 bits."""

    def agreement(chosen):
        is_good = not needed & {group.sensitivity for group in chosen}
        return {"matched_share": 1.0 if is_good else 0.5, "mask_iou_mean": 1.0}

    return agreement


def test_the_most_sensitive_for_their_work_stay_float():
    some = groups((0.4, 0.4), (0.1, 0.3), (0.2, 0.1), (0.05, 0.2), (0.25, 0.02))  # by work: 1, 3, 0.5, 4, 0.08
    for needed, kept in ((set(), 5), ({0.2}, 4), ({0.3}, 3), ({0.3, 0.2}, 3)):
        chosen, agreed = room.choose(some, agree_without(needed))
        assert len(chosen) == kept and agreed["matched_share"] == 1
    assert [group.sensitivity for group in room.choose(some, agree_without({0.3}))[0]] == [0.4, 0.1, 0.02]


def test_no_more_than_half_of_the_work_stays_float():
    some = groups((0.4, 0.4), (0.1, 0.3), (0.2, 0.1), (0.05, 0.2), (0.25, 0.02))
    chosen, agreed = room.choose(some, agree_without({0.02}))
    assert [group.share for group in chosen] == [0.4, 0.2, 0.25] and agreed["matched_share"] == 0.5


@pytest.mark.parametrize("batch", [1, 4])
def test_a_layer_that_8_bits_do_not_suit_stays_float(batch, monkeypatch):
    monkeypatch.setattr(room, "GROUP", 1)
    model, report = room.quantize(graph(LOUD, batch), pictures())
    assert report["in_float32"][0]["layers"] == ["mixed"], report
    assert report["in_float32"][0]["sensitivity"] > 3 * max(group["sensitivity"] for group in report["sensitivities"])
    assert report["layers"] == 6 and report["in_8_bits"] + len(report["in_float32"]) == 6
    assert all(report["agreement"][name] >= least for name, least in room.BUDGET.items())
    again, same = room.quantize(graph(LOUD, batch), pictures())
    assert report == same and model.SerializeToString() == again.SerializeToString()
