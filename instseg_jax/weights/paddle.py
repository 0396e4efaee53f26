"""Read and write PaddlePaddle weight files (`.pdparams`) without PaddlePaddle.

Such a file is a pickle of {name: numpy array}. A pickle is a program, so it is not handed to `pickle`: the few
instructions that a dictionary of arrays needs are interpreted here on inert values. Admitted are exactly the globals
in `_GLOBALS`, and even those are never looked up: the array and dtype that they stand for are rebuilt from their
checked parts. Everything else is refused before anything has been done with it.

bfloat16, which Paddle stores as uint16, is read as bfloat16 and written as uint16.
Renaming and layout changes are not made here: see `names`.
"""

import dataclasses
import math
import os
import pickletools
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np

from instseg_jax.messages import first_few, quote, shorten

NAME_TABLE = "StructuredToParameterName@@"  # tensor name -> parameter name: Paddle's bookkeeping, not a tensor
BIG_TENSORS = "UnpackBigParamInfor@@"  # how tensors above 1 GiB were cut in pickles of protocol 2 and 3

_RECONSTRUCT = "numpy.core.multiarray._reconstruct"
_NDARRAY = "numpy.ndarray"
_DTYPE = "numpy.dtype"
_ENCODE = "_codecs.encode"  # protocol 2 has no bytes: they are latin-1 text, encoded on reading
_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _DTYPE,
    ("_codecs", "encode"): _ENCODE,
}
_DTYPE_CODES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
_DTYPE_STATES = tuple((3, order, None, None, None, -1, -1, 0) for order in "<>|")
_OPTIMIZER_SUFFIXES = ("_moment1_0", "_moment2_0", "_beta1_pow_acc_0", "_beta2_pow_acc_0", "_velocity_0")
_OPTIMIZER_KEYS = ("LR_Scheduler", "master_weights", "last_epoch")
# Instructions that put their argument on the stack; the text forms occur in hostile files only.
_NUMBERS = ("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "BINFLOAT", "FLOAT")
_BYTES = ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8")
_TEXTS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING", "STRING")
_MAX_INSTRUCTIONS = 300_000  # a file of 1,000 tensors has 40,000; these are read in seconds
_MAX_AXES = 32


class _Global:
    """An admitted global as it stands on the stack: its name, nothing that can be called."""

    def __init__(self, name: str):
        self.name = name


class _Dtype:
    def __init__(self, code: str):
        self.code, self.order = code, "<"


class _Array:
    """An array under construction; `value` stays None until its state has been read."""

    def __init__(self):
        self.value: np.ndarray | None = None


def read_pdparams(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the tensors of a `.pdparams` file by their official names; the arrays are read-only.

    Raises ValueError, with the word "refused" and the global's name, for a file that holds anything but arrays,
    and ValueError for a file that is no pickle, is cut short, or holds an optimizer's state.
    """
    with Path(path).open("rb") as file:
        if file.read(2) == b"PK":
            raise ValueError(f"{path} is not a PaddlePaddle weights file but a zip archive (of PyTorch or numpy?)")
        file.seek(0)
        content = _run_pickle(file, path, Path(path).stat().st_size)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no tensors by name: its content is a {type(content).__name__}")
    return _tensors(content, path)


def _tensors(content: dict[str, Any], path) -> dict[str, np.ndarray]:
    content.pop(NAME_TABLE, None)
    cut = content.pop(BIG_TENSORS, {})
    if any(name in _OPTIMIZER_KEYS or name.endswith(_OPTIMIZER_SUFFIXES) for name in content):
        raise ValueError(f"{path} holds the state of an optimizer; the weights are in the file named .pdparams")
    if not content:
        raise ValueError(f"{path} holds no tensors")
    others = [name for name, value in content.items() if not isinstance(value, _Array) or value.value is None]
    if others:
        raise ValueError(f"{path} holds {len(others)} values that are not tensors: {first_few(others)}")
    tensors = {name: array.value for name, array in content.items()}
    try:
        for name, parts in cut.items():
            joined = np.concatenate([tensors.pop(part) for part in parts["slices"]])
            tensors[name] = joined.reshape(parts["OriginShape"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: the parts named by {BIG_TENSORS} do not fit ({shorten(error)})"
        ) from error
    return {name: t.view(ml_dtypes.bfloat16) if t.dtype == np.uint16 else t for name, t in tensors.items()}


@dataclasses.dataclass
class _Machine:
    """What a pickle works on, and how many bytes its arrays and its encoded texts may still take.

    Each of both has the size of the file: a part that is there once and used a hundred times is no weights file's.
    """

    path: Any
    array_bytes: int
    text_bytes: int
    stack: list[Any] = dataclasses.field(default_factory=list)
    marks: list[int] = dataclasses.field(default_factory=list)  # heights of the stack, so that none is looked for
    memo: dict[int, Any] = dataclasses.field(default_factory=dict)


class _Clipped:
    """A file that reads no more than it has: room for a length is made before anything is read."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size
        self.readline, self.tell = file.readline, file.tell

    def read(self, count: int) -> bytes:
        """At most `count` bytes."""
        return self._file.read(min(count, self._size - self.tell()))


def _run_pickle(file: BinaryIO, path, size: int) -> Any:
    """Interpret the pickle and return its content, with `_Array` in place of arrays."""
    machine = _Machine(path, array_bytes=size, text_bytes=size)
    position: int | None = 0
    try:
        clipped: Any = _Clipped(file, size)  # all that is asked of a file here
        instructions = pickletools.genops(clipped)
        for number, (opcode, argument, position) in enumerate(instructions):  # noqa: B007 (for the error)
            if opcode.name == "STOP":
                break
            if number >= _MAX_INSTRUCTIONS:
                raise ValueError(f"more than {_MAX_INSTRUCTIONS} instructions")
            _run_instruction(opcode.name, argument, machine)
        return machine.stack.pop()
    except _Refused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, MemoryError, OverflowError) as error:
        raise ValueError(
            f"{path} is no weights file, damaged or cut short, near byte {position} ({shorten(error)})"
        ) from error


class _Refused(ValueError):
    pass


def _refuse(path, what: str) -> NoReturn:
    raise _Refused(f"refused: {path} asks for {what}; a weights file needs nothing but numpy arrays")


def _run_instruction(name: str, argument: Any, machine: _Machine) -> None:
    stack, memo, path = machine.stack, machine.memo, machine.path
    match name:
        case "PROTO" | "FRAME":
            pass
        case "NONE" | "NEWTRUE" | "NEWFALSE":
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        case _ if name in _NUMBERS + _BYTES + _TEXTS:
            stack.append(argument)
        case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        case "MARK":
            machine.marks.append(len(stack))
        case "TUPLE" | "LIST":
            items = _pop_to_mark(machine)
            stack.append(items if name == "LIST" else tuple(items))
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            size = int(name[-1])
            stack[-size:] = [tuple(stack[-size:])]
        case "APPEND" | "APPENDS":
            items = [stack.pop()] if name == "APPEND" else _pop_to_mark(machine)
            _expect(stack[-1], list).extend(items)
        case "DICT" | "SETITEM" | "SETITEMS":
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else _pop_to_mark(machine)
            keys = [_expect(key, str) for key in items[::2]]
            stack.extend([{}] if name == "DICT" else [])
            _expect(stack[-1], dict).update(zip(keys, items[1::2], strict=True))
        case "MEMOIZE":
            memo[len(memo)] = stack[-1]
        case "BINPUT" | "LONG_BINPUT" | "PUT":
            memo[argument] = stack[-1]
        case "BINGET" | "LONG_BINGET" | "GET":
            stack.append(memo[argument])
        case "GLOBAL" | "STACK_GLOBAL":
            # The text form joins the two names by a blank; a module's name holds none.
            pair = argument.split(" ", 1) if name == "GLOBAL" else (stack.pop(-2), stack.pop())
            module, attribute = (_expect(part, str) for part in pair)
            if (module, attribute) not in _GLOBALS:
                _refuse(path, f"the global {shorten(f'{module}.{attribute}')}")
            stack.append(_Global(_GLOBALS[module, attribute]))
        case "REDUCE":
            arguments = stack.pop()
            stack.append(_call(_expect(stack.pop(), _Global).name, _expect(arguments, tuple), machine))
        case "BUILD":
            state = stack.pop()
            _build(stack[-1], _expect(state, tuple), machine)
        case _:
            named = f" of {shorten(argument).replace(' ', '.')}" if isinstance(argument, str) else ""
            _refuse(path, f"the pickle instruction {name}{named}")


def _call(function: str, arguments: tuple, machine: _Machine) -> Any:
    match function, arguments:
        case "numpy.core.multiarray._reconstruct", (_Global(name="numpy.ndarray"), (0,), b"b" | "b"):
            return _Array()
        case "numpy.dtype", (str(code), False | 0, True | 1) if code in _DTYPE_CODES:
            return _Dtype(code)
        case "_codecs.encode", (str(text), "latin1" | "latin-1"):
            machine.text_bytes -= len(text)
            if machine.text_bytes < 0:
                _refuse(machine.path, "more bytes of text than it has")
            return text.encode("latin1")
    _refuse(machine.path, f"{function} with the arguments {_shown(arguments)}")


def _build(target: Any, state: tuple, machine: _Machine) -> None:
    match target, state:
        case _Dtype(), _ if state in _DTYPE_STATES:
            target.order = state[1]
        case _Array(value=None), (1, tuple(shape), _Dtype() as dtype, 0 | 1 as is_fortran, bytes() | str() as data):
            machine.array_bytes -= len(data)
            if machine.array_bytes < 0:
                _refuse(machine.path, "more bytes of arrays than it has")
            if len(shape) > _MAX_AXES or not all(type(side) is int and 0 <= side < 1 << 63 for side in shape):
                raise ValueError(f"an array of shape {_shown(shape)}")
            data = data.encode("latin1") if isinstance(data, str) else data
            values = np.frombuffer(data, dtype.order + dtype.code).astype(dtype.code, copy=False)
            if math.prod(shape) != values.size:
                raise ValueError(f"an array of shape {_shown(shape)} with {values.size} values")
            target.value = np.asarray(values.reshape(shape, order="F" if is_fortran else "C"), order="C")
        case _:
            _refuse(machine.path, f"the state {_shown(state)} of {_name(target)}")


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} where {kind.__name__} belongs")
    return value


