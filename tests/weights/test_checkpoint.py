"""Checkpoints: exact to the bit, self-describing, and never lost to a killed process or a full disk."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from places import ROOT

from instseg_jax.packing import cut, join
from instseg_jax.weights import checkpoint


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Any
    params: Any
    batch_stats: Any
    average: Any
    opt_state: Any


def make_state(seed: int) -> State:
    """A state with the optimizer of a real run: clipping, masked decay, one group trained and one frozen."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = {
        "backbone": {"stem": {"kernel": draw(3, 3, 3, 8)}},
        "neck": {"proj": {"kernel": draw(8, 4), "bias": draw(4).astype(jnp.bfloat16)}},
    }
    stats = {"backbone": {"bn": {"mean": draw(8), "var": jnp.full(8, jnp.nan)}}}
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.1),
        optax.multi_transform(
            {"trained": optax.adamw(1e-3), "frozen": optax.set_to_zero()},
            {"backbone": "frozen", "neck": "trained"},
        ),
        optax.masked(optax.add_decayed_weights(0.1), {"backbone": False, "neck": True}),
        optax.ema(0.99),
    )
    _, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    return State(
        step=jnp.int32(seed),
        params=params,
        batch_stats=stats,
        average={name: 2 * join(tree) for name, tree in (("params", params), ("batch_stats", stats))},
        opt_state=opt_state,
    )


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def filled(value: float, size: int = 100) -> dict:
    """Variables whose every value is `value`."""
    bias = {"bias": np.full(size, value, np.float32)}
    return {"params": {"a": bias}, "batch_stats": {"a": {"mean": np.full(3, value, np.float32)}}}


# --- training state ---------------------------------------------------------------------------------


def test_a_training_state_returns_to_the_bit(tmp_path):
    state = make_state(5)
    metadata = {"config": {"model": {"name": "mask_rtdetr_s"}}, "class_names": ["a"], "best": None, "loader": [3, 17]}
    manager = checkpoint.make_manager(tmp_path / "checkpoints", max_to_keep=2)
    checkpoint.save(manager, 5, state, metadata)
    manager.wait_until_finished()
    restored, found = checkpoint.restore(manager, abstract(state))
    assert isinstance(restored, State)
    assert_same_bits(state, restored)
    assert found == metadata
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    # A concrete state serves as well, and its values play no part.
    assert_same_bits(state, checkpoint.restore(manager, make_state(6))[0])


def test_numpy_leaves_keep_types_that_jax_does_not_have(tmp_path):
    assert not jax.config.jax_enable_x64
    state = {
        "f8": np.array([1 / 3, np.pi]),
        "i8": np.array([2**62 + 1]),
        "bf16": np.array([1.5, np.nan], ml_dtypes.bfloat16),
        "u1": np.arange(3, dtype=np.uint8),
        "bool": np.array([True, False]),
    }
    manager = checkpoint.make_manager(tmp_path, max_to_keep=1)
    checkpoint.save(manager, 0, state, {}, wait=True)
    restored, _ = checkpoint.restore(manager, jax.tree.map(np.zeros_like, state))
    assert all(isinstance(leaf, np.ndarray) for leaf in restored.values())
    assert_same_bits(state, restored)


def test_the_last_few_are_kept_and_listed_with_their_metadata(tmp_path):
    manager = checkpoint.make_manager(tmp_path / "checkpoints", max_to_keep=2)
    states = {step: make_state(step) for step in (10, 20, 30)}
    for step, state in states.items():
        checkpoint.save(manager, step, state, {"metrics": {"segm/AP": step / 100}})
    manager.wait_until_finished()
    found = checkpoint.read_checkpoints(tmp_path / "checkpoints")
    assert sorted(manager.all_steps()) == [20, 30]
    # Moved away whole: a kill in the middle of a removal would leave half a step that looks like one.
    assert (tmp_path / "checkpoints" / ".removed" / "10" / "metadata").is_dir()
    assert found == {20: {"metrics": {"segm/AP": 0.2}}, 30: {"metrics": {"segm/AP": 0.3}}}
    assert_same_bits(states[30], checkpoint.restore(manager, abstract(states[10]))[0])
    assert_same_bits(states[20], checkpoint.restore(manager, abstract(states[10]), step=20)[0])
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 10 in .*steps there: \[20, 30\]"):
        checkpoint.restore(manager, abstract(states[10]), step=10)
    with pytest.raises(ValueError, match="step 30 is already saved"):
        checkpoint.save(manager, 30, states[30], {})
    checkpoint.save(manager, 40, states[30], {}, wait=True)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["30", "40"]


