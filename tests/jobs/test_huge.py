"""Jobs of any size: gigapixels that survive kills and a bad block, two workers for one, and what a plan costs."""

import contextlib
import filecmp
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import HELPERS, ROOT
from repeating_raster import BLOCK, write_repeating

pytest.importorskip("rasterio")
pytestmark = pytest.mark.slow
GIGAPIXELS = float(os.environ.get("INSTSEG_GIGAPIXELS", "20"))
KILLS, IN_MERGE = 20, 5
TILE, STRIDE = 1280, 1200
SECONDS = 4 * 3600


def start(*arguments: str, standin: str = "160,0") -> subprocess.Popen:
    paths = os.pathsep.join([str(ROOT), str(HELPERS)])
    environment = os.environ | {"PYTHONPATH": paths, "INSTSEG_HUGE_PAGES": "0", "INSTSEG_STANDIN": standin}
    command = [sys.executable, str(HELPERS / "standin_cli.py"), "predict", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True)


def finish(process: subprocess.Popen, code: int = 0) -> tuple[float, float, float, float]:
    """CPU seconds, MB at most, and when the stand-in was called first and the command ended."""
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == code, output + errors
    cpu, memory, began, ended = map(float, output.partition("standin:")[2].split())
    return cpu, memory, began, ended


def memory_mb(process: subprocess.Popen) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def num_parts(job: Path) -> int:
    return len(list((job / "parts").glob("*.npz")))


def total_parts(job: Path) -> int:
    return json.loads((job / "plan.json").read_text())["parts"]


def calm_seconds(job: Path, ended: float) -> tuple[float, float]:
    """Of an undisturbed job: seconds a part, and of the merge."""
    written = sorted(path.stat().st_mtime for path in (job / "parts").iterdir())
    return statistics.median(b - a for a, b in itertools.pairwise(written)), ended - written[-1]


def holds_lease(process: subprocess.Popen, job: Path) -> bool:
    """Whether a process is at a part, or at the merge."""
    for path in (job / "leases").glob("[!.]*"):
        with contextlib.suppress(OSError, ValueError):  # given back, or being written
            if json.loads(path.read_text())["process"] == process.pid:
                return True
    return False


def kill_at_random(arguments: list[str], job: Path, calm: Path, ended: float) -> tuple[int, int, float]:
    """Start a command KILLS times and kill it: how often in the parts, how often in the merge, and its most MB.

    The moments are drawn from the progress of the work, of which starting is no part: evenly over the parts (1.5 is
    half a part's time after the second part began), the last IN_MERGE ones evenly over the merge.
    """
    rng, total = random.Random(0), total_parts(calm)
    part_seconds, merge_seconds = calm_seconds(calm, ended)
    moments = sorted(rng.uniform(0, total) for _ in range(KILLS - IN_MERGE))
    moments += [total + rng.random() for _ in range(IN_MERGE)]
    in_parts, in_merge, most = 0, 0, 0.0
    for moment in moments:
        whole, rest = int(moment), moment % 1
        process = start(*arguments)
        while process.poll() is None and not (num_parts(job) >= whole and holds_lease(process, job)):
            time.sleep(0.01)
        begun, patience = time.monotonic(), 0.9 * rest * (merge_seconds if whole == total else part_seconds)
        while process.poll() is None and num_parts(job) <= whole and time.monotonic() - begun < patience:
            time.sleep(0.01)
        memory = memory_mb(process)
        process.kill()
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            most = max(most, memory)
            in_parts += num_parts(job) < total
            in_merge += num_parts(job) == total
    return in_parts, in_merge, most


