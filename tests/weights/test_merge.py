"""Merging weights into a model: strict on both sides, class rows by name, backbones of any naming."""

import gzip
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from places import FIXTURES

from instseg_jax.weights import merge, names

SHAPES = json.loads(gzip.decompress((FIXTURES / "official_shapes.json.gz").read_bytes()))


def official_state(size: str = "s", seed: int = 0, keep: str = "") -> dict[str, np.ndarray]:
    """Random values for the official tensors whose names start with `keep`."""
    rng = np.random.default_rng(seed)
    shapes = {name: shape for name, shape in SHAPES[size].items() if name.startswith(keep)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def tree(num_classes: int, fill: float, width: int = 3) -> dict:
    """A little model with the class-dependent tensors and one other; row c of class c holds fill + c."""
    rows = fill + np.arange(num_classes, dtype=np.float32)
    head = {"kernel": np.tile(rows, (width, 1)), "bias": rows.copy()}
    embedding = {"embedding": np.tile(rows[:, None], (1, width))}
    norm = {"scale": np.full(2, fill, np.float32)}
    return {
        "params": {"neck": {"bn": norm}, "transformer": {"score_head": head, "denoising_class_embed": embedding}},
        "batch_stats": {"neck": {"bn": {"mean": np.full(2, fill, np.float32)}}},
    }


# --- strictness -------------------------------------------------------------------------------------


def test_equal_trees_load_whole_and_in_the_types_of_the_model():
    init = names.official_to_flax(official_state(seed=1))
    loaded = names.official_to_flax(official_state(seed=2))
    assert not np.array_equal(init["params"]["transformer"]["dec_norm"]["bias"], 0)
    merged, summary = merge.merge_variables(init, loaded)
    flat = names.flatten_tree(merged)
    for path, value in names.flatten_tree(loaded).items():
        assert flat[path].tobytes() == value.tobytes()
    assert flat.keys() == names.flatten_tree(init).keys()
    assert len(summary.loaded) == 646
    assert summary.reshaped == summary.fresh == summary.skipped == ()
    assert str(summary) == "weights: 646 loaded, 0 reshaped, 0 fresh, 0 skipped"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_values_take_the_type_of_the_model(dtype):
    loaded = tree(2, 5)
    loaded["params"]["neck"]["bn"]["scale"] = np.array([0.5, -3], dtype)
    merged, _ = merge.merge_variables(tree(2, 1), loaded)
    scale = merged["params"]["neck"]["bn"]["scale"]
    assert scale.dtype == np.float32
    assert scale.tolist() == [0.5, -3]


def test_a_mismatch_lists_every_kind_with_shapes():
    init, loaded = tree(2, 0), tree(2, 1)
    del loaded["batch_stats"]["neck"]["bn"]["mean"]
    loaded["params"]["neck"]["bn"]["scale"] = np.ones(5, np.float32)
    loaded["params"]["extra"] = {"bias": np.ones(1)}
    with pytest.raises(ValueError) as caught:
        merge.merge_variables(init, loaded)
    message = str(caught.value)
    assert "1 missing in the file: neck/bn/mean" in message
    assert "1 not expected by the model: extra/bias" in message
    assert "1 of another shape: neck/bn/scale (file [5], model [2])" in message
    assert "\n" not in message


def test_long_lists_are_cut_and_counted():
    init = names.official_to_flax(official_state())
    with pytest.raises(ValueError, match=r"190 missing in the file: (\S+, ){4}\S+ and 185 more; name with skip"):
        merge.merge_variables(init, {"params": init["params"]})


def test_integers_are_no_weights():
    loaded = tree(2, 1)
    loaded["params"]["neck"]["bn"]["scale"] = np.ones(2, np.int64)
    with pytest.raises(ValueError, match=r"neck/bn/scale \(file \[2\] int64, model \[2\]\)"):
        merge.merge_variables(tree(2, 0), loaded)


def test_what_is_left_out_is_named_by_a_pattern():
    loaded = tree(7, 1)
    loaded["params"]["extra"] = {"bias": np.ones(1)}
    skip = ("transformer/score_head/*", "transformer/denoising_class_embed/*", "extra/*")
    merged, summary = merge.merge_variables(tree(2, 0), loaded, skip=skip)
    assert merged["params"]["transformer"]["score_head"]["bias"].tolist() == [0, 1]
    assert merged["params"]["neck"]["bn"]["scale"].tolist() == [1, 1]
    assert summary.loaded == ("neck/bn/scale", "neck/bn/mean")
    assert len(summary.fresh) == 3
    assert len(summary.skipped) == 4
    assert "fresh: transformer/score_head/kernel, " in str(summary)
    with pytest.raises(ValueError, match=r"'extra/kernel' matches no tensor"):
        merge.merge_variables(tree(2, 0), tree(2, 1), skip=("extra/kernel",))


# --- classes ----------------------------------------------------------------------------------------


def test_class_rows_are_copied_by_name():
    merged, summary = merge.merge_variables(
        tree(4, 100),
        tree(3, 0),
        class_names=["Car ", "boat", "person", "cat"],
        loaded_class_names=["person", "bus", "car"],
    )
    expected = [2, 101, 0, 103]  # car from row 2, person from row 0, the other two at their initial value
    transformer = merged["params"]["transformer"]
    assert transformer["score_head"]["bias"].tolist() == expected
    assert transformer["score_head"]["kernel"].tolist() == [expected] * 3
    assert transformer["denoising_class_embed"]["embedding"].tolist() == [[row] * 3 for row in expected]
    assert merged["params"]["neck"]["bn"]["scale"].tolist() == [0, 0]
    assert len(summary.reshaped) == 3
    assert len(summary.loaded) == 2
    assert summary.copied_classes == ("Car ", "person")
    assert summary.fresh_classes == ("boat", "cat")
    assert "2 of 4 by name: Car , person" in str(summary)


def test_the_same_classes_in_another_order_are_reordered():
    merged, summary = merge.merge_variables(
        tree(2, 100), tree(2, 0), class_names=["b", "a"], loaded_class_names=["a", "b"]
    )
    assert merged["params"]["transformer"]["score_head"]["bias"].tolist() == [1, 0]
    assert summary.fresh_classes == ()


def test_shapes_alone_are_enough_where_no_initial_value_stays():
    init = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree(2, 0))
    classes = {"class_names": ["c", "a"], "loaded_class_names": ["a", "b", "c"]}
    merged, _ = merge.merge_variables(init, tree(3, 10), **classes)
    assert merged["params"]["transformer"]["score_head"]["bias"].tolist() == [12, 10]
    assert merged["params"]["neck"]["bn"]["scale"].tolist() == [10, 10]
    classes["class_names"] = ["c", "d"]
    with pytest.raises(ValueError, match="has no values for 1 classes of the model"):
        merge.merge_variables(init, tree(3, 10), **classes)


