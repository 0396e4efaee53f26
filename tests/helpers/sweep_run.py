"""Stands in for the process of a training run: leaves the files of one in moments, or breaks as it is told.

The field train.epochs says what happens; the score follows from the learning rate and the seed.
"""

import json
import os
import pathlib
import signal
import sys
import time

from instseg_jax.config import load_config

BREAKS, IS_KILLED, EXITS, WAITS, IS_SLOW = 13, 14, 15, 16, 18  # epochs
SECONDS_BETWEEN_EVALUATIONS = 0.3


def main() -> int:
    options = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[2:])
    fields = {name.removeprefix("config."): text for name, text in options.items() if name.startswith("config.")}
    config = load_config(options["config"], fields)
    folder = pathlib.Path(options["workdir"])
    with (folder / "starts.txt").open("a", encoding="utf-8") as file:
        file.write(f"{config.device}\n")
    (folder / "config.json").write_text(config.to_json_best_effort(), encoding="utf-8")
    (folder / "metrics.jsonl").write_text('{"step": 0, "epoch": 0.0}\n{"step": 6, "epoch": 3.5}\n', encoding="utf-8")
    epochs = config.train.epochs
    if epochs == BREAKS:
        result = {"done_flag": False, "err_type": "RuntimeError", "err_msg": "losses are\nnot finite"}
        (folder / "train_result.json").write_text(json.dumps(result), encoding="utf-8")
        return 1
    if epochs == IS_KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if epochs == EXITS:
        print("error: there is no such folder", file=sys.stderr)
        return 1
    result = {"done_flag": True, "steps": 10 * epochs, "seconds": 6.0, "best_metric": "segm/AP"}
    if epochs == WAITS and not (folder / "stopped.txt").exists():
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
        (folder / "ready.txt").touch()
        while not stopped:
            time.sleep(0.02)
        (folder / "stopped.txt").touch()
        result |= {"done_flag": False, "steps": 7}
    elif epochs == IS_SLOW:
        result |= _evaluate_slowly(folder, config)
    else:
        score = config.optimizer.learning_rate * 100 + 0.01 * config.seed
        rows = [{"step": i, "segm/AP": s, "segm/AP50": 2 * s, "bbox/AP": None} for i, s in ((1, score), (2, score / 2))]
        (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "train_result.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


def _evaluate_slowly(folder: pathlib.Path, config) -> dict:
    """Nine evaluations, each better than the one before, unless a signal comes between them."""
    stopped: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    for number in range(1, 10):
        time.sleep(SECONDS_BETWEEN_EVALUATIONS)
        if stopped:
            return {"done_flag": False, "steps": number - 1}
        row = {"step": number, "segm/AP": config.optimizer.learning_rate * number, "segm/AP50": 0.5, "bbox/AP": None}
        with (folder / "validation.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return {}


if __name__ == "__main__":
    raise SystemExit(main())
