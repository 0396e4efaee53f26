"""ONNX, by our own translator, and ONNX Runtime's own format made of it.

jax2onnx was tried first: it made 6,000 nodes of this network, in a graph that ONNX Runtime refused.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instseg_jax.messages import quote
from instseg_jax.runtimes.shape import INPUT, OUTPUTS, Shape, describe

if TYPE_CHECKING:
    import onnx

OPSET = 21
LEAST_HALVED = 1024  # values of a weight that is stored as float16; smaller ones are not worth it
LARGEST_HALF = 65504.0
# Of the package's N an 8-bit export finds 0.66 of the detections again with none of them in float32, 0.83 with one,
# 0.95 with three (its stem and first block) and with six; its mask IoU is 0.75, 0.81, 0.87 and 0.88.
FIRST_IN_FLOAT = 3


def write_onnx(
    path: Path, make_detect: Any, shape: Shape, precision: str, calibration: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Write an ONNX file; `precision` "half" stores weights as float16, "int8" has 8-bit convolutions."""
    import onnx

    graph, description = make_graph(make_detect, shape, precision, calibration)
    onnx.save(graph, str(path))
    return description


def write_ort(
    path: Path, make_detect: Any, shape: Shape, precision: str, calibration: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Write ONNX Runtime's own format, which its builds for phones read: optimised, but for no processor of its own."""
    import onnxruntime

    graph, description = make_graph(make_detect, shape, precision, calibration)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return description


def make_graph(
    make_detect: Any, shape: Shape, precision: str, calibration: Sequence[np.ndarray]
) -> tuple["onnx.ModelProto", dict[str, Any]]:
    """The graph that an ONNX file, an ORT file or OpenVINO's is made of, and what config.json says of it."""
    graph = build_graph(make_detect(None), shape)
    description = describe_graph(graph)
    if precision == "int8":
        graph = quantize_onnx(graph, calibration, INPUT)
    if precision:
        graph = halve_weights(graph)
    return graph, description


def build_graph(detect: Callable[..., tuple[Any, ...]], shape: Shape) -> "onnx.ModelProto":
    """The graph of a function from images to the arrays of `OUTPUTS`, its weights inside.

    Raises: ImportError that names the extra where onnx is missing.
    """
    try:
        from instseg_jax.runtimes.onnx_translate import translate
    except ImportError as error:
        raise ImportError('ONNX files are made with onnx: pip install "instseg_jax[export]".') from error
    return translate(detect, shape.images, input_name=INPUT, output_names=OUTPUTS, opset=OPSET)


def halve_weights(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """The graph with its weights stored as float16; runtimes turn them to float32 once, when they load the file."""
    import onnx
    from onnx import helper, numpy_helper

    halved = onnx.ModelProto()
    halved.CopyFrom(graph)
    casts = []
    for weight in halved.graph.initializer:
        values = numpy_helper.to_array(weight)
        is_weight = values.dtype == np.float32 and values.ndim > 1 and values.size >= LEAST_HALVED
        if not is_weight or np.abs(values).max() > LARGEST_HALF:
            continue
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
        casts.append(helper.make_node("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *halved.graph.node]
    del halved.graph.node[:]
    halved.graph.node.extend(nodes)
    return halved


def quantize_onnx(graph: "onnx.ModelProto", images: Sequence[np.ndarray], input_name: str) -> "onnx.ModelProto":
    """The graph with 8-bit convolutions (QDQ, a scale for each output channel), calibrated on images [H, W, C].

    The first convolutions, the projections behind the last ones, attention, heads and selection stay float32 (stored as
    float16).
    """
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(images)

        def get_next(self) -> dict | None:
            image = next(self.images, None)
            return None if image is None else {input_name: image[None]}

    with tempfile.TemporaryDirectory() as folder:
        plain, quantized = Path(folder) / "plain.onnx", Path(folder) / "quantized.onnx"
        marked = onnx.ModelProto()
        marked.CopyFrom(graph)
        quantization.quant_utils.add_pre_process_metadata(marked)  # lean already: no advice to make it so
        onnx.save(marked, str(plain))
        quantization.quantize_static(
            str(plain),
            str(quantized),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=[*first_convolutions(graph), *last_convolutions(graph)],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"CalibMovingAverage": True},  # extremes of single images would widen the ranges
        )
        return onnx.load(str(quantized))


def first_convolutions(graph: "onnx.ModelProto") -> list[str]:
    """Names of the first convolutions, in the order of computing: those that see the picture itself."""
    return [node.name for node in graph.graph.node if node.op_type == "Conv"][:FIRST_IN_FLOAT]


def last_convolutions(graph: "onnx.ModelProto") -> list[str]:
    """Names of the convolutions with no other one behind them: prototypes of the masks and the decoder's input."""
    leads_on: set[str] = set()  # tensors from which a convolution is reached
    found = []
    for node in reversed(graph.graph.node):  # in the order of computing
        is_last = not leads_on.intersection(node.output)
        if node.op_type == "Conv" and is_last:
            found.append(node.name)
        if node.op_type == "Conv" or not is_last:
            leads_on.update(node.input)
    return found


def describe_graph(graph: "onnx.ModelProto") -> dict[str, Any]:
    """What config.json says of a graph: inputs, outputs, opset."""
    from onnx import helper

    def sides(value: "onnx.ValueInfoProto") -> list[Any]:
        return [side.dim_value or side.dim_param for side in value.type.tensor_type.shape.dim]

    def described(value: "onnx.ValueInfoProto") -> dict[str, Any]:
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        return describe(value.name, sides(value), dtype)

    return {
        "inputs": [described(value) for value in graph.graph.input],
        "outputs": [described(value) for value in graph.graph.output],
        "opset": {entry.domain or "ai.onnx": entry.version for entry in graph.opset_import},
    }


def open_onnx(path: Path, settings: Mapping[str, Any], device: str, num_threads: int | None) -> Any:
    """A function that runs an ONNX or ORT file in ONNX Runtime. Raises ValueError for a device that it lacks."""
    session = open_session(path, device, num_threads)
    name = session.get_inputs()[0].name
    return lambda images: tuple(session.run(list(OUTPUTS), {name: np.ascontiguousarray(images)}))


def open_session(path: Path, device: str, num_threads: int | None) -> Any:
    """ONNX Runtime's session for a file. Raises ValueError for a device that it lacks."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    kind, _, index = device.partition(":")
    if kind == "tpu" or (kind == "gpu" and "CUDAExecutionProvider" not in available):
        raise ValueError(f"device is {quote(device)}, but the installed onnxruntime has {', '.join(available)}")
    providers: list[Any] = ["CPUExecutionProvider"]
    if kind != "cpu" and "CUDAExecutionProvider" in available:
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(index or 0)}))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = num_threads or 0
    return onnxruntime.InferenceSession(str(path), options, providers=providers)
