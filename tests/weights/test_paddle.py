"""Reading and writing `.pdparams`: files that PaddlePaddle wrote, and files made to do harm."""

import copyreg
import io
import os
import pickle
import pickletools
import struct
import time
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import FIXTURES

from instseg_jax.weights.paddle import read_pdparams, write_pdparams

SAMPLES = FIXTURES / "pdparams"  # written by PaddlePaddle 3.3.1
NUMPY_RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"


def save(path, content: bytes):
    path.write_bytes(content)
    return path


def trusted_pickle(path):
    """Read our own samples with the standard library: an independent reader."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy.core
        return pickle.loads(Path(path).read_bytes())


# --- files of PaddlePaddle --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["layer_state", "plain_dict", "numpy_dict"])
def test_reads_what_paddle_wrote(name):
    path = SAMPLES / f"{name}.pdparams"
    expected = trusted_pickle(path)
    expected.pop("StructuredToParameterName@@", None)
    tensors = read_pdparams(path)
    assert list(tensors) == ["conv.weight", "bn.weight", "bn.bias", "bn._mean", "bn._variance", "fc.weight", "fc.bias"]
    assert tensors["conv.weight"].shape == (4, 3, 3, 3)
    assert np.ptp(tensors["conv.weight"]) > 0.1
    for key, tensor in tensors.items():
        assert tensor.dtype == np.float32
        assert tensor.shape == expected[key].shape
        assert tensor.tobytes() == expected[key].tobytes()


def test_optimizer_state_is_not_taken_for_weights():
    with pytest.raises(ValueError, match=r"optimizer\.pdopt holds the state of an optimizer"):
        read_pdparams(SAMPLES / "optimizer.pdopt")


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_reads_the_protocols_that_paddle_writes(tmp_path, protocol):
    state = {
        "float32": np.linspace(-1, 1, 300, dtype=np.float32).reshape(3, 100),  # above 255 bytes
        "float16": np.array([1.5, -2], np.float16),
        "float64": np.array(np.pi),  # no dimension
        "int64": np.arange(-3, 3).reshape(2, 3),
        "bool": np.array([True, False]),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big_endian": np.arange(3, dtype=">f4"),
    }
    tensors = read_pdparams(save(tmp_path / "x.pdparams", pickle.dumps(state, protocol=protocol)))
    for name, tensor in state.items():
        assert tensors[name].shape == tensor.shape
        assert tensors[name].dtype == tensor.dtype.newbyteorder("=")
        assert np.array_equal(tensors[name], tensor)


def test_joins_tensors_that_were_cut_in_parts(tmp_path):
    whole = np.arange(10, dtype=np.float32).reshape(2, 5)
    flat = whole.reshape(-1)
    content = {"b": np.ones(1), "big@@.0": flat[:4], "big@@.1": flat[4:8], "big@@.2": flat[8:]}
    content["UnpackBigParamInfor@@"] = {
        "big": {"OriginShape": (2, 5), "slices": ["big@@.0", "big@@.1", "big@@.2"]},
    }
    path = save(tmp_path / "x.pdparams", pickle.dumps(content, protocol=2))
    tensors = read_pdparams(path)
    assert sorted(tensors) == ["b", "big"]
    assert np.array_equal(tensors["big"], whole)
    content["UnpackBigParamInfor@@"]["big"]["slices"].pop()
    with pytest.raises(ValueError, match="UnpackBigParamInfor@@"):
        read_pdparams(save(path, pickle.dumps(content, protocol=2)))


def test_bfloat16_is_stored_as_uint16(tmp_path):
    values = np.array([1, -0.5, 3.140625], ml_dtypes.bfloat16)
    write_pdparams(tmp_path / "x.pdparams", {"a": values})
    assert trusted_pickle(tmp_path / "x.pdparams")["a"].tolist() == [0x3F80, 0xBF00, 0x4049]
    read = read_pdparams(tmp_path / "x.pdparams")["a"]
    assert read.dtype == ml_dtypes.bfloat16
    assert read.tolist() == [1, -0.5, 3.140625]


# --- hostile files ----------------------------------------------------------------------------------

TARGET = "hostile-file-ran"


class Call:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def stack_global(module: str, name: str) -> bytes:
    return b"\x80\x04" + text(module) + text(name) + b"\x93"


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("call", "named"),
    [
        (Call(os.system, f"touch {TARGET}"), rf"{os.system.__module__}\.system"),
        (Call(eval, f"open({TARGET!r}, 'w')"), r"(builtins|__builtin__)\.eval"),
        (Call(getattr, "", "join"), r"(builtins|__builtin__)\.getattr"),
        (Call(np.load, TARGET), r"numpy\.load"),
        (Call(io.open, TARGET, "w"), r"(_io|io)\.open"),
    ],
)
def test_hostile_calls_are_refused_before_they_run(tmp_path, monkeypatch, call, named, protocol):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "x.pdparams", pickle.dumps({"x": call, "weight": np.ones(2)}, protocol=protocol))
    with pytest.raises(ValueError, match=rf"refused: .*{named}"):
        read_pdparams(path)
    assert not (tmp_path / TARGET).exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "tuple"),
        ("collections", "OrderedDict"),
        ("functools", "partial"),
        ("numpy", "load"),
        ("numpy", "fromfile"),
        ("numpy.f2py", "compile"),
        ("numpy.testing._private.utils", "runstring"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "fromfile"),
        ("numpy", "core.multiarray._reconstruct"),  # protocol 4 looks up dotted names
        ("numpy.core", "multiarray._reconstruct"),
        ("numpy.core.multiarray", "_reconstruct.__globals__"),
        ("numpy", "ndarray.tofile"),
        ("numpy", "dtype.__class__"),
        ("numpy.core.multiarray ", "_reconstruct"),
        ("", ""),
    ],
)
def test_every_other_global_is_refused(tmp_path, module, name):
    path = save(tmp_path / "x.pdparams", stack_global(module, name) + b")R.")
    with pytest.raises(ValueError, match="refused") as caught:
        read_pdparams(path)
    assert f"the global {module}.{name};" in str(caught.value)


ARRAY = NUMPY_RECONSTRUCT + b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R"
DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x88\x87R"
STATE = b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


@pytest.mark.parametrize(
    ("program", "named"),
    [
        # admitted globals with arguments that no weights file has
        (NUMPY_RECONSTRUCT + b"cnumpy\ndtype\nK\x00\x85C\x01b\x87R.", "_reconstruct"),
        (NUMPY_RECONSTRUCT + b"cnumpy\nndarray\nK\x05\x85C\x01b\x87R.", "_reconstruct"),
        (NUMPY_RECONSTRUCT + b"cnumpy\nndarray\nK\x00\x85C\x01O\x87R.", "_reconstruct"),
        (NUMPY_RECONSTRUCT + b")R.", "_reconstruct"),
        (b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85\x85R.", "numpy.ndarray"),
        (b"cnumpy\ndtype\nX\x02\x00\x00\x00O8\x89\x88\x87R.", "numpy.dtype"),
        (b"cnumpy\ndtype\nX\x01\x00\x00\x00O\x89\x88\x87R.", "numpy.dtype"),
        (b"cnumpy\ndtype\nX\x04\x00\x00\x00f4,O\x89\x88\x87R.", "numpy.dtype"),
        (b"cnumpy\ndtype\n(]X\x02\x00\x00\x00f4\x89\x88t\x85R.", "numpy.dtype"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.", "_codecs.encode"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00a\x85R.", "_codecs.encode"),
        # states
        (DTYPE + b"(K\x04X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00}tb.", "dtype"),
        (DTYPE + STATE.replace(b"NNN", b"N]N") + b".", "dtype"),
        (ARRAY + b"(K\x01K\x01\x85" + DTYPE + STATE + b"\x89]tb.", "array"),  # data as a list: object arrays
        (b"cnumpy\nndarray\n)b.", "numpy.ndarray"),  # attributes of a global
        # instructions
        (b"(iposix\nsystem\n.", "posix.system"),
        (b"(cposix\nsystem\nX\x02\x00\x00\x00lso.", "posix.system"),
        (b"(cnumpy\nndarray\no.", "OBJ"),
        (b"cnumpy\nndarray\n)\x81.", "NEWOBJ"),
        (b"cnumpy\nndarray\n)}\x92.", "NEWOBJ_EX"),
        (b"Psome id\n.", "PERSID"),
        (b"K\x01Q.", "BINPERSID"),
        (b"\x82\x01.", "EXT1"),
        (b"\x83\x01\x00.", "EXT2"),
        (b"\x84\x01\x00\x00\x00.", "EXT4"),
        (b"(K\x01\x90.", "ADDITEMS"),
        (b"\x97.", "NEXT_BUFFER"),
    ],
)
def test_odd_uses_are_refused(tmp_path, program, named):
    list(pickletools.genops(b"\x80\x04" + program))  # the program itself is well formed
    with pytest.raises(ValueError, match="refused") as caught:
        read_pdparams(save(tmp_path / "x.pdparams", b"\x80\x04" + program))
    assert named in str(caught.value)


def test_the_extension_registry_is_not_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = 217
    copyreg.add_extension(os.system.__module__, "system", code)
    try:
        content = pickle.dumps(Call(os.system, f"touch {TARGET}"), protocol=2)
        assert b"\x82\xd9" in content  # EXT1 217: no global is named at all
        with pytest.raises(ValueError, match="refused"):
            read_pdparams(save(tmp_path / "x.pdparams", content))
    finally:
        copyreg.remove_extension(os.system.__module__, "system", code)
    assert not (tmp_path / TARGET).exists()


def test_object_arrays_are_refused(tmp_path):
    content = pickle.dumps({"x": np.array([1, "a"], dtype=object)}, protocol=4)
    with pytest.raises(ValueError, match=r"refused: .*numpy\.dtype.*'O8'"):
        read_pdparams(save(tmp_path / "x.pdparams", content))


def test_nested_values_in_an_error_stay_short(tmp_path):
    bomb = b")q\x00" + b"h\x00h\x00\x86q\x00" * 60  # 2 ** 60 empty tuples, were they written out
    program = b"\x80\x04" + bomb + NUMPY_RECONSTRUCT + b"h\x00\x85R."
    with pytest.raises(ValueError, match=r"refused: .*_reconstruct with the arguments \(tuple\);"):
        read_pdparams(save(tmp_path / "x.pdparams", program))


# --- damaged files ----------------------------------------------------------------------------------


def test_a_file_cut_anywhere_is_an_error(tmp_path):
    content = (SAMPLES / "numpy_dict.pdparams").read_bytes()
    path = tmp_path / "x.pdparams"
    for size in range(len(content)):
        with pytest.raises(ValueError, match=r"x\.pdparams"):
            read_pdparams(save(path, content[:size]))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 962), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes_give_tensors_or_a_value_error(tmp_path_factory, changes):
    content = bytearray((SAMPLES / "numpy_dict.pdparams").read_bytes())
    for position, value in changes:
        content[min(position, len(content) - 1)] = value
    path = tmp_path_factory.getbasetemp() / "changed.pdparams"
    try:
        tensors = read_pdparams(save(path, bytes(content)))
    except ValueError as error:
        assert "changed.pdparams" in str(error)
    else:
        assert all(isinstance(tensor, np.ndarray) and not tensor.dtype.hasobject for tensor in tensors.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no weights file, damaged or cut short"),
        (b"<!DOCTYPE html><html>404</html>", "no weights file, damaged or cut short"),
        (b"version https://git-lfs.github.com/spec/v1\n", "no weights file, damaged or cut short"),
        (b"PK\x03\x04rest of a zip", "zip archive"),
        (pickle.dumps({}), "holds no tensors"),
        (pickle.dumps({"StructuredToParameterName@@": {}}), "holds no tensors"),
        (pickle.dumps([1, 2]), "its content is a list"),
        (pickle.dumps({"epoch": 3, "w": [1.0]}), "2 values that are not tensors: epoch, w"),
        (b"\x80\x04}X\x01\x00\x00\x00a" + ARRAY + b"s.", "1 values that are not tensors: a"),  # never filled
        (pickle.dumps({1: 2}), "damaged"),
    ],
)
def test_other_content_is_explained(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_pdparams(save(tmp_path / "x.pdparams", content))


def test_an_array_of_the_wrong_size_is_damaged(tmp_path):
    array = ARRAY + b"(K\x01K\x03\x85" + DTYPE + STATE + b"\x89C\x08" + struct.pack("<2f", 1, 2) + b"tb"
    with pytest.raises(ValueError, match=r"shape \(3\) with 2 values"):
        read_pdparams(save(tmp_path / "x.pdparams", b"\x80\x04}X\x01\x00\x00\x00a" + array + b"s."))
    array = array.replace(b"K\x03\x85" + DTYPE, b"K\x02\x85" + DTYPE)
    tensors = read_pdparams(save(tmp_path / "x.pdparams", b"\x80\x04}X\x01\x00\x00\x00a" + array + b"s."))
    assert tensors["a"].tolist() == [1, 2]


# --- writing ----------------------------------------------------------------------------------------


def test_written_files_read_back_with_the_standard_library_and_with_ours(tmp_path):
    rng = np.random.default_rng(0)
    state = {
        "conv.weight": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "transposed": rng.standard_normal((5, 7)).T,
        "half": rng.standard_normal(3).astype(np.float16),
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 3), np.float32),
        "bytes": np.arange(3, dtype=np.int8),
        "größe": np.ones(1, ">f8"),
    }
    path = tmp_path / "x.pdparams"
    write_pdparams(path, state)
    content = trusted_pickle(path)
    assert content.pop("StructuredToParameterName@@") == {name: name for name in state}
    for read in (content, read_pdparams(path)):
        assert list(read) == list(state)
        for name, tensor in state.items():
            assert read[name].dtype == tensor.dtype.newbyteorder("=")
            assert read[name].shape == tensor.shape
            assert np.array_equal(read[name], tensor)
    names = [argument for opcode, argument, _ in pickletools.genops(path.read_bytes()) if opcode.name == "GLOBAL"]
    # The spelling that numpy before 1.26 can read too.
    assert set(names) == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pdparams"
    write_pdparams(path, {"a": np.ones(2)})
    with pytest.raises(ValueError, match="'b' is complex128"):
        write_pdparams(path, {"a": np.zeros(2), "b": np.ones(2, complex)})
    assert read_pdparams(path)["a"].tolist() == [1, 1]
    assert list(tmp_path.iterdir()) == [path]


# --- time and memory in proportion to the file -----------------------------------------------------------------------

ARRAY_HEAD = NUMPY_RECONSTRUCT + b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01("
BIG_ENDIAN = b"tcnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x88\x87R(K\x03X\x01\x00\x00\x00>NNN"
BIG_ENDIAN += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"


def big_endian(data: bytes, shape: bytes) -> bytes:
    """An array, whose bytes have to be turned around, with the instruction that gives its data."""
    return ARRAY_HEAD + shape + BIG_ENDIAN + data + b"tb"


def test_one_payload_is_not_many_arrays(tmp_path):
    payload = b"B" + struct.pack("<I", 400_000) + bytes(400_000) + b"\x94"
    names = [b"X\x03\x00\x00\x00%03d" % number for number in range(500)]
    shape = b"J" + struct.pack("<i", 100_000)
    once = b"\x80\x04}(" + names[0] + big_endian(payload, shape)
    assert read_pdparams(save(tmp_path / "once.pdparams", once + b"u."))["000"].nbytes == 400_000
    many = once + b"".join(name + big_endian(b"h\x00", shape) for name in names[1:]) + b"u."
    with pytest.raises(ValueError, match=r"refused: .* more bytes of arrays than it has"):
        read_pdparams(save(tmp_path / "many.pdparams", many))


def test_one_text_is_not_many_bytes(tmp_path):
    text = b"X" + struct.pack("<I", 400_000) + b"a" * 400_000 + b"\x94"
    encoded = b"\x86R"  # a tuple of two, and the call
    call = b"c_codecs\nencode\n"
    latin = b"X\x06\x00\x00\x00latin1"
    content = b"\x80\x04" + text + b"]" + b"".join(call + b"h\x00" + latin + encoded for _ in range(500)) + b"."
    with pytest.raises(ValueError, match=r"refused: .* more bytes of text than it has"):
        read_pdparams(save(tmp_path / "a.pdparams", content))


def test_what_lies_below_a_mark_costs_nothing(tmp_path):
    """A stack that is copied at every mark makes 280 kB a matter of half a minute."""
    seconds = []
    for content in (b"N" * 1000 + b"(t" * 20_000, b"N" * 200_000 + b"(t" * 20_000):
        started = time.process_time()
        with pytest.raises(ValueError, match="its content is a tuple"):
            read_pdparams(save(tmp_path / "a.pdparams", b"\x80\x04" + content + b"."))
        seconds.append((time.process_time() - started) / len(content))
    assert seconds[1] < 3 * seconds[0]  # a byte


def test_instructions_are_counted(tmp_path):
    with pytest.raises(ValueError, match="more than 300000 instructions"):
        read_pdparams(save(tmp_path / "a.pdparams", b"\x80\x04" + b"]" * 400_000 + b"."))


@pytest.mark.parametrize(
    "shape", [b"\x8a\xff" + b"\x7f" * 255, b"\x8a\x09" + b"\xff" * 8 + b"\x00", b"K\x01" * 33, b"J\xff\xff\xff\xff"]
)
def test_shapes_are_bounded_before_they_are_multiplied(tmp_path, shape):
    content = b"\x80\x04}(X\x01\x00\x00\x00a" + big_endian(b"C\x04abcd", shape) + b"u."
    with pytest.raises(ValueError, match="an array of shape"):
        read_pdparams(save(tmp_path / "a.pdparams", content))
