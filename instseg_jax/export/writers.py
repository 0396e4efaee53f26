"""Writing a network as a file of each format: network and weights in, one model file out.

Every file takes images [B, H, W, C] float32 in 0..1 and gives the best detections: scores [B, T], labels [B, T],
boxes_xyxy [B, T, 4] (normalised corners) and mask_logits [B, T, H/4, W/4]. Weights are inside the file: there is
nothing that could get lost or mixed up, and compilers fold what follows from them.
"""

import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from instseg_jax.files import write_bytes
from instseg_jax.inference.optimize import optimize_for_inference
from instseg_jax.inference.postprocess import select_detections
from instseg_jax.inference.runtimes import OUTPUTS, import_openvino
from instseg_jax.models.mask_rtdetr import MaskRTDETR
from instseg_jax.types import Outputs

OPSET = 21
INPUT = "images"


if TYPE_CHECKING:
    import onnx

PLATFORMS = ("cpu", "cuda")  # that a StableHLO file runs on


REQUIRED: dict[str, tuple[str, ...]] = {  # modules that write a format
    "stablehlo": (),
    "onnx": ("onnx", "onnxruntime"),
    "ort": ("onnx", "onnxruntime"),
    "openvino": ("onnx", "onnxruntime", "openvino"),
    "litert": ("tensorflow", "ai_edge_litert"),
}
EXTRAS = {"litert": "litert"}
LEAST_HALVED = 1024  # values of a weight that is stored as float16; smaller ones are not worth it
LARGEST_HALF = 65504.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of what a file takes and how much it gives."""

    batch: int
    size: int  # of the square input, in pixels
    channels: int
    num_detections: int
    dynamic_batch: bool


def write(
    path: Path,
    model: MaskRTDETR,
    variables: dict,
    shape: Shape,
    *,
    format: str,
    precision: str,
    calibration: Sequence[np.ndarray],
) -> dict[str, Any]:
    """Write the file of a format; returns what config.json is to say of it: inputs, outputs, opset and the like.

    `precision` is "", half or int8; `calibration` images are for int8 alone.
    """
    require(format)
    if format == "stablehlo":
        return write_stablehlo(path, model, variables, shape, half=precision == "half")
    if format == "litert":
        return write_litert(path, model, variables, shape, half=precision == "half")
    import onnx

    from instseg_jax.export.writers import build_onnx

    graph = build_onnx(
        model,
        variables,
        batch=shape.batch,
        size=(shape.size, shape.size),
        num_detections=shape.num_detections,
        dynamic_batch=shape.dynamic_batch,
    )
    said = _describe_onnx(graph)
    if precision == "int8":
        graph = quantize_onnx(graph, calibration, said["inputs"][0]["name"])
    if precision:
        graph = halve_weights(graph)
    if format == "openvino":
        write_openvino(path, graph, half=precision == "half")
    elif format == "ort":
        write_ort(path, graph)
    else:
        onnx.save(graph, str(path))
    return said


def require(format: str) -> None:
    """Raise ImportError that names the extra where a library that writes the format is not installed."""
    missing = [name for name in REQUIRED[format] if not importlib.util.find_spec(name)]
    if missing:
        extras = "export,openvino" if format == "openvino" else EXTRAS.get(format, "export")
        raise ImportError(f'{format} needs {" and ".join(missing)}: pip install "instseg_jax[{extras}]"')


def write_stablehlo(path: Path, model: MaskRTDETR, variables: dict, shape: Shape, *, half: bool) -> dict[str, Any]:
    """Write StableHLO by `jax.export`; runs with jax alone on the CPU and with CUDA. `half`: in bfloat16."""
    detect = make_detect(model, variables, shape.num_detections, dtype=jnp.bfloat16 if half else None)
    batch = jax.export.symbolic_shape("b")[0] if shape.dynamic_batch else shape.batch
    images = jax.ShapeDtypeStruct((batch, shape.size, shape.size, shape.channels), jnp.float32)
    exported = jax.export.export(jax.jit(detect), platforms=PLATFORMS)(images)
    write_bytes(path, bytes(exported.serialize()))
    outputs = [(name, aval.shape, aval.dtype) for name, aval in zip(OUTPUTS, exported.out_avals, strict=True)]
    return {
        "inputs": [_describe("images", images.shape, images.dtype)],
        "outputs": [_describe(*output) for output in outputs],
        "platforms": list(PLATFORMS),
        "calling_convention": exported.calling_convention_version,
    }


def make_detect(
    model: MaskRTDETR, variables: dict, num_detections: int, *, dtype: Any = None
) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """A function from images to the arrays of OUTPUTS, weights inside; with a dtype they are kept and used in it."""
    if dtype is not None:
        model = model.clone(dtype=dtype)
    model, variables = optimize_for_inference(model, variables)
    variables = jax.tree.map(lambda x: np.asarray(x, dtype or jnp.float32), variables)

    def detect(images: jax.Array) -> tuple[jax.Array, ...]:
        # Weights that are kept in fewer bits are float32 for the network, which casts where it may.
        restored = jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float32), variables)
        outputs = cast(Outputs, model.apply(restored, images))
        found = select_detections(outputs, num_detections=num_detections)
        return tuple(getattr(found, name).astype(_TYPES[name]) for name in OUTPUTS)

    return detect


_TYPES = {"scores": jnp.float32, "labels": jnp.int32, "boxes_xyxy": jnp.float32, "mask_logits": jnp.float32}


def write_litert(path: Path, model: MaskRTDETR, variables: dict, shape: Shape, *, half: bool) -> dict[str, Any]:
    """Write LiteRT's format (TFLite); `half` stores float16."""
    from instseg_jax.export.litert import INPUT, convert_to_litert

    detect = make_detect(model, variables, shape.num_detections)
    sides = (shape.batch, shape.size, shape.size, shape.channels)
    write_bytes(path, convert_to_litert(lambda x: dict(zip(OUTPUTS, detect(x), strict=True)), sides, half=half))
    found = jax.eval_shape(detect, jax.ShapeDtypeStruct(sides, jnp.float32))
    return {
        "inputs": [_describe(INPUT, sides, jnp.float32)],
        "outputs": [_describe(name, one.shape, one.dtype) for name, one in zip(OUTPUTS, found, strict=True)],
    }