def test_a_snapshot_is_taken_before_save_returns(tmp_path):
    """The next step overwrites donated buffers while the writing still goes on."""
    manager = checkpoint.make_manager(tmp_path, max_to_keep=9)
    add_one = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {f"p{i}": jnp.zeros((500, 500)) for i in range(20)}
    for step in range(1, 4):
        state = add_one(state)
        checkpoint.save(manager, step, state, {})
    for _ in range(5):
        state = add_one(state)
    manager.wait_until_finished()
    for step in range(1, 4):
        restored, _ = checkpoint.restore(manager, abstract(state), step=step)
        assert {float(x.min()) for x in restored.values()} == {float(x.max()) for x in restored.values()} == {step}


def test_restore_places_leaves_by_the_shardings_asked_for(tmp_path):
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
    state = {"a": np.arange(8.0, dtype=np.float32)}
    manager = checkpoint.make_manager(tmp_path, max_to_keep=1)
    checkpoint.save(manager, 1, state, {}, wait=True)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    restored, _ = checkpoint.restore(manager, {"a": jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding)})
    assert restored["a"].sharding == sharding
    assert_same_bits(state, restored)


def test_a_state_of_another_model_is_named_leaf_by_leaf(tmp_path):
    state = make_state(1)
    manager = checkpoint.make_manager(tmp_path, max_to_keep=1)
    checkpoint.save(manager, 1, state, {}, wait=True)
    other = dataclasses.replace(state, params={"neck": {"proj": {"kernel": jnp.ones((8, 5)), "extra": jnp.ones(1)}}})
    with pytest.raises(ValueError, match="does not fit this model and optimizer") as caught:
        checkpoint.restore(manager, abstract(other))
    message = str(caught.value)
    assert "params/neck/proj/kernel (saved float32[8, 4], expected float32[8, 5])" in message
    assert "params/neck/proj/extra (saved nothing, expected float32[1])" in message
    assert "params/backbone/stem/kernel (saved float32[3, 3, 3, 8], expected nothing)" in message


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    manager = checkpoint.make_manager(tmp_path / "new", max_to_keep=1)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*new"):
        checkpoint.restore(manager, {})


def test_a_file_in_the_way_is_a_clear_error(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match=r"can't create the checkpoints folder .*run/checkpoints"):
        checkpoint.make_manager(tmp_path / "run" / "checkpoints", max_to_keep=1)


@pytest.mark.parametrize("metadata", [{"step": np.int64(3)}, {"path": Path("x")}])
def test_metadata_that_json_does_not_know(tmp_path, metadata):
    manager = checkpoint.make_manager(tmp_path / "checkpoints", max_to_keep=1)
    with pytest.raises(ValueError, match="plain JSON values"):
        checkpoint.save(manager, 1, make_state(1), metadata)
    with pytest.raises(ValueError, match="plain JSON values"):
        checkpoint.save_inference_checkpoint(tmp_path / "best_model", filled(1), metadata)
    assert list(tmp_path.rglob("*")) == [tmp_path / "checkpoints"]


def test_library_versions():
    versions = checkpoint.library_versions()
    assert versions["jax"] == jax.__version__
    assert json.loads(json.dumps(versions)) == versions


