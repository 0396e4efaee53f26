"""ONNX, by our own translator, and ONNX Runtime's own format made of it.

jax2onnx was tried first: it made 6,000 nodes of this network, in a graph that ONNX Runtime refused.
"""

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


def write_onnx(
    path: Path, make_detect: Any, shape: Shape, precision: str, calibration: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Write an ONNX file; `precision` "half" stores weights as float16, "int8" has 8-bit layers."""
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
        from instseg_jax.runtimes.quantize import quantize

        graph, description["quantization"] = quantize(graph, calibration)
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