def _describe(name: str, shape: Sequence[Any], dtype: Any) -> dict[str, Any]:
    """An input or output as config.json says it; a length that is not fixed is "batch"."""
    lengths = [side if isinstance(side, int) and side > 0 else "batch" for side in shape]
    return {"name": name, "shape": lengths, "dtype": str(np.dtype(dtype))}


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

    The projections behind the last convolutions, attention, heads and selection stay float32 (stored as float16).
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
            nodes_to_exclude=last_convolutions(graph),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"CalibMovingAverage": True},  # extremes of single images would widen the ranges
        )
        return onnx.load(str(quantized))


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


def write_ort(path: Path, graph: "onnx.ModelProto") -> None:
    """Write ONNX Runtime's own format, which its builds for phones read: optimised, but for no processor of its own."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def write_openvino(path: Path, graph: "onnx.ModelProto", *, half: bool) -> None:
    """Write OpenVINO's format from an ONNX graph; `half` stores float16.

    8-bit graphs come quantized: NNCF's own quantization takes in more than convolutions, and cost 0.056 AP where this
    one costs 0.007 (N, facades).
    """
    import onnx

    openvino = import_openvino()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.onnx"
        onnx.save(graph, str(plain))
        network = openvino.Core().read_model(str(plain))
        openvino.save_model(network, str(path), compress_to_fp16=half)


def _describe_onnx(graph: "onnx.ModelProto") -> dict[str, Any]:
    from onnx import helper

    def sides(value: "onnx.ValueInfoProto") -> list[Any]:
        return [side.dim_value or side.dim_param for side in value.type.tensor_type.shape.dim]

    def described(value: "onnx.ValueInfoProto") -> dict[str, Any]:
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        return _describe(value.name, sides(value), dtype)

    return {
        "inputs": [described(value) for value in graph.graph.input],
        "outputs": [described(value) for value in graph.graph.output],
        "opset": {entry.domain or "ai.onnx": entry.version for entry in graph.opset_import},
    }


def build_onnx(
    model: Any,
    variables: dict,
    *,
    batch: int,
    size: tuple[int, int],
    num_detections: int,
    dynamic_batch: bool = False,
) -> "onnx.ModelProto":
    """Export a network (as trained, or optimised already) with `select_detections` behind it.

    `size` is (height, width) of the images, multiples of 32. With `dynamic_batch` the graph takes any number of
    images, and `batch` is ignored. Weights are inside the graph.

    Raises: ImportError that names the extra where onnx is missing.
    """
    try:
        from instseg_jax.export.onnx_translate import translate
    except ImportError as error:
        raise ImportError('ONNX files are made with onnx: pip install "instseg_jax[export]".') from error
    if isinstance(model, MaskRTDETR):
        model = model.clone(dtype=None)  # half precision is for the runtime to choose
    model, variables = optimize_for_inference(model, variables)
    variables = jax.tree.map(jnp.asarray, variables)

    def detect(images: jax.Array) -> tuple[jax.Array, ...]:
        found = select_detections(model.apply(variables, images), num_detections=num_detections)
        return tuple(getattr(found, name) for name in OUTPUTS)

    channels = variables["params"]["backbone"]["stem"]["stem1"]["conv"]["kernel"].shape[2]
    shape = (None if dynamic_batch else batch, *size, channels)
    return translate(detect, shape, input_name=INPUT, output_names=OUTPUTS, opset=OPSET)
