"""The operators of `onnx_translate.py`: how primitives of JAX, and functions that it calls by name, become ONNX nodes.

Each takes the graph, JAX's equation and its inputs as values, and gives a value or a list of them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from instseg_jax.models.linear import NORM_EPS
from instseg_jax.runtimes.onnx_graph import Graph, Order, Value, constant_value, is_symbolic, onnx_type

CHANNELS_FIRST = (0, 3, 1, 2)


def _common_order(inputs: Sequence[Value]) -> Order:
    """In which order to join values: that of a convolution's output, where there is one."""
    rank = max(len(x.shape) for x in inputs)
    orders = [x.order for x in inputs if x.constant is None and len(x.shape) == rank]
    plain = tuple(range(rank))
    return next((order for order in orders if order != plain), plain)


def _common_shape(inputs: Sequence[Value]) -> tuple:
    """What values broadcast to."""
    rank = max(len(x.shape) for x in inputs)
    shapes = [x.shape for x in inputs if len(x.shape) == rank]
    return tuple(next((n for n in sides if is_symbolic(n) or n != 1), 1) for sides in zip(*shapes, strict=True))


def _elementwise(kind: str) -> Callable:
    def translate_it(graph: Graph, equation: Any, *inputs: Value) -> Value:
        order = _common_order(inputs)
        names = [graph.stored(x, order if x.shape else ()) for x in inputs]
        return Value(_common_shape(inputs), order, graph.node(kind, *names))

    return translate_it


def _add(graph: Graph, equation: Any, a: Value, b: Value) -> Value:
    """A sum; the bias of a convolution becomes a part of it."""
    for x, bias in ((a, b), (b, a)):
        made = graph.made_by.get(x.name)
        if bias.constant is None or made is None or made.op_type != "Conv" or len(made.input) > 2:
            continue
        channel = x.order[1]
        if bias.constant.size == x.shape[channel] == (bias.shape or (0,) * (channel + 1))[channel]:
            whole = graph.node("Conv", *made.input, graph.constant(bias.constant.reshape(-1)))
            graph.made_by[whole].attribute.extend(made.attribute)
            graph.made_by[whole].doc_string = made.doc_string
            return Value(x.shape, x.order, whole)
    return _elementwise("Add")(graph, equation, a, b)


def _square(graph: Graph, equation: Any, x: Value) -> Value:
    return Value(x.shape, x.order, graph.node("Mul", x.name, x.name))


def _rsqrt(graph: Graph, equation: Any, x: Value) -> Value:
    return Value(x.shape, x.order, graph.node("Reciprocal", graph.node("Sqrt", x.name)))


def _erfc(graph: Graph, equation: Any, x: Value) -> Value:
    one = graph.constant(1, equation.invars[0].aval.dtype)
    return Value(x.shape, x.order, graph.node("Sub", one, graph.node("Erf", x.name)))


def _not_equal(graph: Graph, equation: Any, a: Value, b: Value) -> Value:
    same = _elementwise("Equal")(graph, equation, a, b)
    return Value(same.shape, same.order, graph.node("Not", same.name))


def _remainder(graph: Graph, equation: Any, a: Value, b: Value) -> Value:
    found = _elementwise("Mod")(graph, equation, a, b)
    graph.made_by[found.name].attribute.append(helper.make_attribute("fmod", 1))  # the sign of C, as JAX has it
    return found


def _convert(graph: Graph, equation: Any, x: Value) -> Value:
    target = equation.params["new_dtype"]
    if equation.invars[0].aval.dtype == target:
        return x
    return Value(x.shape, x.order, graph.node("Cast", x.name, to=onnx_type(target)))


def _select(graph: Graph, equation: Any, which: Value, if_false: Value, if_true: Value) -> Value:
    if which.constant is not None and not which.shape:
        return if_true if which.constant else if_false
    return _elementwise("Where")(graph, equation, which, if_true, if_false)


def _clamp(graph: Graph, equation: Any, low: Value, x: Value, high: Value) -> Value:
    return _min(graph, equation, _elementwise("Max")(graph, equation, x, low), high)


