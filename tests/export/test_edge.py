"""An export on a bare machine: a new environment with onnxruntime, numpy and Pillow, and nothing else."""

import json
import os
import subprocess
import sys
import time

import pytest
from export_case import SIZE, make_run
from PIL import Image

import instseg_jax
from instseg_jax.data import coco
from instseg_jax.export.export import Request, export_model
from instseg_jax.inference.predictor import load_model
from instseg_jax.runtimes.formats import require
from instseg_jax.scoring.pictures import calibration_images, comparison_images


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "ort"])
def test_a_folder_runs_with_onnxruntime_numpy_and_pillow_alone(format, tmp_path):
    """Also prints what that takes: `python -m pytest -s -m slow tests/export/test_edge.py`."""
    require(format)
    run = make_run(tmp_path / "run")
    model = load_model(run)
    images = comparison_images(model, SIZE)[:1]
    folder, small = tmp_path / "export", tmp_path / "int8"
    export_model(model, folder, Request(format, 1, SIZE), source="a run", images=images)
    calibration = calibration_images(model, SIZE, None)[:4]
    request = Request(format, 1, SIZE, precision="int8")
    export_model(model, small, request, source="a run", images=images, calibration=calibration)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", str(bare)], check=True, env=environment)
    python = bare / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "numpy", "onnxruntime", "pillow"]
    subprocess.run(install, check=True, env=environment)
    check = (
        "import importlib.util as u, sys; sys.exit(any(u.find_spec(m) for m in ('jax', 'flax', 'cv2', 'instseg_jax')))"
    )
    subprocess.run([str(python), "-c", check], check=True, env=environment, cwd=tmp_path)
    # A photograph that says it is to be turned: Pillow and OpenCV must agree on it.
    picture = tmp_path / "picture.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    dataset = coco.read_split(coco.EMBEDDED, "val")
    Image.open(dataset.image_path(0)).crop((0, 0, 200, 120)).save(picture, exif=exif, quality=95)
    (wanted,) = instseg_jax.create_pipeline(weights=run, device="cpu", threshold=0.3)(picture)
    for export in (folder, small):
        started = time.perf_counter()
        command = [str(python), str(export / "postprocess.py"), str(picture), "--threshold=0.3"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)["res"]
        seconds = time.perf_counter() - started
        megabytes = sum(file.stat().st_size for file in export.iterdir()) / 1e6
        print(f"{export.name}: {megabytes:.1f} MB, {seconds:.1f} s from the command to the JSON")
        assert tuple(found["size"]) == wanted.size == (200, 120)
        if export == folder:
            assert [box["label"] for box in found["boxes"]] == [box["label"] for box in wanted.boxes]
            for box, other in zip(found["boxes"], wanted.boxes, strict=True):
                # Resized in numpy here, by OpenCV there: a grey level apart in few pixels.
                assert box["score"] == pytest.approx(other["score"], abs=0.01)
                assert box["coordinate"] == pytest.approx(other["coordinate"], abs=0.5)
        else:
            assert found["boxes"]
