"""Weights from any source into a model and out again, exact to the bit."""

import gzip
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from places import FIXTURES

import instseg_jax.weights as weights
from instseg_jax.models.mask_rtdetr import abstract_variables, make_model
from instseg_jax.weights import checkpoint, names
from instseg_jax.weights.paddle import read_pdparams, write_pdparams
from instseg_jax.weights.state_dicts import export_weights, read_safetensors, write_safetensors

SHAPES = json.loads(gzip.decompress((FIXTURES / "official_shapes.json.gz").read_bytes()))
READERS = {"pdparams": read_pdparams, "safetensors": read_safetensors}


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    """A whole S model under official names, with numbers among them that arithmetic would not keep to the bit."""
    rng = np.random.default_rng(0)
    state = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES["s"].items()}
    state["transformer.dec_norm.bias"].view(np.uint32)[:3] = 0x3F7FFFFF, 0x00000001, 0x80000000
    return state


@pytest.fixture(scope="module")
def init(state) -> dict:
    return jax.tree.map(np.zeros_like, names.official_to_flax(state))


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert tensor.shape == b[name].shape
        assert tensor.tobytes() == b[name].tobytes(), name


def test_the_model_has_the_official_tensors_for_any_number_of_queries():
    expected = {names.official_to_path(name, len(shape)): tuple(shape) for name, shape in SHAPES["s"].items()}
    for num_queries in (300, 37):
        model = make_model("mask_rtdetr_s", num_classes=80, num_queries=num_queries)
        found = {path: leaf.shape for path, leaf in names.flatten_tree(abstract_variables(model)).items()}
        assert {path: sorted(shape) for path, shape in found.items()} == {p: sorted(s) for p, s in expected.items()}
        layouts = names.official_to_flax({name: np.empty(shape, bool) for name, shape in SHAPES["s"].items()})
        assert found == {path: leaf.shape for path, leaf in names.flatten_tree(layouts).items()}


@pytest.mark.parametrize("format", ["pdparams", "safetensors"])
def test_a_whole_model_in_and_out(tmp_path, state, init, format):
    source = tmp_path / f"official.{format}"
    {"pdparams": write_pdparams, "safetensors": write_safetensors}[format](source, state)
    read = weights.read_weights(source)
    assert read.num_classes == 80
    assert read.class_names == names.COCO_CLASSES
    merged, summary = weights.merge_weights(init, read)
    assert len(summary.loaded) == 646
    path = export_weights(tmp_path / "new" / f"mine.{format}", merged)
    assert_same(READERS[format](path), state)
    assert_same(
        READERS[format](export_weights(tmp_path / "mine", jax.tree.map(jax.numpy.asarray, merged), format=format)),
        state,
    )


def test_a_checkpoint_carries_its_class_names(tmp_path, state, init):
    variables = names.official_to_flax(state)
    metadata = {"class_names": [f"class {i}" for i in range(80)], "step": 7}
    checkpoint.save_inference_checkpoint(tmp_path / "best_model", variables, metadata)
    read = weights.read_weights(tmp_path)
    assert read.metadata == metadata
    assert read.class_names == tuple(metadata["class_names"])
    merged, _ = weights.merge_weights(init, read)
    assert_same(names.flax_to_official(merged), state)


def test_class_rows_of_coco_go_to_the_classes_of_the_model(tmp_path, state):
    write_pdparams(tmp_path / "coco.pdparams", state)
    init = jax.tree.map(np.zeros_like, names.official_to_flax(state))
    transformer = init["params"]["transformer"]
    transformer["score_head"] = {"kernel": np.zeros((256, 3), np.float32), "bias": np.zeros(3, np.float32)}
    transformer["denoising_class_embed"] = {"embedding": np.zeros((3, 256), np.float32)}
    read = weights.read_weights(tmp_path / "coco.pdparams")
    merged, summary = weights.merge_weights(init, read, class_names=["ship", "airplane", "person"])
    exported = names.flax_to_official(merged)
    for row, coco in ((1, 4), (2, 0)):
        assert np.array_equal(
            exported["transformer.score_head.weight"][:, row], state["transformer.score_head.weight"][:, coco]
        )
        assert exported["transformer.score_head.bias"][row] == state["transformer.score_head.bias"][coco]
        embedding = state["transformer.denoising_class_embed.weight"][coco]
        assert np.array_equal(exported["transformer.denoising_class_embed.weight"][row], embedding)
    assert not exported["transformer.score_head.weight"][:, 0].any()
    assert summary.copied_classes == ("airplane", "person")
    with pytest.raises(ValueError, match="for another number of classes"):
        weights.merge_weights(init, read)


