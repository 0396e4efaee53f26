"""The verb `train`: from a config to a trained model, resumable at any step.

The step is dispatched before the previous one's numbers are fetched, so the device never waits for the host.
"""

import dataclasses
import json
import logging
import math
import pathlib
import signal
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from instseg_jax import weights as weights_room
from instseg_jax.data import coco, loader
from instseg_jax.devices import select_devices
from instseg_jax.evaluation.coco import evaluate_batches, write_evaluation
from instseg_jax.files import write_json
from instseg_jax.inference.predictor import make_predict
from instseg_jax.models.mask_rtdetr import MaskRTDETR, build_model, count_parameters, initial_variables
from instseg_jax.training import sharding
from instseg_jax.training.metrics import MetricsFile, TrainingProgress, open_log
from instseg_jax.training.optimizer import build_optimizer, build_schedule
from instseg_jax.training.state import TrainState, initial_state
from instseg_jax.training.step import build_train_step
from instseg_jax.weights import checkpoint

# A run may be continued with other values of these: none of them changes what is computed.
FREE_TO_CHANGE = (
    *("device", "data.num_workers", "data.prefetch", "checkpoint", "log", "eval.batch_size"),
    *("eval.engine", "eval.boundary", "eval.gallery_size", "eval.tta_scales"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that stays the same from the first step to the last."""

    config: ConfigDict
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    model: MaskRTDETR
    train_loader: loader.Loader
    val_loader: loader.Loader
    ground_truth: dict  # of the validation images, as COCO has it
    total_steps: int
    logger: logging.Logger

    @property
    def steps_per_epoch(self) -> int:
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
        }


def train(config: ConfigDict, workdir: str | pathlib.Path) -> dict:
    """Train as `config` says; the same call on the same workdir goes on where it stopped.

    Writes below `workdir`: checkpoints/ (the last few training states), best_model/ (averaged weights of the
    best evaluation), metrics.jsonl (a row a step), train.log, config.json, train_result.json.

    Returns: what train_result.json holds: done_flag, steps, best_score, seconds.

    Raises: ValueError or OSError in one sentence for anything that is wrong with config, data or workdir,
      before the first step where it can be known.
    """
    workdir = pathlib.Path(workdir)
    try:
        result = _train(config, workdir)
    except Exception as error:
        if workdir.is_dir():
            failure = {"done_flag": False, "err_type": type(error).__name__, "err_msg": str(error)}
            write_json(workdir / "train_result.json", failure, indent=2)
        raise
    write_json(workdir / "train_result.json", result, indent=2)
    return result


def _train(config: ConfigDict, workdir: pathlib.Path) -> dict:
    run, variables = _set_up(config, workdir)
    schedule = build_schedule(config.optimizer, run.total_steps)
    optimizer, multipliers = build_optimizer(config.optimizer, variables["params"], schedule)
    state = initial_state(variables, optimizer)
    state = jax.device_put(state, sharding.replicated(run.mesh))
    manager = checkpoint.make_manager(workdir / checkpoint.CHECKPOINTS, max_to_keep=config.checkpoint.keep)
    best = None
    if manager.latest_step() is not None:
        state, metadata = checkpoint.restore(manager, state)
        best = metadata["best_score"]
        run.logger.info("resuming at step %d of %d", int(state.step), run.total_steps)
    if checkpoint.is_checkpoint(workdir / checkpoint.BEST_MODEL):
        best = _better(best, checkpoint.read_metadata(workdir / checkpoint.BEST_MODEL)["score"])
    step_function = build_train_step(config, run.model, optimizer, schedule, multipliers, run.mesh)
    started = time.monotonic()
    try:
        state, best = _run_steps(run, step_function, state, manager, best)
    finally:
        manager.wait_until_finished()
        manager.close()
    step = int(state.step)
    return {
        "done_flag": step >= run.total_steps,
        "steps": step,
        "total_steps": run.total_steps,
        "best_metric": config.eval.best_metric,
        "best_score": best,
        "seconds": round(time.monotonic() - started, 1),
        "workdir": str(workdir),
    }


def _set_up(config: ConfigDict, workdir: pathlib.Path) -> tuple[Run, dict]:
    """Read the data, describe the model, open the workdir: all that can fail before the first step."""
    devices = select_devices(config.device)
    mesh = sharding.make_mesh(devices)
    sharding.check_batch_size(config.train.batch_size, mesh, "train.batch_size", config.train.micro_batches)
    splits = {split: read_split(config.data, split) for split in ("train", "val")}
    for dataset in splits.values():
        coco.check_images(dataset)
    coco.check_same_categories(splits["train"], splits["val"])
    model = build_model(config.model, len(splits["train"].categories))
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    train_loader = loader.build_train_loader(config, splits["train"], **process)
    val_loader = loader.build_eval_loader(config, splits["val"])

    _open_workdir(workdir, config)
    logger = open_log(workdir / "train.log")
    variables = initial_variables(model, seed=config.seed)
    if config.model.weights:
        found = weights_room.read_weights(config.model.weights)
        variables, summary = weights_room.merge_weights(variables, found, class_names=splits["train"].categories)
        logger.info("%s", summary)
    total_steps = config.train.epochs * train_loader.num_batches
    logger.info(
        "%s: %.1f M parameters, %d classes; %d training and %d validation images; %d steps of %d images on %s",
        config.model.name,
        count_parameters(variables["params"]) / 1e6,
        model.num_classes,
        len(train_loader.dataset),
        len(val_loader.dataset),
        total_steps,
        config.train.batch_size,
        ", ".join(f"{d.platform}:{d.id}" for d in devices),
    )
    truth = coco.to_coco(splits["val"])
    return Run(config, workdir, mesh, model, train_loader, val_loader, truth, total_steps, logger), variables


def read_split(data: ConfigDict, split: str) -> coco.CocoDataset:
    """One split of the data set that a config's section `data` names.

    Raises: ValueError when no folder is named, and what `coco.read_split` raises.
    """
    if not data.dir:
        raise ValueError("data.dir is empty; name the data set's folder with --config.data.dir=DIR")
    annotations, images = data[f"{split}_annotations"], data[f"{split}_images"]
    return coco.read_split(data.dir, split, annotations=annotations, images=images, skip_invalid=data.skip_invalid)


def _open_workdir(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Create the folder and note the config in it, or make sure that it belongs to the same config."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    mine = json.loads(config.to_json_best_effort())
    if path.exists() and (workdir / checkpoint.CHECKPOINTS).is_dir():
        differing = _differences(json.loads(path.read_text(encoding="utf-8")), mine)
        if differing:
            raise ValueError(
                f"{workdir} holds a run with another config ({'; '.join(differing)}); "
                "give the same values to resume it, or another --workdir"
            )
    write_json(path, mine, indent=2)


def _differences(saved: dict, mine: dict, prefix: str = "") -> list[str]:
    found = []
    for key in sorted({*saved, *mine}):
        name = f"{prefix}{key}"
        if name in FREE_TO_CHANGE:
            continue
        old, new = saved.get(key), mine.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name} was {old!r}, is {new!r}")
    return found


def _better(a: float | None, b: float | None) -> float | None:
    return max((x for x in (a, b) if x is not None), default=None)


def _run_steps(run: Run, step_function, state: TrainState, manager, best: float | None):
    """The loop: a step, its predecessor's numbers, now and then a checkpoint or an evaluation."""
    config, start = run.config, int(state.step)
    predict = make_predict(run.model, num_detections=config.eval.num_detections)
    metrics_file = MetricsFile(run.workdir / "metrics.jsonl", start)
    progress = TrainingProgress(run.total_steps, start, run.logger)
    evaluate_every = max(1, round(config.eval.every_epochs * run.steps_per_epoch))
    bad_steps = 0
    batches = run.train_loader.batches(start_step=start)
    pending = None

    def fetch(step: int, metrics: dict, image_index: np.ndarray) -> bool:
        """Write the numbers of a step that has ended; says whether it was skipped."""
        row = {name: float(value) for name, value in jax.device_get(metrics).items()}
        skipped = row.pop("skipped") > 0
        images = [run.train_loader.dataset.images[i].id for i in image_index if i >= 0]
        if skipped:
            terms = [name for name, value in row.items() if not math.isfinite(value)]
            run.logger.warning(
                "step %d was skipped: %s not finite, images %s", step, ", ".join(terms) or "a gradient is", images
            )
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}
        if step % config.log.every_steps == 0 or skipped:
            metrics_file.write({"step": step, "epoch": step / run.steps_per_epoch, **row})
        if not skipped:
            progress.update(step + 1, row)
        return skipped

    with _stop_signals() as stop:
        try:
            for step in range(start, run.total_steps):
                batch = next(batches)
                parts = sharding.put_micro_batches(batch, run.mesh, config.train.micro_batches)
                state, metrics = step_function(state, parts)
                if pending is not None:
                    bad_steps = bad_steps + 1 if fetch(*pending) else 0
                pending = (step, metrics, np.asarray(batch.image_index))
                if bad_steps >= config.train.max_skipped_steps:
                    raise RuntimeError(
                        f"{bad_steps} steps in a row had losses or gradients that are not finite; "
                        f"see {run.workdir / 'train.log'} for the images and terms. The last checkpoint is intact."
                    )
                done = step + 1
                is_last = done == run.total_steps
                if done % evaluate_every == 0 or is_last:
                    best = _evaluate(run, predict, state, done, best)
                if done % config.checkpoint.every_steps == 0 or is_last or stop:
                    checkpoint.save(manager, done, state, run.metadata(done, best))
                if stop:
                    run.logger.info("stopped by a signal at step %d; the same command goes on from there", done)
                    break
            if pending is not None:
                fetch(*pending)
        finally:
            batches.close()
            progress.close()
            metrics_file.close()
    return state, best


def _evaluate(run: Run, predict, state: TrainState, step: int, best: float | None) -> float | None:
    """Score the averaged weights on the validation images; keep them when they are the best so far."""
    variables = jax.device_get(state.ema_variables)
    dataset = run.val_loader.dataset
    metrics, results = evaluate_batches(
        lambda images: predict(variables, images),
        run.val_loader.batches(),
        ground_truth=run.ground_truth,
        image_ids=[image.id for image in dataset.images],
        category_ids=dataset.category_ids,
        num_detections=run.config.eval.num_detections,
    )
    score = metrics[run.config.eval.best_metric]
    shown = {name: metrics[name] for name in ("segm/AP", "segm/AP50", "bbox/AP", "bbox/AP50")}
    text = "  ".join(f"{name} {value:.3f}" for name, value in shown.items() if value is not None)
    run.logger.info("step %d  validation: %s", step, text or "no objects to find")
    with (run.workdir / "validation.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **metrics}) + "\n")
    if best is None or (score is not None and score >= best):
        best = score
        write_evaluation(run.workdir, metrics, results)
        checkpoint.save_inference_checkpoint(
            run.workdir / checkpoint.BEST_MODEL, variables, run.metadata(step, best, score)
        )
    return best


class _stop_signals:
    """While inside, SIGTERM and the first SIGINT only ask to stop; truthy once asked."""

    def __enter__(self) -> "_stop_signals":
        self._asked, self._before = False, {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: whoever owns it handles signals
                break
        return self

    def _ask(self, number: int, frame) -> None:
        self._asked = True
        signal.signal(number, self._before[number] or signal.SIG_DFL)

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def __bool__(self) -> bool:
        return self._asked