def _min(graph: Graph, equation: Any, a: Value, b: Value) -> Value:
    """The smaller; with a larger before it, both of a number, it is one operator, which runtimes join to convolutions.

    Max and Min of ReLU6 took a fifth of the time of N at 640 px.
    """
    for x, high in ((a, b), (b, a)):
        made = graph.made_by.get(x.name)
        if made is None or made.op_type != "Max" or high.constant is None or high.shape:
            continue
        numbers = {tensor.name for tensor in graph.initializers.values() if not tensor.dims}
        rest = [name for name in made.input if name not in numbers]
        if len(rest) == 1:
            (low,) = set(made.input) - set(rest)
            return Value(x.shape, x.order, graph.node("Clip", *rest, low, graph.constant(high.constant)))
    return _elementwise("Min")(graph, equation, a, b)


def _integer_pow(graph: Graph, equation: Any, x: Value) -> Value:
    power = graph.constant(equation.params["y"], equation.invars[0].aval.dtype)
    return Value(x.shape, x.order, graph.node("Pow", x.name, power))


# --- shapes ---------------------------------------------------------------------------------------


def broadcast_in_dim(graph: Graph, equation: Any, x: Value) -> Value:
    """New axes of length 1; what broadcasting is left to do is for the user of the value."""
    rank, places = len(equation.outvars[0].aval.shape), equation.params["broadcast_dimensions"]
    shape: list[Any] = [1] * rank
    for n, place in zip(x.shape, places, strict=True):
        shape[place] = n
    if x.constant is not None:
        return constant_value(x.constant.reshape(shape))
    new = [axis for axis in range(rank) if axis not in places]
    if not new:
        return x
    order = tuple(range(rank))
    return Value(tuple(shape), order, graph.node("Unsqueeze", graph.stored(x), graph.integers(*new)))


def _reshape(graph: Graph, equation: Any, x: Value) -> Value:
    return _to_shape(graph, graph.full(x, equation.invars[0].aval.shape), equation.params["new_sizes"])


def _to_shape(graph: Graph, x: Value, shape: Sequence) -> Value:
    if tuple(x.shape) == tuple(shape):
        return x
    if sum(map(is_symbolic, shape)) <= 1:
        sizes = graph.integers(*(-1 if is_symbolic(n) else n for n in shape))
    else:
        sizes = graph.sizes(shape)
    return Value(tuple(shape), tuple(range(len(shape))), graph.node("Reshape", graph.stored(x), sizes))


def _squeeze(graph: Graph, equation: Any, x: Value) -> Value:
    gone = {axis % len(x.shape) for axis in equation.params["dimensions"]}
    kept = [axis for axis in range(len(x.shape)) if axis not in gone]
    name = graph.node("Squeeze", x.name, graph.integers(*(x.order.index(axis) for axis in sorted(gone))))
    return Value(tuple(x.shape[a] for a in kept), tuple(kept.index(a) for a in x.order if a in kept), name)


def _transpose(graph: Graph, equation: Any, x: Value) -> Value:
    permutation = equation.params["permutation"]
    return Value(tuple(x.shape[a] for a in permutation), tuple(permutation.index(a) for a in x.order), x.name)


def _slice(graph: Graph, equation: Any, x: Value) -> Value:
    x, params = graph.full(x, equation.invars[0].aval.shape), equation.params
    steps = params["strides"] or (1,) * len(x.shape)
    cuts = [
        (x.order.index(axis), start, limit, step)
        for axis, (start, limit, step) in enumerate(
            zip(params["start_indices"], params["limit_indices"], steps, strict=True)
        )
        if (start, limit, step) != (0, x.shape[axis], 1)
    ]
    if not cuts:
        return x
    axes, starts, limits, steps = zip(*cuts, strict=True)
    names = [graph.integers(*numbers) for numbers in (starts, limits, axes, steps)]
    return Value(equation.outvars[0].aval.shape, x.order, graph.node("Slice", x.name, *names))


def _cut(
    graph: Graph, x: Value, starts: dict[int, int], sizes: Sequence, gone: Sequence[int], shape: Sequence
) -> Value:
    """Part of an array: from `starts` by axis, `sizes` long; then without the axes `gone`, of length 1."""
    axes = [axis for axis in starts if (starts[axis], sizes[axis]) != (0, x.shape[axis])]
    name = x.name
    if axes:
        limits = [starts[axis] + sizes[axis] for axis in axes]
        places = graph.integers(*(x.order.index(axis) for axis in axes))
        name = graph.node("Slice", name, graph.integers(*(starts[a] for a in axes)), graph.integers(*limits), places)
    if not gone:
        return Value(tuple(shape), x.order, name)
    kept = [axis for axis in range(len(x.shape)) if axis not in gone]
    name = graph.node("Squeeze", name, graph.integers(*(x.order.index(axis) for axis in gone)))
    return Value(tuple(shape), tuple(kept.index(axis) for axis in x.order if axis in kept), name)