def test_a_backbone_file_is_merged_as_one(tmp_path, state, init):
    backbone = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    write_pdparams(tmp_path / "imagenet.pdparams", backbone | {"fc.weight": np.ones((3, 4), np.float32)})
    read = weights.read_weights(tmp_path / "imagenet.pdparams")
    assert read.variables is None
    assert read.num_classes is None
    merged, summary = weights.merge_weights(init, read)
    exported = names.flax_to_official(merged)
    assert all(exported[f"backbone.{name}"].tobytes() == tensor.tobytes() for name, tensor in backbone.items())
    assert summary.skipped == ("fc.weight",)
    with pytest.raises(ValueError, match="holds a backbone alone"):
        weights.merge_weights(init, read, skip=("neck/*",))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.pdparams", "there is no such file of weights: .*none.pdparams"),
        ("mask_rtdetr_z_coco", "no such folder of weights: mask_rtdetr_z_coco.* with a name are mask_rtdetr_s_coco, "),
        ("notes.txt", r"does not end with one of \.pdparams, \.pdema, \.safetensors"),
        ("short.safetensors", r"short\.safetensors is not a complete safetensors file"),
        ("folder", "no checkpoint at .*folder"),
    ],
)
def test_what_is_no_weights(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("weights")
    (tmp_path / "folder").mkdir()
    write_safetensors(tmp_path / "short.safetensors", {"a": np.ones(100)})
    content = (tmp_path / "short.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(content[:-1])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        weights.read_weights(name)


def test_safetensors_keep_every_type_and_order(tmp_path):
    state = {
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "bfloat16": np.array([1.5, -3], ml_dtypes.bfloat16),
        "float64": np.array(1 / 3),
        "int64": np.array([2**62 + 1]),
    }
    write_safetensors(tmp_path / "x.safetensors", state)
    read = read_safetensors(tmp_path / "x.safetensors")
    assert_same({name: read[name] for name in state}, {name: np.asarray(t, order="C") for name, t in state.items()})
    assert list(tmp_path.iterdir()) == [tmp_path / "x.safetensors"]


def test_other_formats_are_refused(tmp_path, init):
    with pytest.raises(ValueError, match=r"weights format 'onnx' of .*x\.onnx is not one of pdparams, safetensors"):
        export_weights(tmp_path / "x.onnx", init)


def test_a_safetensors_file_says_itself_what_it_is(tmp_path, state):
    variables = names.official_to_flax({k: np.nan_to_num(v) for k, v in state.items()})
    described = {
        "config": {"model": {"name": "mask_rtdetr_s"}},
        "class_names": ["a", "b"],
        "thresholds": {"overall": 0.4},
    }
    path = export_weights(tmp_path / "s.safetensors", variables, metadata=described, half=True)
    whole = export_weights(tmp_path / "whole.safetensors", variables)
    assert path.stat().st_size < 0.52 * whole.stat().st_size
    read = weights.read_weights(path)
    assert (read.metadata, read.class_names, read.thresholds) == (described, ("a", "b"), {"overall": 0.4})
    assert weights.read_weights(whole).metadata == {}
    for name, tensor in names.flatten_tree(read.variables).items():
        original = names.flatten_tree(variables)[name]
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, original.astype(np.float16))
        assert np.abs(tensor).max() > 0


def test_half_precision_is_refused_where_no_official_tool_reads_it(tmp_path, state):
    with pytest.raises(ValueError, match="half precision is for safetensors, not for pdparams"):
        export_weights(tmp_path / "s.pdparams", names.official_to_flax(state), half=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tensors",
    [("model.layers.0.weight", "model.layers.0.bias"), ("backbone.body.conv1.weight",), ("conv_stem.weight",), ()],
)
def test_a_file_of_foreign_names_is_no_backbone(tmp_path, tensors):
    from safetensors.numpy import save_file

    save_file({name: np.ones((2, 2), np.float32) for name in tensors}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors holds no (weights of Mask-RT-DETR|tensors)"):
        weights.read_weights(tmp_path / "other.safetensors")
