"""Which runs a sweep has: axes, grids, `sweep(add)`, names, and what is refused before anything starts."""

import pytest

from instseg_jax.config import load_config
from instseg_jax.sweeps.plan import build_plan, parse_axis
from instseg_jax.training.workdir import FREE_TO_CHANGE

SPEC = "configs/quickstart.py"
TUTORIAL = ["optimizer.learning_rate=5e-4,1e-4,5e-5", "train.epochs=30,50,80,100"]


def rows(plan) -> list[list[tuple]]:
    """(learning rate, epochs) of every variant of every row of every table."""
    return [
        [tuple((v.config.optimizer.learning_rate, v.config.train.epochs) for v in row.variants) for row in table.rows]
        for table in plan.tables
    ]


def test_one_axis_at_a_time_gives_the_tutorials_two_tables():
    base = {"optimizer.learning_rate": "1e-4", "train.epochs": "80"}
    plan = build_plan(SPEC, base, TUTORIAL, num_seeds=3)
    assert [table.title for table in plan.tables] == ["optimizer.learning_rate", "train.epochs"]
    assert rows(plan) == [
        [((5e-4, 80),), ((1e-4, 80),), ((5e-5, 80),)],
        [((1e-4, 30),), ((1e-4, 50),), ((1e-4, 80),), ((1e-4, 100),)],
    ]
    # 1e-4 with 80 epochs is in both tables and is trained once a seed: 3 + 4 - 1 variants.
    assert len(plan.variants) == 6 and len(plan.runs) == 18
    assert plan.tables[0].rows[1].variants == plan.tables[1].rows[2].variants == (plan.variants[1],)
    assert [run.name for run in plan.runs[:3]] == [
        "learning_rate=0.0005,seed=0",
        "base,seed=0",
        "learning_rate=5e-05,seed=0",
    ]
    assert {run.seed for run in plan.runs} == {0, 1, 2}
    for run in plan.runs:
        assert run.config == load_config(SPEC, run.overrides) and run.config.seed == run.seed
        assert run.config.to_dict() | {"seed": 0} == run.variant.config.to_dict()


def test_the_base_is_only_run_when_an_axis_has_its_value():
    plan = build_plan(SPEC, {}, ["train.epochs=3,5"])
    assert [variant.name for variant in plan.variants] == ["epochs=3", "epochs=5"]


def test_a_grid_takes_all_combinations():
    plan = build_plan(SPEC, {}, TUTORIAL, mode="grid", num_seeds=2)
    assert len(plan.variants) == 12 and len(plan.runs) == 24
    assert [table.title for table in plan.tables] == ["optimizer.learning_rate", "train.epochs", "all combinations"]
    rates, epochs, all_rows = rows(plan)
    assert rates[0] == ((5e-4, 30), (5e-4, 50), (5e-4, 80), (5e-4, 100))
    assert epochs[3] == ((5e-4, 100), (1e-4, 100), (5e-5, 100))
    assert len(all_rows) == 12 and len(set(all_rows)) == 12
    assert len(plan.runs_of(plan.tables[0].rows[0])) == 8


def test_the_same_value_written_otherwise_is_the_same_folder():
    """A second call with 0.0005 for 5e-4 must find what the first has done."""
    names = [
        build_plan(SPEC, {}, [f"optimizer.learning_rate={text},1"]).runs[0].name for text in ("5e-4", "0.0005", "5E-04")
    ]
    assert set(names) == {"learning_rate=0.0005,seed=0"}


def test_commas_in_brackets_do_not_part_values():
    axis = parse_axis("config.data.augment.scale_jitter=(0.7,1.4), None ,(0.9, 1.1)")
    assert axis.field == "data.augment.scale_jitter"
    assert axis.texts == ("(0.7,1.4)", "None", "(0.9, 1.1)")
    plan = build_plan(SPEC, {}, ["data.augment.scale_jitter=(0.7,1.3),None"])
    assert [v.config.data.augment.scale_jitter for v in plan.variants] == [(0.7, 1.3), None]
    assert [v.name for v in plan.variants] == ["scale_jitter=0.7_1.3", "scale_jitter=None"]


