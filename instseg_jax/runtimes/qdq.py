"""An ONNX graph with 8-bit layers: which could be, what ranges their values have, and the graph where some are.

8 bits are written as runtimes read them, by pairs of QuantizeLinear and DequantizeLinear around what they may compute
in whole numbers: values in uint8 with one scale a tensor, weights in int8 with a scale for each output channel.
"""

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LAYERS = {"Conv": 4, "MatMul": 2}  # what may be in 8 bits where the second input is a weight of so many axes
JOINED = ("Relu", "Clip")  # behind a convolution they are a part of it
# What stays in 8 bits between convolutions; these keep the scale of what they get, the others have one of their own.
SAME_SCALE = ("MaxPool", "Resize")
BETWEEN = (*SAME_SCALE, "Add", "Concat", "Mul", "Sigmoid")
LEVELS = 255  # of uint8
LARGEST_WEIGHT = 127  # of int8, on both sides of 0
LEAST_SCALE = 1e-8
# Moving a value costs as much as so many multiplications by 8-bit weights (ONNX Runtime, AVX-512 VNNI).
MOVED = 32


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What tensors were like on pictures."""

    ranges: dict[str, tuple[float, float]]  # least and largest value, the mean over batches
    means: dict[str, np.ndarray]  # of each channel of what convolutions are given
    costs: dict[str, float]  # of a layer, in multiplications


def find_layers(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The convolutions and matrix products with weights, in the order of computing."""
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.graph.initializer}
    return [
        node
        for node in graph.graph.node
        if node.op_type in LAYERS and ranks.get(node.input[1]) == LAYERS[node.op_type] and node.input[0] not in ranks
    ]


def calibrate(graph: onnx.ModelProto, layers: Sequence[onnx.NodeProto], batches: Iterable[np.ndarray]) -> Calibration:
    """Run the graph on batches of images, and take down what it takes to have `layers` in 8 bits."""
    plan = _Plan(graph, {node.name for node in layers})
    inputs = list(dict.fromkeys(node.input[0] for node in layers))
    convolved = list(dict.fromkeys(node.input[0] for node in layers if node.op_type == "Conv"))
    ranged = list(dict.fromkeys([*inputs, *plan.outputs]))
    counted = list(dict.fromkeys(name for node in layers for name in (node.input[0], node.output[0])))
    observed = onnx.ModelProto()
    observed.CopyFrom(graph)
    body = observed.graph
    del body.output[:]

    def observe(kind: str, inputs: list[str], name: str, dtype: int = TensorProto.FLOAT, **attributes: Any) -> str:
        body.node.append(helper.make_node(kind, inputs, [name], **attributes))
        body.output.append(helper.make_tensor_value_info(name, dtype, None))
        return name

    lows = [observe("ReduceMin", [name], f"{name}/low", keepdims=0) for name in ranged]
    highs = [observe("ReduceMax", [name], f"{name}/high", keepdims=0) for name in ranged]
    sizes = [observe("Size", [name], f"{name}/size", TensorProto.INT64) for name in counted]
    body.initializer.append(numpy_helper.from_array(np.array([0, 2, 3]), "axes/image"))
    means = [observe("ReduceMean", [name, "axes/image"], f"{name}/mean", keepdims=0) for name in convolved]
    run = open_graph(observed)
    found = [run(batch, [*lows, *highs, *means, *sizes]) for batch in batches]
    average = [np.mean([one[i] for one in found], axis=0) for i in range(len(found[0]))]
    named = dict(zip([*lows, *highs, *means, *sizes], average, strict=True))
    return Calibration(
        {name: (float(named[low]), float(named[high])) for name, low, high in zip(ranged, lows, highs, strict=True)},
        {name: named[mean] for name, mean in zip(convolved, means, strict=True)},
        {node.name: _cost(node, plan.weights[node.input[1]], named) for node in layers},
    )