def test_nothing_is_logged(tmp_path):
    code = f"""
        import logging, sys
        import numpy as np
        import absl.logging
        logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s %(message)s")
        logging.getLogger("absl").setLevel(logging.INFO)
        from instseg_jax.weights import checkpoint
        manager = checkpoint.make_manager({str(tmp_path / "checkpoints")!r}, max_to_keep=1)
        state = {{"params": {{"a": np.ones(2)}}, "batch_stats": {{}}}}
        for step in (1, 2):
            checkpoint.save(manager, step, state, {{}})
        manager.wait_until_finished()
        checkpoint.restore(manager, state)
        checkpoint.save_inference_checkpoint({str(tmp_path / "best_model")!r}, state, {{}})
        absl.logging.info("others are heard")
        for source in (".", "checkpoints"):
            checkpoint.load_inference_checkpoint({str(tmp_path)!r} + "/" + source)
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("absl")] == ["absl others are heard"]
    # JAX 0.8 says at level INFO that there is no TPU; that is not about checkpoints.
    assert [line for line in done.stderr.splitlines() if "xla_bridge" not in line] == []


# --- variables for inference ------------------------------------------------------------------------


def test_inference_variables_return_to_the_bit(tmp_path):
    variables = {
        "params": {"a": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": np.array([1 / 3, np.nan])}},
        "batch_stats": {"a": {"mean": jnp.ones(2, jnp.bfloat16)}},
    }
    metadata = {"class_names": ["kite", "größe"], "category_ids": [7, 90], "score": 0.25}
    checkpoint.save_inference_checkpoint(tmp_path / "best_model", variables, metadata)
    for path in (tmp_path, tmp_path / "best_model", str(tmp_path)):
        assert checkpoint.is_checkpoint(path)
        loaded, found = checkpoint.load_inference_checkpoint(path)
        assert_same_bits(jax.tree.map(np.asarray, variables), loaded)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded))
        assert found == metadata == checkpoint.read_metadata(path)


def test_any_checkpoint_of_a_run_serves_for_inference(tmp_path):
    state = make_state(3)
    manager = checkpoint.make_manager(tmp_path / "checkpoints", max_to_keep=3)
    for step in (9, 10):  # 10 is the last, although "9" sorts behind it
        checkpoint.save(manager, step, make_state(step), {"step": step})
    manager.wait_until_finished()
    for path, step in ((tmp_path, 10), (tmp_path / "checkpoints", 10), (tmp_path / "checkpoints" / "9", 9)):
        variables, metadata = checkpoint.load_inference_checkpoint(path)
        assert metadata == {"step": step}
        state = make_state(step)
        expected = {name: cut(state.average[name], getattr(state, name)) for name in ("params", "batch_stats")}
        assert_same_bits(jax.tree.map(np.asarray, expected), variables)
    checkpoint.save_inference_checkpoint(tmp_path / "best_model", filled(1), {"step": 4})
    assert checkpoint.read_metadata(tmp_path) == {"step": 4}  # the best goes before the last


def test_averages_that_are_trees_of_their_own(tmp_path):
    """As training states were written before."""
    manager = checkpoint.make_manager(tmp_path, max_to_keep=1)
    state = {**filled(7), **{f"ema_{name}": tree for name, tree in filled(8).items()}}
    checkpoint.save(manager, 1, state, {}, wait=True)
    assert_same_bits(filled(8), checkpoint.load_inference_checkpoint(tmp_path)[0])


def test_a_state_without_averages_gives_its_parameters(tmp_path):
    manager = checkpoint.make_manager(tmp_path, max_to_keep=1)
    state = {**filled(7), "average": None, "opt_state": {"mu": np.ones(3)}}
    checkpoint.save(manager, 1, state, {}, wait=True)
    assert_same_bits(filled(7), checkpoint.load_inference_checkpoint(tmp_path)[0])
    checkpoint.save(manager, 2, {"opt_state": np.ones(3)}, {}, wait=True)
    with pytest.raises(ValueError, match="2 can't be read \\(it holds no params\\)"):
        checkpoint.load_inference_checkpoint(tmp_path)


def test_a_path_without_a_checkpoint(tmp_path):
    (tmp_path / "12").mkdir()
    (tmp_path / "file.txt").write_text("")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file.txt", tmp_path / "12"):
        assert not checkpoint.is_checkpoint(path)
        with pytest.raises(FileNotFoundError, match=f"no checkpoint at {path}: it is neither"):
            checkpoint.load_inference_checkpoint(path)


@pytest.mark.parametrize("damaged", ["variables/*", "variables/d/*", "variables/manifest.ocdbt", "metadata/*"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, damaged):
    checkpoint.save_inference_checkpoint(tmp_path / "best_model", filled(1), {})
    files = [path for path in (tmp_path / "best_model").glob(damaged) if path.is_file()]
    assert files
    for file in files:
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="best_model can't be read") as caught:
        checkpoint.load_inference_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


# --- kills ------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("first_stop", [1, 2, 3])
@pytest.mark.parametrize("second_stop", [0, 1, 2, 3, 4])
def test_a_replacement_stopped_at_any_step_loses_nothing(tmp_path, monkeypatch, first_stop, second_stop):
    """Stop before a rename or in the middle of a removal, and the next replacement as well: nothing is lost."""
    moves, stop_at = 0, 0
    rename, rmtree = Path.rename, shutil.rmtree

    def stop_here():
        nonlocal moves
        moves += 1
        if moves == stop_at:
            raise Killed

    def stopping_rename(self, target):
        stop_here()
        return rename(self, target)

    def stopping_rmtree(path, **options):
        if moves + 1 == stop_at:  # half removed: it looks whole, but the arrays are gone
            rmtree(Path(path) / "variables")
            (Path(path) / "variables").mkdir()
        stop_here()
        return rmtree(path, **options)

    monkeypatch.setattr(Path, "rename", stopping_rename)
    monkeypatch.setattr(shutil, "rmtree", stopping_rmtree)
    best = tmp_path / "best_model"
    for value in (1, 2):
        checkpoint.save_inference_checkpoint(best, filled(value), {"value": value})
    newest = 2
    for value, stop in ((3, first_stop), (4, second_stop), (5, 0)):
        moves, stop_at = 0, stop
        try:
            checkpoint.save_inference_checkpoint(best, filled(value), {"value": value})
            was_stopped = False
        except Killed:
            was_stopped = True
        if value == 3:
            assert was_stopped
        variables, metadata = checkpoint.load_inference_checkpoint(tmp_path)
        assert metadata["value"] in ((newest, value) if was_stopped else (value,))
        newest = metadata["value"]
        assert set(variables["params"]["a"]["bias"].tolist()) == {newest}
    assert list(tmp_path.iterdir()) == [best]


def run_python(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


SAVING_FOREVER = """
import sys
import numpy as np
from instseg_jax.weights import checkpoint
workdir = sys.argv[1]
manager = checkpoint.make_manager(workdir + "/checkpoints", max_to_keep=2)
last = max(manager.all_steps(), default=0)
print("started", flush=True)
for step in range(last + 1, 10**6):
    params = {str(i): np.full((300, 300), step, np.float32) for i in range(20)}
    variables = {"params": params, "batch_stats": {"mean": np.full(3, step, np.float32)}}
    checkpoint.save(manager, step, variables, {"step": step})
    checkpoint.save_inference_checkpoint(workdir + "/best_model", variables, {"step": step})
    print(step, flush=True)