def _dynamic_slice(graph: Graph, equation: Any, x: Value, *starts: Value) -> Value:
    """Where its start is known, as it is once symbols for the number of images have been followed."""
    if any(start.constant is None for start in starts):
        raise NotImplementedError(f"only slices from known places have an ONNX form here: {equation}")
    x, sizes = graph.full(x, equation.invars[0].aval.shape), equation.params["slice_sizes"]
    whole = {axis: int(start.constant) for axis, start in enumerate(starts) if not is_symbolic(x.shape[axis])}  # type: ignore[arg-type]
    firsts = {axis: 0 for axis, n in enumerate(x.shape) if is_symbolic(n)}
    return _cut(graph, x, whole | firsts, sizes, (), equation.outvars[0].aval.shape)


def _dim_as_value(graph: Graph, equation: Any) -> Value:
    size = graph.node("Squeeze", graph.size(equation.params["dim"]))
    return Value((), (), graph.node("Cast", size, to=onnx_type(equation.outvars[0].aval.dtype)))


def _reverse(graph: Graph, equation: Any, x: Value) -> Value:
    axes = [x.order.index(axis) for axis in equation.params["dimensions"]]
    lowest = np.iinfo(np.int64).min
    names = [graph.integers(*[n] * len(axes)) for n in (-1, lowest)]
    name = graph.node("Slice", x.name, *names, graph.integers(*axes), graph.integers(*[-1] * len(axes)))
    return Value(x.shape, x.order, name)


def _concatenate(graph: Graph, equation: Any, *inputs: Value) -> Value:
    whole = [graph.full(x, atom.aval.shape) for x, atom in zip(inputs, equation.invars, strict=True)]
    order, axis = _common_order(whole), equation.params["dimension"]
    name = graph.node("Concat", *(graph.stored(x, order) for x in whole), axis=order.index(axis))
    return Value(equation.outvars[0].aval.shape, order, name)


def _stack(graph: Graph, equation: Any, *inputs: Value) -> Value:
    axis, place = equation.params["axis"], graph.integers(equation.params["axis"])
    whole = [graph.stored(graph.full(x, atom.aval.shape)) for x, atom in zip(inputs, equation.invars, strict=True)]
    name = graph.node("Concat", *(graph.node("Unsqueeze", part, place) for part in whole), axis=axis)
    shape = equation.outvars[0].aval.shape
    return Value(shape, tuple(range(len(shape))), name)


def _split(graph: Graph, equation: Any, x: Value) -> list[Value]:
    x, axis, sizes = graph.full(x, equation.invars[0].aval.shape), equation.params["axis"], equation.params["sizes"]
    names = graph.node("Split", x.name, graph.integers(*sizes), outputs=len(sizes), axis=x.order.index(axis))
    return [Value(out.aval.shape, x.order, name) for out, name in zip(equation.outvars, names, strict=True)]


def _pad(graph: Graph, equation: Any, x: Value, fill: Value) -> Value:
    x, config = graph.full(x, equation.invars[0].aval.shape), equation.params["padding_config"]
    if any(interior for _, _, interior in config):
        raise NotImplementedError("padding between elements has no ONNX form here")
    before, after, _ = zip(*(config[axis] for axis in x.order), strict=True)
    name = graph.node("Pad", x.name, graph.integers(*before, *after), graph.stored(fill))
    return Value(equation.outvars[0].aval.shape, x.order, name)


def _iota(graph: Graph, equation: Any) -> Value:
    shape, axis, dtype = equation.outvars[0].aval.shape, equation.params["dimension"], equation.params["dtype"]
    if not is_symbolic(shape[axis]):
        thin = [n if i == axis else 1 for i, n in enumerate(shape)]
        return constant_value(np.arange(shape[axis], dtype=dtype).reshape(thin))
    zero, one = (graph.constant(np.int64(n)) for n in (0, 1))
    limit = graph.node("Squeeze", graph.size(shape[axis]))
    numbers = graph.node("Cast", graph.node("Range", zero, limit, one), to=onnx_type(dtype))
    line = Value((shape[axis],), (0,), numbers)
    return _to_shape(graph, line, [n if i == axis else 1 for i, n in enumerate(shape)])


# --- reductions, choices, products ----------------------------------------------------------------


def _reduce(kind: str) -> Callable:
    def translate_it(graph: Graph, equation: Any, x: Value) -> Value:
        axes = equation.params["axes"]
        whole = [n if axis in axes else x.shape[axis] for axis, n in enumerate(equation.invars[0].aval.shape)]
        x = graph.full(x, whole)
        name = x.name
        is_boolean = equation.invars[0].aval.dtype == np.bool_
        if is_boolean:
            name = graph.node("Cast", name, to=onnx.TensorProto.UINT8)
        name = graph.node(kind, name, graph.integers(*(x.order.index(a) for a in axes)), keepdims=0)
        if is_boolean:
            name = graph.node("Cast", name, to=onnx.TensorProto.BOOL)
        kept = [axis for axis in range(len(x.shape)) if axis not in axes]
        return Value(tuple(x.shape[a] for a in kept), tuple(kept.index(a) for a in x.order if a in kept), name)

    return translate_it


def _argmax(graph: Graph, equation: Any, x: Value) -> Value:
    (axis,) = equation.params["axes"]
    x = graph.full(x, equation.invars[0].aval.shape)
    name = x.name
    if equation.invars[0].aval.dtype == np.bool_:
        name = graph.node("Cast", name, to=onnx.TensorProto.INT32)
    name = graph.node("ArgMax", name, axis=x.order.index(axis), keepdims=0)
    kept = [a for a in range(len(x.shape)) if a != axis]
    name = graph.node("Cast", name, to=onnx_type(equation.params["index_dtype"]))
    return Value(tuple(x.shape[a] for a in kept), tuple(kept.index(a) for a in x.order if a in kept), name)


def _top_k(graph: Graph, equation: Any, x: Value) -> list[Value]:
    x = graph.full(x, equation.invars[0].aval.shape)
    axis, count = equation.params.get("axis", len(x.shape) - 1), equation.params["k"]
    values, index = graph.node("TopK", graph.stored(x), graph.integers(count), outputs=2, axis=axis)
    index = graph.node("Cast", index, to=onnx_type(equation.outvars[1].aval.dtype))
    shape, order = equation.outvars[0].aval.shape, tuple(range(len(x.shape)))
    return [Value(shape, order, values), Value(shape, order, index)]