def test_gigapixels_survive_kills_and_a_bad_block(tmp_path):
    """INSTSEG_GIGAPIXELS (20) in at most 1.5 GB: killed 20 times, the files are those of an undisturbed run."""
    side = math.ceil((GIGAPIXELS * 1e9) ** 0.5 / BLOCK) * BLOCK
    bad = (side // BLOCK // 2, side // BLOCK // 2)
    path = write_repeating(tmp_path / "huge.tif", side, bad=bad)
    options = [f"--input={path}", f"--tile={TILE}", f"--overlap={1 - STRIDE / TILE}", "--no-whole_image"]
    options.append("--formats=json")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    cpu, memory, began, ended = finish(start(*options, f"--workdir={calm}"), code=1)
    print(f"{side} x {side}: undisturbed {ended - began:.0f} s, {cpu:.0f} s of CPU time, {memory:.0f} MB")
    arguments = [*options, f"--workdir={killed}"]
    in_parts, in_merge, most = kill_at_random(arguments, killed, calm, ended)
    _, last, *_ = finish(start(*arguments), code=1)
    print(f"killed {in_parts} times in the parts, {in_merge} in the merge: {max(most, last):.0f} MB at most")
    names = sorted(file.name for file in (calm / "predictions").iterdir())
    assert names == ["failed.json", "huge_res.json"]
    assert filecmp.cmpfiles(calm / "predictions", killed / "predictions", names, shallow=False)[1:] == ([], [])
    assert sorted(p.name for p in (calm / "parts").iterdir()) == sorted(p.name for p in (killed / "parts").iterdir())
    assert in_parts + in_merge >= KILLS - 5 and min(in_parts, in_merge) > 0 and max(memory, most, last) <= 1500
    assert not list(killed.glob(".merging*"))

    starts = [x for x in range(0, side, STRIDE) if x < (bad[0] + 1) * BLOCK and x + TILE > bad[0] * BLOCK]
    failed = {tuple(one["window"]) for one in json.loads((calm / "predictions" / "failed.json").read_text())}
    assert failed == {(x, y, x + TILE, y + TILE) for x in starts for y in starts}
    objects, touched = (side // BLOCK) ** 2, ((starts[-1] + TILE - starts[0]) // BLOCK + 2) ** 2
    with (calm / "predictions" / "huge_res.json").open() as file:
        found = sum('"cls_id"' in line for line in file)
    print(f"{found} of {objects} objects, {len(failed)} windows failed")
    assert objects - touched <= found < objects


def test_two_workers_take_half_the_time(tmp_path):
    """At least 0.95 of linear, with a stand-in that waits as for a device: what workers share is no bottleneck."""
    path = write_repeating(tmp_path / "map.tif", 6000)
    options = [f"--input={path}", "--tile=64", "--overlap=0", "--no-whole_image", "--compute_only"]
    seconds = {}
    for count in (1, 2):
        arguments = [*options, f"--workdir={tmp_path / str(count)}"]
        workers = [start(*arguments, standin="64,0.04") for _ in range(count)]
        times = [finish(worker)[2:] for worker in workers]
        end = max(ended for _, ended in times)
        seconds[count] = sum(end - began for began, _ in times)
    print(f"one worker {seconds[1]:.1f} s, two {seconds[2]:.1f} s together: {seconds[1] / seconds[2]:.3f} of linear")
    assert num_parts(tmp_path / "1") == num_parts(tmp_path / "2") == 36
    assert seconds[1] / seconds[2] >= 0.95


def test_a_plan_costs_little(tmp_path):
    """Planned in parts and merged from them, 20,000 x 20,000 pixels take at most 5 % more than without."""
    path = write_repeating(tmp_path / "map.tif", 20_000)
    options = [f"--input={path}", "--tile=640", "--formats=json"]
    plain = finish(start(*options, f"--save_path={tmp_path / 'plain'}"))[0]
    planned = finish(start(*options, f"--workdir={tmp_path / 'job'}"))[0]
    print(f"plain {plain:.1f} s of CPU time, planned {planned:.1f} s")
    assert filecmp.cmp(tmp_path / "plain/map_res.json", tmp_path / "job/predictions/map_res.json", shallow=False)
    assert planned <= 1.05 * plain