def _pop_to_mark(machine: _Machine) -> list[Any]:
    mark = machine.marks.pop()
    items = machine.stack[mark:]
    del machine.stack[mark:]
    return items


def _shown(values: tuple) -> str:
    """Return the plain values and the kinds of the others: a repr of nested tuples could be exponentially long."""
    plain = (str, bytes, int, float, bool, type(None))
    return f"({', '.join(quote(v, 40) if type(v) in plain else _name(v) for v in values[:8])})"


def _name(value: Any) -> str:
    return value.name if isinstance(value, _Global) else type(value).__name__.strip("_").lower()


def write_pdparams(path: str | os.PathLike[str], state: Mapping[str, np.ndarray]) -> None:
    """Write tensors by name to `path` as PaddlePaddle does (a pickle of protocol 4); an existing file is replaced.

    The arrays' module is spelled `numpy.core`, which every numpy can read, where numpy 2 would write `numpy._core`.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(b"\x80\x04}(")
            for name, tensor in state.items():
                file.write(_pickled_text(name))
                _write_array(file, name, np.asarray(tensor))
            names = b"".join(_pickled_text(name) * 2 for name in state)
            file.write(_pickled_text(NAME_TABLE) + b"}(" + names + b"uu.")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_array(file: BinaryIO, name: str, tensor: np.ndarray) -> None:
    if tensor.dtype == ml_dtypes.bfloat16:
        tensor = tensor.view(np.uint16)
    code = tensor.dtype.str[1:]
    if code not in _DTYPE_CODES:
        raise ValueError(f"tensor {quote(name)} is {tensor.dtype}, which is not one of {', '.join(_DTYPE_CODES)}")
    tensor = tensor.astype(f"<{code}", order="C", copy=False)
    order = "|" if tensor.itemsize == 1 else "<"
    shape = b"(" + b"".join(b"J" + struct.pack("<i", size) for size in tensor.shape) + b"t"
    dtype = b"cnumpy\ndtype\n" + _pickled_text(code) + b"\x89\x88\x87R"  # dtype(code, False, True)
    dtype += b"(K\x03" + _pickled_text(order) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    file.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R")
    file.write(b"(K\x01" + shape + dtype + b"\x89\x8e" + struct.pack("<Q", tensor.nbytes))
    file.write(tensor.data if tensor.size else b"")
    file.write(b"tb")


def _pickled_text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded
