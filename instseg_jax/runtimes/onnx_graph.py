"""What an ONNX graph is built of: values with the order of their axes, nodes, initializers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Order = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Value:
    """An array: a constant (in JAX's order), or the output of a node.

    `shape` is that of JAX, with 1 where broadcasting is still to come. Stored axis i is JAX's axis `order[i]`.
    """

    shape: tuple
    order: Order
    name: str = ""
    constant: np.ndarray | None = None

    @property
    def stored_shape(self) -> tuple:
        return tuple(self.shape[axis] for axis in self.order)


class Graph:
    """Nodes and initializers as they come. `batch`: name of [1] int64, the number of images, where it is not fixed.

    `layer` says in which layer of the network we are; convolutions and matrix products keep it as their `doc_string`.
    """

    def __init__(self) -> None:
        self.layer = ""
        self.nodes: list[onnx.NodeProto] = []
        self.made_by: dict[str, onnx.NodeProto] = {}
        self.initializers: dict[tuple, onnx.TensorProto] = {}
        self.batch: tuple[Any, str] | None = None  # (the symbol, the name of its value)

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; its output's name, or a list of them."""
        stem = f"{kind.lower()}_{len(self.nodes)}"
        names = [stem] if outputs == 1 else [f"{stem}_{i}" for i in range(outputs)]
        made = helper.make_node(kind, list(inputs), names, name=stem, **attributes)
        if kind in ("Conv", "MatMul"):
            made.doc_string = self.layer
        self.nodes.append(made)
        self.made_by |= dict.fromkeys(names, made)
        return names[0] if outputs == 1 else names

    def constant(self, array: Any, dtype: Any = None) -> str:
        """The name of an initializer with these numbers."""
        array = np.asarray(array, dtype)
        array = np.ascontiguousarray(array).reshape(array.shape)
        key = array.shape, array.dtype.str, array.tobytes()
        if key not in self.initializers:
            self.initializers[key] = numpy_helper.from_array(array, f"constant_{len(self.initializers)}")
        return self.initializers[key].name

    def integers(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def sizes(self, shape: Sequence) -> str:
        """A shape as a tensor, whose sides may hang on the number of images."""
        if not any(is_symbolic(n) for n in shape):
            return self.integers(*shape)
        return self.node("Concat", *(self.size(n) for n in shape), axis=0)

    def size(self, n: Any) -> str:
        """One side of a shape as a tensor [1]."""
        if not is_symbolic(n):
            return self.integers(n)
        assert self.batch is not None
        symbol, name = self.batch
        factor = int(n // symbol)
        return name if factor == 1 else self.node("Mul", name, self.integers(factor))

    # --- a value in the form that an operator needs ---

    def stored(self, x: Value, order: Order | None = None) -> str:
        """The name of a value whose axes are stored in `order` (None: JAX's)."""
        order = tuple(range(len(x.shape))) if order is None else order
        if x.constant is not None:
            return self.constant(x.constant.transpose(order))
        if x.order == order:
            return x.name
        return self.node("Transpose", x.name, perm=[x.order.index(axis) for axis in order])

    def full(self, x: Value, shape: Sequence) -> Value:
        """The value with all its broadcasting done, up to `shape`."""
        if tuple(x.shape) == tuple(shape):
            return x
        if x.constant is not None and not any(is_symbolic(n) for n in shape):
            return constant_value(np.broadcast_to(x.constant, shape))
        x = Value(x.shape, tuple(range(len(shape))), self.stored(x))
        return Value(tuple(shape), x.order, self.node("Expand", x.name, self.sizes(shape)))


def is_symbolic(n: Any) -> bool:
    return not isinstance(n, (int, np.integer))


def constant_value(array: Any) -> Value:
    array = np.asarray(array)
    return Value(array.shape, tuple(range(array.ndim)), constant=array)


def onnx_type(dtype: Any) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
