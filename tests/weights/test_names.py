"""The mapping between official tensor names and Flax paths, on the shape tables of all five sizes."""

import gzip
import json
import math

import numpy as np
import pytest
from places import FIXTURES

from instseg_jax.weights import names

SHAPES = json.loads(gzip.decompress((FIXTURES / "official_shapes.json.gz").read_bytes()))
# Parameters without and values of running statistics, as published with the reference implementation.
COUNTS = {
    "s": (14_633_892, 30_152),
    "m": (18_780_100, 42_952),
    "l": (32_821_428, 68_096),
    "x": (68_649_044, 127_200),
    "h": (129_808_116, 210_704),
}
PAIRS = [
    ("backbone.stem.stem2a.conv.weight", 4, "params/backbone/stem/stem2a/conv/kernel"),
    (
        "backbone.stages.0.blocks.1.layers.2.conv1.conv.weight",
        4,
        "params/backbone/stages_0/blocks_1/layers_2/conv1/conv/kernel",
    ),
    ("backbone.stages.3.downsample.bn.weight", 1, "params/backbone/stages_3/downsample/bn/scale"),
    ("neck.input_proj.0.1._mean", 1, "batch_stats/neck/input_proj_0_1/mean"),
    ("neck.input_proj.0.1._variance", 1, "batch_stats/neck/input_proj_0_1/var"),
    ("neck.input_proj.0.1.bias", 1, "params/neck/input_proj_0_1/bias"),
    (
        "neck.mask_feat_head.scale_heads.2.2.0.bn.weight",
        1,
        "params/neck/mask_feat_head/scale_heads_2_2_0/bn/scale",
    ),
    (
        "transformer.decoder.layers.5.self_attn.in_proj_weight",
        2,
        "params/transformer/decoder/layers_5/self_attn/in_proj_weight",
    ),
    ("transformer.enc_output.0.weight", 2, "params/transformer/enc_output_0/kernel"),
    ("transformer.enc_output.1.weight", 1, "params/transformer/enc_output_1/scale"),
    ("transformer.denoising_class_embed.weight", 2, "params/transformer/denoising_class_embed/embedding"),
]


@pytest.mark.parametrize(("official", "rank", "path"), PAIRS)
def test_single_names_map_both_ways(official, rank, path):
    assert names.official_to_path(official, rank) == path
    assert names.path_to_official(path) == official


@pytest.mark.parametrize("size", "smlxh")
def test_every_official_name_returns_and_no_two_share_a_path(size):
    paths = {name: names.official_to_path(name, len(shape)) for name, shape in SHAPES[size].items()}
    assert len(set(paths.values())) == len(paths)
    assert all(names.path_to_official(path) == name for name, path in paths.items())


@pytest.mark.parametrize("size", "smlxh")
def test_parameters_and_statistics_are_told_apart(size):
    totals = {"params": 0, "batch_stats": 0}
    for name, shape in SHAPES[size].items():
        collection = names.official_to_path(name, len(shape)).split("/")[0]
        totals[collection] += math.prod(shape)
    assert (totals["params"], totals["batch_stats"]) == COUNTS[size]


@pytest.mark.parametrize("size", ["s", "h"])
def test_round_trip_is_exact_to_the_bit(size):
    rng = np.random.default_rng(0)
    # Random bytes, so that NaNs and denormals are among the values; one byte a value keeps size H small.
    dtype = np.float32 if size == "s" else np.int8
    width = np.dtype(dtype).itemsize
    state = {
        name: np.frombuffer(rng.bytes(width * math.prod(shape)), dtype).reshape(shape)
        for name, shape in SHAPES[size].items()
    }
    variables = names.official_to_flax(state)
    returned = names.flax_to_official(variables)
    assert returned.keys() == state.keys()
    for name, tensor in state.items():
        assert returned[name].dtype == tensor.dtype
        assert returned[name].shape == tensor.shape
        assert returned[name].tobytes() == tensor.tobytes(), name
    assert variables["params"]["transformer"]["denoising_class_embed"]["embedding"].shape == (80, 256)


def test_layouts():
    dense = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # out, in, height, width
    depthwise = np.arange(6 * 3 * 3).reshape(6, 1, 3, 3)
    linear = np.arange(6).reshape(2, 3)  # in, out
    variables = names.official_to_flax({"a.conv.weight": dense, "b.conv.weight": depthwise, "c.weight": linear})
    kernel = variables["params"]["a"]["conv"]["kernel"]
    assert kernel.shape == (4, 5, 3, 2)
    assert kernel[3, 1, 2, 0] == dense[0, 2, 3, 1]
    kernel = variables["params"]["b"]["conv"]["kernel"]
    assert kernel.shape == (3, 3, 1, 6)
    assert kernel[2, 1, 0, 5] == depthwise[5, 0, 2, 1]
    assert np.array_equal(variables["params"]["c"]["kernel"], linear)
    assert variables["batch_stats"] == {}


@pytest.mark.parametrize(
    ("name", "rank"), [("stem.lab.scale", 1), ("weight", 1), ("fc.weight", 3), ("a.num_batches_tracked", 0)]
)
def test_unknown_tensors_are_named(name, rank):
    with pytest.raises(ValueError, match=f"'{name}'"):
        names.official_to_path(name, rank)


@pytest.mark.parametrize("path", ["params/a/alpha", "intermediates/a/kernel"])
def test_unknown_leaves_are_named(path):
    with pytest.raises(ValueError, match=path):
        names.path_to_official(path)


def test_flatten_and_unflatten():
    tree = {"params": {"a": {"b": 1, "c": 2}, "d": 3}}
    flat = names.flatten_tree(tree)
    assert flat == {"params/a/b": 1, "params/a/c": 2, "params/d": 3}
    assert names.unflatten_tree(flat) == tree


def test_coco_classes():
    assert len(names.COCO_CLASSES) == len(set(names.COCO_CLASSES)) == 80
    # Positions known from COCO's category ids with the unused ids left out.
    assert [names.COCO_CLASSES.index(name) for name in ("person", "dog", "toothbrush")] == [0, 16, 79]