def test_names_of_folders_are_plain_and_different():
    """Patterns lose their special letters; what would then be one name is told apart."""
    frozen = [f'optimizer.frozen=("^a{i}{"/" * 3}",),("^a{i}***",)' for i in range(2)]
    plan = build_plan(SPEC, {}, frozen[:1])
    names = [variant.name for variant in plan.variants]
    assert len(set(names)) == 2 and all(name.startswith("frozen=a0") for name in names)
    assert not set("".join(names)) & set("/*^\"' ()")
    long = build_plan(SPEC, {}, [f"data.dir={'x' * 300},{'x' * 299}y"])
    assert len({v.name for v in long.variants}) == 2 and all(len(v.name) < 120 for v in long.variants)
    both = build_plan(SPEC, {}, ["train.batch_size=2", "eval.every_epochs=3"], mode="grid")
    assert both.variants[0].name == "batch_size=2,every_epochs=3"
    same = build_plan(SPEC, {}, ["denoising.box_noise_scale=0.3", "data.dir=a"], mode="grid")
    assert same.variants[0].name == "box_noise_scale=0.3,dir=a"


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["train.epoch=3"], r"--axis train\.epoch=3: .*did you mean config\.train\.epochs"),
        (["train.epochs=3,many"], "'many' is not of type int"),
        (["train.epochs=3,5,3"], "the value 3 appears twice"),
        (["optimizer.learning_rate=1e-4,0.0001"], r"0\.0001 appears twice \(as 1e-4 and 0\.0001\)"),
        (["train.epochs="], "has an empty value"),
        (["train.epochs=3,,5"], "has an empty value"),
        (["train.epochs"], "must be FIELD=VALUE"),
        (["=3"], "must be FIELD=VALUE"),
        (["train=3"], "is a section with the fields"),
        (["train.epochs=3", "train.epochs=5"], "is given twice"),
        (["data.train_sizes=(64,"], "bracket or quote"),
        (["data.train_sizes=64)"], "bracket or quote"),
        (["seed=1,2"], "--seeds=N"),
        (["device=gpu:0,gpu:1"], "changes nothing"),
        (["log.every_steps=1,2"], "changes nothing"),
        ([], r"there is nothing to vary: give --axis .* or define sweep\(add\) in configs/quickstart\.py"),
    ],
)
@pytest.mark.parametrize("mode", ["one_at_a_time", "grid"])
def test_a_bad_axis_is_named(axes, message, mode):
    with pytest.raises(ValueError, match=message):
        build_plan(SPEC, {}, axes, mode=mode, fixed_fields=FREE_TO_CHANGE)


def test_a_bad_number_of_seeds_or_mode_is_named():
    with pytest.raises(ValueError, match="--seeds is 0"):
        build_plan(SPEC, {}, TUTORIAL, num_seeds=0)
    with pytest.raises(ValueError, match="--mode is 'all'"):
        build_plan(SPEC, {}, TUTORIAL, mode="all")


def write_config(folder, body: str) -> str:
    path = folder / "question.py"
    source = "from instseg_jax.config import load_config\n\n\ndef get_config():\n"
    path.write_text(f"{source}    return load_config('configs/quickstart.py').unlock()\n\n\ndef sweep(add):\n{body}")
    return str(path)


def test_a_config_file_lists_its_own_variants(tmp_path):
    spec = write_config(
        tmp_path,
        "    add({})\n"
        "    add({'model.num_queries': 30, 'data.train_sizes': (96,)}, name='small')\n"
        "    add({'loss.iou_target': 'none', 'optimizer.learning_rate': 2e-3})\n",
    )
    plan = build_plan(spec, {"train.epochs": "7"}, [], num_seeds=2)
    assert plan.name == "question" and [table.title for table in plan.tables] == ["question"]
    labels = [row.label for row in plan.tables[0].rows]
    assert labels == ["base", "small", "loss.iou_target=none, optimizer.learning_rate=0.002"]
    configs = [row.variants[0].config for row in plan.tables[0].rows]
    assert [c.model.num_queries for c in configs] == [50, 30, 50]
    assert [c.data.train_sizes for c in configs] == [(192,), (96,), (192,)]
    assert [c.loss.iou_target for c in configs] == ["mask", "mask", "none"]
    assert [c.train.epochs for c in configs] == [7, 7, 7]
    assert plan.variants[1].overrides == {"train.epochs": "7", "model.num_queries": "30", "data.train_sizes": "(96,)"}
    axes = build_plan(spec, {}, ["train.epochs=1,2"])  # an axis takes the place of the function
    assert [v.config.train.epochs for v in axes.variants] == [1, 2]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    add({'model.queries': 3})\n", "did you mean config.model.num_queries"),
        ("    add({'train.epochs': 1.5})\n", "is not of type int"),
        ("    add({'train.epochs': 3})\n    add({'train.epochs': 3}, name='again')\n", "again appears twice"),
        ("    add({}, name='a')\n    add({'train.epochs': 3}, name='a')\n", "a appears twice"),
        ("    add({'data.dir': 3})\n", "config.data.dir can't be 3, it becomes '3'"),
        ("    pass\n", "adds no variant"),
    ],
)
def test_a_bad_function_is_named(tmp_path, body, message):
    with pytest.raises(ValueError, match=message) as error:
        build_plan(write_config(tmp_path, body), {}, [])
    assert "question.py" in str(error.value)
