"""The verb `train`: from a config to a trained model, resumable at any step.

The numbers of a step are fetched after the next one is on its way. Once in a step the host is waited for: the matching
is solved there, between two programs (see `step.py`).
"""

import contextlib
import functools
import math
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from instseg_jax.config import field_values
from instseg_jax.devices import put_micro_batches
from instseg_jax.files import write_json
from instseg_jax.peers import write_here_if_lost
from instseg_jax.training.curves import draw_training
from instseg_jax.training.metrics import MetricsFile, TrainingProgress
from instseg_jax.training.setup import Own, Training, set_up
from instseg_jax.training.signals import Interrupted, StopSignals
from instseg_jax.training.state import TrainState
from instseg_jax.training.trackers import make_trackers, open_own
from instseg_jax.training.tracking import Tracking, open_tracking
from instseg_jax.training.validation import (
    History,
    keep_best,
    keep_weights,
    open_history,
)
from instseg_jax.training.workdir import (
    CONFIG,
    LOG,
    METRICS,
    RESULT,
    BusyError,
    check_same_data,
    describe_models,
    find_gaps,
    is_out_of_room,
    lock_workdir,
    tell_no_room,
)
from instseg_jax.weights import checkpoint

SHOWN_SCORES = ("segm/AP", "segm/AP50", "bbox/AP", "bbox/AP50")


def train(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    own: Own | None = None,
    finish: Callable[[], object] = lambda: None,
) -> dict:
    """Train as `config` says; the same call on the same workdir goes on where it stopped.

    Writes below `workdir`: checkpoints/ (the last few training states), best_model/ (averaged weights of the
    best evaluation), metrics.jsonl (a row a step), validation.jsonl and validation/ (a few pictures of the last
    evaluation), train.log, config.json, training.png, train_result.json. Of several processes (`jax.distributed`) all
    call this, and the first one writes. `finish` is what belongs to a finished run besides, which that one does:
    train_result.json, by which others know it, is gone while the run goes on and comes last.

    Returns: what train_result.json holds: done_flag, steps, best_score, models, seconds, and so on.

    Raises: ValueError or OSError in one sentence for anything that is wrong with config, data or workdir,
      before the first step where it can be known.
    """
    workdir = pathlib.Path(workdir)
    is_first = jax.process_index() == 0
    try:
        with lock_workdir(workdir):
            write_here_if_lost(workdir / RESULT)
            if is_first:
                (workdir / RESULT).unlink(missing_ok=True)  # of the run as far as it was
            result = _train(config, workdir, own or Own())
            if is_first:
                draw_training(workdir)
                if result["done_flag"]:
                    finish()
                write_json(workdir / RESULT, result, indent=2)
    except BusyError:
        raise
    except Exception as error:
        told = tell_no_room(workdir) if is_out_of_room(error) else error
        if is_first and workdir.is_dir():
            failure = {"done_flag": False, "err_type": type(told).__name__, "err_msg": str(told)}
            with contextlib.suppress(OSError):  # on a full disk: the reason is worth more than its record
                write_json(workdir / RESULT, failure, indent=2)
        if told is error:
            raise
        raise told from error
    return result


def _train(config: ConfigDict, workdir: pathlib.Path, own: Own) -> dict:
    run, state, step_function = set_up(config, workdir, own)
    manager = checkpoint.make_manager(workdir / checkpoint.CHECKPOINTS, max_to_keep=config.checkpoint.keep)
    if manager.latest_step() is not None:
        state, metadata, damaged = checkpoint.restore_newest(manager, state)
        for text in damaged:
            run.logger.warning("%s; it is set aside, and the one before it is taken", text)
        if not config.data.allow_change:
            check_same_data(metadata.get("data"), run.data)
        run.logger.info("resuming at step %d of %d", int(state.step), run.total_steps)
    for before, after in find_gaps(workdir / METRICS, config.log.every_steps):
        run.logger.warning("%s has no rows of the steps between %d and %d", METRICS, before, after)
    makers = make_trackers(config.log.trackers, workdir, field_values(run.config))
    makers |= {name: functools.partial(open_own, name, tracker) for name, tracker in own.trackers.items()}
    tracking = open_tracking(workdir, makers, run.logger)
    history = open_history(workdir, config.eval.best_metric, int(state.step))
    started = time.monotonic()
    try:
        steps, end = _run_steps(run, step_function, state, manager, history, tracking)
    finally:
        manager.wait_until_finished()
        manager.close()
    return {
        "done_flag": end not in ("stopped", "requeue"),
        "model_name": config.model.name,
        "config": CONFIG,
        "train_log": LOG,
        "metrics_log": METRICS,
        "models": describe_models(workdir, config.eval.best_metric),
        "end": end,
        "steps": steps,
        "total_steps": run.total_steps,
        "best_metric": config.eval.best_metric,
        "best_score": history.highest,
        "dropped_objects": run.train_loader.counters["dropped_objects"],
        "seconds": round(time.monotonic() - started, 1),
        "workdir": str(workdir),
    }