def quantize_layers(graph: onnx.ModelProto, chosen: Collection[str], calibration: Calibration) -> onnx.ModelProto:
    """The graph with the layers named in `chosen` in 8 bits, and what lies between such convolutions."""
    return _Quantizer(graph, _Plan(graph, chosen), calibration).run()


def open_graph(graph: onnx.ModelProto) -> Callable[..., list[np.ndarray]]:
    """A function (batch, names of outputs, other inputs) -> arrays, in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    first = graph.graph.input[0].name

    def run(batch: np.ndarray, names: Sequence[str], others: dict[str, np.ndarray] | None = None) -> list[np.ndarray]:
        return session.run(list(names), {first: batch, **(others or {})})

    return run


def _cost(node: onnx.NodeProto, weight: TensorProto, named: dict[str, np.ndarray]) -> float:
    """What a layer costs, in multiplications: those it makes, and those in whose time its values are moved."""
    given, made = (float(named[f"{name}/size"]) for name in (node.input[0], node.output[0]))
    each = float(np.prod(weight.dims[1:])) if node.op_type == "Conv" else float(weight.dims[0])
    return made * each + MOVED * (given + made)


class _Plan:
    """Who reads what in a graph, and which tensors are wanted in 8 bits where the layers `chosen` are."""

    def __init__(self, graph: onnx.ModelProto, chosen: Collection[str]) -> None:
        self.chosen = set(chosen)
        self.weights = {tensor.name: tensor for tensor in graph.graph.initializer}
        self.readers: dict[str, list[onnx.NodeProto]] = collections.defaultdict(list)
        for node in graph.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        ends = {value.name for value in graph.graph.output}
        self.joined: dict[str, str] = {}  # convolution -> the activation that becomes a part of it
        self.wanted: set[str] = set()  # what convolutions read, directly or through nodes of `BETWEEN`
        self.outputs: list[str] = []  # that may become 8-bit values
        for node in reversed(graph.graph.node):
            if node.op_type == "Conv" and node.name in self.chosen:
                self.wanted.add(node.input[0])
                readers = self.readers[node.output[0]]
                is_joined = len(readers) == 1 and readers[0].op_type in JOINED and node.output[0] not in ends
                last = readers[0] if is_joined else node
                if is_joined:
                    self.joined[node.name] = last.name
                self.outputs.append(last.output[0])
            elif node.op_type in BETWEEN and node.output[0] in self.wanted and not self._has_weights(node):
                self.wanted.update(self.values(node))
                self.outputs.append(node.output[0])

    def values(self, node: onnx.NodeProto) -> list[str]:
        """What a node of `BETWEEN` reads of the picture."""
        return list(node.input[:1] if node.op_type in SAME_SCALE else node.input)

    def _has_weights(self, node: onnx.NodeProto) -> bool:
        return any(name in self.weights for name in self.values(node))


class _Quantizer:
    """A graph, written anew from front to back."""

    def __init__(self, graph: onnx.ModelProto, plan: _Plan, calibration: Calibration) -> None:
        self.graph, self.plan, self.calibration = graph, plan, calibration
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.scales: dict[str, tuple[np.float32, np.uint8]] = {}
        self.replaced: dict[str, str] = {}  # a tensor -> its form that has been through 8 bits

    def run(self) -> onnx.ModelProto:
        activations = set(self.plan.joined.values())
        for node in self.graph.graph.node:
            made = onnx.NodeProto()
            made.CopyFrom(node)
            if node.name in self.plan.chosen:
                self._layer(made)
                if node.op_type == "Conv" and node.name not in self.plan.joined:
                    self._through_8_bits(node.output[0])
                continue
            is_activation = node.name in activations
            if not is_activation:
                made.input[:] = [self.replaced.get(name, name) for name in node.input]
            self.nodes.append(made)
            is_between = node.op_type in BETWEEN and node.output[0] in self.plan.wanted
            if is_activation:
                self._through_8_bits(node.output[0])
            elif is_between and all(name in self.replaced for name in self.plan.values(node)):
                self._through_8_bits(node.output[0], node.input[0] if node.op_type in SAME_SCALE else None)
        return self._whole()

    def _whole(self) -> onnx.ModelProto:
        whole = onnx.ModelProto()
        whole.CopyFrom(self.graph)
        body = whole.graph
        ends = {value.name for value in body.output}
        assert not ends & set(self.replaced)  # they are made by Identity
        read = {name for node in self.nodes for name in node.input}
        constants = [tensor for tensor in [*body.initializer, *self.constants.values()] if tensor.name in read]
        del body.node[:], body.initializer[:]
        body.node.extend(self.nodes)
        body.initializer.extend(constants)
        return whole

    def _constant(self, name: str, array: Any) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def _through_8_bits(self, name: str, like: str | None = None) -> str:
        """The name of the tensor rounded to 8 bits, with the scale of `like` (None: its own)."""
        if name not in self.replaced:
            self.scales[name] = scale, zero = self.scales[like] if like else self._scale(name)
            constants = [self._constant(f"{name}/scale", scale), self._constant(f"{name}/zero", zero)]
            self._node("QuantizeLinear", [name, *constants], f"{name}/8bit")
            self.replaced[name] = self._node("DequantizeLinear", [f"{name}/8bit", *constants], f"{name}/rounded")
        return self.replaced[name]

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **attributes))
        return output

    def _scale(self, name: str) -> tuple[np.float32, np.uint8]:
        low, high = self.calibration.ranges[name]
        low, high = min(low, 0.0), max(high, 0.0)  # 0 is a value of its own
        scale = np.float32(max((high - low) / LEVELS, LEAST_SCALE))
        return scale, np.uint8(np.clip(np.rint(-low / scale), 0, LEVELS))

    def _layer(self, node: onnx.NodeProto) -> None:
        """Append a layer with 8-bit input and weights; its bias makes up for what rounding weights shifts on average.

        Without that 0.95 of the detections of N were found again with all layers in 8 bits, with it 0.97.
        """
        given, weight = node.input[0], numpy_helper.to_array(self.plan.weights[node.input[1]]).astype(np.float32)
        node.input[0] = self._through_8_bits(given)
        axis = 0 if node.op_type == "Conv" else weight.ndim - 1
        along = [-1 if i == axis else 1 for i in range(weight.ndim)]
        others = tuple(i for i in range(weight.ndim) if i != axis)
        scale = np.maximum(np.abs(weight).max(axis=others) / LARGEST_WEIGHT, LEAST_SCALE).astype(np.float32)
        rounded = np.rint(weight / scale.reshape(along)).astype(np.int8)
        node.input[1] = self._integers(f"{node.name}/weight", rounded, scale, axis)
        if node.op_type == "Conv":
            error = (rounded * scale.reshape(along) - weight).sum(axis=(2, 3))  # [O, I / groups]
            mean = self.calibration.means[given].astype(np.float32)
            groups = len(mean) // error.shape[1]
            shift = -(error * mean.reshape(groups, -1).repeat(len(error) // groups, axis=0)).sum(axis=1)
            bias = shift + (numpy_helper.to_array(self.plan.weights[node.input[2]]) if len(node.input) > 2 else 0)
            bias_scale = self.scales[given][0] * scale
            limits = np.iinfo(np.int32)
            whole = np.clip(np.rint(bias / bias_scale.astype(np.float64)), limits.min, limits.max).astype(np.int32)
            node.input[2:] = [self._integers(f"{node.name}/bias", whole, bias_scale, 0)]
        self.nodes.append(node)

    def _integers(self, name: str, values: np.ndarray, scale: np.ndarray, axis: int) -> str:
        """The name of constants that are kept as integers, with a scale for each place along `axis`."""
        zero = np.zeros(scale.shape, values.dtype)
        kept = [self._constant(f"{name}/integers", values), self._constant(f"{name}/scale", scale)]
        return self._node("DequantizeLinear", [*kept, self._constant(f"{name}/zero", zero)], name, axis=axis)
