"""Config files, overrides and their errors."""

import pytest

from instseg_jax.config import load_config


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