def _run_steps(
    run: Training, step_function, state: TrainState, manager, history: History, tracking: Tracking
) -> tuple[int, str]:
    """The loop: a step, its predecessor's numbers, now and then a checkpoint or an evaluation.

    A step is saved before it is evaluated, so no evaluation can lose what was trained; one that did not come to its
    end is made when the run resumes.

    Returns: the number of steps that are done, and why no more are: "finished", "stopped early" (no better score for
      long), "stopped" (by a signal) or "requeue" (by SIGUSR1: it is to be started again).
    """
    config, done = run.config, int(state.step)
    metrics_file = MetricsFile(run.workdir, done)
    tracking.start(done)
    evaluate_every = max(1, round(config.eval.every_epochs * run.steps_per_epoch))
    progress = TrainingProgress(run.total_steps, done, run.logger, evaluate_every=evaluate_every)
    patience = config.train.early_stopping
    bad_steps, saved = 0, done
    batches = run.train_loader.batches(start_step=done)
    pending, end = None, "finished"
    compiled: set[tuple[int, ...]] = set()  # shapes of pictures that the step has seen

    def is_due(step: int) -> bool:
        return step > 0 and (step % evaluate_every == 0 or step == run.total_steps)

    def save(*, wait: bool = False) -> None:
        nonlocal saved
        if done > saved:
            settle()  # killed right after, the run would go on from here without its last row
            metrics_file.sync()
            checkpoint.save(manager, done, state, run.metadata(done, history.highest), wait=wait)
            saved = done

    def advance(shape: tuple[int, ...], parts: list) -> tuple[TrainState, dict]:
        if shape in compiled:
            return step_function(state, parts)
        save()  # a signal while the step compiles gives it up
        with progress.compiling(shape[1:3]):
            found = stop.listen(lambda: step_function(state, parts))
        compiled.add(shape)
        return found

    def evaluate() -> None:
        with progress.evaluating():
            _evaluate(run, state, done, history, tracking, stop)

    def fetch(step: int, metrics: dict, image_index: np.ndarray) -> bool:
        """Write the numbers of a step that has ended; says whether it was skipped."""
        row = {name: float(value) for name, value in jax.device_get(metrics).items()}
        skipped = row.pop("skipped") > 0
        if skipped:
            terms = [name for name, value in row.items() if not math.isfinite(value)]
            images = [run.train_loader.dataset.images[i].id for i in image_index if i >= 0]
            run.logger.warning(
                "step %d was skipped: %s not finite, images %s", step, ", ".join(terms) or "a gradient is", images
            )
        if step % config.log.every_steps == 0 or skipped:
            finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
            written = {"step": step, "epoch": step / run.steps_per_epoch, **finite}
            metrics_file.write(written)
            tracking.log(written)
        if not skipped:
            progress.update(step + 1, row)
        return skipped

    def settle() -> None:
        """Write the numbers of the last step, if they are not yet."""
        nonlocal pending, bad_steps
        if pending is not None:
            bad_steps = bad_steps + 1 if fetch(*pending) else 0
            pending = None

    closing = contextlib.closing
    with closing(tracking), closing(metrics_file), closing(progress), closing(batches), StopSignals() as stop:
        try:
            if is_due(done) and not history.has(done):
                evaluate()
            while done < run.total_steps:
                if patience is not None and history.since_better >= patience:
                    run.logger.info(
                        "no better %s in %d evaluations (train.early_stopping): it ends", history.metric, patience
                    )
                    end = "stopped early"
                    break
                batch = next(batches)
                parts = put_micro_batches(batch, run.mesh, config.train.micro_batches)
                state, metrics = advance(batch.images.shape, parts)
                settle()
                pending = (done, metrics, np.asarray(batch.image_index))
                if bad_steps >= config.train.max_skipped_steps:
                    raise RuntimeError(
                        f"{bad_steps} steps in a row had losses or gradients that are not finite; "
                        f"see {run.workdir / LOG} for the images and terms. The last checkpoint is intact."
                    )
                done += 1
                must_stop = stop.asked(done)
                if is_due(done) or must_stop or done % config.checkpoint.every_steps == 0:
                    save(wait=is_due(done))
                if must_stop:
                    raise Interrupted
                if is_due(done):
                    evaluate()
        except Interrupted:
            what = f"stopped by a signal at step {done}" if done else "stopped by a signal before the first step"
            run.logger.info("%s; the same command goes on from there", what)
            end = "requeue" if stop.is_to_be_requeued() else "stopped"
        settle()
    return done, end


def _evaluate(
    run: Training, state: TrainState, step: int, history: History, tracking: Tracking, stop: StopSignals
) -> None:
    """Score the averaged weights on the validation images; keep them when they are the best so far."""
    if run.score is None:
        keep_weights(run.workdir, jax.device_get(state.ema_variables), run.metadata(step, None))
        return
    metrics, results = stop.listen(functools.partial(run.score, state.ema_variables))
    score = metrics[history.metric]
    text = "  ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN_SCORES if metrics[name] is not None)
    run.logger.info("step %d  validation: %s", step, text or "no objects to find")
    dropped = run.train_loader.counters
    if dropped["dropped_objects"]:
        run.logger.warning(
            "%d of %d objects were left out by chance: their images hold more than data.max_instances = %d",
            dropped["dropped_objects"],
            dropped["dropped_objects"] + dropped["objects"],
            run.config.data.max_instances,
        )
    if history.is_best(score):
        variables = jax.device_get(state.ema_variables)
        keep_best(run.workdir, variables, run.metadata(step, score, score), metrics, results)
    pictures = run.draw(step, results) if run.draw and jax.process_index() == 0 else {}
    history.add(step, metrics)
    if jax.process_index() == 0:
        draw_training(run.workdir)
        tracking.score(step, metrics, pictures)
