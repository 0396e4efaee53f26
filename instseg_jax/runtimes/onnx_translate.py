"""From a function in JAX to an ONNX graph, primitive by primitive: what this network needs, in the form runtimes like.

Runtimes want convolutions over channels first and operators that they know whole, such as a layer norm; the network is
written over channels last, and in JAX a layer norm is ten primitives. So here

- a value remembers the order in which its axes are stored: transposing costs nothing until something needs another
  order, and from convolution to convolution nothing does;
- broadcasting is left to the operator that uses the value;
- functions of `models/attention.py` that JAX calls by their name (`NAMED`) become one operator;
- what hangs on weights alone is computed here.

What is not known raises `NotImplementedError` that names it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from jax.extend import core
from onnx import helper

from instseg_jax.runtimes.onnx_graph import Graph, Value, constant_value, is_symbolic, onnx_type
from instseg_jax.runtimes.onnx_operators import NAMED, PRIMITIVES, broadcast_in_dim


def translate(
    function: Callable, shape: Sequence[int | None], *, input_name: str, output_names: Sequence[str], opset: int
) -> onnx.ModelProto:
    """The ONNX model of `function(images) -> arrays`, images float32 of `shape`, the first side None: any number."""
    graph = Graph()
    sides: list[Any] = list(shape)
    dims: list[Any] = list(shape)
    if shape[0] is None:
        (sides[0],) = jax.export.symbolic_shape("batch")
        dims[0] = "batch"
    closed, outputs = jax.make_jaxpr(function, return_shape=True)(jax.ShapeDtypeStruct(tuple(sides), np.float32))
    if shape[0] is None:
        whole = graph.node("Shape", input_name, start=0, end=1)
        graph.batch = sides[0], whole
    images = Value(tuple(sides), tuple(range(len(sides))), input_name)
    results = _run(graph, closed.jaxpr, closed.consts, [images])
    infos = []
    for name, value, aval in zip(output_names, results, outputs, strict=True):
        made = graph.stored(graph.full(value, aval.shape))
        graph.nodes.append(helper.make_node("Identity", [made], [name], name=f"output_{name}"))
        side = [str(n) if is_symbolic(n) else int(n) for n in aval.shape]
        infos.append(helper.make_tensor_value_info(name, onnx_type(aval.dtype), side))
    nodes = _live(graph.nodes, output_names)
    read = {name for node in nodes for name in node.input}
    body = helper.make_graph(
        nodes,
        "mask_rtdetr",
        [helper.make_tensor_value_info(input_name, onnx.TensorProto.FLOAT, dims)],
        infos,
        [tensor for tensor in graph.initializers.values() if tensor.name in read],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], producer_name="instseg_jax")
    model.ir_version = min(model.ir_version, 10)  # of opset 21; onnx writes the newest otherwise
    return model


def _live(nodes: list[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes that outputs depend on."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    return kept[::-1]


# --- walking through a jaxpr ----------------------------------------------------------------------


def _run(graph: Graph, jaxpr: Any, constants: Sequence, arguments: list[Value]) -> list[Value]:
    values: dict[Any, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
    for variable, array in zip(jaxpr.constvars, constants, strict=True):
        values[variable] = constant_value(np.asarray(array, variable.aval.dtype))

    def read(atom: Any) -> Value:
        if not isinstance(atom, core.Literal):
            return values[atom]
        aval: Any = atom.aval  # JAX's types know no dtype of an abstract value
        return constant_value(np.asarray(atom.val, aval.dtype))

    for equation in jaxpr.eqns:
        graph.layer = str(equation.source_info.name_stack).partition("/")[2] or graph.layer
        results = _translate(graph, equation, [read(atom) for atom in equation.invars])
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _translate(graph: Graph, equation: Any, inputs: list[Value]) -> list[Value]:
    kind, params = equation.primitive.name, equation.params
    if kind in ("stop_gradient", "copy", "copy_p", "optimization_barrier"):
        return inputs
    if kind == "broadcast_in_dim":  # a constant too stays as small as it is
        return [broadcast_in_dim(graph, equation, inputs[0])]
    is_constant = all(x.constant is not None for x in inputs) and not _has_symbols(equation)
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if inner is not None:
        whole = None if is_constant else NAMED.get(params.get("name", ""))
        if whole is not None:
            return [whole(graph, equation, *inputs)]
        return _run(graph, inner.jaxpr, inner.consts, inputs)
    if is_constant:
        avals = [atom.aval for atom in equation.invars]
        arrays = [np.broadcast_to(x.constant, aval.shape) for x, aval in zip(inputs, avals, strict=True)]  # type: ignore[arg-type]
        found = equation.primitive.bind(*map(jax.numpy.asarray, arrays), **params)
        return [constant_value(array) for array in (found if equation.primitive.multiple_results else [found])]
    if kind not in PRIMITIVES:
        raise NotImplementedError(f"the primitive {kind} has no ONNX form here: {equation}")
    found = PRIMITIVES[kind](graph, equation, *inputs)
    return found if isinstance(found, list) else [found]


def _has_symbols(equation: Any) -> bool:
    atoms = (*equation.invars, *equation.outvars)
    return equation.primitive.name == "dim_as_value" or any(is_symbolic(n) for a in atoms for n in a.aval.shape)
