"""One device, eight devices and two processes train the same: batches, statistics and losses are global.

Each run is a process of its own, because the number of devices is fixed when JAX starts.
"""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from places import HELPERS, ROOT, TESTS
from random_model import small_model
from step_batch import TINY, make_batch
from tiny_runs import QUICK_COMPILATION, write_subset
from tiny_runs import TINY as TRAINED

from instseg_jax.config import load_config
from instseg_jax.devices import make_mesh, put_micro_batches, put_replicated
from instseg_jax.models.mask_rtdetr import build_model, initial_variables
from instseg_jax.training.optimizer import build_optimizer, build_schedule
from instseg_jax.training.state import initial_state
from instseg_jax.training.step import build_train_step
from instseg_jax.training.workdir import read_rows
from instseg_jax.weights import checkpoint

COUNTS = (2, 0, 1, 3, 1, 2, 0, 3)  # objects of each image: devices differ in what they hold
STEPS = 5
# At the full rate from the first step on, rounding in gradients near zero moves weights by whole learning rates,
# and within three steps a query of an untrained network changes places.
WARM_UP = {"optimizer.learning_rate": "1e-3", "optimizer.warmup_steps": "100"}


def train_steps(num_devices: int, folder: str) -> None:
    """Take five steps on a batch of eight images; keep losses and the weights before and after."""
    config = load_config("configs/mask_rtdetr.py:n", TINY | WARM_UP)
    mesh = make_mesh(jax.devices()[:num_devices])
    # A PP-HGNetV2: fresh layers of N have gradients of mere rounding, of which Adam makes whole steps.
    variant = small_model(like="s").variant
    model = build_model(config.model, 3)
    model = model.clone(variant=dataclasses.replace(variant, num_decoder_layers=model.variant.num_decoder_layers))
    variables = initial_variables(model, seed=0)
    schedule = build_schedule(config.optimizer, total_steps=100, batch_size=4)
    optimizer, multipliers = build_optimizer(config.optimizer, variables["params"], schedule)
    options = (optimizer, schedule, multipliers, mesh)
    step = build_train_step(config, model, *options)
    state = put_replicated(initial_state(variables, optimizer), mesh)
    batches = put_micro_batches(make_batch(COUNTS), mesh, 1)
    rows = []
    for _ in range(STEPS):
        state, metrics = step(state, batches)
        rows.append({name: float(value) for name, value in metrics.items()})
        if len(rows) == 1:
            first = update_of(state.params, variables["params"])
    placed = [
        len(x.sharding.device_set)
        for x in (batches[0].images, state.params["backbone"]["stem"]["stem1"]["conv"]["kernel"])
    ]
    np.savez(
        pathlib.Path(folder) / f"{num_devices}.npz", first=first, last=update_of(state.params, variables["params"])
    )
    print(json.dumps({"rows": rows, "placed": placed}))


def update_of(params: dict, before: dict) -> np.ndarray:
    changes = jax.tree.map(lambda a, b: (np.asarray(a) - b).ravel(), params, before)
    return np.concatenate(jax.tree.leaves(changes))


def start(code: str, num_devices: int, **environment: str) -> subprocess.Popen:
    environment = os.environ | environment | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices} {QUICK_COMPILATION}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HELPERS), str(ROOT), str(TESTS / "training")]),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-3000:]
    assert "rematerialization" not in err, err[-3000:]
    return out


