"""A job gives one answer, whoever computes its parts, how often, and in which order."""

import contextlib
import json
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from fake_model import make_pipeline, picture
from PIL import Image

from instseg_jax.geo.rasters import RasterImage, write_geotiff
from instseg_jax.jobs import merge
from instseg_jax.jobs.merge import merged_results
from instseg_jax.jobs.parts import compute_part, read_failures
from instseg_jax.jobs.plan import Plan, build_plan, read_plan, write_plan
from instseg_jax.jobs.progress import read_state
from instseg_jax.jobs.workers import failed_parts, lease, missing_parts, part_file, work, work_until_done
from instseg_jax.results.saving import save_results

pytest.importorskip("rasterio")
pytest.importorskip("pyogrio")
FORMATS = ("img", "json", "coco", "geojson", "gpkg")


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline(batch_size=4)


def settings(pipe, **options) -> dict:
    named = {"tile": 64, "overlap": 0.25, "whole_image": False} | options
    model = {"model": "fake", "bands": None, "thresholds": pipe.thresholds.tolist(), "batch_size": pipe.batch_size}
    return named | model | {"class_names": pipe.class_names, "category_ids": pipe.category_ids}


def scattered(seed: int, size: tuple[int, int], count: int) -> np.ndarray:
    """A picture with rectangles, some larger than a window."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        x, y = int(rng.integers(0, size[1])), int(rng.integers(0, size[0]))
        longest = 200 if rng.random() < 0.1 else 40
        found.append((int(rng.integers(0, 3)), x, y, x + int(rng.integers(4, longest)), y + int(rng.integers(4, 40))))
    return picture(*found, size=size)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """A raster of 21 x 20 windows in four super-tiles, pictures, one that is broken, and a small raster."""
    folder = tmp_path_factory.mktemp("inputs")
    map_ = scattered(1, (1000, 1030), 150)
    write_geotiff(folder / "map.tif", map_, epsg=32633, origin=(500000, 5000000), pixel_size=0.1)
    for i in range(3):
        Image.fromarray(scattered(i + 5, (60 + 40 * i, 70), 5)).save(folder / f"z{i}.png")
    (folder / "y.png").write_bytes(b"broken")
    write_geotiff(folder / "a.tif", scattered(3, (100, 130), 4), epsg=32633, origin=(0, 0), pixel_size=0.1)
    return [str(path) for path in sorted(folder.iterdir())]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def merged(plan: Plan, job: Path, folder: Path) -> dict[str, bytes]:
    failed: list = []
    results = merged_results(plan, job, failed, with_images=True)
    save_results(results, folder, formats=FORMATS)
    return contents(folder) | {"failed": repr(failed).encode()}


def planned(pipe, inputs, job: Path, **options) -> Plan:
    plan = build_plan(inputs, settings(pipe, **options))
    write_plan(plan, job)
    assert read_plan(job) == plan and read_plan(job).digest == plan.digest
    return plan


@pytest.mark.parametrize("whole_image", [False, True])
def test_a_job_finds_what_a_plain_prediction_finds(pipe, inputs, tmp_path, whole_image):
    options = {"tile": 64, "overlap": 0.25, "whole_image": whole_image}
    plan = planned(pipe, inputs, tmp_path / "job", **options)
    assert [part.kind for part in plan.parts].count("tile") == 5
    work(tmp_path / "job", plan, lambda part: compute_part(plan, part, pipe))
    found = merged(plan, tmp_path / "job", tmp_path / "a")
    save_results(pipe.predict(inputs, **options), tmp_path / "b", formats=FORMATS)
    plain = contents(tmp_path / "b")
    assert len(json.loads(plain["map_res.json"])["boxes"]) > 60
    del found["failed"]
    assert found == plain


def test_a_result_on_the_disk_is_written_as_one_in_memory(pipe, inputs, tmp_path, monkeypatch):
    plan = planned(pipe, inputs, tmp_path / "job")
    work(tmp_path / "job", plan, lambda part: compute_part(plan, part, pipe))
    held = merged(plan, tmp_path / "job", tmp_path / "a")
    monkeypatch.setattr(merge, "MOST_HELD", 0)
    large = merged(plan, tmp_path / "job", tmp_path / "b")
    assert {name for name in held if name not in large} == {"map_res.tif", "a_res.tif"}, "no drawings"
    assert {name: data for name, data in held.items() if name in large} == large


# --- workers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def computed(pipe, inputs) -> dict[int, bytes]:
    """The files of all parts."""
    plan = build_plan(inputs, settings(pipe))
    return {part.number: compute_part(plan, part, pipe) for part in plan.parts}


@pytest.fixture(scope="module")
def undisturbed(pipe, inputs, computed, tmp_path_factory) -> dict[str, bytes]:
    job = tmp_path_factory.mktemp("undisturbed")
    plan = planned(pipe, inputs, job)
    work(job, plan, lambda part: computed[part.number])
    return merged(plan, job, job / "out")


def test_a_part_is_the_same_file_every_time(pipe, inputs, computed):
    plan = build_plan(inputs, settings(pipe))
    assert len(set(computed.values())) == len(plan.parts) == 6
    for part in reversed(plan.parts):
        assert compute_part(plan, part, make_pipeline(batch_size=4)) == computed[part.number]


@pytest.mark.parametrize("count", [1, 7, 64])
def test_any_number_of_workers_gives_one_answer(pipe, inputs, computed, undisturbed, tmp_path, count):
    """Each is killed now and then: before it has computed, or after; some are late and write what is there already."""
    plan, rng = planned(pipe, inputs, tmp_path), random.Random(count)
    fates = [rng.random() for _ in range(count)]

    def run(number: int) -> None:
        def compute(part):
            if fates[number] < 0.3:
                raise KeyboardInterrupt
            if fates[number] > 0.8:  # late: another one has it already
                part_file(tmp_path, part.number).write_bytes(computed[part.number])
            return computed[part.number]

        with contextlib.suppress(KeyboardInterrupt):
            work(tmp_path, plan, compute)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work_until_done(tmp_path, plan, lambda part: computed[part.number])
    assert not missing_parts(tmp_path, plan) and not list((tmp_path / "leases").iterdir())
    assert merged(plan, tmp_path, tmp_path / "out") == undisturbed


def test_shares_are_all_of_it(pipe, inputs, computed, undisturbed, tmp_path):
    plan = planned(pipe, inputs, tmp_path)
    counts = [work(tmp_path, plan, lambda part: computed[part.number], share=(i, 3)) for i in (2, 0, 1)]
    assert counts == [2, 2, 2] and merged(plan, tmp_path, tmp_path / "out") == undisturbed


def test_leases(tmp_path):
    with lease(tmp_path, "1") as first, lease(tmp_path, "1") as second:
        assert first and not second
    path = tmp_path / "leases" / "1"
    assert not path.exists()
    path.write_text(json.dumps({"host": "another", "process": 1, "token": "x"}))
    with lease(tmp_path, "1", 60) as held:
        assert not held, "it may live"
    os.utime(path, (0, 0))
    with lease(tmp_path, "1", 60) as held:
        assert held, "it has not been touched for long"


def test_a_worker_that_lives_keeps_its_lease(tmp_path):
    with lease(tmp_path, "1", 0.6) as held:
        path = tmp_path / "leases" / "1"
        path.write_text(path.read_text().replace(os.uname().nodename, "another"))
        os.utime(path, (0, 0))
        deadline = threading.Event()
        deadline.wait(0.5)
        with lease(tmp_path, "1", 0.6) as other:
            assert held and not other


def test_a_lost_lease_of_a_dead_process_is_free_at_once(tmp_path):
    (tmp_path / "leases").mkdir()
    dead = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(dead, 0)
    holder = {"host": os.uname().nodename, "process": dead, "token": "x"}
    (tmp_path / "leases" / "1").write_text(json.dumps(holder))
    with lease(tmp_path, "1") as held:
        assert held


# --- what can't be read -------------------------------------------------------------------------------------------


def break_block(path: Path, row: int, column: int) -> bytes:
    """Overwrite a block of a GeoTIFF; returns what the file was."""
    import rasterio

    whole = path.read_bytes()
    with rasterio.open(path) as file:
        place = int(file.get_tag_item(f"BLOCK_OFFSET_{column}_{row}", "TIFF", bidx=1))
    path.write_bytes(whole[:place] + bytes(60) + whole[place + 60 :])
    return whole


def test_a_bad_block_costs_itself(pipe, tmp_path):
    path = write_geotiff(tmp_path / "map.tif", scattered(1, (700, 700), 150), epsg=32633, origin=(0, 0), pixel_size=0.1)
    state = path.stat()
    whole = break_block(path, 1, 1)  # pixels 256 to 511
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    job = tmp_path / "job"
    plan = planned(pipe, [str(path)], job)
    work(job, plan, lambda part: compute_part(plan, part, pipe))
    failed = {tuple(one.window) for part in plan.parts for one in read_failures(part_file(job, part.number), plan)}
    # Windows begin every 48 pixels; those that touch the block.
    starts = [start for start in range(0, 700 - 64, 48) if start < 512 and start + 64 > 256]
    assert failed == {(x, y, x + 64, y + 64) for x in starts for y in starts}
    assert read_state(job, plan).failed == len(starts) ** 2
    broken = merged(plan, job, tmp_path / "broken")
    assert len(json.loads(broken["map_res.json"])["boxes"]) > 40

    path.write_bytes(whole)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    raster_again(path)
    again = failed_parts(job, plan)
    assert len(again) == 1
    assert work(job, plan, lambda part: compute_part(plan, part, pipe), again=again) == 1
    assert work(job, plan, lambda part: compute_part(plan, part, pipe), again=again) == 0, "it is another file now"
    mended = merged(plan, job, tmp_path / "mended")
    save_results(pipe.predict(str(path), tile=64, overlap=0.25, whole_image=False), tmp_path / "plain", formats=FORMATS)
    assert mended["failed"] == b"[]" and mended["map_res.json"] != broken["map_res.json"]
    assert mended["map_res.json"] == (tmp_path / "plain" / "map_res.json").read_bytes()


def raster_again(path: Path) -> None:
    """Close what a worker keeps open, as another process would have it."""
    from instseg_jax.jobs import parts

    parts._raster_of.cache_clear()
    assert RasterImage(path).size == (700, 700)


def test_damage_of_a_part_is_told(pipe, inputs, computed, tmp_path):
    plan = planned(pipe, inputs, tmp_path)
    work(tmp_path, plan, lambda part: computed[part.number])
    path = part_file(tmp_path, 1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"0000001.npz is damaged: .*; remove it"):
        merged(plan, tmp_path, tmp_path / "out")
    path.write_bytes(computed[1].replace(plan.digest.encode(), b"0" * 16))
    with pytest.raises(ValueError, match=r"is damaged|belongs to the plan"):
        merged(plan, tmp_path, tmp_path / "out")
