"""The files of configs/ablations: each asks one question, and every variant can be built."""

import ast
import functools
import json
import re

import pytest
from places import ROOT

from instseg_jax.cli import split_overrides
from instseg_jax.config import load_config
from instseg_jax.data.loader import build_train_loader
from instseg_jax.data.source import build_dataset
from instseg_jax.models.mask_rtdetr import abstract_variables, build_model, count_parameters
from instseg_jax.sweeps.plan import build_plan
from instseg_jax.training.optimizer import build_optimizer, build_schedule

FOLDER = ROOT / "configs/ablations"
QUESTIONS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "base")
BASE = "configs/ablations/base.py"
# What each may change of the base, and nothing else.
FIELDS = {
    "backbone_rate": {"optimizer.multipliers"},
    "copy_paste": {"data.augment.copy_paste_probability"},
    "decoder_layers": {"model.num_decoder_layers"},
    "denoising": {"denoising.num_denoising"},
    "iou_target": {"loss.iou_target", "loss.aux_iou_target"},
    "letterbox": {"data.resize"},
    "mask_enhanced": {"model.mask_enhanced"},
    "num_queries": {"model.num_queries"},
    "prototypes": {"model.num_prototypes"},
    "recipe": {
        "model.weights",
        "model.mask_enhanced",
        "model.num_queries",
        "data.image_size",
        "data.train_sizes",
        "data.augment.copy_paste_probability",
        "data.augment.scale_jitter",
        "data.resize",
        "denoising.num_denoising",
        "optimizer.schedule",
        "optimizer.ema_decay",
        "optimizer.ema_ramp_steps",
        "loss.match_mask_bce_weight",
        "loss.match_mask_dice_weight",
    },
}
OWN_BASE = {"recipe": "configs/ablations/recipe.py"}  # a preset's parts are asked about on that preset


def flat(config, prefix: str = "") -> dict[str, object]:
    plain = json.loads(config.to_json_best_effort()) if not prefix else config
    found = {}
    for key, value in plain.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def test_every_question_of_the_list_is_asked():
    assert set(QUESTIONS) == set(FIELDS)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_changes_its_fields_and_nothing_else(question):
    plan = build_plan(f"configs/ablations/{question}.py", {}, [])
    base = flat(load_config(OWN_BASE.get(question, BASE)))
    assert [variant.name for variant in plan.variants].count("base") == 1  # all tables share the base's runs
    assert len(plan.variants) > 1
    configs = [flat(variant.config) for variant in plan.variants]
    changed = {field for config in configs for field in base if config[field] != base[field]}
    assert changed == FIELDS[question] and base in configs
    assert len({json.dumps(config, sort_keys=True) for config in configs}) == len(configs)


@functools.cache
def abstract_params(model):
    """Most variants of all questions have one network: tracing it takes seconds."""
    return abstract_variables(model)["params"]


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_variant_can_be_built(question):
    plan = build_plan(f"configs/ablations/{question}.py", {"data.dir": "embedded"}, [])
    dataset = build_dataset(plan.base.config.data, "train")
    sizes = set()
    for variant in plan.variants:
        config = variant.config
        loader = build_train_loader(config, dataset)
        model = build_model(config.model, len(dataset.categories))
        params = abstract_params(model)
        schedule = build_schedule(config.optimizer, 10, config.train.batch_size)
        _, multipliers = build_optimizer(config.optimizer, params, schedule)
        assert multipliers and loader.num_batches > 0
        sizes.add(count_parameters(params))
    # Queries, losses, data and rates have no parameters; layers and prototypes have.
    assert len(sizes) == (len(plan.variants) if question in ("decoder_layers", "prototypes") else 1)


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_header_asks_tells_how_and_answers(question):
    text = ast.get_docstring(ast.parse((FOLDER / f"{question}.py").read_text(encoding="utf-8")))
    assert "?" in text.splitlines()[0]
    lines = re.sub(r"\n {2,}", " ", text).splitlines()  # what goes on in the next line is indented
    parts = dict(line.split(":", 1) for line in lines if line.startswith(("Command:", "Hardware:", "Answer:")))
    assert set(parts) == {"Command", "Hardware", "Answer"} and all(part.strip() for part in parts.values())
    arguments, overrides = split_overrides(parts["Command"].split()[2:])
    assert f"--config=configs/ablations/{question}.py" in arguments and "data.dir" in overrides
    workdir = "runs/recipe" if question in OWN_BASE else "runs/ablations"  # where the base is run once for all
    assert f"--workdir={workdir}" in arguments