"""


def only_steps(folder: Path) -> bool:
    return all(path.name.isdecimal() for path in folder.iterdir())


def test_kill_9_at_random_moments(tmp_path):
    rng = random.Random(0)
    reached = 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVING_FOREVER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout.readline() == "started\n"
        lines = [process.stdout.readline() for _ in range(2)]
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        printed = max(map(int, [*lines, *rest]))
        assert printed > reached

        variables, metadata = checkpoint.load_inference_checkpoint(tmp_path / "best_model")
        assert metadata["step"] in (printed, printed + 1)
        assert {value.min() for value in variables["params"].values()} == {metadata["step"]}
        steps = checkpoint.read_checkpoints(tmp_path / "checkpoints")
        reached = max(steps)
        assert reached >= printed - 1  # the writing of the last one may have been under way
        manager = checkpoint.make_manager(tmp_path / "checkpoints", max_to_keep=2)
        params = {str(i): jax.ShapeDtypeStruct((300, 300), np.float32) for i in range(20)}
        wanted = {"params": params, "batch_stats": {"mean": jax.ShapeDtypeStruct((3,), np.float32)}}
        state, metadata = checkpoint.restore(manager, wanted)
        assert metadata == {"step": reached}
        assert {float(x.min()) for x in state["params"].values()} == {float(reached)}
        manager.close()
        deadline = time.monotonic() + 30  # a thread removes what the killed save has left
        while not only_steps(tmp_path / "checkpoints") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert only_steps(tmp_path / "checkpoints")


def test_a_full_disk_is_an_error_and_keeps_what_there_is(tmp_path):
    code = f"""
        import resource
        import numpy as np
        from instseg_jax.weights import checkpoint
        manager = checkpoint.make_manager({str(tmp_path / "checkpoints")!r}, max_to_keep=1)
        best = {str(tmp_path / "best_model")!r}
        state = {{"params": {{"a": np.random.rand(1000, 100)}}, "batch_stats": {{}}}}
        checkpoint.save(manager, 1, state, {{"step": 1}}, wait=True)
        checkpoint.save_inference_checkpoint(best, state, {{"step": 1}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        failed = 0
        for save in (
            lambda: checkpoint.save(manager, 2, state, {{"step": 2}}, wait=True),
            lambda: checkpoint.save_inference_checkpoint(best, state, {{"step": 2}}),
        ):
            try:
                save()
            except Exception:
                failed += 1
        print(failed)
    """
    done = run_python(code)
    assert done.stdout == "2\n", done.stderr
    assert checkpoint.read_metadata(tmp_path / "best_model") == {"step": 1}
    assert checkpoint.read_checkpoints(tmp_path / "checkpoints") == {1: {"step": 1}}
    variables, _ = checkpoint.load_inference_checkpoint(tmp_path)
    assert variables["params"]["a"].shape == (1000, 100)