@pytest.fixture(scope="module")
def one_and_eight(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("devices")
    runs = []
    for count in (1, 8):
        code = f"import test_many_devices as t; t.train_steps({count}, {str(folder)!r})"
        runs.append(json.loads(finish(start(code, 8)).splitlines()[-1]) | dict(np.load(folder / f"{count}.npz")))
    return runs


@pytest.mark.slow
def test_the_batch_is_split_and_the_weights_are_everywhere(one_and_eight):
    assert [run["placed"] for run in one_and_eight] == [[1, 1], [8, 8]]


@pytest.mark.slow
def test_losses_are_those_of_one_device(one_and_eight):
    one, eight = (run["rows"] for run in one_and_eight)
    for step, limit in ((0, 1e-5), (STEPS - 1, 1e-4)):
        np.testing.assert_allclose(eight[step]["loss"], one[step]["loss"], rtol=limit)
    assert one[0]["loss"] != one[STEPS - 1]["loss"]
    assert one[0]["objects"] == eight[0]["objects"] == sum(COUNTS)
    for name, value in one[0].items():
        np.testing.assert_allclose(eight[0][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_the_update_is_that_of_one_device(one_and_eight):
    one, eight = one_and_eight
    for when in ("first", "last"):
        difference = np.linalg.norm(eight[when] - one[when]) / np.linalg.norm(one[when])
        assert difference < 1e-2, (when, difference)
        assert np.linalg.norm(one[when]) > 0


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    """Two runs of the command line that share a workdir leave the losses, weights and scores of one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    data = write_subset(tmp_path / "data", 4)
    # Fresh layers of N have gradients of mere rounding, of which Adam makes whole steps unless its epsilon is larger.
    overrides = TRAINED | {"data.dir": data, "optimizer.warmup_steps": 100, "optimizer.epsilon": 1e-5}
    arguments = ["train", "--config=configs/quickstart.py", *(f"--config.{k}={v}" for k, v in overrides.items())]

    def launch(workdir: str, *more: str) -> subprocess.Popen:
        whole = [*arguments, f"--workdir={tmp_path / workdir}", *more]
        code = f"import sys; from instseg_jax.cli import main; sys.exit(main({whole}))"
        return start(code, 1, INSTSEG_HUGE_PAGES="0", INSTSEG_COMPILED="")

    finish(launch("one"))
    shared = [launch("two", f"--coordinator={address}", "--num_processes=2", f"--process_id={i}") for i in (0, 1)]
    told = [finish(process) for process in shared]
    assert "cpu:0" in told[0] and "steps of 4 images" not in told[1]  # the first one speaks
    one, two = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in two] == [0, 1, 2, 3]
    assert one[3]["loss"] != one[0]["loss"]
    for step, limit in ((0, 1e-5), (3, 1e-4)):
        np.testing.assert_allclose(two[step]["loss"], one[step]["loss"], rtol=limit)
    weights = [checkpoint.load_inference_checkpoint(tmp_path / name)[0]["params"] for name in ("one", "two")]
    for a, b in zip(*map(jax.tree.leaves, weights), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    scores = [json.loads((tmp_path / name / "evaluate_result.json").read_text())["metrics"] for name in ("one", "two")]
    assert scores[0].keys() == scores[1].keys()
    assert [json.loads((tmp_path / n / "train_result.json").read_text())["done_flag"] for n in ("one", "two")] == [
        True
    ] * 2


@pytest.mark.slow
@pytest.mark.parametrize("goes_on_with", ["2 devices", "2 processes"])
def test_a_run_goes_on_with_another_number(tmp_path, goes_on_with):
    """What was before is kept to the bit, what comes is as with one device to float rounding."""
    data = write_subset(tmp_path / "data", 4)
    overrides = TRAINED | {"data.dir": data, "optimizer.warmup_steps": 100, "train.epochs": 3}
    arguments = ["train", "--config=configs/quickstart.py", *(f"--config.{k}={v}" for k, v in overrides.items())]

    def launch(workdir: str, num_devices: int, *more: str, until: int = 99) -> subprocess.Popen:
        whole = [*arguments, f"--workdir={tmp_path / workdir}", *more]
        stop = f"signals.StopSignals.asked = lambda self, step: step >= {until}" if until < 99 else "pass"
        code = f"import sys; from instseg_jax.training import signals; {stop}\n"
        code += f"from instseg_jax.cli import main; sys.exit(main({whole}))"
        return start(code, num_devices, INSTSEG_HUGE_PAGES="0")

    finish(launch("one", 1))
    finish(launch("other", 1, until=2))
    before = read_rows(tmp_path / "other" / "metrics.jsonl")
    if goes_on_with == "2 devices":
        finish(launch("other", 2))
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        several = [
            launch("other", 1, f"--coordinator={address}", "--num_processes=2", f"--process_id={i}") for i in (0, 1)
        ]
        for process in several:
            finish(process)
    one, other = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "other"))
    assert [row["step"] for row in other] == [row["step"] for row in one] == list(range(6)) and len(before) == 2
    for k in range(2):
        assert other[k]["loss"] == before[k]["loss"] == one[k]["loss"]
    for k in range(2, 6):
        np.testing.assert_allclose(other[k]["loss"], one[k]["loss"], rtol=1e-3)
    weights = [checkpoint.load_inference_checkpoint(tmp_path / name)[0]["params"] for name in ("one", "other")]
    for a, b in zip(*map(jax.tree.leaves, weights), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
