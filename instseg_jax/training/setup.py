"""What a training is before its first step: the data read, the model described, the workdir opened.

All that can be known to be wrong is said here.
"""

import collections
import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence

import jax
import optax
from ml_collections import ConfigDict

from instseg_jax.config import check_sizes
from instseg_jax.data import coco, loader
from instseg_jax.data.source import build_dataset, with_channel_ranges, with_reading
from instseg_jax.data.transforms import Transform
from instseg_jax.devices import check_batch_size, make_mesh, put_replicated, select_devices
from instseg_jax.models.mask_rtdetr import MaskRTDETR, build_model, count_parameters, initial_variables
from instseg_jax.training.metrics import open_log
from instseg_jax.training.optimizer import build_optimizer, build_schedule, say_longer, train_alone
from instseg_jax.training.state import initial_state, start_from_weights
from instseg_jax.training.step import build_train_step
from instseg_jax.training.trackers import Tracker, check_trackers
from instseg_jax.training.validation import (
    Draw,
    Score,
    build_draw,
    build_score,
    open_validation,
)
from instseg_jax.training.workdir import (
    LOG,
    describe_data,
    open_workdir,
    saved_steps,
)
from instseg_jax.weights import checkpoint


@dataclasses.dataclass(frozen=True)
class Training:
    """Everything that stays the same from the first step to the last."""

    config: ConfigDict
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    model: MaskRTDETR
    train_loader: loader.Loader
    score: Score | None  # None: without validation
    total_steps: int
    logger: logging.Logger
    data: dict[str, dict]  # what it is trained on, see `workdir.describe_data`
    draw: Draw | None = None  # None: no pictures of the validation

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, the same on every process."""
        return self.train_loader.num_batches

    def metadata(self, step: int, best: float | None, score: float | None = None) -> dict:
        """What a checkpoint says about itself."""
        dataset = self.train_loader.dataset
        return {
            "config": json.loads(self.config.to_json_best_effort()),
            "class_names": list(dataset.categories),
            "category_ids": list(dataset.category_ids),
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "score": score,
            "best_score": best,
            "best_metric": self.config.eval.best_metric,
            "versions": checkpoint.library_versions(),
            "data": self.data,
        }


@dataclasses.dataclass(frozen=True)
class Own:
    """What a caller from Python brings in place of what the config says; None and () leave it to the config."""

    dataset: coco.CocoDataset | None = None  # to train on; without `val_dataset` there is no validation
    val_dataset: coco.CocoDataset | None = None
    optimizer: optax.GradientTransformation | None = None  # in place of AdamW and the schedule
    transforms: tuple[Transform, ...] = ()
    trackers: Mapping[str, Tracker] = dataclasses.field(default_factory=dict)  # beside those of the config


def set_up(config: ConfigDict, workdir: pathlib.Path, own: Own):
    """Read the data, describe the model, open the workdir: all that can fail before the first step.

    Returns: the run, the state before the first step, the step function.
    """
    check_sizes(config.data)
    config = with_channel_ranges(config) if own.dataset is None else config
    devices = select_devices(config.device)
    mesh = make_mesh(devices)
    check_batch_size(config.train.batch_size, mesh, "train.batch_size", config.train.micro_batches)
    check_trackers(config.log.trackers)
    if config.log.pictures < 0:
        raise ValueError(f"log.pictures is {config.log.pictures}, it must not be negative")
    if config.train.epochs < 0:  # none at all makes everything ready, and trains nothing
        raise ValueError(f"train.epochs is {config.train.epochs}, it must not be negative")
    if config.train.early_stopping is not None and config.train.early_stopping < 1:
        raise ValueError(
            f"train.early_stopping is {config.train.early_stopping}, it must be at least 1, or None for none"
        )
    if config.eval.every_epochs <= 0:
        raise ValueError(f"eval.every_epochs is {config.eval.every_epochs}, it must be above 0")
    if own.dataset is None:
        train_set, (val_set, lack) = build_dataset(config.data, "train"), open_validation(config.data)
    else:
        train_set, val_set = own.dataset, own.val_dataset
        lack = "there is no val_dataset" if val_set is None else ""
    splits = {"train": train_set} | ({} if val_set is None else {"val": val_set})
    for dataset in splits.values():
        coco.check_images(dataset)
    if val_set is not None:
        coco.check_same_categories(train_set, val_set)
    config = with_reading(config, train_set.info)
    model = build_model(config.model, len(train_set.categories))
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    train_loader = loader.build_train_loader(config, train_set, own_transforms=own.transforms, **process)
    score = None if val_set is None else build_score(config, model, val_set, mesh)
    variables, summary = initial_variables(model, seed=config.seed, channels=config.data.channels), None
    if config.model.weights:
        variables, summary = start_from_weights(config.model, variables, train_set.categories)
    total_steps = config.train.epochs * train_loader.num_batches
    schedule = build_schedule(config.optimizer, total_steps, config.train.batch_size)
    optimizer, multipliers = build_optimizer(config.optimizer, variables["params"], schedule)
    if own.optimizer is not None:
        optimizer = train_alone(own.optimizer, multipliers)
    state = initial_state(variables, optimizer)

    epochs_before = open_workdir(workdir, config, sum(x.nbytes for x in jax.tree.leaves(state)), total_steps)
    logger = open_log(workdir / LOG)
    if summary is not None:
        logger.info("%s", summary)
    for name, dataset in (splits | {"train": train_loader.dataset}).items():
        if dataset.skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(dataset.skipped).items())
            logger.warning("%s: %d objects are left out: %s", name, len(dataset.skipped), reasons)
    logger.info(
        "%s: %.1f M parameters, %d classes; %d training and %d validation images, trained at %s px, evaluated at %s; "
        "%d steps of %d images on %s",
        config.model.name,
        count_parameters(variables["params"]) / 1e6,
        model.num_classes,
        len(train_loader.dataset),
        0 if val_set is None else len(val_set),
        ", ".join(str(size) for size in dict.fromkeys(config.data.train_sizes)),
        config.data.image_size,
        total_steps,
        config.train.batch_size,
        ", ".join(f"{d.platform}:{d.id}" for d in devices),
    )
    if lack:
        logger.warning("%s; training goes without validation: its last weights count as the best ones", lack)
    if epochs_before != config.train.epochs and own.optimizer is None:
        before = build_schedule(config.optimizer, epochs_before * train_loader.num_batches, config.train.batch_size)
        logger.info("%s", say_longer(config, epochs_before, max(saved_steps(workdir)), before, schedule))
    if "hugetlb=1" in os.environ.get("GLIBC_TUNABLES", ""):
        logger.info("memory comes in huge pages (GLIBC_TUNABLES is set; INSTSEG_HUGE_PAGES=0 leaves it alone)")
    run = Training(config, workdir, mesh, model, train_loader, score, total_steps, logger, describe_data(splits))
    shown = schedule if own.optimizer is None else None
    if val_set is not None and config.log.pictures and jax.process_index() == 0:
        run = dataclasses.replace(run, draw=build_draw(workdir, val_set, config.log.pictures, logger))
    step_function = build_train_step(config, model, optimizer, shown, multipliers, mesh)
    return run, put_replicated(state, mesh), step_function


def count_reasons(skipped: Sequence[tuple[int, str]]) -> dict[str, int]:
    """How many objects are left out for which reason; reasons of malformed ones are one."""
    known = ("crowd", "marked to be ignored", "area is not positive", "box has no width or height")
    named = (reason if reason in (*known, "box is outside the image") else "malformed" for _, reason in skipped)
    return dict(collections.Counter(named).most_common())
