"""Config files, overrides and their errors."""

import re

import pytest

from instseg_jax.config import check_sizes, load_config


def test_every_size_has_the_official_recipe():
    for size in "nsmlxh":
        config = load_config(f"configs/mask_rtdetr.py:{size}")
        assert config.model.name == f"mask_rtdetr_{size}"
        assert (config.train.epochs, config.model.num_queries, config.optimizer.clip_norm) == (72, 300, 0.1)
    assert load_config("configs/mask_rtdetr.py:h").optimizer.multipliers == ((r"^backbone/", 0.01),)


def test_overrides_keep_the_type_of_their_field():
    overrides = {
        "train.epochs": "3",
        "data.train_sizes": "64,96",
        "data.dir": "some/dir=with=signs",
        "data.train_annotations": "a.json",
        "model.num_classes": "5",
        "optimizer.learning_rate": "1",
        "model.remat": "true",
        "loss.match_class_weight": "2",
        "data.augment.scale_jitter": "None",
    }
    config = load_config("configs/quickstart.py", overrides)
    assert config.train.epochs == 3
    assert config.data.train_sizes == (64, 96)
    assert config.data.dir == "some/dir=with=signs"
    assert config.data.train_annotations == "a.json"
    assert config.model.num_classes == 5
    assert isinstance(config.optimizer.learning_rate, float) and config.optimizer.learning_rate == 1.0
    assert config.model.remat is True
    assert config.data.augment.scale_jitter is None


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("optimizer.learningrate", "1", "did you mean config.optimizer.learning_rate"),
        ("learning_rate", "1", "did you mean config.optimizer.learning_rate"),
        ("trian.epochs", "1", "did you mean config.train"),
        ("train.epochs", "many", "'many' is not of type int"),
        ("train.epochs", "1.5", "'1.5' is not of type int"),
        ("train", "1", "is a section with the fields"),
        ("train.epochs.x", "1", "unknown field config.train.epochs.x"),
    ],
)
def test_a_bad_override_names_the_field(field, text, message):
    with pytest.raises(ValueError, match=message):
        load_config("configs/mask_rtdetr.py:s", {field: text})


def test_values_and_bare_names_do_as_well_as_texts_and_files():
    config = load_config("finetune:n", {"train.epochs": 2, "optimizer.learning_rate": 1, "data.train_sizes": [64]})
    assert (config.model.name, config.train.epochs, config.data.train_sizes) == ("mask_rtdetr_n", 2, (64,))
    assert isinstance(config.optimizer.learning_rate, float)
    assert (
        config.to_dict()
        == load_config(
            "configs/finetune.py:n", {"train.epochs": "2", "optimizer.learning_rate": "1", "data.train_sizes": "64"}
        ).to_dict()
    )
    assert load_config("ablations/denoising").to_dict() == load_config("configs/ablations/denoising.py").to_dict()
    with pytest.raises(ValueError, match=r"config.train.epochs=1.5: 1.5 is not of type int"):
        load_config("quickstart", {"train.epochs": 1.5})


def test_a_bare_name_is_the_projects_config_and_not_a_script_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.py").write_text("raise SystemExit('run')")
    (tmp_path / "mine.py").write_text("from instseg_jax.config import load_config\ndef get_config():\n"
                                      "    return load_config('quickstart', {'train.epochs': 3})\n")  # fmt: skip
    (tmp_path / "finetune").mkdir()
    assert load_config("quickstart").train.epochs == 50
    assert load_config("finetune:n").model.name == "mask_rtdetr_n"
    assert load_config("mine").train.epochs == load_config(tmp_path / "mine.py").train.epochs == 3


@pytest.mark.parametrize(
    ("spec", "overrides", "sizes"),
    [
        ("quickstart", {"data.image_size": "320"}, (320,)),
        ("quickstart", {"data.image_size": "320", "data.train_sizes": "(64, 96)"}, (64, 96)),
        ("quickstart", {"data.train_sizes": "(64, 96)"}, (64, 96)),
        ("quickstart", {}, (192,)),
        ("mask_rtdetr:s", {"data.image_size": "640"}, load_config("mask_rtdetr:s").data.train_sizes),
        ("mask_rtdetr:s", {"data.image_size": 1280}, tuple(range(960, 1216, 64)) + (1216,) + (1280,) * 3
         + tuple(range(1344, 1601, 64))),
    ],
)  # fmt: skip
def test_training_sizes_follow_the_image_size_where_they_are_not_named(spec, overrides, sizes):
    assert load_config(spec, overrides).data.train_sizes == sizes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"data.image_size": "100"},
            "data.image_size is 100, it must be a multiple of 32 pixels; 96 and 128 are nearest",
        ),
        ({"data.image_size": "8"}, "data.image_size is 8, it must be a multiple of 32 pixels; 32 is nearest"),
        ({"data.image_size": "-64"}, "data.image_size is -64, it must be a multiple of 32 pixels; 32 is nearest"),
        ({"data.train_sizes": "(64, 100)"}, "a size in data.train_sizes is 100, it must be a multiple of 32 pixels"),
        ({"data.train_sizes": "((64, 70),)"}, "a size in data.train_sizes is 70"),
        ({"data.train_sizes": "(64.0,)"}, "data.train_sizes has 64.0, a size must be a whole number"),
        ({"data.train_sizes": "()"}, "data.train_sizes is empty"),
        ({"data.image_size": "96", "data.mask_stride": "64"}, "multiple of 64 pixels; 64 and 128 are nearest"),
    ],
)
def test_sizes_that_the_network_cant_take_are_named_with_the_nearest(fields, message):
    check_sizes(load_config("quickstart").data)
    check_sizes(load_config("quickstart", {"data.train_sizes": "((64, 96), 32)"}).data)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_sizes(load_config("quickstart", fields).data)


def test_two_configs_do_not_share_values():
    first = load_config("configs/quickstart.py", {"train.epochs": "1"})
    second = load_config("configs/quickstart.py")
    assert first.train.epochs == 1
    assert second.train.epochs > 1


def test_a_missing_file_and_a_bad_size_are_named():
    with pytest.raises(FileNotFoundError, match=r"nothing\.py"):
        load_config("nothing.py")
    with pytest.raises(ValueError, match="'z'"):
        load_config("configs/mask_rtdetr.py:z")


def test_a_locked_config_refuses_unknown_fields():
    config = load_config("configs/quickstart.py")
    with pytest.raises((AttributeError, KeyError)):
        config.train.epoch = 3