def _gather(graph: Graph, equation: Any, x: Value, index: Value) -> Value:
    """Rows along one axis; indices lie inside, as those of this network do."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    x, index = (graph.full(v, a.aval.shape) for v, a in zip((x, index), equation.invars, strict=True))
    out = equation.outvars[0].aval.shape
    if index.constant is not None and index.constant.ndim == 1:  # a slice, as JAX writes it where a side is a symbol
        starts = dict(zip(numbers.start_index_map, map(int, index.constant), strict=True))
        return _cut(graph, x, starts, sizes, numbers.collapsed_slice_dims, out)
    (axis,) = numbers.start_index_map
    batching = numbers.operand_batching_dims
    whole = [n for a, n in enumerate(x.shape) if a != axis and a not in batching]
    if (
        numbers.collapsed_slice_dims != (axis,)
        or [n for a, n in enumerate(sizes) if a != axis and a not in batching] != whole
    ):
        raise NotImplementedError(f"only whole rows can be gathered: {equation}")
    offset = list(numbers.offset_dims)
    places = [a for a in range(len(out)) if a not in offset]  # of the indices' axes
    if not batching:
        picked = _to_shape(graph, index, index.shape[:-1])
        name = graph.node("Gather", graph.stored(x), graph.stored(picked), axis=axis)
        return Value(out, (*offset[:axis], *places, *offset[axis:]), name)
    if batching != (0,) or numbers.start_indices_batching_dims != (0,) or axis != 1:
        raise NotImplementedError(f"only the first axis can be a batch when gathering: {equation}")
    wide = graph.node("Cast", graph.stored(index), to=onnx.TensorProto.INT64)
    return Value(out, (*places, *offset), graph.node("GatherND", graph.stored(x), wide, batch_dims=1))


def _dot_general(graph: Graph, equation: Any, a: Value, b: Value) -> Value:
    (contract_a, contract_b), (batch_a, batch_b) = equation.params["dimension_numbers"]
    a, b = (graph.full(v, atom.aval.shape) for v, atom in zip((a, b), equation.invars, strict=True))
    free_a, free_b = (
        [axis for axis in range(len(v.shape)) if axis not in (*contract, *batch)]
        for v, contract, batch in ((a, contract_a, batch_a), (b, contract_b, batch_b))
    )
    out = equation.outvars[0].aval.shape
    if b.constant is not None and not batch_b and contract_a == (len(a.shape) - 1,) and b.constant.ndim == 2:
        kernel = b.constant if contract_b == (0,) else b.constant.T
        if len(a.shape) == 4:  # a 1x1 convolution
            return _convolve(graph, a, kernel[None, None], 1, ((0, 0), (0, 0)), out)
        return Value(out, tuple(range(len(out))), graph.node("MatMul", graph.stored(a), graph.constant(kernel)))
    batch = [a.shape[axis] for axis in batch_a]
    left = _matrices(graph, graph.stored(a, (*batch_a, *free_a, *contract_a)), batch, a, free_a, contract_a)
    right = _matrices(graph, graph.stored(b, (*batch_b, *contract_b, *free_b)), batch, b, contract_b, free_b)
    name = graph.node("MatMul", left, right)
    flat = (*batch, _product([a.shape[i] for i in free_a]), _product([b.shape[i] for i in free_b]))
    return _to_shape(graph, Value(flat, tuple(range(len(flat))), name), out)


def _matrices(graph: Graph, name: str, batch: Sequence, x: Value, rows: Sequence, columns: Sequence) -> str:
    """A stored array [*batch, *rows, *columns] as matrices [*batch, rows, columns]."""
    heights, widths = [x.shape[i] for i in rows], [x.shape[i] for i in columns]
    shape = (*batch, *heights, *widths)
    matrices = (*batch, _product(heights), _product(widths))
    return _to_shape(graph, Value(shape, tuple(range(len(shape))), name), matrices).name


def _product(sides: Sequence) -> Any:
    found: Any = 1
    for n in sides:
        found = found * n
    return found


def _conv_general_dilated(graph: Graph, equation: Any, x: Value, kernel: Value) -> Value:
    params = equation.params
    numbers = params["dimension_numbers"]
    plain = all(set(params[name]) == {1} for name in ("lhs_dilation", "rhs_dilation"))
    if (
        kernel.constant is None
        or not plain
        or params["feature_group_count"] != 1
        or len(set(params["window_strides"])) > 1
    ):
        raise NotImplementedError(f"this kind of convolution has no ONNX form here: {equation}")
    out, into, rows, columns = numbers.rhs_spec
    weights = kernel.constant.transpose(rows, columns, into, out)
    if numbers.lhs_spec != (0, 3, 1, 2) or numbers.out_spec != (0, 3, 1, 2):
        raise NotImplementedError(f"only convolutions over channels last have an ONNX form here: {equation}")
    return _convolve(graph, x, weights, params["window_strides"][0], params["padding"], equation.outvars[0].aval.shape)


def _convolve(
    graph: Graph, x: Value, kernel: np.ndarray, stride: int, padding: Any, shape: Sequence, group: int = 1
) -> Value:
    """A convolution of x [B, H, W, I] with a kernel [k, k, I / group, O], stored channels first."""
    (top, bottom), (left, right) = padding
    name = graph.node(
        "Conv",
        graph.stored(x, CHANNELS_FIRST),
        graph.constant(kernel.transpose(3, 2, 0, 1)),
        kernel_shape=list(kernel.shape[:2]),
        strides=[stride, stride],
        pads=[int(n) for n in (top, left, bottom, right)],
        group=group,
    )
    return Value(tuple(shape), CHANNELS_FIRST, name)


def _depthwise(graph: Graph, equation: Any, x: Value, kernel: Value) -> Value:
    """The padding is read off the program inside; it makes ceil(length / stride) of a length."""
    padding = next(e for e in _equations(equation.params["jaxpr"].jaxpr) if e.primitive.name == "pad")
    _, rows, columns, _ = padding.params["padding_config"]
    shape, (_, height, width, _) = equation.outvars[0].aval.shape, x.shape
    stride = next(n for n in (1, 2) if (-(-height // n), -(-width // n)) == tuple(shape[1:3]))
    weights = kernel.constant
    assert weights is not None
    return _convolve(graph, x, weights, stride, (rows[:2], columns[:2]), shape, group=shape[-1])


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if inner is not None:
            yield from _equations(inner.jaxpr)


# --- functions that JAX calls by name -------------------------------------------------------------


def _silu(graph: Graph, equation: Any, x: Value) -> Value:
    return Value(x.shape, x.order, graph.node("Mul", x.name, graph.node("Sigmoid", x.name)))


def _layer_norm(graph: Graph, equation: Any, x: Value, scale: Value, bias: Value) -> Value:
    names = graph.stored(x), graph.stored(scale), graph.stored(bias)
    name = graph.node("LayerNormalization", *names, axis=-1, epsilon=NORM_EPS)
    return Value(x.shape, tuple(range(len(x.shape))), name)


def _softmax(graph: Graph, equation: Any, x: Value) -> Value:
    x = graph.full(x, equation.invars[0].aval.shape)
    return Value(x.shape, x.order, graph.node("Softmax", x.name, axis=x.order.index(len(x.shape) - 1)))


def _attend(graph: Graph, equation: Any, q: Value, k: Value, v: Value) -> Value:
    """Attention of [B, T, heads, D] values, in the form that runtimes look for."""
    scale = graph.constant(q.shape[3] ** -0.5, np.float32)
    left, right, values = graph.stored(q, (0, 2, 1, 3)), graph.stored(k, (0, 2, 3, 1)), graph.stored(v, (0, 2, 1, 3))
    scores = graph.node("MatMul", graph.node("Mul", left, scale), right)
    found = graph.node("MatMul", graph.node("Softmax", scores, axis=-1), values)
    return Value(q.shape, (0, 2, 1, 3), found)


def _weighted_rows(graph: Graph, equation: Any, rows: Value, index: Value, share: Value) -> Value:
    shape, last = equation.outvars[0].aval.shape, len(index.shape) - 1
    samples = graph.node("Gather", graph.stored(rows), graph.stored(index), axis=0)
    shares = graph.node("Unsqueeze", graph.stored(share), graph.integers(last))
    product = graph.node("MatMul", shares, samples)
    return Value(shape, tuple(range(len(shape))), graph.node("Squeeze", product, graph.integers(last)))


def _resize(**attributes: Any) -> Callable:
    def translate_it(graph: Graph, equation: Any, x: Value) -> Value:
        factors = graph.constant(np.array([1, 1, 2, 2], np.float32))
        name = graph.node("Resize", graph.stored(x, CHANNELS_FIRST), "", factors, **attributes)
        return Value(equation.outvars[0].aval.shape, CHANNELS_FIRST, name)

    return translate_it


def _max_pool(graph: Graph, equation: Any, x: Value) -> Value:
    pads = [0, 0, 1, 1]
    name = graph.node("MaxPool", graph.stored(x, CHANNELS_FIRST), kernel_shape=[2, 2], strides=[1, 1], pads=pads)
    return Value(x.shape, CHANNELS_FIRST, name)


NAMED: dict[str, Callable[..., Value]] = {
    "relu": _elementwise("Relu"),
    "silu": _silu,
    "gelu": _elementwise("Gelu"),
    "softmax": _softmax,
    "attend": _attend,
    "weighted_rows": _weighted_rows,
    "layer_norm": _layer_norm,
    "depthwise_conv": _depthwise,
    "max_pool_2x2_same": _max_pool,
    "upsample_bilinear_2x": _resize(mode="linear", coordinate_transformation_mode="half_pixel"),
    "upsample_nearest_2x": _resize(mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
}

PRIMITIVES: dict[str, Any] = {
    "add": _add,
    "square": _square,
    "rsqrt": _rsqrt,
    "erfc": _erfc,
    "ne": _not_equal,
    "rem": _remainder,
    "convert_element_type": _convert,
    "select_n": _select,
    "clamp": _clamp,
    "min": _min,
    "integer_pow": _integer_pow,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "slice": _slice,
    "rev": _reverse,
    "concatenate": _concatenate,
    "stack": _stack,
    "split": _split,
    "pad": _pad,
    "iota": _iota,
    "dim_as_value": _dim_as_value,
    "dynamic_slice": _dynamic_slice,
    "argmax": _argmax,
    "top_k": _top_k,
    "gather": _gather,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv_general_dilated,
} | {
    name: _elementwise(kind)
    for name, kind in {
        "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "neg": "Neg", "exp": "Exp", "log": "Log",
        "floor": "Floor", "sqrt": "Sqrt", "abs": "Abs", "sign": "Sign", "logistic": "Sigmoid", "tanh": "Tanh",
        "erf": "Erf", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual", "eq": "Equal",
        "not": "Not", "and": "And", "or": "Or",
    }.items()
} | {
    name: _reduce(kind)
    for name, kind in {
        "reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_prod": "ReduceProd",
        "reduce_and": "ReduceMin", "reduce_or": "ReduceMax",
    }.items()
}  # fmt: skip
