"""`--engine=ray` on a cluster of two cores: the answers of one process, also when workers break."""

import dataclasses
import sys

import numpy as np
import pytest
from fake_model import make_pipeline
from places import HELPERS, ROOT
from repeating_raster import write_repeating

from instseg_jax import cluster
from instseg_jax.cli import main
from instseg_jax.jobs import plan
from instseg_jax.sweeps.state import read_state
from instseg_jax.verbs import predict

pytestmark = pytest.mark.slow
SWEEP = (
    "import sys; from instseg_jax.sweeps import launch; from instseg_jax.cli import main; "
    f"launch.PROGRAM = (sys.executable, {str(HELPERS / 'sweep_run.py')!r}); sys.exit(main())"
)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, num_gpus=0, include_dashboard=False)
        yield ray
        ray.shutdown()


@pytest.fixture
def run(ray, monkeypatch, tmp_path, capsys):
    """Run a command whose workers are of the given program: (exit code, what it said)."""
    pipeline = make_pipeline(image_size=160, batch_size=4)
    monkeypatch.setattr(predict, "_pipeline", lambda options: pipeline)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")

    def command(program: tuple[str, ...], *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(cluster, "PROGRAM", (sys.executable, *program))
        code = main(list(arguments))
        said = capsys.readouterr()
        return code, said.out + said.err

    return command


STAND_IN = (str(HELPERS / "standin_cli.py"),)
FAILS = ("-c", "import sys; sys.exit('error: no room is left')")
PREDICT = ("predict", "--input=map.tif", "--tile=160", "--no-whole_image", "--formats=json")


def test_predictions(run, tmp_path):
    pytest.importorskip("rasterio")
    write_repeating(tmp_path / "map.tif", 3000)
    assert run(STAND_IN, *PREDICT, "--save_path=plain")[0] == 0
    wanted = (tmp_path / "plain" / "map_res.json").read_bytes()
    code, said = run(STAND_IN, *PREDICT, "--workdir=job", "--engine=ray", "--jobs=2")
    assert code == 0 and "ended with an error" not in said
    assert (tmp_path / "job" / "predictions" / "map_res.json").read_bytes() == wanted and b'"boxes"' in wanted
    assert len(plan.read_plan(tmp_path / "job").parts) == 4

    code, said = run(FAILS, *PREDICT, "--workdir=other", "--engine=ray")
    assert code == 0 and "error: no room is left" in said
    assert "2 of 2 workers ended with an error; what they left is computed here" in said
    assert (tmp_path / "other" / "predictions" / "map_res.json").read_bytes() == wanted


def test_who_computed(run, tmp_path, monkeypatch):
    """With workers that end well nothing is left for the process that asks."""
    pytest.importorskip("rasterio")
    write_repeating(tmp_path / "map.tif", 3000)

    idle = dataclasses.replace(make_pipeline(image_size=160, batch_size=4), run=None)
    monkeypatch.setattr(predict, "_pipeline", lambda options: idle)
    assert run(STAND_IN, *PREDICT, "--workdir=job", "--engine=ray")[0] == 0
    with pytest.raises(TypeError):
        run(FAILS, *PREDICT, "--workdir=other", "--engine=ray", "--debug")


def test_a_sweep(run, tmp_path):
    config = f"--config={ROOT / 'configs' / 'quickstart.py'}"
    rates = "--axis=optimizer.learning_rate=1e-3,3e-3"
    code, said = run(("-c", SWEEP), "sweep", config, "--workdir=s", rates, "--seeds=2", "--engine=ray")
    assert code == 0 and "4 of 4 runs finished" in said
    runs = sorted(path for path in (tmp_path / "s").iterdir() if path.is_dir())
    assert len(runs) == 4 and all(read_state(folder).status == "finished" for folder in runs)
    scores = [read_state(folder).scores["segm/AP"] for folder in runs]
    np.testing.assert_allclose(sorted(scores), [0.1, 0.11, 0.3, 0.31])
    assert "4 are finished already" in run(FAILS, "sweep", config, "--workdir=s", rates, "--seeds=2", "--engine=ray")[1]

    code, said = run(FAILS, "sweep", config, "--workdir=t", rates, "--engine=ray", "--jobs=1")
    assert code == 1 and said.count("failed: error: no room is left") == 2
