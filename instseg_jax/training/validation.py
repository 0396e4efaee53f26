"""Scoring the averaged weights during training: on all devices, with the best ones kept."""

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Callable

import cv2
import jax
import numpy as np
from ml_collections import ConfigDict

from instseg_jax.data import coco, loader
from instseg_jax.data.source import build_dataset
from instseg_jax.devices import put_batch
from instseg_jax.evaluation.coco import remove_result, write_evaluation
from instseg_jax.files import write_bytes
from instseg_jax.inference.predictor import make_predict
from instseg_jax.messages import quote
from instseg_jax.models.mask_rtdetr import MaskRTDETR
from instseg_jax.scoring.outcome import score_results
from instseg_jax.scoring.run import KINDS, find_results
from instseg_jax.scoring.shown import draw_found
from instseg_jax.training.workdir import VALIDATION, keep_rows, read_rows
from instseg_jax.types import Detections
from instseg_jax.weights import checkpoint

Score = Callable[[dict], tuple[dict[str, float | None], list[dict]]]
Draw = Callable[[int, list[dict]], dict[str, np.ndarray]]
PICTURES = "validation"  # the folder in a workdir
SHOWN_SCORE = 0.5  # the lowest that is drawn; the same as `predict` has by itself


def open_validation(data: ConfigDict) -> tuple[coco.CocoDataset | None, str]:
    """The validation images of a config's section `data`; None, and what is missing, where there are none.

    Raises: what reading them raises, and FileNotFoundError for a file that data.val_annotations names and is not there.
    """
    try:
        dataset = build_dataset(data, "val")
    except coco.MissingAnnotations as error:
        if data.val_annotations is not None:
            raise
        return None, str(error)
    return (dataset, "") if len(dataset) else (None, coco.say_empty(dataset))


def build_score(config, model: MaskRTDETR, dataset: coco.CocoDataset, mesh: jax.sharding.Mesh) -> Score:
    """A function from variables on the mesh to (metrics, COCO result entries) of a data set.

    A batch is filled up to a multiple of the number of devices. Every process gets the same numbers.

    Raises: ValueError for fields of `eval` and `data` that would end the first evaluation.
    """
    loader.build_eval_loader(config, dataset, num_devices=mesh.size, process_count=jax.process_count())
    one = coco.to_coco(coco.take_images(dataset, [0]))
    names = score_results(one, [], KINDS, engine=config.eval.engine)
    if config.eval.best_metric not in names:
        few = [name for name in names if name.count("/") == 1]
        raise ValueError(f"eval.best_metric is {quote(config.eval.best_metric)}, it must be one of {', '.join(few)}")
    ground_truth = coco.to_coco(dataset)
    predict = make_predict(model, num_detections=config.eval.num_detections, mesh=mesh)

    def score(variables: dict) -> tuple[dict[str, float | None], list[dict]]:
        def predict_with(images: np.ndarray) -> Detections:
            return predict(variables, put_batch(images, mesh))

        results, _ = find_results(predict_with, config, dataset, dataset.category_ids, mesh, is_shown=False)
        return score_results(ground_truth, results, KINDS, engine=config.eval.engine), results

    return score


def build_draw(workdir: pathlib.Path, dataset: coco.CocoDataset, count: int, logger: logging.Logger) -> Draw:
    """A function (step, COCO result entries) that draws a few validation pictures into a folder of the workdir.

    It gives them by the names under which trackers get them. What can't be drawn or written is told, and no error.
    """

    def draw(step: int, results: list[dict]) -> dict[str, np.ndarray]:
        drawn = {}
        try:
            (workdir / PICTURES).mkdir(exist_ok=True)
            for name, picture in draw_found(dataset, results, count, threshold=SHOWN_SCORE):
                drawn[f"{PICTURES}/{name}"] = picture
                data = cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes()
                write_bytes(workdir / PICTURES / f"{name}.jpg", data)
        except (OSError, ValueError) as error:
            logger.warning("pictures of the validation at step %d can't be drawn: %s", step, error)
        return drawn

    return draw


@dataclasses.dataclass
class History:
    """The scores of a run's evaluations so far; kept in validation.jsonl."""

    workdir: pathlib.Path
    metric: str  # that decides which weights are best
    best: float | None = None  # of the evaluations that were noted
    kept: float | None = None  # of best_model/: one whose evaluation a kill left unnoted, or will be made again
    last_step: int = -1  # of the last evaluation
    since_better: int = 0  # evaluations since one was better than all before it, not just as good

    @property
    def highest(self) -> float | None:
        """The score to beat."""
        return max((score for score in (self.best, self.kept) if score is not None), default=None)

    def is_best(self, score: float | None) -> bool:
        """Whether weights of this score are the best so far, or as good as them."""
        return self.highest is None or (score is not None and score >= self.highest)

    def add(self, step: int, metrics: dict[str, float | None]) -> None:
        """Note an evaluation; what it leaves is kept by then, since after a kill what is noted is not made again."""
        if jax.process_index() == 0:
            with (self.workdir / VALIDATION).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
                file.flush()
                os.fsync(file.fileno())  # later checkpoints outlast a power cut as well
        self._count(step, metrics.get(self.metric))

    def has(self, step: int) -> bool:
        """Whether this step was evaluated, and none after it."""
        return step == self.last_step

    def _count(self, step: int, score: float | None) -> None:
        self.last_step = step
        if self.best is None or (score is not None and score > self.best):
            self.best, self.since_better = score, 0
        else:
            self.since_better += 1


def open_history(workdir: pathlib.Path, metric: str, start_step: int) -> History:
    """The history of a run that resumes at `start_step`; later evaluations will be made again.

    The best model may come from such a later one: its score then still is the one to beat.
    """
    history = History(workdir, metric)
    if jax.process_index() == 0:
        keep_rows(workdir / VALIDATION, lambda row: row["step"] <= start_step)
    for row in read_rows(workdir / VALIDATION):
        if row["step"] <= start_step:
            history._count(row["step"], row.get(metric))
    if checkpoint.is_checkpoint(workdir / checkpoint.BEST_MODEL):
        history.kept = checkpoint.read_metadata(workdir / checkpoint.BEST_MODEL)["score"]
    return history


def keep_weights(workdir: pathlib.Path, variables: dict, metadata: dict) -> None:
    """Write best_model/ alone."""
    checkpoint.save_inference_checkpoint(workdir / checkpoint.BEST_MODEL, variables, metadata)


def keep_best(
    workdir: pathlib.Path,
    variables: dict,
    metadata: dict,
    metrics: dict[str, float | None],
    results: list[dict],
) -> None:
    """Write best_model/ and, beside it, evaluate_result.json and predictions.json of the same weights."""
    if jax.process_index() == 0:
        remove_result(workdir)  # of the weights that go
    keep_weights(workdir, variables, metadata)
    if jax.process_index() == 0:
        write_evaluation(workdir, metrics, results)