def test_initial_values_are_not_changed_in_place():
    init = tree(2, 100)
    merge.merge_variables(init, tree(3, 0), class_names=["a", "b"], loaded_class_names=["a", "b", "c"])
    assert init["params"]["transformer"]["score_head"]["bias"].tolist() == [100, 101]


def test_another_number_of_classes_needs_names():
    with pytest.raises(ValueError, match="for another number of classes give the class names of both sides"):
        merge.merge_variables(tree(4, 0), tree(3, 0), class_names=["a", "b", "c", "d"])


@pytest.mark.parametrize(
    ("class_names", "loaded_class_names", "message"),
    [
        (["a", "b"], ["a", "b", "c", "d"], r"of the model has 3 classes, but 2 class names"),
        (["a", "b", "x"], ["a", "b", "c"], r"of the file has 4 classes, but 3 class names"),
    ],
)
def test_class_names_must_be_as_many_as_rows(class_names, loaded_class_names, message):
    with pytest.raises(ValueError, match=message):
        merge.merge_variables(tree(3, 0), tree(4, 0), class_names=class_names, loaded_class_names=loaded_class_names)


def test_another_width_is_still_a_wrong_shape():
    with pytest.raises(ValueError, match=r"2 of another shape: transformer/score_head/kernel \(file \[5, 2\], model"):
        merge.merge_variables(tree(1, 0), tree(2, 0, width=5), class_names=["a"], loaded_class_names=["a", "b"])


# --- backbones --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_backbone_files_with_either_naming_and_a_classifier(prefix):
    init = names.official_to_flax(official_state(seed=1))
    backbone = official_state(seed=2, keep="backbone.")
    file = {prefix + name.removeprefix("backbone."): tensor for name, tensor in backbone.items()}
    extra = ["fc.weight", "fc.bias", "last_conv.weight", "lab.scale", "stem.stem1.lab.scale"]
    file |= {prefix + name: np.ones((2, 2), np.float32) for name in extra}
    merged, summary = merge.load_backbone(init, file)
    returned = names.flax_to_official(merged)
    for name, tensor in backbone.items():
        assert returned[name].tobytes() == tensor.tobytes()
    untouched = names.flatten_tree(merged["params"]["neck"])
    assert all(untouched[path] is value for path, value in names.flatten_tree(init["params"]["neck"]).items())
    assert sorted(summary.skipped) == sorted(prefix + name for name in extra)
    assert len(summary.loaded) == len(backbone)
    assert len(summary.loaded) + len(summary.fresh) == 646
    assert not any(path.startswith("backbone/") for path in summary.fresh)


def test_the_backbone_of_a_whole_detector():
    init = names.official_to_flax(official_state(seed=1))
    state = official_state(seed=2)
    merged, summary = merge.load_backbone(init, state)
    returned = names.flax_to_official(merged)
    taken = [name for name in state if np.array_equal(returned[name], state[name])]
    assert taken == [name for name in state if name.startswith("backbone.")]
    assert len(summary.skipped) == 646 - len(taken)


def test_an_incomplete_backbone_is_an_error():
    init = names.official_to_flax(official_state())
    state = official_state(keep="backbone.")
    del state["backbone.stem.stem1.conv.weight"]
    with pytest.raises(ValueError, match="1 missing in the file: backbone/stem/stem1/conv/kernel"):
        merge.load_backbone(init, state)
    with pytest.raises(ValueError, match="of another shape: backbone/"):
        merge.load_backbone(init, official_state("m", keep="backbone."))


def test_backbone_files_are_recognised():
    assert merge.is_backbone_state(official_state(keep="backbone."))
    assert merge.is_backbone_state({"stem.stem1.conv.weight": np.ones(1)})
    assert not merge.is_backbone_state(official_state())


def test_weights_of_another_size_are_named_in_the_first_words():
    trees = {size: names.official_to_flax(official_state(size)) for size in "sm"}
    with pytest.raises(ValueError, match=r"^the weights are of mask_rtdetr_s, the model is mask_rtdetr_m: each size"):
        merge.merge_variables(trees["m"], trees["s"])
    other = {name: {**parts, "backbone": {"a": np.zeros(1)}} for name, parts in trees["s"].items()}
    with pytest.raises(ValueError, match=r"^the weights are of another size, the model is mask_rtdetr_m: each size"):
        merge.merge_variables(trees["m"], other)
    with pytest.raises(ValueError, match=r"^the weights are of mask_rtdetr_m, the model is of another size: each size"):
        merge.merge_variables(other, trees["m"])
